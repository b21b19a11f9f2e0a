"""What a report warns of besides the verdict on its calibration: training, trust in the posterior, strange tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.surprise import Surprise, surprise
from bayesmeta.errors import BayesMetaError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

_LEVEL = 0.05  # a task with a smaller conformal p-value counts as strange
_LEAST_EFFECTIVE = 10.0  # draws behind an evidence, below which it is not to be trusted
_JUDGED_BY, _ELEMENTS, _LEAST_DRAWS = 1000, 20_000_000, 200  # draws for Pareto's k; fewer of many parameters
_LEAST_LOSSES, _PART, _SLOPE_ERRORS, _OF_ALL = 9, 3, 3.0, 0.05


# -- strange tasks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strangeness:
    """How surprising the support of each task is under the meta-learned prior.

    Attributes:
        scores: −log evidence of each task's support, ``[tasks]``, NaN where unknown; None where it cannot be had.
        p_values: conformal, against validation tasks, ``[tasks]``; None where there are none.
        per_point: whether the scores are divided by the observations.
        reference: how many validation tasks.
        remark: why there are no scores or no p-values; "" where both are there.
    """

    scores: Tensor | None
    p_values: Tensor | None = None
    per_point: bool = False
    reference: int = 0
    remark: str = ""


def strangeness(posterior: Posterior, validation: Posterior | None, num_samples: int, generator: Seed) -> Strangeness:
    """The surprise of each task's support, and how it ranks among those of validation tasks.

    Args:
        posterior: of the tasks in question. validation: by the same method, of tasks that training did not see.
        num_samples, generator: of the evidence where it has no closed form.
    """
    sizes = set(posterior.support.counts()[posterior.support.counts() > 0].tolist())
    others = sizes if validation is None else set(validation.support.counts().tolist()) - {0}
    per_point = len(sizes) > 1 or not sizes <= others
    options = {"per_point": per_point, "num_samples": num_samples, "generator": generator}
    try:
        found = surprise(posterior, **options)  # type: ignore[arg-type]
    except BayesMetaError as error:
        return Strangeness(None, remark=f"The evidence of their support cannot be had: {error}")
    remark = _unreliable(found)
    if remark:
        return Strangeness(None, remark=remark)
    if validation is None:
        text = "No validation tasks were given, so it is not known whether these are more surprising than others."
        return Strangeness(found.scores, None, per_point, 0, text)
    try:
        known = surprise(validation, **options)  # type: ignore[arg-type]
        p_values = found.p_values(known)
    except BayesMetaError as error:
        return Strangeness(found.scores, None, per_point, 0, f"They are not held against validation tasks: {error}")
    return Strangeness(found.scores, p_values, per_point, int((~known.scores.isnan()).sum()))


def _unreliable(found: Surprise) -> str:
    valid = ~found.scores.isnan()
    effective = found.effective_draws[valid]
    if bool(found.scores[valid].isfinite().all()) and float(effective.median()) >= _LEAST_EFFECTIVE:
        return ""
    return (
        f"The evidence of their support is not known well enough: {float(effective.median()):.1f} effective draws in "
        f"the median task, where {_LEAST_EFFECTIVE:.0f} are the least."
    )


def strange_tasks(found: Strangeness) -> list[str]:
    """A warning where more tasks are strange than chance explains."""
    if found.p_values is None or found.scores is None:
        return []
    p = found.p_values[~found.p_values.isnan()]
    count, tasks = int((p <= _LEVEL).sum()), len(p)
    # the reference is a sample too, and all tasks are held against the same one
    error = math.sqrt(tasks * _LEVEL * (1 - _LEVEL) * (1 + tasks / max(found.reference, 1)))
    if count <= tasks * _LEVEL + 3 * error:
        return []
    return [
        f"{count} of {tasks} tasks ({count / tasks:.0%}) are more surprising than {1 - _LEVEL:.0%} of the "
        f"{found.reference} validation tasks; {_LEVEL:.0%} would be expected of tasks like those. They come from "
        "elsewhere than the training tasks: do not trust forecasts of them, or train on tasks like them."
    ]


# -- the posterior ------------------------------------------------------------------------------------------------


def untrusted(posterior: Posterior, batch: TaskBatch, generator: Seed) -> list[str]:
    """A warning where the importance weights of the posterior's own draws say that it is not the exact one."""
    from bayesmeta.diagnostics.pareto import psis

    try:
        size = sum(value[0].numel() for value in posterior.named(posterior.draws(2, generator)).values())
        number = min(_JUDGED_BY, _ELEMENTS // max(size, 1))
        if posterior.is_point or number < _LEAST_DRAWS:
            return []
        found = psis(posterior, batch, num_samples=number, generator=generator)
    except (BayesMetaError, ImportError):  # no density to judge, or no ArviZ to judge it with
        return []
    return [] if found.finding == "good" else [found.verdict]


# -- training -----------------------------------------------------------------------------------------------------


def training(log: Sequence[Mapping[str, Any]], best_step: int | None = None) -> list[str]:
    """Warnings of a training that diverged, or that ended before its loss had levelled off.

    A loss is said to fall still where a line through its last third falls, by 3 standard errors of its slope (as if
    losses were independent) and by more than 5% of its range. It rose where the mean of the last third is above that
    of the first by 3 standard errors; of validation tasks that does no harm where the best step was kept.
    """
    out = []
    for key in ("loss", "validation"):
        bad = [line for line in log if isinstance(line.get(key), float) and not math.isfinite(line[key])]
        if bad:
            out.append(
                f"The {NAMES[key]} is not finite at step {bad[0].get('step', '?')}: the training diverged. Try a "
                "smaller learning rate, clipped gradients, or standardised data."
            )
    key, steps, values = losses(log)
    if out or len(values) < _LEAST_LOSSES:
        return out
    part = len(values) // _PART
    first, last = np.asarray(values[:part]), np.asarray(values[-part:])
    rise = float(last.mean() - first.mean())
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / part)
    if rise > _SLOPE_ERRORS * error:
        if key == "validation" and best_step is not None:
            return out
        out.append(
            f"The {NAMES[key]} rose from {first.mean():.4g} (mean of the first third of the training) to "
            f"{last.mean():.4g} (of the last): {_ROSE[key]}"
        )
        return out
    slope, slope_error = _slope(np.asarray(steps[-part:], dtype=float), last)
    fall = -slope * (steps[-1] - steps[-part])
    if slope < -_SLOPE_ERRORS * slope_error and fall > _OF_ALL * (max(values) - min(values)):
        out.append(
            f"The {NAMES[key]} was still falling when training ended, by {fall:.2g} nats a task over the last third "
            f"of the steps: it has not converged. Train for more than {steps[-1]:g} steps."
        )
    return out


#: What the losses of a log are called.
NAMES = {"loss": "training loss", "validation": "loss on the validation tasks"}
_ROSE = {
    "loss": "the training diverged. Try a smaller learning rate or clipped gradients.",
    "validation": "the method learned its training tasks by heart, or diverged. Try fewer steps, more tasks, a "
    "smaller model or a smaller learning rate.",
}


def losses(log: Sequence[Mapping[str, Any]]) -> tuple[str, list[float], list[float]]:
    """Which loss was kept, of the validation tasks where there are two or more of them; its steps and values."""
    for key in ("validation", "loss"):
        points = [(line["step"], line[key]) for line in log if "step" in line and _is_number(line.get(key))]
        if len(points) >= 2:
            steps, values = zip(*points)
            return key, list(steps), list(values)
    return "", [], []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of a line through points by least squares, with its standard error."""
    x = x - x.mean()
    square = float((x**2).sum())
    if square == 0 or len(x) < 3:
        return 0.0, math.inf
    slope = float((x * y).sum()) / square
    rest = y - y.mean() - slope * x
    return slope, math.sqrt(float((rest**2).sum()) / (len(x) - 2) / square)
