"""Cross-validation over tasks, against the closed form of a conjugate hierarchy."""

import math
from dataclasses import replace

import arviz_base
import arviz_stats
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import DataError, EmptyTaskError, NoClosedFormError, NonFiniteDataError, OptionError, ShapeError

F64 = torch.float64
#: θ ~ N(0, 2²), φ_i ~ N(θ, 0.7²), y_ij ~ N(φ_i, 0.5²)
TOP, BETWEEN, NOISE = 2.0, 0.7, 0.5


class Levels:
    """Exact posterior of the φ_i of held-out tasks, θ integrated out over N(mean, variance)."""

    is_point, num_draws, target_kind = False, None, "real"

    def __init__(self, support, mean, variance, closed=True):
        self.support, self.num_tasks, self.closed = support, support.num_tasks, closed
        count = support.full_mask().sum(-1).to(F64)
        total = torch.where(support.full_mask(), support.y, 0.0).sum(-1)
        prior = 1.0 / (variance + BETWEEN**2)
        self.variance = 1.0 / (prior + count / NOISE**2)
        self.mean = self.variance * (prior * mean + total / NOISE**2)

    def predictive(self, x, *, joint=False):
        if not self.closed:
            raise NoClosedFormError("hidden")
        shots = x.shots
        loc = self.mean.unsqueeze(-1).expand(-1, shots)
        covariance = self.variance[:, None, None] + NOISE**2 * torch.eye(shots, dtype=F64)
        return dist.MultivariateNormal(loc, covariance)

    def draws(self, num_samples, generator=None):
        noise = torch.randn(num_samples, self.num_tasks, generator=generator, dtype=F64)
        return self.mean + self.variance.sqrt() * noise

    def log_likelihood(self, observations, *, draws):
        return dist.Normal(draws.unsqueeze(-1), NOISE, validate_args=False).log_prob(observations.y)


class Hierarchy:
    """The exact method: θ's posterior given the training tasks, in closed form."""

    def __init__(self, train, closed=True, data=None):
        self.closed = closed
        both = train.union() if isinstance(train, bm.TaskBatch) else data(train)
        count = both.full_mask().sum(-1).to(F64)
        mean = torch.where(both.full_mask(), both.y, 0.0).sum(-1) / count
        weight = 1.0 / (BETWEEN**2 + NOISE**2 / count)
        self.variance = 1.0 / (1.0 / TOP**2 + weight.sum())
        self.mean = self.variance * (weight * mean).sum()

    def adapt(self, support, generator=None):
        return Levels(support, self.mean, self.variance, self.closed)


