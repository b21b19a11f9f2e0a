"""Pictures of a meta-RL run: what training brought, and what the learner does on a few tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bayesmeta.errors import OptionError
from bayesmeta.rl.envs import Grid, Navigation, SparsePointRobot
from bayesmeta.rl.watching import Watching

if TYPE_CHECKING:
    from bayesmeta.rl.learner import AdaptationCurve
    from bayesmeta.rl.reference_policies import Reference

#: From the first point of the adaptation to the last, light to dark.
_COLOURS = ("#f2a65a", "#d1495b", "#7b2d5b", "#1d3557")
_GOAL = "#2a7f3f"
#: From the first of a grid's ways to the last, in cells.
_APART = 0.4


def _colour(point: int, points: int) -> Any:
    """One of a scale from light to dark, however many points there are."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("points", _COLOURS)(point / max(1, points - 1))


def point_name(unit: str, point: int) -> str:
    """A point of the adaptation in words."""
    if unit == "episode":
        return f"episode {point + 1}"
    return "before adaptation" if point == 0 else f"after {point} step{'s' * (point > 1)}"


def plot_learning_curve(
    curves: Sequence[dict[str, float]], *, unit: str, lines: dict[str, float] | None = None, title: str = ""
) -> Any:
    """Return on validation tasks as training goes on, one line a point of the adaptation, with two standard errors.

    Args:
        curves: as in :attr:`bayesmeta.rl.FitResult.curves`.
        unit: ``"episode"`` or ``"step"``.
        lines: further returns by name, drawn across, such as an optimum.
        title: above.

    Returns:
        The matplotlib figure.

    Raises:
        OptionError: without curves.
    """
    from matplotlib.figure import Figure

    if not curves:
        raise OptionError("There are no curves to draw: train with validation tasks.")
    names = [name for name in curves[-1] if name.startswith("return_") and not name.endswith("_se")]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    at = [row["step"] for row in curves]
    for point, name in enumerate(names):
        mean = torch.tensor([row[name] for row in curves])
        error = torch.tensor([row.get(f"{name}_se", 0.0) for row in curves])
        colour = _colour(point, len(names))
        # the later, the narrower and the more broken: of curves that coincide, all are seen
        wide, style = 1.4 + 2.0 * (len(names) - 1 - point) / max(1, len(names) - 1), ("-", (0, (5, 2)))[point % 2]
        axes.plot(at, mean, color=colour, linewidth=wide, linestyle=style, label=point_name(unit, point))
        axes.fill_between(at, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, linewidth=0)
    for number, (name, value) in enumerate((lines or {}).items()):
        style = ("--", ":", "-.")[number % 3]
        axes.axhline(value, color="0.35", linestyle=style, linewidth=1, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("iteration")
    axes.set_ylabel("return on validation tasks (± 2 standard errors)")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize="small")
    return figure


