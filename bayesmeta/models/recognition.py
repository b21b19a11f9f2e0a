"""Recognition networks: from what an encoder read to q over a vector whose prior is standard normal."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, ShapeError, UnsupportedError
from bayesmeta.models.encoders import ProductEncoder
from bayesmeta.models.flows import ConditionalFlow

Family = Literal["diagonal", "full", "flow"]
#: A head with more outputs than this is refused: a full covariance has D (D + 1) / 2 numbers for each task.
MAX_OUTPUTS = 1_000_000


class Recognised(NamedTuple):
    """What :class:`Recognition` gives.

    Attributes:
        loc: mean, ``[…, tasks, D]``; of a flow, its shift.
        spread: standard deviations ``[…, tasks, D]``, or a lower triangular root of the covariance
            ``[…, tasks, D, D]``; of a flow, its scales.
        context: of a flow, what it is conditional on, ``[…, tasks, R]``; else None.
    """

    loc: Tensor
    spread: Tensor
    context: Tensor | None


class Recognition(nn.Module):
    """q(v | S) for v ∈ R^D with the prior N(0, I): an encoder, and a head that turns its vector into a distribution.

    The head's last layer is 0 at first, so that an untrained q is the prior; without observations it always is. A
    :class:`~bayesmeta.models.encoders.ProductEncoder` gives the distribution itself and has no head; its factors are
    weak at first.

    Args:
        encoder: a module that takes Observations (and ``given``, if its ``given`` is above 0) and gives
            ``[…, tasks, size]``. One of your own needs ``size`` alone.
        latent: D.
        family: ``"diagonal"``, ``"full"`` or ``"flow"``.
        given: width of what else is known of each task; the head reads it, and so does an encoder that asks for it.
        hidden: width of the head's hidden layer.

    Raises:
        OptionError: for a latent of size 0, an unknown family, or a product of another kind of covariance.
        ShapeError: for a product over a latent of another size, or an encoder that is given another width.
        UnsupportedError: for a full covariance with more numbers than a network can give.
    """

    def __init__(self, encoder: nn.Module, latent: int, family: Family, *, given: int = 0, hidden: int = 64) -> None:
        super().__init__()
        if family not in get_args(Family):
            names = ", ".join(map(repr, get_args(Family)))
            raise OptionError(f"Unknown posterior {family!r}; expected one of {names}.")
        if latent < 1:
            raise OptionError("The task parameters have size 0: there is nothing to recognise. Give at least 1.")
        self.encoder, self.latent, self.family, self.given = encoder, latent, family, given
        self._encoder_given = int(getattr(encoder, "given", 0))
        if self._encoder_given not in (0, given):
            raise ShapeError(
                f"The encoder reads {self._encoder_given} number(s) more a task (given); here there are {given}: "
                "the width of w, and of the global sites where they are drawn."
            )
        self.product = isinstance(encoder, ProductEncoder) and family != "flow"
        self.head: nn.Sequential | None = None
        self.flow: ConditionalFlow | None = None
        if self.product:
            self._check_product()
            return
        width = self._width()
        outputs = 2 * latent if family != "full" else latent + latent * (latent + 1) // 2
        if outputs > MAX_OUTPUTS:
            raise UnsupportedError(
                f"A full covariance of {latent} task parameters has {outputs} numbers with the mean, all of which the "
                f"head would have to give; the limit is {MAX_OUTPUTS}. Use posterior='diagonal', or fewer task "
                "parameters (task_modules='head', a ContextTaskModel)."
            )
        self.head = nn.Sequential(nn.Linear(width + given, hidden), nn.GELU(), nn.Linear(hidden, outputs))
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)
        if family == "flow":
            self.flow = ConditionalFlow(latent, width + given, hidden=hidden)

    def _width(self) -> int:
        width = getattr(self.encoder, "size", None)
        if not isinstance(width, int) or width < 1:
            raise OptionError(
                "An encoder says the width of what it gives as a whole number, size; "
                f"{type(self.encoder).__name__} has {width!r}."
            )
        return width

    def _check_product(self) -> None:
        encoder = self.encoder
        assert isinstance(encoder, ProductEncoder)
        if encoder.latent != self.latent:
            raise ShapeError(
                f"The ProductEncoder is over a latent of size {encoder.latent}; the model has {self.latent} task "
                "parameter(s) in unconstrained space. Make one with that latent."
            )
        if encoder.covariance != self.family:
            raise OptionError(
                f"The ProductEncoder has covariance={encoder.covariance!r}, but the posterior is {self.family!r}."
            )

    def _encode(self, observations: Observations, given: Tensor | None) -> Tensor:
        r = self.encoder(observations, given) if self._encoder_given else self.encoder(observations)
        expected = (observations.num_tasks, self._width())
        if tuple(r.shape[-2:]) != expected:
            raise ShapeError(
                f"The encoder {type(self.encoder).__name__} gave shape {list(r.shape)}; expected {list(expected)}: one "
                "vector of its size for each task."
            )
        return r

    def forward(self, observations: Observations, given: Tensor | None = None) -> Recognised:
        """q for each task.

        Args:
            observations: ``[tasks, shots, …]`` with targets.
            given: ``[…, tasks, given]``, whose leading dimensions are those of the result.
        """
        if self.product:
            assert isinstance(self.encoder, ProductEncoder)
            return Recognised(*self.encoder.gaussian(observations, given if self._encoder_given else None), None)
        r = self._encode(observations, given)
        if given is not None and self.given:
            lead = torch.broadcast_shapes(r.shape[:-1], given.shape[:-1])
            r = torch.cat([r.expand(*lead, -1), given.expand(*lead, -1)], -1)
        return self.read(r, observations.full_mask().any(-1, keepdim=True))

    def read(self, r: Tensor, some: Tensor) -> Recognised:
        """q by the head from what it reads.

        Args:
            r: ``[…, tasks, R]``, what the encoder gave and what else is known beside it.
            some: whether there is any observation, ``[…, tasks, 1]``; q is the prior where there is none.
        """
        assert self.head is not None
        # without observations the offsets are 0, and so q is the prior
        out = torch.where(some, self.head(r), 0.0)
        loc, log_scale, rest = out.tensor_split([self.latent, 2 * self.latent], -1)
        scale = log_scale.exp()
        if self.family != "full":
            return Recognised(loc, scale, r if self.family == "flow" else None)
        return Recognised(loc, _lower(scale, rest), None)


def _lower(diagonal: Tensor, rest: Tensor) -> Tensor:
    """A lower triangular matrix ``[…, D, D]`` from its diagonal and the entries below it, row by row."""
    size = diagonal.shape[-1]
    row, column = torch.tril_indices(size, size, -1, device=rest.device)
    below = rest.new_zeros(*rest.shape[:-1], size * size).scatter(-1, (row * size + column).expand(rest.shape), rest)
    return diagonal.diag_embed() + below.unflatten(-1, (size, size))
