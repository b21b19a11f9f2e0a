"""Active choice: which point of each task to label next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.forecasts import Predictor, check_finite, check_same_tasks
from bayesmeta.diagnostics.recalibrated import RecalibratedPosterior
from bayesmeta.errors import EmptyTaskError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior

Criterion = Literal["information", "variance", "random"]


@dataclass(frozen=True, eq=False)
class Choice:
    """Points to label, of each task. Made by :func:`choose`.

    Attributes:
        index: places among the candidates, the most useful first, ``[tasks, size]``.
        gains: what each adds to those before it, ``[tasks, size]``: nats of information about φ, or the predictive
            variance given those before it; NaN for a random choice.
        criterion: what was asked for.
        closed_form: whether the gains are exact.
    """

    index: Tensor
    gains: Tensor
    criterion: Criterion
    closed_form: bool

    def take(self, candidates: Observations) -> Observations:
        """The chosen ones of the candidates, ``[tasks, size, …]``."""
        return pick(candidates, self.index)


def pick(observations: Observations, index: Tensor) -> Observations:
    """Some observations of each task, by their places ``[tasks, count]``."""

    def chosen(value: Tensor) -> Tensor:
        places = index.reshape(*index.shape, *(1,) * (value.dim() - 2)).expand(*index.shape, *value.shape[2:])
        return value.gather(1, places)

    y, mask = (None if v is None else chosen(v) for v in (observations.y, observations.mask))
    return Observations(chosen(observations.x), y, mask, observations.w)


@torch.no_grad()
def choose(
    posterior: Posterior,
    candidates: Observations,
    *,
    size: int = 1,
    criterion: Criterion = "information",
    exact: bool = True,
    num_samples: int = 100,
    num_outcomes: int = 100,
    generator: Seed = None,
) -> Choice:
    """Choose which points of each task to label next, all at once; :func:`~bayesmeta.learning_curve` re-adapts between.

    - ``"information"``: the mutual information I(y; φ) between labels and φ. The points of a choice share what they
      say: each next one is that of the largest I(y; φ | labels before it). Where the predictive is a joint Normal and
      the likelihood Gaussian with noise that φ does not change, in closed form, ½ log of predictive variance over noise
      variance. Else from draws, as in :func:`~bayesmeta.decompose`, for any likelihood: of φ, and of outcomes y, by
      which draws of φ are reweighted. It sees no more than log(num_samples) nats.
    - ``"variance"``: the predictive variance, noise included, given the points before it (those of a Gaussian with the
      same covariance). Cheap, and the same choice where the noise is the same everywhere; where it is not, it runs
      after noise.
    - ``"random"``: the control.

    Sources: D. V. Lindley, "On a measure of the information provided by an experiment", Annals of Mathematical
    Statistics 27 (1956); D. J. C. MacKay, "Information-based objective functions for active data selection", Neural
    Computation 4 (1992); of several points A. Kirsch, J. van Amersfoort, Y. Gal, "BatchBALD", NeurIPS 2019,
    https://arxiv.org/abs/1906.08158. Departure: outcomes of several points are drawn, for classes too, where BatchBALD
    sums over all while they are few. The greedy choice of information has at least 1 − 1/e of the best one's.

    Args:
        posterior: adapted to what is labelled so far.
        candidates: where labels could be had, ``[tasks, points]``; masked points cannot. y is not looked at.
        size: points for each task.
        criterion: see above.
        exact: take the closed form where there is one.
        num_samples: draws of φ; of a posterior that is made of fewer, these. A variance is of ten times as many.
        num_outcomes: outcomes behind an information without a closed form; each takes ``size`` calls of the likelihood.
        generator: generator or seed; None means seed 0.

    Raises:
        OptionError: for an unknown criterion, a size below 1, fewer than 2 draws or outcomes.
        EmptyTaskError: for a task with fewer candidates than ``size``.
        ShapeError: for other tasks than those of the posterior.
        UnsupportedError: for the information of a point estimate, which has no φ to learn of, or of a recalibrated
            posterior; for the variance of classes, and of several outputs.
        NonFiniteDataError: for predictions that are not finite.
    """
    mask = _check(posterior, candidates, size, criterion, num_samples, num_outcomes)
    source = as_generator(generator, candidates.device, "active")
    inputs = candidates.with_y(None)
    if criterion == "random":
        order = torch.rand(mask.shape, generator=source, dtype=torch.float64, device=source.device).to(mask.device)
        index = order.masked_fill(~mask, -1.0).topk(size, -1).indices
        return Choice(index, torch.full(index.shape, math.nan, dtype=torch.float64), criterion, False)
    closed = _joint(posterior, inputs) if exact else None
    if criterion == "variance":
        predictor = Predictor(posterior, 10 * num_samples, source)
        covariance = closed if closed is not None else _covariance(predictor.predict(inputs).double(), mask)
        index, variances = _greedy_gaussian(covariance, mask, size, torch.ones_like(covariance[..., 0]))
        return Choice(index, variances, criterion, closed is not None)
    noise = None if closed is None else _noise_variance(posterior, inputs, closed, mask, source)
    if closed is not None and noise is not None:
        index, ratios = _greedy_gaussian(closed, mask, size, noise)
        return Choice(index, 0.5 * ratios.log(), criterion, True)
    count = min(num_samples, posterior.num_draws or num_samples)
    return _by_draws(posterior, inputs, mask, size, posterior.draws(count, source), num_outcomes, source)


def _check(
    posterior: Posterior, candidates: Observations, size: int, criterion: str, num_samples: int, num_outcomes: int
) -> Tensor:
    """The mask of the candidates."""
    if criterion not in get_args(Criterion):
        raise OptionError(f"criterion={criterion!r}; expected one of {', '.join(get_args(Criterion))}.")
    if size < 1:
        raise OptionError(f"size={size}; expected at least 1 point.")
    if min(num_samples, num_outcomes) < 2:
        raise OptionError(f"num_samples={num_samples}, num_outcomes={num_outcomes}; expected at least 2 of each.")
    check_same_tasks(posterior, candidates)
    mask = candidates.full_mask()
    few = (mask.sum(-1) < size).nonzero().flatten()
    if len(few):
        task = int(few[0])
        raise EmptyTaskError(
            f"Task {task} (counted from 0) has {int(mask[task].sum())} candidate(s), but {size} are to be chosen."
        )
    if criterion == "information" and posterior.is_point:
        raise UnsupportedError(
            "A point estimate claims to know φ, so no label informs it. Use a method with a distribution, such as ABML "
            "or BayesianLastLayer, or criterion='random'."
        )
    if criterion == "information" and isinstance(posterior, RecalibratedPosterior):
        raise UnsupportedError("A recalibrated posterior has no likelihood of φ; choose by what was recalibrated.")
    if criterion == "variance" and posterior.target_kind == "class":
        raise UnsupportedError("The index of a class has no variance; use criterion='information'.")
    return mask


# -- Gaussian -----------------------------------------------------------------------------------------------------


def _joint(posterior: Posterior, inputs: Observations) -> Tensor | None:
    """Covariance of a joint Normal of each task's points, float64, ``[tasks, points, points]``; None without one."""
    joint = Predictor(posterior, 2, None).closed_form(inputs, joint=True)
    if not isinstance(joint, torch.distributions.MultivariateNormal) or joint.event_shape != (inputs.shots,):
        return None
    return joint.covariance_matrix.double()


