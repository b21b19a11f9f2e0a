"""Policies that remember their trial: what was seen, done and received since it began goes through a memory.

Source: Duan et al. 2016 (see :mod:`bayesmeta.rl.memory.recurrent`), section 2.2: in each step the memory reads the
observation, the action before, its reward and whether an episode ended; its state crosses the episodes of a trial.

Departures: a clock is read too (what to explore hangs on the steps that are left); the value is an annuity of the steps
that are left times a learned rate of reward, so that one head serves the begin and the end of a trial.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError, SpaceError
from bayesmeta.ops.random import as_generator
from bayesmeta.rl.learner import horizon_of
from bayesmeta.rl.memory.recurrent import Memory, memory
from bayesmeta.rl.memory.snail import SNAILMemory
from bayesmeta.rl.policies import GaussianHead, head_for, mode, sample
from bayesmeta.rl.protocols import TaskVectorEnv, features, num_features
from bayesmeta.rl.rollout import Acted, Moment


class MemoryPolicy(nn.Module):
    """A memory between what a trial has shown and the next action.

    Attributes:
        trial_steps: steps of a trial; set it when the environment's horizon changes.

    Args:
        env: whose spaces, horizon and episodes a trial it is for; it is not kept.
        memory_kind: ``"gru"``, ``"lstm"`` or ``"snail"`` (with a capacity of one trial), or a function from the number
            of inputs to a :class:`~bayesmeta.rl.memory.recurrent.Memory`.
        units: width of the memory; of ``"snail"`` that of its first layer.
        encoder: module for observations, from their features ``[…, F]`` to ``[…, encoded]``; None passes them on.
        encoded: what the encoder gives.
        reward_shift, reward_scale: the memory reads (reward − shift) / scale; 0.5 and 0.5 make a Bernoulli
            reward −1 or 1.
        gamma: discount that the values are of.
        squashed: keep continuous actions inside their box by tanh.
        log_std: first log standard deviation of continuous actions.
        seed: of the first weights.

    Raises:
        HorizonError: for an environment without a horizon.
        OptionError: for settings outside their range.
        SpaceError: for spaces other than ``Discrete`` and ``Box``.
    """

    def __init__(
        self,
        env: TaskVectorEnv,
        *,
        memory_kind: Any = "gru",
        units: int = 64,
        encoder: nn.Module | None = None,
        encoded: int | None = None,
        reward_shift: float = 0.0,
        reward_scale: float = 1.0,
        gamma: float = 1.0,
        squashed: bool = False,
        log_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not reward_scale > 0:
            raise OptionError(f"reward_scale must be positive; got {reward_scale}.")
        if (encoder is None) != (encoded is None):
            raise OptionError("Give encoder and encoded together: the module, and how many numbers it gives.")
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        self.set_trial(env)
        self.reward_shift, self.reward_scale, self.gamma = reward_shift, reward_scale, gamma
        self.encoder = encoder
        self.head = head_for(self.action_space, squashed=squashed, log_std=log_std)
        self._actions = num_features(self.action_space)
        seen = num_features(self.observation_space) if encoded is None else encoded
        inputs = seen + self._actions + _EXTRAS
        generator = as_generator(seed, stream="memory policy")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            self.memory = self._memory(memory_kind, inputs, units)
            self.act_layer = nn.Linear(self.memory.outputs, self.head.outputs)
            self.value_layer = nn.Linear(self.memory.outputs, 1)
            for layer, gain in ((self.act_layer, 0.01), (self.value_layer, 1.0)):
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
        self.free = nn.Parameter(self.head.initial_free()) if self.head.free else None
        assert isinstance(self.head, GaussianHead) or self.free is None

    def _memory(self, kind: Any, inputs: int, units: int) -> Memory:
        if kind == "snail":
            return SNAILMemory(inputs, self.trial_steps, units=units)
        return memory(kind, inputs, units) if isinstance(kind, str) else kind(inputs)

    def set_trial(self, env: TaskVectorEnv) -> None:
        """Take an environment's horizon and episodes a trial as one's own; its spaces must be the same.

        Raises:
            HorizonError: for an environment without a horizon.
            SpaceError: for one with other spaces.
            OptionError: for trials that are longer than what a memory of limited capacity can look back.
        """
        horizon = horizon_of(env, "a policy that remembers its trial needs to know how long that is")
        spaces = (env.single_observation_space, env.single_action_space)
        if spaces != (self.observation_space, self.action_space):
            raise SpaceError(
                f"The environment has observations {spaces[0]} and actions {spaces[1]}; this policy was made for "
                f"{self.observation_space} and {self.action_space}."
            )
        steps = horizon * env.episodes_per_trial
        capacity = getattr(getattr(self, "memory", None), "capacity", steps)
        if capacity < steps - 1:
            raise OptionError(
                f"A trial has {steps} steps, and this policy's memory looks {capacity} back. Make it with the longest "
                "trial in mind: memory_kind=lambda inputs: SNAILMemory(inputs, capacity)."
            )
        self.horizon, self.trial_steps = horizon, steps

    # -- reading a moment -----------------------------------------------------------------------------------------

    def remaining(self, moment: Moment) -> Tensor:
        """Steps that are left in the trial at most, this one included, ``[…]``: at least 1."""
        return (self.trial_steps - moment.episode * self.horizon - moment.clock).clamp_min(1).to(moment.reward.dtype)

    def annuity(self, moment: Moment) -> Tensor:
        """Σ_{t < remaining} γ^t: what a reward of 1 in every step that is left is worth."""
        left = self.remaining(moment)
        return left if self.gamma == 1 else (1 - self.gamma**left) / (1 - self.gamma)

    def inputs(self, moment: Moment) -> Tensor:
        """What the memory reads, ``[…, inputs]``."""
        dtype = self.act_layer.weight.dtype
        known = (~moment.begins).unsqueeze(-1).to(dtype)  # nothing is, where a trial begins
        seen = features(self.observation_space, moment.observation, dtype)
        seen = seen if self.encoder is None else self.encoder(seen)
        left = self.remaining(moment).to(dtype)
        extras = [
            ((moment.reward.to(dtype) - self.reward_shift) / self.reward_scale).unsqueeze(-1) * known,
            moment.ended.to(dtype).unsqueeze(-1),
            known,
            (1 - left / self.trial_steps).unsqueeze(-1),
            (left / (left + 10)).unsqueeze(-1),
        ]
        assert len(extras) == _EXTRAS
        return torch.cat([seen, features(self.action_space, moment.action, dtype) * known, *extras], -1)

    # -- acting and learning --------------------------------------------------------------------------------------

    def first(self, batch: int) -> Tensor:
        """The memory's state at the begin of a trial."""
        return self.memory.first(batch)

    def actor(self, *, greedy: bool = False) -> Any:
        """An :data:`~bayesmeta.rl.rollout.Actor`: draws actions, or takes the likeliest (``greedy``)."""

        def act(moment: Moment, state: Tensor | None, generator: torch.Generator) -> Acted:
            state = self.first(len(moment.begins)) if state is None else state
            hidden, state = self.memory.step(self.inputs(moment), state, moment.begins)
            distribution = self._distribution(hidden)
            action = mode(distribution) if greedy else sample(distribution, generator)
            return Acted(action, distribution.log_prob(action), state, self._value(hidden, moment))

        return act

    def unroll(self, moments: Moment, state: Tensor | None) -> tuple[Any, Tensor]:
        """All steps of a rollout again, with gradients.

        Args:
            moments: ``[time, batch, …]``.
            state: before the first, ``[batch, width]``; None at the begin of a trial.

        Returns:
            The policy in every step, of batch shape ``[time, batch]``, and the values ``[time, batch]``.
        """
        state = self.first(moments.begins.shape[1]) if state is None else state
        hidden, _ = self.memory.unroll(self.inputs(moments), state, moments.begins)
        return self._distribution(hidden), self._value(hidden, moments)

    def forward(self, moments: Moment, state: Tensor | None) -> tuple[Any, Tensor]:
        """As :meth:`unroll`."""
        return self.unroll(moments, state)

    def _distribution(self, hidden: Tensor) -> Any:
        return self.head.distribution(self.act_layer(hidden), self.free)

    def _value(self, hidden: Tensor, moment: Moment) -> Tensor:
        return self.value_layer(hidden).squeeze(-1) * self.annuity(moment).to(hidden.dtype)


#: reward, end of an episode, whether anything is known, and the clock twice (share of the trial gone, steps left)
_EXTRAS = 5
