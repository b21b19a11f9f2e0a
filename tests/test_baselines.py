import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.regression.linear_model import OLS

from bayesmeta.data import Observations
from bayesmeta.demo import baselines
from bayesmeta.demo.baselines import BASELINES, ROUNDING
from bayesmeta.demo.forecast import Forecast
from bayesmeta.diagnostics.scores import scores
from bayesmeta.errors import DataError, EmptyTaskError, ShapeError, UnsupportedError
from bayesmeta.tasks.fertility import fertility_split
from bayesmeta.tasks.table import TableTasks

YEARS = 20


def table_of(paths, start=2000, order="first"):
    tasks, years = paths.shape
    frame = pd.DataFrame(
        {
            "who": np.repeat([f"c{i}" for i in range(tasks)], years),
            "year": np.tile(start + np.arange(years), tasks),
            "y": np.asarray(paths).ravel(),
        }
    )
    return TableTasks.from_dataframe(frame, task="who", x=["year"], y="y", order=order, dtype=torch.float64)


def walks(tasks, seed, drift=0.0, scale=0.3, years=YEARS):
    steps = np.random.default_rng(seed).normal(drift, scale, size=(tasks, years))
    return steps.cumsum(1)


@pytest.fixture(scope="module")
def train():
    return table_of(walks(60, 0, drift=-0.1))


@pytest.fixture(scope="module")
def batch():
    return table_of(walks(8, 1, drift=-0.1)).all(support=7)


def test_a_forecast_is_scored_as_a_posterior_is(batch):
    y = batch.query.y.double()
    forecast = Forecast(y + 1.0, torch.full_like(y, 2.0), torch.eye(y.shape[1]).double().expand(8, -1, -1) * 4.0)
    result = scores(forecast, batch)
    assert result["rmse"] == pytest.approx(1.0)
    constant = math.log(2.0) + 0.5 * math.log(2 * math.pi) + 0.5 * 0.25
    assert result["nll"] == pytest.approx(constant)
    assert result["nll_joint"] == pytest.approx(constant)
    with pytest.raises(ShapeError, match="points a task"):
        forecast.predictive(torch.zeros(8, 2, 1))


@pytest.mark.parametrize("name", BASELINES)
def test_forecasts_never_read_the_query(name, train, batch):
    one = BASELINES[name](train, batch)
    two = BASELINES[name](train, dataclasses.replace(batch, query=batch.query.with_y(batch.query.y + 100.0)))
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.scale, two.scale)
    assert one.mean.shape == one.scale.shape == (8, 13)
    assert one.mean.dtype == torch.float64
    assert bool((one.scale > 0).all())
    diagonal = one.covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal.sqrt(), one.scale)
    assert float(torch.linalg.eigvalsh(one.covariance).min()) > -1e-9


