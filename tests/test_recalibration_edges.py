"""Recalibration at its edges: outliers, far tails, few tasks, few draws, no points, and targets that cannot be."""

import math
from dataclasses import replace

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from forecast_cases import Labels, Linear, label_tasks, linear_tasks
from test_recalibration_counts import Forecasts, count_tasks

import bayesmeta as bm
from bayesmeta.diagnostics.corrections import Temperature, interpolate, moments
from bayesmeta.diagnostics.forecasts import Predictor
from bayesmeta.diagnostics.recalibrated_counts import CountForecast, normal_quantile
from bayesmeta.errors import DataError, NonFiniteDataError, UnsupportedError
from bayesmeta.ops.random import as_generator

F64 = torch.float64


def with_y(batch, place, value):
    y = batch.query.y.clone()
    y[place] = value
    return replace(batch, query=batch.query.with_y(y))


# -- far tails ----------------------------------------------------------------------------------------------------


def test_normal_quantiles_of_logarithms():
    z = torch.tensor([-1e4, -500.0, -40.0, -37.0, -14.0, -13.0, -8.0, -1.0, 0.0, 2.0], dtype=F64)
    log_p = torch.as_tensor(scipy.stats.norm.logcdf(z.numpy()))
    torch.testing.assert_close(normal_quantile(log_p), z, rtol=1e-12, atol=1e-12)
    assert normal_quantile(torch.tensor([-math.inf], dtype=F64)).item() == -math.inf


def test_one_outlier_makes_the_temperature_larger_and_not_the_least():
    posterior, batch = count_tasks(100, 1e4, seed=1, query=3, middle=2.0)
    values = [bm.recalibrate(posterior, batch, num_samples=2).value]
    for y in (30, 400):  # of a mean of some 2: 400 has log-probability −1700
        found = bm.recalibrate(posterior, with_y(batch, (5, 1), y), num_samples=2)
        values.append(found.value)
    assert values[0] < values[1] < values[2] < 10
    # the step of the outlier by hand: upper tails of SciPy's in logarithms
    mean = posterior.mean[5, 1].item()
    p = mean / (1e4 + mean)
    tail = [scipy.stats.nbinom.logsf(k, 1e4, 1 - p) for k in (29, 30)]
    z = [-normal_quantile(torch.tensor(t, dtype=F64)).item() / 2 for t in tail]
    expected = scipy.stats.norm.logsf(z[0]) + math.log1p(
        -math.exp(scipy.stats.norm.logsf(z[1]) - scipy.stats.norm.logsf(z[0]))
    )
    new = Temperature(2.0, "count", 3)(posterior).log_likelihood(
        with_y(batch, (5, 1), 30).query, draws=posterior.draws(2)
    )
    assert new[:, 5, 1].logsumexp(0).item() - math.log(2) == pytest.approx(expected, rel=1e-6)


def test_a_count_between_two_modes_keeps_its_density():
    """F is the same before and after it in floating point, so that a difference would be 0."""
    k = torch.arange(301, dtype=F64).reshape(-1, 1, 1)
    halves = [dist.Poisson(torch.full((1, 1), rate, dtype=F64)).log_prob(k) for rate in (2.0, 200.0)]
    table = CountForecast(torch.stack(halves).logsumexp(0) - math.log(2))
    y = torch.full((1, 1), 50.0, dtype=F64)
    truth = math.log(0.5) + scipy.stats.poisson.logpmf(50, 200.0)
    assert truth < -80
    assert table.log_prob(y, lambda z: z).item() == pytest.approx(truth, rel=1e-6)
    # at the median z = 0, where a temperature divides the density
    assert table.log_prob(y, lambda z: z / 3).item() == pytest.approx(truth - math.log(3), rel=1e-6)


def test_a_target_that_no_temperature_makes_possible_is_named():
    batch, logits = label_tasks(20)
    logits[3, 2, int(batch.query.y[3, 2])] = -math.inf
    names = [f"task-{i}" for i in range(20)]
    with pytest.raises(
        NonFiniteDataError, match="at whatever temperature, is not finite for task task-3, query point 2"
    ):
        bm.recalibrate(Labels(batch.support, logits), replace(batch, names=names), num_samples=2)


