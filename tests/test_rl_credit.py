"""MAML-RL: E-MAML's credit in the whole surrogate against enumeration, what acting and estimation hold of each task."""

import dataclasses
import itertools

import pytest
import torch
from rl_envs import TwoStates
from torch import nn

from bayesmeta import nets
from bayesmeta.errors import NonFiniteDataError, OptionError
from bayesmeta.rl.envs import Navigation, TensorVectorEnv
from bayesmeta.rl.policies import CategoricalHead, GaussianHead, TaskPolicy
from bayesmeta.rl.policy_gradient.inner import Estimation, TaskSteps, task_steps
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from bayesmeta.rl.policy_gradient.returns import LinearBaseline
from bayesmeta.rl.rollout import begin, collect
from bayesmeta.rl.setups import Setup

RAW = {"gamma": 1.0, "standardise": False, "estimator": "policy_gradient"}
#: what two pulls bring, for two tasks: reward of [task, first arm, second arm] in steps 1 and 2
REWARD = torch.tensor([[[[1.0, 0.2], [1.0, 2.0]], [[-0.5, 1.0], [-0.5, 0.0]]],
                       [[[0.0, 3.0], [0.0, -1.0]], [[2.0, 0.5], [2.0, 1.0]]]], dtype=torch.float64)  # fmt: skip
PULLS = list(itertools.product((0, 1), repeat=2))
RATE = 0.8


def two_pulls(**options):
    """A learner of two tasks with two steps each, of which the first state alone is ever seen."""
    policy = TaskPolicy(nn.Linear(2, 2, bias=False).double(), CategoricalHead(2))
    policy.start.data = torch.tensor([0.4, 0.0, -0.3, 0.0], dtype=torch.float64)
    config = MAMLRLConfig(inner_lr=RATE, estimation=Estimation(**{**RAW, **options}), exploration_credit=1.0)
    env = TwoStates(2, 2 if options else 1)
    return MAMLRL(env, policy, config, sample_tasks=lambda n, g: None)


def log_probs(theta):
    """Of the four pairs of pulls, ``[…, 4]``; θ is a Linear's weight ``[arm, state]``."""
    log_pi = theta.unflatten(-1, (2, 2))[..., 0].log_softmax(-1)
    return torch.stack([log_pi[..., a] + log_pi[..., b] for a, b in PULLS], -1)


def rewards_of(task, pulls):
    return REWARD[task, pulls[0], pulls[1]]


def steps_of(pairs, advantage, log_prob, returns, scale=None):
    """One pair of pulls for each ``[tasks][copies]``."""
    action = torch.tensor(pairs).permute(2, 0, 1)
    shape = action.shape
    seen = nn.functional.one_hot(torch.zeros(shape, dtype=torch.long), 2).double()
    ended = torch.zeros(shape, dtype=torch.bool)
    ended[-1] = True
    return TaskSteps(seen, action, log_prob, advantage, ended, torch.ones_like(ended), returns, scale)


def each_step(learner, phi, pairs):
    """log π of every step of ``[tasks][copies]`` pairs under each task's φ, without gradients."""
    action = torch.tensor(pairs).permute(2, 0, 1)
    seen = nn.functional.one_hot(torch.zeros(action.shape, dtype=torch.long), 2).double()
    return learner.policy.distribution(phi, seen, learner.theta).log_prob(action).detach()


def pair_case(learner, first, second, scale):
    """What two tasks of one episode each adapted on; and all that can happen afterwards, weighted by its chance."""
    theta, chosen = learner.theta, [[first], [second]]
    start = learner.policy.begin(theta, 2)
    to_go = torch.stack([rewards_of(i, p).flip(0).cumsum(0).flip(0) for i, p in enumerate((first, second))], 1)
    before = steps_of(chosen, to_go.unsqueeze(-1), each_step(learner, start, chosen), to_go[0].unsqueeze(-1))
    phi = learner.path(theta, [before], 2, create_graph=False)[-1].detach()
    weight = 4 * log_probs(phi).exp()  # so that the mean over the four copies is the expectation
    total = torch.stack([torch.stack([rewards_of(i, p).sum() for p in PULLS]) for i in (0, 1)])
    advantage = (weight * total / scale.unsqueeze(-1)).expand(2, 2, 4)
    all_pulls = [PULLS, PULLS]
    after = steps_of(all_pulls, advantage, each_step(learner, phi, all_pulls), weight * total, scale)
    return before, after


