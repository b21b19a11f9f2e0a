"""Forecasts of counts as whole distributions, on the scale of Normal quantiles on which they are recalibrated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import UnsupportedError
from bayesmeta.ops.random import as_generator
from bayesmeta.protocols import Posterior

#: Each count up to the largest one costs an evaluation of the likelihood under every draw.
LARGEST = 2000
_REACH = 12.0  # standard deviations above the mean: what a temperature of 3 makes of 4
_STREAM = "moments of the predictive"
#: From Φ⁻¹(F(k)) to that of the recalibrated F.
NormalMap = Callable[[Tensor], Tensor]


class CountForecast:
    """The predictive of counts at some inputs: the mean over draws of the likelihood, of every count from 0 to K.

    What lies above K is closed as a geometric series, which goes on with the ratio of the last two: of a Poisson that
    is a little too much, of a negative binomial what it tends to. Both tails are summed by themselves, so that a count
    that the forecast deems impossible (10⁻³⁰⁰) still has its place.

    Args:
        log_p: log-probabilities of 0 … K, ``[K + 1, tasks, shots]``, float64.

    Attributes:
        z: Φ⁻¹(F(k)) of k = −1 … K, ``[K + 2, tasks, shots]``; the first is −∞.
    """

    def __init__(self, log_p: Tensor) -> None:
        ratio = (log_p[-1] - log_p[-2]).nan_to_num(nan=-math.inf).clamp(max=-1e-6)
        rest = log_p[-1] + ratio - torch.log(-torch.expm1(ratio))
        every = torch.cat([log_p, rest.unsqueeze(0)])
        every = every - every.logsumexp(0)
        below = every[:-1].logcumsumexp(0)  # log P(y ≤ k)
        above = every.flip(0).logcumsumexp(0).flip(0)[1:]  # log P(y > k)
        least = 1e-300
        low, high = (torch.special.ndtri(part.exp().clamp(least, 0.5)) for part in (below, above))
        z = torch.where(below < above, low, -high)
        self.z = torch.cat([torch.full_like(z[:1], -math.inf), z])

    def around(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Φ⁻¹(F(y − 1)) and Φ⁻¹(F(y)) of counts ``[…, tasks, shots]`` up to K; of padding, of any."""
        index = y.long().clamp(0, len(self.z) - 2).reshape(-1, *self.z.shape[1:])
        return self.z.gather(0, index).reshape(y.shape), self.z.gather(0, index + 1).reshape(y.shape)

    def pit(self, y: Tensor, uniform: Tensor) -> Tensor:
        """F(y − 1) + U (F(y) − F(y − 1)), with uniform numbers U."""
        low, high = (torch.special.ndtr(z) for z in self.around(y))
        return low + uniform * (high - low)

    def quantile(self, u: Tensor, change: NormalMap) -> Tensor:
        """The smallest count whose recalibrated F is at least u ``[n, tasks, shots]``; none above K."""
        steps = torch.special.ndtr(change(self.z[1:])).movedim(0, -1).contiguous()
        place = torch.searchsorted(steps, u.movedim(0, -1).contiguous()).movedim(-1, 0)
        return place.clamp(max=len(self.z) - 2)

    def log_prob(self, y: Tensor, change: NormalMap) -> Tensor:
        """log of the recalibrated probability of a count, F̃(y) − F̃(y − 1)."""
        return log_step(*(change(z) for z in self.around(y)))


def log_step(low: Tensor, high: Tensor) -> Tensor:
    """log(Φ(high) − Φ(low)), from the tail in which they lie."""
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top = torch.special.log_ndtr(high)
    return top + torch.log1p(-(torch.special.log_ndtr(low) - top).exp().clamp(max=1.0))


def count_forecast(
    posterior: Posterior, observations: Observations, draws: Any, log_likelihood: Callable[[Observations], Tensor]
) -> CountForecast:
    """The predictive of counts at the inputs of observations, by their likelihood.

    Args:
        posterior: of counts. observations: y, where given, is within the table.
        draws: of φ, ``n``. log_likelihood: under these, ``[n, tasks, shots]``.

    Raises:
        UnsupportedError: for counts so large that a table of them is too long, and for several outputs.
    """
    bare = observations.with_y(None)
    y = posterior.predict(bare, draws=draws, generator=as_generator(0, observations.device, _STREAM)).double()
    if y.dim() == 4:
        raise UnsupportedError("Counts of several outputs are not recalibrated; recalibrate each output alone.")
    mask = observations.full_mask()
    reach = torch.where(mask, y.mean(0) + _REACH * (y.var(0, correction=0) + 1.0).sqrt(), 0.0)
    largest = math.ceil(float(reach.max()))
    if observations.y is not None:
        largest = max(largest, int(torch.where(mask, observations.y, 0).max()))
    if largest > LARGEST:
        raise UnsupportedError(
            f"Forecasts reach counts of {largest}; a temperature or an isotonic map needs the probability of each "
            f"count, which is done up to {LARGEST}. Take how='conformal', whose intervals need only mean and spread, "
            "or model the logarithm."
        )
    rows = []
    for k in range(largest + 1):
        each = log_likelihood(observations.with_y(torch.full_like(observations.x[..., 0], float(k))))
        rows.append(each.double().logsumexp(0) - math.log(len(each)))
    table = torch.stack(rows)
    return CountForecast(torch.where(mask, table, -math.log(largest + 1)))
