"""``bayesmeta rl train`` and ``bayesmeta rl evaluate``: what they leave, and what they refuse."""

import io
import json
import sys

import pytest
import torch

from bayesmeta import cli, cli_rl, errors
from bayesmeta.diagnostics import plots
from bayesmeta.rl.command import harm, read_setup, train_setup
from bayesmeta.rl.evaluation import _beside, _bounds, _regret, evaluate_folder, table
from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.reference_policies import Reference
from bayesmeta.rl.setups import ENVIRONMENTS, Setup
from bayesmeta.rl_settings import METHODS
from bayesmeta.train import checkpoint

#: Methods for continuous actions alone.
CONTINUOUS = ("pearl", "distilled")
TINY = ("--horizon", "4", "--tasks", "6", "--units", "4", "--iterations", "2", "--validation-tasks", "4")


def rl(*arguments):
    cli.main(["rl", *map(str, arguments)])


def refused(capsys, *arguments):
    """The message with which a command ends, status 2."""
    with pytest.raises(SystemExit) as caught:
        rl(*arguments)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "run"
    rl("train", "--env", "navigation", "--out", out, *TINY, "--no-progress")
    return out


def test_a_run_leaves_what_it_says(folder, capsys):
    rl("evaluate", folder, "--tasks", 6, "--video", folder / "film.gif")
    told = capsys.readouterr().out
    names = (
        "config.json",
        "log.jsonl",
        "checkpoint.pt",
        "learning_curve.png",
        "evaluation.json",
        "trajectories.png",
        "adaptation.png",
    )
    for name in (*names, "film.gif"):
        assert (folder / name).stat().st_size > 0
    assert "regret: straight to the goal" in told
    assert "standing still" in told
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["unit"] == "episode"
    learner, best = found["rows"][0], found["rows"][1]
    assert learner["name"] == "rl2"
    assert len(learner["returns"]) == 2
    regret = found["regrets"]["straight to the goal"]["mean"]
    assert regret == pytest.approx([b - m for b, m in zip(best["returns"], learner["returns"])], rel=1e-5)
    assert min(regret) >= 0  # none beats the one that knows the goal


def test_what_is_evaluated_is_what_was_trained(folder, tmp_path):
    """The same figures from the learner that a second, uninterrupted call trains; another seed's (control) differ."""
    first = evaluate_folder(folder, tasks=5, seed=3, out=tmp_path / "a.json")
    setup = read_setup(folder)
    again = train_setup(setup, tmp_path / "again", validation_tasks=4, progress=False)
    env = setup.held_out(setup.family(), 5, split="test", seed=3)
    assert first["rows"][0]["returns"] == pytest.approx(again.learner.curve(env, generator=3).mean())
    other = Setup(**{**vars(setup), "seed": 1}).learner(setup.family())
    assert first["rows"][0]["returns"] != pytest.approx(other.curve(env, generator=3).mean(), rel=1e-3)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, which takes longer than such a run; a test above draws them."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(plots, "save_figure", lambda figure, path: path.write_text(str(len(Figure.get_axes(figure)))))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("rl2",)])
@pytest.mark.parametrize("env", ["bandit", "navigation"])
def test_every_method_trains_and_is_loaded_again(env, method, tmp_path, capsys):
    setup = Setup(env, method, horizon=3, tasks=3, units=4, iterations=1)
    if env == "bandit" and method in CONTINUOUS:
        with pytest.raises(errors.SpaceError, match="needs a Box"):
            train_setup(setup, tmp_path, validation_tasks=3, progress=False)
        return
    result = train_setup(setup, tmp_path, validation_tasks=3, progress=False)
    loaded = read_setup(tmp_path)
    assert loaded == setup.filled()
    first = evaluate_folder(tmp_path, tasks=3, steps=2)
    assert len(first["rows"][0]["returns"]) == (loaded.episodes if loaded.remembers else 3)
    assert result.iterations == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "env", [name for name in ENVIRONMENTS if name not in ("bandit", "navigation") and "cheetah" not in name]
)
def test_every_environment_trains_and_is_scored(env, tmp_path, capsys):
    setup = Setup(env, "rl2", horizon=6, episodes=2, tasks=3, units=4, iterations=1)
    train_setup(setup, tmp_path, validation_tasks=2, progress=False)
    found = evaluate_folder(tmp_path, tasks=3)
    assert found["rows"][-1]["name"] == "random"
    assert all(torch.isfinite(torch.tensor(row["returns"])).all() for row in found["rows"])
    for row in found["rows"]:  # none is above what knows the task
        if row.get("optimum") and row["knows_task"] and env in ("grid", "point-robot", "sparse-navigation"):
            assert max(found["rows"][-1]["returns"]) <= max(row["returns"]) + 1e-5


