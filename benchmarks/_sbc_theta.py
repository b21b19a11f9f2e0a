"""SBC of global parameters θ: many small hierarchies at once, whose posteriors are independent of one another.

Hierarchy s has three tasks: μ_s ~ N(0, 1), φ_st ~ N(μ_s, τ_s²), two observations y ~ N(φ_st, 1) each. τ_s is 0.8, where
the joint posterior of (μ_s, φ_s) is known in closed form, or has a LogNormal(−0.3, 0.4) of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import bayesmeta as bm
from bayesmeta.ops.random import as_generator
from benchmarks._sbc_methods import NUTS, QUICK_NUTS

TASKS, SHOTS, TAU = 3, 2, 0.8
LOG_TAU = (-0.3, 0.4)
NUM_DRAWS = 31
#: chains of at most so many hierarchies, as in a quick run, are shorter
SHORT, SHORT_NUTS = 50, {**NUTS, **QUICK_NUTS}

Values = dict[str, Tensor]


def program(count: int, learn_tau: bool) -> Callable[..., None]:
    """``count`` hierarchies as one program; x holds the number of a task's hierarchy."""

    def own(value: Tensor, x: Tensor) -> Tensor:
        """Each task's own of the values of all hierarchies, ``[…, tasks, 1]``."""
        found = value[..., x[:, 0, 0].long()]
        return (found.flatten(-3) if found.dim() >= 3 else found).unsqueeze(-1)

    def model(x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> None:
        mu = own(pyro.sample("mu", dist.Normal(x.new_zeros(count), 1.0).to_event(1)), x)
        tau: Any = TAU
        if learn_tau:
            tau = own(pyro.sample("tau", dist.LogNormal(x.new_full((count,), LOG_TAU[0]), LOG_TAU[1]).to_event(1)), x)
        with bm.task_plate(x):
            phi = pyro.sample("phi", dist.Normal(mu, tau))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(phi + 0.0 * x.squeeze(-1), 1.0), obs=y)

    return model


def simulate(count: int, learn_tau: bool, generator: torch.Generator) -> tuple[Values, Tensor]:
    """Truth by name, ``[count]`` each, and y ``[count, TASKS, SHOTS]``, by hand."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    mu = normal()
    tau = (LOG_TAU[0] + LOG_TAU[1] * normal()).exp() if learn_tau else torch.full((count,), TAU)
    phi = mu.unsqueeze(-1) + tau.unsqueeze(-1) * normal(TASKS)
    y = phi.unsqueeze(-1) + normal(TASKS, SHOTS)
    truth = {"mu": mu, "phi": phi[:, 0], "log_likelihood": log_likelihood(phi, y)}
    return (truth | {"tau": tau} if learn_tau else truth), y


def log_likelihood(phi: Tensor, y: Tensor) -> Tensor:
    """Of each hierarchy, for phi ``[…, count, TASKS]``."""
    return -0.5 * (y - phi.unsqueeze(-1)).square().sum((-1, -2))


def observations(y: Tensor) -> bm.Observations:
    """All tasks of all hierarchies as one batch."""
    index = torch.arange(len(y)).repeat_interleave(TASKS).float()
    return bm.Observations(index.reshape(-1, 1, 1).expand(-1, SHOTS, 1), y.flatten(0, 1))


def read(posterior: Any, y: Tensor) -> Values:
    """Draws by name, ``[NUM_DRAWS, count]`` each, of a posterior made of at least as many; evenly spaced."""
    draws = posterior.draws(posterior.num_draws)
    chosen = torch.arange(NUM_DRAWS) * posterior.num_draws // NUM_DRAWS
    theta = {name: value[chosen] for name, value in posterior.named_theta(draws).items()}
    phi = posterior.named(draws)["phi"][chosen].unflatten(-1, (len(y), TASKS))
    return {**theta, "phi": phi[..., 0], "log_likelihood": log_likelihood(phi, y)}


# -- inference --------------------------------------------------------------------------------------------------------


def exact(y: Tensor, learn_tau: bool, seed: int) -> Values:
    """The joint Gaussian of (μ, φ) given each hierarchy's data; for known τ."""
    assert not learn_tau
    prior = torch.ones(TASKS + 1, TASKS + 1) + torch.diag(torch.tensor([0.0] + [TAU**2] * TASKS))
    gain = prior[:, 1:] @ torch.linalg.inv(prior[1:, 1:] + torch.eye(TASKS) / SHOTS)
    root = torch.linalg.cholesky(prior - gain @ prior[1:])
    noise = torch.randn(NUM_DRAWS, len(y), TASKS + 1, generator=as_generator(seed, stream="exact hierarchy"))
    draws = y.mean(-1) @ gain.mT + noise @ root.mT
    return {"mu": draws[..., 0], "phi": draws[..., 1], "log_likelihood": log_likelihood(draws[..., 1:], y)}


