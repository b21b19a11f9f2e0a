"""An equally weighted mixture of posteriors, each under a prior of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import UnsupportedError
from bayesmeta.models.deep_kernel import DeepKernelModel
from bayesmeta.models.hyper_prior import set_parameters
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.posteriors.base import Draws, TaskPosterior
from bayesmeta.posteriors.gp import GPPosterior
from bayesmeta.posteriors.samples import ParticlesPosterior
from bayesmeta.protocols import TargetKind

_NO_SHAPE = torch.Size()


class ListMixture(TorchDistribution):
    """(1/K) Σ_k p_k of distributions of any kind, all with one batch and event shape.

    Args:
        components: at least one.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, components: Sequence[Any]) -> None:
        self.components = list(components)
        first = self.components[0]
        super().__init__(first.batch_shape, first.event_shape, validate_args=False)

    def _all(self, function: Callable[[Any], Tensor]) -> Tensor:
        return torch.stack([function(component) for component in self.components])

    @property
    def support(self) -> Any:
        """That of the components."""
        return self.components[0].support

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the mixture."""
        each = self._all(lambda component: component.log_prob(value))
        return each.logsumexp(0) - torch.tensor(float(len(each)), dtype=each.dtype).log()

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture."""
        return self._all(lambda component: component.mean).mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture: within the components and between them."""
        within = self._all(lambda component: component.variance).mean(0)
        return within + self._all(lambda component: component.mean).var(0, correction=0)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function of the mixture."""
        return self._all(lambda component: component.cdf(value)).mean(0)

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Draws from torch's global generator; each batch element chooses its component."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            values = self._all(lambda component: component.sample(shape))
            lead = values.shape[1 : values.dim() - len(self.event_shape)]
            pick = torch.randint(len(values), lead, device=values.device)
            pick = pick.reshape(1, *lead, *([1] * len(self.event_shape))).expand(1, *values.shape[1:])
            return values.gather(0, pick).squeeze(0)


