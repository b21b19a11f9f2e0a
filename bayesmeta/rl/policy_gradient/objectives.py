"""Policy objectives as terms of ``[time, …]``: what is to be **maximised**, one number for each step.

A sum or mean over the steps (:func:`average`) is the objective; its gradient is the policy gradient. Terms keep time
and batch apart, so that one backward of a sum over tasks gives each task its own gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesmeta.errors import OptionError, ShapeError


def average(terms: Tensor, mask: Tensor | None = None, dims: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of the terms that count.

    Args:
        terms: ``[time, …]``.
        mask: which steps count, booleans of that shape; None means all.
        dims: over which dimensions; None means all.
    """
    dims = tuple(range(terms.dim())) if dims is None else dims
    if mask is None:
        return terms.mean(dims)
    # a step that does not count may hold NaN, and 0 times NaN is NaN
    total = torch.where(mask, terms, 0.0).sum(dims)
    return total / mask.sum(dims).clamp_min(1)


def standardised(advantages: Tensor, mask: Tensor | None = None, dims: int | tuple[int, ...] | None = None) -> Tensor:
    """Advantages less their mean, over their standard deviation.

    Args:
        advantages: ``[time, …]``.
        mask: which steps count, booleans of that shape; None means all.
        dims: over which dimensions mean and deviation are taken; None means all. ``1`` of ``[time, batch]`` is each
            time step by itself: right where returns differ in scale along a trial.

    Returns:
        The same shape; 0 where all advantages are equal, up to rounding, and where the mask is False; NaN where their
        deviation is not finite, so that a loss says so.
    """
    centred, scale = _spread(advantages, mask, dims)
    # 0 × ∞ is NaN: numbers beside an overflowing deviation must not pass for equal ones
    return torch.where(scale > 0, centred / scale.clamp_min(1e-30) + 0 * scale, centred * scale)


def deviation(advantages: Tensor, mask: Tensor | None = None, dims: int | tuple[int, ...] | None = None) -> Tensor:
    """What :func:`standardised` divides by, with the dimensions kept; 0 where it gives 0.

    Args:
        advantages, mask, dims: as there.
    """
    return _spread(advantages, mask, dims)[1]


