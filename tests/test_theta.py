"""q(θ) over global sites: Gaussian, low rank, Pyro's AutoGuides."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of

F64 = torch.float64
KINDS = ["normal", "low_rank", AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal]


def two_globals(x, y=None, mask=None):
    """y ~ N(a + b x + level, 1): a and b are correlated under the posterior, since x is far from 0."""
    a = pyro.sample("a", dist.Normal(x.new_zeros(()), 2.0))
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 2.0))
    with bm.task_plate(x):
        level = pyro.sample("level", dist.Normal(x.new_zeros(()), 0.3))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(a + b * x.squeeze(-1) + level, x.new_ones(())), obs=y)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_their_density_and_the_elbo_is_pyros(kind):
    dtype = torch.float32 if kind is AutoIAFNormal else F64  # Pyro inverts it in single precision only
    observations = batch_of(5, 4, dtype=dtype)
    batch = bm.TaskBatch(observations, batch_of(5, 6, seed=1, dtype=dtype), population=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = bm.ABML(two_globals, inner_steps=1, inner_lr=0.01, global_guide=kind).to(dtype)
        method.prepare(batch)
    guide = method.theta_guide
    draws = guide.draw(6, 0)
    assert draws.shape == (6, 2)
    assert draws.dtype == dtype
    assert torch.equal(draws, guide.draw(6, 0))
    torch.testing.assert_close(guide.log_density(draws), guide.distribution().log_prob(draws))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        n = 40
        ours = torch.stack([5 * method.loss(batch, generator=i) for i in range(n)])
        theirs = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(n)])
    assert abs(float(ours.mean() - theirs.mean())) < 4 * math.sqrt(float(ours.var() + theirs.var()) / n)
    method.loss(batch).backward()
    gradients = [p.grad for p in guide.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)
    posterior = method.adapt(batch.support)
    assert posterior.named_theta(posterior.draws(40))["a"].shape == (40,)
    assert len(pyro.get_param_store()) == 0


def exact_theta(observations):
    """Mean and covariance of (a, b) when q(level) is held at its prior: E_q log p is the density of noise 1."""
    precision, right = torch.diag(torch.full((2,), 0.25, dtype=F64)), torch.zeros(2, dtype=F64)
    for x, y in zip(observations.x, observations.y):
        design = torch.cat([torch.ones_like(x), x], -1)
        precision, right = precision + design.T @ design, right + design.T @ y
    covariance = torch.linalg.inv(precision)
    return covariance @ right, covariance


@pytest.mark.parametrize("kind", ["normal", "low_rank", AutoMultivariateNormal])
def test_a_correlated_posterior_needs_correlations(kind):
    generator = torch.Generator().manual_seed(0)
    x = 2.0 + torch.randn(20, 6, 1, generator=generator, dtype=F64)
    observations = bm.Observations(x, 0.5 - x.squeeze(-1) + torch.randn(20, 6, generator=generator, dtype=F64))
    batch = bm.TaskBatch(observations, bm.Observations(x[:, :0], observations.y[:, :0]), population=20)
    method = bm.ABML(two_globals, inner_steps=0, num_particles=1, global_guide=kind).double()
    method.prepare(batch)
    optimizer = torch.optim.Adam(method.parameters(), 0.05)
    schedule = bm.schedules.linear_fall(300, last=0.5)(optimizer)
    for step in range(300):
        optimizer.zero_grad()
        method.loss(batch, generator=step).backward()
        optimizer.step()
        schedule.step()
    draws = method.theta_guide.draw(20_000, 0).detach()
    mean, covariance = exact_theta(observations)
    exact = (covariance[0, 1] / covariance.diagonal().prod().sqrt()).item()
    found = torch.corrcoef(draws.T)[0, 1].item()
    assert exact < -0.7
    assert ((draws.mean(0) - mean).abs() < 0.5 * covariance.diagonal().sqrt()).all()
    if kind == "normal":  # the control: a mean field cannot
        assert abs(found) < 0.05
    else:
        assert found < 0.5 * exact


def test_a_saved_autoguide_comes_back():
    batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 4, seed=1), population=3)
    first, second = (bm.ABML(TwoSites(), inner_steps=1, global_guide=AutoMultivariateNormal) for _ in range(2))
    first.prepare(batch)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.3)
    second.prepare(batch)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.theta_guide.draw(5, 1), second.theta_guide.draw(5, 1))
    assert first.config()["global_guide"] == "AutoMultivariateNormal"


@pytest.mark.parametrize("kind", ["full", 3, AutoNormal, AutoLaplaceApproximation, torch.nn.Linear])
def test_what_is_no_guide_of_global_sites(kind):
    with pytest.raises(errors.OptionError, match="global_guide"):
        bm.ABML(TwoSites(), global_guide=kind)


def test_a_function_that_makes_another_guide():
    method = bm.ABML(TwoSites(), global_guide=lambda model, init_loc_fn: AutoNormal(model))
    with pytest.raises(errors.OptionError, match="AutoContinuous"):
        method.prepare(batch_of(3, 4))
