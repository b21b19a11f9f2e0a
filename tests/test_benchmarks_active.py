"""The benchmark of active choice: tasks, curves against a learner that is known, rows, the choice of the method."""

from __future__ import annotations

import argparse

import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from benchmarks import active as benchmark
from benchmarks.harness import Row


class Nearest:
    """Predicts the label nearest in x; the more unsure, the farther that is. So variance spreads labels evenly."""

    def adapt(self, support, generator=None):
        posterior = Nearest()
        posterior.support, posterior.num_tasks = support, support.num_tasks
        posterior.is_point, posterior.target_kind, posterior.num_draws = False, "real", None
        return posterior

    def predictive(self, x, *, joint=False):
        gap = (x.x - self.support.x.mT).abs()
        mean = self.support.y.gather(1, gap.argmin(-1))
        variance = 0.01 + gap.min(-1).values
        return (
            dist.MultivariateNormal(mean, torch.diag_embed(variance)) if joint else dist.Normal(mean, variance.sqrt())
        )


def test_tasks_are_fresh_and_their_parts_apart():
    tasks, other = benchmark.Tasks.fresh(5, 1), benchmark.Tasks.fresh(5, 2)
    batch = tasks.batch
    assert batch.support.x.shape == (5, benchmark.START, 1)
    assert tasks.pool.x.shape == (5, benchmark.POOL, 1)
    assert batch.query.x.shape == (5, benchmark.QUERY, 1)
    assert (tasks.pool.x - batch.query.x.mT).abs().min() > 0
    assert (tasks.pool.x - other.pool.x).abs().min() > 0
    parts = tasks.split(2)
    assert [part.batch.num_tasks for part in parts] == [2, 2, 1]
    assert torch.cat([part.pool.y for part in parts]).equal(tasks.pool.y)


def test_curves_of_a_learner_that_is_known():
    """All curves begin alike; labels spread evenly are worth more to it; pieces of any size give the same."""
    tasks = benchmark.Tasks.fresh(40, 3)
    variance = benchmark.Curves.of(Nearest(), tasks, 0, "variance", 2)
    random = benchmark.Curves.of(Nearest(), tasks, 0, "random", 2)
    assert variance.labels == random.labels == list(range(1, 11))
    torch.testing.assert_close(variance.chosen[0], random.chosen[0])
    gap = variance.chosen[-1] - variance.random[-1]
    assert gap.mean() < -3 * gap.std() / 40**0.5
    control = random.chosen[-1] - random.random[-1]
    assert abs(control.mean()) < 4 * control.std() / 40**0.5
    assert variance.at(6).equal(variance.chosen[5])
    torch.testing.assert_close(
        benchmark.Curves.of(Nearest(), tasks, 0, "variance", 1, chunk=40).chosen, variance.chosen
    )
    torch.testing.assert_close(variance.orders.mean(0), variance.random[-1])
    assert variance.orders.shape == (2, 40)
    assert not variance.orders[0].equal(variance.orders[1])
    several = benchmark.Curves.of(Nearest(), tasks, 0, "batch", 1)
    assert several.labels == [1, 4, 7, 10]
    assert several.at(6).equal(several.chosen[2])


def test_points_to_reach():
    errors = torch.tensor([[9.0, 9.0, 0.0], [3.0, 3.0, 0.0], [1.0, 1.0, 4.0]])
    curves = benchmark.Curves([1, 2, 3], errors, errors, torch.zeros(3, 2), errors[-1:])
    assert curves.points_to_reach(2.0) == 2.0
    assert curves.points_to_reach(2.0, median=True) == 3.0
    assert curves.points_to_reach(1.9) is None
    goal = errors[[1, 1]] + torch.tensor([[0.5], [-0.5]])
    curves = benchmark.Curves([1, 4, 7], errors, errors, None, goal)
    rows = {row.name: row for row in benchmark.compare("it", curves, goal)}
    assert rows["it_7_mse"].ours == pytest.approx(2.0)
    assert rows["it_7_mse"].difference == pytest.approx(0.0)
    assert rows["it_points_to_reach_random_10_mse"].ours == 4.0


