"""Ordinary gymnasium environments behind the interface of the tensor environments, and what happens when one fails."""

import fractions
import importlib.util
import linecache
import os
import re
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch

from bayesmeta import errors
from bayesmeta.rl import envs
from bayesmeta.rl.envs import cheetah
from bayesmeta.rl.envs.cheetah import (
    VelocityReward,
    cheetah_direction,
    cheetah_directions,
    cheetah_velocities,
    cheetah_velocity,
)
from bayesmeta.rl.envs.grid import CellTasks
from bayesmeta.rl.envs.gym import GymVectorEnv
from bayesmeta.rl.envs.gym_worker import place


class Counter(gymnasium.Env):
    """Counts its steps; may crash, end, or return a strange reward, as its task says."""

    observation_space = gymnasium.spaces.Box(-100, 100, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, task):
        self.task = task
        if "space" in task:
            self.action_space = task["space"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.offset = 0, float(self.np_random.random())
        return self.seen(), {}

    def seen(self):
        return np.array([self.count + self.offset], dtype=np.float32)

    def step(self, action):
        self.count += 1
        if self.count == self.task.get("raises"):
            raise ZeroDivisionError("the joint broke")
        if self.count == self.task.get("dies"):
            os._exit(3)
        reward = float("nan") if self.count == self.task.get("nan") else float(np.sum(action))
        return self.seen(), reward, self.count == self.task.get("ends"), self.count == 4, {}


def make(task):
    return Counter(task)


def grid(task):
    return envs.Grid(horizon=4).plain(task={"goal": task})


# -- the same interface ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [False, True])
def test_plain_environments_behind_it_equal_tensor_environments(workers):
    goals = [(0.0, 2.0), (3.0, 0.0)]
    ours = envs.Grid(horizon=4).vector(
        2, copies=2, tasks=CellTasks(torch.tensor(goals)), episodes_per_trial=2, generator=0
    )
    theirs = GymVectorEnv(grid, goals, copies=2, episodes_per_trial=2, workers=workers)
    assert (theirs.horizon, theirs.num_envs) == (4, 4)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(ours.reset()[0], theirs.reset()[0])
    for _ in range(11):
        actions = torch.randint(5, (4,), generator=generator)
        left, right = ours.step(actions), theirs.step(actions)
        for a, b in zip((*left[:4], *left[4].values()), (*right[:4], *(right[4][key] for key in left[4]))):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        assert torch.equal(ours.clock, theirs.clock)
        assert torch.equal(ours.episode, theirs.episode)
    theirs.close()


def test_ends_and_limits_stay_apart_and_final_observations_are_kept():
    env = GymVectorEnv(make, [{"ends": 2}, {}, {"ends": 4}], horizon=4)
    start, _ = env.reset(seed=0)
    for step in range(1, 5):
        observation, reward, terminated, truncated, info = env.step(torch.full((3, 2), 0.25))
        assert reward.tolist() == [0.5] * 3
        assert terminated.tolist() == [step in (2, 4), False, step == 4]
        assert truncated.tolist() == [False, step == 4, False]  # the last is an end and a limit at once: an end
        assert info["trial_ended"].tolist() == (terminated | truncated).tolist()
        if step == 2:
            # s′ is of the old episode, the observation of the new one.
            assert float(info["final_obs"][0] - start[0]) == pytest.approx(2, abs=1e-5)
            assert float(observation[0]) < 1
            assert torch.equal(observation[1:], info["final_obs"][1:])
    env.close()


# -- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"raises": 2}, "task 1 failed in step: ZeroDivisionError: the joint broke"),
        ({"nan": 2}, "task 1 returned the reward nan"),
    ],
)
def test_a_crash_says_which_task(workers, fault, message):
    env = GymVectorEnv(make, [{}, fault, {}], copies=2, workers=workers)
    env.reset(seed=0)
    env.step(torch.zeros(6, 2))
    with pytest.raises(errors.EnvCrashError, match=message) as caught:
        env.step(torch.zeros(6, 2))
    assert caught.value.task == 1
    where = re.search(r"\((\S+), line (\d+), in (\w+)\)", str(caught.value))
    if "raises" in fault:  # the user's line; a reward has none
        assert where is not None
        assert (where[1], where[3]) == (__file__, "step")
        assert "raise ZeroDivisionError" in linecache.getline(__file__, int(where[2]))
    else:
        assert where is None
    with pytest.raises(errors.EnvError, match="call reset"):
        env.step(torch.zeros(6, 2))


