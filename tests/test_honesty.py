"""Adaptation sees the support alone (DESIGN 5.1): perturb query rows upstream, in the table itself."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.data import Observations
from bayesmeta.tasks import TableTasks

SUPPORT, YEARS = 4, 9


def frame(seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {"unit": f"u{t}", "time": float(s), "value": rng.normal() + 0.3 * s}
        for t in range(12)
        for s in range(YEARS - t % 3)  # ragged, so that padding is exercised
    ]
    return pd.DataFrame(rows)


def perturbed(table, unit="u9", rows=(5,)):
    """The same table with other targets in some query rows of one held-out unit."""
    changed = table.copy()
    index = changed[(changed.unit == unit)].index[list(rows)]
    changed.loc[index, "value"] += 100.0
    return changed


def pipeline(table, method):
    """Table → standardiser of the training units → padding → adapt → predictions of every query."""
    tasks = TableTasks.from_dataframe(table, task="unit", x=["time"], y="value", order="first")
    train, test = tasks.subset([f"u{i}" for i in range(8)]), tasks.subset([f"u{i}" for i in range(8, 12)])
    batch = test.with_standardizer(train.fit_standardizer()).all(support=SUPPORT)
    posterior = method.adapt(batch.support, generator=1)
    return batch, posterior, posterior.predict(batch.query, 20, generator=2)


def methods():
    def network():
        torch.manual_seed(0)
        return bm.nets.mlp(1, [6, 6], 1)

    def program(x, y=None, mask=None):
        import pyro
        import pyro.distributions as dist

        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(mu, 1.0))
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.5), obs=y)

    return {
        "maml": lambda: bm.MAML(bm.NeuralTaskModel(network(), bm.Gaussian(0.5)), inner_steps=3, inner_lr=0.05),
        "abml": lambda: bm.ABML(bm.NeuralTaskModel(network(), bm.Gaussian(0.5)), inner_steps=3),
        "last_layer": lambda: bm.BayesianLastLayer(
            bm.NeuralTaskModel(network(), bm.Gaussian(0.5), task_modules="head")
        ),
        "maml_program": lambda: bm.MAML(program, inner_steps=3, objective="joint"),
        "abml_program": lambda: bm.ABML(program, inner_steps=3, global_guide="normal"),
    }


def tensors(posterior):
    return posterior.state()


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_query_row_never_reaches_the_posterior(name):
    with torch.random.fork_rng():
        method = methods()[name]()
    batch, posterior, predictions = pipeline(frame(), method)
    other_batch, other, other_predictions = pipeline(perturbed(frame()), method)
    assert not torch.equal(batch.query.y, other_batch.query.y), "the perturbation must arrive in the query"
    for field in ("x", "y", "mask"):
        ours, theirs = getattr(batch.support, field), getattr(other_batch.support, field)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert all(torch.equal(tensors(posterior)[k], tensors(other)[k]) for k in tensors(posterior))
    assert torch.equal(predictions, other_predictions)
    # and a support row does reach it
    moved = pipeline(perturbed(frame(), rows=(1,)), method)
    assert not torch.equal(moved[2], predictions)


class LeakyBatchNorm(nn.Module):
    """Transductive: normalises by the statistics of support and query of all tasks together."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def adapt(self, batch):
        everything = batch.union()
        values = everything.y[everything.full_mask()]
        support = Observations(batch.support.x, (batch.support.y - values.mean()) / values.std(), batch.support.mask)
        return self.method.adapt(support, generator=1)


def test_a_batch_norm_that_leaks_is_caught():
    with torch.random.fork_rng():
        method = methods()["maml"]()
    leaky = LeakyBatchNorm(method)
    batch, _, _ = pipeline(frame(), method)
    other, _, _ = pipeline(perturbed(frame()), method)
    assert not torch.equal(leaky.adapt(batch).u, leaky.adapt(other).u)


def test_a_standardiser_that_saw_the_held_out_units_is_caught():
    def learned(table):
        tasks = TableTasks.from_dataframe(table, task="unit", x=["time"], y="value", order="first")
        return tasks.subset([f"u{i}" for i in range(8)]).fit_standardizer(), tasks.fit_standardizer()

    honest, leaky = learned(frame())
    other_honest, other_leaky = learned(perturbed(frame()))
    assert torch.equal(honest.y_mean, other_honest.y_mean)
    assert torch.equal(honest.y_scale, other_honest.y_scale)
    assert not torch.equal(leaky.y_mean, other_leaky.y_mean)