def hierarchy(tasks=8, support=0, query=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = TOP * torch.randn((), generator=generator, dtype=F64)
    phi = theta + BETWEEN * torch.randn(tasks, 1, generator=generator, dtype=F64)
    y = phi + NOISE * torch.randn(tasks, support + query, generator=generator, dtype=F64)
    x = torch.zeros(tasks, support + query, 1, dtype=F64)
    return bm.TaskBatch(
        bm.Observations(x[:, :support], y[:, :support]), bm.Observations(x[:, support:], y[:, support:])
    )


def evidence(y, owner):
    """log p(y) of observations of several tasks together, θ and φ integrated out in one big covariance."""
    same = (owner[:, None] == owner[None]).to(F64)
    covariance = TOP**2 + BETWEEN**2 * same + NOISE**2 * torch.eye(len(y), dtype=F64)
    return dist.MultivariateNormal(torch.zeros(len(y), dtype=F64), covariance).log_prob(y)


def left_out(batch, folds):
    """log p(Q_i | S_i, D of the tasks outside the fold of i), as a difference of evidences."""
    both, tasks = batch.union(), batch.num_tasks
    owner = torch.arange(tasks)[:, None].expand(both.y.shape)
    shots, out = batch.support.shots, []
    for i in range(tasks):
        outside = (folds[owner] != folds[i]) & both.full_mask()
        seen = outside.clone()
        seen[i, :shots] = both.full_mask()[i, :shots]
        alls = outside.clone()
        alls[i] = both.full_mask()[i]
        out.append(evidence(both.y[alls], owner[alls]) - evidence(both.y[seen], owner[seen]))
    return torch.stack(out).numpy()


# -- truth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", [0, 3])
def test_as_many_folds_as_tasks_are_leave_one_task_out(support):
    batch = hierarchy(8, support)
    found = bm.loo_kfold(batch, Hierarchy, k=8)
    truth = left_out(batch, torch.arange(8))
    np.testing.assert_allclose(found.elpd_i.values, truth, atol=1e-9)
    assert found.elpd == pytest.approx(truth.sum(), abs=1e-8)
    assert found.se == pytest.approx(math.sqrt(8 * truth.var()))
    assert (found.kind, found.n_folds, found.n_data_points, found.warning) == ("loo_kfold", 8, 8, False)
    assert np.isinf(found.n_eff_i.values).all()
    assert math.isnan(found.p)
    all_seen = Hierarchy(batch)
    leak = bm.loo_kfold(batch, lambda train: all_seen, k=8)
    assert leak.elpd > found.elpd + 0.01, "control: a method that has seen the held-out tasks scores too well"


@pytest.mark.parametrize("folds", [[0, 0, 1, 1, 2, 2, 2], [7, -1, 7, -1, 7, -1, 7]])
def test_folds_that_are_given(folds):
    batch = hierarchy(7, 2)
    found = bm.loo_kfold(batch, Hierarchy, folds=folds)
    np.testing.assert_allclose(found.elpd_i.values, left_out(batch, torch.tensor(folds)), atol=1e-9)
    assert found.n_folds == len(set(folds))
    other = bm.loo_kfold(batch, Hierarchy, k=7)
    assert np.abs(other.elpd_i.values - found.elpd_i.values).max() > 1e-3, "control: other folds"


def test_ragged_tasks_and_padding_tasks():
    batch = hierarchy(6, 2, 5)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 5, 2])[:, None]
    ragged = replace(batch, query=replace(batch.query, mask=mask))
    found = bm.loo_kfold(ragged, Hierarchy, k=6)
    np.testing.assert_allclose(found.elpd_i.values, left_out(ragged, torch.arange(6)), atol=1e-9)
    padded = replace(ragged, task_id=torch.tensor([0, 1, 2, 3, 4, -1]), population=6)
    seen = []

    def fit(train):
        seen.append((train.num_tasks, train.population))
        return Hierarchy(train)

    fewer = bm.loo_kfold(padded, fit, k=5)
    np.testing.assert_allclose(fewer.elpd_i.values, left_out(ragged.tasks(slice(0, 5)), torch.arange(5)), atol=1e-9)
    assert seen == [(4, 4)] * 5
    assert fewer.elpd_i.coords["task"].values.tolist() == ["0", "1", "2", "3", "4"]


def test_draws_meet_the_closed_form_within_their_error():
    batch = hierarchy(30, 4, 3, seed=1)
    exact = bm.loo_kfold(batch, Hierarchy, k=5)
    drawn = bm.loo_kfold(batch, lambda train: Hierarchy(train, closed=False), k=5, num_samples=4000)
    # the log of a mean of n_eff effective weights of n has a variance of 1 / n_eff − 1 / n, to first order
    error = np.sqrt(1.0 / drawn.n_eff_i.values - 1.0 / 4000)
    z = (drawn.elpd_i.values - exact.elpd_i.values) / error
    assert abs(z.mean()) < 5 / math.sqrt(30)
    assert 0.6 < z.std() < 1.5
    assert drawn.n_samples == 4000
    wrong = (drawn.elpd_i.values - exact.elpd_i.values[::-1]) / error
    assert np.abs(wrong).max() > 10, "control: the order of the tasks"


def test_pointwise_psis_of_tasks_that_were_trained_on_is_bad():
    """The control of the whole: weights that take a task out of a posterior that has learned from it."""
    batch = hierarchy(8, 0, 10)
    exact = bm.loo_kfold(batch, Hierarchy, k=8)
    y = batch.query.y
    generator = torch.Generator().manual_seed(0)
    full, n = Hierarchy(batch), 4000
    theta = full.mean + full.variance.sqrt() * torch.randn(n, 1, generator=generator, dtype=F64)
    precision = 1 / BETWEEN**2 + 10 / NOISE**2
    mean = (theta / BETWEEN**2 + y.sum(-1) / NOISE**2) / precision
    phi = mean + precision**-0.5 * torch.randn(n, 8, generator=generator, dtype=F64)
    of_task = dist.Normal(phi.unsqueeze(-1), NOISE).log_prob(y).sum(-1)
    tree = arviz_base.from_dict(
        {"posterior": {"phi": phi[None].numpy()}, "log_likelihood": {"y": of_task[None].numpy()}}
    )
    with pytest.warns(UserWarning, match="Pareto"):
        psis = arviz_stats.loo(tree, pointwise=True)
    assert (psis.pareto_k.values > psis.good_k).mean() > 0.5
    assert np.abs(psis.elpd_i.values - exact.elpd_i.values).max() > 0.3
    assert psis.elpd > exact.elpd + 1.0, "a task's own points are flattering"


