"""Kernels of a deep kernel: GPyTorch's, by name or of your own, as functions that give matrices."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bayesmeta.errors import OptionError

with warnings.catch_warnings():
    # on import linear_operator compiles a function in a way that torch has deprecated
    warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
    from gpytorch import kernels

#: Names of the built-in kernels.
KernelName = Literal["rbf", "matern12", "matern32", "matern52", "spectral_mixture", "linear", "cosine"]


class DenseKernel(nn.Module):
    """A GPyTorch kernel as a function of two sets of points that gives a matrix."""

    def __init__(self, kernel: kernels.Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    @property
    def is_plain_rbf(self) -> bool:
        """Whether it is the built-in ``"rbf"``, which has a path of its own: fast, and fit for ``vmap``."""
        kernel = self.kernel
        if type(kernel) is not kernels.ScaleKernel or type(kernel.base_kernel) is not kernels.RBFKernel:
            return False
        base = kernel.base_kernel
        return base.ard_num_dims is None and base.active_dims is None and kernel.active_dims is None

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """``[…, N, M]`` for points ``[…, N, width]`` and ``[…, M, width]``; without b of the points with themselves."""
        if self.is_plain_rbf:
            return self._rbf(a, b)
        if b is not None:
            return self.kernel(a, b).to_dense()
        # GPyTorch's distances have rounding noise of 1e-8 from a point to itself, but not when asked for the diagonal
        exact, matrix = self.kernel(a, diag=True), self.kernel(a, a).to_dense()
        eye = torch.eye(a.shape[-2], dtype=torch.bool, device=a.device)
        return torch.where(eye, exact.unsqueeze(-1), matrix)

    def _rbf(self, a: Tensor, b: Tensor | None) -> Tensor:
        scale, length = self.kernel.outputscale, self.kernel.base_kernel.lengthscale.squeeze()
        centre = a.mean(-2, keepdim=True)  # distances by inner products are exact to the size of what is compared
        first = (a - centre) / length
        second = first if b is None else (b - centre) / length
        norms = first.square().sum(-1).unsqueeze(-1) + second.square().sum(-1).unsqueeze(-2)
        squared = (norms - 2.0 * first @ second.mT).clamp(min=0.0)
        if b is None:
            squared = squared.masked_fill(torch.eye(a.shape[-2], dtype=torch.bool, device=a.device), 0.0)
        return scale * torch.exp(-0.5 * squared)


class _Cosine(kernels.Kernel):
    """The cosine of the angle at 0 between two points: a linear kernel of their directions."""

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        a, b = normalize(x1, dim=-1), normalize(x2, dim=-1)
        return (a * b).sum(-1) if diag else a @ b.mT


def make_kernel(
    kernel: Any, width: int, num_mixtures: int, max_frequency: float, generator: torch.Generator
) -> kernels.Kernel:
    """A new kernel by name, or a copy of one of your own; the options are those of the spectral mixture.

    Raises:
        OptionError: for an unknown name, or a kernel with a batch shape.
    """
    if isinstance(kernel, kernels.Kernel):
        if kernel.batch_shape.numel() != 1 or len(kernel.batch_shape):
            raise OptionError(f"The kernel has batch shape {list(kernel.batch_shape)}; expected one without.")
        return copy.deepcopy(kernel)
    if kernel not in get_args(KernelName):
        raise OptionError(
            f"Unknown kernel {kernel!r}; expected one of {', '.join(map(repr, get_args(KernelName)))}, or a kernel of "
            "gpytorch.kernels."
        )
    if kernel == "spectral_mixture":
        mixture = kernels.SpectralMixtureKernel(num_mixtures=num_mixtures, ard_num_dims=width)
        uniform = torch.rand(num_mixtures, 1, width, generator=generator, dtype=torch.float64)
        # equal first components would stay equal
        mixture.mixture_means = (max_frequency * uniform).clamp(min=1e-3 * max_frequency)
        mixture.mixture_scales = torch.full_like(uniform, max_frequency / 10)
        mixture.mixture_weights = torch.full((num_mixtures,), 1.0 / num_mixtures)
        return mixture
    order = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}
    if kernel == "linear":
        return kernels.LinearKernel()
    if kernel == "cosine":
        return kernels.ScaleKernel(_Cosine())
    base = kernels.RBFKernel() if kernel == "rbf" else kernels.MaternKernel(nu=order[kernel])
    return kernels.ScaleKernel(base)
