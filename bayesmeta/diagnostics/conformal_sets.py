"""Sets of classes that hold the true one with at least a given probability, in finite samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.checks import check_same_tasks
from bayesmeta.diagnostics.corrections import Recalibration, weighted_quantile
from bayesmeta.diagnostics.forecasts import Predictor, check_finite
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior


@dataclass(frozen=True, eq=False)
class ConformalSets(Recalibration):
    """Sets of classes that hold the true one of a point of a new task with at least their nominal probability.

    The score of a class is the probability of all classes that are at least as probable as it (of ties both); a set
    holds the classes whose score is at most the quantile of those of the validation tasks, and always the most probable
    class. Tasks are taken to be exchangeable, and the probability is over all of them, as with :class:`Conformal`.
    Source: Y. Romano, M. Sesia, E. J. Candès, "Classification with Valid and Adaptive Coverage", NeurIPS 2020,
    https://arxiv.org/abs/2006.02544, section 2, without its randomisation, so that sets are a little larger than they
    need be; with tasks as the units as in Lee, Barber & Willett 2023, https://arxiv.org/abs/2306.06342.

    Attributes:
        scores, weights: sorted scores of the validation points, and their weights 1 / ((K + 1) n_k), ``[points]``.
        num_tasks: K.
    """

    scores: Tensor
    weights: Tensor
    num_tasks: int

    def __str__(self) -> str:
        return f"ConformalSets, from {self.num_tasks} tasks"

    def _check(self, posterior: Posterior) -> None:
        raise UnsupportedError(
            "Conformal sets of classes leave no probabilities: call sets(). For probabilities take how='temperature'."
        )

    @torch.no_grad()
    def sets(
        self,
        posterior: Posterior,
        observations: Observations,
        level: float = 0.9,
        *,
        num_samples: int = 1000,
        generator: Seed = None,
    ) -> Tensor:
        """Which classes are in the set of each input.

        Args:
            posterior: of the new tasks.
            observations: of these tasks; y is not looked at.
            level: in (0, 1); above K / (K + 1) every class is in.
            num_samples, generator: as at the validation tasks, where there is no closed form.

        Returns:
            True for the classes in the set, ``[tasks, shots, classes]``.

        Raises:
            OptionError: for a level outside (0, 1).
            UnsupportedError: for targets that are no classes, or of several outputs.
            ShapeError, NonFiniteDataError: for other tasks or inputs, and probabilities that are not finite.
        """
        if not 0.0 < level < 1.0:
            raise OptionError(f"level={level}; expected a number between 0 and 1, both excluded.")
        if posterior.target_kind != "class":
            raise UnsupportedError(f"Conformal sets are of classes; these targets are {posterior.target_kind!r}.")
        check_same_tasks(posterior, observations)
        score = _scores(Predictor(posterior, num_samples, generator), observations)
        names = [str(i) for i in range(len(score))]
        check_finite(score, observations.full_mask(), "probability of a class", names)
        least = score == score.amin(-1, keepdim=True)
        return least | (score <= weighted_quantile(self.scores, self.weights, level) + 1e-12)


def conformal_sets(predictor: Predictor, query: Observations, valid: Tensor) -> ConformalSets:
    """Learned from the classes of validation tasks.

    Args:
        predictor: of these tasks. query: with y ``[tasks, shots]``. valid: True where a point counts.
    """
    assert query.y is not None
    y = torch.where(valid, query.y, 0).long()
    score = _scores(predictor, query).gather(-1, y.unsqueeze(-1)).squeeze(-1)[valid]
    tasks = int(valid.any(-1).sum())
    weight = (valid.double() / valid.sum(-1, keepdim=True).clamp(min=1) / (tasks + 1))[valid]
    score, order = score.sort()
    return ConformalSets(score, weight[order], tasks)


def _scores(predictor: Predictor, observations: Observations) -> Tensor:
    """Of each class the probability of all that are at least as probable, ``[tasks, shots, classes]``."""
    p = predictor.class_forecast(observations).probabilities
    if p.dim() != 3:
        raise UnsupportedError("Classes of several outputs have no conformal sets; take each output alone.")
    ordered, place = p.sort(-1, descending=True)
    total = ordered.cumsum(-1)
    # of equal probabilities each has the sum up to the last of them
    last = torch.searchsorted(-ordered.contiguous(), -ordered.contiguous(), right=True) - 1
    return torch.empty_like(p).scatter(-1, place, total.gather(-1, last))
