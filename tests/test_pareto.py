"""Pareto k of a guide as a whole, against tails that are known."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from forecast_cases import Linear, Phi, linear_tasks
from programs import TwoSites, batch_of
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy.stats import chi2, norm

import bayesmeta as bm
from bayesmeta.diagnostics.importance import LogRatios, log_ratios
from bayesmeta.diagnostics.pareto import _smooth
from bayesmeta.errors import DataError, EmptyTaskError, NonFiniteDataError, OptionError, ShapeError, UnsupportedError

F64 = torch.float64


class Stretched(Linear):
    """q: the exact posterior with its spread multiplied by ``factor`` and its mean moved by ``shift`` of its sds."""

    def __init__(self, tasks, support, factor=1.0, shift=0.0):
        super().__init__(tasks, support, factor)
        self.noise = float(tasks.noise)
        self.exact = self.mean, self.covariance / factor**2
        self.mean = self.mean + shift * self.exact[1].diagonal(dim1=-2, dim2=-1).sqrt()

    def log_prob(self, u):
        return dist.MultivariateNormal(self.mean, self.covariance).log_prob(u)

    def log_prior(self, draws):
        return dist.MultivariateNormal(self.tasks.mean, self.tasks.covariance).log_prob(draws.u)


def family(size, tasks=60, shots=4):
    """Linear-Gaussian tasks of so many dimensions."""
    linear = bm.tasks.LinearGaussian(torch.zeros(size, dtype=F64), torch.eye(size, dtype=F64), 0.4)
    return linear, linear.sample(tasks, support=shots, query=1, generator=0)


def supports(size, tasks):
    linear, batch = family(size, tasks)
    return linear, batch.support


# -- truth --------------------------------------------------------------------------------------------------------


def test_an_exact_guide_has_no_tail():
    tasks, batch = linear_tasks(6)
    found = bm.psis(Stretched(tasks, batch.support))
    assert (found.pareto_k == -math.inf).all()
    torch.testing.assert_close(found.effective_draws, torch.full((6,), 4000.0, dtype=F64))
    assert (found.finding, set(found.findings), found.share_bad) == ("good", {"good"}, 0.0)
    assert "above 0.70 in 0% of 6 tasks" in found.verdict
    assert "can be used as they are" in found.verdict
    for name in found.means:
        torch.testing.assert_close(found.means[name], found.weighted_means[name])
    narrow = bm.psis(Stretched(tasks, batch.support, 0.5))
    assert (narrow.pareto_k > 0.2).all(), "control"
    assert narrow.pareto_k.isfinite().all()
    assert narrow.finding == "bad"


def test_a_tail_is_not_taken_for_rounding_of_single_precision():
    """The log of a Pareto variable with k = 0.8 is exponential with that mean."""
    draws = torch.empty(4000, 1, dtype=F64).exponential_(1 / 0.8, generator=torch.Generator().manual_seed(0))

    def k(size):
        log_p = (draws - size).float().double()
        return float(_smooth(LogRatios(log_p, torch.zeros_like(log_p)), torch.float32)[1])

    exact = k(0.0)
    assert abs(exact - 0.8) < 4 * 1.8 / math.sqrt(3 * math.sqrt(4000)), "the error is (1 + k) / √tail"
    assert abs(k(5e3) - exact) < 0.02
    with pytest.warns(UserWarning, match="rounded to"):
        k(5e5)
    constant = LogRatios(torch.full((4000, 1), -5e3, dtype=F64), torch.zeros(4000, 1, dtype=F64))
    assert _smooth(constant, torch.float32)[1] == -math.inf


def test_weights_are_those_of_arviz():
    tasks, support = supports(2, 3)
    posterior = Stretched(tasks, support, 0.6)
    found = bm.psis(posterior, num_samples=1000)
    ratios = log_ratios(posterior, support, posterior.draws(1000, None)).values
    for task in range(3):
        smoothed, _ = array_stats.psislw(-ratios[:, task].numpy(), axis=0)
        torch.testing.assert_close(found.log_weights[:, task], torch.from_numpy(smoothed).log_softmax(0))
        raw = ratios[:, task].log_softmax(0)
        assert (found.log_weights[:, task] - raw).abs().max() > 1e-3, "control: the tail is smoothed"


@pytest.mark.parametrize("factor", [0.9, 0.7, 0.5, 0.3])
def test_in_two_dimensions_the_tail_is_exactly_pareto(factor):
    """x = s e with e ~ N(0, I₂): log r = ½ (1 − s²) |e|² + c is exponential of scale 1 − s², so that k = 1 − s²."""
    tasks, batch = linear_tasks(200)
    k = bm.psis(Stretched(tasks, batch.support, factor), num_samples=2000).pareto_k
    tail = int(3 * math.sqrt(2000))
    truth = (tail * (1 - factor**2) + 5) / (tail + 10)  # the fit's own prior: 10 observations of k = 0.5
    assert 0.6 < k.std().item() / ((1 + truth) / math.sqrt(tail)) < 1.4  # the error of the maximum of the likelihood
    assert abs(k.mean().item() - truth) < 5 * k.std().item() / math.sqrt(200) + 0.02  # its bias is O(1 / tail)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("factor", [0.8, 0.6])
def test_in_any_dimension_the_tail_is_that_of_chi_squared(size, factor):
    """k tends to 1 − s², slowly but for two dimensions: so the truth is the fit to the quantiles of the known law."""
    tasks, batch = family(size, 100)
    k = bm.psis(Stretched(tasks, batch.support, factor), num_samples=2000).pareto_k
    place = (np.arange(2000) + 0.5) / 2000
    _, truth = array_stats.psislw(-0.5 * (1 - factor**2) * chi2(size).ppf(place))
    assert (
        abs(k.mean().item() - float(truth)) < 5 * k.std().item() / 10 + 0.05
    )  # quantiles lack the largest of a sample
    limit = (134 * (1 - factor**2) + 5) / 144  # as above
    assert (size - 2) * (float(truth) - limit) > 0, "below the limit in one dimension, above it in three"


@pytest.mark.parametrize("size", [1, 2, 6])
def test_too_wide_a_guide_has_bounded_weights(size):
    tasks, batch = family(size, 50)
    found = bm.psis(Stretched(tasks, batch.support, 2.0))
    assert found.pareto_k.mean() < (0.1 if size < 3 else 0.3)  # the limit is −∞, and far
    assert found.share_bad == 0
    # of two normals E[r²] = s² / √(2 s² − 1) where E[r] = 1
    share = (math.sqrt(2 * 4 - 1) / 4) ** size
    torch.testing.assert_close(found.effective_draws.mean() / 4000, torch.tensor(share, dtype=F64), rtol=0.1, atol=0)
    assert found.finding == "usable", "a small k alone is not enough"


class StudentTarget(Linear):
    """A Student target of 3 degrees of freedom for each φ, and a standard normal q."""

    def log_prob(self, u):
        return dist.Normal(0.0, 1.0).log_prob(u).sum(-1)

    def draws(self, num_samples, generator=None):
        generator = torch.Generator().manual_seed(0)
        return Phi(torch.randn(num_samples, *self.mean.shape, generator=generator, dtype=F64))

    def log_prior(self, draws):
        return dist.StudentT(3.0).log_prob(draws.u).sum(-1)

    def log_likelihood(self, observations, *, draws):
        return torch.zeros(len(draws.u), *observations.y.shape, dtype=F64)


def test_a_heavy_tail_that_q_lacks():
    """In one dimension log r = ½ z² − 2 log(1 + z² / 3) + c, which grows with |z| where z² > 1."""
    one = bm.psis(StudentTarget(*supports(1, 100)), num_samples=2000)
    z = norm.ppf((np.arange(2000) + 0.5) / 2000)
    _, truth = array_stats.psislw(-(0.5 * z**2 - 2 * np.log1p(z**2 / 3)))
    assert abs(one.pareto_k.mean().item() - float(truth)) < 5 * one.pareto_k.std().item() / 10 + 0.05
    many = bm.psis(StudentTarget(*supports(6, 30)))
    assert many.pareto_k.median() > 0.6
    assert many.finding == "bad"
    assert "NUTS" in many.verdict


def test_weighted_moments_are_those_of_the_exact_posterior():
    tasks, batch = linear_tasks(100)
    q = Stretched(tasks, batch.support, 1.3, shift=0.5)
    found = bm.psis(q, num_samples=4000)
    mean, sd = q.exact[0], q.exact[1].diagonal(dim1=-2, dim2=-1).sqrt()
    error = sd / found.effective_draws.sqrt().unsqueeze(-1)
    z = (found.weighted_means["phi"] - mean) / error
    assert abs(z.mean().item()) < 0.3
    assert z.abs().max() < 6
    assert ((found.weighted_sds["phi"] / sd - 1).abs() < 6 / found.effective_draws.sqrt().unsqueeze(-1)).all()
    assert ((found.means["phi"] - mean) / sd).mean() == pytest.approx(0.5, abs=0.02), "control: the draws as they are"
    assert (found.sds["phi"] / sd).mean() == pytest.approx(1.3, abs=0.02)
    torch.testing.assert_close(found.log_weights.exp().sum(0), torch.ones(100, dtype=F64))


def test_each_task_has_its_own_finding():
    tasks, batch = linear_tasks(4)
    exact, narrow = Stretched(tasks, batch.support), Stretched(tasks, batch.support, 0.3)
    for value, other in ((exact.mean, narrow.mean), (exact.covariance, narrow.covariance)):
        value[2] = other[2]
    named = replace(batch, names=("a", "b", "c", "d"))
    found = bm.psis(exact, named)
    assert found.findings == ("good", "good", "bad", "good")
    assert found.share_bad == 0.25
    assert found.finding == "bad"
    assert str(found).splitlines()[2].startswith("c ")
    without = bm.psis(exact, replace(named, task_id=torch.tensor([0, 1, -1, 3])))
    assert without.names == ("a", "b", "d")
    assert without.finding == "good"
    assert without.means["phi"].shape == (3, 2)


def test_few_draws_have_a_lower_threshold():
    tasks, batch = linear_tasks(3)
    assert bm.psis(Stretched(tasks, batch.support), num_samples=100).threshold == pytest.approx(0.5)
    assert bm.psis(Stretched(tasks, batch.support), num_samples=4000).threshold == pytest.approx(0.7)


def test_draws_without_weight():
    """A prior that ends where q does not: few draws count, or none."""
    tasks, batch = linear_tasks(3)

    class Cut(Stretched):
        limit = 0.0

        def log_prior(self, draws):
            inside = draws.u[..., 0] > self.limit
            return torch.where(inside, super().log_prior(draws), -math.inf)

    q = Cut(tasks, batch.support)
    q.mean[:, 0] = q.exact[0][:, 0] = 0.0
    found = bm.psis(q)
    assert (found.effective_draws < 2100).all()
    assert found.pareto_k.isfinite().any()
    far = Stretched(tasks, batch.support, 0.01, shift=500.0)
    assert (bm.psis(far).pareto_k > 0.7).all(), "weights that underflow"
    assert (bm.psis(far).effective_draws < 10).all()
    q.limit = 1e6
    none = bm.psis(q)
    assert (none.pareto_k == math.inf).all()
    assert none.finding == "bad"


# -- methods ------------------------------------------------------------------------------------------------------


def of_method(method, **options):
    batch = bm.tasks.Sinusoid(noise=0.1).sample(8, support=5, query=3, generator=0)
    method.prepare(batch)
    return method.adapt(batch.support, **options)


def network(**options):
    torch.manual_seed(0)
    return bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1, activation="tanh"), bm.Gaussian(0.3), **options)


def head():
    return network(prior=bm.priors.Normal(1.0), task_modules="head")


def test_exact_and_approximate_methods():
    exact = bm.psis(of_method(bm.BayesianLastLayer(head())))
    assert (exact.pareto_k == -math.inf).all(), "float32: differences of rounding are no tail"
    laplace = bm.psis(of_method(bm.Laplace(head(), solver="newton", inner_lr=1.0, inner_steps=2)))
    assert laplace.finding == "good"
    torch.testing.assert_close(laplace.weighted_means["2.bias"], exact.means["2.bias"], atol=0.1, rtol=0)
    untrained = bm.psis(of_method(bm.ABML(network(prior=bm.priors.Normal(1.0)), inner_steps=1)))
    assert untrained.finding == "bad", "control"


def test_methods_that_have_no_density_are_refused():
    with pytest.raises(UnsupportedError, match=r"bm\.calibration"):
        bm.psis(of_method(bm.MAML(network(prior="point"))))
    particles = of_method(bm.BMAML(network(prior=bm.priors.Normal(1.0)), num_particles=100))
    with pytest.raises(UnsupportedError, match=r"bm\.sbc_method"):
        bm.psis(particles)
    u = torch.randn(200, 8, particles.u.shape[-1])
    with pytest.raises(UnsupportedError, match="density is not known"):
        bm.psis(bm.SamplesPosterior(particles.program, particles.support, u))
    observations = batch_of(5, 4)
    method = bm.Laplace(TwoSites(), global_guide="normal", num_particles=4)
    method.prepare(bm.TaskBatch(observations, observations))
    with pytest.raises(UnsupportedError, match="global_guide='point'"):
        bm.psis(method.adapt(observations))


def test_weights_that_underflow_beside_each_other():
    """All of a tail but its largest is then 0, of which the fit makes NaN."""
    tasks, batch = linear_tasks(3)
    q = Stretched(tasks, batch.support)
    q.log_prior = lambda draws: 1e5 * draws.u[..., 0]
    found = bm.psis(q)
    assert found.findings == ("bad",) * 3
    assert (found.effective_draws < 2).all()
    assert found.weighted_means["phi"].isfinite().all()


def poisson(x, y=None, mask=None):
    with bm.task_plate(x):
        log_rate = pyro.sample("log_rate", dist.Normal(x.new_tensor(0.0), 2.0))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def test_the_weights_mend_a_laplace_approximation():
    y = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 2.0], [20.0, 25.0]])
    seen = bm.Observations(torch.zeros(4, 2, 1), y)
    method = bm.Laplace(poisson, solver="newton", inner_lr=1.0, inner_steps=30, curvature="full")
    method.prepare(bm.TaskBatch(seen, seen))
    found = bm.psis(method.adapt(seen))
    grid = torch.linspace(-15, 8, 20_001, dtype=F64).unsqueeze(-1)
    log_p = -grid.square() / 8 + y.double().sum(-1) * grid - 2 * grid.exp()
    weight = (log_p - log_p.logsumexp(0)).exp()
    mean = (weight * grid).sum(0)
    sd = (weight * (grid - mean).square()).sum(0).sqrt()
    error = 5 * sd / found.effective_draws.sqrt()
    assert ((found.weighted_means["log_rate"] - mean).abs() < error).all()
    assert ((found.weighted_sds["log_rate"] - sd).abs() < error).all()
    off = (found.means["log_rate"] - mean).abs() / sd
    assert off[0] > 0.25, "control: the draws as they are"
    # the bound that the share of effective draws gives
    assert (off * sd / found.sds["log_rate"] < 1.1 * (4000 / found.effective_draws - 1).sqrt() + 0.05).all()
    assert found.findings == ("usable", "usable", "usable", "good")


def test_an_adaptation_that_has_diverged():
    posterior = of_method(bm.ABML(head(), inner_steps=1))
    posterior.loc = posterior.loc * math.nan
    with pytest.raises(NonFiniteDataError, match=r"'2\.weight' are not finite for task 0 \(8 task"):
        bm.psis(posterior)
    with pytest.raises(NonFiniteDataError, match="smaller inner learning rate"):
        bm.sensitivity(posterior)


def test_bad_input():
    tasks, batch = linear_tasks(3)
    q = Stretched(tasks, batch.support)
    with pytest.raises(OptionError, match="at least 100"):
        bm.psis(q, num_samples=99)
    with pytest.raises(ShapeError, match="adapted to 3"):
        bm.psis(q, linear_tasks(4)[1])
    with pytest.raises(OptionError, match="TaskBatch"):
        bm.psis(q, batch.support)
    with pytest.raises(EmptyTaskError, match="padding"):
        bm.psis(q, replace(batch, task_id=torch.tensor([-1, -1, -1])))
    q.support = q.support.with_y(None)
    with pytest.raises(DataError, match="y=None"):
        bm.psis(q)
    broken = Stretched(tasks, batch.support)
    broken.log_prob = lambda u: torch.full(u.shape[:-1], math.nan, dtype=F64)
    with pytest.raises(DataError, match="NaN"):
        bm.psis(broken)


# -- whole runs ---------------------------------------------------------------------------------------------------

TOP, BETWEEN, NOISE = 2.0, 0.4, 0.5


def hierarchy(x, y=None, mask=None):
    mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), TOP))
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(mu, BETWEEN))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Normal(phi, NOISE), obs=y)


def exact_hierarchy(y):
    """Precision and mean of θ and the φ of all tasks, in this order."""
    tasks, shots = y.shape
    precision = torch.zeros(tasks + 1, tasks + 1, dtype=F64)
    precision[0, 0] = 1 / TOP**2 + tasks / BETWEEN**2
    precision[0, 1:] = precision[1:, 0] = -1 / BETWEEN**2
    precision.diagonal()[1:] = 1 / BETWEEN**2 + shots / NOISE**2
    target = torch.cat([torch.zeros(1, dtype=F64), y.sum(-1) / NOISE**2])
    return precision, torch.linalg.solve(precision, target)


def run_of(y, factor=1.0):
    """A MetaSVI run whose guide is the best Gaussian without correlations, its spread multiplied by a factor."""
    observations = bm.Observations(torch.zeros(*y.shape, 1, dtype=F64), y)
    precision, mean = exact_hierarchy(y)
    sd = factor * precision.diagonal() ** -0.5
    program = bm.TaskProgram(hierarchy)
    run = bm.MetaSVI(program, AutoNormal(program), lambda p: torch.optim.SGD(p, 0.0), Trace_ELBO())
    run.step(observations)
    state = run.state_dict()
    for name, value in state["params"].items():
        moment = mean if ".locs." in name else sd.expm1().log()  # AutoNormal's scales are softplus of theirs
        value.copy_((moment[0] if name.endswith("mu") else moment[1:]).reshape(value.shape))
    run.load_state_dict(state)
    return run, observations


def levels(tasks, shots):
    generator = torch.Generator().manual_seed(0)
    phi = 1.0 + BETWEEN * torch.randn(tasks, 1, generator=generator, dtype=F64)
    return phi + NOISE * torch.randn(tasks, shots, generator=generator, dtype=F64)


def test_a_whole_run_is_judged_as_one():
    y = levels(6, 3)
    precision, mean = exact_hierarchy(y)
    run, observations = run_of(y)
    found = bm.psis(run.posterior(observations, 300))
    assert found.joint
    assert found.names == ("all tasks",)
    assert found.pareto_k.shape == (1,)
    assert found.means["mu"].shape == ()
    assert found.means["phi"].shape == (6,)
    # the law of the ratios: x ~ N(0, D⁻¹), log r = ½ xᵀ (D − Λ) x
    generator = np.random.default_rng(0)
    diagonal = precision.diagonal().numpy()
    x = generator.normal(size=(100, 300, 7)) / np.sqrt(diagonal)
    log_r = 0.5 * np.einsum("rni,ij,rnj->rn", x, np.diag(diagonal) - precision.numpy(), x)
    _, k = array_stats.psislw(-log_r, axis=-1)
    assert abs(float(found.pareto_k[0]) - k.mean()) < 4 * k.std()
    sd = precision.inverse().diagonal().sqrt()
    error = 5 * sd[0] / found.effective_draws[0].sqrt()
    assert abs(found.weighted_means["mu"] - mean[0]) < error
    assert abs(found.weighted_sds["mu"] - sd[0]) < error
    assert found.sds["mu"] < 0.9 * sd[0], "control: without correlations the guide is too narrow"
    assert "θ and φ together" in found.verdict
    narrow = bm.psis(run_of(y, 0.4)[0].posterior(observations, 120))
    assert narrow.pareto_k[0] > narrow.threshold
    assert narrow.effective_draws[0] / 120 < 0.5 * found.effective_draws[0] / 300
    assert narrow.finding == "bad"
