"""Calibration against known truths: exact, over- and under-confident forecasts are called by their names."""

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
import torchmetrics.functional.classification as tm
from forecast_cases import FACTORS, Counts, Labels, Linear, label_tasks, linear_tasks

import bayesmeta as bm
from bayesmeta.diagnostics import uniformity
from bayesmeta.diagnostics.reliability import reliability
from bayesmeta.errors import DataError, EmptyTaskError, NonFiniteDataError, OptionError, ShapeError

F64 = torch.float64
NAMES = ("calibrated", "over-confident", "under-confident")


def three_linear(closed, num_tasks=300):
    tasks, batch = linear_tasks(num_tasks, seed=4)
    return [bm.calibration(Linear(tasks, batch.support, f, closed=closed), batch, num_samples=300) for f in FACTORS]


@pytest.fixture(scope="module")
def linear():
    return three_linear(True)


@pytest.fixture(scope="module")
def from_draws():
    return three_linear(False)


@pytest.fixture(scope="module")
def classes():
    batch, logits = label_tasks(400, seed=1)
    return [bm.calibration(Labels(batch.support, logits, f), batch) for f in (1.0, 2.0, 0.5)]


@pytest.fixture(scope="module")
def counts():
    generator = torch.Generator().manual_seed(3)
    rate = (torch.randn(300, 1, generator=generator, dtype=F64)).exp().expand(300, 6)
    y = torch.poisson(rate, generator)
    x = torch.arange(6, dtype=F64).reshape(1, 6, 1).expand(300, 6, 1)
    batch = bm.TaskBatch(bm.Observations(x, y), bm.Observations(x, y))

    def poisson(rate, generator):
        return torch.poisson(rate, generator)

    def narrow(rate, generator):  # binomial, of a third of the variance or so
        n = (1.5 * rate).ceil()
        return torch.binomial(n, rate / n, generator=generator)

    def wide(rate, generator):
        return torch.poisson(rate * 2 * torch._standard_gamma(torch.full_like(rate, 0.5), generator), generator)

    return [bm.calibration(Counts(batch.support, rate, d), batch, num_samples=300) for d in (poisson, narrow, wide)]


# -- the three posteriors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "from_draws", "classes", "counts"])
def test_each_is_called_by_its_name(kind, request):
    results = request.getfixturevalue(kind)
    assert tuple(r.finding for r in results) == NAMES
    exact, confident, diffident = results
    assert exact["p_value"] > 0.01
    assert max(confident["p_value"], diffident["p_value"]) < 1e-6
    for name, result in zip(NAMES, results, strict=True):
        assert name in result.verdict.split("(p =")[0]
        assert str(result).startswith(result.verdict)
    error = "ece_adaptive" if kind == "classes" else "calibration_error"
    assert min(confident[error], diffident[error]) > 2 * exact[error]


def test_coverage_of_numbers(linear):
    exact, confident, diffident = linear
    for p in (50, 90):
        name = f"coverage_{p}"
        assert abs(exact[name] - p / 100) < 4 * exact.standard_errors[name]
        assert confident[name] < p / 100 - 4 * confident.standard_errors[name]
        assert diffident[name] > p / 100 + 4 * diffident.standard_errors[name]
    assert exact["calibration_error"] < 3 * exact["calibration_noise"]
    assert confident["calibration_error"] > 5 * confident["calibration_noise"]
    assert (exact.coverage - exact.levels).abs().max() < 5 * exact.coverage_errors.max()
    assert (exact.coverage.diff() >= 0).all()


def test_coverage_is_that_of_the_scores():
    tasks, batch = linear_tasks(50, seed=4)
    posterior = Linear(tasks, batch.support, 0.7)
    found, scores = bm.calibration(posterior, batch), bm.scores(posterior, batch)
    for name in ("coverage_50", "coverage_90"):
        assert found[name] == pytest.approx(scores[name])
        assert found.standard_errors[name] == pytest.approx(scores.standard_errors[name])
    index = found.levels.tolist().index(0.9)
    torch.testing.assert_close(found.per_task["coverage"][:, index], scores.per_task["coverage_90"])


