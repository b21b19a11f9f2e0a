"""Algorithms that explore tabular MDPs, for many MDPs at once.

They know the family's prior: flat Dirichlet transitions, and rewards with mean ~ N(1, 1) and variance 1. Each plans to
the end of the episode by backward induction, in a model of its own:

- :class:`RandomMDP`: none; any action.
- :class:`GreedyMDP`: the posterior mean. :class:`EpsilonGreedyMDP`: with probability ε a random action instead.
- :class:`PSRL` (I. Osband, D. Russo, B. Van Roy, 2013, "(More) efficient reinforcement learning via posterior
  sampling", https://arxiv.org/abs/1306.0940): one draw from the posterior for an episode. :class:`OPSRL` (the
  optimistic variant, I. Osband, B. Van Roy, 2017, "Why is posterior sampling better than optimism for reinforcement
  learning?", https://arxiv.org/abs/1607.00215): several draws; at each state and action the largest of their values.
- :class:`UCRL2` (T. Jaksch, R. Ortner, P. Auer, 2010, "Near-optimal regret bounds for reinforcement learning", JMLR 11,
  Figures 1 and 2): the most optimistic model within confidence sets. Departures: an episode of the MDP is an episode of
  the algorithm; the widths of the sets are multiplied by ``scale``, since those of the proof explore for longer than
  these problems last; the centres are the posterior means.
- :class:`BEB` (J. Z. Kolter, A. Y. Ng, 2009, "Near-Bayesian exploration in polynomial time", ICML, equation 4): the
  posterior mean with the bonus ``scale`` / (1 + n) on rewards; n are the visits, and 1 for the prior.

The defaults of ``scale``, ``draws`` and ``epsilon`` with ``prior_mean=0`` give the figures of RL²'s table within 2%
(chosen on validation tasks). That prior is wrong for these MDPs, and planning once an episode is a handicap: with the
right one, and planning at each step, BEB earns more than any figure of that table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from bayesmeta.rl.envs.family import check_at_least
from bayesmeta.rl.envs.tabular import MDPTasks, TabularMDP


class MDPBelief:
    """What is known of ``n`` MDPs: Dirichlet counts of transitions and normal posteriors of mean rewards.

    Args:
        num: MDPs.
        family: their sizes.
        device: of the tensors.
        prior_mean: of mean rewards.

    Attributes:
        counts: Dirichlet parameters, ``[n, states, actions, states]``; 1 before anything was seen.
        visits: of each pair, ``[n, states, actions]``.
        total: of the rewards of each pair, ``[n, states, actions]``.
    """

    def __init__(self, num: int, family: TabularMDP, device: torch.device, prior_mean: float = 1.0) -> None:
        self.prior_mean = prior_mean
        shape = (num, family.states, family.actions)
        self.counts = torch.ones(*shape, family.states, device=device)
        self.visits = torch.zeros(shape, device=device)
        self.total = torch.zeros(shape, device=device)
        self._row = torch.arange(num, device=device)

    def update(self, state: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> None:
        """Take in a transition of each MDP, ``[n]`` each."""
        at = (self._row, state, action)
        self.visits[at] += 1
        self.total[at] += reward
        self.counts[(*at, after)] += 1

    @property
    def reward(self) -> Tensor:
        """Posterior means of mean rewards, ``[n, states, actions]``."""
        return (self.prior_mean + self.total) / (1 + self.visits)

    @property
    def transition(self) -> Tensor:
        """Posterior means of transition probabilities, ``[n, states, actions, states]``."""
        return self.counts / self.counts.sum(-1, keepdim=True)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean rewards and transitions from the posterior."""
        normal = torch.randn(self.visits.shape, generator=generator, device=self.visits.device)
        with forked_rng(generator):
            transition = torch.distributions.Dirichlet(self.counts, validate_args=False).sample()
        return self.reward + normal * (1 + self.visits).rsqrt(), transition


