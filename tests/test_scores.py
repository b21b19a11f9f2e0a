"""Scores against known truths: the exact linear-Gaussian predictive is best, and calibrated; others are not."""

import math
from dataclasses import replace

import pyro.distributions as dist
import pytest
import scoringrules
import torch

from bayesmeta.adapt.last_layer import BayesianLastLayer
from bayesmeta.adapt.maml import MAML
from bayesmeta.data import Observations, Standardizer, TaskBatch, pad_shots
from bayesmeta.diagnostics import forecasts
from bayesmeta.diagnostics.metrics import crps_ensemble, crps_normal, energy_score
from bayesmeta.diagnostics.scores import SCORES, scores
from bayesmeta.errors import (
    DataError,
    EmptyTaskError,
    NoClosedFormError,
    NonFiniteDataError,
    OptionError,
    ShapeError,
)
from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.tasks.linear import LinearGaussian

F64 = torch.float64


def oracle_tasks(num_tasks, query=6, seed=0):
    mean = torch.tensor([0.5, -1.0], dtype=F64)
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64)
    tasks = LinearGaussian(mean, covariance, 0.4)
    return tasks, tasks.sample(num_tasks, support=4, query=query, generator=seed)


class Base:
    is_point = False
    target_kind = "real"

    def __init__(self, support):
        self.support, self.num_tasks = support, support.num_tasks


class Oracle(Base):
    """The exact predictive, its standard deviations multiplied by ``factor``."""

    def __init__(self, tasks, support, factor=1.0):
        super().__init__(support)
        self.tasks, self.factor = tasks, factor

    def predictive(self, x, *, joint=False):
        exact = self.tasks.predictive(self.support, x.x)
        if joint:
            return dist.MultivariateNormal(exact.mean, exact.covariance_matrix * self.factor**2)
        return dist.Normal(exact.mean, exact.stddev * self.factor)


class Hidden:
    """A posterior whose closed form is hidden."""

    def __init__(self, posterior):
        self._posterior = posterior

    def __getattr__(self, name):
        return getattr(self._posterior, name)

    def predictive(self, x, *, joint=False):
        raise NoClosedFormError("hidden")


class Fixed(Base):
    """A given predictive distribution, whatever the inputs."""

    def __init__(self, support, marginal, joint=None):
        super().__init__(support)
        self.marginal, self.joint = marginal, joint or marginal.to_event(1)

    def predictive(self, x, *, joint=False):
        return self.joint if joint else self.marginal

    def draws(self, num_samples, generator=None):
        return num_samples

    def predict(self, x, num_samples=1000, *, draws=None, generator=None):
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self.marginal.sample((num_samples,))


def last_layer(batch):
    network = torch.nn.Sequential(torch.nn.Linear(batch.support.num_features, 1, bias=False))
    torch.nn.init.zeros_(network[0].weight)
    model = NeuralTaskModel(network.double(), Gaussian(0.4).double(), "normal", task_modules="head")
    with torch.no_grad():
        model.prior.log_scale.zero_()
    return BayesianLastLayer(model).adapt(batch.support)


# -- truths -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three():
    tasks, batch = oracle_tasks(600)
    return [scores(Oracle(tasks, batch.support, factor), batch) for factor in (1.0, 0.5, 2.0)]


@pytest.mark.parametrize("name", ["nll", "nll_joint", "crps"])
@pytest.mark.parametrize("other", [1, 2])
def test_truth_is_best(three, name, other):
    difference = three[other].per_task[name] - three[0].per_task[name]
    assert difference.mean() > 4 * difference.std() / math.sqrt(len(difference))


def test_coverage_is_nominal_only_for_truth(three):
    exact, confident, diffident = three
    for name, nominal in (("coverage_50", 0.5), ("coverage_90", 0.9)):
        assert abs(exact[name] - nominal) < 4 * exact.standard_errors[name]
        assert confident[name] < nominal - 4 * confident.standard_errors[name]
        assert diffident[name] > nominal + 4 * diffident.standard_errors[name]
    assert exact["rmse"] == pytest.approx(confident["rmse"])
    assert diffident["width_90"] == pytest.approx(2 * exact["width_90"])


