"""CAVIA: gradient steps on a context vector, with a network that all tasks share.

Source: L. Zintgraf, K. Shiarlis, V. Kurin, K. Hofmann, S. Whiteson, "Fast Context Adaptation via Meta-Learning", ICML
2019, https://arxiv.org/abs/1810.03642, eqs. 3–4 and algorithm 1.

    φ_0 = 0
    φ_{k+1} = φ_k + α ∇_φ (1/n) log p(S | f([x, φ]))

Departures: those of MAML. The context is appended to the network's inputs, as in the paper's regression; its
modulation of convolutions (FiLM) is not here.
"""

from __future__ import annotations

from typing import Any

from bayesmeta.adapt.base import MethodCard
from bayesmeta.adapt.gradient import GradientMethod, Objective, StepWeights
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.models.context import ContextTaskModel
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.random import Seed


class CAVIA(GradientMethod):
    """Context adaptation (Zintgraf et al. 2019): φ is a context of a few numbers that starts at 0.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, whose network gets ``context_size`` more inputs and becomes shared
            (its prior is not used: see :meth:`~bayesmeta.ContextTaskModel.widen`); or a
            :class:`~bayesmeta.ContextTaskModel`, which is taken as it is.
        context_size: length of the context; with 0 this is the multi-task baseline. Of a ContextTaskModel: its own.
        inner_steps: gradient steps on the support.
        inner_lr: step size, for an objective that is a mean over the support's observations. It need not be small:
            the network learns to make use of it.
        seed: of the weights that the context meets first; None means seed 0.
        objective, first_order, step_weights, global_guide: as in :class:`~bayesmeta.MAML`. The joint has a standard
            normal prior on the context.

    Raises:
        UnsupportedError: for a Pyro program, or a network that does not begin with a Linear.
        OptionError: for a context size below 0, or another than that of a ContextTaskModel, and as in MAML.
    """

    card = MethodCard(
        assumes="a network that begins with a Linear",
        posterior="a point: K gradient steps on a context vector from 0",
        cost="as MAML in time; φ has a few numbers, so that memory for φ is small",
        source="Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019",
    )

    def __init__(
        self,
        model: Any,
        *,
        context_size: int | None = None,
        inner_steps: int = 1,
        inner_lr: float = 1.0,
        seed: Seed = None,
        objective: Objective = "likelihood",
        first_order: bool = False,
        step_weights: StepWeights = "last",
        global_guide: GlobalKind = "point",
    ) -> None:
        if isinstance(model, NeuralTaskModel):
            model = ContextTaskModel.widen(model, 4 if context_size is None else context_size, seed=seed)
        elif not isinstance(model, ContextTaskModel):
            raise UnsupportedError(
                f"CAVIA appends a context to the inputs of a network; got {type(model).__name__}. A Pyro program that "
                "samples a context inside the task plate goes into MAML or ABML."
            )
        elif context_size not in (None, model.context_size):
            raise OptionError(
                f"context_size={context_size}, but the ContextTaskModel has {model.context_size}; leave it out."
            )
        super().__init__(
            model,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            objective=objective,
            first_order=first_order,
            step_weights=step_weights,
            global_guide=global_guide,
        )
        self.context_size = model.context_size

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return super().config() | {"context_size": self.context_size}