class MDPBaseline(ABC):
    """A rule that plans.

    Attributes:
        plans_at_steps: plans again at each step, with what the episode has shown so far; else at its beginning alone.
        epsilon: probability of a random action.
    """

    plans_at_steps: bool = False
    epsilon: float = 0.0

    @abstractmethod
    def plan(self, belief: MDPBelief, horizon: int, generator: torch.Generator) -> Tensor:
        """Values of actions at the next ``horizon`` steps in each state, ``[horizon, n, states, actions]``."""


def backward(reward: Tensor, transition: Tensor, horizon: int) -> Tensor:
    """Optimal values of actions in a model, ``[horizon, n, states, actions]``."""
    values = torch.zeros_like(reward[..., 0])
    worth: list[Tensor] = []
    for _ in range(horizon):
        worth.insert(0, reward + (transition @ values[:, None, :, None]).squeeze(-1))
        values = worth[0].amax(-1)
    return torch.stack(worth)


def largest(worth: Tensor, generator: torch.Generator) -> Tensor:
    """The best action by the last dimension; of equal ones, such as those never tried, a random one."""
    equal = worth >= worth.amax(-1, keepdim=True) - 1e-6
    uniform = torch.rand(worth.shape, generator=generator, device=worth.device)
    return torch.where(equal, uniform, -1.0).argmax(-1)


@dataclass(frozen=True)
class RandomMDP(MDPBaseline):
    """Any action."""

    def plan(self, belief: MDPBelief, horizon: int, generator: torch.Generator) -> Tensor:
        """All the same."""
        return torch.zeros(horizon, *belief.visits.shape, device=belief.visits.device)


@dataclass(frozen=True)
class GreedyMDP(MDPBaseline):
    """Plans in the posterior mean.

    Args:
        plans_at_steps: at each step, or at the beginning of each episode alone.
    """

    plans_at_steps: bool = False

    def plan(self, belief: MDPBelief, horizon: int, generator: torch.Generator) -> Tensor:
        """In the posterior mean."""
        return backward(belief.reward, belief.transition, horizon)


@dataclass(frozen=True)
class EpsilonGreedyMDP(GreedyMDP):
    """Plans in the posterior mean, or with probability ``epsilon`` takes any action.

    Raises:
        OptionError: for a probability outside [0, 1].
    """

    epsilon: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise OptionError(f"epsilon={self.epsilon}; expected a probability in [0, 1].")


@dataclass(frozen=True)
class PSRL(MDPBaseline):
    """Posterior sampling: one model for an episode."""

    def plan(self, belief: MDPBelief, horizon: int, generator: torch.Generator) -> Tensor:
        """In a drawn model."""
        return backward(*belief.draw(generator), horizon)


@dataclass(frozen=True)
class OPSRL(MDPBaseline):
    """Optimistic posterior sampling: the largest value of several models.

    Args:
        draws: models.

    Raises:
        OptionError: for fewer than 1.
    """

    draws: int = 5

    def __post_init__(self) -> None:
        check_at_least(1, draws=self.draws)

    def plan(self, belief: MDPBelief, horizon: int, generator: torch.Generator) -> Tensor:
        """In several drawn models at once."""
        return torch.stack([backward(*belief.draw(generator), horizon) for _ in range(self.draws)]).amax(0)


@dataclass(frozen=True)
class BEB(MDPBaseline):
    """Bayesian exploration bonus.

    Args:
        scale: of the bonus, β in the paper.
        plans_at_steps: at each step, or at the beginning of each episode alone.

    Raises:
        OptionError: for a negative scale.
    """

    scale: float = 2.0
    plans_at_steps: bool = False

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def plan(self, belief: MDPBelief, horizon: int, generator: torch.Generator) -> Tensor:
        """In the posterior mean with bonuses."""
        bonus = self.scale / (2 + belief.visits)
        return backward(belief.reward + bonus, belief.transition, horizon)