def test_joint_is_the_difference_of_evidences():
    tasks, batch = oracle_tasks(7)
    expected = (tasks.log_evidence(batch.support) - tasks.log_evidence(batch.union())) / batch.query.shots
    result = scores(Oracle(tasks, batch.support), batch)
    torch.testing.assert_close(result.per_task["nll_joint"], expected)
    assert not torch.allclose(result.per_task["nll"], expected)  # the points are dependent


def test_crps_against_scoringrules():
    generator = torch.Generator().manual_seed(0)
    loc, y = torch.randn(2, 5, 3, dtype=F64, generator=generator)
    scale = torch.rand(5, 3, dtype=F64, generator=generator) + 0.1
    expected = scoringrules.crps_normal(y.numpy(), loc.numpy(), scale.numpy())
    torch.testing.assert_close(crps_normal(loc, scale, y), torch.as_tensor(expected))
    draws = torch.randn(40, 5, 3, dtype=F64, generator=generator)
    expected = scoringrules.crps_ensemble(y.numpy(), draws.movedim(0, -1).numpy(), estimator="fair")
    torch.testing.assert_close(crps_ensemble(draws, y), torch.as_tensor(expected))
    biased = scoringrules.crps_ensemble(y.numpy(), draws.movedim(0, -1).numpy(), estimator="nrg")
    assert not torch.allclose(crps_ensemble(draws, y), torch.as_tensor(biased))


def test_fair_crps_is_unbiased():
    y = torch.zeros(20_000, dtype=F64) + 0.7
    draws = torch.randn(3, 20_000, dtype=F64, generator=torch.Generator().manual_seed(1))
    estimates = crps_ensemble(draws, y)
    exact = crps_normal(torch.zeros(1), torch.ones(1), torch.full((1,), 0.7)).item()
    error = estimates.std() / math.sqrt(len(y))
    assert abs(estimates.mean() - exact) < 4 * error


def test_samples_agree_with_closed_form():
    _, batch = oracle_tasks(5, seed=2)  # with seed 0 two targets lie within 0.003 scales of an edge
    posterior = last_layer(batch)
    closed = scores(posterior, batch)
    sampled = scores(Hidden(posterior), batch, num_samples=40_000, generator=1)
    assert (closed.num_samples, sampled.num_samples) == (0, 40_000)
    for name in SCORES:
        if name.startswith("coverage"):  # at most one of the 30 points may cross an edge
            assert sampled[name] == pytest.approx(closed[name], abs=1.01 / 30)
        else:
            torch.testing.assert_close(sampled.per_task[name], closed.per_task[name], atol=0.01, rtol=0.01, msg=name)


def test_slices_give_the_same_log_scores(monkeypatch):
    _, batch = oracle_tasks(3)
    posterior = Hidden(last_layer(batch))
    whole = scores(posterior, batch, num_samples=50)
    monkeypatch.setattr(forecasts, "MAX_ELEMENTS", 50 * 3 * 4)
    sliced = scores(posterior, batch, num_samples=50)
    torch.testing.assert_close(sliced.per_task["nll_joint"], whole.per_task["nll_joint"])
    assert sliced["crps"] == pytest.approx(whole["crps"], rel=0.3)


def test_point_estimate_has_a_joint_equal_to_its_marginals():
    _, batch = oracle_tasks(4)
    network = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
    torch.nn.init.ones_(network[0].weight)
    posterior = MAML(NeuralTaskModel(network, Gaussian(0.4).double(), "point")).adapt(batch.support)
    result = scores(posterior, batch)
    torch.testing.assert_close(result.per_task["nll"], result.per_task["nll_joint"])
    assert result["width_90"] == pytest.approx(2 * 1.6448536 * 0.4, rel=1e-6)


# -- means and standard errors ------------------------------------------------------------------------------------


