"""A Gaussian process for each task whose kernel, on learned features, is shared by the tasks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, ModelError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.handlers import Layout, Pass
from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.plates import task_plate
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.batched import is_plain_mlp
from bayesmeta.ops.random import Seed, as_generator

with warnings.catch_warnings():
    # on import linear_operator compiles a function in a way that torch has deprecated
    warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
    from gpytorch import kernels

#: Names of the built-in kernels.
KernelName = Literal["rbf", "matern12", "matern32", "matern52", "spectral_mixture", "linear"]
#: What the kernel compares: x, the network's features f(x), or [x, f(x)].
Inputs = Literal["raw", "features", "both"]

#: Added to the prior variance of the function at each observed point, as a share of it.
JITTER = 1e-8
_LOG_2PI = math.log(2 * math.pi)


class _Dense(nn.Module):
    """A GPyTorch kernel as a function of two sets of points that gives a matrix."""

    def __init__(self, kernel: kernels.Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        if b is not None:
            return self.kernel(a, b).to_dense()
        # GPyTorch's distances have rounding noise of 1e-8 from a point to itself, but not when asked for the diagonal
        exact, matrix = self.kernel(a, diag=True), self.kernel(a, a).to_dense()
        eye = torch.eye(a.shape[-2], dtype=torch.bool, device=a.device)
        return torch.where(eye, exact.unsqueeze(-1), matrix)


class DeepKernelModel(TaskProgram):
    """y = f(x) + noise, f a draw of a Gaussian process for each task; mean, kernel, features and noise are θ.

    The Pyro program has the function integrated out: one observed site ``y``, a multivariate normal over a task's
    shots, and no latent site. So φ is a function and has no finite vector u: methods that adapt one (MAML, ABML, NUTS)
    refuse this model; :class:`~bayesmeta.DeepKernel` takes it. All covariances are float64, whatever the dtype.

    Args:
        network: a Sequential of Linear and elementwise layers that ends in a Linear; that last layer is left out, and
            the rest gives the features. Copied.
        likelihood: Gaussian, for one output. Copied.
        kernel: ``"rbf"``, ``"matern12"``, ``"matern32"``, ``"matern52"``, ``"linear"``, each times a learned variance;
            ``"spectral_mixture"``; or a GPyTorch kernel of your own, copied, with no batch shape.
        inputs: what the kernel compares: ``"features"``, as the paper; ``"raw"`` x; or ``"both"``, side by side.
        num_mixtures: components of the spectral mixture.
        max_frequency: the first frequencies of the spectral mixture are drawn from U(0, this), in cycles a unit of its
            inputs.
        learn_mean: whether the process has a constant mean that is trained, first 0; else it is 0.
        seed: of the first frequencies; None means seed 0.

    Raises:
        OptionError: for an unknown kernel or inputs, or numbers out of range.
        ModelError: for another kind of network.
        UnsupportedError: for another likelihood, or several outputs.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Gaussian,
        kernel: KernelName | kernels.Kernel = "rbf",
        *,
        inputs: Inputs = "features",
        num_mixtures: int = 4,
        max_frequency: float = 1.0,
        learn_mean: bool = True,
        seed: Seed = None,
    ) -> None:
        super().__init__(self._pyro_program)
        if inputs not in get_args(Inputs):
            raise OptionError(f"Unknown inputs {inputs!r}; expected one of {', '.join(map(repr, get_args(Inputs)))}.")
        if num_mixtures < 1 or not 0 < max_frequency < math.inf:
            raise OptionError(
                f"num_mixtures must be at least 1 and max_frequency > 0; got {num_mixtures} and {max_frequency}."
            )
        if (
            not isinstance(network, nn.Sequential)
            or not is_plain_mlp(network)
            or not isinstance(network[-1], nn.Linear)
        ):
            raise ModelError(
                "A deep kernel needs a Sequential of Linear and elementwise layers that ends in a Linear, which is "
                "left out, such as bayesmeta.nets.mlp(…)."
            )
        if type(likelihood) is not Gaussian:
            raise UnsupportedError(
                f"The exact marginal likelihood of a GP needs a Gaussian likelihood; got {type(likelihood).__name__}."
            )
        head = network[-1]
        if head.out_features != 1:
            raise UnsupportedError(
                f"A deep kernel is for one output; this network has {head.out_features}. Use BayesianLastLayer for "
                "several."
            )
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        widths = {"raw": linear[0].in_features, "features": head.in_features}
        width = sum(widths.values()) if inputs == "both" else widths[inputs]
        self.inputs: Inputs = inputs
        self.trunk = nn.Sequential(*copy.deepcopy(list(network)[:-1])) if inputs != "raw" else None
        self.likelihood = copy.deepcopy(likelihood)
        self.kernel_name = kernel if isinstance(kernel, str) else type(kernel).__name__
        generator = as_generator(seed, stream="spectral mixture")
        made = _make(kernel, width, num_mixtures, max_frequency, generator).to(head.weight)
        self.dense = _Dense(made)
        self.mean = nn.Parameter(head.weight.new_zeros(()), requires_grad=learn_mean)

    @classmethod
    def of(cls, model: Any, kernel: KernelName | kernels.Kernel = "rbf", **options: Any) -> DeepKernelModel:
        """The network and likelihood of a network model, whose last layer is left out.

        Raises:
            UnsupportedError: for anything but a :class:`~bayesmeta.NeuralTaskModel`, or one with covariates.
        """
        if not isinstance(model, NeuralTaskModel):
            raise UnsupportedError(
                "A deep kernel takes a NeuralTaskModel (its network without the last layer gives the features) or a "
                f"DeepKernelModel; got {type(model).__name__}. A Pyro program goes into ABML, MAML or NUTS."
            )
        if model.prior.covariates:
            raise UnsupportedError("A deep kernel does not see covariates w; use covariates=0, or append w to x.")
        return cls(model.central_network(), model.likelihood, kernel, **options)  # type: ignore[arg-type]

    @property
    def kernel(self) -> kernels.Kernel:
        """The GPyTorch kernel; its hyper-parameters are θ."""
        return self.dense.kernel

    @property
    def noise_variance(self) -> Tensor:
        """Variance of the noise, a float64 scalar.

        Raises:
            UnsupportedError: for a likelihood with several scales.
        """
        scale = self.likelihood.scale
        if scale.numel() != 1:
            raise UnsupportedError(f"A deep kernel is for one output; the likelihood has {scale.numel()} scales.")
        return scale.double().square().reshape(())

    # -- covariances --------------------------------------------------------------------------------------------

    def points(self, observations: Observations) -> Tensor:
        """What the kernel compares at each shot, ``[tasks, shots, width]``, float64; padding is at x = 0."""
        x = observations.x
        if observations.mask is not None:
            x = x.masked_fill(~observations.mask.unsqueeze(-1), 0.0)
        if self.trunk is None:
            return x.double()
        features = self.trunk(x)
        return (torch.cat([x, features], -1) if self.inputs == "both" else features).double()

    def covariance(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Prior covariance of the function at points ``[tasks, N, width]`` and ``[tasks, M, width]``: float64 N × M.

        Without b: of the points with themselves.
        """
        columns = (a if b is None else b).shape[-2]
        if a.shape[-2] == 0 or columns == 0:
            return a.new_zeros(*a.shape[:-1], columns)
        tensors = {**dict(self.dense.named_parameters()), **dict(self.dense.named_buffers())}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        return torch.func.functional_call(self.dense, wide, (a,) if b is None else (a, b))

    def kept_covariance(self, points: Tensor, keep: Tensor, noise_variance: Tensor | float) -> Tensor:
        """Covariance at observed points, jitter and noise on the diagonal; rows of padding are the identity's."""
        prior = self.covariance(points)
        diagonal = prior.diagonal(dim1=-2, dim2=-1)
        covariance = prior + torch.diag_embed(JITTER * diagonal + noise_variance)
        eye = torch.eye(points.shape[-2], dtype=prior.dtype, device=prior.device)
        return torch.where(keep.unsqueeze(-1) & keep.unsqueeze(-2), covariance, eye)

    def residual(self, observations: Observations) -> Tensor:
        """y less the process's mean, float64 ``[tasks, shots]``, 0 at padding."""
        assert observations.y is not None
        return (observations.y.double() - self.mean.double()).masked_fill(~observations.full_mask(), 0.0)

    def log_evidence(self, observations: Observations) -> Tensor:
        """log p(y | x, θ), ``[tasks]`` (Rasmussen & Williams 2006, eq. 2.30), in the dtype of y.

        Raises:
            DataError: for a covariance that is not positive definite, naming tasks.
        """
        self.check_targets(observations)
        assert observations.y is not None
        keep = observations.full_mask()
        root = cholesky(self.kept_covariance(self.points(observations), keep, self.noise_variance))
        white = torch.linalg.solve_triangular(root, self.residual(observations).unsqueeze(-1), upper=False)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = -0.5 * white.square().sum((-2, -1)) - log_det - 0.5 * _LOG_2PI * keep.double().sum(-1)
        return value.to(observations.y.dtype)

    # -- as a task program --------------------------------------------------------------------------------------

    def _pyro_program(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        observations = Observations(x, y, mask)
        keep = observations.full_mask()
        root = cholesky(self.kept_covariance(self.points(observations), keep, self.noise_variance))
        loc = self.mean.expand(x.shape[:-1])
        value = None if y is None else torch.where(keep, y, loc).unsqueeze(-2)
        with task_plate(x):
            if not bool(keep.all()):  # padding has variance 1 and its mean as its value: take its density off again
                pyro.factor("padding", (0.5 * _LOG_2PI * (~keep).double().sum(-1)).to(loc).unsqueeze(-1))
            fn = dist.MultivariateNormal(loc.unsqueeze(-2), scale_tril=root.to(loc).unsqueeze(-3))
            return pyro.sample("y", fn, obs=value).squeeze(-2)

    def prepare(self, observations: Observations) -> DeepKernelModel:
        """Check the data, at the first ones; there are no sites to find.

        Raises:
            ShapeError: for features that the network does not take, or several outputs.
        """
        if self._layout is None:
            self._layout = Layout((), (), ("y",), observations.num_features)
            try:
                with torch.no_grad():
                    points = self.points(observations)
                    self.covariance(points[:1])
            except RuntimeError as error:
                self._layout = None
                raise ShapeError(
                    f"Network or kernel cannot take x with {observations.num_features} features: {error}"
                ) from error
        self.check(observations)
        self.check_targets(observations)
        return self

    def check_targets(self, observations: Observations, theta: Tensor | None = None) -> None:
        """Check that there is one real target a shot.

        Raises:
            ShapeError: for several outputs.
        """
        if observations.y is not None and observations.y.dim() != 2:
            raise ShapeError(f"A deep kernel is for targets y [tasks, shots]; got {list(observations.y.shape)}.")

    def evaluate(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Pass:
        """Refused: a Gaussian process has no finite φ.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "φ of a Gaussian process is a function: it has no finite vector u to adapt. Use DeepKernel, whose "
            "posterior is exact; or a NeuralTaskModel with another method."
        )

    def prior_moments(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean 0 and standard deviation 1 of the whitened function values at the shots, each ``[tasks, shots]``."""
        shape = observations.x.shape[:-1]
        return observations.x.new_zeros(shape), observations.x.new_ones(shape)


def _make(
    kernel: Any, width: int, num_mixtures: int, max_frequency: float, generator: torch.Generator
) -> kernels.Kernel:
    if isinstance(kernel, kernels.Kernel):
        if kernel.batch_shape.numel() != 1 or len(kernel.batch_shape):
            raise OptionError(f"The kernel has batch shape {list(kernel.batch_shape)}; expected one without.")
        return copy.deepcopy(kernel)
    if kernel not in get_args(KernelName):
        raise OptionError(
            f"Unknown kernel {kernel!r}; expected one of {', '.join(map(repr, get_args(KernelName)))}, or a kernel of "
            "gpytorch.kernels."
        )
    if kernel == "spectral_mixture":
        mixture = kernels.SpectralMixtureKernel(num_mixtures=num_mixtures, ard_num_dims=width)
        uniform = torch.rand(num_mixtures, 1, width, generator=generator, dtype=torch.float64)
        # equal first components would stay equal
        mixture.mixture_means = (max_frequency * uniform).clamp(min=1e-3 * max_frequency)
        mixture.mixture_scales = torch.full_like(uniform, max_frequency / 10)
        mixture.mixture_weights = torch.full((num_mixtures,), 1.0 / num_mixtures)
        return mixture
    order = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}
    if kernel == "linear":
        return kernels.LinearKernel()
    base = kernels.RBFKernel() if kernel == "rbf" else kernels.MaternKernel(nu=order[kernel])
    return kernels.ScaleKernel(base)


def cholesky(covariance: Tensor) -> Tensor:
    """The Cholesky factor of each task's covariance, ``[tasks, N, N]``.

    Raises:
        DataError: when one is not positive definite, naming the tasks.
    """
    root, info = torch.linalg.cholesky_ex(covariance)
    bad = (info > 0) | ~root.isfinite().flatten(-2).all(-1)
    if bool(bad.any()):
        raise DataError(
            f"The covariance of the points is not finite and positive definite for {_tasks(bad.nonzero().flatten())}, "
            f"also with {JITTER} of the variance added to its diagonal. Inputs or features may be huge or not finite, "
            "a kernel of your own no kernel, or the noise scale too small: standardise the data, or start from a "
            "larger noise scale."
        )
    return root


def _tasks(bad: Iterable[Any]) -> str:
    tasks = [int(i) for i in bad]
    names = ", ".join(map(str, tasks[:5])) + (", …" if len(tasks) > 5 else "")
    return f"{len(tasks)} task(s), counted from 0: {names}"
