"""MAESN against what is known: gradients by hand, meta-gradients in closed form and by differences, the KL, the prior.

The toy: one step, the action is w z + b plus noise, the reward −(action − c)². Hence J(ω) = −((w μ + b − c)² + w² σ² +
s²), with s the actions' standard deviation, and everything else is a derivative of that.
"""

import dataclasses
import math
from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from numerics import slopes
from torch import nn

from bayesmeta import nets
from bayesmeta.errors import OptionError
from bayesmeta.rl.envs import Navigation, TensorVectorEnv
from bayesmeta.rl.envs.family import Family
from bayesmeta.rl.maesn.config import MAESNConfig
from bayesmeta.rl.maesn.inner import episode_credit, expected_return, latent_episodes, latent_step
from bayesmeta.rl.maesn.learner import MAESN
from bayesmeta.rl.maesn.policy import LatentPolicy, latent_distribution
from bayesmeta.rl.policies import GaussianHead
from bayesmeta.rl.policy_gradient.inner import Estimation
from bayesmeta.rl.protocols import Tensors

TARGETS = torch.tensor([-0.5, 0.4, 1.5], dtype=torch.float64)
OMEGA = torch.tensor([[0.3, -0.2], [-0.6, 0.4], [0.2, 0.1]], dtype=torch.float64)
PLAIN = {"gamma": 1.0, "lam": 1.0, "standardise": False}
RUNS = 24


@dataclass(frozen=True)
class Targets(Tensors):
    best: torch.Tensor


@dataclass(frozen=True)
class Still(Tensors):
    position: torch.Tensor


@dataclass(frozen=True)
class Quadratic(Family):
    """One action, and the reward is less the square of its distance from the task's target."""

    horizon: int = 1
    horizon_terminates = True
    name = "quadratic"
    task_type = Targets
    state_type = Still
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-9.0, 9.0, (1,), np.float32)

    def sample_tasks(self, num_tasks, *, generator=None, split="train"):
        return Targets(torch.linspace(-1.0, 1.0, num_tasks))

    def initial(self, tasks, noise):
        return Still(torch.zeros(len(tasks.best), 1, dtype=tasks.best.dtype))

    def observe(self, tasks, state):
        return state.position.clone()

    def advance(self, tasks, state, actions, noise):
        return state, -(actions.squeeze(-1) - tasks.best).square(), None, {}

    def plain(self, **options):
        raise NotImplementedError


def quadratic(copies, seed=0):
    return TensorVectorEnv(Quadratic(), 3, copies=copies, tasks=Targets(TARGETS), generator=seed, dtype=torch.float64)


def linear_policy(log_std=-1.0):
    """Action = w z + b; the state is 0, so that its weight does nothing."""
    network = nn.Linear(2, 1).double()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0, 0.8]]))
        network.bias.fill_(0.25)
    return LatentPolicy(network, GaussianHead(1, log_std=log_std), 1)


def exact_return(theta, omega, targets=TARGETS):
    """J of each task; θ is (weights of state and latent, b, log s)."""
    w, b, log_std = theta[1], theta[2], theta[3]
    loc, log_scale = omega.unbind(-1)
    return -((w * loc + b - targets).square() + w.square() * (2 * log_scale).exp() + (2 * log_std).exp())


def toy(seed, copies, **options):
    options = {"inner_lr": 0.2, "credit": "centred"} | options
    learner = MAESN(quadratic(copies, seed), linear_policy(), MAESNConfig(**options), seed=seed)
    learner.omega = OMEGA.clone()
    return learner


def in_errors(rows, exact):
    """How many standard errors the mean of some runs is away, at most."""
    rows = torch.stack(rows)
    error = rows.std(0) / math.sqrt(len(rows))
    return ((rows.mean(0) - exact).abs() / error.clamp_min(1e-12)).amax().item()


