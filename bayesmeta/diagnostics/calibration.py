"""Does a forecast say how sure it is? Coverage, PIT values and reliability of the predictions of the query.

The tasks are the independent units. The points of a task share its φ and so depend on each other: every standard error
and p-value here is over tasks, from each task's own mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.figures import Figures
from bayesmeta.diagnostics.forecasts import Predictor, check_classes, check_finite, task_names, valid_points
from bayesmeta.diagnostics.reliability import Reliability, reliability
from bayesmeta.diagnostics.uniformity import Shape, bonferroni, legendre, shape_of, t_test
from bayesmeta.diagnostics.verdicts import LEAST_TASKS, Finding, conclusion, of_classes, of_numbers
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior, TargetKind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Levels of the central intervals whose coverage is taken, and probabilities of the quantiles.
LEVELS = tuple(i / 20 for i in range(1, 20))


@dataclass(frozen=True, eq=False)
class Calibration(Figures):
    """Calibration of forecasts of numbers, or of counts; a mapping to the figures.

    Attributes:
        values_by_name: ``calibration_error``, the root of the mean over the levels p of (share of PIT values up to
            p − p)²; ``calibration_noise``, what a calibrated forecast would have of it, from so many tasks;
            ``coverage_50``, ``coverage_90``; ``location`` and ``dispersion`` of the PIT values; and the p-values
            ``p_value`` (of four moments), ``p_location``, ``p_dispersion``, see
            :class:`~bayesmeta.diagnostics.uniformity.Shape`. Small p-values speak against calibration.
        standard_errors: over tasks, of ``coverage_50`` and ``coverage_90``.
        levels: of the coverage curve, ``[levels]``.
        coverage, coverage_errors: share of the query inside the central interval of each level, mean over tasks, and
            its standard error over tasks (NaN for one task), ``[levels]``.
        pit: F(y) of each point, randomised for counts and draws; in the shape of y, NaN where a point does not count.
        per_task: for each task, NaN where it does not count: ``coverage`` ``[tasks, levels]``, ``moments`` of its PIT
            values ``[tasks, 4]``.
        num_tasks: how many tasks count.
        finding: "calibrated" (that is, no miscalibration was found), "over-confident", "under-confident", "too low",
            "too high" (of the forecasts), "miscalibrated" (in another way) or "unknown".
        verdict: the finding in a sentence, with how far it can be relied on: few tasks, or a p-value that is small
            though not below alpha, are no evidence of calibration.
    """

    values_by_name: dict[str, float]
    standard_errors: dict[str, float]
    levels: Tensor
    coverage: Tensor
    coverage_errors: Tensor
    pit: Tensor
    per_task: dict[str, Tensor]
    num_tasks: int
    finding: Finding
    verdict: str

    def to_dict(self) -> dict[str, float | str]:
        """Plain values: each figure, standard errors as ``<name>_se``, ``num_tasks``, ``finding`` and ``verdict``."""
        return self._with_errors() | _ends(self)

    def __str__(self) -> str:
        return _table(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.verdict}>"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Coverage curve and histogram of the PIT values, see :func:`~bayesmeta.plot_calibration`."""
        from bayesmeta.diagnostics.plots_calibration import plot_calibration

        return plot_calibration(self, path=path)


