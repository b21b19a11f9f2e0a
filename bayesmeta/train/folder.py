"""The folder of a run: who may write there, and its log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bayesmeta.errors import RunFolderError
from bayesmeta.train.checkpoint import BEST, LAST

CONFIG, LOG = "config.json", "log.jsonl"
_OURS = (CONFIG, LOG, LAST, BEST)
#: The folder of TensorBoard's curves within a run's, and what its files are called.
EVENTS, EVENT_FILES = "tensorboard", "events.out.tfevents.*"


def claim(out: str | Path, *, overwrite: bool, resume: bool) -> Path:
    """Prepare the output folder.

    Args:
        out: the folder; created when it is missing.
        overwrite: delete the run that it holds.
        resume: go on with the run that it holds, from the beginning if it ended before its first checkpoint.

    Raises:
        RunFolderError: when it holds a run and neither was asked for, when both were, when there is nothing to
            resume, or when it cannot be written.
    """
    path = Path(out)
    if overwrite and resume:
        raise RunFolderError("overwrite and resume exclude each other; give one of them.")
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file; give a folder for the run.")
    holds_run = any((path / name).exists() for name in _OURS)
    if holds_run and not (overwrite or resume):
        raise RunFolderError(
            f"{path} already holds a run. Go on with it (--resume), replace it (--overwrite), or choose another folder."
        )
    if resume and not holds_run:
        raise RunFolderError(f"{path} holds no run to resume; start without resume.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if overwrite or not (path / LAST).exists():  # a run that ended before its first checkpoint begins again
            for file in [*(path / name for name in _OURS), *(path / EVENTS).glob(EVENT_FILES)]:
                file.unlink(missing_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunFolderError(f"The folder {path} cannot be written: {error}") from error
    return path


class Log:
    """One JSON object a line.

    Args:
        path: the file, or None to keep nothing on disk.
        keep_until: on resume, drop lines of later steps, which will be written again.
    """

    def __init__(self, path: Path | None, keep_until: int | None = None) -> None:
        self.path = path
        if path is None:
            return
        if keep_until is None:
            path.write_text("")
        elif path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= keep_until]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            shutil.move(temporary, path)

    def write(self, **values: Any) -> None:
        """Append a line."""
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the line that a kill cut short
        return float("inf")


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write the run's configuration as JSON."""
    (path / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n")
