"""Second derivatives and Jacobians of many small functions at once, and factors of the precisions made from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def _variable(at: Tensor, create_graph: bool) -> Tensor:
    """A copy of ``at`` to differentiate by: of its value alone, or one through which its own graph goes on."""
    return at.clone() if create_graph and at.requires_grad else at.detach().clone().requires_grad_()


def _rows(outputs: Tensor, variable: Tensor, create_graph: bool) -> list[Tensor]:
    """d outputs[…, r] / d variable for each r, ``[…, D]``: one backward pass of the sum serves every leading index."""
    if not outputs.requires_grad:
        return [torch.zeros_like(variable)] * outputs.shape[-1]
    return [
        torch.autograd.grad(part, variable, create_graph=create_graph, retain_graph=True, materialize_grads=True)[0]
        for part in outputs.flatten(0, -2).sum(0)
    ]


def hessian(
    energy: Callable[[Tensor], Tensor], at: Tensor, *, diagonal: bool = False, create_graph: bool = False
) -> Tensor:
    """Second derivatives of E(v) of each leading index, by D backward passes.

    Args:
        energy: ``[…, D]`` to ``[…]``; each value depends on its own row alone.
        at: where, ``[…, D]``.
        diagonal: only the diagonal, without ever holding D × D numbers.
        create_graph: differentiable in ``at`` and in what else the energy depends on.

    Returns:
        ``[…, D, D]``, symmetric, or the diagonal ``[…, D]``.
    """
    variable = _variable(at, create_graph)
    total = energy(variable).sum()
    if not total.requires_grad:
        return at.new_zeros(at.shape if diagonal else (*at.shape, at.shape[-1]))
    (gradient,) = torch.autograd.grad(total, variable, create_graph=True, materialize_grads=True)
    if diagonal:
        if not gradient.requires_grad:
            return torch.zeros_like(at)
        parts = [_entry(gradient, variable, d, create_graph) for d in range(at.shape[-1])]
        return torch.stack(parts, -1)
    matrix = torch.stack(_rows(gradient, variable, create_graph), -2)
    return 0.5 * (matrix + matrix.mT)


def _entry(gradient: Tensor, variable: Tensor, d: int, create_graph: bool) -> Tensor:
    part = gradient[..., d].sum()
    (row,) = torch.autograd.grad(part, variable, create_graph=create_graph, retain_graph=True, materialize_grads=True)
    return row[..., d].clone()  # not a view, which would hold the whole row


def jacobian(outputs: Callable[[Tensor], Tensor], at: Tensor, *, create_graph: bool = False) -> Tensor:
    """First derivatives of R outputs of each leading index, by R backward passes.

    Args:
        outputs: ``[…, D]`` to ``[…, R]``.
        at: where, ``[…, D]``.
        create_graph: differentiable in ``at`` and in what else the outputs depend on.

    Returns:
        ``[…, R, D]``.
    """
    variable = _variable(at, create_graph)
    return torch.stack(_rows(outputs(variable), variable, create_graph), -2)


class PrecisionFactor(NamedTuple):
    """Cholesky factor of precisions.

    Attributes:
        cholesky: L with L Lᵀ the precision, ``[…, D, D]`` in float64.
        failed: where there is none, ``[…]``; there L is not to be used.
    """

    cholesky: Tensor
    failed: Tensor

    @property
    def log_det(self) -> Tensor:
        """log |Λ|, ``[…]``."""
        return 2.0 * self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def root(self) -> Tensor:
        """R with R Rᵀ the covariance Λ⁻¹, upper triangular, ``[…, D, D]``."""
        eye = torch.eye(self.cholesky.shape[-1], dtype=self.cholesky.dtype, device=self.cholesky.device)
        return torch.linalg.solve_triangular(self.cholesky, eye.expand_as(self.cholesky), upper=False).mT

    def spread(self, noise: Tensor) -> Tensor:
        """R noise, ``[…, D]`` in the dtype of ``noise``."""
        return (self.root().to(noise.dtype) @ noise.unsqueeze(-1)).squeeze(-1)

    def solve(self, right: Tensor) -> Tensor:
        """Λ⁻¹ right, ``[…, D]`` in the dtype of ``right``."""
        return torch.cholesky_solve(right.double().unsqueeze(-1), self.cholesky).squeeze(-1).to(right.dtype)


class DiagonalPrecision(NamedTuple):
    """Precisions without correlations.

    Attributes:
        precision: the diagonal of Λ, ``[…, D]``, positive.
    """

    precision: Tensor

    @property
    def log_det(self) -> Tensor:
        """log |Λ|, ``[…]``."""
        return self.precision.log().sum(-1)

    def spread(self, noise: Tensor) -> Tensor:
        """Λ^(−½) noise, ``[…, D]``."""
        return self.precision.rsqrt() * noise

    def solve(self, right: Tensor) -> Tensor:
        """Λ⁻¹ right, ``[…, D]``."""
        return right / self.precision


def factorise(precision: Tensor, jitter: float) -> PrecisionFactor:
    """Factorise precisions in float64; one that is not positive definite is tried once more with jitter.

    Args:
        precision: Λ, ``[…, D, D]``, symmetric and finite.
        jitter: what is added to the diagonal then, as a share of its mean absolute value.
    """
    wide = precision.double()
    failed = _not_positive(wide)
    if bool(failed.any()):
        diagonal = wide.diagonal(dim1=-2, dim2=-1)
        extra = torch.where(failed, jitter * diagonal.abs().mean(-1), 0.0)
        wide = wide + torch.diag_embed(extra.unsqueeze(-1).expand_as(diagonal))
        failed = _not_positive(wide)
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    usable = torch.where(failed[..., None, None], eye, wide)  # so that those that did not fail have their factor
    return PrecisionFactor(torch.linalg.cholesky(usable), failed)


def _not_positive(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky_ex(matrix.detach()).info > 0
