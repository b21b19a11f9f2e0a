"""Posteriors with known truth: exact, and with all their spread multiplied by a factor."""

from dataclasses import dataclass

import pyro.distributions as dist
import torch

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import NoClosedFormError
from bayesmeta.ops.random import as_generator
from bayesmeta.tasks.linear import LinearGaussian

F64 = torch.float64
#: Exact, over-confident and under-confident.
FACTORS = (1.0, 0.5, 2.0)


def linear_tasks(num_tasks, seed=0, shots=4, query=6, noise=0.4):
    """A linear-Gaussian family and a batch of it."""
    mean = torch.tensor([0.5, -1.0], dtype=F64)
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64)
    tasks = LinearGaussian(mean, covariance, noise)
    return tasks, tasks.sample(num_tasks, support=shots, query=query, generator=seed)


@dataclass
class Phi:
    """Draws of φ, ``[n, tasks, d]``."""

    u: torch.Tensor


class Linear:
    """The exact posterior of a linear-Gaussian task, its predictive stretched by ``factor`` about its mean.

    ``shift`` moves the predictive mean by so many standard deviations of the noise; ``closed`` says whether the
    predictive is given in closed form.
    """

    is_point, num_draws, target_kind = False, None, "real"

    def __init__(self, tasks, support, factor=1.0, shift=0.0, closed=True):
        self.tasks, self.support, self.factor, self.closed = tasks, support, factor, closed
        self.num_tasks = support.num_tasks
        self.offset = shift * float(tasks.noise)
        exact = tasks.posterior(support)
        self.mean, self.covariance = exact.mean, exact.covariance_matrix * factor**2
        self.noise = float(tasks.noise) * factor

    def draws(self, num_samples, generator=None):
        generator = as_generator(generator, stream="draws")
        z = torch.randn(num_samples, *self.mean.shape, generator=generator, dtype=F64)
        return Phi(self.mean + (torch.linalg.cholesky(self.covariance) @ z.unsqueeze(-1)).squeeze(-1))

    def prior_draws(self, num_samples, generator=None):
        generator = as_generator(generator, stream="prior")
        z = torch.randn(num_samples, *self.mean.shape, generator=generator, dtype=F64)
        root = torch.linalg.cholesky(self.tasks.covariance)
        return Phi(self.tasks.mean + (root @ z.unsqueeze(-1)).squeeze(-1))

    def named(self, draws):
        return {"phi": draws.u}

    def named_theta(self, draws):
        return {}

    def _x(self, x):
        return x.x if isinstance(x, Observations) else x

    def _function(self, x, draws):
        return torch.einsum("tsd,ntd->nts", self._x(x), draws.u) + self.offset

    def log_likelihood(self, observations, *, draws):
        value = dist.Normal(self._function(observations, draws), self.noise).log_prob(observations.y)
        return torch.where(observations.full_mask(), value, 0.0)

    def predict(self, x, num_samples=1000, *, draws=None, generator=None):
        generator = as_generator(generator, stream="predictions")
        draws = self.draws(num_samples, generator) if draws is None else draws
        f = self._function(x, draws)
        return f + self.noise * torch.randn(f.shape, generator=generator, dtype=F64)

    def predictive(self, x, *, joint=False):
        if not self.closed:
            raise NoClosedFormError("hidden")
        x = self._x(x)
        mean = (x @ self.mean.unsqueeze(-1)).squeeze(-1) + self.offset
        covariance = x @ self.covariance @ x.mT + self.noise**2 * torch.eye(x.shape[1], dtype=F64)
        if joint:
            return dist.MultivariateNormal(mean, covariance)
        return dist.Normal(mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt())


class Labels:
    """Tasks of classes with known probabilities, softmax(factor · logits)."""

    is_point, num_draws, target_kind = False, None, "class"

    def __init__(self, support, logits, factor=1.0):
        self.support, self.num_tasks = support, support.num_tasks
        self.logits = logits * factor  # [tasks, shots, classes]

    def draws(self, num_samples, generator=None):
        return Phi(torch.zeros(num_samples, self.num_tasks, 1, dtype=F64))

    def predictive(self, x, *, joint=False):
        raise NoClosedFormError("labels")

    def class_probabilities(self, x, num_samples=1000, *, draws=None, generator=None):
        return self._at(x).softmax(-1)

    def _at(self, x):
        """The logits of the points of these inputs, whose x is their place."""
        index = x.x.long().expand(*x.x.shape[:2], self.logits.shape[-1])
        return self.logits.gather(1, index)

    def log_likelihood(self, observations, *, draws):
        value = dist.Categorical(logits=self._at(observations)).log_prob(observations.y)
        return torch.where(observations.full_mask(), value, 0.0).expand(len(draws.u), *observations.y.shape)


def label_tasks(num_tasks, classes=4, query=8, seed=0, spread=1.5):
    """A batch of classes and its true logits, which share a part within each task."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_tasks, 1, classes, generator=generator, dtype=F64)
    logits = spread * (shared + torch.randn(num_tasks, query, classes, generator=generator, dtype=F64))
    gumbel = -(-torch.rand(logits.shape, generator=generator, dtype=F64).log()).log()
    y = (logits + gumbel).argmax(-1).to(F64)
    x = torch.arange(query, dtype=F64).reshape(1, -1, 1).expand(num_tasks, query, 1)
    return TaskBatch(Observations(x[:, :2], y[:, :2]), Observations(x, y)), logits


class Counts:
    """Tasks of counts, rates λ ``[tasks, shots]`` known; ``draws_of`` makes draws of y from λ ``[n, tasks, shots]``.

    The place of a point is its x.
    """

    is_point, num_draws, target_kind = False, None, "count"

    def __init__(self, support, rate, draws_of):
        self.support, self.num_tasks, self.rate, self.draws_of = support, support.num_tasks, rate, draws_of

    def draws(self, num_samples, generator=None):
        return num_samples

    def predictive(self, x, *, joint=False):
        raise NoClosedFormError("counts")

    def predict(self, x, num_samples=1000, *, draws=None, generator=None):
        generator = as_generator(generator, stream="predictions")
        rate = self.rate.gather(1, x.x.squeeze(-1).long())
        return self.draws_of(rate.expand(num_samples, *rate.shape).contiguous(), generator)
