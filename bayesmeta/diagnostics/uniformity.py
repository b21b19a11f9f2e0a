"""Is this uniform? Tests of PIT values and ranks, and which way they miss.

Two situations: values of independent *clusters* (the points of a task depend on each other, tasks do not), tested by
moments of each cluster's mean; and independent *ranks*, one a simulation, tested by the whole distribution function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator


@dataclass(frozen=True)
class Shape:
    """How values in (0, 1) differ from uniform ones.

    Attributes:
        location: mean of √3 (2u − 1): positive where values are too large.
        dispersion: mean of √5 (6u² − 6u + 1): positive where they crowd at both ends (∪), negative in the middle (∩).
        p_location, p_dispersion: two-sided p-values of these being 0 (t-tests over clusters); NaN for one cluster.
        p_value: that the first four moments are those of uniform values: the smallest of the p-values of four such
            tests, times four (Bonferroni).
        location_error, dispersion_error: standard errors over the clusters; NaN for one cluster.
    """

    location: float
    dispersion: float
    p_location: float
    p_dispersion: float
    p_value: float
    location_error: float
    dispersion_error: float


def shape_of(moments: Tensor, *, independent: bool = False) -> Shape:
    """Tests of clusters, each of which has its mean of :func:`legendre`.

    The moments are those of J. Neyman, "'Smooth' test for goodness of fit", Skandinavisk Aktuarietidskrift 20 (1937).
    Departure: each is tested on its own by a t-test over the clusters, so that values of a cluster may depend on each
    other in any way. One test of all four (Hotelling's T²) accuses uniform values far too often unless there are
    hundreds of clusters, as it needs the covariance of skewed numbers. With fewer than about 50 clusters the second
    and fourth moments are skewed too: a p-value of 0.01 may then mean 0.03.

    Args:
        moments: ``[clusters, 4]``.
        independent: each cluster is one value, as ranks of simulations are. Uniform ones then have variance 1, which
            ``p_value`` takes instead of an estimate: of 30 values it is then right to p-values of 0.001.
    """
    tests = [t_test(column) for column in moments.unbind(-1)]
    (location, p_location), (dispersion, p_dispersion) = tests[:2]
    p_values = [p for _, p in tests]
    if independent:
        root = math.sqrt(len(moments))
        p_values = [math.erfc(abs(mean) * root / math.sqrt(2.0)) for mean, _ in tests]
    errors = moments.std(0) / math.sqrt(len(moments)) if len(moments) > 1 else moments.new_full((4,), math.nan)
    location_error, dispersion_error = errors[:2].tolist()
    return Shape(location, dispersion, p_location, p_dispersion, bonferroni(p_values), location_error, dispersion_error)


def bonferroni(p_values: Sequence[float]) -> float:
    """p-value of several tests together; NaN where one is."""
    if any(math.isnan(p) for p in p_values):
        return math.nan
    return min(1.0, len(p_values) * min(p_values))


def legendre(u: Tensor) -> Tensor:
    """Legendre polynomials of degree 1 to 4 on (0, 1), ``[…, 4]``: for uniform u mean 0, variance 1, uncorrelated."""
    t = 2.0 * u - 1.0
    two, three, four = (3 * t**2 - 1) / 2, (5 * t**3 - 3 * t) / 2, (35 * t**4 - 30 * t**2 + 3) / 8
    return torch.stack([math.sqrt(2 * k + 1) * p for k, p in enumerate((t, two, three, four), 1)], -1)


def t_test(values: Tensor) -> tuple[float, float]:
    """Mean of independent numbers ``[n]`` and the two-sided p-value of its being 0; NaN for one number."""
    from scipy import special  # late: its import changes the filters of warnings

    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, math.nan
    error = float(values.std()) / math.sqrt(n)
    if error <= 1e-12 * abs(mean):  # all the same
        return mean, float(mean == 0)
    return mean, float(2 * special.stdtr(n - 1, -abs(mean) / error))


# -- independent ranks --------------------------------------------------------------------------------------------


def chi_squared(ranks: Tensor, num_draws: int, num_bins: int) -> float:
    """p-value of ranks ``[n]`` being uniform on 0 … num_draws, by χ² over bins of equally many ranks.

    Raises:
        OptionError: where the num_draws + 1 ranks do not divide into the bins.
    """
    from scipy import special

    if num_bins < 2 or (num_draws + 1) % num_bins:
        raise OptionError(
            f"num_bins={num_bins} does not divide the {num_draws + 1} possible ranks of num_draws={num_draws} draws "
            "into equal bins. Take a divisor of num_draws + 1."
        )
    counts = torch.bincount(ranks * num_bins // (num_draws + 1), minlength=num_bins)
    expected = len(ranks) / num_bins
    return float(special.chdtrc(num_bins - 1, float((counts - expected).square().sum()) / expected))


class EcdfBand:
    """Simultaneous bands for the distribution function of n uniform ranks.

    Under uniformity, the whole curve stays inside with probability ``level``. Source: T. Säilynoja, P.-C. Bürkner, A.
    Vehtari, "Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple
    sample comparison", Statistics and Computing 32 (2022), algorithm 1 (adjustment by simulation),
    https://doi.org/10.1007/s11222-022-10090-6.

    Args:
        num_values: n, the number of ranks.
        num_draws: ranks go from 0 to this.
        num_points: where the curve is looked at, at most num_draws.
        num_simulations: uniform samples behind the adjustment.
        generator: generator or seed; None means seed 0.

    Attributes:
        points: z, shares of the ranks, ``[points]``.
    """

    def __init__(
        self,
        num_values: int,
        num_draws: int,
        *,
        num_points: int = 50,
        num_simulations: int = 2000,
        generator: Seed = None,
    ) -> None:
        from scipy import special

        if num_values < 2:
            raise OptionError(f"{num_values} rank(s) have no distribution function; expected at least 2.")
        self.num_values, self.num_draws = num_values, num_draws
        generator = as_generator(generator, stream="ECDF band")
        steps = np.unique(np.linspace(1, num_draws, min(num_points, num_draws)).round().astype(int))
        self._steps = steps  # the curve at step s counts the ranks below s
        self.points = steps / (num_draws + 1)
        # P(count < k) for k = 0 … n + 1, and P(count ≥ k) for k = 0 … n, [k, points]; 1 less the other would round to 0
        k = np.arange(num_values)[:, None]
        inner, outer = (tail(k, num_values, self.points) for tail in (special.bdtr, special.bdtrc))
        self._below = np.concatenate([np.zeros_like(inner[:1]), inner, np.ones_like(inner[:1])])
        self._above = np.concatenate([np.ones_like(outer[:1]), outer])
        uniform = torch.randint(num_draws + 1, (num_simulations, num_values), generator=generator).numpy()
        self._least = np.sort([self._least_tail(self._counts(each)) for each in uniform])

    def _counts(self, ranks: np.ndarray) -> np.ndarray:
        each = np.bincount(ranks, minlength=self.num_draws + 1)
        return each.cumsum()[self._steps - 1]

    def _least_tail(self, counts: np.ndarray) -> float:
        """The smallest two-sided binomial tail along the curve."""
        index = np.arange(len(counts))
        lower, upper = self._below[counts + 1, index], self._above[counts, index]
        return float(2 * np.minimum(lower, upper).min())

    def curve(self, ranks: Tensor) -> np.ndarray:
        """Share of the ranks ``[n]`` below each point, ``[points]``."""
        self._check(ranks)
        return self._counts(ranks.cpu().numpy()) / self.num_values

    def p_value(self, ranks: Tensor) -> float:
        """Share of uniform samples whose curve strays as far.

        Where fewer of them do than can be counted, the bound by Bonferroni over the points, which has no floor.
        """
        self._check(ranks)
        tail = self._least_tail(self._counts(ranks.cpu().numpy()))
        further = np.searchsorted(self._least, tail * (1 + 1e-9), side="right")
        return float(min((further + 1) / (len(self._least) + 1), len(self.points) * tail))

    def limits(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper limit of the curve at each point, ``[points]``."""
        if not 0 < level < 1:
            raise OptionError(f"level={level}; expected a number between 0 and 1, both excluded.")
        gamma = float(np.quantile(self._least, 1.0 - level))
        low, high = ((self._below[1:] < p).sum(0) for p in (gamma / 2, 1 - gamma / 2))  # quantiles of the binomial
        return low / self.num_values, high / self.num_values

    def _check(self, ranks: Tensor) -> None:
        if ranks.shape != (self.num_values,):
            raise ShapeError(f"ranks has shape {list(ranks.shape)}; this band is for [{self.num_values}].")
