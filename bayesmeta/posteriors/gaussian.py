"""Gaussians over the unconstrained φ: diagonal, or with correlations."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.gaussian import lower_root
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.posteriors.base import Draws
from bayesmeta.posteriors.components import Components


class NormalPosterior(Components):
    """Diagonal Gaussian over u for each task.

    Args:
        program: the model.
        support: what was adapted to.
        loc, scale: mean and standard deviation, each ``[G, tasks, D]``; G counts draws of global sites.
        theta: unconstrained global sites, ``[G, E]``.
    """

    def __init__(
        self, program: TaskProgram, support: Observations, loc: Tensor, scale: Tensor, theta: Tensor | None = None
    ) -> None:
        super().__init__(program, support, theta)
        self.loc, self.scale = loc, scale

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws, the components in turn."""
        generator = as_generator(generator, self.loc.device, "draws")
        component = self._component(num_samples, self.loc.shape[0])
        shape = (num_samples, *self.loc.shape[1:])
        noise = normal_like(self.loc, shape, generator)
        return Draws(self.loc[component] + noise * self.scale[component], self._theta_at(component))

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u), a mixture over the components, ``[…, tasks]``."""
        normal = torch.distributions.Normal(self.loc, self.scale)
        each = normal.log_prob(u.unsqueeze(-3)).sum(-1)
        return each.logsumexp(-2) - math.log(self.loc.shape[0])

    def u_distribution(self) -> Any:
        """Independent Normals, batch shape ``[tasks, 1]``."""
        loc, scale = self._components(self.loc), self._components(self.scale)
        return dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1)

    def state(self) -> dict[str, Tensor]:
        """loc, scale, and theta where there is one."""
        return {"loc": self.loc, "scale": self.scale} | ({} if self.theta is None else {"theta": self.theta})


class MultivariateNormalPosterior(Components):
    """Gaussian over u for each task with correlations: a full covariance, or one of low rank.

    Args:
        program: the model.
        support: what was adapted to.
        loc: mean, ``[G, tasks, D]``; G counts draws of global sites.
        root: R with covariance R Rᵀ, ``[G, tasks, D, M]`` with M ≥ D, of rank D.
        theta: unconstrained global sites, ``[G, E]``.
    """

    def __init__(
        self, program: TaskProgram, support: Observations, loc: Tensor, root: Tensor, theta: Tensor | None = None
    ) -> None:
        super().__init__(program, support, theta)
        self.loc, self.root = loc, root

    @property
    def covariance(self) -> Tensor:
        """Covariance of u, ``[G, tasks, D, D]``."""
        return self.root @ self.root.mT

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws, the components in turn."""
        generator = as_generator(generator, self.loc.device, "draws")
        component = self._component(num_samples, self.loc.shape[0])
        noise = normal_like(self.loc, (num_samples, self.num_tasks, self.root.shape[-1]), generator)
        u = self.loc[component] + (self.root[component] @ noise.unsqueeze(-1)).squeeze(-1)
        return Draws(u, self._theta_at(component))

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u), a mixture over the components, ``[…, tasks]``."""
        normal = torch.distributions.MultivariateNormal(self.loc, scale_tril=lower_root(self.root))
        each = normal.log_prob(u.unsqueeze(-3))
        return each.logsumexp(-2) - math.log(self.loc.shape[0])

    def u_distribution(self) -> Any:
        """Multivariate normal, batch shape ``[tasks, 1]``."""
        loc, root = self._components(self.loc), self._components(self.root)
        return dist.MultivariateNormal(loc.unsqueeze(-2), scale_tril=lower_root(root).unsqueeze(-3))

    def state(self) -> dict[str, Tensor]:
        """loc, root, and theta where there is one."""
        return {"loc": self.loc, "root": self.root} | ({} if self.theta is None else {"theta": self.theta})
