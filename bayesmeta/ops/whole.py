"""Whole numbers among options."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is an integer (numpy's too), and no truth value, of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
