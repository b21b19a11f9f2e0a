"""Corrections of forecasts: what :func:`~bayesmeta.recalibrate` learns, and how each changes a predictive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.checks import check_same_tasks
from bayesmeta.diagnostics.forecasts import NormalForecast, Predictor, check_finite
from bayesmeta.diagnostics.metrics import log_score_normal
from bayesmeta.diagnostics.recalibrated import BaseForecast, RecalibratedPosterior, normal_parts
from bayesmeta.errors import NoClosedFormError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior


class Recalibration:
    """A correction of forecasts. Call it on a posterior for a :class:`~bayesmeta.RecalibratedPosterior`.

    Attributes:
        num_tasks: the tasks on which it was learned.
    """

    num_tasks: int
    by_moments: ClassVar[bool] = False

    def __call__(self, posterior: Posterior) -> RecalibratedPosterior:
        """The posterior with corrected predictions.

        Raises:
            UnsupportedError: for targets of a kind that this correction is not for.
        """
        self._check(posterior)
        return RecalibratedPosterior(posterior, self)  # type: ignore[arg-type]

    def _check(self, posterior: Posterior) -> None:
        if posterior.target_kind != "real":
            raise UnsupportedError(
                f"{type(self).__name__} is for real numbers; these targets are of kind {posterior.target_kind!r}. "
                "Learn a correction from tasks of that kind: bayesmeta.recalibrate."
            )

    def _same_kind(self, posterior: Posterior, kind: str) -> None:
        if posterior.target_kind != kind:
            raise UnsupportedError(
                f"This {type(self).__name__.lower()} correction was learned on targets of kind {kind!r}; the "
                f"posterior's are {posterior.target_kind!r}."
            )

    def of_normal(self, z: Tensor) -> Tensor:
        """Φ⁻¹(F̃(k)) of a count k, given z = Φ⁻¹(F(k)).

        Raises:
            UnsupportedError: where it is not for counts.
        """
        raise UnsupportedError(f"{type(self).__name__} gives no distribution of counts.")

    def posterior_predictive(self, distribution: Any, joint: bool) -> Any:
        """Refused, where F̃ is no known distribution."""
        raise NoClosedFormError(f"{type(self).__name__} leaves no closed-form predictive; use predict for draws.")


class Stretched(torch.distributions.TransformedDistribution):
    """The distribution of m + τ (y − m).

    Args:
        base: of y.
        centre: m, ``[*batch_shape, *event_shape]``.
        factor: τ, above 0.
    """

    def __init__(self, base: Any, centre: Tensor, factor: float) -> None:
        self.centre, self.factor = centre, factor
        affine = torch.distributions.AffineTransform((1.0 - factor) * centre, factor, event_dim=len(base.event_shape))
        super().__init__(base, [affine], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Its mean, ``[*batch_shape, *event_shape]``."""
        return self.centre + self.factor * (self.base_dist.mean - self.centre)

    @property
    def variance(self) -> Tensor:
        """Its variance, ``[*batch_shape, *event_shape]``."""
        return self.base_dist.variance * self.factor**2


def centre_of(distribution: Any) -> Tensor | None:
    """The point about which a distribution is stretched: its location, else its mean; None where it has neither."""
    if not isinstance(distribution, torch.distributions.Distribution):
        return None
    try:
        centre = getattr(distribution, "loc", None)
        return distribution.mean if centre is None else centre
    except NotImplementedError:
        return None


