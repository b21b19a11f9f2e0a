"""Gaussian algebra: linear-Gaussian posteriors in information form and conditioning in covariance form.

The two are independent ways to the same numbers; tests hold one against the other.
"""

import math
from typing import Any, Literal, NamedTuple

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


class MatrixNormalFit(NamedTuple):
    """Posterior of Φ and Σ in ``Y = A Φ + noise``, rows of the noise N(0, Σ).

    Φ | Σ has mean ``mean`` and covariance ``R Rᵀ`` between the rows, Σ between the columns; Σ is inverse-Wishart.

    Attributes:
        mean: ``[..., D, P]``.
        root: R, ``[..., D, M]``.
        df: degrees of freedom ν, ``[...]``.
        scatter: Ψ, ``[..., P, P]``.
        log_evidence: log p(Y), ``[...]``.
    """

    mean: Tensor
    root: Tensor
    df: Tensor
    scatter: Tensor
    log_evidence: Tensor


class _Whitened(NamedTuple):
    """The posterior of z ~ N(0, I) given r = B z + noise ~ N(0, I), for P right sides r.

    mean ``[..., M, P]``; root W with covariance W Wᵀ ``[..., M, M]``; square rᵀ (I + B Bᵀ)⁻¹ r ``[..., P, P]``;
    half_log_det ½ log |I + B Bᵀ| ``[...]``.
    """

    mean: Tensor
    root: Tensor
    square: Tensor
    half_log_det: Tensor


def _solve_information(design: Tensor, residual: Tensor) -> _Whitened:
    """By the M × M precision I + BᵀB, whose eigenvalues are at least 1."""
    eye = torch.eye(design.shape[-1], dtype=design.dtype, device=design.device)
    cholesky = _cholesky(eye + design.mT @ design)
    mean = torch.cholesky_solve(design.mT @ residual, cholesky)
    misfit = residual - design @ mean
    root = torch.linalg.solve_triangular(cholesky, eye.expand_as(cholesky), upper=False).mT
    log_det = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _Whitened(mean, root, misfit.mT @ misfit + mean.mT @ mean, log_det)


def _solve_covariance(design: Tensor, residual: Tensor) -> _Whitened:
    """By the N × N covariance S = I + B Bᵀ = C Cᵀ: for few observations, as they come online.

    The root is W = I − Bᵀ C⁻ᵀ (C + I)⁻¹ B, so that W Wᵀ = I − Bᵀ S⁻¹ B (A. Andrews, "A square root formulation of the
    Kalman covariance equations", AIAA Journal 6, 1968, https://doi.org/10.2514/3.4693): a root of the old posterior
    becomes one of the new without a factorisation of size M.
    """
    rows = torch.eye(design.shape[-2], dtype=design.dtype, device=design.device)
    cholesky = _cholesky(rows + design @ design.mT)
    half = torch.linalg.solve_triangular(cholesky, residual, upper=False)
    gain = torch.linalg.solve_triangular(cholesky, design, upper=False)
    inner = torch.linalg.solve_triangular(cholesky + rows, design, upper=False)
    columns = torch.eye(design.shape[-1], dtype=design.dtype, device=design.device)
    log_det = cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return _Whitened(gain.mT @ half, columns - gain.mT @ inner, half.mT @ half, log_det)


#: Two ways to the same posterior: ``"information"`` factorises D × D, ``"covariance"`` N × N.
Form = Literal["information", "covariance"]
_FORMS = {"information": _solve_information, "covariance": _solve_covariance}


