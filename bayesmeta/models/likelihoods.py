"""Likelihoods p(y | network output). Their parameters, where learned, are θ."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError


class Likelihood(nn.Module):
    """Base of likelihoods.

    An output of width 1 goes with targets ``[tasks, shots]``; a wider one with ``[tasks, shots, outputs]``.
    """

    def distribution(self, output: Tensor) -> Any:
        """Distribution of y with batch shape ``[…, tasks, shots]`` from outputs ``[…, tasks, shots, width]``."""
        raise NotImplementedError

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """log p(y | output), ``[…, tasks, shots]``."""
        return self.distribution(output).log_prob(y)


class Gaussian(Likelihood):
    """Independent Gaussian noise of one scale for each output.

    Args:
        scale: standard deviation of the noise, in the units of y; the first value when it is learned.
        learn_scale: whether it is trained (as its logarithm, one for all outputs).

    Raises:
        OptionError: for a scale that is not positive.
    """

    def __init__(self, scale: float = 1.0, *, learn_scale: bool = False) -> None:
        super().__init__()
        if not scale > 0:
            raise OptionError(f"The scale of a Gaussian likelihood must be positive; got {scale}.")
        self.learn_scale = learn_scale
        log_scale = torch.tensor(math.log(scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def extra_repr(self) -> str:
        """The scale, shown when the likelihood is printed."""
        return f"scale={self.scale.item():.4g}, learn_scale={self.learn_scale}"

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise, a scalar tensor."""
        return self.log_scale.exp()

    def distribution(self, output: Tensor) -> Any:
        """Normal around the output."""
        if output.shape[-1] == 1:
            return dist.Normal(output.squeeze(-1), self.scale)
        return dist.Normal(output, self.scale).to_event(1)

    def log_prob(self, output: Tensor, y: Tensor) -> Tensor:
        """The Gaussian log-density, without the overhead of a distribution object."""
        single = output.shape[-1] == 1
        residual = (output.squeeze(-1) if single else output) - y
        width = 1 if single else output.shape[-1]
        square = residual.square() if single else residual.square().sum(-1)
        constant = width * (self.log_scale + 0.5 * math.log(2 * math.pi))
        return square * (-0.5 * (-2.0 * self.log_scale).exp()) - constant
