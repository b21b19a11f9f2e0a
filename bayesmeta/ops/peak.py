"""Memory counted from the tensors themselves: the same on every device, and without the allocator's habits."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is active, until each is freed.

    Memory is counted by storage: a view costs nothing, nor does a tensor that was there before. Not seen is what an
    operation takes for itself and gives back before it returns (workspaces), and what an allocator keeps.

    Attributes:
        live: bytes of the tensors made since it was entered that are alive now.
        peak: the most that ``live`` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._sizes: dict[int, int] = {}  # of storages, by identity; 0 of those that were there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, new=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._note(tensor, new=True)
        return out

    def _note(self, tensor: Any, *, new: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes() if new else 0
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
