"""Beliefs that are carried on: an encoder's state after each observation, step by step or all at once.

A state is one tensor ``[…, tasks, width]``, whatever the encoder is, so that rollouts and checkpoints need not know it.
Its last number counts the observations that were read: with none of them q is the prior. Stepping and reading all at
once are the same function of the same numbers; sums are taken in the order of time here, and in a canonical one by
:meth:`~bayesmeta.models.encoders.Encoder.forward`, so that the two agree up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import UnsupportedError
from bayesmeta.models.encoders import PooledEncoder, ProductEncoder, RecurrentEncoder
from bayesmeta.models.recognition import Recognised, Recognition
from bayesmeta.ops import sets


class Steps:
    """How one kind of encoder is carried on. :func:`steps_of` finds the kind.

    Args:
        recognition: with the encoder; its widths beside the observations (``given``) must be 0.
    """

    def __init__(self, recognition: Recognition) -> None:
        self.recognition = recognition

    @property
    def width(self) -> int:
        """Numbers of a state, the count of observations included."""
        raise NotImplementedError

    def first(self, tasks: int) -> Tensor:
        """The state before any observation, ``[tasks, width]``."""
        raise NotImplementedError

    def _after(self, observations: Observations, state: Tensor) -> Tensor:
        """States after each of the first 0, 1, …, n real observations, ``[tasks, n + 1, width − 1]``, padding last."""
        raise NotImplementedError

    def path(self, observations: Observations, state: Tensor | None = None) -> Tensor:
        """States after each of the first 0, 1, …, shots entries, ``[tasks, shots + 1, width]``.

        Args:
            observations: ``[tasks, shots, …]`` in the order of time; an entry that is masked changes nothing.
            state: before the first of them, ``[tasks, width]``; None is that before any observation.
        """
        state = self.first(observations.num_tasks) if state is None else state
        seen = observations.full_mask().long().cumsum(-1)
        seen = torch.cat([torch.zeros_like(state[:, :1], dtype=torch.long), seen], -1)
        after = self._after(observations, state)
        after = after.gather(1, seen.unsqueeze(-1).expand(*seen.shape, after.shape[-1]))
        return torch.cat([after, state[:, None, -1:] + seen.unsqueeze(-1).to(state.dtype)], -1)

    def step(self, state: Tensor, observations: Observations) -> Tensor:
        """The state after some more entries, ``[tasks, width]``; see :meth:`path`."""
        return self.path(observations, state)[:, -1]

    def read(self, state: Tensor) -> Recognised:
        """q of states ``[…, width]``."""
        raise NotImplementedError


class RecurrentSteps(Steps):
    """The state of a :class:`~bayesmeta.models.encoders.RecurrentEncoder`'s GRU."""

    @property
    def _encoder(self) -> RecurrentEncoder:
        assert isinstance(self.recognition.encoder, RecurrentEncoder)
        return self.recognition.encoder

    @property
    def width(self) -> int:
        """That of the GRU's state, and one."""
        return len(self._encoder.first) + 1

    def first(self, tasks: int) -> Tensor:
        """The learned first state."""
        first = self._encoder.first
        return torch.cat([first, first.new_zeros(1)]).expand(tasks, -1)

    def _after(self, observations: Observations, state: Tensor) -> Tensor:
        rows, _ = self._encoder.rows(observations)
        hidden = state[:, :-1]
        states = hidden.unsqueeze(1)
        if rows.shape[-2]:
            after, _ = self._encoder.recurrence(rows, hidden.unsqueeze(0).contiguous())
            states = torch.cat([states, after], 1)
        return states

    def read(self, state: Tensor) -> Recognised:
        """The head's reading of the state."""
        return self.recognition.read(self._encoder.read(state[..., :-1]), state[..., -1:] > 0)


