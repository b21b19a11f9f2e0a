"""MAML-RL's curvature from a few episodes of each task: what it is, that it says nothing but a direction, bad input."""

import math

import pytest
import torch

from bayesmeta import nets
from bayesmeta.errors import OptionError
from bayesmeta.rl.envs import Navigation, TensorVectorEnv
from bayesmeta.rl.policies import GaussianHead, TaskPolicy, kl
from bayesmeta.rl.policy_gradient.inner import first_copies
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from bayesmeta.rl.policy_gradient.trpo import hessian_product


def learner_of(**options):
    torch.manual_seed(0)
    env = TensorVectorEnv(Navigation(horizon=6), 3, copies=8, generator=0, dtype=torch.float64)
    policy = TaskPolicy(nets.mlp(2, [6], 2, activation="tanh").double(), GaussianHead(2, log_std=-1.5))
    return MAMLRL(env, policy, MAMLRLConfig(inner_steps=1, max_kl=0.02, **options))


def rollouts(learner):
    env = learner.env
    env.reset(options={"tasks": env.family.sample_tasks(3, generator=7)})
    phi = learner.path(learner.theta, [], 3, create_graph=False)[-1]
    before = learner.episodes(env, phi, learner.generator)
    phi = learner.path(learner.theta, [before], 3, create_graph=False)[-1]
    return before, learner.episodes(env, phi, learner.generator)


@pytest.mark.parametrize("exact", [True, False])
def test_it_is_the_curvature_of_those_episodes(exact):
    """Jᵀ F J by hand: J the Jacobian of the step on the first episodes (the control: on all), F of their states."""
    learner = learner_of(curvature_episodes=2, exact_curvature=exact)
    before, after = rollouts(learner)
    _, divergence = learner.objectives([before], after)
    theta = learner.theta.clone()
    v = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = hessian_product(learner._curvature([before], after, divergence), theta)(v)

    def by_hand(episodes):
        steps, states = first_copies(before, episodes), first_copies(after, 2).features

        def adapted(at):
            return learner.path(at, [steps], 3, create_graph=True)[-1]

        phi = adapted(theta).detach()
        old = learner.policy.distribution(phi, states)
        inner = torch.autograd.functional.jacobian(adapted, theta)  # [tasks, D, D]
        inner = inner if exact else torch.eye(len(theta), dtype=theta.dtype).expand_as(inner)
        fisher = torch.autograd.functional.hessian(
            lambda p: kl(old, learner.policy.distribution(p.view_as(phi), states)).mean(), phi.flatten()
        )
        whole = inner.flatten(0, 1)
        return whole.mT @ fisher @ whole @ v

    torch.testing.assert_close(got, by_hand(2), rtol=1e-7, atol=1e-10)
    if exact:
        assert (by_hand(8) - got).norm() > 0.01 * got.norm()


def test_the_bound_is_that_of_all_episodes():
    learner = learner_of(curvature_episodes=1)
    kept = {}
    objectives = learner.objectives

    def keep(before, after):
        kept.setdefault("data", (before, after))  # the first call: all episodes
        return objectives(before, after)

    for _ in range(4):
        kept.clear()
        theta, learner.objectives = learner.theta.clone(), keep
        (told,) = learner.train(1)
        before, after = kept["data"]
        assert after.returns.shape == (3, 8)
        pair = [
            learner.policy.distribution(learner.path(at, before, 3, create_graph=False)[-1], after.features)
            for at in (theta, learner.theta)
        ]
        assert told["accepted"] == 1
        assert 0 < kl(*pair).mean().item() <= 0.02
        assert kl(*pair).mean().item() == pytest.approx(told["kl"], rel=1e-6)


def test_all_episodes_are_the_default():
    whole, more = learner_of(), learner_of(curvature_episodes=8)
    whole.train(2)
    more.train(2)
    assert torch.equal(whole.theta, more.theta)
    few = learner_of(curvature_episodes=1)
    few.train(2)
    assert not torch.allclose(few.theta, whole.theta, rtol=1e-3)
    assert all(math.isfinite(value) for row in few.history for value in row.values())


def test_fewer_than_one_episode_is_refused():
    with pytest.raises(OptionError, match="curvature_episodes"):
        MAMLRLConfig(curvature_episodes=0)
