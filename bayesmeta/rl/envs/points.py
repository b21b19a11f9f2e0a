"""A point in the plane that looks for a goal it cannot see: 2-D navigation and the sparse point robot.

**Navigation** (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section 5.3): goals uniform on a square around the
start, steps clipped to ±0.1 a coordinate, the reward is the negative squared distance to the goal after the step.
Unlike the paper's, an episode does not end within 0.01 of the goal: it lasts 100 steps. With ``sparse=True``, the
reward is 1 − distance within ``radius`` of the goal and 0 elsewhere.

**Sparse point robot** (Rakelly et al. 2019, PEARL, https://arxiv.org/abs/1903.08254, section 6.3): goals on the half
circle of radius 1 above the start, 20 steps, the same sparse reward within 0.2. ``info["dense_reward"]`` is the
negative distance, on which PEARL trains. 80 goals to train on, 20 to validate and 20 to test, which are fixed, as is
the seed that they were drawn with (the paper has 80 and 20).

The goal is not observed. The end of the horizon *truncates*: it is a time limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import SPLITS, Family, Noise, check_at_least, check_split
from bayesmeta.rl.envs.pictures import Canvas
from bayesmeta.rl.envs.plain import Numbers, PlainEnv
from bayesmeta.rl.protocols import Tensors

#: Goals of the sparse point robot by set of tasks, and the seed that they were drawn with.
NUM_GOALS = {"train": 80, "validation": 20, "test": 20}
GOAL_SEED = 20


@dataclass(frozen=True)
class GoalTasks(Tensors):
    """Where the goals are, ``[tasks, 2]``."""

    goal: Tensor


@dataclass(frozen=True)
class PointState(Tensors):
    """Where the points are, ``[n, 2]``."""

    position: Tensor


@dataclass(frozen=True)
class _Point(Family[GoalTasks, PointState]):
    horizon: int = 100
    max_step: float = 0.1
    radius: float = 0.2

    task_type = GoalTasks
    state_type = PointState

    def __post_init__(self) -> None:
        check_at_least(1, horizon=self.horizon)
        if not (0 < self.max_step < math.inf and 0 < self.radius <= 1):
            raise OptionError(
                f"max_step={self.max_step}, radius={self.radius}; expected a positive step and a radius in (0, 1]: the "
                "sparse reward is 1 − distance."
            )

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        """The position; it cannot leave what ``horizon`` steps reach."""
        reach = self.horizon * self.max_step * (1 + 1e-5)
        return gymnasium.spaces.Box(-reach, reach, (2,), np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Box:
        """The step, clipped to ± ``max_step`` a coordinate."""
        return gymnasium.spaces.Box(-self.max_step, self.max_step, (2,), np.float32)

    def initial(self, tasks: GoalTasks, noise: Noise) -> PointState:
        """The origin."""
        return PointState(torch.zeros_like(tasks.goal))

    def observe(self, tasks: GoalTasks, state: PointState) -> Tensor:
        """The position, ``[n, 2]``."""
        return state.position.clone()

    def _sparse(self, distance: Tensor) -> Tensor:
        return torch.where(distance <= self.radius, 1.0 - distance, 0.0)

    def picture(self, tasks: GoalTasks, state: PointState, index: int = 0) -> np.ndarray:
        """The goal's disc, the start and the point, seen from above."""
        goal, position = tasks.goal[index].numpy(), state.position[index].numpy()
        canvas = Canvas(1.3 * max(0.5, float(np.abs(goal).max())))
        canvas.disc(goal, self.radius, (205, 235, 205))
        canvas.disc(goal, 0.02 * canvas.extent, (40, 140, 60))
        canvas.disc((0.0, 0.0), 0.02 * canvas.extent, (150, 150, 150))
        canvas.disc(position, 0.04 * canvas.extent, (200, 60, 40))
        return canvas.pixels


@dataclass(frozen=True)
class Navigation(_Point):
    """A point among goals in a square; see the head of this module.

    Args:
        horizon: steps of an episode.
        max_step: limit of a step, for each coordinate.
        radius: where the sparse reward begins.
        extent: goals are uniform on [−extent, extent]².
        sparse: the sparse reward in place of −distance².

    Raises:
        OptionError: for a horizon below 1, a radius outside (0, 1], other lengths that are not positive.
    """

    extent: float = 0.5
    sparse: bool = False
    name = "navigation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.extent < math.inf:
            raise OptionError(f"extent={self.extent}; expected a positive number.")

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> GoalTasks:
        """Goals ``[num_tasks, 2]``; a seed gives other goals to each split."""
        check_split(split)
        generator = as_generator(generator, stream=f"tasks {split}")
        uniform = torch.rand(num_tasks, 2, generator=generator, device=generator.device)
        return GoalTasks(self.extent * (2 * uniform - 1))

    def advance(
        self, tasks: GoalTasks, state: PointState, actions: Tensor, noise: Noise
    ) -> tuple[PointState, Tensor, None, dict[str, Tensor]]:
        """Move; the reward is of the new position."""
        position = state.position + actions.clamp(-self.max_step, self.max_step)
        squared = (position - tasks.goal).square_().sum(-1)
        return PointState(position), self._sparse(squared.sqrt()) if self.sparse else -squared, None, {}

    def plain(self, **options: Any) -> NavigationEnv:
        """As one plain gymnasium environment."""
        return NavigationEnv(self, **options)


