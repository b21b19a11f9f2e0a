"""What two ranks do together: run as a script, it writes what each check found on each rank as JSON.

Starting Python and torch takes seconds, a check tenths of one. So this process imports everything once, forks the two
ranks, which join as under torchrun, and goes through all checks in one process group.

    python -m tests.distributed_ranks FOLDER [CHECK …]
"""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import traceback
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import bayesmeta as bm
from bayesmeta.tabular import evaluate as evaluation
from bayesmeta.tabular.fit import fit_csv
from bayesmeta.train import checkpoint
from bayesmeta.train.distributed import Group, Ranks, digest
from bayesmeta.train.fit import fit

TASKS = bm.tasks.Sinusoid(noise=0.1)
VALIDATION = TASKS.sample(7, support=5, query=5, generator=99)


def maml(seed=0):
    torch.manual_seed(seed)
    return bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.7)), inner_lr=0.05)


def abml():
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.5), bm.priors.Normal(1.0))
    return bm.ABML(model, inner_steps=2, inner_lr=1e-3)


def last_layer():
    torch.manual_seed(0)
    network = bm.nets.mlp(1, [8], 1, activation="tanh")
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5, learn_scale=True), bm.priors.Normal(1.0), task_modules="head")
    return bm.BayesianLastLayer(model)


def train(method, tasks_per_step=4, tasks=TASKS, steps=12, **options):
    options = {"optimizer": lambda p: torch.optim.SGD(p, 1e-2), "support": 5, "query": 5, "seed": 3} | options
    options = {"log_every": 1, "device": "cpu", "progress": False} | options
    return fit(method, tasks, steps=steps, tasks_per_step=tasks_per_step, **options)


class Own(nn.Module):
    """A user's own: a line through all tasks, that notes what it is given and does what it is told."""

    def __init__(self, then=None, draws=True):
        super().__init__()
        self.draws = draws
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.unused = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("seen", torch.zeros(()))
        self.then, self.calls, self.noise, self.x = then, 0, [], []

    def prepare(self, batch):
        pass

    def loss(self, batch, *, generator=None):
        error = (self.slope * batch.query.x.squeeze(-1) - batch.query.y).square().mean(-1)
        loss = batch.mean(error)
        if not self.training:
            return loss
        self.calls += 1
        self.seen += loss.detach()
        if self.draws:
            self.noise.append(float(torch.randn((), generator=generator)))
        self.x.append(batch.query.x[:, 0, 0].tolist())
        return loss if self.then is None else self.then(self, batch, loss)


