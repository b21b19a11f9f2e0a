"""The loop of every meta-RL learner: curves, checkpoints, stopping and going on again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bayesmeta.errors import BayesMetaError, CheckpointError, NonFiniteLossError, OptionError
from bayesmeta.rl.learner import AdaptationCurve, Learner, Remembers
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.run_record import RunRecord
from bayesmeta.train import checkpoint, events
from bayesmeta.train.folder import claim, has_checkpoint
from bayesmeta.train.journal import Keeping
from bayesmeta.train.signals import Signals


@dataclass
class FitResult:
    """What :func:`fit` of a meta-RL learner returns.

    Attributes:
        learner: the trained learner (the very object given).
        history: one dict an iteration: ``step`` and what the learner says of it.
        curves: one dict a validation: ``step``, and for each point of the adaptation ``return_0``, ``return_0_se``, …
        last: the last validation's curve, task by task; None without validation, and where a resumed run had nothing
            left to do.
        iterations: done in all.
        seconds: wall time of this call.
        out: the folder of the run, if any.
    """

    learner: Any
    history: list[dict[str, float]] = field(default_factory=list)
    curves: list[dict[str, float]] = field(default_factory=list)
    last: AdaptationCurve | None = None
    iterations: int = 0
    seconds: float = 0.0
    out: Path | None = None

    def __repr__(self) -> str:
        parts = [type(self.learner).__name__, f"{self.iterations} iterations, {self.seconds:.1f} s"]
        if self.curves:
            names = [name for name in self.curves[-1] if name.startswith("return_") and not name.endswith("_se")]
            parts.append("return " + ", ".join(f"{self.curves[-1][name]:.4g}" for name in names))
        return f"<FitResult: {', '.join(parts)}{'' if self.out is None else f', in {self.out}'}>"


#: What is said at once when a signal comes.
_HEARD = "the iteration is finished and saved first. Another Ctrl-C, after a second, stops at once and loses it alone."


class Run:
    """A learner on its way: what is done, what was seen, and the state to go back to.

    Args:
        learner: to be trained.
        validation: held-out environments; None: no curves.
        points: of the curves, for learners that adapt by gradient steps.
        keeps: whether states are kept to save when an iteration fails.

    Attributes:
        fingerprint: of the learner; nothing of it changes in training.
        kept: ``step``, ``seconds`` and ``curves`` of the last state that was kept.
    """

    def __init__(self, learner: Learner, validation: TaskVectorEnv | None, points: int | None, keeps: bool) -> None:
        self.learner, self.validation, self.points, self.keeps = learner, validation, points, keeps
        self._fresh = None if validation is None else validation.state_dict()
        self.curves: list[dict[str, float]] = []
        self.last: AdaptationCurve | None = None
        self.seconds = 0.0
        self.fingerprint: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        if keeps:
            self._keep()

    @property
    def step(self) -> int:
        """Iterations done."""
        return self.learner.iteration

    def advance(self) -> None:
        """One iteration. When it fails, :meth:`snapshot` is the state before it."""
        begin = time.perf_counter()
        self.learner.train(1)
        self.seconds += time.perf_counter() - begin
        if self.keeps:
            self._keep()

    def measure(self) -> dict[str, float]:
        """The curve on the validation tasks, under the same noise each time; added to ``curves``."""
        assert self.validation is not None
        assert self._fresh is not None
        self.validation.load_state_dict(self._fresh)
        self.last = self.learner.curve(self.validation, points=self.points, generator=0)
        entry = {"step": float(self.step), **curve_entry(self.last)}
        self.curves.append(entry)
        if self.keeps:
            self.kept["curves"] = [dict(row) for row in self.curves]
        return entry

    def _keep(self) -> None:
        """Keep the state of this moment. Replay buffers are copied only where it is asked for."""
        found: Callable[[], dict[str, Any]]
        if isinstance(self.learner, Remembers):
            found = self.learner.remember()
        else:
            state = self.learner.state_dict()
            found = lambda: state  # noqa: E731
        kept = {"curves": [dict(row) for row in self.curves], "step": self.step, "seconds": self.seconds}
        self._learner_state, self.kept = found, kept  # together, and last: a second Ctrl-C may come before
        if not self.fingerprint:
            self.fingerprint = fingerprint(self.learner, self._learner_state())

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint has of the last state that was kept.

        Raises:
            NonFiniteLossError: when it has parameters that are not finite.
        """
        state = self._learner_state()
        for name, value in learned(state).items():
            if not torch.isfinite(value).all():
                raise NonFiniteLossError(
                    f"The parameters {name} are not finite after iteration {self.step}; they were not saved, and the "
                    "last good checkpoint is kept. Try a lower rate.",
                    self.step,
                )
        return {"fingerprint": self.fingerprint, "learner": state, **self.kept}

    def restore(self, folder: Path, *, previous: bool) -> None:
        """Go on from a folder's checkpoint.

        Raises:
            CheckpointError: when it is damaged, or of a learner with other options.
        """
        if previous:
            checkpoint.use_previous(folder)
        path = folder / checkpoint.LAST
        content = checkpoint.load_last(path)
        check_fingerprint(content["fingerprint"], self.fingerprint, path)
        self.learner.load_state_dict(content["learner"])
        self.curves, self.seconds = [dict(row) for row in content["curves"]], content["seconds"]
        self._keep()


