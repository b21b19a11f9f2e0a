"""The benchmark on lines among sinusoids: kinds of tasks, the oracle, rows, and what is chosen without a line."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace

import pytest
import torch

import bayesmeta as bm
from benchmarks import ood as benchmark
from benchmarks.harness import Row


def test_inside_and_outside_are_what_they_are_said_to_be():
    """By the exact probability of a line, which is sharp where there is little noise."""
    inside, outside = benchmark.sinusoids(0.1, 50, 5), benchmark.lines(0.1, 50, 5)
    family = bm.tasks.SineOrLine(0.1)
    assert inside.support.x.shape == outside.support.x.shape == (50, 5, 1)
    assert family.probability_line(inside.support).mean() < 0.05
    assert family.probability_line(outside.support).mean() > 0.95
    validation = benchmark.sinusoids(0.1, 50, 5, validation=True)
    assert (validation.support.x - inside.support.x).abs().min() > 0
    assert (benchmark.sinusoids(0.1, 50, 6).support.x - inside.support.x).abs().min() > 0
    both = torch.stack([inside.sine, inside.line]).logsumexp(0) - math.log(2)
    torch.testing.assert_close(both, family.log_evidence(inside.support))


def test_the_oracles_area_is_the_published_one():
    rows = {row.name: row for row in benchmark.references(3, 300)}
    for noise, published in benchmark.ORACLE.items():
        row = rows[f"{benchmark.label(noise)}_oracle_auroc"]
        assert row.reference == published
        assert abs(row.difference) < 4 * row.standard_error + 0.0015  # rounding, and that of a sample
        best = rows[f"{benchmark.label(noise)}_likelihood_ratio_auroc"]
        assert best.ours > row.ours


class Oracle:
    """Gives the exact evidence of sinusoids as its own, of noise ``scale`` times the true one."""

    def __init__(self, noise, scale=1.0):
        self.family = bm.tasks.SineOrLine(noise * scale)

    def adapt(self, support, generator=None):
        evidence = self.family._log_evidences(support)[0]
        return SimpleNamespace(
            support=support, num_tasks=support.num_tasks, log_evidence=evidence, is_point=False, target_kind="real"
        )


def test_the_oracle_scored_as_a_method_is_the_oracle():
    rows = {row.name: row for row in benchmark.score(Oracle(0.3), "it", 0.3, 3, 300)}
    assert rows["it_auroc"].difference == pytest.approx(0.0, abs=1e-12)
    assert rows["it_auroc"].standard_error == pytest.approx(0.0, abs=1e-12)
    assert rows["it_validation_nll"].difference == pytest.approx(0.0, abs=1e-9)
    inside = rows["it_inside_flagged"]
    assert abs(inside.ours - 0.05) < 4 * math.sqrt(2 * 0.05 * 0.95 / 300)
    assert rows["it_outside_flagged"].ours > 0.8
    assert "it_effective_draws" not in rows
    other = {row.name: row for row in benchmark.score(Oracle(0.3, 4.0), "it", 0.3, 3, 300)}
    assert other["it_validation_nll"].difference > 4 * other["it_validation_nll"].standard_error, "control"


@pytest.mark.parametrize("name", list(benchmark.RUNS))
def test_rows_of_a_short_run(name, monkeypatch):
    monkeypatch.setattr(benchmark, "DRAWS", 20)
    monkeypatch.setattr(benchmark, "ORACLE", {0.3: 0.992})
    rows = {row.name: row for row in benchmark.measure(name, 3, 2, 20, 1, True)}
    expected = {"auroc", "validation_nll", "inside_flagged", "outside_flagged", "seconds"}
    expected |= {"effective_draws"} if name == "latent" else set()
    assert set(rows) == {f"noise03_{name}_{row}" for row in expected}
    assert rows[f"noise03_{name}_validation_nll"].difference > 0, "two steps are not the oracle"
    assert all(row.bar is None for row in rows.values())


def test_the_best_is_chosen_without_lines(monkeypatch):
    monkeypatch.setattr(benchmark, "ORACLE", {0.3: 0.992})
    rows = [
        Row("noise03_a_auroc", 0.95, 0.99, None, -0.04, 0.01),
        Row("noise03_a_validation_nll", 1.0),
        Row("noise03_b_auroc", 0.99, 0.99, None, 0.0, 0.01),
        Row("noise03_b_validation_nll", 2.0),
    ]
    (row,) = benchmark.best(rows, ["a", "b"], True)
    assert row.name == "noise03_best_auroc"
    assert (row.ours, row.passes) == (0.95, False), "b has the larger area, but a the better evidence"
    (row,) = benchmark.best(rows, ["b"], True)
    assert row.passes is True
    assert benchmark.best(rows, ["b"], False)[0].bar is None
    diverged = [rows[0], Row("noise03_a_validation_nll", None), *rows[2:]]
    assert benchmark.best(diverged, ["a", "b"], True)[0].ours == 0.99, "no figure is not a figure of 0"
    assert benchmark.best(rows, ["c"], True) == []


def test_a_run_has_all_its_rows(monkeypatch):
    monkeypatch.setattr(benchmark, "ORACLE", {1.0: 0.956})
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    args = parser.parse_args(["--runs", "last_layer", "--tasks", "20"])
    args.quick, args.seed = True, 3
    names = [row.name for row in benchmark.run(args)]
    assert names[-3:] == ["noise10_best_auroc", "noise10_oracle_auroc", "noise10_likelihood_ratio_auroc"]
    assert len(names) == len(set(names)) == 8
