"""Last layers with unknown noise: the Pyro program, the closed forms and other libraries say the same."""

import math

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.gaussian import fit_linear_gaussian, fit_matrix_normal
from tests.numerics import maximise_evidence

F64 = torch.float64
#: outputs, components and what is known of the noise
KINDS = [
    (outputs, components, noise)
    for outputs in (1, 3)
    for components in (1, 3)
    for noise in ("known", "inverse_gamma", "inverse_wishart")
    if not (outputs == 1 and noise == "inverse_wishart")
]
each_kind = pytest.mark.parametrize(("outputs", "components", "noise"), KINDS)


def setting(outputs=1, components=1, noise="known", tasks=4, shots=6, ragged=False, scale=0.4):
    """A model with parameters that are all different, and observations."""
    with torch.random.fork_rng():
        torch.manual_seed(outputs)
        network = bm.nets.mlp(2, [4], outputs, activation="tanh")
        model = bm.ConjugateModel(network, bm.Gaussian(scale), components, noise=noise).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        x, y = torch.randn(tasks, shots, 2, dtype=F64), torch.randn(tasks, shots, outputs, dtype=F64)
        mask = torch.rand(tasks, shots) < 0.7 if ragged else None
    return model, bm.Observations(x, y.squeeze(-1) if outputs == 1 else y, mask)


def method_of(model, **options):
    make = bm.BayesianLastLayer if model.num_components == 1 else bm.BayesianLastLayerMixture
    return make(model, **options)


def shots(observations, index):
    mask = None if observations.mask is None else observations.mask[:, index]
    return bm.Observations(observations.x[:, index], observations.y[:, index], mask)


# -- the program and the posterior are one ------------------------------------------------------------------------


@each_kind
def test_bayes_rule_holds_at_every_point(outputs, components, noise):
    """log p(S, φ) − log q(φ) = log p(S), wherever φ is: the Pyro program against density and evidence."""
    model, observations = setting(outputs, components, noise, ragged=True)
    posterior = method_of(model).adapt(observations)
    u = posterior.draws(5, 1).u
    for point in (u, u + 0.5 * torch.randn(u.shape, generator=torch.Generator().manual_seed(0), dtype=F64)):
        with torch.no_grad():
            gap = model.log_joint(point, observations) - posterior.log_prob(point)
        torch.testing.assert_close(gap, posterior.log_evidence.expand_as(gap), rtol=1e-9, atol=1e-9)
    # control: half the scale is another density
    loc = u.mean(0)
    gap = model.log_joint(u, observations) - posterior.log_prob(loc + 2 * (u - loc))
    assert (gap - posterior.log_evidence).abs().max() > 0.1


@pytest.mark.parametrize("vectorize", [False, True])
@each_kind
def test_the_elbo_is_the_evidence(outputs, components, noise, vectorize):
    """For every particle, since the guide is the posterior."""
    model, observations = setting(outputs, components, noise)
    method = method_of(model)
    elbo = pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=2)
    with torch.no_grad():
        loss = elbo.loss(method.model, method.guide, observations)
    assert loss == pytest.approx(-method.adapt(observations).log_evidence.sum().item(), rel=1e-9)


@pytest.mark.parametrize("noise", ["known", "inverse_gamma"])
def test_pyros_gradient_is_that_of_the_evidence(noise):
    model, observations = setting(1, 1, noise)
    method = method_of(model, objective="evidence")
    elbo = pyro.infer.Trace_ELBO()
    elbo.differentiable_loss(method.model, method.guide, observations).backward()
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    split = bm.TaskBatch(shots(observations, slice(0, 2)), shots(observations, slice(2, 6)))
    (4 * method.loss(split)).backward()
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-9)


# -- evidence and predictive against other ways -------------------------------------------------------------------