@dataclass(frozen=True)
class Temperature(Recalibration):
    """One number, by which the spread of the predictive is multiplied about its mean; logits are divided by it.

    F̃(y) = F(m + (y − m) / τ). Of classes, of each φ: softmax(log p(k | x, φ) / τ). Of counts on the scale of Normal
    quantiles, F̃(k) = Φ(Φ⁻¹(F(k)) / τ), which of a Normal F is the same and of counts keeps the median (ours). Closed
    forms stay. Source: C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern
    Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599, section 4.2, for classes; of real numbers it is D.
    Levi, L. Gispan, N. Giladi, E. Fetaya, "Evaluating and Calibrating Uncertainty Prediction in Regression Tasks",
    2019, https://arxiv.org/abs/1905.11659, section 4.1.

    Attributes:
        value: τ, above 0: above 1 the forecasts were over-confident.
        kind: ``"real"``, ``"count"`` or ``"class"``.
        num_tasks: the tasks on which it was learned.
    """

    value: float
    kind: str
    num_tasks: int

    def __str__(self) -> str:
        return f"Temperature({self.value:.4g}), from {self.num_tasks} tasks"

    def _check(self, posterior: Posterior) -> None:
        self._same_kind(posterior, self.kind)

    def of_normal(self, z: Tensor) -> Tensor:
        """z / τ."""
        return z / self.value

    def posterior_predictive(self, distribution: Any, joint: bool) -> Any:
        """The same distribution with τ times its spread: a Normal stays one, of others y ↦ m + τ (y − m) is taken."""
        torch_dist = torch.distributions
        if isinstance(distribution, torch_dist.Independent):
            inner = self.posterior_predictive(distribution.base_dist, joint)
            return torch_dist.Independent(inner, distribution.reinterpreted_batch_ndims)
        if isinstance(distribution, torch_dist.Normal):
            return torch_dist.Normal(distribution.loc, distribution.scale * self.value, validate_args=False)
        if isinstance(distribution, torch_dist.MultivariateNormal):
            covariance = distribution.covariance_matrix * self.value**2
            return torch_dist.MultivariateNormal(distribution.loc, covariance, validate_args=False)
        centre = centre_of(distribution)
        if centre is None or self.kind != "real":
            raise NoClosedFormError("This predictive has no mean in closed form; use predict for draws.")
        return Stretched(distribution, centre, self.value)

    def quantile(self, u: Tensor, base: BaseForecast) -> Tensor:
        """m + τ (F⁻¹(u) − m)."""
        return base.loc + self.value * (base.quantile(u) - base.loc)

    def before(self, y: Tensor, base: BaseForecast) -> Tensor:
        """m + (y − m) / τ."""
        return base.loc + (y - base.loc) / self.value

    def log_jacobian(self, y: Tensor, base: BaseForecast, log_density: Any, log_before: Tensor) -> Tensor:
        """−log τ of each output."""
        outputs = 1 if y.dim() == 2 else y.shape[-1]
        return torch.full(y.shape[:2], -outputs * math.log(self.value), dtype=y.dtype, device=y.device)


