"""What a person would try on a new country: Gaussian forecasts that the meta-learners have to beat.

Each baseline is a function of the training table and a batch, both in raw units with one input (time), and gives a
:class:`~bayesmeta.demo.forecast.Forecast` of the query. It reads the support's x and y and the query's x, never the
query's y. All computing is in float64. Whatever is chosen (spreads, drift, shrinkage) is chosen on training tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.demo.forecast import Forecast
from bayesmeta.errors import DataError, EmptyTaskError, UnsupportedError
from bayesmeta.ops.gaussian import condition
from bayesmeta.tasks.table import TableTasks

#: The data are rounded to three decimals: no forecast of a single observation claims to know it better.
ROUNDING = 1e-3

_FOLDS = 5
_SHRINKAGE = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
_JITTER = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2)
_GP_STEPS = 200
# Lengthscales to start from, as shares of the span of the support; the best optimum of each task is kept.
_GP_STARTS = (0.1, 0.3, 1.0)


class _Arrays(NamedTuple):
    """Support x, y, mask ``[T, S]`` and query x, mask ``[T, Q]``, float64 and bool."""

    x: Tensor
    y: Tensor
    mask: Tensor
    query_x: Tensor
    query_mask: Tensor


def last_value(train: TableTasks, batch_raw: TaskBatch) -> Forecast:
    """The last value carried forward, as a random walk: standard deviation s·√(years ahead).

    s² is the mean of (change)² / (years between) over all pairs of observations of a training task that are at most
    as far apart as the longest horizon of the batch, each horizon with the same weight. (One-year changes alone
    would give an s several times too small: changes of neighbouring years are alike.)

    Args:
        train: the training table.
        batch_raw: support and query in raw units.

    Raises:
        DataError: for a batch in standard units, several inputs or outputs, or no target.
        EmptyTaskError: for an empty support.
    """
    return _random_walk(train, batch_raw, drift=False)


def last_value_drift(train: TableTasks, batch_raw: TaskBatch) -> Forecast:
    """The last value plus the mean yearly change of the training tasks, as a random walk with drift.

    The drift is the mean change a year over the pairs of neighbouring observations of all training tasks; s as in
    :func:`last_value`, with the drift taken off.

    Args and errors are those of :func:`last_value`.
    """
    return _random_walk(train, batch_raw, drift=True)


def line_per_country(train: TableTasks, batch_raw: TaskBatch) -> Forecast:
    """A least-squares line through each task's own support.

    The predictive is the Student-t of the regression with a flat prior on line and log noise (Gelman et al. 2013,
    Bayesian Data Analysis, §14.2), given as the Gaussian of the same mean and covariance; with 1 or 2 degrees of
    freedom, where the variance is infinite, as if there were 3. ``train`` is not used.

    Args and errors are those of :func:`last_value`, and:

    Raises:
        UnsupportedError: for a support of fewer than 3 observations at different times.
    """
    a = _arrays(batch_raw)
    count = a.mask.sum(-1, keepdim=True).double()
    centre = torch.where(a.mask, a.x, 0.0).sum(-1, keepdim=True) / count
    time = torch.where(a.mask, a.x - centre, 0.0)
    spread = time.square().sum(-1, keepdim=True)
    if bool((count < 3).any()) or bool((spread == 0).any()):
        raise UnsupportedError("A line with an error needs at least 3 observations at different times in each support.")
    level = torch.where(a.mask, a.y, 0.0).sum(-1, keepdim=True) / count
    slope = (time * a.y).sum(-1, keepdim=True) / spread
    residual = torch.where(a.mask, a.y - level - slope * time, 0.0)
    freedom = count - 2
    variance = residual.square().sum(-1, keepdim=True) / freedom
    variance = variance.clamp_min(ROUNDING**2) * torch.where(freedom > 2, freedom / (freedom - 2), 3.0)
    ahead = a.query_x - centre
    shared = 1 / count.unsqueeze(-1) + ahead.unsqueeze(-1) * ahead.unsqueeze(-2) / spread.unsqueeze(-1)
    covariance = variance.unsqueeze(-1) * (shared + torch.eye(ahead.shape[-1], dtype=ahead.dtype))
    return _joint(level + slope * ahead, covariance, a.query_mask)


def gp_per_country(train: TableTasks, batch_raw: TaskBatch) -> Forecast:
    """A Gaussian process on each task's own support: constant mean, RBF kernel and noise.

    The mean is the support's; amplitude, lengthscale and noise maximise the log marginal likelihood of the support
    (Rasmussen & Williams 2006, eq. 5.8), by Adam on their logarithms from three lengthscales, all tasks at once; the
    best of the three is kept. Amplitude and noise are in units of the support's own standard deviation and bounded
    to [0.01, 100] and [0.001, 10]; the lengthscale is bounded to [0.05, 20] spans of the support. ``train`` is not
    used.

    Args and errors are those of :func:`last_value`.
    """
    a = _arrays(batch_raw)
    count = a.mask.sum(-1, keepdim=True).double()
    level = torch.where(a.mask, a.y, 0.0).sum(-1, keepdim=True) / count
    centred = torch.where(a.mask, a.y - level, 0.0)
    unit = (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp_min(ROUNDING)
    low = torch.where(a.mask, a.x, torch.inf).min(-1, keepdim=True).values
    span = (torch.where(a.mask, a.x, -torch.inf).max(-1, keepdim=True).values - low).clamp_min(1.0)
    time, ahead, target = (a.x - low) / span, (a.query_x - low) / span, centred / unit
    amplitude, length, noise = _fit_gp(time, target, a.mask)
    times = torch.cat([time, ahead], -1)
    prior = _rbf(times, amplitude, length)
    observed = torch.cat([a.mask, torch.zeros_like(a.query_mask)], -1)
    values = torch.cat([target, torch.zeros_like(ahead)], -1)
    variance = noise.square()
    mean, covariance = condition(torch.zeros_like(times), prior, observed, values, variance)
    shots = time.shape[-1]
    eye = torch.eye(ahead.shape[-1], dtype=times.dtype)
    covariance = covariance[:, shots:, shots:] + variance.unsqueeze(-1) * eye
    return _joint(level + unit * mean[:, shots:], unit.unsqueeze(-1).square() * covariance, a.query_mask)


def empirical_gaussian(train: TableTasks, batch_raw: TaskBatch) -> Forecast:
    """The Gaussian of the complete training trajectories, conditioned on each support.

    Mean and covariance are those of the training tasks observed at every time of the table. The covariance becomes
    (1 − α) Σ + α diag(Σ) + σ² I, with α and σ² from a small grid: those with the smallest negative log density of
    the query years in five-fold cross-validation over the training trajectories, each given the support and query
    times of a task of the batch.

    Args and errors are those of :func:`last_value`, and:

    Raises:
        EmptyTaskError: if fewer than 10 training tasks are complete.
        DataError: for a time at which the training table has no observation, or one given twice.
    """
    a = _arrays(batch_raw)
    grid, paths = trajectories(train)
    at, query_at = _index(grid, a.x), _index(grid, a.query_x)
    observed = torch.zeros(len(at), len(grid) + 1, dtype=torch.bool)
    observed.scatter_(1, torch.where(a.mask, at, len(grid)), True)
    values = torch.zeros(len(at), len(grid) + 1, dtype=a.y.dtype).scatter_(1, torch.where(a.mask, at, len(grid)), a.y)
    asked = torch.zeros_like(observed).scatter_(1, torch.where(a.query_mask, query_at, len(grid)), True)
    observed, values, asked = observed[:, :-1], values[:, :-1], asked[:, :-1]
    if bool((observed.sum(-1) < a.mask.sum(-1)).any()):
        raise DataError("A support has two observations of one time; the empirical Gaussian has one variable a time.")
    shrinkage, jitter = _choose_shrinkage(paths, observed, asked)
    mean, covariance = _moments(paths, shrinkage, jitter)
    mean, covariance = condition(mean, covariance, observed, values)
    tasks = torch.arange(len(at))[:, None]
    joint = covariance[tasks.unsqueeze(-1), query_at.unsqueeze(-1), query_at.unsqueeze(-2)]
    return _joint(mean[tasks, query_at], joint, a.query_mask)


#: All baselines by name, cheapest first.
BASELINES: dict[str, Callable[[TableTasks, TaskBatch], Forecast]] = {
    "last_value": last_value,
    "last_value_drift": last_value_drift,
    "line_per_country": line_per_country,
    "gp_per_country": gp_per_country,
    "empirical_gaussian": empirical_gaussian,
}


def _arrays(batch: TaskBatch) -> _Arrays:
    support, query = batch.support, batch.query
    if batch.standardizer is not None:
        raise DataError("The batch is in standard units; baselines want table.with_standardizer(None).all(...).")
    if support.num_features != 1 or support.y is None or support.y.dim() != 2:
        width = None if support.y is None else list(support.y.shape)
        raise DataError(f"x has {support.num_features} input(s) and y shape {width}; baselines want one of each.")
    mask = support.full_mask().cpu()
    if bool((mask.sum(-1) == 0).any()):
        raise EmptyTaskError("A task has an empty support; the baselines need at least one observation of each.")
    x, y, query_x = (t.detach().cpu().double() for t in (support.x[..., 0], support.y, query.x[..., 0]))
    return _Arrays(x, y, mask, query_x, query.full_mask().cpu())


def _training_rows(train: TableTasks) -> tuple[Tensor, Tensor, Tensor]:
    """Times, targets and mask ``[N, L]`` in raw units, in order of time, padding last."""
    data = train.observations
    if data.num_features != 1 or data.y is None:
        raise DataError(f"The training table has {data.num_features} inputs; baselines want one, time.")
    time, real = data.x[..., 0].double(), data.full_mask()
    order = torch.where(real, time, torch.inf).argsort(dim=-1, stable=True)
    return time.gather(1, order), data.y.double().gather(1, order), real.gather(1, order)


def _joint(mean: Tensor, covariance: Tensor, real: Tensor) -> Forecast:
    """The data's rounding is added as noise; rows of padding, which repeat real ones, become independent."""
    both = real.unsqueeze(-1) & real.unsqueeze(-2)
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    covariance = torch.where(both, covariance, eye) + ROUNDING**2 * eye
    return Forecast(mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt(), covariance)


