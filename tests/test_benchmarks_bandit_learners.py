"""The benchmark of learned bandit policies: its stages, its rows, and which tasks they are judged on."""

import argparse

import numpy as np
import pytest
import torch

from bayesmeta.rl.envs import BernoulliBandit
from benchmarks import _bandit_learners as learners
from benchmarks import bandits


def test_rows_are_greedy_on_the_test_tasks_and_held_to_their_bars(monkeypatch):
    seen = {}

    class Told:
        def evaluate(self, env, *, generator):
            seen["tasks"] = env.tasks.mean
            return argparse.Namespace(total=seen["mean"] + torch.tensor([-1.0, 1.0]).repeat(25))

    monkeypatch.setattr(learners, "trained", lambda *args: Told())
    for mean, passes in ((6.63, True), (6.61, False)):
        seen["mean"] = mean
        row = learners.learner_row("rl2_n10_k5", 50, 3, False)
        assert (row.ours, row.passes, row.reference) == (pytest.approx(mean), passes, 6.7)
        assert row.standard_error == pytest.approx((50 / 49) ** 0.5 / 50**0.5)
    tasks = BernoulliBandit(arms=5, horizon=10).sample_tasks(50, generator=3, split="test").mean
    assert torch.equal(seen["tasks"], tasks)
    assert learners.learner_row("rl2_n10_k5", 50, 3, True).bar is None  # a quick run is held to none
    assert learners.learner_row("snail_n10_k5", 50, 3, False).bar is None


@pytest.mark.parametrize("name", ["rl2_n100_k5", "snail_n10_k5"])
def test_stages_train_one_policy(name):
    run = learners.trained(learners.LEARNERS[name], 0, True)
    stages = learners.LEARNERS[name].stages
    assert run.iteration == run.iterations == len(stages)
    assert run.policy.trial_steps == stages[-1].pulls == learners.LEARNERS[name].pulls
    assert all(stage.pulls * stage.trials > 40_000 for stage in stages)


def test_maml_rl_before_training_is_a_softmax_of_what_its_first_pulls_brought(monkeypatch):
    """From a uniform policy one step has a closed form; simulated apart. Pulls of the first policy alone (the control)
    bring half of what they could.
    """
    instances, learner = 20_000, learners.STEP_LEARNERS["maml_rl_n10_k5"]
    monkeypatch.setitem(learners.STEP_LEARNERS, "untrained", learner._replace(iterations=0))
    row = learners.learner_row("untrained", instances, 3, False)
    rng = np.random.default_rng(0)
    mean = rng.random((instances, learner.arms))
    pulled = np.eye(learner.arms)[rng.integers(learner.arms, size=(instances, learner.before))]
    reward = rng.random((instances, learner.before)) < np.einsum("nba,na->nb", pulled, mean)
    better = reward - reward.mean(1, keepdims=True)
    # weight and bias both move by rate × mean of advantage × (pulled − 1 / arms), and the observation is 1
    logits = 2 * learner.rate * np.einsum("nb,nba->na", better, pulled - 1 / learner.arms) / learner.before
    chosen = np.exp(logits - logits.max(1, keepdims=True))
    worth = (mean * chosen / chosen.sum(1, keepdims=True)).sum(1)
    expected = learner.before / 2 + (learner.pulls - learner.before) * worth.mean()
    spread = (learner.pulls - learner.before) * worth.std() / instances**0.5
    assert row.ours == pytest.approx(expected, abs=4 * (row.standard_error**2 + spread**2) ** 0.5)
    assert row.ours > learner.pulls / 2 + 10 * row.standard_error
    assert (row.bar, row.reference) == (None, None)


def test_maml_rl_is_judged_on_the_test_tasks():
    run = learners.stepping(learners.STEP_LEARNERS["maml_rl_n10_k5"], 0, True)
    assert run.iteration == 2
    assert run.env.copies == 4
    assert bool(run.theta.isfinite().all())
    assert learners.learner_row("maml_rl_n10_k5", 500, 0, True).ours > 5.3


def test_unknown_learners_are_refused():
    args = argparse.Namespace(baselines=[], learners=["sarsa"], threads=1, quick=True, pulls=[10], seed=0)
    with pytest.raises(SystemExit, match="unknown learner sarsa"):
        bandits.run(args)
