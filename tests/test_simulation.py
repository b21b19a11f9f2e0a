"""SBC, TARP and contraction where the posterior is known: it passes, and wrong ones fail in the named direction."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from forecast_cases import FACTORS, Linear, linear_tasks

import bayesmeta as bm
from bayesmeta.diagnostics.simulation import finding_of
from bayesmeta.diagnostics.uniformity import EcdfBand, chi_squared, legendre, shape_of
from bayesmeta.errors import DataError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.ops.random import as_generator

F64 = torch.float64
NAMES = ("calibrated", "too narrow", "too wide")


def log_likelihood(values, data):
    """Of the support of :func:`linear_tasks`, by hand; also of draws."""
    f = (values["phi"].unsqueeze(-2) * data.x).sum(-1)
    return torch.distributions.Normal(f, 0.4).log_prob(data.y).sum(-1)


def linear_sbc(posterior_of, tasks=600, seed=0, **options):
    family, _ = linear_tasks(1)

    def simulate(generator):
        root = torch.linalg.cholesky(family.covariance)
        phi = family.mean + torch.randn(tasks, 2, generator=generator, dtype=F64) @ root.mT
        x = torch.randn(tasks, 4, 2, generator=generator, dtype=F64)
        y = (x @ phi.unsqueeze(-1)).squeeze(-1) + 0.4 * torch.randn(tasks, 4, generator=generator, dtype=F64)
        return {"phi": phi}, bm.Observations(x, y)

    def infer(data):
        return posterior_of(family, data)

    quantities = {"log_likelihood": log_likelihood}
    return bm.sbc(simulate, infer, num_simulations=1, quantities=quantities, generator=seed, **options)


# -- SBC ----------------------------------------------------------------------------------------------------------


def test_exact_passes_and_scaled_ones_fail_in_their_direction():
    for factor, name in zip(FACTORS, NAMES, strict=True):
        result = linear_sbc(lambda family, data, f=factor: Linear(family, data, f))
        assert list(result) == ["phi[0]", "phi[1]", "log_likelihood"]
        assert result.findings["phi[0]"] == result.findings["phi[1]"] == name
        assert result.passes == (factor == 1)
        if factor != 1:
            assert max(result["phi[0]"], result["phi[1]"]) < 1e-3
        assert len(result.ranks["phi[0]"]) == 600
        assert name in str(result)


def test_shifted_posteriors_are_too_low_or_too_high():
    for sign, name in ((-1, "too low"), (1, "too high")):

        def posterior(family, data, sign=sign):
            exact = Linear(family, data)
            exact.mean = exact.mean + sign * 0.5 * exact.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
            return exact

        assert linear_sbc(posterior).findings["phi[0]"] == name


def test_the_prior_is_told_from_the_posterior_by_the_likelihood_alone():
    def prior(family, data):
        return {"phi": Linear(family, data).prior_draws(63, 5).u}

    result = linear_sbc(prior)
    assert result.findings["phi[0]"] == result.findings["phi[1]"] == "calibrated"
    assert result.findings["log_likelihood"] == "too low"
    assert result["log_likelihood"] < 1e-3


def test_calibrated_is_said_at_its_rate():
    """Of 60 exact posteriors about alpha = 10% fail, at most; the tests are discrete and share by Bonferroni."""
    failed = sum(not linear_sbc(lambda f, d: Linear(f, d), tasks=100, seed=s, alpha=0.1).passes for s in range(60))
    assert failed <= 6 + 4 * math.sqrt(60 * 0.1 * 0.9)


class Hierarchy:
    """θ ~ N(0, 1), φ_t ~ N(θ, 1), y_t ~ N(φ_t, 1): the exact joint posterior of (θ, φ), θ's spread times a factor."""

    num_draws = None

    def __init__(self, data, factor=1.0, tasks=4):
        prior = torch.ones(tasks + 1, tasks + 1, dtype=F64) + torch.diag(torch.tensor([0.0] + [1.0] * tasks, dtype=F64))
        y_cov = prior[1:, 1:] + torch.eye(tasks, dtype=F64)
        gain = prior[:, 1:] @ torch.linalg.inv(y_cov)
        self.mean, covariance = gain @ data, prior - gain @ prior[1:]
        self.root, self.factor = torch.linalg.cholesky(covariance), factor

    def draws(self, n, generator=None):
        generator = as_generator(generator)
        z = torch.randn(n, len(self.mean), generator=generator, dtype=F64) @ self.root.mT
        z[:, 0] *= self.factor
        return self.mean + z

    def named(self, draws):
        return {"phi": draws[:, 1:]}

    def named_theta(self, draws):
        return {"theta": draws[:, 0]}


