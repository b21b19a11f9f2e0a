"""What ``bayesmeta fit`` says: what was read, what is trained, and what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bayesmeta.adapt.base import Method
from bayesmeta.data import Standardizer
from bayesmeta.tabular.lesson import TRAINING
from bayesmeta.tabular.models import Settings
from bayesmeta.tabular.run import TASKS
from bayesmeta.tasks.schema import TableSchema
from bayesmeta.tasks.table import TableTasks
from bayesmeta.train.distributed import count_ranks
from bayesmeta.train.fit import FitResult

_WORDS = {"train": "to train on", "validation": "to choose when to stop", "held out": "held out for evaluate"}


def what_was_read(csv: Path, parts: dict[str, TableTasks], units: Standardizer, rows: int) -> str:
    """Columns, tasks and their units.

    Args:
        csv: the file.
        parts: the tables of the tasks, by purpose.
        units: of the training tasks.
        rows: of the file.
    """
    schema, train = parts["train"].schema, parts["train"]
    lengths = sorted(length for part in parts.values() for length in part.lengths)
    used = sum(lengths)
    lines = [
        f"{csv}: {used} rows of {len(lengths)} tasks ({schema.task}), {lengths[0]} to {lengths[-1]} rows each, half "
        f"of them {lengths[len(lengths) // 2]} or more"
        + (f"; {rows - used} row(s) without a target or input left out" if rows > used else "")
    ]
    for name in schema.x:
        lines.append(f"  input   {_column(name, schema, train.x_names, units.x_mean, units.x_scale)}")
    for name in schema.w:
        lines.append(f"  of task {_column(name, schema, schema.w_names, units.w_mean, units.w_scale)}")
    if schema.exposure is not None:
        lines.append(f"  per     {schema.exposure} (exposure)")
    for i, name in enumerate(schema.y):
        if schema.target == "real":
            what = f"mean {float(units.y_mean.reshape(-1)[i]):.4g}, sd {float(units.y_scale.reshape(-1)[i]):.4g}"
        else:
            what = f"classes {_few(schema.classes)}" if schema.classes else "counts"
        lines.append(f"  target  {name:<20} {what}")
    split = ", ".join(f"{part.num_tasks} {_WORDS[name]}" for name, part in parts.items())
    return "\n".join([*lines, f"  tasks   {split}; means and categories are those of the training tasks"])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "")


def _column(name: str, schema: TableSchema, names: Sequence[str], mean: Any, scale: Any) -> str:
    if name in schema.categorical:
        what = f"categories {_few(schema.categories[name])}"
    elif name in schema.flags:
        what = "true or false"
    else:
        i = list(names).index(name)
        what = f"mean {float(mean[i]):.4g}, sd {float(scale[i]):.4g}"
    return f"{name:<20} {what}" + (" (with gaps)" if name in schema.gaps else "")


def what_is_trained(settings: Settings, learner: Method, chosen: str, support: int, order: str) -> str:
    """Method, likelihood and what is seen of a task; arguments as in :class:`~bayesmeta.tabular.lesson.Lesson`."""
    seen = {"first": "the first rows", "random": "rows at random", "mixed": "the first rows or some at random"}[order]
    hidden = " × ".join(map(str, settings.hidden)) or "none: linear"
    return (
        f"Training {settings.method}: {type(learner).card.posterior}.\n"
        f"  likelihood {settings.likelihood} ({chosen}); prior {settings.prior}; hidden layers {hidden}\n"
        f"  of each task up to {support} row(s) are seen ({seen}), others are forecast"
    )


def what_a_step_has(each: int, given: int | None, tasks: int) -> str:
    """How many tasks, and of how many ranks.

    Args:
        each: tasks of each rank.
        given: as asked for; None: not.
        tasks: that there are to train on.
    """
    ranks, usual = count_ranks(), TRAINING["tasks_per_step"]
    if ranks == 1:
        return f"  {each} tasks a step"
    text = f"  {ranks} ranks × {each} tasks a step: steps of {ranks * each} tasks"
    if given is None and each < usual:
        return f"{text}; {usual} of each would be more than there are: {tasks}"
    if ranks * each <= usual:
        return text
    share = max(usual // ranks, 1)
    return f"{text}, no fewer of them; --tasks-per-step {share} would share out steps of {usual} instead"


def what_next(out: Path, csv: Path, result: FitResult, parts: dict[str, TableTasks], schema: TableSchema) -> str:
    """What the folder holds, and the commands that read it.

    Args:
        out: the folder.
        csv: the file.
        result: of the training.
        parts: the tables of the tasks, by purpose.
        schema: of the training tasks.
    """
    best = "" if result.best_step is None else f", best on the validation tasks at step {result.best_step}"
    target = ", ".join(schema.y)
    again = csv if "held out" in parts else "NEW.csv"
    return (
        f"Done: {result.steps} steps in {result.seconds:.0f} s{best}. In {out}:\n"
        "  best.pt or checkpoint.pt  what was learned\n"
        "  config.json               columns, units and model\n"
        f"  {TASKS:<25} which tasks were trained on\n"
        "  log.jsonl                 losses\n"
        "Next:\n"
        f"  bayesmeta evaluate {out} {again}   scores on tasks that were not trained on\n"
        f"  bayesmeta report {out} {again}   the same as a page with pictures and a verdict\n"
        f"  bayesmeta predict {out} NEW.csv   forecasts of the rows whose {target} is empty"
    )
