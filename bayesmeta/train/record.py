"""What a run leaves behind while it goes on: log, curves, checkpoints, and a bar on the screen."""

from __future__ import annotations

from pathlib import Path

from bayesmeta.train import checkpoint
from bayesmeta.train.folder import write_config
from bayesmeta.train.journal import Journal, Keeping
from bayesmeta.train.loop import Loop
from bayesmeta.train.restart import job


class Record(Journal):
    """Writes the run of a method down.

    Args:
        loop: the run, set up and, on resume, restored.
        keeping: what is to be left behind.

    Raises:
        RunFolderError: when a folder cannot be written.
    """

    def __init__(self, loop: Loop, keeping: Keeping) -> None:
        self.loop = loop
        writes = loop.ranks.is_first
        super().__init__(keeping, loop.step, writes=writes)
        if self.folder is not None and writes and keeping.resume:
            self._mend_best(self.folder)
        elif self.folder is not None and writes:
            self._write_config(self.folder)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.loop.step

    def _write_config(self, folder: Path) -> None:
        loop = self.loop
        options = {"steps": self.keeping.steps, "device": str(loop.device), **loop.identity()}
        options |= {"ranks": loop.ranks.size} if loop.ranks.size > 1 else {}
        content = {"settings": self.config, "fit": options, "method": checkpoint.fingerprint(loop.method)}
        name = job()
        write_config(folder, content if name is None else content | {"job": name})

    def _mend_best(self, folder: Path) -> None:
        """A run that was killed may have found a best after its last checkpoint: go back to the one known there."""
        if self.loop.validation.best_state is None:
            (folder / checkpoint.BEST).unlink(missing_ok=True)
        else:
            checkpoint.save(folder / checkpoint.BEST, self.loop.best(self.keeping.config))

    def after_step(self) -> None:
        """Note what the step that was just done calls for.

        All ranks come here, measure, and give their states to a checkpoint; the first alone writes.
        """
        loop, keeping = self.loop, self.keeping
        self.bar.update()
        entry: dict[str, float] = {}
        new_best = False
        if self.due(loop.step, keeping.log_every):
            entry = loop.entry()
            self.bar.set_postfix_str(f"loss {entry['loss']:.4g}, rate {entry['rate']:.2g}", refresh=False)
        if loop.validation.batches and self.due(loop.step, loop.validation.every):
            value, new_best = loop.validate()
            entry = (entry or loop.entry()) | {"validation": value}
        if entry:
            loop.history.append(entry)
            loop.ranks.from_first(lambda: self._write(entry, new_best))
        if self.due(loop.step, keeping.checkpoint_every) or loop.validation.stopped:
            self._save()

    def _write(self, entry: dict[str, float], new_best: bool) -> None:
        """The best θ, and the entry."""
        loop = self.loop
        if self.folder is not None and new_best:
            loop.check_finite()
            checkpoint.save(self.folder / checkpoint.BEST, loop.best(self.keeping.config))
        self.write(entry | loop.speed())

    def _save(self) -> None:
        if self.folder is None or self.saved == self.loop.step:
            return
        folder = self.folder
        self.loop.check_finite()
        state = self.loop.state(self.keeping.config)

        def write() -> None:
            self.flush()
            checkpoint.save_last(folder, state)

        self.loop.ranks.from_first(write)
        self.saved = self.loop.step
