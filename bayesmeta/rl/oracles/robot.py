"""What can be reached on the sparse point robot: by who knows the goal, and by ideal Thompson sampling.

**Straight to the goal**: each coordinate goes towards it as fast as it may, so that the distance is the least at every
step. No policy gets more.

**Ideal Thompson sampling**: at the begin of an episode a goal is guessed, uniformly among those that are still
possible; the robot goes straight there and stays. What would have given a reward somewhere on the way, and gave none,
is excluded. Who has met a reward knows the goal from the next episode on, since rewards say how far away it is from
several places. A belief that is carried exactly cannot do better under this rule; a policy that plans with its belief
can, as it need not stay at a guess that has failed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.envs.points import SparsePointRobot


def half_circle(points: int = 400) -> Tensor:
    """Goals spread evenly over the half circle, ``[points, 2]``.

    Args:
        points: how many, at least 1.

    Raises:
        OptionError: for fewer.
    """
    if not is_whole(points, 1):
        raise OptionError(f"points must be a whole number, at least 1; got {points!r}.")
    angle = (torch.arange(points) + 0.5) / points * math.pi
    return torch.stack([angle.cos(), angle.sin()], -1)


def straight_returns(family: SparsePointRobot, goals: Tensor) -> Tensor:
    """Return of an episode that goes straight to a known goal, ``[n]``.

    Args:
        family: of the environments.
        goals: ``[n, 2]``.

    Raises:
        ShapeError: for goals of another shape.
    """
    return _rewards(family, _way(family, goals), goals).sum(-1)


def thompson_returns(
    family: SparsePointRobot,
    goals: Tensor,
    episodes: int,
    *,
    candidates: Tensor | None = None,
    generator: Seed = None,
) -> Tensor:
    """Returns of ideal Thompson sampling, ``[episodes, n]``, one trial for each goal.

    Args:
        family: of the environments.
        goals: ``[n, 2]``; repeat them for more trials.
        episodes: of a trial.
        candidates: goals under the prior, ``[m, 2]``; None: 400 on the half circle. Where all of them are excluded
            (the goal stands between two), all are possible again.
        generator: of the guesses; None means seed 0.

    Raises:
        ShapeError: for goals of another shape.
        OptionError: for fewer than one episode.
    """
    if not is_whole(episodes, 1):
        raise OptionError(f"episodes must be a whole number, at least 1; got {episodes!r}.")
    candidates = half_circle().to(goals) if candidates is None else candidates
    generator = as_generator(generator, goals.device, "thompson")
    ways = _way(family, candidates)  # [m, time, 2]
    seen = _rewards(family, ways.unsqueeze(1), candidates).gt(0).any(-1)  # [m, m]: which a guess would have met
    known = straight_returns(family, goals)
    possible = torch.ones(len(goals), len(candidates), dtype=torch.bool, device=goals.device)
    found = torch.zeros(len(goals), dtype=torch.bool, device=goals.device)
    returns = []
    for _ in range(episodes):
        weights = torch.where(possible.any(-1, keepdim=True), possible, True).to(goals.dtype)
        guess = torch.multinomial(weights, 1, generator=generator).squeeze(-1)
        gained = _rewards(family, ways[guess], goals).sum(-1)
        returns.append(torch.where(found, known, gained))
        possible &= ~seen[guess]
        found |= gained > 0
    return torch.stack(returns)


def _way(family: SparsePointRobot, goals: Tensor) -> Tensor:
    """Where one is after each step on the straight way from the start, ``[n, time, 2]``."""
    if goals.dim() != 2 or goals.shape[-1] != 2:
        raise ShapeError(f"goals has shape {list(goals.shape)}; expected [n, 2].")
    time = torch.arange(1, family.horizon + 1, device=goals.device, dtype=goals.dtype).unsqueeze(-1)
    reach = family.max_step * time
    return goals.unsqueeze(1).clamp(-reach, reach)


def _rewards(family: SparsePointRobot, way: Tensor, goals: Tensor) -> Tensor:
    """The sparse rewards on ways ``[…, n, time, 2]`` to goals ``[n, 2]``, ``[…, n, time]``."""
    distance = (way - goals.unsqueeze(-2)).norm(dim=-1)
    return torch.where(distance <= family.radius, 1 - distance, 0.0)
