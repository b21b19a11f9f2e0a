"""Predictions of y at given inputs, in closed form where the posterior has one, else from draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.diagnostics.checks import check_batch, check_same_support, check_same_tasks, in_words
from bayesmeta.diagnostics.metrics import brier_score, crps_ensemble, crps_normal
from bayesmeta.errors import DataError, EmptyTaskError, NoClosedFormError, NonFiniteDataError, OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior

#: Draws × tasks × points that are evaluated in one call; more goes in slices of the points, to bound the memory.
MAX_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class NormalForecast:
    """Normal marginals.

    Attributes:
        loc, scale: float64, ``[tasks, shots]`` or ``[tasks, shots, outputs]``.
    """

    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        """Predictive mean, in the shape of y."""
        return self.loc

    @property
    def spread(self) -> Tensor:
        """A number that is finite exactly where the forecast's width is."""
        return self.scale

    def quantile(self, probability: float) -> Tensor:
        """Quantile of each marginal, in the shape of y."""
        return self.loc + self.scale * (math.sqrt(2.0) * _erfinv(2.0 * probability - 1.0))

    def crps(self, y: Tensor) -> Tensor:
        """Continuous ranked probability score, see :func:`~bayesmeta.diagnostics.metrics.crps_normal`."""
        return crps_normal(self.loc, self.scale, y)

    def pit(self, y: Tensor, uniform: Tensor) -> Tensor:
        """F(y), in the shape of y; at a point mass (scale 0) F(y−) + U (F(y) − F(y−)), with uniform numbers U."""
        residual = y - self.loc
        below, reached = (residual > 0).to(residual.dtype), (residual >= 0).to(residual.dtype)
        step = below + uniform * (reached - below)
        positive = torch.where(self.scale == 0, 1.0, self.scale)
        return torch.where(self.scale == 0, step, torch.special.ndtr(residual / positive))


@dataclass(frozen=True)
class SampleForecast:
    """Marginals from draws.

    Attributes:
        draws: float64 and sorted along the first dimension, ``[n, tasks, shots, …]``.
        counts: whether y is a count, so that quantiles are counts too.
    """

    draws: Tensor
    counts: bool = False

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the draws, in the shape of y."""
        return self.draws.mean(0)

    @property
    def spread(self) -> Tensor:
        """A number that is finite exactly where the forecast's width is."""
        return self.draws[-1] - self.draws[0]

    def quantile(self, probability: float) -> Tensor:
        """Quantile of the draws, in the shape of y.

        Real numbers: by linear interpolation (type 7 of Hyndman & Fan 1996). Counts: the smallest count that at least
        this share of the draws do not exceed (type 1), so that an interval between two of them holds at least its
        nominal share.
        """
        if self.counts:  # the small shift: 0.95 · 1000 may come out above 950
            rank = math.ceil(probability * self.draws.shape[0] - 1e-9)
            return self.draws[max(rank, 1) - 1]
        position = probability * (self.draws.shape[0] - 1)
        low = math.floor(position)
        high = min(low + 1, self.draws.shape[0] - 1)
        return torch.lerp(self.draws[low], self.draws[high], position - low)

    def crps(self, y: Tensor) -> Tensor:
        """Fair estimate of the CRPS, see :func:`~bayesmeta.diagnostics.metrics.crps_ensemble`."""
        return crps_ensemble(self.draws, y, in_order=True)

    def pit(self, y: Tensor, uniform: Tensor) -> Tensor:
        """(draws below y + U (draws equal to y + 1)) / (n + 1), in the shape of y, with uniform numbers U.

        Uniform, for any number of draws, wherever y comes from the distribution of the draws. Of counts it is the
        randomised PIT of C. Czado, T. Gneiting, L. Held, "Predictive model assessment for count data", Biometrics 65
        (2009), eq. 1 in its randomised form, https://doi.org/10.1111/j.1541-0420.2009.01191.x.
        """
        below, equal = (self.draws < y).sum(0), (self.draws == y).sum(0)
        return (below + uniform * (equal + 1)) / (self.draws.shape[0] + 1)  # in the dtype of the uniform numbers


