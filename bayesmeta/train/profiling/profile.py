"""``profile``: where the time and memory of a training step go."""

from __future__ import annotations

import copy
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch

from bayesmeta.data import TaskBatch
from bayesmeta.errors import OptionError, RunFolderError, UnsupportedError
from bayesmeta.ops.files import reason
from bayesmeta.protocols import TaskDistribution
from bayesmeta.train.bounded import bound_memory
from bayesmeta.train.compilation.compiling import Compile, Compiler
from bayesmeta.train.fit import adam, check_counts, check_kinds, pick_device
from bayesmeta.train.loop import Loop, OptimizerFactory, Plan, ScheduleFactory
from bayesmeta.train.memory import recomputing
from bayesmeta.train.precision import Precision, check_precision, check_usable, in_precision
from bayesmeta.train.profiling.advice import advise
from bayesmeta.train.profiling.profiled import Profile, Stage, StepProfile
from bayesmeta.train.profiling.stages import STAGES, Stages, switches
from bayesmeta.train.profiling.trace import read, trace_file, without_noise
from bayesmeta.train.validation import Score, Validation

#: Options of :func:`~bayesmeta.fit` that change no step; they are taken and do nothing here.
NOT_OF_A_STEP = (
    "nan_policy", "patience", "min_delta", "distributed", "out", "overwrite", "resume", "checkpoint_every", "log_every",
    "tensorboard", "progress", "config",
)  # fmt: skip
#: Steps under torch's profiler.
TRACED = 4
#: A busy machine gets so many times the steps, to find some in which no other process came between.
PATIENCE = 3
#: Compiled steps go on until so many in a row have needed no further graph; and at most so many.
SETTLED, MOST = 8, 60
#: Seconds of an operation on average from which on more threads may help.
LARGE = 1e-4
#: Sides of the matrices by which a device's rate is measured.
MATRIX = {"cpu": 768, "cuda": 8192}


def profile(
    method: Any,
    tasks: TaskDistribution,
    *,
    steps: int = 20,
    tasks_per_step: int = 16,
    support: int = 10,
    query: int | None = 10,
    accumulate: int = 1,
    chunk: int | None = None,
    memory: int | str | None = None,
    checkpoint_inner: bool = False,
    optimizer: OptimizerFactory = adam,
    schedule: ScheduleFactory | None = None,
    clip: float | None = None,
    compile: Compile = "off",
    validation: TaskBatch | Sequence[TaskBatch] | None = None,
    validate_every: int = 100,
    validate_with: Score | None = None,
    validation_chunk: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    precision: Precision = "float32",
    trace: str | Path | None = None,
    **others: Any,
) -> Profile:
    """Measure where the time and memory of a training step go, eager and, if asked for, compiled.

    Takes the arguments of :func:`~bayesmeta.fit`, trains a copy of the method for some steps, and changes nothing: the
    method, torch's, numpy's and Python's generators, the number of threads; no run folder is opened.

    Three things are measured, each on steps of its own: the time of a step without any clock inside; the time of each
    stage (:class:`~bayesmeta.train.profiling.profiled.Stage`; on a GPU each is waited for); and, by torch's profiler,
    operations and memory. The profiler makes a step of many small operations several times as slow, so that of it only
    shares, counts and bytes are told.

    Args:
        method, tasks: as in :func:`~bayesmeta.fit`.
        tasks_per_step, support, query, accumulate, chunk, memory, checkpoint_inner: as in ``fit``.
        optimizer, schedule, clip, seed, device, dtype, precision: as in ``fit``; ``optimizer`` must use the parameters
            that it is given.
        steps: that are timed, without clocks and with; about three times as many are made in all.
        compile: ``"off"``, or a mode of ``fit`` but for ``"auto"``: to measure compiled steps beside eager ones. It
            takes as long as compiling does.
        validation, validate_every, validate_with, validation_chunk: as in ``fit``; a pass over them is timed.
        trace: file for the trace of the eager steps, which Perfetto and chrome://tracing show; that of the compiled
            steps goes to a second one, with ``-compiled`` in its name.
        **others: options of ``fit`` that change no step, such as ``out`` and ``log_every``; they do nothing. It is this
            process alone that is profiled.

    Returns:
        The figures, with advice; ``print`` shows a table.

    Raises:
        OptionError: for an unknown option, ``compile="auto"``, or an optimizer of other parameters than those given.
        UnsupportedError: for a method that cannot be copied.
        RunFolderError: when the trace cannot be written.
        BayesMetaError: its kinds, for what ``fit`` refuses too.
    """
    check_counts(steps=steps, tasks_per_step=tasks_per_step, accumulate=accumulate, validate_every=validate_every)
    check_counts(optional=True, chunk=chunk, validation_chunk=validation_chunk)
    check_kinds(method, tasks, optimizer, clip)
    _check_options(compile, checkpoint_inner, others)
    check_precision(precision)
    if memory is not None and chunk is not None:
        raise OptionError(f"memory={memory!r} picks the chunk, and chunk={chunk} is given too; use one of them.")
    path = _writable(trace)
    held_out = Validation(
        validation,
        every=validate_every,
        patience=None,
        min_delta=0.0,
        chunk=validation_chunk,
        score=validate_with,
    )
    plan = Plan(tasks_per_step, support, query, seed, accumulate, chunk, dtype, precision)
    on = pick_device(device)
    with _nothing_changed(on):
        loop = Loop(_copy(method), tasks, plan, held_out, on, clip)
        loop.set_up(optimizer, schedule)
        _check_parameters(loop)
        check_usable(precision, on, [loop.method])
        with loop.own_randomness(), recomputing(loop.method, checkpoint_inner), in_precision(precision, loop.method):
            if memory is not None:
                loop.plan = replace(plan, chunk=bound_memory(loop, memory))
            found = _measure(loop, steps, path)
            if compile != "off":
                found = _measure_compiled(found, loop, compile, steps, path)
    return replace(found, advice=advise(found))


