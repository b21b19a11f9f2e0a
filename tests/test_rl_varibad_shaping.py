"""What a policy is paid beside the reward: sums that telescope, what is best, and nothing that reaches the beliefs."""

import dataclasses
import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import OptionError
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.rollout import collect
from bayesmeta.rl.varibad.learner import VariBAD
from bayesmeta.rl.varibad.policy import BeliefPolicy
from bayesmeta.rl.varibad.shaping import BeliefBonus, ShrinkingDisc, ShrinkingRadius

ROBOT = bm.rl.SparsePointRobot(horizon=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def narrow(loc, scale):
    """1.5 of the prior."""
    return 1.5 - scale.log().sum(-1) + loc.sum(-1)


def learner(**options):
    """Of trials of two episodes of three steps; its parameters are not those of the begin."""
    env = bm.rl.TensorVectorEnv(ROBOT, 6, new_tasks=True, episodes_per_trial=2, generator=0)
    spec = ContextSpec.of(env, inputs=("state", "action", "successor"))
    core = LatentContext.make(spec, 2, "product", width=6, seed=0)
    policy = BeliefPolicy(env, core, units=5, seed=0, gamma=0.9, trial_clock=options.pop("trial_clock", True))
    decoder = TransitionDecoder(spec, 2, hidden=(5,), seed=0)
    for parameter in [*policy.parameters(), *decoder.parameters()]:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(5))
    options = {"iterations": 4} | options
    return VariBAD(env, policy, decoder, config=bm.rl.PPOConfig(gamma=0.9), **options)


def paid_by(bonus, steps=12, run=None, start=None):
    run = learner(bonus=bonus) if run is None else run
    state = run.policy.first(6).detach() if start is None else start.state
    moment = None if start is None else start.after
    rollout = collect(run.env, run.policy.actor(), steps, generator=seeded(), start=moment, state=state)
    return rollout, run._pay(rollout, None, 0.0) - rollout.reward, run


