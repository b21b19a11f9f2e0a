"""The models of the SBC benchmark: their θ is fixed, their tasks are simulated, so that inference alone is judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.ops.random import as_generator

FEATURES, SHOTS, NOISE = 3, 5, 0.7
#: of the priors of three weights
MEAN, SCALE = (0.5, -1.0, 1.0), (0.6, 1.0, 0.5)


def inputs(num_tasks: int, shots: int, generator: torch.Generator) -> Tensor:
    """x ``[tasks, shots, 3]``: a constant 1, and two numbers of variance 1."""
    x = math.sqrt(3) * (2 * torch.rand(num_tasks, shots, FEATURES, generator=generator) - 1)
    x[..., 0] = 1.0
    return x


def template(model: str, num_tasks: int, seed: int) -> bm.Observations:
    """Inputs of tasks of 1 to 5 real shots, and targets that only say what kind they are."""
    generator = as_generator(seed, stream="SBC template")
    x = inputs(num_tasks, SHOTS, generator)
    counts = torch.randint(1, SHOTS + 1, (num_tasks, 1), generator=generator)
    outputs = (2,) if model == "inverse_wishart" else ()
    y = torch.randint(2, (num_tasks, SHOTS, *outputs), generator=generator).float()
    return bm.Observations(x, y, torch.arange(SHOTS) < counts)


class Inputs:
    """An endless distribution of tasks that lends its inputs to simulated ones."""

    num_tasks = None

    def __init__(self, model: str) -> None:
        self.outputs = (2,) if model == "inverse_wishart" else ()

    def sample(self, num_tasks: int, *, support: int, query: int | None = None, generator: Any = None) -> bm.TaskBatch:
        """Tasks with targets 0 and 1, which only say of what kind they are."""
        generator = as_generator(generator, stream="SBC inputs")

        def part(shots: int) -> bm.Observations:
            y = (torch.arange(shots) % 2).float().reshape(1, shots, *(1 for _ in self.outputs))
            x = inputs(num_tasks, shots, generator)
            return bm.Observations(x, y.expand(num_tasks, shots, *self.outputs))

        return bm.TaskBatch(part(support), part(query or 0))


# -- linear in φ ------------------------------------------------------------------------------------------------------


def regression(likelihood: Any, mean: tuple[float, ...] = MEAN, scale: tuple[float, ...] = SCALE) -> bm.NeuralTaskModel:
    """A Linear on x whose three weights are φ."""
    network = nn.Sequential(nn.Linear(FEATURES, 1, bias=False))
    model = bm.NeuralTaskModel(network, likelihood, bm.priors.Normal(1.0), task_modules="head")
    prior: Any = model.prior
    with torch.no_grad():
        prior.loc.copy_(torch.tensor(mean))
        prior.log_scale.copy_(torch.tensor(scale).log())
    return model


def linear() -> bm.NeuralTaskModel:
    """Gaussian noise of known scale: conjugate."""
    return regression(bm.Gaussian(NOISE))


def poisson() -> bm.NeuralTaskModel:
    """Counts, log rate linear in φ: skewed posteriors where a task has only zeros."""
    return regression(bm.likelihoods.Poisson(), mean=(0.0, 0.0, 0.3), scale=(0.7, 0.5, 0.5))


def bernoulli() -> bm.NeuralTaskModel:
    """Labels, log-odds linear in φ."""
    return regression(bm.likelihoods.Bernoulli(), scale=(1.5, 1.5, 1.5))


def kernel() -> bm.DeepKernelModel:
    """The linear model as a Gaussian process; φ is the function at the support."""
    first = nn.Linear(FEATURES, FEATURES, bias=False)
    network = nn.Sequential(first, nn.Linear(FEATURES, 1))
    with torch.no_grad():
        first.weight.copy_(torch.diag(torch.tensor(SCALE)))
    return bm.DeepKernelModel(network, bm.Gaussian(NOISE), "linear", inputs="features")


def conjugate(outputs: int, components: int, noise: Any) -> bm.ConjugateModel:
    """A last layer on fixed tanh features; components differ in everything, and their weights' means lie apart."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = bm.nets.mlp(FEATURES, [3], outputs, activation="tanh")
        model = bm.ConjugateModel(network, bm.Gaussian(NOISE), components, noise=noise, spread=0.8)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.4 * torch.randn_like(parameter))
            model.loc.add_(torch.randn_like(model.loc))
    return model


# -- Pyro programs ----------------------------------------------------------------------------------------------------


def scale(x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> None:
    """A positive φ alone: the scale of the noise, its posterior skewed where there are few shots."""
    with bm.task_plate(x):
        sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(()), 0.75))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(torch.zeros_like(x[..., 0]), sigma), obs=y)


def banana(x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> None:
    """Curved and, where y is large, with two modes: y has the mean a + b² − 1."""
    with bm.task_plate(x):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(a + b.square() - 1.0 + 0.0 * x[..., 0], 1.0), obs=y)


#: makes each model afresh
MODELS: dict[str, Callable[[], Any]] = {
    "linear": linear,
    "poisson": poisson,
    "bernoulli": bernoulli,
    "kernel": kernel,
    "inverse_gamma": lambda: conjugate(1, 1, "inverse_gamma"),
    "inverse_wishart": lambda: conjugate(2, 1, "inverse_wishart"),
    "mixture": lambda: conjugate(1, 3, "known"),
    "mixture_inverse_gamma": lambda: conjugate(1, 3, "inverse_gamma"),
    "scale": lambda: scale,
    "banana": lambda: banana,
}
