"""Chains: what happened in whole trials, kept in the order of time, and how beliefs learn from their beginnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import CheckpointError, OptionError, ReplayError, ShapeError, UnsupportedError
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.latent.contexts import prefix
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.mixture import MixtureContext


class Chains:
    """The contexts of the last trials of some tasks, all of one length, as a ring.

    Args:
        capacity: trials kept of each environment.

    Raises:
        OptionError: for a capacity below 1.
    """

    def __init__(self, capacity: int) -> None:
        if not is_whole(capacity, 1):
            raise OptionError(f"capacity of chains must be a whole number of at least 1; got {capacity!r}.")
        self.capacity = capacity
        self.added = 0
        self._fields: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Trials held of each environment."""
        return min(self.added, self.capacity)

    def add(self, context: Observations) -> None:
        """Keep one trial of each environment, ``[envs, steps, …]``; the oldest goes.

        Raises:
            ShapeError: when it has other shapes than those held.
        """
        assert context.y is not None
        given = {"x": context.x, "y": context.y, "mask": context.full_mask()}
        if not self._fields:
            self._fields = {name: v.new_zeros(self.capacity, *v.shape) for name, v in given.items()}
        for name, value in given.items():
            if value.shape != self._fields[name].shape[1:]:
                raise ShapeError(
                    f"{name} of a trial has shape {list(value.shape)}; those held have "
                    f"{list(self._fields[name].shape[1:])}. Trials must be of one length."
                )
            self._fields[name][self.added % self.capacity] = value.detach()
        self.added += 1

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Observations, Tensor]:
        """Draw trials uniformly, with replacement.

        Args:
            batch: how many.
            generator: on the device of what was added.

        Returns:
            Contexts ``[batch, steps, …]``, and of which environment each is, ``[batch]``.

        Raises:
            ReplayError: when there are none.
        """
        if not self.added:
            raise ReplayError("There are no trials to draw from; add() some first.")
        envs, device = self._fields["x"].shape[1], self._fields["x"].device
        which = torch.randint(len(self) * envs, (batch,), generator=generator, device=device)
        x, y, mask = (self._fields[name].flatten(0, 1)[which] for name in ("x", "y", "mask"))
        return Observations(x, y, mask), which % envs

    def state_dict(self) -> dict[str, Any]:
        """What is drawn later depends on; places never written to are left out."""
        return {
            "capacity": self.capacity,
            "added": self.added,
            "fields": {name: value[: len(self)].clone() for name, value in self._fields.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from a state, bit for bit.

        Raises:
            CheckpointError: when it is of another capacity.
        """
        if state["capacity"] != self.capacity:
            raise CheckpointError(f"The state keeps {state['capacity']} trials; here it is {self.capacity}.")
        self.added, self._fields = state["added"], {}
        for name, value in state["fields"].items():
            room = value.new_zeros(self.capacity, *value.shape[1:]).to(device)
            room[: len(value)] = value.to(device)
            self._fields[name] = room


def distillation_loss(
    belief: MixtureContext | LatentContext, context: Observations, z: Tensor, steps: Tensor
) -> Tensor:
    """−log q(z | the first entries of a context), the mean over contexts and prefixes, differentiable in q.

    Args:
        belief: q.
        context: ``[batch, shots, …]`` in the order of time.
        z: draws of the tasks' own Gaussians, ``[batch, D]``.
        steps: lengths of the prefixes, an index ``[m]``.
    """
    return -_beliefs_after(belief, context, steps).log_prob(z.detach()).mean()


def _beliefs_after(belief: MixtureContext | LatentContext, context: Observations, steps: Tensor) -> Any:
    """q after some numbers of entries, of batch shape ``[m, batch]``."""
    if isinstance(belief, MixtureContext):
        return belief.beliefs(context, steps)
    try:
        belief.first_state(1)
    except UnsupportedError:  # an encoder that reads whole sets: one pass for each prefix
        each = [belief.posterior(prefix(context, int(n))).base_dist for n in steps]
        loc, scale = (torch.stack([getattr(q, name) for q in each]) for name in ("loc", "scale"))
    else:
        q = belief.beliefs(context).base_dist
        loc, scale = q.loc[steps], q.scale[steps]
    return dist.Normal(loc, scale, validate_args=False).to_event(1)
