"""MAML-RL: meta-gradients against enumeration and differences, the bound kept, tasks apart, learning, resume."""

import math

import pytest
import rl_truth as truth
import torch
from numerics import slopes
from rl_envs import TwoStates
from torch import nn

from bayesmeta import nets
from bayesmeta.errors import CheckpointError, HorizonError, OptionError, ShapeError
from bayesmeta.rl.envs import BernoulliBandit, Navigation, TensorVectorEnv
from bayesmeta.rl.policies import CategoricalHead, ContextPolicy, GaussianHead, TaskPolicy, kl
from bayesmeta.rl.policy_gradient.inner import (
    Estimation,
    TaskSteps,
    inner_step,
    phi_actor,
    sampling_score,
    task_steps,
    to_the_last,
)
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from bayesmeta.rl.policy_gradient.returns import LinearBaseline
from bayesmeta.rl.rollout import collect

PLAIN = {"gamma": 1.0, "lam": 1.0, "standardise": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def table_policy():
    """A softmax policy on the two states; φ is ``rl_truth``'s, its four logits, in the order of a Linear's weight."""
    policy = TaskPolicy(nn.Linear(2, 2, bias=False).double(), CategoricalHead(2))
    policy.start.data = truth.PHI.view(2, 2).T.flatten()
    return policy


def as_truth(flat):
    """A Linear's weight ``[action, state]`` as logits ``[state, action]``."""
    return flat.unflatten(-1, (2, 2)).mT.flatten(-2)


# -- against enumeration ------------------------------------------------------------------------------------------


def all_trajectories_as_tasks():
    """Each of the 32 trajectories is the one episode of a task of its own."""
    log_prob = truth.log_prob(truth.PHI)
    to_go = truth.ALL.rewards.flip(0).cumsum(0).flip(0)

    def shaped(x):
        return x.unsqueeze(-1)

    return TaskSteps(
        features=nn.functional.one_hot(shaped(truth.ALL.states), 2).double(),
        action=shaped(truth.ALL.actions),
        log_prob=shaped(log_prob),
        advantage=shaped(to_go),
        ended=shaped(truth.ALL.ended),
        mask=torch.ones(3, 32, 1, dtype=torch.bool),
        returns=shaped(truth.ALL.rewards.sum(0)),
    )


def test_an_inner_step_by_hand():
    policy, steps = table_policy(), all_trajectories_as_tasks()
    phi = inner_step(policy, policy.begin(policy.theta, 32), policy.theta, steps, 0.6, Estimation(), create_graph=False)
    for task in (0, 5, 30):

        def objective(at, task=task):
            return (truth.log_prob(at)[:, task] * steps.advantage[:, task, 0]).mean()

        expected = truth.PHI + 0.6 * truth.gradient(objective, truth.PHI)
        torch.testing.assert_close(as_truth(phi[task]).detach(), expected)


@pytest.mark.parametrize("credit", [True, False])
def test_credit_for_exploration_makes_the_meta_gradient_that_of_the_expectation(credit):
    """E-MAML's objective is E_τ[J(θ + α g(τ, θ))], τ one sampled episode, here enumerated with the densities of τ
    differentiated too. With the credit our gradient is it; without (the control: MAML's), it is not."""
    policy, steps = table_policy(), all_trajectories_as_tasks()
    rate = 1.5

    def adapted(theta):
        phi = policy.begin(theta, 32)
        return inner_step(policy, phi, theta, steps, rate, Estimation(estimator="policy_gradient"), create_graph=True)

    def outcome(theta):
        return torch.stack([truth.expected_return(as_truth(phi)) for phi in adapted(theta)])

    theta = policy.theta.detach().clone().requires_grad_()
    exact = torch.autograd.grad((truth.probability(as_truth(theta)) * outcome(theta)).sum(), theta)[0]
    weight = truth.probability(truth.PHI)
    results = outcome(theta)
    total = results
    if credit:
        log_prob = policy.distribution(policy.begin(theta, 32), steps.features).log_prob(steps.action)
        total = total + sampling_score(log_prob, steps.log_prob, steps.mask, results)
    got = torch.autograd.grad((weight * total).sum(), theta)[0]
    if credit:
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)
    else:
        assert (got - exact).norm() > 0.05 * exact.norm()


