"""Posteriors conditional on draws of the global sites."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import UnsupportedError
from bayesmeta.models.program import TaskProgram
from bayesmeta.posteriors.base import TaskPosterior


class Components(TaskPosterior):
    """A posterior conditional on each of G draws of the global sites; G = 1 where θ is a point.

    Draw i belongs to component i mod G, so that draws of φ and θ stay paired.
    """

    def __init__(self, program: TaskProgram, support: Observations, theta: Tensor | None = None) -> None:
        super().__init__(program, support)
        self.theta = theta

    def _component(self, num_samples: int, count: int) -> Tensor:
        return torch.arange(num_samples, device=self.support.device) % count

    def _theta_at(self, component: Tensor) -> Tensor | None:
        return None if self.theta is None else self.theta[component]

    def _theta_draws(self, num_samples: int, generator: torch.Generator) -> Tensor | None:
        return None if self.theta is None else self.theta[self._component(num_samples, len(self.theta))]

    def _current_theta(self) -> Tensor | None:
        return None if self.theta is None else self._components(self.theta)

    def _components(self, tensor: Tensor) -> Tensor:
        """As a guide: the one component, or all on the left when ``method.guide`` has paired them with θ's sites."""
        if tensor.shape[0] == 1:
            return tensor[0]
        if not self.paired:
            raise UnsupportedError(
                f"This posterior holds {tensor.shape[0]} draws of the global sites; as a Pyro guide it needs one. "
                "Use method.guide, which draws the global sites itself."
            )
        return tensor
