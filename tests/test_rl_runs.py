"""Runs of meta-RL: a resumed one is the same bit for bit, also after kill -9; failures save what was done before."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.reference_policies import references
from bayesmeta.rl.watching import watch
from bayesmeta.train import checkpoint
from tests.faults.driver import contents, difference

BANDIT = bm.rl.BernoulliBandit(arms=2, horizon=4)
NAVIGATION = bm.rl.Navigation(horizon=3)
KILLS = Path(__file__).with_name("rl_kills.py")


def rl2(iterations=6, *, family=BANDIT, seed=0, **options):
    env = bm.rl.TensorVectorEnv(family, 8, new_tasks=True, episodes_per_trial=2, generator=seed)
    return bm.rl.RL2(env, iterations=iterations, units=4, seed=seed, **options)


def maml(*, seed=0, **options):
    env = bm.rl.TensorVectorEnv(NAVIGATION, 3, copies=2, generator=seed)
    torch.manual_seed(seed)
    policy = bm.rl.TaskPolicy(bm.nets.mlp(2, [4], 2, activation="tanh"), bm.rl.GaussianHead(2, log_std=-2.0))
    return bm.rl.MAMLRL(env, policy, bm.rl.MAMLRLConfig(**options), seed=seed)


def held_out(family=BANDIT, tasks=6, **options):
    options = {"episodes_per_trial": 2} | options
    return bm.rl.TensorVectorEnv(family, tasks, split="validation", generator=9, **options)


def run(learner, iterations, out=None, **options):
    options = {"validate_every": 3, "checkpoint_every": 2, "progress": False} | options
    return bm.rl.fit(learner, iterations=iterations, out=out, **options)


# -- curves ------------------------------------------------------------------------------------------------------------


def test_a_curve_has_means_and_standard_errors_over_tasks():
    curve = AdaptationCurve(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]]), "episode")
    assert curve.mean() == [3.0, 0.0]
    assert curve.standard_error() == pytest.approx([7**0.5 / 3**0.5, 0.0])  # variance (4 + 1 + 9) / 2
    assert np.isnan(AdaptationCurve(torch.ones(1, 1), "step").standard_error()[0])


def test_the_log_and_the_result_have_the_curves(tmp_path):
    result = run(rl2(), 6, tmp_path, validation=held_out())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    measured = [line for line in lines if "return_0" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    for row, line in zip(result.curves, measured, strict=True):
        assert {name: line[name] for name in row} == row
        assert {"return_0", "return_0_se", "return_1", "return_1_se"} <= row.keys()
    assert result.last.returns.shape == (2, 6)
    assert result.curves[-1]["return_1"] == pytest.approx(float(result.last.returns[1].mean()))
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    assert "return" in repr(result)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["learner"] == "RL2"
    assert config["environments"]["arms"] == 2


def test_the_curve_of_steps_is_the_learners_evaluation(tmp_path):
    learner = maml()
    result = run(learner, 2, validation=held_out(NAVIGATION, copies=2, episodes_per_trial=1), points=3)
    expected = learner.evaluate(held_out(NAVIGATION, copies=2, episodes_per_trial=1), inner_steps=3, generator=0)
    assert torch.equal(result.last.returns, expected)
    assert result.last.unit == "step"
    assert [name for name in result.curves[0] if not name.endswith("_se")] == [
        "step", "return_0", "return_1", "return_2", "return_3",
    ]  # fmt: skip


def test_validation_does_not_move_the_run_and_is_under_the_same_noise_each_time():
    with_curves, without = rl2(), rl2()
    result = run(with_curves, 4, validation=held_out(), validate_every=1)
    run(without, 4)
    assert difference(with_curves.state_dict(), without.state_dict()) is None
    frozen = rl2(config=bm.rl.PPOConfig(lr=1e-30, last_lr=1e-30))  # nothing is learned
    result = run(frozen, 4, validation=held_out(), validate_every=1)
    values = [{k: v for k, v in row.items() if k != "step"} for row in result.curves]
    assert all(row == values[0] for row in values)


def test_tensorboard_has_the_curves(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(rl2(), 4, tmp_path, validation=held_out(), tensorboard=True)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/reward", "validation/return_0", "validation/return_1_se"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("validation/return_0")] == [0, 3, 4]


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rl2", "lstm", "maml"])
def test_a_resumed_run_is_the_same_bit_for_bit(kind, tmp_path):
    def make():
        if kind == "maml":
            return maml(learn_rates=True), held_out(NAVIGATION, copies=2, episodes_per_trial=1)
        # rollouts end in the middle of a trial, so that its memory and its environments go on
        return rl2(steps=5, memory_kind="lstm" if kind == "lstm" else "gru"), held_out()

    for name, parts in (("whole", (6,)), ("parts", (1, 4, 6))):
        for number, until in enumerate(parts):
            learner, validation = make()
            run(learner, until, tmp_path / name, validation=validation, resume=number > 0, validate_every=2)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    for content in (whole, parts):  # a part's last iteration is measured too
        content["log"] = [{k: v for k, v in row.items() if not k.startswith("return")} for row in content["log"]]
        content["checkpoint.pt"].pop("curves")
        content.pop("checkpoint.previous.pt")
    assert difference(whole, parts) is None
    # control: another seed is another run
    other, validation = (maml(seed=1), None) if kind == "maml" else (rl2(steps=5, seed=1), None)
    run(other, 6, tmp_path / "other", validation=validation)
    assert difference(whole, contents(tmp_path / "other")) is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes of torch, and looks into /proc")
@pytest.mark.parametrize(("kills", "kinds"), [(2, ["rl2"]), pytest.param(16, [], marks=pytest.mark.slow)])
def test_runs_that_are_killed_go_on_bit_for_bit(kills, kinds):
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = tempfile.mkdtemp(prefix="bayesmeta-rl-kills-", dir=place)
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        result = subprocess.run(
            [sys.executable, str(KILLS), folder, str(kills), "1", *kinds],
            capture_output=True, text=True, cwd=KILLS.parents[1], env={**os.environ, **alone},
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert result.returncode == 0, result.stderr
    results = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(results) == kills
    assert [r for r in results if r["difference"] is not None] == []
    if kills > 2:
        assert len({r["step"] for r in results}) > 1  # not all before the first checkpoint, or in one place


def test_other_options_are_refused_by_name(tmp_path):
    run(rl2(), 2, tmp_path)
    for learner, name in (
        (rl2(reward_scale=2.0), "'reward'"),
        (rl2(7), "'iterations'"),
        (rl2(family=bm.rl.BernoulliBandit(arms=2, horizon=5)), "'steps'|'horizon'"),
        (rl2(config=bm.rl.PPOConfig(clip=0.1)), "'clip'"),
        (maml(), "'learner'"),
    ):
        with pytest.raises(errors.CheckpointError, match=name):
            run(learner, 4, tmp_path, resume=True)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 2
    with pytest.raises(errors.RunFolderError, match="already holds a run"):
        run(rl2(), 4, tmp_path)


def test_what_was_learned_is_loaded_without_the_environments(tmp_path):
    learner = rl2()
    run(learner, 2, tmp_path)
    elsewhere = bm.rl.RL2(bm.rl.TensorVectorEnv(BANDIT, 3, new_tasks=True), iterations=1, units=4, seed=8)
    before = elsewhere.env.state_dict()
    assert bm.rl.load_learner(tmp_path, elsewhere) is elsewhere
    assert difference(dict(learner.policy.state_dict()), dict(elsewhere.policy.state_dict())) is None
    assert difference(before, elsewhere.env.state_dict()) is None
    with pytest.raises(errors.CheckpointError, match="expected a MAMLRL"):
        bm.rl.load_learner(tmp_path, maml())


def test_a_signal_saves_the_iteration_and_then_stops(tmp_path):
    learner, whole, resumed = rl2(), rl2(), rl2()
    collect = learner._iterate
    learner._iterate = lambda: (collect(), learner.iteration == 2 and os.kill(os.getpid(), signal.SIGINT))[0]
    with pytest.raises(KeyboardInterrupt, match="after iteration 3; its checkpoint is in"):
        run(learner, 6, tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 3
    run(resumed, 6, tmp_path, resume=True)
    run(whole, 6)
    assert difference(whole.state_dict(), resumed.state_dict()) is None


# -- failures ----------------------------------------------------------------------------------------------------------


class Fails(gymnasium.Env):
    """An environment of three steps that crashes, or gives NaN, in task 1 after so many steps in all."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    horizon = 3

    def __init__(self, task, how, at):
        self.task, self.how, self.at, self.total, self.clock = task, how, at, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.clock, self.total = self.clock + 1, self.total + 1
        failed = self.task == 1 and self.total == self.at
        if failed and self.how == "crash":
            raise ZeroDivisionError("the simulator broke")
        if failed and self.how == "dies":
            os._exit(3)
        reward = float("nan") if failed else float(action)
        return np.full(2, self.clock / 3, np.float32), reward, False, self.clock == 3, {}


