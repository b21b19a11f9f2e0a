"""Bandit algorithms, for many bandits at once.

They know the family's prior, as a belief about each arm: Beta(1, 1) for Bernoulli arms with uniform means, and the
normal prior for Gaussian ones. Each gives every arm a score and pulls the largest; equal scores are broken at random.

- :class:`Random`.
- :class:`Greedy`: the posterior mean. :class:`EpsilonGreedy`: with probability ε a random arm instead.
- :class:`UCB1` (P. Auer, N. Cesa-Bianchi, P. Fischer, 2002, "Finite-time analysis of the multiarmed bandit problem",
Figure 1): mean + c·√(2 ln t / n). Departures: posterior means, and the prior's observations count in n (2 of a uniform
prior, 1 of a normal one), without which each arm would be pulled once to begin with, a bad policy when pulls are few; c
= 1 is the paper's. - :class:`ThompsonSampling` (W. R. Thompson, 1933): a draw from the posterior.
:class:`OptimisticThompsonSampling` (B. C. May, N. Korda, A. Lee, D. S. Leslie, 2012, "Optimistic Bayesian sampling in
contextual-bandit problems"): the larger of the draw and the mean. - :class:`Gittins`: the Gittins index
(:mod:`bayesmeta.rl.oracles.bandits`), of Bernoulli arms alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from bayesmeta.rl.envs.bandits import BanditTasks, BernoulliBandit, GaussianBandit
from bayesmeta.rl.oracles.bandits import finite_horizon_indices, gittins_indices


class Belief(ABC):
    """What is known of the arms of ``n`` bandits.

    Attributes:
        pulls: of each arm, ``[n, arms]``.
        prior_pulls: observations that the prior is worth.
    """

    prior_pulls: float

    def __init__(self, num: int, arms: int, device: torch.device) -> None:
        self.pulls = torch.zeros(num, arms, device=device)
        self.total = torch.zeros(num, arms, device=device)  # of rewards

    def update(self, arms: Tensor, rewards: Tensor) -> None:
        """Take in a pull of each bandit: ``[n]`` indices and ``[n]`` rewards."""
        self.pulls.scatter_add_(1, arms[:, None], torch.ones_like(rewards)[:, None])
        self.total.scatter_add_(1, arms[:, None], rewards[:, None])

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Posterior means of the arms' means, ``[n, arms]``."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """The arms' means from the posterior, ``[n, arms]``."""


class BetaBelief(Belief):
    """Of Bernoulli arms under a uniform prior."""

    prior_pulls = 2.0

    @property
    def mean(self) -> Tensor:
        """(1 + successes) / (2 + pulls)."""
        return (self.total + 1) / (self.pulls + 2)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Beta(1 + successes, 1 + failures)."""
        posterior = torch.distributions.Beta(self.total + 1, self.pulls - self.total + 1, validate_args=False)
        with forked_rng(generator):
            return posterior.sample()


class NormalBelief(Belief):
    """Of Gaussian arms with known noise under their normal prior.

    Args:
        num, arms, device: as of any belief.
        family: whose prior and noise it takes.

    Raises:
        UnsupportedError: for arms without noise or without a spread, of which nothing needs to be explored twice.
    """

    def __init__(self, num: int, arms: int, device: torch.device, family: GaussianBandit) -> None:
        super().__init__(num, arms, device)
        if family.noise == 0 or family.spread == 0:
            raise UnsupportedError(
                f"Gaussian arms with noise={family.noise} and spread={family.spread}; these baselines need both "
                "to be positive."
            )
        self.centre, self.noise = family.mean, family.noise
        self.prior_pulls = (family.noise / family.spread) ** 2

    @property
    def mean(self) -> Tensor:
        """The precision-weighted mean of prior and observations."""
        return (self.centre * self.prior_pulls + self.total) / (self.prior_pulls + self.pulls)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Normal, with variance noise² / (prior pulls + pulls)."""
        normal = torch.randn(self.pulls.shape, generator=generator, device=self.pulls.device)
        return self.mean + self.noise * (self.prior_pulls + self.pulls).rsqrt() * normal


class BanditBaseline(ABC):
    """A rule that scores arms; the largest score is pulled.

    Attributes:
        ties: of equal scores take a ``"random"`` arm or the ``"first"``.
    """

    ties: str = "random"

    @abstractmethod
    def scores(self, belief: Belief, step: int, horizon: int, generator: torch.Generator) -> Tensor:
        """Of each arm, ``[n, arms]``, after ``step`` of ``horizon`` pulls."""


@dataclass(frozen=True)
class Random(BanditBaseline):
    """Any arm."""

    def scores(self, belief: Belief, step: int, horizon: int, generator: torch.Generator) -> Tensor:
        """All the same."""
        return torch.zeros_like(belief.pulls)


@dataclass(frozen=True)
class Greedy(BanditBaseline):
    """The largest posterior mean.

    With ``ties="first"`` an arm is left only when its mean is *below* that of an arm never pulled, which explores less.
    RL²'s table agrees with that.

    Raises:
        OptionError: for ``ties`` that are neither "random" nor "first".
    """

    ties: str = "random"

    def __post_init__(self) -> None:
        if self.ties not in ("random", "first"):
            raise OptionError(f"ties={self.ties!r}; expected 'random' or 'first'.")

    def scores(self, belief: Belief, step: int, horizon: int, generator: torch.Generator) -> Tensor:
        """Posterior means."""
        return belief.mean


