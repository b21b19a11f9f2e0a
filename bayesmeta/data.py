"""What every room speaks of: observations, task batches, and how they are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import DataError, DeviceMismatchError, EmptyTaskError, NonFiniteDataError, ShapeError


@dataclass(frozen=True, eq=False)
class Observations:
    """Observations of several tasks, padded to one length.

    Attributes:
        x: inputs, ``[tasks, shots, features]``.
        y: targets, ``[tasks, shots]``, or ``[tasks, shots, outputs]`` for several outputs; None where unknown.
        mask: ``[tasks, shots]``, True where an observation is real; None means that all are. Entries that are
            padding must hold finite values (a masked NaN has a finite value but a NaN gradient):
            :func:`collate` pads with a copy of a real observation.
        w: task-level covariates, ``[tasks, covariates]``, for p(φ | θ, w).

    Raises:
        ShapeError: if the shapes do not fit together.
        DeviceMismatchError: if the tensors live on different devices.
    """

    x: Tensor
    y: Tensor | None = None
    mask: Tensor | None = None
    w: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("x", "y", "mask", "w"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and not (value is None and name != "x"):
                raise DataError(
                    f"{name} is a {type(value).__name__}; expected a torch tensor (torch.as_tensor({name}))."
                )
        if self.x.dim() != 3:
            raise ShapeError(
                f"x has shape {_shape(self.x)}; expected [tasks, shots, features]. "
                "A single feature still needs its own dimension: use x.unsqueeze(-1)."
            )
        lead = self.x.shape[:2]
        if self.y is not None and (self.y.dim() not in (2, 3) or self.y.shape[:2] != lead):
            raise ShapeError(
                f"y has shape {_shape(self.y)} beside x of shape {_shape(self.x)}; expected [tasks, shots] or "
                "[tasks, shots, outputs] with the same tasks and shots."
            )
        if self.y is not None and self.y.dim() == 3 and self.y.shape[-1] == 1:
            raise ShapeError(
                f"y has shape {_shape(self.y)}; a single output is written [tasks, shots]: use y.squeeze(-1)."
            )
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape != lead):
            raise ShapeError(
                f"mask has shape {_shape(self.mask)} and dtype {self.mask.dtype}; expected a bool tensor of shape "
                f"{list(lead)}, True where an observation is real."
            )
        if self.w is not None and (self.w.dim() != 2 or self.w.shape[0] != lead[0]):
            raise ShapeError(
                f"w has shape {_shape(self.w)}; expected [tasks, covariates] with {lead[0]} tasks, as in x."
            )
        for name in ("y", "mask", "w"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.x.device:
                raise DeviceMismatchError(
                    f"x is on {self.x.device} but {name} is on {tensor.device}; move both to one device with .to()."
                )

    @property
    def num_tasks(self) -> int:
        """Number of tasks, padding included."""
        return self.x.shape[0]

    @property
    def shots(self) -> int:
        """Length to which each task is padded."""
        return self.x.shape[1]

    @property
    def num_features(self) -> int:
        """Width of x."""
        return self.x.shape[2]

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.x.device

    def full_mask(self) -> Tensor:
        """The mask as a tensor, ``[tasks, shots]``, all True where there is none."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device)

    def counts(self) -> Tensor:
        """Real observations of each task, ``[tasks]``, in the dtype of x."""
        if self.mask is None:
            return torch.full((self.num_tasks,), float(self.shots), dtype=self.x.dtype, device=self.x.device)
        return self.mask.sum(-1).to(self.x.dtype)

    def _map(self, function: Any) -> Observations:
        parts: dict[str, Any] = {k: None if v is None else function(v) for k, v in vars(self).items()}
        return Observations(**parts)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Observations:
        """Move to a device and cast floating tensors to a dtype (integers and masks keep theirs)."""
        return self._map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def tasks(self, index: Tensor | slice | Sequence[int]) -> Observations:
        """The tasks named by an index along the task dimension."""
        index = index if isinstance(index, slice | Tensor) else torch.as_tensor(index, device=self.device)
        return self._map(lambda t: t[index])

    def points(self, index: slice) -> Observations:
        """Some of the observations of every task; ``slice(0)`` for the same tasks without any."""
        y, mask = (None if part is None else part[:, index] for part in (self.y, self.mask))
        return replace(self, x=self.x[:, index], y=y, mask=mask)

    def with_y(self, y: Tensor | None) -> Observations:
        """The same inputs with other targets."""
        return replace(self, y=y)

    def check(self) -> Observations:
        """Check that all that counts is finite, and so is the padding.

        Returns:
            The observations themselves.

        Raises:
            NonFiniteDataError: naming the first task and shot at fault.
        """
        for name in ("x", "y", "w"):
            tensor = getattr(self, name)
            if tensor is None or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
                continue
            task, *rest = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            where = f"task {task}" if name == "w" else f"task {task}, shot {rest[0]}"
            padding = name != "w" and self.mask is not None and not bool(self.mask[task, rest[0]])
            advice = (
                "It is padding, but a masked NaN still gives NaN gradients: pad with a copy of a real observation, "
                "as bayesmeta.collate does."
                if padding
                else "Drop the observation or mask it (see bayesmeta.collate)."
            )
            raise NonFiniteDataError(f"{name} is not finite at {where} (counted from 0). {advice}")
        return self


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def union(first: Observations, second: Observations) -> Observations:
    """Both sets of observations of the same tasks, side by side along the shots.

    Raises:
        ShapeError: if the tasks, features or outputs differ.
        DataError: if only one of them has targets.
    """
    if first.num_tasks != second.num_tasks or first.num_features != second.num_features:
        raise ShapeError(
            f"x has shapes {_shape(first.x)} and {_shape(second.x)}; both need the same tasks and features."
        )
    if (first.y is None) != (second.y is None):
        raise DataError("Only one of the two sets of observations has targets; give y to both or to neither.")
    y = None if first.y is None or second.y is None else torch.cat([first.y, second.y], 1)
    both_full = first.mask is None and second.mask is None
    mask = None if both_full else torch.cat([first.full_mask(), second.full_mask()], 1)
    return Observations(torch.cat([first.x, second.x], 1), y, mask, first.w if first.w is not None else second.w)


