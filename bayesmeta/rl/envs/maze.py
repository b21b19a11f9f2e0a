"""A small maze seen from within (after Duan et al. 2016, RL², https://arxiv.org/abs/1611.02779, section 3.3).

A task is a maze, a target and a start. An agent turns left or right by a quarter or steps forward, and sees what is in
front of it, a picture of ``view`` columns over a quarter turn: walls are the darker the further, the target is red.
Reaching the target gives +1 and *terminates*; a step costs 0.04, a bump into a wall 0.001 more; 100 steps *truncate*.
The paper's mazes are rendered by ViZDoom at 40×30; its rewards are these. Mazes are uniform spanning trees (D. Aldous,
1990; A. Broder, 1989: a random walk that keeps the edges by which it first enters each cell).
"""

from __future__ import annotations

import math
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

#: Column and row change of the headings: up, right, down, left.
HEADINGS = ((0, 1), (1, 0), (0, -1), (-1, 0))
#: Rays are followed in steps of this, in squares.
RAY = 0.125
LEFT, RIGHT, FORWARD = 0, 1, 2
STEP_COST, BUMP_COST = 0.04, 0.001


@dataclass(frozen=True)
class MazeTasks(Tensors):
    """Walls ``[tasks, side, side]`` bool by (column, row); squares of the target and the start, ``[tasks, 2]`` int64;
    the first heading ``[tasks]`` int64.
    """

    wall: Tensor
    target: Tensor
    start: Tensor
    heading: Tensor


@dataclass(frozen=True)
class MazeState(Tensors):
    """The agent's square, ``[n, 2]`` int64, and heading, ``[n]`` int64."""

    square: Tensor
    heading: Tensor


