"""Sets of observations: a canonical order, pooling, products of Gaussians, random subsets.

Floating-point sums depend on the order of their terms, and a matrix product may take another path for another number
of rows. So sets are first put in one order that their content alone decides, with the padding last, and cut to the
longest: what follows is then the same computation on the same numbers, whatever the order and the padding were.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["mean", "sum", "max"]


def lexicographic_order(rows: Tensor, mask: Tensor) -> Tensor:
    """Indices that sort rows by their first column, ties by the second, and so on, padding last.

    Args:
        rows: ``[…, n, columns]``.
        mask: True where a row is real, ``[…, n]``.

    Returns:
        ``[…, n]``. One stable sort for each column; rows that are equal in all columns keep their order.
    """
    order = torch.arange(rows.shape[-2], device=rows.device).expand(rows.shape[:-1])
    for column in reversed(rows.unbind(-1)):
        order = order.gather(-1, column.gather(-1, order).argsort(dim=-1, stable=True))
    return order.gather(-1, padding_last(mask.expand(order.shape).gather(-1, order)))


def padding_last(mask: Tensor) -> Tensor:
    """Indices that bring real entries to the front in the order in which they stand, ``[…, n]``."""
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)


def take_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Rows ``[…, n, columns]`` in the order ``[…, n]``."""
    return rows.gather(-2, order.unsqueeze(-1).expand(*order.shape, rows.shape[-1]))


def pool(rows: Tensor, mask: Tensor, how: Pool) -> Tensor:
    """Mean, sum or maximum over the real rows; 0 where there is none.

    Args:
        rows: ``[…, n, width]``, n ≥ 1, finite where masked too.
        mask: ``[…, n]``.
        how: which.

    Returns:
        ``[…, width]``.
    """
    keep = mask.unsqueeze(-1)
    if how == "max":
        some = mask.any(-1, keepdim=True)
        return torch.where(some, rows.masked_fill(~keep, -torch.inf).amax(-2), 0.0)
    total = rows.masked_fill(~keep, 0.0).sum(-2)
    return total if how == "sum" else total / keep.sum(-2).clamp(min=1)


def product_of_gaussians(
    information: Tensor, precision: Tensor, mask: Tensor, prior_loc: Tensor | float, prior_scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The normalised product of a Gaussian prior and one Gaussian factor for each real row, dimension by dimension.

    Precisions add up, and so do precisions times means. Factors come in this natural form, so that one that says
    nothing has the precision 0.

    Args:
        information: mean of each factor times its precision, ``[…, n, D]``.
        precision: of each factor, not negative, ``[…, n, D]``.
        mask: True where a factor counts, ``[…, n]``.
        prior_loc, prior_scale: of the prior, broadcastable to ``[…, D]``.

    Returns:
        Mean and standard deviation, each ``[…, D]``: the prior's own, to the last bit, where no factor counts.
    """
    keep = mask.unsqueeze(-1)
    prior_loc, prior_scale = (torch.as_tensor(v).to(precision) for v in (prior_loc, prior_scale))
    prior_precision = prior_scale.square().reciprocal()
    total = prior_precision + precision.masked_fill(~keep, 0.0).sum(-2)
    loc = (prior_precision * prior_loc + information.masked_fill(~keep, 0.0).sum(-2)) / total
    some = mask.any(-1, keepdim=True)
    return torch.where(some, loc, prior_loc), torch.where(some, total.rsqrt(), prior_scale)


def product_of_correlated_gaussians(information: Tensor, factor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised product of a standard normal prior and one Gaussian factor for each real row, with correlations.

    Args:
        information: precision matrix of each factor times its mean, ``[…, n, D]``.
        factor: A with the precision matrix A Aᵀ of each, ``[…, n, D, K]``; K < D leaves directions of which it says
            nothing.
        mask: ``[…, n]``.

    Returns:
        Mean ``[…, D]`` and the Cholesky factor of the covariance, ``[…, D, D]``: 0 and I where no factor counts.
    """
    size = factor.shape[-2]
    # one product over rows and columns of A together
    wide = factor.masked_fill(~mask[..., None, None], 0.0).transpose(-3, -2).flatten(-2)
    eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
    precision = eye + wide @ wide.mT
    # L with Σ = L Lᵀ, L lower triangular, from the Cholesky factor of the precision read backwards
    backwards = torch.linalg.cholesky(precision.flip(-2, -1)).flip(-2, -1).mT
    root = torch.linalg.solve_triangular(backwards, eye, upper=False)
    total = information.masked_fill(~mask.unsqueeze(-1), 0.0).sum(-2)
    return (root @ (root.mT @ total.unsqueeze(-1))).squeeze(-1), root


def random_subset(mask: Tensor, generator: torch.Generator, *, least: int = 0) -> Tensor:
    """A random part of each set: its size is uniform between ``least`` and all, its members equally likely.

    The numbers go by the members of a set: padding changes neither them nor what the generator gives next.

    Args:
        mask: True where there is a member, ``[…, n]``.
        generator: where the numbers come from.
        least: smallest size; a set with fewer members stays whole.

    Returns:
        The mask of the part, ``[…, n]``.
    """
    count = mask.sum(-1)
    low = count.clamp(max=least)
    # not in the data's dtype: the same seed means the same parts in each
    uniform = torch.rand(count.shape, generator=generator, dtype=torch.float64, device=mask.device)
    size = low + (uniform * (count - low + 1)).long()
    keys = torch.randint(_WORD, (2, *count.shape), generator=generator, device=mask.device).unsqueeze(-1)
    score = _scramble(_scramble(mask.cumsum(-1) + keys[0]) ^ keys[1])
    rank = score.masked_fill(~mask, _WORD).argsort(-1).argsort(-1)
    return mask & (rank < size.unsqueeze(-1))


#: 2³²
_WORD = 1 << 32


def _scramble(numbers: Tensor) -> Tensor:
    """A one-to-one map of 32-bit words, int64 here, whose bits look random.

    C. Wellons, "Prospecting for Hash Functions", 2018, https://nullprogram.com/blog/2018/07/31/, and the constants of
    its repository (hash-prospector) with the least bias of two rounds. Both are below 2³¹: no product overflows.
    """
    x = numbers & (_WORD - 1)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & (_WORD - 1)
    return x ^ (x >> 15)
