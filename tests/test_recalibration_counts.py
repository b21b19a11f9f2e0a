"""Recalibration of counts, and sets of classes: repaired where wrong, left alone where right, and they cover."""

import math

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from forecast_cases import Labels, Phi, label_tasks

import bayesmeta as bm
from bayesmeta.diagnostics import recalibration
from bayesmeta.diagnostics.conformal_sets import ConformalSets, _scores
from bayesmeta.diagnostics.forecasts import Predictor
from bayesmeta.diagnostics.recalibrated_counts import CountForecast, log_step
from bayesmeta.errors import NoClosedFormError, OptionError, UnsupportedError
from bayesmeta.ops.random import as_generator

F64 = torch.float64
SHAPE = 4.0  # of the truth: variance m + m² / 4
SHAPES = {"over-confident": 1e4, "calibrated": SHAPE, "under-confident": 1.5}


def negative_binomial(mean, shape):
    return dist.NegativeBinomial(torch.as_tensor(shape, dtype=F64), logits=(mean / shape).log())


class Forecasts:
    """Negative binomial forecasts of counts with known means; with ``mixed``, as Poissons of drawn rates."""

    is_point, num_draws, target_kind = False, None, "count"

    def __init__(self, support, mean, shape, mixed=False):
        self.support, self.num_tasks, self.mean, self.shape, self.mixed = support, len(mean), mean, shape, mixed

    def draws(self, num_samples, generator=None):
        generator = as_generator(generator, stream="draws")
        if not self.mixed:
            return Phi(torch.ones(num_samples, self.num_tasks, 1, dtype=F64))
        shape = torch.full((num_samples, self.num_tasks, 1), self.shape, dtype=F64)
        return Phi(torch._standard_gamma(shape, generator=generator) / self.shape)

    def named(self, draws):
        return {"phi": draws.u}

    def named_theta(self, draws):
        return {}

    def predictive(self, x, *, joint=False):
        raise NoClosedFormError("counts")

    def _mean(self, x):
        place = (x.x if hasattr(x, "x") else x).squeeze(-1).long()
        return self.mean.gather(1, place)

    def log_likelihood(self, observations, *, draws):
        mean, y = self._mean(observations), observations.y
        if self.mixed:
            value = dist.Poisson(mean * draws.u).log_prob(y)
        else:  # all draws are the same
            value = negative_binomial(mean, self.shape).log_prob(y).expand(len(draws.u), *y.shape)
        return torch.where(observations.full_mask(), value, 0.0)

    def predict(self, x, num_samples=1000, *, draws=None, generator=None):
        generator = as_generator(generator, stream="predictions")
        draws = self.draws(num_samples, generator) if draws is None else draws
        mean = self._mean(x).expand(len(draws.u), -1, -1)
        rate = mean * draws.u
        if not self.mixed:
            shape = torch.full_like(mean, self.shape)
            rate = mean * torch._standard_gamma(shape, generator=generator) / self.shape
        return torch.poisson(rate, generator=generator)


def count_tasks(num_tasks, shape=SHAPE, seed=0, query=4, middle=6.0):
    """Tasks of counts around means that differ between tasks and points; of the truth by default."""
    generator = torch.Generator().manual_seed(seed)
    logs = torch.randn(num_tasks, query, generator=generator, dtype=F64).clamp(-2, 2)
    mean = middle * (0.5 * logs).exp()
    gamma = torch._standard_gamma(torch.full_like(mean, SHAPE), generator=generator) / SHAPE
    y = torch.poisson(mean * gamma, generator=generator)
    x = torch.arange(query, dtype=F64).reshape(1, -1, 1).expand(num_tasks, query, 1)
    batch = bm.TaskBatch(bm.Observations(x[:, :1], y[:, :1]), bm.Observations(x, y))
    return Forecasts(batch.support, mean, shape), batch


