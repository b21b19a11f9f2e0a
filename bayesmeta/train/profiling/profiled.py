"""What :func:`~bayesmeta.profile` returns: figures of a training step, as a table, as plain values, and as advice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bayesmeta.errors import RunFolderError
from bayesmeta.ops.files import reason
from bayesmeta.train.bounded import in_words
from bayesmeta.train.profiling.stages import STAGES
from bayesmeta.train.profiling.trace import Operation

#: Operations that the table shows.
SHOWN = 10


@dataclass(frozen=True)
class Stage:
    """A stage of a step: ``draw``, ``loss``, ``gradient``, ``update``, ``rest``, or ``graph`` of a compiled one.

    Attributes:
        name: which.
        seconds: of a step, without stages inside of it.
        operations: calls into torch that no other operation made, of a step.
        peak_bytes: memory on the device, at most, above what is held between steps.
        allocated_bytes: memory that was asked for, given back or not.
    """

    name: str
    seconds: float
    operations: float
    peak_bytes: int
    allocated_bytes: int


@dataclass(frozen=True)
class StepProfile:
    """One way to make a step, eager or compiled.

    Attributes:
        mode: ``"eager"``, or what was given as ``compile=``.
        seconds: of a step without any clock inside: the median.
        timed_seconds: of a step whose stages were timed: their sum. On a GPU it is longer, since each stage is waited
            for.
        stages: in their order; those that took no time are left out.
        operations: by their own time, all of them.
        outside: share of the step in which no operation ran on the host: Python, compiled code.
        kernel_seconds: kernels and copies of a step on a GPU; None on a CPU.
        disturbed: other processes took the core in every step that was timed, so that times are too long. Else the
            steps in which they did are left out.
    """

    mode: str
    seconds: float
    timed_seconds: float
    stages: tuple[Stage, ...]
    operations: tuple[Operation, ...]
    outside: float
    kernel_seconds: float | None = None
    disturbed: bool = False

    @property
    def num_operations(self) -> float:
        """Calls into torch in a step, without those that operations make among themselves."""
        return sum(stage.operations for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Memory of a step, at most, above what is held between steps."""
        return max(stage.peak_bytes for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        """A stage by name; one of no time where the step has none of it."""
        return next((s for s in self.stages if s.name == name), Stage(name, 0.0, 0.0, 0, 0))

    def share(self, name: str) -> float:
        """A stage's share of the step."""
        return self[name].seconds / self.timed_seconds


@dataclass(frozen=True)
class Profile:
    """Where the time and memory of a training step go. Printing it shows a table and advice.

    Attributes:
        what: method and tasks, in words.
        device, threads: where, and by how many threads of the CPU.
        eager: a step without ``compile``.
        compiled: a compiled step; None where it was not asked for, or could not be made.
        compile_report: what became of ``compile=``, in words; None for ``"off"``.
        compile_seconds: capturing and compiling, all graphs; None without.
        held_bytes: what is held between steps: ``parameters``, ``buffers``, ``gradients``, ``optimizer``.
        one_task_seconds: of an eager step of a single task.
        pieces: in which a step's tasks go forward and back (``accumulate=``, ``chunk=``).
        other_threads: seconds of an eager step by another number of threads, where that was tried.
        flops: floating point operations in matrix products and convolutions, in an eager step.
        peak_flops: the most a second that this device reached on a large matrix product.
        validation_seconds: of a pass over the validation tasks, if there are any.
        validate_every: steps between such passes.
        advice: what to do about it, derived from the figures.
    """

    what: str
    device: str
    threads: int
    eager: StepProfile
    compiled: StepProfile | None
    compile_report: str | None
    compile_seconds: float | None
    held_bytes: dict[str, int]
    one_task_seconds: float
    pieces: int
    other_threads: dict[int, float]
    flops: int
    peak_flops: float
    validation_seconds: float | None = None
    validate_every: int | None = None
    advice: tuple[str, ...] = field(default=())

    @property
    def fixed_share(self) -> float:
        """Share of an eager step that a single task costs too: what calling operations costs, not what they compute."""
        return min(1.0, self.pieces * self.one_task_seconds / self.eager.seconds)

    @property
    def break_even(self) -> float | None:
        """Steps after which compiling has paid; None where it was not tried, infinite where it never pays."""
        if self.compiled is None or self.compile_seconds is None:
            return None
        won = self.eager.seconds - self.compiled.seconds
        return self.compile_seconds / won if won > 0 else float("inf")

    def state(self) -> dict[str, Any]:
        """Plain values, for JSON; seconds and bytes."""
        break_even = self.break_even
        state = asdict(self) | {
            "fixed_share": self.fixed_share,
            "break_even": None if break_even == float("inf") else break_even,
        }
        for column in (state["eager"], state["compiled"]):
            if column is not None:
                column["operations"] = column["operations"][: 5 * SHOWN]
        return state

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            RunFolderError: when the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.state(), indent=1) + "\n")
        except OSError as error:
            raise RunFolderError(f"{path} could not be written: {reason(error)}") from error

    def __str__(self) -> str:
        threads = f" with {self.threads} thread(s)" if self.device == "cpu" else ""
        parts = [f"{self.what}, on {self.device}{threads}", _times(self), _memory(self)]
        parts += [_operations(column) for column in (self.eager, self.compiled) if column is not None]
        parts += ["\n".join(_wrapped(line) for line in self.advice)]
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        compiled = "" if self.compiled is None else f", {duration(self.compiled.seconds)} compiled"
        return f"<Profile: {self.what}, {duration(self.eager.seconds)} a step{compiled}>"


