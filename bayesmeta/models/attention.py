"""Attention among the observations of a set."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bayesmeta.errors import OptionError


class AttentionBlock(nn.Module):
    """Multi-head self-attention without positions, so that it is equivariant to the order of a set.

    h ← h + MHA(LN(h)), and with a feed-forward part h ← h + MLP(LN(h)), the layer of a transformer.

    Source: A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, https://arxiv.org/abs/1706.03762, section 3.2;
    on sets: J. Lee et al., "Set Transformer", ICML 2019, https://arxiv.org/abs/1810.00825, section 3.1. The
    normalisation stands before each part rather than behind it, as in R. Xiong et al., "On Layer Normalization in the
    Transformer Architecture", ICML 2020, https://arxiv.org/abs/2002.04745; there is no dropout.

    Args:
        width: of h, a multiple of ``heads``.
        heads: number of heads.
        feed_forward: width of the feed-forward part's hidden layer; None leaves that part out.

    Raises:
        OptionError: for a width that the heads cannot share.
    """

    def __init__(self, width: int, heads: int, feed_forward: int | None) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise OptionError(f"The width of attention, {width}, must be a multiple of heads, {heads}.")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.rest: nn.Sequential | None = None
        if feed_forward is not None:
            parts = (nn.LayerNorm(width), nn.Linear(width, feed_forward), nn.GELU(), nn.Linear(feed_forward, width))
            self.rest = nn.Sequential(*parts)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """The set with attention, ``[…, n, width]``.

        Args:
            h: ``[…, n, width]``.
            mask: True where an entry may be attended to, ``[…, n]``.
        """
        # a set without members attends to its padding, so that there is no NaN; nobody reads it
        keys = (mask | ~mask.any(-1, keepdim=True))[..., None, None, :]
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in self.project(self.norm(h)).chunk(3, -1)
        )
        seen = scaled_dot_product_attention(query, key, value, attn_mask=keys)
        h = h + self.merge(seen.transpose(-3, -2).flatten(-2))
        return h if self.rest is None else h + self.rest(h)
