"""Optimal values and actions of known tabular MDPs: value iteration, for many at once (R. Bellman, 1957)."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesmeta.errors import NonFiniteDataError, OptionError, ShapeError
from bayesmeta.rl.envs.family import check_at_least


def finite_horizon_values(reward: Tensor, transition: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Optimal values and actions with a number of steps left, undiscounted, by backward induction.

    Args:
        reward: mean rewards ``[…, states, actions]``.
        transition: probabilities ``[…, states, actions, states]``.
        horizon: steps of an episode.

    Returns:
        values: ``[horizon + 1, …, states]``; entry t is the expected reward from step t on; the last is 0.
        actions: ``[horizon, …, states]`` int64; entry t is what to do at step t, the first of those that are equally
            good.

    Raises:
        OptionError: for a horizon below 1.
        ShapeError, NonFiniteDataError: for tensors that are no MDPs.
    """
    check_at_least(1, horizon=horizon)
    _check(reward, transition)
    values = [torch.zeros_like(reward[..., 0])]
    actions: list[Tensor] = []
    for _ in range(horizon):
        best = _worth(reward, transition, values[0]).max(-1)
        values.insert(0, best.values)
        actions.insert(0, best.indices)
    return torch.stack(values), torch.stack(actions)


def discounted_values(
    reward: Tensor, transition: Tensor, discount: float, *, tolerance: float = 1e-8, max_steps: int = 100_000
) -> tuple[Tensor, Tensor]:
    """Optimal values and actions of an endless MDP, discounted.

    Args:
        reward: mean rewards ``[…, states, actions]``.
        transition: probabilities ``[…, states, actions, states]``.
        discount: γ in [0, 1).
        tolerance: largest error of a value, from the contraction: γ / (1 − γ) times the last change.
        max_steps: iterations before giving up.

    Returns:
        values ``[…, states]`` and actions ``[…, states]`` int64.

    Raises:
        OptionError: for a discount outside [0, 1), or if the tolerance is not met (it is below what the dtype can
            give). ShapeError, NonFiniteDataError: for tensors that are no MDPs.
    """
    if not 0 <= discount < 1:
        raise OptionError(f"discount={discount}; expected a number in [0, 1).")
    _check(reward, transition)
    values = torch.zeros_like(reward[..., 0])
    for _ in range(max_steps):
        best = _worth(reward, transition, discount * values).max(-1)
        error = float((best.values - values).abs().max()) * discount / (1 - discount)
        values = best.values
        if error <= tolerance:
            return values, best.indices
    raise OptionError(
        f"values still change by more than tolerance={tolerance:g} allows after {max_steps} iterations; take a "
        "larger tolerance, or float64."
    )


def policy_values(reward: Tensor, transition: Tensor, policy: Tensor) -> Tensor:
    """Values of a policy that may be random, undiscounted.

    Args:
        reward: mean rewards ``[…, states, actions]``.
        transition: probabilities ``[…, states, actions, states]``.
        policy: probabilities of actions at each step, ``[horizon, …, states, actions]``.

    Returns:
        ``[horizon + 1, …, states]``; entry t is the expected reward from step t on.

    Raises:
        ShapeError, NonFiniteDataError: for tensors that are no MDPs.
    """
    _check(reward, transition)
    values = [torch.zeros_like(reward[..., 0])]
    for chances in policy.flip(0):
        values.insert(0, (chances * _worth(reward, transition, values[0])).sum(-1))
    return torch.stack(values)


def _worth(reward: Tensor, transition: Tensor, after: Tensor) -> Tensor:
    """Of each action, ``[…, states, actions]``."""
    return reward + (transition @ after[..., None, :, None]).squeeze(-1)


def _check(reward: Tensor, transition: Tensor) -> None:
    if reward.dim() < 2 or transition.shape != (*reward.shape, reward.shape[-2]):
        raise ShapeError(
            f"rewards {list(reward.shape)} and transitions {list(transition.shape)} were given; expected "
            "[…, states, actions] and […, states, actions, states]."
        )
    if not (bool(torch.isfinite(reward).all()) and bool(torch.isfinite(transition).all())):
        raise NonFiniteDataError("the rewards or transitions hold NaN or infinity; give finite numbers.")
    off = float((transition.sum(-1) - 1).abs().max())
    if off > 1e-4 or bool((transition < 0).any()):
        raise NonFiniteDataError(
            f"transition probabilities must be at least 0 and sum to 1; the largest sum is off by {off:.2g}."
        )
