"""Covariances between the targets of a task, from a network's outputs at each of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from bayesmeta.models.deep_kernel import cholesky

Covariance = Literal["diagonal", "low_rank", "kernel"]
_LOG_2PI = math.log(2.0 * math.pi)


def num_extra(covariance: Covariance, rank: int) -> int:
    """How many outputs a covariance takes at each target, beside the likelihood's own."""
    return {"diagonal": 0, "low_rank": rank, "kernel": rank + 1}[covariance]


def function_covariance(covariance: Covariance, extra: Tensor) -> Tensor:
    """Covariance of the function at the targets, without noise, float64 ``[…, M, M]``.

    ``"low_rank"``: g gᵀ / R with the outputs g, ``[…, M, R]`` ("linear" in S. Markou et al., "Practical Conditional
    Neural Processes via Tractable Dependent Predictions", ICLR 2022, https://arxiv.org/abs/2203.08775, section 2).
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


def total_covariance(covariance: Covariance, extra: Tensor, scale: Tensor) -> Tensor:
    """Covariance of y at the targets, float64 ``[…, M, M]``: the function's, and noise of sd ``scale``."""
    return function_covariance(covariance, extra) + scale.double().square().diag_embed()


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
    return cholesky(covariance)


def log_normal(loc: Tensor, root: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """log N(y; loc, R Rᵀ) of the real targets, float64 ``[…]``; R as :func:`root_of` gives it for the same ``keep``."""
    residual = torch.where(keep, y.double() - loc.double(), 0.0)
    white = torch.linalg.solve_triangular(root, residual.unsqueeze(-1), upper=False).squeeze(-1)
    constant = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * _LOG_2PI * keep.double().sum(-1)
    return -0.5 * white.square().sum(-1) - constant
