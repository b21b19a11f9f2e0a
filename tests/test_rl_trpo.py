"""Trust-region steps: products against a dense Hessian, the natural gradient against a dense solve, the bound kept."""

import math

import pytest
import torch

from bayesmeta.errors import OptionError
from bayesmeta.ops.linear_solve import conjugate_gradient
from bayesmeta.rl.policy_gradient import trpo

DOUBLE = {"dtype": torch.float64}


def policy_problem(states=60, seed=0, scale=1.0):
    """A softmax policy on random features, random advantages: surrogate and mean KL as functions of flat weights."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(states, 5, generator=generator, **DOUBLE)
    theta = torch.randn(15, generator=generator, **DOUBLE)
    advantages = scale * torch.randn(states, 3, generator=generator, **DOUBLE)

    def log_policy(at):
        return (features @ at.view(5, 3)).log_softmax(-1)

    old = log_policy(theta)
    return (
        theta,
        lambda at: ((log_policy(at)).exp() * advantages).sum(-1).mean(),
        lambda at: (old.exp() * (old - log_policy(at))).sum(-1).mean(),
    )


def test_both_products_agree_with_the_dense_hessian():
    theta, surrogate, divergence = policy_problem()
    generator = torch.Generator().manual_seed(5)
    for function in (surrogate, divergence):
        dense = torch.autograd.functional.hessian(function, theta)
        for _ in range(3):
            v = torch.randn(15, generator=generator, **DOUBLE)
            torch.testing.assert_close(trpo.hessian_product(function, theta)(v), dense @ v, rtol=1e-10, atol=1e-12)
            differences = trpo.finite_difference_product(function, theta)(v)
            # ε² ≈ 4e-11 and rounding / ε ≈ 4e-11, times derivatives of order 1 and ‖v‖ ≈ 4
            torch.testing.assert_close(differences, dense @ v, rtol=1e-7, atol=1e-8)
            wrong = trpo.finite_difference_product(function, theta, step=3.0)(v)
            assert (wrong - dense @ v).abs().max() > 1e-3  # control: a step far too long


def test_products_in_single_precision():
    theta, _, divergence = policy_problem()
    dense = torch.autograd.functional.hessian(divergence, theta)

    def single(at):
        return divergence(at.double()).float()

    v = torch.ones(15)
    torch.testing.assert_close(
        trpo.finite_difference_product(single, theta.float())(v).double(), dense @ v.double(), rtol=2e-3, atol=2e-4
    )


def test_a_linear_function_has_no_curvature():
    v = torch.arange(3.0)
    assert trpo.hessian_product(lambda at: at.sum(), torch.zeros(3))(v).tolist() == [0, 0, 0]
    assert trpo.finite_difference_product(lambda at: at.square().sum(), torch.zeros(3))(0 * v).tolist() == [0, 0, 0]


def test_conjugate_gradients_against_a_dense_solve():
    theta, surrogate, divergence = policy_problem()
    dense = torch.autograd.functional.hessian(divergence, theta)
    damped = dense + 0.1 * torch.eye(15, **DOUBLE)
    slope = trpo.gradient(surrogate, theta)
    exact = torch.linalg.solve(damped, slope)
    product = trpo.hessian_product(divergence, theta)
    torch.testing.assert_close(conjugate_gradient(lambda v: product(v) + 0.1 * v, slope, 30), exact, rtol=1e-8, atol=0)
    short = conjugate_gradient(lambda v: product(v) + 0.1 * v, slope, 2)
    assert (short - exact).norm() > 0.01 * exact.norm()  # control: too few steps


@pytest.mark.parametrize("product", ["double_backward", "finite_differences"])
def test_a_small_step_is_the_natural_gradient(product):
    """For a tiny bound the model is exact: the step is √(2δ / gᵀF⁻¹g) F⁻¹ g, and it ends on the boundary."""
    theta, surrogate, divergence = policy_problem()
    bound = 1e-6
    step = trpo.trust_region_step(
        theta, surrogate, divergence, max_kl=bound * (1 + 1e-2), cg_steps=40, damping=1e-2, product=product
    )
    fisher = torch.autograd.functional.hessian(divergence, theta)
    slope = trpo.gradient(surrogate, theta)
    unit = slope / slope.norm()
    damped = fisher + 1e-2 * (unit @ fisher @ unit) * torch.eye(15, **DOUBLE)
    direction = torch.linalg.solve(damped, unit)
    expected = direction * math.sqrt(2 * bound * (1 + 1e-2) / (direction @ damped @ direction).item())
    assert step.accepted
    torch.testing.assert_close(step.theta - theta, expected, rtol=1e-4, atol=1e-9)
    plain = slope * (expected.norm() / slope.norm())  # control: the plain gradient points elsewhere
    assert (plain - expected).norm() > 0.1 * expected.norm()


def test_no_step_breaks_its_bound_or_lowers_the_surrogate():
    """Over many problems and bounds. The model's step itself (the control: no line search) breaks the bound in some."""
    broken = 0
    for seed in range(40):
        theta, surrogate, divergence = policy_problem(seed=seed)
        bound = 10.0 ** (seed % 4 - 3)
        step = trpo.trust_region_step(theta, surrogate, divergence, max_kl=bound, damping=1e-4)
        assert step.accepted
        assert 0 < step.divergence <= bound
        assert divergence(step.theta).item() == step.divergence
        assert surrogate(step.theta) > surrogate(theta)
        assert step.divergence > 0.1 * bound  # and it does move
        full = theta + (step.theta - theta) / 0.8**step.backtracks
        broken += bool(divergence(full) > bound)
    assert broken > 5


