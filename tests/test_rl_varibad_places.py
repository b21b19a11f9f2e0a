"""A goal at one of some places: densities by hand, the exact belief as a special case, and what is read of it."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.rl.latent.checks import expected_reward
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.rollout import collect
from bayesmeta.rl.varibad.places import GaussianMixture, PlaceCertainty, PlaceDecoder, PlaceReadout, PlaceSight
from bayesmeta.rl.varibad.policy import BeliefPolicy

ROBOT = bm.rl.SparsePointRobot(horizon=3)
PLACES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])


def robots(num=4, **options):
    return bm.rl.TensorVectorEnv(ROBOT, num, new_tasks=True, episodes_per_trial=2, generator=0, **options)


def spec_of(**options):
    return ContextSpec.of(robots(), **({"inputs": ("successor",)} | options))


def made(latent=2, *, shaken=True, **options):
    decoder = PlaceDecoder(spec_of(), latent, PLACES, **options)
    if shaken:
        for name, parameter in decoder.named_parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return decoder.double()


def context(tasks=2, shots=5, **options):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tasks, shots, 2, generator=generator, dtype=torch.float64)
    return Observations(x, torch.rand(tasks, shots, generator=generator, dtype=torch.float64), **options)


def by_hand(decoder, z, x, y):
    """log p(y | x, z) of one transition, number by number."""
    shares = decoder.network(z).softmax(-1) * (1 - decoder.least) + decoder.least / 3
    total = 0.0
    for share, place in zip(shares.tolist(), PLACES.tolist()):
        away = math.dist(x.tolist(), place)
        near = 1 / (1 + math.exp(-(decoder.log_radius.exp().item() - away) / decoder.log_softness.exp().item()))
        height = decoder.height.item() - decoder.slope.item() * away
        for weight, mean, noise in zip((near, 1 - near), (height, 0.0), decoder.log_noise.exp().tolist()):
            density = math.exp(-0.5 * ((y.item() - mean) / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
            total += share * weight * density
    return math.log(total)


def test_densities_are_those_of_the_mixture_over_places():
    decoder, data = made(), context()
    z = torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = decoder.log_prob(z, data)
    assert found.shape == (3, 2, 5)
    expected = [[[by_hand(decoder, z[i, n], data.x[n, t], data.y[n, t]) for t in range(5)] for n in range(2)]
                for i in range(3)]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    # Pyro's distribution has the same density
    torch.testing.assert_close(decoder.distribution(z, data.x).log_prob(data.y), found, rtol=1e-9, atol=1e-9)
    moved = decoder.log_prob(z.flip(-1), data) - found  # control: where places are near, shares count
    assert moved.abs().amax(-1).min() > 1e-3


def test_what_is_masked_counts_nothing_and_its_gradient_is_finite():
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    data = context(mask=mask)
    data.x[0, 1], data.y[0, 4] = torch.nan, torch.nan
    decoder = made()
    z = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    found = decoder.log_prob(z, Observations(data.x.nan_to_num(9.0), data.y.nan_to_num(1e4), mask))
    assert found[~mask].eq(0).all()
    assert found[mask].ne(0).all()
    found.sum().backward()
    assert z.grad.isfinite().all()


def test_a_reward_that_no_place_explains_has_a_finite_density_and_gradient():
    decoder = PlaceDecoder(spec_of(), 2, PLACES)  # in single precision
    far = Observations(torch.tensor([[[50.0, 50.0]]]), torch.tensor([[1000.0]]))
    z = torch.zeros(1, 2, requires_grad=True)
    value = decoder.log_prob(z, far)
    value.sum().backward()
    assert value.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [z, *decoder.parameters()])


def test_exact_rewards_have_finite_densities_however_small_the_noise_became():
    """Of rewards that are the mean to the last bit, to rounding and nearly; the noise is held at .02."""
    decoder, held = (PlaceDecoder(spec_of(), 2, PLACES) for _ in range(2))  # in single precision
    with torch.no_grad():
        for one, log_noise in ((decoder, -50.0), (held, math.log(0.02))):
            one.slope.fill_(1.0)
            one.log_noise.fill_(log_noise)
    x = torch.tensor([[[1.0, 0.0], [0.93, 0.07], [0.93, 0.07], [0.0, 0.4], [3.0, 3.0]]])
    away = (x[0] - PLACES[[0, 0, 0, 1, 1]]).norm(dim=-1)
    y = torch.where(away < 0.5, 1 - away, 0.0) + torch.tensor([0.0, 1e-7, 1e-3, 0.0, 0.0])
    data, z = Observations(x, y.unsqueeze(0)), torch.zeros(1, 2, requires_grad=True)
    value = decoder.log_prob(z, data)
    value.sum().backward()
    assert value.isfinite().all()
    assert value.max() <= -math.log(0.02 * math.sqrt(2 * math.pi)) + 1e-5  # no density is higher than at the mean
    torch.testing.assert_close(value, held.log_prob(z, data))
    torch.testing.assert_close(decoder.distribution(z, x).log_prob(data.y), value, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None or p.grad.isfinite().all() for p in [z, *decoder.parameters()])


def test_the_program_predicts_the_mean_of_the_mixture():
    decoder = made(shaken=False, radius=0.2)
    with torch.no_grad():
        decoder.network[-1].weight.zero_()
        decoder.network[-1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
        decoder.log_softness.fill_(-6.0)  # a sharp disc
    z = torch.zeros(1, 2, dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.1], [0.0, 0.7], [-1.0, 0.0]], dtype=torch.float64)
    found = expected_reward(decoder.program(), decoder.spec, z, rows)
    share = decoder.shares(z)[0]
    expected = torch.stack([share[0], torch.zeros_like(share[0]), share[2]])
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


def test_bayes_rule_is_the_best_share():
    """Of beliefs after one empty visit, the exact posterior over places foresees the next step best."""
    decoder = made(latent=3, shaken=False, radius=0.2, least=0.0)
    with torch.no_grad():
        decoder.network[-1].weight.copy_(torch.eye(3))
        decoder.network[-1].bias.zero_()
        decoder.log_softness.fill_(-6.0)
    # the goal is not at the first place: half and half at the others, and the next step asks at the second
    exact = torch.tensor([[-50.0, 0.0, 0.0]], dtype=torch.float64)
    rows, truth = PLACES[1].double().expand(1, 2, 2), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    score = decoder.log_prob(exact, Observations(rows, truth)).mean()
    for other in ([0.0, 0.0, 0.0], [-50.0, 1.0, 0.0], [-50.0, -1.0, 0.0]):
        z = torch.tensor([other], dtype=torch.float64)
        assert decoder.log_prob(z, Observations(rows, truth)).mean() < score


def test_places_seen_empty_are_learned_from_random_walks():
    """Encoder and decoder together, on goals at three places; the exact belief is uniform over those not visited."""
    generator = torch.Generator().manual_seed(0)
    spec = spec_of()
    core = LatentContext.make(spec, 3, "product", width=32, seed=0, kl_weight=0.05)
    decoder = PlaceDecoder(spec, 3, PLACES)
    optimizer = torch.optim.Adam([*core.parameters(), *decoder.parameters()], 2e-2)

    def visits(tasks, shots):
        goal = torch.randint(3, (tasks,), generator=generator)
        at = torch.randint(3, (tasks, shots), generator=generator)
        x = PLACES[at] + 0.05 * torch.randn(tasks, shots, 2, generator=generator)
        away = (x - PLACES[goal].unsqueeze(1)).norm(dim=-1)
        return at, goal, Observations(x, torch.where(away < 0.2, 1 - away, 0.0))

    for _ in range(150):
        _, _, data = visits(64, 6)
        q = core.beliefs(data)
        z = core.sample(q, 1, generator)[0]
        loss = core.kl(q).mean() - decoder.log_prob(z, data).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    at, goal, data = visits(300, 1)
    with torch.no_grad():
        shares = decoder.shares(core.beliefs(data).mean[1])
    hit = at[:, 0] == goal
    visited = shares.gather(1, at).squeeze(1)
    assert visited[hit].mean() > 0.9
    assert visited[~hit].mean() < 0.05  # the prior, which has learned nothing, has a third there
    others = shares[~hit].sort(-1).values
    assert (others[:, 2] - others[:, 1]).abs().mean() < 0.2


def test_what_a_policy_reads_of_places():
    decoder = identity()
    readout, certainty = PlaceReadout(decoder), PlaceCertainty(decoder)
    loc = torch.tensor([[0.0, 0.0, 0.0], [0.0, 60.0, 0.0], [60.0, 0.0, 60.0]], dtype=torch.float64)
    found = readout(loc, torch.ones_like(loc))
    assert found.shape == (3, readout.size)
    third = [1 / 3] * 3
    expected = [[*third, 0, 1 / 3, 1 / 3], [0, 1, 0, 0, 1, 1], [0.5, 0, 0.5, 0, 0, 0.5]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    sure = certainty(loc, torch.ones_like(loc))
    torch.testing.assert_close(sure, torch.tensor([-1.0, 0.0, -math.log(2) / math.log(3)], dtype=torch.float64))
    assert readout.beside_size == 0
    sight = PlaceSight(PLACES, 0.5)
    seen = sight(torch.tensor([[1.0, 0.5]]))
    assert seen.shape == (1, sight.size)
    expected = [1.0, 0.5, *(math.exp(-d / 0.5) for d in (0.25, 1.25, 4.25))]
    torch.testing.assert_close(seen[0], torch.tensor(expected))


def identity():
    """The latent is the log shares."""
    decoder = made(latent=3, shaken=False, least=0.0)
    with torch.no_grad():
        decoder.network[-1].weight.copy_(torch.eye(3))
        decoder.network[-1].bias.zero_()
    return decoder


def test_the_way_to_places_is_that_to_the_nearest_which_is_not_excluded():
    readout = PlaceReadout(identity(), reaches=(0.1, 0.5))
    assert (readout.size, readout.beside_size) == (6, 4)
    at = torch.tensor([[0.9, 0.1, 7.0], [0.9, 0.1, 7.0], [-0.2, 0.5, 7.0]]).double()  # the last is no place
    loc = torch.tensor([[0.0, 0.0, 0.0], [-30.0, 0.0, 0.0], [0.0, 0.0, -30.0]], dtype=torch.float64)
    read = readout(loc, torch.ones_like(loc))
    way = readout.beside(at, read)
    places = PLACES.double()
    near = torch.stack([places[0], places[1], places[1]]) - at[:, :2]
    torch.testing.assert_close(way[:, :2], near, atol=1e-2, rtol=0)
    gap = places - at[:, None, :2]
    weight = (loc - gap.norm(dim=-1) / 0.5).softmax(-1)
    torch.testing.assert_close(way[:, 2:], (weight.unsqueeze(-1) * gap).sum(1), atol=1e-6, rtol=0)
    with pytest.raises(OptionError, match="reaches must be positive"):
        PlaceReadout(identity(), reaches=(0.1, 0.0))


def test_a_policy_unrolls_as_it_acted_with_what_it_reads_beside_where_it_is():
    env = robots(6)
    sight = PlaceSight(PLACES, 0.3)
    spec = ContextSpec.of(env, inputs=("successor",), encode=sight, encoded=sight.size)
    core = LatentContext.make(spec, 3, "product", width=8, seed=0)
    decoder = PlaceDecoder(spec, 3, PLACES)
    policy = BeliefPolicy(env, core, units=5, seed=0, readout=PlaceReadout(decoder, (0.3,)))
    for parameter in [*policy.parameters(), *decoder.parameters()]:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    rollout = collect(env, policy.actor(), 8, generator=torch.Generator().manual_seed(0), state=policy.first(6))
    for moments in (rollout.moments, policy.believed(rollout).moments):
        distribution, values = policy.unroll(moments, rollout.first_state)
        torch.testing.assert_close(distribution.log_prob(rollout.action), rollout.log_prob, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, rollout.value, rtol=1e-4, atol=1e-5)
    policy.memory.readout.reaches = (3.0,)  # control: another way
    assert not torch.allclose(policy.unroll(rollout.moments, None)[1], rollout.value, rtol=1e-3)


def test_what_does_not_fit_is_refused():
    for wrong in ({"binary": True}, {"inputs": ("action",)}, {"inputs": ("action",), "targets": ("successor",)}):
        with pytest.raises(OptionError, match="decodes rewards as numbers"):
            PlaceDecoder(spec_of(**wrong), 2, PLACES)
    for places in (PLACES[0], PLACES[:0], torch.zeros(3, 5)):
        with pytest.raises(ShapeError, match="expected \\[places"):
            PlaceDecoder(spec_of(), 2, places)
    with pytest.raises(OptionError, match="not finite"):
        PlaceDecoder(spec_of(), 2, PLACES * math.nan)
    for width in (0.0, math.nan, math.inf):
        with pytest.raises(OptionError, match="width must be positive"):
            PlaceSight(PLACES, width)
    for wrong in ({"radius": 0.0}, {"radius": math.inf}, {"least": 1.0}):
        with pytest.raises(OptionError, match="radius must be positive"):
            PlaceDecoder(spec_of(), 2, PLACES, **wrong)
    with pytest.raises(OptionError, match="always certain"):
        PlaceCertainty(PlaceDecoder(spec_of(), 2, PLACES[:1]))
    with pytest.raises(OptionError, match="at least one component"):
        GaussianMixture(0)
    with pytest.raises(ShapeError, match="one target; y has 2"):
        GaussianMixture(2).num_outputs(2)
    decoder = PlaceDecoder(spec_of(), 2, PLACES)
    with pytest.raises(ShapeError, match="z has 3 numbers"):
        decoder.shares(torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="x has 5 numbers"):
        decoder.output(torch.zeros(1, 2), torch.zeros(1, 4, 5))
