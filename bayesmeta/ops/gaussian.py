"""Gaussian algebra: linear-Gaussian posteriors in information form and conditioning in covariance form.

The two are independent ways to the same numbers; tests hold one against the other.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesmeta.errors import DataError

_LOG_2PI = math.log(2 * math.pi)


class LinearGaussianFit(NamedTuple):
    """Posterior of φ in ``y = A φ + noise``.

    Attributes:
        mean: posterior mean, ``[..., D]``.
        root: R with posterior covariance ``R Rᵀ``, of the prior root's width, ``[..., D, M]``; not triangular.
        log_evidence: log p(y), ``[...]``.
    """

    mean: Tensor
    root: Tensor
    log_evidence: Tensor

    @property
    def covariance(self) -> Tensor:
        """Posterior covariance, ``[..., D, D]``."""
        return self.root @ self.root.mT


def fit_linear_gaussian(
    design: Tensor, y: Tensor, mean: Tensor, root: Tensor, noise_scale: Tensor, mask: Tensor | None = None
) -> LinearGaussianFit:
    """Exact posterior and evidence of a linear-Gaussian model (Bishop 2006, eqs. 3.50, 3.51, 3.86).

    The prior is whitened first, φ = m + R z with z ~ N(0, I): the precision of z is I + BᵀB with B = A R / σ, whose
    eigenvalues are at least 1. Computed in float64 whatever the dtype given, since BᵀB squares the signal-to-noise
    ratio, and given back in that dtype.

    Args:
        design: A, ``[..., N, D]``.
        y: targets, ``[..., N]``.
        mean: prior mean m, broadcastable to ``[..., D]``.
        root: R with prior covariance ``R Rᵀ``, ``[..., D, M]``.
        noise_scale: σ, broadcastable to ``[..., N]``.
        mask: True where a row counts, ``[..., N]``; None means all do.

    Returns:
        The posterior; with no rows that count it is the prior and the log evidence is 0.

    Raises:
        DataError: when the posterior is singular to working precision.
    """
    dtype = y.dtype
    design, y, mean, root = design.double(), y.double(), mean.double(), root.double()
    noise_scale = noise_scale.double().expand(y.shape)
    whitened = design @ root / noise_scale.unsqueeze(-1)
    residual = (y - (design @ mean.unsqueeze(-1)).squeeze(-1)) / noise_scale
    log_noise = noise_scale.log() + 0.5 * _LOG_2PI
    if mask is not None:
        whitened = whitened * mask.unsqueeze(-1)
        residual = residual.masked_fill(~mask, 0.0)
        log_noise = log_noise.masked_fill(~mask, 0.0)
    size = whitened.shape[-1]
    precision = torch.eye(size, dtype=y.dtype, device=y.device) + whitened.mT @ whitened
    cholesky = _cholesky(precision)
    z = torch.cholesky_solve(whitened.mT @ residual.unsqueeze(-1), cholesky).squeeze(-1)
    misfit = residual - (whitened @ z.unsqueeze(-1)).squeeze(-1)
    log_evidence = (
        -0.5 * (misfit.square().sum(-1) + z.square().sum(-1))
        - cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        - log_noise.sum(-1)
    )
    # (L⁻¹ Rᵀ)ᵀ = R L⁻ᵀ, and R L⁻ᵀ L⁻¹ Rᵀ is the posterior covariance.
    posterior_root = torch.linalg.solve_triangular(cholesky, root.mT.expand(*precision.shape[:-1], -1), upper=False).mT
    posterior_mean = mean + (root @ z.unsqueeze(-1)).squeeze(-1)
    return LinearGaussianFit(posterior_mean.to(dtype), posterior_root.to(dtype), log_evidence.to(dtype))


def _cholesky(precision: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(precision)
    except torch.linalg.LinAlgError as error:
        raise DataError(
            "The posterior of a linear-Gaussian model is singular to working precision: inputs or features are not "
            "finite, or the noise scale is smaller by more than seven orders of magnitude than the signal. Standardise "
            "the data, or start from a larger noise scale."
        ) from error


def lower_root(root: Tensor) -> Tensor:
    """The Cholesky factor of ``root rootᵀ`` by QR, without squaring it.

    Args:
        root: ``[..., D, E]`` with E ≥ D and rank D.

    Returns:
        Lower triangular with a positive diagonal, ``[..., D, D]``.
    """
    upper = torch.linalg.qr(root.mT, mode="r").R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(root)
    return (upper * sign.unsqueeze(-1)).mT


def condition(
    mean: Tensor, covariance: Tensor, observed: Tensor, values: Tensor, noise_variance: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Condition a joint Gaussian on some of its coordinates (Rasmussen & Williams 2006, eq. A.6).

    Args:
        mean: ``[..., N]``.
        covariance: ``[..., N, N]``.
        observed: boolean ``[..., N]``; a coordinate that is False is left out, not integrated numerically.
        values: ``[..., N]``; entries that are not observed are ignored (but must be finite).
        noise_variance: added to the observed coordinates.

    Returns:
        Mean ``[..., N]`` and covariance ``[..., N, N]`` of all coordinates given the observed ones.
    """
    # Unobserved rows of the gain system become identity rows: shapes stay static, so tasks stay a batch dimension.
    both = observed.unsqueeze(-1) & observed.unsqueeze(-2)
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    noise_variance = torch.as_tensor(noise_variance, dtype=mean.dtype, device=mean.device)  # not in single precision
    gram = torch.where(both, covariance, 0.0) + eye * torch.where(observed, noise_variance, 1.0).unsqueeze(-1)
    cross = covariance * observed.unsqueeze(-2)
    cholesky = torch.linalg.cholesky(gram)
    residual = torch.where(observed, values - mean, 0.0)
    gain = torch.cholesky_solve(cross.mT, cholesky).mT
    new_mean = mean + (gain @ residual.unsqueeze(-1)).squeeze(-1)
    return new_mean, covariance - gain @ cross.mT
