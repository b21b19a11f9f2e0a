"""The maze: its layouts are uniform spanning trees, its pictures show what is there, its rules by hand."""

import pytest
import torch

from bayesmeta import errors
from bayesmeta.rl import envs
from bayesmeta.rl.envs.maze import FORWARD, LEFT, RIGHT, MazeState, MazeTasks

FAMILY = envs.Maze()


def open_edges(wall):
    """The edges of one maze, as sets of two cells."""
    side = len(wall)
    edges = set()
    for column in range(1, side, 2):
        for row in range(1, side, 2):
            for right, up in ((2, 0), (0, 2)):
                if column + right < side and row + up < side and not wall[column + right // 2, row + up // 2]:
                    edges.add(((column, row), (column + right, row + up)))
    return frozenset(edges)


def reachable(wall, start):
    seen, todo = {start}, [start]
    while todo:
        column, row = todo.pop()
        for right, up in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            at = (column + right, row + up)
            if not wall[at] and at not in seen:
                seen.add(at)
                todo.append(at)
    return seen


def test_mazes_are_spanning_trees():
    tasks = FAMILY.sample_tasks(50, generator=0)
    for wall, start, target in zip(tasks.wall, tasks.start.tolist(), tasks.target.tolist()):
        edges = open_edges(wall)
        assert len(edges) == 8  # of 9 cells
        assert len(reachable(wall, tuple(start))) == 9 + 8
        assert tuple(target) in reachable(wall, tuple(start))
        assert start != target
        assert bool(wall[0].all() & wall[-1].all() & wall[:, 0].all() & wall[:, -1].all())
        assert bool(wall[::2, ::2].all())


def test_trees_are_uniform():
    """Two by two cells have four spanning trees: chi-squared with 3 degrees of freedom, p = 0.001."""
    walls = envs.Maze(cells=2).sample_tasks(2000, generator=0).wall
    counts = {}
    for wall in walls:
        edges = open_edges(wall)
        counts[edges] = counts.get(edges, 0) + 1
    assert len(counts) == 4
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 16.3


def corridor():
    """Three cells in a row to the right, the target at their end, looking right from the first."""
    wall = torch.ones(1, 7, 7, dtype=torch.bool)
    wall[0, 1:6, 1] = False
    square = torch.tensor([[1, 1]])
    return MazeTasks(wall, torch.tensor([[5, 1]]), square, torch.tensor([1]))


def test_rules_by_hand():
    env = FAMILY.vector(1, tasks=corridor(), autoreset_mode="Disabled")
    env.reset()
    rewards = []
    for action in (LEFT, FORWARD, RIGHT, FORWARD, FORWARD, FORWARD, FORWARD):
        _, reward, terminated, truncated, info = env.step(torch.tensor([action]))
        rewards.append(float(reward))
    # The step to the left bumps into the wall; the fourth to the right is on the target.
    assert rewards == pytest.approx([-0.04, -0.041, -0.04, -0.04, -0.04, -0.04, 0.96])
    assert (bool(terminated), bool(truncated), bool(info["success"])) == (True, False, True)


def test_the_picture_shows_the_target_and_walls():
    tasks = corridor()
    see = lambda square, heading: FAMILY.observe(  # noqa: E731
        tasks, MazeState(torch.tensor([square]), torch.tensor([heading]))
    )[0]
    ahead, near, away = see([1, 1], 1), see([4, 1], 1), see([1, 1], 3)
    red = lambda picture: int(((picture[0] > 0) & (picture[1] == 0)).sum())  # noqa: E731
    assert red(near) > red(ahead) > 0 == red(away)
    # The target's near side is 3.5 squares ahead; the first sample behind it is at most 0.125 further.
    assert 1 / (1 + 3.5 + 0.126) < float(ahead[0, 6, 8]) <= 1 / (1 + 3.5)
    # Looking back there is a wall 0.5 to 0.625 squares away, so four fifths of the height at least.
    assert bool((away[:, 2:10, 7:9] > 1 / (1 + 0.626)).all())
    assert bool((away[0] == away[1]).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: envs.Maze(cells=1), "cells=1"),
        (lambda: envs.Maze(view=3), "view=3"),
        (lambda: envs.Maze(horizon=0), "horizon=0"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(errors.OptionError, match=message):
        make()
