"""Checkpoints: atomic, checked, and loaded without running anything from the file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from bayesmeta.errors import CheckpointError, RunFolderError
from bayesmeta.ops.files import discard, read_tensors, reason, write_tensors

FORMAT = 1
LAST, PREVIOUS, BEST = "checkpoint.pt", "checkpoint.previous.pt", "best.pt"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, atomically.

    Raises:
        RunFolderError: when the folder cannot be written.
    """
    write_tensors(path, content | {"format": FORMAT})


def save_last(folder: Path, content: dict[str, Any]) -> None:
    """Write a run's last checkpoint, and keep the one before it: at every moment there is a whole one.

    Raises:
        RunFolderError: when the folder cannot be written.
    """
    last = folder / LAST
    if last.exists():
        _give_name(last, folder / PREVIOUS)
    save(last, content)


def use_previous(folder: Path) -> None:
    """Put the checkpoint before the last in the last one's place."""
    _give_name(folder / PREVIOUS, folder / LAST)


def _give_name(path: Path, name: Path) -> None:
    """A second name for a file, in place of what had it: at once, and without a copy where the disk can."""
    temporary = name.with_name(f"{name.name}.tmp{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, name)
    except OSError as error:
        raise RunFolderError(f"{name} could not be written: {reason(error)}") from error
    finally:
        discard(temporary)


def load_last(path: Path, *, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a run's last checkpoint, ``folder / LAST``.

    Raises:
        CheckpointError: when it is missing or damaged, saying whether the one before it is good. It is not taken in
            silence.
    """
    try:
        return load(path, map_location=map_location)
    except CheckpointError as error:
        previous = path.with_name(PREVIOUS)
        try:
            step = load(previous)["step"]
        except CheckpointError:
            raise error from None
        raise CheckpointError(
            f"{error} The one before it, {previous}, is good, of step {step}: go on from it by "
            f"resume='previous', or put it in place of {LAST} and resume."
        ) from error


def load(path: Path, *, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values, no code.

    Raises:
        CheckpointError: when it is missing, truncated, or of another format.
    """
    content = read_tensors(path, map_location=map_location)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"The checkpoint {path} has format {found}; this version reads format {FORMAT}.")
    return content


def fingerprint(method: Any) -> dict[str, Any]:
    """What a checkpoint's method must share with the one it is loaded into: kind, options and parameter shapes."""
    config = method.config() if hasattr(method, "config") else {}
    return {
        "method": type(method).__name__,
        "config": config,
        "parameters": {name: list(value.shape) for name, value in method.state_dict().items()},
    }


def check_fingerprint(saved: dict[str, Any], method: Any, path: Path) -> None:
    """Compare a checkpoint's fingerprint with a method.

    Raises:
        CheckpointError: naming the first difference.
    """
    mine = fingerprint(method)
    for key in ("method", "config", "parameters"):
        if saved.get(key) == mine[key]:
            continue
        theirs, ours = saved.get(key), mine[key]
        if isinstance(theirs, dict) and isinstance(ours, dict):
            names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
            name = names[0]
            raise CheckpointError(
                f"The checkpoint {path} belongs to another model: {key} {name!r} is {theirs.get(name)} in the "
                f"checkpoint and {ours.get(name)} here. Build the model with the options of that run."
            )
        raise CheckpointError(f"The checkpoint {path} belongs to {key} {theirs}; here it is {ours}.")


def load_method(path: str | Path, method: Any, batch: Any) -> Any:
    """Load θ from a checkpoint into a method built with the same options.

    Args:
        path: a checkpoint file, or the folder of a run (its best checkpoint, else its last).
        method: the method; its parameters are replaced.
        batch: any batch of the right widths, from which parameters get their shapes.

    Returns:
        The method.

    Raises:
        CheckpointError: for a file that is missing or damaged, or of another model.
    """
    path = Path(path)
    if path.is_dir():
        path = path / BEST if (path / BEST).exists() else path / LAST
    content = load(path)
    method.prepare(batch)
    check_fingerprint(content["fingerprint"], method, path)
    method.load_state_dict(content["method"])
    return method