# -- the inner gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["score", "pathwise"])
def test_the_inner_gradient_is_the_one_by_hand(gradient):
    """∂J/∂μ = −2 w (w μ + b − c) and ∂J/∂log σ = −2 w² σ², by both estimators; controls: another task's target, and σ
    in place of log σ."""
    w, b = 0.8, 0.25
    loc, scale = OMEGA[:, 0], OMEGA[:, 1].exp()

    def by_hand(targets, of_scale):
        return torch.stack([-2 * w * (w * loc + b - targets), -2 * w**2 * of_scale], -1)

    rows, policy = [], linear_policy()
    for seed in range(RUNS):
        episodes = latent_episodes(
            quadratic(3000, seed), policy, policy.theta, OMEGA, torch.Generator().manual_seed(seed),
            horizon=1, estimation=Estimation(**PLAIN), credit="centred", inner=True,
        )  # fmt: skip
        rows.append(
            latent_step(
                policy, OMEGA, policy.theta.detach(), episodes, torch.ones(2).double(), Estimation(**PLAIN), gradient,
                create_graph=False,
            ).detach() - OMEGA
        )  # fmt: skip
    assert in_errors(rows, by_hand(TARGETS, scale.square())) < 4.5  # 6 numbers, 24 runs
    assert in_errors(rows, by_hand(TARGETS.roll(1), scale.square())) > 20
    assert in_errors(rows, by_hand(TARGETS, scale)) > 10
    at = OMEGA.clone().requires_grad_()  # the hand was right
    exact = torch.autograd.grad(exact_return(policy.theta.detach(), at).sum(), at)[0]
    torch.testing.assert_close(exact, by_hand(TARGETS, scale.square()))


def some_episodes(policy, credit="centred", copies=6, seed=3):
    return latent_episodes(
        quadratic(copies, seed), policy, policy.theta, OMEGA, torch.Generator().manual_seed(seed),
        horizon=1, estimation=Estimation(**PLAIN), credit=credit, inner=True,
    )  # fmt: skip


def test_a_natural_step_is_the_gradient_over_the_fisher_information():
    """Of Normal(μ, σ): 1 / σ² of μ and 2 of log σ, here from the curvature of its own KL."""
    policy = linear_policy()
    episodes = some_episodes(policy)
    rate = torch.tensor([0.7, 0.3]).double()
    plain, natural = (
        latent_step(
            policy, OMEGA, policy.theta.detach(), episodes, rate, Estimation(), "score", create_graph=False, natural=n
        ).detach()
        - OMEGA
        for n in (False, True)
    )
    for task in range(3):

        def distance(omega, task=task):
            return torch.distributions.kl_divergence(latent_distribution(OMEGA[task]), latent_distribution(omega))

        fisher = torch.autograd.functional.hessian(distance, OMEGA[task])
        assert fisher[0, 1].abs() < 1e-12
        torch.testing.assert_close(natural[task] * fisher.diagonal(), plain[task])
    assert (natural - plain).abs().max() > 1e-3


