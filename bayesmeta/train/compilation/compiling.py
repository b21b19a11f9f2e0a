"""``compile=`` of :func:`~bayesmeta.fit`: when a run goes over to compiled steps, and back where it must."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import CaptureError, CompileWarning, OptionError
from bayesmeta.train.compilation.buckets import Buckets, learn
from bayesmeta.train.compilation.compiled import CompiledStep, Objective
from bayesmeta.train.compilation.recorded import check_cuda
from bayesmeta.train.compilation.watching import MOST_REBUILT, MOST_TRIES, ChanceError, OutdatedError

Compile = Literal["off", "auto", "inductor", "cudagraphs"]

#: Eager steps that ``"auto"`` times before it decides.
TIMED = 10
#: What ``"auto"`` reckons with: seconds to compile a graph, to begin with and for each of its nodes, and how much
#: faster a step becomes. Measured on two CPU cores: 9 s for 260 nodes, 13 s for 690, and 4 to 6 times. Where a machine
#: is busy all of it takes longer, which the time that capturing took tells.
SECONDS, SECONDS_A_NODE, TIMES_CAPTURE, SPEED_UP = 6.0, 0.02, 15.0, 3.0
#: Batches that differ in shape are padded to so many shapes at most; on others, later ones are trained on eagerly.
MOST_GRAPHS = 4
#: A run goes back to eager steps when more than this share of its steps had to be made again eagerly.
MOST_BROKEN = 0.2


def check_mode(mode: Any) -> None:
    """Refuse an unknown mode, and one that this machine does not have.

    Raises:
        OptionError: naming the modes.
    """
    if mode not in get_args(Compile):
        raise OptionError(f"compile={mode!r}; expected 'off', 'auto', 'inductor' or 'cudagraphs'.")
    if mode == "cudagraphs" and not torch.cuda.is_available():
        raise OptionError("compile='cudagraphs' needs a CUDA device, and there is none; take compile='inductor' here.")


class Compiler:
    """Makes the steps of a run by a compiled graph where it can.

    The first step of a run is eager, since the optimizer makes its state in it.

    Args:
        loop: the run, set up.
        mode: ``"auto"`` or ``"inductor"``.
        steps: steps of the run in all.
    """

    def __init__(self, loop: Any, mode: Compile, steps: int) -> None:
        if mode == "cudagraphs":
            check_cuda(loop.device)
        self.loop, self.mode, self.steps = loop, mode, steps
        self._text = "not compiled: the run was too short"
        self.graphs: dict[Any, CompiledStep] = {}
        self.draws_tasks = not getattr(loop.tasks, "draws_ahead", False)  # the graph draws them itself
        self.buckets: Buckets | None = None  # to what it pads the batches that it is given
        self.num_tasks = loop.plan.tasks_per_step
        self._now: CompiledStep | None = None  # whose step is to be committed
        self._off = False
        self._times: list[float] = []
        self._last: float | None = None
        self._made, self._broken, self._without = 0, 0, 0  # steps by graphs, made again eagerly, without a graph
        self._rebuilt, self._tries = 0, 0
        if loop.plan.accumulate > 1 or loop.plan.chunk is not None:
            self._give_up("batches in pieces (accumulate=, chunk=) are not compiled")

    # -- what the loop asks -------------------------------------------------------------------------------------

    def gradient(self) -> tuple[Tensor, Tensor, int] | None:
        """Loss, norm of the gradient and tasks of a compiled step; None where the loop is to make this one eagerly."""
        self._now = None
        if self._off or not self._is_time():
            return None
        states = [(g, g.get_state()) for g in self._generators()]
        try:
            step, arguments = self._step()
            found = None if step is None else step(arguments)
        except _NotWorthIt as reason:
            self._off, self._text = True, str(reason)
            step, found = None, None
        except CaptureError as error:
            self._fail(error)
            step, found = None, None
        if found is None:
            for generator, state in states:
                generator.set_state(state)
            self._count_broken(step)
            return None
        self._now, self._made = step, self._made + 1
        return *found, self.num_tasks

    def commit(self) -> bool:
        """Make the step that :meth:`gradient` computed; False if it computed none."""
        if self._now is None:
            return False
        self._now.commit()
        return True

    def hand_over(self) -> None:
        """Put the gradient that :meth:`gradient` computed into the parameters, for the loop to add to other ranks'."""
        assert self._now is not None
        self._now.hand_over()
        self._now = None

    def _generators(self) -> list[torch.Generator]:
        loop = self.loop
        return [loop.generator] if loop.noise is loop.generator else [loop.generator, loop.noise]

    @property
    def report(self) -> str:
        """What became of it, in words, with the number of graphs and of the steps that were made without one."""
        return self._text + counts(self._without, self._broken)

    # -- when ---------------------------------------------------------------------------------------------------

    def _is_time(self) -> bool:
        """Whether the optimizer has its state and, for ``"auto"``, whether eager steps have been timed."""
        if self.graphs:
            return True
        if not self.loop.optimizer.state and self.loop.step <= 1:
            return False
        if self.mode != "auto":
            return True
        now = time.perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
        self._last = now
        return len(self._times) >= TIMED

    def _check_worth(self, step: CompiledStep) -> None:
        """Compile only where the steps left win back the time that it takes, by a factor of 2."""
        left, each = self.steps - self.loop.step, median(self._times)
        cost = max(SECONDS + SECONDS_A_NODE * step.captured.num_nodes, TIMES_CAPTURE * step.seconds["capture"])
        if left * each * (1 - 1 / SPEED_UP) < 2 * cost:
            raise _NotWorthIt(
                f"not compiled: {left} steps of {1e3 * each:.3g} ms would not win back the {cost:.0f} s of compiling"
            )

    def _count_broken(self, step: CompiledStep | None) -> None:
        if step is None:
            self._without += not self._off
            return
        self._broken += 1
        if self._broken > 5 and self._broken > MOST_BROKEN * (self._made + self._broken):
            if self.draws_tasks:  # what breaks may be in how they are drawn
                self.draws_tasks, self.graphs, self._broken, self._made = False, {}, 0, 0
                return
            self._give_up(f"{self._broken} steps had to be made again eagerly, the last since {step.broken[0]}")

    def _fail(self, error: CaptureError) -> None:
        """This step is eager; the next is tried again where that may help."""
        if isinstance(error, OutdatedError) and self._rebuilt < MOST_REBUILT:
            self._rebuilt += 1
            self.graphs = {}
        elif isinstance(error, ChanceError) and self._tries + 1 < MOST_TRIES:
            self._tries += 1
        else:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self._off = True
        self._text = f"not compiled{f' from step {self.loop.step} on' if self._made else ''}: {reason}"
        warnings.warn(
            f"{'All' if self.loop.step <= 1 else f'From step {self.loop.step} on the'} steps of this run are eager, as "
            f"with compile='off': {reason}.",
            CompileWarning,
            stacklevel=6,
        )

    # -- the graphs ---------------------------------------------------------------------------------------------

    def _step(self) -> tuple[CompiledStep | None, list[Tensor]]:
        """The compiled step for what comes next, and the tensors of its batch."""
        if self.draws_tasks and None not in self.graphs:
            try:
                self._build(None, self._new_step(self._draw_and_lose, []).capture())
            except CaptureError as error:
                self.draws_tasks = False  # tasks are drawn before it, and are its arguments
                self._why_not = str(error)
        if self.draws_tasks:
            return self.graphs[None], []
        drawn = self.loop.sample(self.loop.generator)
        batch = self._pad(drawn)
        tensors, key = flatten(batch)
        self.num_tasks = drawn.num_tasks if self.loop.ranks.size == 1 else drawn.without_padding().num_tasks
        if key not in self.graphs and len(self.graphs) < MOST_GRAPHS:
            step = self._new_step(lambda *given: self._lose(rebuild(batch, given)), tensors)
            self._build(key, step.capture(self._other(batch)))
        return self.graphs.get(key), tensors

    def _other(self, batch: TaskBatch) -> list[Tensor]:
        """Tensors of other data of the same shapes, to compare on, so that no value of these is part of the graph."""
        apart = torch.Generator(device=self.loop.device).manual_seed(self.loop.plan.seed)
        tensors, key = flatten(self._pad(self.loop.sample(apart)))
        if key == flatten(batch)[1]:
            return tensors
        return flatten(batch.tasks(torch.arange(batch.num_tasks - 1, -1, -1, device=self.loop.device)))[0]

    def _pad(self, batch: TaskBatch) -> TaskBatch:
        """To a few lengths, where batches differ in theirs and the method does not mind."""
        if self.buckets is None:
            self.buckets, reason = learn(self.loop, self._lose, MOST_GRAPHS)
            if reason is not None:
                warnings.warn(
                    f"Batches differ in shape, and not all that differs is padded to a few sizes: {reason}. Up to "
                    f"{MOST_GRAPHS} shapes are compiled for; steps on others are eager.",
                    CompileWarning,
                    stacklevel=8,
                )
        return self.buckets.pad(batch)

    def _draw_and_lose(self) -> tuple[Tensor, Tensor]:
        batch = self.loop.sample(self.loop.generator)
        self.num_tasks = batch.num_tasks
        if self.loop.ranks.size > 1 and batch.task_id is not None:
            raise CaptureError("ranks count the real tasks of a batch, which may differ from step to step")
        return self._lose(batch)

    def _lose(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        loss = self.loop.method.loss(batch, generator=self.loop.noise)
        return loss, loss

    def _new_step(self, objective: Objective, arguments: Sequence[Tensor]) -> CompiledStep:
        loop = self.loop
        return CompiledStep(
            objective,
            loop.parameters,
            loop.optimizer,
            self._generators(),
            only_gradient=loop.ranks.size > 1,
            mode="cudagraphs" if self.mode == "cudagraphs" else "inductor",
            clip=loop.clip,
            modules=[loop.method],
            arguments=arguments,
        )

    def _build(self, key: Any, step: CompiledStep) -> None:
        if self.mode == "auto" and not self.graphs:
            self._check_worth(step)
        self.graphs[key] = step.compile()
        self.loop.optimizer.zero_grad(set_to_none=True)
        seconds = sum(sum(s.seconds.values()) for s in self.graphs.values())
        nodes = ", ".join(str(s.captured.num_nodes) for s in self.graphs.values())
        self._text = (
            f"compiled at step {self.loop.step}: {len(self.graphs)} graph(s) of {nodes} operations in {seconds:.1f} s, "
            f"with tasks drawn {'in' if self.draws_tasks else 'before'} the graph and the optimizer's step "
            f"{'in' if step.update is not None else 'after'} it"
        )


def counts(without: int, broken: int) -> str:
    """For a report: steps that no graph has made."""
    texts = [f"{without} later steps eager for want of a graph"] * (without > 0)
    texts += [f"{broken} made again eagerly since a condition did not hold"] * (broken > 0)
    return "".join(f"; {text}" for text in texts)


class _NotWorthIt(Exception):
    """Compiling would take longer than it saves."""


def flatten(batch: TaskBatch) -> tuple[list[Tensor], Any]:
    """The tensors of a batch, contiguous, and what must be equal for another batch to take their place."""
    named = {(part, name): value for part in ("support", "query") for name, value in vars(getattr(batch, part)).items()}
    named["", "task_id"] = batch.task_id
    # compiled code is for one layout in memory
    tensors = {name: value.contiguous() for name, value in named.items() if value is not None}
    key = tuple((name, tuple(value.shape), value.dtype) for name, value in tensors.items())
    return list(tensors.values()), (key, batch.population)


def rebuild(batch: TaskBatch, tensors: Sequence[Tensor]) -> TaskBatch:
    """A batch like another with other tensors, in the order of :func:`flatten`."""
    rest = iter(tensors)

    def part(like: Observations) -> Observations:
        values: dict[str, Any] = {name: None if v is None else next(rest) for name, v in vars(like).items()}
        return Observations(**values)

    support = part(batch.support)
    query = part(batch.query)
    return replace(batch, support=support, query=query, task_id=None if batch.task_id is None else next(rest))