class Padded:
    """Tasks of which some are padding, in some steps all that one of two ranks has."""

    num_tasks = None

    def sample(self, num_tasks, *, support, query, generator=None):
        batch = TASKS.sample(num_tasks, support=support, query=query, generator=generator)
        real = torch.rand(num_tasks, generator=generator) < 0.5
        if torch.rand((), generator=generator) < 0.3:
            real[: num_tasks // 2] = False
        real[-1] = True
        return replace(batch, task_id=torch.where(real, torch.arange(num_tasks), -1))


def frame(tasks=20, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    rows = []
    for task in range(tasks):
        for _ in range(int(torch.randint(7, 15, (), generator=numbers))):
            x = float(torch.randn((), generator=numbers))
            rows.append({"task": f"t{task}", "x": x, "y": task / 10 * x + float(torch.randn((), generator=numbers))})
    return pd.DataFrame(rows)


def ragged_table(seed=0):
    return bm.tasks.TableTasks.from_dataframe(frame(seed=seed), task="task", x=["x"], y="y")


def apart(a, b):
    """Largest difference of two states."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def caught(function):
    """Kind and words of the error that a function raises."""
    try:
        function()
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return [type(error).__name__, str(error)]
    return None


# -- the same result as one rank with twice the tasks ---------------------------------------------------------------


def _bad_tasks(method, batch, loss):
    """NaN where the batch has a certain kind of task: on one rank, and on the one that has all tasks."""
    return loss * (math.nan if bool((batch.query.x[:, 0, 0] > 4.6).any()) else 1.0)


CASES = {
    "sgd": (maml, {}),
    "adam": (maml, {"optimizer": lambda p: torch.optim.Adam(p, 1e-3)}),
    "clip_schedule": (maml, {"clip": 1.0, "schedule": bm.schedules.cosine(12, warmup=3)}),
    "ragged": (maml, {"tasks": ragged_table(), "query": None}),
    "padding": (maml, {"tasks": Padded()}),
    "pieces": (maml, {"tasks": Padded(), "accumulate": 2, "chunk": 3}),
    "closed_form": (last_layer, {}),
    "validation": (maml, {"validation": VALIDATION, "validate_every": 2}),
    "pieces_of_validation": (
        maml,
        {"validation": [VALIDATION, VALIDATION.tasks([0])], "validation_chunk": 2, "validate_every": 3},
    ),
    "score": (
        maml,
        {
            "validation": VALIDATION,
            "validate_with": lambda m, b, g: m.adapt(b.support, generator=g).predictive(b.query).mean.square().mean(),
            "validate_every": 4,
        },
    ),
    "patience": (
        maml, {"validation": VALIDATION, "validate_every": 1, "patience": 2, "min_delta": 1e3, "steps": 30},
    ),
    "skip": (lambda: Own(_bad_tasks, draws=False), {"nan_policy": "skip", "steps": 20}),
    "float64": (maml, {"dtype": torch.float64}),
}  # fmt: skip


def equal(folder):
    """Of each case: how far two ranks are from one with twice the tasks, in θ and in what they logged."""
    found = {}
    for name, (make, options) in CASES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says once that steps are skipped
            two, one = make(), make()
            both = train(two, 4, **options)
            alone = train(one, 8, distributed="off", **options)
        moved = {k: v for k, v in one.state_dict().items() if k != "seen"}
        logs = [[value for entry in result.history for value in entry.values()] for result in (both, alone)]
        found[name] = {
            "theta": apart({k: v for k, v in two.state_dict().items() if k != "seen"}, moved),
            "moved": apart({k: v for k, v in make_state(make, options).items() if k != "seen"}, moved),
            "log": max(abs(a - b) / (1 + abs(b)) for a, b in zip(*logs, strict=True)),
            "steps": [both.steps, alone.steps, both.best_step, alone.best_step, both.skipped, alone.skipped],
        }
    return found


def make_state(make, options):
    method = make()
    train(method, 8, distributed="off", **(options | {"steps": 1, "optimizer": lambda p: torch.optim.SGD(p, 0.0)}))
    return method.state_dict()


def first_weights(folder):
    """Each rank starts elsewhere: the run is that of rank 0's start. And what comes of it without the broadcast."""
    rank = int(os.environ["RANK"])
    method, expected, kinds = maml(seed=rank), maml(seed=0), Own()
    kinds.register_buffer("yes", torch.tensor([rank == 0, True]))
    kinds.register_buffer("count", torch.arange(4).view(2, 2).t() + rank)
    kinds.register_buffer("short", torch.full((3,), 1.0 + rank, dtype=torch.bfloat16))
    kinds.register_buffer("none", torch.zeros(0))
    train(kinds, steps=1)
    train(method)
    train(expected, 8, distributed="off")
    kept, Group.broadcast = Group.broadcast, lambda self, tensors: None
    try:
        broken = maml(seed=rank)
        train(broken)
    finally:
        Group.broadcast = kept
    return {
        "theta": apart(method.state_dict(), expected.state_dict()),
        "digest": digest(list(method.parameters())),
        "buffers": [b.tolist() for b in (kinds.yes, kinds.count, kinds.short, kinds.none)],
        "without": apart(broken.state_dict(), expected.state_dict()),
        "digest_without": digest(list(broken.parameters())),
    }


def ddp_around(folder):
    """DistributedDataParallel around the network of an inner loop leaves the ranks' gradients as they are."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    network = nn.Linear(1, 1)
    wrapped = nn.parallel.DistributedDataParallel(network)
    x, y = torch.full((4, 1), 1.0 + rank), torch.ones(4, 1)
    inner = torch.autograd.grad((network(x) - y).square().mean(), list(network.parameters()), create_graph=True)
    adapted = [p - 0.1 * g for p, g in zip(wrapped.module.parameters(), inner)]
    (nn.functional.linear(x, *adapted) - y).square().mean().backward()
    return network.weight.grad.item()


# -- tasks, noise, buffers ------------------------------------------------------------------------------------------


def shards(folder):
    """Which tasks each rank saw, which noise it drew, and which buffer it ends with."""
    method = Own()
    train(method, 3, steps=5)
    generator = torch.Generator().manual_seed(3)
    whole = [TASKS.sample(6, support=5, query=5, generator=generator).query.x[:, 0, 0].tolist() for _ in range(5)]
    return {"x": method.x, "whole": whole, "noise": method.noise, "seen": method.seen.item()}


def layers(folder):
    """Dropout draws from torch's global generator: each rank has a stream of its own, and the caller's is as before."""
    draws = []

    def note(method, batch, loss):
        draws.append(torch.rand(()).item())
        return loss

    before = torch.get_rng_state()
    train(Own(note), steps=3)
    return {"draws": draws, "left_alone": bool(torch.equal(before, torch.get_rng_state()))}


def no_gradient(folder):
    """A parameter that the loss does not reach is left alone, by weight decay too; one that one rank reaches is not."""

    def reach(method, batch, loss):
        return loss + method.unused.square() if int(os.environ["RANK"]) == 1 and method.calls == 2 else loss

    found = []
    for then in (None, reach):
        method = Own(then)
        train(method, steps=2, optimizer=lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5))
        found.append(method.unused.item())
    return found


# -- what goes wrong ------------------------------------------------------------------------------------------------


def on_rank(which, what, at=3):
    def then(method, batch, loss):
        return what(loss) if int(os.environ["RANK"]) == which and method.calls == at else loss

    return Own(then)


def _refuse(loss):
    raise bm.errors.DataError("row 7 is odd")


def failures(folder):
    """One rank fails: each rank's error."""
    rank = int(os.environ["RANK"])
    prepared = Own()
    if rank == 1:
        prepared.prepare = lambda batch: _refuse(None)
    broken = folder / "file"
    broken.write_text("")
    scored = {"validation": VALIDATION, "validate_every": 2}
    return {
        "loss": caught(lambda: train(on_rank(1, _refuse))),
        "loss_of_first": caught(lambda: train(on_rank(0, _refuse))),
        "nan": caught(lambda: train(on_rank(1, lambda loss: loss * math.nan))),
        "prepare": caught(lambda: train(prepared)),
        "folder": caught(lambda: train(Own(), out=broken)),
        "score": caught(lambda: train(Own(), validate_with=lambda *_: _refuse(None) if rank else 1.0, **scored)),
        "optimizer": caught(lambda: train(Own(), optimizer=_refuse if rank else torch.optim.SGD)),
        "memory": caught(lambda: train(on_rank(1, _out_of_memory))),
    }  # fmt: skip


def _out_of_memory(loss):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def differences(folder):
    """Ranks that were started with something else."""
    rank = int(os.environ["RANK"])
    wide = bm.NeuralTaskModel(bm.nets.mlp(1, [8 + rank], 1), bm.Gaussian(0.7))
    few = bm.tasks.FixedTasks(TASKS.sample(7, support=5, query=5, generator=0))
    return {
        "same": caught(lambda: train(Own(), steps=1)),
        "seed": caught(lambda: train(Own(), seed=rank)),
        "steps": caught(lambda: train(Own(), steps=2 + rank)),
        "tasks_per_step": caught(lambda: train(Own(), 2 + rank)),
        "model": caught(lambda: train(bm.MAML(wide, inner_lr=0.05))),
        "rate": caught(lambda: train(Own(), optimizer=lambda p: torch.optim.SGD(p, 0.1 * (rank + 1)))),
        "data": caught(lambda: train(maml(), tasks=ragged_table(seed=rank), query=None)),
        "validation": caught(lambda: train(Own(), validation=VALIDATION.tasks([rank, 3]))),
        "few": caught(lambda: train(Own(), tasks=few)),
    }


def come_apart(folder):
    """One rank's parameters are changed behind the run's back: seen at the checkpoint."""

    def shift(method, batch, loss):
        if int(os.environ["RANK"]) == 1 and method.calls == 3:
            with torch.no_grad():
                method.slope.add_(1e-6)
        return loss

    return caught(lambda: train(Own(shift), out=folder / "apart", checkpoint_every=5))


# -- folders, stops, going on ---------------------------------------------------------------------------------------


def stop_at(step, on, number):
    def then(method, batch, loss):
        if int(os.environ["RANK"]) == on and method.calls == step:
            os.kill(os.getpid(), number)
        return loss

    return Own(then)


def stops(folder):
    """A signal that one rank receives stops both at one step, with a checkpoint; what rank 0 alone wrote."""
    found = {}
    for name, on, number in (("term", 1, signal.SIGTERM), ("int", 0, signal.SIGINT)):
        out = folder / name
        error = caught(partial(train, stop_at(4, on, number), out=out, steps=30, log_every=2))
        found[name] = {"error": error, "step": checkpoint.load(out / "checkpoint.pt")["step"]}
        found[name]["files"] = sorted(path.name for path in out.iterdir())
        found[name]["log"] = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    return found


class Noisy(Own):
    """Noise of the method, and of a layer."""

    def __init__(self):
        super().__init__(lambda method, batch, loss: loss * (1 + 0.1 * method.noise[-1] + 0.1 * torch.rand(())))


def resumes(folder):
    """Stopped halfway and gone on with: bit for bit the run that was not stopped."""
    out = folder / "run"
    options = {
        "optimizer": lambda p: torch.optim.Adam(p, 0.05), "validation": VALIDATION, "validate_every": 3,
        "checkpoint_every": 3, "schedule": bm.schedules.cosine(20),
    }  # fmt: skip
    found = {}
    for name, make in (("noisy", Noisy), ("abml", abml)):
        whole, half, rest = make(), make(), make()
        a = train(whole, steps=20, out=out / f"{name}_whole", **options)
        train(half, steps=9, out=out / name, **options)
        b = train(rest, steps=20, out=out / name, resume=True, **options)
        found[name] = [apart(whole.state_dict(), rest.state_dict()), a.history == b.history, a.best_step == b.best_step]
    return found


def other_size(folder):
    """A run of two ranks gone on with by one, and the other way round."""
    rank, out = int(os.environ["RANK"]), folder / f"two_{os.environ['RANK']}"
    found, shared = {}, folder / "shared"
    train(maml(), steps=4, out=shared)
    if rank == 0:
        shutil.copytree(shared, out)
        found["refused"] = caught(lambda: train(maml(), 4, steps=8, out=out, resume=True, distributed="off"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            one, expected = maml(), maml()
            train(one, 8, steps=8, out=out, resume=True, distributed="off")
            train(expected, 8, steps=8, distributed="off")
        found["two_to_one"] = [apart(one.state_dict(), expected.state_dict()), [str(w.message) for w in said]]
        train(maml(), 8, steps=4, out=folder / "one", distributed="off")
    torch.distributed.barrier()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        two, expected = maml(), maml()
        train(two, 4, steps=8, out=folder / "one", resume=True)
        train(expected, 8, steps=8, distributed="off")
    found["one_to_two"] = [apart(two.state_dict(), expected.state_dict()), [str(w.message) for w in said]]
    return found


# -- tables, compiled steps -----------------------------------------------------------------------------------------


def evaluate(folder):
    """Scores by two ranks and by one; ABML draws them. Pieces are small, so that there is something to share."""
    options = {"task": "task", "x": ["x"], "y": ["y"], "method": "abml", "hidden": [4], "device": "cpu"}
    frame(40).to_csv(folder / "data.csv", index=False) if os.environ["RANK"] == "0" else None
    torch.distributed.barrier()
    said, scored = [], []
    fit_csv(
        folder / "data.csv", folder / "run", **options, steps=4, holdout=0.5, progress=False, say=lambda text: None
    )  # fmt: skip
    torch.distributed.barrier()  # rank 0 has written what is read next
    table_scores = evaluation.scores

    def counted(posterior, batch, **kw):
        scored.append(batch.num_tasks)
        return table_scores(posterior, batch, **kw)

    evaluation._PIECE, evaluation.scores = 8, counted
    two = evaluation.evaluate_csv(
        folder / "run", folder / "data.csv", out=folder / "two.json", device="cpu", say=said.append
    )  # fmt: skip
    count = sum(scored) // 3  # ABML and two baselines
    evaluation.join = lambda mode, device: Ranks(device)
    place = folder / f"one{os.environ['RANK']}.json"
    one = evaluation.evaluate_csv(folder / "run", folder / "data.csv", out=place, device="cpu", say=said.__contains__)
    return {"two": two, "one": one, "scored": count, "said": len(said)}


def compiled(folder):
    """Compiled steps of two ranks: tasks drawn in the graph, and before it with some padding; noise of their own."""
    found = {"reports": []}
    for name, tasks in (("theta", TASKS), ("padding", Padded())):
        two, one = maml(), maml()
        found["reports"].append(train(two, 4, tasks=tasks, compile="inductor").compiled)
        train(one, 8, tasks=tasks, distributed="off")
        found[name] = apart(two.state_dict(), one.state_dict())
    two, eager = abml(), abml()
    options = {"optimizer": lambda p: torch.optim.Adam(p, 1e-2)}
    found["reports"].append(train(two, compile="inductor", **options).compiled)
    train(eager, **options)
    found["noise"] = apart(two.state_dict(), eager.state_dict())
    found["digest"] = digest(list(two.parameters()))
    return found


# -- processes ------------------------------------------------------------------------------------------------------

CHECKS = [
    equal, first_weights, ddp_around, shards, layers, no_gradient, failures, differences, come_apart, stops, resumes,
    other_size, evaluate, compiled,
]  # fmt: skip


def environment(rank, port):
    """What torchrun says to a rank of two."""
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def rank_of(rank, port, folder, checks):
    """One rank: goes through all checks; what goes wrong in one ends it, since the ranks are no longer in step."""
    os.environ.update(environment(rank, port))
    with open(folder / f"rank{rank}.jsonl", "w") as file:
        for check in checks:
            place = folder / check.__name__
            place.mkdir(exist_ok=True)
            try:
                line = {"check": check.__name__, "found": check(place)}
            except BaseException:
                line = {"check": check.__name__, "error": traceback.format_exc()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if "error" in line:
                return 1
    return 0


def free_port():
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(folder, names, known=CHECKS):
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of its own
    checks = [c for c in known if c.__name__ in (names or [c.__name__ for c in known if c is not compiled])]
    train(maml(), steps=1, distributed="off")  # imports what is imported on first use
    port, ranks = free_port(), []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = rank_of(rank, port, folder, checks)
            finally:
                os._exit(code)
        ranks.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in ranks]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
