"""Small families with continuous actions whose answers are known, for the tests of off-policy learners."""

import math
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from torch import Tensor

from bayesmeta.rl.envs.family import Family
from bayesmeta.rl.protocols import Tensors


@dataclass(frozen=True)
class Numbers(Tensors):
    """One number of each task: where the best action is."""

    best: Tensor


@dataclass(frozen=True)
class Still(Tensors):
    """A state that never changes, ``[n, 1]``."""

    position: Tensor


@dataclass(frozen=True)
class Constant(Family):
    """A reward of 1 in every step, and a time limit: the value is 1 / (1 − γ) everywhere."""

    horizon: int = 5
    name = "constant"
    task_type = Numbers
    state_type = Still

    @property
    def observation_space(self):
        return gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    @property
    def action_space(self):
        return gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def sample_tasks(self, num_tasks, *, generator=None, split="train"):
        return Numbers(torch.linspace(-0.5, 0.5, num_tasks))

    def initial(self, tasks, noise):
        return Still(torch.zeros(len(tasks), 1))

    def observe(self, tasks, state):
        return state.position.clone()

    def advance(self, tasks, state, actions, noise):
        return state, torch.ones(len(actions)), None, {}

    def plain(self, **options):
        raise NotImplementedError


@dataclass(frozen=True)
class Parabola(Constant):
    """One step, whose reward is −4 (a / 2 − best)² with a in [−2, 2]."""

    horizon: int = 1
    name = "parabola"
    horizon_terminates = True

    def advance(self, tasks, state, actions, noise):
        return state, -4 * (actions.squeeze(-1) / 2 - tasks.best).square(), None, {}


@dataclass(frozen=True)
class Coin(Constant):
    """An episode ends with probability 0.3 in each step; the reward is the action."""

    horizon: int = 6
    name = "coin"
    fixed_length = False

    def step_noise(self, num, generator, dtype):
        return (torch.rand(num, generator=generator, dtype=dtype),)

    def advance(self, tasks, state, actions, noise):
        return state, actions.squeeze(-1), noise[0] < 0.3, {}


@dataclass(frozen=True)
class Swing(Tensors):
    """Angle and angular velocity of pendulums, ``[n]`` each."""

    angle: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class Pendulum(Family):
    """gymnasium's Pendulum-v1 as tensors."""

    horizon: int = 200
    name = "pendulum"
    task_type = Numbers
    state_type = Swing

    @property
    def observation_space(self):
        high = np.array([1.0, 1.0, 8.0], np.float32)
        return gymnasium.spaces.Box(-high, high, dtype=np.float32)

    @property
    def action_space(self):
        return gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def sample_tasks(self, num_tasks, *, generator=None, split="train"):
        return Numbers(torch.zeros(num_tasks))

    def reset_noise(self, num, generator, dtype):
        return (2 * torch.rand(num, 2, generator=generator, dtype=dtype) - 1,)

    def initial(self, tasks, noise):
        return Swing(math.pi * noise[0][:, 0], noise[0][:, 1])

    def observe(self, tasks, state):
        return torch.stack([state.angle.cos(), state.angle.sin(), state.velocity], -1)

    def advance(self, tasks, state, actions, noise):
        u = actions.squeeze(-1).clamp(-2.0, 2.0)
        angle = (state.angle + math.pi) % (2 * math.pi) - math.pi
        cost = angle**2 + 0.1 * state.velocity**2 + 0.001 * u**2
        velocity = (state.velocity + (15.0 * state.angle.sin() + 3.0 * u) * 0.05).clamp(-8.0, 8.0)
        return Swing(state.angle + 0.05 * velocity, velocity), -cost, None, {}

    def plain(self, **options):
        raise NotImplementedError
