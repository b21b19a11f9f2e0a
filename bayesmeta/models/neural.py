"""A network as a task program, with a fast path beside the Pyro trace."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, ModelError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.handlers import Pass
from bayesmeta.models.likelihoods import Gaussian, Likelihood
from bayesmeta.models.plates import shot_plate, task_plate
from bayesmeta.models.priors import Normal, Prior, as_prior
from bayesmeta.models.program import TaskProgram, refuse_outside
from bayesmeta.ops.batched import BatchedMLP, BatchedModule, FlatParameters, is_plain_mlp, unsafe_modules
from bayesmeta.ops.mlp_gradient import GaussianMLPGradient
from bayesmeta.ops.random import Seed, as_generator, forked_rng

SITE = "phi"


class NeuralTaskModel(TaskProgram):
    """A network whose weights, or some of them, are the task parameters.

    The Pyro program has one latent site ``phi`` of event shape ``[D]`` (all task-specific weights in one vector) and
    one observed site ``y``. Densities take a fast path without Pyro, equal to the trace: batched matrix products for
    a Sequential of Linear and elementwise layers, ``functional_call`` under ``vmap`` for any other module.

    Args:
        network: maps ``[shots, features]`` to ``[shots, outputs]``. Its weights are copied: they become the centre
            of the prior (those that are task-specific) or shared meta-parameters (the rest).
        likelihood: a :class:`~bayesmeta.likelihoods.Likelihood`.
        prior: a :class:`~bayesmeta.priors.Prior`, or ``"point"`` or ``"normal"``: standard deviation 1 for the head
            alone, else 0.1, to begin with.
        task_modules: which modules hold task parameters: ``"all"``, ``"head"`` (the last Linear), or names as in
            ``network.named_modules()``.

    Raises:
        ModelError: for a network with running statistics or dropout, which would let tasks see each other or draw
            hidden noise, and for one without parameters.
        OptionError: for a module name that is not there.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        prior: Prior | str = "normal",
        *,
        task_modules: str | Sequence[str] = "all",
    ) -> None:
        bad = unsafe_modules(network)
        if bad:
            raise ModelError(
                f"The network has modules that mix tasks or draw hidden noise: {', '.join(bad)}. Use LayerNorm or "
                "GroupNorm, InstanceNorm without running statistics, and dropout 0."
            )
        if len(list(network.parameters())) != len(list(network.named_parameters(remove_duplicate=False))):
            raise ModelError(
                "The network uses one parameter in two places (tied weights, or a module that appears twice). Task "
                "parameters would untie them; give each layer parameters of its own."
            )
        network = copy.deepcopy(network)
        names = _task_parameters(network, task_modules)
        weights = dict(network.named_parameters())
        flat = FlatParameters({n: weights[n].shape for n in names})
        head_is_task = is_plain_mlp(network) and _is_last_linear(network, names)
        initial = torch.cat([weights[n].detach().flatten() for n in names])
        super().__init__(self._pyro_program)
        self.flat = flat
        self.task_modules = task_modules
        self.network = network
        for name in names:  # they live in the prior now; the network keeps no second copy that no optimizer moves
            _to_buffer(network, name)
        self.likelihood = likelihood
        if prior == "normal" and head_is_task:
            prior = Normal(1.0)  # a head on learned features; 0.1 is for weights that move a little from their start
        self.prior = as_prior(prior)
        self.prior.set_up(initial)
        self.uses_mlp_path = is_plain_mlp(network)
        self._head_is_task = head_is_task
        self._fused = GaussianMLPGradient(network, flat) if GaussianMLPGradient.serves(network, flat) else None
        self._network_call = (BatchedMLP if self.uses_mlp_path else BatchedModule)(network, flat)

    # -- the Pyro program ---------------------------------------------------------------------------------------

    def _pyro_program(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        with task_plate(x):
            phi = pyro.sample(SITE, self.prior.distribution())
            with shot_plate(x, mask):
                return pyro.sample("y", self._distribution(phi.squeeze(-2), x, mask), obs=y)

    def _distribution(self, u: Tensor, x: Tensor, mask: Tensor | None) -> Any:
        """The likelihood's distribution at φ, with batch shape ``[…, tasks, shots]``."""
        inputs, exposure = self.likelihood.split(x, mask)
        return self.likelihood.distribution(self._forward(u, inputs), **exposure)

    def output(self, u: Tensor, x: Tensor) -> Tensor:
        """Network outputs ``[…, tasks, shots, outputs]``.

        Args:
            u: task-specific weights, ``[…, tasks, D]``; one task's weights serve all tasks.
            x: ``[tasks, shots, features]``, the likelihood's exposure included, if it has one.
        """
        return self._forward(u, self.likelihood.split(x)[0])

    def _forward(self, u: Tensor, x: Tensor) -> Tensor:
        lead = u.shape[:-2]
        rows = (
            u.reshape(-1, u.shape[-1]) if u.shape[-2] == x.shape[0] else u.expand(*lead, x.shape[0], -1).flatten(0, -2)
        )
        out = self._network_call(rows, x)
        if out.shape[0] != rows.shape[0]:  # every layer is shared
            out = out.expand(rows.shape[0] // out.shape[0], *out.shape).flatten(0, 1)
        return out.reshape(*lead, x.shape[0], *out.shape[1:])

    @property
    def blocks(self) -> dict[str, slice]:
        """Where each task-specific tensor of the network lies in u."""
        stops = list(itertools.accumulate(self.flat.sizes))
        return {n: slice(stop - size, stop) for n, size, stop in zip(self.flat.shapes, self.flat.sizes, stops)}

    @property
    def head(self) -> str | None:
        """Name of the last Linear of the network; None where there is none."""
        return _head(self.network)

    def start_parameters(self) -> list[nn.Parameter]:
        """What :meth:`learned_start` is made of: the centre of the prior."""
        return [self.prior.get_parameter("loc")]

    # -- the last layer as a linear model -----------------------------------------------------------------------

    @property
    def is_linear_in_phi(self) -> bool:
        """Whether the task parameters are exactly the last Linear of a Sequential, so that outputs are linear in φ."""
        return self._head_is_task

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviation of a Gaussian likelihood.

        Raises:
            UnsupportedError: for another likelihood, and for one with a scale of its own for each output.
        """
        if type(self.likelihood) is not Gaussian:  # a subclass may be another distribution
            raise UnsupportedError(
                f"A closed form needs a Gaussian likelihood; this model has {type(self.likelihood).__name__}."
            )
        scale = self.likelihood.scale
        if scale.dim():
            raise UnsupportedError(
                f"A closed form needs one scale for all outputs; this Gaussian has {scale.shape[0]}. Give it one "
                "number, and bring the outputs into units in which it is shared."
            )
        return scale

    def last_layer_design(self, x: Tensor) -> Tensor:
        """The matrix A with outputs = A φ, ``[tasks, shots × outputs, D]``, for a last layer that is task-specific.

        Raises:
            UnsupportedError: when the outputs are not linear in the task parameters.
        """
        if not self.is_linear_in_phi:
            raise UnsupportedError(
                "A closed form needs outputs that are linear in the task parameters: a Sequential that ends in a "
                f"Linear, with task_modules='head'. This model has task_modules={self.task_modules!r}."
            )
        assert isinstance(self.network, nn.Sequential)
        features = self.network[:-1](self.likelihood.split(x)[0])
        head = self.network[-1]
        assert isinstance(head, nn.Linear)
        if head.bias is not None:
            features = torch.cat([features, features.new_ones(*features.shape[:-1], 1)], -1)
        outputs = head.out_features
        if outputs == 1:  # weight [1, F] then bias [1]: the flat order is that of the columns
            return features
        weight, ones = features[..., : head.in_features], features[..., head.in_features :]
        eye = torch.eye(outputs, dtype=x.dtype, device=x.device)
        blocks = torch.einsum("...f,op->...opf", weight, eye).flatten(-2)
        if head.bias is not None:
            blocks = torch.cat([blocks, ones.unsqueeze(-1) * eye], -1)
        return blocks.flatten(-3, -2)

    # -- fast path ----------------------------------------------------------------------------------------------

    def prepare(self, observations: Observations) -> NeuralTaskModel:
        """Check that the network takes these features and that its outputs and the likelihood fit the targets."""
        if not self.is_prepared:
            self._check_exposure(observations)
            self._try_network(observations)
            self.check_targets(observations)
        super().prepare(observations)
        return self

    def check(self, observations: Observations) -> None:
        """Check the feature width, and that the exposure is positive where the likelihood has one.

        Raises:
            ShapeError: for another width than that of the first data.
            DataError: for an exposure that is not positive, naming task and shot.
        """
        super().check(observations)
        self._check_exposure(observations)

    def _check_exposure(self, observations: Observations) -> None:
        exposure = self.likelihood.split(observations.x)[1].get("exposure")
        if exposure is None:
            return
        bad = (~((exposure > 0) & exposure.isfinite()) & observations.full_mask()).nonzero()
        if len(bad):
            task, shot = bad[0].tolist()
            raise DataError(
                f"The exposure (column {self.likelihood.exposure} of x) is {exposure[task, shot].item():.4g} at task "
                f"{task}, shot {shot} (counted from 0); an exposure is positive, in raw units. Do not standardise that "
                "column, and drop rows without exposure."
            )

    def _try_network(self, observations: Observations) -> None:
        u, likelihood = self.prior.loc.detach()[None], self.likelihood
        inputs, exposure = likelihood.split(observations.x.new_ones(1, 2, observations.num_features))
        try:
            with torch.no_grad():
                out = self._forward(u, inputs)
        except RuntimeError as error:
            beside = " beside the exposure" if exposure else ""
            raise ShapeError(
                f"The network cannot take x with {inputs.shape[-1]} features{beside} in {observations.x.dtype}: "
                f"{error}. Give the network that input width, and model and data one dtype and device (.to())."
            ) from error
        if observations.y is not None:
            self._check_outputs(out, exposure, observations.y)

    def _check_outputs(self, out: Tensor, exposure: dict[str, Tensor], y: Tensor) -> None:
        likelihood, width = self.likelihood, 1 if y.dim() == 2 else y.shape[-1]
        name, advice = type(likelihood).__name__, "Change the network's output width."
        wanted = likelihood.num_outputs(width)
        if wanted is not None and wanted != out.shape[-1]:
            raise ShapeError(
                f"The network has {out.shape[-1]} output(s); a {name} likelihood takes {wanted} for y of width {width} "
                f"(shape {list(y.shape)}). {advice}"
            )
        try:
            with torch.no_grad():
                event = tuple(likelihood.distribution(out, **exposure).event_shape)
        except RuntimeError as error:
            raise ShapeError(f"The likelihood cannot take outputs of width {out.shape[-1]}: {error}.") from error
        if event != tuple(y.shape[2:]):
            raise ShapeError(
                f"The likelihood on {out.shape[-1]} network output(s) describes targets of shape "
                f"{['tasks', 'shots', *event]}; y has width {width} and shape {list(y.shape)}. {advice}"
            )

    def check_targets(self, observations: Observations, theta: Tensor | None = None) -> None:
        """Check that the likelihood admits the targets."""
        if observations.y is None or observations.shots == 0:
            return
        with torch.no_grad():
            support = self.predictive(self.prior.loc[None], observations).support
        refuse_outside(support, observations.y, observations.full_mask())

    def log_likelihood(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y | x, φ) of each observation, ``[…, tasks, shots]``; 0 where masked."""
        if observations.y is None:
            raise DataError("A log-likelihood needs targets; these observations have y=None.")
        inputs, exposure = self.likelihood.split(observations.x, observations.mask)
        value = self.likelihood.log_prob(self._forward(u, inputs), observations.y, **exposure)
        if observations.mask is not None:
            value = torch.where(observations.mask, value, 0.0)
        return value

    def log_likelihood_gradient(
        self, u: Tensor, observations: Observations, theta: Tensor | None = None, *, create_graph: bool = False
    ) -> Tensor:
        """∇_u of each task's own log-likelihood, ``[…, tasks, D]``.

        One autograd node where the model allows it (ReLU or tanh MLP, all weights task-specific, Gaussian noise of
        fixed scale), else plain autograd. With ``create_graph`` the result can be differentiated once in θ and u.
        """
        likelihood, y = self.likelihood, observations.y
        scale = likelihood.scale if type(likelihood) is Gaussian and not likelihood.learn_scale else None
        if self._fused is None or scale is None or y is None or observations.x.requires_grad or y.requires_grad:
            return super().log_likelihood_gradient(u, observations, theta, create_graph=create_graph)
        weight = scale**-2  # one for all outputs, or [outputs]
        y = y if y.dim() == 3 else y.unsqueeze(-1)
        if observations.mask is not None:
            weight = weight * observations.mask.unsqueeze(-1)
        rows, x = u.reshape(-1, u.shape[-1]), observations.x
        if rows.shape[0] != x.shape[0]:
            copies = rows.shape[0] // x.shape[0]
            x, y = x.repeat(copies, 1, 1), y.repeat(copies, 1, 1)
            weight = weight if weight.dim() < 3 else weight.repeat(copies, 1, 1)
        with torch.set_grad_enabled(create_graph):
            return self._fused(rows, x, y, weight).reshape(u.shape)

    def log_prior(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(φ | θ), ``[…, tasks]``."""
        return self.prior.distribution().log_prob(u)

    def log_joint(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y, φ | x, θ), ``[…, tasks]``."""
        return self.log_likelihood(u, observations).sum(-1) + self.log_prior(u, observations)

    def trace_joint(self, u: Tensor, observations: Observations) -> Pass:
        """The same densities by the Pyro trace, to hold the fast path against."""
        return super().evaluate(u, observations)

    def named(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> dict[str, Tensor]:
        """Task-specific weights by their names in the network, each ``[…, tasks, *shape]``."""
        return self.flat.views(u)

    def sample_prior(
        self, num_samples: int, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw φ from p(φ | θ): u ``[n, tasks, D]``, and None."""
        with torch.no_grad(), forked_rng(as_generator(generator, observations.device, "program")):
            return self.prior.distribution().sample((num_samples, observations.num_tasks)), None

    def prior_moments(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, each ``[tasks, D]``."""
        moments = self.gaussian_prior(observations)
        if moments is None:
            raise ModelError(
                f"The prior {type(self.prior).__name__} has no moments; a method that needs a density wants "
                "prior='normal'."
            )
        return moments

    def learned_start(self, observations: Observations) -> Tensor:
        """The centre of the prior, which is θ, ``[tasks, D]``."""
        return self.prior.loc.expand(observations.num_tasks, -1)

    def gaussian_prior(self, observations: Observations) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the prior, each ``[tasks, D]``, if it is a diagonal Gaussian."""
        moments = self.prior.mean_and_scale()
        if moments is None:
            return None
        return moments[0].expand(observations.num_tasks, -1), moments[1].expand(observations.num_tasks, -1)

    def predict(
        self, u: Tensor, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> Tensor:
        """Draw y given φ, ``[…, tasks, shots]`` or ``[…, tasks, shots, outputs]``."""
        with torch.no_grad(), forked_rng(as_generator(generator, observations.device, "program")):
            return self.predictive(u, observations).sample()

    def predictive(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Any:
        """The likelihood's distribution at φ, with batch shape ``[…, tasks, shots]``."""
        return self._distribution(u, observations.x, observations.mask)


def _task_parameters(network: nn.Module, task_modules: str | Sequence[str]) -> list[str]:
    """Names of the task-specific parameters, in the network's order."""
    everything = [name for name, _ in network.named_parameters()]
    if not everything:
        raise ModelError("The network has no parameters, so there is nothing to learn.")
    if task_modules == "all":
        return everything
    modules = dict(network.named_modules())
    if task_modules == "head":
        head = _head(network)
        if head is None:
            raise OptionError("task_modules='head' means the last Linear, and this network has none; name the modules.")
        task_modules = [head]
    chosen = [task_modules] if isinstance(task_modules, str) else list(task_modules)
    unknown = [name for name in chosen if name not in modules]
    if unknown:
        raise OptionError(
            f"The network has no module named {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(repr(name) for name in modules if name)}."
        )
    names = [n for n in everything if any(n.startswith(f"{c}.") for c in chosen)]
    if not names:
        raise OptionError(f"The modules {chosen} have no parameters; nothing would be task-specific.")
    return names


def _head(network: nn.Module) -> str | None:
    """Name of the last Linear."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def _is_last_linear(network: nn.Module, names: Sequence[str]) -> bool:
    """Whether the named parameters are those of the last layer of a Sequential, a Linear, and no others."""
    last, module = list(network._modules.items())[-1]
    return isinstance(module, nn.Linear) and set(names) == {f"{last}.{n}" for n, _ in module.named_parameters()}


def _to_buffer(network: nn.Module, name: str) -> None:
    """Turn a parameter into a buffer that no state_dict holds: a placeholder of the right shape."""
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    value = getattr(module, leaf).detach()
    delattr(module, leaf)
    module.register_buffer(leaf, value, persistent=False)