def plot_adaptation(
    curve: AdaptationCurve, references: Sequence[Reference] = (), *, name: str = "learner", title: str = ""
) -> Any:
    """What adaptation brings on some tasks, beside references on the same ones.

    Those that learn within a trial have a curve of their own: beside a learner that takes gradient steps, it is the
    episode in which nothing is known yet. The others, random ones and those that know the task, are lines across.

    Args:
        curve: of the learner, drawn with two standard errors.
        references: see :func:`bayesmeta.rl.references`.
        name: of the learner.
        title: above.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    mean, error = torch.tensor(curve.mean()), torch.tensor(curve.standard_error()).nan_to_num()
    at = torch.arange(len(mean))
    axes.fill_between(at, mean - 2 * error, mean + 2 * error, color=_COLOURS[-1], alpha=0.2, linewidth=0)
    axes.plot(at, mean, color=_COLOURS[-1], marker="o", linewidth=2, label=f"{name} (± 2 standard errors)")
    for number, reference in enumerate(references):
        colour, means = f"C{number % 10}", reference.curve.mean()
        if reference.learns:
            shown = means if curve.unit == "episode" else means[:1]
            axes.plot(shown, color=colour, marker=".", linewidth=1, label=reference.label)
        else:
            style = "--" if reference.knows_task else ":"
            axes.axhline(sum(means) / len(means), color=colour, linestyle=style, linewidth=1, label=reference.label)
    axes.set_xticks(at, [point_name(curve.unit, point).replace(" adaptation", "") for point in range(len(mean))])
    axes.set_ylabel("return on test tasks")
    axes.set_title(title)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def plot_trajectories(watching: Watching, *, title: str = "") -> Any:
    """What a learner does on a few tasks: paths in the plane beside the goal, or the rewards in time.

    Around the paths stand the start and the goal, the disc of the sparse reward of the families of points with the half
    circle of the sparse point robot's goals, and the cells of the grid. In the grid, ways are drawn a little apart, so
    that points of the adaptation that go the same way are all seen.

    Args:
        watching: see :func:`bayesmeta.rl.watch`; drawn as paths where tasks have a ``goal`` and observations two
            numbers.
        title: above.

    Returns:
        The matplotlib figure, with a panel for each task.
    """
    from matplotlib.figure import Figure

    tasks = len(watching.paths)
    goal = watching.tasks.get("goal")
    plane = goal is not None and goal.shape[1:] == (2,) and watching.paths[0][0].shape[1:] == (2,)
    columns = min(3, tasks)
    rows = -(-tasks // columns)
    high = 0.62 if isinstance(watching.family, SparsePointRobot) else 1.0  # a half plane has low panels
    figure = Figure(figsize=(3.0 * columns, (2.8 * high + 0.2) * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for task in range(tasks):
        axes = panels[task // columns][task % columns]
        lowest = task + columns >= tasks  # of its column
        axes.tick_params(labelbottom=lowest)
        if plane:
            _draw_paths(axes, watching, task)
        else:
            points = len(watching.rewards[task])
            for point, rewards in enumerate(watching.rewards[task]):
                axes.plot(rewards.cumsum(0), color=_colour(point, points), label=point_name(watching.unit, point))
            if lowest:
                axes.set_xlabel("step of the episode")
            if task % columns == 0:
                axes.set_ylabel("reward so far")
        axes.set_title(f"task {task}", fontsize="small")
    for empty in range(tasks, rows * columns):
        panels[empty // columns][empty % columns].set_axis_off()
    figure.suptitle(title)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize="small")
    return figure


def _draw_paths(axes: Any, watching: Watching, task: int) -> None:
    """The paths of one task in the plane, the start and the goal."""
    points = len(watching.paths[task])
    grid = isinstance(watching.family, Grid)
    for point, path in enumerate(watching.paths[task]):
        apart = _APART * (point - (points - 1) / 2) / max(1, points - 1) if grid else 0.0
        x, y = path.float().T + apart
        style = {"color": _colour(point, points), "label": point_name(watching.unit, point)}
        axes.plot(x, y, marker=".", markersize=3, linewidth=1.2, alpha=0.9, **style)
    goal = watching.tasks["goal"][task].float().cpu()
    axes.plot(*goal.unsqueeze(1), marker="*", markersize=14, color=_GOAL, linestyle="", zorder=1.5)
    start = watching.paths[task][0][0].float()
    axes.plot(*start.unsqueeze(1), marker="o", markersize=9, color="0.3", fillstyle="none", linestyle="", zorder=1.5)
    _draw_around(axes, watching.family, goal)
    axes.set_aspect("equal")


def _draw_around(axes: Any, family: Any, goal: torch.Tensor) -> None:
    """What a family has in the plane: cells; or where the sparse reward is, and where goals can be."""
    from matplotlib.patches import Arc, Circle

    if isinstance(family, Grid):
        ends = (-0.5, family.cells - 0.5)
        for edge in range(family.cells + 1):
            axes.plot(ends, (edge - 0.5, edge - 0.5), color="0.85", linewidth=0.8, zorder=0.5)
            axes.plot((edge - 0.5, edge - 0.5), ends, color="0.85", linewidth=0.8, zorder=0.5)
        axes.set_xticks(range(family.cells))
        axes.set_yticks(range(family.cells))
    elif isinstance(family, Navigation | SparsePointRobot):
        axes.add_patch(Circle(goal.tolist(), family.radius, color=_GOAL, alpha=0.15, linewidth=0, zorder=0.5))
        if isinstance(family, SparsePointRobot):
            axes.add_patch(Arc((0, 0), 2, 2, theta1=0, theta2=180, color="0.6", linestyle=":", zorder=0.6))
            axes.set_xlim(min(axes.get_xlim()[0], -1.3), max(axes.get_xlim()[1], 1.3))
            axes.set_ylim(min(axes.get_ylim()[0], -0.3), max(axes.get_ylim()[1], 1.3))
