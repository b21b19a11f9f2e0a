"""Priors p(φ | θ) over the flat weights of a network. Their parameters are θ."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from bayesmeta.errors import ModelError, OptionError

_NO_SHAPE = torch.Size()


class FlatAt(TorchDistribution):
    """An improper flat density on R^D whose draws are all ``loc``: the prior of a point estimate.

    Its log-probability is 0 everywhere, so that the joint is the likelihood.

    Args:
        loc: ``[…, D]``.
    """

    support = constraints.real_vector
    arg_constraints = {"loc": constraints.real_vector}
    has_rsample = True

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Copies of ``loc``."""
        return self.loc.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero, in the shape of the batch."""
        return value.new_zeros(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlatAt:
        """The same with another batch shape."""
        return FlatAt(self.loc.expand(*batch_shape, -1), validate_args=False)


class Prior(nn.Module):
    """Base of priors over weights: made without knowing the network, given its first weights by the model."""

    loc: Tensor

    def set_up(self, initial: Tensor) -> None:
        """Create the parameters, centred on the network's first weights, ``[D]``.

        Raises:
            ModelError: when the prior already belongs to a model.
        """
        if "loc" in self._parameters:
            raise ModelError("This prior already belongs to a model; give each model a prior of its own.")
        self.loc = nn.Parameter(initial.detach().clone())

    def distribution(self) -> Any:
        """p(φ | θ), event shape ``[D]``."""
        raise NotImplementedError

    def mean_and_scale(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation ``[D]`` where the prior is a diagonal Gaussian, else None."""
        return None


class Point(Prior):
    """No density: φ starts at θ. What MAML assumes."""

    def distribution(self) -> FlatAt:
        """The improper flat density at the start point."""
        return FlatAt(self.loc)


class Normal(Prior):
    """Diagonal Gaussian; θ is its mean (from the network's first weights) and its log standard deviations.

    Args:
        scale: first standard deviation of every weight.
        learn_scale: whether the standard deviations are trained.

    Raises:
        OptionError: for a scale that is not positive.
    """

    def __init__(self, scale: float = 0.1, *, learn_scale: bool = True) -> None:
        super().__init__()
        if not scale > 0:
            raise OptionError(f"The scale of a Normal prior must be positive; got {scale}.")
        self.initial_scale = scale
        self.learn_scale = learn_scale

    def set_up(self, initial: Tensor) -> None:
        """Create mean and log standard deviations, each ``[D]``."""
        super().set_up(initial)
        log_scale = torch.full_like(initial, self.initial_scale).log()
        if self.learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def distribution(self) -> Any:
        """Independent Normals as one event."""
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each ``[D]``."""
        return self.loc, self.log_scale.exp()


PRIORS: dict[str, type[Prior]] = {"point": Point, "normal": Normal}


def as_prior(prior: Prior | str) -> Prior:
    """A prior, or the default one of that name (``point``, ``normal``).

    Raises:
        OptionError: for an unknown name.
    """
    if isinstance(prior, Prior):
        return prior
    if prior not in PRIORS:
        raise OptionError(
            f"Unknown prior {prior!r}; expected one of {', '.join(PRIORS)}, or a bayesmeta.priors object."
        )
    return PRIORS[prior]()