def hierarchy(generator):
    theta = torch.randn((), generator=generator, dtype=F64)
    phi = theta + torch.randn(4, generator=generator, dtype=F64)
    return {"theta": theta, "phi": phi}, phi + torch.randn(4, generator=generator, dtype=F64)


def test_global_parameters_and_one_task_of_each_simulation():
    for factor, name in zip(FACTORS, NAMES, strict=True):
        result = bm.sbc(hierarchy, lambda y, f=factor: Hierarchy(y, f), num_simulations=400, num_draws=31)
        assert result.findings == {"theta": name, "phi": "calibrated"}
        assert len(result.ranks["phi"]) == 400
    first = bm.sbc(hierarchy, lambda y: Hierarchy(y), num_simulations=5, num_draws=31)

    def as_mapping(y):
        posterior = Hierarchy(y)
        draws = posterior.draws(31, generator)
        return posterior.named(draws) | posterior.named_theta(draws)

    generator = as_generator(1)
    again = bm.sbc(hierarchy, as_mapping, num_simulations=5, num_draws=31, shared=["theta"])
    assert {k: len(v) for k, v in first.ranks.items()} == {k: len(v) for k, v in again.ranks.items()}
    with pytest.raises(ShapeError, match="shared"):
        bm.sbc(hierarchy, as_mapping, num_simulations=5, num_draws=31)


class Wrong:
    """A method whose posterior is that of the linear family with its spread times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def adapt(self, support, *, generator=None):
        family, _ = linear_tasks(1)
        posterior = Linear(family, support, self.factor)
        posterior.noise = 0.4  # the model is right
        return posterior


# -- bands and tests of ranks -------------------------------------------------------------------------------------


def test_bands_hold_simultaneously():
    generator = torch.Generator().manual_seed(1)
    for n, draws in ((50, 31), (400, 99)):
        band = EcdfBand(n, draws, generator=2)
        low, high = band.limits(0.9)
        samples = torch.randint(draws + 1, (800, n), generator=generator)
        curves = np.stack([band.curve(s) for s in samples])
        inside = ((curves >= low) & (curves <= high)).all(1).mean()
        assert 0.86 < inside < 0.96  # 0.9, four standard errors, and a step of the discrete counts more
        pointwise = scipy.stats.binom.ppf([[0.05], [0.95]], n, band.points) / n
        assert ((curves >= pointwise[0]) & (curves <= pointwise[1])).all(1).mean() < 0.75, "control"
        p = np.array([band.p_value(s) for s in samples[:400]])
        assert abs((p < 0.1).mean() - 0.1) < 4 * math.sqrt(0.09 / 400) + 0.01


def test_far_tails_have_no_floor():
    """Beyond what simulated samples count, the bound over the points: small, and no smaller than each point's own."""
    n, draws = 200, 31
    band = EcdfBand(n, draws)
    ranks = torch.randint(10, (n,), generator=torch.Generator().manual_seed(0))  # all in the lower third
    p = band.p_value(ranks)
    counts = np.array([(ranks < k).sum() for k in np.rint(band.points * (draws + 1)).astype(int)])
    tails = 2 * scipy.stats.binom.sf(counts - 1, n, band.points).min()
    assert tails > 0
    assert p == pytest.approx(len(band.points) * tails, rel=1e-6)
    assert p < 1e-20
    middle = band.p_value(torch.arange(n) % (draws + 1))
    assert middle > 0.5


def test_moments_of_independent_values_have_known_variance():
    """Against the normal law of means of variance 1; p-values of few values are then right far out."""
    u = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=F64)
    z = legendre(u).mean(0) * math.sqrt(30)
    expected = min(1.0, 4 * float(2 * scipy.stats.norm.sf(z.abs().numpy()).min()))
    assert shape_of(legendre(u), independent=True).p_value == pytest.approx(expected)
    assert shape_of(legendre(u)).p_value != pytest.approx(expected)
    generator = torch.Generator().manual_seed(1)
    samples = legendre(torch.rand(4000, 30, generator=generator, dtype=F64))
    p = {flag: [shape_of(s, independent=flag).p_value for s in samples] for flag in (True, False)}
    rate = {flag: np.mean(np.array(each) < 0.002) for flag, each in p.items()}
    assert rate[True] < 0.002 + 3 * math.sqrt(0.002 / 4000)
    assert rate[False] > rate[True], "control: an estimated variance of 30 skewed numbers"


