"""The meta-training loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bayesmeta.data import TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.protocols import TaskDistribution
from bayesmeta.train import events, restart, sharding
from bayesmeta.train.bounded import as_bytes, bound_memory
from bayesmeta.train.compilation.compiling import Compile, Compiler, check_mode
from bayesmeta.train.distributed import Distributed, Ranks, join
from bayesmeta.train.folder import claim, has_checkpoint
from bayesmeta.train.journal import Keeping
from bayesmeta.train.lock import Lock
from bayesmeta.train.loop import Loop, NanPolicy, OptimizerFactory, Plan, ScheduleFactory
from bayesmeta.train.memory import recomputing
from bayesmeta.train.precision import Precision, check_precision, check_usable, in_precision
from bayesmeta.train.record import Record
from bayesmeta.train.signals import Signals
from bayesmeta.train.validation import Score, Validation


@dataclass
class FitResult:
    """What :func:`fit` returns.

    Attributes:
        method: the trained method (the very object given), with the best θ when there was validation.
        history: one entry a logged step: step, loss, and rate, gradient norm, validation loss where there are any.
        steps: steps done, fewer than asked for when it stopped early.
        best_step, best_validation: of the lowest validation loss (or score); None without validation.
        seconds: wall time of this call.
        tasks_per_second: tasks trained on in this call, a second of its steps; None when it took no step.
        out: the folder of the run, if any.
        skipped: steps that changed nothing, since their loss or gradient was not finite (``nan_policy="skip"``).
        compiled: what became of ``compile=``, in words; None for ``"off"``.
        chunk: most tasks at a time, as given or as ``memory=`` picked it; None: whole batches.
    """

    method: Any
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    best_step: int | None = None
    best_validation: float | None = None
    seconds: float = 0.0
    tasks_per_second: float | None = None
    out: Path | None = None
    skipped: int = 0
    compiled: str | None = None
    chunk: int | None = None

    def __repr__(self) -> str:
        parts = [type(self.method).__name__, f"{self.steps} steps in {self.seconds:.1f} s"]
        if self.history and "loss" in self.history[-1]:
            parts.append(f"last loss {self.history[-1]['loss']:.4g}")
        if self.best_step is not None and self.best_validation is not None:
            parts.append(f"best validation {self.best_validation:.4g} at step {self.best_step}")
        parts += [f"{self.skipped} skipped"] * bool(self.skipped) + [f"in {self.out}"] * (self.out is not None)
        return f"<FitResult: {', '.join(parts)}>"


def adam(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam at rate 1e-3, the default."""
    return torch.optim.Adam(params, lr=1e-3)


