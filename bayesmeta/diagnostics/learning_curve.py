"""What a choice of the points to label is worth: a score against the number of labels, beside random choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch, union
from bayesmeta.diagnostics.active import Criterion, choose
from bayesmeta.diagnostics.checks import check_batch, counted
from bayesmeta.diagnostics.forecasts import Predictor, check_finite, task_names, valid_points
from bayesmeta.diagnostics.scores import scores
from bayesmeta.errors import DataError, EmptyTaskError, OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior

_NO_ORDER = ("coverage", "width", "rmse")


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Scores as labels are added. Made by :func:`learning_curve`.

    Attributes:
        labels: how many points were added at each step, from 0, ``[steps + 1]``.
        chosen: each task's score with chosen labels, ``[steps + 1, tasks]``; NaN for tasks that do not count.
        random: the same with random labels, the mean over several random orders.
        index: places in the pool of what was chosen, in order, ``[tasks, labels]``.
        criterion: by which was chosen.
        score: name of the score.
        more_is_better: whether it is one like the accuracy.
    """

    labels: tuple[int, ...]
    chosen: Tensor
    random: Tensor
    index: Tensor
    criterion: Criterion
    score: str
    more_is_better: bool = False

    def difference(self) -> tuple[Tensor, Tensor]:
        """Mean of chosen less random at each step, ``[steps + 1]``, and its standard error over tasks, paired."""
        return _mean(self.chosen - self.random)

    def points_to_reach(self, value: float, *, random: bool = False) -> int | None:
        """The fewest labels with which the mean score is at least as good as a value; None where it never is."""
        mean = _mean(self.random if random else self.chosen)[0]
        good = mean >= value if self.more_is_better else mean <= value
        return next((n for n, reached in zip(self.labels, good.tolist(), strict=True) if reached), None)

    def __str__(self) -> str:
        mean, error = self.difference()
        ours, theirs = _mean(self.chosen)[0], _mean(self.random)[0]
        lines = [
            f"{self.score} with labels chosen by {self.criterion}, and at random",
            f"{'labels':<8}{'chosen':>10}{'random':>10}{'difference':>12}{'± s.e.':>10}",
        ]
        for i, count in enumerate(self.labels):
            numbers = f"{float(ours[i]):>10.4f}{float(theirs[i]):>10.4f}{float(mean[i]):>12.4f}{float(error[i]):>10.4f}"
            lines.append(f"{count:<8}{numbers}")
        return "\n".join(lines)


