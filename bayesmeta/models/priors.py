"""Priors p(φ | θ, w) over the flat task parameters of a network. Their parameters are θ.

Every prior has a centre: the network's first weights, to begin with, plus a linear function of the task's covariates w
where the model has them. Some have global sites as well (scales with a prior of their own): latent sites outside the
task plate, which get a posterior q(θ) like those of any program. ``D`` is the number of task parameters below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from bayesmeta.errors import ModelError, OptionError, ShapeError
from bayesmeta.ops.batched import FlatParameters
from bayesmeta.ops.random import as_generator, normal_like

_NO_SHAPE = torch.Size()
#: Values of a prior's global sites by name.
Hyper = Mapping[str, Tensor]


class FlatAt(TorchDistribution):
    """An improper flat density on R^D whose draws are all ``loc``: the prior of a point estimate.

    Its log-probability is 0 everywhere, so that the joint is the likelihood.

    Args:
        loc: ``[…, D]``.
    """

    support = constraints.real_vector
    arg_constraints = {"loc": constraints.real_vector}
    has_rsample = True

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Copies of ``loc``."""
        return self.loc.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero, in the shape of the batch."""
        return value.new_zeros(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlatAt:
        """The same with another batch shape."""
        return FlatAt(self.loc.expand(*batch_shape, -1), validate_args=False)


class Prior(nn.Module):
    """Base of priors over weights: made without knowing the network, given its first weights by the model.

    One of your own defines :meth:`distribution`, and :meth:`moments` if a method that starts at a density (ABML) is to
    use it; parameters are made in :meth:`create`.
    """

    loc: Tensor
    #: whether the prior is a diagonal Gaussian given θ, with the :meth:`moments` as its parameters
    is_diagonal_gaussian = False

    def set_up(self, initial: Tensor, parts: FlatParameters, covariates: int = 0) -> None:
        """Create the parameters, centred on the network's first weights.

        Args:
            initial: ``[D]``.
            parts: the tensors of which φ is made.
            covariates: width of w; the centre's slopes on w begin at 0.

        Raises:
            ModelError: when the prior already belongs to a model.
        """
        if "loc" in self._parameters:
            raise ModelError("This prior already belongs to a model; give each model a prior of its own.")
        self.loc = nn.Parameter(initial.detach().clone())
        self.covariates = covariates
        if covariates:
            self.slopes = nn.Parameter(initial.new_zeros(len(initial), covariates))
        self.create(parts)

    def create(self, parts: FlatParameters) -> None:
        """Create the parameters besides the centre; ``self.loc`` exists."""

    def centre(self, w: Tensor | None = None) -> Tensor:
        """Centre of the prior, ``[D]``, or ``[…, D]`` for covariates w ``[…, covariates]``.

        Raises:
            ShapeError: when the model has covariates and w does not fit.
        """
        if not self.covariates:
            return self.loc
        if w is None or w.shape[-1] != self.covariates:
            found = "none" if w is None else str(w.shape[-1])
            raise ShapeError(
                f"The prior's mean depends on {self.covariates} task-level covariate(s) w; the observations have "
                f"{found}. Give w, [tasks, {self.covariates}], with support and query."
            )
        return self.loc + w @ self.slopes.mT

    def hyperpriors(self) -> dict[str, Any]:
        """Distributions of the prior's global sites by name; none for most."""
        return {}

    def distribution(self, w: Tensor | None = None, hyper: Hyper | None = None) -> Any:
        """p(φ | θ, w), event shape ``[D]``.

        Args:
            w: ``[…, covariates]``; the batch shape is ``[…]``.
            hyper: values of the global sites, each ``[…, *event]``, with batch dimensions that broadcast with w's.
        """
        raise NotImplementedError

    def moments(self, w: Tensor | None = None, hyper: Hyper | None = None) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of φ given θ, each ``[…, D]``; None where there is no density."""
        return None

    def root(self) -> Tensor | None:
        """A matrix R with covariance R Rᵀ, ``[D, ≥ D]``, where the prior is a Gaussian; else None."""
        return None


class Point(Prior):
    """No density: φ starts at θ. What MAML assumes."""

    def distribution(self, w: Tensor | None = None, hyper: Hyper | None = None) -> FlatAt:
        """The improper flat density at the start point."""
        return FlatAt(self.centre(w))


class _Scaled(Prior):
    """A prior with one learned scale a weight.

    Args:
        scale: first scale of every weight.
        learn_scale: whether the scales are trained.

    Raises:
        OptionError: for a scale that is not positive.
    """

    def __init__(self, scale: float = 0.1, *, learn_scale: bool = True) -> None:
        super().__init__()
        _positive(type(self).__name__, scale=scale)
        self.initial_scale = scale
        self.learn_scale = learn_scale

    def create(self, parts: FlatParameters) -> None:
        """Create the log scales, ``[D]``."""
        log_scale = torch.full_like(self.loc, self.initial_scale).log().detach()
        if self.learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)


class Normal(_Scaled):
    """Diagonal Gaussian; θ is its mean (from the network's first weights) and its log standard deviations.

    Args:
        scale: first standard deviation of every weight.
        learn_scale: whether the standard deviations are trained.

    Raises:
        OptionError: for a scale that is not positive.
    """

    is_diagonal_gaussian = True

    def distribution(self, w: Tensor | None = None, hyper: Hyper | None = None) -> Any:
        """Independent Normals as one event."""
        return dist.Normal(self.centre(w), self.log_scale.exp()).to_event(1)

    def moments(self, w: Tensor | None = None, hyper: Hyper | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each ``[…, D]``."""
        return self.centre(w), self.log_scale.exp()

    def root(self) -> Tensor:
        """The standard deviations on the diagonal, ``[D, D]``."""
        return torch.diag(self.log_scale.exp())


class Laplace(_Scaled):
    """Independent Laplace densities: most weights hardly move from their centre, some move far.

    Its maximum a posteriori is a lasso around the centre. Standard deviation √2 × scale.

    Args:
        scale: first scale b of every weight, in exp(−|φ − m| / b) / 2b.
        learn_scale: whether the scales are trained.

    Raises:
        OptionError: for a scale that is not positive.
    """

    def distribution(self, w: Tensor | None = None, hyper: Hyper | None = None) -> Any:
        """Independent Laplace densities as one event."""
        return dist.Laplace(self.centre(w), self.log_scale.exp()).to_event(1)

    def moments(self, w: Tensor | None = None, hyper: Hyper | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each ``[…, D]``."""
        return self.centre(w), self.log_scale.exp() * 2**0.5


class LowRankNormal(_Scaled):
    """Gaussian with covariance F Fᵀ + diag(s²): tasks differ along ``rank`` directions, and a little on their own.

    Args:
        rank: number of directions, columns of F.
        scale: first standard deviation s of every weight; a random F adds about as much again.
        learn_scale: whether s is trained; F always is.

    Raises:
        OptionError: for a rank below 1 or a scale that is not positive.
    """

    def __init__(self, rank: int = 4, scale: float = 0.1, *, learn_scale: bool = True) -> None:
        super().__init__(scale, learn_scale=learn_scale)
        if rank < 1:
            raise OptionError(f"The rank of a LowRankNormal must be at least 1; got {rank}.")
        self.rank = rank

    def create(self, parts: FlatParameters) -> None:
        """Create the log scales ``[D]`` and F, ``[D, rank]``: at random under a fixed seed, since 0 has no gradient."""
        super().create(parts)
        noise = normal_like(self.loc.detach(), (len(self.loc), self.rank), as_generator(0, self.loc.device, "factor"))
        self.factor = nn.Parameter(self.initial_scale * noise / self.rank**0.5)

    def distribution(self, w: Tensor | None = None, hyper: Hyper | None = None) -> Any:
        """Multivariate Gaussian in low-rank form."""
        return dist.LowRankMultivariateNormal(self.centre(w), self.factor, (2 * self.log_scale).exp())

    def moments(self, w: Tensor | None = None, hyper: Hyper | None = None) -> tuple[Tensor, Tensor]:
        """Mean and marginal standard deviation, each ``[…, D]``."""
        return self.centre(w), ((2 * self.log_scale).exp() + self.factor.square().sum(-1)).sqrt()

    def root(self) -> Tensor:
        """[F, diag(s)], ``[D, rank + D]``."""
        return torch.cat([self.factor, torch.diag(self.log_scale.exp())], -1)


class Mixture(Prior):
    """Mixture of diagonal Gaussians: tasks come in kinds. θ: log weights, means and standard deviations of each kind.

    The means are the centre plus an offset for each component, random at first under a fixed seed, since equal
    components would stay equal.

    Args:
        components: number of kinds.
        scale: first standard deviation of every weight in every component.
        spread: first standard deviation of the offsets.

    Raises:
        OptionError: for fewer than one component, or a scale or spread that is not positive.
    """

    def __init__(self, components: int = 4, scale: float = 0.1, *, spread: float = 0.1) -> None:
        super().__init__()
        _positive("Mixture", scale=scale, spread=spread)
        if components < 1:
            raise OptionError(f"A Mixture prior needs at least 1 component; got {components}.")
        self.components = components
        self.initial_scale, self.initial_spread = scale, spread

    def create(self, parts: FlatParameters) -> None:
        """Create logits ``[K]``, offsets and log standard deviations, each ``[K, D]``."""
        loc = self.loc.detach()
        noise = normal_like(loc, (self.components, len(loc)), as_generator(0, loc.device, "mixture"))
        self.logits = nn.Parameter(loc.new_zeros(self.components))
        self.offsets = nn.Parameter(self.initial_spread * noise)
        self.log_scale = nn.Parameter(torch.full_like(noise, self.initial_scale).log())

    def distribution(self, w: Tensor | None = None, hyper: Hyper | None = None) -> Any:
        """Mixture over the components, event shape ``[D]``."""
        means = self.centre(w).unsqueeze(-2) + self.offsets
        component = dist.Normal(means, self.log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits.expand(means.shape[:-1])), component)

    def moments(self, w: Tensor | None = None, hyper: Hyper | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the whole mixture, each ``[…, D]``."""
        weight = self.logits.softmax(-1).unsqueeze(-1)
        mean = (weight * self.offsets).sum(0)
        # not E[u²] − E[u]², which rounding can bring to 0 or below
        square = (weight * ((2 * self.log_scale).exp() + (self.offsets - mean).square())).sum(0)
        return self.centre(w) + mean, square.sqrt()


class LayerScales(Prior):
    """Gaussian with one standard deviation for each tensor of the network, a global site with a LogNormal prior.

    σ_l ~ LogNormal(log scale, spread), φ in tensor l ~ N(centre, σ_l²). How much each layer differs between tasks is
    learned with its uncertainty: use ``global_guide="normal"``.

    Args:
        scale: median of each σ_l.
        spread: standard deviation of its logarithm.

    Raises:
        OptionError: for numbers that are not positive.
    """

    is_diagonal_gaussian = True
    SITE = "phi_scale"

    def __init__(self, scale: float = 0.1, *, spread: float = 1.0) -> None:
        super().__init__()
        _positive("LayerScales", scale=scale, spread=spread)
        self.median, self.spread = scale, spread

    def create(self, parts: FlatParameters) -> None:
        """Note which tensor each weight belongs to."""
        self.num_parts = len(parts.sizes)
        owner = torch.repeat_interleave(torch.arange(self.num_parts), torch.tensor(parts.sizes))
        self.register_buffer("_owner", owner.to(self.loc.device), persistent=False)

    def hyperpriors(self) -> dict[str, Any]:
        """One scale for each tensor, event shape ``[tensors]``."""
        median = self.loc.new_full((self.num_parts,), self.median)
        return {self.SITE: dist.LogNormal(median.log(), self.spread).to_event(1)}

    def distribution(self, w: Tensor | None = None, hyper: Hyper | None = None) -> Any:
        """Independent Normals as one event."""
        return dist.Normal(*self.moments(w, hyper)).to_event(1)

    def moments(self, w: Tensor | None = None, hyper: Hyper | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation given the scales, each ``[…, D]``."""
        assert hyper is not None
        owner = self._owner
        assert isinstance(owner, Tensor)
        return self.centre(w), hyper[self.SITE][..., owner]


class Horseshoe(Prior):
    """Regularised horseshoe on how much each weight differs between tasks: for most weights next to nothing.

    τ ~ HalfCauchy(scale), λ_d ~ HalfCauchy(1), both global sites; φ_d ~ N(centre_d, τ² λ̃_d²) with
    λ̃² = c² λ² / (c² + τ² λ²), so that no standard deviation exceeds the slab c.

    Source: C. Carvalho, N. Polson, J. Scott, "The horseshoe estimator for sparse signals", Biometrika 97, 2010,
    https://doi.org/10.1093/biomet/asq017; J. Piironen, A. Vehtari, "Sparsity information and regularization in the
    horseshoe and other shrinkage priors", EJS 11, 2017, https://doi.org/10.1214/17-EJS1337SI, eq. 2.8. Here it is the
    spread of weights between tasks that is sparse, not the weights themselves.

    Args:
        scale: scale of τ's half-Cauchy prior.
        slab: c; None for the plain horseshoe.

    Raises:
        OptionError: for numbers that are not positive.
    """

    is_diagonal_gaussian = True
    GLOBAL, LOCAL = "phi_global_scale", "phi_local_scale"

    def __init__(self, scale: float = 0.1, *, slab: float | None = 1.0) -> None:
        super().__init__()
        _positive("Horseshoe", scale=scale, slab=1.0 if slab is None else slab)
        self.initial_scale, self.slab = scale, slab

    def hyperpriors(self) -> dict[str, Any]:
        """One scale for all weights, and one for each, event shape ``[D]``."""
        one = torch.ones_like(self.loc.detach())
        return {
            self.GLOBAL: dist.HalfCauchy(self.initial_scale * one[0]),
            self.LOCAL: dist.HalfCauchy(one).to_event(1),
        }

    def distribution(self, w: Tensor | None = None, hyper: Hyper | None = None) -> Any:
        """Independent Normals as one event."""
        return dist.Normal(*self.moments(w, hyper)).to_event(1)

    def moments(self, w: Tensor | None = None, hyper: Hyper | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation given the scales, each ``[…, D]``."""
        assert hyper is not None
        scale = hyper[self.GLOBAL].unsqueeze(-1) * hyper[self.LOCAL]
        if self.slab is not None:
            scale = self.slab * scale / (self.slab**2 + scale.square()).sqrt()
        return self.centre(w), scale


PRIORS: dict[str, type[Prior]] = {
    "point": Point,
    "normal": Normal,
    "laplace": Laplace,
    "low_rank": LowRankNormal,
    "mixture": Mixture,
    "layer_scales": LayerScales,
    "horseshoe": Horseshoe,
}


def as_prior(prior: Prior | str) -> Prior:
    """A prior, or the default one of that name, see :data:`PRIORS`.

    Raises:
        OptionError: for an unknown name.
    """
    if isinstance(prior, Prior):
        return prior
    if prior not in PRIORS:
        raise OptionError(
            f"Unknown prior {prior!r}; expected one of {', '.join(PRIORS)}, or a bayesmeta.priors object."
        )
    return PRIORS[prior]()


def _positive(kind: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise OptionError(f"The {name} of a {kind} prior must be positive; got {value}.")
