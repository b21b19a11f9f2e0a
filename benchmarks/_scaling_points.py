"""The points of the benchmark ``scaling``: what a meta-step of one size takes in time and in memory.

Each is measured in processes of its own, forked from one that has never made a large tensor, so that no allocator has
memory in store. Memory: after a first small step, which brings in code and libraries, the kernel's high-water mark of
resident memory is reset (``/proc/self/clear_refs``); its next value, less what was resident, is the peak of the steps
that follow. The C library keeps blocks that were freed, and so much the more as larger ones are freed, which makes
resident memory up to twice that of the tensors; the figures are with that switched off (``mallopt``), and some stand
beside them as it is by default. What the tensors of a step add up to at the most is counted one by one, for comparison.
Time is the processor's, which on one thread is the time of a machine without other work: the median over steps.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import bayesmeta as bm
from bayesmeta.ops.peak import PeakMemory
from bayesmeta.train.compilation.compiling import Compiler
from bayesmeta.train.loop import Loop, Plan
from bayesmeta.train.memory import recomputing
from bayesmeta.train.validation import Validation

MIB = 2**20
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Size:
    """One size of a meta-step.

    Attributes:
        tasks: of a batch.
        shots: of the support, and of the query.
        steps: inner steps.
        particles: of BMAML, which with one is MAML on the joint; 0 is MAML.
        hidden: widths of the network's hidden layers.
        chunk: tasks at a time; None: all.
        recompute: inner steps are computed again on the way back.
        compiled: the step is one compiled graph.
    """

    tasks: int = 25
    shots: int = 10
    steps: int = 1
    particles: int = 0
    hidden: tuple[int, ...] = (40, 40)
    chunk: int | None = None
    recompute: bool = False
    compiled: bool = False

    @property
    def num_parameters(self) -> int:
        """Weights of a network from one input to one output."""
        widths = (1, *self.hidden, 1)
        return sum((a + 1) * b for a, b in itertools.pairwise(widths))


@dataclass
class Point:
    """What was measured of a size.

    Attributes:
        size: of the step.
        seconds: processor time of a step; None where it was not timed.
        peak: bytes of resident memory that a step adds at the most; None where it was not measured.
        tensors: bytes of the step's tensors at the most, counted one by one.
    """

    size: Size
    seconds: float | None = None
    peak: float | None = None
    tensors: float | None = None

    @property
    def per_task(self) -> float:
        """Microseconds a task."""
        assert self.seconds is not None
        return 1e6 * self.seconds / self.size.tasks

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {**asdict(self.size), "parameters": self.size.num_parameters} | {
            "seconds": self.seconds,
            "peak_mib": None if self.peak is None else self.peak / MIB,
            "tensors_mib": None if self.tensors is None else self.tensors / MIB,
        }


def make_loop(size: Size, seed: int) -> Loop:
    """The loop of ``fit`` on sinusoids: what is measured is all that a user's step does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = bm.nets.mlp(1, size.hidden, 1)
    method: Any
    if size.particles == 1:
        model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), "normal")
        method = bm.MAML(model, inner_steps=size.steps, inner_lr=1e-3, objective="joint")
    elif size.particles:
        model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), "normal")
        method = bm.BMAML(model, inner_steps=size.steps, inner_lr=1e-3, num_particles=size.particles)
    else:
        method = bm.MAML(bm.NeuralTaskModel(network, bm.Gaussian(2**-0.5)), inner_steps=size.steps, inner_lr=1e-3)
    held_out = Validation(None, every=1, patience=None, min_delta=0.0, chunk=None, score=None)
    plan = Plan(size.tasks, size.shots, size.shots, seed, chunk=size.chunk)
    loop = Loop(method, bm.tasks.Sinusoid(), plan, held_out, torch.device("cpu"), None)
    loop.set_up(lambda parameters: torch.optim.Adam(parameters, 1e-4), None)
    return loop


