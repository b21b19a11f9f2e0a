"""Classical baselines: each does what its rule says, and what it earns is what is known of it."""

import itertools
import math

import pytest
import torch

from bayesmeta import errors
from bayesmeta.rl import envs
from bayesmeta.rl.baselines import bandits as b
from bayesmeta.rl.baselines import mdps as m
from bayesmeta.rl.envs.bandits import BanditTasks
from bayesmeta.rl.oracles.bandits import bayes_optimal_bandit_value
from bayesmeta.rl.oracles.mdps import finite_horizon_values

NUM = 4000
CPU = torch.device("cpu")


def earned(baseline, arms, horizon, num=NUM, seed=1):
    family = envs.BernoulliBandit(arms=arms, horizon=horizon)
    total = b.play_bandits(baseline, family, family.sample_tasks(num, generator=seed), generator=seed).sum(0)
    return float(total.mean()), float(total.std()) / num**0.5


# -- bandits --------------------------------------------------------------------------------------------------------

# RL²'s table (Duan et al. 2016), 1000 instances, rounded to 0.1. At (10, 5) Thompson's is our own.
TABLE = [
    (b.Random(), 10, 5, 5.0, 0.07), (b.Random(), 100, 5, 49.9, 0.44),
    (b.Greedy(ties="first"), 10, 5, 6.6, 0.07), (b.Greedy(ties="first"), 100, 10, 77.1, 0.42),
    (b.EpsilonGreedy(ties="first"), 10, 10, 6.6, 0.07), (b.EpsilonGreedy(ties="first"), 100, 5, 75.4, 0.53),
    (b.UCB1(), 10, 5, 6.7, 0.07), (b.UCB1(), 100, 5, 78.0, 0.52), (b.UCB1(), 100, 10, 82.4, 0.36),
    (b.ThompsonSampling(), 10, 5, 5.82, 0.01), (b.ThompsonSampling(), 100, 5, 74.95, 0.11),
    (b.Gittins(), 10, 5, 6.6, 0.07), (b.Gittins(0.99), 100, 5, 78.3, 0.52), (b.Gittins(), 100, 10, 82.8, 0.37),
]  # fmt: skip


@pytest.mark.parametrize(("baseline", "horizon", "arms", "figure", "error"), TABLE)
def test_bandit_baselines_earn_their_figures(baseline, horizon, arms, figure, error):
    ours, ours_error = earned(baseline, arms, horizon)
    rounding = 0.05 if round(figure, 1) == figure else 0.005
    assert abs(ours - figure) < 3 * (ours_error**2 + error**2) ** 0.5 + rounding


def test_the_table_could_have_been_missed():
    """The control: a rule of another kind misses these two figures by more than what is allowed."""
    ours, error = earned(b.ThompsonSampling(), 5, 10)
    assert abs(ours - 6.6) > 3 * (error**2 + 0.07**2) ** 0.5 + 0.05
    ours, error = earned(b.Greedy(ties="random"), 10, 100)
    assert abs(ours - 77.1) > 3 * (error**2 + 0.42**2) ** 0.5 + 0.05


def test_no_baseline_beats_the_best_policy():
    """And indices come close to it."""
    best = bayes_optimal_bandit_value(5, 10)
    for baseline in (b.Greedy(), b.UCB1(), b.ThompsonSampling(), b.OptimisticThompsonSampling(), b.Gittins(0.9)):
        ours, error = earned(baseline, 5, 10)
        assert ours < best + 4 * error
    ours, error = earned(b.Gittins(), 5, 10, num=20_000)
    assert best - 0.05 - 4 * error < ours < best + 4 * error


