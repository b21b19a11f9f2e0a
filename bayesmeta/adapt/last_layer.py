"""The Bayesian last layer: exact posterior over the last layer of a learned feature map.

Source: J. Harrison, A. Sharma, M. Pavone, "Meta-Learning Priors for Efficient Online Bayesian Regression", WAFR 2018
(ALPaCA), https://arxiv.org/abs/1807.08912, eqs. 7–9 and algorithm 1.

Departures: a diagonal Gaussian prior on the weights that does not scale with the noise (equivalent for one output up
to a reparameterisation, given that the features are learned); the posterior is computed in a whitened basis; the
noise scale may be learned, or be unknown for each task under an inverse-gamma prior, one for each output. With an
inverse-Wishart prior of the noise's covariance the weights are the paper's matrix normal, scaled by that covariance
(eq. 7), which the paper takes as known; its prior between features is diagonal here. Observations one at a time (the
paper's recursive updates, algorithm 2) are added by ``posterior.update``, in covariance rather than information form.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.adapt.base import Method, MethodCard
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.models.conjugate import ConjugateModel, Noise
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.ops.gaussian import LinearGaussianFit, fit_linear_gaussian, linear_gaussian_log_prob
from bayesmeta.posteriors.conjugate import ConjugatePosterior
from bayesmeta.posteriors.exact import ExactLinearPosterior

Objective = Literal["predictive", "marginal", "evidence"]


def check_objective(objective: str) -> None:
    """Check the name of an objective.

    Raises:
        OptionError: for an unknown one.
    """
    if objective not in get_args(Objective):
        raise OptionError(f"Unknown objective {objective!r}; expected 'predictive', 'marginal' or 'evidence'.")


def conjugate_loss(program: ConjugateModel, objective: Objective, batch: TaskBatch) -> Tensor:
    """Loss of each task, ``[tasks]``: see :class:`BayesianLastLayer`."""
    if objective == "evidence":
        return -ConjugatePosterior.condition(program, batch.union()).log_evidence
    posterior = ConjugatePosterior.condition(program, batch.support)
    if objective == "predictive":  # log p(y_Q | S) = log p(y_S, y_Q) − log p(y_S)
        return posterior.log_evidence - ConjugatePosterior.condition(program, batch.union()).log_evidence
    query = batch.query
    return -torch.where(query.full_mask(), posterior.mixture(query).log_prob(query.y), 0.0).sum(-1)


class BayesianLastLayer(Method):
    """Exact Bayesian linear regression on learned features (Harrison et al. 2018).

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` made with ``task_modules="head"``, a Gaussian prior and a
            Gaussian likelihood (one scale, or one for each output), on a Sequential that ends in a Linear. With unknown
            noise it is turned into a :class:`~bayesmeta.ConjugateModel` of one component, which is also taken as it is.
        objective: ``"predictive"``: −log p(y_Q | S), all query points jointly; ``"marginal"``: the sum over query
            points of −log p(y_q | S), the paper's; ``"evidence"``: −log p(y_S, y_Q), the marginal likelihood.
        noise: ``"known"``: its scale is θ. ``"inverse_gamma"``: each task's variance of each output has a prior and is
            inferred with the weights, whose prior scales with it; predictions are Student-t. ``"inverse_wishart"``:
            likewise the covariance between several outputs, and the weights are matrix normal.

    Raises:
        UnsupportedError: for a model that has no closed form; the message says what is missing.
        OptionError: for an unknown objective or noise, or an inverse-Wishart for one output.
    """

    card = MethodCard(
        assumes="a network whose last Linear is φ, Gaussian prior and noise",
        posterior="exact: a full Gaussian over the last layer, with predictive and evidence in closed form",
        cost="adapt one factorisation of D × D; train one gradient through it",
        source="Harrison, Sharma, Pavone 2018",
    )

    def __init__(
        self,
        model: NeuralTaskModel | ConjugateModel,
        *,
        objective: Objective = "predictive",
        noise: Noise | None = None,
    ) -> None:
        if noise not in (None, *get_args(Noise)):
            raise OptionError(f"Unknown noise {noise!r}; expected one of {', '.join(map(repr, get_args(Noise)))}.")
        if isinstance(model, NeuralTaskModel):
            _check_closed_form(model)
            if noise not in (None, "known"):
                model = ConjugateModel.of(model, noise=noise)
        super().__init__(model)
        check_objective(objective)
        if isinstance(model, ConjugateModel):
            if model.num_components > 1:
                raise UnsupportedError(
                    f"This ConjugateModel has {model.num_components} components; it goes into BayesianLastLayerMixture."
                )
            if noise not in (None, model.noise):
                raise OptionError(f"noise={noise!r}, but the ConjugateModel has {model.noise!r}; leave it out.")
        elif not isinstance(model, NeuralTaskModel):
            raise UnsupportedError(
                "BayesianLastLayer needs a NeuralTaskModel with task_modules='head'; a Pyro program goes into ABML, "
                "MAML or MetaSVI."
            )
        self.objective: Objective = objective
        self.noise: Noise = "known" if noise is None else noise
        if isinstance(model, ConjugateModel):
            self.noise = model.noise

    @property
    def model_program(self) -> NeuralTaskModel:
        """The program, as the kind it must be where the noise is known."""
        assert isinstance(self.program, NeuralTaskModel)
        return self.program

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {"objective": self.objective} | ({} if self.noise == "known" else {"noise": self.noise})

    # -- adapt --------------------------------------------------------------------------------------------------

    def fit_weights(self, observations: Observations) -> LinearGaussianFit:
        """Posterior of the weights and evidence of these observations, differentiable in θ."""
        return fit_linear_gaussian(*self._regression(observations))

    def _log_prob(self, observations: Observations, given: int = 0) -> Tensor:
        """log p of these observations but for the first shots, given those, ``[tasks]``."""
        design, y, mean, root, noise, mask = self._regression(observations)
        given *= design.shape[-2] // max(observations.shots, 1)  # rows
        if _has_few_rows(design):
            prior = self.model_program.prior
            moments = prior.moments(observations.w) if prior.is_diagonal_gaussian else None
            root = root if moments is None else moments[1]
            return linear_gaussian_log_prob(design, y, mean, root, noise, mask, given=given)
        both = fit_linear_gaussian(design, y, mean, root, noise, mask).log_evidence
        if given == 0:
            return both
        first = (design[..., :given, :], y[..., :given], mean, root, noise[:given] if noise.dim() else noise)
        return both - fit_linear_gaussian(*first, None if mask is None else mask[..., :given]).log_evidence

    def _regression(self, observations: Observations) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Arguments of :func:`~bayesmeta.ops.gaussian.fit_linear_gaussian`, a row for each output of each shot."""
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
        noise = program.noise_rows(observations.shots)
        return design, y, program.learned_start(observations), root, noise, mask

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> ExactLinearPosterior | ConjugatePosterior:
        with torch.set_grad_enabled(create_graph):
            if isinstance(self.program, ConjugateModel):
                return ConjugatePosterior.condition(self.program, support)
            fit = self.fit_weights(support)
        return ExactLinearPosterior(self.program, support, *fit)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        if isinstance(self.program, ConjugateModel):
            return conjugate_loss(self.program, self.objective, batch)
        if self.objective == "evidence":
            return -self._log_prob(batch.union())
        if self.objective == "predictive":  # log p(y_Q | S) = log p(y_S, y_Q) − log p(y_S)
            return -self._log_prob(batch.union(), batch.support.shots)
        fit = self.fit_weights(batch.support)
        program, query = self.model_program, batch.query
        assert query.y is not None
        design = program.last_layer_design(query.x)
        mean = (design @ fit.mean.unsqueeze(-1)).squeeze(-1)
        variance = (design @ fit.root).square().sum(-1) + program.noise_rows(query.shots).square()
        log_prob = torch.distributions.Normal(mean, variance.sqrt(), validate_args=False).log_prob(query.y.flatten(1))
        log_prob = log_prob.reshape(*query.x.shape[:2], -1).sum(-1)
        return -torch.where(query.full_mask(), log_prob, 0.0).sum(-1)


def _has_few_rows(design: Tensor) -> bool:
    """Whether N × N is not larger than D × D."""
    return design.shape[-2] <= design.shape[-1]


def _check_closed_form(model: NeuralTaskModel) -> None:
    if not model.is_linear_in_phi or (model.prior.root() is None):
        raise UnsupportedError(
            "BayesianLastLayer needs outputs linear in the task parameters and a Gaussian prior on them: a "
            "Sequential that ends in a Linear, task_modules='head', prior='normal'. This model has "
            f"task_modules={model.task_modules!r} and prior {type(model.prior).__name__}."
        )
    _ = model.noise_scale  # raises for a likelihood that has no closed form
