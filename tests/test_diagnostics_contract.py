"""One contract of all diagnostics: bad input is refused in words, poor input answered rightly, truth is told."""

import math
from dataclasses import replace

import arviz_stats
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from forecast_cases import FACTORS, Counts, Labels, Linear, Phi, label_tasks, linear_tasks

import bayesmeta as bm
from bayesmeta.errors import (
    BayesMetaError,
    DataError,
    EmptyTaskError,
    NonFiniteDataError,
    OptionError,
    ShapeError,
    UnsupportedError,
)

F64 = torch.float64
FAMILY, BATCH = linear_tasks(12)


class Full(Linear):
    """The exact posterior with all densities; distributions check themselves, as those of the methods do."""

    def __init__(self, support, factor=1.0, **options):
        super().__init__(FAMILY, support, factor, **options)

    def log_prob(self, u):
        return dist.MultivariateNormal(self.mean, self.covariance).log_prob(u)

    def log_prior(self, draws, *, jacobian=True):
        return dist.MultivariateNormal(FAMILY.mean, FAMILY.covariance, validate_args=False).log_prob(draws.u)

    def log_theta(self, draws, *, jacobian=True):
        return torch.zeros(len(draws.u), dtype=F64)


class Particle(Full):
    """One draw, and nothing else."""

    num_draws = 1
    log_prob = None

    def __init__(self, support):
        super().__init__(support, closed=False)
        self.only = super().draws(1, 0).u

    def draws(self, num_samples, generator=None):
        return Phi(self.only.expand(num_samples, -1, -1))


class Constant(Full):
    """The same number at every point of every task, for certain."""

    def __init__(self, support):
        super().__init__(support, closed=False)

    def predict(self, x, num_samples=1000, *, draws=None, generator=None):
        count = num_samples if draws is None else len(draws.u)
        return torch.full((count, *x.x.shape[:2]), 0.3, dtype=F64)

    def log_likelihood(self, observations, *, draws):
        value = torch.where(observations.y == 0.3, 0.0, -math.inf).to(F64)
        return value.expand(len(draws.u), *value.shape)


def broken(value, closed):
    """Of task 2 the mean is no number."""
    posterior = Full(BATCH.support, closed=closed)
    posterior.mean = posterior.mean.clone()
    posterior.mean[2] = value
    return posterior


class Of:
    """A method that adapts to anything in one way."""

    def __init__(self, posterior):
        self.posterior = posterior

    def adapt(self, support, *, generator=None):
        return self.posterior


# -- the table ----------------------------------------------------------------------------------------------------

#: By name: takes a posterior and a batch. "query" diagnostics judge targets of the query, "inputs" look at its x alone,
#: "support" ones at what was conditioned on.
QUERY = {
    "scores": lambda p, b: bm.scores(p, b, num_samples=50, energy=True),
    "calibration": lambda p, b: bm.calibration(p, b, num_samples=50),
    "temperature": lambda p, b: bm.recalibrate(p, b, "temperature", num_samples=50),
    "isotonic": lambda p, b: bm.recalibrate(p, b, "isotonic", num_samples=50),
    "conformal": lambda p, b: bm.recalibrate(p, b, "conformal", num_samples=50),
    "compare": lambda p, b: bm.compare({"one": p, "two": p}, b, num_samples=50),
    "write_report": lambda p, b: bm.write_report("never.html", p, b, num_samples=50),
    "learning_curve": lambda p, b: bm.learning_curve(
        Of(p).adapt, b, BATCH.query, steps=1, repeats=1, num_samples=20, num_outcomes=10
    ),
}
INPUTS = {
    "interval": lambda p, b: CONFORMAL.interval(p, b.query, num_samples=50),
    "decompose": lambda p, b: bm.decompose(p, b.query, num_samples=20, num_outcomes=10),
    "choose": lambda p, b: bm.choose(p, b.query, num_outcomes=10, real=b.real_tasks()),
    "choose_variance": lambda p, b: bm.choose(p, b.query, criterion="variance", real=b.real_tasks()),
    "choose_by_draws": lambda p, b: bm.choose(
        p, b.query, exact=False, num_samples=20, num_outcomes=10, real=b.real_tasks()
    ),
    "surprise_of_points": lambda p, b: bm.surprise(p, b.query, num_samples=50, real=b.real_tasks()),
}
SUPPORT = {
    "psis": lambda p, b: bm.psis(p, b, num_samples=200),
    "sensitivity": lambda p, b: bm.sensitivity(p, b, num_samples=200),
    "loo": lambda p, b: bm.loo(p, b, num_samples=200),
    "to_datatree": lambda p, b: bm.to_datatree(p, b, num_samples=50),
    "plot_forecast": lambda p, b: bm.plot_forecast(p, b, num_samples=50, max_panels=1),
}
ALL = QUERY | INPUTS | SUPPORT
CONFORMAL = bm.recalibrate(Full(BATCH.support), BATCH, "conformal")


