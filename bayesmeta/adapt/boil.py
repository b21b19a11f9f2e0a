"""BOIL: MAML whose inner steps move everything but the head.

Source: J. Oh, H. Yoo, C. Kim, S.-Y. Yun, "BOIL: Towards Representation Change for Few-shot Learning", ICLR 2021,
https://arxiv.org/abs/2008.08882, section 3 (body only update in the inner loop).

Departures: those of MAML.
"""

from __future__ import annotations

from bayesmeta.adapt.anil import PartialMAML, in_module
from bayesmeta.adapt.base import MethodCard


class BOIL(PartialMAML):
    """Body only in the inner loop (Oh et al. 2021): MAML on all task parameters but those of the last Linear.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` whose task parameters are more than its last Linear.
        **options: those of :class:`~bayesmeta.MAML`.

    Raises:
        UnsupportedError: for a Pyro program, or a model whose only task parameters are the head.
    """

    card = MethodCard(
        assumes="a network with a body and a last Linear",
        posterior="a point: K gradient steps of the body",
        cost="as MAML",
        source="Oh, Yoo, Kim, Yun 2021",
    )

    @staticmethod
    def _moves(block: str, head: str | None) -> bool:
        return head is None or not in_module(block, head)
