"""Soft actor-critic: the networks, the losses as pure functions of a batch, and one update.

Source: T. Haarnoja, A. Zhou, K. Hartikainen, G. Tucker, S. Ha, J. Tan, V. Kumar, H. Zhu, A. Gupta, P. Abbeel,
S. Levine, "Soft Actor-Critic Algorithms and Applications", 2018, https://arxiv.org/abs/1812.05905, algorithm 1: two
critics, of which the smaller counts, targets that follow slowly, and a temperature that holds the policy's entropy at a
target. The critics' loss is equation 5, the actor's 7, the temperature's 18 (with log α in place of α, as released).

Batches are ``[…, n, …]`` with any leading dimensions, tasks among them, and all tasks share the networks. What is known
of a task comes in as ``context``, numbers beside the state: a latent of PEARL, a belief, or nothing. Its gradient comes
from the critics alone, as in K. Rakelly et al. (PEARL), 2019, https://arxiv.org/abs/1903.08254, algorithm 1.

The policy lives in [−1, 1] for every number of an action, whatever the environment's bounds, so that densities and the
target entropy mean the same everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.errors import NonFiniteLossError, OptionError, ShapeError, SpaceError
from bayesmeta.models.nets import mlp
from bayesmeta.ops.random import as_generator
from bayesmeta.rl.off_policy.replay import Transitions
from bayesmeta.rl.policies import SquashedGaussianHead, SquashedNormal, mode
from bayesmeta.rl.protocols import features, num_features


@dataclasses.dataclass(frozen=True)
class SACConfig:
    """Settings of soft actor-critic.

    Attributes:
        gamma: discount.
        polyak: share of the way that the targets go to the critics in each update.
        lr: Adam's rate for actor and critics.
        temperature_lr: for the temperature; None is ``lr``.
        temperature: α at first.
        learn_temperature: whether α is learned; else it stays.
        target_entropy: of the policy on [−1, 1], in nats; None is −(numbers in an action), the paper's.
        reward_scale: rewards are multiplied by it.
        hidden: widths of the hidden layers of actor and critics.
        max_grad_norm: longer gradients of actor or critics are shortened to it; None leaves them.

    Raises:
        OptionError: for settings outside their range.
    """

    gamma: float = 0.99
    polyak: float = 0.005
    lr: float = 3e-4
    temperature_lr: float | None = None
    temperature: float = 1.0
    learn_temperature: bool = True
    target_entropy: float | None = None
    reward_scale: float = 1.0
    hidden: tuple[int, ...] = (256, 256)
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if not 0 <= self.gamma <= 1 or not 0 < self.polyak <= 1:
            raise OptionError(f"gamma is in [0, 1] and polyak in (0, 1]; got {self.gamma} and {self.polyak}.")
        positive = {"lr": self.lr, "temperature": self.temperature, "reward_scale": self.reward_scale}
        for name in ("temperature_lr", "max_grad_norm"):
            positive |= {} if getattr(self, name) is None else {name: getattr(self, name)}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise OptionError(f"{name} must be positive and finite; got {value}.")
        if self.target_entropy is not None and not math.isfinite(self.target_entropy):
            raise OptionError(f"target_entropy must be finite; got {self.target_entropy}.")
        if not self.hidden or min(self.hidden) < 1:
            raise OptionError(f"hidden needs at least one width of at least 1; got {self.hidden}.")


class TwinCritics(nn.Module):
    """Several critics side by side, one batched product a layer.

    Args:
        inputs: width of what they read.
        hidden: widths of their hidden layers.
        critics: how many.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], critics: int = 2) -> None:
        super().__init__()
        each = [[m for m in mlp(inputs, hidden, 1) if isinstance(m, nn.Linear)] for _ in range(critics)]
        layers = list(zip(*each, strict=True))
        self.weights = nn.ParameterList(torch.stack([m.weight.detach().T for m in layer]) for layer in layers)
        self.biases = nn.ParameterList(torch.stack([m.bias.detach()[None] for m in layer]) for layer in layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Values ``[critics, …]`` of inputs ``[…, inputs]``."""
        rows = inputs.flatten(0, -2)
        h = rows.expand(len(self.weights[0]), *rows.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, h.relu() if i else h, weight)
        return h.squeeze(-1).unflatten(1, inputs.shape[:-1])


class SACNetworks(nn.Module):
    """Actor, critics, their slow targets and the temperature, shared by all tasks.

    Args:
        observation_space, action_space: of one environment; actions are a bounded ``Box``.
        config: settings.
        context: numbers beside the state, of each task or each step; 0 for none.
        seed: of the first weights.

    Raises:
        SpaceError: for actions that are not a bounded box.
        OptionError: for a context below 0.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, observation_space: Any, action_space: Any, config: SACConfig, *, context: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        if context < 0:
            raise OptionError(f"context is how many numbers stand beside the state, 0 or more; got {context}.")
        low, high = _bounds(action_space)
        self.observation_space, self.action_space, self.context = observation_space, action_space, context
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.head = SquashedGaussianHead(-1.0, 1.0, len(low))
        self.target_entropy = -float(len(low)) if config.target_entropy is None else config.target_entropy
        inputs = num_features(observation_space) + context
        generator = as_generator(seed, stream="soft actor-critic")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            self.actor = mlp(inputs, config.hidden, self.head.outputs)
            self.critics = TwinCritics(inputs + len(low), config.hidden)
            self.targets = TwinCritics(inputs + len(low), config.hidden)
        self.targets.load_state_dict(self.critics.state_dict())
        self.targets.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(config.temperature)))

    @property
    def alpha(self) -> Tensor:
        """The temperature, without a gradient."""
        return self.log_alpha.detach().exp()

    def inputs(self, observation: Tensor, context: Tensor | None = None) -> Tensor:
        """States with their context beside them, ``[…, n, features + context]``.

        Args:
            observation: ``[…, n, …]`` of the observation space.
            context: ``[…, context]`` for all n steps of a task, or ``[…, n, context]``.

        Raises:
            ShapeError: for a context of another width, or none where one is read.
        """
        seen = features(self.observation_space, observation, self.log_alpha.dtype)
        width = 0 if context is None else context.shape[-1]
        if width != self.context:
            raise ShapeError(f"These networks read {self.context} number(s) of context; got {width}.")
        if context is None:
            return seen
        if context.dim() == seen.dim() - 1:
            context = context.unsqueeze(-2)
        return torch.cat([seen, context.expand(*seen.shape[:-1], width)], -1)

    def policy(self, inputs: Tensor) -> SquashedNormal:
        """The policy on [−1, 1] for states with their context, ``[…, inputs]``."""
        distribution = self.head.distribution(self.actor(inputs))
        assert isinstance(distribution, SquashedNormal)
        return distribution

    def to_box(self, action: Tensor) -> Tensor:
        """From the policy's [−1, 1] to the environment's actions, ``[…, *shape]``."""
        inside = (self.low + self.high) / 2 + (self.high - self.low) / 2 * action
        return inside.unflatten(-1, self.action_space.shape or ()) if len(self.action_space.shape) != 1 else inside

    def from_box(self, action: Tensor) -> Tensor:
        """The inverse of :meth:`to_box`, ``[…, numbers]``; what is outside of the box is clipped, as it is there."""
        flat = features(self.action_space, action, self.log_alpha.dtype)
        return ((2 * flat - self.low - self.high) / (self.high - self.low)).clamp(-1, 1)

    @torch.no_grad()
    def act(
        self, observation: Tensor, context: Tensor | None, generator: torch.Generator, *, greedy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The environment's actions, and their log densities on [−1, 1].

        Args:
            observation: ``[n, …]``.
            context: ``[n, context]``.
            generator: of the noise; none is drawn when ``greedy``, which takes the mean of u.
            greedy: whether to.
        """
        distribution = self.policy(self.inputs(observation, context))
        if greedy:
            action = mode(distribution)
            return self.to_box(action), distribution.log_prob(action)
        action, log_prob = distribution.rsample_with_log_prob(generator)
        return self.to_box(action), log_prob

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Move the targets by a share of the way to the critics."""
        torch._foreach_lerp_(list(self.targets.parameters()), list(self.critics.parameters()), share)


def _bounds(space: Any) -> tuple[Tensor, Tensor]:
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    if low is None or high is None:
        raise SpaceError(
            f"Soft actor-critic needs a Box of actions; the space is {space}. For others take PPO or TRPO."
        )
    low, high = (torch.as_tensor(end, dtype=torch.float32).flatten() for end in (low, high))
    if not bool(torch.isfinite(torch.stack([low, high])).all()) or not bool((low < high).all()):
        raise SpaceError(
            f"Soft actor-critic needs finite bounds with low < high; the space is {space}. Give it bounds."
        )
    return low, high


# -- the losses -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def soft_value(networks: SACNetworks, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """V(s) = min Q(s, a) − α log π(a | s) with one draw of a, by the slow targets (equation 3), ``[…]``.

    Args:
        networks: see :class:`SACNetworks`.
        inputs: states with their context, ``[…, inputs]``.
        generator: of the draw.
    """
    action, log_prob = networks.policy(inputs).rsample_with_log_prob(generator)
    return networks.targets(torch.cat([inputs, action], -1)).amin(0) - networks.alpha * log_prob


def backup(reward: Tensor, terminated: Tensor, value: Tensor, gamma: float) -> Tensor:
    """r + γ V(s′), and r alone where the episode terminated. A cut by a time limit (truncation) is bootstrapped."""
    return reward + gamma * torch.where(terminated, 0.0, value)


def critic_loss(values: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error, summed over the critics.

    Args:
        values: ``[critics, …]``.
        target: ``[…]``, without a gradient.
    """
    return 0.5 * (values - target).square().flatten(1).mean(1).sum()


def actor_loss(networks: SACNetworks, inputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The mean of α log π(a | s) − min Q(s, a) with one draw of a, and log π ``[…]``.

    Its gradient is meant for the actor alone, as :class:`SACUpdate` takes it.
    """
    action, log_prob = networks.policy(inputs).rsample_with_log_prob(generator)
    value = networks.critics(torch.cat([inputs, action], -1)).amin(0)
    return (networks.alpha * log_prob - value).mean(), log_prob


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """−log α times the mean of log π + target entropy: α grows where the entropy is below its target."""
    return -log_alpha * (log_prob.detach().mean() + target_entropy)


# -- one update -------------------------------------------------------------------------------------------------------


class SACUpdate:
    """The optimizers of networks, and one update of all of them.

    Args:
        networks: to be trained, in place.
        config: settings.
        more: further parameters that the critics' loss trains, such as those of an encoder, or groups for Adam with
            rates of their own.
    """

    def __init__(self, networks: SACNetworks, config: SACConfig, more: Iterable[Any] = ()) -> None:
        self.networks, self.config = networks, config
        more = list(more)
        groups: list[dict[str, Any]] = more if more and isinstance(more[0], Mapping) else [{"params": more}]
        groups = [{**group, "params": list(group["params"])} for group in groups]
        critics = [{"params": list(networks.critics.parameters())}, *groups]
        rate = config.lr if config.temperature_lr is None else config.temperature_lr
        actor: list[dict[str, Any]] = [{"params": list(networks.actor.parameters())}]
        actor += [{"params": [networks.log_alpha], "lr": rate}]
        self.optimizers = {
            "critics": torch.optim.Adam(critics, lr=config.lr, fused=True),
            "actor": torch.optim.Adam(actor, lr=config.lr, fused=True),
        }

    def update(
        self,
        batch: Transitions,
        generator: torch.Generator,
        *,
        context: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Critics, actor, temperature and targets by one step each.

        Args:
            batch: ``[…, n, …]``.
            generator: of the draws of actions.
            context: ``[…, context]`` or ``[…, n, context]``; its gradient is that of the critics' loss and ``extra``.
            extra: a loss that is added to the critics', such as a KL.

        Returns:
            Figures without gradients, on the device: ``critic``, ``actor``, ``entropy``, ``temperature``, ``value``.
        """
        networks, config = self.networks, self.config
        fixed = None if context is None else context.detach()
        now = networks.inputs(batch.observation, fixed)
        value = soft_value(networks, networks.inputs(batch.successor, fixed), generator)
        target = backup(config.reward_scale * batch.reward, batch.terminated, value, config.gamma)
        seen = now if context is None else networks.inputs(batch.observation, context)
        values = networks.critics(torch.cat([seen, networks.from_box(batch.action)], -1))
        loss = critic_loss(values, target)
        self._step("critics", loss if extra is None else loss + extra)
        acting, log_prob = actor_loss(networks, now, generator)
        warming = temperature_loss(networks.log_alpha, log_prob, networks.target_entropy)  # shares nothing with acting
        self._step("actor", acting + warming if config.learn_temperature else acting)
        networks.follow(config.polyak)
        figures = {"critic": loss, "actor": acting, "entropy": -log_prob.mean(), "temperature": networks.alpha}
        return {name: figure.detach() for name, figure in figures.items()} | {"value": values.detach().mean()}

    def _step(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        inputs = [p for group in optimizer.param_groups for p in group["params"] if p is not self.networks.log_alpha]
        learned = [*inputs, self.networks.log_alpha] if name == "actor" and self.config.learn_temperature else inputs
        loss.backward(inputs=learned)  # the actor's loss leaves the critics alone
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(inputs, self.config.max_grad_norm)
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """What the next update depends on beside the networks."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def averaged(figures: Sequence[Mapping[str, Tensor]], iteration: int) -> dict[str, float]:
    """Means of the figures of several updates.

    Raises:
        NonFiniteLossError: when one is not finite.
    """
    means = {name: float(torch.stack([f[name] for f in figures]).mean()) for name in figures[0]} if figures else {}
    for name, value in means.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{name} became {value} in the updates of iteration {iteration}. Try a lower rate (SACConfig.lr), a "
                "smaller reward_scale, or max_grad_norm.",
                iteration,
            )
    return means
