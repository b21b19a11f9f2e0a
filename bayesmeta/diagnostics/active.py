"""Active choice: which point of each task to label next."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.checks import check_same_tasks, counted
from bayesmeta.diagnostics.forecasts import Predictor, check_finite
from bayesmeta.diagnostics.information import Elliptical, elliptical, greedy_mixture, greedy_normal
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
        real: tasks that are no padding, ``[tasks]``; None: all. Padding has gains of NaN, and its places mean nothing.
    """

    index: Tensor
    gains: Tensor
    criterion: Criterion
    closed_form: bool
    real: Tensor | None = None

    def take(self, candidates: Observations) -> Observations:
        """The chosen ones of the candidates, ``[tasks, size, …]``; those of padding tasks are masked."""
        chosen = pick(candidates, self.index)
        return chosen if self.real is None else replace(chosen, mask=counted(chosen, self.real))


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
    real: Tensor | None = None,
    generator: Seed = None,
) -> Choice:
    """Choose which points of each task to label next, all at once; :func:`~bayesmeta.learning_curve` re-adapts between.

    - ``"information"``: the mutual information I(y; φ) between labels and φ. The points of a choice share what they
      say: each next one is that of the largest I(y; φ | labels before it). Where the predictive is a joint Normal, in
      closed form, ½ log of predictive variance over noise variance; φ is then all that labels share, of a Gaussian
      process its function. Where it is a joint Student-t, or a mixture of either, from outcomes y and their density in
      closed form; φ is then also the component and the variance of the noise. Else from draws, as in
      :func:`~bayesmeta.decompose`, for any likelihood: of φ, and of outcomes y, by which draws of φ are reweighted. It
      sees no more than log(num_samples) nats, so that where a label says more, all points look alike.
    - ``"variance"``: the predictive variance, noise included, given the points before it (those of a Gaussian with the
      same covariance). Cheap, and the same choice for one Normal with the same noise everywhere; where the noise
      differs, it runs after noise.
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
        num_outcomes: outcomes behind an information without a closed form; by draws each takes ``size`` calls of the
            likelihood.
        real: tasks that are no padding, as ``batch.real_tasks()`` gives them; None: all. Padding needs no candidate.
        generator: generator or seed; None means seed 0.

    Raises:
        OptionError: for an unknown criterion, a size below 1, fewer than 2 draws or outcomes.
        EmptyTaskError: for a task with fewer candidates than ``size``.
        ShapeError: for other tasks than those of the posterior, and ``real`` of another shape.
        UnsupportedError: for the information of a point estimate, which has no φ to learn of, or of a recalibrated
            posterior; for the variance of classes, and of several outputs.
        NonFiniteDataError: for predictions that are not finite.
    """
    mask = _check(posterior, candidates, size, criterion, num_samples, num_outcomes, real)
    source = as_generator(generator, candidates.device, "active")
    found = _choose(posterior, candidates.with_y(None), mask, size, criterion, exact, num_samples, num_outcomes, source)
    return found if real is None else replace(found, real=real, gains=found.gains.where(real.unsqueeze(-1), math.nan))


def _choose(
    posterior: Posterior,
    inputs: Observations,
    mask: Tensor,
    size: int,
    criterion: Criterion,
    exact: bool,
    num_samples: int,
    num_outcomes: int,
    source: torch.Generator,
) -> Choice:
    if criterion == "random":
        order = torch.rand(mask.shape, generator=source, dtype=torch.float64, device=source.device).to(mask.device)
        index = order.masked_fill(~mask, -1.0).topk(size, -1).indices
        return Choice(index, torch.full(index.shape, math.nan, dtype=torch.float64), criterion, False)
    joint = elliptical(posterior, inputs) if exact else None
    if joint is not None:
        _check_joint(joint, mask)
    if criterion == "variance":
        closed = None if joint is None else joint.covariance()
        predictor = Predictor(posterior, 10 * num_samples, source)
        covariance = closed if closed is not None else _covariance(predictor.predict(inputs).double(), mask)
        index, variances = greedy_normal(covariance, mask, size, torch.ones_like(covariance[..., 0]))
        return Choice(index, variances, criterion, closed is not None)
    if joint is not None and joint.is_normal:
        index, ratios = greedy_normal(joint.scale[0], mask, size, joint.noise[0])
        return Choice(index, 0.5 * ratios.log(), criterion, True)
    if joint is not None:
        index, gains = greedy_mixture(joint, mask, size, num_outcomes, source)
        return Choice(index, gains, criterion, False)
    count = min(num_samples, posterior.num_draws or num_samples)
    return _by_draws(posterior, inputs, mask, size, posterior.draws(count, source), num_outcomes, source)


def _check(
    posterior: Posterior,
    candidates: Observations,
    size: int,
    criterion: str,
    num_samples: int,
    num_outcomes: int,
    real: Tensor | None,
) -> Tensor:
    """Which candidates may be chosen, ``[tasks, points]``."""
    if criterion not in get_args(Criterion):
        raise OptionError(f"criterion={criterion!r}; expected one of {', '.join(get_args(Criterion))}.")
    if size < 1:
        raise OptionError(f"size={size}; expected at least 1 point.")
    if min(num_samples, num_outcomes) < 2:
        raise OptionError(f"num_samples={num_samples}, num_outcomes={num_outcomes}; expected at least 2 of each.")
    check_same_tasks(posterior, candidates)
    mask = counted(candidates, real)
    if not bool(mask.any()):
        raise EmptyTaskError("No task has a candidate to choose.")
    short = mask.sum(-1) < size
    few = (short if real is None else short & real).nonzero().flatten()
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


# -- closed forms -------------------------------------------------------------------------------------------------


def _check_joint(joint: Elliptical, mask: Tensor) -> None:
    """Refuse a predictive that is not finite."""
    total = joint.loc.sum(0) + joint.scale.diagonal(dim1=-2, dim2=-1).sum(0)
    total = total + joint.log_weights.exp().sum(0).unsqueeze(-1)
    check_finite(total, mask, "predictive variance", [str(i) for i in range(len(mask))])


def _covariance(y: Tensor, mask: Tensor) -> Tensor:
    """Covariance of draws ``[n, tasks, points]`` over the draws, ``[tasks, points, points]``."""
    if y.dim() > 3:
        raise UnsupportedError("Several outputs have no one variance; use criterion='information'.")
    check_finite(y.sum(0), mask, "prediction", [str(i) for i in range(len(mask))])
    centred = y - y.mean(0)
    return torch.einsum("nti,ntj->tij", centred, centred) / (len(y) - 1)


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
