"""SAC as a learner: one policy, soft actor-critic and a replay buffer, on environments with a box of actions.

It adapts to nothing: with several tasks it is joint training of one policy for all of them, against which
:class:`~bayesmeta.rl.pearl.PEARL` is to be compared. Source of the algorithm: see :mod:`bayesmeta.rl.sac`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import CheckpointError, NonFiniteLossError, OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.learner import AdaptationCurve, horizon_of
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.replay import Replay
from bayesmeta.rl.rl2 import trial_returns
from bayesmeta.rl.rollout import Acted, Actor, Moment, Rollout, collect
from bayesmeta.rl.sac import SACConfig, SACNetworks, SACUpdate, averaged


class SAC:
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

    def state_dict(self, *, replay: bool = True) -> dict[str, Any]:
        """Everything that the rest of the run depends on, replay buffer and environments too.

        Args:
            replay: False leaves the replay buffer out.
        """
        return {
            "policy": {name: value.clone() for name, value in self.policy.state_dict().items()},
            "updates": copied(self.updates.state_dict()),
            **({"replay": self.replay.state_dict()} if replay else {}),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "moment": None if self._moment is None else dict(vars(self._moment)),
            "iteration": self.iteration,
            "history": [dict(row) for row in self.history],
        }

    def remember(self) -> Callable[[], dict[str, Any]]:
        """As in :class:`~bayesmeta.rl.learner.Remembers`: the replay buffer is copied where the state is asked for."""
        return remembered(self.state_dict(replay=False), self.replay)

    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Take the networks of a state alone, to act and not to go on training.

        Raises:
            CheckpointError: when they are of another shape.
        """
        load_networks(self.policy, state["policy"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            CheckpointError: when it belongs to networks of another shape, or to other environments.
        """
        self.load_learned(state)
        self.env.load_state_dict(state["env"])
        self.updates.load_state_dict(copied(state["updates"]))
        self.replay.load_state_dict(state["replay"])
        self.generator.set_state(state["generator"].cpu())
        goes_on = state["moment"] is not None and getattr(self.env, "restores_state", True)
        self._moment = Moment(**state["moment"]).map(lambda x: x.to(self.env.device)) if goes_on else None
        self.iteration = state["iteration"]
        self.history = [dict(row) for row in state["history"]]


# -- what off-policy learners share -----------------------------------------------------------------------------------


def check_fixed_tasks(env: TaskVectorEnv, who: str) -> None:
    """Refuse environments that draw new tasks: a row of the buffer is a task.

    Raises:
        OptionError: for such environments.
    """
    if getattr(env, "new_tasks", False):
        raise OptionError(
            f"{who} keeps a replay buffer for each task, and these environments draw new ones (new_tasks=True). Leave "
            "that out: num_tasks is the number of training tasks."
        )


@contextmanager
def put_back(policy: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Undo updates that were not finite: networks and optimizers are as before them when NonFiniteLossError leaves.

    Figures are looked at once for many updates, since each look waits for the device; by then one that is not a number
    is in all weights.

    Args:
        policy: what the updates change.
        optimizers: that change it.
    """
    optimizers = list(optimizers)
    weights, states = copied(policy.state_dict()), [copied(optimizer.state_dict()) for optimizer in optimizers]
    try:
        yield
    except NonFiniteLossError:
        policy.load_state_dict(weights)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        raise


def remembered(state: Mapping[str, Any], replay: Replay) -> Callable[[], dict[str, Any]]:
    """A state without its replay buffer, to which the buffer of this moment comes when it is asked for."""
    earlier = replay.remember()
    return lambda: {**state, "replay": earlier()}


def uniform_actor(networks: SACNetworks) -> Actor:
    """An actor that draws actions uniformly from the box."""

    def act(moment: Moment, state: Any, generator: torch.Generator) -> Acted:
        n, size, device = len(moment.begins), networks.head.size, moment.reward.device
        action = 2 * torch.rand(n, size, generator=generator, device=device, dtype=networks.low.dtype) - 1
        return Acted(networks.to_box(action), moment.reward.new_zeros(n), state)

    return act


def told_by(env: TaskVectorEnv) -> tuple[str, ...]:
    """Names of what the environment's family tells beside the reward."""
    return tuple(getattr(getattr(env, "family", None), "tells", ()))


def curve_of_trials(rollout: Rollout, env: TaskVectorEnv) -> AdaptationCurve:
    """The curve of a rollout that begins with a trial: the return of each of its episodes, mean over copies."""
    found = trial_returns(rollout, env.episodes_per_trial)

    def by_task(values: Tensor) -> Tensor:
        return values.unflatten(0, (env.num_tasks, env.copies)).mean(1).T

    reached = by_task(found.extra["success"]) if "success" in found.extra else None
    return AdaptationCurve(by_task(found.episodes), "episode", reached, by_task(found.lengths))


def load_networks(module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load parameters by name.

    Raises:
        CheckpointError: naming the first of another shape.
    """
    mine = {name: value.shape for name, value in module.state_dict().items()}
    theirs = {name: value.shape for name, value in state.items()}
    if mine != theirs:
        name = next(n for n in {**theirs, **mine} if theirs.get(n) != mine.get(n))
        raise CheckpointError(
            f"The state belongs to other networks: {name!r} is {theirs.get(name)} there and {mine.get(name)} here."
        )
    module.load_state_dict(state)


def copied(content: Any) -> Any:
    """Nested containers with their tensors cloned."""
    if isinstance(content, Tensor):
        return content.clone()
    if isinstance(content, dict):
        return {key: copied(value) for key, value in content.items()}
    if isinstance(content, list):
        return [copied(value) for value in content]
    return content
