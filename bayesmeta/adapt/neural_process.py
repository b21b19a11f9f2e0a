"""Neural processes: a latent (or a deterministic vector) for each task, from an encoder, and a shared decoder.

Source: M. Garnelo et al., "Neural Processes", ICML 2018 workshop, https://arxiv.org/abs/1807.01622, section 2, and
"Conditional Neural Processes", ICML 2018, https://arxiv.org/abs/1807.01613, section 2; maximum likelihood as in A.
Foong et al., "Meta-Learning Stationary Stochastic Process Prediction with Convolutional Neural Processes", NeurIPS
2020, https://arxiv.org/abs/2007.01332, section 4.

    elbo:        −E_{q(z | S ∪ Q)} log p(Q | z) + KL(q(z | S ∪ Q) ‖ q(z | S))
    likelihood:  −log (1/L) Σ_l p(Q | z_l),   z_l ~ q(z | S)
    conditional: −log p(Q | r(S))

Departures: z has a prior N(0, I), in the units of which the encoder gives q, and without support q is that prior; the
encoder reads how many observations there are; training shows random parts of the support (``subsets``) in place of
the papers' random contexts. The decoder is any :class:`~bayesmeta.ContextTaskModel`, by concatenation or FiLM, under
any likelihood; ``elbo`` takes Gaussian q alone.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayesmeta.adapt.amortised import (
    Amortised,
    EncoderName,
    EncoderRecipe,
    batch_distribution,
    part_of,
    predictive_loss,
    rsample,
)
from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.adapt.meta_regularization import MetaRegularization
from bayesmeta.data import Observations, TaskBatch, union
from bayesmeta.errors import OptionError, ShapeError, UnsupportedError
from bayesmeta.models.context import ContextTaskModel, Decoder
from bayesmeta.models.embedding import EmbeddedModel
from bayesmeta.models.encoders import ProductEncoder
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.models.recognition import Family
from bayesmeta.ops.random import Seed
from bayesmeta.ops.whole import is_whole
from bayesmeta.posteriors.delta import DeltaPosterior
from bayesmeta.posteriors.flow import FlowPosterior

Objective = Literal["elbo", "likelihood"]


class NeuralProcess(Amortised):
    """A latent neural process (Garnelo et al. 2018): z ~ q(z | S) from an encoder, y ~ p(y | f(x, z)).

    Args:
        model: a :class:`~bayesmeta.ContextTaskModel`, whose φ is the latent z; or a
            :class:`~bayesmeta.NeuralTaskModel`, whose network becomes the decoder, shared by all tasks; or one of them
            behind an embedding (:class:`~bayesmeta.EmbeddedModel`), which the encoder then reads too.
        encoder: as in :class:`~bayesmeta.Amortised`.
        latent_size: of z, 16 by default; of a ContextTaskModel: its own.
        decoder: for a NeuralTaskModel, how z enters its network: ``"concatenate"`` or ``"film"``.
        posterior: ``"diagonal"``, the paper's, ``"full"``, or with ``objective="likelihood"`` a ``"flow"``.
        objective: ``"elbo"`` or ``"likelihood"``, see :mod:`bayesmeta.adapt.neural_process`.
        num_particles: draws of z in each estimate of the loss.
        subsets: whether training replaces the support by a random part of it, of uniform size, so that the process
            works with any number of observations, none included.
        width, max_shots, seed: as in :class:`~bayesmeta.Amortised`; ``seed`` is that of the decoder's new weights too.
        meta_regularization: noise and a penalty on the embedding of an :class:`~bayesmeta.EmbeddedModel`, see
            :class:`~bayesmeta.MetaRegularization`.

    Raises:
        OptionError: for a latent of size 0, unknown names, numbers out of range, or a flow with the ELBO.
        UnsupportedError: for a Pyro program, which goes into Amortised.
        ShapeError: for an encoder of another width than the data or the latent.
    """

    card = MethodCard(
        assumes="a network; many tasks to learn from",
        posterior="Gaussian over a latent beside the inputs, from one pass of an encoder",
        cost="adapt one pass, no gradient; train one gradient",
        source="Garnelo, Schwarz, Rosenbaum, Viola, Rezende, Eslami, Teh 2018",
    )
    _objectives = get_args(Objective)

    def __init__(
        self,
        model: ContextTaskModel | NeuralTaskModel | EmbeddedModel,
        encoder: EncoderName | nn.Module = "mean",
        *,
        latent_size: int | None = None,
        decoder: Decoder | None = None,
        posterior: Family = "diagonal",
        objective: Objective = "elbo",
        num_particles: int = 5,
        subsets: bool = True,
        width: int = 64,
        max_shots: int | None = None,
        seed: Seed = None,
        meta_regularization: MetaRegularization | None = None,
    ) -> None:
        super().__init__(
            as_context_model(model, latent_size, decoder, seed, type(self).__name__),
            encoder,
            posterior=posterior,
            objective=objective,  # type: ignore[arg-type]
            num_particles=num_particles,
            subsets=subsets,
            width=width,
            max_shots=max_shots,
            seed=seed,
            meta_regularization=meta_regularization,
        )
        if posterior == "flow" and objective == "elbo":
            raise OptionError(
                "The KL between q(z | S ∪ Q) and q(z | S) has no closed form for flows; use objective='likelihood', or "
                "posterior='diagonal' or 'full'."
            )

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return super().config() | _decoder_config(self.program)

    @property
    def _scores_support(self) -> bool:
        return False

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        support = part_of(batch.support, generator) if self.subsets and self.training else batch.support
        if self.objective == "likelihood":
            return predictive_loss(self, support, batch.query, theta, generator)
        prior, posterior = self.infer(support, theta), self.infer(union(support, batch.query), theta)
        assert not isinstance(prior, FlowPosterior)
        assert not isinstance(posterior, FlowPosterior)
        z = rsample(posterior, self.num_particles, generator)
        log_likelihood = self.program.log_likelihood(z, batch.query, theta).sum(-1).mean(0)
        kl = torch.distributions.kl_divergence(batch_distribution(posterior), batch_distribution(prior))
        return (kl - log_likelihood)[0]


class ConditionalNeuralProcess(Method):
    """A conditional neural process (Garnelo et al. 2018): y ~ p(y | f(x, r(S))), r a deterministic encoder.

    The representation r is φ, and the posterior a point: what uncertainty there is stands in the likelihood. So use one
    whose spread the network gives, :class:`bayesmeta.likelihoods.HeteroscedasticGaussian` for real numbers. Without
    support r is a vector of its own that is learned, and predictions are the marginal ones. The prior of the
    ContextTaskModel is not used.

    Args:
        model: as in :class:`NeuralProcess`.
        encoder: as in :class:`NeuralProcess`; not ``"product"``, which gives a distribution.
        latent_size: of r, 64 by default; of a ContextTaskModel: its own.
        decoder, subsets, width, max_shots, seed, meta_regularization: as in :class:`NeuralProcess`.

    Raises:
        OptionError: for a representation of size 0, unknown names, or numbers out of range.
        UnsupportedError: for a Pyro program.
        ShapeError: for an encoder of another width than the data or the representation.
    """

    card = MethodCard(
        assumes="a network under a likelihood that carries the uncertainty; many tasks",
        posterior="a point: the encoder's vector; predictive in closed form",
        cost="adapt one pass, no gradient; train one gradient",
        source="Garnelo, Rosenbaum, Maddison, Ramalho, Saxton, Shanahan, Teh, Rezende, Eslami 2018",
    )

    def __init__(
        self,
        model: ContextTaskModel | NeuralTaskModel | EmbeddedModel,
        encoder: EncoderName | nn.Module = "mean",
        *,
        latent_size: int | None = None,
        decoder: Decoder | None = None,
        subsets: bool = True,
        width: int = 64,
        max_shots: int | None = None,
        seed: Seed = None,
        meta_regularization: MetaRegularization | None = None,
    ) -> None:
        super().__init__(as_context_model(model, latent_size, decoder, seed, type(self).__name__, default=64))
        self._regularize(meta_regularization)
        self._recipe = EncoderRecipe(encoder, width, max_shots, seed)
        if self._recipe.name in ("product", ProductEncoder.__name__):
            raise OptionError("A product of Gaussians is a distribution, no vector; it goes into NeuralProcess.")
        self.subsets = subsets
        self.encoder: nn.Module | None = None

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        own = {"subsets": self.subsets} | self._regularization_config()
        return self._recipe.config() | own | _decoder_config(self.program)

    def _create(self, observations: Observations) -> None:
        size = self.program.layout.dim
        encoder = self._recipe.make(self.program, None, observations, size=size)
        if getattr(encoder, "size", None) != size:
            raise ShapeError(
                f"The encoder gives {getattr(encoder, 'size', None)} number(s) a task; the decoder takes a context of "
                f"{size}. Make one with size={size}."
            )
        with torch.no_grad():
            encoder(self.program.embed(observations))  # its widths fit
        self.encoder = encoder

    def represent(self, observations: Observations) -> Tensor:
        """r(S), ``[1, tasks, size]``, differentiable."""
        assert self.encoder is not None
        return self.encoder(self.program.embed(observations)).unsqueeze(0)

    def _start(self, support: Observations) -> Tensor:
        """r of no observations, ``[tasks, size]``."""
        return self.represent(support.points(slice(0)))[0]

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> DeltaPosterior:
        with torch.set_grad_enabled(create_graph):
            return DeltaPosterior(self.program, support, self.represent(support), theta)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        support = part_of(batch.support, generator) if self.subsets and self.training else batch.support
        return -self.program.log_likelihood(self.represent(support), batch.query, theta).sum(-1)[0]


def as_context_model(
    model: Any, size: int | None, decoder: Decoder | None, seed: Seed, method: str, *, default: int = 16
) -> ContextTaskModel | EmbeddedModel:
    """A ContextTaskModel as it is, or one made of a NeuralTaskModel with a context of ``size``; or one embedded.

    Raises:
        OptionError: for a context of size 0, or options other than a ContextTaskModel's own.
        UnsupportedError: for another model.
    """
    if isinstance(model, EmbeddedModel):
        inner = as_context_model(model.model, size, decoder, seed, method, default=default)
        return EmbeddedModel(inner, model.embedding)
    if isinstance(model, NeuralTaskModel):
        size = default if size is None else size
        if not is_whole(size, 1):
            raise OptionError(
                f"latent_size must be a whole number, at least 1; got {size!r}. A latent of size 0 says nothing."
            )
        return ContextTaskModel.widen(model, size, decoder=decoder or "concatenate", seed=seed)
    if not isinstance(model, ContextTaskModel):
        raise UnsupportedError(
            f"{method} gives the network of a model a latent beside its inputs: it takes a NeuralTaskModel or a "
            f"ContextTaskModel; got {type(model).__name__}. {_instead(model)}"
        )
    if model.context_size < 1:
        raise OptionError("The ContextTaskModel has context_size=0; a latent of size 0 says nothing. Give at least 1.")
    for name, given, own in (("latent_size", size, model.context_size), ("decoder", decoder, model.decoder)):
        if given not in (None, own):
            raise OptionError(f"{name}={given!r}, but the ContextTaskModel has {own!r}; leave it out.")
    return model


def _instead(model: Any) -> str:
    """What to do with what is no model of a neural process."""
    if isinstance(model, Method):
        return "It is a method: give its model, method.program."
    if isinstance(model, nn.Module) and not isinstance(model, PyroModule | TaskProgram):
        return "A network goes into NeuralTaskModel(network, likelihood, prior='point') first."
    return "A Pyro program goes into Amortised."


def _decoder_config(program: Any) -> dict[str, Any]:
    program = program.model if isinstance(program, EmbeddedModel) else program
    assert isinstance(program, ContextTaskModel)
    return {"latent_size": program.context_size, "decoder": program.decoder}
