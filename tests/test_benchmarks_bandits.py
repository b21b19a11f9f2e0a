"""The benchmarks of classical bandit and MDP algorithms: what a bar allows, on which tasks, and what they refuse."""

import argparse

import pytest
import torch

from bayesmeta.rl.envs import BernoulliBandit
from benchmarks import _bandit_baselines as bandits
from benchmarks import tabular_mdps


def test_the_bar_is_three_combined_errors_and_the_rounding():
    totals = torch.tensor([0.0, 2.0]).repeat(5000)
    spread = float(totals.std())
    reference, limit = bandits.allowed(totals, ("greedy", 100, 10))
    assert (reference, limit) == (77.1, pytest.approx(3 * spread * (1 / 10_000 + 1 / 1000) ** 0.5 + 0.05))
    reference, limit = bandits.allowed(totals, ("thompson", 10, 5))
    assert (reference, limit) == (5.82, pytest.approx(3 * (spread**2 / 10_000 + 0.01**2) ** 0.5 + 0.005))


def test_rows_judge_the_distance(monkeypatch):
    for mean, passes in ((74.9, True), (79.0, False)):
        totals = mean + torch.randn(10_000, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(bandits, "play", lambda *args, totals=totals: totals)
        row = bandits.baseline_row("greedy", 100, 5, 10_000, 0)
        assert (row.name, row.reference, row.passes) == ("greedy_n100_k5", 74.8, passes)
        assert row.difference == pytest.approx(mean - 74.8, abs=0.05)
    assert bandits.baseline_row("optimistic_thompson", 100, 5, 10_000, 0).bar is None
    assert bandits.optimal_row(5).passes


def test_play_takes_all_test_tasks_in_pieces(monkeypatch):
    seen = []
    real = bandits.rules.play_bandits
    keep = lambda rule, family, tasks, **options: (seen.append(tasks.mean), real(rule, family, tasks, **options))[1]  # noqa: E731
    monkeypatch.setattr(bandits.rules, "play_bandits", keep)
    totals = bandits.play("random", 10, 5, 25, 3, chunk=10)
    assert totals.shape == (25,)
    tasks = BernoulliBandit(arms=5, horizon=10).sample_tasks(25, generator=3, split="test").mean
    assert torch.equal(torch.cat(seen), tasks)
    assert len(bandits.TABLE["greedy"]) == len(bandits.SIZES)


def test_mdp_rows_are_read_after_several_numbers_of_episodes(monkeypatch):
    played = torch.full((25, 40), 13.48) + 0.1 * torch.randn(25, 40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(tabular_mdps.rules, "play_mdps", lambda *args, **options: played)
    ten, many = tabular_mdps.rows_of("greedy", [10, 25], 40, 0, True)
    assert (ten.name, ten.reference, ten.passes) == ("greedy_n10", 134.8, True)
    assert ten.ratio == pytest.approx(1.0, abs=0.01)
    assert (many.name, many.passes) == ("greedy_n25", False)  # 337 is far from 368.8
    assert tabular_mdps.rows_of("greedy", [10], 40, 0, False)[0].bar is None
    assert tabular_mdps.rows_of("beb_right_prior", [10], 40, 0, True)[0].reference is None


def test_mdps_are_all_played_in_pieces(monkeypatch):
    seen = []
    real = tabular_mdps.rules.play_mdps
    keep = lambda rule, family, tasks, **options: (seen.append(tasks.reward), real(rule, family, tasks, **options))[1]  # noqa: E731
    monkeypatch.setattr(tabular_mdps.rules, "play_mdps", keep)
    monkeypatch.setattr(tabular_mdps, "CHUNK", 10)
    (row,) = tabular_mdps.rows_of("random", [10], 25, 3, False)
    assert [len(rewards) for rewards in seen] == [10, 10, 5]
    tasks = tabular_mdps.TabularMDP().sample_tasks(25, generator=3, split="test")
    assert torch.equal(torch.cat(seen), tasks.reward)
    assert row.ours == pytest.approx(float(tasks.reward.mean()) * 100, abs=4 * row.standard_error * 100)


def test_unknown_names_are_refused():
    args = argparse.Namespace(baselines=["sarsa"], learners=[], threads=1, quick=True, episodes=[10], tasks=10, seed=0)
    with pytest.raises(SystemExit, match="unknown baseline sarsa"):
        tabular_mdps.run(args)
    with pytest.raises(SystemExit, match="unknown numbers of episodes"):
        tabular_mdps.run(argparse.Namespace(**{**vars(args), "baselines": [], "quick": False, "episodes": [7]}))
