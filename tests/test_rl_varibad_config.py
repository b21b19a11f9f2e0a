"""VariBAD's encoder and decoder: which environments a pass reads, how the rate falls, and what evaluation leaves."""

import pytest
import torch
from test_rl_varibad import GRID, environments, learner

from bayesmeta.errors import ContextError
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.varibad.learner import BeliefConfig, VariBAD


@pytest.mark.parametrize(("some", "each"), [(None, [3, 3]), (4, [2, 2]), (9, [3, 3])])
def test_a_pass_reads_some_of_the_environments_in_pieces(some, each):
    """Each of them once, others in another pass; all where none or more than all are asked for."""
    run = learner(beliefs=BeliefConfig(epochs=8, environments=some, minibatches=2))
    read, bound = [], run.bound
    run.bound = lambda rollout, rows, generator: (read.append(rows), bound(rollout, rows, generator))[1]
    run.train(1)
    assert [len(rows) for rows in read] == 8 * each
    passes = [sorted(torch.cat(read[i : i + 2]).tolist()) for i in range(0, 16, 2)]
    assert all(len(set(rows)) == sum(each) for rows in passes)
    assert {row for rows in passes for row in rows} == set(range(6))
    assert len({tuple(rows.tolist()) for rows in read}) > 2  # another order each time


def test_the_rate_of_the_beliefs_falls_linearly():
    run = learner(iterations=5, beliefs=BeliefConfig(lr=0.01, last_lr=0.002, epochs=1, minibatches=1))
    rates, step = [], run._optimizer.step
    run._optimizer.step = lambda: (rates.append([g["lr"] for g in run._optimizer.param_groups]), step())[1]
    run.train()
    assert [rate for (rate,) in rates] == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])


def test_beliefs_along_longer_trials_leave_the_policy_to_its_own():
    """Its clock counts the episodes of a trial: after another's trial, and after one that it cannot play, its own."""
    spec = ContextSpec.of(environments(), inputs=("state", "action", "successor"), max_context=9)
    run = VariBAD(environments(), spec=spec, latent=2, width=5, units=5)
    assert run.policy.trial_steps == 2 * GRID.horizon
    path, rollout = run.belief_path(environments(episodes=3, new_tasks=False))
    assert path.steps == len(rollout.reward) == 3 * GRID.horizon
    assert run.policy.trial_steps == 2 * GRID.horizon
    with pytest.raises(ContextError, match="max_context"):
        run.belief_path(environments(episodes=4, new_tasks=False))
    assert run.policy.trial_steps == 2 * GRID.horizon
