"""ANIL: MAML whose inner steps move the head alone.

Source: A. Raghu, M. Raghu, S. Bengio, O. Vinyals, "Rapid Learning or Feature Reuse? Towards Understanding the
Effectiveness of MAML", ICLR 2020, https://arxiv.org/abs/1909.09157, section 4 (almost no inner loop).

Departures: those of MAML.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesmeta.adapt.base import MethodCard
from bayesmeta.adapt.maml import MAML
from bayesmeta.data import Observations
from bayesmeta.errors import UnsupportedError
from bayesmeta.models.neural import NeuralTaskModel


def in_module(parameter: str, module: str) -> bool:
    """Whether a parameter belongs to a module of that name; the root has the name ""."""
    return module == "" or parameter.startswith(f"{module}.")


class PartialMAML(MAML):
    """MAML whose inner steps move some of the task parameters; the others stay at the start, and are trained there.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`.
        **options: those of :class:`~bayesmeta.MAML`.

    Raises:
        UnsupportedError: for a Pyro program, which has no head, and a model none of whose task parameters would move.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        name = type(self).__name__
        if not isinstance(self.program, NeuralTaskModel):
            raise UnsupportedError(
                f"{name} adapts a part of a network; a Pyro program has no head. Sample what should adapt inside the "
                "task plate and keep the rest as parameters, and use MAML."
            )
        if not any(self._moves(block, self.program.head) for block in self.program.blocks):
            raise UnsupportedError(
                f"{name} finds nothing to adapt: the task parameters of this model are "
                f"{', '.join(self.program.blocks)}, and its head is {self.program.head!r}. Use task_modules='all'."
            )

    @staticmethod
    def _moves(block: str, head: str | None) -> bool:
        """Whether the inner steps move a tensor of the network."""
        raise NotImplementedError

    def _create(self, observations: Observations) -> None:
        super()._create(observations)
        program = self.program
        assert isinstance(program, NeuralTaskModel)
        moved = observations.x.new_zeros(program.layout.dim)
        for name, block in program.blocks.items():
            if self._moves(name, program.head):
                moved[block] = 1.0
        self.register_buffer("_moved", moved, persistent=False)

    def _rate(self, step: int) -> Tensor:
        moved = self._moved
        assert isinstance(moved, Tensor)
        return torch.mul(moved, self.inner_lr)


class ANIL(PartialMAML):
    """Almost no inner loop (Raghu et al. 2020): MAML on the last Linear; the body is learned, and shared by all tasks.

    A model made with ``task_modules="head"`` gives the same numbers and is faster: its body runs once for all tasks'
    weights. With ``"all"`` the body's weights are task parameters that no inner step moves.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` whose task parameters include its last Linear.
        **options: those of :class:`~bayesmeta.MAML`.

    Raises:
        UnsupportedError: for a Pyro program, or a model whose last Linear is not task-specific.
    """

    card = MethodCard(
        assumes="a network with a last Linear",
        posterior="a point: K gradient steps of the head",
        cost="as MAML, cheaper with task_modules='head'",
        source="Raghu, Raghu, Bengio, Vinyals 2020",
    )

    @staticmethod
    def _moves(block: str, head: str | None) -> bool:
        return head is not None and in_module(block, head)