# -- nothing changes --------------------------------------------------------------------------------------------------


def _copy(method: Any) -> Any:
    """A copy that shares no tensor with the method.

    Raises:
        UnsupportedError: naming what cannot be copied.
    """
    try:
        return copy.deepcopy(method)
    except Exception as error:  # a method of a user's own may fail in any way
        raise UnsupportedError(
            f"{type(method).__name__} cannot be copied ({type(error).__name__}: {error}), and profiling trains a copy, "
            "so that the method stays as it is. Give one that copy.deepcopy takes, such as a new one."
        ) from error


@contextmanager
def _nothing_changed(device: torch.device) -> Iterator[None]:
    """Put back afterwards what torch, numpy and Python keep for all: generators, threads."""
    threads, python = torch.get_num_threads(), random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002  # what tasks of a user may draw from
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _check_options(compile: Any, checkpoint_inner: bool, others: dict[str, Any]) -> None:
    for name in others:
        if name not in NOT_OF_A_STEP:
            raise OptionError(f"profile has no option {name!r}; expected those of fit, and trace.")
    modes = [mode for mode in get_args(Compile) if mode != "auto"]
    if compile not in modes:
        raise OptionError(
            f"compile={compile!r}; expected one of {', '.join(map(repr, modes))}: profile measures, 'auto' decides."
        )
    if checkpoint_inner and compile != "off":
        raise OptionError("checkpoint_inner=True and compile exclude each other: a compiled step plans its own memory.")


def _check_parameters(loop: Loop) -> None:
    """An optimizer of the original's parameters would train nothing here, or that."""
    ours = {id(p) for p in loop.parameters}
    if any(id(p) not in ours for group in loop.optimizer.param_groups for p in group["params"]):
        raise OptionError(
            "The optimizer has parameters that it was not given. Profiling trains a copy of the method: make the "
            "optimizer of the argument, as in lambda parameters: torch.optim.Adam(parameters, 1e-3)."
        )


