"""Any ordinary gymnasium environments as tasks: a function from a task to an environment, behind the same interface.

The environments run one after the other (gymnasium's ``SyncVectorEnv``) or in processes of their own
(``AsyncVectorEnv``). An error in one is reported with its task. Their states cannot be saved, so a run goes on from the
beginning of a trial: each ``reset`` seeds all environments from the generator, whose state is saved.
"""

from __future__ import annotations

import math
import multiprocessing.connection
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from bayesmeta.errors import CheckpointError, EnvCrashError, EnvError, HorizonError, OptionError, ShapeError, SpaceError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import check_at_least

TaskT = TypeVar("TaskT")
_ECHO = r"(?s).*(Received the following error from Worker|Traceback|Raising the last exception)"
_MARK = re.compile(r"environment of task (\d+)\b")


class Guarded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose errors say which task it belongs to, and which refuses rewards that are not finite.

    Args:
        env: the environment.
        task: index of its task.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], task: int) -> None:
        super().__init__(env)
        self.task_index = task

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; an error names the task."""
        return self._call("reset", lambda: self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; an error names the task."""
        result = self._call("step", lambda: self.env.step(action))
        if not math.isfinite(float(result[1])):
            raise RuntimeError(f"the environment of task {self.task_index} returned the reward {float(result[1])}")
        return result

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            message = f"the environment of task {self.task_index} failed in {what}: {type(error).__name__}: {error}"
            raise RuntimeError(message) from error


