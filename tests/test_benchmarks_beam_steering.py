"""The benchmark of beam steering: what is read of an episode, which rows there are, and how they are held."""

import argparse
import dataclasses
import math

import pytest
import torch

from bayesmeta import errors
from bayesmeta.rl.envs import BeamSteering, Machines
from bayesmeta.rl.setups import Setup
from benchmarks import beam_steering as bench

FAMILY = BeamSteering(Machines.built_in(20), horizon=12)


def options(**changes):
    given = {"quick": False, "seed": 0, "starts": 3, "split": "test", "threads": 1, "policies": []}
    return argparse.Namespace(**{**given, **changes})


def reading(length, success):
    return bench.Reading(torch.tensor(length), torch.tensor(success))


def test_an_oracle_is_read_episode_by_episode():
    """Against a loop over single environments."""
    env = bench.held_out(FAMILY, "test", 3, 1, 0)
    found = bench.read_oracle(bench.ORACLES["oracle_inverse"], env)
    assert found.length.shape == found.success.shape == (4, 1)
    env = bench.held_out(FAMILY, "test", 3, 1, 0)
    env.reset()
    kicks, lengths = env.state.kicks, []
    for number in range(env.num_envs):
        response, at = env.tasks.response[number // 3], kicks[number]
        steps, rms = 0, 1.0
        while rms >= 0.1:
            action = bench.ORACLES["oracle_inverse"](response[None], (100 * response @ at)[None])[0]
            at = at + 1e-4 * action / action.abs().max().clamp(min=1)
            steps, rms = steps + 1, float((100 * response @ at).square().mean().sqrt())
        lengths.append(float(steps))
    assert torch.allclose(found.length[:, 0], torch.tensor(lengths).view(4, 3).mean(1))
    assert found.success.min() == 1.0
    still = bench.read_oracle(lambda response, s: torch.zeros_like(s), bench.held_out(FAMILY, "test", 3, 1, 0))
    assert still.length.eq(12).all()
    assert still.success.eq(0).all()


def test_all_machines_of_a_set_are_read_and_no_other():
    for split in ("validation", "test"):
        env = bench.held_out(FAMILY, split, 2, 2, 0)
        assert env.tasks.row.tolist() == FAMILY.machines.rows(split).tolist()
        assert (env.copies, env.episodes_per_trial) == (2, 2)
    assert not set(FAMILY.machines.rows("test").tolist()) & set(FAMILY.machines.rows("train").tolist())


def test_length_and_success_stand_together_and_each_has_its_bar():
    bars = {"length": bench.at_most(2.6), "success": bench.at_least(0.98)}
    good, bad = reading([[2.0], [3.0]], [[1.0], [1.0]]), reading([[2.0], [3.4]], [[1.0], [0.9]])
    rows = bench.rows_of("rl2_episode_1", good, 1.0, bars)
    assert [(row.name, row.ours, row.passes) for row in rows] == [
        ("rl2_episode_1_length", 2.5, True),
        ("rl2_episode_1_success", 1.0, True),
    ]
    assert rows[0].standard_error == pytest.approx(0.5)  # over machines
    assert [row.passes for row in bench.rows_of("rl2_episode_1", bad, 1.0, bars)] == [False, False]


def test_a_second_episode_is_held_to_the_first():
    bars = {"length": bench.at_most(0.0), "success": bench.at_least(-bench.EQUAL)}
    better = reading([[2.5, 2.0], [2.5, 2.4]], [[1.0, 1.0], [0.9, 1.0]])
    worse = reading([[2.5, 2.6], [2.5, 2.6]], [[1.0, 0.9], [1.0, 1.0]])
    rows = bench.later_rows("rl2_episode_2", better, 1.0, bars)
    assert [row.name for row in rows] == ["rl2_episode_2_length", "rl2_episode_2_success"]
    assert (rows[0].ours, rows[0].reference, rows[0].difference) == pytest.approx((2.2, 2.5, -0.3))
    assert rows[0].standard_error == pytest.approx(0.2)  # of the difference, machine by machine
    assert [row.passes for row in rows] == [True, True]
    assert [row.passes for row in bench.later_rows("rl2_episode_2", worse, 1.0, bars)] == [False, False]


@pytest.mark.parametrize("name", list(bench.TRAININGS))
def test_a_quick_run_trains_and_has_no_bars(name):
    rows = bench.learner_rows(name, FAMILY, options(quick=True))
    assert len(rows) == 4
    assert all(row.bar is None and row.seconds > 0 for row in rows)
    lengths = [row.ours for row in rows if row.name.endswith("length")]
    assert all(1 <= length <= FAMILY.horizon for length in lengths)


def test_maml_is_read_before_and_after_a_step_from_the_same_starts():
    """Before: against a loop. After a step of next to nothing: the same; after a large one (the control): another."""
    run = bench.trained_maml(FAMILY, 0, True)
    tiny, large = (dataclasses.replace(run.config, inner_lr=rate) for rate in (1e-12, 3.0))
    run.config = tiny
    reading = bench.read_maml(run, FAMILY, "test", 3, 0)
    assert reading.length.shape == reading.success.shape == (4, 2)
    env = bench.held_out(FAMILY, "test", 3, 1, 0)
    seen, _ = env.reset()
    running, length, success = torch.ones(12, dtype=torch.bool), torch.zeros(12), torch.zeros(12)
    for _ in range(FAMILY.horizon):
        phi = run.policy.begin(run.theta, 4)
        action = run.policy.distribution(phi, seen.unflatten(0, (4, 3)), run.theta).mean.detach().flatten(0, 1)
        seen, _, terminated, truncated, info = env.step(action)
        length, success = length + running, success + (running & info["success"])
        running &= ~(terminated | truncated)
    torch.testing.assert_close(reading.length[:, 0], length.view(4, 3).mean(1))
    torch.testing.assert_close(reading.success[:, 0], success.view(4, 3).mean(1))
    assert torch.equal(reading.length[:, 0], reading.length[:, 1])
    run.config = large
    again = bench.read_maml(run, FAMILY, "test", 3, 0)
    assert torch.equal(again.length[:, 0], reading.length[:, 0])
    assert not torch.equal(again.length[:, 1], reading.length[:, 1])


def test_maml_has_rows_before_and_after_and_no_bars():
    run = bench.trained_maml(FAMILY, 0, True)
    assert (run.config.inner_steps, run.iteration) == (1, 2)
    assert 0 < (run.theta - bench.beam_policy(0).theta).norm() < 2  # it moved in both stages
    rows = bench.maml_rows(FAMILY, options(quick=True))
    names = [f"maml_rl_{when}_{what}" for when in ("before", "after_1") for what in ("length", "success")]
    assert [row.name for row in rows] == names
    assert all(row.bar is None for row in rows)
    assert rows[2].difference == pytest.approx(rows[2].ours - rows[0].ours, abs=1e-5)


def test_the_command_lines_defaults_are_these_settings():
    setup = Setup("beam", "rl2").filled()
    learner, run = setup.learner(FAMILY), bench.trained(FAMILY, bench.TRAININGS["rl2"], 0, True)
    assert (learner.config, learner.steps) == (bench.CONFIG, bench.STEPS)
    assert (learner.iterations, learner.env.episodes_per_trial) == (
        bench.TRAININGS["rl2"].iterations, bench.TRAININGS["rl2"].episodes,
    )  # fmt: skip
    assert (learner.env.num_envs, setup.units) == (bench.ENVS, bench.UNITS)
    for name in ("reward_shift", "reward_scale"):
        assert getattr(learner.policy, name) == getattr(run.policy, name)
    assert learner.policy.free.detach().exp().mean() == pytest.approx(math.exp(-1))
    setup = Setup("beam", "maml").filled()
    learner, run = setup.learner(FAMILY), bench.trained_maml(FAMILY, 0, True)
    assert learner.config == dataclasses.replace(run.config, joint_iterations=bench.JOINT)
    assert setup.iterations == bench.JOINT + bench.META
    assert (setup.tasks, setup.copies) == (bench.TASKS, bench.EPISODES)
    assert learner.theta.numel() == run.theta.numel()


def test_the_training_is_of_the_episodes_it_says():
    for training in bench.TRAININGS.values():
        run = bench.trained(FAMILY, training, 0, True)
        assert run.env.episodes_per_trial == training.episodes
        assert run.env.split == "train"
        assert run.env.new_tasks


def test_unknown_policies_and_a_missing_file_are_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="unknown policy sac"):
        bench.run(options(policies=["sac"]))
    monkeypatch.setenv("BAYESMETA_DATA", str(tmp_path))
    with pytest.raises(errors.DataError, match="Set BAYESMETA_DATA"):
        bench.family_of()