@pytest.mark.parametrize("how", ["temperature", "isotonic"])
@pytest.mark.parametrize("kind", SHAPES)
def test_wrong_spread_is_repaired_over_2000_tasks(kind, how):
    valid, validation = count_tasks(1000, SHAPES[kind], seed=1, query=2)
    posterior, batch = count_tasks(2000, SHAPES[kind], seed=2, query=2)
    correction = bm.recalibrate(valid, validation, how, num_samples=2)
    corrected = correction(posterior)
    before = bm.calibration(posterior, batch, num_samples=100)
    assert before.finding == kind
    after = bm.calibration(corrected, batch, num_samples=100)
    # of both sets of tasks; one number does not turn the form of a Poisson into that of a negative binomial
    error = 3 * after.standard_errors["coverage_90"] * math.sqrt(1 + 2000 / 1000)
    assert after["coverage_90"] == pytest.approx(0.9, abs=error + (0.01 if how == "temperature" else 0.0))
    if how == "isotonic":
        assert after["calibration_error"] < 0.025
    exact = Forecasts(batch.support, posterior.mean, SHAPE)
    nll = [bm.scores(p, batch, num_samples=2).per_task["nll"] for p in (posterior, corrected, exact)]
    lost = nll[1] - nll[2]
    assert lost.mean() < 0.05
    if kind == "calibrated":
        assert abs(after["coverage_90"] - before["coverage_90"]) < 0.015
        assert lost.mean().abs() < 0.01
    else:
        assert before["calibration_error"] > max(0.03, 1.2 * after["calibration_error"]), "control"
        assert scipy.stats.ttest_1samp(nll[0] - nll[1], 0.0, alternative="greater").pvalue < 1e-6


@pytest.mark.parametrize("how", ["temperature", "isotonic"])
def test_the_new_forecast_is_a_distribution_and_that_of_its_draws(how):
    valid, validation = count_tasks(150, 50.0, seed=1)
    posterior, batch = count_tasks(2, 50.0, seed=2, query=1)
    posterior.mixed = valid.mixed = True
    corrected = bm.recalibrate(valid, validation, how, num_samples=50)(posterior)
    draws = corrected.draws(1500, 3)
    counts = torch.arange(60, dtype=F64)
    every = bm.Observations(torch.zeros(2, 60, 1, dtype=F64), counts.expand(2, 60))
    p = corrected.log_likelihood(every, draws=draws).logsumexp(0).exp().mT / 1500
    torch.testing.assert_close(p.sum(0), torch.ones(2, dtype=F64), atol=1e-3, rtol=0.0)
    y = corrected.predict(batch.query.x, draws=draws, generator=4).squeeze(-1)
    assert (y == y.round()).all()
    assert (y >= 0).all()
    share = (y.unsqueeze(0) <= counts.reshape(-1, 1, 1)).double().mean(1)
    assert (share - p.cumsum(0)).abs().max() < 1.63 / math.sqrt(1500)  # 99% point of Kolmogorov's statistic, doubly so
    old = posterior.predict(batch.query.x, draws=draws, generator=4).squeeze(-1)
    assert torch.corrcoef(torch.stack([y[:, 0], old[:, 0]]))[0, 1] > 0.97, "each draw stays with its φ"


def test_a_temperature_of_one_changes_nothing():
    posterior, batch = count_tasks(50)
    same = recalibration.Temperature(1.0, "count", 50)(posterior)
    draws = posterior.draws(2)
    found, told = (p.log_likelihood(batch.query, draws=draws) for p in (same, posterior))
    torch.testing.assert_close(found, told, atol=1e-6, rtol=1e-6)  # what lies beyond the table is closed approximately


