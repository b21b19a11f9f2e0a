"""Memories: a step against torch's own layers, steps against the unrolled whole, nothing crosses between trials."""

import math

import pytest
import torch
from torch import nn

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.rl.memory.recurrent import MEMORIES, memory
from bayesmeta.rl.memory.snail import SNAILMemory

KINDS = [*sorted(MEMORIES), "snail"]


def case(kind, time=7, batch=4):
    torch.manual_seed(3)
    net = (SNAILMemory(3, 6, units=4, filters=3, keys=2, blocks=2) if kind == "snail" else memory(kind, 3, 5)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(time, batch, 3, generator=generator, dtype=torch.float64)
    state = torch.randn(batch, net.width, generator=generator, dtype=torch.float64)
    if kind == "snail":
        state[:, -1] = torch.tensor([0, 2, 6, 1])[:batch]  # steps of the running trial that it holds
    return net, x, state, torch.zeros(time, batch, dtype=torch.bool)


@pytest.mark.parametrize("kind", sorted(MEMORIES))
def test_unrolling_equals_torchs_own_layer(kind):
    net, x, state, begins = case(kind)
    layer = (nn.GRU if kind == "gru" else nn.LSTM)(3, 5).double()
    layer.load_state_dict({f"{name}_l0": value for name, value in net.cell.state_dict().items()})
    first = state.unsqueeze(0) if kind == "gru" else tuple(s.contiguous().unsqueeze(0) for s in state.chunk(2, -1))
    expected, last = layer(x, first)
    got, after = net.unroll(x, state, begins)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(after, last[0] if kind == "gru" else torch.cat(last, -1)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_whole(kind):
    net, x, state, begins = case(kind)
    begins[3, 1] = begins[5] = True
    whole, last = net.unroll(x, state, begins)
    for t in range(len(x)):
        h, state = net.step(x[t], state, begins[t])
        torch.testing.assert_close(h, whole[t], rtol=1e-12, atol=1e-14)
    if kind == "snail":  # records of another trial may be kept, and are not read
        assert torch.equal(state[:, -1], last[:, -1])
        assert state[:, -1].tolist() == [2] * 4
        tail = 2 * net.record + 1
        state, last = state[:, -tail:], last[:, -tail:]
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_crosses_to_the_next_trial(kind):
    """What was before a trial's begin changes nothing after it, NaN included, and has no gradient from it.

    Without the mark (the control) it does.
    """
    net, x, state, begins = case(kind)
    begins[4, 2] = True
    spoiled, bad = x.clone(), 1e6 if kind == "snail" else math.nan  # attention weighs what it may not read by 0
    spoiled[:4, 2] = bad
    a, b = (net.unroll(inputs, state, begins)[0] for inputs in (x, spoiled))
    torch.testing.assert_close(a[4:], b[4:], rtol=1e-13, atol=0)
    assert not torch.equal(a[:4, 2], b[:4, 2])
    torch.testing.assert_close(a[:, [0, 1, 3]], b[:, [0, 1, 3]], rtol=1e-13, atol=0)  # nor to another environment
    inputs = x.clone().requires_grad_()
    slope = torch.autograd.grad(net.unroll(inputs, state, begins)[0][4:, 2].sum(), inputs)[0]
    assert slope[:4].abs().max() == 0
    assert slope[4:, 2].abs().max() > 0
    never = torch.zeros_like(begins)
    assert not torch.allclose(net.unroll(spoiled, state, never)[0][4:, 2], a[4:, 2])
    # a trial that begins is one that stands alone
    torch.testing.assert_close(a[4:, 2:3], net.unroll(x[4:, 2:3], net.first(1), never[4:, 2:3])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_memories_can_be_differentiated_twice(kind):
    net, x, state, begins = case(kind, time=3)
    weights = list(net.parameters())

    def slope(create_graph):
        out = net.unroll(x, state, begins)[0].square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(out, weights, create_graph=create_graph)])

    second = torch.autograd.grad(slope(True).sum(), weights[0])[0].flatten()
    for i in (0, 7):
        flat, kept, values = weights[0].data.view(-1), weights[0].data.view(-1)[i].item(), []
        for sign in (1, -1):
            flat[i] = kept + sign * 1e-5
            values.append(slope(False).sum().item())
        flat[i] = kept
        assert second[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-6)


def test_snail_by_hand():
    """Three steps of one block, written as loops over rows: what each convolution and the attention read."""
    torch.manual_seed(0)
    net = SNAILMemory(2, 3, units=3, filters=2, keys=2, values=2).double()
    x = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got, _ = net.unroll(x, net.first(1), torch.tensor([[True], [False], [False]]))
    rows = [net.read(x[t, 0]) for t in range(3)]
    first, second, attention = net.layers
    for layer, dilation in ((first, 1), (second, 2)):
        grown = []
        for t in range(3):
            hidden = layer.now.weight @ rows[t] + layer.now.bias
            if t >= dilation:
                hidden = hidden + layer.before.weight @ rows[t - dilation]
            grown.append(torch.cat([rows[t], hidden[:2].tanh() * hidden[2:].sigmoid()]))
        rows = grown
    pairs = [attention.key_value(row).split(2) for row in rows]
    for t in range(3):
        weights = torch.stack([attention.query(rows[t]) @ pairs[s][0] / math.sqrt(2) for s in range(t + 1)]).softmax(0)
        read = sum(w * pairs[s][1] for s, w in enumerate(weights))
        torch.testing.assert_close(got[t, 0], torch.cat([rows[t], read]))


def test_snail_forgets_what_is_further_back_than_its_capacity():
    net, x, _, begins = case("snail", time=13)
    net = SNAILMemory(3, 4, units=4, filters=3).double()
    out, _ = net.unroll(x, net.first(4), begins)
    spoiled = x.clone()
    spoiled[0] += 1
    other, _ = net.unroll(spoiled, net.first(4), begins)
    # convolutions see 1 + 2 + 4 steps back, and attention a capacity of 4 behind them
    assert not torch.allclose(out[11], other[11])
    torch.testing.assert_close(out[12], other[12], rtol=1e-13, atol=0)


def test_bad_input_is_refused():
    net, x, state, begins = case("gru")
    with pytest.raises(ShapeError, match="Expected x"):
        net.unroll(x, state[:2], begins)
    with pytest.raises(ShapeError, match="Expected x"):
        net.unroll(x, state, begins[:2])
    with pytest.raises(OptionError, match="each be at least 1"):
        SNAILMemory(3, 0)
    with pytest.raises(OptionError, match="Unknown memory 'rnn'"):
        memory("rnn", 3, 5)
    with pytest.raises(OptionError, match="at least one"):
        memory("gru", 0, 5)
