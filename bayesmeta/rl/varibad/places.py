"""A goal that is at one of some places: a decoder that knows so, what a policy sees of them, and what it believes.

A reward is had near the goal and nowhere else, as on the sparse point robot. How near, how high the reward is there and
how it falls are learned; that there is one goal, and the places where it can be, are given. Departure from L. Zintgraf
et al. 2020 (https://arxiv.org/abs/1910.08348), whose decoder of rewards is a network without such knowledge; its
decoder of the grid (appendix C.1) has one output a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.models.likelihoods import Likelihood
from bayesmeta.models.nets import mlp
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.decoder import TransitionDecoder

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class GaussianMixture(Likelihood):
    """One real target that is drawn from one of some Gaussians: outputs are log weights, means and log scales.

    Args:
        components: how many.

    Raises:
        OptionError: for none.
    """

    def __init__(self, components: int) -> None:
        super().__init__()
        if components < 1:
            raise OptionError(f"A mixture needs at least one component; got {components}.")
        self.components = components

    def num_outputs(self, targets: int) -> int:
        """Three for each component.

        Raises:
            ShapeError: for more than one target.
        """
        if targets != 1:
            raise ShapeError(f"A GaussianMixture is of one target; y has {targets}.")
        return 3 * self.components

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """The mixture; log weights need not be normalised."""
        logits, loc, log_scale = output.chunk(3, -1)
        weights = dist.Categorical(logits=logits, validate_args=False)
        parts = dist.Normal(loc, log_scale.exp(), validate_args=False)
        return dist.MixtureSameFamily(weights, parts, validate_args=False)


class PlaceDecoder(TransitionDecoder):
    """The goal is at one of some places, with shares π(z); the reward depends on the distance d to it.

        p(r | x, z) = Σ_j π_j(z) [h(d_j) N(r; a − b d_j, s₁²) + (1 − h(d_j)) N(r; 0, s₀²)],   h(d) = σ((ρ − d) / τ)

    π is a softmax of a network of z, of which a small part (``least``) is spread evenly. Radius ρ, softness τ, height
    a, slope b and the noises s₀ and s₁ are learned.

    Args:
        spec: of the contexts: rewards that are not binary, and the successor among the inputs, whose first numbers are
            where it is, in the units of the places.
        latent: D.
        places: where the goal can be, ``[places, dimensions]``.
        hidden: widths of the network's hidden layers; with none the log shares are affine in z.
        activation: of them.
        radius: first value of ρ.
        least: in [0, 1).
        seed, dtype: as in :class:`TransitionDecoder`.

    Raises:
        OptionError: for a spec of other contexts, and numbers out of range.
        ShapeError: for places of another shape.
    """

    places: Tensor

    def __init__(
        self,
        spec: ContextSpec,
        latent: int,
        places: Tensor,
        *,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        radius: float = 0.4,
        least: float = 1e-4,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if spec.targets != ("reward",) or spec.binary or "successor" not in spec.inputs:
            raise OptionError(
                f"A PlaceDecoder reads where a step led to and decodes rewards as numbers; the spec has inputs "
                f"{spec.inputs}, targets {spec.targets}, binary={spec.binary}."
            )
        start = spec.columns("successor").start
        if places.dim() != 2 or not len(places) or not 1 <= places.shape[-1] <= spec.features - start:
            raise ShapeError(f"places has shape {list(places.shape)}; expected [places, dimensions of a position].")
        if not places.isfinite().all():
            raise OptionError("Some places are not finite numbers.")
        if not (0 < radius < math.inf and 0 <= least < 1):
            raise OptionError(f"radius must be positive and finite, least in [0, 1); got {radius} and {least}.")
        super().__init__(spec, latent, GaussianMixture(2 * len(places)), network=nn.Identity(), seed=seed, dtype=dtype)
        with forked_rng(as_generator(seed, stream="decoder")):
            network = mlp(latent, hidden, len(places), activation=activation)
        self.network = network.to(dtype)
        self.least, self._at = least, slice(start, start + places.shape[-1])
        self.register_buffer("places", places.detach().to(dtype).clone())
        self.height, self.slope = (nn.Parameter(torch.tensor(value, dtype=dtype)) for value in (1.0, 0.0))
        self.log_radius, self.log_softness = (
            nn.Parameter(torch.tensor(math.log(value), dtype=dtype)) for value in (radius, radius / 4)
        )
        self.log_noise = nn.Parameter(torch.tensor([0.1, 0.1], dtype=dtype).log())

    def shares(self, z: Tensor) -> Tensor:
        """π: how likely each place is to have the goal, ``[…, places]``, of z ``[…, D]``."""
        if z.shape[-1] != self.latent:
            raise ShapeError(f"z has {z.shape[-1]} numbers; this decoder takes {self.latent}.")
        return (1 - self.least) * self.network(z).softmax(-1) + self.least / len(self.places)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weight, mean and log scale of the reward near and far from the goal, if it is at a place.

        Args:
            x: ``[…, features]``.

        Returns:
            Each ``[…, places, 2]``: near, and far.
        """
        if x.shape[-1] != self.spec.features:
            raise ShapeError(f"x has {x.shape[-1]} numbers; this decoder takes {self.spec.features}.")
        away = (x[..., self._at].unsqueeze(-2) - self.places).square().sum(-1).clamp_min(1e-12).sqrt()
        u = (self.log_radius.exp() - away) / self.log_softness.exp()
        weight = torch.stack([nn.functional.logsigmoid(u), nn.functional.logsigmoid(-u)], -1)
        loc = torch.stack([self.height - self.slope * away, torch.zeros_like(away)], -1)
        return weight, loc, self.log_noise.clamp_min(math.log(_LEAST_NOISE)).expand_as(loc)

    def output(self, z: Tensor, x: Tensor) -> Tensor:
        """As in :class:`TransitionDecoder`: what its :class:`GaussianMixture` takes, near and far of each place."""
        weight, loc, log_scale = self.parts(x)
        weight = weight + self.shares(z).log()[..., None, :, None]
        columns = torch.broadcast_tensors(weight, loc, log_scale)
        return torch.cat([column.flatten(-2) for column in columns], -1)

    def log_prob(self, z: Tensor, data: Observations) -> Tensor:
        """As in :class:`TransitionDecoder`; the places' densities are computed once for all z of a transition."""
        assert data.y is not None
        weight, loc, log_scale = self.parts(data.x)
        error = (data.y[..., None, None] - loc) * (-log_scale).exp()
        each = (weight - 0.5 * error.square() - log_scale - _HALF_LOG_2PI).logsumexp(-1)  # [tasks, shots, places]
        highest = each.detach().amax(-1, keepdim=True)
        # no share is 0, so that the sum is above 0 where least is
        mean = (each - highest).exp() @ self.shares(z).unsqueeze(-1)
        value = (mean.clamp_min(torch.finfo(mean.dtype).tiny).log() + highest).squeeze(-1)
        return value if data.mask is None else torch.where(data.mask, value, 0.0)


