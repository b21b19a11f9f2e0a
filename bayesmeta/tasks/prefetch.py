"""Batches drawn ahead by other processes, each from a seed of its own."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import BayesMetaError, OptionError, WorkerError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import TaskDistribution

#: How worker processes begin: see :class:`Prefetch`.
Start = Literal["fork", "spawn", "forkserver"]


class _Request(NamedTuple):
    """What is asked of the tasks."""

    num_tasks: int
    support: int
    query: int | None


class Prefetch:
    """A task distribution whose batches worker processes draw ahead, for tasks that take longer to draw than a step.

    For images on disk, simulators, functions of numpy. Tables and images in memory are drawn by tensor operations
    where they lie, and need none of this.

    **The numbers.** Each batch is drawn from a seed that the state of the caller's generator gives, on the CPU, and is
    then moved to the generator's device. So a batch depends on the generator alone: not on how many workers there are,
    nor on which of them drew it, and no two batches share their numbers. A run with other workers, with none, or
    resumed from a checkpoint, sees the same tasks bit for bit (others than the bare tasks under that seed).

    **Ahead.** From the second batch that is asked for in a row, the seeds of the next ones are read off a copy of the
    generator, and those batches are drawn ahead. Where the generator was used for something else in between, they do
    not fit and are dropped: let nothing else draw from it. :func:`~bayesmeta.fit` sees to that; it gives the noise of
    the method a generator of its own.

    Workers ignore Ctrl-C, so that the run can finish its step. They end with :meth:`close` (or the ``with`` block),
    with this object, and within two seconds when the process that began them dies.

    Args:
        tasks: any task distribution.
        workers: processes; 0: none, and the same batches.
        ahead: most batches drawn or being drawn ahead, each in memory; None: two for each worker.
        pin_memory: on a GPU, copy batches that were drawn ahead to pinned memory, from which they are moved without
            waiting.
        start: how processes begin. ``"fork"`` (the default on Linux) copies nothing, and takes any tasks; ``"spawn"``
            and ``"forkserver"`` (elsewhere) send the tasks to each worker, for which they must be picklable, and a
            script needs ``if __name__ == "__main__":``.

    Raises:
        OptionError: for anything but a task distribution, and options out of range.
    """

    #: tells :func:`~bayesmeta.fit` to draw nothing else from the generator that tasks are drawn from
    draws_ahead = True

    def __init__(
        self,
        tasks: TaskDistribution,
        *,
        workers: int = 2,
        ahead: int | None = None,
        pin_memory: bool = True,
        start: Start | None = None,
    ) -> None:
        if not isinstance(tasks, TaskDistribution):
            raise OptionError(f"tasks is a {type(tasks).__name__}; expected a task distribution, such as TableTasks.")
        for name, value, least in (("workers", workers, 0), ("ahead", ahead, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise OptionError(f"{name}={value!r}; expected a whole number of at least {least}.")
        if start is not None and start not in get_args(Start):
            raise OptionError(f"start={start!r} is not known; expected one of {', '.join(get_args(Start))}.")
        self.tasks, self.workers, self.pin_memory = tasks, workers, pin_memory
        self.ahead = 2 * workers if ahead is None else ahead
        self.start: Start = start or ("fork" if sys.platform == "linux" else "spawn")
        self._forget()

    @property
    def num_tasks(self) -> int | None:
        """How many tasks there are; None when endless."""
        return self.tasks.num_tasks

    def sample(self, num_tasks: int, *, support: int, query: int | None = None, generator: Seed = None) -> TaskBatch:
        """The batch that the generator's state gives, drawn ahead where it could be.

        Args:
            num_tasks, support, query: those of the tasks.
            generator: generator or seed; None means seed 0. It moves on by one number.

        Raises:
            WorkerError: when a worker died, or the tasks raised something there; the message says how to draw that
                batch again. Errors of this package come as they are, and the next call begins with new workers.
        """
        generator = as_generator(generator, stream="tasks")
        request, before = _Request(num_tasks, support, query), generator.get_state()
        in_a_row = request == self._request and self._left is not None and torch.equal(self._left, before)
        seed = _advance(generator)
        if request == self._request and seed == self._last[0] and self._last[1] is not None:
            return self._last[1]  # asked for again, as when a compiled step has to be made again eagerly
        self._number += 1
        self._request, self._left = request, generator.get_state()
        if self.workers and in_a_row:
            self._look_ahead(request, generator, seed)
        else:
            self._drop()
        batch = _moved(self._take(request, seed, generator.device), generator.device)
        self._last = seed, batch
        return batch

    def close(self) -> None:
        """End the workers, and drop what they drew; a later :meth:`sample` begins with new ones."""
        pool, pinner = self._pool, self._pinner
        self._forget()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        if pinner is not None:
            pinner.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Prefetch({self.tasks!r}, workers={self.workers}, ahead={self.ahead})"

    def __getstate__(self) -> dict[str, Any]:
        """For another process, or a copy: without workers."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._pinner: ThreadPoolExecutor | None = None
        self._request: _Request | None = None
        self._left: Tensor | None = None  # the generator's state after the last batch
        self._last: tuple[int, TaskBatch | None] = (-1, None)
        self._coming: deque[int] = deque()  # seeds of the batches after this one
        self._twin: torch.Generator | None = None  # the generator as it will be after them
        self._drawn: dict[int, Future[TaskBatch]] = {}
        self._number = 0  # of the batch

    def _look_ahead(self, request: _Request, generator: torch.Generator, seed: int) -> None:
        """Have the batches after this one drawn."""
        if self._twin is None or not self._coming or self._coming.popleft() != seed:
            self._coming.clear()
            self._twin = torch.Generator(device=generator.device)
            self._twin.set_state(generator.get_state())
        while len(self._coming) < self.ahead:
            self._coming.append(_advance(self._twin))
        for other in [s for s in self._drawn if s != seed and s not in self._coming]:
            self._drawn.pop(other).cancel()
        for ahead in self._coming:
            if ahead not in self._drawn:
                self._drawn[ahead] = self._submit(request, ahead, generator.device)

    def _drop(self) -> None:
        for future in self._drawn.values():
            future.cancel()
        self._drawn.clear()
        self._coming.clear()
        self._twin = None

    def _submit(self, request: _Request, seed: int, device: torch.device) -> Future[TaskBatch]:
        if self._pool is None:
            self._pool = _new_pool(self.workers, self.start, self.tasks)
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        try:
            future = self._pool.submit(_draw_in_worker, request, seed)
        except BrokenProcessPool as error:
            raise self._died(request, seed, error) from error
        if not (self.pin_memory and device.type == "cuda"):
            return future
        if self._pinner is None:
            self._pinner = ThreadPoolExecutor(1, "bayesmeta-pin")
        return self._pinner.submit(lambda: pinned(future.result()))

    def _take(self, request: _Request, seed: int, device: torch.device) -> TaskBatch:
        """The batch that was drawn ahead, or drawn here."""
        future = self._drawn.pop(seed, None)
        try:
            return _draw(self.tasks, request, seed) if future is None else future.result()
        except BayesMetaError:
            raise
        except BrokenProcessPool as error:
            raise self._died(request, seed, error) from error
        except Exception as error:
            if future is None:
                raise
            raise WorkerError(
                f"{self._name(request, seed)} raised {type(error).__name__} in a worker: {error}"
            ) from error

    def _died(self, request: _Request, seed: int, error: Exception) -> WorkerError:
        number = self._number
        self.close()
        self._number = number
        return WorkerError(
            f"{self._name(request, seed)} could not be drawn: a worker process died ({error}). It may have run out of "
            "memory (fewer workers, ahead=1), or its code ended the process. It may have been at one of the "
            f"{self.ahead} batches after this one."
        )

    def _name(self, request: _Request, seed: int) -> str:
        return (
            f"Batch {self._number} (tasks.sample({request.num_tasks}, support={request.support}, "
            f"query={request.query}, generator=torch.Generator().manual_seed({seed})))"
        )


