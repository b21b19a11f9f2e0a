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
    """Actions of a box: Gaussians whose means stay inside of it by tanh, and whose log standard deviations are outputs.

    A mean far outside of the box would be clipped whatever the noise, and nothing tried.

    Args:
        low, high: ends of the box, ``[size]``, finite.
        log_std: log standard deviation where the outputs are 0.
        log_std_range: lowest and highest.

    Raises:
        OptionError: for a box without finite ends, and a first log standard deviation outside the range.
    """

    free = 0

    def __init__(
        self, low: Tensor, high: Tensor, *, log_std: float = 0.0, log_std_range: tuple[float, float] = (-5.0, 2.0)
    ) -> None:
        self.middle, self.half = (low + high) / 2, (high - low) / 2
        if not bool((self.half.isfinite() & (self.half > 0)).all()):
            raise OptionError(f"A SpreadHead is of a box with finite ends, low < high; got {low} and {high}.")
        if not log_std_range[0] <= log_std <= log_std_range[1]:
            raise OptionError(f"log_std must be in {log_std_range}; got {log_std}.")
        self.outputs, self.log_std, self.log_std_range = 2 * len(low), log_std, log_std_range

    def distribution(self, outputs: Tensor, free: Tensor | None = None) -> Any:
        """Independent Normal, batch shape ``[…]``, event ``[size]``, of outputs ``[…, 2 × size]``."""
        loc, more = outputs.chunk(2, -1)
        middle, half = self.middle.to(loc), self.half.to(loc)
        loc = middle + half * loc.tanh()
        scale = (self.log_std + more).clamp(*self.log_std_range).exp()
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def initial_free(self) -> Tensor:
        """No numbers."""
        return torch.zeros(0)
