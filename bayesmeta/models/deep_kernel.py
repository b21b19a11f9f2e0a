"""A Gaussian process for each task whose kernel, on learned features, is shared by the tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, ModelError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.handlers import Layout, Pass
from bayesmeta.models.kernels import DenseKernel, KernelName, kernels, make_kernel
from bayesmeta.models.labels import (
    Link,
    balanced_mean,
    choose_link,
    is_of_labels,
    label_support,
    num_columns,
    to_labels,
    to_targets,
)
from bayesmeta.models.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.plates import task_plate
from bayesmeta.models.program import TaskProgram, refuse_outside
from bayesmeta.ops.batched import is_plain_mlp
from bayesmeta.ops.random import Seed, as_generator

#: What the kernel compares: x, the network's features f(x), or [x, f(x)].
Inputs = Literal["raw", "features", "both"]

#: Added to the prior variance of the function at each observed point, as a share of it (see :meth:`jitter`).
JITTER = 1e-8
_LOG_2PI = math.log(2 * math.pi)


class DeepKernelModel(TaskProgram):
    """y = f(x) + noise, f a draw of a Gaussian process for each task; mean, kernel, features and noise are θ.

    The Pyro program has the function integrated out: one observed site ``y``, a multivariate normal over a task's
    shots, and no latent site. So φ is a function and has no finite vector u: methods that adapt one (MAML, ABML, NUTS)
    refuse this model; :class:`~bayesmeta.DeepKernel` takes it. All covariances are float64, whatever the dtype.

    With a Categorical or Bernoulli likelihood, labels are regressed on as targets ±1 under Gaussian noise, so that
    everything stays in closed form: for K classes there are K independent functions of one kernel, mean and noise, each
    of one class (+1) against the rest (−1); for a Bernoulli one, of the label 1. The observed site is then
    ``targets``, and a program without y returns the label of drawn targets: the class of the largest, or whether the
    one is positive.

    Args:
        network: a Sequential of Linear and elementwise layers that ends in a Linear; that last layer is left out, and
            the rest gives the features. Copied.
        likelihood: Gaussian, Categorical or Bernoulli, for one output. Copied.
        kernel: ``"rbf"``, ``"matern12"``, ``"matern32"``, ``"matern52"``, ``"linear"``, ``"cosine"`` (linear in the
            directions of its inputs, the paper's CosSim), each times a learned variance; ``"spectral_mixture"``; or a
            GPyTorch kernel of your own, copied, with no batch shape.
        inputs: what the kernel compares: ``"features"``, as the paper; ``"raw"`` x; or ``"both"``, side by side.
        num_mixtures: components of the spectral mixture.
        max_frequency: the first frequencies of the spectral mixture are drawn from U(0, this), in cycles a unit of its
            inputs.
        learn_mean: whether the process has a constant mean that is trained; else it stays as it begins: at 0, for K
            classes at 2 / K − 1, the mean of their targets where they are equally frequent. It is one for all classes,
            so that without a support they are equally probable; for a Bernoulli it is what label is the more frequent.
        seed: of the first frequencies; None means seed 0.
        mean_network: a network of its own from x to one output, added to the constant mean: the mean function of the
            process, shared by the tasks. Copied. Only for real numbers.
        link: of labels only: from the functions to class probabilities, ``"probit"`` (the default) or ``"sigmoid"``;
            see :class:`~bayesmeta.GPLabelsPosterior`. It may be changed after training.
        noise: of labels only: standard deviation of the ±1 targets around the function, 0.3 by default.
        learn_noise: of labels only: whether it is trained (the default).

    Raises:
        OptionError: for an unknown kernel, inputs or link, numbers out of range, or options of labels for real numbers.
        ModelError: for another kind of network.
        UnsupportedError: for another likelihood, or several outputs.
        ShapeError: for a network with another number of outputs than the Categorical has classes.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Gaussian | Categorical | Bernoulli,
        kernel: KernelName | kernels.Kernel = "rbf",
        *,
        inputs: Inputs = "features",
        num_mixtures: int = 4,
        max_frequency: float = 1.0,
        learn_mean: bool = True,
        seed: Seed = None,
        mean_network: nn.Module | None = None,
        link: Link | None = None,
        noise: float | None = None,
        learn_noise: bool | None = None,
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
        head = network[-1]
        _check_likelihood(likelihood, head.out_features)
        self.link = choose_link(likelihood, link, noise, learn_noise)
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        widths = {"raw": linear[0].in_features, "features": head.in_features}
        width = sum(widths.values()) if inputs == "both" else widths[inputs]
        self.inputs: Inputs = inputs
        self.trunk = nn.Sequential(*copy.deepcopy(list(network)[:-1])) if inputs != "raw" else None
        self.likelihood = copy.deepcopy(likelihood)
        if self.link is not None:
            scale = Gaussian(0.3 if noise is None else noise, learn_scale=learn_noise is not False)
            self.target_noise = scale.to(head.weight)
        self.kernel_name = kernel if isinstance(kernel, str) else type(kernel).__name__
        generator = as_generator(seed, stream="spectral mixture")
        made = make_kernel(kernel, width, num_mixtures, max_frequency, generator).to(head.weight)
        self.dense = DenseKernel(made)
        first = 0.0 if self.link is None else balanced_mean(self.likelihood)
        self.mean = nn.Parameter(head.weight.new_full((), first), requires_grad=learn_mean)
        if mean_network is not None and self.link is not None:
            raise UnsupportedError("mean_network is for real numbers; classes share one constant mean.")
        self.mean_network = copy.deepcopy(mean_network)

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
        """Variance of the noise (of labels, of their ±1 targets), a float64 scalar.

        Raises:
            UnsupportedError: for a likelihood with several scales.
        """
        gaussian = self.likelihood if self.link is None else self.target_noise
        assert isinstance(gaussian, Gaussian)
        scale = gaussian.scale
        if scale.numel() != 1:
            raise UnsupportedError(f"A deep kernel is for one output; the likelihood has {scale.numel()} scales.")
        return scale.double().square().reshape(())

    @property
    def columns(self) -> int:
        """How many functions a task has: one for each class of a Categorical, else one."""
        return num_columns(self.likelihood)

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

    def jitter(self, variance: Tensor) -> Tensor:
        """What is added to the prior variance of the function at points, so that it can be factorised.

        A share of each point's own variance, as rounding errors are: a share of a task's largest would drown points
        whose variance is small. But a linear or cosine kernel has variance 0 at 0, and the function is its mean there:
        such a point gets a variance of ``JITTER²`` of the noise's, which no observation can see.

        Args:
            variance: prior variances, float64, any shape.
        """
        return JITTER * torch.maximum(variance, JITTER * self.noise_variance)

    def kept_covariance(self, points: Tensor, keep: Tensor, noise_variance: Tensor | float) -> Tensor:
        """Covariance at observed points, jitter and noise on the diagonal; rows of padding are the identity's."""
        prior = self.covariance(points)
        covariance = prior + torch.diag_embed(self.jitter(prior.diagonal(dim1=-2, dim2=-1)) + noise_variance)
        eye = torch.eye(points.shape[-2], dtype=prior.dtype, device=prior.device)
        return torch.where(keep.unsqueeze(-1) & keep.unsqueeze(-2), covariance, eye)

    def targets(self, observations: Observations) -> Tensor:
        """What is regressed on, y or its labels as ±1, ``[tasks, shots, columns]``; at padding any number."""
        assert observations.y is not None
        if self.link is None:
            return observations.y.unsqueeze(-1)
        return to_targets(self.likelihood, observations.y, observations.full_mask()).to(self.mean)

    def mean_shift(self, observations: Observations) -> Tensor:
        """What ``mean_network`` adds to the constant mean at each shot, float64 ``[tasks, shots]``; 0 without one.

        Raises:
            ShapeError: for a mean network with another number of outputs than one.
        """
        x = observations.x
        if self.mean_network is None:
            return x.new_zeros(x.shape[:-1], dtype=torch.float64)
        if observations.mask is not None:
            x = x.masked_fill(~observations.mask.unsqueeze(-1), 0.0)
        shift = self.mean_network(x)
        if shift.shape != (*x.shape[:-1], 1):
            raise ShapeError(
                f"The mean network gives shape {list(shift.shape)} for x {list(x.shape)}; expected one output."
            )
        return shift.squeeze(-1).double()

    def residual(self, observations: Observations) -> Tensor:
        """The targets less the process's mean, float64 ``[tasks, shots, columns]``, 0 at padding."""
        keep = observations.full_mask().unsqueeze(-1)
        mean = self.mean.double() + self.mean_shift(observations).unsqueeze(-1)
        return (self.targets(observations).double() - mean).masked_fill(~keep, 0.0)

    def log_evidence(self, observations: Observations) -> Tensor:
        """log p(y | x, θ), ``[tasks]`` (Rasmussen & Williams 2006, eq. 2.30), in the dtype of x.

        Of labels: the log-density of their ±1 targets, the sum over the classes' functions.

        Raises:
            DataError: for a covariance that is not positive definite, naming tasks.
        """
        self.check_targets(observations)
        return self.density(*self.noisy_joint(observations), observations)

    def noisy_joint(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """Covariance of the targets and what they are off their mean: ``[tasks, N, N]``, ``[tasks, N, columns]``."""
        keep = observations.full_mask()
        return self.kept_covariance(self.points(observations), keep, self.noise_variance), self.residual(observations)

    def density(self, covariance: Tensor, residual: Tensor, observations: Observations) -> Tensor:
        """Log-density of ``residual`` ``[…, tasks, N, columns]``, in the dtype of x, ``[…, tasks]``.

        Raises:
            DataError: for a covariance that is not positive definite, naming tasks.
        """
        root = cholesky(covariance)
        white = torch.linalg.solve_triangular(root, residual, upper=False)
        count = observations.full_mask().double().sum(-1)
        constant = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * _LOG_2PI * count
        value = -0.5 * white.square().sum((-2, -1)) - self.columns * constant
        return value.to(observations.x.dtype)

    # -- as a task program --------------------------------------------------------------------------------------

    def _pyro_program(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        observations = Observations(x, y, mask)
        keep = observations.full_mask()
        root = cholesky(self.kept_covariance(self.points(observations), keep, self.noise_variance)).to(self.mean)
        mean = self.mean + self.mean_shift(observations).to(self.mean)
        loc = mean.unsqueeze(-2)
        value = (
            None if y is None else torch.where(keep.unsqueeze(-1), self.targets(observations), mean.unsqueeze(-1)).mT
        )
        with task_plate(x):
            if not bool(keep.all()):  # padding has variance 1 and its mean as its value: take its density off again
                padding = 0.5 * _LOG_2PI * self.columns * (~keep).double().sum(-1)
                pyro.factor("padding", padding.to(loc).unsqueeze(-1))
            if self.link is None:
                normal = dist.MultivariateNormal(loc, scale_tril=root.unsqueeze(-3))
                return pyro.sample("y", normal, obs=value).squeeze(-2)
            loc = loc.expand(-1, self.columns, -1).unsqueeze(-3)
            each = dist.MultivariateNormal(loc, scale_tril=root[:, None, None])
            targets = pyro.sample("targets", each.to_event(1), obs=None if value is None else value.unsqueeze(-3))
        return to_labels(self.likelihood, targets.squeeze(-3).mT)

    def prepare(self, observations: Observations) -> DeepKernelModel:
        """Check the data, at the first ones; there are no sites to find.

        Raises:
            ShapeError: for features that the network does not take, or several outputs.
        """
        if self._layout is None:
            site = "y" if self.link is None else "targets"
            self._layout = Layout((), (), (site,), observations.num_features)
            try:
                with torch.no_grad():
                    points = self.points(observations)
                    self.covariance(points[:1])
                    self.mean_shift(observations)
            except (RuntimeError, ShapeError) as error:
                self._layout = None
                raise ShapeError(
                    f"Network or kernel cannot take x with {observations.num_features} features: {error}"
                ) from error
        self.check(observations)
        self.check_targets(observations)
        return self

    def check(self, observations: Observations) -> None:
        """Check the feature width, and labels.

        Raises:
            ShapeError: for another width than that of the first data.
            DataError: for targets that are no labels, naming task and shot.
        """
        super().check(observations)
        if self.link is not None:
            self.check_targets(observations)

    def check_targets(self, observations: Observations, theta: Tensor | None = None) -> None:
        """Check that there is one target a shot, and that it is a label where labels are wanted.

        Raises:
            ShapeError: for several outputs.
            DataError: for targets that are no labels, naming task and shot.
        """
        if observations.y is None:
            return
        if observations.y.dim() != 2:
            raise ShapeError(f"A deep kernel is for targets y [tasks, shots]; got {list(observations.y.shape)}.")
        if self.link is not None:
            refuse_outside(label_support(self.likelihood), observations.y, observations.full_mask())

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
        """Mean 0 and standard deviation 1 of the whitened function values at the shots.

        Returns:
            Each ``[tasks, shots]``; of K classes ``[tasks, K · shots]``, one class after the other.
        """
        shape = (observations.num_tasks, self.columns * observations.shots)
        return observations.x.new_zeros(shape), observations.x.new_ones(shape)


def _check_likelihood(likelihood: Likelihood, num_outputs: int) -> None:
    name, labels = type(likelihood).__name__, is_of_labels(likelihood)
    if type(likelihood) is not Gaussian and not labels:  # a subclass may be another distribution
        raise UnsupportedError(
            "The exact marginal likelihood of a GP needs a Gaussian likelihood, or labels that it regresses on as ±1: "
            f"Categorical or Bernoulli; got {name}. ABML and Laplace take any likelihood."
        )
    if isinstance(likelihood, Categorical):
        if num_outputs != likelihood.num_classes:
            raise ShapeError(
                f"The network has {num_outputs} output(s); a Categorical likelihood of {likelihood.num_classes} "
                "classes takes one for each, as with other methods, though a deep kernel leaves that layer out."
            )
    elif num_outputs != 1:
        instead = "a Categorical for classes" if labels else "BayesianLastLayer for several"
        raise UnsupportedError(f"A deep kernel is for one output; this network has {num_outputs}. Use {instead}.")


def cholesky(covariance: Tensor) -> Tensor:
    """The Cholesky factor of each task's covariance, ``[…, tasks, N, N]``.

    Raises:
        DataError: when one is not positive definite, naming the tasks.
    """
    root, info = torch.linalg.cholesky_ex(covariance)
    bad = (info > 0) | ~root.isfinite().flatten(-2).all(-1)
    if bool(bad.any()):
        bad = bad.reshape(-1, bad.shape[-1]).any(0)
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
