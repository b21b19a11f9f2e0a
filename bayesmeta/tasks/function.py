"""A user's own generator of tasks: a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch, collate
from bayesmeta.errors import DataError, DeviceMismatchError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.tasks.cuts import cut_ragged
from bayesmeta.tasks.families import check_counts, check_population, cut

#: x, y and, if there are any, task-level covariates w.
Data = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
#: Which rows of a task become the support.
Order = Literal["first", "random"]


class FunctionTasks:
    """Tasks from a function of your own.

    ``function(num_tasks, shots, generator)`` draws all tasks of a batch at once and returns ``(x, y)`` or
    ``(x, y, w)``: x ``[num_tasks, shots, features]``, y ``[num_tasks, shots]`` or ``[num_tasks, shots, outputs]``,
    task-level covariates w ``[num_tasks, covariates]``. The first ``support`` shots become the support, the others the
    query, so the shots of a task must be exchangeable. For a function that makes one task at a time, use
    :meth:`per_task`.

    All random numbers must come from the generator that is given, with tensors on its device: then a seed gives the
    same run, and a resumed run goes on bit by bit. At first use the function is called twice from one state of the
    generator; it must have drawn numbers and must return the same data. For code that draws with numpy, draw a seed:
    ``numpy.random.default_rng(int(torch.randint(2**62, (), generator=generator)))`` (on a CPU generator).

    A function draws new tasks each time. For a finite set of fixed tasks draw once: ``FixedTasks(tasks.sample(100,
    support=…, query=…))``.

    Args:
        function: see above.
        num_tasks: size N of the population that the function draws from, by which a hyperprior is shared out; None:
            endless. Which task is which stays unknown: batches have no ``task_id``.

    Raises:
        OptionError: for something that cannot be called, or fewer than one task.
    """

    def __init__(self, function: Callable[[int, int, torch.Generator], Data], *, num_tasks: int | None = None) -> None:
        if not callable(function):
            raise OptionError(
                f"function is a {type(function).__name__}; expected a function of num_tasks, shots and generator."
            )
        check_population(num_tasks)
        self.function: Callable[..., Any] = function
        self.num_tasks = num_tasks
        self.order: Order | None = None
        self._checked = False

    @classmethod
    def per_task(
        cls, function: Callable[[torch.Generator], Data], *, order: Order = "first", num_tasks: int | None = None
    ) -> FunctionTasks:
        """Tasks from a function that makes one task at a time.

        ``function(generator)`` returns ``(x, y)`` or ``(x, y, w)``: x ``[rows, features]``, y ``[rows]`` or
        ``[rows, outputs]``, w ``[covariates]``. Tasks may have different numbers of rows; queries are then padded and
        masked. The function is called once for each task, in a Python loop: slower than one call for all.

        Args:
            function: see above.
            order: ``"first"``: the first rows become the support, the next ones the query (time series); ``"random"``:
                each task's rows are shuffled.
            num_tasks: as for the class.

        Raises:
            OptionError: for something that cannot be called, an unknown order, or fewer than one task.
        """
        if order not in get_args(Order):
            raise OptionError(f"order={order!r} is not known; expected one of {', '.join(get_args(Order))}.")
        tasks = cls(function, num_tasks=num_tasks)  # type: ignore[arg-type]
        tasks.order = order
        return tasks

    def sample(self, num_tasks: int, *, support: int, query: int | None = None, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch on the generator's device.

        Args:
            num_tasks: number of tasks.
            support: observations in each support.
            query: observations in each query; None, for :meth:`per_task` alone: all that is left.
            generator: generator or seed; None means seed 0.

        Raises:
            OptionError: for numbers out of range.
            DataError: when the function returns something else than tensors, or at first use does not draw from the
                generator, or not from it alone.
            ShapeError, DeviceMismatchError: for data of another shape, device or dtype.
            NonFiniteDataError: for NaN or infinity.
            EmptyTaskError: naming a task with fewer than ``support + 1`` rows.
        """
        if self.order is None:
            shots = check_counts(num_tasks, support, query)
        else:  # the function decides how many rows a task has
            shots = check_counts(num_tasks, support, 1 if query is None else query)
        generator = as_generator(generator, stream="tasks")
        before = generator.get_state()
        drawn = self._draw(num_tasks, shots, generator)
        if not self._checked:
            self._check_randomness(drawn, before, num_tasks, shots, generator)
            self._checked = True
        if self.order is None:
            first, rest = cut(drawn, support)
        else:
            first, rest = cut_ragged(drawn, support, query, shuffle=generator if self.order == "random" else None)
        return TaskBatch(first, rest, population=self.num_tasks)

    def _draw(self, num_tasks: int, shots: int, generator: torch.Generator) -> Observations:
        """Call the function and check what it returns."""
        if self.order is None:
            x, y, w = _read(self.function(num_tasks, shots, generator), generator.device)
            if x.dim() != 3 or x.shape[:2] != (num_tasks, shots) or y.shape[:2] != (num_tasks, shots):
                raise ShapeError(
                    f"The function returned x of shape {list(x.shape)} and y of shape {list(y.shape)} for {num_tasks} "
                    f"tasks of {shots} shots; expected x [{num_tasks}, {shots}, features], and y "
                    f"[{num_tasks}, {shots}] or [{num_tasks}, {shots}, outputs]. For one task at a time use "
                    "FunctionTasks.per_task."
                )
            return Observations(x, y, w=w).check()
        parts = [_read(self.function(generator), generator.device) for _ in range(num_tasks)]
        for task, part in enumerate(parts):
            _check_task(task, part, parts[0])
        covariates = [part[2] for part in parts if part[2] is not None]
        return collate(
            [part[0] for part in parts],
            [part[1] for part in parts],
            w=torch.stack(covariates) if covariates else None,
        )

    def _check_randomness(
        self, drawn: Observations, before: Tensor, num_tasks: int, shots: int, generator: torch.Generator
    ) -> None:
        """The same state must give the same data, and the data must come from it."""
        if torch.equal(before, generator.get_state()):
            raise DataError(
                "The function drew no number from the generator that it was given, so that each batch would be the "
                "same, or not reproducible. Pass generator=generator to torch's random functions, or draw a seed from "
                "it for another library. For fixed tasks use FixedTasks."
            )
        twin = torch.Generator(device=generator.device)
        twin.set_state(before)
        again = self._draw(num_tasks, shots, twin)
        if not all(_same(ours, theirs) for ours, theirs in zip(vars(drawn).values(), vars(again).values())):
            raise DataError(
                "The function returned different data for the same state of the generator: it draws random numbers "
                "elsewhere too (torch's or numpy's global ones, or a generator of its own). Draw all of them from "
                "the generator that is given, so that a seed gives the same run."
            )


