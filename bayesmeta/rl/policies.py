"""Policies: heads that turn a network's outputs into distributions over actions, and networks with one φ a task.

A head knows how many numbers it needs from the network for each state (``outputs``), and how many that do not depend on
the state (``free``, the log standard deviations of a Gaussian). Distributions are Pyro's; their batch shape is that of
the states, and the numbers of one action are their event. Nothing here draws from a global generator.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.errors import ModelError, OptionError, ShapeError, SpaceError
from bayesmeta.ops.batched import BatchedMLP, BatchedModule, FlatParameters, is_plain_mlp, unsafe_modules
from bayesmeta.ops.random import forked_rng, normal_like

Distribution = torch.distributions.Distribution


class Head(Protocol):
    """Turns a network's outputs into a distribution over actions."""

    outputs: int
    free: int

    def distribution(self, outputs: Tensor, free: Tensor | None = None) -> Any:
        """The distribution for each state.

        Args:
            outputs: of the network, ``[…, outputs]``.
            free: numbers that do not depend on the state, broadcastable to ``[…, free]``.
        """

    def initial_free(self) -> Tensor:
        """Where the free numbers start, ``[free]``."""


class CategoricalHead:
    """One of ``actions`` discrete actions; the outputs are logits.

    Args:
        actions: how many there are.
    """

    free = 0

    def __init__(self, actions: int) -> None:
        if actions < 1:
            raise OptionError(f"A discrete policy needs at least one action; got {actions}.")
        self.outputs = actions

    def distribution(self, outputs: Tensor, free: Tensor | None = None) -> Any:
        """Categorical, batch shape ``[…]``; actions are int64 ``[…]``."""
        return dist.Categorical(logits=outputs, validate_args=False)

    def initial_free(self) -> Tensor:
        """No numbers."""
        return torch.zeros(0)


class GaussianHead:
    """Actions of ``size`` real numbers: independent Gaussians whose means are the outputs.

    Args:
        size: numbers in one action.
        log_std: first log standard deviation. It does not depend on the state (as in Schulman et al. 2015, TRPO).
        min_log_std: a floor, below which it counts as that; the gradient is then 0 (Duan et al. 2016).
    """

    def __init__(self, size: int, *, log_std: float = 0.0, min_log_std: float = math.log(1e-6)) -> None:
        if size < 1:
            raise OptionError(f"A continuous policy needs actions of at least one number; got {size}.")
        if not min_log_std <= log_std < math.inf:
            raise OptionError(f"log_std must be finite and at least min_log_std = {min_log_std:g}; got {log_std}.")
        self.outputs = self.free = size
        self.log_std, self.min_log_std = log_std, min_log_std

    def distribution(self, outputs: Tensor, free: Tensor | None = None) -> Any:
        """Independent Normal, batch shape ``[…]``, event ``[size]``."""
        scale = _scale(outputs, free, self.log_std, self.min_log_std)
        return dist.Normal(outputs, scale, validate_args=False).to_event(1)

    def initial_free(self) -> Tensor:
        """The first log standard deviations, ``[size]``."""
        return torch.full((self.free,), self.log_std)


class SquashedGaussianHead:
    """Actions in a box: a Gaussian whose draws go through tanh and are stretched to [low, high].

    Source: T. Haarnoja, A. Zhou, P. Abbeel, S. Levine, "Soft Actor-Critic", ICML 2018, https://arxiv.org/abs/1801.01290,
    appendix C. Mean and log standard deviation both depend on the state, clamped to ``log_std_range`` (as there).

    Args:
        low, high: ends of the box, ``[size]``, finite, or numbers with ``size`` given.
        size: numbers in one action; read off ``low`` where that is a tensor.
        log_std_range: lowest and highest log standard deviation.
    """

    free = 0

    def __init__(
        self,
        low: Tensor | float = -1.0,
        high: Tensor | float = 1.0,
        size: int | None = None,
        *,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
    ) -> None:
        self.low, self.high = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
        ends = torch.stack(torch.broadcast_tensors(self.low, self.high))
        if not torch.isfinite(ends).all() or not (ends[0] < ends[1]).all():
            raise OptionError(f"A squashed policy needs finite bounds with low < high; got {low} and {high}.")
        self.size = size if size is not None else self.low.numel()
        self.outputs = 2 * self.size
        self.log_std_range = log_std_range

    def distribution(self, outputs: Tensor, free: Tensor | None = None) -> Any:
        """:class:`SquashedNormal`, batch shape ``[…]``, event ``[size]``."""
        loc, log_std = outputs.chunk(2, -1)
        low, high = self.low.to(loc), self.high.to(loc)
        return SquashedNormal(loc, log_std.clamp(*self.log_std_range).exp(), low, high)

    def initial_free(self) -> Tensor:
        """No numbers."""
        return torch.zeros(0)


