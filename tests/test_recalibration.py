"""Recalibration repairs forecasts known to be wrong, leaves right ones alone, and conformal intervals cover."""

import copy
import math
from dataclasses import replace

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from forecast_cases import Counts, Labels, Linear, Phi, label_tasks, linear_tasks

import bayesmeta as bm
from bayesmeta.diagnostics import recalibration
from bayesmeta.diagnostics.corrections import interpolate
from bayesmeta.errors import DataError, NoClosedFormError, OptionError, ShapeError, UnsupportedError
from bayesmeta.ops.random import as_generator

F64 = torch.float64
HOW = ("temperature", "isotonic", "conformal")


def pair(factor, closed=True, shift=0.0, tasks=400, new=400):
    """A wrong posterior of validation tasks, and of new ones, with their batches."""
    family, batch = linear_tasks(tasks + new, seed=8)
    parts = batch.tasks(slice(0, tasks)), batch.tasks(slice(tasks, None))
    return [(Linear(family, part.support, factor, shift, closed), part) for part in parts]


# -- repaired -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "draws"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_wrong_spread_is_repaired_and_right_is_left_alone(how, closed, factor):
    if how == "isotonic" and not closed and factor < 1:
        return  # the map cannot reach beyond the draws: see test_corrections_can_be_chained
    (valid, valid_batch), (posterior, batch) = pair(factor, closed)
    corrected = bm.recalibrate(valid, valid_batch, how, num_samples=200)(posterior)
    before = bm.calibration(posterior, batch, num_samples=200)
    # learned from as many tasks as are judged, the correction is off by as much as the test's own standard error
    after = bm.calibration(corrected, batch, num_samples=200, alpha=1e-4)
    assert before.finding == {0.5: "over-confident", 1.0: "calibrated", 2.0: "under-confident"}[factor]
    assert after.finding == "calibrated", after
    assert abs(after["coverage_90"] - 0.9) < 0.03  # two standard errors of both halves
    scores = [bm.scores(p, batch, num_samples=200).per_task for p in (posterior, corrected)]
    exact = bm.scores(Linear(posterior.tasks, batch.support), batch).per_task
    for name in ("nll", "crps"):
        # the correction has an error of its own: of the scale about 2%, which costs 1e-3 of a nat
        lost = scores[1][name] - exact[name]
        assert lost.mean() < 0.03 + 4 * lost.std() / 20
        if factor != 1:
            assert scipy.stats.ttest_1samp(scores[0][name] - scores[1][name], 0.0, alternative="greater").pvalue < 1e-6


def test_the_temperature_is_one_over_the_factor():
    for factor in (0.5, 1.0, 2.0):
        (valid, batch), _ = pair(factor)
        found = bm.recalibrate(valid, batch)
        assert found.value == pytest.approx(1 / factor, rel=0.05)
        few = batch.tasks(slice(0, 100))
        sampled, closed = (
            bm.recalibrate(Linear(valid.tasks, few.support, factor, closed=c), few, num_samples=200)
            for c in (False, True)
        )
        # 200 draws know a scale to 5%, and the 100 tasks have draws of their own
        assert sampled.value == pytest.approx(closed.value, rel=0.03)


