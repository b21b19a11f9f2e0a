"""Figures of a belief about Bernoulli arms, and the same of the exact Beta posterior: for ``benchmarks.rl_beliefs``.

Every figure is a number of each task, ``[tasks]``, from draws of the arms' means, ``[draws, tasks, arms]``, and what
was seen. Whose draws they are is not asked: belief, exact posterior and negative controls are measured alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.baselines.bandits import BetaBelief, ThompsonSampling
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.checks import LEVELS, arm_rows, expected_reward
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.rollout import Acted, Actor, Moment
from bayesmeta.rl.varibad.decoder import LinearDecoder

#: Variance of a uniform mean.
PRIOR_VARIANCE = 1 / 12
FIGURES = ("coverage_90", "coverage_50", "distance", "spread", "log_score_lost", "contraction")


class ArmsDecoder(LinearDecoder):
    """Log-odds of each arm: u + β u³ with u = A z, β learned and 0 at first.

    A normal u makes a mean that is logit-normal, which is a uniform one for no A; with a cube it can be, to a
    thousandth. At first A has rows of length ``FIRST``, so that the arms are independent and nearly uniform before
    anything is seen: PyTorch's own first weights say that all arms are near a half, and training leaves that slowly.

    Args:
        spec, latent, seed: as in :class:`~bayesmeta.rl.LinearDecoder`.
        rotated: whether the first A is a random rotation, else each arm begins with a dimension of its own, but for
            some noise. The prior of z looks the same from all sides, and a decoder may be turned as it likes; a
            Gaussian without correlations is at its best where arms have their own dimensions.
    """

    FIRST, NOISE = 1.7, 0.1

    def __init__(self, spec: ContextSpec, latent: int, *, rotated: bool = False, seed: Seed = None) -> None:
        super().__init__(spec, latent, hidden=(), offset=False, seed=seed)
        generator = as_generator(seed, stream="arms")
        weight, bias = self.network.parameters()  # of one layer
        noise = torch.randn(latent, weight.shape[0], generator=generator)
        with torch.no_grad():
            own = self.FIRST * torch.eye(*weight.shape) + self.NOISE * noise.T
            weight.copy_(self.FIRST * torch.linalg.qr(noise).Q.T if rotated else own)
            bias.zero_()
        self.cube = torch.nn.Parameter(torch.zeros(()))

    def output(self, z: Tensor, x: Tensor) -> Tensor:
        """As in :class:`~bayesmeta.rl.LinearDecoder`, with the cube."""
        u = super().output(z, x)
        return u + self.cube * u.pow(3)


# -- who pulls ---------------------------------------------------------------------------------------------------------


def uniform(arms: int) -> Actor:
    """Any arm, whatever happened."""

    def act(moment: Moment, state: Any, generator: torch.Generator) -> Acted:
        n = len(moment.begins)
        return Acted(torch.randint(arms, (n,), generator=generator), torch.zeros(n))

    return act


def thompson(arms: int, horizon: int) -> Actor:
    """Thompson sampling from the exact posterior: most pulls are of one or two arms. For one trial."""

    def act(moment: Moment, state: BetaBelief | None, generator: torch.Generator) -> Acted:
        n = len(moment.begins)
        if state is None:
            state = BetaBelief(n, arms, moment.reward.device)
        else:
            state.update(moment.action, moment.reward)
        scores = ThompsonSampling().scores(state, int(moment.clock[0]), horizon, generator)
        return Acted(scores.argmax(-1), torch.zeros(n), state)

    return act


# -- figures -----------------------------------------------------------------------------------------------------------


def arms_of(path: BeliefPath, spec: ContextSpec, z: Tensor) -> Tensor:
    """What the decoder makes of draws of z ``[n, tasks, D]``: means of the arms ``[n, tasks, arms]``."""
    return expected_reward(path.program, spec, z, arm_rows(spec, z))


def exact_draws(won: Tensor, lost: Tensor, draws: int, seed: int) -> Tensor:
    """Draws of the exact posterior, ``[draws, tasks, arms]``."""
    belief = BetaBelief(len(won), won.shape[1], won.device)
    belief.pulls, belief.total = won + lost, won
    generator = as_generator(seed, stream="exact arms")
    return torch.stack([belief.draw(generator) for _ in range(draws)])


def figures(draws: Tensor, won: Tensor, lost: Tensor, means: Tensor) -> dict[str, Tensor]:
    """Means over the arms, ``[tasks]`` each.

    ``coverage_90`` and ``coverage_50``: is the true mean in the central interval? ``distance``: of the belief's mean
    from the exact posterior's. ``spread``: the belief's standard deviation, in units of the exact one.
    ``log_score_lost``: of the next pull of an arm, how much less is to be expected than of the exact posterior, in nats
    (the KL of the two forecasts). ``contraction``: 1 − variance / that of a uniform mean.

    Args:
        draws: of the belief, ``[n, tasks, arms]``.
        won, lost: pulls that were seen, ``[tasks, arms]``.
        means: the true ones, ``[tasks, arms]``.
    """
    draws, means = draws.double(), means.double()
    a, b = won.double() + 1, lost.double() + 1
    exact, deviation = a / (a + b), (a * b / (a + b + 1)).sqrt() / (a + b)
    mean = draws.mean(0).clamp(1e-6, 1 - 1e-6)  # a forecast of 0 or 1 that fails costs without bound
    lost_score = exact * (exact / mean).log() + (1 - exact) * ((1 - exact) / (1 - mean)).log()
    found = {
        "distance": (mean - exact).abs(), "spread": draws.std(0) / deviation,
        "log_score_lost": lost_score, "contraction": 1 - draws.var(0) / PRIOR_VARIANCE,
    }  # fmt: skip
    for level in LEVELS:
        low, high = (draws.quantile(0.5 + sign * level / 2, 0) for sign in (-1, 1))
        found[f"coverage_{level * 100:.0f}"] = ((means >= low) & (means <= high)).double()
    return {name: value.mean(-1) for name, value in found.items()}


# -- NUTS --------------------------------------------------------------------------------------------------------------


def nuts_draws(path: BeliefPath, step: int, seed: int, *, kept: int, chains: int) -> tuple[Tensor, float, float]:
    """Draws of z ``[n, tasks, D]`` of the exact posterior under the decoder; the largest R-hat, the smallest ESS."""
    belief = path.at(step)
    nuts = bm.NUTS(path.program, num_samples=kept, warmup=kept, num_chains=chains, max_tree_depth=6)
    found = nuts.adapt(belief.support, generator=seed, start=belief)
    told = found.diagnostics()
    return found.u, told.max_rhat, told.min_ess
