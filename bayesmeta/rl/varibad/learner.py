"""VariBAD: a belief over the task at every step, and a policy that acts on it.

Source: L. Zintgraf, K. Shiarlis, M. Igl, S. Schulze, Y. Gal, K. Hofmann, S. Whiteson, "VariBAD: A Very Good Method for
Bayes-Adaptive Deep RL via Meta-Learning", ICLR 2020, https://arxiv.org/abs/1910.08348, eqs. 8 to 11. An encoder and a
decoder learn by a bound that decodes the trial from the belief after each of its prefixes; a policy on (s, belief)
learns by PPO on whole trials, whose ends of episodes are ordinary steps, so that what is worth knowing later is worth
exploring for now.

Departures: those of :mod:`bayesmeta.rl.varibad.policy`; encoder and decoder learn from the trials that PPO has just
collected, without a buffer of older ones, since the environments are many; with prefixes drawn at random (``prefixes``)
each update decodes from some of the beliefs, the same in expectation.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import CheckpointError, NonFiniteLossError, OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.envs.vector import TensorVectorEnv
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.policy_gradient.ppo import PPOConfig, trial_advantages
from bayesmeta.rl.protocols import TaskVectorEnv, check_vector
from bayesmeta.rl.rollout import Rollout, collect
from bayesmeta.rl.varibad.loss import Against, Bound, Decode, bound, decoded_steps, trial_numbers
from bayesmeta.rl.varibad.policy import BeliefPolicy
from bayesmeta.rl.varibad.shaping import BeliefBonus, Curriculum, PolicyReward, check_training

#: in a learner's state, before the names of the decoder's parameters
_DECODER = "decoder."


@dataclasses.dataclass(frozen=True)
class BeliefConfig:
    """How encoder and decoder learn.

    Attributes:
        decode: which steps each belief is asked to decode: those of the whole ``"trial"``, of the ``"past"`` alone, or
            the ``"new"`` one; see :mod:`bayesmeta.rl.varibad.loss`.
        kl: what the KL is to: the belief one step ``"before"``, or the ``"prior"``. Its weight and free bits are
            those of the latent context.
        prefixes: how many beliefs of a rollout each update decodes from, drawn at random; None: all.
        epochs: passes over a rollout.
        environments: how many environments a pass reads, drawn at random; None: all.
        minibatches: pieces of a pass, each some of the environments.
        lr, last_lr: Adam's rate at the begin and at the end.
        max_grad_norm: longer gradients are shortened to it.

    Raises:
        OptionError: for unknown names and settings outside their range.
    """

    decode: Decode = "trial"
    kl: Against = "before"
    prefixes: int | None = 12
    epochs: int = 4
    environments: int | None = None
    minibatches: int = 4
    lr: float = 3e-3
    last_lr: float = 3e-4
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("decode", get_args(Decode)), ("kl", get_args(Against))):
            if getattr(self, name) not in known:
                raise OptionError(
                    f"Unknown {name} {getattr(self, name)!r}; expected one of {', '.join(map(repr, known))}."
                )
        for name in ("prefixes", "epochs", "environments", "minibatches"):
            value = getattr(self, name)
            if not is_whole(value, 1) and not (name in ("prefixes", "environments") and value is None):
                raise OptionError(f"{name} must be a whole number of at least 1; got {value!r}.")
        for name in ("lr", "last_lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be positive and finite; got {getattr(self, name)}.")


class VariBAD(RL2):
    """Trains a :class:`~bayesmeta.rl.varibad.policy.BeliefPolicy` and a decoder on trials.

    Args:
        env: with autoreset and new tasks for each trial.
        policy: to be trained, in place, with its latent context; None makes one.
        decoder: to be trained, in place; None makes a :class:`~bayesmeta.rl.latent.decoder.TransitionDecoder` with two
            hidden layers of ``width``.
        spec: of the contexts, for a new policy; None: :meth:`~bayesmeta.rl.ContextSpec.explaining`, that is the reward
            given s, a and s′, and in ordinary gymnasium environments reward and change of the state given s and a.
        latent: size of the latent, of a new policy.
        width: of the encoder and of a new decoder, of a new policy.
        kl_weight, free_bits: of a new policy's latent context.
        config: settings of PPO; the discount must be the policy's.
        beliefs: settings of encoder and decoder.
        policy_reward: what the policy is trained on: the name of a number in ``info`` such as ``"dense_reward"``, or
            a :class:`~bayesmeta.rl.varibad.shaping.PolicyReward`; None is the reward. Beliefs read the reward in any
            case.
        policy_reward_until: iterations after which the policy is trained on the reward after all; None: never.
        bonus: what the policy is paid beside that for how its belief changes.
        curriculum: a :class:`~bayesmeta.rl.varibad.shaping.Curriculum` such as
            :class:`~bayesmeta.rl.varibad.shaping.ShrinkingRadius`: called with ``env.family`` and the share of the
            training that is done, it gives the family that the next rollout is of, for beliefs and policy alike.
            Between rollouts the environment has its own.
        iterations: rollouts to train for, over which rates and entropy go to their last values.
        steps: of each rollout; None is one whole trial where episodes have a fixed length. Beliefs go on where a trial
            does, and decode what the rollout has of it.
        seed: of actions, minibatches, draws and first weights.
        policy_options: of a new policy, see :class:`~bayesmeta.rl.varibad.policy.BeliefPolicy`.

    Attributes:
        iteration: rollouts done.
        history: one dict a rollout: ``reward`` (mean total of the rollout), figures of PPO's update, and means of
            ``bound``, ``reconstruction`` and ``belief_kl`` in nats, of a belief.

    Raises:
        OptionError: for options that do not fit.
    """

    policy: BeliefPolicy

    def __init__(
        self,
        env: TaskVectorEnv,
        policy: BeliefPolicy | None = None,
        decoder: TransitionDecoder | None = None,
        *,
        spec: ContextSpec | None = None,
        latent: int = 5,
        width: int = 64,
        kl_weight: float = 0.1,
        free_bits: float = 0.0,
        config: PPOConfig | None = None,
        beliefs: BeliefConfig | None = None,
        policy_reward: str | PolicyReward | None = None,
        policy_reward_until: int | None = None,
        bonus: BeliefBonus | None = None,
        curriculum: Curriculum | None = None,
        iterations: int = 200,
        steps: int | None = None,
        seed: int = 0,
        **policy_options: Any,
    ) -> None:
        check_vector(env)
        check_training(policy_reward, bonus, curriculum)
        config = PPOConfig() if config is None else config
        if policy is None:
            spec = ContextSpec.explaining(env) if spec is None else spec
            core = LatentContext.make(
                spec, latent, "recurrent", width=width, seed=seed, kl_weight=kl_weight, free_bits=free_bits
            )
            policy = BeliefPolicy(env, core, gamma=config.gamma, seed=seed, **policy_options).to(env.device)
        elif policy_options or spec is not None:
            given = ", ".join([*policy_options, *(["spec"] if spec is not None else [])])
            raise OptionError(f"A policy was given, and options of a new one: {given}. Leave out one or the other.")
        super().__init__(env, policy, config=config, iterations=iterations, steps=steps, seed=seed)
        core = policy.latent
        assert core.spec is not None
        if decoder is None:
            decoder = TransitionDecoder(core.spec, core.latent, hidden=(width, width), seed=seed).to(env.device)
        elif decoder.latent != core.latent or decoder.spec != core.spec:
            raise OptionError(
                f"The decoder takes a latent of size {decoder.latent} and contexts {decoder.spec.options()}; the "
                f"policy's are {core.latent} and {core.spec.options()}. Make both of one spec."
            )
        if policy_reward_until is not None and (policy_reward is None or not is_whole(policy_reward_until, 1)):
            raise OptionError(
                f"policy_reward_until={policy_reward_until!r} with policy_reward={policy_reward!r}; expected a whole "
                "number of at least 1, beside the name of a reward."
            )
        self.decoder, self.beliefs = decoder, beliefs or BeliefConfig()
        self.policy_reward, self.policy_reward_until, self.bonus = policy_reward, policy_reward_until, bonus
        if curriculum is not None and not isinstance(env, TensorVectorEnv):
            raise OptionError(
                f"A curriculum changes the family by which a TensorVectorEnv steps; a {type(env).__name__} has made "
                "its environments already. Train without curriculum, or on a family that steps as tensors."
            )
        self.curriculum = curriculum
        self._noise = as_generator(seed, env.device, "varibad")
        self._learned = [*core.parameters(), *decoder.parameters()]
        self._optimizer = torch.optim.Adam(self._learned, self.beliefs.lr)

    # -- an iteration -----------------------------------------------------------------------------------------------

    def _iterate(self) -> dict[str, float]:
        state = self.policy.first(self.env.num_envs).detach() if self._state is None else self._state
        share = self._share(self.iteration)
        over = self.policy_reward_until is not None and self.iteration >= self.policy_reward_until
        other = None if over else self.policy_reward
        keep = () if other is None else (other,) if isinstance(other, str) else other.names
        with self._easier(share):
            rollout = collect(
                self.env,
                self.policy.actor(),
                self.steps,
                generator=self.generator,
                start=self._moment,
                state=state,
                keep=keep,
            )
        self._moment, self._state = rollout.after, rollout.state
        config = self.config
        paid = dataclasses.replace(rollout, reward=self._pay(rollout, other, share))
        advantage = trial_advantages(paid, self._last_value(rollout), gamma=config.gamma, lam=config.lam)
        paid = self.policy.believed(paid)
        told = self.updates.update(paid, advantage, share=share, generator=self.generator, step=self.iteration + 1)
        # after PPO, whose ratios are of the beliefs that were acted on
        return {"reward": rollout.total().mean().item(), **told, **self._learn_beliefs(rollout, share)}

    @contextmanager
    def _easier(self, share: float) -> Iterator[None]:
        """The tasks of the curriculum, and the environment's own ones afterwards."""
        if self.curriculum is None:
            yield
            return
        env: Any = self.env
        own = env.family
        env.family = self.curriculum(own, share)
        try:
            yield
        finally:
            env.family = own

    def _share(self, iteration: int) -> float:
        return iteration / max(1, self.iterations - 1)

    def _pay(self, rollout: Rollout, other: str | PolicyReward | None, share: float) -> Tensor:
        """What the policy is trained on, ``[steps, batch]``."""
        if other is None:
            reward = rollout.reward
        else:
            reward = rollout.extra[other] if isinstance(other, str) else other(rollout, share)
        if self.bonus is None:
            return reward
        with torch.no_grad():
            now, after, cleared = self._states(rollout, torch.arange(reward.shape[1]))
            before, then = (
                self.policy.latent.of_state(states).base_dist for states in (torch.cat([now, cleared]), after)
            )
        parts = ((before.loc, before.scale), (then.loc, then.scale))
        return reward + self.bonus(*parts, rollout.trial_ended, gamma=self.config.gamma, share=share)

    def _learn_beliefs(self, rollout: Rollout, share: float) -> dict[str, float]:
        config, told = self.beliefs, list[Tensor]()
        for group in self._optimizer.param_groups:
            group["lr"] = config.lr + share * (config.last_lr - config.lr)
        batch = rollout.reward.shape[1]
        for _ in range(config.epochs):
            order = torch.randperm(batch, generator=self._noise, device=self._noise.device)[: config.environments]
            for rows in order.chunk(min(config.minibatches, len(order))):
                found = self.bound(rollout, rows, self._noise)
                loss = -found.value.mean()
                if not torch.isfinite(loss):
                    step = self.iteration + 1
                    raise NonFiniteLossError(
                        f"The bound of the beliefs is {-loss.item()} at update {step}. Lower their rate "
                        "(BeliefConfig.lr), or scale the rewards (ContextSpec.reward_scale).", step
                    )  # fmt: skip
                self._optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self._learned, config.max_grad_norm)
                self._optimizer.step()
                told.append(torch.stack([part.detach().mean() for part in found]))
        names = ("bound", "reconstruction", "belief_kl")
        return dict(zip(names, torch.stack(told).mean(0).tolist(), strict=True))

    def bound(self, rollout: Rollout, rows: Tensor, generator: torch.Generator) -> Bound:
        """The bound of some of the beliefs of a rollout, differentiable in encoder and decoder.

        Args:
            rollout: of this learner's policy, with its first state.
            rows: which environments.
            generator: of the prefixes and the draws.
        """
        config, core = self.beliefs, self.policy.latent
        begins = rollout.moments.begins[:, rows]
        now, after, cleared = self._states(rollout, rows)
        context = self._context(rollout, rows)
        beliefs = torch.cat([now, after])
        # what was known before each of them
        before = torch.cat([now, now, cleared])
        prefixes = self._prefixes(len(after), generator)
        q = core.of_state(beliefs[prefixes])
        kl = core.kl(q, core.of_state(before[prefixes])) if config.kl == "before" else core.kl(q)
        z = core.sample(q, 1, generator)[0]
        log_likelihood = self.decoder.log_prob(z, context).transpose(1, 2)
        return bound(log_likelihood, decoded_steps(trial_numbers(begins), prefixes, config.decode), kl)

    def _states(self, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The latent context's states ``[…, rows, W]``: before a rollout, after each of its steps, and before each but
        the first, which is nothing known where a trial begins."""
        memory, clears = self.policy.memory, rollout.trial_ended[:, rows]
        x = self.policy.inputs(rollout.moments.map(lambda x: x[:1, rows]))
        now = memory.states(x, rollout.first_state[rows], rollout.moments.begins[:1, rows])
        after = memory.trail(self._context(rollout, rows), now[0], clears)
        first = self.policy.latent.first_state(len(rows))
        return now, after, torch.where(clears[:-1].unsqueeze(-1), first, after[:-1])

    def _context(self, rollout: Rollout, rows: Tensor) -> Observations:
        """All steps of a rollout, whatever trial they are of, ``[rows, steps, …]``."""
        parts = (rollout.moments.observation, rollout.action, rollout.reward, rollout.successor)
        spec = self.policy.memory.spec
        return spec.transitions(*(part[:, rows].transpose(0, 1) for part in parts))

    def _prefixes(self, steps: int, generator: torch.Generator) -> Tensor:
        count, device = self.beliefs.prefixes, generator.device
        if count is None or count > steps:
            return torch.arange(steps + 1, device=device)
        return torch.randperm(steps + 1, generator=generator, device=device)[:count].sort().values

    # -- what was learned -------------------------------------------------------------------------------------------

    @property
    def belief_spec(self) -> ContextSpec:
        """What stands in the context of :meth:`belief_path`."""
        return self.policy.memory.spec

    def belief_path(
        self, env: TaskVectorEnv, *, greedy: bool = True, generator: Seed = None
    ) -> tuple[BeliefPath, Rollout]:
        """The beliefs on the way through one trial in each environment, and the rollout that they are of.

        Where a trial is over before the others, its belief stays.

        Args:
            env: of held-out tasks. It is reset.
            greedy: take the likeliest actions, else draw.
            generator: of the actions; None means seed 0.
        """
        generator = as_generator(generator, env.device, "evaluation")
        self.policy.set_trial(env)
        try:
            rollout = collect(env, self.policy.actor(greedy=greedy), self.policy.trial_steps, generator=generator)
        finally:
            self.policy.set_trial(self.env)
        context = self.policy.memory.spec.of_rollout(rollout)
        return BeliefPath.of(self.policy.latent, context, self.decoder.program()), rollout

    # -- going on later ---------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The options that change what it learns, as plain values."""
        memory, decoder = self.policy.memory, self.decoder
        return {
            "learner": type(self).__name__,
            "latent_context": self.policy.latent.options(),
            "decoder": f"{type(decoder).__name__}, {type(decoder.likelihood).__name__}",
            "beliefs": dataclasses.asdict(self.beliefs),
            "policy_reward": [_plain(self.policy_reward), self.policy_reward_until],
            "bonus": _plain(self.bonus),
            "curriculum": _plain(self.curriculum),
            "rl_gradient": memory.rl_gradient,
            **dataclasses.asdict(self.config),
            "iterations": self.iterations,
            "steps": self.steps,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, the environment's state too: tensors and plain values."""
        state = super().state_dict()
        decoder = {_DECODER + name: value.clone() for name, value in self.decoder.state_dict().items()}
        optimizer = copy.deepcopy(self._optimizer.state_dict())
        more = {"belief_updates": optimizer, "noise": self._noise.get_state()}
        return state | more | {"policy": state["policy"] | decoder}

    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Take policy, beliefs and decoder of a state, to act and not to go on training.

        Raises:
            CheckpointError: when they are of another shape.
        """
        known = state["policy"]
        decoder = {name.removeprefix(_DECODER): v for name, v in known.items() if name.startswith(_DECODER)}
        shapes = [{name: value.shape for name, value in part.items()} for part in (decoder, self.decoder.state_dict())]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"The state belongs to another decoder: {shapes[0]} there and {shapes[1]} here.")
        policy = {name: value for name, value in known.items() if not name.startswith(_DECODER)}
        super().load_learned({**state, "policy": policy})
        self.decoder.load_state_dict(decoder)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            CheckpointError: when it belongs to a policy of another shape, or to other environments.
        """
        super().load_state_dict(state)
        self._optimizer.load_state_dict(copy.deepcopy(state["belief_updates"]))
        self._noise.set_state(state["noise"].cpu())


def _plain(option: Any) -> Any:
    """An option as plain values: of an object its fields, with functions by the name of their type."""
    if option is None or isinstance(option, str):
        return option
    fields = dataclasses.asdict(option) if dataclasses.is_dataclass(option) and not isinstance(option, type) else {}
    plain = {name: type(value).__name__ if callable(value) else value for name, value in fields.items()}
    return {"kind": type(option).__name__, **plain}