def refused(diagnostic, posterior, batch, error, *words):
    """It must raise this error, and say these words."""
    with pytest.raises(error) as caught:
        ALL[diagnostic](posterior, batch)
    assert isinstance(caught.value, BayesMetaError)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.rstrip()[-1] in ".)"  # sentences, not a number


def two_outputs(observations):
    return replace(observations, y=torch.stack([observations.y] * 2, -1))


def wider(observations):
    return replace(observations, x=torch.cat([observations.x] * 2, -1))


def both(function):
    return bm.TaskBatch(function(BATCH.support), function(BATCH.query))


# -- refused by all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagnostic", ALL)
def test_other_shapes(diagnostic):
    posterior = Full(BATCH.support)
    refused(diagnostic, posterior, both(wider), ShapeError, "4 features", "adapted to 2", "same columns")
    refused(diagnostic, posterior, BATCH.tasks([0, 1]), ShapeError, "2 tasks", "adapted to 12", "Give the batch")
    error = (ShapeError, UnsupportedError) if diagnostic in ("isotonic", "conformal") else ShapeError
    refused(diagnostic, posterior, both(two_outputs), error, "y", "output")


@pytest.mark.parametrize("diagnostic", sorted(set(QUERY | SUPPORT) - {"learning_curve"}))
def test_a_batch_from_another_table(diagnostic):
    posterior = Full(BATCH.support)
    _, other = linear_tasks(12, seed=5)
    units = bm.Standardizer(*(torch.full(s, v, dtype=F64) for s, v in (((2,), 1.0), ((2,), 2.0), ((), 1.0), ((), 3.0))))
    scaled = bm.TaskBatch(units.apply(BATCH.support), units.apply(BATCH.query), standardizer=units)
    for batch in (other, BATCH.tasks(list(range(11, -1, -1))), scaled):
        refused(
            diagnostic, posterior, batch, DataError, "other tasks", "another order", "standardizer", "Give the batch"
        )


def test_the_same_tasks_with_more_or_less_support_are_taken():
    fewer = bm.Observations(BATCH.support.x[:, :2], BATCH.support.y[:, :2])
    more = bm.union(BATCH.support, BATCH.query)
    expected = bm.scores(Full(BATCH.support), BATCH)["nll"]
    for support in (fewer, more, replace(BATCH.support, mask=torch.zeros(12, 4, dtype=torch.bool)),
                    BATCH.support.to(dtype=torch.float32).to(dtype=F64)):  # fmt: skip
        assert bm.scores(Full(BATCH.support), replace(BATCH, support=support))["nll"] == expected


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "draws"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("diagnostic", ALL)
def test_predictions_that_are_not_finite(diagnostic, value, closed):
    nan_draws = diagnostic == "to_datatree" and math.isnan(value)
    words = ("draws of phi are NaN", "Look at the losses") if nan_draws else ("not finite", "diverged")
    refused(diagnostic, broken(value, closed), BATCH, NonFiniteDataError, *words)


@pytest.mark.parametrize("diagnostic", sorted(set(ALL) - {"interval", "decompose"}))
def test_a_batch_of_padding(diagnostic):
    padding = replace(BATCH, task_id=torch.full((12,), -1))
    refused(diagnostic, Full(BATCH.support), padding, (EmptyTaskError, DataError))


