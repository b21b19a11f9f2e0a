"""A family of ordinary gymnasium environments: a function from a task to an environment, and where tasks come from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import gymnasium
import numpy as np
import torch

from bayesmeta.errors import BayesMetaError, EnvCrashError, EnvError, HorizonError, OptionError, SpaceError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import check_at_least, check_split
from bayesmeta.rl.envs.gym_worker import place

if TYPE_CHECKING:
    from bayesmeta.rl.envs.gym import GymVectorEnv

TaskT = TypeVar("TaskT")
_ARRAY = "a NumPy array"


class GymFamily(Generic[TaskT]):
    """A family of environments of gymnasium, for learners that draw or set tasks.

    Args:
        make: a function from a task to an environment. One that also takes ``render_mode`` has pictures.
        tasks: the tasks: a sequence, of which each is drawn equally often, the same in all splits; or a function
            ``(number, generator, split)`` that draws some, from a ``torch.Generator``. Tasks that are plain numbers,
            text, tensors or arrays, or containers of them, can be saved.
        name: of the family; None is that of ``make``.
        horizon: steps after which an episode ends at the latest; None asks the environments' specification.
        set_task: a function ``(environment, task)`` that gives an environment another task; None makes a new one.

    Raises:
        OptionError: without tasks.
    """

    #: Names of what ``info`` has in each step beside what every environment tells: nothing.
    tells: tuple[str, ...] = ()
    #: Nothing is known of it: episodes may end early.
    fixed_length = False
    #: A time limit is one: the task would go on.
    horizon_terminates = False

    def __init__(
        self,
        make: Callable[..., gymnasium.Env[Any, Any]],
        tasks: Sequence[TaskT] | Callable[[int, torch.Generator, str], Sequence[TaskT]],
        *,
        name: str | None = None,
        horizon: int | None = None,
        set_task: Callable[[Any, TaskT], None] | None = None,
    ) -> None:
        if not callable(tasks) and not len(tasks):
            raise OptionError("no tasks were given; give at least one, or a function that draws them.")
        self.make, self.set_task = make, set_task
        self.name = getattr(make, "__name__", type(make).__name__) if name is None else name
        self._tasks = tasks if callable(tasks) else as_list(tasks)
        self._given = horizon
        self._example = self._look()

    @classmethod
    def uniform(cls, make: Callable[..., Any], low: float, high: float, **options: Any) -> GymFamily[float]:
        """A family whose tasks are numbers ~ U(``low``, ``high``).

        Raises:
            OptionError: if ``low`` is not below ``high``.
        """
        if not low < high:
            raise OptionError(f"tasks from {low} to {high} were given; expected the lower end first.")

        def draw(number: int, generator: torch.Generator, split: str) -> list[float]:
            uniform = torch.rand(number, generator=generator, device=generator.device, dtype=torch.float64)
            return (low + (high - low) * uniform).tolist()

        return GymFamily(make, draw, **options)

    def _look(self) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any], int | None]:
        """Spaces and horizon of an environment of the family."""
        env = made(self.make, self.sample_tasks(1)[0], 0)
        found = env.observation_space, env.action_space, env_horizon(env) if self._given is None else self._given
        env.close()
        return found

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Of one environment."""
        return self._example[0]

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Of one environment."""
        return self._example[1]

    @property
    def horizon(self) -> int:
        """Steps after which an episode ends at the latest.

        Raises:
            HorizonError: where nobody says it.
        """
        if self._example[2] is None:
            raise HorizonError(
                f"environments of {self.name} say no horizon. Give horizon=, or wrap them in "
                "gymnasium.wrappers.TimeLimit."
            )
        return self._example[2]

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> list[TaskT]:
        """Draw tasks; a seed gives other tasks to each split.

        Raises:
            OptionError: for fewer than 1, an unknown split, or a function that draws another number.
        """
        check_at_least(1, num_tasks=num_tasks)
        check_split(split)
        generator = as_generator(generator, stream=f"tasks {split}")
        if callable(self._tasks):
            found = as_list(self._tasks(num_tasks, generator, split))
            if len(found) != num_tasks:
                raise OptionError(
                    f"{num_tasks} tasks were asked for, and the function that draws them gave {len(found)}; expected "
                    "as many."
                )
            return found
        some = len(self._tasks)

        def shuffled(number: int) -> list[int]:
            return torch.randperm(number, generator=generator, device=generator.device).tolist()

        # each as often as the others, but for what is left over
        indices = [*range(some)] * (num_tasks // some) + shuffled(some)[: num_tasks % some]
        return [self._tasks[indices[place]] for place in shuffled(num_tasks)]

    def vector(
        self,
        num_tasks: int,
        *,
        tasks: Sequence[TaskT] | None = None,
        split: str = "train",
        generator: Seed = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> GymVectorEnv[TaskT]:
        """Environments of some tasks side by side.

        Args:
            num_tasks: how many tasks.
            tasks: the tasks; None draws them.
            split: which set of tasks they are drawn from.
            generator: a seed, or a generator on the CPU.
            render_mode: for ``make``; ``"rgb_array"`` for pictures.
            options: ``copies``, ``new_tasks``, ``episodes_per_trial``, ``workers``, ``device``, ``dtype``,
                ``replays``; see :class:`~bayesmeta.rl.envs.gym.GymVectorEnv`.

        Raises:
            OptionError: for a picture of environments whose ``make`` takes no ``render_mode``.
        """
        from bayesmeta.rl.envs.gym import GymVectorEnv

        make = self.make
        if render_mode is not None:
            if "render_mode" not in inspect.signature(make).parameters:
                raise OptionError(
                    f"{self.name} takes no render_mode, so that its environments have no picture. Let the function "
                    "that makes them take render_mode=None and hand it on."
                )
            make = partial(make, render_mode=render_mode)
        generator = as_generator(generator, "cpu", f"environments {split}")
        if tasks is None:
            tasks = self.sample_tasks(num_tasks, generator=generator, split=split)
        return GymVectorEnv(
            make, tasks, family=self, split=split, generator=generator, horizon=self._given, set_task=self.set_task,
            **options,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """What decides its rules, as plain values, as far as it is known."""
        return {"family": self.name, "horizon": self._example[2]}


def made(make: Callable[[Any], Any], task: Any, index: int) -> gymnasium.Env[Any, Any]:
    """The environment of a task.

    Raises:
        EnvCrashError: when it cannot be made, naming the task.
        EnvError: when it is no environment of gymnasium.
    """
    try:
        env = make(task)
    except BayesMetaError:
        raise
    except Exception as error:
        raise EnvCrashError(
            f"the environment of task {index}, {task!r}, cannot be made: {type(error).__name__}: {error}{place(error)}",
            index,
        ) from error
    if not isinstance(env, gymnasium.Env):
        raise EnvError(f"of task {index}, {task!r}, {kind_name(env)} was made; expected a gymnasium.Env.")
    return env


def env_horizon(env: gymnasium.Env[Any, Any]) -> int | None:
    """Steps of an episode at most: the least of what time limits, the specification and an attribute ``horizon`` say;
    None when none does.
    """
    found = [env.spec.max_episode_steps if env.spec is not None else None]
    inner: gymnasium.Env[Any, Any] = env
    while isinstance(inner, gymnasium.Wrapper):
        if isinstance(inner, gymnasium.wrappers.TimeLimit):  # an environment that is not registered has no spec
            found.append(inner._max_episode_steps)
        inner = inner.env
    found.append(getattr(inner, "horizon", None))
    return min((steps for steps in found if steps is not None), default=None)


def check_alike(examples: Sequence[gymnasium.Env[Any, Any]], horizon: int | None) -> int | None:
    """The horizon that all environments share, None if they name none; they are closed."""
    horizons = [env_horizon(env) for env in examples]
    first = examples[0]
    for index, env in enumerate(examples):
        _check_spaces(index, env, first)
        if horizon is None and horizons[index] != horizons[0]:
            raise HorizonError(
                f"task {index} ends after {horizons[index]} steps, task 0 after {horizons[0]}; expected the same. Give "
                "horizon=, or make them alike (gymnasium.wrappers.TimeLimit)."
            )
    for env in examples:
        env.close()
    return horizons[0]


def _check_spaces(index: int, env: gymnasium.Env[Any, Any], first: gymnasium.Env[Any, Any]) -> None:
    for what in ("observation_space", "action_space"):
        space, other = getattr(env, what), getattr(first, what)
        if not isinstance(space, gymnasium.spaces.Discrete | gymnasium.spaces.Box):
            raise SpaceError(
                f"task {index} has the {what} {space}; expected Discrete or Box. Wrap the environment "
                "(gymnasium.wrappers.FlattenObservation, TransformObservation)."
            )
        if space != other:
            raise SpaceError(
                f"task {index} has the {what} {space}, task 0 has {other}; expected the same for all tasks."
            )
    if isinstance(env.action_space, gymnasium.spaces.Discrete) and env.action_space.start != 0:
        raise SpaceError(
            f"task {index} has the action_space {env.action_space}; expected actions from 0. Wrap the environment "
            "(gymnasium.wrappers.TransformAction)."
        )


def as_list(tasks: Any) -> list[Any]:
    """Tasks one by one; numbers of a tensor or array as numbers."""
    if isinstance(tasks, torch.Tensor | np.ndarray):
        return tasks.tolist() if tasks.ndim == 1 else list(tasks)
    return list(tasks)


def packed(task: Any) -> Any:
    """A task as what a checkpoint can hold.

    Raises:
        OptionError: when it cannot.
    """
    if isinstance(task, dict):
        return {key: packed(value) for key, value in task.items()}
    if isinstance(task, list | tuple):
        return type(task)(packed(value) for value in task) if type(task) in (list, tuple) else _refuse(task)
    if isinstance(task, np.ndarray | np.generic):
        return {_ARRAY: torch.from_numpy(np.array(task))}
    return task if task is None or isinstance(task, bool | int | float | str | torch.Tensor) else _refuse(task)


def unpacked(task: Any) -> Any:
    """The task of which :func:`packed` made this."""
    if isinstance(task, dict):
        return task[_ARRAY].numpy() if set(task) == {_ARRAY} else {k: unpacked(v) for k, v in task.items()}
    return type(task)(unpacked(value) for value in task) if isinstance(task, list | tuple) else task


def kind_name(value: Any) -> str:
    """What kind of thing a value is, with its article: ``"an int"``, ``"a function"``."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _refuse(task: Any) -> Any:
    raise OptionError(
        f"the task {task!r} is {kind_name(task)}, which a checkpoint cannot hold; describe tasks by numbers, "
        "text, tensors or arrays, or lists, tuples and dicts of them, and let the function that makes environments "
        "take those."
    )
