"""``precision=`` of :func:`~bayesmeta.fit` and :class:`~bayesmeta.MetaSVI`: faster products, float32 everywhere else.

Mixed precision as in P. Micikevicius and others, "Mixed Precision Training", ICLR 2018,
https://arxiv.org/abs/1710.03740, section 3.1: weights of float32 are rounded for the products and updated in float32.
Departures: bfloat16 in place of float16, which has float32's range, so that losses are not scaled; and the rounding
ends with the network: likelihoods, densities, closed forms and inner updates stay in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn

from bayesmeta.errors import OptionError
from bayesmeta.ops.lowered import LAYERS, lowered

Precision = Literal["float32", "tf32", "bf16"]


def check_precision(precision: Any) -> None:
    """Refuse an unknown name.

    Raises:
        OptionError: naming those that there are.
    """
    if precision not in get_args(Precision):
        raise OptionError(f"precision={precision!r}; expected 'float32', 'tf32' or 'bf16'.")


def check_usable(precision: Precision, device: torch.device, modules: Iterable[nn.Module]) -> None:
    """Refuse what would change nothing.

    Raises:
        OptionError: for ``"tf32"`` on another device than CUDA, and ``"bf16"`` without a layer in float32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise OptionError(
            f"precision='tf32' is of NVIDIA's tensor cores and would change nothing on {device.type!r}; use 'float32', "
            "or 'bf16'."
        )
    if precision != "bf16":
        return
    modules = list(modules)
    wide = {p.dtype for module in modules for p in module.parameters() if p.is_floating_point()} - {torch.float32}
    if wide:
        raise OptionError(
            f"precision='bf16' rounds the products of a float32 network; this has parameters of {_names(wide)}. Use "
            "dtype=torch.float32."
        )
    if not any(isinstance(m, LAYERS) for module in modules for m in module.modules()):
        raise OptionError(
            "precision='bf16' works on the layers of networks (Linear, convolutions, attention), and none was found "
            "in what is trained: the densities of a program stay in float32. Use 'float32'; or, where a Pyro program "
            "calls a network, let it be a PyroModule that has the network as an attribute."
        )


@contextmanager
def in_precision(precision: Precision, *modules: nn.Module) -> Iterator[None]:
    """Work in a precision; afterwards torch's settings and the modules are as they were.

    Args:
        precision: checked before.
        *modules: whose layers ``"bf16"`` concerns.
    """
    within = {"float32": nullcontext, "tf32": _tf32, "bf16": lambda: lowered(*modules)}[precision]
    with within():
        yield


@contextmanager
def _tf32() -> Iterator[None]:
    """Let CUDA round the factors of float32 products to TF32, in matrix products and convolutions."""
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
