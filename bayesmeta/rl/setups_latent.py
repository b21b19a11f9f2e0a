"""Learners with latent contexts by name, with settings to begin from: what :mod:`bayesmeta.rl.setups` adds to its own.

The settings are a start; none of them was tuned but where its benchmark says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.maesn.learner import MAESN
from bayesmeta.rl.maesn.setups import POINT_ROBOT_MIN_STD, latent_policy, maesn_config
from bayesmeta.rl.off_policy.distilled import DistilledLatents
from bayesmeta.rl.off_policy.distilled_setups import distilled_for
from bayesmeta.rl.off_policy.pearl import PEARL, PEARLConfig
from bayesmeta.rl.off_policy.sac import SACConfig
from bayesmeta.rl.varibad.learner import VariBAD
from bayesmeta.rl.varibad.setups import varibad_for

if TYPE_CHECKING:
    from bayesmeta.rl.setups import EnvDefaults, Setup


#: Environments in which VariBAD has a decoder of its own, or rewards that one likelihood describes and nothing beside.
OWN_DECODERS = ("grid", "point-robot", "bandit")
#: Training tasks of MAESN, each with variational parameters of its own, where a family has no fixed number.
MAESN_TASKS = 80


@dataclasses.dataclass(frozen=True)
class LatentMethod:
    """What a method's name stands for. All of these remember: they adapt from episode to episode of a trial.

    Attributes:
        defaults: from an environment's defaults to those of the settings ``episodes``, ``tasks``, ``units`` and
            ``iterations``.
        learner: makes it from filled settings, the family, and a device.
    """

    defaults: Callable[[EnvDefaults], dict[str, Any]]
    learner: Callable[[Setup, Any, torch.device | str], Any]


def _pearl_defaults(known: EnvDefaults) -> dict[str, Any]:
    return {"episodes": max(2, known.episodes), "tasks": min(known.trials, 80), "units": 128, "iterations": 150}


def _pearl(setup: Setup, family: Any, device: torch.device | str) -> PEARL:
    """PEARL as released, with smaller networks and batches; where there is a dense reward, trained on that."""
    assert setup.tasks
    assert setup.units
    env = setup.vector(family, setup.tasks, episodes_per_trial=setup.episodes, generator=setup.seed, device=device)
    dense = setup.env == "point-robot"
    sac = SACConfig(
        gamma=0.9 if dense else 0.99,
        lr=1e-3,
        hidden=(setup.units, setup.units),
        reward_scale=10.0 if dense else 1 / setup.defaults.reward_scale,
    )
    config = PEARLConfig(
        sac=sac,
        meta_batch=16,
        batch=32,
        context_batch=128,
        kl_weight=0.08,
        train_reward="dense_reward" if dense else None,
        reconstruction=setup.reconstruction,
    )
    return PEARL(env, config, seed=setup.seed)


def _varibad_defaults(known: EnvDefaults) -> dict[str, Any]:
    return {"episodes": max(2, known.episodes), "tasks": known.trials, "units": 64, "iterations": known.iterations}


def _varibad(setup: Setup, family: Any, device: torch.device | str) -> VariBAD:
    assert setup.tasks
    assert setup.units
    assert setup.iterations
    known = setup.defaults
    env = setup.vector(
        family, setup.tasks, new_tasks=True, episodes_per_trial=setup.episodes, generator=setup.seed, device=device
    )
    if setup.reconstruction is not None or setup.env == "bandit":
        return VariBAD(
            env, spec=_foretold(setup, env), iterations=setup.iterations, seed=setup.seed, units=setup.units,
            steps=known.steps, log_std=math.log(known.std),
        )  # fmt: skip
    return varibad_for(
        env, iterations=setup.iterations, seed=setup.seed, units=setup.units, steps=known.steps,
        reward_shift=known.reward_shift, reward_scale=known.reward_scale, log_std=math.log(known.std),
    )  # fmt: skip


def _foretold(setup: Setup, env: Any) -> ContextSpec:
    """What VariBAD's decoder foretells: the reward given [s, a, s′], or [r, s′ − s] given [s, a].

    A Bernoulli bandit has no state, and rewards that are 0 or 1.
    """
    if setup.env == "bandit":
        return ContextSpec.of(env, inputs=("action",), binary=True)
    scale = {"reward_shift": setup.defaults.reward_shift, "reward_scale": setup.defaults.reward_scale}
    return ContextSpec.explaining(env, setup.reconstruction, **scale)


def _distilled_defaults(known: EnvDefaults) -> dict[str, Any]:
    return {"episodes": max(2, known.episodes), "tasks": min(known.trials, 80), "units": 64, "iterations": 300}


def _distilled(setup: Setup, family: Any, device: torch.device | str) -> DistilledLatents:
    assert setup.tasks
    assert setup.units
    assert setup.iterations
    known = setup.defaults
    env = setup.vector(family, setup.tasks, episodes_per_trial=setup.episodes, generator=setup.seed, device=device)
    return distilled_for(
        env, iterations=setup.iterations, seed=setup.seed, units=setup.units, reward_shift=known.reward_shift,
        reward_scale=known.reward_scale,
    )  # fmt: skip


def maesn_for(setup: Setup, family: Any, device: torch.device | str = "cpu") -> MAESN:
    """The learner with its environments; of settings that are filled."""
    assert setup.tasks
    assert setup.units
    assert setup.inner_steps
    assert setup.inner_lr is not None
    env = setup.vector(family, setup.tasks, copies=setup.copies, generator=setup.seed, device=device)
    tasks = family.sample_tasks(
        max(MAESN_TASKS, setup.tasks), generator=torch.Generator(device).manual_seed(setup.seed)
    )
    floor = POINT_ROBOT_MIN_STD if setup.env == "point-robot" else 1e-6
    policy = latent_policy(env, setup.units, std=setup.defaults.std, seed=setup.seed, min_std=floor).to(device)
    config = maesn_config(setup.env, setup.inner_steps, setup.inner_lr)
    return MAESN(env, policy, config, tasks=tasks, seed=setup.seed)


#: Methods by their names on the command line.
LATENT_METHODS: dict[str, LatentMethod] = {
    "pearl": LatentMethod(_pearl_defaults, _pearl),
    "varibad": LatentMethod(_varibad_defaults, _varibad),
    "distilled": LatentMethod(_distilled_defaults, _distilled),
}