def test_a_surrogate_without_slope_leaves_the_policy_where_it_is():
    theta, surrogate, divergence = policy_problem()
    for function, reason in (
        (lambda at: 0 * at.sum(), "gradient is 0"),
        (lambda at: surrogate(at) * math.nan, "not finite"),
        (lambda at: surrogate(at) + math.inf, "not finite"),
    ):
        step = trpo.trust_region_step(theta, function, divergence)
        assert not step.accepted
        assert reason in step.reason
        assert torch.equal(step.theta, theta)
    step = trpo.trust_region_step(theta, surrogate, lambda at: 0 * at.sum())
    assert not step.accepted
    assert "curvature 0" in step.reason


def test_a_tiny_surrogate_gives_the_same_step_as_a_large_one():
    """The step does not hang on the scale of the rewards: in float32, 1e-25 would underflow if it were squared."""
    theta, surrogate, divergence = policy_problem()
    steps = {}
    for scale in (1.0, 1e-15):
        steps[scale] = trpo.trust_region_step(
            theta.float(),
            lambda at, scale=scale: (surrogate(at.double()) * scale).float(),
            lambda at: divergence(at.double()).float(),
        )
        assert steps[scale].accepted
    torch.testing.assert_close(steps[1.0].theta, steps[1e-15].theta, rtol=1e-2, atol=1e-3)


def test_a_surrogate_that_turns_nan_is_backed_away_from():
    theta, surrogate, divergence = policy_problem()
    free = trpo.trust_region_step(theta, surrogate, divergence, max_kl=0.1)
    radius = (free.theta - theta).norm() * 0.5

    def walled(at):
        return torch.where((at - theta).norm() > radius, math.nan, surrogate(at))

    step = trpo.trust_region_step(theta, walled, divergence, max_kl=0.1)
    assert step.accepted
    assert step.backtracks > free.backtracks
    assert (step.theta - theta).norm() <= radius


def test_options_are_checked():
    theta, surrogate, divergence = policy_problem()
    bad = {"max_kl": 0.0, "damping": -1.0, "cg_steps": 0, "shrink": 1.0, "max_backtracks": -1, "product": "exact"}
    for name, value in bad.items():
        with pytest.raises(OptionError):
            trpo.trust_region_step(theta, surrogate, divergence, **{name: value})
    with pytest.raises(OptionError, match="step must be positive"):
        trpo.finite_difference_product(divergence, theta, step=-1.0)
