"""A Gaussian process fitted to each task alone, by the evidence of its context: what there is without meta-learning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import bayesmeta as bm
from benchmarks._pacoh_tasks import targets

STEPS, RATE = 300, 0.05
#: Smallest standard deviation of the noise, in standard units: five points can be fitted without any.
LEAST_NOISE = 0.01


@dataclass
class VanillaPosterior:
    """The predictive of each task under its own hyper-parameters; targets are standardised by the task's context."""

    support: bm.Observations
    raw: Tensor  # logarithms of length scale, standard deviation and noise, and the constant mean: [tasks, 4]
    centre: Tensor
    scale: Tensor

    def predictive(self, query: bm.Observations) -> torch.distributions.Normal:
        """Of noisy targets, batch ``[tasks, points]``."""
        with torch.no_grad():
            gram, y = _gram(self.raw, self.support.x), (targets(self.support) - self.centre) / self.scale
            noise, mean = _noise(self.raw), self.raw[:, 3:]
            root = torch.linalg.cholesky(gram + noise.square().unsqueeze(-1) * torch.eye(gram.shape[-1]))
            cross = torch.linalg.solve_triangular(root, _gram(self.raw, self.support.x, query.x), upper=False)
            white = torch.linalg.solve_triangular(root, (y - mean).unsqueeze(-1), upper=False)
            variance = (2 * self.raw[:, 1:2]).exp() - cross.square().sum(-2) + noise.square()
            loc = mean + (cross.mT @ white).squeeze(-1)
            return torch.distributions.Normal(
                loc * self.scale + self.centre, variance.clamp(min=1e-8).sqrt() * self.scale
            )


class VanillaGP:
    """Squared exponential kernel, constant mean, noise: maximum evidence for each task, all tasks at once by Adam."""

    def adapt(self, support: bm.Observations, generator: int = 0) -> VanillaPosterior:
        """Fit each task's hyper-parameters to its context."""
        y = targets(support)
        centre, scale = y.mean(-1, keepdim=True), y.std(-1, keepdim=True).clamp(min=1e-3)
        y = (y - centre) / scale
        first = torch.tensor([0.0, 0.0, math.log(0.3), 0.0]).expand(len(y), 4)
        raw = first.clone().requires_grad_()
        optimizer = torch.optim.Adam([raw], RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            gram = _gram(raw, support.x) + _noise(raw).square().unsqueeze(-1) * torch.eye(y.shape[-1])
            normal = torch.distributions.MultivariateNormal(raw[:, 3:].expand_as(y), gram, validate_args=False)
            (-normal.log_prob(y).sum()).backward()
            optimizer.step()
        return VanillaPosterior(support, raw.detach(), centre, scale)


def _gram(raw: Tensor, a: Tensor, b: Tensor | None = None) -> Tensor:
    length, deviation = raw[:, 0].exp()[:, None, None], (2 * raw[:, 1]).exp()[:, None, None]
    gap = (a.unsqueeze(-2) - (a if b is None else b).unsqueeze(-3)).square().sum(-1)
    return deviation * torch.exp(-0.5 * gap / length.square())


def _noise(raw: Tensor) -> Tensor:
    return LEAST_NOISE + raw[:, 2:3].exp()
