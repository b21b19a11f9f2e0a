"""Curves for TensorBoard, where the package is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bayesmeta.errors import OptionError, RunFolderError
from bayesmeta.train.folder import EVENT_FILES, EVENTS

#: The curve of each value of a log entry.
TAGS = {
    "loss": "train/loss",
    "rate": "train/rate",
    "gradient_norm": "train/gradient_norm",
    "validation": "validation/value",
    "seconds": "speed/seconds",
    "tasks_per_second": "speed/tasks_per_second",
}


def writer_class() -> Any:
    """torch's ``SummaryWriter``.

    Raises:
        OptionError: naming the extra, when TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OptionError(
            f"tensorboard= needs the package tensorboard, which is not here ({error}). Install the extra: "
            "pip install 'bayesmeta[tensorboard]'."
        ) from error
    return SummaryWriter


def choose(
    tensorboard: str | Path | bool | None, out: str | Path | None, *, overwrite: bool, resume: bool
) -> Path | None:
    """The folder of the curves, looked at before anything is written; None for none.

    Raises:
        OptionError: for anything but a folder or True, True without ``out``, and a missing package.
        RunFolderError: when it is a file, or holds curves of another run and neither option says what to do.
    """
    if tensorboard is None or tensorboard is False:
        return None
    if not isinstance(tensorboard, str | Path | bool):
        raise OptionError(
            f"tensorboard is a {type(tensorboard).__name__}; expected a folder, or True for out/{EVENTS}."
        )
    if tensorboard is True and out is None:
        raise OptionError(f"tensorboard=True writes to out/{EVENTS} and needs out=; or give a folder.")
    writer_class()
    folder = Path(out) / EVENTS if isinstance(tensorboard, bool) and out is not None else Path(str(tensorboard))
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; give a folder for TensorBoard.")
    if any(folder.glob(EVENT_FILES)) and not (overwrite or resume):
        raise RunFolderError(
            f"{folder} already holds curves, and two runs in one folder cannot be told apart. Go on with that run "
            "(resume), replace it (overwrite), or choose another folder."
        )
    return folder


class Events:
    """Writes log entries as curves.

    Args:
        folder: where the event files go; None: nowhere.
        clear: delete the event files that it holds.
        resumed_at: the step that a resumed run goes on from. What was written of later steps is struck out.
        tag: the curve of a value, by its name; None for a value without one.

    Raises:
        RunFolderError: when the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        clear: bool = False,
        resumed_at: int | None = None,
        tag: Callable[[str], str | None] = TAGS.get,
    ) -> None:
        self._writer: Any = None
        self._tag = tag
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if clear:
                for file in folder.glob(EVENT_FILES):
                    file.unlink()
            self._writer = writer_class()(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)
        except OSError as error:
            raise RunFolderError(f"The folder {folder} cannot be written: {error}") from error

    def write(self, entry: Mapping[str, float]) -> None:
        """Add a point to the curve of each value."""
        if self._writer is None:
            return
        for name, value in entry.items():
            tag = self._tag(name)
            if tag is not None:
                self._writer.add_scalar(tag, value, int(entry["step"]))

    def flush(self) -> None:
        """Bring to disk what is waiting, so that the curves reach as far as a checkpoint."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and end the writer's thread."""
        if self._writer is not None:
            self._writer.close()