@dataclass(frozen=True, eq=False)
class ClassCalibration(Figures):
    """Calibration of forecasts of classes: is the most probable class as often right as its probability says?

    Attributes:
        values_by_name: ``confidence`` and ``accuracy`` of the most probable class, means over tasks, and ``gap``,
            confidence − accuracy; ``ece`` and ``mce``, the mean and the largest distance of the two over bins of equal
            width, and ``ece_adaptive``, ``mce_adaptive`` over bins of equally many points, where all points count
            alike; ``p_gap``, ``p_shape``, ``p_value`` (of both; small ones speak against calibration).
        standard_errors: over tasks, of ``confidence``, ``accuracy`` and ``gap``.
        equal, adaptive: the two reliability diagrams.
        per_task: ``confidence``, ``accuracy``, ``gap`` of each task, ``[tasks]``; NaN where it does not count.
        num_tasks: how many tasks count.
        finding, verdict: as of :class:`Calibration`.
    """

    values_by_name: dict[str, float]
    standard_errors: dict[str, float]
    equal: Reliability
    adaptive: Reliability
    per_task: dict[str, Tensor]
    num_tasks: int
    finding: Finding
    verdict: str

    def to_dict(self) -> dict[str, float | str]:
        """Plain values: each figure, standard errors as ``<name>_se``, ``num_tasks``, ``finding`` and ``verdict``."""
        return self._with_errors() | _ends(self)

    def __str__(self) -> str:
        return _table(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.verdict}>"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Reliability diagrams, see :func:`~bayesmeta.plot_calibration`."""
        from bayesmeta.diagnostics.plots_calibration import plot_calibration

        return plot_calibration(self, path=path)


def _ends(result: Calibration | ClassCalibration) -> dict[str, float | str]:
    return {"num_tasks": result.num_tasks, "finding": result.finding, "verdict": result.verdict}


def _table(result: Calibration | ClassCalibration) -> str:
    lines = [result.verdict, f"{'':<20}{'value':>10}{'± s.e.':>10}   of {result.num_tasks} tasks"]
    for name, value in result.values_by_name.items():
        error = result.standard_errors.get(name)
        number = f"{value:>10.2g}" if name.startswith("p_") else f"{value:>10.4f}"
        lines.append(f"{name:<20}{number}" + ("" if error is None else f"{error:>10.4f}"))
    return "\n".join(lines)


@torch.no_grad()
def calibration(
    posterior: Posterior,
    batch: TaskBatch,
    *,
    levels: Sequence[float] = LEVELS,
    alpha: float = 0.01,
    num_bins: int = 15,
    num_samples: int = 1000,
    generator: Seed = None,
) -> Calibration | ClassCalibration:
    """Judge whether a posterior's predictions of the query of a batch are calibrated.

    Of numbers: the PIT values F(y), in closed form for a Normal predictive, else the rank of y among draws. They are
    uniform if the forecasts are calibrated, and a central interval of level ℓ covers y where |2F(y) − 1| ≤ ℓ. The
    calibration error is eq. 9 of V. Kuleshov, N. Fenner, S. Ermon, "Accurate Uncertainties for Deep Learning Using
    Calibrated Regression", ICML 2018, https://arxiv.org/abs/1807.00263, with equal weights that sum to 1, its root
    taken, and all tasks counted alike. For counts the PIT is randomised (Czado, Gneiting & Held 2009,
    https://doi.org/10.1111/j.1541-0420.2009.01191.x), so that it is uniform for calibrated forecasts, and coverage
    meets its level, which the intervals of :func:`~bayesmeta.scores`, whose ends are counts, exceed.

    Of classes: confidence against accuracy of the most probable class, in bins, see
    :func:`~bayesmeta.diagnostics.reliability.reliability`.

    Calibration does not say that a forecast is good: the prior is calibrated. It is to be read beside the scores.

    Args:
        posterior: adapted to ``batch.support``.
        batch: its query is predicted. Padding tasks and points, and tasks without a query point, do not count.
        levels: of the coverage curve, increasing, in (0, 1).
        alpha: with a p-value below this the forecast is not called calibrated: so many calibrated ones are wrongly
            accused. From alpha to 0.1 the verdict says that there is some sign.
        num_bins: bins of the reliability diagrams.
        num_samples: draws, where there is no closed form.
        generator: generator or seed; None means seed 0.

    Returns:
        A :class:`Calibration`, or of classes a :class:`ClassCalibration`.

    Raises:
        OptionError: for levels or alpha outside (0, 1), fewer than 2 draws, fewer than 1 bin.
        ShapeError, DataError, EmptyTaskError, NonFiniteDataError: as :func:`~bayesmeta.scores`.
    """
    valid = valid_points(posterior, batch, "Calibration needs")
    if not 0.0 < alpha < 1.0:
        raise OptionError(f"alpha={alpha}; expected a number between 0 and 1, both excluded.")
    grid = torch.as_tensor(tuple(levels), dtype=torch.float64, device=batch.query.device)
    if len(grid) == 0 or not bool(((grid > 0) & (grid < 1)).all() and (grid.diff() > 0).all()):
        raise OptionError(f"levels={list(levels)}; expected increasing numbers between 0 and 1, both excluded.")
    predictor = Predictor(posterior, num_samples, generator)
    if posterior.target_kind == "class":
        return _of_classes(predictor, batch, valid, alpha, num_bins)
    pit = _pit(predictor, batch, valid, generator)
    return calibration_of_pit(pit, valid, grid, alpha, posterior.target_kind)


