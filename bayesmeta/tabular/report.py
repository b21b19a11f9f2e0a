"""The report of a folder that ``bayesmeta fit`` left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from bayesmeta.data import TaskBatch, concatenate
from bayesmeta.diagnostics.scores import scores
from bayesmeta.errors import OptionError
from bayesmeta.protocols import Posterior
from bayesmeta.report import alarms
from bayesmeta.report.build import read_log, write_report, write_stub
from bayesmeta.report.folder import REPORT
from bayesmeta.tabular.advice import advice_of
from bayesmeta.tabular.evaluate import _unseen
from bayesmeta.tabular.run import LABELS, Run, load_run
from bayesmeta.tabular.supports import every_task
from bayesmeta.tasks.files import read_csv
from bayesmeta.tasks.table import TableTasks
from bayesmeta.train.folder import CONFIG

#: Tasks and numbers in the padded x that a page is made of, at most; more tasks do not make it clearer.
MOST_TASKS, _MOST_ELEMENTS = 500, 4_000_000


@dataclass(frozen=True)
class _Judged:
    """The tasks to judge by, and what must be said about their choice."""

    batch: TaskBatch
    remarks: list[str]


def report_csv(
    folder: Path,
    csv: Path | None = None,
    *,
    out: Path | None = None,
    support: int | None = None,
    seed: int = 0,
    num_samples: int = 1000,
    separator: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> Path:
    """Write one HTML page on a trained model, judged by tasks of a CSV that it was not trained on.

    Args:
        folder: of the run.
        csv: the file; by default the one that was trained on. Where that is no longer there, the page tells what was
            trained and says that nothing was scored.
        out: the page; by default ``report.html`` in the folder.
        support, seed, num_samples, separator, device: as in :func:`~bayesmeta.tabular.evaluate.evaluate_csv`.
        say: takes each line.

    Returns:
        The page.

    Raises:
        BayesMetaError: its kinds, for whatever cannot be used.
    """
    if support is not None and support < 0:
        raise OptionError(f"support={support}; expected at least 0.")
    run = load_run(folder, device)
    path = run.folder / REPORT if out is None else Path(out)
    lines = read_log(run.folder)
    best = _best_step(lines)
    title = f"{', '.join(run.schema.y)} of each {run.schema.task}: {run.settings.method}"
    planned = _planned(run)
    facts = _facts(run) | {"training": alarms.course(lines, best, planned, "--steps") or "no log was kept"}
    advice = advice_of(run.settings, alarms.stopped_early(lines, planned))
    trained: dict[str, Any] = {"log": lines, "best_step": best, "planned_steps": planned, "advice": advice}
    source = csv if csv is not None else _trained_on(run)
    if csv is None and (source is None or not source.is_file()):
        where = "its folder does not say where" if source is None else f"{source} is not there"
        missing = (
            f"Nothing was scored: the rows of the tasks are not in the run's folder ({where}). Give the file: "
            f"bayesmeta report {folder} FILE.csv."
        )
        write_stub(path, title=title, facts=facts, missing=missing, **trained)
        say(f"{missing} A page on the training alone was written to {path}.")
        return path
    assert source is not None
    table, note = _unseen(run, source, separator)
    judged = _judged(table, note, run.support if support is None else support, seed)
    posterior = run.method.adapt(judged.batch.to(run.device).support)
    baselines = {  # they have the closed forms that scores asks for, and no draws of φ
        LABELS[name]: scores(
            cast(Posterior, forecast(judged.batch)), judged.batch, num_samples=num_samples, generator=seed
        )
        for name, forecast in run.baselines.items()
    }
    write_report(
        path,
        posterior,
        judged.batch.to(run.device),
        title=title,
        name=run.settings.method,
        facts=facts | {"judged by": str(source)},
        baselines=baselines,
        warnings=judged.remarks,
        **trained,
        validation=_validation(run, source, support, seed, separator),
        x_label=[*table.x_names, "x"][0],
        y_label=None if run.schema.target == "class" else run.schema.y[0],
        num_samples=num_samples,
        generator=seed,
    )
    say(f"{source}: {judged.batch.num_tasks} tasks judged. Written to {path}.")
    return path


def _validation(run: Run, source: Path, support: int | None, seed: int, separator: str | None) -> Posterior | None:
    """Of the validation tasks of the training, where the file has them."""
    frame = read_csv(source, columns=run.schema.columns, separator=separator or run.separator)
    order: Literal["first", "random"] = "first" if run.order == "first" else "random"
    table = TableTasks.from_dataframe(frame, standardizer=run.standardizer, order=order)
    known = set(run.tasks.get("validation", []))
    names = [name for name in table.names if name in known]
    if not names:
        return None
    batch = _judged(table.subset(names), "", run.support if support is None else support, seed).batch
    return run.method.adapt(batch.to(run.device).support)


def _judged(table: TableTasks, note: str, support: int, seed: int) -> _Judged:
    remarks = [note] if note.startswith("All tasks") else []
    keep, width, elements = 0, 0, 0
    for length in table.lengths[:MOST_TASKS]:
        width = max(width, length)
        elements = width * table.num_features * (keep + 1)
        if keep and elements > _MOST_ELEMENTS:
            break
        keep += 1
    if keep < table.num_tasks:
        remarks.append(f"Of {table.num_tasks} tasks the first {keep} were judged; bayesmeta evaluate scores them all.")
        table = table.subset(list(range(keep)))
    return _Judged(concatenate(every_task(table, support, seed=seed)), remarks)


def _trained_on(run: Run) -> Path | None:
    settings: dict[str, Any] = json.loads((run.folder / CONFIG).read_text())["settings"]
    return Path(settings["csv"]) if "csv" in settings else None


def _planned(run: Run) -> int | None:
    """The --steps of the training; a run that is loaded has ended."""
    config: dict[str, Any] = json.loads((run.folder / CONFIG).read_text())
    steps = config.get("fit", {}).get("steps")
    return steps if isinstance(steps, int) else None


def _best_step(lines: list[dict[str, Any]]) -> int | None:
    judged = [line for line in lines if "validation" in line and "step" in line]
    return min(judged, key=lambda line: line["validation"])["step"] if judged else None


def _facts(run: Run) -> dict[str, str]:
    schema, settings = run.schema, run.settings
    tasks = ", ".join(f"{len(names)} {kind}" for kind, names in run.tasks.items())
    seen = {"first": "the first", "random": "at random", "mixed": "the first or at random"}[run.order]
    hidden = " × ".join(map(str, settings.hidden)) or "none: linear"
    return {
        "method": f"{settings.method}: {type(run.method).card.posterior}",
        "model": f"likelihood {settings.likelihood}, prior {settings.prior}, hidden layers {hidden}",
        "task": schema.task,
        "inputs": ", ".join(schema.x) or "none",
        **({"of the task": ", ".join(schema.w)} if schema.w else {}),
        "target": ", ".join(schema.y),
        **({"classes": ", ".join(f"{i}: {c}" for i, c in enumerate(schema.classes))} if schema.classes else {}),
        "seen in training": f"up to {run.support} row(s) of each task, {seen}",
        "tasks": tasks,
    }
