"""What a meta-RL run leaves behind while it goes on: log, curves, checkpoints, and a bar on the screen."""

from __future__ import annotations

import sys
import time
from typing import Any, ClassVar

from tqdm import tqdm

from bayesmeta.errors import NonFiniteLossError, RunFolderError
from bayesmeta.train import checkpoint
from bayesmeta.train.folder import write_config
from bayesmeta.train.journal import Journal, Keeping

#: Seconds after which it is said how long the rest will take, and how long that must be to be worth a line.
_SURE, _LONG = 5.0, 20.0


class RunRecord(Journal):
    """Writes the run of a learner down, and says once how long the rest will take.

    Args:
        run: a :class:`bayesmeta.rl.runs.Run`, on resume restored.
        keeping: what is to be left behind.
        validate_every: iterations between curves.

    Raises:
        RunFolderError: when a folder cannot be written.
    """

    unit: ClassVar[str] = "iteration"
    trains: ClassVar[str] = "learner"

    def __init__(self, run: Any, keeping: Keeping, *, validate_every: int) -> None:
        self.run, self.validate_every = run, validate_every
        super().__init__(keeping, run.step, tag=_tag)
        self._began: tuple[int, float] | None = None  # behind the first iteration, which is slower
        self._told = False
        if self.folder is not None and not keeping.resume:
            facts = {name: run.fingerprint[name] for name in ("options", "environments")}
            write_config(self.folder, {"settings": self.config, "iterations": keeping.steps, **facts})

    @property
    def step(self) -> int:
        """Iterations done."""
        return int(self.run.step)

    def before_first(self) -> None:
        """The curve before the first iteration."""
        if self.run.validation is not None and self.run.step == 0 and not self.run.curves:
            self._write(self.run.measure())

    def after_step(self) -> None:
        """Note what the iteration that was just done calls for."""
        run, keeping = self.run, self.keeping
        self.bar.update()
        entry: dict[str, float] = {}
        if self.due(run.step, keeping.log_every):
            entry = {"step": run.step, **run.learner.history[-1]}
            self.bar.set_postfix_str(_brief(entry), refresh=False)
        if run.validation is not None and self.due(run.step, self.validate_every):
            entry = {"step": run.step, **entry, **run.measure()} | {"step": run.step}
        if entry:
            self._write(entry)
        if self.due(run.step, keeping.checkpoint_every):
            self._save()
        self._foretell()

    def _foretell(self) -> None:
        """Say once, on standard error and no terminal needed, how long the rest will take at the pace so far."""
        now = time.monotonic()
        if self._began is None:
            self._began = (self.run.step, now)
        step, begin = self._began
        done = self.run.step - step
        if not self.keeping.progress or self._told or not done or now - begin < _SURE:
            return
        self._told = True
        rest = (self.keeping.steps - self.run.step) * (now - begin) / done
        if rest >= _LONG:
            with tqdm.external_write_mode():  # not into the bar
                told = f"iteration {self.run.step} of {self.keeping.steps}; about {spoken(rest)} to go at this pace"
                print(told, file=sys.stderr, flush=True)

    def _write(self, entry: dict[str, float]) -> None:
        self.write({**entry, "step": int(entry["step"]), "seconds": round(self.run.seconds, 6)})

    def _save(self) -> None:
        run = self.run
        if self.folder is None or self.saved == run.kept["step"]:
            return
        snapshot = run.snapshot()
        self.flush()
        checkpoint.save_last(self.folder, {**snapshot, "config": self.config})
        self.saved = snapshot["step"]

    def rescue(self, then: str = "once the cause is gone") -> str:
        """Save what was done before an iteration that did not end; returns what was kept, in words.

        Args:
            then: when the run can go on, in words.
        """
        if self.folder is None:
            return "There is no folder, so nothing was saved."
        step = self.run.kept["step"]
        if step == 0:
            return "There was nothing before it to be saved."
        try:
            self._save()
        except NonFiniteLossError:
            return f"The last good checkpoint is in {self.folder}."
        except RunFolderError as error:
            return f"What was done before could not be saved: {error}"
        return f"All up to iteration {step} is saved in {self.folder}: go on with resume{' ' * bool(then)}{then}."


def spoken(seconds: float) -> str:
    """A time in words, to about a tenth."""
    for size, unit in ((3600.0, "hour"), (60.0, "minute")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}s" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}s"
    return f"{seconds:.0f} seconds"


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