def test_standard_errors_by_hand(three):
    result = three[0]
    for name in SCORES:
        each = result.per_task[name]
        if name == "rmse":
            square = each.square()
            assert result[name] == pytest.approx(square.mean().sqrt().item())
            expected = (square.std() / math.sqrt(600) / (2 * square.mean().sqrt())).item()
        else:
            assert result[name] == pytest.approx(each.mean().item())
            expected = (each.std() / math.sqrt(600)).item()
        assert result.standard_errors[name] == pytest.approx(expected)


def test_rmse_error_is_the_spread_of_repetitions():
    repeated = []
    for seed in range(60):
        tasks, batch = oracle_tasks(50, seed=seed)
        repeated.append(scores(Oracle(tasks, batch.support), batch))
    spread = torch.tensor([r["rmse"] for r in repeated]).std()
    claimed = torch.tensor([r.standard_errors["rmse"] for r in repeated]).mean()
    assert 0.7 < spread / claimed < 1.4  # 60 repetitions know a spread to 9%


def test_mapping_and_table(three):
    result = three[0]
    assert list(result) == list(SCORES)
    assert len(result) == 8
    flat = result.to_dict()
    assert flat["nll_se"] == result.standard_errors["nll"]
    assert all(type(v) in (float, int) for v in flat.values())
    assert "coverage_90" in str(result)
    assert "600 tasks" in str(result)
    assert "closed form" in str(result)


def test_one_task_has_no_standard_error():
    tasks, batch = oracle_tasks(1)
    result = scores(Oracle(tasks, batch.support), batch)
    assert math.isnan(result.standard_errors["nll"])
    assert math.isfinite(result["nll"])


# -- what counts --------------------------------------------------------------------------------------------------


def padded(batch, garbage):
    """Two garbage points more in each query, one more in the first task's own, and a garbage task."""
    query = pad_shots(batch.query, batch.query.shots + 2)
    mask = query.full_mask().clone()
    mask[0, 0] = False
    x = torch.where(mask.unsqueeze(-1), query.x, garbage)
    y = torch.where(mask, query.y, -garbage)

    def add(t, value):
        return torch.cat([t, torch.full_like(t[:1], value)])

    query = Observations(add(x, garbage), add(y, garbage), add(mask, True))
    support = Observations(*(torch.cat([t, t[:1]]) for t in (batch.support.x, batch.support.y)))
    task_id = torch.tensor([*range(batch.num_tasks), -1])
    return TaskBatch(support, query, task_id=task_id)


@pytest.mark.parametrize("hide", [False, True])
def test_padding_never_counts(hide):
    _, batch = oracle_tasks(4)

    def score(garbage):
        other = padded(batch, garbage)
        posterior = last_layer(other)
        return scores(Hidden(posterior) if hide else posterior, other, num_samples=100)

    first, second = score(1.0), score(1000.0)
    for name in SCORES:
        torch.testing.assert_close(first.per_task[name], second.per_task[name], rtol=0, atol=1e-12, equal_nan=True)
        assert first[name] == pytest.approx(second[name], abs=1e-12)
    assert first.num_tasks == 4
    assert math.isnan(first.per_task["nll"][-1])


def test_padding_is_as_if_absent():
    tasks, batch = oracle_tasks(4)
    other = padded(batch, 50.0)
    with_padding = scores(Oracle(tasks, other.support), other)
    without = scores(Oracle(tasks, batch.support), batch)
    short = replace(batch, query=Observations(batch.query.x[:, 1:], batch.query.y[:, 1:]))
    first = scores(Oracle(tasks, batch.support), short)
    for name in SCORES:
        torch.testing.assert_close(with_padding.per_task[name][1:4], without.per_task[name][1:])
        torch.testing.assert_close(with_padding.per_task[name][0], first.per_task[name][0])


def test_task_without_query_is_left_out():
    tasks, batch = oracle_tasks(3)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    other = replace(batch, query=replace(batch.query, mask=mask))
    result = scores(Oracle(tasks, batch.support), other)
    whole = scores(Oracle(tasks, batch.support), batch)
    assert result.num_tasks == 2
    assert result["nll"] == pytest.approx(whole.per_task["nll"][[0, 2]].mean().item())


