"""Covariances between the targets of a task, from a network's outputs at each of them."""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.errors import DataError

Covariance = Literal["diagonal", "low_rank", "kernel"]
_LOG_2PI = math.log(2.0 * math.pi)


def num_extra(covariance: Covariance, rank: int) -> int:
    """How many outputs a covariance takes at each target, beside the likelihood's own."""
    return {"diagonal": 0, "low_rank": rank, "kernel": rank + 1}[covariance]


class StationaryKernel(nn.Module):
    """k(x, x') = exp(−Σ_f (x_f − x'_f)² / 2ℓ_f²) with learned lengths ℓ, by which a covariance is multiplied.

    The product of two positive semi-definite matrices, entry by entry, is one again (Schur), k depends on differences
    alone, and k(x, x) = 1 leaves variances as they are.

    Args:
        features: width of x.
        length_scale: where all ℓ begin, in units of x.
    """

    def __init__(self, features: int, length_scale: float) -> None:
        super().__init__()
        self.log_length = nn.Parameter(torch.full((features,), math.log(length_scale)))

    def forward(self, x: Tensor) -> Tensor:
        """k between the points x, ``[…, M, features]``: float64 ``[…, M, M]``."""
        # differences are taken before they are divided: rounding does not depend on where x is 0
        wide, length = x.double(), self.log_length.double().exp()
        away = (wide.unsqueeze(-2) - wide.unsqueeze(-3)) / length
        return (-0.5 * away.square().sum(-1)).exp()


def function_covariance(covariance: Covariance, extra: Tensor) -> Tensor:
    """Covariance of the function at the targets, without noise, float64 ``[…, M, M]``.

    ``"low_rank"``: g gᵀ / R (there without 1 / R) with the outputs g, ``[…, M, R]`` ("linear" in S. Markou et al.,
    "Practical Conditional Neural Processes via Tractable Dependent Predictions", ICLR 2022,
    https://arxiv.org/abs/2203.08775, section 2).
    ``"kernel"``: v_i v_j exp(−|g_i − g_j|² / 2), "kvv" there, with the outputs [g, v], ``[…, M, R + 1]``.

    Args:
        covariance: which.
        extra: the outputs.
    """
    wide = extra.double()
    if covariance == "low_rank":
        return wide @ wide.mT / wide.shape[-1]
    g, v = wide[..., :-1], wide[..., -1:]
    # by products, not by differences, which would be M² R numbers; in float64 the rounding is far below any noise
    norm = g.square().sum(-1, keepdim=True)
    square = (norm + norm.mT - 2.0 * g @ g.mT).clamp(min=0.0)
    return v * v.mT * (-0.5 * square).exp()


def total_covariance(covariance: Covariance, extra: Tensor, scale: Tensor, factor: Tensor | None = None) -> Tensor:
    """Covariance of y at the targets, float64 ``[…, M, M]``: the function's, and noise of sd ``scale``.

    Args:
        covariance, extra: as in :func:`function_covariance`.
        scale: ``[…, M]``.
        factor: what the function's covariance is multiplied by, entry by entry, ``[…, M, M]``.
    """
    function = function_covariance(covariance, extra)
    function = function if factor is None else function * factor
    return function + scale.double().square().diag_embed()


def total_variance(covariance: Covariance, extra: Tensor, scale: Tensor) -> Tensor:
    """The diagonal of :func:`total_covariance` without the rest of it, float64 ``[…, M]``."""
    wide = extra.double()
    function = wide.square().mean(-1) if covariance == "low_rank" else wide[..., -1].square()
    return function + scale.double().square()


def root_of(covariance: Tensor, keep: Tensor | None = None) -> Tensor:
    """Lower Cholesky factor, the identity's at rows and columns that are padding.

    Args:
        covariance: float64, ``[…, M, M]``.
        keep: True at real targets, ``[tasks, M]``; None: all.

    Raises:
        DataError: when one is not positive definite.
    """
    if keep is not None:
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        covariance = torch.where(keep.unsqueeze(-1) & keep.unsqueeze(-2), covariance, eye)
    root, info = torch.linalg.cholesky_ex(covariance)
    bad = (info > 0) | ~root.isfinite().flatten(-2).all(-1)
    if bool(bad.any()):
        tasks = bad.reshape(-1, bad.shape[-1]).any(0).nonzero().flatten().tolist()
        raise DataError(
            f"The covariance of the targets is not finite and positive definite in {len(tasks)} task(s), first "
            f"{tasks[:5]} (counted from 0). The noise may be too small for targets at nearly the same x (give the "
            "likelihood a larger scale or floor), or inputs huge (standardise the data)."
        )
    return root


def log_normal(loc: Tensor, root: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """log N(y; loc, R Rᵀ) of the real targets, float64 ``[…]``; R as :func:`root_of` gives it for the same ``keep``."""
    residual = torch.where(keep, y.double() - loc.double(), 0.0)
    white = torch.linalg.solve_triangular(root, residual.unsqueeze(-1), upper=False).squeeze(-1)
    constant = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * _LOG_2PI * keep.double().sum(-1)
    return -0.5 * white.square().sum(-1) - constant


def sample_targets(loc: Tensor, covariance: Tensor, y: Tensor | None, keep: Tensor) -> Tensor:
    """The Pyro site ``y`` of dependent targets, in the task plate; padding adds nothing to the density.

    Args:
        loc: ``[tasks, M]``.
        covariance: ``[tasks, M, M]``.
        y: observed targets, ``[tasks, M]``, or None.
        keep: True at real targets, ``[tasks, M]``.

    Returns:
        ``[tasks, M]``.
    """
    if not bool(keep.all()):  # padding has variance 1 and its mean as its value: take its density off again
        zero = loc.new_zeros(())
        padding = -dist.Normal(zero, zero + 1.0).log_prob(zero) * (~keep).to(loc).sum(-1)
        pyro.factor("padding", padding.unsqueeze(-1))
    root = root_of(covariance, keep).to(loc)
    normal = dist.MultivariateNormal(loc.unsqueeze(-2), scale_tril=root.unsqueeze(-3))
    value = None if y is None else torch.where(keep, y, loc).unsqueeze(-2)
    return pyro.sample("y", normal, obs=value).squeeze(-2)
