"""Half-cheetah that runs in a direction or at a speed (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section
5.3).

Families of gymnasium environments, and the functions from a task to an environment that they are made of; they need
the extra ``mujoco``. The reward is that of gymnasium's HalfCheetah-v5 with its forward part replaced: by the velocity
in the task's direction, ±1, or by minus the distance of the velocity from the task's, which the paper draws from
U(0, 2) (PEARL from U(0, 3)). The control cost is gymnasium's, 0.1 of the squared action (the papers': 0.05 and more).
Episodes last 200 steps.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import gymnasium
import numpy as np

from bayesmeta.errors import UnsupportedError
from bayesmeta.rl.envs.family import check_at_least
from bayesmeta.rl.envs.gym_family import GymFamily

HORIZON = 200
#: Of the squared action.
CONTROL_COST = 0.1


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
        reward = self.rewarded(float(info["x_velocity"])) + float(info["reward_ctrl"])
        return observation, reward, terminated, truncated, info

    def rewarded(self, speed: float) -> float:
        """The forward part of the reward, for a velocity."""
        if self.direction is not None:
            return self.direction * speed
        return -abs(speed - float(self.velocity or 0.0))


class SwiftCheetah(VelocityReward):
    """The same for gymnasium's half-cheetah, which it steps itself: MuJoCo, the reward and the observation alone.

    What is left out is the layers of wrappers, the infos and forces that nothing reads: some fifth to a half of the
    time. A test holds steps and rewards equal to those of :class:`VelocityReward`.

    Args:
        env: gymnasium's ``HalfCheetah-v5``, under a time limit.
        horizon: the time limit.
        task: ``direction`` or ``velocity``.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], horizon: int, **task: float) -> None:
        super().__init__(env, **task)
        self._horizon, self._clock, self._inner = horizon, 0, cast(Any, env.unwrapped)
        self._step = importlib.import_module("mujoco").mj_step

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self._clock = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step, with the task's reward; nothing is told beside it."""
        data, model, skipped = self._inner.data, self._inner.model, self._inner.frame_skip
        before = data.qpos[0]
        data.ctrl[:] = action
        self._step(model, data, nstep=skipped)
        speed = float(data.qpos[0] - before) / (model.opt.timestep * skipped)
        reward = self.rewarded(speed) - float(CONTROL_COST * np.square(action).sum())
        self._clock += 1
        seen = np.concatenate((data.qpos[1:], data.qvel))
        return seen, reward, False, self._clock >= self._horizon, {}


def cheetah_direction(
    direction: float, *, horizon: int = HORIZON, render_mode: str | None = None
) -> gymnasium.Env[Any, Any]:
    """Half-cheetah that is to run forward (1) or backward (−1).

    Raises:
        UnsupportedError: without the extra ``mujoco``.
    """
    return SwiftCheetah(_cheetah(horizon, render_mode), horizon, direction=float(direction))


def cheetah_velocity(
    velocity: float, *, horizon: int = HORIZON, render_mode: str | None = None
) -> gymnasium.Env[Any, Any]:
    """Half-cheetah that is to run at a velocity, in metres a second.

    Raises:
        UnsupportedError: without the extra ``mujoco``.
    """
    return SwiftCheetah(_cheetah(horizon, render_mode), horizon, velocity=float(velocity))


def cheetah_directions(*, horizon: int = HORIZON) -> GymFamily[float]:
    """The family of both directions; held-out tasks are the same two.

    Raises:
        UnsupportedError: without the extra ``mujoco``.
    """

    def set_direction(env: Any, direction: float) -> None:
        env.direction = float(direction)

    make = partial(cheetah_direction, horizon=horizon)
    return GymFamily(make, [1.0, -1.0], name="half-cheetah-direction", set_task=set_direction)


def cheetah_velocities(*, horizon: int = HORIZON, highest: float = 2.0) -> GymFamily[float]:
    """The family of velocities ~ U(0, ``highest``).

    Raises:
        UnsupportedError: without the extra ``mujoco``.
    """

    def set_velocity(env: Any, velocity: float) -> None:
        env.velocity = float(velocity)

    make = partial(cheetah_velocity, horizon=horizon)
    return GymFamily.uniform(make, 0.0, highest, name="half-cheetah-velocity", set_task=set_velocity)


def _cheetah(horizon: int, render_mode: str | None) -> gymnasium.Env[Any, Any]:
    check_at_least(1, horizon=horizon)
    try:
        with _quiet():
            return gymnasium.make(
                "HalfCheetah-v5", max_episode_steps=horizon, render_mode=render_mode, ctrl_cost_weight=CONTROL_COST
            )
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        reason = error.__cause__ or error
        raise UnsupportedError(f"half-cheetah needs MuJoCo; install bayesmeta[mujoco]. ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MuJoCo's word, on the screen and in a file of the working folder, that gymnasium's model file is old."""
    mujoco = importlib.import_module("mujoco")
    before = mujoco.get_mju_user_warning()
    told: list[str] = []
    mujoco.set_mju_user_warning(told.append)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
    for message in told:
        if "deprecated" not in message:
            warnings.warn(message, stacklevel=3)
