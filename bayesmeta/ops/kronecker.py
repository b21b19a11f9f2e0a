"""Precisions of the weights of Linear layers as Kronecker products, without ever holding D × D numbers.

A layer with inputs a and outputs W a + b is the matrix W̃ = [W, b], ``[O, I]``, on ã = [a, 1]. A ⊗ G stands for the map
X ↦ G X A on such matrices, with A ``[I, I]`` of the inputs and G ``[O, O]`` of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.ops.batched import FlatParameters, is_plain_mlp

#: Numbers that a backward pass holds at once beside the factors.
MAX_CHUNK = 2**22
#: Eigenvalues and eigenvectors are no variables of their own.
_NO_EIGEN = (None,) * 4


class LinearLayers:
    """The Linear layers that flat weights are made of, each as a matrix ``[O, I]`` with its bias as the last column.

    Args:
        flat: weights, and biases where there are any, of Linear layers and nothing else.
    """

    def __init__(self, flat: FlatParameters) -> None:
        self.flat = flat
        self.stems = [name.removesuffix("weight") for name in flat.shapes if name.endswith("weight")]
        self.sides: list[tuple[int, int]] = []
        for stem in self.stems:
            outputs, inputs = flat.shapes[f"{stem}weight"]
            self.sides.append((outputs, inputs + self.has_bias(stem)))

    def has_bias(self, stem: str) -> bool:
        """Whether the layer has a bias among the weights."""
        return f"{stem}bias" in self.flat.shapes

    @property
    def num_factor_entries(self) -> int:
        """Numbers in all factors A and G together: the sum of squared sides."""
        return sum(outputs**2 + inputs**2 for outputs, inputs in self.sides)

    def matrices(self, u: Tensor) -> list[Tensor]:
        """``[…, D]`` to one ``[…, O, I]`` a layer."""
        views = self.flat.views(u)
        found = []
        for stem in self.stems:
            weight = views[f"{stem}weight"]
            if self.has_bias(stem):
                weight = torch.cat([weight, views[f"{stem}bias"].unsqueeze(-1)], -1)
            found.append(weight)
        return found

    def vector(self, matrices: list[Tensor]) -> Tensor:
        """The inverse of :meth:`matrices`."""
        named = {}
        for stem, matrix in zip(self.stems, matrices, strict=True):
            if self.has_bias(stem):
                named[f"{stem}bias"] = matrix[..., -1]
                matrix = matrix[..., :-1]
            named[f"{stem}weight"] = matrix
        return self.flat.flatten(named)


class ShiftedKronecker:
    """I + A ⊗ G for symmetric A and G without negative eigenvalues.

    Its inverse root and determinant come from the eigenvalues of A and G, but their derivatives do not take those of
    eigenvectors, which equal eigenvalues (fewer shots than inputs) would make infinite. They can be differentiated
    once; a second derivative raises a RuntimeError.

    Args:
        inputs: A, ``[…, I, I]``.
        outputs: G, ``[…, O, O]``.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs, self.outputs = inputs, outputs

    @cached_property
    def _eigen(self) -> tuple[Tensor, ...]:
        """Eigenvalues and eigenvectors of A, then of G, in float64; rounding can put a 0 below 0."""
        pairs = [torch.linalg.eigh(matrix.detach().double()) for matrix in (self.inputs, self.outputs)]
        return tuple(part for values, vectors in pairs for part in (values.clamp(min=0.0), vectors))

    def apply(self, x: Tensor) -> Tensor:
        """X + G X A for X ``[…, O, I]``."""
        return x + self.outputs @ x @ self.inputs

    def inverse_root(self, x: Tensor) -> Tensor:
        """(I + A ⊗ G)^(−½) X, the symmetric root, for X ``[…, O, I]`` whose dimensions broadcast with the factors'."""
        lead = torch.broadcast_shapes(x.shape[:-2], self.inputs.shape[:-2])
        batch = lead[len(lead) - (self.inputs.dim() - 2) :]
        x = x.expand(*lead, *x.shape[-2:])
        inputs, outputs = (part.expand(*batch, *part.shape[-2:]) for part in (self.inputs, self.outputs))
        alpha, u, gamma, v = (part.to(x.dtype) for part in self._eigen)
        alpha, gamma = alpha.expand(*batch, -1), gamma.expand(*batch, -1)
        u, v = (part.expand(*batch, *part.shape[-2:]) for part in (u, v))
        return _InverseRoot.apply(x, inputs, outputs, alpha, u, gamma, v)

    def log_det(self) -> Tensor:
        """log |I + A ⊗ G|, ``[…]``."""
        return _LogDet.apply(self.inputs, self.outputs, *self._eigen)


