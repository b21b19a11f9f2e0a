"""Beliefs of learners that have no decoder: where z is, and nothing of what it means."""

from __future__ import annotations

from typing import Any, NoReturn

from bayesmeta.errors import UnsupportedError
from bayesmeta.models.program import TaskProgram


class Undecoded(TaskProgram):
    """Stands in place of the program of a decoder that is not there; whatever asks it for something is told so.

    A :class:`~bayesmeta.rl.latent.beliefs.BeliefPath` over it has its Gaussians, draws of z, contraction, KL and
    DataTree. What is asked of a decoder (predictions, NUTS, surprise, pictures) raises ``UnsupportedError``.

    Args:
        why: the learner has none, and what to do, as the message says it.
    """

    def __init__(self, why: str) -> None:
        super().__init__(self._refuse)
        self.why = why

    def _refuse(self, x: Any, y: Any = None, mask: Any = None) -> NoReturn:
        raise UnsupportedError(f"This belief has no decoder, so that it says nothing of rewards or states: {self.why}")

    @property
    def layout(self) -> NoReturn:
        """There is none."""
        self._refuse(None)
