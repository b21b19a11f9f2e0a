"""Time and memory of a meta-step along four axes: tasks, inner steps, particles, parameters.

The step is that of ``fit`` on sinusoid tasks of 10 support and 10 query points: MAML, second order, with one inner step
on a 2×40 ReLU network and 25 tasks a step, unless an axis says otherwise; BMAML for particles. One thread. Times are
the processor's, medians over steps; how memory is measured stands in ``_scaling_points``.

Rows with bars:

- ``cost_per_task_4096_vs_16_eager``: microseconds a task at 4096 tasks, the best of eager, eager in chunks and compiled
  (each of them has a row), over those of an eager step of 16 tasks; the same for a network of about 100 parameters.
- ``memory_with_chunk_flat``: the largest over the smallest peak of resident memory from 256 to 10,000 tasks of 5 inner
  steps, 256 at a time. The tasks themselves, as they are drawn, are all there, and are what grows: with 1 inner step
  (``…_1_step``, without a bar) they are a larger share.
- ``memory_50_inner_steps_checkpointed``: peak of 50 inner steps on 100 shots, computed again on the way back, over that
  of keeping them. What stays is φ after each step; with 10 shots (``…_10_shots``, without a bar) that is most of it.
- ``memory_bound_held``: peak of 10,000 tasks of 50 inner steps in the chunks that ``memory="64MiB"`` picks, over
  64 MiB.

With ``--quick``, which compiles nothing and bounds the memory of few tasks, the first and the last are not judged.

Rows ``…_default_malloc`` are of resident memory with what the C library keeps for itself.

Rows ``…_exponent``, without bars, are slopes of log time over log size between the last two points of an axis: above 1,
a step's time grows faster than its size.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bayesmeta.train.bounded import bound_memory
from bayesmeta.train.memory import recomputing
from benchmarks._peers import one_core
from benchmarks._scaling_picture import draw
from benchmarks._scaling_points import (
    MIB,
    Point,
    Size,
    give_back_memory,
    in_child,
    make_loop,
    measured,
    reset_high_water_mark,
    resident,
    resident_peak,
)
from benchmarks.harness import Row, at_most, main

CHUNK = 256
SMALL = (8, 8)  # 97 parameters
#: Values along each axis; that of the parameters is the width of both hidden layers, from 97 parameters to a million.
FULL = {
    "tasks": [1, 4, 16, 64, 256, 1024, 4096, 10_000],
    "inner_steps": [1, 2, 5, 10, 20, 50],
    "particles": [1, 3, 10, 30, 100],
    "parameters": [8, 30, 98, 314, 998],
}
QUICK = {
    "tasks": [16, 256, 4096],
    "inner_steps": [1, 50],
    "particles": [1, 10],
    "parameters": [8, 98],
}
FLAT = {False: [256, 1024, 4096, 10_000], True: [256, 4096]}
LONG = {False: 50, True: 20}  # inner steps of the rows about recomputing them
#: Rows with bars that a run may not be able to judge: without compiled steps, and with a bound of few tasks, beside
#: whose tensors the code that a first larger step brings in counts for much.
JUDGED = ("cost_per_task_4096_vs_16_eager", "cost_per_task_4096_vs_16_eager_100_parameters", "memory_bound_held")
#: Series of points, by a name that the picture shows.
Series = dict[str, list[Point]]


def size_on(axis: str, value: int) -> Size:
    """The size at one place of an axis."""
    if axis == "tasks":
        return Size(tasks=value)
    if axis == "inner_steps":
        return Size(steps=value)
    if axis == "particles":
        return Size(particles=value)
    return Size(hidden=(value, value))


def variants(axis: str, value: int, quick: bool) -> dict[str, Size]:
    """What is measured at one place of an axis, by the name of its series."""
    size = size_on(axis, value)
    found = {"eager": size}
    if axis == "tasks" and value in FLAT[quick]:
        found["in chunks"] = replace(size, chunk=CHUNK)
    if axis == "inner_steps":
        found["recomputed"] = replace(size, recompute=True)
    return found


# -- measuring ----------------------------------------------------------------------------------------------------


def measure(size: Size, args: argparse.Namespace, *, memory: bool = True) -> Point:
    """Time and memory of one size, printed as they come."""
    point = measured(size, args.seed, args.budget, memory=memory)
    print(describe(point), flush=True)
    return point


def describe(point: Point) -> str:
    """One line about a point."""
    size = point.size
    parts = [f"{size.tasks} tasks", f"{size.steps} step(s)", f"{size.num_parameters} parameters"]
    parts += [f"{size.particles} particles"] * bool(size.particles) + [f"{size.chunk} at a time"] * bool(size.chunk)
    parts += ["recomputed"] * size.recompute + ["compiled"] * size.compiled
    if point.seconds is not None:
        parts.append(f"{1e3 * point.seconds:.3g} ms a step, {point.per_task:.3g} us a task")
    if point.peak is not None and point.tensors is not None:
        parts.append(f"peak {point.peak / MIB:.1f} MiB, tensors {point.tensors / MIB:.1f} MiB")
    return ", ".join(parts)


def measure_axes(args: argparse.Namespace) -> dict[str, Series]:
    """All points of all axes."""
    axes: dict[str, Series] = {}
    for axis, values in (QUICK if args.quick else FULL).items():
        axes[axis] = {}
        for value in values:
            for name, size in variants(axis, value, args.quick).items():
                axes[axis].setdefault(name, []).append(measure(size, args))
    return axes


def measure_costs(hidden: tuple[int, ...], known: Sequence[Point], args: argparse.Namespace) -> dict[str, Point]:
    """Points of 16 and 4096 tasks: eager, in chunks, compiled; of those that are known already no second time."""
    sizes = {
        "few": Size(tasks=16, hidden=hidden),
        "eager": Size(tasks=4096, hidden=hidden),
        "chunked": Size(tasks=4096, hidden=hidden, chunk=CHUNK),
    }
    if args.compiled:
        sizes["compiled"] = Size(tasks=4096, hidden=hidden, compiled=True)
    found = {}
    for name, size in sizes.items():
        same = [point for point in known if point.size == size]
        found[name] = same[0] if same else measure(size, args, memory=False)
    return found


def bounded_peak(tasks: int, steps: int, memory: int, seed: int, keeps: bool) -> tuple[int | None, float]:
    """The chunk that a bound picks, and the peak of resident memory of a step with it; for a process of its own."""
    if not keeps:
        give_back_memory()
    small = make_loop(Size(tasks=4, steps=2), seed)
    with recomputing(small.method, True):
        small.advance()
    before = resident("VmRSS")
    loop = make_loop(Size(tasks=tasks, steps=steps), seed)
    with recomputing(loop.method, True):
        chunk = bound_memory(loop, memory)
        loop.plan = replace(loop.plan, chunk=chunk)
        reset_high_water_mark()
        loop.advance()
    return chunk, float(resident("VmHWM") - before)


# -- rows ---------------------------------------------------------------------------------------------------------


def cost_rows(costs: Mapping[str, Point], suffix: str) -> list[Row]:
    """Cost of a task among 4096 over that among 16: each way, and the best of them, which is held to the bar."""
    few = costs["few"].per_task
    each = {name: point.per_task for name, point in costs.items() if name != "few"}
    rows = [
        Row(f"cost_per_task_4096_{name}_vs_16_eager{suffix}", value, few, value / few) for name, value in each.items()
    ]
    best = min(each.values())
    # without the compiled candidate the best of them is not known
    judged = at_most(0.1).judge(best / few) if "compiled" in costs else {}
    return [
        Row(f"cost_per_task_4096_vs_16_eager{suffix}", best, few, best / few, **judged),
        *rows,
    ]


def memory_rows(axes: Mapping[str, Series], args: argparse.Namespace) -> list[Row]:
    """Of resident memory, in MiB."""
    one_step = [p.peak for p in axes["tasks"]["in chunks"] if p.peak is not None]
    flat, kept = (
        [_peak(Size(n, steps=5, chunk=CHUNK), args, keeps) for n in FLAT[args.quick]] for keeps in (False, True)
    )
    rows = [
        _spread("memory_with_chunk_flat", flat, bar=True),
        _spread("memory_with_chunk_flat_default_malloc", kept),
        _spread("memory_with_chunk_flat_1_step", one_step),
    ]
    for name, shots in (("", 100), ("_10_shots", 10)):
        size = Size(steps=LONG[args.quick], shots=shots)
        low, high = (_peak(replace(size, recompute=again), args) / MIB for again in (True, False))
        judged = {} if name else at_most(0.25).judge(low / high)
        rows.append(Row(f"memory_{size.steps}_inner_steps_checkpointed{name}", low, high, low / high, **judged))
    return [*rows, Row("memory_counted_vs_resident", *counted_vs_resident(axes))]


def _peak(size: Size, args: argparse.Namespace, keeps: bool = False) -> float:
    peak, tensors = in_child(resident_peak, size, args.seed, keeps)
    print(describe(Point(size, None, peak, tensors)) + ", default malloc" * keeps, flush=True)
    return float(peak)


def _spread(name: str, peaks: Sequence[float], *, bar: bool = False) -> Row:
    high, low = max(peaks) / MIB, min(peaks) / MIB
    return Row(name, high, low, high / low, **(at_most(1.2).judge(high / low) if bar else {}))


def counted_vs_resident(axes: Mapping[str, Series]) -> tuple[float, float, float]:
    """Of the point with the most memory: MiB of its tensors, of resident memory, and the ratio."""
    points = [p for series in axes.values() for one in series.values() for p in one if p.peak and p.tensors]
    largest = max(points, key=lambda p: p.peak or 0.0)
    assert largest.peak is not None
    assert largest.tensors is not None
    return largest.tensors / MIB, largest.peak / MIB, largest.tensors / largest.peak


def exponent_rows(axes: Mapping[str, Series]) -> list[Row]:
    """How time grows at the end of each axis."""
    rows = []
    for axis, series in axes.items():
        (x0, t0), (x1, t1) = [(place(axis, p.size), p.seconds) for p in series["eager"][-2:]]
        assert t0 is not None
        assert t1 is not None
        rows.append(Row(f"{axis}_exponent", math.log(t1 / t0) / math.log(x1 / x0)))
    return rows


def place(axis: str, size: Size) -> int:
    """Where a size stands on an axis."""
    of = {"tasks": size.tasks, "inner_steps": size.steps, "particles": size.particles}
    return of.get(axis, size.num_parameters)


def bound_rows(args: argparse.Namespace) -> list[Row]:
    """Whether ``memory=`` keeps its word by the measure of the operating system."""
    tasks, steps, bound = (300, 5, 16 * MIB) if args.quick else (10_000, 50, 64 * MIB)
    rows = []
    for name, keeps in (("", False), ("_default_malloc", True)):
        begin = time.perf_counter()
        chunk, peak = in_child(bounded_peak, tasks, steps, bound, args.seed, keeps)
        what = f"memory='{bound // MIB}MiB', {tasks} tasks, {steps} inner steps: {chunk} at a time"
        print(f"{what}, peak {peak / MIB:.1f} MiB{', default malloc' * keeps}", flush=True)
        share, seconds = peak / bound, time.perf_counter() - begin
        judged = {} if keeps or args.quick else at_most(1.1).judge(share)
        rows.append(Row(f"memory_bound_held{name}", peak / MIB, bound / MIB, share, seconds=seconds, **judged))
    return rows


# -- the command --------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    compiled = "time compiled steps too (default: yes; with --quick: no)"
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None, help=compiled)
    parser.add_argument(
        "--budget", type=float, default=None, help="seconds to time each point (default: 2; quick: 0.3)"
    )
    parser.add_argument("--plot", type=Path, default=None, help="PNG to draw (default: beside --json, where given)")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, all of it."""
    points = {
        axis: {name: [point.as_dict() for point in one] for name, one in series.items()}
        for axis, series in args._axes.items()
    }
    costs = {name: {way: p.as_dict() for way, p in found.items()} for name, found in args._costs.items()}
    return {"unit": "cost in us a task, memory in MiB", "points": points, "costs": costs}