def _pit(predictor: Predictor, batch: TaskBatch, valid: Tensor, generator: Seed) -> Tensor:
    query, names = batch.query, task_names(batch)
    assert query.y is not None
    forecast, y = predictor.forecast(query), query.y.double()
    check_finite(forecast.mean, valid, "predictive mean", names)
    check_finite(forecast.spread, valid, "width of the predictive", names)
    generator = as_generator(generator, query.device, "PIT")
    uniform = torch.rand(y.shape, generator=generator, dtype=torch.float64, device=generator.device).to(y.device)
    keep = valid if y.dim() == 2 else valid.unsqueeze(-1)
    return torch.where(keep, forecast.pit(y, uniform), math.nan)


def calibration_of_pit(
    pit: Tensor, valid: Tensor, levels: Tensor | None = None, alpha: float = 0.01, kind: TargetKind = "real"
) -> Calibration:
    """The judgement of :func:`calibration` on PIT values that are known: uniform, if the forecasts are calibrated.

    Args:
        pit: ``[tasks, points]``, or ``[tasks, points, outputs]``, float64.
        valid: which points count, ``[tasks, points]``.
        levels: of the coverage curve, increasing, in (0, 1), float64; None: :data:`LEVELS`.
        alpha, kind: as :func:`calibration` has them; ``kind`` is what the targets are, for the verdict's words.
    """
    levels = torch.as_tensor(LEVELS, dtype=torch.float64, device=pit.device) if levels is None else levels
    counts = valid.any(-1)

    def per_task(value: Tensor) -> Tensor:
        """Mean over a task's points (and outputs) of ``[tasks, shots, …, k]``, ``[tasks, k]``."""
        value = value if value.dim() == 3 else value.mean(2)
        total = torch.where(valid.unsqueeze(-1), value, 0.0).sum(1)
        return torch.where(counts.unsqueeze(-1), total / valid.sum(-1, keepdim=True).clamp(min=1), math.nan)

    central, u = (2.0 * pit - 1.0).abs().unsqueeze(-1), pit.unsqueeze(-1)
    named = torch.tensor([0.5, 0.9], dtype=levels.dtype, device=levels.device)
    covered = per_task((central <= torch.cat([levels, named])).double())
    moments = per_task(legendre(pit))
    below = per_task((u <= levels).double())[counts]
    shape = shape_of(moments[counts])
    mean, error = _mean_error(covered[counts])
    values = {
        "calibration_error": float((below.mean(0) - levels).square().mean().sqrt()),
        "calibration_noise": _noise(below, levels),
        "coverage_50": float(mean[-2]),
        "coverage_90": float(mean[-1]),
        "location": shape.location,
        "dispersion": shape.dispersion,
        "p_value": shape.p_value,
        "p_location": shape.p_location,
        "p_dispersion": shape.p_dispersion,
    }
    errors = {"coverage_50": float(error[-2]), "coverage_90": float(error[-1])}
    tasks = int(counts.sum())
    finding = _finding(shape, alpha, tasks)
    each = {"coverage": covered[:, :-2], "moments": moments}
    verdict = of_numbers(values, errors, [levels, mean[:-2], error[:-2]], tasks)
    verdict += conclusion(finding, values, errors, tasks, kind)
    return Calibration(values, errors, levels, mean[:-2], error[:-2], pit, each, tasks, finding, verdict)


