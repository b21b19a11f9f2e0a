"""Scores of one forecast against one outcome, as pure torch functions: differentiable, batched, on any device.

All are losses: smaller is better, and in the mean over outcomes none is smaller than that of the true distribution
(the scores are proper). A forecast comes as the parameters of a distribution or as draws, which stand along the first
dimension. Tensors broadcast; nothing is averaged, so that means over points, and standard errors over tasks, are the
caller's. :func:`~bayesmeta.scores` takes them for a whole posterior.

Sources: T. Gneiting, A. E. Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", JASA 102 (2007),
https://doi.org/10.1198/016214506000001437 (with the opposite sign), and those named at each function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesmeta.errors import DataError, OptionError, ShapeError

_ROOT_2 = math.sqrt(2.0)
_LOG_2PI = math.log(2.0 * math.pi)
#: Pairs of components or draws that are evaluated in one call; more goes in slices, to bound the memory.
MAX_ELEMENTS = 10_000_000

__all__ = [
    "brier_score",
    "brier_score_binary",
    "crps_ensemble",
    "crps_normal",
    "crps_normal_mixture",
    "dawid_sebastiani",
    "dawid_sebastiani_joint",
    "energy_score",
    "interval_score",
    "log_score",
    "log_score_normal",
    "pinball",
    "sharpness",
]


# -- log score ----------------------------------------------------------------------------------------------------


def log_score(log_likelihood: Tensor, weights: Tensor | None = None) -> Tensor:
    """−log Σ_i w_i p(y | φ_i), the negative log score of a mixture of draws, in nats.

    From a closed form, the log-density of the one distribution with a first dimension of 1. As an estimate from draws
    of φ it is too large by about half the relative variance of the mean likelihood (Jensen): more with few draws and
    for many points at once.

    Args:
        log_likelihood: log p(y | φ_i), ``[n, …]``.
        weights: w_i, ``[n]`` or ``[n, …]``; need not sum to 1. None: equal.

    Returns:
        ``[…]``.
    """
    _draws(log_likelihood, "log_likelihood", 1)
    log_w = _weights(weights, log_likelihood).log()
    return -(log_likelihood + log_w).logsumexp(0)


def log_score_normal(loc: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """−log N(y; loc, scale²), in nats, in the broadcast shape of the three; scale above 0."""
    _broadcast(loc=loc, scale=scale, y=y)
    return 0.5 * ((y - loc) / scale).square() + scale.log() + 0.5 * _LOG_2PI


def dawid_sebastiani(mean: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """log scale² + ((y − mean) / scale)²: a score of mean and standard deviation alone, whatever the distribution.

    For a Normal it is twice :func:`log_score_normal` less log 2π. Source: A. P. Dawid, P. Sebastiani, "Coherent
    dispersion criteria for optimal experimental design", Annals of Statistics 27 (1999),
    https://doi.org/10.1214/aos/1018031101.

    Args:
        mean, scale, y: of one shape, or broadcastable.
    """
    _broadcast(mean=mean, scale=scale, y=y)
    return 2.0 * scale.log() + ((y - mean) / scale).square()


def dawid_sebastiani_joint(mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
    """log det Σ + (y − m)ᵀ Σ⁻¹ (y − m), :func:`dawid_sebastiani` of a vector.

    Args:
        mean, y: ``[…, d]``.
        covariance: ``[…, d, d]``, positive definite.

    Returns:
        ``[…]``.

    Raises:
        ShapeError: if the shapes do not fit.
    """
    d = y.shape[-1] if y.dim() else 0
    if covariance.shape[-2:] != (d, d) or mean.shape[-1:] != (d,):
        raise ShapeError(
            f"mean has shape {list(mean.shape)}, covariance {list(covariance.shape)} and y {list(y.shape)}; expected "
            "[…, d], […, d, d] and […, d]."
        )
    root = torch.linalg.cholesky(covariance)
    residual = torch.linalg.solve_triangular(root, (y - mean).unsqueeze(-1), upper=False).squeeze(-1)
    return 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + residual.square().sum(-1)


# -- continuous ranked probability score and its kin --------------------------------------------------------------


def crps_normal(loc: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Continuous ranked probability score of Normal forecasts, closed form, in the units of y.

    Source: Gneiting & Raftery (2007), eq. 21.

    Args:
        loc, scale, y: of one shape, or broadcastable; where the scale is 0, the score is |y − loc|, that of a point.
    """
    _broadcast(loc=loc, scale=scale, y=y)
    certain = scale == 0
    z = (y - loc) / torch.where(certain, 1.0, scale)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
    score = scale * (z * torch.erf(z / _ROOT_2) + 2.0 * density - 1.0 / math.sqrt(math.pi))
    return torch.where(certain, (y - loc).abs(), score)


