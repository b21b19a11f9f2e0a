"""Iterative solves of many small linear systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def conjugate_gradient(product: Callable[[Tensor], Tensor], right: Tensor, steps: int) -> Tensor:
    """Solve A q = right for symmetric positive definite A, one system for each leading index.

    Source: M. R. Hestenes, E. Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", J. Res. NBS 49,
    1952, https://doi.org/10.6028/jres.049.044, eqs. 3:1.

    Args:
        product: v ``[…, D]`` to A v, each system its own.
        right: ``[…, D]``.
        steps: at most so many products; exact after D of them up to rounding. A system that has converged, or along
            whose direction A is not positive, stays where it is.

    Returns:
        q, ``[…, D]``.
    """
    solution = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    square = residual.square().sum(-1, keepdim=True)
    enough = square * torch.finfo(right.dtype).eps ** 2
    for _ in range(steps):
        image = product(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        going = (square > enough) & (curvature > 0)
        length = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        solution = solution + length * direction
        residual = residual - length * image
        new = residual.square().sum(-1, keepdim=True)
        direction = torch.where(going, residual + new / torch.where(going, square, 1.0) * direction, direction)
        square = torch.where(going, new, square)
    return solution
