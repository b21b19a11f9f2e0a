"""Schedules of the learning rate, as the factories that ``fit(schedule=…)`` takes.

Each multiplies the optimizer's own rate. The multiplier at ``step`` (counted from 0) is that of the step taken after
``step`` others. A schedule goes on bit for bit in a resumed run, and refuses a run that had another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from bayesmeta.errors import CheckpointError, OptionError

__all__ = ["Factory", "Schedule", "cosine", "linear_fall", "step_decay"]


@dataclass(frozen=True)
class Factory:
    """What the functions of this module return: called with an optimizer it makes the schedule."""

    def __call__(self, optimizer: torch.optim.Optimizer) -> Schedule:
        """The schedule for an optimizer."""
        return Schedule(optimizer, self)

    def multiplier(self, step: int) -> float:
        """What the rate is multiplied with after ``step`` steps, to look at or to plot."""
        raise NotImplementedError


class Schedule(LambdaLR):
    """A torch schedule that knows its options and compares them on loading.

    Args:
        optimizer: whose rates it sets.
        factory: what made it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factory: Factory) -> None:
        self.options = {"kind": type(factory).__name__.strip("_"), **asdict(factory)}  # torch puts it into the state
        super().__init__(optimizer, factory.multiplier)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a schedule of the same options was.

        Raises:
            CheckpointError: for the state of another schedule, or of other options.
        """
        if state_dict.get("options") != self.options:
            raise CheckpointError(
                f"The state is of a schedule {state_dict.get('options', 'of another class')}, and here it is "
                f"{self.options}. Give the schedule of that run: it does not stretch when a run is made longer."
            )
        super().load_state_dict(state_dict)


@dataclass(frozen=True)
class _Cosine(Factory):
    steps: int
    warmup: int
    final: float

    def multiplier(self, step: int) -> float:
        """Up a line, then down half a cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class _LinearFall(Factory):
    steps: int
    last: float

    def multiplier(self, step: int) -> float:
        """1, then down a line."""
        return min(1.0, max(0.0, (self.steps - step) / (self.last * self.steps)))


@dataclass(frozen=True)
class _StepDecay(Factory):
    at: int | list[int]
    factor: float

    def multiplier(self, step: int) -> float:
        """A power of the factor."""
        falls = step // self.at if isinstance(self.at, int) else sum(step >= when for when in self.at)
        return self.factor**falls


def cosine(steps: int, *, warmup: int = 0, final: float = 0.0) -> Factory:
    """Half a cosine from the full rate down to ``final`` of it (I. Loshchilov, F. Hutter, "SGDR", ICLR 2017, eq. 5).

    Source: https://arxiv.org/abs/1608.03983; one period, no restart. Past ``steps`` it stays at ``final``.

    Args:
        steps: steps of the run, the warm-up among them.
        warmup: steps of a line from ``1/warmup`` to 1 before the cosine.
        final: last multiplier, from 0 to 1.

    Returns:
        A factory for ``fit(schedule=…)``.

    Raises:
        OptionError: for steps that are no positive whole number, a warm-up as long as the run, a final out of range.
    """
    _whole("steps", steps, 1)
    _whole("warmup", warmup, 0)
    if warmup >= steps:
        raise OptionError(f"warmup must be shorter than the run of {steps} steps; got {warmup}.")
    if not 0 <= final <= 1:
        raise OptionError(f"final must be from 0 to 1; got {final!r}.")
    return _Cosine(steps, warmup, float(final))


def linear_fall(steps: int, *, last: float = 0.2) -> Factory:
    """The full rate, then a line down to 0 over the last fraction of the run.

    Args:
        steps: steps of the run.
        last: the fraction over which it falls, above 0 and at most 1.

    Returns:
        A factory for ``fit(schedule=…)``.

    Raises:
        OptionError: for steps that are no positive whole number, and a fraction out of range.
    """
    _whole("steps", steps, 1)
    if not 0 < last <= 1:
        raise OptionError(f"last must be above 0 and at most 1, a fraction of the run; got {last!r}.")
    return _LinearFall(steps, float(last))


def step_decay(at: int | Sequence[int], *, factor: float = 0.1) -> Factory:
    """Multiply the rate by ``factor`` now and then.

    Args:
        at: a number: every so many steps. Several, rising: after each of these steps.
        factor: above 0 and at most 1.

    Returns:
        A factory for ``fit(schedule=…)``.

    Raises:
        OptionError: for steps that are no positive whole numbers or do not rise, and a factor out of range.
    """
    if isinstance(at, str) or not isinstance(at, int | Sequence):
        raise OptionError(f"at must be a whole number of steps, or several that rise; got {at!r}.")
    steps = at if isinstance(at, int) else list(at)
    for step in [steps] if isinstance(steps, int) else steps:
        _whole("at", step, 1)
    if isinstance(steps, list) and (not steps or steps != sorted(set(steps))):
        raise OptionError(f"at must have steps that rise, at least one; got {at!r}.")
    if not 0 < factor <= 1:
        raise OptionError(f"factor must be above 0 and at most 1; got {factor!r}.")
    return _StepDecay(steps, float(factor))


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}; got {value!r}.")
