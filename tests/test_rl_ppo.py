"""PPO and RL² when a rollout cuts a trial, what each part of the loss does, and settings that would learn nothing."""

import pytest
import torch

from bayesmeta.errors import NonFiniteLossError, OptionError
from bayesmeta.rl.envs import Grid, Navigation, TensorVectorEnv
from bayesmeta.rl.memory.policy import MemoryPolicy
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.policy_gradient import objectives
from bayesmeta.rl.policy_gradient.ppo import PPO, PPOConfig
from bayesmeta.rl.policy_gradient.trpo_policy import TRPO, TRPOConfig
from bayesmeta.rl.rollout import collect

HALF = 5


class Recorder:
    """In the place of the updates: learns nothing, and draws nothing from the generator."""

    def __init__(self):
        self.seen = []

    def update(self, rollout, advantage, **options):
        self.seen.append((rollout, advantage))
        return {}


def learner_of(steps, kind, config):
    env = TensorVectorEnv(Grid(horizon=HALF), 6, episodes_per_trial=2, new_tasks=True, generator=3)
    learner = RL2(env, config=config, iterations=4, steps=steps, units=6, memory_kind=kind, seed=2)
    generator = torch.Generator().manual_seed(7)
    for p in learner.policy.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return learner


@pytest.mark.parametrize("kind", ["gru", "lstm", "snail"])
def test_two_halves_of_a_trial_are_the_whole(kind):
    """Densities and values are the same, and advantages but for what λ carries over the cut, (γλ)^k A behind it.

    With nothing expected behind the cut, or a memory that is forgotten there (the controls), they are others.
    """
    config = PPOConfig(gamma=0.9, lam=0.8)
    whole, halves = (learner_of(steps, kind, config) for steps in (2 * HALF, HALF))
    for learner, iterations in ((whole, 1), (halves, 2)):
        learner.updates = Recorder()
        learner.train(iterations)
    ((rollout, advantage),), ((first, early), (second, late)) = whole.updates.seen, halves.updates.seen
    assert torch.equal(torch.cat([first.action, second.action]), rollout.action)
    torch.testing.assert_close(torch.cat([first.value, second.value]), rollout.value)
    carried = 0.72 ** torch.arange(HALF, 0, -1.0).unsqueeze(-1) * late[0]
    torch.testing.assert_close(torch.cat([early + carried, late]), advantage, rtol=1e-4, atol=1e-5)
    cut = 0.72 ** torch.arange(HALF - 1, -1, -1.0).unsqueeze(-1) * 0.9 * second.value[0]
    assert (cut.abs().amax(1) > 0.01).all()  # what is missing with a last value of 0
    policy = halves.policy
    together, values = policy.unroll(rollout.moments, rollout.first_state)
    parts = [policy.unroll(part.moments, part.first_state) for part in (first, second)]
    torch.testing.assert_close(torch.cat([v for _, v in parts]), values, rtol=1e-4, atol=1e-5)
    found = torch.cat([d.log_prob(part.action) for (d, _), part in zip(parts, (first, second))])
    torch.testing.assert_close(found, together.log_prob(rollout.action), rtol=1e-4, atol=1e-5)
    forgotten, _ = policy.unroll(second.moments, None)
    assert not torch.allclose(forgotten.log_prob(second.action), second.log_prob, rtol=1e-3)


def test_updates_go_on_with_the_memory_of_the_rollout():
    """Before its one step, PPO computes the densities and values of acting again, also from the middle of a trial."""
    config = PPOConfig(epochs=1, minibatches=1, lr=1e-30, last_lr=1e-30, gamma=0.9)
    learner = learner_of(HALF, "gru", config)
    update, seen = learner.updates.update, []
    learner.updates.update = lambda r, a, **k: (seen.append((r, a)), update(r, a, **k))[1]
    for told in learner.train(2):
        rollout, advantage = seen.pop(0)
        assert told["kl"] < 1e-9
        by_hand = (advantage / learner.policy.annuity(rollout.moments)).square().mean().item()
        assert told["value_loss"] == pytest.approx(by_hand, rel=1e-4)
        unscaled = advantage.square().mean().item()  # the control: without the annuity
        assert told["value_loss"] < 0.5 * unscaled


