"""Memories that step and unroll: what a policy knows of its trial.

A memory's state is one tensor ``[batch, width]`` whatever its kind, so that rollouts and checkpoints need not know it.
``begins`` says where a trial begins: there the state is set back to the first one **before** the input is read, so
that nothing of another task is left. The same code steps and unrolls: a test holds them equal.

Source: Y. Duan, J. Schulman, X. Chen, P. L. Bartlett, I. Sutskever, P. Abbeel, "RL²: Fast Reinforcement Learning via
Slow Reinforcement Learning", 2016, https://arxiv.org/abs/1611.02779, section 2.2. GRU: K. Cho et al., EMNLP 2014,
https://arxiv.org/abs/1406.1078. LSTM: S. Hochreiter, J. Schmidhuber, Neural Computation 9, 1997.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError, ShapeError


class Memory(nn.Module):
    """Base of the memories. A subclass defines :meth:`advance`.

    Attributes:
        inputs: width of what it reads in each step.
        outputs: width of what it gives.
        width: numbers in the state.
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        if min(inputs, outputs, width) < 1:
            raise OptionError(f"A memory needs at least one input and one unit; got {inputs} and {outputs}.")
        self.inputs, self.outputs, self.width = inputs, outputs, width

    def first(self, batch: int) -> Tensor:
        """The state at the begin of a trial, ``[batch, width]``: 0."""
        return next(self.parameters()).new_zeros(batch, self.width)

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read ``x`` ``[batch, inputs]``: outputs ``[batch, outputs]`` and the new state."""
        raise NotImplementedError

    def step(self, x: Tensor, state: Tensor, begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of acting.

        Args:
            x: ``[batch, inputs]``.
            state: ``[batch, width]``.
            begins: where a trial begins with this input, booleans ``[batch]``.

        Returns:
            Outputs ``[batch, outputs]`` and the new state ``[batch, width]``.
        """
        if begins is not None:
            # chosen, not multiplied: NaN of one task does not reach the next
            state = torch.where(begins.unsqueeze(-1), self.first(len(state)), state)
        return self.advance(x, state)

    def unroll(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """All steps of a rollout, with gradients through time.

        Args:
            x: ``[time, batch, inputs]``.
            state: before the first step, ``[batch, width]``.
            begins: booleans ``[time, batch]``.

        Returns:
            Outputs ``[time, batch, outputs]`` and the last state.

        Raises:
            ShapeError: when the shapes do not fit.
        """
        self.check(x, state, begins)
        out = []
        for t in range(len(x)):
            h, state = self.step(x[t], state, begins[t])
            out.append(h)
        return torch.stack(out), state

    def check(self, x: Tensor, state: Tensor, begins: Tensor) -> None:
        """Raise ShapeError when the arguments of :meth:`unroll` do not fit."""
        if x.dim() != 3 or begins.shape != x.shape[:2] or state.shape != (x.shape[1], self.width):
            raise ShapeError(
                f"Expected x [time, batch, {self.inputs}], begins [time, batch] and state [batch, {self.width}]; got "
                f"{list(x.shape)}, {list(begins.shape)} and {list(state.shape)}."
            )


class GRUMemory(Memory):
    """A gated recurrent unit; its state is what it gives.

    Args:
        inputs: width of what it reads.
        units: width of the state.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__(inputs, units, units)
        self.cell = nn.GRUCell(inputs, units)
        _orthogonal(self.cell)

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Memory`."""
        state = self.cell(x, state)
        return state, state


class LSTMMemory(Memory):
    """A long short-term memory; its state is what it gives beside its cells.

    Args:
        inputs: width of what it reads.
        units: width of what it gives; the state has twice as many numbers.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__(inputs, units, 2 * units)
        self.cell = nn.LSTMCell(inputs, units)
        _orthogonal(self.cell)
        with torch.no_grad():  # gates that begin open let gradients through long trials
            self.cell.bias_ih[units : 2 * units] += 1.0

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Memory`."""
        h, c = self.cell(x, tuple(state.chunk(2, -1)))
        return h, torch.cat([h, c], -1)


MEMORIES: dict[str, type[GRUMemory] | type[LSTMMemory]] = {"gru": GRUMemory, "lstm": LSTMMemory}


def memory(kind: str, inputs: int, units: int) -> Memory:
    """A memory by its name, ``"gru"`` or ``"lstm"``.

    Raises:
        OptionError: for another name.
    """
    if kind not in MEMORIES:
        raise OptionError(f"Unknown memory {kind!r}; expected one of {', '.join(MEMORIES)}.")
    return MEMORIES[kind](inputs, units)


def _orthogonal(cell: nn.GRUCell | nn.LSTMCell) -> None:
    """Orthogonal matrices for each gate, biases 0."""
    for weight in (cell.weight_ih, cell.weight_hh):
        for gate in weight.data.split(cell.hidden_size):
            nn.init.orthogonal_(gate)
    nn.init.zeros_(cell.bias_ih)
    nn.init.zeros_(cell.bias_hh)
