"""Networks of a point and a set together: by hand, what must not count, translation, empty supports, bad input."""

import math

import pytest
import torch
from torch.nn.functional import conv1d, gelu, scaled_dot_product_attention

import bayesmeta as bm
from bayesmeta import errors, processes
from tests.programs import batch_of

F64 = torch.float64
NETWORKS = {
    "deep_set": lambda **o: processes.DeepSetProcess(1, width=8, **o),
    "attention": lambda **o: processes.AttentiveProcess(1, width=8, heads=2, **o),
    "self_attention": lambda **o: processes.AttentiveProcess(1, width=8, heads=2, blocks=1, **o),
    "convolution": lambda **o: processes.ConvProcess(1, width=8, depth=2, points_per_unit=4.0, **o),
    "transformer": lambda **o: processes.TransformerProcess(1, width=8, heads=2, depth=2, **o),
}
each = pytest.mark.parametrize("name", NETWORKS)


def make(name, **options):
    return stirred(lambda: NETWORKS[name](**options))


def stirred(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build().double()
        for parameter in network.parameters():  # no weight is 0 any more
            parameter.data.add_(0.4 * torch.randn_like(parameter))
    return network.requires_grad_(False)


def data(ragged=True, tasks=3):
    support = batch_of(tasks, 6, dtype=F64, ragged=ragged)
    return support, batch_of(tasks, 4, seed=1, dtype=F64).x


def one(support, task):
    """A task by itself, without padding."""
    keep = support.full_mask()[task]
    return bm.Observations(support.x[task, keep][None], support.y[task, keep][None])


# -- what must not count ------------------------------------------------------------------------------------------


@each
def test_order_and_padding_of_the_support_do_not_count(name):
    network, (support, x) = make(name), data()
    out = network(support, x)
    assert out.shape == (1, 3, 4, 2)
    turned = bm.Observations(support.x.flip(1), support.y.flip(1), support.mask.flip(1))
    torch.testing.assert_close(network(turned, x), out, rtol=0, atol=1e-13)
    mask = support.mask
    other = bm.Observations(torch.where(mask[..., None], support.x, 50.0), torch.where(mask, support.y, -9.0), mask)
    torch.testing.assert_close(network(other, x), out, rtol=0, atol=1e-13)
    alone = torch.cat([network(one(support, task), x[task : task + 1]) for task in range(3)], 1)
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-12)
    y = torch.where(mask, support.y + 1.0, support.y)  # control: what is real does count
    assert (network(support.with_y(y), x) - out).abs().amax((0, 2, 3)).min() > 1e-3


@each
def test_no_target_sees_another(name):
    """Neither what else is asked, nor how far away, changes the outputs at a point; nor what other tasks ask."""
    network, (support, x) = make(name), data()
    out = network(support, x)
    more = torch.cat([x, torch.tensor([-7.0, 9.0], dtype=F64).expand(3, 2)[..., None]], 1)
    torch.testing.assert_close(network(support, more)[:, :, :4], out, rtol=0, atol=1e-12)
    torch.testing.assert_close(network(support, x[:, 2:3]), out[:, :, 2:3], rtol=0, atol=1e-12)
    elsewhere = x.clone()
    elsewhere[-1] += 11.0
    torch.testing.assert_close(network(support, elsewhere)[:, :-1], out[:, :-1], rtol=0, atol=1e-12)


def test_a_target_that_sees_the_others_is_caught():
    """Control: attention among the targets breaks the test above."""

    class Leaky(processes.AttentiveProcess):
        def attend(self, support, x):
            r = super().attend(support, x)
            return r + r.mean(-2, keepdim=True)

    network = stirred(lambda: Leaky(1, width=8, heads=2))
    support, x = data()
    assert (network(support, x[:, 2:3]) - network(support, x)[:, :, 2:3]).abs().max() > 1e-4


# -- translation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 0.137, -2013.4])
def test_the_convolution_is_translation_equivariant(shift):
    network, (support, x) = make("convolution"), data()
    moved = bm.Observations(support.x + shift, support.y, support.mask)
    torch.testing.assert_close(network(moved, x + shift), network(support, x), rtol=0, atol=1e-9)
    # controls: moving one side alone, and networks that know where they are
    assert (network(moved, x) - network(support, x)).abs().max() > 1e-2
    for name in ("deep_set", "attention", "transformer"):
        other = make(name)
        assert (other(moved, x + shift) - other(support, x)).abs().max() > 1e-3, name


def test_a_convolution_that_is_told_where_it_is_is_no_longer_equivariant():
    class Absolute(processes.ConvProcess):
        def forward(self, support, x, z=None):
            return super().forward(support.with_y(support.y + 0.1 * support.x.squeeze(-1)), x, z)

    network = stirred(lambda: Absolute(1, width=8, depth=2, points_per_unit=4.0))
    support, x = data()
    moved = bm.Observations(support.x + 1.0, support.y, support.mask)
    assert (network(moved, x + 1.0) - network(support, x)).abs().max() > 1e-3