def biased(seed=0):
    """A policy of the grid that prefers an action, and a rollout of it."""
    env = TensorVectorEnv(Grid(horizon=HALF), 40, new_tasks=True, generator=seed)
    policy = MemoryPolicy(env, units=6, seed=seed)
    policy.act_layer.bias.data[0] = 1.5
    generator = torch.Generator().manual_seed(seed)
    return policy, collect(env, policy.actor(), HALF, generator=generator, state=policy.first(40))


@pytest.mark.parametrize("bonus", [0.1, 0.0])
def test_the_bonus_raises_the_entropy(bonus):
    """With no advantage anywhere and no weight of the values; without the bonus (the control) nothing moves."""
    policy, rollout = biased()
    updates = PPO(policy, PPOConfig(entropy=bonus, last_entropy=bonus, value_weight=0.0, epochs=4))

    def entropy():
        return policy.unroll(rollout.moments, rollout.first_state)[0].entropy().mean().item()

    before = entropy()
    updates.update(rollout, torch.zeros_like(rollout.reward), share=0.0, generator=torch.Generator().manual_seed(0))
    after = entropy()
    assert after > before + 0.01 if bonus else after == pytest.approx(before, abs=1e-6)


def test_values_are_fitted_per_step_that_is_left():
    """One step of descent on the loss of the values: the weights move against its slope, computed here by hand."""
    policy, rollout = biased()
    config = PPOConfig(entropy=0.0, value_weight=1.0, epochs=1, minibatches=1, standardise="none", max_grad_norm=1e9)
    updates = PPO(policy, config)
    updates.optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    advantage = torch.randn(rollout.reward.shape, generator=torch.Generator().manual_seed(1))
    values = policy.unroll(rollout.moments, rollout.first_state)[1]
    left = (HALF - torch.arange(HALF, dtype=torch.float32)).unsqueeze(-1)
    loss = ((values - (rollout.value + advantage)) / left).square().mean()
    slope = torch.autograd.grad(loss, policy.value_layer.weight)[0]
    before = policy.value_layer.weight.detach().clone()
    updates.update(rollout, advantage, share=0.0, generator=torch.Generator())
    moved = policy.value_layer.weight.detach() - before
    torch.testing.assert_close(moved, -config.lr * slope, rtol=1e-3, atol=1e-6)


# -- settings and rewards that would learn nothing ----------------------------------------------------------------


def test_one_environment_is_not_compared_with_others():
    """In each step by itself its advantages would all be 0; over all steps (what the message says) it learns."""
    env = TensorVectorEnv(Grid(horizon=HALF), 1, new_tasks=True, generator=0)
    with pytest.raises(OptionError, match="standardise='all'"):
        RL2(env, units=4)
    learner = RL2(env, units=4, iterations=2, config=PPOConfig(standardise="all"))
    before = learner.policy.act_layer.weight.detach().clone()
    learner.train(1)
    assert not torch.equal(learner.policy.act_layer.weight, before)
    policy, _ = biased()
    one = collect(env, policy.actor(), HALF, generator=torch.Generator(), state=policy.first(1))
    with pytest.raises(OptionError, match="there is one"):
        PPO(policy, PPOConfig()).update(one, one.reward, share=0.0, generator=torch.Generator())
    RL2(TensorVectorEnv(Grid(horizon=HALF), 2, new_tasks=True), units=4).train(1)


def test_a_spread_that_overflows_is_not_taken_for_equal_numbers():
    x = torch.tensor([[1e30, -2e30], [3e30, 1e30]])
    assert objectives.standardised(x).isnan().all()
    assert objectives.standardised(x.double()).isfinite().all()  # the control
    assert objectives.deviation(x.double()).item() == pytest.approx(x.double().std(correction=0).item())
    assert objectives.deviation(torch.full((3, 2), 1e4)).item() == 0


@pytest.mark.parametrize("config", [PPOConfig(value_weight=0.0), TRPOConfig()])
def test_rewards_of_1e30_stop_the_run(config):
    family = Navigation(horizon=4)
    env = TensorVectorEnv(family, 8, new_tasks=True, generator=0)
    policy = MemoryPolicy(env, units=4)
    rollout = collect(env, policy.actor(), 4, generator=torch.Generator(), state=policy.first(8))
    updates = (PPO if isinstance(config, PPOConfig) else TRPO)(policy, config)
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.raises(NonFiniteLossError, match="cale the rewards"):
        updates.update(rollout, 1e30 * rollout.reward, share=0.0, generator=torch.Generator(), step=1)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), before))
    updates.update(rollout, 1e10 * rollout.reward, share=0.0, generator=torch.Generator(), step=1)  # the control