def test_a_run_is_resumed_with_its_own_options_alone(folder, tmp_path, capsys):
    def train(*options):
        rl("train", "--env", "navigation", "--method", "maml", "--out", tmp_path / "run", *options, "--no-progress")

    tiny = (*TINY, "--copies", "2")
    train(*tiny)
    assert "already holds a run" in refused(
        capsys, "train", "--env", "navigation", "--method", "maml", "--out", tmp_path / "run", *tiny
    )
    told = refused(
        capsys, "train", "--env", "navigation", "--method", "maml", "--out", tmp_path / "run", *tiny, "--seed", 4,
        "--resume",
    )  # fmt: skip
    assert "--seed 4 was given" in told
    assert "with --seed 0" in told
    train(*tiny[:6], "--iterations", "3", *tiny[8:], "--resume")  # may go on for longer
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 3


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_given_on_resume_is_as_it_was(tmp_path, capsys):
    out, settings = tmp_path / "run", ("--horizon", 4, "--tasks", 3, "--units", 4, "--copies", 2, "--inner-lr", 0.05)
    given = (*settings, "--seed", 3, "--validation-tasks", 4, "--validate-every", 2, "--method", "maml")
    rl("train", "--env", "navigation", "--out", out, *given, "--iterations", 5, "--no-progress")
    before = read_setup(out)
    rl("train", "--out", out, "--resume", "--iterations", 10, "--no-progress")  # the share of joint training stays
    found = checkpoint.load(out / "checkpoint.pt")
    assert found["step"] == 10
    assert [row["step"] for row in found["curves"]] == [0, 2, 4, 5, 6, 8, 10]
    assert read_setup(out) == before
    assert "return" in evaluate_folder(out, tasks=3)["rows"][0]["name"] + " returns"
    whole = train_setup(before, tmp_path / "whole", validation_tasks=4, validate_every=2, progress=False)
    again = train_setup(Setup("navigation", "maml", seed=3), out, resume=True, progress=False)  # nothing left to do
    assert again.curves[:4] == whole.curves
    assert again.curves[4:]
    for option, value, told in (
        ("--units", 8, "--units 8 was given to a run that began with --units 4"),
        ("--validation-tasks", 100, "--validation-tasks 100 was given to a run that began with --validation-tasks 4"),
        ("--seed", 0, "--seed 0 was given"),
        ("--method", "fomaml", "--method fomaml was given to a run that began with --method maml"),
        ("--env", "sparse-navigation", "--env sparse-navigation was given"),
    ):
        assert told in refused(capsys, "train", "--out", out, "--resume", option, value)
    with pytest.raises(errors.OptionError, match="units=8 was given to a run that began with units=4"):
        train_setup(Setup("navigation", "maml", seed=3, units=8), out, resume=True)
    assert "give --env" in refused(capsys, "train", "--out", tmp_path / "new")
    assert "holds no run" in refused(capsys, "train", "--out", tmp_path / "new", "--resume")


def test_a_memory_is_not_resumed_with_other_iterations(folder, capsys):
    told = refused(capsys, "train", "--out", folder, "--resume", "--iterations", 9)
    assert "--iterations 9 was given to a run that began with --iterations 2" in told


def test_adaptation_that_harms_is_told_and_other_is_not(tmp_path, capsys):
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    easy = torch.linspace(-500, 0, 40)  # tasks differ by more than what a step changes
    worse = AdaptationCurve(torch.stack([easy, easy - 2 + noise, easy + 5]), "step")
    assert "worse: -2." in harm(worse, 1)
    assert "after 1 step." in harm(worse, 1)
    assert harm(worse, 2) == ""
    assert harm(AdaptationCurve(torch.stack([easy, easy - 0.1 + noise]), "step"), 1) == ""
    far = (
        "--env", "navigation", "--method", "maml", "--horizon", 30, "--tasks", 2, "--copies", 4, "--units", 4,
        "--iterations", 2, "--validation-tasks", 20, "--no-progress", "--out",
    )  # fmt: skip
    rl("train", *far, tmp_path / "far", "--inner-lr", 5)
    assert "Adaptation makes it worse" in capsys.readouterr().out
    rl("train", *far, tmp_path / "near", "--inner-lr", 1e-6)
    assert "worse" not in capsys.readouterr().out


