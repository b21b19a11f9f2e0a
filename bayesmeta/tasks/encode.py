"""From the columns of a table to x, y and w: what the training tasks teach (a schema, a standardizer), and its use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesmeta.data import Standardizer
from bayesmeta.errors import DataError, ShapeError
from bayesmeta.tasks.frames import Rows, missing
from bayesmeta.tasks.schema import TableSchema, label_order


def learn(roles: TableSchema, rows: Rows) -> TableSchema:
    """The schema with the categories, flags, gaps and classes that these rows have."""
    columns = {**rows.x, **rows.w}
    gaps = [name for name in (*roles.x, *roles.w) if bool(missing(columns[name]).any())]
    return replace(
        roles,
        categories={name: _present(columns[name], rows.labels[name]) for name in roles.categorical},
        flags=tuple(name for name in (*roles.x, *roles.w) if name in rows.flags),
        gaps=tuple(gaps) if roles.missing == "mean" else (),
        classes=_present(rows.y[roles.y[0]], rows.labels[roles.y[0]]) if roles.target == "class" else (),
    )


def _present(codes: Tensor, labels: tuple[str, ...]) -> tuple[str, ...]:
    used = torch.bincount(codes[codes >= 0], minlength=len(labels)) > 0
    return tuple(sorted((labels[i] for i in used.nonzero().flatten().tolist()), key=label_order))


@dataclass(frozen=True, eq=False)
class Flat:
    """All rows of a table on one device, in the units of its batches.

    x ``[R, F]``, y ``[R]`` or ``[R, K]``, w ``[N, W]``, and of each task its first row and its length, int64 ``[N]``.
    """

    x: Tensor
    y: Tensor
    w: Tensor | None
    starts: Tensor
    lengths: Tensor
    standardizer: Standardizer | None


# -- columns ----------------------------------------------------------------------------------------------------------


def _recode(
    codes: Tensor,
    labels: tuple[str, ...],
    known: tuple[str, ...],
    name: str,
    what: str,
    task_of: Callable[[int], str],
) -> Tensor:
    """Codes into ``known`` from codes into ``labels``; -1, missing, stays."""
    index = {text: i for i, text in enumerate(known)}
    table = torch.tensor([index.get(text, -2) for text in labels] + [-1], dtype=codes.dtype)  # the last is for code -1
    new = table[codes.long()]
    if bool((new == -2).any()):
        first = int((new == -2).nonzero()[0])
        shown = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
        raise DataError(
            f"Column {name!r} is {labels[int(codes[first])]!r} in task {task_of(first)!r}, a {what} that no training "
            f"task has ({int((new == -2).sum())} such row(s) in all); known are: {shown}. Leave these rows out, or "
            f"train on tasks that have this {what}."
        )
    return new


def _columns(
    columns: dict[str, Tensor],
    names: Sequence[str],
    schema: TableSchema,
    rows: Rows,
    task_of: Callable[[int], str],
) -> Iterator[Tensor]:
    """What columns become, one by one in the order of the schema's names: float64, NaN where a number is missing."""
    for name in names:
        column = columns[name]
        absent = missing(column)
        if name not in schema.gaps and bool(absent.any()):
            first = int(absent.nonzero()[0])
            raise DataError(
                f"Column {name!r} is missing in task {task_of(first)!r} ({int(absent.sum())} such row(s) in all), but "
                "no training task lacks it, so that a model cannot know what this means. Fill or drop these rows."
            )
        if name in schema.categorical:
            known = schema.categories[name]
            codes = _recode(column, rows.labels[name], known, name, "category", task_of)
            yield from ((codes == k).double() for k in range(len(known)))
        else:
            yield column
    yield from (missing(columns[name]).double() for name in names if name in schema.gaps)


def _x_columns(rows: Rows, schema: TableSchema) -> Iterator[Tensor]:
    yield from _columns(rows.x, schema.x, schema, rows, rows.task_of)
    if schema.exposure is not None:
        yield rows.x[schema.exposure]


def _w_columns(rows: Rows, schema: TableSchema) -> Iterator[Tensor]:
    return _columns(rows.w, schema.w, schema, rows, rows.names.__getitem__)