def test_the_sampled_meta_gradient_with_dice_is_that_of_all_trajectories():
    """24 runs of 3000 episodes inside and out, against the derivative of J(θ + α ∇J(θ)) by enumeration. Finn's
    surrogate (the control) is off by many standard errors."""
    rate, found = 3.0, {"dice": [], "policy_gradient": []}

    def objective(phi):
        slope = torch.autograd.grad(truth.expected_return(phi) / 3, phi, create_graph=True)[0]
        return truth.expected_return(phi + rate * slope) / 3

    exact = truth.gradient(objective, truth.PHI)
    for seed in range(24):
        for estimator, rows in found.items():
            config = MAMLRLConfig(inner_lr=rate, estimation=Estimation(estimator=estimator, **PLAIN))
            learner = MAMLRL(
                TwoStates(1, 3000, seed=seed), table_policy(), config, sample_tasks=lambda n, g: None, seed=seed
            )
            learner.env.reset()
            phi = learner.path(learner.theta, [], 1, create_graph=False)[-1]
            before = learner.episodes(learner.env, phi, learner.generator)
            phi = learner.path(learner.theta, [before], 1, create_graph=False)[-1]
            after = learner.episodes(learner.env, phi, learner.generator)
            surrogate, _ = learner.objectives([before], after)
            rows.append(as_truth(truth.gradient(surrogate, learner.theta)))
    sizes = {}
    for estimator, rows in found.items():
        rows = torch.stack(rows)
        sizes[estimator] = ((rows.mean(0) - exact).abs() / (rows.std(0) / math.sqrt(24))).max().item()
    assert sizes["dice"] < 5  # J is curved, so 3000 episodes inside leave a bias, of order 1 / 3000: below the noise
    assert sizes["policy_gradient"] > 10


# -- against differences ------------------------------------------------------------------------------------------


def small(policy="whole", *, tasks=3, copies=4, horizon=5, inner_steps=2, seed=0, **options):
    torch.manual_seed(seed)
    env = TensorVectorEnv(Navigation(horizon=horizon), tasks, copies=copies, generator=seed, dtype=torch.float64)
    if policy == "whole":
        policy = TaskPolicy(nets.mlp(2, [6], 2, activation="tanh").double(), GaussianHead(2, log_std=-1.0))
    else:
        policy = ContextPolicy(nets.mlp(4, [6], 2, activation="tanh").double(), GaussianHead(2, log_std=-1.0), 2)
    return MAMLRL(env, policy, MAMLRLConfig(inner_steps=inner_steps, **options), seed=seed)


def rollouts(learner):
    env, before = learner.env, []
    env.reset(options={"tasks": env.family.sample_tasks(env.num_tasks, generator=7)})
    for _ in range(learner.config.inner_steps + 1):
        phi = learner.path(learner.theta, before, env.num_tasks, create_graph=False)[-1]
        before.append(learner.episodes(env, phi, learner.generator))
    return before[:-1], before[-1]


