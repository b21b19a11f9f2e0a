"""What a run does as one of several ranks: its part of a step, and its part of a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.errors import CheckpointError, EmptyTaskError, OptionError, RankError
from bayesmeta.ops.random import as_generator
from bayesmeta.train import checkpoint
from bayesmeta.train.distributed import Share, digest
from bayesmeta.train.memory import memory_for, memory_for_update

if TYPE_CHECKING:
    from bayesmeta.train.loop import Loop


def stream(loop: Loop, what: str) -> torch.Generator:
    """A generator of this rank's own: no two ranks, no two purposes and no two starts share its numbers."""
    if loop.ranks.size == 1 and loop.step == 0:
        return as_generator(loop.plan.seed, loop.device, what)
    name = f"{what} of rank {loop.ranks.rank} of {loop.ranks.size} from step {loop.step}"
    return as_generator(loop.plan.seed, loop.device, name)


# -- the start --------------------------------------------------------------------------------------------------------


def check_tasks(loop: Loop) -> None:
    """Refuse more tasks a step than there are, of which ranks would get the same ones.

    Raises:
        OptionError: naming the largest ``tasks_per_step``.
    """
    size, each, known = loop.ranks.size, loop.plan.tasks_per_step, loop.tasks.num_tasks
    if size > 1 and known is not None and size * each > known:
        raise OptionError(too_many_tasks(size, each, known))


def too_many_tasks(size: int, each: int, known: int) -> str:
    """What is said of ranks that would be given the same tasks."""
    advice = f"Use tasks_per_step={known // size} or less" if known >= size else "Use fewer ranks"
    return (
        f"{size} ranks with tasks_per_step={each} draw {size * each} tasks a step, and there are {known}: ranks "
        f"would be given the same ones. {advice}."
    )


def first_values(loop: Loop, first: TaskBatch, options: dict[str, Any]) -> dict[str, Any]:
    """What all ranks must share: model, options, and the numbers of a first batch and of the validation tasks."""
    method = checkpoint.fingerprint(loop.method)
    parameters = {name: str(p.dtype) for name, p in loop.method.named_parameters()}
    return {
        "method": method["method"],
        "the method's options": method["config"],
        "the shapes of the parameters": method["parameters"],
        "their dtypes": parameters,
        **loop.identity(),
        "clip": loop.clip,
        "nan_policy": loop.nan_policy,
        **options,
        "tasks": f"{type(loop.tasks).__name__} of {loop.tasks.num_tasks}",
        "the first batch (shapes, sums, sums of sizes)": _numbers(first),
        "the validation tasks (shapes, sums, sums of sizes)": [_numbers(batch) for batch in loop.validation.batches],
    }


def optimizer_values(loop: Loop) -> dict[str, Any]:
    """Kinds of optimizer and schedule, and the former's options."""
    groups = [{k: repr(v) for k, v in group.items() if k != "params"} for group in loop.optimizer.param_groups]
    schedule = None if loop.schedule is None else type(loop.schedule).__name__
    return {"the optimizer": type(loop.optimizer).__name__, "its options": groups, "the schedule": schedule}


def _numbers(batch: TaskBatch) -> list[Any]:
    """Shapes and sums, which differ where the data do."""
    found: list[Any] = []
    for part in (batch.support, batch.query):
        for value in vars(part).values():
            if value is not None:
                wide = value.double()
                found.append([list(value.shape), float(wide.sum()), float(wide.abs().sum())])
    return found


# -- a step -----------------------------------------------------------------------------------------------------------


def gradient(loop: Loop) -> tuple[Tensor, Tensor, int]:
    """Put the gradient of the tasks of all ranks into the parameters.

    Returns:
        Mean loss, norm of the gradient, and number of tasks, of all ranks; the same on each.

    Raises:
        RankError: when another rank failed or is gone.
        EmptyTaskError: when no rank has a real task.
    """
    loop.optimizer.zero_grad(set_to_none=True)
    before = {n: b.detach().clone() for n, b in loop.method.named_buffers() if b.is_floating_point()}
    share = _share(loop)
    # by name, since a method may put a new tensor in the place of a buffer
    now = dict(loop.method.named_buffers()) if before else {}
    buffers = [(now.get(name, old), old) for name, old in before.items()]
    total = loop.ranks.reduce(loop.parameters, buffers, share)  # type: ignore[attr-defined]
    if total.count == 0:
        raise EmptyTaskError(f"All tasks drawn for step {loop.step} are padding; at least one must be real.")
    loop.stop, loop.not_finite = total.signal or loop.stop, total.not_finite
    return total.loss, total.norm, total.count


def _share(loop: Loop) -> Share:
    """This rank's tasks, back to the parameters; whatever goes wrong is told to the others in the same exchange."""
    total, count, failure = torch.zeros((), device=loop.device), 0, loop.ranks.pending
    try:
        if failure is not None:
            raise failure
        with memory_for(f"Step {loop.step}", "chunk", loop.plan.chunk or loop.plan.tasks_per_step):
            found, count = _compiled(loop) or loop.backward_sum()
        total = found if count else total
    except Exception as error:
        failure = error
    return Share(total, count, failure, None if loop.signals is None else loop.signals.received)