def pick_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA where there is one, else CPU.

    Raises:
        OptionError: for an unknown device, or CUDA where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"Unknown device {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'.") from error
    if picked.type not in ("cpu", "cuda"):
        raise OptionError(f"Device {device!r} is not supported; expected 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"Device {device!r} was asked for, but torch sees no CUDA device here; use 'cpu' or 'auto'.")
    return picked


def fit(
    method: Any,
    tasks: TaskDistribution,
    *,
    steps: int,
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
    nan_policy: NanPolicy = "raise",
    compile: Compile = "off",
    validation: TaskBatch | Sequence[TaskBatch] | None = None,
    validate_every: int = 100,
    validate_with: Score | None = None,
    validation_chunk: int | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    precision: Precision = "float32",
    distributed: Distributed = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool | Literal["previous"] = False,
    checkpoint_every: int = 1000,
    log_every: int = 100,
    tensorboard: str | Path | bool | None = None,
    progress: bool = True,
    config: dict[str, Any] | None = None,
) -> FitResult:
    """Meta-train a method on a distribution of tasks.

    Args:
        method: anything with ``prepare``, ``loss`` and ``nn.Module``'s interface.
        tasks: where batches come from.
        steps: optimizer steps in all; a resumed run goes on to this number.
        tasks_per_step: tasks in a batch.
        support, query: observations of each task; ``query=None`` (tables) means all that are left.
        accumulate: batches to a step of the optimizer. The gradient is the mean over the real tasks of all of them, as
            if they were one batch, with the memory of one.
        chunk: most tasks of a batch to go forward and back at a time: less memory, the same gradient up to rounding
            for a method without noise of its own.
        memory: most bytes for the tensors of a step (the tasks drawn, what is kept for the way back, gradients; not
            the parameters and the optimizer's state), as a number or a text such as ``"2GiB"``. It picks the ``chunk``,
            which the result names, by trying a few on the first batch.
        checkpoint_inner: compute each inner step again on the way back instead of keeping it: memory that hardly grows
            with their number, the same gradient, two to three times the time. Not together with ``compile``.
        optimizer: makes a torch optimizer from the parameters. A factory, since some parameters exist only after the
            first batch.
        schedule: makes a torch schedule from the optimizer, stepped once a step; :mod:`bayesmeta.schedules` has some.
        clip: largest norm of the gradient, in units of the loss (nats a task).
        nan_policy: what a loss or gradient that is not finite does: ``"raise"``, or ``"skip"``: the step changes
            nothing (parameters, optimizer, schedule, buffers), is counted in the result's ``skipped``, and a hundred in
            a row are an error all the same.
        compile: ``"off"``; ``"inductor"``: from the second step on a step is one compiled graph, of drawing the tasks
            where they are drawn by tensor operations, of the loss, its gradient, and the step of SGD, Adam or AdamW.
            It draws the same numbers as an eager step and differs by rounding alone. Compiling takes a minute or so.
            ``"cudagraphs"``, on CUDA: the kernels of a step are recorded and played back, not compiled.
            ``"auto"``: times eager steps first, and compiles if the run is long enough to win that back. What
            cannot be one graph stays eager, with a warning that names the line.
        validation: held-out tasks, in one batch or several; their loss is measured every ``validate_every`` steps
            under fixed noise, and the method ends with the θ that was best on them.
        validate_every: steps between validations.
        validate_with: another score than the loss: a function of method, batch and generator that returns one
            number, the mean over the batch's tasks, lower is better.
        validation_chunk: most validation tasks to evaluate at a time, to bound memory; a piece counts as its number
            of real tasks.
        patience: stop after this many validations in a row without a fall of more than ``min_delta``; None: never.
        min_delta: how far validation must fall, in all since the last fall that counted, to count as one. The best θ
            is the lowest all the same.
        seed: of the tasks drawn and of the method's own noise. The parameters' first values are the model's.
        device: ``"auto"``, or a torch device; method and batches are moved there.
        dtype: cast method and batches; None leaves them as they are.
        precision: of the matrix products and convolutions of float32 networks: ``"float32"``; ``"bf16"``: their factors
            are rounded to bfloat16, while parameters, likelihoods, densities, closed forms and meta-gradients stay in
            float32; ``"tf32"``: CUDA may round the factors of all float32 products to TF32, until the run ends.
        distributed: ``"auto"``: where torchrun started this process (or a process group is there already), it is one
            rank of several that train one θ: each takes ``tasks_per_step`` tasks of its own, and the result is that of
            one process with as many times the tasks. ``device="cuda"`` is then a device for each rank. Rank 0 alone
            writes and shows progress. ``"off"``: this process is alone.
        out: folder for checkpoints, ``log.jsonl`` and ``config.json``; None keeps nothing.
        overwrite, resume: what to do when ``out`` already holds a run; neither: refuse. ``resume="previous"`` goes on
            from the checkpoint before the last, where the last is damaged; never on its own.
        checkpoint_every, log_every: steps between checkpoints and log entries.
        tensorboard: folder for TensorBoard's curves (the extra ``bayesmeta[tensorboard]``), at ``log_every`` and at
            each validation; True: ``out/tensorboard``.
        progress: show a bar with loss and rate on standard error.
        config: plain values to store in ``config.json`` and in each checkpoint.

    Returns:
        The trained method and the history.

    Raises:
        NonFiniteLossError: naming the step; the last good checkpoint stays.
        DeviceMemoryError: naming the ``chunk`` to try, when the device has too little memory.
        KeyboardInterrupt: after Ctrl-C, once the step is finished and its checkpoint written; a second one, a second
            later, stops at once. SIGTERM does likewise, however often it comes, and ends in SystemExit(143). Handlers
            of the caller's own are left alone.
        RankError: when another rank failed, or is gone.
        RunFolderError, CheckpointError, OptionError: for folders, checkpoints and options that cannot be used.
        DataError, ModelError and their kinds: when data and model do not fit.
    """
    check_counts(
        steps=steps,
        tasks_per_step=tasks_per_step,
        accumulate=accumulate,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        validate_every=validate_every,
    )
    check_counts(optional=True, chunk=chunk, validation_chunk=validation_chunk, patience=patience)
    check_kinds(method, tasks, optimizer, clip)
    _check_choices(nan_policy, resume, out)
    check_mode(compile)
    check_precision(precision)
    if memory is not None and chunk is not None:
        raise OptionError(f"memory={memory!r} picks the chunk, and chunk={chunk} is given too; use one of them.")
    if memory is not None:
        as_bytes(memory)
    if checkpoint_inner and compile != "off":
        raise OptionError("checkpoint_inner=True and compile exclude each other: a compiled step plans its own memory.")
    held_out = Validation(
        validation,
        every=validate_every,
        patience=patience,
        min_delta=min_delta,
        chunk=validation_chunk,
        score=validate_with,
    )
    ranks = join(distributed, pick_device(device))
    overwrite, resume = ranks.from_first(lambda: restart.goes_on(out, overwrite, resume))
    curves = ranks.from_first(lambda: events.choose(tensorboard, out, overwrite=overwrite, resume=bool(resume)))
    plan = Plan(tasks_per_step, support, query, seed, accumulate, chunk, dtype, precision)
    loop = Loop(method, tasks, plan, held_out, ranks.device, clip, nan_policy, ranks)
    sharding.check_tasks(loop)
    loop.set_up(optimizer, schedule, _shared(steps, checkpoint_every, log_every, validate_every, compile, out, config))
    check_usable(precision, loop.device, [method])
    if memory is not None:
        with recomputing(method, checkpoint_inner), in_precision(precision, method):
            loop.plan = replace(plan, chunk=ranks.from_first(lambda: bound_memory(loop, memory)))
    if compile != "off":
        loop.compiler = Compiler(loop, compile, steps)
    with ExitStack() as stack:
        folder = None if out is None else Path(out)
        lock = None if out is None else _take(ranks, stack, out, overwrite=overwrite, resume=bool(resume))
        stack.enter_context(loop.own_randomness())
        stack.enter_context(recomputing(method, checkpoint_inner))
        stack.enter_context(in_precision(precision, method))
        # else it begins again
        goes_on = ranks.from_first(lambda: bool(resume) and folder is not None and has_checkpoint(folder))
        if folder is not None and goes_on:
            loop.restore(folder, config, previous=resume == "previous")
        begin = time.perf_counter()
        keeping = Keeping(folder, curves, steps, log_every, checkpoint_every, progress, overwrite, goes_on, config)
        record = stack.enter_context(ranks.together(lambda: Record(loop, keeping)))
        signals = loop.signals = stack.enter_context(Signals())
        while loop.step < steps and not held_out.stopped:
            loop.advance()
            record.after_step()
            if lock is not None:
                lock.beat()
            if ranks.size > 1:
                signals.received = loop.stop or signals.received  # what one rank received all stop for, at one step
            if (signals.received if ranks.size == 1 else loop.stop) is not None:
                signals.stop(record.interrupt())
        if ranks.size > 1:  # one that came to a rank after the last exchange
            received = ranks.collect(lambda: signals.received)
            signals.settle(next((one for one in received if one is not None), None))
    loop.check_finite()
    held_out.use_best(method)
    return FitResult(
        method,
        loop.history,
        loop.step,
        held_out.best_step,
        held_out.best,
        time.perf_counter() - begin,
        loop.overall.rate(),
        folder,
        loop.skipped,
        None if loop.compiler is None else loop.compiler.report,
        loop.plan.chunk,
    )


def _shared(*values: Any) -> dict[str, Any]:
    """What all ranks of a run must share beside its plan; see :func:`fit`."""
    names = ("steps", "checkpoint_every", "log_every", "validate_every", "compile", "out", "config")
    return {name: str(value) for name, value in zip(names, values, strict=True)}


def _take(ranks: Ranks, stack: ExitStack, out: str | Path, *, overwrite: bool, resume: bool) -> Lock | None:
    """Claim the folder, on rank 0, until the stack ends; the lock there."""
    held: list[Lock] = []

    def take() -> None:
        _, lock = claim(out, overwrite=overwrite, resume=resume, job=restart.this_job(Path(out)))
        stack.callback(lock.release)
        held.append(lock)

    ranks.from_first(take)
    return held[0] if held else None


def check_counts(*, optional: bool = False, **counts: Any) -> None:
    """Refuse what is no whole number of at least 1; None too, unless it is optional."""
    for name, value in counts.items():
        if optional and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1; got {value!r}.")


def _check_choices(nan_policy: Any, resume: Any, out: Any) -> None:
    if nan_policy not in ("raise", "skip"):
        raise OptionError(f"Unknown nan_policy {nan_policy!r}; expected 'raise' or 'skip'.")
    if resume not in (True, False, "previous"):
        raise OptionError(f"resume is {resume!r}; expected True, False or 'previous'.")
    if resume and out is None:
        raise OptionError("resume=True needs out=, the folder of the run to go on with.")


def check_kinds(method: Any, tasks: Any, optimizer: Any, clip: float | None) -> None:
    """Refuse a method, tasks, an optimizer or a clip of another kind."""
    if not (hasattr(method, "loss") and hasattr(method, "prepare")):
        raise OptionError(f"method is a {type(method).__name__}; expected one with loss and prepare, such as MAML.")
    if not isinstance(tasks, TaskDistribution):
        raise OptionError(
            f"tasks is a {type(tasks).__name__}; expected a task distribution with sample and num_tasks, such as "
            "bayesmeta.tasks.TableTasks.from_dataframe(…)."
        )
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise OptionError(
            "optimizer must be a factory, such as lambda params: torch.optim.Adam(params, 1e-3): some parameters exist "
            "only after the first batch."
        )
    if clip is not None and not clip > 0:
        raise OptionError(f"clip must be above 0, or None for no clipping; got {clip!r}.")
