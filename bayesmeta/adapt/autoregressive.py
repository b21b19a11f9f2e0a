"""Autoregressive prediction: each target that is drawn, or known, joins the support of the next; for any method.

Source: W. Bruinsma, S. Markou, J. Requeima, A. Foong, T. Andersson, A. Vaughan, A. Buonomo, J. Hosking, R. Turner,
"Autoregressive Conditional Neural Processes", ICLR 2023, https://arxiv.org/abs/2303.14468, section 3, eq. 2:

    q(y_1, …, y_M | S) = Π_i q(y_i | S ∪ {(x_j, y_j) : j < i})

The method is left as it was trained; only the way of asking it changes, so that one whose targets are independent given
the support gets dependent ones. For an exact method the product is its joint, in any order; otherwise the order counts.
Departures: the paper's draws go in a random order and so do ours by default, a fresh one for each task and draw; the
density that belongs to those draws is the mean over orders (``num_orders``), where the paper evaluates one. One step is
one point of x: several outputs there are drawn and scored together, as the method's likelihood has them, which are
independent for those built in.

The last targets have nearly all others in their support, so a method that learns from its training how much to believe
a support (any with an encoder) must have been trained with supports as large as support and targets together; else the
product can be worse than independent targets.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations, union
from bayesmeta.errors import DataError, EmptyTaskError, NoClosedFormError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator, forked_rng

Order = Literal["random", "given"] | Tensor

#: A row is a task with a prefix of its targets, or a draw of a task. By default as many go together as keep
#: rows × observations² below this, what exact and attentive methods hold; and rows below that, as a convolution holds
#: a whole grid for each.
_NUMBERS, _ROWS = 2**23, 2**12


class _Step(NamedTuple):
    """Tasks that are asked for one target each: what they are adapted to, and what they are asked."""

    support: Observations
    target: Observations


def autoregressive(method: Any, support: Observations, *, chunk: int | None = None) -> Autoregressive:
    """Predict with a trained method one target after another (Bruinsma et al. 2023).

    Args:
        method: anything with ``adapt``.
        support: of the tasks, ``[tasks, shots, …]``, with targets.
        chunk: most rows to adapt to at a time, which bounds the memory; a row is a task with one prefix of its
            targets, or one draw of a task. By default rows × observations² stays below 2²³, and rows below 4097. Rows
            of a chunk draw their noise together: with another ``chunk`` the same seed gives other draws.

    Returns:
        An object with ``predict`` for joint draws and ``log_likelihood`` for the joint density.

    Raises:
        OptionError: for a method without ``adapt``, or a chunk below 1.
        DataError and its kinds: for a support that cannot be used.
    """
    return Autoregressive(method, support, chunk=chunk)


class Autoregressive:
    """Joint prediction one target after another, made by :func:`autoregressive`. It is no posterior.

    There are no draws of φ behind it, so that :func:`~bayesmeta.scores`, :func:`~bayesmeta.plot_forecast` and
    :func:`~bayesmeta.to_datatree` do not take it: give them ``method.adapt(support)``.

    One step is exact where ``posterior.predictive`` has a closed form. Elsewhere a draw takes one new draw of φ a step
    (each step has its own posterior), which is exact too, and a density is a mean over draws of φ.

    Args:
        method, support, chunk: as in :func:`autoregressive`.
    """

    def __init__(self, method: Any, support: Observations, *, chunk: int | None = None) -> None:
        if not callable(getattr(method, "adapt", None)):
            raise OptionError(
                f"autoregressive takes a method, which has adapt(support); got {type(method).__name__}. Give the "
                "method itself, not its posterior."
            )
        if not isinstance(support, Observations):
            raise OptionError(f"The support is Observations; got {type(support).__name__}. Give batch.support.")
        if support.y is None:
            raise DataError("Autoregressive prediction needs the targets of the support; these have y=None.")
        if chunk is not None and chunk < 1:
            raise OptionError(f"chunk must be at least 1; got {chunk}.")
        self.method, self.support, self.chunk = method, support.check(), chunk

    # -- draws --------------------------------------------------------------------------------------------------

    def predict(
        self, x: Tensor | Observations, num_samples: int = 100, *, order: Order = "random", generator: Seed = None
    ) -> Tensor:
        """Draw the targets at all points of x together: each drawn one joins the support of the next.

        Costs one ``adapt`` for each point of x, of ``num_samples`` × tasks rows in chunks.

        Args:
            x: inputs ``[tasks, M, features]``, or observations whose y is ignored; masked points are drawn last.
            num_samples: number of draws n.
            order: ``"random"``: a fresh order for each draw and task; ``"given"``: as x stands; or a permutation of
                0 … M − 1, ``[M]`` or ``[tasks, M]``, that lists the points in their order.
            generator: generator or seed; None means seed 0.

        Returns:
            ``[n, tasks, M]``, or ``[n, tasks, M, outputs]``, in the dtype of the support's y; where that is integer and
            the likelihood draws floating numbers, in theirs.

        Raises:
            OptionError: for fewer than 1 draw, an order that is none, or more observations than the memory bound.
            ShapeError, DataError: for points that do not fit the support, or more than the method's ``max_shots``.
            EmptyTaskError: without a point.
        """
        if num_samples < 1:
            raise OptionError(f"num_samples must be at least 1; got {num_samples}.")
        points = self._points(x)
        self._check_shots(points, padded=True)
        generator = as_generator(generator, points.device, "autoregressive draws")
        size = self._chunk(points)
        tasks = torch.arange(self.support.num_tasks, device=points.device).repeat(num_samples)
        orders = self._orders(points, order, num_samples, generator).flatten(0, 1)
        drawn = [
            self._draw(self.support.tasks(part), points.tasks(part), turn, generator)
            for part, turn in zip(tasks.split(size), orders.split(size), strict=True)
        ]
        y = torch.cat(drawn)
        return y.reshape(num_samples, self.support.num_tasks, *y.shape[1:])

    def _draw(self, support: Observations, points: Observations, order: Tensor, generator: torch.Generator) -> Tensor:
        """One joint draw for each row, ``[rows, M, …]``, in the order of the points."""
        assert support.y is not None
        shots = support.shots
        y = support.y.new_zeros(*points.x.shape[:2], *support.y.shape[2:])
        # targets that are yet to be drawn are zeros behind the end of what is adapted to
        whole = union(support, _in_order(points.with_y(y), order))
        known = whole.y
        assert known is not None
        for i in range(shots, shots + points.shots):
            now = _Step(_shots(whole, slice(0, i)), _shots(whole, slice(i, i + 1)))
            drawn = self._next(now, generator)
            if drawn.is_floating_point() and not known.is_floating_point():
                known = known.to(drawn.dtype)  # real numbers, of which the given ones are integers
                whole = whole.with_y(known)
            known[:, i] = drawn.to(known.dtype)
        place = order.reshape(*order.shape, *([1] * (y.dim() - 2))).expand_as(y)
        return y.to(known.dtype).scatter(1, place, known[:, shots:])

    def _next(self, now: _Step, generator: torch.Generator) -> Tensor:
        """One draw of each row's target, ``[rows, …]``."""
        posterior = self.method.adapt(now.support, generator=generator)
        try:
            fn = posterior.predictive(now.target.with_y(None))
        except NoClosedFormError:
            # with draws of θ draw i of φ is under θ_i, for all rows; each row is to have its own
            theta = getattr(posterior, "theta", None)
            many = posterior.predict(now.target, 1 if theta is None else len(theta), generator=generator)
            rows = torch.arange(many.shape[1], device=many.device)
            pick = torch.randint(len(many), (len(rows),), generator=generator, device=many.device)
            return many[pick, rows, 0]
        with torch.no_grad(), forked_rng(generator):
            return fn.sample()[:, 0]

    # -- density ------------------------------------------------------------------------------------------------

    def log_likelihood(
        self,
        query: Observations,
        *,
        order: Order = "random",
        num_orders: int = 1,
        num_samples: int = 100,
        generator: Seed = None,
    ) -> Tensor:
        """log q(y_Q | S) = Σ_i log q(y_i | S, y_<i) of each task, its own targets before it being known.

        All prefixes of all tasks are adapted to side by side, in chunks. With several random orders the result is the
        log of the mean density over them, which is what :meth:`predict` draws from in a random order.

        Args:
            query: with targets; masked ones count nothing and are in no prefix.
            order: as in :meth:`predict`.
            num_orders: random orders to take the mean over.
            num_samples: draws of φ a step, where the predictive has no closed form. The log of their mean is then a
                little too low.
            generator: generator or seed; None means seed 0.

        Returns:
            ``[tasks]``, float64; 0 for a task whose query is all padding.

        Raises:
            OptionError: for a query that is no Observations, numbers below 1, an order that is none, several orders
                that are not random, or more observations than the memory bound.
            ShapeError, DataError: for a query that does not fit the support, has no targets, or impossible ones.
            EmptyTaskError: without a point.
        """
        if num_orders < 1 or num_samples < 1:
            raise OptionError(f"num_orders and num_samples must be at least 1; got {num_orders} and {num_samples}.")
        if num_orders > 1 and not (isinstance(order, str) and order == "random"):
            raise OptionError(f"num_orders={num_orders} goes with order='random'; one fixed order gives one density.")
        if not isinstance(query, Observations):
            raise OptionError(
                f"The query is Observations, which have the targets to score; got {type(query).__name__}. Give "
                "batch.query."
            )
        if query.y is None:
            raise DataError("A log-likelihood needs the targets of the query; these observations have y=None.")
        points = self._points(query)
        self._check_shots(points, padded=False)
        generator = as_generator(generator, points.device, "autoregressive density")
        orders = self._orders(points, order, num_orders, generator)
        each = torch.stack([self._teacher_forced(query, one, num_samples, generator) for one in orders])
        return each.logsumexp(0) - math.log(num_orders)

    def _teacher_forced(
        self, query: Observations, order: Tensor, num_samples: int, generator: torch.Generator
    ) -> Tensor:
        ordered = _in_order(query, order)
        whole, shots = union(self.support, ordered), self.support.shots
        # rows by the length of their prefix, so that a chunk is no longer than its longest
        place, task = ordered.full_mask().mT.nonzero(as_tuple=True)
        total = torch.zeros(query.num_tasks, dtype=torch.float64, device=query.device)
        if len(place) == 0:
            return total
        size = self._chunk(query)
        for i, t in zip(place.split(size), task.split(size), strict=True):
            rows, longest = whole.tasks(t), int(i.max())
            prefix = torch.arange(longest, device=i.device) < i.unsqueeze(-1)
            support = _shots(rows, slice(0, shots + longest))
            known = support.full_mask() & torch.cat([torch.ones_like(rows.x[:, :shots, 0]).bool(), prefix], 1)
            own = ordered.tasks(t)
            assert own.y is not None
            line = torch.arange(len(i), device=i.device)
            target = Observations(own.x[line, i].unsqueeze(1), own.y[line, i].unsqueeze(1), w=support.w)
            support = Observations(support.x, support.y, known, support.w)
            value = self._density(_Step(support, target), num_samples, generator)
            total = total.index_add(0, t, value.double())
        return total

    def _density(self, now: _Step, num_samples: int, generator: torch.Generator) -> Tensor:
        """log q of each row's one target, ``[rows]``."""
        posterior = self.method.adapt(now.support, generator=generator)
        with torch.no_grad():
            try:
                fn = posterior.predictive(now.target.with_y(None))
            except NoClosedFormError:
                each = posterior.log_likelihood(now.target, num_samples, generator=generator)[..., 0]
                return each.logsumexp(0) - math.log(len(each))
            try:
                return fn.log_prob(now.target.y)[:, 0]
            except ValueError as error:  # torch's, of its argument check
                raise DataError(f"The query has targets that the likelihood does not allow: {error}") from error

    # -- what both need -----------------------------------------------------------------------------------------

    def _points(self, x: Tensor | Observations) -> Observations:
        """Points of the same tasks, checked."""
        support = self.support
        points = x if isinstance(x, Observations) else Observations(x, w=support.w)
        if points.num_tasks != support.num_tasks or points.num_features != support.num_features:
            raise ShapeError(
                f"x has shape {list(points.x.shape)}; expected [{support.num_tasks}, points, {support.num_features}], "
                "the tasks and features of the support."
            )
        if points.y is not None and support.y is not None and points.y.shape[2:] != support.y.shape[2:]:
            raise ShapeError(
                f"y of the query has shape {list(points.y.shape)} and that of the support {list(support.y.shape)}; "
                "expected as many outputs."
            )
        if points.shots == 0:
            raise EmptyTaskError("There is no point to predict; give at least one for each task.")
        return points.check()

    def _check_shots(self, points: Observations, padded: bool) -> None:
        """Check that the last step is within ``max_shots`` of the method, before the first is taken.

        With ``padded`` steps go on to the padding, which is drawn given all real targets.
        """
        modules = self.method.modules() if isinstance(self.method, nn.Module) else ()
        bounds = [getattr(module, "max_shots", None) for module in modules]
        bound = min((b for b in bounds if isinstance(b, int)), default=None)
        real = points.full_mask().sum(-1)
        before = real.clamp(max=points.shots - 1) if padded else (real - 1).clamp(min=0)
        last = int((self.support.full_mask().sum(-1) + before).max())
        if bound is not None and last > bound:
            raise ShapeError(
                f"Before the last target a task has {last} observations, given and predicted ones; the method was "
                f"bounded to max_shots={bound}. Predict fewer points, or train with a higher bound."
            )

    def _chunk(self, points: Observations) -> int:
        if self.chunk is not None:
            return self.chunk
        longest = self.support.shots + points.shots
        if longest**2 > _NUMBERS:
            raise OptionError(
                f"Support and targets are {longest} observations a task, which may take much memory (observations² "
                f"above {_NUMBERS}). Predict fewer at a time, or say with chunk=… how many rows go together."
            )
        return min(_NUMBERS // longest**2, _ROWS)

    def _orders(self, points: Observations, order: Order, number: int, generator: torch.Generator) -> Tensor:
        """``number`` orders of each task's points, masked ones last, ``[number, tasks, M]``."""
        shape = (number, *points.x.shape[:2])
        if isinstance(order, str) and order == "random":
            rank = torch.rand(shape, generator=generator, device=points.device)
        elif isinstance(order, str) and order == "given":
            rank = torch.arange(points.shots, device=points.device).expand(shape)
        else:
            rank = _checked(order, points).argsort(-1).expand(shape)  # where each point stands in the order
        last = (~points.full_mask()).to(rank.dtype) * points.shots
        return (rank + last).argsort(-1)


def _checked(order: Any, points: Observations) -> Tensor:
    """A given order as ``[tasks, M]``.

    Raises:
        OptionError: for anything but permutations of all points.
    """
    shots = points.shots
    fits = isinstance(order, Tensor) and order.shape in ((shots,), (points.num_tasks, shots))
    if fits and order.dtype in (torch.int32, torch.int64):
        order = order.to(points.device).expand(points.num_tasks, shots)
        if torch.equal(order.sort(-1).values, torch.arange(shots, device=points.device).expand_as(order)):
            return order
    given = f"a tensor of shape {list(order.shape)}" if isinstance(order, Tensor) else repr(order)
    raise OptionError(
        f"order is 'random', 'given', or a permutation of 0 … {shots - 1}, [{shots}] or [{points.num_tasks}, {shots}] "
        f"integers; got {given}."
    )


def _in_order(points: Observations, order: Tensor) -> Observations:
    """The points of each task in an order ``[tasks, M]``."""
    row = torch.arange(points.num_tasks, device=points.device).unsqueeze(-1)
    y, mask = (None if part is None else part[row, order] for part in (points.y, points.mask))
    return Observations(points.x[row, order], y, mask, points.w)


def _shots(observations: Observations, index: slice) -> Observations:
    """Some of the shots of every task."""
    y, mask = (None if part is None else part[:, index] for part in (observations.y, observations.mask))
    return Observations(observations.x[:, index], y, mask, observations.w)