#: Rewards may be known exactly; densities stay finite.
_LEAST_NOISE = 0.02


class PlaceSight(nn.Module):
    """Where one is, and how near to each place: ``[…, dimensions]`` to ``[…, dimensions + places]``.

    Nearness is exp(−d² / (2 width²)).

    Args:
        places: ``[places, dimensions]``.
        width: of the nearness.

    Raises:
        OptionError: for a width that is not positive and finite.
    """

    places: Tensor

    def __init__(self, places: Tensor, width: float) -> None:
        super().__init__()
        if not 0 < width < math.inf:
            raise OptionError(f"width must be positive and finite; got {width}.")
        self.width, self.size = width, places.shape[-1] + len(places)
        self.register_buffer("places", places, persistent=False)

    def forward(self, position: Tensor) -> Tensor:
        """``[…, size]``."""
        away = (position.unsqueeze(-2) - self.places.to(position)).square().sum(-1)
        return torch.cat([position, (-away / (2 * self.width**2)).exp()], -1)


class PlaceReadout:
    """What a policy reads of a belief over places, at the mean of z.

    Of the belief alone: shares, mean place, and the sum of squared shares, which is 1 of a belief in one place. Beside
    where one is, for each reach ℓ: the way to the mean of places g_j that are weighted by π_j exp(−|g_j − s| / ℓ). With
    a short reach that is the way to the nearest place that is not excluded, wherever it is; so what was learned at one
    place serves at another.

    Args:
        decoder: whose shares they are; it is trained elsewhere.
        reaches: ℓ, in the units of the places; with none the policy must find the way itself.

    Attributes:
        size: how many numbers it gives of the belief.
        beside_size: how many beside where one is.

    Raises:
        OptionError: for a reach that is not positive.
    """

    def __init__(self, decoder: PlaceDecoder, reaches: Sequence[float] = ()) -> None:
        if not all(0 < reach < math.inf for reach in reaches):
            raise OptionError(f"reaches must be positive and finite; got {tuple(reaches)}.")
        self.decoder, self.reaches = decoder, tuple(reaches)
        dimensions = decoder.places.shape[-1]
        self.size = len(decoder.places) + dimensions + 1
        self.beside_size = dimensions * len(self.reaches)

    def __call__(self, loc: Tensor, scale: Tensor) -> Tensor:
        """``[…, batch, size]``."""
        share = self.decoder.shares(loc)
        return torch.cat([share, share @ self.decoder.places, share.square().sum(-1, keepdim=True)], -1)

    def beside(self, seen: Tensor, read: Tensor) -> Tensor:
        """Of what the policy sees, whose first numbers are where it is, and what :meth:`__call__` gave of its belief.

        Args:
            seen: ``[…, numbers]``.
            read: ``[…, size]``.

        Returns:
            ``[…, beside_size]``.
        """
        places = self.decoder.places
        way = places - seen[..., : places.shape[-1]].unsqueeze(-2)
        away, log_share = way.square().sum(-1).clamp_min(1e-12).sqrt(), read[..., : len(places)].clamp_min(1e-12).log()
        weights = [(log_share - away / reach).softmax(-1) for reach in self.reaches]
        return torch.cat([(weight.unsqueeze(-2) @ way).squeeze(-2) for weight in weights], -1)


class PlaceCertainty:
    """How sure a belief is of a place: −entropy of the shares at the mean of z / log(places), in [−1, 0].

    It serves as the potential of a :class:`~bayesmeta.rl.varibad.shaping.BeliefBonus`: 0 in one place, −1 where all are
    equally likely.

    Args:
        decoder: whose shares they are.
    """

    def __init__(self, decoder: PlaceDecoder) -> None:
        if len(decoder.places) < 2:
            raise OptionError("One place is always certain; expected a decoder with at least two.")
        self.decoder = decoder

    def __call__(self, loc: Tensor, scale: Tensor) -> Tensor:
        """``[…, batch]``."""
        share = self.decoder.shares(loc)
        return torch.special.entr(share).sum(-1) / -math.log(share.shape[-1])
