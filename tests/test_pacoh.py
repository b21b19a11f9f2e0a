"""PACOH: its objective and SVGD direction by hand, known posteriors and evidences, its bound in a simulated world."""

import math

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.adapt.pac_bound import meta_bound
from bayesmeta.models.deep_kernel import kernels
from bayesmeta.models.hyper_prior import HyperPrior, set_parameters
from bayesmeta.ops.random import as_generator
from bayesmeta.ops.svgd import median_bandwidth, squared_distances
from bayesmeta.posteriors.prior_mixture import ListMixture
from tests.programs import TwoSites, batch_of

F64 = torch.float64


def network(hidden=(4,), outputs=1, features=1, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return bm.nets.mlp(features, list(hidden), outputs, activation="tanh")


def model(hidden=(4,), noise=0.4, prior="normal"):
    return bm.NeuralTaskModel(network(hidden), bm.Gaussian(noise, learn_scale=True), prior)


def pacoh(**options):
    options = {"hyper_posterior": "map"} | options
    return bm.PACOH(options.pop("model", None) or model(), **options).double()


def gp(**options):
    return pacoh(base_learner="gp", **options)


def tasks(count=3, ragged=False, population=None):
    """Tasks of 4 + 3 observations."""
    support, query = batch_of(count, 4, dtype=F64, ragged=ragged), batch_of(count, 3, seed=1, dtype=F64)
    return bm.TaskBatch(support, query, population=population or count)


def observed(batch, task):
    """All real observations of one task."""
    union = batch.union()
    keep = union.full_mask()[task]
    return union.x[task][keep], union.y[task][keep]


def evidence_by_hand(program, x, y):
    """log N(y; mean network, scale · RBF on features + noise), from the network's own layers."""
    kernel = program.kernel
    f = program.trunk(x)
    gap = (f.unsqueeze(0) - f.unsqueeze(1)).square().sum(-1)
    covariance = kernel.outputscale * torch.exp(-0.5 * gap / kernel.base_kernel.lengthscale.squeeze() ** 2)
    covariance = covariance + (program.likelihood.scale**2 + 1e-8 * kernel.outputscale) * torch.eye(len(x), dtype=F64)
    mean = program.mean + program.mean_network(x).squeeze(-1)
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(y)


def hyper_prior_by_hand(method, program):
    """Log-density of the parameters by name: networks around 0, the rest around its first value."""
    total = 0.0
    first = dict(method.program.named_parameters())
    for name, p in program.named_parameters():
        networks = name.startswith(("trunk", "mean_network"))
        centre = 0.0 if networks else first[name]
        scale = method.other_scale
        if networks:
            scale = method.bias_scale if name.endswith("bias") else method.weight_scale
        total = (
            total
            + torch.distributions.Normal(torch.as_tensor(centre), torch.tensor(scale, dtype=F64)).log_prob(p).sum()
        )
    return total


def moved(method, seed=5):
    """Away from where it began, so that nothing is at a centre."""
    with torch.no_grad():
        noise = torch.randn(method.particles.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        method.particles.add_(0.2 * noise)
    return method


# -- the objective ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("factor", ["tasks", "sqrt_tasks"])
def test_map_on_a_gp_is_the_penalised_evidence(factor, ragged):
    """Float64, by torch's multivariate normal and names of parameters; control: the other λ.

    The widths are exact in single precision, in which the hyper-prior is made.
    """
    batch, weight = tasks(ragged=ragged, population=3), 0.7
    method = moved(
        gp(task_factor=factor, hyper_prior_weight=weight, weight_scale=0.25, bias_scale=2.0, other_scale=0.5)
    )
    program = method.hyper_prior.at(method.particles[0])
    data = [observed(batch, i) for i in range(3)]
    evidence = sum(evidence_by_hand(program, x, y) for x, y in data) / 3
    total = float(sum(len(y) for _, y in data))  # B, with β_i = m_i
    prior = hyper_prior_by_hand(method, program)

    def objective(lam):
        return -evidence - weight * (total + lam) / (lam * 3) * prior

    lam = {"tasks": 3.0, "sqrt_tasks": 3.0**0.5}
    loss = method.loss(batch)
    torch.testing.assert_close(loss, objective(lam.pop(factor)), rtol=1e-10, atol=1e-10)
    assert abs(loss - objective(lam.popitem()[1])) > 0.1
    half = method.loss(batch.tasks([0, 1]))  # a part of the population stands for all of it
    counts = [len(y) for _, y in data]
    lam = 3.0 if factor == "tasks" else 3.0**0.5
    estimate = 3 * (counts[0] + counts[1]) / 2
    part = sum(evidence_by_hand(program, *one) for one in data[:2]) / 2
    torch.testing.assert_close(half, -part - weight * (estimate + lam) / (lam * 3) * prior, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", ["shots", "sqrt_shots"])
def test_map_on_a_network_is_the_log_mean_exp_of_its_draws(factor):
    """By hand with the same draws, one task and draw at a time; control: the mean of logs, Jensen's lower bound."""
    batch = tasks(ragged=True)
    method = moved(pacoh(shot_factor=factor, prior_draws=3, hyper_prior_weight=0.1))
    program = method.hyper_prior.at(method.particles[0])
    loc, scale = program.prior.loc, program.prior.log_scale.exp()
    noise = torch.randn(3, 3, len(loc), generator=as_generator(7, stream="loss"), dtype=F64)
    exact, lower, beta = 0.0, 0.0, []
    for i in range(3):
        x, y = observed(batch, i)
        beta.append(len(y) if factor == "shots" else len(y) ** 0.5)
        logs = []
        for draw in range(3):
            weights = program.flat.views(loc + scale * noise[draw, i])
            out = torch.func.functional_call(program.network, weights, (x,)).squeeze(-1)
            mean_loss = -torch.distributions.Normal(out, program.likelihood.scale).log_prob(y).mean()
            logs.append(-beta[-1] * mean_loss)
        exact = exact + torch.stack(logs).exp().mean().log() / 3
        lower = lower + torch.stack(logs).mean() / 3
    sizes = zip(program.flat.shapes, program.flat.sizes)
    wide = [
        method.weight_scale if name.endswith("weight") else method.bias_scale for name, n in sizes for _ in range(n)
    ]
    centre_scale = torch.tensor(wide, dtype=F64)
    prior = torch.distributions.Normal(0.0, centre_scale).log_prob(loc).sum()
    prior += torch.distributions.Normal(math.log(0.1), 1.0).log_prob(program.prior.log_scale).sum()
    prior += torch.distributions.Normal(math.log(0.4), 1.0).log_prob(program.likelihood.log_scale).sum()
    penalty = -0.1 * (sum(beta) + 3) / 9 * prior
    loss = method.loss(batch, generator=7)
    torch.testing.assert_close(loss, -exact + penalty, rtol=1e-6, atol=1e-6)  # log 0.1 was taken in single precision
    assert loss < -lower + penalty - 0.05


def by_loops(particles, score, h):
    """Liu & Wang 2016, eq. 8, one pair at a time, the kernel's gradient by autograd."""
    out = torch.zeros_like(particles)
    for i in range(len(particles)):
        for j in range(len(particles)):
            a = particles[j].clone().requires_grad_()
            k = torch.exp(-(a - particles[i]).square().sum() / h)
            (slope,) = torch.autograd.grad(k, a)
            out[i] += (k.detach() * score[j] + slope) / len(particles)
    return out


def test_the_svgd_gradient_is_the_direction_for_the_hyper_posterior():
    """And the value is the mean over particles; controls: the plain gradient, and a wrong factor before log Z."""
    batch = tasks(population=5)
    method = moved(gp(hyper_posterior="svgd", num_particles=4, hyper_prior_weight=0.3, task_factor="sqrt_tasks"))
    method.loss(batch).backward()
    total, lam = 5 * 7.0, 5**0.5

    def gradient(share):
        particles = method.particles.detach().clone().requires_grad_()
        log_z = torch.stack([method.log_evidence(one, batch.union()).mean() for one in particles])
        log_q = 0.3 * method.hyper_prior.log_prob(particles) + share * 5 * log_z  # 5 · mean: of all tasks
        (score,) = torch.autograd.grad(log_q.sum(), particles)
        h = median_bandwidth(squared_distances(particles.detach()))
        return -by_loops(particles.detach(), score, h) * (total + lam) / (lam * 5), log_q.detach()

    expected, log_q = gradient(lam / (total + lam))
    torch.testing.assert_close(method.particles.grad, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        method.loss(batch).detach(), -log_q.mean() * (total + lam) / (lam * 5), rtol=1e-10, atol=1e-10
    )
    wrong, _ = gradient(2 * lam / (total + lam))
    assert (method.particles.grad - wrong).abs().max() > 0.1 * expected.abs().max()
    alone = []
    for one in method.particles.detach():
        single = gp(hyper_prior_weight=0.3, task_factor="sqrt_tasks")
        with torch.no_grad():
            single.particles.copy_(one)
        single.loss(batch).backward()
        alone.append(single.particles.grad[0] / 4)
    assert (method.particles.grad - torch.stack(alone)).abs().max() > 0.01 * expected.abs().max()


def test_svgd_finds_the_hyper_posterior():
    """One trained number (log noise): mean and width of the particles against quadrature; control: the hyper-prior."""
    batch = tasks(6)
    program = bm.DeepKernelModel(network(), bm.Gaussian(0.4, learn_scale=True), inputs="raw", learn_mean=False)
    for p in program.dense.parameters():
        p.requires_grad_(False)
    method = bm.PACOH(program, num_particles=5, other_scale=0.5).double()
    assert method.particles.shape == (5, 1)
    grid = torch.linspace(-3, 1.5, 91, dtype=F64).unsqueeze(-1)
    with torch.no_grad():
        log_z = torch.stack([method.log_evidence(one, batch.union()).sum() for one in grid])
    log_q = method.hyper_prior.log_prob(grid) + log_z * 6 / (6 * 7 + 6)
    weight = log_q.softmax(0)
    mean = (weight * grid.squeeze()).sum()
    spread = (weight * (grid.squeeze() - mean).square()).sum().sqrt()
    optimizer = torch.optim.Adam(method.parameters(), 0.15)
    for _ in range(60):
        optimizer.zero_grad()
        method.loss(batch).backward()
        optimizer.step()
    found = method.particles.detach().squeeze()
    # five particles are a quadrature of five points, narrower than the density
    assert (found.mean() - mean).abs() < 0.1 * spread
    assert 0.7 < found.std(correction=0) / spread < 1.05
    assert (math.log(0.4) - mean).abs() > 0.5 * spread, "the data say something"
    assert spread < 0.6 * 0.5


def test_more_hyper_prior_pulls_to_it():
    """The distance from the hyper-prior's centre falls with its weight; without any its width does not matter."""
    batch, distances = tasks(), []
    for weight in (1e-3, 1.0, 1e3):
        method = gp(hyper_prior_weight=weight)
        optimizer = torch.optim.Adam(method.parameters(), 0.05)
        for _ in range(50):
            optimizer.zero_grad()
            method.loss(batch).backward()
            optimizer.step()
        z = (method.particles[0] - method.hyper_prior.centre) / method.hyper_prior.scale
        distances.append(z.square().mean().sqrt().item())
    assert distances[0] > 1.5 * distances[1] > 5 * distances[2]
    free = [gp(hyper_prior_weight=0.0, weight_scale=scale).loss(batch) for scale in (0.1, 10.0)]
    assert torch.equal(*free)
    assert gp(weight_scale=0.1).loss(batch) != gp(weight_scale=10.0).loss(batch)


def linear_tasks(count, variance, seed=0):
    g = torch.Generator().manual_seed(seed)
    slope = variance**0.5 * torch.randn(count, 1, generator=g, dtype=F64)
    x = torch.randn(count, 8, 1, generator=g, dtype=F64)
    y = slope * x.squeeze(-1) + 0.3 * torch.randn(count, 8, generator=g, dtype=F64)
    return bm.TaskBatch(bm.Observations(x[:, :5], y[:, :5]), bm.Observations(x[:, 5:], y[:, 5:]), population=count)


def test_conjugate_tasks_give_back_their_prior():
    """y = slope · x + noise under a linear kernel: the slope's variance, and each task's exact posterior."""
    count, variance = 200, 2.0
    batch = linear_tasks(count, variance)
    program = bm.DeepKernelModel(
        network(), bm.Gaussian(0.3), kernels.LinearKernel(), inputs="raw", learn_mean=False
    ).double()
    method = bm.PACOH(program, hyper_posterior="map", hyper_prior_weight=1e-6).double()
    optimizer = torch.optim.LBFGS(method.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = method.loss(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = method.hyper_prior.at(method.particles[0]).kernel.variance.item()
    # 200 slopes, hardly blurred by the noise: a relative standard error of √(2 / 200)
    assert abs(found / variance - 1) < 3 * (2 / count) ** 0.5
    assert abs(program.kernel.variance.item() / variance - 1) > 5 * (2 / count) ** 0.5, "it began elsewhere"
    x, y = batch.support.x.squeeze(-1), batch.support.y
    precision = 1 / found + x.square().sum(-1) / 0.3**2
    mean = (x * y).sum(-1) / 0.3**2 / precision
    predictive = method.adapt(batch.support).predictive(batch.query)
    at = batch.query.x.squeeze(-1)
    torch.testing.assert_close(predictive.mean, mean.unsqueeze(-1) * at, rtol=1e-6, atol=1e-6)
    expected = (at.square() / precision.unsqueeze(-1) + 0.3**2).sqrt()
    torch.testing.assert_close(predictive.stddev, expected, rtol=1e-6, atol=1e-6)


def test_a_networks_posterior_is_the_exact_one():
    """A Linear under Gaussian noise: SVGD particles against the exact posterior of weight and bias."""
    linear = nn.Sequential(nn.Linear(1, 1)).double()
    net = bm.NeuralTaskModel(linear, bm.Gaussian(0.5), bm.priors.Normal(1.0)).double()
    method = bm.PACOH(net, hyper_posterior="map", posterior_particles=20, posterior_steps=250, num_tasks=4).double()
    support = batch_of(4, 5, dtype=F64)
    posterior = method.adapt(support)
    prior = method.particles.detach()[0, :2]
    design = torch.cat([support.x, torch.ones_like(support.x)], -1)
    precision = torch.eye(2, dtype=F64) + design.mT @ design / 0.25
    shift = prior + (design.mT @ support.y.unsqueeze(-1)).squeeze(-1) / 0.25
    mean = torch.linalg.solve(precision, shift)
    scale = precision.inverse().diagonal(dim1=-2, dim2=-1).sqrt()
    u = posterior.u[0]
    assert u.shape == (20, 4, 2)
    assert ((u.mean(0) - mean) / scale).abs().max() < 0.15
    ratio = u.std(0) / scale
    assert ratio.min() > 0.6
    assert ratio.max() < 1.2
    assert ((prior - mean) / scale).abs().max() > 2, "the data say something"
    tempered = bm.PACOH(
        net, hyper_posterior="map", posterior_particles=20, posterior_steps=250, shot_factor="sqrt_shots", num_tasks=4
    ).double()
    wider = tempered.adapt(support).u[0].std(0)
    assert (wider > u.std(0)).all()


@pytest.mark.parametrize("shots", [0, 5])
def test_a_network_without_support_has_draws_of_its_prior(shots):
    """To the last bit, beside a task with support, which moves away from the same draws."""
    method = moved(pacoh(posterior_particles=6, posterior_steps=20))
    program = method.hyper_prior.at(method.particles[0])
    support = batch_of(2, shots, dtype=F64)
    support = bm.Observations(support.x, support.y, torch.tensor([[True], [False]]).expand(2, shots))
    found = method.adapt(support, generator=3).u[0]
    noise = torch.randn(6, 1, found.shape[-1], generator=as_generator(3, stream="adapt"), dtype=F64)
    first = (program.prior.loc + program.prior.log_scale.exp() * noise).squeeze(1)
    assert torch.equal(found[:, 1], first)
    assert torch.equal(found[:, 0], first) == (shots == 0)


# -- posteriors ---------------------------------------------------------------------------------------------------


def test_the_mixture_is_the_mean_of_its_components():
    batch = tasks()
    method = moved(gp(hyper_posterior="svgd", num_particles=3))
    posterior = method.adapt(batch.support)
    y = batch.query.y
    singles = [bm.GPPosterior.condition(method.hyper_prior.at(one), batch.support) for one in method.particles]
    predictive, joint = posterior.predictive(batch.query), posterior.predictive(batch.query, joint=True)
    for mixture, kind in ((predictive, False), (joint, True)):
        each = torch.stack([single.predictive(batch.query, joint=kind).log_prob(y).exp() for single in singles])
        torch.testing.assert_close(mixture.log_prob(y), each.mean(0).log(), rtol=1e-10, atol=1e-10)
    cdf = torch.stack([single.predictive(batch.query).cdf(y) for single in singles]).mean(0)
    torch.testing.assert_close(predictive.cdf(y), cdf, rtol=1e-10, atol=1e-10)
    count = 30_000
    drawn = posterior.predict(batch.query, count, generator=1)
    error = 5 * predictive.stddev / count**0.5
    assert ((drawn.mean(0) - predictive.mean).abs() < error).all()
    assert ((drawn.var(0) / predictive.variance - 1).abs() < 5 * (3 / count) ** 0.5).all()
    assert (drawn.mean(0) - singles[0].predictive(batch.query).mean).abs().max() > error.max(), "components differ"
    draws = posterior.draws(7, generator=2)
    likelihood = posterior.log_likelihood(batch.query, draws=draws)
    for i in range(7):  # draw i is of prior i mod 3
        one = bm.Draws(draws.u[i : i + 1])
        torch.testing.assert_close(likelihood[i], singles[i % 3].log_likelihood(batch.query, draws=one)[0])
        torch.testing.assert_close(posterior.named(draws)["f"][i], singles[i % 3].named(one)["f"][0])
        torch.testing.assert_close(posterior.log_joint(draws)[i], singles[i % 3].log_joint(one)[0])
        torch.testing.assert_close(posterior.log_prior(draws)[i], singles[i % 3].log_prior(one)[0])
    assert posterior.prior_draws(4).u.shape == draws.u[:4].shape


def test_a_mixture_of_distributions_has_its_moments():
    parts = [torch.distributions.Normal(torch.full((2,), m, dtype=F64), s) for m, s in ((0.0, 1.0), (3.0, 0.5))]
    mixture = ListMixture(parts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = mixture.sample((40_000,))
    assert drawn.shape == (40_000, 2)
    assert ((drawn.mean(0) - mixture.mean).abs() < 5 * mixture.stddev / 200).all()
    assert ((drawn.var(0) / mixture.variance - 1).abs() < 5 * (2 / 40_000) ** 0.5).all()
    torch.testing.assert_close(mixture.variance, torch.full((2,), 0.625 + 2.25, dtype=F64))
    grid = torch.linspace(-8, 12, 4001, dtype=F64).unsqueeze(-1).expand(-1, 2)
    torch.testing.assert_close(mixture.log_prob(grid).exp().sum(0) * 0.005, torch.ones(2, dtype=F64))


@pytest.mark.parametrize("make", [gp, pacoh])
def test_saved_posteriors_come_back(make, tmp_path):
    batch = tasks()
    method = make(hyper_posterior="svgd", num_particles=2, posterior_steps=5)
    posterior = method.adapt(batch.support)
    posterior.save(tmp_path / "posterior.pt")
    again = bm.load_posterior(tmp_path / "posterior.pt", method.program)
    first, second = (p.predictive(batch.query).log_prob(batch.query.y) for p in (posterior, again))
    assert torch.equal(first, second)


def classifier():
    net = bm.NeuralTaskModel(network(outputs=3), bm.likelihoods.Categorical(3), "normal")
    return bm.PACOH(net, num_particles=3, posterior_particles=4, posterior_steps=10, num_tasks=4).double()


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_each_draw_counts_once_whatever_their_number(count):
    """Numbers that K = 3 does not divide: the mean over draws, each under its own prior; control: over priors."""
    support = batch_of(4, 5, dtype=F64)
    support = support.with_y((support.y > 0).long())
    posterior = moved(classifier()).adapt(support)
    draws = posterior.draws(count)
    each = [
        posterior.components[i % 3].class_probabilities(support, draws=bm.Draws(draws.u[i : i + 1]))
        for i in range(count)
    ]
    found = posterior.class_probabilities(support, draws=draws)
    torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=1e-12, atol=1e-12)
    if count > 3:
        by_prior = torch.stack([torch.stack(each[k::3]).mean(0) for k in range(3)]).mean(0)
        assert (found - by_prior).abs().max() > 1e-3


def test_classes_are_averaged_over_priors():
    method = classifier()
    support = batch_of(4, 5, dtype=F64)
    support = support.with_y((support.y > 0).long())
    posterior = method.adapt(support)
    draws = posterior.draws(12)
    found = posterior.class_probabilities(support, draws=draws)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 5, dtype=F64))
    predictive = posterior.predictive(support)
    probabilities = torch.stack([predictive.log_prob(torch.full((4, 5), k)).exp() for k in range(3)], -1)
    torch.testing.assert_close(found, probabilities, rtol=1e-9, atol=1e-9)


# -- a mean network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_fast_rbf_is_gpytorchs(offset):
    """Also far from the origin; of points with themselves the diagonal is exact. Control: another length scale."""
    from bayesmeta.models.kernels import DenseKernel

    kernel = kernels.ScaleKernel(kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.8, 1.7
    dense = DenseKernel(kernel)
    assert dense.is_plain_rbf
    assert not DenseKernel(kernels.ScaleKernel(kernels.RBFKernel(ard_num_dims=2))).is_plain_rbf
    a, b = (batch_of(2, n, 2, seed=n, dtype=F64).x + offset for n in (5, 4))
    gap = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
    length, scale = kernel.base_kernel.lengthscale.detach(), kernel.outputscale.detach()  # set in single precision
    expected = scale * torch.exp(-0.5 * gap / length**2)
    torch.testing.assert_close(dense(a, b), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense(a, b), kernel(a, b).to_dense(), rtol=1e-6, atol=1e-6)
    assert (dense(a).diagonal(dim1=-2, dim2=-1) == kernel.outputscale).all()
    torch.testing.assert_close(dense(a), dense(a).mT, rtol=0, atol=1e-14)
    kernel.base_kernel.lengthscale = 0.7
    assert (dense(a, b) - expected).abs().max() > 0.01


def test_many_priors_at_once_are_each_by_itself():
    """Under vmap and in a loop; another kernel takes the loop."""
    batch = tasks(ragged=True)
    for kernel in ("rbf", "matern52"):
        method = moved(gp(kernel=kernel, hyper_posterior="svgd", num_particles=3))
        together = method.log_evidences(method.particles, batch.union())
        each = torch.stack([method.log_evidence(one, batch.union()) for one in method.particles])
        torch.testing.assert_close(together, each, rtol=1e-12, atol=1e-12)
        assert (each[0] - each[1]).abs().max() > 0.1


def test_a_mean_network_shifts_the_targets():
    """Posterior and evidence equal those of targets less the network's outputs; the Pyro trace agrees."""
    import pyro

    batch, mean = tasks(ragged=True), network((3,), seed=4).double()
    plain = bm.DeepKernelModel(network(), bm.Gaussian(0.3), learn_mean=False).double()
    shifted = bm.DeepKernelModel(network(), bm.Gaussian(0.3), learn_mean=False, mean_network=mean).double()
    for program in (plain, shifted):
        program.prepare(batch.support)
    with torch.no_grad():
        less = [part.with_y(part.y - mean(part.x).squeeze(-1)) for part in (batch.support, batch.query)]
        torch.testing.assert_close(shifted.log_evidence(batch.support), plain.log_evidence(less[0]))
        assert (shifted.log_evidence(batch.support) - plain.log_evidence(batch.support)).abs().max() > 0.1
        first, second = bm.GPPosterior.condition(shifted, batch.support), bm.GPPosterior.condition(plain, less[0])
        added = mean(batch.query.x).squeeze(-1)
        for joint in (False, True):
            found, expected = first.predictive(batch.query, joint=joint), second.predictive(batch.query, joint=joint)
            torch.testing.assert_close(found.mean, expected.mean + added)
            torch.testing.assert_close(found.variance, expected.variance)
        draws = first.draws(3)
        torch.testing.assert_close(
            first.log_likelihood(batch.query, draws=draws), second.log_likelihood(less[1], draws=draws)
        )
        torch.testing.assert_close(
            first.predict(batch.query, draws=draws, generator=1),
            second.predict(batch.query, draws=draws, generator=1) + added,
        )
        keep = batch.support.mask
        torch.testing.assert_close(
            first.named(draws)["f"][:, keep],
            (second.named(draws)["f"] + mean(batch.support.x).squeeze(-1))[:, keep],
        )
    trace = pyro.poutine.trace(shifted).get_trace(batch.support.x, batch.support.y, batch.support.mask)
    torch.testing.assert_close(trace.log_prob_sum(), shifted.log_evidence(batch.support).sum())


# -- the bound ----------------------------------------------------------------------------------------------------


def test_the_bounds_terms():
    """Tasks of one size: the formula with n, m, λ, β; the divergence by torch; the evidence at little smoothing."""
    batch = tasks()
    method = moved(gp(task_factor="sqrt_tasks"))
    bound = method.pac_bound(batch, delta=0.1, loss_range=(-1.0, 5.0), smoothing=1e-4, num_samples=2)
    n, m, lam = 3, 7, 3**0.5
    hyper, theta = method.hyper_prior, method.particles.detach()[0]
    q = torch.distributions.Normal(theta, 1e-4 * hyper.scale)
    divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(hyper.centre, hyper.scale)).sum()
    assert bound.divergence == pytest.approx(divergence.item(), rel=1e-9)
    rate = 1 / lam + 1 / (n * m)
    assert bound.complexity == pytest.approx(rate * divergence.item(), rel=1e-9)
    constant = lam * 36 / (8 * n) + m * 36 / (8 * m) + rate * math.log(2 / 0.1)
    assert bound.constant == pytest.approx(constant, rel=1e-9)
    empirical = -method.log_evidence(theta, batch.union()).sum().item() / (n * m)
    assert bound.empirical == pytest.approx(empirical, rel=1e-2)
    assert bound.value == pytest.approx(bound.empirical + bound.complexity + bound.constant)
    assert bound.is_vacuous
    assert method.pac_bound(batch, loss_range=(-1, 5), smoothing=0.0).value == math.inf
    wide = method.pac_bound(batch, loss_range=(-1, 5), smoothing=0.3)
    assert wide.divergence < bound.divergence
    narrow = method.pac_bound(batch, variance=(0.0, 0.0), delta=0.1, smoothing=1e-4, num_samples=2)
    assert narrow.constant == pytest.approx(rate * math.log(2 / 0.1))
    assert narrow.is_vacuous is None


def test_the_bound_of_several_particles_is_over_all_of_them():
    """Particles apart, at little smoothing: the mean of their evidences and divergences; control: those of one."""
    batch = tasks()
    method = gp(hyper_posterior="svgd", num_particles=3)
    with torch.no_grad():
        method.particles.add_(torch.tensor([[-0.5], [0.0], [1.2]], dtype=F64))
    hyper = method.hyper_prior
    for samples in (1, 3, 4):  # rounded up, so that each particle has its part
        bound = method.pac_bound(batch, variance=(0.0, 0.0), smoothing=1e-5, num_samples=samples)
        each = torch.stack([-method.log_evidence(one, batch.union()).sum() / 21 for one in method.particles])
        assert bound.empirical == pytest.approx(each.mean().item(), rel=1e-3)
        prior = torch.distributions.Normal(hyper.centre, hyper.scale)
        divergences = torch.stack(
            [
                torch.distributions.kl_divergence(torch.distributions.Normal(one, 1e-5 * hyper.scale), prior).sum()
                for one in method.particles.detach()
            ]
        )
        assert bound.divergence == pytest.approx(divergences.mean().item(), rel=1e-9)
    for values in (each, divergences):
        assert (values / values.mean() - 1).abs().min() > 0.02


def test_the_bound_holds_in_a_simulated_world():
    """Coins: h ∈ {0, 1} says what falls, loss 0 or 1, two priors; the exact risk against the bound in 300 trainings.

    Control: its first term alone is below the risk in many of them.
    """
    g = torch.Generator().manual_seed(0)
    n, m, lam, beta, delta = 20, 5, 20**0.5, 5**0.5, 0.05
    prior = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=F64)  # P_θ(h)

    def gibbs(ones):
        """log Z and posterior of h under each prior, after ``ones`` of m: ``[…, 2]`` and ``[…, 2, 2]``."""
        loss = torch.stack([ones, m - ones], -1) / m  # of h = 0, h = 1
        logits = prior.log() - beta * loss.unsqueeze(-2)
        return logits.logsumexp(-1), logits.softmax(-1)

    # exact risk under each prior: p ~ Beta(2, 1) has density 2 p
    grid = (torch.arange(2000, dtype=F64) + 0.5) / 2000
    ones = torch.arange(m + 1, dtype=F64)
    chance = torch.distributions.Binomial(m, grid.unsqueeze(-1)).log_prob(ones).exp() * 2 * grid.unsqueeze(-1) / 2000
    own = torch.stack([grid, 1 - grid], -1)  # the loss of each h at p
    risk = torch.einsum("pk,kth,ph->t", chance, gibbs(ones)[1], own)
    held, above = [], []
    for _ in range(300):
        p = torch.rand(n, 1, generator=g, dtype=F64).sqrt()
        log_z = gibbs((torch.rand(n, m, generator=g, dtype=F64) < p).double().sum(-1))[0].sum(0)
        log_q = (0.5 * torch.ones(2, dtype=F64)).log() + lam / (n * beta + lam) * log_z
        q = log_q.softmax(0)
        divergence = float((q * (q / 0.5).log()).sum())
        counts = torch.full((n,), float(m), dtype=F64)
        bound = meta_bound(float((q * log_z).sum()), divergence, counts, counts.sqrt(), lam, delta, (0.0, 1.0), None)
        truth = float((q * risk).sum())
        held.append(bound.value >= truth)
        above.append(bound.empirical < truth)
    assert all(held)
    # the empirical term holds the divergences from the priors, and is far from the risk only where data flatter
    assert sum(above) > 0
    assert 0.1 < risk.min() < 0.5


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"hyper_posterior": "vi"}, errors.OptionError, "hyper_posterior 'vi'"),
        ({"task_factor": "n"}, errors.OptionError, "task_factor"),
        ({"shot_factor": "m"}, errors.OptionError, "shot_factor"),
        ({"num_particles": 2}, errors.OptionError, "MAP is one particle"),
        ({"hyper_posterior": "svgd", "num_particles": 1}, errors.OptionError, "SVGD at least two"),
        ({"hyper_prior_weight": -1.0}, errors.OptionError, "hyper_prior_weight"),
        ({"hyper_prior_weight": math.nan}, errors.OptionError, "hyper_prior_weight"),
        ({"num_tasks": 0}, errors.OptionError, "num_tasks"),
        ({"weight_scale": 0.0}, errors.OptionError, "weight_scale=0"),
        ({"prior_draws": 0}, errors.OptionError, "prior_draws"),
        ({"posterior_particles": 1}, errors.OptionError, "posterior_particles"),
        ({"base_learner": "tree"}, errors.OptionError, "base_learner 'tree'"),
        ({"kernel": "rbf"}, errors.OptionError, "base_learner='gp'"),
        ({"base_learner": "gp", "shot_factor": "sqrt_shots"}, errors.UnsupportedError, "closed form"),
        ({"model": TwoSites()}, errors.UnsupportedError, "got TwoSites|got TaskProgram"),
        ({"model": model(prior="point")}, errors.UnsupportedError, "has Point"),
    ],
)
def test_bad_options(options, kind, match):
    with pytest.raises(kind, match=match):
        pacoh(**options)


