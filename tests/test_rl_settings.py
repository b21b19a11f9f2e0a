"""The settings of ``bayesmeta rl``: their names, what they mean, and what a run says and asks before it begins."""

import dataclasses
import subprocess
import sys

import pytest
from test_rl_cli import refused, rl

from bayesmeta import cli_rl, errors
from bayesmeta import rl_settings as settings
from bayesmeta.diagnostics import plots
from bayesmeta.rl.command import dry_run, train_setup
from bayesmeta.rl.setups import ENVIRONMENTS, Setup
from bayesmeta.rl_settings import METHODS
from bayesmeta.train import checkpoint
from bayesmeta.train.fit import pick_device
from bayesmeta.train.folder import _OURS
from bayesmeta.train.lock import LOCK

TINY = ("--horizon", "4", "--tasks", "6", "--units", "4", "--iterations", "2", "--validation-tasks", "4")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Figures are not drawn, which takes longer than such a run."""
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: path.write_text(""))


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "run"
    rl("train", "--env", "navigation", "--out", out, *TINY, "--no-progress")
    return out


def test_the_names_on_the_command_line_are_those_that_are_built():
    assert set(settings.ENV_TEXTS) == set(ENVIRONMENTS)
    assert {name for name in METHODS if Setup("grid", name).remembers} == set(METHODS) - set(settings.STEPPING)
    mujoco = {name for name in ENVIRONMENTS if "cheetah" in name}
    spaces = {name: Setup(name, "rl2").family().action_space for name in set(ENVIRONMENTS) - mujoco}
    assert {name for name, space in spaces.items() if hasattr(space, "low")} | mujoco == set(settings.CONTINUOUS)
    assert set(settings.NEED_CONTINUOUS) == {"pearl", "distilled"}


def test_the_listing_names_all_and_needs_no_torch():
    """Help and listing are there at once; a training (the control of the check) loads torch."""
    code = "import sys; from bayesmeta import cli; cli.main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "rl", "list"], capture_output=True, text=True, check=True)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "False"
    assert {line.split()[0] for line in lines if line.startswith("  ")} == {
        *ENVIRONMENTS, *METHODS, "MODULE:ATTRIBUTE",
    }  # fmt: skip
    assert "torch" in sys.modules


def test_a_folder_that_holds_a_run_is_refused_before_torch_is_loaded(tmp_path):
    """By the names of files that a run has; one that is being written is left to its lock. A dry run loads torch."""
    assert set(cli_rl._FILES) < set(_OURS)
    assert cli_rl._LOCK == LOCK
    (tmp_path / "log.jsonl").touch()
    code = "import sys; from bayesmeta import cli\ntry: cli.main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    train = [sys.executable, "-c", code, "rl", "train", "--env", "grid", "--out", str(tmp_path)]
    done = subprocess.run(train, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (2, ["False"])
    assert f"{tmp_path} already holds a run. Go on with it (--resume), replace it (--overwrite)" in done.stderr
    done = subprocess.run([*train, "--dry-run"], capture_output=True, text=True, check=False)  # the control
    assert done.stdout.split()[-1] == "True"


def test_settings_are_options_under_their_own_names_with_what_they_mean(capsys):
    with pytest.raises(SystemExit) as caught:
        rl("train", "--help")
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, meaning in settings.meanings().items():
        assert f"--{name.replace('_', '-')}" in told
        assert meaning in told
    assert set(settings.meanings()) == {field.name for field in dataclasses.fields(Setup)}


def test_a_dry_run_says_what_a_run_would_be_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    rl("train", "--env", "bandit", "--method", "maml", "--tasks", 3, "--out", out, "--dry-run")
    told = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    rows = {line.split()[0]: line.split() for line in told.splitlines() if line.startswith("  --")}
    setup = Setup("bandit", "maml", tasks=3).filled()
    family = setup.family()
    expected = {"horizon": family.horizon, "arms": family.arms, "tasks": 3, "copies": setup.copies, "seed": 0}
    for name, value in expected.items():
        assert rows[f"--{name}"][1] == str(value)
        assert " ".join(rows[f"--{name}"][2:]) in settings.meanings()[name]
    assert rows["--validate-every"][1] == str(setup.iterations // 20)
    assert "--episodes" not in rows  # which maml has not
    assert "--iterations" in rows
    rl("train", "--env", "grid", "--dry-run")  # no folder is needed
    assert "(to be given)" in capsys.readouterr().out
    for arguments, message in (
        (("--env", "grid", "--method", "pearl", "--dry-run"), "needs a Box"),  # as the run would
        (("--env", "grid", "--arms", 3, "--dry-run"), "--arms 3 is not an option of grid"),
        (("--env", "grid"), "no folder was given; give --out"),
        (("--env", "grid", "--resume"), "no folder was given; give --out"),
        (("--method", "rl2", "--dry-run"), "bayesmeta rl list says what they are"),
    ):
        assert message in refused(capsys, "train", *arguments)


def test_a_dry_run_on_a_folder_with_a_run_tells_of_it(folder, capsys):
    rl("train", "--env", "grid", "--out", folder, "--dry-run")
    assert "holds a run already: give --resume, --overwrite" in capsys.readouterr().out
    rl("train", "--out", folder, "--resume", "--dry-run")
    told = capsys.readouterr().out
    assert "holds a run already" not in told
    assert "navigation" in told
    assert "--units             4" in told  # that of the run


def test_a_training_says_first_what_it_is(tmp_path, capsys):
    train_setup(
        Setup("navigation", "rl2", horizon=3, tasks=3, units=4, iterations=1), tmp_path / "run", validation_tasks=3
    )
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == METHODS["rl2"]
    assert second == (
        "env navigation, method rl2, horizon 3, episodes 2, tasks 3, units 4, iterations 1, seed 0; on "
        f"{pick_device('auto')}; 3 validation tasks each iteration; into {tmp_path / 'run'}"
    )


def test_names_that_are_nearly_right_are_mended(capsys):
    for names, told in (
        (("pointrobot", "rl2"), "Unknown environment 'pointrobot' (did you mean point-robot?); expected one of bandit"),
        (("grid", "varbad"), "Unknown method 'varbad' (did you mean varibad?); expected one of rl2"),
        (("zebra", "rl2"), "Unknown environment 'zebra'; expected one of"),  # like none of them
    ):
        with pytest.raises(errors.OptionError) as caught:
            Setup(*names)
        assert told in str(caught.value)


def test_a_folder_with_a_run_asks_whether_to_go_on(folder, capsys):
    assert "holds a run: give --resume to go on with it" in refused(capsys, "train", "--out", folder)


@pytest.mark.parametrize(
    ("method", "more"), [pytest.param("pearl", {}, marks=pytest.mark.slow), ("maesn", {"copies": 2})]
)
def test_methods_without_falling_rates_go_on_for_longer(method, more, tmp_path):
    """As long as for methods that take steps; the message to others (the control) says why they cannot."""
    setup = Setup("navigation", method, horizon=3, tasks=3, units=4, iterations=1, **more)
    options = {"validation_tasks": 2, "progress": False}
    train_setup(setup, tmp_path, **options)
    train_setup(dataclasses.replace(setup, iterations=2), tmp_path, resume=True, **options)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 2
    assert (*settings.STEPPING, "pearl") == settings.LONGER


def test_methods_with_falling_rates_say_why_they_cannot(folder):
    with pytest.raises(errors.OptionError, match="iterations=2, over which the rates of rl2 fall"):
        train_setup(Setup("navigation", "rl2", iterations=3), folder, resume=True, progress=False)


def test_which_methods_may_go_on_for_longer_is_what_their_learners_say():
    """A learner whose rates fall has a number of iterations."""
    small = {"horizon": 3, "tasks": 3, "units": 4, "iterations": 7}
    for method in METHODS:
        setup = Setup("navigation", method, **small).filled()
        fixed = getattr(setup.learner(setup.family()), "iterations", None) is not None
        assert fixed == (method not in settings.LONGER), method


def test_how_to_go_on_has_what_the_run_was_given_beyond_its_folder():
    def told(**options):
        given = cli_rl.Train(out="a b", **options)
        return cli_rl._how_to_go_on("saved: go on with resume", given)

    assert told() == "saved: go on with: bayesmeta rl train --out 'a b' --resume"
    longer = settings.Settings(iterations=9)
    assert told(settings=longer, resume=True).endswith("--resume --iterations 9")
    assert told(settings=longer).endswith("--resume")  # the run has them


def test_a_dry_run_makes_the_learner(monkeypatch):
    """So that what the learner refuses is refused; it is not trained (its training would fail here)."""
    made = []
    learner = Setup.learner

    def make(self, *arguments):
        made.append(learner(self, *arguments))
        made[-1].train = None
        return made[-1]

    monkeypatch.setattr(Setup, "learner", make)
    assert "--tasks" in dry_run(Setup("navigation", "rl2", tasks=3), None)
    assert len(made) == 1
