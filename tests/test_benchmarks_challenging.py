"""The benchmark on challenging sinusoids: scores against a predictor whose error is known, rows and bars."""

from __future__ import annotations

import argparse

import pytest
import torch

import bayesmeta as bm
from benchmarks import challenging_sinusoid as benchmark
from benchmarks.harness import Row
from benchmarks.runs import named_bars, over_trainings, score_tasks


class BestLinear:
    """The best predictor that is linear in y: Gaussian conditioning under the family's true covariance."""

    is_point, target_kind, variance = False, "real", 0.1**2 + 0.1 * 4.9 + 4.9**2 / 3

    def adapt(self, support, generator=None):
        posterior = BestLinear()
        posterior.support, posterior.num_tasks = support, support.num_tasks
        return posterior

    def kernel(self, a, b):
        gap = (a.double() - b.double().mT).abs().clamp(min=1e-9)
        return 0.5 * self.variance * ((2 * gap).sin() - (0.5 * gap).sin()) / (1.5 * gap)

    def predictive(self, x, *, joint=False):
        x = x.x
        noise = 1e-4 * self.variance
        known = self.support.x
        gram = self.kernel(known, known) + noise * torch.eye(known.shape[1], dtype=torch.float64)
        cross = self.kernel(x, known)
        gain = torch.linalg.solve(gram, cross.mT).mT
        mean = (gain @ self.support.y.double().unsqueeze(-1)).squeeze(-1)
        covariance = self.kernel(x, x) - gain @ cross.mT + noise * torch.eye(x.shape[1], dtype=torch.float64)
        if joint:
            return torch.distributions.MultivariateNormal(mean, covariance)
        return torch.distributions.Normal(mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt())


def score(method, shots, num_tasks, seed, draws=10, **options):
    return score_tasks(method, benchmark.fresh_tasks(shots, num_tasks, seed), seed, draws, **options)


def test_the_best_linear_predictor_has_its_known_error():
    """1.08 / 0.119 / 0.009 at 5 / 10 / 20 shots, as stated; the last is a mean with a heavy tail, and near 0.01."""
    for shots, known in ((5, 1.08), (10, 0.119)):
        found = score(BestLinear(), shots, 400, 0, 10)
        mse = found["mse"]
        assert abs(mse.mean() - known) < 4 * mse.std() / 400**0.5
        assert mse.std() / 400**0.5 < 0.2 * known, "the check can see a difference"
        assert set(found) == {"mse", "nll", "joint_nll", "crps", "coverage90"}
        assert all(value.shape == (400,) for value in found.values())
    assert score(BestLinear(), 20, 200, 0, 10)["mse"].mean() < 0.03


def test_test_tasks_are_fresh():
    """No seed's tests are another's, and the order of the chunks does not matter."""
    a, b = (score(BestLinear(), 5, 40, 0, 10, chunk=chunk) for chunk in (40, 7))
    torch.testing.assert_close(a, b)
    assert (score(BestLinear(), 5, 40, 1, 10)["mse"] - a["mse"]).abs().min() > 0


@pytest.mark.parametrize("name", list(benchmark.RUNS))
def test_rows_of_a_short_run(name):
    rows = {row.name: row for row in benchmark.measure(name, 0, 2, 4, 1, True)}
    kinds = ("mse", "median_mse", "nll", "joint_nll", "crps", "coverage90")
    expected = {f"{name}_k{k}_{kind}" for k in (5, 10, 20) for kind in kinds}
    assert set(rows) == expected | {f"{name}_seconds"}
    judged = {row for row in rows if rows[row].bar is not None}
    assert judged == {f"{name}_{row}" for row in benchmark.RUNS[name].bars}
    assert rows[f"{name}_k5_mse"].reference == 0.867
    if name.startswith("last_layer"):
        assert rows[f"{name}_k10_mse"].passes is False  # two steps are not enough
        assert rows[f"{name}_k10_mse"].standard_error > 0


def test_flags():
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    args = parser.parse_args(["--runs", "maml", "nothing"])
    args.seed, args.quick = 0, True
    with pytest.raises(SystemExit, match="unknown run nothing"):
        benchmark.run(args)


def made_up(**figures):
    return [Row(name, value, standard_error=1.0) for name, value in figures.items()]


def test_trainings_are_averaged_and_paired_with_maml():
    trainings = [
        made_up(maml_k5_mse=2.0, maml_k5_nll=1.5, bmaml_k5_mse=1.8, bmaml_k5_nll=1.6),
        made_up(maml_k5_mse=3.0, maml_k5_nll=1.5, bmaml_k5_mse=2.6, bmaml_k5_nll=1.6),
    ]
    rows = {row.name: row for row in over_trainings(trainings, named_bars(benchmark.RUNS))}
    assert rows["maml_k5_mse"].ours == pytest.approx(2.5)
    assert rows["maml_k5_mse"].standard_error == pytest.approx(0.5)
    assert rows["maml_k5_mse"].passes is True
    assert rows["bmaml_k5_mse"].passes is False
    assert rows["maml_k5_nll"].bar is None
    gaps = {row.name: row for row in benchmark.against_maml(trainings, True)}
    assert set(gaps) == {"bmaml_against_maml_k5_mse", "bmaml_against_maml_k5_nll"}
    gap = gaps["bmaml_against_maml_k5_mse"]
    assert (gap.difference, gap.passes) == (pytest.approx(-0.3), True)
    assert gap.standard_error == pytest.approx(0.1)
    assert gaps["bmaml_against_maml_k5_nll"].passes is False
    assert over_trainings(trainings[:1], named_bars(benchmark.RUNS)) == trainings[0]
    assert benchmark.against_maml(trainings[:1], True)[0].standard_error is None


@pytest.mark.slow
def test_a_short_mixture_beats_the_best_linear_predictor():
    """600 steps, half a minute, are enough where linear methods must fail: 10 shots."""
    method, _ = benchmark.train("last_layer_mixture", 3, 600)
    mixture = score(method, 10, 300, 5, 20)["mse"]
    linear = score(BestLinear(), 10, 300, 5, 20)["mse"]
    assert mixture.median() < 0.5 * linear.median()
    assert bm.BayesianLastLayerMixture is type(method)
