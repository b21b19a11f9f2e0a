"""What the point estimates by gradient steps share: a start, rates, the inner loop, losses along its path."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesmeta.adapt.base import Method, per_observation
from bayesmeta.adapt.recompute import maybe_recomputed
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.models.theta import GlobalKind
from bayesmeta.posteriors.base import TaskPosterior
from bayesmeta.posteriors.delta import DeltaPosterior

Objective = Literal["likelihood", "joint"]
StepWeights = Literal["last", "uniform"] | Sequence[float]


class PointMethod(Method):
    """Base of the methods whose posterior is a point that begins at a meta-learned start.

    A network starts from the centre of its prior; a program from an unconstrained point that the method learns, first
    set to the prior's mean.
    """

    def __init__(self, model: Any, *, global_guide: GlobalKind = "point") -> None:
        super().__init__(model, global_guide=global_guide)
        self.start: nn.Parameter | None = None

    def _create(self, observations: Observations) -> None:
        if self.program.learned_start(observations) is not None:
            return
        theta = None if self.theta_guide is None else self.theta_guide.centre().detach()
        with torch.no_grad():
            loc, _ = self.program.prior_moments(observations, theta)
        self.start = nn.Parameter(loc.mean(0).clone())

    def _start(self, support: Observations) -> Tensor:
        """Where every task starts, ``[tasks, D]``."""
        if self.start is not None:
            return self.start.expand(support.num_tasks, -1)
        start = self.program.learned_start(support)
        assert start is not None
        return start

    def _start_for(self, support: Observations, theta: Tensor | None, create_graph: bool) -> Tensor:
        """The start for each draw of the global sites, ``[G, tasks, D]``, ready to be differentiated."""
        start = self._start(support)
        if not create_graph:
            start = start.detach()
        u = start.expand(1 if theta is None else theta.shape[0], *start.shape)
        return u if u.requires_grad else u.detach().requires_grad_()

    def _query_loss(self, u: Tensor, batch: TaskBatch, theta: Tensor | None) -> Tensor:
        """−log p(Q | φ) of each task, ``[tasks]``."""
        return -self.program.log_likelihood(u, batch.query, theta).sum(-1)[0]

    def _delta(self, u: Tensor, support: Observations, theta: Tensor | None, create_graph: bool) -> DeltaPosterior:
        return DeltaPosterior(self.program, support, u if create_graph else u.detach(), theta)


class GradientMethod(PointMethod):
    """Base of the methods that take ``inner_steps`` gradient steps from the start.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, or any Pyro program.
        inner_steps: gradient steps on the support.
        inner_lr: step size, for an objective that is a mean over the support's observations.
        objective: what an inner step climbs: ``"likelihood"``, or ``"joint"`` with the prior.
        first_order: drop the second derivatives.
        step_weights: weight of the query's loss after each inner step: ``"last"``, ``"uniform"``, or one number for
            each step, which are divided by their sum.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.

    Raises:
        OptionError: for an unknown objective, negative steps or rate, or weights that do not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int,
        inner_lr: float,
        objective: Objective,
        first_order: bool,
        step_weights: StepWeights,
        global_guide: GlobalKind,
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        if objective not in ("likelihood", "joint"):
            raise OptionError(f"Unknown objective {objective!r}; expected 'likelihood' or 'joint'.")
        if not isinstance(inner_steps, int) or inner_steps < 0 or not 0 < inner_lr < math.inf:
            raise OptionError(
                f"inner_steps must be a whole number ≥ 0 and inner_lr > 0 and finite; got {inner_steps} and {inner_lr}."
            )
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.objective = objective
        self.first_order = first_order
        self.step_weights = step_weights if isinstance(step_weights, str) else tuple(map(float, step_weights))
        self._weights()

    #: Compute inner steps again on the way back instead of keeping them; set by ``fit(checkpoint_inner=True)``.
    checkpoint_inner = False

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        weights = self.step_weights
        return {
            "inner_steps": self.inner_steps,
            "inner_lr": self.inner_lr,
            "objective": self.objective,
            "first_order": self.first_order,
            "step_weights": weights if isinstance(weights, str) else list(weights),
            "global_guide": self.global_kind,
        }

    def _weights(self) -> list[float]:
        """Weight of the query's loss after 0, 1, …, K steps; they add up to 1."""
        weights, steps = self.step_weights, self.inner_steps
        if weights == "last" or (weights == "uniform" and steps == 0):
            return [0.0] * steps + [1.0]
        if weights == "uniform":
            return [0.0] + [1.0 / steps] * steps
        if isinstance(weights, str):
            raise OptionError(f"Unknown step_weights {weights!r}; expected 'last', 'uniform', or a number a step.")
        if len(weights) != steps or min(weights, default=0.0) < 0 or not 0 < sum(weights) < math.inf:
            raise OptionError(
                f"step_weights={list(weights)}; expected {steps} numbers ≥ 0, one for each inner step, not all 0."
            )
        return [0.0] + [weight / sum(weights) for weight in weights]

    # -- the inner loop -----------------------------------------------------------------------------------------

    def inner_gradient(self, u: Tensor, support: Observations, theta: Tensor | None, create_graph: bool) -> Tensor:
        """Gradient of what a step climbs, not yet divided by the number of observations, ``[G, tasks, D]``."""
        if self.objective == "likelihood":
            return self.program.log_likelihood_gradient(u, support, theta, create_graph=create_graph)
        total = self.program.log_joint(u, support, theta).sum()
        return torch.autograd.grad(total, u, create_graph=create_graph)[0]

    def _rate(self, step: int) -> float | Tensor:
        """Rate of inner step ``step`` (from 0): a number, or one for each task parameter, ``[D]``."""
        return self.inner_lr

    def _path(self, support: Observations, theta: Tensor | None, create_graph: bool) -> Iterator[Tensor]:
        """φ after 0, 1, …, K steps, each ``[G, tasks, D]``; just the start where there is no support at all."""
        u = self._start_for(support, theta, create_graph)
        yield u
        if support.shots == 0:
            return
        share: Tensor | None = None
        if support.mask is not None:
            # a task without support stays at the start, also when the joint would pull it to the prior's mode
            share = per_observation(support)[:, None]
        second_order = create_graph and not self.first_order

        def move(u: Tensor, step: int) -> Tensor:
            gradient = self.inner_gradient(u, support, theta, second_order)
            rate = self._rate(step)
            if not create_graph and isinstance(rate, Tensor):
                rate = rate.detach()
            if share is not None:
                return u + (rate * share) * gradient
            if isinstance(rate, Tensor):
                return u + (rate / support.shots) * gradient
            return torch.add(u, gradient, alpha=rate / support.shots)

        for step in range(self.inner_steps):
            u = maybe_recomputed(self.checkpoint_inner and second_order, move, u, step)
            yield u

    def _steps(self, support: Observations, theta: Tensor | None, create_graph: bool) -> Tensor:
        """φ after the last step."""
        for u in self._path(support, theta, create_graph):
            last = u
        return last

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> TaskPosterior:
        return self._delta(self._steps(support, theta, create_graph), support, theta, create_graph)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        if self.step_weights == "last":
            return self._query_loss(self._steps(batch.support, theta, create_graph=True), batch, theta)
        path = list(self._path(batch.support, theta, create_graph=True))
        path += path[-1:] * (self.inner_steps + 1 - len(path))  # no support: all steps stay at the start
        losses = [w * self._query_loss(u, batch, theta) for w, u in zip(self._weights(), path, strict=True) if w > 0]
        return torch.stack(losses).sum(0)
