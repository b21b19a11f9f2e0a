"""DeepKernel against the exact GP of the task family, a Bayesian last layer, finite differences, and brute force."""

import argparse
import math

import pytest
import torch
from pyro.infer import Trace_ELBO

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models.deep_kernel import kernels  # importing gpytorch by itself warns
from tests.numerics import maximise_evidence, slope_along
from tests.programs import TwoSites, batch_of

F64 = torch.float64
NOISE = 0.05
FAMILIES = {"eq": "rbf", "matern52": "matern52"}


def network(features=1, outputs=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bm.nets.mlp(features, [8, 5], outputs, activation="tanh")


def deep_kernel(noise=0.3, dtype=F64, **options):
    model = bm.NeuralTaskModel(network(), bm.Gaussian(noise, learn_scale=True), "point")
    return bm.DeepKernel(model, **options).to(dtype)


def fixed(kernel, length_scale=0.25, variance=1.0):
    """A deep kernel on raw x at known hyper-parameters."""
    method = deep_kernel(NOISE**0.5, kernel=kernel, inputs="raw")
    method.gp.kernel.base_kernel.lengthscale = length_scale
    method.gp.kernel.outputscale = variance
    return method


def gp_tasks(family, ragged=False, tasks=4):
    batch = bm.tasks.GPTasks(family).sample(tasks, support=12, query=9, generator=3).to(dtype=F64)
    if not ragged:
        return batch
    support, query = batch.support, batch.query
    mask = torch.arange(12) < torch.tensor([[12], [5], [1], [0]])
    keep = torch.arange(9) < torch.tensor([[9], [2], [6], [1]])
    return bm.TaskBatch(
        bm.Observations(support.x, support.y, mask), bm.Observations(query.x, query.y, keep), population=tasks
    )


# -- truth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_kernel_is_the_oracle_of_the_family(family, ragged):
    """Posterior, predictive and evidence; control: another length scale is far off."""
    batch, oracle = gp_tasks(family, ragged), bm.tasks.GPTasks(family)
    method, wrong = fixed(FAMILIES[family]), fixed(FAMILIES[family], 0.3)
    x = batch.query.x
    posterior = method.adapt(batch.support)
    joint, expected = posterior.predictive(x, joint=True), oracle.predictive(batch.support, x)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(joint.mean, expected.mean, **close)
    torch.testing.assert_close(joint.covariance_matrix, expected.covariance_matrix, **close)
    marginals, each = posterior.predictive(x), oracle.marginals(batch.support, x)
    torch.testing.assert_close(marginals.mean, each.mean, **close)
    torch.testing.assert_close(marginals.stddev, each.stddev, **close)
    torch.testing.assert_close(posterior.log_evidence, oracle.log_evidence(batch.support), **close)
    torch.testing.assert_close(
        method.loss(batch), -oracle.log_evidence(batch.union()).mean(), **close
    )  # by the other route: a factorisation with the noise in it
    off = (wrong.adapt(batch.support).predictive(x).mean - each.mean).abs()
    assert off[0].max() > 1e-2
    assert abs(wrong.loss(batch) - method.loss(batch)) > 1e-2


def test_the_predictive_objective_is_the_rest_of_the_evidence():
    batch = gp_tasks("eq")
    method = fixed("rbf")
    method.objective = "predictive"
    log_prob = method.adapt(batch.support).predictive(batch.query.x, joint=True).log_prob(batch.query.y)
    torch.testing.assert_close(method.loss(batch), -log_prob.mean(), rtol=1e-6, atol=1e-6)


def test_a_linear_kernel_is_a_last_layer_without_a_bias():
    """k(x, x') = v f(x)ᵀ f(x'): weights N(0, v). Control: another prior scale gives another posterior."""
    layers = network()
    layers[-1] = torch.nn.Linear(5, 1, bias=False)
    torch.nn.init.zeros_(layers[-1].weight)
    variance, batch = 1.7, gp_tasks("eq", ragged=True)
    kernel = kernels.LinearKernel()
    kernel.variance = variance
    gp = bm.DeepKernel(
        bm.NeuralTaskModel(layers, bm.Gaussian(0.3), "point"), kernel=kernel, inputs="features", learn_mean=False
    ).to(F64)

    def last_layer(scale):
        prior = bm.priors.Normal(scale)
        model = bm.NeuralTaskModel(layers, bm.Gaussian(0.3), prior, task_modules="head")
        return bm.BayesianLastLayer(model, objective="evidence").to(F64)

    exact, wrong = last_layer(variance**0.5), last_layer(variance)
    found, expected = (m.adapt(batch.support).predictive(batch.query.x, joint=True) for m in (gp, exact))
    # the kernel matrix has rank 5 and the jitter; variances there are near 0
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.covariance_matrix, expected.covariance_matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gp.loss(batch), exact.loss(batch), rtol=1e-5, atol=1e-5)
    assert abs(gp.loss(batch) - wrong.loss(batch)) > 1e-2


