"""How much does the posterior of each task lean on the prior, and how much on the support? By power-scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.checks import real_tasks
from bayesmeta.diagnostics.forecasts import check_draws, check_finite, task_names
from bayesmeta.diagnostics.recalibrated import RecalibratedPosterior
from bayesmeta.errors import DataError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

#: What a posterior is found to lean on.
Diagnosis = Literal["prior-data conflict", "strong prior / weak likelihood", "none"]

#: Fewer leave too few weights to fit the tail of.
_LEAST_DRAWS = 100
_ADVICE: dict[Diagnosis, str] = {
    "prior-data conflict": "Support and learned prior pull apart: see bm.surprise for whether such tasks are to be "
    "expected; if they are not, try longer training, a wider prior or one with heavier tails.",
    "strong prior / weak likelihood": "What is said of φ is the prior's: more shots would teach more, and another "
    "prior would say something else.",
    "none": "The prior could be doubled or halved in strength without much change.",
}


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What scaling the prior or the likelihood of a task does to its posterior. Made by :func:`sensitivity`.

    All by name of the local sites, each ``[tasks, …]`` in the shape of the site.

    Attributes:
        prior, likelihood: how far the posterior moves when log p(φ | θ), or log p(S | φ), is multiplied by α:
            cumulative Jensen–Shannon distance per doubling of α, at α = 1. Above about 0.05 it is sensitive.
        prior_shift, likelihood_shift: change of the posterior mean per doubling of α, in posterior standard deviations.
        prior_spread, likelihood_spread: change of the logarithm of the posterior standard deviation per doubling.
        diagnoses: for each task, the worst of its φ: ``"prior-data conflict"`` (sensitive to both), ``"strong prior /
            weak likelihood"`` (to the prior alone) or ``"none"``.
        names: a name for each task.
        threshold: of sensitivity.
        finding: the commonest diagnosis of a φ, over all φ of all tasks.
        verdict: the shares of these in a sentence.
    """

    prior: dict[str, Tensor]
    likelihood: dict[str, Tensor]
    prior_shift: dict[str, Tensor]
    likelihood_shift: dict[str, Tensor]
    prior_spread: dict[str, Tensor]
    likelihood_spread: dict[str, Tensor]
    diagnoses: tuple[Diagnosis, ...]
    names: tuple[str, ...]
    threshold: float
    finding: Diagnosis
    verdict: str

    def conflict(self, name: str) -> Tensor:
        """Where a site is sensitive to prior and likelihood, bool ``[tasks, …]``."""
        return (self.prior[name] >= self.threshold) & (self.likelihood[name] >= self.threshold)

    def strong_prior(self, name: str) -> Tensor:
        """Where a site is sensitive to the prior alone, bool ``[tasks, …]``."""
        return (self.prior[name] > self.threshold) & (self.likelihood[name] < self.threshold)

    def __str__(self) -> str:
        width = max(6, *(len(name) for name in self.prior))
        lines = [self.verdict, f"{'median':<{width}}{'prior':>8}{'likelihood':>12}{'conflict':>10}{'strong prior':>14}"]
        for name in self.prior:
            conflict, strong = (float(f(name).double().mean()) for f in (self.conflict, self.strong_prior))
            prior, likelihood = float(self.prior[name].median()), float(self.likelihood[name].median())
            lines.append(f"{name:<{width}}{prior:>8.3f}{likelihood:>12.3f}{conflict:>10.0%}{strong:>14.0%}")
        return "\n".join(lines)


