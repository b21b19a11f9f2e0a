"""Pictures of a belief in environments of the plane: where reward is expected, beside where the agent has been."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.ops.random import Seed
from bayesmeta.rl.envs.grid import Grid
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.checks import expected_reward, goal_probabilities, position_rows
from bayesmeta.rl.latent.contexts import ContextSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesmeta.rl.rollout import Rollout


def belief_maps(
    path: BeliefPath,
    spec: ContextSpec,
    points: Tensor,
    steps: Sequence[int],
    *,
    family: Grid | None = None,
    num_samples: int = 200,
    generator: Seed = None,
) -> Tensor:
    """What a belief says of places at some steps, ``[steps, tasks, points]``: the mean over draws of z.

    Args:
        path: beliefs about some tasks.
        spec: of their contexts.
        points: places, ``[points, 2]``, asked about as in :func:`~bayesmeta.rl.latent.checks.position_rows`.
        steps: numbers of transitions, of 0 to N.
        family: of a grid, whose rewards then become probabilities of the goal, and ``points`` are its cells.
        num_samples: draws of z.
        generator: generator or seed; None means seed 0.
    """
    maps = []
    for step in steps:
        z = path.at(step).draws(num_samples, generator).u
        if family is not None:
            maps.append(goal_probabilities(path.program, spec, z, family))
        else:
            maps.append(expected_reward(path.program, spec, z, position_rows(spec, points.to(z))).mean(0))
    return torch.stack(maps)


def walked(rollout: Rollout, env: int) -> tuple[Tensor, Tensor]:
    """Where one environment has been: places ``[steps, 2, 2]``, from and to, and whether an episode begins there.

    Args:
        rollout: whose observations have the position as their first two numbers.
        env: which environment.

    Raises:
        ShapeError: for observations that are no positions.
    """
    places = torch.stack([rollout.moments.observation[:, env], rollout.successor[:, env]], 1)
    if places.dim() != 3 or places.shape[-1] < 2:
        raise ShapeError(
            f"Observations of shape {list(rollout.successor.shape[2:])} are no positions in the plane; expected two "
            "numbers or more, the first two of which are drawn."
        )
    return places[..., :2], rollout.moments.clock[:, env] == 0


def plot_beliefs(
    path: BeliefPath,
    spec: ContextSpec,
    rollout: Rollout,
    *,
    steps: Sequence[int],
    env: int = 0,
    family: Grid | None = None,
    extent: tuple[float, float, float, float] | None = None,
    resolution: int = 41,
    goal: Tensor | None = None,
    num_samples: int = 200,
    generator: Seed = None,
    title: str = "",
) -> Figure:
    """A belief beside the way that led to it, one panel for each step.

    The colour is the mean predicted reward of being at a place, or on a grid the probability that the goal is there;
    the line is where the agent has been, the dot where it is.

    Args:
        path: beliefs about the environments of a rollout, ``BeliefPath.of(latent, spec.of_rollout(rollout), …)``.
        spec: of its contexts.
        rollout: what happened.
        steps: numbers of transitions, of 0 to N.
        env: which environment.
        family: of a grid: its cells are drawn.
        extent: of what is drawn otherwise: left, right, bottom, top.
        resolution: places along each side.
        goal: the truth, ``[2]``, drawn as a star.
        num_samples: draws of z.
        generator: generator or seed; None means seed 0.
        title: above.

    Raises:
        OptionError: for no step or one that there is not, another environment, neither a grid nor an extent, and
            a resolution below 2.
        ShapeError: for observations that are no positions; :func:`bayesmeta.rl.plot_latents` draws z itself.
    """
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    _check(path, rollout, steps, env, family, extent, resolution)
    places, begins = walked(rollout, env)
    points, count, sides = _places(family, extent, resolution)
    few = path.tasks([env])
    maps = belief_maps(few, spec, points, steps, family=family, num_samples=num_samples, generator=generator)[:, 0]
    maps = maps.cpu()
    columns = min(4, len(steps))
    rows = -(-len(steps) // columns)
    high = 2.5 * min(1.6, max(0.4, (sides[3] - sides[2]) / (sides[1] - sides[0])))  # a half plane has low panels
    figure = Figure(figsize=(2.7 * columns + 1.0, (high + 0.3) * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    scale = Normalize(float(maps.min()), float(maps.max()))
    if family is not None:  # so that one cell of 1 does not hide what is between 0 and a tenth
        scale = PowerNorm(0.4, 0.0, float(maps.max()))
    for axes, step, values in zip(panels, steps, maps, strict=False):
        drawn = axes.imshow(
            values.unflatten(0, (count, count)).T.numpy(), origin="lower", extent=sides, aspect="equal", norm=scale,
            cmap="viridis", interpolation="bilinear" if family is None else "nearest",
        )  # fmt: skip
        _draw_way(axes, places[:step].float().cpu(), begins[:step].cpu(), places[0, 0].float().cpu())
        if goal is not None:
            axes.plot(
                *goal.float().cpu().unsqueeze(1).numpy(), marker="*", markersize=12, color="#ff6b9d", linestyle=""
            )
        axes.set_title("before anything" if step == 0 else f"after {step} step{'s' * (step > 1)}", fontsize="small")
    finish_panels(panels, len(steps), columns)
    name = "probability of the goal" if family is not None else "mean predicted reward"
    figure.colorbar(drawn, ax=list(panels), label=name, shrink=0.9)
    figure.suptitle(title)
    return figure


def finish_panels(panels: Any, used: int, columns: int) -> None:
    """Leave out the panels behind the last that is used; the lowest of each column has the numbers of its axis.

    Args:
        panels: row by row.
        used: how many.
        columns: of a row.
    """
    for number, axes in enumerate(panels):
        if number >= used:
            axes.set_axis_off()
        elif number + columns >= used:
            axes.tick_params(labelbottom=True)


def _places(
    family: Grid | None, extent: tuple[float, float, float, float] | None, resolution: int
) -> tuple[Tensor, int, tuple[float, float, float, float]]:
    """What is asked about: places ``[count², 2]``, x by x, how many along a side, and what they cover."""
    if family is not None:
        end = family.cells - 0.5
        return torch.cartesian_prod(*[torch.arange(float(family.cells))] * 2), family.cells, (-0.5, end, -0.5, end)
    assert extent is not None
    left, right, bottom, top = extent
    points = torch.cartesian_prod(torch.linspace(left, right, resolution), torch.linspace(bottom, top, resolution))
    across, up = (0.5 * side / (resolution - 1) for side in (right - left, top - bottom))  # half of a pixel each
    return points, resolution, (left - across, right + across, bottom - up, top + up)


def _check(
    path: BeliefPath,
    rollout: Rollout,
    steps: Sequence[int],
    env: int,
    family: Grid | None,
    extent: tuple[float, float, float, float] | None,
    resolution: int,
) -> None:
    if not steps or min(steps) < 0 or max(steps) > path.steps:
        raise OptionError(f"steps={list(steps)}; expected some of 0 to {path.steps}.")
    if rollout.reward.shape != (path.steps, path.num_tasks) or not 0 <= env < path.num_tasks:
        raise OptionError(
            f"env={env} of a rollout of {list(rollout.reward.shape)} steps and environments, and beliefs about "
            f"{path.num_tasks} after {path.steps} steps; expected those of this rollout, and one of them."
        )
    if resolution < 2:
        raise OptionError(f"resolution={resolution}; expected at least 2 places along a side.")
    if (family is None) == (extent is None):
        raise OptionError(
            "Give family= of a grid, or extent=(left, right, bottom, top) of another plane; one of them. Where "
            "environments are no plane, bm.rl.plot_latents draws z itself."
        )


def _draw_way(axes: object, places: Tensor, begins: Tensor, start: Tensor) -> None:
    """Each episode as a line of its own, the last one strong, and a dot where the agent is."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    first = begins.nonzero().flatten().tolist() if len(places) else []
    for number, begin in enumerate(first):
        end = first[number + 1] if number + 1 < len(first) else len(places)
        way = torch.cat([places[begin : begin + 1, 0], places[begin:end, 1]])
        last = number + 1 == len(first)
        axes.plot(*way.T.numpy(), color="white", linewidth=1.8 if last else 0.8, alpha=0.95 if last else 0.4)
    now = places[-1, 1] if len(places) else start
    axes.plot(
        *now.unsqueeze(1).numpy(), marker="o", markersize=7, color="#d1495b", markeredgecolor="white", linestyle=""
    )
