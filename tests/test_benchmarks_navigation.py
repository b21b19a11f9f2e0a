"""The benchmark of navigation: bounds, errors, tuning on validation goals alone, equal budgets, rows and bars."""

import argparse
import dataclasses
import math

import pytest
import torch
from torch import nn

from bayesmeta.rl.envs import Navigation, TensorVectorEnv
from bayesmeta.rl.envs.points import GoalTasks
from bayesmeta.rl.policies import GaussianHead, TaskPolicy
from bayesmeta.rl.policy_gradient.inner import Estimation
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from bayesmeta.rl.setups import Setup
from benchmarks import navigation


def test_standing_still_and_the_oracle_are_those_of_their_formulas():
    goals = Navigation().sample_tasks(50, generator=1, split="test")
    still, oracle = navigation.still_and_oracle(goals)
    env = TensorVectorEnv(Navigation(), 50, tasks=goals)
    env.reset()
    walked = sum(env.step(torch.zeros(50, 2))[1] for _ in range(100))
    torch.testing.assert_close(still, walked)
    # each coordinate is 0.1 a step nearer, until it is there
    left = (goals.goal.abs().unsqueeze(0) - 0.1 * torch.arange(1, 101).view(-1, 1, 1)).clamp_min(0)
    torch.testing.assert_close(oracle, -left.square().sum((0, 2)), rtol=1e-4, atol=1e-5)
    many = Navigation().sample_tasks(20_000, generator=1)
    assert navigation.still_and_oracle(many)[0].mean() == pytest.approx(-100 / 6, abs=0.3)


def test_errors_have_the_part_of_goals_and_that_of_seeds():
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(1500):  # what the error claims, against the spread of means over repetitions
        goal, seed = torch.randn(20, generator=generator), 0.5 * torch.randn(4, 1, generator=generator)
        means.append(goal + seed)
    spread = torch.stack([values.mean() for values in means]).std()
    claimed = torch.tensor([navigation.error_of(values) for values in means]).square().mean().sqrt()
    assert claimed == pytest.approx(float(spread), rel=0.1)
    alone = torch.tensor([v.mean(0).std() / math.sqrt(20) for v in means]).square().mean().sqrt()
    assert alone < 0.8 * spread  # the control: without the seeds it is too small


def test_budgets_of_the_compared_are_equal():
    for first, second in navigation.PAIRS.items():
        meta, joint = navigation.METHODS[first], navigation.METHODS[second]
        assert joint.joint == meta.joint + (1 + meta.inner) * meta.meta
        assert (meta.raw, joint.meta) == (joint.raw, 0)
        assert meta.meta > 0


def test_the_command_lines_defaults_are_these_settings():
    setup, method = Setup("navigation", "maml").filled(), navigation.METHODS["maml_rl"]
    learner, run = setup.learner(Navigation()), navigation.trained(method, 0, quick=True)
    assert learner.config == dataclasses.replace(run.config, joint_iterations=method.joint)
    assert setup.iterations == method.joint + method.meta
    assert (setup.tasks, setup.copies) == (20, 10)
    assert learner.theta.numel() == run.theta.numel()


def inner_steps_of_a_linear_policy(deviation, *, raw, tasks=20, horizon=30):
    """Steps of the bias at rate 1, ``[2 goals, tasks, 2]``, of a policy that is drawn to the start, mean −x / 2."""
    far = torch.tensor([0.4, 0.1], dtype=torch.float64)
    goals = torch.stack([far, far / 4]).repeat_interleave(tasks, 0)
    env = TensorVectorEnv(
        Navigation(horizon=horizon), 2 * tasks, copies=50, tasks=GoalTasks(goals), dtype=torch.float64
    )
    policy = TaskPolicy(nn.Linear(2, 2).double(), GaussianHead(2, log_std=math.log(deviation)))
    start = torch.cat([-0.5 * torch.eye(2).flatten(), torch.zeros(2), torch.full((2,), math.log(deviation))]).double()
    views = policy.flat.views(start.unsqueeze(0))
    assert torch.equal(views["weight"][0], -0.5 * torch.eye(2).double())
    policy.start.data = start
    estimation = Estimation(gamma=0.9, standardise=not raw)
    learner = MAMLRL(env, policy, MAMLRLConfig(inner_lr=1.0, estimation=estimation))
    phi = learner.path(start, [], 2 * tasks, create_graph=False)[-1]
    steps = learner.episodes(env, phi, learner.generator)
    moved = learner.path(start, [steps], 2 * tasks, create_graph=False)[-1] - phi
    return policy.flat.views(moved)["bias"].unflatten(0, (2, tasks)), far


