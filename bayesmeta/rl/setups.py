"""Environments and learners by name, with settings to begin from: what the command line builds.

The settings of ``bandit`` with ``rl2`` and ``snail`` are those of the benchmark, and those of ``mdp`` with ``rl2`` too,
less its stage of shorter trials; so are those of ``beam`` with ``rl2``, and of ``navigation`` and ``beam`` with
``maml``. The others are a start and were not tuned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bayesmeta.errors import OptionError
from bayesmeta.rl import envs, own, setups_cheetah
from bayesmeta.rl.envs import cheetah
from bayesmeta.rl.envs.gym import GymVectorEnv
from bayesmeta.rl.envs.gym_family import GymFamily
from bayesmeta.rl.envs.vector import TensorVectorEnv
from bayesmeta.rl.maesn.setups import maesn_defaults
from bayesmeta.rl.memory.pair import PairMemory
from bayesmeta.rl.memory.recurrent import Memory
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.policies import ContextPolicy, TaskPolicy, head_for
from bayesmeta.rl.policy_gradient.inner import Estimation
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from bayesmeta.rl.policy_gradient.ppo import PPOConfig
from bayesmeta.rl.protocols import num_features
from bayesmeta.rl.setups_latent import LATENT_METHODS, OWN_DECODERS, maesn_for
from bayesmeta.rl_settings import DECODING, Settings, suggestion
from bayesmeta.rl_settings import METHODS as METHODS


@dataclasses.dataclass(frozen=True)
class EnvDefaults:
    """What an environment's name stands for.

    Attributes:
        family: makes it from the options that its constructor knows.
        options: names of those on the command line.
        episodes: of a trial, for learners that remember.
        trials: side by side, for learners that remember.
        iterations: of learners that remember.
        reward_shift, reward_scale: of what a memory reads.
        std: first standard deviation of continuous actions.
        horizon: steps of an episode; None is the family's own.
        steps: of each rollout of learners that remember; None is one trial.
        units: width of the memory of learners that remember, but for SNAIL's.
        memory: of ``rl2``: from a family and a width to what makes the memory; None is a GRU.
        config: of learners that remember; None is PPO's own defaults.
        stepping: of learners that take steps, but for CAVIA: what differs from :meth:`Setup.filled`'s defaults.
        inner: of the same: settings of :class:`~bayesmeta.rl.policy_gradient.maml_rl.MAMLRLConfig`.
        joint_share: of the same: which part of the iterations, the first ones, takes no inner step.
        made: methods with settings and makers of their own; all others are made as everywhere.
    """

    family: Callable[..., Any]
    options: tuple[str, ...] = ("horizon",)
    episodes: int = 1
    trials: int = 512
    iterations: int = 200
    reward_shift: float = 0.0
    reward_scale: float = 1.0
    std: float = 1.0
    horizon: int | None = None
    steps: int | None = None
    units: int = 64
    memory: Callable[[Any, int], Callable[[int], Memory]] | None = None
    config: PPOConfig | None = None
    stepping: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inner: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    joint_share: float = 0.0
    made: Mapping[str, setups_cheetah.Made] = dataclasses.field(default_factory=dict)


def _pairs(family: envs.TabularMDP, units: int) -> Callable[[int], Memory]:
    return lambda inputs: PairMemory(inputs, units, family.states, family.actions)


def _beam(data: str | None = None, plane: str | None = None, **options: Any) -> envs.BeamSteering:
    if data is None:
        if plane is not None:
            raise OptionError(f"plane={plane!r} is of a file of machines; give data=, or leave plane out.")
        return envs.BeamSteering(**options)
    return envs.BeamSteering(envs.Machines.load(Path(data), plane=plane or "H"), **options)


#: Environments by their names on the command line.
ENVIRONMENTS: dict[str, EnvDefaults] = {
    "bandit": EnvDefaults(envs.BernoulliBandit, ("horizon", "arms"), 1, 4096, 110, 0.5, 0.5),
    "gaussian-bandit": EnvDefaults(envs.GaussianBandit, ("horizon", "arms"), 1, 4096, 110),
    "mdp": EnvDefaults(
        envs.TabularMDP,
        episodes=10,
        iterations=400,
        reward_shift=1.0,
        reward_scale=1.4,
        units=128,
        memory=_pairs,
        config=PPOConfig(lam=0.5, lr=2e-3, entropy=0.02, minibatches=8),
    ),
    "navigation": EnvDefaults(
        envs.Navigation,
        episodes=2,
        trials=128,
        reward_scale=0.2,
        std=0.1,
        stepping={"copies": 10, "units": 16, "iterations": 50, "inner_lr": 0.1},
        inner={
            "max_kl": 0.02,
            "cg_steps": 6,
            "curvature_share": 0.2,
            "curvature_episodes": 2,
            "estimation": Estimation(lam=0.9, standardise=False),
        },
        joint_share=0.4,
    ),
    "sparse-navigation": EnvDefaults(
        lambda **options: envs.Navigation(sparse=True, **options), episodes=4, trials=128, std=0.1, horizon=20
    ),
    "point-robot": EnvDefaults(envs.SparsePointRobot, episodes=4, trials=256, std=0.1),
    "grid": EnvDefaults(envs.Grid, episodes=4),
    "maze": EnvDefaults(envs.Maze, episodes=2, trials=128),
    "beam": EnvDefaults(
        _beam,
        ("horizon", "data", "plane"),
        episodes=2,
        iterations=400,
        reward_shift=-3.0,
        reward_scale=3.0,
        std=math.exp(-1),
        steps=16,
        units=96,
        config=PPOConfig(
            epochs=4, minibatches=4, gamma=0.95, lam=0.95, lr=1.5e-3, last_lr=1e-4, entropy=0.0, standardise="all"
        ),
        stepping={"tasks": 50, "iterations": 180, "inner_lr": 0.002},
        inner={
            "max_kl": 0.03,
            "cg_steps": 8,
            "curvature_share": 1 / 3,
            "curvature_episodes": 5,
            "exact_curvature": False,
            "estimation": Estimation(gamma=0.95, lam=0.95, standardise=False),
        },
        joint_share=2 / 3,
    ),
    "half-cheetah-direction": EnvDefaults(
        cheetah.cheetah_directions, episodes=2, trials=20, std=0.5, made=setups_cheetah.DIRECTION
    ),
    "half-cheetah-velocity": EnvDefaults(
        cheetah.cheetah_velocities, episodes=2, trials=20, std=0.5, made=setups_cheetah.VELOCITY
    ),
}
#: Of environments of one's own, ``module:attribute``.
OWN = EnvDefaults(own.load_family, ("horizon", "task_values", "task_range"), episodes=2, trials=20)
MEMORIES = {"rl2": "gru", "rl2-lstm": "lstm", "snail": "snail"}
_INNER: dict[str, dict[str, Any]] = {
    "maml": {}, "fomaml": {"first_order": True}, "meta-sgd": {"learn_rates": True},
    "e-maml": {"exploration_credit": 1.0}, "cavia": {}, "joint": {"inner_steps": 0},
}  # fmt: skip
CONTEXT = 8


@dataclasses.dataclass(frozen=True)
class Setup(Settings):
    """A run's settings; None is the default of environment and method, which :meth:`filled` puts in.

    Its fields, and what they mean, are those of :class:`~bayesmeta.rl_settings.Settings`; environment and method must
    be there.

    Raises:
        OptionError: for unknown names, and options that do not belong to environment or method.
    """

    env: str = dataclasses.field()
    method: str = dataclasses.field()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.env not in ENVIRONMENTS and not own.is_path(self.env):
            raise OptionError(
                f"Unknown environment {self.env!r}{suggestion(self.env, ENVIRONMENTS)}; expected one of "
                f"{', '.join(ENVIRONMENTS)}, or module:attribute for one of your own."
            )
        if self.method not in METHODS:
            raise OptionError(
                f"Unknown method {self.method!r}{suggestion(self.method, METHODS)}; expected one of "
                f"{', '.join(METHODS)}."
            )
        known = self.defaults.options
        for name in ("task_values", "task_range"):  # files hold lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.task_range is not None and len(self.task_range) != 2:
            raise OptionError(f"task_range is two numbers to draw between; got {self.task_range}.")
        for name in ("horizon", "arms", "data", "plane", "task_values", "task_range"):
            if getattr(self, name) is not None and name not in known:
                raise OptionError(f"{name}={getattr(self, name)!r} is not an option of {self.env}; leave it out.")
        foreign = ("copies", "inner_steps", "inner_lr") if self.remembers else ("episodes",)
        for name in foreign:
            if getattr(self, name) is not None:
                raise OptionError(f"{name}={getattr(self, name)!r} is not an option of {self.method}; leave it out.")
        self._check_reconstruction()
        for name in ("horizon", "arms", "episodes", "tasks", "copies", "units", "iterations", "inner_steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} must be a whole number of at least 1; got {value!r}.")

    def _check_reconstruction(self) -> None:
        """Whether it can be chosen. Environments with settings of their own have decoders of their own."""
        value = self.reconstruction
        if value is None:
            return
        if value not in ("reward", "transition"):
            raise OptionError(f"reconstruction is {value!r}; expected 'reward' or 'transition'.")
        if self.method not in DECODING:
            raise OptionError(
                f"reconstruction={value!r} is not an option of {self.method}; leave it out, or take one of "
                f"{', '.join(DECODING)}."
            )
        if self.method in self.defaults.made or (self.method == "varibad" and self.env in OWN_DECODERS):
            raise OptionError(
                f"reconstruction={value!r} is not an option of {self.method} on {self.env}, whose settings have a "
                "decoder of their own; leave it out."
            )

    @property
    def defaults(self) -> EnvDefaults:
        """What the environment's name stands for."""
        return OWN if own.is_path(self.env) else ENVIRONMENTS[self.env]

    @property
    def remembers(self) -> bool:
        """Whether the method adapts by a memory; else by gradient steps."""
        return self.method in MEMORIES or self.method in LATENT_METHODS

    def filled(self) -> Setup:
        """With the defaults of environment and method in place of None."""
        known = self.defaults
        defaults: dict[str, Any] = {"horizon": known.horizon}
        if self.method in LATENT_METHODS:
            defaults |= LATENT_METHODS[self.method].defaults(known)
            if self.method == "varibad" and known is OWN:  # whose reward may be the same in all tasks
                defaults["reconstruction"] = "transition"
        elif self.method == "maesn":
            defaults |= maesn_defaults(self.env)
        elif self.remembers:
            units = known.units if self.method != "snail" else 32
            defaults |= {
                "episodes": known.episodes, "tasks": known.trials, "units": units, "iterations": known.iterations,
            }  # fmt: skip
        else:
            defaults |= {
                "tasks": 20, "copies": 20, "units": 64, "iterations": 100, "inner_steps": 1, "inner_lr": 0.1,
            }  # fmt: skip
            defaults |= {"inner_lr": 1.0} if self.method == "cavia" else known.stepping
        if self.method in known.made:
            defaults |= known.made[self.method].defaults
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def family(self) -> Any:
        """The family of environments."""
        known = self.defaults
        given = {name: getattr(self, name) for name in known.options if getattr(self, name) is not None}
        return known.family(self.env, **given) if known is OWN else known.family(**given)

    def vector(self, family: Any, tasks: int, **options: Any) -> TensorVectorEnv | GymVectorEnv[Any]:
        """Environments of a family side by side.

        Raises:
            OptionError: for workers where environments step as tensors.
        """
        if isinstance(family, GymFamily):
            return family.vector(tasks, workers=self.workers, **options)
        if self.workers:
            raise OptionError(f"workers=True is not an option of {self.env}, which steps as tensors; leave it out.")
        found: TensorVectorEnv = family.vector(tasks, **options)
        return found

    def held_out(
        self, family: Any, tasks: int, *, split: str, seed: int, device: Any = "cpu", **options: Any
    ) -> TensorVectorEnv | GymVectorEnv[Any]:
        """Environments of held-out tasks, a trial of one for each task or, for methods that take steps, ``copies``."""
        shape = {"episodes_per_trial": self.episodes or 1} if self.remembers else {"copies": self.copies or 1}
        return self.vector(family, tasks, split=split, generator=seed, device=device, **shape, **options)

    def learner(self, family: Any, device: torch.device | str = "cpu") -> Any:
        """The learner with its environments; of settings that are :meth:`filled`."""
        if self.method in self.defaults.made:
            return self.defaults.made[self.method].learner(self, family, device)
        if self.method in LATENT_METHODS:
            return LATENT_METHODS[self.method].learner(self, family, device)
        if self.method == "maesn":
            return maesn_for(self, family, device)
        return self._remembering(family, device) if self.remembers else self._stepping(family, device)

    def _remembering(self, family: Any, device: torch.device | str) -> RL2:
        known = self.defaults
        assert self.tasks
        assert self.episodes
        assert self.iterations
        assert self.units
        env = self.vector(
            family, self.tasks, new_tasks=True, episodes_per_trial=self.episodes, generator=self.seed, device=device
        )
        kind: Any = MEMORIES[self.method]
        if self.method == "rl2" and known.memory is not None:
            kind = known.memory(family, self.units)
        return RL2(
            env, config=known.config, iterations=self.iterations, steps=known.steps, units=self.units, seed=self.seed,
            memory_kind=kind, reward_shift=known.reward_shift, reward_scale=known.reward_scale,
            log_std=math.log(known.std),
        )  # fmt: skip

    def _inner_config(self, inner_steps: int, inner_lr: float, iterations: int) -> MAMLRLConfig:
        known = self.defaults
        given: dict[str, Any] = {"inner_steps": inner_steps, "inner_lr": inner_lr}
        if self.method != "cavia":
            given |= {**known.inner, "joint_iterations": round(known.joint_share * iterations)}
        if self.method == "e-maml":  # whose credit stands for the second derivative of the other estimators
            estimation = given.get("estimation", Estimation())
            given["estimation"] = dataclasses.replace(estimation, estimator="policy_gradient")
        return MAMLRLConfig(**{**given, **_INNER[self.method]})

    def _stepping(self, family: Any, device: torch.device | str) -> MAMLRL:
        from bayesmeta.models.nets import mlp

        assert self.tasks
        assert self.copies
        assert self.units
        assert self.inner_steps
        assert self.inner_lr is not None
        env = self.vector(family, self.tasks, copies=self.copies, generator=self.seed, device=device)
        config = self._inner_config(self.inner_steps, self.inner_lr, self.iterations or 0)
        head = head_for(env.single_action_space, log_std=math.log(self.defaults.std))
        context = CONTEXT if self.method == "cavia" else 0
        inputs = num_features(env.single_observation_space) + context
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            network = mlp(inputs, [self.units, self.units], head.outputs, activation="tanh")
        for name, value in zip(("weight", "bias"), list(network.parameters())[-2:]):
            value.data.mul_(0.01 if name == "weight" else 0.0)  # nearly 0 in all states to begin with
        policy = ContextPolicy(network, head, context) if context else TaskPolicy(network, head)
        return MAMLRL(env, policy.to(device), config, seed=self.seed)
