"""The benchmark of PACOH: its environments by their moments, its scores on known forecasts, its bar."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

import bayesmeta as bm
from benchmarks import _pacoh_tasks as environments
from benchmarks import pacoh as benchmark
from benchmarks._pacoh_gp import VanillaGP, _gram
from benchmarks._pacoh_oracle import Oracle


def drawn(name, tasks=4000, points=4):
    return environments.ENVIRONMENTS[name](tasks, points, torch.Generator().manual_seed(0))


def test_sinusoids_have_their_moments():
    """Over tasks and x: mean 5, and the variance by adding up the independent terms."""
    x, y = drawn("sinusoid")
    assert x.min() >= -5
    assert x.max() <= 5
    assert abs(float(y.mean()) - 5) < 5 * float(y.std()) / 4000**0.5
    a = x.squeeze(-1)
    # E[a]/2 sin-terms: given x, the mean is 0.5 x + E[a] exp(−(1.5 · 0.1)² / 2) sin(1.5 x) + 5
    mean = 0.5 * a + math.exp(-0.5 * 0.15**2) * torch.sin(1.5 * a) + 5
    rest = y - mean
    assert abs(float(rest.mean())) < 5 * float(rest.std()) / 4000**0.5
    expected = 0.04 * 25 / 3 + 0.01 + 0.01 + 0.5 * (1 + 0.03) - 0.5 * math.exp(-(0.15**2))
    assert float(rest.var()) == pytest.approx(expected, rel=0.15)  # the sines' mean square is 1/2, nearly


def test_cauchy_tasks_have_their_moments():
    """Deviations from the mean function: variance 0.2² + 0.05², covariance 0.2² exp(−‖x − x′‖²) within a task."""
    x, y = drawn("cauchy")
    assert x.min() >= -7.5
    assert x.max() <= 5
    assert x.shape == (4000, 4, 2)
    far = [(x - at).square().sum(-1) for at in (-1, 2)]
    rest = y - (1 + 6 / (math.pi * (1 + far[0])) + 3 / (math.pi * (1 + far[1])))
    assert abs(float(rest.mean())) < 5 * 0.21 / 4000**0.5
    assert float(rest.var()) == pytest.approx(0.0425, rel=0.06)
    near = torch.exp(-(x[:, 0] - x[:, 1]).square().sum(-1))
    products = rest[:, 0] * rest[:, 1]
    slope = float((products * near).sum() / near.square().sum())
    error = float(((products - 0.04 * near) * near).std() * 4000**0.5 / near.square().sum())
    assert abs(slope - 0.04) < 4 * error
    assert error < 0.01


def test_training_and_test_sets():
    batch, standardizer = environments.training_set("cauchy", 0)
    union = batch.union()
    assert union.x.shape == (20, 5, 2)
    torch.testing.assert_close(union.y.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(union.x.flatten(0, 1).std(0), torch.ones(2))
    again, _ = environments.training_set("cauchy", 0)
    other, _ = environments.training_set("cauchy", 1)
    assert torch.equal(batch.support.y, again.support.y)
    assert not torch.equal(batch.support.y, other.support.y)
    fresh = environments.test_set("cauchy", 3, 0, standardizer)
    assert fresh.support.y.shape == (3, 5)
    assert fresh.query.y.shape == (3, 200)
    assert not torch.equal(standardizer.raw_y(fresh.support.y), standardizer.raw_y(batch.support.y[:3]))


def test_calibration_of_known_forecasts():
    """The right forecast has what 200 independent uniform numbers have; one that is twice too narrow, much more."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(500, 200, generator=generator)
    right = environments.calibration_error(torch.distributions.Normal(0.0, 1.0).cdf(y))
    narrow = environments.calibration_error(torch.distributions.Normal(0.0, 0.5).cdf(y))
    levels = torch.linspace(0.05, 0.95, 20)
    bound = float((levels * (1 - levels) / 200).mean().sqrt())  # of the root of the mean square
    assert 0.7 * bound < right.mean() < bound
    assert narrow.mean() > 3 * bound
    exact = environments.calibration_error(levels[None])  # one number below each level, with itself
    assert float(exact) == pytest.approx(float((torch.arange(1, 21) / 20 - levels).square().mean().sqrt()), abs=1e-6)


class Known:
    """Forecasts the mean of the query in standard units, N(0, 1)."""

    def adapt(self, support, generator=None):
        return self

    def predictive(self, query):
        return torch.distributions.Normal(torch.zeros_like(query.y), 1.0)


def test_errors_are_in_raw_units():
    _, standardizer = environments.training_set("sinusoid", 0)
    batch = environments.test_set("sinusoid", 7, 1, standardizer)
    found = environments.score(Known(), batch, standardizer, chunk=3)
    cdf = torch.distributions.Normal(0.0, 1.0).cdf(batch.query.y)
    assert found["calibration"] == pytest.approx(float(environments.calibration_error(cdf).mean()), rel=1e-5)
    together = environments.calibration_error(cdf.reshape(1, -1))
    assert found["pooled_calibration"] == pytest.approx(float(together), abs=1e-5)
    raw = standardizer.raw_y(batch.query.y)
    expected = (raw - standardizer.y_mean).square().mean(-1).sqrt().mean()
    assert found["rmse"] == pytest.approx(float(expected), rel=1e-5)


