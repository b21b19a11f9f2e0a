"""Exact posteriors of a last layer's weights and noise, as tensors: for each task, component and output.

Shapes: T tasks, K components, P outputs, F features, M columns of a root; ``n`` draws. Three kinds, by what is known of
the noise; each adds observations, draws, and gives densities and predictives.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.errors import DataError, NoClosedFormError
from bayesmeta.models.conjugate import ConjugateModel, lower_triangle, precision_root
from bayesmeta.ops.gaussian import Form, fit_linear_gaussian, fit_matrix_normal, lower_root
from bayesmeta.ops.random import normal_like


class Belief:
    """Base: of the weights ``loc`` ``[T, K, P, F]`` and a ``root`` of their covariance, and of the noise.

    Args:
        program: the model.
        tensors: the belief's tensors by name.
    """

    def __init__(self, program: ConjugateModel, **tensors: Tensor) -> None:
        self.program = program
        self.tensors = tensors

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def add(self, design: Tensor, y: Tensor, mask: Tensor | None, form: Form) -> tuple[Belief, Tensor]:
        """The belief after observations, and their log evidence for each component, ``[T, K]``.

        Args:
            design: features ``[T, K, N, F]``.
            y: ``[T, N, P]``.
            mask: ``[T, N]``.
            form: which way, see :mod:`bayesmeta.ops.gaussian`.
        """
        raise NotImplementedError

    def draw(self, component: Tensor, generator: torch.Generator) -> Tensor:
        """Unconstrained noise and weights of the components chosen ``[n, T]``: ``[n, T, …]``."""
        raise NotImplementedError

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density of unconstrained noise and weights under each component, ``[…, T, K]``."""
        raise NotImplementedError

    def predictive(self, design: Tensor) -> Any:
        """Of y at features ``[T, K, N, F]``: batch ``[K, T, N]``, event ``[P]`` if there are several outputs."""
        raise NotImplementedError

    def joint(self, design: Tensor) -> Any:
        """Of all y of a task: batch ``[K, T]``, event ``[N]``, or ``[N × P]`` for several outputs."""
        raise NotImplementedError

    def _chosen(self, tensor: Tensor, component: Tensor) -> Tensor:
        """Of ``[T, K, …]`` the components chosen, ``[n, T, …]``."""
        return tensor[torch.arange(tensor.shape[0], device=tensor.device), component]

    def _spread(self, design: Tensor) -> tuple[Tensor, Tensor]:
        """Predictive mean ``[T, K, N, P]``, and how unsure it is, ``[T, K, N, 1 or P]``: φ's share of the variance."""
        root = self.root if self.root.dim() == 5 else self.root.unsqueeze(2)
        half = (design.unsqueeze(2) @ root).square().sum(-1)
        return design @ self.loc.mT, half.mT

    def _left(self, tensor: Tensor) -> Tensor:
        """Components on the left, and a single output without a dimension of its own: ``[T, K, N, P]``."""
        tensor = tensor.transpose(0, 1)
        return tensor.squeeze(-1) if self.program.outputs == 1 else tensor

    def _gram(self, design: Tensor) -> Tensor:
        """Covariance of the functions at N inputs with unit noise added, ``[T, K, 1 or P, N, N]``, float64."""
        root = self.root if self.root.dim() == 5 else self.root.unsqueeze(2)
        half = (design.unsqueeze(2) @ root).double()
        return half @ half.mT


