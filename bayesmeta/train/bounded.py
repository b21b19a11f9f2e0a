"""``memory=`` of :func:`~bayesmeta.fit`: how many tasks at a time keep a step within so many bytes."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bayesmeta.errors import OptionError
from bayesmeta.ops.peak import PeakMemory
from bayesmeta.ops.random import forked_rng
from bayesmeta.train.memory import is_memory

if TYPE_CHECKING:
    from bayesmeta.train.loop import Loop

_UNITS = {"b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for i in ("", "i")
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", re.IGNORECASE)

#: Of a bound that tensors may take; the rest is for an allocator's rounding and small blocks.
SHARE = 0.95


def as_bytes(memory: int | str) -> int:
    """A number of bytes, or a text such as ``"2GiB"`` or ``"500 MB"``, in bytes.

    Raises:
        OptionError: for anything else, and less than one byte.
    """
    if isinstance(memory, int) and not isinstance(memory, bool):
        size = memory
    else:
        found = _SIZE.fullmatch(memory) if isinstance(memory, str) else None
        if found is None or found[2].lower() not in _UNITS:
            raise OptionError(
                f"memory={memory!r}; expected bytes as a whole number, or a text such as '2GiB', '500MB'."
            )
        size = int(float(found[1]) * _UNITS[found[2].lower()])
    if size < 1:
        raise OptionError(f"memory={memory!r}; expected at least one byte.")
    return size


def in_words(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def chunk_within(memory: int, tasks: int, measure: Callable[[int], float]) -> int:
    """The most tasks at a time, of ``tasks``, with which a step stays within ``memory``.

    What a step takes is nearly a line in the tasks at a time. Two points of it give a guess, which is measured as well
    and moved until it holds.

    Args:
        memory: bytes.
        tasks: of a batch.
        measure: bytes of a step with so many tasks at a time; infinity where it did not run through.

    Raises:
        OptionError: when one task at a time takes more.
    """
    low, at_low = 1, measure(1)
    if at_low > memory:
        needs = "more than there is" if math.isinf(at_low) else in_words(at_low)
        raise OptionError(
            f"memory is {in_words(memory)}, and a step takes {needs} with one task at a time (of which the {tasks} "
            "tasks of a batch, as they are drawn, are a part). Give it more, take fewer tasks a step and accumulate=, "
            "fewer shots, or checkpoint_inner=True."
        )
    high, failed = tasks + 1, False  # the fewest known not to fit, and whether some did not run through
    guess = min(tasks, 8)
    while low < guess < high and high - low > low // 32:
        at = measure(guess)
        slope = (at - at_low) / (guess - low)
        failed = failed or math.isinf(at)
        creeps = high <= tasks and guess - low < (high - low) // 8  # as a line does where the memory is none
        if at <= memory:
            low, at_low = guess, at
        else:
            high = guess
        room = high - 1 - low
        if failed or (creeps and at <= memory):
            guess = low + (room + 1) // 2
        else:
            guess = low + (room if slope <= 0 else int(min((memory - at_low) / slope, room)))
        guess = min(guess, 4 * low)  # where drawing the tasks is what few at a time take, the line begins later
    return low


def bound_memory(loop: Loop, memory: int | str) -> int | None:
    """The ``chunk`` with which a step of a run stays within so many bytes; None where a batch does so as a whole.

    It makes the step's batches and gradients a few times with few tasks, under a generator of its own. Parameters,
    buffers and generators are left as they were.

    Args:
        loop: the run, set up.
        memory: as :func:`as_bytes` takes it.

    Raises:
        OptionError: when one task at a time takes more.
    """
    tasks = loop.plan.tasks_per_step
    buffers = [b.clone() for b in loop.method.buffers()]
    try:
        chunk = chunk_within(int(as_bytes(memory) * SHARE), tasks, lambda n: _step_bytes(loop, n))
    finally:
        for buffer, value in zip(loop.method.buffers(), buffers, strict=True):
            buffer.copy_(value)
        for parameter in loop.parameters:
            parameter.grad = None
        give_back()
    return None if chunk >= tasks else chunk


def give_back() -> None:
    """Let the GNU C library return the pages that are free in its heap; some milliseconds, and nothing elsewhere.

    Small blocks that a search leaves would else count beside the step's in the memory of the process.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _step_bytes(loop: Loop, chunk: int) -> float:
    """Most bytes of the tensors of a step, but for parameters and the optimizer's state; infinity if it fails."""
    generator = torch.Generator(device=loop.device).manual_seed(loop.plan.seed)
    for parameter in loop.parameters:
        parameter.grad = None
    try:
        with forked_rng(generator), PeakMemory() as memory:
            # the second piece finds the gradient of the first
            drawn = _two_pieces(loop, chunk, generator, memory)
        return memory.peak + (drawn if loop.plan.accumulate > 1 else 0)  # the next batch is drawn beside the last
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        return math.inf


def _two_pieces(loop: Loop, chunk: int, generator: torch.Generator, memory: PeakMemory) -> int:
    """Forward and back on a batch's first pieces; returns the bytes of the batch."""
    batch: Any = loop.sample(generator).without_padding()
    drawn = memory.live
    # not split(): at one task a time that is as many small blocks as tasks, between which the heap stays open
    for piece in (batch.tasks(slice(0, chunk)), batch.tasks(slice(chunk, 2 * chunk))):
        if piece.num_tasks:
            loss = loop.method.loss(piece, generator=generator) * piece.num_tasks
            loss.backward()
    return drawn
