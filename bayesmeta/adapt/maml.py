"""MAML: a point estimate of φ by a few gradient steps from a meta-learned start.

Source: C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017,
https://arxiv.org/abs/1703.03400, eq. 1 (inner step) and algorithm 1. As hierarchical Bayes: E. Grant, C. Finn,
S. Levine, J. Darrell, T. Griffiths, "Recasting Gradient-Based Meta-Learning as Hierarchical Bayes", ICLR 2018,
https://arxiv.org/abs/1801.08930.

Departures: the inner objective is the mean log-likelihood of the support's real observations (so that rates do not
depend on the shots), and optionally the joint with the prior; the outer loss is the negative log-likelihood of the
query summed over its points. With a Gaussian likelihood of scale 1/√2 both are the paper's squared errors up to a
constant. On a user's program φ lives in unconstrained space.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesmeta.adapt.base import Method
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.models.theta import GlobalKind
from bayesmeta.posteriors.kinds import DeltaPosterior


class MAML(Method):
    """Model-agnostic meta-learning (Finn et al. 2017): Delta posterior at ``inner_steps`` gradient steps.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, or any Pyro program. A network starts from the centre of its
            prior; a program from an unconstrained point that this method learns, first set to the prior's mean.
        inner_steps: gradient steps on the support.
        inner_lr: step size, for an objective that is a mean over the support's observations.
        objective: what an inner step climbs: ``"likelihood"``, or ``"joint"``: likelihood times prior, in
            unconstrained space with its Jacobian, divided by the number of observations. The likelihood alone never
            evaluates the prior, so that parameters which only the prior uses are not trained.
        first_order: drop the second derivatives (FOMAML).
        global_guide: posterior over global sites, ``"point"`` or ``"normal"``.

    Raises:
        OptionError: for an unknown objective, negative steps or rate.
    """

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int = 1,
        inner_lr: float = 0.01,
        objective: Literal["likelihood", "joint"] = "likelihood",
        first_order: bool = False,
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        if objective not in ("likelihood", "joint"):
            raise OptionError(f"Unknown objective {objective!r}; expected 'likelihood' or 'joint'.")
        if inner_steps < 0 or not inner_lr > 0:
            raise OptionError(f"inner_steps must be ≥ 0 and inner_lr > 0; got {inner_steps} and {inner_lr}.")
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.objective = objective
        self.first_order = first_order
        self.start: nn.Parameter | None = None

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {
            "inner_steps": self.inner_steps,
            "inner_lr": self.inner_lr,
            "objective": self.objective,
            "first_order": self.first_order,
            "global_guide": self.global_kind,
        }

    def _create(self, observations: Observations) -> None:
        if self.program.learned_start(observations) is not None:
            return
        theta = None if self.theta_guide is None else self.theta_guide.loc
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

    # -- adapt --------------------------------------------------------------------------------------------------

    def inner_gradient(self, u: Tensor, support: Observations, theta: Tensor | None, create_graph: bool) -> Tensor:
        """Gradient of what a step climbs, not yet divided by the number of observations, ``[G, tasks, D]``."""
        if self.objective == "likelihood":
            return self.program.log_likelihood_gradient(u, support, theta, create_graph=create_graph)
        total = self.program.log_joint(u, support, theta).sum()
        return torch.autograd.grad(total, u, create_graph=create_graph)[0]

    def _steps(self, support: Observations, theta: Tensor | None, create_graph: bool) -> Tensor:
        groups = 1 if theta is None else theta.shape[0]
        start = self._start(support)
        if not create_graph:
            start = start.detach()
        u = start.expand(groups, *start.shape)
        if not u.requires_grad:
            u = u.detach().requires_grad_()
        if support.shots == 0:
            return u
        rate: float | Tensor = self.inner_lr / support.shots
        if support.mask is not None:
            # a task without support stays at the start, also when the joint would pull it to the prior's mode
            rate = (self.inner_lr / support.counts())[:, None].masked_fill(~support.mask.any(-1)[:, None], 0.0)
        second_order = create_graph and not self.first_order
        for _ in range(self.inner_steps):
            gradient = self.inner_gradient(u, support, theta, second_order)
            u = torch.add(u, gradient, alpha=rate) if isinstance(rate, float) else u + rate * gradient
        return u

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> DeltaPosterior:
        u = self._steps(support, theta, create_graph)
        return DeltaPosterior(self.program, support, u if create_graph else u.detach(), theta)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        u = self._steps(batch.support, theta, create_graph=True)
        return -self.program.log_likelihood(u, batch.query, theta).sum(-1)[0]
