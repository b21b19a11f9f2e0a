"""Last layers whose posterior is exact: several components, and noise that is known or inferred for each task."""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import ModelError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.film import FiLMTrunk
from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.models.likelihoods.base import as_event, as_targets
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.plates import shot_plate, task_plate
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.batched import is_plain_mlp
from bayesmeta.ops.gaussian import lower_root
from bayesmeta.ops.lowered import in_bfloat16
from bayesmeta.ops.random import Seed, as_generator, normal_like

#: What is known of the noise: its scale (θ), or a prior of it for each task.
Noise = Literal["known", "inverse_gamma", "inverse_wishart"]


class ConjugateModel(TaskProgram):
    """A last layer on learned features with a conjugate prior: the model of the Bayesian last layers as a Pyro program.

    For each task (P outputs, F features of component k at x, the last a constant 1 if the network's head has a bias):

    - k with probability π_k. Pyro's site is a ``selector`` ~ N(0, 1), cut at the quantiles of π: a continuous latent,
      as every method needs one; k is a function of it. There is none for one component. Gradients do not see the
      choice.
    - the noise. ``"known"``: the scale of the likelihood, θ. ``"inverse_gamma"``: ``noise_variance`` ``[P]``,
      σ²_p ~ InverseGamma(a_kp, b_kp). ``"inverse_wishart"``: Σ ~ InverseWishart(ν_k, Ψ_k) in Bartlett's decomposition,
      Σ⁻¹ = (C A)(C A)ᵀ with C the Cholesky factor of Ψ_k⁻¹: ``bartlett_squares`` ``[P]``, A_ii² ~ χ²(ν_k − i), i from
      0, and ``bartlett_lower``, A_ij ~ N(0, 1) below the diagonal, row by row; ``noise_covariance`` is reported.
    - ``phi`` ``[P × F]``, the weights of each output one after the other: N(m_k, diag s_k²), times the noise's variance
      of that output where that is inferred (a conjugate prior scales with the noise); with Σ the scales are one row
      ``[F]`` for all outputs, and the covariance between outputs is Σ's.
    - y = features · phi + noise.

    θ: the trunk, the latents by which components modulate it (:mod:`bayesmeta.models.film`), log π, the m, s and the
    noise's parameters.

    Args:
        network: a Sequential of Linear and elementwise layers that ends in a Linear; copied.
        likelihood: Gaussian; copied. Its scale is the noise, or where the prior of the noise begins.
        num_components: K.
        noise: what is known of the noise.
        latent_size: length of the components' latents.
        spread: standard deviation of the first modulations; with 0 and equal priors, all components are one.
        scale: first prior standard deviation of the weights.
        learn_components: whether π is trained; otherwise 1 / K each.
        seed: of the latents; None means seed 0.

    Raises:
        ModelError: for another kind of network.
        UnsupportedError: for another likelihood.
        OptionError: for numbers out of range, an unknown noise, or an inverse-Wishart for one output.
    """

    def __init__(
        self,
        network: nn.Sequential,
        likelihood: Gaussian,
        num_components: int = 1,
        *,
        noise: Noise = "known",
        latent_size: int = 8,
        spread: float = 0.25,
        scale: float = 1.0,
        learn_components: bool = True,
        seed: Seed = None,
    ) -> None:
        super().__init__(self._pyro_program)
        if not is_plain_mlp(network) or len(network) == 0 or not isinstance(network[-1], nn.Linear):
            raise ModelError(
                "A conjugate last layer needs a Sequential of Linear and elementwise layers that ends in a Linear, "
                "such as bayesmeta.nets.mlp(…)."
            )
        if type(likelihood) is not Gaussian:  # a subclass may be another distribution
            raise UnsupportedError(f"A closed form needs a Gaussian likelihood; got {type(likelihood).__name__}.")
        if noise not in get_args(Noise):
            raise OptionError(f"Unknown noise {noise!r}; expected one of {', '.join(map(repr, get_args(Noise)))}.")
        if num_components < 1 or latent_size < 1 or not spread >= 0 or not scale > 0:
            raise OptionError(
                "num_components and latent_size must be at least 1, spread ≥ 0 and scale > 0; got "
                f"num_components={num_components}, latent_size={latent_size}, spread={spread}, scale={scale}."
            )
        head = network[-1]
        self.outputs, self.has_bias = head.out_features, head.bias is not None
        if noise == "inverse_wishart" and self.outputs == 1:
            raise OptionError(
                "An inverse-Wishart is about several outputs; for the variance of one use noise='inverse_gamma'."
            )
        self.num_components, self.noise = num_components, noise
        self.likelihood = copy.deepcopy(likelihood)
        generator = as_generator(seed, head.weight.device, "components")
        layers, apart = nn.Sequential(*list(network)[:-1]), spread if num_components > 1 else 0.0
        self.trunk = FiLMTrunk(layers, num_components, latent_size, apart, generator)
        learn = learn_components and num_components > 1
        self.logits = nn.Parameter(head.weight.new_zeros(num_components), requires_grad=learn)
        weights = head.weight.detach()
        if head.bias is not None:
            weights = torch.cat([weights, head.bias.detach().unsqueeze(-1)], -1)
        self.num_weights = weights.shape[-1]
        self._create_prior(weights, scale, generator)

    @classmethod
    def of(cls, model: Any, num_components: int = 1, **options: Any) -> ConjugateModel:
        """The same network and likelihood, each component's prior first at that of the model's last layer.

        Args:
            model: a :class:`~bayesmeta.NeuralTaskModel` with ``task_modules="head"`` and a diagonal Gaussian prior.
            num_components, options: as above, but for the scale.

        Raises:
            UnsupportedError: for another model.
        """
        if not isinstance(model, NeuralTaskModel) or not model.is_linear_in_phi or not model.prior.is_diagonal_gaussian:
            kind = type(model).__name__
            raise UnsupportedError(
                "A conjugate last layer is made from a NeuralTaskModel of a Sequential that ends in a Linear, with "
                f"task_modules='head' and a diagonal Gaussian prior (prior='normal'); got {kind}"
                + (
                    f" with {model.task_modules!r}, {type(model.prior).__name__}."
                    if isinstance(model, NeuralTaskModel)
                    else "."
                )
            )
        if model.prior.hyperpriors() or model.prior.covariates:
            raise UnsupportedError(
                "The prior of a conjugate last layer has no global sites and does not depend on covariates w; use "
                "prior='normal' and covariates=0."
            )
        network = model.central_network()
        assert isinstance(network, nn.Sequential)
        self = cls(network, model.likelihood, num_components, **options)  # type: ignore[arg-type]
        moments = model.prior.moments()
        assert moments is not None
        split = self.outputs * (self.num_weights - self.has_bias)
        scale = moments[1].detach()
        rows = scale[:split].reshape(self.outputs, -1)
        if self.has_bias:
            rows = torch.cat([rows, scale[split:].unsqueeze(-1)], -1)
        self._set_scale(rows)
        return self

    # -- parameters ---------------------------------------------------------------------------------------------

    def _create_prior(self, weights: Tensor, scale: float, generator: torch.Generator) -> None:
        count, outputs = self.num_components, self.outputs
        # components that begin alike have the same gradient; the features tell them apart, unless there is no trunk
        apart = 0.0 if self.trunk.widths or count == 1 else scale
        noise = normal_like(weights, (count, *weights.shape), generator)
        self.loc = nn.Parameter(weights + apart * noise)
        rows = (count, self.num_weights) if self.noise == "inverse_wishart" else (count, outputs, self.num_weights)
        self.log_scale = nn.Parameter(weights.new_zeros(rows))
        first = self.likelihood.scale.detach().to(weights).expand(outputs)
        if self.noise != "known":
            for parameter in self.likelihood.parameters():
                parameter.requires_grad_(False)  # it only says where the prior of the noise begins
        if self.noise == "inverse_gamma":  # shape 3: the variance has a variance; its precision has mean 1 / first²
            self.log_shape = nn.Parameter(weights.new_full((count, outputs), 3.0).log())
            self.log_rate = nn.Parameter((3.0 * first.square()).log().expand(count, -1).clone())
        elif self.noise == "inverse_wishart":
            self.log_extra_df = nn.Parameter(weights.new_full((count,), 6.0).log())  # ν = P − 1 + 6
            start = ((outputs + 5.0) * first.square()).log() / 2
            self.scatter_log_diagonal = nn.Parameter(start.expand(count, -1).clone())
            self.scatter_lower = nn.Parameter(weights.new_zeros(count, outputs * (outputs - 1) // 2))
        self._set_scale(weights.new_full(weights.shape, scale))

    def _set_scale(self, rows: Tensor) -> None:
        """Set the prior's first standard deviations, ``[P, F]``, in units of the noise where it is inferred."""
        with torch.no_grad():
            if self.noise != "known":
                rows = rows / self.likelihood.scale.to(rows).reshape(-1, 1)
            value = rows.log().mean(0) if self.noise == "inverse_wishart" else rows.log()
            self.log_scale.copy_(value.expand_as(self.log_scale))

    @property
    def log_probabilities(self) -> Tensor:
        """log π, ``[K]``."""
        return self.logits.log_softmax(0)

    def gamma_parameters(self) -> tuple[Tensor, Tensor]:
        """Shape and rate of the noise variances' prior, each ``[K, P]``."""
        return self.log_shape.exp(), self.log_rate.exp()

    def wishart_parameters(self) -> tuple[Tensor, Tensor]:
        """Degrees of freedom ν ``[K]`` and a lower triangular root of Ψ ``[K, P, P]``."""
        root = lower_triangle(self.scatter_log_diagonal.exp(), self.scatter_lower)
        return self.outputs - 1 + self.log_extra_df.exp(), root

    # -- components ---------------------------------------------------------------------------------------------

    def edges(self) -> Tensor:
        """Where the selector is cut, ``[K + 1]``, float64, from −∞ to ∞."""
        cumulative = self.log_probabilities.detach().double().exp().cumsum(0)[:-1]
        ends = cumulative.new_tensor([torch.inf])
        return torch.cat([-ends, torch.special.ndtri(cumulative), ends])

    def component(self, selector: Tensor) -> Tensor:
        """The component that a selector means, integers of its shape."""
        return torch.bucketize(selector.detach().double().contiguous(), self.edges()[1:-1], right=True)

    def features(self, x: Tensor, component: Tensor | None = None) -> Tensor:
        """Features of the last layer, the 1 of a bias included.

        Args:
            x: ``[tasks, shots, …]``.
            component: ``[…, tasks]``, or None for all.

        Returns:
            ``[…, tasks, shots, F]``, or ``[tasks, K, shots, F]``.
        """
        if component is not None and component.numel() > x.shape[0] * self.num_components:
            # many draws share few components
            return self.features(x)[torch.arange(x.shape[0], device=x.device), component]
        h = in_bfloat16(self.trunk, x, component)
        return torch.cat([h, h.new_ones(*h.shape[:-1], 1)], -1) if self.has_bias else h

    # -- the Pyro program ---------------------------------------------------------------------------------------

    def _pyro_program(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        one = x.new_ones(())
        with task_plate(x):
            if self.num_components > 1:
                k = self.component(pyro.sample("selector", dist.Normal(0.0 * one, one)))
            else:
                k = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device)
            phi, noise = self._sample_weights(k)
            with shot_plate(x, mask):
                weights = phi.squeeze(-2).unflatten(-1, (self.outputs, -1))
                mean = self.features(x, k.squeeze(-1)) @ weights.mT
                if self.noise == "inverse_wishart":
                    return pyro.sample("y", dist.MultivariateNormal(mean, scale_tril=noise), obs=y)
                fn = as_event(dist.Normal(as_targets(mean), as_targets(noise)), self.outputs)
                return pyro.sample("y", fn, obs=y)

    def _sample_weights(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi ``[…, tasks, 1, P × F]``, and the noise's scales ``[…, P]`` or the triangular root of its covariance."""
        loc, scale = self.loc[k], self.log_scale[k].exp()
        if self.noise == "inverse_wishart":
            tril = self._sample_covariance(k)
            # phi = vec(loc + L G diag(s)) for standard normal G: a Kronecker product
            root = torch.einsum("...pq,...f,fg->...pfqg", tril, scale, torch.eye(scale.shape[-1]).to(scale))
            root = root.flatten(-2).flatten(-3, -2)
            return pyro.sample("phi", dist.MultivariateNormal(loc.flatten(-2), scale_tril=root)), tril
        if self.noise == "inverse_gamma":
            shape, rate = self.gamma_parameters()
            variance = pyro.sample("noise_variance", dist.InverseGamma(shape[k], rate[k]).to_event(1))
            sigma = variance.sqrt()
            scale = scale * sigma.unsqueeze(-1)
        else:
            sigma = self.likelihood.scale.expand(self.outputs)
        return pyro.sample("phi", dist.Normal(loc.flatten(-2), scale.flatten(-2)).to_event(1)), sigma

    def _sample_covariance(self, k: Tensor) -> Tensor:
        df, root = self.wishart_parameters()
        index = torch.arange(self.outputs, device=df.device)
        half_df = (df[k].unsqueeze(-1) - index) / 2
        squares = pyro.sample("bartlett_squares", dist.Gamma(half_df, torch.full_like(half_df, 0.5)).to_event(1))
        zero = self.scatter_lower[k]
        lower = pyro.sample("bartlett_lower", dist.Normal(0.0 * zero, torch.ones_like(zero)).to_event(1))
        factor = lower_triangle(squares.sqrt(), lower)
        # Σ = (C A)⁻ᵀ (C A)⁻¹ with C = chol(Ψ⁻¹); factorised by QR, as Σ itself may be singular in single precision
        tril = precision_root(precision_root(root)[k] @ factor)
        pyro.deterministic("noise_covariance", tril @ tril.mT, event_dim=2)
        return tril

    def prepare(self, observations: Observations) -> ConjugateModel:
        """Check the width of the targets, and the rest as any program does."""
        if not self.is_prepared and observations.y is not None:
            width = observations.y.shape[-1] if observations.y.dim() == 3 else 1
            if width != self.outputs:
                raise ShapeError(
                    f"The network has {self.outputs} output(s); y has width {width} (shape "
                    f"{list(observations.y.shape)}). Change the network's output width."
                )
        super().prepare(observations)
        return self


def lower_triangle(diagonal: Tensor, lower: Tensor) -> Tensor:
    """A lower triangular matrix ``[…, P, P]`` from its diagonal and what stands below it, row by row."""
    size = diagonal.shape[-1]
    rows, columns = torch.tril_indices(size, size, -1, device=diagonal.device)
    matrix = torch.diag_embed(diagonal)
    index = (rows * size + columns).expand(lower.shape)
    return matrix.flatten(-2).scatter(-1, index, lower).unflatten(-1, (size, size))


def precision_root(root: Tensor) -> Tensor:
    """The Cholesky factor of (L Lᵀ)⁻¹ for lower triangular L ``[…, P, P]``, without squaring L."""
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
    return lower_root(torch.linalg.solve_triangular(root, eye, upper=False).mT)