class SquashedNormal(dist.TransformedDistribution):
    """low + (high − low) (1 + tanh u) / 2 with u ~ Normal(loc, scale); the last dimension is one action's numbers.

    Densities of draws come from u itself (:meth:`rsample_with_log_prob`), so that none is lost where tanh is flat. For
    an action from elsewhere u is recovered; one that stands on an end of the box counts as just inside of it.

    Args:
        loc, scale: of u, ``[…, size]``.
        low, high: ends of the box, broadcastable to that.
    """

    def __init__(self, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> None:
        self.loc, self.scale, self.low, self.high = loc, scale, low, high
        self.middle, self.half = (low + high) / 2, (high - low) / 2
        transforms = [
            dist.transforms.TanhTransform(),
            dist.transforms.AffineTransform(self.middle.expand_as(loc), self.half.expand_as(loc)),
        ]
        super().__init__(dist.Normal(loc, scale, validate_args=False).to_event(1), transforms, validate_args=False)

    def squash(self, u: Tensor) -> Tensor:
        """u to actions."""
        return self.middle + self.half * u.tanh()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of actions, ``[…]``."""
        edge = 1 - torch.finfo(value.dtype).eps
        return self._log_prob(((value - self.middle) / self.half).clamp(-edge, edge).atanh())

    def rsample_with_log_prob(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Actions ``[…, size]`` and their log density ``[…]``, both with gradients for loc and scale."""
        u = self.loc + self.scale * normal_like(self.loc, self.loc.shape, generator)
        return self.squash(u), self._log_prob(u)

    def _log_prob(self, u: Tensor) -> Tensor:
        # log(1 − tanh² u) without cancellation
        slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u)) + self.half.log()
        return self.base_dist.log_prob(u) - slope.sum(-1)


def _scale(outputs: Tensor, free: Tensor | None, log_std: float, floor: float) -> Tensor:
    if free is None:
        return torch.full_like(outputs, math.exp(log_std))
    return free.clamp_min(floor).exp().expand_as(outputs)


def head_for(space: Any, *, squashed: bool = False, log_std: float = 0.0) -> Head:
    """The head for a gymnasium action space: Categorical for ``Discrete``, Gaussian for ``Box``.

    Args:
        space: of one environment.
        squashed: keep actions inside the box by tanh; else the environment clips what is outside.
        log_std: first log standard deviation of a Gaussian that is not squashed.

    Raises:
        SpaceError: for ``squashed`` actions of a discrete space, and for a space of another kind.
        OptionError: for ``squashed`` actions of an unbounded space.
    """
    from bayesmeta.rl.protocols import num_features  # gymnasium stays unimported until an environment is used

    size, discrete = num_features(space), hasattr(space, "n")
    if not squashed:
        return CategoricalHead(size) if discrete else GaussianHead(size, log_std=log_std)
    if discrete:
        raise SpaceError(f"squashed=True is for continuous actions; the space is {space}. Leave it out.")
    low, high = (torch.as_tensor(end).flatten() for end in (space.low, space.high))
    return SquashedGaussianHead(low, high, size)


# -- distributions ------------------------------------------------------------------------------------------------


