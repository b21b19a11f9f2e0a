"""Latent contexts: against closed forms of a Gaussian bandit, what every encoder must keep, bad input."""

import math

import pytest
import torch
from pyro import poutine

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models.encoders import PooledEncoder
from bayesmeta.models.recognition import Recognition
from bayesmeta.rl.latent.contexts import ContextSpec, prefix
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from tests import rl_latent_truth as truth

ENCODERS = ["product", "recurrent", "mean", "attention", "transformer"]
each_encoder = pytest.mark.parametrize("name", ENCODERS)
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def learned(name, latent=2, spec=None, **options):
    """With weights that are no first ones: q is not the prior."""
    spec = truth.a_spec() if spec is None else spec
    context = LatentContext.make(spec, latent, name, width=16, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in context.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return context


def ragged(tasks=5, shots=7, seed=0):
    """Contexts with entries that do not count among those that do, and one task without any."""
    _, context = truth.pulls(tasks, shots, seed)
    mask = torch.rand(tasks, shots, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0], mask[1] = False, True
    return bm.Observations(context.x, context.y, mask)


def moments(q):
    return q.base_dist.loc, q.base_dist.scale


# -- closed forms ---------------------------------------------------------------------------------------------------


def test_posterior_of_the_exact_guide_is_that_of_linear_algebra():
    context = ragged()
    loc, covariance = truth.closed_form(context)
    found, scale = moments(truth.exact().posterior(context))
    torch.testing.assert_close(found, loc, **TIGHT)
    torch.testing.assert_close(scale.square().diag_embed(), covariance, **TIGHT)
    wrong, _ = moments(truth.exact(wrong=1.1).posterior(context))  # control: another noise
    assert (wrong - loc).abs().max() > 0.01


@each_encoder
def test_nothing_known_is_exactly_the_prior(name):
    latent = learned(name)
    spec, masked = latent.spec, ragged()
    for context in (spec.empty(5, masked.x), bm.Observations(masked.x, masked.y, torch.zeros(5, 7, dtype=torch.bool))):
        loc, scale = moments(latent.posterior(context))
        assert torch.equal(loc, torch.zeros(5, 2).double())
        assert torch.equal(scale, torch.ones(5, 2).double())
        assert torch.equal(latent.kl(context), torch.zeros(5).double())
    loc, _ = moments(latent.posterior(masked))
    assert (loc[0] == 0).all()
    assert (loc[1:] != 0).any(-1).all()  # control: the others are not


@each_encoder
def test_order_does_not_matter_to_the_last_bit_but_to_the_recurrent_one(name):
    latent, context = learned(name), ragged()
    order = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)).argsort(-1)
    other = bm.Observations(
        context.x.gather(1, order.unsqueeze(-1).expand_as(context.x)), context.y.gather(1, order),
        context.mask.gather(1, order),
    )  # fmt: skip
    same = all(torch.equal(a, b) for a, b in zip(moments(latent.posterior(context)), moments(latent.posterior(other))))
    assert same == (name != "recurrent")


def analytic(loc, scale):
    """KL of N(loc, scale²) from N(0, 1), dimension by dimension, written out."""
    return 0.5 * (scale.square() + loc.square() - 1.0) - scale.log()


def test_kl_is_the_analytic_one_whatever_it_is_taken_of():
    latent, context = learned("product"), ragged()
    q = latent.posterior(context)
    expected = analytic(*moments(q)).sum(-1)
    torch.testing.assert_close(latent.kl(context), expected, **TIGHT)
    torch.testing.assert_close(latent.kl(q), expected, **TIGHT)
    beliefs = latent.kl(latent.beliefs(context))
    assert beliefs.shape == (8, 5)
    torch.testing.assert_close(beliefs[-1], expected, **TIGHT)
    backwards = latent.kl(latent.prior(5), q)  # control: the other way round
    assert (backwards - expected).abs()[1:].min() > 1e-3


def test_kl_is_of_the_traces_own_distributions():
    latent, context = learned("recurrent"), ragged()
    guide, model = (poutine.trace(p).get_trace(context) for p in (latent.guide, latent.model))
    q, p = (trace.nodes["z"]["fn"] for trace in (guide, model))
    assert q.batch_shape == p.batch_shape == (5, 1)
    torch.testing.assert_close(torch.distributions.kl_divergence(q, p).squeeze(-1), latent.kl(context), **TIGHT)


def test_kl_moves_no_global_state():
    latent, context = learned("product"), ragged()
    before = torch.get_rng_state()
    latent.kl(context)
    assert torch.equal(before, torch.get_rng_state())