def test_pit_and_error_by_hand():
    tasks, batch = linear_tasks(20, seed=5)
    posterior = Linear(tasks, batch.support)
    closed = posterior.predictive(batch.query)
    result = bm.calibration(posterior, batch, levels=(0.1, 0.4, 0.8))
    pit = scipy.stats.norm.cdf(batch.query.y, closed.mean, closed.stddev)
    torch.testing.assert_close(result.pit, torch.as_tensor(pit))
    shares = [(pit <= p).mean() - p for p in (0.1, 0.4, 0.8)]
    assert result["calibration_error"] == pytest.approx(math.sqrt(sum(s**2 for s in shares) / 3))
    assert list(result.levels) == [0.1, 0.4, 0.8]


def test_shifted_forecasts_are_too_low_or_too_high():
    tasks, batch = linear_tasks(400, seed=6)
    for shift, finding in ((-0.3, "too low"), (0.3, "too high")):
        result = bm.calibration(Linear(tasks, batch.support, shift=shift), batch, alpha=1e-4)
        assert result.finding == finding
        assert result["p_location"] < 1e-5


def test_tasks_are_the_clusters():
    """Under calibration few are accused; treating the points as independent would accuse many."""
    cluster, naive = [], []
    for seed in range(150):
        tasks, batch = linear_tasks(25, seed=seed, shots=1, query=20, noise=0.1)
        result = bm.calibration(Linear(tasks, batch.support), batch)
        cluster.append(result["p_value"])
        naive.append(uniformity.shape_of(uniformity.legendre(result.pit.flatten())).p_value)
    accused = sum(p < 0.05 for p in cluster)
    assert accused <= 150 * 0.05 + 5 * math.sqrt(150 * 0.05 * 0.95)
    assert sum(p < 0.05 for p in naive) > 50, "control"


def test_pit_of_draws_and_counts_is_uniform_and_without_randomness_it_is_not(counts):
    pit = counts[0].pit[:, 0]
    assert scipy.stats.kstest(pit, "uniform").pvalue > 1e-3
    forecast = bm.diagnostics.forecasts.SampleForecast(torch.zeros(9, 1, 400, dtype=F64), True)
    zeros = torch.zeros(1, 400, dtype=F64)
    flat = forecast.pit(zeros, torch.rand(1, 400, dtype=F64, generator=torch.Generator().manual_seed(0)))
    assert scipy.stats.kstest(flat.flatten(), "uniform").pvalue > 1e-3
    assert (forecast.pit(zeros, zeros) == 0).all(), "control"


# -- classes ------------------------------------------------------------------------------------------------------


def test_ece_and_mce_against_torchmetrics():
    batch, logits = label_tasks(60, seed=2)
    result = bm.calibration(Labels(batch.support, logits, 2.0), batch, num_bins=12)
    p, y = (2 * logits).softmax(-1).flatten(0, 1), batch.query.y.flatten().long()
    for name, norm in (("ece", "l1"), ("mce", "max")):
        expected = tm.multiclass_calibration_error(p, y, num_classes=4, n_bins=12, norm=norm)
        assert result[name] == pytest.approx(expected.item(), rel=1e-5)


def test_bins_by_hand():
    confidence = torch.tensor([0.05, 0.5, 0.5, 0.75, 0.9, 1.0], dtype=F64)
    hit = torch.tensor([0.0, 1, 0, 1, 1, 0], dtype=F64)
    task = torch.arange(6)
    equal = reliability(confidence, hit, task, num_bins=4)
    assert equal.low.tolist() == [0.0, 0.5, 0.75]
    assert equal.share.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert equal.accuracy.tolist() == pytest.approx([0, 0.5, 2 / 3])
    assert equal.ece == pytest.approx(0.05 / 6 + 0 + 0.5 * (2.65 / 3 - 2 / 3))
    assert equal.mce == pytest.approx(2.65 / 3 - 2 / 3)
    adaptive = reliability(confidence, hit, task, num_bins=3, adaptive=True)
    assert adaptive.share.tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])  # 0.5 and 0.5 stay together, from 0.5 on
    assert adaptive.low.tolist() == [0.0, 0.5, 0.9]


