"""Meta-reinforcement learning: tasks are Markov decision processes, and adaptation must also choose how to explore.

``protocols`` is how its parts know each other; ``envs`` has families of environments that step as tensors, ``oracles``
what the best policies reach, ``baselines`` what classical ones reach. The names below and the modules of all rooms are
imported on first use.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():  # gymnasium adds a filter of its own to all of Python's
    import gymnasium

from bayesmeta.ops.rooms import module_of, modules_of

_NAMES = {
    "AdaptationCurve": "bayesmeta.rl.learner",
    "BeamSteering": "bayesmeta.rl.envs",
    "BeliefBonus": "bayesmeta.rl.varibad.shaping",
    "BeliefConfig": "bayesmeta.rl.varibad.learner",
    "BeliefPath": "bayesmeta.rl.latent.beliefs",
    "BeliefPolicy": "bayesmeta.rl.varibad.policy",
    "BernoulliBandit": "bayesmeta.rl.envs",
    "CategoricalHead": "bayesmeta.rl.policies",
    "ContextPolicy": "bayesmeta.rl.policies",
    "ContextSpec": "bayesmeta.rl.latent.contexts",
    "DecodedReadout": "bayesmeta.rl.varibad.policy",
    "DistilledConfig": "bayesmeta.rl.off_policy.distilled_config",
    "DistilledLatents": "bayesmeta.rl.off_policy.distilled",
    "Estimation": "bayesmeta.rl.policy_gradient.inner",
    "fit": "bayesmeta.rl.runs",
    "FitResult": "bayesmeta.rl.runs",
    "GaussianBandit": "bayesmeta.rl.envs",
    "GaussianHead": "bayesmeta.rl.policies",
    "Grid": "bayesmeta.rl.envs",
    "GymFamily": "bayesmeta.rl.envs.gym_family",
    "GymVectorEnv": "bayesmeta.rl.envs.gym",
    "HasBeliefs": "bayesmeta.rl.learner",
    "LatentContext": "bayesmeta.rl.latent.core",
    "LatentPolicy": "bayesmeta.rl.maesn.policy",
    "Learner": "bayesmeta.rl.learner",
    "LinearDecoder": "bayesmeta.rl.varibad.decoder",
    "load_learner": "bayesmeta.rl.runs",
    "Machines": "bayesmeta.rl.envs",
    "MAESN": "bayesmeta.rl.maesn.learner",
    "MAESNConfig": "bayesmeta.rl.maesn.config",
    "MAMLRL": "bayesmeta.rl.policy_gradient.maml_rl",
    "MAMLRLConfig": "bayesmeta.rl.policy_gradient.maml_rl",
    "Maze": "bayesmeta.rl.envs",
    "MemoryPolicy": "bayesmeta.rl.memory.policy",
    "MixtureContext": "bayesmeta.rl.latent.mixture",
    "Navigation": "bayesmeta.rl.envs",
    "PairMemory": "bayesmeta.rl.memory.pair",
    "plot_beliefs": "bayesmeta.rl.latent.pictures",
    "plot_latents": "bayesmeta.rl.latent.drawn",
    "plot_weights": "bayesmeta.rl.latent.drawn",
    "PEARL": "bayesmeta.rl.off_policy.pearl",
    "PEARLConfig": "bayesmeta.rl.off_policy.pearl",
    "open_run": "bayesmeta.rl.opened",
    "OpenedRun": "bayesmeta.rl.opened",
    "plot_adaptation": "bayesmeta.rl.drawings",
    "plot_learning_curve": "bayesmeta.rl.drawings",
    "plot_trajectories": "bayesmeta.rl.drawings",
    "PPOConfig": "bayesmeta.rl.policy_gradient.ppo",
    "Reference": "bayesmeta.rl.reference_policies",
    "references": "bayesmeta.rl.reference_policies",
    "Replay": "bayesmeta.rl.off_policy.replay",
    "RL2": "bayesmeta.rl.memory.rl2",
    "SAC": "bayesmeta.rl.off_policy.sac_learner",
    "SACConfig": "bayesmeta.rl.off_policy.sac",
    "save_video": "bayesmeta.rl.watching",
    "SNAILMemory": "bayesmeta.rl.memory.snail",
    "ShrinkingDisc": "bayesmeta.rl.varibad.shaping",
    "ShrinkingRadius": "bayesmeta.rl.varibad.shaping",
    "SparsePointRobot": "bayesmeta.rl.envs",
    "SquashedGaussianHead": "bayesmeta.rl.policies",
    "task_gaussians": "bayesmeta.rl.maesn.beliefs",
    "TabularMDP": "bayesmeta.rl.envs",
    "TaskPolicy": "bayesmeta.rl.policies",
    "TensorVectorEnv": "bayesmeta.rl.envs",
    "TransitionDecoder": "bayesmeta.rl.latent.decoder",
    "TRPOConfig": "bayesmeta.rl.policy_gradient.trpo_policy",
    "VariBAD": "bayesmeta.rl.varibad.learner",
    "watch": "bayesmeta.rl.watching",
    "Watching": "bayesmeta.rl.watching",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        return module_of(__name__, name)
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *modules_of(__name__)})


if TYPE_CHECKING:
    from bayesmeta.rl.drawings import plot_adaptation, plot_learning_curve, plot_trajectories
    from bayesmeta.rl.envs import (
        BeamSteering,
        BernoulliBandit,
        GaussianBandit,
        Grid,
        Machines,
        Maze,
        Navigation,
        SparsePointRobot,
        TabularMDP,
        TensorVectorEnv,
    )
    from bayesmeta.rl.envs.gym import GymVectorEnv
    from bayesmeta.rl.envs.gym_family import GymFamily
    from bayesmeta.rl.latent.beliefs import BeliefPath
    from bayesmeta.rl.latent.contexts import ContextSpec
    from bayesmeta.rl.latent.core import LatentContext
    from bayesmeta.rl.latent.decoder import TransitionDecoder
    from bayesmeta.rl.latent.drawn import plot_latents, plot_weights
    from bayesmeta.rl.latent.mixture import MixtureContext
    from bayesmeta.rl.latent.pictures import plot_beliefs
    from bayesmeta.rl.learner import AdaptationCurve, HasBeliefs, Learner
    from bayesmeta.rl.maesn.beliefs import task_gaussians
    from bayesmeta.rl.maesn.config import MAESNConfig
    from bayesmeta.rl.maesn.learner import MAESN
    from bayesmeta.rl.maesn.policy import LatentPolicy
    from bayesmeta.rl.memory.pair import PairMemory
    from bayesmeta.rl.memory.policy import MemoryPolicy
    from bayesmeta.rl.memory.rl2 import RL2
    from bayesmeta.rl.memory.snail import SNAILMemory
    from bayesmeta.rl.off_policy.distilled import DistilledLatents
    from bayesmeta.rl.off_policy.distilled_config import DistilledConfig
    from bayesmeta.rl.off_policy.pearl import PEARL, PEARLConfig
    from bayesmeta.rl.off_policy.replay import Replay
    from bayesmeta.rl.off_policy.sac import SACConfig
    from bayesmeta.rl.off_policy.sac_learner import SAC
    from bayesmeta.rl.opened import OpenedRun, open_run
    from bayesmeta.rl.policies import CategoricalHead, ContextPolicy, GaussianHead, SquashedGaussianHead, TaskPolicy
    from bayesmeta.rl.policy_gradient.inner import Estimation
    from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
    from bayesmeta.rl.policy_gradient.ppo import PPOConfig
    from bayesmeta.rl.policy_gradient.trpo_policy import TRPOConfig
    from bayesmeta.rl.reference_policies import Reference, references
    from bayesmeta.rl.runs import FitResult, fit, load_learner
    from bayesmeta.rl.varibad.decoder import LinearDecoder
    from bayesmeta.rl.varibad.learner import BeliefConfig, VariBAD
    from bayesmeta.rl.varibad.policy import BeliefPolicy, DecodedReadout
    from bayesmeta.rl.varibad.shaping import BeliefBonus, ShrinkingDisc, ShrinkingRadius
    from bayesmeta.rl.watching import Watching, save_video, watch
