"""MAML: a point estimate of φ by a few gradient steps from a meta-learned start.

Source: C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017,
https://arxiv.org/abs/1703.03400, eq. 1 (inner step) and algorithm 1. As hierarchical Bayes: E. Grant, C. Finn,
S. Levine, J. Darrell, T. Griffiths, "Recasting Gradient-Based Meta-Learning as Hierarchical Bayes", ICLR 2018,
https://arxiv.org/abs/1801.08930. Losses at every inner step: A. Antoniou, H. Edwards, A. Storkey, "How to train your
MAML", ICLR 2019, https://arxiv.org/abs/1810.09502, section 4, eq. 6.

Departures: the inner objective is the mean log-likelihood of the support's real observations (so that rates do not
depend on the shots), and optionally the joint with the prior; the outer loss is the negative log-likelihood of the
query summed over its points. With a Gaussian likelihood of scale 1/√2 both are the paper's squared errors up to a
constant. On a user's program φ lives in unconstrained space. The weights of a multi-step loss are fixed, where
MAML++ moves them from uniform to the last step during training.
"""

from __future__ import annotations

from typing import Any

from bayesmeta.adapt.base import MethodCard
from bayesmeta.adapt.gradient import GradientMethod, Objective, StepWeights
from bayesmeta.adapt.meta_regularization import MetaRegularization
from bayesmeta.models.theta import GlobalKind


class MAML(GradientMethod):
    """Model-agnostic meta-learning (Finn et al. 2017): Delta posterior at ``inner_steps`` gradient steps.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, or any Pyro program. A network starts from the centre of its
            prior; a program from an unconstrained point that this method learns, first set to the prior's mean.
        inner_steps: gradient steps on the support.
        inner_lr: step size, for an objective that is a mean over the support's observations.
        objective: what an inner step climbs: ``"likelihood"``, or ``"joint"``: likelihood times prior, in
            unconstrained space with its Jacobian, divided by the number of observations. The likelihood alone never
            evaluates the prior, so that parameters which only the prior uses are not trained.
        first_order: drop the second derivatives (FOMAML).
        step_weights: what the loss looks at: ``"last"``: the query after the last inner step; ``"uniform"``: the mean
            of its losses after each inner step (multi-step training, as MAML++: then more steps than were trained
            do not diverge); or one weight for each step, which are divided by their sum.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.
        meta_regularization: noise and a penalty on the embedding of an :class:`~bayesmeta.EmbeddedModel` (MR-MAML), see
            :class:`~bayesmeta.MetaRegularization`.

    Raises:
        OptionError: for an unknown objective, negative steps or rate, or weights that do not fit.
        UnsupportedError: for meta-regularisation of a model without an embedding.
    """

    card = MethodCard(
        assumes="any model; a start point is enough",
        posterior="a point: K gradient steps from a learned start",
        cost="adapt K gradients; train 2–3 × that (second order)",
        source="Finn, Abbeel, Levine 2017",
    )

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int = 1,
        inner_lr: float = 0.01,
        objective: Objective = "likelihood",
        first_order: bool = False,
        step_weights: StepWeights = "last",
        global_guide: GlobalKind = "point",
        meta_regularization: MetaRegularization | None = None,
    ) -> None:
        super().__init__(
            model,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            objective=objective,
            first_order=first_order,
            step_weights=step_weights,
            global_guide=global_guide,
        )
        self._regularize(meta_regularization)

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return super().config() | self._regularization_config()