@pytest.mark.parametrize("kind", ["invariant", "gain"])
def test_sums_of_a_bonus_telescope_over_each_trial(kind):
    """Two trials of six steps: −Φ of the prior for every way through one, or the change of Φ."""
    rollout, extra, run = paid_by(BeliefBonus(narrow, weight=2.0, kind=kind))
    path = run.policy.latent.beliefs(run.policy.memory.spec.of_rollout(rollout))
    known = narrow(path.mean, path.stddev)  # of the first trial, after 0 … 12 steps, of which 6 count
    discount = 0.9 ** torch.arange(6.0).unsqueeze(-1) if kind == "invariant" else torch.ones(6, 1)
    total = (discount * extra[:6]).sum(0)
    never = torch.full((6,), -2 * 1.5)
    expected = never if kind == "invariant" else 2 * (known[6] - known[0])
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    again = (discount * extra[6:]).sum(0)
    if kind == "invariant":
        torch.testing.assert_close(again, never, rtol=1e-4, atol=1e-4)
    else:
        assert not torch.isclose(total, again, rtol=1e-2).any()  # another trial
    assert extra[0].std() > 1e-2  # control: it is none of the beliefs' doing alone
    then = 0.9 * known[1] if kind == "invariant" else known[1]
    torch.testing.assert_close(extra[0], 2 * (then - known[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["invariant", "gain"])
def test_a_trial_in_two_rollouts_is_paid_as_in_one(kind):
    bonus = BeliefBonus(narrow, kind=kind)
    _, whole, _ = paid_by(bonus, 6)
    run = learner(bonus=bonus)
    generator = seeded()
    parts = []
    moment, state = None, run.policy.first(6).detach()
    for _ in range(2):
        rollout = collect(run.env, run.policy.actor(), 3, generator=generator, start=moment, state=state)
        parts.append(run._pay(rollout, None, 0.0) - rollout.reward)
        moment, state = rollout.after, rollout.state
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def best_of(rewards, kind, gamma=0.9):
    """Exact values of a tiny belief MDP: look (learn for sure, for a reward) or leave it, two steps.

    Beliefs are −1 (know nothing) and 0 (know all); looking earns ``rewards["look"]``, leaving ``rewards["leave"]``.
    """
    weight = 0.0 if kind is None else 1.0
    bonus = BeliefBonus(lambda loc, scale: loc[..., 0], weight=weight, kind=kind or "gain")

    def extra(before, after, last):
        pair = [(torch.tensor([[[b]]]), torch.ones(1, 1, 1)) for b in (before, after)]
        return float(bonus(*pair, torch.tensor([[last]]), gamma=gamma))

    def value(belief, step):
        if step == 2:
            return 0.0, None
        options = {}
        for act, after in (("look", 0.0), ("leave", belief)):
            options[act] = rewards[act] + extra(belief, after, step == 1) + gamma * value(after, step + 1)[0]
        best = max(options, key=options.get)
        return options[best], best

    return [value(belief, step)[1] for step in (0, 1) for belief in (-1.0, 0.0)], value(-1.0, 0)[0]


@pytest.mark.parametrize("look", [-0.5, -0.05, 0.05])
def test_what_is_best_stays_so_under_the_invariant_bonus_alone(look):
    rewards = {"look": look, "leave": 0.0}
    plain, worth = best_of(rewards, None)
    shaped, paid = best_of(rewards, "invariant")
    assert shaped == plain
    assert paid == pytest.approx(worth + 1.0)  # less Φ of the first belief
    if look == -0.05:
        assert best_of(rewards, "gain")[0] != plain  # control: to be paid for learning changes it


def test_no_gradient_reaches_encoder_or_decoder():
    def graded(loc, scale):
        return decoder.output(loc, rows[..., : loc.shape[-2], :, :])[..., 0, 0]

    run = learner()
    decoder = run.decoder
    rows = torch.zeros(6, 1, run.policy.memory.spec.features)
    run.bonus = BeliefBonus(graded)
    extra = paid_by(None, 6, run)[1]
    assert not extra.requires_grad
    assert extra.abs().max() > 1e-4
    told = run.train(1)[0]
    assert math.isfinite(told["policy_loss"])


def test_the_bonus_is_in_the_advantages_and_not_in_what_beliefs_read():
    seen, read = [], []
    runs = [learner(), learner(bonus=BeliefBonus(narrow, weight=3.0))]
    for run in runs:
        update, learn = run.updates.update, run._learn_beliefs
        run.updates.update = lambda r, a, update=update, **o: seen.append((r, a)) or update(r, a, **o)
        run._learn_beliefs = lambda r, s, learn=learn: read.append(r) or learn(r, s)
        run.train(1)
    (plain, without), (paid, advantage) = seen
    assert torch.equal(read[0].reward, read[1].reward)
    assert torch.equal(plain.reward, read[0].reward)
    assert (paid.reward - plain.reward).abs().min() > 0
    assert not torch.isclose(advantage, without).any()
    assert runs[0].history[0]["reward"] == runs[1].history[0]["reward"]


def test_a_training_has_the_weight_of_its_share_and_ends_with_the_reward():
    """Four rollouts: shares 0, 1/3, 2/3 and 1, of which the last two are past ``until``."""
    bonus = BeliefBonus(narrow, weight=3.0, last_weight=0.0, until=0.5)
    run, paid, read, shares = learner(bonus=bonus), [], [], []
    update, learn = run.updates.update, run._learn_beliefs
    run.updates.update = lambda r, a, **o: paid.append(r.reward) or update(r, a, **o)

    def spy(rollout, share):
        read.append(rollout.reward)
        return learn(rollout, share)

    run._learn_beliefs = spy
    run.train()
    extra = [(with_it - plain).abs() for with_it, plain in zip(paid, read, strict=True)]
    assert extra[0].min() > 0
    assert torch.equal(paid[3], read[3])
    assert torch.equal(paid[2], read[2])
    constant = BeliefBonus(lambda loc, scale: torch.ones_like(loc[..., 0]), weight=3.0, until=0.5, kind="invariant")
    constant = learner(bonus=constant)  # Φ is 1, so that each step pays (γ − 1) times the weight, and the last −1 times
    for share, weight in ((0.0, 3.0), (1 / 3, 1.0), (0.5, 0.0)):
        rollout = collect(constant.env, constant.policy.actor(), 6, generator=seeded(), state=constant.policy.first(6))
        found = constant._pay(rollout, None, share) - rollout.reward
        torch.testing.assert_close(found[0], torch.full((6,), -0.1 * weight))
        torch.testing.assert_close(found[5], torch.full((6,), -weight))

    class Recorded:
        names = ()

        def __call__(self, rollout, share):
            shares.append(share)
            return rollout.reward

    learner(policy_reward=Recorded()).train()
    assert shares == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])


