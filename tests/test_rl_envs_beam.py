"""Beam steering: its rules by hand, its machines, its oracles."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesmeta import errors
from bayesmeta.rl.envs import BeamSteering, Machines
from bayesmeta.rl.envs.beam import BeamState, BeamTasks, _largest
from bayesmeta.rl.envs.machines import thin_lens_response
from bayesmeta.rl.oracles.beam import box_least_squares_actions, inverse_response_actions

BUILT_IN = BeamSteering(Machines.built_in(40))


def awake():
    folder = Path(os.environ.get("BAYESMETA_DATA") or Path(__file__).parents[2] / "shared" / "data")
    return folder / "awake_train_tasks.npz"


def steer(family, policy, split="test", copies=4, seed=1):
    """Mean length of an episode and share of successes, of a policy from (response, readings) to actions."""
    env = family.vector(len(family.machines.rows(split)), copies=copies, split=split, generator=seed)
    readings, _ = env.reset()
    length, success = torch.zeros(env.num_envs), torch.zeros(env.num_envs, dtype=torch.bool)
    running = torch.ones(env.num_envs, dtype=torch.bool)
    for _ in range(family.horizon):
        response = env.tasks.response.repeat_interleave(copies, 0)
        readings, _, terminated, truncated, info = env.step(policy(response, readings))
        length += running
        success |= running & info["success"]
        running &= ~(terminated | truncated)
        if not bool(running.any()):
            break
    return float(length.mean()), float(success.float().mean())


# -- rules ----------------------------------------------------------------------------------------------------------


def one_step(kicks, action):
    """A machine of three monitors whose readings are the kicks, in units of 1e-2."""
    tasks = BeamTasks(torch.zeros(1, dtype=torch.int64), torch.eye(3, dtype=torch.float64)[None])
    state = BeamState(torch.tensor([kicks], dtype=torch.float64) / 100, torch.tensor([kicks], dtype=torch.float64))
    after, reward, ended, info = BUILT_IN.advance(tasks, state, torch.tensor([action], dtype=torch.float64), ())
    return after.readings[0].tolist(), float(reward), bool(ended), bool(info["success"])


def test_rules_by_hand():
    # A step changes a reading by 100 · 1 · 1e-4 = 0.01; actions are scaled into ±1 together.
    readings, reward, ended, success = one_step([0.3, -0.4, 0.0], [1.0, 1.0, -0.5])
    assert readings == pytest.approx([0.31, -0.39, -0.005])
    assert (ended, success) == (False, False)
    assert reward == pytest.approx(-10 * ((0.31**2 + 0.39**2 + 0.005**2) / 3) ** 0.5)
    readings, *_ = one_step([0.3, -0.4, 0.0], [2.0, 0.0, -1.0])
    assert readings == pytest.approx([0.31, -0.4, -0.005])
    # rms < 0.1 is success
    _, reward, ended, success = one_step([0.1, 0.1, 0.1], [-1.0, -1.0, -1.0])
    assert (ended, success, reward) == (True, True, pytest.approx(-0.9))
    # the wall: the second reading and all later ones become its sign
    readings, reward, ended, success = one_step([0.5, -0.995, 0.2], [0.0, -1.0, 0.0])
    assert readings == pytest.approx([0.5, -1.0, -1.0])
    assert (ended, success) == (True, False)
    assert reward == pytest.approx(-10 * ((0.25 + 1 + 1) / 3) ** 0.5)


def test_episodes_end_each_at_its_time_and_go_on_with_the_trial():
    env = BUILT_IN.vector(8, episodes_per_trial=2, new_tasks=True, generator=0)
    readings, _ = env.reset()
    ends, trials = torch.zeros(8), torch.zeros(8)
    for _ in range(12):
        before, episode, row = env.clock, env.episode, env.tasks.row
        readings, _, terminated, truncated, info = env.step(box_least_squares_actions(env.tasks.response, readings))
        over = terminated | truncated
        ends += over
        trials += info["trial_ended"]
        assert torch.equal(env.clock, torch.where(over, 0, before + 1))
        assert torch.equal(env.episode, torch.where(over, 1 - episode, episode))
        assert torch.equal(info["trial_ended"], over & (episode == 1))
        assert torch.equal((env.tasks.row != row) & ~info["trial_ended"], torch.zeros(8, dtype=torch.bool))
        # Running episodes see what their action led to; new ones an admissible start.
        assert torch.equal(readings[~over], info["final_obs"][~over])
        start = readings[over]
        assert bool((start.abs() <= 0.95).all())
        assert bool((start.square().mean(-1).sqrt() > 0.2).all())
        assert torch.allclose(readings, env.state.readings)
    assert bool((ends >= 3).all())
    assert torch.equal(trials, (ends / 2).floor())


def test_an_end_at_the_limit_is_an_end():
    env = BeamSteering(BUILT_IN.machines, horizon=1).vector(200, generator=0)
    readings, _ = env.reset()
    *_, terminated, truncated, info = env.step(box_least_squares_actions(env.tasks.response, readings))
    assert 0 < int(info["success"].sum()) < 200
    assert torch.equal(truncated, ~terminated)
    assert bool((terminated >= info["success"]).all())


def test_one_hundred_steps_truncate():
    env = BUILT_IN.vector(6, generator=0, autoreset_mode="Disabled")
    env.reset()
    for step in range(100):
        *_, terminated, truncated, _ = env.step(torch.zeros(6, 10))
        assert not bool(terminated.any())
        assert bool(truncated.all()) == (step == 99)
    mask = torch.tensor([True, False, True, True, False, True])
    env.reset(options={"reset_mask": mask})
    assert env.clock.tolist() == [0, 100, 0, 0, 100, 0]
    with pytest.raises(errors.EnvError, match="2 episodes have ended"):
        env.step(torch.zeros(6, 10))


# -- machines -------------------------------------------------------------------------------------------------------


def test_thin_lenses_are_products_of_matrices():
    strengths = torch.tensor([[1.1, 0.8, 0.9]], dtype=torch.float64)
    ours = thin_lens_response(strengths, drift=0.7, focal=1.3)[0]
    drift = np.array([[1, 0.7], [0, 1]])
    for corrector in range(3):
        for monitor in range(corrector, 3):
            matrix = np.eye(2)
            for cell in range(corrector, monitor + 1):
                # Up to the quadrupole; its lens and the drift behind it act on later monitors alone.
                matrix = drift @ matrix
                if cell < monitor:
                    sign = -1 if cell % 2 else 1
                    lens = np.array([[1, 0], [-sign * float(strengths[0, cell]) / 1.3, 1]])
                    matrix = drift @ lens @ matrix
            assert float(ours[monitor, corrector]) == pytest.approx(matrix[0, 1], abs=1e-6)
    assert torch.equal(ours, ours.tril())


def test_starts_are_admissible_and_sets_apart():
    machines = BUILT_IN.machines
    usable = torch.cat([machines.rows(split) for split in ("train", "validation", "test")])
    assert sorted([*usable.tolist(), *machines.excluded.tolist()]) == list(range(40))
    assert len(machines.rows("test")) == len(machines.rows("validation")) == round(0.2 * len(usable))
    readings = 100 * torch.einsum("tmc,tnc->tnm", machines.responses, machines.starts)[usable]
    assert bool((readings.abs() <= 0.95 + 1e-6).all())
    assert bool((readings.square().mean(-1).sqrt() > 0.2 - 1e-6).all())
    assert bool((machines.starts.abs() <= 5e-4).all())
    # The share that is reported is that of other random kicks too.
    kicks = 5e-4 * (2 * torch.rand(50_000, 10, generator=torch.Generator().manual_seed(5)) - 1)
    first = int(usable[0])
    other = 100 * kicks @ machines.responses[first].T
    share = ((other.abs().amax(-1) <= 0.95) & (other.square().mean(-1).sqrt() > 0.2)).float().mean()
    error = (float(share * (1 - share)) * (1 / 50_000 + 1 / 8192)) ** 0.5
    assert abs(float(machines.acceptance[first] - share)) < 5 * error


def test_machines_that_admit_no_start_are_left_out():
    strong = Machines.built_in(10).responses.clone()
    strong[3] *= 1000
    machines = Machines(strong)
    assert machines.excluded.tolist() == [3]
    assert all(3 not in machines.rows(split).tolist() for split in ("train", "validation", "test"))


def test_other_machines_are_another_family():
    state = BeamSteering(Machines.built_in(10)).vector(2).state_dict()
    with pytest.raises(errors.CheckpointError, match="belongs to environments"):
        BeamSteering(Machines.built_in(12)).vector(2).load_state_dict(state)


# -- oracles --------------------------------------------------------------------------------------------------------


def test_least_squares_within_limits_equals_scipy():
    from scipy.optimize import lsq_linear

    machines = BUILT_IN.machines
    rows = machines.rows("train")
    response = machines.responses[rows].double()
    readings = 100 * torch.bmm(response, machines.starts[rows, 0].double()[..., None]).squeeze(-1)
    ours = box_least_squares_actions(response, readings)
    assert bool((ours.abs() <= 1).all())
    assert bool((ours.abs() > 0.999).any())  # limits bind
    for i in range(len(rows)):
        theirs = lsq_linear(0.01 * response[i].numpy(), -readings[i].numpy(), (-1, 1), method="bvls", tol=1e-12)
        left = 0.5 * float((readings[i] + 0.01 * response[i] @ ours[i]).square().sum())
        assert left == pytest.approx(theirs.cost, rel=1e-6, abs=1e-9)


def test_the_inverse_response_steers_in_one_step_without_limits():
    machines = BUILT_IN.machines
    rows = machines.rows("train")
    response = machines.responses[rows].double()
    readings = 100 * torch.bmm(response, machines.starts[rows, 0].double()[..., None]).squeeze(-1)
    action = inverse_response_actions(response, readings)
    assert float((readings + 0.01 * torch.bmm(response, action[..., None]).squeeze(-1)).abs().max()) < 1e-8
    assert float(action.abs().max()) > 1  # which the environment scales down


def test_policies_that_know_the_machine_succeed():
    inverse, box = (steer(BUILT_IN, policy) for policy in (inverse_response_actions, box_least_squares_actions))
    assert inverse[1] == box[1] == 1.0
    assert box[0] < inverse[0] < 6
    _, nothing = steer(BeamSteering(BUILT_IN.machines, horizon=10), lambda response, s: torch.zeros_like(s))
    assert nothing == 0.0


@pytest.mark.skipif(not awake().is_file(), reason="awake_train_tasks.npz is not here; BAYESMETA_DATA names its folder")
def test_awake_oracles_take_as_many_steps_as_is_known():
    """3.46 and 1.63 steps on all tasks; 100 test tasks, 10 starts each, and five standard errors of their spread."""
    family = BeamSteering(Machines.load(awake()))
    assert len(family.machines.excluded) == 12
    for policy, steps, spread in ((inverse_response_actions, 3.46, 0.6), (box_least_squares_actions, 1.63, 0.4)):
        length, success = steer(family, policy, copies=10)
        assert success == 1.0
        assert abs(length - steps) < 5 * spread / 100**0.5


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Machines(np.zeros((3, 10))), errors.ShapeError, r"expected \[machines, monitors, correctors\]"),
        (lambda: Machines(np.full((6, 2, 2), np.nan)), errors.NonFiniteDataError, "NaN"),
        (lambda: Machines(np.ones((6, 2, 2)), held_out=0.5), errors.OptionError, "held_out=0.5"),
        (lambda: Machines(np.zeros((6, 2, 2))).rows("train"), errors.OptionError, "too few for three sets"),
        (lambda: Machines.built_in(4), errors.OptionError, "machines=4"),
        (lambda: Machines.built_in(10).rows("dev"), errors.OptionError, "split 'dev'"),
        (lambda: Machines.load("nowhere.npz"), errors.DataError, "nowhere.npz"),
        (lambda: BeamSteering(horizon=0), errors.OptionError, "horizon=0"),
        (lambda: BUILT_IN.vector(2, copies=2, new_tasks=True), errors.OptionError, "end at other times"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_file_without_the_plane_is_refused(tmp_path):
    np.savez(tmp_path / "tasks.npz", responseH=np.ones((3, 2, 2)))
    with pytest.raises(errors.DataError, match="responseX"):
        Machines.load(tmp_path / "tasks.npz", plane="X")


def test_copies_share_one_product():
    tasks = BeamSteering().sample_tasks(3, generator=0)
    repeated, kicks = tasks.repeat(4), 1e-4 * torch.randn(12, 10, generator=torch.Generator().manual_seed(1))
    each = BeamTasks(repeated.row, repeated.response).readings(kicks)
    torch.testing.assert_close(repeated.readings(kicks), each)
    rows = torch.tensor([7, 2])
    torch.testing.assert_close(repeated[rows].readings(kicks[rows]), each[rows])
    assert tasks.shared is None
    assert repeated[rows].shared is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_of_short_rows_is_what_torch_finds(dtype):
    values = torch.randn(300, 10, generator=torch.Generator().manual_seed(0), dtype=dtype)
    values[3, 4], values[5, 9], values[6, 0] = math.nan, -math.inf, -7.0
    torch.testing.assert_close(_largest(values), values.abs().amax(-1), rtol=0, atol=0, equal_nan=True)
    assert _largest(values)[6] == 7.0
    wide = torch.randn(10, 300, generator=torch.Generator().manual_seed(0), dtype=dtype).T  # not contiguous
    assert torch.equal(_largest(wide), wide.abs().amax(-1))


def test_actions_that_are_no_numbers_are_not_taken_for_small_ones():
    env = BUILT_IN.vector(3, generator=0)
    env.reset()
    actions = torch.zeros(3, 10)
    actions[1, 2] = math.nan
    _, reward, *_ = env.step(actions)
    assert reward.isnan().tolist() == [False, True, False]


def test_a_saved_state_is_not_moved_by_later_steps():
    """Clocks count in place."""
    env = BeamSteering().vector(4, generator=0)
    env.reset()
    saved = env.state_dict()
    env.load_state_dict(saved)
    env.step(torch.zeros(4, 10))
    assert saved["clock"].tolist() == [0] * 4
    assert env.clock.tolist() == [1] * 4
