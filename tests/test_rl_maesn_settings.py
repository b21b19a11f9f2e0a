"""MAESN's settings: where curvature is taken from and the bound is not, what is discounted, who begins where."""

import dataclasses

import gymnasium
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from test_rl_maesn_truth import rollouts, small
from torch import nn

import bayesmeta as bm
from bayesmeta.rl.envs import TensorVectorEnv
from bayesmeta.rl.maesn.config import MAESNConfig
from bayesmeta.rl.maesn.learner import MAESN, _first
from bayesmeta.rl.maesn.policy import LatentPolicy, latents
from bayesmeta.rl.policies import GaussianHead, kl
from bayesmeta.rl.policy_gradient.inner import Estimation
from bayesmeta.rl.policy_gradient.trpo import hessian_product
from tests.rl_small import Constant


@pytest.mark.parametrize("options", [{"curvature_share": 0.25}, {"curvature_share": 0.25, "curvature_episodes": 2}])
def test_the_bound_is_that_of_all_states_whatever_the_curvature_is_taken_from(options):
    """A quarter of the states gives the direction: those of the first step alone, where all stand in the same place."""
    learner = small(copies=5, max_kl=0.02, **options)
    objectives, kept = learner.objectives, []
    learner.objectives = lambda *data: (kept.append(data), objectives(*data))[1]
    for _ in range(4):
        theta, omega = learner.theta.clone(), learner.omega.clone()
        kept.clear()
        (told,) = learner.train(1)
        rows, own, before, after = kept[0]
        old, new = (
            learner.policy.distribution(
                learner.parts(at)[0],
                after.steps.features,
                latents(learner.path(at, own * start[rows], before, create_graph=False), after.noise),
            )
            for at, start in ((theta, omega), (learner.theta, learner.omega))
        )
        found = kl(old, new)
        assert told["accepted"] == 1
        assert 0 < found.mean().item() <= 0.02
        assert found.mean().item() == pytest.approx(told["kl"], rel=1e-6)
        # the control: the states of the direction alone have another
        assert found[::4].mean().item() != pytest.approx(told["kl"], rel=1e-3)


@pytest.mark.parametrize("episodes", [None, 2])
def test_the_direction_is_from_a_share_of_the_states_and_episodes(episodes):
    """So that it stays cheap: its curvature is that of what is kept, and of nothing else."""
    learner = small(curvature_share=0.5, curvature_episodes=episodes)
    rows, own, before, after = rollouts(learner)
    point = torch.cat([learner.theta, learner.omega.flatten()])
    v = torch.randn(point.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, divergence = learner.objectives(rows, own, before, after)
    curvature = learner._curvature(rows, own, before, after, divergence)
    some = after if episodes is None else _first(after, episodes)
    steps = some.steps._asdict()
    timeless = ("returns", "scale")
    some = some._replace(
        steps=some.steps._replace(**{n: x if n in timeless else x[::2] for n, x in steps.items()})
    )  # fmt: skip
    learner.config = dataclasses.replace(learner.config, curvature_share=1.0, curvature_episodes=None)
    _, of_these = learner.objectives(rows, own, before, some)
    got, expected, other = (hessian_product(f, point)(v) for f in (curvature, of_these, divergence))
    torch.testing.assert_close(got, expected)
    assert (got - other).norm() > 0.01 * other.norm()
    # with all states and episodes it is the divergence itself
    assert learner._curvature(rows, own, before, after, divergence) is None


def test_credit_is_the_discounted_return_and_what_is_told_is_not():
    """Of a reward of 1 in each of three steps: 1 + γ + γ², and 3."""
    env = TensorVectorEnv(Constant(horizon=3), 2, copies=2, generator=0)
    policy = LatentPolicy(nn.Linear(1 + 1, 1), GaussianHead(1), 1)
    config = MAESNConfig(credit="raw", estimation=Estimation(gamma=0.5))
    learner = MAESN(env, policy, config, tasks=env.tasks)
    episodes = learner.episodes(env, learner.omega, learner.generator, inner=True)
    assert torch.equal(episodes.credit, torch.full((2, 2), 1.75))
    assert torch.equal(episodes.learned, torch.full((2, 2), 3.0))
    assert torch.equal(episodes.steps.returns, torch.full((2, 2), 3.0))


def test_advantages_are_in_the_units_of_the_credit():
    """So that one rate serves ω and θ: of the same episodes, both are over the spread of the task's returns."""
    plain = Estimation(standardise=False)
    raw, scaled = (
        learner.episodes(learner.env, learner.omega[:3], learner.generator, inner=True)
        for learner in (small(credit=credit, estimation=plain) for credit in ("raw", "standardised"))
    )
    unit = raw.credit.std(1, correction=0, keepdim=True)
    assert torch.equal(raw.z, scaled.z)
    torch.testing.assert_close(scaled.steps.advantage, raw.steps.advantage / unit)
    torch.testing.assert_close(scaled.credit, (raw.credit - raw.credit.mean(1, keepdim=True)) / unit)
    assert (unit - 1).abs().min() > 0.1  # control: it divides


def test_tasks_begin_at_the_prior_after_the_first_iterations():
    def own_of(iterations, **options):
        """Which of an iteration's tasks begin at their own ω, ``[iterations, tasks]``."""
        learner, found = small(**options), []
        objectives = learner.objectives
        learner.objectives = lambda rows, own, *data: (found.append(own), objectives(rows, own, *data))[1]
        learner.train(iterations)
        return torch.stack(found).squeeze(-1)

    assert own_of(4, prior_share=1.0, prior_after=2).tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    some = own_of(4, tasks=20, training=20, copies=2, prior_share=0.25)
    assert abs(some.mean().item() - 0.75) < 4 * (0.1875 / 80) ** 0.5


def test_ordinary_environments_are_trained_on_and_gone_on_with():
    """Their tasks are a list: of them those of an iteration are told to the environments, and a state has them all."""

    def pendulum(gravity):
        return gymnasium.wrappers.TimeLimit(PendulumEnv(g=gravity), 4)

    family = bm.rl.GymFamily.uniform(pendulum, 5.0, 15.0)

    def learner(seed):
        env = family.vector(2, copies=2, generator=0)
        policy = bm.rl.LatentPolicy(bm.nets.mlp(3 + 2, [4], 1), bm.rl.GaussianHead(1), latent=2)
        for index, parameter in enumerate(policy.parameters()):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        return bm.rl.MAESN(env, policy, tasks=[5.0, 7.0, 9.0, 11.0][:: 1 if seed == 0 else -1], seed=seed)

    whole, parts, other = learner(0), learner(0), learner(1)
    whole.train(2)
    assert set(whole.env.tasks) <= {5.0, 7.0, 9.0, 11.0}
    parts.train(1)
    other.load_state_dict(parts.state_dict())  # its tasks were in another order
    other.train(1)
    assert other.tasks == whole.tasks == [5.0, 7.0, 9.0, 11.0]
    assert other.env.tasks == whole.env.tasks
    assert torch.equal(other.theta, whole.theta)
    assert torch.equal(other.omega, whole.omega)
