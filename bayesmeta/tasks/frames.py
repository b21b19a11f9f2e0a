"""Reading a DataFrame in long format into columns of numbers; errors name the column and the task at fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.errors import DataError, EmptyTaskError, NonFiniteDataError
from bayesmeta.tasks.schema import TableSchema, did_you_mean, label

if TYPE_CHECKING:
    import pandas as pd

#: A categorical column may have this many categories: each becomes a column of x.
MAX_CATEGORIES = 1000


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a table, tasks one after the other, before anything was learned from them.

    Attributes:
        x: input columns and the exposure by name, ``[rows]``: float64, NaN where missing; or int32 codes into
            ``labels``, -1 where missing.
        y: target columns, likewise.
        w: task-level columns, likewise, ``[tasks]``.
        labels: the labels of each column of codes.
        flags: columns of x and w that hold True and False.
        position: where each row stood in the frame, int64 ``[rows]``.
        lengths: rows of each task, int64 ``[tasks]``.
        names: of the tasks, in the order in which they first appear.
    """

    x: dict[str, Tensor]
    y: dict[str, Tensor]
    w: dict[str, Tensor]
    labels: dict[str, tuple[str, ...]]
    flags: tuple[str, ...]
    position: Tensor
    lengths: Tensor
    names: tuple[str, ...]

    @property
    def starts(self) -> Tensor:
        """The first row of each task, ``[tasks]``."""
        return self.lengths.cumsum(0) - self.lengths

    def task_of(self, row: int) -> str:
        """Name of the task that a row belongs to."""
        return self.names[int(torch.searchsorted(self.lengths.cumsum(0), row, right=True))]

    def tasks(self, index: Tensor) -> Rows:
        """The rows of some tasks, copied, in the order of ``index`` ``[tasks]``."""
        lengths = self.lengths[index]
        offset = self.starts[index] - (lengths.cumsum(0) - lengths)
        rows = torch.arange(int(lengths.sum())) + offset.repeat_interleave(lengths)
        return replace(
            self,
            x={name: column[rows] for name, column in self.x.items()},
            y={name: column[rows] for name, column in self.y.items()},
            w={name: column[index] for name, column in self.w.items()},
            position=self.position[rows],
            lengths=lengths,
            names=tuple(self.names[i] for i in index.tolist()),
        )


def missing(column: Tensor) -> Tensor:
    """True where a column of :class:`Rows` has no value."""
    return column.isnan() if column.is_floating_point() else column < 0


def read_frame(
    frame: pd.DataFrame, roles: TableSchema, dtype: torch.dtype, *, in_order: bool, unlabelled: bool = False
) -> Rows:
    """Rows of a long table grouped by task.

    Args:
        frame: one row an observation.
        roles: which columns to read, and what to do about missing inputs.
        dtype: that the values must fit into.
        in_order: sort each task (stably) by ``roles.order_by``, or else by the first input; a named ``order_by``
            sorts in any case. Otherwise rows stay in the order given.
        unlabelled: keep rows that lack a target, which are dropped otherwise.

    Raises:
        DataError: for an unknown, repeated or non-numeric column, a row without a task, a task-level column that
            is not constant, an exposure that is not positive, or a count that is none.
        NonFiniteDataError: for an infinite value, and a missing input that is to be an error.
        EmptyTaskError: if no row is left.
    """
    import pandas as pd  # here, so that the tensors of other tasks do not wait for it

    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"frame is a {type(frame).__name__}; expected a pandas DataFrame, such as pd.read_csv(path).")
    check_columns(list(frame.columns), roles.columns)
    frame = frame[list(roles.columns)]
    keep, inputs = np.ones(len(frame), dtype=bool), [*roles.x, *([roles.exposure] if roles.exposure else [])]
    if not unlabelled:
        keep &= frame[list(roles.y)].notna().all(axis=1).to_numpy()
    if not keep.any():
        raise EmptyTaskError(f"The table has no row with a target in column {_list(roles.y)}; expected at least one.")
    if roles.missing == "drop":
        keep &= frame[inputs].notna().all(axis=1).to_numpy()
    reader = _Reader(frame[keep] if not keep.all() else frame, roles, dtype)
    x = {name: reader.read(name, optional=roles.missing == "mean" and name != roles.exposure) for name in inputs}
    if roles.exposure is not None:
        reader.refuse(roles.exposure, ~(x[roles.exposure] > 0), "a positive number: an exposure is what counts are per")
    y = {name: reader.read(name, optional=unlabelled, codes=roles.target == "class") for name in roles.y}
    if roles.target == "count":
        for name, column in y.items():
            wrong = (column < 0) | (column != column.floor()) & ~column.isnan()
            reader.refuse(name, wrong, "a count: 0, 1, 2, … (use target='real' for other numbers)")
    w, lacking = reader.read_w()
    keys = [reader.codes]
    if roles.order_by is not None or in_order:
        keys.insert(0, reader.read_order())
    rows = reader.group(np.lexsort(keys), x, y, w, np.flatnonzero(keep))
    if lacking.any():
        rows = rows.tasks(torch.from_numpy(np.flatnonzero(~lacking)))
    return rows


