"""Trust-region updates of policies that unroll, in the place of PPO: RL²'s own choice.

Source: Schulman et al. 2015 (see :mod:`bayesmeta.rl.policy_gradient.trpo`); Duan et al. 2016, RL², section 3.

Departure: the values are linear in what the memory gives, fitted by ridge regression to each rollout after the step, so
that fitting them moves no policy; the paper trains a second recurrent network.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from bayesmeta.errors import NonFiniteLossError, OptionError
from bayesmeta.ops.batched import FlatParameters
from bayesmeta.rl.policies import detached, kl
from bayesmeta.rl.policy_gradient.objectives import average, likelihood_ratio, standardised
from bayesmeta.rl.policy_gradient.trpo import Product, trust_region_step
from bayesmeta.rl.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class TRPOConfig:
    """Settings of TRPO.

    Attributes:
        gamma: discount.
        lam: λ of the advantages.
        max_kl: bound of a step, in nats.
        cg_steps, damping, product: see :func:`~bayesmeta.rl.policy_gradient.trpo.trust_region_step`.
        curvature_share: share of the environments on which the direction's curvature is taken, in (0, 1]. Gradient,
            line search and bound are those of all of them.
        ridge: of the values' fit, as a share of the mean square of what the memory gives.

    Raises:
        OptionError: for settings outside their range.
    """

    gamma: float = 1.0
    lam: float = 0.95
    max_kl: float = 0.01
    cg_steps: int = 10
    damping: float = 1e-3
    product: Product = "double_backward"
    curvature_share: float = 0.25
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.curvature_share <= 1 or not self.ridge > 0:
            raise OptionError(
                f"Expected curvature_share in (0, 1] and ridge > 0; got {self.curvature_share} and {self.ridge}."
            )


class TRPO:
    """The updates of one policy.

    Args:
        policy: a :class:`~bayesmeta.rl.memory.policy.MemoryPolicy`.
        config: settings.
    """

    def __init__(self, policy: Any, config: TRPOConfig) -> None:
        self.policy, self.config = policy, config
        moving = {n: p for n, p in policy.named_parameters() if not n.startswith("value_layer.")}
        self.flat = FlatParameters({n: p.shape for n, p in moving.items()})

    def update(
        self, rollout: Rollout, advantage: Tensor, *, share: float, generator: torch.Generator, step: int = 0
    ) -> dict[str, float]:
        """One trust-region step, then the values' fit.

        Args:
            rollout: of the policy as it is, with its values.
            advantage: of every step, ``[time, batch]``.
            share: not read: the settings do not change along the training.
            generator: of the environments on which curvature is taken.
            step: for the message of an error.

        Returns:
            ``kl``, ``improvement``, ``accepted`` and ``backtracks`` of the step, and ``value_loss``.

        Raises:
            NonFiniteLossError: for advantages that are not finite, or too large for their spread to be.
        """
        scaled = standardised(advantage)
        if not torch.isfinite(scaled).all():
            raise NonFiniteLossError(
                f"The advantages of update {step}, or their spread, are not finite. Scale the rewards.", step
            )
        assert rollout.value is not None
        named = dict(self.policy.named_parameters())
        theta = self.flat.flatten({n: named[n].detach() for n in self.flat.shapes})
        batch = rollout.reward.shape[1]
        some = torch.randperm(batch, generator=generator, device=generator.device).to(rollout.reward.device)
        some = some[: max(1, round(batch * self.config.curvature_share))]
        moments = rollout.moments.map(lambda x: x[:, some])
        first = rollout.first_state
        state = None if first is None else first[some]
        with torch.no_grad():
            old = detached(self.policy(rollout.moments, first)[0])
            old_some = detached(self.policy(moments, state)[0])

        def surrogate(at: Tensor) -> Tensor:
            distribution, _ = functional_call(self.policy, self.flat.views(at), (rollout.moments, first))
            return average(likelihood_ratio(distribution.log_prob(rollout.action), rollout.log_prob, scaled))

        def divergence(at: Tensor) -> Tensor:
            return kl(old, functional_call(self.policy, self.flat.views(at), (rollout.moments, first))[0]).mean()

        def curvature(at: Tensor) -> Tensor:
            return kl(old_some, functional_call(self.policy, self.flat.views(at), (moments, state))[0]).mean()

        config = self.config
        done = trust_region_step(
            theta,
            surrogate,
            divergence,
            curvature=curvature,
            max_kl=config.max_kl,
            cg_steps=config.cg_steps,
            damping=config.damping,
            product=config.product,
        )
        with torch.no_grad():
            for name, value in self.flat.views(done.theta).items():
                named[name].copy_(value)
        loss = self._fit_values(rollout, rollout.value + advantage)
        return {
            "kl": done.divergence,
            "improvement": done.improvement,
            "accepted": float(done.accepted),
            "backtracks": float(done.backtracks),
            "value_loss": loss,
        }

    @torch.no_grad()
    def _fit_values(self, rollout: Rollout, target: Tensor) -> float:
        """Ridge regression of the values' layer, per step that is left, on what the moved memory gives."""
        policy, moments = self.policy, rollout.moments
        state = policy.first(target.shape[1]) if rollout.first_state is None else rollout.first_state
        hidden, _ = policy.memory.unroll(policy.inputs(moments), state, moments.begins)
        x = hidden.flatten(0, 1).double()
        y = (target / policy.annuity(moments).to(target.dtype)).flatten().double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        gram = x.mT @ x
        penalty = self.config.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype, device=x.device)
        penalty[-1, -1] = 0.0  # the mean is free
        weights = torch.linalg.solve(gram + penalty, x.mT @ y)
        policy.value_layer.weight.copy_(weights[:-1].unsqueeze(0))
        policy.value_layer.bias.copy_(weights[-1:])
        return float((x @ weights - y).square().mean())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a step hangs on the policy alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