class _Last(torch.autograd.Function):
    """A first derivative, computed without a graph, of what depends on others: to differentiate it again is an error.

    torch's ``once_differentiable`` would take it for a constant where the incoming slope is one.
    """

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, *of: Tensor) -> Tensor:
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("The root and the determinant of I + A ⊗ G can be differentiated once, not twice.")


class _InverseRoot(torch.autograd.Function):
    """f(M) X of M = I + A ⊗ G with f(λ) = λ^(−½).

    In the eigenbasis d f(M) has the entries f[λ, λ'] dM, with divided differences f[λ, λ'] = −1 / (r r' (r + r')) of
    r = √λ: finite for equal λ (Daleckiĭ and Kreĭn; N. Higham, "Functions of Matrices", 2008, theorem 3.11).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: Tensor, outputs: Tensor, *eigen: Tensor) -> Tensor:
        alpha, u, gamma, v = eigen
        root = (1.0 + gamma.unsqueeze(-1) * alpha.unsqueeze(-2)).sqrt()
        turned = (v.mT @ x @ u) / root
        ctx.save_for_backward(x, inputs, outputs, turned, root, *eigen)
        return v @ turned @ u.mT

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        *of, turned, root, alpha, u, gamma, v = ctx.saved_tensors
        of.append(slope)
        of_inputs = of_outputs = None
        with torch.no_grad():
            slope = (v.mT @ slope @ u) / root
            of_x = v @ slope @ u.mT
            if ctx.needs_input_grad[1]:
                of_inputs = u @ _pairs(slope, turned, root, gamma) @ u.mT
            if ctx.needs_input_grad[2]:
                of_outputs = v @ _pairs(slope.mT, turned.mT, root.mT, alpha) @ v.mT
        return *(None if d is None else _Last.apply(d, *of) for d in (of_x, of_inputs, of_outputs)), *_NO_EIGEN


def _pairs(slope: Tensor, turned: Tensor, root: Tensor, weight: Tensor) -> Tensor:
    """−Σ_j w_j Σ_s slope_sji turned_sji' / (r_ji + r_ji'), symmetrised; by slices of j, so that memory stays I × I.

    slope and turned ``[…, *batch, J, I]``, root ``[*batch, J, I]``, weight ``[*batch, J]``; gives ``[*batch, I, I]``.
    """
    batch, (size, side) = root.shape[:-2], root.shape[-2:]
    # [B, J, samples, I]
    slope, turned = (part.reshape(-1, batch.numel(), size, side).permute(1, 2, 0, 3) for part in (slope, turned))
    root, weight = root.reshape(-1, size, side), weight.reshape(-1, size)
    step = max(MAX_CHUNK // max(batch.numel() * side**2, 1), 1)
    total = root.new_zeros(batch.numel(), side, side)
    for start in range(0, size, step):
        part = slice(start, start + step)
        products = slope[:, part].mT @ turned[:, part]
        products /= root[:, part].unsqueeze(-1) + root[:, part].unsqueeze(-2)
        total -= torch.einsum("bj,bjik->bik", weight[:, part], products)
    return (0.5 * (total + total.mT)).reshape(*batch, side, side)


class _LogDet(torch.autograd.Function):
    """Σ log(1 + α γ), whose derivative in A is U diag(Σ_j γ_j / (1 + α γ_j)) Uᵀ."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, outputs: Tensor, *eigen: Tensor) -> Tensor:
        alpha, _, gamma, _ = eigen
        ctx.save_for_backward(inputs, outputs, *eigen)
        return torch.log1p(gamma.unsqueeze(-1) * alpha.unsqueeze(-2)).sum((-2, -1)).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        *of, alpha, u, gamma, v = ctx.saved_tensors
        of.append(slope)
        with torch.no_grad():
            inverse = slope[..., None, None] / (1.0 + gamma.unsqueeze(-1) * alpha.unsqueeze(-2))
            of_inputs = (u * (gamma.unsqueeze(-1) * inverse).sum(-2).unsqueeze(-2)) @ u.mT
            of_outputs = (v * (alpha.unsqueeze(-2) * inverse).sum(-1).unsqueeze(-2)) @ v.mT
        return *(_Last.apply(d.to(slope.dtype), *of) for d in (of_inputs, of_outputs)), *_NO_EIGEN