@pytest.mark.parametrize("name", BASELINES)
def test_padding_changes_nothing(name, train, batch):
    plain = BASELINES[name](train, batch)

    def padded(side):
        x, y = (torch.cat([t, t[:, :1]], 1) for t in (side.x, side.y))
        mask = torch.ones(y.shape, dtype=torch.bool)
        mask[:, -1] = False
        return Observations(x, torch.where(mask, y, 77.0), mask)

    both = dataclasses.replace(batch, support=padded(batch.support), query=padded(batch.query))
    forecast = BASELINES[name](train, both)
    torch.testing.assert_close(forecast.mean[:, :-1], plain.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(forecast.scale[:, :-1], plain.scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("drift", [0.0, -0.5])
def test_random_walk_recovers_the_truth(drift):
    train = table_of(walks(300, 0, drift=drift, years=15))
    batch = table_of(walks(400, 1, drift=drift, years=15)).all(support=5)
    forecast = baselines.last_value_drift(train, batch)
    ahead = torch.arange(1.0, 11.0, dtype=torch.float64)
    torch.testing.assert_close(forecast.scale[0], 0.3 * ahead.sqrt(), rtol=0.05, atol=0)
    error = 0.3 / math.sqrt(300 * 14) * ahead  # of the mean yearly change, over the years ahead
    assert ((forecast.mean - batch.support.y[:, -1:] - drift * ahead).abs() / error).max() < 4
    result = scores(forecast, batch)
    assert abs(result["coverage_90"] - 0.9) < 4 * result.standard_errors["coverage_90"]
    without = baselines.last_value(train, batch)
    assert torch.equal(without.mean, batch.support.y[:, -1:].expand_as(without.mean))
    if drift:
        worse = scores(without, batch)
        assert worse["nll"] > scores(forecast, batch)["nll"] + 0.5


def test_line_against_statsmodels(train, batch):
    forecast = baselines.line_per_country(train, batch)
    for i in range(3):
        time, ahead = batch.support.x[i, :, 0].numpy() - 2000, batch.query.x[i, :, 0].numpy() - 2000
        design = np.stack([np.ones_like(time), time], 1)
        prediction = (
            OLS(batch.support.y[i].numpy(), design).fit().get_prediction(np.stack([np.ones_like(ahead), ahead], 1))
        )
        np.testing.assert_allclose(forecast.mean[i].numpy(), prediction.predicted, rtol=1e-8)
        student = prediction.se_obs * math.sqrt(5 / 3)
        np.testing.assert_allclose(forecast.scale[i].numpy(), np.hypot(student, ROUNDING), rtol=1e-8)


def gp_draws(tasks, seed, length=4.0, noise=0.1):
    time = np.arange(YEARS)
    kernel = np.exp(-0.5 * ((time[:, None] - time) / length) ** 2) + noise**2 * np.eye(YEARS)
    return 2.0 * np.random.default_rng(seed).normal(size=(tasks, YEARS)) @ np.linalg.cholesky(kernel).T


def test_gp_is_the_dense_formula_at_its_optimum(train):
    batch = table_of(gp_draws(6, 2)).all(support=12)
    forecast = baselines.gp_per_country(train, batch)
    y = batch.support.y
    level, unit = y.mean(-1, keepdim=True), y.std(-1, keepdim=True, correction=0)
    time, target = (batch.support.x[..., 0] - 2000) / 11, (y - level) / unit
    ahead, mask = (batch.query.x[..., 0] - 2000) / 11, torch.ones_like(y, dtype=torch.bool)
    hyper = baselines._fit_gp(time, target, mask)
    raw = torch.stack([_raw(h, b) for h, b in zip(hyper, [(0.01, 100), (0.05, 20), (0.001, 10)])], -1)
    best = baselines._gp_evidence(raw, time, target, mask)
    for factor in (0.7, 1.4):
        for k in range(3):
            moved = [h * (factor if j == k else 1.0) for j, h in enumerate(hyper)]
            other = torch.stack([_raw(h, b) for h, b in zip(moved, [(0.01, 100), (0.05, 20), (0.001, 10)])], -1)
            assert bool((baselines._gp_evidence(other, time, target, mask) < best + 1e-3).all())
    amplitude, length, noise = (h[0].item() for h in hyper)

    def kernel(a, b):
        return amplitude**2 * np.exp(-0.5 * ((a[:, None] - b) / length) ** 2)

    t, s = time[0].numpy(), ahead[0].numpy()
    gain = kernel(s, t) @ np.linalg.inv(kernel(t, t) + noise**2 * np.eye(12))
    mean = level[0].item() + unit[0].item() * gain @ target[0].numpy()
    variance = np.diag(kernel(s, s) - gain @ kernel(t, s)) + noise**2
    np.testing.assert_allclose(forecast.mean[0].numpy(), mean, rtol=1e-6)
    expected = np.hypot(unit[0].item() * np.sqrt(variance), ROUNDING)
    np.testing.assert_allclose(forecast.scale[0].numpy(), expected, rtol=1e-6)


def _raw(value, bounds):
    low, high = (math.log(b) for b in bounds)
    return ((value.squeeze(-1).log() - low) / (high - low)).clamp(1e-9, 1 - 1e-9).logit()


def test_gp_beats_a_line_on_its_own_data_and_tasks_do_not_mix(train):
    batch = table_of(gp_draws(40, 3)).all(support=16)
    whole = baselines.gp_per_country(train, batch)
    alone = baselines.gp_per_country(train, batch.tasks(slice(5, 6)))
    torch.testing.assert_close(whole.mean[5:6], alone.mean, rtol=1e-6, atol=1e-6)
    line = baselines.line_per_country(train, batch)
    assert scores(whole, batch)["crps"] < 0.8 * scores(line, batch)["crps"]


def test_empirical_gaussian_is_the_dense_formula(train, batch):
    forecast = baselines.empirical_gaussian(train, batch)
    paths = train.observations.y.numpy()
    observed = torch.zeros(8, YEARS, dtype=torch.bool)
    observed[:, :7] = True
    alpha, jitter = baselines._choose_shrinkage(train.observations.y, observed, ~observed)
    covariance = np.cov(paths.T)
    covariance = (1 - alpha) * covariance + alpha * np.diag(np.diag(covariance)) + jitter * np.eye(YEARS)
    gain = covariance[7:, :7] @ np.linalg.inv(covariance[:7, :7])
    mean = paths.mean(0)
    expected = mean[7:] + (batch.support.y.numpy() - mean[:7]) @ gain.T
    joint = covariance[7:, 7:] - gain @ covariance[:7, 7:] + ROUNDING**2 * np.eye(YEARS - 7)
    np.testing.assert_allclose(forecast.mean.numpy(), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(forecast.covariance[3].numpy(), joint, rtol=1e-9, atol=1e-10)


def test_empirical_gaussian_nears_the_truth_and_needs_the_correlations():
    paths = walks(500, 5)
    batch = table_of(walks(300, 6)).all(support=7)
    ahead = torch.arange(1.0, 14.0, dtype=torch.float64)
    walk = 0.09 * torch.minimum(ahead[:, None], ahead[None, :])
    mean = batch.support.y[:, -1:].double().expand(-1, 13)
    truth = Forecast(mean, (0.3 * ahead.sqrt()).expand(300, -1), walk.expand(300, -1, -1))
    best = scores(truth, batch)
    ours = scores(baselines.empirical_gaussian(table_of(paths), batch), batch)
    assert ours["nll"] - best["nll"] < 0.05
    rng = np.random.default_rng(7)
    scrambled = np.stack([rng.permutation(column) for column in paths.T], 1)
    control = scores(baselines.empirical_gaussian(table_of(scrambled), batch), batch)
    assert control["nll"] - best["nll"] > 0.2


def test_empirical_gaussian_with_a_random_support(train):
    table = table_of(walks(8, 1, drift=-0.1), order="random")
    batch = table.sample(8, support=5, query=6, generator=0)
    forecast = baselines.empirical_gaussian(train, batch)
    assert scores(forecast, batch)["rmse"] < 0.6


def test_baselines_refuse_what_they_cannot_do(train, batch):
    scaled = train.with_standardizer(train.fit_standardizer()).all(support=5)
    with pytest.raises(DataError, match="standard units"):
        baselines.last_value(train, scaled)
    with pytest.raises(EmptyTaskError, match="empty support"):
        baselines.last_value(train, train.all(support=0))
    with pytest.raises(UnsupportedError, match="at least 3"):
        baselines.line_per_country(train, train.all(support=2))
    with pytest.raises(DataError, match="observed at 1990"):
        baselines.empirical_gaussian(train, table_of(walks(8, 1), start=1990).all(support=5))
    with pytest.raises(EmptyTaskError, match="at least 10"):
        baselines.empirical_gaussian(train.subset(list(range(9))), batch)
    twice = dataclasses.replace(batch, support=batch.support._map(lambda t: torch.cat([t, t[:, -1:]], 1)))
    with pytest.raises(DataError, match="two observations of one time"):
        baselines.empirical_gaussian(train, twice)


def test_fertility_baselines_come_out_in_the_known_order():
    split = fertility_split(0)
    batch = split.test.with_standardizer(None).all(support=10)
    results = {name: scores(f(split.train, batch), batch) for name, f in BASELINES.items()}
    rmse = {name: s["rmse"] for name, s in results.items()}
    assert 0.6 < rmse["empirical_gaussian"] < rmse["last_value_drift"] < 1.3 < rmse["last_value"] < 2.2
    assert 0.8 < results["empirical_gaussian"]["coverage_90"] < 0.97
    assert results["line_per_country"]["coverage_90"] < 0.3
    assert results["gp_per_country"]["coverage_90"] < 0.35


@pytest.mark.parametrize("name", BASELINES)
def test_ragged_and_repeated_queries_have_a_finite_joint_score(name, train, batch):
    mask = torch.arange(13) < torch.tensor([13, 8, 5, 13, 13, 1, 13, 13])[:, None]
    ragged = dataclasses.replace(batch, query=dataclasses.replace(batch.query, mask=mask))
    assert math.isfinite(scores(BASELINES[name](train, ragged), ragged)["nll_joint"])
    twice = dataclasses.replace(batch, query=batch.query._map(lambda t: torch.cat([t, t[:, -1:]], 1)))
    assert scores(BASELINES[name](train, twice), twice)["nll_joint"] < 1e6
