"""Scores, exports and pictures of counts and classes: against scikit-learn, scipy and scoringrules."""

import math
from dataclasses import replace

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import scoringrules
import sklearn.metrics
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.diagnostics.forecasts import Predictor, SampleForecast
from bayesmeta.diagnostics.metrics import brier_score
from bayesmeta.diagnostics.scores import CLASS_SCORES, SCORES
from bayesmeta.models.likelihoods import Bernoulli, Categorical, NegativeBinomial, Poisson

F64 = torch.float64


def batch_of(draw, tasks=6, shots=9, outputs=None, seed=0):
    """Ragged tasks; ``draw`` makes targets from standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, shots, 1, generator=generator, dtype=F64)
    shape = (tasks, shots) if outputs is None else (tasks, shots, outputs)
    y = draw(torch.randn(shape, generator=generator, dtype=F64) + (x if outputs else x.squeeze(-1)))
    mask = torch.arange(shots) < torch.randint(4, shots + 1, (tasks, 1), generator=generator)
    support = bm.Observations(x[:, :4], y[:, :4])
    return bm.TaskBatch(support, bm.Observations(x[:, 4:], y[:, 4:], mask[:, 4:]), names=tuple("abcdef"[:tasks]))


def classes_of(k):
    return lambda z: ((z + 2.0) * k / 4.0).floor().clamp(0, k - 1)


def counts_of(z):
    return (0.5 * z + 1.0).exp().floor()


def adapted(likelihood, batch, method=bm.ABML, targets=1):
    network = bm.nets.mlp(1, [4], likelihood.num_outputs(targets), activation="tanh")
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
    prior = "point" if method is bm.MAML else bm.priors.Normal(0.4)
    model = bm.NeuralTaskModel(network, likelihood, prior).double()
    return method(model, inner_steps=5, inner_lr=0.1).adapt(batch.support)


def valid(batch):
    return [(t, s) for t, s in batch.query.full_mask().nonzero().tolist()]


def by_task(batch, value):
    """Mean of ``value(task, shot)`` over each task's points."""
    out = []
    for task in range(batch.num_tasks):
        each = [value(t, s) for t, s in valid(batch) if t == task]
        out.append(sum(each) / len(each) if each else math.nan)
    return torch.tensor(out, dtype=F64)


# -- classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [bm.MAML, bm.ABML])
@pytest.mark.parametrize("classes", [2, 4])
def test_class_scores_by_scikit_learn(method, classes):
    batch = batch_of(classes_of(classes))
    likelihood = Bernoulli() if classes == 2 else Categorical(classes)
    posterior = adapted(likelihood, batch, method)
    result = bm.scores(posterior, batch, num_samples=500, generator=3)
    assert list(result) == list(CLASS_SCORES) == ["nll", "nll_joint", "accuracy", "brier"]
    assert result.target_kind == "class"
    assert result.num_samples == (0 if method is bm.MAML else 500)
    p = Predictor(posterior, 500, 3).class_forecast(batch.query).probabilities.numpy()
    y, labels = batch.query.y.numpy().astype(int), range(classes)

    def brier(t, s):
        return sklearn.metrics.brier_score_loss(y[t, s : s + 1], p[t, s : s + 1], labels=labels, scale_by_half=False)

    def accuracy(t, s):
        return sklearn.metrics.accuracy_score(y[t, s : s + 1], [p[t, s].argmax()])

    def log_loss(t, s):
        return sklearn.metrics.log_loss(y[t, s : s + 1], p[t, s : s + 1], labels=labels)

    for name, value in (("brier", brier), ("accuracy", accuracy), ("nll", log_loss)):
        torch.testing.assert_close(result.per_task[name], by_task(batch, value), equal_nan=True)
    if method is bm.MAML:
        torch.testing.assert_close(result.per_task["nll_joint"], result.per_task["nll"], equal_nan=True)


def test_brier_is_the_sum_over_classes():
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=F64)
    assert brier_score(p, torch.tensor([0.0])).item() == pytest.approx(0.09 + 0.04 + 0.01)
    assert brier_score(p, torch.tensor([2.0])).item() == pytest.approx(0.49 + 0.04 + 0.81)
    two = torch.tensor([[0.4, 0.6]], dtype=F64)
    assert brier_score(two, torch.tensor([1])).item() == pytest.approx(2 * 0.4**2)