def test_a_process_that_dies_says_which_task():
    env = GymVectorEnv(make, [{}, {"dies": 2}], workers=True)
    env.reset(seed=0)
    env.step(torch.zeros(2, 2))
    with pytest.raises(errors.EnvCrashError, match="task 1 died") as caught:
        env.step(torch.zeros(2, 2))
    assert caught.value.task == 1


def test_the_place_of_an_error_is_in_the_users_code_and_not_in_a_librarys():
    def deep():
        return np.linalg.inv(np.zeros((2, 3)))  # raises within NumPy

    with pytest.raises(np.linalg.LinAlgError) as caught:
        deep()
    assert place(caught.value).endswith("in deep)")
    with pytest.raises(KeyError) as caught:
        fractions.Fraction.from_float.__globals__["none"]
    assert __file__ in place(caught.value)
    assert place(ValueError("never raised")) == ""


@pytest.mark.parametrize("workers", [False, True])
def test_a_package_that_drawing_needs_is_named(workers):
    env = GymVectorEnv(Undrawn, [0, 1], workers=workers, horizon=3)
    env.reset(seed=0)
    with pytest.raises(errors.EnvError, match=r"cannot be drawn: .*pip install brushes.*ask for no pictures"):
        env.pictures()
    env.close()


class Undrawn(Counter):
    """Needs a package for its picture."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, task):
        super().__init__({})

    def render(self):
        raise gymnasium.error.DependencyNotInstalled("brushes is not installed, run `pip install brushes`")


def test_environments_that_do_not_fit_are_refused():
    discrete = gymnasium.spaces.Discrete(2)
    with pytest.raises(errors.SpaceError, match="task 1 has the action_space Discrete"):
        GymVectorEnv(make, [{}, {"space": discrete}])
    with pytest.raises(errors.SpaceError, match="expected Discrete or Box"):
        GymVectorEnv(make, [{"space": gymnasium.spaces.MultiBinary(2)}])
    limit = lambda steps: gymnasium.wrappers.TimeLimit(Counter({}), steps)  # noqa: E731
    with pytest.raises(errors.HorizonError, match="task 1 ends after"):
        GymVectorEnv(lambda steps: envs.Grid(horizon=steps).plain(), [3, 5])
    assert GymVectorEnv(limit, [2, 3], horizon=3).horizon == 3
    with pytest.raises(errors.OptionError, match="no tasks"):
        GymVectorEnv(make, [])
    env = GymVectorEnv(make, [{}])
    env.reset()
    for wrong in (torch.zeros(1, dtype=torch.int64), torch.zeros(2, 2), [0.0, 0.0]):
        with pytest.raises(errors.ShapeError, match=r"expected a tensor \[1, 2\] of floating"):
            env.step(wrong)
    with pytest.raises(errors.OptionError, match="unknown options of reset: mass"):
        env.reset(options={"mass": 1})


# -- half-cheetah ------------------------------------------------------------------------------------------------------


class Runner(Counter):
    """What the cheetah's wrapper needs of one."""

    def step(self, action):
        observation, _, terminated, truncated, _ = super().step(action)
        return observation, 99.0, terminated, truncated, {"x_velocity": 1.5, "reward_ctrl": -0.2}


def test_rewards_of_velocities():
    for options, reward in (({"direction": -1.0}, -1.7), ({"velocity": 2.0}, -0.7), ({"velocity": 0.0}, -1.7)):
        env = VelocityReward(Runner({}), **options)
        env.reset(seed=0)
        assert env.step(np.zeros(2))[1] == pytest.approx(reward)


