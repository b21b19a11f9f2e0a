"""Forecasts of counts as whole distributions, on the scale of Normal quantiles on which they are recalibrated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.checks import in_words
from bayesmeta.diagnostics.forecasts import check_finite
from bayesmeta.errors import DataError, UnsupportedError
from bayesmeta.ops.random import as_generator
from bayesmeta.protocols import Posterior

#: Each count up to the largest one costs an evaluation of the likelihood under every draw.
LARGEST = 2000
_REACH = 12.0  # standard deviations above the mean
_TOP = 4.75  # the last count of a table for draws: F̃ of it is Φ of this at least, 1 − 10⁻⁶
_CUT = 3.1  # a table that ends below this, 1 − 10⁻³, is refused
_STREAM = "moments of the predictive"
#: From Φ⁻¹(F(k)) to that of the recalibrated F.
NormalMap = Callable[[Tensor], Tensor]


class CountForecast:
    """The predictive of counts at some inputs: the mean over draws of the likelihood, of every count from 0 to K.

    What lies above K is closed as a geometric series, which goes on with the ratio of the last two: of a Poisson that
    is a little too much, of a negative binomial what it tends to. Both tails are summed by themselves, as logarithms,
    so that a count that the forecast deems all but impossible (10⁻¹⁰⁰⁰) still has its place.

    Args:
        log_p: log-probabilities of 0 … K, ``[K + 1, tasks, shots]``, float64.

    Attributes:
        log_p: as given, normalised.
        z: Φ⁻¹(F(k)) of k = −1 … K, ``[K + 2, tasks, shots]``; the first is −∞.
    """

    def __init__(self, log_p: Tensor) -> None:
        ratio = (log_p[-1] - log_p[-2]).nan_to_num(nan=-math.inf).clamp(max=-1e-6)
        rest = log_p[-1] + ratio - torch.log(-torch.expm1(ratio))
        every = torch.cat([log_p, rest.unsqueeze(0)])
        every = every - every.logsumexp(0)
        below = every[:-1].logcumsumexp(0)  # log P(y ≤ k)
        above = every.flip(0).logcumsumexp(0).flip(0)[1:]  # log P(y > k)
        z = torch.where(below < above, 1.0, -1.0) * normal_quantile(torch.minimum(below, above))
        self.log_p = every[:-1]
        self.z = torch.cat([torch.full_like(z[:1], -math.inf), z])

    def around(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Φ⁻¹(F(y − 1)) and Φ⁻¹(F(y)) of counts ``[…, tasks, shots]`` up to K; of padding, of any."""
        index = y.long().clamp(0, len(self.z) - 2).reshape(-1, *self.z.shape[1:])
        return self.z.gather(0, index).reshape(y.shape), self.z.gather(0, index + 1).reshape(y.shape)

    def pit(self, y: Tensor, uniform: Tensor) -> Tensor:
        """Φ⁻¹ of the randomised PIT F(y − 1) + U (F(y) − F(y − 1)), with uniform numbers U."""
        low, high = self.around(y)
        flip = low > 0  # from the tail in which they lie
        log_low, log_high = (torch.special.log_ndtr(torch.where(flip, -z, z)) for z in (low, high))
        log_p = torch.logaddexp(log_low + torch.log1p(-uniform), log_high + uniform.log())
        return torch.where(flip, -1.0, 1.0) * normal_quantile(log_p)

    def quantile(self, z: Tensor, change: NormalMap) -> Tensor:
        """The smallest count whose recalibrated F is at least Φ(z) ``[n, tasks, shots]``; none above K."""
        steps = change(self.z[1:]).movedim(0, -1).contiguous()
        place = torch.searchsorted(steps, z.movedim(0, -1).contiguous()).movedim(-1, 0)
        return place.clamp(max=len(self.z) - 2)

    def log_prob(self, y: Tensor, change: NormalMap) -> Tensor:
        """log of the recalibrated probability of a count, F̃(y) − F̃(y − 1).

        Where F(y) and F(y − 1) are the same in floating point, as between two modes, it is log p(y) + log dF̃/dF.
        """
        low, high = self.around(y)
        step = log_step(change(low), change(high))
        index = y.long().clamp(0, len(self.log_p) - 1).reshape(-1, *self.z.shape[1:])
        log_p = self.log_p.gather(0, index).reshape(y.shape)
        new, width = change(high), 1e-4
        slope = (change(high + width) - change(high - width)) / (2 * width)
        limit = log_p + slope.log() + 0.5 * (high.square() - new.square())
        return torch.where((high - low < 1e-9 * (1.0 + high.abs())) & high.isfinite(), limit, step)


