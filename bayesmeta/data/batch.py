"""Support and query of several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesmeta.data.observations import Observations, pad_shots, shape_of, union
from bayesmeta.data.standardizer import Standardizer
from bayesmeta.errors import DataError, DeviceMismatchError, EmptyTaskError, ShapeError


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Support and query of a batch of tasks.

    Attributes:
        support: what adaptation may see.
        query: what adaptation is judged on.
        task_id: integer id of each task, ``[tasks]``; -1 marks a padding task, which no mean counts. None: all real.
        names: a name for each task, shown by plots and used as coordinates.
        population: how many tasks there are in all (N), by which a hyperprior is shared out; None when endless.
        standardizer: how to get back to raw units; None when the data are in raw units.

    Raises:
        ShapeError: if support, query and the rest do not describe the same tasks.
    """

    support: Observations
    query: Observations
    task_id: Tensor | None = None
    names: tuple[str, ...] | None = None
    population: int | None = None
    standardizer: Standardizer | None = None

    def __post_init__(self) -> None:
        tasks = self.support.num_tasks
        if self.query.num_tasks != tasks or self.query.num_features != self.support.num_features:
            raise ShapeError(
                f"support has x of shape {shape_of(self.support.x)} and query {shape_of(self.query.x)}; "
                "both need the same tasks and features."
            )
        if self.query.device != self.support.device:
            raise DeviceMismatchError(f"support is on {self.support.device} but query is on {self.query.device}.")
        if self.task_id is not None and self.task_id.shape != (tasks,):
            raise ShapeError(f"task_id has shape {shape_of(self.task_id)}; expected [{tasks}].")
        if self.names is not None and len(self.names) != tasks:
            raise ShapeError(f"{len(self.names)} names were given for {tasks} tasks.")

    @property
    def num_tasks(self) -> int:
        """Number of tasks, padding included."""
        return self.support.num_tasks

    @property
    def w(self) -> Tensor | None:
        """Task-level covariates, ``[tasks, covariates]``."""
        return self.support.w

    def real_tasks(self) -> Tensor | None:
        """True for tasks that are no padding, ``[tasks]``; None when all are real."""
        return None if self.task_id is None else self.task_id >= 0

    def mean(self, per_task: Tensor) -> Tensor:
        """Mean over the real tasks of a tensor whose last dimension is the tasks."""
        real = self.real_tasks()
        if real is None:
            return per_task.mean(-1)
        return torch.where(real, per_task, 0.0).sum(-1) / real.sum()

    def without_padding(self) -> TaskBatch:
        """The batch without its padding tasks."""
        real = self.real_tasks()
        if real is None or bool(real.all()):
            return self
        return self.tasks(real.nonzero().flatten())

    def union(self) -> Observations:
        """Support and query as one set of observations, ``[tasks, support + query, …]``."""
        return union(self.support, self.query)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TaskBatch:
        """Move to a device and cast floating tensors to a dtype."""
        return replace(
            self,
            support=self.support.to(device, dtype),
            query=self.query.to(device, dtype),
            task_id=None if self.task_id is None else self.task_id.to(device),
            standardizer=None if self.standardizer is None else self.standardizer.to(device, dtype),
        )

    def tasks(self, index: Tensor | slice | Sequence[int]) -> TaskBatch:
        """The tasks named by an index."""
        names = self.names
        if names is not None:
            rows = index.cpu() if isinstance(index, Tensor) else index
            names = tuple(names[i] for i in torch.arange(self.num_tasks)[rows].tolist())
        return replace(
            self,
            support=self.support.tasks(index),
            query=self.query.tasks(index),
            task_id=None if self.task_id is None else self.task_id[index],
            names=names,
        )

    def split(self, size: int) -> list[TaskBatch]:
        """Chunks of at most ``size`` tasks."""
        return [self.tasks(slice(i, i + size)) for i in range(0, self.num_tasks, size)]

    def check(self) -> TaskBatch:
        """Check that all data are finite and that each real task has an observation.

        Returns:
            The batch itself.

        Raises:
            NonFiniteDataError: for NaN or infinity.
            EmptyTaskError: naming the tasks that have neither support nor query.
        """
        self.support.check()
        self.query.check()
        ours, theirs = self.support.w, self.query.w
        if (ours is None) != (theirs is None) or (ours is not None and theirs is not None and not ours.equal(theirs)):
            raise DataError("Support and query have different task-level covariates w; they belong to the same tasks.")
        empty = (self.support.counts() + self.query.counts()) == 0
        real = self.real_tasks()
        if real is not None:
            empty = empty & real
            if not bool(real.any()):
                raise EmptyTaskError("All tasks of the batch are padding (task_id -1); at least one must be real.")
        if bool(empty.any()):
            index = empty.nonzero().flatten().tolist()
            names = [self.names[i] if self.names else str(i) for i in index]
            raise EmptyTaskError(
                f"{len(index)} task(s) have neither support nor query: {', '.join(names[:5])}. "
                "Drop them, or mark padding tasks with task_id -1."
            )
        return self


def concatenate(batches: Sequence[TaskBatch]) -> TaskBatch:
    """Several batches as one, padded to the longest support and query.

    Population and standardizer are those of the first batch.

    Raises:
        EmptyTaskError: for an empty list.
        ShapeError: if features, outputs or covariates differ.
    """
    if not batches:
        raise EmptyTaskError("No batch was given to concatenate; expected at least one.")
    first = batches[0]
    if any(b.support.num_features != first.support.num_features for b in batches):
        widths = sorted({b.support.num_features for b in batches})
        raise ShapeError(f"The batches have x of widths {widths}; all need the same features.")
    some_id = any(b.task_id is not None for b in batches)
    ids = [torch.arange(b.num_tasks, device=b.support.device) if b.task_id is None else b.task_id for b in batches]
    names: tuple[str, ...] | None = None
    if all(b.names is not None for b in batches):
        names = tuple(name for b in batches for name in b.names or ())
    return replace(
        first,
        support=_stack([b.support for b in batches]),
        query=_stack([b.query for b in batches]),
        task_id=torch.cat(ids) if some_id else None,
        names=names,
    )


def _stack(parts: Sequence[Observations]) -> Observations:
    shots = max(p.shots for p in parts)
    padded = [pad_shots(p, shots) for p in parts]
    full = all(p.mask is None for p in padded)
    optional: dict[str, Tensor | None] = {}
    for name in ("y", "w"):
        values = [getattr(p, name) for p in padded]
        if any(v is None for v in values) and not all(v is None for v in values):
            raise DataError(f"Only some of the batches have {name}; give it to all or to none.")
        optional[name] = None if values[0] is None else torch.cat(values)
    mask = None if full else torch.cat([p.full_mask() for p in padded])
    return Observations(torch.cat([p.x for p in padded]), optional["y"], mask, optional["w"])
