"""The predictive of one who knows the environments: what the scores are at best, and that calibration has a floor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.ops.random import as_generator
from benchmarks._pacoh_tasks import cauchy_covariance, cauchy_mean, targets

#: Draws of amplitude and shift, which are weighted by how well they explain the context.
DRAWS = 500


@dataclass
class OraclePosterior:
    """Given the context; in standard units."""

    environment: str
    standardizer: bm.Standardizer
    support: bm.Observations

    def predictive(self, query: bm.Observations) -> torch.distributions.Distribution:
        """Of noisy targets, batch ``[tasks, points]``."""
        scale = self.standardizer
        known, new = (scale.raw_x(part.x).double() for part in (self.support, query))
        y = scale.raw_y(targets(self.support)).double()
        components, weights = (_cauchy if self.environment == "cauchy" else _sinusoid)(known, y, new)
        loc, deviation = (components[0] - scale.y_mean) / scale.y_scale, components[1] / scale.y_scale
        normal = torch.distributions.Normal(loc, deviation)
        mixing = torch.distributions.Categorical(logits=weights.unsqueeze(-2).expand(loc.shape))
        return torch.distributions.MixtureSameFamily(mixing, normal)


@dataclass
class Oracle:
    """Knows how tasks are made: exact for Cauchy tasks, by importance weights for sinusoids."""

    environment: str
    standardizer: bm.Standardizer

    def adapt(self, support: bm.Observations, generator: int = 0) -> OraclePosterior:
        """Nothing to compute before the query is known."""
        return OraclePosterior(self.environment, self.standardizer, support)


Mixture = tuple[tuple[Tensor, Tensor], Tensor]


def _cauchy(x: Tensor, y: Tensor, new: Tensor) -> Mixture:
    """Means and deviations ``[tasks, points, 1]``, and log weights ``[tasks, 1]``: exact conditioning of the GP."""
    noisy = 0.04 * cauchy_covariance(x) + 0.05**2 * torch.eye(x.shape[-2], dtype=x.dtype)
    cross = 0.04 * cauchy_covariance(x, new)
    gain = torch.linalg.solve(noisy, cross)
    mean = cauchy_mean(new) + (gain.mT @ (y - cauchy_mean(x)).unsqueeze(-1)).squeeze(-1)
    variance = 0.04 + 0.05**2 - (gain * cross).sum(-2)
    return (mean.unsqueeze(-1), variance.sqrt().unsqueeze(-1)), x.new_zeros(len(x), 1)


def _sinusoid(x: Tensor, y: Tensor, new: Tensor) -> Mixture:
    """The same ``[tasks, points, draws]``: given amplitude and shift the rest is linear and Gaussian."""
    generator = as_generator(0, stream="oracle")
    amplitude = 0.7 + 0.6 * torch.rand(DRAWS, 1, 1, generator=generator, dtype=x.dtype)
    shift = 0.1 * torch.randn(DRAWS, 1, 1, generator=generator, dtype=x.dtype)
    known, wanted = (part.squeeze(-1) for part in (x, new))
    design, at = (torch.stack([part, torch.ones_like(part)], -1) for part in (known, wanted))
    prior = torch.tensor([0.2**2, 0.1**2], dtype=x.dtype)
    covariance = (design * prior) @ design.mT + 0.1**2 * torch.eye(x.shape[-2], dtype=x.dtype)
    rest = y - amplitude * torch.sin(1.5 * (known - shift)) - 0.5 * known - 5
    weights = torch.distributions.MultivariateNormal(torch.zeros_like(known), covariance).log_prob(rest)
    gain = torch.linalg.solve(covariance, design * prior)  # [tasks, shots, 2]
    effects = torch.einsum("dtn,tnk->dtk", rest, gain)
    centre = amplitude * torch.sin(1.5 * (wanted - shift)) + 0.5 * wanted + 5
    mean = centre + torch.einsum("dtk,tpk->dtp", effects, at)
    left = torch.diag(prior) - (design * prior).mT @ gain
    variance = torch.einsum("tpk,tkl,tpl->tp", at, left, at) + 0.1**2
    deviation = variance.sqrt().unsqueeze(-1).expand(*variance.shape, DRAWS)
    return (mean.movedim(0, -1), deviation), weights.mT
