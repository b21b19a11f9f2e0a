"""How much the posterior of φ shrinks against its prior as the shots grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.forecasts import check_draws
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior


def contraction(
    adapt: Callable[[Observations], Posterior],
    support: Observations,
    shots: tuple[int, ...] = (1, 2, 5, 10),
    *,
    num_samples: int = 1000,
    generator: Seed = None,
) -> dict[int, dict[str, tuple[float, float]]]:
    """How much the posterior of φ shrinks against its prior as a task shows more observations.

    1 − var(posterior) / var(prior) of each component, the mean over a parameter's components and over tasks: near 0
    the data say nothing of it, near 1 they say all; below 0 the posterior is wider than the prior. It should rise with
    the shots. Source: M. Betancourt, "Calibrating Model-Based Inferences and Decisions", 2018,
    https://arxiv.org/abs/1803.08393, section 4.2 (posterior z-score against contraction), there for one posterior.

    Args:
        adapt: from a support to its posterior, such as ``method.adapt``.
        support: tasks with at least as many observations as the largest number of shots; the first ones are taken.
        shots: numbers of shots, each at least 1.
        num_samples: draws of posterior and prior.
        generator: generator or seed; None means seed 0.

    Returns:
        For each number of shots, by parameter the mean and its standard error over tasks (NaN for one task).

    Raises:
        OptionError: for numbers of shots that the tasks do not have, and fewer than 2 draws.
        NonFiniteDataError: for draws that are not finite, naming the task.
        UnsupportedError: by ``prior_draws``, for a prior without a density.
    """
    if num_samples < 2:
        raise OptionError(f"num_samples={num_samples}; expected at least 2 draws.")
    least = int(support.counts().min())
    if not shots or min(shots) < 1 or max(shots) > least:
        raise OptionError(f"shots={list(shots)}; expected numbers from 1 to {least}, which every task has.")
    order = (~support.full_mask()).to(torch.int8).argsort(dim=1, stable=True)  # the real ones first
    out: dict[int, dict[str, tuple[float, float]]] = {}
    for count in shots:
        posterior = adapt(_first(support, order[:, :count]))  # with gradients: it may train
        with torch.no_grad():
            out[count] = _of(posterior, num_samples, as_generator(generator, support.device, "contraction"))
    return out


def _of(posterior: Posterior, num_samples: int, source: torch.Generator) -> dict[str, tuple[float, float]]:
    """By parameter, mean and standard error over tasks."""
    after = posterior.named(posterior.draws(num_samples, source))
    before = posterior.named(posterior.prior_draws(num_samples, source))
    names = [str(i) for i in range(posterior.num_tasks)]
    real = torch.ones(posterior.num_tasks, dtype=torch.bool, device=posterior.support.device)
    for sites in (after, before):
        check_draws(sites, real, names)
    out = {}
    for name, value in after.items():
        prior = before[name].double().var(0)
        each = torch.where(prior > 0, 1.0 - value.double().var(0) / prior, torch.nan)
        task = each.flatten(1).nanmean(-1) if each.dim() > 1 else each
        error = float(task.std()) / len(task) ** 0.5 if len(task) > 1 else float("nan")
        out[name] = float(task.mean()), error
    return out


def _first(support: Observations, index: Tensor) -> Observations:
    """The observations of each task at these places, ``[tasks, count]``."""

    def take(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        places = index.reshape(*index.shape, *[1] * (value.dim() - 2)).expand(*index.shape, *value.shape[2:])
        return value.gather(1, places)

    x = take(support.x)
    assert x is not None
    return replace(support, x=x, y=take(support.y), mask=None)
