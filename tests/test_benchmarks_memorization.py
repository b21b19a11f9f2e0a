"""The benchmark on memorisation: its test tasks, an oracle's error, rows, ratios and bars."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import memorization as benchmark
from benchmarks.harness import Row
from benchmarks.runs import named_bars, over_trainings


class Oracle:
    """Least squares of the amplitude on the support: knows that the phase is 0, and reads no code."""

    def adapt(self, support, generator=None):
        sine = support.x[..., 0].sin()
        self.amplitude = (sine * support.y).sum(-1, keepdim=True) / sine.square().sum(-1, keepdim=True)
        return self

    def predictive(self, query):
        return torch.distributions.Normal(self.amplitude * query.x[..., 0].sin(), 0.1)


class Reader:
    """Predicts the amplitude that the code tells, as a network that has memorised does."""

    def adapt(self, support, generator=None):
        self.amplitude = support.x[:, :1, 1:] @ torch.linspace(0.1, 4.0, 20)
        return self

    def predictive(self, query):
        return torch.distributions.Normal(self.amplitude * query.x[..., 0].sin(), 0.1)


def test_what_can_be_had_and_what_memorising_gives():
    """The noise is 0.01 of the error, and an amplitude of five points adds little; the code is worth less than 0."""
    for shots in (5, 10):
        batch = benchmark.fresh_tasks(shots, 4000, 0)
        found = benchmark.squared_errors(Oracle(), batch)
        assert found.shape == (4000,)
        assert 0.0105 < found.median() < 0.013
        memorised = benchmark.squared_errors(Reader(), batch)
        # two independent amplitudes: half of the squared difference, on average
        grid, uniform = torch.linspace(0.1, 4.0, 20, dtype=torch.float64), 3.9**2 / 12
        expected = 0.01 + 0.5 * (uniform + grid.var(correction=0) + 0.0) * (1 - torch.tensor(10.0).sin() / 10)
        assert abs(memorised.mean() - expected) < 4 * memorised.std() / 4000**0.5


def test_test_tasks_are_fresh():
    one, two = (benchmark.fresh_tasks(5, 8, seed) for seed in (0, 1))
    assert (one.query.x[..., 0] - two.query.x[..., 0]).abs().min() > 0


@pytest.mark.parametrize("name", list(benchmark.RUNS))
def test_rows_of_a_short_run(name):
    rows = {row.name: row for row in benchmark.measure(name, 0, 2, 4, 1, True)}
    assert set(rows) == {f"{name}_k5_mse", f"{name}_k10_mse", f"{name}_seconds"}
    assert rows[f"{name}_k5_mse"].reference == benchmark.RUNS[name].reference.get(5)
    assert rows[f"{name}_k5_mse"].standard_error > 0
    judged = name in ("mr_maml_w", "mr_maml_a")
    assert rows[f"{name}_k5_mse"].passes is (False if judged else None), "two steps are not enough"
    assert benchmark.measure(name, 0, 1, 4, 1, False)[0].bar is None


def test_ratios_to_maml_and_means_over_trainings():
    trainings = [
        [Row("maml_k5_mse", 0.4, standard_error=0.04), Row("mr_maml_w_k5_mse", 0.1, standard_error=0.01)],
        [Row("maml_k5_mse", 0.6, standard_error=0.04), Row("mr_maml_w_k5_mse", 0.3, standard_error=0.01)],
    ]
    rows = over_trainings(trainings, named_bars(benchmark.RUNS))
    assert [row.ours for row in rows] == pytest.approx([0.5, 0.2])
    assert [row.standard_error for row in rows] == pytest.approx([0.1, 0.1])
    assert rows[1].passes is True
    (ratio,) = benchmark.against_maml(rows, True)
    assert (ratio.name, ratio.passes) == ("mr_maml_w_against_maml_k5", True)
    assert ratio.ratio == pytest.approx(0.4)
    assert ratio.standard_error == pytest.approx(0.4 * (0.2**2 + 0.5**2) ** 0.5)
    worse = benchmark.against_maml(trainings[1], True)
    assert worse[0].ratio == pytest.approx(0.5)
    assert benchmark.against_maml([Row("maml_k5_mse", 0.3), Row("mr_maml_a_k5_mse", 0.2)], True)[0].passes is False
    assert benchmark.against_maml(rows, False)[0].bar is None
    assert over_trainings(trainings[:1], named_bars(benchmark.RUNS)) == trainings[0]


def test_a_training_that_diverged_is_told():
    rows = [Row("maml_trains", None, bar="finite loss", passes=False)]
    found = over_trainings([rows, [Row("maml_k5_mse", 0.3)]], {})
    assert {row.name: row.passes for row in found} == {"maml_trains": False, "maml_k5_mse": None}


def test_flags():
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    args = parser.parse_args(["--runs", "nothing"])
    args.seed, args.quick = 0, True
    with pytest.raises(SystemExit, match="unknown run nothing"):
        benchmark.run(args)
