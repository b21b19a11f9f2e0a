"""RL²: a policy whose memory is the adaptation.

Source: Y. Duan, J. Schulman, X. Chen, P. L. Bartlett, I. Sutskever, P. Abbeel, "RL²: Fast Reinforcement Learning via
Slow Reinforcement Learning", 2016, https://arxiv.org/abs/1611.02779; the same idea in J. X. Wang et al., "Learning to
Reinforcement Learn", 2016, https://arxiv.org/abs/1611.05763. The fast learner is the state of the memory, which crosses
the episodes of a trial and is cleared between trials; the slow one is a policy gradient on whole trials.

Departures: PPO in place of TRPO by default (TRPO by a :class:`~bayesmeta.rl.policy_gradient.trpo_policy.TRPOConfig`),
and those of :mod:`bayesmeta.rl.memory.policy` and :mod:`bayesmeta.rl.policy_gradient.ppo`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.memory.policy import MemoryPolicy
from bayesmeta.rl.policy_gradient.ppo import PPO, PPOConfig, trial_advantages
from bayesmeta.rl.policy_gradient.trpo_policy import TRPO, TRPOConfig
from bayesmeta.rl.protocols import TaskVectorEnv, check_vector
from bayesmeta.rl.rollout import Moment, Rollout, collect
from bayesmeta.rl.states import copied, load_networks
from bayesmeta.rl.trials import TrialReturns, curve_of, told_by, trial_returns


class RL2:
    """Trains a :class:`~bayesmeta.rl.memory.policy.MemoryPolicy` on trials.

    Args:
        env: with autoreset and new tasks for each trial.
        policy: to be trained, in place; None makes one with ``units``.
        config: settings of PPO, or of TRPO as in the paper; the discount must be the policy's.
        iterations: rollouts to train for, over which rate and entropy go to their last values.
        steps: of each rollout; None is one whole trial where episodes have a fixed length.
        units: width of the memory of a new policy.
        seed: of actions, minibatches and a new policy's first weights.
        policy_options: of a new policy, see :class:`~bayesmeta.rl.memory.policy.MemoryPolicy`.

    Attributes:
        iteration: rollouts done.
        history: one dict a rollout: ``reward`` (mean total of the rollout) and figures of the update.

    Raises:
        OptionError: for options that do not fit.
    """

    def __init__(
        self,
        env: TaskVectorEnv,
        policy: MemoryPolicy | None = None,
        *,
        config: PPOConfig | TRPOConfig | None = None,
        iterations: int = 200,
        steps: int | None = None,
        units: int = 64,
        seed: int = 0,
        **policy_options: Any,
    ) -> None:
        check_vector(env)
        self.config: PPOConfig | TRPOConfig = PPOConfig() if config is None else config
        if iterations < 1:
            raise OptionError(f"iterations must be at least 1; got {iterations}.")
        if policy is None:
            policy = MemoryPolicy(env, units=units, gamma=self.config.gamma, seed=seed, **policy_options)
            policy = policy.to(env.device)
        elif policy_options or policy.gamma != self.config.gamma:
            raise OptionError(
                f"A policy was given with discount {policy.gamma}; expected the config's, {self.config.gamma}, and no "
                f"options of a new one (got {', '.join(policy_options) or 'none'})."
            )
        self.policy, self.iterations, self.seed = policy, iterations, seed
        self.generator = as_generator(seed, env.device, "rl2")
        self.updates: PPO | TRPO = (
            PPO(policy, self.config) if isinstance(self.config, PPOConfig) else TRPO(policy, self.config)
        )
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        self.use(env, steps)

    def use(self, env: TaskVectorEnv, steps: int | None = None) -> None:
        """Go on with another environment of the same spaces, such as a longer horizon; new trials begin.

        Args:
            env: with autoreset and new tasks for each trial.
            steps: of each rollout; None is one whole trial.

        Raises:
            OptionError: for no steps, or one environment where advantages are standardised in each step.
        """
        if isinstance(self.config, PPOConfig):
            self.config.check(env.num_envs)
        self.policy.set_trial(env)
        self.env = env
        self.steps = self.policy.trial_steps if steps is None else steps
        if self.steps < 1:
            raise OptionError(f"A rollout needs at least one step; got steps={self.steps}.")
        self._moment: Moment | None = None
        self._state: Tensor | None = None

    def train(
        self, iterations: int | None = None, on_iteration: Callable[[RL2], None] | None = None
    ) -> list[dict[str, float]]:
        """Train.

        Args:
            iterations: rollouts of this call; None is all that are left.
            on_iteration: called after each, with this object: to print, to save, or to stop by an exception.

        Returns:
            The history of this call.
        """
        until = self.iterations if iterations is None else min(self.iterations, self.iteration + iterations)
        begin = len(self.history)
        while self.iteration < until:
            self.history.append(self._iterate())
            self.iteration += 1
            if on_iteration is not None:
                on_iteration(self)
        return self.history[begin:]

    def _iterate(self) -> dict[str, float]:
        state = self.policy.first(self.env.num_envs).detach() if self._state is None else self._state
        rollout = collect(
            self.env, self.policy.actor(), self.steps, generator=self.generator, start=self._moment, state=state
        )
        self._moment, self._state = rollout.after, rollout.state
        advantage = trial_advantages(rollout, self._last_value(rollout), gamma=self.config.gamma, lam=self.config.lam)
        share = self.iteration / max(1, self.iterations - 1)
        told = self.updates.update(rollout, advantage, share=share, generator=self.generator, step=self.iteration + 1)
        return {"reward": rollout.total().mean().item(), **told}

    @torch.no_grad()
    def _last_value(self, rollout: Rollout) -> Tensor:
        if bool(rollout.trial_ended[-1].all()):
            return torch.zeros_like(rollout.reward[0])
        # the generator must not move for a value: a greedy action draws nothing
        value = self.policy.actor(greedy=True)(rollout.after, rollout.state, self.generator).value
        assert value is not None
        return value

    # -- what was learned -----------------------------------------------------------------------------------------

    def evaluate(
        self, env: TaskVectorEnv, *, greedy: bool = True, generator: Seed = None, keep: tuple[str, ...] = ()
    ) -> TrialReturns:
        """One trial in each environment.

        Args:
            env: of held-out tasks. It is reset.
            greedy: take the likeliest actions, else draw.
            generator: of the actions; None means seed 0.
            keep: further numbers of ``info`` to sum over each episode, such as ``"success"``.
        """
        generator = as_generator(generator, env.device, "evaluation")
        self.policy.set_trial(env)
        try:
            rollout = collect(
                env, self.policy.actor(greedy=greedy), self.policy.trial_steps, generator=generator, keep=keep
            )
        finally:
            self.policy.set_trial(self.env)
        return trial_returns(rollout, env.episodes_per_trial)

    def curve(self, env: TaskVectorEnv, *, points: int | None = None, generator: Seed = None) -> AdaptationCurve:
        """Return of each episode of a trial, with the likeliest actions; see :meth:`evaluate`.

        Args:
            env: of held-out tasks.
            points: not read: the episodes of a trial are the environment's.
            generator: of whatever is random in acting; None means seed 0.
        """
        return curve_of(self.evaluate(env, generator=generator, keep=told_by(env)), env)

    # -- going on later -------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The options that change what it learns, as plain values."""
        policy = self.policy
        return {
            "learner": type(self).__name__,
            "memory": type(policy.memory).__name__,
            "reward": [policy.reward_shift, policy.reward_scale],
            "update": type(self.config).__name__,
            **dataclasses.asdict(self.config),
            "iterations": self.iterations,
            "steps": self.steps,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, the environment's state too: tensors and plain values."""
        return {
            "policy": {name: value.clone() for name, value in self.policy.state_dict().items()},
            "updates": copied(self.updates.state_dict()),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "moment": None if self._moment is None else dict(vars(self._moment)),
            "state": self._state,
            "iteration": self.iteration,
            "history": [dict(row) for row in self.history],
            "steps": self.steps,
        }

    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Take the policy of a state alone, to act and not to go on training.

        Raises:
            CheckpointError: when it belongs to a policy of another shape.
        """
        load_networks(self.policy, state["policy"], "another policy")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            CheckpointError: when it belongs to a policy of another shape, or to other environments.
        """
        self.load_learned(state)
        self.env.load_state_dict(state["env"])
        self.updates.load_state_dict(copied(state["updates"]))
        self.generator.set_state(state["generator"].cpu())
        # environments that cannot be put back into a state begin new trials
        goes_on = state["moment"] is not None and getattr(self.env, "restores_state", True)
        device = self.env.device
        self._moment = Moment(**state["moment"]).map(lambda x: x.to(device)) if goes_on else None
        self._state = state["state"].to(device) if goes_on else None
        self.iteration, self.steps = state["iteration"], state["steps"]
        self.history = [dict(row) for row in state["history"]]
