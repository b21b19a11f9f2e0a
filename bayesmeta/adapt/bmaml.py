"""BMAML: particles of φ, moved together by Stein variational gradient descent from meta-learned starts.

Source: J. Yoon, T. Kim, O. Dia, S. Kim, Y. Bengio, S. Ahn, "Bayesian Model-Agnostic Meta-Learning", NeurIPS 2018,
https://arxiv.org/abs/1806.03836: section 3.1 (Bayesian fast adaptation, algorithm 1), section 3.2 (chaser loss,
algorithm 2), and section 2.2 for SVGD, on which :mod:`bayesmeta.ops.svgd` states its conventions.

    φ_m ← φ_m + (α / n) (1/M) Σ_j [ k(φ_j, φ_m) ∇ log p(S, φ_j) + ∇_{φ_j} k(φ_j, φ_m) ]     n observations in S
    predictive = −log (1/M) Σ_m p(Q | φ_m)
    marginal   = −Σ_q log (1/M) Σ_m p(y_q | x_q, φ_m)
    chaser     = Σ_m ‖φ_m − sg(leader_m)‖²,   leader: some more steps from φ on S ∪ Q, sg: without a gradient

Departures:

- The step is divided by the number of real observations, score and repulsion alike: where the particles come to rest
  is the posterior all the same.
- Particles of a network are the centre of its prior plus learned offsets (the paper's are M free networks, the same set
  of starts). First they are draws from a Gaussian of the prior's mean and standard deviation in unconstrained space;
  with a Point prior, perturbations of the network's weights.
- The prior is the model's own. The paper's, whose weights and noise have gamma-distributed precisions that are part of
  each particle, is :class:`~bayesmeta.PrecisionTaskModel`.
- The chaser loss trains the starts alone. What else is in θ (learned noise, scales of the prior, shared layers, global
  sites), of which the paper has none, follows the predictive loss through the same inner steps: the distance to the
  leader could be made 0 by a likelihood that nothing can be learned from.
- The leader has the chaser's step size, divided by the size of S ∪ Q.
- The marginal loss is ours. The predictive one scores a query's points jointly: particles specialise, since each task
  is credited to the one that fits all of its points best, and the mean over equally weighted particles is worse than
  it could be. The marginal loss scores the mixture at each point, as forecasts are scored.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayesmeta.adapt.base import Method, MethodCard, per_observation
from bayesmeta.adapt.recompute import maybe_recomputed
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.random import as_generator, normal_like
from bayesmeta.ops.svgd import svgd_direction
from bayesmeta.posteriors.samples import ParticlesPosterior

Objective = Literal["chaser", "predictive", "marginal"]


class BMAML(Method):
    """Bayesian MAML (Yoon, Kim et al. 2018): particles after ``inner_steps`` of SVGD from learned starts.

    With ``objective="chaser"``, ``loss`` in training mode is a squared distance between sets of particles, no
    log-likelihood. In evaluation mode (``method.eval()``, as :func:`~bayesmeta.fit` sets for validation) ``loss`` is
    then the predictive one, −log (1/M) Σ p(Q | φ_m).

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, :class:`~bayesmeta.PrecisionTaskModel`, or any Pyro program.
        num_particles: M, at least 2.
        inner_steps: SVGD steps on the support.
        inner_lr: step size. Particles that are far apart share a step, so that each moves 1/M of what it would alone:
            take about M times the rate of MAML.
        objective: the loss in training: ``"chaser"``, ``"predictive"``: −log (1/M) Σ p(Q | φ_m), all query points
            jointly; or ``"marginal"``: the sum over query points of −log (1/M) Σ p(y_q | x_q, φ_m).
        leader_steps: further steps, on support and query, that the leader is ahead of the chaser.
        spread: standard deviation of the first particles, as a multiple of the prior's (1: draws from a Gaussian
            prior); for a Point prior, of the root mean square of each tensor of the network. None: 1, or 0.5 for Point.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.

    Raises:
        OptionError: for fewer than two particles, an unknown objective, or numbers out of range.
        UnsupportedError: at the first data, for a prior of your own without moments.
    """

    #: Compute inner steps again on the way back instead of keeping them; set by ``fit(checkpoint_inner=True)``.
    checkpoint_inner = False

    card = MethodCard(
        assumes="any model; a prior with a density spreads the particles",
        posterior="M particles: K steps of SVGD from learned starts",
        cost="adapt K gradients of M particles; train 2–3 × that",
        source="Yoon, Kim et al. 2018",
    )

    def __init__(
        self,
        model: Any,
        *,
        num_particles: int = 5,
        inner_steps: int = 1,
        inner_lr: float = 0.05,
        objective: Objective = "chaser",
        leader_steps: int = 1,
        spread: float | None = None,
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        if num_particles < 2:
            raise OptionError(
                f"BMAML needs at least 2 particles; got num_particles={num_particles}. One particle under SVGD is "
                "plain gradient ascent on the joint: use MAML(model, objective='joint')."
            )
        if objective not in get_args(Objective):
            raise OptionError(f"Unknown objective {objective!r}; expected 'chaser', 'predictive' or 'marginal'.")
        if inner_steps < 0 or leader_steps < 1 or not inner_lr > 0 or not (spread is None or spread > 0):
            raise OptionError(
                "inner_steps must be ≥ 0, leader_steps ≥ 1, inner_lr and spread > 0; got "
                f"inner_steps={inner_steps}, leader_steps={leader_steps}, inner_lr={inner_lr}, spread={spread}."
            )
        self.num_particles = num_particles
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.objective = objective
        self.leader_steps = leader_steps
        self.spread = spread
        self.particles: nn.Parameter | None = None

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        names = ("num_particles", "inner_steps", "inner_lr", "objective", "leader_steps", "spread")
        return {name: getattr(self, name) for name in names} | {"global_guide": self.global_kind}

    # -- the particles' start -----------------------------------------------------------------------------------

    def _create(self, observations: Observations) -> None:
        theta = None if self.theta_guide is None else self.theta_guide.centre().detach()
        with torch.no_grad():
            loc, scale = self._first_moments(observations, theta)
            generator = as_generator(0, observations.device, "particles")
            # in double precision whatever the model's: one seed gives the same start in both
            noise = normal_like(scale.double(), (self.num_particles, *scale.shape), generator).to(scale)
        self.particles = nn.Parameter(loc + scale * noise)

    def _first_moments(self, observations: Observations, theta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean (of a network: of the offsets from its centre, 0) and scale of the first particles, each ``[D]``.

        Of a program whose prior differs between tasks: the mean over tasks, and the root mean square of the scales.
        """
        program = self.program
        if self._is_point_network:  # nothing says how far tasks are apart: as a share of the weights' own size
            assert isinstance(program, NetworkProgram)
            centre = program.prior.loc
            parts = centre.split(program.flat.sizes)
            sizes = torch.cat([_size(part, centre).expand(len(part)) for part in parts])
            return torch.zeros_like(centre), (0.5 if self.spread is None else self.spread) * sizes
        loc, scale = program.prior_moments(observations, theta)
        start = program.learned_start(observations)
        loc = loc if start is None else loc - start
        return loc.mean(0), (1.0 if self.spread is None else self.spread) * scale.square().mean(0).sqrt()

    def _start(self, support: Observations) -> Tensor:
        """Where the particles of every task start, ``[M, tasks, D]``."""
        assert self.particles is not None
        start = self.particles.unsqueeze(1).expand(-1, support.num_tasks, -1)
        centre = self.program.learned_start(support)
        return start if centre is None else start + centre

    # -- adapt --------------------------------------------------------------------------------------------------

    def _score(self, u: Tensor, observations: Observations, theta: Tensor | None, create_graph: bool) -> Tensor:
        """∇_u log p(S, φ), in the shape of u."""
        program = self.program
        if self._is_point_network:  # the joint is the likelihood
            return program.log_likelihood_gradient(u, observations, theta, create_graph=create_graph)
        prior = program.gaussian_prior(observations, theta)
        if prior is None:
            total = program.log_joint(u, observations, theta).sum()
            return torch.autograd.grad(total, u, create_graph=create_graph)[0]
        likelihood = program.log_likelihood_gradient(u, observations, theta, create_graph=create_graph)
        score = likelihood - (u - prior[0]) / prior[1].square()
        return score if create_graph else score.detach()

    def _climb(
        self, u: Tensor, observations: Observations, theta: Tensor | None, steps: int, create_graph: bool
    ) -> Tensor:
        """SVGD steps from u ``[M, G, tasks, D]``, which requires gradients if ``create_graph``."""
        if observations.shots == 0:
            return u
        share = per_observation(observations)[:, None]

        def step(u: Tensor) -> Tensor:
            score = self._score(u, observations, theta, create_graph)
            with torch.set_grad_enabled(create_graph):
                return u + self.inner_lr * share * svgd_direction(u, score)

        for _ in range(steps):
            u = u if create_graph else u.detach().requires_grad_()
            u = maybe_recomputed(self.checkpoint_inner and create_graph, step, u)
        return u

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> ParticlesPosterior:
        start = self._start(support).unsqueeze(1)
        groups = 1 if theta is None else len(theta)
        u = _needs_grad((start if create_graph else start.detach()).expand(-1, groups, -1, -1))
        u = self._climb(u, support, theta, self.inner_steps, create_graph)
        u = u if create_graph else u.detach()
        if theta is not None:  # each particle under each draw of the global sites
            theta = theta.expand(len(u), *theta.shape).flatten(0, 1)
        return ParticlesPosterior(self.program, support, u.flatten(0, 1), theta)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        start = self._start(batch.support)
        chasing = self.training and self.objective == "chaser"
        first = _needs_grad(start.detach().unsqueeze(1) if chasing else start.unsqueeze(1))
        u = self._climb(first, batch.support, theta, self.inner_steps, create_graph=True)
        if not chasing:
            return self._predictive(u, batch, theta)
        fixed = None if theta is None else theta.detach()
        leader = self._climb(u.detach(), batch.union(), fixed, self.leader_steps, create_graph=False).detach()
        distance = (u - leader).square().sum((0, -1))[0]
        others = self._has_more_than_starts()
        (slope,) = torch.autograd.grad(distance.sum(), first, retain_graph=others)
        # a loss of this value and, in the starts, of this slope
        line = (start * slope.squeeze(1)).sum((0, -1))
        loss = distance.detach() + (line - line.detach())  # 0 first: the distance may be far smaller
        if others:  # from starts without a graph: the rest of θ alone
            rest = self._predictive(u, batch, theta)
            loss = loss + (rest - rest.detach())
        return loss

    def _predictive(self, u: Tensor, batch: TaskBatch, theta: Tensor | None) -> Tensor:
        """−log (1/M) Σ_m p(Q | φ_m) of each task, all query points jointly or one by one, ``[tasks]``."""
        each = self.program.log_likelihood(u, batch.query, theta)
        if self.objective != "marginal":
            each = each.sum(-1, keepdim=True)
        return -(each.logsumexp(0) - math.log(self.num_particles)).sum(-1)[0]

    def _has_more_than_starts(self) -> bool:
        """Whether θ has trained parameters besides those that the starts are made of, or that are also the prior's."""
        starts = {id(self.particles)}
        if self._is_point_network:
            starts |= {id(p) for p in self.program.start_parameters()}
        return any(p.requires_grad and id(p) not in starts for p in self.parameters())


def _size(part: Tensor, whole: Tensor) -> Tensor:
    """Root mean square of a tensor; of all weights where that is 0, and 1 where those are 0 too."""
    size, fallback = part.square().mean().sqrt(), whole.square().mean().sqrt()
    return torch.where(size > 0, size, torch.where(fallback > 0, fallback, 1.0))


def _needs_grad(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()
