"""Evaluation takes the likeliest actions, which hang on no draw, or draws them, as it is asked to."""

import pytest
import torch
from test_rl_distilled import held_out
from test_rl_distilled import make as distilled
from test_rl_maesn_truth import small as maesn
from test_rl_pearl import pearl, robot
from test_rl_varibad import ROBOT, environments
from test_rl_varibad import learner as varibad

from bayesmeta.rl.envs import Navigation, TensorVectorEnv
from bayesmeta.rl.memory.policy import MemoryPolicy
from bayesmeta.rl.memory.rl2 import RL2


def navigation():
    return TensorVectorEnv(Navigation(horizon=4), 3, generator=0)


def of_rl2(**options):
    return RL2(navigation(), MemoryPolicy(navigation(), units=4)).evaluate(navigation(), **options).total


def of_maesn(**options):
    learner = maesn()
    env = TensorVectorEnv(Navigation(horizon=4), 3, copies=2, generator=0, dtype=torch.float64)
    learner.config = type(learner.config)(adapted="mean")  # latents at their mean: the actions alone are drawn
    return learner.evaluate(env, inner_steps=0, **options)


def of_varibad(**options):
    return varibad(ROBOT).belief_path(environments(ROBOT, new_tasks=False), **options)[1].action


#: What is done or earned, with latents that are not drawn either.
EVALUATIONS = {
    "RL2": of_rl2,
    "MAESN": of_maesn,
    "VariBAD": of_varibad,
    "PEARL": lambda **options: pearl().evaluate(robot(seed=1), exploration="mean", **options).action,
    "distilled": lambda **options: distilled().evaluate(held_out(), exploration="mean", **options).action,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_likeliest_actions_hang_on_no_draw_and_draws_on_each(name):
    evaluate = EVALUATIONS[name]
    assert torch.equal(evaluate(greedy=True, generator=0), evaluate(greedy=True, generator=1))
    assert not torch.equal(evaluate(greedy=False, generator=0), evaluate(greedy=False, generator=1))
    assert torch.equal(evaluate(greedy=False, generator=1), evaluate(greedy=False, generator=1))
