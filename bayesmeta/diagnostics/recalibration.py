"""Recalibration after training: learn on validation tasks how far forecasts are off, and correct those of new tasks.

None changes φ or θ; each replaces the predictive F of a point by another, F̃. The tasks on which it is learned must be
new to the method, as those it is used on are: on training tasks forecasts look better than they are.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.diagnostics.conformal_sets import conformal_sets
from bayesmeta.diagnostics.corrections import (
    Conformal,
    Isotonic,
    Recalibration,
    Temperature,
    centre_of,
    inside,
    moments,
    weighted_quantile,
)
from bayesmeta.diagnostics.forecasts import Predictor, check_finite, task_names, valid_points
from bayesmeta.diagnostics.recalibrated import check_not_twice, class_log_likelihoods, normal_parts
from bayesmeta.diagnostics.recalibrated_counts import CountForecast, count_forecast, log_step
from bayesmeta.diagnostics.scores import log_density
from bayesmeta.errors import DataError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior

How = Literal["temperature", "isotonic", "conformal"]
_WORST = 50.0  # a temperature beyond this, or below one over it, is not looked for


@torch.no_grad()
def recalibrate(
    posterior: Posterior,
    batch: TaskBatch,
    how: How = "temperature",
    *,
    num_bins: int = 20,
    num_samples: int = 1000,
    generator: Seed = None,
) -> Recalibration:
    """Learn a correction of forecasts from validation tasks.

    Args:
        posterior: adapted to ``batch.support``, as those that are to be corrected.
        batch: validation tasks with a query, which the method was not trained on and no reported figure uses.
        how: ``"temperature"``, one factor on the spread that gives the best log score: for tens of tasks, any targets;
            ``"isotonic"``, a map of all quantiles: for hundreds of tasks, numbers and counts; ``"conformal"``,
            intervals with a guarantee, numbers and counts; of classes sets with a guarantee.
        num_bins: of ``"isotonic"`` and ``"conformal"``: pieces of the map.
        num_samples: draws, where there is no closed form.
        generator: generator or seed; None means seed 0.

    Returns:
        A :class:`Temperature`, :class:`Isotonic`, :class:`Conformal` or, of classes, :class:`ConformalSets`: call it on
        a posterior of new tasks.

    Raises:
        OptionError: for another ``how``, or fewer than 2 bins or draws.
        UnsupportedError: for an isotonic map of classes; for several outputs but with a temperature of numbers; for
            counts above 2000, and those that were recalibrated before, but with ``"conformal"``.
        DataError: for fewer than 2 tasks with a query, and for forecasts without any width.
        ShapeError, EmptyTaskError, NonFiniteDataError: as :func:`~bayesmeta.scores`.
    """
    if how not in ("temperature", "isotonic", "conformal"):
        raise OptionError(f"how={how!r}; expected 'temperature', 'isotonic' or 'conformal'.")
    if num_bins < 2:
        raise OptionError(f"num_bins={num_bins}; expected at least 2.")
    valid = valid_points(posterior, batch, "Recalibration needs")
    tasks = int(valid.any(-1).sum())
    if tasks < 2:
        raise DataError(f"Recalibration needs at least 2 tasks with a query; this batch has {tasks}.")
    kind = posterior.target_kind
    if kind == "class" and how == "isotonic":
        raise UnsupportedError("how='isotonic' is not for targets of kind 'class'; take 'temperature' or 'conformal'.")
    assert batch.query.y is not None
    if batch.query.y.dim() == 3 and (kind != "real" or how != "temperature"):
        raise UnsupportedError(f"how={how!r} of targets of kind {kind!r} is for one output; this y has several.")
    # all draws of a point are the same; but those of y are not
    predictor = Predictor(posterior, 2 if posterior.is_point and kind == "class" else num_samples, generator)
    if kind == "class":
        if how == "conformal":
            return conformal_sets(predictor, batch.query, valid)
        return Temperature(_class_temperature(predictor, batch.query, _weights(valid)), kind, tasks)
    if kind == "count" and how != "conformal":
        return _of_counts(predictor, batch.query, valid, how, num_bins, generator)
    return _of_numbers(predictor, batch, valid, how, num_bins, generator)


def _of_counts(
    predictor: Predictor, query: Observations, valid: Tensor, how: How, num_bins: int, generator: Seed
) -> Recalibration:
    check_not_twice(predictor.posterior)
    assert query.y is not None
    table = count_forecast(predictor.posterior, query, predictor.draws, predictor.log_likelihood)
    if how == "temperature":
        return Temperature(_count_temperature(table, query, _weights(valid)), "count", int(valid.any(-1).sum()))
    pit = table.pit(query.y.double(), _uniform(query, generator))
    return _isotonic(pit, valid, num_bins, "count")


def _of_numbers(
    predictor: Predictor, batch: TaskBatch, valid: Tensor, how: How, num_bins: int, generator: Seed
) -> Recalibration:
    kind, query = predictor.posterior.target_kind, batch.query
    assert query.y is not None
    mean, scale = moments(predictor, query)
    for moment, what in ((mean, "predictive mean"), (scale, "width of the predictive")):
        check_finite(moment, valid, what, task_names(batch))
    keep = valid if scale.dim() == 2 else valid.unsqueeze(-1)
    if bool(((scale <= 0) & keep).any()):
        raise DataError("Some forecasts have no width at all, which no factor can widen. Give the likelihood noise.")
    if how == "temperature":
        value = _temperature(predictor, query, _weights(valid), mean, scale)
        return Temperature(value, kind, int(valid.any(-1).sum()))
    if how == "isotonic":
        pit = predictor.forecast(query).pit(query.y.double(), _uniform(query, generator))
        return _isotonic(pit, valid, num_bins, kind)
    return _conformal(query, valid, mean, scale, num_bins, kind)


# -- fits ---------------------------------------------------------------------------------------------------------


def _weights(valid: Tensor) -> Tensor:
    """1 / (tasks · points of the task) where valid, float64: all tasks count alike."""
    return valid.double() / valid.sum(-1, keepdim=True).clamp(min=1) / valid.any(-1).sum()


def _temperature(predictor: Predictor, query: Observations, weight: Tensor, mean: Tensor, scale: Tensor) -> float:
    assert query.y is not None
    y = query.y.double()
    if normal_parts(predictor.posterior, query) is not None:  # log τ + z² / (2 τ²) is least at τ² = mean z²
        square = ((y - mean) / scale).square()
        square = square if square.dim() == 2 else square.mean(-1)
        return float(torch.where(weight > 0, weight * square, 0.0).sum().sqrt().clamp(1 / _WORST, _WORST))
    outputs = 1 if y.dim() == 2 else y.shape[-1]
    keep = weight > 0

    # a mixture of draws has too thin tails, and a factor that is learned on it makes up for that
    closed = predictor.closed_form(query)
    centre = mean if closed is None else centre_of(closed)
    centre = mean if centre is None else centre.double().expand(mean.shape)

    def loss(log_value: float) -> float:
        before = (centre + (y - centre) / math.exp(log_value)).to(query.x.dtype)
        if closed is not None:
            point = log_density(closed, before)
        else:
            each = predictor.log_likelihood(query.with_y(before))
            point = each.logsumexp(0) - math.log(len(each))
        return outputs * log_value - float(torch.where(keep, weight * point, 0.0).sum())

    return math.exp(_minimum(loss))


def _count_temperature(table: CountForecast, query: Observations, weight: Tensor) -> float:
    assert query.y is not None
    keep = weight > 0
    low, high = table.around(torch.where(keep, query.y, 0))

    def loss(log_value: float) -> float:
        point = log_step(low / math.exp(log_value), high / math.exp(log_value))
        return -float(torch.where(keep, weight * point, 0.0).sum())

    return math.exp(_minimum(loss))


def _class_temperature(predictor: Predictor, query: Observations, weight: Tensor) -> float:
    assert query.y is not None
    y = torch.where(weight > 0, query.y, 0).long()
    log_p = class_log_likelihoods(predictor.posterior, query, predictor.draws)  # [n, classes, tasks, shots]
    index = y.expand(len(log_p), 1, *y.shape)

    def loss(log_value: float) -> float:
        each = (log_p / math.exp(log_value)).log_softmax(1).gather(1, index).squeeze(1)
        point = each.logsumexp(0) - math.log(len(each))
        return -float(torch.where(weight > 0, weight * point, 0.0).sum())

    return math.exp(_minimum(loss))


def _minimum(loss: Any) -> float:
    """Where a function of log τ is least: the best of a grid, then golden section around it, to 0.003."""
    end = math.log(_WORST)
    grid = torch.linspace(-end, end, 13).tolist()
    values = [loss(g) for g in grid]
    best = min(range(len(grid)), key=values.__getitem__)
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 3e-3:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return (low + high) / 2


def _uniform(query: Observations, generator: Seed) -> Tensor:
    """Of the PIT: numbers in (0, 1), in the shape of y."""
    assert query.y is not None
    generator = as_generator(generator, query.device, "PIT")
    return torch.rand(query.y.shape, generator=generator, dtype=torch.float64, device=query.device)


def _isotonic(pit: Tensor, valid: Tensor, num_bins: int, kind: str) -> Isotonic:
    pit = pit[valid]
    order = pit.argsort()
    share = _weights(valid)[valid][order].cumsum(0)
    levels = torch.linspace(0.0, 1.0, num_bins + 1, dtype=torch.float64, device=pit.device)[1:-1]
    inner = pit[order][torch.searchsorted(share, levels - 1e-12).clamp(max=len(pit) - 1)]
    old, new = torch.special.ndtri(inside(inner)), torch.special.ndtri(levels)
    # strictly increasing also where values are tied, so that R has an inverse
    old = torch.cat([old[:1], old[0] + old.diff().clamp(min=1e-6).cumsum(0)])
    return Isotonic(_with_tails(old), _with_tails(new), int(valid.any(-1).sum()), kind)


def _with_tails(knots: Tensor) -> Tensor:
    """Knots with one more at each end, that goes on as the line from the middle one: less noisy than the last piece."""
    if len(knots) == 1:  # one point: a shift
        step = torch.ones(1, dtype=knots.dtype, device=knots.device)
        return torch.cat([knots - step, knots, knots + step])
    middle = len(knots) // 2
    return torch.cat([2 * knots[:1] - knots[middle], knots, 2 * knots[-1:] - knots[len(knots) - 1 - middle]])


def _conformal(
    query: Observations, valid: Tensor, mean: Tensor, scale: Tensor, num_bins: int, kind: str = "real"
) -> Conformal:
    assert query.y is not None
    tasks = int(valid.any(-1).sum())
    score = ((query.y.double() - mean) / scale).abs()[valid]
    score, order = score.sort()
    weights = (_weights(valid) * tasks / (tasks + 1))[valid][order]
    radius, stretched = [0.0], [0.0]
    for level in torch.linspace(0.0, 1.0, num_bins + 1, dtype=torch.float64)[1:-1].tolist():
        q = weighted_quantile(score, weights, level)
        if math.isfinite(q) and q > stretched[-1] * (1 + 1e-9) + 1e-12:
            radius.append(float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))))
            stretched.append(q)
    if len(radius) == 1:
        raise DataError("All validation forecasts are exactly right, so there is nothing to learn from their errors.")
    # beyond the last level as a Normal of that width
    radius.append(2 * radius[-1])
    stretched.append(2 * stretched[-1])
    old, new = (torch.tensor(knots, dtype=torch.float64, device=score.device) for knots in (radius, stretched))
    return Conformal(score, weights, old, new, tasks, kind)
