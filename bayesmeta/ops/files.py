"""Files of tensors and plain values: written whole or not at all, read without running anything from them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from bayesmeta.errors import CheckpointError, RunFolderError


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write so that a reader sees the old file or the new one, never half of one.

    Raises:
        RunFolderError: when the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(f"{path} could not be written: {error}") from error


def read_tensors(path: Path, *, map_location: torch.device | str = "cpu") -> Any:
    """Read with ``weights_only=True``: tensors and plain values, no code.

    Raises:
        CheckpointError: when the file is missing, truncated, or holds anything else.
    """
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    try:
        return torch.load(path, weights_only=True, map_location=map_location)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or ["no detail"])[0][:200]
        raise CheckpointError(
            f"{path} cannot be read; it is truncated or was not written by bayesmeta ({type(error).__name__}: {first})."
        ) from error
