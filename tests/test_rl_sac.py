"""Soft actor-critic: values by quadrature, gradients by finite differences, entropies met, time limits bootstrapped."""

import math
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv

from bayesmeta import errors
from bayesmeta.rl.envs import BernoulliBandit, TensorVectorEnv
from bayesmeta.rl.off_policy.replay import Transitions
from bayesmeta.rl.off_policy.sac import (
    SACConfig,
    SACNetworks,
    SACUpdate,
    actor_loss,
    averaged,
    backup,
    critic_loss,
    soft_value,
    temperature_loss,
)
from bayesmeta.rl.off_policy.sac_learner import SAC, uniform_actor
from tests.faults.driver import difference
from tests.rl_small import Constant, Parabola, Pendulum

BOX = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
PLANE = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)


def networks(observation=PLANE, action=BOX, *, context=0, dtype=torch.float64, **options):
    config = SACConfig(**{"hidden": (16, 16), "temperature": 0.3} | options)
    return SACNetworks(observation, action, config, context=context, seed=1).to(dtype)


def apart(nets):
    """With targets that are other ones than the critics, as in training."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in nets.targets.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return nets


def batch_of(*lead, generator, context=0, terminated=None):
    normal = torch.randn(*lead, 6, generator=generator, dtype=torch.float64)
    false = torch.zeros(lead, dtype=torch.bool)
    return Transitions(
        normal[..., :2], 2 * normal[..., 2:3].tanh(), normal[..., 3],
        false if terminated is None else terminated, false, normal[..., 4:],
    )  # fmt: skip


# -- values ------------------------------------------------------------------------------------------------------------


def quadrature(loc, log_std, value):
    """E[value(a)] and E[log π(a)] of squashed Gaussians ``[n, 1]``, by the trapezoidal rule over u with a = tanh u."""
    scale = log_std.exp()
    t = torch.linspace(-9.0, 9.0, 2001, dtype=loc.dtype)
    u = loc + scale * t  # [n, points]
    density = torch.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    log_prob = -(t**2) / 2 - math.log(math.sqrt(2 * math.pi)) - scale.log() - slope
    return torch.trapezoid(density * value(u.tanh()), t), torch.trapezoid(density * log_prob, t)


def test_the_soft_value_is_that_of_quadrature():
    nets, generator = apart(networks()), torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, generator=generator, dtype=torch.float64)

    def smaller(a):
        pairs = torch.cat([states.unsqueeze(1).expand(-1, a.shape[1], -1), a.unsqueeze(-1)], -1)
        return nets.targets(pairs).amin(0)

    with torch.no_grad():
        value, log_prob = quadrature(*nets.actor(states).chunk(2, -1), smaller)
    draws = soft_value(nets, states.expand(5_000, 3, 2), generator)
    error = draws.std(0) / 5_000**0.5
    assert ((draws.mean(0) - (value - 0.3 * log_prob)).abs() < 4 * error).all()
    assert ((draws.mean(0) - value).abs() > 4 * error).all()  # control: without the entropy


def test_the_actor_climbs_the_smaller_of_the_critics_of_now():
    nets, generator = apart(networks()), torch.Generator()
    inputs = torch.randn(4, 7, 2, generator=generator.manual_seed(3), dtype=torch.float64)
    loss, log_prob = actor_loss(nets, inputs, generator.manual_seed(5))
    action, expected = nets.policy(inputs).rsample_with_log_prob(generator.manual_seed(5))
    pairs = torch.cat([inputs, action], -1)
    one, other = nets.critics(pairs)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(loss, (0.3 * log_prob - torch.minimum(one, other)).mean())
    for wrong in (torch.maximum(one, other), (one + other) / 2, nets.targets(pairs).amin(0)):  # controls
        assert (loss - (0.3 * log_prob - wrong).mean()).abs() > 1e-3


def test_rewards_are_scaled_before_the_critics_see_them():
    generator = torch.Generator()
    batch = batch_of(3, 5, generator=generator.manual_seed(0))
    tripled = Transitions(**{**vars(batch), "reward": 3 * batch.reward})

    def told(steps, scale):
        update = SACUpdate(networks(), SACConfig(hidden=(16, 16), reward_scale=scale))
        return {name: float(value) for name, value in update.update(steps, generator.manual_seed(1)).items()}

    assert told(batch, 3.0) == pytest.approx(told(tripled, 1.0), rel=1e-12)
    assert abs(told(batch, 3.0)["critic"] - told(batch, 1.0)["critic"]) > 0.1  # control


def test_the_policy_of_one_step_comes_near_the_best_soft_value():
    """Of a reward r(a): the best of all policies has α log ∫ exp(r(a) / α) da, squashed Gaussians a little less."""
    env, alpha = TensorVectorEnv(Parabola(), 3, copies=16, generator=0), 0.5
    config = SACConfig(lr=1e-2, temperature=alpha, learn_temperature=False, hidden=(16, 16), polyak=0.3)
    learner = SAC(env, config, updates=1, batch=32, random_steps=20, seed=0)

    def reward(a):  # of the three tasks, whose best actions are −0.5, 0 and 0.5, together
        return -4 * (a.unsqueeze(-1) - env.tasks.best.to(a)).square().mean(-1)

    def soft(loc, log_std):
        value, log_prob = quadrature(loc, log_std, reward)
        return value - alpha * log_prob

    def found():
        with torch.no_grad():
            return float(soft(*learner.policy.actor(torch.zeros(1, 1)).double().chunk(2, -1)))

    ends = torch.linspace(-2, 2, 41).double(), torch.linspace(-4, 1, 41).double()
    loc, log_std = torch.cartesian_prod(*ends).unbind(-1)
    a = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    best = float(alpha * torch.log(torch.trapezoid((reward(a) / alpha).exp(), a)))
    ours = float(soft(loc[:, None], log_std[:, None]).max())
    assert best - 0.1 < ours < best
    learner.train(21)
    assert found() < ours - 0.1  # control: at first it is not there
    learner.train(110)
    assert ours - 0.05 < found() < ours + 1e-3  # the best of the grid is not quite the best


@pytest.mark.parametrize("through", [True, False])
def test_a_time_limit_is_bootstrapped_through(through):
    """The reward is 1 for ever, behind a time limit too: the value is 1 / (1 − γ) = 5."""
    env = TensorVectorEnv(Constant(), 2, copies=2, generator=0)
    config = SACConfig(gamma=0.8, lr=2e-2, temperature=1e-6, learn_temperature=False, hidden=(8,), polyak=0.3)
    learner = SAC(env, config, steps=5, updates=60, batch=16, random_steps=5)
    if not through:  # control: cut as if nothing followed, whose value is 1 / (1 − γ (1 − 1/5))
        add = learner.replay.add

        def cut(rollout, **options):
            steps = Transitions.of_rollout(rollout)
            add(Transitions(**{**vars(steps), "terminated": steps.terminated | steps.truncated}))

        learner.replay.add = cut
    learner.train(3)
    rollout = learner.replay.sample(50, learner.generator)
    assert rollout.truncated.any()
    assert rollout.terminated.any() == (not through)
    inputs = learner.policy.inputs(rollout.observation)
    values = learner.policy.critics(torch.cat([inputs, learner.policy.from_box(rollout.action)], -1))
    assert float(values.detach().mean()) == pytest.approx(5.0 if through else 1 / (1 - 0.64), rel=0.05)


def test_backup():
    reward, value = torch.tensor([1.0, 1.0]), torch.tensor([10.0, float("nan")])
    assert backup(reward, torch.tensor([False, True]), value, 0.5).tolist() == [6.0, 1.0]


def test_critics_stand_side_by_side():
    nets = networks()
    inputs = torch.randn(4, 5, 3, dtype=torch.float64)
    for critic in range(2):
        h = inputs
        for i, (weight, bias) in enumerate(zip(nets.critics.weights, nets.critics.biases)):
            h = (h.relu() if i else h) @ weight[critic] + bias[critic]
        assert torch.allclose(nets.critics(inputs)[critic], h.squeeze(-1))
    assert not torch.allclose(nets.critics(inputs)[0], nets.critics(inputs)[1])
    assert torch.equal(nets.critics(inputs), nets.targets(inputs))
    target = torch.randn(4, 5, dtype=torch.float64)
    expected = sum(0.5 * torch.nn.functional.mse_loss(q, target) for q in nets.critics(inputs))
    assert torch.allclose(critic_loss(nets.critics(inputs), target), expected)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_the_actors_gradient_is_that_of_finite_differences():
    nets, generator = networks(context=1), torch.Generator()
    normal = torch.Generator().manual_seed(3)
    inputs = torch.randn(4, 7, 3, generator=normal, dtype=torch.float64)

    def loss():
        return actor_loss(nets, inputs, generator.manual_seed(5))[0]

    actor = list(nets.actor.parameters())
    gradient = torch.autograd.grad(loss(), actor)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=normal, dtype=p.dtype) for p in actor]
        slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(actor, direction):
                    p.add_(sign * 1e-6 * d)
                ends.append(float(loss()))
                for p, d in zip(actor, direction):
                    p.sub_(sign * 1e-6 * d)
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)
        assert abs(slope) > 1e-3


def test_who_learns_from_which_loss():
    nets, generator = networks(context=2), torch.Generator().manual_seed(0)
    batch = batch_of(3, 5, generator=generator)
    context = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    encoder = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    update = SACUpdate(nets, SACConfig(hidden=(16, 16)), [{"params": [encoder], "lr": 0.1}])
    noise = generator.get_state()
    # by hand: the context's gradient is that of the critics' loss at targets which do not move, and of the extra loss
    fixed = context.detach()
    value = soft_value(nets, nets.inputs(batch.successor, fixed), generator)
    target = backup(batch.reward, batch.terminated, value, 0.99)
    seen = nets.inputs(batch.observation, context * encoder)
    loss = critic_loss(nets.critics(torch.cat([seen, nets.from_box(batch.action)], -1)), target)
    expected = torch.autograd.grad(loss + 3 * encoder.sum(), [encoder])[0]
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    generator.set_state(noise)
    update.update(batch, generator, context=fixed * encoder, extra=3 * encoder.sum())
    assert torch.allclose(encoder.grad, expected)
    assert not torch.allclose(expected, torch.full_like(expected, 3.0))  # control: the critics say something too
    moved = {name for name, value in nets.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before)  # actor, critics, targets, temperature
    # the targets go a share of the way, after the critics' step
    name = "weights.0"
    critic, target = nets.critics.state_dict()[name], nets.targets.state_dict()[name]
    assert torch.allclose(target, before[f"targets.{name}"] + 0.005 * (critic - before[f"targets.{name}"]))
    # the critics' last gradient is of their own loss: the actor's loss gave them none
    assert all(p.grad is not None for p in nets.critics.parameters())
    _, critics = [torch.autograd.grad(actor_loss(nets, seen.detach(), generator)[0], [p])[0] for p in (
        next(nets.actor.parameters()), nets.critics.weights[0])]  # fmt: skip
    assert not torch.allclose(critics, nets.critics.weights[0].grad)


def test_tasks_do_not_mix_in_an_update():
    """A batch of three tasks gives the gradient of the mean of each task's own loss."""
    nets, generator = networks(context=2), torch.Generator().manual_seed(0)
    batch = batch_of(3, 5, generator=generator)
    context = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    target = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def gradient(rows):
        seen = nets.inputs(batch.observation[rows], context[rows])
        values = nets.critics(torch.cat([seen, nets.from_box(batch.action[rows])], -1))
        return torch.autograd.grad(critic_loss(values, target[rows]), nets.critics.weights[0])[0]

    each = sum(gradient(slice(i, i + 1)) for i in range(3)) / 3
    assert torch.allclose(gradient(slice(0, 3)), each)
    every = nets.inputs(batch.observation, context.unsqueeze(1).expand(3, 5, 2))  # one context a step: the same
    assert torch.equal(every, nets.inputs(batch.observation, context))


