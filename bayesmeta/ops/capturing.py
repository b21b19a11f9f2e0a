"""Whether the code that runs is being recorded as one graph (:mod:`bayesmeta.train.compilation.capture`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ACTIVE: ContextVar[bool] = ContextVar("bayesmeta_capturing", default=False)


def is_capturing() -> bool:
    """True inside :func:`capturing`: then shapes should not depend on values, if the result is the same without."""
    return _ACTIVE.get()


@contextmanager
def capturing() -> Iterator[None]:
    """Say that what runs inside is being recorded."""
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
