"""An MLP under a diagonal Gaussian over its weights, with noise of its own for each observation.

Sources: D. Kingma, T. Salimans, M. Welling, "Variational Dropout and the Local Reparameterization Trick", NeurIPS 2015,
https://arxiv.org/abs/1506.02557, section 2.1, eq. 6; Y. Wen, P. Vicol, J. Ba, D. Tran, R. Grosse, "Flipout: Efficient
Pseudo-Independent Weight Perturbations on Mini-Batches", ICLR 2018, https://arxiv.org/abs/1803.04386, eqs. 3 and 4.

The output at each x has the law that a draw of the weights would give it, so that a sum over observations keeps its
mean; outputs at different x no longer belong to one function, so that a product over observations does not.

Departures: biases have noise too (Kingma et al. leave them out, Wen et al. perturb kernels alone): of the local form it
adds to the variance of the pre-activation; of flipout it has the sign of its output, as if its input 1 had the sign 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bayesmeta.ops.batched import FlatParameters, is_plain_mlp
from bayesmeta.ops.lowered import in_bfloat16
from bayesmeta.ops.random import normal_like

#: How noise is drawn for each observation.
PointKind = Literal["local", "flipout"]


class PointNoise:
    """Network outputs under q = N(loc, diag(scale²)), one for each observation and particle.

    Args:
        network: see :meth:`serves`. Parameters that ``flat`` does not name are shared by all tasks, without noise.
        flat: the task-specific parameters.
        kind: ``"local"``: pre-activations are drawn from their Gaussian given the layer's input, independently for
            each observation; ``"flipout"``: one draw of the weights for all observations of a task and particle, whose
            difference from the mean has random signs of rank one for each observation.
    """

    def __init__(self, network: nn.Module, flat: FlatParameters, kind: PointKind) -> None:
        self.flat, self.kind = flat, kind
        modules = [("", network)] if isinstance(network, nn.Linear) else list(network._modules.items())
        self.layers: list[tuple[str, nn.Module]] = []
        for name, module in modules:
            assert module is not None
            self.layers.append((f"{name}." if name else "", module))
        own = [m for name, m in self.layers if isinstance(m, nn.Linear) and f"{name}weight" in flat.shapes]
        self.outputs = sum(m.out_features for m in own)
        self.inputs = sum(m.in_features for m in own)

    @staticmethod
    def serves(network: nn.Module) -> bool:
        """True for a Linear, and for a Sequential of Linear and elementwise layers: each weight acts once on each x."""
        return is_plain_mlp(nn.Sequential(network) if isinstance(network, nn.Linear) else network)

    def draw(self, loc: Tensor, particles: int, shots: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise for :meth:`__call__`.

        Args:
            loc: ``[G, tasks, D]``.
            particles: draws for each observation.
            shots: observations of each task, padding included.
            generator: where the numbers come from.

        Returns:
            Local: normal ``[G, tasks, particles, shots, Σ outputs]`` over the task-specific layers. Flipout: normal
            ``[G, tasks, particles, D]``, and signs ``[G, tasks, particles, shots, Σ (inputs + outputs)]``.
        """
        lead = (*loc.shape[:-1], particles)
        if self.kind == "local":
            return (normal_like(loc, (*lead, shots, self.outputs), generator),)
        normal = normal_like(loc, (*lead, loc.shape[-1]), generator)
        size = (*lead, shots, self.inputs + self.outputs)
        signs = torch.randint(2, size, generator=generator, dtype=loc.dtype, device=loc.device)
        return normal, 2 * signs - 1

    def __call__(self, loc: Tensor, scale: Tensor, x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        """Outputs ``[particles, G, tasks, shots, outputs]``.

        Args:
            loc, scale: of q, each ``[G, tasks, D]``.
            x: the network's inputs, ``[tasks, shots, features]``.
            noise: what :meth:`draw` gave.
        """
        groups, tasks, size = loc.shape
        rows = groups * tasks
        particles, shots = noise[-1].shape[2:4]
        means = self.flat.views(loc.reshape(rows, size))
        of_points = noise[-1].reshape(rows, particles, shots, -1)
        if self.kind == "local":
            spread = self.flat.views(scale.square().reshape(rows, size))
        else:
            spread = self.flat.views((scale.unsqueeze(-2) * noise[0]).reshape(rows * particles, size))
        h = x.expand(groups, *x.shape).reshape(rows, 1, *x.shape[1:])
        begin = 0
        for name, module in self.layers:
            if f"{name}weight" not in means:  # elementwise, or shared by all tasks
                h = module(h)
                continue
            mean = _linear(h, means[f"{name}weight"], means.get(f"{name}bias"))
            width = mean.shape[-1] + (h.shape[-1] if self.kind == "flipout" else 0)
            piece = of_points[..., begin : begin + width]
            begin += width
            of_layer = spread[f"{name}weight"], spread.get(f"{name}bias")
            h = mean + (_local if self.kind == "local" else _flipout)(h, *of_layer, piece)
        return h.reshape(groups, tasks, particles, shots, -1).movedim(2, 0)


def _local(h: Tensor, weight: Tensor, bias: Tensor | None, normal: Tensor) -> Tensor:
    """What noise adds to pre-activations, ``[rows, particles, shots, outputs]``.

    Args:
        h: ``[rows, particles or 1, shots, inputs]``.
        weight, bias: variances, ``[rows, outputs, inputs]`` and ``[rows, outputs]``.
        normal: of the result's shape.
    """
    variance = _linear(h.square(), weight, bias)
    # a variance of 0 (no bias, and no input that is alive) has the derivative 0, not that of the root
    return variance.clamp(min=torch.finfo(variance.dtype).tiny ** 0.5).sqrt() * normal


def _flipout(h: Tensor, weight: Tensor, bias: Tensor | None, signs: Tensor) -> Tensor:
    """What noise adds to pre-activations, ``[rows, particles, shots, outputs]``.

    Args:
        h: ``[rows, particles or 1, shots, inputs]``.
        weight, bias: differences from the mean, ``[rows × particles, outputs, inputs]`` and ``[rows × particles,
            outputs]``.
        signs: of inputs, then of outputs, ``[rows, particles, shots, inputs + outputs]``.
    """
    of_inputs, of_outputs = signs.split([h.shape[-1], signs.shape[-1] - h.shape[-1]], -1)
    moved = (h * of_inputs).flatten(0, 1).unsqueeze(1)
    return _linear(moved, weight, bias).reshape(of_outputs.shape) * of_outputs


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h Wᵀ + b for ``[rows, particles, shots, inputs]`` and one W and b a row."""
    flat = h.flatten(1, 2)
    if bias is None:
        out = in_bfloat16(torch.bmm, flat, weight.mT)
    else:
        out = in_bfloat16(torch.baddbmm, bias.unsqueeze(-2), flat, weight.mT)
    return out.unflatten(1, h.shape[1:3])
