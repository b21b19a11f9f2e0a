"""A Gaussian forecast in the shape of a posterior, so that baselines are scored by the same code as methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from bayesmeta.data import Observations
from bayesmeta.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Forecast:
    """A Gaussian forecast of the query of each task, float64, in the units of y; ``bm.scores`` takes it.

    Entries where the query is padding are finite and mean nothing.

    Attributes:
        mean: ``[tasks, query]``.
        scale: standard deviation of each observation (noise included), ``[tasks, query]``.
        covariance: joint covariance, ``[tasks, query, query]``.
    """

    mean: Tensor
    scale: Tensor
    covariance: Tensor

    is_point = False
    num_draws = None
    target_kind = "real"

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return self.mean.shape[0]

    @property
    def support(self) -> Observations:
        """Empty observations on the forecast's device: a forecast keeps no data."""
        return Observations(torch.zeros(self.num_tasks, 0, 1, device=self.mean.device))

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The forecast as a distribution; x must be the query that it was made for.

        Raises:
            ShapeError: for another number of points.
        """
        shots = x.shots if isinstance(x, Observations) else x.shape[1]
        if shots != self.mean.shape[1]:
            raise ShapeError(f"The forecast is of {self.mean.shape[1]} points a task; {shots} were asked for.")
        if not joint:
            return Normal(self.mean, self.scale)
        return MultivariateNormal(self.mean, self.covariance)
