"""What two ranks do together when something is not even: a buffer, an update, a signal, the number of ranks.

Run as a script like ``tests/distributed_ranks.py``, whose parts it uses:

    python -m tests.distributed_more FOLDER [CHECK …]
"""

import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from bayesmeta.train import checkpoint
from bayesmeta.train.loop import Loop
from tests.distributed_ranks import Own, Padded, caught, main, maml, stop_at, train


class Replaces(Own):
    """Puts a new tensor in the place of its buffer at each step."""

    def __init__(self):
        super().__init__(draws=False)

    def loss(self, batch, *, generator=None):
        self.seen = self.seen.clone()
        return super().loss(batch, generator=generator)


def buffers(folder):
    """A running sum of the batch's mean loss, where ranks have different numbers of real tasks in most steps."""
    found = {}
    for make in (partial(Own, draws=False), Replaces):
        two, one = make(), make()
        train(two, 4, tasks=Padded())
        train(one, 8, tasks=Padded(), distributed="off")
        found[type(two).__name__] = [two.seen.item(), one.seen.item()]
    return found


def _go_on(out, method, tasks_per_step, steps, **options):
    """Go on with a run; what was warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(method, tasks_per_step, steps=steps, out=out, resume=True, **options)
    return [str(w.message) for w in said]


def size_changes(folder):
    """Two ranks, one, one again, two: the tasks and the noise of each part, against two ranks in one go."""
    rank, shared = int(os.environ["RANK"]), folder / "run"
    whole, parts, said = Own(), [Own() for _ in range(4)], []
    train(whole, 4, steps=12)
    train(parts[0], 4, steps=3, out=shared)
    if rank == 0:
        said += _go_on(shared, parts[1], 8, 6, distributed="off")
        said += _go_on(shared, parts[2], 8, 9, distributed="off")
    torch.distributed.barrier()
    said += _go_on(shared, parts[3], 4, 12)
    return {
        "whole": whole.x,
        "x": [part.x for part in parts],
        "noise": [part.noise for part in parts],
        "uninterrupted": whole.noise,
        "said": said,
    }


def from_one(folder):
    """One rank's run gone on with by two: the tasks of a method with noise and of one without."""
    rank, found = int(os.environ["RANK"]), {}
    for draws in (False, True):
        whole, first, then = (Own(draws=draws) for _ in range(3))
        out = folder / str(draws)
        train(whole, 8, steps=6, distributed="off")
        if rank == 0:
            train(first, 8, steps=3, out=out, distributed="off")
        torch.distributed.barrier()
        said = _go_on(out, then, 4, 6)
        found[str(draws)] = {"whole": whole.x, "x": then.x, "said": said}
    return found


# -- an update that fails -------------------------------------------------------------------------------------------


class Fails(torch.optim.SGD):
    """An update that fails on rank 1, in the third step."""

    error = None

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        if os.environ["RANK"] == "1" and self.steps == 3:
            raise self.error
        return super().step(closure)


class OutOfMemory(Fails):
    error = torch.OutOfMemoryError("CUDA out of memory.")


class Refuses(Fails):
    error = ValueError("no such rate")


def updates(folder):
    """Where the next exchange is the log's, a step's, a checkpoint's, that of the end, or a validation's."""
    options = {
        "log": {"log_every": 1},
        "step": {"log_every": 100},
        "checkpoint": {"log_every": 100, "checkpoint_every": 3},
        "end": {"log_every": 100, "steps": 3},
        "validation": {
            "log_every": 100, "validate_every": 3,
            "validation": Padded().sample(7, support=5, query=5, generator=torch.Generator().manual_seed(1)),
        },
    }  # fmt: skip
    found = {}
    for name, given in options.items():
        out = folder / name
        train(maml(), steps=1, out=out)
        given = {"optimizer": lambda p: OutOfMemory(p, 1e-2), **given}
        error = caught(partial(train, maml(), out=out, overwrite=True, **given))
        last = out / "checkpoint.pt"
        found[name] = [error, checkpoint.load(last)["step"] if last.exists() else None]
    found["other"] = [caught(partial(train, maml(), optimizer=lambda p: Refuses(p, 1e-2))), None]
    found["after"] = caught(partial(train, maml()))  # a later run of the same ranks
    return found


# -- signals --------------------------------------------------------------------------------------------------------


def last_step(folder):
    """A signal to one rank in the last step, when the ranks have exchanged for the last time."""
    update = Loop._update

    def signalled(self, *values):
        update(self, *values)
        if self.ranks.rank == 1 and self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    Loop._update = signalled
    try:
        error = caught(lambda: train(maml(), steps=5, out=folder / "run"))
    finally:
        Loop._update = update
    return [error, checkpoint.load(folder / "run" / "checkpoint.pt")["step"]]


def repeated(folder):
    """torchrun and Slurm both send SIGTERM to each rank."""
    method = stop_at(4, int(os.environ["RANK"]), signal.SIGTERM)
    first = method.then

    def twice(*given):
        loss = first(*given)
        return first(*given[:2], loss)

    method.then = twice
    error = caught(lambda: train(method, steps=30, out=folder / "run"))
    torch.distributed.barrier()
    return [error, checkpoint.load(folder / "run" / "checkpoint.pt")["step"]]


CHECKS = [buffers, size_changes, from_one, updates, last_step, repeated]

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:], CHECKS))
