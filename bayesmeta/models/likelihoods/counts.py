"""Likelihoods of counts. Densities are computed in float64: at a count of 10⁶ their terms cancel to seven digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayesmeta.errors import OptionError
from bayesmeta.models.likelihoods.base import Independent, as_event, as_targets, for_width, sum_event

_NO_SHAPE = torch.Size()


def _poisson_log_prob(log_rate: Tensor, count: Tensor) -> Tensor:
    """log p(count), float64."""
    log_rate, count = log_rate.double(), count.double()
    return count * log_rate - log_rate.exp() - torch.lgamma(count + 1.0)


def _negative_binomial_log_prob(logits: Tensor, log_c: Tensor, count: Tensor) -> Tensor:
    """log p(count), float64; logits are log mean − log concentration."""
    logits, log_c, count = logits.double(), log_c.double(), count.double()
    c = log_c.exp()
    ways = torch.lgamma(count + c) - torch.lgamma(c) - torch.lgamma(count + 1.0)
    return ways + c * logsigmoid(-logits) + count * logsigmoid(logits)


def _draw_counts(rate: Tensor) -> Tensor:
    """Poisson draws. torch's pass through int64 and overflow; from 2⁶² on a draw is its rate to nine digits."""
    limit = 2.0**62
    with torch.no_grad():
        return torch.where(rate < limit, torch.poisson(rate.clamp(max=limit)), rate)


class _Poisson(dist.Poisson):
    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        return _draw_counts(self.rate.expand(self._extended_shape(torch.Size(sample_shape))))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        rate, value = self.rate.double(), value.double()
        # xlogy: a count of 0 under a rate that has underflown to 0 is certain
        return (torch.xlogy(value, rate) - rate - torch.lgamma(value + 1.0)).to(self.rate.dtype)


class _NegativeBinomial(dist.NegativeBinomial):
    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        return _draw_counts(self._gamma.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_c = self.total_count.log()
        return _negative_binomial_log_prob(self.logits, log_c, value).to(self.logits.dtype)


class _Counts(Independent):
    """Counts with a log link: mean = exposure · exp(output)."""

    def __init__(self, exposure: int | None = None) -> None:
        super().__init__()
        if isinstance(exposure, bool) or not (exposure is None or isinstance(exposure, int)):
            raise OptionError(
                f"The exposure of a {type(self).__name__} likelihood is the index of a column of x, or None; got "
                f"{exposure!r}."
            )
        self.exposure = exposure

    def _log_mean(self, output: Tensor, exposure: Tensor | None) -> Tensor:
        """log of the mean, in the shape of the targets and the dtype of the output."""
        log_mean = output if exposure is None else output + exposure.to(output.dtype).log().unsqueeze(-1)
        return as_targets(log_mean)


class Poisson(_Counts):
    """Counts with rate exposure · exp(output).

    Args:
        exposure: which column of x holds the exposure, in raw positive units; it is not fed to the network.

    Raises:
        OptionError: for an exposure that is no column index.
    """

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Poisson with that rate."""
        return as_event(_Poisson(self._log_mean(output, exposure).exp()), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The log-probability of the count y, from the log rate."""
        value = _poisson_log_prob(self._log_mean(output.double(), exposure), y)
        return sum_event(value, output.shape[-1]).to(output.dtype)


class NegativeBinomial(_Counts):
    """Counts that vary more than Poisson's: mean m = exposure · exp(output), variance m + m² / concentration.

    Args:
        concentration: large is nearly Poisson, small is widely spread; one for all outputs or one for each.
        learn_concentration: whether it is trained (as its logarithm).
        exposure: which column of x holds the exposure, in raw positive units; it is not fed to the network.

    Raises:
        OptionError: for a concentration that is not positive, or an exposure that is no column index.
    """

    log_concentration: Tensor
    _per_output = ("concentration",)

    def __init__(
        self,
        concentration: float | Sequence[float] = 1.0,
        *,
        learn_concentration: bool = False,
        exposure: int | None = None,
    ) -> None:
        super().__init__(exposure)
        self.learn_concentration = learn_concentration
        self._log_parameter("concentration", concentration, learn_concentration)

    @property
    def concentration(self) -> Tensor:
        """The concentration, a scalar tensor or ``[outputs]``."""
        return self.log_concentration.exp()

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Negative binomial with that mean: Gamma-distributed rates of shape ``concentration``."""
        log_concentration = for_width(self.log_concentration, output)
        logits = self._log_mean(output, exposure) - log_concentration
        return as_event(_NegativeBinomial(log_concentration.exp(), logits=logits), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The log-probability of the count y, from the log mean."""
        log_concentration = for_width(self.log_concentration, output)
        logits = self._log_mean(output.double(), exposure) - log_concentration
        value = _negative_binomial_log_prob(logits, log_concentration, y)
        return sum_event(value, output.shape[-1]).to(output.dtype)
