"""BMAML against exact posteriors, loops and finite differences."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.adapt import bmaml
from bayesmeta.ops.svgd import rbf_kernel
from tests.numerics import slopes
from tests.programs import LinearHierarchy, TwoSites, batch_of
from tests.test_svgd import by_loops

F64 = torch.float64


def hierarchy():
    mean, scale = torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([1.0, 0.7], dtype=F64)
    return LinearHierarchy(mean, scale, torch.tensor(0.8, dtype=F64)), mean, scale


def network(prior="normal", seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = bm.nets.mlp(1, [3], 1, activation="tanh")
    return bm.NeuralTaskModel(net, bm.Gaussian(0.5, learn_scale=True), prior, **options).double()


def task_batch(tasks=3, features=1, ragged=True):
    support = batch_of(tasks, 4, features, dtype=F64, ragged=ragged)
    return bm.TaskBatch(support, batch_of(tasks, 5, features, seed=1, dtype=F64), population=tasks)


# -- the posterior ------------------------------------------------------------------------------------------------

PARTICLES = 100


def distances():
    """Of mean and variance from the exact ones, in standard errors of as many independent draws: the largest of each.

    Linear regression with known noise and a Gaussian prior, tasks of different sizes.
    """
    noise, scale, mean = 0.8, 1.0, torch.tensor([0.5, -1.0], dtype=F64)
    linear = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    model = bm.NeuralTaskModel(linear, bm.Gaussian(noise), bm.priors.Normal(scale)).double()
    model.prior.loc.data.copy_(mean)
    support = batch_of(3, 6, 2, dtype=F64, ragged=True)
    method = bm.BMAML(model, num_particles=PARTICLES, inner_steps=400, inner_lr=1.0)
    u = method.adapt(support).u
    x = support.x * support.full_mask().unsqueeze(-1)
    precision = torch.eye(2, dtype=F64) / scale**2 + x.mT @ x / noise**2
    shift = mean / scale**2 + (x.mT @ support.y.unsqueeze(-1)).squeeze(-1) / noise**2
    exact_mean = torch.linalg.solve(precision, shift)
    exact_var = precision.inverse().diagonal(dim1=-2, dim2=-1)
    in_mean = (u.mean(0) - exact_mean).abs() / (exact_var / PARTICLES).sqrt()
    in_var = (u.var(0) / exact_var - 1).abs() / (2 / PARTICLES) ** 0.5
    return in_mean.max().item(), in_var.max().item()


def test_many_particles_have_the_moments_of_the_exact_posterior():
    """Within one standard error of 100 independent draws (0.1 σ in the mean, 14% in the variance): particles that keep
    apart are better than draws. What is left, about 7% of the variance, falls with their number.
    """
    in_mean, in_var = distances()
    assert in_mean < 1
    assert in_var < 1


@pytest.mark.parametrize("factor", [0.5, 2.0, -0.1], ids=["no factor 2", "twice too much", "wrong sign"])
def test_a_wrong_kernel_gradient_fails(monkeypatch, factor):
    def wrong(particles, score, bandwidth=None):
        kernel, repulsion = rbf_kernel(particles, bandwidth)
        return (torch.einsum("ij...,j...d->i...d", kernel, score) + factor * repulsion) / len(particles)

    monkeypatch.setattr(bmaml, "svgd_direction", wrong)
    assert distances()[1] > 3


@pytest.mark.parametrize("prior", ["point", "normal", "laplace"])
def test_steps_are_those_of_a_loop(prior):
    """Two steps, task by task and pair by pair, with the prior in the score."""
    model, batch = network(prior), task_batch()
    method = bm.BMAML(model, num_particles=3, inner_steps=2, inner_lr=0.2)
    found = method.adapt(batch.support).u
    u = method._start(batch.support).detach()
    counts = batch.support.counts()[:, None]
    for _ in range(2):
        u.requires_grad_()
        joint = model.log_likelihood(u, batch.support).sum(-1) + (
            0 if prior == "point" else model.log_prior(u, batch.support)
        )
        (score,) = torch.autograd.grad(joint.sum(), u)
        u = u.detach()
        pairs = [(i, j) for i in range(3) for j in range(i + 1, 3)]
        h = torch.stack([(u[i] - u[j]).square().sum(-1) for i, j in pairs]).median(0).values / math.log(3)
        u = u + 0.2 / counts * by_loops(u, score, h)
    torch.testing.assert_close(found, u, rtol=1e-10, atol=1e-12)
    method.inner_steps = 1
    assert (method.adapt(batch.support).u - u).abs().max() > 1e-3


def test_posterior_is_the_mixture_at_its_particles():
    method, batch = bm.BMAML(network(), num_particles=3, inner_lr=0.1), task_batch()
    posterior = method.adapt(batch.support)
    each = method.program.log_likelihood(posterior.u, batch.query).sum(-1)
    expected = each.logsumexp(0) - math.log(3)
    found = posterior.predictive(batch.query.x, joint=True).log_prob(batch.query.y)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
    method.eval()
    assert method.loss(batch).item() == pytest.approx(-expected.mean().item(), rel=1e-10)
    assert posterior.draws(6).u.shape == (6, 3, 10)
    with pytest.raises(errors.UnsupportedError, match="no density"):
        method.guide(batch)


def test_every_draw_of_the_global_sites_has_its_particles():
    batch = task_batch()
    method = bm.BMAML(TwoSites(), num_particles=3, inner_lr=0.05, global_guide="normal").double()
    posterior = method.adapt(batch.support, num_theta=4)
    assert posterior.u.shape == (12, 3, 2)
    assert posterior.theta.shape == (12, 1)
    for g in range(4):  # as adapted under that draw alone
        theta = posterior.theta[g : g + 1]
        alone = method._adapt(batch.support, theta, torch.Generator(), create_graph=False)
        torch.testing.assert_close(alone.u, posterior.u[g::4], rtol=1e-10, atol=1e-12)
        assert torch.equal(posterior.theta[g::4], theta.expand(3, 1))
    assert (posterior.u[0] - posterior.u[1]).abs().max() > 1e-6  # the draws do differ


# -- starts -------------------------------------------------------------------------------------------------------


def test_first_particles():
    """Prior draws for a density, a share of the weights' size without one; within 4 standard errors."""
    obs = task_batch().support
    within = 4 / (2 * 200 * 10) ** 0.5
    for prior, expected in ((bm.priors.Normal(0.3), 0.3), (bm.priors.Normal(2.0), 2.0)):
        method = bm.BMAML(network(prior), num_particles=200)
        method.prepare(obs)
        offsets = method._start(obs)[:, 0] - method.program.learned_start(obs)[0]
        assert offsets.std().item() == pytest.approx(expected, rel=within)
    for spread, expected in ((None, 0.5), (2.0, 2.0)):
        method = bm.BMAML(network("point"), num_particles=200, spread=spread)
        method.prepare(obs)
        for block in method.program.blocks.values():
            size = method.program.prior.loc[block].square().mean().sqrt().item()
            found = method.particles[:, block].std(0, correction=0).square().mean().sqrt().item()
            numel = block.stop - block.start
            assert found == pytest.approx(expected * size, rel=4 / (2 * 200 * numel) ** 0.5)
    zeros = network("point")
    torch.nn.init.zeros_(zeros.prior.loc)
    method = bm.BMAML(zeros, num_particles=200)
    method.prepare(obs)
    assert method.particles.std().item() == pytest.approx(0.5, rel=within)  # never all in one place
    program, mean, scale = hierarchy()
    method = bm.BMAML(program, num_particles=2000)
    two = batch_of(3, 4, 2, dtype=F64)
    method.prepare(two)
    start = method._start(two)[:, 0]
    assert ((start.mean(0) - mean).abs() < 4 * scale / 2000**0.5).all()
    assert ((start.std(0) / scale - 1).abs() < 4 / 4000**0.5).all()