def test_a_temperature_at_the_end_of_the_search_is_told():
    batch, _ = label_tasks(20)
    sure = torch.nn.functional.one_hot(batch.query.y.long(), 4).double() / 10
    with pytest.warns(UserWarning, match=r"ended at 0\.02.* are they training tasks"):
        bm.recalibrate(Labels(batch.support, sure), batch, num_samples=2)
    family, batch = linear_tasks(20)
    with pytest.warns(UserWarning, match="ended at 50.* in other units"):
        assert bm.recalibrate(Linear(family, batch.support, 1e-4), batch).value == 50
    with pytest.warns(UserWarning, match=r"ended at 49\.9"):
        bm.recalibrate(Linear(family, batch.support, 1e-3, closed=False), batch, num_samples=20)


@pytest.mark.parametrize("how", ["isotonic", "conformal"])
def test_of_a_normal_the_density_is_exact_however_far_out(how):
    """At a third of the spread, targets lie beyond Φ⁻¹(1 − 10⁻¹⁵) = 7.9 standard deviations."""
    family, batch = linear_tasks(600, seed=5)
    parts = batch.tasks(slice(0, 500)), batch.tasks(slice(500, None))
    valid, posterior = (Linear(family, part.support, 0.3) for part in parts)
    found = bm.recalibrate(valid, parts[0], how)
    query = parts[1].query
    closed = posterior.predictive(query)
    z = (query.y - closed.loc) / closed.scale
    assert z.abs().max() > 8
    if how == "isotonic":
        new, slope = interpolate(z, found.old, found.new)
    else:
        new, slope = interpolate(z.abs(), found.stretched, found.radius)
    exact = dist.Normal(0.0, 1.0).log_prob(new) + slope.log() - closed.scale.log()
    draws = posterior.draws(2000, 1)
    told = found(posterior).log_likelihood(query, draws=draws).logsumexp(0) - math.log(2000)
    # the draws' mean of the density of F, over F's own: 2000 draws know it to some percent, less in the tails
    assert (told - exact).abs().max() < 0.5
    assert (told - exact).mean().abs() < 0.01
    # and it integrates to one
    grid = torch.linspace(-30, 30, 1501, dtype=F64)
    at = closed.loc[:1, :1] + closed.scale[:1, :1] * grid
    many = bm.Observations(query.x[:1, :1].expand(1, 1501, -1), at)
    one = Linear(family, parts[1].tasks([0]).support, 0.3)
    density = found(one).log_likelihood(many, draws=one.draws(2000, 1)).logsumexp(0).exp() / 2000
    assert torch.trapezoid(density, at).item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("factor", [3.0, 6.0, 10.0])
def test_draws_of_widened_counts_are_not_cut_off(factor):
    _, batch = count_tasks(4, query=3)
    posterior = Forecasts(batch.support, torch.full((4, 3), 20.0, dtype=F64), 1e4)
    draws = posterior.draws(4000)
    y = Temperature(factor, "count", 10)(posterior).predict(batch.query, draws=draws, generator=1).double()
    counts = torch.arange(1500)
    p = 20.0 / (1e4 + 20.0)
    z = -normal_quantile(torch.as_tensor(scipy.stats.nbinom.logsf(counts.numpy(), 1e4, 1 - p)))
    truth = torch.special.ndtr(z / factor)
    for level in (0.9, 0.99, 0.999):
        q = int((truth < level).sum())
        share = (y <= q).double().mean().item()
        # 48 000 draws
        assert abs(share - truth[q].item()) < 4 * math.sqrt(level * (1 - level) / 48_000)


def test_widened_counts_beyond_any_table_are_refused():
    _, batch = count_tasks(4, query=3)
    posterior = Forecasts(batch.support, torch.full((4, 3), 100.0, dtype=F64), 3.0)
    with pytest.raises(UnsupportedError, match=r"Forecasts reach counts .* up to 2000"):
        Temperature(8.0, "count", 10)(posterior).predict(batch.query, 50)


