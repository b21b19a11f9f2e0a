"""A hierarchical model and a guide of one's own, then the same model through ABML and MAML.

Simulated radon: houses in counties, log radon falls from the basement to the first floor, and both level and fall vary by
county. Run: python examples/own_prior_and_guide.py [--quick]
"""

import argparse

import arviz_stats as az  # on Python 3.12 and later: import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

import bayesmeta as bm

MU, TAU, SIGMA = np.array([1.5, -0.7]), np.array([0.6, 0.5]), 0.4  # the truth behind the data: level and fall


class Radon(PyroModule):
    """θ: the global site mu and the parameters tau and sigma. φ: level and fall of each county."""

    def __init__(self):
        super().__init__()
        self.tau = PyroParam(torch.full((2,), 0.5), constraint=constraints.positive)
        self.sigma = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x, y=None, mask=None):
        tau, sigma = self.tau, self.sigma
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
        with bm.task_plate(x):
            county = pyro.sample("county", dist.Normal(mu, tau).to_event(1))  # [..., tasks, 1, 2]
            with bm.shot_plate(x, mask):
                mean = county[..., 0] + county[..., 1] * x.squeeze(-1)  # [..., tasks, shots]
                pyro.sample("y", dist.Normal(mean, sigma), obs=y)


class Encoder(PyroModule):
    """Amortised guide: a network reads each county's means and says where its effects lie, and how near to mu."""

    def __init__(self):
        super().__init__()
        self.mu_loc = torch.nn.Parameter(torch.zeros(2))
        self.mu_scale = PyroParam(torch.full((2,), 0.1), constraint=constraints.positive)
        self.network = bm.nets.mlp(6, [32], 6, activation="tanh")

    def forward(self, x, y=None, mask=None):
        keep = torch.ones_like(y) if mask is None else mask.to(y.dtype)
        floor, counts = x.squeeze(-1), keep.sum(-1, keepdim=True)
        means = [(keep * v).sum(-1, keepdim=True) / counts for v in (floor, y, floor * y)]
        first = (keep * floor).sum(-1, keepdim=True)
        features = torch.cat([*means, counts.log(), first.log1p(), (counts - first).log1p()], -1)
        shift, log_scale, shrink = self.network(features)[:, None].chunk(3, -1)  # each [tasks, 1, 2]
        mu = pyro.sample("mu", dist.Normal(self.mu_loc, self.mu_scale).to_event(1))
        with bm.task_plate(x):
            pyro.sample("county", dist.Normal(shift + shrink.sigmoid() * mu, (log_scale - 1).exp()).to_event(1))


def simulate(counties, seed):
    """A table of houses, 6 to 20 in a county."""
    rng = np.random.default_rng(seed)
    county = np.repeat(np.arange(counties), rng.integers(6, 21, counties))
    effect, floor = MU + TAU * rng.standard_normal((counties, 2)), rng.integers(0, 2, len(county))
    y = effect[county, 0] + effect[county, 1] * floor + SIGMA * rng.standard_normal(len(county))
    return pd.DataFrame({"county": county, "floor": floor, "log_radon": y})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that all works")
    steps = 40 if parser.parse_args().quick else 1500
    table = bm.tasks.TableTasks.from_dataframe(simulate(140, 0), task="county", x=["floor"], y="log_radon")
    train, test = table.split([80, 60])
    batch = test.all(support=5)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    svi = bm.MetaSVI(Radon(), Encoder(), lambda p: torch.optim.Adam(p, 0.01), pyro.infer.TraceMeanField_ELBO())
    for _ in range(2 * steps):
        svi.step(train.sample(80, support=5, generator=generator).support)
    posteriors = {"MetaSVI, own guide": svi.posterior(batch, 500)}
    for name, method in {
        "ABML": bm.ABML(Radon(), inner_steps=10, inner_lr=0.1, global_guide="normal"),
        "MAML": bm.MAML(Radon(), inner_steps=3, inner_lr=0.1),
    }.items():
        bm.fit(method, train, steps=steps // 3, tasks_per_step=40, support=5, query=None, optimizer=adam, device="cpu")
        posteriors[name] = method.adapt(batch.support)

    for name, posterior in posteriors.items():
        print(f"\n{name}\n{bm.scores(posterior, batch)}")
    tree = bm.to_datatree(posteriors["MetaSVI, own guide"], batch, num_samples=500)
    print(f"\nMetaSVI, own guide: mu (truth {MU})")
    print(az.summary(tree, var_names=["mu"], kind="stats"))


def adam(parameters):
    return torch.optim.Adam(parameters, 0.01)


if __name__ == "__main__":
    main()
