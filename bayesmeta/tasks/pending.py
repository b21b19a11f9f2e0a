"""Rows that wait for a forecast: a table of new data as batches whose support has targets and whose query has none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesmeta.data import Observations, Standardizer, TaskBatch
from bayesmeta.errors import DataError, OptionError
from bayesmeta.tasks.encode import encode
from bayesmeta.tasks.frames import Rows, read_frame
from bayesmeta.tasks.schema import TableSchema

if TYPE_CHECKING:
    import pandas as pd


def to_predict(
    frame: pd.DataFrame,
    standardizer: Standardizer,
    *,
    max_tasks: int = 256,
    max_elements: int = 4_000_000,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[TaskBatch, Tensor]]:
    """Batches in which each task's rows with a target are the support, and its rows without one the query.

    Tasks need not have been seen before. One without any row with a target has an empty support. Tasks without a row
    to predict are left out, and so are rows that the schema drops (``missing="drop"``).

    Args:
        frame: one row an observation, with the columns of the standardizer's schema; the target columns may be absent.
        standardizer: of the training table (:meth:`TableTasks.fit_standardizer`); it says how columns are read.
        max_tasks: tasks in a batch, at most.
        max_elements: numbers in the padded x of a batch, at most (a task alone may have more). Tasks of like
            length share a batch.
        dtype: of x, y and w.

    Yields:
        A batch in standard units, whose query has no y; and for each point of its query the row of the frame, counted
        from 0, int64 ``[tasks, query]``, -1 where it is padding.

    Raises:
        OptionError: for a standardizer that comes from no table, or bounds below 1.
        DataError and its kinds: as :meth:`TableTasks.from_dataframe`; EmptyTaskError for a frame without rows.
    """
    if standardizer.schema is None:
        raise OptionError("This standardizer comes from no table; expected that of train.fit_standardizer().")
    if max_tasks < 1 or max_elements < 1:
        raise OptionError(f"max_tasks={max_tasks} and max_elements={max_elements}; expected at least 1.")
    schema = replace(TableSchema.from_state(standardizer.schema), order_by=None)
    columns = list(frame.columns)
    if not any(name in columns for name in schema.y):
        frame = frame.assign(**dict.fromkeys(schema.y, float("nan")))
    rows = read_frame(frame, schema, dtype, in_order=False, unlabelled=True)
    return _batches(rows, schema, standardizer, max_tasks, max_elements, dtype)


def _batches(
    rows: Rows, schema: TableSchema, standardizer: Standardizer, max_tasks: int, max_elements: int, dtype: torch.dtype
) -> Iterator[tuple[TaskBatch, Tensor]]:
    flat = encode(rows, schema, standardizer, dtype)
    x, y, w = flat.x, flat.y, flat.w
    seen = ~(y.isnan() if y.dim() == 1 else y.isnan().any(-1))
    _refuse_half(rows, schema, y, seen)
    owner = torch.arange(len(rows.lengths)).repeat_interleave(rows.lengths)
    order = (2 * owner + (~seen).long()).argsort(stable=True)  # of each task, rows with a target first
    seen_count = torch.bincount(owner[seen], minlength=len(rows.lengths))
    asked_count = rows.lengths - seen_count
    todo = asked_count.nonzero().flatten()
    todo = todo[rows.lengths[todo].argsort(stable=True)]
    while len(todo):
        sizes = rows.lengths[todo] * torch.arange(1, len(todo) + 1) * x.shape[1]
        count = min(max(int((sizes <= max_elements).sum()), 1), max_tasks)
        task, todo = todo[:count], todo[count:]
        start, shots, asked = rows.starts[task], seen_count[task], asked_count[task]
        support, support_mask = _positions(start, shots)
        query, query_mask = _positions(start + shots, asked)
        support, query = order[support], order[query]
        covariates = None if w is None else w[task]
        yield (
            TaskBatch(
                support=Observations(x[support], torch.nan_to_num(y[support]), support_mask, covariates),
                query=Observations(x[query], None, query_mask, covariates),
                names=tuple(rows.names[i] for i in task.tolist()),
                standardizer=flat.standardizer,
            ),
            rows.position[query].masked_fill(~_full(query_mask, query), -1),
        )


def _positions(start: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows ``start …`` of each task, padded with the first, and which are real (None: all)."""
    position = torch.arange(int(counts.max()))
    mask = position < counts.unsqueeze(1)
    return start.unsqueeze(1) + torch.where(mask, position, 0), None if bool(mask.all()) else mask


def _full(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask


def _refuse_half(rows: Rows, schema: TableSchema, y: Tensor, seen: Tensor) -> None:
    """Rows with some targets but not all would be forecast as if nothing were known of them."""
    half = torch.zeros_like(seen) if y.dim() == 1 else ~seen & ~y.isnan().all(-1)
    if bool(half.any()):
        first = int(half.nonzero()[0])
        raise DataError(
            f"A row of task {rows.task_of(first)!r} has some of the targets {', '.join(schema.y)} but not all "
            f"({int(half.sum())} such row(s) in all); a row has all of them, and is learned from, or none, and is"
            " forecast."
        )
