"""Likelihoods in a model: the Pyro trace, methods, estimates in closed form, exposure, targets that do not fit."""

import math

import pyro.distributions as dist
import pytest
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
from tests.likelihood_cases import CASES, COUNTS, F64, VARIANTS, kind_of, model_of, noise, observations_of

# -- in a model ---------------------------------------------------------------------------------------------------


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


def test_closed_forms_want_a_gaussian():
    network = bm.nets.mlp(2, [4], 2)
    bm.BayesianLastLayer(bm.NeuralTaskModel(network, Gaussian([1.0, 2.0]), "normal", task_modules="head"))
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