@dataclass(frozen=True)
class Maze(Family[MazeTasks, MazeState]):
    """A small maze seen from within; see the head of this module.

    Args:
        cells: of a side; with the walls between them, a maze has 2·cells + 1 squares a side.
        view: columns of the picture; its height is three quarters of that.
        horizon: steps of an episode.

    Raises:
        OptionError: for fewer than 2 cells, 4 columns or 1 step.
    """

    cells: int = 3
    view: int = 16
    horizon: int = 100

    name = "maze"
    fixed_length = False
    task_type = MazeTasks
    state_type = MazeState

    def __post_init__(self) -> None:
        check_at_least(2, cells=self.cells)
        check_at_least(4, view=self.view)
        check_at_least(1, horizon=self.horizon)

    @property
    def side(self) -> int:
        """Squares of a side."""
        return 2 * self.cells + 1

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        """The picture, channels first, from 0 to 1."""
        return gymnasium.spaces.Box(0.0, 1.0, (3, 3 * self.view // 4, self.view), np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        """Turn left, turn right, step forward."""
        return gymnasium.spaces.Discrete(3)

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> MazeTasks:
        """Mazes, targets and starts in two different cells, and headings; a seed gives other tasks to each split."""
        check_split(split)
        generator = as_generator(generator, stream=f"tasks {split}")
        device, number = generator.device, self.cells**2
        wall = _spanning_trees(num_tasks, self.cells, generator)
        start = torch.randint(number, (num_tasks,), generator=generator, device=device)
        other = torch.randint(number - 1, (num_tasks,), generator=generator, device=device)
        target = torch.where(other >= start, other + 1, other)
        heading = torch.randint(4, (num_tasks,), generator=generator, device=device)
        return MazeTasks(wall, self._square(target), self._square(start), heading)

    def _square(self, cell: Tensor) -> Tensor:
        return torch.stack([2 * (cell // self.cells) + 1, 2 * (cell % self.cells) + 1], -1)

    def initial(self, tasks: MazeTasks, noise: Noise) -> MazeState:
        """The task's start."""
        return MazeState(tasks.start.clone(), tasks.heading.clone())

    def advance(
        self, tasks: MazeTasks, state: MazeState, actions: Tensor, noise: Noise
    ) -> tuple[MazeState, Tensor, Tensor, dict[str, Tensor]]:
        """Turn or step."""
        turn = torch.where(actions == LEFT, 3, torch.where(actions == RIGHT, 1, 0))
        heading = (state.heading + turn) % 4
        moves = torch.tensor(HEADINGS, device=actions.device)[heading] * (actions == FORWARD)[:, None]
        ahead = state.square + moves
        row = torch.arange(len(actions), device=actions.device)
        bump = tasks.wall[row, ahead[:, 0], ahead[:, 1]]
        square = torch.where(bump[:, None], state.square, ahead)
        found = (square == tasks.target).all(-1)
        reward = found.float() - STEP_COST - BUMP_COST * bump.float()
        return MazeState(square, heading), reward, found, {"success": found}

    def observe(self, tasks: MazeTasks, state: MazeState) -> Tensor:
        """What is in front, ``[n, 3, height, view]``."""
        paths = _rays(self.view, self.side, state.square.device)[state.heading]  # [n, view, samples, 2]
        at = (state.square[:, None, None] + 0.5 + paths).floor().long().clamp_(0, self.side - 1)
        row = torch.arange(len(state), device=at.device)[:, None, None]
        walls = tasks.wall[row, at[..., 0], at[..., 1]]
        reach = walls.int().argmax(-1)  # rays end in the outer wall at the latest
        targets = (at == tasks.target[:, None, None]).all(-1)
        first = torch.where(targets.any(-1), targets.int().argmax(-1), targets.shape[-1])
        return self._paint(reach, first)

    def _paint(self, reach: Tensor, first: Tensor) -> Tensor:
        """Columns of walls and of the target, from the numbers of samples to them ``[n, view]``."""
        angles = _angles(self.view).to(reach.device)
        rows = 3 * self.view // 4
        height = torch.arange(rows, device=reach.device).add(0.5).mul(2 / rows).sub(1).abs()[None, :, None]

        def column(samples: Tensor) -> tuple[Tensor, Tensor]:
            distance = (samples + 1) * RAY * angles.cos()
            return height <= (0.5 / distance)[:, None], (1 / (1 + distance))[:, None]

        inside, shade = column(reach)
        grey = torch.where(inside, shade, 0.0)
        painted, red = column(first)
        painted = painted & (first < reach)[:, None]
        return torch.stack([torch.where(painted, red, grey), *[torch.where(painted, 0.0, grey)] * 2], 1)

    def plain(self, **options: Any) -> MazeEnv:
        """As one plain gymnasium environment."""
        return MazeEnv(self, **options)

    def picture(self, tasks: MazeTasks, state: MazeState, index: int = 0) -> np.ndarray:
        """The maze from above: the target green, the agent red, its heading black."""
        canvas, half = Canvas(self.side / 2), self.side / 2
        for column, row in tasks.wall[index].nonzero().tolist():
            canvas.box((column - half, row - half), (column + 1 - half, row + 1 - half), (90, 90, 90))
        target = (tasks.target[index] + 0.5 - half).tolist()
        at, ahead = (state.square[index] + 0.5 - half).tolist(), HEADINGS[int(state.heading[index])]
        canvas.disc(target, 0.35, (120, 190, 130))
        canvas.disc(at, 0.3, (200, 60, 40))
        canvas.disc((at[0] + 0.25 * ahead[0], at[1] + 0.25 * ahead[1]), 0.1, (0, 0, 0))
        return canvas.pixels


def _spanning_trees(num: int, cells: int, generator: torch.Generator) -> Tensor:
    """Walls of uniform spanning trees, ``[num, side, side]``: all mazes walk at once until all have seen every cell."""
    device, side = generator.device, 2 * cells + 1
    wall = torch.ones(num, side, side, dtype=torch.bool, device=device)
    row, moves = torch.arange(num, device=device), torch.tensor(HEADINGS, device=device)
    at = torch.ones(num, 2, dtype=torch.int64, device=device)
    wall[:, 1, 1] = False
    while bool(wall[:, 1::2, 1::2].any()):
        step = moves[torch.randint(4, (num,), generator=generator, device=device)]
        after = at + 2 * step
        inside = ((after > 0) & (after < side)).all(-1)
        after = torch.where(inside[:, None], after, at)
        new = wall[row, after[:, 0], after[:, 1]]
        between = at + step * inside[:, None]
        wall[row, between[:, 0], between[:, 1]] &= ~new
        wall[row, after[:, 0], after[:, 1]] = False
        at = after
    return wall


def _angles(view: int) -> Tensor:
    """Of the columns from the heading, left to right, over a quarter turn."""
    return math.pi / 4 * ((torch.arange(view, dtype=torch.float64) + 0.5) * 2 / view - 1)


@lru_cache
def _rays(view: int, side: int, device: torch.device) -> Tensor:
    """Places along the rays of each heading, ``[4, view, samples, 2]``, far enough to leave any maze."""
    distance = RAY * torch.arange(1, math.ceil(side * math.sqrt(2) / RAY) + 1, dtype=torch.float64)
    turned = torch.arange(4, dtype=torch.float64)[:, None] * math.pi / 2 + _angles(view)
    direction = torch.stack([turned.sin(), turned.cos()], -1)
    return (direction[:, :, None] * distance[:, None]).to(device)


class MazeEnv(PlainEnv):
    """The maze as a plain gymnasium environment; see :class:`Maze`."""

    family: Maze

    def __init__(self, family: Maze | None = None, **options: Any) -> None:
        super().__init__(family or Maze(), **options)

    def _prepare(self) -> None:
        assert self.task is not None
        self.wall = np.asarray(self.task["wall"], dtype=bool)
        self.target = tuple(int(x) for x in self.task["target"])

    def _initial(self, noise: Numbers) -> None:
        assert self.task is not None
        start = self.task["start"]
        self.square, self.heading = (int(start[0]), int(start[1])), int(self.task["heading"])

    def _advance(self, action: int, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        bump = False
        if action == FORWARD:
            ahead = HEADINGS[self.heading]
            square = (self.square[0] + ahead[0], self.square[1] + ahead[1])
            bump = bool(self.wall[square])
            self.square = self.square if bump else square
        else:
            self.heading = (self.heading + (1 if action == RIGHT else -1)) % 4
        found = self.square == self.target
        return float(found) - STEP_COST - BUMP_COST * bump, found, {"success": found}

    def _observe(self) -> np.ndarray:
        view, rows = self.family.view, 3 * self.family.view // 4
        picture = np.zeros((3, rows, view), dtype=np.float32)
        for column in range(view):
            offset = math.pi / 4 * ((column + 0.5) * 2 / view - 1)
            angle = self.heading * math.pi / 2 + offset
            samples = 1
            colours: list[tuple[int, tuple[float, float, float]]] = []
            while True:
                x = math.floor(self.square[0] + 0.5 + samples * RAY * math.sin(angle))
                y = math.floor(self.square[1] + 0.5 + samples * RAY * math.cos(angle))
                if self.wall[x, y]:
                    colours.insert(0, (samples, (1.0, 1.0, 1.0)))
                    break
                if (x, y) == self.target and not colours:
                    colours.append((samples, (1.0, 0.0, 0.0)))
                samples += 1
            for number, colour in colours:
                distance = number * RAY * math.cos(offset)
                for row in range(rows):
                    if abs((row + 0.5) * 2 / rows - 1) <= 0.5 / distance:
                        picture[:, row, column] = np.array(colour) / (1 + distance)
        return picture

    def _state(self) -> dict[str, Tensor]:
        return {"square": torch.tensor([self.square]), "heading": torch.tensor([self.heading])}
