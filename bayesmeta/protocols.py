"""The protocols by which rooms know each other: task distributions, posteriors, methods."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch

#: What a target is: a real number, a count 0, 1, 2, …, or the index of a class.
TargetKind = Literal["real", "count", "class"]


@runtime_checkable
class TaskDistribution(Protocol):
    """Where task batches come from."""

    @property
    def num_tasks(self) -> int | None:
        """How many tasks there are; None when endless."""

    def sample(
        self, num_tasks: int, *, support: int, query: int, generator: torch.Generator | int | None = None
    ) -> TaskBatch:
        """Draw a batch on the generator's device."""


class Posterior(Protocol):
    """What diagnostics read: a posterior over the task parameters φ of a batch of tasks.

    ``n`` below is the number of draws. Draws made once by :meth:`draws` can be handed to the other calls, so that
    several quantities come from the same φ.
    """

    @property
    def support(self) -> Observations:
        """What was conditioned on."""

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""

    @property
    def is_point(self) -> bool:
        """True for a Delta: one φ a task, no uncertainty about it."""

    @property
    def num_draws(self) -> int | None:
        """How many different draws there are, of a posterior that is made of them and has no density; else None."""

    @property
    def target_kind(self) -> TargetKind:
        """What y is: decides which scores and pictures make sense."""

    def draws(self, num_samples: int, generator: torch.Generator | int | None = None) -> Any:
        """Draw φ (and θ, where it has a posterior)."""

    def prior_draws(self, num_samples: int, generator: torch.Generator | int | None = None) -> Any:
        """Draw φ from the prior p(φ | θ, w) for these tasks."""

    def named(self, draws: Any) -> dict[str, Tensor]:
        """Named, constrained task parameters, each ``[n, tasks, …]``."""

    def named_theta(self, draws: Any) -> dict[str, Tensor]:
        """Named draws of global sites, each ``[n, …]``."""

    def log_prior(self, draws: Any, *, jacobian: bool = True) -> Tensor:
        """log p(φ | θ), ``[n, tasks]``: a density of unconstrained φ, or without the Jacobian of φ by its sites."""

    def log_theta(self, draws: Any, *, jacobian: bool = True) -> Tensor:
        """log p(θ) of the draws' global sites, ``[n]``; 0 where there are none."""

    def log_likelihood(self, observations: Observations, *, draws: Any) -> Tensor:
        """log p(y | x, φ) of each observation, ``[n, tasks, shots]``, 0 where masked."""

    def predict(
        self,
        x: Tensor | Observations,
        num_samples: int = ...,
        *,
        draws: Any = None,
        generator: torch.Generator | int | None = None,
    ) -> Tensor:
        """Draws of y, ``[n, tasks, shots]`` or ``[n, tasks, shots, outputs]``."""

    def class_probabilities(
        self,
        x: Tensor | Observations,
        num_samples: int = ...,
        *,
        draws: Any = None,
        generator: torch.Generator | int | None = None,
    ) -> Tensor:
        """p(y = k | x, S), ``[tasks, shots, classes]`` or ``[tasks, shots, outputs, classes]``; for classes only."""

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """Closed-form predictive distribution; raises NoClosedFormError where there is none."""


class Method(Protocol):
    """What training sees of a meta-learning method: an ``nn.Module`` that owns θ."""

    def prepare(self, batch: TaskBatch) -> None:
        """Create the parameters whose shapes depend on the data. Calling it again does nothing."""

    def adapt(self, support: Observations, *, generator: torch.Generator | int | None = None) -> Any:
        """Posterior over φ given the support alone."""

    def loss(self, batch: TaskBatch, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Mean over the real tasks, in nats a task."""
