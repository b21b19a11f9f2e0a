"""What the compiler would say about itself while it compiles, and nobody can act on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

#: The logger of inductor's operations, and how the message begins that an operation is called by a slower way.
_LOGGER, _BEGINS = "torch._inductor.ir", "%s is missing a c-shim"


@contextmanager
def without_shim_messages() -> Iterator[None]:
    """Leave out that an operation of linear algebra has no C interface; all else that is logged stays."""

    def says_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_BEGINS)

    logger = logging.getLogger(_LOGGER)
    logger.addFilter(says_other)
    try:
        yield
    finally:
        logger.removeFilter(says_other)
