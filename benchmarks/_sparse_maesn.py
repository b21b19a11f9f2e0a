"""MAESN on the sparse point robot: its settings are those of :mod:`bayesmeta.rl.maesn_setups`.

Meta-training gives every training goal variational parameters of its own and reads the dense reward outside and the
sparse one inside. At test time there is no task's own parameter: a trial begins at the prior, draws a latent for each
episode until one has brought a reward, and is then played at the mean of the adapted Gaussian
(:mod:`bayesmeta.rl.maesn_trials`). ``maesn_after_K`` is the return of the episode that follows K others.
"""

from __future__ import annotations

from typing import Any

from bayesmeta.rl.envs import TensorVectorEnv
from bayesmeta.rl.maesn import MAESN
from bayesmeta.rl.maesn_setups import POINT_ROBOT, latent_policy

#: Of a full training, and of a quick one.
ITERATIONS, QUICK = 300, 2
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
    policy = latent_policy(episodes, UNITS, std=0.1, seed=seed)
    return MAESN(episodes, policy, POINT_ROBOT, tasks=goals, seed=seed)
