"""What ``bayesmeta rl train`` and ``bayesmeta rl evaluate`` do, as plain functions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bayesmeta.errors import CheckpointError, OptionError
from bayesmeta.rl.drawings import plot_learning_curve, point_name
from bayesmeta.rl.runs import FitResult, fit
from bayesmeta.rl.setups import METHODS, Setup
from bayesmeta.train.fit import pick_device
from bayesmeta.train.folder import CONFIG

#: Seeds of held-out tasks: validation's is apart from the run's and from that of the test tasks.
VALIDATION_SEED = 1_000
#: Gradient steps that curves go to.
POINTS = 3


def train_setup(
    setup: Setup,
    out: Path,
    *,
    validation_tasks: int = 100,
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
        setup: the settings; what is None takes its default.
        out: folder of the run.
        validation_tasks: tasks that the learning curve is measured on.
        validate_every: iterations between two measurements; None: twenty in all.
        checkpoint_every, tensorboard, overwrite, resume, progress: see :func:`bayesmeta.rl.fit`.
        device: ``"auto"``, or a torch device.

    Returns:
        The result of :func:`bayesmeta.rl.fit`; the folder also has ``learning_curve.png``.

    Raises:
        OptionError: for settings that cannot be used, and on resume for others than those of the run.
    """
    setup = setup.filled()
    if validation_tasks < 2:
        raise OptionError(f"validation_tasks must be at least 2, for a standard error; got {validation_tasks}.")
    if resume:
        _same_settings(setup, out)
    place = pick_device(device)
    family = setup.family()
    learner = setup.learner(family, place)
    held_out = setup.held_out(family, validation_tasks, split="validation", seed=VALIDATION_SEED, device=place)
    assert setup.iterations
    if progress:
        print(
            f"{METHODS[setup.method]}, on {family.name}, {setup.tasks} tasks at a time, {setup.iterations} iterations"
        )
    result = fit(
        learner,
        iterations=setup.iterations,
        validation=held_out,
        validate_every=max(1, setup.iterations // 20) if validate_every is None else validate_every,
        points=None if setup.remembers else max(POINTS, setup.inner_steps or 0),
        out=out,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        tensorboard=True if tensorboard else None,
        progress=progress,
        config={"setup": dataclasses.asdict(setup), "validation_tasks": validation_tasks},
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
    print(f"{out}/learning_curve.png, log.jsonl, checkpoint.pt; next: bayesmeta rl evaluate {out}")


def read_setup(folder: Path) -> Setup:
    """The settings of a run, from its folder.

    Raises:
        CheckpointError: when the folder holds no run of ``bayesmeta rl train``.
    """
    try:
        saved = json.loads((folder / CONFIG).read_text())["settings"]["setup"]
        return Setup(**saved)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no run: there is no {CONFIG}. Give the --out of rl train.") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise CheckpointError(f"{folder}/{CONFIG} is not of a run of bayesmeta rl train. Give its --out.") from error


def _same_settings(setup: Setup, out: Path) -> None:
    """A resumed run must have the settings of the one that it goes on with; gradient methods may go on for longer."""
    if not (Path(out) / CONFIG).exists():
        return  # the folder says what is wrong
    saved, mine = dataclasses.asdict(read_setup(Path(out))), dataclasses.asdict(setup)
    for name, value in mine.items():
        if name == "iterations" and not setup.remembers:
            continue
        if saved[name] != value:
            raise OptionError(
                f"{name}={value!r} was given to a run that began with {name}={saved[name]!r}. Resume with the options "
                "of that run, or choose another folder."
            )


def settings_text(setup: Setup) -> str:
    """The settings that are not None, in a line."""
    shown: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(setup).items() if value is not None and value is not False
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())
