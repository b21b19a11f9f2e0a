"""Can an approximate posterior be trusted? Pareto-smoothed importance weights of its own draws."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.checks import real_tasks
from bayesmeta.diagnostics.forecasts import check_draws, task_names
from bayesmeta.diagnostics.importance import LogRatios, log_ratios
from bayesmeta.diagnostics.recalibrated import RecalibratedPosterior
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

#: What draws of an approximate posterior are good for: as they are, with their weights, or for nothing.
TrustFinding = Literal["good", "usable", "bad"]

#: Fewer leave too few weights (a fifth) to fit the tail of.
_LEAST_DRAWS = 100
#: Below this k the weights have a finite variance.
_FINITE_VARIANCE = 0.5
#: Share of effective draws from which on means of the draws are off by at most √(1 / 0.9 − 1) = 1/3 of a deviation.
_ENOUGH = 0.9
#: Rounding of the log-densities, in nats, beyond which their ratios mean nothing.
_COARSE = 0.5
#: Share of the tasks that must reach a finding for the whole to have it.
_MOST = 0.95
_SAYS = {
    "good": "the draws can be used as they are.",
    "usable": "use the weighted estimates; the draws as they are are somewhat off.",
    "bad": "neither the draws nor their weighted estimates can be relied on. Take a richer posterior (full instead of "
    "diagonal, a flow), more steps, or NUTS; bm.sbc_method says which way it errs.",
}


@dataclass(frozen=True, eq=False)
class PSIS:
    """What the draws of an approximate posterior are worth under the exact one. Made by :func:`psis`.

    Where ``joint``, one weight belongs to a draw of θ and of all tasks together, and ``[tasks]`` below is ``[1]``.

    Attributes:
        pareto_k: shape of the tail of the importance ratios p(S, φ) / q(φ), ``[tasks]``; −∞ where the ratios are all
            the same, as of an exact posterior, and ∞ where no draw has any weight.
        threshold: min(1 − 1 / log10(num_samples), 0.7): above it weighted estimates cannot be relied on.
        log_weights: smoothed and normalised over the draws, ``[n, tasks]``.
        effective_draws: (Σ w)² / Σ w², ``[tasks]``: n for an exact posterior.
        means, sds: of the draws as they are, by name of the sites, each ``[tasks, …]``; θ's sites, which are there
            where ``joint``, without tasks.
        weighted_means, weighted_sds: of the weighted draws: estimates of the exact posterior's.
        findings: for each task ``"good"`` (k up to 0.5 and at least 90% effective draws), ``"usable"`` (k up to the
            threshold) or ``"bad"``.
        names: a name for each task; where ``joint``, one for the whole.
        num_samples: draws n.
        joint: see above.
        share_bad: share of the tasks with a k above the threshold.
        finding: the best that at least 95% of the tasks reach.
        verdict: the finding in a sentence.
    """

    pareto_k: Tensor
    threshold: float
    log_weights: Tensor
    effective_draws: Tensor
    means: dict[str, Tensor]
    sds: dict[str, Tensor]
    weighted_means: dict[str, Tensor]
    weighted_sds: dict[str, Tensor]
    findings: tuple[TrustFinding, ...]
    names: tuple[str, ...]
    num_samples: int
    joint: bool
    share_bad: float
    finding: TrustFinding
    verdict: str

    def __str__(self) -> str:
        k, size = self.pareto_k, max(6, *(len(name) for name in self.names))
        order = k.argsort(descending=True).tolist()
        lines = [self.verdict, f"{'':<{size}}{'Pareto k':>10}{'effective':>11}   of {self.num_samples} draws"]
        for i in order[:5]:
            effective = float(self.effective_draws[i])
            line = f"{self.names[i]:<{size}}{self._k(float(k[i]), effective):>10}{effective:>11.0f}"
            lines.append(f"{line}   {self.findings[i]}")
        if len(order) > 5:
            shown = self._k(float(k.median()), float(self.effective_draws.median()))
            median = f"{shown:>10}{float(self.effective_draws.median()):>11.0f}"
            lines.append(f"{'median':<{size}}{median}   of {len(order)} tasks; above: the worst")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<PSIS: {self.verdict}>"

    def _k(self, k: float, effective: float) -> str:
        """A Pareto k in a column: −∞ and ∞ in words."""
        if math.isfinite(k):
            return f"{k:.2f}"
        return "infinite" if k > 0 else "exact" if _equal(k, effective, self.num_samples) else "no tail"


def _equal(k: float, effective: float, n: int) -> bool:
    """Whether the weights are all the same, but for rounding: those of an exact posterior."""
    return k == -math.inf and effective > (1.0 - 1e-3) * n


@torch.no_grad()
def psis(
    posterior: Posterior, batch: TaskBatch | None = None, *, num_samples: int = 4000, generator: Seed = None
) -> PSIS:
    """Judge an approximate posterior by the importance ratios of its own draws.

    The ratios r = p(S, φ | θ) / q(φ) of draws φ ~ q would all be the same if q were exact. A generalised Pareto
    distribution is fitted to the largest of them, and its shape k says how far their tail reaches: up to 0.5 they have
    a variance, up to 0.7 estimates weighted by their smoothed values are still reliable, above nothing is. Source: Y.
    Yao, A. Vehtari, D. Simpson, A. Gelman, "Yes, but Did It Work?: Evaluating Variational Inference", ICML 2018,
    https://arxiv.org/abs/1802.02538, algorithm 1; the fit and the smoothing are those of ``arviz_stats``, the threshold
    for few draws that of A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, "Pareto Smoothed Importance Sampling",
    JMLR 25 (2024), https://arxiv.org/abs/1507.02646. The error of k itself is about (1 + k) / √tail, 0.11 with 4000
    draws: tasks near the threshold fall to either side of it.

    By task, with θ held fixed: given θ the tasks are independent. A posterior that knows the density of its draws of θ
    and of all tasks together (a :class:`~bayesmeta.MetaSVI` run) is judged as a whole, with one k.

    **A small k is no proof.** It speaks of what the draws have seen: a mode that q does not know leaves no trace in
    them. A q that is too wide has a small k too, since its weights are bounded; here is the one departure from the
    paper: to be called ``"good"`` a task needs also effective draws of at least 90% of all. With a share e of them no
    mean (of φ, or of any function of it) is off by more than √(1/e − 1) standard deviations of the draws, as 1/e − 1
    estimates the χ² divergence. And k is that of φ as a whole, which of many dimensions is large before any one of
    them is far off.

    Args:
        posterior: adapted to a support with targets.
        batch: its names are used, and its padding tasks left out; else all tasks count.
        num_samples: draws; of a posterior that is made of draws with known densities, all it has.
        generator: generator or seed; None means seed 0.

    Raises:
        UnsupportedError: for a point estimate, for particles and chains, and for a posterior that mixes over draws of
            θ.
        OptionError: for fewer than 100 draws.
        ShapeError, DataError, EmptyTaskError: for a batch of other tasks, a support without targets, densities that
            are NaN, and a batch of nothing but padding.
        NonFiniteDataError: for draws that are not finite, as of an adaptation that has diverged.
    """
    real = real_tasks(posterior, batch)
    if posterior.is_point:
        raise UnsupportedError(
            "A point estimate has no density, so there is no tail of weights to look at. Use a method with a "
            "distribution, such as ABML, Laplace or Amortised; or judge its forecasts with bm.calibration."
        )
    num_samples = num_samples if posterior.num_draws is None else posterior.num_draws
    if num_samples < _LEAST_DRAWS:
        raise OptionError(f"{num_samples} draws; expected at least {_LEAST_DRAWS}, to fit the tail of their weights.")
    draws = posterior.draws(num_samples, generator)
    names = task_names(batch) if batch is not None else [str(i) for i in range(posterior.num_tasks)]
    sites = posterior.named(draws)
    check_draws(sites, real, names)
    ratios = log_ratios(posterior, posterior.support, draws)
    if ratios is None:
        raise UnsupportedError(_refusal(posterior, draws))
    names = ["all tasks"] if ratios.joint else [name for name, keep in zip(names, real.tolist(), strict=True) if keep]
    rows = slice(None) if ratios.joint else real
    smoothed, k = _smooth(ratios, posterior.support.x.dtype)
    log_weights, k = smoothed[:, rows], k[rows]
    values = {name: value[:, real].double() for name, value in sites.items()}
    shared = {name: v.double() for name, v in posterior.named_theta(draws).items()} if ratios.joint else {}
    return _result(log_weights, k, values, shared, tuple(names), ratios.joint)


def _refusal(posterior: Posterior, draws: Any) -> str:
    if isinstance(posterior, RecalibratedPosterior):
        return (
            "A recalibrated posterior has no importance ratios: its predictions are not the likelihood that φ was "
            "conditioned on. Take its .posterior, the one that was recalibrated, whose φ it has."
        )
    if getattr(posterior, "loo_refusal", None) is not None:
        return "This posterior predicts from its support directly: there is no φ whose density could be judged."
    if posterior.num_draws is not None:
        return (
            f"A {type(posterior).__name__} is made of draws whose density is not known, so they have no importance "
            "ratios. Of Markov chains look at posterior.diagnostics(); particles and samples have bm.sbc_method."
        )
    if any(bool((v != v[:1]).any()) for v in posterior.named_theta(draws).values()):
        return (
            "This posterior mixes over draws of θ's sites, and the density of θ given the support is not known. Use "
            "global_guide='point', or judge θ and φ together by the posterior of a MetaSVI run."
        )
    return (
        f"A {type(posterior).__name__} has no density of φ that could be compared with p(S, φ). Use a method that has "
        "one, such as ABML, Laplace or Amortised."
    )


def _smooth(ratios: LogRatios, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Smoothed log weights ``[n, tasks]``, normalised, and k ``[tasks]``; of joint ratios with one task."""
    values = ratios.values.reshape(len(ratios.values), -1).cpu()
    log_p = ratios.log_p.reshape(values.shape).cpu()
    # in nats, of the draws in the tail: densities are sums of many terms
    heavy = values.topk(min(tail_size(len(values)), len(values)), dim=0).indices
    size = log_p.gather(0, heavy).abs().nan_to_num(posinf=0.0).amax(0)
    rounding = 30.0 * torch.finfo(dtype).eps * (1.0 + size)
    if bool((rounding > _COARSE).any()):
        warnings.warn(
            f"Log-densities of {float(size.max()):.3g} are rounded to {float(rounding.max()):.2g} nats in {dtype}: the "
            "importance ratios may be nothing but rounding. Take model and data in float64 (.double()).",
            UserWarning,
            stacklevel=3,
        )
    weights, shapes = [], []
    for task in range(values.shape[1]):
        smoothed, k = _smooth_one(values[:, task], float(rounding[task]))
        weights.append(smoothed - smoothed.logsumexp(0))
        shapes.append(k)
    device = ratios.values.device
    return torch.stack(weights, 1).to(device), torch.tensor(shapes, dtype=torch.float64, device=device)