def collate(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor] | None = None,
    *,
    w: Tensor | None = None,
    shots: int | None = None,
) -> Observations:
    """Pad tasks of different lengths to one.

    Args:
        xs: for each task ``[shots_i, features]``.
        ys: for each task ``[shots_i]`` or ``[shots_i, outputs]``.
        w: task-level covariates, ``[tasks, covariates]``.
        shots: pad to this length; by default that of the longest task.

    Returns:
        Observations padded with copies of each task's first row (zeros where a task has none); no mask where all
        tasks are of that length. Rows with a NaN in x or y are an error, not padding.

    Raises:
        ShapeError, EmptyTaskError, NonFiniteDataError: for lists that do not fit, no task at all, and NaN.
    """
    if len(xs) == 0:
        raise EmptyTaskError("No task was given to collate; expected at least one.")
    if ys is not None and len(ys) != len(xs):
        raise ShapeError(f"{len(xs)} tasks have x but {len(ys)} have y; give one of each for every task.")
    for i, (x, y) in enumerate(zip(xs, [None] * len(xs) if ys is None else ys, strict=True)):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor | None):
            raise ShapeError(
                f"collate takes a tensor x [shots, features] and a tensor y [shots] for each task; task {i} (counted "
                f"from 0) has {type(x).__name__} and {type(y).__name__}. Use torch.as_tensor(…)."
            )
        if y is not None and (x.dim() == 0 or y.dim() == 0 or len(x) != len(y)):
            raise ShapeError(
                f"Task {i} (counted from 0) has x of shape {list(x.shape)} and y of shape {list(y.shape)}; expected as "
                "many rows in both."
            )
    longest = max(len(x) for x in xs)
    shots = longest if shots is None else shots
    if shots < longest:
        raise ShapeError(f"shots={shots} is less than the longest task, which has {longest} observations.")
    lengths = torch.tensor([len(x) for x in xs])
    mask = torch.arange(shots) < lengths[:, None]
    x = torch.stack([_pad(x, shots, 0) for x in xs])
    y = None if ys is None else torch.stack([_pad(y, shots, 0) for y in ys])
    full = bool(mask.all())
    return Observations(x, y, None if full else mask.to(x.device), w).check()


