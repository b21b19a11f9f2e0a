"""Reptile: θ moves towards where gradient steps on each task lead.

Source: A. Nichol, J. Achiam, J. Schulman, "On First-Order Meta-Learning Algorithms", 2018,
https://arxiv.org/abs/1803.02999, algorithm 2 (batched) and section 5.

    θ ← θ + ε · mean over tasks of (φ_K − θ)

which is a step of rate ε on the loss ½ ‖θ − φ_K‖² with φ_K held fixed; any optimizer can take it. The same update,
with one task that is the training set, is the Lookahead optimizer (Zhang et al. 2019).

Departures: plain gradient steps inside (the paper also uses Adam without momentum); what is in θ but not in φ (noise,
shared layers, global sites), of which the paper has none, follows the query's loss at the φ that the support leads to,
without second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesmeta.adapt.base import MethodCard, per_observation
from bayesmeta.adapt.gradient import GradientMethod, Objective
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.models.theta import GlobalKind


class Reptile(GradientMethod):
    """Reptile (Nichol et al. 2018), batched over tasks: needs no query and no second derivatives.

    In training mode ``loss`` is ½ ‖θ − φ_K‖², where φ_K is reached on support and query together; its gradient is the
    paper's update, its value no log-likelihood. In evaluation mode (``method.eval()``, as :func:`~bayesmeta.fit` sets
    for validation) ``loss`` is −log p(Q | φ_K) after adapting to the support, as for MAML.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, or any Pyro program.
        inner_steps: gradient steps in training and adaptation; the paper's analysis needs more than one.
        inner_lr: step size, for an objective that is a mean over observations.
        shots_per_step: in training, observations of a task that each inner step sees, drawn afresh (with one inner
            step's gradient from all data, the inner products of gradients between mini-batches, which the paper
            credits, are those within one batch); None: all of them.
        objective: as in :class:`~bayesmeta.MAML`.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.

    Raises:
        OptionError: for options out of range.
    """

    card = MethodCard(
        assumes="any model; a start point is enough",
        posterior="a point: K gradient steps from a learned start",
        cost="adapt K gradients; train the same (first order)",
        source="Nichol, Achiam, Schulman 2018",
    )

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int = 5,
        inner_lr: float = 0.01,
        shots_per_step: int | None = None,
        objective: Objective = "likelihood",
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(
            model,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            objective=objective,
            first_order=True,
            step_weights="last",
            global_guide=global_guide,
        )
        if shots_per_step is not None and shots_per_step < 1:
            raise OptionError(f"shots_per_step must be at least 1, or None for all; got {shots_per_step}.")
        if shots_per_step is not None and objective == "joint":
            raise OptionError("The joint's prior counts once for all observations; shots_per_step needs 'likelihood'.")
        self.shots_per_step = shots_per_step

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        names = ("inner_steps", "inner_lr", "shots_per_step", "objective")
        return {name: getattr(self, name) for name in names} | {"global_guide": self.global_kind}

    # -- loss ---------------------------------------------------------------------------------------------------

    def _destination(self, observations: Observations, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        """Where the inner steps lead, without a graph, ``[G, tasks, D]``."""
        if self.shots_per_step is None or self.shots_per_step >= observations.shots:
            return self._steps(observations, theta, create_graph=False).detach()
        # one step at a time, each on observations of its own
        u = self._start_for(observations, theta, create_graph=False)
        for _ in range(self.inner_steps):
            part = _some_shots(observations, self.shots_per_step, generator)
            u = u.detach().requires_grad_()
            gradient = self.inner_gradient(u, part, theta, create_graph=False)
            u = u + self.inner_lr * per_observation(part)[:, None] * gradient
        return u.detach()

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        if not self.training:
            return super()._task_loss(batch, theta, generator)
        fixed = None if theta is None else theta.detach()
        target = self._destination(batch.union(), fixed, generator)[0]
        start = self._start(batch.support)
        distance = 0.5 * (start - target).square().sum(-1)
        if not self._has_more_than_a_start():
            return distance
        # the rest of θ follows the query's loss where the support leads; its value is taken off again
        u = self._steps(batch.support, fixed, create_graph=False).detach()
        rest = self._query_loss(u, batch, theta)
        return distance + (rest - rest.detach())

    def _has_more_than_a_start(self) -> bool:
        start = {id(self.start)} if self.start is not None else {id(p) for p in self.program.start_parameters()}
        return any(p.requires_grad and id(p) not in start for p in self.parameters())


def _some_shots(observations: Observations, shots: int, generator: torch.Generator) -> Observations:
    """A random choice of real observations of each task without replacement, padding last."""
    mask = observations.full_mask()
    key = torch.rand(mask.shape, generator=generator, device=mask.device).masked_fill(~mask, 2.0)
    index = key.argsort(-1)[:, :shots]
    rows = torch.arange(len(index), device=index.device)[:, None]
    assert observations.y is not None
    return Observations(observations.x[rows, index], observations.y[rows, index], mask[rows, index], observations.w)