class GymVectorEnv(Generic[TaskT]):
    """Ordinary gymnasium environments, one task after the other, with the interface of a tensor environment.

    Args:
        make: a function from a task to an environment.
        tasks: the tasks.
        copies: environments of each task.
        workers: each environment in a process of its own.
        horizon: steps after which an episode ends at the latest; None asks the environments' specification.
        episodes_per_trial: episodes that share a task before a trial ends.
        generator: a seed, or a generator on the CPU, for the environments' seeds.
        device: where the tensors live.
        dtype: of floating tensors.

    Raises:
        OptionError: without tasks, or for numbers below 1.
        SpaceError: if spaces are neither ``Discrete`` nor ``Box``, or differ between tasks.
        HorizonError: if environments have different horizons.
    """

    #: Whether a loaded state goes on in the middle of a trial.
    restores_state = False

    def __init__(
        self,
        make: Callable[[TaskT], gymnasium.Env[Any, Any]],
        tasks: Sequence[TaskT],
        *,
        copies: int = 1,
        workers: bool = False,
        horizon: int | None = None,
        episodes_per_trial: int = 1,
        generator: Seed = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_at_least(1, copies=copies, episodes_per_trial=episodes_per_trial)
        if not len(tasks):
            raise OptionError("no tasks were given; give at least one.")
        self.tasks, self.num_tasks, self.copies, self.num_envs = tasks, len(tasks), copies, len(tasks) * copies
        self.episodes_per_trial, self.device, self.dtype = episodes_per_trial, torch.device(device), dtype
        self.generator = as_generator(generator, "cpu", "environments")
        found = _check_alike([make(task) for task in tasks], horizon)
        self.horizon = found if horizon is None else horizon
        makers = [
            lambda task=task, index=index: Guarded(make(task), index)
            for index, task in enumerate(tasks)
            for _ in range(copies)
        ]
        kind = AsyncVectorEnv if workers else SyncVectorEnv
        self._envs = kind(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        self.single_observation_space = self._envs.single_observation_space
        self.single_action_space = self._envs.single_action_space
        self.observation_space, self.action_space = self._envs.observation_space, self._envs.action_space
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self._discrete = isinstance(self.single_action_space, gymnasium.spaces.Discrete)
        self._clock = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self._episode = torch.zeros_like(self._clock)
        self._ready = False

    @property
    def clock(self) -> Tensor:
        """Steps taken in the running episode, ``[num_envs]`` int64."""
        return self._clock.clone()

    @property
    def episode(self) -> Tensor:
        """Which episode of its trial is running, from 0, ``[num_envs]`` int64."""
        return self._episode.clone()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Begin a new trial everywhere, under new seeds from the generator.

        Args:
            seed: of everything random from now on; None goes on with the generator.
            options: none are known: tasks are fixed, and each environment resets itself when its episode ends.

        Raises:
            OptionError: for any options.
            EnvCrashError: if an environment fails.
        """
        if options:
            raise OptionError(f"unknown options of reset: {', '.join(options)}; these environments take none.")
        if seed is not None:
            self.generator = as_generator(seed, "cpu", "environments")
        seeds = torch.randint(2**31 - 1, (self.num_envs,), generator=self.generator).tolist()
        observation, _ = self._guarded(lambda: self._envs.reset(seed=seeds))
        self._clock, self._episode = torch.zeros_like(self._clock), torch.zeros_like(self._episode)
        self._ready = True
        return self._observation(observation), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment; see :mod:`bayesmeta.rl.protocols`. Infos of the environments are left out.

        Raises:
            EnvError: before the first reset.
            ShapeError: for actions of another shape or kind.
            EnvCrashError: if an environment fails, or returns a reward that is not finite. All are closed then.
        """
        if not self._ready:
            raise EnvError("the environments have no state yet; call reset() first.")
        self._check(actions)
        moves = actions.detach().cpu().numpy()
        if not self._discrete:
            moves = moves.astype(self.single_action_space.dtype)
        seen, rewards, ended, cut, infos = self._guarded(lambda: self._envs.step(moves))
        terminated, truncated = (torch.as_tensor(flags, device=self.device) for flags in (ended, cut))
        truncated = truncated & ~terminated
        over = terminated | truncated
        final = np.array(seen)
        for index in over.nonzero().squeeze(-1).tolist():
            final[index] = infos["final_obs"][index]
        last = over & (self._episode + 1 == self.episodes_per_trial)
        self._clock = torch.where(over, 0, self._clock + 1)
        self._episode = torch.where(last, 0, self._episode + over)
        info = {"final_obs": self._observation(final), "trial_ended": last}
        reward = torch.as_tensor(rewards, device=self.device).to(self.dtype)
        return self._observation(seen), reward, terminated, truncated, info

    def _check(self, actions: Tensor) -> None:
        shape = torch.Size((self.num_envs, *(self.single_action_space.shape or ())))
        if not isinstance(actions, Tensor) or actions.shape != shape or actions.is_floating_point() == self._discrete:
            kind = "integers" if self._discrete else "floating numbers"
            given = (
                f"{list(actions.shape)} of {actions.dtype}" if isinstance(actions, Tensor) else type(actions).__name__
            )
            raise ShapeError(f"actions {given} were given; expected a tensor {list(shape)} of {kind}.")

    def _observation(self, value: Any) -> Tensor:
        tensor = torch.as_tensor(np.array(value), device=self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """A call whose failure closes everything and says which task it was."""
        try:
            with warnings.catch_warnings():
                # gymnasium repeats a worker's error as warnings before it raises it.
                warnings.filterwarnings("ignore", message=_ECHO)
                return call()
        except Exception as error:
            found = _MARK.search(str(error))
            task = int(found.group(1)) if found else self._dead_task()
            self._ready = False
            self._kill()
            if task is None:
                raise
            reason = str(error) if found else f"the process of the environment of task {task} died"
            raise EnvCrashError(
                f"{reason}. Task {task} is {self.tasks[task]!r}. The environments are closed; what was saved before "
                "stays as it is.",
                task,
            ) from error

    def _dead_task(self) -> int | None:
        """The task whose process has ended; None if none has."""
        if not isinstance(self._envs, AsyncVectorEnv):
            return None
        processes = self._envs.processes
        ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1.0)
        rows = [index for index, process in enumerate(processes) if process.sentinel in ended]
        return rows[0] // self.copies if rows else None

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator of seeds; environments begin a new trial when it is loaded."""
        return {"num_envs": self.num_envs, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state with a new trial: call ``reset()`` next.

        Raises:
            CheckpointError: if it belongs to another number of environments.
        """
        if state["num_envs"] != self.num_envs:
            raise CheckpointError(
                f"the state belongs to {state['num_envs']} environments; these are {self.num_envs}. Make as many."
            )
        self.generator.set_state(state["generator"].cpu())
        self._ready = False

    def close(self) -> None:
        """Close the environments."""
        if not self._envs.closed:
            self._envs.close()

    def _kill(self) -> None:
        """Close them without waiting for an answer that may never come."""
        if isinstance(self._envs, AsyncVectorEnv) and not self._envs.closed:
            for process in self._envs.processes:
                process.terminate()
                process.join()
            for pipe in self._envs.parent_pipes:
                if pipe is not None:
                    pipe.close()
            self._envs.closed = True
        self.close()


def _check_alike(examples: Sequence[gymnasium.Env[Any, Any]], horizon: int | None) -> int | None:
    """The horizon that all environments share, None if they name none; they are closed."""
    kinds = gymnasium.spaces.Discrete, gymnasium.spaces.Box
    horizons = [_horizon(env) for env in examples]
    first = examples[0]
    for index, env in enumerate(examples):
        for what in ("observation_space", "action_space"):
            space, other = getattr(env, what), getattr(first, what)
            if not isinstance(space, kinds):
                raise SpaceError(
                    f"task {index} has the {what} {space}; expected Discrete or Box. Wrap the environment "
                    "(gymnasium.wrappers.FlattenObservation, TransformObservation)."
                )
            if space != other:
                raise SpaceError(
                    f"task {index} has the {what} {space}, task 0 has {other}; expected the same for all tasks."
                )
        if horizon is None and horizons[index] != horizons[0]:
            raise HorizonError(
                f"task {index} ends after {horizons[index]} steps, task 0 after {horizons[0]}; expected the same. Give "
                "horizon=, or make them alike (gymnasium.wrappers.TimeLimit)."
            )
    for env in examples:
        env.close()
    return horizons[0]


def _horizon(env: gymnasium.Env[Any, Any]) -> int | None:
    """What a time limit or the specification says."""
    found = env.spec.max_episode_steps if env.spec is not None else None
    return found if found is not None else getattr(env, "horizon", None)


def require_horizon(env: Any) -> int:
    """Steps of an episode, for algorithms that need a fixed horizon.

    Raises:
        HorizonError: if the environments have none.
    """
    horizon = getattr(env, "horizon", None)
    if horizon is None:
        raise HorizonError(
            "the environments have no fixed horizon, and one is needed here. Give horizon=, or wrap them in "
            "gymnasium.wrappers.TimeLimit."
        )
    return int(horizon)