def test_too_far_for_the_dtype():
    """Beyond 2²³ grid points float32 has no number between two of them."""
    network, (support, x) = NETWORKS["convolution"](), data()
    support, x = support.to(dtype=torch.float32), x.float()
    with torch.no_grad():
        assert network(support, x + 2e6).isfinite().all()
        with pytest.raises(errors.DataError, match="float64"):
            network(support, x + 2.2e6)
        assert network.double()(support.to(dtype=F64), x.double() + 2.2e6).isfinite().all()


def test_how_far_the_convolution_sees():
    network = make("convolution")
    x = torch.zeros(1, 1, 1, dtype=F64)
    reach = network.receptive_field + 8 / 4.0  # and the window by which targets read the grid

    def at(distance, y):
        near = torch.tensor([[[-0.5], [distance]]], dtype=F64)
        return network(bm.Observations(near, torch.tensor([[1.0, y]], dtype=F64)), x)

    tail = 9.0 * float(network.log_length_in.exp())  # of the Gaussian that puts an observation on the grid
    torch.testing.assert_close(at(reach + tail, 3.0), at(reach + tail, -3.0), rtol=0, atol=1e-8)
    assert (at(2.0, 3.0) - at(2.0, -3.0)).abs().max() > 1e-3


# -- by hand ------------------------------------------------------------------------------------------------------


def test_the_convolution_by_hand():
    """Sums over observations and grid points in loops, and torch's own padded convolution."""
    network = make("convolution")
    support, x = data(ragged=False, tasks=1)
    origin = float(support.x.min())
    step, pad = 1 / 4.0, 60
    positions = [origin + k * step for k in range(-pad, pad + 1)]  # wide enough that no end is seen
    length, out_length = float(network.log_length_in.exp()), float(network.log_length_out.exp())
    rows = []
    for t in positions:
        weights = [math.exp(-0.5 * ((t - float(v)) / length) ** 2) for v in support.x.flatten()]
        total = sum(w * float(v) for w, v in zip(weights, support.y.flatten(), strict=True))
        rows.append([sum(weights), total / (sum(weights) + 1e-8)])
    h = network.lift(torch.tensor(rows, dtype=F64))
    for block in network.blocks:
        kernel = block.taps.T.unsqueeze(1)
        seen = conv1d(h.T[None], kernel, block.bias, padding=2 * block.dilation, dilation=block.dilation, groups=8)
        h = h + block.mix(gelu(seen[0].T))
    for target in range(4):
        at = float(x[0, target])
        weights = torch.tensor(
            [math.exp(-0.5 * ((at - t) / out_length) ** 2) if abs(at - t) <= 8 * step else 0.0 for t in positions],
            dtype=F64,
        )
        expected = network.decoder((weights / weights.sum()) @ h)
        torch.testing.assert_close(network(support, x)[0, 0, target], expected, rtol=1e-9, atol=1e-9)


def test_attention_by_hand():
    network, (support, x) = make("attention"), data()
    found = network.attend(support, x)
    for task in range(3):
        alone = one(support, task)
        value = network.value(network.embed(torch.cat([alone.x[0], alone.y[0, :, None]], -1)))
        key, query = network.key(alone.x[0]), network.query(x[task])
        heads = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            weight = (query[:, part] @ key[:, part].T / 2.0).softmax(-1)
            heads.append(weight @ value[:, part])
        torch.testing.assert_close(found[task], network.merge(torch.cat(heads, -1)), rtol=1e-10, atol=1e-10)


def test_attention_to_one_observation_is_its_value():
    network, (support, x) = make("attention"), data(ragged=False)
    first = bm.Observations(support.x[:, :1], support.y[:, :1])
    value = network.merge(network.value(network.embed(torch.cat([first.x, first.y[..., None]], -1))))
    torch.testing.assert_close(network.attend(first, x), value.expand(3, 4, 8), rtol=1e-12, atol=1e-12)


def test_the_transformer_by_hand():
    """All tokens in one sequence under one mask: what is asked attends to what is seen and to itself."""
    network, (support, x) = make("transformer"), data(ragged=False)
    seen = torch.cat([support.x, support.y[..., None], torch.zeros(3, 6, 1)], -1)
    asked = torch.cat([x, torch.zeros(3, 4, 1), torch.ones(3, 4, 1)], -1)
    h = network.embed(torch.cat([seen, asked], 1))
    allowed = torch.zeros(10, 10, dtype=torch.bool)
    allowed[:, :6] = True
    allowed |= torch.eye(10, dtype=torch.bool)
    allowed[:6, 6:] = False
    for layer in network.blocks:
        block = layer.block
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in block.project(block.norm(h)).chunk(3, -1))
        h = h + block.merge(scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(-2))
        h = h + block.rest(h)
    expected = network.decoder(network.norm(h[:, 6:]))
    torch.testing.assert_close(network(support, x)[0], expected, rtol=1e-10, atol=1e-10)