def _writable(trace: str | Path | None) -> Path | None:
    """The file for the trace, before minutes of measuring."""
    if trace is None:
        return None
    path = Path(trace)
    try:
        with open(path, "a"):
            return path
    except OSError as error:
        raise RunFolderError(f"{path} could not be written: {reason(error)}") from error


# -- measuring --------------------------------------------------------------------------------------------------------


def _measure(loop: Loop, steps: int, trace: Path | None) -> Profile:
    """All that there is to say of eager steps."""
    for _ in range(3):
        loop.advance()
    eager = _step_profile(loop, steps, "eager", trace)
    device = str(loop.device)
    plan = loop.plan
    sizes = f"{plan.support} + {'all' if plan.query is None else plan.query} observations"
    return Profile(
        what=f"{type(loop.method).__name__}, {plan.tasks_per_step * plan.accumulate} tasks of {sizes} a step",
        device=torch.cuda.get_device_name(loop.device) if loop.device.type == "cuda" else device,
        threads=torch.get_num_threads(),
        eager=eager,
        compiled=None,
        compile_report=None,
        compile_seconds=None,
        held_bytes=_held(loop),
        one_task_seconds=_one_task_seconds(loop, steps),
        pieces=plan.accumulate * (1 if plan.chunk is None else -(-plan.tasks_per_step // plan.chunk)),
        other_threads=_other_threads(loop, eager, steps),
        flops=_flops(loop),
        peak_flops=_peak_flops(loop),
        validation_seconds=_validation_seconds(loop),
        validate_every=loop.validation.every if loop.validation.batches else None,
    )


def _measure_compiled(found: Profile, loop: Loop, mode: Compile, steps: int, trace: Path | None) -> Profile:
    """The same for compiled steps, if they can be made."""
    compiler = loop.compiler = Compiler(loop, mode, steps)
    seconds, settled = 0.0, 0
    for _ in range(MOST):
        graphs = len(compiler.graphs)
        took = _time(loop.advance, loop.device)
        grown = len(compiler.graphs) > graphs
        seconds += max(0.0, took - found.eager.seconds) if grown else 0.0
        settled = 0 if grown else settled + 1
        if settled >= SETTLED:
            break
    if not compiler.graphs or compiler.report.startswith("not compiled"):
        return replace(found, compile_report=compiler.report)
    path = None if trace is None else trace.with_name(f"{trace.stem}-compiled{trace.suffix}")
    column = _step_profile(loop, steps, mode, path)
    return replace(found, compiled=column, compile_report=compiler.report, compile_seconds=seconds)


def _time(function: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _step_profile(loop: Loop, steps: int, mode: str, trace: Path | None) -> StepProfile:
    plain: list[tuple[float, bool]] = []
    timed: list[tuple[dict[str, float], bool]] = []
    while len(plain) < steps or (len(plain) < PATIENCE * steps and min(_quiet(plain), _quiet(timed)) < steps / 2):
        before = switches()  # in turns, so that what else the machine does meets both
        plain.append((_time(loop.advance, loop.device), switches() == before))
        with Stages(loop) as clocked:
            timed.append((dict(clocked.step()), clocked.quiet[0]))
    usual = _middle_half(_undisturbed(timed))
    seconds = {name: sum(t[name] for t in usual) / len(usual) for name in STAGES}
    with trace_file(trace) as path:
        seen = read(path, quiet=_trace_steps(loop, path), cuda=loop.device.type == "cuda")
    if seconds["graph"] and not seconds["gradient"]:  # what the trace calls gradient is the graph
        kinds: tuple[dict[str, Any], ...] = (seen.counts, seen.peaks, seen.allocated)
        for values in kinds:
            values["graph"], values["gradient"] = values["gradient"], values["graph"]
    stages = [Stage(n, seconds[n], seen.counts[n], seen.peaks[n], seen.allocated[n]) for n in STAGES if seconds[n] > 0]
    step = median(_undisturbed(plain))
    return StepProfile(
        mode,
        step,
        sum(seconds.values()),
        tuple(stages),
        tuple(replace(o, seconds=o.share * step) for o in seen.operations),
        seen.outside,
        seen.kernel_seconds,
        disturbed=min(_quiet(plain), _quiet(timed)) == 0,
    )


def _quiet(measured: list[tuple[Any, bool]]) -> int:
    return sum(good for _, good in measured)


def _undisturbed(measured: list[tuple[Any, bool]]) -> list[Any]:
    """Those in which no other process came between; where there are none, the shortest quarter."""

    def length(value: Any) -> float:
        return sum(value.values()) if isinstance(value, dict) else float(value)

    shortest = sorted((value for value, _ in measured), key=length)[: (len(measured) + 3) // 4]
    return [value for value, good in measured if good] or shortest


def _middle_half(timed: list[dict[str, float]]) -> list[dict[str, float]]:
    """The steps of usual length."""
    ordered = sorted(timed, key=lambda t: sum(t.values()))
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut]


def _trace_steps(loop: Loop, path: Path) -> list[bool]:
    """Steps under the profiler; returns in which of them no other process came between."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if loop.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    gc.collect()  # else what it frees falls into some stage
    with without_noise():
        with (
            torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
            Stages(loop, annotate=True) as annotated,
        ):
            for _ in range(TRACED):
                annotated.step()
            if loop.device.type == "cuda":
                torch.cuda.synchronize(loop.device)
        profiler.export_chrome_trace(str(path))
    return annotated.quiet


def _held(loop: Loop) -> dict[str, int]:
    """Bytes of what is there between steps."""

    def total(tensors: Any) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    states = loop.optimizer.state.values()
    return {
        "parameters": total(loop.method.parameters()),
        "buffers": total(loop.method.buffers()),
        "gradients": total(p.grad for p in loop.parameters if p.grad is not None),
        "optimizer": total(v for state in states for v in state.values() if isinstance(v, torch.Tensor)),
    }


def _typical(loop: Loop, steps: int) -> float:
    """Seconds of a step, after two that are not counted."""
    measured: list[tuple[float, bool]] = []
    for _ in range(max(5, steps // 2) + 2):
        before = switches()
        measured.append((_time(loop.advance, loop.device), switches() == before))
    return float(median(_undisturbed(measured[2:])))


def _one_task_seconds(loop: Loop, steps: int) -> float:
    """Of a step of a single task: nearly all of it is what any step costs, however little there is to compute."""
    plan = loop.plan
    loop.plan = replace(plan, tasks_per_step=1, accumulate=1, chunk=None)
    try:
        return _typical(loop, steps)
    finally:
        loop.plan = plan


def _other_threads(loop: Loop, eager: StepProfile, steps: int) -> dict[int, float]:
    """Eager steps by another number of threads of the CPU, where it may be faster."""
    if loop.device.type != "cpu":
        return {}
    now, most = torch.get_num_threads(), torch.multiprocessing.cpu_count()
    large = eager.seconds > LARGE * eager.num_operations
    tried = 1 if now > 1 else most
    if tried == now or (now == 1 and not large):
        return {}
    torch.set_num_threads(tried)
    try:
        return {tried: _typical(loop, steps)}
    finally:
        torch.set_num_threads(now)


def _flops(loop: Loop) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loop.advance()
    return int(counter.get_total_flops())


def _peak_flops(loop: Loop) -> float:
    """The rate of a large matrix product in the dtype of the parameters."""
    side = MATRIX[loop.device.type]
    a = torch.ones(side, side, dtype=loop.parameters[0].dtype, device=loop.device)
    a @ a
    return 2 * side**3 / min(_time(lambda: a @ a, loop.device) for _ in range(3))


def _validation_seconds(loop: Loop) -> float | None:
    if not loop.validation.batches:
        return None
    measure = lambda: loop.validation.measure(loop.method, loop.device)  # noqa: E731
    return min(_time(measure, loop.device) for _ in range(2))
