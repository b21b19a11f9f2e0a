"""The two approximations: the full-rank guide through MetaSVI, and mean-field ABML, on all the tasks of a data set."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.ops.random import as_generator, forked_rng
from benchmarks._multilevel_model import FullRank, Multilevel
from benchmarks._multilevel_reference import Moments

#: Draws from which the moments of an approximation are taken: standard deviations to within half a percent.
DRAWS = 20_000


# -- full rank ----------------------------------------------------------------------------------------------------


def fit_full_rank(
    data: bm.Observations, *, steps: int, seed: int, learning_rate: float = 0.02, num_particles: int = 4
) -> FullRank:
    """The guide, trained by Adam whose rate rises for 100 steps and falls over the second half; the mean of the
    parameters over the last quarter of the steps."""
    guide = FullRank(data)
    elbo = pyro.infer.Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=2)
    svi = bm.MetaSVI(Multilevel(), guide, lambda p: torch.optim.Adam(p, learning_rate / 100, betas=(0.9, 0.99)), elbo)
    average: dict[str, Tensor] = {}
    with forked_rng(as_generator(seed, stream="multilevel full rank")):
        for step in range(steps):
            if svi.optimizer is not None:
                share = min((step + 1) / 100, 1.0, 2 * (1 - step / steps) + 0.01)
                svi.optimizer.param_groups[0]["lr"] = learning_rate * share
            svi.step(data)
            done = step - (steps - steps // 4) + 1
            if done > 0:
                for name, value in svi.state_dict()["params"].items():
                    mean = average.setdefault(name, torch.zeros_like(value))
                    mean += (value - mean) / done
    if average:
        svi.load_state_dict(svi.state_dict() | {"params": average})
    return guide


def draw_effects(guide: FullRank, data: bm.Observations, num_samples: int, seed: int) -> Tensor:
    """Effects drawn from the guide, ``[num_samples, tasks, 2]``, all at once under a plate of draws."""
    generator = as_generator(seed, stream="multilevel draws")
    # a store of its own: in Pyro's global one this guide's parameters would stay, and stand in for the next one's
    store = pyro.get_param_store().scope()
    with torch.no_grad(), forked_rng(generator), store, pyro.plate("draws", num_samples, dim=-3):
        trace = pyro.poutine.trace(guide).get_trace(data.x, data.y, data.mask)
    return trace.nodes["effect"]["value"].squeeze(-2)


# -- mean field ---------------------------------------------------------------------------------------------------


def fit_mean_field(
    data: bm.Observations, *, steps: int, seed: int, inner_lr: float = 0.06, inner_steps: int = 20
) -> bm.ABML:
    """ABML with a Gaussian guide of the global sites, trained on all rows of all tasks at once.

    The support is all there is, so that the paper's loss is the ELBO of the whole data set, a task at a time. ABML's
    inner objective is divided by a task's rows. In a mean its curvature holds the prior's, 1 / (rows · scale²), so that
    the task with the fewest rows sets the largest ``inner_lr`` that does not diverge; in a log scale it is 2 / rows
    near the optimum, so that the rate there is larger.
    """
    method = mean_field_method(inner_lr, inner_steps)
    assert data.y is not None
    nothing = bm.Observations(data.x[:, :0], data.y[:, :0], None if data.mask is None else data.mask[:, :0])
    batch = bm.TaskBatch(support=data, query=nothing, population=data.num_tasks)
    method.prepare(batch)
    optimizer = torch.optim.Adam(method.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps) + 0.01))
    generator = as_generator(seed, stream="multilevel mean field")
    for step in range(steps):
        optimizer.zero_grad()
        loss = method.loss(batch, generator=generator)
        if not bool(torch.isfinite(loss)):
            raise bm.errors.NonFiniteLossError(f"ABML's loss is {float(loss)}: lower inner_lr={inner_lr}.", step + 1)
        loss.backward()
        optimizer.step()
        schedule.step()
    return method


def mean_field_method(inner_lr: float, inner_steps: int) -> bm.ABML:
    """ABML as it is trained here, untrained."""
    return bm.ABML(
        Multilevel(),
        inner_steps=inner_steps,
        inner_lr=inner_lr,
        inner_lr_scale=0.5,
        num_particles=4,
        global_guide="normal",
    )


def mean_field_moments(method: bm.ABML, data: bm.Observations, *, inner_steps: int, seed: int) -> Moments:
    """Of its posterior after many inner steps, so that given θ the error is the family's and not the optimiser's."""
    before = method.inner_steps
    method.inner_steps = inner_steps
    try:
        posterior = method.adapt(data, generator=seed)
    finally:
        method.inner_steps = before
    return Moments.of_mixture(posterior.sample(DRAWS, seed)["effect"])
