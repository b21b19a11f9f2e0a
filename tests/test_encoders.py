"""Encoders: invariances to the last bit, products of Gaussians against closed forms, what each reads, bad input."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models import encoders
from bayesmeta.ops import sets
from tests.programs import batch_of

F32, F64 = torch.float32, torch.float64

MAKERS = {
    "mean": lambda **o: encoders.PooledEncoder(2, 1, 5, **o),
    "sum": lambda **o: encoders.PooledEncoder(2, 1, 5, pool="sum", **o),
    "max": lambda **o: encoders.PooledEncoder(2, 1, 5, pool="max", **o),
    "attention": lambda **o: encoders.PooledEncoder(2, 1, 5, blocks=1, block="attention", **o),
    "transformer": lambda **o: encoders.PooledEncoder(2, 1, 5, blocks=2, hidden=[32], **o),
    "recurrent": lambda **o: encoders.RecurrentEncoder(2, 1, 5, **o),
    "product": lambda **o: encoders.ProductEncoder(2, 1, 3, **o),
    "product_full": lambda **o: encoders.ProductEncoder(2, 1, 3, covariance="full", rank=2, **o),
}
UNORDERED = [name for name in MAKERS if name != "recurrent"]
each_encoder = pytest.mark.parametrize("name", MAKERS)


def make(name, dtype=F32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = MAKERS[name](**options)
        for parameter in encoder.parameters():  # nothing at its first, small values
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return encoder.to(dtype)


def a_batch(dtype=F32, tasks=6, shots=37, seed=0, ragged=True):
    """Ragged, with ties in the first column, and two equal rows."""
    data = batch_of(tasks, shots, 2, seed=seed, dtype=dtype, ragged=ragged)
    x, y = data.x.clone(), data.y.clone()
    x[..., 0] = (2 * x[..., 0]).round() / 2  # −0.0 among them
    x[0, 1], y[0, 1] = x[0, 0], y[0, 0]
    return bm.Observations(x, y, data.mask)


def permuted(observations, seed=1):
    """Each task's observations in another order, the mask with them."""
    generator = torch.Generator().manual_seed(seed)
    shape = observations.x.shape[:2]
    order = torch.rand(shape, generator=generator).argsort(-1)
    x = sets.take_rows(observations.x, order)
    mask = None if observations.mask is None else observations.mask.gather(1, order)
    return bm.Observations(x, observations.y.gather(1, order), mask, observations.w)


def padded(observations, extra, seed=2):
    """The same observations with more padding, of random numbers, among them."""
    generator = torch.Generator().manual_seed(seed)
    tasks, shots, width = observations.x.shape
    x = torch.randn(tasks, shots + extra, width, generator=generator, dtype=observations.x.dtype)
    y = torch.randn(tasks, shots + extra, generator=generator, dtype=observations.x.dtype)
    keep = torch.rand(shots + extra, generator=generator).argsort()[:shots].sort().values
    x[:, keep], y[:, keep] = observations.x, observations.y
    mask = torch.zeros(tasks, shots + extra, dtype=torch.bool)
    mask[:, keep] = observations.full_mask()
    return bm.Observations(x, y, mask, observations.w)


# -- invariances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("name", UNORDERED)
def test_the_order_never_counts_to_the_last_bit(name, ragged, dtype):
    encoder, data = make(name, dtype), a_batch(dtype, ragged=ragged)
    expected = encoder(data)
    for seed in range(20):
        assert torch.equal(encoder(permuted(data, seed)), expected)
    longest = int(data.full_mask().sum(-1).argmax())
    y = data.y.clone()
    y[longest, 2] += 10.0  # control: another set
    assert not torch.equal(encoder(data.with_y(y))[longest], expected[longest])


@pytest.mark.parametrize("name", ["mean", "sum", "transformer", "product", "product_full"])
def test_without_a_canonical_order_the_last_bits_move(name):
    """Control: the test above can fail; and the option leaves the order to the sum, up to rounding."""
    encoder, data = make(name, sort=False), a_batch(ragged=False)
    expected = encoder(data)
    others = [encoder(permuted(data, seed)) for seed in range(20)]
    assert not all(torch.equal(other, expected) for other in others)
    for other in others:
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F64])
@each_encoder
def test_padding_never_counts_to_the_last_bit(name, dtype):
    encoder, data = make(name, dtype), a_batch(dtype)
    expected = encoder(data)
    for extra in (1, 2, 5, 30, 219):
        assert torch.equal(encoder(padded(data, extra)), expected)
    full = a_batch(dtype, ragged=False)
    assert torch.equal(encoder(padded(full, 3)), encoder(full))  # and a mask beside none
    other = padded(full, 3)
    counted = bm.Observations(other.x, other.y)  # control: the padding as data
    assert not torch.isclose(encoder(counted), encoder(full)).all(-1).any()


