"""Implicit MAML: the meta-gradient of a regularised inner optimum, from the optimum alone.

Source: A. Rajeswaran, C. Finn, S. Kakade, S. Levine, "Meta-Learning with Implicit Gradients", NeurIPS 2019,
https://arxiv.org/abs/1909.04630, eqs. 3–6 and algorithms 1–2.

    φ* = argmax F(φ) = (1/n) log p(S | φ) − (λ/2) ‖φ − θ‖²
    dφ*/dθ = λ (λ I − ∇² (1/n) log p(S | φ*))⁻¹, applied to the query's gradient by conjugate gradients

As hierarchical Bayes φ* is the maximum a posteriori under a Gaussian prior around θ of precision λ n.

Departures: gradient descent from θ as the inner solver; the rest of θ (noise, shared layers, global sites) gets its
exact implicit gradient too, by the same solve; φ* is whatever ``inner_steps`` reach, and the gradient is exact only
as far as that is the optimum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesmeta.adapt.base import MethodCard
from bayesmeta.adapt.gradient import PointMethod
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.linear_solve import conjugate_gradient
from bayesmeta.posteriors.delta import DeltaPosterior


class ImplicitMAML(PointMethod):
    """MAML with implicit gradients (Rajeswaran et al. 2019): memory does not grow with the inner steps.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, or any Pyro program.
        inner_steps: gradient steps of the inner solver; the more, the closer to the optimum that the gradient assumes.
        inner_lr: their size; stable below 2 / (λ + largest curvature of the mean log-likelihood).
        proximal: λ, the pull towards the start, in nats per observation.
        solve_steps: conjugate-gradient steps for the meta-gradient.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.

    Raises:
        OptionError: for numbers out of range.
    """

    card = MethodCard(
        assumes="any model; a start point is enough",
        posterior="a point: the optimum near a learned start",
        cost="adapt K gradients; train K gradients + one product with the Hessian a solve step, memory of one step",
        source="Rajeswaran, Finn, Kakade, Levine 2019",
    )

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int = 20,
        inner_lr: float = 0.01,
        proximal: float = 1.0,
        solve_steps: int = 10,
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        if inner_steps < 0 or not inner_lr > 0 or not proximal > 0 or solve_steps < 1:
            raise OptionError(
                "inner_steps must be ≥ 0, inner_lr and proximal > 0 and solve_steps ≥ 1; got "
                f"inner_steps={inner_steps}, inner_lr={inner_lr}, proximal={proximal}, solve_steps={solve_steps}."
            )
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.proximal = proximal
        self.solve_steps = solve_steps

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {
            "inner_steps": self.inner_steps,
            "inner_lr": self.inner_lr,
            "proximal": self.proximal,
            "solve_steps": self.solve_steps,
            "global_guide": self.global_kind,
        }

    def _slope(
        self, u: Tensor, start: Tensor, support: Observations, theta: Tensor | None, create_graph: bool
    ) -> Tensor:
        """∇F of each task, ``[G, tasks, D]``; without support the pull alone."""
        pull = self.proximal * (start - u)
        if support.shots == 0:
            return pull
        gradient = self.program.log_likelihood_gradient(u, support, theta, create_graph=create_graph)
        return gradient / support.counts().clamp(min=1.0)[:, None] + pull

    def _optimum(self, support: Observations, theta: Tensor | None) -> Tensor:
        """Where the inner steps end, a leaf ``[G, tasks, D]``: their graph is not kept."""
        start = self._start_for(support, theta, create_graph=False).detach()
        theta = None if theta is None else theta.detach()
        u = start
        for _ in range(self.inner_steps):
            u = u.detach().requires_grad_()
            u = u + self.inner_lr * self._slope(u, start, support, theta, create_graph=False)
        return u.detach().requires_grad_()

    def stationarity(self, support: Observations, theta: Tensor | None = None) -> Tensor:
        """How far the inner steps are from the optimum that the meta-gradient assumes: ‖∇F(φ_K)‖ / ‖∇F(θ)‖.

        0 is the optimum; where it is not small, take more ``inner_steps``, a higher ``inner_lr`` or a larger
        ``proximal``.

        Args:
            support: what to adapt to.
            theta: draws of the global sites, ``[G, E]``; None: the middle of their posterior.

        Returns:
            ``[tasks]``, the mean over draws of the global sites; 0 for a task without support.
        """
        self.prepare(support)
        if theta is None and self.theta_guide is not None:
            theta = self.theta_guide.centre().detach()[None]
        with torch.enable_grad():
            start = self._start_for(support, theta, create_graph=False)
            end = self._optimum(support, theta)
            norms = [self._slope(u, start, support, theta, create_graph=False).norm(dim=-1) for u in (end, start)]
        return torch.where(norms[1] > 0, norms[0] / norms[1], 0.0).mean(0).detach()

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> DeltaPosterior:
        u = self._optimum(support, theta)
        if create_graph:
            u = self._implicit(u, support, theta)
        return self._delta(u, support, theta, create_graph)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _implicit(self, u: Tensor, support: Observations, theta: Tensor | None) -> Tensor:
        """The optimum as a function of θ: the value of ``u``, and the implicit gradient when differentiated.

        F′(u*; θ) = 0 gives du* = A⁻¹ dF′ with A = −F″(u*). A backward hook on u* solves A q = ∂L/∂u* once, and
        q · F′(u*; θ) carries the gradient on to all of θ.
        """
        start = self._start_for(support, theta, create_graph=True)
        slope = self._slope(u, start, support, theta, create_graph=True)

        def solve(gradient: Tensor) -> Tensor:
            def curvature(vector: Tensor) -> Tensor:
                (product,) = torch.autograd.grad(slope, u, vector, retain_graph=True)
                return -product

            with torch.enable_grad():
                return conjugate_gradient(curvature, gradient, self.solve_steps)

        return _Implicit.apply(u.detach(), slope, solve)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        u = self._implicit(self._optimum(batch.support, theta), batch.support, theta)
        return self._query_loss(u, batch, theta)


class _Implicit(torch.autograd.Function):
    """The value of an optimum, whose gradient goes on to the slope that vanishes there."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: Tensor, solve: Any) -> Tensor:
        ctx.solve = solve
        return u.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, ctx.solve(gradients[0]), None
