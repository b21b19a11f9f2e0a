"""PEARL's settings: when it begins to learn, and whether evaluation draws its actions."""

import torch
from test_rl_pearl import pearl, robot

from tests.faults.driver import difference


def test_nothing_is_learned_before_the_last_iteration_of_the_warmup():
    learner = pearl(warmup=3)
    before = {name: value.clone() for name, value in learner.policy.state_dict().items()}
    assert ["critic" in row for row in learner.train(2)] == [False, False]
    assert difference(before, dict(learner.policy.state_dict())) is None
    assert len(learner.replay) == 3 * 2 * 3 * 4  # tasks, iterations, episodes, steps
    assert "critic" in learner.train(1)[0]
    assert difference(before, dict(learner.policy.state_dict())) is not None


def test_evaluation_takes_the_likeliest_actions_or_draws():
    learner = pearl()
    likeliest, drawn = (learner.evaluate(robot(seed=1), greedy=greedy, generator=0) for greedy in (True, False))
    assert torch.equal(likeliest.first_state, drawn.first_state)  # the latents' draws come first
    first = likeliest.moments.observation[0]
    expected, _ = learner.policy.acting(greedy=True)(first, likeliest.first_state, torch.Generator())
    assert torch.equal(likeliest.action[0], expected)
    assert (drawn.action[0] - expected).abs().min() > 0
