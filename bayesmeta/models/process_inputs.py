"""What a process model is asked, and what it is shown: checks, and padding put out of the way."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, NonFiniteDataError, ShapeError, UnsupportedError
from bayesmeta.models.likelihoods import Likelihood
from bayesmeta.models.targets import check_exposure


def check_inputs(likelihood: Likelihood, observations: Observations) -> None:
    """Check that there are no task-level covariates, that real data are finite, and the exposure.

    Raises:
        UnsupportedError: for task-level covariates.
        NonFiniteDataError: for x or y of a real observation that is not finite.
        DataError: for an exposure that is not positive.
    """
    if observations.w is not None:
        raise UnsupportedError("A process does not see task-level covariates w; append them to x.")
    check_finite(observations)
    check_exposure(likelihood, observations)


def check_finite(observations: Observations) -> None:
    """Check that x and y of real observations are finite. Padding is replaced before a network meets it.

    Raises:
        NonFiniteDataError: naming the first task and shot that are not.
    """
    for name, tensor in (("x", observations.x), ("y", observations.y)):
        if tensor is None or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue
        finite = tensor.isfinite()
        bad = ~(finite if finite.dim() == 2 else finite.all(-1)) & observations.full_mask()
        if bool(bad.any()):
            task, shot = bad.nonzero()[0].tolist()
            raise NonFiniteDataError(
                f"{name} is not finite at task {task}, shot {shot} (counted from 0). Drop the point or mask it."
            )


def check_shots(support: Observations, max_shots: int | None) -> None:
    """Check that no task has more observations than a bound.

    Raises:
        ShapeError: when one has.
    """
    if max_shots is None or support.shots <= max_shots:
        return
    longest = int(support.full_mask().sum(-1).max())
    if longest > max_shots:
        raise ShapeError(
            f"A task has {longest} observations; this process was bounded to max_shots={max_shots}. Give fewer, or "
            "raise the bound."
        )


def targets_of(observations: Observations) -> Tensor:
    """y.

    Raises:
        DataError: where there is none.
    """
    if observations.y is None:
        raise DataError("A log-likelihood needs targets; these observations have y=None.")
    return observations.y


def without_padding(observations: Observations, support: Observations) -> Tensor:
    """x with padding replaced by a real input of the same task, so that no network meets what padding holds."""
    if observations.mask is None:
        return observations.x
    x = torch.cat([observations.x, support.x], 1)
    mask = torch.cat([observations.mask, support.full_mask()], 1)
    first = mask.to(torch.uint8).argmax(-1)[:, None, None].expand(-1, 1, x.shape[-1])
    real = torch.where(mask.any(-1)[:, None, None], x.gather(1, first), 0.0)
    return torch.where(observations.mask.unsqueeze(-1), observations.x, real)
