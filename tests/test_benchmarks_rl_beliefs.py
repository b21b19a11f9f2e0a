"""The benchmark of beliefs about a bandit: its figures know the exact posterior, and its controls are told apart."""

import argparse
import math

import pytest
import torch
from scipy.stats import beta

import bayesmeta as bm
from bayesmeta.ops.random import as_generator
from bayesmeta.rl.latent.checks import arm_counts
from bayesmeta.rl.rollout import collect
from bayesmeta.rl.varibad.learner import VariBAD
from benchmarks import _rl_beliefs_checks as checks
from benchmarks import rl_beliefs as bench


def options(**changes):
    given = {
        "quick": True, "seed": 0, "threads": 1, "learners": [*bench.LEARNERS], "trainings": 1, "envs": 8,
        "iterations": 2, "tasks": 20, "split": "test", "nuts_tasks": 2, "nuts_kept": 5,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def seen(tasks=1500, pulls=12, arms=3, seed=0):
    """True means, and what uniform pulls saw of them."""
    generator = as_generator(seed)
    means = torch.rand(tasks, arms, generator=generator)
    counts = torch.multinomial(torch.ones(tasks, arms), pulls, replacement=True, generator=generator)
    pulled = torch.nn.functional.one_hot(counts, arms).sum(1).double()
    won = torch.binomial(pulled, means.double(), generator=generator)
    return means, won, pulled - won


def shaken(run, amount=0.3):
    """A learner whose belief depends on what was seen: untrained ones believe the prior, whatever happens."""
    generator = as_generator(7)
    with torch.no_grad():
        for parameter in run.policy.latent.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return run


def within(values, expected, errors=5):
    return abs(float(values.mean()) - expected) < errors * float(values.std()) / math.sqrt(len(values))


# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_exact_posterior_covers_and_loses_nothing():
    means, won, lost = seen()
    found = checks.figures(checks.exact_draws(won, lost, 400, 0), won, lost, means)
    assert set(found) == set(bench.FIGURES)
    assert within(found["coverage_90"], 0.9)
    assert within(found["coverage_50"], 0.5)
    assert float(found["distance"].mean()) < 2 * 0.29 / 20  # the error of a mean of 400 draws
    assert float(found["spread"].mean()) == pytest.approx(1.0, abs=0.01)
    assert 0 <= float(found["log_score_lost"].mean()) < 0.002
    a, b = 1 + won, 1 + lost
    expected = 1 - 12 * (a * b / ((a + b) ** 2 * (a + b + 1))).mean()
    assert float(found["contraction"].mean()) == pytest.approx(float(expected), abs=0.005)


@pytest.mark.parametrize("kind", ["narrow", "prior", "swapped"])
def test_wrong_beliefs_are_told_from_the_exact_one(kind):
    means, won, lost = seen()
    draws = checks.exact_draws(won, lost, 400, 0)
    if kind == "narrow":
        draws = draws.mean(0) + 0.8 * (draws - draws.mean(0))
    elif kind == "prior":
        draws = torch.rand(draws.shape, generator=as_generator(1))
    else:
        draws = draws.roll(1, 1)
    found = checks.figures(draws, won, lost, means)
    covers = within(found["coverage_90"], 0.9)
    assert covers == (kind == "prior")  # who knows nothing covers: that is why another bar is there
    assert (float(found["log_score_lost"].mean()) > 0.03) == (kind != "narrow")
    assert (float(found["distance"].mean()) > 0.1) == (kind != "narrow")
    if kind == "narrow":
        assert float(found["spread"].mean()) == pytest.approx(0.8, abs=0.01)


def test_the_log_score_that_is_lost_is_what_forecasts_lose_on_average():
    """Of one arm with 3 of 4 won, forecast at 0.4: by the next pulls themselves."""
    won, lost = torch.full((1, 1), 3.0), torch.full((1, 1), 1.0)
    draws = torch.tensor([0.3, 0.5]).reshape(2, 1, 1)
    found = float(checks.figures(draws, won, lost, torch.full((1, 1), 0.6))["log_score_lost"])
    p = torch.as_tensor(beta.rvs(4, 2, size=400_000, random_state=0))
    pull = (torch.rand(len(p), generator=as_generator(0), dtype=p.dtype) < p).double()
    score = {q: pull * math.log(q) + (1 - pull) * math.log(1 - q) for q in (4 / 6, 0.4)}
    assert within(score[4 / 6] - score[0.4], found)
    assert found > 0.1


def test_draws_of_the_exact_posterior_are_beta():
    won, lost = torch.tensor([[5.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    draws = checks.exact_draws(won, lost, 4000, 0)[:, 0]
    for arm, (a, b) in enumerate(((6, 3), (1, 1))):
        rank = torch.as_tensor(beta.cdf(draws[:, arm].numpy(), a, b)).sort().values
        assert (rank - torch.linspace(0, 1, 4000)).abs().max() < 1.95 / math.sqrt(4000)  # Kolmogorov's, at 0.001


# -- decoder, pulls ----------------------------------------------------------------------------------------------------


def test_the_decoder_can_be_uniform_with_its_cube_and_not_without():
    run = bench.make("varibad", 0, 4, 1)
    decoder = run.decoder
    with torch.no_grad():
        decoder.network[0].weight.copy_(1.5976 * torch.eye(5))
    z = torch.linspace(-3, 3, 601)[:, None, None].expand(-1, 1, 5)
    exact = torch.distributions.Normal(0, 1).cdf(z)
    apart = []
    for cube in (0.070565999 / 1.5976**3, 0.0):
        decoder.cube.data.fill_(cube)
        apart.append(float((decoder.distribution(z, torch.eye(5)[None]).mean - exact).abs().max().detach()))
    assert apart[0] < 1e-3
    assert apart[1] > 5e-3


def test_where_the_decoder_begins():
    for name in bench.LEARNERS:
        weight = bench.make(name, 3, 4, 1).decoder.network[0].weight.detach()
        turned = (weight - checks.ArmsDecoder.FIRST * torch.eye(5)).abs().max()
        assert (turned > 1.0) == (name == "rotated")
        lengths = weight.norm(dim=-1)
        assert (lengths - checks.ArmsDecoder.FIRST).abs().max() < 0.5
        if name == "rotated":
            torch.testing.assert_close(weight @ weight.T, checks.ArmsDecoder.FIRST**2 * torch.eye(5), atol=1e-5, rtol=0)
    first, second = (bench.make("varibad", seed, 4, 1).decoder.network[0].weight for seed in (0, 1))
    assert not torch.equal(first, second)


def test_thompson_sampling_pulls_good_arms_and_uniform_pulls_do_not():
    reward = {}
    for name, actor in (("uniform", checks.uniform(5)), ("thompson", checks.thompson(5, 20))):
        env = bm.rl.TensorVectorEnv(bench.FAMILY, 2000, generator=0)
        reward[name] = collect(env, actor, 20, generator=as_generator(0)).total().double()
    assert within(reward["uniform"], 10.0)
    expected = bm.rl.baselines.bandits.play_bandits(
        bm.rl.baselines.bandits.ThompsonSampling(), bench.FAMILY, env.tasks, generator=1
    ).sum(0)
    assert within(reward["thompson"] - expected, 0.0)
    assert float(reward["thompson"].mean()) > 12


def test_all_learners_are_asked_about_the_same_pulls_of_held_out_tasks():
    runs = [shaken(bench.make(name, 0, 4, 1)) for name in ("varibad", "product")]
    paths = [bench.pulled(run, checks.uniform(5), 6, "test", 0) for run in runs]
    assert torch.equal(paths[0][0].context.x, paths[1][0].context.x)
    assert torch.equal(paths[0][1], paths[1][1])
    assert paths[0][0].steps == bench.HORIZON
    others = bench.FAMILY.sample_tasks(6, generator=0, split="train").mean
    assert not torch.equal(paths[0][1], others)
    own, path = paths[0][0], bench.swapped(paths[0][0])
    assert torch.equal(path.loc[:, 1:], own.loc[:, :-1])
    assert torch.equal(path.scale[:, 1:], own.scale[:, :-1])
    assert torch.equal(path.context.x, own.context.x)
    for mixed, kept in ((path.loc, own.loc), (path.scale, own.scale)):  # of tasks that differ
        assert (mixed - kept)[1:].abs().amax((0, 2)).min() > 1e-3


def test_the_learner_is_varibad_with_the_whole_kl_and_a_policy_that_stays_at_random():
    run = bench.make("varibad", 0, 32, 3)
    assert type(run) is VariBAD
    assert run.policy.latent.kl_weight == 1.0
    assert (run.beliefs.decode, run.beliefs.kl) == ("past", "prior")
    run.train(3)
    assert run.history[-1]["entropy"] == pytest.approx(math.log(5), abs=0.01)


def test_the_belief_is_held_against_nuts_and_not_nuts_against_it(monkeypatch):
    """By hand: arms of log-odds z; the belief is Normal(0, 0.05), and NUTS, so it is said, half as wide about 0.2."""
    monkeypatch.setattr(bench, "DRAWS", 400)
    run = bench.make("varibad", 0, 4, 1)
    with torch.no_grad():
        run.decoder.network[0].weight.copy_(torch.eye(5))
    path, means = bench.pulled(run, checks.uniform(5), 6, "validation", 0)
    path = bench.BeliefPath(path.program, path.context, torch.zeros_like(path.loc), torch.full_like(path.scale, 0.05))
    asked = []

    def half(few, step, seed, *, kept, chains):
        asked.append((few.num_tasks, step, kept, chains))
        return 0.2 + 0.5 * few.at(step).draws(2000, 1).u, 1.01, 321.0

    monkeypatch.setattr(bench, "nuts_draws", half)
    found, said = bench.against_nuts(path, means, run, 0, 4, 30)
    assert asked == [(4, 20, 30, bench.NUTS_CHAINS)]
    spread, distance = (found[f"encoder_{what}_after_20"] for what in ("spread", "distance"))
    assert spread.shape == distance.shape == (4,)
    slope = [p * (1 - p) for p in (0.5, 1 / (1 + math.exp(-0.2)))]
    assert spread.tolist() == pytest.approx([2 * slope[0] / slope[1]] * 4, rel=0.1)  # 4 s.e. of five arms
    assert distance.tolist() == pytest.approx([1 / (1 + math.exp(-0.2)) - 0.5] * 4, rel=0.1)
    # what stands under nuts is of its draws: the spread, in units of the exact one,, as of a belief
    mine = bench.measured(path.tasks(slice(0, 4)), means[:4], run, "varibad", (20,), 0)["varibad_spread_after_20"]
    torch.testing.assert_close(found["nuts_spread_after_20"], mine / spread.double(), rtol=0.1, atol=0)
    assert "R-hat up to 1.010" in said
    assert "from 321" in said


@pytest.mark.slow
def test_nuts_knows_the_posterior_under_the_decoder():
    """With a decoder that is uniform and knows the arms, NUTS finds Beta."""
    run = bench.make("varibad", 0, 4, 1)
    with torch.no_grad():
        run.decoder.network[0].weight.copy_(1.5976 * torch.eye(5))
        run.decoder.cube.fill_(0.070565999 / 1.5976**3)
    path, means = bench.pulled(run, checks.uniform(5), 2, "validation", 0)
    z, rhat, ess = checks.nuts_draws(path, 20, 0, kept=60, chains=2)
    assert rhat < 1.2
    assert ess > 30
    counts = arm_counts(run.belief_spec, path.at(20).support)
    found = checks.figures(checks.arms_of(path, run.belief_spec, z), *counts, means)
    untrained = checks.arms_of(path, run.belief_spec, path.at(20).draws(1000, 0).u)
    assert float(found["distance"].mean()) < 3 * 0.12 / math.sqrt(ess)
    assert float(found["spread"].mean()) == pytest.approx(1.0, abs=0.15)
    assert float(checks.figures(untrained, *counts, means)["distance"].mean()) > 0.1  # control: the guide does not


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_quick_run_has_all_rows_and_no_bar(monkeypatch):
    make = bench.make
    monkeypatch.setattr(bench, "make", lambda *given: shaken(make(*given), 0.1))
    monkeypatch.setattr(bench, "DRAWS", 10)
    args = options()
    rows = {row.name: row for row in bench.run(args)}
    expected = {f"varibad_{what}_after_{step}" for what in bench.FIGURES for step in (0, 2, 5, 10, 20)}
    for name, steps in (("product", (5, 20)), ("rotated", (5, 20)), ("prior", (5, 20))):
        expected |= {f"{name}_{what}_after_{step}" for what in bench.FIGURES for step in steps}
    expected |= {f"{name}_{what}_after_20" for name in ("thompson", "swapped", "nuts") for what in bench.FIGURES}
    expected |= {"encoder_distance_after_20", "encoder_spread_after_20"}
    expected |= {f"varibad_share_of_the_priors_loss_after_{step}" for step in (5, 20)}
    expected |= {f"{name}_seconds" for name in bench.LEARNERS}
    assert set(rows) == expected
    assert all(row.passes is None for row in rows.values())
    assert rows["varibad_coverage_90_after_20"].reference == rows["swapped_coverage_90_after_20"].reference
    assert rows["nuts_distance_after_20"].reference is None
    # the controls are other beliefs than the learned one: the prior is what it was before any pull, whatever is seen
    early, late = (rows[f"prior_contraction_after_{step}"].ours for step in (5, 20))
    assert early == late == rows["varibad_contraction_after_0"].ours
    assert abs(rows["varibad_contraction_after_20"].ours - late) > 1e-3
    assert rows["swapped_distance_after_20"].ours != rows["varibad_distance_after_20"].ours
    assert len(bench.settings(args)["nuts"]) == 1


def trainings(coverage, lost, seeds=3):
    """Figures of some trainings, each number that of four tasks."""
    each = torch.full((4,), 1.0)
    return [
        {
            "varibad_coverage_90_after_5": coverage * each, "exact_varibad_coverage_90_after_5": 0.9 * each,
            "varibad_log_score_lost_after_5": lost * each, "prior_log_score_lost_after_5": 0.05 * each,
        }
        for _ in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("coverage", "lost", "passes"), [(0.9, 0.004, [1, 1]), (0.84, 0.004, [0, 1]), (0.9, 0.006, [1, 0])]
)
def test_bars(coverage, lost, passes):
    rows = {row.name: row for row in bench.rows_of(trainings(coverage, lost), bars=True)}
    held = [rows[name] for name in ("varibad_coverage_90_after_5", "varibad_share_of_the_priors_loss_after_5")]
    assert [row.passes for row in held] == [bool(x) for x in passes]
    assert held[0].reference == pytest.approx(0.9)
    assert held[1].ratio == pytest.approx(lost / 0.05)
    assert rows["prior_log_score_lost_after_5"].passes is None


def test_errors_are_over_tasks_and_trainings():
    """Independent noise of either: the error of the mean is that of means drawn again and again."""
    generator = as_generator(0)
    tasks, runs = torch.randn(2000, 1, 50, generator=generator), 0.3 * torch.randn(2000, 3, 1, generator=generator)
    values = tasks + runs
    errors = torch.tensor([bench.error_of(each) for each in values])
    true = float(values.mean((1, 2)).std())
    assert float(errors.square().mean().sqrt()) == pytest.approx(true, rel=0.05)
    assert bench.error_of(torch.ones(1, 1)) is None
    assert bench.error_of(torch.tensor([[1.0, 3.0]])) == pytest.approx(1.0)