@pytest.mark.parametrize("diagnostic", sorted(set(QUERY | INPUTS) - {"interval", "learning_curve"}))
def test_an_empty_query(diagnostic):
    none = replace(BATCH, query=bm.Observations(BATCH.query.x[:, :0], BATCH.query.y[:, :0]))
    masked = replace(BATCH, query=replace(BATCH.query, mask=torch.zeros(12, 6, dtype=torch.bool)))
    for batch in (none, masked):
        refused(diagnostic, Full(BATCH.support), batch, EmptyTaskError)


@pytest.mark.parametrize("diagnostic", sorted(set(QUERY) | {"surprise_of_points", "psis", "sensitivity", "loo"}))
def test_no_targets(diagnostic):
    posterior = Full(BATCH.support)
    posterior.support = BATCH.support.with_y(None)
    refused(diagnostic, posterior, both(lambda o: o.with_y(None)), DataError, "targets")


@pytest.mark.parametrize("diagnostic", QUERY | SUPPORT)
def test_what_is_no_batch(diagnostic):
    if diagnostic in ("loo", "to_datatree"):  # observations are taken for the support
        refused(diagnostic, Full(BATCH.support), BATCH.query, DataError, "Give the batch whose support")
        refused(diagnostic, Full(BATCH.support), BATCH.support.x, OptionError, "TaskBatch", "Tensor")
        return
    refused(diagnostic, Full(BATCH.support), BATCH.query, OptionError, "TaskBatch", "Observations")


def test_data_that_are_not_finite():
    nan = replace(BATCH, query=BATCH.query.with_y(torch.full((12, 6), math.nan, dtype=F64)))
    for name in (*QUERY, "surprise_of_points"):
        refused(name, Full(BATCH.support), nan, NonFiniteDataError, "task 0", "shot 0")


# -- one draw -----------------------------------------------------------------------------------------------------


ONE_DRAW = ("scores", "calibration", "recalibrate", "compare", "to_datatree", "decompose", "choose", "surprise", "psis")


@pytest.mark.parametrize("diagnostic", [*ONE_DRAW, "sensitivity", "plot_forecast", "contraction"])
def test_one_draw_is_too_few_to_ask_for(diagnostic):
    p, one = Full(BATCH.support, closed=False), {"num_samples": 1}
    calls = {
        "compare": lambda: bm.compare({"one": p, "two": p}, BATCH, **one),
        "decompose": lambda: bm.decompose(p, BATCH.query, **one),
        "choose": lambda: bm.choose(p, BATCH.query, **one),
        "surprise": lambda: bm.surprise(p, **one),
        "contraction": lambda: bm.contraction(Full, BATCH.support, (1,), **one),
    }
    with pytest.raises(OptionError, match="1"):
        calls.get(diagnostic, lambda: getattr(bm, diagnostic)(p, BATCH, **one))()


def test_what_one_particle_can_and_cannot():
    particle = Particle(BATCH.support)
    for name in ("psis", "sensitivity", "loo"):
        refused(name, particle, BATCH, (OptionError, UnsupportedError), "1 draws", "at least 100")
    with pytest.raises(OptionError, match="made of 1 draws"):
        bm.sbc_method(Of(particle), BATCH.support)
    # its forecast is the likelihood at its φ: the log score is exact, and nothing is epistemic
    loc = torch.einsum("tsd,td->ts", BATCH.query.x, particle.only[0])
    log_p = dist.Normal(loc, 0.4).log_prob(BATCH.query.y)
    found = bm.scores(particle, BATCH, num_samples=50)
    assert found["nll"] == pytest.approx(-float(log_p.mean()))
    assert found["nll_joint"] == pytest.approx(found["nll"])
    assert (bm.decompose(particle, BATCH.query).mutual_information == 0).all()
    assert bm.choose(particle, BATCH.query).gains.abs().max() < 1e-12


# -- one task -----------------------------------------------------------------------------------------------------


