"""Contexts: what happened in a task, as Observations that the encoders of supervised tasks read.

A context has one row a transition. x are its inputs, [s, a] or [s, a, s′], and y what the task decides, [r], [r, s′] or
[r, s′ − s], all as numbers (:func:`~bayesmeta.rl.protocols.features`). The rows of a task stand in the order of time
and the mask is True where one counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import gymnasium
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import ContextError, OptionError
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.protocols import features, num_features

if TYPE_CHECKING:
    from bayesmeta.rl.protocols import TaskVectorEnv
    from bayesmeta.rl.rollout import Rollout

Input = Literal["state", "action", "successor"]
Target = Literal["reward", "successor", "change"]
Trial = Literal["first", "current", "all"]
#: What z explains: the reward given s, a and s′, or reward and change of the state given s and a.
Reconstruction = Literal["reward", "transition"]


@dataclasses.dataclass(frozen=True)
class ContextSpec:
    """What stands in a context of one family of environments.

    Args:
        observation_space, action_space: of one environment, ``Discrete`` or ``Box``.
        inputs: what stands in x, of ``"state"``, ``"action"`` and ``"successor"`` (s′), in this order.
        targets: what stands in y, of ``"reward"``, ``"successor"`` and ``"change"`` (s′ − s), in this order.
        reward_shift, reward_scale: y has (r − shift) / scale.
        binary: the reward so scaled is 0 or 1, and is rounded to it.
        encode: what x has in place of the states' own numbers, from observations ``[…, *shape]`` to ``[…, encoded]``;
            without parameters, such as a one-hot cell. Targets keep the states' own numbers.
        encoded: how many numbers ``encode`` gives.
        max_context: more transitions of a task than this are refused; None for no bound.

    Raises:
        OptionError: for unknown names, no target, s′ in x and in y, and numbers out of range.
        SpaceError: for spaces other than ``Discrete`` and ``Box``.
    """

    observation_space: Any
    action_space: Any
    inputs: tuple[Input, ...] = ("state", "action")
    targets: tuple[Target, ...] = ("reward",)
    reward_shift: float = 0.0
    reward_scale: float = 1.0
    binary: bool = False
    encode: Callable[[Tensor], Tensor] | None = None
    encoded: int | None = None
    max_context: int | None = None

    def __post_init__(self) -> None:
        for what, given, known in (("inputs", self.inputs, Input), ("targets", self.targets, Target)):
            ordered = tuple(name for name in get_args(known) if name in given)
            if not given or tuple(given) != ordered:
                names = ", ".join(map(repr, get_args(known)))
                raise OptionError(f"{what} is {given!r}; expected some of {names}, each once, in this order.")
        follows = {"successor", "change"} & set(self.targets)
        if len(follows) > 1 or (follows and "successor" in self.inputs):
            raise OptionError(
                f"s′ would stand twice in a context: inputs={self.inputs!r}, targets={self.targets!r}. Keep one."
            )
        if (self.encode is None) != (self.encoded is None):
            raise OptionError("Give encode and encoded together: the function, and how many numbers it gives.")
        if not self.reward_scale > 0:
            raise OptionError(f"reward_scale must be positive; got {self.reward_scale}.")
        if self.binary and "reward" not in self.targets:
            raise OptionError("binary=True is about rewards, and none is among the targets.")
        for name in ("encoded", "max_context"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 1):
                raise OptionError(f"{name} must be a whole number, at least 1, or None; got {value!r}.")
        num_features(self.observation_space)
        num_features(self.action_space)

    @classmethod
    def of(cls, env: TaskVectorEnv, **options: Any) -> ContextSpec:
        """That of an environment's spaces; ``options`` are the other arguments."""
        return cls(env.single_observation_space, env.single_action_space, **options)

    @classmethod
    def explaining(
        cls, env: TaskVectorEnv, reconstruction: Reconstruction | None = None, **options: Any
    ) -> ContextSpec:
        """That of an environment's spaces, with inputs and targets by what z is to explain.

        Args:
            env: whose spaces.
            reconstruction: the ``"reward"`` given s, a and s′, or the whole ``"transition"``: reward and change of the
                state given s and a. None is the transition for ordinary gymnasium environments
                (:class:`~bayesmeta.rl.GymFamily`) with a box of observations, since nothing says that their tasks
                differ in rewards, and else the reward.
            options: the other arguments.

        Raises:
            OptionError: for another reconstruction.
        """
        if reconstruction is None:
            from bayesmeta.rl.envs.gym_family import GymFamily

            ordinary = isinstance(getattr(env, "family", None), GymFamily)
            box = isinstance(env.single_observation_space, gymnasium.spaces.Box)
            reconstruction = "transition" if ordinary and box else "reward"
        if reconstruction == "transition":
            return cls.of(env, inputs=("state", "action"), targets=("reward", "change"), **options)
        if reconstruction != "reward":
            raise OptionError(f"reconstruction is {reconstruction!r}; expected 'reward', 'transition' or None.")
        return cls.of(env, inputs=("state", "action", "successor"), **options)

    # -- widths -------------------------------------------------------------------------------------------------

    @property
    def state_width(self) -> int:
        """Numbers of a state as y has it."""
        return num_features(self.observation_space)

    @property
    def features(self) -> int:
        """Width of x."""
        state = self.state_width if self.encoded is None else self.encoded
        width = {"state": state, "action": num_features(self.action_space), "successor": state}
        return sum(width[name] for name in self.inputs)

    def columns(self, name: Input) -> slice:
        """Where an input stands in x.

        Raises:
            ContextError: for one that does not.
        """
        if name not in self.inputs:
            raise ContextError(f"x has no {name!r}; it has {', '.join(self.inputs)}. Make contexts with it.")
        before = dataclasses.replace(self, inputs=self.inputs[: self.inputs.index(name) + 1])
        width = num_features(self.action_space) if name == "action" else self.encoded or self.state_width
        return slice(before.features - width, before.features)

    @property
    def outputs(self) -> int:
        """Targets of a transition: with 1, y is ``[tasks, shots]``."""
        width = {"reward": 1, "successor": self.state_width, "change": self.state_width}
        return sum(width[name] for name in self.targets)

    def options(self) -> dict[str, Any]:
        """What changes the context, as plain values, for a learner's options."""
        return {
            "inputs": list(self.inputs), "targets": list(self.targets), "binary": self.binary,
            "reward": [self.reward_shift, self.reward_scale], "encoded": self.encoded, "max_context": self.max_context,
        }  # fmt: skip

    # -- making contexts ----------------------------------------------------------------------------------------

    def transitions(
        self, state: Tensor, action: Tensor, reward: Tensor, successor: Tensor, mask: Tensor | None = None
    ) -> Observations:
        """A context from transitions, ``[tasks, shots, …]`` each, in the dtype of the rewards.

        Args:
            state, successor: as the environment gives observations.
            action: likewise.
            reward: ``[tasks, shots]``.
            mask: which of them count, ``[tasks, shots]``; None: all.
        """
        dtype = reward.dtype

        def read(value: Tensor) -> Tensor:
            return features(self.observation_space, value, dtype) if self.encode is None else self.encode(value)

        x = {
            "state": lambda: read(state),
            "action": lambda: features(self.action_space, action, dtype),
            "successor": lambda: read(successor),
        }
        y = {
            "reward": lambda: self.scaled(reward).unsqueeze(-1),
            "successor": lambda: features(self.observation_space, successor, dtype),
            "change": lambda: (
                features(self.observation_space, successor, dtype) - features(self.observation_space, state, dtype)
            ),
        }
        inputs = torch.cat([x[name]().to(dtype) for name in self.inputs], -1)
        targets = torch.cat([y[name]() for name in self.targets], -1)
        context = Observations(inputs, targets.squeeze(-1) if self.outputs == 1 else targets, mask)
        if context.num_features != self.features:
            raise ContextError(
                f"x of the context has {context.num_features} numbers a transition; expected {self.features}: encode "
                f"gives another number than encoded={self.encoded}, or states and actions are of other spaces than "
                f"{self.observation_space} and {self.action_space}."
            )
        return context

    def scaled(self, reward: Tensor) -> Tensor:
        """Rewards as y has them."""
        value = (reward - self.reward_shift) / self.reward_scale
        return value.round().clamp(0, 1) if self.binary else value

    def empty(self, tasks: int, like: Tensor) -> Observations:
        """A context of no transition, in the dtype and on the device of a floating tensor."""
        y = like.new_zeros((tasks, 0) if self.outputs == 1 else (tasks, 0, self.outputs))
        return Observations(like.new_zeros(tasks, 0, self.features), y)

    def of_rollout(self, rollout: Rollout, *, trial: Trial = "first", by_task: bool = False) -> Observations:
        """The transitions of a rollout.

        Args:
            rollout: steps of environments.
            trial: which count: ``"first"``: those of the trial with which the rollout began; ``"current"``: those of
                the trial that is running after it (none, where one has just ended); ``"all"``: every one, where
                trials do not change the task.
            by_task: one context for each task, its copies one behind the other, in place of one for each environment.

        Returns:
            ``[batch, time, …]``, or ``[tasks, copies × time, …]``; ``mask`` says which count.

        Raises:
            ContextError: when the begin of a trial that is asked for is not in the rollout.
            OptionError: for another trial.
        """
        mask = self._of_trial(rollout, trial)

        def batch_first(value: Tensor) -> Tensor:
            return value.transpose(0, 1)

        context = self.transitions(
            batch_first(rollout.moments.observation), batch_first(rollout.action), batch_first(rollout.reward),
            batch_first(rollout.successor), None if mask is None else batch_first(mask).contiguous(),
        )  # fmt: skip
        if not by_task:
            return context

        def together(value: Tensor) -> Tensor:
            return value.unflatten(0, (rollout.tasks, rollout.copies)).flatten(1, 2)

        x, y = together(context.x), together(context.y) if context.y is not None else None
        return Observations(x, y, None if context.mask is None else together(context.mask))

    def _of_trial(self, rollout: Rollout, trial: Trial) -> Tensor | None:
        """Which steps count, ``[time, batch]``."""
        if trial not in get_args(Trial):
            raise OptionError(f"Unknown trial {trial!r}; expected one of {', '.join(map(repr, get_args(Trial)))}.")
        if trial == "all":
            return None
        ended, begins = rollout.trial_ended, rollout.moments.begins[0]
        if trial == "first":
            before = torch.cat([torch.zeros_like(ended[:1]), ended[:-1]]).long().cumsum(0)
            mask, known = before == 0, begins
        else:
            mask = ended.long().flip(0).cumsum(0).flip(0) == 0
            known = begins | ended.any(0)
        if not bool(known.all()):
            which = int((~known).nonzero()[0, 0])
            raise ContextError(
                f"The begin of the {trial} trial of environment {which} (counted from 0) is not in this rollout, so "
                "that a part of its context is missing. Collect whole trials, or take trial='all' where the task "
                "stays the same."
            )
        return mask

    # -- checking them ------------------------------------------------------------------------------------------

    def check(self, context: Observations) -> Observations:
        """Check that a context is of this family and no longer than memory allows.

        Returns:
            The context itself.

        Raises:
            ContextError: for other widths, no targets, or more than ``max_context`` transitions.
        """
        if not isinstance(context, Observations) or context.y is None:
            what = "no targets" if isinstance(context, Observations) else f"the type {type(context).__name__}"
            raise ContextError(
                f"The context has {what}; expected Observations with inputs {self.inputs} and targets {self.targets}. "
                "Make it with this spec (transitions, of_rollout)."
            )
        outputs = 1 if context.y.dim() == 2 else context.y.shape[-1]
        if (context.num_features, outputs) != (self.features, self.outputs):
            raise ContextError(
                f"The context has {context.num_features} input(s) and {outputs} target(s) a transition; this family "
                f"has {self.features} ({', '.join(self.inputs)}) and {self.outputs} ({', '.join(self.targets)}). It "
                "is of another task family, or was made with another spec."
            )
        if self.max_context is not None and context.shots > self.max_context:
            longest = int(context.full_mask().sum(-1).max())
            if longest > self.max_context:
                raise ContextError(
                    f"A context has {longest} transitions; memory is for max_context={self.max_context}. Give the "
                    "last ones or a random part, or raise the bound."
                )
        return context

    def check_env(self, env: TaskVectorEnv) -> None:
        """Check that an environment has the spaces of this family.

        Raises:
            ContextError: when it has others.
        """
        spaces = (env.single_observation_space, env.single_action_space)
        if spaces != (self.observation_space, self.action_space):
            raise ContextError(
                f"The environment has observations {spaces[0]} and actions {spaces[1]}; contexts here are of "
                f"{self.observation_space} and {self.action_space}: another task family."
            )


def prefix(context: Observations, steps: int | Tensor) -> Observations:
    """The first entries of each context, in the order in which they stand.

    Args:
        context: ``[tasks, shots, …]``.
        steps: how many; one number, which shortens the tensors, or one for each task, ``[tasks]``, which masks.

    Raises:
        ContextError: for a number of steps below 0 or above what the context has.
    """
    if isinstance(steps, Tensor):
        low, high = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
    else:
        low = high = int(steps)
    if low < 0 or high > context.shots:
        raise ContextError(f"A prefix of {high if low >= 0 else low} steps of {context.shots}; expected 0 to that.")
    if not isinstance(steps, Tensor):
        return context.points(slice(0, high))
    early = torch.arange(context.shots, device=context.device) < steps.to(context.device).unsqueeze(-1)
    return replace(context, mask=context.full_mask() & early)