# -- the table --------------------------------------------------------------------------------------------------------


def _times(profile: Profile) -> str:
    columns = [c for c in (profile.eager, profile.compiled) if c is not None]
    width = 22
    rows = [f"{'time of a step':<{width}}" + "".join(f"{c.mode:>20}" for c in columns)]
    rows += [f"{'  in all':<{width}}" + "".join(f"{duration(c.seconds):>14}{'':>6}" for c in columns)]
    for name in STAGES:
        if any(c[name].seconds for c in columns):
            cells = [
                f"{duration(c[name].seconds):>14}{c.share(name):>6.0%}" if c[name].seconds else "" for c in columns
            ]
            rows.append(f"{'  ' + STAGES[name]:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    rows.append(f"{'  operations of torch':<{width}}" + "".join(f"{c.num_operations:>14.0f}{'':>6}" for c in columns))
    if any(c.kernel_seconds is not None for c in columns):
        cells = [
            f"{duration(c.kernel_seconds or 0.0):>14}{(c.kernel_seconds or 0.0) / c.seconds:>6.0%}" for c in columns
        ]
        rows.append(f"{'  kernels of the GPU':<{width}}" + "".join(cells))
    rows.append(f"{'of a single task':<{width}}{duration(profile.one_task_seconds):>14}")
    if profile.validation_seconds is not None:
        rows.append(f"{'validation':<{width}}{duration(profile.validation_seconds):>14}")
    return "\n".join(rows)


def _memory(profile: Profile) -> str:
    columns = [c for c in (profile.eager, profile.compiled) if c is not None]
    held = ", ".join(f"{name} {in_words(number)}" for name, number in profile.held_bytes.items() if number)
    rows = [f"{'memory, at most':<22}" + "".join(f"{c.mode:>20}" for c in columns)]
    for name in STAGES:
        if any(c[name].seconds for c in columns):
            cells = [in_words(c[name].peak_bytes) if c[name].seconds else "" for c in columns]
            rows.append(f"{'  ' + STAGES[name]:<22}" + "".join(f"{cell:>14}{'':>6}" for cell in cells))
    return "\n".join([*rows, f"  above what is held between steps: {held}"])


def _operations(column: StepProfile) -> str:
    rows = [f"{'operations, ' + column.mode:<42}{'own time':>10}{'calls':>10}{'each':>12}"]
    for each in column.operations[:SHOWN]:
        name = each.name if len(each.name) <= 38 else each.name[:37] + "…"
        rows.append(f"  {name:<40}{each.share:>10.1%}{each.calls:>10.0f}{duration(each.seconds / each.calls):>12}")
    rows.append(f"  {'outside of operations: Python':<40}{column.outside:>10.1%}")
    return "\n".join(rows)


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def _wrapped(line: str) -> str:
    import textwrap

    return textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  ")
