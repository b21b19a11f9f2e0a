"""The linear-Gaussian hierarchy, whose exact posterior, predictive and evidence are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, ShapeError
from bayesmeta.ops.random import Seed, as_generator


class LinearGaussian:
    """y = x · φ + noise with φ ~ N(mean, covariance): the conjugate hierarchy, with its oracle.

    The first feature is the constant 1, the others are N(0, 1). The oracle conditions the joint Gaussian of φ and y
    (covariance form), so that it shares no algebra with the methods that it judges.

    Args:
        mean: mean of φ, ``[D]``.
        covariance: covariance of φ, ``[D, D]``.
        noise: standard deviation of the noise on y.
        num_tasks: size of the population; None: endless.

    Raises:
        ShapeError: when mean and covariance do not fit.
        DataError: when the covariance is not positive definite or the noise not positive.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, noise: float, *, num_tasks: int | None = None) -> None:
        size = mean.shape[-1]
        if mean.dim() != 1 or covariance.shape != (size, size):
            raise ShapeError(
                f"mean has shape {list(mean.shape)} and covariance {list(covariance.shape)}; expected [D] and [D, D]."
            )
        root, info = torch.linalg.cholesky_ex(covariance)
        if int(info) or not noise > 0:
            raise DataError(f"covariance must be positive definite and noise positive; got noise={noise}.")
        self.mean, self.covariance, self.noise = mean, covariance, noise
        self._root = root
        self.num_tasks = num_tasks

    def sample(self, num_tasks: int, *, support: int, query: int, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch: x ``[num_tasks, shots, D]``, y ``[num_tasks, shots]``, in the dtype of ``mean``."""
        generator = as_generator(generator, stream="tasks")
        like: dict[str, Any] = {"generator": generator, "dtype": self.mean.dtype, "device": generator.device}
        size, shots = self.mean.numel(), support + query
        root, mean = self._root.to(generator.device), self.mean.to(generator.device)
        phi = mean + torch.randn(num_tasks, size, **like) @ root.mT
        x = torch.randn(num_tasks, shots, size, **like)
        x[..., 0] = 1.0
        y = (x @ phi.unsqueeze(-1)).squeeze(-1) + self.noise * torch.randn(num_tasks, shots, **like)
        return TaskBatch(
            Observations(x[:, :support], y[:, :support]),
            Observations(x[:, support:], y[:, support:]),
            population=self.num_tasks,
        )

    # -- oracle -------------------------------------------------------------------------------------------------

    def posterior(self, support: Observations) -> MultivariateNormal:
        """Exact posterior of φ, batch shape ``[tasks]``. Masked observations do not count."""
        x, residual, marginal = self._marginal(support)
        gain = torch.linalg.solve(marginal, x @ self.covariance).mT
        mean = self.mean + (gain @ residual.unsqueeze(-1)).squeeze(-1)
        covariance = self.covariance - gain @ x @ self.covariance
        return MultivariateNormal(mean, (covariance + covariance.mT) / 2)

    def predictive(self, support: Observations, x: Tensor) -> MultivariateNormal:
        """Exact joint predictive of y at x ``[tasks, shots, D]``, noise included."""
        posterior = self.posterior(support)
        mean = (x @ posterior.mean.unsqueeze(-1)).squeeze(-1)
        noise = self.noise**2 * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
        return MultivariateNormal(mean, x @ posterior.covariance_matrix @ x.mT + noise)

    def log_evidence(self, observations: Observations) -> Tensor:
        """log p(y | x) of each task, ``[tasks]``. Every observation must be real."""
        if observations.mask is not None and not bool(observations.mask.all()):
            raise DataError("The oracle's evidence is for tasks without padding; drop the padded observations.")
        _, residual, marginal = self._marginal(observations)
        return MultivariateNormal(torch.zeros_like(residual), marginal).log_prob(residual)

    def _marginal(self, observations: Observations) -> tuple[Tensor, Tensor, Tensor]:
        assert observations.y is not None
        keep = observations.full_mask().unsqueeze(-1)
        x = observations.x * keep
        residual = (observations.y - observations.x @ self.mean) * keep.squeeze(-1)
        eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
        return x, residual, x @ self.covariance @ x.mT + self.noise**2 * eye
