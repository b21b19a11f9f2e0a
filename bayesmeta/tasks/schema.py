"""What the columns of a table are: their roles, which the user names, and what only the training tasks can teach."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from bayesmeta.data import Standardizer
from bayesmeta.errors import DataError, OptionError, ShapeError

#: What kind of number a target is; see :class:`TableSchema`.
Target = Literal["real", "count", "class"]
#: What happens to a row that lacks an input; see :class:`TableSchema`.
Missing = Literal["error", "drop", "mean"]


@dataclass(frozen=True)
class TableSchema:
    """The columns of a table: their roles, and the categories, classes and gaps that its tasks have.

    The last four fields are **learned**, from the training tasks alone: a table reads only its own rows, and a
    standardizer carries its table's schema to the others. The columns of x, :attr:`x_names`, are in this order: the
    inputs as they are named (a categorical one becomes a column of zeros and ones for each category,
    ``"name=category"``), an indicator ``"name is missing"`` for each column of ``gaps``, and last the exposure.

    Attributes:
        task: column that says which task a row belongs to.
        x: input columns, categorical ones among them.
        y: target columns.
        w: task-level columns, constant within a task.
        categorical: those of ``x`` and ``w`` that hold categories rather than numbers.
        exposure: a positive column (hours at risk, inhabitants) that becomes the last column of x, in raw units.
        target: ``"real"`` numbers; ``"count"``, whole numbers from 0 on; ``"class"``, coded 0, 1, … in the order of
            ``classes``. Only real targets are standardised.
        missing: an input that is missing is an ``"error"``; its row is left out (``"drop"``); or it takes the mean
            of the training tasks and sets an indicator column (``"mean"``; a category then is in none).
        order_by: column that says what comes first within a task; None: see :meth:`TableTasks.from_dataframe`.
        categories: the categories of each categorical column, numbers by size, then text by alphabet.
        flags: columns of ``x`` and ``w`` that hold True and False; they stay 1 and 0.
        gaps: columns that lack values somewhere, where ``missing`` is ``"mean"``.
        classes: the classes of a ``"class"`` target, in the order of their codes.
    """

    task: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    w: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    exposure: str | None = None
    target: Target = "real"
    missing: Missing = "error"
    order_by: str | None = None
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        task: str,
        x: Sequence[str],
        y: str | Sequence[str],
        w: Sequence[str] = (),
        categorical: Sequence[str] = (),
        exposure: str | None = None,
        target: Target = "real",
        missing: Missing = "error",
        order_by: str | None = None,
    ) -> TableSchema:
        """The roles as :meth:`TableTasks.from_dataframe` takes them, checked; nothing is learned yet.

        Raises:
            DataError: for columns that are no text, are named twice or have two roles that exclude each other.
            OptionError: for an unknown ``target`` or ``missing``.
        """
        for name, value, known in (("target", target, Target), ("missing", missing, Missing)):
            if value not in get_args(known):
                raise OptionError(f"{name}={value!r} is not known; expected one of {', '.join(get_args(known))}.")
        for name, columns in (("x", x), ("w", w), ("categorical", categorical)):
            if isinstance(columns, str):
                raise DataError(f"{name}={columns!r}; expected a list of column names: {name}=[{columns!r}].")
        inputs = (*x, *(name for name in categorical if name not in x and name not in w))
        targets = (y,) if isinstance(y, str) else tuple(y)
        schema = cls(task, inputs, targets, tuple(w), tuple(categorical), exposure, target, missing, order_by)
        schema._check()
        return schema

    def _check(self) -> None:
        if not self.x or not self.y:
            raise DataError(f"x={list(self.x)} and y={list(self.y)}; expected at least one column name in each.")
        for name in self.columns:
            if not isinstance(name, str):
                raise DataError(f"Column name {name!r} is a {type(name).__name__}; expected text (rename the column).")
        roles = [self.task, *self.x, *self.w, *self.y, *([self.exposure] if self.exposure is not None else [])]
        twice = [name for name in roles if roles.count(name) > 1] + [name for name in self.y if name == self.order_by]
        if twice:
            raise DataError(
                f"Column {twice[0]!r} is named more than once: task={self.task!r}, x={list(self.x)}, y={list(self.y)}, "
                f"w={list(self.w)}, exposure={self.exposure!r}, order_by={self.order_by!r}. Each column has one of "
                "these roles; the target may not be an input, nor what rows are ordered by."
            )
        if len(set(self.categorical)) < len(self.categorical):
            raise DataError(f"categorical={list(self.categorical)} repeats a column.")
        if self.target == "class" and len(self.y) > 1:
            raise DataError(f"y={list(self.y)} with target='class'; expected one column of classes.")

    # -- names --------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column of the table that is read, targets last."""
        extra = [name for name in (self.exposure, self.order_by) if name is not None]
        return tuple(dict.fromkeys([self.task, *self.x, *self.w, *extra, *self.y]))

    @property
    def x_names(self) -> tuple[str, ...]:
        """A name for each column of x, in order."""
        return self._names(self.x) + (() if self.exposure is None else (self.exposure,))

    @property
    def w_names(self) -> tuple[str, ...]:
        """A name for each column of the task-level covariates w, in order."""
        return self._names(self.w)

    def _names(self, columns: Iterable[str]) -> tuple[str, ...]:
        columns = tuple(columns)
        names = [part for name in columns for part in self.parts(name)]
        return (*names, *(f"{name} is missing" for name in columns if name in self.gaps))

    def parts(self, name: str) -> tuple[str, ...]:
        """The names of the columns that a column becomes, its indicator apart."""
        if name not in self.categorical:
            return (name,)
        return tuple(f"{name}={category}" for category in self.categories.get(name, ()))

    def scaled(self, columns: Sequence[str], *, exposure: str | None = None) -> list[bool]:
        """For each column that ``columns`` become, whether it is a number that the standardizer scales."""
        inputs = [name not in self.categorical and name not in self.flags for name in columns for _ in self.parts(name)]
        indicators = [False for name in columns if name in self.gaps]
        return inputs + indicators + ([] if exposure is None else [False])

    @property
    def learned(self) -> bool:
        """Whether the meaning of x, w or y depends on which tasks were read: categories, classes or indicators."""
        return bool(self.categorical or self.gaps or self.target == "class")

    def roles(self) -> TableSchema:
        """The same without what was learned."""
        return replace(self, categories={}, flags=(), gaps=(), classes=())

    def check_same_roles(self, other: TableSchema) -> None:
        """Check that another table has the same columns in the same roles.

        Raises:
            ShapeError: naming the first role that differs.
        """
        for name in ("x", "y", "w", "categorical", "exposure", "target", "missing"):
            mine, theirs = getattr(other, name), getattr(self, name)
            if mine != theirs:
                raise ShapeError(
                    f"The standardizer or schema is for tables with {name}={_show(theirs)}; this one has "
                    f"{name}={_show(mine)}. Fit one with table.fit_standardizer() on a training table of these columns."
                )

    # -- plain values -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return plain | {"categories": {name: list(known) for name, known in self.categories.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TableSchema:
        """The inverse of :meth:`state`.

        Raises:
            DataError: for a state with other entries.
        """
        expected = {f.name for f in fields(cls)}
        if set(state) != expected:
            odd = ", ".join(sorted(set(state) ^ expected))
            raise DataError(f"This is not the state of a table's schema: entries missing or unknown: {odd}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items()}
        values["categories"] = {name: tuple(known) for name, known in state["categories"].items()}
        return cls(**values)


def label(value: Any) -> str:
    """The text by which a task, category or class is known: 1, 1.0 and ``numpy.int64(1)`` are all ``"1"``."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def label_order(text: str) -> tuple[int, float, str]:
    """Sort key of labels: numbers by size, then text by alphabet, whatever other labels there are."""
    try:
        number = float(text)
    except ValueError:
        return (1, 0.0, text)
    return (0, number, text) if number == number else (1, 0.0, text)


def did_you_mean(name: str, known: Iterable[Any]) -> str:
    """``"; did you mean 'uranium'?"``, or nothing when no known name is near."""
    near = difflib.get_close_matches(str(name).lower(), {str(k).lower(): k for k in known}, n=1, cutoff=0.6)
    original = next((str(k) for k in known if near and str(k).lower() == near[0]), None)
    return "" if original is None else f"; did you mean {original!r}?"


def roles_of(options: dict[str, Any], schema: TableSchema | None, standardizer: Standardizer | None) -> TableSchema:
    """What the columns are: as the options of :meth:`TableSchema.of` say, or else as the schema or the standardizer's.

    Raises:
        OptionError: for neither, or for both.
    """
    if schema is None and standardizer is not None and standardizer.schema is not None and options.get("task") is None:
        schema = TableSchema.from_state(standardizer.schema)
    if schema is None:
        if options.get("task") is None or options.get("y") is None:
            raise OptionError(
                f"task={options.get('task')!r} and y={options.get('y')!r}; name the columns of tasks and targets, or "
                "give a schema."
            )
        return TableSchema.of(**options)
    defaults = {"target": "real", "missing": "error"}
    said = [name for name, value in options.items() if value != defaults.get(name) and value not in (None, (), [])]
    if said:
        raise OptionError(f"{', '.join(said)} and a schema were given; the schema says what the columns are. Give one.")
    return schema


def _show(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
