"""Recalibration after training: learn on validation tasks how far forecasts are off, and correct those of new tasks.

None changes φ or θ; each replaces the predictive F of a point by another, F̃. The tasks on which it is learned must be
new to the method, as those it is used on are: on training tasks forecasts look better than they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

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
    moments,
    weighted_quantile,
)
from bayesmeta.diagnostics.forecasts import (
    Predictor,
    SampleForecast,
    check_classes,
    check_finite,
    task_names,
    valid_points,
)
from bayesmeta.diagnostics.recalibrated import check_not_twice, class_log_likelihoods, inside, normal_parts
from bayesmeta.diagnostics.recalibrated_counts import CountForecast, check_count_targets, count_forecast
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
        num_bins: of ``"isotonic"`` and ``"conformal"``: pieces of the map; of ``"isotonic"`` at most one for 5 tasks
            (but 2).
        num_samples: draws, where there is no closed form.
        generator: generator or seed; None means seed 0.

    Returns:
        A :class:`Temperature`, :class:`Isotonic`, :class:`Conformal` or, of classes, :class:`ConformalSets`: call it on
        a posterior of new tasks.

    Raises:
        OptionError: for another ``how``, or fewer than 2 bins or draws.
        UnsupportedError: for an isotonic map of classes; for several outputs but with a temperature of numbers; for
            counts above 2000, and those that were recalibrated before, but with ``"conformal"``.
        DataError: for fewer than 2 tasks with a query, for targets that are no counts or classes of the likelihood,
            and for forecasts without any width.
        ShapeError, EmptyTaskError, NonFiniteDataError: as :func:`~bayesmeta.scores`; so is a target that the forecast
            calls impossible at every temperature.

    Warns:
        UserWarning: when a temperature ends at 50 or 1 / 50, where the search ends; and when an isotonic map is learned
            on draws outside of which far too many targets lie.
    """
    if how not in ("temperature", "isotonic", "conformal"):
        raise OptionError(f"how={how!r}; expected 'temperature', 'isotonic' or 'conformal'.")
    if num_bins < 2:
        raise OptionError(f"num_bins={num_bins}; expected at least 2.")
    valid = valid_points(posterior, batch, "Recalibration needs")
    tasks = _tasks(valid)
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
        return _of_classes(predictor, batch, valid, how)
    if kind == "count":
        check_count_targets(batch.query.y, valid, task_names(batch))
        if how != "conformal":
            return _of_counts(predictor, batch, valid, how, num_bins, generator)
    return _of_numbers(predictor, batch, valid, how, num_bins, generator)


def _of_classes(predictor: Predictor, batch: TaskBatch, valid: Tensor, how: How) -> Recalibration:
    query, names = batch.query, task_names(batch)
    assert query.y is not None
    probabilities = predictor.class_forecast(query).probabilities
    check_finite(probabilities, valid, "probability of a class", names)
    check_classes(torch.where(valid, query.y, 0), probabilities.shape[-1], names)
    if how == "conformal":
        return conformal_sets(predictor, query, valid)
    value = _class_temperature(predictor, query, _weights(valid), names)
    return Temperature(value, "class", _tasks(valid))


def _of_counts(
    predictor: Predictor, batch: TaskBatch, valid: Tensor, how: How, num_bins: int, generator: Seed
) -> Recalibration:
    check_not_twice(predictor.posterior)
    query, names = batch.query, task_names(batch)
    assert query.y is not None
    # what is padding needs no table; nor does what counts for nothing
    query = Observations(query.x, torch.where(valid, query.y, 0), valid, query.w)
    table = count_forecast(predictor.posterior, query, predictor.draws, predictor.log_likelihood, names=names)
    assert query.y is not None
    if how == "temperature":
        return Temperature(_count_temperature(table, query.y, _weights(valid), names), "count", _tasks(valid))
    return _isotonic(table.pit(query.y.double(), _uniform(query, generator)), valid, num_bins, "count")


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
        value = _temperature(predictor, query, _weights(valid), mean, scale, task_names(batch))
        return Temperature(value, kind, _tasks(valid))
    if how == "isotonic":
        forecast, y = predictor.forecast(query), query.y.double()
        if isinstance(forecast, SampleForecast):
            _warn_of_outside(forecast, y, valid)
            z = torch.special.ndtri(inside(forecast.pit(y, _uniform(query, generator))))
        else:
            z = (y - forecast.loc) / forecast.scale
        return _isotonic(z, valid, num_bins, kind)
    return _conformal(query, valid, mean, scale, num_bins, kind)


# -- fits ---------------------------------------------------------------------------------------------------------


def _weights(valid: Tensor) -> Tensor:
    """1 / (tasks · points of the task) where valid, float64: all tasks count alike."""
    return valid.double() / valid.sum(-1, keepdim=True).clamp(min=1) / valid.any(-1).sum()


def _tasks(valid: Tensor) -> int:
    return int(valid.any(-1).sum())