class Heavy(Linear):
    """Student-t forecasts with 3 degrees of freedom: each draw of the noise's precision gives a Normal."""

    def draws(self, num_samples, generator=None):
        generator = as_generator(generator, stream="draws")
        return Phi(torch.randn(num_samples, self.num_tasks, 3, generator=generator, dtype=F64).square().mean(-1))

    def _normal(self, shape, draws):
        return dist.Normal(torch.full(shape[1:], self.offset, dtype=F64), self.factor / draws.u.unsqueeze(-1).sqrt())

    def log_likelihood(self, observations, *, draws):
        return self._normal((1, *observations.y.shape), draws).log_prob(observations.y)

    def predict(self, x, num_samples=1000, *, draws=None, generator=None):
        draws = self.draws(num_samples, generator) if draws is None else draws
        z = torch.randn(len(draws.u), *self._x(x).shape[:2], generator=as_generator(generator), dtype=F64)
        return self.offset + z * self.factor / draws.u.unsqueeze(-1).sqrt()

    def predictive(self, x, *, joint=False):
        if joint or not self.closed:
            raise NoClosedFormError("hidden")
        loc = torch.full(self._x(x).shape[:2], self.offset, dtype=F64)
        return dist.StudentT(3.0, loc, self.factor * torch.ones_like(loc))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_of_a_heavy_tail_the_temperature_is_learned_on_the_closed_form_and_leaves_one(factor):
    family, batch = linear_tasks(600, seed=3)
    y = scipy.stats.t(3).rvs((600, 6), random_state=5)
    batch = replace(batch, query=batch.query.with_y(torch.as_tensor(y)))
    valid, new = batch.tasks(slice(0, 300)), batch.tasks(slice(300, None))
    wrong, target = (Heavy(family, part.support, factor) for part in (valid, new))
    correction = bm.recalibrate(wrong, valid, num_samples=8)
    # the information of 1800 points about log τ is 2 df / (df + 3) = 1 each, so that the error is 1 / √1800
    assert abs(math.log(correction.value * factor)) < 4 / math.sqrt(1800)
    hidden = bm.recalibrate(Heavy(family, valid.support, factor, closed=False), valid, num_samples=8)
    assert abs(math.log(hidden.value * factor)) > 4 / math.sqrt(1800), "control: 8 draws have no tail"
    after = correction(target).predictive(new.query.x)
    exact = dist.StudentT(
        3.0, torch.zeros(300, 6, dtype=F64), correction.value * factor * torch.ones(300, 6, dtype=F64)
    )
    torch.testing.assert_close(after.log_prob(new.query.y), exact.log_prob(new.query.y))
    torch.testing.assert_close(after.mean, exact.mean)
    torch.testing.assert_close(after.variance, exact.variance)


def test_a_joint_heavy_tail_is_stretched_as_a_whole():
    loc, root = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([[1.0, 0.0], [0.5, 0.7]], dtype=F64)
    joint = dist.MultivariateStudentT(torch.tensor(5.0, dtype=F64), loc, root)
    found = bm.diagnostics.corrections.Temperature(2.0, "real", 3).posterior_predictive(joint, True)
    y = torch.tensor([[0.3, 4.0], [1.0, 1.0]], dtype=F64)
    expected = dist.MultivariateStudentT(torch.tensor(5.0, dtype=F64), loc, 2 * root).log_prob(y)
    torch.testing.assert_close(found.log_prob(y), expected)


def test_each_draw_stays_with_its_phi():
    (valid, valid_batch), (posterior, batch) = pair(0.5, closed=False, tasks=50, new=10)
    correction = bm.recalibrate(valid, valid_batch, num_samples=100)
    draws = posterior.draws(200, 1)
    y = posterior.predict(batch.query.x, draws=draws, generator=2)
    expected = y.mean(0) + correction.value * (y - y.mean(0))
    torch.testing.assert_close(correction(posterior).predict(batch.query.x, draws=draws, generator=2), expected)
    # few draws are stretched about the mean of the forecast, not about their own
    one = Phi(draws.u[:1])
    y = posterior.predict(batch.query.x, draws=one, generator=2)
    found = correction(posterior).predict(batch.query.x, draws=one, generator=2)
    exact = Linear(posterior.tasks, batch.support, 0.5).predictive(batch.query)
    centre = (found - correction.value * y) / (1 - correction.value)
    assert ((centre - exact.mean) / exact.stddev).abs().max() < 4.5 / math.sqrt(200)
    assert (found - y).abs().min() > 0, "control: not as it was"