# -- numbers ----------------------------------------------------------------------------------------------------------


def _advance(generator: torch.Generator) -> int:
    """Move a generator on by a number; returns the seed that its state gave, without waiting for its device."""
    state = generator.get_state()
    torch.rand(1, generator=generator, device=generator.device)
    digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=7, person=b"bayesmeta batch").digest()
    return int.from_bytes(digest, "big")


def _draw(tasks: TaskDistribution, request: _Request, seed: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    return tasks.sample(request.num_tasks, support=request.support, query=request.query, generator=generator)  # type: ignore[arg-type]


# -- workers ----------------------------------------------------------------------------------------------------------

#: in a worker: what it draws from
_TASKS: list[TaskDistribution] = []


def _new_pool(workers: int, start: Start, tasks: TaskDistribution) -> ProcessPoolExecutor:
    context = multiprocessing.get_context(start)
    parent = None if start == "forkserver" else os.getpid()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(tasks, parent))
    with warnings.catch_warnings():  # Python 3.12 on: that a process with threads forks; workers use one thread
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        pool.submit(os.getpid)  # they all begin now
    return pool


def _begin(tasks: TaskDistribution, parent: int | None) -> None:
    """Set up a worker; its parent, where that is not the process that asked for it, ends when that one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    _TASKS[:] = [tasks]
    threading.Thread(target=_end_with, args=(parent or os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _draw_in_worker(request: _Request, seed: int) -> TaskBatch:
    return _draw(_TASKS[0], request, seed)


# -- memory -----------------------------------------------------------------------------------------------------------


def pinned(batch: TaskBatch) -> TaskBatch:
    """The batch in pinned memory."""
    return _each(batch, Tensor.pin_memory)


def _moved(batch: TaskBatch, device: torch.device) -> TaskBatch:
    """The batch on a device; from pinned memory without waiting."""
    return batch if device.type == "cpu" else _each(batch, lambda t: t.to(device, non_blocking=True))


def _each(batch: TaskBatch, function: Callable[[Tensor], Tensor]) -> TaskBatch:
    """The batch with a function of each of its tensors."""

    def of(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) else value

    def part(observations: Observations) -> Observations:
        return Observations(**{name: of(value) for name, value in vars(observations).items()})

    units = batch.standardizer
    return replace(
        batch,
        support=part(batch.support),
        query=part(batch.query),
        task_id=of(batch.task_id),
        standardizer=None if units is None else replace(units, **{k: of(v) for k, v in vars(units).items()}),
    )
