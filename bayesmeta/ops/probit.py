"""The probability that each of several normal variables is the largest."""

import math

import torch
from torch import Tensor

#: The rule's nodes reach so many standard deviations to each side of the middle.
_REACH = 8.0
#: Below this a product of normal CDFs by erf has lost digits, and logarithms are taken.
_SMALL = 1e-8


def log_probability_largest(mean: Tensor, index: Tensor | None = None) -> Tensor:
    """log P(z_k > z_j for all j ≠ k) for independent z_k ~ N(mean_k, 1), float64.

    P_k = ∫ φ(t) Π_{j≠k} Φ(t + mean_k − mean_j) dt, the choice probabilities of a multinomial probit model with
    independent errors (M. Girolami, S. Rogers, "Variational Bayesian Multinomial Probit Regression with Gaussian
    Process Priors", Neural Computation 18, 2006, https://doi.org/10.1162/neco.2006.18.8.1790). For two variables that
    is Φ((mean_1 − mean_2) / √2). For more, the trapezoidal rule, which for an analytic integrand that vanishes at both
    ends converges geometrically: the logarithm is right to 2e-6 down to probabilities of 1e-20, to 0.02 down to 1e-70,
    and finite further out.

    Args:
        mean: ``[…, K]``, K ≥ 2.
        index: which k, ``[…]``; None means all.

    Returns:
        ``[…]``; for all k ``[…, K]``.
    """
    mean = mean.double()
    classes = mean.shape[-1]
    if index is None:
        each = [log_probability_largest(mean, torch.full(mean.shape[:-1], k).to(mean.device)) for k in range(classes)]
        return torch.stack(each, -1)
    index = index.long().expand(mean.shape[:-1]).unsqueeze(-1)
    others = torch.arange(classes - 1, device=mean.device)
    others = others + (others >= index)  # all but the index
    gaps = mean.gather(-1, index) - mean.gather(-1, others)
    if classes == 2:
        return torch.special.log_ndtr(gaps.squeeze(-1) / math.sqrt(2.0))
    return _log_integral(gaps)


def _log_integral(gaps: Tensor) -> Tensor:
    """log ∫ φ(t) Π_j Φ(t + gaps_j) dt, ``[…]`` for gaps ``[…, J]``."""
    points = 2 * math.ceil(_REACH / min(0.5, 1.5 / math.sqrt(gaps.shape[-1] + 1))) + 1
    nodes = torch.linspace(-_REACH, _REACH, points, dtype=torch.float64).tolist()
    step = nodes[1] - nodes[0]
    scaled, total = gaps / math.sqrt(2.0), torch.zeros_like(gaps[..., 0])
    for t in nodes:  # a dimension for the nodes would take so many times the memory
        weight = step * math.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
        total += weight * (0.5 + 0.5 * torch.erf(scaled + t / math.sqrt(2.0))).prod(-1)
    log_total = total.log()
    small = total < _SMALL
    if bool(small.any()):
        log_total[small] = _log_tail(gaps[small], nodes, step)
    return log_total


def _log_tail(gaps: Tensor, nodes: list[float], step: float) -> Tensor:
    """The same in logarithms, ``[rows]``, with nodes about a point near the integrand's peak."""
    middle = 0.6 * (-gaps.amin(-1)).clamp(min=0.0)  # of J equal gaps −g the peak is at g J / (J + 1)
    total = torch.full_like(middle, -math.inf)
    for node in nodes:
        t = middle + node
        log_value = torch.special.log_ndtr(t.unsqueeze(-1) + gaps).sum(-1) - 0.5 * t.square()
        total = torch.logaddexp(total, log_value)
    return total + math.log(step) - 0.5 * math.log(2 * math.pi)