def normal_quantile(log_p: Tensor) -> Tensor:
    """Φ⁻¹(exp(log_p)), of log-probabilities however low, float64; −∞ of −∞."""
    near = torch.special.ndtri(log_p.exp())
    # Newton's method on log Φ, which is concave, from what log Φ(z) tends to
    far = log_p.clamp(max=-100.0).nan_to_num(neginf=-1e300)
    z = -(-2.0 * far - (-4.0 * math.pi * far).log()).sqrt()
    for _ in range(4):
        value = torch.special.log_ndtr(z)
        z = z - (value - far) * (value + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)).exp()
    z = torch.where(log_p == -math.inf, -math.inf, z)
    return torch.where(log_p < -100.0, z, near)


def log_step(low: Tensor, high: Tensor) -> Tensor:
    """log(Φ(high) − Φ(low)), from the tail in which they lie; −∞ where they are equal."""
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top = torch.special.log_ndtr(high)
    step = top + torch.log1p(-(torch.special.log_ndtr(low) - top).exp().clamp(max=1.0))
    return torch.where(low == high, -math.inf, step)


def check_count_targets(y: Tensor, valid: Tensor, names: list[str]) -> None:
    """Check that targets are counts.

    Raises:
        DataError: naming the first target at fault.
    """
    bad = (((y < 0) | (y % 1 != 0)) & valid).nonzero()
    if len(bad):
        task, shot = bad[0].tolist()
        raise DataError(
            f"y = {float(y[task, shot])} of task {names[task]}, query point {shot} (counted from 0) is outside the "
            "support of the likelihood, which is of counts: 0, 1, 2, … Give counts, or take a likelihood of numbers."
        )


def count_forecast(
    posterior: Posterior,
    observations: Observations,
    draws: Any,
    log_likelihood: Callable[[Observations], Tensor],
    *,
    change: NormalMap | None = None,
    names: list[str] | None = None,
) -> CountForecast:
    """The predictive of counts at the inputs of observations, by their likelihood.

    Args:
        posterior: of counts. observations: y, where given, is within the table.
        draws: of φ, ``n``. log_likelihood: under these, ``[n, tasks, shots]``.
        change: for draws from the recalibrated F̃: the table then goes on until F̃ is nearly 1.
        names: of the tasks, for messages; None means their places.

    Raises:
        UnsupportedError: for counts so large that a table of them is too long, and for several outputs.
        NonFiniteDataError: for forecasts that are not finite.
    """
    mask = observations.full_mask()
    names = [str(i) for i in range(len(mask))] if names is None else names
    largest = _largest(posterior, observations, draws, names)
    rows: list[Tensor] = []
    while True:
        _check_largest(largest)
        for k in range(len(rows), largest + 1):
            with in_words():
                each = log_likelihood(observations.with_y(torch.full_like(observations.x[..., 0], float(k))))
            rows.append(each.double().logsumexp(0) - math.log(len(each)))
        table = torch.stack(rows)
        # −∞ is a count that cannot be
        check_finite(torch.where(table.isnan().any(0), math.nan, 0.0), mask, "log-likelihood of a count", names)
        forecast = CountForecast(torch.where(mask, table, -math.log(largest + 1)))
        if change is None or not bool(mask.any()):
            return forecast
        top = float(change(forecast.z[-1])[mask].min())
        if top >= _TOP or (largest == LARGEST and top >= _CUT):
            return forecast
        largest = LARGEST if largest < LARGEST <= 1.5 * largest + 8 else int(1.5 * largest) + 8


def _largest(posterior: Posterior, observations: Observations, draws: Any, names: list[str]) -> int:
    """The last count of a table: far above the forecasts, and no less than y."""
    generator = as_generator(0, observations.device, _STREAM)
    with in_words():
        y = posterior.predict(observations.with_y(None), draws=draws, generator=generator).double()
    if y.dim() == 4:
        raise UnsupportedError("Counts of several outputs are not recalibrated; recalibrate each output alone.")
    mask = observations.full_mask()
    check_finite(y.mean(0), mask, "predictive mean", names)
    reach = (y.mean(0) + _REACH * (y.var(0, correction=0) + 1.0).sqrt())[mask]
    given = torch.zeros_like(reach) if observations.y is None else observations.y.double()[mask]
    return max([1, *(math.ceil(float(part.max())) for part in (reach, given) if len(part))])


def _check_largest(largest: int) -> None:
    if largest > LARGEST:
        raise UnsupportedError(
            f"Forecasts reach counts of {largest}; a temperature or an isotonic map needs the probability of each "
            f"count, which is done up to {LARGEST}. Take how='conformal', whose intervals need only mean and spread, "
            "or model the logarithm."
        )
