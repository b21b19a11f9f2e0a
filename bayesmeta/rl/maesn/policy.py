"""A policy that holds a latent through an episode, and the Gaussians that the latents of the tasks are drawn from.

A task's variational parameters ω = (μ, log σ) are one flat vector ``[2 × latent]``; its latents z ~ Normal(μ, σ) are
drawn once an episode (:mod:`bayesmeta.rl.maesn.learner`).
"""

from __future__ import annotations

import copy
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.rl.policies import Head, TaskPolicy

#: log σ counts as that of the nearer end outside of it, with a gradient of 0: no step makes σ 0 or infinite.
LOG_SCALES = (-6.0, 3.0)


class LatentPolicy(nn.Module):
    """π(a | s, z): a network that reads a state and a latent side by side.

    Args:
        network: states and latent side by side ``[…, F + latent]`` to the head's outputs.
        head: see :class:`~bayesmeta.rl.policies.Head`.
        latent: numbers in z.

    Attributes:
        theta: the network's weights and the head's free numbers, one flat vector ``[D]``.

    Raises:
        OptionError: for a latent without numbers.
        ModelError: for modules that mix tasks, draw hidden noise, or have buffers.
    """

    def __init__(self, network: nn.Module, head: Head, latent: int) -> None:
        super().__init__()
        if latent < 1:
            raise OptionError(f"The latent needs at least one number; got {latent}.")
        self.latent, self.head = latent, head
        self._by_task = TaskPolicy(network, head)
        self.flat = self._by_task.flat
        self._network = (copy.deepcopy(network).requires_grad_(False),)  # a tuple: θ is the only parameter

    @property
    def theta(self) -> nn.Parameter:
        """θ, ``[D]``."""
        return self._by_task.start

    @property
    def size(self) -> int:
        """How many numbers θ has."""
        return self.flat.size

    def distribution(self, theta: Tensor, features: Tensor, z: Tensor) -> Any:
        """The policy of each episode in its own states.

        Args:
            theta: ``[D]``, shared by all tasks, or ``[tasks, D]``.
            features: ``[…, tasks, copies, F]``: of one step, or with time before the tasks.
            z: of each episode, ``[tasks, copies, latent]``.

        Returns:
            A distribution of batch shape ``[…, tasks, copies]``.

        Raises:
            ShapeError: for latents that are not one for each episode.
        """
        if z.shape != (*features.shape[-3:-1], self.latent):
            raise ShapeError(
                f"z has shape {list(z.shape)}; expected [tasks, copies, latent] = "
                f"{[*features.shape[-3:-1], self.latent]} for states of shape {list(features.shape)}."
            )
        inputs = torch.cat([features, z.expand(*features.shape[:-1], self.latent)], -1)
        if theta.dim() > 1:
            return self._by_task.distribution(theta, inputs)
        views = self.flat.views(theta)
        free = views.pop("free")
        outputs = torch.func.functional_call(self._network[0], views, (inputs,))
        return self.head.distribution(outputs, free if self.head.free else None)


def prior_omega(tasks: int, latent: int, like: Tensor) -> Tensor:
    """ω of the prior Normal(0, 1), zeros ``[tasks, 2 × latent]`` in the dtype and on the device of ``like``."""
    return like.new_zeros(tasks, 2 * latent)


def latent_distribution(omega: Tensor) -> Any:
    """q_ω(z) = Normal(μ, σ), batch shape ``[…]``, event ``[latent]``.

    Args:
        omega: μ and log σ side by side, ``[…, 2 × latent]``.
    """
    loc, log_scale = omega.chunk(2, -1)
    return dist.Normal(loc, log_scale.clamp(*LOG_SCALES).exp(), validate_args=False).to_event(1)


def latents(omega: Tensor, noise: Tensor) -> Tensor:
    """z = μ + σ × noise, with gradients for ω.

    Args:
        omega: ``[tasks, 2 × latent]``.
        noise: standard normal, ``[tasks, copies, latent]``.
    """
    normal = latent_distribution(omega.unsqueeze(1)).base_dist
    return normal.loc + normal.scale * noise