@dataclass(frozen=True)
class EpsilonGreedy(Greedy):
    """The largest posterior mean, or with probability ``epsilon`` any arm.

    Raises:
        OptionError: for a probability outside [0, 1], and ``ties`` as in :class:`Greedy`.
    """

    epsilon: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon <= 1:
            raise OptionError(f"epsilon={self.epsilon}; expected a probability in [0, 1].")

    def scores(self, belief: Belief, step: int, horizon: int, generator: torch.Generator) -> Tensor:
        """Posterior means, and random scores where a random arm is due."""
        device = belief.pulls.device
        explores = torch.rand(len(belief.pulls), 1, generator=generator, device=device) < self.epsilon
        return torch.where(explores, torch.rand(belief.pulls.shape, generator=generator, device=device), belief.mean)


@dataclass(frozen=True)
class UCB1(BanditBaseline):
    """Posterior mean and a bonus, ``scale``·√(2 ln t / n); see the head of this module.

    Raises:
        OptionError: for a negative scale.
    """

    scale: float = 0.2

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise OptionError(f"scale={self.scale}; expected a number of at least 0.")

    def scores(self, belief: Belief, step: int, horizon: int, generator: torch.Generator) -> Tensor:
        """The upper ends."""
        return (
            belief.mean + self.scale * math.sqrt(2 * math.log(step + 1)) * (belief.prior_pulls + belief.pulls).rsqrt()
        )


@dataclass(frozen=True)
class ThompsonSampling(BanditBaseline):
    """A draw from the posterior."""

    def scores(self, belief: Belief, step: int, horizon: int, generator: torch.Generator) -> Tensor:
        """The drawn means."""
        return belief.draw(generator)


@dataclass(frozen=True)
class OptimisticThompsonSampling(BanditBaseline):
    """A draw from the posterior, or its mean if that is larger."""

    def scores(self, belief: Belief, step: int, horizon: int, generator: torch.Generator) -> Tensor:
        """The drawn means, raised to the mean."""
        return torch.maximum(belief.draw(generator), belief.mean)


@dataclass(frozen=True)
class Gittins(BanditBaseline):
    """The largest Gittins index, of Bernoulli arms.

    Args:
        discount: γ of the index; None takes the indices for the pulls that are left, without discounting (slow and
            large beyond a few hundred pulls).

    Raises:
        OptionError: for a discount outside (0, 1).
        UnsupportedError: at the first pull, of arms that are not Bernoulli.
    """

    discount: float | None = None

    def __post_init__(self) -> None:
        if self.discount is not None and not 0 < self.discount < 1:
            raise OptionError(f"discount={self.discount}; expected a number in (0, 1), or None.")

    def scores(self, belief: Belief, step: int, horizon: int, generator: torch.Generator) -> Tensor:
        """The indices."""
        if not isinstance(belief, BetaBelief):
            raise UnsupportedError(
                "Gittins indices are of Bernoulli arms; take ThompsonSampling or UCB1 for Gaussian ones."
            )
        if self.discount is None:
            table = finite_horizon_indices(horizon)[horizon - step]
        else:
            table = gittins_indices(self.discount, horizon)
        won, lost = belief.total.long(), (belief.pulls - belief.total).long()
        return table.to(won.device)[won, lost].to(belief.total.dtype)


def play_bandits(
    baseline: BanditBaseline,
    family: BernoulliBandit | GaussianBandit,
    tasks: BanditTasks,
    *,
    generator: Seed = None,
) -> Tensor:
    """Rewards of a baseline, one trial of each task.

    Args:
        baseline: whose policy is followed.
        family: of the bandits.
        tasks: the bandits, ``n`` of them.
        generator: a seed or generator, on the tasks' device, for rewards and choices.

    Returns:
        ``[horizon, n]``.
    """
    device = tasks.mean.device
    generator = as_generator(generator, device, "play")
    env = family.vector(len(tasks), tasks=tasks, generator=generator, device=device)
    env.reset()
    belief: Belief
    if isinstance(family, GaussianBandit):
        belief = NormalBelief(len(tasks), family.arms, device, family)
    else:
        belief = BetaBelief(len(tasks), family.arms, device)
    rewards = []
    for step in range(family.horizon):
        arms = _largest(baseline.scores(belief, step, family.horizon, generator), baseline.ties, generator)
        _, reward, *_ = env.step(arms)
        belief.update(arms, reward)
        rewards.append(reward)
    return torch.stack(rewards)


def _largest(scores: Tensor, ties: str, generator: torch.Generator) -> Tensor:
    """Index of the largest score in each row; of equal ones the first, or a random one."""
    equal = scores >= scores.amax(-1, keepdim=True)
    if ties == "first":
        return equal.int().argmax(-1)
    return torch.where(equal, torch.rand(scores.shape, generator=generator, device=scores.device), -1.0).argmax(-1)
