"""Likelihoods: against scipy, moments of draws and finite differences; options."""

import math
import re
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models.likelihoods import (
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from tests.likelihood_cases import CASES, COUNTS, F64, WIDTHS, data, noise


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


# -- options and documentation ------------------------------------------------------------------------------------


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


def test_every_likelihood_is_documented():
    docs = Path(__file__).parents[1] / "docs"
    methods, api = ((docs / name).read_text() for name in ("methods.md", "api.md"))
    for name in bm.likelihoods.__all__:
        assert f"::: bayesmeta.models.likelihoods.{name}\n" in api
        assert re.search(rf"`(bm\.likelihoods\.)?{name}\b", methods), name
        assert "__doc__" in vars(getattr(bm.likelihoods, name))
