"""Priors over a network's task parameters: densities, moments, covariates, global scales, non-centred forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import LinearHierarchy, TwoSites, batch_of

F64 = torch.float64
PRIORS = {
    "normal": lambda: bm.priors.Normal(0.3),
    "laplace": lambda: bm.priors.Laplace(0.3),
    "low_rank": lambda: bm.priors.LowRankNormal(2, 0.3),
    "mixture": lambda: bm.priors.Mixture(3, 0.3, spread=1.0),
    "layer_scales": lambda: bm.priors.LayerScales(0.3),
    "horseshoe": lambda: bm.priors.Horseshoe(0.3),
    "point": bm.priors.Point,
}
WITH_DENSITY = [name for name in PRIORS if name != "point"]


def model_with(name, covariates=0, task_modules="all", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = bm.nets.mlp(1, [3], 1, activation="tanh")
        model = bm.NeuralTaskModel(
            network, bm.Gaussian(0.5), PRIORS[name](), task_modules=task_modules, covariates=covariates
        ).double()
        if covariates:
            torch.nn.init.normal_(model.prior.slopes)
    return model


def data(tasks=4, shots=3, seed=0, covariates=0):
    observations = batch_of(tasks, shots, seed=seed, dtype=F64, ragged=True)
    w = torch.randn(tasks, covariates, dtype=F64, generator=torch.Generator().manual_seed(seed)) if covariates else None
    return bm.Observations(observations.x, observations.y, observations.mask, w)


def draw_theta(model, lead, seed=1):
    if not model.has_theta_sites:
        return None
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(*lead, model.layout.theta_dim, dtype=F64, generator=generator)


# -- densities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariates", [0, 2])
@pytest.mark.parametrize("lead", [(), (5,)])
@pytest.mark.parametrize("name", PRIORS)
def test_fast_path_is_the_trace(name, lead, covariates):
    model, observations = model_with(name, covariates), data(covariates=covariates)
    model.prepare(observations)
    u = torch.randn(*lead, 4, 10, dtype=F64, generator=torch.Generator().manual_seed(3))
    theta = draw_theta(model, lead)
    trace = model.trace_joint(u, observations, theta)
    fast = model.log_prior(u, observations, theta).expand(*lead, 4)
    torch.testing.assert_close(fast, torch.as_tensor(trace.log_prior).expand(*lead, 4), rtol=1e-12, atol=1e-12)
    joint = trace.log_likelihood.sum(-1) + trace.log_prior
    torch.testing.assert_close(model.log_joint(u, observations, theta), joint, rtol=1e-12, atol=1e-11)
    if covariates:  # control: another w is another prior
        other = bm.Observations(observations.x, observations.y, observations.mask, observations.w + 1.0)
        changed = model.log_prior(u, other, theta)
        assert name == "point" or (changed - fast).abs().min() > 1e-6


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_moments_are_those_of_the_draws(name):
    model, observations = model_with(name, 2), data(covariates=2)
    model.prepare(observations)
    theta = draw_theta(model, ())
    u, _ = model.sample_prior(20_000, observations, 0, theta)
    mean, scale = model.prior_moments(observations, theta)
    assert mean.shape == scale.shape == (4, 10)
    centred = u - mean
    assert (centred.mean(0).abs() < 5 * scale / math.sqrt(20_000)).all()
    square = centred.square()
    assert ((square.mean(0) - scale.square()).abs() < 5 * square.std(0) / math.sqrt(20_000)).all()
    assert ((square.mean(0) - 1.2 * scale.square()).abs() > 5 * square.std(0) / math.sqrt(20_000)).any()  # control


def test_laplace_and_mixture_by_other_libraries():
    model, observations = model_with("laplace"), data()
    u = torch.randn(4, 10, dtype=F64)
    expected = scipy.stats.laplace(model.prior.loc.detach(), 0.3).logpdf(u).sum(-1)
    torch.testing.assert_close(model.log_prior(u, observations).detach(), torch.as_tensor(expected))
    model = model_with("mixture")
    with torch.no_grad():
        model.prior.logits.copy_(torch.tensor([0.3, -1.0, 0.2]))
    prior = model.prior
    parts = [
        math.log(prior.logits.softmax(0)[k].item())
        + scipy.stats.norm((prior.loc + prior.offsets[k]).detach(), 0.3).logpdf(u).sum(-1)
        for k in range(3)
    ]
    expected = scipy.special.logsumexp(parts, axis=0)
    torch.testing.assert_close(model.log_prior(u, observations).detach(), torch.as_tensor(expected))
    assert prior.offsets.std() > 0.1  # equal components would stay equal


def test_low_rank_is_the_dense_gaussian():
    model, observations = model_with("low_rank"), data()
    prior, u = model.prior, torch.randn(7, 4, 10, dtype=F64)
    covariance = prior.factor @ prior.factor.T + torch.diag((2 * prior.log_scale).exp())
    dense = MultivariateNormal(prior.loc, covariance)
    torch.testing.assert_close(model.log_prior(u, observations), dense.log_prob(u), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prior.root() @ prior.root().mT, covariance, rtol=1e-12, atol=1e-12)
    diagonal = MultivariateNormal(prior.loc, torch.diag(covariance.diagonal()))
    assert (diagonal.log_prob(u) - dense.log_prob(u)).abs().min() > 1e-3  # control


def test_global_scales_have_their_densities_and_their_meaning():
    observations = data()
    model = model_with("layer_scales").prepare(observations)
    theta = draw_theta(model, (3,))
    scales = model.named_theta(theta, observations)["phi_scale"]
    assert scales.shape == (3, 4)
    expected = scipy.stats.lognorm(s=1.0, scale=0.3).logpdf(scales).sum(-1)
    torch.testing.assert_close(model.log_theta(theta, observations, jacobian=False), torch.as_tensor(expected))
    _, sd = model.prior_moments(observations, theta)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor([3, 3, 3, 1]))
    torch.testing.assert_close(sd[:, 0], scales[:, owner])

    model = model_with("horseshoe").prepare(observations)
    theta = draw_theta(model, (3,))
    sites = model.named_theta(theta, observations)
    tau, local = sites["phi_global_scale"], sites["phi_local_scale"]
    half = scipy.stats.halfcauchy
    expected = half(scale=0.3).logpdf(tau) + half().logpdf(local).sum(-1)
    torch.testing.assert_close(model.log_theta(theta, observations, jacobian=False), torch.as_tensor(expected))
    _, sd = model.prior_moments(observations, theta)
    product = tau[:, None] * local
    torch.testing.assert_close(sd[:, 0], product / (1 + product.square()).sqrt())
    model.prior.slab = None
    torch.testing.assert_close(model.prior_moments(observations, theta)[1][:, 0], product)


@pytest.mark.parametrize("form", [lambda model: model, bm.noncentred])
@pytest.mark.parametrize("name", ["layer_scales", "horseshoe"])
def test_elbo_with_global_scales_is_pyros(name, form):
    batch = bm.TaskBatch(data(), data(seed=5), population=4)
    method = bm.ABML(form(model_with(name)), inner_steps=1, inner_lr=0.01, global_guide="normal")
    method.prepare(batch)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        n = 60
        ours = torch.stack([4 * method.loss(batch, generator=i) for i in range(n)])
        theirs = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(n)])
    assert abs(float(ours.mean() - theirs.mean())) < 4 * math.sqrt(float(ours.var() + theirs.var()) / n)


def test_layer_scales_find_which_tensor_differs():
    """Lines whose slopes differ by 0.8 and whose intercepts do not: so say the two scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 20).expand(50, 20).unsqueeze(-1)
    slope = 1.0 + 0.8 * torch.randn(50, 1, generator=generator)
    y = slope * x.squeeze(-1) + 0.5 * torch.randn(50, 20, generator=generator)
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    torch.nn.init.ones_(network[0].weight)
    torch.nn.init.zeros_(network[0].bias)
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), bm.priors.LayerScales(0.3))
    batch = bm.TaskBatch(bm.Observations(x[:, ::2], y[:, ::2]), bm.Observations(x[:, 1::2], y[:, 1::2]), population=50)
    # centred, a scale near 0 makes the inner steps diverge; non-centred they do not care
    method = bm.ABML(bm.noncentred(model), inner_steps=5, inner_lr=0.5, num_particles=2, global_guide="normal")
    method.prepare(batch)
    optimizer = torch.optim.Adam(method.parameters(), 0.05)
    for step in range(60):
        optimizer.zero_grad()
        method.loss(batch, generator=step).backward()
        optimizer.step()
    found = method.theta_guide.loc.exp()
    # five inner steps leave q too wide, so that the slope's scale falls short of 0.8; the order is plain
    assert found[0] > 2.5 * found[1]


