"""The commands of meta-reinforcement learning: ``bayesmeta rl list``, ``rl train`` and ``rl evaluate``."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from bayesmeta.rl_settings import Settings, listing


@dataclasses.dataclass
class Train:
    """Meta-train a policy on a family of environments; what is not given takes a default of environment and method."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(a training needs)")] = None
    """Folder for what is learned."""

    settings: Annotated[Settings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Settings)
    """What is trained on what."""

    dry_run: bool = False
    """Say what the run would be, with what each setting means, and stop."""

    validation_tasks: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 100)")] = None
    """Tasks that the learning curve is measured on."""

    validate_every: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: a twentieth)")] = (
        None
    )
    """Iterations between two points of the learning curve."""

    checkpoint_every: int = 10
    """Iterations between checkpoints."""

    tensorboard: bool = False
    """Write curves for TensorBoard too, which must be installed."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch."""

    overwrite: bool = False
    """Replace a run that the folder holds."""

    resume: bool = False
    """Go on with the run that the folder holds. What is not given is as it was; what is given must be."""

    progress: bool = True
    """Show the settings and a progress bar."""


@dataclasses.dataclass
class EvaluateRL:
    """Score a trained policy on test tasks, episode by episode or step by step, beside optima and baselines."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The --out of rl train."""

    tasks: int = 400
    """Test tasks."""

    steps: int = 3
    """Gradient steps to go to, for methods that take them."""

    seed: int = 0
    """Of the test tasks and of what is random on them."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """File for the figures; by default evaluation.json in the folder."""

    video: Annotated[Path | None, tyro.conf.arg(metavar="FILE.gif", help_behavior_hint="")] = None
    """File for an animated GIF of three test tasks."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch."""

    progress: bool = True
    """Show what is being done; never where the output is no terminal."""


@dataclasses.dataclass
class ListRL:
    """Name all environments and methods, and say what they are."""


@dataclasses.dataclass
class RL:
    """Meta-reinforcement learning: rl list, rl train, rl evaluate."""

    command: Annotated[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[ListRL, tyro.conf.subcommand("list")]
            | Annotated[Train, tyro.conf.subcommand("train")]
            | Annotated[EvaluateRL, tyro.conf.subcommand("evaluate")]
        ],
        tyro.conf.arg(name=""),  # so that help has one list of options, without a name of the inside
    ]

    @property
    def threads(self) -> int | None:
        """CPU threads that the command was given; None for one that needs no torch."""
        return None if isinstance(self.command, ListRL) else self.command.threads

    @property
    def out(self) -> Path | None:
        """Where a checkpoint would be; None where there would be none."""
        return self.command.out if isinstance(self.command, Train) else None


#: What the library tells a program to do, as one does it on the command line.
_SAYINGS = (
    (r"leave render_mode out", "leave --video out"),
    (r"take PPO or TRPO", "take --method rl2"),
    (r"Give its vector environment a horizon \(", "Give --horizon, or a limit in the environment ("),
    (r"Install it, or ask for no pictures", "Install it, or leave --video out"),
    (r"\b(\w+)=True\b", lambda m: _option(m[1]) or m[0]),
    (r"\b(\w+)=(\([^()]*\)|'[^']*'|[-\w.+]+)", lambda m: f"{_option(m[1])} {_value(m[2])}" if _option(m[1]) else m[0]),
    (r"\b(\w+)=(?=[,. ])", lambda m: _option(m[1]) or m[0]),
    (r"\b(\w+_\w+)\b(?= \(| is | must )", lambda m: _option(m[1]) or m[0]),
)


def _option(name: str) -> str:
    """A field's name as an option; of what is no field, nothing."""
    known = {field.name for kind in (Settings, Train, EvaluateRL) for field in dataclasses.fields(kind)}
    return "--" + name.replace("_", "-") if name in known else ""


def _value(text: str) -> str:
    return text.strip("(),'").replace(",", "")


def as_options(message: str) -> str:
    """A message of the library with its arguments as the command line names them."""
    for pattern, option in _SAYINGS:
        message = re.sub(pattern, option, message)
    return message


def run(command: RL) -> None:
    """Run one of the commands; errors name options as they are given here."""
    if isinstance(command.command, ListRL):  # which needs no torch
        print(listing())
        return
    from bayesmeta.errors import BayesMetaError

    try:
        _run(command)
    except BayesMetaError as error:
        error.args = (as_options(str(error)), *error.args[1:])
        raise
    except KeyboardInterrupt as error:
        error.args = (_how_to_go_on(str(error), command.command),)
        raise


def _how_to_go_on(told: str, stopped: Train | EvaluateRL) -> str:
    """What a run that was stopped says, with the command that goes on with it."""
    if isinstance(stopped, EvaluateRL):
        return told
    command = f"bayesmeta rl train --out {shlex.quote(str(stopped.out))} --resume"
    if stopped.resume and stopped.settings.iterations is not None:  # more than the run began with
        command += f" --iterations {stopped.settings.iterations}"
    return told.replace("go on with resume", f"go on with: {command}")


#: What a run's folder holds, where it is not being written: bayesmeta.train.folder, which needs torch, looks again.
_FILES, _LOCK = ("config.json", "log.jsonl", "checkpoint.pt"), ".run.lock"


def refuse_what_is_there(command: RL) -> None:
    """Refuse a folder that holds a run before torch is imported, which takes seconds.

    Raises:
        RunFolderError: when it holds one, and nothing was said of going on with it or of replacing it.
    """
    train, out = command.command, command.out
    if not isinstance(train, Train) or out is None:
        return
    if train.settings.env is None or train.dry_run or train.overwrite or train.resume:
        return
    if any((out / name).exists() for name in _FILES) and not (out / _LOCK).exists():
        from bayesmeta.errors import RunFolderError

        raise RunFolderError(
            f"{out} already holds a run. Go on with it (--resume), replace it (--overwrite), or choose another folder."
        )


def _run(command: RL) -> None:
    options: dict[str, Any] = dataclasses.asdict(command.command)
    options.pop("threads")
    if isinstance(command.command, EvaluateRL):
        from bayesmeta.rl.evaluation import evaluate_folder

        evaluate_folder(options.pop("folder"), **options)
        return
    from bayesmeta.errors import OptionError
    from bayesmeta.rl.command import dry_run, train_setup
    from bayesmeta.rl.plan import setup_of

    out, settings = options.pop("out"), options.pop("settings")
    setup = setup_of(settings, out, resume=options["resume"])
    if options.pop("dry_run"):
        names = ("validation_tasks", "validate_every", "device", "overwrite", "resume")
        print(dry_run(setup, out, **{name: options[name] for name in names}))
        return
    if out is None:
        raise OptionError("no folder was given; give --out, where what is learned is kept, or --dry-run.")
    train_setup(setup, out, **options)