def test_inverse_gamma_against_quadrature():
    """Evidence and predictive by integrating known noise over the prior of its variance, on a grid."""
    model, observations = setting(1, 1, "inverse_gamma", tasks=1)
    posterior = method_of(model).adapt(observations)
    shape, rate = (part.item() for part in model.gamma_parameters())
    prior = stats.invgamma(shape, scale=rate)
    log_variance = np.linspace(math.log(rate) - 12, math.log(rate) + 16, 40_001)
    step = log_variance[1] - log_variance[0]
    variance = np.exp(log_variance)

    def log_marginal(x, y):
        design = model.features(x)[0, 0]
        cov = torch.eye(len(y), dtype=F64) + design @ torch.diag((2 * model.log_scale[0, 0]).exp()) @ design.mT
        residual = y - design @ model.loc[0, 0]
        square = residual @ torch.linalg.solve(cov, residual)
        each = -0.5 * (square.item() / variance + len(y) * np.log(2 * np.pi * variance) + torch.logdet(cov).item())
        return np.logaddexp.reduce(each + prior.logpdf(variance) + log_variance) + math.log(step)

    with torch.no_grad():
        evidence = log_marginal(observations.x, observations.y[0])
        assert posterior.log_evidence.item() == pytest.approx(evidence, abs=1e-8)
        x = torch.tensor([[[0.3, -1.0]]], dtype=F64)
        fn = posterior.predictive(x)
        for y in (-3.0, 0.0, 1.0):
            both = torch.cat([observations.x, x], 1), torch.cat([observations.y[0], torch.tensor([y], dtype=F64)])
            expected = log_marginal(*both) - evidence
            assert fn.log_prob(torch.tensor([[y]], dtype=F64)).item() == pytest.approx(expected, abs=1e-7)
    # control: the Gaussian with the same mean and spread has other tails
    normal = torch.distributions.Normal(fn.mean, fn.stddev)
    far = torch.tensor([[8.0]], dtype=F64)
    assert (normal.log_prob(far) - fn.log_prob(far)).abs() > 0.5


def test_inverse_wishart_against_draws_of_the_covariance():
    """Evidence by Monte Carlo over SciPy's inverse-Wishart, given which Y is matrix normal."""
    model, observations = setting(3, 1, "inverse_wishart", tasks=1)
    observations = shots(observations, slice(0, 2))  # with more rows few draws of Σ carry the mean
    posterior = method_of(model).adapt(observations)
    df, root = (part.detach()[0] for part in model.wishart_parameters())
    scatter = root @ root.mT
    draws = stats.invwishart(df.item(), scatter.numpy()).rvs(20_000, random_state=np.random.default_rng(0))
    with torch.no_grad():
        design = model.features(observations.x)[0, 0]
        rows = torch.eye(2, dtype=F64) + design @ torch.diag((2 * model.log_scale[0]).exp()) @ design.mT
        residual = observations.y[0] - design @ model.loc[0].mT
    columns = torch.linalg.cholesky(torch.from_numpy(draws))
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(rows), residual, upper=False)
    white = torch.linalg.solve_triangular(columns, white.mT, upper=False)
    log_det = columns.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    each = -0.5 * white.square().sum((-2, -1)) - 3 * math.log(2 * math.pi) - 2 * log_det - 1.5 * torch.logdet(rows)
    weight = (each - posterior.log_evidence).exp()
    assert abs(weight.mean() - 1.0) < 5 * weight.std() / 20_000**0.5
    assert weight.std() / 20_000**0.5 < 0.03, "the check can see a difference"


@each_kind
def test_predictive_by_bayes_rule(outputs, components, noise):
    """log p(y | S) = log p(S, y) − log p(S) for one query point, and for all jointly where there is a closed form."""
    model, observations = setting(outputs, components, noise, shots=9)
    method = method_of(model)
    support, query = shots(observations, slice(0, 5)), shots(observations, slice(5, 9))
    posterior = method.adapt(support)
    single = posterior.predictive(query).log_prob(query.y)
    for i in range(4):
        more = bm.union(support, shots(query, slice(i, i + 1)))
        expected = method.adapt(more).log_evidence - posterior.log_evidence
        torch.testing.assert_close(single[:, i], expected, rtol=1e-9, atol=1e-9)
    expected = method.adapt(observations).log_evidence - posterior.log_evidence
    if outputs > 1 and noise != "known":
        with pytest.raises(errors.NoClosedFormError, match="joint=False"):
            posterior.predictive(query, joint=True)
    else:
        joint = posterior.predictive(query, joint=True).log_prob(query.y.flatten(1))
        torch.testing.assert_close(joint, expected, rtol=1e-9, atol=1e-9)
        assert (single.sum(-1) - joint).abs().max() > 1e-2  # points are dependent
    # the three objectives, through the method
    batch = bm.TaskBatch(support, query)
    losses = {o: method_of(model, objective=o).loss(batch).item() for o in ("evidence", "predictive", "marginal")}
    assert losses["evidence"] == pytest.approx(-method.adapt(observations).log_evidence.mean().item(), rel=1e-9)
    assert losses["predictive"] == pytest.approx(-expected.mean().item(), rel=1e-9)
    assert losses["marginal"] == pytest.approx(-single.sum(-1).mean().item(), rel=1e-9)