# -- without support, with a latent -------------------------------------------------------------------------------


@each
def test_without_support(name):
    network, (support, x) = make(name), data()
    nothing = bm.Observations(support.x[:, :0], support.y[:, :0])
    masked = bm.Observations(support.x, support.y, torch.zeros_like(support.mask))
    out = network(nothing, x)
    torch.testing.assert_close(network(masked, x), out, rtol=0, atol=1e-12)
    some = support.mask.clone()
    some[1] = False  # one empty task among others
    mixed = network(bm.Observations(support.x, support.y, some), x)
    torch.testing.assert_close(mixed[:, 1], out[:, 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed[:, 0], network(support, x)[:, 0], rtol=0, atol=1e-12)
    if name == "convolution":
        torch.testing.assert_close(out, out[:, :1, :1].expand_as(out), rtol=0, atol=1e-12)
    if "attention" in name:
        expected = network.decoder(torch.cat([x, network.empty.expand(3, 4, -1)], -1))
        torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-12)


@each
def test_a_latent_is_read_draw_by_draw(name):
    network, (support, x) = make(name, latent_size=2), data()
    z = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    out = network(support, x, z)
    assert out.shape == (5, 3, 4, 2)
    torch.testing.assert_close(network(support, x, z[2:3]), out[2:3], rtol=0, atol=1e-12)
    assert (out[0] - out[1]).abs().amax((1, 2)).min() > 1e-4


@each
def test_no_targets_and_classes(name):
    network, (support, x) = make(name), data()
    assert network(support, x[:, :0]).shape == (1, 3, 0, 2)
    counted = make(name, classes=3, targets=1)
    labels = torch.randint(3, (3, 6), generator=torch.Generator().manual_seed(0))
    out = counted(support.with_y(labels), x)
    assert (counted(support.with_y((labels + 1) % 3), x) - out).abs().max() > 1e-4


# -- bad input ----------------------------------------------------------------------------------------------------


@each
def test_other_widths(name):
    network, (support, x) = make(name, latent_size=2, max_shots=5), data()
    z = torch.zeros(1, 3, 2, dtype=F64)
    few = bm.Observations(support.x[:, :5], support.y[:, :5])
    network(few, x, z)
    with pytest.raises(errors.ShapeError, match=r"takes x \[3, M, 1\]"):
        network(few, x.expand(-1, -1, 2), z)
    with pytest.raises(errors.ShapeError, match=r"takes x \[3, M, 1\]"):
        network(few, x[:2], z)
    with pytest.raises(errors.ShapeError, match="latent of width 3"):
        network(few, x, torch.zeros(1, 3, 3, dtype=F64))
    with pytest.raises(errors.ShapeError, match="latent of width 0"):
        network(few, x)
    with pytest.raises(errors.ShapeError, match="max_shots=5"):
        network(bm.Observations(support.x, support.y), x, z)
    with pytest.raises(errors.ShapeError, match=r"2 target|y of shape"):
        network(bm.Observations(few.x, few.y[..., None].expand(-1, -1, 2)), x, z)
    with pytest.raises(errors.DataError, match="y=None"):
        network(few.with_y(None), x, z)


def test_sizes_out_of_range():
    for kind in (processes.DeepSetProcess, processes.AttentiveProcess, processes.TransformerProcess):
        with pytest.raises(errors.OptionError, match="depth"):
            kind(1, depth=0)
    for options in ({"outputs": 0}, {"width": 0}, {"latent_size": -1}):
        with pytest.raises(errors.OptionError):
            processes.DeepSetProcess(1, **options)
    for kind in (processes.AttentiveProcess, processes.TransformerProcess):
        with pytest.raises(errors.OptionError, match="multiple of heads"):
            kind(1, width=10, heads=4)
    with pytest.raises(errors.OptionError, match="blocks"):
        processes.AttentiveProcess(1, blocks=-1)
    with pytest.raises(errors.OptionError, match="points_per_unit"):
        processes.ConvProcess(1, points_per_unit=0.0)
    with pytest.raises(errors.ShapeError, match="one input"):
        processes.ConvProcess(2)
    network, (support, x) = make("convolution", max_points=100), data()
    network(support, x)
    with pytest.raises(errors.ShapeError, match="max_points=100"):
        network(support, 30.0 * x)
