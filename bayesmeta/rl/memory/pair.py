"""A GRU for small MDPs whose states and actions have numbers: it writes by pairs and reads by state.

RL²'s GRU (Duan et al. 2016, https://arxiv.org/abs/1611.02779, section 2.2) sees the state now and the action and reward
before side by side. To learn from a reward it must first find out that the reward belongs to the state *before*, with
that action, and that it matters again when that state comes back: products of inputs that lie steps apart. Here these
products are given:

* **Writing.** It reads the outer product of the state before and the action (one entry of ``states × actions`` is 1),
  and the same times the reward, beside what RL² reads. Sums of rewards of a pair are then linear in what it read.
* **Reading.** A linear layer gives a row for each state, of which the state now picks its own; what it gives is the
  hidden state and that row.

What is kept, and how it is counted, averaged and planned with, is learned: nothing is summed up by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError
from bayesmeta.rl.memory.recurrent import Memory


class PairMemory(Memory):
    """A GRU that writes by pairs of state and action, and reads by state.

    The first ``states + actions + 1`` inputs must be what :class:`~bayesmeta.rl.memory.policy.MemoryPolicy` puts there
    without an encoder: the state now and the action before, one-hot, and its reward. Its state holds the hidden state
    and the state of the environment before.

    Args:
        inputs: width of what it reads.
        units: width of the GRU.
        states, actions: numbers of the MDP.
        row: width of a state's row.

    Raises:
        OptionError: for numbers below 1, or fewer inputs than states, actions and a reward.
    """

    def __init__(self, inputs: int, units: int, states: int, actions: int, row: int = 16) -> None:
        if min(units, states, actions, row) < 1 or inputs < states + actions + 1:
            raise OptionError(
                f"Expected at least 1 unit, state, action and number in a row, and inputs for all states, actions and "
                f"a reward; got {units} units, {states} states, {actions} actions, row={row} and {inputs} inputs. Use "
                "it for environments with Discrete observations and actions, without an encoder."
            )
        super().__init__(inputs, units + row, units + states)
        self.units, self.states, self.actions, self.row = units, states, actions, row
        self.gru = nn.GRU(2 * states * actions + inputs, units)
        self.table = nn.Linear(units, states * row)
        for name, value in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(value)
            else:  # each gate by itself
                for block in value.data.split(units if name.startswith("gru") else len(value)):
                    nn.init.orthogonal_(block)

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`~bayesmeta.rl.memory.recurrent.Memory`."""
        out, state = self._run(x.unsqueeze(0), state)
        return out[0], state

    def unroll(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`~bayesmeta.rl.memory.recurrent.Memory`; a rollout of one trial goes through the GRU at once."""
        self.check(x, state, begins)
        if bool(begins[1:].any()):
            return super().unroll(x, state, begins)
        return self._run(x, torch.where(begins[0].unsqueeze(-1), self.first(x.shape[1]), state))

    def _run(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Steps ``[time, batch, inputs]`` in which no trial begins: outputs, and the state after the last."""
        hidden, last = state.split([self.units, self.states], -1)
        now = x[..., : self.states]
        before = torch.cat([last.unsqueeze(0), now[:-1]])
        steps, hidden = self.gru(self._written(x, before), hidden.unsqueeze(0).contiguous())
        rows = self.table(steps).unflatten(-1, (self.states, self.row))
        out = torch.cat([steps, torch.tanh((rows * now.unsqueeze(-1)).sum(-2))], -1)
        return out, torch.cat([hidden[0], now[-1]], -1)

    def _written(self, x: Tensor, before: Tensor) -> Tensor:
        action = x[..., self.states : self.states + self.actions]
        reward = x[..., self.states + self.actions, None]
        pair = (before.unsqueeze(-1) * action.unsqueeze(-2)).flatten(-2)
        return torch.cat([pair, pair * reward, x], -1)