@dataclass(frozen=True)
class UCRL2(MDPBaseline):
    """Optimism within confidence sets.

    Args:
        scale: multiplies the widths of the sets; 1 is the paper's.
        confidence: δ in the paper.
        plans_at_steps: at each step, or at the beginning of each episode alone.

    Raises:
        OptionError: for a negative scale, or a confidence outside (0, 1).
    """

    scale: float = 0.4
    confidence: float = 0.05
    plans_at_steps: bool = False

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not 0 < self.confidence < 1:
            raise OptionError(f"confidence={self.confidence}; expected a number in (0, 1).")

    def plan(self, belief: MDPBelief, horizon: int, generator: torch.Generator) -> Tensor:
        """Extended value iteration: at each step the transitions within the set that are best for the values after
        it.
        """
        states, actions = belief.visits.shape[1:]
        time = max(1.0, float(belief.visits[0].sum()))
        seen = belief.visits.clamp(min=1)
        reward_width = (7 / 2 * math.log(2 * states * actions * time / self.confidence) / seen).sqrt()
        width = (14 * states * math.log(2 * actions * time / self.confidence) / seen).sqrt()
        reward, transition = belief.reward + self.scale * reward_width, belief.transition
        values = torch.zeros_like(reward[..., 0])
        plan: list[Tensor] = []
        for _ in range(horizon):
            plan.insert(0, reward + _optimistic(transition, values, self.scale * width))
            values = plan[0].amax(-1)
        return torch.stack(plan)


def _optimistic(transition: Tensor, values: Tensor, width: Tensor) -> Tensor:
    """Largest Σ p′·values over distributions p′ within an L1 distance, ``[n, states, actions]``.

    Half the width moves onto the best state; it is taken from the worst states, one after the other.
    """
    order = values.argsort(-1)
    index = order[:, None, None, :].expand_as(transition)
    ordered = transition.gather(-1, index)  # from the worst state to the best
    worth = values.gather(-1, order)[:, None, None, :]
    moved = torch.minimum(width / 2, 1 - ordered[..., -1])[..., None]
    before = ordered[..., :-1].cumsum(-1) - ordered[..., :-1]
    taken = torch.minimum((moved - before).clamp(min=0), ordered[..., :-1])
    kept = torch.cat([ordered[..., :-1] - taken, ordered[..., -1:] + moved], -1)
    return (kept * worth).sum(-1)


def _check_scale(scale: float) -> None:
    if not 0 <= scale < math.inf:
        raise OptionError(f"scale={scale}; expected a finite number of at least 0.")


def play_mdps(
    baseline: MDPBaseline,
    family: TabularMDP,
    tasks: MDPTasks,
    *,
    episodes: int,
    prior_mean: float = 1.0,
    generator: Seed = None,
) -> Tensor:
    """Rewards of a baseline, one trial of each task.

    Args:
        baseline: whose policy is followed.
        family: of the MDPs.
        tasks: the MDPs, ``n`` of them.
        episodes: of a trial.
        prior_mean: of the prior of mean rewards; the family's is 1.
        generator: a seed or generator, on the tasks' device, for rewards, transitions and choices.

    Returns:
        Total reward of each episode, ``[episodes, n]``.

    Raises:
        OptionError: for fewer than 1 episode.
    """
    device, num = tasks.reward.device, len(tasks)
    generator = as_generator(generator, device, "play")
    env = family.vector(num, tasks=tasks, generator=generator, device=device, episodes_per_trial=episodes)
    state, _ = env.reset()
    row = torch.arange(num, device=device)
    belief, totals = MDPBelief(num, family, device, prior_mean), []
    for _ in range(episodes):
        total = torch.zeros(num, device=device)
        plan = baseline.plan(belief, family.horizon, generator)
        for step in range(family.horizon):
            if baseline.plans_at_steps and step:
                plan = baseline.plan(belief, family.horizon - step, generator)
            action = largest(plan[0 if baseline.plans_at_steps else step][row, state], generator)
            if baseline.epsilon:
                explores = torch.rand(num, generator=generator, device=device) < baseline.epsilon
                random = torch.randint(family.actions, (num,), generator=generator, device=device)
                action = torch.where(explores, random, action)
            after, reward, _, _, info = env.step(action)
            belief.update(state, action, reward, info["final_obs"])
            state, total = after, total + reward
        totals.append(total)
    return torch.stack(totals)
