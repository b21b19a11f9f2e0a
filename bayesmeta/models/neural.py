"""A network as a task program, with a fast path beside the Pyro trace."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import ModelError, OptionError, UnsupportedError
from bayesmeta.models.likelihoods import Gaussian, Likelihood
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.priors import Normal, Prior, as_prior
from bayesmeta.ops.batched import BatchedMLP, BatchedModule, FlatParameters, is_plain_mlp, unsafe_modules
from bayesmeta.ops.lowered import in_bfloat16, is_lowered
from bayesmeta.ops.mlp_gradient import GaussianMLPGradient


class NeuralTaskModel(NetworkProgram):
    """A network whose weights, or some of them, are the task parameters.

    The Pyro program has one latent site ``phi`` of event shape ``[D]`` (all task-specific weights in one vector) and
    one observed site ``y``. Densities take a fast path without Pyro, equal to the trace: batched matrix products for
    a Sequential of Linear and elementwise layers, ``functional_call`` under ``vmap`` for any other module.

    Args:
        network: maps ``[shots, features]`` to ``[shots, outputs]``. Its weights are copied: they become the centre
            of the prior (those that are task-specific) or shared meta-parameters (the rest).
        likelihood: a :class:`~bayesmeta.likelihoods.Likelihood`.
        prior: a :class:`~bayesmeta.priors.Prior`, or the name of one: ``"point"``, ``"normal"`` (standard deviation 1
            for the head alone, else 0.1, to begin with), or another of :mod:`bayesmeta.priors`.
        task_modules: which modules hold task parameters: ``"all"``, ``"head"`` (the last Linear), or names as in
            ``network.named_modules()``.
        covariates: width of the task-level covariates w, on which the prior's mean then depends linearly: p(φ | θ, w).
            0: w is not used.

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
        covariates: int = 0,
    ) -> None:
        recurrent = [name or "(root)" for name, m in network.named_modules() if isinstance(m, nn.RNNBase)]
        if recurrent:
            raise ModelError(
                f"The network has recurrent modules ({', '.join(recurrent)}), which torch cannot run with one set of "
                "weights a task. Write the recurrence with Linear layers, or use attention."
            )
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
        if prior == "normal" and head_is_task:
            prior = Normal(1.0)  # a head on learned features; 0.1 is for weights that move a little from their start
        super().__init__(likelihood, as_prior(prior), initial, flat, covariates)
        self.task_modules = task_modules
        self.network = network
        for name in names:  # they live in the prior now; the network keeps no second copy that no optimizer moves
            _to_buffer(network, name)
        self.uses_mlp_path = is_plain_mlp(network)
        self._head_is_task = head_is_task
        self._fused = GaussianMLPGradient(network, flat) if GaussianMLPGradient.serves(network, flat) else None
        self._network_call = (BatchedMLP if self.uses_mlp_path else BatchedModule)(network, flat)

    # -- the network on task weights ------------------------------------------------------------------------------

    def _forward(self, u: Tensor, x: Tensor) -> Tensor:
        lead = u.shape[:-2]
        rows = (
            u.reshape(-1, u.shape[-1]) if u.shape[-2] == x.shape[0] else u.expand(*lead, x.shape[0], -1).flatten(0, -2)
        )
        out = in_bfloat16(self._network_call, rows, x)
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

    def central_network(self) -> nn.Module:
        """A copy of the network as an ordinary module, its task-specific weights at the centre of the prior."""
        network = copy.deepcopy(self.network)
        for name, value in self.flat.views(self.prior.loc.detach().clone()).items():
            path, _, leaf = name.rpartition(".")
            module = network.get_submodule(path)
            del module._buffers[leaf]
            module.register_parameter(leaf, nn.Parameter(value.clone()))
        return network

    # -- the last layer as a linear model -----------------------------------------------------------------------

    @property
    def is_linear_in_phi(self) -> bool:
        """Whether the task parameters are exactly the last Linear of a Sequential, so that outputs are linear in φ."""
        return self._head_is_task

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviation of a Gaussian likelihood, a scalar or ``[outputs]``.

        Raises:
            UnsupportedError: for another likelihood.
        """
        if type(self.likelihood) is not Gaussian:  # a subclass may be another distribution
            raise UnsupportedError(
                f"A closed form needs a Gaussian likelihood; this model has {type(self.likelihood).__name__}."
            )
        return self.likelihood.scale

    def noise_rows(self, shots: int) -> Tensor:
        """The scale of the noise for each row of :meth:`last_layer_design`: a scalar, or ``[shots × outputs]``."""
        scale = self.noise_scale
        return scale.repeat(shots) if scale.dim() else scale

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
        head = self.network.get_submodule(self.head or "")
        assert isinstance(head, nn.Linear)
        return head_design(self.features(x), head.out_features, head.bias is not None)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer of a Sequential takes, ``[tasks, shots, F]``, for a last layer that is task-specific.

        Raises:
            UnsupportedError: when the outputs are not linear in the task parameters.
        """
        if not self.is_linear_in_phi:
            raise UnsupportedError(
                "Features are what a task-specific last layer takes: of a Sequential that ends in a Linear, with "
                f"task_modules='head'. This model has task_modules={self.task_modules!r}."
            )
        assert isinstance(self.network, nn.Sequential)
        return self.network[:-1](self.likelihood.split(x)[0])

    def log_likelihood_gradient(
        self, u: Tensor, observations: Observations, theta: Tensor | None = None, *, create_graph: bool = False
    ) -> Tensor:
        """∇_u of each task's own log-likelihood, ``[…, tasks, D]``.

        One autograd node where the model allows it (ReLU or tanh MLP, all weights task-specific, Gaussian noise of
        fixed scale), else plain autograd. With ``create_graph`` the result can be differentiated once in θ and u.
        """
        likelihood, y = self.likelihood, observations.y
        scale = likelihood.scale if type(likelihood) is Gaussian and not likelihood.learn_scale else None
        by_hand = self._fused is not None and not is_lowered()  # it has no casts
        if not by_hand or scale is None or y is None or observations.x.requires_grad or y.requires_grad:
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
        assert self._fused is not None
        with torch.set_grad_enabled(create_graph):
            return self._fused(rows, x, y, weight).reshape(u.shape)

    def named(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> dict[str, Tensor]:
        """Task-specific weights by their names in the network, each ``[…, tasks, *shape]``."""
        return self.flat.views(u)


def head_design(features: Tensor, outputs: int, bias: bool) -> Tensor:
    """The matrix A with A φ the outputs of a Linear whose weight and bias, flattened one after the other, are φ.

    Args:
        features: ``[…, shots, F]``.
        outputs: width of the Linear.
        bias: whether it has one.

    Returns:
        ``[…, shots × outputs, D]``, the outputs of a shot side by side.
    """
    ones = features.new_ones(*features.shape[:-1], 1)
    if outputs == 1:  # weight [1, F] then bias [1]: the flat order is that of the columns
        return torch.cat([features, ones], -1) if bias else features
    eye = torch.eye(outputs, dtype=features.dtype, device=features.device)
    blocks = torch.einsum("...f,op->...opf", features, eye).flatten(-2)
    if bias:
        blocks = torch.cat([blocks, ones.unsqueeze(-1) * eye], -1)
    return blocks.flatten(-3, -2)


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
        if head == "":  # the network is a Linear
            return everything
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
