"""Likelihoods of real numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.models.likelihoods.base import Independent, Likelihood, as_event, as_targets, for_width, sum_event

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Gaussian(Independent):
    """Independent Gaussian noise.

    Args:
        scale: standard deviation of the noise, in the units of y, one for all outputs or one for each; the first value
            when it is learned. Closed forms (the Bayesian last layer) want one for all.
        learn_scale: whether it is trained (as its logarithm).

    Raises:
        OptionError: for a scale that is not positive.
    """

    log_scale: Tensor
    _per_output = ("scale",)

    def __init__(self, scale: float | Sequence[float] = 1.0, *, learn_scale: bool = False) -> None:
        super().__init__()
        self.learn_scale = learn_scale
        self._log_parameter("scale", scale, learn_scale)

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise, a scalar tensor or ``[outputs]``."""
        return self.log_scale.exp()

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Normal around the output."""
        return as_event(dist.Normal(as_targets(output), for_width(self.scale, output)), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The Gaussian log-density, without the overhead of a distribution object."""
        width = output.shape[-1]
        square = (as_targets(output) - y).square()
        log_scale = self.log_scale
        if log_scale.dim():
            log_scale = for_width(log_scale, output)
            return sum_event(square * (-0.5 * (-2.0 * log_scale).exp()) - log_scale - _HALF_LOG_2PI, width)
        return sum_event(square, width) * (-0.5 * (-2.0 * log_scale).exp()) - width * (log_scale + _HALF_LOG_2PI)


class HeteroscedasticGaussian(Likelihood):
    """Gaussian noise whose standard deviation the network predicts.

    The network has 2 outputs for each target: first all means, then all raw scales s, with standard deviation
    floor + softplus(s) (as Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017, https://arxiv.org/abs/1612.01474,
    section 2.2.1, have it for the variance).

    Args:
        floor: smallest standard deviation, in the units of y: without one a network that fits a point exactly has an
            unbounded density.

    Raises:
        OptionError: for a floor that is not positive.
    """

    def __init__(self, floor: float = 1e-3) -> None:
        super().__init__()
        if not floor > 0:
            raise OptionError(f"The floor of a HeteroscedasticGaussian likelihood must be positive; got {floor}.")
        self.floor = floor

    def extra_repr(self) -> str:
        """The floor, shown when the likelihood is printed."""
        return f"floor={self.floor:.4g}"

    def num_outputs(self, targets: int) -> int:
        """Two for each target."""
        return 2 * targets

    def _parts(self, output: Tensor) -> tuple[Tensor, Tensor]:
        if output.shape[-1] % 2:
            raise ShapeError(
                f"A HeteroscedasticGaussian takes 2 network outputs for each target (mean and scale); got "
                f"{output.shape[-1]} outputs."
            )
        loc, raw = output.chunk(2, -1)
        return as_targets(loc), self.floor + softplus(as_targets(raw))

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Normal with predicted mean and scale."""
        return as_event(dist.Normal(*self._parts(output)), output.shape[-1] // 2)

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The Gaussian log-density."""
        loc, scale = self._parts(output)
        value = -0.5 * ((y - loc) / scale).square() - scale.log() - _HALF_LOG_2PI
        return sum_event(value, output.shape[-1] // 2)


def _student_constant(log_df: Tensor) -> Tensor:
    """log of the density's constant for scale 1, float64: for many degrees of freedom the two lgamma nearly cancel."""
    log_df = log_df.double()
    df = log_df.exp()
    return torch.lgamma(0.5 * (df + 1.0)) - torch.lgamma(0.5 * df) - 0.5 * (log_df + math.log(math.pi))


class _StudentT(dist.StudentT):
    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        square = ((value - self.loc) / self.scale).square()
        constant = _student_constant(self.df.log()).to(square.dtype)
        return constant - self.scale.log() - 0.5 * (self.df + 1.0) * torch.log1p(square / self.df)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _StudentT:
        return super().expand(batch_shape, _instance=self._get_checked_instance(_StudentT, _instance))


class StudentT(Independent):
    """Student-t noise: like a Gaussian in the middle, but single outliers do not pull.

    Args:
        df: degrees of freedom; the mean exists above 1, the variance above 2. One for all outputs or one for each.
        scale: its scale, in the units of y (not its standard deviation, which is scale · √(df / (df − 2))), likewise.
        learn_df, learn_scale: whether they are trained (as their logarithms).

    Raises:
        OptionError: for a df or scale that is not positive.
    """

    log_df: Tensor
    log_scale: Tensor
    _per_output = ("df", "scale")

    def __init__(
        self,
        df: float | Sequence[float] = 4.0,
        scale: float | Sequence[float] = 1.0,
        *,
        learn_df: bool = False,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        self.learn_df, self.learn_scale = learn_df, learn_scale
        self._log_parameter("df", df, learn_df)
        self._log_parameter("scale", scale, learn_scale)

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, a scalar tensor or ``[outputs]``."""
        return self.log_df.exp()

    @property
    def scale(self) -> Tensor:
        """Scale of the noise, a scalar tensor or ``[outputs]``."""
        return self.log_scale.exp()

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Student-t around the output."""
        df, scale = for_width(self.df, output), for_width(self.scale, output)
        return as_event(_StudentT(df, as_targets(output), scale), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The Student-t log-density."""
        log_df, log_scale = for_width(self.log_df, output), for_width(self.log_scale, output)
        constant = _student_constant(log_df).to(output.dtype)
        square = ((y - as_targets(output)) * (-log_scale).exp()).square()
        df = log_df.exp()
        return sum_event(constant - log_scale - 0.5 * (df + 1.0) * torch.log1p(square / df), output.shape[-1])
