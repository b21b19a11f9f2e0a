"""ABML: a mean-field Gaussian over φ by a few gradient steps on the ELBO, started at the prior.

Source: S. Ravi, A. Beatson, "Amortized Bayesian Meta-Learning", ICLR 2019,
https://openreview.net/forum?id=rkgpy3C5tX, eqs. 4–6 and algorithm 1.

Departures: the inner objective is divided by the number of support observations; θ is a point in the parameters of
the prior, without the paper's Normal–Gamma hyperprior on them (a program's global sites carry one if it has them);
the KL is exact for a network's Gaussian prior and estimated from the same draws for a user's program.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.priors import Point
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.random import normal_like
from bayesmeta.posteriors.gaussian import NormalPosterior


class ABML(Method):
    """Amortised Bayesian meta-learning (Ravi & Beatson 2019): Normal posterior by ``inner_steps`` on the ELBO.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` with a Gaussian prior, or any Pyro program. The posterior starts
            at the prior's mean and standard deviation in unconstrained space.
        inner_steps: gradient steps on mean and log standard deviation.
        inner_lr: step size of the mean, for an objective that is divided by the number of observations.
        inner_lr_scale: step size of the log standard deviation; by default ``inner_lr``.
        num_particles: draws of φ for each estimate of an inner gradient.
        num_outer_particles: draws of φ for the outer loss; by default ``num_particles``.
        objective: outer loss: ``"elbo"``, the paper's: −E_q[log p(S, Q | φ)] + KL(q ‖ p); or ``"predictive"``:
            −log E_q[p(Q | φ)].
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.

    Raises:
        OptionError: for an unknown objective, or numbers out of range.
    """

    card = MethodCard(
        assumes="a prior with a density: Gaussian weights, or a program's own",
        posterior="diagonal Gaussian: K gradient steps on the ELBO from the prior",
        cost="adapt K gradients of num_particles draws; train 2–3 × that",
        source="Ravi, Beatson 2019",
    )

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int = 5,
        inner_lr: float = 1e-3,
        inner_lr_scale: float | None = None,
        num_particles: int = 5,
        num_outer_particles: int | None = None,
        objective: Literal["elbo", "predictive"] = "elbo",
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        if objective not in ("elbo", "predictive"):
            raise OptionError(f"Unknown objective {objective!r}; expected 'elbo' or 'predictive'.")
        scale_lr = inner_lr if inner_lr_scale is None else inner_lr_scale
        outer = num_particles if num_outer_particles is None else num_outer_particles
        if inner_steps < 0 or not inner_lr > 0 or not scale_lr > 0 or num_particles < 1 or outer < 1:
            raise OptionError(
                "inner_steps must be ≥ 0, the rates > 0 and the particles ≥ 1; got "
                f"inner_steps={inner_steps}, inner_lr={inner_lr}, inner_lr_scale={scale_lr}, "
                f"num_particles={num_particles}, num_outer_particles={outer}."
            )
        if isinstance(self.program, NetworkProgram) and isinstance(self.program.prior, Point):
            raise UnsupportedError(
                "ABML starts at a prior with a density; this model has Point, a start without one. Use prior='normal'."
            )
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.inner_lr_scale = scale_lr
        self.num_particles = num_particles
        self.num_outer_particles = outer
        self.objective = objective

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {
            "inner_steps": self.inner_steps,
            "inner_lr": self.inner_lr,
            "inner_lr_scale": self.inner_lr_scale,
            "num_particles": self.num_particles,
            "num_outer_particles": self.num_outer_particles,
            "objective": self.objective,
            "global_guide": self.global_kind,
        }

    # -- adapt --------------------------------------------------------------------------------------------------

    def elbo(
        self,
        loc: Tensor,
        log_scale: Tensor,
        observations: Observations,
        theta: Tensor | None,
        noise: Tensor,
    ) -> Tensor:
        """ELBO of each task under q = N(loc, exp(log_scale)²), ``[G, tasks]``.

        Args:
            loc, log_scale: ``[G, tasks, D]``.
            observations: of the same tasks.
            theta: global sites, ``[G, E]`` or None.
            noise: standard normal, ``[particles, G, tasks, D]``.
        """
        u = loc + log_scale.exp() * noise
        prior = self.program.gaussian_prior(observations, theta)
        if prior is not None:
            log_likelihood = self.program.log_likelihood(u, observations, theta).sum(-1).mean(0)
            return log_likelihood - _kl_normal(loc, log_scale, *prior)
        entropy = (log_scale + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        return self.program.log_joint(u, observations, theta).mean(0) + entropy

    def _steps(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        groups = 1 if theta is None else theta.shape[0]
        loc, scale = self.program.prior_moments(support, theta)
        shape = (groups, support.num_tasks, self.program.layout.dim)
        loc, log_scale = loc.expand(shape), scale.log().expand(shape)
        if not create_graph:
            loc, log_scale = loc.detach(), log_scale.detach()
        loc, log_scale = _needs_grad(loc), _needs_grad(log_scale)
        if support.shots == 0:
            return loc, log_scale
        counts = support.counts().clamp(min=1.0)
        has_data = None if support.mask is None else support.mask.any(-1)[:, None]
        for _ in range(self.inner_steps):
            noise = normal_like(loc, (self.num_particles, *loc.shape), generator)
            value = self.elbo(loc, log_scale, support, theta, noise) / counts
            gradients = torch.autograd.grad(value.sum(), (loc, log_scale), create_graph=create_graph)
            if has_data is not None:  # a task without support stays at the prior
                gradients = tuple(torch.where(has_data, g, 0.0) for g in gradients)
            loc = loc + self.inner_lr * gradients[0]
            log_scale = log_scale + self.inner_lr_scale * gradients[1]
        return loc, log_scale

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> NormalPosterior:
        loc, log_scale = self._steps(support, theta, generator, create_graph)
        if not create_graph:
            loc, log_scale = loc.detach(), log_scale.detach()
        return NormalPosterior(self.program, support, loc, log_scale.exp(), theta)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        loc, log_scale = self._steps(batch.support, theta, generator, create_graph=True)
        noise = normal_like(loc, (self.num_outer_particles, *loc.shape), generator)
        if self.objective == "elbo":
            return -self.elbo(loc, log_scale, batch.union(), theta, noise)[0]
        u = loc + log_scale.exp() * noise
        each = self.program.log_likelihood(u, batch.query, theta).sum(-1)
        return -(each.logsumexp(0) - math.log(self.num_outer_particles))[0]


def _needs_grad(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _kl_normal(loc: Tensor, log_scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    """KL between diagonal Gaussians, summed over the last dimension."""
    q = torch.distributions.Normal(loc, log_scale.exp(), validate_args=False)
    p = torch.distributions.Normal(prior_loc, prior_scale, validate_args=False)
    return torch.distributions.kl_divergence(q, p).sum(-1)