class PriorMixturePosterior(TaskPosterior):
    """(1/K) Σ_k q(φ | S, θ_k): K priors, equally weighted, and the posterior under each.

    The priors keep equal weights, as PACOH's predictions have them: the support does not choose among them. Draw i is
    of prior i mod K. φ means what it means under its own prior (for a GP: whitened function values), so there is no
    one density of u.

    Args:
        program: of all priors; its own parameters are not used, but for those that are in no prior.
        support: what was conditioned on.
        theta: the priors' parameters, ``[K, E]``.
        **state: what the posterior under each is made of, stacked, ``[K, …]``: loc, root and log_evidence of a GP
            posterior; u ``[K, M, tasks, D]`` of particles.
    """

    def __init__(self, program: TaskProgram, support: Observations, theta: Tensor, **state: Tensor) -> None:
        super().__init__(program, support)
        self.theta, self._state = theta, state
        kind: Any = GPPosterior if isinstance(program, DeepKernelModel) else ParticlesPosterior
        self.components: list[Any] = [
            kind(set_parameters(program, one), support, **{name: value[k] for name, value in state.items()})
            for k, one in enumerate(theta)
        ]
        each = self.components[0].num_draws
        self.num_draws = None if each is None else len(theta) * each

    def __getattr__(self, name: str) -> Any:
        """The stacked tensors by name, such as ``loc`` ``[K, tasks, N]``."""
        if name != "_state" and name in self.__dict__.get("_state", {}):
            return self._state[name]
        raise AttributeError(name)

    @property
    def covariance(self) -> Tensor:
        """Of a GP: posterior covariance of u under each prior, ``[K, tasks, N, N]``."""
        return torch.stack([component.covariance for component in self.components])

    @property
    def target_kind(self) -> TargetKind:
        """That of the likelihood."""
        return self.components[0].target_kind

    # -- draws --------------------------------------------------------------------------------------------------

    def _of(self, k: int, draws: Draws) -> Draws:
        return Draws(draws.u[k :: len(self.components)])

    def _interleave(self, parts: Sequence[Tensor], count: int) -> Tensor:
        """Rows of the components in turn, the first ``count`` of them."""
        out = parts[0].new_empty(count, *parts[0].shape[1:])
        for k, part in enumerate(parts):
            rows = out[k :: len(parts)]
            rows.copy_(part[: len(rows)])
        return out

    def _each(self, draws: Draws, function: Callable[[Any, Draws], Tensor]) -> Tensor:
        """A function of each component and its own draws, put back in order."""
        parts = [function(c, self._of(k, draws)) for k, c in enumerate(self.components) if k < draws.num_samples]
        return self._interleave(parts, draws.num_samples)

    def _drawn(self, num_samples: int, function: Callable[[Any, int], Draws]) -> Draws:
        share = -(-num_samples // len(self.components))
        return Draws(self._interleave([function(c, share).u for c in self.components], num_samples))

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Draws of the components in turn."""
        generator = as_generator(generator, self.theta.device, "draws")
        return self._drawn(num_samples, lambda component, share: component.draws(share, generator))

    def prior_draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Draws from the priors in turn."""
        generator = as_generator(generator, self.theta.device, "prior")
        return self._drawn(num_samples, lambda component, share: component.prior_draws(share, generator))

    def named(self, draws: Draws) -> dict[str, Tensor]:
        """Named values of draws, each ``[n, tasks, …]``, each under its own prior."""
        used = self.components[: draws.num_samples]
        parts = [component.named(self._of(k, draws)) for k, component in enumerate(used)]
        return {name: self._interleave([part[name] for part in parts], draws.num_samples) for name in parts[0]}

    # -- densities ----------------------------------------------------------------------------------------------

    def log_prob(self, u: Tensor) -> Tensor:
        """Refused: u means something else under each prior.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "A mixture over priors has no one density of u, which means something else under each prior; "
            "posterior.components has the posteriors, and predictive(x) is a density of y."
        )

    def u_distribution(self) -> Any:
        """Refused, as :meth:`log_prob`.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "A mixture over priors is no Pyro guide: there is no one program that it could be a guide of. Read it with "
            "draws, sample and predictive."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refused, as :meth:`u_distribution`."""
        return self.u_distribution()

    def log_prior(self, draws: Draws, *, jacobian: bool = True) -> Tensor:
        """log p(u) of each draw under its own prior, ``[n, tasks]``."""
        return self._each(draws, lambda component, part: component.log_prior(part, jacobian=jacobian))

    def log_likelihood(
        self,
        observations: Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """log p(y | x, φ) of each observation, ``[n, tasks, shots]``, each draw under its own prior's likelihood."""
        self._same_tasks(observations)
        draws = self.draws(num_samples, generator) if draws is None else draws
        return self._each(draws, lambda component, part: component.log_likelihood(observations, draws=part))

    def log_joint(self, draws: Draws) -> Tensor:
        """log p(support, u) of each draw under its own prior, ``[n, tasks]``."""
        return self._each(draws, lambda component, part: component.log_joint(part))

    # -- predictions --------------------------------------------------------------------------------------------

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The mixture of the components' predictives; of one prior, that predictive itself.

        Args:
            x: inputs ``[tasks, shots, features]``.
            joint: one distribution over a task's shots, batch ``[tasks]``.
        """
        each = [component.predictive(x, joint=joint) for component in self.components]
        return each[0] if len(each) == 1 else ListMixture(each)

    def predict(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Draw y at all points of x together, ``[n, tasks, shots]``, each draw under its own prior."""
        observations = self._as_observations(x)
        generator = as_generator(generator, observations.device, "predictions")
        draws = self.draws(num_samples, generator) if draws is None else draws
        return self._each(
            draws, lambda component, part: component.predict(observations, draws=part, generator=generator)
        )

    def class_probabilities(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Probability of each class, averaged over draws, each under its own prior's likelihood."""
        observations = self._as_observations(x)
        draws = self.draws(num_samples, generator) if draws is None else draws
        parts = [self._of(k, draws) for k in range(min(len(self.components), draws.num_samples))]
        each = [
            part.num_samples * component.class_probabilities(observations, draws=part)
            for component, part in zip(self.components, parts)
        ]
        return torch.stack(each).sum(0) / draws.num_samples

    def state(self) -> dict[str, Tensor]:
        """The priors' parameters, and what the posteriors are made of."""
        return {"theta": self.theta} | self._state
