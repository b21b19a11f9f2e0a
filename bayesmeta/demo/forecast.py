"""Gaussian forecasts of the query in raw units, and their scores with standard errors over tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, ShapeError

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Forecast:
    """A Gaussian forecast of the query of each task, float64, in the units of y.

    Entries where the query is padding are finite and mean nothing.

    Attributes:
        mean: ``[tasks, query]``.
        scale: standard deviation of each observation (noise included), ``[tasks, query]``.
        covariance: joint covariance, ``[tasks, query, query]``; None where only the margins are given.
    """

    mean: Tensor
    scale: Tensor
    covariance: Tensor | None = None


class Estimate(NamedTuple):
    """A mean over tasks and its standard error over tasks."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class ForecastScores:
    """Scores of a forecast. Units are those of y, except for ``nll`` (nats an observation) and the coverages.

    Attributes:
        rmse: square root of the mean squared error over all observations.
        nll: negative log density of an observation under its marginal forecast.
        crps: continuous ranked probability score of an observation.
        coverage50, coverage90: share of observations inside the central 50 % and 90 % intervals.
    """

    rmse: Estimate
    nll: Estimate
    crps: Estimate
    coverage50: Estimate
    coverage90: Estimate


def gaussian_crps(mean: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """CRPS of Gaussian forecasts in closed form (Gneiting & Raftery 2007, JASA 102:359–378, eq. 21, sign turned).

    https://doi.org/10.1198/016214506000001437

    Args:
        mean, scale, y: tensors of shapes that broadcast.

    Returns:
        The score, smaller is better, in the units of y.
    """
    z = (y - mean) / scale
    density = torch.exp(-0.5 * (z.square() + _LOG_2PI))
    return scale * (z * torch.special.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


def score_forecast(forecast: Forecast, query: Observations) -> ForecastScores:
    """Score a forecast against what happened.

    NLL, CRPS and coverages are means over tasks of the means over each task's real observations, with the standard
    error of that mean over tasks. The RMSE is the root of the mean over all real observations, and its standard
    error is by the delta method for a ratio of means over tasks (Cochran 1977, Sampling Techniques, eq. 6.13).

    Args:
        forecast: mean and scale ``[tasks, query]``.
        query: the observations, in the same units; padding does not count.

    Raises:
        ShapeError: if the shapes differ.
        DataError: if the query has no targets or a task no query.
    """
    if query.y is None:
        raise DataError("The query has no targets; scoring a forecast needs what happened.")
    if forecast.mean.shape != query.y.shape or forecast.scale.shape != query.y.shape:
        raise ShapeError(
            f"The forecast has mean {list(forecast.mean.shape)} and scale {list(forecast.scale.shape)}; expected "
            f"{list(query.y.shape)}, as the query's y."
        )
    mask, y = query.full_mask(), query.y.to(forecast.mean)
    counts = mask.sum(-1).double()
    if bool((counts == 0).any()):
        raise DataError(f"Task {int((counts == 0).nonzero()[0])} (counted from 0) has no query to score; drop it.")

    def per_task(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum(-1) / counts

    z = (y - forecast.mean) / forecast.scale
    nll = 0.5 * (z.square() + _LOG_2PI) + forecast.scale.log()
    covered = [per_task((z.abs() <= quantile).double()) for quantile in (0.6744897501960817, 1.6448536269514722)]
    return ForecastScores(
        rmse=_rmse(torch.where(mask, (y - forecast.mean).square(), 0.0).sum(-1), counts),
        nll=_estimate(per_task(nll)),
        crps=_estimate(per_task(gaussian_crps(forecast.mean, forecast.scale, y))),
        coverage50=_estimate(covered[0]),
        coverage90=_estimate(covered[1]),
    )


def _estimate(values: Tensor) -> Estimate:
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
    return Estimate(float(values.mean()), float(error))


def _rmse(squared: Tensor, counts: Tensor) -> Estimate:
    mse = squared.sum() / counts.sum()
    influence = (squared - mse * counts) / counts.mean()
    rmse = mse.sqrt()
    return Estimate(float(rmse), _estimate(influence).standard_error / max(2 * float(rmse), 1e-300))
