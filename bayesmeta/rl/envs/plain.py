"""One environment of a family as a plain gymnasium environment: the same rules, written again on NumPy numbers.

They serve anything that speaks gymnasium, and hold the tensor environments to account: given the same task, state,
action and random numbers, both must agree.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch

from bayesmeta.errors import EnvError, OptionError
from bayesmeta.rl.envs.family import Family, check_split

#: Random numbers of one reset or step, as the family's, without the leading dimension.
Numbers = tuple[Any, ...]


class PlainEnv(gymnasium.Env[Any, Any], ABC):
    """One environment of a family.

    Args:
        family: its family.
        task: the task's parameters by name; None draws a task at each ``reset``.
        split: which set of tasks they are drawn from.
        render_mode: None, or ``"rgb_array"`` where the family has a picture.

    ``reset`` takes the options ``task`` (a task from now on), ``new_task=False`` (stay with the one drawn last) and
    ``noise``, in place of random numbers.

    Raises:
        OptionError: for an unknown split, render mode or option of ``reset``, or a task without its parameters.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}  # type: ignore[misc]

    def __init__(
        self,
        family: Family[Any, Any],
        *,
        task: Mapping[str, Any] | None = None,
        split: str = "train",
        render_mode: str | None = None,
    ) -> None:
        check_split(split)
        if render_mode not in (None, "rgb_array"):
            raise OptionError(f'render_mode={render_mode!r}; expected None or "rgb_array".')
        self.family, self.split, self.render_mode = family, split, render_mode
        self.horizon, self.horizon_terminates = family.horizon, family.horizon_terminates
        self.observation_space, self.action_space = family.observation_space, family.action_space
        self.task: dict[str, Any] | None = None
        self.fixed = task is not None
        self.clock = 0
        self.over = True
        if task is not None:
            self._set_task(task)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; see the class for the options."""
        super().reset(seed=seed)
        options = dict(options or {})
        task, new_task, noise = options.pop("task", None), options.pop("new_task", True), options.pop("noise", None)
        if options:
            raise OptionError(f"unknown options of reset: {', '.join(options)}; expected task, new_task or noise.")
        if task is not None:
            self._set_task(task)
            self.fixed = True
        elif not self.fixed and (new_task or self.task is None):
            drawn = self.family.sample_tasks(1, generator=int(self.np_random.integers(2**62)), split=self.split)
            self._set_task({name: value[0].numpy() for name, value in drawn.as_dict().items()})
        self.clock, self.over = 0, False
        self._initial(self._reset_noise(self.np_random) if noise is None else noise)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step; see :mod:`bayesmeta.rl.protocols` for ``terminated`` and ``truncated``."""
        return self.step_with(action, self._step_noise(self.np_random))

    def step_with(self, action: Any, noise: Numbers) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step with given random numbers.

        Raises:
            EnvError: if no episode is running, or the action is not one of ``action_space``'s.
        """
        if self.over:
            raise EnvError("no episode is running; call reset() first.")
        reward, terminated, info = self._advance(self._action(action), noise)
        self.clock += 1
        timeout = self.clock >= self.horizon
        terminated = terminated or (timeout and self.horizon_terminates)
        truncated = timeout and not terminated
        self.over = terminated or truncated
        return self._observe(), reward, terminated, truncated, info

    def render(self) -> Any:
        """The picture, ``[height, width, 3]`` uint8, if ``render_mode`` is ``"rgb_array"``; else None."""
        if self.render_mode is None:
            return None
        tasks = self.family.task_type(**{name: torch.as_tensor(value)[None] for name, value in self.task.items()})  # type: ignore[union-attr]
        return self.family.picture(tasks, self.family.state_type(**self._state()))

    def _action(self, action: Any) -> Any:
        if isinstance(self.action_space, gymnasium.spaces.Discrete):
            number = int(action)
            if not 0 <= number < self.action_space.n:
                raise EnvError(f"action {action} was given; expected 0 … {self.action_space.n - 1}.")
            return number
        values = np.asarray(action)
        if values.shape != self.action_space.shape:
            raise EnvError(f"an action of shape {values.shape} was given; expected {self.action_space.shape}.")
        return values

    def _set_task(self, task: Mapping[str, Any]) -> None:
        names = [field.name for field in dataclasses.fields(self.family.task_type)]
        if sorted(task) != sorted(names):
            raise OptionError(f"a task with {', '.join(task)} was given; expected {', '.join(names)}.")
        self.task = {name: np.asarray(task[name]) for name in names}
        self._prepare()

    def _prepare(self) -> None:
        """Whatever follows from the task alone."""

    @abstractmethod
    def _initial(self, noise: Numbers) -> None:
        """Set the state in which an episode begins."""

    @abstractmethod
    def _advance(self, action: Any, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        """Move: reward, whether the rules end the episode, more for ``info``."""

    @abstractmethod
    def _observe(self) -> Any:
        """What an agent sees."""

    @abstractmethod
    def _state(self) -> dict[str, torch.Tensor]:
        """The state as the family's tensors, ``[1, …]``."""

    def _reset_noise(self, rng: np.random.Generator) -> Numbers:
        return ()

    def _step_noise(self, rng: np.random.Generator) -> Numbers:
        return ()