def _noise(below: Tensor, levels: Tensor) -> float:
    """Root mean square over the levels of the standard error of the share below; NaN for one task."""
    tasks = len(below)
    if tasks < 2:
        return math.nan
    # around the truth under calibration, so that it is not small where all is wrong alike
    return float((below - levels).square().mean().div(tasks).sqrt())


def _finding(shape: Shape, alpha: float, tasks: int) -> Finding:
    if tasks < LEAST_TASKS:
        return "unknown"
    if shape.p_value >= alpha:
        return "calibrated"
    if shape.p_dispersion < alpha:
        return "over-confident" if shape.dispersion > 0 else "under-confident"
    if shape.p_location < alpha:
        return "too low" if shape.location > 0 else "too high"
    return "miscalibrated"


# -- classes ------------------------------------------------------------------------------------------------------


def _of_classes(predictor: Predictor, batch: TaskBatch, valid: Tensor, alpha: float, num_bins: int) -> ClassCalibration:
    query, names = batch.query, task_names(batch)
    assert query.y is not None
    forecast = predictor.class_forecast(query)
    check_finite(forecast.probabilities, valid, "probability of a class", names)
    keep = valid if query.y.dim() == 2 else valid.unsqueeze(-1).expand(query.y.shape)
    y = torch.where(keep, query.y, 0)
    check_classes(y, forecast.probabilities.shape[-1], names)
    confidence, hit = forecast.probabilities.amax(-1), forecast.accuracy(y)
    owner = torch.arange(len(y), device=y.device).reshape(-1, *[1] * (y.dim() - 1)).expand(y.shape)
    flat = confidence[keep], hit[keep], owner[keep]
    equal = reliability(*flat, num_bins=num_bins)
    adaptive = reliability(*flat, num_bins=num_bins, adaptive=True)
    counts = valid.any(-1)
    points = keep.flatten(1).sum(-1).clamp(min=1)

    def per_task(value: Tensor) -> Tensor:
        total = torch.where(keep, value, 0.0).flatten(1).sum(-1)
        return torch.where(counts, total / points, math.nan)

    slope = per_task((confidence - hit) * (confidence - confidence[keep].mean()))
    each = {"confidence": per_task(confidence), "accuracy": per_task(hit), "gap": per_task(confidence - hit)}
    values, errors = {}, {}
    for name, value in each.items():
        mean, error = _mean_error(value[counts])
        values[name], errors[name] = float(mean), float(error)
    tasks = int(counts.sum())
    _, p_gap = t_test(each["gap"][counts])
    _, p_shape = t_test(slope[counts])
    p_value = bonferroni([p_gap, p_shape])
    for kind, diagram in (("", equal), ("_adaptive", adaptive)):
        values |= {f"ece{kind}": diagram.ece, f"mce{kind}": diagram.mce}
    values |= {"p_value": p_value, "p_gap": p_gap, "p_shape": p_shape}
    finding = _class_finding(values, alpha, tasks)
    verdict = of_classes(values, errors, tasks) + conclusion(finding, values, errors, tasks, "class")
    return ClassCalibration(values, errors, equal, adaptive, each, tasks, finding, verdict)


def _class_finding(values: dict[str, float], alpha: float, tasks: int) -> Finding:
    if tasks < LEAST_TASKS:
        return "unknown"
    if values["p_value"] >= alpha:
        return "calibrated"
    if values["p_gap"] < alpha:
        return "over-confident" if values["gap"] > 0 else "under-confident"
    return "miscalibrated"


def _mean_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension and its standard error; NaN for one."""
    tasks = len(values)
    error = values.std(0) / math.sqrt(tasks) if tasks > 1 else torch.full_like(values[0], math.nan)
    return values.mean(0), error