# -- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal", "low_rank"])
def test_last_layer_under_a_dense_prior_and_covariates_is_exact(name):
    model, observations = model_with(name, 2, "head"), data(covariates=2)
    method = bm.BayesianLastLayer(model)
    posterior = method.adapt(observations)
    root = model.prior.root()
    covariance, noise = (root @ root.mT).detach(), model.noise_scale.item() ** 2
    for i in range(4):
        keep = observations.full_mask()[i]
        design = model.last_layer_design(observations.x)[i][keep].detach()
        mean = (model.prior.loc + model.prior.slopes @ observations.w[i]).detach()
        marginal = design @ covariance @ design.T + noise * torch.eye(len(design), dtype=F64)
        gain = covariance @ design.T @ torch.linalg.inv(marginal)
        expected = mean + gain @ (observations.y[i][keep] - design @ mean)
        torch.testing.assert_close(posterior.loc[i], expected, rtol=1e-9, atol=1e-9)
        expected = covariance - gain @ design @ covariance
        torch.testing.assert_close(posterior.covariance[i], expected, rtol=1e-9, atol=1e-9)
        evidence = MultivariateNormal(design @ mean, marginal).log_prob(observations.y[i][keep])
        torch.testing.assert_close(posterior.log_evidence[i], evidence, rtol=1e-9, atol=1e-9)
    draws = posterior.draws(5)
    assert posterior.log_prob(draws.u).isfinite().all()


