"""ABML: a Gaussian over φ by a few gradient steps on the ELBO, started at the prior.

Source: S. Ravi, A. Beatson, "Amortized Bayesian Meta-Learning", ICLR 2019,
https://openreview.net/forum?id=rkgpy3C5tX, eqs. 4–6 and algorithm 1.

Departures: the inner objective is divided by the number of support observations; θ is a point in the parameters of
the prior, without the paper's Normal–Gamma hyperprior on them (a program's global sites carry one if it has them);
the KL is exact for a network's Gaussian prior and estimated from the same draws for a user's program. The paper's
Gaussian is diagonal; a full covariance and one of low rank are ours (as in V. Ong, D. Nott, M. Smith, "Gaussian
Variational Approximation With a Factor Covariance Structure", JCGS 27, 2018, https://arxiv.org/abs/1701.03208, eq. 6),
and so are the weight of the KL and its warm-up (S. Bowman et al., "Generating Sentences from a Continuous Space", CoNLL
2016, https://arxiv.org/abs/1511.06349, section 3.1). Noise of their own for the shots of a task is an option; see
:mod:`bayesmeta.ops.point_noise` for its sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.adapt.memory import need_memory
from bayesmeta.adapt.recompute import maybe_recomputed
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import NonFiniteDataError, OptionError, UnsupportedError
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.point_noise import PointNoise
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.posteriors.gaussian import MultivariateNormalPosterior, NormalPosterior

PosteriorKind = Literal["diagonal", "full", "low_rank"]
NoiseKind = Literal["weights", "local", "flipout"]
#: What :meth:`ABML.elbo` takes as noise: of weights, or of another kind.
Noise = Tensor | tuple[Tensor, ...]
#: What share of the prior's variance the factor of a low-rank posterior has at first: at 0 it has no gradient.
_FIRST_SHARE = 0.01


class ABML(Method):
    """Amortised Bayesian meta-learning (Ravi & Beatson 2019): Gaussian posterior by ``inner_steps`` on the ELBO.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` with a Gaussian prior, or any Pyro program. The posterior starts
            at the Gaussian of the prior's mean and standard deviation in unconstrained space, and a task without
            support stays there. For a network's Gaussian prior that is the prior itself. For a program it need not
            be: where sites are not Gaussian, or depend on one another, it has the moments along the path of the means
            (each site given the means of those before it), and no correlations.
        inner_steps: gradient steps on mean and log standard deviation (and what else the posterior has).
        inner_lr: step size of the mean, for an objective that is divided by the number of observations.
        inner_lr_scale: step size of the log standard deviation and of W (see ``posterior``); by default ``inner_lr``.
        num_particles: draws of φ for each estimate of an inner gradient.
        num_outer_particles: draws of φ for the outer loss; by default ``num_particles``.
        objective: outer loss: ``"elbo"``, the paper's: −E_q[log p(S, Q | φ)] + KL(q ‖ p); or ``"predictive"``:
            −log E_q[p(Q | φ)].
        posterior: covariance of q: ``"diagonal"``: diag(s²), the paper's; ``"full"``: R Rᵀ with R = diag(s) (I + W), W
            lower triangular with zeros on the diagonal, at first 0; ``"low_rank"``: diag(s) (I + W Wᵀ) diag(s), whose
            variances are the prior's at first and whose correlations are small ones of a fixed random draw (at W = 0
            the gradient is 0). The posterior of the last two is a dense R: a task's D² or D (D + rank) numbers, also
            where the steps and the loss of ``"low_rank"`` take no more than D · rank.
        rank: columns of a low-rank W.
        kl_weight: of the KL in the inner objective and in the ELBO as a loss: 1 is the ELBO; below 1 the posterior is
            a cold one, narrower.
        kl_warmup: the KL of the loss (not of the inner steps) has, at the n-th call of ``loss`` with gradients in
            training mode, min(1, n / kl_warmup) of its weight; in evaluation mode all of it. The count is part of the
            state that checkpoints hold. 0: none.
        noise: what an estimate of the expected log-likelihood draws: ``"weights"``: φ, shared by all shots of a task;
            ``"local"`` and ``"flipout"``: the same in expectation, with noise of its own for each shot (see
            :class:`~bayesmeta.ops.point_noise.PointNoise`), and so less variance. For a NeuralTaskModel on a Linear or
            a Sequential of Linear and elementwise layers, with a prior that is a diagonal Gaussian given θ, and for the
            diagonal posterior. The loss ``"predictive"`` is no expectation of a sum, and draws weights in any case.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.

    Raises:
        OptionError: for an unknown objective, numbers out of range, or noise that the posterior cannot have.
        UnsupportedError: for a prior without a density, or a model that the noise cannot be drawn for; in use, for R of
            more than 4 GiB (tasks · draws of global sites · D² or D (D + rank) · 8 bytes).
    """

    #: Compute inner steps again on the way back instead of keeping them; set by ``fit(checkpoint_inner=True)``.
    checkpoint_inner = False

    card = MethodCard(
        assumes="a prior with a density: Gaussian weights, or a program's own",
        posterior="Gaussian (diagonal, full or low rank): K gradient steps on the ELBO from the prior",
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
        posterior: PosteriorKind = "diagonal",
        rank: int = 1,
        kl_weight: float = 1.0,
        kl_warmup: int = 0,
        noise: NoiseKind = "weights",
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        _check_kind(posterior, rank, kl_weight, kl_warmup)
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
        self._need_density()
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.inner_lr_scale = scale_lr
        self.num_particles = num_particles
        self.num_outer_particles = outer
        self.objective = objective
        self.posterior: PosteriorKind = posterior
        self.rank = rank
        self.kl_weight = float(kl_weight)
        self.kl_warmup = kl_warmup
        self.noise: NoiseKind = noise
        self._point_noise = _point_noise(self.program, noise, posterior)
        self.num_losses: Tensor
        if kl_warmup:  # part of the state only where it counts, so that other checkpoints stay as they were
            self.register_buffer("num_losses", torch.zeros((), dtype=torch.long))

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        added: dict[str, Any] = {}  # those that earlier checkpoints do not have, where they are not the default
        if self.posterior != "diagonal":
            added["posterior"] = self.posterior
        if self.posterior == "low_rank":
            added["rank"] = self.rank
        if self.kl_weight != 1.0:
            added["kl_weight"] = self.kl_weight
        if self.kl_warmup:
            added["kl_warmup"] = self.kl_warmup
        if self.noise != "weights":
            added["noise"] = self.noise
        return {
            "inner_steps": self.inner_steps,
            "inner_lr": self.inner_lr,
            "inner_lr_scale": self.inner_lr_scale,
            "num_particles": self.num_particles,
            "num_outer_particles": self.num_outer_particles,
            "objective": self.objective,
            "global_guide": self.global_kind,
        } | added

    # -- adapt --------------------------------------------------------------------------------------------------

    def elbo(
        self,
        loc: Tensor,
        log_scale: Tensor,
        observations: Observations,
        theta: Tensor | None,
        noise: Noise,
        factor: Tensor | None = None,
        kl_weight: float | None = None,
    ) -> Tensor:
        """ELBO of each task under q = N(loc, R Rᵀ), ``[G, tasks]``.

        Args:
            loc: ``[G, tasks, D]``.
            log_scale: log s, ``[G, tasks, D]``.
            observations: of the same tasks.
            theta: global sites, ``[G, E]`` or None.
            noise: standard normal, ``[particles, G, tasks, D]``, and ``D + rank`` for a low-rank posterior; for the
                other kinds of noise what :meth:`PointNoise.draw <bayesmeta.ops.point_noise.PointNoise.draw>` gives.
            factor: W: of a full posterior ``[G, tasks, D, D]``, with R = diag(s) (I + W), of which what is not below
                the diagonal is ignored; of a low-rank one ``[G, tasks, D, rank]``, with R = diag(s) [I, W].
            kl_weight: of the KL; by default the method's own.
        """
        weight = self.kl_weight if kl_weight is None else kl_weight
        if not isinstance(noise, Tensor):
            prior = self.program.gaussian_prior(observations, theta)
            assert prior is not None
            log_likelihood = self._log_likelihood(loc, log_scale, observations, noise).sum(-1).mean(0)
            return log_likelihood - weight * self._kl(loc, log_scale, factor, *prior)
        u = loc + self._spread(log_scale, factor, noise)
        prior = self.program.gaussian_prior(observations, theta)
        if prior is not None:
            log_likelihood = self.program.log_likelihood(u, observations, theta).sum(-1).mean(0)
            return log_likelihood - weight * self._kl(loc, log_scale, factor, *prior)
        entropy = (log_scale + 0.5 * math.log(2 * math.pi * math.e)).sum(-1) + self._extra_log_det(factor)
        if weight == 1.0:
            return self.program.log_joint(u, observations, theta).mean(0) + entropy
        log_likelihood = self.program.log_likelihood(u, observations, theta).sum(-1).mean(0)
        return log_likelihood + weight * (self.program.log_prior(u, observations, theta).mean(0) + entropy)

    def _spread(self, log_scale: Tensor, factor: Tensor | None, noise: Tensor) -> Tensor:
        """R noise, ``[particles, G, tasks, D]``."""
        size = log_scale.shape[-1]
        mixed = noise[..., :size]
        if factor is not None:
            tail = noise if self.posterior == "full" else noise[..., size:]
            mixed = mixed + (self._rest(factor) @ tail.unsqueeze(-1)).squeeze(-1)
        return log_scale.exp() * mixed

    def _rest(self, factor: Tensor) -> Tensor:
        return factor.tril(-1) if self.posterior == "full" else factor

    def _extra_log_det(self, factor: Tensor | None) -> Tensor | float:
        """½ log |R Rᵀ| less the sum of the log scales: ½ log |I + WᵀW| of a low-rank posterior."""
        if factor is None or self.posterior == "full":
            return 0.0
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        try:
            cholesky = torch.linalg.cholesky(eye + factor.mT @ factor)
        except torch.linalg.LinAlgError as error:  # it is positive definite if it is finite
            raise NonFiniteDataError(
                "The low-rank factor of the posterior is no longer finite: the inner steps have diverged. Take fewer "
                "of them, a lower inner_lr or inner_lr_scale, or more particles."
            ) from error
        return cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _kl(
        self, loc: Tensor, log_scale: Tensor, factor: Tensor | None, prior_loc: Tensor, prior_scale: Tensor
    ) -> Tensor:
        """KL(q ‖ prior), ``[G, tasks]``: that of the diagonal, and what the rest of R adds to trace and determinant."""
        kl = _kl_normal(loc, log_scale, prior_loc, prior_scale)
        if factor is None:
            return kl
        ratio = (2 * log_scale).exp() / prior_scale.square()
        trace = (ratio * self._rest(factor).square().sum(-1)).sum(-1)
        return kl + 0.5 * trace - self._extra_log_det(factor)

    def _width(self) -> int:
        """Columns of R."""
        return self.program.layout.dim + (self.rank if self.posterior == "low_rank" else 0)

    def _log_likelihood(
        self, loc: Tensor, log_scale: Tensor, observations: Observations, noise: tuple[Tensor, ...]
    ) -> Tensor:
        """log p(y | x, φ) with another φ for each observation, ``[particles, G, tasks, shots]``; 0 where masked."""
        program, y = self.program, observations.y
        assert self._point_noise is not None
        assert isinstance(program, NetworkProgram)
        assert y is not None
        inputs, exposure = program.likelihood.split(observations.x, observations.mask)
        outputs = self._point_noise(loc, log_scale.exp(), inputs, noise)
        value = program.likelihood.log_prob(outputs, y, **exposure)
        return value if observations.mask is None else torch.where(observations.mask, value, 0.0)

    def _weight_noise(self, loc: Tensor, particles: int, generator: torch.Generator) -> Tensor:
        return normal_like(loc, (particles, *loc.shape[:-1], self._width()), generator)

    def _noise(self, loc: Tensor, particles: int, shots: int, generator: torch.Generator) -> Noise:
        """What :meth:`elbo` takes."""
        if self._point_noise is None:
            return self._weight_noise(loc, particles, generator)
        return self._point_noise.draw(loc, particles, shots, generator)

    def _create(self, observations: Observations) -> None:
        self._check_memory(1, 1)  # at the first data: not a posterior that can be trained and never written down

    def _check_memory(self, num_tasks: int, groups: int) -> None:
        """Refuse an R that is too large."""
        if self.posterior == "diagonal":
            return
        size = self.program.layout.dim
        need_memory(
            size * self._width(),
            num_tasks,
            groups,
            what=f"The posterior {self.posterior!r} of {size} task parameters",
            formula="D²" if self.posterior == "full" else "D (D + rank)",
            advice="posterior='diagonal'",
        )

    def _begin(self, log_scale: Tensor, has_data: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """First log scale and factor of q; of a task without support, the prior's diagonal and a factor of zeros."""
        if self.posterior == "diagonal":
            return log_scale, None
        if self.posterior == "full":
            return log_scale, log_scale.new_zeros(*log_scale.shape, log_scale.shape[-1])
        seed = as_generator(0, log_scale.device, "low-rank factor")
        directions = normal_like(log_scale, (log_scale.shape[-1], self.rank), seed)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        factor = (math.sqrt(_FIRST_SHARE / (1 - _FIRST_SHARE)) * directions).expand(*log_scale.shape, self.rank)
        smaller = log_scale + 0.5 * math.log1p(-_FIRST_SHARE)
        if has_data is None:
            return smaller, factor
        return torch.where(has_data, smaller, log_scale), torch.where(has_data.unsqueeze(-1), factor, 0.0)

    def _steps(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> list[Tensor]:
        """loc, log scale and, where there is one, factor after the inner steps."""
        groups = 1 if theta is None else theta.shape[0]
        if self.posterior == "full":  # W is as large as R; that of a low-rank posterior is small
            self._check_memory(support.num_tasks, groups)
        loc, scale = self.program.prior_moments(support, theta)
        shape = (groups, support.num_tasks, self.program.layout.dim)
        loc, log_scale = loc.expand(shape), scale.log().expand(shape)
        if not create_graph:
            loc, log_scale = loc.detach(), log_scale.detach()
        has_data = None if support.mask is None else support.mask.any(-1)[:, None]
        if support.shots == 0:
            has_data = torch.zeros(support.num_tasks, 1, dtype=torch.bool, device=loc.device)
        log_scale, factor = self._begin(log_scale, has_data)
        state = [part for part in (loc, log_scale, factor) if part is not None]
        return self.climb(state, support, theta, generator, create_graph)

    def climb(
        self,
        state: list[Tensor],
        support: Observations,
        theta: Tensor | None,
        generator: torch.Generator,
        create_graph: bool,
    ) -> list[Tensor]:
        """The inner steps, from any q: loc, log scale and, where there is one, factor; see :meth:`elbo`.

        A task without support stays where it is. With ``create_graph`` they can be differentiated, through each
        gradient; without it a gradient is a constant.
        """
        state = [_needs_grad(part) for part in state]
        if support.shots == 0:
            return state
        has_data = None if support.mask is None else support.mask.any(-1)[:, None]
        counts = support.counts().clamp(min=1.0)

        def step(noise: Tensor, *state: Tensor) -> list[Tensor]:
            factor = state[2] if len(state) > 2 else None
            value = self.elbo(state[0], state[1], support, theta, noise, factor) / counts
            gradients = torch.autograd.grad(value.sum(), state, create_graph=create_graph)
            if has_data is not None:
                keep = (has_data, has_data, has_data.unsqueeze(-1))
                gradients = tuple(torch.where(k, g, 0.0) for k, g in zip(keep, gradients, strict=False))
            moves = self._moves(gradients, support, theta)
            return [part + move for part, move in zip(state, moves, strict=True)]

        for _ in range(self.inner_steps):
            noise = self._noise(state[0], self.num_particles, support.shots, generator)
            state = maybe_recomputed(self.checkpoint_inner and create_graph, step, noise, *state)
        return state

    def _moves(self, gradients: Sequence[Tensor], support: Observations, theta: Tensor | None) -> list[Tensor]:
        """By how much a step moves each part of the state."""
        rates = (self.inner_lr, self.inner_lr_scale, self.inner_lr_scale)
        return [rate * g for rate, g in zip(rates, gradients, strict=False)]

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> NormalPosterior | MultivariateNormalPosterior:
        self._check_memory(support.num_tasks, 1 if theta is None else theta.shape[0])
        state = self._steps(support, theta, generator, create_graph)
        return self.gaussian([part if create_graph else part.detach() for part in state], support, theta)

    def gaussian(
        self, state: list[Tensor], support: Observations, theta: Tensor | None
    ) -> NormalPosterior | MultivariateNormalPosterior:
        """The posterior of loc, log scale and, where there is one, factor."""
        loc, scale = state[0], state[1].exp()
        if self.posterior == "diagonal":
            return NormalPosterior(self.program, support, loc, scale, theta)
        eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device).expand(*loc.shape, -1)
        rest = self._rest(state[2])
        root = eye + rest if self.posterior == "full" else torch.cat([eye, rest], -1)
        root = scale.unsqueeze(-1) * root
        return MultivariateNormalPosterior(self.program, support, loc, root, theta)

    # -- loss ---------------------------------------------------------------------------------------------------

    def loss(self, batch: TaskBatch, *, generator: Seed = None) -> Tensor:
        """Meta-training loss, in nats a task; counts its calls in training where the KL has a warm-up."""
        value = super().loss(batch, generator=generator)
        if self.kl_warmup and self.training and torch.is_grad_enabled():
            self.num_losses += 1
        return value

    def _outer_weight(self) -> float:
        if not self.kl_warmup or not self.training:
            return self.kl_weight
        return self.kl_weight * min(1.0, (int(self.num_losses) + 1) / self.kl_warmup)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        loc, log_scale, *factor = self._steps(batch.support, theta, generator, create_graph=True)
        rest = factor[0] if factor else None
        if self.objective == "elbo":
            everything = batch.union()
            noise = self._noise(loc, self.num_outer_particles, everything.shots, generator)
            return -self.elbo(loc, log_scale, everything, theta, noise, rest, self._outer_weight())[0]
        u = loc + self._spread(log_scale, rest, self._weight_noise(loc, self.num_outer_particles, generator))
        each = self.program.log_likelihood(u, batch.query, theta).sum(-1)
        return -(each.logsumexp(0) - math.log(self.num_outer_particles))[0]


def _check_kind(posterior: str, rank: int, kl_weight: float, kl_warmup: int) -> None:
    if posterior not in get_args(PosteriorKind):
        names = ", ".join(map(repr, get_args(PosteriorKind)))
        raise OptionError(f"Unknown posterior {posterior!r}; expected one of {names}.")
    whole = isinstance(rank, int) and isinstance(kl_warmup, int)
    if not whole or rank < 1 or kl_warmup < 0 or not 0 <= kl_weight < math.inf:
        raise OptionError(
            "rank must be a whole number ≥ 1, kl_warmup one ≥ 0, and kl_weight ≥ 0 and finite; got "
            f"rank={rank}, kl_warmup={kl_warmup}, kl_weight={kl_weight}."
        )


def _point_noise(program: TaskProgram, noise: str, posterior: str) -> PointNoise | None:
    """What draws the noise of single observations; None for that of weights."""
    if noise not in get_args(NoiseKind):
        raise OptionError(f"Unknown noise {noise!r}; expected one of {', '.join(map(repr, get_args(NoiseKind)))}.")
    if noise == "weights":
        return None
    if posterior != "diagonal":
        raise OptionError(
            f"noise={noise!r} is for weights that are independent, posterior='diagonal'; got posterior={posterior!r}, "
            "which has correlations. Use noise='weights'."
        )
    if not isinstance(program, NeuralTaskModel) or not PointNoise.serves(program.network):
        found = type(program.network if isinstance(program, NeuralTaskModel) else program).__name__
        raise UnsupportedError(
            f"noise={noise!r} is for a NeuralTaskModel on a Linear, or on a Sequential of Linear and elementwise "
            f"layers without hooks, in which each weight acts once on each x; this is a {found}. Use noise='weights'."
        )
    if not program.prior.is_diagonal_gaussian:
        raise UnsupportedError(
            f"noise={noise!r} draws no φ from which a KL could be estimated, and the prior "
            f"{type(program.prior).__name__} has none in closed form. Use prior='normal', or noise='weights'."
        )
    return PointNoise(program.network, program.flat, "local" if noise == "local" else "flipout")


def _needs_grad(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _kl_normal(loc: Tensor, log_scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    """KL between diagonal Gaussians, summed over the last dimension."""
    q = torch.distributions.Normal(loc, log_scale.exp(), validate_args=False)
    p = torch.distributions.Normal(prior_loc, prior_scale, validate_args=False)
    return torch.distributions.kl_divergence(q, p).sum(-1)
