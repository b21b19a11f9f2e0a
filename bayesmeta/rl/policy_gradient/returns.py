"""Returns, advantages and the linear-feature baseline, as pure functions of ``[time, …]`` tensors.

Time is the first dimension; whatever stands behind it (batch, or tasks and copies) runs in parallel. Row t of every
tensor belongs to the step from s_t by a_t: the reward r_t, and whether s_{t+1} was terminal (``terminated``) or the
episode was cut there (``truncated``). Several episodes may follow each other in one column.

The two ends differ in what the future is worth: nothing after a terminal state; V(s_{t+1}) after a cut, since the
episode would have gone on (F. Pardo et al., "Time Limits in Reinforcement Learning", ICML 2018,
https://arxiv.org/abs/1712.00378, section 3). Neither lets rewards of the next episode through. The last row is always
a cut: the rollout stops there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesmeta.errors import NonFiniteDataError, OptionError, ShapeError


def discounted_returns(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    next_values: Tensor | None = None,
) -> Tensor:
    """Discounted sums of the rewards from each step on, G_t = r_t + γ G_{t+1}.

    Args:
        rewards: ``[time, …]``.
        terminated: whether s_{t+1} was terminal, booleans of that shape.
        truncated: whether the episode was cut after step t, booleans of that shape.
        gamma: discount, in [0, 1].
        next_values: V(s_{t+1}), of that shape; read where an episode was cut, and in the last row. None counts
            what would come after a cut as 0: right where the horizon is part of the task, and wrong where it is not.

    Returns:
        ``[time, …]``.

    Raises:
        ShapeError: for tensors of different shapes.
        NonFiniteDataError: for NaN or infinite rewards.
        OptionError: for a discount outside [0, 1].
    """
    values = torch.zeros_like(rewards) if next_values is None else next_values
    check_rollout(rewards, next_values=values, terminated=terminated, truncated=truncated)
    _check_share("gamma", gamma)
    ended = terminated | truncated
    # the value of s_{t+1} counts only where no later row stands for it
    read = ended.clone()
    read[-1] = True
    future = torch.where(read & ~terminated, values, 0.0)
    return _scan(rewards + gamma * future, ended, gamma)


def advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalised advantage estimates.

    Source: J. Schulman, P. Moritz, S. Levine, M. Jordan, P. Abbeel, "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", ICLR 2016, https://arxiv.org/abs/1506.02438, eqs. 10 and 16.

        δ_t = r_t + γ V(s_{t+1}) [not terminated] − V(s_t)
        A_t = δ_t + γ λ A_{t+1} [neither terminated nor truncated]

    Args:
        rewards: ``[time, …]``.
        values: V(s_t), of that shape.
        next_values: V(s_{t+1}) of the state that the step led to, of that shape; **before** a reset, which is not
            ``values[t + 1]`` where an episode ended: see :func:`successors`. Not read after a terminal state.
        terminated, truncated: booleans of that shape.
        gamma: discount, in [0, 1].
        lam: λ, in [0, 1]: 0 has least variance, 1 least bias.

    Returns:
        ``[time, …]``; V + A is the TD(λ) return, the target for the values.

    Raises:
        ShapeError: for tensors of different shapes, or no step.
        NonFiniteDataError: for NaN or infinite rewards.
        OptionError: for γ or λ outside [0, 1].
    """
    check_rollout(rewards, values=values, next_values=next_values, terminated=terminated, truncated=truncated)
    _check_share("gamma", gamma)
    _check_share("lam", lam)
    # a state after the end may hold anything, NaN included: it is left out rather than multiplied by 0
    delta = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    return _scan(delta, terminated | truncated, gamma * lam)


def _scan(terms: Tensor, ended: Tensor, decay: float) -> Tensor:
    """Σ_{s ≥ t} decay^{s − t} terms_s within each episode, from the last row back."""
    out, running = [], torch.zeros_like(terms[0])
    for t in range(len(terms) - 1, -1, -1):
        running = terms[t] + torch.where(ended[t], 0.0, decay * running)
        out.append(running)
    return torch.stack(out[::-1])


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OptionError(f"{name} must be in [0, 1]; got {value}.")


def successors(values: Tensor, last: Tensor, ended: Tensor, final: Tensor | None = None) -> Tensor:
    """V(s_{t+1}) of every step, for :func:`advantages`.

    Args:
        values: V(s_t), ``[time, …]``.
        last: V of the state after the last row, ``[…]``.
        ended: whether the episode ended after step t (terminated or truncated), booleans ``[time, …]``.
        final: V of the state in which an episode ended, ``[time, …]``, read where ``ended``; None gives NaN there,
            which :func:`advantages` does not read after a terminal state, and which shows where a truncated
            episode's value was forgotten.

    Returns:
        ``[time, …]``.
    """
    after = torch.cat([values[1:], last.unsqueeze(0)])
    return torch.where(ended, torch.full_like(values, torch.nan) if final is None else final, after)