CASES = {
    "likelihood ratio": {},
    "dice": {"estimation": Estimation(estimator="dice", decay=0.8)},
    "policy gradient": {"estimation": Estimation(estimator="policy_gradient")},
    "learned rates": {"learn_rates": True},
    "context": {"policy": "context"},
    "exploration credit": {"exploration_credit": 1.0, "estimation": Estimation(estimator="policy_gradient")},
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_the_surrogate_is_that_of_differences(name):
    """At the old θ and away from it, with both inner steps; the first-order gradient (the control) is another."""
    learner = small(**CASES[name])
    before, after = rollouts(learner)
    surrogate, divergence = learner.objectives(before, after)
    indices = range(0, learner.theta.numel(), 5)
    for theta in (learner.theta.clone(), learner.theta + 0.05 * torch.randn(learner.theta.shape, generator=seeded())):
        for function in (surrogate, divergence):
            got = torch.autograd.grad(function(at := theta.clone().requires_grad_()), at)[0]
            expected = slopes(lambda f=function, t=theta: f(t.clone().requires_grad_()), theta, indices)
            # two inner steps have third derivatives of 1e4 and more, times the square of the step of 1e-6
            torch.testing.assert_close(got[list(indices)], expected, rtol=1e-5, atol=1e-7)
    if name in ("likelihood ratio", "context"):
        first = small(first_order=True, **CASES[name])
        cut = first.objectives(before, after)[0]
        assert (cut(theta.requires_grad_()) - surrogate(theta)).abs() < 1e-12  # the same value
        off = torch.autograd.grad(cut(theta), theta)[0] - got_surrogate(surrogate, theta)
        assert off.abs().max() > 1e-4


def got_surrogate(surrogate, theta):
    return torch.autograd.grad(surrogate(theta), theta)[0]


def test_the_divergence_is_0_at_the_old_policy_and_both_products_agree():
    from bayesmeta.rl.policy_gradient.trpo import finite_difference_product, hessian_product

    learner = small()
    _, divergence = learner.objectives(*rollouts(learner))
    assert divergence(learner.theta.clone().requires_grad_()).abs().item() < 1e-14
    v = torch.randn(learner.theta.shape, generator=seeded(), dtype=torch.float64)
    a, b = (p(divergence, learner.theta)(v) for p in (hessian_product, finite_difference_product))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert a.norm() > 1e-3
    # the cheaper one is the same function, with a curvature of its own: Jᵀ F J with the Jacobian J of φ taken as 1
    moved = (learner.theta + 0.01 * v).requires_grad_()
    torch.testing.assert_close(divergence(moved, second_order=False), divergence(moved))
    cheap = hessian_product(lambda theta: divergence(theta, second_order=False), learner.theta)(v)
    assert (cheap - a).norm() > 0.01 * a.norm()


# -- what a run does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_outer_steps_keep_their_bound(exact):
    """The divergence of the adapted policies, computed here from their means and scales, is at most the bound."""
    learner = small(tasks=4, copies=5, inner_steps=1, max_kl=0.02, exact_curvature=exact)
    for _ in range(3):
        theta = learner.theta.clone()
        kept = {}
        objectives = learner.objectives

        def keep(before, after, kept=kept, objectives=objectives):
            kept["data"] = (before, after)
            return objectives(before, after)

        learner.objectives = keep
        (told,) = learner.train(1)
        learner.objectives = objectives
        before, after = kept["data"]
        pair = []
        for at in (theta, learner.theta):
            phi = learner.path(at, before, 4, create_graph=False)[-1]
            pair.append(learner.policy.distribution(phi, after.features))
        found = kl(*pair).mean().item()
        assert told["accepted"] == 1
        assert 0 < found <= 0.02
        assert found == pytest.approx(told["kl"], rel=1e-6)
        assert torch.equal(learner.policy.theta, learner.theta)


def test_the_bound_is_that_of_all_states_whatever_the_curvature_is_taken_from():
    """A tenth of the states gives the direction: those of the first step alone, where all stand in the same place."""
    learner = small(tasks=4, copies=5, horizon=10, inner_steps=1, max_kl=0.02, curvature_share=0.1)
    objectives, kept = learner.objectives, []
    learner.objectives = lambda *data: (kept.append(data), objectives(*data))[1]
    for _ in range(4):
        theta = learner.theta.clone()
        (told,) = learner.train(1)
        before, after = kept[-1]
        old, new = (
            learner.policy.distribution(learner.path(at, before, 4, create_graph=False)[-1], after.features)
            for at in (theta, learner.theta)
        )
        found = kl(old, new)
        assert told["accepted"] == 1
        assert 0 < found.mean().item() <= 0.02
        assert found.mean().item() == pytest.approx(told["kl"], rel=1e-6)
        # the control: the states of the direction alone have another
        assert found[::10].mean().item() != pytest.approx(told["kl"], rel=1e-2)


def test_the_direction_is_from_a_share_of_the_states():
    """So that it stays cheap: its curvature is that of the states kept, and of no other."""
    from bayesmeta.rl.policy_gradient.trpo import hessian_product

    learner, all_states = small(inner_steps=1, curvature_share=0.5), small(inner_steps=1)
    before, after = rollouts(learner)
    v = torch.randn(learner.theta.shape, generator=seeded(), dtype=torch.float64)
    _, divergence = learner.objectives(before, after)
    curvature = learner._curvature(before, after, divergence)
    shorter = after._replace(**{n: x[::2] for n, x in after._asdict().items() if n not in ("returns", "scale")})
    _, of_these = all_states.objectives(before, shorter)
    got, expected, other = (hessian_product(f, learner.theta)(v) for f in (curvature, of_these, divergence))
    torch.testing.assert_close(got, expected)
    assert (got - other).norm() > 0.01 * other.norm()


def test_environments_whose_tasks_change_are_refused():
    """What adapted on one task would be played on another; with tasks that stay it is not (the control)."""
    learner = small()
    family = Navigation(horizon=5)
    for ask in (learner.evaluate, learner.curve):
        with pytest.raises(OptionError, match="adapt on one task and be played on another"):
            ask(TensorVectorEnv(family, 3, copies=2, new_tasks=True, generator=2, dtype=torch.float64))
        ask(TensorVectorEnv(family, 3, copies=2, generator=2, dtype=torch.float64))


def test_tasks_adapt_each_by_itself():
    learner = small(tasks=4)
    before, _ = rollouts(learner)
    phi = learner.path(learner.theta, before, 4, create_graph=False)[-1]
    spoiled = [s._replace(advantage=s.advantage.clone(), features=s.features.clone()) for s in before]
    for steps in spoiled:
        steps.advantage[:, 2] *= -3
        steps.features[:, 2] += 1
    other = learner.path(learner.theta, spoiled, 4, create_graph=False)[-1]
    keep = [0, 1, 3]
    torch.testing.assert_close(phi[keep], other[keep], rtol=1e-12, atol=1e-14)
    assert (phi[2] - other[2]).abs().max() > 1e-3
    assert not torch.allclose(phi[0], phi[1])


def test_steps_after_an_episodes_end_do_not_count():
    env = TwoStates(2, 5)
    policy = table_policy()
    rollout = collect(env, phi_actor(policy, policy.begin(policy.theta, 2), policy.theta, env), 7, generator=seeded())
    steps = task_steps(rollout, env, Estimation(**PLAIN), LinearBaseline())
    assert steps.mask[:, 0, 0].tolist() == [True] * 3 + [False] * 4
    torch.testing.assert_close(steps.returns, rollout.by_task(rollout.reward)[:3].sum(0))
    short = collect(
        TwoStates(2, 5), phi_actor(policy, policy.begin(policy.theta, 2), policy.theta, env), 3, generator=seeded()
    )
    alone = task_steps(short, env, Estimation(**PLAIN), LinearBaseline())
    torch.testing.assert_close(alone.advantage, steps.advantage[:3])


def test_time_behind_the_longest_episode_is_left_out_and_nothing_else():
    """The inner step from what is kept is that from all; without one more moment (the control) it is not."""
    env, policy = TwoStates(2, 5), table_policy()
    phi = policy.begin(policy.theta, 2)
    rollout = collect(env, phi_actor(policy, phi, policy.theta, env), 7, generator=seeded())
    steps = task_steps(rollout, env, Estimation(**PLAIN), LinearBaseline())
    kept = to_the_last(steps)
    assert (len(kept.mask), len(kept.features), kept.returns.shape) == (3, 3, (2, 5))
    assert to_the_last(kept) is kept
    shorter = kept._replace(**{n: v[:2] for n, v in kept._asdict().items() if n not in ("returns", "scale")})
    whole, less, wrong = (
        inner_step(policy, phi, policy.theta, s, 0.5, Estimation(**PLAIN), create_graph=False)
        for s in (steps, kept, shorter)
    )
    torch.testing.assert_close(less, whole)
    assert not torch.allclose(wrong, whole, rtol=1e-2)


def test_joint_iterations_come_first_and_take_no_inner_step():
    """They are those of joint training bit for bit; the ones behind them adapt."""
    joint, both = small(inner_steps=0), small(joint_iterations=2)
    joint.train(2)
    both.train(2)
    assert joint.history == both.history
    assert torch.equal(joint.theta, both.theta)
    assert all(row["before"] == row["after"] for row in both.history)
    (row,) = both.train(1)
    assert row["before"] != row["after"]
    control = small()
    control.train(2)
    assert not torch.equal(control.theta, joint.theta)


def test_it_learns_to_adapt():
    """Goals are not seen, so that without adaptation nothing beats standing still: −10 E|goal|² = −5/3. After one step
    the policies do, each at its own goal; at another task's goal (the control) they do not."""
    torch.manual_seed(0)
    env = TensorVectorEnv(Navigation(horizon=10, max_step=0.2), 20, copies=10, generator=1)
    policy = TaskPolicy(nets.mlp(2, [32], 2, activation="tanh"), GaussianHead(2, log_std=math.log(0.2)))
    config = MAMLRLConfig(max_kl=0.05, cg_steps=5, curvature_share=0.5, learn_rates=True)
    learner = MAMLRL(env, policy, config)
    learner.train(25)
    test = TensorVectorEnv(Navigation(horizon=10, max_step=0.2), 100, copies=10, generator=2, split="validation")
    before, after = learner.evaluate(test)
    still = -5 / 3
    assert before.mean() < still
    assert after.mean() > still + 2 * after.std() / math.sqrt(100)
    steps = learner.episodes(test, policy.begin(learner.theta[: policy.size], 100), seeded())
    phi = learner.path(learner.theta, [steps], 100, create_graph=False)[-1]
    own, others = (learner.episodes(test, p, seeded(1)).returns.mean() for p in (phi, phi.roll(1, 0)))
    assert own > still
    assert others < before.mean()


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = small(learn_rates=True)
    whole.train(4)
    half = small(learn_rates=True)
    half.train(2)
    torch.save(half.state_dict(), tmp_path / "half.pt")
    half.train(1)
    resumed = small(learn_rates=True, seed=5)
    resumed.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    resumed.train(2)
    assert resumed.history == whole.history
    assert torch.equal(resumed.theta, whole.theta)
    assert torch.equal(resumed.policy.theta, whole.policy.theta)


def test_evaluation_changes_nothing():
    learner = small()
    state, theta = learner.generator.get_state(), learner.theta.clone()
    env = TensorVectorEnv(Navigation(horizon=5), 6, copies=3, generator=2, dtype=torch.float64)
    a = learner.evaluate(env, inner_steps=3)
    assert a.shape == (4, 6)
    assert torch.equal(learner.generator.get_state(), state)
    assert torch.equal(learner.theta, theta)


def test_discrete_actions_and_observations():
    env = TensorVectorEnv(BernoulliBandit(arms=3, horizon=4), 5, copies=6)
    learner = MAMLRL(env, TaskPolicy(nn.Linear(1, 3), CategoricalHead(3)), MAMLRLConfig(inner_lr=1.0))
    history = learner.train(2)
    assert all(math.isfinite(value) for row in history for value in row.values())


# -- bad input ----------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    policy = TaskPolicy(nets.mlp(2, [4], 2), GaussianHead(2))
    env = TensorVectorEnv(Navigation(horizon=3), 2, copies=2)
    with pytest.raises(OptionError, match="new_tasks=False"):
        MAMLRL(TensorVectorEnv(Navigation(), 2, new_tasks=True), policy)
    env.horizon = None
    with pytest.raises(HorizonError, match="no known horizon"):
        MAMLRL(env, policy)
    env.horizon = 3
    learner = MAMLRL(env, policy)
    with pytest.raises(OptionError, match="a rate for each of 2 steps"):
        learner.evaluate(env, inner_steps=2, rates=[0.1])
    with pytest.raises(ShapeError, match="phi is for 3 tasks"):
        phi_actor(policy, policy.begin(policy.theta, 3), policy.theta, env)
    with pytest.raises(CheckpointError, match="meta-parameters"):
        learner.load_state_dict({"theta": torch.zeros(3)})
    with pytest.raises(OptionError, match="at least one number"):
        ContextPolicy(nets.mlp(2, [4], 2), GaussianHead(2), 0)
    context = ContextPolicy(nets.mlp(4, [4], 2), GaussianHead(2), 2)
    with pytest.raises(ShapeError, match="context"):
        context.distribution(torch.zeros(3, 2), torch.zeros(2, 1, 2))
    for options in (
        {"inner_steps": -1},
        {"inner_lr": 0.0},
        {"curvature_share": 0.0},
        {"joint_iterations": -1},
        {"exploration_credit": -1.0},
    ):
        with pytest.raises(OptionError):
            MAMLRLConfig(**options)
    for options in ({"gamma": 2.0}, {"lam": -0.1}, {"decay": 1.5}, {"estimator": "reparam"}):
        with pytest.raises(OptionError):
            Estimation(**options)
