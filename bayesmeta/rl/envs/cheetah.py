"""Half-cheetah that runs in a direction or at a speed (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section
5.3).

Functions from a task to an environment, for :class:`~bayesmeta.rl.envs.gym.GymVectorEnv`; they need the extra
``mujoco``. The reward is that of gymnasium's HalfCheetah-v5 with its forward part replaced: by the velocity in the
task's direction, ±1, or by minus the distance of the velocity from the task's, which the paper draws from U(0, 2)
(PEARL from U(0, 3)). The control cost is gymnasium's, 0.1 of the squared action (the papers': 0.05 and more). Episodes
last 200 steps.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import torch
from torch import Tensor

from bayesmeta.errors import UnsupportedError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import check_at_least, check_split

HORIZON = 200


class VelocityReward(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Replaces the forward reward of an environment whose ``info`` has ``x_velocity`` and ``reward_ctrl``.

    Args:
        env: the environment.
        direction: ±1, rewarded for velocity in it; None without.
        velocity: rewarded for being near it; None without.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], *, direction: float | None = None, velocity: float | None = None
    ) -> None:
        super().__init__(env)
        assert (direction is None) != (velocity is None)
        self.direction, self.velocity = direction, velocity

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step, with the task's reward."""
        observation, _, terminated, truncated, info = self.env.step(action)
        speed = float(info["x_velocity"])
        if self.direction is not None:
            reward = self.direction * speed
        else:
            reward = -abs(speed - float(self.velocity or 0.0))
        return observation, reward + float(info["reward_ctrl"]), terminated, truncated, info


def cheetah_direction(direction: float) -> gymnasium.Env[Any, Any]:
    """Half-cheetah that is to run forward (1) or backward (−1).

    Raises:
        UnsupportedError: without the extra ``mujoco``.
    """
    return VelocityReward(_cheetah(), direction=float(direction))


def cheetah_velocity(velocity: float) -> gymnasium.Env[Any, Any]:
    """Half-cheetah that is to run at a velocity, in metres a second.

    Raises:
        UnsupportedError: without the extra ``mujoco``.
    """
    return VelocityReward(_cheetah(), velocity=float(velocity))


def sample_velocities(num_tasks: int, *, highest: float = 2.0, generator: Seed = None, split: str = "train") -> Tensor:
    """Velocities ~ U(0, ``highest``), ``[num_tasks]``; a seed gives other tasks to each split.

    Raises:
        OptionError: for fewer than 1, or an unknown split.
    """
    check_at_least(1, num_tasks=num_tasks)
    check_split(split)
    return highest * torch.rand(num_tasks, generator=as_generator(generator, stream=f"tasks {split}"))


def _cheetah() -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make("HalfCheetah-v5", max_episode_steps=HORIZON)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise UnsupportedError("half-cheetah needs MuJoCo; install bayesmeta[mujoco].") from error
