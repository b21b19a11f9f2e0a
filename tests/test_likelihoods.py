"""Likelihoods: against scipy, moments of draws, finite differences, the Pyro trace and estimates in closed form."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from bayesmeta.ops.mlp_gradient import GaussianMLPGradient

F64 = torch.float64

#: Likelihoods for so many targets.
CASES = {
    "gaussian": lambda targets=1, **o: Gaussian(0.7, learn_scale=True),
    "gaussian_each": lambda targets=1, **o: Gaussian([0.3 + 0.4 * i for i in range(targets)], learn_scale=True),
    "heteroscedastic": lambda targets=1, **o: HeteroscedasticGaussian(0.01),
    "student": lambda targets=1, **o: StudentT(3.5, 0.7, learn_df=True, learn_scale=True),
    "bernoulli": lambda targets=1, **o: Bernoulli(),
    "categorical": lambda targets=1, **o: Categorical(4),
    "poisson": lambda targets=1, **o: Poisson(**o),
    "negative_binomial": lambda targets=1, **o: NegativeBinomial(1.7, learn_concentration=True, **o),
}
COUNTS = ("poisson", "negative_binomial")
#: Every likelihood with one target and, but for the class, with two.
WIDTHS = [(name, targets) for name in CASES for targets in (1, 2) if (name, targets) != ("categorical", 2)]


def kind_of(name):
    return "count" if name in COUNTS else "class" if name in ("bernoulli", "categorical") else "real"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def data(name, targets=1, exposure=None, shape=(3, 5), seed=0):
    """Outputs ``[2, *shape, width]``, targets of the likelihood there, and the likelihood, float64."""
    likelihood = CASES[name](targets, exposure=exposure).double() if name in COUNTS else CASES[name](targets).double()
    output = noise(2, *shape, likelihood.num_outputs(targets), seed=seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        y = likelihood.distribution(output[0]).sample().to(F64)
    return likelihood, output, y


def reference(name, likelihood, output, y, exposure=None):
    """log-density by scipy, in the shape of ``output[..., 0]``."""
    o, y = output.numpy(), y.numpy()
    offset = 1.0 if exposure is None else exposure.numpy()
    if name == "categorical":
        p = scipy.special.softmax(o, -1)
        return np.log(np.take_along_axis(p, np.broadcast_to(y, o.shape[:-1])[..., None].astype(int), -1)[..., 0])
    several = y.ndim == 3
    if not several:
        y, offset = y[..., None], offset
    offset = np.asarray(offset)[..., None]
    if name.startswith("gaussian"):
        each = scipy.stats.norm.logpdf(y, o, likelihood.scale.detach().numpy())
    elif name == "heteroscedastic":
        loc, raw = np.split(o, 2, -1)
        each = scipy.stats.norm.logpdf(y, loc, 0.01 + np.log1p(np.exp(raw)))
    elif name == "student":
        each = scipy.stats.t.logpdf(y, likelihood.df.item(), o, likelihood.scale.item())
    elif name == "bernoulli":
        each = scipy.stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-o)))
    elif name == "poisson":
        each = scipy.stats.poisson.logpmf(y, offset * np.exp(o))
    else:
        c = likelihood.concentration.item()
        each = scipy.stats.nbinom.logpmf(y, c, c / (c + offset * np.exp(o)))
    return each.sum(-1)


# -- densities and draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "targets"), WIDTHS)
def test_log_prob_is_that_of_scipy(name, targets):
    likelihood, output, y = data(name, targets)
    expected = torch.as_tensor(reference(name, likelihood, output, y))
    fast, slow = likelihood.log_prob(output, y), likelihood.distribution(output).log_prob(y)
    assert fast.shape == (2, 3, 5)
    torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slow, expected, rtol=1e-10, atol=1e-10)
    other = reference(name, likelihood, 1.1 * output, y)  # the check can fail
    assert np.abs(other - expected.numpy()).max() > 1e-3


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("targets", [1, 2])
def test_exposure_multiplies_the_mean(name, targets):
    likelihood, output, y = data(name, targets, exposure=0)
    exposure = noise(3, 5, seed=1).exp()
    expected = torch.as_tensor(reference(name, likelihood, output, y, exposure))
    torch.testing.assert_close(likelihood.log_prob(output, y, exposure), expected, rtol=1e-10, atol=1e-10)
    fn = likelihood.distribution(output, exposure)
    torch.testing.assert_close(fn.log_prob(y), expected, rtol=1e-10, atol=1e-10)
    mean = output.exp() * exposure.unsqueeze(-1)
    torch.testing.assert_close(fn.mean, mean if targets > 1 else mean.squeeze(-1))
    assert (likelihood.log_prob(output, y) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_moments(name):
    """Mean and variance of the draws, from formulas of our own; five standard errors."""
    likelihood, output, _ = data(name, 1, shape=(1, 4), seed=4)
    output, n = output[:1] * 0.5, 40_000
    fn = likelihood.distribution(output)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = fn.sample((n,)).to(F64)
    o = output.squeeze(-1) if output.shape[-1] == 1 else output[..., 0]
    if name == "categorical":
        values, p = torch.arange(4, dtype=F64), output.softmax(-1)
        mean = (p * values).sum(-1)
        variance = (p * values.square()).sum(-1) - mean.square()
    else:
        p = o.sigmoid()
        mean = {"bernoulli": p, "poisson": o.exp(), "negative_binomial": o.exp()}.get(name, o)
        variance = {
            "bernoulli": p * (1 - p),
            "poisson": mean,
            "negative_binomial": mean + mean.square() / 1.7,
            "heteroscedastic": (0.01 + (1 + output[..., -1].exp()).log()).square(),
            "student": torch.full_like(mean, 0.49 * 3.5 / 1.5),
            "gaussian_each": torch.full_like(mean, 0.09),
        }.get(name, torch.full_like(mean, 0.49))
    assert ((draws.mean(0) - mean).abs() < 5 * draws.std(0) / math.sqrt(n)).all()
    square = (draws - mean).square()
    if name != "student":  # its fourth moment is infinite: no standard error
        assert ((square.mean(0) - variance).abs() < 5 * square.std(0) / math.sqrt(n)).all()
    assert ((draws.mean(0) - mean - 0.1).abs() > 5 * draws.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize(("name", "targets"), WIDTHS)
def test_gradients_are_finite_differences(name, targets):
    """Of outputs and learned parameters, first and second: MAML differentiates twice."""
    likelihood, output, y = data(name, targets, shape=(1, 3))
    names, values = zip(*likelihood.named_parameters(), strict=True) if list(likelihood.parameters()) else ((), ())

    def density(o, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(likelihood, given, (o, y)) if given else likelihood.log_prob(o, y)

    likelihood.forward = likelihood.log_prob
    inputs = (output.clone().requires_grad_(), *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(density, inputs)
    assert torch.autograd.gradgradcheck(density, inputs)


def extremes(name):
    likelihood = CASES[name]()
    width = likelihood.num_outputs(1)
    grid = torch.tensor([-50.0, -10.0, 0.0, 10.0, 50.0])
    output = torch.cartesian_prod(*[grid] * width).reshape(1, -1, width)
    ys = {"categorical": (0.0, 3.0), "bernoulli": (0.0, 1.0), "poisson": (0.0, 1.0, 1e6)}
    ys["negative_binomial"] = ys["poisson"]
    return likelihood, output, ys.get(name, (-50.0, 0.0, 50.0))


@pytest.mark.parametrize("name", CASES)
def test_extreme_outputs_in_float32(name):
    likelihood, output, ys = extremes(name)
    for value in ys:
        o = output.clone().requires_grad_()
        y = torch.full(output.shape[:-1], value)
        density = likelihood.log_prob(o, y)
        gradient = torch.autograd.grad(density.sum(), [o, *likelihood.parameters()])
        assert density.isfinite().all()
        assert all(g.isfinite().all() for g in gradient)
        exact = likelihood.double().log_prob(output.double(), y.double())
        torch.testing.assert_close(density.double(), exact, rtol=1e-4, atol=1e-4)
        likelihood.float()


def test_counts_keep_their_digits_in_float32():
    """Terms of size 10⁷, of 10⁹ with a concentration of 10⁸, cancel; in float32 alone whole nats would be lost."""
    count, log_rate = torch.tensor([1e6]), torch.tensor([[1e6 + 500.0]]).log()
    rate = log_rate.double().exp().item()

    def exact(likelihood):
        if isinstance(likelihood, Poisson):
            return scipy.stats.poisson.logpmf(1e6, rate)
        c = likelihood.log_concentration.double().exp().item()  # of the float32 parameter
        return scipy.stats.nbinom.logpmf(1e6, c, c / (c + rate))

    for likelihood in (Poisson(), NegativeBinomial(1e8), NegativeBinomial(0.01)):
        assert likelihood.log_prob(log_rate, count).item() == pytest.approx(exact(likelihood), rel=1e-6)
        # the distribution holds rate or logits in float32: rounded by 5e-7, times a slope of 500
        slow = likelihood.distribution(log_rate).log_prob(count)
        assert slow.item() == pytest.approx(exact(likelihood), abs=1e-3)
    plain = dist.NegativeBinomial(torch.tensor(1e8), logits=log_rate.squeeze(-1) - math.log(1e8)).log_prob(count)
    assert abs(plain.item() - exact(NegativeBinomial(1e8))) > 1


def test_draws_of_enormous_rates_are_counts():
    output = torch.tensor([[50.0]])
    for likelihood in (Poisson(), NegativeBinomial(1e6)):
        draw = likelihood.distribution(output).sample((3,))
        torch.testing.assert_close(draw, output.exp().squeeze(-1).expand(3, 1), rtol=0.01, atol=0)
    assert (dist.Poisson(output.exp()).sample() < 0).all()  # torch's own overflow


# -- in a model ---------------------------------------------------------------------------------------------------


def model_of(name, dtype=F64, exposure=None, targets=1, prior="normal", features=2, likelihood=None):
    options = {"exposure": exposure} if name in COUNTS else {}
    likelihood = CASES[name](targets, **options) if likelihood is None else likelihood
    fed = features - (exposure is not None)
    generator = torch.Generator().manual_seed(3)
    network = bm.nets.mlp(fed, [4], likelihood.num_outputs(targets), activation="tanh")
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.0, 0.4, generator=generator)
    return bm.NeuralTaskModel(network, likelihood, prior).to(dtype)


def observations_of(name, dtype=F64, exposure=None, targets=1, ragged=True, seed=0):
    """Three tasks of 5 points, with garbage that is no exposure in the padding."""
    model = CASES[name](targets).double()
    x = noise(3, 5, 2, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        y = model.distribution(noise(3, 5, model.num_outputs(targets), seed=seed + 1)).sample()
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]]) if ragged else None
    if exposure is not None:
        x[..., exposure] = x[..., exposure].exp()
        if ragged:
            x[..., exposure] = torch.where(mask, x[..., exposure], 0.0)
    return bm.Observations(x.to(dtype), y.to(dtype), mask)


VARIANTS = [(name, None, targets) for name, targets in WIDTHS]
VARIANTS += [(name, column, 1) for name in COUNTS for column in (0, 1, -1)]


@pytest.mark.parametrize(("name", "exposure", "targets"), VARIANTS)
def test_trace_equals_fast_path(name, exposure, targets):
    model = model_of(name, exposure=exposure, targets=targets)
    observations = observations_of(name, exposure=exposure, targets=targets)
    model.prepare(observations)
    u = noise(2, 3, model.layout.dim, seed=2) * 0.5
    u.requires_grad_()
    trace, fast = model.trace_joint(u, observations), model.log_likelihood(u, observations)
    torch.testing.assert_close(trace.log_likelihood, fast, rtol=1e-12, atol=1e-12)
    assert fast[:, 1, 2:].eq(0).all()
    for value in (trace.log_likelihood, fast):
        (gradient,) = torch.autograd.grad(value.sum(), u, retain_graph=True)
        assert gradient.isfinite().all()
    direct = model.log_likelihood_gradient(u, observations)
    torch.testing.assert_close(direct, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", [bm.MAML, bm.ABML])
@pytest.mark.parametrize(("name", "exposure", "targets"), VARIANTS)
def test_methods_adapt_predict_and_train(name, exposure, targets, method, dtype):
    model = model_of(name, dtype, exposure, targets, prior="point" if method is bm.MAML else "normal")
    method = method(model, inner_steps=3, inner_lr=0.05)
    support = observations_of(name, dtype, exposure, targets)
    posterior = method.adapt(support)
    draws = posterior.predict(support, 7)
    assert draws.shape == (7, *support.y.shape)
    assert model.likelihood.distribution(model.output(posterior.draws(1).u[0], support.x)).support.check(draws).all()
    assert posterior.log_likelihood(support, 4).dtype == dtype
    loss = method.loss(bm.TaskBatch(support, observations_of(name, dtype, exposure, targets, seed=5)))
    gradient = torch.autograd.grad(loss, list(method.parameters()), allow_unused=True)
    assert loss.dtype == dtype
    assert all(g is None or g.isfinite().all() for g in gradient)
    assert any(g is not None and g.abs().max() > 0 for g in gradient)
    start = posterior.program.log_likelihood(model.learned_start(support), support).sum(-1)
    if isinstance(posterior, bm.DeltaPosterior):
        assert (posterior.log_likelihood(support, 1)[0].sum(-1) > start).all()  # inner steps climb
        assert posterior.predictive(support.x if exposure is None else support).batch_shape == support.x.shape[:2]


@pytest.mark.parametrize("name", CASES)
def test_no_support_at_all(name):
    exposure = 1 if name in COUNTS else None
    model, support = model_of(name, exposure=exposure), observations_of(name, exposure=exposure)
    empty = bm.Observations(support.x[:, :0], support.y[:, :0])
    posterior = bm.ABML(model).adapt(empty)
    torch.testing.assert_close(posterior.loc[0], model.learned_start(empty))
    assert posterior.predict(empty, 3).shape == (3, 3, 0)
    assert posterior.predict(support, 3).shape == (3, 3, 5)
    assert posterior.target_kind == kind_of(name)


def bias_only(likelihood, features):
    """A model whose outputs are biases: the maximum of its likelihood is known."""
    network = nn.Linear(features, likelihood.num_outputs(1)).double()
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    return bm.NeuralTaskModel(nn.Sequential(network), likelihood.double(), "point")


@pytest.mark.parametrize("name", ["bernoulli", "categorical", "poisson", "negative_binomial", "heteroscedastic"])
def test_maml_finds_the_maximum_of_the_likelihood(name):
    """With inputs 0 the estimate is a bias, known in closed form; exposures 1, 2 and 4 weigh in for Poisson."""
    exposure = torch.tensor([1.0, 2.0, 4.0, 1.0], dtype=F64)
    y = {
        "bernoulli": [1.0, 0.0, 1.0, 1.0],
        "categorical": [0.0, 3.0, 3.0, 1.0],
        "heteroscedastic": [0.5, 2.0, -1.0, 0.7],
    }.get(name, [2.0, 5.0, 6.0, 1.0])
    y = torch.tensor(y, dtype=F64)
    counts = name in COUNTS
    likelihood = CASES[name](exposure=-1) if counts else CASES[name]()
    exposure = torch.ones_like(exposure) if name == "negative_binomial" else exposure  # else no closed form
    x = torch.stack([torch.zeros_like(y), exposure], -1)[None] if counts else torch.zeros(1, 4, 1, dtype=F64)
    method = bm.MAML(bias_only(likelihood, 1), inner_steps=1500, inner_lr=0.3)
    posterior = method.adapt(bm.Observations(x, y[None]))
    output = method.program.output(posterior.u[0], x)[0, 0]
    expected = {
        "bernoulli": [math.log(3.0)],
        "poisson": [math.log(14 / 8)],
        "negative_binomial": [math.log(14 / 4)],
        "heteroscedastic": [y.mean().item(), math.log(math.expm1(y.std(correction=0).item() - 0.01))],
    }
    if name == "categorical":  # a class that never occurs has probability → 0
        torch.testing.assert_close(output.softmax(-1), torch.tensor([0.25, 0.25, 0, 0.5], dtype=F64), atol=3e-3, rtol=0)
    else:
        torch.testing.assert_close(output, torch.tensor(expected[name], dtype=F64), rtol=1e-6, atol=1e-6)


def test_abml_finds_the_best_gaussian_for_poisson_counts():
    """E_q[log p] of a Poisson intercept is known: Σy μ − Σe exp(μ + s²/2); so is the best q, by Newton's method."""
    counts, exposure = torch.tensor([3.0, 9.0, 5.0], dtype=F64), torch.tensor([1.0, 4.0, 2.0], dtype=F64)
    likelihood = Poisson(exposure=0)

    class Intercept(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, dtype=F64))

        def forward(self, x):
            return self.bias.expand(*x.shape[:-1], 1)

    model = bm.NeuralTaskModel(Intercept(), likelihood, bm.priors.Normal(1.0)).double()
    method = bm.ABML(model, inner_steps=400, inner_lr=0.05, num_particles=400)
    q = method.adapt(bm.Observations(torch.stack([exposure, torch.zeros(3)], -1)[None], counts[None]))
    mean, scale = torch.tensor(0.5, dtype=F64), torch.tensor(0.3, dtype=F64)
    for _ in range(50):
        rate = exposure.sum() * (mean + scale**2 / 2).exp()
        mean = mean + (counts.sum() - rate - mean) / (rate + 1)
        scale = (1 / (rate + 1)).sqrt()
    # noise of the last few steps' gradients: rate 0.05 / 3 shots, 400 particles
    assert q.loc.item() == pytest.approx(mean.item(), abs=0.02)
    assert q.scale.item() == pytest.approx(scale.item(), abs=0.02)
    map_estimate = math.log(counts.sum() / exposure.sum())  # what ignores the spread is elsewhere
    assert abs(map_estimate - mean.item()) > 0.03