# -- temperature -------------------------------------------------------------------------------------------------------


def test_the_temperature_rises_below_the_target_entropy_and_falls_above():
    log_alpha = torch.tensor(0.5, requires_grad=True)
    for entropy, sign in ((0.0, -1), (-2.0, -1), (2.0, 1)):
        loss = temperature_loss(log_alpha, torch.full((3,), -entropy), target_entropy=1.0)
        assert math.copysign(1, float(torch.autograd.grad(loss, log_alpha)[0])) == sign


@pytest.mark.parametrize("target", [-1.0, 0.2])
def test_the_entropy_meets_its_target(target):
    env = TensorVectorEnv(Parabola(), 3, copies=16, generator=0)
    config = SACConfig(
        lr=2e-2, temperature_lr=5e-2, temperature=0.5, target_entropy=target, hidden=(16, 16), polyak=0.3
    )
    learner = SAC(env, config, updates=1, batch=32, random_steps=10, seed=0)
    learner.train(150)
    entropies = []
    for _ in range(40):  # it goes around the target as long as batches are noisy
        learner.train(1)
        with torch.no_grad():
            outputs = learner.policy.actor(torch.zeros(1, 1)).double().chunk(2, -1)
            entropies.append(-float(quadrature(*outputs, torch.zeros_like)[1]))
    assert sum(entropies) / 40 == pytest.approx(target, abs=0.2)  # of the policy on [−1, 1]


