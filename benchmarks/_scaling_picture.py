"""The picture of the benchmark ``scaling``: time and memory along each axis, both scales logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks._scaling_points import MIB, Point, Size

LABELS = {
    "tasks": "tasks in a step",
    "inner_steps": "inner steps (25 tasks)",
    "particles": "particles of BMAML (25 tasks)",
    "parameters": "parameters of the network (25 tasks)",
}
COLOURS = {"eager": "#1b5e9e", "in chunks": "#d9720b", "recomputed": "#d9720b"}
MARKERS = {"eager": "o", "in chunks": "s", "recomputed": "s"}
NAMES = {"eager": "whole batch", "in chunks": "256 tasks at a time", "recomputed": "steps computed again"}


def draw(axes: Mapping[str, Mapping[str, Sequence[Point]]], place: Callable[[str, Size], int], path: Path) -> None:
    """Draw it into a PNG: a column an axis, seconds above, peak of resident memory below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    figure = Figure(figsize=(4.0 * len(axes), 7.0), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False, sharex="col")
    for column, (axis, series) in enumerate(axes.items()):
        above, below = grid[0, column], grid[1, column]
        for name, points in series.items():
            style = {"color": COLOURS[name], "marker": MARKERS[name], "label": label(axis, name), "linewidth": 1.8}
            timed = [(place(axis, p.size), 1e3 * p.seconds) for p in points if p.seconds is not None]
            above.plot(*zip(*timed), **style)
            resident = [(place(axis, p.size), p.peak / MIB) for p in points if p.peak is not None]
            below.plot(*zip(*resident), **style)
            counted = [(place(axis, p.size), p.tensors / MIB) for p in points if p.tensors is not None]
            below.plot(*zip(*counted), color=COLOURS[name], linestyle=":", linewidth=1.4)
        for one in (above, below):
            one.set_xscale("log")
            one.set_yscale("log")
            for scale in (one.xaxis, one.yaxis):
                scale.set_major_formatter(FuncFormatter(_number))
                scale.set_minor_formatter(NullFormatter())
            if _decades(one.get_ylim()) < 1.5:  # a power of ten or two, or none, says too little
                one.yaxis.set_major_locator(FixedLocator(ticks(*one.get_ylim())))
            one.grid(True, which="major", alpha=0.3)
            one.tick_params(labelsize=11)
            one.spines[["top", "right"]].set_visible(False)
        below.set_xlabel(LABELS[axis], fontsize=12)
        if len(series) > 1 or column == 0:
            above.legend(fontsize=11, frameon=False)
    grid[0, 0].set_ylabel("processor time of a step, ms", fontsize=12)
    grid[1, 0].set_ylabel("peak memory of a step, MiB\n(dotted: its tensors counted)", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def label(axis: str, name: str) -> str:
    """What a series is called: beside steps that are computed again, those that are kept."""
    return "steps kept" if (axis, name) == ("inner_steps", "eager") else NAMES[name]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two limits: 1, 2 and 5 times powers of ten, or more where these are fewer than three."""
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) >= 3:
            break
    return found


def _decades(limits: tuple[float, float]) -> float:
    return math.log10(max(limits) / min(limits))


def _number(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
