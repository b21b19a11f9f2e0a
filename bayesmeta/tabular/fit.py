"""Meta-train on the tasks of a CSV file, and keep in one folder all that a forecast needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bayesmeta.errors import OptionError
from bayesmeta.report.folder import REPORT
from bayesmeta.tabular.lesson import TRAINING, Lesson, check_inputs, pick_names
from bayesmeta.tabular.lines import Lines
from bayesmeta.tabular.models import LIKELIHOODS, Settings
from bayesmeta.tabular.rates import Rates
from bayesmeta.tabular.run import FORMAT, LINES, PREDICTIONS, RATES, SCORES, TASKS
from bayesmeta.tabular.said import what_a_step_has, what_is_trained, what_next, what_was_read
from bayesmeta.tabular.supports import VariedSupports
from bayesmeta.tasks.files import read_csv
from bayesmeta.tasks.schema import TableSchema
from bayesmeta.tasks.table import TableTasks
from bayesmeta.train.bounded import as_bytes
from bayesmeta.train.compilation.compiling import Compile, check_mode
from bayesmeta.train.distributed import is_first
from bayesmeta.train.fit import FitResult, check_counts, fit, pick_device
from bayesmeta.train.precision import Precision, check_precision, check_usable


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
    say(what_was_read(csv, parts, units, len(frame)))
    options = lesson.options(steps, support, seed, tasks_per_step)
    say(what_is_trained(settings, lesson.learner, lesson.chosen, support, order))
    say(what_a_step_has(options["tasks_per_step"], tasks_per_step, lesson.train.num_tasks))
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
    say(what_next(Path(out), csv, result, parts, lesson.train.schema))
    return result


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


def _nothing(line: str) -> None:
    """What ranks other than the first say."""


def _keep(out: Path, train: TableTasks, parts: dict[str, TableTasks], settings: Settings) -> None:
    if LIKELIHOODS[settings.likelihood].target == "real":
        Lines.fit(train).save(out / LINES)
    else:
        Rates.fit(train).save(out / RATES)
    names = {name: list(part.names) for name, part in parts.items()}
    (out / TASKS).write_text(json.dumps(names, indent=1) + "\n")
