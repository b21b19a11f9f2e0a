"""Forecasts of many tasks kept as plain numbers, so that scores and corrections of all of them together are cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.errors import NoClosedFormError, ShapeError, UnsupportedError
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.posteriors.prior_mixture import ListMixture
from bayesmeta.protocols import TargetKind

#: Tasks that are adapted at a time, to bound the memory.
CHUNK = 100
#: Levels of the coverage curves.
LEVELS = tuple(i / 20 for i in range(1, 20))


class KeptForecasts:
    """A posterior whose draws of φ are given by what they forecast: Normals at the points of one query.

    It is what every diagnostic reads of a posterior, but for φ itself. Its :attr:`batch` has the numbers of the query's
    points, 0, 1, …, in place of their inputs.

    Args:
        batch: of the tasks.
        loc, scale: of the Normal that each draw of φ gives each point, ``[n, tasks, shots]``; n = 1: the predictive
            itself.
        closed: the predictive in closed form where it is not Normal, of runs of tasks one after the other.
    """

    target_kind: TargetKind = "real"
    num_draws: int | None = None

    def __init__(self, batch: bm.TaskBatch, loc: Tensor, scale: Tensor, closed: Sequence[Any] | None = None) -> None:
        place = torch.arange(loc.shape[-1], dtype=loc.dtype).expand(loc.shape[1:]).unsqueeze(-1)
        query = bm.Observations(place, batch.query.y, batch.query.mask)
        support = bm.Observations(batch.support.x, batch.support.y, batch.support.mask)
        self.batch = bm.TaskBatch(support, query, standardizer=batch.standardizer)
        self.support, self.loc, self.scale, self.closed = support, loc, scale, closed
        self.is_point = len(loc) == 1

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return self.loc.shape[1]

    def draws(self, num_samples: int, generator: Seed = None) -> Tensor:
        """Which of the kept draws: each in turn, from the first."""
        return torch.arange(num_samples) % len(self.loc)

    def _at(self, x: Tensor | bm.Observations, draws: Tensor) -> tuple[Tensor, Tensor]:
        place = (x.x if isinstance(x, bm.Observations) else x)[0, :, 0].long()
        if len(place) and int(place.max()) >= self.loc.shape[-1]:
            raise ShapeError("These are not the points that were kept. Give the query of this object's own batch.")
        return self.loc[draws][..., place], self.scale[draws][..., place]

    def predict(
        self, x: Tensor | bm.Observations, num_samples: int = 1000, *, draws: Any = None, generator: Seed = None
    ) -> Tensor:
        """Draws of y, ``[n, tasks, shots]``."""
        generator = as_generator(generator, stream="predictions")
        loc, scale = self._at(x, self.draws(num_samples) if draws is None else draws)
        return loc + scale * normal_like(loc, loc.shape, generator)

    def log_likelihood(self, observations: bm.Observations, *, draws: Any = None, num_samples: int = 1000) -> Tensor:
        """log p(y | x, φ), ``[n, tasks, shots]``; 0 where masked."""
        loc, scale = self._at(observations, self.draws(num_samples) if draws is None else draws)
        assert observations.y is not None
        z = (observations.y.double() - loc.double()) / scale.double()
        value = -0.5 * z.square() - scale.double().log() - 0.5 * math.log(2 * math.pi)
        return torch.where(observations.full_mask(), value, 0.0)

    def predictive(self, x: Tensor | bm.Observations, *, joint: bool = False) -> Any:
        """The marginals in closed form.

        Raises:
            NoClosedFormError: where there is none, and of all points of a task together.
        """
        if joint or (self.closed is None and not self.is_point):
            raise NoClosedFormError("Only the marginals of a closed form were kept; use predict.")
        if self.closed is not None:
            return _InTurn(self.closed)
        loc, scale = self._at(x, torch.zeros(1, dtype=torch.long))
        return torch.distributions.Normal(loc[0], scale[0], validate_args=False)

    def __getattr__(self, name: str) -> Any:
        if name in ("prior_draws", "named", "named_theta", "log_prior", "class_probabilities"):
            raise UnsupportedError(f"φ was not kept, so there is no {name}.")
        raise AttributeError(name)


class _InTurn:
    """Distributions of runs of tasks, one after the other."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, self.event_shape = parts, torch.Size()
        self.batch_shape = torch.Size([sum(p.batch_shape[0] for p in parts), parts[0].batch_shape[1]])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density."""
        values = value.split([part.batch_shape[0] for part in self.parts])
        return torch.cat([part.log_prob(each) for part, each in zip(self.parts, values, strict=True)])


@torch.no_grad()
def keep(method: Any, batch: bm.TaskBatch, seed: int, num_samples: int) -> KeptForecasts:
    """Adapt to each task's support, and keep what is forecast at its query.

    Args:
        method: trained.
        batch: of any number of tasks, which are adapted :data:`CHUNK` at a time.
        seed: of the draws.
        num_samples: draws of φ, where the predictive is not Normal in closed form.
    """
    parts, closed = [], []
    for k, start in enumerate(range(0, batch.num_tasks, CHUNK)):
        part = batch.tasks(slice(start, start + CHUNK))
        generator = torch.Generator().manual_seed(1000 * seed + k)
        posterior = method.adapt(part.support, generator=generator)
        *normals, exact = _normals(posterior, part.query, num_samples, generator)
        parts.append(normals)
        closed.append(exact)
    loc, scale = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return KeptForecasts(batch, loc, scale, None if closed[0] is None else closed)


def _normals(posterior: Any, query: bm.Observations, num_samples: int, generator: Any) -> tuple[Tensor, Tensor, Any]:
    """loc and scale ``[n, tasks, shots]`` of the Normals that the forecast is a mixture of, and the mixture itself in
    closed form where it is known."""
    try:
        closed = posterior.predictive(query.with_y(None))
    except NoClosedFormError:
        closed = None
    shape = (query.num_tasks, query.shots)
    if isinstance(closed, torch.distributions.Normal):
        return closed.loc.expand(shape).unsqueeze(0), closed.scale.expand(shape).unsqueeze(0), None
    if isinstance(closed, ListMixture):  # of a Gaussian process under each of several priors, equally likely
        which = torch.arange(num_samples) % len(closed.components)
        loc = torch.stack([component.loc.expand(shape) for component in closed.components])
        scale = torch.stack([component.scale.expand(shape) for component in closed.components])
        return loc[which], scale[which], closed
    locs, scales = [], []
    for draws in posterior.draws(num_samples, generator).slices():
        fn = posterior.program.predictive(draws.u, query.with_y(None), draws.theta)
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if not isinstance(fn, torch.distributions.Normal):
            raise UnsupportedError(f"The likelihood is {type(fn).__name__}; expected a Normal.")
        locs.append(fn.loc.expand(draws.num_samples, *shape))
        scales.append(fn.scale.expand(draws.num_samples, *shape))
    return torch.cat(locs), torch.cat(scales), closed


# -- figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judged:
    """What each task says of forecasts; all float64, tasks first.

    Attributes:
        nll, crps: ``[tasks]``, in raw units.
        coverage: share of the task's points inside the central intervals at .5, .9 and :data:`LEVELS`.
        below: share of its PIT values up to each of :data:`LEVELS`.
    """

    nll: Tensor
    crps: Tensor
    coverage: Tensor
    below: Tensor

    @classmethod
    def together(cls, parts: Sequence[Judged]) -> Judged:
        """Of several folds."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def figures(self) -> dict[str, Any]:
        """Means over tasks with their standard errors, and the coverage curve."""
        root = len(self.nll) ** 0.5
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        named = {"nll": self.nll, "crps": self.crps}
        named |= {"coverage50": self.coverage[:, 0], "coverage90": self.coverage[:, 1]}
        out: dict[str, Any] = {"tasks": len(self.nll)}
        for name, each in named.items():
            out[name], out[f"{name}_error"] = float(each.mean()), float(each.std() / root)
        out["calibration_error"] = float((self.below.mean(0) - levels).square().mean().sqrt())
        out["calibration_noise"] = float((self.below - levels).square().mean().sqrt() / root)
        out["curve"], out["below"] = self.coverage[:, 2:].mean(0).tolist(), self.below.mean(0).tolist()
        return out


