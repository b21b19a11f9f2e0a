"""NUTS against exact Gaussian posteriors and quadrature, within 4 Monte Carlo standard errors."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of

F64 = torch.float64


def linear_model(scale=0.7, noise=0.4):
    """A Linear on x whose weights are φ: the exact posterior is a Gaussian."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(2, 1))
    return bm.NeuralTaskModel(network, bm.Gaussian(noise), bm.priors.Normal(scale), task_modules="head").to(F64)


def compare(found, expected_mean, expected_square, ess):
    """z of first and second moments about the truth; ess of each."""
    mean_z = (found.mean(0) - expected_mean) / (found.std(0) / ess.sqrt())
    square = (found - expected_mean).square()
    # the squares mix less well than bulk ESS of the values says; half of it is safe for a Gaussian
    square_z = (square.mean(0) - expected_square) / (square.std(0) / (ess / 2).sqrt())
    return mean_z, square_z


def test_a_linear_gaussian_posterior():
    """Means, variances and covariances of ragged tasks, one of them empty; control: another prior scale fails."""
    support = batch_of(3, 6, features=2, dtype=F64)
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    support = bm.Observations(support.x, support.y, mask)
    model = linear_model()
    method = bm.NUTS(model, num_samples=200, warmup=60, num_chains=2, max_tree_depth=4)
    posterior = method.adapt(support, generator=1)
    found = posterior.diagnostics()
    assert posterior.u.shape == (400, 3, 3)
    assert posterior.chains().shape == (2, 200, 3, 3)
    assert found.rhat.shape == found.ess.shape == (3, 3)
    assert found.max_rhat < 1.05
    assert found.min_ess > 80
    assert found.rhat_theta is None
    assert found.divergences.tolist() == [0, 0]
    assert (found.step_size > 0).all()

    def z_scores(scale):
        exact = bm.BayesianLastLayer(linear_model(scale)).adapt(support)
        mean_z, square_z = compare(posterior.u, exact.loc, exact.covariance.diagonal(dim1=-2, dim2=-1), found.ess)
        centred = posterior.u - exact.loc
        product = centred.unsqueeze(-1) * centred.unsqueeze(-2)
        error = product.std(0) / (found.min_ess / 2) ** 0.5
        return mean_z, square_z, (product.mean(0) - exact.covariance) / error

    assert all(z.abs().max() < 4 for z in z_scores(0.7))
    assert max(z.abs().max() for z in z_scores(1.4)) > 6


def test_a_positive_site_against_quadrature():
    """Slope and log sigma of TwoSites given μ on a grid; control: quadrature of another likelihood."""
    program, support = TwoSites().to(F64), batch_of(1, 4, dtype=F64)
    method = bm.NUTS(program, num_samples=120, warmup=60, num_chains=2, max_tree_depth=4).to(F64)
    posterior = method.adapt(support, generator=2)
    mu = method.theta_guide.loc.detach()
    ess = posterior.diagnostics().ess[0]

    def moments(observations):
        slope, log_sigma = torch.linspace(-5, 5, 401, dtype=F64), torch.linspace(-3, 2, 201, dtype=F64)
        grid = torch.cartesian_prod(slope, log_sigma).unsqueeze(-2)
        # written out, not by the program
        sigma = grid[..., 1].exp()
        log_p = dist.Normal(mu, 1.0).log_prob(grid[..., 0]) + dist.Normal(-1.0, 0.25).log_prob(grid[..., 1])
        residual = observations.y[0] - grid[..., :1] * observations.x[0, :, 0]
        log_p = log_p + dist.Normal(0.0, sigma.unsqueeze(-1)).log_prob(residual).sum(-1)
        weight = log_p.squeeze(-1).softmax(0).unsqueeze(-1)
        mean = (weight * grid[:, 0]).sum(0)
        return mean, (weight * (grid[:, 0] - mean).square()).sum(0)

    u = posterior.u[:, 0]
    mean_z, square_z = compare(u, *moments(support), ess)
    assert mean_z.abs().max() < 4
    assert square_z.abs().max() < 4
    wrong, _ = compare(u, *moments(support.with_y(support.y + 1.0)), ess)
    assert wrong.abs().max() > 6
    assert (posterior.sample(10)["sigma"] > 0).all()
    assert posterior.named_theta(posterior.draws(10))["mu"].shape == (10,)