@pytest.mark.parametrize("name", UNORDERED)
def test_gradients_are_invariant_too(name):
    encoder, data = make(name), a_batch()

    def gradients(observations):
        encoder.zero_grad()
        encoder(observations).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])

    expected = gradients(data)
    assert torch.equal(gradients(permuted(padded(data, 7))), expected)
    assert expected.isfinite().all()
    assert expected.abs().sum() > 0


@each_encoder
def test_a_task_alone_is_as_among_others(name):
    """Up to rounding: the longest of the batch decides the shape of the matrix products."""
    encoder, data = make(name, F64), a_batch(F64)
    together = encoder(data)
    for task in range(6):
        alone = encoder(data.tasks([task]))
        torch.testing.assert_close(alone, together[task : task + 1], rtol=1e-10, atol=1e-12)


def test_the_recurrent_encoder_reads_in_order():
    encoder, data = make("recurrent", F64), a_batch(F64)
    assert encoder.ordered
    assert not torch.allclose(encoder(permuted(data)), encoder(data))
    prefixes, counts = encoder.prefixes(padded(data, 4)), data.full_mask().sum(-1)
    for task in range(6):
        for n in range(int(counts[task]) + 1):
            part = bm.Observations(data.x[[task], :n], data.y[[task], :n])
            torch.testing.assert_close(encoder(part)[0], prefixes[task, n], rtol=1e-12, atol=1e-12)
    longest = int(counts.argmax())
    x, y = data.x[longest, :5], data.y[longest, :5]  # by hand: the cell on one row after the other
    cell = torch.nn.GRUCell(3, 64).to(F64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in encoder.recurrence.state_dict().items()})
    state = encoder.first
    for row in torch.cat([x, y.unsqueeze(-1)], -1):
        state = cell(row.unsqueeze(0), state.reshape(1, -1))
    torch.testing.assert_close(encoder.read(state)[0], prefixes[longest, 5], rtol=1e-12, atol=1e-12)


# -- the empty set ------------------------------------------------------------------------------------------------


def empties(dtype=F32):
    data = a_batch(dtype)
    yield bm.Observations(data.x[:, :0], data.y[:, :0])
    yield bm.Observations(data.x, data.y, torch.zeros_like(data.mask))
    yield bm.Observations(data.x, data.y, data.mask & (torch.arange(6) != 2)[:, None])  # one task among others


@each_encoder
def test_the_empty_set_has_its_own_value(name):
    encoder = make(name)
    if name.startswith("product"):
        spread = torch.ones(3) if name == "product" else torch.eye(3).flatten()
        expected = torch.cat([torch.zeros(3), spread])
    else:
        expected = encoder.read(encoder.first) if name == "recurrent" else encoder.empty
    for observations in empties():
        encoder.zero_grad()
        r = encoder(observations)
        r.square().sum().backward()
        if name == "recurrent":
            torch.testing.assert_close(r[2], expected)  # a product of matrices of another size
        else:
            assert torch.equal(r[2], expected)
        assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    full = encoder(a_batch())
    assert not torch.isclose(full[2], expected).all()  # control


# -- products of Gaussians ----------------------------------------------------------------------------------------


