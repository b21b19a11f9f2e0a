"""Networks in bfloat16 and everything else in float32: where automatic casting begins and ends."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_Result = TypeVar("_Result")
_ACTIVE: ContextVar[bool] = ContextVar("bayesmeta_lowered", default=False)

#: Modules that are made of matrix products; a Sequential stays in bfloat16 from its first to its last.
LAYERS = (
    nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention, nn.Sequential, nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
)  # fmt: skip


def is_lowered() -> bool:
    """Whether networks are in bfloat16 now, and we are not inside one."""
    return _ACTIVE.get()


def in_bfloat16(network: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """``network(*args, **kwargs)``, inside :func:`lowered` with its matrix products in bfloat16.

    Products are taken by ``torch.autocast``: of float32 numbers rounded to bfloat16, so that gradients come back in
    float32 through the casts. What comes out is float32 again. Numbers of float64 are left alone.
    """
    if not _ACTIVE.get():
        return network(*args, **kwargs)
    device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
    token = _ACTIVE.set(False)  # what lies within stays in bfloat16
    try:
        # no cache: a weight that was cast under no_grad would have no gradient afterwards
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            return _to_float32(network(*args, **kwargs))
    finally:
        _ACTIVE.reset(token)


@contextmanager
def lowered(*modules: nn.Module) -> Iterator[None]:
    """Let the layers of these modules, and networks called by :func:`in_bfloat16`, work in bfloat16.

    The layers get another ``forward`` for so long.
    """
    layers = {id(m): m for module in modules for m in module.modules() if isinstance(m, LAYERS)}
    mine = [m for m in layers.values() if "forward" not in m.__dict__]
    for layer in mine:
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        for layer in mine:
            del layer.__dict__["forward"]


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return in_bfloat16(types.MethodType(type(layer).forward, layer), *args, **kwargs)


def _to_float32(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.float() if result.dtype == torch.bfloat16 else result
    if isinstance(result, tuple | list):
        return type(result)(_to_float32(value) for value in result)
    return result
