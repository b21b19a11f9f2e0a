"""Tasks from a table: one row an observation, one group of rows a task, everything sampled by tensor indexing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations, Standardizer, TaskBatch
from bayesmeta.errors import DataError, EmptyTaskError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.tasks.frames import read_frame

if TYPE_CHECKING:
    import pandas as pd

#: Which observations of a task become its support; see :class:`TableTasks`.
Order = Literal["first", "random", "mixed"]


@dataclass(frozen=True, eq=False)
class _Block:
    """All tasks padded to one length: x ``[N, L, F]``, y ``[N, L]``, lengths ``[N]`` (int64)."""

    x: Tensor
    y: Tensor
    lengths: Tensor


class TableTasks:
    """A finite table of tasks (countries, patients, machines) as a task distribution.

    The support of a task is, by ``order``:

    - ``"first"``: its first observations (the earliest ones: rows are sorted by the first input);
    - ``"random"``: a uniformly random subset of them;
    - ``"mixed"``: each task flips a fair coin between the two, so that one model learns to forecast and to fill in.

    The query is drawn from all the other observations; with ``"first"`` these are those that come after. Raw data are
    kept; where the table has a standardizer, batches are in standard units and carry it.

    Build one with :meth:`from_dataframe`.

    Args:
        x: inputs in raw units, ``[tasks, rows, features]``; a task's own rows come first, then finite padding.
        y: targets in raw units, ``[tasks, rows]``.
        lengths: how many rows of each task are real, int64 ``[tasks]``.
        names: one for each task.
        order: see above.
        standardizer: units of the batches; None for raw ones.
        x_names: names of the inputs, ``features`` of them.
        y_name: name of the target.

    Raises:
        OptionError: for an unknown order.
        ShapeError: for a standardizer of another width.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        lengths: Tensor,
        names: Sequence[str],
        *,
        order: Order = "random",
        standardizer: Standardizer | None = None,
        x_names: Sequence[str] = ("x",),
        y_name: str = "y",
    ) -> None:
        if order not in get_args(Order):
            raise OptionError(f"order={order!r} is not known; expected one of {', '.join(get_args(Order))}.")
        if standardizer is not None and standardizer.x_mean.shape != x.shape[-1:]:
            raise ShapeError(
                f"The standardizer is for x of shape {list(standardizer.x_mean.shape)}; the table has "
                f"{x.shape[-1]} input(s): {', '.join(x_names)}. Fit one with table.fit_standardizer()."
            )
        self._raw = _Block(x, y, lengths)
        self._lengths: list[int] = lengths.tolist()
        self._names = tuple(names)
        self._standardizer = standardizer
        self._on_device: dict[torch.device, tuple[_Block, Standardizer | None]] = {}
        self.order = order
        self.x_names = tuple(x_names)
        self.y_name = y_name

    @classmethod
    def from_dataframe(
        cls,
        frame: pd.DataFrame,
        *,
        task: str,
        x: Sequence[str],
        y: str,
        order: Order = "random",
        standardizer: Standardizer | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TableTasks:
        """Read a DataFrame in long format, one row an observation.

        Args:
            frame: the table; its index is ignored. Tasks keep the order in which they first appear, and rows theirs
                within a task, except that ``"first"`` and ``"mixed"`` sort them (stably) by the first input.
            task: column that says which task a row belongs to.
            x: input columns.
            y: target column. Rows where it is missing are dropped, and so is a task that has no other row.
            order: see the class.
            standardizer: units of the batches; see :meth:`fit_standardizer`.
            dtype: of x and y.

        Raises:
            DataError: for an unknown, repeated or non-numeric column, or a row without a task.
            NonFiniteDataError: for a missing or infinite input, or an infinite target, naming column and task.
            EmptyTaskError: if no row with a target is left.
        """
        values, lengths, names = read_frame(frame, task, x, y, dtype, by_time=order != "random")
        position = torch.arange(int(lengths.max()))
        start = lengths.cumsum(0) - lengths
        block = values[start[:, None] + torch.where(position < lengths[:, None], position, 0)]
        return cls(
            block[..., :-1].contiguous(),
            block[..., -1].contiguous(),
            lengths,
            names,
            order=order,
            standardizer=standardizer,
            x_names=x,
            y_name=y,
        )

    @property
    def num_tasks(self) -> int:
        """Number of tasks in the table (N)."""
        return len(self._names)

    @property
    def num_features(self) -> int:
        """Number of inputs."""
        return self._raw.x.shape[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each task, in table order."""
        return self._names

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of observations of each task."""
        return tuple(self._lengths)

    @property
    def standardizer(self) -> Standardizer | None:
        """Units of the batches; None for raw ones."""
        return self._standardizer

    @property
    def observations(self) -> Observations:
        """All observations in **raw** units, x ``[N, L, features]``, y and mask ``[N, L]``, on the CPU."""
        mask = torch.arange(self._raw.x.shape[1]) < self._raw.lengths[:, None]
        return Observations(self._raw.x, self._raw.y, mask)

    def fit_standardizer(self) -> Standardizer:
        """Mean and standard deviation of x and y over all observations of all tasks of this table.

        Fit it on the training table alone and give it to the others with :meth:`with_standardizer`. Something
        constant keeps scale 1.
        """
        data = self.observations
        real = data.full_mask()
        x, y = data.x[real].double(), self._raw.y[real].double()
        parts = {"x_mean": x.mean(0), "x_scale": x.std(0, correction=0)}
        parts |= {"y_mean": y.mean(0), "y_scale": y.std(0, correction=0)}
        for key in ("x_scale", "y_scale"):
            parts[key] = torch.where(parts[key] > 0, parts[key], 1.0)
        return Standardizer(**{k: v.to(self._raw.x.dtype) for k, v in parts.items()})

    def with_standardizer(self, standardizer: Standardizer | None) -> TableTasks:
        """The same table sampled in the units of ``standardizer``; None for raw units.

        Raises:
            ShapeError: for a standardizer of another width.
        """
        return self._like(self._raw, self._names, standardizer)

    def subset(self, tasks: Sequence[str] | Sequence[int] | Tensor) -> TableTasks:
        """A table of some of the tasks, in the order given, with the same raw data and standardizer.

        Args:
            tasks: names, or rows of the table counted from 0 (negative ones from the end), or a boolean mask ``[N]``.

        Raises:
            DataError: for a name or row that the table does not have, or one given twice.
            EmptyTaskError: for none.
        """
        index = self._rows(tasks)
        if len(index) == 0:
            raise EmptyTaskError("A subset of no task was asked for; expected at least one.")
        if len(set(index)) < len(index):
            twice = next(self._names[i] for i in index if index.count(i) > 1)
            raise DataError(f"Task {twice!r} is given twice; a subset holds a task once.")
        rows = torch.tensor(index)
        longest = max(self._lengths[i] for i in index)
        block = _Block(self._raw.x[rows, :longest], self._raw.y[rows, :longest], self._raw.lengths[rows])
        return self._like(block, [self._names[i] for i in index], self._standardizer)

    def split(self, sizes: Sequence[int], seed: Seed = 0) -> list[TableTasks]:
        """Random disjoint tables of ``sizes`` tasks; what is left over belongs to none.

        Raises:
            OptionError: for sizes below 1 or more tasks than there are.
        """
        if any(size < 1 for size in sizes) or sum(sizes) > self.num_tasks:
            raise OptionError(
                f"sizes={list(sizes)} add up to {sum(sizes)}; expected sizes of at least 1 that add up to at most "
                f"the {self.num_tasks} tasks of the table."
            )
        generator = as_generator(seed, stream="split")
        shuffled = torch.randperm(self.num_tasks, generator=generator, device=generator.device).cpu()
        return [self.subset(part) for part in shuffled[: sum(sizes)].split(list(sizes))]

    def sample(self, num_tasks: int, *, support: int, query: int | None = None, generator: Seed = None) -> TaskBatch:
        """Draw tasks, and a support and a query for each.

        Args:
            num_tasks: tasks to draw, without replacement; with replacement where the table has fewer.
            support: observations in each support.
            query: observations in each query, a random choice among those left; None for all of them. The query is
                at most as long as the longest task leaves, and a task with fewer left is padded and masked.
            generator: generator or seed; the batch lives on its device.

        Returns:
            A batch whose ``task_id`` are rows of the table. Observations stand in table order in both sets.

        Raises:
            EmptyTaskError: naming a task with fewer than ``support + 1`` observations.
            OptionError: for numbers out of range.
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
        chosen, rest = self._draw(task_id, support, query is not None, generator)
        return self._gather(task_id, chosen, rest[:, : self._width(support, query)])

    def all(self, *, support: int, query: int | None = None) -> TaskBatch:
        """Every task in table order, with nothing random: what evaluation uses.

        Args:
            support: the first ``support`` observations of each task.
            query: the first ``query`` of those that come after; None for all of them. Padded and masked where a
                task has fewer.

        Returns:
            A batch on the CPU.

        Raises:
            EmptyTaskError: naming a task with fewer than ``support + 1`` observations.
            OptionError: for numbers out of range.
        """
        self._check(support, query)
        task_id = torch.arange(self.num_tasks)
        position = torch.arange(support + self._width(support, query)).expand(self.num_tasks, -1)
        return self._gather(task_id, position[:, :support], position[:, support:])

    def __repr__(self) -> str:
        low, high = min(self._lengths), max(self._lengths)
        units = "raw" if self._standardizer is None else "standard"
        return (
            f"TableTasks({self.num_tasks} tasks of {low}–{high} observations, {self.y_name} given "
            f"{', '.join(self.x_names)}, order={self.order!r}, {units} units)"
        )

    def _like(self, block: _Block, names: Sequence[str], standardizer: Standardizer | None) -> TableTasks:
        options: dict[str, Any] = {"order": self.order, "x_names": self.x_names, "y_name": self.y_name}
        return TableTasks(block.x, block.y, block.lengths, names, standardizer=standardizer, **options)

    def _rows(self, tasks: Sequence[str] | Sequence[int] | Tensor) -> list[int]:
        if isinstance(tasks, Tensor) and tasks.dtype == torch.bool:
            tasks = tasks.nonzero().flatten()
        given: list[Any] = tasks.tolist() if isinstance(tasks, Tensor) else list(tasks)
        row_of = {name: i for i, name in enumerate(self._names)}
        index = []
        for key in given:
            row = row_of.get(key) if isinstance(key, str) else int(key)
            if row is None or not -self.num_tasks <= row < self.num_tasks:
                raise DataError(
                    f"The table has no task {key!r}; it has {self.num_tasks}: {', '.join(self._names[:5])}"
                    f"{', …' if self.num_tasks > 5 else ''}."
                )
            index.append(row % self.num_tasks)
        return index

    def _check(self, support: int, query: int | None) -> None:
        if support < 0 or (query is not None and query < 0):
            raise OptionError(f"support={support} and query={query}; expected at least 0 (or None for the query).")
        least = support + (0 if query == 0 else 1)
        shortest = min(range(self.num_tasks), key=self._lengths.__getitem__)
        if self._lengths[shortest] < least:
            short = sum(length < least for length in self._lengths)
            raise EmptyTaskError(
                f"Task {self._names[shortest]!r} has {self._lengths[shortest]} observation(s), but {support} for the "
                f"support and at least {least - support} for the query were asked for ({short} of {self.num_tasks} "
                "tasks are too short). Ask for a smaller support, or leave such tasks out with table.subset()."
            )

    def _width(self, support: int, query: int | None) -> int:
        left = max(self._lengths) - support
        return left if query is None else min(query, left)

    def _block(self, device: torch.device) -> tuple[_Block, Standardizer | None]:
        """The whole table on a device in the units of the batches, made once."""
        if device not in self._on_device:
            raw, standardizer = self._raw, self._standardizer
            scaled = Observations(raw.x, raw.y)
            if standardizer is not None:
                standardizer = standardizer.to("cpu", raw.x.dtype)
                scaled, standardizer = standardizer.apply(scaled), standardizer.to(device)
            scaled = scaled.to(device)
            assert scaled.y is not None
            self._on_device[device] = replace(raw, x=scaled.x, y=scaled.y, lengths=raw.lengths.to(device)), standardizer
        return self._on_device[device]

    def _draw(self, task_id: Tensor, support: int, shuffle: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Positions of the support ``[tasks, support]``, and of the rest (then those of no use), shuffled or not."""
        lengths, device = self._block(task_id.device)[0].lengths[task_id, None], task_id.device
        position = torch.arange(self._raw.x.shape[1], device=device).expand(len(task_id), -1)
        in_order = position.double().masked_fill(position >= lengths, torch.inf)

        def random_key() -> Tensor:
            key = torch.rand(position.shape, generator=generator, device=device, dtype=torch.float64)
            return key.masked_fill(position >= lengths, torch.inf)

        key = in_order if self.order == "first" else random_key()
        if self.order == "mixed":
            forecast = torch.rand((len(task_id), 1), generator=generator, device=device) < 0.5
            key = torch.where(forecast, in_order, key)
        chosen = key.argsort(-1)[:, :support].sort(-1).values
        key = random_key() if shuffle else in_order
        return chosen, key.scatter(1, chosen, torch.inf).argsort(-1)

    def _gather(self, task_id: Tensor, support: Tensor, query: Tensor) -> TaskBatch:
        """Observations at positions ``[tasks, shots]``; of the query, the first ``length - support`` are real."""
        block, standardizer = self._block(task_id.device)
        left = block.lengths[task_id, None] - support.shape[1]
        mask = torch.arange(query.shape[1], device=query.device) < left
        # Padding goes to the end and becomes a copy of the first real query observation.
        query = query.masked_fill(~mask, block.x.shape[1]).sort(-1).values
        query = torch.where(mask, query, query[:, :1])
        ragged = min(self._lengths) - support.shape[1] < query.shape[1]
        rows = task_id[:, None]
        return TaskBatch(
            support=Observations(block.x[rows, support], block.y[rows, support]),
            query=Observations(block.x[rows, query], block.y[rows, query], mask if ragged else None),
            task_id=task_id,
            names=tuple(self._names[i] for i in task_id.tolist()),
            population=self.num_tasks,
            standardizer=standardizer,
        )
