"""Proximal policy optimisation of policies that unroll.

Source: Schulman et al. 2017 (see :func:`bayesmeta.rl.policy_gradient.objectives.ppo_clip`), algorithm 1. A minibatch is
some of the environments with all their steps, so that a memory is unrolled whole.

Departures: advantages may be standardised in each time step by itself (returns at the begin of a trial vary more than
at its end); rate and entropy bonus go linearly to their last values; the value's error is counted per step that is
left where the policy has an annuity.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from bayesmeta.errors import NonFiniteLossError, OptionError
from bayesmeta.rl.policy_gradient.objectives import average, ppo_clip, standardised
from bayesmeta.rl.policy_gradient.returns import advantages
from bayesmeta.rl.rollout import Moment, Rollout

Standardise = Literal["step", "all", "none"]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO.

    Attributes:
        epochs: passes over a rollout.
        minibatches: pieces of a pass, each some of the environments.
        clip: ε.
        gamma: discount.
        lam: λ of the advantages.
        lr, last_lr: Adam's rate at the begin and at the end.
        entropy, last_entropy: weight of the entropy bonus, in nats, at the begin and at the end.
        value_weight: of the squared error of the values.
        max_grad_norm: longer gradients are shortened to it.
        standardise: advantages in each time ``"step"`` by itself, ``"all"`` together, or ``"none"``.

    Raises:
        OptionError: for settings outside their range.
    """

    epochs: int = 3
    minibatches: int = 4
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    lr: float = 3e-3
    last_lr: float = 1e-4
    entropy: float = 0.03
    last_entropy: float = 0.0
    value_weight: float = 0.5
    max_grad_norm: float = 1.0
    standardise: Standardise = "step"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.minibatches < 1:
            raise OptionError(f"epochs and minibatches must be ≥ 1; got {self.epochs} and {self.minibatches}.")
        for name in ("clip", "lr", "last_lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be positive and finite; got {getattr(self, name)}.")
        for name in ("entropy", "last_entropy", "value_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be at least 0 and finite; got {getattr(self, name)}.")
        if self.standardise not in get_args(Standardise):
            raise OptionError(
                f"Unknown standardise {self.standardise!r}; expected one of {', '.join(get_args(Standardise))}."
            )

    def check(self, num_envs: int) -> None:
        """See that so many environments can be learned from.

        Raises:
            OptionError: for one environment where advantages are compared between environments: all would be 0.
        """
        if num_envs < 2 and self.standardise == "step":
            raise OptionError(
                "standardise='step' compares environments in each step, and there is one: every advantage would be 0. "
                "Take PPOConfig(standardise='all'), or more environments."
            )

    def at(self, share: float) -> tuple[float, float]:
        """Rate and entropy weight when a share of the training in [0, 1] is done."""
        share = min(max(share, 0.0), 1.0)
        return self.lr + share * (self.last_lr - self.lr), self.entropy + share * (self.last_entropy - self.entropy)


class Unrolling(Protocol):
    """A policy that PPO can train: an ``nn.Module`` with these."""

    def unroll(self, moments: Moment, state: Any) -> tuple[Any, Tensor]:
        """The policy and the values in every step of a rollout."""

    def annuity(self, moment: Moment) -> Tensor:
        """The size of the values, ``[…]``; ones where they have none of their own."""


class PPO:
    """The updates of one policy.

    Args:
        policy: an ``nn.Module`` that is :class:`Unrolling`.
        config: settings.
    """

    def __init__(self, policy: Any, config: PPOConfig) -> None:
        self.policy, self.config = policy, config
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr, eps=1e-5)

    def update(
        self,
        rollout: Rollout,
        advantage: Tensor,
        *,
        share: float,
        generator: torch.Generator,
        step: int = 0,
    ) -> dict[str, float]:
        """Passes over a rollout.

        Args:
            rollout: of the policy as it is, with its values.
            advantage: of every step, ``[time, batch]``, such as :func:`trial_advantages`.
            share: of the training that is done, in [0, 1].
            generator: of the order of the environments.
            step: for the message of an error.

        Returns:
            Means over the pieces: ``policy_loss``, ``value_loss``, ``entropy``, ``kl`` (an estimate, in nats) and
            ``clipped`` (share of steps).

        Raises:
            NonFiniteLossError: for a loss that is not finite; the policy is that of the last piece before.
            OptionError: for one environment whose advantages are to be standardised in each step.
        """
        config = self.config
        config.check(rollout.reward.shape[1])
        assert rollout.value is not None
        rate, bonus = config.at(share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        dims = {"step": 1, "all": None}
        scaled = advantage if config.standardise == "none" else standardised(advantage, dims=dims[config.standardise])
        target = rollout.value + advantage
        batch = rollout.reward.shape[1]
        pieces, told = min(config.minibatches, batch), []
        for _ in range(config.epochs):
            order = torch.randperm(batch, generator=generator, device=generator.device).to(rollout.reward.device)
            for index in order.chunk(pieces):
                told.append(self._piece(rollout, scaled, target, index, bonus, step))
        return {name: sum(t[name] for t in told) / len(told) for name in told[0]}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.optimizer.load_state_dict(state)

    def _piece(
        self, rollout: Rollout, scaled: Tensor, target: Tensor, index: Tensor, bonus: float, step: int
    ) -> dict[str, float]:
        moments = rollout.moments.map(lambda x: x[:, index])
        state = None if rollout.first_state is None else rollout.first_state[index]
        distribution, values = self.policy.unroll(moments, state)
        log_prob, old = distribution.log_prob(rollout.action[:, index]), rollout.log_prob[:, index]
        entropy = distribution.entropy().mean()
        policy_loss = -average(ppo_clip(log_prob, old, scaled[:, index], clip=self.config.clip))
        value_loss = ((values - target[:, index]) / self.policy.annuity(moments).to(values.dtype)).square().mean()
        loss = policy_loss + self.config.value_weight * value_loss - bonus * entropy
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"PPO's loss is {loss.item()} at update {step}. Lower the rate, or scale the rewards.", step
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            change = log_prob - old
            return {
                "policy_loss": policy_loss.item(),
                "value_loss": value_loss.item(),
                "entropy": entropy.item(),
                "kl": (change.exp() - 1 - change).mean().item(),
                "clipped": (change.exp() - 1).abs().gt(self.config.clip).double().mean().item(),
            }


def trial_advantages(rollout: Rollout, last_value: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Advantages of policies that remember their trial, ``[time, batch]``.

    What is maximised is the reward of the whole trial, so that the ends of its episodes are ordinary steps: rewards of
    later episodes count for what was explored before. After a trial comes nothing, however its last episode ended.

    Args:
        rollout: with values.
        last_value: V at ``rollout.after``, ``[batch]``; read where the trial goes on beyond the rollout.
        gamma: discount.
        lam: λ.
    """
    assert rollout.value is not None
    after = torch.cat([rollout.value[1:], last_value.unsqueeze(0)])
    never = torch.zeros_like(rollout.trial_ended)
    return advantages(rollout.reward, rollout.value, after, rollout.trial_ended, never, gamma=gamma, lam=lam)
