"""Whole numbers among options."""

from __future__ import annotations

from typing import Any


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is an integer, and no truth value, of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
