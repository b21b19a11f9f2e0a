"""What ``bayesmeta rl evaluate`` says and draws of a belief that is a mixture of known tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesmeta.rl.latent.drawn import check_weights, plot_weights
from bayesmeta.rl.learner import standard_error
from bayesmeta.rl.rollout import Rollout


def spread_over(weights: Tensor) -> Tensor:
    """How many tasks weights ``[…, tasks]`` are spread over, the exponential of their entropy in nats, ``[…]``.

    Raises:
        NonFiniteDataError, DataError: for weights that are not finite, below 0, or 0 of all tasks.
    """
    check_weights(weights)
    return torch.distributions.Categorical(weights).entropy().exp()


def goals_of(env: Any) -> Tensor | None:
    """Goals of an environment's tasks in a plane, ``[tasks, 2]``; None where there is no plane."""
    goal: Tensor | None = getattr(env.tasks, "goal", None)
    plane = goal is not None and goal.shape[1:] == (2,) and env.single_observation_space.shape == (2,)
    return goal if plane else None


def evaluate_weights(
    learner: Any,
    env: Any,
    *,
    ends: Callable[[Tensor, Rollout, int], Tensor],
    shown: Callable[[list[int]], list[int]],
    seed: int,
    file: Path,
    title: str = "",
) -> dict[str, Any]:
    """The weights of the training tasks on the way through a trial: over how many they are spread, and a picture.

    Args:
        learner: with ``belief_weights``, such as :class:`~bayesmeta.rl.DistilledLatents`, and its training ``env``.
        env: of test tasks. It is reset.
        ends: from which steps count ``[steps, envs]``, a rollout and the episodes of a trial to the steps at which
            episodes are over, ``[episodes + 1, envs]``.
        shown: from these steps of one environment to those that are drawn.
        seed: of actions and latents.
        file: of the picture, which is made where the environment is a plane.
        title: above it.

    Returns:
        ``spread_over_tasks`` before anything and after each episode, means over tasks, with ``_standard_error``;
        ``files``, the names of those that were written.
    """
    from bayesmeta.diagnostics.plots import save_figure

    weights, rollout = learner.belief_weights(env, generator=seed)
    happened = learner.belief_spec.of_rollout(rollout).full_mask().T
    over = ends(happened, rollout, env.episodes_per_trial)
    each = rollout.by_task(spread_over(weights).gather(0, over)).mean(2)
    result: dict[str, Any] = {
        "spread_over_tasks": [float(x) for x in each.mean(1)],
        "spread_over_tasks_standard_error": standard_error(each),
        "files": [],
    }
    known, goal = goals_of(learner.env), goals_of(env)
    if known is not None and goal is not None:
        figure = plot_weights(weights, known, rollout, steps=shown(over[:, 0].tolist()), goal=goal[0], title=title)
        save_figure(figure, file)
        result["files"].append(file.name)
    return result