def fit_linear_gaussian(
    design: Tensor,
    y: Tensor,
    mean: Tensor,
    root: Tensor,
    noise_scale: Tensor,
    mask: Tensor | None = None,
    form: Form = "information",
) -> LinearGaussianFit:
    """Exact posterior and evidence of a linear-Gaussian model (Bishop 2006, eqs. 3.50, 3.51, 3.86).

    The prior is whitened first, φ = m + R z with z ~ N(0, I): the precision of z is I + BᵀB with B = A R / σ, whose
    eigenvalues are at least 1. Computed in float64 whatever the dtype given, since BᵀB squares the signal-to-noise
    ratio, and given back in that dtype. With a posterior as mean and root it adds observations to it.

    Args:
        design: A, ``[..., N, D]``.
        y: targets, ``[..., N]``.
        mean: prior mean m, broadcastable to ``[..., D]``.
        root: R with prior covariance ``R Rᵀ``, ``[..., D, M]``.
        noise_scale: σ, broadcastable to ``[..., N]``.
        mask: True where a row counts, ``[..., N]``; None means all do.
        form: which way; ``"covariance"`` is cheaper for fewer rows than columns.

    Returns:
        The posterior; with no rows that count it is the prior and the log evidence is 0.

    Raises:
        DataError: when the posterior is singular to working precision.
    """
    dtype, mean, root = y.dtype, mean.double(), root.double()
    whitened, residual, log_noise = _whiten(design, y, mean, root, noise_scale, mask)
    solved = _FORMS[form](whitened, residual.unsqueeze(-1))
    log_evidence = -0.5 * solved.square[..., 0, 0] - solved.half_log_det - log_noise.sum(-1)
    posterior_mean = mean + (root @ solved.mean).squeeze(-1)
    return LinearGaussianFit(posterior_mean.to(dtype), (root @ solved.root).to(dtype), log_evidence.to(dtype))


def linear_gaussian_log_prob(
    design: Tensor,
    y: Tensor,
    mean: Tensor,
    root: Tensor,
    noise_scale: Tensor,
    mask: Tensor | None = None,
    *,
    given: int = 0,
) -> Tensor:
    """log p of the later rows given the first ones, in a linear-Gaussian model, without the posterior of φ.

    The covariance of the residuals in units of the noise is S = I + B Bᵀ with B as in :func:`fit_linear_gaussian`. The
    Cholesky factor of its leading block is the leading block of its factor, so that one factorisation of N × N serves
    both evidences whose difference this is. Cheaper than two posteriors for fewer rows than columns.

    Args:
        design, y, mean, root, noise_scale, mask: as of :func:`fit_linear_gaussian`, in float64 inside likewise; of
            independent φ the root may be their standard deviations, ``[D]``.
        given: how many rows are given; with 0 this is the log evidence of all.

    Returns:
        ``[...]``.

    Raises:
        DataError: when the covariance is singular to working precision.
    """
    whitened, residual, log_noise = _whiten(design, y, mean.double(), root.double(), noise_scale, mask)
    lead = torch.broadcast_shapes(whitened.shape[:-2], residual.shape[:-1])
    whitened, residual = whitened.expand(*lead, -1, -1), residual.expand(*lead, -1)
    misfit: Tensor = _Misfit.apply(whitened, residual, given)
    return -(misfit + log_noise[..., given:].sum(-1)).to(y.dtype)