@pytest.mark.parametrize(("outputs", "noise"), [(1, "inverse_gamma"), (3, "inverse_gamma"), (3, "inverse_wishart")])
def test_draws_have_the_posteriors_moments(outputs, noise):
    model, observations = setting(outputs, 1, noise, tasks=2, shots=12)
    posterior = method_of(model).adapt(observations)
    n, belief = 20_000, posterior.belief
    sites = posterior.sample(n, 3)
    if noise == "inverse_gamma":
        mean = belief.rate[:, 0] / (belief.shape[:, 0] - 1)
        found, covariance = sites["noise_variance"], mean[..., None, None] * (belief.root @ belief.root.mT)[:, 0]
        variance = covariance.diagonal(dim1=-2, dim2=-1)
    else:
        mean = belief.scatter[:, 0] / (belief.df[:, 0] - outputs - 1)[:, None, None]
        found, rows = sites["noise_covariance"], (belief.root @ belief.root.mT)[:, 0]
        variance = mean.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * rows.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    assert ((found.mean(0) - mean).abs() / (found.std(0) / n**0.5)).max() < 5
    phi = sites["phi"].unflatten(-1, belief.loc.shape[-2:])
    assert ((phi.mean(0) - belief.loc[:, 0]).abs() / (phi.std(0) / n**0.5)).max() < 5
    square = (phi - belief.loc[:, 0]).square()
    assert ((square.mean(0) - variance).abs() / (square.std(0) / n**0.5)).max() < 5
    assert ((square.mean(0) - 1.1 * variance).abs() / (square.std(0) / n**0.5)).max() > 5, "control"
    y = posterior.predict(observations, 20_000, generator=4)
    expected = posterior.predictive(observations).mean
    assert ((y.mean(0) - expected).abs() / (y.std(0) / 20_000**0.5)).max() < 5
    spread = posterior.predictive(observations).variance
    square = (y - expected).square()
    assert ((square.mean(0) - spread).abs() / (square.std(0) / 20_000**0.5)).max() < 5


