"""A replay buffer for each task, all of them held as one tensor a field on the device.

Off-policy learners draw from what was done before. Rows are tasks: what is drawn for a task was done in that task.
Insertion writes whole rollouts of many tasks by one scatter, drawing reads by one gather; there is no loop over tasks
and no copy but the batch. ``terminated`` and ``truncated`` are kept apart: nothing follows the one, and the other is
bootstrapped through (F. Pardo et al., "Time Limits in Reinforcement Learning", ICML 2018,
https://arxiv.org/abs/1712.00378, section 3).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from bayesmeta.errors import CheckpointError, OptionError, ReplayError, ShapeError
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class Transitions:
    """Steps (s, a, r, s′) of several tasks, ``[tasks, n, …]``.

    Attributes:
        observation, action: as the environment gives and takes them.
        reward: ``[tasks, n]``, floating.
        terminated, truncated: whether and how the episode ended with it, booleans ``[tasks, n]``; never merged.
        successor: the observation that the action led to, before any reset.
        extra: what else is kept of each step, by name, such as ``"dense_reward"``.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    successor: Tensor
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_rollout(cls, rollout: Rollout, extra: Sequence[str] = ()) -> Self:
        """The steps of a rollout, task by task: all of a task's first copy in their order, then those of the next.

        Args:
            rollout: ``[time, tasks × copies]``.
            extra: names of what it kept (see :func:`~bayesmeta.rl.rollout.collect`) to keep on.

        Raises:
            OptionError: for a name that the rollout has not.
        """
        for name in extra:
            if name not in rollout.extra:
                raise OptionError(f"The rollout kept nothing named {name!r}; give it to collect(…, keep=({name!r},)).")

        def by_task(value: Tensor) -> Tensor:
            return rollout.by_task(value).movedim(0, 2).flatten(1, 2)

        return cls(
            by_task(rollout.moments.observation), by_task(rollout.action), by_task(rollout.reward),
            by_task(rollout.terminated), by_task(rollout.truncated), by_task(rollout.successor),
            {name: by_task(rollout.extra[name]) for name in extra},
        )  # fmt: skip

    def as_dict(self) -> dict[str, Tensor]:
        """All tensors by name; those of ``extra`` as ``extra.name``."""
        names = (f.name for f in dataclasses.fields(self) if f.name != "extra")
        return {name: getattr(self, name) for name in names} | {f"extra.{k}": v for k, v in self.extra.items()}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of :meth:`as_dict`."""
        plain = {name: value for name, value in tensors.items() if not name.startswith("extra.")}
        extra = {name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")}
        return cls(**plain, extra=extra)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with ``function`` applied to each tensor."""
        return self.from_dict({name: function(value) for name, value in self.as_dict().items()})

    def with_reward(self, name: str | None) -> Self:
        """The same with another of the numbers kept in place of the reward; None changes nothing."""
        return self if name is None else dataclasses.replace(self, reward=self.extra[name])


