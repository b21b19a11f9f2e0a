"""Several methods on the same tasks: which is better, and can these tasks tell?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.scores import Scores, scores
from bayesmeta.diagnostics.uniformity import t_test
from bayesmeta.errors import DataError, EmptyTaskError, OptionError, ShapeError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Scores of which more is better; of the other comparable ones less is.
_MORE = frozenset({"accuracy"})
_NO_ORDER = ("coverage", "width")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods on the same tasks by one score, the best first. Made by :func:`compare`.

    Attributes:
        score: name of the score, one of those of :func:`~bayesmeta.scores`.
        names: of the methods, the best first; all else is in this order.
        values, standard_errors: of each method's score, ``[methods]``.
        differences: [i, j] is the score of method i less that of method j, ``[methods, methods]``.
        difference_errors: their standard errors over tasks, from the paired differences.
        p_values: two-sided, of a difference being 0 (paired t-test over tasks); 1 on the diagonal.
        adjusted_p_values: the same by Holm's method for all pairs together: none of them is below 0.05 in more than 5%
            of comparisons between equals.
        num_tasks: how many tasks count.
        more_is_better: whether it is a score like the accuracy.
    """

    score: str
    names: tuple[str, ...]
    values: Tensor
    standard_errors: Tensor
    differences: Tensor
    difference_errors: Tensor
    p_values: Tensor
    adjusted_p_values: Tensor
    num_tasks: int
    more_is_better: bool

    def not_worse(self, level: float = 0.05) -> tuple[str, ...]:
        """The best and those that these tasks cannot tell from it (adjusted p-value at least ``level``)."""
        if not 0.0 < level < 1.0:
            raise OptionError(f"level={level}; expected a number between 0 and 1, both excluded.")
        return tuple(n for i, n in enumerate(self.names) if i == 0 or not self.adjusted_p_values[i, 0] < level)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers of each method, the best first: the score and its difference from the best one's."""
        return {
            name: {
                self.score: float(self.values[i]),
                f"{self.score}_se": float(self.standard_errors[i]),
                "difference": float(self.differences[i, 0]),
                "difference_se": float(self.difference_errors[i, 0]),
                "p_value": float(self.p_values[i, 0]),
                "adjusted_p_value": float(self.adjusted_p_values[i, 0]),
            }
            for i, name in enumerate(self.names)
        }

    def __str__(self) -> str:
        width = max(6, *(len(name) for name in self.names))
        better = "more" if self.more_is_better else "less"
        lines = [
            f"{self.score} on {self.num_tasks} tasks; {better} is better",
            f"{'method':<{width}}{'mean':>10}{'± s.e.':>10}{'less best':>11}{'± s.e.':>10}{'p (Holm)':>10}",
        ]
        for i, name in enumerate(self.names):
            line = f"{name:<{width}}{float(self.values[i]):>10.4f}{float(self.standard_errors[i]):>10.4f}"
            if i:
                p = float(self.adjusted_p_values[i, 0])
                line += f"{float(self.differences[i, 0]):>11.4f}{float(self.difference_errors[i, 0]):>10.4f}{p:>10.2g}"
            lines.append(line)
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw it, see :func:`~bayesmeta.plot_compare`."""
        from bayesmeta.diagnostics.plots_compare import plot_compare

        return plot_compare(self, path=path)


def compare(
    methods: Mapping[str, Scores | Posterior],
    batch: TaskBatch | None = None,
    *,
    score: str = "nll",
    num_samples: int = 1000,
    generator: Seed = None,
) -> Comparison:
    """Compare methods by their scores on the same tasks.

    Tasks differ in difficulty, and that is common to all methods: so the score of one is taken from that of another
    task by task, and the standard error is that of the mean of these differences. Tasks are the units; the points of a
    task are no independent evidence. The difference of two ``rmse`` is that of the roots of the mean squares, with
    its error by the delta method. p-values are of t-tests: with few tasks (below about 20) of which one differs much
    from the rest they are rough. The adjustment for many pairs is that of S. Holm, "A simple sequentially rejective
    multiple test procedure", Scandinavian Journal of Statistics 6 (1979).

    Args:
        methods: at least two by name: their :class:`~bayesmeta.Scores` on one batch, in the same units, or posteriors
            adapted to the support of ``batch``.
        batch: what posteriors are scored on; scores need none.
        score: any of the scores by which forecasts can be ranked. Coverages and widths have no better or worse.
        num_samples, generator: for the scores of posteriors.

    Raises:
        OptionError: for fewer than two methods, an unknown score, coverages and widths, posteriors without a batch,
            or scores in other units or of other kinds of target.
        ShapeError: for scores of other numbers of tasks.
        DataError: for scores where other tasks count.
        EmptyTaskError: for fewer than two tasks.
    """
    if not isinstance(methods, Mapping) or len(methods) < 2:
        raise OptionError("Comparing takes a mapping from names to at least two Scores or posteriors.")
    found = {name: _scores(name, each, batch, num_samples, generator, score) for name, each in methods.items()}
    counts = _check(found, score)
    more = score in _MORE
    values = torch.tensor([each[score] for each in found.values()], dtype=torch.float64)
    order = values.argsort(descending=more, stable=True).tolist()
    names = [list(found)[i] for i in order]
    per_task = torch.stack([_influence(found[name], score)[counts] for name in names])
    size, tasks = per_task.shape
    differences, errors, p_values = torch.zeros(3, size, size, dtype=torch.float64).unbind()
    p_values.fill_diagonal_(1.0)
    for i in range(size):
        for j in range(i):
            each = per_task[i] - per_task[j]
            mean, p = t_test(each)
            differences[i, j], differences[j, i] = mean, -mean
            errors[i, j] = errors[j, i] = each.std() / math.sqrt(tasks)
            p_values[i, j] = p_values[j, i] = p
    own = torch.tensor([found[name].standard_errors[score] for name in names], dtype=torch.float64)
    return Comparison(
        score, tuple(names), values[order], own, differences, errors, p_values, _holm(p_values), tasks, more
    )


def _scores(name: str, given: Any, batch: TaskBatch | None, num_samples: int, generator: Seed, score: str) -> Scores:
    if isinstance(given, Scores):
        return given
    if not hasattr(given, "draws"):
        raise OptionError(f"{name!r} is a {type(given).__name__}; expected Scores, or a posterior.")
    if batch is None:
        raise OptionError(f"{name!r} is a posterior: give the batch that it is to be scored on.")
    return scores(given, batch, num_samples=num_samples, generator=generator, energy=score == "energy")


def _check(found: dict[str, Scores], score: str) -> Tensor:
    """The tasks that count, ``[tasks]``, after checking that the scores are of the same ones."""
    first_name, first = next(iter(found.items()))
    for name, each in found.items():
        if score.startswith(_NO_ORDER):
            raise OptionError(f"score={score!r} has no better or worse: compare a proper score, such as 'interval_90'.")
        if score not in each:
            raise OptionError(f"score={score!r} is not among those of {name!r}: {', '.join(each)}.")
        if (each.target_kind, each.raw_units) != (first.target_kind, first.raw_units):
            raise OptionError(f"The scores of {first_name!r} and {name!r} are of other targets, or in other units.")
        ours, theirs = first.per_task[score], each.per_task[score]
        if ours.shape != theirs.shape:
            raise ShapeError(
                f"{first_name!r} has scores of {len(ours)} tasks and {name!r} of {len(theirs)}; expected one batch."
            )
        if not ours.isnan().equal(theirs.isnan().to(ours.device)):
            raise DataError(f"Other tasks count for {first_name!r} than for {name!r}; expected scores of one batch.")
    counts = ~first.per_task[score].isnan()
    if int(counts.sum()) < 2:
        raise EmptyTaskError("A comparison needs at least two tasks that count: they are the units.")
    return counts


def _influence(found: Scores, score: str) -> Tensor:
    """What the score is the mean of over tasks, ``[tasks]``; for ``rmse`` to first order about its mean square."""
    each = found.per_task[score].double().cpu()
    if score != "rmse" or found[score] == 0:
        return each
    return 0.5 * found[score] + each.square() / (2.0 * found[score])  # its mean is the root of the mean square


def _holm(p_values: Tensor) -> Tensor:
    """Adjusted p-values of all pairs, ``[methods, methods]``."""
    size = len(p_values)
    rows, columns = torch.tril_indices(size, size, -1)
    p = p_values[rows, columns]
    order = p.argsort()
    left = torch.arange(len(p), 0, -1, dtype=p.dtype)
    stepped = (p[order] * left).cummax(0).values.clamp(max=1.0)
    out = torch.ones_like(p_values)
    out[rows[order], columns[order]] = stepped
    out[columns[order], rows[order]] = stepped
    return out
