"""What one would try first: one line for all tasks, and a line of its own for each task. Gaussian noise, real targets.

Both are ordinary least squares on the table's columns in standard units, in float64, with the predictive of a known
noise: y ~ N(a · b̂, s² (1 + a (AᵀA)⁺ aᵀ)), a = [1, x, w] (Gelman et al. 2013, Bayesian Data Analysis, §14.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError
from bayesmeta.ops.files import read_tensors, write_tensors
from bayesmeta.tasks.table import TableTasks

#: Singular values below this share of the largest count as none: a direction in which the rows do not differ.
_RANK = 1e-8


@dataclass(frozen=True, eq=False)
class Lines:
    """What the training tasks teach the two lines.

    Attributes:
        coefficients: of the pooled line, ``[outputs, D]``.
        inverse: its (AᵀA)⁺, ``[D, D]``.
        noise: its standard deviation, ``[outputs]``.
        own_noise: standard deviation within tasks, around a line for each, ``[outputs]``. A line through a new
            task's few rows has no good estimate of its own, so that this one is a help that it gets.
    """

    coefficients: Tensor
    inverse: Tensor
    noise: Tensor
    own_noise: Tensor

    @classmethod
    def fit(cls, table: TableTasks) -> Lines:
        """Fit both on all rows of the training tasks, a table in standard units."""
        flat = table.flat()
        x, y = flat.x.double(), flat.y.double().reshape(len(flat.x), -1)
        w = None if flat.w is None else flat.w.double().repeat_interleave(flat.lengths, 0)
        design = _design(x, w)
        gram_inverse, rank = _pseudo_inverse(design.mT @ design)
        coefficients = (gram_inverse @ design.mT @ y).mT
        residual = y - design @ coefficients.mT
        own, freedom = torch.zeros(y.shape[1], dtype=y.dtype), 0
        for rows in torch.arange(len(y)).split(flat.lengths.tolist()):
            inverse, own_rank = _pseudo_inverse(_gram(_design(x[rows], None)))
            part = _design(x[rows], None)
            fitted = part @ (inverse @ part.mT @ y[rows])
            own += (y[rows] - fitted).square().sum(0)
            freedom += len(rows) - own_rank
        noise = (residual.square().sum(0) / max(len(y) - rank, 1)).sqrt()
        # Where no task has rows to spare, the noise around the pooled line stands in.
        own_noise = (own / freedom).sqrt() if freedom > 0 else noise
        floor = 1e-6  # in standard units: a line through exact data still claims no infinite density
        return cls(coefficients, gram_inverse, noise.clamp_min(floor), own_noise.clamp_min(floor))

    def save(self, path: Any) -> None:
        """Write to a file of tensors."""
        write_tensors(path, dict(vars(self)))

    @classmethod
    def load(cls, path: Any) -> Lines:
        """The inverse of :meth:`save`.

        Raises:
            CheckpointError: for a file that is missing or damaged.
        """
        return cls(**read_tensors(path))

    def pooled(self, batch: TaskBatch) -> LineForecast:
        """The one line of all training rows at the query of a batch; the support is not looked at."""
        design = _design(batch.query.x.double(), batch.w)
        return self._forecast(design, self.coefficients.mT, self.inverse, self.noise, batch)

    def unpooled(self, batch: TaskBatch) -> LineForecast:
        """A line through each task's own support.

        Where the support says nothing about a direction (fewer rows than columns, an input that does not vary), the
        solution of least norm around the mean row is taken: no slope in that direction. Without a support, it is the
        pooled line.
        """
        support, y = batch.support, batch.support.y
        assert y is not None
        weight = support.full_mask().double().unsqueeze(-1)
        count = weight.sum(1, keepdim=True).clamp_min(1.0)
        y = _three(y.double())
        x_mean, y_mean = (weight * support.x.double()).sum(1, True) / count, (weight * y).sum(1, True) / count
        centred, target = weight * (support.x.double() - x_mean), weight * (y - y_mean)
        inverse, _ = _pseudo_inverse(centred.mT @ centred)
        slopes = inverse @ centred.mT @ target
        ahead = batch.query.x.double() - x_mean
        leverage = 1 / count.squeeze(-1) + ((ahead @ inverse) * ahead).sum(-1)
        mean, scale = y_mean + ahead @ slopes, self.own_noise * (1 + leverage).sqrt().unsqueeze(-1)
        pooled, seen = self.pooled(batch), (support.counts() > 0).reshape(-1, 1, 1)
        mean = torch.where(seen, mean, _three(pooled.mean))
        scale = torch.where(seen, scale, _three(pooled.scale))
        return _line_forecast(mean, scale, batch)

    def _forecast(
        self, design: Tensor, coefficients: Tensor, inverse: Tensor, noise: Tensor, batch: TaskBatch
    ) -> LineForecast:
        leverage = ((design @ inverse) * design).sum(-1, keepdim=True)
        return _line_forecast(design @ coefficients, noise * (1 + leverage).sqrt(), batch)


@dataclass(frozen=True, eq=False)
class LineForecast:
    """Independent Normal forecasts of the query in the shape of a posterior, so that ``bm.scores`` takes them.

    Attributes:
        mean, scale: ``[tasks, query]`` or ``[tasks, query, outputs]``, float64, in the units of the batch.
        support: of the batch.
    """

    mean: Tensor
    scale: Tensor
    support: Observations

    is_point = False
    num_draws = None
    target_kind = "real"

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return self.mean.shape[0]

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The forecast of the query that it was made for, point by point (the joint is that of independent points)."""
        normal = Normal(self.mean, self.scale)
        outputs = self.mean.dim() - 2
        return torch.distributions.Independent(normal, outputs + joint) if outputs + joint else normal


def _three(value: Tensor) -> Tensor:
    return value if value.dim() == 3 else value.unsqueeze(-1)


def _line_forecast(mean: Tensor, scale: Tensor, batch: TaskBatch) -> LineForecast:
    scale = scale.expand_as(mean)
    if mean.shape[-1] == 1:
        mean, scale = mean.squeeze(-1), scale.squeeze(-1)
    return LineForecast(mean, scale, batch.support)


def _design(x: Tensor, w: Tensor | None) -> Tensor:
    """``[…, rows, 1 + features + covariates]``; w ``[tasks, covariates]`` or a row each."""
    columns = [torch.ones_like(x[..., :1]), x]
    if w is not None:
        w = w.double()
        columns.append(w if x.dim() == 2 else w.unsqueeze(1).expand(*x.shape[:2], -1))
    return torch.cat(columns, -1)


def _gram(design: Tensor) -> Tensor:
    return design.mT @ design


def _pseudo_inverse(gram: Tensor) -> tuple[Tensor, int]:
    """Pseudo-inverse of AᵀA (batched), and the rank where there is one matrix."""
    if gram.shape[-1] == 0:
        raise DataError("A line needs at least one column.")
    values, vectors = torch.linalg.eigh(gram)
    keep = values > _RANK * values.amax(-1, keepdim=True).clamp_min(_RANK)
    inverse = torch.where(keep, 1 / torch.where(keep, values, 1.0), 0.0)
    rank = int(keep.sum()) if gram.dim() == 2 else 0
    return (vectors * inverse.unsqueeze(-2)) @ vectors.mT, rank
