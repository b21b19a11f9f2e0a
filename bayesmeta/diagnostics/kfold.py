"""Cross-validation with tasks as the units: how well does a method forecast a task that it has not learned from?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.forecasts import Predictor, check_finite, task_names, valid_points
from bayesmeta.diagnostics.recalibrated import RecalibratedPosterior
from bayesmeta.diagnostics.scores import log_joint_density
from bayesmeta.diagnostics.surprise import log_mean, surprise
from bayesmeta.errors import DataError, EmptyTaskError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.ops.whole import is_whole

#: Below so many effective draws a score is called unreliable.
_FEW_DRAWS = 10.0


@torch.no_grad()
def loo_kfold(
    data: TaskBatch | Any,
    fit: Callable[[Any], Any],
    *,
    k: int = 10,
    folds: Sequence[int] | Tensor | np.ndarray | None = None,
    support: int | None = None,
    num_samples: int = 1000,
    generator: Seed = None,
) -> Any:
    """K-fold cross-validation over tasks.

    Each fold of tasks is held out once: ``fit`` learns θ from the others, adapts to the support of each held-out task,
    and is scored by the joint log predictive density of that task's query, log p(Q | S, θ) in nats: of all points of
    the task together, as they share its φ. Where the support is empty this is log p(Q | θ), and with as many folds as
    tasks the whole is leave-one-task-out, Σ_i log p(D_i | D_−i).

    What it is not: the sum of the pointwise log-likelihoods of a task that was trained on. Its leave-one-out
    importance weights would have to take a whole task out of the posterior that learned its φ from it, and their
    Pareto k is bad (Vehtari, Gelman & Gabry 2017, section 4, https://arxiv.org/abs/1507.04544). Source of the folds by
    groups, of the sum and of its standard error √(N var): there, section 2.3, and ``arviz_stats.loo_kfold``, whose
    result this has; departures: groups are the units of the standard error too, and ``p`` is NaN, as it would need the
    fit to all tasks.

    The joint density is in closed form where the posterior has one. Else, with a support, it is the mean over draws of
    φ; without, the evidence of :func:`~bayesmeta.surprise`, which weights draws of the posterior given the query and
    so needs fewer. Scores whose draws hardly count warn.

    Args:
        data: a :class:`~bayesmeta.TaskBatch`, whose support and query stay as they are, or a table of tasks, such as
            :class:`~bayesmeta.tasks.TableTasks`, whose tasks are cut by ``support``. A table with a standardizer is
            standardised anew in each fold by what the training tasks teach.
        fit: takes the training tasks, in the form of ``data`` (a batch's ``population`` is how many they are), and
            gives a method: something with ``adapt(support)``. Start anew in each call: what a method remembers of the
            held-out tasks makes its score too good.
        k: how many folds, at random and as equal as can be; ignored where ``folds`` is given.
        folds: the fold of each task, ``[tasks]``; any integers, at least two different ones.
        support: of a table: observations in each held-out task's support, the first ones; 0 for none.
        num_samples: draws of φ, where there is no closed form.
        generator: generator or seed, of the folds and of the draws; None means seed 0. Give methods that are to be
            compared the same seed, so that their folds are the same.

    Returns:
        An ``arviz_stats`` ``ELPDData`` of kind ``"loo_kfold"``, which ``arviz_stats.compare`` takes: ``elpd`` (the sum
        over tasks, larger is better), ``se``, ``elpd_i`` by task in the order of ``data``, ``n_data_points`` (tasks),
        ``n_folds``, ``n_eff_i`` (effective draws behind each, infinite for a closed form), ``warning``. Densities are
        in raw units where there is a standardizer.

    Raises:
        OptionError: for data of another kind, more folds than tasks or fewer than two, a table without ``support`` or
            a batch with it, and a ``fit`` that gives no method.
        ShapeError: for folds of another number of tasks.
        EmptyTaskError: for fewer than two tasks, or one without a query to score.
        DataError, NonFiniteDataError: for a query without targets, NaN, and a density that is not finite.
    """
    if not callable(fit):
        raise OptionError(f"fit is a {type(fit).__name__}; expected a function from training tasks to a method.")
    source = _Source.of(data, support)
    labels = _folds(source.num_tasks, k, folds, generator)
    draws = as_generator(generator, stream="held-out tasks")
    elpd, effective = torch.zeros(2, source.num_tasks, dtype=torch.float64)
    for fold in labels.unique().tolist():
        train, held = source.cut(labels != fold, labels == fold)
        with torch.enable_grad():
            method = fit(train)
        if not callable(getattr(method, "adapt", None)):
            raise OptionError(
                f"fit gave a {type(method).__name__}, which has no adapt; expected the method, trained on the tasks "
                "that it was given. (bayesmeta.fit gives a FitResult: return the method itself.)"
            )
        score, draws_behind = _score(method, held, num_samples, draws)
        elpd[labels == fold], effective[labels == fold] = score.cpu(), draws_behind.cpu()
    return _result(elpd, effective, source.names, len(labels.unique()), num_samples)


# -- cutting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Tasks that can be divided into those to learn from and those held out."""

    data: Any
    support: int | None
    names: tuple[str, ...]

    @classmethod
    def of(cls, data: Any, support: int | None) -> _Source:
        if isinstance(data, TaskBatch):
            if support is not None:
                raise OptionError(f"support={support} is for a table; a batch has its supports already. Leave it out.")
            data = data.check().without_padding()
            names = tuple(task_names(data))
            empty = (data.query.counts() == 0).nonzero().flatten().tolist()
            if empty:
                raise EmptyTaskError(f"Task {names[empty[0]]} has no query to score ({len(empty)} task(s) in all).")
        elif all(hasattr(data, name) for name in ("subset", "all", "with_standardizer", "schema")):
            if support is None:
                raise OptionError("Of a table say how many observations the support of a held-out task has: support=0.")
            names = tuple(data.names)
        else:
            raise OptionError(
                f"Cross-validation takes a TaskBatch or a table of tasks, such as bm.tasks.TableTasks; got "
                f"{type(data).__name__}. Of endless tasks draw a new batch and score it with bm.scores."
            )
        if len(names) < 2:
            raise EmptyTaskError("Cross-validation over tasks needs at least two tasks: one of them is held out.")
        return cls(data, support, names)

    @property
    def num_tasks(self) -> int:
        return len(self.names)

    def cut(self, train: Tensor, held: Tensor) -> tuple[Any, TaskBatch]:
        """Training tasks in the form of the data, and the batch of those held out, in the training tasks' units."""
        data = self.data
        if isinstance(data, TaskBatch):
            rows, others = (index.nonzero().flatten().to(data.support.device) for index in (train, held))
            known = None if data.population is None else len(rows)
            return replace(data.tasks(rows), population=known), data.tasks(others)
        learn, rest = data.subset(train), data.subset(held)
        if data.standardizer is not None:
            units = learn.fit_standardizer()
            learn, rest = learn.with_standardizer(units), rest.with_standardizer(units)
        else:
            learn, rest = learn.with_schema(learn.schema), rest.with_schema(learn.schema)
        return learn, rest.all(support=self.support)


def _folds(tasks: int, k: int, folds: Any, generator: Seed) -> Tensor:
    """The fold of each task, ``[tasks]``."""
    if folds is not None:
        given = torch.as_tensor(folds)
        if given.shape != (tasks,):
            raise ShapeError(f"folds has shape {list(given.shape)}; expected a fold for each of the {tasks} tasks.")
        if given.is_floating_point() or len(given.unique()) < 2:
            raise OptionError("folds are integers, at least two different ones: each is held out once.")
        return given.cpu()
    if not is_whole(k, 2) or k > tasks:
        raise OptionError(f"k={k} folds of {tasks} tasks; expected a whole number from 2 to {tasks}.")
    random = as_generator(generator, stream="folds")
    order = torch.randperm(tasks, generator=random, device=random.device).cpu()
    labels = torch.empty(tasks, dtype=torch.long)
    labels[order] = torch.arange(tasks) % k
    return labels


# -- scoring ------------------------------------------------------------------------------------------------------


def _score(method: Any, held: TaskBatch, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """log p(Q | S) of each held-out task in raw units, and the effective draws behind it, ``[tasks]``, float64."""
    if held.query.y is None:
        raise DataError("Held-out tasks are scored by the targets of their query; this one has query.y=None.")
    posterior = method.adapt(held.support)
    valid = valid_points(posterior, held, "Cross-validation needs")
    log_p, effective = _log_joint(method, posterior, held, valid, num_samples, generator)
    check_finite(log_p.unsqueeze(-1), valid.any(-1, keepdim=True), "joint log density", task_names(held))
    if held.standardizer is not None:
        scale = held.standardizer.y_scale.double().to(log_p.device)
        outputs = 1 if held.query.y.dim() == 2 else held.query.y.shape[-1]
        log_p = log_p - scale.log().expand(outputs).sum() * valid.sum(-1)
    return log_p, effective


def _log_joint(
    method: Any, posterior: Any, held: TaskBatch, valid: Tensor, num_samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    query, y = held.query, held.query.y
    assert y is not None
    if posterior.target_kind != "real":  # padding need not be a count or a class
        y = torch.where(valid if y.dim() == 2 else valid.unsqueeze(-1), y, 0)
        y = y.to(query.x.dtype) if posterior.target_kind == "class" else y
        query = query.with_y(y)
    limit = posterior.num_draws
    predictor = Predictor(posterior, num_samples if limit is None else max(2, min(num_samples, limit)), generator)
    closed = predictor.closed_form(query, joint=True)
    exact = None if closed is None else log_joint_density(closed, y, valid)
    if exact is not None:
        return exact, torch.full_like(exact, torch.inf)
    if _has_density(posterior) and not bool(held.support.full_mask().any()):
        found = surprise(method.adapt(query), num_samples=num_samples, generator=generator)
        return -found.scores, found.effective_draws
    each = torch.where(valid, predictor.log_likelihood(query), 0.0).sum(-1)
    value, _, effective = log_mean(each)
    return value, torch.full_like(effective, torch.inf) if posterior.is_point else effective


def _has_density(posterior: Any) -> bool:
    """Whether φ has a density by which the evidence can weight its draws."""
    if posterior.is_point or posterior.num_draws is not None or getattr(posterior, "loo_refusal", None) is not None:
        return False
    return hasattr(posterior, "log_prob") and not isinstance(posterior, RecalibratedPosterior)


def _result(elpd: Tensor, effective: Tensor, names: tuple[str, ...], num_folds: int, num_samples: int) -> Any:
    import arviz_stats
    import xarray

    few = [names[i] for i in (effective < _FEW_DRAWS).nonzero().flatten().tolist()]
    if few:
        warnings.warn(
            f"The scores of {len(few)} of {len(names)} held-out tasks rest on less than {_FEW_DRAWS:.0f} effective "
            f"draws ({', '.join(_shown(few))}): they are noisy and too low. Take more draws (num_samples), a larger "
            "support, or a method with a joint predictive in closed form.",
            UserWarning,
            stacklevel=3,
        )

    def by_task(value: Tensor) -> Any:
        return xarray.DataArray(value.numpy(), dims=["task"], coords={"task": list(names)})

    exact = bool(effective.isinf().all())
    found = arviz_stats.ELPDData(
        kind="loo_kfold",
        elpd=float(elpd.sum()),
        se=float((len(elpd) * elpd.var(unbiased=False)).sqrt()),
        p=float("nan"),
        n_samples=0 if exact else num_samples,
        n_data_points=len(elpd),
        scale="log",
        warning=bool(few),
        good_k=None,
        elpd_i=by_task(elpd),
        n_folds=num_folds,
    )
    found.n_eff_i = by_task(effective)
    return found


def _shown(names: list[str]) -> Iterator[str]:
    yield from names[:5]
    if len(names) > 5:
        yield "…"
