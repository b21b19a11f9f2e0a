"""What was earned on the way through trials: the return of each episode, and the curve of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.rollout import Rollout


class TrialReturns(NamedTuple):
    """Rewards of one trial in each environment.

    Attributes:
        total: of the whole trial, ``[num_envs]``.
        episodes: of each episode, ``[num_envs, episodes_per_trial]``.
        lengths: steps of each episode, of that shape.
        extra: what else was kept, summed over each episode, of that shape.
    """

    total: Tensor
    episodes: Tensor
    lengths: Tensor
    extra: dict[str, Tensor]


def trial_returns(rollout: Rollout, episodes: int) -> TrialReturns:
    """Sums over the first trial of each environment, from a rollout that began with it and is long enough.

    Args:
        rollout: from the begin of a trial.
        episodes: of a trial.
    """
    ended = rollout.trial_ended
    inside = torch.cat([torch.zeros_like(ended[:1]), ended[:-1]]).long().cumsum(0) == 0
    which = torch.nn.functional.one_hot(rollout.moments.episode.clamp_max(episodes - 1), episodes)
    which = (which * inside.unsqueeze(-1)).to(rollout.reward.dtype)

    def summed(x: Tensor) -> Tensor:
        return (which * x.to(which.dtype).unsqueeze(-1)).sum(0)

    rewards = summed(rollout.reward)
    return TrialReturns(
        total=rewards.sum(-1),
        episodes=rewards,
        lengths=which.sum(0),
        extra={name: summed(values) for name, values in rollout.extra.items()},
    )


def told_by(env: TaskVectorEnv) -> tuple[str, ...]:
    """Names of what the environment's family tells beside the reward."""
    return tuple(getattr(getattr(env, "family", None), "tells", ()))


def curve_of(found: TrialReturns, env: TaskVectorEnv) -> AdaptationCurve:
    """The return of each episode of a trial, the mean over a task's copies."""

    def by_task(values: Tensor) -> Tensor:
        return values.unflatten(0, (env.num_tasks, env.copies)).mean(1).T

    reached = by_task(found.extra["success"]) if "success" in found.extra else None
    return AdaptationCurve(by_task(found.episodes), "episode", reached, by_task(found.lengths))


def curve_of_trials(rollout: Rollout, env: TaskVectorEnv) -> AdaptationCurve:
    """The curve of a rollout that begins with a trial; see :func:`curve_of`."""
    return curve_of(trial_returns(rollout, env.episodes_per_trial), env)
