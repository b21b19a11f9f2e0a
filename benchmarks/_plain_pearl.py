"""PEARL as a plain loop: a gymnasium environment a task, a buffer of arrays a task, and networks called task by task.

The networks are those of :class:`bayesmeta.rl.off_policy.pearl.PEARL`, with the same weights at first and the same
losses; what differs is that nothing is batched over tasks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from bayesmeta.models.encoders import ProductEncoder
from bayesmeta.rl.off_policy.pearl import PEARL


class PlainPEARL:
    """The loop, made from a learner whose encoder is a product of Gaussians.

    Args:
        learner: gives environments' family and tasks, networks and settings.
        seed: of everything drawn.
    """

    def __init__(self, learner: PEARL, seed: int = 0) -> None:
        env: Any = learner.env
        encoder = learner.policy.latent.recognition.encoder
        assert isinstance(encoder, ProductEncoder)
        self.config, self.episodes = learner.config, env.episodes_per_trial
        tasks = [{name: value[i].numpy() for name, value in env.tasks.as_dict().items()} for i in range(env.num_tasks)]
        self.envs = [env.family.plain(task=task) for task in tasks]
        networks = learner.policy.networks
        self.half = float(networks.high[0])
        self.actor, self.encoder = copy.deepcopy(networks.actor), copy.deepcopy(encoder)
        self.critics = [_alone(networks.critics, i) for i in range(2)]
        self.targets = [_alone(networks.targets, i).requires_grad_(False) for i in range(2)]
        self.log_alpha = nn.Parameter(networks.log_alpha.detach().clone())
        self.entropy = networks.target_entropy
        rate = self.config.sac.lr
        learned = [p for m in (*self.critics, self.encoder) for p in m.parameters() if p.requires_grad]
        self.learns_critics = torch.optim.Adam(learned, rate)
        self.learns_actor = torch.optim.Adam(self.actor.parameters(), rate)
        self.learns_alpha = torch.optim.Adam([self.log_alpha], rate)
        self.numbers = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.replay: list[list[tuple[Any, ...]]] = [[] for _ in self.envs]
        self.recent: list[list[tuple[Any, ...]]] = [[] for _ in self.envs]

    # -- what the networks say ------------------------------------------------------------------------------------

    def belief(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of one task's z, ``[D]``, from its transitions [s, a, r] ``[n, …]``."""
        if len(rows) == 0:
            return torch.zeros(self.config.latent), torch.ones(self.config.latent)
        information, precision = (self.encoder.network(rows) + self.encoder.affine(rows)).chunk(2, -1)
        total = 1 + softplus(precision).sum(0)
        return information.sum(0) / total, total.rsqrt()

    def draw(self, states: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Actions on [−1, 1] of one task's states ``[n, …]``, and their log densities ``[n]``."""
        outputs = self.actor(torch.cat([states, z.expand(len(states), -1)], -1))
        loc, log_std = outputs.chunk(2, -1)
        scale = log_std.clamp(-20, 2).exp()
        noise = torch.randn(loc.shape, generator=self.generator)
        u = loc + scale * noise
        slope = 2 * (math.log(2) - u - softplus(-2 * u))
        return u.tanh(), (-0.5 * noise**2 - scale.log() - 0.5 * math.log(2 * math.pi) - slope).sum(-1)

    def value(self, critics: Sequence[nn.Module], states: Tensor, z: Tensor, actions: Tensor) -> list[Tensor]:
        """Each critic's values, ``[n]``."""
        pairs = torch.cat([states, z.expand(len(states), -1), actions], -1)
        return [critic(pairs).squeeze(-1) for critic in critics]

    # -- collecting -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self) -> int:
        """A trial in each task, one after the other; how many steps that were."""
        steps = 0
        for index, env in enumerate(self.envs):
            self.recent[index] = []
            for _ in range(self.episodes):
                steps += self._episode(index, env)
        return steps

    def _episode(self, index: int, env: Any) -> int:
        loc, scale = self.belief(self._rows(self.recent[index]))
        z = loc + scale * torch.randn(loc.shape, generator=self.generator)
        state, _ = env.reset()
        for step in range(env.horizon):
            action, _ = self.draw(torch.as_tensor(state)[None], z)
            move = self.half * action[0].numpy()
            after, reward, terminated, truncated, info = env.step(move)
            known = (state, move, reward, info["dense_reward"], after, terminated)
            self.recent[index].append(known)
            self.replay[index].append(known)
            state = after
            if terminated or truncated:
                return step + 1
        return int(env.horizon)

    def _rows(self, known: list[tuple[Any, ...]]) -> Tensor:
        if not known:
            return torch.zeros(0, 0)
        return torch.as_tensor(np.array([[*k[0], *k[1], k[2]] for k in known], dtype=np.float32))

    # -- learning -------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """One gradient step on some of the tasks, one after the other."""
        config, losses, later = self.config, [], []
        chosen = self.numbers.permutation(len(self.envs))[: config.meta_batch]
        for index in chosen:
            loss, states, z = self._critic_loss(index)
            losses.append(loss)
            later.append((states, z.detach()))
        self._step(self.learns_critics, torch.stack(losses).mean())
        each = [self._actor_loss(states, z) for states, z in later]
        self._step(self.learns_actor, torch.stack([loss for loss, _ in each]).mean())
        entropy = torch.cat([log_prob for _, log_prob in each]).detach().mean() + self.entropy
        self._step(self.learns_alpha, -self.log_alpha * entropy)
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics):
                for p, q in zip(target.parameters(), critic.parameters()):
                    p.lerp_(q, config.sac.polyak)

    def _critic_loss(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        picked = self.numbers.integers(len(self.recent[index]), size=config.context_batch)
        loc, scale = self.belief(self._rows([self.recent[index][i] for i in picked]))
        z = loc + scale * torch.randn(loc.shape, generator=self.generator)
        kl = 0.5 * (loc**2 + scale**2 - 1 - 2 * scale.log()).sum()
        picked = self.numbers.integers(len(self.replay[index]), size=config.batch)
        columns = zip(*[self.replay[index][i] for i in picked])
        state, action, _, reward, after, terminated = (torch.as_tensor(np.array(c)).float() for c in columns)
        with torch.no_grad():
            chosen, log_prob = self.draw(after, z)
            following = torch.stack(self.value(self.targets, after, z, chosen)).amin(0)
            following = following - self.log_alpha.exp() * log_prob
            target = config.sac.reward_scale * reward + config.sac.gamma * (1 - terminated) * following
        values = self.value(self.critics, state, z, action / self.half)
        loss = 0.5 * torch.stack([(value - target).square().mean() for value in values]).sum()
        return loss + config.kl_weight * kl, state, z

    def _actor_loss(self, states: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        action, log_prob = self.draw(states, z)
        value = torch.stack(self.value(self.critics, states, z, action)).amin(0)
        return (self.log_alpha.detach().exp() * log_prob - value).mean(), log_prob

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()


def _alone(critics: Any, index: int) -> nn.Sequential:
    """One of several critics as a network of its own."""
    layers: list[nn.Module] = []
    for weight, bias in zip(critics.weights, critics.biases):
        layer = nn.Linear(*weight.shape[1:])
        layer.weight.data.copy_(weight[index].T)
        layer.bias.data.copy_(bias[index, 0])
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
