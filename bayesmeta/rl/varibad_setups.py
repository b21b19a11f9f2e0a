"""VariBAD's settings by family of environments, as benchmarks and the command line take them.

Those of the grid were chosen on training seeds (``python -m benchmarks.grid``); the general ones are a start and were
not tuned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.ppo import PPOConfig
from bayesmeta.rl.varibad import BeliefConfig, VariBAD
from bayesmeta.rl.varibad_decoder import LinearDecoder
from bayesmeta.rl.varibad_policy import BeliefPolicy


@dataclasses.dataclass(frozen=True)
class OneHotCells:
    """A grid's cells (column, row) ``[…, 2]`` as one-hot ``[…, cells²]``, column by column.

    Args:
        cells: of a side.
    """

    cells: int

    def __call__(self, cell: Tensor) -> Tensor:
        """One-hot cells, of the cells' dtype."""
        index = (cell[..., 0] * self.cells + cell[..., 1]).long()
        return torch.nn.functional.one_hot(index, self.cells**2).to(cell.dtype)


def varibad_for(
    env: Any,
    *,
    iterations: int,
    seed: int = 0,
    units: int = 64,
    steps: int | None = None,
    reward_shift: float = 0.0,
    reward_scale: float = 1.0,
    log_std: float = 0.0,
) -> VariBAD:
    """VariBAD with the settings of an environment's family.

    Args:
        env: to train on, of a family (:class:`~bayesmeta.rl.envs.TensorVectorEnv`).
        iterations: rollouts to train for.
        seed: of first weights, actions and draws.
        units: width of the policy's hidden layers.
        steps: of each rollout; None: one trial.
        reward_shift, reward_scale, log_std: of contexts and first actions, for families without settings of their own.
    """
    if env.family.name == "grid":
        return grid_varibad(env, iterations=iterations, seed=seed, units=units)
    spec = ContextSpec.of(
        env, inputs=("state", "action", "successor"), reward_shift=reward_shift, reward_scale=reward_scale
    )
    return VariBAD(env, spec=spec, iterations=iterations, seed=seed, units=units, steps=steps, log_std=log_std)


def grid_varibad(
    env: Any,
    *,
    iterations: int,
    seed: int = 0,
    units: int = 64,
    latent: int = 24,
    encoder: str = "product",
    kl_weight: float = 0.1,
    config: PPOConfig | None = None,
    beliefs: BeliefConfig | None = None,
) -> VariBAD:
    """For the grid: one-hot cells, and a reward decoder with one output a cell, as in Zintgraf et al. 2020.

    Rewards are read as 1 on the goal and 0 elsewhere. The latent has about one number for each cell that can be the
    goal: with 5, as in the paper, beliefs learned far more slowly.

    Args:
        env: of a :class:`~bayesmeta.rl.Grid`.
        iterations, seed, units: as in :func:`varibad_for`.
        latent, encoder, kl_weight: of the latent context.
        config, beliefs: settings of PPO, and of encoder and decoder.
    """
    family = env.family
    spec = ContextSpec.of(
        env,
        inputs=("successor",),
        reward_shift=family.other_reward,
        reward_scale=family.goal_reward - family.other_reward,
        binary=True,
        encode=OneHotCells(family.cells),
        encoded=family.cells**2,
    )
    config = GRID_PPO if config is None else config
    core = LatentContext.make(spec, latent, encoder, width=64, seed=seed, kl_weight=kl_weight)  # type: ignore[arg-type]
    policy = BeliefPolicy(env, core, units=units, gamma=config.gamma, seed=seed).to(env.device)
    decoder: TransitionDecoder = LinearDecoder(spec, latent, offset=False, seed=seed).to(env.device)
    return VariBAD(
        env, policy, decoder, config=config, beliefs=beliefs or GRID_BELIEFS, iterations=iterations, seed=seed
    )


GRID_PPO = PPOConfig(epochs=3, minibatches=8, gamma=0.95, lam=0.95, lr=2e-3, last_lr=3e-4, entropy=0.03)
GRID_BELIEFS = BeliefConfig(prefixes=12, epochs=3, environments=192, minibatches=3, lr=3e-3, last_lr=3e-4)