def check_rollout(rewards: Tensor, **others: Tensor) -> None:
    """Check that tensors of a rollout belong together.

    Raises:
        ShapeError: when one has another shape than the rewards, or there is no step.
        NonFiniteDataError: when a reward is NaN or infinite, naming the step.
    """
    if rewards.dim() < 1 or rewards.shape[0] == 0:
        raise ShapeError(f"A rollout needs at least one step; the rewards have shape {list(rewards.shape)}.")
    for name, tensor in others.items():
        if tensor.shape != rewards.shape:
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)}; expected that of the rewards, {list(rewards.shape)}."
            )
        if name in ("terminated", "truncated") and tensor.dtype != torch.bool:
            raise ShapeError(f"{name} must be boolean; got {tensor.dtype}.")
    if not torch.isfinite(rewards).all():
        bad = (~torch.isfinite(rewards)).nonzero()[0].tolist()
        raise NonFiniteDataError(
            f"The reward at [time, …] = {bad} is {rewards[tuple(bad)].item()}; expected finite rewards. "
            "Check the environment's reward."
        )


class LinearBaseline:
    """A value function that is linear in simple features, fitted anew to each task's own rollouts.

    Source: Y. Duan, X. Chen, R. Houthooft, J. Schulman, P. Abbeel, "Benchmarking Deep Reinforcement Learning for
    Continuous Control", ICML 2016, https://arxiv.org/abs/1604.06778, supplement 2: features [s, s², t/100, (t/100)²,
    (t/100)³, 1], ridge regression. MAML-RL uses it inside (Finn et al. 2017, section 5.3).

    Departures: the ridge is relative to the mean square of each feature; the clock t is given, since several
    episodes may follow each other. Fitting it to the same rollouts whose gradient it then centres has a bias of
    order 1 / (number of steps), as in the paper.

    Args:
        ridge: strength of the penalty, as a share of the mean square of the features.
    """

    def __init__(self, ridge: float = 1e-5) -> None:
        if not ridge > 0:
            raise OptionError(f"ridge must be positive, so that features that never vary do no harm; got {ridge}.")
        self.ridge = ridge

    @staticmethod
    def features(observations: Tensor, clock: Tensor) -> Tensor:
        """``[time, tasks, copies, F]`` and the steps since the episode's begin ``[time, tasks, copies]``."""
        states = observations.double().clamp(-10, 10)
        t = clock.double().unsqueeze(-1) / 100
        return torch.cat([states, states**2, t, t**2, t**3, torch.ones_like(t)], -1)

    @torch.no_grad()
    def fit_predict(self, observations: Tensor, clock: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
        """Fit each task's returns and predict them.

        Args:
            observations: ``[time, tasks, copies, F]``.
            clock: steps since the begin of the episode, ``[time, tasks, copies]``.
            returns: ``[time, tasks, copies]``.
            mask: which steps count, booleans ``[time, tasks, copies]``; None means all.

        Returns:
            Predicted returns, ``[time, tasks, copies]``, in the returns' dtype. Computed in float64.

        Raises:
            ShapeError: when the shapes do not fit.
        """
        if observations.shape[:-1] != returns.shape or clock.shape != returns.shape or returns.dim() != 3:
            raise ShapeError(
                f"Expected observations [time, tasks, copies, F] with clock and returns [time, tasks, copies]; got "
                f"{list(observations.shape)}, {list(clock.shape)} and {list(returns.shape)}."
            )
        features = self.features(observations, clock).transpose(0, 1).flatten(1, 2)  # [tasks, steps, D]
        target = returns.double().transpose(0, 1).flatten(1, 2).unsqueeze(-1)
        weight = torch.ones_like(target) if mask is None else mask.transpose(0, 1).flatten(1, 2).unsqueeze(-1).double()
        weighted = features * weight
        gram = features.mT @ weighted
        mean_square = gram.diagonal(dim1=-2, dim2=-1)
        floor = mean_square.amax(-1, keepdim=True) * 1e-12  # a feature that is 0 throughout
        penalty = torch.diag_embed(self.ridge * torch.maximum(mean_square, floor).clamp_min(1e-30))
        coefficients = torch.linalg.solve(gram + penalty, weighted.mT @ target)
        fitted = (features @ coefficients).squeeze(-1)
        tasks, copies = returns.shape[1:]
        return fitted.reshape(tasks, -1, copies).transpose(0, 1).to(returns.dtype)


def episode_clock(ended: Tensor) -> Tensor:
    """Steps since the begin of the episode: 0 in its first step.

    Args:
        ended: whether the episode ended after step t, booleans ``[time, …]``. The first row is the begin of one.

    Returns:
        Whole numbers ``[time, …]``.
    """
    out, running = [], torch.zeros_like(ended[0], dtype=torch.long)
    for row in ended:
        out.append(running)
        running = torch.where(row, 0, running + 1)
    return torch.stack(out)