# -- outputs, units, other distributions --------------------------------------------------------------------------


def two_outputs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 5, 1, dtype=F64, generator=generator)
    y, loc = torch.randn(2, 3, 5, 2, dtype=F64, generator=generator)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    batch = TaskBatch(Observations(x, y), Observations(x, y, mask))
    return batch, Fixed(batch.support, dist.Normal(loc, 0.7).to_event(1))


def test_several_outputs_by_hand():
    batch, posterior = two_outputs()
    result = scores(posterior, batch)
    y, loc, mask = batch.query.y, posterior.marginal.mean, batch.query.mask
    nll = -torch.distributions.Normal(loc, 0.7).log_prob(y).sum(-1)
    for name, value in (("nll", nll), ("nll_joint", nll), ("crps", crps_normal(loc, torch.tensor(0.7), y).mean(-1))):
        expected = torch.where(mask, value, 0.0).sum(-1) / mask.sum(-1)
        torch.testing.assert_close(result.per_task[name], expected)
    assert result.per_task["rmse"][2] == pytest.approx((loc[2] - y[2]).square().mean().sqrt().item())


def test_joint_of_several_outputs_is_flat():
    batch, posterior = two_outputs()
    loc = posterior.marginal.mean
    flat = dist.MultivariateNormal(loc.flatten(1), 0.49 * torch.eye(10, dtype=F64))
    result = scores(Fixed(batch.support, posterior.marginal, flat), batch)
    torch.testing.assert_close(result.per_task["nll_joint"], scores(posterior, batch).per_task["nll"])


@pytest.mark.parametrize("y_scale", [torch.tensor(3.0, dtype=F64), torch.tensor([3.0, 0.2], dtype=F64)])
def test_raw_units_by_hand(y_scale):
    batch, posterior = two_outputs()
    y_mean = torch.tensor(5.0, dtype=F64)
    standardizer = Standardizer(torch.zeros(1), torch.ones(1), y_mean, y_scale)
    raw_query = replace(batch.query, y=standardizer.raw_y(batch.query.y))
    by_hand = scores(
        Fixed(batch.support, dist.Normal(standardizer.raw_y(posterior.marginal.mean), 0.7 * y_scale).to_event(1)),
        TaskBatch(batch.support, raw_query),
    )
    batch = replace(batch, standardizer=standardizer)
    result = scores(posterior, batch)
    standard = scores(posterior, batch, raw_units=False)
    assert (result.raw_units, standard.raw_units) == (True, False)
    for name in SCORES:
        torch.testing.assert_close(result.per_task[name], by_hand.per_task[name])
        if not name.startswith("coverage"):
            assert result[name] != pytest.approx(standard[name])


def test_student_takes_log_score_closed_and_the_rest_from_draws():
    _, batch = oracle_tasks(3)
    marginal = dist.StudentT(torch.tensor(4.0, dtype=F64), batch.query.y + 0.3, 0.5)
    result = scores(Fixed(batch.support, marginal), batch, num_samples=20_000)
    expected = -marginal.log_prob(batch.query.y).mean(-1)
    torch.testing.assert_close(result.per_task["nll"], expected)
    torch.testing.assert_close(result.per_task["nll_joint"], expected)
    assert result.num_samples == 20_000
    crps = scoringrules.crps_t(0.0, 4.0, 0.3, 0.5)
    assert result["crps"] == pytest.approx(float(crps), abs=0.01)
    assert result["width_90"] == pytest.approx(2 * 2.1318468 * 0.5, rel=0.03)


# -- energy score -------------------------------------------------------------------------------------------------


