"""ABML against the mean-field optimum, Pyro's ELBO, and finite differences."""

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

import bayesmeta as bm
from bayesmeta import errors
from tests.numerics import by_finite_differences
from tests.programs import LinearHierarchy, TwoSites, batch_of

SEEDS = 16


def correlated(seed=0):
    """Tasks whose posterior is correlated: both features are nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(2, 6, 1, generator=generator, dtype=torch.float64)
    x = shared + 0.6 * torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return bm.Observations(x, y)


def test_the_mean_field_optimum_of_the_linear_gaussian_hierarchy():
    """Exact mean and variance 1/Λ_jj (Bishop 2006, section 10.1.2), and not the marginal variance: the control."""
    mean, scale, noise = torch.tensor([0.3, -0.2]).double(), torch.tensor([1.0, 1.5]).double(), 0.7
    program = LinearHierarchy(mean, scale, noise)
    method = bm.ABML(program, inner_steps=250, inner_lr=0.1, inner_lr_scale=0.3, num_particles=300)
    support = correlated()
    precision = torch.diag(scale**-2) + support.x.mT @ support.x / noise**2
    right = mean / scale**2 + (support.x.mT @ support.y.unsqueeze(-1)).squeeze(-1) / noise**2
    exact_mean = torch.linalg.solve(precision, right)
    exact_variance = 1 / precision.diagonal(dim1=-2, dim2=-1)
    marginal = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1)
    results = [method.adapt(support, generator=seed) for seed in range(SEEDS)]
    locs = torch.stack([r.loc[0] for r in results])
    log_variances = torch.stack([2 * r.scale[0].log() for r in results])
    for found, truth in ((locs, exact_mean), (log_variances, exact_variance.log())):
        error = found.std(0) / math.sqrt(SEEDS)
        assert ((found.mean(0) - truth).abs() / error).max() < 4.5  # t with 15 degrees of freedom, 4 comparisons
    error = log_variances.std(0) / math.sqrt(SEEDS)
    assert ((log_variances.mean(0) - marginal.log()).abs() / error).min() > 20


@pytest.mark.parametrize("kind", ["program", "network", "global"])
def test_pyros_elbo_agrees_with_the_loss(kind):
    torch.manual_seed(0)
    tasks = 3
    batch = bm.TaskBatch(batch_of(tasks, 4, ragged=True), batch_of(tasks, 3, seed=1), population=tasks)
    if kind == "program":
        model = LinearHierarchy(torch.zeros(1), torch.ones(1), 0.7)
    elif kind == "network":
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1, activation="tanh"), bm.Gaussian(0.5), bm.priors.Normal(0.3))
    else:
        model = TwoSites()
    inner_lr = 0.2 if kind == "network" else 0.05
    method = bm.ABML(model, inner_steps=4, inner_lr=inner_lr, num_particles=4, global_guide="normal")
    n = 300
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        ours = torch.stack([tasks * method.loss(batch, generator=generator) for _ in range(n)])
        elbo = Trace_ELBO()
        theirs = torch.tensor([elbo.loss(method.model, method.guide, batch) for _ in range(n)])
        method.inner_steps = 0  # control: a guide that does not adapt has another ELBO
        lazy = torch.tensor([elbo.loss(method.model, method.guide, batch) for _ in range(n)])
    error = math.sqrt(float(ours.var() + theirs.var()) / n)
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error
    error = math.sqrt(float(lazy.var() + theirs.var()) / n)
    assert abs(float(lazy.mean() - theirs.mean())) > 6 * error
    assert len(pyro.get_param_store()) == 0


def test_vectorised_particles_give_the_same_elbo():
    batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 3, seed=1))
    method = bm.ABML(TwoSites(), inner_steps=1, inner_lr=0.05, global_guide="normal")
    n = 300
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        one = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(n)])
        many = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
        four = torch.tensor([many.loss(method.model, method.guide, batch) for _ in range(n // 4)])
    error = math.sqrt(float(one.var()) / n + float(four.var()) / len(four))
    assert abs(float(one.mean() - four.mean())) < 4 * error


@pytest.mark.parametrize("objective", ["elbo", "predictive"])
@pytest.mark.parametrize("kind", ["program", "network"])
def test_meta_gradient_by_finite_differences(objective, kind):
    torch.manual_seed(0)
    if kind == "program":
        model = TwoSites().double()
    else:
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1, activation="tanh"), bm.Gaussian(0.5)).double()
    batch = bm.TaskBatch(
        batch_of(2, 4, dtype=torch.float64, ragged=True), batch_of(2, 3, seed=1, dtype=torch.float64), population=2
    )
    method = bm.ABML(model, inner_steps=2, inner_lr=0.02, objective=objective, global_guide="normal")
    method.prepare(batch)
    method.loss(batch, generator=5).backward()
    checked = 0
    for parameter in method.parameters():
        for i in range(min(parameter.numel(), 3)):
            slope = by_finite_differences(method, batch, parameter, i, generator=5)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-5)
            checked += abs(slope) > 1e-3
    assert checked >= 3


def test_global_site_is_inferred_as_in_the_exact_hierarchy():
    """Full hierarchical Bayes by the same call: q(mu) against the exact posterior of mu, the tasks integrated out."""
    import pyro.distributions as dist

    def program(x, y=None, mask=None):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), x.new_tensor(10.0)))
        with bm.task_plate(x):
            level = pyro.sample("level", dist.Normal(mu, x.new_ones(())))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(level + 0 * x.squeeze(-1), x.new_tensor(0.5)), obs=y)

    tasks, shots = 30, 5
    generator = torch.Generator().manual_seed(0)
    level = 3 + torch.randn(tasks, 1, generator=generator)
    y = level + 0.5 * torch.randn(tasks, shots, generator=generator)
    everything = bm.Observations(torch.zeros(tasks, shots, 1), y)
    batch = bm.TaskBatch(everything, bm.Observations(torch.zeros(tasks, 0, 1), y[:, :0]), population=tasks)
    method = bm.ABML(program, inner_steps=40, inner_lr=0.2, num_particles=8, global_guide="normal")
    method.prepare(batch)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    noise = torch.Generator().manual_seed(1)
    for _ in range(200):
        optimizer.zero_grad()
        method.loss(batch, generator=noise).backward()
        optimizer.step()
        schedule.step()
    each = 1 + 0.25 / shots  # variance of a task's mean given mu
    precision = tasks / each + 1 / 100
    exact_mean, exact_sd = float(y.mean(-1).sum() / each / precision), precision**-0.5
    guide = method.theta_guide
    # the guide's φ depends on θ (it adapts given θ), so q(θ) can reach the exact marginal posterior
    assert abs(guide.loc.item() - exact_mean) < 0.5 * exact_sd
    assert 0.7 < guide.log_scale.exp().item() / exact_sd < 1.4
    posterior = method.adapt(everything, num_theta=8)
    assert posterior.loc.shape == (8, tasks, 1)
    assert set(posterior.named_theta(posterior.draws(16))) == {"mu"}


def test_no_support_is_the_prior():
    observations = batch_of(2, 3)
    none = bm.Observations(observations.x, observations.y, torch.zeros(2, 3, dtype=torch.bool))
    empty = bm.Observations(observations.x[:, :0], observations.y[:, :0])
    method = bm.ABML(TwoSites(), inner_steps=3, inner_lr=0.1)
    method.prepare(observations)
    loc, scale = method.program.prior_moments(observations, method.theta_guide.loc)
    for support in (none, empty):
        posterior = method.adapt(support)
        torch.testing.assert_close(posterior.loc[0], loc)
        torch.testing.assert_close(posterior.scale[0], scale)


def test_the_same_seed_gives_the_same_posterior():
    method = bm.ABML(TwoSites())
    observations = batch_of(2, 3)
    a, b, c = (method.adapt(observations, generator=seed).loc for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_posterior_with_several_thetas_is_no_single_guide():
    method = bm.ABML(TwoSites(), global_guide="normal")
    posterior = method.adapt(batch_of(2, 3), num_theta=4)
    with pytest.raises(errors.UnsupportedError, match=r"method\.guide"):
        posterior()
    u = posterior.draws(100).u
    each = torch.stack(
        [torch.distributions.Normal(posterior.loc[g], posterior.scale[g]).log_prob(u).sum(-1) for g in range(4)]
    )
    torch.testing.assert_close(posterior.log_prob(u), each.logsumexp(0) - math.log(4))
