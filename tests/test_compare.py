"""Comparisons of methods: equals are told apart as rarely as they should, better ones are found."""

import math

import matplotlib.image
import pytest
import torch
from forecast_cases import Labels as LabelPosterior
from forecast_cases import Linear, label_tasks, linear_tasks
from scipy.stats import kstest, ttest_rel

import bayesmeta as bm
from bayesmeta.errors import DataError, EmptyTaskError, OptionError, ShapeError

F64 = torch.float64


def made(per_task, name="nll"):
    """Scores by hand."""
    counted = per_task[~per_task.isnan()]
    mean, error = counted.mean().item(), counted.std().item() / math.sqrt(len(counted))
    if name == "rmse":
        square = counted.square()
        mean = square.mean().sqrt().item()
        error = (square.std() / math.sqrt(len(counted)) / (2 * mean)).item()
    return bm.Scores({name: mean}, {name: error}, {name: per_task}, len(counted), 0, True)


def p_values(num_simulations, tasks=15):
    """p-values of equally good posteriors (off by as much, to either side), beside a wrong way to get one."""
    family, batch = linear_tasks(num_simulations * tasks)
    high, low = (Linear(family, batch.support, shift=s) for s in (0.7, -0.7))
    per_task = [bm.scores(p, batch).per_task["nll"].split(tasks) for p in (high, low)]
    points = [-p.predictive(batch.query).log_prob(batch.query.y) for p in (high, low)]
    as_points = ttest_rel(*(v.reshape(num_simulations, -1) for v in points), axis=1).pvalue
    paired = [bm.compare({"a": made(a), "b": made(b)}).p_values[0, 1].item() for a, b in zip(*per_task, strict=True)]
    return paired, as_points


def test_equals_have_uniform_p_values():
    paired, as_points = p_values(500)
    assert kstest(paired, "uniform").pvalue > 0.001
    assert kstest(as_points, "uniform").pvalue < 1e-6, "control: points are no independent evidence"
    assert sum(p < 0.05 for p in as_points) > 2 * 0.05 * len(as_points)


def test_differences_of_equals_are_as_large_as_their_standard_error():
    generator = torch.Generator().manual_seed(0)
    z, alone = [], []
    for _ in range(1000):
        hard = 3 * torch.randn(40, generator=generator, dtype=F64)
        a, b = (hard + torch.randn(40, generator=generator, dtype=F64) for _ in range(2))
        found = bm.compare({"a": made(a), "b": made(b)})
        i, j = found.names.index("a"), found.names.index("b")
        z.append((found.differences[i, j] / found.difference_errors[i, j]).item())
        alone.append((found.differences[i, j] / found.standard_errors.square().sum().sqrt()).item())
    z, alone = torch.tensor(z), torch.tensor(alone)
    assert z.mean().abs() < 4 / math.sqrt(1000)
    assert abs(z.std().item() - math.sqrt(39 / 37)) < 4 / math.sqrt(2000), "the sd of t with 39 degrees of freedom"
    assert alone.std() < 0.5, "control: unpaired errors are far too large"


def test_the_truth_is_found_and_the_numbers_are_those_of_scipy():
    family, batch = linear_tasks(200, seed=3)
    methods = {f"x{f}": Linear(family, batch.support, f) for f in (2.0, 1.0, 0.5)}
    for score in ("nll", "crps", "interval_90", "nll_joint"):
        found = bm.compare(methods, batch, score=score)
        assert found.names[0] == "x1.0"
        assert found.not_worse() == ("x1.0",)
        assert (found.differences[1:, 0] > 0).all()
    each = {name: bm.scores(p, batch).per_task["nll_joint"] for name, p in methods.items()}
    for i, first in enumerate(found.names):
        for j, second in enumerate(found.names):
            torch.testing.assert_close(found.differences[i, j], (each[first] - each[second]).mean())
            if i != j:
                expected = ttest_rel(each[first].numpy(), each[second].numpy()).pvalue
                assert found.p_values[i, j].item() == pytest.approx(expected, rel=1e-6)
    energy = bm.compare(methods, batch, score="energy", num_samples=100)
    assert energy.names[0] == "x1.0"


def test_rmse_is_compared_by_the_roots_of_mean_squares():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(500, generator=generator, dtype=F64) * k for k in (1.0, 1.3))
    found = bm.compare({"a": made(a, "rmse"), "b": made(b, "rmse")}, score="rmse")
    assert found.names == ("a", "b")
    value = found.differences[1, 0].item()
    assert value == pytest.approx(b.square().mean().sqrt().item() - a.square().mean().sqrt().item(), rel=1e-12)
    rows = torch.randint(500, (2000, 500), generator=generator)
    spread = (b[rows].square().mean(1).sqrt() - a[rows].square().mean(1).sqrt()).std().item()
    assert found.difference_errors[1, 0].item() == pytest.approx(spread, rel=5 / math.sqrt(2 * 2000) + 0.02)
    assert abs((b - a).mean().item() - value) > 0.01, "control: the mean of each task's own root is another number"