def test_adaptive_bins_hold_equally_many():
    confidence = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=F64) ** 5
    diagram = reliability(confidence, (confidence > 0.3).double(), torch.arange(1000), num_bins=10, adaptive=True)
    torch.testing.assert_close(diagram.share, torch.full((10,), 0.1, dtype=F64))


def test_bin_errors_are_the_spread_over_repetitions():
    gaps, claimed = [], []
    for seed in range(200):
        batch, logits = label_tasks(40, seed=seed, query=10, spread=1.0)
        diagram = bm.calibration(Labels(batch.support, logits), batch, num_bins=2).equal
        gaps.append(diagram.accuracy - diagram.confidence)
        claimed.append(diagram.errors)
    ratio = torch.stack(gaps).std(0) / torch.stack(claimed).mean(0)
    assert ((ratio > 0.8) & (ratio < 1.25)).all()  # 200 repetitions know a spread to 5%


def test_constant_probabilities():
    batch, logits = label_tasks(50, seed=3)
    result = bm.calibration(Labels(batch.support, torch.zeros_like(logits)), batch)
    assert result["confidence"] == pytest.approx(0.25)
    assert len(result.equal.share) == len(result.adaptive.share) == 1


# -- uniformity ---------------------------------------------------------------------------------------------------


def test_moments_are_orthonormal():
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    values = uniformity.legendre(u)
    torch.testing.assert_close(values.mean(0), torch.zeros(4, dtype=F64), atol=1e-6, rtol=0)
    torch.testing.assert_close(values.mT @ values / 20_000, torch.eye(4, dtype=F64), atol=1e-6, rtol=0)


def test_t_test_against_scipy():
    values = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.2
    for column in values.mT:
        mean, p = uniformity.t_test(column)
        assert mean == pytest.approx(column.mean().item())
        assert p == pytest.approx(scipy.stats.ttest_1samp(column, 0.0).pvalue)
    assert uniformity.bonferroni([0.2, 0.01]) == 0.02
    assert uniformity.bonferroni([0.9, 0.8]) == 1.0
    assert math.isnan(uniformity.bonferroni([0.2, math.nan]))


# -- what counts, and bad input -----------------------------------------------------------------------------------


def test_padding_does_not_count():
    tasks, batch = linear_tasks(12, seed=7)
    mask = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[3] = False
    ids = torch.arange(12)
    ids[5] = -1
    y = torch.where(mask, batch.query.y, 1e6)
    padded = replace(batch, query=replace(batch.query, y=y, mask=mask), task_id=ids)
    result = bm.calibration(Linear(tasks, batch.support), padded)
    assert result.num_tasks == 10
    assert result.pit.isnan().equal(~mask | (ids < 0).unsqueeze(-1))
    whole = bm.calibration(Linear(tasks, batch.support), batch)
    kept = ~result.pit.isnan()
    torch.testing.assert_close(result.pit[kept], whole.pit[kept])
    by_hand = torch.stack([(2 * p[k] - 1).abs().le(0.9).double().mean() for p, k in zip(whole.pit, kept) if k.any()])
    assert result["coverage_90"] == pytest.approx(by_hand.mean().item())


def test_few_tasks_are_unknown():
    for count in (1, 2):
        tasks, batch = linear_tasks(count)
        result = bm.calibration(Linear(tasks, batch.support), batch)
        assert result.finding == "unknown"
        assert "3 are the least" in result.verdict
        batch, logits = label_tasks(count)
        assert bm.calibration(Labels(batch.support, logits), batch).finding == "unknown"
    tasks, batch = linear_tasks(3)
    assert bm.calibration(Linear(tasks, batch.support), batch).finding == "calibrated"


def test_constant_and_certain_forecasts_are_over_confident():
    tasks, batch = linear_tasks(40)
    result = bm.calibration(Linear(tasks, batch.support, factor=1e-9), batch)
    assert result.finding == "over-confident"
    assert result["coverage_90"] == 0
    exact = bm.diagnostics.forecasts.NormalForecast(torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64))
    y = torch.tensor([-1.0, 0.0, 1.0], dtype=F64)
    assert exact.pit(y, torch.full((3,), 0.3, dtype=F64)).tolist() == [0.0, 0.3, 1.0]


