"""SAC as a learner: one policy, soft actor-critic and a replay buffer, on environments with a box of actions.

It adapts to nothing: with several tasks it is joint training of one policy for all of them, against which
:class:`~bayesmeta.rl.off_policy.pearl.PEARL` is to be compared. Source of the algorithm: see
:mod:`bayesmeta.rl.off_policy.sac`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.learner import AdaptationCurve, horizon_of
from bayesmeta.rl.off_policy.learner import OffPolicyLearner, check_fixed_tasks, put_back
from bayesmeta.rl.off_policy.replay import Replay
from bayesmeta.rl.off_policy.sac import SACConfig, SACNetworks, SACUpdate, averaged
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.rollout import Acted, Actor, Moment, collect
from bayesmeta.rl.trials import curve_of_trials, told_by


class SAC(OffPolicyLearner):
    """Soft actor-critic on the tasks of a vector environment.

    Each iteration steps all environments ``steps`` times and takes ``updates`` gradient steps on batches of ``batch``
    steps of each task. The first ``random_steps`` of each environment draw actions uniformly.

    Args:
        env: with autoreset; its tasks stay (``new_tasks=False``).
        config: settings of the updates.
        steps: of every environment in an iteration.
        updates: gradient steps of an iteration; None is one for every step of one environment.
        batch: steps drawn of each task for an update.
        capacity: steps kept of each task.
        random_steps: of each environment at first.
        train_reward: name of a number in ``info`` to train on in place of the reward, such as ``"dense_reward"``.
        seed: of first weights, actions and batches.

    Attributes:
        policy: the networks.
        replay: what was done, task by task.
        iteration: iterations done.
        history: one dict an iteration: ``reward`` (mean of a step) and figures of the updates.

    Raises:
        OptionError: for numbers below 1, and environments that draw new tasks.
        SpaceError: for actions that are not a bounded box.
    """

    policy: SACNetworks

    def __init__(
        self,
        env: TaskVectorEnv,
        config: SACConfig | None = None,
        *,
        steps: int = 1,
        updates: int | None = None,
        batch: int = 256,
        capacity: int = 100_000,
        random_steps: int = 100,
        train_reward: str | None = None,
        seed: int = 0,
    ) -> None:
        self.config = SACConfig() if config is None else config
        self.env, self.seed, self.train_reward = env, seed, train_reward
        self.steps, self.batch, self.random_steps = steps, batch, random_steps
        self.updates_each = steps * env.copies if updates is None else updates
        for name, value in (("steps", steps), ("batch", batch), ("updates", self.updates_each)):
            if value < 1:
                raise OptionError(f"{name} must be at least 1; got {value}.")
        check_fixed_tasks(env, "SAC")
        spaces = env.single_observation_space, env.single_action_space
        self.policy = SACNetworks(*spaces, self.config, seed=seed).to(env.device, getattr(env, "dtype", torch.float32))
        self.updates = SACUpdate(self.policy, self.config)
        self.replay = Replay(env.num_tasks, capacity, env.device)
        self.generator = as_generator(seed, env.device, "sac")
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        self._moment: Moment | None = None

    def train(self, iterations: int) -> list[dict[str, float]]:
        """Do some iterations; the history of this call."""
        begin = len(self.history)
        for _ in range(iterations):
            self.history.append(self._iterate())
            self.iteration += 1
        return self.history[begin:]

    def _iterate(self) -> dict[str, float]:
        first = self.iteration * self.steps < self.random_steps
        actor = uniform_actor(self.policy) if first else self.actor()
        keep = () if self.train_reward is None else (self.train_reward,)
        rollout = collect(
            self.env, actor, self.steps, generator=self.generator, start=self._moment, keep=keep
        )  # fmt: skip
        self._moment = rollout.after
        self.replay.add(rollout, extra=keep)
        with put_back(self.policy, self.updates.optimizers.values()):
            told = [] if first else [self._update() for _ in range(self.updates_each)]
            figures = averaged(told, self.iteration + 1)
        return {"reward": float(rollout.reward.mean()), **figures}

    def _update(self) -> dict[str, Tensor]:
        batch = self.replay.sample(self.batch, self.generator).with_reward(self.train_reward)
        return self.updates.update(batch, self.generator)

    def actor(self, *, greedy: bool = False) -> Actor:
        """An :data:`~bayesmeta.rl.rollout.Actor` of the policy: draws actions, or takes the likeliest (``greedy``)."""

        def act(moment: Moment, state: Any, generator: torch.Generator) -> Acted:
            return Acted(*self.policy.act(moment.observation, None, generator, greedy=greedy), state)

        return act

    def curve(self, env: TaskVectorEnv, *, points: int | None = None, generator: Seed = None) -> AdaptationCurve:
        """Return of each episode of a trial with the likeliest actions; nothing changes between episodes.

        Args:
            env: of held-out tasks, of one length for all episodes or with autoreset. It is reset.
            points: not read.
            generator: not read, since nothing is drawn.
        """
        steps = horizon_of(env, "a curve is measured on whole episodes") * env.episodes_per_trial
        told = told_by(env)
        rollout = collect(env, self.actor(greedy=True), steps, generator=as_generator(generator, env.device), keep=told)
        return curve_of_trials(rollout, env)

    # -- going on later -------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The options that change what it learns, as plain values."""
        config = {**dataclasses.asdict(self.config), "hidden": list(self.config.hidden)}
        return {
            "learner": type(self).__name__, **config, "steps": self.steps, "updates": self.updates_each,
            "batch": self.batch, "capacity": self.replay.capacity, "random_steps": self.random_steps,
            "train_reward": self.train_reward, "seed": self.seed,
        }  # fmt: skip

    def _more_state(self) -> dict[str, Any]:
        return {"moment": None if self._moment is None else dict(vars(self._moment))}

    def _load_more(self, state: Mapping[str, Any]) -> None:
        goes_on = state["moment"] is not None and getattr(self.env, "restores_state", True)
        self._moment = Moment(**state["moment"]).map(lambda x: x.to(self.env.device)) if goes_on else None


def uniform_actor(networks: SACNetworks) -> Actor:
    """An actor that draws actions uniformly from the box."""

    def act(moment: Moment, state: Any, generator: torch.Generator) -> Acted:
        n, size, device = len(moment.begins), networks.head.size, moment.reward.device
        action = 2 * torch.rand(n, size, generator=generator, device=device, dtype=networks.low.dtype) - 1
        return Acted(networks.to_box(action), moment.reward.new_zeros(n), state)

    return act