def test_one_task_has_values_and_no_standard_errors():
    one = BATCH.tasks([0])
    posterior, whole = Full(one.support), bm.scores(Full(BATCH.support), BATCH)
    found = bm.scores(posterior, one)
    for name in ("nll", "nll_joint", "crps", "interval_90"):
        assert found[name] == pytest.approx(float(whole.per_task[name][0]))
        assert math.isnan(found.standard_errors[name])
    result = bm.calibration(posterior, one)
    assert result.finding == "unknown"
    assert "too few tasks" in result.verdict
    for how in ("temperature", "isotonic", "conformal"):
        refused(how, posterior, one, DataError, "at least 2 tasks", "has 1")
    refused("compare", posterior, one, EmptyTaskError, "two tasks")
    with pytest.raises(EmptyTaskError, match="at least two tasks"):
        bm.loo_kfold(one, lambda _: Of(posterior), k=2)
    with pytest.raises(DataError, match="Simulate more"):
        bm.sbc_method(Of(posterior), one.support)
    assert bm.psis(posterior, one, num_samples=200).names == ("0",)
    assert len(bm.to_datatree(posterior, one, num_samples=20)["posterior"]["task"]) == 1
    area = bm.roc(bm.surprise(posterior, one.query), bm.surprise(posterior, one.query))
    assert area.auroc == 0.5
    assert math.isnan(area.standard_error)


# -- constant predictions -----------------------------------------------------------------------------------------


def test_constant_predictions():
    constant = Constant(BATCH.support)
    refused("scores", constant, BATCH, NonFiniteDataError, "infinite log score", "outside the support")
    for how in ("temperature", "isotonic", "conformal"):
        refused(how, constant, BATCH, DataError, "no width", "noise")
    for name in ("loo", "sensitivity"):
        refused(name, constant, BATCH, NonFiniteDataError, "not finite")
    assert bm.calibration(constant, BATCH, num_samples=50).finding == "over-confident"
    assert (bm.decompose(constant, BATCH.query, num_samples=20).variance == 0).all()
    found = bm.surprise(constant, num_samples=50)  # impossible: no draw has any weight
    assert (found.scores == math.inf).all()
    assert (found.effective_draws == 0).all()
    assert not found.errors.isnan().any()
    assert set(bm.psis(constant, BATCH, num_samples=200).findings) == {"bad"}
    low, high = CONFORMAL.interval(constant, BATCH.query, num_samples=50)
    assert (low == high).all()


def test_the_score_of_a_certain_normal_is_the_distance():
    y = torch.tensor([-1.0, 0.3, 2.0], dtype=F64)
    torch.testing.assert_close(bm.metrics.crps_normal(torch.tensor(0.3, dtype=F64), torch.zeros(3, dtype=F64), y),
                               (y - 0.3).abs())  # fmt: skip
    near = bm.metrics.crps_normal(torch.tensor(0.3, dtype=F64), torch.full((3,), 1e-9, dtype=F64), y)
    torch.testing.assert_close(near, (y - 0.3).abs(), atol=1e-8, rtol=0)


# -- other takers -------------------------------------------------------------------------------------------------


