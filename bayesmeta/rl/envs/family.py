"""What a family of environments is whose tasks are tensors: how tasks are drawn, and the rules of a step."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import gymnasium
import numpy as np
import torch
from torch import Tensor

from bayesmeta.errors import EnvError, OptionError
from bayesmeta.ops.random import Seed
from bayesmeta.rl.protocols import Tensors

if TYPE_CHECKING:
    from bayesmeta.rl.envs.vector import TensorVectorEnv

TaskT = TypeVar("TaskT", bound=Tensors)
StateT = TypeVar("StateT", bound=Tensors)

#: Random numbers of one reset or one step, ``[num, …]`` each. They are drawn apart from the rules that use them, so
#: that the same numbers can be given to two implementations of the same rules.
Noise = tuple[Tensor, ...]

#: Sets of tasks. Families without a finite set draw each split from a stream of its own.
SPLITS = ("train", "validation", "test")


def check_split(split: str) -> None:
    """Raise OptionError for an unknown set of tasks."""
    if split not in SPLITS:
        raise OptionError(f"split {split!r}; expected one of {', '.join(SPLITS)}.")


def check_at_least(low: int, **values: int) -> None:
    """Raise OptionError for a number of things that is below ``low``."""
    for name, value in values.items():
        if value < low:
            raise OptionError(f"{name}={value}; expected at least {low}.")


class Family(ABC, Generic[TaskT, StateT]):
    """A family of environments: how tasks are drawn, and the rules, for many environments at once.

    Subclasses are frozen dataclasses of plain options. The rules are pure functions: what is random comes in as
    :data:`Noise`. ``n`` below is the number of environments side by side; ``tasks`` has one task for each of them.
    """

    name: str
    horizon: int
    #: Whether the end of the horizon is part of the problem (terminated) or a time limit (truncated).
    horizon_terminates: bool = False
    #: Whether every episode lasts exactly ``horizon`` steps. Such environments keep time together, without a mask.
    fixed_length: bool = True
    #: Names of what ``info`` has in each step beside what every environment tells, such as ``"success"``.
    tells: ClassVar[tuple[str, ...]] = ()
    task_type: ClassVar[type[Tensors]]
    state_type: ClassVar[type[Tensors]]

    @property
    @abstractmethod
    def observation_space(self) -> gymnasium.Space[Any]:
        """Of one environment."""

    @property
    @abstractmethod
    def action_space(self) -> gymnasium.Space[Any]:
        """Of one environment."""

    @abstractmethod
    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> TaskT:
        """Draw tasks on the generator's device, float32."""

    @abstractmethod
    def initial(self, tasks: TaskT, noise: Noise) -> StateT:
        """The states in which episodes begin."""

    @abstractmethod
    def advance(
        self, tasks: TaskT, state: StateT, actions: Tensor, noise: Noise
    ) -> tuple[StateT, Tensor, Tensor | None, dict[str, Tensor]]:
        """One step: the new states, rewards ``[n]``, which episodes the rules end (None: none), and more for
        ``info``.
        """

    @abstractmethod
    def observe(self, tasks: TaskT, state: StateT) -> Tensor:
        """What an agent sees, ``[n, …]``: a new tensor."""

    def reset_noise(self, num: int, generator: torch.Generator, dtype: torch.dtype) -> Noise:
        """Random numbers of ``num`` resets."""
        return ()

    def step_noise(self, num: int, generator: torch.Generator, dtype: torch.dtype) -> Noise:
        """Random numbers of a step of ``num`` environments."""
        return ()

    @abstractmethod
    def plain(self, **options: Any) -> gymnasium.Env[Any, Any]:
        """One environment of the family as a plain gymnasium environment: the same rules again, on NumPy numbers."""

    def picture(self, tasks: TaskT, state: StateT, index: int = 0) -> np.ndarray:
        """What environment ``index`` looks like, ``[height, width, 3]`` uint8.

        Raises:
            EnvError: where the family has no picture.
        """
        raise EnvError(f"environments of the family {self.name} have no picture; leave render_mode out.")

    def vector(self, num_tasks: int, **options: Any) -> TensorVectorEnv:
        """Many environments at once; see :class:`~bayesmeta.rl.envs.vector.TensorVectorEnv`."""
        from bayesmeta.rl.envs.vector import TensorVectorEnv

        return TensorVectorEnv(self, num_tasks, **options)

    def config(self) -> dict[str, Any]:
        """The options that decide its rules, as plain values."""
        return {"family": self.name, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}  # type: ignore[arg-type]