def test_a_product_of_gaussians_is_bayes_rule_one_factor_after_the_other():
    generator = torch.Generator().manual_seed(0)
    loc, precision = torch.randn(4, 7, 3, generator=generator, dtype=F64), torch.rand(4, 7, 3, dtype=F64) + 0.1
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 0])[:, None]
    prior_loc, prior_scale = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([0.5, 1.0, 3.0]).double()
    mean, scale = sets.product_of_gaussians(loc * precision, precision, mask, prior_loc, prior_scale)
    for task in range(4):
        m, v = prior_loc, prior_scale**2
        for i in range(int(mask[task].sum())):  # a Kalman update with the gain v / (v + 1/precision)
            gain = v / (v + 1 / precision[task, i])
            m, v = m + gain * (loc[task, i] - m), (1 - gain) * v
        torch.testing.assert_close(mean[task], m, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scale[task], v.sqrt(), rtol=1e-12, atol=1e-12)
    assert torch.equal(mean[3], prior_loc)
    assert torch.equal(scale[3], prior_scale)
    without, _ = sets.product_of_gaussians(loc * precision, precision, mask, 0.0, 1e6)  # control: no prior to speak of
    assert (without[:3] - mean[:3]).abs().min() > 1e-3
    # and the density is that of the product, up to one constant
    grid = torch.linspace(-3, 3, 9, dtype=F64)[:, None].expand(9, 3)
    product = Normal(prior_loc, prior_scale).log_prob(grid)
    product = product + Normal(loc[1, :3], precision[1, :3] ** -0.5).log_prob(grid[:, None]).sum(1)
    rest = product - Normal(mean[1], scale[1]).log_prob(grid)
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=1e-10, atol=1e-10)


