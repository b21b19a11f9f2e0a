"""The posterior over a program's global sites: a point or a Gaussian."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed, as_generator, normal_like

GlobalKind = Literal["point", "normal"]


class GlobalGuide(nn.Module):
    """q(θ) over the sites outside the task plate, in unconstrained space.

    Args:
        program: prepared, with at least one global site.
        kind: ``"point"`` (a MAP estimate of the density in the sites' own space, as Pyro's AutoDelta) or ``"normal"``
            (mean-field Gaussian in unconstrained space, as AutoNormal).
        observations: data of the right width, used to draw the start: the median of 100 prior draws.
        init_scale: first standard deviation of the Gaussian.

    Raises:
        OptionError: for another kind.
    """

    def __init__(
        self, program: TaskProgram, kind: GlobalKind, observations: Observations, init_scale: float = 0.1
    ) -> None:
        super().__init__()
        if kind not in ("point", "normal"):
            raise OptionError(f"Unknown global guide {kind!r}; expected 'point' or 'normal'.")
        self.kind = kind
        _, draws = program.sample_prior(100, observations, 0)
        assert draws is not None
        start = draws.median(0).values  # heavy-tailed priors have no mean
        self.loc = nn.Parameter(start.to(observations.x))
        if kind == "normal":
            self.log_scale = nn.Parameter(torch.full_like(self.loc, init_scale).log())

    def draw(self, num_samples: int, generator: Seed = None) -> Tensor:
        """Reparameterised draws ``[n, E]``; a point gives copies."""
        if self.kind == "point":
            return self.loc.expand(num_samples, -1)
        generator = as_generator(generator, self.loc.device, "theta")
        noise = normal_like(self.loc, (num_samples, self.loc.numel()), generator)
        return self.loc + noise * self.log_scale.exp()

    def log_density(self, theta: Tensor) -> Tensor:
        """log q(θ) in unconstrained space, ``[…]``; 0 for a point."""
        if self.kind == "point":
            return theta.new_zeros(theta.shape[:-1])
        return torch.distributions.Normal(self.loc, self.log_scale.exp()).log_prob(theta).sum(-1)

    def penalty(self, program: TaskProgram, theta: Tensor, observations: Observations) -> Tensor:
        """What training minimises for θ, once for all tasks, ``[…]``.

        −log p(θ) for a point, log q(θ) − log p(θ) for a Gaussian.
        """
        log_prior = program.log_theta(theta, observations, jacobian=self.kind == "normal")
        return self.log_density(theta) - log_prior