def crps_normal_mixture(loc: Tensor, scale: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """CRPS of mixtures of K Normals, closed form, in the units of y; O(K²).

    With A(μ, σ) = E|N(μ, σ²)|: Σ_i w_i A(y − μ_i, σ_i) − ½ Σ_ij w_i w_j A(μ_i − μ_j, √(σ_i² + σ_j²)). Source:
    E. P. Grimit, T. Gneiting, V. J. Berrocal, N. A. Johnson, "The continuous ranked probability score for circular
    variables and its application to mesoscale forecast ensemble verification", QJRMS 132 (2006), eq. 5,
    https://doi.org/10.1256/qj.05.235.

    Args:
        loc, scale: of the components, ``[K, …]``; scale above 0.
        y: ``[…]``.
        weights: ``[K]`` or ``[K, …]``; need not sum to 1. None: equal.
    """
    loc, scale = torch.broadcast_tensors(loc, scale)
    _draws(loc, "loc", 1)
    _fits(loc, y)
    w = _weights(weights, loc)
    first = (w * _mean_absolute(y - loc, scale)).sum(0)
    size = max(MAX_ELEMENTS // max(loc.numel(), 1), 1)
    second = torch.zeros_like(first)
    for i in range(0, len(loc), size):
        apart = loc[i : i + size].unsqueeze(1) - loc
        spread = (scale[i : i + size].square().unsqueeze(1) + scale.square()).sqrt()
        second = second + (w[i : i + size].unsqueeze(1) * w * _mean_absolute(apart, spread)).sum((0, 1))
    return first - 0.5 * second


def _mean_absolute(mean: Tensor, scale: Tensor) -> Tensor:
    """E|X| of a Normal X."""
    z = mean / scale
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
    return scale * (2.0 * density + z * torch.erf(z / _ROOT_2))


def crps_ensemble(
    draws: Tensor, y: Tensor, weights: Tensor | None = None, *, fair: bool = True, in_order: bool = False
) -> Tensor:
    """CRPS from draws, Σ_i w_i |x_i − y| − ½ Σ_ij w_i w_j |x_i − x_j|, in the units of y; O(n log n).

    ``fair`` divides the second sum by 1 − Σ w_i² (for equal weights: by (n − 1) / n), and so estimates without bias
    the CRPS of the distribution that the draws come from. Without it, it is the CRPS of the draws themselves, as if
    these n numbers were the forecast: it rewards too narrow ensembles of few draws. Source: C. A. T. Ferro, "Fair
    scores for ensemble forecasts", QJRMS 140 (2014), https://doi.org/10.1002/qj.2270. Departure: weights, which Ferro
    does not have; they must not depend on the draws for the estimate to be unbiased.

    Args:
        draws: ``[n, …]``; n ≥ 2 where ``fair``.
        y: ``[…]``.
        weights: ``[n]`` or ``[n, …]``; need not sum to 1. None: equal.
        fair: see above.
        in_order: that the draws are sorted along the first dimension already.

    Raises:
        OptionError: for fewer than 2 draws where ``fair``.
        ShapeError: for shapes that do not fit.
    """
    _draws(draws, "draws", 2 if fair else 1)
    _fits(draws, y)
    n, centred = draws.shape[0], draws - y  # about y: no cancellation when y lies far from 0
    if weights is None:
        if not in_order:
            centred = centred.sort(0).values
        # the sum over pairs is Σ_i 2 (2i − n − 1) x_(i) for sorted x
        rank = 2.0 * torch.arange(1, n + 1, dtype=draws.dtype, device=draws.device) - (n + 1)
        spread = torch.einsum("n,n...->...", rank, centred) / (n * (n - 1 if fair else n))
        return centred.abs().mean(0) - spread
    w = _weights(weights, centred).expand(centred.shape)
    if not in_order:
        centred, order = centred.sort(0)
        w = w.gather(0, order)
    below = w.cumsum(0) - w
    pairs = (w * (centred * below - ((w * centred).cumsum(0) - w * centred))).sum(0)
    unequal = 1.0 - w.square().sum(0) if fair else 1.0
    return (w * centred.abs()).sum(0) - pairs / unequal


def energy_score(draws: Tensor, y: Tensor, *, fair: bool = True, pairs: str = "all") -> Tensor:
    """Energy score from draws of a vector, E‖X − y‖ − ½ E‖X − X′‖, in the units of y: the CRPS of a vector.

    Source: Gneiting & Raftery (2007), eq. 22 with β = 1.

    Args:
        draws: ``[n, …, d]``; n ≥ 2.
        y: ``[…, d]``.
        fair: leave out the pairs of a draw with itself, see :func:`crps_ensemble`.
        pairs: ``"all"`` n² pairs, or ``"half"``: each draw with the one n/2 further on alone. The latter is O(n), as
            unbiased, and noisier: its standard error is that of a mean of n/2 distances. ``fair`` makes no difference
            to it.

    Returns:
        ``[…]``.

    Raises:
        OptionError: for fewer than 2 draws, or another word for ``pairs``.
        ShapeError: for shapes that do not fit.
    """
    if pairs not in ("all", "half"):
        raise OptionError(f"pairs={pairs!r}; expected 'all' or 'half'.")
    _draws(draws, "draws", 2)
    _fits(draws, y)
    if y.dim() == 0:
        raise ShapeError("y is a number; expected vectors […, d]. Of numbers, the energy score is crps_ensemble.")
    n = draws.shape[0]
    first = _norm(draws - y).mean(0)
    if pairs == "half":
        half = n // 2
        return first - 0.5 * _norm(draws[:half] - draws[half : 2 * half]).mean(0)
    size = max(MAX_ELEMENTS // max(draws.numel(), 1), 1)
    second = torch.zeros_like(first)
    for i in range(0, n, size):
        second = second + _norm(draws[i : i + size].unsqueeze(1) - draws).sum((0, 1))
    return first - 0.5 * second / (n * (n - 1 if fair else n))


def _norm(vectors: Tensor) -> Tensor:
    """Euclidean norm of the last dimension, with gradient 0 at 0 (a draw and itself)."""
    return torch.linalg.vector_norm(vectors, dim=-1)


# -- intervals and quantiles --------------------------------------------------------------------------------------


def pinball(quantile: Tensor, y: Tensor, probability: float) -> Tensor:
    """Pinball loss of a forecast quantile, in the units of y: probability · (y − q) above it, else (1 − p)(q − y).

    Source: R. Koenker, G. Bassett, "Regression Quantiles", Econometrica 46 (1978), https://doi.org/10.2307/1913643.
    Its mean over all probabilities is half the CRPS.

    Args:
        quantile, y: of one shape, or broadcastable.
        probability: in (0, 1).
    """
    _inside("probability", probability)
    _broadcast(quantile=quantile, y=y)
    above = y - quantile
    return torch.maximum(probability * above, (probability - 1.0) * above)


def interval_score(low: Tensor, high: Tensor, y: Tensor, level: float = 0.9) -> Tensor:
    """Width of a central interval, plus 2 / (1 − level) times how far y lies outside, in the units of y.

    Source: Gneiting & Raftery (2007), eq. 43, with α = 1 − level. It is 2 / α times the sum of the :func:`pinball`
    losses of both ends.

    Args:
        low, high: quantiles at (1 − level) / 2 and (1 + level) / 2.
        y: the outcome.
        level: in (0, 1).
    """
    _inside("level", level)
    _broadcast(low=low, high=high, y=y)
    outside = (low - y).clamp(min=0.0) + (y - high).clamp(min=0.0)
    return (high - low) + 2.0 / (1.0 - level) * outside


def sharpness(low: Tensor, high: Tensor) -> Tensor:
    """Width of an interval forecast, in the units of y. No score: only between calibrated forecasts is less better.

    Source: T. Gneiting, F. Balabdaoui, A. E. Raftery, "Probabilistic forecasts, calibration and sharpness", JRSS B 69
    (2007), section 3.4, https://doi.org/10.1111/j.1467-9868.2007.00587.x.
    """
    _broadcast(low=low, high=high)
    return high - low


# -- classes ------------------------------------------------------------------------------------------------------


def brier_score(probabilities: Tensor, y: Tensor) -> Tensor:
    """Σ_k (p_k − 1[y = k])², from 0 to 2.

    For two classes it is twice (p_1 − y)², :func:`brier_score_binary`, which some call by the same name. Source: G. W.
    Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78 (1950), eq. 2,
    https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.

    Args:
        probabilities: ``[…, classes]``.
        y: index of the class, ``[…]``.

    Raises:
        ShapeError: if the shapes do not fit.
        DataError: for a y that is no index of a class.
    """
    if probabilities.dim() == 0 or probabilities.shape[:-1] != y.shape:
        raise ShapeError(
            f"probabilities has shape {list(probabilities.shape)} and y {list(y.shape)}; expected […, classes] and […]."
        )
    classes = probabilities.shape[-1]
    if not bool(((y >= 0) & (y < classes) & (y % 1 == 0)).all()):
        raise DataError(f"y holds numbers that are no class; expected the classes 0 to {classes - 1}, by their index.")
    hit = torch.nn.functional.one_hot(y.long(), probabilities.shape[-1])
    return (probabilities - hit).square().sum(-1)


def brier_score_binary(probability: Tensor, y: Tensor) -> Tensor:
    """(p − y)² of the probability of class 1, from 0 to 1; y is 0 or 1, in the shape of the probability."""
    _broadcast(probability=probability, y=y)
    return (probability - y).square()


# -- checks -------------------------------------------------------------------------------------------------------


def _draws(tensor: Tensor, name: str, least: int) -> None:
    if tensor.dim() == 0 or tensor.shape[0] < least:
        raise OptionError(
            f"{name} has shape {list(tensor.shape)}; expected at least {least} draw(s) along the first dimension."
        )


def _fits(draws: Tensor, y: Tensor) -> None:
    """One outcome for each forecast: y may broadcast, but a missing dimension would be scored against other points."""
    if draws.shape[1:] != y.shape:
        raise ShapeError(f"The draws have shape {list(draws.shape)} and y {list(y.shape)}; expected [n, …] and […].")


def _broadcast(**tensors: Tensor) -> None:
    try:
        torch.broadcast_shapes(*(tensor.shape for tensor in tensors.values()))
    except RuntimeError as error:
        given = ", ".join(f"{name} has shape {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(f"{given}; expected one shape, or shapes that broadcast.") from error


def _weights(weights: Tensor | None, draws: Tensor) -> Tensor:
    """Weights of sum 1 that broadcast against the draws."""
    if weights is None:
        n = draws.shape[0]
        return torch.full((n,) + (1,) * (draws.dim() - 1), 1.0 / n, dtype=draws.dtype, device=draws.device)
    if weights.shape not in (draws.shape, draws.shape[:1]):
        raise ShapeError(
            f"weights has shape {list(weights.shape)}; expected {list(draws.shape[:1])} or {list(draws.shape)}."
        )
    w = weights.reshape(weights.shape + (1,) * (draws.dim() - weights.dim())).to(draws.dtype)
    return w / w.sum(0)


def _inside(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise OptionError(f"{name}={value}; expected a number between 0 and 1, both excluded.")
