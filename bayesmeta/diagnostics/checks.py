"""Checks of what diagnostics are given: batches that belong to the posterior, and predictions that are numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import BayesMetaError, DataError, EmptyTaskError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.protocols import Posterior


@contextmanager
def in_words() -> Iterator[None]:
    """Around calls of a posterior: distributions check themselves, and this gives what they find a type and advice.

    Raises:
        NonFiniteDataError: for parameters that are NaN, infinite or out of range.
        DataError: for values outside the support of a distribution.
    """
    try:
        yield
    except BayesMetaError:
        raise
    except ValueError as error:
        first = str(error).splitlines()[0]
        if first.startswith("Expected parameter"):
            raise NonFiniteDataError(
                f"The posterior's predictions are not finite, or have no positive scale: {first[:200]}… The adaptation "
                "has probably diverged: try a smaller inner learning rate or fewer inner steps, or standardise the "
                "data."
            ) from error
        if first.startswith("Expected value argument"):
            raise DataError(f"The data lie outside the support of the likelihood: {first[:200]}…") from error
        raise


def check_batch(batch: Any) -> None:
    """Check that a batch is one.

    Raises:
        OptionError: for observations or anything else.
    """
    if not isinstance(batch, TaskBatch):
        raise OptionError(f"A TaskBatch of support and query is needed here; got {type(batch).__name__}.")


def as_batch(data: TaskBatch | Observations) -> TaskBatch:
    """A batch as it is; of observations one with them as the support, and no query.

    Raises:
        OptionError: for anything else.
    """
    if isinstance(data, TaskBatch):
        return data
    if not isinstance(data, Observations):
        raise OptionError(f"A TaskBatch, or the Observations of the support, is needed; got {type(data).__name__}.")
    return TaskBatch(data, data.points(slice(0)))


def check_same_tasks(posterior: Posterior, observations: Observations) -> None:
    """Check that observations are of as many tasks as the posterior, with as many features and outputs.

    Raises:
        ShapeError: if they are not.
    """
    if observations.num_tasks != posterior.num_tasks:
        raise ShapeError(
            f"The batch has {observations.num_tasks} tasks, but the posterior was adapted to {posterior.num_tasks}. "
            "Give the batch whose support it was adapted to."
        )
    support = posterior.support
    if observations.num_features != support.num_features:
        raise ShapeError(
            f"x has {observations.num_features} features, but the posterior was adapted to {support.num_features}. "
            "Give observations with the same columns."
        )
    ours, theirs = support.y, observations.y
    if ours is None or theirs is None or support.shots == 0 or ours.shape[2:] == theirs.shape[2:]:
        return
    raise ShapeError(
        f"y has shape {list(theirs.shape)}, but the posterior was adapted to y of shape {list(ours.shape)}; "
        "expected as many outputs."
    )


def check_same_support(posterior: Posterior, batch: TaskBatch) -> None:
    """Check that the tasks of a batch are those of a posterior, as far as their supports can tell.

    They are taken for the same where in any task the first observation of one support is in the other. So a batch may
    hold more or less support than was adapted to, and a batch without support tells nothing.

    Raises:
        ShapeError: for other shapes, as :func:`check_same_tasks`.
        DataError: if the supports have nothing in common: other tasks, another order, or other units.
    """
    check_same_tasks(posterior, batch.support)
    ours, theirs = posterior.support, batch.support
    if not bool((ours.full_mask().any(-1) & theirs.full_mask().any(-1)).any()):
        return
    if not (_first_is_in(ours, theirs) or _first_is_in(theirs, ours)):
        raise DataError(
            "No task of the batch has an observation in its support that the posterior was adapted to: they are other "
            "tasks, in another order, or in other units (of another standardizer). Give the batch whose support it was "
            "adapted to."
        )


def _first_is_in(some: Observations, others: Observations) -> bool:
    """Whether the first observation of any task is among those of the same task elsewhere, but for rounding."""
    first = some.full_mask().to(torch.int8).argmax(-1)
    pairs = [(some.x, others.x)]
    if some.y is not None and others.y is not None:
        pairs.append((some.y, others.y))
    same = others.full_mask() & some.full_mask().any(-1, keepdim=True)
    for ours, theirs in pairs:
        ours, theirs = ours.reshape(*ours.shape[:2], -1).double(), theirs.reshape(*theirs.shape[:2], -1).double()
        row = ours.gather(1, first.reshape(-1, 1, 1).expand(-1, 1, ours.shape[-1]))
        same = same & torch.isclose(theirs, row.to(theirs.device), rtol=1e-4, atol=1e-6).all(-1)
    return bool(same.any())


def counted(observations: Observations, real: Tensor | None) -> Tensor:
    """Which observations count: those that are no padding, of tasks that are none.

    Args:
        observations: of any tasks.
        real: True for tasks that are no padding, ``[tasks]``, as ``TaskBatch.real_tasks`` gives; None: all.

    Returns:
        ``[tasks, shots]``.

    Raises:
        ShapeError: for ``real`` of another shape or dtype.
    """
    if real is None:
        return observations.full_mask()
    if not isinstance(real, Tensor) or real.shape != (observations.num_tasks,) or real.dtype != torch.bool:
        given = f"{list(real.shape)} of {real.dtype}" if isinstance(real, Tensor) else type(real).__name__
        raise ShapeError(f"real is {given}; expected [{observations.num_tasks}] of bool, as batch.real_tasks() gives.")
    return observations.full_mask() & real.to(observations.device).unsqueeze(-1)


def real_tasks(posterior: Posterior, batch: Any | None) -> Tensor:
    """Which tasks of a posterior count: those that a batch does not call padding, or all where there is no batch.

    Returns:
        True for tasks that count, ``[tasks]``.

    Raises:
        OptionError, ShapeError: for what is no batch, or one of other tasks.
        EmptyTaskError: when all are padding.
    """
    real = None
    if batch is not None:
        check_batch(batch)
        check_same_support(posterior, batch)
        real = batch.real_tasks()
    if real is None:
        return torch.ones(posterior.num_tasks, dtype=torch.bool, device=posterior.support.device)
    if not bool(real.any()):
        raise EmptyTaskError("All tasks of the batch are padding (task_id -1); at least one must be real.")
    return real
