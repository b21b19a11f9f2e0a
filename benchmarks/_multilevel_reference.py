"""Long NUTS on the multilevel program with the effects integrated out, and the effects' exact posterior given θ.

Given θ all is linear and Gaussian. With Z = [1, x₀], r = y − its mean where effect = mean, effect ~ Normal(mean, L Lᵀ)
and noise variance s², the matrix M = I + Lᵀ Zᵀ Z L / s² gives (Woodbury)::

    log p(y | θ)    = −½ [n log(2π s²) + log |M| + (rᵀ r − rᵀ Z L M⁻¹ Lᵀ Zᵀ r / s²) / s²]
    effect | y, θ   ~ Normal(mean + V Zᵀ r / s², V),    V = L M⁻¹ Lᵀ

so that NUTS has six or seven dimensions, and a task's posterior is a mixture of these Gaussians over the draws of θ.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from arviz_stats.base import array_stats
from pyro.infer import MCMC, NUTS
from torch import Tensor

import bayesmeta as bm
from bayesmeta.ops.random import as_generator, forked_rng, normal_like
from benchmarks._multilevel_model import CONCENTRATION, WIDE, Multilevel


@dataclass(frozen=True)
class Sums:
    """What the likelihood needs of each task: n ``[N]``, DᵀD ``[N, p, p]``, Dᵀy ``[N, p]``, yᵀy ``[N]``, D = [1, x]."""

    n: Tensor
    dd: Tensor
    dy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, data: bm.Observations) -> Sums:
        """Over the real rows."""
        assert data.y is not None
        keep = data.full_mask().to(data.x.dtype)
        design = torch.cat([keep.unsqueeze(-1), data.x * keep.unsqueeze(-1)], -1)
        y = data.y * keep
        return cls(keep.sum(-1), design.mT @ design, (design.mT @ y.unsqueeze(-1)).squeeze(-1), y.square().sum(-1))


@dataclass(frozen=True)
class Marginal:
    """The program without its effects: densities of θ ``[…, E]``, and Gaussians of the effects given it."""

    sums: Sums

    def log_prior(self, theta: Tensor) -> Tensor:
        """log p(θ) in unconstrained space, ``[…]``."""
        linear, logs = theta[..., :-4], theta[..., [-4, -3, -1]]
        # LKJ(η) in two dimensions: (1 − ρ²)^(η − 1), and ρ = tanh(raw) adds one more factor 1 − ρ² = cosh⁻² raw
        lkj = -2 * CONCENTRATION * theta[..., -2].cosh().log()
        squares = linear.square().sum(-1) / WIDE**2 + (2 * logs).exp().sum(-1)
        return self._constant(linear.shape[-1]) - 0.5 * squares + logs.sum(-1) + lkj

    @staticmethod
    def _constant(width: int) -> float:
        """What normalises the prior of ``width`` coefficients, three half-normals and one correlation."""
        normal = -width * math.log(WIDE * math.sqrt(2 * math.pi))
        lkj = math.lgamma(CONCENTRATION + 0.5) - math.lgamma(CONCENTRATION) - 0.5 * math.log(math.pi)
        return normal + 1.5 * math.log(2 / math.pi) + lkj

    def _parts(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Coefficients, noise variance, entries of L, Zᵀr, rᵀr and the entries a, b, c of M = [[a, b], [b, c]]."""
        beta, raw, s = theta[..., :-4], theta[..., -2:-1], self.sums
        scale, variance = theta[..., -4:-2].exp(), (2 * theta[..., -1:]).exp()
        fitted = (s.dd @ beta[..., None, :, None]).squeeze(-1)
        rest = s.dy - fitted
        rr = s.yy - ((rest + s.dy) * beta[..., None, :]).sum(-1)
        l11, second = scale[..., :1], scale[..., 1:]
        l21, l22 = second * raw.tanh(), second / raw.cosh()
        g11, g12, g22 = s.dd[:, 0, 0], s.dd[:, 0, 1], s.dd[:, 1, 1]
        cross = l11 * g12 + l21 * g22
        a = 1 + (l11 * (l11 * g11 + l21 * g12) + l21 * cross) / variance
        b = l22 * cross / variance
        c = 1 + l22 * l22 * g22 / variance
        return beta, variance, l11, l21, l22, rest[..., :2], rr, a, b, c

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """log p(y_i | θ) of each task, ``[…, N]``."""
        _, variance, l11, l21, l22, zr, rr, a, b, c = self._parts(theta)
        t1, t2 = l11 * zr[..., 0] + l21 * zr[..., 1], l22 * zr[..., 1]
        det = a * c - b * b
        explained = (c * t1 * t1 + (a * t2 - 2 * b * t1) * t2) / det
        quadratic = (rr - explained / variance) / variance
        return -0.5 * (self.sums.n * (2 * math.pi * variance).log() + det.log() + quadratic)

    def log_density(self, theta: Tensor) -> Tensor:
        """log p(y, θ) in unconstrained space, ``[…]``."""
        return self.log_prior(theta) + self.log_likelihood(theta).sum(-1)

    def conditional(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[…, N, 2]`` and covariance ``[…, N, 2, 2]`` of the effects given y and θ."""
        beta, variance, l11, l21, l22, zr, _, a, b, c = self._parts(theta)
        det = a * c - b * b
        rows = [torch.stack([l11.expand_as(a), torch.zeros_like(a)], -1)]
        rows.append(torch.stack([l21.expand_as(a), l22.expand_as(a)], -1))
        lower = torch.stack(rows, -2)
        inverse = torch.stack([torch.stack([c, -b], -1), torch.stack([-b, a], -1)], -2) / det[..., None, None]
        v = lower @ inverse @ lower.mT
        return beta[..., None, :2] + (v @ zr.unsqueeze(-1)).squeeze(-1) / variance.unsqueeze(-1), v


# -- NUTS ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Of NUTS: chains, run one after the other from different starts; steps of warm-up and draws of each; a seed."""

    chains: int
    warmup: int
    draws: int
    seed: int = 0


def marginal_nuts(data: bm.Observations, settings: Settings) -> dict[str, Tensor]:
    """Draws of θ under the marginal density, ``theta`` ``[chains, draws, E]``, and the number of divergences."""
    marginal, size = Marginal(Sums.of(data)), data.num_features + 5

    def potential(values: dict[str, Tensor]) -> Tensor:
        return -marginal.log_density(values["theta"])

    def kernel() -> tuple[NUTS, dict[str, Tensor]]:
        start = {"theta": 0.5 * torch.randn(size, dtype=torch.float64)}
        return NUTS(potential_fn=potential, full_mass=True), start

    return _chains(kernel, (), settings)


def plain_nuts(data: bm.Observations, settings: Settings) -> dict[str, Tensor]:
    """Draws by NUTS on the program as it stands: its sites by name, ``effect`` as ``[chains, draws, N, 2]``."""

    def kernel() -> tuple[NUTS, None]:
        return NUTS(Multilevel()), None

    draws = _chains(kernel, (data.x, data.y, data.mask), settings)
    return draws | {"effect": draws["effect"].squeeze(-2)}


def _chains(kernel: Callable[[], tuple[NUTS, Any]], args: tuple[Any, ...], settings: Settings) -> dict[str, Tensor]:
    chains, divergences = [], 0
    generator = as_generator(settings.seed, stream="multilevel nuts")
    for _ in range(settings.chains):
        with forked_rng(generator), pyro.get_param_store().scope():
            sampler, start = kernel()
            mcmc = MCMC(
                sampler, settings.draws, warmup_steps=settings.warmup, initial_params=start, disable_progbar=True
            )
            mcmc.run(*args)
            chains.append(mcmc.get_samples())
            divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
    draws = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    return draws | {"divergences": torch.tensor(divergences)}


def cached(
    name: str,
    sample: Callable[[bm.Observations, Settings], dict[str, Tensor]],
    data: bm.Observations,
    settings: Settings,
    folder: Path,
    refresh: bool = False,
) -> dict[str, Tensor]:
    """Draws from a file, or made now and kept. The file's name tells data, program and settings apart.

    Args:
        name: first part of the file's name.
        sample: makes the draws.
        data, settings: its arguments.
        folder: of the files.
        refresh: make them in any case.

    Returns:
        What ``sample`` gave, and ``seconds`` that it took.
    """
    digest = hashlib.blake2b(digest_size=6)
    for tensor in (data.x, data.y, data.full_mask()):
        assert tensor is not None
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(json.dumps([sample.__name__, WIDE, CONCENTRATION, asdict(settings)]).encode())
    path = folder / f"{name}_{sample.__name__}_{digest.hexdigest()}.pt"
    if path.is_file() and not refresh:
        return dict(torch.load(path, weights_only=True))
    begin = time.perf_counter()
    draws = sample(data, settings)
    draws["seconds"] = torch.tensor(time.perf_counter() - begin)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")  # a run that is stopped leaves no half file
    torch.save(draws, partial)
    partial.replace(path)
    return draws


# -- moments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Posterior mean and standard deviation ``[N, 2]`` of each task's effects, and their correlation ``[N]``."""

    mean: Tensor
    sd: Tensor
    correlation: Tensor

    @classmethod
    def of_mixture(cls, means: Tensor, covariances: Tensor | None = None) -> Moments:
        """Of an even mixture of Gaussians with means ``[n, N, 2]`` and covariances; of draws, where there are none."""
        mean = means.mean(0)
        off = means - mean
        total = torch.einsum("nti,ntj->tij", off, off) / len(means)
        if covariances is not None:
            total = total + covariances.mean(0)
        sd = total.diagonal(dim1=-2, dim2=-1).sqrt()
        return cls(mean, sd, total[:, 0, 1] / sd.prod(-1))

    def mean_error(self, reference: Moments) -> Tensor:
        """|Difference of means| in the reference's standard deviations, ``[N, 2]``."""
        return (self.mean - reference.mean).abs() / reference.sd

    def sd_error(self, reference: Moments) -> Tensor:
        """|Ratio of standard deviations − 1|, ``[N, 2]``."""
        return (self.sd / reference.sd - 1).abs()


@dataclass(frozen=True)
class Reference:
    """What long NUTS says.

    Attributes:
        moments: by the exact Gaussians at each draw of θ, which have less Monte Carlo error than draws of the effects.
        rhat: greatest over the effects and θ.
        ess: smallest over the effects and θ.
        error: greatest Monte Carlo error of an effect's mean, in its standard deviations.
        divergences: of all chains.
    """

    moments: Moments
    rhat: float
    ess: float
    error: float
    divergences: int


def summarise(data: bm.Observations, draws: dict[str, Tensor], seed: int) -> Reference:
    """Moments and diagnostics of the draws of :func:`marginal_nuts`."""
    theta = draws["theta"]
    means, covariances = Marginal(Sums.of(data)).conditional(theta)
    moments = Moments.of_mixture(means.flatten(0, 1), covariances.flatten(0, 1))
    noise = normal_like(means, means.shape, as_generator(seed, stream="multilevel effects")).unsqueeze(-1)
    effects = means + (torch.linalg.cholesky(covariances) @ noise).squeeze(-1)
    chains = torch.cat([effects.flatten(2), theta], -1).numpy()
    means = means.flatten(2)
    spread = means.flatten(0, 1).std(0) / moments.sd.flatten()
    ess = torch.as_tensor(array_stats.ess(means.numpy(), chain_axis=0, draw_axis=1, method="mean"))
    return Reference(
        moments,
        rhat=float(array_stats.rhat(chains, chain_axis=0, draw_axis=1).max()),
        ess=float(array_stats.ess(chains, chain_axis=0, draw_axis=1).min()),
        error=float((spread / ess.sqrt()).max()),
        divergences=int(draws["divergences"]),
    )


def plain_z(reference: Reference, effects: Tensor) -> float:
    """Greatest |difference of an effect's means| in its Monte Carlo standard error, draws ``[chains, draws, N, 2]``.

    The error is that of both runs together; over 36 effects about 3 is to be expected.
    """
    flat = effects.flatten(2).numpy()
    ess = torch.as_tensor(array_stats.ess(flat, chain_axis=0, draw_axis=1, method="mean")).reshape(effects.shape[2:])
    found = Moments.of_mixture(effects.flatten(0, 1))
    error = (found.sd.square() / ess + (reference.error * reference.moments.sd).square()).sqrt()
    return float(((found.mean - reference.moments.mean).abs() / error).max())