def test_conformal_forecasts_from_few_draws_cover_what_their_intervals_cover():
    (valid, valid_batch), (posterior, batch) = pair(1.0, closed=False, tasks=1000, new=1000)
    correction = bm.recalibrate(valid, valid_batch, "conformal", num_samples=30)
    low, high = correction.interval(posterior, batch.query, num_samples=30)
    inside = ((low <= batch.query.y) & (batch.query.y <= high)).double().mean(-1)
    found = bm.calibration(correction(posterior), batch, num_samples=30)
    # with evenly spread draws it is 1/30 more
    error = math.hypot(found.standard_errors["coverage_90"], inside.std().item() / math.sqrt(1000))
    assert abs(found["coverage_90"] - inside.mean().item()) < min(3 * error, 0.025)


def test_joint_forecasts_stay_joint():
    (valid, valid_batch), (posterior, batch) = pair(0.5)
    corrected = bm.recalibrate(valid, valid_batch)(posterior)
    exact = bm.scores(Linear(posterior.tasks, batch.support), batch)
    assert bm.scores(corrected, batch)["nll_joint"] == pytest.approx(exact["nll_joint"], abs=0.02)
    assert bm.scores(posterior, batch)["nll_joint"] > exact["nll_joint"] + 0.3, "control"


def test_isotonic_corrects_a_bias_and_a_temperature_does_not():
    (valid, valid_batch), (posterior, batch) = pair(1.0, shift=0.7)
    found = {how: bm.recalibrate(valid, valid_batch, how)(posterior) for how in HOW}
    assert bm.calibration(found["isotonic"], batch).finding == "calibrated"
    assert bm.calibration(found["temperature"], batch).finding != "calibrated"


def test_corrections_can_be_chained():
    (valid, valid_batch), (posterior, batch) = pair(0.5, closed=False, tasks=200, new=200)
    first = bm.recalibrate(valid, valid_batch, num_samples=200)
    second = bm.recalibrate(first(valid), valid_batch, "isotonic", num_samples=200)
    assert bm.calibration(second(first(posterior)), batch, num_samples=200).finding == "calibrated"
    with pytest.warns(UserWarning, match="outside all 200 draws of their forecasts, where 1.0% were expected"):
        alone = bm.recalibrate(valid, valid_batch, "isotonic", num_samples=200)(posterior)
    draws = posterior.draws(200, 1)
    before, after = (p.predict(batch.query.x, draws=draws, generator=2) for p in (posterior, alone))
    assert (after.amax(0) <= before.amax(0)).all(), "not beyond the draws, as documented"
    assert (second(first(posterior)).predict(batch.query.x, draws=draws, generator=2).amax(0) > before.amax(0)).any()


# -- densities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "draws"])
def test_the_density_is_that_of_the_draws(how, closed):
    """It integrates to one, and its distribution function is that of draws of y."""
    (valid, valid_batch), (posterior, batch) = pair(1.6 if how == "isotonic" else 0.6, closed, tasks=100, new=1)
    corrected = bm.recalibrate(valid, valid_batch, how, num_samples=300)(posterior)
    one = bm.Observations(batch.query.x[:, :1], batch.query.y[:, :1])
    draws = corrected.draws(2000, 3)
    y = corrected.predict(one, draws=draws, generator=4).flatten()
    loc, sd = y.mean(), y.std()
    grid = torch.linspace(-8, 8, 1500, dtype=F64) * sd + loc
    many = bm.Observations(one.x.expand(1, 1500, -1), grid.unsqueeze(0))
    density = corrected.log_likelihood(many, draws=draws).logsumexp(0).exp().squeeze(0) / 2000
    cdf = torch.cumulative_trapezoid(density, grid)
    # steps of the map in the grid; and 2000 draws know a density's tail to a percent or so
    assert cdf[-1].item() == pytest.approx(1.0, abs=0.02)
    share = (y.unsqueeze(-1) <= grid[1:]).double().mean(0)
    assert (share - cdf).abs().max() < 0.05  # 1.6 / √2000, the 99% point of Kolmogorov's statistic, and the above


