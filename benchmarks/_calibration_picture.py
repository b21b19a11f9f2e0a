"""The coverage curves of all methods, a row of panels for each data set: before and after recalibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._calibration_forecasts import LEVELS


def draw(figures: Mapping[str, Mapping[str, Any]], held: Mapping[str, str], path: Path) -> None:
    """Coverage less its level, against the level: 0 is calibrated, below it over-confident.

    Args:
        figures: by data set, method and way of correction.
        held: by data set, the correction that is shown on the right.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shown = {data: found for data, found in figures.items() if found}
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(
            len(shown), 2, figsize=(11, 3.2 * len(shown)), sharex=True, squeeze=False, layout="constrained"
        )
        for (left, right), (data, found) in zip(axes, shown.items(), strict=True):
            best = min(found, key=lambda method: found[method]["validation"]["nll"])
            for axis, way in ((left, "none"), (right, held[data])):
                _panel(axis, found, way, best)
            left.set_title(f"{data}: as trained")
            right.set_title(f"{data}: {held[data]} recalibration")
            left.set_ylabel("coverage − level")
        for axis in axes[-1]:
            axis.set_xlabel("level of the central interval")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _panel(axis: Any, found: Mapping[str, Any], way: str, best: str) -> None:
    """All methods in grey, the best on validation tasks in colour with ± 2 standard errors at 90%; names of the
    outermost at 90%."""
    axis.axhline(0.0, color="black", linewidth=0.8)
    at_90 = {method: ways[way]["coverage90"] - 0.9 for method, ways in found.items()}
    for method, ways in found.items():
        curve = [c - level for c, level in zip(ways[way]["curve"], LEVELS, strict=True)]
        chosen = method == best
        axis.plot(
            LEVELS,
            curve,
            color="tab:blue" if chosen else "0.6",
            linewidth=2.0 if chosen else 0.8,
            zorder=3 if chosen else 2,
            label=f"{method} (best NLL on validation tasks)" if chosen else None,
        )
    error = 2 * found[best][way]["coverage90_error"]
    axis.errorbar([0.9], [at_90[best]], [error], color="tab:blue", capsize=3, zorder=4)
    ordered = sorted(at_90, key=lambda method: at_90[method])
    for method in dict.fromkeys((*ordered[:2], ordered[-1])):
        if method != best:
            place = {"xytext": (4, 0), "textcoords": "offset points"}
            axis.annotate(method, (0.9, at_90[method]), fontsize=7, color="0.3", **place)
    axis.set_xlim(0.0, 1.12)  # room for names
    axis.set_xticks([0.0, 0.25, 0.5, 0.75, 0.9])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower left", fontsize=7, frameon=False)
