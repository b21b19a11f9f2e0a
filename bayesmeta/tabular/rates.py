"""What one would try first with classes and counts: shares and rates of all rows, and of each task shrunk to them.

Inputs are not looked at, but for the exposure of a count. Both shrink by a strength that the training tasks choose by
their marginal likelihood, so that a task's own rows count for as much as tasks differ (Gelman et al. 2013, Bayesian
Data Analysis, §2.6 for the Gamma–Poisson and §3.4 for the Dirichlet–multinomial).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, NegativeBinomial

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.ops.files import read_tensors, write_tensors
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from bayesmeta.protocols import TargetKind
from bayesmeta.tasks.table import TableTasks

#: Strengths that are tried: pseudo-counts of classes, shapes of the Gamma.
_GRID = torch.logspace(-2, 4, 241, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Rates:
    """What the training tasks teach of classes or counts without a look at the inputs.

    Attributes:
        level: shares of the classes ``[classes]``, or the rate of each count a unit of exposure ``[outputs]``.
        strength: sum of the Dirichlet's pseudo-counts ``[1]``; of counts the shape of the Gamma ``[outputs]``.
        of_classes: which of the two.
        exposure: whether the last column of x is the exposure of a count.
    """

    level: Tensor
    strength: Tensor
    of_classes: bool
    exposure: bool

    @classmethod
    def fit(cls, table: TableTasks) -> Rates:
        """From all rows of the training tasks."""
        flat, schema = table.flat(), table.schema
        y = flat.y.reshape(len(flat.x), -1).double()
        owner = torch.arange(len(flat.lengths)).repeat_interleave(flat.lengths)

        def of_task(value: Tensor) -> Tensor:
            return torch.zeros(len(flat.lengths), value.shape[1], dtype=torch.float64).index_add_(0, owner, value)

        if schema.target == "class":
            totals = of_task(torch.nn.functional.one_hot(y[:, 0].long(), len(schema.classes)).double())
            smoothed = totals.sum(0) + 0.5  # a class that no training row has may come
            share = smoothed / smoothed.sum()
            return cls(share, _dirichlet_strength(totals, share), True, False)
        exposed = schema.exposure is not None
        totals, time = of_task(y), of_task(flat.x[:, -1:].double() if exposed else torch.ones_like(y[:, :1]))
        rate = (totals.sum(0) + 0.5) / time.sum()
        return cls(rate, _gamma_shape(totals, time, rate), False, exposed)

    def save(self, path: Any) -> None:
        """Write to a file of tensors."""
        write_tensors(path, {name: torch.as_tensor(value) for name, value in vars(self).items()})

    @classmethod
    def load(cls, path: Any) -> Rates:
        """The inverse of :meth:`save`.

        Raises:
            CheckpointError: for a file that is missing or damaged.
        """
        found = read_tensors(path)
        return cls(found["level"], found["strength"], bool(found["of_classes"]), bool(found["exposure"]))

    def pooled(self, batch: TaskBatch) -> RateForecast:
        """Of a task of which nothing is known; the support is not looked at."""
        support = batch.support
        nothing = torch.zeros(support.x.shape[:2], dtype=torch.bool, device=support.x.device)
        return self._forecast(batch, nothing)

    def own(self, batch: TaskBatch) -> RateForecast:
        """Given the targets of each task's support."""
        return self._forecast(batch, batch.support.full_mask())

    def _forecast(self, batch: TaskBatch, seen: Tensor) -> RateForecast:
        y, level, strength = batch.support.y, self.level, self.strength
        assert y is not None
        if self.of_classes:
            hits = torch.nn.functional.one_hot(torch.where(seen, y.reshape(seen.shape), 0).long(), len(level))
            pseudo = (hits * seen.unsqueeze(-1)).sum(1) + strength * level  # [tasks, classes]
            share = (pseudo / pseudo.sum(-1, keepdim=True)).unsqueeze(1)
            return RateForecast(lambda x: Categorical(share.expand(*x.shape[:2], -1)), batch.support, "class")
        outputs = y.dim() == 3
        hits = torch.where(seen.unsqueeze(-1), (y if outputs else y.unsqueeze(-1)).double(), 0.0).sum(1)
        time = torch.where(seen, self._time(batch.support.x), 0.0).sum(1, keepdim=True)
        shape, rate = strength + hits, strength / level + time  # [tasks, outputs]

        def counts(x: Tensor) -> NegativeBinomial:
            ahead = self._time(x).unsqueeze(-1)
            chance = ahead / (rate.unsqueeze(1) + ahead)
            total = shape.unsqueeze(1).expand_as(chance)
            return NegativeBinomial(total, chance) if outputs else NegativeBinomial(total[..., 0], chance[..., 0])

        return RateForecast(counts, batch.support, "count")

    def _time(self, x: Tensor) -> Tensor:
        """Exposure of each row, ``[tasks, shots]``; 1 in padding."""
        time = x[..., -1].double() if self.exposure else torch.ones(x.shape[:2], dtype=torch.float64, device=x.device)
        return torch.where(time > 0, time, 1.0)


