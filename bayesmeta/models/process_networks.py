"""Networks whose output at a point depends on the point and on a whole set of observations: deep sets and attention.

All have ``forward(support, x, z=None)``. No target sees another, so that padding among the targets, and what else is
asked, never count; the order of the support and its padding do not count either (see :mod:`bayesmeta.ops.sets`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.models.attention import AttentionBlock
from bayesmeta.models.encoders import Encoder, PooledEncoder
from bayesmeta.models.nets import mlp


class ProcessNetwork(nn.Module):
    """Base of the networks f(x, S, z). One of your own needs :meth:`forward` alone, and no base.

    Args:
        features: width of x.
        targets: of a shot of the support: 1 for y of shape ``[tasks, shots]``.
        outputs: width of what it gives at each point.
        inner: width of what stands before the decoder, an MLP of ``layers`` hidden layers of ``width``.
        latent_size: width of z, which the decoder reads beside the rest; 0 for none.
        width: of hidden layers.
        layers: hidden layers of the decoder.
        classes, counts, max_shots: how y is read, and a bound on the support, as in
            :class:`~bayesmeta.models.encoders.Encoder`.

    Raises:
        OptionError: for sizes out of range.
    """

    def __init__(
        self,
        features: int,
        targets: int,
        outputs: int,
        *,
        inner: int,
        latent_size: int = 0,
        width: int = 64,
        layers: int = 2,
        classes: int | None = None,
        counts: bool = False,
        max_shots: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("outputs", outputs), ("width", width)):
            if value < 1:
                raise OptionError(f"{name} of a process network must be at least 1; got {value}.")
        if latent_size < 0 or layers < 0:
            raise OptionError(f"latent_size and layers must be 0 or more; got {latent_size} and {layers}.")
        self.reader = Encoder(features, targets, width, classes=classes, counts=counts, max_shots=max_shots)
        self.features, self.outputs, self.latent_size = features, outputs, latent_size
        self.decoder = mlp(inner + latent_size, [width] * layers, outputs, activation="gelu")

    def forward(self, support: Observations, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Outputs at x.

        Args:
            support: what is conditioned on, with targets.
            x: ``[tasks, M, features]``.
            z: a latent for each task, ``[L, tasks, latent_size]``; None where the size is 0.

        Returns:
            ``[L, tasks, M, outputs]``; L is 1 without a latent.

        Raises:
            ShapeError: for another width than the network's, or a support beyond ``max_shots``.
        """
        raise NotImplementedError

    def check(self, support: Observations, x: Tensor) -> None:
        """Check the widths of x; :meth:`read`, or an encoder, checks those of the support.

        Raises:
            ShapeError: for another width, or other tasks than those of the support.
        """
        if x.shape[-1] != self.features or x.shape[0] != support.num_tasks:
            raise ShapeError(
                f"This network takes x [{support.num_tasks}, M, {self.features}] beside its support; got "
                f"{list(x.shape)}."
            )

    def read(self, support: Observations, x: Tensor) -> tuple[Tensor, Tensor]:
        """The support's rows [x, y] in a canonical order, and their mask; everything is checked."""
        self.check(support, x)
        return self.reader.rows(support)

    def decode(self, h: Tensor, z: Tensor | None) -> Tensor:
        """From ``[tasks, M, inner]`` and z to the outputs.

        Raises:
            ShapeError: for a latent of another width.
        """
        width = 0 if z is None else z.shape[-1]
        if width != self.latent_size:
            raise ShapeError(f"This network has latent_size={self.latent_size}; got a latent of width {width}.")
        if z is None or not width:
            return self.decoder(h).unsqueeze(0)
        z = z.unsqueeze(-2).expand(*z.shape[:-1], h.shape[-2], width)
        return self.decoder(torch.cat([h.expand(len(z), *h.shape), z], -1))


