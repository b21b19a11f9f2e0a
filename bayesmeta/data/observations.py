"""Observations of several tasks, padded to one length, and how they are put together."""

from __future__ import annotations

from collections.abc import Sequence
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
                f"x has shape {shape_of(self.x)}; expected [tasks, shots, features]. "
                "A single feature still needs its own dimension: use x.unsqueeze(-1)."
            )
        lead = self.x.shape[:2]
        if self.y is not None and (self.y.dim() not in (2, 3) or self.y.shape[:2] != lead):
            raise ShapeError(
                f"y has shape {shape_of(self.y)} beside x of shape {shape_of(self.x)}; expected [tasks, shots] or "
                "[tasks, shots, outputs] with the same tasks and shots."
            )
        if self.y is not None and self.y.dim() == 3 and self.y.shape[-1] == 1:
            raise ShapeError(
                f"y has shape {shape_of(self.y)}; a single output is written [tasks, shots]: use y.squeeze(-1)."
            )
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape != lead):
            raise ShapeError(
                f"mask has shape {shape_of(self.mask)} and dtype {self.mask.dtype}; expected a bool tensor of shape "
                f"{list(lead)}, True where an observation is real."
            )
        if self.w is not None and (self.w.dim() != 2 or self.w.shape[0] != lead[0]):
            raise ShapeError(
                f"w has shape {shape_of(self.w)}; expected [tasks, covariates] with {lead[0]} tasks, as in x."
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


def shape_of(tensor: Tensor) -> list[int]:
    """As a list, which messages show."""
    return list(tensor.shape)


def union(first: Observations, second: Observations) -> Observations:
    """Both sets of observations of the same tasks, side by side along the shots.

    Raises:
        ShapeError: if the tasks, features or outputs differ.
        DataError: if only one of them has targets.
    """
    if first.num_tasks != second.num_tasks or first.num_features != second.num_features:
        raise ShapeError(
            f"x has shapes {shape_of(first.x)} and {shape_of(second.x)}; both need the same tasks and features."
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