def test_metrics_of_other_shapes_and_no_classes():
    two, three, m = torch.ones(2), torch.ones(3), bm.metrics
    for call in (
        lambda: m.log_score_normal(two, two, three),
        lambda: m.dawid_sebastiani(two, two, three),
        lambda: m.dawid_sebastiani_joint(two, torch.eye(2), three),
        lambda: m.crps_normal(two, two, three),
        lambda: m.crps_normal_mixture(torch.ones(4, 2), torch.ones(4, 2), three),
        lambda: m.crps_ensemble(torch.ones(4, 2), three),
        lambda: m.energy_score(torch.ones(4, 2), three),
        lambda: m.pinball(two, three, 0.5),
        lambda: m.interval_score(two, two, three),
        lambda: m.sharpness(two, three),
        lambda: m.brier_score(torch.ones(3, 2), two),
        lambda: m.brier_score_binary(two, three),
        lambda: m.log_score(torch.ones(4, 2), three),
    ):
        with pytest.raises(ShapeError, match=r"has shape .*expected|have shape .*expected"):
            call()
    for y in ([0.0, 2.0], [-1.0, 0.0], [0.5, 0.0], [math.nan, 0.0]):
        with pytest.raises(DataError, match="classes 0 to 1"):
            m.brier_score(torch.full((2, 2), 0.5), torch.tensor(y))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_simulation_and_contraction_of_what_is_not_finite(value):
    posterior = broken(value, True)
    with pytest.raises(NonFiniteDataError, match="task 2"):
        bm.contraction(Of(posterior).adapt, BATCH.support, (1, 2))
    with pytest.raises(NonFiniteDataError, match="diverged"):
        bm.sbc_method(Of(posterior), BATCH.support, num_draws=15)
    with pytest.raises(NonFiniteDataError, match="diverged"):
        bm.sbc(
            lambda g: ({"phi": FAMILY.mean.expand(12, 2)}, None), Of(posterior).adapt, num_simulations=1, num_draws=15
        )
    with pytest.raises(NonFiniteDataError, match="not finite"):
        bm.surprise(posterior)
    with pytest.raises(NonFiniteDataError, match="diverged"):
        bm.loo_kfold(BATCH.tasks([0, 2, 4, 6]), lambda _: Of(Diverged()), k=2)
    draws = torch.randn(9, 5, 2, generator=torch.Generator().manual_seed(0))
    draws[0, 0, 0] = value
    with pytest.raises(NonFiniteDataError, match="diverged"):
        bm.tarp(draws, torch.zeros(5, 2))


class Diverged(Full):
    """The posterior of whatever two tasks, not a number."""

    num_tasks = 2

    def __init__(self):
        super().__init__(BATCH.tasks([0, 4]).support)
        self.support = replace(self.support, mask=torch.zeros(2, 4, dtype=torch.bool))  # of whichever tasks
        self.mean = self.mean * math.nan


def test_sets_of_classes_are_of_the_tasks_that_were_adapted_to():
    batch, logits = label_tasks(6)
    sets = bm.recalibrate(Labels(batch.support, logits), batch, "conformal")
    with pytest.raises(ShapeError, match="2 tasks"):
        sets.sets(Labels(batch.support, logits), batch.query.tasks([0, 1]))
    with pytest.raises(NonFiniteDataError, match="task 3"):
        sets.sets(Labels(batch.support, logits.index_fill(0, torch.tensor(3), math.nan)), batch.query)


# -- advice -------------------------------------------------------------------------------------------------------


def test_of_a_recalibrated_posterior_the_right_reason_is_given():
    posterior = bm.recalibrate(Full(BATCH.support), BATCH)(Full(BATCH.support))
    for name in ("psis", "sensitivity"):
        refused(name, posterior, BATCH, UnsupportedError, "recalibrated posterior has no", "Take its .posterior")
        ALL[name](posterior.posterior, BATCH)


def test_advice_is_of_the_kind_of_the_targets():
    rate = torch.full((40, 6), 5.0, dtype=F64)
    x = torch.arange(6, dtype=F64).reshape(1, 6, 1).expand(40, 6, 1)
    y = torch.poisson(4 * rate * torch.rand(40, 1, generator=torch.Generator().manual_seed(0), dtype=F64))
    batch = bm.TaskBatch(bm.Observations(x, y), bm.Observations(x, y))
    result = bm.calibration(Counts(batch.support, rate, torch.poisson), batch, num_samples=100)
    assert result.finding == "over-confident"
    assert "NegativeBinomial with learn_concentration=True" in result.verdict
    assert "noise scale" not in result.verdict
    labels, logits = label_tasks(100, seed=1)
    verdict = bm.calibration(Labels(labels.support, logits, 4.0), labels).verdict
    assert "over-confident" in verdict
    assert not any(word in verdict for word in ("noise scale", "NegativeBinomial", "StudentT"))
    tasks, real = linear_tasks(100)
    assert "noise scale" in bm.calibration(Linear(tasks, real.support, 0.3), real).verdict


