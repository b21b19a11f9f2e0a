"""The decoder: what happens in a task, given z, as a Pyro program with z in its task plate."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, ShapeError, UnsupportedError
from bayesmeta.models.likelihoods import Bernoulli, Gaussian, Likelihood
from bayesmeta.models.nets import mlp
from bayesmeta.models.plates import shot_plate, task_plate
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.latent.contexts import ContextSpec


class TransitionDecoder(nn.Module):
    """p(y | x, z) of the transitions of a context, z ~ N(0, I): rewards, and next states where the spec has them.

    It is a Pyro program ``(x, y=None, mask=None)`` with the latent site ``z`` in the task plate and the observed site
    ``y`` in the shot plate; :meth:`program` is that program as densities over z, which posteriors, NUTS and diagnostics
    take. As in L. Zintgraf et al., "VariBAD", ICLR 2020, https://arxiv.org/abs/1910.08348, eq. 10, rewards and next
    states are independent given x and z.

    Args:
        spec: of the contexts; it says what x and y are.
        latent: D.
        likelihood: of y given the network's outputs, which is copied; None: :class:`~bayesmeta.likelihoods.Bernoulli`
            for binary rewards, else :class:`~bayesmeta.Gaussian` with one standard deviation for each target, learned,
            at first 1.
        hidden: widths of the network's hidden layers.
        activation: as in :func:`bayesmeta.nets.mlp`.
        network: in place of that MLP, which is copied: maps ``[…, features + D]``, z last, to ``[…, outputs]``.
        seed: of the first weights; None means seed 0.
        dtype: of the networks.

    Raises:
        OptionError: for a latent of size 0.
        UnsupportedError: for binary rewards beside next states, which one likelihood cannot describe.
    """

    _like: Tensor

    def __init__(
        self,
        spec: ContextSpec,
        latent: int,
        likelihood: Likelihood | None = None,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        network: nn.Module | None = None,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not is_whole(latent, 1):
            raise OptionError(
                f"latent must be a whole number, at least 1 (a latent of size 0 says nothing); got {latent!r}."
            )
        if spec.binary and spec.outputs > 1:
            raise UnsupportedError(
                f"A context with binary rewards and the targets {spec.targets} has no one likelihood. Use binary=False "
                "or two decoders over one z: one of rewards, one of next states."
            )
        self.spec, self.latent = spec, latent
        if likelihood is None:
            one_each = [1.0] * spec.outputs if spec.outputs > 1 else 1.0
            likelihood = Bernoulli() if spec.binary else Gaussian(one_each, learn_scale=True)
        self.likelihood = copy.deepcopy(likelihood)
        if network is None:
            outputs = likelihood.num_outputs(spec.outputs) or spec.outputs
            with forked_rng(as_generator(seed, stream="decoder")):
                network = mlp(spec.features + latent, hidden, outputs, activation=activation)
        self.network = copy.deepcopy(network)
        self.register_buffer("_like", torch.zeros(()), persistent=False)  # a network of one's own may hold no tensor
        self.to(dtype)
        object.__setattr__(self, "_program", None)  # it holds this module: no cycle among modules

    def output(self, z: Tensor, x: Tensor) -> Tensor:
        """What the network gives, ``[…, tasks, shots, outputs]``.

        Args:
            z: ``[…, tasks, D]``; any dimensions before the tasks.
            x: ``[tasks, shots, features]``, or with the same dimensions before.

        Raises:
            ShapeError: for other widths.
        """
        if (z.shape[-1], x.shape[-1]) != (self.latent, self.spec.features):
            raise ShapeError(
                f"z has {z.shape[-1]} numbers and x {x.shape[-1]}; this decoder takes {self.latent} and "
                f"{self.spec.features} ({', '.join(self.spec.inputs)})."
            )
        lead = torch.broadcast_shapes((*z.shape[:-1], 1), x.shape[:-1])
        return self.network(torch.cat([x.expand(*lead, -1), z.unsqueeze(-2).expand(*lead, -1)], -1))

    def distribution(self, z: Tensor, x: Tensor) -> Any:
        """p(y | x, z) of batch shape ``[…, tasks, shots]``, shapes as in :meth:`output`."""
        return self.likelihood.distribution(self.output(z, x))

    def log_prob(self, z: Tensor, data: Observations) -> Tensor:
        """log p(y | x, z) of each transition, ``[…, tasks, shots]``, 0 where masked; without a pass through Pyro."""
        assert data.y is not None
        value = self.likelihood.log_prob(self.output(z, data.x), data.y)
        return value if data.mask is None else torch.where(data.mask, value, 0.0)

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The Pyro program."""
        with task_plate(x):
            zeros = x.new_zeros(x.shape[-3], 1, self.latent)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            with shot_plate(x, mask):
                return pyro.sample("y", self.distribution(z.squeeze(-2), x), obs=y)

    def program(self) -> TaskProgram:
        """The program as densities over z, ready to be used; always the same object.

        Raises:
            PlateError, ShapeError: for a network of one's own whose outputs do not fit.
        """
        known: TaskProgram | None = self.__dict__["_program"]
        if known is None:
            like = self._like
            y = like.new_zeros((2, 3) if self.spec.outputs == 1 else (2, 3, self.spec.outputs))
            probe = Observations(like.new_zeros(2, 3, self.spec.features), y)
            known = TaskProgram(self).prepare(probe)
            object.__setattr__(self, "_program", known)
        return known
