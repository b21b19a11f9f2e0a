"""Rollouts: every number of a small environment, generators, going on, and what is told across trials."""

import math

import pytest
import torch
from rl_envs import Counting

from bayesmeta.errors import NonFiniteDataError, OptionError, ShapeError
from bayesmeta.rl.rollout import Acted, Moment, collect


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Scripted:
    """Does 1, 2, 3, … in turn, and keeps what it was told."""

    def __init__(self):
        self.moments, self.states = [], []

    def __call__(self, moment, state, generator):
        self.moments.append(moment)
        self.states.append(state)
        state = torch.zeros(6) if state is None else state
        action = (state % 4).long() + 1
        return Acted(action, -state, state + 1, 10 * state)


def test_every_number_of_a_rollout():
    actor = Scripted()
    rollout = collect(Counting(), actor, 5, generator=seeded(), keep=("success",))
    assert rollout.action[:, 0].tolist() == [1, 2, 3, 4, 1]
    assert rollout.reward[:, 5].tolist() == [1, 2, 3, 4, 1001]
    assert rollout.log_prob[:, 2].tolist() == [0, -1, -2, -3, -4]
    assert rollout.value[:, 2].tolist() == [0, 10, 20, 30, 40]
    assert rollout.terminated[:, 0].tolist() == [False, True, False, False, False]
    assert rollout.truncated[:, 0].tolist() == [False, False, False, True, False]
    assert rollout.ended[:, 0].tolist() == [False, True, False, True, False]
    assert rollout.trial_ended[:, 0].tolist() == [False, False, False, True, False]
    assert rollout.successor[:, 5, 0].tolist() == [120.5, 121.5, 122.5, 123.5, 124.5]
    assert rollout.extra["success"][:, 1].tolist() == [False, True, False, True, False]
    assert rollout.first_state is None
    assert rollout.state.tolist() == [5] * 6
    moments = rollout.moments
    assert moments.observation[:, 4, 0].tolist() == [110, 111, 112, 113, 114]
    assert moments.clock[:, 0].tolist() == [0, 1, 0, 1, 0]
    assert moments.episode[:, 0].tolist() == [0, 0, 1, 1, 0]
    # what was done and received before, also across the episodes of a trial; nothing of the trial before
    assert moments.begins[:, 0].tolist() == [True, False, False, False, True]
    assert moments.action[:, 0].tolist() == [0, 1, 2, 3, 0]
    assert moments.reward[:, 0].tolist() == [0, 1, 2, 3, 0]
    assert moments.ended[:, 0].tolist() == [False, False, True, False, False]
    assert rollout.after.reward.tolist() == [1001] * 6
    assert rollout.total().tolist() == [1011] * 6
    assert rollout.first_episodes()[:, 0].tolist() == [True, True, False, False, False]
    assert rollout.by_task(rollout.reward).shape == (5, 2, 3)
    assert rollout.by_task(moments.observation)[0, 1, 2, 0] == 120
    assert torch.equal(Moment.stack(actor.moments).reward, moments.reward)


def test_a_rollout_goes_on_where_the_last_one_stopped():
    env, actor = Counting(), Scripted()
    first = collect(env, actor, 3, generator=seeded())
    second = collect(env, actor, 4, generator=seeded(), start=first.after, state=first.state)
    whole = collect(Counting(), Scripted(), 7, generator=seeded())
    for name in ("action", "reward", "log_prob", "terminated", "truncated", "trial_ended", "successor", "value"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(whole, name)), name
    for name, value in vars(whole.moments).items():
        joined = torch.cat([getattr(first.moments, name), getattr(second.moments, name)])
        assert torch.equal(joined, value), name
    assert torch.equal(second.first_state, first.state)


def test_actions_come_from_the_generator():
    def actor(moment, state, generator):
        return Acted(torch.randint(5, (6,), generator=generator), torch.zeros(6))

    before = torch.get_rng_state()
    a, b, c = (collect(Counting(), actor, 20, generator=seeded(s)).action for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_no_graph_is_kept():
    weight = torch.ones(6, requires_grad=True)

    def actor(moment, state, generator):
        return Acted(torch.zeros(6, dtype=torch.long), weight * 2, None, weight * 3)

    rollout = collect(Counting(), actor, 3, generator=seeded())
    assert not rollout.log_prob.requires_grad
    assert not rollout.value.requires_grad


def test_bad_input_is_refused():
    with pytest.raises(OptionError, match="at least one step"):
        collect(Counting(), Scripted(), 0, generator=seeded())
    with pytest.raises(OptionError, match="nothing named 'speed'"):
        collect(Counting(), Scripted(), 2, generator=seeded(), keep=("speed",))
    with pytest.raises(NonFiniteDataError, match=r"nan in step 2 to environment 4 \(task 1, copy 1\)"):
        collect(Counting(bad_step=2), Scripted(), 5, generator=seeded())

    def one_action(moment, state, generator):
        return Acted(torch.zeros(1, dtype=torch.long), torch.zeros(1))

    with pytest.raises(ShapeError, match="one for each of 6 environments"):
        collect(Counting(), one_action, 2, generator=seeded())
    assert math.isfinite(collect(Counting(), Scripted(), 2, generator=seeded()).total().sum())