def test_raw_advantages_give_steps_to_scale_and_standardised_ones_grow_as_noise_shrinks():
    """The gradient of the bias in closed form: noise moves the point, which is drawn back by half in each step, so
    that it adds 2 g (γ / 2)^j to the reward j steps on. It hangs on neither the noise nor on anything but g. With
    standardised advantages (the control) it grows as 1 / standard deviation, and says little of |g|."""
    remaining = torch.arange(30, 0, -1, dtype=torch.float64)
    scale = 2 * ((1 - 0.45**remaining) / (1 - 0.45)).mean()
    sizes = {}
    for deviation in (0.02, 0.005):
        steps, far = inner_steps_of_a_linear_policy(deviation, raw=True)
        for found, goal in zip(steps, (far, far / 4)):
            error = found.std(0) / math.sqrt(20)
            assert ((found.mean(0) - scale * goal).abs() < 5 * error).all()
            assert (error < 0.15 * scale * goal.norm()).all()
        sizes[deviation] = inner_steps_of_a_linear_policy(deviation, raw=False)[0].mean(1).norm(dim=-1)
    growth = sizes[0.005] / sizes[0.02]
    assert growth[0] == pytest.approx(4.0, rel=0.15)
    assert (sizes[0.005][0] / sizes[0.005][1]) < 2.5  # the goal is 4 times as far


class Told:
    """Answers with the distance of the first rate from 0.05 and of the third from 0.025."""

    def __init__(self):
        self.goals = []

    def evaluate(self, env, *, inner_steps, rates, generator):
        self.goals.append(env.tasks.goal)
        values = [-20.0, -((rates[0] - 0.05) ** 2), -1.0, -((rates[-1] - 0.025) ** 2)][: inner_steps + 1]
        return torch.tensor(values).unsqueeze(1).expand(-1, env.num_tasks)


def test_rates_are_tuned_on_validation_goals_alone():
    told, method = Told(), navigation.Method(1, 0, True, 0.1, {})
    assert navigation.tuned_rates(told, method, 6, 2, 3) == [0.05, 0.025, 0.025]
    validation = Navigation().sample_tasks(6, generator=3, split="validation").goal
    assert all(torch.equal(goals, validation) for goals in told.goals)
    test = Navigation().sample_tasks(6, generator=3, split="test").goal
    assert not torch.isin(test, validation).any()


def test_rows_bars_and_differences():
    seeds, goals = 3, 40
    meta = torch.tensor([-16.0, -4.0, -3.0, -3.5]).view(1, 4, 1) + torch.zeros(seeds, 4, goals)
    rows = {row.name: row for row in navigation.rows_of("maml_rl", navigation.METHODS["maml_rl"], meta, 1.0, True)}
    assert [rows[f"maml_rl_{when}"].passes for when in navigation.WHEN] == [True, True, None, False]
    unheld = navigation.rows_of("maml_rl", navigation.METHODS["maml_rl"], meta, 1.0, False)
    assert all(row.bar is None for row in unheld)
    noise = torch.randn(seeds, 1, goals, generator=torch.Generator().manual_seed(0))
    ahead = navigation.ahead_rows({"maml_rl": meta + noise, "joint": meta + noise - 0.5})
    assert [row.name for row in ahead] == [f"maml_rl_against_joint_after_{n}" for n in (1, 2, 3)]
    assert all(row.difference == pytest.approx(0.5, abs=1e-5) and row.standard_error < 1e-5 for row in ahead)  # paired
    assert navigation.ahead_rows({"maml_rl": meta}) == []


@pytest.mark.parametrize("name", list(navigation.METHODS))
def test_a_short_run_trains_what_it_says(name):
    run = navigation.trained(navigation.METHODS[name], 0, quick=True)
    assert run.config.inner_steps == {"maml_rl_three_steps": 3}.get(name, 1 if name.startswith("maml") else 0)
    assert run.iteration == 2
    start = navigation.policy_of(0).theta
    assert 0 < (run.theta - start).norm() < 2
    assert torch.equal(run.policy.theta, run.theta)


def test_unknown_methods_are_refused():
    args = argparse.Namespace(methods=["pearl"], threads=1, quick=True, goals=4, seed=0, trainings=1)
    with pytest.raises(SystemExit, match="unknown method pearl"):
        navigation.run(args)
