"""The two plates of every task program: tasks at dim −2, shots at dim −1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pyro
from pyro import poutine
from torch import Tensor

TASKS = "tasks"
SHOTS = "shots"
#: of the plate over tasks
TASK_DIM = -2

#: Rows and number of all tasks, where those at hand are some of a fixed set.
_some: ContextVar[tuple[Tensor, int] | None] = ContextVar("some_tasks", default=None)


def task_plate(x: Tensor) -> pyro.plate:
    """Plate over tasks, at dim −2.

    A latent site directly inside it is a task parameter, with batch shape ``[tasks, 1]``.

    Args:
        x: inputs, ``[tasks, shots, features]``.
    """
    some = _some.get()
    if some is None:
        return pyro.plate(TASKS, x.shape[-3], dim=TASK_DIM)
    return pyro.plate(TASKS, some[1], subsample=some[0], dim=TASK_DIM)


@contextmanager
def some_tasks(rows: Tensor, size: int) -> Iterator[None]:
    """Inside, every :func:`task_plate` is a subsample: these rows of ``size`` tasks, in Pyro's own sense and scale."""
    token = _some.set((rows, size))
    try:
        yield
    finally:
        _some.reset(token)


@contextmanager
def shot_plate(x: Tensor, mask: Tensor | None = None) -> Iterator[None]:
    """Plate over the observations of each task, at dim −1, to be opened inside :func:`task_plate`.

    Args:
        x: inputs, ``[tasks, shots, features]``.
        mask: ``[tasks, shots]``; the log-probability of an observation where it is False counts as 0.
    """
    with pyro.plate(SHOTS, x.shape[-2], dim=-1):
        if mask is None:
            yield
        else:
            with poutine.mask(mask=mask):
                yield
