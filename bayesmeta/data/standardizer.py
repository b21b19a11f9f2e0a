"""Units: what the training tasks teach of means and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data.observations import Observations, shape_of
from bayesmeta.errors import DataError, ShapeError


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
                f"{name} has shape {shape_of(given)}; this standardizer is for {name} of width {len(mean)}, the "
                "columns of the training table in their order."
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
