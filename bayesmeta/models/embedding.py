"""A model whose inputs all go through one network first, which every task shares."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import ModelError, OptionError, ShapeError
from bayesmeta.models.handlers import Layout, Pass, Substitute
from bayesmeta.models.program import TaskProgram, as_program
from bayesmeta.ops.batched import unsafe_modules
from bayesmeta.ops.random import Seed


class EmbeddedModel(TaskProgram):
    """y ~ p(y | e(x), φ): any model behind an embedding e of its inputs, which all tasks share.

    The embedding is θ and is never adapted. All that reads x sees e(x) instead: the model, and the encoder of an
    amortised method too. :class:`~bayesmeta.MetaRegularization` limits how much passes through it.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` or another model, or a Pyro program, for inputs of the embedding's
            width. It is used, not copied.
        embedding: maps ``[tasks, shots, features]`` to ``[tasks, shots, width]``, each row on its own. It is copied.

    Raises:
        OptionError: for an embedding that is no module, or one behind another.
        ModelError: for an embedding without parameters, or with running statistics or dropout.
    """

    def __init__(self, model: Any, embedding: nn.Module) -> None:
        if not isinstance(embedding, nn.Module):
            raise OptionError(f"embedding is a module, such as bm.nets.mlp(3, [40], 5); got {embedding!r}.")
        if isinstance(model, EmbeddedModel):
            raise OptionError("The model has an embedding already; put both into one nn.Sequential.")
        bad = unsafe_modules(embedding)
        if bad:
            raise ModelError(
                f"The embedding has modules that mix tasks or draw hidden noise: {', '.join(bad)}. Use LayerNorm."
            )
        if not list(embedding.parameters()):
            raise ModelError("The embedding has no parameters; transform the inputs beforehand instead.")
        inner = as_program(model)
        super().__init__(self._pyro_program)
        self.model = inner
        del self.scope  # pyro.param statements of the model keep their own place
        object.__setattr__(self, "scope", inner.scope)
        self.embedding = copy.deepcopy(embedding)
        self._features: int | None = None
        self._is_embedded = False

    # -- the embedding ------------------------------------------------------------------------------------------

    def embed(self, observations: Observations) -> Observations:
        """The observations as the model sees them, with e(x) for x; as they are inside of :meth:`embedded`."""
        if self._is_embedded:
            return observations
        return replace(observations, x=self.embedding(observations.x))

    def embed_batch(self, batch: TaskBatch) -> TaskBatch:
        """Support and query with e(x) for x."""
        return replace(batch, support=self.embed(batch.support), query=self.embed(batch.query))

    @contextmanager
    def embedded(self) -> Iterator[None]:
        """Inside, all observations count as embedded: a training step embeds once, not at every inner step."""
        before = self._is_embedded
        self._is_embedded = True
        try:
            yield
        finally:
            self._is_embedded = before

    def _try_embedding(self, observations: Observations) -> None:
        x = observations.x.new_ones(1, 2, observations.num_features)
        try:
            with torch.no_grad():
                out = self.embedding(x)
        except RuntimeError as error:
            raise ShapeError(
                f"The embedding cannot take x with {x.shape[-1]} features in {x.dtype}: {error}. Give it that input "
                "width, and model and data one dtype and device (.to())."
            ) from error
        if not isinstance(out, Tensor) or out.dim() != 3 or out.shape[:2] != (1, 2):
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(f"The embedding maps [tasks, shots, features] to [tasks, shots, width]; it gave {got}.")

    # -- structure ----------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The sites of the model."""
        return self.model.layout

    @property
    def is_prepared(self) -> bool:
        """Whether :meth:`prepare` has run."""
        return self.model.is_prepared

    @property
    def blocks(self) -> dict[str, slice]:
        """Where each part lies in u."""
        return self.model.blocks

    def prepare(self, observations: Observations) -> EmbeddedModel:
        """Check that the embedding takes these features, and read the model's sites at what it gives."""
        if self._features is None:
            self._try_embedding(observations)
            with torch.no_grad():
                self.model.prepare(self.embed(observations))
            self._features = observations.num_features
        self.check(observations)
        return self

    def check(self, observations: Observations) -> None:
        """Check the feature width, and what the model asks of the rest.

        Raises:
            ShapeError: for another width than that of the first data.
        """
        if not self._is_embedded and observations.num_features != self._features:
            raise ShapeError(
                f"x has {observations.num_features} features; this model was first used with {self._features}."
            )
        with torch.no_grad():
            self.model.check(self.embed(observations))

    def _pyro_program(
        self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None, w: Tensor | None = None
    ) -> Any:
        return self.model(self.embed(Observations(x)).x, y, mask, w)

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None, w: Tensor | None = None) -> Any:
        """Run as a Pyro program."""
        return self._pyro_program(x, y, mask, w)

    def _pass(self, handler: Substitute, observations: Observations) -> Pass:
        return self.model._pass(handler, self.embed(observations))

    def check_targets(self, observations: Observations, theta: Tensor | None = None) -> None:
        """Check that the likelihood admits the targets."""
        self.model.check_targets(self.embed(observations), theta)

    # -- densities: those of the model at e(x) --------------------------------------------------------------------

    def evaluate(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Pass:
        """All values and densities in one pass."""
        return self.model.evaluate(u, self.embed(observations), theta)

    def log_joint(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y, φ | x, θ) in unconstrained space, ``[…, tasks]``."""
        return self.model.log_joint(u, self.embed(observations), theta)

    def log_prior(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(φ | θ, w) in unconstrained space, ``[…, tasks]``."""
        return self.model.log_prior(u, self.embed(observations), theta)

    def log_likelihood(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y | x, φ) of each observation, ``[…, tasks, shots]``; 0 where masked."""
        return self.model.log_likelihood(u, self.embed(observations), theta)

    def log_likelihood_gradient(
        self, u: Tensor, observations: Observations, theta: Tensor | None = None, *, create_graph: bool = False
    ) -> Tensor:
        """∇_u of each task's own log-likelihood, ``[…, tasks, D]``."""
        with torch.set_grad_enabled(create_graph and torch.is_grad_enabled()):
            seen = self.embed(observations)
        if not create_graph:  # also where it was embedded before: then the model's fast path applies
            seen = replace(seen, x=seen.x.detach())
        return self.model.log_likelihood_gradient(u, seen, theta, create_graph=create_graph)

    # -- values ---------------------------------------------------------------------------------------------------

    def named(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> dict[str, Tensor]:
        """Task parameters by name in their own space, each ``[…, tasks, *event]``."""
        return self.model.named(u, self.embed(observations), theta)

    def sample_prior(
        self, num_samples: int, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw φ from p(φ | θ, w) and, when ``theta`` is None, θ's sites: ``[n, tasks, D]`` and ``[n, E]`` or None."""
        return self.model.sample_prior(num_samples, self.embed(observations), generator, theta)

    def prior_moments(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of u under the prior, each ``[…, tasks, D]``."""
        return self.model.prior_moments(self.embed(observations), theta)

    def learned_start(self, observations: Observations) -> Tensor | None:
        """Where point estimates start, ``[tasks, D]``, or None."""
        return self.model.learned_start(self.embed(observations))

    def start_parameters(self) -> list[nn.Parameter]:
        """The parameters of :meth:`learned_start`."""
        return self.model.start_parameters()

    def gaussian_prior(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of u, ``[…, tasks, D]``, if its prior given θ is a diagonal Gaussian, or None."""
        return self.model.gaussian_prior(self.embed(observations), theta)

    # -- predictions ----------------------------------------------------------------------------------------------

    def predict(
        self, u: Tensor, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> Tensor:
        """Draw y given φ, ``[…, tasks, shots]`` or ``[…, tasks, shots, outputs]``."""
        with torch.no_grad():
            return self.model.predict(u, self.embed(observations), generator, theta)

    def predictive(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Any:
        """The likelihood's distribution at φ, with batch shape ``[…, tasks, shots]``."""
        return self.model.predictive(u, self.embed(observations), theta)
