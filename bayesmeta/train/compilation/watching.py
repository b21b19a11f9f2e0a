"""What a compiled step cannot see by itself: that modules, parameters or Python's own state have changed since.

A graph holds the tensor operations of the one call in which it was captured. Memory that is written in place is seen,
since the tensors are its inputs. All else that Python decides is frozen: ``train()`` and ``eval()``,
``requires_grad_``, tensors that take the place of others, numbers and counters in the user's own code. The first three
are looked at in each step, by :class:`Watch`. For the last a step is made eagerly beside its graph now and then, on the
same draws (:data:`CHECKS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bayesmeta.errors import CaptureError

#: The steps of a graph before which it is compared with an eager one, and after how many further ones again.
CHECKS, CHECK_EVERY = (2, 5, 10, 30, 100, 300, 1000), 3000
#: How often a run builds its graphs anew, and how often it tries again to capture a step that failed by its draws.
MOST_REBUILT, MOST_TRIES = 3, 3


class OutdatedError(CaptureError):
    """A graph does not fit what modules or the optimizer are now; another may."""


class ChanceError(CaptureError):
    """A step was not captured because of what it happened to draw; the next one may be."""


def next_check(steps: int) -> int:
    """The first step after so many before which a graph is compared with an eager step."""
    return next(
        (c for c in CHECKS if c > steps), max(CHECKS) + CHECK_EVERY * (1 + (steps - max(CHECKS)) // CHECK_EVERY)
    )


def rounding(tensor: Tensor, units: float) -> float:
    """So many units in the last place of a tensor's dtype."""
    return units * torch.finfo(tensor.dtype).eps


@contextmanager
def no_factor() -> Iterator[None]:
    """Take the failure of a factorisation for chance: it depends on what was drawn.

    Raises:
        ChanceError: for torch's ``LinAlgError``, also where it is the cause of a :class:`CaptureError`.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ChanceError(f"{type(error).__name__}: {str(error)[:200]}") from error
    except CaptureError as error:
        if isinstance(error.__cause__, torch.linalg.LinAlgError):
            raise ChanceError(str(error)) from error
        raise


class Watch:
    """Sees whether modules and tensors are still those that a step was captured with.

    Args:
        modules: all of what they hold is watched.
        tensors: further parameters, which belong to no module.
    """

    def __init__(self, modules: Iterable[nn.Module], tensors: Sequence[Tensor]) -> None:
        parts = {id(m): (name, m) for module in modules for name, m in module.named_modules()}
        self._modules = [m for _, m in parts.values()]
        self._dicts = [d for m in self._modules for d in (m._parameters, m._buffers) if d]
        held = {id(t) for d in self._dicts for t in d.values()}
        self._tensors = [t for t in tensors if id(t) not in held]
        self._seen = self._now()
        self._buffers = [(".".join(filter(None, (name, k))), m._buffers, k, b) for name, m in parts.values()
                         for k, b in m._buffers.items()]  # fmt: skip

    def _now(self) -> tuple[list[bool], list[tuple[int, bool]]]:
        tensors = [(t.data_ptr(), t.requires_grad) for t in self._tensors]
        tensors += [(t.data_ptr(), t.requires_grad) for d in self._dicts for t in d.values() if t is not None]
        return [m.training for m in self._modules], tensors

    def is_same(self) -> bool:
        """Whether flags, ``requires_grad`` and the tensors' memory are as they were; some microseconds."""
        return self._now() == self._seen

    def put_back(self) -> list[str]:
        """Put buffers back that others have taken the place of; returns their names."""
        changed = [name for name, place, key, buffer in self._buffers if place.get(key) is not buffer]
        for _, place, key, buffer in self._buffers:
            place[key] = buffer
        return changed
