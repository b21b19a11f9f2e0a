"""Which observations of a task become its support and its query, and how many tasks each part of a table gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bayesmeta.errors import OptionError

#: Which observations of a task become its support; see :class:`~bayesmeta.tasks.table.TableTasks`.
Order = Literal["first", "random", "mixed"]

#: Tasks are padded to the longest of those drawn unless this times their real rows would be exceeded.
_PADDING = 4


def draw(
    lengths: Sequence[int],
    support: int,
    width: int,
    order: Order,
    *,
    shuffle: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Positions of support and query within each drawn task.

    Memory is that of the real rows of the drawn tasks times a constant, however long the longest is.

    Args:
        lengths: rows of each drawn task, each at least ``support``.
        support: how many positions become the support.
        width: how many become the query, at most.
        order: ``"first"``: the support is positions 0, 1, …; ``"random"``: a uniform subset; ``"mixed"``: each task
            flips a fair coin between the two.
        shuffle: whether the query is a uniform subset of the rest, or the rest in order.
        generator: of the numbers drawn; its device is that of the result.

    Returns:
        The support ``[tasks, support]``, sorted; the query ``[tasks, width]``, of which the first
        ``length − support`` entries of a task are real and the others of no use.
    """
    if order == "first" and not shuffle:  # nothing is drawn
        position = torch.arange(support + width, device=generator.device).expand(len(lengths), -1)
        return position[:, :support], position[:, support:]
    padded = len(lengths) * max(lengths) <= _PADDING * sum(lengths)
    keys = (_PaddedKeys if padded else _FlatKeys)(lengths, generator)
    key = keys.in_order if order == "first" else keys.random()
    if order == "mixed":
        forecast = torch.rand((len(lengths), 1), generator=generator, device=generator.device) < 0.5
        key = keys.choose(forecast, keys.in_order, key)
    chosen = keys.lowest(key, support).sort(-1).values
    return chosen, keys.lowest(keys.last(keys.random() if shuffle else keys.in_order, chosen), width)


class _PaddedKeys:
    """Keys ``[tasks, longest]``, infinite where there is no row."""

    def __init__(self, lengths: Sequence[int], generator: torch.Generator) -> None:
        self.generator, device = generator, generator.device
        position = torch.arange(max(lengths), device=device).expand(len(lengths), -1)
        self.padding = position >= torch.tensor(lengths, device=device).unsqueeze(1)
        self.in_order = position.double().masked_fill(self.padding, torch.inf)

    def random(self) -> Tensor:
        """Uniform numbers."""
        shape, device = self.in_order.shape, self.in_order.device
        key = torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)
        return key.masked_fill(self.padding, torch.inf)

    def choose(self, first: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """One key or the other by task; ``first`` ``[tasks, 1]``."""
        return torch.where(first, one, other)

    def last(self, key: Tensor, positions: Tensor) -> Tensor:
        """The keys with those at positions ``[tasks, n]`` behind all others."""
        return key.scatter(1, positions, torch.inf)

    def lowest(self, key: Tensor, count: int) -> Tensor:
        """Positions of the lowest keys of each task, ``[tasks, count]``."""
        return key.argsort(-1)[:, :count]


class _FlatKeys:
    """Keys one after the other, one for each real row; sorting 2 · task + key sorts within each task.

    Keys lie between 0 and 1, and 1.5 is behind all others of a task.
    """

    def __init__(self, lengths: Sequence[int], generator: torch.Generator) -> None:
        self.generator, device = generator, generator.device
        count = torch.tensor(lengths, device=device)
        self.start = (count.cumsum(0) - count).unsqueeze(1)
        self.last_row = (count - 1).unsqueeze(1)
        self.task = torch.arange(len(lengths), device=device).repeat_interleave(count)
        self.position = torch.arange(len(self.task), device=device) - self.start.squeeze(1)[self.task]
        self.in_order = self.position.double() / count[self.task]

    def random(self) -> Tensor:
        """Uniform numbers."""
        shape, device = self.in_order.shape, self.in_order.device
        return torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)

    def choose(self, first: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """One key or the other by task; ``first`` ``[tasks, 1]``."""
        return torch.where(first.squeeze(1)[self.task], one, other)

    def last(self, key: Tensor, positions: Tensor) -> Tensor:
        """The keys with those at positions ``[tasks, n]`` behind all others."""
        return key.scatter(0, (self.start + positions).flatten(), 1.5)

    def lowest(self, key: Tensor, count: int) -> Tensor:
        """Positions of the lowest keys of each task, ``[tasks, count]``; those that a task lacks repeat its last."""
        sorted_positions = self.position[(2.0 * self.task + key).argsort()]
        wanted = torch.arange(count, device=key.device)
        return sorted_positions[self.start + torch.minimum(wanted, self.last_row)]


def split_sizes(
    sizes: Sequence[int] | Sequence[float], num_tasks: int, one: str = "task", several: str = "tasks"
) -> list[int]:
    """Sizes of the parts of a whole as numbers of tasks; fractions are rounded so that their sum is right.

    Args:
        sizes: of the parts.
        num_tasks: of the whole.
        one, several: what tasks are called, for the errors.

    Raises:
        OptionError: for sizes below 1, more tasks than there are, or fractions that are none.
    """
    counts = list(sizes)
    if any(isinstance(size, float) for size in sizes):
        if not all(0 < size < 1 for size in sizes) or sum(sizes) > 1 + 1e-9:
            raise OptionError(
                f"sizes={list(sizes)}; expected numbers of {several}, or fractions that add up to at most 1."
            )
        ends = [math.floor(sum(sizes[: i + 1]) * num_tasks + 0.5 - 1e-9) for i in range(len(sizes))]
        counts = [end - begin for begin, end in zip([0, *ends], ends)]
    if any(size < 1 for size in counts) or sum(counts) > num_tasks or not all(size == int(size) for size in counts):
        raise OptionError(
            f"sizes={list(sizes)} add up to {sum(counts)} of {num_tasks} {several}; expected sizes of at least 1 {one} "
            f"each that add up to at most the {num_tasks} {several} that there are."
        )
    return [int(size) for size in counts]
