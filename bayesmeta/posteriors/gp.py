"""The exact posterior over a task's function under a Gaussian process."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import UnsupportedError
from bayesmeta.models.deep_kernel import DeepKernelModel, cholesky
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.gaussian import fit_linear_gaussian, lower_root
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.posteriors.base import Draws, TaskPosterior
from bayesmeta.protocols import TargetKind


class GPPosterior(TaskPosterior):
    """Exact posterior of a :class:`~bayesmeta.DeepKernelModel`, predictive and evidence in closed form.

    φ is a function, so there is no finite φ; what stands in for it are the function's values at the support's points,
    given which the support says no more of the rest. Draws are whitened, u = L⁻¹ (f − mean) with L the Cholesky factor
    of the prior covariance at the support: ``[n, tasks, support]``; :meth:`named` gives f itself. At padding u is
    standard normal, f the mean.

    Args:
        program: a :class:`DeepKernelModel`.
        support: what was conditioned on.
        loc: posterior mean of u, ``[tasks, N]`` for N support points.
        root: R with posterior covariance of u R Rᵀ, ``[tasks, N, N]``.
        log_evidence: log p(y_S | x_S, θ), ``[tasks]``.
    """

    def __init__(
        self, program: TaskProgram, support: Observations, loc: Tensor, root: Tensor, log_evidence: Tensor
    ) -> None:
        super().__init__(program, support)
        assert isinstance(program, DeepKernelModel)
        self.model = program
        self.loc, self.root, self.log_evidence = loc, root, log_evidence

    @classmethod
    def condition(cls, program: DeepKernelModel, support: Observations) -> GPPosterior:
        """The posterior given a support.

        Raises:
            DataError: for a covariance that is not positive definite, naming tasks.
        """
        keep = support.full_mask()
        root = cholesky(program.kept_covariance(program.points(support), keep, 0.0))
        residual = program.residual(support).squeeze(-1)
        eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
        noise = program.noise_variance.sqrt()
        fit = fit_linear_gaussian(root, residual, torch.zeros_like(residual), eye, noise, keep)
        return cls(program, support, *(part.to(support.x.dtype) for part in fit))

    @property
    def covariance(self) -> Tensor:
        """Posterior covariance of u, ``[tasks, N, N]``."""
        return self.root @ self.root.mT

    @property
    def target_kind(self) -> TargetKind:
        """Always real numbers."""
        return "real"

    # -- draws and densities of u -------------------------------------------------------------------------------

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws of the whitened function values at the support."""
        generator = as_generator(generator, self.loc.device, "draws")
        noise = normal_like(self.loc, (num_samples, *self.loc.shape), generator)
        return Draws(self.loc + (self.root @ noise.unsqueeze(-1)).squeeze(-1))

    def prior_draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Draws of the same from the prior."""
        generator = as_generator(generator, self.loc.device, "prior")
        return Draws(normal_like(self.loc, (num_samples, *self.loc.shape), generator))

    def log_prob(self, u: Tensor) -> Tensor:
        """log p(u | S), ``[…, tasks]``."""
        return dist.MultivariateNormal(self.loc, scale_tril=lower_root(self.root)).log_prob(u)

    def log_prior(self, draws: Draws, *, jacobian: bool = True) -> Tensor:
        """log p(u), standard normal, ``[n, tasks]``."""
        return dist.Normal(0.0, 1.0).log_prob(draws.u).sum(-1)

    def u_distribution(self) -> Any:
        """Refused: the Pyro program has no latent site that it could be a guide of.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "The program of a GP has its function integrated out: there is no latent site to guide. method.guide "
            "samples nothing, and its ELBO is the exact evidence."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refused, as :meth:`u_distribution`."""
        return self.u_distribution()

    def named(self, draws: Draws) -> dict[str, Tensor]:
        """``f``: the function at the support's points, without noise, ``[n, tasks, N]``; its mean at padding."""
        with torch.no_grad():
            keep = self.support.full_mask()
            root = cholesky(self.model.kept_covariance(self.model.points(self.support), keep, 0.0))
            root = root.masked_fill(~keep.unsqueeze(-1), 0.0)
            return {"f": (self._mean(root, draws.u) + self._shift(self.support)).to(draws.u)}

    # -- predictions --------------------------------------------------------------------------------------------

    def _half(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """A with E[f(x) | u] = mean + A u, ``[tasks, M, N]``, and the covariance of f(x) given u, ``[tasks, M, M]``."""
        model, keep = self.model, self.support.full_mask()
        points, new = model.points(self.support), model.points(observations)
        root = cholesky(model.kept_covariance(points, keep, 0.0))
        cross = model.covariance(points, new).masked_fill(~keep.unsqueeze(-1), 0.0)
        half = torch.linalg.solve_triangular(root, cross, upper=False).mT
        return half, model.covariance(new) - half @ half.mT

    def _shift(self, observations: Observations) -> Tensor | float:
        """What a mean network adds at the inputs, float64 ``[tasks, M]``; else 0."""
        return 0.0 if self.model.mean_network is None else self.model.mean_shift(observations)

    def _mean(self, half: Tensor, u: Tensor) -> Tensor:
        """E[f(x) | u] but for a mean network's share, float64 ``[…, tasks, M]``."""
        return self.model.mean.double() + (half @ u.double().unsqueeze(-1)).squeeze(-1)

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """Exact predictive of y, noise included (Rasmussen & Williams 2006, eqs. 2.25, 2.26).

        Args:
            x: inputs ``[tasks, shots, features]``.
            joint: a multivariate normal over a task's shots, batch ``[tasks]``, event ``[shots]``.

        Returns:
            Normal with batch ``[tasks, shots]``, or the joint.
        """
        observations = self._as_observations(x)
        with torch.no_grad():
            half, rest = self._half(observations)
            mean = self._mean(half, self.loc) + self._shift(observations)
            spread, noise = half @ self.root.double(), self.model.noise_variance
            if joint:
                covariance = rest + spread @ spread.mT
                root = cholesky(symmetric(covariance) + torch.diag_embed(noise.expand(mean.shape)))
                return dist.MultivariateNormal(mean.to(self.loc), scale_tril=root.to(self.loc))
            variance = variances(rest) + spread.square().sum(-1) + noise
            return dist.Normal(mean.to(self.loc), variance.sqrt().to(self.loc))

    def predict(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Draw y at all points of x together, ``[n, tasks, shots]``: each draw is one function, with noise."""
        observations = self._as_observations(x)
        generator = as_generator(generator, observations.device, "predictions")
        draws = self.draws(num_samples, generator) if draws is None else draws
        with torch.no_grad():
            half, rest = self._half(observations)
            noise = self.model.noise_variance.expand(rest.shape[:-1])
            root = cholesky(symmetric(rest) + torch.diag_embed(noise))
            mean = self._mean(half, draws.u) + self._shift(observations)
            normal = normal_like(mean, mean.shape, generator)
            return (mean + (root @ normal.unsqueeze(-1)).squeeze(-1)).to(self.loc)

    def log_likelihood(
        self,
        observations: Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """log p(y | x, u) of each observation by itself, ``[n, tasks, shots]``; 0 where masked.

        At the support's points that is the noise around the drawn f, up to the jitter. Elsewhere f(x) given u is still
        uncertain: the mean over draws is the predictive density of each point, but points are not independent given u,
        so that a sum over them is no joint density; :meth:`predictive` has that.
        """
        self._same_tasks(observations)
        self.model.check_targets(observations)
        assert observations.y is not None
        draws = self.draws(num_samples, generator) if draws is None else draws
        with torch.no_grad():
            half, rest = self._half(observations)
            mean = self._mean(half, draws.u) + self._shift(observations)
            variance = variances(rest) + self.model.noise_variance
            keep = observations.full_mask()
            y = torch.where(keep, observations.y.double(), 0.0)
            value = dist.Normal(mean, variance.sqrt()).log_prob(y).masked_fill(~keep, 0.0)
        return value.to(self.loc)

    def log_joint(self, draws: Draws) -> Tensor:
        """log p(support, u | θ), ``[n, tasks]``."""
        return self.log_likelihood(self.support, draws=draws).sum(-1) + self.log_prior(draws)

    def state(self) -> dict[str, Tensor]:
        """loc, root and log_evidence."""
        return {"loc": self.loc, "root": self.root, "log_evidence": self.log_evidence}


def variances(covariance: Tensor) -> Tensor:
    """The diagonal, not negative; ``[…, M]``."""
    return covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0.0)


def symmetric(covariance: Tensor) -> Tensor:
    """Without what rounding did to one triangle and not to the other."""
    return (covariance + covariance.mT) / 2