def test_starts_follow_the_covariates():
    model = network(covariates=2)
    torch.nn.init.constant_(model.prior.slopes, 0.3)
    support = batch_of(3, 4, dtype=F64)
    w = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    support = bm.Observations(support.x, support.y, w=w)
    method = bm.BMAML(model, num_particles=4)
    method.prepare(support)
    apart = method._start(support)[:, 1] - method._start(support)[:, 0]
    expected = (0.3 * (w[1] - w[0]).sum()).expand(4, 10)
    torch.testing.assert_close(apart.detach(), expected, rtol=1e-10, atol=1e-12)


def varied(x, y=None, mask=None, w=None):
    """A prior whose mean and scale are the task's own covariates."""
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(w[:, :1], w[:, 1:].exp()))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.5), obs=y)


def test_first_particles_of_a_prior_that_differs_between_tasks():
    """About the mean of the tasks' means, root mean square of their scales, whichever task comes first."""
    support, query = batch_of(3, 4, dtype=F64), batch_of(3, 5, seed=1, dtype=F64)
    w = torch.tensor([[5.0, 0.7], [-1.0, -2.0], [0.5, 0.1]], dtype=F64)
    batch = bm.TaskBatch(
        bm.Observations(support.x, support.y, w=w), bm.Observations(query.x, query.y, w=w), task_id=torch.arange(3)
    )
    n = 4000

    def particles(batch):
        method = bm.BMAML(varied, num_particles=n).double()
        method.prepare(batch)
        return method.particles.detach()

    found = particles(batch)
    scale = w[:, 1].exp().square().mean().sqrt()
    assert abs(found.mean() - w[:, 0].mean()) < 4 * scale / n**0.5
    assert abs(found.std() / scale - 1) < 4 / (2 * n) ** 0.5
    assert (w[:, 0] - w[:, 0].mean()).abs().min() > 10 * scale / n**0.5  # control: no task's own mean or scale,
    assert (w[:, 1].exp() / scale - 1).abs().min() > 10 / (2 * n) ** 0.5  # nor the mean of the scales
    assert abs(w[:, 1].exp().mean() / scale - 1) > 10 / (2 * n) ** 0.5
    torch.testing.assert_close(particles(batch.tasks([2, 0, 1])), found, rtol=1e-12, atol=1e-12)
    assert (particles(batch.tasks([0, 1])) - found).abs().max() > 0.1  # control: other tasks
    padded = bm.TaskBatch(batch.support, batch.query, task_id=torch.tensor([0, 1, -1]))  # padding is no task
    assert torch.equal(particles(padded), particles(batch.tasks([0, 1])))