# -- actions -----------------------------------------------------------------------------------------------------------


def test_actions_go_to_the_box_and_back():
    space = gymnasium.spaces.Box(np.float32([-1, 0]), np.float32([3, 0.5]), dtype=np.float32)
    nets = networks(action=space, dtype=torch.float32)
    inside = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
    outside = nets.to_box(inside)
    assert outside.tolist() == [[-1.0, 0.5], [1.0, 0.25], [3.0, 0.0]]
    assert torch.allclose(nets.from_box(outside), inside)
    assert nets.from_box(torch.tensor([[9.0, -9.0]])).tolist() == [[1.0, -1.0]]  # as the environment clips
    assert nets.target_entropy == -2.0
    generator = torch.Generator().manual_seed(0)
    observation = torch.randn(500, 2)
    drawn, log_prob = nets.act(observation, None, generator)
    assert ((drawn >= torch.tensor([-1.0, 0.0])) & (drawn <= torch.tensor([3.0, 0.5]))).all()
    again = nets.policy(observation).log_prob(nets.from_box(drawn))
    inner = nets.from_box(drawn).abs().amax(-1) < 0.99  # near the ends float32 does not give u back
    assert inner.sum() > 300
    assert torch.allclose(again[inner], log_prob[inner], atol=1e-3)
    state = generator.get_state()
    first = nets.act(observation, None, generator, greedy=True)[0]
    assert torch.equal(first, nets.act(observation, None, generator, greedy=True)[0])
    assert torch.equal(state, generator.get_state())  # nothing was drawn


