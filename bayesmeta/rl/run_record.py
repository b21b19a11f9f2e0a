"""What a meta-RL run leaves behind while it goes on: log, curves, checkpoints, and a bar on the screen."""

from __future__ import annotations

import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from bayesmeta.errors import NonFiniteLossError, RunFolderError
from bayesmeta.ops.files import reason
from bayesmeta.train import checkpoint
from bayesmeta.train.events import Events
from bayesmeta.train.folder import Log, write_config


class RunRecord:
    """Writes a run down, iteration by iteration; a context manager, which closes its files and the bar.

    Args:
        run: a :class:`bayesmeta.rl.runs.Run`, on resume restored.
        folder: the run's folder; None keeps nothing.
        curves: the folder of TensorBoard's event files; None for none.
        iterations: in all.
        validate_every, log_every, checkpoint_every: iterations between curves, entries and checkpoints.
        progress: show the bar.
        overwrite: delete event files that are there.
        resume: go on with log and curves after the restored iteration.
        config: plain values for ``config.json`` and the checkpoints.

    Raises:
        RunFolderError: when a folder cannot be written.
    """

    def __init__(
        self,
        run: Any,
        folder: Path | None,
        curves: Path | None,
        *,
        iterations: int,
        validate_every: int,
        log_every: int,
        checkpoint_every: int,
        progress: bool,
        overwrite: bool,
        resume: bool,
        config: dict[str, Any] | None,
    ) -> None:
        self.run, self.folder, self.iterations, self.config = run, folder, iterations, config
        self.validate_every, self.log_every, self.checkpoint_every = validate_every, log_every, checkpoint_every
        kept = run.step if resume else None
        self.saved = kept
        self.log = Log(None if folder is None else folder / "log.jsonl", keep_until=kept)
        self.events = Events(curves, clear=overwrite, resumed_at=kept, tag=_tag)
        if folder is not None and not resume:
            facts = {name: run.snapshot["fingerprint"][name] for name in ("options", "environments")}
            write_config(folder, {"settings": config or {}, "iterations": iterations, **facts})
        self.bar = tqdm(
            total=iterations,
            initial=run.step,
            disable=None if progress else True,
            unit="iteration",
            desc="meta-training",
            ncols=min(shutil.get_terminal_size().columns, 100),
        )

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        with suppress(RunFolderError) if error is not None else nullcontext():
            self._events(self.events.close)

    def before_first(self) -> None:
        """The curve before the first iteration."""
        if self.run.validation is not None and self.run.step == 0 and not self.run.curves:
            self._write(self.run.measure())

    def after_step(self) -> None:
        """Note what the iteration that was just done calls for."""
        run, last = self.run, self.run.step == self.iterations
        self.bar.update()
        entry: dict[str, float] = {}
        if run.step % self.log_every == 0 or last:
            entry = {"step": run.step, **run.learner.history[-1]}
            self.bar.set_postfix_str(_brief(entry), refresh=False)
        if run.validation is not None and (run.step % self.validate_every == 0 or last):
            entry = {"step": run.step, **entry, **run.measure()} | {"step": run.step}
        if entry:
            self._write(entry)
        if run.step % self.checkpoint_every == 0 or last:
            self._save()

    def _write(self, entry: dict[str, float]) -> None:
        entry = {**entry, "seconds": round(self.run.seconds, 6)}
        entry["step"] = int(entry["step"])
        self.log.write(**entry)
        self._events(lambda: self.events.write(entry))

    def _save(self) -> None:
        """Write a checkpoint, if there is a folder and it does not hold this iteration's already."""
        run = self.run
        if self.folder is None or self.saved == run.snapshot["step"]:
            return
        run.check_finite()
        self._events(self.events.flush)
        checkpoint.save_last(self.folder, {**run.snapshot, "config": self.config or {}})
        self.saved = run.snapshot["step"]

    def rescue(self) -> str:
        """Save what was done before an iteration that failed; returns what was kept, in words."""
        if self.folder is None:
            return "There is no folder, so nothing was saved."
        step = self.run.snapshot["step"]
        if step == 0:
            return "There was nothing before it to be saved."
        try:
            self._save()
        except NonFiniteLossError:
            return f"The last good checkpoint is in {self.folder}."
        except RunFolderError as error:
            return f"What was done before could not be saved: {error}"
        return f"All up to iteration {step} is saved in {self.folder}: go on with resume once the cause is gone."

    def interrupt(self) -> str:
        """Save before the process stops; returns what was kept, in words."""
        done = f"after iteration {self.run.step}"
        if self.folder is None:
            return f"{done}; the learner has the parameters of that iteration"
        try:
            self._save()
        except NonFiniteLossError:
            return f"{done}, whose parameters are not finite and were not saved"
        return f"{done}; its checkpoint is in {self.folder}: go on with resume"

    def _events(self, call: Any) -> None:
        try:
            call()
        except OSError as error:
            raise RunFolderError(f"TensorBoard's curves could not be written: {reason(error)}") from error


def _tag(name: str) -> str | None:
    """The curve of a value in TensorBoard."""
    if name in ("step", "seconds"):
        return None
    measured = name.startswith(("return_", "success_", "length_"))
    return f"{'validation' if measured else 'train'}/{name}"


def _brief(entry: dict[str, float]) -> str:
    """What the bar shows."""
    shown = [name for name in ("reward", "before", "after") if name in entry]
    return ", ".join(f"{name} {entry[name]:.4g}" for name in shown)
