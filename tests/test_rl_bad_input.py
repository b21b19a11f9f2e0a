"""Learners and environments that do not fit each other are refused when they are put together, by what is wrong."""

import pytest

import bayesmeta as bm
from bayesmeta import errors

BANDIT = bm.rl.BernoulliBandit(arms=2, horizon=3)
NAVIGATION = bm.rl.Navigation(horizon=3)


def network(inputs, outputs):
    return bm.nets.mlp(inputs, [4], outputs, activation="tanh")


@pytest.mark.parametrize(
    ("family", "inputs", "head", "message"),
    [
        (BANDIT, 1, bm.rl.GaussianHead(2), r"actions are 2 numbers; the environment's are Discrete\(2\), 2 choices"),
        (NAVIGATION, 2, bm.rl.CategoricalHead(2), r"actions are 2 choices; the environment's are Box.*, 2 numbers"),
        (BANDIT, 1, bm.rl.CategoricalHead(3), "are 3 choices;.* 2 choices"),
        (NAVIGATION, 2, bm.rl.GaussianHead(3), "are 3 numbers;.* 2 numbers"),
        (NAVIGATION, 7, bm.rl.GaussianHead(2), r"cannot read the observations, 2 numbers of Box"),
    ],
)
def test_a_policy_for_other_actions_or_observations(family, inputs, head, message):
    policy = bm.rl.TaskPolicy(network(inputs, head.outputs), head)
    with pytest.raises(errors.SpaceError, match=message):
        bm.rl.MAMLRL(family.vector(2, copies=2), policy)


@pytest.mark.parametrize(("family", "inputs"), [(BANDIT, 1), (NAVIGATION, 2)])
@pytest.mark.parametrize("context", [0, 3])
def test_a_policy_that_fits_is_taken(family, inputs, context):
    from bayesmeta.rl.policies import head_for

    head = head_for(family.action_space)
    if context:
        policy = bm.rl.ContextPolicy(network(inputs + context, head.outputs), head, context)
    else:
        policy = bm.rl.TaskPolicy(network(inputs, head.outputs), head)
    assert bm.rl.MAMLRL(family.vector(2, copies=2), policy).iteration == 0


def test_a_policy_that_remembers_other_environments():
    env = NAVIGATION.vector(2, new_tasks=True)
    with pytest.raises(errors.SpaceError, match="this policy was made for Discrete"):
        bm.rl.RL2(env, bm.rl.MemoryPolicy(BANDIT.vector(2), units=4))
    learner = bm.rl.RL2(env, iterations=1, units=4)
    with pytest.raises(errors.SpaceError, match="this policy was made for Box"):
        learner.evaluate(BANDIT.vector(2))
    with pytest.raises(errors.SpaceError, match="this policy was made for Box"):
        bm.rl.fit(learner, validation=BANDIT.vector(2), progress=False)