def expected_outcome(theta, scale):
    """Σ_i E_τ[E[return after adapting on τ]] / scale_i / 2, with τ drawn from π_θ, in closed form."""
    total = 0.0
    for task in (0, 1):
        returns = torch.stack([rewards_of(task, p).sum() for p in PULLS])
        chance = log_probs(theta).exp()
        for k, pulls in enumerate(PULLS):
            to_go = rewards_of(task, pulls).flip(0).cumsum(0).flip(0)
            log_pi = theta.unflatten(-1, (2, 2))[..., 0].log_softmax(-1)
            objective = (torch.stack([log_pi[a] for a in pulls]) * to_go).mean()
            phi = theta + RATE * torch.autograd.grad(objective, theta, create_graph=True)[0]
            total = total + chance[k] * (log_probs(phi).exp() * returns).sum() / scale[task] / 2
    return total


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 3.0)])
def test_the_surrogate_with_credit_has_the_gradient_of_what_adaptation_brings(scale):
    """Two independent tasks, all 16 pairs of episodes that they may adapt on, each with its chance. The surrogate is
    per step (2 of them) and in each task's scale. Controls: no credit, its sign flipped, no length of an episode."""
    learner = two_pulls()
    scale = torch.tensor(scale, dtype=torch.float64)
    theta = learner.theta.clone().requires_grad_()
    exact = torch.autograd.grad(expected_outcome(theta, scale), theta)[0] / 2
    with_credit, plain = torch.zeros_like(exact), torch.zeros_like(exact)
    chance = log_probs(learner.theta).exp()
    for (i, first), (k, second) in itertools.product(enumerate(PULLS), repeat=2):
        data = pair_case(learner, first, second, scale)
        for weight, sums in ((1.0, with_credit), (0.0, plain)):
            object.__setattr__(learner.config, "exploration_credit", weight)
            surrogate, _ = learner.objectives([data[0]], data[1])
            sums += chance[i] * chance[k] * torch.autograd.grad(surrogate(theta), theta)[0]
    torch.testing.assert_close(with_credit, exact, rtol=1e-9, atol=1e-12)
    credit = with_credit - plain
    for wrong in (plain, plain - credit, plain + 2 * credit):
        assert (wrong - exact).norm() > 0.05 * exact.norm()


def test_what_credit_cannot_be_given_for_is_refused():
    policy = TaskPolicy(nets.mlp(2, [4], 2), GaussianHead(2))
    family = Navigation(horizon=3)

    def learner(tasks, copies, standardise=True):
        estimation = Estimation(standardise=standardise, estimator="policy_gradient")
        config = MAMLRLConfig(exploration_credit=1.0, estimation=estimation)
        return MAMLRL(TensorVectorEnv(family, tasks, copies=copies), policy, config)

    with pytest.raises(OptionError, match="has one task"):
        learner(1, 4)
    with pytest.raises(OptionError, match="copies=1"):
        learner(3, 1)
    for estimator in ("likelihood_ratio", "dice"):
        with pytest.raises(OptionError, match="take Estimation"):
            MAMLRLConfig(exploration_credit=1.0, estimation=Estimation(estimator=estimator))
    for fits in (learner(3, 1, standardise=False), learner(2, 3)):
        (row,) = fits.train(1)
        assert row["accepted"] == 1


@pytest.mark.parametrize("env", ["navigation", "bandit"])
def test_the_named_method_counts_once_that_actions_were_drawn(env):
    """Whatever else an environment's settings say of estimation stays; the same without credit is the control."""
    setups = {
        m: Setup(env, m, tasks=2, copies=2, units=4, iterations=1, horizon=3).filled() for m in ("maml", "e-maml")
    }
    plain, found = (s.learner(s.family()).config for s in setups.values())
    assert (found.estimation.estimator, found.exploration_credit) == ("policy_gradient", 1.0)
    assert (plain.estimation.estimator, plain.exploration_credit) == ("likelihood_ratio", 0.0)
    assert dataclasses.replace(found.estimation, estimator="likelihood_ratio") == plain.estimation