@dataclass(frozen=True)
class ClassForecast:
    """Probabilities of classes.

    Attributes:
        probabilities: float64, ``[tasks, shots, classes]`` or ``[tasks, shots, outputs, classes]``.
    """

    probabilities: Tensor

    def accuracy(self, y: Tensor) -> Tensor:
        """1 where the most probable class (the first of several) is that of y, else 0, in the shape of y."""
        return (self.probabilities.argmax(-1) == y).to(self.probabilities.dtype)

    def brier(self, y: Tensor) -> Tensor:
        """Brier score, in the shape of y, see :func:`~bayesmeta.diagnostics.metrics.brier_score`."""
        return brier_score(self.probabilities, y)


def _erfinv(value: float) -> float:
    return float(torch.erfinv(torch.tensor(value, dtype=torch.float64)))


class Predictor:
    """Predictions of one posterior, all from one set of draws of φ, made when first needed.

    Args:
        posterior: the posterior.
        num_samples: draws of φ, and of y.
        generator: generator or seed; None means seed 0.
        prior: draw from the prior p(φ | θ, w) instead.

    Raises:
        OptionError: for fewer than 2 draws.
    """

    def __init__(self, posterior: Posterior, num_samples: int, generator: Seed, *, prior: bool = False) -> None:
        if num_samples < 2:
            raise OptionError(f"num_samples={num_samples}; expected at least 2 draws.")
        self.posterior = posterior
        self.num_samples = num_samples
        self.generator = as_generator(generator, posterior.support.device, "predictions")
        self.used_draws = False
        self.prior = prior

    @cached_property
    def draws(self) -> Any:
        """Draws of φ (and θ)."""
        self.used_draws = True
        source = self.posterior.prior_draws if self.prior else self.posterior.draws
        with in_words():
            return source(self.num_samples, self.generator)

    def closed_form(self, observations: Observations, *, joint: bool = False) -> Any | None:
        """The predictive distribution at the inputs of observations, or None where there is no closed form."""
        try:
            with in_words():
                return self.posterior.predictive(observations.with_y(None), joint=joint)
        except NoClosedFormError:
            return None

    def _slices(self, observations: Observations) -> list[Observations]:
        size = max(MAX_ELEMENTS // max(self.num_samples * observations.num_tasks, 1), 1)
        return [observations.points(slice(i, i + size)) for i in range(0, observations.shots, size)]

    def forecast(self, observations: Observations) -> NormalForecast | SampleForecast:
        """Marginal forecasts of real numbers or counts at the inputs of observations, float64."""
        closed = self.closed_form(observations)
        parts = None if closed is None else _normal_parts(closed)
        if parts is not None:
            shape = closed.batch_shape + closed.event_shape  # type: ignore[union-attr]
            return NormalForecast(*(part.expand(shape).double() for part in parts))
        counts = self.posterior.target_kind == "count"
        return SampleForecast(self.predict(observations).double().sort(0).values, counts)

    def class_forecast(self, observations: Observations) -> ClassForecast:
        """Probabilities of the classes at the inputs of observations, float64."""
        exact = self.posterior.is_point or self.closed_form(observations) is not None
        draws = None if exact else self.draws
        with in_words():
            parts = [
                self.posterior.class_probabilities(part.with_y(None), draws=draws)
                for part in self._slices(observations)
            ]
        return ClassForecast(torch.cat(parts, 1).double())

    def predict(self, observations: Observations) -> Tensor:
        """Draws of y at the inputs of observations, ``[n, tasks, shots, …]``."""
        with in_words():
            parts = [
                self.posterior.predict(part.with_y(None), self.num_samples, draws=self.draws, generator=self.generator)
                for part in self._slices(observations)
            ]
        return torch.cat(parts, 2)

    def log_likelihood(self, observations: Observations) -> Tensor:
        """log p(y | x, φ) under each draw, float64, ``[n, tasks, shots]``."""
        with in_words():
            parts = [self.posterior.log_likelihood(o, draws=self.draws).double() for o in self._slices(observations)]
        return torch.cat(parts, 2)


def _normal_parts(distribution: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of a Normal, or of independent ones; None for another distribution."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    if isinstance(distribution, torch.distributions.Normal):
        return distribution.loc, distribution.scale
    return None


def task_names(batch: TaskBatch) -> list[str]:
    """A name for each task: the batch's own, else its id, else its place."""
    if batch.names is not None:
        return list(batch.names)
    if batch.task_id is not None:
        return [str(i) for i in batch.task_id.tolist()]
    return [str(i) for i in range(batch.num_tasks)]


def valid_points(posterior: Posterior, batch: Any, what: str) -> Tensor:
    """Check that predictions of a query can be judged.

    Args:
        posterior: adapted to the batch's support.
        batch: a TaskBatch whose query has targets.
        what: for the message, as in "Scores need".

    Returns:
        True for real query points of real tasks, ``[tasks, shots]``.

    Raises:
        OptionError, ShapeError, DataError, NonFiniteDataError: for what is no batch, of other tasks, without targets,
            not finite.
        EmptyTaskError: when no task has a query point.
    """
    check_batch(batch)
    check_same_tasks(posterior, batch.query)
    check_same_support(posterior, batch)
    if batch.query.y is None:
        raise DataError(f"{what} the targets of the query; this batch has query.y=None.")
    batch.query.check()
    valid, real = batch.query.full_mask(), batch.real_tasks()
    valid = valid if real is None else valid & real.unsqueeze(-1)
    if not bool(valid.any()):
        raise EmptyTaskError(f"{what} at least one task with a query point; this batch has none.")
    return valid


def check_classes(y: Tensor, classes: int, names: list[str]) -> None:
    """Check that targets are indices of classes.

    Raises:
        DataError: naming the first target at fault.
    """
    bad = ((y < 0) | (y >= classes) | (y % 1 != 0)).nonzero()
    if len(bad):
        task, shot = bad[0].tolist()[:2]
        raise DataError(
            f"y = {y[task, shot].tolist()} of task {names[task]}, query point {shot} (counted from 0) is outside the "
            f"support of the likelihood, which has the classes 0 to {classes - 1}. Code the classes so."
        )


def check_draws(sites: dict[str, Tensor], real: Tensor, names: list[str]) -> None:
    """Check that draws of φ are finite where tasks count.

    Args:
        sites: draws by name, each ``[n, tasks, …]``.
        real: True for tasks that count, ``[tasks]``.
        names: a name for each task.

    Raises:
        NonFiniteDataError: naming the first site and task at fault.
    """
    for site, value in sites.items():
        bad = (~torch.isfinite(value)).transpose(0, 1).flatten(1).any(-1) & real
        if bool(bad.any()):
            task = int(bad.nonzero()[0, 0])
            raise NonFiniteDataError(
                f"Draws of {site!r} are not finite for task {names[task]} ({int(bad.sum())} task(s) in all). The "
                "adaptation has probably diverged: try a smaller inner learning rate or fewer inner steps, or "
                "standardise the data."
            )


def check_finite(value: Tensor, valid: Tensor, what: str, names: list[str]) -> None:
    """Check that predictions are finite where they count.

    Args:
        value: ``[tasks, shots, …]``.
        valid: ``[tasks, shots]``, True where a point counts.
        what: what the value is, for the message.
        names: a name for each task.

    Raises:
        NonFiniteDataError: naming the first task at fault.
    """
    bad = ~torch.isfinite(value)
    bad = bad.flatten(2).any(-1) if bad.dim() > 2 else bad
    bad = bad & valid
    if not bool(bad.any()):
        return
    task, shot = bad.nonzero()[0].tolist()
    raise NonFiniteDataError(
        f"The {what} is not finite for task {names[task]}, query point {shot} (counted from 0; "
        f"{int(bad.any(-1).sum())} task(s) in all). The adaptation has probably diverged: try a smaller inner "
        "learning rate or fewer inner steps, or standardise the data; an infinite log score also means that a "
        "target lies outside the support of the likelihood."
    )
