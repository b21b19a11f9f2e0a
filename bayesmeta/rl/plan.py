"""What a run of ``bayesmeta rl train`` will be, before it begins: given settings, defaults, and those of a run."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bayesmeta.errors import CheckpointError, OptionError
from bayesmeta.rl.own import is_path
from bayesmeta.rl.setups import ENVIRONMENTS, Setup
from bayesmeta.rl_settings import ENV_TEXTS, LONGER, METHODS, meanings
from bayesmeta.train.fit import pick_device
from bayesmeta.train.folder import CONFIG, has_checkpoint

#: Seeds of held-out tasks: validation's is apart from the run's and from that of the test tasks.
VALIDATION_SEED = 1_000
#: Tasks of learning curves.
VALIDATION_TASKS = 100
#: Points of a learning curve, about.
MEASUREMENTS = 20
#: Columns of a screen.
_WIDE = 110


class Plan(NamedTuple):
    """All that a run needs to be known of.

    Attributes:
        setup: the settings, filled.
        family: of environments.
        first: iterations that the run began with, which differ where it goes on for longer.
        validation_tasks: tasks of the learning curve.
        validate_every: iterations between its points.
        device: where.
        out: the folder; None keeps nothing.
    """

    setup: Setup
    family: Any
    first: int
    validation_tasks: int
    validate_every: int
    device: torch.device
    out: Path | None

    def learner(self) -> Any:
        """The learner with its environments. A share of the iterations is joint training: of those it began with."""
        return dataclasses.replace(self.setup, iterations=self.first).learner(self.family, self.device)

    def held_out(self) -> Any:
        """Environments of the validation tasks."""
        return self.setup.held_out(
            self.family, self.validation_tasks, split="validation", seed=VALIDATION_SEED, device=self.device
        )

    def line(self) -> str:
        """What is trained on what, how long and where."""
        where = "" if self.out is None else f"; into {self.out}"
        often = "each iteration" if self.validate_every == 1 else f"every {self.validate_every} iterations"
        return (
            f"{METHODS[self.setup.method]}\n{_text(self._shown())}; on {self.device}; "
            f"{self.validation_tasks} validation tasks {often}{where}"
        )

    def table(self) -> str:
        """A row for each setting that plays a part: its option, its value, and what it means."""
        told = meanings()
        told |= {"env": ENV_TEXTS.get(self.setup.env, "An environment of your own.")}
        told |= {"method": METHODS[self.setup.method]}
        rows = [("--" + name.replace("_", "-"), _plain(value), told[name]) for name, value in self._shown().items()]
        rows += [
            ("--validation-tasks", _plain(self.validation_tasks), "Tasks that the learning curve is measured on."),
            ("--validate-every", _plain(self.validate_every), "Iterations between two points of the learning curve."),
            ("--device", str(self.device), "Where the tensors are."),
            ("--out", str(self.out or "(to be given)"), "Folder for what is learned."),
        ]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        indent = " " * (first + second + 6)
        lines = []
        for option, value, meaning in rows:
            words = textwrap.wrap(meaning[:1].upper() + meaning[1:], max(40, _WIDE - len(indent)))
            lines.append(f"  {option:{first}}  {value:{second}}  " + f"\n{indent}".join(words))
        return "\n".join(lines)

    def _shown(self) -> dict[str, Any]:
        """The settings that play a part, with what the family says of itself where nothing was given."""
        shown = dict(vars(self.setup))
        known = [name for name in ("horizon", "arms") if name in self.setup.defaults.options and shown[name] is None]
        shown |= {name: getattr(self.family, name, None) for name in known}
        return {name: value for name, value in shown.items() if value is not None and value is not False}


def plan_of(
    setup: Setup,
    out: Path | None,
    *,
    validation_tasks: int | None = None,
    validate_every: int | None = None,
    device: str = "auto",
    resume: bool = False,
) -> Plan:
    """Put defaults, or what a run has that is gone on with, in place of what was not given.

    Args:
        setup: the settings; None is not given.
        out: folder of the run.
        validation_tasks: tasks of the learning curve; None: 100, on resume as many as before.
        validate_every: iterations between its points; None: twenty in all, on resume as before.
        device: ``"auto"``, or a torch device.
        resume: whether the run in ``out`` is gone on with.

    Raises:
        OptionError: for settings that cannot be used, and on resume for others than those of the run.
        CheckpointError: when the folder holds no run of ``bayesmeta rl train``.
    """
    begun: Setup | None = None
    if resume and out is not None and (out / CONFIG).exists():  # else the folder says what is wrong
        begun = read_setup(out)
        saved = json.loads((out / CONFIG).read_text())["settings"]
        setup = _resumed(setup, begun, validation_tasks, saved.get("validation_tasks"))
        validation_tasks = saved.get("validation_tasks")
        validate_every = saved.get("validate_every") if validate_every is None else validate_every
    setup = setup.filled()
    assert setup.iterations
    validation_tasks = VALIDATION_TASKS if validation_tasks is None else validation_tasks
    if validation_tasks < 2:
        raise OptionError(f"validation_tasks must be at least 2, for a standard error; got {validation_tasks}.")
    validate_every = max(1, setup.iterations // MEASUREMENTS) if validate_every is None else validate_every
    goes_on = begun is not None and out is not None and has_checkpoint(out)
    first = begun.iterations if begun is not None and goes_on else setup.iterations
    assert first
    return Plan(setup, setup.family(), first, validation_tasks, validate_every, pick_device(device), out)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_setup(folder: Path) -> Setup:
    """The settings of a run, from its folder.

    Raises:
        CheckpointError: when the folder holds no run of ``bayesmeta rl train``.
    """
    try:
        saved = json.loads((folder / CONFIG).read_text())["settings"]["setup"]
        if "reconstruction" not in saved and saved["method"] == "varibad" and is_path(saved["env"]):
            saved["reconstruction"] = "reward"  # as all were before there was a choice
        return Setup(**saved)
    except NotADirectoryError as error:
        raise CheckpointError(f"{folder} is a file; give the folder of the run, the --out of rl train.") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no run: there is no {CONFIG}. Give the --out of rl train.") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise CheckpointError(
            f"{folder}/{CONFIG} is not of a run of bayesmeta rl train. Give its --out; what bm.rl.fit left "
            "is for bm.rl.load_learner."
        ) from error


def _resumed(given: Setup, begun: Setup, validation_tasks: int | None, before: int | None) -> Setup:
    """The settings of a run that is gone on with; those that are given must be its own.

    Methods whose rates do not fall may go on for longer.

    Raises:
        OptionError: for a setting that the run does not have.
    """
    settings = dataclasses.asdict(begun)
    mine = {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
    if not given.workers:  # which is to say that nothing was said
        mine.pop("workers")
    asked = mine if validation_tasks is None else {**mine, "validation_tasks": validation_tasks}
    for name, value in asked.items():
        if name == "iterations" and given.method in LONGER:
            continue
        found = {**settings, "validation_tasks": before}[name]
        if found != value:
            why = f", over which the rates of {given.method} fall" if name == "iterations" else ""
            raise OptionError(
                f"{name}={value!r} was given to a run that began with {name}={found!r}{why}. Leave it out, as all "
                "that was given to that run, or choose another folder."
            )
    return Setup(**{**settings, **mine})


def setup_of(given: Mapping[str, Any], out: Path | None, *, resume: bool) -> Setup:
    """Settings of the command line, where None means not given: environment, method and seed may be those of a run.

    Args:
        given: by the names of :class:`~bayesmeta.rl.setups.Setup`'s fields.
        out: folder of the run, if any.
        resume: whether the run that the folder holds is gone on with.

    Raises:
        OptionError: without an environment.
        CheckpointError: when the environment is to be that of a run, and the folder holds none.
    """
    defaults: dict[str, Any] = {"method": "rl2", "seed": 0}
    if resume and out is None:
        raise OptionError("no folder was given; give --out, the folder of the run that is gone on with.")
    if resume and out is not None and (given["env"] is None or (out / CONFIG).exists()):
        begun = read_setup(out)
        defaults = {name: getattr(begun, name) for name in ("env", "method", "seed")}
    elif given["env"] is None:
        if out is not None and (out / CONFIG).exists():
            raise OptionError(
                f"{out} holds a run: give --resume to go on with it, or --env for another and --overwrite."
            )
        raise OptionError(
            f"no environment was given; give --env, one of {', '.join(ENVIRONMENTS)}, or module:attribute. "
            "bayesmeta rl list says what they are."
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    return Setup(**{**defaults, **chosen})


def settings_text(setup: Setup) -> str:
    """The settings that are not None, in a line."""
    return _text({n: v for n, v in vars(setup).items() if v is not None and v is not False})


def _text(shown: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in shown.items())