def test_known_noise_is_the_bayesian_last_layer():
    """One component with known noise is today's last layer, for one scale an output too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(2, [4], 3, activation="tanh")
    model = bm.NeuralTaskModel(network, bm.Gaussian([0.1, 0.5, 2.0]), "normal", task_modules="head").double()
    _, observations = setting(3, ragged=True, shots=8)
    support, query = shots(observations, slice(0, 5)), shots(observations, slice(5, 8))
    a = bm.BayesianLastLayer(model).adapt(support)
    b = bm.BayesianLastLayer(bm.ConjugateModel.of(model)).adapt(support)
    torch.testing.assert_close(a.log_evidence, b.log_evidence, rtol=1e-6, atol=1e-6)  # scales in float32 at first
    torch.testing.assert_close(a.predictive(query).mean, b.predictive(query).mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.predictive(query).stddev, b.predictive(query).stddev, rtol=1e-6, atol=1e-6)
    a, b = a.predictive(query, joint=True), b.predictive(query, joint=True)
    torch.testing.assert_close(a.covariance_matrix, b.covariance_matrix, rtol=1e-6, atol=1e-6)
    # control: with one scale for all it is another
    shared = bm.NeuralTaskModel(network, bm.Gaussian(0.5), "normal", task_modules="head").double()
    other = bm.BayesianLastLayer(shared).adapt(support).predictive(query, joint=True)
    assert (other.covariance_matrix - a.covariance_matrix).abs().max() > 0.1


def test_each_outputs_scale_is_a_regression_of_its_own():
    _, observations = setting(3, shots=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(2, [4], 3, activation="tanh")
    scales = [0.25, 0.5, 2.0]
    model = bm.NeuralTaskModel(network, bm.Gaussian(scales), "normal", task_modules="head").double()
    posterior = bm.BayesianLastLayer(model).adapt(observations)
    total = 0.0
    for i, scale in enumerate(scales):
        single = nn.Sequential(*network[:-1], nn.Linear(4, 1))
        with torch.no_grad():
            single[-1].weight.copy_(network[-1].weight[i : i + 1])
            single[-1].bias.copy_(network[-1].bias[i : i + 1])
        one = bm.NeuralTaskModel(single, bm.Gaussian(scale), "normal", task_modules="head").double()
        alone = bm.BayesianLastLayer(one).adapt(observations.with_y(observations.y[..., i]))
        found = posterior.predictive(observations)
        torch.testing.assert_close(found.mean[..., i], alone.predictive(observations).mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.stddev[..., i], alone.predictive(observations).stddev, rtol=1e-9, atol=1e-9)
        total = total + alone.log_evidence
    torch.testing.assert_close(posterior.log_evidence, total, rtol=1e-9, atol=1e-9)


# -- online -------------------------------------------------------------------------------------------------------


def online(posterior, observations, pieces):
    for piece in pieces:
        posterior = posterior.update(shots(observations, piece))
    return posterior


@pytest.mark.parametrize("pieces", [[slice(i, i + 1) for i in range(3, 9)], [slice(3, 7), slice(7, 9)]])
@each_kind
def test_online_updates_give_the_batch_answer(outputs, components, noise, pieces):
    model, observations = setting(outputs, components, noise, shots=9, ragged=True)
    method = method_of(model)
    batch, start = method.adapt(observations), method.adapt(shots(observations, slice(0, 3)))
    found = online(start, observations, pieces)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(found.log_evidence, batch.log_evidence, **close)
    torch.testing.assert_close(found.component_probabilities, batch.component_probabilities, **close)
    for name, value in batch.belief.tensors.items():
        other = found.belief.tensors[name]
        if name == "root":  # a root is one of many
            value, other = value @ value.mT, other @ other.mT
        torch.testing.assert_close(other, value, **close)
    assert found.support.shots == 9
    short = online(start, observations, pieces[:-1])  # control: one piece is missing
    assert (short.log_evidence - batch.log_evidence).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.3, [0.1, 0.5, 2.0]])
def test_online_updates_of_the_last_layer(scale):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(2, [4], 3, activation="tanh")
    model = bm.NeuralTaskModel(network, bm.Gaussian(scale), "low_rank", task_modules="head").double()
    _, observations = setting(3, shots=9, ragged=True)
    method = bm.BayesianLastLayer(model)
    batch, start = method.adapt(observations), method.adapt(shots(observations, slice(0, 0)))
    found = online(start, observations, [slice(i, i + 1) for i in range(9)])
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(found.loc, batch.loc, **close)
    torch.testing.assert_close(found.covariance, batch.covariance, **close)
    torch.testing.assert_close(found.log_evidence, batch.log_evidence, **close)
    assert (start.update(shots(observations, slice(0, 8))).loc - batch.loc).abs().max() > 1e-4


@pytest.mark.parametrize("form", ["information", "covariance"])
def test_both_forms_against_dense_algebra(form):
    generator = torch.Generator().manual_seed(0)
    design, y = torch.randn(5, 4, generator=generator, dtype=F64), torch.randn(5, generator=generator, dtype=F64)
    mean, root = torch.randn(4, generator=generator, dtype=F64), torch.randn(4, 6, generator=generator, dtype=F64)
    fit = fit_linear_gaussian(design, y, mean, root, torch.tensor(0.3, dtype=F64), form=form)
    prior = root @ root.mT
    total = design @ prior @ design.mT + 0.09 * torch.eye(5, dtype=F64)
    gain = prior @ design.mT @ torch.linalg.inv(total)
    torch.testing.assert_close(fit.mean, mean + gain @ (y - design @ mean), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.covariance, prior - gain @ design @ prior, rtol=1e-9, atol=1e-9)
    expected = torch.distributions.MultivariateNormal(design @ mean, total).log_prob(y)
    torch.testing.assert_close(fit.log_evidence, expected, rtol=1e-10, atol=1e-10)
    # of one output and one observation the evidence is SciPy's Student-t
    df, scatter = torch.tensor(5.0, dtype=F64), torch.tensor([[2.0]], dtype=F64)
    one = fit_matrix_normal(design[:1], y[:1, None], mean[:, None], root, df, scatter, form=form)
    spread = ((1 + design[:1] @ prior @ design[:1].mT) * 2.0 / 5.0).sqrt().item()
    expected = stats.t(5.0, loc=(design[:1] @ mean).item(), scale=spread).logpdf(y[0].item())
    assert one.log_evidence.item() == pytest.approx(expected, rel=1e-10)


# -- learning -----------------------------------------------------------------------------------------------------


def test_evidence_recovers_the_noises_prior():
    """1000 simulated tasks: shape and rate of the variances' prior within 4 standard errors of the truth."""
    generator = torch.Generator().manual_seed(4)
    tasks, shape, rate = 1000, 4.0, 2.0
    variance = rate / torch._standard_gamma(torch.full((tasks, 1), shape, dtype=F64), generator)
    x = torch.randn(tasks, 12, 1, generator=generator, dtype=F64)
    slope = 1.0 + variance.sqrt() * 0.5 * torch.randn(tasks, 1, generator=generator, dtype=F64)
    y = slope * x.squeeze(-1) + variance.sqrt() * torch.randn(tasks, 12, generator=generator, dtype=F64)
    model = bm.ConjugateModel(nn.Sequential(nn.Linear(1, 1, bias=False)), bm.Gaussian(1.0), noise="inverse_gamma")
    method = bm.BayesianLastLayer(model.double(), objective="evidence")
    batch = bm.TaskBatch(bm.Observations(x[:, :6], y[:, :6]), bm.Observations(x[:, 6:], y[:, 6:]))
    parameters = [p for p in method.parameters() if p.requires_grad]
    maximise_evidence(method, batch, max_iter=100)
    size = sum(p.numel() for p in parameters)
    names = {id(p): n for n, p in model.named_parameters()}

    def total(flat):
        parts = dict(zip((names[id(p)] for p in parameters), flat.split([p.numel() for p in parameters]), strict=True))
        parts = {n: v.reshape(model.get_parameter(n).shape) for n, v in parts.items()}
        posterior = torch.func.functional_call(
            _Evidence(method), {f"method.program.{n}": v for n, v in parts.items()}, batch
        )
        return posterior * tasks

    flat = torch.cat([p.detach().flatten() for p in parameters])
    information = torch.autograd.functional.hessian(total, flat)
    error = torch.linalg.inv(information).diagonal().sqrt()
    truth = {"loc": 1.0, "log_scale": math.log(0.5), "log_shape": math.log(shape), "log_rate": math.log(rate)}
    expected = torch.cat([torch.full((p.numel(),), truth[names[id(p)]], dtype=F64) for p in parameters])
    assert size == 4
    assert ((flat - expected).abs() / error).max() < 4
    start = torch.tensor(math.log(3.0)) - expected[2]  # control: where the shape began is told apart, as is the rate
    assert max(abs(start / error[2]), abs((math.log(3.0) - math.log(rate)) / error[3])) > 4


