"""What the best policy that does not know the goal reaches on VariBAD's grid, episode by episode.

Moves are certain and the goal shows itself when stepped on, so until then a policy is a fixed walk in each episode, and
afterwards the straight way to the goal. The best walks are found by a search over (cell, cells seen) with a bound:
cells that are not yet seen cannot be seen faster than one a step, those whose straight way is worth most first. The
search is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bayesmeta.errors import OptionError
from bayesmeta.rl.envs.family import check_at_least
from bayesmeta.rl.envs.grid import MOVES, Grid

Cell = tuple[int, int]


@dataclass(frozen=True)
class GridOptimum:
    """The best policy on a grid with a hidden goal.

    Attributes:
        value: expected total reward of a trial.
        by_episode: expected reward of each episode; they sum to ``value``.
        walks: actions of each episode for as long as the goal is not found; an episode after all cells were seen has
            none.
    """

    value: float
    by_episode: tuple[float, ...]
    walks: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=8)
def bayes_optimal_grid(family: Grid | None = None, episodes: int = 4) -> GridOptimum:
    """The best policy for a uniform prior over the goals.

    Args:
        family: the grid; None is VariBAD's, 5 cells a side and 15 steps.
        episodes: of a trial.

    Raises:
        OptionError: for fewer than 1 episode; if the goal's reward is not above that of other cells; if a cell is
            further away than an episode is long.
    """
    family = family or Grid()
    check_at_least(1, episodes=episodes)
    return _Search(family, episodes).solve()


class _Search:
    def __init__(self, family: Grid, episodes: int) -> None:
        self.cells, self.horizon, self.episodes = family.cells, family.horizon, episodes
        self.other, self.gain = family.other_reward, family.goal_reward - family.other_reward
        if self.gain <= 0:
            raise OptionError("the goal's reward is not above that of other cells; there is nothing to look for.")
        goals = [(int(column), int(row)) for column, row in family.goals().tolist()]
        self.bit = {goal: index for index, goal in enumerate(goals)}
        # Steps on the goal in an episode that goes straight to it.
        self.straight = [self.horizon - sum(goal) + 1 for goal in goals]
        if min(self.straight) < 1:
            raise OptionError(
                f"a goal is further away than the {self.horizon} steps of an episode; take a longer horizon."
            )
        self.memo: dict[tuple[int, int], tuple[int, tuple[Cell, ...]]] = {}
        self.bounds: dict[tuple[int, int, int], int] = {}

    def solve(self) -> GridOptimum:
        """Counts of steps on the goal, over all goals, make the values."""
        seen, walks, found = 0, [], []
        for episode in range(self.episodes):
            walk = self.best(episode, seen)[1]
            known = sum(self.straight[index] for index in range(len(self.bit)) if seen >> index & 1)
            steps = 0
            for time, cell in enumerate(walk, 1):
                new = 1 << self.bit[cell] if cell in self.bit else 0
                if new & ~seen:
                    steps += self.horizon - time + 1
                    seen |= new
            found.append(known + steps)
            walks.append(self._actions(walk))
        by_episode = tuple(self.horizon * self.other + self.gain * steps / len(self.bit) for steps in found)
        return GridOptimum(sum(by_episode), by_episode, tuple(walks))

    def best(self, episode: int, seen: int) -> tuple[int, tuple[Cell, ...]]:
        """From an episode on, for goals not seen before it: most steps on the goal, over these goals, and the walk."""
        everything = (1 << len(self.bit)) - 1
        if episode == self.episodes or seen == everything:
            return 0, ()
        if (episode, seen) not in self.memo:
            self.memo[episode, seen] = self._walk(episode, seen)
        return self.memo[episode, seen]

    def _walk(self, episode: int, seen: int) -> tuple[int, tuple[Cell, ...]]:
        """Layer by layer over (cell, seen): the best way to each, without those that cannot beat the best known."""
        layer: dict[tuple[Cell, int], tuple[int, tuple[Cell, ...]]] = {((0, 0), seen): (0, ())}
        later = self.episodes - episode - 1
        best, best_walk = self._greedy(episode, seen)
        for time in range(1, self.horizon + 1):
            after: dict[tuple[Cell, int], tuple[int, tuple[Cell, ...]]] = {}
            for (cell, known), (worth, walk) in layer.items():
                for column, row in self._neighbours(cell):
                    target, now, total = (column, row), known, worth
                    index = self.bit.get(target)
                    if index is not None and not known >> index & 1:
                        now |= 1 << index
                        total += self.horizon - time + 1 + later * self.straight[index]
                    if total + self._bound(episode, now, time) <= best:
                        continue
                    if (target, now) not in after or after[target, now][0] < total:
                        after[target, now] = (total, (*walk, target))
            layer = after
        for (_, known), (worth, walk) in sorted(layer.items(), key=lambda item: -item[1][0]):
            if worth + self._bound(episode, known, self.horizon) <= best:
                continue
            total = worth + self.best(episode + 1, known)[0]
            if total > best:
                best, best_walk = total, walk
        return best, best_walk

    def _bound(self, episode: int, seen: int, time: int) -> int:
        """No policy gets more out of the cells that are not seen after ``time`` steps of an episode."""
        key = (episode, seen, time)
        if key not in self.bounds:
            self.bounds[key] = self._most(episode, seen, time)
        return self.bounds[key]

    def _most(self, episode: int, seen: int, time: int) -> int:
        left = sorted((s for index, s in enumerate(self.straight) if not seen >> index & 1), reverse=True)
        total, begin = 0, time
        for at in range(episode, self.episodes):
            later, slots = self.episodes - at - 1, self.horizon - begin
            for slot, worth in enumerate(left[:slots]):
                total += slots - slot + later * worth
            left, begin = left[slots:], 1  # the cells next to the start are no goals: one step is lost
        return total

    def _greedy(self, episode: int, seen: int) -> tuple[int, tuple[Cell, ...]]:
        """A fair policy to begin with: to the nearest cell that is not seen, and the value of going on like that."""
        total, first = 0, None
        for at in range(episode, self.episodes):
            cell, walk = (0, 0), []
            for time in range(1, self.horizon + 1):
                left = [goal for goal, index in self.bit.items() if not seen >> index & 1]
                if left:
                    aim = min(left, key=lambda goal: (abs(goal[0] - cell[0]) + abs(goal[1] - cell[1]), -goal[0]))
                    cell = self._towards(cell, aim)
                walk.append(cell)
                index = self.bit.get(cell)
                if index is not None and not seen >> index & 1:
                    seen |= 1 << index
                    total += self.horizon - time + 1 + (self.episodes - at - 1) * self.straight[index]
            first = first or tuple(walk)
        return total, first or ()

    def _towards(self, cell: Cell, aim: Cell) -> Cell:
        if cell[0] != aim[0]:
            return (cell[0] + (1 if aim[0] > cell[0] else -1), cell[1])
        return (cell[0], cell[1] + (1 if aim[1] > cell[1] else -1))

    def _neighbours(self, cell: Cell) -> list[Cell]:
        end = self.cells - 1
        return [(c, r) for dc, dr in MOVES if 0 <= (c := cell[0] + dc) <= end and 0 <= (r := cell[1] + dr) <= end]

    def _actions(self, walk: tuple[Cell, ...]) -> tuple[int, ...]:
        steps = zip(((0, 0), *walk), walk)
        return tuple(MOVES.index((after[0] - before[0], after[1] - before[1])) for before, after in steps)