def mujoco_is_here():
    return importlib.util.find_spec("mujoco") is not None


@pytest.mark.skipif(mujoco_is_here(), reason="is about its absence")
def test_the_cheetah_says_what_it_needs():
    for make in (lambda: cheetah_direction(1.0), cheetah_directions, cheetah_velocities):
        with pytest.raises(errors.UnsupportedError, match=r"bayesmeta\[mujoco\]\. \(No module named 'mujoco'\)"):
            make()


@pytest.mark.skipif(not mujoco_is_here(), reason="needs MuJoCo")
def test_the_cheetah_is_rewarded_as_its_task_says(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rewards = []
    for family, tasks in ((cheetah_directions(horizon=5), [1.0, -1.0]), (cheetah_velocities(), [0.0, 1.5])):
        env = family.vector(2, tasks=tasks, generator=0)
        assert env.horizon == (5 if family.name.endswith("direction") else 200)
        generator = torch.Generator().manual_seed(1)
        for change in (tasks, tasks[::-1]):  # the same seeds and actions under the tasks exchanged
            first, _ = env.reset(seed=3, options={"tasks": change})
            assert first.shape == (2, 17)
            actions = (torch.rand(5, 1, 6, generator=generator.manual_seed(1)) * 2 - 1).expand(5, 2, 6)
            rewards.append(torch.stack([env.step(action)[1] for action in actions]))
        env.close()
    forward, exchanged, slow, fast = rewards
    control = -0.1 * (torch.rand(5, 1, 6, generator=generator.manual_seed(1)) * 2 - 1).square().sum(-1)
    assert torch.allclose(forward - control, -(exchanged - control), atol=1e-5)
    assert float((forward - control).abs().min()) > 1e-3
    # row 0 of the first run stands still by its task, row 0 of the second wants 1.5 m/s
    speed = forward[:, 0] - control[:, 0]
    assert torch.allclose(slow[:, 0] - control[:, 0], -speed.abs(), atol=1e-5)
    assert torch.allclose(fast[:, 0] - control[:, 0], -(speed - 1.5).abs(), atol=1e-5)
    assert not list(tmp_path.iterdir())  # MuJoCo would write a log of warnings
    assert "deprecated" not in capfd.readouterr().err


@pytest.mark.skipif(not mujoco_is_here(), reason="needs MuJoCo")
@pytest.mark.parametrize("task", [{"direction": -1.0}, {"velocity": 0.7}])
def test_the_cheetah_steps_as_gymnasiums_does(task):
    swift = (cheetah_direction if "direction" in task else cheetah_velocity)(*task.values(), horizon=7)
    plain = VelocityReward(cheetah._cheetah(7, None), **task)
    draws = np.random.default_rng(0)
    for seed in (3, None, None):  # the episodes behind a seed go on with the environment's own randomness
        seen, expected = swift.reset(seed=seed)[0], plain.reset(seed=seed)[0]
        assert np.array_equal(seen, expected)
        for step in range(7):
            action = draws.uniform(-1, 1, 6).astype(np.float32)
            found, told = swift.step(action), plain.step(action)
            assert np.array_equal(found[0], told[0])
            assert found[1:4] == told[1:4]
            assert found[3] == (step == 6)
    assert not np.array_equal(swift.reset(seed=4)[0], plain.reset(seed=5)[0])  # control: another seed, another state


@pytest.mark.skipif(not mujoco_is_here(), reason="needs MuJoCo")
def test_the_cheetah_goes_back_to_a_state():
    family = cheetah_velocities(horizon=6)
    env = family.vector(2, new_tasks=True, generator=0)
    env.reset()
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        env.step(torch.randn(2, 6, generator=generator))
    state, action = env.state_dict(), torch.randn(2, 6, generator=generator)
    expected = env.step(action)
    again = family.vector(2, new_tasks=True, generator=5)
    again.load_state_dict(state)
    found = again.step(action)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