def chain(y: Tensor, learn_tau: bool, seed: int) -> Values:
    """NUTS over all μ, τ and φ together."""
    sampler = bm.NUTS(program(len(y), learn_tau), infer_theta=True, **(NUTS if len(y) > SHORT else SHORT_NUTS))
    return read(sampler.adapt(observations(y), generator=seed), y)


def variational(kind: Any, block: int, steps: int = 600) -> Callable[[Tensor, bool, int], Values]:
    """MetaSVI with an AutoGuide over θ and φ, of ``block`` hierarchies at a time."""

    def infer(y: Tensor, learn_tau: bool, seed: int) -> Values:
        parts = [_fitted(kind, part, learn_tau, seed + 1000 * i, steps) for i, part in enumerate(y.split(block))]
        return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}

    return infer


def _fitted(kind: Any, y: Tensor, learn_tau: bool, seed: int, steps: int) -> Values:
    model, data = program(len(y), learn_tau), observations(y)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        svi = bm.MetaSVI(model, kind(model), lambda p: torch.optim.Adam(p, 0.05), elbo)
        for step in range(steps):
            svi.step(data)
            assert svi.optimizer is not None
            svi.optimizer.param_groups[0]["lr"] = 0.05 * 0.01 ** (step / steps)
    return read(svi.posterior(data, NUM_DRAWS, generator=seed), y)


@dataclass(frozen=True)
class Theta:
    """One way to infer θ.

    Attributes:
        infer: from y, whether τ is to be inferred, and a seed, to draws by name.
        learn_tau: whether τ is unknown.
        exact: whether it must pass.
        hierarchies: of a full run; a quick one has a fifth.
    """

    infer: Callable[[Tensor, bool, int], Values]
    learn_tau: bool = False
    exact: bool = False
    hierarchies: int = 150


RUNS: dict[tuple[str, str], Theta] = {
    ("closed_form", "hierarchy"): Theta(exact, exact=True, hierarchies=2000),
    ("nuts_theta", "hierarchy"): Theta(chain, exact=True),
    ("nuts_theta", "hierarchy_scale"): Theta(chain, learn_tau=True, exact=True),
    ("meta_svi_normal", "hierarchy"): Theta(variational(AutoNormal, 600, 400), hierarchies=600),
    ("meta_svi_multivariate", "hierarchy"): Theta(variational(AutoMultivariateNormal, 25), hierarchies=150),
    ("meta_svi_normal", "hierarchy_scale"): Theta(variational(AutoNormal, 600, 400), learn_tau=True, hierarchies=600),
}


def judge(run: Theta, count: int, seed: int, alpha: float) -> bm.SBC:
    """The ranks of one way."""

    def simulated(generator: torch.Generator) -> tuple[Values, Tensor]:
        return simulate(count, run.learn_tau, generator)

    return bm.sbc(
        simulated,
        lambda y: run.infer(y, run.learn_tau, seed),
        num_simulations=1,
        num_draws=NUM_DRAWS,
        alpha=alpha,
        generator=seed,
    )
