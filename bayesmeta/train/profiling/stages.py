"""The stages of a training step, told apart while it runs: drawing, loss, gradient, update, rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch

from bayesmeta.ops.capturing import is_capturing

#: In the order in which they are told, with what they are called.
STAGES = {
    "draw": "draw the tasks",
    "loss": "loss: adapt, forward",
    "gradient": "gradient, its norm",
    "graph": "compiled graph",
    "update": "clip, optimizer",
    "rest": "rest",
}
#: Before a stage's name in a trace.
PREFIX = "bayesmeta: "
#: The whole step in a trace.
STEP = "step"


def switches() -> int:
    """How often the system has so far given a core of this process to another; 0 where it does not tell.

    A step in whose time this has grown was made longer by another process, by milliseconds each time.
    """
    try:
        import resource
    except ImportError:  # not of this system
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Stages:
    """Steps of a run with a clock at the borders of their stages; a context manager, which takes the clocks off again.

    A stage's time is without that of stages inside of it, so that the stages of a step add up to it. What a compiled
    step does in its graph is the stage ``"graph"``.

    Args:
        loop: the run, set up (:class:`~bayesmeta.train.loop.Loop`).
        annotate: mark the stages for torch's profiler too. Then a GPU is not waited for at their borders, since the
            profiler has clocks of its own.
    """

    def __init__(self, loop: Any, *, annotate: bool = False) -> None:
        self.loop, self.annotate = loop, annotate
        self.quiet: list[bool] = []  # of each step that was made: whether no other process came between
        self._parts = [(loop, "sample", "draw"), (loop.method, "loss", "loss")]
        self._parts += [(loop, "_gradient", "gradient"), (loop, "_update", "update")]
        self._waits = loop.device.type == "cuda" and not annotate
        self._stack, self._spent, self._mark = ["rest"], dict.fromkeys(STAGES, 0.0), 0.0

    def __enter__(self) -> Stages:
        self._before = [vars(owner).get(name) for owner, name, _ in self._parts]
        for owner, name, stage in self._parts:
            setattr(owner, name, self._clocked(getattr(owner, name), stage))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for (owner, name, _), before in zip(self._parts, self._before, strict=True):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def step(self) -> dict[str, float]:
        """Make a step; returns the seconds of each stage."""
        self._spent, self._stack = dict.fromkeys(STAGES, 0.0), ["rest"]
        before = switches()
        self._mark = self._clock()
        with self._range(STEP):
            self.loop.advance()
            self._charge()
        self.quiet.append(switches() == before)
        compiler = self.loop.compiler
        if compiler is not None and compiler._now is not None:
            self._spent["graph"], self._spent["gradient"] = self._spent["gradient"], 0.0
        return self._spent

    def _clocked(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if is_capturing():  # what is being recorded as a graph is no stage of its own
                return function(*args, **kwargs)
            with self._in(stage):
                return function(*args, **kwargs)

        return clocked

    @contextmanager
    def _in(self, stage: str) -> Iterator[None]:
        self._charge()
        self._stack.append(stage)
        try:
            with self._range(stage):
                yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        """Put the time since the last border on the account of the stage that ends or is interrupted here."""
        now = self._clock()
        self._spent[self._stack[-1]] += now - self._mark
        self._mark = now

    def _clock(self) -> float:
        if self._waits:
            torch.cuda.synchronize(self.loop.device)
        return time.perf_counter()

    def _range(self, name: str) -> Any:
        return torch.profiler.record_function(PREFIX + name) if self.annotate else nullcontext()
