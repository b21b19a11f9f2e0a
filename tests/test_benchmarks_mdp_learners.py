"""The benchmark of RL² on tabular MDPs: its stages, its row, its curve, and which tasks it is judged on."""

import argparse

import pytest
import torch

from bayesmeta.rl.envs import TabularMDP
from benchmarks import _mdp_learners as learners
from benchmarks import tabular_mdps


def test_stages_train_one_policy_and_the_curve_has_every_iteration():
    learner = learners.LEARNERS["rl2_n10"]
    run, curve = learners.trained(learner, 0, True)
    assert run.iteration == run.iterations == len(learner.stages) == len(curve)
    assert [point["episodes"] for point in curve] == [stage.episodes for stage in learner.stages]
    assert run.policy.trial_steps == 100  # ten episodes of ten steps
    assert [point["reward"] for point in curve] == [
        told["reward"] / stage.episodes for told, stage in zip(run.history, learner.stages)
    ]
    assert 0 < curve[0]["seconds"] < curve[-1]["seconds"]


def test_rows_are_greedy_on_the_test_tasks_and_held_to_their_bar(monkeypatch):
    seen = {}

    class Told:
        def evaluate(self, env, *, generator):
            seen["tasks"], seen["episodes"] = env.tasks.reward, env.episodes_per_trial
            return argparse.Namespace(total=seen["mean"] + torch.tensor([-1.0, 1.0]).repeat(25))

    monkeypatch.setattr(learners, "trained", lambda *args: (Told(), ["curve"]))
    for mean, passes in ((150.1, True), (149.9, False)):
        seen["mean"] = mean
        row, curve = learners.learner_row("rl2_n10", 50, 3, False)
        assert (row.ours, row.passes, curve) == (pytest.approx(mean), passes, ["curve"])
        assert row.ratio == pytest.approx(mean / 156.2)
        assert row.standard_error == pytest.approx((50 / 49) ** 0.5 / 50**0.5 / 156.2)
    assert seen["episodes"] == 10
    assert torch.equal(seen["tasks"], TabularMDP().sample_tasks(50, generator=3, split="test").reward)
    assert learners.learner_row("rl2_n10", 50, 3, True)[0].bar is None  # a quick run is held to none


def test_a_run_keeps_the_curve_beside_the_rows(monkeypatch):
    args = argparse.Namespace(baselines=[], learners=["sarsa"], threads=1, quick=True, episodes=[10], tasks=10, seed=0)
    with pytest.raises(SystemExit, match="unknown learner sarsa"):
        tabular_mdps.run(args)
    row = tabular_mdps.Row("rl2_n10", 1.0)
    monkeypatch.setattr(tabular_mdps, "learner_row", lambda *given: (row, ["curve"]))
    args.learners = ["rl2_n10"]
    assert tabular_mdps.run(args)[-1] is row
    assert args._curves == {"rl2_n10": ["curve"]}
