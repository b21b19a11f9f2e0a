"""MAESN on the sparse point robot: its settings are those of :mod:`bayesmeta.rl.maesn.setups`.

Meta-training gives every training goal variational parameters of its own. Inside, a step reads the sparse reward as a
new task shows it; outside, the dense reward is read. At test time there is no task's own parameter: a trial begins at
the prior, draws a latent for each episode until one has brought a reward, and is then played at the mean of the adapted
Gaussian (:mod:`bayesmeta.rl.maesn.trials`). ``maesn_after_K`` is the return of the episode that follows K others.

Settings were chosen on validation goals. Returns there after 0, 1, 2, 5 and 10 episodes:

- noise of the actions that may fall below 0.03: 1.6, 2.9, 3.8, 5.7, 7.6 (seed 0, 67 s of CPU); a floor of 0.075: 1.5,
  2.7, 3.7, 6.2, 8.2. Without an iteration that begins at the prior (seed 0, 15 s): 1.3, 2.2, 3.1, 4.9, 6.7.
- The sparse reward outside too, after 200 iterations or more with the dense one: from 8.2 to 8.5 after 10 on seed 0,
  from 8.5 to 8.0 on seed 1. It is left out. So is what episodes of the prior bring themselves, as a part of the outer
  objective (8.3 against 8.1: noise).

What is left: the prior hits a goal in 15% to 18% of its episodes, and learns nothing from those that miss.
"""

from __future__ import annotations

from typing import Any

from bayesmeta.rl.envs import TensorVectorEnv
from bayesmeta.rl.maesn.learner import MAESN
from bayesmeta.rl.maesn.setups import POINT_ROBOT, POINT_ROBOT_MIN_STD, latent_policy

#: Of a full training, and of a quick one.
ITERATIONS, QUICK = 250, 2
COPIES, UNITS = 10, 64


def maesn(env: Any, iterations: int, seed: int) -> MAESN:
    """An untrained learner on all training goals.

    Args:
        env: of the training goals, all of them.
        iterations: not read: none of the settings depends on it.
        seed: of latents, actions and first weights.
    """
    goals = env.tasks
    episodes = TensorVectorEnv(env.family, len(goals), copies=COPIES, tasks=goals, generator=seed)
    policy = latent_policy(episodes, UNITS, std=0.1, seed=seed, min_std=POINT_ROBOT_MIN_STD)
    return MAESN(episodes, policy, POINT_ROBOT, tasks=goals, seed=seed)
