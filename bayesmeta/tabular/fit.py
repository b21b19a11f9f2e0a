"""Meta-train on the tasks of a CSV file, and keep in one folder all that a forecast needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayesmeta.adapt.base import Method
from bayesmeta.data import Standardizer, TaskBatch
from bayesmeta.errors import DataError, OptionError
from bayesmeta.report.folder import REPORT
from bayesmeta.tabular.lines import Lines
from bayesmeta.tabular.models import (
    LIKELIHOODS,
    RECIPES,
    Settings,
    all_methods,
    build,
    choose,
    pick,
    pick_likelihood,
    pick_prior,
)
from bayesmeta.tabular.rates import Rates
from bayesmeta.tabular.run import FORMAT, LINES, PREDICTIONS, RATES, SCORES, TASKS
from bayesmeta.tabular.supports import VariedSupports, every_task
from bayesmeta.tasks.files import read_csv
from bayesmeta.tasks.schema import TableSchema
from bayesmeta.tasks.table import TableTasks
from bayesmeta.train.bounded import as_bytes
from bayesmeta.train.compilation.compiling import Compile, check_mode
from bayesmeta.train.distributed import count_ranks, is_first
from bayesmeta.train.fit import FitResult, check_counts, fit, pick_device
from bayesmeta.train.precision import Precision, check_precision, check_usable
from bayesmeta.train.schedules import cosine
from bayesmeta.train.sharding import too_many_tasks

if TYPE_CHECKING:
    import pandas as pd

#: Chosen on validation tasks of tables that no reported figure uses; see docs/command-line.md.
TRAINING: dict[str, Any] = {
    "activation": "tanh",
    "tasks_per_step": 16,
    "query": 20,
    "weight_decay": 1.0,
    "clip": 100.0,
    "validate_every": 25,
    "patience": 20,
}
#: Validation tasks that are looked at, and classes that a text target is taken to have unasked, at most.
_MOST_VALIDATION, _MOST_CLASSES = 200, 50


def fit_csv(
    csv: Path,
    out: Path,
    *,
    task: str,
    y: Sequence[str],
    x: Sequence[str] = (),
    categorical: Sequence[str] = (),
    w: Sequence[str] = (),
    exposure: str | None = None,
    missing: str = "error",
    order: str | None = None,
    order_by: str | None = None,
    support: int = 5,
    method: str | None = None,
    likelihood: str | None = None,
    prior: str | None = None,
    hidden: Sequence[int] = (32, 32),
    steps: int = 1000,
    validation: float = 0.2,
    holdout: float = 0.0,
    seed: int = 0,
    separator: str = ",",
    device: str = "auto",
    compile: Compile = "off",
    tasks_per_step: int | None = None,
    chunk: int | None = None,
    memory: int | str | None = None,
    precision: Precision = "float32",
    checkpoint_every: int = 100,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> FitResult:
    """Read a CSV file, learn from its tasks, and write a run folder.

    Under torchrun a step has as many tasks for each rank, as far as there are so many, and rank 0 alone writes.

    Args:
        csv: the file, one row an observation.
        out: the folder.
        task, y, x, categorical, w, exposure, missing, order_by, separator: as :meth:`TableTasks.from_csv`.
        order: which rows are seen: ``"first"`` (the default where ``order_by`` is given), ``"random"`` or ``"mixed"``.
        support: rows of a task that are seen, at most; training has supports of every size up to it.
        method, likelihood, prior: names; None: chosen by the kind of target, and said.
        hidden: widths of the network's hidden layers.
        steps: of training, at most.
        validation: share of the tasks that choose when to stop.
        holdout: share of the tasks that are not touched at all, for ``evaluate``.
        seed: of the split into tasks, the first weights and the training draws.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        compile, chunk, memory, precision, checkpoint_every: as in :func:`bayesmeta.fit`.
        tasks_per_step: of each rank; None: 16, or of several ranks fewer where they would run out of different tasks.
        overwrite, resume: what to do when the folder already holds a run.
        progress: show a bar on standard error.
        say: takes each line of the report.

    Returns:
        What :func:`bayesmeta.fit` returns.

    Raises:
        BayesMetaError: its kinds, for whatever cannot be used.
    """
    _check(support, steps, validation, holdout, seed)
    _check_step(tasks_per_step, chunk, memory, precision, checkpoint_every, pick_device(device))
    first = is_first()
    say = say if first else _nothing
    check_mode(compile)
    check_inputs(x, categorical)
    method, prior = pick_names(method, prior)
    roles = TableSchema.of(
        task=task,
        x=x,
        y=list(y),
        w=w,
        categorical=categorical,
        exposure=exposure,
        missing=missing,  # type: ignore[arg-type]  # checked there
        order_by=order_by,
    )
    frame = read_csv(csv, columns=roles.columns, separator=separator)
    wanted: dict[str, Any] = {"method": method, "likelihood": likelihood, "prior": prior, "hidden": hidden}
    lesson = Lesson.of(frame, roles, order=order, validation=validation, holdout=holdout, seed=seed, **wanted)
    parts, units, settings, order = lesson.parts, lesson.units, lesson.settings, lesson.order
    say(_what_was_read(csv, parts, units, len(frame)))
    options = lesson.options(steps, support, seed, tasks_per_step)
    say(_what_is_trained(settings, lesson.learner, lesson.chosen, support, order))
    say(_what_a_step_has(options["tasks_per_step"], tasks_per_step, lesson.train.num_tasks))
    if first and overwrite and not resume:
        (Path(out) / TASKS).unlink(missing_ok=True)  # an unfinished run must not be read with the old one's tasks
    if first and overwrite:  # what was written about the run that is replaced would look like results of the new one
        others = [path.name for path in Path(out).glob(f"{Path(SCORES).stem}-*.json")]
        for name in (SCORES, PREDICTIONS, REPORT, *others):
            (Path(out) / name).unlink(missing_ok=True)
    result = fit(
        lesson.learner,
        VariedSupports(lesson.train),
        steps=steps,
        **options,
        patience=TRAINING["patience"] if "validation" in parts else None,
        seed=seed,
        device=device,
        compile=compile,
        chunk=chunk,
        memory=memory,
        precision=precision,
        out=out,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
        checkpoint_every=checkpoint_every,
        log_every=25,
        config={
            "tabular": FORMAT,
            "model": settings.state(),
            "standardizer": units.state(),
            "support": support,
            "order": order,
            "separator": separator,
            "csv": str(Path(csv).resolve()),  # where bayesmeta report looks for the tasks
        },
    )
    if first:
        _keep(Path(out), lesson.train, parts, settings)
    if result.compiled is not None:
        say(f"Steps: {result.compiled}.")
    say(_what_next(Path(out), csv, result, parts, lesson.train.schema))
    return result


@dataclass(frozen=True)
class Lesson:
    """What is learned from a table, and by what.

    Attributes:
        parts: the tables of the tasks to train on, and of those held back, by purpose.
        units: means and scales of the training tasks.
        train: the training tasks in these units.
        settings, learner: the method, untrained.
        chosen: why this likelihood.
        order: which rows are seen.
    """

    parts: dict[str, TableTasks]
    units: Standardizer
    train: TableTasks
    settings: Settings
    learner: Method
    chosen: str
    order: str

    @classmethod
    def of(
        cls,
        frame: pd.DataFrame,
        roles: TableSchema,
        *,
        order: str | None,
        validation: float,
        holdout: float,
        seed: int,
        method: str | None,
        likelihood: str | None,
        prior: str | None,
        hidden: Sequence[int],
    ) -> Lesson:
        """From the rows of a table; arguments as of :func:`fit_csv`, names as :func:`pick_names` gives them."""
        likelihood, chosen = _choose_likelihood(frame, roles.y, likelihood, roles.exposure)
        order = order or ("first" if roles.order_by is not None else "random")
        roles = replace(roles, target=LIKELIHOODS[likelihood].target)
        parts = _split(_read(frame, roles, order), validation, holdout, seed)
        units = parts["train"].fit_standardizer()
        train = parts["train"].with_standardizer(units)
        names = {"method": method, "likelihood": likelihood, "prior": prior, "activation": TRAINING["activation"]}
        settings = choose(train, hidden=hidden, seed=seed, **names)
        return cls(parts, units, train, settings, build(settings), chosen, order)

    def options(self, steps: int, support: int, seed: int, tasks_per_step: int | None = None) -> dict[str, Any]:
        """What ``fit`` is told of a step, and of the tasks that choose when to stop; arguments as of :func:`fit_csv`.

        Raises:
            OptionError: for more tasks of all ranks than there are.
        """
        return {
            "tasks_per_step": _tasks_per_step(self.train.num_tasks, tasks_per_step),
            "support": support,
            "query": TRAINING["query"],
            "optimizer": lambda parameters: _optimizer(self.learner, list(parameters)),
            "schedule": cosine(steps),
            "clip": TRAINING["clip"],
            "validation": _held_back(self.parts, self.units, support, seed),
            "validate_every": min(TRAINING["validate_every"], steps),
        }


def pick_names(method: str | None, prior: str | None) -> tuple[str | None, str | None]:
    """The full names of a method and a prior, where they were asked for.

    Raises:
        OptionError: for names that are not known, or that do not fit a table.
    """
    return None if method is None else _pick_method(method), None if prior is None else pick_prior(prior)


def check_inputs(x: Sequence[str], categorical: Sequence[str]) -> None:
    """Refuse a table without inputs.

    Raises:
        OptionError: saying what to do.
    """
    if not x and not categorical:
        raise OptionError(
            "No input was named: --x (numbers) or --categorical needs at least one column that varies within tasks. "
            "Where there is none, add a column of ones to the file."
        )


def _check(support: int, steps: int, validation: float, holdout: float, seed: int) -> None:
    if support < 0 or steps < 1:
        raise OptionError(f"support={support} and steps={steps}; expected a support of at least 0, and 1 step or more.")
    if not (0 <= validation < 1 and 0 <= holdout < 1 and validation + holdout < 1):
        raise OptionError(
            f"validation={validation} and holdout={holdout}; expected shares of the tasks from 0 on, below 1 together."
        )
    if not 0 <= seed < 2**32:
        raise OptionError(f"seed={seed}; expected a number between 0 and 2³² − 1.")


def _check_step(
    tasks_per_step: int | None,
    chunk: int | None,
    memory: int | str | None,
    precision: Precision,
    checkpoint_every: int,
    device: torch.device,
) -> None:
    """Refuse what ``fit`` would refuse, before anything of an old run is removed."""
    check_counts(checkpoint_every=checkpoint_every)
    check_counts(optional=True, tasks_per_step=tasks_per_step, chunk=chunk)
    check_precision(precision)
    if precision == "tf32":
        check_usable(precision, device, [])
    if memory is not None:
        as_bytes(memory)
    if memory is not None and chunk is not None:
        raise OptionError(f"memory={memory!r} picks the chunk, and chunk={chunk} is given too; use one of them.")


def _tasks_per_step(tasks: int, given: int | None) -> int:
    """Of each rank: as given, else what was chosen for one process, less where ranks would run out of tasks."""
    ranks = count_ranks()
    if given is None:
        return TRAINING["tasks_per_step"] if ranks == 1 else max(min(TRAINING["tasks_per_step"], tasks // ranks), 1)
    if ranks > 1 and ranks * given > tasks:
        raise OptionError(too_many_tasks(ranks, given, tasks))
    return given


def _nothing(line: str) -> None:
    """What ranks other than the first say."""


def _pick_method(name: str) -> str:
    picked = pick(name, all_methods(), "method")
    if picked not in RECIPES:
        raise OptionError(f"{picked} takes a model of your own, in Python. Of a table learn: {', '.join(RECIPES)}.")
    return picked


def _choose_likelihood(
    frame: pd.DataFrame, y: Sequence[str], likelihood: str | None, exposure: str | None
) -> tuple[str, str]:
    """The likelihood, and why."""
    if likelihood is not None:
        return pick_likelihood(likelihood), "as asked"
    if exposure is not None:
        return "poisson", "there is an exposure; else give --likelihood"
    if len(y) == 1 and frame[y[0]].dtype.kind not in "iufmM" and not _mostly_numbers(frame[y[0]]):
        classes = frame[y[0]].nunique()
        if classes > _MOST_CLASSES:
            raise OptionError(
                f"The target {y[0]!r} is text of {classes} different values. If these are classes, say so "
                "(--likelihood categorical); if they are dates, turn them into numbers first."
            )
        return "categorical", f"{y[0]} is text; else give --likelihood"
    return "gaussian", f"{', '.join(y)}: numbers; for counts or classes give --likelihood"


def _mostly_numbers(column: pd.Series) -> bool:
    """Whether text is a column of numbers with some odd cell, which reading it as numbers will name."""
    import pandas as pd

    if column.dtype.kind == "b":
        return False
    given = column.dropna()
    return bool(len(given)) and float(pd.to_numeric(given.astype(str), errors="coerce").notna().mean()) > 0.5


def _read(frame: pd.DataFrame, roles: TableSchema, order: str) -> TableTasks:
    return TableTasks.from_dataframe(frame, schema=None, order=order, **_options(roles))  # type: ignore[arg-type]


def _options(roles: TableSchema) -> dict[str, Any]:
    names = ("task", "x", "y", "w", "categorical", "exposure", "target", "missing", "order_by")
    return {name: getattr(roles, name) for name in names}


def _held_back(parts: dict[str, TableTasks], units: Standardizer, support: int, seed: int) -> list[TaskBatch] | None:
    """The validation tasks with no row seen, with one, and with ``support``."""
    if "validation" not in parts:
        return None
    table = parts["validation"].with_standardizer(units)
    if table.num_tasks > _MOST_VALIDATION:
        table = table.subset(list(range(_MOST_VALIDATION)))
    sizes = sorted({0, min(1, support), support}) if max(table.lengths) > 1 else [0]
    return [b for k in sizes for b in every_task(table, k, query=TRAINING["query"], seed=seed)]


def _split(table: TableTasks, validation: float, holdout: float, seed: int) -> dict[str, TableTasks]:
    """Tables of the tasks to train on, to choose with, and to leave alone; the shares are rounded, never to none."""
    counts = {"validation": validation, "held out": holdout}
    sizes = {name: max(round(share * table.num_tasks), 1) for name, share in counts.items() if share > 0}
    sizes["train"] = table.num_tasks - sum(sizes.values())
    if sizes["train"] < 2:
        raise DataError(
            f"The table has {table.num_tasks} task(s): too few to learn from at least two and hold back "
            f"{', '.join(f'{n} for {name}' for name, n in sizes.items() if name != 'train') or 'none'}. Is the task "
            "column the right one? A smaller --validation (0: none) or --holdout leaves more."
        )
    if max(table.lengths) == 1:
        raise DataError(
            f"Each of the {table.num_tasks} tasks has a single row, so there is nothing to adapt to and forecast. Is "
            "the task column the right one? It says which rows belong together."
        )
    return dict(zip(sizes, table.split(list(sizes.values()), seed=seed)))


def _optimizer(learner: Method, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW whose decay pulls the shared weights of the network alone: no prior, no noise, no start point."""
    kept = (".network.", ".trunk.")
    names = [name for name, p in learner.named_parameters() if p.requires_grad]  # in the order of the parameters
    named = list(zip(names, parameters, strict=True))
    shared = {id(p) for name, p in named if any(k in name for k in kept) and p.dim() > 1}
    groups = [
        {"params": [p for p in parameters if id(p) not in shared], "weight_decay": 0.0},
        {"params": [p for p in parameters if id(p) in shared], "weight_decay": TRAINING["weight_decay"]},
    ]
    rate = RECIPES[type(learner).__name__].rate
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)


