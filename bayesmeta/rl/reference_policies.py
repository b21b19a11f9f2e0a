"""What stands beside a learner's returns: the optimum where a family ships one, and what classical policies reach.

All play the same tasks. Where the best policy that does not know the task can be computed (few pulls of Bernoulli arms,
the grid) it is here; else the best that knows the task, which no learner can reach in its first episode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesmeta.ops.random import as_generator
from bayesmeta.rl.baselines import bandits, mdps
from bayesmeta.rl.envs import BeamSteering, BernoulliBandit, GaussianBandit, Grid, Maze, Navigation, SparsePointRobot
from bayesmeta.rl.envs.tabular import TabularMDP
from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.oracles.bandits import bayes_optimal_bandit_value
from bayesmeta.rl.oracles.beam import box_least_squares_actions, inverse_response_actions
from bayesmeta.rl.oracles.grid import bayes_optimal_grid
from bayesmeta.rl.oracles.mdps import finite_horizon_values
from bayesmeta.rl.oracles.robot import thompson_returns
from bayesmeta.rl.protocols import Tensors
from bayesmeta.rl.rollout import Acted, Moment, collect
from bayesmeta.rl.trials import trial_returns

#: Pulls up to which the Bayes-optimal value of a bandit is computed (seconds).
MOST_PULLS = 12
#: Pulls of a trial up to which Gittins indices are computed.
MOST_GITTINS = 200
#: Cells and episodes up to which the Bayes-optimal walk is searched for.
MOST_CELLS, MOST_EPISODES = 5, 4


class Reference(NamedTuple):
    """A policy to compare with.

    Attributes:
        name: what it is.
        curve: its returns, episode by episode of its own trial.
        knows_task: whether it was told which task it is in, as no learner is.
        optimum: whether no policy that knows as much can exceed it.
        learns: whether a later episode of its trial is another matter than the first; else it is the same each time.
    """

    name: str
    curve: AdaptationCurve
    knows_task: bool = False
    optimum: bool = False
    learns: bool = False

    @property
    def label(self) -> str:
        """The name, and what it has over a learner."""
        if self.knows_task:
            return f"{self.name} (knows the task)"
        return f"{self.name} (best without knowing the task)" if self.optimum else self.name


def references(family: Any, tasks: Any, episodes: int, *, seed: int = 0) -> list[Reference]:
    """The references of a family, optima first.

    Args:
        family: of the environments.
        tasks: ``n`` of them, as the family draws them.
        episodes: of a trial.
        seed: of what is random.
    """
    for kind, make in _MAKERS:
        if isinstance(family, kind):
            found = make(family, tasks, episodes, seed)
            return [*found, Reference("random", _acting(family, tasks, episodes, seed, _random(family)))]
    return [Reference("random", _acting(family, tasks, episodes, seed, _random(family)))]


def _exact(returns: Tensor, episodes: int) -> AdaptationCurve:
    """A known value of each task, the same in each episode."""
    return AdaptationCurve(returns.expand(episodes, -1).float(), "episode")


# -- bandits and MDPs --------------------------------------------------------------------------------------------------


def _bandit(family: Any, tasks: Any, episodes: int, seed: int) -> list[Reference]:
    best = _exact(family.horizon * tasks.mean.amax(-1), episodes)
    found = [Reference("best arm", best, knows_task=True, optimum=True)]
    bernoulli = isinstance(family, BernoulliBandit)
    if bernoulli and family.horizon <= MOST_PULLS:
        value = bayes_optimal_bandit_value(family.arms, family.horizon)
        curve = _exact(torch.full_like(tasks.mean[:, 0], value), 1)  # of a trial of one episode
        found.append(Reference("Bayes-optimal", curve, optimum=True, learns=True))
    known: dict[str, bandits.BanditBaseline] = {
        "Thompson sampling": bandits.ThompsonSampling(),
        "optimistic Thompson sampling": bandits.OptimisticThompsonSampling(),
        "UCB1": bandits.UCB1(),
        "greedy": bandits.Greedy(),
    }
    whole = dataclasses.replace(family, horizon=family.horizon * episodes)  # what is known is kept between episodes
    if bernoulli and whole.horizon <= MOST_GITTINS:
        known = {"Gittins": bandits.Gittins(), **known}
    if not bernoulli and (family.noise == 0 or family.spread == 0):
        known = {}  # nothing needs to be explored twice
    for name, baseline in known.items():
        rewards = bandits.play_bandits(baseline, whole, tasks, generator=_on(tasks, seed))
        totals = rewards.unflatten(0, (episodes, family.horizon)).sum(1)
        found.append(Reference(name, AdaptationCurve(totals, "episode"), learns=True))
    return found


def _mdp(family: TabularMDP, tasks: Any, episodes: int, seed: int) -> list[Reference]:
    """All know the family's prior, a mean reward of 1. BEB and greedy plan at each step, with the scale that is best
    there; the others plan once an episode, with the scales that were chosen for the published table.
    """
    values, _ = finite_horizon_values(tasks.reward, tasks.transition, family.horizon)
    found = [Reference("value iteration", _exact(values[0, :, 0], episodes), knows_task=True, optimum=True)]
    known: dict[str, mdps.MDPBaseline] = {
        "BEB, planned at each step": mdps.BEB(scale=1.0, plans_at_steps=True),
        "greedy, planned at each step": mdps.GreedyMDP(plans_at_steps=True),
        "PSRL": mdps.PSRL(), "OPSRL": mdps.OPSRL(), "UCRL2": mdps.UCRL2(),
    }  # fmt: skip
    for name, baseline in known.items():
        totals = mdps.play_mdps(baseline, family, tasks, episodes=episodes, generator=_on(tasks, seed))
        found.append(Reference(name, AdaptationCurve(totals, "episode"), learns=True))
    return found


# -- the plane, the grid, the beam -------------------------------------------------------------------------------------


def _point(family: Navigation | SparsePointRobot, tasks: Any, episodes: int, seed: int) -> list[Reference]:
    # each coordinate goes towards the goal as fast as it may, so that the distance is the least at every step
    straight = _acting(family, tasks, episodes, seed, lambda moment, _: tasks.goal - moment.observation)
    still = _acting(family, tasks, episodes, seed, lambda moment, _: torch.zeros_like(moment.observation))
    found = [
        Reference("straight to the goal", straight, knows_task=True, optimum=True),
        Reference("standing still", still),
    ]
    if isinstance(family, SparsePointRobot):
        returns = thompson_returns(family, tasks.goal, episodes, generator=_on(tasks, seed))
        found.insert(1, Reference("ideal Thompson sampling", AdaptationCurve(returns, "episode"), learns=True))
    return found


def _grid(family: Grid, tasks: Any, episodes: int, seed: int) -> list[Reference]:
    away = tasks.goal.sum(-1)
    on_goal = (family.horizon - away + 1).clamp(min=0)
    best = on_goal * family.goal_reward + (family.horizon - on_goal) * family.other_reward
    found = [Reference("straight to the goal", _exact(best, episodes), knows_task=True, optimum=True)]
    reachable = 2 * (family.cells - 1) <= family.horizon and family.goal_reward > family.other_reward
    if reachable and family.cells <= MOST_CELLS and episodes <= MOST_EPISODES:
        value = bayes_optimal_grid(family, episodes).by_episode
        curve = AdaptationCurve(torch.tensor(value)[:, None].expand(-1, len(tasks)), "episode")
        found.append(Reference("Bayes-optimal", curve, optimum=True, learns=True))
    return found


def _beam(family: BeamSteering, tasks: Any, episodes: int, seed: int) -> list[Reference]:
    def least_squares(moment: Moment, generator: torch.Generator) -> Tensor:
        return box_least_squares_actions(tasks.response, moment.observation)

    def inverse(moment: Moment, generator: torch.Generator) -> Tensor:
        return inverse_response_actions(tasks.response, moment.observation)

    return [  # neither is the optimum, since an episode ends as soon as the beam is good enough
        Reference(
            "least squares in the limits", _acting(family, tasks, episodes, seed, least_squares), knows_task=True
        ),
        Reference("inverse response", _acting(family, tasks, episodes, seed, inverse), knows_task=True),
    ]


def _none(family: Any, tasks: Any, episodes: int, seed: int) -> list[Reference]:
    return []


_MAKERS: tuple[tuple[Any, Callable[[Any, Any, int, int], list[Reference]]], ...] = (
    ((BernoulliBandit, GaussianBandit), _bandit),
    (TabularMDP, _mdp),
    ((Navigation, SparsePointRobot), _point),
    (Grid, _grid),
    (BeamSteering, _beam),
    (Maze, _none),
)


# -- playing -----------------------------------------------------------------------------------------------------------


def _on(tasks: Any, seed: int) -> torch.Generator:
    device = next(iter(tasks.as_dict().values())).device if isinstance(tasks, Tensors) else "cpu"
    return as_generator(seed, device, "references")


def _random(family: Any) -> Callable[[Moment, torch.Generator], Tensor]:
    """Uniform actions: any of a discrete space, any point of a box; where a box has no end, normal ones."""
    space = family.action_space

    def act(moment: Moment, generator: torch.Generator) -> Tensor:
        device = moment.begins.device
        if hasattr(space, "n"):
            return torch.randint(int(space.n), moment.begins.shape, generator=generator, device=device)
        low, high = (torch.as_tensor(end, device=device) for end in (space.low, space.high))
        uniform = torch.rand(len(moment.begins), *space.shape, generator=generator, device=device)
        ends = torch.isfinite(low) & torch.isfinite(high)
        if not bool(ends.all()):
            normal = torch.randn(uniform.shape, generator=generator, device=device)
            return torch.where(ends, low.where(ends, 0.0) + (high - low).where(ends, 0.0) * uniform, normal)
        return low + (high - low) * uniform

    return act


def _acting(
    family: Any, tasks: Any, episodes: int, seed: int, act: Callable[[Moment, torch.Generator], Tensor]
) -> AdaptationCurve:
    """Returns of a policy that sees the running observation alone, one trial of each task.

    Trials may end long before the most steps that they can have. The policy is not asked any more when all have.
    """
    generator = _on(tasks, seed)
    env = family.vector(len(tasks), tasks=tasks, episodes_per_trial=episodes, generator=seed, device=generator.device)

    def actor(moment: Moment, over: Tensor | None, generator: torch.Generator) -> Acted:
        over = torch.zeros_like(moment.begins) if over is None else over | moment.begins
        action = torch.zeros_like(moment.action) if bool(over.all()) else act(moment, generator)
        return Acted(action, torch.zeros(len(action), device=action.device), over)

    told = family.tells
    found = trial_returns(collect(env, actor, family.horizon * episodes, generator=generator, keep=told), episodes)
    success = found.extra["success"].T if "success" in told else None
    return AdaptationCurve(found.episodes.T, "episode", success, found.lengths.T)
