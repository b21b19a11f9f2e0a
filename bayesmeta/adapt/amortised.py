"""Amortised inference: q(φ | S) by one pass of an encoder over the support, for any program.

Source: D. Kingma, M. Welling, "Auto-Encoding Variational Bayes", ICLR 2014, https://arxiv.org/abs/1312.6114, eq. 3,
with one recognition network for all tasks, as in H. Edwards, A. Storkey, "Towards a Neural Statistician", ICLR 2017,
https://arxiv.org/abs/1606.02185, section 3; the predictive objective is that of J. Gordon et al., "Meta-Learning
Probabilistic Inference for Prediction", ICLR 2019, https://arxiv.org/abs/1805.09921, section 2.

    q(u | S) = prior mean + prior sd ⊙ v,   v ~ N(a(S), C(S)), or a flow, given what an encoder read of S
    elbo:        −E_{q(φ | S ∪ Q)} log p(S, Q | φ) + KL(q(φ | S ∪ Q) ‖ p(φ | θ))
    predictive:  −log (1/L) Σ_l p(Q | φ_l),   φ_l ~ q(φ | S)

Departures: q is given relative to the prior, and is the prior at first and without support. The ELBO conditions on
everything, so that its gradient trains θ on the whole of each task. To make q right at any number of shots, the encoder
(not θ) is also trained on the ELBO of a random part of S ∪ Q, of uniform size; with the predictive objective S itself
is replaced by a random part of it. The KL is exact where prior and q are Gaussian, else estimated from the same draws.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.adapt.meta_regularization import MetaRegularization
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, OptionError, UnsupportedError
from bayesmeta.models.encoders import PooledEncoder, ProductEncoder, RecurrentEncoder
from bayesmeta.models.program import TaskProgram
from bayesmeta.models.recognition import Family, Recognised, Recognition
from bayesmeta.models.targets import class_probabilities, target_kind
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.random import Seed, as_generator, forked_rng, normal_like
from bayesmeta.ops.sets import random_subset
from bayesmeta.ops.whole import is_whole
from bayesmeta.posteriors.flow import FlowPosterior
from bayesmeta.posteriors.gaussian import MultivariateNormalPosterior, NormalPosterior

EncoderName = Literal["mean", "sum", "max", "attention", "transformer", "recurrent", "product"]
Objective = Literal["elbo", "predictive"]
Recognisable = NormalPosterior | MultivariateNormalPosterior | FlowPosterior


class EncoderRecipe:
    """An encoder that is given, or a name and the sizes from which one is made at the first data.

    Args:
        encoder, width, max_shots, seed: as in :class:`Amortised`.

    Raises:
        OptionError: for an unknown name, a width below 1, or a bound beside an encoder that is given.
    """

    def __init__(self, encoder: EncoderName | nn.Module, width: int, max_shots: int | None, seed: Seed) -> None:
        if not is_whole(width, 1):
            raise OptionError(f"width must be a whole number, at least 1; got {width!r}.")
        if max_shots is not None and not is_whole(max_shots, 1):
            raise OptionError(f"max_shots must be a whole number, at least 1, or None for no bound; got {max_shots!r}.")
        self.width, self.max_shots, self.seed = width, max_shots, seed
        self._own: nn.Module | None = None
        if isinstance(encoder, nn.Module):
            if max_shots is not None:
                raise OptionError("max_shots is for an encoder that is made here; give it to your own encoder.")
            self.name, self._own = type(encoder).__name__, copy.deepcopy(encoder)
        elif encoder in get_args(EncoderName):
            self.name = encoder
        else:
            names = ", ".join(map(repr, get_args(EncoderName)))
            raise OptionError(f"Unknown encoder {encoder!r}; expected a module of bayesmeta.encoders, or {names}.")

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {"encoder": self.name, "width": self.width, "max_shots": self.max_shots}

    def make(
        self,
        program: TaskProgram,
        theta: Tensor | None,
        observations: Observations,
        *,
        size: int | None = None,
        latent: int = 1,
        given: int = 0,
        full: bool = False,
    ) -> nn.Module:
        """The encoder, in the dtype and on the device of the observations.

        Args:
            program: prepared; it says what kind of numbers the targets are.
            theta: a typical θ, ``[E]``, or None.
            observations: the first data.
            size: of what the encoder gives; by default the width.
            latent, given, full: of a product of Gaussians: its latent, what else it reads, whether with correlations.
        """
        if self._own is not None:
            return self._own.to(observations.x)
        assert observations.y is not None
        outputs = 1 if observations.y.dim() == 2 else observations.y.shape[-1]
        with torch.no_grad():
            features = program.embed(observations).num_features
        return self.build(
            features, outputs, observations.x, size=size, latent=latent, given=given, full=full,
            **encoder_targets(program, theta, observations),
        )  # fmt: skip

    def build(
        self,
        features: int,
        outputs: int,
        like: Tensor,
        *,
        size: int | None = None,
        latent: int = 1,
        given: int = 0,
        full: bool = False,
        **targets: Any,
    ) -> nn.Module:
        """The encoder of these widths, in the dtype and on the device of ``like``.

        Args:
            features, outputs: widths of x and y.
            like: a floating tensor.
            size, latent, given, full: as in :meth:`make`.
            targets: how y is read, ``classes`` or ``counts`` of an :class:`~bayesmeta.models.encoders.Encoder`.
        """
        if self._own is not None:
            return self._own.to(like)
        widths, hidden = (features, outputs), (self.width, self.width)
        size = self.width if size is None else size
        options: dict[str, Any] = {"max_shots": self.max_shots, **targets}
        with forked_rng(as_generator(self.seed, like.device, "encoder")):
            encoder: nn.Module
            if self.name == "product":
                covariance: Any = "full" if full else "diagonal"
                options |= {"covariance": covariance, "given": given}
                encoder = ProductEncoder(*widths, latent, hidden=hidden, **options)
            elif self.name == "recurrent":
                encoder = RecurrentEncoder(*widths, size, hidden=self.width, **options)
            else:
                attends = self.name in ("attention", "transformer")
                options |= {"blocks": 2, "block": self.name} if attends else {"pool": self.name}
                encoder = PooledEncoder(*widths, size, hidden=hidden, **options)
        return encoder.to(like)


def encoder_targets(program: TaskProgram, theta: Tensor | None, observations: Observations) -> dict[str, Any]:
    """How an encoder is to read y: as numbers, one-hot labels or counts."""
    if len(program.layout.observed) > 1:
        return {}
    with torch.no_grad():
        one = observations.tasks(slice(0, 1))
        loc, _ = program.prior_moments(one, theta)
        fn = program.predictive(loc, one, theta)
        kind = target_kind(fn)
        if kind == "class":
            classes = class_probabilities(fn).shape[-1]
            return {"classes": classes} if classes > 2 else {}
    return {"counts": True} if kind == "count" else {}


class Amortised(Method):
    """An amortised guide for any model: a network reads the support and gives q(φ | S), without a gradient step.

    Args:
        model: any Pyro program, or a network model with a prior that has a density.
        encoder: what reads the support: ``"mean"``, ``"sum"`` or ``"max"`` of a network on each observation;
            ``"transformer"`` or ``"attention"`` among them (two blocks), then the mean; ``"product"`` of Gaussian
            factors with the prior; ``"recurrent"``, for which their order counts; or a module of your own (see
            :mod:`bayesmeta.encoders`), which is copied.
        posterior: ``"diagonal"`` or ``"full"`` Gaussian in unconstrained space, or a ``"flow"``.
        objective: ``"elbo"`` or ``"predictive"``, see :mod:`bayesmeta.adapt.amortised`.
        num_particles: draws of φ in each estimate of the loss.
        subsets: whether training also shows the encoder random parts of the observations, so that it works at any
            number of shots.
        width: of the encoder, of what it gives, and of the head.
        max_shots: bound on the observations of a task; None for none. Attention takes memory that grows with the
            square of their number.
        seed: of the networks' first weights; None means seed 0.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class. If
            it is no point, the encoder's head reads θ.
        meta_regularization: noise and a penalty on the embedding of an :class:`~bayesmeta.EmbeddedModel`, see
            :class:`~bayesmeta.MetaRegularization`.

    Raises:
        OptionError: for unknown names, or numbers out of range.
        UnsupportedError: for a prior without a density, or a model without task parameters.
        ShapeError: for an encoder of another width than the data or the task parameters.
    """

    card = MethodCard(
        assumes="a prior with a density, and enough tasks to learn from",
        posterior="Gaussian (diagonal or full) or a flow, from one pass of an encoder",
        cost="adapt one pass, no gradient; train one gradient",
        source="Kingma, Welling 2014; Edwards, Storkey 2017; Gordon et al. 2019",
    )

    def __init__(
        self,
        model: Any,
        encoder: EncoderName | nn.Module = "mean",
        *,
        posterior: Family = "diagonal",
        objective: Objective = "elbo",
        num_particles: int = 5,
        subsets: bool = True,
        width: int = 64,
        max_shots: int | None = None,
        seed: Seed = None,
        global_guide: GlobalKind = "point",
        meta_regularization: MetaRegularization | None = None,
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        self._regularize(meta_regularization)
        self._check_options(posterior, objective, num_particles)
        self._need_density()
        self._recipe = EncoderRecipe(encoder, width, max_shots, seed)
        self.posterior: Family = posterior
        self.objective: str = objective
        self.num_particles, self.subsets = num_particles, subsets
        self._uses_w = False
        self.recognition: Recognition | None = None

    #: what ``objective`` may be
    _objectives: tuple[str, ...] = get_args(Objective)

    @property
    def _scores_support(self) -> bool:
        return self.objective == "elbo"

    def _check_options(self, posterior: str, objective: str, num_particles: int) -> None:
        for what, value, known in (
            ("posterior", posterior, get_args(Family)),
            ("objective", objective, self._objectives),
        ):
            if value not in known:
                raise OptionError(f"Unknown {what} {value!r}; expected one of {', '.join(map(repr, known))}.")
        if num_particles < 1:
            raise OptionError(f"num_particles must be at least 1; got {num_particles}.")

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return self._recipe.config() | {
            "posterior": self.posterior,
            "objective": self.objective,
            "num_particles": self.num_particles,
            "subsets": self.subsets,
            "global_guide": self.global_kind,
            **self._regularization_config(),
        }

    # -- the recognition network --------------------------------------------------------------------------------

    def _create(self, observations: Observations) -> None:
        size = self.program.layout.dim
        if size == 0:
            raise UnsupportedError(
                f"{type(self).__name__} recognises task parameters, and this model has none of finite length (a latent "
                "of size 0, or a function as in a deep kernel). Give the model a latent of at least 1."
            )
        self._uses_w = observations.w is not None
        given = 0 if observations.w is None else observations.w.shape[-1]
        if self.theta_guide is not None and not self.theta_guide.is_point:
            given += self.program.layout.theta_dim
        theta = None if self.theta_guide is None else self.theta_guide.centre()
        full = self.posterior == "full"
        encoder = self._recipe.make(self.program, theta, observations, latent=size, given=given, full=full)
        with forked_rng(as_generator(self._recipe.seed, observations.device, "recognition")):
            recognition = Recognition(encoder, size, self.posterior, given=given, hidden=self._recipe.width)
        recognition = recognition.to(observations.x)
        with torch.no_grad():
            seen = self.program.embed(observations)
            recognition(seen, observations.x.new_zeros(observations.num_tasks, given))  # its widths fit
        self.recognition = recognition

    def _given(self, observations: Observations, theta: Tensor | None) -> Tensor:
        """What is known of each task beside its observations: w, and θ where it is drawn, ``[G, tasks, given]``."""
        assert self.recognition is not None
        groups = 1 if theta is None else theta.shape[0]
        parts = []
        if self._uses_w:
            if observations.w is None:
                raise DataError("The encoder reads task-level covariates; the observations have w=None. Give w.")
            parts.append(observations.w.expand(groups, -1, -1))
        if theta is not None and self.theta_guide is not None and not self.theta_guide.is_point:
            parts.append(theta.unsqueeze(1).expand(-1, observations.num_tasks, -1))
        return torch.cat(parts, -1) if parts else observations.x.new_zeros(groups, observations.num_tasks, 0)

    def _base(self, observations: Observations, theta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in the units of which q is given."""
        return self.program.prior_moments(observations, theta)

    def _recognise(self, observations: Observations, theta: Tensor | None) -> Recognised:
        """q in these units."""
        assert self.recognition is not None
        return self.recognition(self.program.embed(observations), self._given(observations, theta))

    def infer(self, observations: Observations, theta: Tensor | None = None) -> Recognisable:
        """q(φ | observations) by one pass, differentiable.

        Args:
            observations: ``[tasks, shots, …]`` with targets.
            theta: global sites, ``[G, E]`` or None.
        """
        assert self.recognition is not None
        groups = 1 if theta is None else theta.shape[0]
        shape = (groups, observations.num_tasks, self.program.layout.dim)
        prior_loc, prior_scale = (part.expand(shape) for part in self._base(observations, theta))
        v = self._recognise(observations, theta)
        loc = prior_loc + prior_scale * v.loc
        if self.posterior == "full":
            root = prior_scale.unsqueeze(-1) * v.spread
            return MultivariateNormalPosterior(self.program, observations, loc, root.expand(*shape, -1), theta)
        scale = prior_scale * v.spread
        if v.context is None:
            return NormalPosterior(self.program, observations, loc, scale, theta)
        flow, some = self.recognition.flow, observations.full_mask().any(-1)
        context = v.context.expand(*shape[:2], -1)
        return FlowPosterior(self.program, observations, loc, scale, context, some, theta, flow=flow)

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> Recognisable:
        with torch.set_grad_enabled(create_graph):
            posterior = self.infer(support, theta)
        if isinstance(posterior, FlowPosterior) and not create_graph:  # not the network that may be trained on
            posterior.flow = copy.deepcopy(posterior.flow).requires_grad_(False)
        return posterior

    # -- loss ---------------------------------------------------------------------------------------------------

    def elbo(self, observations: Observations, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        """E_q log p(y | φ) − KL(q(φ | observations) ‖ p(φ | θ)) of each task, ``[G, tasks]``."""
        return self.elbo_of(self.infer(observations, theta), observations, theta, generator)

    def elbo_of(
        self, q: Recognisable, observations: Observations, theta: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """The ELBO of any q of these tasks, ``[G, tasks]``."""
        if isinstance(q, FlowPosterior):
            u, log_q = q.distribution().transform(normal_like(q.loc, (self.num_particles, *q.loc.shape), generator))
            return (self.program.log_joint(u, observations, theta) - log_q).mean(0)
        u, normal = rsample(q, self.num_particles, generator), batch_distribution(q)
        prior = self.program.gaussian_prior(observations, theta)
        if prior is None:
            return self.program.log_joint(u, observations, theta).mean(0) + normal.entropy()
        log_likelihood = self.program.log_likelihood(u, observations, theta).sum(-1).mean(0)
        loc, scale = (part.expand_as(q.loc) for part in prior)
        return log_likelihood - torch.distributions.kl_divergence(normal, _like(normal, loc, scale))

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        subsets = self.subsets and self.training
        if self.objective == "predictive":
            support = part_of(batch.support, generator) if subsets else batch.support
            return predictive_loss(self, support, batch.query, theta, generator)
        everything = batch.union()
        loss = -self.elbo(everything, theta, generator)[0]
        if subsets:
            loss = loss + self.encoder_alone(
                lambda part, theta: self.elbo(part, theta, generator)[0], everything, theta, generator
            )
        return loss

    def encoder_alone(
        self,
        elbo: Callable[[Observations, Tensor | None], Tensor],
        everything: Observations,
        theta: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """A term of the value 0, ``[tasks]``: the gradient for the encoder of −ELBO of a random part of each task.

        Args:
            elbo: of observations and θ, ``[tasks]``.
            everything: of which the parts are taken.
            theta: global sites, ``[1, E]`` or None, which get no gradient; nor do the program's parameters.
            generator: of the parts.
        """
        part = part_of(everything, generator, least=1)
        part = replace(part, x=part.x.detach())  # an embedding of x belongs to θ
        with _frozen(self.program):
            more = -elbo(part, None if theta is None else theta.detach())
        return more - more.detach()


def part_of(observations: Observations, generator: torch.Generator, least: int = 0) -> Observations:
    """A random part of each task's observations, of uniform size, at least ``least``."""
    return replace(observations, mask=random_subset(observations.full_mask(), generator, least=least))


def rsample(q: Recognisable, num_samples: int, generator: torch.Generator) -> Tensor:
    """Reparameterised draws of every component, ``[n, G, tasks, D]``."""
    noise = normal_like(q.loc, (num_samples, *q.loc.shape), generator)
    if isinstance(q, FlowPosterior):
        return q.distribution().transform(noise)[0]
    if isinstance(q, NormalPosterior):
        return q.loc + q.scale * noise
    return q.loc + (q.root @ noise.unsqueeze(-1)).squeeze(-1)


def batch_distribution(q: NormalPosterior | MultivariateNormalPosterior) -> torch.distributions.Distribution:
    """q as a distribution of batch shape ``[G, tasks]`` and event shape ``[D]``; a root is lower triangular here."""
    if isinstance(q, NormalPosterior):
        normal = torch.distributions.Normal(q.loc, q.scale, validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)
    return torch.distributions.MultivariateNormal(q.loc, scale_tril=q.root, validate_args=False)


def _like(normal: torch.distributions.Distribution, loc: Tensor, scale: Tensor) -> torch.distributions.Distribution:
    """A diagonal Gaussian of the class that torch's KL wants beside that of ``normal``."""
    if isinstance(normal, torch.distributions.MultivariateNormal):
        return torch.distributions.MultivariateNormal(loc, scale_tril=scale.diag_embed(), validate_args=False)
    return torch.distributions.Independent(torch.distributions.Normal(loc, scale, validate_args=False), 1)


def predictive_loss(
    method: Amortised, support: Observations, query: Observations, theta: Tensor | None, generator: torch.Generator
) -> Tensor:
    """−log (1/L) Σ_l p(Q | φ_l) with φ_l ~ q(φ | S), ``[tasks]``."""
    return -log_predictive(method, method.infer(support, theta), query, theta, generator).sum(-1)


def log_predictive(
    method: Amortised,
    q: Recognisable,
    query: Observations,
    theta: Tensor | None,
    generator: torch.Generator,
    *,
    pointwise: bool = False,
) -> Tensor:
    """log (1/L) Σ_l p(Q | φ_l) with φ_l ~ q, ``[tasks, 1]``; pointwise that of each query point, ``[tasks, shots]``."""
    each = method.program.log_likelihood(rsample(q, method.num_particles, generator), query, theta)
    each = each if pointwise else each.sum(-1, keepdim=True)
    return (each.logsumexp(0) - math.log(method.num_particles))[0]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the module's parameters through what is computed inside."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
