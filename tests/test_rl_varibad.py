"""VariBAD: its beliefs against those of whole contexts, the KL by hand, nothing crosses trials, stops, resumption."""

import dataclasses
import math

import gymnasium
import pyro.distributions as dist
import pytest
import torch
from rl_envs import Counting

import bayesmeta as bm
from bayesmeta.errors import CheckpointError, ContextError, NonFiniteLossError, OptionError, UnsupportedError
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.rollout import collect
from bayesmeta.rl.varibad.learner import BeliefConfig, VariBAD
from bayesmeta.rl.varibad.policy import BeliefPolicy
from tests.faults.driver import contents, difference

GRID = bm.rl.Grid(cells=3, horizon=3)
ROBOT = bm.rl.SparsePointRobot(horizon=3)
BEAM = bm.rl.BeamSteering(bm.rl.Machines.built_in(20), horizon=5)
BANDIT = bm.rl.BernoulliBandit(arms=2, horizon=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def environments(family=GRID, num=6, *, episodes=2, seed=0, **options):
    options = {"new_tasks": True} | options
    return bm.rl.TensorVectorEnv(family, num, episodes_per_trial=episodes, generator=seed, **options)


def learner(family=GRID, *, encoder="recurrent", seed=0, shaken=False, iterations=6, rl_gradient=False, **options):
    """``shaken``: the parameters are not those of the begin, where every belief is the prior."""
    env = environments(family, seed=seed)
    spec = ContextSpec.of(env, inputs=("state", "action", "successor"))
    latent = LatentContext.make(spec, 2, encoder, width=6, seed=seed, kl_weight=0.3)
    policy = BeliefPolicy(env, latent, units=5, seed=seed, rl_gradient=rl_gradient)
    decoder = TransitionDecoder(spec, 2, hidden=(5,), seed=seed)
    if shaken:
        for parameter in [*policy.parameters(), *decoder.parameters()]:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(5))
    return VariBAD(env, policy, decoder, iterations=iterations, seed=seed, **options)


def parameters_of(*modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def same(left, right):
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]


# -- what the policy knows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["recurrent", "product"])
@pytest.mark.parametrize("family", [GRID, ROBOT, BEAM, BANDIT], ids=lambda family: family.name)
def test_unrolling_gives_the_densities_and_values_of_acting(family, encoder):
    """Over several trials, and from the middle of one; beams are steered in episodes of different lengths."""
    run = learner(family, encoder=encoder, shaken=True)
    policy, env = run.policy, run.env
    first = collect(env, policy.actor(), 8, generator=seeded())
    second = collect(env, policy.actor(), 3, generator=seeded(), start=first.after, state=first.state)
    assert first.moments.begins[1:].any()
    assert not second.moments.begins[0].all()
    for rollout in (first, second):
        distribution, values = policy.unroll(rollout.moments, rollout.first_state)
        torch.testing.assert_close(distribution.log_prob(rollout.action), rollout.log_prob, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, rollout.value, rtol=1e-4, atol=1e-5)
    distribution, _ = policy.unroll(second.moments, None)  # control: a belief forgotten
    assert (distribution.log_prob(second.action) - second.log_prob).abs().max() > 1e-3


