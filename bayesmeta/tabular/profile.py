"""Where a step's time and memory go when a CSV file, or a built-in family of tasks, is learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bayesmeta.errors import OptionError
from bayesmeta.protocols import TaskDistribution
from bayesmeta.tabular.lesson import Lesson, check_inputs, pick_names
from bayesmeta.tabular.supports import VariedSupports
from bayesmeta.tasks.files import read_csv
from bayesmeta.tasks.gp import GPTasks
from bayesmeta.tasks.schema import TableSchema, did_you_mean
from bayesmeta.tasks.sine_or_line import SineOrLine
from bayesmeta.tasks.sinusoid import Sinusoid
from bayesmeta.train.compilation.compiling import Compile
from bayesmeta.train.fit import pick_device
from bayesmeta.train.precision import Precision
from bayesmeta.train.profiling.profile import profile
from bayesmeta.train.profiling.profiled import Profile

#: Families that can be profiled instead of a file, each with noise.
FAMILIES: dict[str, Callable[[], Any]] = {
    "sinusoid": lambda: Sinusoid(noise=0.1),
    "sine-or-line": SineOrLine,
    "gp": GPTasks,
}
#: A long run, of which the schedule of the rate is that of the first steps.
_RUN = 1000


def profile_csv(
    csv: Path | None = None,
    *,
    task: str | None = None,
    y: Sequence[str] = (),
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
    steps: int = 20,
    validation: float = 0.2,
    holdout: float = 0.0,
    seed: int = 0,
    separator: str = ",",
    device: str = "auto",
    family: str | None = None,
    compile: Compile = "off",
    tasks_per_step: int | None = None,
    chunk: int | None = None,
    memory: int | str | None = None,
    precision: Precision = "float32",
    trace: Path | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> Profile:
    """Profile the steps that :func:`~bayesmeta.tabular.fit.fit_csv` would train by; writes no run folder.

    Args:
        csv: the file; None with ``family``.
        task, y, x, categorical, w, exposure, missing, order, order_by, support, method, likelihood, prior, hidden,
            validation, holdout, seed, separator, device, tasks_per_step: as in ``fit_csv``.
        steps, compile, chunk, memory, precision, trace: as in :func:`bayesmeta.profile`.
        family: a name of :data:`FAMILIES`, to profile on tasks that are drawn endlessly.
        out: a JSON file for the figures.
        say: takes the report.

    Returns:
        What :func:`bayesmeta.profile` returns.

    Raises:
        BayesMetaError: its kinds, for whatever cannot be used.
    """
    pick_device(device)
    method, prior = pick_names(method, prior)
    wanted: dict[str, Any] = {"method": method, "likelihood": likelihood, "prior": prior, "hidden": hidden}
    tasks: TaskDistribution
    if family is not None:
        columns = {"task": task, "y": y, "x": x, "categorical": categorical, "w": w, "exposure": exposure}
        tasks, lesson = _of_family(family, csv, [name for name, given in columns.items() if given], seed, wanted)
    else:
        if csv is None or task is None or not y:
            raise OptionError("Name a CSV file with its columns task and y, or a family of tasks to profile on.")
        check_inputs(x, categorical)
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
        lesson = Lesson.of(frame, roles, order=order, validation=validation, holdout=holdout, seed=seed, **wanted)
        tasks = VariedSupports(lesson.train)
    options = lesson.options(_RUN, support, seed, tasks_per_step)
    options |= {"chunk": chunk, "memory": memory, "precision": precision, "compile": compile, "trace": trace}
    if family is not None:
        options["validation"] = None
    # its parameters exist then, so that the optimizer's groups can be told by their names
    lesson.learner.prepare(tasks.sample(2, support=support, query=1, generator=seed))
    found = profile(lesson.learner, tasks, steps=steps, seed=seed, device=device, **options)
    say(str(found))
    if out is not None:
        found.save(out)
    return found


def _of_family(
    family: str, csv: Path | None, columns: list[str], seed: int, wanted: dict[str, Any]
) -> tuple[TaskDistribution, Lesson]:
    """Endless tasks, and a method set up as for a table of some of them."""
    import pandas as pd

    if family not in FAMILIES:
        near = did_you_mean(family, FAMILIES)
        raise OptionError(f"Unknown family {family!r}{near}; expected one of {', '.join(FAMILIES)}.")
    if csv is not None or columns:
        given = [str(csv)] * (csv is not None) + [f"--{name}" for name in columns]
        raise OptionError(f"The family {family} brings its own tasks; leave out {', '.join(given)}.")
    tasks = FAMILIES[family]()
    some = tasks.sample(20, support=5, query=5, generator=seed).query
    count, shots = some.y.shape
    frame = pd.DataFrame({"x": some.x.flatten().tolist(), "y": some.y.flatten().tolist()})
    frame["task"] = [str(i) for i in range(count) for _ in range(shots)]
    roles = TableSchema.of(task="task", x=["x"], y=["y"])
    return tasks, Lesson.of(frame, roles, order=None, validation=0.0, holdout=0.0, seed=seed, **wanted)