# -- real methods -------------------------------------------------------------------------------------------------


def last_layer(scale=1.0, noise=0.4):
    torch.manual_seed(0)
    network = bm.nets.mlp(2, [4], 1)
    return bm.NeuralTaskModel(network, bm.Gaussian(noise), bm.priors.Normal(scale), task_modules="head")


def linear(tasks=12, support=3, query=4):
    family = bm.tasks.LinearGaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), 0.4)
    return family.sample(tasks, support=support, query=query, generator=0).to(dtype=torch.float32)


def prepared(train, method):
    method.prepare(train)
    return method


@pytest.mark.parametrize("support", [0, 3])
def test_a_gaussian_q_gives_what_the_exact_posterior_does(support):
    """Without a support the evidence weights draws of q given the query; with one, draws of q given it are taken."""
    batch = linear(12, support, 4)

    def exact(train):
        return prepared(train, bm.BayesianLastLayer(last_layer()))

    def approximate(train):
        return prepared(train, bm.Laplace(last_layer(), solver="newton", inner_lr=1.0, inner_steps=2))

    first = bm.loo_kfold(batch, exact, k=4)
    second = bm.loo_kfold(batch, approximate, k=4, num_samples=4000)
    assert np.isinf(first.n_eff_i.values).all()
    if support == 0:
        assert np.isfinite(second.n_eff_i.values).all()
    error = 5 * np.sqrt(1.0 / np.minimum(second.n_eff_i.values, 4000.0)) + 1e-2
    assert (np.abs(first.elpd_i.values - second.elpd_i.values) < error).all()


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # pandas, of a line of arviz_stats.compare
def test_arviz_compares_them():
    batch = hierarchy(20, 2)
    good = bm.loo_kfold(batch, Hierarchy, k=5)

    class Broad(Hierarchy):
        def __init__(self, train):
            super().__init__(train)
            self.mean, self.variance = torch.zeros((), dtype=F64), torch.tensor(400.0, dtype=F64)

    poor = bm.loo_kfold(batch, Broad, k=5)
    table = arviz_stats.compare({"poor": poor, "good": good})
    assert table.index.tolist() == ["good", "poor"]
    each = good.elpd_i.values - poor.elpd_i.values
    row = table.loc["poor"]
    assert abs(row["elpd_diff"]) == pytest.approx(each.sum(), abs=0.1)  # it rounds
    assert row["dse"] == pytest.approx(math.sqrt(20 * each.var()), abs=0.1)
    assert "5-fold cross validation" in str(good)


def test_a_table_is_standardised_anew_in_each_fold():
    generator = np.random.default_rng(0)
    rows = [
        {"patient": f"p{i}", "week": float(j), "kg": 80.0 + 5 * generator.normal() * (j == 0) + generator.normal() + i}
        for i in range(9)
        for j in range(6)
    ]
    table = bm.tasks.TableTasks.from_dataframe(pd.DataFrame(rows), task="patient", x=["week"], y="kg", order="first")
    units, learned = [], []

    def fit(train):
        batch = train.all(support=0)
        units.append((train.num_tasks, float(batch.standardizer.y_mean) if batch.standardizer else None))
        learned.append(set(train.names))
        torch.manual_seed(0)
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(1.0), bm.priors.Normal(1.0), task_modules="head")
        return prepared(batch, bm.BayesianLastLayer(model))

    standard = table.with_standardizer(table.fit_standardizer())
    found = bm.loo_kfold(standard, fit, k=3, support=2)
    assert [n for n, _ in units] == [6, 6, 6]
    assert len({mean for _, mean in units}) == 3
    assert set.union(*learned) == set(table.names)
    assert found.elpd_i.coords["task"].values.tolist() == list(table.names)
    # by hand, of one fold
    held = [name for name in table.names if name not in learned[0]]
    train = table.subset([name for name in table.names if name in learned[0]])
    units_of = train.fit_standardizer()
    rest = table.subset(held).with_standardizer(units_of).all(support=2)
    method = fit(train.with_standardizer(units_of))
    by_hand = -bm.scores(method.adapt(rest.support), rest).per_task["nll_joint"] * rest.query.counts()
    np.testing.assert_allclose(found.elpd_i.sel(task=held).values, by_hand.numpy(), rtol=1e-6)
    assert bm.loo_kfold(table, fit, k=3, support=2).elpd < found.elpd, "control: raw units were learned in"


