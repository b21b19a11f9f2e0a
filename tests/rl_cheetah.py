"""A runner with a cheetah's spaces and tasks, which needs no MuJoCo."""

import dataclasses

import gymnasium
import numpy as np

import bayesmeta as bm
from bayesmeta.rl.envs.cheetah import VelocityReward
from bayesmeta.rl.setups import ENVIRONMENTS
from bayesmeta.rl.setups_cheetah import FORWARD

HORIZON = 10


class Runner(gymnasium.Env):
    """A point with a cheetah's spaces, whose velocity follows the mean of the actions."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (17,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)
    horizon = HORIZON

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock, self.velocity = 0, float(self.np_random.normal())
        return self._seen(), {}

    def step(self, action):
        self.velocity = 0.5 * self.velocity + 2 * float(np.mean(action))
        self.clock += 1
        cost = -0.1 * float(np.square(action).sum())
        return self._seen(), 0.0, False, self.clock >= HORIZON, {"x_velocity": self.velocity, "reward_ctrl": cost}

    def _seen(self):
        return np.eye(17)[FORWARD] * self.velocity


def runners(kind):
    def make(task):
        return VelocityReward(Runner(), **{kind: task})

    def give(env, task):
        setattr(env, kind, task)

    if kind == "direction":
        return bm.rl.GymFamily(make, [1.0, -1.0], name="half-cheetah-direction", set_task=give)
    return bm.rl.GymFamily.uniform(make, 0.0, 2.0, name="half-cheetah-velocity", set_task=give)


def pretend(monkeypatch, kind):
    name = f"half-cheetah-{kind}"
    replaced = dataclasses.replace(ENVIRONMENTS[name], family=lambda horizon=None: runners(kind))
    monkeypatch.setitem(ENVIRONMENTS, name, replaced)
