"""The files and the bar of a run: what every loop writes in the same way."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from tqdm import tqdm

from bayesmeta.errors import NonFiniteLossError, RunFolderError
from bayesmeta.ops.files import reason
from bayesmeta.train.events import TAGS, Events
from bayesmeta.train.folder import Log


@dataclass(frozen=True)
class Keeping:
    """What a run is to leave behind, and how often.

    Attributes:
        folder: of the run; None keeps nothing.
        curves: the folder of TensorBoard's event files; None for none.
        steps: in all.
        log_every, checkpoint_every: steps between entries and checkpoints.
        progress: show the bar.
        overwrite: delete event files that are there.
        resume: go on with log and curves after the restored step.
        config: plain values for ``config.json`` and the checkpoints.
    """

    folder: Path | None
    curves: Path | None
    steps: int
    log_every: int
    checkpoint_every: int
    progress: bool
    overwrite: bool
    resume: bool
    config: dict[str, Any] | None


class Journal(ABC):
    """Writes a run down, step by step; a context manager, which closes its files and the bar.

    Args:
        keeping: what is to be left behind.
        done: steps that a restored run has done.
        writes: whether this process is the one that writes.
        tag: the curve of a value in TensorBoard, by its name; None for a value without one.

    Raises:
        RunFolderError: when a folder cannot be written.
    """

    #: What a step is called, and what is trained.
    unit: ClassVar[str] = "step"
    trains: ClassVar[str] = "method"

    def __init__(
        self, keeping: Keeping, done: int, *, writes: bool = True, tag: Callable[[str], str | None] = TAGS.get
    ) -> None:
        self.keeping, self.folder, self.config = keeping, keeping.folder, keeping.config or {}
        kept = done if keeping.resume else None
        self.saved = kept  # the step of the last checkpoint
        self.log = Log(None if self.folder is None or not writes else self.folder / "log.jsonl", keep_until=kept)
        self.events = Events(keeping.curves if writes else None, clear=keeping.overwrite, resumed_at=kept, tag=tag)
        self.bar = tqdm(
            total=keeping.steps,
            initial=done,
            disable=None if keeping.progress and writes else True,
            unit=self.unit,
            desc="meta-training",
            ncols=min(shutil.get_terminal_size().columns, 100),  # 80 where the terminal has no size
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        with suppress(RunFolderError) if error is not None else nullcontext(), _disk():
            self.events.close()

    def due(self, step: int, every: int) -> bool:
        """Whether something that comes every so many steps, and behind the last, comes now."""
        return step % every == 0 or step == self.keeping.steps

    def write(self, entry: Mapping[str, float]) -> None:
        """A line of the log and a point of each curve."""
        self.log.write(**entry)
        with _disk():
            self.events.write(entry)

    def flush(self) -> None:
        """Bring the curves to disk as far as a checkpoint reaches."""
        with _disk():
            self.events.flush()

    @property
    @abstractmethod
    def step(self) -> int:
        """Steps done."""

    @abstractmethod
    def _save(self) -> None:
        """Write a checkpoint, if there is a folder and it does not hold this step's already."""

    def interrupt(self) -> str:
        """Save before the process stops; returns what was kept, in words."""
        done = f"after {self.unit} {self.step}"
        if self.folder is None:
            return f"{done}; the {self.trains} has the parameters of that {self.unit}"
        try:
            self._save()
        except NonFiniteLossError:
            return f"{done}, whose parameters are not finite and were not saved"
        return f"{done}; its checkpoint is in {self.folder}: go on with resume"


@contextmanager
def _disk() -> Iterator[None]:
    """A full disk, or another error of the system, as a typed one."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"TensorBoard's curves could not be written: {reason(error)}") from error
