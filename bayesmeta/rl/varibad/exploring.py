"""How a belief policy explores where actions are continuous: noise correlated in time, and a spread that it chooses."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import normal_like


class CorrelatedNoise:
    """Standard normal noise that is correlated from step to step: ε′ = c ε + √(1 − c²) fresh.

    White noise leads around what a policy would do, and a policy that steers back soon sees nothing new; noise that
    stays on one side leads away from it. Source of the idea: J. Hollenstein, G. Martius, J. Piater, "Colored Noise in
    PPO", AAAI 2024, https://arxiv.org/abs/2312.11091; PPO reads each action's density by itself, as there. Departure:
    the noise is autoregressive, and not coloured by a power of the frequency.

    The densities are right, and yet the policy gradient is biased: noise that has made the state is not independent of
    it, so that what depends on the state alone (a baseline, an error of the values) no longer cancels; the more so the
    larger c is. Take ``correlation=0`` for what must be optimal. The sparse robot's settings keep c to the end.

    Args:
        correlation: c, in [0, 1).

    Raises:
        OptionError: for one outside of it.
    """

    def __init__(self, correlation: float) -> None:
        if not 0 <= correlation < 1:
            raise OptionError(f"correlation must be in [0, 1); got {correlation}.")
        self.correlation, self._now = correlation, None

    _now: Tensor | None

    def draw(self, like: Tensor, begins: Tensor, generator: torch.Generator) -> Tensor:
        """The next noise, ``[batch, size]`` as ``like``; fresh where an episode ``begins``, ``[batch]``."""
        fresh = normal_like(like, like.shape, generator)
        if self._now is not None:
            mixed = self.correlation * self._now + math.sqrt(1 - self.correlation**2) * fresh
            fresh = torch.where(begins.unsqueeze(-1), fresh, mixed)
        self._now = fresh
        return fresh


class SpreadHead:
    """Actions of a box: Gaussians whose means stay inside of it by tanh, and whose standard deviations are outputs too.

    A mean far outside of the box would be clipped whatever the noise, and nothing tried. The standard deviation stays
    below ``most`` half widths of the box, smoothly: with a bonus for entropy it would grow without end where nothing is
    to be lost.

    Args:
        low, high: ends of the box, ``[size]``, finite.
        log_std: log standard deviation where the outputs are 0.
        most: of the standard deviation, in half widths of the box.

    Raises:
        OptionError: for a box without finite ends, and a first standard deviation that is not below the bound.
    """

    free = 0

    def __init__(self, low: Tensor, high: Tensor, *, log_std: float = 0.0, most: float = 1.5) -> None:
        self.middle, self.half = (low + high) / 2, (high - low) / 2
        if not bool((self.half.isfinite() & (self.half > 0)).all()):
            raise OptionError(f"A SpreadHead is of a box with finite ends, low < high; got {low} and {high}.")
        if not 0 < most < math.inf or not bool((math.exp(log_std) < most * self.half).all()):
            raise OptionError(
                f"exp(log_std) must be below most = {most:g} half widths of the box, which are {self.half.tolist()}; "
                f"got log_std={log_std:g}."
            )
        self.outputs, self.log_std, self.most = 2 * len(low), log_std, most
        self._top = (most * self.half).log()
        self._first = (self._top - log_std).expm1().log()  # softplus of it is top − log_std

    def distribution(self, outputs: Tensor, free: Tensor | None = None) -> Any:
        """Independent Normal, batch shape ``[…]``, event ``[size]``, of outputs ``[…, 2 × size]``."""
        loc, more = outputs.chunk(2, -1)
        middle, half, top, first = (part.to(loc) for part in (self.middle, self.half, self._top, self._first))
        scale = (top - torch.nn.functional.softplus(first - more)).exp()
        return dist.Normal(middle + half * loc.tanh(), scale, validate_args=False).to_event(1)

    def initial_free(self) -> Tensor:
        """No numbers."""
        return torch.zeros(0)
