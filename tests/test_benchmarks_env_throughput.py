"""The benchmark of environments: both sides step the same tasks as often as it says, and it compares what it counts."""

import argparse

import pytest
import torch

from benchmarks import env_throughput


def test_rows_compare_steps_per_second(monkeypatch):
    """Fake sides that take 1 and 100 seconds for a step: 100 times."""
    seen = {"ours": 0, "peer": 0}

    def sides(family, num, seed):
        def side(name, seconds):
            def run(steps):
                seen[name] += steps
                return steps * seconds

            return run

        return {"ours": side("ours", 1.0), "peer": side("peer", 100.0)}

    monkeypatch.setattr(env_throughput, "sides", sides)
    row = env_throughput.measure("grid", 1024, 3, 0)
    assert (row.ours, row.reference, row.ratio, row.passes) == (1.024, 0.01024, 100.0, True)
    assert seen == {"ours": 310, "peer": 55}  # 10 to warm up, then 3 blocks of 100 and of 15
    assert env_throughput.measure("grid", 64, 3, 0).bar is None


@pytest.mark.parametrize("name", env_throughput.FAMILIES)
def test_sides_step(name, monkeypatch):
    made = {}
    real = env_throughput.SyncVectorEnv
    keep = lambda *args, **options: made.setdefault("peer", real(*args, **options))  # noqa: E731
    monkeypatch.setattr(env_throughput, "SyncVectorEnv", keep)
    both = env_throughput.sides(env_throughput.FAMILIES[name], 512, 0)
    assert all(run(3) > 0 for run in both.values())
    first, *others = made["peer"].envs[::64]
    assert first.clock == 3
    assert all((first.task[key] == made["peer"].envs[63].task[key]).all() for key in first.task)
    assert any((first.task[key] != other.task[key]).any() for key in first.task for other in others)


def test_actions_lie_in_the_space_and_unknown_families_are_refused():
    generator = torch.Generator().manual_seed(0)
    for family in env_throughput.FAMILIES.values():
        actions = env_throughput.random_actions(family, 50, generator)
        assert all(family.action_space.contains(action) for action in actions.numpy())
    with pytest.raises(SystemExit, match="unknown family sine"):
        env_throughput.run(argparse.Namespace(families=["sine"]))