# -- exposure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_the_network_does_not_see_the_exposure(name):
    model, support = model_of(name, exposure=0), observations_of(name, exposure=0, ragged=False)
    model.prepare(support)
    u = noise(3, model.layout.dim, seed=2)
    doubled = support.x.clone()
    doubled[..., 0] *= 2.0
    torch.testing.assert_close(model.output(u, doubled), model.output(u, support.x))
    one, two = (model.predictive(u, bm.Observations(x)).mean for x in (support.x, doubled))
    torch.testing.assert_close(two, 2 * one)
    last = model_of(name, exposure=-1)
    last.prior.load_state_dict(model.prior.state_dict())
    swapped = bm.Observations(support.x.flip(-1), support.y)
    last.prepare(swapped)
    torch.testing.assert_close(last.log_likelihood(u, swapped), model.log_likelihood(u, support))
    assert not torch.allclose(last.log_likelihood(u, support), model.log_likelihood(u, support))


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf])
def test_an_exposure_must_be_positive(value):
    support = observations_of("poisson", exposure=1)
    method = bm.MAML(model_of("poisson", exposure=1, prior="point"))
    posterior = method.adapt(support)
    x = support.x.clone()
    x[2, 1, 1] = value
    bad = bm.Observations(x, support.y, support.mask)
    for call in (
        lambda: posterior.predict(bad),
        lambda: posterior.log_likelihood(bad),
        lambda: posterior.predictive(bad),
        lambda: method.program.check(bad),
    ):
        with pytest.raises(errors.DataError, match=r"exposure .*task 2, shot 1"):
            call()
    fresh = bm.MAML(model_of("poisson", exposure=1, prior="point"))
    with pytest.raises(errors.DataError, match="task 2, shot 1"):
        fresh.adapt(bad)
    x[1, 3, 1] = value if math.isfinite(value) else 0.0  # padding may be anything finite
    x[2, 1, 1] = 1.0
    assert posterior.predict(bm.Observations(x, None, support.mask), 2).shape == (2, 3, 5)