def test_weights_go_to_their_last():
    bonus = BeliefBonus(narrow, weight=4.0, last_weight=1.0, until=0.5)
    assert [bonus.at(share) for share in (0.0, 0.25, 0.5, 1.0)] == [4.0, 2.5, 1.0, 1.0]
    gone = BeliefBonus(lambda loc, scale: loc * torch.nan, weight=0.0)
    pair = (torch.zeros(2, 3, 1), torch.ones(2, 3, 1))
    assert torch.equal(gone(pair, pair, torch.zeros(2, 3, dtype=torch.bool), gamma=0.9), torch.zeros(2, 3))


def test_a_shrinking_disc_ends_as_the_reward_itself():
    run = learner()
    still = collect(run.env, run.policy.actor(), 6, generator=seeded(), keep=("dense_reward",))
    away = torch.linspace(0.0, 1.5, 36).view(6, 6)
    reward = torch.where(away <= 0.2, 1 - away, 0.0)
    rollout = dataclasses.replace(still, reward=reward, extra={"dense_reward": -away})
    disc = ShrinkingDisc(1.2, 0.2, until=0.5)
    assert torch.equal(disc(rollout, 0.0), torch.where(away <= 1.2, (1 - away).clamp_min(0), 0.0))
    assert torch.equal(disc(rollout, 0.25), torch.where(away <= 0.7, 1 - away, 0.0))
    torch.testing.assert_close(disc(rollout, 0.4999999), reward)
    assert disc(rollout, 0.5) is reward
    trained = learner(policy_reward=disc)
    told = trained.train(4)
    assert len(told) == 4
    assert trained.options()["policy_reward"][0] == {"kind": "ShrinkingDisc", **dataclasses.asdict(disc)}


