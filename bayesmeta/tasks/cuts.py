"""Cutting tasks of any length into support and query."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import EmptyTaskError, OptionError


def cut_ragged(
    observations: Observations,
    support: int,
    query: int | None,
    *,
    shuffle: torch.Generator | None,
    names: tuple[str, ...] | None = None,
) -> tuple[Observations, Observations]:
    """A support of the same length for each task, and a query of what is left.

    Args:
        observations: all that is known of each task, with targets; masked rows are never chosen.
        support: rows of each support.
        query: at most so many rows of each query; None for all that are left.
        shuffle: choose rows at random; None: the first ones become the support, the next ones the query.
        names: of the tasks, for the error.

    Returns:
        Support and query, rows in the order in which they stood. A task with fewer rows left than another is padded
        with a copy of a real row and masked.

    Raises:
        OptionError: for negative numbers, or neither support nor query.
        EmptyTaskError: naming a task with fewer than ``support + 1`` rows (``support``, where no query is asked for).
    """
    if support < 0 or (query is not None and query < 0) or (support == 0 and query == 0):
        raise OptionError(f"support={support} and query={query}; expected at least 0, and not both 0.")
    real = observations.full_mask()
    lengths = real.sum(-1)
    _check_lengths(lengths, support, 0 if query == 0 else 1, names)
    left = lengths - support
    shortest, longest = int(left.min()), int(left.max())
    width = longest if query is None else min(query, longest)
    size = real.shape[1]
    position = torch.arange(size, device=real.device).expand_as(real)
    key = position.double()
    if shuffle is not None:
        key = torch.rand(real.shape, generator=shuffle, device=real.device, dtype=torch.float64)
    order = key.masked_fill(~real, torch.inf).argsort(-1)
    chosen, rest = order[:, :support].sort(-1).values, order[:, support : support + width]
    keep = torch.arange(width, device=real.device) < left[:, None]
    # padding goes to the end and becomes a copy of the first real row of the query
    rest = rest.masked_fill(~keep, size).sort(-1).values
    rest = torch.where(keep, rest, rest[:, :1])
    return _rows(observations, chosen, None), _rows(observations, rest, keep if shortest < width else None)


def _check_lengths(lengths: Tensor, support: int, least: int, names: tuple[str, ...] | None) -> None:
    short = (lengths < support + least).nonzero().flatten().tolist()
    if short:
        name = repr(names[short[0]]) if names is not None else str(short[0])
        raise EmptyTaskError(
            f"Task {name} has {int(lengths[short[0]])} observation(s), but {support} for the support and at least "
            f"{least} for the query were asked for ({len(short)} of {len(lengths)} tasks are too short). Ask for a "
            "smaller support, or give such tasks more observations."
        )


def _rows(observations: Observations, index: Tensor, mask: Tensor | None) -> Observations:
    assert observations.y is not None
    task = torch.arange(len(index), device=index.device).unsqueeze(-1)
    return Observations(observations.x[task, index], observations.y[task, index], mask, observations.w)