def test_normal_quantiles_of_counts_are_those_of_scipy():
    """Also far out in the tails, where 1 − F is 0 in floating point."""
    mean = torch.tensor([[0.3, 4.0, 30.0]], dtype=F64)
    k = torch.arange(151, dtype=F64).reshape(-1, 1, 1)
    table = CountForecast(dist.Poisson(mean).log_prob(k))
    for place, m in enumerate(mean[0].tolist()):
        counts = torch.tensor([0, 1, 5, 20, 80])
        upper = scipy.stats.poisson.sf(counts, m)
        lower = scipy.stats.poisson.cdf(counts, m)
        expected = torch.where(
            torch.tensor(lower < upper),
            torch.tensor(scipy.stats.norm.ppf(lower)),
            torch.tensor(scipy.stats.norm.isf(upper.clip(1e-300))),
        )
        torch.testing.assert_close(table.z[counts + 1, 0, place], expected, rtol=1e-6, atol=1e-6)
    # a negative binomial's table that ends early goes on by its ratio
    heavy = negative_binomial(torch.full((1, 1), 5.0, dtype=F64), 1.0)  # geometric: exactly so
    table = CountForecast(heavy.log_prob(k[:20]))
    expected = scipy.stats.norm.isf(scipy.stats.nbinom.sf(19, 1, 1 / 6))
    assert table.z[20, 0, 0].item() == pytest.approx(expected, rel=1e-9)
    low, high = torch.tensor([-1.0, 30.0, -math.inf], dtype=F64), torch.tensor([1.0, 30.1, 0.0], dtype=F64)
    expected = [math.log(0.6826894921370859), scipy.stats.norm.logsf(30), math.log(0.5)]
    found = log_step(low, high)
    assert found[0].item() == pytest.approx(expected[0])
    assert found[1].item() == pytest.approx(
        expected[1] + math.log1p(-math.exp(scipy.stats.norm.logsf(30.1) - expected[1]))
    )
    assert found[2].item() == pytest.approx(expected[2])


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_conformal_intervals_of_counts_cover_over_2000_repetitions(kind, level):
    """2000 times: 19 validation tasks, a new one, one point of it; the ends are counts."""
    repetitions, tasks = 2000, 19
    every, batch = count_tasks(repetitions * (tasks + 1), SHAPES[kind], seed=5, query=2, middle=3.0)
    variance = every.mean + every.mean**2 / every.shape
    shape = (repetitions, tasks + 1, 2)
    y, mean, scale = (v.reshape(shape) for v in (batch.query.y, every.mean, (variance + 1 / 12).sqrt()))
    mask = torch.ones(tasks, 2, dtype=torch.bool)
    covered, naive = 0, 0
    for i in range(repetitions):
        query = bm.Observations(torch.zeros(tasks, 2, 1), y[i, 1:], mask)
        found = recalibration._conformal(query, mask, mean[i, 1:], scale[i, 1:], 10, "count")
        half = found.factor(level) * scale[i, 0, 0]
        low, high = (mean[i, 0, 0] - half).ceil().clamp(min=0), (mean[i, 0, 0] + half).floor()
        covered += bool(low <= y[i, 0, 0] <= high)
        naive += scipy.stats.norm.ppf((1 + level) / 2) * scale[i, 0, 0] >= (y[i, 0, 0] - mean[i, 0, 0]).abs()
    assert scipy.stats.binomtest(covered, repetitions, level, "less").pvalue > 0.01
    if kind == "over-confident":
        assert scipy.stats.binomtest(int(naive), repetitions, level, "less").pvalue < 1e-6, "control"


def test_conformal_interval_of_a_posterior_of_counts():
    valid, validation = count_tasks(200, 1e4, seed=1)
    posterior, batch = count_tasks(300, 1e4, seed=2)
    found = bm.recalibrate(valid, validation, "conformal", num_samples=400)
    low, high = found.interval(posterior, batch.query, 0.9, num_samples=400)
    assert (low == low.round()).all()
    assert (high == high.round()).all()
    assert low.min() == 0
    inside = ((low <= batch.query.y) & (batch.query.y <= high)).double().mean(-1)
    assert inside.mean() > 0.9 - 2 * inside.std() / 300**0.5
    low, high = found.interval(posterior, batch.query, 0.999)
    assert (low == 0).all()
    assert torch.isinf(high).all()
    with pytest.raises(UnsupportedError, match=r"call its interval\(\)"):
        found(posterior)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("level", [0.6, 0.9])
def test_sets_of_classes_cover(factor, level):
    """2000 new tasks; 500 validation tasks, whose own noise adds to the standard error."""
    batch, logits = label_tasks(2500, seed=6)
    parts = slice(0, 500), slice(500, None)
    valid, new = (Labels(batch.tasks(i).support, logits[i], factor) for i in parts)
    found = bm.recalibrate(valid, batch.tasks(parts[0]), "conformal", num_samples=2)
    test = batch.tasks(parts[1])
    sets = found.sets(new, test.query, level)
    inside = sets.gather(-1, test.query.y.long().unsqueeze(-1)).squeeze(-1).double().mean(-1)
    error = inside.std().item() * math.sqrt(1 / 2000 + 1 / 500)
    assert inside.mean() > level - 3 * error
    assert sets.any(-1).all()
    if level == 0.9:
        assert inside.mean() < level + 0.05, "not far more than needed"
        probability = new.class_probabilities(test.query)
        most = probability.argmax(-1, keepdim=True)
        assert sets.gather(-1, most).all()
    assert "500 tasks" in str(found)