def test_wrong_columns():
    with pytest.raises(errors.ShapeError, match=r"column 2 of x, which has 2 feature\(s\); expected -2 to 1"):
        bm.MAML(model_of("poisson", likelihood=Poisson(exposure=2), prior="point")).adapt(observations_of("poisson"))
    for bad in (1.5, "weeks", True):
        for kind in (Poisson, NegativeBinomial):
            with pytest.raises(errors.OptionError, match="index of a column"):
                kind(exposure=bad)
    model = model_of("poisson", likelihood=Poisson(exposure=0), prior="point")  # the network takes both columns
    with pytest.raises(errors.ShapeError, match="1 features beside the exposure"):
        bm.MAML(model).adapt(observations_of("poisson", exposure=0))


class Binomial(Likelihood):
    """A likelihood of a user's own, with trials as its exposure."""

    def __init__(self, exposure):
        super().__init__()
        self.exposure = exposure

    def distribution(self, output, exposure):
        return dist.Binomial(exposure, logits=output.squeeze(-1))


class Laplace(Likelihood):
    """One that knows no exposure."""

    def distribution(self, output):
        return dist.Laplace(output.squeeze(-1), 1.0)


def test_likelihoods_of_ones_own():
    x = torch.stack([torch.full((3, 4), 6.0), noise(3, 4).float()], -1)
    y = torch.tensor([[0.0, 1.0, 6.0, 3.0]]).expand(3, 4)
    network = bm.nets.mlp(1, [4], 1)
    posterior = bm.ABML(bm.NeuralTaskModel(network, Binomial(0))).adapt(bm.Observations(x, y))
    assert posterior.target_kind == "count"
    assert posterior.predict(x, 50).max() <= 6
    network = bm.nets.mlp(2, [4], 1)
    posterior = bm.ABML(bm.NeuralTaskModel(network, Laplace())).adapt(bm.Observations(x, y))
    assert posterior.target_kind == "real"
    assert Laplace().num_outputs(1) is None