@pytest.mark.parametrize("kernel", ["rbf", "matern12", "matern32", "spectral_mixture", "linear"])
@pytest.mark.parametrize("inputs", ["raw", "features", "both"])
def test_gradients_of_the_evidence_by_finite_differences(kernel, inputs):
    method, batch = deep_kernel(kernel=kernel, inputs=inputs), gp_tasks("eq", ragged=True)
    method.prepare(batch)
    method.loss(batch).backward()
    parameters = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in parameters)
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        direction = torch.randn(p.shape, generator=generator, dtype=F64)
        slope = slope_along(lambda: method.loss(batch), p, direction)
        expected = (p.grad * direction).sum().item()
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


def test_the_elbo_of_model_and_guide_is_the_evidence():
    """Nothing is left to infer: the bound is tight, ragged tasks included."""
    method, batch = deep_kernel(), gp_tasks("eq", ragged=True)
    elbo = Trace_ELBO().loss(method.model, method.guide, batch)
    assert elbo == pytest.approx(4 * method.loss(batch).item(), rel=1e-9)


# -- draws --------------------------------------------------------------------------------------------------------


def test_draws_have_the_moments_of_the_closed_form():
    method, batch = deep_kernel(kernel="matern52", inputs="both"), gp_tasks("eq", ragged=True)
    posterior, n = method.adapt(batch.support), 20_000
    x = bm.Observations(batch.query.x)
    joint = posterior.predictive(x, joint=True)
    y = posterior.predict(x, n, generator=1)
    error = joint.variance.sqrt() / n**0.5
    assert ((y.mean(0) - joint.mean).abs() < 4.5 * error).all()
    centred = y - joint.mean
    found, expected = torch.einsum("nti,ntj->tij", centred, centred) / n, joint.covariance_matrix
    spread = torch.einsum("ti,tj->tij", joint.variance, joint.variance)
    assert ((found - expected).abs() < 5 * ((spread + expected.square()) / n).sqrt()).all()
    # the mean density over draws of φ is the predictive one
    draws = posterior.draws(n, 2)
    each = posterior.log_likelihood(batch.query, draws=draws)
    mean = each.logsumexp(0) - math.log(n)
    error = (each - mean).exp().std(0) / n**0.5
    expected = posterior.predictive(batch.query).log_prob(batch.query.y).masked_fill(~batch.query.mask, 0.0)
    normal = error < 0.02  # far in the tails a mean of densities rests on a few draws
    assert normal[batch.query.mask].double().mean() > 0.7
    assert ((mean - expected).abs() <= 5 * error + 1e-9)[normal].all()
    assert ((mean + 0.1 - expected).abs() > 5 * error)[normal].all()  # control


def test_bayes_rule_in_draws():
    """log p(S, u) − log p(u | S) is the evidence, for every u: likelihood, prior and posterior fit one another."""
    method = deep_kernel(kernel="matern12", inputs="raw")  # rough: the jitter counts for nothing
    posterior = method.adapt(gp_tasks("eq", ragged=True).support)
    draws = posterior.draws(5, 1)
    evidence = posterior.log_joint(draws) - posterior.log_prob(draws.u)
    torch.testing.assert_close(evidence, posterior.log_evidence.expand(5, -1), rtol=1e-5, atol=1e-5)


