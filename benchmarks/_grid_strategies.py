"""Ways to explore the grid on equal terms: one belief over the goal, and what is done with it.

A belief gives each cell's chance to be the goal, from all that was seen in the trial. A strategy aims at a cell, goes
there by a shortest way (a fair coin where there are several) and stays. Two beliefs: the learned one, which draws or
takes the mean of its latent z and decodes it, and the exact one, which is uniform over the cells not yet entered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.models.program import TaskProgram
from bayesmeta.rl.envs import Grid, TensorVectorEnv
from bayesmeta.rl.envs.grid import MOVES, CellTasks
from bayesmeta.rl.latent.checks import admissible_cells, goal_probabilities
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.off_policy.posterior_sampling import Exploration, Infer, inferring, play
from bayesmeta.rl.trials import trial_returns

#: Each cell's chance to be the goal, ``[n, cells²]``, from contexts, the episode that is running, and a generator.
Chances = Callable[[Observations, Tensor, torch.Generator], Tensor]
#: Chances this close to the largest one count as equal.
_TIE = 1e-6


class Strategy(NamedTuple):
    """What is done with a belief.

    Attributes:
        latent: which z of the learned belief is decoded, as in :func:`inferring`; ``"prior"`` never learns.
        cell: whether the cell is drawn by its chance, or the likeliest.
        hold: how long it aims at a cell: to the end of the episode; until it was reached, or a step brought the goal's
            reward; or for one step.
        ties: which of several that are the likeliest: a random one, or the nearest, and of these the first. The latter
            is a search of its own where many are equal, as they are under the exact belief.
    """

    latent: Exploration
    cell: Literal["draw", "likeliest"]
    hold: Literal["episode", "reached", "step"] = "episode"
    ties: Literal["random", "nearest"] = "random"


STRATEGIES = {
    "posterior_sampling": Strategy("posterior_sampling", "draw"),
    "posterior_sampling_until_reached": Strategy("posterior_sampling", "draw", "reached"),
    "posterior_sampling_each_step": Strategy("posterior_sampling", "draw", "step"),
    "latent_draw": Strategy("posterior_sampling", "likeliest"),
    "latent_draw_each_step": Strategy("posterior_sampling", "likeliest", "step"),
    "mean": Strategy("mean", "likeliest"),
    "mean_each_step": Strategy("mean", "likeliest", "step"),
    "nearest_each_step": Strategy("mean", "likeliest", "step", "nearest"),
    "prior": Strategy("prior", "draw"),
}
#: Those of a learned belief. No two of its chances are equal, so that the nearest of equals is no other strategy.
LEARNED = tuple(name for name in STRATEGIES if not name.startswith("nearest"))
#: Those that an exact belief can have, which has no latent.
IDEAL = tuple(name for name in STRATEGIES if not name.startswith("latent"))


def learned(
    latent: LatentContext, program: TaskProgram, spec: ContextSpec, family: Grid, exploration: Exploration
) -> Chances:
    """What a decoder says of the cells at one z: a draw of the belief, its mean, or a draw of the prior."""
    infer = inferring(latent, exploration)

    def chances(context: Observations, episode: Tensor, generator: torch.Generator) -> Tensor:
        return goal_probabilities(program, spec, infer(context, episode, generator).unsqueeze(0), family)

    return chances


def plain_spec(env: TensorVectorEnv) -> ContextSpec:
    """Contexts that :func:`exact` reads: the cells that were entered, and whether they were the goal."""
    family = env.family
    assert isinstance(family, Grid)
    scale = family.goal_reward - family.other_reward
    return ContextSpec.of(env, inputs=("successor",), binary=True, reward_shift=family.other_reward, reward_scale=scale)


def exact(family: Grid, *, learns: bool = True) -> Chances:
    """The exact belief: on the goal once it was entered, before that uniform over the admissible cells not entered.

    Args:
        family: the grid.
        learns: else it stays uniform over all admissible cells.
    """

    def chances(context: Observations, episode: Tensor, generator: torch.Generator) -> Tensor:
        assert context.y is not None
        count = family.cells**2
        possible = admissible_cells(family).to(context.x.device).expand(context.num_tasks, count)
        if learns and context.shots:
            index = (context.x[..., 0] * family.cells + context.x[..., 1]).round().long()
            entered = torch.nn.functional.one_hot(index, count).bool() & context.full_mask().unsqueeze(-1)
            good = entered & (context.y > 0.5).unsqueeze(-1)
            found = good.any(1)
            possible = torch.where(found.any(-1, keepdim=True), found, possible & ~entered.any(1))
        return possible.to(context.x) / possible.sum(-1, keepdim=True)

    return chances


def aiming(chances: Chances, strategy: Strategy, family: Grid) -> Infer:
    """The cell (column, row) to aim at, ``[n, 2]``, in the place of a latent; it is for one trial, and remembers."""
    side = torch.arange(float(family.cells))
    cells = torch.cartesian_prod(side, side)

    def choose(context: Observations, episode: Tensor, generator: torch.Generator) -> Tensor:
        chance = chances(context, episode, generator)
        places = cells.to(chance)
        if strategy.cell == "draw":
            return places[torch.multinomial(chance, 1, generator=generator).squeeze(-1)]
        best = chance >= chance.amax(-1, keepdim=True) * (1 - _TIE)
        if strategy.ties == "random":
            return places[torch.multinomial(best.to(chance), 1, generator=generator).squeeze(-1)]
        away = (places - standing(context, family).unsqueeze(1)).abs().sum(-1)
        # the first of the nearest: argmin does not say which of several
        order = away * len(places) + torch.arange(len(places)).to(away)
        return places[torch.where(best, order, torch.inf).argmin(-1)]

    held: Tensor | None = None

    def infer(context: Observations, episode: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal held
        aim = choose(context, episode, generator)
        if strategy.hold == "reached" and held is not None and context.shots % family.horizon:
            assert context.y is not None
            over = (standing(context, family) == held).all(-1) | (context.y[:, -1] > 0.5)
            aim = torch.where(over.unsqueeze(-1), aim, held)
        held = aim
        return aim

    return infer


def standing(context: Observations, family: Grid) -> Tensor:
    """The cell in which one stands after a context, ``[n, 2]``: the corner where an episode begins.

    Contexts have all steps of the trial so far, and end with the cell that was entered: one-hot, or column and row.
    """
    if context.shots % family.horizon == 0:
        return context.x.new_zeros(context.num_tasks, 2)
    last = context.x[:, -1]
    if last.shape[-1] == 2:
        return last
    index = last.argmax(-1)
    return torch.stack([index // family.cells, index % family.cells], -1).to(last)


def walk(cell: Tensor, aim: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One step of a shortest way from cells to cells, ``[n, 2]`` each: the action, and its log density."""
    left = aim - cell
    along = left.abs() > 0
    both = along.all(-1)
    coin = torch.rand(len(cell), generator=generator, device=cell.device) < 0.5
    axis = torch.where(both, coin, along[:, 1]).long()  # 0: by the column, 1: by the row
    move = torch.zeros_like(left).scatter(1, axis[:, None], left.gather(1, axis[:, None]).sign())
    moves = torch.tensor(MOVES, dtype=move.dtype, device=move.device)
    action = (move.unsqueeze(1) == moves).all(-1).long().argmax(-1)
    return action, torch.where(both, 0.5, 1.0).log()


