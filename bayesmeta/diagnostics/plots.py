"""Forecasts of several tasks as one picture. Drawn on a figure of its own: no pyplot, no global backend or style."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.diagnostics.checks import check_batch, check_same_support
from bayesmeta.diagnostics.forecasts import Predictor, check_finite, task_names
from bayesmeta.errors import EmptyTaskError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_POINTS = 200
_PROBABILITIES = (0.05, 0.25, 0.75, 0.95)
BLUE, ORANGE, INK, GREY = "#2a6fb0", "#d9541e", "#222222", "#8a8a8a"
_SUPPORT = {"s": 26, "color": ORANGE, "edgecolors": "white", "linewidths": 0.6, "zorder": 4}
_QUERY = {"s": 12, "facecolors": "none", "edgecolors": INK, "linewidths": 0.7, "zorder": 3}
_CLASS_COLOURS = (ORANGE, BLUE, "#3f9142", "#8e5ea2", "#8c6d31", "#d16ba5", "#17a2a2", "#b5a100", "#6b6b6b", INK)


@torch.no_grad()
def plot_forecast(
    posterior: Posterior,
    batch: TaskBatch,
    *,
    tasks: Sequence[int] | None = None,
    max_panels: int = 12,
    columns: int | None = None,
    num_samples: int = 1000,
    feature: int = 0,
    output: int = 0,
    generator: Seed = None,
    raw_units: bool = True,
    x_label: str = "x",
    y_label: str | None = None,
    share_axes: bool = True,
    path: str | Path | None = None,
) -> Figure:
    """Draw a panel for each task: support, query, predictive mean and central 50% and 90% intervals.

    Of classes it draws the probability of each; of two, that of class 1, with the observations at 0 and 1. With more,
    the observations stand above the lines (support) and below (query) in the colour of their class.

    With one feature the forecast is drawn on a fine grid over the task's inputs; with several, at the task's own
    inputs, joined in the order of ``feature``.

    Args:
        posterior: adapted to ``batch.support``.
        batch: its support and query are drawn; the query may lack y.
        tasks: places of the tasks to draw, counted from 0; by default the first real ones.
        max_panels: at most so many of them.
        columns: panels in a row; by default up to four.
        num_samples: draws, where the forecast has no closed form.
        feature: which feature of x is on the horizontal axis.
        output: which output is drawn, where y has several.
        generator: generator or seed; None means seed 0.
        raw_units: x and y in raw units when the batch has a standardiser.
        x_label, y_label: names of the axes; without the latter, "y", or "probability" for classes.
        share_axes: one range of x and y for all panels, so that tasks compare; otherwise each has its own.
        path: where to write the picture; the suffix says in which format (png, pdf, svg).

    Returns:
        The matplotlib figure.

    Raises:
        OptionError: for a task, feature, output or format that is not there.
        UnsupportedError: for more classes than there are colours.
        EmptyTaskError: when no task to be drawn has an observation.
        ShapeError: for another number of tasks than that of the posterior.
        NonFiniteDataError: for predictions that are not finite, naming the task.
    """
    check_batch(batch)
    check_same_support(posterior, batch)
    chosen = _chosen(batch, tasks, max_panels)
    _check_range("feature", feature, batch.support.num_features)
    observations = _inputs(batch, feature)
    predictor, classes = Predictor(posterior, num_samples, generator), posterior.target_kind == "class"
    bands = (_probabilities if classes else _bands)(predictor, observations, batch, output)
    panels = [_panel(batch, observations, bands, task, feature, output, raw_units, classes) for task in chosen]
    y_label = y_label if y_label is not None else "probability" if classes else "y"
    figure = _figure(panels, columns, x_label, y_label, share_axes)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


# -- numbers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """What is drawn of one task: float64 vectors along its grid, and its observations as pairs of x and y."""

    title: str
    grid: Tensor
    bands: list[Tensor]
    support: tuple[Tensor, Tensor] | None
    query: tuple[Tensor, Tensor] | None
    classes: bool
    joined: bool  # whether the grid is a line in x; with several inputs each point has others of its own


def _check_range(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise OptionError(f"{name}={value}; expected 0 to {count - 1}.")


def _chosen(batch: TaskBatch, tasks: Sequence[int] | None, max_panels: int) -> list[int]:
    """The tasks to draw: those named, or the first real ones that have an observation."""
    if max_panels < 1:
        raise OptionError(f"max_panels={max_panels}; expected at least 1.")
    filled = (batch.support.counts() + batch.query.counts()) > 0
    if tasks is None:
        real = batch.real_tasks()
        chosen = (filled if real is None else filled & real).nonzero().flatten().tolist()
    else:
        chosen = [int(task) for task in tasks]
        for task in chosen:
            _check_range("tasks", task, batch.num_tasks)
    chosen = [task for task in chosen if bool(filled[task])][:max_panels]
    if not chosen:
        raise EmptyTaskError("None of the tasks to draw has an observation, neither support nor query.")
    return chosen


def _inputs(batch: TaskBatch, feature: int) -> Observations:
    """Where each task is predicted, sorted along one feature: x ``[tasks, points, features]``; masked where padded."""
    x = torch.cat([batch.support.x, batch.query.x], 1)
    mask = torch.cat([batch.support.full_mask(), batch.query.full_mask()], 1)
    if x.shape[-1] == 1:
        values = x.squeeze(-1)
        low = torch.where(mask, values, math.inf).amin(-1, keepdim=True)
        high = torch.where(mask, values, -math.inf).amax(-1, keepdim=True)
        some = mask.any(-1, keepdim=True)
        low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
        steps = torch.linspace(0.0, 1.0, GRID_POINTS, dtype=x.dtype, device=x.device)
        return Observations((low + (high - low) * steps).unsqueeze(-1), w=batch.w)
    order = x[..., feature].argsort(dim=-1, stable=True)
    x = x.gather(1, order.unsqueeze(-1).expand(x.shape))
    return Observations(x, None, mask.gather(1, order), batch.w)


def _bands(predictor: Predictor, inputs: Observations, batch: TaskBatch, output: int) -> Tensor:
    """Mean, then the quantiles, ``[1 + quantiles, tasks, points]``, of one output, float64."""
    forecast = predictor.forecast(inputs)
    bands = torch.stack([forecast.mean, *(forecast.quantile(p) for p in _PROBABILITIES)])
    return _one_output(bands, inputs, batch, output)


def _probabilities(predictor: Predictor, inputs: Observations, batch: TaskBatch, output: int) -> Tensor:
    """Probability of each class, ``[classes, tasks, points]``, of one output, float64; of two classes, of class 1."""
    each = predictor.class_forecast(inputs).probabilities.movedim(-1, 0)
    if len(each) > len(_CLASS_COLOURS):
        raise UnsupportedError(
            f"The picture has colours for {len(_CLASS_COLOURS)} classes; this likelihood has {len(each)}. Plot "
            "posterior.class_probabilities(x) yourself."
        )
    return _one_output(each[1:] if len(each) == 2 else each, inputs, batch, output)


def _one_output(bands: Tensor, inputs: Observations, batch: TaskBatch, output: int) -> Tensor:
    outputs = 1 if bands.dim() == 3 else bands.shape[-1]
    _check_range("output", output, outputs)
    bands = bands if bands.dim() == 3 else bands[..., output]
    valid = inputs.full_mask()
    real = batch.real_tasks()
    valid = valid if real is None else valid & real.unsqueeze(-1)
    check_finite(bands.movedim(0, -1), valid, "forecast", task_names(batch))
    return bands


def _panel(
    batch: TaskBatch,
    inputs: Observations,
    bands: Tensor,
    task: int,
    feature: int,
    output: int,
    raw_units: bool,
    classes: bool,
) -> _Panel:
    standardizer = batch.standardizer if raw_units else None

    def axis(x: Tensor) -> Tensor:
        return (x if standardizer is None else standardizer.raw_x(x))[..., feature].double().cpu()

    def target(y: Tensor) -> Tensor:
        if standardizer is not None and not classes:
            y = y * _pick(standardizer.y_scale, output) + _pick(standardizer.y_mean, output)
        return y.double().cpu()

    def dots(observations: Observations) -> tuple[Tensor, Tensor] | None:
        keep = observations.full_mask()[task]
        if observations.y is None or not bool(keep.any()):
            return None
        y = observations.y[task][keep]
        return axis(observations.x[task][keep]), target(y if y.dim() == 1 else y[:, output])

    keep = inputs.full_mask()[task]
    lines = [target(band[task][keep]) for band in bands]
    title = task_names(batch)[task]
    title = title if batch.names is not None else f"task {title}"
    joined = batch.support.num_features == 1
    return _Panel(title, axis(inputs.x[task][keep]), lines, dots(batch.support), dots(batch.query), classes, joined)


def _pick(value: Tensor, output: int) -> Tensor:
    return value if value.dim() == 0 else value[output]


# -- drawing ------------------------------------------------------------------------------------------------------


def _figure(panels: list[_Panel], columns: int | None, x_label: str, y_label: str, share_axes: bool) -> Figure:
    from matplotlib.figure import Figure

    count = len(panels)
    columns = min(4 if columns is None else columns, count)
    if columns < 1:
        raise OptionError(f"columns={columns}; expected at least 1.")
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(2.7 * columns, 4.6) + 0.5, 2.25 * rows + 0.75), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share_axes, sharey=share_axes)
    handles: dict[str, Any] = {}
    for place, axis in enumerate(axes.flat):
        if place >= count:
            axis.set_visible(False)
            continue
        handles |= _draw(axis, panels[place])
        axis.tick_params(labelbottom=True)
    figure.supxlabel(x_label, fontsize=10, color=INK)
    figure.supylabel(y_label, fontsize=10, color=INK)
    entries = len(handles) if figure.get_figwidth() > 6.5 else 3  # two rows where one would be cut off
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=entries, frameon=False, fontsize=9
    )
    as_written(figure)
    return figure


def _draw(axis: Any, panel: _Panel) -> dict[str, Any]:
    """Draw one task; returns what goes into the legend by its label."""
    handles: dict[str, Any] = {}
    several = panel.classes and len(panel.bands) > 1
    for name, dots, style in (("support", panel.support, _SUPPORT), ("query", panel.query, _QUERY)):
        if dots is not None:
            handles[name] = (_rug if several else _dots)(axis, dots, name, style)
    handles |= (_class_lines if panel.classes else _intervals)(axis, panel)
    axis.set_title(panel.title, fontsize=9.5, color=INK, pad=4)
    axis.tick_params(labelsize=8, colors=INK, color=GREY, length=3)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axis.margins(x=0.03)
    return handles


def _dots(axis: Any, dots: tuple[Tensor, Tensor], name: str, style: dict[str, Any]) -> Any:
    return axis.scatter(*(v.numpy() for v in dots), **style)


def _rug(axis: Any, dots: tuple[Tensor, Tensor], name: str, style: dict[str, Any]) -> Any:
    """Observations of several classes, in their colours, above (support) or below (query) the probabilities."""
    x, y = dots
    height = 1.08 if name == "support" else -0.08
    colours = [_CLASS_COLOURS[int(k)] for k in y]
    axis.scatter(x.numpy(), [height] * len(x), marker="o" if name == "support" else "|", c=colours, s=26, zorder=4)
    return axis.scatter([], [], marker="o" if name == "support" else "|", color=GREY, s=26)


def _intervals(axis: Any, panel: _Panel) -> dict[str, Any]:
    """The predictive mean and the intervals around it."""
    x, (mean, low, mid_low, mid_high, high) = panel.grid.numpy(), (band.numpy() for band in panel.bands)
    if not panel.joined:
        return {
            "predictive mean": axis.plot(x, mean, linestyle="none", marker="_", color=BLUE, markersize=8, zorder=2)[0],
            "50% interval": axis.vlines(x, mid_low, mid_high, color=BLUE, alpha=0.5, linewidth=4, zorder=1),
            "90% interval": axis.vlines(x, low, high, color=BLUE, alpha=0.3, linewidth=1.5, zorder=0),
        }
    (line,) = axis.plot(x, mean, color=BLUE, linewidth=1.5, zorder=2)
    return {
        "predictive mean": line,
        "50% interval": axis.fill_between(x, mid_low, mid_high, color=BLUE, alpha=0.38, linewidth=0, zorder=1),
        "90% interval": axis.fill_between(x, low, high, color=BLUE, alpha=0.16, linewidth=0, zorder=0),
    }


def _class_lines(axis: Any, panel: _Panel) -> dict[str, Any]:
    """The probability of each class; of two, of class 1."""
    first = 1 if len(panel.bands) == 1 else 0
    handles = {}
    for k, band in enumerate(panel.bands, first):
        style = {"linewidth": 1.5} if panel.joined else {"linestyle": "none", "marker": "_", "markersize": 8}
        (line,) = axis.plot(panel.grid.numpy(), band.numpy(), color=_CLASS_COLOURS[k], zorder=2, **style)
        handles[f"class {k}"] = line
    return handles


def as_written(figure: Figure) -> None:
    """Have titles, labels and legends drawn as they are written: a name such as ``$a_1$`` is no formula.

    Names of tasks, columns and methods come from outside. Numbers along the axes keep matplotlib's own notation; names
    there take ``parse_math=False`` in ``set_yticks``.
    """
    texts = list(figure.texts)
    for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes)]:
        texts += [] if legend is None else [legend.get_title(), *legend.get_texts()]
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
    for text in texts:
        text.set_parse_math(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all; the suffix says in which format.

    Raises:
        OptionError: for a format that matplotlib does not write.
    """
    suffix = path.suffix.lower().lstrip(".")
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise OptionError(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(sorted(known))}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format=suffix)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