def _random_walk(train: TableTasks, batch: TaskBatch, *, drift: bool) -> Forecast:
    a = _arrays(batch)
    last = torch.where(a.mask, a.x, -torch.inf).argmax(-1, keepdim=True)
    ahead = a.query_x - a.x.gather(1, last)
    longest = float(torch.where(a.query_mask, ahead.abs(), 0.0).max())
    slope, variance = _walk_moments(train, longest, drift)
    same_side = ahead.sign().unsqueeze(-1) * ahead.sign().unsqueeze(-2) > 0
    shared = torch.minimum(ahead.abs().unsqueeze(-1), ahead.abs().unsqueeze(-2))
    covariance = variance * torch.where(same_side, shared, 0.0)
    return _joint(a.y.gather(1, last) + slope * ahead, covariance, a.query_mask)


def _walk_moments(train: TableTasks, longest: float, drift: bool) -> tuple[float, float]:
    """Mean change a year (0 without drift) and s², from pairs of training observations up to ``longest`` apart."""
    time, y, real = _training_rows(train)
    slope = 0.0
    if drift:
        near = real[:, 1:]
        slope = float((y.diff(dim=1)[near]).sum() / time.diff(dim=1)[near].sum())
    per_lag = []
    for lag in range(1, time.shape[1]):
        years, change = time[:, lag:] - time[:, :-lag], y[:, lag:] - y[:, :-lag]
        use = real[:, lag:] & (years > 0) & (years <= longest)
        if bool(use.any()):
            per_lag.append(((change - slope * years)[use].square() / years[use]).mean())
    if not per_lag:
        raise EmptyTaskError(
            f"No training task has two observations at most {longest:g} apart; the walk has no spread."
        )
    return slope, float(torch.stack(per_lag).mean())