def test_covariates_of_the_prior_are_learned():
    """φ_i = 2 w_i + noise: the slope on w is found, and a task without support is forecast from its w."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(200, 1, generator=generator)
    phi = 2.0 * w + 0.1 * torch.randn(200, 1, generator=generator)
    x = torch.ones(200, 4, 1)
    y = phi.expand(200, 4) + 0.1 * torch.randn(200, 4, generator=generator)
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.1), bm.priors.Normal(0.5), task_modules="head", covariates=1)
    method = bm.BayesianLastLayer(model, objective="evidence")
    half = slice(None, 2), slice(2, None)
    parts = [bm.Observations(x[:, s], y[:, s], None, w) for s in half]
    batch = bm.TaskBatch(*parts)
    optimizer = torch.optim.Adam(method.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        method.loss(batch).backward()
        optimizer.step()
    error = math.sqrt((0.1**2 + 0.1**2 / 4) / 200)  # of a regression on 200 tasks
    assert abs(model.prior.slopes.item() - 2.0) < 4 * error
    new = bm.Observations(torch.zeros(2, 0, 1), torch.zeros(2, 0), None, torch.tensor([[-1.0], [1.0]]))
    mean = method.adapt(new).predictive(torch.ones(2, 1, 1)).mean.squeeze()
    torch.testing.assert_close(mean, torch.tensor([-2.0, 2.0]), atol=8 * error, rtol=0)


def test_covariates_reach_the_start_of_point_estimates():
    model, observations = model_with("point", 2), data(covariates=2)
    method = bm.MAML(model, inner_steps=0)
    u = method.adapt(observations).u[0]
    torch.testing.assert_close(u, (model.prior.loc + observations.w @ model.prior.slopes.T).detach())
    method.loss(bm.TaskBatch(observations, observations)).backward()
    assert model.prior.slopes.grad.abs().sum() > 0
    with pytest.raises(errors.ShapeError, match="2 task-level covariate"):
        method.adapt(data())
    with pytest.raises(errors.ShapeError, match="observations have 3"):
        method.adapt(data(covariates=3))
    with pytest.raises(errors.OptionError, match="width of w"):
        bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(), covariates=-1)


# -- non-centred forms --------------------------------------------------------------------------------------------


def correlated(x, y=None, mask=None):
    tau = pyro.sample("tau", dist.LogNormal(x.new_zeros(()), 1.0))
    root = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=x.dtype)
    with bm.task_plate(x):
        scale = tau[..., None, None] * root
        beta = pyro.sample("beta", dist.MultivariateNormal(x.new_ones(2), scale_tril=scale))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(beta[..., 0] + beta[..., 1] * x.squeeze(-1), 0.5), obs=y)


def centred_value(named, names):
    parts = {"sigma": lambda v: v.log().unsqueeze(-1)}
    return torch.cat([parts.get(n, lambda v: v if v.dim() > 2 else v.unsqueeze(-1))(named[n]) for n in names], -1)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (TwoSites, ["slope", "sigma"]),
        (lambda: correlated, ["beta"]),
        *((lambda n=n: model_with(n, 2), ["phi"]) for n in ("normal", "laplace", "low_rank", "horseshoe")),
    ],
)
def test_noncentred_is_the_same_density(model, names):
    """log p̃(ε) − log p(φ(ε)) is log |dφ/dε|, by autograd; the same likelihood, draw by draw."""
    model = model()
    observations = data(covariates=2) if isinstance(model, bm.TaskProgram) else data()
    program = bm.noncentred(model).prepare(observations)
    centred = (model if isinstance(model, bm.TaskProgram) else bm.TaskProgram(model)).prepare(observations)
    theta = draw_theta(centred, ())
    noise = torch.randn(4, program.layout.dim, dtype=F64, generator=torch.Generator().manual_seed(2))

    def to_phi(eps):
        named = program.named(eps.unsqueeze(0), observations, None if theta is None else theta.unsqueeze(0))
        return centred_value(named, names)[0]

    phi = to_phi(noise)
    torch.testing.assert_close(
        program.log_likelihood(noise, observations, theta), centred.log_likelihood(phi, observations, theta)
    )
    full = torch.autograd.functional.jacobian(to_phi, noise)
    log_det = torch.stack([full[i, :, i].det().abs().log() for i in range(4)])
    difference = program.log_joint(noise, observations, theta) - centred.log_joint(phi, observations, theta)
    torch.testing.assert_close(difference, log_det, rtol=1e-9, atol=1e-9)
    assert log_det.abs().min() > 1e-3  # control: without the Jacobian they differ


def test_noncentred_names_both_and_samples_as_the_centred_one():
    observations = data()
    program = bm.noncentred(TwoSites(), ["slope"])
    method = bm.ABML(program, inner_steps=3, inner_lr=0.01).double()
    sites = method.adapt(observations).sample(6)
    assert set(sites) == {"slope_decentered", "sigma", "slope"}
    assert sites["slope"].shape == (6, 4)
    draws, theta = program.sample_prior(4000, observations, 0, torch.zeros(1, dtype=F64))
    slope = program.named(draws, observations, theta)["slope"]
    assert abs(slope.std().item() - 1.0) < 4 / math.sqrt(2 * 16_000)


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("form", ["centred", "noncentred"])
def test_the_mean_field_optimum_is_the_same_posterior_in_both_forms(form, shift):
    """At the known optimum the ELBO's gradient is 0 within Monte Carlo error; half a deviation away it is not."""
    mean, scale = torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([0.2, 3.0], dtype=F64)
    program, observations = LinearHierarchy(mean, scale, 0.5), batch_of(3, 6, 2, dtype=F64)
    x, y = observations.x, observations.y
    precision = x.mT @ x / 0.25 + torch.diag(scale**-2)
    exact = torch.linalg.solve(precision, (x.mT @ y.unsqueeze(-1)).squeeze(-1) / 0.25 + mean / scale**2)
    spread = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    loc, log_scale = exact + shift * spread, spread.log()
    if form == "noncentred":
        program, loc, log_scale = bm.noncentred(program), (loc - mean) / scale, log_scale - scale.log()
    method = bm.ABML(program).double()
    method.prepare(observations)
    gradients = []
    for seed in range(50):
        point = loc[None].clone().requires_grad_(), log_scale[None].clone().requires_grad_()
        noise = torch.randn(40, 1, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
        value = method.elbo(*point, observations, None, noise).sum()
        gradients.append(torch.cat(torch.autograd.grad(value, point)))
    gradients = torch.stack(gradients)
    inside = gradients.mean(0).abs() < 4.5 * gradients.std(0) / math.sqrt(50)
    assert bool(inside.all()) == (shift == 0.0)


def test_what_cannot_be_written_in_non_centred_form():
    with pytest.raises(errors.OptionError, match="list of site names"):
        bm.noncentred(TwoSites(), "slope")
    with pytest.raises(errors.OptionError, match="list of site names"):
        bm.noncentred(TwoSites(), [])
    with pytest.raises(errors.SiteError, match="mu"):
        bm.noncentred(TwoSites(), ["mu"]).prepare(data())

    def gamma(x, y=None, mask=None):
        with bm.task_plate(x):
            rate = pyro.sample("rate", dist.Gamma(x.new_ones(()), 1.0))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(rate * x.squeeze(-1), 1.0), obs=y)

    for sites in (None, ["rate"]):
        with pytest.raises(errors.SiteError, match=r"rate"):
            bm.noncentred(gamma, sites).prepare(data())


