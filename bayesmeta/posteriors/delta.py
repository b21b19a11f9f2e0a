"""A point estimate of φ."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import NoClosedFormError, UnsupportedError
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed
from bayesmeta.posteriors.base import Draws
from bayesmeta.posteriors.components import Components


class DeltaPosterior(Components):
    """A point estimate: every draw of φ is the same.

    Args:
        program: the model.
        support: what was adapted to.
        u: unconstrained φ, ``[G, tasks, D]``; G counts draws of global sites, 1 where θ is a point.
        theta: unconstrained global sites, ``[G, E]``.
    """

    is_point = True

    def __init__(self, program: TaskProgram, support: Observations, u: Tensor, theta: Tensor | None = None) -> None:
        super().__init__(program, support, theta)
        self.u = u

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Copies of the point."""
        component = self._component(num_samples, self.u.shape[0])
        return Draws(self.u[component], self._theta_at(component))

    def log_prob(self, u: Tensor) -> Tensor:
        """Refused: a point has no density.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "A point estimate has no density over φ. Use a method with one, such as ABML or BayesianLastLayer."
        )

    def u_distribution(self) -> Any:
        """Delta at u, batch shape ``[tasks, 1]``."""
        return dist.Delta(self._components(self.u).unsqueeze(-2), event_dim=1)

    def class_probabilities(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """As :meth:`TaskPosterior.class_probabilities`; without ``draws``, exact: from each point once."""
        draws = Draws(self.u, self.theta) if draws is None else draws
        return super().class_probabilities(x, num_samples, draws=draws, generator=generator)

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The likelihood at φ: batch shape ``[tasks, shots]``, or ``[tasks]`` with event ``[shots, …]`` when joint."""
        observations = self._as_observations(x)
        if self.u.shape[0] != 1:
            raise NoClosedFormError("With several draws of θ the predictive is a mixture; use predict for draws.")
        with torch.no_grad():
            theta = None if self.theta is None else self.theta[0]
            result = self.program.predictive(self.u[0], observations, theta)
            result = result.expand((observations.num_tasks, observations.shots))
        return result.to_event(1) if joint else result

    def state(self) -> dict[str, Tensor]:
        """u, and theta where there is one."""
        return {"u": self.u} | ({} if self.theta is None else {"theta": self.theta})