def failing(how, at, workers=False):
    env = bm.rl.GymVectorEnv(
        lambda task: Fails(task, how, at), [0, 1, 2], episodes_per_trial=2, generator=0, workers=workers
    )
    return bm.rl.RL2(env, iterations=9, units=4, seed=0)


@pytest.mark.parametrize(("how", "workers"), [("crash", False), ("nan", False), ("crash", True), ("dies", True)])
def test_an_environment_that_fails_is_named_and_what_was_done_is_saved(how, workers, tmp_path):
    learner = failing(how, 27, workers)  # six steps a trial: in the fifth iteration, between checkpoints
    with pytest.raises(errors.EnvCrashError) as caught:
        run(learner, 9, tmp_path, checkpoint_every=3)
    assert caught.value.task == 1
    message = str(caught.value)
    assert "task 1" in message
    assert "iteration 5" in message
    assert f"up to iteration 4 is saved in {tmp_path}" in message
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 4
    same = failing(how, at=1000)  # the same run without the failure
    run(same, 4)
    assert difference(dict(same.policy.state_dict()), dict(saved["learner"]["policy"])) is None
    mended = failing(how, at=1000)
    run(mended, 9, tmp_path, resume=True)
    assert mended.iteration == 9
    run(whole := failing(how, at=1000), 9)
    assert difference(dict(whole.policy.state_dict()), dict(mended.policy.state_dict())) is None


