"""A grid with a hidden goal (Zintgraf et al. 2020, VariBAD, https://arxiv.org/abs/1910.08348, section 5.1).

An agent on a 5×5 grid starts in a corner and does not see where the goal is. It stays or moves to a neighbour; the
reward is +1 on the goal and −0.1 elsewhere, at each of 15 steps. The goal is never the start or one of the three cells
next to it. Four episodes make a trial in the paper. The observation is the agent's cell (column, row). The end of the
horizon *truncates*: it is a time limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import Family, Noise, check_at_least, check_split
from bayesmeta.rl.envs.pictures import Canvas
from bayesmeta.rl.envs.plain import Numbers, PlainEnv
from bayesmeta.rl.protocols import Tensors

#: Column and row change of the actions: stay, up, right, down, left.
MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))


@lru_cache
def _moves(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(MOVES, device=device, dtype=dtype)


@dataclass(frozen=True)
class CellTasks(Tensors):
    """The goal's cell as (column, row), ``[tasks, 2]``, whole numbers."""

    goal: Tensor


@dataclass(frozen=True)
class CellState(Tensors):
    """The agent's cell as (column, row), ``[n, 2]``, whole numbers."""

    cell: Tensor


@dataclass(frozen=True)
class Grid(Family[CellTasks, CellState]):
    """A grid with a hidden goal.

    Args:
        cells: cells of a side.
        horizon: steps of an episode.
        goal_reward: on the goal's cell.
        other_reward: on all other cells.

    Raises:
        OptionError: for fewer than 3 cells or 1 step.
    """

    cells: int = 5
    horizon: int = 15
    goal_reward: float = 1.0
    other_reward: float = -0.1

    name = "grid"
    task_type = CellTasks
    state_type = CellState

    def __post_init__(self) -> None:
        check_at_least(3, cells=self.cells)
        check_at_least(1, horizon=self.horizon)

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        """The agent's cell."""
        return gymnasium.spaces.Box(0.0, self.cells - 1.0, (2,), np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        """Stay, up, right, down, left."""
        return gymnasium.spaces.Discrete(len(MOVES))

    def goals(self) -> Tensor:
        """All cells that can be the goal, ``[cells² − 4, 2]``."""
        side = torch.arange(float(self.cells))
        cells = torch.cartesian_prod(side, side)
        return cells[cells.max(-1).values > 1]

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> CellTasks:
        """Goals ``[num_tasks, 2]``, uniform; a seed gives other goals to each split, which share all cells."""
        check_split(split)
        generator = as_generator(generator, stream=f"tasks {split}")
        goals = self.goals().to(generator.device)
        return CellTasks(goals[torch.randint(len(goals), (num_tasks,), generator=generator, device=generator.device)])

    def initial(self, tasks: CellTasks, noise: Noise) -> CellState:
        """The corner (0, 0)."""
        return CellState(torch.zeros_like(tasks.goal))

    def advance(
        self, tasks: CellTasks, state: CellState, actions: Tensor, noise: Noise
    ) -> tuple[CellState, Tensor, None, dict[str, Tensor]]:
        """Move, unless a wall is in the way; the reward is of the new cell."""
        cell = (state.cell + _moves(actions.device, state.cell.dtype).index_select(0, actions)).clamp_(
            0, self.cells - 1
        )
        same = cell == tasks.goal
        rewards = cell.new_full((len(cell),), self.other_reward)
        return CellState(cell), rewards.masked_fill_(same[:, 0] & same[:, 1], self.goal_reward), None, {}

    def observe(self, tasks: CellTasks, state: CellState) -> Tensor:
        """The agent's cell, ``[n, 2]``."""
        return state.cell.clone()

    def plain(self, **options: Any) -> GridEnv:
        """As one plain gymnasium environment."""
        return GridEnv(self, **options)

    def picture(self, tasks: CellTasks, state: CellState, index: int = 0) -> np.ndarray:
        """The grid from above: the goal green, the agent red."""
        canvas = Canvas(self.cells / 2)
        for column in range(self.cells):
            for row in range(self.cells):
                self._cell(canvas, (column, row), (235, 235, 235))
        goal, cell = tasks.goal[index].tolist(), state.cell[index].tolist()
        self._cell(canvas, (goal[0], goal[1]), (120, 190, 130))
        centre = [x + 0.5 - self.cells / 2 for x in cell]
        canvas.disc(centre, 0.3, (200, 60, 40))
        return canvas.pixels

    def _cell(self, canvas: Canvas, cell: tuple[int, int], colour: tuple[int, int, int]) -> None:
        low = [x - self.cells / 2 + 0.03 for x in cell]
        canvas.box(low, [x + 0.94 for x in low], colour)


class GridEnv(PlainEnv):
    """The grid as a plain gymnasium environment; see :class:`Grid`."""

    family: Grid

    def __init__(self, family: Grid | None = None, **options: Any) -> None:
        super().__init__(family or Grid(), **options)

    def _prepare(self) -> None:
        assert self.task is not None
        self.goal = tuple(int(x) for x in self.task["goal"])

    def _initial(self, noise: Numbers) -> None:
        self.cell = (0, 0)

    def _advance(self, action: int, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        end = self.family.cells - 1
        column, row = self.cell[0] + MOVES[action][0], self.cell[1] + MOVES[action][1]
        self.cell = (min(max(column, 0), end), min(max(row, 0), end))
        return self.family.goal_reward if self.cell == self.goal else self.family.other_reward, False, {}

    def _observe(self) -> np.ndarray:
        return np.array(self.cell, dtype=np.float32)

    def _state(self) -> dict[str, Tensor]:
        return {"cell": torch.tensor([self.cell], dtype=torch.float32)}