def learning_curve(
    adapt: Callable[[Observations], Posterior],
    batch: TaskBatch,
    pool: Observations,
    *,
    steps: int = 10,
    size: int = 1,
    criterion: Criterion = "information",
    score: str = "mse",
    repeats: int = 3,
    exact: bool = True,
    num_samples: int = 100,
    num_outcomes: int = 100,
    score_samples: int = 1000,
    generator: Seed = None,
) -> LearningCurve:
    """Add labels from a pool step by step, adapting anew after each, and score the query; beside it random choice.

    The query must not be chosen from the pool if the score is to be about new points. Both curves begin with the
    support of the batch.

    Args:
        adapt: from a support to its posterior, such as ``method.adapt``.
        batch: its support is what is labelled at first, its query is scored. Padding tasks do not count, and need no
            pool.
        pool: points of the same tasks with targets, of which only the chosen ones are shown to ``adapt``.
        steps: how often to choose.
        size: points chosen together at each step.
        criterion: see :func:`~bayesmeta.choose`.
        score: ``"mse"``, the squared error of the predictive mean, or any of :func:`~bayesmeta.scores` that ranks.
        repeats: random orders that are averaged.
        exact, num_samples, num_outcomes: as in :func:`~bayesmeta.choose`.
        score_samples: draws behind scores without a closed form.
        generator: generator or seed; None means seed 0.

    Raises:
        OptionError: for fewer than one step or repeat, and a score that is unknown or does not rank.
        DataError: for a pool without targets.
        EmptyTaskError: for a task with fewer points in the pool than are to be labelled.
        ShapeError, UnsupportedError: as :func:`~bayesmeta.choose` and :func:`~bayesmeta.scores`.
    """
    check_batch(batch)
    if steps < 1 or size < 1 or repeats < 1:
        raise OptionError(f"steps={steps}, size={size}, repeats={repeats}; expected at least 1 of each.")
    if score.startswith(_NO_ORDER):
        raise OptionError(f"score={score!r} is no mean over tasks that ranks; take 'mse', 'nll' or 'crps'.")
    if pool.y is None:
        raise DataError("The pool needs targets, to be shown when they are chosen; it has y=None.")
    real = batch.real_tasks()
    counts = counted(pool, real).sum(-1)
    if not bool(counts.any()):
        raise EmptyTaskError("The pool has no point of any task.")
    least = int((counts if real is None else counts[real]).min())
    if least < steps * size:
        raise EmptyTaskError(f"A task has {least} points in the pool, but {steps * size} are to be labelled.")
    source = as_generator(generator, pool.device, "learning curve")
    seed = int(torch.randint(2**31, (), generator=source, device=source.device))  # the same noise in all scores

    def value(posterior: Posterior, support: Observations) -> Tensor:
        if score == "mse" and posterior.target_kind != "class":
            return _squared_error(Predictor(posterior, score_samples, seed), batch)
        found = scores(posterior, replace(batch, support=support), num_samples=score_samples, generator=seed,
                       energy=score == "energy")  # fmt: skip
        if score not in found:
            raise OptionError(f"score={score!r} is unknown here; expected one of {', '.join(found)}.")
        return found.per_task[score]

    def run(by: Criterion) -> tuple[Tensor, Tensor]:
        support, open_, taken = batch.support, pool.full_mask(), []
        posterior = adapt(support)
        curve = [value(posterior, support)]
        for _ in range(steps):
            choice = choose(
                posterior, replace(pool, y=None, mask=open_), size=size, criterion=by, exact=exact,
                num_samples=num_samples, num_outcomes=num_outcomes, real=real, generator=source,
            )  # fmt: skip
            open_ = open_.scatter(1, choice.index, False)
            taken.append(choice.index)
            support = union(support, choice.take(pool))
            posterior = adapt(support)
            curve.append(value(posterior, support))
        return torch.stack(curve), torch.cat(taken, 1)

    chosen, index = run(criterion)
    at_random = torch.stack([run("random")[0] for _ in range(repeats)]).mean(0)
    labels = tuple(i * size for i in range(steps + 1))
    return LearningCurve(labels, chosen, at_random, index, criterion, score, score == "accuracy")


def _squared_error(predictor: Predictor, batch: TaskBatch) -> Tensor:
    """Of the predictive mean, in raw units, ``[tasks]``; NaN for tasks that do not count."""
    valid, query = valid_points(predictor.posterior, batch, "A learning curve needs"), batch.query
    assert query.y is not None
    closed = predictor.closed_form(query)
    mean = predictor.predict(query).double().mean(0) if closed is None else closed.mean.expand(query.y.shape).double()
    check_finite(mean, valid, "predictive mean", task_names(batch))
    square = (mean - query.y.double()).square()
    if batch.standardizer is not None:
        square = square * batch.standardizer.y_scale.double().to(square.device).square()
    square = square if square.dim() == 2 else square.mean(-1)
    return torch.where(valid, square, 0.0).sum(-1) / torch.where(valid.any(-1), valid.sum(-1), math.nan)


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the tasks that count and its standard error, ``[steps]`` each."""
    counts = ~values.isnan().any(0)
    kept = values[:, counts]
    tasks = kept.shape[1]
    error = kept.std(1) / math.sqrt(tasks) if tasks > 1 else torch.full(kept.shape[:1], math.nan, dtype=kept.dtype)
    return kept.mean(1), error