class _Evidence(nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, batch):
        return self.method.loss(batch)


# -- edges --------------------------------------------------------------------------------------------------------


@each_kind
def test_without_support_it_is_the_prior(outputs, components, noise):
    model, observations = setting(outputs, components, noise)
    posterior = method_of(model).adapt(shots(observations, slice(0, 0)))
    assert (posterior.log_evidence.abs() < 1e-12).all()
    u, _ = model.sample_prior(6, observations, 1)
    with torch.no_grad():
        torch.testing.assert_close(posterior.log_prob(u), model.log_prior(u, observations), rtol=1e-9, atol=1e-9)


@each_kind
def test_saved_and_read(outputs, components, noise, tmp_path):
    model, observations = setting(outputs, components, noise)
    posterior = method_of(model).adapt(observations)
    posterior.save(tmp_path / "posterior.pt")
    again = bm.load_posterior(tmp_path / "posterior.pt", model)
    assert torch.equal(again.predict(observations, 3, generator=1), posterior.predict(observations, 3, generator=1))


def test_the_users_model_stays_as_it_was():
    model = bm.NeuralTaskModel(bm.nets.mlp(2, [4], 1), bm.Gaussian(0.5, learn_scale=True), task_modules="head")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, observations = setting()
    data = observations.to(dtype=torch.float32)
    method = bm.BayesianLastLayer(model, noise="inverse_gamma")
    torch.optim.SGD(method.parameters(), 1.0).zero_grad()
    method.loss(bm.TaskBatch(shots(data, slice(0, 3)), shots(data, slice(3, 6)))).backward()
    torch.optim.SGD(method.parameters(), 1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.likelihood.log_scale.requires_grad
    assert not method.program.likelihood.log_scale.requires_grad


def test_bad_input():
    network, gaussian = bm.nets.mlp(2, [4], 2), bm.Gaussian(0.5)
    with pytest.raises(errors.OptionError, match="Unknown noise 'gamma'"):
        bm.ConjugateModel(network, gaussian, noise="gamma")
    with pytest.raises(errors.OptionError, match="Unknown noise 'gamma'"):
        bm.BayesianLastLayer(bm.NeuralTaskModel(network, gaussian, task_modules="head"), noise="gamma")
    with pytest.raises(errors.OptionError, match="use noise='inverse_gamma'"):
        bm.ConjugateModel(bm.nets.mlp(2, [4], 1), gaussian, noise="inverse_wishart")
    with pytest.raises(errors.OptionError, match="num_components"):
        bm.ConjugateModel(network, gaussian, 0)
    with pytest.raises(errors.ModelError, match="ends in a Linear"):
        bm.ConjugateModel(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), gaussian)
    with pytest.raises(errors.UnsupportedError, match="StudentT"):
        bm.ConjugateModel(network, bm.likelihoods.StudentT())
    with pytest.raises(errors.UnsupportedError, match="task_modules"):
        bm.ConjugateModel.of(bm.NeuralTaskModel(network, gaussian))
    with pytest.raises(errors.UnsupportedError, match="LowRankNormal"):
        bm.ConjugateModel.of(bm.NeuralTaskModel(network, gaussian, "low_rank", task_modules="head"))
    with pytest.raises(errors.UnsupportedError, match="covariates"):
        bm.ConjugateModel.of(bm.NeuralTaskModel(network, gaussian, "normal", task_modules="head", covariates=1))
    with pytest.raises(errors.UnsupportedError, match="BayesianLastLayerMixture"):
        bm.BayesianLastLayer(bm.ConjugateModel(network, gaussian, 3))
    with pytest.raises(errors.OptionError, match="leave it out"):
        bm.BayesianLastLayer(bm.ConjugateModel(network, gaussian, noise="inverse_gamma"), noise="known")
    model, observations = setting(3, 1, "inverse_gamma")
    with pytest.raises(errors.ShapeError, match="width 1"):
        method_of(model).adapt(observations.with_y(observations.y[..., 0]))
    posterior = method_of(model).adapt(observations)
    with pytest.raises(errors.DataError, match="y=None"):
        posterior.update(observations.with_y(None))
    with pytest.raises(errors.ShapeError, match="tasks"):
        posterior.update(observations.tasks([0, 1]))
    with pytest.raises(errors.NonFiniteDataError, match="not finite"):
        posterior.update(observations.with_y(observations.y * math.nan))


