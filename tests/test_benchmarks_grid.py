"""The benchmark of the grid: what is 0 and 1, which goals are read, and how rows are made of trainings."""

import argparse
import math

import pytest
import torch

from bayesmeta.rl.envs import Grid, TensorVectorEnv
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.rollout import Acted, collect
from bayesmeta.rl.varibad.learner import VariBAD
from benchmarks import grid as bench
from benchmarks._grid_strategies import IDEAL, LEARNED

SMALL = Grid(cells=3, horizon=5)


def options(**changes):
    given = {
        "quick": True, "seed": 0, "threads": 1, "learners": [*bench.LEARNERS], "trainings": 1, "trials": 8,
        "iterations": 2, "copies": 1, "reuse": False,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def test_the_random_return_is_that_of_random_actions():
    env = TensorVectorEnv(SMALL, 4000, generator=0)

    def act(moment, state, generator):
        return Acted(torch.randint(5, (4000,), generator=generator), torch.zeros(4000))

    rollout = collect(env, act, SMALL.horizon, generator=torch.Generator().manual_seed(1))
    totals = rollout.total().double()
    error = float(totals.std()) / 4000**0.5
    assert abs(float(totals.mean()) - bench.random_return(SMALL)) < 5 * error
    # control: actions that never stay are another policy, further apart than five errors
    moving = collect(
        env, lambda m, s, g: Acted(torch.randint(1, 5, (4000,), generator=g), torch.zeros(4000)), SMALL.horizon,
        generator=torch.Generator().manual_seed(1),
    ).total().double()  # fmt: skip
    assert abs(float(moving.mean()) - bench.random_return(SMALL)) > 5 * error


def test_the_optimum_is_one_and_knowing_the_goal_is_no_better_from_the_second_episode_on():
    scale = bench.scale_of(bench.FAMILY, bench.EPISODES)
    straight = 15 * -0.1 + 1.1 * (16 - bench.FAMILY.goals().sum(-1)).double().mean()
    assert scale.optimal[1:].tolist() == pytest.approx([float(straight)] * 3)
    assert scale.optimal[0] < straight
    assert scale.normalise(scale.optimal).tolist() == [1.0] * 4
    assert scale.normalise(scale.random).tolist() == [0.0] * 4


def test_every_goal_is_read_once():
    env = bench.all_goals(bench.FAMILY, 0)
    assert env.tasks.goal.tolist() == bench.FAMILY.goals().tolist()
    assert (env.num_envs, env.episodes_per_trial) == (21, 4)


def test_both_learners_have_the_same_environments_and_settings_of_ppo():
    ours, peer = (bench.make(name, SMALL, 3, 4, 2) for name in bench.LEARNERS)
    assert isinstance(ours, VariBAD)
    assert type(peer) is RL2
    assert (ours.config, ours.steps, ours.iterations) == (peer.config, peer.steps, peer.iterations)
    assert (ours.env.num_envs, ours.env.split) == (peer.env.num_envs, peer.env.split)


def test_a_belief_that_was_not_trained_is_seen_to_be_wrong(monkeypatch):
    run = bench.make("varibad", SMALL, 3, 4, 2)
    check = bench.belief_checks(run, SMALL, 0)["belief"]
    assert check.exact_log_score.mean > check.log_score.mean
    assert check.seen_share.mean > 0.05
    assert not bench.BARS["varibad_belief_on_seen_empty"].holds(check.seen_share.mean)


def test_the_ignorant_belief_is_calibrated_on_the_same_walks_and_forgets_where_it_has_been():
    run = bench.make("varibad", SMALL, 3, 4, 2)
    told = bench.belief_checks(run, SMALL, 0)
    check = told["ignorant"]
    assert check.exact_log_score.mean == told["search"].exact_log_score.mean  # the same walks and steps
    assert check.log_score.mean == pytest.approx(-math.log(len(SMALL.goals())), abs=1e-6)
    assert check.exact_log_score.mean - check.log_score.mean > 0.05
    assert check.ece < 1e-6
    assert check.seen_share.mean > 0


def test_a_quick_run_has_all_rows_and_curves_and_no_bar(monkeypatch):
    monkeypatch.setattr(bench, "DRAWS", 4)
    monkeypatch.setattr(bench, "FAMILY", SMALL)
    args = options()
    rows = {row.name: row for row in bench.run(args)}
    names = [f"{name}_episode_{n}" for name in bench.LEARNERS for n in (1, 2, 3, 4)]
    kinds = ("on_seen_empty", "calibration_error", "distance", "log_score_lost")
    beliefs = {f"varibad_{when}_{what}" for when in ("belief", "search") for what in kinds}
    beliefs |= {"ignorant_search_on_seen_empty", "ignorant_search_log_score_lost"}
    ways = {f"explore_{name}" for name in ["belief_conditioned", *LEARNED]} | {f"ideal_{name}" for name in IDEAL}
    explored = {f"{name}_episode_{n}" for name in ways for n in (1, 2, 3, 4)}
    assert set(names) | beliefs | explored == set(rows)
    assert all(row.passes is None for row in rows.values())
    assert rows["varibad_episode_1"].seconds > 0
    curves = bench.settings(args)["curves"]
    assert [(c["learner"], c["seed"], len(c["curve"])) for c in curves] == [("varibad", 1, 2), ("rl2", 1, 2)]
    assert curves[0]["curve"][-1]["normalised"][0] == pytest.approx(rows["varibad_episode_1"].ours)
    assert rows["explore_belief_conditioned_episode_2"].ours == rows["varibad_episode_2"].ours
    assert rows["explore_posterior_sampling_episode_2"].standard_error > 0
    for name in IDEAL[:-1]:  # but for the one that never learns, the goal is known at last
        assert rows[f"ideal_{name}_episode_4"].ours > 3 * rows["ideal_prior_episode_4"].ours


def test_a_training_is_read_again_if_it_was_made_with_the_same_settings(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "KEPT", tmp_path)
    monkeypatch.setattr(bench, "FAMILY", SMALL)
    args = options(quick=False, reuse=True)
    first = bench.trained("rl2", args, 4)
    assert "from" not in capsys.readouterr().out
    again = bench.trained("rl2", args, 4)
    assert "from" in capsys.readouterr().out
    assert (again.curve, again.seconds) == (first.curve, first.seconds)
    same, other = (
        [torch.equal(a, b) for a, b in zip(first.run.policy.parameters(), run.policy.parameters(), strict=True)]
        for run in (again.run, bench.make("rl2", bench.FAMILY, 4, args.trials, args.iterations))
    )
    assert all(same)
    assert not all(other)
    for changed in (options(quick=False, reuse=True, iterations=3), options(quick=False)):
        bench.trained("rl2", changed, 4)
        assert "from" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value", "same"), [("later", None, True), ("later", 0.5, False), ("seed", 5, False)])
def test_an_option_that_came_after_a_training_is_none_of_its_settings_if_it_is_off(
    name, value, same, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(bench, "KEPT", tmp_path)
    monkeypatch.setattr(bench, "FAMILY", SMALL)
    args = options(quick=False, reuse=True)
    bench.trained("rl2", args, 4)
    capsys.readouterr()
    told = RL2.options
    monkeypatch.setattr(RL2, "options", lambda run: told(run) | {name: value})
    bench.trained("rl2", args, 4)
    assert ("from" in capsys.readouterr().out) == same


def test_rows_of_a_strategy_are_normalised_with_their_errors():
    scale = bench.scale_of(bench.FAMILY, bench.EPISODES)
    low = scale.random.expand(2, 2, 4)
    returns = low + torch.tensor([[0.0, 1.0], [1.0, 0.0]])[..., None] * (scale.optimal - scale.random)
    rows = bench.strategy_rows("ideal_mean", returns)
    assert [row.name for row in rows] == [f"ideal_mean_episode_{n}" for n in (1, 2, 3, 4)]
    assert [row.ours for row in rows] == pytest.approx([0.5] * 4)
    assert [row.standard_error for row in rows] == pytest.approx([0.125**0.5] * 4)


def test_a_full_run_is_held_to_its_bars():
    args = options(quick=False)
    assert [bench._row("varibad_episode_2", x, None, args).passes for x in (0.94, 0.96)] == [False, True]
    assert bench._row("varibad_episode_1", 0.1, None, args).passes is None
    assert [bench._row("varibad_belief_on_seen_empty", x, None, args).passes for x in (0.05, 0.049)] == [False, True]
