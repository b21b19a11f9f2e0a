"""What a run leaves behind while it goes on: log, curves, checkpoints, and a bar on the screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from bayesmeta.errors import NonFiniteLossError, RunFolderError
from bayesmeta.ops.files import reason
from bayesmeta.train import checkpoint
from bayesmeta.train.events import Events
from bayesmeta.train.folder import Log, write_config
from bayesmeta.train.loop import Loop
from bayesmeta.train.restart import job


class Record:
    """Writes a run down, step by step; a context manager, which closes its files and the bar.

    Args:
        loop: the run, set up and, on resume, restored.
        folder: the run's folder; None keeps nothing.
        curves: the folder of TensorBoard's event files; None for none.
        steps: steps in all.
        log_every, checkpoint_every: steps between entries and checkpoints.
        progress: show the bar.
        overwrite: delete event files that are there.
        resume: go on with log and curves after the restored step.
        config: plain values for ``config.json`` and the checkpoints.

    Raises:
        RunFolderError: when a folder cannot be written.
    """

    def __init__(
        self,
        loop: Loop,
        folder: Path | None,
        curves: Path | None,
        *,
        steps: int,
        log_every: int,
        checkpoint_every: int,
        progress: bool,
        overwrite: bool,
        resume: bool,
        config: dict[str, Any] | None,
    ) -> None:
        self.loop, self.folder, self.steps, self.config = loop, folder, steps, config
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.saved = loop.step if resume else None
        kept = loop.step if resume else None
        writes = loop.ranks.is_first
        self.log = Log(None if folder is None or not writes else folder / "log.jsonl", keep_until=kept)
        self.events = Events(curves if writes else None, clear=overwrite, resumed_at=kept)
        if folder is not None and writes and resume:
            self._mend_best(folder)
        elif folder is not None and writes:
            self._write_config(folder)
        self.bar = tqdm(
            total=steps,
            initial=loop.step,
            disable=None if progress and writes else True,
            unit="step",
            desc="meta-training",
            ncols=min(shutil.get_terminal_size().columns, 100),  # 80 where the terminal has no size
        )

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        with suppress(RunFolderError) if error is not None else nullcontext(), _disk("TensorBoard's curves"):
            self.events.close()

    def _write_config(self, folder: Path) -> None:
        loop = self.loop
        options = {"steps": self.steps, "device": str(loop.device), **loop.identity()}
        options |= {"ranks": loop.ranks.size} if loop.ranks.size > 1 else {}
        content = {"settings": self.config or {}, "fit": options, "method": checkpoint.fingerprint(loop.method)}
        name = job()
        write_config(folder, content if name is None else content | {"job": name})

    def _mend_best(self, folder: Path) -> None:
        """A run that was killed may have found a best after its last checkpoint: go back to the one known there."""
        if self.loop.validation.best_state is None:
            (folder / checkpoint.BEST).unlink(missing_ok=True)
        else:
            checkpoint.save(folder / checkpoint.BEST, self.loop.best(self.config))

    def after_step(self) -> None:
        """Note what the step that was just done calls for.

        All ranks come here, measure, and give their states to a checkpoint; the first alone writes.
        """
        loop = self.loop
        self.bar.update()
        last = loop.step == self.steps
        entry: dict[str, float] = {}
        new_best = False
        if loop.step % self.log_every == 0 or last:
            entry = loop.entry()
            self.bar.set_postfix_str(f"loss {entry['loss']:.4g}, rate {entry['rate']:.2g}", refresh=False)
        if loop.validation.batches and (loop.step % loop.validation.every == 0 or last):
            value, new_best = loop.validate()
            entry = (entry or loop.entry()) | {"validation": value}
        if entry:
            loop.history.append(entry)
            loop.ranks.from_first(lambda: self._write(entry, new_best))
        if loop.step % self.checkpoint_every == 0 or last or loop.validation.stopped:
            self._save()

    def _write(self, entry: dict[str, float], new_best: bool) -> None:
        """The best θ, and a line of the log and a point of each curve."""
        loop = self.loop
        if self.folder is not None and new_best:
            loop.check_finite()
            checkpoint.save(self.folder / checkpoint.BEST, loop.best(self.config))
        timed = entry | loop.speed()
        self.log.write(**timed)
        with _disk("TensorBoard's curves"):
            self.events.write(timed)

    def _save(self) -> None:
        """Write a checkpoint, if there is a folder and it does not hold this step's already."""
        if self.folder is None or self.saved == self.loop.step:
            return
        folder = self.folder
        self.loop.check_finite()
        state = self.loop.state(self.config)

        def write() -> None:
            with _disk("TensorBoard's curves"):
                self.events.flush()
            checkpoint.save_last(folder, state)

        self.loop.ranks.from_first(write)
        self.saved = self.loop.step

    def interrupt(self) -> str:
        """Save before the process stops; returns what was kept, in words."""
        done = f"after step {self.loop.step}"
        if self.folder is None:
            return f"{done}; the method has the parameters of that step"
        try:
            self._save()
        except NonFiniteLossError:
            return f"{done}, whose parameters are not finite and were not saved"
        return f"{done}; its checkpoint is in {self.folder}: go on with resume"


@contextmanager
def _disk(what: str) -> Iterator[None]:
    """A full disk, or another error of the system, as a typed one."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{what} could not be written: {reason(error)}") from error