def _noise_variance(
    posterior: Posterior, inputs: Observations, covariance: Tensor, mask: Tensor, source: torch.Generator
) -> Tensor | None:
    """Variance of y given φ, ``[tasks, points]``; None where the likelihood is not Gaussian, or φ changes it.

    Only the likelihood knows it. The log of a Gaussian density is a parabola in y, and its second difference over steps
    of h is −h² / variance: exact, whatever its mean; a second one, over twice the step, tells whether it is one.
    """
    mean = posterior.predictive(inputs, joint=True).mean
    step = covariance.diagonal(dim1=-2, dim2=-1).sqrt().to(mean.dtype)
    draws = posterior.draws(4, source)
    at = [posterior.log_likelihood(inputs.with_y(mean + k * step), draws=draws).double() for k in (-2, -1, 0, 1, 2)]
    near, far = (at[2 + k] + at[2 - k] - 2 * at[2] for k in (1, 2))
    variance = -step.double().square() / near
    keep = mask.expand(near.shape)
    tolerance = 1e-3 if mean.dtype == torch.float32 else 1e-6
    parabola = ((far / near / 4 - 1).abs() < tolerance)[keep].all()
    same = ((variance / variance[:1] - 1).abs() < tolerance)[keep].all()
    return variance.mean(0).where(mask, torch.ones_like(variance[0])) if bool(parabola and same) else None