def test_several_labels_by_hand():
    batch = batch_of(lambda z: (z > 0).double(), outputs=3)
    posterior = adapted(Bernoulli(), batch, bm.MAML, targets=3)
    result = bm.scores(posterior, batch)
    p = posterior.predictive(batch.query).base_dist.probs
    y = batch.query.y
    for name, value in (
        ("brier", 2 * (p - y).square().mean(-1)),
        ("accuracy", ((p > 0.5) == (y == 1)).double().mean(-1)),
        ("nll", -torch.where(y == 1, p, 1 - p).log().sum(-1)),  # of the whole vector
    ):
        torch.testing.assert_close(
            result.per_task[name], by_task(batch, lambda t, s, v=value: v[t, s].item()), equal_nan=True
        )


class Classes:
    """Knows the truth, up to a temperature: x holds the logits."""

    is_point = True
    target_kind = "class"

    def __init__(self, support, temperature=1.0):
        self.support, self.num_tasks, self.temperature = support, support.num_tasks, temperature

    def class_probabilities(self, x, num_samples=1000, *, draws=None, generator=None):
        assert draws is None
        return (x.x / self.temperature).softmax(-1)

    def predictive(self, x, *, joint=False):
        fn = dist.Categorical(logits=x.x / self.temperature)
        return fn.to_event(1) if joint else fn


def test_truth_has_the_best_proper_scores():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, 3, generator=generator, dtype=F64) * 1.5
    y = torch.multinomial(x.softmax(-1).flatten(0, 1), 1, generator=generator).reshape(400, 8).double()
    batch = bm.TaskBatch(bm.Observations(x, y), bm.Observations(x, y))
    truth, sure, unsure = (bm.scores(Classes(batch.support, t), batch) for t in (1.0, 0.4, 2.5))
    for name in ("nll", "brier"):
        for other in (sure, unsure):
            difference = other.per_task[name] - truth.per_task[name]
            assert difference.mean() > 4 * difference.std() / math.sqrt(400)
    assert truth["accuracy"] == sure["accuracy"] == unsure["accuracy"]  # it does not see confidence


def test_class_table_says_what_it_holds():
    batch = batch_of(classes_of(3))
    text = str(bm.scores(adapted(Categorical(3), batch), batch, num_samples=10))
    assert "Brier" in text
    assert "accuracy" in text
    assert "crps" not in text


@pytest.mark.parametrize("garbage", [-1.0, 7.5])
@pytest.mark.parametrize("method", [bm.MAML, bm.ABML])
def test_padding_that_is_no_class_does_not_count(method, garbage):
    batch = batch_of(classes_of(3))
    posterior = adapted(Categorical(3), batch, method)
    y = torch.where(batch.query.mask, batch.query.y, garbage)
    first = bm.scores(posterior, batch, num_samples=20)
    second = bm.scores(posterior, replace(batch, query=batch.query.with_y(y)), num_samples=20)
    for name in CLASS_SCORES:
        torch.testing.assert_close(first.per_task[name], second.per_task[name], equal_nan=True)
    assert not torch.equal(batch.query.y, y)


def a_program(x, y=None, mask=None):
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with bm.shot_plate(x, mask):
            logits = torch.stack([slope * x.squeeze(-1), torch.zeros_like(slope * x.squeeze(-1))], -1)
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("method", [bm.MAML, bm.ABML])
def test_targets_that_are_no_class_are_refused(method, own, value):
    batch = batch_of(classes_of(2))
    posterior = method(a_program).adapt(batch.support) if own else adapted(Categorical(2), batch, method)
    assert posterior.target_kind == "class"
    assert 0.0 < bm.scores(posterior, batch, num_samples=20)["brier"] < 2.0
    y, mask = batch.query.y.clone(), batch.query.mask.clone()
    y[1, 1], mask[1, 1] = value, True
    bad = replace(batch, query=replace(batch.query, y=y, mask=mask))
    with pytest.raises(errors.DataError, match=r"task b, query point 1 .*classes 0 to 1"):
        bm.scores(posterior, bad, num_samples=20)