def _compiled(loop: Loop) -> tuple[Tensor, int] | None:
    """The same by a compiled graph, whose gradient is of the mean; None where this step is to be eager."""
    found = None if loop.compiler is None else loop.compiler.gradient()
    if found is None or loop.compiler is None:
        return None
    loss, _, count = found
    loop.compiler.hand_over()
    for p in loop.parameters:
        if p.grad is not None:
            p.grad = p.grad * count  # not in place: two parameters may have one tensor of the graph
    return loss.detach() * count, count


@contextmanager
def told_later(loop: Loop) -> Iterator[None]:
    """Of several ranks, keep an error in the update of this one for the next exchange, where all stop for it.

    Nothing is written before that: each entry of the log and each checkpoint is such an exchange.
    """
    try:
        with memory_for_update(loop.step):
            yield
    except Exception as error:
        if loop.ranks.size == 1:
            raise
        loop.ranks.pending = error


# -- checkpoints ------------------------------------------------------------------------------------------------------


def state(loop: Loop) -> dict[str, Any]:
    """What a checkpoint holds of all ranks: their noise and their global generators; nothing of one alone.

    Raises:
        RankError: when the ranks have come apart, that is, their parameters differ in a bit.
    """
    if loop.ranks.size == 1:
        return {}
    mine = (digest(loop.parameters), loop.noise.get_state(), loop.global_generators())
    found = loop.ranks.collect(lambda: mine)
    for rank, (theirs, _, _) in enumerate(found):
        if theirs != found[0][0]:
            raise RankError(
                f"The parameters of rank {rank} are not those of rank 0 at step {loop.step}: the ranks have come "
                "apart. Something outside of fit changed them on one rank, or an optimizer or schedule draws numbers "
                "of its own. The last checkpoint is kept.",
                rank,
            )
    return {"ranks": {"noise": [noise for _, noise, _ in found], "global_generators": [g for _, _, g in found]}}


def size_of(content: dict[str, Any]) -> int:
    """How many ranks wrote a checkpoint."""
    return len(content["ranks"]["noise"]) if "ranks" in content else 1


def check_size(loop: Loop, options: dict[str, Any], theirs: int) -> dict[str, Any]:
    """A checkpoint's options, to compare with ours; with another number of ranks, the tasks of all ranks count.

    Raises:
        CheckpointError: when a step would have another number of tasks.
    """
    ours, each = loop.ranks.size, options["tasks_per_step"]
    if ours == theirs:
        return options
    if each * theirs != loop.plan.tasks_per_step * ours:
        raise CheckpointError(
            f"The run had {theirs} rank(s) with tasks_per_step = {each}, {each * theirs} tasks a step; here are {ours} "
            f"rank(s) with {loop.plan.tasks_per_step}. Go on with "
            + (f"tasks_per_step={each * theirs // ours}." if each * theirs % ours == 0 else f"{theirs} ranks.")
        )
    return options | {"tasks_per_step": loop.plan.tasks_per_step}


def restore(loop: Loop, content: dict[str, Any]) -> None:
    """Set this rank's noise and global generators; with another number of ranks than before they begin anew."""
    kept, theirs = content.get("ranks"), size_of(content)
    if theirs == loop.ranks.size:
        if kept is not None:
            loop.noise.set_state(kept["noise"][loop.ranks.rank].cpu())
            loop.set_global_generators(kept["global_generators"][loop.ranks.rank])
        else:
            loop.set_global_generators(content.get("global_generators", {}))
        return
    # apart from the tasks also where one rank goes on: the tasks are then those that several would have drawn
    loop.noise = stream(loop, "noise")
    seed = int(torch.randint(2**62, (), generator=stream(loop, "layers"), device=loop.device))
    torch.default_generator.manual_seed(seed)  # fit has put the caller's aside
    if loop.device.type == "cuda":
        with torch.cuda.device(loop.device):
            torch.cuda.manual_seed(seed)
    if loop.ranks.is_first:
        warnings.warn(_goes_on(loop, theirs, apart=theirs > 1 or content.get("noise") is not None), stacklevel=4)


def _goes_on(loop: Loop, theirs: int, apart: bool) -> str:
    """What another number of ranks means; ``apart``: the run's noise was not drawn from the tasks' generator."""
    exception = (
        ""
        if apart
        else " But one rank draws a method's noise with the tasks: for a method that has some, the tasks from here on "
        "are others than one rank would have drawn."
    )
    return (
        f"The run had {theirs} rank(s) until step {loop.step}, and goes on with {loop.ranks.size}. It has the same "
        "tasks at each step, and the same gradient for a method without noise of its own; the noise of methods and "
        f"layers begins anew, so that it is not bit for bit the run that it would have been.{exception}"
    )