@pytest.mark.parametrize("encoder", ["recurrent", "product"])
def test_beliefs_on_the_way_are_those_of_the_context_until_then(encoder):
    """Of the first trial: the encoder reads transitions whose successor is that before any reset."""
    run = learner(encoder=encoder, shaken=True)
    rollout = collect(run.env, run.policy.actor(), 6, generator=seeded())
    whole = run.policy.latent.beliefs(run.policy.memory.spec.of_rollout(rollout))
    moments = run.policy.inputs(rollout.moments)
    state = run.policy.first(6)
    found = run.policy.latent.of_state(run.policy.memory.states(moments, state, rollout.moments.begins))
    torch.testing.assert_close(found.mean, whole.mean[:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.stddev, whole.stddev[:6], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.mean[2:], whole.mean[1:5], rtol=1e-2)  # control: one step late
    # at an episode's end the next observation is that of a reset, and not where the transition led to
    ends = rollout.ended[:-1]
    assert not torch.equal(rollout.moments.observation[1:][ends], rollout.successor[:-1][ends])


def test_the_belief_before_the_first_step_is_the_prior():
    run = learner(shaken=True)
    rollout = collect(run.env, run.policy.actor(), 8, generator=seeded())
    state = torch.full((6, run.policy.memory.width), 7.0)  # of trials before, which must not be read
    states = run.policy.memory.states(run.policy.inputs(rollout.moments), state, rollout.moments.begins)
    belief, begins = run.policy.latent.of_state(states), rollout.moments.begins
    assert begins.sum(0).tolist() == [2] * 6  # steps 0 and 6
    assert torch.equal(belief.mean[begins], torch.zeros(12, 2))
    assert torch.equal(belief.stddev[begins], torch.ones(12, 2))
    assert not torch.isclose(belief.mean[~begins], torch.zeros(())).any()  # control


def test_nothing_of_one_trial_or_task_reaches_another():
    """NaN in the rewards of the first trial, and of one environment, stays there."""
    run = learner(shaken=True)
    rollout = collect(run.env, run.policy.actor(), 12, generator=seeded())
    clean, values = run.policy.unroll(rollout.moments, None)
    poisoned = rollout.moments.reward.clone()
    poisoned[2, 1] = math.nan
    spoilt, after = run.policy.unroll(dataclasses.replace(rollout.moments, reward=poisoned), None)
    bad = torch.zeros(12, 6, dtype=torch.bool)
    bad[2:6, 1] = True
    assert torch.equal(torch.isnan(after), bad)
    assert torch.equal(after[~bad], values[~bad])
    assert torch.equal(spoilt.logits[~bad], clean.logits[~bad])


def test_known_beliefs_give_the_same_policy_and_values():
    """PPO's pieces read beliefs that were computed once."""
    run = learner(shaken=True)
    first = collect(run.env, run.policy.actor(), 8, generator=seeded(), state=run.policy.first(6).detach())
    rollout = collect(run.env, run.policy.actor(), 3, generator=seeded(), start=first.after, state=first.state)
    known = run.policy.believed(rollout).moments.map(lambda x: x[:, [1, 4]])
    distribution, values = run.policy.unroll(known, None)
    torch.testing.assert_close(distribution.log_prob(rollout.action[:, [1, 4]]), rollout.log_prob[:, [1, 4]])
    torch.testing.assert_close(values, rollout.value[:, [1, 4]])
    assert not values.isclose(run.policy.unroll(known.map(lambda x: x.flip(1)), None)[1]).any()  # control
    asked = learner(rl_gradient=True)
    assert asked.policy.believed(rollout) is rollout


def test_policies_are_refused_what_they_cannot_act_on():
    env = environments()
    spec = ContextSpec.of(env)
    with pytest.raises(OptionError, match="spec"):
        BeliefPolicy(env, LatentContext(LatentContext.make(spec, 2, "recurrent").recognition))
    with pytest.raises(UnsupportedError, match="step by step"):
        BeliefPolicy(env, LatentContext.make(spec, 2, "attention"))
    with pytest.raises(ContextError, match="another task family"):
        BeliefPolicy(environments(ROBOT), LatentContext.make(spec, 2, "recurrent"))
    with pytest.raises(OptionError, match="units"):
        BeliefPolicy(env, LatentContext.make(spec, 2, "recurrent"), units=0)
    with pytest.raises(OptionError, match="size 0"):
        VariBAD(env, latent=0)


def test_trials_longer_than_contexts_may_be_are_refused():
    env = environments()  # trials of 2 × 3 steps
    inputs = ("state", "action", "successor")
    with pytest.raises(ContextError, match="A trial has 6 transitions; memory is for max_context=5"):
        VariBAD(env, spec=ContextSpec.of(env, inputs=inputs, max_context=5), latent=2)
    run = VariBAD(env, spec=ContextSpec.of(env, inputs=inputs, max_context=6), latent=2, width=6)
    longer = environments(episodes=3, new_tasks=False)
    for asked in (run.curve, run.belief_path, run.use):
        with pytest.raises(ContextError, match="A trial has 9 transitions"):
            asked(longer)
    assert run.policy.trial_steps == 6
    run.belief_path(environments(new_tasks=False))  # of as many as fit


# -- the bound ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["before", "prior"])
def test_the_kl_of_the_bound_is_the_analytic_one(against):
    run = learner(shaken=True, beliefs=BeliefConfig(kl=against, prefixes=None))
    rollout = collect(run.env, run.policy.actor(), 6, generator=seeded(), state=run.policy.first(6).detach())
    found = run.bound(rollout, torch.arange(6), seeded(1))
    belief = run.policy.latent.beliefs(run.policy.memory.spec.of_rollout(rollout))
    loc, scale = belief.mean, belief.stddev
    before = (loc[[0, 0, 1, 2, 3, 4, 5]], scale[[0, 0, 1, 2, 3, 4, 5]])
    m, s = before if against == "before" else (torch.zeros(()), torch.ones(()))
    expected = ((s / scale).log() + (scale.square() + (loc - m).square()) / (2 * s**2) - 0.5).sum(-1)
    torch.testing.assert_close(found.kl, 0.3 * expected, rtol=1e-3, atol=1e-5)  # 0.3: the weight
    assert found.kl[0].eq(0).all()
    assert found.kl[1:].min() > 0
    torch.testing.assert_close(found.value, found.reconstruction - found.kl)


def test_the_bound_decodes_the_trial_at_draws_of_each_belief():
    """Against a loop over prefixes and environments, with the draws taken again from the same generator."""
    run = learner(shaken=True, beliefs=BeliefConfig(prefixes=None))
    rollout = collect(run.env, run.policy.actor(), 6, generator=seeded(), state=run.policy.first(6).detach())
    found = run.bound(rollout, torch.arange(6), seeded(1))
    context = run.policy.memory.spec.of_rollout(rollout)
    q = run.policy.latent.beliefs(context)
    z = run.policy.latent.sample(q, 1, seeded(1))[0]
    for t in range(7):
        for n in range(6):
            normal = run.decoder.distribution(z[t, n : n + 1], context.x[n : n + 1])
            expected = normal.log_prob(context.y[n : n + 1]).sum()
            torch.testing.assert_close(found.reconstruction[t, n], expected, rtol=1e-4, atol=1e-4)


def test_the_bound_of_a_trial_reads_no_other_trial():
    run = learner(shaken=True, beliefs=BeliefConfig(prefixes=None))
    rollout = collect(run.env, run.policy.actor(), 12, generator=seeded(), state=run.policy.first(6).detach())
    found = run.bound(rollout, torch.arange(6), seeded(1)).value
    reward = rollout.reward.clone()
    reward[8, 2] += 1.0  # in the second trial of one environment
    changed = run.bound(dataclasses.replace(rollout, reward=reward), torch.arange(6), seeded(1)).value
    moved = ~torch.isclose(changed, found, rtol=1e-5)
    assert moved[7:, 2].all()
    assert not moved[:7].any()
    assert not moved[:, [0, 1, 3, 4, 5]].any()


def test_a_trial_that_goes_on_is_bounded_from_its_belief():
    """The second half of a trial: beliefs are those of the whole, and only what the rollout has is decoded."""
    run = learner(shaken=True, beliefs=BeliefConfig(prefixes=None))
    half = collect(run.env, run.policy.actor(), 3, generator=seeded(), state=run.policy.first(6).detach())
    rest = collect(run.env, run.policy.actor(), 3, generator=seeded(), start=half.after, state=half.state)
    spec, latent = run.policy.memory.spec, run.policy.latent
    first, second = (spec.of_rollout(rollout, trial="all") for rollout in (half, rest))
    both = dataclasses.replace(first, x=torch.cat([first.x, second.x], 1), y=torch.cat([first.y, second.y], 1))
    q = latent.beliefs(both)
    found = run.bound(rest, torch.arange(6), seeded(1))

    def normal(steps):
        return dist.Normal(q.mean[steps], q.stddev[steps]).to_event(1)

    torch.testing.assert_close(found.kl[1:], latent.kl(normal(slice(4, 7)), normal(slice(3, 6))), rtol=1e-3, atol=1e-5)
    assert found.kl[0].eq(0).all()  # nothing was read in this rollout yet
    z = latent.sample(normal(slice(3, 7)), 1, seeded(1))[0]
    expected = run.decoder.log_prob(z, second).sum(-1)
    torch.testing.assert_close(found.reconstruction, expected, rtol=1e-3, atol=1e-3)


def test_prefixes_drawn_at_random_are_some_of_all():
    run = learner(shaken=True, beliefs=BeliefConfig(prefixes=3))
    rollout = collect(run.env, run.policy.actor(), 6, generator=seeded(), state=run.policy.first(6).detach())
    assert run.bound(rollout, torch.arange(4), seeded(1)).value.shape == (3, 4)
    drawn = torch.stack([run._prefixes(6, generator) for generator in [seeded(7)] for _ in range(200)])
    assert drawn.unique().tolist() == list(range(7))
    assert (drawn.diff(dim=1) > 0).all()  # without replacement
    whole = learner(beliefs=BeliefConfig(prefixes=99))
    assert whole._prefixes(6, seeded()).tolist() == list(range(7))


# -- who learns what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rl_gradient", [False, True])
def test_the_policys_objective_reaches_the_encoder_only_if_asked_for(rl_gradient):
    run = learner(shaken=True, rl_gradient=rl_gradient)
    rollout = collect(run.env, run.policy.actor(), 6, generator=seeded(), state=run.policy.first(6).detach())
    nets = (run.policy.memory.policy_net, run.policy.memory.value_net, run.policy.act_layer)
    encoder, policy = parameters_of(run.policy.latent), parameters_of(*nets)
    decoder = parameters_of(run.decoder)
    run.updates.update(rollout, torch.randn(6, 6, generator=seeded(2)), share=0.0, generator=seeded(3))
    assert all(same(encoder, parameters_of(run.policy.latent))) == (not rl_gradient)
    assert not any(same(policy, parameters_of(*nets)))
    assert all(same(decoder, parameters_of(run.decoder)))


def test_the_bound_reaches_encoder_and_decoder_and_not_the_policy():
    run = learner(shaken=True)
    rollout = collect(run.env, run.policy.actor(), 6, generator=seeded(), state=run.policy.first(6).detach())
    nets = (run.policy.memory.policy_net, run.policy.memory.value_net, run.policy.act_layer, run.policy.value_layer)
    encoder, decoder, policy = (parameters_of(*m) for m in ((run.policy.latent,), (run.decoder,), nets))
    told = run._learn_beliefs(rollout, 0.0)
    assert not any(same(encoder, parameters_of(run.policy.latent)))
    assert not any(same(decoder, parameters_of(run.decoder)))
    assert all(same(policy, parameters_of(*nets)))
    assert told["bound"] == pytest.approx(told["reconstruction"] - told["belief_kl"], abs=1e-4)


def test_the_policy_may_be_paid_by_another_number_than_beliefs_read():
    seen, read = [], []

    def spy(rollout, advantage, **options):
        seen.append(rollout)
        return update(rollout, advantage, **options)

    def spy_on_beliefs(rollout, share):
        read.append(rollout)
        return learn(rollout, share)

    run = learner(ROBOT, policy_reward="dense_reward")
    update, run.updates.update = run.updates.update, spy
    learn, run._learn_beliefs = run._learn_beliefs, spy_on_beliefs
    told = run.train(1)[0]
    paid = seen[0]
    assert torch.equal(read[0].reward, torch.zeros(6, 6))  # three steps from the start there is nothing to be had
    assert torch.equal(paid.reward, paid.extra["dense_reward"])
    assert paid.reward.max() < 0  # minus a distance
    assert told["reward"] >= 0  # what is told is the reward, and that is what contexts have
    run.policy_reward_until = 1
    told = run.train(1)[0]
    assert torch.equal(seen[1].reward.sum(0).mean(), torch.tensor(told["reward"]))
    assert seen[1].extra == {}
    plain = learner(ROBOT)
    plain.train(1)
    paid_by_it = learner(ROBOT, policy_reward="dense_reward")
    paid_by_it.train(1)
    nets = [parameters_of(one.policy.memory.policy_net) for one in (plain, paid_by_it)]
    assert not all(same(*nets))


def test_options_that_do_not_fit_are_refused():
    env = environments()
    wrong = {"decode": "future", "kl": "after", "prefixes": 0, "environments": 0, "epochs": 1.5, "lr": 0.0}
    for name, value in (wrong | {"last_lr": math.inf}).items():
        with pytest.raises(OptionError, match=name):
            BeliefConfig(**{name: value})
    run = learner()
    with pytest.raises(OptionError, match="units"):
        VariBAD(env, run.policy, units=7)
    with pytest.raises(OptionError, match="of one spec"):
        VariBAD(env, run.policy, TransitionDecoder(run.policy.memory.spec, 3))
    with pytest.raises(OptionError, match="nothing named"):
        VariBAD(env, policy_reward="gold").train(1)
    for name, until in ((None, 3), ("dense_reward", 0)):
        with pytest.raises(OptionError, match="policy_reward_until"):
            VariBAD(env, policy_reward=name, policy_reward_until=until)


def test_a_bound_that_is_not_finite_stops_before_anything_is_spoilt():
    run = learner(iterations=2)
    with torch.no_grad():
        run.decoder.likelihood.log_scale.fill_(-math.inf)
    before = parameters_of(run.policy.latent)
    with pytest.raises(NonFiniteLossError, match="at update 1"):
        run.train(1)
    assert all(same(before, parameters_of(run.policy.latent)))


# -- going on ----------------------------------------------------------------------------------------------------------


def fitted(out, until, resume=False, seed=0, family=GRID):
    held_out = environments(family, 4, seed=9, new_tasks=False, split="validation")
    run = learner(
        family, steps=5, seed=seed, iterations=4,  # rollouts end in the middle of a trial
        config=bm.rl.PPOConfig(epochs=1, minibatches=2),
        beliefs=BeliefConfig(epochs=1, minibatches=2, prefixes=3, environments=4),
    )  # fmt: skip
    return run, bm.rl.fit(
        run, iterations=until, out=out, validation=held_out, validate_every=2, checkpoint_every=2, progress=False,
        resume=resume,
    )  # fmt: skip


@pytest.mark.parametrize("family", [GRID, BEAM], ids=lambda family: family.name)
def test_a_resumed_run_is_the_same_bit_for_bit(family, tmp_path):
    fitted(tmp_path / "whole", 4, family=family)
    for number, until in enumerate((1, 4)):
        fitted(tmp_path / "parts", until, resume=number > 0, family=family)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    for content in (whole, parts):  # a part's last iteration is measured too
        content["log"] = [
            {k: v for k, v in row.items() if not k.startswith(("return", "success", "length"))}
            for row in content["log"]
        ]
        content["checkpoint.pt"].pop("curves")
        content.pop("checkpoint.previous.pt")
    assert difference(whole, parts) is None
    fitted(tmp_path / "other", 4, seed=1, family=family)  # control
    assert difference(whole, contents(tmp_path / "other")) is not None


def test_what_was_learned_is_loaded_with_the_decoder(tmp_path):
    run, result = fitted(tmp_path, 2)
    assert [name for name in result.curves[-1] if not name.endswith("_se")] == ["step", "return_0", "return_1"]
    fresh = learner(seed=3)
    bm.rl.load_learner(tmp_path, fresh)
    for mine, theirs in ((run.policy, fresh.policy), (run.decoder, fresh.decoder)):
        assert all(same(parameters_of(mine), parameters_of(theirs)))
    env = environments(new_tasks=False, split="test", seed=4)
    assert torch.equal(run.curve(env).returns, fresh.curve(env).returns)
    fresh.decoder = TransitionDecoder(fresh.policy.memory.spec, 2, hidden=(7,))
    with pytest.raises(CheckpointError, match="another decoder"):
        bm.rl.load_learner(tmp_path, fresh)


def test_a_rollout_over_trials_by_hand():
    """Counting's rewards are the action and 1000 × the trial; observations say which step led where."""
    env = Counting()
    env.single_action_space = gymnasium.spaces.Discrete(5)
    run = VariBAD(env, latent=2, width=4, units=4, iterations=2, beliefs=BeliefConfig(prefixes=None))
    run.policy.double(), run.decoder.double()
    rollout = collect(env, run.policy.actor(), 4, generator=seeded(), state=run.policy.first(6).detach())
    context = run._context(rollout, torch.arange(6))
    assert context.x[0, :, 0].tolist() == [0, 1, 2, 3]  # the state
    assert context.x[0, :, -1].tolist() == [0.5, 1.5, 2.5, 3.5]  # where it led to, before any reset
    assert torch.equal(context.x[:, :, 1:-1].argmax(-1).T, rollout.action)
    moments = run.policy.inputs(rollout.moments)
    parts = moments.split(run.policy.memory._parts, -1)
    assert parts[3][:, 0, 0].tolist() == [0, 0.5, 1.5, 2.5]  # the successor that is known at each moment
