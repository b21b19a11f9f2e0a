"""The benchmark of half-cheetahs: its rows, what it counts, what it refuses. Without MuJoCo, on other environments."""

import argparse
import importlib.util

import pytest
import torch

import bayesmeta as bm
from bayesmeta.rl.setups import ENVIRONMENTS, METHODS, EnvDefaults
from benchmarks import halfcheetah as bench


def options(**changes):
    given = {
        "quick": True, "seed": 0, "methods": ["rl2"], "families": ["direction"], "trainings": 1, "iterations": 0,
        "tasks": 4, "split": "validation", "workers": False, "device": "cpu", "threads": 1,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


@pytest.fixture
def pretended(monkeypatch):
    """Points in the plane in place of cheetahs."""
    for family in bench.FAMILIES:
        monkeypatch.setitem(ENVIRONMENTS, f"half-cheetah-{family}", EnvDefaults(bm.rl.Navigation, std=0.1))
    monkeypatch.setattr(bm.rl.TensorVectorEnv, "close", lambda self: None)
    monkeypatch.setattr(bench, "find_spec", lambda name: object())


def test_every_method_is_one_of_the_command_line():
    assert set(bench.METHODS) <= {*METHODS, "varibad"}


def test_rows_are_of_the_points_of_an_adaptation(pretended):
    names = [row.name for row in bench.run(options())]
    assert names == [
        "direction_random_episode_1", "direction_rl2_episode_1", "direction_rl2_episode_2",
        "direction_rl2_environment_steps",
    ]  # fmt: skip
    rows = bench.run(options(methods=["maml"], families=["velocity"]))
    assert [row.name for row in rows[1:-1]] == [
        "velocity_maml_before", "velocity_maml_after_1", "velocity_maml_after_2", "velocity_maml_after_3",
    ]  # fmt: skip
    # 2 iterations of 2 tasks × 2 copies, before and after the step, 10 steps each
    assert rows[-1].ours == 2 * 4 * 2 * 10
    assert all(row.bar is None for row in rows)


def test_the_returns_are_those_of_the_trained_learner_on_held_out_tasks(pretended):
    rows = bench.learner_rows("velocity", "rl2", options(), 3)
    setup = bench.setup_of("velocity", "rl2", options(), 3)
    family = setup.family()
    learner = setup.learner(family)
    before = learner.curve(setup.held_out(family, 4, split="validation", seed=3), generator=3).returns
    learner.train(setup.iterations)
    curve = learner.curve(setup.held_out(family, 4, split="validation", seed=3), generator=3).returns
    assert [row.ours for row in rows[:2]] == pytest.approx([float(x) for x in curve.mean(1)])
    assert [row.standard_error for row in rows[:2]] == pytest.approx([float(x) / 2 for x in curve.std(1)])
    assert not torch.allclose(before, curve)  # control: an untrained learner has other returns
    assert rows[2].ours == 2 * 2 * 10 * 4  # iterations, episodes, steps, trials


def test_several_trainings_have_their_mean_and_its_error(pretended):
    each = [bench.learner_rows("direction", "rl2", options(), seed)[0].ours for seed in (0, 1)]
    both = next(row for row in bench.run(options(trainings=2)) if row.name == "direction_rl2_episode_1")
    assert both.ours == pytest.approx(sum(each) / 2)
    assert both.standard_error == pytest.approx(abs(each[0] - each[1]) / 2)


def test_what_cannot_run_is_refused(monkeypatch):
    for change, message in (({"methods": ["sac"]}, "unknown method sac"), ({"families": ["ant"]}, "unknown family")):
        with pytest.raises(SystemExit, match=message):
            bench.run(options(**change))
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"bayesmeta\[mujoco\]"):
        bench.run(options())


@pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="needs MuJoCo")
def test_cheetahs_run():
    rows = bench.run(options(methods=["rl2", "maml"]))
    assert len(rows) == 1 + 3 + 5
