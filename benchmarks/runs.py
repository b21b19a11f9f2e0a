"""What benchmarks that train several methods share: which runs, how many steps, and several processes at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.harness import Row

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
    unknown = [name for name in args.runs if name not in steps]
    if unknown:
        raise SystemExit(f"unknown run {', '.join(unknown)}; expected some of {', '.join(steps)}")
    jobs = []
    for name in args.runs:
        length = args.steps or (max(quick_steps(name), 1) if args.quick else steps[name])
        jobs.append((name, args.seed, length, args.tasks, args.threads, not args.quick and not args.steps))
    if args.jobs == 1:
        return [row for job in jobs for row in measure(*job)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(measure, *zip(*jobs, strict=True)) for row in rows]


def add_run_arguments(parser: argparse.ArgumentParser, runs: Mapping[str, object], tasks: int) -> None:
    """Flags of a benchmark with several runs."""
    parser.add_argument("--runs", nargs="+", default=list(runs), help=f"which trainings (default: {' '.join(runs)})")
    parser.add_argument("--tasks", type=int, default=tasks, help=f"test tasks (default: {tasks})")
    parser.add_argument("--steps", type=int, default=0, help="training steps (default: the run's own)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