def test_scores_by_hand():
    belief = b.BetaBelief(1, 3, CPU)
    for arm, reward in ((0, 1.0), (0, 0.0), (1, 1.0)):
        belief.update(torch.tensor([arm]), torch.tensor([reward]))
    generator = torch.Generator().manual_seed(0)
    assert b.Greedy().scores(belief, 3, 10, generator).tolist()[0] == pytest.approx([1 / 2, 2 / 3, 1 / 2])
    bonus = [0.2 * (2 * 1.3862944 / n) ** 0.5 for n in (4, 3, 2)]
    upper = [mean + extra for mean, extra in zip((1 / 2, 2 / 3, 1 / 2), bonus)]
    assert b.UCB1().scores(belief, 3, 10, generator).tolist()[0] == pytest.approx(upper)
    draws = torch.cat([b.ThompsonSampling().scores(belief, 3, 10, generator) for _ in range(4000)])
    # Beta(2, 2), Beta(2, 1), Beta(1, 1): means, and five standard errors
    assert bool(((draws.mean(0) - torch.tensor([0.5, 2 / 3, 0.5])).abs() < 5 * draws.std(0) / 4000**0.5).all())
    assert draws.std(0).tolist() == pytest.approx([(1 / 20) ** 0.5, (1 / 18) ** 0.5, (1 / 12) ** 0.5], rel=0.05)
    optimistic = torch.cat([b.OptimisticThompsonSampling().scores(belief, 3, 10, generator) for _ in range(200)])
    assert bool((optimistic >= belief.mean).all())
    assert bool((optimistic > belief.mean).any())
    assert b.Gittins(0.9).scores(belief, 3, 4, generator)[0, 2] == pytest.approx(0.7029, abs=1e-4)


def test_gittins_scores_are_those_of_the_pulls_that_are_left():
    """An arm never pulled, (left, index): 1: its mean; 2: 2λ = ½ (1 + ⅔) + ½ λ, so 5/9; 3: by the same equation, two
    pulls deep. The control: indices of one pull more or less are others."""
    generator, belief = torch.Generator(), b.BetaBelief(1, 2, CPU)

    def scores(horizon, left):
        return float(b.Gittins().scores(belief, horizon - left, horizon, generator)[0, 0])

    for horizon in (3, 6):
        assert scores(horizon, 1) == pytest.approx(1 / 2, abs=1e-3)
        assert scores(horizon, 2) == pytest.approx(5 / 9, abs=1e-3)
    # three left, λ between 5/9 and 2/3: after a success going on twice (4/3) or λ after a failure there; after a
    # failure λ twice
    index = scores(6, 3)
    won = 2 / 3 * (1 + max(3 / 4, index)) + 1 / 3 * max(1 / 2, index)
    assert 3 * index == pytest.approx(1 / 2 * (1 + max(won, 2 * index)) + 1 / 2 * 2 * index, abs=1e-3)
    assert index > 5 / 9 + 0.01


def test_normal_beliefs_are_conjugate():
    family = envs.GaussianBandit(arms=2, mean=1.0, spread=2.0, noise=0.5)
    belief = b.NormalBelief(1, 2, CPU, family)
    for reward in (0.3, 0.9, 0.6):
        belief.update(torch.tensor([1]), torch.tensor([reward]))
    precision = 1 / 4 + 3 / 0.25
    assert belief.mean.tolist()[0] == pytest.approx([1.0, (1 / 4 + 1.8 / 0.25) / precision])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([belief.draw(generator) for _ in range(4000)])
    assert draws.std(0).tolist() == pytest.approx([2.0, precision**-0.5], rel=0.06)


def test_gaussian_bandits_are_explored():
    """Thompson sampling and UCB find the better of two arms that greed misses; an arm's mean is the bound."""
    family = envs.GaussianBandit(arms=5, horizon=60)
    tasks = family.sample_tasks(1000, generator=0)
    late = {
        type(rule).__name__: float(b.play_bandits(rule, family, tasks, generator=1)[40:].mean())
        for rule in (b.Greedy(), b.ThompsonSampling(), b.UCB1(1.0), b.Random())
    }
    best = float(tasks.mean.amax(-1).mean())
    assert late["Random"] < late["Greedy"] < late["ThompsonSampling"] < best
    assert late["UCB1"] > 0.9 * best