def test_a_closed_form_temperature_is_that_of_the_draws():
    (valid, valid_batch), (posterior, batch) = pair(0.5, tasks=50, new=20)
    correction = bm.recalibrate(valid, valid_batch)
    closed = bm.scores(correction(posterior), batch)
    posterior.closed = False
    sampled = bm.scores(correction(posterior), batch, num_samples=8000)
    assert (closed.num_samples, sampled.num_samples) == (0, 8000)
    for name in ("nll", "nll_joint", "crps"):
        torch.testing.assert_close(sampled.per_task[name], closed.per_task[name], atol=0.03, rtol=0.02, msg=name)
    assert sampled["coverage_90"] == pytest.approx(closed["coverage_90"], abs=2.01 / 120)


# -- conformal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_conformal_coverage_holds_over_2000_new_tasks(level):
    """2000 times: 19 ragged validation tasks, one new task, one point of it. All posteriors far too narrow."""
    repetitions, tasks = 2000, 19
    family, batch = linear_tasks(repetitions * (tasks + 1), seed=9, shots=2, query=4)
    closed = Linear(family, batch.support, 0.3).predictive(batch.query)
    shape = (repetitions, tasks + 1, 4)
    y, mean, scale = (v.reshape(shape) for v in (batch.query.y, closed.mean, closed.stddev))
    counts = torch.randint(1, 5, shape[:2], generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4) < counts.unsqueeze(-1)
    covered, naive = 0, 0
    for i in range(repetitions):
        query = bm.Observations(torch.zeros(tasks, 4, 1), y[i, 1:], mask[i, 1:])
        found = recalibration._conformal(query, mask[i, 1:], mean[i, 1:], scale[i, 1:], 10)
        score = ((y[i, 0, 0] - mean[i, 0, 0]) / scale[i, 0, 0]).abs().item()
        covered += score <= found.factor(level)
        naive += score <= scipy.stats.norm.ppf((1 + level) / 2)
    assert scipy.stats.binomtest(covered, repetitions, level, "less").pvalue > 0.01
    # at most 1 / (K + 1) of the probability is given away, and the largest share of one point
    assert scipy.stats.binomtest(covered, repetitions, level + 2 / (tasks + 1), "greater").pvalue > 0.01
    assert scipy.stats.binomtest(naive, repetitions, level, "less").pvalue < 1e-12, "control"


def test_conformal_factor_by_hand():
    y = torch.tensor([[1.0, 2.0], [3.0, 9.0]], dtype=F64)
    mask = torch.tensor([[True, True], [True, False]])
    query = bm.Observations(torch.zeros(2, 2, 1), y, mask)
    found = recalibration._conformal(query, mask, torch.zeros_like(y), torch.ones_like(y), 10)
    torch.testing.assert_close(found.weights, torch.tensor([1 / 6, 1 / 6, 1 / 3], dtype=F64))
    assert [found.factor(p) for p in (0.1, 1 / 6, 0.3, 0.34, 2 / 3)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert found.factor(0.7) == math.inf


def test_conformal_interval_of_a_posterior():
    (valid, valid_batch), (posterior, batch) = pair(0.5, tasks=100, new=5)
    found = bm.recalibrate(valid, valid_batch, "conformal")
    low, high = found.interval(posterior, batch.query, 0.9)
    closed = posterior.predictive(batch.query)
    torch.testing.assert_close(high - closed.mean, found.factor(0.9) * closed.stddev)
    torch.testing.assert_close(closed.mean - low, found.factor(0.9) * closed.stddev)
    posterior.closed = False
    again = found.interval(posterior, batch.query, 0.9, num_samples=20_000)
    torch.testing.assert_close(again[0], low, atol=0.05, rtol=0.05)
    # the predictive that goes with it has the same interval, up to the Normal between its levels
    wrapped = bm.scores(found(posterior), batch, num_samples=20_000)
    assert wrapped["width_90"] == pytest.approx((high - low).mean().item(), rel=0.05)
    assert "mean ±" in str(found)


# -- classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2.0, 1.0, 0.5])
def test_temperature_of_classes(factor):
    batch, logits = label_tasks(600, seed=5)
    parts = [slice(0, 300), slice(300, None)]
    valid, new = (Labels(batch.tasks(i).support, logits[i], factor) for i in parts)
    found = bm.recalibrate(valid, batch.tasks(parts[0]), num_samples=3)
    assert found.value == pytest.approx(factor, rel=0.1)
    corrected, test = found(new), batch.tasks(parts[1])
    p = corrected.class_probabilities(test.query, 2)
    torch.testing.assert_close(p, (logits[parts[1]] * factor / found.value).softmax(-1))
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))
    assert bm.calibration(corrected, test, num_samples=3).finding == "calibrated"
    scores = bm.scores(corrected, test, num_samples=3)
    log_p = p.gather(-1, test.query.y.long().unsqueeze(-1)).squeeze(-1).log()
    assert scores["nll"] == pytest.approx(-log_p.mean().item())
    if factor != 1:
        assert bm.calibration(new, test).finding != "calibrated"
        assert scores["nll"] < bm.scores(new, test, num_samples=3)["nll"] - 0.01


