"""A mixture of Bayesian last layers: a multimodal, nonlinear posterior in closed form.

Source: none; this is our own. Its parts are: the Bayesian last layer (Harrison, Sharma, Pavone, WAFR 2018,
https://arxiv.org/abs/1807.08912), feature-wise modulation (Perez et al., AAAI 2018, https://arxiv.org/abs/1709.07871),
and mixtures whose weights are evidences, as those of Gaussian process experts are (Tresp, "Mixtures of Gaussian
processes", NIPS 2000), here one choice for a whole task rather than one for each input.

A Bayesian last layer is linear in the targets: its predictive mean is A(x_S) y_S, whatever the network. Here K learned
latents z_k modulate the layers of one shared trunk, and each of the K feature maps that result has a last layer with a
Gaussian prior of its own. One component holds for a task:

    k ~ π,  φ | k ~ N(m_k, diag s_k²),  y = f(x; z_k)ᵀ φ + noise
    p(k | S) ∝ π_k p(y_S | x_S, k)               the evidence of each component, in closed form
    p(y | x, S) = Σ_k p(k | S) p(y | x, S, k)    each a Normal (or a Student-t)

Adaptation takes K factorisations and no gradient; θ is trained on the exact evidence of the mixture. As k is chosen by
the data, the predictive mean is not linear in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.adapt.last_layer import Objective, check_objective, conjugate_loss
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.models.conjugate import ConjugateModel, Noise
from bayesmeta.ops.random import Seed
from bayesmeta.posteriors.conjugate import ConjugatePosterior


class BayesianLastLayerMixture(Method):
    """K last layers on features that K latents modulate, weighted by their evidence on the support.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` with ``task_modules="head"``, a diagonal Gaussian prior and
            Gaussian noise, which is turned into a :class:`~bayesmeta.ConjugateModel`; or one of these, taken as it is.
        num_components: K, by default 16. Of a ConjugateModel: its own.
        noise: ``"known"`` (its scale is θ), ``"inverse_gamma"`` (each task's variance of each output, inferred) or
            ``"inverse_wishart"`` (likewise the covariance between outputs), as in BayesianLastLayer.
        latent_size, spread: length of the latents, and how far the modulations are apart at first.
        objective: ``"evidence"``: −log p(y_S, y_Q), the default; ``"predictive"``: −log p(y_Q | S); ``"marginal"``: the
            sum over query points of −log p(y_q | S).
        seed: of the latents; None means seed 0.

    Raises:
        UnsupportedError: for a model without a closed form, a Pyro program included.
        OptionError: for an unknown objective, or numbers out of range.
    """

    card = MethodCard(
        assumes="a network whose last Linear is φ, Gaussian prior and noise",
        posterior="exact: a mixture of K Gaussians over the last layers of K feature maps, weighted by their evidence",
        cost="adapt K factorisations of D × D and K passes of the trunk; train one gradient through it",
        source="bayesmeta",
    )

    def __init__(
        self,
        model: Any,
        *,
        num_components: int | None = None,
        noise: Noise | None = None,
        latent_size: int = 8,
        spread: float = 0.25,
        objective: Objective = "evidence",
        seed: Seed = None,
    ) -> None:
        if not isinstance(model, ConjugateModel):
            model = ConjugateModel.of(
                model,
                16 if num_components is None else num_components,
                noise="known" if noise is None else noise,
                latent_size=latent_size,
                spread=spread,
                seed=seed,
            )
        elif num_components not in (None, model.num_components) or noise not in (None, model.noise):
            raise OptionError(
                f"num_components={num_components} and noise={noise!r}, but the ConjugateModel has "
                f"{model.num_components} and {model.noise!r}; leave them out."
            )
        super().__init__(model)
        check_objective(objective)
        self.objective: Objective = objective
        self.num_components, self.noise = model.num_components, model.noise

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {"num_components": self.num_components, "noise": self.noise, "objective": self.objective}

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> ConjugatePosterior:
        assert isinstance(self.program, ConjugateModel)
        with torch.set_grad_enabled(create_graph):
            return ConjugatePosterior.condition(self.program, support)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        assert isinstance(self.program, ConjugateModel)
        return conjugate_loss(self.program, self.objective, batch)
