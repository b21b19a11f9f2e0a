"""The exact posterior over the weights of a last layer."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.data import Observations, union
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.gaussian import fit_linear_gaussian, lower_root
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.posteriors.base import Draws, TaskPosterior


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

    def update(self, observations: Observations) -> ExactLinearPosterior:
        """Add observations of the same tasks: the posterior that all of them together would have given.

        Online, by a factorisation of the size of the new observations; θ is that of now.

        Args:
            observations: ``[tasks, shots, …]`` with targets.

        Raises:
            ShapeError: for other tasks.
            DataError: for observations without targets, or that are not finite.
        """
        y = self._to_add(observations)
        program, mask = self.program, observations.mask
        assert isinstance(program, NeuralTaskModel)
        if mask is not None and y.dim() == 3:
            mask = mask.repeat_interleave(y.shape[-1], -1)
        with torch.no_grad():
            design, noise = program.last_layer_design(observations.x), program.noise_rows(observations.shots)
            fit = fit_linear_gaussian(design, y.flatten(1), self.loc, self.root, noise, mask, form="covariance")
        evidence = self.log_evidence + fit.log_evidence
        return ExactLinearPosterior(program, union(self.support, observations), fit.mean, fit.root, evidence)

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
            noise = program.noise_rows(observations.shots)
            if joint:
                eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device).expand(*half.shape[:-1], -1)
                return dist.MultivariateNormal(
                    mean, scale_tril=lower_root(torch.cat([half, noise.unsqueeze(-1) * eye], -1))
                )
            scale = (half.square().sum(-1) + noise.square()).sqrt()
            outputs = mean.shape[-1] // max(observations.shots, 1)
            if outputs <= 1:
                return dist.Normal(mean, scale)
            shape = (*mean.shape[:-1], observations.shots, outputs)
            return dist.Normal(mean.reshape(shape), scale.reshape(shape)).to_event(1)

    def state(self) -> dict[str, Tensor]:
        """loc, root and log_evidence."""
        return {"loc": self.loc, "root": self.root, "log_evidence": self.log_evidence}
