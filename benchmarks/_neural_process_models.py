"""The neural processes of :mod:`benchmarks.neural_processes`, and the waves that stand beside their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.ops.sets import pool

#: how many waves stand beside x
WAVES = 32
#: standard deviation of their angular frequencies, by kernel, which is the density of what the kernel's functions hold
FREQUENCY = {"eq": 4.0, "matern52": 4.0, "weakly_periodic": 16.0}


def with_waves(observations: bm.Observations, kernel: str) -> bm.Observations:
    """The same with [x, sin(ω x + b)] for x: an MLP of x alone is slow to learn functions that oscillate.

    Frequencies and phases are the same random numbers for all tasks and runs (A. Rahimi, B. Recht, "Random Features for
    Large-Scale Kernel Machines", NeurIPS 2007).
    """
    generator = torch.Generator().manual_seed(0)
    frequency = torch.randn(WAVES, generator=generator) * FREQUENCY[kernel]
    phase = torch.rand(WAVES, generator=generator) * 2 * math.pi
    x = observations.x
    return replace(observations, x=torch.cat([x, (x * frequency.to(x) + phase.to(x)).sin()], -1))


class BasisEncoder(bm.encoders.Encoder):
    """r = g([mean_i [b(x_i), y_i b(x_i)], log(1 + n)]) with b(x) = [1, features of x], and g an MLP.

    A deep set whose work is done behind the pool, once a task: what is pooled is linear in y, as what a kernel smoother
    needs is.
    """

    def __init__(self, features: int, size: int, hidden: list[int]) -> None:
        super().__init__(features, 1, size, sort=False)
        self.after = bm.nets.mlp(2 * (features + 1) + 1, hidden, size, activation="gelu")

    def forward(self, observations: bm.Observations, given: Tensor | None = None) -> Tensor:
        """One vector for each task, ``[tasks, size]``."""
        rows, mask = self.rows(observations, given)
        x, y = rows.tensor_split([self.features], -1)
        basis = torch.cat([torch.ones_like(y), x], -1)
        each = torch.cat([basis, y * basis], -1)
        pooled = pool(each, mask, "mean") if rows.shape[-2] else each.new_zeros(*each.shape[:-2], each.shape[-1])
        return self.after(torch.cat([pooled, mask.sum(-1, keepdim=True).to(pooled).log1p()], -1))


class BasisDecoder(nn.Module):
    """Outputs Σ_k b_k(x) c_k of learned functions b of x, an affine map of its features, with c from the context.

    Maps ``[…, features + outputs · size]``, the context last, to ``[…, outputs]``.
    """

    def __init__(self, features: int, size: int, outputs: int = 2) -> None:
        super().__init__()
        self.features, self.outputs = features, outputs
        self.basis = nn.Linear(features, size)
        self.start = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs at each x."""
        x, context = inputs.tensor_split([self.features], -1)
        weight = context.unflatten(-1, (self.outputs, -1))
        return self.start + 0.1 * (weight * self.basis(x).unsqueeze(-2)).sum(-1)


# -- the methods --------------------------------------------------------------------------------------------------


def _likelihood() -> bm.likelihoods.HeteroscedasticGaussian:
    return bm.likelihoods.HeteroscedasticGaussian(0.05)  # the noise itself has 0.22


def _cnp(width: int) -> bm.ConditionalNeuralProcess:
    features, size = 1 + WAVES, 128
    model = bm.ContextTaskModel(BasisDecoder(features, size), _likelihood(), 2 * size)
    encoder = BasisEncoder(features, 2 * size, [width, width])
    return bm.ConditionalNeuralProcess(model, encoder, subsets=False)


def _np(width: int) -> bm.NeuralProcess:
    features, size = 1 + WAVES, 64
    model = bm.ContextTaskModel(BasisDecoder(features, size, 1), bm.Gaussian(0.3, learn_scale=True), size)
    encoder = BasisEncoder(features, width, [width])
    return bm.NeuralProcess(model, encoder, posterior="full", width=width, subsets=False, num_particles=1)


def _attention(width: int, **latent: Any) -> bm.AttentiveNeuralProcess:
    return bm.AttentiveNeuralProcess(_likelihood(), width=width, depth=2, heads=8, subsets=False, **latent)


def _attentive_cnp(width: int) -> bm.AttentiveNeuralProcess:
    return _attention(width)


def _attentive_np(width: int) -> bm.AttentiveNeuralProcess:
    # by the density of draws from q(z | S) itself, the figure's own; the ELBO was worse after as many seconds
    return _attention(width, latent_size=16, num_particles=8, objective="likelihood")


def _conv_cnp(width: int) -> bm.ConvCNP:
    return bm.ConvCNP(_likelihood(), width=width, depth=6, subsets=False)


def _gnp(width: int) -> bm.GaussianNeuralProcess:
    return bm.GaussianNeuralProcess(_likelihood(), network="convolution", width=width, depth=6, subsets=False)


def _transformer_np(width: int) -> bm.TransformerNeuralProcess:
    return bm.TransformerNeuralProcess(_likelihood(), width=width, depth=3, heads=8, subsets=False)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        make: the method for a width, freshly drawn from torch's global random state.
        steps: training steps of a CPU run; a quick one takes a five-hundredth.
        width, full_width: of the networks, on a CPU and with ``--full``.
        rate: Adam's, falling to 0 as a cosine.
        clip: largest norm of the gradient.
        autoregressive: whether the trained method is also asked for one target after another.
        waves: whether waves stand beside x. The convolution takes x itself.
    """

    make: Callable[[int], Any]
    steps: int
    width: int
    full_width: int
    rate: float = 1e-3
    clip: float | None = None
    autoregressive: bool = False
    waves: bool = True


RUNS = {
    # a rate of 3e-3 without clipping diverged after 45,000 steps
    "cnp": Run(_cnp, 75_000, 256, 512, clip=1.0, autoregressive=True),
    "np": Run(_np, 18_000, 256, 512),
    "attentive_cnp": Run(_attentive_cnp, 25_000, 64, 128, rate=3e-3),
    "attentive_np": Run(_attentive_np, 16_000, 64, 128, rate=3e-3),
    "conv_cnp": Run(_conv_cnp, 14_000, 64, 128, autoregressive=True, waves=False),
    "gnp": Run(_gnp, 12_000, 64, 128, waves=False),
    "transformer_np": Run(_transformer_np, 12_000, 64, 128),
}
