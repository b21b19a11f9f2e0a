"""What is learned from a table, and by what: tasks split, units, likelihood and method chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bayesmeta.adapt.base import Method
from bayesmeta.data import Standardizer, TaskBatch
from bayesmeta.errors import DataError, OptionError
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
from bayesmeta.tabular.supports import every_task
from bayesmeta.tasks.schema import TableSchema
from bayesmeta.tasks.table import TableTasks
from bayesmeta.train.distributed import count_ranks
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


def _tasks_per_step(tasks: int, given: int | None) -> int:
    """Of each rank: as given, else what was chosen for one process, less where ranks would run out of tasks."""
    ranks = count_ranks()
    if given is None:
        return TRAINING["tasks_per_step"] if ranks == 1 else max(min(TRAINING["tasks_per_step"], tasks // ranks), 1)
    if ranks > 1 and ranks * given > tasks:
        raise OptionError(too_many_tasks(ranks, given, tasks))
    return given


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
