"""Two environments with a rich mean and few tasks, their training sets, and the scores on fresh tasks.

From J. Rothfuss et al., ICML 2021 (https://arxiv.org/abs/2002.05551), as their released code has them:

- ``sinusoid``: y = βx + a sin(1.5 (x − b)) + c, β ~ N(0.5, 0.2²), a ~ U(0.7, 1.3), b ~ N(0, 0.1²), c ~ N(5, 0.1²),
  noise of standard deviation 0.1, x ~ U(−5, 5).
- ``cauchy``, in two dimensions: y = 1 + 6 / (π (1 + ‖x + 1‖²)) + 3 / (π (1 + ‖x − 2‖²)) + f(x) + noise of standard
  deviation 0.05, f a draw of a GP with covariance 0.2² exp(−‖x − x′‖²), each x_d ~ N(0, 2.5²) cut to [−7.5, 5].

Their training sets have 20 tasks of 5 points (sinusoid) and of 20 points (Cauchy); here both have 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.ops.random import as_generator

TRAIN_TASKS, SHOTS, TEST_POINTS = 20, 5, 200


def sinusoid(tasks: int, points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x ``[tasks, points, 1]`` and noisy y ``[tasks, points]``."""
    slope, shift, height = torch.randn(3, tasks, 1, generator=generator)
    amplitude = 0.7 + 0.6 * torch.rand(tasks, 1, generator=generator)
    x = -5 + 10 * torch.rand(tasks, points, generator=generator)
    y = (0.5 + 0.2 * slope) * x + amplitude * torch.sin(1.5 * (x - 0.1 * shift)) + 5 + 0.1 * height
    return x.unsqueeze(-1), y + 0.1 * torch.randn(tasks, points, generator=generator)


def cauchy(tasks: int, points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x ``[tasks, points, 2]`` and noisy y ``[tasks, points]``."""
    low, high = (0.5 * (1 + math.erf(end / 2**0.5)) for end in (-3.0, 2.0))
    uniform = low + (high - low) * torch.rand(tasks, points, 2, generator=generator, dtype=torch.float64)
    x = 2.5 * 2**0.5 * torch.erfinv(2 * uniform - 1)
    covariance = cauchy_covariance(x) + 1e-6 * torch.eye(points, dtype=torch.float64)
    noise = torch.randn(2, tasks, points, 1, generator=generator, dtype=torch.float64)
    function = 0.2 * (torch.linalg.cholesky(covariance) @ noise[0]).squeeze(-1)
    y = cauchy_mean(x) + function + 0.05 * noise[1].squeeze(-1)
    return x.float(), y.float()


def cauchy_mean(x: Tensor) -> Tensor:
    """The mean over tasks at x ``[…, 2]``."""
    bumps = [height / (math.pi * (1 + (x - at).square().sum(-1))) for height, at in ((6, -1), (3, 2))]
    return 1 + bumps[0] + bumps[1]


def cauchy_covariance(x: Tensor, other: Tensor | None = None) -> Tensor:
    """exp(−‖x − x′‖²), ``[…, N, M]``."""
    return torch.exp(-torch.cdist(x, x if other is None else other).square())


ENVIRONMENTS: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "cauchy": cauchy,
    "sinusoid": sinusoid,
}


def training_set(name: str, seed: int) -> tuple[bm.TaskBatch, bm.Standardizer]:
    """20 tasks of 5 points, standardised over them all, and how; supports of 3 points and queries of 2."""
    x, y = ENVIRONMENTS[name](TRAIN_TASKS, SHOTS, as_generator(seed, stream=f"{name} training"))
    standardizer = bm.Standardizer(x.flatten(0, 1).mean(0), x.flatten(0, 1).std(0), y.mean(), y.std())
    first, rest = cut(standardizer.apply(bm.Observations(x, y)), 3)
    return bm.TaskBatch(first, rest, population=TRAIN_TASKS), standardizer


def test_set(name: str, tasks: int, seed: int, standardizer: bm.Standardizer) -> bm.TaskBatch:
    """Fresh tasks of 5 context and 200 test points, standardised as the training set was."""
    x, y = ENVIRONMENTS[name](tasks, SHOTS + TEST_POINTS, as_generator(seed, stream=f"{name} test"))
    return bm.TaskBatch(*cut(standardizer.apply(bm.Observations(x, y)), SHOTS))


def cut(data: bm.Observations, support: int) -> tuple[bm.Observations, bm.Observations]:
    """The first points of each task, and the others."""
    y = targets(data)
    first = bm.Observations(data.x[:, :support], y[:, :support])
    return first, bm.Observations(data.x[:, support:], y[:, support:])


def targets(data: bm.Observations) -> Tensor:
    """y, which is there."""
    assert data.y is not None
    return data.y


def mean_and_cdf(posterior: Any, query: bm.Observations, draws: int = 200) -> tuple[Tensor, Tensor]:
    """The predictive mean at the query, and the predictive distribution function at its targets."""
    try:
        predictive = posterior.predictive(query)
        return predictive.mean, predictive.cdf(query.y)
    except bm.errors.NoClosedFormError:
        drawn = posterior.draws(draws, 0)
        with torch.no_grad():
            each = posterior.program.predictive(drawn.u, query, drawn.theta)
        return each.mean.mean(0), each.cdf(query.y).mean(0)


def calibration_error(cdf: Tensor) -> Tensor:
    """Of each task: the root mean square, over 20 levels from 0.05 to 0.95, of how often y lies below its quantile
    less the level; ``[tasks]`` for ``[tasks, points]``. A calibrated forecast of 200 independent points has about 0.03.
    """
    levels = torch.linspace(0.05, 0.95, 20, dtype=cdf.dtype)
    often = (cdf.unsqueeze(-1) <= levels).to(cdf).mean(-2)
    return (often - levels).square().mean(-1).sqrt()


def score(method: Any, batch: bm.TaskBatch, standardizer: bm.Standardizer, chunk: int = 50) -> dict[str, float]:
    """Means over tasks of rmse (in raw units) and calibration, and the calibration of all tasks' points together."""
    found: dict[str, list[Tensor]] = {"rmse": [], "calibration": [], "cdf": []}
    for start in range(0, batch.num_tasks, chunk):
        part = batch.tasks(slice(start, start + chunk))
        mean, cdf = mean_and_cdf(method.adapt(part.support, generator=0), part.query)
        error = (mean - targets(part.query)) * standardizer.y_scale
        found["rmse"].append(error.square().mean(-1).sqrt())
        found["calibration"].append(calibration_error(cdf))
        found["cdf"].append(cdf.flatten())
    pooled = float(calibration_error(torch.cat(found.pop("cdf")).unsqueeze(0)))
    means = {key: float(torch.cat(values).double().mean()) for key, values in found.items()}
    return means | {"pooled_calibration": pooled}