@dataclass(frozen=True)
class SparsePointRobot(_Point):
    """PEARL's sparse point robot; see the head of this module.

    Args:
        horizon: steps of an episode.
        max_step: limit of a step, for each coordinate.
        radius: of the disc around the goal outside which the reward is 0.

    Raises:
        OptionError: for a horizon below 1, a radius outside (0, 1], a step that is not positive.
    """

    horizon: int = 20
    name = "sparse_point_robot"

    def goals(self, split: str = "train") -> Tensor:
        """All goals of a set of tasks, ``[80 or 20, 2]``.

        Raises:
            OptionError: for an unknown split.
        """
        check_split(split)
        angle = math.pi * torch.rand(sum(NUM_GOALS.values()), generator=as_generator(GOAL_SEED, stream="goals"))
        mine = angle.split([NUM_GOALS[name] for name in SPLITS])[SPLITS.index(split)]
        return torch.stack([mine.cos(), mine.sin()], -1)

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> GoalTasks:
        """Goals ``[num_tasks, 2]`` of a split: without replacement, with it where more are asked for than there are."""
        goals = self.goals(split)
        generator = as_generator(generator, stream="tasks")
        if num_tasks <= len(goals):
            chosen = torch.randperm(len(goals), generator=generator, device=generator.device)[:num_tasks]
        else:
            chosen = torch.randint(len(goals), (num_tasks,), generator=generator, device=generator.device)
        return GoalTasks(goals.to(chosen.device)[chosen])

    def advance(
        self, tasks: GoalTasks, state: PointState, actions: Tensor, noise: Noise
    ) -> tuple[PointState, Tensor, None, dict[str, Tensor]]:
        """Move; the rewards are of the new position."""
        position = state.position + actions.clamp(-self.max_step, self.max_step)
        distance = (position - tasks.goal).square_().sum(-1).sqrt_()
        return PointState(position), self._sparse(distance), None, {"dense_reward": -distance}

    def plain(self, **options: Any) -> SparsePointRobotEnv:
        """As one plain gymnasium environment."""
        return SparsePointRobotEnv(self, **options)


class _PointEnv(PlainEnv):
    family: _Point

    def _prepare(self) -> None:
        assert self.task is not None
        self.goal = [float(x) for x in self.task["goal"]]

    def _initial(self, noise: Numbers) -> None:
        self.position = [0.0, 0.0]

    def _squared_distance(self, action: Any) -> float:
        """Of the new position from the goal."""
        limit, total = self.family.max_step, 0.0
        for i, (step, goal) in enumerate(zip(action, self.goal)):
            self.position[i] += min(max(float(step), -limit), limit)
            total += (self.position[i] - goal) ** 2
        return total

    def _sparse(self, distance: float) -> float:
        return 1.0 - distance if distance <= self.family.radius else 0.0

    def _observe(self) -> np.ndarray:
        return np.array(self.position, dtype=np.float32)

    def _state(self) -> dict[str, Tensor]:
        return {"position": torch.tensor([self.position])}


class NavigationEnv(_PointEnv):
    """Navigation as a plain gymnasium environment; see :class:`Navigation`."""

    family: Navigation

    def __init__(self, family: Navigation | None = None, **options: Any) -> None:
        super().__init__(family or Navigation(), **options)

    def _advance(self, action: Any, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        squared = self._squared_distance(action)
        return self._sparse(math.sqrt(squared)) if self.family.sparse else -squared, False, {}


class SparsePointRobotEnv(_PointEnv):
    """The sparse point robot as a plain gymnasium environment; see :class:`SparsePointRobot`."""

    def __init__(self, family: SparsePointRobot | None = None, **options: Any) -> None:
        super().__init__(family or SparsePointRobot(), **options)

    def _advance(self, action: Any, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        distance = math.sqrt(self._squared_distance(action))
        return self._sparse(distance), False, {"dense_reward": -distance}
