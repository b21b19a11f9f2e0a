"""The inner gradient of a batched MLP under Gaussian noise as one autograd node.

An inner step needs ∇_φ log p(y | x, φ); meta-training differentiates through it, which needs products of its Hessian
with a vector. Both are written out here by hand (the product by the R-operator: B. A. Pearlmutter, "Fast Exact
Multiplication by the Hessian", Neural Computation 6, 1994, https://doi.org/10.1162/neco.1994.6.1.147, section 3), so
that a step is one node of the graph rather than about sixty. Tests hold it equal to plain autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bayesmeta.ops.batched import FlatParameters, affine, is_plain_mlp

# f'(a) t or f''(a) t as a function of h = f(a), which is all that is kept, and t.
_Slope = Callable[[Tensor, Tensor], Tensor]


def _relu_slope(h: Tensor, t: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(t, h, 0)


def _tanh_slope(h: Tensor, t: Tensor) -> Tensor:
    return t * (1 - h * h)


@dataclass(frozen=True)
class _Activation:
    apply: Callable[[Tensor], Tensor]
    slope: _Slope  # (h, t) -> f'(a) t
    curvature: _Slope | None  # (h, t) -> f''(a) t; None where it is 0


_ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.ReLU: _Activation(torch.relu, _relu_slope, None),
    nn.Tanh: _Activation(torch.tanh, _tanh_slope, lambda h, t: -2 * h * (1 - h * h) * t),
}


class GaussianMLPGradient:
    """∇_φ Σ −½ (y − f_φ(x))² · weight for a batch of MLPs, differentiable once more in φ.

    Args:
        network: Linear layers with biases, each but the last followed by one ReLU or Tanh.
        flat: all of its parameters.
    """

    def __init__(self, network: nn.Module, flat: FlatParameters) -> None:
        modules = list(network._modules.values())  # not children(), which drops repetitions
        self.flat = flat
        self.shapes = [shape for shape in flat.shapes.values() if len(shape) == 2]
        self.activations = [_ACTIVATIONS[type(m)] for m in modules[1::2] if m is not None]

    @staticmethod
    def serves(network: nn.Module, flat: FlatParameters) -> bool:
        """Whether the network is of this kind and all of its parameters are in ``flat``."""
        if not is_plain_mlp(network) or len(network) % 2 == 0:  # type: ignore[arg-type]
            return False
        assert isinstance(network, nn.Sequential)
        linear, between = list(network)[::2], list(network)[1::2]
        names = {f"{2 * i}.{part}" for i in range(len(linear)) for part in ("weight", "bias")}
        # a bias that is no parameter leaves its name out of flat
        return (
            all(isinstance(m, nn.Linear) for m in linear)
            and all(type(m) in _ACTIVATIONS for m in between)
            and names == set(flat.shapes)
        )

    def __call__(self, phi: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The gradient.

        Args:
            phi: weights, ``[rows, D]``.
            x: ``[rows, shots, features]``, taken as constant.
            y: ``[rows, shots, outputs]``, taken as constant.
            weight: of each squared residual, broadcastable to y, taken as constant.

        Returns:
            ``[rows, D]``. A third derivative raises an error.
        """
        return _Gradient.apply(phi, x, y, weight, self)

    def layers(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights ``[rows, out, in]`` and biases ``[rows, 1, out]`` of each layer."""
        # the network's order is weight, bias, weight, bias, …
        parts = flat.split(self.flat.sizes, -1)
        return [
            (weight.view(-1, *shape), bias.unsqueeze(1))
            for weight, bias, shape in zip(parts[::2], parts[1::2], self.shapes, strict=True)
        ]

    def pack(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Gradients of weights and biases as one vector a row."""
        return torch.cat([t for weight, bias in parts for t in (weight.flatten(1), bias)], -1)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phi: Tensor, x: Tensor, y: Tensor, weight: Tensor, net: GaussianMLPGradient) -> Tensor:
        layers, last = net.layers(phi), len(net.shapes) - 1
        hidden = [x]
        for index, (w, b) in enumerate(layers):
            a = affine(b, hidden[-1], w)
            hidden.append(a if index == last else net.activations[index].apply(a))
        delta = (y - hidden.pop()) * weight
        deltas, parts = [], []
        for index in range(last, -1, -1):
            deltas.append(delta)
            parts.append((_weight_gradient(delta, hidden[index]), delta.sum(-2)))
            if index:
                delta = net.activations[index - 1].slope(hidden[index], _below(delta, layers[index][0]))
        ctx.save_for_backward(phi, weight, *hidden, *reversed(deltas))
        ctx.net = net
        return net.pack(parts[::-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
        """The Hessian times a vector; dotted quantities are derivatives along it."""
        net: GaussianMLPGradient = ctx.net
        phi, weight, *saved = ctx.saved_tensors
        count = len(net.shapes)
        hidden, deltas = saved[:count], saved[count:]
        layers, along = net.layers(phi), net.layers(vector)
        a_dots: list[Tensor] = []
        hidden_dots: list[Tensor] = []  # of hidden[1], hidden[2], …; the input does not move
        for index in range(count):
            a_dot = affine(along[index][1], hidden[index], along[index][0])
            if index:
                a_dot.baddbmm_(hidden_dots[-1], layers[index][0].mT)
            a_dots.append(a_dot)
            if index < count - 1:
                hidden_dots.append(net.activations[index].slope(hidden[index + 1], a_dot))
        delta_dot = -weight * a_dots[-1]
        parts = []
        for index in range(count - 1, -1, -1):
            w_dot = _weight_gradient(delta_dot, hidden[index])
            if index:
                w_dot.baddbmm_(deltas[index].mT, hidden_dots[index - 1])
            parts.append((w_dot, delta_dot.sum(-2)))
            if index:
                delta_dot = _delta_dot(net, index, hidden, deltas, a_dots, layers, along, delta_dot)
        return net.pack(parts[::-1]), None, None, None, None


def _weight_gradient(delta: Tensor, hidden: Tensor) -> Tensor:
    """Σ over shots of δ hᵀ, ``[rows, out, in]``."""
    if hidden.shape[-1] == 1:  # a batched product is several times faster with one row than with one column
        return torch.bmm(hidden.mT, delta).mT
    return torch.bmm(delta.mT, hidden)


def _below(delta: Tensor, weight: Tensor) -> Tensor:
    """δ W, ``[rows, shots, in]``."""
    return delta * weight if delta.shape[-1] == 1 else torch.bmm(delta, weight)


def _delta_dot(
    net: GaussianMLPGradient,
    index: int,
    hidden: list[Tensor],
    deltas: list[Tensor],
    a_dots: list[Tensor],
    layers: list[tuple[Tensor, Tensor]],
    along: list[tuple[Tensor, Tensor]],
    delta_dot: Tensor,
) -> Tensor:
    """Derivative of the back-propagated error of the layer below ``index``."""
    activation = net.activations[index - 1]
    back = affine(_below(deltas[index], along[index][0]), delta_dot, layers[index][0].mT)
    below = activation.slope(hidden[index], back)
    if activation.curvature is not None:
        error = _below(deltas[index], layers[index][0])
        below = below + activation.curvature(hidden[index], error) * a_dots[index - 1]
    return below
