"""What ``bayesmeta rl train`` and ``bayesmeta rl evaluate`` do, as plain functions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayesmeta.errors import CheckpointError, OptionError
from bayesmeta.rl.drawings import plot_learning_curve, point_name
from bayesmeta.rl.learner import AdaptationCurve, standard_error
from bayesmeta.rl.runs import FitResult, fit
from bayesmeta.rl.setups import ENVIRONMENTS, METHODS, Setup
from bayesmeta.train.fit import pick_device
from bayesmeta.train.folder import CONFIG, has_checkpoint

#: Seeds of held-out tasks: validation's is apart from the run's and from that of the test tasks.
VALIDATION_SEED = 1_000
#: Tasks of learning curves.
VALIDATION_TASKS = 100
#: Gradient steps that curves go to.
POINTS = 3


def train_setup(
    setup: Setup,
    out: Path,
    *,
    validation_tasks: int | None = None,
    validate_every: int | None = None,
    checkpoint_every: int = 10,
    tensorboard: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train a method on an environment, both by name, and say what became of it.

    Args:
        setup: the settings; what is None takes its default or, on resume, what the run has that is gone on with.
        out: folder of the run.
        validation_tasks: tasks that the learning curve is measured on; None: 100, on resume as many as before.
        validate_every: iterations between two measurements; None: twenty in all, on resume as before.
        checkpoint_every, tensorboard, overwrite, resume, progress: see :func:`bayesmeta.rl.fit`.
        device: ``"auto"``, or a torch device.

    Returns:
        The result of :func:`bayesmeta.rl.fit`; the folder also has ``learning_curve.png``.

    Raises:
        OptionError: for settings that cannot be used, and on resume for others than those of the run.
    """
    begun: Setup | None = None
    if resume and (Path(out) / CONFIG).exists():  # else the folder says what is wrong
        begun = read_setup(Path(out))
        saved = json.loads((Path(out) / CONFIG).read_text())["settings"]
        setup = _resumed(setup, begun, validation_tasks, saved.get("validation_tasks"))
        validation_tasks = saved.get("validation_tasks")
        validate_every = saved.get("validate_every") if validate_every is None else validate_every
    setup = setup.filled()
    validation_tasks = VALIDATION_TASKS if validation_tasks is None else validation_tasks
    if validation_tasks < 2:
        raise OptionError(f"validation_tasks must be at least 2, for a standard error; got {validation_tasks}.")
    place = pick_device(device)
    family = setup.family()
    # a share of the iterations is joint training: of those that the run began with
    first = begun.iterations if begun is not None and has_checkpoint(Path(out)) else setup.iterations
    learner = dataclasses.replace(setup, iterations=first).learner(family, place)
    held_out = setup.held_out(family, validation_tasks, split="validation", seed=VALIDATION_SEED, device=place)
    assert setup.iterations
    validate_every = max(1, setup.iterations // 20) if validate_every is None else validate_every
    if progress:
        print(
            f"{METHODS[setup.method]}, on {family.name}, {setup.tasks} tasks at a time, {setup.iterations} iterations"
        )
    result = fit(
        learner,
        iterations=setup.iterations,
        validation=held_out,
        validate_every=validate_every,
        points=None if setup.remembers else max(POINTS, setup.inner_steps or 0),
        out=out,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        tensorboard=True if tensorboard else None,
        progress=progress,
        config={
            "setup": dataclasses.asdict(setup),
            "validation_tasks": validation_tasks,
            "validate_every": validate_every,
        },
    )
    _say(setup, result, out)
    return result


def _say(setup: Setup, result: FitResult, out: Path) -> None:
    from bayesmeta.diagnostics.plots import save_figure

    unit = "episode" if setup.remembers else "step"
    figure = plot_learning_curve(result.curves, unit=unit, title=f"{setup.method} on {setup.env}")
    save_figure(figure, out / "learning_curve.png")
    first, last = result.curves[0], result.curves[-1]
    print(f"return on validation tasks, before training and after {result.iterations} iterations:")
    for name in (n for n in last if n.startswith("return_") and not n.endswith("_se")):
        point = int(name.removeprefix("return_"))
        error = last.get(f"{name}_se", float("nan"))
        print(f"  {point_name(unit, point):18} {first[name]:10.3f}  {last[name]:10.3f} ± {error:.3f}")
    if result.last is not None and result.last.unit == "step":
        told = harm(result.last, setup.inner_steps or 1)
        print(told, end="\n" if told else "")
    print(f"{out}/learning_curve.png, log.jsonl, checkpoint.pt; next: bayesmeta rl evaluate {out}")


def harm(curve: AdaptationCurve, steps: int) -> str:
    """A line of warning where gradient steps make it worse, beyond three standard errors over tasks; else nothing.

    Args:
        curve: the return after 0, 1, … steps.
        steps: as many as the learner was trained for.
    """
    change = (curve.returns[steps] - curve.returns[0]).unsqueeze(0)
    mean, error = float(change.mean()), standard_error(change)[0]
    if not mean < -3 * error:
        return ""
    return (
        f"Adaptation makes it worse: {mean:.3f} ± {error:.3f} after {steps} step{'' if steps == 1 else 's'}. Train "
        "longer (--iterations), or take a smaller --inner-lr."
    )


def read_setup(folder: Path) -> Setup:
    """The settings of a run, from its folder.

    Raises:
        CheckpointError: when the folder holds no run of ``bayesmeta rl train``.
    """
    try:
        saved = json.loads((folder / CONFIG).read_text())["settings"]["setup"]
        return Setup(**saved)
    except NotADirectoryError as error:
        raise CheckpointError(f"{folder} is a file; give the folder of the run, the --out of rl train.") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no run: there is no {CONFIG}. Give the --out of rl train.") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise CheckpointError(f"{folder}/{CONFIG} is not of a run of bayesmeta rl train. Give its --out.") from error


def _resumed(given: Setup, begun: Setup, validation_tasks: int | None, before: int | None) -> Setup:
    """The settings of a run that is gone on with; those that are given must be its own.

    Methods that take gradient steps may go on for longer.

    Raises:
        OptionError: for a setting that the run does not have.
    """
    settings = dataclasses.asdict(begun)
    mine = {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
    if not given.workers:  # which is to say that nothing was said
        mine.pop("workers")
    asked = mine if validation_tasks is None else {**mine, "validation_tasks": validation_tasks}
    for name, value in asked.items():
        if name == "iterations" and not given.remembers:
            continue
        found = {**settings, "validation_tasks": before}[name]
        if found != value:
            raise OptionError(
                f"{name}={value!r} was given to a run that began with {name}={found!r}. Leave it out, as all that was "
                "given to that run, or choose another folder."
            )
    return Setup(**{**settings, **mine})


def setup_of(given: Mapping[str, Any], out: Path, *, resume: bool) -> Setup:
    """Settings of the command line, where None means not given: environment, method and seed may be those of a run.

    Args:
        given: by the names of :class:`~bayesmeta.rl.setups.Setup`'s fields.
        out: folder of the run.
        resume: whether the run that the folder holds is gone on with.

    Raises:
        OptionError: without an environment.
        CheckpointError: when the environment is to be that of a run, and the folder holds none.
    """
    defaults: dict[str, Any] = {"method": "rl2", "seed": 0}
    if resume and (given["env"] is None or (out / CONFIG).exists()):
        begun = read_setup(out)
        defaults = {name: getattr(begun, name) for name in ("env", "method", "seed")}
    elif given["env"] is None:
        raise OptionError(
            f"no environment was given; give --env, one of {', '.join(ENVIRONMENTS)}, or module:attribute."
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    return Setup(**{**defaults, **chosen})


def settings_text(setup: Setup) -> str:
    """The settings that are not None, in a line."""
    shown: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(setup).items() if value is not None and value is not False
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())
