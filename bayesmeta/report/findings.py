"""What of a posterior goes into a report: which tasks to show, which parameters, and what must be warned of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.diagnostics.calibration import Calibration, ClassCalibration
from bayesmeta.diagnostics.scores import Scores
from bayesmeta.errors import BayesMetaError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior
from bayesmeta.report import alarms
from bayesmeta.report.alarms import Strangeness

#: Draws of φ for the forest plots, fewer where tasks × parameters are many.
DRAWS, _MOST_ELEMENTS, _LEAST_DRAWS = 500, 20_000_000, 20
#: Fewer tasks have standard errors that are themselves rough.
FEW_TASKS = 10
#: That no test accuses a forecast is good news only of so many tasks, and with a p-value of so much.
ENOUGH_TASKS, CLEAR = 30, 0.1


@dataclass(frozen=True)
class Chosen:
    """Tasks to show, by place in the batch; none appears twice.

    Attributes:
        best, worst: with the lowest and the highest NLL a point.
        surprising: of the others, those with the highest ``surprise``.
        surprise: −log evidence of each task's support, ``[tasks]``. Where that is not known, how far its query lies out
            in the tails of the forecasts, where 1 is to be expected; of classes, by how much the probability of the
            most probable class exceeds its hits.
        strange: what is known of the evidence.
    """

    best: list[int]
    worst: list[int]
    surprising: list[int]
    surprise: Tensor
    strange: Strangeness

    def all(self) -> list[int]:
        """Every task that is shown."""
        return [*self.worst, *self.surprising, *self.best]


def choose(
    scores: Scores, calibration: Calibration | ClassCalibration, each: int, strange: Strangeness | None = None
) -> Chosen:
    """Up to ``each`` tasks of each kind; of few tasks, the worst come first."""
    strange = Strangeness(None) if strange is None else strange
    nll = scores.per_task["nll"].cpu()
    surprise = strange.scores.cpu() if strange.scores is not None else _surprise(calibration).cpu()
    surprise = torch.where(nll.isnan(), math.nan, surprise)
    left = set((~nll.isnan()).nonzero().flatten().tolist())

    def take(value: Tensor) -> list[int]:
        known = [task for task in left if not math.isnan(float(value[task]))]  # no support, no surprise
        order = sorted(known, key=lambda task: (-float(value[task]), task))[:each]
        left.difference_update(order)
        return order

    worst = take(nll)
    surprising = take(surprise)
    return Chosen(take(-nll), worst, surprising, surprise, strange)


def _surprise(calibration: Calibration | ClassCalibration) -> Tensor:
    """Mean over a task's points of −log of the probability of an outcome at least as far out, ``[tasks]``."""
    if isinstance(calibration, ClassCalibration):
        return calibration.per_task["gap"]
    tail = 1.0 - (2.0 * calibration.pit - 1.0).abs()
    return (-tail.clamp(min=1e-300).log()).flatten(1).nanmean(-1)


@dataclass(frozen=True)
class Parameter:
    """Draws of a scalar task parameter.

    Attributes:
        name: with its place in the site, such as ``weights[3]``.
        draws: of the tasks shown, ``[n, tasks]``.
        prior: of the same tasks together, ``[m]``, or None.
    """

    name: str
    draws: np.ndarray
    prior: np.ndarray | None