def test_a_product_of_correlated_gaussians():
    """Against the precision matrix inverted as it stands; for rank-one factors that is Bayesian linear regression."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(4, 7, 3, 2, generator=generator, dtype=F64)
    information = torch.randn(4, 7, 3, generator=generator, dtype=F64)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 0])[:, None]
    mean, root = sets.product_of_correlated_gaussians(information, factor, mask)
    assert torch.equal(root, root.tril())
    for task in range(4):
        keep = mask[task]
        precision = torch.eye(3, dtype=F64) + (factor[task, keep] @ factor[task, keep].mT).sum(0)
        covariance = torch.linalg.inv(precision)
        torch.testing.assert_close(root[task] @ root[task].T, covariance, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(mean[task], covariance @ information[task, keep].sum(0), rtol=1e-11, atol=1e-12)
    assert torch.equal(mean[3], torch.zeros(3, dtype=F64))
    assert torch.equal(root[3], torch.eye(3, dtype=F64))
    tasks = bm.tasks.LinearGaussian(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64), 0.5)
    support = tasks.sample(4, support=6, query=0).support
    exact = tasks.posterior(support)
    mean, root = sets.product_of_correlated_gaussians(
        support.x * support.y.unsqueeze(-1) / 0.25, support.x.unsqueeze(-1) / 0.5, support.full_mask()
    )
    torch.testing.assert_close(mean, exact.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(root @ root.mT, exact.covariance_matrix, rtol=1e-10, atol=1e-12)
    diagonal, scale = sets.product_of_gaussians(information, factor.square().sum(-1), mask, 0.0, 1.0)  # control
    assert not torch.allclose(diagonal[:2], mean[:2])
    assert not torch.allclose(scale[:2], root.diagonal(dim1=-2, dim2=-1)[:2])


@pytest.mark.parametrize("name", ["product", "product_full"])
def test_the_product_encoder_multiplies_its_factors(name):
    encoder, data = make(name, F64), a_batch(F64)
    information, precision, _ = encoder.factors(data)
    loc, spread = encoder.gaussian(data)
    keep = encoder.rows(data)[1]
    for task in range(6):
        parts = precision[task, keep[task]]
        matrix = parts.diag_embed().sum(0) if name == "product" else (parts @ parts.mT).sum(0)
        covariance = torch.linalg.inv(torch.eye(3, dtype=F64) + matrix)
        expected = MultivariateNormal(covariance @ information[task, keep[task]].sum(0), covariance)
        torch.testing.assert_close(loc[task], expected.mean, rtol=1e-9, atol=1e-10)
        root = spread[task].diag_embed() if name == "product" else spread[task]
        torch.testing.assert_close(root @ root.T, covariance, rtol=1e-9, atol=1e-10)
    more = encoder.gaussian(bm.union(data, a_batch(F64, seed=3)))[1]  # more factors, more precision
    width = [s if name == "product" else s.square().sum(-1).sqrt() for s in (spread, more)]
    assert (width[1] < width[0]).all()


# -- what is read -------------------------------------------------------------------------------------------------


def test_a_mean_alone_does_not_tell_one_observation_from_many_and_the_count_does():
    encoder = make("mean", F64)
    one = bm.Observations(torch.ones(1, 1, 2, dtype=F64), torch.ones(1, 1, dtype=F64))
    many = bm.Observations(torch.ones(1, 9, 2, dtype=F64), torch.ones(1, 9, dtype=F64))
    difference = (encoder(many) - encoder(one))[0]
    expected = encoder.read.weight[:, -1] * (math.log(10) - math.log(2))
    torch.testing.assert_close(difference, expected, rtol=1e-10, atol=1e-12)


def test_attention_by_hand():
    """One block without feed-forward part: softmax over the real entries alone, head by head."""
    from bayesmeta.models.attention import AttentionBlock

    torch.manual_seed(0)
    block = AttentionBlock(6, 2, None).to(F64)
    h, mask = torch.randn(3, 4, 6, dtype=F64), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    query, key, value = block.project(block.norm(h)).chunk(3, -1)
    heads = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        score = query[..., part] @ key[..., part].mT / 3**0.5
        weight = torch.where(mask[:, None], score.exp(), 0.0)
        heads.append(weight / weight.sum(-1, keepdim=True) @ value[..., part])
    expected = h + block.merge(torch.cat(heads, -1))
    torch.testing.assert_close(block(h, mask), expected, rtol=1e-12, atol=1e-12)
    swap = torch.tensor([2, 0, 3, 1])  # equivariant
    torch.testing.assert_close(block(h[:, swap], mask[:, swap]), expected[:, swap], rtol=1e-12, atol=1e-12)
    wrong = block(h, torch.ones_like(mask))  # control: padding attended to
    assert not torch.allclose(wrong[1:], expected[1:])


def test_labels_are_read_as_one_hot_and_counts_by_their_logarithm():
    x, y = torch.zeros(1, 3, 1), torch.tensor([[0.0, 2.0, 1.0]])
    rows, _ = encoders.PooledEncoder(1, 1, 4, classes=3, sort=False).rows(bm.Observations(x, y))
    assert torch.equal(rows[0, :, 1:], torch.eye(3)[[0, 2, 1]])
    both = encoders.PooledEncoder(1, 2, 4, classes=3, sort=False)
    rows, _ = both.rows(bm.Observations(x, torch.stack([y, y.flip(1)], -1)))
    assert torch.equal(rows[0, :, 1:], torch.cat([torch.eye(3)[[0, 2, 1]], torch.eye(3)[[1, 2, 0]]], -1))
    rows, _ = encoders.PooledEncoder(1, 1, 4, counts=True, sort=False).rows(bm.Observations(x, y))
    torch.testing.assert_close(rows[0, :, 1], (1 + y[0]).log())


@each_encoder
def test_what_is_given_for_each_task_is_read(name):
    encoder, data = make(name, F64, given=2), a_batch(F64)
    given = torch.randn(4, 6, 2, dtype=F64)
    together = encoder(data, given)
    assert together.shape[:2] == (4, 6)
    for g in range(4):
        torch.testing.assert_close(encoder(data, given[g]), together[g], rtol=1e-10, atol=1e-12)
    assert not torch.isclose(together[0], together[1]).all(-1).any()
    with pytest.raises(errors.ShapeError, match="2 number"):
        encoder(data)
    with pytest.raises(errors.ShapeError, match="got 3"):
        encoder(data, torch.zeros(6, 3, dtype=F64))


# -- random subsets -----------------------------------------------------------------------------------------------


def test_random_subsets_have_uniform_sizes_and_members():
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool().repeat(4000, 1)
    parts = sets.random_subset(mask, torch.Generator().manual_seed(0))
    assert not (parts & ~mask).any()
    parts = parts.unflatten(0, (4000, 3))
    sizes = parts.sum(-1)
    for task, count in ((0, 4), (1, 2)):
        shares = torch.stack([(sizes[:, task] == n).double().mean() for n in range(count + 1)])
        expected = 1 / (count + 1)
        assert (shares - expected).abs().max() < 5 * (expected * (1 - expected) / 4000) ** 0.5
        members = parts[:, task, mask[task]].double().mean(0)
        assert (members - 0.5).abs().max() < 5 * 0.5 / 4000**0.5
    assert not sizes[:, 2].any()
    at_least = sets.random_subset(mask, torch.Generator().manual_seed(0), least=2).unflatten(0, (4000, 3)).sum(-1)
    assert at_least.amin(0).tolist() == [2, 2, 0]
    assert at_least.amax(0).tolist() == [4, 2, 0]


def chi_square_p(seen, expected):
    statistic = ((seen - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=F64), statistic / 2).item()


def codes(parts):
    """Each part of a set as one number, ``[…]``."""
    return (parts.long() * 2 ** torch.arange(parts.shape[-1])).sum(-1)


def test_every_part_of_a_set_has_its_chance_and_no_part_tells_of_another():
    """Chi-square tests of the parts of four, of those of neighbouring tasks, and of one task in two draws."""
    n = 20_000
    mask, generator = torch.ones(n, 4).bool(), torch.Generator().manual_seed(0)
    first, second = sets.random_subset(mask, generator), sets.random_subset(mask, generator)
    chance = torch.tensor([1 / 5 / math.comb(4, code.bit_count()) for code in range(16)], dtype=F64)

    def p_of_one(parts):
        return chi_square_p(torch.bincount(codes(parts), minlength=16).double(), chance * len(parts))

    def p_of_pairs(parts, others):
        together = torch.bincount(16 * codes(parts) + codes(others), minlength=256).double()
        return chi_square_p(together, (chance[:, None] * chance).flatten() * len(parts))

    assert p_of_one(first) > 1e-3
    assert p_of_pairs(first[0::2], first[1::2]) > 1e-3, "tasks of one call, with the same members"
    assert p_of_pairs(first, second) > 1e-3, "calls that follow each other"
    each = torch.rand(n, 4, generator=generator) < 0.5
    assert p_of_one(each) < 1e-9, "control: members one by one, whose number is not uniform"
    assert p_of_pairs(first[0::2], first[1::2].roll(1, -1)) > 1e-3
    assert p_of_pairs(first[0::2], first[0::2].roll(1, -1)) < 1e-9, "control: one task's part, moved, for the other's"


# -- bad input ----------------------------------------------------------------------------------------------------


@each_encoder
def test_observations_that_an_encoder_cannot_read(name):
    encoder = make(name, max_shots=5)
    with pytest.raises(errors.ShapeError, match=r"2 feature\(s\) and 1 target"):
        encoder(batch_of(2, 3, 1))
    with pytest.raises(errors.ShapeError, match=r"2 feature\(s\) and 1 target"):
        encoder(bm.Observations(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)))
    with pytest.raises(errors.DataError, match="y=None"):
        encoder(batch_of(2, 3, 2).with_y(None))
    with pytest.raises(errors.ShapeError, match=r"6 observations.*max_shots=5"):
        encoder(batch_of(2, 6, 2))
    assert encoder(padded(batch_of(2, 5, 2), 9)).shape == (2, encoder.size)  # what counts is within the bound


@pytest.mark.parametrize(
    ("make_it", "match"),
    [
        (lambda: encoders.PooledEncoder(1, 1, 0), "size 0"),
        (lambda: encoders.ProductEncoder(1, 1, 0), "size 0"),
        (lambda: encoders.ProductEncoder(1, 1, 2, rank=0), "rank"),
        (lambda: encoders.ProductEncoder(1, 1, 2, covariance="low_rank"), "low_rank"),
        (lambda: encoders.PooledEncoder(0), "features"),
        (lambda: encoders.PooledEncoder(1, 0), "outputs"),
        (lambda: encoders.PooledEncoder(1, pool="median"), "median"),
        (lambda: encoders.PooledEncoder(1, blocks=1, block="mamba"), "mamba"),
        (lambda: encoders.PooledEncoder(1, blocks=-1), "blocks"),
        (lambda: encoders.PooledEncoder(1, hidden=[]), "hidden"),
        (lambda: encoders.PooledEncoder(1, hidden=[9], blocks=1, heads=2), "multiple of heads"),
        (lambda: encoders.PooledEncoder(1, activation="sinc"), "sinc"),
        (lambda: encoders.PooledEncoder(1, classes=0), "classes"),
        (lambda: encoders.PooledEncoder(1, classes=2, counts=True), "not both"),
        (lambda: encoders.PooledEncoder(1, given=-1), "given"),
        (lambda: encoders.PooledEncoder(1, max_shots=0), "max_shots"),
        (lambda: encoders.RecurrentEncoder(1, hidden=0), "hidden"),
    ],
)
def test_options_that_make_no_encoder(make_it, match):
    with pytest.raises(errors.OptionError, match=match):
        make_it()
