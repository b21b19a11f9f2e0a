"""Score a trained model on the tasks of a CSV file, beside what one would try first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.scores import scores
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import as_generator
from bayesmeta.tabular.run import LABELS, SCORES, Run, load_run
from bayesmeta.tabular.supports import every_task
from bayesmeta.tasks.files import read_csv
from bayesmeta.tasks.table import TableTasks
from bayesmeta.train.distributed import Ranks, join
from bayesmeta.train.fit import pick_device

_REAL = {"nll": "NLL", "crps": "CRPS", "rmse": "RMSE", "coverage_90": "90% covers", "width_90": "90% width"}
#: Tasks that are scored at a time, each such piece under noise of its own, whoever scores it.
_PIECE = 64
_CLASS = {"nll": "NLL", "brier": "Brier", "accuracy": "accuracy"}


def evaluate_csv(
    folder: Path,
    csv: Path,
    *,
    support: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    num_samples: int = 1000,
    separator: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Show a model some rows of each task of a CSV, and score its forecasts of the others.

    Tasks that it was trained on, by their names, are left out where the file has others. Under torchrun each rank
    scores some of the tasks; the scores are those of one process, bit for bit, and rank 0 writes them.

    Args:
        folder: of the run. csv: the file; every row that is to count needs its target.
        support: rows of each task that are seen (all but one where a task has no more); by default as in training.
        out: file for the scores as JSON; by default ``scores.json`` in the folder, or where that holds the scores of
            another file or of other tasks, ``scores-NAME.json`` by the name of the CSV.
        seed: of the choice of rows, where it is random, and of draws.
        num_samples: draws, where there is no closed form.
        separator: between two cells; by default as in training.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        say: takes each line of the report.

    Returns:
        What the file of scores holds.

    Raises:
        BayesMetaError: its kinds, for whatever cannot be used.
    """
    if support is not None and support < 0:
        raise OptionError(f"support={support}; expected at least 0.")
    ranks = join("auto", pick_device(device))
    run = load_run(folder, str(ranks.device))
    support = run.support if support is None else support
    table, note = _unseen(run, csv, separator)
    batches = every_task(table, support, seed=seed)
    models: dict[str, Callable[[TaskBatch], Any]] = {run.settings.method: lambda b: run.method.adapt(b.support)}
    models |= run.baselines
    names = _CLASS if run.schema.target == "class" else _REAL
    pieces = [piece for batch in batches for piece in batch.split(_PIECE)]
    per_task = {
        model: _score(forecast, pieces, list(names), num_samples, seed, run.device if i == 0 else "cpu", ranks)
        for i, (model, forecast) in enumerate(models.items())
    }
    tasks = [name for batch in batches for name in batch.names or ()]
    rows = sum(int(batch.query.counts().sum()) for batch in batches)
    summary = {model: {name: _mean(name, value) for name, value in each.items()} for model, each in per_task.items()}
    mine = per_task[run.settings.method]["nll"]
    differences = {
        model: _mean("nll", each["nll"] - mine) for model, each in per_task.items() if each["nll"] is not mine
    }
    result = {
        "csv": str(csv),
        "tasks": len(tasks),
        "rows": rows,
        "support": support,
        "target": list(run.schema.y),
        "scores": {
            model: {k: v for name, (mean, se) in each.items() for k, v in ((name, mean), (f"{name}_se", se))}
            for model, each in summary.items()
        },
        "nll_difference": {model: {"mean": mean, "se": se} for model, (mean, se) in differences.items()},
        "nll_by_task": dict(zip(tasks, mine.tolist())),
    }
    file, kept = _file(run.folder, result) if out is None else (Path(out), "")
    ranks.from_first(lambda: _write(file, result))
    if not ranks.is_first:
        return result
    few = sum(n <= support for n in table.lengths)
    say(_report(result, summary, differences, names, run, note, few))
    say(f"{kept}Written to {file}.")
    return result


def _unseen(run: Run, csv: Path, separator: str | None) -> tuple[TableTasks, str]:
    """The tasks of the file that were not trained on, in training units, and a note on what was left out."""
    frame = read_csv(csv, columns=run.schema.columns, separator=separator or run.separator)
    table = TableTasks.from_dataframe(
        frame,
        standardizer=run.standardizer,
        order="first" if run.order == "first" else "random",
    )
    used = {name for kind in ("train", "validation") for name in run.tasks.get(kind, [])}
    new = [name for name in table.names if name not in used]
    if not new:
        return table, "All tasks of the file were used in training: these scores flatter. Evaluate on other tasks."
    if len(new) == table.num_tasks:
        return table, ""
    return table.subset(new), f"Left out: {table.num_tasks - len(new)} tasks of the file that were used in training."


