"""What benchmarks that train several methods share: which runs, how long, training, scoring, several processes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

import bayesmeta as bm
from benchmarks.harness import Bar, Row

#: Trains and scores one run: name, seed, steps, test tasks, threads, and whether it is a full run, held to its bars.
Measure = Callable[[str, int, int, int, int, bool], list[Row]]


def run_all(
    args: argparse.Namespace, steps: Mapping[str, int], quick_steps: Callable[[str], int], measure: Measure
) -> list[Row]:
    """The rows of all runs that were asked for, ``--jobs`` at a time.

    Args:
        args: with the flags of :func:`add_run_arguments`.
        steps: training steps of each full run.
        quick_steps: those of a quick one.
        measure: a function of a module, since other processes import it.
    """
    refuse_unknown(args.runs, steps)
    jobs = []
    for name in args.runs:
        length = args.steps or (max(quick_steps(name), 1) if args.quick else steps[name])
        jobs.append((name, args.seed, length, args.tasks, args.threads, not args.quick and not args.steps))
    guarded = partial(_or_failure, measure)
    if args.jobs == 1:
        return [row for job in jobs for row in guarded(job)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(guarded, jobs) for row in rows]


def refuse_unknown(names: Iterable[str], known: Iterable[str], kind: str = "run") -> None:
    """Stop with a message if a name is none of those known; ``kind`` says what they are names of."""
    known = list(known)
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    if unknown:
        raise SystemExit(f"unknown {kind} {', '.join(unknown)}; expected some of {', '.join(known)}")


def _or_failure(measure: Measure, job: tuple[str, int, int, int, int, bool]) -> list[Row]:
    """The rows of a run; of one whose training diverged a row that says so, so that the others are not lost."""
    try:
        return measure(*job)
    except bm.errors.NonFiniteLossError as error:
        print(f"{job[0]}, seed {job[1]}: {error}", file=sys.stderr, flush=True)
        return [Row(f"{job[0]}_trains", None, bar="finite loss", passes=False)]


def add_run_arguments(parser: argparse.ArgumentParser, runs: Mapping[str, object], tasks: int) -> None:
    """Flags of a benchmark with several runs."""
    parser.add_argument("--runs", nargs="+", default=list(runs), help=f"which trainings (default: {' '.join(runs)})")
    parser.add_argument("--tasks", type=int, default=tasks, help=f"test tasks (default: {tasks})")
    parser.add_argument("--steps", type=int, default=0, help="training steps (default: the run's own)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")


def run_trainings(args: argparse.Namespace, runs: Mapping[str, Any], measure: Measure) -> list[list[Row]]:
    """The rows of each of ``--trainings`` trainings, seeds ``--seed``, ``--seed`` + 1, …

    Args:
        args: with the flags of :func:`add_run_arguments`, and ``trainings``.
        runs: each with its ``steps``, of which a quick run takes a twentieth.
        measure: as in :func:`run_all`.
    """
    steps = {name: settings.steps for name, settings in runs.items()}
    seeds = range(args.seed, args.seed + args.trainings)
    each = [argparse.Namespace(**{**vars(args), "seed": seed}) for seed in seeds]
    return [run_all(one, steps, lambda name: runs[name].steps // 20, measure) for one in each]


def named_bars(runs: Mapping[str, Any]) -> dict[str, Bar]:
    """The bars of runs that have ``bars``, by the names of their rows, which begin with the run's."""
    return {f"{name}_{row}": bar for name, settings in runs.items() for row, bar in settings.bars.items()}


def over_trainings(trainings: list[list[Row]], bars: Mapping[str, Bar]) -> list[Row]:
    """Means over trainings, with the standard error between them; of one training, its own rows.

    Args:
        trainings: rows of each; a row that some of them lack (one of them diverged) stays as it is.
        bars: that the means are held to, by the row's name.
    """
    if len(trainings) == 1:
        return trainings[0]
    rows, names = [], dict.fromkeys(row.name for rows in trainings for row in rows)
    for name in names:
        same = [row for rows in trainings for row in rows if row.name == name]
        if len(same) < len(trainings):  # a row of its own says that one diverged
            rows.append(same[0])
            continue
        values = torch.tensor([row.ours for row in same], dtype=torch.float64)
        mean, error, reference = float(values.mean()), float(values.std() / len(same) ** 0.5), same[0].reference
        judged = bars[name].judge(mean) if name in bars else {}
        difference = None if reference is None else mean - reference
        rows.append(Row(name, mean, reference, None, difference, error, **judged))
    return rows


def train_method(
    make: Callable[[], Any],
    tasks: Any,
    seed: int,
    steps: int,
    *,
    rate: float,
    clip: float | None,
    device: str = "cpu",
    **options: Any,
) -> tuple[Any, float]:
    """Make a method under the seed and train it by Adam, whose rate falls to 0 as a cosine.

    Args:
        make: the method, freshly drawn from torch's global random state.
        tasks: what it is trained on.
        seed: of its first values and of the tasks.
        steps: training steps.
        rate: the first rate.
        clip: largest norm of the gradient.
        device: to train on.
        options: of :func:`bayesmeta.fit`, such as ``support``.

    Returns:
        The trained method, in evaluation mode, and the seconds of CPU time of the training.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        method = make()
    begin = time.process_time()
    bm.fit(
        method,
        tasks,
        steps=steps,
        optimizer=lambda parameters: torch.optim.Adam(parameters, rate),
        schedule=bm.schedules.cosine(steps),
        clip=clip,
        seed=seed,
        device=device,
        progress=False,
        **options,
    )
    method.eval()
    return method, time.process_time() - begin


def score_tasks(method: Any, batch: bm.TaskBatch, seed: int, draws: int, chunk: int = 100) -> dict[str, torch.Tensor]:
    """Scores of each task, ``[tasks]`` each: mse (of the predictive mean), nll, joint_nll, crps, coverage90.

    Args:
        method: adapts to the batch's support, ``chunk`` tasks at a time.
        batch: noisy targets in support and query.
        seed: of the draws.
        draws: how many, for what has no closed form.
        chunk: bounds the memory.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for start in range(0, batch.num_tasks, chunk):
        part = batch.tasks(slice(start, start + chunk))
        posterior = method.adapt(part.support, generator=seed)
        each = bm.scores(posterior, part, num_samples=draws, generator=seed).per_task
        values = {"mse": _squared_error(posterior, part, each), "nll": each["nll"], "joint_nll": each["nll_joint"]}
        for key, value in (values | {"crps": each["crps"], "coverage90": each["coverage_90"]}).items():
            found.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in found.items()}


def _squared_error(posterior: Any, batch: bm.TaskBatch, each: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of the exact predictive mean where there is one, else of the mean of the draws."""
    try:
        mean = posterior.predictive(batch.query).mean
    except bm.errors.NoClosedFormError:
        return each["rmse"].square()
    return (mean - batch.query.y).square().mean(-1).double()