def test_bad_input_is_refused():
    for options in (
        {"gamma": 1.1}, {"polyak": 0.0}, {"lr": 0.0}, {"temperature": -1.0}, {"temperature_lr": float("inf")},
        {"target_entropy": float("nan")}, {"reward_scale": 0.0}, {"hidden": ()}, {"hidden": (0,)},
        {"max_grad_norm": 0.0},
    ):  # fmt: skip
        with pytest.raises(errors.OptionError):
            SACConfig(**options)
    with pytest.raises(errors.SpaceError, match="needs a Box"):
        networks(action=gymnasium.spaces.Discrete(3))
    with pytest.raises(errors.SpaceError, match="finite bounds"):
        networks(action=gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32))
    with pytest.raises(errors.OptionError, match="context"):
        networks(context=-1)
    with pytest.raises(errors.ShapeError, match=r"read 2 number\(s\) of context; got 0"):
        networks(context=2).inputs(torch.zeros(1, 2))
    with pytest.raises(errors.ShapeError, match=r"read 0 number\(s\) of context; got 3"):
        networks().inputs(torch.zeros(1, 2), torch.zeros(1, 3))
    env = TensorVectorEnv(Parabola(), 2, generator=0)
    for options in ({"steps": 0}, {"batch": 0}, {"updates": 0}, {"capacity": 0}):
        with pytest.raises(errors.OptionError, match="at least 1"):
            SAC(env, **options)
    with pytest.raises(errors.OptionError, match="new_tasks"):
        SAC(TensorVectorEnv(Parabola(), 2, new_tasks=True, generator=0))
    with pytest.raises(errors.SpaceError):
        SAC(TensorVectorEnv(BernoulliBandit(arms=2, horizon=2), 2, generator=0))
    with pytest.raises(errors.NonFiniteLossError, match="critic became nan"):
        averaged([{"critic": torch.tensor(float("nan"))}], 3)


