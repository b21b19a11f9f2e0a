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

from bayesmeta.errors import ContextError, OptionError
from bayesmeta.ops.random import as_generator, forked_rng
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.learner import horizon_of
from bayesmeta.rl.memory.policy import MemoryPolicy
from bayesmeta.rl.policies import GaussianHead
from bayesmeta.rl.protocols import TaskVectorEnv, features, num_features
from bayesmeta.rl.rollout import Acted, Moment, Rollout
from bayesmeta.rl.varibad.exploring import CorrelatedNoise, SpreadHead
from bayesmeta.rl.varibad.memory import BeliefMemory, flat, shape_of

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
        correlation: of the noise of continuous actions from step to step of an episode, in [0, 1): noise that stays on
            one side leads away from where the policy would go, and white noise only around it, but it biases the
            policy gradient; see :class:`~bayesmeta.rl.varibad.exploring.CorrelatedNoise`. It is new in each rollout.
        spread: let the standard deviation of continuous actions depend on state and belief: a policy that still
            searches may be less sure of what to do than one that knows.
        trial_clock: read how much of the trial is gone; without it, trials may be longer than in training, and the
            policy reads the time in its episode alone.
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
        correlation: float = 0.0,
        spread: bool = False,
        trial_clock: bool = True,
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

        CorrelatedNoise(correlation)  # refuses what is out of range
        if correlation and (hasattr(env.single_action_space, "n") or options.get("squashed")):
            raise OptionError("correlation is of Gaussian noise: of continuous actions that are not squashed.")
        self.correlation, self.trial_clock = correlation, trial_clock
        super().__init__(env, memory_kind=memory, encoder=encoder, encoded=encoded, **options)
        if spread:
            self._spread(options.get("log_std", 0.0), options.get("seed", 0))

    def _spread(self, log_std: float, seed: int) -> None:
        """Take a head whose standard deviations are outputs."""
        if not isinstance(self.head, GaussianHead):
            raise OptionError("spread=True is for continuous actions that are not squashed.")
        box: Any = self.action_space
        low, high = (torch.as_tensor(end).flatten() for end in (box.low, box.high))
        self.head, self.free = SpreadHead(low, high, log_std=log_std), None
        with forked_rng(as_generator(seed, stream="spread head")):
            self.act_layer = nn.Linear(self.memory.outputs, self.head.outputs)
            nn.init.orthogonal_(self.act_layer.weight, 0.01)
            nn.init.zeros_(self.act_layer.bias)

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

    def actor(self, *, greedy: bool = False) -> Any:
        """As in :class:`MemoryPolicy`, with correlated noise if asked for."""
        if greedy or not self.correlation:
            return super().actor(greedy=greedy)
        noise = CorrelatedNoise(self.correlation)

        def act(moment: Moment, state: Tensor | None, generator: torch.Generator) -> Acted:
            state = self.first(len(moment.begins)) if state is None else state
            hidden, state = self.memory.step(self.inputs(moment), state, moment.begins)
            distribution = self._distribution(hidden)
            normal = distribution.base_dist
            action = normal.loc + normal.scale * noise.draw(normal.loc, moment.clock == 0, generator)
            return Acted(action, distribution.log_prob(action), state, self._value(hidden, moment))

        return act

    def inputs(self, moment: Moment) -> Tensor:
        """What the memory reads, ``[…, inputs]``: what the policy sees, and the transition that led here."""
        assert moment.successor is not None
        dtype = self.act_layer.weight.dtype
        left = self.remaining(moment).to(dtype)
        gone = moment.clock.to(dtype) / self.horizon
        observation, act = (shape_of(space) for space in (self.observation_space, self.action_space))
        raw = flat(moment.observation, observation, dtype)
        return torch.cat(
            [
                self._seen(moment.observation, dtype),
                torch.stack([*self._trial(left), gone], -1),
                (~moment.begins).unsqueeze(-1).to(dtype),
                raw,
                flat(moment.successor, observation, dtype),
                flat(moment.action, act, dtype),
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

    def _trial(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """The clock of the trial, from the steps left; zeros where it is not read."""
        if not self.trial_clock:
            return torch.zeros_like(left), torch.zeros_like(left)
        return 1 - left / self.trial_steps, left / (left + 10)

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