def _covariance(y: Tensor, mask: Tensor) -> Tensor:
    """Covariance of draws ``[n, tasks, points]`` over the draws, ``[tasks, points, points]``."""
    if y.dim() > 3:
        raise UnsupportedError("Several outputs have no one variance; use criterion='information'.")
    check_finite(y.sum(0), mask, "prediction", [str(i) for i in range(len(mask))])
    centred = y - y.mean(0)
    return torch.einsum("nti,ntj->tij", centred, centred) / (len(y) - 1)


def _greedy_gaussian(covariance: Tensor, mask: Tensor, size: int, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Points of the largest variance over ``unit`` given those before, and these ratios, ``[tasks, size]`` each.

    By a pivoted Cholesky factorisation, O(points · size²) a task.
    """
    left = covariance.diagonal(dim1=-2, dim2=-1).clone()
    check_finite(left, mask, "predictive variance", [str(i) for i in range(len(mask))])
    rows: list[Tensor] = []
    open_, index, gains = mask.clone(), [], []
    for _ in range(size):
        ratio = (left / unit).masked_fill(~open_, -math.inf)
        gain, best = ratio.max(-1, keepdim=True)
        column = covariance.gather(1, best.unsqueeze(-1).expand(-1, 1, covariance.shape[-1])).squeeze(1)
        for row in rows:
            column = column - row * row.gather(1, best)
        row = column / left.gather(1, best).clamp(min=torch.finfo(left.dtype).tiny).sqrt()
        left = (left - row.square()).clamp(min=0.0)
        open_ = open_.scatter(1, best, False)
        rows.append(row)
        index.append(best)
        gains.append(gain)
    return torch.cat(index, 1), torch.cat(gains, 1)


# -- any likelihood, by draws -------------------------------------------------------------------------------------


def _by_draws(
    posterior: Posterior,
    inputs: Observations,
    mask: Tensor,
    size: int,
    draws: Any,
    num_outcomes: int,
    source: torch.Generator,
) -> Choice:
    """Greedy information from log p(y_j | φ_i) of outcomes y_j, each drawn under one of the φ_i.

    I(y_b; φ | y_A) is the mean over outcomes of log p(y_b | its own φ) − log p(y_b | y_A), the latter the mean
    likelihood over the draws weighted by their likelihoods of y_A.
    """
    y, owner = _outcomes(posterior, inputs, draws, num_outcomes, source)
    check_finite(y.double().sum(0), mask, "prediction", [str(i) for i in range(len(mask))])
    count = len(posterior.log_likelihood(inputs.with_y(y[0]), draws=draws))
    log_w = torch.zeros(
        len(y), count, len(mask), dtype=torch.float64, device=mask.device
    )  # of each y_A, over the draws
    open_ = mask.clone()
    index: list[Tensor] = []
    gains: list[Tensor] = []
    for _ in range(size):
        information = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        for j, i in enumerate(owner.tolist()):  # not all at once: the table of all outcomes and points may be large
            each = posterior.log_likelihood(inputs.with_y(y[j]), draws=draws).double()
            if index:
                log_w[j] += each.gather(2, index[-1].expand(count, -1, 1)).squeeze(-1)
            normalised = log_w[j] - log_w[j].logsumexp(0)
            information += each[i] - (each + normalised.unsqueeze(-1)).logsumexp(0)
        gain, best = (information / len(y)).masked_fill(~open_, -math.inf).max(-1, keepdim=True)
        open_ = open_.scatter(1, best, False)
        index.append(best)
        gains.append(gain)
    return Choice(torch.cat(index, 1), torch.cat(gains, 1), "information", False)


def _outcomes(
    posterior: Posterior, inputs: Observations, draws: Any, num_outcomes: int, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Joint draws of y at all points ``[outcomes, tasks, points, …]``, and which φ each comes from, evenly."""
    parts: list[Tensor] = []
    owners: list[Tensor] = []
    left = num_outcomes
    while left > 0:
        y = posterior.predict(inputs, draws=draws, generator=source)
        count = len(y)
        chosen = torch.arange(count) if left >= count else (torch.arange(left) * count) // left
        parts.append(y[chosen.to(y.device)])
        owners.append(chosen)
        left -= count
    return torch.cat(parts), torch.cat(owners)