def test_energy_score_sees_what_hangs_together():
    tasks, batch = oracle_tasks(400, seed=6)
    exact = Oracle(tasks, batch.support)
    result = scores(exact, batch, energy=True)
    assert list(result)[-1] == "energy"
    assert "energy score" in str(result)
    assert result.num_samples == 1000
    assert "energy" not in scores(exact, batch)
    joint = exact.predictive(batch.query, joint=True)
    by_hand = energy_score(joint.sample((150,)), batch.query.y) / math.sqrt(6)  # independent draws, all pairs
    difference = result.per_task["energy"] - by_hand
    assert abs(difference.mean()) < 5 * difference.std() / 20
    for factor in (0.5, 2.0):
        worse = scores(Oracle(tasks, batch.support, factor), batch, energy=True)
        difference = worse.per_task["energy"] - result.per_task["energy"]
        assert difference.mean() > 4 * difference.std() / 20

    class Apart(Oracle):
        def predictive(self, x, *, joint=False):
            return super().predictive(x).to_event(1) if joint else super().predictive(x)

    apart = scores(Apart(tasks, batch.support), batch, energy=True)
    assert apart["interval_90"] == result["interval_90"]
    difference = apart.per_task["energy"] - result.per_task["energy"]
    assert difference.mean() > 4 * difference.std() / 20


def test_energy_score_in_raw_units_and_with_padding():
    tasks, batch = oracle_tasks(5)
    plain = scores(Oracle(tasks, batch.support), batch, energy=True, generator=3)
    unit = torch.ones((), dtype=F64)
    scaled = replace(batch, standardizer=Standardizer(torch.zeros(2), torch.ones(2), 0 * unit, 3 * unit))
    raw = scores(Oracle(tasks, batch.support), scaled, energy=True, generator=3)
    torch.testing.assert_close(raw.per_task["energy"], 3 * plain.per_task["energy"])
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[:, 4:] = False
    found = [
        scores(
            Oracle(tasks, batch.support),
            replace(batch, query=Observations(batch.query.x, torch.where(mask, batch.query.y, v), mask)),
            energy=True,
        )["energy"]
        for v in (0.0, 1e3)
    ]
    assert found[0] == found[1]
    short = replace(batch, query=Observations(batch.query.x[:, :4], batch.query.y[:, :4]))
    assert scores(Oracle(tasks, batch.support), short, energy=True)["energy"] == pytest.approx(found[0], rel=0.1)


# -- randomness and errors ----------------------------------------------------------------------------------------


def test_seed_decides():
    _, batch = oracle_tasks(3)
    posterior = Hidden(last_layer(batch))
    a, b, c = (scores(posterior, batch, num_samples=50, generator=s).to_dict() for s in (1, 1, 2))
    assert a == b
    assert a != c


def test_errors_are_typed():
    tasks, batch = oracle_tasks(3)
    posterior = Oracle(tasks, batch.support)
    with pytest.raises(ShapeError, match="2 tasks"):
        scores(posterior, batch.tasks([0, 1]))
    with pytest.raises(DataError, match="y=None"):
        scores(posterior, replace(batch, query=batch.query.with_y(None)))
    with pytest.raises(EmptyTaskError):
        scores(posterior, replace(batch, query=replace(batch.query, mask=torch.zeros(3, 6, dtype=torch.bool))))
    with pytest.raises(EmptyTaskError):
        scores(posterior, replace(batch, task_id=torch.full((3,), -1)))
    with pytest.raises(OptionError, match="num_samples=1"):
        scores(posterior, batch, num_samples=1)


@pytest.mark.parametrize("broken", ["mean", "scale"])
def test_non_finite_predictions_name_the_task(broken):
    tasks, batch = oracle_tasks(3)
    batch = replace(batch, names=("ada", "bob", "eve"))
    exact = Oracle(tasks, batch.support).predictive(batch.query)
    loc, scale = exact.loc.clone(), exact.scale.clone()
    (loc if broken == "mean" else scale)[1, 2] = math.nan
    marginal = dist.Normal(loc, scale, validate_args=False)
    with pytest.raises(NonFiniteDataError, match="bob"):
        scores(Fixed(batch.support, marginal, exact.to_event(1)), batch)


def test_targets_outside_the_support_are_an_error():
    _, batch = oracle_tasks(3)
    with pytest.raises(DataError, match="outside the support"):
        scores(Fixed(batch.support, dist.Exponential(torch.ones(3, 6, dtype=F64))), batch, num_samples=10)