def test_credits_by_hand():
    returns = torch.tensor([[1.0, 3.0, 8.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    raw, unit = episode_credit(returns, "raw")
    assert torch.equal(raw, returns)
    assert torch.equal(unit, torch.ones(3, 1).double())
    centred, _ = episode_credit(returns, "centred")
    assert centred.tolist() == [[1 - 5.5, 3 - 4.5, 8 - 2.0], [0.0] * 3, [0.0] * 3]
    standard, unit = episode_credit(returns, "standardised")
    spread = math.sqrt((9 + 1 + 16) / 3)
    torch.testing.assert_close(standard[0], (returns[0] - 4) / spread)
    torch.testing.assert_close(unit[:, 0], torch.tensor([spread, 1.0, 1.0]).double())
    assert torch.equal(standard[1:], torch.zeros(2, 3).double())
    shares, unit = episode_credit(returns, "share")
    torch.testing.assert_close(shares, torch.tensor([[0.25, 0.75, 2.0], [0, 0, 0], [1, 1, 1]]).double())
    assert unit[:, 0].tolist() == [4.0, 1.0, 2.0]
    assert episode_credit(torch.tensor([[5.0]]), "centred")[0].item() == 5.0  # there are no others
    with pytest.raises(OptionError, match="never negative"):
        episode_credit(-returns, "share")


def test_returns_that_are_shared_out_give_the_gradient_of_the_log_return():
    """Σ R_k ∇log q(z_k) / Σ R_k, of the very episodes; without dividing (the control) it is another."""
    policy = linear_policy()
    raw = some_episodes(policy, "raw")
    raw = raw._replace(credit=raw.credit.abs())
    shared = raw._replace(credit=episode_credit(raw.credit, "share")[0])
    at = OMEGA.clone().requires_grad_()

    def slope(episodes):
        value = expected_return(policy, at, policy.theta.detach(), episodes, Estimation(), "score")
        return torch.autograd.grad(value.sum(), at)[0]

    weight = raw.credit / raw.credit.sum(1, keepdim=True)
    by_hand = torch.autograd.grad((weight * latent_distribution(at.unsqueeze(1)).log_prob(raw.z)).sum(), at)[0]
    torch.testing.assert_close(slope(shared), by_hand)
    assert (slope(raw) - by_hand).abs().max() > 0.01


# -- the meta-gradient ----------------------------------------------------------------------------------------------


def exact_objective(point, rate, targets=TARGETS):
    """Mean over tasks of J(ω + α ∘ ∇J(ω)), of θ, log α and ω, without an episode."""
    theta, rates, omega = point[:4], point[4:6].exp(), point[6:].view(3, 2)
    slope = torch.autograd.grad(exact_return(theta, omega, targets).sum(), omega, create_graph=True)[0]
    return exact_return(theta, omega + rates * slope, targets).mean()


def sampled_gradient(learner):
    """Of the outer surrogate, from fresh episodes before and after the step."""
    rows, own = torch.arange(3), torch.ones(3, 1).double()
    phi = learner.path(learner.theta, learner.omega, [], create_graph=False)
    before = learner.episodes(learner.env, phi, learner.generator, inner=True)
    phi = learner.path(learner.theta, learner.omega, [before], create_graph=False)
    after = learner.episodes(learner.env, phi, learner.generator, inner=False)
    surrogate, _ = learner.objectives(rows, own, [before], after)
    at = torch.cat([learner.theta, learner.omega.flatten()]).requires_grad_()
    return torch.autograd.grad(surrogate(at), at)[0]


CASES = {
    "dice": ({"estimator": "dice"}, {}, True),
    "dice, pathwise": ({"estimator": "dice"}, {"gradient": "pathwise"}, True),
    # the authors' program: leaves out that latents were drawn
    "policy gradient": ({"estimator": "policy_gradient"}, {}, False),
    "first order": ({"estimator": "dice"}, {"first_order": True}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_sampled_meta_gradient_is_the_exact_one(name):
    """24 runs of 3000 episodes before and after, for θ, step sizes and ω. Controls: first order, and the second
    derivative of the plain surrogate, are off by many standard errors."""
    estimation, options, right = CASES[name]
    rows = []
    for seed in range(RUNS):
        learner = toy(seed, 3000, kl_weight=0.0, estimation=Estimation(**PLAIN, **estimation), **options)
        rows.append(sampled_gradient(learner))
    point = torch.cat([learner.theta, learner.omega.flatten()]).requires_grad_()
    exact = torch.autograd.grad(exact_objective(point, 0.2), point)[0]
    keep = [1, 2, *range(4, 12)]  # the state's weight does nothing; s has no part in the step, and its own test below
    size = in_errors([row[keep] for row in rows], exact[keep])
    # 3000 episodes leave a bias of order 1 / 3000 in J of the step, which is curved: below the noise
    assert size < 5 if right else size > 10, size


def test_likelihood_ratios_are_right_for_omega_and_leave_out_what_theta_does_to_the_step():
    """One decision, the latent: the default's second derivative in ω is without bias. θ changes what the latents bring,
    which only ``"dice"`` counts."""
    rows = []
    for seed in range(RUNS):
        rows.append(sampled_gradient(toy(seed, 3000, kl_weight=0.0, estimation=Estimation(**PLAIN))))
    learner = toy(0, 4)
    point = torch.cat([learner.theta, learner.omega.flatten()]).requires_grad_()
    exact = torch.autograd.grad(exact_objective(point, 0.2), point)[0]
    assert in_errors([row[4:] for row in rows], exact[4:]) < 5
    assert in_errors([row[1:3] for row in rows], exact[1:3]) > 10


# -- against differences ------------------------------------------------------------------------------------------


def small(*, tasks=3, copies=4, horizon=4, seed=0, latent=2, training=5, **options):
    torch.manual_seed(seed)
    family = Navigation(horizon=horizon)
    env = TensorVectorEnv(family, tasks, copies=copies, generator=seed, dtype=torch.float64)
    network = nets.mlp(2 + latent, [6], 2, activation="tanh").double()
    policy = LatentPolicy(network, GaussianHead(2, log_std=-1.0), latent)
    learner = MAESN(env, policy, MAESNConfig(**options), tasks=family.sample_tasks(training, generator=seed), seed=seed)
    learner.omega = 0.3 * torch.randn(training, 2 * latent, generator=torch.Generator().manual_seed(1)).double()
    return learner


def rollouts(learner):
    rows = torch.tensor([3, 0, 4])
    own = torch.tensor([[1.0], [0.0], [1.0]]).double()
    learner.env.reset(options={"tasks": learner.tasks[rows]})
    before = []
    for step in range(learner.config.inner_steps + 1):
        phi = learner.path(learner.theta, own * learner.omega[rows], before, create_graph=False)
        before.append(learner.episodes(learner.env, phi, learner.generator, inner=step < learner.config.inner_steps))
    return rows, own, before[:-1], before[-1]


VARIANTS = {
    "score": {},
    "pathwise": {"gradient": "pathwise"},
    "dice": {"estimation": Estimation(estimator="dice", decay=0.8)},
    "policy adapts": {"policy_lr": 0.05, "inner_steps": 2},
    "natural, at the mean": {"natural": True, "adapted": "mean", "credit": "raw"},
    "fixed rates": {"learn_rates": False, "credit": "centred"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_of_the_surrogate_is_that_of_differences(name):
    """At the old parameters and away from them; a stopped inner gradient (the control) is another."""
    learner = small(**VARIANTS[name])
    rows, own, before, after = rollouts(learner)
    surrogate, divergence = learner.objectives(rows, own, before, after)
    here = torch.cat([learner.theta, learner.omega.flatten()])
    assert divergence(here.clone().requires_grad_()).abs() < 1e-14
    indices = [*range(0, learner.theta.numel(), 17), *range(here.numel() - 20, here.numel(), 3)]
    moved = here + 0.03 * torch.randn(here.shape, generator=torch.Generator().manual_seed(2)).double()
    for point in (here, moved):
        for function in (surrogate, divergence):
            at = point.clone().requires_grad_()
            got = torch.autograd.grad(function(at), at)[0]
            expected = slopes(lambda f=function, p=point: f(p.clone().requires_grad_()), point, indices)
            torch.testing.assert_close(got[indices], expected, rtol=1e-5, atol=1e-7)
    # task 0 begins at the prior, and tasks 1 and 2 do not take part: their ω gets the pull of the KL, or nothing
    value = surrogate(here.requires_grad_())
    whole = torch.autograd.grad(value, here)[0]
    omega = whole[learner.theta.numel() :].view(5, -1)
    assert omega[1:3].abs().max() == 0
    assert omega[[0, 3, 4]].abs().min() > 0
    learner.config = dataclasses.replace(learner.config, first_order=True)
    cut = learner.objectives(rows, own, before, after)[0]
    assert (cut(here) - value).abs() < 1e-12
    off = torch.autograd.grad(cut(here), here)[0] - whole
    assert off.abs().max() > 1e-4


# -- the KL ---------------------------------------------------------------------------------------------------------


def test_the_kl_in_the_objective_is_the_analytic_one():
    """½ Σ (μ² + σ² − 1 − log σ²), times its weight; the other way round (the control) is another."""
    values = {}
    for weight in (0.0, 0.3):
        learner = small(kl_weight=weight)
        surrogate, _ = learner.objectives(*rollouts(learner))
        values[weight] = surrogate(torch.cat([learner.theta, learner.omega.flatten()]).requires_grad_()).item()
    loc, log_scale = learner.omega.chunk(2, -1)
    analytic = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)
    torch.testing.assert_close(learner.prior_kl(learner.omega), analytic)
    assert values[0.0] - values[0.3] == pytest.approx(0.3 * analytic[[3, 0, 4]].mean().item(), rel=1e-9)
    reverse = 0.5 * (((1 + loc.square()) / (2 * log_scale).exp()) - 1 + 2 * log_scale).sum(-1)
    assert (reverse - analytic).abs().max() > 0.1


def test_the_weight_of_the_kl_rises():
    learner = small(kl_weight=0.4, kl_ramp=4)
    found = []
    learner.train(6, on_iteration=lambda run: found.append(run.kl_weight()))
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
