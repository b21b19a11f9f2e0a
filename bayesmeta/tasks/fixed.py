"""A task batch as a finite distribution over its tasks."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.tasks.cuts import cut_ragged
from bayesmeta.tasks.families import draw_tasks

#: How :class:`FixedTasks` makes supports and queries.
Resplit = Literal["random", "given"]


class FixedTasks:
    """The tasks of a batch, as a finite population to train on.

    Each draw takes tasks without replacement (with it where it asks for more than there are). What becomes of their
    observations:

    - ``split="random"``: support and query of the batch are put together, and each draw cuts them anew: a random
      support, and a query from what is left, padded and masked where a task has fewer. More to learn from.
    - ``split="given"``: support and query stay as they are in the batch, with their masks. For a split that means
      something, such as the first k in time. The numbers asked for must be those of the batch.

    Names, standardizer, ``task_id`` (rows of the batch where it has none) and covariates w are kept; padding tasks
    are dropped. The population is the number of tasks in this batch.

    Args:
        batch: tasks with targets.
        split: see above.

    Raises:
        OptionError: for an unknown split.
        DataError: for something else than a batch, or missing targets.
        NonFiniteDataError, EmptyTaskError: for NaN, or a task without observations.
    """

    def __init__(self, batch: TaskBatch, *, split: Resplit = "random") -> None:
        if split not in get_args(Resplit):
            raise OptionError(f"split={split!r} is not known; expected one of {', '.join(get_args(Resplit))}.")
        if not isinstance(batch, TaskBatch):
            raise DataError(f"batch is a {type(batch).__name__}; expected a TaskBatch, such as tasks.sample(…).")
        if batch.support.y is None or batch.query.y is None:
            raise DataError("The batch has observations without targets y; fixed tasks are trained on and need them.")
        self.batch = batch.check().without_padding()
        self.split = split
        self.num_tasks: int | None = self.batch.num_tasks
        self._on_device: dict[torch.device, tuple[TaskBatch, Observations]] = {}

    def sample(self, num_tasks: int, *, support: int, query: int | None = None, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch on the generator's device, in the dtype of the batch given.

        Args:
            num_tasks: number of tasks.
            support: observations in each support.
            query: observations in each query; None for all that are left.
            generator: generator or seed; None means seed 0.

        Raises:
            OptionError: for numbers out of range, or under ``"given"`` other numbers than the batch has.
            EmptyTaskError: naming a task with fewer than ``support + 1`` observations.
        """
        if num_tasks < 1:
            raise OptionError(f"num_tasks={num_tasks}; expected at least 1.")
        generator = as_generator(generator, stream="tasks")
        batch, together = self._data(generator.device)
        as_given = support == batch.support.shots and query in (batch.query.shots, None)
        if self.split == "given" and not as_given:
            raise OptionError(
                f"support={support} and query={query} were asked for, but the batch has {batch.support.shots} and "
                f"{batch.query.shots}, and split='given' keeps them. Ask for these, or use split='random'."
            )
        rows = draw_tasks(num_tasks, batch.num_tasks, generator)
        drawn = batch.tasks(rows)
        first, rest = drawn.support, drawn.query
        if self.split == "random":
            first, rest = cut_ragged(together.tasks(rows), support, query, shuffle=generator, names=drawn.names)
        return TaskBatch(
            first,
            rest,
            task_id=rows if drawn.task_id is None else drawn.task_id,
            names=drawn.names,
            population=batch.num_tasks,
            standardizer=drawn.standardizer,
        )

    def _data(self, device: torch.device) -> tuple[TaskBatch, Observations]:
        """The batch, and all its observations together, on a device, moved once."""
        if device not in self._on_device:
            batch = self.batch.to(device)
            self._on_device[device] = batch, batch.union()
        return self._on_device[device]
