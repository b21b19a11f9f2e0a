"""Meta-reinforcement learning: tasks are Markov decision processes, and adaptation must also choose how to explore.

``protocols`` is how its parts know each other; ``envs`` has families of environments that step as tensors, ``oracles``
what the best policies reach, ``baselines`` what classical ones reach. The names below are imported on first use.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():  # gymnasium adds a filter of its own to all of Python's
    import gymnasium

_NAMES = {
    "AdaptationCurve": "bayesmeta.rl.learner",
    "BeamSteering": "bayesmeta.rl.envs",
    "BeliefConfig": "bayesmeta.rl.varibad",
    "BeliefPath": "bayesmeta.rl.latent.beliefs",
    "BeliefPolicy": "bayesmeta.rl.varibad_policy",
    "BernoulliBandit": "bayesmeta.rl.envs",
    "CategoricalHead": "bayesmeta.rl.policies",
    "ContextPolicy": "bayesmeta.rl.policies",
    "ContextSpec": "bayesmeta.rl.latent.contexts",
    "DecodedReadout": "bayesmeta.rl.varibad_policy",
    "DistilledConfig": "bayesmeta.rl.distilled_config",
    "DistilledLatents": "bayesmeta.rl.distilled",
    "Estimation": "bayesmeta.rl.inner",
    "fit": "bayesmeta.rl.runs",
    "FitResult": "bayesmeta.rl.runs",
    "GaussianBandit": "bayesmeta.rl.envs",
    "GaussianHead": "bayesmeta.rl.policies",
    "Grid": "bayesmeta.rl.envs",
    "GymFamily": "bayesmeta.rl.envs.gym_family",
    "GymVectorEnv": "bayesmeta.rl.envs.gym",
    "HasBeliefs": "bayesmeta.rl.learner",
    "LatentContext": "bayesmeta.rl.latent.core",
    "LatentPolicy": "bayesmeta.rl.maesn_policy",
    "Learner": "bayesmeta.rl.learner",
    "LinearDecoder": "bayesmeta.rl.varibad_decoder",
    "load_learner": "bayesmeta.rl.runs",
    "Machines": "bayesmeta.rl.envs",
    "MAESN": "bayesmeta.rl.maesn",
    "MAESNConfig": "bayesmeta.rl.maesn_config",
    "MAMLRL": "bayesmeta.rl.maml_rl",
    "MAMLRLConfig": "bayesmeta.rl.maml_rl",
    "Maze": "bayesmeta.rl.envs",
    "MemoryPolicy": "bayesmeta.rl.memory_policy",
    "MixtureContext": "bayesmeta.rl.latent.mixture",
    "Navigation": "bayesmeta.rl.envs",
    "PairMemory": "bayesmeta.rl.pair_memory",
    "plot_beliefs": "bayesmeta.rl.latent.pictures",
    "PEARL": "bayesmeta.rl.pearl",
    "PEARLConfig": "bayesmeta.rl.pearl",
    "plot_learning_curve": "bayesmeta.rl.drawings",
    "plot_trajectories": "bayesmeta.rl.drawings",
    "PPOConfig": "bayesmeta.rl.ppo",
    "Reference": "bayesmeta.rl.reference_policies",
    "references": "bayesmeta.rl.reference_policies",
    "Replay": "bayesmeta.rl.replay",
    "RL2": "bayesmeta.rl.rl2",
    "SAC": "bayesmeta.rl.sac_learner",
    "SACConfig": "bayesmeta.rl.sac",
    "save_video": "bayesmeta.rl.watching",
    "SNAILMemory": "bayesmeta.rl.snail",
    "SparsePointRobot": "bayesmeta.rl.envs",
    "SquashedGaussianHead": "bayesmeta.rl.policies",
    "TabularMDP": "bayesmeta.rl.envs",
    "TaskPolicy": "bayesmeta.rl.policies",
    "TensorVectorEnv": "bayesmeta.rl.envs",
    "TransitionDecoder": "bayesmeta.rl.latent.decoder",
    "TRPOConfig": "bayesmeta.rl.trpo_policy",
    "VariBAD": "bayesmeta.rl.varibad",
    "watch": "bayesmeta.rl.watching",
    "Watching": "bayesmeta.rl.watching",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'bayesmeta.rl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from bayesmeta.rl.distilled import DistilledLatents
    from bayesmeta.rl.distilled_config import DistilledConfig
    from bayesmeta.rl.drawings import plot_learning_curve, plot_trajectories
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
    from bayesmeta.rl.inner import Estimation
    from bayesmeta.rl.latent.beliefs import BeliefPath
    from bayesmeta.rl.latent.contexts import ContextSpec
    from bayesmeta.rl.latent.core import LatentContext
    from bayesmeta.rl.latent.decoder import TransitionDecoder
    from bayesmeta.rl.latent.mixture import MixtureContext
    from bayesmeta.rl.latent.pictures import plot_beliefs
    from bayesmeta.rl.learner import AdaptationCurve, HasBeliefs, Learner
    from bayesmeta.rl.maesn import MAESN
    from bayesmeta.rl.maesn_config import MAESNConfig
    from bayesmeta.rl.maesn_policy import LatentPolicy
    from bayesmeta.rl.maml_rl import MAMLRL, MAMLRLConfig
    from bayesmeta.rl.memory_policy import MemoryPolicy
    from bayesmeta.rl.pair_memory import PairMemory
    from bayesmeta.rl.pearl import PEARL, PEARLConfig
    from bayesmeta.rl.policies import CategoricalHead, ContextPolicy, GaussianHead, SquashedGaussianHead, TaskPolicy
    from bayesmeta.rl.ppo import PPOConfig
    from bayesmeta.rl.reference_policies import Reference, references
    from bayesmeta.rl.replay import Replay
    from bayesmeta.rl.rl2 import RL2
    from bayesmeta.rl.runs import FitResult, fit, load_learner
    from bayesmeta.rl.sac import SACConfig
    from bayesmeta.rl.sac_learner import SAC
    from bayesmeta.rl.snail import SNAILMemory
    from bayesmeta.rl.trpo_policy import TRPOConfig
    from bayesmeta.rl.varibad import BeliefConfig, VariBAD
    from bayesmeta.rl.varibad_decoder import LinearDecoder
    from bayesmeta.rl.varibad_policy import BeliefPolicy, DecodedReadout
    from bayesmeta.rl.watching import Watching, save_video, watch
