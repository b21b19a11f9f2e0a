"""Bandits: Bernoulli arms (Duan et al. 2016, RL², https://arxiv.org/abs/1611.02779, section 3.1) and Gaussian ones.

A task is the arms' means, an episode the n pulls that the agent has; a trial is one episode. There is nothing to see
but the
rewards: the observation is constant. The end of the n pulls is part of the problem, and so *terminates*.
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
from bayesmeta.rl.envs.family import Family, Noise, check_at_least, check_split
from bayesmeta.rl.envs.plain import Numbers, PlainEnv
from bayesmeta.rl.protocols import Tensors


@dataclass(frozen=True)
class BanditTasks(Tensors):
    """Means of the arms, ``[tasks, arms]``."""

    mean: Tensor


@dataclass(frozen=True)
class BanditState(Tensors):
    """Nothing but zeros ``[n]``: what an agent sees."""

    nothing: Tensor


@dataclass(frozen=True)
class _Bandit(Family[BanditTasks, BanditState]):
    arms: int = 5
    horizon: int = 10

    horizon_terminates = True
    task_type = BanditTasks
    state_type = BanditState

    def __post_init__(self) -> None:
        check_at_least(1, arms=self.arms, horizon=self.horizon)

    @property
    def observation_space(self) -> gymnasium.spaces.Discrete:
        """One observation, 0."""
        return gymnasium.spaces.Discrete(1)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        """The arm to pull."""
        return gymnasium.spaces.Discrete(self.arms)

    def initial(self, tasks: BanditTasks, noise: Noise) -> BanditState:
        """There is one state."""
        return BanditState(torch.zeros(len(tasks), dtype=torch.int64, device=tasks.mean.device))

    def observe(self, tasks: BanditTasks, state: BanditState) -> Tensor:
        """Zeros, ``[n]``."""
        return state.nothing.clone()

    def _pulled(self, tasks: BanditTasks, actions: Tensor) -> Tensor:
        return tasks.mean.gather(1, actions[:, None]).squeeze(1)


@dataclass(frozen=True)
class BernoulliBandit(_Bandit):
    """Bernoulli arms with means p ~ U(0, 1); reward 1 with probability p, else 0.

    Args:
        arms: arms (k in the paper).
        horizon: pulls (n in the paper).

    Raises:
        OptionError: for numbers below 1.
    """

    name = "bernoulli_bandit"

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> BanditTasks:
        """Means ``[num_tasks, arms]``; a seed gives other tasks to each split."""
        check_split(split)
        generator = as_generator(generator, stream=f"tasks {split}")
        return BanditTasks(torch.rand(num_tasks, self.arms, generator=generator, device=generator.device))

    def step_noise(self, num: int, generator: torch.Generator, dtype: torch.dtype) -> Noise:
        """Uniform numbers ``[num]``."""
        return (torch.rand(num, generator=generator, dtype=dtype, device=generator.device),)

    def advance(
        self, tasks: BanditTasks, state: BanditState, actions: Tensor, noise: Noise
    ) -> tuple[BanditState, Tensor, None, dict[str, Tensor]]:
        """The reward is whether the uniform number is below the arm's mean."""
        return state, (noise[0] < self._pulled(tasks, actions)).to(noise[0].dtype), None, {}

    def plain(self, **options: Any) -> BernoulliBanditEnv:
        """As one plain gymnasium environment."""
        return BernoulliBanditEnv(self, **options)


@dataclass(frozen=True)
class GaussianBandit(_Bandit):
    """Gaussian arms with means ~ N(``mean``, ``spread``²); the reward has standard deviation ``noise``.

    Args:
        arms: arms.
        horizon: pulls.
        mean: of the arms' means.
        spread: standard deviation of the arms' means.
        noise: standard deviation of a reward.

    Raises:
        OptionError: for numbers of arms or pulls below 1, and standard deviations that are negative or not finite.
    """

    mean: float = 0.0
    spread: float = 1.0
    noise: float = 1.0
    name = "gaussian_bandit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.mean) and 0 <= self.spread < math.inf and 0 <= self.noise < math.inf):
            raise OptionError(
                f"mean={self.mean}, spread={self.spread}, noise={self.noise}; expected finite numbers, the last two "
                "at least 0."
            )

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> BanditTasks:
        """Means ``[num_tasks, arms]``; a seed gives other tasks to each split."""
        check_split(split)
        generator = as_generator(generator, stream=f"tasks {split}")
        normal = torch.randn(num_tasks, self.arms, generator=generator, device=generator.device)
        return BanditTasks(self.mean + self.spread * normal)

    def step_noise(self, num: int, generator: torch.Generator, dtype: torch.dtype) -> Noise:
        """Standard normal numbers ``[num]``."""
        return (torch.randn(num, generator=generator, dtype=dtype, device=generator.device),)

    def advance(
        self, tasks: BanditTasks, state: BanditState, actions: Tensor, noise: Noise
    ) -> tuple[BanditState, Tensor, None, dict[str, Tensor]]:
        """The arm's mean and noise."""
        return state, torch.add(self._pulled(tasks, actions), noise[0], alpha=self.noise), None, {}

    def plain(self, **options: Any) -> GaussianBanditEnv:
        """As one plain gymnasium environment."""
        return GaussianBanditEnv(self, **options)


class _BanditEnv(PlainEnv):
    def _prepare(self) -> None:
        assert self.task is not None
        self.means = [float(mean) for mean in self.task["mean"]]

    def _initial(self, noise: Numbers) -> None:
        pass

    def _observe(self) -> int:
        return 0

    def _state(self) -> dict[str, Tensor]:
        return {"nothing": torch.zeros(1, dtype=torch.int64)}


class BernoulliBanditEnv(_BanditEnv):
    """A Bernoulli bandit as a plain gymnasium environment; see :class:`BernoulliBandit`."""

    def __init__(self, family: BernoulliBandit | None = None, **options: Any) -> None:
        super().__init__(family or BernoulliBandit(), **options)

    def _step_noise(self, rng: np.random.Generator) -> Numbers:
        return (rng.random(),)

    def _advance(self, action: int, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        return float(noise[0] < self.means[action]), False, {}


class GaussianBanditEnv(_BanditEnv):
    """A Gaussian bandit as a plain gymnasium environment; see :class:`GaussianBandit`."""

    def __init__(self, family: GaussianBandit | None = None, **options: Any) -> None:
        super().__init__(family or GaussianBandit(), **options)
        self.scale = self.family.noise  # type: ignore[attr-defined]

    def _step_noise(self, rng: np.random.Generator) -> Numbers:
        return (rng.standard_normal(),)

    def _advance(self, action: int, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        return self.means[action] + self.scale * float(noise[0]), False, {}