def _rbf(time: Tensor, amplitude: Tensor, length: Tensor) -> Tensor:
    """RBF kernel ``[..., S, S]`` of times ``[..., S]``; amplitude and length ``[..., 1]``."""
    gap = (time.unsqueeze(-1) - time.unsqueeze(-2)) / length.unsqueeze(-1)
    return amplitude.unsqueeze(-1).square() * torch.exp(-0.5 * gap.square())


def _gp_hyper(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unbounded numbers ``[..., 3]`` to amplitude, lengthscale and noise scale, each ``[..., 1]``, within bounds."""
    low = torch.tensor([0.01, 0.05, 0.001], dtype=raw.dtype).log()
    high = torch.tensor([100.0, 20.0, 10.0], dtype=raw.dtype).log()
    amplitude, length, noise = (low + (high - low) * raw.sigmoid()).exp().split(1, -1)
    return amplitude, length, noise


def _gp_evidence(raw: Tensor, time: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Log marginal likelihood up to a constant, ``[starts, tasks]``; masked rows are identity rows."""
    amplitude, length, noise = _gp_hyper(raw)
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    diagonal = torch.where(mask, noise.square(), 1.0)
    gram = torch.where(both, _rbf(time, amplitude, length), 0.0) + torch.diag_embed(diagonal)
    cholesky = torch.linalg.cholesky(gram)
    white = torch.linalg.solve_triangular(cholesky, y.unsqueeze(-1).expand(*gram.shape[:-1], 1), upper=False)
    return -0.5 * white.square().sum((-2, -1)) - cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _fit_gp(time: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = math.log(0.05), math.log(20.0)
    shares = [(math.log(start) - low) / (high - low) for start in _GP_STARTS]
    starts = torch.tensor([[0.5, share, 0.5] for share in shares], dtype=time.dtype).logit()
    raw = starts.unsqueeze(1).repeat(1, len(time), 1).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(_GP_STEPS):
        (gradient,) = torch.autograd.grad(-_gp_evidence(raw, time, y, mask).sum(), raw)
        raw.grad = gradient
        optimizer.step()
    with torch.no_grad():
        best = _gp_evidence(raw, time, y, mask).argmax(0)
        return _gp_hyper(raw[best, torch.arange(len(time))])


def trajectories(train: TableTasks) -> tuple[Tensor, Tensor]:
    """Times ``[G]`` at which the table has observations, and the tasks that have all of them, ``[n, G]``."""
    time, y, real = _training_rows(train)
    grid = time[real].unique()
    complete = real.sum(-1) == len(grid)
    if len(grid) != time.shape[1] or int(complete.sum()) < 10:
        raise EmptyTaskError(
            f"{int(complete.sum())} training task(s) are observed once at each of the {len(grid)} times; the empirical "
            "Gaussian needs at least 10."
        )
    complete = complete & (time == grid).all(-1)
    return grid, y[complete]


def _index(grid: Tensor, time: Tensor) -> Tensor:
    index = torch.searchsorted(grid, time.contiguous()).clamp_max(len(grid) - 1)
    wrong = grid[index] != time
    if bool(wrong.any()):
        raise DataError(
            f"No training task is observed at {float(time[wrong][0]):g}; the empirical Gaussian has no such time."
        )
    return index


def _moments(paths: Tensor, shrinkage: float, jitter: float) -> tuple[Tensor, Tensor]:
    covariance = torch.cov(paths.mT)
    diagonal = covariance.diagonal()
    return paths.mean(0), (1 - shrinkage) * covariance + torch.diag(shrinkage * diagonal + jitter)


def _choose_shrinkage(paths: Tensor, observed: Tensor, asked: Tensor) -> tuple[float, float]:
    """Shrinkage and jitter with the best cross-validated density of a training task's query given its support."""
    design = torch.arange(len(paths)) % len(observed)
    fold = torch.arange(len(paths)) % _FOLDS
    best, choice = math.inf, (_SHRINKAGE[0], _JITTER[0])
    for shrinkage in _SHRINKAGE:
        for jitter in _JITTER:
            total = 0.0
            for k in range(_FOLDS):
                out = fold == k
                seen, wanted, values = observed[design[out]], asked[design[out]], paths[out]
                mean, covariance = condition(*_moments(paths[~out], shrinkage, jitter), seen, values)
                variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(ROUNDING**2)
                nll = 0.5 * ((values - mean).square() / variance + variance.log())
                total += float(torch.where(wanted, nll, 0.0).sum())
            if total < best:
                best, choice = total, (shrinkage, jitter)
    return choice
