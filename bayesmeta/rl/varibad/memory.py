"""A memory that is a belief: what a belief policy carries from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.models.nets import mlp
from bayesmeta.models.stepping import steps_of
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.memory.recurrent import Memory


class BeliefMemory(Memory):
    """A memory that is a belief: it keeps the state of a latent context, and gives what is computed from the belief.

    Its state is that of the latent context and, behind it, the observation at which the next transition begins. What it
    gives has two halves of ``outputs`` numbers: for the policy and for the value.

    Args:
        latent: the latent context, whose encoder can be carried on, with its spec.
        seen: width of what the policy reads beside the belief.
        units: width of each hidden layer.
        layers: hidden layers.
        rl_gradient: let gradients of what it gives reach the encoder.
        readout: what is read of the belief, with its ``size``; None: mean and log standard deviation. One with a
            ``beside_size`` above 0 is asked by ``beside(seen, read)`` for so many numbers more.
    """

    def __init__(
        self,
        latent: LatentContext,
        seen: int,
        units: int,
        *,
        layers: int = 2,
        rl_gradient: bool = False,
        readout: Any = None,
    ) -> None:
        assert latent.spec is not None
        spec = latent.spec
        self._shapes = [shape_of(space) for space in (spec.observation_space, spec.action_space)]
        raw, action = (1 if shape is None else shape.numel() for shape in self._shapes)
        self._parts = [seen, 1, raw, raw, action, 1]
        self._latent_width = latent.first_state(1).shape[-1]
        super().__init__(sum(self._parts), units, self._latent_width + raw)
        self.latent, self.rl_gradient, self.readout = latent, rl_gradient, readout
        self._beside = getattr(readout, "beside_size", 0)
        inputs = seen + (2 * latent.latent if readout is None else readout.size) + self._beside
        self.policy_net, self.value_net = (
            nn.Sequential(mlp(inputs, [units] * (layers - 1), units, activation="tanh"), nn.Tanh()) for _ in range(2)
        )

    @property
    def spec(self) -> ContextSpec:
        """Of the contexts."""
        assert self.latent.spec is not None
        return self.latent.spec

    def first(self, batch: int) -> Tensor:
        """The state at the begin of a trial, ``[batch, width]``: nothing was read."""
        state = self.latent.first_state(batch)
        return torch.cat([state, state.new_zeros(batch, self.width - self._latent_width)], -1)

    # -- the belief -------------------------------------------------------------------------------------------------

    def absorb(self, x: Tensor, state: Tensor) -> Tensor:
        """The latent context's state ``[batch, W]`` at a moment, given all of one's state at the moment before."""
        _, known, _, successor, action, reward = x.split(self._parts, -1)
        before, at = state.split([self._latent_width, self.width - self._latent_width], -1)
        one = [part.unsqueeze(1) for part in (at, action, reward, successor)]
        return self.latent.step(before, self._context(one[0], one[1], one[2], one[3], known > 0))

    def trail(self, context: Observations, state: Tensor, clears: Tensor) -> Tensor:
        """The latent context's states after each transition, before any is cleared, ``[steps, batch, W]``.

        Args:
            context: transitions ``[batch, steps, …]``, those that count.
            state: before the first, ``[batch, W]``.
            clears: whether a trial ended with a transition, so that the next is read with nothing known, booleans
                ``[steps, batch]``.
        """
        if not bool(clears[:-1].any()):
            return steps_of(self.latent.recognition).path(context, state)[:, 1:].transpose(0, 1)
        after = []
        for t in range(context.shots):
            begins = clears[t - 1] if t else None
            state = self.latent.step(state, context.points(slice(t, t + 1)), begins)
            after.append(state)
        return torch.stack(after)

    def states(self, x: Tensor, state: Tensor, begins: Tensor) -> Tensor:
        """The latent context's states at each moment of a rollout, ``[steps, batch, W]``; as :meth:`unroll`."""
        state = torch.where(begins[0].unsqueeze(-1), self.first(len(state)), state)
        now = self.absorb(x[0], state)
        if len(x) == 1:
            return now.unsqueeze(0)
        _, known, at, successor, action, reward = x.transpose(0, 1).split(self._parts, -1)
        # a transition stands between two moments; none leads to the begin of a trial
        context = self._context(at[:, :-1], action[:, 1:], reward[:, 1:], successor[:, 1:], known[:, 1:, 0] > 0)
        after = self.trail(context, now, begins[1:])
        cleared = torch.where(begins[1:].unsqueeze(-1), self.latent.first_state(len(now)), after)
        return torch.cat([now.unsqueeze(0), cleared])

    def _context(self, state: Tensor, action: Tensor, reward: Tensor, successor: Tensor, mask: Tensor) -> Observations:
        observation, act = self._shapes
        return self.spec.transitions(
            restored(state, observation),
            restored(action, act),
            reward.squeeze(-1),
            restored(successor, observation),
            mask,
        )

    def _gradient(self) -> Any:
        return torch.set_grad_enabled(self.rl_gradient and torch.is_grad_enabled())

    def belief(self, states: Tensor) -> Tensor:
        """What the policy reads of the belief in the latent context's states ``[…, W]``, ``[…, size]``."""
        q = self.latent.of_state(states).base_dist
        if self.readout is not None:
            return self.readout(q.loc, q.scale)
        return torch.cat([q.loc, q.scale.log()], -1)

    def give(self, x: Tensor, belief: Tensor) -> Tensor:
        """What is computed from an input and a belief, ``[…, 2 × outputs]``: for the policy, and for the value."""
        seen = x[..., : self._parts[0]]
        more = [self.readout.beside(seen, belief)] if self._beside else []
        seen = torch.cat([seen, belief, *more], -1)
        return torch.cat([self.policy_net(seen), self.value_net(seen)], -1)

    # -- as a memory ------------------------------------------------------------------------------------------------

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`~bayesmeta.rl.memory.recurrent.Memory`."""
        with self._gradient():
            now = self.absorb(x, state)
            belief = self.belief(now)
        return self.give(x, belief), torch.cat([now, x.split(self._parts, -1)[2]], -1)

    def unroll(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`~bayesmeta.rl.memory.recurrent.Memory`; in one pass where no trial begins on the way."""
        self.check(x, state, begins)
        with self._gradient():
            states = self.states(x, state, begins)
            belief = self.belief(states)
        last = torch.cat([states[-1], x[-1].split(self._parts, -1)[2]], -1)
        return self.give(x, belief), last


def shape_of(space: Any) -> torch.Size | None:
    """Of a value of a space; None for a ``Discrete`` one."""
    return None if hasattr(space, "n") else torch.Size(space.shape)


def flat(value: Tensor, shape: torch.Size | None, dtype: torch.dtype) -> Tensor:
    """A value of a space as ``[…, numbers]``, as it is: whole numbers are not made one-hot."""
    value = value.unsqueeze(-1) if not shape else value.flatten(value.dim() - len(shape))
    return value.to(dtype)


def restored(numbers: Tensor, shape: torch.Size | None) -> Tensor:
    """The value of :func:`flat`."""
    return numbers.squeeze(-1).long() if shape is None else numbers.reshape(*numbers.shape[:-1], *shape)
