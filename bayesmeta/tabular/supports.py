"""Supports of every size, so that a model is trained for whatever rows a new task comes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bayesmeta.data import TaskBatch, concatenate
from bayesmeta.errors import EmptyTaskError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.tasks.table import TableTasks


class _Eligible:
    """For each size of the support, the table of the tasks that have a row more."""

    def __init__(self, table: TableTasks, most: int) -> None:
        lengths = torch.tensor(table.lengths)
        self.most = min(most, int(lengths.max()) - 1)
        self.rows: list[torch.Tensor] = []
        self.tables: list[TableTasks] = []
        for support in range(self.most + 1):
            rows = (lengths > support).nonzero().flatten()
            if self.rows and len(rows) == len(self.rows[-1]):  # the same tasks: no second copy
                self.rows.append(self.rows[-1])
                self.tables.append(self.tables[-1])
            else:
                self.rows.append(rows)
                self.tables.append(table if len(rows) == table.num_tasks else table.subset(rows))


class VariedSupports:
    """A table as a task distribution whose batches have supports of 0, 1, …, ``support`` rows, each as often.

    A batch has one size, drawn first; its tasks are drawn from those with at least one row more. So tasks with few
    rows are used too, and a task without any row is among what is learned.

    Where tasks have different numbers of rows up to ``support``, there are copies of the table's rows: one for each
    size at which a task falls out.

    Args:
        table: the tasks.
    """

    def __init__(self, table: TableTasks) -> None:
        self.table = table
        self.num_tasks = table.num_tasks
        self._eligible: dict[int, _Eligible] = {}

    def sample(self, num_tasks: int, *, support: int, query: int | None, generator: Seed = None) -> TaskBatch:
        """Draw a batch on the generator's device; ``support`` is the largest size."""
        return self.sample_part(slice, num_tasks, support=support, query=query, generator=generator)

    def sample_part(
        self, part: Callable[[int], slice], num_tasks: int, *, support: int, query: int | None, generator: Seed = None
    ) -> TaskBatch:
        """Some tasks of such a batch; see :meth:`TableTasks.sample_part`."""
        generator = as_generator(generator, stream="tasks")
        eligible = self._eligible.setdefault(support, _Eligible(self.table, support))
        size = int(torch.randint(eligible.most + 1, (), generator=generator, device=generator.device))
        table, rows = eligible.tables[size], eligible.rows[size]
        count = min(num_tasks, table.num_tasks) if num_tasks <= self.num_tasks else num_tasks
        batch = table.sample_part(part, count, support=size, query=query, generator=generator)
        assert batch.task_id is not None
        return replace(batch, task_id=rows.to(batch.task_id.device)[batch.task_id], population=self.num_tasks)


def every_task(
    table: TableTasks, support: int, *, query: int | None = None, seed: Seed = 0, max_elements: int = 4_000_000
) -> list[TaskBatch]:
    """Every task once, with a support of ``support`` rows, or of all but one where a task has no more.

    Which rows these are is what the table's ``order`` says; at random, under ``seed``.

    Args:
        table: the tasks.
        support: rows in the support.
        query: rows in the query, at random; None for all that are left.
        seed: of the choice.
        max_elements: numbers in the padded x of a batch, at most (a task alone may have more).

    Returns:
        Batches of tasks of like length, on the CPU. Tasks of a single row have an empty support.

    Raises:
        EmptyTaskError: where no task has a second row, though there should be a support.
    """
    if support > 0 and max(table.lengths) < 2:
        raise EmptyTaskError(
            f"No task of the table has two rows, so none has a row to see and one to judge by; {support} row(s) were "
            "asked for as support."
        )
    generator = as_generator(seed, stream="evaluation")
    order = sorted(range(table.num_tasks), key=table.lengths.__getitem__)
    chunks: list[list[int]] = []
    for row in order:
        width = table.lengths[row] * table.num_features
        new = not chunks or min(support, table.lengths[chunks[-1][0]] - 1) != min(support, table.lengths[row] - 1)
        if new or (len(chunks[-1]) + 1) * width > max_elements:
            chunks.append([])
        chunks[-1].append(row)
    batches = []
    for chunk in chunks:
        part = table.subset(chunk)
        size = min(support, min(part.lengths) - 1)
        batches.append(part.sample(part.num_tasks, support=size, query=query, generator=generator))
    return _merge(batches, max_elements)


def _merge(batches: list[TaskBatch], max_elements: int) -> list[TaskBatch]:
    """Neighbouring batches as one where they are small."""
    merged: list[TaskBatch] = []
    for batch in batches:
        if merged:
            both = [merged[-1], batch]
            shots = max(b.support.shots for b in both) + max(b.query.shots for b in both)
            if shots * sum(b.num_tasks for b in both) * batch.support.num_features <= max_elements:
                merged[-1] = replace(concatenate(both), task_id=None)
                continue
        merged.append(replace(batch, task_id=None))
    return merged
