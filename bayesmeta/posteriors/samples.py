"""Draws and particles: posteriors without a density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import ShapeError, UnsupportedError
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
        log_q: log-density of each draw in unconstrained space, where a guide knows it: of a task's φ,
            ``[n, tasks]``, where the guide's tasks are independent and there are no global sites; else of θ and the φ
            of all tasks together, ``[n]``.

    Attributes:
        is_point: True where all of several draws are the same, as an ``AutoDelta`` gives them.
    """

    #: Markov chains that the draws come from, chain after chain; independent draws count as one
    num_chains = 1

    def __init__(
        self,
        program: TaskProgram,
        support: Observations,
        u: Tensor,
        theta: Tensor | None = None,
        log_q: Tensor | None = None,
    ) -> None:
        super().__init__(program, support)
        if log_q is not None and log_q.shape not in (u.shape[:1], u.shape[:2]):
            raise ShapeError(
                f"log_q has shape {list(log_q.shape)}; expected [draws, tasks] = {list(u.shape[:2])}, or [draws]."
            )
        self.u, self.theta, self.log_q = u, theta, log_q
        self.num_draws = len(u)
        parts = [u] if theta is None else [u, theta]
        self.is_point = len(u) > 1 and all(bool((part == part[:1]).all()) for part in parts)

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """The draws themselves when all are asked for, else a random choice of them with replacement."""
        if num_samples == self.u.shape[0]:
            return Draws(self.u, self.theta, self.log_q, self._stats())
        generator = as_generator(generator, self.u.device, "draws")
        pick = torch.randint(self.u.shape[0], (num_samples,), generator=generator, device=self.u.device)
        stats = self._stats()
        return Draws(
            self.u[pick],
            None if self.theta is None else self.theta[pick],
            None if self.log_q is None else self.log_q[pick],
            None if stats is None else {name: value[pick.to(value.device)] for name, value in stats.items()},
        )

    def _stats(self) -> Mapping[str, Tensor] | None:
        """What the sampler says of each draw."""
        return None

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
        """u, and theta and log_q where there are such."""
        parts = {"u": self.u, "theta": self.theta, "log_q": self.log_q}
        return {name: part for name, part in parts.items() if part is not None}


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