class DeepSetProcess(ProcessNetwork):
    """A conditional neural process: one vector for the support, the mean over its observations, beside x.

    Source: M. Garnelo et al., "Conditional Neural Processes", ICML 2018, https://arxiv.org/abs/1807.01613, section 2.2.
    The encoder is a :class:`~bayesmeta.models.encoders.PooledEncoder`, which also reads the number of observations and
    has a learned vector for none.

    Args:
        features, targets, outputs, latent_size, width, classes, counts, max_shots: as in :class:`ProcessNetwork`.
        depth: hidden layers of encoder and decoder.

    Raises:
        OptionError: for sizes out of range.
    """

    def __init__(
        self, features: int, targets: int = 1, outputs: int = 2, *, width: int = 64, depth: int = 2, **options: Any
    ) -> None:
        _check_depth(depth)
        super().__init__(features, targets, outputs, inner=features + width, width=width, layers=depth, **options)
        kept = {name: options[name] for name in ("classes", "counts", "max_shots") if name in options}
        self.encoder = PooledEncoder(features, targets, width, hidden=[width] * depth, **kept)

    def forward(self, support: Observations, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Outputs ``[L, tasks, M, outputs]``; see :class:`ProcessNetwork`."""
        self.check(support, x)
        r = self.encoder(support).unsqueeze(-2)
        return self.decode(torch.cat([x, r.expand(*x.shape[:-1], -1)], -1), z)


class AttentiveProcess(ProcessNetwork):
    """Each target attends to the support: near observations may count more than far ones.

    r(x, S) = Σ_i softmax_i(q(x)ᵀ k(x_i) / √d) v(x_i, y_i) for each of several heads, merged by an affine map; q and k
    are one MLP of x each, v one of [x, y] with blocks of self-attention behind it if asked. Without support r is a
    learned vector, ``empty``.

    Source: H. Kim et al., "Attentive Neural Processes", ICLR 2019, https://arxiv.org/abs/1901.05761, section 3.
    Departures: q and k are two MLPs, where the released code has one for both; self-attention is a pre-norm transformer
    layer (see :class:`~bayesmeta.models.attention.AttentionBlock`).

    Args:
        features, targets, outputs, latent_size, width, classes, counts, max_shots: as in :class:`ProcessNetwork`.
        depth: hidden layers of decoder and of the MLPs.
        heads: of attention; they share the width.
        blocks: layers of self-attention among the support.

    Raises:
        OptionError: for sizes out of range.
    """

    def __init__(
        self,
        features: int,
        targets: int = 1,
        outputs: int = 2,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        blocks: int = 0,
        **options: Any,
    ) -> None:
        _check_depth(depth)
        _check_heads(width, heads)
        if blocks < 0:
            raise OptionError(f"blocks must be 0 or more; got {blocks}.")
        super().__init__(features, targets, outputs, inner=features + width, width=width, layers=depth, **options)
        hidden = [width] * depth
        self.heads = heads
        self.query = mlp(features, hidden, width, activation="gelu")
        self.key = mlp(features, hidden, width, activation="gelu")
        self.embed = mlp(self.reader.width, hidden, width, activation="gelu")
        self.blocks = nn.ModuleList(AttentionBlock(width, heads, 2 * width) for _ in range(blocks))
        self.value = nn.Linear(width, width)
        self.merge = nn.Linear(width, width)
        self.empty = nn.Parameter(torch.zeros(width))

    def attend(self, support: Observations, x: Tensor) -> Tensor:
        """r(x, S), ``[tasks, M, width]``."""
        rows, mask = self.read(support, x)
        if rows.shape[-2] == 0:
            return self.empty.expand(*x.shape[:-1], -1)
        h = self.embed(rows)
        for block in self.blocks:
            h = block(h, mask)
        some = mask.any(-1)[:, None, None]
        # a task without support attends to its padding, so that there is no NaN; nobody reads it
        keys = (mask[:, None] | ~some).unsqueeze(1)
        query, key, value = (
            _split(t, self.heads) for t in (self.query(x), self.key(rows[..., : self.features]), self.value(h))
        )
        seen = scaled_dot_product_attention(query, key, value, attn_mask=keys)
        return torch.where(some, self.merge(_join(seen)), self.empty)

    def forward(self, support: Observations, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Outputs ``[L, tasks, M, outputs]``; see :class:`ProcessNetwork`."""
        return self.decode(torch.cat([x, self.attend(support, x)], -1), z)


class TransformerProcess(ProcessNetwork):
    """A transformer over support and targets, where a target attends to the support and to itself.

    Support tokens [x, y, 0] attend to the support; target tokens [x, 0, 1] to the support and to themselves: so no
    target sees another, and the outputs at a point do not depend on what else is asked.

    Source: after TNP-D of T. Nguyen, A. Grover, "Transformer Neural Processes", ICML 2022,
    https://arxiv.org/abs/2207.04179, section 3; with a covariance of :class:`~bayesmeta.ProcessModel`, TNP-ND's
    purpose. Departures: in the released code of TNP-D targets attend to the support alone and tokens are [x, y] and [x,
    0]; here a last column tells a target from an observation of 0, and a target also attends to itself, so that there
    is an answer without support. Normalisation comes before each part; the targets' attention is computed without the
    mask's empty part, so that memory grows with targets × support.

    Args:
        features, targets, outputs, latent_size, width, classes, counts, max_shots: as in :class:`ProcessNetwork`.
        depth: layers of the transformer.
        heads: of attention; they share the width.

    Raises:
        OptionError: for sizes out of range.
    """

    def __init__(
        self,
        features: int,
        targets: int = 1,
        outputs: int = 2,
        *,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        **options: Any,
    ) -> None:
        _check_depth(depth)
        _check_heads(width, heads)
        super().__init__(features, targets, outputs, inner=width, width=width, layers=1, **options)
        self.embed = mlp(self.reader.width + 1, [width], width, activation="gelu")
        self.blocks = nn.ModuleList(_TargetBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, support: Observations, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Outputs ``[L, tasks, M, outputs]``; see :class:`ProcessNetwork`."""
        rows, mask = self.read(support, x)
        seen = self.embed(torch.cat([rows, rows.new_zeros(*rows.shape[:-1], 1)], -1))
        blank = x.new_zeros(*x.shape[:-1], rows.shape[-1] - self.features)
        asked = self.embed(torch.cat([x, blank, x.new_ones(*x.shape[:-1], 1)], -1))
        for block in self.blocks:
            seen, asked = block(seen, asked, mask)
        return self.decode(self.norm(asked), z)


class _TargetBlock(nn.Module):
    """One layer of the transformer, for support tokens and target tokens alike."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block = AttentionBlock(width, heads, 2 * width)

    def forward(self, seen: Tensor, asked: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        block, count = self.block, seen.shape[-2]
        assert block.rest is not None
        # one projection for both kinds of token: they share all weights
        both = torch.cat([seen, asked], -2)
        query, key, value = (_split(part, block.heads) for part in block.project(block.norm(both)).chunk(3, -1))
        (q_s, q_t), (k_s, k_t), (v_s, v_t) = (t.tensor_split([count], -2) for t in (query, key, value))
        scale = q_t.shape[-1] ** -0.5
        own = (q_t * k_t).sum(-1, keepdim=True) * scale
        logits = (q_t @ k_s.mT * scale).masked_fill(~mask[:, None, None], -torch.inf)
        weight = torch.cat([logits, own], -1).softmax(-1)
        parts = [weight[..., :count] @ v_s + weight[..., count:] * v_t]
        if count:
            keys = (mask | ~mask.any(-1, keepdim=True))[:, None, None]
            parts.insert(0, scaled_dot_product_attention(q_s, k_s, v_s, attn_mask=keys))
        both = both + block.merge(_join(torch.cat(parts, -2)))
        both = both + block.rest(both)
        new_seen, new_asked = both.tensor_split([count], -2)
        return new_seen, new_asked


def _split(h: Tensor, heads: int) -> Tensor:
    """``[tasks, n, width]`` to ``[tasks, heads, n, width / heads]``."""
    return h.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _join(h: Tensor) -> Tensor:
    """The inverse of :func:`_split`."""
    return h.transpose(-3, -2).flatten(-2)


def _check_depth(depth: int) -> None:
    if depth < 1:
        raise OptionError(f"depth of a process network must be at least 1; got {depth}.")


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise OptionError(f"The width of attention, {width}, must be a multiple of heads, {heads}.")
