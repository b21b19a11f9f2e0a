"""Active choice: how many chosen labels are worth ten random ones, on sinusoids of unknown amplitude, phase, frequency.

Setting: the challenging sinusoid (Yoon et al. 2018), y = A sin(f x + b) + noise, A ~ U(0.1, 5), f ~ U(0.5, 2),
b ~ U(0, 2π), noise of standard deviation 0.01 A. Of each fresh task one random point is labelled; the others are chosen
one by one from a pool of 40 points x ~ U(−5, 5), by :func:`bayesmeta.learning_curve`, the method adapting anew after
each. Scored is the squared error of the predictive mean on 50 other points with noisy targets, mean over tasks. Beside
it stand random labels from the same pool, the mean over three orders. Each run says in :data:`RUNS` what it trains. All
counts of labels include the first.

Rows: ``METHOD_random_10_mse``, the goal, with :data:`NOISE` as reference; ``METHOD_CRITERION_6_mse``, with the goal as
reference, the difference between the two, and its standard error, paired over tasks (their quotient is printed as z);
``METHOD_CRITERION_points_to_reach_random_10_mse``, the fewest labels with which the mean is no more than the goal; and
``…_median``, the fewest with which the median over tasks is no more than that of ten random labels, over all tasks and
orders. CRITERION is ``information``, ``variance``, ``random`` (the control, one order: with ten labels it differs from
the goal by chance alone, so it takes about ten, and as often none is enough), or ``batch``: information, three labels
at a time, so that there are 1, 4, 7 or 10 (and ``…_batch_7_mse``). ``METHOD_validation_mse``: of six labels by
information, on validation tasks. ``METHOD_seconds``: CPU time of the training.

The targets' own noise is in every error, 0.00085 on average. A good method's goal is near it (about twice), so that
beyond the goal little can be gained, and whether the sixth label or the seventh reaches it turns on differences of a
few standard errors: read the z beside the count.

``active_points_to_reach_random_10_mse`` has the bar: the information row of the method with the least
``validation_mse``. ``--plots FOLDER`` draws a few tasks with the points in the order in which they were chosen.
Settings were chosen on tasks of other seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesmeta as bm
from benchmarks import challenging_sinusoid
from benchmarks.harness import Row, at_most, main, standard_error
from benchmarks.runs import add_run_arguments, run_all, train_method

#: labelled at first, candidates, and scored points of each task
START, POOL, QUERY = 1, 40, 50
#: random labels whose error is the goal, and how many chosen ones may take to reach it
GOAL, CHOSEN = 10, 6
#: labels at a time of the row ``batch``
BATCH = 3
#: random orders behind the goal
REPEATS = 3
#: squared error of the true function, by the noise of the targets: 0.01² E A², A ~ U(0.1, 5)
NOISE = 0.01**2 * (5**3 - 0.1**3) / (3 * (5 - 0.1))
#: test tasks of a quick run at most
QUICK_TASKS = 10


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        make: the method, freshly drawn from torch's global random state.
        steps: training steps of a full run; a quick one takes a hundredth.
        rate: Adam's, falling to 0 as a cosine.
        support, query: points of a training task.
        clip: largest norm of the gradient.
    """

    make: Callable[[], Any]
    steps: int
    rate: float = 5e-3
    support: int = 10
    query: int = 15
    clip: float = 100.0


RUNS = {
    "last_layer_mixture": Run(challenging_sinusoid._last_layer_mixture, 8000),
    "deep_kernel": Run(challenging_sinusoid._deep_kernel, 2000, rate=2e-2),
}