def fit(
    learner: Learner,
    *,
    iterations: int | None = None,
    validation: TaskVectorEnv | None = None,
    validate_every: int = 10,
    points: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool | Literal["previous"] = False,
    checkpoint_every: int = 10,
    log_every: int = 1,
    tensorboard: str | Path | bool | None = None,
    progress: bool = True,
    config: dict[str, Any] | None = None,
) -> FitResult:
    """Meta-train a meta-RL learner, as :func:`bayesmeta.fit` trains a method.

    A run that goes on from a checkpoint ends bit for bit as one that was never stopped: policy, optimizer, generators,
    environments and the memory of running trials are in it. Ordinary gymnasium environments (those of
    :class:`~bayesmeta.rl.envs.gym.GymVectorEnv`) are put back by repeating what was done since their trials began.

    Args:
        learner: with its environments, such as :class:`~bayesmeta.rl.memory.rl2.RL2`.
        iterations: in all; a resumed run goes on to this number. None is the learner's own number.
        validation: environments of held-out tasks, on which the curve is measured: the mean return after 0, 1, …
            episodes or gradient steps and its standard error over tasks, with the same tasks and noise each time.
        validate_every: iterations between two curves; there is also one before the first and one after the last.
        points: gradient steps of the curve, for learners that take them; None is as trained.
        out: folder for checkpoints, ``log.jsonl`` and ``config.json``; None keeps nothing.
        overwrite, resume: what to do when ``out`` already holds a run; neither: refuse. ``resume="previous"`` goes on
            from the checkpoint before the last, where the last is damaged.
        checkpoint_every, log_every: iterations between checkpoints and log entries.
        tensorboard: folder for TensorBoard's curves (the extra ``bayesmeta[tensorboard]``); True: ``out/tensorboard``.
        progress: show a bar on standard error.
        config: plain values to store in ``config.json`` and in each checkpoint.

    Returns:
        The learner, its history and the curves.

    Raises:
        EnvCrashError: when an environment fails, naming its task; the iterations before are saved.
        NonFiniteDataError: for a reward that is not finite, naming task and step; likewise.
        NonFiniteLossError: for an update or parameters that are not finite; the last good checkpoint stays.
        KeyboardInterrupt: after Ctrl-C, once the iteration is finished and its checkpoint written; a second one, a
            second or more later, stops within the iteration and saves those before. SIGTERM does as the first and ends
            in SystemExit(143).
        RunFolderError, CheckpointError, OptionError: for folders, checkpoints and options that cannot be used.
    """
    iterations = _check(learner, iterations, validate_every, points, checkpoint_every, log_every, resume, out)
    curves = events.choose(tensorboard, out, overwrite=overwrite, resume=bool(resume))
    begin = time.perf_counter()
    with ExitStack() as stack:
        folder = lock = None
        if out is not None:
            folder, lock = claim(out, overwrite=overwrite, resume=bool(resume))
            stack.callback(lock.release)
        run = Run(learner, validation, points, keeps=folder is not None)
        goes_on = bool(resume) and folder is not None and has_checkpoint(folder)  # else it begins again
        if folder is not None and goes_on:
            run.restore(folder, previous=resume == "previous")
        keeping = Keeping(folder, curves, iterations, log_every, checkpoint_every, progress, overwrite, goes_on, config)
        record = stack.enter_context(RunRecord(run, keeping, validate_every=validate_every))
        signals = stack.enter_context(Signals(_HEARD))
        record.before_first()
        while run.step < iterations:
            if signals.received is not None:
                signals.hold()
                signals.stop(record.interrupt())
            _advance(run, record)
            if lock is not None:
                lock.beat()
    history = [{"step": i, **row} for i, row in enumerate(learner.history, 1)]
    return FitResult(learner, history, run.curves, run.last, run.step, time.perf_counter() - begin, folder)


