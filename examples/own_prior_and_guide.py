"""A hierarchical model and a guide of one's own, then the same model through ABML and MAML, on simulated radon.

Log radon falls from the basement to the first floor of a house; level and fall vary by county. [--quick]
"""

import argparse

import arviz_stats as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions.constraints import positive

import bayesmeta as bm

MU, TAU, SIGMA = np.array([1.5, -0.7]), np.array([0.6, 0.5]), 0.4  # the truth behind the data: level and fall


class Radon(PyroModule):  # θ: the global site mu, and the parameters tau and sigma. φ: level and fall of each county
    def __init__(self):
        super().__init__()
        self.tau, self.sigma = PyroParam(torch.full((2,), 0.5), positive), PyroParam(torch.tensor(1.0), positive)

    def forward(self, x, y=None, mask=None):
        tau, sigma = self.tau, self.sigma
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
        with bm.task_plate(x):
            county = pyro.sample("county", dist.Normal(mu, tau).to_event(1))  # [..., tasks, 1, 2]
            with bm.shot_plate(x, mask):
                pyro.sample("y", dist.Normal(county[..., 0] + county[..., 1] * x.squeeze(-1), sigma), obs=y)


class Encoder(PyroModule):  # amortised: a network reads a county's sums and says where it lies, and how near to mu
    def __init__(self):
        super().__init__()
        self.mu_loc, self.mu_scale = PyroParam(torch.zeros(2)), PyroParam(torch.full((2,), 0.1), positive)
        self.network = bm.nets.mlp(5, [32], 6, activation="tanh")

    def forward(self, x, y=None, mask=None):
        keep = torch.ones_like(y) if mask is None else mask.to(y.dtype)
        columns = torch.stack([torch.ones_like(y), x.squeeze(-1), y, x.squeeze(-1) * y, y**2], -1)
        sums = (keep.unsqueeze(-1) * columns).sum(-2, keepdim=True)  # [tasks, 1, 5]
        shift, log_scale, near = self.network(sums / 5).chunk(3, -1)  # each [tasks, 1, 2]
        mu = pyro.sample("mu", dist.Normal(self.mu_loc, self.mu_scale).to_event(1))
        with bm.task_plate(x):
            pyro.sample("county", dist.Normal(shift + near.sigmoid() * mu, (log_scale - 1).exp()).to_event(1))


def simulate(counties, seed):  # 6 to 20 houses in a county
    rng = np.random.default_rng(seed)
    county = np.repeat(np.arange(counties), rng.integers(6, 21, counties))
    effect, floor = MU + TAU * rng.standard_normal((counties, 2)), rng.integers(0, 2, len(county))
    y = effect[county, 0] + effect[county, 1] * floor + SIGMA * rng.standard_normal(len(county))
    table = pd.DataFrame({"county": county, "floor": floor, "log_radon": y})
    return bm.tasks.TableTasks.from_dataframe(table, task="county", x=["floor"], y="log_radon")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that all works")
    steps = 15 if parser.parse_args().quick else 500
    train, test = simulate(140, seed=0).split([80, 60])
    batch, generator = test.all(support=5), torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # Pyro draws from torch's global generator
    svi = bm.MetaSVI(Radon(), Encoder(), lambda p: torch.optim.Adam(p, 0.01), pyro.infer.TraceMeanField_ELBO())
    for _ in range(6 * steps):
        svi.step(train.sample(80, support=5, generator=generator).support)
    posteriors = {"MetaSVI, own guide": svi.posterior(batch, num_samples=500)}
    abml = bm.ABML(Radon(), inner_steps=10, inner_lr=0.1, global_guide="normal")
    for method in (abml, bm.MAML(Radon(), inner_steps=3, inner_lr=0.1)):
        bm.fit(method, train, steps=steps, support=5, query=None, optimizer=lambda p: torch.optim.Adam(p, 0.01))
        posteriors[type(method).__name__] = method.adapt(batch.support)
    for name, posterior in posteriors.items():
        print(f"{name}\n{bm.scores(posterior, batch)}\n")
    tree = bm.to_datatree(posteriors["MetaSVI, own guide"], batch, num_samples=500)
    print(f"mu by SVI (truth {MU})\n{az.summary(tree, var_names=['mu'], kind='stats')}")
