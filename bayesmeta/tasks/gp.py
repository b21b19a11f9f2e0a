"""Functions from Gaussian processes, whose exact posterior, predictive and evidence are known; and sawtooth waves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, OptionError, ShapeError, UnsupportedError
from bayesmeta.ops.gaussian import condition
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.tasks.families import check_counts, cut

#: Names of the built-in families of :class:`GPTasks`.
Kernel = Literal["eq", "matern52", "weakly_periodic", "sawtooth"]
#: Covariances ``[..., N, M]`` of points ``[..., N, features]`` and ``[..., M, features]``, in float64.
KernelFunction = Callable[[Tensor, Tensor], Tensor]

#: Added to the variance of each observation, in sampling and in the oracle alike: a kernel matrix of close points
#: is singular to working precision. The kernels have variance 1.
JITTER = 1e-8
_LENGTH_SCALES = {"eq": 0.25, "matern52": 0.25, "weakly_periodic": 0.5}
_NOISE_VARIANCE, _PERIOD, _FREQUENCY = 0.05, 0.25, (2.0, 4.0)


class GPTasks:
    """Tasks are draws of a Gaussian process of mean 0, observed with noise at x ~ U(−2, 2); endless.

    With d the distance of two points, ℓ the length scale and p the period:

    - ``"eq"``: exp(−d² / 2ℓ²), ℓ = 0.25;
    - ``"matern52"``: (1 + r + r²/3) exp(−r) with r = √5 d / ℓ, ℓ = 0.25;
    - ``"weakly_periodic"``: exp(−d² / 2ℓ²) exp(−2 sin²(π d / p)), ℓ = 0.5, p = 0.25;
    - ``"sawtooth"``: no GP, but of the same suite: y = (f (± x) − u) mod 1 with a fair sign, f ~ U(2, 4), u ~ U(0, 1),
      and no noise unless it is asked for. It has no oracle.

    Source: settings of W. Bruinsma, "Convolutional Conditional Neural Processes", PhD thesis, Cambridge 2022,
    https://arxiv.org/abs/2408.09583, as in that author's neuralprocesses package, after J. Gordon, W. Bruinsma,
    A. Foong, J. Requeima, Y. Dubois, R. Turner, "Convolutional Conditional Neural Processes", ICLR 2020,
    https://arxiv.org/abs/1910.13556 (whose weakly periodic ℓ and sawtooth differ). There the number of context points
    varies from 0 to 30 from batch to batch, with 50 targets; here ``sample`` takes the numbers.

    Sampling and oracle run in float64 and cost shots³ a task. 1e-8 (``JITTER``) is added to the noise variance in
    both, so that the oracle is exact for what is sampled. There is no finite ``num_tasks``, since a function is drawn
    together with its points: for a fixed set use ``FixedTasks(GPTasks().sample(100, support=…, query=…))``.

    Args:
        kernel: one of the names above, or a function of your own (:data:`KernelFunction`): float64 points in,
            covariances out.
        length_scale: ℓ; None for that of the kernel.
        period: p of the weakly periodic kernel; None for 0.25.
        noise_variance: variance of the noise; None for 0.05, and for 0 with the sawtooth.
        x_range: where inputs are drawn, uniformly.

    Raises:
        OptionError: for an unknown kernel, an option that it does not have, or a value out of range.
    """

    num_tasks: int | None = None

    def __init__(
        self,
        kernel: Kernel | KernelFunction = "eq",
        *,
        length_scale: float | None = None,
        period: float | None = None,
        noise_variance: float | None = None,
        x_range: tuple[float, float] = (-2.0, 2.0),
    ) -> None:
        _check_options(kernel, length_scale, period, noise_variance, x_range)
        self.kernel = kernel
        self.length_scale = _LENGTH_SCALES.get(str(kernel)) if length_scale is None else length_scale
        self.period = (_PERIOD if period is None else period) if kernel == "weakly_periodic" else None
        usual = 0.0 if kernel == "sawtooth" else _NOISE_VARIANCE
        self.noise_variance = usual if noise_variance is None else noise_variance
        self.x_range = x_range

    def sample(self, num_tasks: int, *, support: int, query: int, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch on the generator's device.

        Args:
            num_tasks: number of tasks.
            support, query: observations of each task.
            generator: generator or seed; None means seed 0.

        Returns:
            x ``[num_tasks, shots, 1]`` and y ``[num_tasks, shots]``, float32.

        Raises:
            OptionError: for numbers out of range.
            DataError, ShapeError: for a kernel of your own that is not positive definite, or not finite, or of
                another shape.
        """
        shots = check_counts(num_tasks, support, query)
        generator = as_generator(generator, stream="tasks")
        device, (low, high) = generator.device, self.x_range
        x = low + (high - low) * torch.rand(num_tasks, shots, 1, generator=generator, device=device)
        noise = torch.randn(num_tasks, shots, generator=generator, device=device, dtype=torch.float64)
        if self.kernel == "sawtooth":
            y = self._sawtooth(x.double().squeeze(-1), generator) + math.sqrt(self.noise_variance) * noise
        else:
            y = (self._root(self._marginal(x.double(), None)) @ noise.unsqueeze(-1)).squeeze(-1)
        return TaskBatch(*cut(Observations(x, y.to(x.dtype)), support))

    def _sawtooth(self, x: Tensor, generator: torch.Generator) -> Tensor:
        low, high = _FREQUENCY
        uniform = torch.rand(3, len(x), 1, generator=generator, device=generator.device, dtype=torch.float64)
        frequency = low + (high - low) * uniform[0]
        sign = torch.where(uniform[1] < 0.5, -1.0, 1.0)
        return (frequency * sign * x - uniform[2]).remainder(1.0)

    # -- oracle -------------------------------------------------------------------------------------------------

    def posterior(self, support: Observations, x: Tensor) -> MultivariateNormal:
        """Exact joint posterior of the function's values at x ``[tasks, shots, 1]``, without noise.

        Returns:
            A float64 normal with batch shape ``[tasks]`` and event shape ``[shots]``. Masked observations do not count,
            and a task without support has its prior.

        Raises:
            UnsupportedError: for the sawtooth, which is no GP.
            ShapeError, DataError: for points that do not fit the support or the kernel.
        """
        mean, covariance = self._conditional(support, x)
        return MultivariateNormal(mean, scale_tril=self._root(_add_to_diagonal(covariance, JITTER)))

    def predictive(self, support: Observations, x: Tensor) -> MultivariateNormal:
        """Exact joint predictive of y at x ``[tasks, shots, 1]``, noise included; errors as :meth:`posterior`."""
        mean, covariance = self._conditional(support, x)
        return MultivariateNormal(
            mean, scale_tril=self._root(_add_to_diagonal(covariance, self.noise_variance + JITTER))
        )

    def marginals(self, support: Observations, x: Tensor) -> Normal:
        """Exact predictive of y at each point of x by itself, noise included, ``[tasks, shots]``.

        Its mean log-density is the best that a method without correlations between points can reach.
        """
        mean, covariance = self._conditional(support, x)
        variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0.0) + self.noise_variance + JITTER
        return Normal(mean, variance.sqrt())

    def log_evidence(self, observations: Observations) -> Tensor:
        """Exact log p(y | x) of each task, float64 ``[tasks]``; masked observations do not count.

        ``log_evidence(batch.union()) − log_evidence(batch.support)`` is the joint predictive log-density of the query,
        ragged ones included.

        Raises:
            UnsupportedError: for the sawtooth, which is no GP.
            ShapeError, DataError: for points that do not fit the kernel.
        """
        y = _targets(observations)
        keep = observations.full_mask()
        root = self._root(self._marginal(observations.x.double(), keep))
        white = torch.linalg.solve_triangular(root, (y * keep).unsqueeze(-1), upper=False).squeeze(-1)
        # padding has variance 1 and value 0: it adds nothing to the square and nothing to the determinant
        log_root = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * white.square().sum(-1) - log_root - 0.5 * math.log(2 * math.pi) * keep.double().sum(-1)

    def _conditional(self, support: Observations, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[tasks, shots]`` and covariance ``[tasks, shots, shots]`` of the function at x given the support."""
        y = _targets(support)
        if x.dim() != 3 or x.shape[0] != support.num_tasks or x.shape[-1] != support.num_features:
            raise ShapeError(
                f"x has shape {list(x.shape)}; expected [{support.num_tasks}, shots, {support.num_features}], as in "
                "the support."
            )
        points = torch.cat([support.x, x], 1).double()
        observed = torch.cat([support.full_mask(), torch.zeros_like(x[..., 0], dtype=torch.bool)], 1)
        values = torch.cat([y, torch.zeros_like(x[..., 0], dtype=y.dtype)], 1)
        # a tensor: a plain number would be rounded to the default dtype
        noise = torch.tensor(self.noise_variance + JITTER, dtype=torch.float64, device=x.device)
        try:
            mean, covariance = condition(torch.zeros_like(values), self._covariance(points), observed, values, noise)
        except torch.linalg.LinAlgError as error:
            raise _not_positive() from error
        first = support.shots
        covariance = covariance[:, first:, first:]
        return mean[:, first:], (covariance + covariance.mT) / 2

    def _marginal(self, points: Tensor, keep: Tensor | None) -> Tensor:
        """Covariance of y, ``[tasks, N, N]``; rows that do not count are those of the identity."""
        covariance = _add_to_diagonal(self._covariance(points), self.noise_variance + JITTER)
        if keep is None:
            return covariance
        eye = torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
        return torch.where(keep.unsqueeze(-1) & keep.unsqueeze(-2), covariance, eye)

    def _root(self, covariance: Tensor) -> Tensor:
        root, info = torch.linalg.cholesky_ex(covariance)
        if bool(info.any()) or not bool(torch.isfinite(root).all()):
            raise _not_positive()
        return root

    def _covariance(self, points: Tensor) -> Tensor:
        """Prior covariance of the function at points ``[tasks, N, features]``, without noise."""
        if self.kernel == "sawtooth":
            raise UnsupportedError(
                "A sawtooth is not a Gaussian process: it has no exact posterior, predictive or evidence here. Its "
                "draws have; compare with the GP kernels 'eq', 'matern52' and 'weakly_periodic' for an oracle."
            )
        if callable(self.kernel):
            covariance = self.kernel(points, points)
            expected = (*points.shape[:2], points.shape[1])
            if not isinstance(covariance, Tensor) or covariance.shape != expected:
                given = list(covariance.shape) if isinstance(covariance, Tensor) else type(covariance).__name__
                raise ShapeError(
                    f"The kernel gave {given} for points of shape {list(points.shape)}; expected covariances of shape "
                    f"{list(expected)}."
                )
            return covariance.double()
        if points.shape[-1] != 1:
            raise ShapeError(f"x has {points.shape[-1]} features; the built-in kernels have 1. Give a kernel function.")
        distance = (points - points.mT).abs()
        scaled = distance / (self.length_scale or math.nan)
        if self.kernel == "matern52":
            r = math.sqrt(5) * scaled
            return (1 + r + r.square() / 3) * (-r).exp()
        smooth = (-0.5 * scaled.square()).exp()
        if self.period is None:
            return smooth
        return smooth * (-2 * (math.pi * distance / self.period).sin().square()).exp()


def _check_options(
    kernel: object,
    length_scale: float | None,
    period: float | None,
    noise_variance: float | None,
    x_range: tuple[float, float],
) -> None:
    if not callable(kernel) and kernel not in get_args(Kernel):
        raise OptionError(
            f"kernel={kernel!r} is not known; expected one of {', '.join(get_args(Kernel))}, or a function of two sets "
            "of points."
        )
    if length_scale is not None and kernel not in _LENGTH_SCALES:
        raise OptionError(f"length_scale={length_scale} goes with {', '.join(_LENGTH_SCALES)}, not with {kernel!r}.")
    if period is not None and kernel != "weakly_periodic":
        raise OptionError(f"period={period} goes with 'weakly_periodic', not with {kernel!r}.")
    for name, value in (("length_scale", length_scale), ("period", period)):
        if value is not None and not 0 < value < math.inf:
            raise OptionError(f"{name} must be positive and finite; got {value}.")
    if noise_variance is not None and not 0 <= noise_variance < math.inf:
        raise OptionError(f"noise_variance must be ≥ 0 and finite; got {noise_variance}.")
    if len(x_range) != 2 or not -math.inf < x_range[0] < x_range[1] < math.inf:
        raise OptionError(f"x_range={x_range}; expected (low, high) with low < high.")


def _targets(observations: Observations) -> Tensor:
    if observations.y is None or observations.y.dim() != 2:
        given = None if observations.y is None else list(observations.y.shape)
        raise DataError(f"The oracle needs targets y of shape [tasks, shots]; got {given}.")
    return observations.y.double()


def _add_to_diagonal(covariance: Tensor, value: float) -> Tensor:
    return covariance + value * torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)


def _not_positive() -> DataError:
    return DataError(
        f"The covariance of the points is not finite and positive definite, even with {JITTER} added to its diagonal. "
        "Check a kernel of your own for symmetry and scale; the jitter suits variances near 1."
    )
