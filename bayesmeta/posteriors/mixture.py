"""A mixture of distributions along their leftmost batch dimension, where particles and components stand."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

_NO_SHAPE = torch.Size()


class LeftMixture(TorchDistribution):
    """Σ_k w_k p_k, the components along the leftmost batch dimension.

    Unlike ``MixtureSameFamily``, whose components stand rightmost, it takes what broadcasting over particles makes.

    Args:
        logits: log weights up to a constant, ``[K, …]``, to be broadcast to the components' batch shape.
        components: batch shape ``[K, …]``.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, logits: Tensor, components: Any) -> None:
        self.components = components
        self.log_weights = logits.log_softmax(0).expand(components.batch_shape)
        super().__init__(components.batch_shape[1:], components.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the components."""
        return self.components.support

    def _weights(self) -> Tensor:
        weights = self.log_weights.exp()
        return weights.reshape(*weights.shape, *([1] * len(self.event_shape)))

    def _split(self, value: Tensor) -> tuple[Tensor, int]:
        """The value with a dimension for the components after those of its sample shape, and where that stands."""
        dim = max(value.dim() - len(self.event_shape) - len(self.batch_shape), 0)
        return value.unsqueeze(dim) if dim else value, dim

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the mixture, ``[…]``."""
        value, dim = self._split(value)
        return (self.log_weights + self.components.log_prob(value)).logsumexp(dim)

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture."""
        return (self._weights() * self.components.mean).sum(0)

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture: within the components and between them."""
        second = self.components.variance + (self.components.mean - self.mean).square()
        return (self._weights() * second).sum(0)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function of the mixture."""
        value, dim = self._split(value)
        return (self.log_weights.exp() * self.components.cdf(value)).sum(dim)

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Draws from torch's global generator; each batch element chooses its component."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            values = self.components.sample(shape)
            probabilities = self.log_weights.exp().movedim(0, -1)
            index = torch.distributions.Categorical(probs=probabilities, validate_args=False).sample(shape)
            dim = len(shape)
            index = index.unsqueeze(dim)
            index = index.reshape(*index.shape, *([1] * len(self.event_shape)))
            index = index.expand(*shape, 1, *values.shape[dim + 1 :])
            return values.gather(dim, index).squeeze(dim)