def test_f_at_the_support_and_files(tmp_path):
    method, batch = deep_kernel(0.01, kernel="rbf", inputs="raw"), gp_tasks("eq")
    posterior = method.adapt(batch.support)
    f = posterior.sample(200, 1)["f"]
    assert f.shape == (200, 4, 12)
    found, expected = f.mean(0), posterior.predictive(batch.support.x).mean
    assert ((found - expected).abs() < 5 * f.std(0) / 200**0.5 + 1e-6).all()
    posterior.save(tmp_path / "posterior.pt")
    again = bm.load_posterior(tmp_path / "posterior.pt", method.program)
    assert isinstance(again, bm.GPPosterior)
    assert torch.equal(again.predictive(batch.query.x).mean, posterior.predictive(batch.query.x).mean)


def test_the_evidence_recovers_the_family():
    """Length scale, variance and noise of 500 simulated tasks, within 3 standard errors."""
    method = deep_kernel(0.5, kernel="rbf", inputs="raw", learn_mean=False)
    batch = bm.tasks.GPTasks("eq").sample(500, support=5, query=5, generator=11).to(dtype=F64)
    maximise_evidence(method, batch, max_iter=25)
    kernel, noise = method.gp.kernel, method.gp.likelihood
    logs = torch.stack([kernel.base_kernel.lengthscale.log().squeeze(), kernel.outputscale.log(), noise.scale.log()])
    raw = [kernel.base_kernel.raw_lengthscale, kernel.raw_outputscale, noise.log_scale]
    slopes = torch.stack([torch.autograd.grad(value, p)[0].squeeze() for value, p in zip(logs, raw)])
    score = []  # of 100 of the tasks, for the information in each
    for value in method.gp.log_evidence(batch.tasks(range(100)).union()):
        score.append(torch.stack([g.squeeze() for g in torch.autograd.grad(value, raw, retain_graph=True)]) / slopes)
    score = torch.stack(score)
    error = torch.linalg.inv(5 * score.T @ score).diagonal().sqrt()
    truth = torch.tensor([0.25, 1.0, 0.05**0.5], dtype=F64).log()
    assert ((logs - truth).abs() < 3 * error).all()
    assert (error < 0.08).all()  # control: an error of a quarter would be seen
    assert bm.scores(method.adapt(batch.support), batch).num_samples == 0


def test_checkpoints(tmp_path):
    """A run is read back with its kernel; another kernel is refused."""
    options = {"kernel": "spectral_mixture", "inputs": "raw"}
    method, tasks = deep_kernel(dtype=torch.float32, **options), bm.tasks.Sinusoid(0.1)
    bm.fit(method, tasks, steps=3, out=tmp_path / "run", progress=False, device="cpu", dtype=torch.float32)
    batch = tasks.sample(2, support=5, query=5)
    again = bm.load_method(tmp_path / "run", deep_kernel(dtype=torch.float32, **options), batch)
    assert torch.equal(again.loss(batch), method.loss(batch))
    assert not torch.equal(deep_kernel(dtype=torch.float32, **options).loss(batch), method.loss(batch))
    with pytest.raises(errors.CheckpointError):
        bm.load_method(tmp_path / "run", deep_kernel(dtype=torch.float32), batch)


