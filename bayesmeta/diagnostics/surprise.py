"""Out of distribution: is a task, or a point of it, such as the tasks that were learned from?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.checks import check_same_tasks, counted, in_words
from bayesmeta.diagnostics.forecasts import Predictor, check_finite
from bayesmeta.diagnostics.recalibrated import RecalibratedPosterior
from bayesmeta.diagnostics.scores import log_density
from bayesmeta.errors import DataError, EmptyTaskError, OptionError, ShapeError, UnsupportedError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

#: With fewer effective draws neither a score nor its error can be trusted.
_FEW_DRAWS = 10


@dataclass(frozen=True, eq=False)
class Surprise:
    """How little tasks, or points, were to be expected: more is more surprising. Made by :func:`surprise`.

    Attributes:
        scores: nats; of tasks −log p(S | θ), ``[tasks]``; of points −log p(y | x, S, θ), ``[tasks, shots]``. NaN where
            there is no observation.
        errors: Monte Carlo standard error of each, to first order; 0 where the score is exact.
        effective_draws: (Σw)² / Σw² of the draws behind each score; infinite where it is exact. Below about 10, trust
            neither the score nor its error: take more draws.
        counts: observations of each task, ``[tasks]``; of points, how many were seen before.
        per_point: whether the scores of tasks are divided by their observations.
    """

    scores: Tensor
    errors: Tensor
    effective_draws: Tensor
    counts: Tensor
    per_point: bool = False

    def p_values(self, reference: Surprise) -> Tensor:
        """How likely a task (or a point) of the reference's kind is to be at least as surprising, as ``scores``.

        The reference are tasks that training has not seen. Of K of them (1 + Σ_k share_k) / (K + 1), with share_k the
        share of the task's scores that are at least as large: for a score of tasks 0 or 1. It is a conformal p-value:
        under the reference's own distribution it is at most α with a probability of at most α, however wrong the
        posterior is, and it is at least 1 / (K + 1). Source, of the points too: Y. Lee, R. F. Barber, R. Willett,
        "Distribution-free inference with hierarchical data", 2023, https://arxiv.org/abs/2306.06342.

        Args:
            reference: by the same method, of as many shots.

        Raises:
            OptionError: for scores of tasks against those of points, or tasks of other numbers of observations, which
                are not comparable unless ``per_point``.
            EmptyTaskError: for a reference without a score.
        """
        if self.scores.dim() != reference.scores.dim() or self.per_point != reference.per_point:
            raise OptionError("One of the two is of tasks, the other of points or per point; make both alike.")
        ours, theirs = (set(s.counts[s.counts > 0].tolist()) for s in (self, reference))
        if not self.per_point and self.scores.dim() == 1 and not ours <= theirs:
            raise OptionError(
                f"These tasks have {_numbers(ours)} observations, the reference {_numbers(theirs)}: the evidence of "
                "more observations is another number. Take validation tasks of as many shots, or per_point=True."
            )
        known = reference.scores.double().reshape(len(reference.scores), -1)
        valid = ~known.isnan()
        tasks = int(valid.any(-1).sum())
        if tasks == 0:
            raise EmptyTaskError("The reference has no score: it needs at least one task with observations.")
        weight = valid.double() / valid.sum(-1, keepdim=True).clamp(min=1)
        order = known[valid].argsort()
        ranked, above = known[valid][order], weight[valid][order].flip(0).cumsum(0).flip(0)
        above = torch.cat([above, above.new_zeros(1)])  # weight at and above each place
        place = torch.searchsorted(ranked, self.scores.double().contiguous())
        return torch.where(self.scores.isnan(), math.nan, (1.0 + above[place]) / (tasks + 1))

    def __str__(self) -> str:
        known = ~self.scores.isnan()
        scores, errors, effective = (v[known].double() for v in (self.scores, self.errors, self.effective_draws))
        what = "points" if self.scores.dim() == 2 else "tasks"
        unit = "nats an observation" if self.per_point else "nats"
        if not len(scores):
            return f"Surprise of no {what}: there is no observation."
        text = (
            f"Surprise of {len(scores)} {what}: median {float(scores.median()):.4g} {unit}, from "
            f"{float(scores.min()):.4g} to {float(scores.max()):.4g}"
        )
        if bool(effective.isinf().all()):
            return f"{text}; exact"
        weak = int((effective < _FEW_DRAWS).sum())
        text += f"; Monte Carlo error up to {float(errors.max()):.2g}"
        return f"{text}; {weak} with fewer than {_FEW_DRAWS} effective draws: take more" if weak else text

    def __repr__(self) -> str:
        return f"<{self}>"


@torch.no_grad()
def surprise(
    posterior: Posterior,
    observations: Observations | None = None,
    *,
    per_point: bool = False,
    exact: bool = True,
    num_samples: int = 1000,
    real: Tensor | None = None,
    generator: Seed = None,
) -> Surprise:
    """How surprising tasks are under the meta-learned prior, or points under the posterior.

    Of a whole task it is −log p(y_S | x_S, θ), the negative evidence of its support: what the prior, before it saw the
    task, expected of it. Where the posterior has a ``log_evidence``, that is it. Else, where it has a density q, from
    as many draws of q as of the prior, weighted by p(S, φ) / (½ q(φ) + ½ p(φ)) (the balance heuristic of E. Veach, L.
    J. Guibas, "Optimally combining sampling techniques for Monte Carlo rendering", SIGGRAPH 1995,
    https://doi.org/10.1145/218380.218498): as the prior takes part, no weight exceeds twice the likelihood, however
    narrow q is. Else from draws of the prior alone, which needs many where the support says much. Draws of θ, where it
    has a posterior, are averaged over.

    Of a point it is −log p(y | x, S, θ), from the predictive: the task's own points then decide what is expected.

    Args:
        posterior: adapted to the tasks in question.
        observations: points to judge, of the same tasks; None: the tasks themselves, by their support.
        per_point: divide the score of a task by its observations, so that those of many and few shots come closer; it
            is not then the same for them, only comparable.
        exact: take the closed form where there is one.
        num_samples: draws, where there is none.
        real: tasks that are no padding, as ``batch.real_tasks()`` gives them; None: all. The scores of padding are NaN.
        generator: generator or seed; None means seed 0.

    Returns:
        Scores in the units in which the posterior sees the data: a standardizer shifts them all alike.

    Raises:
        OptionError: for fewer than 2 draws, and ``per_point`` with points.
        DataError: for data without targets.
        ShapeError: for other tasks than those of the posterior, and ``real`` of another shape.
        EmptyTaskError: when no observation is real.
        UnsupportedError: for the tasks of a recalibrated posterior, whose likelihood is not that of φ.
        NonFiniteDataError: for NaN.
    """
    given = posterior.support if observations is None else observations
    check_same_tasks(posterior, given)
    if given.y is None:
        raise DataError("Surprise is about targets; these observations have y=None.")
    given.check()
    valid = counted(given, real)
    if not bool(valid.any()):
        raise EmptyTaskError("No observation is real, so there is nothing to be surprised about.")
    predictor = Predictor(posterior, num_samples, generator)
    if observations is not None:
        if per_point:
            raise OptionError("per_point=True is for whole tasks; points are scored one by one.")
        return _of_points(predictor, given, valid, exact)
    if isinstance(posterior, RecalibratedPosterior):
        raise UnsupportedError("A recalibrated posterior has no evidence; take the posterior that was recalibrated.")
    with in_words():
        log_p, errors, effective = _evidence(predictor, exact)
    counts = valid.sum(-1)
    known, names = torch.where(log_p == -math.inf, 0.0, log_p).unsqueeze(-1), [str(i) for i in range(len(counts))]
    check_finite(known, (counts > 0).unsqueeze(-1), "evidence", names)
    unit = torch.where(counts > 0, counts if per_point else 1.0, math.nan)
    return Surprise(-log_p / unit, errors / unit, effective, counts, per_point)


def _of_points(predictor: Predictor, points: Observations, valid: Tensor, exact: bool) -> Surprise:
    assert points.y is not None
    closed = predictor.closed_form(points) if exact else None
    if closed is not None:
        log_p = log_density(closed, points.y).expand(valid.shape)
        errors, effective = torch.zeros_like(log_p), torch.full_like(log_p, math.inf)
    else:
        log_p, errors, effective = log_mean(predictor.log_likelihood(points))
    check_finite(torch.where(log_p == -math.inf, 0.0, log_p), valid, "log score", [str(i) for i in range(len(valid))])
    seen = predictor.posterior.support.full_mask().sum(-1)
    scores, errors, effective = (torch.where(valid, v, math.nan) for v in (-log_p, errors, effective))
    return Surprise(scores, errors, effective, seen)


def _evidence(predictor: Predictor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log p(S), its error and the effective draws, ``[tasks]``, float64."""
    posterior = predictor.posterior
    closed = getattr(posterior, "log_evidence", None) if exact else None
    if isinstance(closed, Tensor):
        log_p = closed.detach().double()
        return log_p, torch.zeros_like(log_p), torch.full_like(log_p, math.inf)
    half = max(predictor.num_samples // 2, 2)
    ours = None if posterior.is_point else _weights(Predictor(posterior, half, predictor.generator))
    if ours is not None:
        prior = _weights(Predictor(posterior, half, predictor.generator, prior=True))
        if prior is not None:
            return log_mean(ours, prior)
    prior_alone = Predictor(posterior, predictor.num_samples, predictor.generator, prior=True)
    return log_mean(_log_likelihood(prior_alone))


def _log_likelihood(predictor: Predictor) -> Tensor:
    """log p(S | φ) under each draw, ``[n, tasks]``."""
    support = predictor.posterior.support
    each = predictor.log_likelihood(support)
    return torch.where(support.full_mask(), each, 0.0).sum(-1)


def _weights(predictor: Predictor) -> Tensor | None:
    """log of p(S | φ) p(φ) / (½ q(φ) + ½ p(φ)) under each draw, ``[n, tasks]``; None where q has no density."""
    posterior, draws = predictor.posterior, predictor.draws
    density = getattr(posterior, "log_prob", None)
    varying = any(bool((v != v[:1]).any()) for v in posterior.named_theta(draws).values())
    if density is None or varying or not hasattr(draws, "u") or getattr(posterior, "loo_refusal", None) is not None:
        return None
    try:
        log_q = density(draws.u).double()
    except UnsupportedError:
        return None
    log_prior = posterior.log_prior(draws).double()
    mixture = torch.logaddexp(log_q, log_prior) - math.log(2.0)
    return _log_likelihood(predictor) + log_prior - mixture


def log_mean(*strata: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log of the mean of weights given by their logs ``[n, …]``, its standard error, and the effective draws.

    Several strata of one length are means of their own; the result is that of all.
    """
    together = torch.cat(strata)
    n = len(together)
    log_mean = together.logsumexp(0) - math.log(n)
    scaled = [(part - log_mean).exp() for part in strata]  # weights of mean 1
    variance = torch.stack([part.var(0) * len(part) for part in scaled]).sum(0) / n**2
    effective = n**2 / torch.cat(scaled).square().sum(0)
    dead = log_mean == -math.inf  # no draw has any weight
    return log_mean, variance.sqrt().masked_fill(dead, math.inf), effective.masked_fill(dead, 0.0)


def _numbers(values: set[int]) -> str:
    ordered = sorted(values)
    return ", ".join(str(v) for v in ordered[:5]) + (", …" if len(ordered) > 5 else "")


# -- telling two kinds of tasks apart -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ROC:
    """How well a score tells what is out of distribution from what is in it. Made by :func:`roc`.

    Attributes:
        auroc: probability that something outside has the larger score than something inside; ties count half.
        standard_error: of it, over tasks; NaN for fewer than two tasks on a side.
        false_positive_rate, true_positive_rate: the curve, from (0, 0) to (1, 1): the shares inside and outside whose
            score is at least each threshold.
        thresholds: falling; the first is infinite.
        num_inside, num_outside: tasks that count.
        placements: of each score inside the share outside that is above it, and of each one outside the share inside
            that is below it, ties half, in the shape of the scores; NaN where there is none. Their means are the area.
    """

    auroc: float
    standard_error: float
    false_positive_rate: Tensor
    true_positive_rate: Tensor
    thresholds: Tensor
    num_inside: int
    num_outside: int
    placements: tuple[Tensor, Tensor]

    def difference(self, other: ROC) -> tuple[float, float]:
        """Area less that of another score of the very same tasks, and its standard error over tasks.

        Paired, as in DeLong et al. (1988): what is easy or hard for both scores does not count, so that it is smaller
        than the two errors suggest.

        Args:
            other: of the same scores inside and outside, in the same order.

        Raises:
            ShapeError: if the two are not of the same tasks or points.
        """
        variance = 0.0
        for side, ours, theirs in zip(("inside", "outside"), self.placements, other.placements, strict=True):
            if ours.shape != theirs.shape or not bool((ours.isnan() == theirs.isnan()).all()):
                raise ShapeError(
                    f"The two are of different scores {side}: {list(ours.shape)} and {list(theirs.shape)}, of which "
                    f"{int((~ours.isnan()).sum())} and {int((~theirs.isnan()).sum())} count; give both the same tasks."
                )
            variance += _clustered(ours - theirs)
        return self.auroc - other.auroc, math.sqrt(variance)

    def false_positives_at(self, rate: float = 0.95) -> float:
        """Share inside that is flagged by the highest threshold that flags at least ``rate`` of those outside."""
        if not 0.0 < rate <= 1.0:
            raise OptionError(f"rate={rate}; expected a number above 0 and at most 1.")
        reached = (self.true_positive_rate >= rate - 1e-12).nonzero()[0, 0]
        return float(self.false_positive_rate[reached])

    def __str__(self) -> str:
        return (
            f"AUROC {self.auroc:.4f} ± {self.standard_error:.4f} ({self.num_inside} tasks inside, {self.num_outside} "
            f"outside); {self.false_positives_at():.1%} inside are flagged with 95% of those outside"
        )

    def __repr__(self) -> str:
        return f"<ROC: {self}>"


def roc(inside: Surprise | Tensor, outside: Surprise | Tensor) -> ROC:
    """The receiver operating characteristic of a score of surprise.

    The standard error is that of E. R. DeLong, D. M. DeLong, D. L. Clarke-Pearson, "Comparing the areas under two or
    more correlated receiver operating characteristic curves: a nonparametric approach", Biometrics 44 (1988),
    https://doi.org/10.2307/2531595; for points, that of N. A. Obuchowski, "Nonparametric analysis of clustered ROC
    curve data", Biometrics 53 (1997), https://doi.org/10.2307/2533958, with tasks as the clusters, of which none is on
    both sides: with one point a task they are the same.

    Args:
        inside: scores of tasks ``[tasks]`` or points ``[tasks, points]`` of the known kind; NaN does not count.
        outside: likewise of another kind.

    Raises:
        ShapeError: for other shapes.
        EmptyTaskError: for a side without a score.
    """
    sides = [s.scores if isinstance(s, Surprise) else s for s in (inside, outside)]
    for name, side in zip(("inside", "outside"), sides, strict=True):
        if not isinstance(side, Tensor) or side.dim() not in (1, 2):
            shape = list(side.shape) if isinstance(side, Tensor) else type(side).__name__
            raise ShapeError(f"The scores {name} are {shape}; expected [tasks], or [tasks, points].")
        if not bool((~side.isnan()).any()):
            raise EmptyTaskError(f"There is no score {name}; expected at least one.")
    low, high = (side.detach().double().cpu().reshape(len(side), -1) for side in sides)
    kept_low, kept_high = (side[~side.isnan()].sort().values for side in (low, high))
    below = _placement(high, kept_low)  # share of the inside that each outside one exceeds
    above = 1.0 - _placement(low, kept_high)
    auroc = float(below.nanmean())
    error = math.sqrt(_clustered(below) + _clustered(above))
    levels = torch.cat([kept_low, kept_high]).unique().flip(0)
    thresholds = torch.cat([levels.new_tensor([math.inf]), levels])
    fpr, tpr = (1.0 - torch.searchsorted(side, thresholds) / len(side) for side in (kept_low, kept_high))
    fpr[0] = tpr[0] = 0.0  # above all, also where a score is infinite
    sizes = [int((~side.isnan()).any(-1).sum()) for side in (low, high)]
    placements = (above.reshape(sides[0].shape), below.reshape(sides[1].shape))
    return ROC(auroc, error, fpr.double(), tpr.double(), thresholds, sizes[0], sizes[1], placements)


def _placement(values: Tensor, others: Tensor) -> Tensor:
    """Share of the sorted others below each value, ties half; NaN for NaN."""
    values = values.contiguous()
    left, right = (torch.searchsorted(others, values, right=right) for right in (False, True))
    return torch.where(values.isnan(), math.nan, 0.5 * (left + right).double() / len(others))


def _clustered(placement: Tensor) -> float:
    """Variance of the mean of one side's placements, with rows as clusters; NaN for one of them."""
    placement = placement.reshape(len(placement), -1)
    valid = ~placement.isnan()
    tasks = int(valid.any(-1).sum())
    if tasks < 2:
        return math.nan
    sums = (placement - placement.nanmean()).nansum(-1)
    return float(sums.square().sum()) * tasks / (tasks - 1) / int(valid.sum()) ** 2
