"""What torch's profiler saw of some steps: operations, memory and kernels, read from the trace that it exports."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesmeta.train.profiling.stages import PREFIX, STAGES, STEP

#: What runs on a GPU, by the profiler's categories.
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
#: How names that start so are said.
_NAMES = {"autograd::engine::evaluate_function: ": "autograd engine", "## Call CompiledFxGraph": "compiled code"}
#: What the profiler's own code writes on standard error at each start.
_NOISE = ("USDT:", "Memory block of unknown size was allocated before the profiling started")


@dataclass(frozen=True)
class Operation:
    """An operation of torch, over all its calls.

    Attributes:
        name: as torch's profiler calls it.
        share: of the step: its own time, without that of operations that it calls.
        calls: in a step, on average.
        seconds: its own time in a step: ``share`` of the time that a step takes without the profiler.
    """

    name: str
    share: float
    calls: float
    seconds: float


@dataclass(frozen=True)
class Trace:
    """The trace of some steps.

    Attributes:
        operations: by their own time, the longest first; ``seconds`` are those under the profiler.
        counts: by stage, operations that no other operation has called; of a step on average.
        peaks: by stage, bytes on the device, at most, above what was there when the step began.
        allocated: by stage, bytes that were asked for in a step, at most, given back or not.
        outside: share of the step in which no operation ran on the host: Python, compiled code.
        kernel_seconds: of a step, kernels and copies on the GPU; None where there are none.
    """

    operations: tuple[Operation, ...]
    counts: dict[str, float]
    peaks: dict[str, int]
    allocated: dict[str, int]
    outside: float
    kernel_seconds: float | None


def read(path: Path, *, quiet: Sequence[bool], cuda: bool = False) -> Trace:
    """Read the trace of steps that :class:`~bayesmeta.train.profiling.stages.Stages` has annotated.

    The first step is left out: in it the profiler starts, and it frees what the profiler has not seen come.

    Args:
        path: a trace in Chrome's format, as ``torch.profiler.profile.export_chrome_trace`` writes it.
        quiet: for each step, whether no other process came between; times are those of such steps, or of the shortest
            where there are none.
        cuda: whether it is the GPU's memory that matters.
    """
    events = json.loads(path.read_text())["traceEvents"]
    marks = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)]
    steps = _spans(e for e in marks if e["name"] == PREFIX + STEP)[1:]
    timed = [span for span, good in zip(steps, quiet[1:], strict=True) if good]
    timed = timed or [min(steps, key=lambda span: span[1] - span[0])]
    ops = [e for e in events if e.get("cat") == "cpu_op" and _within(e["ts"], steps)]
    heard = [e for e in ops if _within(e["ts"], timed)]
    total = sum(end - start for start, end in timed)
    stages = _Timeline(marks)
    kernels = [e["dur"] for e in events if e.get("cat") in _KERNELS]
    memory = [_memory(events, step, stages, 1 if cuda else 0) for step in steps]
    return Trace(
        _own_times(heard, total, len(timed)),
        {name: number / len(steps) for name, number in _count(ops, stages).items()},
        {name: max(peaks[name] for peaks, _ in memory) for name in STAGES},
        {name: max(allocated[name] for _, allocated in memory) for name in STAGES},
        outside=max(0.0, 1 - _covered(_spans(heard)) / total),
        kernel_seconds=sum(kernels) / (len(steps) + 1) / 1e6 if kernels else None,
    )


def _spans(events: Any) -> list[tuple[float, float]]:
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in events)


def _within(moment: float, spans: Sequence[tuple[float, float]]) -> bool:
    index = bisect_right(spans, (moment, float("inf"))) - 1
    return index >= 0 and moment <= spans[index][1]


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, -float("inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class _Timeline:
    """Which stage it is at a moment: the innermost."""

    def __init__(self, marks: Sequence[Any]) -> None:
        self.moments, self.names = [-float("inf")], ["rest"]
        stack: list[tuple[str, float]] = []
        for mark in sorted(marks, key=lambda e: (e["ts"], -e["dur"])):
            self._close(stack, mark["ts"])
            name = mark["name"].removeprefix(PREFIX)
            self._note(mark["ts"], "rest" if name == STEP else name)
            stack.append((self.names[-1], mark["ts"] + mark["dur"]))
        self._close(stack, float("inf"))

    def _close(self, stack: list[tuple[str, float]], moment: float) -> None:
        while stack and stack[-1][1] <= moment:
            _, end = stack.pop()
            self._note(end, stack[-1][0] if stack else "rest")

    def _note(self, moment: float, name: str) -> None:
        self.moments.append(moment)
        self.names.append(name)

    def at(self, moment: float) -> str:
        return self.names[bisect_right(self.moments, moment) - 1]


def _own_times(ops: Sequence[Any], total: float, count: int) -> tuple[Operation, ...]:
    """Time of each kind of operation without that of what it calls on the same thread."""
    own: dict[str, float] = {}
    calls: dict[str, int] = {}
    for name, time in _exclusive(ops):
        name = next((said for start, said in _NAMES.items() if name.startswith(start)), name)
        own[name] = own.get(name, 0.0) + time
        calls[name] = calls.get(name, 0) + 1
    ordered = sorted(own, key=lambda name: -own[name])
    return tuple(Operation(n, own[n] / total, calls[n] / count, own[n] / count / 1e6) for n in ordered)


def _exclusive(ops: Sequence[Any]) -> Iterator[tuple[str, float]]:
    for nested in _nested(ops):
        for event, children in nested:
            yield event["name"], max(0.0, event["dur"] - sum(child["dur"] for child in children))


def _nested(ops: Sequence[Any]) -> Iterator[list[tuple[Any, list[Any]]]]:
    """For each thread its operations, each with those that it calls itself."""
    for thread in {e["tid"] for e in ops}:
        found: list[tuple[Any, list[Any]]] = []
        stack: list[tuple[Any, list[Any]]] = []
        for event in sorted((e for e in ops if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
            while stack and event["ts"] >= stack[-1][0]["ts"] + stack[-1][0]["dur"]:
                stack.pop()
            if stack:
                stack[-1][1].append(event)
            stack.append((event, []))
            found.append(stack[-1])
        yield found


def _count(ops: Sequence[Any], stages: _Timeline) -> dict[str, int]:
    """Operations of ATen that no other one has called, by stage."""
    counts = dict.fromkeys(STAGES, 0)
    for thread in {e["tid"] for e in ops}:
        reached = -float("inf")
        for event in sorted((e for e in ops if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
            if event["name"].startswith("aten::") and event["ts"] >= reached:
                reached = event["ts"] + event["dur"]
                counts[stages.at(event["ts"])] += 1
    return counts


def _memory(
    events: Sequence[Any], step: tuple[float, float], stages: _Timeline, kind: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Peak above the step's beginning and bytes asked for, by stage."""
    peaks, allocated = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
    borders = [(moment, 0) for moment in stages.moments]  # a stage begins with what is there
    changes = [
        (e["ts"], int(e["args"]["Bytes"]))
        for e in events
        if e.get("name") == "[memory]" and e["args"].get("Device Type", 0) == kind
    ]
    live = 0
    for moment, number in sorted([*borders, *changes]):
        if step[0] <= moment <= step[1]:
            stage = stages.at(moment)
            live += number
            peaks[stage] = max(peaks[stage], live)
            allocated[stage] += max(number, 0)
    return peaks, allocated


@contextmanager
def trace_file(keep: Path | None) -> Iterator[Path]:
    """Where a trace goes: a file that is kept, or one that is deleted again."""
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="bayesmeta-") as folder:
        yield Path(folder) / "trace.json"


@contextmanager
def without_noise() -> Iterator[None]:
    """Keep off the screen what the profiler's own code writes on standard error; all else comes after."""
    try:
        shown = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines(keepends=True):
                if not any(noise in line for noise in _NOISE):
                    sys.stderr.write(line)