def test_what_cannot_be_used_is_refused(folder, tmp_path, capsys):
    for arguments, message in (
        (("train", "--env", "bandits", "--out", tmp_path), "Unknown environment 'bandits'"),
        (("train", "--env", "bandit", "--method", "sac", "--out", tmp_path), "Unknown method 'sac'"),
        (("train", "--env", "grid", "--arms", 3, "--out", tmp_path), "--arms 3 is not an option of grid"),
        (("train", "--env", "grid", "--inner-lr", 1, "--out", tmp_path), "--inner-lr 1.0 is not an option of rl2"),
        (("train", "--env", "grid", "--method", "maml", "--episodes", 2, "--out", tmp_path), "not an option of maml"),
        (("train", "--env", "grid", "--iterations", 0, "--out", tmp_path), "iterations must be a whole number"),
        (
            ("train", "--env", "grid", "--validation-tasks", 1, "--out", tmp_path),
            "--validation-tasks must be at least 2",
        ),
        (("train", "--env", "beam", "--plane", "H", "--out", tmp_path), "--plane H is of a file"),
        (("train", "--env", "grid", "--out", tmp_path / "none", "--resume"), "no run to resume"),
        (("train", "--env", "grid", "--out", tmp_path, "--device", "toaster"), "toaster"),
        (("evaluate", tmp_path / "none"), "holds no run"),
        (("evaluate", folder / "config.json"), "is a file; give the folder of the run"),
        (("evaluate", folder, "--tasks", 1), "tasks ≥ 2"),
    ):
        assert message in refused(capsys, *arguments).replace("\n", " ").replace("│ │", " "), arguments
    (tmp_path / "config.json").write_text("{}")
    assert "is not of a run" in refused(capsys, "evaluate", tmp_path)
    for names in (("bandits", "rl2"), ("bandit", "sac")):
        with pytest.raises(errors.OptionError, match="expected one of"):
            Setup(*names)


def test_files_that_cannot_be_written_are_refused_before_any_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Setup, "family", lambda self: pytest.fail("work was begun"))
    for option, path, message in (
        ("--out", tmp_path / "none" / "a.json", "there is no folder"),
        ("--out", tmp_path, "is a folder; give a file"),
        ("--video", tmp_path / "none" / "a.gif", "there is no folder"),
        ("--video", tmp_path / "film.mp4", "film.mp4 was given; videos are written as .gif"),
    ):
        assert message in refused(capsys, "evaluate", folder, option, path)


def test_messages_name_options_and_leave_other_words_alone():
    for message, told in (
        ("workers=True is not", "--workers is not"),
        ("task_range=(-2.0, 1.0) was given", "--task-range -2.0 1.0 was given"),
        ("Give horizon=, or wrap them", "Give --horizon, or wrap them"),
        ("by either task_values (numbers)", "by either --task-values (numbers)"),
        ("no picture; leave render_mode out.", "no picture; leave --video out."),
        ("standardise=True and x=3 and the tasks of arms", "standardise=True and x=3 and the tasks of arms"),
    ):
        assert cli_rl.as_options(message) == told


def test_a_video_of_what_has_no_picture_is_refused(tmp_path, capsys):
    train_setup(Setup("bandit", "rl2", tasks=3, units=4, iterations=1), tmp_path, validation_tasks=2, progress=False)
    capsys.readouterr()
    told = refused(capsys, "evaluate", tmp_path, "--tasks", 3, "--video", tmp_path / "film.gif")
    assert "no picture; leave --video out" in told