# -- targets and forecasts that cannot be -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["temperature", "conformal"])
@pytest.mark.parametrize("value", [7.0, -1.0, 1.5])
def test_labels_that_are_no_classes(how, value):
    batch, logits = label_tasks(20)
    with pytest.raises(DataError, match=rf"y = {value} of task 2, query point 1 .* classes 0 to 3"):
        bm.recalibrate(Labels(batch.support, logits), with_y(batch, (2, 1), value), how, num_samples=2)
    padded = with_y(batch, (2, 1), value)
    mask = torch.ones(20, 8, dtype=torch.bool)
    mask[2, 1] = False
    query = bm.Observations(padded.query.x, padded.query.y, mask)
    bm.recalibrate(Labels(batch.support, logits), replace(padded, query=query), how, num_samples=2)


@pytest.mark.parametrize("how", ["temperature", "isotonic", "conformal"])
@pytest.mark.parametrize("value", [-3.0, 1.5])
def test_targets_that_are_no_counts(how, value):
    posterior, batch = count_tasks(20)
    with pytest.raises(DataError, match=rf"y = {value} of task 2, query point 1 .* of counts"):
        bm.recalibrate(posterior, with_y(batch, (2, 1), value), how, num_samples=4)


@pytest.mark.parametrize("how", ["temperature", "conformal"])
def test_probabilities_that_are_nan(how):
    batch, logits = label_tasks(20)
    logits[3, 2] = math.nan
    with pytest.raises(NonFiniteDataError, match=r"probability of a class is not finite for task 3, query point 2"):
        bm.recalibrate(Labels(batch.support, logits), batch, how, num_samples=2)


@pytest.mark.parametrize("how", ["temperature", "isotonic", "conformal"])
def test_forecasts_of_counts_that_are_nan(how):
    class Broken(Forecasts):
        def predict(self, x, num_samples=1000, *, draws=None, generator=None):
            return super().predict(x, num_samples, draws=draws, generator=generator) + 0.0 * self.nan

    good, batch = count_tasks(20)
    posterior = Broken(batch.support, good.mean, 4.0)
    posterior.nan = torch.zeros(20, 4, dtype=F64)
    posterior.nan[2, 1] = math.nan
    with pytest.raises(NonFiniteDataError, match="predictive mean is not finite for task 2, query point 1"):
        bm.recalibrate(posterior, batch, how, num_samples=4)


def test_no_points_are_predicted_as_none():
    posterior, batch = count_tasks(5)
    corrected = Temperature(1.5, "count", 10)(posterior)
    assert corrected.predict(bm.Observations(batch.query.x[:, :0]), 4).shape == (4, 5, 0)
    hidden = bm.Observations(batch.query.x, None, torch.zeros(5, 4, dtype=torch.bool))
    assert corrected.predict(hidden, 4).shape == (4, 5, 4)
    family, batch = linear_tasks(5)
    for closed in (True, False):
        corrected = Temperature(1.5, "real", 10)(Linear(family, batch.support, closed=closed))
        assert corrected.predict(bm.Observations(batch.query.x[:, :0]), 4).shape == (4, 5, 0)


# -- few tasks, ragged tasks, few draws ---------------------------------------------------------------------------


def test_few_tasks_get_few_pieces():
    family, batch = linear_tasks(400, seed=8)
    for tasks, pieces in ((2, 2), (17, 3), (50, 10), (100, 20), (400, 20)):
        part = batch.tasks(slice(0, tasks))
        found = bm.recalibrate(Linear(family, part.support), part, "isotonic")
        assert len(found.old) == pieces + 1
        assert str(found) == f"Isotonic({pieces} pieces), from {tasks} tasks"


def test_an_isotonic_map_of_two_tasks_does_little_harm():
    family, batch = linear_tasks(302, seed=8, query=1)
    valid, new = batch.tasks(slice(0, 2)), batch.tasks(slice(2, None))
    posterior = Linear(family, new.support)
    found = bm.recalibrate(Linear(family, valid.support), valid, "isotonic")(posterior)
    # a shift by some standard deviation: d² / 2 more
    assert bm.scores(found, new)["nll"] < bm.scores(posterior, new)["nll"] + 2


