"""Draws and particles: posteriors without a density."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import UnsupportedError
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.posteriors.base import Draws, TaskPosterior
from bayesmeta.posteriors.mixture import LeftMixture


class SamplesPosterior(TaskPosterior):
    """Draws of φ (and θ), as MCMC or a user's own guide gives them.

    Args:
        program: the model.
        support: what was conditioned on.
        u: unconstrained draws, ``[n, tasks, D]``.
        theta: unconstrained global sites, ``[n, E]``.
    """

    def __init__(self, program: TaskProgram, support: Observations, u: Tensor, theta: Tensor | None = None) -> None:
        super().__init__(program, support)
        self.u, self.theta = u, theta
        self.num_draws = len(u)

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """The draws themselves when all are asked for, else a random choice of them with replacement."""
        if num_samples == self.u.shape[0]:
            return Draws(self.u, self.theta)
        generator = as_generator(generator, self.u.device, "draws")
        pick = torch.randint(self.u.shape[0], (num_samples,), generator=generator, device=self.u.device)
        return Draws(self.u[pick], None if self.theta is None else self.theta[pick])

    def log_prob(self, u: Tensor) -> Tensor:
        """Refused: samples have no density.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("Samples have no density; fit a method with one, such as ABML, for log_prob.")

    def u_distribution(self) -> Any:
        """Refused: an ELBO or importance weight under samples, which have no density, would be wrong.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("Samples have no density, so they are no Pyro guide; read them with sample or draws.")

    def state(self) -> dict[str, Tensor]:
        """u, and theta where there is one."""
        return {"u": self.u} | ({} if self.theta is None else {"theta": self.theta})


class ParticlesPosterior(TaskPosterior):
    """Equally weighted particles, each a point in u, as SVGD and ensembles give them.

    Args:
        program: the model.
        support: what was adapted to.
        u: unconstrained particles, ``[n, tasks, D]``.
        theta: unconstrained global sites of each, ``[n, E]``.
    """

    def __init__(self, program: TaskProgram, support: Observations, u: Tensor, theta: Tensor | None = None) -> None:
        super().__init__(program, support)
        self.u, self.theta = u, theta
        self.num_draws = len(u)

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """The particles in turn, so that each counts equally when ``num_samples`` is a multiple of their number."""
        pick = torch.arange(num_samples, device=self.u.device) % self.u.shape[0]
        return Draws(self.u[pick], None if self.theta is None else self.theta[pick])

    def log_prob(self, u: Tensor) -> Tensor:
        """Refused: particles have no density.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("Particles have no density; use a method with one, such as ABML, for log_prob.")

    def u_distribution(self) -> Any:
        """Refused: an ELBO or importance weight under particles, which have no density, would be wrong.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("Particles have no density, so they are no Pyro guide; read them with sample or draws.")

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The mixture of the likelihoods at the particles.

        Returns:
            A mixture with batch ``[tasks, shots]``, or ``[tasks]`` with event ``[shots, …]`` when joint.
        """
        observations = self._as_observations(x)
        with torch.no_grad():
            each = self.program.predictive(self.u, observations, self.theta)
            each = each.expand((len(self.u), observations.num_tasks, observations.shots))
        each = each.to_event(1) if joint else each
        return LeftMixture(self.u.new_zeros(len(self.u), *([1] * (len(each.batch_shape) - 1))), each)

    def state(self) -> dict[str, Tensor]:
        """u, and theta where there is one."""
        return {"u": self.u} | ({} if self.theta is None else {"theta": self.theta})
