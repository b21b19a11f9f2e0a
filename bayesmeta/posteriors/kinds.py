"""The kinds of posterior: a point, a diagonal Gaussian, exact linear-Gaussian weights, samples."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import NoClosedFormError, UnsupportedError
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.gaussian import lower_root
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.posteriors.base import Draws, TaskPosterior


class _Components(TaskPosterior):
    """A posterior conditional on each of G draws of the global sites; G = 1 where θ is a point.

    Draw i belongs to component i mod G, so that draws of φ and θ stay paired.
    """

    def __init__(self, program: TaskProgram, support: Observations, theta: Tensor | None = None) -> None:
        super().__init__(program, support)
        self.theta = theta

    def _component(self, num_samples: int, count: int) -> Tensor:
        return torch.arange(num_samples, device=self.support.device) % count

    def _theta_at(self, component: Tensor) -> Tensor | None:
        return None if self.theta is None else self.theta[component]

    def _theta_draws(self, num_samples: int, generator: torch.Generator) -> Tensor | None:
        return None if self.theta is None else self.theta[self._component(num_samples, len(self.theta))]

    def _current_theta(self) -> Tensor | None:
        return None if self.theta is None else self._components(self.theta)

    def _components(self, tensor: Tensor) -> Tensor:
        """As a guide: the one component, or all on the left when ``method.guide`` has paired them with θ's sites."""
        if tensor.shape[0] == 1:
            return tensor[0]
        if not self.paired:
            raise UnsupportedError(
                f"This posterior holds {tensor.shape[0]} draws of the global sites; as a Pyro guide it needs one. "
                "Use method.guide, which draws the global sites itself."
            )
        return tensor


