"""The benchmark of half-cheetahs: its rows, what it counts, keeps and refuses. Without MuJoCo, on runners."""

import argparse
import dataclasses
import importlib.util
import json

import pytest
import torch

from bayesmeta.rl.setups import METHODS
from benchmarks import _cheetah_training
from benchmarks import halfcheetah as bench
from tests.rl_cheetah import pretend


def options(**changes):
    given = {
        "quick": True, "seed": 0, "methods": ["rl2"], "families": ["direction"], "trainings": 1, "iterations": 0,
        "tasks": 4, "split": "validation", "workers": False, "device": "cpu", "threads": 1, "reuse": False,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Runners in place of cheetahs."""
    for family in bench.FAMILIES:
        pretend(monkeypatch, family)
    monkeypatch.setattr(bench, "find_spec", lambda name: object())
    monkeypatch.setattr(bench, "KEPT", tmp_path)
    return tmp_path


def test_every_method_is_one_of_the_command_line():
    assert set(bench.METHODS) <= {*METHODS}


def test_rows_are_of_the_points_of_an_adaptation(pretended):
    args = options()
    names = [row.name for row in bench.run(args)]
    sides = ("", "_forward", "_backward")
    assert names == [
        "direction_random_episode_1",
        *(f"direction_rl2_episode_1{side}" for side in sides),
        *(f"direction_rl2_episode_2{side}" for side in (*sides, "_gain")),
        *(f"direction_rl2_episode_{n}_drawn" for n in (1, 2)),
        "direction_rl2_environment_steps",
    ]
    # 2 iterations, one trial of two episodes of 10 steps with 4 tasks each; the second point is of all of them
    assert [point["steps"] for point in args.curves["direction_rl2"][0]] == [80, 160]
    rows = bench.run(options(methods=["maml"], families=["velocity"]))
    assert [row.name for row in rows[:3]] == ["velocity_random_episode_1", "velocity_still", "velocity_all_at_1"]
    tasks = torch.tensor(train(1, methods=["maml"]).tasks)  # those that the first training is shown
    assert rows[1].ours == pytest.approx(-10 * float(tasks.mean()))
    assert rows[2].ours == pytest.approx(-10 * float((tasks - 1).abs().mean()))
    assert [row.name for row in rows[3:-1]] == [
        "velocity_maml_before",
        *(f"velocity_maml_after_{n}{what}" for n in (1, 2, 3) for what in ("", "_gain")),
    ]
    # 2 iterations of 2 tasks × 2 copies, before and after the step, 10 steps each
    assert rows[-1].ours == 2 * 4 * 2 * 10
    assert all(row.bar is None for row in rows)


def test_beliefs_have_rows_and_are_read_of_the_test_trial(pretended):
    rows = {row.name: row for row in bench.run(options(methods=["varibad"], families=["velocity"]))}
    found = [name for name in rows if "belief" in name]
    assert found == [f"velocity_varibad_belief_after_{n}" for n in (0, 1, 5, 20)]  # a trial has 20 steps
    assert 0 <= rows[found[0]].ours <= 2


def test_gains_and_sides_are_task_by_task():
    returns = torch.tensor([[1.0, 2.0, 6.0, 0.0], [3.0, 3.0, 7.0, 8.0]])
    found = {r.name: r for r in bench.return_rows("x", returns, "step", [1.0, 1.0, -1.0, -1.0], 5.0)}
    assert found["x_before"].ours == pytest.approx(2.25)
    assert found["x_before_forward"].ours == pytest.approx(1.5)
    assert found["x_after_1_backward"].ours == pytest.approx(7.5)
    assert found["x_after_1_gain"].ours == pytest.approx(3.0)
    # paired: of the differences 2, 1, 1, 8, and not of the two means
    assert found["x_after_1_gain"].standard_error == pytest.approx(float(torch.tensor([2.0, 1, 1, 8]).std()) / 2)
    assert [r.seconds for r in found.values()] == [5.0, None, None, 5.0, None, None, None]


def test_the_returns_are_those_of_the_trained_learner_on_held_out_tasks(pretended):
    rows = {row.name: row for row in bench.training_rows("velocity", "rl2", train(3))}
    setup = bench.setup_of("velocity", "rl2", options(), 3)
    family = setup.family()
    learner = setup.learner(family)
    before = learner.curve(setup.held_out(family, 4, split="validation", seed=3), generator=3).returns
    learner.train(setup.iterations)
    curve = learner.curve(setup.held_out(family, 4, split="validation", seed=3), generator=3).returns
    mine = [rows[f"velocity_rl2_episode_{n}"] for n in (1, 2)]
    assert [row.ours for row in mine] == pytest.approx([float(x) for x in curve.mean(1)])
    assert [row.standard_error for row in mine] == pytest.approx([float(x) / 2 for x in curve.std(1)])
    assert not torch.allclose(before, curve)  # control: an untrained learner has other returns
    drawn = learner.evaluate(setup.held_out(family, 4, split="validation", seed=3), greedy=False, generator=3)
    assert rows["velocity_rl2_episode_1_drawn"].ours == pytest.approx(float(drawn.episodes[:, 0].mean()))
    assert rows["velocity_rl2_episode_1_drawn"].ours != mine[0].ours
    assert rows["velocity_rl2_environment_steps"].ours == 2 * 20 * 4  # iterations, steps of a trial, tasks


def train(seed, **changes):
    return bench.training_of("velocity", "rl2", options(**changes), seed)


def test_several_trainings_have_their_mean_and_its_error(pretended):
    each = [train(seed).returns for seed in (1, 2)]
    means = [sum(returns[0]) / 4 for returns in each]
    both = next(
        row for row in bench.run(options(trainings=2, families=["velocity"])) if row.name == "velocity_rl2_episode_1"
    )
    assert both.ours == pytest.approx(sum(means) / 2)
    assert both.standard_error == pytest.approx(abs(means[0] - means[1]) / 2)


def test_trainings_that_are_done_are_read_again(pretended, monkeypatch):
    small = {"quick": False, "iterations": 1}
    monkeypatch.setattr(bench, "setup_of", small_setup(bench.setup_of))
    first = train(1, **small)
    assert [path.name for path in pretended.iterdir()] == ["velocity_rl2_validation_1.json"]
    calls = []
    monkeypatch.setattr(bench, "trained", lambda *given: calls.append(given) or first)
    assert train(1, reuse=True, **small) == first
    assert not calls
    train(1, **small)  # without being asked to
    train(1, reuse=True, **{**small, "iterations": 3})  # and other settings
    assert len(calls) == 2
    kept = json.loads((pretended / "velocity_rl2_validation_1.json").read_text())
    assert kept["asked"]["iterations"] == 3


def small_setup(whole):
    def smaller(*given):
        return dataclasses.replace(whole(*given), tasks=4, units=8)

    return smaller


def test_what_cannot_run_is_refused(monkeypatch):
    for change, message in (({"methods": ["sac"]}, "unknown method sac"), ({"families": ["ant"]}, "unknown family")):
        with pytest.raises(SystemExit, match=message):
            bench.run(options(**change))
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"bayesmeta\[mujoco\]"):
        bench.run(options())


def test_pearls_held_out_trials_are_longer(pretended):
    setup = dataclasses.replace(bench.setup_of("velocity", "pearl", options(), 0), iterations=1)
    learner = setup.learner(setup.family())
    learner.config = dataclasses.replace(learner.config, updates=2)
    found = _cheetah_training.trained(setup, learner, 3, "test")
    assert torch.tensor(found.returns).shape == (3, 3)
    assert found.steps == 2 * 2 * 10  # tasks, episodes of a trial in training, steps


@pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="needs MuJoCo")
def test_cheetahs_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "KEPT", tmp_path)
    rows = bench.run(options(methods=["rl2", "maml"]))
    assert len(rows) == 1 + (3 + 4 + 2 + 1) + (3 + 3 * 4 + 1)