def ragged():
    """Tasks of 1 point that are four times as spread as the forecasts, as many of 20 that are as they say."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(400, 20, generator=generator, dtype=F64)
    y[:200] *= 4
    mask = torch.ones(400, 20, dtype=torch.bool)
    mask[:200, 1:] = False
    x = torch.zeros(400, 20, 1, dtype=F64)
    return bm.TaskBatch(bm.Observations(x[:, :1], y[:, :1]), bm.Observations(x, y, mask))


class Standard(Labels):
    """Standard Normal forecasts."""

    target_kind = "real"

    def predictive(self, x, *, joint=False):
        zero = torch.zeros(x.x.shape[:2], dtype=F64)
        return dist.Normal(zero, 1.0)


def test_tasks_count_alike_and_not_their_points():
    batch = ragged()
    posterior = Standard(batch.support, torch.zeros(400, 1, 1))
    y, mask = batch.query.y, batch.query.mask
    mean = torch.stack([y[i][mask[i]].square().mean() for i in range(400)]).mean()
    found = bm.recalibrate(posterior, batch).value
    assert found == pytest.approx(mean.sqrt().item())
    assert found > 2.5, "control: of points alike it is about 1.3"
    isotonic = bm.recalibrate(posterior, batch, "isotonic", num_bins=10)
    for old, new in zip(isotonic.old[1:-1].tolist(), isotonic.new[1:-1].tolist(), strict=True):
        share = ((y <= old) & mask).double().sum(-1) / mask.sum(-1)
        assert share.mean().item() == pytest.approx(scipy.stats.norm.cdf(new), abs=1 / 200)
    assert isotonic.old[-2] > 1.8, "control: of points alike it is about 1.4"


def test_moments_of_counts_have_the_spread_of_rounding():
    """So that a forecast of one count alone has a width."""
    posterior, batch = count_tasks(5, query=3)
    posterior.predict = lambda x, n=0, *, draws=None, generator=None: torch.full((50, 5, 3), 7.0, dtype=F64)
    mean, scale = moments(Predictor(posterior, 50, 0), batch.query)
    assert (mean == 7).all()
    torch.testing.assert_close(scale, torch.full_like(scale, 1 / math.sqrt(12)))


def test_of_draws_from_the_prior_the_forecast_is_theirs():
    family, batch = linear_tasks(5)
    posterior = Linear(family, batch.support)
    corrected = Temperature(3.0, "real", 10)(posterior)
    draws = corrected.prior_draws(300, 1)
    y = posterior.predict(batch.query.x, draws=draws, generator=2)
    found = corrected.predict(batch.query.x, draws=draws, generator=2)
    torch.testing.assert_close(found, y.mean(0) + 3.0 * (y - y.mean(0)))
    exact = posterior.predictive(batch.query)
    draws = posterior.draws(300, 1)
    y = posterior.predict(batch.query.x, draws=draws, generator=2)
    found = corrected.predict(batch.query.x, draws=draws, generator=2)
    torch.testing.assert_close(found, exact.loc + 3.0 * (y - exact.loc))


@pytest.mark.parametrize("how", ["temperature", "isotonic", "conformal"])
def test_one_draw_at_a_time_is_corrected_too(how):
    family, batch = linear_tasks(600, seed=8)
    valid, new = batch.tasks(slice(0, 300)), batch.tasks(slice(300, None))
    found = bm.recalibrate(Linear(family, valid.support, 2.0, closed=False), valid, how, num_samples=200)
    corrected = found(Linear(family, new.support, 2.0, closed=False))
    generator = as_generator(3)
    y = torch.cat([corrected.predict(new.query, 1, generator=generator) for _ in range(8)])
    truth = Linear(family, new.support).predictive(new.query)
    z = (y - truth.loc) / truth.scale
    # draws of one task are dependent; the correction and 200 draws know a scale to some percent
    assert z.std().item() == pytest.approx(1.0, abs=0.08)
    assert z.mean().abs() < 0.1
    density = corrected.log_likelihood(new.query, draws=corrected.draws(1, 1))
    assert torch.isfinite(density).all()