def test_the_seed_decides_the_folds():
    batch = hierarchy(12, 1)
    seen = []

    def fit(train):
        seen.append(train.support.y.sum().item())
        return Hierarchy(train)

    one, two, three = (bm.loo_kfold(batch, fit, k=4, generator=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.elpd_i.values, two.elpd_i.values)
    assert seen[:4] == seen[4:8]
    assert seen[:4] != seen[8:]
    assert three.n_folds == 4


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 9, 2.0, True])
def test_a_number_of_folds_that_does_not_fit(k):
    with pytest.raises(OptionError, match="from 2 to 8"):
        bm.loo_kfold(hierarchy(8), Hierarchy, k=k)


def test_folds_that_do_not_fit():
    with pytest.raises(ShapeError, match="each of the 8 tasks"):
        bm.loo_kfold(hierarchy(8), Hierarchy, folds=[0, 1])
    for folds in ([3] * 8, [0.5] * 8):
        with pytest.raises(OptionError, match="two different"):
            bm.loo_kfold(hierarchy(8), Hierarchy, folds=folds)


def test_what_is_no_data_and_no_method():
    batch = hierarchy(8)
    with pytest.raises(OptionError, match="TaskBatch or a table"):
        bm.loo_kfold(bm.tasks.Sinusoid(), Hierarchy)
    with pytest.raises(OptionError, match="batch has its supports"):
        bm.loo_kfold(batch, Hierarchy, k=4, support=2)
    with pytest.raises(OptionError, match="fit is a int"):
        bm.loo_kfold(batch, 3)
    for answer in (None, 3.0, Hierarchy(batch).adapt(batch.support)):
        with pytest.raises(OptionError, match="which has no adapt"):
            bm.loo_kfold(batch, lambda train, answer=answer: answer, k=4)
    frame = pd.DataFrame({"t": list("aabb"), "x": [0.0, 1.0, 0.0, 1.0], "y": [1.0, 2.0, 3.0, 5.0]})
    table = bm.tasks.TableTasks.from_dataframe(frame, task="t", x=["x"], y="y")
    with pytest.raises(OptionError, match="support=0"):
        bm.loo_kfold(table, Hierarchy, k=2)


def test_too_few_tasks_and_nothing_to_score():
    with pytest.raises(EmptyTaskError, match="at least two tasks"):
        bm.loo_kfold(hierarchy(1), Hierarchy)
    batch = hierarchy(4, 2)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2] = False
    with pytest.raises(EmptyTaskError, match="Task 2 has no query"):
        bm.loo_kfold(replace(batch, query=replace(batch.query, mask=mask)), Hierarchy, k=2)
    unlabelled = replace(batch, query=batch.query.with_y(None))
    with pytest.raises(DataError, match=r"query.y=None"):
        bm.loo_kfold(unlabelled, lambda train: Hierarchy(batch), k=2)


def test_nan():
    batch = hierarchy(4, 2)
    y = batch.query.y.clone()
    y[1, 1] = math.nan
    with pytest.raises(NonFiniteDataError, match="not finite at task 1"):
        bm.loo_kfold(replace(batch, query=batch.query.with_y(y)), Hierarchy, k=2)

    def diverged(train):
        method = Hierarchy(train, closed=False)
        method.mean = method.mean * math.nan
        return method

    with pytest.raises(NonFiniteDataError, match="joint log density is not finite"):
        bm.loo_kfold(batch, diverged, k=2)


def test_scores_that_rest_on_few_draws_warn():
    batch = hierarchy(8, 0, 20)
    with pytest.warns(UserWarning, match="of 8 held-out tasks rest on less than 10 effective draws"):
        found = bm.loo_kfold(batch, lambda train: Hierarchy(train, closed=False), k=4, num_samples=50)
    assert found.warning
    assert (found.n_eff_i.values < 10).any()