# -- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["point", "normal", "laplace"])
def test_predictive_meta_gradient_by_finite_differences(prior):
    model, batch = network(prior), task_batch()
    method = bm.BMAML(model, num_particles=3, inner_steps=2, inner_lr=0.3, objective="predictive")
    method.loss(batch).backward()
    assert not any(p.grad is None for p in method.parameters())
    for parameter in method.parameters():
        indices = range(min(parameter.numel(), 6))
        expected = slopes(lambda: method.loss(batch).detach(), parameter, indices)
        torch.testing.assert_close(parameter.grad.view(-1)[: len(indices)], expected, rtol=1e-6, atol=1e-6)


def test_marginal_loss_scores_each_query_point_under_the_mixture():
    model, batch = network("normal"), task_batch()
    method = bm.BMAML(model, num_particles=3, inner_steps=2, inner_lr=0.3, objective="marginal")
    method.prepare(batch)
    u, query = method.adapt(batch.support).u, batch.query
    each = model.predictive(u, query).log_prob(query.y)  # by Pyro's distribution, [particles, tasks, shots]
    points = -(each.exp().mean(0).log() * query.full_mask()).sum(-1)
    assert method.loss(batch).item() == pytest.approx(points.mean().item(), rel=1e-10)
    jointly = -((each * query.full_mask()).sum(-1).exp().mean(0).log()).mean()
    assert method.loss(batch).item() != pytest.approx(jointly.item(), rel=1e-4)  # the predictive loss
    method.loss(batch).backward()
    for parameter in method.parameters():
        indices = range(min(parameter.numel(), 4))
        expected = slopes(lambda: method.loss(batch).detach(), parameter, indices)
        torch.testing.assert_close(parameter.grad.view(-1)[: len(indices)], expected, rtol=1e-6, atol=1e-6)


