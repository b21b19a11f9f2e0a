"""VariBAD on beam steering: the belief is over the machine, and says what the monitors will read next.

A step changes the readings by 100 R times the change of the correctors: the decoder is that line with R affine in the
latent, so that a latent of a few numbers spans the machines as principal components would. Readings alone are decoded,
as the reward is a function of them. Encoder and decoder learn by Bayes' rule one step at a time (``decode="new"``
against the belief before, weight 1), which is a bound on the evidence also where a rollout ends in the middle of a
trial; only a bound of that kind gives beliefs that may be held to coverage.

- ``varibad_next_readings_coverage``: how often the central 90% of the next readings have them. An encoder that has
  learned nothing can pass it, as the prior covers too.
- ``varibad_next_readings_log_score_gained``: log score of the next readings under the belief less that under the prior,
  in nats a step (all readings together); 0 where the belief stays at the prior. No bar.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.rl.envs import BeamSteering, TensorVectorEnv
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.checks import Figure, next_calibration
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.policy_gradient.ppo import PPOConfig
from bayesmeta.rl.varibad.decoder import LinearDecoder
from bayesmeta.rl.varibad.learner import BeliefConfig, VariBAD
from bayesmeta.rl.varibad.policy import BeliefPolicy
from benchmarks.harness import Bar, Row, between

LATENT, WIDTH, UNITS = 12, 64, 96
ENVS, STEPS, ITERATIONS, EPISODES = 512, 16, 400, 2
BELIEFS = BeliefConfig(
    decode="new", kl="before", prefixes=None, epochs=2, environments=192, minibatches=3, lr=5e-3, last_lr=3e-4
)
#: First standard deviation of a reading around what the line says: where it begins at 1, half the pipe, the belief has
#: nothing to say until it has come down.
NOISE = 0.1
#: Of the next readings, in their central intervals of 90%.
COVERAGE = between(0.85, 0.95)
DRAWS = 200


class SteeringDecoder(LinearDecoder):
    """Changes of the readings by actions; one whose largest entry is above 1 counts as divided by it, as in the line.

    It takes the arguments of :class:`~bayesmeta.rl.LinearDecoder`.
    """

    def output(self, z: Tensor, x: Tensor) -> Tensor:
        """As in :class:`~bayesmeta.rl.LinearDecoder`."""
        return super().output(z, x / x.abs().amax(-1, keepdim=True).clamp(min=1.0))


def untrained(family: BeamSteering, config: PPOConfig, seed: int, quick: bool) -> VariBAD:
    """VariBAD before its training; ``quick`` for a few short iterations."""
    envs, iterations = (32, 3) if quick else (ENVS, ITERATIONS)
    env = TensorVectorEnv(family, envs, new_tasks=True, episodes_per_trial=EPISODES, generator=seed)
    spec = ContextSpec.of(env, inputs=("action",), targets=("change",))
    latent = LatentContext.make(spec, LATENT, "product", width=WIDTH, seed=seed)
    noise = Gaussian([NOISE] * spec.outputs, learn_scale=True)
    decoder = SteeringDecoder(spec, LATENT, noise, hidden=(), offset=False, seed=seed)
    policy = BeliefPolicy(env, latent, units=UNITS, gamma=config.gamma, log_std=-1.0, seed=seed)
    return VariBAD(env, policy, decoder, config=config, beliefs=BELIEFS, iterations=iterations, steps=STEPS, seed=seed)


def coverage_rows(run: VariBAD, env: TensorVectorEnv, seed: int, bars: dict[str, Bar]) -> list[Row]:
    """Coverage of the next readings on the way through a trial, by the belief from the readings before; its sharpness.

    Steps count until the last trial is over; standard errors are over environments.
    """
    path, _ = run.belief_path(env, generator=seed)
    longest = int(path.context.full_mask().sum(-1).max())
    found = next_calibration(path, range(longest), num_samples=DRAWS, generator=seed)
    coverage, error = found["coverage_90"], found.standard_errors["coverage_90"]
    judged = bars["coverage"].judge(coverage) if "coverage" in bars else {}
    steps = float(path.context.full_mask().sum(-1).double().mean())
    print(f"next readings: coverage {coverage:.3f} of 90%, over {steps:.1f} steps a trial", flush=True)
    gained = Figure.of(log_score_gained(path, run.decoder))
    print(f"next readings: log score {gained} nats a step above that of the prior", flush=True)
    return [
        Row("varibad_next_readings_coverage", coverage, 0.9, standard_error=error, **judged),
        Row("varibad_next_readings_log_score_gained", gained.mean, standard_error=gained.error),
    ]


def log_score_gained(path: BeliefPath, decoder: TransitionDecoder) -> Tensor:
    """log p(next readings | belief) − log p(next readings | prior), each task's mean over its steps, ``[tasks]``."""
    loc, scale = path.loc[:-1].transpose(0, 1), path.scale[:-1].transpose(0, 1)
    valid = path.context.full_mask()
    before = log_density_of_next(path, decoder, torch.zeros_like(loc), torch.ones_like(scale))
    gained = torch.where(valid, log_density_of_next(path, decoder, loc, scale) - before, 0.0)
    return gained.sum(1) / valid.sum(1)


@torch.no_grad()
def log_density_of_next(path: BeliefPath, decoder: TransitionDecoder, loc: Tensor, scale: Tensor) -> Tensor:
    """Log density of each transition under a Gaussian over z, ``[tasks, steps]``; exact, as outputs are affine in z.

    Args:
        path: whose transitions are meant.
        decoder: affine in z, with Gaussian noise.
        loc, scale: of z before each transition, ``[tasks, steps, D]``.
    """
    x, y = path.context.x.double(), path.context.y
    assert y is not None
    decoder = copy.deepcopy(decoder).double()
    assert isinstance(decoder.likelihood, Gaussian)
    units = torch.cat([torch.zeros(1, LATENT), torch.eye(LATENT)]).to(x)
    outputs = decoder.output(units.unsqueeze(1).expand(-1, len(x), -1), x)  # at 0 and at each unit vector
    slopes = (outputs[1:] - outputs[0]).permute(1, 2, 3, 0)  # [tasks, steps, outputs, D]
    mean = outputs[0] + (slopes @ loc.to(x).unsqueeze(-1)).squeeze(-1)
    spread = slopes * scale.to(x).unsqueeze(-2)
    noise = torch.diag_embed(decoder.likelihood.scale.square().expand_as(mean))
    following: Any = torch.distributions.MultivariateNormal(mean, spread @ spread.mT + noise)
    return following.log_prob(y.to(x))
