"""Inner steps whose intermediate results are not kept: less memory, and each step is computed a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def maybe_recomputed(recompute: bool, step: Callable[..., Any], *state: Any) -> Any:
    """``step(*state)``, which is kept for the way back as its arguments alone if ``recompute``.

    Source: T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
    https://arxiv.org/abs/1604.06174, section 3, by ``torch.utils.checkpoint``.

    Args:
        recompute: whether to compute the step again on the way back.
        step: a function without randomness of its own, which may differentiate.
        *state: tensors that it is differentiated by, beside the parameters that it reads.
    """
    if not recompute:
        return step(*state)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(step, *state, use_reentrant=False, preserve_rng_state=False)