# -- each task by itself ------------------------------------------------------------------------------------------


def navigation(tasks=3, copies=3, **options):
    torch.manual_seed(0)
    env = TensorVectorEnv(Navigation(horizon=5), tasks, copies=copies, generator=0, dtype=torch.float64)
    policy = TaskPolicy(nets.mlp(2, [6], 2, activation="tanh").double(), GaussianHead(2, log_std=-1.0))
    return MAMLRL(env, policy, MAMLRLConfig(**options))


def test_densities_of_acting_are_those_computed_again():
    """With as many tasks as copies, each task's φ its own: another task's φ gives others (the control)."""
    learner = navigation()
    start = learner.policy.begin(learner.theta, 3)
    phi = start + 0.3 * torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learner.env.reset()
    steps = learner.episodes(learner.env, phi, learner.generator)

    def again(phi):
        return learner.policy.distribution(phi, steps.features, learner.theta).log_prob(steps.action).detach()

    torch.testing.assert_close(again(phi), steps.log_prob, rtol=1e-9, atol=1e-11)
    assert (again(phi.roll(1, 0)) - steps.log_prob).abs().amax((0, 2)).min() > 0.01


def test_advantages_are_standardised_in_each_task():
    """One task's rewards are a thousand times the others': each has deviation 1, and its own scale is told."""
    learner = navigation()
    env = learner.env
    from bayesmeta.rl.policy_gradient.inner import phi_actor

    actor = phi_actor(learner.policy, learner.policy.begin(learner.theta, 3), learner.theta, env)
    rollout = collect(env, actor, 5, generator=learner.generator, start=begin(env))
    rollout.by_task(rollout.reward)[:, 1] *= 1000
    estimation = Estimation()
    steps = task_steps(rollout, env, estimation, LinearBaseline())
    raw = task_steps(rollout, env, Estimation(standardise=False), LinearBaseline())
    assert raw.scale is None
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(steps.advantage.square().mean((0, 2)), one, rtol=1e-6, atol=0)
    torch.testing.assert_close(steps.advantage.mean((0, 2)), 0 * one, rtol=0, atol=1e-9)
    torch.testing.assert_close(steps.scale, raw.advantage.transpose(0, 1).flatten(1).std(1, correction=0))
    assert steps.scale[1] > 100 * steps.scale[[0, 2]].max()


def test_rewards_too_large_for_their_spread_are_refused():
    """Squares of 1e30 overflow in float32: the advantages must not all become 0."""
    env = TensorVectorEnv(Navigation(horizon=4), 2, copies=3, generator=0)
    policy = TaskPolicy(nets.mlp(2, [4], 2), GaussianHead(2))
    learner = MAMLRL(env, policy)
    step = env.step

    def huge(actions):
        observation, reward, *rest = step(actions)
        return observation, 1e30 * reward, *rest

    env.step = huge
    with pytest.raises(NonFiniteDataError, match="too large for the spread"):
        learner.train(1)


def test_rates_in_place_of_those_trained_with():
    learner = navigation(inner_steps=2, inner_lr=0.1)

    def evaluated(rates):
        env = TensorVectorEnv(Navigation(horizon=5), 4, copies=3, generator=2, dtype=torch.float64)
        return learner.evaluate(env, rates=rates)

    default = evaluated(None)
    assert torch.equal(evaluated([0.1, 0.1]), default)
    each = evaluated([torch.full((learner.policy.size,), 0.1, dtype=torch.float64), 0.1])
    torch.testing.assert_close(each, default)
    second = evaluated([0.1, 0.4])
    assert torch.equal(second[:2], default[:2])  # the first step and what was before it
    assert not torch.allclose(second[2], default[2], rtol=1e-3)
    assert not torch.allclose(evaluated([0.4, 0.1])[1], default[1], rtol=1e-3)
