"""What kind of targets a likelihood describes: real numbers, counts or classes; and the probabilities of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, UnsupportedError
from bayesmeta.protocols import TargetKind

if TYPE_CHECKING:
    from bayesmeta.models.likelihoods import Likelihood

_WRAPPERS = (torch.distributions.Independent, MaskedDistribution, ExpandedDistribution)


def target_kind(distribution: Any) -> TargetKind:
    """Read the kind of target off a likelihood's distribution.

    Categorical and Bernoulli (and what derives from them) describe classes, other discrete distributions counts, the
    rest real numbers. Independent outputs and masks do not matter.

    Raises:
        UnsupportedError: for one-hot targets.
    """
    base = _base(distribution)
    if isinstance(base, torch.distributions.Categorical | torch.distributions.Bernoulli):
        return "class"
    if isinstance(base, torch.distributions.OneHotCategorical):
        raise UnsupportedError(
            "The likelihood has one-hot targets; diagnostics know classes by their index. Use a Categorical "
            "distribution and y.argmax(-1)."
        )
    return "count" if base.support.is_discrete else "real"


def class_probabilities(distribution: Any) -> Tensor:
    """Probability of each class, ``[…, tasks, shots, classes]``; several outputs stand before the classes.

    Args:
        distribution: a Categorical or Bernoulli, or independent ones; a Bernoulli has the classes 0 and 1.

    Raises:
        UnsupportedError: for a distribution of another kind.
    """
    base = _base(distribution)
    if isinstance(base, torch.distributions.Categorical):
        return base.probs.expand(*distribution.shape(), -1)
    if isinstance(base, torch.distributions.Bernoulli):
        # both from the logits: 1 − p loses a probability below the dtype's rounding
        both = torch.stack([torch.sigmoid(-base.logits), torch.sigmoid(base.logits)], -1)
        return both.expand(*distribution.shape(), 2)
    raise UnsupportedError(
        f"Class probabilities need a Categorical or Bernoulli likelihood; this one is {type(base).__name__}. Use "
        "predict or predictive."
    )


def _base(distribution: Any) -> Any:
    """The distribution inside event dimensions, masks and expansions, which leave the targets as they are."""
    while isinstance(distribution, _WRAPPERS):
        distribution = distribution.base_dist
    return distribution


def check_exposure(likelihood: Likelihood, observations: Observations) -> None:
    """Check that the exposure is positive, where the likelihood has one.

    Raises:
        DataError: naming the first task and shot where it is not.
    """
    exposure = likelihood.split(observations.x)[1].get("exposure")
    if exposure is None:
        return
    bad = (~((exposure > 0) & exposure.isfinite()) & observations.full_mask()).nonzero()
    if len(bad):
        task, shot = bad[0].tolist()
        raise DataError(
            f"The exposure (column {likelihood.exposure} of x) is {exposure[task, shot].item():.4g} at task {task}, "
            f"shot {shot} (counted from 0); an exposure is positive, in raw units. Do not standardise that column, and "
            "drop rows without exposure."
        )
