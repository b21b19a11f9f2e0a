"""What a trained learner reaches on test tasks, beside optima and classical policies."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bayesmeta.diagnostics import plots
from bayesmeta.errors import OptionError, RunFolderError
from bayesmeta.ops.files import reason
from bayesmeta.rl.command import POINTS
from bayesmeta.rl.drawings import plot_adaptation, plot_trajectories, point_name
from bayesmeta.rl.envs.gym_family import GymFamily
from bayesmeta.rl.evaluated_beliefs import evaluate_beliefs
from bayesmeta.rl.learner import AdaptationCurve, HasBeliefs, standard_error
from bayesmeta.rl.opened import OpenedRun, open_run
from bayesmeta.rl.plan import read_setup, settings_text
from bayesmeta.rl.protocols import Tensors
from bayesmeta.rl.reference_policies import Reference, references
from bayesmeta.rl.watching import save_video, watch
from bayesmeta.train.fit import pick_device

#: Tasks of pictures and videos.
WATCHED = 6
FILMED = 3
#: Files in the run's folder.
TRAJECTORIES, ADAPTATION = "trajectories.png", "adaptation.png"


def evaluate_folder(
    folder: Path,
    *,
    tasks: int = 400,
    steps: int = POINTS,
    seed: int = 0,
    out: Path | None = None,
    video: Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Score a run of ``bayesmeta rl train`` on test tasks; print a table, write figures, pictures, beliefs.

    Args:
        folder: of the run.
        tasks: test tasks.
        steps: gradient steps to go to, for methods that take them.
        seed: of the test tasks and of whatever is random on them.
        out: file for the figures; None: ``evaluation.json`` in the folder.
        video: file for an animated GIF of three tasks; None: no video.
        device: ``"auto"``, or a torch device.
        progress: say what is being done, on standard error where that is a terminal.

    Returns:
        What the file holds: rows of ``name``, ``returns`` and ``standard_errors`` (of references also ``knows_task``,
        ``optimum`` and ``learns``, see :class:`~bayesmeta.rl.Reference`), ``regrets`` by name of an optimum, and
        ``beliefs`` of a learner that has them, see :func:`~bayesmeta.rl.evaluated_beliefs.evaluate_beliefs`.

    Raises:
        OptionError: for numbers and kinds of videos that cannot be used.
        CheckpointError: for a folder without a good run.
        RunFolderError: for files in folders that are not there.
        EnvError: for a video of environments that have no picture, or that need a package for it.
    """
    if tasks < 2 or steps < 1:
        raise OptionError(f"Expected tasks ≥ 2, for standard errors, and steps ≥ 1; got {tasks} and {steps}.")
    folder, out = Path(folder), Path(folder) / "evaluation.json" if out is None else Path(out)
    setup = read_setup(folder)
    pick_device(device)  # what is wrong with either is said before any work
    _check_file(out)
    if video is not None:
        if video.suffix.lower() != ".gif":
            raise OptionError(f"{video.name} was given; videos are written as .gif.")
        _check_file(video)
    with _told(progress) as tell:
        tell(f"the {setup.method} of {folder}")
        run = open_run(folder, device=device)
        learner, family = run.learner, run.family
        points = None if setup.remembers else steps
        if video is not None:  # first, since families without pictures say so here
            tell(f"video of {FILMED} tasks")
            _film(run, points, seed, video)
        tell(f"{tasks} test tasks")
        held_out = run.held_out(tasks, seed=seed)
        known = held_out.tasks.to("cpu") if isinstance(held_out.tasks, Tensors) else held_out.tasks
        curve = learner.curve(held_out, points=points, generator=seed).cpu()
        tell("optima and baselines on these tasks")
        others = references(family, known, setup.episodes or 1, seed=seed)
        result = _result(run, curve, others, tasks)
        tqdm.write(table(result))
        if isinstance(learner, HasBeliefs):
            tell(f"beliefs about {tasks} test tasks")
            title = f"{setup.method} on {setup.env}: the belief about the first test task"
            result["beliefs"] = evaluate_beliefs(learner, held_out, seed=seed, folder=folder, title=title)
        tell("pictures")
        _write(out, result)
        _draw(run, points, seed, folder)
        title = f"{setup.method} on {setup.env}: {tasks} test tasks"
        plots.save_figure(plot_adaptation(curve, others, name=setup.method, title=title), folder / ADAPTATION)
    files = [out, folder / TRAJECTORIES, folder / ADAPTATION]
    files += [folder / name for name in result.get("beliefs", {"files": []})["files"]] + ([video] if video else [])
    print(", ".join(map(str, files)))
    return result


@contextmanager
def _told(progress: bool) -> Iterator[Callable[[str], None]]:
    """Says in a line on standard error what is being done, as long as it is done, where that is a terminal."""
    with tqdm(disable=None if progress else True, leave=False, bar_format="{desc}") as bar:
        yield lambda what: bar.set_description_str(f"evaluating: {what}")


def _result(run: OpenedRun, curve: AdaptationCurve, others: list[Reference], tasks: int) -> dict[str, Any]:
    """What the file holds, but for beliefs."""
    setup = run.setup
    return {
        "settings": settings_text(dataclasses.replace(setup, iterations=None)),  # of which more may have been done
        "tasks": tasks,
        "unit": curve.unit,
        "iterations": run.iterations,
        "rows": [_row(setup.method, curve), *(_reference_row(r, curve) for r in others)],
        "regrets": {r.name: _regret(r, curve) for r in others if _bounds(r, curve)},
    }