def test_the_benchmark():
    """Its tasks are those that it says, and a short run gives all of its rows."""
    from benchmarks import deep_kernel_sines as benchmark

    batch, truth = benchmark.held_out(200, (5.0, 10.0), 0)
    assert batch.support.x.abs().max() <= 5
    assert (batch.query.x.min(), batch.query.x.max()) == (5.0, 10.0)
    noise = (batch.query.y - truth).double()
    assert abs(noise.square().mean() / 0.01 - 1) < 4 * (2 / noise.numel()) ** 0.5
    torch.testing.assert_close(truth[:, 0].abs() <= 5, torch.ones(200, dtype=torch.bool))
    args = argparse.Namespace(kernels=["rbf"], quick=True, steps=2, tasks=4, threads=1, seed=0)
    rows = {row.name for row in benchmark.run(args)}
    places, keys = ("in_range", "out_of_range"), ("mse", "coverage90", "nll")
    assert rows == {f"rbf_{place}_{key}" for place in places for key in keys} | {"rbf_seconds"}
    args.kernels = ["cubic"]
    with pytest.raises(SystemExit, match="unknown kernel"):
        benchmark.run(args)


# -- bad input ----------------------------------------------------------------------------------------------------


def test_what_it_refuses():
    model = bm.NeuralTaskModel(network(), bm.Gaussian(0.3), "point")
    with pytest.raises(errors.UnsupportedError, match="NeuralTaskModel"):
        bm.DeepKernel(TwoSites())
    with pytest.raises(errors.UnsupportedError, match="Gaussian likelihood"):
        bm.DeepKernel(bm.NeuralTaskModel(network(), bm.likelihoods.Poisson(), "point"))
    with pytest.raises(errors.UnsupportedError, match="one output"):
        bm.DeepKernel(bm.NeuralTaskModel(network(outputs=2), bm.Gaussian(0.3), "point"))
    with pytest.raises(errors.UnsupportedError, match="covariates"):
        bm.DeepKernel(bm.NeuralTaskModel(network(), bm.Gaussian(0.3), "normal", covariates=1))
    with pytest.raises(errors.ModelError, match="Sequential"):
        bm.DeepKernel(bm.NeuralTaskModel(torch.nn.Linear(1, 1), bm.Gaussian(0.3), "point"))
    for options in ({"kernel": "cubic"}, {"inputs": "y"}, {"objective": "elbo"}, {"num_mixtures": 0}):
        with pytest.raises(errors.OptionError):
            bm.DeepKernel(model, **options)
    batched = kernels.RBFKernel(batch_shape=torch.Size([3]))
    with pytest.raises(errors.OptionError, match="batch shape"):
        bm.DeepKernel(model, kernel=batched)
    with pytest.raises(errors.OptionError, match="leave out kernel"):
        bm.DeepKernel(bm.DeepKernelModel(network(), bm.Gaussian(0.3)), kernel="rbf")
    with pytest.raises(errors.UnsupportedError, match="φ of a Gaussian process is a function"):
        bm.MAML(bm.DeepKernelModel(network(), bm.Gaussian(0.3))).adapt(batch_of(2, 3))
    with pytest.raises(errors.UnsupportedError, match="no latent site"):
        deep_kernel().adapt(batch_of(2, 3, dtype=F64))()
    with pytest.raises(errors.ShapeError, match="features"):
        deep_kernel().adapt(batch_of(2, 3, features=2, dtype=F64))
    two = bm.Observations(torch.zeros(2, 3, 1, dtype=F64), torch.zeros(2, 3, 2, dtype=F64))
    with pytest.raises(errors.ShapeError, match="targets"):
        deep_kernel().adapt(two)


class NoKernel(kernels.Kernel):
    """Negative for tasks whose inputs are above 10."""

    def forward(self, x1, x2, diag=False, **params):
        if diag:
            return torch.where(x1[..., 0] > 10, -1.0, 1.0)
        k = torch.exp(-(x1 - x2.mT).square())
        return torch.where(x1[:, :1] > 10, -k, k)


def test_a_covariance_that_is_none_names_its_tasks():
    method, batch = deep_kernel(kernel=NoKernel(), inputs="raw"), gp_tasks("eq")
    x = batch.support.x.clone()
    x[2] += 20
    method.adapt(batch.support)
    with pytest.raises(errors.DataError, match=r"1 task\(s\), counted from 0: 2"):
        method.adapt(bm.Observations(x, batch.support.y))