# -- several outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_fused_gradient_with_a_scale_for_each_output(ragged):
    model = model_of("gaussian", targets=2, likelihood=Gaussian([0.3, 2.0]))
    observations = observations_of("gaussian_each", targets=2, ragged=ragged)
    model.prepare(observations)
    assert isinstance(model._fused, GaussianMLPGradient)
    u = noise(2, 3, model.layout.dim, seed=2).requires_grad_()
    (expected,) = torch.autograd.grad(model.log_likelihood(u, observations).sum(), u)
    torch.testing.assert_close(model.log_likelihood_gradient(u, observations), expected)
    shared = model_of("gaussian", targets=2, likelihood=Gaussian(0.3))
    assert not torch.allclose(shared.log_likelihood_gradient(u, observations), expected)


def test_each_output_learns_its_scale():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(40, 10, 2, generator=generator, dtype=F64) * torch.tensor([0.2, 3.0], dtype=F64)
    likelihood = Gaussian([1.0, 1.0], learn_scale=True).double()
    optimizer = torch.optim.Adam(likelihood.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (-likelihood.log_prob(torch.zeros_like(y), y).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(likelihood.scale.detach(), y.square().mean((0, 1)).sqrt(), rtol=1e-3, atol=0)


def test_closed_forms_want_one_scale():
    network = bm.nets.mlp(2, [4], 2)
    model = bm.NeuralTaskModel(network, Gaussian([1.0, 2.0]), "normal", task_modules="head")
    with pytest.raises(errors.UnsupportedError, match="one scale for all outputs"):
        bm.BayesianLastLayer(model)
    with pytest.raises(errors.UnsupportedError, match="StudentT"):
        bm.BayesianLastLayer(bm.NeuralTaskModel(network, StudentT(), "normal", task_modules="head"))


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("poisson", -1.0),
        ("poisson", 1.5),
        ("negative_binomial", -1.0),
        ("negative_binomial", 0.5),
        ("categorical", 4.0),
        ("categorical", -1.0),
        ("categorical", 0.5),
        ("bernoulli", 2.0),
        ("bernoulli", 0.5),
        ("bernoulli", -1.0),
    ],
)
def test_targets_outside_the_support(name, value):
    support = observations_of(name)
    y = support.y.clone()
    y[2, 1] = value
    bad = bm.Observations(support.x, y, support.mask)
    with pytest.raises(errors.DataError, match=r"task 2, shot 1 .*outside the support"):
        bm.MAML(model_of(name, prior="point")).adapt(bad)
    posterior = bm.MAML(model_of(name, prior="point")).adapt(support)
    with pytest.raises(errors.DataError, match=r"task 2, shot 1 .*outside the support"):
        posterior.log_likelihood(bad)
    good = torch.where(support.mask, support.y, 0.0)  # in the padding nothing is refused that is finite
    posterior.log_likelihood(bm.Observations(support.x, good, support.mask))