def check_columns(columns: Sequence[Any], wanted: Sequence[str]) -> None:
    """Check that a table has each wanted column once.

    Raises:
        DataError: naming the first that it has not, with the nearest name, or has twice.
    """
    for name in wanted:
        if columns.count(name) == 1:
            continue
        if name in columns:
            raise DataError(f"The table has more than one column {name!r}; rename or drop one of them.")
        shown = ", ".join(map(str, columns[:40])) + (", …" if len(columns) > 40 else "")
        raise DataError(
            f"The table has no column {name!r}; its columns are: {shown}{did_you_mean(name, columns) or '.'}"
        )


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


class _Reader:
    """The columns of one frame, whose rows are those that are kept."""

    def __init__(self, frame: pd.DataFrame, roles: TableSchema, dtype: torch.dtype) -> None:
        self.frame, self.roles, self.dtype = frame, roles, dtype
        self.labels: dict[str, tuple[str, ...]] = {}
        self.flags: list[str] = []
        if len(frame) == 0:
            raise EmptyTaskError("Each row of the table lacks an input (missing='drop'), so no row is left.")
        nameless = int(frame[roles.task].isna().sum())
        if nameless:
            raise DataError(f"{nameless} row(s) have no task in column {roles.task!r}; drop or name them.")
        self.codes, self.names = self._encode(roles.task, "tasks")

    def _encode(self, name: str, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
        codes, unique = self.frame[name].factorize()
        names = tuple(label(value) for value in unique.tolist())
        if len(set(names)) < len(names):
            raise DataError(f"Column {name!r} has different {what} of one name (such as 1 and '1'); rename them.")
        return codes, names

    def task_of(self, row: int) -> str:
        """The task of a row of the frame."""
        return self.names[self.codes[row]]

    def refuse(self, name: str, wrong: Tensor, expected: str) -> None:
        """Raise a DataError that names the first row at fault."""
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise DataError(
                f"Column {name!r} is {label(self.frame[name].iloc[first])} in task {self.task_of(first)!r} "
                f"({int(wrong.sum())} such row(s) in all); expected {expected}."
            )

    def read(self, name: str, *, optional: bool, codes: bool = False) -> Tensor:
        """A column as float64 or int32 codes; a value that is missing and not ``optional`` is an error."""
        if codes or name in self.roles.categorical:
            column = self._categories(name)
        else:
            column = self._numbers(name)
        wrong = torch.isinf(column) if optional else missing(column) | torch.isinf(column)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            empty = bool(missing(column)[first])  # as NaN is read from a file
            value = "empty" if empty else float(column[first])
            fill = "" if name in self.roles.y else ", or see missing='drop' and missing='mean'"
            raise NonFiniteDataError(
                f"Column {name!r} is {value} in task {self.task_of(first)!r} ({int(wrong.sum())} such row(s) "
                f"in all); expected finite numbers of {self.dtype}. Drop or fill these rows{fill}."
            )
        return column

    def _categories(self, name: str) -> Tensor:
        codes, self.labels[name] = self._encode(name, "categories")
        if len(self.labels[name]) > MAX_CATEGORIES:
            raise DataError(
                f"Column {name!r} has {len(self.labels[name])} different values; as categories at most "
                f"{MAX_CATEGORIES} are read. If it holds numbers, do not name it as categorical; else group rare ones."
            )
        return torch.from_numpy(codes.astype(np.int32))

    def _numbers(self, name: str) -> Tensor:
        column = self.frame[name]
        if column.dtype.kind in "mM":
            raise DataError(
                f"Column {name!r} has dtype {column.dtype}; expected numbers. Convert it first, dates to years: "
                f"frame[{name!r}].dt.year + frame[{name!r}].dt.dayofyear / 365.25."
            )
        if self._is_flag(column):
            self.flags.append(name)
        try:
            values = column.to_numpy(dtype=float, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise DataError(self._not_numbers(name)) from error
        with np.errstate(invalid="ignore"):
            too_large = np.abs(values) > torch.finfo(self.dtype).max
        if too_large.any():
            values = np.where(too_large, np.copysign(np.inf, values), values)
        return torch.tensor(values)

    def _is_flag(self, column: pd.Series) -> bool:
        if column.dtype.kind == "b" or str(column.dtype) == "boolean":
            return True
        if column.dtype != object:
            return False
        kinds = {isinstance(value, bool | np.bool_) for value in column.dropna()}
        if kinds == {True, False}:
            raise DataError(f"Column {column.name!r} mixes True and False with other values; write it in one way.")
        return kinds == {True}

    def _not_numbers(self, name: str) -> str:
        import pandas as pd

        column = self.frame[name]
        odd = np.flatnonzero((pd.to_numeric(column, errors="coerce").isna() & column.notna()).to_numpy())
        if len(odd) == 0:  # numbers of a kind that is no float, such as complex ones
            return f"Column {name!r} has dtype {column.dtype}; expected real numbers. Convert it first."
        example = f"it holds {str(column.iloc[odd[0]])!r} in task {self.task_of(odd[0])!r}"
        if _dates(column.iloc[odd].astype(str)) is not None:
            return (
                f"Column {name!r} has dtype {column.dtype}; expected numbers, and these look like dates ({example}). "
                f"Convert them first, to days: frame[{name!r}] = (pd.to_datetime(frame[{name!r}]) - "
                "pd.Timestamp('2000-01-01')) / pd.Timedelta(days=1)."
            )
        text = "" if name in self.roles.y else f", or read it as categories: categorical=[{name!r}]"
        text = f"{text} (target='class' reads a target of classes)" if name in self.roles.y else text
        return f"Column {name!r} has dtype {column.dtype}; expected numbers, but {example}. Mend or convert it{text}."

    def read_order(self) -> np.ndarray:
        """What rows are sorted by: numbers, dates, or dates as text in ISO 8601 (only their order counts)."""
        roles = self.roles
        name = roles.order_by or roles.x[0]
        if roles.order_by is None and name in roles.categorical:
            raise DataError(f"Rows cannot be ordered by the categories of {name!r}; name a column with order_by=….")
        column = self.frame[name]
        absent = np.flatnonzero(column.isna().to_numpy())
        if len(absent):
            raise DataError(
                f"Column {name!r}, by which rows are ordered, is missing in task {self.task_of(absent[0])!r} "
                f"({len(absent)} such row(s) in all); fill or drop these rows, or order by another column (order_by=…)."
            )
        dates = column if column.dtype.kind in "mM" else _dates(column) if _is_text(column) else None
        if dates is not None:
            return dates.astype("int64").to_numpy()
        return self._numbers(name).numpy()

    def read_w(self) -> tuple[dict[str, Tensor], np.ndarray]:
        """Task-level columns ``[tasks]``, and which tasks lack one and are to be dropped, bool ``[tasks]``."""
        lacking = np.zeros(len(self.names), dtype=bool)
        columns = {}
        for name in self.roles.w:
            column = self.read(name, optional=True)
            columns[name] = value = self._constant(name, column)
            absent = missing(value)
            if self.roles.missing == "drop":
                lacking |= absent.numpy()
            elif self.roles.missing == "error" and bool(absent.any()):
                first = self.names[int(absent.nonzero()[0])]
                raise NonFiniteDataError(
                    f"Task-level column {name!r} has no value in task {first!r} ({int(absent.sum())} such task(s) in "
                    "all); fill it, or see missing='drop' and missing='mean'."
                )
        if lacking.all():
            raise EmptyTaskError(f"Each task lacks a task-level column ({_list(self.roles.w)}), so no task is left.")
        return columns, lacking

    def _constant(self, name: str, column: Tensor) -> Tensor:
        """The one value that a column has in each task; rows may leave it out."""
        present = ~missing(column)
        codes = torch.from_numpy(self.codes)[present].long()
        value = torch.full((len(self.names),), -1 if column.dtype == torch.int32 else torch.nan, dtype=column.dtype)
        value[codes] = column[present]
        differs = value[codes] != column[present]
        if bool(differs.any()):
            task = self.names[int(codes[differs][0])]
            found = self.frame[name][self.codes == self.names.index(task)].dropna().unique()[:2]
            raise DataError(
                f"Task-level column {name!r} is not constant within task {task!r} (it is {label(found[0])} and "
                f"{label(found[1])} there); expected one value a task. Name it in x if it differs from row to row."
            )
        return value

    def group(
        self,
        order: np.ndarray,
        x: dict[str, Tensor],
        y: dict[str, Tensor],
        w: dict[str, Tensor],
        position: np.ndarray,
    ) -> Rows:
        """Everything that was read, in the order of ``order``."""
        index = torch.from_numpy(order)
        return Rows(
            x={name: column[index] for name, column in x.items()},
            y={name: column[index] for name, column in y.items()},
            w=w,
            labels=self.labels,
            flags=tuple(dict.fromkeys(self.flags)),
            position=torch.from_numpy(position)[index],
            lengths=torch.from_numpy(np.bincount(self.codes, minlength=len(self.names))).long(),
            names=self.names,
        )


def _is_text(column: pd.Series) -> bool:
    from pandas.api.types import infer_dtype

    return infer_dtype(column) == "string"


def _dates(column: pd.Series) -> Any:
    """The column as dates where each of its texts is one in ISO 8601, else None."""
    import pandas as pd

    dates = pd.to_datetime(column, format="ISO8601", errors="coerce", utc=True)
    return None if dates.isna().any() else dates