def test_one_arm_in_a_million_ties():
    """Ties are broken at random, or by the first: all arms are alike before anything is known."""
    generator = torch.Generator().manual_seed(0)
    arms = b._largest(torch.zeros(6000, 3), "random", generator).bincount(minlength=3)
    assert bool(((arms - 2000).abs() < 5 * (6000 * 2 / 9) ** 0.5).all())
    assert b._largest(torch.tensor([[0.0, 1.0, 1.0]]), "first", generator).tolist() == [1]


# -- MDPs -----------------------------------------------------------------------------------------------------------

# The same paper's second table, 10 episodes; its Monte Carlo error is about 1, ours of 300 MDPs about 1.5.
MDP_TABLE = [
    (m.RandomMDP(), 100.1), (m.GreedyMDP(), 134.8), (m.EpsilonGreedyMDP(), 132.8), (m.PSRL(), 138.1),
    (m.OPSRL(), 144.1), (m.UCRL2(), 146.6), (m.BEB(), 150.2),
]  # fmt: skip


@pytest.mark.parametrize(("baseline", "figure"), MDP_TABLE)
def test_mdp_baselines_earn_their_figures(baseline, figure):
    family = envs.TabularMDP()
    tasks = family.sample_tasks(300, generator=5)
    total = m.play_mdps(baseline, family, tasks, episodes=10, prior_mean=0.0, generator=6).sum(0)
    error = float(total.std()) / 300**0.5
    assert abs(float(total.mean()) - figure) < 0.02 * figure + 3 * error


def test_the_right_prior_is_worth_something():
    """BEB that plans at each step under the family's own prior earns more than under a wrong one, planning once."""
    family = envs.TabularMDP()
    tasks = family.sample_tasks(200, generator=5)
    right = m.play_mdps(m.BEB(plans_at_steps=True), family, tasks, episodes=10, generator=6).sum(0)
    wrong = m.play_mdps(m.BEB(), family, tasks, episodes=10, prior_mean=0.0, generator=6).sum(0)
    difference = right - wrong
    assert float(difference.mean()) > 3 * float(difference.std()) / 200**0.5
    best = finite_horizon_values(tasks.reward, tasks.transition, 10)[0][0, :, 0].mean()
    assert float(right.mean()) < 10 * float(best)


def test_psrl_reaches_the_optimum():
    """A small MDP and many episodes: the last episodes earn what the known MDP's optimum is."""
    family = envs.TabularMDP(states=3, actions=2, horizon=5)
    tasks = family.sample_tasks(200, generator=0)
    best = finite_horizon_values(tasks.reward, tasks.transition, 5)[0][0, :, 0]
    late = m.play_mdps(m.PSRL(), family, tasks, episodes=120, generator=1)[90:].mean(0)
    gap = best - late
    assert float(gap.mean()) < 0.15 + 4 * float(gap.std()) / 200**0.5
    random = m.play_mdps(m.RandomMDP(), family, tasks, episodes=30, generator=1).mean(0)
    assert float((best - random).mean()) > 1.0


def test_beliefs_of_mdps_are_conjugate():
    family = envs.TabularMDP(states=3, actions=2)
    belief = m.MDPBelief(1, family, CPU)
    for reward, after in ((2.0, 1), (4.0, 1), (3.0, 2)):
        belief.update(torch.tensor([0]), torch.tensor([1]), torch.tensor([reward]), torch.tensor([after]))
    assert belief.transition[0, 0, 1].tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    assert float(belief.reward[0, 0, 1]) == pytest.approx((1 + 9) / 4)
    assert float(belief.reward[0, 0, 0]) == 1.0
    generator = torch.Generator().manual_seed(0)
    draws = [belief.draw(generator) for _ in range(3000)]
    rewards = torch.cat([reward[:, 0, 1] for reward, _ in draws])
    chances = torch.cat([transition[:, 0, 1] for _, transition in draws])
    assert abs(float(rewards.mean()) - 2.5) < 5 * 0.5 / 3000**0.5
    assert float(rewards.std()) == pytest.approx(0.5, rel=0.07)
    assert bool(((chances.mean(0) - torch.tensor([1 / 6, 1 / 2, 1 / 3])).abs() < 5 * chances.std(0) / 3000**0.5).all())