def test_other_models_are_refused():
    labels = bm.DeepKernelModel(network(outputs=3), bm.likelihoods.Categorical(3))
    with pytest.raises(errors.UnsupportedError, match="Gaussian likelihood"):
        bm.PACOH(labels)
    real = bm.DeepKernelModel(network(), bm.Gaussian(0.3))
    with pytest.raises(errors.UnsupportedError, match="base_learner='network'"):
        bm.PACOH(real, base_learner="network")
    with pytest.raises(errors.UnsupportedError, match="mean_network"):
        bm.DeepKernelModel(network(outputs=3), bm.likelihoods.Categorical(3), mean_network=network())
    wide = bm.DeepKernelModel(network(), bm.Gaussian(0.3), mean_network=network(outputs=2)).double()
    for _ in range(2):
        with pytest.raises(errors.ShapeError, match="one output"):
            wide.prepare(tasks().support)
    fixed = bm.DeepKernelModel(network(), bm.Gaussian(0.3))
    for p in fixed.parameters():
        p.requires_grad_(False)
    with pytest.raises(errors.ModelError, match="no trained parameters"):
        bm.PACOH(fixed)


def test_the_number_of_tasks_is_needed():
    batch = tasks()
    endless = bm.TaskBatch(batch.support, batch.query)
    method = gp()
    with pytest.raises(errors.DataError, match="FixedTasks"):
        method.loss(endless)
    assert method.eval().loss(endless).isfinite()  # held-out tasks: no hyper-prior
    assert torch.equal(gp(num_tasks=3).loss(endless), gp().loss(batch))
    assert gp(num_tasks=30).loss(batch) != gp().loss(batch)


