"""Networks as plain ``nn.Module`` s."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from bayesmeta.errors import OptionError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus,
}  # fmt: skip


def mlp(inputs: int, hidden: Sequence[int], outputs: int, *, activation: str = "relu") -> nn.Sequential:
    """A multilayer perceptron: Linear and activation in turn, no activation after the last layer.

    Args:
        inputs: width of x.
        hidden: width of each hidden layer.
        outputs: width of the last layer; 1 goes with targets of shape ``[tasks, shots]``.
        activation: one of ``relu``, ``tanh``, ``elu``, ``silu``, ``gelu``, ``softplus``.

    Raises:
        OptionError: for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise OptionError(f"Unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    layers: list[nn.Module] = []
    widths = [inputs, *hidden]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