class ProductSteps(Steps):
    """Running sums of what a :class:`~bayesmeta.models.encoders.ProductEncoder`'s factors add: one more is one sum."""

    @property
    def _encoder(self) -> ProductEncoder:
        assert isinstance(self.recognition.encoder, ProductEncoder)
        return self.recognition.encoder

    @property
    def width(self) -> int:
        """Precision times mean, and precision, of each dimension, and one."""
        return 2 * self._encoder.latent + 1

    def first(self, tasks: int) -> Tensor:
        """Nothing: the prior is added when it is read."""
        return self._encoder.affine.weight.new_zeros(tasks, self.width)

    def _after(self, observations: Observations, state: Tensor) -> Tensor:
        sums, shape = state[:, None, :-1], (observations.num_tasks, observations.shots)
        if observations.shots == 0:
            return sums
        information, precision, _ = self._encoder.factors(_alone(observations))
        more = torch.cat([information, precision], -1).squeeze(1).unflatten(0, shape)
        return _running(sums, more, observations.full_mask())

    def read(self, state: Tensor) -> Recognised:
        """The product of the factors so far and the prior."""
        sums, some = state[..., :-1].unsqueeze(-2), state[..., -1:] > 0
        information, precision = sums.chunk(2, -1)
        return Recognised(*sets.product_of_gaussians(information, precision, some, 0.0, 1.0), None)


class PooledSteps(Steps):
    """Running sums of what a :class:`~bayesmeta.models.encoders.PooledEncoder` pools, by a sum or a mean."""

    @property
    def _encoder(self) -> PooledEncoder:
        assert isinstance(self.recognition.encoder, PooledEncoder)
        return self.recognition.encoder

    @property
    def width(self) -> int:
        """That of what is pooled, and one."""
        return self._encoder.read.in_features

    def first(self, tasks: int) -> Tensor:
        """Nothing: the vector of the empty set is chosen when it is read."""
        return self._encoder.empty.new_zeros(tasks, self.width)

    def _after(self, observations: Observations, state: Tensor) -> Tensor:
        sums, shape = state[:, None, :-1], (observations.num_tasks, observations.shots)
        if observations.shots == 0:
            return sums
        rows, _ = self._encoder.rows(_alone(observations))
        more = self._encoder.embed(rows).squeeze(1).unflatten(0, shape)
        return _running(sums, more, observations.full_mask())

    def read(self, state: Tensor) -> Recognised:
        """The head's reading of the sum, or of the mean, and of how many there were."""
        sums, count = state[..., :-1], state[..., -1:]
        pooled = sums if self._encoder.pool == "sum" else sums / count.clamp_min(1.0)
        r = self._encoder.read(torch.cat([pooled, count.log1p()], -1))
        return self.recognition.read(torch.where(count > 0, r, self._encoder.empty), count > 0)


def _alone(observations: Observations) -> Observations:
    """Each row as a set of its own ``[tasks × shots, 1, …]``, so that they stay in the order of time."""
    assert observations.y is not None
    return Observations(observations.x.flatten(0, 1).unsqueeze(1), observations.y.flatten(0, 1).unsqueeze(1))


def _running(sums: Tensor, more: Tensor, mask: Tensor) -> Tensor:
    """Sums ``[tasks, 1, …]`` and those after each further real row ``[tasks, n, …]``, padding last."""
    more = sets.take_rows(more.masked_fill(~mask.unsqueeze(-1), 0.0), sets.padding_last(mask))
    return torch.cat([sums, more], 1).cumsum(1)


def steps_of(recognition: Recognition) -> Steps:
    """How a recognition network is carried on from observation to observation.

    Args:
        recognition: diagonal, with a recurrent encoder, a product of Gaussians, or a sum or mean without attention,
            that read nothing else.

    Raises:
        UnsupportedError: for any other: what an encoder with attention gives is a function of the whole set.
    """
    encoder: nn.Module = recognition.encoder
    if recognition.family == "diagonal" and recognition.given == 0:
        if isinstance(encoder, RecurrentEncoder):
            return RecurrentSteps(recognition)
        if isinstance(encoder, ProductEncoder):
            return ProductSteps(recognition)
        if isinstance(encoder, PooledEncoder) and encoder.pool in ("sum", "mean") and not len(encoder.blocks):
            return PooledSteps(recognition)
    raise UnsupportedError(
        f"A {recognition.family} posterior with a {type(encoder).__name__} (given={recognition.given}) cannot be "
        "carried on step by step; recurrent and product encoders, and sums and means without attention, can, with a "
        "diagonal posterior. Give the whole context each time, or choose encoder='recurrent', 'product' or 'sum'."
    )
