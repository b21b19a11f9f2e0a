"""A decoder that is linear in what it decodes, with weights that depend on the task.

With one-hot cells for x it has one output for each cell, as the reward decoder of the grid in Zintgraf et al. 2020
(https://arxiv.org/abs/1910.08348, appendix C.1). With actions for x and changes of the state for y it is a linear
system whose matrix is the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.models.likelihoods import Likelihood
from bayesmeta.models.nets import mlp
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.decoder import TransitionDecoder

#: A probability is at most so much below 1, so that its log-odds are finite.
_LEAST = 1e-6


class LinearDecoder(TransitionDecoder):
    """The outputs are A(z) x + b(z), of which A and b come from a network of z alone.

    The network runs once for each z and not for each transition, so that all steps of a trial are decoded at little
    more cost than one.

    Args:
        spec, latent, likelihood, seed, dtype: as in :class:`TransitionDecoder`.
        hidden: widths of the network's hidden layers; with none of them A and b are affine in z.
        activation: of them.
        offset: whether there is b. Of one-hot x it says nothing that A does not.
        one_of: of binary rewards and one-hot x: the columns are probabilities that add up to 1 (A is the log-odds of
            a softmax), for tasks in which one place alone has the reward. Departure from the paper, whose cells know
            nothing of each other.

    Raises:
        OptionError: for ``one_of`` with rewards that are not binary, or with an offset.
    """

    def __init__(
        self,
        spec: ContextSpec,
        latent: int,
        likelihood: Likelihood | None = None,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        offset: bool = True,
        one_of: bool = False,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if one_of and (offset or not spec.binary):
            raise OptionError("one_of=True is of binary rewards, with one-hot x and offset=False.")
        super().__init__(spec, latent, likelihood, network=nn.Identity(), seed=seed, dtype=dtype)
        self.rows = self.likelihood.num_outputs(spec.outputs) or spec.outputs
        self.offset, self.one_of = offset, one_of
        with forked_rng(as_generator(seed, stream="decoder")):
            network = mlp(latent, hidden, self.rows * (spec.features + offset), activation=activation)
        self.network = network.to(dtype)

    def matrix(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """A ``[…, tasks, outputs, features]`` and b ``[…, tasks, outputs]`` at z ``[…, tasks, D]``."""
        each: Any = self.network(z).unflatten(-1, (self.rows, -1))
        if self.one_of:
            log_p = each.log_softmax(-1)
            # log p / (1 − p), which is finite as long as p is not 1 to the last bit
            each = log_p - torch.log(-torch.expm1(log_p.clamp_max(-_LEAST)))
        return (each[..., :-1], each[..., -1]) if self.offset else (each, None)

    def output(self, z: Tensor, x: Tensor) -> Tensor:
        """A(z) x + b(z), ``[…, tasks, shots, outputs]``; as in :class:`TransitionDecoder`."""
        if (z.shape[-1], x.shape[-1]) != (self.latent, self.spec.features):
            raise ShapeError(
                f"z has {z.shape[-1]} numbers and x {x.shape[-1]}; this decoder takes {self.latent} and "
                f"{self.spec.features} ({', '.join(self.spec.inputs)})."
            )
        matrix, offset = self.matrix(z)
        value = x @ matrix.mT
        return value if offset is None else value + offset.unsqueeze(-2)