class Replay:
    """The last ``capacity`` steps of each task, as a ring.

    Memory is taken when the first steps are added, which say what fields there are.

    Args:
        tasks: how many there are.
        capacity: steps kept of each.
        device: where the tensors live.

    Raises:
        OptionError: for numbers below 1.
    """

    def __init__(self, tasks: int, capacity: int, device: torch.device | str = "cpu") -> None:
        for name, value in (("tasks", tasks), ("capacity", capacity)):
            if not is_whole(value, 1):
                raise OptionError(f"{name} of a replay buffer must be a whole number of at least 1; got {value!r}.")
        self.tasks, self.capacity, self.device = tasks, capacity, torch.device(device)
        self._fields: dict[str, Tensor] = {}
        # counts live on the CPU, where looking at them waits for nothing
        self._size, self._next = torch.zeros(2, tasks, dtype=torch.int64)
        self._remembered: weakref.WeakSet[Remembered] = weakref.WeakSet()

    @property
    def sizes(self) -> Tensor:
        """Steps held of each task, ``[tasks]`` int64 on the CPU."""
        return self._size.clone()

    def __len__(self) -> int:
        """Steps held of all tasks together."""
        return int(self._size.sum())

    def clear(self, tasks: Tensor | None = None) -> None:
        """Forget the steps of some tasks, an index ``[m]``, or of all."""
        rows = slice(None) if tasks is None else tasks.cpu()
        self._size[rows] = 0
        self._next[rows] = 0

    def add(self, steps: Transitions | Rollout, tasks: Tensor | None = None, *, extra: Sequence[str] = ()) -> None:
        """Write steps behind those that are there; the oldest go.

        Args:
            steps: ``[m, n, …]``, or a rollout of m tasks. Of more than ``capacity`` steps the last are kept.
            tasks: which tasks they are of, an index ``[m]`` without repetitions; None: all.
            extra: of a rollout, names of what it kept to keep on.

        Raises:
            ShapeError: when the steps are not of as many tasks, or of other shapes or types than those held.
            ReplayError: for a task out of range or named twice, or other fields than those held.
        """
        if isinstance(steps, Rollout):
            steps = Transitions.of_rollout(steps, extra)
        given = {name: value[:, -self.capacity :] for name, value in steps.as_dict().items()}
        index = self._index(tasks)
        if len(index.unique()) < len(index):
            raise ReplayError("A task is named twice in what is added; give the steps of each task together.")
        self._prepare(given, len(index))
        count = given["reward"].shape[1]
        where = (self._next[index].unsqueeze(1) + torch.arange(count)) % self.capacity
        where = (where + index.unsqueeze(1) * self.capacity).flatten().to(self.device)
        for earlier in self._remembered:
            earlier.keep(where, self._fields)
        for name, value in given.items():
            self._fields[name].flatten(0, 1).index_copy_(0, where, value.detach().flatten(0, 1).to(self.device))
        self._next[index] = (self._next[index] + count) % self.capacity
        self._size[index] = (self._size[index] + count).clamp_max(self.capacity)

    def sample(
        self, batch: int, generator: torch.Generator, *, tasks: Tensor | None = None, recent: int | None = None
    ) -> Transitions:
        """Draw steps of each task, uniformly and with replacement.

        Args:
            batch: how many of each task.
            generator: on the buffer's device.
            tasks: which tasks, an index ``[m]``; None: all.
            recent: draw from a task's last ``recent`` steps alone.

        Returns:
            Steps ``[m, batch, …]``.

        Raises:
            ReplayError: when a task has no steps, naming it.
            OptionError: for a batch or ``recent`` that is no whole number of at least 1.
        """
        if not is_whole(batch, 1) or (recent is not None and not is_whole(recent, 1)):
            raise OptionError(f"batch and recent must be whole numbers of at least 1; got {batch!r} and {recent!r}.")
        index = self._index(tasks)
        sizes = self._size[index]
        if not bool(sizes.all()):
            raise ReplayError(
                f"The replay buffer has no steps of task {int(index[sizes == 0][0])}, of which {batch} were to be "
                "drawn. Collect a rollout of it and add() it first."
            )
        span = sizes if recent is None else sizes.clamp_max(recent)
        bounds = torch.stack([span, self._next[index], index * self.capacity]).to(self.device)
        # the draws count back from the newest, so that recent ones are the first of the span
        uniform = torch.rand(len(index), batch, generator=generator, dtype=torch.float64, device=self.device)
        back = (uniform * bounds[0].unsqueeze(1)).long().clamp_max_(bounds[0].unsqueeze(1) - 1)
        where = (bounds[1].unsqueeze(1) - 1 - back) % self.capacity + bounds[2].unsqueeze(1)

        def gather(value: Tensor) -> Tensor:
            return value.flatten(0, 1).index_select(0, where.flatten()).unflatten(0, where.shape)

        return Transitions.from_dict({name: gather(value) for name, value in self._fields.items()})

    # -- checks ---------------------------------------------------------------------------------------------------

    def _index(self, tasks: Tensor | None) -> Tensor:
        if tasks is None:
            return torch.arange(self.tasks)
        index = torch.as_tensor(tasks).cpu()
        if index.dim() != 1 or index.is_floating_point() or index.dtype is torch.bool or not len(index):
            raise ShapeError(f"tasks is {index.dtype} {list(index.shape)}; expected an index [m] of whole numbers.")
        if int(index.min()) < 0 or int(index.max()) >= self.tasks:
            raise ReplayError(
                f"Tasks {int(index.min())} … {int(index.max())} were named; this buffer has {self.tasks}, from 0."
            )
        return index

    def _prepare(self, given: Mapping[str, Tensor], rows: int) -> None:
        """Check what is added; at the first time, make room for it."""
        lead = given["reward"].shape[:2]
        for name, value in given.items():
            if value.shape[:2] != lead or lead[0] != rows or lead[1] == 0:
                raise ShapeError(
                    f"{name} has shape {list(value.shape)}; expected [{rows}, n, …] with n of at least 1, the same as "
                    "of the reward: the steps of each task."
                )
        if not self._fields:
            self._fields = {n: self._room(v.shape[2:], v.dtype) for n, v in given.items()}
        if given.keys() != self._fields.keys():
            raise ReplayError(
                f"Steps with {', '.join(given)} were given; this buffer holds {', '.join(self._fields)}. Use another "
                "buffer for other fields."
            )
        for name, value in given.items():
            mine = self._fields[name]
            if value.shape[2:] != mine.shape[2:] or value.dtype != mine.dtype:
                raise ShapeError(
                    f"{name} is {value.dtype} {list(value.shape[2:])} for each step; this buffer holds {mine.dtype} "
                    f"{list(mine.shape[2:])}."
                )

    def _room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.tasks, self.capacity, *shape, dtype=dtype, device=self.device)

    # -- going on later -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that is drawn later depends on; places never written to are left out."""
        return self.remember()()

    def remember(self) -> Remembered:
        """The state of this moment, to be asked for later: nothing is copied now but what is overwritten from now on.

        As long as the result is held, :meth:`add` keeps what it overwrites.
        """
        earlier = Remembered(self.capacity, self._size.clone(), self._next.clone(), dict(self._fields))
        self._remembered.add(earlier)
        return earlier

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            CheckpointError: when it is of a buffer of another size.
        """
        if (state["tasks"], state["capacity"]) != (self.tasks, self.capacity):
            raise CheckpointError(
                f"The state is of a replay buffer of {state['tasks']} tasks × {state['capacity']} steps; this one has "
                f"{self.tasks} × {self.capacity}."
            )
        self._size, self._next = state["size"].clone(), state["next"].clone()
        self._fields = {}  # other tensors: what was remembered has those of before
        self._remembered.clear()
        for name, value in state["fields"].items():
            self._fields[name] = self._room(value.shape[2:], value.dtype)
            self._fields[name][:, : value.shape[1]] = value.to(self.device)


class Remembered:
    """The state of a buffer as it was, see :meth:`Replay.remember`; called, it is the ``state_dict`` of that moment.

    Args:
        capacity: of the buffer.
        size, following: steps held of each task, and where its next one goes.
        fields: the buffer's own tensors, which it goes on writing to.
    """

    def __init__(self, capacity: int, size: Tensor, following: Tensor, fields: Mapping[str, Tensor]) -> None:
        self._capacity, self._size, self._next, self._fields = capacity, size, following, fields
        self._overwritten: list[tuple[Tensor, dict[str, Tensor]]] = []

    def keep(self, where: Tensor, fields: Mapping[str, Tensor]) -> None:
        """Keep what is about to be overwritten.

        Args:
            where: its places, task × capacity + column.
            fields: the buffer's tensors.
        """
        if not self._fields:
            return  # nothing was there
        self._overwritten.append((where, {n: v.flatten(0, 1).index_select(0, where) for n, v in fields.items()}))

    def __call__(self) -> dict[str, Any]:
        """The state, with tensors of its own."""
        filled = int(self._size.max())
        fields = {name: value[:, :filled].clone() for name, value in self._fields.items()}
        for where, old in reversed(self._overwritten):
            task, column = where // self._capacity, where % self._capacity
            held = column < filled
            for name, value in fields.items():
                value[task[held], column[held]] = old[name][held]
        return {
            "tasks": len(self._size),
            "capacity": self._capacity,
            "size": self._size.clone(),
            "next": self._next.clone(),
            "fields": fields,
        }