def tiny_hierarchy(x, y=None, mask=None):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.5, dtype=F64), torch.tensor(2.0, dtype=F64)))
    with bm.task_plate(x):
        beta = pyro.sample("beta", dist.Normal(mu, torch.tensor(0.6, dtype=F64)))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(beta, torch.tensor(0.5, dtype=F64)), obs=y)


def test_global_and_local_sites_together():
    """p(μ, β_1, β_2 | y): one Gaussian. Control: the posterior of each β given μ at its prior mean is another."""
    support = bm.Observations(
        torch.zeros(2, 3, 1, dtype=F64), torch.tensor([[2.0, 2.5, 1.5], [0.1, 0.0, 0.0]], dtype=F64),
        torch.tensor([[True, True, True], [True, False, False]]),
    )  # fmt: skip
    method = bm.NUTS(tiny_hierarchy, num_samples=120, warmup=60, num_chains=2, max_tree_depth=4, infer_theta=True).to(
        F64
    )
    posterior = method.adapt(support, generator=3)
    found = posterior.diagnostics()
    # (μ, β_1, β_2): precision of the hierarchy, and of the observations
    between, within = 1 / 0.6**2, 1 / 0.5**2
    precision = torch.tensor(
        [
            [1 / 4 + 2 * between, -between, -between],
            [-between, between + 3 * within, 0],
            [-between, 0, between + within],
        ],
        dtype=F64,
    )
    shift = torch.tensor([0.5 / 4, 6.0 * within, 0.1 * within], dtype=F64)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ shift
    z = torch.cat([posterior.theta, posterior.u[..., 0]], -1)
    ess = torch.cat([found.ess_theta, found.ess[:, 0]])
    mean_z, square_z = compare(z, mean, covariance.diagonal(), ess)
    assert mean_z.abs().max() < 4
    assert square_z.abs().max() < 4
    centred = z - mean
    product = centred[:, 0] * centred[:, 1]
    assert (product.mean() - covariance[0, 1]).abs() < 4 * product.std() / (ess.min() / 2).sqrt()
    given = torch.tensor([0.5, (between * 0.5 + 6 * within) / (between + 3 * within)], dtype=F64)
    assert ((z.mean(0)[:2] - given) / (z.std(0) / ess.sqrt())[:2]).abs().max() > 6
    assert found.rhat_theta.shape == (1,)
    assert found.min_ess <= float(found.ess_theta.min())


def unknown_scale(x, y=None, mask=None):
    tau = pyro.sample("tau", dist.LogNormal(torch.tensor(-0.3, dtype=F64), torch.tensor(0.8, dtype=F64)))
    with bm.task_plate(x):
        beta = pyro.sample("beta", dist.Normal(torch.zeros_like(tau), tau))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(beta, torch.tensor(0.5, dtype=F64)), obs=y)