def test_probabilities_that_are_not_finite_name_the_task():
    batch = batch_of(classes_of(3))
    posterior = Classes(batch.support)
    broken = torch.full((6, 5, 3), 1 / 3, dtype=F64)
    broken[0, 0] = math.nan
    posterior.class_probabilities = lambda *a, **k: broken
    mask = torch.ones_like(batch.query.mask)
    with pytest.raises(errors.NonFiniteDataError, match="probability of a class is not finite for task a"):
        bm.scores(posterior, replace(batch, query=replace(batch.query, mask=mask)))


# -- counts -------------------------------------------------------------------------------------------------------


class Rates:
    """A Poisson forecast; x holds the rate."""

    is_point = False
    target_kind = "count"

    def __init__(self, support):
        self.support, self.num_tasks = support, support.num_tasks

    def predictive(self, x, *, joint=False):
        fn = dist.Poisson(x.x.squeeze(-1))
        return fn.to_event(1) if joint else fn

    def draws(self, num_samples, generator=None):
        return num_samples

    def predict(self, x, num_samples=1000, *, draws=None, generator=None):
        return torch.poisson(x.x.squeeze(-1).expand(draws, -1, -1), generator=generator)


def rates(tasks=200, shots=10):
    generator = torch.Generator().manual_seed(5)
    rate = torch.rand(tasks, shots, generator=generator, dtype=F64) * 4 + 0.3
    x, y = rate.unsqueeze(-1), torch.poisson(rate, generator=generator)
    return rate, bm.TaskBatch(bm.Observations(x, y), bm.Observations(x, y))


def test_count_scores_by_scoringrules_and_scipy():
    rate, batch = rates(20)
    result = bm.scores(Rates(batch.support), batch, num_samples=10_000)
    assert list(result) == list(SCORES)
    y = batch.query.y
    nll = -torch.as_tensor(scipy.stats.poisson.logpmf(y, rate))
    torch.testing.assert_close(result.per_task["nll"], nll.mean(-1))
    crps = torch.as_tensor(scoringrules.crps_poisson(y.numpy(), rate.numpy()))
    # the standard error of a fair CRPS from n draws is about sd / √n: 2 / 100; of the mean of 10 points a third
    torch.testing.assert_close(result.per_task["crps"], crps.mean(-1), atol=0.025, rtol=0)
    low, high = (torch.as_tensor(scipy.stats.poisson.ppf(q, rate)) for q in (0.05, 0.95))
    assert result["width_90"] == pytest.approx((high - low).mean().item(), abs=0.02)
    assert result["coverage_90"] == pytest.approx(((low <= y) & (y <= high)).double().mean().item(), abs=0.006)


def test_intervals_of_counts_cover_at_least_their_share():
    """They cover what the discrete distribution lets them, which scipy knows, not 50% and 90%."""
    rate, batch = rates(300)
    result = bm.scores(Rates(batch.support), batch, num_samples=1000)
    for name, tail in (("coverage_50", 0.25), ("coverage_90", 0.05)):
        low, high = (scipy.stats.poisson.ppf(q, rate) for q in (tail, 1 - tail))
        exact = (scipy.stats.poisson.cdf(high, rate) - scipy.stats.poisson.cdf(low - 1, rate)).mean()
        # 1000 draws miss an edge now and then where a cumulative probability lies near the level
        assert abs(result[name] - exact) < 4 * result.standard_errors[name] + 0.01
        assert result[name] > 1 - 2 * tail + 4 * result.standard_errors[name]
    assert "of counts: or more" in str(result)
    assert result.target_kind == "count"


@pytest.mark.parametrize("n", [2, 7, 1000])
def test_quantiles_of_counts_are_counts(n):
    draws = torch.poisson(torch.full((n, 3), 3.0), generator=torch.Generator().manual_seed(0)).double().sort(0).values
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = np.quantile(draws.numpy(), q, axis=0, method="inverted_cdf")
        torch.testing.assert_close(SampleForecast(draws, True).quantile(q), torch.as_tensor(expected))
    in_order = torch.arange(100.0, dtype=F64).unsqueeze(-1)
    assert SampleForecast(in_order, True).quantile(0.07) == 6  # 0.07 · 100 rounds to above 7
    if n == 7:
        assert (SampleForecast(draws).quantile(0.05) % 1 != 0).any()


