"""Memories: a step against torch's own layers, steps against the unrolled whole, nothing crosses between trials."""

import math

import pytest
import torch
from torch import nn

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.rl.recurrent import MEMORIES, memory

KINDS = sorted(MEMORIES)


def case(kind, time=7, batch=4):
    torch.manual_seed(3)
    net = memory(kind, 3, 5).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(time, batch, 3, generator=generator, dtype=torch.float64)
    state = torch.randn(batch, net.width, generator=generator, dtype=torch.float64)
    return net, x, state, torch.zeros(time, batch, dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
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
        assert torch.equal(h, whole[t])
    assert torch.equal(state, last)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_crosses_to_the_next_trial(kind):
    """What was before a trial's begin, NaN included, changes nothing after it, and has no gradient from it. Without the
    mark (the control) it does."""
    net, x, state, begins = case(kind)
    begins[4, 2] = True
    spoiled = x.clone()
    spoiled[:4, 2] = math.nan
    a, b = (net.unroll(inputs, state, begins)[0] for inputs in (x, spoiled))
    assert torch.equal(a[4:], b[4:])
    assert b[:4, 2].isnan().all()
    assert torch.equal(a[:, [0, 1, 3]], b[:, [0, 1, 3]])  # nor to another environment
    inputs = x.clone().requires_grad_()
    slope = torch.autograd.grad(net.unroll(inputs, state, begins)[0][4:, 2].sum(), inputs)[0]
    assert slope[:4].abs().max() == 0
    assert slope[4:, 2].abs().max() > 0
    never = torch.zeros_like(begins)
    assert net.unroll(spoiled, state, never)[0][4:, 2].isnan().all()
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


def test_bad_input_is_refused():
    net, x, state, begins = case("gru")
    with pytest.raises(ShapeError, match="Expected x"):
        net.unroll(x, state[:2], begins)
    with pytest.raises(ShapeError, match="Expected x"):
        net.unroll(x, state, begins[:2])
    with pytest.raises(OptionError, match="Unknown memory 'rnn'"):
        memory("rnn", 3, 5)
    with pytest.raises(OptionError, match="at least one"):
        memory("gru", 0, 5)
