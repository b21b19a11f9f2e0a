"""PLATIPUS against MAML, closed forms of a linear model and finite differences."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.adapt.platipus import _kl
from tests.programs import TwoSites, batch_of
from tests.test_bmaml import network, slopes, task_batch

F64 = torch.float64


def without_noise(method):
    """σ and √v so small that adding them changes no number, and means that do not move."""
    with torch.no_grad():
        for parameter in (method.log_scale, method.log_scale_q):
            parameter.fill_(-60.0)
        for parameter in (method.gamma_p, method.gamma_q):
            parameter.zero_()
    return method


@pytest.mark.parametrize("inner_steps", [0, 1, 3])
@pytest.mark.parametrize("objective", ["likelihood", "joint"])
def test_without_noise_it_is_maml(inner_steps, objective):
    """The same loss, gradients and posterior, to the last digits."""
    batch, options = task_batch(), {"inner_steps": inner_steps, "inner_lr": 0.3, "objective": objective}
    maml, platipus = bm.MAML(network(), **options), bm.Platipus(network(), **options)
    platipus.prepare(batch)
    without_noise(platipus)
    maml.loss(batch).backward()
    platipus.loss(batch).backward()
    assert platipus.loss(batch).item() == pytest.approx(maml.loss(batch).item(), rel=1e-13)
    theirs = dict(maml.named_parameters())
    for name, parameter in platipus.named_parameters():
        if name in theirs and theirs[name].grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-11, atol=1e-13)
    u = platipus.adapt(batch.support).u
    torch.testing.assert_close(u, maml.adapt(batch.support).u.expand_as(u), rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        platipus.gamma_q.fill_(0.1)  # control: a mean that moves
    assert platipus.loss(batch).item() > 2 * maml.loss(batch).item()


def test_kl_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    loc, scale, other, wide = (torch.randn(3, 7, generator=generator, dtype=F64) for _ in range(4))
    q, p = dist.Normal(loc, scale.exp()), dist.Normal(other, wide.exp())
    expected = torch.distributions.kl_divergence(q, p).sum(-1)
    torch.testing.assert_close(_kl(loc - other, scale, wide), expected, rtol=1e-12, atol=1e-12)
    assert (_kl(loc - other, wide, scale) - expected).abs().min() > 1e-2  # the other way round


@pytest.mark.parametrize("options", [
    {}, {"bound": "prior"}, {"objective": "joint"},
    {"inference": "query", "learn": "parameter", "num_outer_samples": 3},
])  # fmt: skip
def test_gradients_by_finite_differences(options):
    """Under fixed noise; those of μ go through the gradients in the means of q and p."""
    batch = task_batch()
    method = bm.Platipus(network(), inner_steps=2, inner_lr=0.3, scale=0.2, gamma=0.1, **options)
    method.loss(batch, generator=5).backward()
    names = {"log_scale", "log_scale_q", "gamma_q", "program.prior.loc", "program.likelihood.log_scale"}
    names |= set() if options.get("bound") == "prior" else {"gamma_p"}
    parameters = {name: p for name, p in method.named_parameters() if p.grad is not None}
    assert names <= set(parameters)
    for name, parameter in parameters.items():
        indices = range(min(parameter.numel(), 4))
        expected = slopes(lambda: method.loss(batch, generator=5).detach(), parameter, indices)
        found = parameter.grad.view(-1)[: len(indices)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# -- a linear model, where everything has a closed form -------------------------------------------------------------

NOISE, RATE, MU, SCALE = 0.7, 0.2, 0.4, 0.5


def line(x, y=None, mask=None):
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(x.new_tensor(MU), 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(phi * x.squeeze(-1), NOISE), obs=y)


class Line:
    """One task: φ = A ϑ + c after two steps, p(ϑ | S) and the exact p(Q | S) under it."""

    def __init__(self, **options):
        self.batch = bm.TaskBatch(batch_of(1, 4, dtype=F64), batch_of(1, 5, seed=1, dtype=F64))
        self.method = bm.Platipus(line, inner_steps=2, inner_lr=RATE, scale=SCALE, gamma=0.3, **options).double()
        self.method.prepare(self.batch)
        slope, offset = self.fall(self.batch.support)
        self.A, self.c = 1.0, 0.0
        for _ in range(2):
            self.A, self.c = self.A - RATE * slope * self.A, self.c - RATE * (slope * self.c - offset)
        gamma = 0.3 if options.get("bound") != "prior" else 0.0
        self.prior_mean = MU - gamma * (slope * MU - offset)
        x, y = self.batch.query.x[0, :, 0], self.batch.query.y[0]
        covariance = NOISE**2 * torch.eye(5, dtype=F64) + (SCALE * self.A) ** 2 * torch.outer(x, x)
        predictive = dist.MultivariateNormal(x * (self.A * self.prior_mean + self.c), covariance)
        self.exact = -predictive.log_prob(y).item()
        precision = SCALE**-2 + (self.A**2 * (x @ x) / NOISE**2).item()
        shift = self.prior_mean / SCALE**2 + (self.A * (x @ (y - x * self.c)) / NOISE**2).item()
        self.posterior_mean, self.posterior_var = shift / precision, 1 / precision

    @staticmethod
    def fall(observations):
        """∇L(ϑ) = slope ϑ − offset."""
        x, y = observations.x[0, :, 0], observations.y[0]
        return (x @ x / len(x) / NOISE**2).item(), (x @ y / len(x) / NOISE**2).item()

    def set_q(self, mean, var, observations):
        slope, offset = self.fall(observations)
        with torch.no_grad():
            self.method.gamma_q.fill_((MU - mean) / (slope * MU - offset))
            self.method.log_scale_q.fill_(0.5 * math.log(var))

    def mean_loss(self):
        """Over many draws, with its standard error."""
        with torch.no_grad():
            losses = torch.stack([self.method.loss(self.batch, generator=seed) for seed in range(30)])
        return losses.mean().item(), losses.std().item() / 30**0.5


@pytest.mark.parametrize("bound", ["conditional", "prior"])
@pytest.mark.parametrize("inference", ["union", "query"])
def test_loss_is_a_bound_that_the_exact_posterior_of_the_start_attains(bound, inference):
    """E[loss] = −log p(Q | S) + KL(q ‖ p(ϑ | S, Q)) for any q, within 4 standard errors."""
    case = Line(bound=bound, inference=inference, num_outer_samples=500)
    seen = case.batch.union() if inference == "union" else case.batch.query
    case.set_q(case.posterior_mean, case.posterior_var, seen)
    mean, error = case.mean_loss()
    assert abs(mean - case.exact) < 4 * error
    case.set_q(case.posterior_mean + 0.3, 2 * case.posterior_var, seen)
    gap = 0.5 * (0.3**2 / case.posterior_var + 2 - 1 - math.log(2))
    mean, error = case.mean_loss()
    assert abs(mean - case.exact - gap) < 4 * error
    assert gap > 20 * error  # control: what an error in the KL or in the likelihood would have to be


@pytest.mark.parametrize("bound", ["conditional", "prior"])
def test_draws_have_the_moments_of_adapted_starts(bound):
    """φ ~ N(A m + c, A² σ²) with m the mean of p(ϑ | S): within 4 standard errors."""
    n = 4000
    case = Line(bound=bound, num_samples=n)
    posterior = case.method.adapt(case.batch.support, generator=1)
    u = posterior.u.flatten()
    assert len(u) == n
    spread = abs(case.A) * SCALE
    assert abs(u.mean().item() - case.A * case.prior_mean - case.c) < 4 * spread / n**0.5
    assert abs(u.std().item() / spread - 1) < 4 / (2 * n) ** 0.5
    other = Line(bound="prior" if bound == "conditional" else "conditional")
    assert abs(other.A * (other.prior_mean - case.prior_mean)) > 10 * spread / n**0.5  # control: the other bound
    again = case.method.adapt(case.batch.support, generator=2).u.flatten()
    assert not torch.equal(u, again)


@pytest.mark.parametrize("bound", ["conditional", "prior"])
def test_draws_are_those_of_p_and_not_of_q(bound):
    """At test time no query is there, and no q: with rates and scales of p and q all different, those of p count."""
    n, scale, scale_q = 4000, 0.35, 1.1
    gamma = 0.3 if bound == "conditional" else 0.0
    case = Line(bound=bound, num_samples=n)
    with torch.no_grad():
        case.method.gamma_q.fill_(-0.6)
        case.method.log_scale.fill_(math.log(scale))
        case.method.log_scale_q.fill_(math.log(scale_q))
    slope, offset = case.fall(case.batch.support)
    mean, mean_q = (case.A * (MU - rate * (slope * MU - offset)) + case.c for rate in (gamma, -0.6))
    u = case.method.adapt(case.batch.support, generator=1).u.flatten()
    spread, spread_q = abs(case.A) * scale, abs(case.A) * scale_q
    error, error_std = spread / n**0.5, spread / (2 * n) ** 0.5
    assert abs(u.mean().item() - mean) < 4 * error
    assert abs(u.std().item() - spread) < 4 * error_std
    assert abs(mean_q - mean) > 20 * spread_q / n**0.5  # control: q's moments are far outside
    assert spread_q - spread > 20 * error_std


def test_tasks_have_draws_of_their_own_and_global_sites_stay_paired():
    batch = task_batch()
    method = bm.Platipus(TwoSites(), global_guide="normal", num_samples=10).double()
    posterior = method.adapt(batch.support, num_theta=4)
    assert posterior.u.shape == (12, 3, 2)  # three of each of four, to reach ten
    assert posterior.theta.shape == (12, 1)
    assert len(posterior.theta.unique()) == 4
    assert torch.equal(posterior.theta[:4], posterior.theta[4:8])
    method = bm.Platipus(network(), scale=0.5, inner_steps=0)
    u = method.adapt(batch.support).u
    start = method._shifted(method._start_for(batch.support, None, False), batch.support, None, method.gamma_p, False)
    noise = (u - start).detach()
    flat = noise.movedim(1, 0).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(3, dtype=F64)
    assert correlation.abs().max() < 4 / flat.shape[1] ** 0.5
    with pytest.raises(errors.UnsupportedError, match="no density"):
        method.guide(batch)


# -- warm start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, lambda: TwoSites().double()])
def test_warm_start_from_maml(make):
    """The trained start and everything else learned, and the MAML is left alone."""
    batch = task_batch()
    maml = bm.MAML(make(), inner_steps=2, inner_lr=0.1).double()
    maml.prepare(batch)
    with torch.no_grad():
        for parameter in maml.parameters():
            parameter.add_(0.3)
    platipus = bm.Platipus.from_maml(maml, scale=0.2)
    assert platipus.inner_steps == 2
    assert platipus.inner_lr == 0.1
    platipus.prepare(batch)
    without_noise(platipus)
    assert platipus.loss(batch).item() == pytest.approx(maml.loss(batch).item(), rel=1e-12)
    before = maml.loss(batch).item()
    with torch.no_grad():
        for parameter in platipus.parameters():
            parameter.add_(0.1)
    assert maml.loss(batch).item() == before
    cold = bm.Platipus(make(), inner_steps=2, inner_lr=0.1).double()
    cold.prepare(batch)
    assert without_noise(cold).loss(batch).item() != pytest.approx(before, rel=1e-3)  # control


def test_warm_start_from_a_maml_that_has_seen_nothing():
    platipus = bm.Platipus.from_maml(bm.MAML(TwoSites().double(), inner_steps=3), inner_steps=4)
    assert platipus.inner_steps == 4
    assert platipus.double().loss(task_batch()).isfinite()


def test_warm_start_refuses_other_methods():
    for other, found in (
        (bm.ANIL(network(), inner_lr=0.1), "ANIL"),
        (bm.ABML(TwoSites()), "ABML"),
        (bm.MAML(TwoSites(), first_order=True), "first_order=True"),
    ):
        with pytest.raises(errors.OptionError, match=found):
            bm.Platipus.from_maml(other)


def test_options_out_of_range():
    for options, message in (
        ({"bound": "upper"}, "'conditional' or 'prior'"),
        ({"inference": "support"}, "'union' or 'query'"),
        ({"learn": "layer"}, "'one' or 'parameter'"),
        ({"scale": 0.0}, "scale must be > 0"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_outer_samples": 0}, "num_outer_samples"),
        ({"inner_lr": -1.0}, "inner_lr > 0"),
    ):
        with pytest.raises(errors.OptionError, match=message):
            bm.Platipus(TwoSites(), **options)
