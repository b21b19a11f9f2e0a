"""A hierarchy of Gaussians whose every density is known: θ = μ, φ = β of each task, float64."""

import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm

F64 = torch.float64
TAU, BETWEEN, NOISE = 1.5, 0.8, 0.5


def number(value):
    return torch.tensor(value, dtype=F64)


def hierarchy(x, y=None, mask=None):
    """μ ~ N(0, TAU²), β ~ N(μ, BETWEEN²), y ~ N(β, NOISE²)."""
    mu = pyro.sample("mu", dist.Normal(number(0.0), number(TAU)))
    with bm.task_plate(x):
        beta = pyro.sample("beta", dist.Normal(mu, number(BETWEEN)))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Normal(beta, number(NOISE)), obs=y)


def flat(x, y=None, mask=None):
    """The same with μ = 0: no global site."""
    with bm.task_plate(x):
        beta = pyro.sample("beta", dist.Normal(number(0.0), number(BETWEEN)))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Normal(beta, number(NOISE)), obs=y)


def observations(tasks=3, shots=8, seed=0, ragged=False):
    generator = torch.Generator().manual_seed(seed)
    beta = 0.5 + BETWEEN * torch.randn(tasks, 1, generator=generator, dtype=F64)
    y = beta + NOISE * torch.randn(tasks, shots, generator=generator, dtype=F64)
    mask = torch.arange(shots) < torch.tensor([[shots - i] for i in range(tasks)]) if ragged else None
    return bm.Observations(torch.zeros(tasks, shots, 1, dtype=F64), y, mask)


def only(data):
    """A batch of these observations as the support, and no query."""
    return bm.TaskBatch(data, bm.Observations(data.x[:, :0], data.y[:, :0]))


def exact(data):
    """Mean and covariance of (μ, β) given the data, ``[1 + tasks]``."""
    tasks = data.num_tasks
    design = torch.cat([-torch.ones(tasks, 1, dtype=F64), torch.eye(tasks, dtype=F64)], 1)  # β − μ
    precision = design.mT @ design / BETWEEN**2
    precision[0, 0] += 1 / TAU**2
    keep = data.full_mask().to(F64)
    count, total = keep.sum(-1), (keep * data.y).sum(-1)
    precision[1:, 1:] += torch.diag(count / NOISE**2)
    covariance = torch.linalg.inv(precision)
    return covariance @ torch.cat([torch.zeros(1, dtype=F64), total / NOISE**2]), covariance


def evidence(data, between_tasks=TAU):
    """The distribution of all real observations, flat; with ``between_tasks`` 0 that of :func:`flat`."""
    keep = data.full_mask()
    owner = keep.nonzero()[:, 0]
    same = (owner[:, None] == owner).to(F64)
    covariance = between_tasks**2 + BETWEEN**2 * same + NOISE**2 * torch.eye(len(owner), dtype=F64)
    return torch.distributions.MultivariateNormal(torch.zeros(len(owner), dtype=F64), covariance), data.y[keep]


def joint_guide(data, stretch=1.0, shift=0.0):
    """The exact posterior of μ and β as one guide, with correlations; stretched or shifted on request."""
    mean, covariance = exact(data)
    tril = stretch * torch.linalg.cholesky(covariance)

    def guide(x, y=None, mask=None):
        mean_ = pyro.param("mean", mean + shift)
        z = pyro.sample("z", dist.MultivariateNormal(mean_, scale_tril=tril), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Delta(z[0]))
        with bm.task_plate(x):
            pyro.sample("beta", dist.Delta(z[1:, None]))

    return guide


def task_guide(stretch=1.0):
    """The exact posterior of each β of :func:`flat`."""

    def guide(x, y, mask=None):
        keep = torch.ones_like(y) if mask is None else mask.to(F64)
        scale = (1 / BETWEEN**2 + keep.sum(-1, keepdim=True) / NOISE**2) ** -0.5
        loc = scale**2 * (keep * y).sum(-1, keepdim=True) / NOISE**2
        extra = pyro.param("extra", number(0.0))
        with bm.task_plate(x):
            pyro.sample("beta", dist.Normal(loc + extra, stretch * scale))

    return guide