def tail_size(draws: int) -> int:
    """How many of the largest weights the Pareto distribution is fitted to, less one."""
    return max(draws // 5, 5) if draws <= 225 else int(3.0 * math.sqrt(draws))


def _smooth_one(values: Tensor, rounding: float) -> tuple[Tensor, float]:
    """Smoothed log weights of one task ``[n]``, not normalised, and k."""
    from arviz_stats.base import array_stats

    largest = values.topk(tail_size(len(values)) + 1).values
    if not bool(largest[0].isfinite()):
        return torch.zeros_like(values), math.inf  # no draw has weight, or one has all
    if not bool(largest.isfinite().all()):
        return values, math.inf  # so few have weight that they have no tail
    if float(largest[0] - largest[-2]) <= rounding:
        constant = float(values.max() - values.min()) <= rounding
        return (torch.zeros_like(values) if constant else values), -math.inf  # bounded, and reached by many
    with np.errstate(all="ignore"):
        smoothed, k = array_stats.psislw(-values.numpy(), axis=0)
    smoothed, k = np.asarray(smoothed), float(k)
    if not math.isfinite(k) or np.isnan(smoothed).any():
        return values, math.inf  # the fit has failed: most of the tail is one value
    return torch.from_numpy(smoothed), k


def _result(
    log_weights: Tensor,
    k: Tensor,
    values: dict[str, Tensor],
    shared: dict[str, Tensor],
    names: tuple[str, ...],
    joint: bool,
) -> PSIS:
    n = len(log_weights)
    weights = log_weights.exp()
    effective = 1.0 / weights.square().sum(0)
    threshold = min(1.0 - 1.0 / math.log10(n), 0.7)
    good = (k <= min(_FINITE_VARIANCE, threshold)) & (effective >= _ENOUGH * n)
    usable = k <= threshold
    findings: tuple[TrustFinding, ...] = tuple(
        "good" if g else "usable" if u else "bad" for g, u in zip(good.tolist(), usable.tolist(), strict=True)
    )
    enough = _MOST * len(k) - 1e-9
    finding: TrustFinding = "good" if good.sum() >= enough else "usable" if usable.sum() >= enough else "bad"
    equal = torch.full_like(weights[:, :1], 1.0 / n)
    raw, corrected = (
        {name: _moments(v, w) for name, v in values.items()}
        | {name: _moments(v, w[:, 0]) for name, v in shared.items()}
        for w in (equal, weights)
    )
    share = float((k > threshold).double().mean())
    return PSIS(
        k,
        threshold,
        log_weights,
        effective,
        {name: mean for name, (mean, _) in raw.items()},
        {name: sd for name, (_, sd) in raw.items()},
        {name: mean for name, (mean, _) in corrected.items()},
        {name: sd for name, (_, sd) in corrected.items()},
        findings,
        names,
        n,
        joint,
        share,
        finding,
        _say(k, threshold, effective, n, share, finding, joint),
    )


def _moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the draws ``[n, …]``, by weights ``[n]``, ``[n, 1]`` or ``[n, tasks]``."""
    weights = weights.reshape(*weights.shape, *[1] * (values.dim() - weights.dim()))
    mean = (weights * values).sum(0)
    return mean, (weights * (values - mean).square()).sum(0).sqrt()


def _say(
    k: Tensor, threshold: float, effective: Tensor, n: int, share: float, finding: TrustFinding, joint: bool
) -> str:
    middle, median = float(k.median()), float(effective.median())
    size = f"{middle:.2f}"
    if not math.isfinite(middle):
        size = "infinite" if middle > 0 else "none, as the weights have no tail"
        size = "exact: all weights equal" if _equal(middle, median, n) else size
    if joint:
        head = f"Pareto k of θ and φ together is {size} (threshold {threshold:.2f})"
    else:
        tasks = f"{len(k)} task{'s' if len(k) > 1 else ''}"
        head = f"Pareto k is above {threshold:.2f} in {share:.0%} of {tasks} (median {size})"
    return f"{head}, with {median / n:.0%} effective draws: {finding}; {_SAYS[finding]}"