# -- bad options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: bm.priors.Laplace(0.0),
        lambda: bm.priors.LowRankNormal(0),
        lambda: bm.priors.LowRankNormal(2, -1.0),
        lambda: bm.priors.Mixture(0),
        lambda: bm.priors.Mixture(2, spread=0.0),
        lambda: bm.priors.LayerScales(-1.0),
        lambda: bm.priors.Horseshoe(slab=0.0),
        lambda: bm.priors.as_prior("cauchy"),
    ],
)
def test_bad_prior_options(make):
    with pytest.raises(errors.OptionError):
        make()


def test_methods_that_need_a_gaussian_say_so():
    for name in ("laplace", "mixture", "layer_scales"):
        with pytest.raises(errors.UnsupportedError, match="Gaussian prior"):
            bm.BayesianLastLayer(model_with(name, task_modules="head"))
    with pytest.raises(errors.UnsupportedError, match="density"):
        bm.ABML(model_with("point"))


def test_scales_of_the_global_sites_are_those_that_were_asked_for():
    observations = data()
    model = model_with("horseshoe").prepare(observations)
    model.prior.slab = 0.5
    theta = draw_theta(model, (3,))
    sites = model.named_theta(theta, observations)
    product = sites["phi_global_scale"][:, None] * sites["phi_local_scale"]
    expected = 0.5 * product / (0.25 + product.square()).sqrt()
    torch.testing.assert_close(model.prior_moments(observations, theta)[1][:, 0], expected)
    network = bm.nets.mlp(1, [3], 1)
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), bm.priors.LayerScales(0.3, spread=0.4)).double()
    model.prepare(observations)
    theta = draw_theta(model, (3,))
    scales = model.named_theta(theta, observations)["phi_scale"]
    expected = scipy.stats.lognorm(s=0.4, scale=0.3).logpdf(scales).sum(-1)
    torch.testing.assert_close(model.log_theta(theta, observations, jacobian=False), torch.as_tensor(expected))