def _temperature(
    predictor: Predictor, query: Observations, weight: Tensor, mean: Tensor, scale: Tensor, names: list[str]
) -> float:
    assert query.y is not None
    y = query.y.double()
    if normal_parts(predictor.posterior, query) is not None:  # log τ + z² / (2 τ²) is least at τ² = mean z²
        square = ((y - mean) / scale).square()
        square = square if square.dim() == 2 else square.mean(-1)
        return _told(float(torch.where(weight > 0, weight * square, 0.0).sum().sqrt().clamp(1 / _WORST, _WORST)))
    outputs = 1 if y.dim() == 2 else y.shape[-1]

    # a mixture of draws has too thin tails, and a factor that is learned on it makes up for that
    closed = predictor.closed_form(query)
    centre = mean if closed is None else centre_of(closed)
    centre = mean if centre is None else centre.double().expand(mean.shape)

    def score(log_value: float) -> Tensor:
        before = (centre + (y - centre) / math.exp(log_value)).to(query.x.dtype)
        if closed is not None:
            point = log_density(closed, before)
        else:
            each = predictor.log_likelihood(query.with_y(before))
            point = each.logsumexp(0) - math.log(len(each))
        return point - outputs * log_value

    return _best(score, weight, names)


def _count_temperature(table: CountForecast, y: Tensor, weight: Tensor, names: list[str]) -> float:
    def score(log_value: float) -> Tensor:
        return table.log_prob(y, lambda z: z / math.exp(log_value))

    return _best(score, weight, names)


def _class_temperature(predictor: Predictor, query: Observations, weight: Tensor, names: list[str]) -> float:
    assert query.y is not None
    y = torch.where(weight > 0, query.y, 0).long()
    log_p = class_log_likelihoods(predictor.posterior, query, predictor.draws)  # [n, classes, tasks, shots]
    index = y.expand(len(log_p), 1, *y.shape)

    def score(log_value: float) -> Tensor:
        each = (log_p / math.exp(log_value)).log_softmax(1).gather(1, index).squeeze(1)
        return each.logsumexp(0) - math.log(len(each))

    return _best(score, weight, names)


def _best(score: Callable[[float], Tensor], weight: Tensor, names: list[str]) -> float:
    """The τ of the best weighted mean of a log score ``[tasks, shots]`` of log τ.

    Raises:
        NonFiniteDataError: where the score is finite at no τ, naming a task.
    """

    def loss(log_value: float) -> float:
        value = -float(torch.where(weight > 0, weight * score(log_value), 0.0).sum())
        return value if math.isfinite(value) else math.inf

    end = math.log(_WORST)
    grid = torch.linspace(-end, end, 13, dtype=torch.float64).tolist()
    values = [loss(g) for g in grid]
    if min(values) == math.inf:
        check_finite(score(0.0), weight > 0, "log score, at whatever temperature,", names)
        check_finite(score(end), weight > 0, "log score, at whatever temperature,", names)
    return _told(math.exp(_minimum(loss, grid, values)))


def _told(value: float) -> float:
    """The temperature; with a warning where it is an end of those that were looked for."""
    if abs(math.log(value)) > math.log(_WORST) - 0.01:
        warnings.warn(
            f"The temperature ended at {value:.3g}, where the search ends: no spread near that of the forecasts fits. "
            + (
                "Look for targets in other units than the forecasts, and for forecasts of almost no spread."
                if value > 1
                else "The validation targets are all but exactly the most probable ones: are they training tasks?"
            ),
            UserWarning,
            stacklevel=2,
        )
    return value


def _minimum(loss: Callable[[float], float], grid: list[float], values: list[float]) -> float:
    """Where a function of log τ is least: the best of a grid, then golden section around it, to 0.003."""
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


def _warn_of_outside(forecast: SampleForecast, y: Tensor, valid: Tensor) -> None:
    """Warn of targets outside the draws: more than twice as many as n draws have, 2 / (n + 1), and 1% more."""
    outside = (y < forecast.draws[0]) | (y > forecast.draws[-1])
    share = float((_weights(valid) * outside).sum())
    expected = 2 / (len(forecast.draws) + 1)
    # so many that one task more or less does not matter
    if share > 2 * expected + 0.01 + 1 / _tasks(valid):
        warnings.warn(
            f"{share:.1%} of the validation targets lie outside all {len(forecast.draws)} draws of their forecasts, "
            f"where {expected:.1%} were expected; an isotonic map cannot reach there. Learn a temperature first, and "
            "the isotonic map on what it corrected.",
            UserWarning,
            stacklevel=4,
        )


def _isotonic(z: Tensor, valid: Tensor, num_bins: int, kind: str) -> Isotonic:
    """From Φ⁻¹ of the PIT."""
    z, order = z[valid].sort()
    share = _weights(valid)[valid][order].cumsum(0)
    # a level between fewer than some five tasks is noise, and two that are close make a step of the density
    pieces = min(num_bins, max(2, _tasks(valid) // 5))
    levels = torch.linspace(0.0, 1.0, pieces + 1, dtype=torch.float64, device=z.device)[1:-1]
    old = z[torch.searchsorted(share, levels - 1e-12).clamp(max=len(z) - 1)]
    new = torch.special.ndtri(levels)
    # strictly increasing also where values are tied, so that R has an inverse
    old = torch.cat([old[:1], old[0] + old.diff().clamp(min=1e-6).cumsum(0)])
    return Isotonic(_with_tails(old), _with_tails(new), _tasks(valid), kind)


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
    tasks = _tasks(valid)
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