def _spread(advantages: Tensor, mask: Tensor | None, dims: int | tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Advantages less their mean, 0 where the mask is False, and their standard deviation."""
    dims = tuple(range(advantages.dim())) if dims is None else dims
    keep = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
    count = keep.sum(dims, keepdim=True).clamp_min(1)
    clean = torch.where(keep, advantages, 0.0)
    mean = clean.sum(dims, keepdim=True) / count
    centred = torch.where(keep, advantages - mean, 0.0)
    scale = (centred.square().sum(dims, keepdim=True) / count).sqrt()
    # equal numbers do not become noise: rounding leaves about eps times their size
    floor = 8 * torch.finfo(advantages.dtype).eps * (mean.abs() + 1e-8) + 1e-8
    return centred, torch.where(scale <= floor, 0.0, scale)


def policy_gradient(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE: A_t log π(a_t | s_t), whose gradient is the policy gradient.

    Source: R. J. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning", Machine Learning 8, 1992, https://doi.org/10.1007/BF00992696, eq. 4.

    Only its first derivative is right. Differentiated twice it leaves out that actions were drawn from the policy:
    use :func:`dice`, :func:`loaded_dice` or :func:`likelihood_ratio` where a gradient step is differentiated.

    Args:
        log_prob: log π(a_t | s_t), ``[time, …]``.
        advantages: or returns, of that shape; no gradient goes through them.
    """
    _same_shape(log_prob, advantages=advantages)
    return log_prob * advantages.detach()


def likelihood_ratio(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    """A_t π(a_t | s_t) / π_old(a_t | s_t): TRPO's surrogate, and ProMP's inner objective.

    Sources: J. Schulman, S. Levine, P. Moritz, M. Jordan, P. Abbeel, "Trust Region Policy Optimization", ICML 2015,
    https://arxiv.org/abs/1502.05477, eq. 14. J. Rothfuss, D. Lee, I. Clavera, T. Asfour, P. Abbeel, "ProMP: Proximal
    Meta-Policy Search", ICLR 2019, https://arxiv.org/abs/1810.06784, eq. 11: with π_old = π held fixed, its second
    derivative has low variance, and a bias that vanishes at a local optimum of the policy.

    Args:
        log_prob: log π(a_t | s_t), ``[time, …]``.
        old_log_prob: that of the policy that acted; no gradient goes through it.
        advantages: of that shape; no gradient goes through them.
    """
    _same_shape(log_prob, old_log_prob=old_log_prob, advantages=advantages)
    return (log_prob - old_log_prob.detach()).exp() * advantages.detach()


def ppo_clip(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """PPO's clipped surrogate.

    Source: J. Schulman, F. Wolski, P. Dhariwal, A. Radford, O. Klimov, "Proximal Policy Optimization Algorithms", 2017,
    https://arxiv.org/abs/1707.06347, eq. 7.

    Args:
        log_prob, old_log_prob, advantages: as in :func:`likelihood_ratio`.
        clip: ε: ratios beyond 1 ± ε bring nothing more.

    Raises:
        OptionError: for a clip that is not positive.
    """
    if not clip > 0:
        raise OptionError(f"clip must be positive; got {clip}.")
    _same_shape(log_prob, old_log_prob=old_log_prob, advantages=advantages)
    ratio = (log_prob - old_log_prob.detach()).exp()
    advantages = advantages.detach()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def magic_box(log_prob: Tensor) -> Tensor:
    """□(w) = exp(w − stop(w)): 1, with ∇□ = □ ∇w, to every order.

    Source: J. Foerster, G. Farquhar, M. Al-Shedivat, T. Rocktäschel, E. P. Xing, S. Whiteson, "DiCE: The Infinitely
    Differentiable Monte Carlo Estimator", ICML 2018, https://arxiv.org/abs/1802.05098, section 4.
    """
    return (log_prob - log_prob.detach()).exp()


def causal_log_prob(log_prob: Tensor, ended: Tensor) -> Tensor:
    """Σ_{s ≤ t} log π(a_s | s_s) over the steps of t's own episode, ``[time, …]``: all that r_t depends on.

    Args:
        log_prob: ``[time, …]``.
        ended: whether the episode ended after step t, booleans of that shape.
    """
    _same_shape(log_prob, ended=ended)
    out, running = [], torch.zeros_like(log_prob[0])
    for t in range(len(log_prob)):
        running = running + log_prob[t]
        out.append(running)
        running = torch.where(ended[t], 0.0, running)
    return torch.stack(out)


def dice(
    log_prob: Tensor, rewards: Tensor, ended: Tensor, *, gamma: float = 1.0, baseline: Tensor | None = None
) -> Tensor:
    """DiCE: γ^t □(Σ_{s ≤ t} log π_s) r_t, whose derivatives of every order estimate those of the expected return.

    Source: Foerster et al. 2018 (see :func:`magic_box`), eq. 5; with the baseline b_t of eq. 7: + γ^t (1 − □(log π_t))
    b_t. Its second derivative is right in the mean with a baseline too, its variance is not reduced there (J. Mao et
    al., "A Baseline for Any Order Gradient Estimation in Stochastic Computation Graphs", ICML 2019,
    https://proceedings.mlr.press/v97/mao19a.html); :func:`loaded_dice` does both.

    Args:
        log_prob: log π(a_t | s_t), ``[time, …]``.
        rewards: of that shape.
        ended: whether the episode ended after step t, booleans of that shape.
        gamma: discount; t counts from the begin of the episode.
        baseline: V(s_t), of that shape: the expected return from step t on, discounted from there.

    Returns:
        ``[time, …]``; the sum over an episode has the value of its discounted return.
    """
    _same_shape(log_prob, rewards=rewards, ended=ended, **({} if baseline is None else {"baseline": baseline}))
    terms = magic_box(causal_log_prob(log_prob, ended)) * rewards.detach()
    if baseline is not None:
        terms = terms + (1 - magic_box(log_prob)) * baseline.detach()
    return terms if gamma == 1 else terms * _discounts(ended, gamma).to(terms.dtype)


def loaded_dice(
    log_prob: Tensor,
    advantages: Tensor,
    ended: Tensor,
    *,
    decay: float = 1.0,
    old_log_prob: Tensor | None = None,
) -> Tensor:
    """Loaded DiCE: (□(Σ_{s ≤ t} log π_s) − □(Σ_{s < t} log π_s)) A_t, with any estimate of the advantages.

    Source: G. Farquhar, S. Whiteson, J. Foerster, "Loaded DiCE: Trading off Bias and Variance in Any-Order Score
    Function Estimators for Reinforcement Learning", NeurIPS 2019, https://arxiv.org/abs/1909.10549, eq. 13 and
    algorithm 1. Right to every order where the advantages are without bias; ``decay`` below 1 forgets old actions in
    the higher orders, with less variance and some bias.

    Departure: no discount γ^t is applied, as in every practical policy gradient; multiply the terms by it for the
    derivatives of the discounted return.

    Args:
        log_prob: log π(a_t | s_t), ``[time, …]``.
        advantages: or returns from step t on, of that shape; no gradient goes through them.
        ended: whether the episode ended after step t, booleans of that shape.
        decay: λ of algorithm 1, in [0, 1]; 0 has the derivatives of :func:`likelihood_ratio`.
        old_log_prob: that of the policy that acted, where it is another: products of ratios then weigh what it did, so
            that the derivatives hold for the new policy too (with a variance that grows with the distance and time).

    Returns:
        ``[time, …]``, each of value 0 for the policy that acted; only the derivatives matter.

    Raises:
        OptionError: for a decay outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise OptionError(f"decay must be in [0, 1]; got {decay}.")
    old = log_prob.detach() if old_log_prob is None else old_log_prob.detach()
    _same_shape(log_prob, advantages=advantages, ended=ended, old_log_prob=old)
    change = log_prob - old  # of value 0 for the policy that acted, and so exp of a sum of them is a magic box
    out, before = [], torch.zeros_like(log_prob[0])
    for t in range(len(log_prob)):
        before = decay * before
        until = before + change[t]
        out.append(until.exp() - before.exp())
        before = torch.where(ended[t], 0.0, until)
    return torch.stack(out) * advantages.detach()


def _discounts(ended: Tensor, gamma: float) -> Tensor:
    """γ^t with t from the begin of the episode, float64 ``[time, …]``."""
    out, running = [], torch.ones_like(ended[0], dtype=torch.float64)
    for row in ended:
        out.append(running)
        running = torch.where(row, 1.0, gamma * running)
    return torch.stack(out)


def _same_shape(log_prob: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.shape != log_prob.shape:
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)}; expected that of log_prob, {list(log_prob.shape)}. "
                "Densities of actions with several numbers are summed over them first."
            )