def chaser(**options):
    model, batch = network(bm.priors.Normal(0.3)), task_batch()
    method = bm.BMAML(model, num_particles=3, inner_steps=2, inner_lr=0.3, leader_steps=2, **options)
    method.prepare(batch)
    return method, batch


def test_chaser_loss_is_the_distance_to_more_steps():
    method, batch = chaser()
    followers = method.adapt(batch.support).u
    leader = method._climb(followers[:, None], batch.union(), None, 2, create_graph=False)[:, 0]
    expected = (followers - leader).square().sum((0, -1)).mean()
    assert method.loss(batch).item() == pytest.approx(expected.item(), rel=1e-10)
    method.leader_steps = 3
    assert method.loss(batch).item() > 1.1 * expected.item()
    method.leader_steps, method.inner_steps = 2, 0  # the leader sees the query too
    start = method._start(batch.support).detach()
    support_only = method._climb(start[:, None], batch.support, None, 2, create_graph=False)[:, 0]
    assert method.loss(batch).item() != pytest.approx((start - support_only).square().sum((0, -1)).mean().item())


def test_chaser_gradient_holds_the_leader_still():
    """Finite differences with the leader kept where it was; the starts alone follow the distance."""
    method, batch = chaser()
    method.loss(batch).backward()
    followers = method.adapt(batch.support).u
    leader = method._climb(followers[:, None], batch.union(), None, 2, create_graph=False)[:, 0]

    def held():
        return (method.adapt(batch.support).u - leader).square().sum((0, -1)).mean()

    expected = slopes(held, method.particles, range(8))
    torch.testing.assert_close(method.particles.grad.view(-1)[:8], expected, rtol=1e-6, atol=1e-6)
    moving = slopes(lambda: method.loss(batch).detach(), method.particles, range(8))
    assert (moving - expected).abs().max() > 1e-2 * expected.abs().max()  # control: a leader that moves along


def test_what_is_no_start_follows_the_predictive_loss():
    method, batch = chaser()
    method.loss(batch).backward()
    predictive, _ = chaser(objective="predictive")
    predictive.loss(batch).backward()
    for name in ("likelihood", "prior"):  # noise, and the prior's scales
        found = getattr(method.program, name).log_scale.grad
        torch.testing.assert_close(found, getattr(predictive.program, name).log_scale.grad, rtol=1e-9, atol=1e-12)
        assert found.abs().max() > 1e-3
    assert not torch.allclose(method.particles.grad, predictive.particles.grad, rtol=0.1)


def test_chaser_trains_the_starts_of_a_point_network():
    """Both what the starts are made of, and nothing is evaluated for a rest that is not there."""
    model, batch = network("point"), task_batch()
    model.likelihood.log_scale.requires_grad_(False)
    method = bm.BMAML(model, num_particles=3, inner_steps=2, inner_lr=0.2)
    method.prepare(batch)
    assert not method._has_more_than_starts()
    method.loss(batch).backward()
    torch.testing.assert_close(model.prior.loc.grad, method.particles.grad.sum(0), rtol=1e-10, atol=1e-12)
    model.likelihood.log_scale.requires_grad_(True)
    assert method._has_more_than_starts()


def test_evaluation_loss_is_predictive():
    method, batch = chaser()
    predictive, _ = chaser(objective="predictive")
    in_training = method.loss(batch).item()
    method.eval()
    assert method.loss(batch).item() == pytest.approx(predictive.loss(batch).item(), rel=1e-12)
    assert method.loss(batch).item() != pytest.approx(in_training, rel=1e-3)


# -- options ------------------------------------------------------------------------------------------------------


def test_options_out_of_range():
    with pytest.raises(errors.OptionError, match=r"at least 2 particles; got num_particles=1.*use MAML"):
        bm.BMAML(TwoSites(), num_particles=1)
    with pytest.raises(errors.OptionError, match="'chaser', 'predictive' or 'marginal'"):
        bm.BMAML(TwoSites(), objective="elbo")
    for options in ({"inner_steps": -1}, {"leader_steps": 0}, {"inner_lr": 0.0}, {"spread": 0.0}):
        with pytest.raises(errors.OptionError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
            bm.BMAML(TwoSites(), **options)