def test_which_noise_is_better_told_apart_by_the_evidence():
    """Tasks with noise of different sizes: inferring it beats one scale; with one true scale it does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, 1, generator=generator)
    for spread, better in ((1.0, "inverse_gamma"), (0.0, "known")):
        sigma = (spread * torch.randn(200, 1, generator=generator)).exp() * 0.3
        y = x.squeeze(-1) + sigma * torch.randn(200, 10, generator=generator)
        batch = bm.TaskBatch(bm.Observations(x[:, :5], y[:, :5]), bm.Observations(x[:, 5:], y[:, 5:]))
        losses = {}
        for noise in ("known", "inverse_gamma"):
            model = bm.NeuralTaskModel(
                nn.Sequential(nn.Linear(1, 1)), bm.Gaussian(0.3, learn_scale=True), "normal", task_modules="head"
            )
            method = bm.BayesianLastLayer(model, objective="evidence", noise=noise)
            optimizer = torch.optim.Adam(method.parameters(), 0.1)
            for _ in range(80):
                optimizer.zero_grad()
                loss = method.loss(batch)
                loss.backward()
                optimizer.step()
            losses[noise] = loss.item()
        gain = losses["known"] - losses["inverse_gamma"]
        assert gain > 1.0 if better == "inverse_gamma" else abs(gain) < 0.5