@pytest.mark.parametrize("options", [{}, {"hyper_posterior": "svgd", "num_particles": 3}])
def test_the_loss_in_validation_is_without_the_hyper_prior(options):
    """Of tasks of an endless distribution, also where n is given; control: of a finite set, and in training."""
    batch = tasks()
    endless = bm.TaskBatch(batch.support, batch.query)
    method = moved(gp(num_tasks=3, **options)).eval()
    expected = -torch.stack([method.log_evidence(one, batch.union()).mean() for one in method.particles]).mean()
    torch.testing.assert_close(method.loss(endless), expected, rtol=1e-12, atol=1e-12)
    assert method.loss(batch) - expected > 1.0
    assert method.train().loss(endless) - expected > 1.0


def test_its_program_is_not_what_it_has_learned():
    """Refused by whatever takes a program; at a particle it is served."""
    method = moved(pacoh())
    method.prepare(tasks())
    for take in (bm.NUTS, bm.SemiAmortised, bm.Amortised, bm.ABML, pacoh_again):
        with pytest.raises(errors.UnsupportedError, match=r"hyper_prior\.at\(method\.particles\[k\]\)"):
            take(method.program)
    chains = bm.NUTS(method.hyper_prior.at(method.particles[0]), num_samples=2, warmup=2, num_chains=1)
    values = torch.cat([p.flatten() for p in chains.program.parameters() if p.numel()])
    assert set(method.particles[0].tolist()) <= set(values.tolist())
    assert chains.adapt(tasks().support).u.isfinite().all()
    assert not torch.equal(chains.program.prior.loc, method.program.prior.loc)


