"""Tasks from a table: one row an observation, one group of rows a task, everything sampled by tensor indexing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations, Standardizer, TaskBatch
from bayesmeta.errors import DataError, EmptyTaskError, OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.tasks.draw import Order, draw, split_sizes
from bayesmeta.tasks.encode import Flat, check_units, encode, fit_standardizer, learn
from bayesmeta.tasks.files import read_csv
from bayesmeta.tasks.frames import Rows, read_frame
from bayesmeta.tasks.schema import Missing, TableSchema, Target, roles_of

if TYPE_CHECKING:
    import pandas as pd


class TableTasks:
    """A finite table of tasks (countries, patients, machines) as a task distribution.

    The support of a task is, by ``order``:

    - ``"first"``: its first observations (the earliest ones: rows are sorted by ``order_by``, or the first input);
    - ``"random"``: a uniformly random subset of them;
    - ``"mixed"``: each task flips a fair coin between the two, so that one model learns to forecast and to fill in.

    The query is drawn from all the other observations; with ``"first"`` these are those that come after. Raw data are
    kept; where the table has a standardizer, batches are in standard units and carry it.

    **What is learned** from the rows (which categories and classes there are, which columns have gaps, means and
    scales) is learned from the table's own tasks, so that a training table knows nothing of held-out ones. Take
    :meth:`fit_standardizer` of the training table and give it to the others: it carries the training table's
    :attr:`schema` too.

    **Memory.** Rows are kept flat: 8 bytes a row for each number and 4 for each category, and once more (in the dtype
    of the batches, a category as one column for each of its values) on each device that is drawn from; nothing
    grows with the longest task. A part made by :meth:`subset` or :meth:`split` has a copy of its rows. Reading a frame
    takes at most 16 bytes a row for each column that is read, and 64 besides. A batch is padded to the longest task
    *that was drawn*; only :meth:`all` and :attr:`observations`, which hold every task at once, are padded to the
    longest of all.

    Build one with :meth:`from_dataframe` or :meth:`from_csv`.

    Args:
        rows: what was read.
        roles: what the columns are.
        order: see above.
        standardizer: units of the batches; None for raw ones.
        schema: what other tasks taught; None: learn it from these rows.
        dtype: of the batches.
        part: whether the rows are some tasks of a larger table.

    Raises:
        OptionError: for an unknown order.
        ShapeError: for a standardizer of other columns.
    """

    def __init__(
        self,
        rows: Rows,
        roles: TableSchema,
        *,
        order: Order = "random",
        standardizer: Standardizer | None = None,
        schema: TableSchema | None = None,
        dtype: torch.dtype = torch.float32,
        part: bool = False,
    ) -> None:
        if order not in get_args(Order):
            raise OptionError(f"order={order!r} is not known; expected one of {', '.join(get_args(Order))}.")
        if standardizer is not None and standardizer.schema is not None:
            schema = TableSchema.from_state(standardizer.schema)
        if schema is not None:
            schema.check_same_roles(roles)
        self._rows, self._roles, self._part = rows, roles.roles(), part
        self._given = schema is not None
        self._schema = learn(self._roles, rows) if schema is None else schema
        if standardizer is not None:
            check_units(self._schema, standardizer)
        self._standardizer = standardizer
        self._lengths: list[int] = rows.lengths.tolist()
        self._shortest = min(range(len(self._lengths)), key=self._lengths.__getitem__)
        self._on_device: dict[torch.device, Flat] = {}
        self.order, self.dtype = order, dtype

    @classmethod
    def from_dataframe(
        cls,
        frame: pd.DataFrame,
        *,
        task: str | None = None,
        x: Sequence[str] = (),
        y: str | Sequence[str] | None = None,
        w: Sequence[str] = (),
        categorical: Sequence[str] = (),
        exposure: str | None = None,
        target: Target = "real",
        missing: Missing = "error",
        order: Order = "random",
        order_by: str | None = None,
        schema: TableSchema | None = None,
        standardizer: Standardizer | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TableTasks:
        """Read a DataFrame in long format, one row an observation.

        Args:
            frame: the table; its index is ignored. Tasks keep the order in which they first appear, and rows theirs
                within a task, except that ``"first"``, ``"mixed"`` and ``order_by`` sort them (stably).
            task: column that says which task a row belongs to.
            x: input columns: numbers, or True and False (which become 1 and 0 and stay so).
            y: target column, or a list of several: y is then ``[tasks, rows, outputs]``. A row that lacks one of them
                is dropped, and so is a task that has no other row.
            w: task-level columns, constant within a task (rows may leave them out); they become ``w``.
            categorical: columns of categories (text or numbers): those of ``x`` and ``w`` that are, and more inputs.
                Each becomes a column of zeros and ones for each category of the training tasks.
            exposure: a positive column that becomes the last one of x, in raw units (for likelihoods of counts).
            target: ``"real"``, ``"count"`` or ``"class"``; see :class:`~bayesmeta.tasks.schema.TableSchema`.
            missing: what to do about a missing input: ``"error"``, ``"drop"`` or ``"mean"``; see there. ``"mean"``
                needs a standardizer.
            order: see the class.
            order_by: column by which rows are sorted within a task: numbers, dates, or dates as text in ISO 8601. By
                default the first input, where ``order`` calls for one.
            schema: read the columns as this says (that of the training table), instead of all the options above
                from ``task`` to ``missing`` and of ``order_by``.
            standardizer: units of the batches; see :meth:`fit_standardizer`. It brings its schema along.
            dtype: of x, y and w.

        Raises:
            DataError: for an unknown, repeated or non-numeric column (dates as text among them), a row without a
                task, a task-level column that is not constant, an exposure that is not positive, a count that is
                none, and for a category or class that the schema given does not know (when first drawn from).
            NonFiniteDataError: for a missing or infinite input, or an infinite target, naming column and task.
            EmptyTaskError: if no row with a target is left.
            OptionError: for an unknown option, or one that the schema given says already.
        """
        options: dict[str, Any] = {"task": task, "x": x, "y": y, "w": w, "categorical": categorical}
        options |= {"exposure": exposure, "target": target, "missing": missing, "order_by": order_by}
        roles = roles_of(options, schema, standardizer)
        rows = read_frame(frame, roles, dtype, in_order=order != "random")
        return cls(rows, roles, order=order, standardizer=standardizer, schema=schema, dtype=dtype)

    @classmethod
    def from_csv(cls, path: str | Path, *, separator: str = ",", **options: Any) -> TableTasks:
        """Read a CSV file in long format, its first line the names of the columns.

        Args:
            path: the file, in UTF-8; compressed ones (``.gz``) are read too. Cells that are empty, or hold NA, NaN,
                null or None, are missing.
            separator: what stands between two cells.
            **options: those of :meth:`from_dataframe`.

        Raises:
            DataError: for a file that is not there or is no CSV, and whatever :meth:`from_dataframe` raises.
            EmptyTaskError: for a file without a row.
        """
        roles = roles_of(
            {k: v for k, v in options.items() if k not in ("order", "schema", "standardizer", "dtype")},
            options.get("schema"),
            options.get("standardizer"),
        )
        frame = read_csv(path, columns=roles.columns, separator=separator)
        return cls.from_dataframe(frame, **options)

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def num_tasks(self) -> int:
        """Number of tasks in the table (N)."""
        return len(self._lengths)

    @property
    def num_features(self) -> int:
        """Number of columns of x."""
        return len(self._schema.x_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each task, in table order."""
        return self._rows.names

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of observations of each task."""
        return tuple(self._lengths)

    @property
    def x_names(self) -> tuple[str, ...]:
        """Name of each column of x."""
        return self._schema.x_names

    @property
    def y_name(self) -> str:
        """Name of the target; of several, with commas."""
        return ", ".join(self._schema.y)

    @property
    def schema(self) -> TableSchema:
        """What the columns are; see the class for which tasks taught it."""
        return self._schema

    @property
    def standardizer(self) -> Standardizer | None:
        """Units of the batches; None for raw ones."""
        return self._standardizer

    @property
    def observations(self) -> Observations:
        """All observations in **raw** units, x ``[N, L, features]``, y and mask ``[N, L]``, on the CPU.

        L is the length of the longest task.
        """
        flat = self._encode(standard=False)
        position = torch.arange(max(self._lengths))
        mask = position < flat.lengths[:, None]
        rows = flat.starts[:, None] + torch.where(mask, position, 0)
        return Observations(flat.x[rows], flat.y[rows], mask, flat.w)

    def flat(self) -> Flat:
        """All rows one after the other in the units of the batches, on the CPU: x ``[R, F]``, y ``[R]``, w ``[N, W]``.

        Starts and lengths of the tasks are there too. Errors are those of :meth:`all` but for short tasks.
        """
        return self._flat(torch.device("cpu"))

    # -- units --------------------------------------------------------------------------------------------------------

    def fit_standardizer(self) -> Standardizer:
        """Mean and standard deviation of x, w and y over all observations of all tasks of this table (w: over tasks).

        Fit it on the training table alone and give it to the others with :meth:`with_standardizer`. It brings the
        table's :attr:`schema` along. Categories, flags, indicators, the exposure, counts and classes are left alone,
        and an input that is constant keeps scale 1.

        Raises:
            DataError: for a target that is the same everywhere (there is nothing to learn), or an input without any
                value.
        """
        return fit_standardizer(self._rows, self._schema, self.dtype)

    def with_standardizer(self, standardizer: Standardizer | None) -> TableTasks:
        """The same table sampled in the units of ``standardizer``, with its schema; None for raw units.

        Raises:
            ShapeError: for a standardizer of other columns.
        """
        return self._like(self._rows, standardizer=standardizer)

    def with_schema(self, schema: TableSchema) -> TableTasks:
        """The same table in raw units with the categories, classes and indicators of another table's schema.

        Raises:
            ShapeError: for a schema of other columns.
        """
        return self._like(self._rows, standardizer=None, schema=schema)

    # -- parts --------------------------------------------------------------------------------------------------------

    def subset(self, tasks: Sequence[str] | Sequence[int] | Tensor) -> TableTasks:
        """A table of some of the tasks, in the order given, with a copy of their raw data and the same standardizer.

        Where the table has neither a standardizer nor a schema that it was given, the part learns its own schema.

        Args:
            tasks: names, or rows of the table counted from 0 (negative ones from the end), or a boolean mask ``[N]``.

        Raises:
            DataError: for a name or row that the table does not have, or one given twice.
            EmptyTaskError: for none.
        """
        index = self._index(tasks)
        if len(index) == 0:
            raise EmptyTaskError("A subset of no task was asked for; expected at least one.")
        if len(set(index)) < len(index):
            twice = next(self.names[i] for i in index if index.count(i) > 1)
            raise DataError(f"Task {twice!r} is given twice; a subset holds a task once.")
        return self._like(self._rows.tasks(torch.tensor(index)), standardizer=self._standardizer, part=True)

    def split(self, sizes: Sequence[int] | Sequence[float], seed: Seed = 0) -> list[TableTasks]:
        """Random disjoint tables; what is left over belongs to none.

        Args:
            sizes: numbers of tasks; or fractions below 1 of all tasks, each rounded so that the sum is right.
            seed: of the shuffle.

        Raises:
            OptionError: for sizes below 1, more tasks than there are, or a fraction of no task at all.
        """
        counts = split_sizes(sizes, self.num_tasks)
        generator = as_generator(seed, stream="split")
        shuffled = torch.randperm(self.num_tasks, generator=generator, device=generator.device).cpu()
        return [self.subset(part) for part in shuffled[: sum(counts)].split(counts)]

    # -- batches ------------------------------------------------------------------------------------------------------

    def sample(self, num_tasks: int, *, support: int, query: int | None = None, generator: Seed = None) -> TaskBatch:
        """Draw tasks, and a support and a query for each.

        Args:
            num_tasks: tasks to draw, without replacement; with replacement where the table has fewer.
            support: observations in each support.
            query: observations in each query, a random choice among those left; None for all of them. The query is
                sorted as the table is, padded and masked where a task has fewer.
            generator: generator or seed; None means seed 0. The batch is on its device.

        Raises:
            EmptyTaskError: naming a task with fewer than ``support + 1`` observations.
            OptionError: for numbers out of range.
        """
        return self.sample_part(slice, num_tasks, support=support, query=query, generator=generator)

    def sample_part(
        self,
        part: Callable[[int], slice],
        num_tasks: int,
        *,
        support: int,
        query: int | None = None,
        generator: Seed = None,
    ) -> TaskBatch:
        """Some tasks of the batch that :meth:`sample` would draw; the rows of the others are not looked up.

        Args:
            part: says of the number of tasks which ones; one rank of several has a part of its own.
            num_tasks, support, query, generator: as of :meth:`sample`, which leaves the generator in the same state.
        """
        self._check(support, query)
        if num_tasks < 1:
            raise OptionError(f"num_tasks={num_tasks}; expected at least 1.")
        generator = as_generator(generator, stream="tasks")
        device = generator.device
        if num_tasks <= self.num_tasks:
            task_id = torch.randperm(self.num_tasks, generator=generator, device=device)[:num_tasks]
        else:
            task_id = torch.randint(self.num_tasks, (num_tasks,), generator=generator, device=device)
        index = task_id.tolist()
        lengths = [self._lengths[i] for i in index]
        left, shuffle = max(lengths) - support, query is not None
        width = left if query is None else min(query, left)
        positions = draw(lengths, support, width, self.order, shuffle=shuffle, generator=generator)
        own = part(num_tasks)
        return self._gather(task_id[own], index[own], *(p[own] for p in positions), in_order=not shuffle)

    def all(self, *, support: int, query: int | None = None) -> TaskBatch:
        """Every task in table order, with nothing random: what evaluation uses.

        Args:
            support: the first ``support`` observations of each task.
            query: the first ``query`` of those that come after; None for all of them. Padded and masked where a
                task has fewer.

        Returns:
            A batch on the CPU, padded to the longest task.

        Raises:
            EmptyTaskError: naming a task with fewer than ``support + 1`` observations.
            OptionError: for numbers out of range.
        """
        self._check(support, query)
        left = max(self._lengths) - support
        width = left if query is None else min(query, left)
        task_id = torch.arange(self.num_tasks)
        position = torch.arange(support + width).expand(self.num_tasks, -1)
        return self._gather(task_id, task_id.tolist(), position[:, :support], position[:, support:], in_order=True)

    def __repr__(self) -> str:
        low, high = min(self._lengths), max(self._lengths)
        units = "raw" if self._standardizer is None else "standard"
        return (
            f"TableTasks({self.num_tasks} tasks of {low}–{high} observations, {self.y_name} given "
            f"{', '.join(self.x_names)}, order={self.order!r}, {units} units)"
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _like(
        self,
        rows: Rows,
        *,
        standardizer: Standardizer | None,
        schema: TableSchema | None = None,
        part: bool = False,
    ) -> TableTasks:
        return TableTasks(
            rows,
            self._roles,
            order=self.order,
            standardizer=standardizer,
            schema=schema if schema is not None else self._schema if self._given else None,
            dtype=self.dtype,
            part=part or self._part,
        )

    def _index(self, tasks: Sequence[str] | Sequence[int] | Tensor) -> list[int]:
        if isinstance(tasks, Tensor) and tasks.dtype == torch.bool:
            tasks = tasks.nonzero().flatten()
        given: list[Any] = tasks.tolist() if isinstance(tasks, Tensor) else list(tasks)
        row_of = {name: i for i, name in enumerate(self.names)}
        index = []
        for key in given:
            row = row_of.get(key) if isinstance(key, str) else int(key)
            if row is None or not -self.num_tasks <= row < self.num_tasks:
                raise DataError(
                    f"The table has no task {key!r}; it has {self.num_tasks}: {', '.join(self.names[:5])}"
                    f"{', …' if self.num_tasks > 5 else ''}."
                )
            index.append(row % self.num_tasks)
        return index

    def _check(self, support: int, query: int | None) -> None:
        if support < 0 or (query is not None and query < 0):
            raise OptionError(f"support={support} and query={query}; expected at least 0 (or None for the query).")
        least = support + (0 if query == 0 else 1)
        lowest = self._lengths[self._shortest]
        if lowest < least:
            short = sum(length < least for length in self._lengths)
            raise EmptyTaskError(
                f"Task {self.names[self._shortest]!r} has {lowest} observation(s), but {support} for the support and "
                f"at least {least - support} for the query were asked for ({short} of {self.num_tasks} tasks are too "
                "short). Ask for a smaller support, or leave such tasks out with table.subset()."
            )

    def _encode(self, *, standard: bool) -> Flat:
        """x, y and w of all rows on the CPU."""
        if self._part and not self._given and self._schema.learned:
            raise DataError(
                "This table is a part of a larger one, and which categories, classes or gaps there are is learned on "
                "the training part. Give each part train.fit_standardizer() by with_standardizer(…); or, to stay in "
                "raw units, train.schema by with_schema(…)."
            )
        return encode(self._rows, self._schema, self._standardizer, self.dtype, standard=standard)

    def _flat(self, device: torch.device) -> Flat:
        """The whole table on a device in the units of the batches, made once."""
        if device not in self._on_device:
            flat = self._encode(standard=True)
            moved = {k: v.to(device) for k, v in vars(flat).items() if v is not None}
            self._on_device[device] = Flat(**{**vars(flat), **moved})
        return self._on_device[device]

    def _gather(
        self, task_id: Tensor, index: list[int], support: Tensor, query: Tensor, *, in_order: bool
    ) -> TaskBatch:
        """Observations at positions ``[tasks, shots]``; of the query, the first ``length - support`` are real."""
        flat = self._flat(task_id.device)
        left = flat.lengths[task_id, None] - support.shape[1]
        mask = torch.arange(query.shape[1], device=query.device) < left
        # Padding goes to the end and becomes a copy of the first real query observation.
        if not in_order:
            query = query.masked_fill(~mask, torch.iinfo(torch.int64).max).sort(-1).values
        first = torch.where(left > 0, query[:, :1], 0) if query.shape[1] else query
        query = torch.where(mask, query, first)
        ragged = self._lengths[self._shortest] - support.shape[1] < query.shape[1]
        start = flat.starts[task_id, None]
        support, query = start + support, start + query
        w = None if flat.w is None else flat.w[task_id]
        return TaskBatch(
            support=Observations(flat.x[support], flat.y[support], None, w),
            query=Observations(flat.x[query], flat.y[query], mask if ragged else None, w),
            task_id=task_id,
            names=tuple(self.names[i] for i in index),
            population=self.num_tasks,
            standardizer=flat.standardizer,
        )