def test_a_posterior_without_closed_form_is_scored_by_draws():
    class Drawn(Known):
        program = None

        def predictive(self, query, *rest):
            if not rest:
                raise bm.errors.NoClosedFormError("draws only")
            return torch.distributions.Normal(rest[0], 1.0)

        def draws(self, count, seed):
            return bm.Draws(torch.tensor([-1.0, 2.0])[:, None, None])

    posterior = Drawn()
    posterior.program = type("", (), {"predictive": lambda self, u, query, theta: torch.distributions.Normal(u, 1.0)})()
    query = bm.Observations(torch.zeros(1, 3, 1), torch.tensor([[-1.0, 0.0, 5.0]]))
    mean, cdf = environments.mean_and_cdf(posterior, query)
    torch.testing.assert_close(mean.expand(1, 3), torch.full((1, 3), 0.5))
    each = [torch.distributions.Normal(m, 1.0).cdf(query.y) for m in (-1.0, 2.0)]
    torch.testing.assert_close(cdf, (each[0] + each[1]) / 2)


@pytest.mark.parametrize(("name", "tasks"), [("cauchy", 100), ("sinusoid", 100)])
def test_the_oracle_is_calibrated_and_its_error_is_what_it_says(name, tasks):
    """Over all tasks together, and so is the size of its squared error; one twice as sure is not."""
    _, standardizer = environments.training_set(name, 3)
    batch = environments.test_set(name, tasks, 11, standardizer)
    predictive = Oracle(name, standardizer).adapt(batch.support).predictive(batch.query)
    z = (batch.query.y - predictive.mean) / predictive.stddev
    each = z.square().mean(-1)
    error = each.std() / tasks**0.5
    assert abs(each.mean() - 1) < 4 * error
    assert error < 0.2
    pooled = environments.calibration_error(predictive.cdf(batch.query.y).reshape(1, -1))
    sure = torch.distributions.Normal(predictive.mean, predictive.stddev / 2).cdf(batch.query.y)
    assert pooled < 0.05
    assert environments.calibration_error(sure.reshape(1, -1)) > 0.07


def test_the_vanilla_gp_fits_each_task():
    """Against one task at a time, and it predicts smooth functions far better than their mean does."""
    generator = torch.Generator().manual_seed(0)
    x = -2 + 4 * torch.rand(6, 30, 1, generator=generator)
    y = torch.sin(2 * x).squeeze(-1) * torch.arange(1, 7).unsqueeze(-1)
    support, query = bm.Observations(x[:, :15], y[:, :15]), bm.Observations(x[:, 15:], y[:, 15:])
    posterior = VanillaGP().adapt(support)
    error = (posterior.predictive(query).mean - query.y).square().mean(-1).sqrt()
    assert (error < 0.2 * query.y.std(-1)).all()
    alone = VanillaGP().adapt(support.tasks([2])).predictive(query.tasks([2]))
    torch.testing.assert_close(alone.mean, posterior.predictive(query).mean[2:3], rtol=1e-2, atol=1e-2)
    gram = _gram(posterior.raw, x[:, :15])
    torch.testing.assert_close(gram.diagonal(dim1=-2, dim2=-1), (2 * posterior.raw[:, 1:2]).exp().expand(-1, 15))


def figures(rmse, calibration):
    values = {"rmse": rmse, "calibration": calibration, "seconds": [1.0] * len(rmse)}
    values["pooled_calibration"] = calibration
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def test_the_bar_is_one_paired_standard_error_above_the_best():
    found = {
        "pacoh": figures([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]),
        "pacoh_map": figures([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),  # no rivals
        "oracle": figures([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        "mll": figures([0.9, 1.9, 3.1], [0.4, 0.3, 0.4]),
        "maml": figures([5.0, 5.0, 5.0], [0.6, 0.6, 0.6]),
    }
    rows = {row.name: row for row in benchmark.rows_of("cauchy", found, full=True)}
    rmse, calibration = rows["cauchy_pacoh_rmse"], rows["cauchy_pacoh_calibration"]
    assert rmse.difference == pytest.approx(0.1 / 3)
    assert rmse.standard_error == pytest.approx(torch.tensor([0.1, 0.1, -0.1]).std().item() / 3**0.5)
    assert rmse.passes is True
    assert calibration.difference == pytest.approx(0.4 / 3)
    assert calibration.passes is False
    assert rmse.reference == pytest.approx(5.9 / 3)
    assert rows["cauchy_mll_rmse"].passes is None
    quick = {row.name: row for row in benchmark.rows_of("cauchy", found, full=False)}
    assert quick["cauchy_pacoh_rmse"].passes is None


def test_a_quick_run_gives_all_rows():
    args = argparse.Namespace(
        quick=True,
        seed=3,
        methods=["pacoh", "mll"],
        environments=["sinusoid"],
        trainings=5,
        tasks=4,
        steps=2,
        threads=1,
    )
    threads = torch.get_num_threads()
    try:
        rows = {row.name: row for row in benchmark.run(args)}
    finally:
        torch.set_num_threads(threads)
    wanted = {f"sinusoid_{m}_{key}" for m in ("pacoh", "mll") for key in (*benchmark.SCORES, "seconds")}
    assert set(rows) == wanted
    assert all(row.ours is not None and math.isfinite(row.ours) and row.passes is None for row in rows.values())
    args.methods = ["magic"]
    with pytest.raises(SystemExit, match=r"unknown method.* magic"):
        benchmark.run(args)


@pytest.mark.parametrize("name", benchmark.RUNS)
def test_every_method_trains_and_is_scored(name):
    found = benchmark.measure(name, "cauchy", 5, 1, 2)
    assert set(found) == {*benchmark.SCORES, "seconds"}
    assert 0 < found["rmse"] < 10
    assert 0 <= found["calibration"] < 1