# -- everything else takes it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_a_real_posterior_with_scores_tree_and_picture(how, tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model = bm.NeuralTaskModel(network, bm.Gaussian(2.0), "normal", task_modules="head")
    batch = bm.tasks.Sinusoid().sample(30, support=5, query=5, generator=0)
    for method in (bm.BayesianLastLayer(model), bm.ABML(model, inner_steps=2, inner_lr=0.1)):
        posterior = method.adapt(batch.support)
        corrected = bm.recalibrate(posterior, batch, how, num_samples=200)(posterior)
        assert bm.scores(corrected, batch, num_samples=200)["nll"] < bm.scores(posterior, batch)["nll"]
        tree = bm.to_datatree(corrected, batch, num_samples=20)
        assert tree["predictions"]["y"].shape == (1, 20, 150)
        assert "log_likelihood" not in tree.children
        with pytest.raises(UnsupportedError, match="recalibrated"):
            bm.loo(corrected, batch)
        assert tree["prior_predictive"]["y"].isnull().sum() == 0
        bm.plot_forecast(corrected, batch, max_panels=2, num_samples=50, path=tmp_path / "a.png")
        assert corrected.predict(batch.query.x, 7).dtype == torch.float32


def test_what_is_refused_says_so(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model = bm.NeuralTaskModel(network, bm.Gaussian(2.0), "normal", task_modules="head")
    batch = bm.tasks.Sinusoid().sample(30, support=5, query=5, generator=0)
    posterior = bm.BayesianLastLayer(model).adapt(batch.support)
    corrected = bm.recalibrate(posterior, batch)(posterior)
    for name in ("log_prob", "log_joint", "save", "log_evidence", "u_distribution"):
        assert hasattr(posterior, name)
        assert not hasattr(corrected, name)
        with pytest.raises(UnsupportedError, match=rf"has no {name}: .* Take \.posterior\.{name}"):
            getattr(corrected, name)
    with pytest.raises(UnsupportedError, match="no Pyro guide"):
        corrected(batch.support)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = corrected.nonsense
    for refused in (bm.loo, bm.psis):
        with pytest.raises(UnsupportedError):
            refused(corrected, batch)
    with pytest.raises(UnsupportedError, match="no evidence"):
        bm.surprise(corrected)
    again = copy.deepcopy(corrected)
    draws = posterior.draws(3, 0)
    torch.testing.assert_close(
        again.log_likelihood(batch.query, draws=draws), corrected.log_likelihood(batch.query, draws=draws)
    )


def test_raw_units_and_several_outputs():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 5, 1, generator=generator, dtype=F64), torch.randn(40, 5, 2, generator=generator, dtype=F64)
    batch = bm.TaskBatch(bm.Observations(x, y), bm.Observations(x, y))

    class Two(Labels):
        target_kind = "real"

        def predictive(self, x, *, joint=False):
            return dist.Normal(torch.zeros(40, x.shots, 2, dtype=F64), 0.5).to_event(1)

    posterior = Two(batch.support, torch.zeros(40, 5, 2))
    found = bm.recalibrate(posterior, batch)
    assert found.value == pytest.approx(2 * y.square().mean().sqrt().item())
    predictive = found(posterior).predictive(batch.query)
    assert predictive.event_shape == (2,)
    torch.testing.assert_close(predictive.stddev, torch.full((40, 5, 2), 0.5 * found.value, dtype=F64))
    with pytest.raises(UnsupportedError, match="one output"):
        bm.recalibrate(posterior, batch, "isotonic")


