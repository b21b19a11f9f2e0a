"""Conditional normalising flows, from Pyro's transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions import transforms
from pyro.nn import ConditionalAutoRegressiveNN, DenseNN
from torch import Tensor, nn

from bayesmeta.errors import OptionError

#: Pyro adds this to the derivatives of a spline at its knots
_LEAST_SLOPE = 1e-3


class ConditionalFlow(nn.Module):
    """An invertible map of R^D for each context, the identity at first.

    Each block is an affine autoregressive map, for dependence between dimensions (D ≥ 2), then a monotonic rational
    spline of each dimension, for its shape; the order of the dimensions alternates. Drawing is one pass; the density of
    a value from elsewhere inverts the autoregressive map, D passes.

    Source: D. Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016,
    https://arxiv.org/abs/1606.04934, section 3; H. Dolatabadi, S. Erfani, C. Leckie, "Invertible Generative Modeling
    using Linear Rational Splines", AISTATS 2020, https://arxiv.org/abs/2001.05168; both as Pyro has them.

    Args:
        size: D.
        context: width of the context.
        blocks: number of blocks.
        bins: of each spline, which lies on [−``bound``, ``bound``] and is the identity outside.
        hidden: width of the hidden layer of the networks that read the context.
        bound: see ``bins``.

    Raises:
        OptionError: for sizes below 1.
    """

    def __init__(
        self, size: int, context: int, *, blocks: int = 2, bins: int = 8, hidden: int = 64, bound: float = 4.0
    ) -> None:
        super().__init__()
        if min(size, context, blocks, bins, hidden) < 1 or not bound > 0:
            raise OptionError(
                "The sizes of a flow must be at least 1 and its bound positive; got "
                f"size={size}, context={context}, blocks={blocks}, bins={bins}, hidden={hidden}, bound={bound}."
            )
        self.size, self.context = size, context
        self.blocks, self.bins, self.hidden, self.bound = blocks, bins, hidden, bound
        layers: list[nn.Module] = []
        for block in range(blocks):
            if size > 1:
                layers.append(self._autoregressive(torch.arange(size).flip(0) if block % 2 else torch.arange(size)))
            layers.append(self._spline())
        self.layers = nn.ModuleList(layers)

    def _autoregressive(self, order: Tensor) -> nn.Module:
        network = ConditionalAutoRegressiveNN(
            self.size, self.context, [max(self.hidden, self.size)], permutation=order, nonlinearity=nn.Tanh()
        )
        _zero(network.layers[-1])
        if network.skip_layer is not None:
            _zero(network.skip_layer)
        return transforms.ConditionalAffineAutoregressive(network)

    def _spline(self) -> nn.Module:
        size, bins = self.size, self.bins
        widths = [size * bins, size * bins, size * (bins - 1), size * bins]
        network = DenseNN(self.context, [self.hidden], widths, nonlinearity=nn.Tanh())
        last = network.layers[-1]
        _zero(last)
        slopes = slice(2 * size * bins, 2 * size * bins + size * (bins - 1))
        last.bias.data[slopes] = math.log(math.expm1(1.0 - _LEAST_SLOPE))  # softplus of it, and the rest, is slope 1
        return transforms.ConditionalSpline(network, size, bins, bound=self.bound)

    def config(self) -> Sequence[float]:
        """The options, from which :meth:`from_config` makes a flow of the same shape."""
        return self.size, self.context, self.blocks, self.bins, self.hidden, self.bound

    @classmethod
    def from_config(cls, config: Sequence[float]) -> ConditionalFlow:
        """A flow of that shape."""
        size, context, blocks, bins, hidden = (int(n) for n in config[:5])
        return cls(size, context, blocks=blocks, bins=bins, hidden=hidden, bound=float(config[5]))

    def forward(self, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[…, D]`` forward.

        Args:
            noise: ``[…, D]``.
            context: broadcastable to ``[…, context]``.

        Returns:
            The value ``[…, D]``, and log |det ∂ value / ∂ noise|, ``[…]``.
        """
        return self._run(noise, context, inverse=False)

    def inverse(self, value: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The noise ``[…, D]`` of a value, and log |det ∂ value / ∂ noise|, ``[…]``."""
        return self._run(value, context, inverse=True)

    def _run(self, z: Tensor, context: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        z = z.expand(*torch.broadcast_shapes(z.shape[:-1], context.shape[:-1]), z.shape[-1])
        context = context.expand(*z.shape[:-1], -1)
        total = z.new_zeros(z.shape[:-1])
        for layer in reversed(self.layers) if inverse else self.layers:
            transform = layer.condition(context)  # type: ignore[operator]
            before, after = (transform.inv(z), z) if inverse else (z, transform(z))
            log_det = transform.log_abs_det_jacobian(before, after)
            total = total + (log_det.sum(-1) if log_det.dim() == z.dim() else log_det)
            z = before if inverse else after
        return z, total


def _zero(linear: nn.Module) -> None:
    for parameter in linear.parameters():
        parameter.data.zero_()
