"""Guides that keep parameters for each task: which tasks they know, and which of them a batch holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoDelta, AutoGuide, AutoGuideList, AutoMessenger, AutoNormal
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, EmptyTaskError, OptionError, PlateError, ShapeError, UnsupportedError
from bayesmeta.models.plates import TASK_DIM, TASKS, some_tasks, task_plate
from bayesmeta.ops.random import as_generator
from bayesmeta.train.arguments import as_arguments, as_observations

_NEW_TASKS = (
    "A guide that keeps parameters for each task (an AutoGuide does, for sites inside the task plate) knows only the "
    "tasks that it was trained on. For new tasks write a guide that reads the support, or use a method such as ABML."
)

_UNTOLD = (
    "These tasks have no task_id and other data, so that it cannot be told whether they are the guide's tasks: give a "
    f"TaskBatch with task_id, or the same data in the same order. {_NEW_TASKS}"
)


# -- guides -------------------------------------------------------------------------------------------------------


def automatic_parts(guide: Any) -> list[Any]:
    """The AutoGuides and AutoMessengers in a guide that hold parameters of their own."""
    if not isinstance(guide, nn.Module):
        return []
    parts = [m for m in guide.modules() if isinstance(m, AutoGuide | AutoMessenger)]
    return [m for m in parts if not isinstance(m, AutoGuideList | AutoCallable)]


#: Size and dimension of a plate.
Plate = tuple[int, int | None]


def task_sizes(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, run: bool) -> set[int]:
    """Sizes of :func:`task_plates`."""
    return {size for size, _ in task_plates(part, args, kwargs, run=run)}


def task_plates(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, run: bool) -> set[Plate]:
    """The task plates around a guide's latent sites: empty for one that has no parameters for each task.

    Args:
        part: one of :func:`automatic_parts`.
        args, kwargs: of the model.
        run: run the part's model; else the guide itself must have been run. The global random state is kept.
    """
    if isinstance(part, AutoMessenger) and TASKS in part.amortized_plates:
        return set()
    trace = getattr(part, "prototype_trace", None)
    if run:
        devices = [a.device for a in args if isinstance(a, Tensor) and a.is_cuda][:1]
        with torch.random.fork_rng(devices=devices), torch.no_grad(), poutine.block(), pyro.get_param_store().scope():
            trace = poutine.trace(part.model).get_trace(*args, **kwargs)
    if trace is None:
        return set()
    frames = [frame for site in _latent(trace) for frame in site["cond_indep_stack"] if frame.name == TASKS]
    return {(frame.full_size, frame.dim) for frame in frames}


def _is_the_users_own(plates: set[Plate], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether no plate is of tasks as bayesmeta has them: at another dimension, and around other data."""
    if any(dim == TASK_DIM for _, dim in plates):
        return False
    if not plates:
        return True
    try:
        as_observations(args, kwargs)
    except OptionError:
        return True
    return False


def local_names(parts: list[Any], trace: Any) -> set[str]:
    """Latent sites inside the task plate of guides that have been run; ``trace`` is that of the whole guide."""
    sites = [site for part in parts for site in _latent(getattr(part, "prototype_trace", trace))]
    return {site["name"] for site in sites if any(frame.name == TASKS for frame in site["cond_indep_stack"])}


def _latent(trace: Any) -> list[Any]:
    """The latent sites, without those that are a plate's rows."""
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not site["is_observed"]]
    return [site for site in sites if not site_is_subsample(site)]


@contextmanager
def rows_of(guide: nn.Module, x: Tensor, rows: Tensor, size: int) -> Iterator[None]:
    """Run model and guide as the given rows of ``size`` tasks: the task plates are a subsample, and scale as such.

    Args:
        guide: whose outermost AutoGuides get their task plate from here, where their owner gave no other.
        x: inputs, ``[rows, shots, features]``.
        rows: ``[tasks]``.
        size: tasks in all.
    """
    outer = [m for m in guide.modules() if isinstance(m, AutoGuide) and m.master is None and m.create_plates is None]
    with ExitStack() as stack:
        stack.enter_context(some_tasks(rows, size))
        for part in outer:
            part.create_plates = lambda *_, **__: task_plate(x)
            stack.callback(setattr, part, "create_plates", None)
        yield


# -- tasks --------------------------------------------------------------------------------------------------------