def _score(
    forecast: Callable[[TaskBatch], Any],
    pieces: Sequence[TaskBatch],
    names: Sequence[str],
    num_samples: int,
    seed: int,
    device: torch.device | str,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Each score of each task, ``[tasks]``; each rank scores every so many-th piece."""

    def own() -> dict[int, list[Tensor]]:
        found = {}
        for i in range(ranks.rank, len(pieces), ranks.size):
            batch = pieces[i].to(device)
            noise = as_generator(seed, device, f"evaluation of piece {i}")
            each = scores(forecast(batch), batch, num_samples=num_samples, generator=noise).per_task
            found[i] = [each[name].cpu() for name in names]
        return found

    whole = {i: values for part in ranks.collect(own) for i, values in part.items()}
    return {name: torch.cat([whole[i][k] for i in range(len(pieces))]) for k, name in enumerate(names)}


def _mean(name: str, value: Tensor) -> tuple[float, float]:
    """Mean over the tasks and its standard error; of ``rmse`` the root of the mean square, by the delta method."""
    value = value[~value.isnan()]
    value = value.square() if name == "rmse" else value
    mean = float(value.mean())
    error = float(value.std() / math.sqrt(len(value))) if len(value) > 1 else math.nan
    if name == "rmse":
        mean = math.sqrt(mean)
        error = error / (2 * mean) if mean > 0 else error
    return mean, error


def _file(folder: Path, result: dict[str, Any]) -> tuple[Path, str]:
    """Where the scores go, and what is said of those that are there."""
    file = folder / SCORES
    try:
        old = json.loads(file.read_text())
        name, tasks = Path(old["csv"]).name, set(old["nll_by_task"])
    except (OSError, ValueError, KeyError, TypeError):  # none there, or none of ours
        return file, ""
    mine = Path(result["csv"])
    if name == mine.name and tasks == set(result["nll_by_task"]):
        return file, ""
    said = f"{SCORES} holds the scores of {len(tasks)} task(s) of {name} and was left as it is. "
    return file.with_name(f"{file.stem}-{mine.stem}.json"), said


def _write(file: Path, result: dict[str, Any]) -> None:
    plain = json.dumps(result, indent=1, allow_nan=True) + "\n"
    try:
        file.write_text(plain)
    except OSError as error:
        raise OptionError(f"The scores cannot be written to {file}: {error.strerror}. Give another --out.") from error


def _report(
    result: dict[str, Any],
    summary: dict[str, dict[str, tuple[float, float]]],
    differences: dict[str, tuple[float, float]],
    names: dict[str, str],
    run: Run,
    note: str,
    few: int,
) -> str:
    seen = f"{result['support']} row(s) of each task seen" + (f" (fewer in {few} short tasks)" if few else "")
    lines = [f"{result['csv']}: {result['tasks']} tasks, {seen}, {result['rows']} forecast.", *([note] if note else [])]
    width = 2 + max(16, *(len(_cell(*each[name])) for each in summary.values() for name in names))
    lines.append("\n" + f"{'':<20}" + "".join(f"{label:>{width}}" for label in names.values()))
    for model, each in summary.items():
        cells = "".join(f"{_cell(*each[name]):>{width}}" for name in names)
        lines.append(f"{LABELS.get(model, model):<20}{cells}")
    units = f"in units of {', '.join(run.schema.y)}"
    lines.append(
        ("Means over tasks ± standard error." if result["tasks"] > 1 else "One task: no standard errors.")
        + " NLL in nats a point"
        + (
            "; lower is better, but for accuracy."
            if "accuracy" in names
            else f", CRPS and RMSE {units}: lower is better."
        )
    )
    for model, (mean, error) in differences.items():
        verdict = "better" if mean > 0 else "worse"
        lines.append(
            f"{run.settings.method} is {_cell(abs(mean), error)} nats a point {verdict} than the {LABELS[model]} "
            + ("(paired over tasks)." if result["tasks"] > 1 else "(on one task).")
        )
    return "\n".join(lines)


def _cell(mean: float, error: float) -> str:
    if math.isnan(error):  # of one task
        return f"{mean:.3f}" if abs(mean) < 1000 else f"{mean:.4g}"
    return f"{mean:.3f} ± {error:.3f}" if abs(mean) < 1000 else f"{mean:.4g} ± {error:.2g}"
