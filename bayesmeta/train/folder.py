"""The folder of a run: what may be done there, and its log."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bayesmeta.errors import RunFolderError
from bayesmeta.ops.files import discard, reason
from bayesmeta.train.checkpoint import BEST, LAST, PREVIOUS
from bayesmeta.train.lock import LOCK, Job, Lock

CONFIG, LOG = "config.json", "log.jsonl"
_OURS = (CONFIG, LOG, LAST, PREVIOUS, BEST)
#: The folder of TensorBoard's curves within a run's, and what its files are called.
EVENTS, EVENT_FILES = "tensorboard", "events.out.tfevents.*"


def claim(out: str | Path, *, overwrite: bool, resume: bool, job: Job | None = None) -> tuple[Path, Lock]:
    """Prepare the output folder, for this process alone.

    Args:
        out: the folder; created when it is missing.
        overwrite: delete the run that it holds.
        resume: go on with the run that it holds, from the beginning if it ended before its first checkpoint.
        job: that this process is of.

    Returns:
        The folder, and the lock on it, to be released when the run ends.

    Raises:
        RunFolderError: when it holds a run and neither was asked for, when both were, when there is nothing to
            resume, when another run is going on in it, or when it cannot be written.
    """
    path = Path(out)
    if overwrite and resume:
        raise RunFolderError("overwrite and resume exclude each other; give one of them.")
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file; give a folder for the run.")
    if not path.exists() and resume:
        raise RunFolderError(f"{path} holds no run to resume; start without resume.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"The folder {path} cannot be written: {reason(error)}") from error
    began = (path / LOCK).exists()  # by a run that was killed before it wrote anything else
    lock = Lock(path, job)
    try:
        _look(path, overwrite=overwrite, resume=resume, began=began)
        _clear(path, overwrite=overwrite)
    except BaseException:
        lock.release()
        raise
    return path, lock


def has_checkpoint(path: Path) -> bool:
    """Whether there is a state to go on from: a run that ended before its first checkpoint begins again."""
    return (path / LAST).exists() or (path / PREVIOUS).exists()


def _look(path: Path, *, overwrite: bool, resume: bool, began: bool) -> None:
    """Whether what the folder holds is what was asked for; looked at under the lock."""
    holds_run = any((path / name).exists() for name in _OURS)
    if holds_run and not (overwrite or resume):
        raise RunFolderError(
            f"{path} already holds a run. Go on with it (resume=True), replace it (overwrite=True), or choose "
            "another folder."
        )
    if resume and not (holds_run or began):
        raise RunFolderError(f"{path} holds no run to resume; start without resume.")


def _clear(path: Path, *, overwrite: bool) -> None:
    """Delete what a killed process left half written, and the run itself if it shall be, or must, begin again."""
    files = [file for name in _OURS for file in path.glob(f"{name}.tmp*")]
    if overwrite or not has_checkpoint(path):
        files += [*(path / name for name in _OURS), *(path / EVENTS).glob(EVENT_FILES)]
    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"The folder {path} cannot be written: {reason(error)}") from error


class Log:
    """One JSON object a line.

    Args:
        path: the file, or None to keep nothing on disk.
        keep_until: on resume, drop lines of later steps, which will be written again.

    Raises:
        RunFolderError: when it cannot be written.
    """

    def __init__(self, path: Path | None, keep_until: int | None = None) -> None:
        self.path = path
        if path is None:
            return
        kept: list[str] = []
        if keep_until is not None and path.exists():
            kept = [line for line in path.read_text(errors="replace").splitlines() if _step(line) <= keep_until]
        _write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append a line.

        Raises:
            RunFolderError: when it cannot be written.
        """
        if self.path is None:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise RunFolderError(f"{self.path} could not be written: {reason(error)}") from error


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the line that a kill cut short
        return float("inf")


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write the run's configuration as JSON.

    Raises:
        RunFolderError: when it cannot be written.
    """
    _write_text(path / CONFIG, json.dumps(config, indent=2, default=str) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise RunFolderError(f"{path} could not be written: {reason(error)}") from error
    finally:
        discard(temporary)
