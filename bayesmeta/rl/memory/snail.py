"""SNAIL: a memory of attention and temporal convolutions, with a cache for acting.

Source: N. Mishra, M. Rohaninejad, X. Chen, P. Abbeel, "A Simple Neural Attentive Meta-Learner", ICLR 2018,
https://arxiv.org/abs/1707.03141, section 3 and figure 2. Convolutions have kernel 2 and dilations 1, 2, 4, … up to the
capacity; every layer's output is put beside its input.

Departures: the memory is causal over the steps of one trial, whose begins may stand anywhere in a rollout; what a step
gave to each layer (and attention's keys and values) is kept as its **record**, so that acting costs one step's layers
and one row of attention rather than the whole past.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError
from bayesmeta.rl.memory.recurrent import Memory


class SNAILMemory(Memory):
    """Attention and temporal convolutions over the steps of a trial.

    Its state is the records of the last ``capacity`` steps and how many of them are of the running trial; what lies
    further back is forgotten, in steps and unrolled alike.

    Args:
        inputs: width of what it reads.
        capacity: steps that it can look back; give at least those of a trial, less one.
        units: width of the first layer.
        filters: what each convolution adds.
        keys, values: widths of attention.
        blocks: convolutions of all dilations, then attention, so many times.
    """

    def __init__(
        self,
        inputs: int,
        capacity: int,
        *,
        units: int = 32,
        filters: int = 16,
        keys: int = 16,
        values: int = 16,
        blocks: int = 1,
    ) -> None:
        if min(capacity, units, filters, keys, values, blocks) < 1:
            raise OptionError("capacity, units, filters, keys, values and blocks must each be at least 1.")
        depth = max(1, math.ceil(math.log2(capacity + 1)))
        outputs = units + blocks * (depth * filters + values)
        record = outputs + blocks * (keys + values)
        super().__init__(inputs, outputs, capacity * record + 1)
        self.capacity, self.record = capacity, record
        self.read = nn.Linear(inputs, units)
        self.layers = nn.ModuleList()
        width = units
        for _ in range(blocks):
            for level in range(depth):
                self.layers.append(_Convolution(width, filters, 2**level))
                width += filters
            self.layers.append(_Attention(width, keys, values))
            width += values

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`~bayesmeta.rl.memory.recurrent.Memory`."""
        begins = torch.zeros(1, len(x), dtype=torch.bool, device=x.device)
        out, state = self._run(x.unsqueeze(0), state, begins)
        return out[0], state

    def step(self, x: Tensor, state: Tensor, begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As in :class:`~bayesmeta.rl.memory.recurrent.Memory`."""
        if begins is None:
            return self.advance(x, state)
        out, state = self._run(x.unsqueeze(0), state, begins.unsqueeze(0))
        return out[0], state

    def unroll(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`~bayesmeta.rl.memory.recurrent.Memory`; all steps at once."""
        self.check(x, state, begins)
        return self._run(x, state, begins)

    def _run(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """New steps ``[time, batch, inputs]`` after the past that the state holds."""
        time, batch = begins.shape
        known = state[:, -1]
        past = state[:, :-1].unflatten(1, (self.capacity, self.record)).transpose(0, 1)
        # rows of the past are read as far as any environment has some
        past = past[self.capacity - int(known.max()) :]
        allowed = self._allowed(begins, known, len(past))
        past = torch.where(allowed.past_known.unsqueeze(-1), past, 0.0)  # NaN of another trial is not multiplied by 0
        stream, extra, begin = self.read(x), [], self.outputs
        for layer in self.layers:
            if isinstance(layer, _Attention):
                kept = past[..., begin : begin + layer.size]
                begin += layer.size
                stream, record = layer(stream, kept, allowed.rows)
                extra.append(record)
            else:
                stream = layer(stream, past[..., : stream.shape[-1]], allowed.rows)
        records = torch.cat([past, torch.cat([stream, *extra], -1)])[-self.capacity :]
        empty = records.new_zeros(self.capacity - len(records), batch, self.record)
        rows = torch.cat([empty, records]).transpose(0, 1).flatten(1)
        count = torch.arange(time, 0, -1, device=x.device).unsqueeze(-1)  # rows from each to the last
        since = torch.where(begins, count, 0).masked_fill(begins.flip(0).cumsum(0).flip(0) != 1, 0).amax(0)
        total = torch.where(begins.any(0), since, known.long() + time).clamp_max(self.capacity)
        return stream, torch.cat([rows, total.unsqueeze(-1).to(rows.dtype)], -1)

    def _allowed(self, begins: Tensor, known: Tensor, past: int) -> _Allowed:
        """Which rows, of the past and new, each new row may read: its own trial's, at most ``capacity`` back."""
        time = len(begins)
        trial = begins.long().cumsum(0)  # 0 goes on with the state's
        index = torch.arange(past, device=begins.device)
        past_known = (past - index).unsqueeze(-1) <= known
        row = torch.arange(time, device=begins.device)
        back = (row + past).unsqueeze(-1) - torch.arange(past + time, device=begins.device)  # [time, past + time]
        near = (back >= 0) & (back <= self.capacity)
        same = torch.cat(
            [
                (trial == 0).unsqueeze(1) & past_known.unsqueeze(0),
                trial.unsqueeze(1) == trial.unsqueeze(0),
            ],
            1,
        )
        return _Allowed(past_known, same & near.unsqueeze(-1))


class _Allowed:
    """Which rows may be read: ``past_known`` ``[past, batch]``, ``rows`` ``[time, past + time, batch]``."""

    def __init__(self, past_known: Tensor, rows: Tensor) -> None:
        self.past_known, self.rows = past_known, rows


class _Convolution(nn.Module):
    """A gated convolution of kernel 2 over the rows t and t − dilation; its output stands beside its input."""

    def __init__(self, width: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.now = nn.Linear(width, 2 * filters)
        self.before = nn.Linear(width, 2 * filters, bias=False)
        self.dilation = dilation

    def forward(self, stream: Tensor, past: Tensor, allowed: Tensor) -> Tensor:
        time, rows = len(stream), len(past) + len(stream)
        at = torch.arange(len(past), rows, device=stream.device) - self.dilation
        inside = at.clamp_min(0)
        earlier = torch.cat([past, stream])[inside]
        reads = allowed[torch.arange(time, device=stream.device), inside] & (at >= 0).unsqueeze(-1)
        hidden = self.now(stream) + torch.where(reads.unsqueeze(-1), self.before(earlier), 0.0)
        value, gate = hidden.chunk(2, -1)
        return torch.cat([stream, value.tanh() * gate.sigmoid()], -1)


class _Attention(nn.Module):
    """Causal attention with one head; what was read stands beside its input."""

    def __init__(self, width: int, keys: int, values: int) -> None:
        super().__init__()
        self.keys, self.size = keys, keys + values
        self.query = nn.Linear(width, keys)
        self.key_value = nn.Linear(width, keys + values)

    def forward(self, stream: Tensor, past: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        record = self.key_value(stream)
        key, value = torch.cat([past, record]).split([self.keys, self.size - self.keys], -1)
        scores = torch.einsum("tbk,sbk->tsb", self.query(stream), key) / math.sqrt(self.keys)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(1)  # a row may always read itself
        return torch.cat([stream, torch.einsum("tsb,sbv->tbv", weights, value)], -1), record
