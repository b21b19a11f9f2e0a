"""Semi-amortised inference: an encoder's q(φ | S), refined on the task's own support.

Source: Y. Kim, S. Wiseman, A. Miller, D. Sontag, A. Rush, "Semi-Amortized Variational Autoencoders", ICML 2018,
https://arxiv.org/abs/1802.02550, section 3 and algorithm 1; that an amortised q falls short of its own family is the
amortisation gap (C. Cremer, X. Li, D. Duvenaud, ICML 2018, https://arxiv.org/abs/1801.03558), and J. Marino, Y. Yue, S.
Mandt, "Iterative Amortized Inference", ICML 2018, https://arxiv.org/abs/1807.09356, is another way to close it.

    vi:   λ_0 = the encoder's;  λ_{k+1} = λ_k + α ∇ ELBO(S; λ_k) / |S|;  loss: that of the amortised method, at λ_K
    nuts: chains that start at draws of q, in its units: u = μ + R v with v sampled, q = N(μ, R Rᵀ)

Departures: the steps are ABML's: plain gradient steps (the paper's have momentum) on mean and log standard deviation,
of an objective divided by the number of observations; their derivative is by automatic differentiation, exact for the
noise that was drawn, in place of the paper's finite differences. A step is bounded, as an encoder may be off by far
where a task is unlike those of training, and one step in a log standard deviation then goes to infinity. For the same
reason the steps begin at no standard deviation above e times the prior's: bounded steps alone let training drive the
encoder to ever wider q, which they shrink again, until their derivatives overflow. NUTS as the
refinement is ours; a linear map of the parameters is the same as a mass matrix (R. Neal, "MCMC using Hamiltonian
dynamics", 2011, https://arxiv.org/abs/1206.1901, section 4.1), here (R Rᵀ)⁻¹ for each task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayesmeta.adapt.abml import ABML
from bayesmeta.adapt.amortised import Amortised, Recognisable, log_predictive, part_of
from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.adapt.nuts import NUTS
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.ops.random import normal_like
from bayesmeta.posteriors.base import TaskPosterior
from bayesmeta.posteriors.chains import ChainsPosterior
from bayesmeta.posteriors.flow import FlowPosterior
from bayesmeta.posteriors.gaussian import MultivariateNormalPosterior, NormalPosterior

Refine = Literal["vi", "nuts"]
Objective = Literal["elbo", "predictive", "marginal"]
#: the objective of a semi-amortised method by that of the method it wraps, where they differ in name
_SAME = {"likelihood": "predictive"}
#: draws of a flow from which its mean and standard deviations are taken
_FLOW_DRAWS = 256
#: the steps begin at log standard deviations at most this much above the prior's
_WIDEST = 1.0


class SemiAmortised(Method):
    """An amortised posterior that is refined on each task's own support (Kim et al. 2018).

    With ``refine="vi"`` a Gaussian q takes ``inner_steps`` gradient steps on its ELBO, as in :class:`~bayesmeta.ABML`,
    from where the encoder puts it; with 0 steps it is the amortised method. Train all of it, through the steps, or wrap
    a method that is trained. With ``refine="nuts"`` short chains start at draws of q and move in its units, so that few
    steps of warm-up are needed; it has no loss.

    A task without support has the encoder's q, the prior (for NUTS: draws from it, by the sampler). Global sites have
    the posterior of the amortised method, which stands as it is.

    Args:
        amortised: an :class:`~bayesmeta.Amortised`, :class:`~bayesmeta.NeuralProcess` or :class:`~bayesmeta.Versa`,
            trained or not, which is wrapped and not copied. Of a NeuralProcess the prior in the ELBO is N(0, I). Any
            other model gets ``Amortised(model)``.
        refine: ``"vi"`` or ``"nuts"``.
        inner_steps: gradient steps, 5 by default; of ``"vi"`` alone, as the next two.
        inner_lr, inner_lr_scale: step sizes of the mean (0.001 by default), and of the log standard deviation (and of
            correlations), as in ABML; by default the same.
        max_step: no step moves a mean by more than this many standard deviations of the prior, or a log standard
            deviation by more than this. ``math.inf``: no bound.
        num_particles: draws of φ in each estimate of an inner gradient.
        first_order: leave the derivative of the inner gradients out of the loss's gradient.
        objective: ``"elbo"``: the steps see S ∪ Q, and the loss is −ELBO there, the paper's; ``"predictive"`` and
            ``"marginal"``: they see S, and the loss is −log (1/L) Σ_l p(Q | φ_l), of the query together or of each
            point. None: that of the amortised method (``"likelihood"`` is ``"predictive"``). Draws in the loss, and
            whether training shows random parts of the observations: as there.
        num_samples, warmup, num_chains, max_tree_depth: of ``"nuts"``, as in :class:`~bayesmeta.NUTS`.

    Raises:
        OptionError: for unknown names, or numbers out of range.
        UnsupportedError: for a flow with ``refine="vi"``, or a method that is none of these.
    """

    card = MethodCard(
        assumes="a prior with a density; an amortised method, trained or not",
        posterior="the encoder's Gaussian after K steps on its ELBO; or draws by short chains from it",
        cost="adapt one pass and K gradients, or some hundred (NUTS); train 2–3 × that",
        source="Kim, Wiseman, Miller, Sontag, Rush 2018",
    )

    def __init__(
        self,
        amortised: Amortised | Any,
        refine: Refine = "vi",
        *,
        inner_steps: int | None = None,
        inner_lr: float | None = None,
        inner_lr_scale: float | None = None,
        max_step: float = 0.5,
        num_particles: int = 5,
        first_order: bool = False,
        objective: Objective | None = None,
        num_samples: int = 100,
        warmup: int = 50,
        num_chains: int = 4,
        max_tree_depth: int = 10,
    ) -> None:
        if isinstance(amortised, nn.Module) and hasattr(amortised, "adapt") and not isinstance(amortised, Amortised):
            raise UnsupportedError(
                f"SemiAmortised refines the q(φ | S) of Amortised, NeuralProcess or Versa; got a "
                f"{type(amortised).__name__}. Give one of these, or a model (of a method: method.program), which "
                "becomes Amortised(model)."
            )
        amortised = amortised if isinstance(amortised, Amortised) else Amortised(amortised)
        super().__init__(amortised.program, global_guide=amortised.global_guide)
        chosen = _SAME.get(amortised.objective, amortised.objective) if objective is None else objective
        for what, value, known in (("refine", refine, get_args(Refine)), ("objective", chosen, get_args(Objective))):
            if value not in known:
                raise OptionError(f"Unknown {what} {value!r}; expected one of {', '.join(map(repr, known))}.")
        steps = {"inner_steps": inner_steps, "inner_lr": inner_lr, "inner_lr_scale": inner_lr_scale}
        given = [f"{name}={value}" for name, value in steps.items() if value is not None]
        if refine == "nuts" and given:
            raise OptionError(
                f"refine='nuts' takes no gradient steps; got {', '.join(given)}. Its options are num_samples, warmup, "
                "num_chains and max_tree_depth."
            )
        inner_steps, inner_lr = 5 if inner_steps is None else inner_steps, 1e-3 if inner_lr is None else inner_lr
        if not isinstance(inner_steps, int) or not math.isfinite(inner_lr) or not max_step > 0:
            raise OptionError(
                "inner_steps is a whole number, inner_lr finite, max_step above 0; got "
                f"inner_steps={inner_steps}, inner_lr={inner_lr} and max_step={max_step}."
            )
        if refine == "vi" and amortised.posterior == "flow":
            raise UnsupportedError(
                "refine='vi' takes steps in the mean and covariance of a Gaussian; this q is a flow. Use "
                "refine='nuts', or an amortised method with posterior='diagonal' or 'full'."
            )
        self.amortised = amortised
        self.embedding_noise = amortised.embedding_noise
        self.refine, self.objective, self.first_order = refine, chosen, first_order
        self.vi = _BoundedSteps(
            amortised.program,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            inner_lr_scale=inner_lr_scale,
            num_particles=num_particles,
            posterior="full" if amortised.posterior == "full" else "diagonal",
        )
        self.vi.max_step = float(max_step)
        self.nuts = _NUTSFrom(
            amortised.program,
            num_samples=num_samples,
            warmup=warmup,
            num_chains=num_chains,
            max_tree_depth=max_tree_depth,
        )

    @property
    def _scores_support(self) -> bool:
        return self.objective == "elbo"

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        inner = {f"amortised_{name}": value for name, value in self.amortised.config().items()}
        if self.refine == "nuts":
            names = ["num_samples", "warmup", "num_chains", "max_tree_depth"]
            return {"refine": "nuts"} | {name: getattr(self.nuts, name) for name in names} | inner
        names = ["inner_steps", "inner_lr", "inner_lr_scale", "max_step", "num_particles"]
        own = {name: getattr(self.vi, name) for name in names}
        return {"refine": "vi", "objective": self.objective, "first_order": self.first_order} | own | inner

    @property
    def recognition(self) -> Any:
        """The recognition network of the amortised method; None before the first data."""
        return self.amortised.recognition

    def prepare(self, batch: TaskBatch | Observations) -> None:
        """Prepare the amortised method, whose posterior over global sites is this one's.

        Raises:
            ModelError and its kinds, DataError and its kinds: when program and data do not fit.
        """
        self.amortised.prepare(batch)
        self.theta_guide, self._created = self.amortised.theta_guide, True

    # -- adapt --------------------------------------------------------------------------------------------------

    def refined(
        self, observations: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> NormalPosterior | MultivariateNormalPosterior:
        """The amortised q after the gradient steps on these observations.

        Args:
            observations: ``[tasks, shots, …]`` with targets.
            theta: global sites, ``[G, E]`` or None.
            generator: where the noise comes from.
            create_graph: whether the result is differentiable in the encoder and θ.
        """
        with torch.set_grad_enabled(create_graph):
            q = self.amortised.infer(observations, theta)
        assert not isinstance(q, FlowPosterior)
        if self.vi.inner_steps == 0:  # not by a logarithm and back
            return q
        second_order = create_graph and not self.first_order
        state = self.vi.climb(_state(q), observations, theta, generator, second_order)
        return self.vi.gaussian([part if create_graph else part.detach() for part in state], observations, theta)

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> TaskPosterior:
        if self.refine == "vi":
            return self.refined(support, theta, generator, create_graph)
        with torch.no_grad():
            q = self.amortised.infer(support, theta)
        return self.nuts.sample_from(q, support, theta, generator)

    # -- loss ---------------------------------------------------------------------------------------------------

    def loss(self, batch: TaskBatch, *, generator: Any = None) -> Tensor:
        """Meta-training loss through the gradient steps, in nats a task.

        Raises:
            UnsupportedError: with ``refine="nuts"``, whose draws have no gradient.
            OptionError, ShapeError, DeviceMismatchError, DataError: as other methods.
        """
        self._need_vi()
        return super().loss(batch, generator=generator)

    def guide(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The Pyro guide, as of other methods.

        Raises:
            UnsupportedError: with ``refine="nuts"``, whose draws have no density.
        """
        self._need_vi()
        return super().guide(*args, **kwargs)

    def _need_vi(self) -> None:
        if self.refine == "nuts":
            raise UnsupportedError(
                "refine='nuts' gives draws: it has no loss and no Pyro guide. Train the amortised method, or use "
                "refine='vi'."
            )

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        method = self.amortised
        subsets = method.subsets and self.training
        if self.objective != "elbo":
            support = part_of(batch.support, generator) if subsets else batch.support
            q, pointwise = self.refined(support, theta, generator, True), self.objective == "marginal"
            return -log_predictive(method, q, batch.query, theta, generator, pointwise=pointwise).sum(-1)
        everything = batch.union()
        loss = -self._refined_elbo(everything, theta, generator)
        if subsets:
            loss = loss + method.encoder_alone(
                lambda part, theta: self._refined_elbo(part, theta, generator), everything, theta, generator
            )
        return loss

    def _refined_elbo(self, observations: Observations, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        q = self.refined(observations, theta, generator, True)
        return self.amortised.elbo_of(q, observations, theta, generator)[0]


class _BoundedSteps(ABML):
    """ABML's steps, none of which moves far, from a q that is not much wider than the prior."""

    max_step: float

    def climb(
        self,
        state: list[Tensor],
        support: Observations,
        theta: Tensor | None,
        generator: torch.Generator,
        create_graph: bool,
    ) -> list[Tensor]:
        """The inner steps, see :class:`ABML`."""
        widest = self.program.prior_moments(support, theta)[1].log() + _WIDEST
        if len(state) > 2:  # of diag(s) (I + W) the standard deviations are s times the norms of the rows of I + W
            widest = widest - 0.5 * state[2].square().sum(-1).log1p()
        # copies: the steps differentiate in each part by itself, so none may be made of another
        state = [state[0], torch.minimum(state[1], widest), *(part.clone() for part in state[2:])]
        return super().climb(state, support, theta, generator, create_graph)

    def _moves(self, gradients: Sequence[Tensor], support: Observations, theta: Tensor | None) -> list[Tensor]:
        moves = super()._moves(gradients, support, theta)
        bound = self.max_step * self.program.prior_moments(support, theta)[1]
        return [moves[0].clamp(-bound, bound), *(move.clamp(-self.max_step, self.max_step) for move in moves[1:])]


def _state(q: NormalPosterior | MultivariateNormalPosterior) -> list[Tensor]:
    """q as ABML's steps take it: loc, log s and, of a covariance R Rᵀ, W with R = diag(s) (I + W)."""
    if isinstance(q, NormalPosterior):
        return [q.loc, q.scale.log()]
    scale = q.root.diagonal(dim1=-2, dim2=-1)
    return [q.loc, scale.log(), q.root.tril(-1) / scale.unsqueeze(-1)]


class _NUTSFrom(NUTS):
    """NUTS from draws of a q, over v with u = loc + R v: q's own covariance is the inverse mass matrix."""

    _units: tuple[Tensor, Tensor] | None = None

    def sample_from(
        self, q: Recognisable, support: Observations, theta: Tensor | None, generator: torch.Generator
    ) -> ChainsPosterior:
        """Chains given the θ that q was given."""
        self._units, self._warm = _units(q, generator), q
        try:
            return self._adapt(support, theta, generator, create_graph=False)
        finally:
            self._units = self._warm = None

    def _to_u(self, v: Tensor) -> Tensor:
        assert self._units is not None
        loc, root = self._units
        return loc + (root * v if root.dim() == loc.dim() else (root @ v.unsqueeze(-1)).squeeze(-1))

    def _starts(self, support: Observations, theta: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        assert self._units is not None
        loc, root = self._units
        offset = super()._starts(support, theta, generator)["u"] - loc
        if root.dim() == loc.dim():
            return {"u": offset / root}
        return {"u": torch.linalg.solve_triangular(root, offset.unsqueeze(-1), upper=False).squeeze(-1)}

    def _potential(self, support: Observations, theta: Tensor | None) -> Any:
        inner = super()._potential(support, theta)
        return lambda z: inner({"u": self._to_u(z["u"])})

    def _chain(self, *args: Any) -> tuple[dict[str, Tensor], int, float, Tensor]:
        draws, diverged, step_size, transitions = super()._chain(*args)
        return {"u": self._to_u(draws["u"])}, diverged, step_size, transitions


def _units(q: Recognisable, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean of q, and its standard deviations or a root of its covariance, without a graph."""
    if isinstance(q, MultivariateNormalPosterior):
        return q.loc.detach(), q.root.detach()
    if isinstance(q, NormalPosterior):
        return q.loc.detach(), q.scale.detach()
    with torch.no_grad():
        draws = q.distribution().transform(normal_like(q.loc, (_FLOW_DRAWS, *q.loc.shape), generator))[0]
    return draws.mean(0), draws.std(0)