def task_parameters(
    posterior: Posterior, tasks: Sequence[int], count: int, generator: Seed
) -> tuple[list[Parameter], str]:
    """The scalar parameters φ in which tasks differ most, compared with their width within a task; and a remark.

    Returns:
        Up to ``count`` parameters, and why there are none or what is missing ("" where nothing is).
    """
    chosen = torch.as_tensor(list(tasks))
    try:
        probe = posterior.named(posterior.draws(2, generator))
        size = sum(value[0].numel() for value in probe.values())
        if size == 0:
            return [], "This method has no task parameters by name."
        number = min(DRAWS, max(_LEAST_DRAWS, _MOST_ELEMENTS // size))
        flat = _scalars(posterior.named(posterior.draws(number, generator)), chosen)
    except BayesMetaError as error:
        return [], f"This posterior gives no task parameters: {error}"
    prior, remark = {}, ""
    try:
        prior = _scalars(posterior.named(posterior.prior_draws(number, generator)), chosen)
    except BayesMetaError as error:
        remark = f"The prior is not shown: {error}"
    between = {name: _contrast(value) for name, value in flat.items()}
    names = sorted(flat, key=lambda name: -between[name])[:count]
    found = [Parameter(n, flat[n], prior[n].reshape(-1) if n in prior else None) for n in names]
    return found, remark


def _contrast(draws: np.ndarray) -> float:
    """Spread of the tasks' medians over the mean spread within a task; without the latter, the former."""
    between, within = float(np.median(draws, 0).std()), float(draws.std(0).mean())
    return between / within if within > 1e-12 else between


def _scalars(named: Mapping[str, Tensor], tasks: Tensor) -> dict[str, np.ndarray]:
    """Each number of each site, ``[n, tasks]``."""
    out: dict[str, np.ndarray] = {}
    for name, value in named.items():
        part = value[:, tasks.to(value.device)].detach().double().cpu()
        flat = part.reshape(*part.shape[:2], -1).numpy()
        for k, place in enumerate(np.ndindex(*part.shape[2:])):
            out[f"{name}[{', '.join(map(str, place))}]" if place else name] = flat[..., k]
    return out


def global_parameters(posterior: Posterior, generator: Seed) -> dict[str, np.ndarray]:
    """Draws ``[n]`` of each number of θ that has a posterior; those that are points are left out."""
    named = posterior.named_theta(posterior.draws(DRAWS, generator))
    flat = _scalars({name: value.unsqueeze(1) for name, value in named.items()}, torch.zeros(1, dtype=torch.long))
    return {name: value[:, 0] for name, value in flat.items() if float(value.std()) > 0}


@dataclass(frozen=True)
class Gap:
    """By how much a baseline's NLL a point is higher, and its standard error: paired, where its tasks are known."""

    mean: float
    error: float

    @property
    def sure(self) -> bool:
        """Whether it is more than chance explains, to either side; never where the error is not known."""
        return abs(self.mean) > 2 * self.error


def gaps(mine: Scores, baselines: Mapping[str, Mapping[str, float]]) -> dict[str, Gap]:
    """Of each baseline; one that is no :class:`Scores` of the same tasks has no paired error."""
    out = {}
    for name, theirs in baselines.items():
        error = math.hypot(mine.to_dict().get("nll_se", math.nan), theirs.get("nll_se", math.nan))
        if isinstance(theirs, Scores):
            error = theirs.standard_errors.get("nll", math.nan)
            error = math.hypot(mine.standard_errors.get("nll", math.nan), error)
            if theirs.per_task["nll"].shape == mine.per_task["nll"].shape:
                each = theirs.per_task["nll"].cpu().double() - mine.per_task["nll"].cpu().double()
                each = each[~each.isnan()]
                error = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        out[name] = Gap(theirs["nll"] - mine["nll"], error)
    return out


def beaten_by(found: Mapping[str, Gap], advice: Mapping[str, str] | None = None) -> list[str]:
    """Warnings where a baseline's NLL a point is lower."""
    out = []
    for name, gap in found.items():
        if gap.mean < 0:
            sure = "by more than chance explains" if gap.sure else "though that may be chance"
            out.append(
                f"The baseline “{name}” has the lower NLL, by {-gap.mean:.2g} nats a point, {sure}: as it stands, "
                "learning from other tasks gains nothing over it. "
                + (advice or {}).get("baseline", "Try more training, other inputs, or another method.")
            )
    return out


#: Where coverage is told twice: of intervals, and of PIT values.
OF_COUNTS = (
    "Two coverages of counts are shown: that in the score table is of intervals whose ends are counts, which cover "
    "their level or more; that of the verdict is of randomised PIT values, which meets its level where forecasts are "
    "calibrated."
)


def verdict_in_words(
    verdict: Calibration | ClassCalibration, scores: Scores, advice: Mapping[str, str] | None = None
) -> str:
    """The verdict, with the advice that is given for its finding."""
    text = alarms.instead(verdict.verdict, (advice or {}).get(verdict.finding))
    return f"{text} {OF_COUNTS}" if scores.target_kind == "count" else text


def _bias(calibration: Calibration, advice: Mapping[str, str]) -> list[str]:
    """A warning where forecasts lie to one side of the outcomes, which the verdict may not say beside their width."""
    if not calibration["p_location"] < 0.01:
        return []
    above = torch.where(calibration.pit.isnan(), math.nan, (calibration.pit > 0.5).double()).flatten(1).nanmean(-1)
    above = above[~above.isnan()]
    mean, error = float(above.mean()), float(above.std()) / math.sqrt(len(above))
    side = "above" if mean > 0.5 else "below"
    share = mean if mean > 0.5 else 1 - mean
    return [
        f"Bias: {share:.0%} ± {error:.0%} of the outcomes lie {side} the middle of their forecast, where 50% would be "
        "expected. "
        + advice.get("bias", "Look for tasks unlike those of training; try bm.recalibrate with 'isotonic'.")
    ]


def warnings_of(
    scores: Scores,
    calibration: Calibration | ClassCalibration,
    posterior: Posterior,
    advice: Mapping[str, str] | None = None,
) -> list[str]:
    """What a reader must know before the figures are believed, in plain words; the verdict stands elsewhere."""
    out = []
    if scores.num_tasks < FEW_TASKS:
        out.append(
            f"Only {scores.num_tasks} task(s) were scored, so the standard errors are rough and calibration can hardly "
            "be judged. Score more tasks."
        )
    if posterior.is_point:
        out.append(
            "The method is a point estimate of each task's parameters: its intervals hold the noise of the "
            "observations and no doubt about the parameters."
        )
    if isinstance(calibration, ClassCalibration) or "calibration_error" not in calibration:
        return out
    out += _bias(calibration, advice or {})
    error, noise = calibration["calibration_error"], calibration["calibration_noise"]
    if calibration.finding == "calibrated" and noise > 0.1:
        out.append(
            f"The calibration error is {error:.2f}, and chance alone would give {noise:.2f}: with so few tasks only a "
            "gross error would be found."
        )
    return out
