"""Multi-task learning without adaptation: φ = θ for every task, the baseline that meta-learning must beat.

Source: R. Caruana, "Multitask Learning", Machine Learning 28, 1997, https://doi.org/10.1023/A:1007379606734: one model
for all tasks. It is MAML with no inner step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesmeta.adapt.base import MethodCard
from bayesmeta.adapt.gradient import PointMethod
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.models.theta import GlobalKind
from bayesmeta.posteriors.delta import DeltaPosterior


class MultiTask(PointMethod):
    """The multi-task baseline: one φ = θ for all tasks; ``adapt`` gives it back whatever the support says.

    Trained on −log p(Q | θ): the same queries on which adapting methods are judged. The supports are other
    observations of the same tasks, so that over many batches all data are seen.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, or any Pyro program.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.
    """

    card = MethodCard(
        assumes="any model",
        posterior="a point, the same for every task: no adaptation",
        cost="adapt nothing; train one gradient",
        source="Caruana 1997",
    )

    def __init__(self, model: Any, *, global_guide: GlobalKind = "point") -> None:
        super().__init__(model, global_guide=global_guide)

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {"global_guide": self.global_kind}

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> DeltaPosterior:
        return self._delta(self._start_for(support, theta, create_graph), support, theta, create_graph)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        return self._query_loss(self._start_for(batch.support, theta, create_graph=True), batch, theta)
