"""Settings of MAESN by environment, as benchmarks and the command line take them.

Those of ``point-robot`` were chosen on its validation goals; the others are a start and were not tuned.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from bayesmeta.rl.maesn.config import MAESNConfig
from bayesmeta.rl.maesn.policy import LatentPolicy
from bayesmeta.rl.policies import GaussianHead, head_for
from bayesmeta.rl.protocols import TaskVectorEnv, num_features

LATENT = 2

#: The sparse point robot: inside, a step reads the sparse reward as a new task shows it; outside, the dense reward.
#: After 60 iterations from the tasks' own ω most tasks begin at the prior.
POINT_ROBOT = MAESNConfig(
    inner_lr=1.0,
    credit="share",
    natural=True,
    train_reward="dense_reward",
    kl_weight=0.06,
    omega_lr=0.3,
    prior_share=0.7,
    prior_after=60,
    adapted="mean",
    max_kl=0.05,
    cg_steps=6,
    curvature_share=0.1,
    curvature_episodes=3,
)

#: Of its actions: where the trust region is of means alone, noise that falls makes them slow to move.
POINT_ROBOT_MIN_STD = 0.075


def maesn_defaults(env: str) -> dict[str, Any]:
    """Settings of a run on an environment, by its name."""
    if env == "point-robot":
        return {"tasks": 80, "copies": 10, "units": 64, "iterations": 250, "inner_steps": 1, "inner_lr": 1.0}
    return {"tasks": 20, "copies": 20, "units": 64, "iterations": 100, "inner_steps": 1, "inner_lr": 1.0}


def maesn_config(env: str, inner_steps: int, inner_lr: float) -> MAESNConfig:
    """Settings of MAESN on an environment, by its name."""
    base = POINT_ROBOT if env == "point-robot" else MAESNConfig(curvature_share=0.2, curvature_episodes=5)
    return dataclasses.replace(base, inner_steps=inner_steps, inner_lr=inner_lr)


def latent_policy(
    env: TaskVectorEnv, units: int, *, latent: int = LATENT, std: float, seed: int, min_std: float = 1e-6
) -> LatentPolicy:
    """A policy with two hidden layers, which acts nearly alike in all states and under all latents to begin with.

    Args:
        env: whose states it reads and whose actions it takes.
        units: width of its layers.
        latent: numbers in z.
        std: first standard deviation of continuous actions.
        seed: of its weights.
        min_std: a floor of that, below which it counts as that.
    """
    from bayesmeta.models.nets import mlp

    head = head_for(env.single_action_space, log_std=math.log(std))
    if isinstance(head, GaussianHead):
        head.min_log_std = math.log(min_std)
    inputs = num_features(env.single_observation_space) + latent
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = mlp(inputs, [units, units], head.outputs, activation="tanh")
    for name, value in zip(("weight", "bias"), list(network.parameters())[-2:]):
        value.data.mul_(0.1 if name == "weight" else 0.0)
    return LatentPolicy(network, head, latent)
