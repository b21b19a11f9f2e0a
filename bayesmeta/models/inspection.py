"""Reading the structure of a user's Pyro program at its first run, and saying what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import (
    BayesMetaError,
    DataError,
    EmptyTaskError,
    LikelihoodError,
    ModelError,
    PlateError,
    ShapeError,
)
from bayesmeta.models.handlers import Layout, Record, Site, Substitute, bijection, is_deterministic
from bayesmeta.models.plates import SHOTS, TASKS

#: Sizes of the probe batch: all different, so that a wrong broadcast shows as a wrong shape.
PROBE_TASKS, PROBE_SHOTS, PROBE_PARTICLES = 2, 3, 5

_ADVICE = "with bm.task_plate(x): (task parameters) with bm.shot_plate(x, mask): pyro.sample('y', …, obs=y)"


def probe_batch(observations: Observations) -> Observations:
    """Two tasks of three real observations, cycled from those given.

    Raises:
        DataError: when there is no target to learn the likelihood's sites from.
    """
    if observations.y is None:
        raise DataError("The first observations that a program sees must have targets y; these have none.")
    if not observations.x.is_floating_point():
        raise DataError(f"x has dtype {observations.x.dtype}; give floating-point inputs (x.float()).")
    if observations.num_tasks == 0:
        raise EmptyTaskError("The first observations that a program sees must have at least one task; these have none.")
    mask = observations.full_mask()
    real = mask.nonzero()
    device = observations.device
    rows, shots = torch.meshgrid(
        torch.arange(PROBE_TASKS, device=device), torch.arange(PROBE_SHOTS, device=device), indexing="ij"
    )
    w = observations.w
    w = None if w is None else w[torch.arange(PROBE_TASKS, device=device) % w.shape[0]]
    probe_mask = torch.ones(PROBE_TASKS, PROBE_SHOTS, dtype=torch.bool, device=device)
    if len(real) == 0:
        x = observations.x.new_zeros(PROBE_TASKS, PROBE_SHOTS, observations.num_features)
        y = observations.y.new_ones(PROBE_TASKS, PROBE_SHOTS, *observations.y.shape[2:])
        return Observations(x, y, probe_mask, w)
    pick = real[(rows * PROBE_SHOTS + shots) % len(real)]
    index = (pick[..., 0], pick[..., 1])
    return Observations(observations.x[index], observations.y[index], probe_mask, w)


def read_layout(run: Callable[[Observations], Any], probe: Observations) -> Layout:
    """Run the program once on the probe and sort its sites.

    Raises:
        PlateError, SiteError, LikelihoodError, ShapeError, ModelError: each saying which site and what to do.
    """
    record = Record()
    try:
        with record:
            run(probe)
    except BayesMetaError:
        raise
    except (NameError, AttributeError, KeyError, IndexError, ImportError, TypeError) as error:
        raise ModelError(f"The program raised {type(error).__name__}: {error}") from error
    except Exception as error:
        raise ShapeError(
            f"The program failed on a batch of {PROBE_TASKS} tasks × {PROBE_SHOTS} shots with x of shape "
            f"{list(probe.x.shape)} and y of shape {list(probe.y.shape) if probe.y is not None else None}: "
            f"{type(error).__name__}: {str(error).rstrip('. ')}. "
            "Most often it is a shape: a task parameter is [tasks, 1], x is [tasks, shots, features] and a single "
            "feature wants x.squeeze(-1). Else check the feature width, and the signature (x, y=None, mask=None)."
        ) from error
    local: list[Any] = []
    theta: list[Any] = []
    observed: list[str] = []
    deterministic: list[Site] = []
    for msg in record.messages:
        if is_deterministic(msg):
            deterministic += _function_of_phi(msg)
            continue
        kind = _kind(msg)
        if kind == "observed":
            observed.append(msg["name"])
        else:
            (local if kind == "local" else theta).append(msg)
    if not local:
        raise ModelError(
            "The program has no latent site inside the task plate, so there is nothing to adapt. "
            f"The shape of a program is: {_ADVICE}."
        )
    if not observed:
        raise LikelihoodError(f"The program has no observed site. The shape of a program is: {_ADVICE}.")
    return Layout(_sites(local, True), _sites(theta, False), tuple(observed), probe.num_features, tuple(deterministic))


def _function_of_phi(msg: Any) -> list[Site]:
    """A deterministic site with one value for each task; others (of shots, of θ) are not kept."""
    plates = {f.name for f in msg["cond_indep_stack"] if f.vectorized}
    shape = msg["value"].shape
    if TASKS not in plates or SHOTS in plates or tuple(shape[:2]) != (PROBE_TASKS, 1):
        return []
    return [Site(msg["name"], 0, 0, shape[2:], shape[2:])]


def _sites(messages: list[Any], local: bool) -> tuple[Site, ...]:
    sites, start = [], 0
    for msg in messages:
        fn, value = msg["fn"], msg["value"]
        # through a value, since the shape of an interval's map is that of its bounds, which may depend on other sites
        raw = bijection(msg["name"], fn).inv(value).shape
        frames = tuple((f.name, f.size, f.dim) for f in msg["cond_indep_stack"] if f.vectorized)
        if local:
            site = Site(msg["name"], start, start + raw[2:].numel(), torch.Size(fn.event_shape), torch.Size(raw[2:]))
        else:
            site = Site(msg["name"], start, start + raw.numel(), value.shape, raw, len(fn.batch_shape), frames)
        sites.append(site)
        start = site.stop
    return tuple(sites)


def _kind(msg: Any) -> str:
    name, fn = msg["name"], msg["fn"]
    frames = {frame.dim: frame for frame in msg["cond_indep_stack"] if frame.vectorized}
    in_tasks = frames.get(-2) is not None and frames[-2].name == TASKS
    in_shots = frames.get(-1) is not None and frames[-1].name == SHOTS
    if msg["is_observed"]:
        if not (in_tasks and in_shots):
            raise LikelihoodError(
                f"The observed site {name!r} is not inside the task plate and the shot plate. "
                f"The shape of a program is: {_ADVICE}."
            )
        _check_observed(msg)
        return "observed"
    if in_shots:
        raise PlateError(
            f"The site {name!r} is inside the shot plate and has no data. If it is the likelihood, give it obs=y. Task "
            "parameters belong in the task plate alone; latent variables of single observations must be marginalised."
        )
    if in_tasks:
        expected = (PROBE_TASKS, 1)
        if tuple(fn.batch_shape) != expected or set(frames) != {-2}:
            raise PlateError(
                f"The task parameter {name!r} has batch shape {list(fn.batch_shape)} on {PROBE_TASKS} tasks; expected "
                f"{list(expected)}. Declare its other dimensions as event dimensions with .to_event(n)."
            )
        return "local"
    undeclared = [d for d, size in enumerate(reversed(fn.batch_shape), 1) if size > 1 and -d not in frames]
    if undeclared or len(fn.batch_shape) > 2:
        raise PlateError(
            f"The site {name!r} has batch shape {list(fn.batch_shape)} outside the task plate, of which no plate "
            "declares all dimensions. A task parameter goes inside bm.task_plate(x); for a global vector use "
            ".to_event(1)."
        )
    return "theta"


def _check_observed(msg: Any) -> None:
    name, fn = msg["name"], msg["fn"]
    expected = (PROBE_TASKS, PROBE_SHOTS)
    if tuple(fn.batch_shape) != expected:
        raise PlateError(
            f"The observed site {name!r} has batch shape {list(fn.batch_shape)} on {PROBE_TASKS} tasks × {PROBE_SHOTS} "
            f"shots; expected {list(expected)}. A task parameter has batch shape [tasks, 1] and x has shape "
            "[tasks, shots, features]: look for a missing squeeze(-1) on x, or .to_event on the distribution."
        )
    if tuple(msg["value"].shape) != expected + tuple(fn.event_shape):
        raise ShapeError(
            f"The observed site {name!r} has data of shape {list(msg['value'].shape)} but a distribution of shape "
            f"{list(fn.shape())}."
        )
    if msg["mask"] is None:
        raise LikelihoodError(
            f"The observed site {name!r} ignores the mask, so that padding would count as data. "
            "Use bm.shot_plate(x, mask)."
        )


def check_particles(run: Callable[[Observations], Any], layout: Layout, probe: Observations) -> None:
    """Check that the program broadcasts over particles on the left, by comparing five at once with one alone.

    Raises:
        PlateError: when it does not.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return (0.1 * torch.randn(*shape, generator=generator)).to(probe.x)

    u = noise(PROBE_PARTICLES, PROBE_TASKS, layout.dim)
    theta = noise(PROBE_PARTICLES, layout.theta_dim) if layout.theta_dim else None
    expected = (PROBE_PARTICLES, PROBE_TASKS, PROBE_SHOTS)
    try:
        with Substitute(layout, u, theta) as many, pyro.validation_enabled(False):
            run(probe)
        shape = tuple(torch.as_tensor(many.result.log_likelihood).shape)
        detail = f"its log-likelihood has shape {list(shape)}"
    except BayesMetaError:
        raise
    except Exception as error:
        shape, detail = (), f"{type(error).__name__}: {error}"
    if shape == expected:
        with Substitute(layout, u[-1], None if theta is None else theta[-1]) as one, pyro.validation_enabled(False):
            run(probe)
        tolerance = 1e3 * torch.finfo(u.dtype).eps
        last = torch.as_tensor(many.result.log_likelihood)[-1].nan_to_num()
        alone = torch.as_tensor(one.result.log_likelihood).nan_to_num()
        if torch.allclose(last, alone, rtol=tolerance, atol=tolerance):
            return
        detail = "its values differ from those of one particle alone"
    raise PlateError(
        f"The program does not broadcast over particles: with {PROBE_PARTICLES} of them on the left, task parameters "
        f"have shape [{PROBE_PARTICLES}, tasks, 1, …] and {detail}; expected {list(expected)}. Index dimensions from "
        "the right; for a vector site use value.squeeze(-2) or einsum with '...'."
    )
