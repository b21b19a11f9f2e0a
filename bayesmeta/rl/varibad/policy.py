"""Policies that act on their belief: (s, mean, log standard deviation) of a latent task, carried on step by step.

Source: Zintgraf et al. 2020 (see :mod:`bayesmeta.rl.varibad.loss`), section 3.3: a recurrent encoder reads the
transitions of a trial, the policy reads the state and the belief's parameters. No gradient of the policy's objective
reaches the encoder, unless asked for.

Departures: the policy reads a clock too, since what is worth exploring hangs on the steps that are left; policy and
value have no layer in common; the value is an annuity, as in :mod:`bayesmeta.rl.memory.policy`; any encoder that can be
carried on will do, a product of Gaussians too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import ContextError, OptionError
from bayesmeta.models.nets import mlp
from bayesmeta.models.stepping import steps_of
from bayesmeta.ops.random import as_generator, forked_rng
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.learner import horizon_of
from bayesmeta.rl.memory.policy import MemoryPolicy
from bayesmeta.rl.memory.recurrent import Memory
from bayesmeta.rl.protocols import TaskVectorEnv, features, num_features
from bayesmeta.rl.rollout import Moment, Rollout

#: what the policy reads of the time: share of the trial gone, steps left in it, share of the episode gone
_CLOCK = 3


#: What a policy reads of a belief: from mean and standard deviation ``[…, batch, D]`` to ``[…, batch, size]``.
Readout = Callable[[Tensor, Tensor], Tensor]


class DecodedReadout:
    """A belief as what the decoder expects of some transitions, at the belief's mean: a cell's chance of a reward, say.

    Numbers of a fixed meaning are easier to learn to act on than those of a latent whose encoder is still learning.
    Departure: in Zintgraf et al. 2020 the policy reads mean and (log) variance.

    Args:
        decoder: whose expectation it is; it is trained elsewhere.
        rows: x of the transitions, ``[probes, features]``.
        spread: read the mean log standard deviation of the latent too.

    Attributes:
        size: how many numbers it gives.
    """

    def __init__(self, decoder: TransitionDecoder, rows: Tensor, *, spread: bool = False) -> None:
        self.decoder, self.rows, self.spread = decoder, rows, spread
        self.size = len(rows) * decoder.spec.outputs + spread

    def __call__(self, loc: Tensor, scale: Tensor) -> Tensor:
        """``[…, batch, size]``."""
        rows = self.rows.to(loc).expand(loc.shape[-2], *self.rows.shape)
        mean = self.decoder.distribution(loc, rows).mean
        found = mean if self.decoder.spec.outputs == 1 else mean.flatten(-2)
        return torch.cat([found, scale.log().mean(-1, keepdim=True)], -1) if self.spread else found


@dataclasses.dataclass(frozen=True)
class BelievedMoment(Moment):
    """Moments whose beliefs are known, so that an update of the policy need not compute them again.

    Attributes:
        belief: what the policy reads of them, ``[…, size]``.
    """

    belief: Tensor | None = None


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
        readout: what is read of the belief, with its ``size``; None: mean and log standard deviation.
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
        self._shapes = [_shape(space) for space in (spec.observation_space, spec.action_space)]
        raw, action = (1 if shape is None else shape.numel() for shape in self._shapes)
        self._parts = [seen, 1, raw, raw, action, 1]
        self._latent_width = latent.first_state(1).shape[-1]
        super().__init__(sum(self._parts), units, self._latent_width + raw)
        self.latent, self.rl_gradient, self.readout = latent, rl_gradient, readout
        inputs = seen + (2 * latent.latent if readout is None else readout.size)
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
            _restored(state, observation),
            _restored(action, act),
            reward.squeeze(-1),
            _restored(successor, observation),
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
        seen = torch.cat([x[..., : self._parts[0]], belief], -1)
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


class BeliefPolicy(MemoryPolicy):
    """A policy and values on (s, belief, clock).

    Attributes:
        latent: the latent context whose belief it acts on.

    Args:
        env: whose spaces, horizon and episodes a trial it is for; it is not kept.
        latent: the latent context, with a spec of these spaces and an encoder that can be carried on.
        units: width of each hidden layer.
        layers: hidden layers of the policy, and of the values.
        rl_gradient: let gradients of the policy's objective reach the encoder.
        readout: what the policy reads of the belief, a :data:`Readout` with a ``size`` such as
            :class:`DecodedReadout`; None: mean and log standard deviation.
        encoder, encoded: module for observations, from what the environment gives to ``[…, encoded]``, and that
            number. None takes the spec's ``encode``, or the observations' own numbers.
        options: ``gamma``, ``squashed``, ``log_std`` and ``seed``, as in :class:`MemoryPolicy`.

    Raises:
        ContextError: for an environment with other spaces than the spec's, or with trials longer than its
            ``max_context``.
        OptionError: for a latent context without a spec, and sizes below 1.
        UnsupportedError: for an encoder that cannot be carried on.
    """

    memory: BeliefMemory

    def __init__(
        self,
        env: TaskVectorEnv,
        latent: LatentContext,
        *,
        units: int = 64,
        layers: int = 2,
        rl_gradient: bool = False,
        readout: Any = None,
        encoder: nn.Module | None = None,
        encoded: int | None = None,
        **options: Any,
    ) -> None:
        spec = latent.spec
        if spec is None:
            raise OptionError("A policy needs the latent context's spec, to make contexts of what it sees; give one.")
        if not is_whole(units, 1) or not is_whole(layers, 1):
            raise OptionError(f"units and layers must be whole numbers of at least 1; got {units!r} and {layers!r}.")
        spec.check_env(env)
        _check_length(spec, env)
        if encoder is None and spec.encode is not None:
            encoder, encoded = _Encode(spec), spec.encoded
        seen = (num_features(env.single_observation_space) if encoded is None else encoded) + _CLOCK

        def memory(inputs: int) -> BeliefMemory:
            with forked_rng(as_generator(options.get("seed", 0), stream="belief policy")):
                return BeliefMemory(latent, seen, units, layers=layers, rl_gradient=rl_gradient, readout=readout)

        super().__init__(env, memory_kind=memory, encoder=encoder, encoded=encoded, **options)

    @property
    def latent(self) -> LatentContext:
        """The latent context whose belief it acts on."""
        return self.memory.latent

    def set_trial(self, env: TaskVectorEnv) -> None:
        """As in :class:`MemoryPolicy`.

        Raises:
            ContextError: also for trials that are longer than the spec's ``max_context``.
        """
        if (memory := getattr(self, "memory", None)) is not None:
            _check_length(memory.spec, env)
        super().set_trial(env)

    def inputs(self, moment: Moment) -> Tensor:
        """What the memory reads, ``[…, inputs]``: what the policy sees, and the transition that led here."""
        assert moment.successor is not None
        dtype = self.act_layer.weight.dtype
        left = self.remaining(moment).to(dtype)
        gone = moment.clock.to(dtype) / self.horizon
        observation, act = (_shape(space) for space in (self.observation_space, self.action_space))
        raw = _flat(moment.observation, observation, dtype)
        return torch.cat(
            [
                self._seen(moment.observation, dtype),
                torch.stack([1 - left / self.trial_steps, left / (left + 10), gone], -1),
                (~moment.begins).unsqueeze(-1).to(dtype),
                raw,
                _flat(moment.successor, observation, dtype),
                _flat(moment.action, act, dtype),
                moment.reward.unsqueeze(-1).to(dtype),
            ],
            -1,
        )

    def unroll(self, moments: Moment, state: Tensor | None) -> tuple[Any, Tensor]:
        """As in :class:`MemoryPolicy`; of a :class:`BelievedMoment` no belief is computed."""
        belief = getattr(moments, "belief", None)
        if belief is None:
            return super().unroll(moments, state)
        hidden = self.memory.give(self.inputs(moments), belief)
        return self._distribution(hidden), self._value(hidden, moments)

    def believed(self, rollout: Rollout) -> Rollout:
        """A rollout whose moments have their beliefs, without gradients; as it is where gradients are wanted."""
        if self.memory.rl_gradient:
            return rollout
        with torch.no_grad():
            states = self.memory.states(self.inputs(rollout.moments), rollout.first_state, rollout.moments.begins)
            moments = BelievedMoment(**vars(rollout.moments), belief=self.memory.belief(states))
        return dataclasses.replace(rollout, moments=moments)

    def _seen(self, observation: Tensor, dtype: torch.dtype) -> Tensor:
        if self.encoder is not None:
            return self.encoder(observation).to(dtype)
        return features(self.observation_space, observation, dtype)

    def _distribution(self, hidden: Tensor) -> Any:
        return super()._distribution(hidden[..., : self.memory.outputs])

    def _value(self, hidden: Tensor, moment: Moment) -> Tensor:
        return super()._value(hidden[..., self.memory.outputs :], moment)


def _check_length(spec: ContextSpec, env: TaskVectorEnv) -> None:
    """See that a whole trial is no longer than contexts may be: step by step nobody would notice.

    Raises:
        ContextError: when it is.
        HorizonError: for an environment without a horizon.
    """
    steps = horizon_of(env, "a belief is about all steps of a trial") * env.episodes_per_trial
    if spec.max_context is not None and steps > spec.max_context:
        raise ContextError(
            f"A trial has {steps} transitions; memory is for max_context={spec.max_context}. Raise the bound, or take "
            "shorter episodes or fewer of them (episodes_per_trial)."
        )


class _Encode(nn.Module):
    """A spec's ``encode`` as a module."""

    def __init__(self, spec: ContextSpec) -> None:
        super().__init__()
        self._spec = spec

    def forward(self, observation: Tensor) -> Tensor:
        assert self._spec.encode is not None
        return self._spec.encode(observation)


def _shape(space: Any) -> torch.Size | None:
    """Of a value of a space; None for a ``Discrete`` one."""
    return None if hasattr(space, "n") else torch.Size(space.shape)


def _flat(value: Tensor, shape: torch.Size | None, dtype: torch.dtype) -> Tensor:
    """A value of a space as ``[…, numbers]``, as it is: whole numbers are not made one-hot."""
    value = value.unsqueeze(-1) if not shape else value.flatten(value.dim() - len(shape))
    return value.to(dtype)


def _restored(numbers: Tensor, shape: torch.Size | None) -> Tensor:
    """The value of :func:`_flat`."""
    return numbers.squeeze(-1).long() if shape is None else numbers.reshape(*numbers.shape[:-1], *shape)
