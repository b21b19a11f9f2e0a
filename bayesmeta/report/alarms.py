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
_FEW_STEPS = 50  # fewer hardly leave the first weights


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


@dataclass(frozen=True)
class Trust:
    """What the importance weights of the posterior's own draws say of it.

    Attributes:
        warnings: where neither the draws nor their weighted estimates can be relied on.
        notes: where the draws are somewhat off.
    """

    warnings: list[str]
    notes: list[str]


def trust(posterior: Posterior, batch: TaskBatch, generator: Seed, advice: Mapping[str, str] | None = None) -> Trust:
    """Whether the posterior's draws are worth those of the exact one, where that can be judged."""
    from bayesmeta.diagnostics.pareto import psis

    try:
        size = sum(value[0].numel() for value in posterior.named(posterior.draws(2, generator)).values())
        number = min(_JUDGED_BY, _ELEMENTS // max(size, 1))
        if posterior.is_point or number < _LEAST_DRAWS:
            return Trust([], [])
        found = psis(posterior, batch, num_samples=number, generator=generator)
    except (BayesMetaError, ImportError):  # no density to judge, or no ArviZ to judge it with
        return Trust([], [])
    if found.finding == "good":
        return Trust([], [])
    if found.finding == "bad":
        return Trust([instead(found.verdict, (advice or {}).get("trust"))], [])
    share, median = float((found.pareto_k <= found.threshold).double().mean()), float(found.pareto_k.median())
    middle = f" (median {median:.2f})" if math.isfinite(median) else ", and most of them have it exactly"
    return Trust(
        [],
        [
            f"The posterior is close to the exact one, not equal to it: Pareto k of its draws is at most "
            f"{found.threshold:.2f}, up to which it is usable, in {share:.0%} of tasks{middle}. The "
            f"scores and the calibration here judge its forecasts as they "
            f"are. {(advice or {}).get('usable', 'bm.psis gives estimates that are corrected by weights.')}"
        ],
    )


def instead(verdict: str, advice: str | None) -> str:
    """A verdict with other advice: what follows its first sentence is replaced; None: as it is."""
    if advice is None:
        return verdict
    return f"{verdict.partition('. ')[0].rstrip('.')}. {advice}".rstrip()


# -- training -----------------------------------------------------------------------------------------------------


def training(
    log: Sequence[Mapping[str, Any]],
    best_step: int | None = None,
    planned_steps: int | None = None,
    advice: Mapping[str, str] | None = None,
) -> list[str]:
    """Warnings of a training that diverged, was very short, or ended before its loss had levelled off.

    A loss is said to fall still where a line through its last third falls, by 3 standard errors of its slope (as if
    losses were independent) and by more than 5% of its range, and the step that was kept (or the lowest loss) is in
    that third. Of too few losses for a line, where the last is the lowest by more than 5% of the range. Where patience
    stopped the training, more steps were allowed and did not help. It rose where the mean of the last third is above
    that of the first by 3 standard errors; of validation tasks that does no harm where the best step was kept.

    Args:
        log, best_step, planned_steps, advice: as of :func:`~bayesmeta.report.build.write_report`.
    """
    out, advice = [], advice or {}
    for key in ("loss", "validation"):
        bad = [line for line in log if isinstance(line.get(key), float) and not math.isfinite(line[key])]
        if bad:
            out.append(
                f"The {NAMES[key]} is not finite at step {bad[0].get('step', '?')}: the training diverged. "
                + advice.get("diverged", "Try a smaller learning rate, clipped gradients, or standardised data.")
            )
    key, steps, values = losses(log)
    early = stopped_early(log, planned_steps)
    done = last_step(log)
    if done is not None and 0 < done < _FEW_STEPS and not early and not out:
        return [
            f"Only {done} training step{'s were' if done > 1 else ' was'} made, which hardly leaves the first weights: "
            f"hundreds are usual. {advice.get('steps', 'Train for more steps.')}"
        ]
    if out or len(values) < _LEAST_LOSSES:
        return out if out or early or key != "validation" else _still_best(steps, values, advice)
    part = len(values) // _PART
    first, last = np.asarray(values[:part]), np.asarray(values[-part:])
    rise = float(last.mean() - first.mean())
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / part)
    if rise > _SLOPE_ERRORS * error:
        if key == "validation" and best_step is not None:
            return out
        out.append(
            f"The {NAMES[key]} rose from {first.mean():.4g} (mean of the first third of the training) to "
            f"{last.mean():.4g} (of the last): {_WHY[key]} {advice.get('diverged', _ROSE[key])}"
        )
        return out
    slope, slope_error = _slope(np.asarray(steps[-part:], dtype=float), last)
    fall = -slope * (steps[-1] - steps[-part])
    low = steps[int(np.argmin(values))] if best_step is None else best_step
    late = values[-1] <= min(values) or low >= steps[-part]
    if not early and late and slope < -_SLOPE_ERRORS * slope_error and fall > _OF_ALL * (max(values) - min(values)):
        out.append(
            f"The {NAMES[key]} was still falling when training ended, by {fall:.2g} nats a task over the last third "
            "of the steps: it has not converged. " + advice.get("steps", f"Train for more than {steps[-1]:g} steps.")
        )
    return out


def _still_best(steps: Sequence[float], values: Sequence[float], advice: Mapping[str, str]) -> list[str]:
    """Of few losses: a warning where the last is the lowest, and not by a hair."""
    fall = min(values[:-1]) - values[-1]
    if fall <= _OF_ALL * (max(values) - min(values)):
        return []
    return [
        f"The {NAMES['validation']} was lowest at the last step, by {fall:.2g} nats a task: it may not have converged. "
        + advice.get("steps", f"Train for more than {steps[-1]:g} steps.")
    ]


def last_step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """The last step that the log tells of; None where it tells of none."""
    return max((int(line["step"]) for line in log if _is_number(line.get("step"))), default=None)


def stopped_early(log: Sequence[Mapping[str, Any]], planned_steps: int | None) -> bool:
    """Whether the training made fewer steps than it was asked for, which is what patience does."""
    done = last_step(log)
    return planned_steps is not None and done is not None and done < planned_steps


def course(log: Sequence[Mapping[str, Any]], best_step: int | None, planned_steps: int | None, option: str = "") -> str:
    """How long the training went on, why it ended, and what was kept, in a line; "" where the log tells nothing.

    Args:
        log, best_step, planned_steps: as of :func:`~bayesmeta.report.build.write_report`. option: what sets the steps.
    """
    done = last_step(log)
    if done is None:
        return ""
    text = f"{done} step{'' if done == 1 else 's'}"
    if planned_steps is not None:
        limit = f"{option} {planned_steps}" if option else f"the {planned_steps} planned"
        text += f", stopped by patience before {limit}" if done < planned_steps else f", to the end of {limit}"
    if best_step is not None:
        text += f"; kept: step {best_step}" + (", the last" if best_step == done else "") + ", best on validation"
    return text


#: What the losses of a log are called.
NAMES = {"loss": "training loss", "validation": "loss on the validation tasks"}
_WHY = {
    "loss": "the training diverged.",
    "validation": "the method learned its training tasks by heart, or diverged.",
}
_ROSE = {
    "loss": "Try a smaller learning rate or clipped gradients.",
    "validation": "Try fewer steps, more tasks, a smaller model or a smaller learning rate.",
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
