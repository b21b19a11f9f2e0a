"""Random tabular MDPs (Osband et al. 2013, https://arxiv.org/abs/1306.0940; RL²'s setting: Duan et al. 2016,
https://arxiv.org/abs/1611.02779, section 3.2).

Rewards of a state and action are normal with a mean drawn from N(1, 1) and variance 1, transitions are drawn from a
flat Dirichlet distribution; 10 states, 5 actions, episodes of 10 steps that begin in state 0. The end of the horizon is
part of the problem, and so *terminates*. The observation is the state's index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import Family, Noise, check_at_least, check_split
from bayesmeta.rl.envs.plain import Numbers, PlainEnv
from bayesmeta.rl.protocols import Tensors


@dataclass(frozen=True)
class MDPTasks(Tensors):
    """Mean rewards ``reward`` ``[tasks, states, actions]`` and transition probabilities ``transition`` ``[tasks,
    states, actions, states]``.
    """

    reward: Tensor
    transition: Tensor

    @cached_property
    def cumulative(self) -> Tensor:
        """Cumulative transition probabilities, ``[tasks × states × actions, states − 1]``; computed once."""
        return self.transition.cumsum(-1)[..., :-1].flatten(0, 2)


@dataclass(frozen=True)
class MDPState(Tensors):
    """The index of the state, ``[n]`` int64."""

    index: Tensor


@dataclass(frozen=True)
class TabularMDP(Family[MDPTasks, MDPState]):
    """Random MDPs with a few states and actions.

    Args:
        states: states.
        actions: actions.
        horizon: steps of an episode.

    Raises:
        OptionError: for numbers below 1.
    """

    states: int = 10
    actions: int = 5
    horizon: int = 10

    name = "tabular_mdp"
    horizon_terminates = True
    task_type = MDPTasks
    state_type = MDPState

    def __post_init__(self) -> None:
        check_at_least(1, states=self.states, actions=self.actions, horizon=self.horizon)

    @property
    def observation_space(self) -> gymnasium.spaces.Discrete:
        """The state."""
        return gymnasium.spaces.Discrete(self.states)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        """The action."""
        return gymnasium.spaces.Discrete(self.actions)

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> MDPTasks:
        """Draw MDPs; a seed gives other tasks to each split."""
        check_split(split)
        generator = as_generator(generator, stream=f"tasks {split}")
        shape = (num_tasks, self.states, self.actions)
        reward = 1.0 + torch.randn(shape, generator=generator, device=generator.device)
        # A flat Dirichlet draw is a vector of exponential numbers over its sum.
        weight = torch.empty(*shape, self.states, device=generator.device).exponential_(generator=generator)
        return MDPTasks(reward, weight / weight.sum(-1, keepdim=True))

    def initial(self, tasks: MDPTasks, noise: Noise) -> MDPState:
        """State 0."""
        return MDPState(torch.zeros(len(tasks), dtype=torch.int64, device=tasks.reward.device))

    def step_noise(self, num: int, generator: torch.Generator, dtype: torch.dtype) -> Noise:
        """Standard normal numbers for rewards and uniform ones for transitions, ``[num]`` each."""
        normal = torch.randn(num, generator=generator, dtype=dtype, device=generator.device)
        return normal, torch.rand(num, generator=generator, dtype=dtype, device=generator.device)

    def advance(
        self, tasks: MDPTasks, state: MDPState, actions: Tensor, noise: Noise
    ) -> tuple[MDPState, Tensor, None, dict[str, Tensor]]:
        """The next state is the first whose cumulative probability exceeds the uniform number."""
        row = torch.arange(len(actions), device=actions.device)
        pair = torch.add(actions, torch.add(state.index, row, alpha=self.states), alpha=self.actions)
        passed = tasks.cumulative.index_select(0, pair).le_(noise[1][:, None])  # faster in place than as booleans
        return MDPState(passed.sum(-1).long()), tasks.reward.reshape(-1).index_select(0, pair).add_(noise[0]), None, {}

    def observe(self, tasks: MDPTasks, state: MDPState) -> Tensor:
        """The state's index, ``[n]``."""
        return state.index.clone()

    def plain(self, **options: Any) -> TabularMDPEnv:
        """As one plain gymnasium environment."""
        return TabularMDPEnv(self, **options)


class TabularMDPEnv(PlainEnv):
    """A tabular MDP as a plain gymnasium environment; see :class:`TabularMDP`."""

    def __init__(self, family: TabularMDP | None = None, **options: Any) -> None:
        super().__init__(family or TabularMDP(), **options)

    def _prepare(self) -> None:
        assert self.task is not None
        self.cumulative = np.cumsum(self.task["transition"], -1)

    def _initial(self, noise: Numbers) -> None:
        self.index = 0

    def _step_noise(self, rng: np.random.Generator) -> Numbers:
        return rng.standard_normal(), rng.random()

    def _advance(self, action: int, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        assert self.task is not None
        reward = float(self.task["reward"][self.index, action]) + float(noise[0])
        reached = np.searchsorted(self.cumulative[self.index, action], noise[1], side="right")
        self.index = min(int(reached), len(self.cumulative) - 1)
        return reward, False, {}

    def _observe(self) -> int:
        return self.index

    def _state(self) -> dict[str, Tensor]:
        return {"index": torch.tensor([self.index])}