def pacoh_again(program):
    return bm.PACOH(program)


def test_no_bound_without_its_assumptions():
    method, batch = gp(), tasks()
    cases = [
        ({}, errors.OptionError, "one of the two"),
        ({"loss_range": (0, 1), "variance": (1, 1)}, errors.OptionError, "one of the two"),
        ({"loss_range": (1, 0)}, errors.OptionError, "a < b"),
        ({"variance": (-1, 1)}, errors.OptionError, "≥ 0"),
        ({"variance": 1.0}, errors.OptionError, r"variance=\(within, between\); got 1.0"),
        ({"loss_range": (0, "a")}, errors.OptionError, r"loss_range=\(a, b\); got \(0, 'a'\)"),
        ({"loss_range": (0, 1), "delta": 1.0}, errors.OptionError, "delta"),
        ({"loss_range": (0, 1), "smoothing": -1.0}, errors.OptionError, "smoothing"),
        ({"loss_range": (0, 1), "num_samples": 0}, errors.OptionError, "num_samples"),
    ]
    for options, kind, match in cases:
        with pytest.raises(kind, match=match):
            method.pac_bound(batch, **options)
    with pytest.raises(errors.DataError, match="3 of 9"):
        method.pac_bound(tasks(population=9), loss_range=(0, 1))
    hollow = bm.Observations(batch.support.x, batch.support.y, torch.zeros(3, 4, dtype=torch.bool))
    nothing = bm.Observations(batch.query.x, batch.query.y, torch.arange(3).unsqueeze(-1) > torch.zeros(3))
    with pytest.raises(errors.DataError, match="Leave them out"):
        method.pac_bound(bm.TaskBatch(hollow, nothing, population=3), loss_range=(0, 1))


