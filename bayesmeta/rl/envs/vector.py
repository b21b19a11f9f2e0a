"""The vector environment that steps all tasks and copies of a family as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from bayesmeta.errors import CheckpointError, EnvError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import Family, Noise, check_at_least, check_split
from bayesmeta.rl.protocols import Tensors


class TensorVectorEnv(VectorEnv):
    """Environments of a family, ``tasks × copies`` side by side, stepped as tensors without a Python loop.

    What a step returns is said in :mod:`bayesmeta.rl.protocols`. Everything random comes from one generator, whose
    state is in :meth:`state_dict`.

    Args:
        family: whose environments they are.
        num_tasks: tasks side by side.
        copies: environments of each task.
        tasks: the tasks; None draws them.
        new_tasks: draw new tasks whenever a trial ends; else they stay what they are.
        episodes_per_trial: episodes that share a task before a trial ends.
        split: which set of tasks they are drawn from.
        generator: a seed, or a generator on ``device``.
        device: where the tensors live.
        dtype: of floating tensors.
        autoreset_mode: ``SAME_STEP`` resets an environment in the step that ends its episode; with ``DISABLED`` call
            ``reset(options={"reset_mask": terminated | truncated})`` before the next step.

    Raises:
        OptionError: for numbers below 1, an unknown split, gymnasium's ``NEXT_STEP`` mode, ``tasks`` together with
            ``new_tasks``, or new tasks for several copies whose trials do not end together.
        ShapeError: if ``tasks`` are not ``num_tasks``.
    """

    def __init__(
        self,
        family: Family[Any, Any],
        num_tasks: int,
        *,
        copies: int = 1,
        tasks: Tensors | None = None,
        new_tasks: bool = False,
        episodes_per_trial: int = 1,
        split: str = "train",
        generator: Seed = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        check_at_least(1, num_tasks=num_tasks, copies=copies, episodes_per_trial=episodes_per_trial)
        check_split(split)
        mode = AutoresetMode(autoreset_mode)
        if mode is AutoresetMode.NEXT_STEP:
            raise OptionError(
                "autoreset mode NextStep; expected SameStep or Disabled: a step whose action does nothing is no step."
            )
        if new_tasks and tasks is not None:
            raise OptionError("new_tasks=True and tasks were given; give tasks, or let them be drawn at each trial.")
        if new_tasks and copies > 1 and not family.fixed_length:
            raise OptionError(
                f"new_tasks=True with {copies} copies of each task, but episodes of {family.name} end at other times; "
                "take copies=1."
            )
        self.family, self.split, self.dtype, self.device = family, split, dtype, torch.device(device)
        self.num_tasks, self.copies, self.num_envs = num_tasks, copies, num_tasks * copies
        self.new_tasks, self.episodes_per_trial, self.horizon = new_tasks, episodes_per_trial, family.horizon
        self.metadata = {"autoreset_mode": mode, "render_modes": ["rgb_array"]}
        self.render_mode = "rgb_array"
        self.single_observation_space, self.single_action_space = family.observation_space, family.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.generator = as_generator(generator, self.device, f"environments {split}")
        self._discrete = isinstance(self.single_action_space, gymnasium.spaces.Discrete)
        self._choices = int(getattr(self.single_action_space, "n", 0))
        self._action_shape = torch.Size((self.num_envs, *(self.single_action_space.shape or ())))
        self._together = family.fixed_length
        self._steps = self._episodes = 0  # of environments that keep time together
        self._clock = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self._episode = torch.zeros_like(self._clock)
        self._state: Tensors | None = None
        self._over: Tensor | None = None  # with Disabled: which episodes have ended
        self._tasks: Tensors | None = None
        if not new_tasks:
            self._set_tasks(self._draw_tasks() if tasks is None else tasks)

    # -- tasks and time --------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> Any:
        """The tasks, ``[num_tasks, …]``.

        Raises:
            EnvError: before the first reset, if it draws them.
        """
        if self._tasks is None:
            raise EnvError("the tasks are drawn by reset(), which has not been called; call it first.")
        return self._tasks

    @property
    def clock(self) -> Tensor:
        """Steps taken in the running episode, ``[num_envs]`` int64."""
        return torch.full_like(self._clock, self._steps) if self._together else self._clock.clone()

    @property
    def episode(self) -> Tensor:
        """Which episode of its trial is running, from 0, ``[num_envs]`` int64."""
        return torch.full_like(self._episode, self._episodes) if self._together else self._episode.clone()

    @property
    def state(self) -> Any:
        """The states of all environments.

        Raises:
            EnvError: before the first reset.
        """
        if self._state is None:
            raise EnvError("the environments have no state yet; call reset() first.")
        return self._state

    def _draw_tasks(self) -> Tensors:
        return self.family.sample_tasks(self.num_tasks, generator=self.generator, split=self.split)

    def _set_tasks(self, tasks: Tensors) -> None:
        if len(tasks) != self.num_tasks:
            raise ShapeError(f"{len(tasks)} tasks were given to environments of {self.num_tasks}; give as many.")
        self._tasks = tasks.to(self.device, self.dtype)
        self._params = self._tasks if self.copies == 1 else self._tasks.repeat(self.copies)

    # -- gymnasium's interface ----------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None, noise: Noise | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Begin a new trial everywhere, or the next episode of some environments.

        Args:
            seed: of everything random from now on; None goes on with the generator.
            options: ``tasks`` for this trial and, without ``new_tasks``, later ones; ``reset_mask`` ``[num_envs]`` to
                begin the next episode of those environments alone.
            noise: in place of random numbers, as ``family.reset_noise`` returns them.

        Raises:
            OptionError: for unknown options.
            ShapeError: for a mask of another shape.
        """
        options = dict(options or {})
        tasks, mask = options.pop("tasks", None), options.pop("reset_mask", None)
        if options:
            raise OptionError(f"unknown options of reset: {', '.join(options)}; expected tasks or reset_mask.")
        if seed is not None:
            self.generator = as_generator(seed, self.device, f"environments {self.split}")
        if mask is not None:
            return self._reset_some(torch.as_tensor(mask, device=self.device), noise)
        if tasks is not None:
            self._set_tasks(tasks)
        elif self.new_tasks:
            self._set_tasks(self._draw_tasks())
        self._begin(noise)
        self._steps = self._episodes = 0
        self._clock = torch.zeros_like(self._clock)
        self._episode = torch.zeros_like(self._episode)
        self._over = None
        return self._see(self._params, self._state), {}

    def step(
        self, actions: Tensor, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment; see :mod:`bayesmeta.rl.protocols`.

        Args:
            actions: ``[num_envs]`` integers for ``Discrete``, ``[num_envs, …]`` floating for ``Box``.
            noise: in place of random numbers, as ``family.step_noise`` returns them.

        Raises:
            ShapeError: for actions of another shape or kind.
            EnvError: before the first reset; for a discrete action out of range (on the CPU); with
                ``AutoresetMode.DISABLED``, if an environment whose episode has ended was not reset.
        """
        self._check(actions)
        state = self.state
        if self._over is not None and bool(self._over.any()):
            raise EnvError(
                f"{int(self._over.sum())} episodes have ended and autoreset is disabled; call "
                'reset(options={"reset_mask": terminated | truncated}) before the next step.'
            )
        if noise is None:
            noise = self.family.step_noise(self.num_envs, self.generator, self.dtype)
        self._state, reward, ended, info = self.family.advance(self._params, state, actions, noise)
        finish = self._together_step if self._together else self._masked_step
        return finish(reward.to(self.dtype), ended, info)

    def _check(self, actions: Tensor) -> None:
        if (
            not isinstance(actions, Tensor)
            or actions.shape != self._action_shape
            or actions.is_floating_point() == self._discrete
        ):
            kind = "integers" if self._discrete else "floating numbers"
            given = (
                f"{list(actions.shape)} of {actions.dtype}" if isinstance(actions, Tensor) else type(actions).__name__
            )
            raise ShapeError(
                f"actions {given} were given; expected a tensor {list(self._action_shape)} of {kind} for "
                f"{self.single_action_space}."
            )

        if self._discrete and actions.device.type == "cpu":  # elsewhere, looking would wait for the device
            low, high = (int(end) for end in torch.aminmax(actions))
            if low < 0 or high >= self._choices:
                raise EnvError(f"actions from {low} to {high} were given; expected 0 … {self._choices - 1}.")

    def _see(self, params: Tensors, state: Tensors | None) -> Tensor:
        seen = self.family.observe(params, state)
        return seen.to(self.dtype) if seen.is_floating_point() else seen

    def _begin(self, noise: Noise | None = None) -> None:
        if noise is None:
            noise = self.family.reset_noise(self.num_envs, self.generator, self.dtype)
        self._state = self.family.initial(self._params, noise)

    def _together_step(
        self, reward: Tensor, ended: Tensor | None, info: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """The end of a step where all episodes last equally long: time is a number, and nothing is masked."""
        assert ended is None
        self._steps += 1
        over = self._steps == self.horizon
        false = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        terminated = ~false if over and self.family.horizon_terminates else false
        truncated = ~false if over and not self.family.horizon_terminates else false.clone()
        observation = info["final_obs"] = self._see(self._params, self._state)
        last = over and self._episodes + 1 == self.episodes_per_trial
        info["trial_ended"] = ~false if last else false.clone()
        if over and self.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
            self._over = terminated | truncated
        elif over:
            observation = self._next_episode()
        return observation, reward, terminated, truncated, info

    def _next_episode(self) -> Tensor:
        """Of environments that keep time together."""
        self._steps, self._episodes = 0, self._episodes + 1
        if self._episodes == self.episodes_per_trial:
            self._episodes = 0
            if self.new_tasks:
                self._set_tasks(self._draw_tasks())
        self._begin()
        return self._see(self._params, self._state)

    def _masked_step(
        self, reward: Tensor, ended: Tensor | None, info: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """The end of a step where episodes may end at different times."""
        self._clock += 1
        timeout = self._clock >= self.horizon
        terminated = torch.zeros_like(timeout) if ended is None else ended
        if self.family.horizon_terminates:
            terminated, truncated = terminated | timeout, torch.zeros_like(timeout)
        else:
            truncated = timeout > terminated  # of truth values: and not
        over = terminated | timeout
        observation = info["final_obs"] = self._see(self._params, self._state)
        one = self.episodes_per_trial == 1
        info["trial_ended"] = over if one else over & (self._episode + 1 == self.episodes_per_trial)
        rows = over.nonzero().squeeze(-1)
        if len(rows):
            if self.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
                self._over = over.clone()
            else:
                observation = self._restart(rows, observation)
        return observation, reward, terminated, truncated, info

    def _restart(self, rows: Tensor, observation: Tensor, noise: Noise | None = None) -> Tensor:
        """Begin the next episode of the environments ``rows``; if tasks are drawn, those whose trial is over get new
        ones.
        """
        self._clock.index_fill_(0, rows, 0)
        ended = rows  # whose trial is over
        if self.episodes_per_trial > 1:
            episode = (self._episode.index_select(0, rows) + 1) % self.episodes_per_trial
            self._episode.index_copy_(0, rows, episode)
            ended = rows[episode == 0] if self.new_tasks else rows
        if self.new_tasks and len(ended):  # copies == 1
            trial = torch.zeros_like(self._clock, dtype=torch.bool).index_fill_(0, ended, True)
            self._set_tasks(self._draw_tasks().to(dtype=self.dtype).where(trial, self.tasks))
        if noise is None:
            noise = self.family.reset_noise(len(rows), self.generator, self.dtype)
        else:
            noise = tuple(numbers[rows] for numbers in noise)
        params = self._params.map(lambda value: value.index_select(0, rows))
        fresh = self.family.initial(params, noise)
        self._state = self.state.replace_rows(rows, fresh)
        return observation.index_copy(0, rows, self._see(params, fresh))

    def _reset_some(self, mask: Tensor, noise: Noise | None) -> tuple[Tensor, dict[str, Any]]:
        if mask.shape != (self.num_envs,) or mask.dtype != torch.bool:
            raise ShapeError(
                f"reset_mask {list(mask.shape)} of {mask.dtype}; expected [{self.num_envs}] of torch.bool."
            )
        if self._state is None:
            raise EnvError("reset_mask was given before the first reset; call reset() first.")
        if not self._together:
            self._over = None if self._over is None else self._over & ~mask
            return self._restart(mask.nonzero().squeeze(-1), self._see(self._params, self._state), noise), {}
        if bool(mask.all()):
            self._over = None
            return self._next_episode(), {}
        if bool(mask.any()):
            raise EnvError(f"episodes of {self.family.name} last equally long; reset all environments together.")
        return self._see(self._params, self._state), {}

    def render(self) -> tuple[np.ndarray, ...]:
        """Pictures of all environments, ``[height, width, 3]`` uint8 each."""
        params, state = self._params.to("cpu"), self.state.to("cpu")
        return tuple(self.family.picture(params, state, index) for index in range(self.num_envs))

    # -- going on later --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on: plain tensors and values, safe for
        ``torch.load(weights_only=True)``.
        """

        def copy(tensors: Tensors | None) -> dict[str, Tensor] | None:
            return None if tensors is None else {name: value.clone() for name, value in tensors.as_dict().items()}

        return {
            "config": self._config(),
            "tasks": copy(self._tasks),
            "state": copy(self._state),
            "steps": self._steps,
            "episodes": self._episodes,
            "clock": self._clock.clone(),
            "episode": self._episode.clone(),
            "over": None if self._over is None else self._over.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            CheckpointError: if it belongs to other environments.
        """
        if state["config"] != self._config():
            raise CheckpointError(
                f"the state belongs to environments {state['config']}; these are {self._config()}. Make them the same."
            )
        tasks, at = state["tasks"], state["state"]
        if tasks is not None:
            self._set_tasks(self.family.task_type(**tasks))
        self._state = None if at is None else self.family.state_type(**at).to(self.device).map(torch.clone)
        self._steps, self._episodes = int(state["steps"]), int(state["episodes"])
        # copies: steps count in place
        self._clock, self._episode = (state[name].to(self.device, copy=True) for name in ("clock", "episode"))
        self._over = None if state["over"] is None else state["over"].to(self.device)
        self.generator.set_state(state["generator"].cpu())

    def _config(self) -> dict[str, Any]:
        return {
            **self.family.config(), "num_tasks": self.num_tasks, "copies": self.copies, "new_tasks": self.new_tasks,
            "episodes_per_trial": self.episodes_per_trial, "split": self.split, "dtype": str(self.dtype),
        }  # fmt: skip
