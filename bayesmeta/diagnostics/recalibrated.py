"""A posterior whose predictions were recalibrated: it answers as any posterior does."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.checks import in_words
from bayesmeta.diagnostics.recalibrated_counts import CountForecast, NormalMap, count_forecast
from bayesmeta.errors import NoClosedFormError, UnsupportedError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior, TargetKind

#: Of the draws that give the moments of the predictive.
_STREAM = "moments of the predictive"
_WITHIN = "places within a count"
_ENOUGH = 200  # draws of y that F is made of at least, where there is no closed form


class BaseForecast:
    """The predictive of the posterior that is recalibrated, at some inputs: Normal, or that of draws.

    Args:
        loc, scale: mean and standard deviation, ``[tasks, shots, …]``.
        draws: sorted along the first dimension, ``[n, tasks, shots, …]``; None for a Normal.
    """

    def __init__(self, loc: Tensor, scale: Tensor, draws: Tensor | None = None) -> None:
        self.loc, self.scale, self.sorted = loc, scale, draws

    def cdf(self, y: Tensor) -> Tensor:
        """F(y); of draws the middle of the step, so that it is never 0 or 1."""
        if self.sorted is None:
            return torch.special.ndtr((y - self.loc) / self.scale)
        return ((self.sorted < y).sum(0).double() + 0.5) / (len(self.sorted) + 1)

    def normal(self, y: Tensor) -> Tensor:
        """Φ⁻¹(F(y)), of a Normal however far out."""
        if self.sorted is None:
            return (y - self.loc) / self.scale
        return torch.special.ndtri(inside(self.cdf(y)))

    def at_normal(self, z: Tensor) -> Tensor:
        """F⁻¹(Φ(z))."""
        if self.sorted is None:
            return self.loc + self.scale * z
        return self.quantile(inside(torch.special.ndtr(z)))

    def quantile(self, u: Tensor) -> Tensor:
        """F⁻¹(u) for u in (0, 1), ``[…, tasks, shots]``; of draws, none beyond the outermost of them."""
        if self.sorted is None:
            return self.loc + self.scale * torch.special.ndtri(u)
        n = len(self.sorted)
        position = (u * n - 0.5).clamp(0, n - 1)
        low = position.floor().long().clamp(max=max(n - 2, 0))
        shape = (-1, *self.sorted.shape[1:])
        below, above = (self.sorted.gather(0, i.reshape(shape)) for i in (low, (low + 1).clamp(max=n - 1)))
        return torch.lerp(below, above, (position - low).reshape(shape)).reshape(u.shape)


class Map(Protocol):
    """What turns the predictive F of each point into another, F̃.

    Attributes:
        by_moments: F̃ depends on the mean and the standard deviation of F alone.
    """

    by_moments: bool

    def posterior_predictive(self, distribution: Any, joint: bool) -> Any:
        """F̃ in closed form, given F in closed form; NoClosedFormError where there is none."""

    def quantile(self, u: Tensor, base: BaseForecast) -> Tensor:
        """F̃⁻¹(u)."""

    def before(self, y: Tensor, base: BaseForecast) -> Tensor:
        """F⁻¹(F̃(y)): what became y."""

    def log_jacobian(self, y: Tensor, base: BaseForecast, log_density: Any, log_before: Tensor) -> Tensor:
        """log of the derivative of :meth:`before`, ``[tasks, shots]``.

        ``log_density`` gives the log of the density of F at a y, and ``log_before`` is that at ``before(y)``.
        """

    def of_normal(self, z: Tensor) -> Tensor:
        """Of counts, Φ⁻¹(F̃(k)) given z = Φ⁻¹(F(k))."""


class RefusedError(UnsupportedError, AttributeError):
    """What a recalibrated posterior lost of the original; to ``hasattr`` it is not there."""


class RecalibratedPosterior:
    """A posterior with other predictions of the same φ. Made by calling a :class:`~bayesmeta.Recalibration`.

    With F the predictive of a point and F̃ the recalibrated one, a draw y becomes F̃⁻¹(F(y)): each point has F̃, and how
    the points of a task hang together stays as it was. φ, its prior and its draws are those of the posterior that was
    recalibrated; ``log_likelihood`` is that of the new predictive, whose mean over the draws is its density, so that
    log scores are right; it is no likelihood of φ, and leave-one-out of it means nothing.

    It is a posterior in the sense of the diagnostics: :func:`~bayesmeta.scores`, :func:`~bayesmeta.calibration`,
    :func:`~bayesmeta.to_datatree` and the plots take it, and it can be recalibrated again (but of counts). It is no
    Pyro guide, is not saved and has no densities: what it refuses raises an
    :class:`~bayesmeta.errors.UnsupportedError`.

    Args:
        posterior: what is recalibrated; of classes for a temperature.
        map: from the predictive to the recalibrated one.
    """

    #: why :func:`~bayesmeta.loo` refuses it
    loo_refusal = (
        "A recalibrated posterior has no leave-one-out score: its predictions are not the likelihood that it was "
        "conditioned on. Take the posterior that was recalibrated, or score the query with bayesmeta.scores."
    )

    def __init__(self, posterior: Posterior, map: Map) -> None:
        check_not_twice(posterior)
        self.posterior, self.map = posterior, map
        self._prior: Any = None

    # -- refused ------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Say why something that the original has is not there; else as any object does."""
        original = self.__dict__.get("posterior")
        if name.startswith("_") or original is None or not hasattr(original, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise RefusedError(
            f"A recalibrated posterior has no {name}: only the predictions of the {type(original).__name__} were "
            f"changed, and they belong to no density of φ. Take .posterior.{name} of the one that was recalibrated."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it is no Pyro guide."""
        raise UnsupportedError(
            "A recalibrated posterior is no Pyro guide: its predictions are not those of the model under draws of φ. "
            "Call its .posterior, the one that was recalibrated."
        )

    # -- as it was ----------------------------------------------------------------------------------------------

    @property
    def support(self) -> Observations:
        """What was conditioned on."""
        return self.posterior.support

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return self.posterior.num_tasks

    @property
    def is_point(self) -> bool:
        """Whether φ is a point."""
        return self.posterior.is_point

    @property
    def num_draws(self) -> int | None:
        """As of the posterior that was recalibrated."""
        return self.posterior.num_draws

    @property
    def target_kind(self) -> TargetKind:
        """What y is."""
        return self.posterior.target_kind

    def draws(self, num_samples: int, generator: Seed = None) -> Any:
        """Draw φ."""
        return self.posterior.draws(num_samples, generator)

    def prior_draws(self, num_samples: int, generator: Seed = None) -> Any:
        """Draw φ from its prior; predictions from these are recalibrated too."""
        self._prior = self.posterior.prior_draws(num_samples, generator)
        return self._prior

    def named(self, draws: Any) -> dict[str, Tensor]:
        """Named φ of draws."""
        return self.posterior.named(draws)

    def named_theta(self, draws: Any) -> dict[str, Tensor]:
        """Named global sites of draws."""
        return self.posterior.named_theta(draws)

    def log_prior(self, draws: Any, *, jacobian: bool = True) -> Tensor:
        """log p(φ | θ), ``[n, tasks]``."""
        return self.posterior.log_prior(draws, jacobian=jacobian)

    def log_theta(self, draws: Any, *, jacobian: bool = True) -> Tensor:
        """log p(θ), ``[n]``."""
        return self.posterior.log_theta(draws, jacobian=jacobian)

    # -- recalibrated -------------------------------------------------------------------------------------------

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The recalibrated predictive in closed form.

        Raises:
            NoClosedFormError: where there is none.
        """
        return self.map.posterior_predictive(self.posterior.predictive(x, joint=joint), joint)

    def predict(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Any = None,
        generator: Seed = None,
    ) -> Tensor:
        """Draws of y, ``[n, tasks, shots, …]``."""
        observations = self._observations(x)
        generator = as_generator(generator, observations.device, "predictions")
        draws = self.draws(num_samples, generator) if draws is None else draws
        y = self.posterior.predict(observations, num_samples, draws=draws, generator=generator)
        if y.numel() == 0:
            return y
        if self.target_kind == "count":
            return self._predict_counts(observations, draws, y)
        base = self._base(observations, draws, y)
        if base.sorted is None:
            u = torch.special.ndtr((y.double() - base.loc) / base.scale)
        else:
            ranks = torch.searchsorted(base.sorted.movedim(0, -1).contiguous(), y.double().movedim(0, -1).contiguous())
            ranks = ranks.movedim(-1, 0)
            if self.map.by_moments:  # the middles of the steps are spread too evenly to be draws of F̃
                u = torch.rand(base.sorted.shape, generator=generator, dtype=torch.float64, device=y.device)
                u = u.sort(0).values.gather(0, ranks)
            else:  # the draw itself comes back from its quantile
                u = (ranks.double() + 0.5) / len(base.sorted)
        tiny = 1e-15  # an end of (0, 1) would become infinite
        return self.map.quantile(u.double().clamp(tiny, 1 - tiny), base).to(y.dtype)

    def log_likelihood(self, observations: Observations, *, draws: Any = None, num_samples: int = 1000) -> Tensor:
        """log of the recalibrated density of each observation under each draw, ``[n, tasks, shots]``; 0 where masked.

        Its mean over the draws (of the exponential) is F̃'s density at y.
        """
        draws = self.draws(num_samples) if draws is None else draws
        if self.target_kind == "class":
            return self._log_classes(observations, draws)[0]
        if self.target_kind == "count":
            return self._log_counts(observations, draws)
        assert observations.y is not None
        y = observations.y.double()
        base = self._base(observations, draws)
        mask = observations.full_mask()

        def each(value: Tensor) -> Tensor:
            at = observations.with_y(value.to(observations.y.dtype))  # type: ignore[union-attr]
            return self.posterior.log_likelihood(at, draws=draws).double()

        def log_density(value: Tensor) -> Tensor:
            if base.sorted is None:
                return torch.distributions.Normal(base.loc, base.scale).log_prob(value)
            return _log_mean(each(value))

        before = self.map.before(y, base)
        values = each(before)
        log_before = log_density(before) if base.sorted is None else _log_mean(values)
        return torch.where(mask, values + self.map.log_jacobian(y, base, log_density, log_before), 0.0)

    def class_probabilities(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Any = None,
        generator: Seed = None,
    ) -> Tensor:
        """p(y = k | x, S) after recalibration, ``[tasks, shots, classes]``."""
        observations = self._observations(x)
        draws = self.draws(1 if self.is_point else num_samples, generator) if draws is None else draws
        return self._log_classes(observations, draws)[1].exp().mean(0).movedim(0, -1)

    # -- inside -------------------------------------------------------------------------------------------------

    def _observations(self, x: Tensor | Observations) -> Observations:
        return x.with_y(None) if isinstance(x, Observations) else Observations(x, w=self.support.w)

    def _base(self, observations: Observations, draws: Any, y: Tensor | None = None) -> BaseForecast:
        """F at these inputs: in closed form, unless φ comes from the prior; else from draws of y."""
        if draws is not self._prior:
            parts = normal_parts(self.posterior, observations)
            if parts is not None:
                return BaseForecast(*parts)
        bare, generator = observations.with_y(None), as_generator(0, observations.device, _STREAM)
        if y is None:
            y = self.posterior.predict(bare, draws=draws, generator=generator)
        if len(y) < _ENOUGH:  # F is of the point, not of the few draws that someone asks for
            source = self.posterior.prior_draws if draws is self._prior else self.posterior.draws
            more = source(_ENOUGH - len(y), generator)
            y = torch.cat([y, self.posterior.predict(bare, draws=more, generator=generator)])
        y = y.double().sort(0).values
        return BaseForecast(y.mean(0), y.std(0), y)

    def _counts(self, observations: Observations, draws: Any, change: NormalMap | None = None) -> CountForecast:
        def each(at: Observations) -> Tensor:
            return self.posterior.log_likelihood(at, draws=draws)

        return count_forecast(self.posterior, observations, draws, each, change=change)

    def _predict_counts(self, observations: Observations, draws: Any, y: Tensor) -> Tensor:
        """A draw y becomes F̃⁻¹ of its randomised PIT."""
        forecast = self._counts(observations.with_y(y.amax(0)), draws, self.map.of_normal)
        generator = as_generator(0, y.device, _WITHIN)
        uniform = torch.rand(y.shape, generator=generator, dtype=torch.float64, device=y.device)
        return forecast.quantile(forecast.pit(y, uniform), self.map.of_normal).to(y.dtype)

    def _log_counts(self, observations: Observations, draws: Any) -> Tensor:
        assert observations.y is not None
        values = self.posterior.log_likelihood(observations, draws=draws).double()
        mask = observations.full_mask()
        y = torch.where(mask, observations.y, 0)
        after, before = self._counts(observations, draws).log_prob(y, self.map.of_normal), _log_mean(values)
        # a count that every draw deems impossible has its new probability under each of them
        new = torch.where(before == -math.inf, after, values + (after - before))
        return torch.where(mask, new, 0.0)

    def _log_classes(self, observations: Observations, draws: Any) -> tuple[Tensor, Tensor]:
        """log p̃(y | x, φ) ``[n, tasks, shots]`` (of class 0 without y), and that of every class ``[n, classes, …]``."""
        temperature = getattr(self.map, "value", 1.0)
        logits = class_log_likelihoods(self.posterior, observations, draws) / temperature
        every = logits.log_softmax(1)
        if observations.y is None:
            return every[:, 0], every
        index = observations.y.long().expand(len(every), 1, *observations.y.shape)
        chosen = every.gather(1, index).squeeze(1)
        return torch.where(observations.full_mask(), chosen, 0.0), every


def check_not_twice(posterior: Posterior) -> None:
    """Check that forecasts are no counts that were recalibrated before: a table of tables would take too long.

    Raises:
        UnsupportedError: if they are.
    """
    if isinstance(posterior, RecalibratedPosterior) and posterior.target_kind == "count":
        raise UnsupportedError(
            "Forecasts of counts are recalibrated once; recalibrate the posterior that this one was made of, or take "
            "how='conformal' for intervals."
        )


def class_log_likelihoods(posterior: Posterior, observations: Observations, draws: Any) -> Tensor:
    """log p(y = k | x, φ) under each draw, ``[n, classes, tasks, shots]``.

    Raises:
        UnsupportedError: for several outputs, whose log-likelihood is that of all together.
    """
    with in_words():
        first = posterior.class_probabilities(Observations(observations.x[:, :1], w=observations.w), 2)
    if first.dim() != 3:
        raise UnsupportedError("Classes of several outputs cannot be recalibrated; recalibrate each output alone.")
    like = observations.x[..., 0]
    values = []
    for k in range(first.shape[-1]):
        every = Observations(observations.x, torch.full_like(like, float(k)), None, observations.w)
        with in_words():
            values.append(posterior.log_likelihood(every, draws=draws).double())
    return torch.stack(values, 1)


def normal_parts(posterior: Posterior, observations: Observations) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of a predictive that is Normal in closed form, float64; else None."""
    try:
        with in_words():
            closed = posterior.predictive(observations.with_y(None))
    except NoClosedFormError:
        return None
    shape = closed.batch_shape + closed.event_shape
    while isinstance(closed, torch.distributions.Independent):
        closed = closed.base_dist
    if not isinstance(closed, torch.distributions.Normal):
        return None
    return closed.loc.expand(shape).double(), closed.scale.expand(shape).double()


def inside(u: Tensor) -> Tensor:
    """u inside (0, 1), where quantiles are finite."""
    return u.clamp(1e-15, 1.0 - 1e-15)


def _log_mean(values: Tensor) -> Tensor:
    return values.logsumexp(0) - math.log(len(values))