def sample(distribution: Any, generator: torch.Generator) -> Tensor:
    """Draw actions under an explicit generator, without a gradient.

    Categorical draws are argmax(logits + Gumbel noise), Gaussian ones mean + standard deviation × noise, so that one
    generator state gives one noise whatever the policy. Any other distribution draws in a forked random state.
    """
    with torch.no_grad():
        if isinstance(distribution, torch.distributions.Categorical):
            exponential = torch.empty_like(distribution.logits).exponential_(generator=generator)
            return (distribution.logits - exponential.log()).argmax(-1)
        if isinstance(distribution, SquashedNormal):
            return distribution.rsample_with_log_prob(generator)[0]
        base = distribution.base_dist if isinstance(distribution, torch.distributions.Independent) else distribution
        if isinstance(base, torch.distributions.Normal):
            return base.loc + base.scale * normal_like(base.loc, base.loc.shape, generator)
        with forked_rng(generator):
            return distribution.sample()


def mode(distribution: Any) -> Tensor:
    """The likeliest action (of a squashed Gaussian: that of the mean of u)."""
    if isinstance(distribution, SquashedNormal):
        return distribution.squash(distribution.loc).detach()
    return distribution.mode.detach()


def kl(old: Distribution, new: Distribution) -> Tensor:
    """KL(old ‖ new) for each state, in nats; no gradient goes through ``old``."""
    if isinstance(old, SquashedNormal) and isinstance(new, SquashedNormal):  # one and the same map of u
        old, new = old.base_dist, new.base_dist
    return torch.distributions.kl_divergence(detached(old), new)


def detached(distribution: Any) -> Any:
    """The same distribution without gradients.

    Raises:
        OptionError: for a distribution that no head here gives.
    """
    if isinstance(distribution, torch.distributions.Categorical):
        return dist.Categorical(logits=distribution.logits.detach(), validate_args=False)
    if isinstance(distribution, SquashedNormal):
        return SquashedNormal(
            distribution.loc.detach(), distribution.scale.detach(), distribution.low, distribution.high
        )
    base = getattr(distribution, "base_dist", None)
    if isinstance(distribution, torch.distributions.Independent) and isinstance(base, torch.distributions.Normal):
        return dist.Normal(base.loc.detach(), base.scale.detach(), validate_args=False).to_event(1)
    raise OptionError(f"Expected a distribution of one of this module's heads; got {type(distribution).__name__}.")


# -- one φ a task -------------------------------------------------------------------------------------------------


class TaskPolicy(nn.Module):
    """A policy whose parameters φ are one flat vector for each task, so that all tasks act and adapt at once.

    θ is ``start``, where every task's φ begins: the network's weights and the head's free numbers.

    Args:
        network: features to the head's outputs; a Sequential of Linear and elementwise layers goes the fast path (one
            batched product a layer), any other module goes through ``vmap``.
        head: see :class:`Head`.

    Raises:
        ModelError: for modules that mix tasks, draw hidden noise, or have buffers.
    """

    def __init__(self, network: nn.Module, head: Head) -> None:
        super().__init__()
        bad = unsafe_modules(network)
        if bad or any(True for _ in network.buffers()):
            raise ModelError(
                f"The policy's network must have no buffers, running statistics or dropout; got "
                f"{', '.join(bad) or ', '.join(name for name, _ in network.named_buffers())}. Use LayerNorm."
            )
        self.head = head
        weights = {name: value.detach() for name, value in network.named_parameters()}
        self.flat = FlatParameters({n: w.shape for n, w in weights.items()} | {"free": torch.Size((head.free,))})
        like = next(iter(weights.values()))
        start = self.flat.flatten(weights | {"free": head.initial_free().to(like)})
        self.start = nn.Parameter(start.clone())
        self._network = _without_free(BatchedMLP if is_plain_mlp(network) else BatchedModule, network, self.flat)

    @property
    def size(self) -> int:
        """How many numbers φ has."""
        return self.flat.size

    @property
    def theta(self) -> nn.Parameter:
        """θ: here the start itself, ``[D]``."""
        return self.start

    def begin(self, theta: Tensor, tasks: int) -> Tensor:
        """Where each task's φ begins, ``[tasks, D]``: θ itself."""
        return theta.expand(tasks, -1)

    def distribution(self, phi: Tensor, features: Tensor, theta: Tensor | None = None) -> Any:
        """Each task's policy in its own states.

        Args:
            phi: ``[tasks, D]``, or ``[D]`` for one φ for all.
            features: ``[…, tasks, copies, F]``: of one step, or with time before the tasks.
            theta: not read: φ is the whole policy.

        Returns:
            A distribution of batch shape ``[…, tasks, copies]``.

        Raises:
            ShapeError: when the tasks of φ and of the states differ.
        """
        tasks = features.shape[-3]
        phi = phi.expand(tasks, -1) if phi.dim() == 1 else phi
        if phi.shape != (tasks, self.size):
            raise ShapeError(
                f"phi has shape {list(phi.shape)}; expected [tasks, D] = {[tasks, self.size]} for states of shape "
                f"{list(features.shape)}."
            )
        lead, copies = features.shape[:-3], features.shape[-2]
        rows = features.movedim(-3, 0).flatten(1, -2)  # [tasks, … × copies, F]
        outputs = self._network(phi, rows).unflatten(1, (*lead, copies)).movedim(0, -3)
        free = self.flat.views(phi)["free"].unsqueeze(1) if self.head.free else None
        return self.head.distribution(outputs, free)


