"""Padding batches to a few shapes, so that a few compiled graphs serve tasks of any length.

A compiled graph is for one shape. Where the shots of a batch differ from step to step, as they do where a query is all
that is left of a task, supports and queries are padded to a few lengths, the *buckets*, by masked copies of a real
observation (:func:`~bayesmeta.data.pad_shots`). A method that minds its mask gives the same loss and gradient; that
is checked before it is relied on, since a method may draw noise for each observation, padding included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch, pad_shots
from bayesmeta.errors import BayesMetaError

#: Batches that are looked at to choose the buckets; fewer where these are all alike.
LOOKED_AT, ENOUGH = 24, 8
#: More buckets are taken only while the padded lengths are, on average, more than this times the real ones.
WASTE = 1.15
#: A length beyond all that were seen is padded to the next of a series that grows by this.
GROWTH = 1.25
#: How far loss and gradient may move by padding, as a share of the largest number: float32, then float64.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


def choose(sizes: Sequence[int], most: int, waste: float = WASTE) -> list[int]:
    """Few buckets with little padding.

    Args:
        sizes: those that were seen, as often as they were.
        most: how many buckets there may be.
        waste: how many times the real sizes the padded ones may be, on average, before another bucket is taken.

    Returns:
        Ascending buckets, the last the largest size. Of so many, no others pad less.
    """
    counts = Counter(sizes)
    distinct = sorted(counts)
    buckets: list[int] = []
    for number in range(1, min(most, len(distinct)) + 1):
        padded, buckets = _best(distinct, [counts[size] for size in distinct], number)
        if padded <= waste * sum(sizes):
            break
    return buckets


def _best(sizes: Sequence[int], counts: Sequence[int], number: int) -> tuple[int, list[int]]:
    """The least sum of padded sizes with ``number`` buckets, and these."""
    ends = range(len(sizes))
    # of the sizes up to i: all in one bucket
    table = [(sizes[i] * sum(counts[: i + 1]), [sizes[i]]) for i in ends]
    for _ in range(number - 1):
        table = [
            min(
                [table[i]]
                + [(table[j][0] + sizes[i] * sum(counts[j + 1 : i + 1]), [*table[j][1], sizes[i]]) for j in range(i)]
            )
            for i in ends
        ]
    return table[-1]


def fitting(size: int, buckets: Sequence[int]) -> int:
    """The least bucket that holds a size; beyond the last, the next of a geometric series."""
    for bucket in buckets:
        if size <= bucket:
            return bucket
    steps = math.ceil(math.log(size / max(buckets[-1], 1)) / math.log(GROWTH) - 1e-9)
    return max(size, math.ceil(max(buckets[-1], 1) * GROWTH**steps))


@dataclass(frozen=True)
class Shape:
    """What differs between batches: numbers of tasks and shots, and whether there are masks."""

    tasks: int
    support: int
    query: int
    masks: tuple[bool, bool]

    @classmethod
    def of(cls, batch: TaskBatch) -> Shape:
        """Of a batch."""
        parts = batch.support, batch.query
        return cls(
            batch.num_tasks, parts[0].shots, parts[1].shots, (parts[0].mask is not None, parts[1].mask is not None)
        )


class Buckets:
    """To what batches are padded.

    Args:
        shapes: of some batches; none: nothing is padded.
        most: how many buckets there may be in all.
    """

    def __init__(self, shapes: Sequence[Shape] = (), most: int = 1) -> None:
        self.sizes: dict[str, list[int]] = {}  # buckets of what differs, by its name
        seen = {name: [getattr(shape, name) for shape in shapes] for name in ("tasks", "support", "query")}
        ragged = {name: sizes for name, sizes in seen.items() if len(set(sizes)) > 1}
        for name, sizes in ragged.items():
            self.sizes[name] = choose(sizes, max(1, int(most ** (1 / len(ragged)) + 1e-9)))
        masked = [any(shape.masks[part] for shape in shapes) for part in (0, 1)]
        #: which of support and query get a mask: all that may need one, for then their batches are alike
        self.masked = [m or name in ragged for m, name in zip(masked, ("support", "query"), strict=True)]

    @property
    def most(self) -> int:
        """How many shapes the batches that were seen come to."""
        return math.prod(len(sizes) for sizes in self.sizes.values())

    def pad(self, batch: TaskBatch) -> TaskBatch:
        """The batch with masked shots and, where numbers of tasks differ, padding tasks."""
        parts = [
            self._shots(part, name, masked)
            for part, name, masked in zip((batch.support, batch.query), ("support", "query"), self.masked, strict=True)
        ]
        padded = replace(batch, support=parts[0], query=parts[1])
        return pad_tasks(padded, fitting(batch.num_tasks, self.sizes["tasks"])) if "tasks" in self.sizes else padded

    def _shots(self, part: Observations, name: str, masked: bool) -> Observations:
        part = pad_shots(part, fitting(part.shots, self.sizes[name])) if name in self.sizes else part
        return replace(part, mask=part.full_mask()) if masked and part.mask is None else part


def pad_tasks(batch: TaskBatch, tasks: int) -> TaskBatch:
    """Add copies of the last task that count as padding (``task_id`` −1); names are dropped.

    A batch without ``task_id`` gets one, also where nothing is added, so that all batches of a run are alike.
    """
    extra = tasks - batch.num_tasks
    rows = torch.arange(tasks, device=batch.support.device).clamp(max=batch.num_tasks - 1)
    ids = rows if batch.task_id is None else batch.task_id[rows]
    if extra:
        ids = torch.cat([ids[: batch.num_tasks], ids.new_full((extra,), -1)])
    return replace(batch, support=batch.support.tasks(rows), query=batch.query.tasks(rows), task_id=ids, names=None)


# -- whether a method minds ---------------------------------------------------------------------------------------


def difference(
    lose: Callable[[TaskBatch], tuple[Tensor, Tensor]],
    batch: TaskBatch,
    padded: TaskBatch,
    parameters: Sequence[Tensor],
    generators: Sequence[torch.Generator],
    buffers: Sequence[Tensor] = (),
) -> str | None:
    """Why padding is not harmless, in words; None where the loss, its gradient and the noise are the same.

    Generators and buffers are left as they were.

    Args:
        lose: gives the loss of a batch, and what its gradient is taken of.
        batch, padded: the same tasks without and with padding.
        parameters: what the gradient is with respect to.
        generators: what the loss draws from.
        buffers: what it may change in place.
    """
    found = []
    for one in (batch, padded):
        with _undone(generators, buffers):
            loss, differentiated = lose(one)
            gradients = torch.autograd.grad(differentiated, parameters, allow_unused=True)
            states = [g.get_state() for g in generators]
            found.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None]), states))
    (loss, gradient, states), (its_loss, its_gradient, its_states) = found
    if any(not torch.equal(a, b) for a, b in zip(states, its_states, strict=True)):
        return "the method draws noise for each observation or task of a batch, padding included"
    tolerance = TOLERANCES.get(loss.dtype, 1e-2)
    for what, a, b in (("loss", loss, its_loss), ("gradient", gradient, its_gradient)):
        off, scale = float((a - b).abs().max()), float(a.abs().max())
        if not off <= tolerance * scale + 1e-30 and math.isfinite(scale):
            return f"padding moves the {what} by {off / max(scale, 1e-30):.2g} of its size, though it is masked"
    return None


@contextmanager
def _undone(generators: Sequence[torch.Generator], buffers: Sequence[Tensor]) -> Iterator[None]:
    states = [(g, g.get_state()) for g in generators]
    values = [(b, b.clone()) for b in buffers]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def learn(loop: Any, lose: Callable[[TaskBatch], tuple[Tensor, Tensor]], most: int) -> tuple[Buckets, str | None]:
    """Buckets for the batches of a run, and why something that differs is not padded all the same; None if all is.

    Batches are drawn apart, so that looking at them does not move the run.

    Args:
        loop: the run.
        lose: see :func:`difference`.
        most: how many buckets there may be.
    """
    apart = torch.Generator(device=loop.device).manual_seed(loop.plan.seed)
    batches = [loop.sample(apart) for _ in range(ENOUGH)]
    if len({Shape.of(batch) for batch in batches}) > 1:
        batches += [loop.sample(apart) for _ in range(LOOKED_AT - ENOUGH)]
    shapes = [Shape.of(batch) for batch in batches]
    first: str | None = None
    # where padding tasks are not harmless, another number of tasks is another graph, and shots may still be padded
    same = [replace(shape, tasks=shapes[0].tasks) for shape in shapes]
    for kept, number in ((shapes, most), (same, max(1, most // len({shape.tasks for shape in shapes})))):
        buckets = Buckets(kept, number)
        reason = _objection(loop, lose, batches, buckets)
        if reason is None:
            return buckets, first
        first = first or reason
        if "tasks" not in buckets.sizes:
            break
    return Buckets(), first


def _objection(
    loop: Any, lose: Callable[[TaskBatch], tuple[Tensor, Tensor]], batches: Sequence[TaskBatch], buckets: Buckets
) -> str | None:
    """Why these buckets do harm to the batches that are padded most: the smallest, to the largest shape."""
    most = Buckets()
    most.masked, most.sizes = buckets.masked, {name: sizes[-1:] for name, sizes in buckets.sizes.items()}
    generators = [loop.generator, loop.noise, torch.default_generator]
    if loop.device.type == "cuda":
        generators.append(torch.cuda.default_generators[loop.device.index or 0])
    for name in buckets.sizes:
        batch = min(batches, key=lambda one: int(getattr(Shape.of(one), name)))
        try:
            reason = difference(lose, batch, most.pad(batch), loop.parameters, generators, list(loop.method.buffers()))
        except BayesMetaError as error:
            reason = str(error)
        if reason is not None:
            return reason
    return None