@torch.no_grad()
def sensitivity(
    posterior: Posterior,
    batch: TaskBatch | None = None,
    *,
    alphas: tuple[float, float] = (0.99, 1.01),
    threshold: float = 0.05,
    num_samples: int = 4000,
    generator: Seed = None,
) -> Sensitivity:
    """Sensitivity of each task's posterior to its prior and to its likelihood, by power-scaling.

    The prior p(φ | θ) of a task (or the likelihood p(S | φ) of its support) is raised to a power α a little below and
    above 1, by weights on the draws rather than by inference anew, and the distance of the weighted from the unweighted
    draws is taken for each φ. Source: N. Kallioinen, T. Paananen, P.-C. Bürkner, A. Vehtari, "Detecting and diagnosing
    prior and likelihood sensitivity with power-scaling", Statistics and Computing 34 (2024),
    https://arxiv.org/abs/2107.14054; powers, weights and threshold are those of ``arviz_stats``. Departure: given θ the
    tasks are independent, so a task's draws are weighted by its own prior and its own support. ``psense`` of ArviZ, on
    a tree of several tasks, weights them by the sum over all: noise from the others, which is wrong for φ. For θ's
    sites, which all tasks inform, that is the one to use, on the tree of a whole run. As there, densities are those of
    the sites' own values, without Jacobians.

    It describes and accuses nobody: a prior that was learned from many tasks is meant to say much about one with few
    shots, and some tasks lie far from its mean. Whether a task is unlike those of training is
    :func:`~bayesmeta.surprise`.

    Args:
        posterior: adapted to a support with targets. Its draws are taken as those of the exact posterior: see
            :func:`~bayesmeta.psis` first if they are not.
        batch: its names are used, and its padding tasks left out; else all tasks count.
        alphas: the two powers, below and above 1.
        threshold: of sensitivity, 0.05 in the source.
        num_samples: draws; of a posterior that is made of draws, all it has.
        generator: generator or seed; None means seed 0.

    Raises:
        UnsupportedError: for a point estimate, which nothing moves by weights, and a posterior without φ.
        OptionError: for powers that do not lie around 1, a threshold that is not positive, fewer than 100 draws.
        DataError: for a support without targets.
        NonFiniteDataError: for draws, or densities of them, that are not finite, naming the task.
        ShapeError, EmptyTaskError: for a batch of other tasks, or of nothing but padding.
    """
    real = real_tasks(posterior, batch)
    num_samples = _check(posterior, alphas, threshold, num_samples)
    draws = posterior.draws(num_samples, generator)
    names = task_names(batch) if batch is not None else [str(i) for i in range(posterior.num_tasks)]
    sites = {name: value for name, value in posterior.named(draws).items() if value.numel()}
    if not sites:
        raise UnsupportedError("This posterior has no φ by name whose sensitivity could be looked at.")
    check_draws(sites, real, names)
    values = {name: value[:, real].double().cpu().numpy() for name, value in sites.items()}
    each = posterior.log_likelihood(posterior.support, draws=draws).double()
    log_likelihood = torch.where(posterior.support.full_mask(), each, 0.0).sum(-1)
    parts = {"prior": posterior.log_prior(draws, jacobian=False).double(), "likelihood": log_likelihood}
    found = {}
    for part, log_p in parts.items():
        worst = log_p.sum(0)  # finite where all draws are
        check_finite(worst.unsqueeze(-1), real.unsqueeze(-1), f"log-density of the {part} at the draws", names)
        found[part] = _of_part(values, log_p[:, real].cpu().numpy(), alphas)
    kept = tuple(name for name, keep in zip(names, real.tolist(), strict=True) if keep)
    return _result(found, kept, threshold)


def _check(posterior: Posterior, alphas: tuple[float, float], threshold: float, num_samples: int) -> int:
    """Check the options; how many draws to take."""
    if len(alphas) != 2 or not 0.0 < alphas[0] < 1.0 < alphas[1] < math.inf:
        raise OptionError(f"alphas={alphas}; expected two powers, the one below and the other above 1.")
    if not threshold > 0.0:
        raise OptionError(f"threshold={threshold}; expected a positive number.")
    if posterior.is_point:
        raise UnsupportedError(
            "A point estimate has draws that are all the same, and no weights can move them. Use a method with a "
            "distribution, such as ABML or BayesianLastLayer; or adapt again with another prior, and compare."
        )
    if isinstance(posterior, RecalibratedPosterior):
        raise UnsupportedError(
            "A recalibrated posterior has no likelihood of φ to scale: only predictions were changed. Take its "
            ".posterior, the one that was recalibrated, whose φ it has."
        )
    if getattr(posterior, "loo_refusal", None) is not None:
        raise UnsupportedError("This posterior predicts from its support directly: there is no prior of φ to scale.")
    if posterior.support.y is None:
        raise DataError("Sensitivity to the likelihood needs the targets of the support; it has y=None.")
    num_samples = num_samples if posterior.num_draws is None else posterior.num_draws
    if num_samples < _LEAST_DRAWS:
        raise OptionError(f"{num_samples} draws; expected at least {_LEAST_DRAWS}, to fit the tail of their weights.")
    return num_samples


# -- power-scaling ------------------------------------------------------------------------------------------------

_Figures = dict[str, dict[str, Tensor]]


def _of_part(values: dict[str, np.ndarray], log_p: np.ndarray, alphas: tuple[float, float]) -> _Figures:
    """Distance, shift and spread of each site, ``[tasks, …]``, on scaling log densities ``[n, tasks]``."""
    figures: dict[str, dict[str, list[np.ndarray]]] = {kind: {name: [] for name in values} for kind in _KINDS}
    for task in range(log_p.shape[1]):
        weights = [_weights(log_p[:, task], alpha) for alpha in alphas]
        for name, value in values.items():
            flat = value[:, task].reshape(len(value), -1)
            for kind, figure in zip(_KINDS, _of_site(flat, weights, alphas), strict=True):
                figures[kind][name].append(figure.reshape(value.shape[2:]))
    return {
        kind: {name: torch.from_numpy(np.stack(each)) for name, each in by_name.items()}
        for kind, by_name in figures.items()
    }