class GaussianBelief(Belief):
    """Noise of known scale: weights N(loc, root rootᵀ), root ``[T, K, P, F, M]``."""

    @classmethod
    def prior(cls, program: ConjugateModel, tasks: int) -> GaussianBelief:
        """Before any observation."""
        loc = program.loc.expand(tasks, -1, -1, -1)
        return cls(program, loc=loc, root=torch.diag_embed(program.log_scale.exp()).expand(*loc.shape, -1))

    def _noise(self) -> Tensor:
        return self.program.likelihood.scale.expand(self.program.outputs)

    def add(self, design: Tensor, y: Tensor, mask: Tensor | None, form: Form) -> tuple[Belief, Tensor]:
        """One regression for each output."""
        y = y.mT.unsqueeze(1).expand(*design.shape[:2], -1, -1)
        rows = None if mask is None else mask[:, None, None]
        fit = fit_linear_gaussian(design.unsqueeze(2), y, self.loc, self.root, self._noise().unsqueeze(-1), rows, form)
        return GaussianBelief(self.program, loc=fit.mean, root=fit.root), fit.log_evidence.sum(-1)

    def draw(self, component: Tensor, generator: torch.Generator) -> Tensor:
        """Weights."""
        loc, root = self._chosen(self.loc, component), self._chosen(self.root, component)
        noise = normal_like(loc, (*loc.shape[:-1], root.shape[-1], 1), generator)
        return (loc + (root @ noise).squeeze(-1)).flatten(-2)

    def log_prob(self, u: Tensor) -> Tensor:
        """Of the weights."""
        weights = u.unflatten(-1, self.loc.shape[-2:]).unsqueeze(-3)
        normal = torch.distributions.MultivariateNormal(self.loc, scale_tril=lower_root(self.root), validate_args=False)
        return normal.log_prob(weights).sum(-1)

    def predictive(self, design: Tensor) -> Any:
        """Normal, the outputs independent."""
        mean, square = self._spread(design)
        scale = (square + self._noise().square()).sqrt()
        fn = dist.Normal(self._left(mean), self._left(scale))
        return fn if self.program.outputs == 1 else fn.to_event(1)

    def joint(self, design: Tensor) -> Any:
        """Multivariate normal, the outputs of a shot side by side."""
        gram = self._gram(design)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        tril = torch.linalg.cholesky(gram + self._noise().double().square()[:, None, None] * eye).to(design)
        # [T, K, N, P, N, P], zero between outputs; triangular still, as the shots come first
        blocks = torch.diag_embed(tril.movedim(2, -1), dim1=-3, dim2=-1)
        mean = (design @ self.loc.mT).flatten(-2)
        tril = blocks.flatten(-2).flatten(-3, -2)
        return dist.MultivariateNormal(mean.transpose(0, 1), scale_tril=tril.transpose(0, 1))


class GammaBelief(Belief):
    """Unknown noise variance of each output: σ² inverse-gamma with ``shape`` and ``rate``, ``[T, K, P]``.

    Weights given σ² are N(loc, σ² root rootᵀ), root ``[T, K, P, F, M]``.
    """

    @classmethod
    def prior(cls, program: ConjugateModel, tasks: int) -> GammaBelief:
        """Before any observation."""
        loc = program.loc.expand(tasks, -1, -1, -1)
        root = torch.diag_embed(program.log_scale.exp()).expand(*loc.shape, -1)
        shape, rate = (part.expand(tasks, -1, -1) for part in program.gamma_parameters())
        return cls(program, loc=loc, root=root, shape=shape, rate=rate)

    def add(self, design: Tensor, y: Tensor, mask: Tensor | None, form: Form) -> tuple[Belief, Tensor]:
        """One regression for each output; inverse-gamma is the inverse-Wishart of one output."""
        y = y.mT.unsqueeze(1).expand(*design.shape[:2], -1, -1).unsqueeze(-1)
        fit = fit_matrix_normal(
            design.unsqueeze(2),
            y,
            self.loc.unsqueeze(-1),
            self.root,
            2.0 * self.shape,
            (2.0 * self.rate)[..., None, None],
            None if mask is None else mask[:, None, None],
            form,
        )
        after = GammaBelief(
            self.program, loc=fit.mean.squeeze(-1), root=fit.root, shape=fit.df / 2, rate=fit.scatter[..., 0, 0] / 2
        )
        return after, fit.log_evidence.sum(-1)

    def draw(self, component: Tensor, generator: torch.Generator) -> Tensor:
        """log σ², then the weights."""
        # for every component, chosen or not: how many numbers a draw takes must not hang on what others' tasks chose
        gamma = torch._standard_gamma(self.shape.expand(len(component), *self.shape.shape), generator)
        pick = component[..., None, None].expand(*component.shape, 1, gamma.shape[-1])
        log_variance = self._chosen(self.rate, component).log() - gamma.gather(2, pick).squeeze(2).log()
        loc, root = self._chosen(self.loc, component), self._chosen(self.root, component)
        noise = normal_like(loc, (*loc.shape[:-1], root.shape[-1], 1), generator)
        weights = loc + (root @ noise).squeeze(-1) * (0.5 * log_variance).exp().unsqueeze(-1)
        return torch.cat([log_variance, weights.flatten(-2)], -1)

    def log_prob(self, u: Tensor) -> Tensor:
        """Of log σ² and the weights."""
        outputs = self.program.outputs
        log_variance = u[..., :outputs].unsqueeze(-2)
        weights = u[..., outputs:].unflatten(-1, self.loc.shape[-2:]).unsqueeze(-3)
        # log of an inverse-gamma's density at σ², with the Jacobian σ² of its logarithm
        noise = self.shape * self.rate.log() - self.shape.lgamma() - self.shape * log_variance
        noise = noise - self.rate * (-log_variance).exp()
        tril = lower_root(self.root) * (0.5 * log_variance).exp()[..., None, None]
        normal = torch.distributions.MultivariateNormal(self.loc, scale_tril=tril, validate_args=False)
        return (noise + normal.log_prob(weights)).sum(-1)

    def predictive(self, design: Tensor) -> Any:
        """Student-t with 2 shape degrees of freedom, the outputs independent."""
        mean, square = self._spread(design)
        shape, rate = self.shape.unsqueeze(-2), self.rate.unsqueeze(-2)
        scale = ((1.0 + square) * rate / shape).sqrt()
        parts = (2.0 * shape.expand_as(mean), mean, scale)
        fn = dist.StudentT(*(self._left(part) for part in parts))
        return fn if self.program.outputs == 1 else fn.to_event(1)

    def joint(self, design: Tensor) -> Any:
        """Multivariate Student-t, of one output."""
        if self.program.outputs > 1:
            raise NoClosedFormError(
                "The joint predictive of several outputs with noise of their own is a product of multivariate "
                "Student-t; take joint=False, or the differences of log_evidence."
            )
        gram = self._gram(design).squeeze(2)
        gram = gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        tril = (torch.linalg.cholesky(gram).to(design)) * (self.rate / self.shape).sqrt().unsqueeze(-1)
        mean = (design @ self.loc.mT).squeeze(-1)
        return dist.MultivariateStudentT(2.0 * self.shape.squeeze(-1).T, mean.transpose(0, 1), tril.transpose(0, 1))


