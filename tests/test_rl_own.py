"""Environments of one's own by their path, and half-cheetahs, on the command line."""

import importlib.util
import json
import sys

import pytest
from test_rl_cli import refused, rl, undrawn  # noqa: F401

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.rl import own
from bayesmeta.rl.command import read_setup
from bayesmeta.rl.setups import Setup

MODULE = '''
import gymnasium
import numpy as np

import bayesmeta as bm


class Hill(gymnasium.Env):
    """A point on a line that is rewarded for being near its task."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, top, render_mode=None):
        self.top, self.render_mode = top, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = np.float32(0.1 * self.np_random.normal())
        return np.array([self.place], np.float32), {}

    def step(self, action):
        self.place += np.clip(action[0], -1, 1)
        return np.array([self.place], np.float32), -abs(float(self.place) - self.top), False, False, {}

    def render(self):
        return np.full((8, 8, 3), 128, np.uint8)


def make_env(top, render_mode=None):
    return Hill(top, render_mode)


def plain(top):
    return Hill(top)


def family():
    return limited


limited = bm.rl.GymFamily.uniform(lambda top: gymnasium.wrappers.TimeLimit(Hill(top), 4), -1.0, 1.0, name="hill")
grid = bm.rl.Grid(horizon=4)


class Inner:
    family = bm.rl.Grid(horizon=3)


def nothing():
    return 3


def two(task, other):
    return Hill(task)


number = 3
'''
SMALL = ("--tasks", 4, "--units", 4, "--iterations", 2, "--validation-tasks", 4, "--no-progress")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that one works in, with a module."""
    (tmp_path / "hill_env.py").write_text(MODULE)
    (tmp_path / "broken_env.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    for name in ("hill_env", "broken_env"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("method", ["rl2", "maml"])
def test_a_function_from_a_task_to_an_environment_is_trained_resumed_and_scored(method, here, capsys):
    out, film = here / "run", here / "film.gif"
    task = ("--env", "hill_env:make_env", "--task-range", -1, 1, "--horizon", 4, "--method", method, "--out", out)
    more = ("--copies", 3) if method == "maml" else ("--episodes", 2)
    rl("train", *task, *SMALL, *more)
    rl("evaluate", out, "--tasks", 5, "--video", film)
    found = json.loads((out / "evaluation.json").read_text())
    assert [row["name"] for row in found["rows"]] == [method, "random"]
    assert film.stat().st_size > 0
    setup = read_setup(out)
    assert (setup.env, setup.task_range, setup.horizon) == ("hill_env:make_env", (-1.0, 1.0), 4)
    told = refused(capsys, "train", *task, *SMALL, *more, "--task-values", 1, 2, "--overwrite")
    assert "either --task-values (numbers) or --task-range (two numbers" in told
    rl("train", *task, *SMALL, *more, "--resume")  # there is nothing left to do
    other = [(-2 if value == -1 else value) for value in task]
    assert "--task-range -2.0 1.0 was given" in refused(capsys, "train", *other, *SMALL, *more, "--resume").replace(
        "\n", " "
    )


def test_what_is_trained_on_are_the_tasks_that_were_given(here):
    setup = Setup("hill_env:make_env", "rl2", task_values=[1.0, 5.0], horizon=4, tasks=6, units=4, iterations=1)
    family = setup.family()
    learner = setup.filled().learner(family)
    learner.train(1)
    assert set(learner.env.tasks) == {1.0, 5.0}
    assert (family.horizon, family.name) == (4, "hill_env:make_env")
    workers = Setup("hill_env:plain", "rl2", task_values=[1.0], horizon=4, workers=True).vector(family, 2)
    assert type(workers._envs).__name__ == "AsyncVectorEnv"
    workers.close()


@pytest.mark.parametrize(("name", "horizon"), [("limited", 4), ("family", 4), ("grid", 4), ("Inner.family", 3)])
def test_a_family_of_ones_own_is_taken_as_it_is(name, horizon, here):
    setup = Setup(f"hill_env:{name}", "rl2", tasks=4, episodes=2, units=4, iterations=1).filled()
    family = setup.family()
    assert family.horizon == horizon
    setup.learner(family).train(1)
    with pytest.raises(errors.OptionError, match="is a family, which has its own"):
        Setup(f"hill_env:{name}", "rl2", task_values=(1.0,)).family()


def test_what_cannot_be_an_environment_is_refused_by_what_is_wrong(here):
    for path, message in (
        ("hill_env:", "expected module:attribute"),
        (":make_env", "expected module:attribute"),
        ("no_env:make", "module no_env of the environment no_env:make cannot be imported: ModuleNotFoundError"),
        ("broken_env:make", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("hill_env:missing", "there is no missing in hill_env"),
        ("hill_env:Inner.missing", "there is no missing in hill_env"),
        ("hill_env:number", "is an int; expected a family"),
        ("hill_env:nothing", "takes no argument and gave an int"),
        ("hill_env:two", "is a function; expected a family"),
        ("hill_env:make_env", "give its tasks by either"),
    ):
        with pytest.raises(errors.OptionError, match=message):
            own.load_family(path)
    assert str(here) not in sys.path
    with pytest.raises(errors.OptionError, match="lower end first"):
        own.load_family("hill_env:make_env", task_range=(1, 0))
    with pytest.raises(errors.OptionError, match=r"task_range is two numbers"):
        Setup("hill_env:make_env", "rl2", task_range=(1.0, 2.0, 3.0))
    with pytest.raises(errors.OptionError, match=r"task_values=\(1.0,\) is not an option of grid"):
        Setup("grid", "rl2", task_values=(1.0,))
    with pytest.raises(errors.OptionError, match="workers=True is not an option of grid"):
        Setup("grid", "rl2", workers=True).vector(bm.rl.Grid(), 2)


@pytest.mark.parametrize("method", ["rl2", "maml"])
def test_an_environment_without_a_horizon_is_refused(method, here):
    setup = Setup("hill_env:make_env", method, task_range=(0.0, 1.0)).filled()
    with pytest.raises(errors.HorizonError, match="no known horizon"):
        setup.learner(setup.family())


def test_a_video_of_an_environment_without_pictures_is_refused(here, capsys):
    rl("train", "--env", "hill_env:plain", "--task-range", 0, 1, "--horizon", 4, "--out", here / "run", *SMALL)
    assert "takes no render_mode" in refused(capsys, "evaluate", here / "run", "--video", here / "a.gif").replace(
        "\n", " "
    )


@pytest.mark.parametrize("env", ["half-cheetah-direction", "half-cheetah-velocity"])
def test_half_cheetahs_train_or_name_the_extra(env, tmp_path, capsys):
    arguments = ("train", "--env", env, "--out", tmp_path / "run", *SMALL, "--horizon", 5, "--episodes", 2)
    if importlib.util.find_spec("mujoco") is None:
        assert "install bayesmeta[mujoco]" in refused(capsys, *arguments).replace("\n", " ").replace("│ │", " ")
        return
    rl(*arguments)
    rl("evaluate", tmp_path / "run", "--tasks", 3)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"][0]["name"] == "rl2"