def pool(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The :meth:`Judged.figures` of all tasks together, from those of runs of tasks (each of two tasks or more)."""
    counts = torch.tensor([part["tasks"] for part in parts], dtype=torch.float64)
    total = float(counts.sum())

    def mean(key: str) -> Tensor:
        values = torch.tensor([part[key] for part in parts], dtype=torch.float64)
        return torch.tensordot(counts, values, 1) / total

    out: dict[str, Any] = {"tasks": int(total)}
    for name in ("nll", "crps", "coverage50", "coverage90"):
        each, error = (
            torch.tensor([part[key] for part in parts], dtype=torch.float64) for key in (name, f"{name}_error")
        )
        centre = mean(name)
        squares = (counts - 1) * counts * error.square() + counts * (each - centre).square()
        out[name], out[f"{name}_error"] = float(centre), float((squares.sum() / (total - 1) / total).sqrt())
    curve, below = mean("curve"), mean("below")
    noise = torch.tensor([part["calibration_noise"] for part in parts], dtype=torch.float64)
    out["calibration_error"] = float((below - torch.tensor(LEVELS, dtype=torch.float64)).square().mean().sqrt())
    out["calibration_noise"] = float((counts.square() * noise.square()).sum().sqrt() / total)
    return out | {"curve": curve.tolist(), "below": below.tolist()}


def judge(posterior: Any, batch: bm.TaskBatch, seed: int, num_samples: int) -> Judged:
    """Score forecasts of a query, corrected or not.

    Coverage is that of PIT values, which for draws are randomised ranks: it is exact for any number of draws, where
    intervals between quantiles of n draws are too narrow by about 2 / n of their level.
    """
    scores = bm.scores(posterior, batch, num_samples=num_samples, generator=seed).per_task
    found = bm.calibration(posterior, batch, num_samples=num_samples, generator=seed)
    assert isinstance(found, bm.Calibration)
    pit, valid = found.pit, ~found.pit.isnan()
    counts = valid.any(-1)

    def per_task(value: Tensor) -> Tensor:
        total = torch.where(valid.unsqueeze(-1), value.double(), 0.0).sum(1)
        return (total / valid.sum(-1, keepdim=True))[counts]

    levels = torch.tensor(LEVELS, dtype=torch.float64)
    central = torch.cat([torch.tensor([0.5, 0.9], dtype=torch.float64), levels])
    u = pit.unsqueeze(-1)
    covered, below = per_task((2 * u - 1).abs() <= central), per_task(u <= levels)
    return Judged(scores["nll"][counts], scores["crps"][counts], covered, below)


#: Corrections by name. The isotonic one comes after a temperature: from draws it cannot reach beyond the outermost.
WAYS = ("temperature", "isotonic", "conformal")


def correct(
    way: str, learned_on: KeptForecasts, posteriors: Sequence[KeptForecasts], seed: int, num_samples: int
) -> list[Any]:
    """Corrected forecasts, by what is learned on others."""
    options: dict[str, Any] = {"num_samples": num_samples, "generator": seed}

    def learn(how: Any, posterior: Any) -> Callable[[Any], Any]:
        return bm.recalibrate(posterior, learned_on.batch, how, **options)

    if way != "isotonic":
        correction = learn(way, learned_on)
        return [correction(each) for each in posteriors]
    first = learn("temperature", learned_on)
    second = learn("isotonic", first(learned_on))
    return [second(first(each)) for each in posteriors]