def test_moments_of_an_unusual_prior_are_robust_ones_of_a_normal():
    """For draws that are normal in unconstrained space the scaled median deviation is the standard deviation."""

    def program(x, y=None, mask=None):
        with bm.task_plate(x):
            # a StudentT of many degrees of freedom is a normal by another name
            a = pyro.sample("a", dist.StudentT(1e4, x.new_tensor(1.0), x.new_tensor(2.0)))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(a + 0 * x.squeeze(-1), x.new_ones(())), obs=y)

    observations = batch_of(400, 2, dtype=F64)
    loc, scale = bm.TaskProgram(program).prepare(observations).prior_moments(observations)
    # 400 tasks × 256 draws; the median deviation has an efficiency of 0.37
    assert abs(scale.mean() - 2.0) < 5 * 2.0 / math.sqrt(2 * 0.37 * 400 * 256)
    assert abs(loc.mean() - 1.0) < 5 * 2.0 * 1.26 / math.sqrt(400 * 256)


def half_normal(x, y=None, mask=None):
    with bm.task_plate(x):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 2.0))
        s = pyro.sample("s", dist.HalfNormal(x.new_tensor(1.0)))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(a + 0 * x.squeeze(-1), s), obs=y)


def test_what_cannot_be_rewritten_is_left_alone_unless_named():
    program = bm.noncentred(half_normal).prepare(data())
    assert [site.name for site in program.layout.local] == ["a_decentered", "s"]
    with pytest.raises(errors.SiteError, match="no non-centred form"):
        bm.noncentred(half_normal, ["s"]).prepare(data())


