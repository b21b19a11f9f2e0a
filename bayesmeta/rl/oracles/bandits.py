"""What the best policy reaches on a Bernoulli bandit with uniform means, and Gittins indices.

Both are computed, not simulated: the value by a dynamic programme over what can be known, the indices by calibration
against an arm of known mean (J. C. Gittins, "Bandit processes and dynamic allocation indices", JRSS B, 1979; J.
Chakravorty, A. Mahajan, "Multi-armed bandits, Gittins index, and its calculation", 2013, section 2.4: a truncated
horizon and backward induction).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.rl.envs.family import check_at_least

#: What is known of the arms that were pulled: (successes, failures) of each, sorted, since arms are exchangeable.
Known = tuple[tuple[int, int], ...]


def bayes_optimal_bandit_value(arms: int, horizon: int) -> float:
    """Expected total reward of the best policy that does not know the means, p ~ U(0, 1).

    A dynamic programme over the sorted multiset of the arms' counts: arms that were never pulled are alike, so that at
    most ``horizon`` arms count. Exact up to rounding; time and memory grow quickly with the horizon (15 pulls: seconds;
    20: half a minute).

    Args:
        arms: arms.
        horizon: pulls.

    Raises:
        OptionError: for numbers below 1.
    """
    check_at_least(1, arms=arms, horizon=horizon)
    layers: list[set[Known]] = [{()}]
    for _ in range(horizon - 1):
        layers.append({after for known in layers[-1] for _, good, bad in _pulls(known, arms) for after in (good, bad)})
    values: dict[Known, float] = {}
    for layer in reversed(layers):
        values = {known: max(_worth(pull, values) for pull in _pulls(known, arms)) for known in layer}
    return values[()]


def _pulls(known: Known, arms: int) -> Iterator[tuple[float, Known, Known]]:
    """Each arm that can be pulled: its mean, and what is known after a success and after a failure."""
    for index, (won, lost) in enumerate(known):
        if index and known[index - 1] == known[index]:
            continue  # two arms with the same counts are alike
        others = known[:index] + known[index + 1 :]
        mean = (won + 1) / (won + lost + 2)
        yield mean, _with(others, (won + 1, lost)), _with(others, (won, lost + 1))
    if len(known) < arms:
        yield 0.5, _with(known, (1, 0)), _with(known, (0, 1))


def _with(known: Known, arm: tuple[int, int]) -> Known:
    return tuple(sorted((*known, arm)))


def _worth(pull: tuple[float, Known, Known], values: dict[Known, float]) -> float:
    """Of a pull; what comes after the last one is worth nothing."""
    mean, good, bad = pull
    if not values:
        return mean
    return mean * (1 + values[good]) + (1 - mean) * values[bad]


@lru_cache(maxsize=32)
def gittins_indices(discount: float, pulls: int, *, truncation: int | None = None, grid: int = 400) -> Tensor:
    """Gittins indices of Bernoulli arms with Beta posteriors.

    The index of an arm is the mean of a known arm that one would as soon pull for ever. For every mean λ of a grid,
    backward induction from ``truncation`` observations on gives the value of going on with the unknown arm, everywhere
    at once; the index is where going on and λ / (1 − discount) cross, interpolated. At the truncation an arm is taken
    at its mean.

    Args:
        discount: γ in (0, 1).
        pulls: how many observations of an arm the table covers.
        truncation: observations at which an arm counts as known; None takes as many as a discounted reward of 1e-5 of
            the total is away, and at least ``pulls``.
        grid: means λ on [0, 1].

    Returns:
        ``[pulls + 1, pulls + 1]`` float64: entry (s, f) is the index of Beta(1 + s, 1 + f), for s + f ≤ ``pulls``, and
        NaN beyond. Do not change it in place: calls share it.

    Raises:
        OptionError: for a discount outside (0, 1), ``pulls`` below 0, or too small a grid or truncation.
    """
    if not 0 < discount < 1:
        raise OptionError(
            f"discount={discount}; expected a number in (0, 1): an undiscounted problem has no Gittins index."
        )
    check_at_least(0, pulls=pulls)
    check_at_least(3, grid=grid)
    depth = max(pulls, math.ceil(math.log(1e-5) / math.log(discount))) if truncation is None else truncation
    check_at_least(pulls + 1, truncation=depth + 1)
    known = torch.linspace(0, 1, grid, dtype=torch.float64) / (1 - discount)  # worth of the known arm
    table = torch.full((pulls + 1, pulls + 1), torch.nan, dtype=torch.float64)
    won = torch.arange(depth + 2, dtype=torch.float64)
    value = torch.maximum(((won + 1) / (depth + 3) / (1 - discount))[:, None], known)  # after depth + 1 observations
    for seen in range(depth, -1, -1):
        mean = ((won[: seen + 1] + 1) / (seen + 2))[:, None]
        going_on = mean * (1 + discount * value[1 : seen + 2]) + (1 - mean) * discount * value[: seen + 1]
        if seen <= pulls:
            number = torch.arange(seen + 1)
            table[number, seen - number] = _crossing(going_on - known)
        value = torch.maximum(going_on, known)
    return table


@lru_cache(maxsize=8)
def finite_horizon_indices(horizon: int, *, grid: int = 200) -> Tensor:
    """Gittins indices for a known number of pulls that are left, without discounting.

    The index with m pulls left is the mean λ of a known arm that makes one indifferent between it and m pulls of which
    each may be the arm's or, from some time on, the known one's (J. Niño-Mora, "Computing a classic index for
    finite-horizon bandits", INFORMS J. Computing, 2011). Pulling the largest index is optimal for no bandit of several
    arms, but close to it.

    Args:
        horizon: pulls of the whole problem.
        grid: means λ on [0, 1], between which indices are interpolated.

    Returns:
        ``[horizon + 1, horizon, horizon]`` float64: entry (m, s, f) is the index of Beta(1 + s, 1 + f) with m pulls
        left, for s + f ≤ horizon − m, and NaN elsewhere. Do not change it in place: calls share it.

    Raises:
        OptionError: for a horizon below 1 or too small a grid.
    """
    check_at_least(1, horizon=horizon)
    check_at_least(3, grid=grid)
    mean_known = torch.linspace(0, 1, grid, dtype=torch.float64)
    table = torch.full((horizon + 1, horizon, horizon), torch.nan, dtype=torch.float64)
    won = torch.arange(horizon + 1, dtype=torch.float64)
    mean = (won[:, None] + 1) / (won[:, None] + won + 2)
    value = torch.zeros(horizon + 1, horizon + 1, grid, dtype=torch.float64)
    for left in range(1, horizon + 1):
        size = horizon - left + 1  # successes and failures from 0 to horizon − left
        chance = mean[:size, :size, None]
        going_on = chance * (1 + value[1 : size + 1, :size]) + (1 - chance) * value[:size, 1 : size + 1]
        reachable = won[:size, None] + won[:size] <= horizon - left
        table[left, :size, :size] = torch.where(reachable, _crossing(going_on - left * mean_known), torch.nan)
        value = torch.maximum(going_on, left * mean_known)
    return table


def _crossing(excess: Tensor) -> Tensor:
    """Where a decreasing function on an even grid of [0, 1], ``[…, grid]``, is 0, by linear interpolation."""
    grid = excess.shape[-1]
    after = (excess > 0).sum(-1).clamp(1, grid - 1)  # the first point that is not above 0
    high = excess.gather(-1, (after - 1)[..., None]).squeeze(-1)
    low = excess.gather(-1, after[..., None]).squeeze(-1)
    part = torch.where(high > low, high / (high - low), 0.0).clamp(0, 1)
    return (after - 1 + part) / (grid - 1)
