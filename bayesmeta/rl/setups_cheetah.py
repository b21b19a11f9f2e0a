"""Half-cheetah's learners and their settings, as the command line and ``python -m benchmarks.halfcheetah`` take them.

They were chosen on validation tasks, with other seeds than the benchmark's, in trainings of a minute of CPU time; the
iterations are those of some five minutes on one core. All learners read states whose numbers are divided by what they
usually are: joints turn at ten radians a second where the other numbers are near 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.models.nets import mlp
from bayesmeta.ops.random import as_generator, forked_rng
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.off_policy.pearl import PEARL, PEARLConfig
from bayesmeta.rl.off_policy.sac import SACConfig
from bayesmeta.rl.policies import TaskPolicy, head_for
from bayesmeta.rl.policy_gradient.inner import Estimation
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from bayesmeta.rl.policy_gradient.ppo import PPOConfig
from bayesmeta.rl.varibad.decoder import LinearDecoder
from bayesmeta.rl.varibad.learner import BeliefConfig, VariBAD
from bayesmeta.rl.varibad.policy import BeliefPolicy, DecodedReadout

if TYPE_CHECKING:
    from bayesmeta.rl.setups import Setup

#: What the numbers of a state are divided by: height and angles, velocities of the body, those of six joints.
SCALES = (*[1.0] * 8, 3.0, 1.0, 3.0, *[10.0] * 6)
#: Where the velocity forward stands in a state, and numbers of an action.
FORWARD, ACTIONS = 8, 6
#: Velocities at which the policy of VariBAD reads what its belief expects.
PROBES = {"direction": (-1.0, 1.0), "velocity": (0.0, 0.5, 1.0, 1.5, 2.0)}
#: First standard deviation of actions.
STD = 0.5
#: Steps of a rollout of RL²: a part of a trial, so that updates are many.
STEPS = 100

PPO = PPOConfig(
    epochs=4, minibatches=4, gamma=0.98, lam=0.95, lr=1e-3, last_lr=1e-4, entropy=0.0, max_grad_norm=0.5,
    standardise="all",
)  # fmt: skip
#: Rollouts are whole trials: a belief that is carried on over an update of its encoder is half of an older one. There
#: are fewer of them, and each is passed over more often.
VARIBAD_PPO = dataclasses.replace(PPO, epochs=10, minibatches=8)
BELIEFS = BeliefConfig(
    decode="past", kl="prior", prefixes=4, epochs=5, environments=20, minibatches=10, lr=3e-3, last_lr=3e-4
)


class ScaledState(nn.Module):
    """States divided by :data:`SCALES`, without parameters; what is beyond ten times as much counts as that."""

    def forward(self, state: Tensor) -> Tensor:
        """``[…, 17]``."""
        return (state / torch.tensor(SCALES).to(state)).clamp(-10, 10)


def kind_of(env: str) -> str:
    """``"direction"`` or ``"velocity"``, of a name on the command line."""
    return env.removeprefix("half-cheetah-")


def probes(kind: str) -> Tensor:
    """Transitions ``[n, 40]`` of an encoded context (s, a, s′) that go on at the velocities :data:`PROBES`."""
    rows = torch.zeros(len(PROBES[kind]), 2 * len(SCALES) + ACTIONS)
    for at in (FORWARD, len(SCALES) + ACTIONS + FORWARD):
        rows[:, at] = torch.tensor(PROBES[kind]) / SCALES[FORWARD]
    return rows


def _trials(setup: Setup, family: Any, device: torch.device | str, **options: Any) -> Any:
    assert setup.tasks
    return setup.vector(
        family, setup.tasks, episodes_per_trial=setup.episodes, generator=setup.seed, device=device, **options
    )


def _rl2(setup: Setup, family: Any, device: torch.device | str) -> RL2:
    env = _trials(setup, family, device, new_tasks=True)
    assert setup.iterations
    steps = min(STEPS, family.horizon * env.episodes_per_trial)
    return RL2(
        env, config=PPO, iterations=setup.iterations, steps=steps, units=setup.units or 0, seed=setup.seed,
        log_std=math.log(STD), encoder=ScaledState(), encoded=len(SCALES),
    )  # fmt: skip


def _varibad(setup: Setup, family: Any, device: torch.device | str) -> VariBAD:
    """The encoder is a product of Gaussians, and the policy reads decoded rewards at some velocities."""
    env, kind = _trials(setup, family, device, new_tasks=True), kind_of(setup.env)
    assert setup.iterations
    spec = ContextSpec.of(env, inputs=("state", "action", "successor"), encode=ScaledState(), encoded=len(SCALES))
    core = LatentContext.make(spec, 5, "product", width=64, seed=setup.seed, kl_weight=0.1)
    # a reward in a direction is linear in the velocity, one for nearness is not
    decode = LinearDecoder if kind == "direction" else TransitionDecoder
    decoder = decode(spec, 5, Gaussian(0.2, learn_scale=True), seed=setup.seed).to(env.device)
    policy = BeliefPolicy(
        env, core, units=setup.units or 0, gamma=VARIBAD_PPO.gamma, seed=setup.seed, log_std=math.log(STD),
        readout=DecodedReadout(decoder, probes(kind), spread=True),
    ).to(env.device)  # fmt: skip
    _orthogonal([policy.memory.policy_net, policy.memory.value_net], setup.seed)
    return VariBAD(
        env, policy, decoder, config=VARIBAD_PPO, beliefs=BELIEFS, iterations=setup.iterations, seed=setup.seed
    )


def _orthogonal(networks: Sequence[nn.Module], seed: int) -> None:
    """First weights at which tanh layers let through what they read; with smaller ones running was learned late."""
    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, nn.Linear)]
    with forked_rng(as_generator(seed, stream="half-cheetah")):
        for layer in layers:
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)


def _maml(setup: Setup, family: Any, device: torch.device | str) -> MAMLRL:
    assert setup.tasks
    assert setup.units
    env = setup.vector(family, setup.tasks, copies=setup.copies, generator=setup.seed, device=device)
    head = head_for(env.single_action_space, log_std=math.log(STD))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(setup.seed)
        network = mlp(len(SCALES), [setup.units, setup.units], head.outputs, activation="tanh")
    first, *_, weight, bias = list(network.parameters())
    with torch.no_grad():
        first.div_(torch.tensor(SCALES))  # reads scaled states
        weight.mul_(0.01)
        bias.zero_()
    config = MAMLRLConfig(
        inner_steps=setup.inner_steps or 1, inner_lr=setup.inner_lr or 0.1, max_kl=0.03, cg_steps=8,
        curvature_share=0.25, curvature_episodes=3, exact_curvature=False,
        estimation=Estimation(gamma=0.99, lam=0.97),
    )  # fmt: skip
    return MAMLRL(env, TaskPolicy(network, head).to(device), config, seed=setup.seed)


def _pearl(setup: Setup, family: Any, device: torch.device | str) -> PEARL:
    env = _trials(setup, family, device)
    assert setup.units
    sac = SACConfig(lr=1e-3, hidden=(setup.units, setup.units), reward_scale=5.0, temperature=0.3)
    tasks, batch = (4, 64) if kind_of(setup.env) == "direction" else (8, 32)
    config = PEARLConfig(
        sac=sac, meta_batch=tasks, batch=batch, context_batch=64, updates=200, capacity=50_000, kl_weight=0.1
    )
    spec = ContextSpec.of(env, encode=ScaledState(), encoded=len(SCALES))
    return PEARL(env, config, spec=spec, seed=setup.seed)


class Made(NamedTuple):
    """A method's settings for one environment.

    Attributes:
        defaults: of :class:`~bayesmeta.rl.setups.Setup`, beside those of other environments.
        learner: makes it from filled settings, the family, and a device.
    """

    defaults: Mapping[str, Any]
    learner: Callable[[Setup, Any, torch.device | str], Any]


#: By the names of methods.
DIRECTION = {
    "rl2": Made({"episodes": 2, "tasks": 40, "units": 128, "iterations": 280}, _rl2),
    "varibad": Made({"episodes": 2, "tasks": 20, "units": 128, "iterations": 100}, _varibad),
    "maml": Made({"tasks": 4, "copies": 5, "units": 64, "iterations": 180}, _maml),
    "pearl": Made({"episodes": 2, "tasks": 4, "units": 128, "iterations": 100}, _pearl),
}
VELOCITY = {
    "rl2": Made({"episodes": 2, "tasks": 40, "units": 128, "iterations": 280}, _rl2),
    "varibad": Made({"episodes": 2, "tasks": 20, "units": 128, "iterations": 100}, _varibad),
    "maml": Made({"tasks": 8, "copies": 5, "units": 64, "iterations": 90}, _maml),
    "pearl": Made({"episodes": 2, "tasks": 16, "units": 128, "iterations": 100}, _pearl),
}
