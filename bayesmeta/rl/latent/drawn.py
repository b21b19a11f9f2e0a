"""Pictures of beliefs that have no decoder: z itself, or the weights of known tasks, beside the way of the agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesmeta.errors import DataError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.ops.whole import is_whole
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

    Raises:
        OptionError: for an environment that there is not, and ``most`` below 1.
    """
    if not is_whole(env, 0) or env >= path.num_tasks:
        raise OptionError(f"env={env!r}; expected a whole number of 0 to {path.num_tasks - 1}, one of the beliefs.")
    if not is_whole(most, 1):
        raise OptionError(f"most={most!r}; expected a whole number of at least 1.")
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
    """z over the steps of a trial, a panel for each number, mean ± standard deviation, beside the way that led to it.

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
    columns = 1 if len(shown) == 1 else 2
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.4 * plane + 5.6, max(3.0, 1.3 * rows + 0.6)), layout="constrained")
    cells = figure.add_gridspec(rows, columns + plane, width_ratios=[1.3, *[1.0] * columns][1 - plane :])
    if plane:
        _draw_episodes(figure.add_subplot(cells[:, 0]), rollout, env, happened, goal)
    panels = [figure.add_subplot(cells[n // columns, plane + n % columns]) for n in range(len(shown))]
    for n, (axes, number) in enumerate(zip(panels, shown, strict=True)):
        axes.sharex(panels[0])
        axes.tick_params(labelbottom=n + columns >= len(shown))
        _draw_latent(axes, path, env, number, happened)
        for begin in _begins(rollout, env, happened)[1:]:
            axes.axvline(begin, color="0.5", linestyle=":", linewidth=0.9)
        if n + columns >= len(shown):
            axes.set_xlabel("step of the trial", fontsize="small")
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
        ShapeError: for weights of other dimensions, places of another number of tasks, and observations that are no
            positions.
        NonFiniteDataError: for weights that are drawn and not finite.
        DataError: for weights that are drawn and below 0, or 0 of all tasks.
    """
    from matplotlib.figure import Figure

    if weights.ndim != 3:
        raise ShapeError(f"weights have shape {list(weights.shape)}; expected [steps + 1, environments, tasks].")
    _check(rollout, (len(weights) - 1, weights.shape[1]), env)
    if not steps or min(steps) < 0 or max(steps) >= len(weights):
        raise OptionError(f"steps={list(steps)}; expected some of 0 to {len(weights) - 1}.")
    if places.shape != (weights.shape[-1], 2):
        raise ShapeError(
            f"places have shape {list(places.shape)}; expected [{weights.shape[-1]}, 2], one a known task."
        )
    check_weights(weights[list(steps), env])
    columns = min(4, len(steps))
    rows = -(-len(steps) // columns)
    where = places.float().cpu()
    across, up = _sides(where, walked(rollout, env)[0].flatten(0, 1).float().cpu())
    high = 2.6 * min(1.6, max(0.4, (up[1] - up[0]) / (across[1] - across[0])))
    figure = Figure(figsize=(2.9 * columns, (high + 0.4) * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, step in zip(panels, steps, strict=False):
        share = weights[step, env].float().cpu()
        axes.scatter(*where.T.numpy(), s=6, color="0.8", linewidths=0, zorder=1)
        axes.scatter(
            *where.T.numpy(), s=_AREA * share / share.max(), color="#d1495b", alpha=0.6, linewidths=0, zorder=2
        )
        _draw_episodes(axes, rollout, env, step, goal, labels=False)
        tasks = float(torch.distributions.Categorical(share).entropy().exp())
        moment = "before anything" if step == 0 else f"after {step} step{'s' * (step > 1)}"
        axes.set_title(f"{moment}: {tasks:.3g} task{'s' * (tasks >= 1.005)}", fontsize="small")
    panels[0].set(xlim=across, ylim=up)
    finish_panels(panels, len(steps), columns)
    figure.suptitle(title)
    return figure


def check_weights(weights: Tensor) -> None:
    """Refuse what are no weights of tasks, ``[…, tasks]``; they need not add up to 1.

    Raises:
        NonFiniteDataError: for NaN and infinity.
        DataError: for weights below 0, and such as are 0 of all tasks.
    """
    finite = weights.isfinite().all(-1)
    good = finite & (weights >= 0).all(-1) & (weights.sum(-1) > 0)
    if bool(good.all()):
        return
    kind, wrong = (DataError, ~good) if bool(finite.all()) else (NonFiniteDataError, ~finite)
    at = wrong.nonzero()[0].tolist()
    given = ", ".join(f"{x:.4g}" for x in weights[tuple(at)][:6].tolist()) + ", …" * (weights.shape[-1] > 6)
    raise kind(
        f"Weights of tasks at {at} are {given}; expected finite numbers of at least 0 that are not all 0. Give "
        "probabilities, such as those of belief_weights, and not their logarithms."
    )


def _check(rollout: Rollout, of: tuple[int, int], env: int) -> None:
    if rollout.reward.shape != of or not is_whole(env, 0) or env >= of[1]:
        raise OptionError(
            f"env={env} of a rollout of {list(rollout.reward.shape)} steps and environments, and beliefs about "
            f"{of[1]} after {of[0]} steps; expected those of this rollout, and one of them."
        )


def _sides(*places: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Left and right, bottom and top of places ``[…, 2]``, with a margin."""
    every = torch.cat(places)
    low, high = every.min(0).values, every.max(0).values
    margin = 0.12 * float((high - low).max().clamp_min(1e-3))
    left, bottom = (float(x) - margin for x in low)
    right, top = (float(x) + margin for x in high)
    return (left, right), (bottom, top)


def _begins(rollout: Rollout, env: int, steps: int) -> list[int]:
    """At which steps episodes begin."""
    return (rollout.moments.clock[:steps, env] == 0).nonzero().flatten().tolist()


def _draw_latent(axes: Any, path: BeliefPath, env: int, number: int, happened: int) -> None:
    loc, scale = (value[: happened + 1, env, number].float().cpu() for value in (path.loc, path.scale))
    axes.axhspan(-1, 1, color="0.92", zorder=0)
    axes.fill_between(range(happened + 1), loc - scale, loc + scale, color=_LAST, alpha=0.25, linewidth=0)
    axes.plot(range(happened + 1), loc, color=_LAST, linewidth=1.4)
    axes.set_xlim(0, max(1, happened))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(f"z[{number}]", fontsize="small")
    axes.tick_params(labelsize="small")


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
    axes.set_aspect("equal", adjustable="datalim" if labels else "box")
    if labels:
        axes.legend(frameon=False, fontsize="small")
