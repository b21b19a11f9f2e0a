"""Networks with one set of weights per task, evaluated for all tasks and particles at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


class Sine(nn.Module):
    """sin(x): behind a Linear, a layer of sinusoids with learned frequencies and phases."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x.sin()


#: Modules that act on each number alone, so that one call serves every task.
ELEMENTWISE = (
    nn.ReLU, nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Softplus, nn.Identity,
    nn.LeakyReLU, nn.Mish, nn.Softsign, nn.Hardtanh, Sine,
)  # fmt: skip


class FlatParameters:
    """Named views of one flat vector.

    Args:
        shapes: name and shape of each part, in the order in which they lie in the vector.
    """

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes
        self.sizes = [shape.numel() for shape in shapes.values()]
        self.size = sum(self.sizes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """``[…, size]`` to ``{name: […, *shape]}``, without copies."""
        parts = flat.split(self.sizes, -1)
        lead = flat.shape[:-1]
        return {n: p.reshape((*lead, *s)) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, named: dict[str, Tensor]) -> Tensor:
        """The inverse of :meth:`views`."""
        parts = [named[n].reshape(*named[n].shape[: named[n].dim() - len(s)], -1) for n, s in self.shapes.items()]
        return torch.cat(parts, -1)


def is_plain_mlp(network: nn.Module) -> bool:
    """True for a Sequential of Linear and elementwise layers, which :class:`BatchedMLP` serves.

    Subclasses, parametrised layers and hooks may do other things, and take the general path.
    """
    if type(network) is not nn.Sequential or _has_hooks(network):
        return False
    return all(type(m) in (nn.Linear, *ELEMENTWISE) and not _has_hooks(m) for m in network)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class BatchedModule:
    """Any module on one set of weights a row, by ``functional_call`` under ``vmap``.

    Called with weights ``[rows, D]`` and inputs ``[tasks, shots, features]``, where rows are particles × tasks; gives
    ``[rows, shots, outputs]`` (or ``[tasks, shots, outputs]`` when no weight is task-specific up to the output).

    Args:
        network: parameters that ``flat`` does not name are shared by all tasks.
        flat: the task-specific parameters.
    """

    def __init__(self, network: nn.Module, flat: FlatParameters) -> None:
        self.network, self.flat = network, flat

    def __call__(self, phi: Tensor, x: Tensor) -> Tensor:
        """Outputs of every row."""
        return vmap(self._single)(phi, _repeat_rows(x, phi.shape[0]))

    def _single(self, phi: Tensor, x: Tensor) -> Tensor:
        return functional_call(self.network, self.flat.views(phi), (x,))


class BatchedMLP(BatchedModule):
    """The fast path for :func:`is_plain_mlp` networks: one batched matrix product a layer."""

    def __call__(self, phi: Tensor, x: Tensor) -> Tensor:
        """Outputs of every row."""
        views = self.flat.views(phi)
        h = x
        # not named_children(), which leaves out a module that appears a second time
        for name, module in self.network._modules.items():
            weight, bias = views.get(f"{name}.weight"), views.get(f"{name}.bias")
            assert module is not None
            if weight is None and bias is None:  # elementwise, or shared by all tasks
                h = module(h)
                continue
            assert isinstance(module, nn.Linear)
            h = _repeat_rows(h, phi.shape[0])
            weight = module.weight.expand(phi.shape[0], -1, -1) if weight is None else weight
            if bias is None and module.bias is None:
                h = torch.bmm(h, weight.mT)
            else:
                shared = module.bias if bias is None else bias.unsqueeze(-2)
                assert isinstance(shared, Tensor)
                h = affine(shared, h, weight)
        return h


def affine(bias: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ + bias, row by row.

    Args:
        bias: broadcastable to the result.
        h: ``[rows, shots, in]``.
        weight: ``[rows, out, in]``.

    Returns:
        ``[rows, shots, out]``.
    """
    # an outer product, for which a batched matrix product takes several times as long, but which is not cast
    if h.shape[-1] == weight.shape[-1] == 1 and not torch.is_autocast_enabled(h.device.type):
        return torch.addcmul(bias, h, weight.mT)
    return torch.baddbmm(bias, h, weight.mT)


def _repeat_rows(h: Tensor, rows: int) -> Tensor:
    """``[tasks, …]`` to ``[particles × tasks, …]``, particles on the left."""
    if h.shape[0] == rows:
        return h
    particles = rows // h.shape[0]
    return h.unsqueeze(0).expand(particles, *h.shape).reshape(rows, *h.shape[1:])


def unsafe_modules(network: nn.Module) -> Sequence[str]:
    """Names of modules that mix tasks or draw hidden noise: running statistics, and dropout above 0."""
    bad = []
    for name, module in network.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        drop = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        drop = drop or (isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0)
        if norm or batch or drop:
            bad.append(f"{name or '(root)'} ({type(module).__name__})")
    return bad