Read = tuple[Tensor, Tensor, Tensor | None]


def _read(returned: Any, device: torch.device) -> Read:
    """x, y and w as they were returned, checked for kind, device and dtype."""
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        given = f"{len(returned)} values" if isinstance(returned, tuple | list) else type(returned).__name__
        raise DataError(f"The function returned {given}; expected a tuple (x, y), or (x, y, w).")
    for name, value in zip("xyw", returned):
        if not isinstance(value, Tensor):
            raise DataError(
                f"The function returned {name} as {type(value).__name__}; expected torch tensors on the generator's "
                f"device. Turn it into one with torch.as_tensor({name}, dtype=torch.float32)."
            )
        if value.device.type != device.type or (device.index or 0) != (value.device.index or 0):
            raise DeviceMismatchError(
                f"The function returned {name} on {value.device}, but the generator is on {device}. Create tensors "
                "with device=generator.device."
            )
    x, y, w = (*returned, None)[:3]
    if not x.is_floating_point():
        raise DataError(f"The function returned x of dtype {x.dtype}; expected a floating dtype, such as float32.")
    for name, value in (("y", y), ("w", w)):
        if value is not None and value.is_floating_point() and value.dtype != x.dtype:
            raise DeviceMismatchError(
                f"The function returned x of dtype {x.dtype} and {name} of dtype {value.dtype}; expected one dtype."
            )
    return x.detach(), y.detach(), None if w is None else w.detach()


def _check_task(task: int, part: Read, first: Read) -> None:
    """Shapes of one task, and whether they fit those of task 0."""
    (x, y, w), (x_0, y_0, w_0) = part, first
    shapes = f"x {list(x.shape)}, y {list(y.shape)}" + ("" if w is None else f", w {list(w.shape)}")
    if x.dim() != 2 or y.dim() not in (1, 2) or len(x) != len(y) or (w is not None and w.dim() != 1):
        raise ShapeError(
            f"The function returned {shapes} for task {task}; expected x [rows, features], y [rows] or [rows, "
            "outputs], and w [covariates]."
        )
    same_w = (w is None) == (w_0 is None) and (w is None or w_0 is None or w.shape == w_0.shape)
    if x.shape[1:] != x_0.shape[1:] or y.shape[1:] != y_0.shape[1:] or not same_w:
        raise ShapeError(
            f"The function returned {shapes} for task {task}, but x {list(x_0.shape)}, y {list(y_0.shape)}"
            f"{'' if w_0 is None else f', w {list(w_0.shape)}'} for task 0; expected the same features, outputs and "
            "covariates for all tasks."
        )
    if x.dtype != x_0.dtype or y.dtype != y_0.dtype:
        raise DeviceMismatchError(
            f"The function returned x, y of dtypes {x.dtype}, {y.dtype} for task {task}, but {x_0.dtype}, {y_0.dtype} "
            "for task 0; expected the same."
        )


def _same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours, theirs)