@dataclass(frozen=True, eq=False)
class Isotonic(Recalibration):
    """A monotone map of the PIT: F̃(y) = R(F(y)), R(p) the share of the tasks' PIT values up to p.

    Source: V. Kuleshov, N. Fenner, S. Ermon, "Accurate Uncertainties for Deep Learning Using Calibrated Regression",
    ICML 2018, https://arxiv.org/abs/1807.00263, algorithm 1. The isotonic regression of its eq. 5 passes through all
    its points, as shares only grow. Departures: R is a line on the scale of Normal quantiles, Φ⁻¹(R(Φ(z))), between
    ``num_bins`` − 1 of these points and beyond them, so that F̃ has a density and tails; and all tasks count alike. It
    corrects form and location too, and needs more tasks than a temperature: of K tasks it has at most K / 5 pieces
    (but 2), so that few tasks give a shift or little more. From draws it cannot reach beyond the
    outermost draw: where forecasts are far too narrow, take a temperature first. Of counts F(y) is the randomised PIT
    (Czado, Gneiting & Held 2009, https://doi.org/10.1111/j.1541-0420.2009.01191.x) and R changes F at the counts.

    Attributes:
        old, new: R maps Φ(``old``) to Φ(``new``), both ``[pieces + 1]`` and increasing.
        num_tasks: the tasks on which it was learned.
        kind: ``"real"`` or ``"count"``.
    """

    old: Tensor
    new: Tensor
    num_tasks: int
    kind: str = "real"

    def __str__(self) -> str:
        return f"Isotonic({len(self.new) - 1} pieces), from {self.num_tasks} tasks"

    def _check(self, posterior: Posterior) -> None:
        self._same_kind(posterior, self.kind)

    def of_normal(self, z: Tensor) -> Tensor:
        """Φ⁻¹(R(Φ(z)))."""
        return interpolate(z, self.old, self.new)[0]

    def quantile(self, u: Tensor, base: BaseForecast) -> Tensor:
        """F⁻¹(R⁻¹(u))."""
        z = interpolate(torch.special.ndtri(u), self.new, self.old)[0]
        return base.at_normal(z)

    def before(self, y: Tensor, base: BaseForecast) -> Tensor:
        """F⁻¹(R(F(y)))."""
        return base.at_normal(self._map(y, base)[1])

    def log_jacobian(self, y: Tensor, base: BaseForecast, log_density: Any, log_before: Tensor) -> Tensor:
        """log R′(F(y)) + log F′(y) − log F′(before)."""
        old, new, slope = self._map(y, base)
        log_slope = slope.log() + 0.5 * (old.square() - new.square())
        return log_slope + log_density(y) - log_before

    def _map(self, y: Tensor, base: BaseForecast) -> tuple[Tensor, Tensor, Tensor]:
        """Φ⁻¹(F(y)), what it becomes, and the slope there."""
        old = base.normal(y)
        return old, *interpolate(old, self.old, self.new)