def _assemble(
    columns: Iterator[Tensor],
    shape: tuple[int, int],
    units: tuple[Tensor, Tensor] | None,
    standard: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Columns side by side, one in memory at a time in float64; missing ones at the mean, in raw or standard units."""
    out = torch.empty(shape, dtype=dtype)
    for i, column in enumerate(columns):
        if units is not None:
            mean, scale = units[0][i].double(), units[1][i].double()
            column = torch.where(column.isnan(), mean, column)
            column = (column - mean) / scale if standard else column
        out[:, i] = column
    return out


def _encode_x(
    rows: Rows, schema: TableSchema, standardizer: Standardizer | None, dtype: torch.dtype, standard: bool
) -> Tensor:
    """x ``[rows, features]``."""
    units = None if standardizer is None else (standardizer.x_mean, standardizer.x_scale)
    shape = (len(rows.position), len(schema.x_names))
    return _assemble(_x_columns(rows, schema), shape, units, standard, dtype)


def _encode_w(
    rows: Rows, schema: TableSchema, standardizer: Standardizer | None, dtype: torch.dtype, standard: bool
) -> Tensor | None:
    """w ``[tasks, covariates]``, None where the schema has no task-level column."""
    if not schema.w:
        return None
    units = None
    if standardizer is not None and standardizer.w_mean is not None and standardizer.w_scale is not None:
        units = (standardizer.w_mean, standardizer.w_scale)
    shape = (len(rows.names), len(schema.w_names))
    return _assemble(_w_columns(rows, schema), shape, units, standard, dtype)


def _encode_y(
    rows: Rows, schema: TableSchema, standardizer: Standardizer | None, dtype: torch.dtype, standard: bool
) -> Tensor:
    """y ``[rows]``, or ``[rows, outputs]`` for several; NaN where it is missing."""
    if schema.target == "class":
        (name,) = schema.y
        codes = _recode(rows.y[name], rows.labels[name], schema.classes, name, "class", rows.task_of)
        return torch.where(codes < 0, torch.nan, codes.double()).to(dtype)
    columns = [rows.y[name] for name in schema.y]
    if standardizer is not None and standard:
        mean, scale = (t.double().reshape(-1) for t in (standardizer.y_mean, standardizer.y_scale))
        columns = [(column - m) / s for column, m, s in zip(columns, mean, scale)]
    columns = [column.to(dtype) for column in columns]
    return columns[0] if len(columns) == 1 else torch.stack(columns, -1)


def encode(
    rows: Rows, schema: TableSchema, standardizer: Standardizer | None, dtype: torch.dtype, *, standard: bool = True
) -> Flat:
    """x, y and w of all rows, in standard units where there is a standardizer and ``standard`` is set, on the CPU.

    Raises:
        DataError: for a category or class that the schema does not know, a missing value that it has no indicator
            for, and gaps that no standardizer fills.
    """
    if schema.gaps and standardizer is None:
        raise DataError(
            f"missing='mean' fills {', '.join(map(repr, schema.gaps))} with means of the training tasks, so the "
            "table needs a standardizer: table.with_standardizer(train.fit_standardizer())."
        )
    return Flat(
        _encode_x(rows, schema, standardizer, dtype, standard),
        _encode_y(rows, schema, standardizer, dtype, standard),
        _encode_w(rows, schema, standardizer, dtype, standard),
        rows.starts,
        rows.lengths,
        None if standardizer is None else standardizer.to("cpu", dtype),
    )


# -- units ------------------------------------------------------------------------------------------------------------


def _moments(column: Tensor, name: str) -> tuple[float, float]:
    """Mean and standard deviation of what is there; something constant keeps scale 1."""
    present = column[~column.isnan()]
    if len(present) == 0:
        raise DataError(f"Column {name!r} has no value in any training task; leave it out.")
    constant = bool(present.min() == present.max())
    return float(present.mean()), 1.0 if constant else float(present.std(correction=0))


def _fit(columns: Iterator[Tensor], names: Sequence[str], scaled: Sequence[bool]) -> tuple[Tensor, Tensor]:
    pairs = [_moments(c, name) if s else (0.0, 1.0) for c, name, s in zip(columns, names, scaled, strict=True)]
    mean, scale = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(-1)
    return mean, scale


def fit_standardizer(rows: Rows, schema: TableSchema, dtype: torch.dtype) -> Standardizer:
    """Mean and standard deviation of the columns of these rows; see :meth:`TableTasks.fit_standardizer`.

    Raises:
        DataError: for a target that is the same everywhere, and a column without any value.
    """
    for name in schema.y:
        column = rows.y[name]
        if bool(column.min() == column.max()):
            value = rows.labels[name][int(column[0])] if schema.target == "class" else f"{float(column[0]):g}"
            raise DataError(
                f"The target {name!r} is {value} in all {len(column)} row(s) of the {len(rows.names)} training "
                "task(s): there is nothing to learn. Give another target, or more tasks."
            )
    parts = dict(zip(("x_mean", "x_scale"), _fit(_x_columns(rows, schema), schema.x_names, _scaled_x(schema))))
    if schema.w:
        units = _fit(_w_columns(rows, schema), schema.w_names, schema.scaled(schema.w))
        parts |= dict(zip(("w_mean", "w_scale"), units))
    real = schema.target == "real"
    pairs = [_moments(rows.y[name], name) if real else (0.0, 1.0) for name in schema.y]
    y_mean, y_scale = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    single = len(schema.y) == 1
    parts |= {"y_mean": y_mean[0] if single else y_mean, "y_scale": y_scale[0] if single else y_scale}
    return Standardizer(**{k: v.to(dtype) for k, v in parts.items()}, schema=schema.state())


def _scaled_x(schema: TableSchema) -> list[bool]:
    return schema.scaled(schema.x, exposure=schema.exposure)


def check_units(schema: TableSchema, standardizer: Standardizer) -> None:
    """Check that a standardizer is for tables of this schema.

    Raises:
        ShapeError: for another number of inputs, covariates or targets.
    """
    w_mean = standardizer.w_mean
    pairs = {
        "input": (standardizer.x_mean.numel(), schema.x_names),
        "task-level covariate": (0 if w_mean is None else w_mean.numel(), schema.w_names),
        "target": (standardizer.y_mean.numel(), schema.y),
    }
    for what, (width, names) in pairs.items():
        if width != len(names):
            raise ShapeError(
                f"The standardizer is for {width} {what}(s); the table has {len(names)}: {', '.join(names)}. Fit one "
                "with table.fit_standardizer() on the training table."
            )
