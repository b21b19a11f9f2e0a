"""Likelihoods p(y | network output). Their parameters, where learned, are θ.

Several targets at once are independent given the output, with event shape ``[outputs]``. Log-densities are finite, and
their gradients too, for outputs within ±50 in float32; no output is clamped. Those of counts are computed in float64
inside, whatever comes in: at a count of 10⁶ their terms cancel to seven digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from bayesmeta.errors import OptionError, ShapeError

_NO_SHAPE = torch.Size()
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Likelihood(nn.Module):
    """Base of likelihoods. One of your own defines :meth:`distribution`.

    An output of width 1 goes with targets ``[tasks, shots]``; a wider one with ``[tasks, shots, outputs]``, unless the
    likelihood says otherwise.

    Attributes:
        exposure: which column of x holds the exposure (time at risk, population), negative from the end: positive, in
            raw units. That column is not fed to the network; it comes to :meth:`distribution` instead. None: no
            exposure, and ``distribution`` is called with the output alone.
    """

    exposure: int | None = None

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Distribution of y with batch shape ``[…, tasks, shots]``.

        Args:
            output: network outputs ``[…, tasks, shots, width]``.
            exposure: ``[tasks, shots]``, where the likelihood has one.
        """
        raise NotImplementedError

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """log p(y | output), ``[…, tasks, shots]``."""
        fn = self.distribution(output) if exposure is None else self.distribution(output, exposure)
        return fn.log_prob(y)

    def num_outputs(self, targets: int) -> int | None:
        """How many network outputs it takes for so many targets; None when it does not say.

        Raises:
            ShapeError: for a number of targets that it cannot describe.
        """
        return None

    def split(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the network is fed, and the exposure as a keyword argument (none where there is no exposure).

        Args:
            x: ``[tasks, shots, features]``.
            mask: ``[tasks, shots]``. Padding gets the exposure 1: its density does not count, but its gradient must be
                finite.

        Raises:
            ShapeError: when x has no such column.
        """
        if self.exposure is None:
            return x, {}
        width = x.shape[-1]
        if not -width <= self.exposure < width:
            raise ShapeError(
                f"The exposure of {type(self).__name__} is column {self.exposure} of x, which has {width} feature(s); "
                f"expected {-width} to {width - 1}."
            )
        column = self.exposure % width
        exposure = x[..., column]
        if mask is not None:
            exposure = torch.where(mask, exposure, 1.0)
        return torch.cat([x[..., :column], x[..., column + 1 :]], -1), {"exposure": exposure}

    def _log_parameter(self, name: str, value: float | Sequence[float], learn: bool) -> None:
        """Hold the logarithm of a positive option, as a parameter if it is learned, else as a buffer."""
        raw = torch.as_tensor(value, dtype=torch.float64)
        if raw.dim() > 1 or raw.numel() == 0 or not bool(((raw > 0) & raw.isfinite()).all()):
            raise OptionError(
                f"The {name} of a {type(self).__name__} likelihood must be positive, one number or one for each "
                f"output; got {value}."
            )
        log_value = raw.log().to(torch.get_default_dtype())
        if learn:
            self.register_parameter(f"log_{name}", nn.Parameter(log_value))
        else:
            self.register_buffer(f"log_{name}", log_value)


class _Independent(Likelihood):
    """One network output for each target, targets independent."""

    #: parameters that may hold one value for each output
    _per_output: tuple[str, ...] = ()

    def num_outputs(self, targets: int) -> int | None:
        """As many as there are targets."""
        for name in self._per_output:
            value = getattr(self, name)
            if value.dim() and value.shape[0] != targets:
                raise ShapeError(
                    f"The {type(self).__name__} likelihood has {value.shape[0]} values of {name}, but y has {targets} "
                    f"output(s). Give one {name} for each output, or one for all."
                )
        return targets

    def extra_repr(self) -> str:
        """The options, shown when the likelihood is printed."""
        shown = []
        for name in self._per_output:
            value = getattr(self, name).tolist()
            text = f"{value:.4g}" if isinstance(value, float) else f"[{', '.join(f'{v:.4g}' for v in value)}]"
            shown.append(f"{name}={text}, learn_{name}={getattr(self, f'learn_{name}')}")
        return ", ".join(shown + ([] if self.exposure is None else [f"exposure={self.exposure}"]))


def _targets(output: Tensor) -> Tensor:
    """Outputs in the shape of the targets: a single one has no dimension of its own."""
    return output.squeeze(-1) if output.shape[-1] == 1 else output


def _event(fn: Any, width: int) -> Any:
    """Several outputs are one event."""
    return fn if width == 1 else fn.to_event(1)


def _sum(value: Tensor, width: int) -> Tensor:
    return value if width == 1 else value.sum(-1)


class Gaussian(_Independent):
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
        return _event(dist.Normal(_targets(output), _scalar(self.scale, output)), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The Gaussian log-density, without the overhead of a distribution object."""
        width = output.shape[-1]
        square = (_targets(output) - y).square()
        log_scale = self.log_scale
        if log_scale.dim():
            log_scale = _scalar(log_scale, output)
            return _sum(square * (-0.5 * (-2.0 * log_scale).exp()) - log_scale - _HALF_LOG_2PI, width)
        return _sum(square, width) * (-0.5 * (-2.0 * log_scale).exp()) - width * (log_scale + _HALF_LOG_2PI)


def _scalar(value: Tensor, output: Tensor) -> Tensor:
    """A parameter of one value per output, without that dimension where there is a single output."""
    return value.squeeze(-1) if value.dim() and output.shape[-1] == 1 else value


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
        return _targets(loc), self.floor + softplus(_targets(raw))

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Normal with predicted mean and scale."""
        return _event(dist.Normal(*self._parts(output)), output.shape[-1] // 2)

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The Gaussian log-density."""
        loc, scale = self._parts(output)
        value = -0.5 * ((y - loc) / scale).square() - scale.log() - _HALF_LOG_2PI
        return _sum(value, output.shape[-1] // 2)


class StudentT(_Independent):
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
        df, scale = _scalar(self.df, output), _scalar(self.scale, output)
        return _event(dist.StudentT(df, _targets(output), scale), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The Student-t log-density."""
        log_df, log_scale = _scalar(self.log_df, output).double(), _scalar(self.log_scale, output)
        df = log_df.exp()  # float64: for many degrees of freedom the two lgamma nearly cancel
        constant = torch.lgamma(0.5 * (df + 1.0)) - torch.lgamma(0.5 * df) - 0.5 * (log_df + math.log(math.pi))
        square = ((y - _targets(output)) * (-log_scale).exp()).square()
        df, constant = df.to(output.dtype), constant.to(output.dtype)
        return _sum(constant - log_scale - 0.5 * (df + 1.0) * torch.log1p(square / df), output.shape[-1])


class Bernoulli(_Independent):
    """Targets 0 or 1; the output is the log-odds of a 1. With several outputs, a label for each."""

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Bernoulli with these log-odds."""
        return _event(dist.Bernoulli(logits=_targets(output)), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The log-probability of y."""
        return _sum(logsigmoid((2 * y - 1) * _targets(output)), output.shape[-1])


class Categorical(Likelihood):
    """Targets are classes 0, …, num_classes − 1, as whole numbers (float or integer) ``[tasks, shots]``.

    The network's outputs are the classes' logits.

    Args:
        num_classes: how many classes.

    Raises:
        OptionError: for fewer than 2 classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise OptionError(f"A Categorical likelihood needs num_classes of at least 2; got {num_classes!r}.")
        self.num_classes = num_classes

    def extra_repr(self) -> str:
        """The number of classes, shown when the likelihood is printed."""
        return f"num_classes={self.num_classes}"

    def num_outputs(self, targets: int) -> int:
        """One for each class."""
        if targets != 1:
            raise ShapeError(
                f"A Categorical likelihood has one target, the class, so that y is [tasks, shots]; got {targets} "
                "outputs. One-hot targets become classes by y.argmax(-1)."
            )
        return self.num_classes

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Categorical with these logits."""
        checked = None if output.numel() else False  # torch cannot validate logits of no observation
        return dist.Categorical(logits=output, validate_args=checked)

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The log-probability of class y; −∞ for what is no class, such as −1 in padding."""
        index = y.long().clamp(0, self.num_classes - 1)
        each = output.log_softmax(-1).gather(-1, index.expand(output.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return torch.where(y == index, each, -math.inf)


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
        return _poisson_log_prob(self.rate.log(), value).to(self.rate.dtype)


class _NegativeBinomial(dist.NegativeBinomial):
    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        return _draw_counts(self._gamma.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_c = self.total_count.log()
        return _negative_binomial_log_prob(self.logits, log_c, value).to(self.logits.dtype)


class _Counts(_Independent):
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
        return _targets(log_mean)


class Poisson(_Counts):
    """Counts with rate exposure · exp(output).

    Args:
        exposure: which column of x holds the exposure, in raw positive units; it is not fed to the network.

    Raises:
        OptionError: for an exposure that is no column index.
    """

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Poisson with that rate."""
        return _event(_Poisson(self._log_mean(output, exposure).exp()), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The log-probability of the count y, from the log rate."""
        value = _poisson_log_prob(self._log_mean(output.double(), exposure), y)
        return _sum(value, output.shape[-1]).to(output.dtype)


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
        log_concentration = _scalar(self.log_concentration, output)
        logits = self._log_mean(output, exposure) - log_concentration
        return _event(_NegativeBinomial(log_concentration.exp(), logits=logits), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The log-probability of the count y, from the log mean."""
        log_concentration = _scalar(self.log_concentration, output)
        logits = self._log_mean(output.double(), exposure) - log_concentration
        value = _negative_binomial_log_prob(logits, log_concentration, y)
        return _sum(value, output.shape[-1]).to(output.dtype)