class WishartBelief(Belief):
    """Unknown noise covariance Σ: inverse-Wishart with ``df`` ``[T, K]`` and ``scatter`` ``[T, K, P, P]``.

    Weights given Σ are matrix normal: covariance root rootᵀ between features, root ``[T, K, F, M]``, Σ between outputs.
    The scatter is float64 whatever the dtype: that of outputs that are nearly proportional is singular in float32.
    """

    @classmethod
    def prior(cls, program: ConjugateModel, tasks: int) -> WishartBelief:
        """Before any observation."""
        loc = program.loc.expand(tasks, -1, -1, -1)
        root = torch.diag_embed(program.log_scale.exp()).expand(tasks, -1, -1, -1)
        df, tril = program.wishart_parameters()
        scatter = (tril.double() @ tril.double().mT).expand(tasks, -1, -1, -1)
        return cls(program, loc=loc, root=root, df=df.expand(tasks, -1), scatter=scatter)

    def add(self, design: Tensor, y: Tensor, mask: Tensor | None, form: Form) -> tuple[Belief, Tensor]:
        """One regression with several outputs."""
        y = y.unsqueeze(1).expand(*design.shape[:3], -1)
        rows = None if mask is None else mask.unsqueeze(1)
        # the results have the dtype of y
        fit = fit_matrix_normal(design, y.double(), self.loc.mT, self.root, self.df, self.scatter, rows, form)
        loc, root, df = (part.to(y.dtype) for part in (fit.mean.mT, fit.root, fit.df))
        after = WishartBelief(self.program, loc=loc, root=root, df=df, scatter=fit.scatter)
        return after, fit.log_evidence.to(y.dtype)

    def _scatter_root(self) -> Tensor:
        """The Cholesky factor of Ψ, ``[T, K, P, P]``, float64.

        Raises:
            DataError: where Ψ is singular to working precision, naming tasks.
        """
        scatter = self.scatter.double()
        tril, info = torch.linalg.cholesky_ex(scatter)
        # what is left of a variance given the outputs before: no digit of it is right when rounding is as large
        left, whole = tril.diagonal(dim1=-2, dim2=-1).square(), scatter.diagonal(dim1=-2, dim2=-1)
        right = left > 8 * self.program.outputs * torch.finfo(torch.float64).eps * whole
        bad = ((info > 0) | ~right.all(-1)).any(-1).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
            raise DataError(
                "The scatter of the outputs is not finite and positive definite to working precision for "
                f"{len(bad)} task(s), counted from 0: {names}. Outputs may be linear functions of one another, or "
                "huge: leave out those that follow from others, standardise the data, or start from a larger noise "
                "scale."
            )
        return tril

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Cholesky factors of Ψ⁻¹, of the prior ``[K, P, P]`` and of the posterior ``[T, K, P, P]``, float64."""
        return precision_root(self.program.wishart_parameters()[1].double()), precision_root(self._scatter_root())

    def _half_df(self) -> Tensor:
        index = torch.arange(self.program.outputs, device=self.df.device)
        return (self.df.unsqueeze(-1) - index) / 2

    def draw(self, component: Tensor, generator: torch.Generator) -> Tensor:
        """log of the Bartlett squares, what stands below the diagonal, and the weights."""
        outputs = self.program.outputs
        half_df = self._half_df()
        gamma = torch._standard_gamma(half_df.expand(len(component), *half_df.shape), generator)
        pick = component[..., None, None].expand(*component.shape, 1, outputs)
        squares = 2.0 * gamma.gather(2, pick).squeeze(2)
        lower = normal_like(squares, (*component.shape, outputs * (outputs - 1) // 2), generator)
        prior, posterior = self._factors()
        bartlett = lower_triangle(squares.sqrt(), lower).double()
        factor = self._chosen(posterior, component) @ bartlett  # Σ⁻¹ = factor factorᵀ
        relative = torch.linalg.solve_triangular(prior[component], factor, upper=False)
        rows, columns = torch.tril_indices(outputs, outputs, -1, device=relative.device)
        loc, root = self._chosen(self.loc, component), self._chosen(self.root, component)
        noise = normal_like(loc, (*component.shape, outputs, root.shape[-1]), generator)
        # columns of factor⁻ᵀ have covariance Σ
        mixed = torch.linalg.solve_triangular(factor.mT, (noise @ root.mT).double(), upper=True)
        log_squares = 2.0 * relative.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([log_squares, relative[..., rows, columns], (loc + mixed).flatten(-2)], -1).to(loc)

    def log_prob(self, u: Tensor) -> Tensor:
        """Of the Bartlett numbers, in the program's terms, and the weights."""
        outputs = self.program.outputs
        below = outputs * (outputs - 1) // 2
        dtype, u = u.dtype, u.double()
        relative = lower_triangle((0.5 * u[..., :outputs]).exp(), u[..., outputs : outputs + below]).unsqueeze(-3)
        weights = u[..., outputs + below :].unflatten(-1, self.loc.shape[-2:]).unsqueeze(-3)
        prior, posterior = self._factors()
        change = torch.linalg.solve_triangular(posterior, prior.expand_as(posterior), upper=False)
        own = change @ relative  # Bartlett's matrix under the posterior
        rows, columns = torch.tril_indices(outputs, outputs, -1, device=u.device)
        squares = own.diagonal(dim1=-2, dim2=-1).square()
        gamma = torch.distributions.Gamma(self._half_df().double(), 0.5, validate_args=False)
        noise = (gamma.log_prob(squares) + squares.log()).sum(-1)
        normal = torch.distributions.Normal(0.0, 1.0)
        noise = noise + normal.log_prob(own[..., rows, columns]).sum(-1)
        # |d own / d relative| = Π change_ii^(i + 1), of which one power each goes to the logarithms on the diagonal
        power = torch.arange(outputs, device=u.device)
        noise = noise + (power * change.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
        factor = prior @ relative
        # vec of (weights − loc) whitened on both sides
        tril = lower_root(self.root.double())
        white = torch.linalg.solve_triangular(tril, (weights - self.loc).mT, upper=False).mT
        white = factor.mT @ white
        features = white.shape[-1]
        log_det = features * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det = log_det - outputs * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (noise + normal.log_prob(white).sum((-2, -1)) + log_det).to(dtype)

    def predictive(self, design: Tensor) -> Any:
        """Multivariate Student-t over the outputs, with ν − P + 1 degrees of freedom."""
        mean, square = self._spread(design)
        df = self.df - self.program.outputs + 1.0
        tril = (self._scatter_root() / df.double().sqrt()[..., None, None]).to(design).unsqueeze(2)
        tril = tril * (1.0 + square).sqrt().unsqueeze(-1)
        df = df.unsqueeze(-1).expand(mean.shape[:-1])
        return dist.MultivariateStudentT(*(part.transpose(0, 1) for part in (df, mean, tril)))

    def joint(self, design: Tensor) -> Any:
        """Refused: a matrix-variate Student-t.

        Raises:
            NoClosedFormError: always.
        """
        raise NoClosedFormError(
            "The joint predictive under an inverse-Wishart is a matrix-variate Student-t, which Pyro does not have; "
            "take joint=False, or the differences of log_evidence."
        )


BELIEFS: dict[str, type[GaussianBelief] | type[GammaBelief] | type[WishartBelief]] = {
    "known": GaussianBelief,
    "inverse_gamma": GammaBelief,
    "inverse_wishart": WishartBelief,
}