def _pad(tensor: Tensor, shots: int, dim: int) -> Tensor:
    """Lengthen a dimension to ``shots`` with copies of its first entry (zeros where there is none)."""
    extra = shots - tensor.shape[dim]
    if extra == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = 1
    filler = tensor.narrow(dim, 0, 1) if tensor.shape[dim] else tensor.new_zeros(shape)
    return torch.cat([tensor, filler.repeat_interleave(extra, dim)], dim)


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Affine scaling of inputs, targets and covariates, learned on the training tasks alone and stored with the run.

    Attributes:
        x_mean, x_scale: ``[features]``.
        y_mean, y_scale: ``[]``, or ``[outputs]``.
        w_mean, w_scale: ``[covariates]``; None where there are none, or where they stay as they are.
        schema: the state of the schema of the table that it was learned on, plain values (see
            :class:`~bayesmeta.tasks.schema.TableSchema`): which categories there are, and what else only the
            training tasks can teach; None for a standardizer that comes from no table.
    """

    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor
    w_mean: Tensor | None = None
    w_scale: Tensor | None = None
    schema: dict[str, Any] | None = None

    def apply(self, observations: Observations) -> Observations:
        """Raw units to standard units.

        Raises:
            DataError: for anything but observations; a table has ``with_standardizer``.
            ShapeError: for observations of another width.
        """
        if not isinstance(observations, Observations):
            raise DataError(
                f"A standardizer applies to Observations; got {type(observations).__name__}. Apply it to support and "
                "query one by one, or use table.with_standardizer(…)."
            )
        y, w = observations.y, observations.w
        self._check_width("x", observations.x, self.x_mean)
        if self.w_mean is not None and self.w_scale is not None:
            if w is None:
                raise ShapeError(
                    f"The standardizer is for {len(self.w_mean)} task-level covariate(s); these observations have "
                    "none: give them w, [tasks, covariates], in raw units."
                )
            self._check_width("w", w, self.w_mean)
            w = (w - self.w_mean) / self.w_scale
        y = None if y is None else (y - self.y_mean) / self.y_scale
        return replace(observations, x=(observations.x - self.x_mean) / self.x_scale, y=y, w=w)

    def _check_width(self, name: str, given: Tensor, mean: Tensor) -> None:
        if given.shape[-1] != len(mean):
            raise ShapeError(
                f"{name} has shape {_shape(given)}; this standardizer is for {name} of width {len(mean)}, the columns "
                "of the training table in their order."
            )

    def raw_x(self, x: Tensor) -> Tensor:
        """Inputs back in raw units."""
        return x * self.x_scale + self.x_mean

    def raw_y(self, y: Tensor) -> Tensor:
        """Targets back in raw units."""
        return y * self.y_scale + self.y_mean

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Standardizer:
        """Move to a device and dtype."""
        moved: dict[str, Any] = {
            k: v.to(device=device, dtype=dtype) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def state(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Standardizer:
        """The inverse of :meth:`state`; ``w_mean``, ``w_scale`` and ``schema`` may be left out."""
        numbers = {k: torch.as_tensor(v) for k, v in state.items() if k != "schema" and v is not None}
        return cls(**numbers, schema=state.get("schema"))


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
                f"support has x of shape {_shape(self.support.x)} and query {_shape(self.query.x)}; "
                "both need the same tasks and features."
            )
        if self.query.device != self.support.device:
            raise DeviceMismatchError(f"support is on {self.support.device} but query is on {self.query.device}.")
        if self.task_id is not None and self.task_id.shape != (tasks,):
            raise ShapeError(f"task_id has shape {_shape(self.task_id)}; expected [{tasks}].")
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


def pad_shots(observations: Observations, shots: int) -> Observations:
    """Pad every task to ``shots`` with masked copies of its first row (zeros where there is none)."""
    extra = shots - observations.shots
    if extra == 0:
        return observations
    if extra < 0:
        raise ShapeError(f"shots={shots} is less than the {observations.shots} that each task already has.")
    mask = torch.cat([observations.full_mask(), observations.full_mask().new_zeros(observations.num_tasks, extra)], 1)
    y = None if observations.y is None else _pad(observations.y, shots, 1)
    return Observations(_pad(observations.x, shots, 1), y, mask, observations.w)
