"""Pyro programs that several tests use."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

import bayesmeta as bm


class LinearHierarchy(PyroModule):
    """y = x · φ + noise, φ ~ N(mean, diag(scale²)) as an ordinary user would write it; θ: mean and scale."""

    def __init__(self, mean, scale, noise):
        super().__init__()
        self.mean = torch.nn.Parameter(mean.clone())
        self.scale = PyroParam(scale.clone(), constraint=constraints.positive)
        self.noise = noise

    def forward(self, x, y=None, mask=None):
        mean, scale = self.mean, self.scale
        with bm.task_plate(x):
            beta = pyro.sample("beta", dist.Normal(mean, scale).to_event(1))
            with bm.shot_plate(x, mask):
                loc = (x * beta).sum(-1)
                return pyro.sample("y", dist.Normal(loc, self.noise), obs=y)


class TwoSites(PyroModule):
    """A global site, two local sites of which one is positive, a parameter."""

    def __init__(self):
        super().__init__()
        self.tau = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x, y=None, mask=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = self.tau
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(mu, tau))
            sigma = pyro.sample("sigma", dist.LogNormal(x.new_tensor(-1.0), x.new_tensor(0.25)))
            with bm.shot_plate(x, mask):
                return pyro.sample("y", dist.Normal(slope * x.squeeze(-1), sigma), obs=y)


def batch_of(tasks, shots, features=1, seed=0, dtype=torch.float32, ragged=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, shots, features, generator=generator, dtype=dtype)
    y = torch.randn(tasks, shots, generator=generator, dtype=dtype)
    mask = None
    if ragged:
        mask = torch.arange(shots) < torch.randint(1, shots + 1, (tasks, 1), generator=generator)
    return bm.Observations(x, y, mask)