# -- the learner -------------------------------------------------------------------------------------------------------


def small(seed=0, **options):
    env = TensorVectorEnv(Constant(horizon=3), 2, copies=2, episodes_per_trial=2, generator=seed)
    return SAC(env, SACConfig(hidden=(8,)), steps=2, updates=2, batch=4, random_steps=4, seed=seed, **options)


def test_going_on_from_a_state_is_the_same_bit_for_bit():
    whole, first, second = small(), small(), small()
    whole.train(8)
    first.train(3)
    second.load_state_dict(first.state_dict())
    second.train(5)
    assert difference(whole.state_dict(), second.state_dict()) is None
    other = small(seed=1)
    other.train(8)
    assert difference(whole.state_dict(), other.state_dict()) is not None
    third = small()
    third.load_learned(whole.state_dict())
    assert torch.equal(third.curve(third.env).returns, whole.curve(third.env).returns)
    with pytest.raises(errors.CheckpointError, match="other networks"):
        SAC(whole.env, SACConfig(hidden=(9,))).load_learned(whole.state_dict())
    curve = whole.curve(TensorVectorEnv(Constant(horizon=3), 3, episodes_per_trial=2, generator=1))
    assert curve.returns.tolist() == curve.lengths.tolist() == [[3.0] * 3] * 2


def test_random_actions_fill_the_box():
    """Their quantiles are those of the uniform law on [−2, 2]."""
    moment = SimpleNamespace(begins=torch.zeros(40_000, dtype=torch.bool), reward=torch.zeros(40_000))
    acted = uniform_actor(networks(dtype=torch.float32))(moment, None, torch.Generator().manual_seed(0))
    at = torch.linspace(-2, 2, 9)
    share, below = (at + 2) / 4, (acted.action <= at).double().mean(0)
    assert ((below - share).abs() <= 4.5 * (share * (1 - share) / 40_000).sqrt()).all()


def test_nothing_is_learned_from_before_the_random_steps_are_over():
    learner = small()  # 4 random steps, 2 in each iteration
    before = {name: value.clone() for name, value in learner.policy.state_dict().items()}
    assert ["critic" in row for row in learner.train(2)] == [False, False]
    assert difference(before, dict(learner.policy.state_dict())) is None
    assert "critic" in learner.train(1)[0]


def test_pendulums_as_tensors_are_gymnasiums():
    env = TensorVectorEnv(Pendulum(), 1, generator=0, dtype=torch.float64)
    env.reset()
    plain = PendulumEnv()
    plain.reset(seed=0)
    plain.state = np.array([float(env.state.angle), float(env.state.velocity)])
    numbers = np.random.default_rng(0)
    for _ in range(60):
        action = numbers.uniform(-3, 3, 1)
        observation, reward, *_ = env.step(torch.tensor(action)[None])
        expected, cost, *_ = plain.step(action)
        assert np.allclose(observation[0].numpy(), expected, atol=1e-6)
        assert float(reward) == pytest.approx(float(cost))


@pytest.mark.slow
def test_pendulum_is_swung_up():
    env = TensorVectorEnv(Pendulum(), 1, copies=4, generator=0)
    config = SACConfig(lr=1e-3, hidden=(64, 64))
    learner = SAC(env, config, steps=1, updates=2, batch=256, random_steps=100, seed=0)
    before = learner.curve(TensorVectorEnv(Pendulum(), 20, generator=1)).mean()[0]
    learner.train(2500)
    after = learner.curve(TensorVectorEnv(Pendulum(), 20, generator=1)).mean()[0]
    assert before < -700
    assert after >= -200