def test_the_larger_miss_names_it_where_p_values_vanish():
    assert finding_of(0.0, 0.1, 1.3, 0.0, 0.0, 0.01) == "too low"
    assert finding_of(0.0, 0.1, -1.3, 0.0, 0.0, 0.01) == "too high"
    assert finding_of(0.0, 1.3, 0.1, 0.0, 0.0, 0.01) == "too narrow"
    assert finding_of(0.0, -0.8, 0.9, 1e-9, 1e-7, 0.01) == "too wide"


def test_chi_squared_against_scipy():
    ranks = torch.randint(64, (300,), generator=torch.Generator().manual_seed(0))
    expected = scipy.stats.chisquare(np.bincount(ranks.numpy() // 8, minlength=8)).pvalue
    assert chi_squared(ranks, 63, 8) == pytest.approx(expected)
    for bins in (1, 7):
        with pytest.raises(OptionError, match=f"num_bins={bins}"):
            chi_squared(ranks, 63, bins)


def test_ties_are_broken_at_random():
    def simulate(generator):
        return {"k": torch.randint(2, (500,), generator=generator)}, None

    def infer(data):
        return {"k": torch.randint(2, (63, 500), generator=source)}

    source = torch.Generator().manual_seed(3)
    assert bm.sbc(simulate, infer, num_simulations=1).passes

    def constant(generator):
        return {"k": torch.zeros(2000)}, None

    result = bm.sbc(constant, lambda data: {"k": torch.zeros(3, 2000)}, num_simulations=1, num_draws=3, num_bins=4)
    assert result.passes
    assert result.ranks["k"].unique().tolist() == [0, 1, 2, 3]


# -- TARP ---------------------------------------------------------------------------------------------------------


def gaussians(factor=1.0, shift=0.0, dims=3, n=600, draws=99, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def z(*shape):
        return torch.randn(*shape, dims, generator=generator, dtype=F64)

    mean, root = z(n), torch.tril(torch.ones(dims, dims, dtype=F64))
    truth = mean + z(n) @ root.mT
    return mean + shift + factor * (z(draws, n) @ root.mT), truth, mean


def test_tarp_names_the_three():
    for factor, name in zip(FACTORS, NAMES, strict=True):
        draws, truth, _ = gaussians(factor)
        result = bm.tarp(draws, truth)
        assert result.finding == name, result
        assert name in str(result)
        gap = (result.coverage - result.levels).abs().max()
        assert (gap < 0.06) == (factor == 1)  # 1.5 / √600
        assert result.coverage[0] == 0
        assert result.coverage[-1] == 1
    draws, truth, _ = gaussians(shift=0.7)
    corner = torch.full_like(truth, -8.0)
    assert bm.tarp(draws, truth, references=corner).finding != "calibrated"
    assert bm.tarp(draws, truth).finding == "calibrated", "references all around cannot see a shift, as documented"
    draws, truth, _ = gaussians()
    assert bm.tarp(draws, truth, references=corner).finding == "calibrated"


def test_tarp_tells_the_prior_only_by_references_that_see_the_data():
    generator = torch.Generator().manual_seed(2)
    _, truth, mean = gaussians(dims=1)
    prior = math.sqrt(2) * torch.randn(99, 600, 1, generator=generator, dtype=F64)
    assert bm.tarp(prior, truth).finding == "calibrated"
    assert bm.tarp(prior, truth, references=mean).finding != "calibrated"
    draws, truth, mean = gaussians(dims=1)
    assert bm.tarp(draws, truth, references=mean).finding == "calibrated"


# -- contraction --------------------------------------------------------------------------------------------------


def test_contraction_against_the_closed_form():
    family, batch = linear_tasks(200, seed=3, shots=5)
    found = bm.contraction(lambda s: Linear(family, s), batch.support, (1, 3, 5), num_samples=2000)
    for shots, values in found.items():
        first = bm.Observations(batch.support.x[:, :shots], batch.support.y[:, :shots])
        exact = family.posterior(first).covariance_matrix.diagonal(dim1=-2, dim2=-1)
        each = (1 - exact / family.covariance.diagonal()).mean(-1)
        mean, error = values["phi"]
        assert mean == pytest.approx(each.mean().item(), abs=0.01)
        assert error == pytest.approx(each.std().item() / math.sqrt(200), rel=0.2)
    assert found[1]["phi"][0] < found[3]["phi"][0] < found[5]["phi"][0]


def test_contraction_takes_real_observations_alone():
    family, batch = linear_tasks(3, seed=3, shots=4)
    mask = torch.tensor([[True] * 4, [False, True, False, True], [True, True, False, False]])
    seen = []
    bm.contraction(
        lambda s: seen.append(s) or Linear(family, s), bm.Observations(batch.support.x, batch.support.y, mask), (2,)
    )
    assert seen[0].y[1].tolist() == batch.support.y[1, [1, 3]].tolist()
    with pytest.raises(OptionError, match="from 1 to 2"):
        bm.contraction(lambda s: Linear(family, s), bm.Observations(batch.support.x, batch.support.y, mask), (3,))


# -- bad input, pictures ------------------------------------------------------------------------------------------


def test_errors_are_typed():
    def simulate(generator):
        return {"phi": torch.zeros(5)}, None

    def draws(value):
        return lambda data: {"phi": value}

    for options in ({"num_simulations": 0}, {"num_draws": 2}, {"alpha": 1.0}):
        with pytest.raises(OptionError, match="num_simulations="):
            bm.sbc(simulate, draws(torch.zeros(63, 5)), **{"num_simulations": 2, **options})
    with pytest.raises(ShapeError, match=r"expected \[63, 5\]"):
        bm.sbc(simulate, draws(torch.zeros(63, 4)), num_simulations=2)
    with pytest.raises(DataError, match="'phi', of which there are no draws"):
        bm.sbc(simulate, lambda data: {"psi": torch.zeros(63, 5)}, num_simulations=2)
    with pytest.raises(NonFiniteDataError, match="'phi'"):
        bm.sbc(simulate, draws(torch.full((63, 5), math.nan)), num_simulations=2)
    with pytest.raises(ShapeError, match="'f'"):
        bm.sbc(simulate, draws(torch.zeros(63, 5)), num_simulations=2, quantities={"f": lambda v, d: torch.zeros(1)})
    with pytest.raises(ShapeError, match="one number for each task"):
        bm.sbc(simulate, draws(torch.zeros(63, 5)), num_simulations=2, quantities={"f": lambda v, d: torch.zeros(5, 5)})
    with pytest.raises(DataError, match="nothing to rank"):
        bm.sbc(lambda g: ({}, None), lambda d: {}, num_simulations=1)
    with pytest.raises(DataError, match="one rank"):
        bm.sbc(lambda g: ({"a": torch.zeros(1)}, None), lambda d: {"a": torch.zeros(63, 1)}, num_simulations=1)
    _, batch = linear_tasks(3)
    with pytest.raises(DataError, match="y=None"):
        bm.sbc_method(Wrong(1.0), batch.support.with_y(None))
    posterior, truth, _ = gaussians(n=5)
    with pytest.raises(ShapeError, match="expected"):
        bm.tarp(posterior, truth[:4])
    with pytest.raises(ShapeError, match="references"):
        bm.tarp(posterior, truth, references=truth[:4])
    with pytest.raises(NonFiniteDataError):
        bm.tarp(posterior, truth * math.nan)
    band = EcdfBand(10, 31)
    with pytest.raises(OptionError, match="level=0"):
        band.limits(0)
    with pytest.raises(ShapeError, match="ranks has shape"):
        band.p_value(torch.zeros(3, dtype=torch.long))


def test_picture(tmp_path):
    result = linear_sbc(lambda family, data: Linear(family, data, 0.5), tasks=200)
    figure = result.plot(tmp_path / "ranks.png")
    assert figure.axes[0].get_title() == f"phi[0]: {result.findings['phi[0]']}"
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    with pytest.raises(OptionError, match="columns=0"):
        bm.plot_ranks(result, columns=0)