def measured(size: Size, seed: int, budget: float, *, memory: bool = True) -> Point:
    """A point, measured in processes of its own.

    Args:
        size: of the step.
        seed: of the run.
        budget: seconds of steps to time; three steps at the least.
        memory: measure it too; that of a compiled step is not known from its tensors.
    """
    peak, tensors = in_child(resident_peak, size, seed) if memory else (None, None)
    return Point(size, in_child(step_seconds, size, seed, budget), peak, tensors)


def step_seconds(size: Size, seed: int, budget: float) -> float:
    """Processor seconds of a step: the median of as many as fit into ``budget`` seconds, three at the least."""
    loop = make_loop(size, seed)
    if size.compiled:
        loop.compiler = Compiler(loop, "inductor", 10**9)
    with recomputing(loop.method, size.recompute):
        loop.advance()
        loop.advance()
        if loop.compiler is not None and not loop.compiler.report.startswith("compiled"):
            raise RuntimeError(f"The step of {size} is {loop.compiler.report}.")
        return median_seconds(loop.advance, budget)


def median_seconds(step: Callable[[], object], budget: float) -> float:
    """Processor seconds of a call: the median over blocks of calls, each long beside the clock's tick.

    The clock of a process that has a limit on its time moves at the ticks of the system alone, every 4 ms or so.

    Args:
        step: to call.
        budget: seconds to spend; three blocks at the least.
    """
    tick, block = clock_tick(), 1
    while (first := _block_seconds(step, block)) < 20 * tick:
        block = max(2 * block, math.ceil(block * 25 * tick / first) if first > 0 else 0)
    times = [first / block]
    while len(times) < 3 or (sum(times) * block < budget and len(times) < 300):
        times.append(_block_seconds(step, block) / block)
    return median(times)


def _block_seconds(step: Callable[[], object], count: int) -> float:
    begin = time.process_time()
    for _ in range(count):
        step()
    return time.process_time() - begin


def clock_tick() -> float:
    """Seconds by which the processor's clock moves, as it is seen to; what it promises may be finer."""
    ticks = []
    for _ in range(3):
        begin = now = time.process_time()
        while now == begin:
            now = time.process_time()
        ticks.append(now - begin)
    return median(ticks)


# -- memory -------------------------------------------------------------------------------------------------------


def resident_peak(size: Size, seed: int, keeps: bool = False) -> tuple[float, float]:
    """Bytes that a step adds at the most: of resident memory of this process, and of tensors.

    Args:
        size: of the step.
        seed: of the run.
        keeps: let the C library keep what was freed, as it does by default.
    """
    if not keeps:
        give_back_memory()
    few = min(size.tasks, 4)
    small = make_loop(replace(size, tasks=few, chunk=None, steps=min(size.steps, 2)), seed)
    with recomputing(small.method, size.recompute):
        small.advance()
    before = resident("VmRSS")
    # making the loop draws a batch; what it takes is part of a run
    loop = make_loop(size, seed)
    reset_high_water_mark()
    with recomputing(loop.method, size.recompute):
        loop.advance()
        loop.advance()
        peak = resident("VmHWM") - before
        with PeakMemory() as memory:
            loop._gradient()
    return float(peak), float(memory.peak)


def resident(what: str) -> int:
    """``VmRSS``, the bytes that are resident, or ``VmHWM``, the most since the mark was reset."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {what}: memory is measured on Linux alone.")
    return int(found[1]) * 1024


def give_back_memory() -> None:
    """Let this process give freed blocks of 128 KiB and more back at once, for ever."""
    if ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024) != 1:
        raise RuntimeError("mallopt refused the threshold: memory is measured with the GNU C library alone.")


def reset_high_water_mark() -> None:
    """Let ``VmHWM`` begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of this process gives in a fork of it, as plain values.

    Raises:
        RuntimeError: when the child fails, with its error.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of the parent's clean-up may run here
        try:
            answer: dict[str, Any] = {"value": function(*args)}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(text) if text else {"error": "it was killed, perhaps for its memory"}
    if "error" in answer:
        raise RuntimeError(f"The process that measures failed: {answer['error']}")
    return answer["value"]
