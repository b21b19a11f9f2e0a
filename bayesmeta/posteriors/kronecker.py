"""A Gaussian over the weights of Linear layers whose precision is a diagonal and Kronecker products."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from bayesmeta.data import Observations
from bayesmeta.errors import ShapeError, UnsupportedError
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.kronecker import KroneckerPrecision, LinearLayers
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.posteriors.base import Draws
from bayesmeta.posteriors.components import Components

_NO_SHAPE = torch.Size()


class KroneckerNormalPosterior(Components):
    """Gaussian over the weights of a network's Linear layers, N(loc, S (I + ⊕_l A_l ⊗ G_l)⁻¹ S).

    S is diagonal. A_l ⊗ G_l maps the weights W̃ = [weight, bias], ``[O, I]``, of layer l to G W̃ A. Layers are
    independent of one another. No D × D matrix is made but by :attr:`covariance`.

    Args:
        program: a :class:`~bayesmeta.NeuralTaskModel` whose task parameters are Linear layers.
        support: what was adapted to.
        loc, scale: mean and diagonal of S, each ``[G, tasks, D]``; G counts draws of global sites.
        inputs, outputs: all A_l, and all G_l, flattened one after the other, ``[G, tasks, Σ I²]`` and
            ``[G, tasks, Σ O²]``.
        theta: unconstrained global sites, ``[G, E]``.

    Raises:
        UnsupportedError: for another kind of program.
        ShapeError: for factors that do not fit its layers.
    """

    def __init__(
        self,
        program: TaskProgram,
        support: Observations,
        loc: Tensor,
        scale: Tensor,
        inputs: Tensor,
        outputs: Tensor,
        theta: Tensor | None = None,
    ) -> None:
        super().__init__(program, support, theta)
        if not isinstance(program, NeuralTaskModel):
            raise UnsupportedError(
                f"A KroneckerNormalPosterior is over the layers of a NeuralTaskModel; got a {type(program).__name__}."
            )
        self.loc, self.scale = loc, scale
        self.inputs, self.outputs = inputs, outputs
        self._layers = LinearLayers(program.flat)
        wanted = [sum(side[i] ** 2 for side in self._layers.sides) for i in (1, 0)]
        if [inputs.shape[-1], outputs.shape[-1]] != wanted:
            raise ShapeError(
                f"The factors of this network's layers (sides {self._layers.sides}) have {wanted[0]} and {wanted[1]} "
                f"numbers a task; got {inputs.shape[-1]} and {outputs.shape[-1]}. Give the network of the posterior."
            )
        self.precision = self._precision(scale, inputs, outputs)

    def _precision(self, scale: Tensor, inputs: Tensor, outputs: Tensor) -> KroneckerPrecision:
        a_sides, g_sides = ([side[i] for side in self._layers.sides] for i in (1, 0))
        return KroneckerPrecision(self._layers, scale, unpack(inputs, a_sides), unpack(outputs, g_sides))

    @property
    def covariance(self) -> Tensor:
        """Covariance of u as a matrix, ``[G, tasks, D, D]``: for small networks."""
        return torch.linalg.inv(self.precision.dense())

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws, the components in turn."""
        generator = as_generator(generator, self.loc.device, "draws")
        groups = self.loc.shape[0]
        noise = normal_like(self.loc, (num_samples, *self.loc.shape[1:]), generator)
        missing = -num_samples % groups  # factors are not copied for each draw: all components at once, in rounds
        rounds = torch.cat([noise, noise.new_zeros(missing, *noise.shape[1:])]).unflatten(0, (-1, groups))
        u = (self.loc + self.precision.spread(rounds)).flatten(0, 1)[:num_samples]
        return Draws(u, self._theta_at(self._component(num_samples, groups)))

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u), a mixture over the components, ``[…, tasks]``."""
        each = _log_prob(self.loc, self.precision, u.unsqueeze(-3))
        return each.logsumexp(-2) - math.log(self.loc.shape[0])

    def u_distribution(self) -> Any:
        """The Gaussian, batch shape ``[tasks, 1]``."""
        loc, scale, inputs, outputs = (
            self._components(part).unsqueeze(-2) for part in (self.loc, self.scale, self.inputs, self.outputs)
        )
        return KroneckerNormal(loc, self._precision(scale, inputs, outputs))

    def state(self) -> dict[str, Tensor]:
        """loc, scale, the factors, and theta where there is one."""
        parts = {"loc": self.loc, "scale": self.scale, "inputs": self.inputs, "outputs": self.outputs}
        return parts | ({} if self.theta is None else {"theta": self.theta})


class KroneckerNormal(TorchDistribution):
    """Multivariate normal by a Kronecker precision.

    Args:
        loc: mean, ``[…, D]``.
        precision: with a scale of the shape of ``loc`` before it was expanded.
    """

    support = constraints.real_vector
    arg_constraints = {"loc": constraints.real_vector}
    has_rsample = True

    def __init__(self, loc: Tensor, precision: KroneckerPrecision, validate_args: bool | None = None) -> None:
        self.loc, self.precision = loc, precision
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """``[…, D]``."""
        return self.loc

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Draws, differentiable in mean and precision."""
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.precision.spread(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, ``[…]``."""
        return _log_prob(self.loc, self.precision, value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KroneckerNormal:
        """The same with another batch shape; the precision broadcasts."""
        return KroneckerNormal(self.loc.expand(*batch_shape, -1), self.precision, validate_args=False)


def _log_prob(loc: Tensor, precision: KroneckerPrecision, u: Tensor) -> Tensor:
    away = u - loc
    square = (away * precision.multiply(away)).sum(-1)
    return 0.5 * (precision.log_det - square - u.shape[-1] * math.log(2 * math.pi))


def pack(factors: list[Tensor]) -> Tensor:
    """Square matrices ``[…, I, I]`` one after the other, ``[…, Σ I²]``."""
    return torch.cat([factor.flatten(-2) for factor in factors], -1)


def unpack(packed: Tensor, sides: list[int]) -> list[Tensor]:
    """The inverse of :func:`pack` for matrices of these sides."""
    parts = packed.split([side**2 for side in sides], -1)
    return [part.unflatten(-1, (side, side)) for part, side in zip(parts, sides, strict=True)]
