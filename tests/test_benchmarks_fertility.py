"""The fertility benchmark: what it calls best, how it pairs splits, and that every method trains."""

import argparse
import math

import pytest
import torch

from bayesmeta.diagnostics.scores import Scores
from bayesmeta.tasks import fertility_split
from benchmarks import fertility
from benchmarks.fertility import METHODS, Measured, choose, measure, rows


def scores(rmse, nll):
    values = {"rmse": rmse, "nll": nll, "crps": rmse / 2, "coverage_90": 0.9}
    return Scores(values, dict.fromkeys(values, 0.1), {}, 60, 0, True)


def collected(gap):
    """Two methods of which the better one on held-out countries is not the better one on validation countries."""
    hard = [0.8, 1.0, 0.9, 0.7]  # how hard the splits are, the same for all
    noise = [0.001, -0.001, 0.002, -0.002]
    return {
        "chosen": [Measured(scores(h + gap + e, h + gap + e), 0.5, 2.0) for h, e in zip(hard, noise, strict=True)],
        "tempting": [Measured(scores(h - 0.5, h - 0.5), 0.6, 2.0) for h in hard],
        "empirical_gaussian": [Measured(scores(h, h)) for h in hard],
    }


def test_the_best_is_chosen_on_validation_countries():
    assert choose(collected(0.0)) == "chosen"


@pytest.mark.parametrize(("gap", "wins"), [(-0.1, True), (0.1, False), (-0.001, False)])
def test_a_gain_is_two_paired_standard_errors(gap, wins):
    made = {row.name: row for row in rows(collected(gap), quick=False)}
    row = made["best_against_empirical_gaussian_rmse"]
    assert row.difference == pytest.approx(gap)
    values = torch.tensor([0.001, -0.001, 0.002, -0.002], dtype=torch.float64)
    assert row.standard_error == pytest.approx(float(values.std()) / 2)  # how hard a split is cancels
    assert row.passes is wins
    assert made["best_against_empirical_gaussian_nll"].passes is wins
    assert made["best_against_empirical_gaussian_crps"].passes is None
    assert made["best_rmse"].ours == pytest.approx(0.85 + gap)
    assert made["chosen_nll"].seconds == pytest.approx(8.0)
    assert made["empirical_gaussian_nll"].seconds is None


def test_a_quick_run_is_held_to_no_bar():
    assert all(row.passes is None for row in rows(collected(0.3), quick=True))


def test_an_unknown_run_is_refused():
    arguments = argparse.Namespace(threads=torch.get_num_threads(), runs=["gibberish"])
    with pytest.raises(SystemExit, match="unknown run gibberish"):
        fertility.run(arguments)


def few_countries():
    """A split of few countries, all of it small."""
    return fertility_split(100, train=12, validation=3, test=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_measured(name):
    found = measure(name, few_countries() if name != "last_layer_mixture" else fertility_split(100), 0, quick=True)
    assert math.isfinite(found.validation)
    assert math.isfinite(found.test["nll"])
    assert 0 <= found.test["coverage_90"] <= 1
    assert found.seconds > 0