def test_the_potential_of_a_positive_theta():
    """−log p(log τ, β, y), written out, and its gradient: a positive τ is sampled as log τ, so its density has a
    Jacobian. Control: the density of τ itself has another gradient."""
    y = torch.tensor([[2.0, 2.5, 1.5], [0.1, 0.0, 0.0]], dtype=F64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    support = bm.Observations(torch.zeros(2, 3, 1, dtype=F64), y, mask)
    method = bm.NUTS(unknown_scale, infer_theta=True).to(F64)
    method.prepare(support)
    potential = method._potential(support, None)
    loc, scale, noise = (torch.tensor(value, dtype=F64) for value in (-0.3, 0.8, 0.5))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(3, generator=generator, dtype=F64).requires_grad_()  # log τ, β_1, β_2
        found = potential({"theta": z[:1].reshape(1, 1), "u": z[1:].reshape(1, 2, 1)})
        of_log_tau, tau, beta = dist.Normal(loc, scale).log_prob(z[0]), z[0].exp(), z[1:]
        rest = dist.Normal(0 * tau, tau).log_prob(beta).sum()
        rest = rest + torch.where(mask, dist.Normal(beta[:, None], noise).log_prob(y), 0.0).sum()
        torch.testing.assert_close(found, -(of_log_tau + rest), rtol=1e-10, atol=1e-10)

        def gradient(value, z=z):
            return torch.autograd.grad(value, z, retain_graph=True)[0]

        torch.testing.assert_close(gradient(found), gradient(-(of_log_tau + rest)), rtol=1e-10, atol=1e-10)
        of_tau = dist.LogNormal(loc, scale).log_prob(tau)
        assert (gradient(found) - gradient(-(of_tau + rest)))[0].abs() > 0.9, "1, by the Jacobian τ"


def small(**options):
    options = {"num_samples": 20, "warmup": 20, "num_chains": 2, "max_tree_depth": 4} | options
    return bm.NUTS(linear_model(), **options)


def test_seeds_and_global_state():
    method, support = small(), batch_of(3, 4, features=2, dtype=F64)
    method.prepare(support)
    before, store = torch.random.get_rng_state(), dict(pyro.get_param_store().items())
    first = method.adapt(support, generator=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert dict(pyro.get_param_store().items()) == store
    assert torch.equal(first.u, method.adapt(support, generator=1).u)
    assert not torch.equal(first.u, method.adapt(support, generator=2).u)
    assert not torch.equal(first.chains()[0], first.chains()[1])
    assert not first.u.requires_grad
    with pyro.poutine.trace() as trace:  # its momenta are nobody's sites
        method.adapt(support, generator=1)
    assert not [name for name in trace.trace.nodes if not name.startswith("_")]


def test_draws_of_theta_from_a_gaussian_guide():
    """φ is sampled given each draw of θ, and stays paired with it."""
    support = batch_of(2, 4, dtype=F64)
    trained = bm.ABML(TwoSites(), global_guide="normal", inner_lr=0.01).to(F64)
    trained.prepare(support)
    method = bm.NUTS(trained.program, num_samples=10, warmup=10, num_chains=2, max_tree_depth=3).share_theta(trained)
    posterior = method.adapt(support, num_theta=3)
    assert posterior.u.shape == (60, 2, 2)
    assert posterior.chains().shape == (2, 10, 3, 2, 2)
    assert len(posterior.theta.unique()) == 3
    assert torch.equal(posterior.theta[:3], posterior.theta[3:6])
    assert posterior.diagnostics().rhat.shape == (2, 2)
    assert method.theta_guide is trained.theta_guide
    with pytest.raises(errors.OptionError, match="same program"):
        bm.NUTS(TwoSites()).share_theta(trained)
    fresh = bm.ABML(TwoSites())
    with pytest.raises(errors.OptionError, match="not seen data"):
        bm.NUTS(fresh.program).share_theta(fresh)


def test_a_warm_start_and_files(tmp_path):
    model, support = linear_model(), batch_of(3, 4, features=2, dtype=F64)
    warm = bm.BayesianLastLayer(model).adapt(support)
    method = bm.NUTS(model, num_samples=5, warmup=5, num_chains=3, max_tree_depth=3)
    starts = []
    original = method._chain
    method._chain = lambda chain, start, *rest: starts.append(start["u"]) or original(chain, start, *rest)
    posterior = method.adapt(support, start=warm, generator=4)
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(warm.covariance), (starts[0][0] - warm.loc)[..., None], upper=False
    )
    assert z.abs().max() < 4  # a draw of it
    assert not torch.equal(starts[0], starts[1])
    method.adapt(support, generator=4)
    assert not torch.equal(starts[0], starts[3])
    posterior.save(tmp_path / "chains.pt")
    again = bm.load_posterior(tmp_path / "chains.pt", model)
    assert isinstance(again, bm.ChainsPosterior)
    assert again.num_chains == 3
    assert torch.equal(again.diagnostics().rhat, posterior.diagnostics().rhat)
    other = bm.BayesianLastLayer(model).adapt(batch_of(2, 4, features=2, dtype=F64))
    with pytest.raises(errors.ShapeError, match="same tasks"):
        method.adapt(support, start=other)


def test_what_it_refuses():
    support = batch_of(2, 3, features=2, dtype=F64)
    for options in ({"num_samples": 0}, {"warmup": 0}, {"num_chains": 0}, {"target_accept": 1.0}, {"spread": -1.0}):
        with pytest.raises(errors.OptionError):
            small(**options)
    with pytest.raises(errors.UnsupportedError, match=r"NUTS\(method.program\)"):
        small().loss(bm.TaskBatch(support, support))
    with pytest.raises(errors.UnsupportedError, match="no Pyro guide"):
        small().guide(support)
    with pytest.raises(errors.UnsupportedError, match="no global sites"):
        small(infer_theta=True).adapt(support)
    point = bm.NeuralTaskModel(torch.nn.Linear(2, 1), bm.Gaussian(1.0), "point").to(F64)
    with pytest.raises(errors.UnsupportedError, match="Point"):
        bm.NUTS(point).adapt(support)
    with pytest.raises(errors.NonFiniteDataError, match="Chain 0 cannot start"):
        small(spread=1e200).adapt(support)
    few = small(num_samples=3).adapt(support).diagnostics()
    assert few.rhat.isnan().all()
