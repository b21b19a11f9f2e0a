"""Trainings that are killed at random moments and go on: run as a script, it prints what became of each as JSON.

Starting Python and torch takes seconds, a training here takes tenths of one. So this process imports everything once
(by training each kind once, since much is imported on first use), and forks a child for each training; a child that is
killed is a process killed like any other.

    python tests/faults/driver.py FOLDER KILLS SEED
"""

import json
import math
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from tqdm import tqdm

import bayesmeta as bm
from bayesmeta import MetaSVI
from bayesmeta.train import checkpoint

STEPS = 30
TASKS = bm.tasks.Sinusoid(noise=0.1)


def _network(*extra):
    return torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), *extra, torch.nn.Linear(8, 1))


def maml(folder, resume):
    """Adam, a schedule, validation with patience that runs out before the end."""
    torch.manual_seed(0)
    method = bm.MAML(bm.NeuralTaskModel(_network(), bm.Gaussian(0.7)), inner_lr=0.05)
    options = {
        "optimizer": lambda p: torch.optim.AdamW(p, 1e-2),
        "schedule": bm.schedules.cosine(STEPS, warmup=5),
        "validation": TASKS.sample(6, support=5, query=5, generator=99),
        "validate_every": 3,
        "patience": 6,
        "min_delta": 1.0,
    }
    _fit(method, folder, resume, **options)


class Shared(torch.nn.Module):
    """A method of a user's own, with noise from torch's global generator, a buffer, and now and then NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = _network(torch.nn.Dropout(0.3))
        self.register_buffer("losses", torch.zeros(()))

    def prepare(self, batch):
        pass

    def loss(self, batch, *, generator=None):
        loss = (self.network(batch.query.x).squeeze(-1) - batch.query.y).square().mean()
        self.losses += loss.detach()
        return loss * (math.nan if self.training and torch.rand((), generator=generator) < 0.2 else 1.0)


def dropout(folder, resume):
    """Lookahead within a round, several batches a step, steps that are skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says once that steps are skipped
        _fit(
            Shared(), folder, resume, optimizer=lambda p: bm.Lookahead(torch.optim.Adam(p, 1e-2)),
            accumulate=2, clip=10.0, nan_policy="skip",
        )  # fmt: skip


def abml(folder, resume):
    """A method with noise of its own."""
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(_network(), bm.Gaussian(0.5), bm.priors.Normal(1.0))
    _fit(bm.ABML(model, inner_steps=2, inner_lr=1e-3), folder, resume, checkpoint_every=1, chunk=3)


def program(x, y=None, mask=None):
    """Slopes of tasks, with one global scale."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(0.0, scale))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.5), obs=y)


def svi(folder, resume):
    """A loop of the user's own around MetaSVI, on some of the tasks of an AutoGuide at a time."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    fixed = bm.tasks.FixedTasks(TASKS.sample(8, support=4, query=2, generator=5))
    steps = MetaSVI(program, AutoNormal(program), lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO())
    path = folder / "svi.pt"
    if resume and path.exists():
        steps.load(path, fixed.sample(3, support=4, generator=0))
    while steps.steps < STEPS:
        generator = torch.Generator().manual_seed(steps.steps)
        steps.step(fixed.sample(3, support=4, generator=generator))
        if steps.steps % 2 == 0:
            steps.save(path)


KINDS = [maml, dropout, abml, svi]


def _fit(method, folder, resume, **options):
    options = {"steps": STEPS, "tasks_per_step": 4, "checkpoint_every": 2, "log_every": 5} | options
    options |= {"support": 5, "query": 5, "seed": 3, "device": "cpu", "progress": False}
    bm.fit(method, TASKS, out=folder, resume=resume, **options)


# -- processes ------------------------------------------------------------------------------------------------------


def fork(function, *arguments):
    """Run a function in a child; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(function, *arguments):
    """Run a function in a child to its end; returns its seconds."""
    begin = time.monotonic()
    pid = fork(function, *arguments)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise SystemExit(f"{function.__name__} ended with {status}")
    return time.monotonic() - begin


def kill(delay, function, *arguments):
    """Kill a child after so many seconds; returns whether it was still running."""
    pid = fork(function, *arguments)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


# -- what a run leaves ------------------------------------------------------------------------------------------------


def difference(a, b, where=""):
    """The first place where two contents differ bit by bit, or None."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        same = same and a.contiguous().view(-1).numpy().tobytes() == b.contiguous().view(-1).numpy().tobytes()
        return None if same else where
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((d for k in a if (d := difference(a[k], b[k], f"{where}/{k}")) is not None), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f"{where}/{i}"))), None)
    return None if type(a) is type(b) and a == b else where


def contents(folder):
    """Everything that a run has left, without its times."""
    found = {path.name: checkpoint.load(path) for path in folder.glob("*.pt")}
    for content in found.values():
        content.pop("seconds", None)
    for path in folder.glob("log.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found["log"] = [{k: v for k, v in line.items() if "seconds" not in k and "per_" not in k} for line in lines]
    return found


def one(kind, reference, seconds, folder, random_numbers):
    """Kill a training at a random moment, perhaps again while it goes on, and let it go on to its end."""
    while True:
        name = folder / f"{kind.__name__}_{random_numbers.getrandbits(48):x}"
        if kill(random_numbers.uniform(0.15, 1.0) * seconds, kind, name, False):
            break
    last = next((path for path in (name / "checkpoint.pt", name / "svi.pt") if path.exists()), None)
    content = {"step": 0} if last is None else checkpoint.load(last)
    at = content["step"] if "step" in content else content["state"]["steps"]
    cut = len(list(name.glob("*.tmp*")))
    started = last is not None or any((name / file).exists() for file in ("config.json", "log.jsonl"))
    if started and random_numbers.random() < 0.3:
        kill(random_numbers.uniform(0.0, seconds), kind, name, True)
    finish(kind, name, started)
    return {"kind": kind.__name__, "step": at, "cut": cut, "difference": difference(reference, contents(name))}


def main(folder, kills, seed):
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of its own
    random_numbers = random.Random(seed)
    references = {}
    for kind in KINDS:
        kind(folder / f"{kind.__name__}_warm_up", False)
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads must not be forked"
    for kind in KINDS:
        seconds = finish(kind, folder / f"{kind.__name__}_whole", False)
        references[kind] = contents(folder / f"{kind.__name__}_whole"), seconds
    for i in range(kills):
        kind = KINDS[i % len(KINDS)]
        reference, seconds = references[kind]
        print(json.dumps(one(kind, reference, seconds, folder, random_numbers)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