def test_weight_and_free_bits():
    context = ragged()
    plain = learned("product")
    each = analytic(*moments(plain.posterior(context))).detach()
    torch.testing.assert_close(learned("product", kl_weight=0.1).kl(context), 0.1 * each.sum(-1), **TIGHT)
    bits = float(each.mean(0).mean())  # between the two dimensions' means
    assert each.mean(0).min() < bits < each.mean(0).max()
    found = learned("product", free_bits=bits).kl(context)
    expected = each.mean(0).clamp_min(bits).sum()  # Kingma et al. 2016, eq. 15
    torch.testing.assert_close(found.mean(), expected, **TIGHT)
    small = int(each.mean(0).argmin())
    torch.testing.assert_close(found, each[:, 1 - small] + bits, **TIGHT)
    total = float(each.sum(-1).mean())
    torch.testing.assert_close(
        learned("product", free_bits=0.9 * total, free_bits_of="total").kl(context), each.sum(-1), **TIGHT
    )
    free = learned("product", free_bits=1.1 * total, free_bits_of="total")
    q = free.posterior(context)
    loss = free.kl(q).mean()
    torch.testing.assert_close(loss.item(), 1.1 * total)
    loss = loss + 0.0 * moments(q)[0].sum()
    loss.backward()
    assert all((p.grad == 0).all() for p in free.parameters() if p.grad is not None)  # no gradient of what is free


def test_samples_are_reparameterised_and_of_the_generator_alone():
    latent, context = learned("recurrent"), ragged()
    q = latent.posterior(context)
    z = latent.sample(q, 20_000, 1)
    assert z.shape == (20_000, 5, 2)
    assert torch.equal(z, latent.sample(q, 20_000, 1))
    assert not torch.equal(z, latent.sample(q, 20_000, 2))
    loc, scale = moments(q)
    error = (z.mean(0) - loc).abs() / (scale / math.sqrt(20_000))
    assert error.max() < 4.5
    assert (z.std(0) / scale - 1).abs().max() < 4.5 / math.sqrt(40_000)
    (gradient,) = torch.autograd.grad(z.sum(), loc, retain_graph=True)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 20_000.0))


def test_elbo_at_the_exact_posterior_is_the_evidence():
    context = ragged(tasks=8)
    program, n = truth.exact_decoder().program(), 4000
    latent = truth.exact()
    evidence = truth.log_evidence(context)
    # of each draw log p(y, z) − log q(z) is log p(y), without any noise
    q = latent.posterior(context)
    u = latent.sample(q, 5)
    torch.testing.assert_close(program.log_joint(u, context) - q.log_prob(u), evidence.expand(5, -1), **TIGHT)
    found = latent.elbo(program, context, num_samples=n)
    spread = program.log_likelihood(latent.sample(q, n), context).sum(-1).std(0) / math.sqrt(n)
    assert ((found.value - evidence).abs() <= 4.5 * spread + 1e-9).all()
    wrong = truth.exact(wrong=2.0).elbo(program, context, num_samples=n).value  # control: another q is below it
    assert (wrong < evidence - 4.5 * spread)[1:].all()


def test_decoder_is_the_same_with_and_without_pyro():
    spec = ContextSpec.of(truth.bandit_env(1), inputs=("action",))
    decoder = TransitionDecoder(spec, 2, dtype=torch.float64, seed=1)
    context = ragged()
    z = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = decoder.program().log_likelihood(z, context)
    torch.testing.assert_close(decoder.log_prob(z, context), expected, **TIGHT)
    assert decoder.program() is decoder.program()
    assert decoder.program().blocks == {"z": slice(0, 2)}
    assert not [name for name in decoder.state_dict() if "program" in name]


def test_decoder_of_rewards_and_next_states():
    env = bm.rl.TensorVectorEnv(bm.rl.Navigation(horizon=4), 3, generator=0, dtype=torch.float64)
    spec = ContextSpec.of(env, targets=("reward", "change"))
    decoder = TransitionDecoder(spec, 2, dtype=torch.float64)
    rollout = bm.rl.rollout.collect(env, lambda m, s, g: _still(m), 4, generator=torch.Generator())
    context = spec.of_rollout(rollout)
    z = torch.zeros(3, 2, dtype=torch.float64)
    loc = decoder.output(z, context.x)
    by_hand = torch.distributions.Normal(loc, 1.0).log_prob(context.y).sum(-1)
    torch.testing.assert_close(decoder.log_prob(z, context), by_hand, **TIGHT)
    torch.testing.assert_close(decoder.program().log_likelihood(z, context), by_hand, **TIGHT)
    assert decoder.program().predict(z, context).shape == (3, 4, 3)


def _still(moment):
    from bayesmeta.rl.rollout import Acted

    n = len(moment.begins)
    return Acted(torch.full((n, 2), 0.1, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))


