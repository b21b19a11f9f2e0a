"""Likelihoods of classes and labels."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.models.likelihoods.base import Independent, Likelihood, as_event, as_targets, sum_event


class Bernoulli(Independent):
    """Targets 0 or 1; the output is the log-odds of a 1. With several outputs, a label for each."""

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Bernoulli with these log-odds."""
        return as_event(dist.Bernoulli(logits=as_targets(output)), output.shape[-1])

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The log-probability of y."""
        return sum_event(logsigmoid((2 * y - 1) * as_targets(output)), output.shape[-1])


class Categorical(Likelihood):
    """Targets are classes 0, …, num_classes − 1, as whole numbers (float or integer) ``[tasks, shots]``.

    The network's outputs are the classes' logits.

    Padding may hold any number (−1, say) where methods adapt and score. Pyro's own inference on ``method.model``
    validates padding too: there it must be a class, as :func:`~bayesmeta.collate` makes it.

    Args:
        num_classes: how many classes.

    Raises:
        OptionError: for fewer than 2 classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise OptionError(f"A Categorical likelihood needs num_classes of at least 2; got {num_classes!r}.")
        self.num_classes = num_classes

    def extra_repr(self) -> str:
        """The number of classes, shown when the likelihood is printed."""
        return f"num_classes={self.num_classes}"

    def num_outputs(self, targets: int) -> int:
        """One for each class."""
        if targets != 1:
            raise ShapeError(
                f"A Categorical likelihood has one target, the class, so that y is [tasks, shots]; got {targets} "
                "outputs. One-hot targets become classes by y.argmax(-1)."
            )
        return self.num_classes

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Categorical with these logits."""
        checked = None if output.numel() else False  # torch cannot validate logits of no observation
        return dist.Categorical(logits=output, validate_args=checked)

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """The log-probability of class y; −∞ for what is no class, such as −1 in padding."""
        index = y.long().clamp(0, self.num_classes - 1)
        each = output.log_softmax(-1).gather(-1, index.expand(output.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return torch.where(y == index, each, -math.inf)
