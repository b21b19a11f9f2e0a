"""The pictures of a report: narrow ones, which a phone can show one by one, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.calibration import Calibration, ClassCalibration
from bayesmeta.diagnostics.plots import BLUE, GREY, INK, ORANGE, plot_forecast
from bayesmeta.diagnostics.plots_calibration import plot_calibration
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 170
_DRAWS = 400  # behind the bands of a forecast, where there is no closed form
_WIDTH = 4.4  # inches: letters of 9 points are 10 pixels high on a screen of 360
#: PNG bytes, and width and height on the page.
Picture = tuple[bytes, tuple[int, int]]


def forecasts(
    posterior: Posterior,
    batch: TaskBatch,
    tasks: Sequence[int],
    *,
    x_label: str,
    y_label: str | None,
    num_samples: int,
    generator: Seed,
) -> tuple[list[Picture], Picture, list[str]]:
    """A picture for each of some tasks, one of what their signs mean, and the words of the latter.

    They are drawn at once, since a posterior predicts all tasks of its batch whichever are shown.
    """
    figure = plot_forecast(
        posterior,
        batch,
        tasks=tasks,
        max_panels=len(tasks),
        columns=1,
        num_samples=min(num_samples, _DRAWS),
        generator=generator,
        y_label=y_label,
        share_axes=False,
    )
    legend = figure.legends[0]
    if y_label is None:
        y_label = figure.get_supylabel()
    for axis in figure.axes:
        axis.set_xlabel(x_label, fontsize=9, color=INK, parse_math=False)
        axis.set_ylabel(y_label, fontsize=9, color=INK, parse_math=False)
        axis.set_title("")  # the caption names the task
    figure.supxlabel("")
    figure.supylabel("")
    figure.set_size_inches(_WIDTH, 2.6 * len(tasks) + 0.9)
    words = [text.get_text() for text in legend.get_texts()]
    axes = [axis for axis in figure.axes if axis.get_visible()]
    *panels, signs = _parts(figure, [*axes, legend])
    return panels, signs, words


def calibration(result: Calibration | ClassCalibration) -> list[Picture]:
    """Coverage curve and PIT histogram, or the two reliability diagrams, as two pictures."""
    figure = plot_calibration(result)
    return _parts(figure, figure.axes)


def forest(name: str, labels: Sequence[str], draws: np.ndarray, prior: np.ndarray | None) -> Picture:
    """One task parameter in several tasks: median, central 50% and 90% intervals; behind them those of the prior.

    Args:
        name: of the parameter. labels: of the tasks. draws: ``[n, tasks]``. prior: draws, ``[m]``, or None.
    """
    figure, axis = _axes(0.24 * len(labels) + 1.0)
    places = np.arange(len(labels))[::-1]
    low, mid_low, middle, mid_high, high = np.quantile(draws, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    if prior is not None:
        axis.axvspan(*np.quantile(prior, [0.05, 0.95]), color=GREY, alpha=0.18, linewidth=0, zorder=0)
        axis.axvline(np.median(prior), color=GREY, linewidth=1.0, linestyle="--", zorder=1)
    axis.hlines(places, low, high, color=BLUE, linewidth=1.2, zorder=2)
    axis.hlines(places, mid_low, mid_high, color=BLUE, linewidth=3.5, zorder=2)
    axis.scatter(middle, places, s=16, color=ORANGE, edgecolors="white", linewidths=0.5, zorder=3)
    axis.set_yticks(places, [label if len(label) < 25 else f"{label[:23]}…" for label in labels], parse_math=False)
    axis.set_xlabel(name, fontsize=9, color=INK, parse_math=False)
    axis.set_ylim(-0.7, len(labels) - 0.3)
    return _whole(figure)


def density(name: str, draws: np.ndarray) -> Picture:
    """Histogram of a global parameter's draws ``[n]``."""
    figure, axis = _axes(2.2)
    axis.hist(draws, bins=40, density=True, color=BLUE, alpha=0.5)
    axis.axvline(np.median(draws), color=ORANGE, linewidth=1.5)
    axis.set_xlabel(name, fontsize=9, color=INK, parse_math=False)
    axis.set_ylabel("density", fontsize=9, color=INK)
    return _whole(figure)


def curve(steps: Sequence[float], values: Sequence[float], label: str, best: float | None) -> Picture:
    """A loss along the training; a line marks the step that was kept."""
    figure, axis = _axes(2.4)
    axis.plot(steps, values, color=BLUE, linewidth=1.5, marker="o" if len(steps) < 30 else None, markersize=3)
    if best is not None:
        axis.axvline(best, color=ORANGE, linewidth=1.2, linestyle="--")
    axis.set_xlabel("training step", fontsize=9, color=INK)
    axis.set_ylabel(label, fontsize=9, color=INK)
    return _whole(figure)


def _axes(height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axis = figure.subplots()
    axis.tick_params(labelsize=8, colors=INK, color=GREY, length=3)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    return figure, axis


def _parts(figure: Figure, parts: Sequence[Any]) -> list[Picture]:
    """Each part of a figure as a picture of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # one drawing of all, cut up: each savefig would draw the whole figure again
    whole = np.asarray(canvas.buffer_rgba())
    pictures = []
    for part in parts:
        box = part.get_tightbbox(canvas.get_renderer()).padded(0.06 * DPI)
        left, right = max(math.floor(box.x0), 0), math.ceil(box.x1)
        top, bottom = max(math.floor(len(whole) - box.y1), 0), math.ceil(len(whole) - box.y0)
        pictures.append(_encode(whole[top:bottom, left:right]))
    return pictures


def _whole(figure: Figure) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return _encode(np.asarray(canvas.buffer_rgba()))


def _encode(pixels: np.ndarray) -> Picture:
    """As PNG; on the page 96 pixels are an inch."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, np.ascontiguousarray(pixels), format="png")
    height, width = pixels.shape[:2]
    return stream.getvalue(), (round(96 * width / DPI), round(96 * height / DPI))
