"""How a belief policy explores: noise that is correlated in time, and a spread that depends on what is known."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import OptionError
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.rollout import collect
from bayesmeta.rl.varibad.exploring import CorrelatedNoise, SpreadHead
from bayesmeta.rl.varibad.policy import BeliefPolicy

HORIZON = 8
ROBOT = bm.rl.SparsePointRobot(horizon=HORIZON)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(family=ROBOT, num=6, **options):
    env = bm.rl.TensorVectorEnv(family, num, new_tasks=True, episodes_per_trial=3, generator=0)
    spec = ContextSpec.of(env, inputs=("state", "action", "successor"))
    policy = BeliefPolicy(env, LatentContext.make(spec, 2, "product", width=6, seed=0), units=5, seed=0, **options)
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(5))
    return env, policy


def noise_of(correlation, num=400):
    """(action − mean) / standard deviation of one trial, ``[episodes, steps, 2 × num]``."""
    env, policy = made(num=num, correlation=correlation)
    state = policy.first(num).detach()
    rollout = collect(env, policy.actor(), 3 * HORIZON, generator=seeded(1), state=state)
    with torch.no_grad():
        each = policy.unroll(rollout.moments, state)[0].base_dist
    torch.testing.assert_close(each.log_prob(rollout.action).sum(-1), rollout.log_prob, rtol=1e-4, atol=1e-4)
    return ((rollout.action - each.loc) / each.scale).flatten(1).unflatten(0, (3, HORIZON))


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_noise_is_correlated_within_episodes_and_not_between_them(correlation):
    """800 columns: a correlation has a standard error of 0.035."""
    noise = noise_of(correlation)
    assert noise.var(-1).sub(1).abs().max() < 5 * math.sqrt(2 / 800)  # each action by itself is as it was
    for apart in (1, 3):
        found = (noise[:, apart:] * noise[:, :-apart]).mean()
        assert found == pytest.approx(correlation**apart, abs=0.04)
    assert (noise[1:, 0] * noise[:-1, -1]).mean().abs() < 0.1
    assert (noise[0, :, ::2] * noise[0, :, 1::2]).mean().abs() < 0.1  # nor between coordinates


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_correlated_noise_biases_the_gradient_of_a_feedback(correlation):
    """An advantage that only the state has cancels under white noise, and not where the noise has made the state."""
    trials, steps, gain, generator = 4000, 20, 0.3, seeded(2)
    noise, state = CorrelatedNoise(correlation), torch.zeros(trials, 1)
    states, scores = [], []
    for step in range(steps):
        fresh = noise.draw(state, torch.full((trials,), step == 0), generator)
        states.append(state)
        scores.append(fresh * state)  # d log N(a; gain · s, 1) / d gain
        state = state - gain * state + fresh
    error = torch.stack(states).square()
    error = (error - error.mean()) / error.std()
    each = (error * torch.stack(scores)).sum(0)
    standard_errors = each.mean() / (each.std() / math.sqrt(trials))
    if correlation:
        assert standard_errors > 15  # of the docstring's warning: biased, and more so for larger c
    else:
        assert standard_errors.abs() < 4


def test_greedy_actions_have_no_noise_whatever_its_correlation():
    ways = []
    for correlation in (0.0, 0.9):
        env, policy = made(correlation=correlation)
        ways.append(collect(env, policy.actor(greedy=True), 9, generator=seeded(), state=policy.first(6)).action)
    assert torch.equal(*ways)


def test_a_spread_head_by_hand():
    head = SpreadHead(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]), log_std=-1.0, most=0.5)
    assert (head.outputs, head.free) == (4, 0)
    normal = head.distribution(torch.tensor([[0.0, 0.5, 0.0, 0.0], [50.0, -50.0, 99.0, -99.0]])).base_dist
    torch.testing.assert_close(normal.loc, torch.tensor([[0.0, 2 + 2 * math.tanh(0.5)], [1.0, 0.0]]))
    torch.testing.assert_close(normal.scale[0].log(), torch.tensor([-1.0, -1.0]))
    assert normal.scale[1, 0] == pytest.approx(0.5)  # most: half of the half width 1
    assert normal.scale[1, 1].log() == pytest.approx(-99 - math.log(math.expm1(1.0)), rel=1e-4)  # far below, exp
    outputs = torch.tensor([[0.0, 0.0, 5.0, 5.0]], requires_grad=True)
    head.distribution(outputs).entropy().sum().backward()
    assert outputs.grad[0, 2:].min() > 0  # close to the bound there is still a gradient


def test_a_policy_with_spread_is_less_sure_in_some_states_and_learns_it():
    env, policy = made(spread=True, log_std=-3.0)
    assert "free" not in dict(policy.named_parameters())
    state = policy.first(6).detach()
    rollout = collect(env, policy.actor(), 9, generator=seeded(), state=state)
    distribution, values = policy.unroll(rollout.moments, state)
    torch.testing.assert_close(distribution.log_prob(rollout.action), rollout.log_prob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, rollout.value, rtol=1e-4, atol=1e-4)
    assert distribution.base_dist.scale.std() > 1e-3
    assert distribution.base_dist.loc.abs().max() < 0.1
    (gradient,) = torch.autograd.grad(distribution.entropy().mean(), policy.act_layer.weight)
    assert gradient[:2].eq(0).all()
    assert gradient[2:].ne(0).any()
    plain = made(log_std=-3.0)[1]  # control
    with torch.no_grad():
        assert plain.unroll(rollout.moments, state)[0].base_dist.scale.std() < 1e-6 + plain.free.exp().std()


def test_what_does_not_fit_is_refused():
    for wrong in (1.0, -0.1):
        with pytest.raises(OptionError, match="correlation must be in"):
            made(correlation=wrong)
    with pytest.raises(OptionError, match="not squashed"):
        made(correlation=0.5, squashed=True)
    with pytest.raises(OptionError, match="of continuous actions"):
        made(bm.rl.Grid(cells=3, horizon=3), correlation=0.5)
    for options in ({"squashed": True}, {"family": bm.rl.Grid(cells=3, horizon=3)}):
        with pytest.raises(OptionError, match="spread=True is for continuous"):
            made(spread=True, log_std=-3.0, **options)
    one = torch.ones(2)
    for low, high in ((-one, one * math.inf), (one, one)):
        with pytest.raises(OptionError, match="box with finite ends"):
            SpreadHead(low, high)
    for wrong in ({"log_std": 1.0}, {"most": 0.0}, {"most": math.inf}):
        with pytest.raises(OptionError, match="must be below most"):
            SpreadHead(-one, one, **wrong)