class _Misfit(torch.autograd.Function):
    """½ hᵢ² + log Lᵢᵢ, summed over rows i ≥ g, with L Lᵀ = S = I + B Bᵀ and h = L⁻¹ r.

    With W = L⁻¹, V its rows from g on, U those before: S⁻¹ = WᵀW and, of the given rows, S₁⁻¹ = UᵀU where it is not
    0. So the gradient in S is ½ (VᵀV − ααᵀ + α₁α₁ᵀ) with α = Wᵀ W r and α₁ = UᵀU r, and that in r is α − α₁: no
    derivative of a factorisation, and one product for that in B, since S is symmetric.
    """

    @staticmethod
    def forward(ctx: Any, design: Tensor, residual: Tensor, given: int) -> Tensor:
        log_diagonal, inverse = _invert_rows(design)
        ctx.save_for_backward(design, residual, inverse)
        ctx.given = given
        half = (inverse @ residual.unsqueeze(-1)).squeeze(-1)
        return (0.5 * half.square() + log_diagonal)[..., given:].sum(-1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        design, residual, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: as a function of B
            inverse = _invert_rows(design)[1]
        given = ctx.given
        half = inverse @ residual.unsqueeze(-1)
        before, after = inverse[..., :given, :], inverse[..., given:, :]
        first = before.mT @ half[..., :given, :]
        change = after.mT @ half[..., given:, :]
        total = first + change
        inner = after.mT @ after - total @ total.mT + first @ first.mT
        return slope[..., None, None] * (inner @ design), slope.unsqueeze(-1) * change.squeeze(-1), None


def _invert_rows(design: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the diagonal of L, and L⁻¹, of S = I + B Bᵀ."""
    rows = torch.eye(design.shape[-2], dtype=design.dtype, device=design.device)
    cholesky = _cholesky(rows + design @ design.mT)
    inverse = torch.linalg.solve_triangular(cholesky, rows.expand_as(cholesky), upper=False)
    return cholesky.diagonal(dim1=-2, dim2=-1).log(), inverse


def _whiten(
    design: Tensor, y: Tensor, mean: Tensor, root: Tensor, noise_scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """B = A R / σ and (y − A m) / σ, 0 in rows that do not count, and the noise's part of each −log p, in float64."""
    design, y = design.double(), y.double()
    noise_scale = noise_scale.double().expand(y.shape)
    spread = design @ root if root.dim() > 1 else design * root
    whitened = spread / noise_scale.unsqueeze(-1)
    residual = (y - (design @ mean.unsqueeze(-1)).squeeze(-1)) / noise_scale
    log_noise = noise_scale.log() + 0.5 * _LOG_2PI
    if mask is not None:
        whitened = whitened * mask.unsqueeze(-1)
        residual = residual.masked_fill(~mask, 0.0)
        log_noise = log_noise.masked_fill(~mask, 0.0)
    return whitened, residual, log_noise


def fit_matrix_normal(
    design: Tensor,
    y: Tensor,
    mean: Tensor,
    root: Tensor,
    df: Tensor,
    scatter: Tensor,
    mask: Tensor | None = None,
    form: Form = "information",
) -> MatrixNormalFit:
    """Exact posterior and evidence of ``Y = A Φ + noise`` with unknown noise covariance Σ, in float64 inside.

    Σ ~ inverse-Wishart(ν, Ψ), and Φ | Σ matrix normal with mean M, R Rᵀ between rows and Σ between columns (Gelman et
    al., *Bayesian Data Analysis*, 3rd ed. 2013, section 3.6 and chapter 14; Minka, "Bayesian linear regression", 2000,
    eqs. 22–29). For one output Σ is inverse-gamma with shape ν / 2 and rate Ψ / 2.

    Args:
        design: A, ``[..., N, D]``.
        y: targets, ``[..., N, P]``.
        mean: prior mean M, broadcastable to ``[..., D, P]``.
        root: R, ``[..., D, M]``.
        df: ν > P − 1, broadcastable to ``[...]``.
        scatter: Ψ, broadcastable to ``[..., P, P]``.
        mask: True where a row counts, ``[..., N]``; None means all do.
        form: which way; ``"covariance"`` is cheaper for fewer rows than columns.

    Returns:
        The posterior; with no rows that count it is the prior and the log evidence is 0.

    Raises:
        DataError: when the posterior is singular to working precision.
    """
    dtype, outputs = y.dtype, y.shape[-1]
    design, y, mean, root = design.double(), y.double(), mean.double(), root.double()
    df, scatter = df.double(), scatter.double()
    whitened, residual = design @ root, y - design @ mean
    count = torch.full(residual.shape[:-2], float(y.shape[-2]), dtype=y.dtype, device=y.device)
    if mask is not None:
        whitened = whitened * mask.unsqueeze(-1)
        residual = residual.masked_fill(~mask.unsqueeze(-1), 0.0)
        count = mask.sum(-1).to(y.dtype).expand(residual.shape[:-2])
    solved = _FORMS[form](whitened, residual)
    new_df, new_scatter = df + count, scatter + solved.square
    log_evidence = (
        torch.mvlgamma(0.5 * new_df, outputs)
        - torch.mvlgamma(0.5 * df, outputs)
        + 0.5 * df * _log_det(scatter)
        - 0.5 * new_df * _log_det(new_scatter)
        - outputs * (solved.half_log_det + 0.5 * count * math.log(math.pi))
    )
    parts = (mean + root @ solved.mean, root @ solved.root, new_df, new_scatter, log_evidence)
    return MatrixNormalFit(*(part.to(dtype) for part in parts))


def _log_det(matrix: Tensor) -> Tensor:
    return 2.0 * _cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


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
    # without Q it has no derivative
    upper = torch.linalg.qr(root.mT, mode="reduced" if root.requires_grad else "r").R
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
