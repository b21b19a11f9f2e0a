"""Pictures of beliefs that have no decoder: z itself, or the weights of known tasks, beside the way of the agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.pictures import finish_panels, walked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesmeta.rl.rollout import Rollout

#: Numbers of z that are drawn; of more, those that were learned most about.
SHOWN = 6
_FIRST, _LAST, _GOAL = "#f2a65a", "#1d3557", "#2a7f3f"
#: Area of a dot that has all the weight, in points².
_AREA = 260.0


def learned_most(path: BeliefPath, env: int, most: int = SHOWN) -> list[int]:
    """Which numbers of z have contracted most after the last step about one environment's task, in their own order.

    Args:
        path: beliefs about some tasks.
        env: about which.
        most: how many at most.
    """
    contraction = 1.0 - path.scale[-1, env].square()
    return sorted(contraction.argsort(descending=True, stable=True)[:most].tolist())


def plot_latents(
    path: BeliefPath,
    rollout: Rollout,
    *,
    env: int = 0,
    goal: Tensor | None = None,
    latents: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """z over the steps of a trial, mean ± standard deviation, beside the way that led to it.

    For beliefs without a decoder, of which nothing can be said but where z is. The grey band is the prior, 0 ± 1;
    dotted lines are where episodes begin. The way stands beside it where observations are two numbers.

    Args:
        path: beliefs about the environments of a rollout.
        rollout: what happened.
        env: which environment.
        goal: the truth, ``[2]``, drawn as a star beside the way.
        latents: which numbers of z; None: those that were learned most about, six at most.
        title: above.

    Raises:
        OptionError: for beliefs about another rollout, an environment or a number of z that there is not.
    """
    from matplotlib.figure import Figure

    _check(rollout, (path.steps, path.num_tasks), env)
    shown = learned_most(path, env) if latents is None else list(latents)
    if not shown or min(shown) < 0 or max(shown) >= path.loc.shape[-1]:
        raise OptionError(f"latents={shown}; expected some of 0 to {path.loc.shape[-1] - 1}.")
    happened = int(path.context.full_mask()[env].sum())
    plane = rollout.successor.shape[2:] == (2,)
    figure = Figure(figsize=(9.6 if plane else 6.4, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(1, 1.5)) if plane else [figure.subplots()]
    if plane:
        _draw_episodes(panels[0], rollout, env, happened, goal)
    _draw_latents(panels[-1], path, env, shown, happened)
    for begin in _begins(rollout, env, happened)[1:]:
        panels[-1].axvline(begin, color="0.5", linestyle=":", linewidth=0.9)
    figure.suptitle(title)
    return figure


def plot_weights(
    weights: Tensor,
    places: Tensor,
    rollout: Rollout,
    *,
    steps: Sequence[int],
    env: int = 0,
    goal: Tensor | None = None,
    title: str = "",
) -> Figure:
    """The weights of known tasks in a mixture belief, as dots where these tasks have their goals, beside the way.

    A dot's area is its task's weight, as a share of the largest weight of its panel; the panel's title says how many
    tasks the belief is spread over (the exponential of its entropy).

    Args:
        weights: after 0, 1, … transitions, ``[N + 1, environments, tasks]``, such as ``MixtureContext.weights``.
        places: goals of the known tasks, ``[tasks, 2]``.
        rollout: what happened.
        steps: numbers of transitions, of 0 to N, one panel each.
        env: which environment.
        goal: the truth, ``[2]``, drawn as a star.
        title: above.

    Raises:
        OptionError: for no step or one that there is not, and weights of another rollout or environment.
        ShapeError: for places of another number of tasks, and observations that are no positions.
    """
    from matplotlib.figure import Figure

    _check(rollout, (len(weights) - 1, weights.shape[1]), env)
    if not steps or min(steps) < 0 or max(steps) >= len(weights):
        raise OptionError(f"steps={list(steps)}; expected some of 0 to {len(weights) - 1}.")
    if places.shape != (weights.shape[-1], 2):
        raise ShapeError(
            f"places have shape {list(places.shape)}; expected [{weights.shape[-1]}, 2], one a known task."
        )
    columns = min(4, len(steps))
    rows = -(-len(steps) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.9 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    where = places.float().cpu()
    for axes, step in zip(panels, steps, strict=False):
        share = weights[step, env].float().cpu()
        axes.scatter(*where.T.numpy(), s=6, color="0.8", linewidths=0, zorder=1)
        axes.scatter(
            *where.T.numpy(), s=_AREA * share / share.max(), color="#d1495b", alpha=0.6, linewidths=0, zorder=2
        )
        _draw_episodes(axes, rollout, env, step, goal, labels=False)
        tasks = float(torch.distributions.Categorical(share).entropy().exp())
        moment = "before anything" if step == 0 else f"after {step} step{'s' * (step > 1)}"
        axes.set_title(f"{moment}: {tasks:.3g} tasks", fontsize="small")
    finish_panels(panels, len(steps), columns)
    figure.suptitle(title)
    return figure


def _check(rollout: Rollout, of: tuple[int, int], env: int) -> None:
    if rollout.reward.shape != of or not 0 <= env < of[1]:
        raise OptionError(
            f"env={env} of a rollout of {list(rollout.reward.shape)} steps and environments, and beliefs about "
            f"{of[1]} after {of[0]} steps; expected those of this rollout, and one of them."
        )


def _begins(rollout: Rollout, env: int, steps: int) -> list[int]:
    """At which steps episodes begin."""
    return (rollout.moments.clock[:steps, env] == 0).nonzero().flatten().tolist()


def _draw_latents(axes: Any, path: BeliefPath, env: int, shown: Sequence[int], happened: int) -> None:
    import matplotlib

    axes.axhspan(-1, 1, color="0.93", zorder=0)
    at = range(happened + 1)
    loc, scale = (value[: happened + 1, env].float().cpu() for value in (path.loc, path.scale))
    for index, number in enumerate(shown):
        colour = matplotlib.colormaps["tab10"](index % 10)
        low, high = ((loc + sign * scale)[:, number].numpy() for sign in (-1, 1))
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(at, loc[:, number].numpy(), color=colour, linewidth=1.4, label=f"z[{number}]")
    axes.set_xlim(0, max(1, happened))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step of the trial")
    axes.set_ylabel("z: mean ± standard deviation")
    axes.legend(frameon=False, fontsize="small", ncols=2)


def _draw_episodes(
    axes: Any, rollout: Rollout, env: int, steps: int, goal: Tensor | None, *, labels: bool = True
) -> None:
    """The way of one environment, each episode a line from light to dark, where it is, and the goal."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("episodes", (_FIRST, _LAST))
    places = walked(rollout, env)[0].float().cpu()
    all_begins, begins = _begins(rollout, env, len(places)), _begins(rollout, env, steps)
    for number, begin in enumerate(begins):
        end = begins[number + 1] if number + 1 < len(begins) else steps
        way = torch.cat([places[begin : begin + 1, 0], places[begin:end, 1]])
        colour = scale(number / max(1, len(all_begins) - 1))
        ends = number in (0, len(begins) - 1)  # a legend of ten episodes says no more than its first and last line
        label = f"episode {number + 1}" if labels and (ends or len(begins) <= 4) else None
        axes.plot(*way.T.numpy(), color=colour, marker=".", markersize=3, linewidth=1.1, label=label, zorder=3)
    now = places[steps - 1, 1] if steps else places[0, 0]
    axes.plot(*now.unsqueeze(1).numpy(), marker="o", markersize=6, color=_LAST, linestyle="", zorder=4)
    if goal is not None:
        axes.plot(
            *goal.float().cpu().unsqueeze(1).numpy(), marker="*", markersize=14, color=_GOAL, linestyle="", zorder=5
        )
    axes.set_aspect("equal")
    if labels:
        axes.legend(frameon=False, fontsize="small")
