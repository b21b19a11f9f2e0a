"""Networks as plain ``nn.Module`` s."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

from bayesmeta.errors import OptionError
from bayesmeta.ops.batched import Sine
from bayesmeta.ops.random import Seed, as_generator

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus,
    "sine": Sine,
}  # fmt: skip


def mlp(inputs: int, hidden: Sequence[int], outputs: int, *, activation: str = "relu") -> nn.Sequential:
    """A multilayer perceptron: Linear and activation in turn, no activation after the last layer.

    Args:
        inputs: width of x.
        hidden: width of each hidden layer.
        outputs: width of the last layer; 1 goes with targets of shape ``[tasks, shots]``.
        activation: one of ``relu``, ``tanh``, ``elu``, ``silu``, ``gelu``, ``softplus``, ``sine``.

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


def sine_features(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    frequency: float = 1.0,
    activation: str = "tanh",
    seed: Seed = None,
) -> nn.Sequential:
    """A multilayer perceptron whose first hidden layer is sin(ω x + b), for functions that oscillate.

    The first frequencies are ω ~ N(0, ``frequency``²) for each input and the phases b ~ U(−π, π), both drawn from the
    seed, so that the layer begins as random Fourier features of a Gaussian kernel with length scale 1 / ``frequency``
    (A. Rahimi, B. Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007,
    https://papers.nips.cc/paper/3182). A layer with torch's own first weights, at most 1 / √inputs, is too slow for
    data that oscillate faster. The layers behind it have torch's own first weights.

    Args:
        inputs: width of x.
        hidden: width of each hidden layer, at least one; the first is the sinusoids.
        outputs: width of the last layer.
        frequency: standard deviation of the first angular frequencies, per unit of x: about the fastest that data hold.
        activation: behind the other hidden layers, as in :func:`mlp`.
        seed: of frequencies and phases; None means seed 0.

    Raises:
        OptionError: for an unknown activation, no hidden layer, or a frequency that is not positive.
    """
    if not hidden:
        raise OptionError("sine_features needs at least one hidden layer, that of the sinusoids; got hidden=[].")
    if not 0 < frequency < math.inf:
        raise OptionError(f"frequency must be positive and finite, per unit of x; got {frequency}.")
    network = mlp(inputs, hidden, outputs, activation=activation)
    first = network[0]
    assert isinstance(first, nn.Linear)
    generator = as_generator(seed, stream="sine features")
    first.weight.data.normal_(0.0, frequency, generator=generator)
    first.bias.data.uniform_(-math.pi, math.pi, generator=generator)
    network[1] = Sine()
    return network
