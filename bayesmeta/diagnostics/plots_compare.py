"""Comparisons of methods as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bayesmeta.diagnostics.compare import Comparison
from bayesmeta.diagnostics.plots import BLUE, GREY, INK, ORANGE, as_written, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_compare(result: Comparison, *, path: str | Path | None = None) -> Figure:
    """Draw a comparison: each method's score on the left, its difference from the best one's on the right.

    Bars are ± 2 standard errors over tasks. Only the right panel says which methods differ: the errors on the left
    share what makes tasks hard, and may overlap where the difference is certain. Filled marks are the best and those
    that these tasks cannot tell from it (Holm, 5%).

    Args:
        result: what :func:`~bayesmeta.compare` gives.
        path: where to write the picture; the suffix says in which format (png, pdf, svg).

    Returns:
        The matplotlib figure.

    Raises:
        OptionError: for another format.
    """
    from matplotlib.figure import Figure

    count = len(result.names)
    figure = Figure(figsize=(7.5, 1.5 + 0.34 * count), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    place = np.arange(count)
    columns = (
        (left, result.values, result.standard_errors, BLUE),
        (right, result.differences[:, 0], result.difference_errors[:, 0], ORANGE),
    )
    near = np.isin(np.asarray(result.names), result.not_worse())
    for axis, values, errors, colour in columns:
        mean, error = values.numpy(), errors.numpy()
        axis.errorbar(mean, place, xerr=2 * error, fmt="none", ecolor=colour, elinewidth=1.4, capsize=2.5)
        for keep, face in ((near, colour), (~near, "white")):
            axis.plot(mean[keep], place[keep], "o", markersize=5.5, color=colour, markerfacecolor=face)
        axis.tick_params(labelsize=8, colors=INK, color=GREY, length=3)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    right.axvline(0.0, color=GREY, linewidth=1.0, linestyle="--", zorder=0)
    left.set_yticks(place, result.names, parse_math=False)
    left.set_ylim(count - 0.5, -0.5)
    better = "more" if result.more_is_better else "less"
    left.set_xlabel(f"{result.score} ({better} is better)", fontsize=9, color=INK)
    right.set_xlabel(f"difference from {result.names[0]}, paired", fontsize=9, color=INK)
    figure.suptitle(f"{result.num_tasks} tasks, ± 2 standard errors; filled: not told from the best", fontsize=8.5)
    as_written(figure)
    if path is not None:
        save_figure(figure, Path(path))
    return figure