def _advance(run: Run, record: RunRecord) -> None:
    """An iteration and what it calls for. When it does not end, what was done before is saved, and the error says so.

    A second Ctrl-C ends it, and so does a first one where signals are not ours to handle.
    """
    number = run.step + 1
    try:
        run.advance()
        record.after_step()
    except KeyboardInterrupt:
        told = record.rescue(then="")
        raise KeyboardInterrupt(f"Training was stopped within iteration {number}. {told}") from None
    except Exception as error:
        told = f"This was in iteration {number}. {record.rescue()}"
        if isinstance(error, BayesMetaError):
            error.args = (f"{error} {told}",)
        else:
            error.add_note(told)
        raise


def curve_entry(curve: AdaptationCurve) -> dict[str, float]:
    """A curve as numbers by name: ``return_0``, ``return_0_se``, …, and ``success_0`` and ``length_0`` if known."""
    entry: dict[str, float] = {}
    for point, (mean, error) in enumerate(zip(curve.mean(), curve.standard_error())):
        entry[f"return_{point}"] = mean
        if math.isfinite(error):  # of one task there is none
            entry[f"return_{point}_se"] = error
        if curve.success is not None:
            entry[f"success_{point}"] = float(curve.success[point].mean())
            assert curve.lengths is not None
            entry[f"length_{point}"] = float(curve.lengths[point].mean())
    return entry


def load_learner(path: str | Path, learner: Learner) -> Any:
    """Load what was learned from a checkpoint into a learner built with the same options.

    Args:
        path: a checkpoint file, or the folder of a run.
        learner: its policy is replaced; its environments may be others.

    Returns:
        The learner.

    Raises:
        CheckpointError: for a file that is missing or damaged, or of a learner of another kind or shape.
    """
    path = Path(path)
    content = checkpoint.load(path / checkpoint.LAST if path.is_dir() else path)
    kind = content["fingerprint"].get("options", {}).get("learner")
    if kind != type(learner).__name__:
        raise CheckpointError(f"The checkpoint {path} is of a {kind}; expected a {type(learner).__name__}.")
    learner.load_learned(content["learner"])
    return learner


# -- what belongs together ------------------------------------------------------------------------------------------


def learned(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a learner's state has learned: its policy's parameters, or θ."""
    found = dict(state.get("policy", {}))
    return found | {"theta": state["theta"]} if "theta" in state else found


def fingerprint(learner: Learner, state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's learner must share with the one that goes on: options, environments, parameter shapes.

    Nothing of it changes in training.

    Args:
        learner: whose options count.
        state: its state.
    """
    return {
        "options": learner.options(),
        "environments": state["env"].get("config", {}),
        "parameters": {name: list(value.shape) for name, value in learned(state).items()},
    }


def check_fingerprint(saved: dict[str, Any], mine: dict[str, Any], path: Path) -> None:
    """Compare a checkpoint's fingerprint with a learner's.

    Raises:
        CheckpointError: naming the first difference.
    """
    for part in mine:
        theirs, ours = saved.get(part, {}), mine[part]
        for name in {**theirs, **ours}:
            if theirs.get(name) != ours.get(name):
                raise CheckpointError(
                    f"The checkpoint {path} belongs to a run with other {part}: {name!r} is {theirs.get(name)} there "
                    f"and {ours.get(name)} here. Go on with the options of that run, or choose another folder."
                )


def _check(
    learner: Any, iterations: int | None, validate_every: int, points: int | None, checkpoint_every: int,
    log_every: int, resume: Any, out: Any,
) -> int:  # fmt: skip
    """The number of iterations, after a look at everything."""
    for name in ("train", "curve", "options", "state_dict"):
        if not hasattr(learner, name):
            raise OptionError(
                f"learner is a {type(learner).__name__}, which has no {name}; expected one such as RL2 or MAMLRL."
            )
    most = getattr(learner, "iterations", None)
    iterations = most if iterations is None else iterations
    if iterations is None:
        raise OptionError(f"Give iterations: a {type(learner).__name__} has no number of its own.")
    counts = {"iterations": iterations, "validate_every": validate_every, "checkpoint_every": checkpoint_every}
    for name, value in {**counts, "log_every": log_every, **({} if points is None else {"points": points})}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1; got {value!r}.")
    if most is not None and iterations > most:
        raise OptionError(
            f"iterations={iterations}, but this learner was made for {most}, over which its rates fall; make it with "
            "as many."
        )
    if resume not in (True, False, "previous"):
        raise OptionError(f"resume is {resume!r}; expected True, False or 'previous'.")
    if resume and out is None:
        raise OptionError("resume=True needs out=, the folder of the run to go on with.")
    return iterations
