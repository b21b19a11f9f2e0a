"""Sine or line: few points leave it open which of two kinds of function a task is; with the exact answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import Observations, union
from bayesmeta.errors import DataError, OptionError, ShapeError
from bayesmeta.tasks.families import SyntheticFamily, check_population

_LOG_2PI = math.log(2 * math.pi)
_AMPLITUDE, _PHASE, _COEFFICIENT = (0.1, 5.0), (0.0, math.pi), (-3.0, 3.0)
#: Order of the Gauss–Legendre rule on each panel of a grid.
_ORDER = 16
#: Panels are this many widths of the narrowest peak that a likelihood can have.
_WIDTHS = 4.0
#: Nodes times tasks evaluated at once, which bounds the oracle's memory.
_CHUNK = 500_000


class SineOrLine(SyntheticFamily):
    """Half the tasks are sinusoids, half are lines: the ambiguous regression of PLATIPUS.

    A fair coin says which. Sinusoids: y = A sin(x − phase), A ~ U(0.1, 5), phase ~ U(0, π). Lines: y = slope x +
    intercept, both ~ U(−3, 3). x ~ U(−5, 5), noise of standard deviation 0.3 on all.

    Source: C. Finn, K. Xu, S. Levine, "Probabilistic Model-Agnostic Meta-Learning", NeurIPS 2018,
    https://arxiv.org/abs/1806.02817, section 5.

    The oracle (:meth:`log_evidence`, :meth:`probability_line`, :meth:`predictive_mean`, :meth:`predictive_log_prob`)
    integrates over one parameter of each kind in closed form (a Gaussian over an interval), and over the other, phase
    or slope, by composite Gauss–Legendre quadrature in float64. Its panels are a few widths of the narrowest peak that
    the likelihood can have, so that it is exact to about 1e-8 for any number of observations. Masked observations
    do not count. Its cost grows with √shots / noise.

    Args:
        noise: standard deviation of the noise, above 0.
        num_tasks: None: endless. A number: a finite set of tasks with fresh points in each batch. The oracle knows the
            family, not the set.
        task_seed: which finite set.

    Raises:
        OptionError: for noise that is not positive or fewer than one task.
    """

    _num_uniform = 3

    def __init__(self, noise: float = 0.3, *, num_tasks: int | None = None, task_seed: int = 0) -> None:
        if not 0 < noise < math.inf:
            raise OptionError(f"noise must be positive and finite; got {noise}.")
        check_population(num_tasks)
        super().__init__(num_tasks=num_tasks, task_seed=task_seed)
        self.noise = noise
        self._refine = 1

    def _parameters(self, uniform: Tensor) -> dict[str, Tensor]:
        is_line, first, second = uniform[:, :1] < 0.5, uniform[:, 1:2], uniform[:, 2:3]
        drawn = {
            "amplitude": (~is_line, first, _AMPLITUDE),
            "phase": (~is_line, second, _PHASE),
            "slope": (is_line, first, _COEFFICIENT),
            "intercept": (is_line, second, _COEFFICIENT),
        }
        # a parameter that a task does not have is NaN, not a number that means nothing
        return {"is_line": is_line} | {
            name: torch.where(mine, low + (high - low) * value, torch.nan)
            for name, (mine, value, (low, high)) in drawn.items()
        }

    def _function(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        sine = parameters["amplitude"] * torch.sin(x - parameters["phase"])
        return torch.where(parameters["is_line"], parameters["slope"] * x + parameters["intercept"], sine)

    def _noise_scale(self, parameters: dict[str, Tensor]) -> float:
        return self.noise

    # -- oracle -------------------------------------------------------------------------------------------------

    def probability_line(self, support: Observations) -> Tensor:
        """Exact p(line | support), float64 ``[tasks]``; 1/2 without support."""
        return torch.sigmoid(self._log_evidences(support).diff(dim=0).squeeze(0))

    def log_evidence(self, observations: Observations) -> Tensor:
        """Exact log p(y | x) of all observations of each task, both kinds averaged, float64 ``[tasks]``."""
        return self._log_evidences(observations).logsumexp(0) - math.log(2)

    def predictive_log_prob(self, support: Observations, query: Observations) -> Tensor:
        """Exact log p(y | x, support) of each query point by itself, float64 ``[tasks, shots]``, 0 where masked.

        The joint density of all of a task's query points is ``log_evidence(bm.union(support, query)) −
        log_evidence(support)``.
        """
        tasks, shots = query.x.shape[:2]
        rows = torch.arange(tasks, device=query.device).repeat_interleave(shots)
        each = Observations(query.x.reshape(-1, 1, 1), _targets(query).reshape(-1, 1))
        together = self.log_evidence(union(support.tasks(rows), each)).reshape(tasks, shots)
        return (together - self.log_evidence(support).unsqueeze(-1)).masked_fill(~query.full_mask(), 0.0)

    def predictive_mean(self, support: Observations, x: Tensor) -> Tensor:
        """Exact E[y | x, support] at x ``[tasks, shots, 1]``, float64 ``[tasks, shots]``: the least squared error."""
        if x.dim() != 3 or x.shape[0] != support.num_tasks or x.shape[-1] != 1:
            raise ShapeError(f"x has shape {list(x.shape)}; expected [{support.num_tasks}, shots, 1], as the support.")
        means = []
        for part, at in self._chunks(support, x.double()):
            line, sine = self._line(part), self._sine(part)
            log_weight = torch.cat([line.log_weight, sine.log_weight], -1)
            weight = (log_weight - log_weight.logsumexp(-1, keepdim=True)).exp()
            in_line, in_sine = weight.split([len(line.nodes), len(sine.nodes)], -1)
            # each kind's mean is linear in a few sums over the nodes, so that no [nodes, shots] tensor is needed
            slope, intercept = in_line @ line.nodes, (in_line * line.inner_mean()).sum(-1)
            amplitude = in_sine * sine.inner_mean()
            cosine, sinus = amplitude @ sine.nodes.cos(), amplitude @ sine.nodes.sin()
            of_line = slope[:, None] * at + intercept[:, None]
            means.append(of_line + cosine[:, None] * at.sin() - sinus[:, None] * at.cos())
        return torch.cat(means)

    def _log_evidences(self, observations: Observations) -> Tensor:
        """Log evidence of the sinusoid and of the line, ``[2, tasks]``."""
        parts = []
        for part, _ in self._chunks(observations, observations.x.double()):
            parts.append(torch.stack([self._sine(part).log_evidence(), self._line(part).log_evidence()]))
        return torch.cat(parts, -1)

    def _chunks(self, observations: Observations, x: Tensor) -> Iterator[tuple[_Sums, Tensor]]:
        """Sums over the observations of some tasks at a time, and those tasks' points of x, ``[tasks, shots]``."""
        sums = _Sums.of(observations)
        nodes = max(len(self._grid(sums, interval)[0]) for interval in (_PHASE, _COEFFICIENT))
        size = max(1, _CHUNK // nodes)
        for begin in range(0, observations.num_tasks, size):
            rows = slice(begin, begin + size)
            yield _Sums(sums.curvature, sums.steepness, *(value[rows] for value in sums[2:])), x[rows].squeeze(-1)

    def _sine(self, sums: _Sums) -> _Kind:
        """Given the phase, y is linear in the amplitude: A (sin x cos phase − cos x sin phase)."""
        phase, log_weight = self._grid(sums, _PHASE)
        cosine, sine = phase.cos(), phase.sin()
        precision = sums.ss * cosine**2 - 2 * sums.sc * cosine * sine + sums.cc * sine**2
        linear = sums.sy * cosine - sums.cy * sine
        return self._kind(sums, phase, log_weight, precision, linear, sums.yy, _AMPLITUDE)

    def _line(self, sums: _Sums) -> _Kind:
        """Given the slope, y − slope x is linear in the intercept."""
        slope, log_weight = self._grid(sums, _COEFFICIENT)
        rest = sums.yy - 2 * slope * sums.xy + slope**2 * sums.xx
        precision = sums.shots.expand_as(rest)
        return self._kind(sums, slope, log_weight, precision, sums.y - slope * sums.x, rest, _COEFFICIENT)

    def _kind(
        self,
        sums: _Sums,
        nodes: Tensor,
        log_weight: Tensor,
        precision: Tensor,
        linear: Tensor,
        rest: Tensor,
        interval: tuple[float, float],
    ) -> _Kind:
        variance = self.noise**2
        log_scale = -0.5 * sums.shots * (_LOG_2PI + 2 * math.log(self.noise))
        inner = _Interval(precision.clamp(min=0.0) / variance, linear / variance, *interval)
        return _Kind(nodes, log_weight + log_scale - 0.5 * rest / variance + inner.log_integral(), inner)

    def _grid(self, sums: _Sums, interval: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Nodes, and the logarithms of their weights, which add up to 1; both ``[nodes]``."""
        low, high = interval
        narrowest = self.noise / math.sqrt(max(sums.curvature, 1e-9))
        panels = self._refine * max(8, math.ceil((high - low) / (_WIDTHS * narrowest)))
        edges = np.linspace(0.0, 1.0, panels + 1)
        # data that no task explains make a layer at the edge of the box: panels are halved towards both edges
        steps = max(0.0, (high - low) * sums.steepness / self.noise**2 / (_WIDTHS * panels))
        layer = edges[1] * 0.5 ** np.arange(1, math.ceil(math.log2(max(1.0, steps))) + 1)
        edges = np.sort(np.concatenate([edges, layer, 1 - layer]))
        at, weight = np.polynomial.legendre.leggauss(_ORDER)
        width = np.diff(edges)[:, None]
        nodes, weights = (edges[:-1, None] + width * (1 + at) / 2).ravel(), (width * weight / 2).ravel()
        device = sums.y.device
        return low + (high - low) * torch.as_tensor(nodes, device=device), torch.as_tensor(weights, device=device).log()


def _targets(observations: Observations) -> Tensor:
    if observations.x.shape[-1] != 1 or observations.y is None or observations.y.dim() != 2:
        raise DataError(
            f"The oracle needs x of shape [tasks, shots, 1] and y of shape [tasks, shots]; got x "
            f"{list(observations.x.shape)} and y {None if observations.y is None else list(observations.y.shape)}."
        )
    return observations.y


class _Sums(NamedTuple):
    """Sufficient statistics of the observations that count, ``[tasks, 1]`` each: s is sin x, c is cos x.

    ``curvature`` and ``steepness`` bound the second and first derivatives by phase or slope of half the sum of
    squared errors, over all tasks and the whole box.
    """

    curvature: float
    steepness: float
    shots: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor
    ss: Tensor
    sc: Tensor
    cc: Tensor
    sy: Tensor
    cy: Tensor

    @classmethod
    def of(cls, observations: Observations) -> _Sums:
        keep = observations.full_mask().double()
        y, x = _targets(observations).double() * keep, observations.x.double().squeeze(-1)
        s, c, x = x.sin() * keep, x.cos() * keep, x * keep

        def total(value: Tensor) -> Tensor:
            return value.sum(-1, keepdim=True)

        count, xx, most = total(keep), total(x * x), _AMPLITUDE[1]
        by_phase = most * (total(y.abs()) + most * count)
        by_slope = total((x * y).abs()) + _COEFFICIENT[1] * (xx + total(x.abs()))
        curvature, steepness = (
            float(torch.maximum(*pair).max()) if len(x) else 0.0 for pair in ((by_phase, xx), (by_phase, by_slope))
        )
        sums = (total(x), total(y), xx, total(x * y), total(y * y))
        waves = (total(s * s), total(s * c), total(c * c), total(s * y), total(c * y))
        return cls(curvature, steepness, count, *sums, *waves)


class _Kind(NamedTuple):
    """One kind of function on its grid: nodes ``[nodes]``, log of weight times likelihood ``[tasks, nodes]``."""

    nodes: Tensor
    log_weight: Tensor
    inner: _Interval

    def log_evidence(self) -> Tensor:
        return self.log_weight.logsumexp(-1)

    def inner_mean(self) -> Tensor:
        """Posterior mean of the other parameter at each node, ``[tasks, nodes]``."""
        return self.inner.mean()


class _Interval(NamedTuple):
    """The density exp(m a − q a² / 2) of a on [low, high]: a Gaussian cut off on both sides.

    Where it is nearly flat the closed form divides small differences, so there a Gauss–Legendre rule, then exact to
    rounding, takes its place.
    """

    q: Tensor
    m: Tensor
    low: float
    high: float

    def log_integral(self) -> Tensor:
        """Log of the mean of the density over the interval."""
        mean, scale = self._moments()
        value = 0.5 * self.m * mean + scale.log() + 0.5 * _LOG_2PI + self._log_mass(mean, scale)
        value = value - math.log(self.high - self.low)
        flat = self._is_flat()
        value[flat] = self._rule(flat)[0]
        return value

    def mean(self) -> Tensor:
        """Mean of a under the normalised density."""
        mean, scale = self._moments()
        log_mass = self._log_mass(mean, scale)
        at_low, at_high = (
            (-0.5 * ((edge - mean) / scale).square() - 0.5 * _LOG_2PI - log_mass).exp()
            for edge in (self.low, self.high)
        )
        # rounding of a mean far outside must not leave the interval
        value = (mean + scale * (at_low - at_high)).clamp(self.low, self.high)
        flat = self._is_flat()
        value[flat] = self._rule(flat)[1]
        return value

    def _is_flat(self) -> Tensor:
        width, middle = self.high - self.low, (self.low + self.high) / 2
        return (self.q * width**2 < 0.1) & ((self.m - self.q * middle).abs() * width < 1.0)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and scale of the Gaussian before it is cut off; finite where it has none (those are flat)."""
        q = torch.where(self.q > 0, self.q, 1.0).clamp(min=1e-12)
        return self.m / q, q.rsqrt()

    def _log_mass(self, mean: Tensor, scale: Tensor) -> Tensor:
        """log Φ(b) − Φ(a) for the edges in standard units, taken in the lower tail, where Φ is precise."""
        a, b = (self.low - mean) / scale, (self.high - mean) / scale
        upper = a + b > 0
        a, b = torch.where(upper, -b, a), torch.where(upper, -a, b)
        ours, theirs = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
        return ours + torch.log(-torch.expm1(theirs - ours))

    def _rule(self, where: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the mean of the density, and the mean of a, by quadrature at some entries."""
        nodes, weights = (torch.as_tensor(v, device=self.q.device) for v in np.polynomial.legendre.leggauss(_ORDER))
        at = (self.low + self.high) / 2 + (self.high - self.low) / 2 * nodes
        exponent = self.m[where, None] * at - 0.5 * self.q[where, None] * at**2 + (weights / 2).log()
        return exponent.logsumexp(-1), exponent.softmax(-1) @ at