def test_holm_by_hand_and_its_error_rate():
    from bayesmeta.diagnostics.compare import _holm

    p = torch.tensor([[1.0, 0.01, 0.04], [0.01, 1.0, 0.03], [0.04, 0.03, 1.0]], dtype=F64)
    expected = torch.tensor([[1.0, 0.03, 0.06], [0.03, 1.0, 0.06], [0.06, 0.06, 1.0]], dtype=F64)
    torch.testing.assert_close(_holm(p), expected)
    generator = torch.Generator().manual_seed(0)
    wrong = raw = 0
    for _ in range(300):
        found = bm.compare({str(k): made(torch.randn(30, generator=generator, dtype=F64)) for k in range(5)})
        wrong += bool((found.adjusted_p_values < 0.05).any())
        raw += bool((found.p_values < 0.05).any())
    assert wrong <= 300 * 0.05 + 4 * math.sqrt(300 * 0.05 * 0.95)
    assert raw > 300 * 0.15, "control: ten tests find something too often"


def test_accuracy_is_better_when_larger_and_identical_methods_tie():
    batch, logits = label_tasks(100)
    good, bad = LabelPosterior(batch.support, logits), LabelPosterior(batch.support, -logits)
    found = bm.compare({"bad": bad, "good": good, "same": good}, batch, score="accuracy")
    assert found.more_is_better
    assert found.names == ("good", "same", "bad")
    assert found.not_worse() == ("good", "same")
    assert found.p_values[0, 1] == 1.0
    assert found.difference_errors[0, 1] == 0.0


def test_tasks_without_a_score_do_not_count(tmp_path):
    a, b = torch.arange(6.0, dtype=F64), torch.tensor([1.0, 0, 3, 2, 9, 4], dtype=F64)
    a[2] = b[2] = math.nan
    found = bm.compare({"b": made(b), "a": made(a)})
    assert found.num_tasks == 5
    row = found.to_dict()
    assert list(row) == ["a", "b"]
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert row["b"]["difference"] == pytest.approx((b - a)[keep].mean().item())
    text = str(found)
    assert "5 tasks" in text
    assert "less is better" in text
    found.plot(tmp_path / "compare.png")
    assert matplotlib.image.imread(tmp_path / "compare.png").std() > 0


def test_the_picture_shows_the_numbers():
    generator = torch.Generator().manual_seed(2)
    found = bm.compare({k: made(torch.randn(50, generator=generator, dtype=F64) + 2 * i) for i, k in enumerate("abc")})
    left, right = bm.plot_compare(found).axes
    drawn = sorted(v for line in right.lines if line.get_marker() == "o" for v in line.get_xdata())
    assert drawn == pytest.approx(sorted(found.differences[:, 0].tolist()))
    assert [t.get_text() for t in left.get_yticklabels()] == list(found.names) == ["a", "b", "c"]
    with pytest.raises(OptionError, match="suffix"):
        bm.plot_compare(found, path="picture.nonsense")


def test_errors_are_typed():
    family, batch = linear_tasks(4)
    exact = Linear(family, batch.support)
    with pytest.raises(OptionError, match="at least two"):
        bm.compare({"one": exact}, batch)
    with pytest.raises(OptionError, match="give the batch"):
        bm.compare({"a": exact, "b": exact})
    with pytest.raises(OptionError, match="is a float"):
        bm.compare({"a": 1.0, "b": exact}, batch)
    with pytest.raises(OptionError, match="no better or worse"):
        bm.compare({"a": exact, "b": exact}, batch, score="coverage_90")
    with pytest.raises(OptionError, match="not among"):
        bm.compare({"a": exact, "b": exact}, batch, score="accuracy")
    some = made(torch.arange(4.0, dtype=F64))
    with pytest.raises(ShapeError, match="4 tasks and 'b' of 5"):
        bm.compare({"a": some, "b": made(torch.arange(5.0, dtype=F64))})
    with pytest.raises(DataError, match="Other tasks count"):
        bm.compare({"a": some, "b": made(torch.tensor([0.0, math.nan, 1.0, 2.0], dtype=F64))})
    units = bm.Scores({"nll": 1.5}, {"nll": 0.1}, some.per_task, 4, 0, False)
    with pytest.raises(OptionError, match="other units"):
        bm.compare({"a": some, "b": units})
    one = torch.tensor([1.0, math.nan], dtype=F64)
    lone = bm.Scores({"nll": 1.0}, {"nll": math.nan}, {"nll": one}, 1, 0, True)
    with pytest.raises(EmptyTaskError, match="at least two tasks"):
        bm.compare({"a": lone, "b": lone})
    with pytest.raises(OptionError, match="level"):
        bm.compare({"a": some, "b": some}).not_worse(2.0)