def test_interpolation_and_its_inverse():
    x, y = torch.tensor([0.0, 1.0, 3.0], dtype=F64), torch.tensor([0.0, 2.0, 3.0], dtype=F64)
    value = torch.tensor([-1.0, 0.5, 1.0, 2.0, 5.0], dtype=F64)
    found, slope = interpolate(value, x, y)
    assert found.tolist() == [-2.0, 1.0, 2.0, 2.5, 4.0]
    assert slope.tolist() == [2.0, 2.0, 0.5, 0.5, 0.5]
    torch.testing.assert_close(interpolate(found, y, x)[0], value)


# -- bad input ----------------------------------------------------------------------------------------------------


def test_errors_are_typed():
    family, batch = linear_tasks(6)
    posterior = Linear(family, batch.support)
    with pytest.raises(OptionError, match="how='platt'"):
        bm.recalibrate(posterior, batch, "platt")
    with pytest.raises(OptionError, match="num_bins=1"):
        bm.recalibrate(posterior, batch, "isotonic", num_bins=1)
    with pytest.raises(DataError, match="at least 2 tasks"):
        bm.recalibrate(Linear(family, batch.tasks([0]).support), batch.tasks([0]))
    with pytest.raises(DataError, match="y=None"):
        bm.recalibrate(posterior, replace(batch, query=batch.query.with_y(None)))
    with pytest.raises(ShapeError, match="5 tasks"):
        bm.recalibrate(posterior, batch.tasks([0, 1, 2, 3, 4]))
    still = Linear(family, batch.support, 1e-200)
    still.predictive = lambda x, joint=False: dist.Normal(torch.zeros(6, 6), torch.zeros(6, 6), validate_args=False)
    with pytest.raises(DataError, match="no width"):
        bm.recalibrate(still, batch)
    right = replace(batch, query=batch.query.with_y(posterior.predictive(batch.query).mean))
    with pytest.raises(DataError, match="exactly right"):
        bm.recalibrate(posterior, right, "conformal")
    conformal = bm.recalibrate(posterior, batch, "conformal")
    with pytest.raises(OptionError, match="level=1"):
        conformal.interval(posterior, batch.query, 1.0)
    with pytest.raises(NoClosedFormError):
        conformal(posterior).predictive(batch.query)
    labels, logits = label_tasks(6)
    of_classes = Labels(labels.support, logits)
    with pytest.raises(UnsupportedError, match="'class'"):
        bm.recalibrate(of_classes, labels, "isotonic")
    for found in (conformal, bm.recalibrate(posterior, batch)):
        with pytest.raises(UnsupportedError, match="'class'"):
            found(of_classes)
    counts = Counts(batch.support, torch.ones(6, 6, dtype=F64), None)
    for found in (conformal, bm.recalibrate(posterior, batch), bm.recalibrate(posterior, batch, "isotonic")):
        with pytest.raises(UnsupportedError, match="kind 'real'; the posterior's are 'count'"):
            found(counts)
