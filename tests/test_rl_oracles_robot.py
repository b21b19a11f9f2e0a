"""What can be reached on the sparse point robot: against the environment, against quadrature, against a plain loop."""

import math

import pytest
import torch

from bayesmeta import errors
from bayesmeta.rl.envs import Navigation, SparsePointRobot
from bayesmeta.rl.envs.points import GoalTasks
from bayesmeta.rl.oracles.robot import half_circle, straight_returns, thompson_returns
from bayesmeta.rl.reference_policies import references

ROBOT = SparsePointRobot()


def test_straight_to_the_goal_is_what_the_environment_pays():
    goals = half_circle(50)
    env = ROBOT.vector(50, tasks=GoalTasks(goals))
    at, _ = env.reset()
    total = torch.zeros(50)
    for _ in range(ROBOT.horizon):
        _, reward, *_, info = env.step(goals - at)
        at, total = info["final_obs"], total + reward
    assert torch.allclose(straight_returns(ROBOT, goals), total, atol=1e-4)
    assert float(straight_returns(ROBOT, half_circle(2000)).mean()) == pytest.approx(13.38, abs=0.02)


def test_the_first_episode_is_a_uniform_guess():
    """Its mean is an integral over guess and goal, taken here on another grid by a plain formula."""
    angle = (torch.arange(180, dtype=torch.float64) + 0.5) / 180 * math.pi
    total = 0.0
    for guess in angle.tolist():
        x, y = math.cos(guess), math.sin(guess)
        for step in range(1, 21):
            at = torch.tensor([math.copysign(min(abs(x), 0.1 * step), x), min(y, 0.1 * step)])
            distance = ((angle.cos() - at[0]).square() + (angle.sin() - at[1]).square()).sqrt()
            total += float(torch.where(distance <= 0.2, 1 - distance, 0.0).mean()) / 180
    assert total == pytest.approx(1.48, abs=0.01)
    goals = half_circle(500).repeat(20, 1)
    first = thompson_returns(ROBOT, goals, 1, generator=3)[0]
    assert abs(float(first.mean()) - total) < 4 * float(first.std()) / 100


def test_each_guess_excludes_what_it_would_have_met():
    """Two goals far from each other: the second episode at the latest goes to the right one."""
    candidates = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    goals = candidates.repeat(200, 1)
    returns = thompson_returns(ROBOT, goals, 3, candidates=candidates, generator=0)
    at_once = returns[0] > 0
    assert 0.4 < float(at_once.float().mean()) < 0.6
    best = straight_returns(ROBOT, goals)
    assert torch.allclose(returns[0][at_once], best[at_once])
    assert torch.allclose(returns[1:], best.expand(2, -1))


def test_ideal_thompson_sampling_finds_the_goal():
    """The mean over the half circle, episode by episode, as a simulation of this rule gave it elsewhere."""
    goals = half_circle(1000).repeat(4, 1)
    returns = thompson_returns(ROBOT, goals, 11, generator=0)
    mean = returns.mean(1)
    assert (mean.diff() > 0).all()
    error = returns.std(1) / 4000**0.5
    expected = torch.tensor([1.45, 3.36, 5.08, 6.65, 8.08, 9.30, 10.49, 11.46, 12.33, 12.89, 13.21])
    assert ((mean - expected).abs() < 4 * (error.square() + 0.03**2).sqrt() + 0.1).all()
    # control: guesses that exclude nothing find it as slowly as by chance, 1 − (1 − p)ⁿ
    chance = float((returns[0] > 0).float().mean())
    by_chance = 13.38 * (1 - (1 - chance) ** 10)
    assert float(mean[10]) > by_chance + 2.0


def test_it_stands_beside_learners():
    tasks = ROBOT.sample_tasks(20, split="test")
    found = {r.name: r for r in references(ROBOT, tasks, 4)}
    ideal = found["ideal Thompson sampling"]
    assert ideal.curve.returns.shape == (4, 20)
    assert ideal.learns
    assert not ideal.optimum
    assert not ideal.knows_task
    assert (ideal.curve.returns <= found["straight to the goal"].curve.returns + 1e-4).all()
    assert "ideal Thompson sampling" not in {r.name for r in references(Navigation(sparse=True), tasks, 2)}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: half_circle(0), errors.OptionError, "points must be"),
        (lambda: straight_returns(ROBOT, torch.zeros(3)), errors.ShapeError, r"expected \[n, 2\]"),
        (lambda: thompson_returns(ROBOT, half_circle(3), 0), errors.OptionError, "episodes must be"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