def test_sets_by_hand():
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]], dtype=F64)
    support = bm.Observations(torch.tensor([[[0.0], [1.0]]], dtype=F64))
    posterior = Labels(support, p.log())
    torch.testing.assert_close(
        _scores(Predictor(posterior, 2, 0), support), torch.tensor([[[0.5, 0.8, 1.0], [0.8, 0.8, 1.0]]], dtype=F64)
    )
    sets = ConformalSets(torch.tensor([0.5, 0.8], dtype=F64), torch.tensor([1 / 3, 1 / 3], dtype=F64), 2)
    assert sets.sets(posterior, support, 0.3).tolist() == [[[True, False, False], [True, True, False]]]
    assert sets.sets(posterior, support, 0.6).tolist() == [[[True, True, False], [True, True, False]]]
    assert sets.sets(posterior, support, 0.7).all(), "more than two tasks can promise"
    x, y = torch.tensor([[[0.0], [1.0]]] * 2, dtype=F64), torch.tensor([[0.0, 2.0], [1.0, 0.0]], dtype=F64)
    ragged = bm.Observations(x, y, torch.tensor([[True, True], [True, False]]))
    two = Labels(ragged, p.log().expand(2, 2, 3))
    found = bm.recalibrate(two, bm.TaskBatch(ragged, ragged), "conformal", num_samples=2)
    torch.testing.assert_close(found.scores, torch.tensor([0.5, 0.8, 1.0], dtype=F64))
    torch.testing.assert_close(found.weights, torch.tensor([1 / 6, 1 / 3, 1 / 6], dtype=F64))


def test_a_real_posterior_with_scores_tree_and_picture(tmp_path):
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.likelihoods.Poisson(), "normal")
    _, batch = count_tasks(8, query=3)
    parts = (bm.Observations(part.x.float(), part.y.float()) for part in (batch.support, batch.query))
    batch = bm.TaskBatch(*parts)
    posterior = bm.ABML(model, inner_steps=2, inner_lr=0.1).adapt(batch.support)
    for how in ("temperature", "isotonic"):
        corrected = bm.recalibrate(posterior, batch, how, num_samples=50)(posterior)
        assert bm.scores(corrected, batch, num_samples=50)["nll"] < bm.scores(posterior, batch, num_samples=50)["nll"]
        tree = bm.to_datatree(corrected, batch, num_samples=10)
        assert tree["predictions"]["y"].shape == (1, 10, 24)
        bm.plot_forecast(corrected, batch, max_panels=2, num_samples=20, path=tmp_path / "a.png")
        assert corrected.predict(batch.query.x, 5).dtype == posterior.predict(batch.query.x, 5).dtype


def test_errors_are_typed():
    posterior, batch = count_tasks(6)
    temperature = bm.recalibrate(posterior, batch, num_samples=2)
    conformal = bm.recalibrate(posterior, batch, "conformal", num_samples=100)
    with pytest.raises(UnsupportedError, match="recalibrated once"):
        bm.recalibrate(temperature(posterior), batch)
    with pytest.raises(UnsupportedError, match="recalibrated once"):
        temperature(temperature(posterior))
    conformal.interval(temperature(posterior), batch.query)
    large, many = count_tasks(6, middle=1e4)
    for how in ("temperature", "isotonic"):
        with pytest.raises(UnsupportedError, match=r"up to 2000\. Take how='conformal'"):
            bm.recalibrate(large, many, how, num_samples=10)
    bm.recalibrate(large, many, "conformal", num_samples=10).interval(large, many.query, 0.5)
    labels, logits = label_tasks(6)
    of_classes = Labels(labels.support, logits)
    sets = bm.recalibrate(of_classes, labels, "conformal")
    with pytest.raises(UnsupportedError, match=r"call sets\(\)"):
        sets(of_classes)
    with pytest.raises(UnsupportedError, match="are of classes; these targets are 'count'"):
        sets.sets(posterior, batch.query)
    with pytest.raises(OptionError, match="level=1"):
        sets.sets(of_classes, labels.query, 1.0)
    for found in (temperature, conformal, bm.recalibrate(posterior, batch, "isotonic", num_samples=2)):
        with pytest.raises(UnsupportedError, match="learned on targets of kind 'count'; the posterior's are 'class'"):
            found(of_classes)
    with pytest.raises(NoClosedFormError):
        temperature(posterior).predictive(batch.query)