_KINDS = ("distance", "shift", "spread")


def _weights(log_p: np.ndarray, alpha: float) -> np.ndarray:
    """Smoothed weights p^(α − 1) of the draws ``[n]``, which sum to 1."""
    from arviz_stats.base import array_stats

    if np.ptp(log_p) <= 1e-9 * (1.0 + np.abs(log_p).max()):  # a task without support: there is nothing to scale
        return np.full(len(log_p), 1.0 / len(log_p))
    log_weights = array_stats.power_scale_lw(log_p, alpha=alpha)
    weights: np.ndarray = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def _of_site(
    values: np.ndarray, weights: list[np.ndarray], alphas: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance, shift and spread per doubling of α of values ``[n, k]``, each ``[k]``."""
    low, high = (math.log2(alpha) for alpha in alphas)
    order = values.argsort(0, kind="stable")
    ordered = np.take_along_axis(values, order, 0)
    below, above = (_distance(ordered, each[order]) for each in weights)
    moments = [_moments(values, each) for each in weights]
    sd = values.std(0)
    moves = sd > 0
    safe = np.where(moves, sd, 1.0)
    shift = (moments[1][0] - moments[0][0]) / safe / (high - low)
    spread = np.log(np.where(moves, moments[1][1], 1.0) / np.where(moves, moments[0][1], 1.0)) / (high - low)
    return (above / high - below / low) / 2.0, shift, spread


def _moments(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = weights @ values
    return mean, np.sqrt(weights @ (values - mean) ** 2)


def _distance(ordered: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Cumulative Jensen–Shannon distance of ordered draws from the same ones weighted, ``[n, k]`` to ``[k]``.

    Of the distribution functions P and Q, or of their complements where those are further apart:
    √(∫ P log2(2P / (P + Q)) + Q log2(2Q / (P + Q)) dx / ∫ P + Q dx). The two halves have linear terms too, which cancel
    but keep each from being negative.
    """
    n = len(ordered)
    width = np.diff(ordered, axis=0)
    plain = np.linspace(1.0 / n, 1.0 - 1.0 / n, n - 1)[:, None]
    scaled = np.clip(weights.cumsum(0)[:-1], 0.0, 1.0)
    return np.maximum(_one_side(plain, scaled, width), _one_side(1.0 - plain, 1.0 - scaled, width))


def _one_side(p: np.ndarray, q: np.ndarray, width: np.ndarray) -> np.ndarray:
    middle = 0.5 * (p + q)
    linear = 0.5 / math.log(2.0) * (width * (q - p)).sum(0)
    halves = [(width * _xlog2(side, middle)).sum(0) for side in (p, q)]
    divergence = np.maximum(halves[0] + linear, 0.0) + np.maximum(halves[1] - linear, 0.0)
    bound = (width * (p + q)).sum(0)
    return np.sqrt(divergence / np.where(bound > 0, bound, 1.0))


def _xlog2(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x log2(x / y), 0 where x is."""
    positive = x > 0
    return np.where(positive, x * np.log2(np.where(positive, x, 1.0) / np.where(positive, y, 1.0)), 0.0)


# -- in words -----------------------------------------------------------------------------------------------------


def _result(found: dict[str, _Figures], names: tuple[str, ...], threshold: float) -> Sensitivity:
    prior, likelihood = (found[part]["distance"] for part in ("prior", "likelihood"))
    ours, data = (torch.cat([v.reshape(len(names), -1) for v in site.values()], 1) for site in (prior, likelihood))
    conflict, strong = (ours >= threshold) & (data >= threshold), (ours > threshold) & (data < threshold)
    kinds: tuple[Diagnosis, ...] = ("prior-data conflict", "strong prior / weak likelihood", "none")
    diagnoses = tuple(
        kinds[0] if c else kinds[1] if s else kinds[2]
        for c, s in zip(conflict.any(-1).tolist(), strong.any(-1).tolist(), strict=True)
    )
    share = [float(each.double().mean()) for each in (conflict, strong, ~(conflict | strong))]
    finding = kinds[max(range(3), key=share.__getitem__)]
    shares = ", ".join(f"{kind} in {value:.0%}" for kind, value in zip(kinds, share, strict=True))
    verdict = f"Of {ours.numel()} φ of {len(names)} task{'s' if len(names) > 1 else ''}: {shares}. {_ADVICE[finding]}"
    return Sensitivity(
        prior,
        likelihood,
        found["prior"]["shift"],
        found["likelihood"]["shift"],
        found["prior"]["spread"],
        found["likelihood"]["spread"],
        diagnoses,
        names,
        threshold,
        finding,
        verdict,
    )
