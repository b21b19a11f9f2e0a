"""A normalising flow over the unconstrained φ of each task, conditional on what an encoder read."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bayesmeta.data import Observations
from bayesmeta.models.flows import ConditionalFlow
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed, as_generator, forked_rng, normal_like
from bayesmeta.posteriors.base import Draws
from bayesmeta.posteriors.components import Components

_NO_SHAPE = torch.Size()


class FlowPosterior(Components):
    """u = loc + scale ⊙ T(ε; context), ε standard normal, T a :class:`~bayesmeta.models.flows.ConditionalFlow`.

    Args:
        program: the model.
        support: what was adapted to.
        loc, scale: each ``[G, tasks, D]``; G counts draws of global sites.
        context: what T is conditional on, ``[G, tasks, R]``.
        changed: False where T is left out, so that u is Gaussian, ``[tasks]``.
        theta: unconstrained global sites, ``[G, E]``.
        flow: T; or ``weights`` and ``shape``, its parameters in one vector and its options, as :meth:`state` has them.
    """

    def __init__(
        self,
        program: TaskProgram,
        support: Observations,
        loc: Tensor,
        scale: Tensor,
        context: Tensor,
        changed: Tensor,
        theta: Tensor | None = None,
        *,
        flow: ConditionalFlow | None = None,
        weights: Tensor | None = None,
        shape: Tensor | None = None,
    ) -> None:
        super().__init__(program, support, theta)
        self.loc, self.scale, self.context, self.changed = loc, scale, context, changed
        if flow is None:
            assert weights is not None
            assert shape is not None
            with forked_rng(as_generator(0)):  # first weights, written over at once
                flow = ConditionalFlow.from_config(shape.tolist()).to(loc)
            vector_to_parameters(weights, flow.parameters())
            flow.requires_grad_(False)
        self.flow = flow

    def distribution(self, component: Tensor | slice = slice(None)) -> FlowDistribution:
        """u given the draw of the global sites, batch shape ``[G, tasks]``, or of the components of an index."""
        return FlowDistribution(
            self.flow, self.loc[component], self.scale[component], self.context[component], self.changed
        )

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws, the components in turn."""
        generator = as_generator(generator, self.loc.device, "draws")
        component = self._component(num_samples, self.loc.shape[0])
        noise = normal_like(self.loc, (num_samples, *self.loc.shape[1:]), generator)
        return Draws(self.distribution(component).transform(noise)[0], self._theta_at(component))

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u), a mixture over the components, ``[…, tasks]``."""
        return self.distribution().log_prob(u.unsqueeze(-3)).logsumexp(-2) - math.log(self.loc.shape[0])

    def u_distribution(self) -> Any:
        """The flow as a Pyro distribution, batch shape ``[tasks, 1]``."""
        loc, scale, context = (self._components(p).unsqueeze(-2) for p in (self.loc, self.scale, self.context))
        return FlowDistribution(self.flow, loc, scale, context, self.changed.unsqueeze(-1))

    def state(self) -> dict[str, Tensor]:
        """loc, scale, context, changed, weights and shape, and theta where there is one."""
        weights = parameters_to_vector(self.flow.parameters())
        shape = self.loc.new_tensor(self.flow.config())
        tensors = {"loc": self.loc, "scale": self.scale, "context": self.context, "changed": self.changed}
        tensors |= {"weights": weights, "shape": shape}
        return tensors | ({} if self.theta is None else {"theta": self.theta})


class FlowDistribution(TorchDistribution):
    """loc + scale ⊙ T(ε; context), of event shape ``[D]``.

    The density of the last draw is remembered, so that a guide never inverts the flow.

    Args:
        flow: T.
        loc, scale: ``[…, D]``.
        context: ``[…, R]``.
        changed: False where T is left out, broadcastable to ``[…]``.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True
    support = constraints.real_vector

    def __init__(self, flow: ConditionalFlow, loc: Tensor, scale: Tensor, context: Tensor, changed: Tensor) -> None:
        self.flow, self.loc, self.scale, self.context, self.changed = flow, loc, scale, context, changed
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def transform(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The value ``[…, D]`` of standard normal noise, and its log-density ``[…]``."""
        v, log_det = self.flow(noise, self.context)
        return self.loc + self.scale * self._choose(v, noise), self._density(noise, log_det)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Reparameterised draws from torch's global generator."""
        shape = self._extended_shape(sample_shape)
        self._last = self.transform(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))
        return self._last[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, ``[…]``."""
        if self._last is not None and value is self._last[0]:
            return self._last[1]
        v = (value - self.loc) / self.scale
        noise, log_det = self.flow.inverse(v, self.context)
        return self._density(self._choose(noise, v), log_det)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same with another batch shape."""
        loc, scale, context = (p.expand(*batch_shape, p.shape[-1]) for p in (self.loc, self.scale, self.context))
        return FlowDistribution(self.flow, loc, scale, context, self.changed.expand(batch_shape))

    def _choose(self, flowed: Tensor, plain: Tensor) -> Tensor:
        return torch.where(self.changed.unsqueeze(-1), flowed, plain)

    def _density(self, noise: Tensor, log_det: Tensor) -> Tensor:
        standard = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        return standard - torch.where(self.changed, log_det, 0.0) - self.scale.log().sum(-1)
