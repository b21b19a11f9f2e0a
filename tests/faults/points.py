"""A training that is killed between any two of its operations on files, and goes on: prints what became of it as JSON.

Random moments (``driver.py``) seldom fall between two such operations; here each is tried. As there, a process imports
everything once and forks a child for each training.

    python tests/faults/points.py FOLDER STRIDE
"""

import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import bayesmeta as bm
from bayesmeta.train import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.faults.driver import TASKS, contents, difference, fork

STEPS, EVERY = 8, 2
#: Operations on files, by whose calls a moment is told.
OPERATIONS = [(os, "replace"), (os, "link"), (os, "fsync"), (torch, "save"), (Path, "unlink"), (os, "open")]
#: Shared with the children: operations done, and the step that was reached.
SHARED = mmap.mmap(-1, 16)


def put(place, number):
    SHARED[8 * place : 8 * place + 8] = number.to_bytes(8, "little")


def get(place):
    return int.from_bytes(SHARED[8 * place : 8 * place + 8], "little")


class Watched(torch.nn.Module):
    """A line with dropout, which says how far it has come."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def prepare(self, batch):
        pass

    def loss(self, batch, *, generator=None):
        if self.training:
            self.steps += 1
            put(1, int(self.steps))
        return (self.network(batch.query.x).squeeze(-1) - batch.query.y).square().mean()


def training(folder, resume):
    """Adam with a schedule, validation whose patience may run out, curves."""
    bm.fit(
        Watched(), TASKS, steps=STEPS, tasks_per_step=3, support=3, query=3, seed=3, device="cpu", progress=False,
        optimizer=lambda p: torch.optim.Adam(p, 0.05), schedule=bm.schedules.cosine(STEPS, warmup=2),
        validation=TASKS.sample(4, support=3, query=3, generator=99), validate_every=1, patience=5, log_every=1,
        checkpoint_every=EVERY, out=folder, resume=resume, tensorboard=True,
    )  # fmt: skip


def killed(point, folder, resume):
    """The training, killed before a numbered operation; without a kill where there are fewer."""
    put(0, 0)

    def counted(function):
        def call(*args, **kwargs):
            if get(0) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            put(0, get(0) + 1)
            return function(*args, **kwargs)

        return call

    for owner, name in OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))
    training(folder, resume)


def wait(pid):
    """Whether a child ran to its end."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        raise SystemExit(f"a training ended with {status}")
    return True


def curves(folder):
    """What TensorBoard shows, but for the speed."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags}


def one(point, reference, folder):
    """Kill at a point and go on; nothing where there is no such point."""
    put(1, 0)
    if wait(fork(killed, point, folder, False)):
        return None
    reached, path = get(1), folder / "checkpoint.pt"
    kept = checkpoint.load(path)["step"] if path.exists() else 0
    started = any((folder / name).exists() for name in ("checkpoint.pt", "config.json", "log.jsonl"))
    time.sleep(0.002)  # event files are told apart by their names, which have the time
    wait(fork(training, folder, started))
    found = {"curves": curves(folder), **contents(folder)}
    return {"point": point, "reached": reached, "kept": kept, "difference": difference(reference, found)}


def main(folder, stride):
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of its own
    training(folder / "warm_up", False)
    curves(folder / "warm_up")
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads must not be forked"
    wait(fork(killed, -1, folder / "whole", False))
    number, reference = get(0), {"curves": curves(folder / "whole"), **contents(folder / "whole")}
    assert any(reference["curves"].values())
    print(json.dumps({"points": number}), flush=True)
    for point in range(0, number, stride):
        print(json.dumps(one(point, reference, folder / f"point_{point}")), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