# -- carried on, step by step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["product", "recurrent", "sum", "mean"])
def test_carried_on_is_the_whole_context_at_every_prefix(name):
    latent, context = learned(name), ragged()
    state = latent.first_state(5)
    at_once = moments(latent.beliefs(context))
    for n in range(8):
        expected = moments(latent.posterior(prefix(context, n)))
        for carried, whole, batch in zip(moments(latent.of_state(state)), expected, at_once, strict=True):
            torch.testing.assert_close(carried, whole, **TIGHT)
            torch.testing.assert_close(batch[n], whole, **TIGHT)
        if n < 7:
            state = latent.step(state, context.points(slice(n, n + 1)))
    loc, scale = moments(latent.of_state(latent.first_state(5)))
    assert (loc == 0).all()
    assert (scale == 1).all()


@each_encoder
def test_beliefs_are_the_posteriors_of_prefixes(name):
    latent, context = learned(name), ragged()
    loc, _ = moments(latent.beliefs(context))
    assert loc.shape == (8, 5, 2)
    for n in (0, 3, 7):
        torch.testing.assert_close(loc[n], moments(latent.posterior(prefix(context, n)))[0], **TIGHT)
    assert (loc[3] - loc[7]).abs()[1:].max() > 1e-3


@pytest.mark.parametrize("name", ["product", "recurrent", "sum", "mean"])
def test_a_new_trial_forgets_even_nan(name):
    latent, context = learned(name), ragged()
    state = latent.step(latent.first_state(5), context)
    state[2] = math.nan
    begins = torch.tensor([False, False, True, True, False])
    one = context.points(slice(1, 2))
    after = latent.step(state, one, begins)
    fresh = latent.step(latent.first_state(5), one)
    on = latent.step(state, one)
    assert torch.equal(after[2:4], fresh[2:4])
    assert torch.equal(after[:2], on[:2])
    assert not torch.equal(after[4], fresh[4])


def test_gradients_go_through_all_steps():
    latent, context = learned("recurrent"), ragged()
    state = latent.first_state(5)
    for n in range(7):
        state = latent.step(state, context.points(slice(n, n + 1)))
    latent.kl(latent.of_state(state)).sum().backward()
    carried = [p.grad.clone() for p in latent.parameters()]
    latent.zero_grad()
    latent.kl(context).sum().backward()
    for a, b in zip(carried, [p.grad for p in latent.parameters()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["attention", "transformer", "max"])
def test_what_reads_the_whole_set_cannot_be_carried_on(name):
    with pytest.raises(errors.UnsupportedError, match="whole context"):
        learned(name).first_state(2)


# -- options and state ----------------------------------------------------------------------------------------------


def test_state_dict_has_the_network_alone_and_makes_the_same():
    first, second = (
        learned("recurrent"),
        LatentContext.make(truth.a_spec(), 2, "recurrent", width=16, dtype=torch.float64, seed=9),
    )
    assert all(name.startswith("recognition.") for name in first.state_dict())
    second.load_state_dict(first.state_dict())
    context = ragged()
    assert torch.equal(moments(first.posterior(context))[0], moments(second.posterior(context))[0])


def test_options_are_plain_values():
    import json

    options = learned("product", kl_weight=0.5, free_bits=0.1).options()
    assert json.loads(json.dumps(options)) == options
    assert options["kl_weight"] == 0.5


def test_an_encoder_of_ones_own_is_taken():
    encoder = PooledEncoder(3, 1, 6, pool="sum")
    latent = LatentContext.make(truth.a_spec(), 2, encoder, dtype=torch.float64)
    assert type(latent.recognition.encoder) is PooledEncoder
    assert latent.recognition.encoder is not encoder


def test_bad_options():
    spec = truth.a_spec()
    for latent in (0, -1, 1.5):
        with pytest.raises(errors.OptionError, match="at least 1"):
            LatentContext.make(spec, latent)
        with pytest.raises(errors.OptionError, match="at least 1"):
            TransitionDecoder(spec, latent)
    for bad in ({"kl_weight": -1.0}, {"free_bits": math.nan}, {"free_bits_of": "each"}):
        with pytest.raises(errors.OptionError):
            LatentContext.make(spec, 2, **bad)
    with pytest.raises(errors.OptionError, match="Unknown encoder"):
        LatentContext.make(spec, 2, "lstm")
    with pytest.raises(errors.UnsupportedError, match="diagonal"):
        LatentContext(Recognition(PooledEncoder(3, 1, 6), 2, "full"))
    with pytest.raises(errors.UnsupportedError, match="dimension by dimension"):
        learned("product").kl(torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pytest.raises(errors.ShapeError, match="this decoder takes"):
        truth.exact_decoder().output(torch.zeros(2, 4), torch.zeros(2, 5, 3))