@dataclass(frozen=True, eq=False)
class Conformal(Recalibration):
    """Intervals m ± s q of a new task that cover with at least their nominal probability, in finite samples.

    With |y − m| / s as the score of a point (m, s: mean and standard deviation of its predictive), the score of a point
    of a new task is at most q(ℓ) with probability at least ℓ, where q(ℓ) is the ℓ quantile of Σ_k Σ_i δ(score_ki) /
    ((K + 1) n_k) + δ(∞) / (K + 1) over K validation tasks of n_k points. The probability is over all K + 1 tasks, which
    are taken to be exchangeable: drawn alike, adapted alike by one method that saw none of them. Source: Y. Lee, R. F.
    Barber, R. Willett, "Distribution-free inference with hierarchical data", 2023, https://arxiv.org/abs/2306.06342,
    section 3 (hierarchical conformal prediction). It says nothing of a given task, or a given x. Of counts s² is the
    variance and 1/12, that of a number within its count, so that it is never 0; the ends are counts.

    :meth:`interval` has that guarantee. Of counts it is all there is. Of real numbers, called on a posterior, it
    gives a predictive whose central intervals are these at ``num_bins`` levels, and between them and beyond follows a
    Normal: for scores, pictures and calibration, without a guarantee.

    Attributes:
        scores, weights: sorted scores of the validation points, and their weights 1 / ((K + 1) n_k), ``[points]``.
        radius, stretched: that many standard deviations of a Normal become so many, ``[knots]``, from 0.
        num_tasks: K.
        kind: ``"real"`` or ``"count"``.
    """

    scores: Tensor
    weights: Tensor
    radius: Tensor
    stretched: Tensor
    num_tasks: int
    kind: str = "real"
    by_moments: ClassVar[bool] = True

    def _check(self, posterior: Posterior) -> None:
        self._same_kind(posterior, self.kind)
        if self.kind == "count":
            raise UnsupportedError(
                "Conformal correction of counts gives intervals and no distribution: call its interval(). For "
                "forecasts take how='temperature' or 'isotonic'."
            )

    def __str__(self) -> str:
        return f"Conformal, from {self.num_tasks} tasks: 90% intervals are mean ± {self.factor(0.9):.4g} s.d."

    def factor(self, level: float) -> float:
        """q(level): half the width of an interval, in standard deviations; infinite for a level above K / (K + 1).

        Raises:
            OptionError: for a level outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise OptionError(f"level={level}; expected a number between 0 and 1, both excluded.")
        return weighted_quantile(self.scores, self.weights, level)

    @torch.no_grad()
    def interval(
        self,
        posterior: Posterior,
        observations: Observations,
        level: float = 0.9,
        *,
        num_samples: int = 1000,
        generator: Seed = None,
    ) -> tuple[Tensor, Tensor]:
        """Interval of y at each input, which covers with probability ``level`` at least.

        Args:
            posterior: of the new tasks.
            observations: of these tasks; y is not looked at.
            level: in (0, 1); above K / (K + 1) the interval is infinite.
            num_samples, generator: as at the validation tasks, where there is no closed form.

        Returns:
            Its lower and upper end, ``[tasks, shots]``, both within it, in the units of y of the batch; of counts
            they are counts.

        Raises:
            OptionError: for a level outside (0, 1).
            UnsupportedError: for targets of another kind than those it was learned on.
            ShapeError, NonFiniteDataError: for other tasks or inputs, and forecasts that are not finite.
        """
        self._same_kind(posterior, self.kind)
        check_same_tasks(posterior, observations)
        mean, scale = moments(Predictor(posterior, num_samples, generator), observations)
        check_finite(mean + scale, observations.full_mask(), "forecast", [str(i) for i in range(len(mean))])
        half = self.factor(level) * scale
        if self.kind == "count":
            # rounding must not take away the end on which a count lies that was as far off as the factor says
            slack = 1e-9 * (1.0 + mean)
            return (mean - half - slack).ceil().clamp(min=0.0), (mean + half + slack).floor()
        return mean - half, mean + half

    def quantile(self, u: Tensor, base: BaseForecast) -> Tensor:
        """m + s g(z), z the Normal quantile at u."""
        z = torch.special.ndtri(u)
        return base.loc + base.scale * z.sign() * interpolate(z.abs(), self.radius, self.stretched)[0]

    def before(self, y: Tensor, base: BaseForecast) -> Tensor:
        """F⁻¹(Φ(z)), with z = g⁻¹((y − m) / s)."""
        score = (y - base.loc) / base.scale
        z = interpolate(score.abs(), self.stretched, self.radius)[0]
        return base.at_normal(z * score.sign())

    def log_jacobian(self, y: Tensor, base: BaseForecast, log_density: Any, log_before: Tensor) -> Tensor:
        """log φ(z) + log g⁻¹′ − log s − log F′(before)."""
        z, slope = interpolate(((y - base.loc) / base.scale).abs(), self.stretched, self.radius)
        return slope.log() - log_score_normal(torch.zeros_like(z), base.scale, z * base.scale) - log_before


def moments(predictor: Predictor, observations: Observations) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the predictive, float64, in the shape of y; of counts see :class:`Conformal`."""
    parts = normal_parts(predictor.posterior, observations)
    if parts is not None:
        return parts
    forecast = predictor.forecast(observations)
    assert not isinstance(forecast, NormalForecast)
    if forecast.counts:
        return forecast.mean, (forecast.draws.var(0) + 1 / 12).sqrt()
    return forecast.mean, forecast.draws.std(0)


def weighted_quantile(scores: Tensor, weights: Tensor, level: float) -> float:
    """The smallest sorted score up to which the weights reach ``level``; infinite where they do not."""
    place = int(torch.searchsorted(weights.cumsum(0), level - 1e-12))
    return float(scores[place]) if place < len(scores) else math.inf


def interpolate(value: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Piecewise linear function through increasing knots, and its slope; beyond the ends it goes on as it was."""
    x, y = x.to(value.device), y.to(value.device)
    place = torch.bucketize(value.contiguous(), x[1:-1], right=True)
    slope = y.diff() / x.diff()
    return y[place] + slope[place] * (value - x[place]), slope[place]
