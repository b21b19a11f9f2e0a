"""Importance weights of an approximate posterior: what its own draws are worth under the true one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, UnsupportedError
from bayesmeta.protocols import Posterior


@dataclass(frozen=True, eq=False)
class LogRatios:
    """Densities of draws under the model and under the approximation that they were drawn from, float64.

    By task, ``[n, tasks]``, where tasks are independent given θ: log p(S_t, φ_t | θ) and log q(φ_t). Jointly, ``[n]``,
    where draws are of θ and of the φ of all tasks together: log p(θ) + Σ_t log p(S_t, φ_t | θ) and log q(θ, φ). Both
    are densities in unconstrained space; p is not normalised.

    Attributes:
        log_p: under the model, with the support.
        log_q: under the approximation.
    """

    log_p: Tensor
    log_q: Tensor

    @property
    def joint(self) -> bool:
        """Whether a weight belongs to a draw of θ and all tasks, not to a draw of one task."""
        return self.log_p.dim() == 1

    @property
    def values(self) -> Tensor:
        """Log importance ratios, not normalised: ``[n, tasks]``, or ``[n]`` where joint."""
        return self.log_p - self.log_q

    def normalised(self) -> Tensor:
        """Log importance weights that sum to 1 over the draws, ``[n, tasks]``, or ``[n]`` where joint."""
        return self.values - self.values.logsumexp(0, keepdim=True)


@torch.no_grad()
def log_ratios(
    posterior: Posterior,
    support: Observations,
    draws: Any,
    *,
    log_likelihood: Tensor | None = None,
) -> LogRatios | None:
    """Log-densities of the posterior's own draws under the model and under the posterior.

    Args:
        posterior: adapted to ``support``.
        support: what was conditioned on, with targets.
        draws: from ``posterior.draws(n)``; not draws of the prior.
        log_likelihood: of the support under the draws, ``[n, tasks, shots]``, where it is known already.

    Returns:
        None where there is no density: a point estimate, particles, Markov chains, and a posterior that depends on
        draws of θ whose own density is not known.

    Raises:
        DataError: for a support without targets, or a log-density that is NaN.
    """
    if support.y is None:
        raise DataError("Importance weights need the targets of the support; it has y=None.")
    if posterior.is_point or getattr(posterior, "loo_refusal", None) is not None:
        return None
    log_q = _log_q(posterior, draws)
    if log_q is None:
        return None
    each = posterior.log_likelihood(support, draws=draws) if log_likelihood is None else log_likelihood
    each = torch.where(support.full_mask(), each.double(), 0.0)
    log_p = posterior.log_prior(draws).double() + each.sum(-1)
    if log_q.dim() == 1:
        log_p = log_p.sum(-1)
        if draws.theta is not None:
            log_p = log_p + posterior.log_theta(draws).double()
    wrong = (log_p.isnan() | log_q.isnan()).sum()
    if wrong:
        raise DataError(
            f"{int(wrong)} of {log_p.numel()} log-densities of the draws are NaN, so they have no importance weights. "
            "Look for NaN in the model's or the guide's parameters, and for data far from those of training."
        )
    return LogRatios(log_p, log_q)


def _log_q(posterior: Posterior, draws: Any) -> Tensor | None:
    """What the draws brought along, else the density of φ, where one θ holds for all draws."""
    known = getattr(draws, "log_q", None)
    if known is not None:
        return known.double()
    density = getattr(posterior, "log_prob", None)
    if density is None or any(bool((v != v[:1]).any()) for v in posterior.named_theta(draws).values()):
        return None
    try:
        return density(draws.u).double()
    except UnsupportedError:
        return None
