"""The machinery of benchmarks.sparse_point_robot, with a learner that learns nothing."""

import argparse
import json

import pytest
import torch

from bayesmeta.rl.learner import AdaptationCurve
from benchmarks import _sparse_methods, sparse_point_robot
from benchmarks._sparse_methods import EPISODES, Method, Training, goals_of


class Fake:
    """Returns that say what was asked: 100 × iterations + the episode + a number for goals and way to explore."""

    def __init__(self, iterations, seed):
        self.iterations, self.seed, self.iteration = iterations, seed, 0

    def train(self, iterations):
        self.iteration += iterations

    def options(self):
        return {"learner": "Fake", "seed": self.seed}

    def curve(self, env, *, generator=None, exploration="posterior_sampling"):
        more = {"posterior_sampling": 0.0, "mean": 0.25, "prior": 0.5}[exploration]
        more += {"validation": 10.0, "test": 0.0}[env.split] + self.seed
        episodes = torch.arange(EPISODES)[:, None] + 100.0 * self.iteration + more
        return AdaptationCurve(episodes.expand(EPISODES, env.num_tasks).clone(), "episode")


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    def make(env, iterations, seed):
        assert env.num_tasks == 80
        assert len(env.tasks.goal.unique(dim=0)) == 80  # every training goal once
        return Fake(iterations, seed)

    methods = {"pearl": Method(make, 2, 2), "distilled": Method(make, 3, 2)}
    monkeypatch.setattr(sparse_point_robot, "METHODS", methods)
    monkeypatch.setattr(sparse_point_robot, "KEPT", tmp_path)
    monkeypatch.setattr(sparse_point_robot, "TRIALS", 200)
    return tmp_path


def arguments(**options):
    parser = argparse.ArgumentParser()
    sparse_point_robot.add_arguments(parser)
    usual = vars(parser.parse_args([])) | {"quick": False, "seed": 0, "methods": ["pearl", "distilled"], "copies": 2}
    return argparse.Namespace(**usual | options)


def rows(**options):
    args = arguments(**options)
    return {row.name: row for row in sparse_point_robot.run(args)}, args


def test_rows_say_what_was_measured(fakes):
    found, args = rows()
    assert found["oracle"].ours == pytest.approx(13.68, abs=0.01)  # of the 20 test goals
    assert found["half_circle_oracle"].ours == pytest.approx(13.38, abs=0.02)
    assert found["half_circle_thompson_after_0"].ours == pytest.approx(1.48, abs=1.2)  # of 200 trials
    for after in (0, 1, 2, 5, 10):
        # seeds 1, 2 and 3 add 2 on average
        assert found[f"pearl_released_after_{after}"].ours == 200 + after + 2
        assert found[f"distilled_after_{after}"].ours == 300 + after + 2
        assert found[f"pearl_best_after_{after}"].ours == 300 + after + 2
        assert found[f"explore_mean_after_{after}"].ours == 300 + after + 2.25
        ideal = found[f"thompson_after_{after}"].ours
        assert found[f"pearl_best_after_{after}"].reference == pytest.approx(ideal)
    assert [name for name, row in found.items() if row.bar] == [
        "pearl_best_after_2", "pearl_best_after_10", "pearl_best_cpu_seconds",
    ]  # fmt: skip
    assert args.best == "distilled"
    assert args.curves["distilled"][1]["learning"][-1]["iteration"] == 3
    assert args.curves["distilled"][0]["learning"][-1]["validation"][0] == 311.0
    json.dumps(args.curves)


def test_the_best_form_is_chosen_on_validation_goals():
    def training(validation, test):
        returns = {"posterior_sampling": torch.full((EPISODES, 20), test)}
        return Training(returns, [0.0] * 10 + [validation], [], 1.0)

    found = {"pearl": [training(5.0, 9.0)], "distilled": [training(6.0, 1.0)], "varibad": [training(9.0, 9.0)]}
    assert sparse_point_robot.best_of(found) == "distilled"
    assert sparse_point_robot.best_of({"varibad": found["varibad"]}) is None


def test_a_training_is_read_again_where_nothing_differs(fakes, monkeypatch, capsys):
    first, _ = rows(methods=["distilled"])
    assert sorted(p.name for p in fakes.iterdir()) == [f"distilled_test_{seed}.json" for seed in (1, 2, 3)]
    trained = []
    monkeypatch.setattr(Fake, "train", lambda self, n: trained.append(n) or setattr(self, "iteration", 3))
    again, _ = rows(methods=["distilled"], reuse=True)
    assert not trained
    assert {n: r.ours for n, r in again.items()} == pytest.approx({n: r.ours for n, r in first.items()})
    rows(methods=["distilled"], reuse=True, iterations=4)  # control: other settings are trained
    assert trained
    trained.clear()
    rows(methods=["distilled"])
    assert trained


def test_the_error_counts_goals_and_trainings():
    generator = torch.Generator().manual_seed(0)
    errors, means = [], []
    for _ in range(400):
        of_training, of_goal = torch.randn(3, 1, generator=generator), 2 * torch.randn(1, 20, generator=generator)
        returns = of_training + of_goal + 0.1 * torch.randn(3, 20, generator=generator)
        means.append(float(returns.mean()))
        errors.append(sparse_point_robot.error_of(returns))
    truth = float(torch.tensor(means).std())
    assert torch.tensor(errors).square().mean().sqrt() == pytest.approx(truth, rel=0.15)
    alone = torch.randn(1, 20, generator=generator)
    assert sparse_point_robot.error_of(alone) == pytest.approx(float(alone.std()) / 20**0.5)


def test_held_out_goals_are_others_and_all_of_them():
    test, validation = (goals_of(split, 3, 0).tasks.goal for split in ("test", "validation"))
    train = _sparse_methods.FAMILY.goals("train")
    assert len(test) == len(test.unique(dim=0)) == 20
    for one, other in ((test, validation), (test, train), (validation, train)):
        assert float((one[:, None] - other).norm(dim=-1).min()) > 1e-5


def test_unknown_methods_are_refused():
    with pytest.raises(SystemExit, match="unknown method nobody"):
        sparse_point_robot.run(arguments(methods=["nobody"]))