def test_what_is_no_pyro_model_says_so():
    batch, method = tasks(), gp()
    posterior = method.adapt(batch.support)
    calls = (method.model, method.guide, posterior, posterior.log_prob)
    for call in calls:
        with pytest.raises(errors.UnsupportedError):
            call(batch)
    with pytest.raises(errors.ShapeError, match="trained parameters"):
        set_parameters(method.program, torch.zeros(3, dtype=F64))
    with pytest.raises(AttributeError):
        posterior.no_such_name  # noqa: B018


def test_the_model_given_stays_as_it_was():
    mine = model().double()
    before = {name: p.clone() for name, p in mine.named_parameters()}
    method = bm.PACOH(mine, hyper_posterior="map", num_tasks=3)
    method.loss(tasks()).backward()
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in mine.named_parameters())
    assert [name for name, p in method.named_parameters() if p.requires_grad] == ["particles"]


def test_first_particles_are_networks_within_the_hyper_prior():
    hyper = HyperPrior(bm.DeepKernelModel.of(model((32,)), mean_network=network((32,))), 0.5, 1.0, 1.0)
    one, many = hyper.first_draws(1), hyper.first_draws(200, 1)
    torch.testing.assert_close(one[0], hyper.first)
    ratio = many.std(0) / hyper.width
    assert (ratio - 1).abs().max() < 6 / (2 * 200) ** 0.5
    assert (many.mean(0) - hyper.centre).abs().max() < 0.6
    assert torch.equal(many, hyper.first_draws(200, 1))
    assert not torch.equal(many, hyper.first_draws(200, 2))
