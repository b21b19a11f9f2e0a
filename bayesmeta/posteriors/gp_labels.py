"""The posterior over the functions of a task's classes, regressed on as ±1, and its probabilities of classes."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import NoClosedFormError
from bayesmeta.models.deep_kernel import DeepKernelModel, cholesky
from bayesmeta.models.labels import log_label_probability, outputs, to_labels
from bayesmeta.models.program import TaskProgram
from bayesmeta.models.targets import class_probabilities
from bayesmeta.ops.gaussian import fit_linear_gaussian, lower_root
from bayesmeta.ops.random import Seed, as_generator, forked_rng, normal_like
from bayesmeta.posteriors.base import Draws
from bayesmeta.posteriors.gp import GPPosterior, symmetric, variances
from bayesmeta.protocols import TargetKind


class GPLabelsPosterior(GPPosterior):
    """Posterior of a :class:`~bayesmeta.DeepKernelModel` of labels: exact as the regression on ±1 that it is.

    Each class k has a function f_k with posterior mean m_k(x), and all the same variance v(x); σ² is the noise of the
    targets. Probabilities of classes come from the model's link. Both links rank classes by m_k, as the paper does:

    - ``"probit"``: the label is the class of the largest noisy target, p_k = P(f_k + ε_k is the largest), f integrated
      out: ∫ φ(t) Π_{j≠k} Φ(t + (m_k − m_j) / s) dt with s² = v + σ². For a Bernoulli Φ(m / s). Away from the support
      it goes to the frequencies that the prior has. Given draws of the functions, :meth:`log_likelihood` is of the
      same model, so that its mean density is :meth:`predictive`.
    - ``"sigmoid"``: the paper's, p_k = σ(m_k) / Σ_j σ(m_j), for a Bernoulli σ(m). It knows nothing of the variance, and
      with means within ±1 hardly a probability of two classes exceeds 0.73. Since it is about the mean function alone,
      the posterior counts as a point: every draw is the mean.

    Draws are whitened function values at the support, ``[n, tasks, columns · support]``, one class after the other
    (a Bernoulli has one column, of the label 1); :meth:`named` gives ``f`` itself.

    Args:
        program: a :class:`DeepKernelModel` with a Categorical or Bernoulli likelihood.
        support: what was conditioned on.
        loc: posterior mean of u, ``[tasks, columns · N]`` for N support points.
        root: R with posterior covariance of u R Rᵀ for each class, ``[tasks, N, N]``.
        log_evidence: log-density of the support's ±1 targets, the sum over columns, ``[tasks]``.
    """

    def __init__(
        self, program: TaskProgram, support: Observations, loc: Tensor, root: Tensor, log_evidence: Tensor
    ) -> None:
        super().__init__(program, support, loc, root, log_evidence)
        assert self.model.link is not None
        self.link = self.model.link
        self.is_point = self.link == "sigmoid"

    @classmethod
    def condition(cls, program: DeepKernelModel, support: Observations) -> GPLabelsPosterior:
        """The posterior given a support.

        Raises:
            DataError: for a covariance that is not positive definite, naming tasks.
        """
        keep = support.full_mask()
        root = cholesky(program.kept_covariance(program.points(support), keep, 0.0))
        residual = program.residual(support)
        eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
        noise = program.noise_variance
        # the covariance is that of every column, so one factorisation serves all
        fit = fit_linear_gaussian(root, residual[..., 0], torch.zeros_like(residual[..., 0]), eye, noise.sqrt(), keep)
        loc = fit.root @ (fit.root.mT @ (root.mT @ residual)) / noise
        evidence = program.log_evidence(support)
        return cls(program, support, loc.mT.flatten(1).to(evidence), fit.root.to(evidence), evidence)

    @property
    def target_kind(self) -> TargetKind:
        """Always classes."""
        return "class"

    # -- draws and densities of u -------------------------------------------------------------------------------

    def _columns(self, u: Tensor) -> Tensor:
        """Each class's part of u, ``[…, tasks, columns, N]``."""
        return u.reshape(*u.shape[:-1], self.model.columns, self.root.shape[-1])

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws of the whitened function values at the support; with the link sigmoid, their mean."""
        if self.is_point:
            return Draws(self.loc.expand(num_samples, -1, -1))
        generator = as_generator(generator, self.loc.device, "draws")
        noise = self._columns(normal_like(self.loc, (num_samples, *self.loc.shape), generator))
        return Draws(self.loc + (noise @ self.root.mT).flatten(-2))

    def prior_draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Draws of the same from the prior; with the link sigmoid, its mean."""
        if self.is_point:
            return Draws(torch.zeros_like(self.loc).expand(num_samples, -1, -1))
        return super().prior_draws(num_samples, generator)

    def log_prob(self, u: Tensor) -> Tensor:
        """log-density of u given the support's ±1 targets, ``[…, tasks]``, with either link."""
        normal = dist.MultivariateNormal(self._columns(self.loc), scale_tril=lower_root(self.root).unsqueeze(1))
        return normal.log_prob(self._columns(u)).sum(-1)

    def named(self, draws: Draws) -> dict[str, Tensor]:
        """``f``: each class's function at the support's points, ``[n, tasks, N, columns]``; its mean at padding.

        For a Bernoulli ``[n, tasks, N]``.
        """
        with torch.no_grad():
            keep = self.support.full_mask()
            root = cholesky(self.model.kept_covariance(self.model.points(self.support), keep, 0.0))
            f = (root @ self._columns(draws.u).double().mT).masked_fill(~keep.unsqueeze(-1), 0.0)
            f = (f + self.model.mean.double()).to(draws.u)
            return {"f": f.squeeze(-1) if self.model.columns == 1 else f}

    # -- predictions --------------------------------------------------------------------------------------------

    def _mean(self, half: Tensor, u: Tensor) -> Tensor:
        """E[f(x) | u], float64 ``[…, tasks, M, columns]``."""
        return self.model.mean.double() + half @ self._columns(u).double().mT

    def _moments(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """Mean ``[tasks, M, columns]`` and variance ``[tasks, M]`` of the functions, float64."""
        half, rest = self._half(observations)
        variance = variances(rest) + (half @ self.root.double()).square().sum(-1)
        return self._mean(half, self.loc), variance

    def _of_classes(self, mean: Tensor, variance: Tensor) -> Any:
        """The likelihood whose probabilities are the link's."""
        logits = outputs(self.model.likelihood, mean, variance, self.link)
        return self.model.likelihood.distribution(logits.to(self.loc))

    def latent(self, x: Tensor | Observations) -> Any:
        """Exact posterior of the functions, without the targets' noise.

        Args:
            x: inputs ``[tasks, shots, features]``.

        Returns:
            Normal with batch ``[tasks, shots, columns]``: for a Categorical one column for each class.
        """
        with torch.no_grad():
            mean, variance = self._moments(self._as_observations(x))
            scale = variance.sqrt().unsqueeze(-1).expand(mean.shape)
            return dist.Normal(mean.to(self.loc), scale.to(self.loc), validate_args=False)

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """Probabilities of the classes, the functions integrated out as the link says.

        Args:
            x: inputs ``[tasks, shots, features]``.
            joint: one distribution over all labels of a task: with the link sigmoid they are independent.

        Returns:
            Categorical or Bernoulli, batch ``[tasks, shots]``; joint: batch ``[tasks]``, event ``[shots]``.

        Raises:
            NoClosedFormError: for the joint with the link probit, where labels depend on one another through the
                functions; :meth:`predict` draws them together.
        """
        if joint and not self.is_point:
            raise NoClosedFormError(
                "Labels of several points depend on one another through the functions, and their joint probability has "
                "no closed form. Draw them together with predict(x, num_samples), or average log_likelihood over draws."
            )
        observations = self._as_observations(x)
        with torch.no_grad():
            mean, variance = self._moments(observations)
            fn = self._of_classes(mean, variance + self.model.noise_variance)
        return fn.to_event(1) if joint else fn

    def class_probabilities(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Probability of each class, ``[tasks, shots, classes]``: exactly, or the mean over draws that are given."""
        if draws is None:
            return class_probabilities(self.predictive(x))
        observations = self._as_observations(x)
        with torch.no_grad():
            half, rest = self._half(observations)
            variance = variances(rest) + self.model.noise_variance
            parts = [class_probabilities(self._of_classes(self._mean(half, d.u), variance)) for d in draws.slices()]
            return torch.cat(parts).mean(0)

    def _functions(
        self, observations: Observations, draws: Draws, noise: Tensor | float, generator: torch.Generator
    ) -> Tensor:
        """Draws of the functions at all points together given u, and noise, float64 ``[n, tasks, M, columns]``."""
        half, rest = self._half(observations)
        rest = symmetric(rest)
        prior = (rest + half @ half.mT).diagonal(dim1=-2, dim2=-1)
        root = cholesky(rest + torch.diag_embed(self.model.jitter(prior) + noise))
        mean = self._mean(half, draws.u)
        return mean + root @ normal_like(mean, mean.shape, generator)

    def predict(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Draw the labels of all points of x together, ``[n, tasks, shots]``."""
        observations = self._as_observations(x)
        generator = as_generator(generator, observations.device, "predictions")
        draws = self.draws(num_samples, generator) if draws is None else draws
        with torch.no_grad():
            if self.is_point:
                half, rest = self._half(observations)
                fn = self._of_classes(self._mean(half, draws.u), rest.diagonal(dim1=-2, dim2=-1))
                with forked_rng(generator):
                    return fn.sample()
            noisy = self._functions(observations, draws, self.model.noise_variance, generator)
            return to_labels(self.model.likelihood, noisy.to(self.loc))

    def log_likelihood(
        self,
        observations: Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """log p(y | f(x)) of each label, ``[n, tasks, shots]``; 0 where masked.

        At the support's points f is that of the draw, up to the jitter. Elsewhere f given u is still uncertain, and is
        drawn at all points together: the mean over draws is :meth:`predictive`, and that of the product over a task's
        points the joint probability of its labels. Without a ``generator`` that noise depends on the points alone.
        """
        self._same_tasks(observations)
        assert observations.y is not None
        keep = observations.full_mask()
        y = observations.y.masked_fill(~keep, 0).to(self.loc)
        with torch.no_grad():
            if generator is None:  # other points, other noise: points asked for in slices must not share it
                generator = int(self.model.points(observations).contiguous().view(torch.int64).sum())
            rng = as_generator(generator, observations.device, "log_likelihood")
            draws = self.draws(num_samples, rng) if draws is None else draws
            if self.is_point:
                mean = self._mean(self._half(observations)[0], draws.u)
            else:
                mean = self._functions(observations, draws, 0.0, rng)
            value = log_label_probability(self.model.likelihood, mean, self.model.noise_variance, self.link, y)
        return value.masked_fill(~keep, 0.0).to(self.loc)

    def log_joint(self, draws: Draws) -> Tensor:
        """log-density of the support's ±1 targets and u, of which this is the exact posterior, ``[n, tasks]``."""
        with torch.no_grad():
            keep = self.support.full_mask()
            f = self.named(draws)["f"].double().reshape(*draws.u.shape[:2], -1, self.model.columns)
            miss = self.model.residual(self.support) - (f - self.model.mean.double())
            each = dist.Normal(0.0, self.model.noise_variance.sqrt()).log_prob(miss).sum(-1).masked_fill(~keep, 0.0)
            return each.sum(-1).to(self.loc) + self.log_prior(draws)