@dataclass(frozen=True, eq=False)
class RateForecast:
    """Independent forecasts of a query in the shape of a posterior, so that ``bm.scores`` takes them.

    Attributes:
        at: the distribution of each point, from x ``[tasks, shots, features]``.
        support: of the batch.
        target_kind: "class" or "count".
    """

    at: Callable[[Tensor], Any]
    support: Observations
    target_kind: TargetKind

    is_point = False
    num_draws = None

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return self.support.num_tasks

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The forecast point by point (the joint is that of independent points)."""
        each = self.at(x.x if isinstance(x, Observations) else x)
        extra = len(each.batch_shape) - 2 + joint
        return Independent(each, extra) if extra else each

    def class_probabilities(self, x: Tensor | Observations, *, draws: Any = None) -> Tensor:
        """Probabilities of the classes, ``[tasks, shots, classes]``."""
        probabilities: Tensor = self.at(x.x if isinstance(x, Observations) else x).probs
        return probabilities

    def draws(self, num_samples: int, generator: Seed = None) -> Any:
        """There is no φ to draw; :meth:`predict` takes None."""
        return None

    def predict(
        self, x: Tensor | Observations, num_samples: int, *, draws: Any = None, generator: Seed = None
    ) -> Tensor:
        """Draws of counts, ``[n, tasks, shots, …]``: of the negative binomial."""
        each = self.at(x.x if isinstance(x, Observations) else x)
        with forked_rng(as_generator(generator, each.probs.device, "rates")):  # torch's Gamma takes no generator
            return each.sample((num_samples,))


def _dirichlet_strength(totals: Tensor, share: Tensor) -> Tensor:
    """The sum of pseudo-counts with the largest marginal likelihood of totals ``[tasks, classes]``, ``[1]``."""
    pseudo = _GRID.reshape(-1, 1, 1) * share  # [grid, 1, classes]
    each = torch.lgamma(pseudo + totals) - torch.lgamma(pseudo)
    whole = torch.lgamma(_GRID.reshape(-1, 1)) - torch.lgamma(_GRID.reshape(-1, 1) + totals.sum(-1))
    return _GRID[(each.sum(-1) + whole).sum(-1).argmax()].reshape(1)


def _gamma_shape(totals: Tensor, time: Tensor, rate: Tensor) -> Tensor:
    """The shape of the Gamma of mean ``rate`` with the largest marginal likelihood of each count, ``[outputs]``."""
    shape = _GRID.reshape(-1, 1, 1)
    inverse = shape / rate  # [grid, 1, outputs]
    log = torch.lgamma(shape + totals) - torch.lgamma(shape) + shape * inverse.log()
    log = log - (shape + totals) * (inverse + time).log()
    return _GRID[log.sum(1).argmax(0)]
