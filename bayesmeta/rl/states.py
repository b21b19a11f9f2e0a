"""States of learners: tensors and plain values, copied and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import CheckpointError


def load_networks(module: torch.nn.Module, state: Mapping[str, Tensor], other: str = "other networks") -> None:
    """Load parameters by name.

    Args:
        module: that takes them.
        state: the parameters.
        other: what a state of other shapes belongs to, as the message says it.

    Raises:
        CheckpointError: naming the first of another shape.
    """
    mine = {name: value.shape for name, value in module.state_dict().items()}
    theirs = {name: value.shape for name, value in state.items()}
    if mine != theirs:
        name = next(n for n in {**theirs, **mine} if theirs.get(n) != mine.get(n))
        raise CheckpointError(
            f"The state belongs to {other}: {name!r} is {theirs.get(name)} there and {mine.get(name)} here."
        )
    module.load_state_dict(state)


def copied(content: Any) -> Any:
    """Nested containers with their tensors cloned."""
    if isinstance(content, Tensor):
        return content.clone()
    if isinstance(content, dict):
        return {key: copied(value) for key, value in content.items()}
    if isinstance(content, list):
        return [copied(value) for value in content]
    return content