class DeltaPosterior(_Components):
    """A point estimate: every draw of φ is the same.

    Args:
        program: the model.
        support: what was adapted to.
        u: unconstrained φ, ``[G, tasks, D]``; G counts draws of global sites, 1 where θ is a point.
        theta: unconstrained global sites, ``[G, E]``.
    """

    is_point = True

    def __init__(self, program: TaskProgram, support: Observations, u: Tensor, theta: Tensor | None = None) -> None:
        super().__init__(program, support, theta)
        self.u = u

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Copies of the point."""
        component = self._component(num_samples, self.u.shape[0])
        return Draws(self.u[component], self._theta_at(component))

    def log_prob(self, u: Tensor) -> Tensor:
        """Refused: a point has no density.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "A point estimate has no density over φ. Use a method with one, such as ABML or BayesianLastLayer."
        )

    def u_distribution(self) -> Any:
        """Delta at u, batch shape ``[tasks, 1]``."""
        return dist.Delta(self._components(self.u).unsqueeze(-2), event_dim=1)

    def class_probabilities(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """As :meth:`TaskPosterior.class_probabilities`; without ``draws``, exact: from each point once."""
        draws = Draws(self.u, self.theta) if draws is None else draws
        return super().class_probabilities(x, num_samples, draws=draws, generator=generator)

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The likelihood at φ: batch shape ``[tasks, shots]``, or ``[tasks]`` with event ``[shots, …]`` when joint."""
        observations = self._as_observations(x)
        if self.u.shape[0] != 1:
            raise NoClosedFormError("With several draws of θ the predictive is a mixture; use predict for draws.")
        with torch.no_grad():
            theta = None if self.theta is None else self.theta[0]
            result = self.program.predictive(self.u[0], observations, theta)
            result = result.expand((observations.num_tasks, observations.shots))
        return result.to_event(1) if joint else result

    def state(self) -> dict[str, Tensor]:
        """u, and theta where there is one."""
        return {"u": self.u} | ({} if self.theta is None else {"theta": self.theta})


class NormalPosterior(_Components):
    """Diagonal Gaussian over u for each task.

    Args:
        program: the model.
        support: what was adapted to.
        loc, scale: mean and standard deviation, each ``[G, tasks, D]``; G counts draws of global sites.
        theta: unconstrained global sites, ``[G, E]``.
    """

    def __init__(
        self, program: TaskProgram, support: Observations, loc: Tensor, scale: Tensor, theta: Tensor | None = None
    ) -> None:
        super().__init__(program, support, theta)
        self.loc, self.scale = loc, scale

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws, the components in turn."""
        generator = as_generator(generator, self.loc.device, "draws")
        component = self._component(num_samples, self.loc.shape[0])
        shape = (num_samples, *self.loc.shape[1:])
        noise = normal_like(self.loc, shape, generator)
        return Draws(self.loc[component] + noise * self.scale[component], self._theta_at(component))

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u), a mixture over the components, ``[…, tasks]``."""
        normal = torch.distributions.Normal(self.loc, self.scale)
        each = normal.log_prob(u.unsqueeze(-3)).sum(-1)
        return each.logsumexp(-2) - torch.tensor(float(self.loc.shape[0])).log()

    def u_distribution(self) -> Any:
        """Independent Normals, batch shape ``[tasks, 1]``."""
        loc, scale = self._components(self.loc), self._components(self.scale)
        return dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1)

    def state(self) -> dict[str, Tensor]:
        """loc, scale, and theta where there is one."""
        return {"loc": self.loc, "scale": self.scale} | ({} if self.theta is None else {"theta": self.theta})


class ExactLinearPosterior(TaskPosterior):
    """Exact Gaussian posterior over the weights of a last layer, with the predictive in closed form.

    Args:
        program: a :class:`NeuralTaskModel` whose task parameters are its last Linear.
        support: what was conditioned on.
        loc: posterior mean, ``[tasks, D]``.
        root: R with posterior covariance R Rᵀ, ``[tasks, D, M]``, M ≥ D.
        log_evidence: log p(y_S | x_S, θ), ``[tasks]``.
    """

    def __init__(
        self,
        program: TaskProgram,
        support: Observations,
        loc: Tensor,
        root: Tensor,
        log_evidence: Tensor,
    ) -> None:
        super().__init__(program, support)
        assert isinstance(program, NeuralTaskModel)
        self.loc, self.root, self.log_evidence = loc, root, log_evidence

    @property
    def covariance(self) -> Tensor:
        """Posterior covariance of the weights, ``[tasks, D, D]``."""
        return self.root @ self.root.mT

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws of the weights."""
        generator = as_generator(generator, self.loc.device, "draws")
        shape = (num_samples, self.num_tasks, self.root.shape[-1])
        noise = normal_like(self.loc, shape, generator)
        return Draws(self.loc + (self.root @ noise.unsqueeze(-1)).squeeze(-1))

    def _weights(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=lower_root(self.root))

    def log_prob(self, u: Tensor) -> Tensor:
        """log p(φ | S), ``[…, tasks]``."""
        return self._weights().log_prob(u)

    def u_distribution(self) -> Any:
        """Multivariate normal, batch shape ``[tasks, 1]``."""
        return dist.MultivariateNormal(self.loc.unsqueeze(-2), scale_tril=lower_root(self.root).unsqueeze(-3))

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """Exact predictive of y, noise included.

        Args:
            x: inputs ``[tasks, shots, features]``.
            joint: for one output, a multivariate normal over a task's shots, batch ``[tasks]``, event ``[shots]``;
                for several outputs the event is shots × outputs, flattened.

        Returns:
            Normal with batch ``[tasks, shots]`` (event ``[outputs]`` for several outputs, marginally independent).
        """
        observations = self._as_observations(x)
        program = self.program
        assert isinstance(program, NeuralTaskModel)
        with torch.no_grad():
            design = program.last_layer_design(observations.x)
            mean = (design @ self.loc.unsqueeze(-1)).squeeze(-1)
            half = design @ self.root
            noise = program.noise_scale
            if joint:
                eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device).expand(*half.shape[:-1], -1)
                return dist.MultivariateNormal(mean, scale_tril=lower_root(torch.cat([half, noise * eye], -1)))
            scale = (half.square().sum(-1) + noise.square()).sqrt()
            outputs = mean.shape[-1] // max(observations.shots, 1)
            if outputs <= 1:
                return dist.Normal(mean, scale)
            shape = (*mean.shape[:-1], observations.shots, outputs)
            return dist.Normal(mean.reshape(shape), scale.reshape(shape)).to_event(1)

    def state(self) -> dict[str, Tensor]:
        """loc, root and log_evidence."""
        return {"loc": self.loc, "root": self.root, "log_evidence": self.log_evidence}


class SamplesPosterior(TaskPosterior):
    """Draws of φ (and θ), as MCMC or a user's own guide gives them.

    Args:
        program: the model.
        support: what was conditioned on.
        u: unconstrained draws, ``[n, tasks, D]``.
        theta: unconstrained global sites, ``[n, E]``.
    """

    def __init__(self, program: TaskProgram, support: Observations, u: Tensor, theta: Tensor | None = None) -> None:
        super().__init__(program, support)
        self.u, self.theta = u, theta

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """The draws themselves when all are asked for, else a random choice of them with replacement."""
        if num_samples == self.u.shape[0]:
            return Draws(self.u, self.theta)
        generator = as_generator(generator, self.u.device, "draws")
        pick = torch.randint(self.u.shape[0], (num_samples,), generator=generator, device=self.u.device)
        return Draws(self.u[pick], None if self.theta is None else self.theta[pick])

    def log_prob(self, u: Tensor) -> Tensor:
        """Refused: samples have no density.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("Samples have no density; fit a method with one, such as ABML, for log_prob.")

    def u_distribution(self) -> Any:
        """Refused: an ELBO or importance weight under samples, which have no density, would be wrong.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("Samples have no density, so they are no Pyro guide; read them with sample or draws.")

    def state(self) -> dict[str, Tensor]:
        """u, and theta where there is one."""
        return {"u": self.u} | ({} if self.theta is None else {"theta": self.theta})


KINDS: dict[str, type[TaskPosterior]] = {
    kind.__name__: kind for kind in (DeltaPosterior, NormalPosterior, ExactLinearPosterior, SamplesPosterior)
}