# -- three posteriors ---------------------------------------------------------------------------------------------


def better(name, ours, theirs):
    """One-sided p-value of the paired differences over tasks."""
    test = scipy.stats.ttest_rel(theirs.per_task[name].numpy(), ours.per_task[name].numpy(), alternative="greater")
    return float(test.pvalue)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "draws"])
def test_every_score_is_best_for_the_exact_posterior(closed):
    tasks, batch = linear_tasks(500, seed=11)
    exact, *others = (
        bm.scores(Linear(tasks, batch.support, f, closed=closed), batch, energy=True, num_samples=400) for f in FACTORS
    )
    for name in ("nll", "nll_joint", "crps", "energy", "interval_90"):
        for other in others:
            assert better(name, exact, other) < 1e-6, name
            assert better(name, other, exact) > 0.99, name
    twin = bm.scores(Linear(tasks, batch.support, closed=closed), batch, energy=True, num_samples=400)
    assert all(twin[name] == exact[name] for name in ("nll", "crps"))  # the control: no difference to find


def test_every_score_of_classes_is_best_for_the_exact_probabilities():
    batch, logits = label_tasks(500, seed=12)
    exact, *others = (bm.scores(Labels(batch.support, logits, f), batch) for f in (1.0, 2.0, 0.5))
    for name in ("nll", "nll_joint", "brier"):
        assert all(better(name, exact, other) < 1e-6 for other in others), name
    # the most probable class is the same at any sharpness
    assert {other["accuracy"] for other in others} == {exact["accuracy"]}


def test_every_measure_of_calibration_names_the_three():
    tasks, batch = linear_tasks(500, seed=13)
    exact, narrow, wide = (bm.calibration(Linear(tasks, batch.support, f), batch) for f in FACTORS)
    assert [r.finding for r in (exact, narrow, wide)] == ["calibrated", "over-confident", "under-confident"]
    assert exact["calibration_error"] < 3 * exact["calibration_noise"]
    for result, sign in ((narrow, 1), (wide, -1)):
        assert result["calibration_error"] > 3 * result["calibration_noise"]
        assert sign * result["dispersion"] > 0
        assert result["p_dispersion"] < 1e-6
        # each level of the curve on its own side, each task alike
        z = (result.levels - result.coverage) / result.coverage_errors
        assert (scipy.stats.norm.sf((sign * z).numpy())[1:] < 1e-3).all()
    z = (exact.coverage - exact.levels) / exact.coverage_errors
    assert z.abs().max() < scipy.stats.norm.isf(0.0005 / len(z))


def test_ece_and_mce_name_the_three():
    batch, logits = label_tasks(500, seed=14)
    exact, narrow, wide = (bm.calibration(Labels(batch.support, logits, f), batch) for f in (1.0, 2.0, 0.5))
    assert [r.finding for r in (exact, narrow, wide)] == ["calibrated", "over-confident", "under-confident"]
    for result, sign in ((narrow, 1), (wide, -1)):
        assert sign * result["gap"] > 0
        assert result["p_gap"] < 1e-6
        for name in ("ece", "ece_adaptive", "mce_adaptive"):
            assert result[name] > 2 * exact[name], name


def test_leave_one_out_is_that_of_the_exact_posterior():
    """What a good posterior gets from ``loo``: log p(y_i | rest), by the closed form of the family."""
    tasks, batch = linear_tasks(3, seed=2, shots=12)
    posterior = Full(batch.support)
    found = bm.loo(posterior, batch, num_samples=4000, pointwise=True)
    assert isinstance(found, arviz_stats.ELPDData)
    expected = 0.0
    for i in range(12):
        keep = [j for j in range(12) if j != i]
        rest = bm.Observations(batch.support.x[:, keep], batch.support.y[:, keep])
        one = bm.Observations(batch.support.x[:, i : i + 1], batch.support.y[:, i : i + 1])
        expected += float(Linear(tasks, rest).predictive(one).log_prob(one.y).sum())
    assert found.elpd == pytest.approx(expected, abs=0.3)
