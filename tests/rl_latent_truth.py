"""A latent context whose exact posterior is known: Gaussian bandits, where z are the arms' means."""

import math

import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.models.encoders import ProductEncoder
from bayesmeta.models.recognition import Recognition
from bayesmeta.ops.random import as_generator
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.rollout import Acted, collect

ARMS, NOISE = 3, 0.7


class ExactArms(ProductEncoder):
    """A pull of arm k that brought r is a factor of precision 1 / noise² in dimension k. ``wrong`` scales it."""

    def __init__(self, arms=ARMS, noise=NOISE, wrong=1.0):
        super().__init__(arms, 1, arms)
        self.arms, self.precision = arms, wrong / noise**2

    def factors(self, observations, given=None):
        rows, mask = self.rows(observations)
        arm, reward = rows[..., : self.arms], rows[..., self.arms :]
        return self.precision * reward * arm, self.precision * arm, mask


class Pulled(nn.Module):
    """The mean of the arm that is pulled."""

    def __init__(self, arms=ARMS):
        super().__init__()
        self.arms = arms

    def forward(self, row):
        return (row[..., : self.arms] * row[..., self.arms :]).sum(-1, keepdim=True)


class Uniform:
    """An actor of uniform actions."""

    def __init__(self, actions):
        self.actions = actions

    def __call__(self, moment, state, generator):
        n = len(moment.begins)
        action = torch.randint(self.actions, (n,), generator=generator)
        return Acted(action, torch.full((n,), 1.0 / self.actions).log().to(moment.reward.dtype))


def bandit_env(tasks, horizon=8, seed=0, copies=1, **options):
    family = bm.rl.GaussianBandit(arms=ARMS, horizon=horizon, noise=NOISE, **options)
    return bm.rl.TensorVectorEnv(family, tasks, copies=copies, generator=seed, dtype=torch.float64)


def a_spec(env=None, **options):
    return ContextSpec.of(bandit_env(1) if env is None else env, inputs=("action",), **options)


def pulls(tasks, horizon=8, seed=0, **options):
    """Arms' means ``[tasks, arms]`` and the context of uniform pulls."""
    env = bandit_env(tasks, horizon, seed, **options)
    rollout = collect(env, Uniform(ARMS), horizon, generator=as_generator(seed, stream="pulls"))
    return env.tasks.mean, a_spec(env).of_rollout(rollout)


def exact(wrong=1.0, **options):
    """The latent context whose q is the posterior; its scale is too small where ``wrong`` is above 1."""
    return LatentContext(Recognition(ExactArms(wrong=wrong).double(), ARMS, "diagonal"), a_spec(), **options)


def exact_decoder():
    """The likelihood that goes with it."""
    decoder = TransitionDecoder(a_spec(), ARMS, bm.Gaussian(NOISE), network=Pulled(), dtype=torch.float64)
    decoder.likelihood.log_scale.fill_(math.log(NOISE))  # which was made in float32
    return decoder


def design(context):
    """Arms pulled as a matrix ``[tasks, shots, arms]``, rows that do not count 0, and rewards likewise."""
    keep = context.full_mask()
    return context.x * keep.unsqueeze(-1), torch.where(keep, context.y, 0.0)


def closed_form(context):
    """Mean and covariance of z given the context, by linear algebra of matrices: ``[tasks, D]``, ``[tasks, D, D]``."""
    a, y = design(context)
    covariance = torch.linalg.inv(torch.eye(ARMS, dtype=a.dtype) + a.mT @ a / NOISE**2)
    return (covariance @ a.mT @ y.unsqueeze(-1) / NOISE**2).squeeze(-1), covariance


def log_evidence(context):
    """log p(y) of each task by the joint density of its rewards, one task at a time."""
    out = []
    for x, y, mask in zip(context.x, context.y, context.full_mask(), strict=True):
        a = x[mask]
        if not len(a):
            out.append(a.new_zeros(()))
            continue
        joint = torch.distributions.MultivariateNormal(
            torch.zeros(len(a), dtype=a.dtype), NOISE**2 * torch.eye(len(a), dtype=a.dtype) + a @ a.T
        )
        out.append(joint.log_prob(y[mask]))
    return torch.stack(out)