def _keep(out: Path, train: TableTasks, parts: dict[str, TableTasks], settings: Settings) -> None:
    if LIKELIHOODS[settings.likelihood].target == "real":
        Lines.fit(train).save(out / LINES)
    else:
        Rates.fit(train).save(out / RATES)
    names = {name: list(part.names) for name, part in parts.items()}
    (out / TASKS).write_text(json.dumps(names, indent=1) + "\n")


# -- the report -------------------------------------------------------------------------------------------------------


def _what_was_read(csv: Path, parts: dict[str, TableTasks], units: Standardizer, rows: int) -> str:
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


_WORDS = {"train": "to train on", "validation": "to choose when to stop", "held out": "held out for evaluate"}


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


def _what_is_trained(settings: Settings, learner: Method, chosen: str, support: int, order: str) -> str:
    seen = {"first": "the first rows", "random": "rows at random", "mixed": "the first rows or some at random"}[order]
    hidden = " × ".join(map(str, settings.hidden)) or "none: linear"
    return (
        f"Training {settings.method}: {type(learner).card.posterior}.\n"
        f"  likelihood {settings.likelihood} ({chosen}); prior {settings.prior}; hidden layers {hidden}\n"
        f"  of each task up to {support} row(s) are seen ({seen}), others are forecast"
    )


def _what_a_step_has(each: int, given: int | None, tasks: int) -> str:
    """How many tasks, and of how many ranks."""
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


def _what_next(out: Path, csv: Path, result: FitResult, parts: dict[str, TableTasks], schema: TableSchema) -> str:
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