def fingerprints(observations: Observations) -> Tensor:
    """A number of 64 bits for the data of each task, whatever the order and the padding of its shots, ``[tasks]``."""
    parts = [observations.x]
    if observations.y is not None:
        parts.append(observations.y if observations.y.dim() == 3 else observations.y.unsqueeze(-1))
    shots = torch.where(observations.full_mask(), _hash(torch.cat([p.double() for p in parts], -1)), 0)
    total = _mix(shots.sum(-1))
    return total if observations.w is None else total + _hash(observations.w.double())


def _hash(numbers: Tensor) -> Tensor:
    """Of the last dimension of a tensor of float64."""
    bits = (numbers + 0.0).view(torch.int64)  # −0 becomes 0
    generator = as_generator(0, stream="fingerprints")
    keys = torch.randint(-(2**62), 2**62, (numbers.shape[-1],), generator=generator)
    return _mix(_mix(bits ^ keys.to(bits.device)).sum(-1))


def _mix(bits: Tensor) -> Tensor:
    """A bijection of integers of 64 bits that leaves no sum as it was (multiply and shift, twice; products wrap)."""
    for factor in (-7046029254386353131, -4658895280553007687):
        bits = bits * factor
        bits = bits ^ (bits >> 29)
    return bits


@dataclass
class KnownTasks:
    """The tasks that a guide has parameters for, in the order of its rows.

    Tasks are told apart by ``task_id`` where there is one, and else by their data; in both cases a task must bring
    the same data each time, in any order, since its parameters stand for one posterior.

    Attributes:
        size: tasks in all; those not yet met have rows too.
        ids: ``task_id`` of the rows that are taken, ``[known]``; None where tasks have none.
        prints: :func:`fingerprints` of their data, ``[known]``.
    """

    size: int
    ids: Tensor | None
    prints: Tensor

    @classmethod
    def first(cls, observations: Observations, ids: Tensor | None, population: int | None, *, some: bool) -> KnownTasks:
        """From the first step's tasks: all there are, or where there are ids and a larger population, some of it.

        Raises:
            DataError: for the same id twice.
            UnsupportedError: for some of a population, unless the guides can take ``some``.
        """
        prints, size = fingerprints(observations).cpu(), observations.num_tasks
        if ids is None:
            return cls(size, None, prints)
        _check_once(ids)
        if population is not None and population > size:
            if not some:
                raise UnsupportedError(
                    f"The batch has {size} of {population} tasks (its population), and this guide has parameters for "
                    "all tasks at once. Give all tasks in each step; or use AutoNormal or AutoDelta as the guide "
                    "itself, which can be trained on some at a time; or, to fit these tasks alone, "
                    "dataclasses.replace(batch, population=None)."
                )
            size = population
        return cls(size, ids.cpu(), prints)

    def rows(self, observations: Observations, ids: Tensor | None, *, learn: bool = False) -> Tensor:
        """The guide's row for each task, ``[tasks]``.

        Args:
            observations: of the tasks.
            ids: their ``task_id``.
            learn: give tasks that were not met before the rows that are left.

        Raises:
            ShapeError: for another number of tasks where the first had no id.
            DataError: for other tasks, other data of the same tasks, or the same task twice.
        """
        prints = fingerprints(observations).cpu()
        if self.ids is None:
            self._check_the_same(prints, ids)
            return torch.arange(len(prints))
        if ids is None:
            return self._by_data(prints)
        _check_once(ids)
        place = {task: row for row, task in enumerate(self.ids.tolist())}
        new = [i for i, task in enumerate(ids.tolist()) if task not in place]
        if new and not (learn and len(place) + len(new) <= self.size):
            names = ", ".join(str(int(ids[i])) for i in new[:5])
            raise DataError(f"{len(new)} task(s) are not among the guide's {self.size}: task_id {names}. {_NEW_TASKS}")
        known_ids = torch.cat([self.ids, ids.cpu()[new]])
        known = torch.cat([self.prints, prints[new]])
        place = {task: row for row, task in enumerate(known_ids.tolist())}
        rows = torch.tensor([place[task] for task in ids.tolist()], dtype=torch.long)
        other = (known[rows] != prints).nonzero().flatten()
        if len(other):
            raise DataError(
                f"{len(other)} task(s) have other observations than in the guide's first step on them, such as task_id "
                f"{int(ids[other[0]])}: a guide that keeps parameters for each task knows only the tasks that it was "
                "trained on, with the data that it was trained on. Give a task all its observations in every step "
                "(query=None, where tasks are sampled)."
            )
        self.ids, self.prints = known_ids, known
        return rows

    def _check_the_same(self, prints: Tensor, ids: Tensor | None) -> None:
        if prints.equal(self.prints):
            return
        if len(prints) != self.size:
            raise ShapeError(f"There are {len(prints)} tasks, and the guide was made for {self.size}. {_NEW_TASKS}")
        if ids is not None:
            raise DataError(f"Those of the guide's first step had no task_id, and these have other data. {_NEW_TASKS}")
        raise DataError(_UNTOLD)

    def _by_data(self, prints: Tensor) -> Tensor:
        """Rows of tasks that come without id, where their data are those of one known task each."""
        place = {mark: row for row, mark in enumerate(self.prints.tolist())}
        rows = [place[mark] for mark in prints.tolist() if mark in place]
        if len(set(rows)) < len(prints) or len(place) < len(self.prints):
            raise DataError(_UNTOLD)
        return torch.tensor(rows, dtype=torch.long)