def test_the_median_goal_is_over_single_orders(capsys):
    """Of orders that are right by turns, the mean is never small, and the median of all is."""
    chosen = torch.tensor([[9.0, 9.0, 9.0], [1.5, 1.5, 1.5], [0.5, 0.5, 0.6]])
    goal = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    rows = {r.name: r for r in benchmark.compare("it", benchmark.Curves([1, 6, 10], chosen, chosen, None, goal), goal)}
    assert rows["it_points_to_reach_random_10_mse"].ours == 6.0
    assert rows["it_points_to_reach_random_10_mse_median"].ours is None, "the median of means, 3, would be reached"
    goal[0] += torch.tensor([0.0, 3.0, 6.0])
    rows = benchmark.compare("it", benchmark.Curves([1, 6, 10], chosen, chosen, None, goal), goal)
    gap = torch.tensor([1.5 - 3, 1.5 - 4, 1.5 - 5])
    z = float(gap.mean() / (gap.std() / 3**0.5))
    assert f"6 of them less 10 at random: z = {z:.1f}" in capsys.readouterr().out


def test_noise_is_the_error_of_the_true_function():
    family = bm.tasks.ChallengingSinusoid()
    clean = bm.tasks.ChallengingSinusoid(relative_noise=0.0)
    y, truth = (f.sample(20_000, support=1, query=4, generator=7).query.y for f in (family, clean))
    each = (y - truth).square().mean(-1)
    assert abs(each.mean() - benchmark.NOISE) < 4 * each.std() / 20_000**0.5


@pytest.mark.parametrize("name", list(benchmark.RUNS))
def test_rows_of_a_short_run(name, monkeypatch, tmp_path):
    for what, value in {"POOL": 9, "QUERY": 5, "GOAL": 7, "REPEATS": 1}.items():
        monkeypatch.setattr(benchmark, what, value)
    rows = {row.name: row for row in benchmark.measure(name, 3, 2, 3, 1, True, tmp_path)}
    expected = {"random_7_mse", "validation_mse", "seconds"}
    for criterion, count in {"information": 6, "variance": 6, "batch": 7, "random": 6}.items():
        reach = f"{criterion}_points_to_reach_random_7_mse"
        expected |= {f"{criterion}_{count}_mse", reach, f"{reach}_median"}
    assert set(rows) == {f"{name}_{row}" for row in expected}
    assert (tmp_path / f"active_{name}.png").stat().st_size > 10_000
    assert rows[f"{name}_information_6_mse"].reference == rows[f"{name}_random_7_mse"].ours


def test_the_bar_is_of_the_method_that_validation_takes():
    rows = [
        Row("a_validation_mse", 0.1),
        Row("a_information_points_to_reach_random_10_mse", 7),
        Row("b_validation_mse", 0.2),
        Row("b_information_points_to_reach_random_10_mse", 5),
    ]
    (row,) = benchmark.best(rows, ["a", "b"], True)
    assert (row.name, row.ours, row.passes) == ("active_points_to_reach_random_10_mse", 7.0, False)
    assert benchmark.best(rows, ["b"], True)[0].passes is True
    assert benchmark.best(rows, ["b"], False)[0].bar is None
    assert benchmark.best(rows, ["c"], True) == []
    diverged = [Row("a_validation_mse", None), *rows[1:]]
    assert benchmark.best(diverged, ["a", "b"], True)[0].ours == 5.0, "no error is not an error of 0"
    never = [rows[0], Row("a_information_points_to_reach_random_10_mse", None)]
    assert benchmark.best(never, ["a"], True)[0].passes is False


def test_a_run_has_its_rows(monkeypatch):
    monkeypatch.setattr(benchmark, "POOL", 10)
    monkeypatch.setattr(benchmark, "QUERY", 5)
    monkeypatch.setattr(benchmark, "CRITERIA", ("information",))
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    args = parser.parse_args(["--runs", "deep_kernel", "--tasks", "3"])
    args.quick, args.seed = True, 3
    assert benchmark.run(args)[-1].name == "active_points_to_reach_random_10_mse"
    assert bm.tasks.ChallengingSinusoid().relative_noise == 0.01