def test_a_shrinking_radius_is_that_of_the_tasks_and_ends_as_theirs():
    radius = ShrinkingRadius(1.0, until=0.5)
    assert [radius(ROBOT, share).radius for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    run = learner(curriculum=radius, iterations=5)
    seen = []
    learn = run._learn_beliefs
    run._learn_beliefs = lambda rollout, share: (
        seen.append(rollout.reward.gt(0).double().mean()) or learn(rollout, share)
    )
    run.train(1)
    assert run.env.family == ROBOT  # also between iterations: nothing that is the caller's stays easier
    run.train()
    assert run.env.family == ROBOT
    assert seen[0] > 0.1  # up to three steps from the start, within 1 of some goals
    assert seen[2:] == [0, 0, 0]  # and far from all discs
    assert run.options()["curriculum"] == {"kind": "ShrinkingRadius", **dataclasses.asdict(radius)}


def test_a_resumed_run_has_the_radius_that_it_had():
    runs = [
        learner(curriculum=ShrinkingRadius(1.0, until=1.0), steps=4, iterations=40) for _ in range(3)
    ]  # rollouts end within trials
    runs[0].train(4)
    runs[1].train(1)
    saved = runs[1].state_dict()
    assert saved["env"]["config"]["radius"] == 0.2  # the task's own
    runs[2].load_state_dict(saved)
    runs[2].train(3)
    whole, parts = (run.state_dict() for run in (runs[0], runs[2]))
    assert all(torch.equal(whole["policy"][name], parts["policy"][name]) for name in whole["policy"])
    assert [row["bound"] for row in whole["history"]] == [row["bound"] for row in parts["history"]]
    other = learner(steps=4, iterations=40)  # control: one without the curriculum goes on otherwise
    other.load_state_dict(saved)
    other.train(3)
    assert [row["bound"] for row in other.history] != [row["bound"] for row in whole["history"]]


def test_an_error_in_a_rollout_leaves_the_task_as_it_was():
    run = learner(curriculum=ShrinkingRadius(1.0))

    def fail(actions):
        assert run.env.family.radius == 1.0
        raise RuntimeError("no more")

    run.env.step = fail
    with pytest.raises(RuntimeError, match="no more"):
        run.train(1)
    assert run.env.family == ROBOT


def test_a_policy_without_the_trials_clock_acts_the_same_in_longer_trials():
    run, told = learner(trial_clock=False), learner()
    longer = bm.rl.TensorVectorEnv(ROBOT, 6, new_tasks=True, episodes_per_trial=5, generator=0)
    for one, same in ((run, True), (told, False)):
        state = one.policy.first(6).detach()
        short = collect(one.env, one.policy.actor(greedy=True), 6, generator=seeded(), state=state)
        one.policy.set_trial(longer)
        long = collect(longer, one.policy.actor(greedy=True), 6, generator=seeded(), state=state)
        assert torch.equal(short.action, long.action) == same


def test_what_does_not_fit_is_refused():
    for wrong in ({"kind": "loss"}, {"weight": -1.0}, {"last_weight": math.inf}, {"until": 0.0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            BeliefBonus(narrow, **wrong)
    for wrong in ({"first": 0.1}, {"last": 0.0}, {"until": 1.5}, {"first": math.inf}):
        with pytest.raises(OptionError, match="A disc shrinks"):
            ShrinkingDisc(**wrong)
    for wrong in ({"first": 0.0}, {"until": 0.0}, {"until": 1.5}, {"first": math.inf}):
        with pytest.raises(OptionError, match="A radius shrinks"):
            ShrinkingRadius(**wrong)
    with pytest.raises(OptionError, match="A radius shrinks: that of sparse_point_robot is"):
        ShrinkingRadius(0.1)(ROBOT, 0.0)
    bandits = bm.rl.TensorVectorEnv(bm.rl.BernoulliBandit(arms=2, horizon=3), 2, generator=0)
    with pytest.raises(OptionError, match="has none"):
        ShrinkingRadius()(bandits.family, 0.0)
    with pytest.raises(OptionError, match="nothing named"):
        learner(policy_reward=ShrinkingDisc(name="gold")).train(1)


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("bonus", 3.0, "a BeliefBonus or None"),
        ("bonus", narrow, r"BeliefBonus\(potential\)"),  # a potential alone
        ("bonus", BeliefBonus, "an object of it"),
        ("policy_reward", 7, "the name of a number in info"),
        ("policy_reward", lambda rollout, share: rollout.reward, "names"),
        ("policy_reward", ShrinkingDisc, "an object of it"),
        ("curriculum", 7, "from a family and the share"),
        ("curriculum", ShrinkingRadius, "an object of it"),
    ],
)
def test_what_a_policy_cannot_be_paid_or_trained_by_is_refused_at_once(name, wrong, expected):
    with pytest.raises(OptionError, match=f"{name} (is|has).*{expected}"):
        learner(**{name: wrong})


@pytest.mark.parametrize("names", ["dense_reward", (1,), 3])
def test_names_of_a_policys_reward_are_strings(names):
    class Wrong:
        def __call__(self, rollout, share):
            return rollout.reward

    Wrong.names = names
    with pytest.raises(OptionError, match="names"):
        learner(policy_reward=Wrong())


def test_a_potential_must_be_callable():
    with pytest.raises(OptionError, match="expected a callable"):
        BeliefBonus(3.0)


def test_any_callable_of_family_and_share_is_a_curriculum():
    seen = []
    run = learner(curriculum=lambda family, share: seen.append((family.name, share)) or family)
    run.train(2)
    assert seen == [("sparse_point_robot", 0.0), ("sparse_point_robot", 1 / 3)]