class ContextPolicy(nn.Module):
    """A policy that all tasks share, but for a context φ beside its inputs that begins at 0: CAVIA's.

    Source: L. Zintgraf, K. Shiarlis, V. Kurin, K. Hofmann, S. Whiteson, "Fast Context Adaptation via Meta-Learning",
    ICML 2019, https://arxiv.org/abs/1810.03642, section 3.2.

    Args:
        network: states and context side by side ``[…, F + context]`` to the head's outputs; it is copied into θ.
        head: see :class:`Head`.
        context: numbers in φ.

    Raises:
        OptionError: for a context without numbers.
        ModelError: for modules that mix tasks, draw hidden noise, or have buffers.
    """

    def __init__(self, network: nn.Module, head: Head, context: int) -> None:
        super().__init__()
        if context < 1:
            raise OptionError(f"The context needs at least one number; got {context}.")
        whole = TaskPolicy(network, head)
        self.head, self.size, self.flat = head, context, whole.flat
        self.theta = nn.Parameter(whole.start.detach().clone())
        self._network = (copy.deepcopy(network).requires_grad_(False),)  # a tuple: θ is the only parameter

    def begin(self, theta: Tensor, tasks: int) -> Tensor:
        """Contexts of 0, ``[tasks, context]``."""
        return theta.new_zeros(tasks, self.size)

    def distribution(self, phi: Tensor, features: Tensor, theta: Tensor | None = None) -> Any:
        """Each task's policy in its own states.

        Args:
            phi: ``[tasks, context]``.
            features: ``[…, tasks, copies, F]``.
            theta: the shared parameters; None is the policy's own.

        Returns:
            A distribution of batch shape ``[…, tasks, copies]``.

        Raises:
            ShapeError: when the tasks of φ and of the states differ.
        """
        if phi.shape != (features.shape[-3], self.size):
            raise ShapeError(
                f"phi has shape {list(phi.shape)}; expected [tasks, context] = {[features.shape[-3], self.size]}."
            )
        views = self.flat.views(self.theta if theta is None else theta)
        free = views.pop("free")
        beside = phi.unsqueeze(-2).expand(*features.shape[:-1], self.size)
        outputs = torch.func.functional_call(self._network[0], views, (torch.cat([features, beside], -1),))
        return self.head.distribution(outputs, free if self.head.free else None)


def _without_free(kind: type[BatchedModule], network: nn.Module, flat: FlatParameters) -> BatchedModule:
    """The batched network on the whole of φ, of which it takes its own weights."""
    if kind is BatchedMLP:
        return BatchedMLP(network, flat)

    class Own(BatchedModule):
        def _single(self, phi: Tensor, x: Tensor) -> Tensor:
            views = {name: view for name, view in self.flat.views(phi).items() if name != "free"}
            return torch.func.functional_call(self.network, views, (x,))

    return Own(network, flat)
