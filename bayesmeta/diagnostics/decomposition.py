"""What of a forecast's uncertainty more data would take away: epistemic and aleatoric parts, of each task and point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.checks import check_same_tasks, in_words
from bayesmeta.diagnostics.information import elliptical
from bayesmeta.diagnostics.recalibrated import RecalibratedPosterior, class_log_likelihoods
from bayesmeta.errors import EmptyTaskError, NonFiniteDataError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior

#: Points of a task that are asked for together: the covariance of all would grow with their square.
_POINTS = 32


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Parts of the predictive uncertainty. Padding is NaN.

    Attributes:
        entropy: of the predictive, nats, ``[tasks, shots]``; of numbers a differential entropy, which may be negative.
        aleatoric_entropy: mean over φ of the entropy given φ: what is left when φ is known.
        mutual_information: their difference, between y and φ: what is epistemic. From draws of φ at most the log of
            their number.
        variance, aleatoric_variance, epistemic_variance: of numbers and counts, in the shape of y: of the predictive,
            mean over φ of the variance given φ, and variance over φ of the mean given φ. None for classes. An
            estimate of the epistemic part may be slightly below 0.
        num_draws: draws of φ; 1 for a point estimate, whose epistemic parts are exactly 0; 0 for a closed form.
    """

    entropy: Tensor
    aleatoric_entropy: Tensor
    mutual_information: Tensor
    variance: Tensor | None
    aleatoric_variance: Tensor | None
    epistemic_variance: Tensor | None
    num_draws: int

    def per_task(self, name: str) -> Tensor:
        """Mean of one of the parts over the points (and outputs) of each task, ``[tasks]``; NaN without points.

        Raises:
            OptionError: for a part that is not there.
        """
        value = getattr(self, name, None)
        if not isinstance(value, Tensor):
            known = ", ".join(k for k, v in vars(self).items() if isinstance(v, Tensor))
            raise OptionError(f"There is no part {name!r}; expected one of {known}.")
        return value.flatten(1).nanmean(-1)

    def __str__(self) -> str:
        first = self.per_task("entropy")
        how = {0: "closed form", 1: "one φ"}.get(self.num_draws, f"{self.num_draws} draws of φ")
        lines = [f"{'part':<20}{'mean':>10}{'± s.e.':>10}   of {int((~first.isnan()).sum())} tasks, {how}"]
        for name in (k for k, v in vars(self).items() if isinstance(v, Tensor)):
            each = self.per_task(name)
            each = each[~each.isnan()]
            error = f"{float(each.std()) / math.sqrt(len(each)):>10.4f}" if len(each) > 1 else ""
            lines.append(f"{name:<20}{float(each.mean()):>10.4f}{error}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        tasks, shots = self.entropy.shape
        return f"<Decomposition of {tasks} tasks of {shots} points>"


@torch.no_grad()
def decompose(
    posterior: Posterior,
    observations: Observations,
    *,
    num_samples: int = 200,
    num_outcomes: int = 100,
    generator: Seed = None,
) -> Decomposition:
    """Split the predictive uncertainty at some inputs into what φ explains and what is noise.

    Var y = E_φ Var(y | φ) + Var_φ E(y | φ), and H(y) = E_φ H(y | φ) + I(y; φ). Sources: A. Depeweg, J. M.
    Hernández-Lobato, F. Doshi-Velez, S. Udluft, "Decomposition of Uncertainty in Bayesian Deep Learning for Efficient
    and Risk-sensitive Learning", ICML 2018, https://arxiv.org/abs/1710.07283, eq. 3 and 5; of classes N. Houlsby, F.
    Huszár, Z. Ghahramani, M. Lengyel, "Bayesian Active Learning for Classification and Preference Learning", 2011,
    https://arxiv.org/abs/1112.5745, eq. 2.

    Where the joint predictive is a Normal, a Student-t or a mixture of them, the parts are those of the closed form
    (of the entropy of a mixture a mean over outcomes), and φ is what two labels at one point share: of a Gaussian
    process the function, of which its values at the support do not say enough elsewhere. Else it reads nothing but
    draws of φ, draws of y and log p(y | x, φ), and so is right for any likelihood. Of classes the entropies are exact
    sums given the draws of φ; of numbers they are means of log-densities over outcomes y, drawn evenly from the draws
    of φ. The variances come from two or more draws of y under each φ, as in an analysis of variance. A posterior made
    of particles is taken as it is, each particle once, so that one particle has a mutual information of 0.

    Args:
        posterior: any posterior, except a recalibrated one.
        observations: where to predict; y is not looked at, and its w is the support's.
        num_samples: draws of φ; of a posterior that is made of fewer, these.
        num_outcomes: draws of y for each point behind the entropies of numbers.
        generator: generator or seed; None means seed 0.

    Returns:
        The parts, in the units in which the posterior sees the data.

    Raises:
        OptionError: for fewer than 2 draws or outcomes.
        ShapeError: for other tasks than those of the posterior.
        EmptyTaskError: when no point is real.
        UnsupportedError: for a recalibrated posterior, whose φ no longer says what y is.
        NonFiniteDataError: for predictions that are not finite.
    """
    _check(posterior, observations, num_samples, num_outcomes)
    inputs = observations.with_y(None)
    generator = as_generator(generator, inputs.device, "decomposition")
    if posterior.target_kind == "real" and not posterior.is_point:
        exact = _closed_form(posterior, inputs, num_outcomes, generator)
        if exact is not None:
            return exact
    count = 1 if posterior.is_point else min(num_samples, posterior.num_draws or num_samples)
    draws = posterior.draws(count, generator)
    mask = inputs.full_mask()
    if posterior.target_kind == "class":
        total, noise = _class_entropies(posterior, inputs, draws)
        variances: list[Tensor] | None = None
    else:
        repeats = max(2, math.ceil(num_outcomes / count))
        with in_words():
            y = torch.stack([posterior.predict(inputs, draws=draws, generator=generator) for _ in range(repeats)])
        if not bool((torch.isfinite(y.reshape(repeats * count, *mask.shape, -1)).all(-1) | ~mask).all()):
            raise NonFiniteDataError("Some predictions are not finite; the adaptation has probably diverged.")
        total, noise = _entropies(posterior, inputs, draws, y, num_outcomes)
        variances = _variances(y.double())

    return _result(mask, total, noise, variances, count)


def _result(mask: Tensor, total: Tensor, noise: Tensor, variances: list[Tensor] | None, count: int) -> Decomposition:
    def kept(value: Tensor) -> Tensor:
        keep = mask if value.dim() == 2 else mask.unsqueeze(-1)
        return torch.where(keep, value, math.nan)

    variance, aleatoric, epistemic = (None, None, None) if variances is None else (kept(v) for v in variances)
    return Decomposition(kept(total), kept(noise), kept(total - noise), variance, aleatoric, epistemic, count)


def _closed_form(
    posterior: Posterior, inputs: Observations, num_outcomes: int, generator: torch.Generator
) -> Decomposition | None:
    """The parts of a joint predictive in closed form; None where there is none, or no finite variance."""
    parts = []
    for start in range(0, inputs.shots, _POINTS):
        joint = elliptical(posterior, inputs.points(slice(start, start + _POINTS)))
        total = None if joint is None else joint.covariance()
        if joint is None or total is None:
            return None
        factor = 1.0 if joint.df is None else (joint.df / (joint.df - 2)).unsqueeze(-1)
        aleatoric = (joint.log_weights.exp().unsqueeze(-1) * joint.noise * factor).sum(0)
        variance = total.diagonal(dim1=-2, dim2=-1)
        noise = joint.noise_entropy()
        parts.append((joint.entropy(num_outcomes, generator), noise, variance, aleatoric, variance - aleatoric))
    entropy, noise, *variances = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    mask = inputs.full_mask()
    finite = entropy.isfinite() & noise.isfinite() & torch.stack(variances).isfinite().all(0)
    if not bool((finite | ~mask).all()):
        raise NonFiniteDataError("Some predictions are not finite; the adaptation has probably diverged.")
    return _result(mask, entropy, noise, variances, 0)


def _check(posterior: Posterior, observations: Observations, num_samples: int, num_outcomes: int) -> None:
    if min(num_samples, num_outcomes) < 2:
        raise OptionError(f"num_samples={num_samples}, num_outcomes={num_outcomes}; expected at least 2 of each.")
    if isinstance(posterior, RecalibratedPosterior):
        raise UnsupportedError(
            "The uncertainty of a recalibrated posterior cannot be split: its correction belongs neither to φ nor to "
            "the noise. Split that of the posterior that was recalibrated."
        )
    check_same_tasks(posterior, observations)
    if not bool(observations.full_mask().any()):
        raise EmptyTaskError("No observation is real, so there is nothing to predict.")


def _variances(y: Tensor) -> list[Tensor]:
    """Total, aleatoric and epistemic variance from draws ``[repeats, n, …]``, unbiased; exact 0 for one φ."""
    repeats, count = y.shape[:2]
    within = y.var(0).mean(0)
    if count == 1:
        return [within, within, torch.zeros_like(within)]
    between = y.mean(0)
    # of the draws themselves, as they are the posterior: divided by n; its own noise is taken off
    epistemic = between.var(0, correction=0) - within * (1 - 1 / count) / repeats
    return [within + epistemic, within, epistemic]


def _entropies(
    posterior: Posterior, inputs: Observations, draws: Any, y: Tensor, num_outcomes: int
) -> tuple[Tensor, Tensor]:
    """H(y) and E H(y | φ) as means over outcomes, ``[tasks, shots]``."""
    count, flat = y.shape[1], y.flatten(0, 1)
    whole = num_outcomes - num_outcomes % count  # as many of each φ; or of evenly chosen φ one
    chosen = torch.arange(whole) if whole else (torch.arange(num_outcomes) * count) // num_outcomes
    total = noise = torch.zeros(inputs.x.shape[:2], dtype=torch.float64, device=inputs.device)
    for i in chosen.tolist():
        each = posterior.log_likelihood(inputs.with_y(flat[i]), draws=draws).double()
        total = total - (each.logsumexp(0) - math.log(count))
        noise = noise - each[i % count]
    return total / len(chosen), noise / len(chosen)


def _class_entropies(posterior: Posterior, inputs: Observations, draws: Any) -> tuple[Tensor, Tensor]:
    log_p = class_log_likelihoods(posterior, inputs, draws)  # [n, classes, tasks, shots]
    mean = log_p.logsumexp(0) - math.log(len(log_p))
    return torch.special.entr(mean.exp()).sum(0), torch.special.entr(log_p.exp()).sum(1).mean(0)