def _check_once(ids: Tensor) -> None:
    unique, counts = ids.unique(return_counts=True)
    if len(unique) < len(ids):
        raise DataError(
            f"task_id {int(unique[counts.argmax()])} is {int(counts.max())} times in one batch; a guide that keeps "
            "parameters for each task takes each once. Ask for at most as many tasks as there are."
        )


class GuideTasks:
    """The tasks of one guide, from its first step on.

    Args:
        guide: any Pyro guide; one without automatic parts keeps no tasks that could be told.
        model: its model, whose arguments a part is given; None: whatever Observations stand for.

    Attributes:
        parts: see :func:`automatic_parts`.
        known: None before the first step, and for a guide without parameters for each task.
    """

    def __init__(self, guide: Any, model: Any = None) -> None:
        self.guide, self.model = guide, model
        self.parts = automatic_parts(guide)
        self.known: KnownTasks | None = None
        # a guide of the user's own may call an automatic part as it likes: what it holds is known after its first run
        self._whole = isinstance(guide, AutoGuide | AutoMessenger)
        self._has_run = False
        self._pending: tuple[Any, ...] | None = None

    @property
    def takes_some(self) -> bool:
        """Whether it can be run for some of its tasks: parameters of these classes follow the rows of a plate."""
        return self._whole and all(isinstance(part, AutoNormal | AutoDelta | AutoMessenger) for part in self.parts)

    def unpack(self, observations: Observations) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What model and guide are given for observations.

        Raises:
            EmptyTaskError, ModelError: for no observation at all; as :func:`~bayesmeta.train.arguments.as_arguments`.
        """
        if observations.shots == 0 or observations.num_tasks == 0:
            raise EmptyTaskError("MetaSVI needs at least one task and one observation: a Pyro plate cannot be empty.")
        return as_arguments(observations, () if self.model is None else (self.model, self.guide))

    def keeps(self, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Tensor | None, population: int | None) -> bool:
        """Whether the guide has parameters for each task; asked before each step, and at the first it learns the tasks.

        Args:
            args, kwargs: of the model.
            ids, population: of the batch that they come from.

        Raises:
            UnsupportedError, PlateError, ShapeError, DataError: for tasks that the guide cannot be trained on.
        """
        if not self.parts or self.known is not None:
            return self.known is not None
        if not self._has_run and self._whole:
            plates = set[Plate]().union(*(task_plates(part, args, kwargs, run=True) for part in self.parts))
            if not _is_the_users_own(plates, args, kwargs):
                self.known = self._begin(as_observations(args, kwargs), ids, population)
        elif not self._has_run:
            self._pending = args, kwargs, ids, population
        elif self._pending is not None:
            self._settle()
        self._has_run = True
        return self.known is not None

    def _begin(self, observations: Observations, ids: Tensor | None, population: int | None) -> KnownTasks:
        known = KnownTasks.first(observations, ids, population, some=self.takes_some)
        args, kwargs = self.unpack(observations)
        with self._rows_of(observations, torch.arange(observations.num_tasks), known):
            sizes = set[int]().union(*(task_sizes(part, args, kwargs, run=True) for part in self.parts))
        if sizes != {known.size}:
            raise PlateError(
                f"The batch has {observations.num_tasks} of {known.size} tasks, and the model's task plate is of size "
                f"{sizes}. Open it by bm.task_plate(x), which knows of the others."
            )
        before = set[int]().union(*(task_sizes(part, args, kwargs, run=False) for part in self.parts))
        if before - {known.size}:
            raise ShapeError(f"The guide has been run on {before} tasks before, and is now given {known.size}.")
        return known

    def _settle(self) -> None:
        """Look at a guide of the user's own after its first run."""
        if self._pending is None:
            return
        args, kwargs, ids, population = self._pending
        plates = set[Plate]().union(*(task_plates(part, (), {}, run=False) for part in self.parts))
        if not _is_the_users_own(plates, args, kwargs):
            self.known = KnownTasks.first(as_observations(args, kwargs), ids, population, some=False)
        self._pending = None

    def enter(
        self, observations: Observations, ids: Tensor | None, elbo: Any
    ) -> tuple[Observations, AbstractContextManager[None]]:
        """Observations in the order of the guide's rows, and the context in which they are those rows.

        Raises:
            DataError, ShapeError: for tasks that the guide does not know.
            UnsupportedError: for some of its tasks, where it must have all.
        """
        known = self.known
        assert known is not None
        rows = known.rows(observations, ids, learn=True)
        if len(rows) < known.size and not self.takes_some:
            raise UnsupportedError(
                f"The batch has {len(rows)} of the guide's {known.size} tasks, and this guide has parameters for all "
                "tasks at once. Give all tasks in each step; or use AutoNormal or AutoDelta as the guide itself, which "
                "can be trained on some at a time."
            )
        if len(rows) < known.size and type(elbo).__name__.startswith("Jit"):
            raise UnsupportedError(
                f"{type(elbo).__name__} compiles the model for one set of tasks, and the batch has {len(rows)} of the "
                f"guide's {known.size}. Use the ELBO without Jit."
            )
        if len(rows) == known.size and not rows.equal(torch.arange(known.size)):
            order = rows.argsort()
            observations, rows = observations.tasks(order.to(observations.device)), rows[order]
        return observations, self.within(observations, rows)

    def within(self, observations: Observations, rows: Tensor | None) -> AbstractContextManager[None]:
        """The context in which model and guide are run on these rows, or on all in the guide's order."""
        if self.known is None or rows is None or not self.takes_some:
            return nullcontext()
        if len(rows) == self.known.size:  # Pyro's plates look at the rows of a true subsample alone
            rows = torch.arange(len(rows))
        return self._rows_of(observations, rows, self.known)

    def _rows_of(self, observations: Observations, rows: Tensor, known: KnownTasks) -> AbstractContextManager[None]:
        if known.ids is None or not self.takes_some:
            return nullcontext()
        return rows_of(self.guide, observations.x, rows.to(observations.device), known.size)

    def find(self, given: Observations | TaskBatch) -> tuple[Observations, Tensor | None]:
        """What the guide's posterior of some tasks is given, and their rows; None where it keeps no tasks.

        Raises:
            DataError, ShapeError: for tasks, or data of them, that the guide was not trained on.
        """
        ids = None
        if isinstance(given, TaskBatch):
            batch = given.without_padding()
            choices, ids = [batch.support], batch.task_id
            if batch.query.shots and (batch.query.y is None) == (batch.support.y is None):
                choices.append(batch.union())
        else:
            choices = [given]
        if not self.parts:
            return choices[0], None
        if not self._has_run:
            raise DataError("An AutoGuide has no parameters before its first run: take a step first.")
        self._settle()
        if self.known is None:
            return choices[0], None
        for choice in choices[:-1]:
            with suppress(DataError):
                return choice, self.known.rows(choice, ids)
        return choices[-1], self.known.rows(choices[-1], ids)

    def runs_some(self, rows: Tensor | None) -> bool:
        """Whether the guide is run for these rows alone, rather than for all of its tasks."""
        return self.known is not None and rows is not None and self.takes_some and len(rows) < self.known.size

    def take(self, trace: Any, rows: Tensor | None) -> None:
        """Keep these rows of the local sites in a trace of the guide, where it was run for all of its tasks."""
        if self.known is None or rows is None or rows.equal(torch.arange(self.known.size)):
            return
        if self.runs_some(rows):
            return
        for name in local_names(self.parts, trace):
            node = trace.nodes[name]
            dim = node["value"].dim() - node["fn"].event_dim - 2
            node["value"] = node["value"].index_select(dim, rows.to(node["value"].device))
        if TASKS in trace.nodes:  # the guide's plate is of all tasks, the model's of these
            trace.remove_node(TASKS)

    def state(self) -> dict[str, Any] | None:
        """Plain values and tensors."""
        self._settle()
        return None if self.known is None else dict(vars(self.known))

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over the tasks of another guide's state, whose parameters have been copied."""
        if state is not None:
            self.known = KnownTasks(**state)