def test_the_optimistic_model_is_the_best_in_its_set():
    """Against a grid over all distributions of three states."""
    fine = torch.tensor([(i, j, 60 - i - j) for i, j in itertools.product(range(61), repeat=2) if i + j <= 60]) / 60
    centre, values = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([1.0, 3.0, -2.0])
    for width in (0.0, 0.2, 0.7, 3.0):
        inside = fine[(fine - centre).abs().sum(-1) <= width + 1e-6]
        expected = float((inside @ values).max())
        ours = m._optimistic(centre.view(1, 1, 1, 3), values.view(1, 3), torch.full((1, 1, 1), width))
        assert float(ours) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("states", [2, 5])
def test_ucrl2_is_optimistic_by_the_widths_of_the_paper(states):
    """Two steps by hand (Jaksch et al. 2010, eqs. 3 and 4): t = 400 visits of each of S × 2 pairs, half the width of
    transitions moves onto the better state. The control: without √S it is another value."""
    family = envs.TabularMDP(states=states, actions=2)
    belief = m.MDPBelief(1, family, CPU, prior_mean=0.0)
    belief.visits += 400.0
    belief.total[:, -1] += 401.0  # the last state pays 1 at each visit, the others nothing
    belief.counts += 400.0 / states
    scale, delta, time = 0.2, 0.05, 400.0 * states * 2
    rule = m.UCRL2(scale=scale, confidence=delta)
    plan = rule.plan(belief, 2, torch.Generator())
    reward_width = scale * math.sqrt(7 / 2 * math.log(2 * states * 2 * time / delta) / 400)
    paid = torch.zeros(states)
    paid[-1] = 1.0
    torch.testing.assert_close(plan[1, 0, :, 0], paid + reward_width, rtol=1e-5, atol=1e-5)

    def first(width):
        chance = 1 / states + scale * width / 2
        assert chance < 1
        return paid + 2 * reward_width + chance

    width = math.sqrt(14 * states * math.log(2 * 2 * time / delta) / 400)
    torch.testing.assert_close(plan[0, 0, :, 1], first(width), rtol=1e-5, atol=1e-5)
    assert (plan[0, 0, :, 1] - first(width / math.sqrt(states))).abs().min() > 0.01


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b.EpsilonGreedy(1.5), "ties=1.5"),
        (lambda: b.EpsilonGreedy(epsilon=1.5), "epsilon=1.5"),
        (lambda: b.Greedy("last"), "ties='last'"),
        (lambda: b.UCB1(-1.0), "scale=-1"),
        (lambda: b.Gittins(1.0), "discount=1.0"),
        (lambda: m.EpsilonGreedyMDP(epsilon=-0.1), "epsilon=-0.1"),
        (lambda: m.OPSRL(0), "draws=0"),
        (lambda: m.BEB(float("inf")), "scale=inf"),
        (lambda: m.UCRL2(confidence=1.0), "confidence=1.0"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(errors.OptionError, match=message):
        make()


def test_what_a_baseline_cannot_do_is_said():
    family = envs.GaussianBandit()
    with pytest.raises(errors.UnsupportedError, match="Gittins indices are of Bernoulli arms"):
        b.play_bandits(b.Gittins(), family, family.sample_tasks(2))
    known = envs.GaussianBandit(noise=0.0)
    with pytest.raises(errors.UnsupportedError, match="need both to be positive"):
        b.play_bandits(b.Greedy(), known, BanditTasks(torch.zeros(2, 5)))
    mdp = envs.TabularMDP()
    with pytest.raises(errors.OptionError, match="episodes_per_trial=0"):
        m.play_mdps(m.PSRL(), mdp, mdp.sample_tasks(2), episodes=0)