def test_the_table_has_a_row_a_policy_and_a_column_a_point():
    row = {"name": "rl2", "returns": [1.0, 2.5], "standard_errors": [0.1, float("nan")]}
    best = {
        "name": "best", "label": "best (knows the task)", "returns": [3.0, 3.0], "standard_errors": [0.0, 0.0],
    }  # fmt: skip
    text = table(
        {"settings": "env x", "iterations": 5, "tasks": 7, "unit": "episode", "rows": [row, best], "regrets": {}}
    )
    lines = text.splitlines()
    assert lines[1].split() == ["return", "episode", "1", "episode", "2"]
    assert lines[2].split() == ["rl2", "1.000", "±", "0.100", "2.500"]
    assert lines[3].split() == ["best", "(knows", "the", "task)", "3.000", "3.000"]
    row.update(returns=[-170.783, -5502.499], standard_errors=[22.906, 389.496])
    wide = table({"settings": "", "iterations": 5, "tasks": 7, "unit": "step", "rows": [row, best], "regrets": {}})
    assert "-170.783 ± 22.906  -5502.499 ± 389.496" in wide
    assert len({len(line) for line in wide.splitlines()[1:]}) == 1
    row.update(success=[0.5, 1.0], lengths=[1e15, 2e15], name="a long name of a method")
    ended = table({"settings": "", "iterations": 5, "tasks": 7, "unit": "step", "rows": [row, best], "regrets": {}})
    assert "50%, 1000000000000000.00  100%, 2000000000000000.00" in ended
    assert len({len(line) for line in ended.splitlines()[1:]}) == 1


def test_a_reference_that_does_not_learn_stands_beside_every_gradient_step():
    """Whether it knows the task or not; one that learns (the control) stands where it knows nothing, at the first."""
    steps = AdaptationCurve(torch.zeros(3, 2), "step")
    own = AdaptationCurve(torch.tensor([[1.0, 2.0]]), "episode", torch.tensor([[1.0, 0.5]]), torch.tensor([[3.0, 4.0]]))
    for known in (True, False):
        beside = _beside(Reference("best", own, knows_task=known), steps)
        for seen, is_ in zip((beside.returns, beside.success, beside.lengths), (own.returns, own.success, own.lengths)):
            assert torch.equal(seen, is_.expand(3, 2))
        assert beside.unit == "step"
        assert _beside(Reference("learns", own, optimum=known, learns=True), steps) is own
    episodes = AdaptationCurve(torch.rand(3, 2), "episode")
    assert _beside(Reference("best", episodes, knows_task=True, optimum=True), steps) is episodes


def test_regrets_are_of_what_bounds_a_learner_where_it_does():
    """Of an optimum with one episode the regret has one point; beside gradient steps only who knows the task bounds."""
    learner = AdaptationCurve(torch.tensor([[1.0, 2.0], [2.0, 2.0]]), "episode")
    first = AdaptationCurve(torch.tensor([[3.0, 3.0]]), "episode")
    unknowing = Reference("best of one", first, optimum=True, learns=True)
    knowing = Reference("best", first, knows_task=True, optimum=True)
    assert _regret(unknowing, learner) == {"mean": [1.5], "standard_error": [pytest.approx(0.5)]}
    assert _regret(knowing, learner)["mean"] == [1.5, 1.0]
    for unit, bounds in (("episode", True), ("step", False)):
        assert _bounds(knowing, learner._replace(unit=unit))
        assert _bounds(unknowing, learner._replace(unit=unit)) is bounds
    assert not _bounds(Reference("knows, and is no optimum", first, knows_task=True), learner)


def test_rows_that_end_early_are_told_of():
    short = {"name": "Gittins", "returns": [1.0], "standard_errors": [0.1]}
    row = {"name": "maml", "returns": [1.0, 2.0], "standard_errors": [0.1, 0.1]}
    result = {"settings": "", "iterations": 5, "tasks": 7, "unit": "step", "regrets": {}}
    assert "Rows that end early" in table({**result, "rows": [row, short]})
    assert "Rows that end early" not in table({**result, "rows": [row, row]})


class Terminal(io.StringIO):
    """Standard error on a terminal."""

    def isatty(self):
        return True


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_says_what_it_does_on_a_terminal_alone(folder, monkeypatch, capsys, tmp_path):
    out, seen = tmp_path / "a.json", Terminal()
    evaluate_folder(folder, tasks=3, out=out)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", seen)
    evaluate_folder(folder, tasks=3, out=out)
    told = seen.getvalue()
    for what in ("the rl2 of", "3 test tasks", "optima and baselines on these tasks", "pictures"):
        assert f"evaluating: {what}" in told
    assert told.count("\n") == 0  # one line, which is written over
    assert told.rsplit("\r", 1)[-1].strip() == ""  # and wiped off at the end
    assert capsys.readouterr().out.count("regret: straight to the goal") == 1
    seen.truncate(0)
    evaluate_folder(folder, tasks=3, out=out, progress=False)
    assert seen.getvalue().strip("\0") == ""