def goals_env(family: Grid, episodes: int, seed: int, copies: int = 1) -> TensorVectorEnv:
    """Environments for each goal."""
    goals = family.goals()
    return TensorVectorEnv(
        family, len(goals), copies=copies, tasks=CellTasks(goals), episodes_per_trial=episodes, split="test",
        generator=seed,
    )  # fmt: skip


def explore(
    env: TensorVectorEnv, chances: Chances, strategy: Strategy, spec: ContextSpec, generator: torch.Generator
) -> Tensor:
    """The return of each episode of a trial, ``[tasks, copies, episodes]``, float64."""
    family = env.family
    assert isinstance(family, Grid)
    infer = aiming(chances, strategy, family)
    rollout = play(env, walk, infer, spec, generator, each_step=strategy.hold != "episode")
    returns = trial_returns(rollout, env.episodes_per_trial).episodes.double()
    return returns.unflatten(0, (env.num_tasks, env.copies))


def sampling_error(returns: Tensor) -> Tensor:
    """Standard error of the mean over ``[tasks, copies, …]``, where each task has as many copies: that of the copies.

    All goals stand among the tasks, so that there is no error over tasks.
    """
    tasks, copies = returns.shape[:2]
    return (returns.var(1) / copies).sum(0).sqrt() / tasks