def test_several_outputs_count_together():
    tasks, batch = linear_tasks(30)
    two = torch.stack([batch.query.y, batch.query.y], -1)
    pit = bm.calibration(Linear(tasks, batch.support), batch).pit

    class Two(Linear):
        def predictive(self, x, *, joint=False):
            one = super().predictive(x, joint=joint)
            scale = torch.stack([one.stddev, 0.5 * one.stddev], -1)
            return type(one)(torch.stack([one.mean] * 2, -1), scale).to_event(1)

    support = replace(batch.support, y=torch.stack([batch.support.y] * 2, -1))
    other = Two(tasks, batch.support)
    other.support = support
    result = bm.calibration(other, bm.TaskBatch(support, replace(batch.query, y=two)))
    torch.testing.assert_close(result.pit[..., 0], pit)
    assert result.pit.shape == (30, 6, 2)


def test_errors_are_typed():
    tasks, batch = linear_tasks(4)
    posterior = Linear(tasks, batch.support)
    for options, match in (
        ({"levels": ()}, "levels"),
        ({"levels": (0.5, 1.0)}, "levels"),
        ({"levels": (0.5, 0.4)}, "levels"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"num_samples": 1}, "num_samples=1"),
    ):
        with pytest.raises(OptionError, match=match):
            bm.calibration(posterior, batch, **options)
    with pytest.raises(ShapeError, match="3 tasks"):
        bm.calibration(posterior, batch.tasks([0, 1, 2]))
    with pytest.raises(DataError, match="y=None"):
        bm.calibration(posterior, replace(batch, query=batch.query.with_y(None)))
    with pytest.raises(EmptyTaskError):
        bm.calibration(posterior, replace(batch, task_id=torch.full((4,), -1)))
    with pytest.raises(OptionError, match="TaskBatch"):
        bm.calibration(posterior, batch.query)
    posterior.mean[2] = math.nan
    posterior.closed = False
    with pytest.raises(NonFiniteDataError, match="task 2"):
        bm.calibration(posterior, batch)
    batch, logits = label_tasks(4)
    with pytest.raises(OptionError, match="num_bins=0"):
        bm.calibration(Labels(batch.support, logits), batch, num_bins=0)
    with pytest.raises(DataError, match="outside the support"):
        bm.calibration(Labels(batch.support, logits[..., :2]), batch)
    with pytest.raises(ShapeError, match="one length"):
        reliability(torch.ones(3), torch.ones(2), torch.arange(3))
    with pytest.raises(EmptyTaskError):
        reliability(torch.ones(0), torch.ones(0), torch.arange(0))


# -- results ------------------------------------------------------------------------------------------------------


def test_results_are_mappings_of_plain_numbers(linear, classes):
    for result in (linear[0], classes[0]):
        flat = result.to_dict()
        assert set(result) < set(flat)
        assert len(result) == len(list(result))
        assert all(type(v) in (float, int, str) for v in flat.values())
        assert flat["verdict"] == result.verdict


def test_pictures(linear, classes, tmp_path):
    figure = linear[0].plot(tmp_path / "one.png")
    assert [a.get_title() for a in figure.axes] == ["coverage", "PIT values"]
    assert (tmp_path / "one.png").stat().st_size > 10_000
    figure = bm.plot_calibration(dict(zip(NAMES, linear, strict=True)))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(NAMES)
    line = figure.axes[0].get_lines()[1]
    assert line.get_ydata().tolist() == linear[0].coverage.tolist()
    figure = bm.plot_calibration(dict(zip(NAMES, classes, strict=True)))
    assert len(figure.axes) == 2
    for bad, match in (({}, "0 results"), ({"a": linear[0], "b": classes[0]}, "Calibration, ClassCalibration")):
        with pytest.raises(OptionError, match=match):
            bm.plot_calibration(bad)
    with pytest.raises(OptionError, match="bins=1"):
        bm.plot_calibration(linear[0], bins=1)
    with pytest.raises(OptionError, match="suffix"):
        linear[0].plot(tmp_path / "one.wrong")
