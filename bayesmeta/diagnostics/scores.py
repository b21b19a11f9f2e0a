"""Scores of a posterior's predictions of the query: of real numbers, of counts, of classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.diagnostics.figures import Figures
from bayesmeta.diagnostics.forecasts import (
    NormalForecast,
    Predictor,
    SampleForecast,
    check_classes,
    check_finite,
    task_names,
    valid_points,
)
from bayesmeta.diagnostics.metrics import energy_score, interval_score, sharpness
from bayesmeta.errors import DataError, OptionError
from bayesmeta.ops.random import Seed, forked_rng
from bayesmeta.protocols import Posterior, TargetKind

#: Name and meaning of each score, in the order of the table. Units: nats a point, those of y, or a fraction.
#: Of real numbers and counts.
SCORES = {
    "nll": "negative log score of a query point",
    "nll_joint": "negative log score of a task's query, per point",
    "crps": "continuous ranked probability score",
    "rmse": "error of the predictive mean",
    "coverage_50": "query inside the central 50% interval",
    "coverage_90": "query inside the central 90% interval",
    "width_90": "width of the central 90% interval",
    "interval_90": "interval score of the central 90% interval",
}

#: What ``bm.scores(…, energy=True)`` adds to them.
ENERGY = {"energy": "energy score of a task's query, per point"}

#: Likewise of classes, whose index is no quantity: it has no error, no interval and no CRPS.
CLASS_SCORES = {
    "nll": SCORES["nll"],
    "nll_joint": SCORES["nll_joint"],
    "accuracy": "share of points whose most probable class is right",
    "brier": "Brier score, summed over the classes: 0 to 2",
}


@dataclass(frozen=True, eq=False)
class Scores(Figures):
    """Scores by name; a mapping to the values.

    Attributes:
        values_by_name: mean over the tasks of each task's mean over its query points; for ``rmse`` the square root of
            that mean of squares. Names and meanings are in :data:`SCORES` and :data:`CLASS_SCORES`.
        standard_errors: of these, over tasks: standard deviation / √tasks; for ``rmse`` by the delta method. NaN for
            a single task.
        per_task: each task's own score, ``[tasks]``, float64; NaN for tasks that do not count. ``rmse`` holds each
            task's own root mean square.
        num_tasks: how many tasks count.
        num_samples: draws behind the scores that have no closed form; 0 when none was needed.
        raw_units: whether the units are those of the raw data.
        target_kind: what y is: ``"real"``, ``"count"`` or ``"class"``.
    """

    values_by_name: dict[str, float]
    standard_errors: dict[str, float]
    per_task: dict[str, Tensor]
    num_tasks: int
    num_samples: int
    raw_units: bool
    target_kind: TargetKind = "real"

    def to_dict(self) -> dict[str, float]:
        """Plain numbers: each score, its standard error as ``<name>_se``, and ``num_tasks``."""
        return self._with_errors() | {"num_tasks": self.num_tasks}

    def __str__(self) -> str:
        how = "closed form" if self.num_samples == 0 else f"up to {self.num_samples} draws"
        units = "raw" if self.raw_units else "standard"
        lines = [f"{'score':<12}{'mean':>10}{'± s.e.':>10}   of {self.num_tasks} tasks, {units} units, {how}"]
        meaning = CLASS_SCORES if self.target_kind == "class" else SCORES | ENERGY
        for name, value in self.values_by_name.items():
            counts = self.target_kind == "count" and name.startswith("coverage")
            note = " (of counts: or more)" if counts else ""
            lines.append(f"{name:<12}{value:>10.4f}{self.standard_errors[name]:>10.4f}   {meaning[name]}{note}")
        return "\n".join(lines)


@torch.no_grad()
def scores(
    posterior: Posterior,
    batch: TaskBatch,
    *,
    num_samples: int = 1000,
    generator: Seed = None,
    raw_units: bool = True,
    energy: bool = False,
) -> Scores:
    """Score a posterior's predictions of the query of a batch.

    Everything is in closed form where ``posterior.predictive`` gives a Normal; the log score wherever it gives any
    distribution; the rest comes from one set of draws: log scores as the log of the mean likelihood over draws (for
    the joint, of the product over a task's points; its bias shrinks with the draws and grows with the points), the
    CRPS by its fair estimator, intervals as quantiles of the draws.

    Which scores there are depends on what the likelihood says y is. Counts have those of real numbers; their intervals
    begin and end at counts, so that calibrated ones cover more than 50% and 90%, by much where counts are small.
    Classes have log scores, accuracy and the Brier score, from the likelihood's probabilities averaged over draws of φ.

    Args:
        posterior: adapted to ``batch.support``.
        batch: its query is predicted; y ``[tasks, shots]`` or ``[tasks, shots, outputs]`` (the log score is then of
            the whole vector, the other scores are means over the outputs). Padding tasks and points, and tasks
            without a query point, do not count.
        num_samples: draws, where there is no closed form.
        generator: generator or seed; None means seed 0.
        raw_units: undo ``batch.standardizer``: log scores gain log y_scale, the others are multiplied by it.
        energy: also the energy score of all of a task's query as one vector, which like ``nll_joint`` sees whether the
            points hang together, and like the CRPS is kind to surprises. Always from draws of whole queries; of the
            root mean square distance, so that it is in the units of y whatever the number of points.

    Returns:
        The scores with standard errors over tasks.

    Raises:
        ShapeError: for another number of tasks than that of the posterior.
        DataError: for a query without y, or with targets outside the likelihood's support.
        EmptyTaskError: when no task has a query point.
        NonFiniteDataError: for predictions (or data) that are not finite, naming the task.
        OptionError: for fewer than 2 draws, and for the energy score of classes.
    """
    valid = valid_points(posterior, batch, "Scores need")
    query = batch.query
    if energy and posterior.target_kind == "class":
        raise OptionError("energy=True is for numbers; the index of a class has no distances. Leave it out.")
    assert query.y is not None
    if posterior.target_kind != "real":  # padding need not be a count or a class
        keep = valid if query.y.dim() == 2 else valid.unsqueeze(-1)
        y = torch.where(keep, query.y, 0)
        y = y.to(query.x.dtype) if posterior.target_kind == "class" else y  # torch's Bernoulli takes no integers
        batch = replace(batch, query=query.with_y(y))
    scale = None
    if raw_units and batch.standardizer is not None:
        scale = batch.standardizer.y_scale.double().to(query.device)
    predictor = Predictor(posterior, num_samples, generator)
    per_task = _per_task(predictor, batch, valid, scale)
    if energy:
        per_task["energy"] = _energy(predictor, query, valid, scale)
    drawn = num_samples if predictor.used_draws else 0
    raw = scale is not None or batch.standardizer is None
    return _summarise(per_task, valid.any(-1), drawn, raw, posterior.target_kind)


def _per_task(predictor: Predictor, batch: TaskBatch, valid: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    """Mean of each score over the points of each task, ``[tasks]``; 0 for a task without points."""
    query = batch.query
    assert query.y is not None
    names = task_names(batch)
    y = query.y.double()
    of_y = (_class_scores if predictor.posterior.target_kind == "class" else _number_scores)(
        predictor, query, valid, scale, names
    )
    count = valid.sum(-1).clamp(min=1)
    log_point, log_joint = _log_scores(predictor, batch, valid)
    check_finite(log_point, valid, "log score", names)
    check_finite(log_joint.unsqueeze(-1), valid.any(-1, keepdim=True), "joint log score", names)
    if scale is not None:
        outputs = 1 if y.dim() == 2 else y.shape[-1]
        shift = scale.log().expand(outputs).sum()
        log_point, log_joint = log_point - shift, log_joint - shift * count

    def mean(value: Tensor) -> Tensor:
        value = value if value.dim() == 2 else value.mean(-1)
        return torch.where(valid, value, 0.0).sum(-1) / count

    out = {"nll": mean(-log_point), "nll_joint": -log_joint / count}
    return out | {name: mean(value) for name, value in of_y.items()}


def _number_scores(
    predictor: Predictor, query: Observations, valid: Tensor, scale: Tensor | None, names: list[str]
) -> dict[str, Tensor]:
    """Scores of real numbers or counts beside the log scores, each in the shape of y; ``rmse`` is squared."""
    assert query.y is not None
    forecast, y = predictor.forecast(query), query.y.double()
    check_finite(forecast.mean, valid, "predictive mean", names)
    check_finite(forecast.spread, valid, "width of the predictive", names)
    unit = torch.ones((), dtype=torch.float64, device=y.device) if scale is None else scale
    # of rmse the square: its root is taken at the end
    out = {"crps": forecast.crps(y) * unit, "rmse": ((forecast.mean - y) * unit).square()}
    return out | _intervals(forecast, y, unit)


def _class_scores(
    predictor: Predictor, query: Observations, valid: Tensor, scale: Tensor | None, names: list[str]
) -> dict[str, Tensor]:
    """Scores of classes beside the log scores, each in the shape of y."""
    assert query.y is not None
    forecast = predictor.class_forecast(query)
    check_finite(forecast.probabilities, valid, "probability of a class", names)
    check_classes(query.y, forecast.probabilities.shape[-1], names)
    return {"accuracy": forecast.accuracy(query.y), "brier": forecast.brier(query.y)}


def _intervals(forecast: NormalForecast | SampleForecast, y: Tensor, unit: Tensor) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for percent in (50, 90):
        tail = (1.0 - percent / 100.0) / 2.0
        low, high = forecast.quantile(tail), forecast.quantile(1.0 - tail)
        out[f"coverage_{percent}"] = ((low <= y) & (y <= high)).double()
    return out | {
        "width_90": sharpness(low, high) * unit,
        "interval_90": interval_score(low, high, y, 0.9) * unit,
    }


def _energy(predictor: Predictor, query: Observations, valid: Tensor, scale: Tensor | None) -> Tensor:
    """Energy score of each task's query, ``[tasks]``; 0 for a task without points."""
    assert query.y is not None
    y, draws = query.y.double(), _joint_draws(predictor, query).double()
    keep = (valid if y.dim() == 2 else valid.unsqueeze(-1).expand(y.shape)).flatten(1)
    unit = torch.ones_like(y) if scale is None else scale.expand_as(y)
    # a root mean over the points that count, as a norm of what is left of the padding
    size = unit.flatten(1) * keep / keep.sum(-1, keepdim=True).clamp(min=1).sqrt()
    return energy_score(draws.flatten(2) * size, y.flatten(1) * size, pairs="half")


def _joint_draws(predictor: Predictor, query: Observations) -> Tensor:
    """Draws of whole queries, ``[n, tasks, shots, …]``: of the joint closed form where there is one, else of φ."""
    joint = predictor.closed_form(query, joint=True)
    if joint is None or query.y is None:
        return predictor.predict(query)
    predictor.used_draws = True
    with forked_rng(predictor.generator):
        draws = joint.sample((predictor.num_samples,))
    return draws.reshape(-1, *query.y.shape)


# -- log scores ---------------------------------------------------------------------------------------------------


def _log_scores(predictor: Predictor, batch: TaskBatch, valid: Tensor) -> tuple[Tensor, Tensor]:
    """log p(y_q | S) of each point ``[tasks, shots]``, and log p(y_Q | S) of all of a task's ``[tasks]``."""
    query = batch.query
    assert query.y is not None
    point = joint = None
    closed = predictor.closed_form(query)
    if closed is not None:
        point = log_density(closed, query.y).expand(valid.shape)
        together = predictor.closed_form(query, joint=True)
        joint = None if together is None else log_joint_density(together, query.y, valid)
    if point is None or joint is None:
        each = torch.where(valid, predictor.log_likelihood(query), 0.0)
        log_n = math.log(each.shape[0])
        point = each.logsumexp(0) - log_n if point is None else point
        joint = each.sum(-1).logsumexp(0) - log_n if joint is None else joint
    return torch.where(valid, point, 0.0), joint


def log_density(distribution: Any, y: Tensor) -> Tensor:
    """log p(y) in float64; a DataError for targets outside the support."""
    try:
        return distribution.log_prob(y).double()
    except ValueError as error:  # Pyro's validation
        raise DataError(f"The query has targets outside the support of the predictive: {error}") from error


def log_joint_density(distribution: Any, y: Tensor, valid: Tensor) -> Tensor | None:
    """log-density of each task's real targets under a joint distribution; None when it cannot be marginalised."""
    if isinstance(distribution, torch.distributions.Independent):
        base = distribution.base_dist
        while isinstance(base, torch.distributions.Independent):
            base = base.base_dist
        value = log_density(base, y)
        value = value.flatten(2).sum(-1) if value.dim() > 2 else value
        return torch.where(valid, value, 0.0).sum(-1)
    keep = valid if y.dim() == 2 else valid.unsqueeze(-1).expand(y.shape)
    keep = keep.flatten(1)
    if isinstance(distribution, torch.distributions.MultivariateNormal):
        return _log_normal(distribution, y.flatten(1).double(), keep)
    if bool(keep.all()):
        return log_density(distribution, y.reshape(y.shape[0], *distribution.event_shape))
    return None


def _log_normal(distribution: Any, y: Tensor, keep: Tensor) -> Tensor:
    """log-density of the kept coordinates of a multivariate normal, ``[tasks]``.

    The others become independent standard normals at 0, whose density is known and taken off again.
    """
    covariance = distribution.covariance_matrix.double()
    both = keep.unsqueeze(-1) & keep.unsqueeze(-2)
    covariance = torch.where(both, covariance, 0.0) + torch.diag_embed((~keep).double())
    residual = torch.where(keep, y - distribution.loc.double(), 0.0)
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(residual), covariance, validate_args=False)
    return normal.log_prob(residual) + 0.5 * math.log(2.0 * math.pi) * (~keep).double().sum(-1)


# -- means over tasks ---------------------------------------------------------------------------------------------


def _summarise(
    per_task: dict[str, Tensor], counts: Tensor, num_samples: int, raw_units: bool, kind: TargetKind
) -> Scores:
    tasks = int(counts.sum())
    values, errors, each = {}, {}, {}
    for name, value in per_task.items():
        kept = value[counts]
        mean = float(kept.mean())
        error = float(kept.std() / math.sqrt(tasks)) if tasks > 1 else math.nan
        if name == "rmse":
            value, mean = value.sqrt(), math.sqrt(mean)
            error = error / (2.0 * mean) if mean > 0 else error
        values[name], errors[name] = mean, error
        each[name] = torch.where(counts, value, math.nan)
    return Scores(values, errors, each, tasks, num_samples, raw_units, kind)
