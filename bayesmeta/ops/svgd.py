"""Stein variational gradient descent: particles that climb a density and push each other apart.

Source: Q. Liu, D. Wang, "Stein Variational Gradient Descent: A General Purpose Bayesian Inference Algorithm",
NeurIPS 2016, https://arxiv.org/abs/1608.04471, algorithm 1 and section 5 (kernel and bandwidth).

Conventions, since published code differs in them:

- The kernel is k(a, b) = exp(−‖a − b‖² / h) over the whole vector, so that ∇_a k(a, b) = −(2 / h) (a − b) k(a, b).
- h is the median of ‖φ_i − φ_j‖² over the pairs i < j, each task its own, divided by log M; of an even number of pairs
  it is the lower of the two in the middle. (Other code takes the median over all M² numbers, zeros included, or
  divides by log(M + 1), as ``pyro.infer.SVGD`` does, which by default also has one kernel for each coordinate.)
- Within a step h is a constant, as in the paper. A gradient of a later loss does flow through it: with a graph the
  direction is differentiated exactly as it is computed. Give ``bandwidth`` to hold it fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesmeta.errors import OptionError


def squared_distances(particles: Tensor) -> Tensor:
    """‖φ_i − φ_j‖² for all pairs, ``[M, M, …]``, of particles ``[M, …, D]``."""
    # by inner products, not by M² differences of length D; from the first particle, which a common shift cannot blur
    centred = (particles - particles[:1].detach()).movedim(0, -2)
    gram = centred @ centred.mT
    norms = gram.diagonal(dim1=-2, dim2=-1)
    squared = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2.0 * gram).clamp(min=0.0)
    eye = torch.eye(particles.shape[0], dtype=torch.bool, device=particles.device)
    return squared.masked_fill(eye, 0.0).movedim((-2, -1), (0, 1))


def median_bandwidth(squared: Tensor) -> Tensor:
    """The median rule: h = median over pairs of ‖φ_i − φ_j‖² / log M, ``[…]``.

    Where more than half of the pairs coincide, the mean over pairs stands in for the median; where all do, h = 1,
    which then does not matter.

    Args:
        squared: squared distances, ``[M, M, …]``.

    Raises:
        OptionError: for fewer than two particles, of which there is no pair.
    """
    count = squared.shape[0]
    _at_least_two(count)
    first, second = torch.triu_indices(count, count, 1, device=squared.device)
    pairs = squared[first, second]
    mean = pairs.mean(0)
    median = pairs.median(0).values
    rounding = 100.0 * torch.finfo(squared.dtype).eps * mean
    median = torch.where(median > rounding, median, mean)
    return torch.where(median > 0.0, median / math.log(count), 1.0)


def rbf_kernel(particles: Tensor, bandwidth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The kernel, and its gradient summed over the first argument.

    Args:
        particles: ``[M, …, D]``; the dimensions between are tasks (and what else is independent).
        bandwidth: h, ``[…]``; None: the median rule.

    Returns:
        k(φ_j, φ_i), ``[M, M, …]`` (symmetric), and Σ_j ∇_{φ_j} k(φ_j, φ_i), ``[M, …, D]``, in place i.

    Raises:
        OptionError: for fewer than two particles.
    """
    _at_least_two(particles.shape[0])
    squared = squared_distances(particles)
    h = median_bandwidth(squared) if bandwidth is None else bandwidth
    kernel = torch.exp(-squared / h)
    centred = particles - particles[:1].detach()  # the sum below is of differences
    apart = kernel.sum(0).unsqueeze(-1) * centred - _mix(kernel, centred)
    return kernel, (2.0 / h).unsqueeze(-1) * apart


def svgd_direction(particles: Tensor, score: Tensor, bandwidth: Tensor | None = None) -> Tensor:
    """Where each particle goes: (1/M) Σ_j [ k(φ_j, φ_i) ∇ log p(φ_j) + ∇_{φ_j} k(φ_j, φ_i) ], ``[M, …, D]``.

    Differentiable in both arguments. One particle would just climb; that is MAML.

    Args:
        particles: ``[M, …, D]``, M ≥ 2.
        score: ∇ log p at each, ``[M, …, D]``.
        bandwidth: h, ``[…]``; None: the median rule.

    Raises:
        OptionError: for fewer than two particles.
    """
    kernel, repulsion = rbf_kernel(particles, bandwidth)
    return (_mix(kernel, score) + repulsion) / particles.shape[0]


def _mix(kernel: Tensor, values: Tensor) -> Tensor:
    """Σ_j k_ij v_j for kernels ``[M, M, …]`` and values ``[M, …, D]``."""
    return (kernel.movedim((0, 1), (-2, -1)) @ values.movedim(0, -2)).movedim(-2, 0)


def _at_least_two(count: int) -> None:
    if count < 2:
        raise OptionError(
            f"SVGD needs at least 2 particles, between which it takes distances; got {count}. With one particle it "
            "would be plain gradient ascent: use bayesmeta.MAML with objective='joint'."
        )
