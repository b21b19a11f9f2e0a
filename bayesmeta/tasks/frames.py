"""Reading a DataFrame in long format into tensors, with errors that name the column and the task at fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesmeta.errors import DataError, EmptyTaskError, NonFiniteDataError

if TYPE_CHECKING:
    import pandas as pd


def read_frame(
    frame: pd.DataFrame, task: str, x: Sequence[str], y: str, dtype: torch.dtype, *, by_time: bool
) -> tuple[Tensor, Tensor, list[str]]:
    """Rows of a long table grouped by task.

    Args:
        frame: one row an observation.
        task: column that says which task a row belongs to.
        x: input columns.
        y: target column; rows where it is missing are dropped.
        dtype: of the values.
        by_time: sort each task (stably) by the first input; otherwise rows stay in the order given.

    Returns:
        Values ``[rows, features + 1]``, the target last, tasks one after the other in the order in which they first
        appear; the number of rows of each task, int64 ``[tasks]``; the names of the tasks.

    Raises:
        DataError: for an unknown, repeated or non-numeric column, or a row without a task.
        NonFiniteDataError: for a missing or infinite input, or an infinite target.
        EmptyTaskError: if no row with a target is left.
    """
    import pandas as pd  # here, so that the tensors of other tasks do not wait for it

    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"frame is a {type(frame).__name__}; expected a pandas DataFrame, such as pd.read_csv(path).")
    _check_columns(frame, task, x, y)
    frame = frame[frame[y].notna()]
    if len(frame) == 0:
        raise EmptyTaskError(f"The table has no row with a target in column {y!r}; expected at least one.")
    nameless = int(frame[task].isna().sum())
    if nameless:
        raise DataError(f"{nameless} row(s) have no task in column {task!r}; drop or name them.")
    codes, names = _encode(frame[task])
    values = torch.stack([_column(frame, name, codes, names, dtype) for name in (*x, y)], -1)
    keys = (values[:, 0].numpy(), codes) if by_time else (codes,)
    order = torch.from_numpy(np.lexsort(keys))
    lengths = torch.from_numpy(np.bincount(codes, minlength=len(names))).long()
    return values[order], lengths, names


def _check_columns(frame: pd.DataFrame, task: str, x: Sequence[str], y: str) -> None:
    if isinstance(x, str) or len(x) == 0:
        raise DataError(f"x={x!r}; expected a list of at least one column name.")
    columns = list(frame.columns)
    for name in (task, *x, y):
        if columns.count(name) != 1:
            found = "no" if name not in columns else "more than one"
            raise DataError(f"The table has {found} column {name!r}; its columns are: {', '.join(map(str, columns))}.")
    if y in x or y == task or len(set(x)) < len(x):
        raise DataError(f"task={task!r}, x={list(x)} and y={y!r} repeat a column; the target may not be an input.")


def _encode(column: pd.Series) -> tuple[np.ndarray, list[str]]:
    codes, unique = column.factorize()
    names = [str(name) for name in unique]
    if len(set(names)) < len(names):
        raise DataError(f"Column {column.name!r} has different tasks of one name (such as 1 and '1'); rename them.")
    return codes, names


def _column(frame: pd.DataFrame, name: str, codes: np.ndarray, names: list[str], dtype: torch.dtype) -> Tensor:
    if frame[name].dtype.kind in "mM":
        raise DataError(
            f"Column {name!r} has dtype {frame[name].dtype}; expected numbers. Convert it first, dates to years: "
            f"frame[{name!r}].dt.year + frame[{name!r}].dt.dayofyear / 365.25."
        )
    try:
        values = torch.tensor(frame[name].to_numpy(dtype=float, na_value=np.nan)).to(dtype)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"Column {name!r} has dtype {frame[name].dtype}; expected numbers. Convert it (dates: to years) first."
        ) from error
    wrong = (~torch.isfinite(values)).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise NonFiniteDataError(
            f"Column {name!r} is {frame[name].iloc[first]} in task {names[codes[first]]!r} ({len(wrong)} such row(s) "
            f"in all); expected finite numbers of {dtype}. Drop or fill these rows."
        )
    return values
