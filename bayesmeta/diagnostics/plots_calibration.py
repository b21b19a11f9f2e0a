"""Calibration as pictures: coverage curves, PIT histograms, reliability diagrams and rank curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesmeta.diagnostics.calibration import Calibration, ClassCalibration
from bayesmeta.diagnostics.plots import BLUE, GREY, INK, ORANGE, as_written, save_figure
from bayesmeta.diagnostics.reliability import Reliability
from bayesmeta.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (BLUE, ORANGE, "#3f9142", "#8e5ea2", "#8c6d31", "#17a2a2")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_TWO_ERRORS = "band and bars: ± 2 standard errors over tasks"


def plot_calibration(
    result: Calibration | ClassCalibration | Mapping[str, Calibration] | Mapping[str, ClassCalibration],
    *,
    bins: int = 10,
    path: str | Path | None = None,
) -> Figure:
    """Draw the calibration of one posterior, or of several on the same axes.

    Of numbers: the coverage curve (share of the query inside central intervals of each level), and the histogram of
    the PIT values, flat for calibrated forecasts, ∪ for over-confident and ∩ for under-confident ones. Of classes: the
    reliability diagrams with bins of equal width and of equally many points. Bands and bars are ± 2 standard errors
    over tasks.

    Args:
        result: what :func:`~bayesmeta.calibration` gives, or several by name, all of numbers or all of classes.
        bins: of the PIT histogram.
        path: where to write the picture; the suffix says in which format (png, pdf, svg).

    Returns:
        The matplotlib figure.

    Raises:
        OptionError: for nothing to draw, more results than colours, numbers beside classes, bins below 2, or another
            format.
    """
    results: dict[str, Any] = {"": result} if isinstance(result, Calibration | ClassCalibration) else dict(result)
    if not 1 <= len(results) <= len(_COLOURS):
        raise OptionError(f"{len(results)} results to draw; expected 1 to {len(_COLOURS)}.")
    if bins < 2:
        raise OptionError(f"bins={bins}; expected at least 2.")
    kinds = {type(value) for value in results.values()}
    if kinds not in ({Calibration}, {ClassCalibration}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise OptionError(f"Results of kinds {names}; expected all Calibration or all ClassCalibration.")
    figure, axes = _axes(2)
    for place, each in enumerate(results.values()):
        style = {"color": _COLOURS[place], "label": str(place)}
        if isinstance(each, Calibration):
            _coverage(axes[0], each, style, _MARKERS[place])
            _histogram(axes[1], each, style, bins, alone=len(results) == 1)
        else:
            _reliability(axes[0], each.equal, style, _MARKERS[place])
            _reliability(axes[1], each.adaptive, style, _MARKERS[place])
    of_numbers = kinds == {Calibration}
    titles = ("coverage", "PIT values") if of_numbers else ("bins of equal width", "bins of equally many points")
    labels = (
        (("level of the central interval", "share of the query inside"), ("F(y)", "density"))
        if of_numbers
        else (("probability of the most probable class", "share that is right"),) * 2
    )
    for axis, title, (x_label, y_label) in zip(axes, titles, labels):
        _finish(axis, title, x_label, y_label)
    if of_numbers:
        axes[1].set_ylim(bottom=0.0)  # last, since it stops the upper end from following the data
    _legend(figure, axes[0], list(results))
    as_written(figure)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


def _axes(count: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * count, 4.3), dpi=150, layout="constrained")
    return figure, figure.subplots(1, count)


def _coverage(axis: Any, result: Calibration, style: dict[str, Any], marker: str) -> None:
    levels, mean, error = (_numpy(v) for v in (result.levels, result.coverage, result.coverage_errors))
    _diagonal(axis)
    axis.plot(levels, mean, marker=marker, markersize=3.5, linewidth=1.5, **style)
    if np.isfinite(error).all():
        axis.fill_between(levels, mean - 2 * error, mean + 2 * error, color=style["color"], alpha=0.2, linewidth=0)


def _histogram(axis: Any, result: Calibration, style: dict[str, Any], bins: int, alone: bool) -> None:
    """Density of the PIT values, each task counted alike, with its standard errors over tasks."""
    pit = _numpy(result.pit).reshape(len(result.pit), -1)
    pit = pit[np.isfinite(pit).any(-1)]
    edges = np.linspace(0.0, 1.0, bins + 1)
    counts = np.stack([np.histogram(each[np.isfinite(each)], edges)[0] / np.isfinite(each).sum() for each in pit])
    density = counts.mean(0) * bins
    axis.axhline(1.0, color=GREY, linewidth=1.0, linestyle="--", zorder=1)
    axis.stairs(density, edges, fill=alone, alpha=0.35 if alone else 1.0, linewidth=1.5, **style)
    if len(pit) > 1:
        error = 2 * bins * counts.std(0, ddof=1) / np.sqrt(len(pit))
        middle = (edges[1:] + edges[:-1]) / 2
        axis.errorbar(middle, density, error, linestyle="none", color=style["color"], linewidth=1.2, capsize=2)
    axis.set_xlim(0.0, 1.0)


def _reliability(axis: Any, diagram: Reliability, style: dict[str, Any], marker: str) -> None:
    _diagonal(axis)
    share, confidence, accuracy, errors = (
        _numpy(v) for v in (diagram.share, diagram.confidence, diagram.accuracy, diagram.errors)
    )
    reach = np.stack([np.minimum(2 * errors, accuracy), np.minimum(2 * errors, 1 - accuracy)])  # shares end at 0 and 1
    axis.errorbar(
        confidence, accuracy, reach.clip(0.0), fmt=marker, markersize=4, linewidth=1.2, capsize=2, zorder=2, **style
    )
    axis.scatter(confidence, accuracy, s=12 + 160 * share, marker=marker, color=style["color"], zorder=3)
    axis.set_xlim(0.0, 1.02)
    axis.set_ylim(0.0, 1.05)


def _diagonal(axis: Any) -> None:
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle="--", zorder=1)


def plot_ranks(result: Any, *, level: float = 0.95, columns: int = 3, path: str | Path | None = None) -> Figure:
    """Draw simulation-based calibration: for each quantity the rank curve less the diagonal, and its band.

    A curve that leaves the band is not uniform. Above the diagonal at the left and below it at the right (∿) the
    posterior is too narrow, the other way round too wide; all above it lies too high, all below too low.

    Args:
        result: what :func:`~bayesmeta.sbc` gives.
        level: of the simultaneous band of each quantity.
        columns: panels in a row.
        path: where to write the picture.

    Returns:
        The matplotlib figure.

    Raises:
        OptionError: for columns below 1, a level outside (0, 1), or another format.
    """
    from matplotlib.figure import Figure

    if columns < 1:
        raise OptionError(f"columns={columns}; expected at least 1.")
    names = list(result.ranks)
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.5 * rows + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low, high = result.band.limits(level)
    z = result.band.points
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.set_visible(False)
            continue
        name = names[place]
        axis.fill_between(z, low - z, high - z, color=GREY, alpha=0.3, linewidth=0)
        axis.axhline(0.0, color=GREY, linewidth=0.8)
        axis.step(z, result.band.curve(result.ranks[name]) - z, where="mid", color=BLUE, linewidth=1.3)
        _finish(axis, f"{name}: {result.findings[name]}", "", "")
        axis.tick_params(labelbottom=True)
    figure.supxlabel(f"share of the ranks (grey: {level:.0%} of calibrated curves)", fontsize=9, color=INK)
    figure.supylabel("rank curve − diagonal", fontsize=9, color=INK)
    as_written(figure)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


# -- shared -------------------------------------------------------------------------------------------------------


def _finish(axis: Any, title: str, x_label: str, y_label: str) -> None:
    axis.set_title(title, fontsize=9.5, color=INK, pad=4)
    axis.set_xlabel(x_label, fontsize=9, color=INK)
    axis.set_ylabel(y_label, fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK, color=GREY, length=3)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def _legend(figure: Any, axis: Any, names: list[str]) -> None:
    """What several results are called. The names are set last: matplotlib would leave out those that begin with _."""
    figure.supxlabel(_TWO_ERRORS, fontsize=8, color=INK)
    if len(names) < 2:
        return
    place = {"loc": "outside upper center", "ncols": min(len(names), 3)}
    legend = figure.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=9, **place)
    for text in legend.get_texts():
        text.set_text(names[int(text.get_text())])


def _numpy(value: Tensor) -> np.ndarray:
    return np.asarray(value.detach().cpu())