def train(name: str, seed: int, steps: int) -> tuple[Any, float]:
    """The trained method of a run, and the seconds of CPU time that it took."""
    run = RUNS[name]
    options: dict[str, Any] = {"tasks_per_step": 16, "support": run.support, "query": run.query}
    family = bm.tasks.ChallengingSinusoid()
    return train_method(run.make, family, seed, steps, rate=run.rate, clip=run.clip, **options)


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks of which some points are known, some may be labelled, and some are scored."""

    batch: bm.TaskBatch
    pool: bm.Observations

    @classmethod
    def fresh(cls, num_tasks: int, seed: int) -> Tasks:
        """Tasks of a seed of their own."""
        family = bm.tasks.ChallengingSinusoid()
        drawn = family.sample(num_tasks, support=START, query=POOL + QUERY, generator=5_000_000 + seed)
        query = drawn.query
        assert query.y is not None
        pool, rest = (bm.Observations(query.x[:, part], query.y[:, part]) for part in (slice(POOL), slice(POOL, None)))
        return cls(bm.TaskBatch(drawn.support, rest), pool)

    def split(self, size: int) -> list[Tasks]:
        """A few tasks at a time."""
        return [
            Tasks(self.batch.tasks(slice(i, i + size)), self.pool.tasks(slice(i, i + size)))
            for i in range(0, self.batch.num_tasks, size)
        ]


@dataclass(frozen=True, eq=False)
class Curves:
    """Squared error of each task as labels are added.

    Attributes:
        labels: how many there are, the first included.
        chosen, random: ``[steps + 1, tasks]``.
        index: places in the pool of those chosen, ``[tasks, labels − 1]``.
        orders: with all labels, of each random order alone, ``[repeats, tasks]``.
    """

    labels: list[int]
    chosen: Tensor
    random: Tensor
    index: Tensor
    orders: Tensor

    @classmethod
    def of(cls, method: Any, tasks: Tasks, seed: int, criterion: Any, repeats: int = 1, chunk: int = 25) -> Curves:
        """By one criterion, ``"batch"`` for several labels at a time; ``repeats`` random orders beside it."""
        size = BATCH if criterion == "batch" else 1
        by: Any = "information" if criterion == "batch" else criterion
        found, ends = [], []
        for i, part in enumerate(tasks.split(chunk)):
            adapt, end = _watched(method, part.batch.query, seed)
            options: dict[str, Any] = {"steps": (GOAL - START) // size, "size": size, "repeats": repeats}
            found.append(bm.learning_curve(adapt, part.batch, part.pool, criterion=by, generator=seed + i, **options))
            ends.append(torch.stack(end[1:]))  # the first is of the chosen labels
        chosen, random = (torch.cat([getattr(f, name) for f in found], 1) for name in ("chosen", "random"))
        labels = [START + count for count in found[0].labels]
        return cls(labels, chosen, random, torch.cat([f.index for f in found]), torch.cat(ends, 1))

    def at(self, count: int) -> Tensor:
        """The error with this many chosen labels (the nearest number that there is above), ``[tasks]``."""
        return self.chosen[next(i for i, n in enumerate(self.labels) if n >= count)]

    def points_to_reach(self, value: float, median: bool = False) -> float | None:
        """The fewest labels with which the mean (or median) is no more than a value; None where all have more."""
        found = (self.chosen.median(1).values if median else self.chosen.mean(1)).tolist()
        return next((float(n) for n, error in zip(self.labels, found, strict=True) if error <= value), None)


def _watched(method: Any, query: bm.Observations, seed: int) -> tuple[Callable[[bm.Observations], Any], list[Tensor]]:
    """The method's ``adapt``, and a list to which each adaptation to :data:`GOAL` labels adds its tasks' errors."""
    found: list[Tensor] = []

    def adapt(support: bm.Observations) -> Any:
        posterior = method.adapt(support, generator=seed)
        if support.shots == GOAL:
            assert query.y is not None
            with torch.no_grad():
                mean = posterior.predictive(query.with_y(None)).mean
            found.append((mean.double() - query.y.double()).square().mean(-1))
        return posterior

    return adapt, found


# -- rows ---------------------------------------------------------------------------------------------------------

CRITERIA = ("information", "variance", "batch", "random")


def measure(
    name: str, seed: int, steps: int, num_tasks: int, threads: int, full: bool, plots: Path | None = None
) -> list[Row]:
    """Train and score one run; with ``plots`` a picture of its choices is left in that folder."""
    torch.set_num_threads(threads)
    method, seconds = train(name, seed, steps)
    tasks, rows = Tasks.fresh(num_tasks, 2 * seed), []
    goal: Tensor | None = None  # [orders, tasks]
    for criterion in CRITERIA:
        curves = Curves.of(method, tasks, seed, criterion, REPEATS if goal is None else 1)
        if goal is None:
            goal, each = curves.orders, curves.random[-1]
            rows.append(
                Row(f"{name}_random_{GOAL}_mse", float(each.mean()), NOISE, standard_error=standard_error(each))
            )
            if plots is not None:
                print(f"picture: {draw(plots / f'active_{name}.png', method, tasks, curves, seed)}")
        rows += compare(f"{name}_{criterion}", curves, goal)
    validation = Curves.of(method, Tasks.fresh(max(num_tasks // 5, 2), 2 * seed + 1), seed, "information").at(CHOSEN)
    rows.append(Row(f"{name}_validation_mse", float(validation.mean()), standard_error=standard_error(validation)))
    rows.append(Row(f"{name}_seconds", seconds))
    return rows


def compare(name: str, curves: Curves, goal: Tensor) -> list[Row]:
    """What one criterion made of its labels, beside the errors with ten random labels, ``[orders, tasks]``."""
    count = next(n for n in curves.labels if n >= CHOSEN)
    ours = curves.at(count)
    gap, theirs = ours - goal.mean(0), float(goal.mean())
    reach, half = curves.points_to_reach(theirs), curves.points_to_reach(float(goal.median()), median=True)
    means = ", ".join(f"{n}: {m:.4f}" for n, m in zip(curves.labels, curves.chosen.mean(1), strict=True))
    z = float(gap.mean() / gap.std() * len(gap) ** 0.5)
    print(f"{name}: {means}; {count} of them less {GOAL} at random: z = {z:.1f}", flush=True)
    return [
        Row(f"{name}_{count}_mse", float(ours.mean()), theirs, None, float(gap.mean()), standard_error(gap)),
        Row(f"{name}_points_to_reach_random_{GOAL}_mse", reach, GOAL),
        Row(f"{name}_points_to_reach_random_{GOAL}_mse_median", half, GOAL),
    ]


def run(args: argparse.Namespace) -> list[Row]:
    """All runs that were asked for, and the best of them."""
    if args.quick:
        args.tasks = min(args.tasks, QUICK_TASKS)
    steps = {name: settings.steps for name, settings in RUNS.items()}
    rows = run_all(args, steps, lambda name: RUNS[name].steps // 100, partial(measure, plots=args.plots))
    return rows + best(rows, args.runs, not args.quick and not args.steps)


def best(rows: list[Row], names: list[str], full: bool) -> list[Row]:
    """The figure with the bar, of the method that is best on validation tasks."""
    known = {row.name: row for row in rows}
    found = {name: known[key].ours for name in names if (key := f"{name}_validation_mse") in known}
    errors = {name: math.inf if ours is None or math.isnan(ours) else ours for name, ours in found.items()}
    if not errors:  # all of them diverged
        return []
    chosen = min(errors, key=lambda name: errors[name])
    print(f"chosen by validation: {chosen}", flush=True)
    row = known[f"{chosen}_information_points_to_reach_random_{GOAL}_mse"]
    value = math.nan if row.ours is None else row.ours
    judged = at_most(CHOSEN).judge(value) if full else {}
    return [Row(f"active_points_to_reach_random_{GOAL}_mse", row.ours, GOAL, **judged)]


# -- the picture --------------------------------------------------------------------------------------------------

_BLUE, _ORANGE, _INK = "#2a6fb0", "#d9541e", "#222222"


def draw(path: Path, method: Any, tasks: Tasks, curves: Curves, seed: int, count: int = 8) -> Path:
    """The first tasks: the pool, the chosen points by their order, and the forecasts with three and six labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(count, tasks.batch.num_tasks)
    some = next(iter(tasks.split(count)))
    grid = torch.linspace(-5, 5, 201).reshape(1, -1, 1).expand(count, -1, 1)
    figure = Figure(figsize=(2.4 * count, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, count, sharex=True, sharey="col", squeeze=False)
    assert some.pool.y is not None
    for row, labels in zip(axes, (3, CHOSEN), strict=True):
        index = curves.index[:count, : labels - START]
        choice = bm.Choice(index, torch.full(index.shape, math.nan), "information", False)
        support = bm.union(some.batch.support, choice.take(some.pool))
        with torch.no_grad():
            forecast = method.adapt(support, generator=seed).predictive(bm.Observations(grid))
        mean, sd = forecast.mean, forecast.variance.sqrt()
        assert support.y is not None
        for task, axis in enumerate(row):
            at = grid[task, :, 0]
            axis.fill_between(at, mean[task] - 2 * sd[task], mean[task] + 2 * sd[task], color=_BLUE, alpha=0.2, lw=0)
            axis.plot(at, mean[task], color=_BLUE, linewidth=1)
            axis.scatter(some.pool.x[task, :, 0], some.pool.y[task], s=5, color=_INK, alpha=0.6)
            axis.scatter(support.x[task, :, 0], support.y[task], s=24, color=_ORANGE, zorder=3)
            for order, (x, y) in enumerate(zip(support.x[task, :, 0].tolist(), support.y[task].tolist(), strict=True)):
                axis.annotate(str(order + 1), (x, y), fontsize=8, xytext=(3, 3), textcoords="offset points")
            reach = 1.5 * float(some.pool.y[task].abs().max())
            axis.set_ylim(-reach, reach)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(f"{labels} labels", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    add_run_arguments(parser, RUNS, 500)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw chosen points of some tasks there")


if __name__ == "__main__":
    main("active", run, add_arguments)