@pytest.mark.parametrize("likelihood", [Poisson(), NegativeBinomial(2.0)])
@pytest.mark.parametrize("method", [bm.MAML, bm.ABML])
def test_scores_of_count_models(method, likelihood):
    batch = batch_of(counts_of)
    result = bm.scores(adapted(likelihood, batch, method), batch, num_samples=200)
    assert result.target_kind == "count"
    assert all(math.isfinite(v) for v in result.values())
    y = batch.query.y.clone()
    y[0, 0], mask = -1.0, torch.ones_like(batch.query.mask)
    with pytest.raises(errors.DataError, match="outside the support"):
        bm.scores(adapted(likelihood, batch, method), replace(batch, query=replace(batch.query, y=y, mask=mask)))


# -- ArviZ and pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "draw", "kind"),
    [(Categorical(3), classes_of(3), "class"), (Bernoulli(), classes_of(2), "class"), (Poisson(), counts_of, "count")],
)
def test_export(likelihood, draw, kind, tmp_path):
    batch = batch_of(draw)
    tree = bm.to_datatree(adapted(likelihood, batch), batch, num_samples=50)
    assert tree.attrs["target_kind"] == kind
    assert tree["predictions"]["y"].shape == (1, 50, len(valid(batch)))
    values = tree["posterior_predictive"]["y"].values
    assert np.array_equal(values, values.round())
    assert np.array_equal(tree["observed_data"]["y"].values, batch.support.y.flatten().numpy())
    table = arviz_stats.summary(tree, var_names=["0.weight"], kind="stats")
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    back = bm.load_netcdf(bm.save_netcdf(tree, tmp_path / "tree.nc"))
    assert np.array_equal(back["predictions"]["y"].values, tree["predictions"]["y"].values)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_picture_of_two_classes():
    batch = batch_of(classes_of(2))
    posterior = adapted(Bernoulli(), batch, bm.MAML)
    figure = bm.plot_forecast(posterior, batch)
    assert set(legend(figure)) == {"support", "query", "class 1"}
    (line,) = figure.axes[0].lines
    x, p = line.get_data()
    grid = torch.as_tensor(np.asarray(x)).reshape(1, -1, 1).expand(6, -1, 1)
    expected = posterior.predictive(grid).probs[0]
    np.testing.assert_allclose(p, expected, rtol=1e-6)
    assert figure.get_supylabel() == "probability"
    dots = [c.get_offsets()[:, 1] for c in figure.axes[0].collections]
    np.testing.assert_array_equal(dots[0], batch.support.y[0])


def test_picture_of_several_classes(tmp_path):
    batch = batch_of(classes_of(4))
    posterior = adapted(Categorical(4), batch)
    figure = bm.plot_forecast(posterior, batch, num_samples=50, y_label="chance", path=tmp_path / "classes.png")
    assert set(legend(figure)) == {"support", "query", "class 0", "class 1", "class 2", "class 3"}
    lines = np.stack([line.get_ydata() for line in figure.axes[0].lines])
    np.testing.assert_allclose(lines.sum(0), 1.0, rtol=1e-6)
    assert figure.get_supylabel() == "chance"
    assert (tmp_path / "classes.png").stat().st_size > 0
    colours = [tuple(line.get_color() for line in axis.lines) for axis in figure.axes if axis.get_visible()]
    assert len(set(colours)) == 1
    with pytest.raises(errors.UnsupportedError, match="colours for 10 classes; this likelihood has 11"):
        bm.plot_forecast(adapted(Categorical(11), batch, bm.MAML), batch)


def test_picture_of_counts():
    batch = batch_of(counts_of)
    figure = bm.plot_forecast(adapted(Poisson(), batch), batch, num_samples=50)
    assert set(legend(figure)) == {"support", "query", "predictive mean", "50% interval", "90% interval"}
    band = figure.axes[0].collections[-1].get_paths()[0].vertices[:, 1]
    assert np.array_equal(band, band.round())
