"""The Bayesian last layer: exact posterior over the last layer of a learned feature map.

Source: J. Harrison, A. Sharma, M. Pavone, "Meta-Learning Priors for Efficient Online Bayesian Regression", WAFR 2018
(ALPaCA), https://arxiv.org/abs/1807.08912, eqs. 7–9 and algorithm 1.

Departures: a diagonal Gaussian prior on the weights that does not scale with the noise (equivalent for one output up
to a reparameterisation, given that the features are learned); the posterior is computed in a whitened basis; the
noise scale may be learned.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.ops.gaussian import LinearGaussianFit, fit_linear_gaussian
from bayesmeta.posteriors.exact import ExactLinearPosterior


class BayesianLastLayer(Method):
    """Exact Bayesian linear regression on learned features (Harrison et al. 2018).

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` made with ``task_modules="head"``, a Gaussian prior and a
            Gaussian likelihood, on a Sequential that ends in a Linear.
        objective: ``"predictive"``: −log p(y_Q | S), all query points jointly; ``"marginal"``: the sum over query
            points of −log p(y_q | S), the paper's; ``"evidence"``: −log p(y_S, y_Q), the marginal likelihood.

    Raises:
        UnsupportedError: for a model that has no closed form; the message says what is missing.
        OptionError: for an unknown objective.
    """

    card = MethodCard(
        assumes="a network whose last Linear is φ, Gaussian prior and noise",
        posterior="exact: a full Gaussian over the last layer, with predictive and evidence in closed form",
        cost="adapt one factorisation of D × D; train one gradient through it",
        source="Harrison, Sharma, Pavone 2018",
    )

    def __init__(
        self, model: NeuralTaskModel, *, objective: Literal["predictive", "marginal", "evidence"] = "predictive"
    ) -> None:
        super().__init__(model)
        if objective not in ("predictive", "marginal", "evidence"):
            raise OptionError(f"Unknown objective {objective!r}; expected 'predictive', 'marginal' or 'evidence'.")
        if not isinstance(model, NeuralTaskModel):
            raise UnsupportedError(
                "BayesianLastLayer needs a NeuralTaskModel with task_modules='head'; a Pyro program goes into ABML, "
                "MAML or MetaSVI."
            )
        if not model.is_linear_in_phi or (model.prior.root() is None):
            raise UnsupportedError(
                "BayesianLastLayer needs outputs linear in the task parameters and a Gaussian prior on them: a "
                "Sequential that ends in a Linear, task_modules='head', prior='normal'. This model has "
                f"task_modules={model.task_modules!r} and prior {type(model.prior).__name__}."
            )
        _ = model.noise_scale  # raises for a likelihood that has no closed form
        self.objective = objective

    @property
    def model_program(self) -> NeuralTaskModel:
        """The program, as the kind it must be."""
        assert isinstance(self.program, NeuralTaskModel)
        return self.program

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {"objective": self.objective}

    # -- adapt --------------------------------------------------------------------------------------------------

    def fit_weights(self, observations: Observations) -> LinearGaussianFit:
        """Posterior of the weights and evidence of these observations, differentiable in θ."""
        program = self.model_program
        root = program.prior.root()
        assert root is not None
        assert observations.y is not None
        mask = observations.mask
        width = observations.y.shape[-1] if observations.y.dim() == 3 else 1
        if mask is not None and width > 1:
            mask = mask.repeat_interleave(width, -1)
        y = observations.y.flatten(1)
        design = program.last_layer_design(observations.x)
        return fit_linear_gaussian(design, y, program.learned_start(observations), root, program.noise_scale, mask)

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> ExactLinearPosterior:
        with torch.set_grad_enabled(create_graph):
            fit = self.fit_weights(support)
        return ExactLinearPosterior(self.program, support, *fit)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        if self.objective == "evidence":
            return -self.fit_weights(batch.union()).log_evidence
        fit = self.fit_weights(batch.support)
        if self.objective == "predictive":  # log p(y_Q | S) = log p(y_S, y_Q) − log p(y_S)
            return fit.log_evidence - self.fit_weights(batch.union()).log_evidence
        program, query = self.model_program, batch.query
        assert query.y is not None
        design = program.last_layer_design(query.x)
        mean = (design @ fit.mean.unsqueeze(-1)).squeeze(-1)
        variance = (design @ fit.root).square().sum(-1) + program.noise_scale.square()
        log_prob = torch.distributions.Normal(mean, variance.sqrt(), validate_args=False).log_prob(query.y.flatten(1))
        log_prob = log_prob.reshape(*query.x.shape[:2], -1).sum(-1)
        return -torch.where(query.full_mask(), log_prob, 0.0).sum(-1)