def _row(name: str, curve: AdaptationCurve) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "returns": curve.mean(), "standard_errors": curve.standard_error()}
    if curve.success is not None and curve.lengths is not None:
        row["success"] = [float(x) for x in curve.success.mean(1)]
        row["lengths"] = [float(x) for x in curve.lengths.mean(1)]
    return row


def _reference_row(reference: Reference, curve: AdaptationCurve) -> dict[str, Any]:
    """As a learner's, with what it knows."""
    flags = {name: getattr(reference, name) for name in ("label", "knows_task", "optimum", "learns")}
    return {**_row(reference.name, _beside(reference, curve)), **flags}


def _beside(reference: Reference, curve: AdaptationCurve) -> AdaptationCurve:
    """Its curve, at every point of the learner's where it does not learn: what a learner does changes nothing for it.

    One that learns beside a learner that takes steps stands at the first point: there neither knows the task.
    """
    own, points = reference.curve, len(curve.returns)
    if reference.learns or len(own.returns) == points:
        return own
    first = (None if of is None else of[:1].expand(points, -1) for of in (own.success, own.lengths))
    return AdaptationCurve(own.returns[:1].expand(points, -1), curve.unit, *first)


def _bounds(reference: Reference, curve: AdaptationCurve) -> bool:
    """Whether there is a regret against it: who adapts by steps between episodes may pass one who plays a trial."""
    return reference.optimum and (reference.knows_task or curve.unit == "episode")


def _regret(optimum: Reference, curve: AdaptationCurve) -> dict[str, list[float]]:
    """Optimum less return, task by task, at each point where there is an optimum.

    An optimum by expectation over the prior has no spread of its own.
    """
    best = _beside(optimum, curve).returns
    difference = best - curve.returns[: len(best)]
    return {"mean": [float(x) for x in difference.mean(1)], "standard_error": standard_error(difference)}


def table(result: dict[str, Any]) -> str:
    """The result as text: a row a policy, a column a point of the adaptation."""
    points = len(result["rows"][0]["returns"])
    heads = [point_name(result["unit"], point) for point in range(points)]
    names = [row.get("label", row["name"]) for row in result["rows"]]
    regrets = [f"regret: {name}" for name in result["regrets"]]
    ended = [f"success, length: {row['name']}" for row in result["rows"] if "success" in row]
    width = max(len(name) for name in [*names, *regrets, *ended, "return"])
    measured = [pair for row in result["rows"] for pair in zip(row["returns"], row["standard_errors"])]
    measured += [pair for row in result["regrets"].values() for pair in zip(row["mean"], row["standard_error"])]
    texts = [*heads, *(_cell(*pair) for pair in measured), *(cell for row in result["rows"] for cell in _ended(row))]
    wide = max(18, *(len(text) + 2 for text in texts))
    lines = [f"{result['settings']}; {result['iterations']} iterations; {result['tasks']} test tasks, mean ± s.e."]
    lines.append("return".ljust(width) + "".join(head.rjust(wide) for head in heads))
    for name, row in zip(names, result["rows"]):
        cells = [_cell(*pair) for pair in zip(row["returns"], row["standard_errors"])]
        lines.append(name.ljust(width) + "".join(cell.rjust(wide) for cell in cells))
    for name, row in zip(regrets, result["regrets"].values()):
        cells = [_cell(*pair) for pair in zip(row["mean"], row["standard_error"])]
        lines.append(name.ljust(width) + "".join(cell.rjust(wide) for cell in cells))
    for row in result["rows"]:
        if "success" in row:
            cells = _ended(row)
            lines.append(f"success, length: {row['name']}".ljust(width) + "".join(cell.rjust(wide) for cell in cells))
    if any(len(row["returns"]) < points for row in result["rows"]):
        lines.append("Rows that end early learn within a trial; theirs is the episode in which they know nothing.")
    return "\n".join(lines)


def _ended(row: dict[str, Any]) -> list[str]:
    """How episodes ended, for families that say so."""
    return [f"{s:.0%}, {n:.2f}" for s, n in zip(row["success"], row["lengths"])] if "success" in row else []


def _cell(mean: float, error: float) -> str:
    if not math.isfinite(error) or error < 1e-6:  # known, not measured
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {error:.3f}"


def _check_file(path: Path) -> None:
    """Whether a file can be written there, as far as that is known before there is anything to write."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise RunFolderError(f"{path} {what}; give a file in a folder that is there.")


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise RunFolderError(f"{path} could not be written: {reason(error)}") from error


def _film(run: OpenedRun, points: int | None, seed: int, video: Path) -> None:
    pictures = {"render_mode": "rgb_array"} if isinstance(run.family, GymFamily) else {}
    few = run.held_out(FILMED, seed=seed, **pictures)
    save_video(watch(run.learner, few, points=points, pictures=True), video)


def _draw(run: OpenedRun, points: int | None, seed: int, folder: Path) -> None:
    few = run.held_out(WATCHED, seed=seed)
    seen = watch(run.learner, few, points=points)
    title = f"{run.setup.method} on {run.setup.env}: test tasks"
    plots.save_figure(plot_trajectories(seen, title=title), folder / TRAJECTORIES)
