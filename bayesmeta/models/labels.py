"""Class labels as regression targets ±1, and class probabilities from Gaussian functions of them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, one_hot

from bayesmeta.errors import OptionError
from bayesmeta.models.likelihoods import Bernoulli, Categorical, Likelihood
from bayesmeta.ops.probit import log_probability_largest

#: From functions of ±1 targets to class probabilities, see :func:`outputs`.
Link = Literal["probit", "sigmoid"]


def is_of_labels(likelihood: Likelihood) -> bool:
    """Whether a likelihood's targets are labels that can be regressed on; a subclass may mean something else."""
    return type(likelihood) in (Bernoulli, Categorical)


def num_columns(likelihood: Likelihood) -> int:
    """How many ±1 targets an observation has: one for each class (one against the rest), one for a Bernoulli."""
    return likelihood.num_classes if isinstance(likelihood, Categorical) else 1


def label_support(likelihood: Likelihood) -> Any:
    """Which labels there are."""
    if isinstance(likelihood, Categorical):
        return constraints.integer_interval(0, likelihood.num_classes - 1)
    return constraints.boolean


def to_targets(likelihood: Likelihood, y: Tensor, keep: Tensor) -> Tensor:
    """Labels ``[tasks, shots]`` as ±1, float64 ``[tasks, shots, columns]``: 1 for the class itself, −1 for the others.

    Args:
        likelihood: Categorical, or Bernoulli (whose one column is of the label 1).
        y: labels, of which those that are not kept may be anything.
        keep: ``[tasks, shots]``.
    """
    label = y.masked_fill(~keep, 0).long()
    hit = one_hot(label, likelihood.num_classes) if isinstance(likelihood, Categorical) else label.unsqueeze(-1)
    return 2.0 * hit.double() - 1.0


def to_labels(likelihood: Likelihood, targets: Tensor) -> Tensor:
    """The labels of noisy targets ``[…, columns]``: the class of the largest; for a Bernoulli, whether it is positive.

    Returns:
        ``[…]``, integers; for a Bernoulli 0 and 1 in the targets' dtype (as each likelihood draws them).
    """
    if isinstance(likelihood, Categorical):
        return targets.argmax(-1)
    return (targets.squeeze(-1) > 0).to(targets.dtype)


def outputs(likelihood: Likelihood, mean: Tensor, variance: Tensor, link: Link) -> Tensor:
    """What makes the likelihood's class probabilities those of the link: logits or, for a Bernoulli, log-odds.

    ``"probit"``: the label is that of noisy targets z_k ~ N(mean_k, variance), independent: p_k = P(z_k is the
    largest); for a Bernoulli P(z > 0) = Φ(mean / √variance).

    ``"sigmoid"``: p_k = σ(mean_k) / Σ_j σ(mean_j); for a Bernoulli σ(mean). The variance does not count.

    Both rank the classes as their means do.

    Args:
        likelihood: Categorical or Bernoulli.
        mean: ``[…, columns]``, float64.
        variance: of the noisy targets, one for all classes, broadcastable to ``[…]``.
        link: which.

    Returns:
        Of mean's shape.
    """
    several = isinstance(likelihood, Categorical)
    if link == "sigmoid":  # normalised by the Categorical
        return logsigmoid(mean) if several else mean
    z = mean / variance.sqrt().unsqueeze(-1)
    if several:
        return log_probability_largest(z)
    return torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)


def log_label_probability(likelihood: Likelihood, mean: Tensor, variance: Tensor, link: Link, y: Tensor) -> Tensor:
    """log-probability of labels y ``[tasks, shots]``, ``[…, tasks, shots]``; the rest as in :func:`outputs`."""
    if link == "probit" and isinstance(likelihood, Categorical):  # of the other classes none is needed
        return log_probability_largest(mean / variance.sqrt().unsqueeze(-1), y)
    return likelihood.log_prob(outputs(likelihood, mean, variance, link), y)


def balanced_mean(likelihood: Likelihood) -> float:
    """Mean of the ±1 targets where all classes are equally frequent."""
    return 2.0 / max(num_columns(likelihood), 2) - 1.0


def choose_link(likelihood: Likelihood, link: Any, noise: float | None, learn_noise: bool | None) -> Link | None:
    """The link of labels, by default probit; None for real numbers.

    Raises:
        OptionError: for an unknown link, or options of labels for real numbers.
    """
    if is_of_labels(likelihood):
        if link not in (None, *get_args(Link)):
            raise OptionError(f"Unknown link {link!r}; expected one of {', '.join(map(repr, get_args(Link)))}.")
        return "probit" if link is None else link
    given = {"link": link, "noise": noise, "learn_noise": learn_noise}
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise OptionError(
            f"{', '.join(names)}: for a Categorical or Bernoulli likelihood; with a Gaussian one leave that out, its "
            "own scale is the noise."
        )
    return None