def alphas(x, y=None, mask=None):
    scale = pyro.param("scale", lambda: x.new_tensor(1.0))
    with bm.task_plate(x):
        base = pyro.sample("alpha_base", dist.Normal(x.new_tensor(0.0), scale))
        other = pyro.sample("other", dist.Normal(x.new_tensor(1.0), 2.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(base + other * x.squeeze(-1), 1.0), obs=y)


def test_noncentred_twice_shares_parameters_and_adds_sites():
    observations = data()
    first = bm.TaskProgram(alphas).double().prepare(observations)
    with torch.no_grad():
        first.scope.values[0].fill_(9.0)  # trained
    second = bm.noncentred(first, ["alpha_base"]).prepare(observations)
    assert second.scope.constrained()["scale"] == 9.0
    assert set(second.sample_prior(2, observations)[0].shape) == {2, 4}
    named = second.named(torch.ones(1, 4, 2, dtype=F64), observations)
    assert set(named) == {"alpha_base_decentered", "other", "alpha_base"}
    torch.testing.assert_close(named["alpha_base"], torch.full((1, 4), 9.0, dtype=F64))
    third = bm.noncentred(second, ["other"]).prepare(observations)
    assert {site.name for site in third.layout.local} == {"alpha_base_decentered", "other_decentered"}
    assert bm.noncentred(second).sites is None


def test_noncentred_networks_check_what_networks_check():
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.likelihoods.Poisson(exposure=-1), "normal").double()
    x = torch.ones(2, 3, 2, dtype=F64)
    good = bm.Observations(x, torch.ones(2, 3, dtype=F64))
    method = bm.MAML(bm.noncentred(model), inner_lr=1e-3).double()
    method.adapt(good)
    bad = x.clone()
    bad[1, 2, 1] = 0.0
    with pytest.raises(errors.DataError, match="task 1, shot 2"):
        method.adapt(bm.Observations(bad, good.y))