class Poisoned(bm.rl.Navigation):
    """Navigation whose reward is NaN in task 2 at the last step of each episode."""

    def advance(self, tasks, state, actions, noise):
        after, reward, ended, info = super().advance(tasks, state, actions, noise)
        bad = (torch.arange(len(reward)) // 2 == 2) & (float(after.position.abs().max()) > -1)
        return after, torch.where(bad, torch.nan, reward), ended, info


def test_a_nan_reward_names_task_and_step(tmp_path):
    learner = maml()
    learner.env = bm.rl.TensorVectorEnv(Poisoned(horizon=3), 3, copies=2)
    with pytest.raises(errors.NonFiniteDataError, match=r"in step 0 .*task 2, copy 0.*in iteration 1"):
        run(learner, 2, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    learner = rl2()
    iterate = learner._iterate

    def poison():
        row = iterate()
        if learner.iteration == 4:
            with torch.no_grad():
                next(learner.policy.parameters()).fill_(torch.nan)
        return row

    learner._iterate = poison
    with pytest.raises(errors.NonFiniteLossError, match=r"after iteration 5.*in iteration 5\. The last good"):
        run(learner, 6, tmp_path, checkpoint_every=1)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 4
    assert all(torch.isfinite(value).all() for value in saved["learner"]["policy"].values())


def test_bad_options_are_refused(tmp_path):
    for options, message in (
        ({"iterations": 0}, "iterations"),
        ({"iterations": 7}, "made for 6"),
        ({"iterations": 2, "validate_every": 0}, "validate_every"),
        ({"iterations": 2, "points": 0}, "points"),
        ({"iterations": 2, "resume": True}, "needs out="),
        ({"iterations": 2, "resume": "yes", "out": tmp_path}, "resume is 'yes'"),
    ):
        with pytest.raises(errors.OptionError, match=message):
            bm.rl.fit(rl2(), **options)
    with pytest.raises(errors.OptionError, match="no number of its own"):
        bm.rl.fit(maml())
    with pytest.raises(errors.OptionError, match="has no train"):
        bm.rl.fit(object(), iterations=1)


# -- watching, references ----------------------------------------------------------------------------------------------


def test_what_is_watched_is_what_happens():
    """Rewards of the paths add up to the curve; a path's last position has the last reward."""
    learner = maml()
    env = bm.rl.TensorVectorEnv(NAVIGATION, 4, split="test", generator=2)  # one copy: the mean is the episode
    seen = watch(learner, env, points=2)
    again = bm.rl.TensorVectorEnv(NAVIGATION, 4, split="test", generator=2)
    curve = learner.curve(again, points=2, generator=0)
    sums = torch.stack([torch.stack([path.sum() for path in task]) for task in seen.rewards]).T
    assert torch.allclose(sums, curve.returns)
    for task in range(4):
        for path, reward in zip(seen.paths[task], seen.rewards[task], strict=True):
            assert path.shape == (4, 2)
            assert torch.allclose(-(path[1:] - seen.tasks["goal"][task]).square().sum(-1), reward)
    memory = rl2(family=bm.rl.BeamSteering(horizon=6))
    env = bm.rl.TensorVectorEnv(bm.rl.BeamSteering(horizon=6), 5, episodes_per_trial=2, split="test", generator=1)
    seen = watch(memory, env)
    assert [len(task) for task in seen.rewards] == [2] * 5  # the trials after it are left out
    env = bm.rl.TensorVectorEnv(bm.rl.BeamSteering(horizon=6), 5, episodes_per_trial=2, split="test", generator=1)
    lengths = memory.curve(env, generator=0).lengths.T
    assert [[len(path) for path in task] for task in seen.rewards] == lengths.int().tolist()


def test_a_video_has_a_frame_for_each_moment(tmp_path):
    image = pytest.importorskip("PIL.Image")
    env = bm.rl.TensorVectorEnv(NAVIGATION, 2, copies=2, split="test", generator=2)
    seen = watch(maml(), env, points=1, pictures=True)
    assert [(point, step) for _, point, step in seen.frames][:4] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    bm.rl.save_video(seen, tmp_path / "film.gif")
    with image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == len(seen.frames)
        assert film.size == (2 * 160 + 4, 160 + 16)
    bandit = bm.rl.TensorVectorEnv(BANDIT, 2, episodes_per_trial=2, generator=2)
    with pytest.raises(errors.EnvError, match="no picture"):
        watch(rl2(), bandit, pictures=True)
    with pytest.raises(errors.OptionError, match=r"\.gif"):
        bm.rl.save_video(seen, tmp_path / "film.mp4")
    with pytest.raises(errors.OptionError, match="no pictures"):
        bm.rl.save_video(watch(maml(), env), tmp_path / "film.gif")


def test_references_keep_to_what_is_known():
    """No policy beats the one that knows the task; greedy of long bandits stays below Bayes-optimal in the mean."""
    bandits = BANDIT.sample_tasks(2000, generator=0, split="test")
    found = {r.name: r for r in references(BANDIT, bandits, 1)}
    assert found["best arm"].curve.returns.mean() == pytest.approx(4 * 2 / 3, abs=5 * 4 * 0.24 / 2000**0.5)
    # two arms, four pulls: by hand in tests/test_rl_oracles.py; Gittins is close to it, random is 2
    error = 5 / 2000**0.5
    assert found["Gittins"].curve.mean()[0] == pytest.approx(found["Bayes-optimal"].curve.mean()[0], abs=1.2 * error)
    assert found["random"].curve.mean()[0] == pytest.approx(2.0, abs=error)
    navigation = bm.rl.Navigation()
    goals = navigation.sample_tasks(300, generator=0, split="test")
    found = {r.name: r for r in references(navigation, goals, 1)}
    still = -100 * goals.goal.square().sum(-1)
    assert torch.allclose(found["standing still"].curve.returns[0], still, rtol=1e-5)
    assert found["straight to the goal"].curve.mean()[0] == pytest.approx(-0.14, abs=0.02)
    assert (found["straight to the goal"].curve.returns >= found["random"].curve.returns).all()
    grid = bm.rl.Grid(horizon=9)
    cells = grid.sample_tasks(50, generator=0)
    found = {r.name: r for r in references(grid, cells, 1)}
    away = cells.goal.sum(-1)
    assert torch.allclose(found["straight to the goal"].curve.returns[0], 1.1 * (10 - away).float() - 0.9, atol=1e-5)


def test_pictures_are_drawn(tmp_path):
    seen = watch(maml(), bm.rl.TensorVectorEnv(NAVIGATION, 4, split="test"), points=2)
    figure = bm.rl.plot_trajectories(seen, title="paths")
    lines = figure.axes[0].get_lines()
    assert [line.get_xdata().tolist() for line in lines[:3]] == [p[:, 0].tolist() for p in seen.paths[0]]
    assert lines[3].get_xdata().tolist() == [pytest.approx(float(seen.tasks["goal"][0, 0]))]
    result = run(rl2(), 4, validation=held_out())
    figure = bm.rl.plot_learning_curve(result.curves, unit="episode", lines={"optimum": 5.0})
    assert figure.axes[0].get_lines()[1].get_ydata().tolist() == pytest.approx([r["return_1"] for r in result.curves])
    with pytest.raises(errors.OptionError, match="no curves"):
        bm.rl.plot_learning_curve([], unit="episode")
