"""The memory of tabular MDPs: by hand, steps against the whole, and what it reads of a policy's inputs."""

import pytest
import torch

from bayesmeta.errors import OptionError
from bayesmeta.rl.envs import TabularMDP, TensorVectorEnv
from bayesmeta.rl.memory.pair import PairMemory
from bayesmeta.rl.memory.policy import MemoryPolicy
from bayesmeta.rl.memory.recurrent import LSTMMemory
from bayesmeta.rl.rollout import collect
from bayesmeta.rl.setups import Setup

STATES, ACTIONS, INPUTS = 3, 2, 9


def case(time=7, batch=4):
    torch.manual_seed(3)
    net = PairMemory(INPUTS, 5, STATES, ACTIONS, row=2).double()
    generator = torch.Generator().manual_seed(1)
    one_hot = torch.nn.functional.one_hot
    now = one_hot(torch.randint(STATES, (time, batch), generator=generator), STATES)
    action = one_hot(torch.randint(ACTIONS, (time, batch), generator=generator), ACTIONS)
    rest = torch.randn(time, batch, INPUTS - STATES - ACTIONS, generator=generator, dtype=torch.float64)
    state = torch.randn(batch, net.width, generator=generator, dtype=torch.float64)
    return net, torch.cat([now, action, rest], -1), state, torch.zeros(time, batch, dtype=torch.bool)


def test_a_step_by_hand():
    """Written: (s before, a) and its reward, in their own places; read: the row of the state now."""
    net, x, state, _ = case(1, 1)
    before, now, action, reward = 1, 2, 0, 0.7
    x[0, 0, : STATES + ACTIONS + 1] = torch.tensor([0, 0, 1, 1, 0, reward])
    state[0, 5:] = torch.tensor([0, 1, 0])
    wide = torch.zeros(2 * STATES * ACTIONS, dtype=torch.float64)
    wide[before * ACTIONS + action] = 1
    wide[STATES * ACTIONS + before * ACTIONS + action] = reward
    cell = torch.nn.GRUCell(2 * STATES * ACTIONS + INPUTS, 5).double()
    cell.load_state_dict({name[:-3]: value for name, value in net.gru.state_dict().items()})
    hidden = cell(torch.cat([wide, x[0, 0]]).unsqueeze(0), state[:, :5])
    row = (net.table.weight[now * 2 : now * 2 + 2] @ hidden[0] + net.table.bias[now * 2 : now * 2 + 2]).tanh()
    out, after = net.step(x[0], state)
    torch.testing.assert_close(out[0], torch.cat([hidden[0], row]))
    torch.testing.assert_close(after[0], torch.cat([hidden[0], x[0, 0, :STATES]]))


@pytest.mark.parametrize("inside", [True, False])
def test_steps_equal_the_whole(inside):
    net, x, state, begins = case()
    begins[0, 2] = True
    begins[3, 1] = begins[5] = inside
    whole, last = net.unroll(x, state, begins)
    for t in range(len(x)):
        h, state = net.step(x[t], state, begins[t])
        torch.testing.assert_close(h, whole[t], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("step", [0, 3])
def test_nothing_crosses_to_the_next_trial(step):
    """What was before a trial's begin changes nothing after it, NaN included; unmarked (the control), it does."""
    net, x, state, begins = case()
    spoilt = x.clone()
    spoilt[:step] = torch.nan
    other = torch.full_like(state, torch.nan)
    assert not net.unroll(spoilt, other, begins)[0][step:].isfinite().all()
    begins[step] = True
    clean = net.unroll(x, state, begins)
    found = net.unroll(spoilt, other, begins)
    assert torch.equal(found[0][step:], clean[0][step:])
    assert torch.equal(found[1], clean[1])


def test_it_reads_the_states_and_actions_of_a_policy():
    """The first numbers that a policy gives it are those of the rollout, and its state keeps the state before."""
    family = TabularMDP(states=4, actions=3, horizon=3)
    env = TensorVectorEnv(family, 6, new_tasks=True, episodes_per_trial=2, generator=0)
    policy = MemoryPolicy(env, memory_kind=lambda inputs: PairMemory(inputs, 8, 4, 3), reward_shift=1.0, reward_scale=2)
    rollout = collect(env, policy.actor(), 5, generator=torch.Generator().manual_seed(0))
    seen = policy.inputs(rollout.moments)
    assert torch.equal(seen[..., :4].argmax(-1), rollout.moments.observation)
    assert torch.equal(seen[1:, :, 4:7].argmax(-1), rollout.action[:-1])
    assert not seen[0, :, 4:8].any()  # nothing is known where a trial begins: nothing is written
    torch.testing.assert_close(seen[1:, :, 7], (rollout.reward[:-1] - 1) / 2)
    assert torch.equal(rollout.state[:, 8:].argmax(-1), rollout.moments.observation[-1])
    with torch.no_grad():
        distribution, value = policy.unroll(rollout.moments, None)
    torch.testing.assert_close(distribution.log_prob(rollout.action), rollout.log_prob)
    torch.testing.assert_close(value, rollout.value)


def test_it_is_the_memory_of_mdps_on_the_command_line():
    for method, kind, units in (("rl2", PairMemory, 128), ("rl2-lstm", LSTMMemory, 128)):
        setup = Setup("mdp", method, tasks=2, iterations=1).filled()
        learner = setup.learner(setup.family())
        assert type(learner.policy.memory) is kind
        assert setup.units == units
        assert learner.config.minibatches == 8
    assert Setup("bandit", "rl2").filled().units == 64


def test_numbers_that_cannot_be_are_refused():
    for wrong in ((5, 8, 3, 2), (9, 8, 0, 2), (9, 8, 3, 0), (9, 8, 3, 2, 0), (9, 0, 3, 2)):
        with pytest.raises(OptionError, match="at least"):
            PairMemory(*wrong)