@pytest.mark.parametrize("method", [bm.MAML, bm.ABML])
def test_padding_need_not_be_a_class(method):
    support = observations_of("categorical")
    method = method(model_of("categorical", prior="point" if method is bm.MAML else "normal"), inner_steps=2)
    marked = bm.Observations(support.x, torch.where(support.mask, support.y, -1.0), support.mask)
    torch.testing.assert_close(method.adapt(marked).draws(1).u, method.adapt(support).draws(1).u)
    outside = Categorical(3).log_prob(torch.zeros(1, 4, 3), torch.tensor([[0.0, -1.0, 3.0, 0.5]]))
    assert outside.isinf().tolist() == [[False, True, True, True]]


def test_classes_may_be_integers():
    support = observations_of("categorical")
    method = bm.MAML(model_of("categorical", prior="point"), inner_steps=2)
    whole = method.adapt(bm.Observations(support.x, support.y.long(), support.mask))
    torch.testing.assert_close(whole.u, method.adapt(support).u)
    counts = observations_of("poisson")
    method = bm.ABML(model_of("poisson"), inner_steps=2)
    whole = method.adapt(bm.Observations(counts.x, counts.y.long(), counts.mask))
    torch.testing.assert_close(whole.loc, method.adapt(counts).loc)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y_name", "targets", "message"),
    [
        (HeteroscedasticGaussian(), 1, "gaussian", 1, r"has 1 output\(s\); a HeteroscedasticGaussian .*takes 2"),
        (HeteroscedasticGaussian(), 2, "gaussian", 2, "takes 4"),
        (Categorical(3), 4, "bernoulli", 1, "takes 3"),
        (Categorical(4), 4, "bernoulli", 2, "argmax"),
        (Gaussian([1.0, 2.0]), 1, "gaussian", 1, "2 values of scale, but y has 1"),
        (StudentT([1.0, 2.0, 3.0]), 2, "gaussian", 2, "3 values of df"),
        (Poisson(), 2, "poisson", 1, "takes 1"),
    ],
)
def test_widths_are_explained(likelihood, outputs, y_name, targets, message):
    model = bm.NeuralTaskModel(bm.nets.mlp(2, [3], outputs).double(), likelihood.double(), "point")
    with pytest.raises(errors.ShapeError, match=message):
        bm.MAML(model).adapt(observations_of(y_name, targets=targets))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0), "scale of a Gaussian"),
        (lambda: Gaussian([1.0, -1.0]), "scale of a Gaussian"),
        (lambda: Gaussian([]), "one for each output"),
        (lambda: HeteroscedasticGaussian(0.0), "floor"),
        (lambda: StudentT(df=-1.0), "df of a StudentT"),
        (lambda: StudentT(scale=math.nan), "scale of a StudentT"),
        (lambda: Categorical(1), "at least 2"),
        (lambda: Categorical(2.5), "at least 2"),
        (lambda: NegativeBinomial(0.0), "concentration of a NegativeBinomial"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(errors.OptionError, match=message):
        make()


def test_printing_shows_the_options():
    assert "scale=0.5, learn_scale=True" in repr(Gaussian(0.5, learn_scale=True))
    assert "scale=[1, 2]" in repr(Gaussian([1.0, 2.0]))
    assert "df=4" in repr(StudentT())
    assert "num_classes=3" in repr(Categorical(3))
    assert "exposure=-1" in repr(NegativeBinomial(exposure=-1))
    assert "floor=0.001" in repr(HeteroscedasticGaussian())


# -- kinds of targets and probabilities of classes ----------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_target_kind(name):
    kind = kind_of(name)
    posterior = bm.ABML(model_of(name)).adapt(observations_of(name))
    assert posterior.target_kind == kind
    if kind != "class":
        with pytest.raises(errors.UnsupportedError, match="Categorical or Bernoulli"):
            posterior.class_probabilities(observations_of(name).x)


@pytest.mark.parametrize(("name", "targets"), [("bernoulli", 1), ("bernoulli", 2), ("categorical", 1)])
def test_class_probabilities(name, targets):
    """They are the mean likelihood of each class, and the frequencies of predictions."""
    support = observations_of(name, targets=targets)
    posterior = bm.ABML(model_of(name, targets=targets), inner_steps=3, inner_lr=0.05).adapt(support)
    draws = posterior.draws(4000, 1)
    p = posterior.class_probabilities(support, draws=draws)
    classes = 2 if name == "bernoulli" else 4
    assert p.shape == (*support.y.shape, classes)
    torch.testing.assert_close(p.sum(-1), torch.ones_like(support.y))
    y = posterior.predict(support, draws=draws)
    for k in range(classes):
        share = (y == k).double().mean(0)
        assert ((share - p[..., k]).abs() < 5 * (p[..., k] * (1 - p[..., k]) / 4000).sqrt()).all()
        if targets == 1:
            every = bm.Observations(support.x, torch.full_like(support.y, float(k)))
            torch.testing.assert_close(posterior.log_likelihood(every, draws=draws).exp().mean(0), p[..., k])


def test_class_probabilities_of_a_point_are_exact():
    support = observations_of("categorical")
    posterior = bm.MAML(model_of("categorical", prior="point"), inner_steps=3, inner_lr=0.05).adapt(support)
    p = posterior.class_probabilities(support.x)
    torch.testing.assert_close(p, posterior.predictive(support.x).probs)


def test_rare_classes_keep_their_probability():
    from bayesmeta.models.targets import class_probabilities

    p = class_probabilities(Bernoulli().distribution(torch.tensor([[40.0], [-40.0]])))
    torch.testing.assert_close(p[:, 0] / math.exp(-40), torch.tensor([1.0, math.exp(40)]))


def test_kinds_of_other_distributions():
    from bayesmeta.models.targets import target_kind

    probs = torch.tensor([0.2, 0.8])
    mask = torch.tensor([True, False])
    assert target_kind(dist.Bernoulli(probs).mask(mask)) == "class"
    assert target_kind(dist.Categorical(probs).expand_by([3]).to_event(1)) == "class"
    assert target_kind(dist.ZeroInflatedPoisson(rate=probs, gate=probs)) == "count"
    assert target_kind(dist.Binomial(3, probs)) == "count"
    assert target_kind(dist.LogNormal(probs, 1.0)) == "real"
    with pytest.raises(errors.UnsupportedError, match="one-hot"):
        target_kind(dist.OneHotCategorical(probs))