def run(args: argparse.Namespace) -> list[Row]:
    """Measure, draw, judge."""
    args.compiled = not args.quick if args.compiled is None else args.compiled
    args.budget = (0.3 if args.quick else 2.0) if args.budget is None else args.budget
    if not args.budget > 0:
        raise SystemExit(f"--budget must be above 0 seconds; got {args.budget}.")
    torch.set_num_threads(1)
    one_core()
    args._axes = axes = measure_axes(args)
    known = axes["tasks"]["eager"] + axes["tasks"]["in chunks"]
    args._costs = {
        "": measure_costs((40, 40), known, args),
        "_100_parameters": measure_costs(SMALL, [], args),
    }
    rows = [row for suffix, costs in args._costs.items() for row in cost_rows(costs, suffix)]
    rows += [*memory_rows(axes, args), *bound_rows(args), *exponent_rows(axes)]
    not_judged = [name for name in JUDGED if any(row.name == name and row.bar is None for row in rows)]
    if not_judged:
        where = "in --quick" if args.quick else "without the compiled step"
        print(f"not judged {where}: {', '.join(not_judged)}", flush=True)
    path = args.plot or (args.json.with_suffix(".png") if args.json is not None else None)
    if path is not None:
        draw(axes, place, path)
        print(f"drawn: {path}")
    return rows


if __name__ == "__main__":
    main("scaling", run, add_arguments, settings)