class KroneckerPrecision:
    """Λ = S⁻¹ (I + ⊕_l A_l ⊗ G_l) S⁻¹ over flat weights, S diagonal, one block a layer.

    Args:
        layers: where each layer lies in the vector.
        scale: the diagonal of S, ``[…, D]``.
        inputs: A of each layer, ``[…, I, I]``.
        outputs: G of each layer, ``[…, O, O]``.
    """

    def __init__(self, layers: LinearLayers, scale: Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.layers, self.scale = layers, scale
        self.blocks = [ShiftedKronecker(a, g) for a, g in zip(inputs, outputs, strict=True)]

    def _by_layer(self, u: Tensor, each: Callable[[ShiftedKronecker, Tensor], Tensor]) -> Tensor:
        return self.layers.vector([each(b, m) for b, m in zip(self.blocks, self.layers.matrices(u), strict=True)])

    @property
    def log_det(self) -> Tensor:
        """log |Λ|, ``[…]``."""
        return torch.stack([block.log_det() for block in self.blocks]).sum(0) - 2.0 * self.scale.log().sum(-1)

    def spread(self, noise: Tensor) -> Tensor:
        """R noise with R Rᵀ = Λ⁻¹, ``[…, D]``."""
        return self.scale * self._by_layer(noise, ShiftedKronecker.inverse_root)

    def solve(self, right: Tensor) -> Tensor:
        """Λ⁻¹ right, ``[…, D]``."""
        return self.spread(self._by_layer(self.scale * right, ShiftedKronecker.inverse_root))

    def multiply(self, right: Tensor) -> Tensor:
        """Λ right, ``[…, D]``."""
        return self._by_layer(right / self.scale, ShiftedKronecker.apply) / self.scale

    def dense(self) -> Tensor:
        """Λ as a matrix, ``[…, D, D]``: for small networks only."""
        size = self.scale.shape[-1]
        eye = torch.eye(size, dtype=self.scale.dtype, device=self.scale.device)
        eye = eye.reshape(size, *(1,) * (self.scale.dim() - 1), size).expand(size, *self.scale.shape)
        return self.multiply(eye).movedim(0, -2)


def why_not_linear(network: nn.Module, flat: FlatParameters) -> str | None:
    """What keeps the task-specific weights from being those of Linear layers one behind the other; None if they are."""
    if is_plain_mlp(network) or (type(network) is nn.Linear and is_plain_mlp(nn.Sequential(network))):
        return None
    if type(network) is not nn.Sequential:
        return f"its network is a {type(network).__name__}, with {', '.join(map(repr, flat.shapes))} task-specific"
    for name, module in network.named_children():
        if not is_plain_mlp(nn.Sequential(module)):
            own = [repr(part) for part in flat.shapes if part.startswith(f"{name}.")]
            tail = f", with {', '.join(own)} task-specific" if own else ""
            return f"module {name!r} of its network is a {type(module).__name__}, or has hooks{tail}"
    return "its network has hooks"


def kronecker_factors(
    network: nn.Module,
    layers: LinearLayers,
    phi: Tensor,
    x: Tensor,
    mask: Tensor,
    fisher: Callable[[Tensor], Tensor],
    *,
    create_graph: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Factors of the Gauss–Newton matrix of Σ_shots over the weights of each layer, N · E[ã ãᵀ] ⊗ E[Bᵀ F B].

    Source: J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
    2015, https://arxiv.org/abs/1503.05671, section 3, and 4.2 for the blocks. There E[Bᵀ F B] is by targets drawn from
    the model; here it is exact, by one backward pass for each output, B = d outputs / d (what the layer gives). The
    product of means is in place of the mean of products: exact for one shot, and where F and B are the same in each.

    Args:
        network: Linear and elementwise layers.
        layers: its task-specific layers.
        phi: their weights, ``[rows, D]``.
        x: inputs, ``[rows, shots, features]``.
        mask: True for real shots, ``[rows, shots]``.
        fisher: outputs ``[rows, shots, P]`` to F, ``[rows, shots, P, P]``, 0 where masked.
        create_graph: differentiable in phi and in what else F depends on.

    Returns:
        A of each layer, ``[rows, I, I]``, the mean over real shots; G of each layer, ``[rows, O, O]``, the sum.
    """
    phi = phi if create_graph and phi.requires_grad else phi.detach().requires_grad_()
    outputs, taken, given = _forward(network, layers, phi, x)
    slopes = [
        torch.autograd.grad(part, given, create_graph=create_graph, retain_graph=True, materialize_grads=True)
        for part in outputs.flatten(0, -2).sum(0)
    ]
    information = fisher(outputs)
    share = mask.sum(-1).clamp(min=1)[:, None, None].to(phi.dtype).reciprocal()
    inputs, squares = [], []
    for index, stem in enumerate(layers.stems):
        a = taken[index] if create_graph else taken[index].detach()
        if layers.has_bias(stem):
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        a = torch.where(mask.unsqueeze(-1), a, 0.0)
        inputs.append(share * (a.mT @ a))
        back = torch.stack([slope[index] for slope in slopes], -2)  # B, [rows, shots, P, O]
        square = back.flatten(1, 2).mT @ (information @ back).flatten(1, 2)
        squares.append(0.5 * (square + square.mT))
    return inputs, squares


def _forward(
    network: nn.Module, layers: LinearLayers, phi: Tensor, x: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs, and what each task-specific layer takes and gives."""
    views, taken, given = layers.flat.views(phi), [], []
    modules = list(network._modules.items()) if isinstance(network, nn.Sequential) else [("", network)]
    h = x
    for name, module in modules:  # not named_children(), which leaves out a module that appears a second time
        assert module is not None
        stem = f"{name}." if name else ""
        if f"{stem}weight" not in views:
            # in place, it would overwrite what a layer has given
            h = module(h.clone() if getattr(module, "inplace", False) else h)
            continue
        taken.append(h)
        h = h @ views[f"{stem}weight"].mT
        if layers.has_bias(stem):
            h = h + views[f"{stem}bias"].unsqueeze(-2)
        given.append(h)
    return h, taken, given


def separable_scale(layers: LinearLayers, scale: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The nearest scales of the form s_oi = r_o t_i within each layer, by least squares of the logarithms.

    Scales that have that form (one for a layer, or one for its weights and one for its biases; any of one output) stay
    as they are. The sum of the logarithms, and so a determinant, stays in any case.

    Args:
        layers: the layers.
        scale: positive, ``[…, D]``.

    Returns:
        s, ``[…, D]``; t of each layer, ``[…, I]``; r of each layer, ``[…, O]``.
    """
    rows, columns, whole = [], [], []
    for matrix in layers.matrices(scale.log()):
        columns.append(matrix.mean(-2))
        rows.append(matrix.mean(-1) - matrix.mean((-2, -1)).unsqueeze(-1))
        whole.append(rows[-1].unsqueeze(-1) + columns[-1].unsqueeze(-2))
    return layers.vector(whole).exp(), [part.exp() for part in columns], [part.exp() for part in rows]
