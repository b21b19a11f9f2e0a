"""Policy objectives against enumeration: a bandit's arms, and all trajectories of a small MDP."""

import math

import pytest
import rl_truth as truth
import torch
from torch.autograd.functional import hessian

from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.rl.policy_gradient import objectives
from bayesmeta.rl.policy_gradient.objectives import (
    average,
    dice,
    likelihood_ratio,
    loaded_dice,
    policy_gradient,
    ppo_clip,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}
PHI, ALL = truth.PHI, truth.ALL


def weighted(terms):
    """An estimator's mean over all trajectories, each as often as the policy at PHI takes it."""
    return (truth.probability(PHI) * terms.sum(0)).sum()


def to_go(gamma=1.0):
    """Returns from each step on, discounted from the begin of the episode."""
    discount = gamma ** torch.arange(truth.HORIZON, dtype=torch.float64).unsqueeze(-1)
    return (discount * ALL.rewards).flip(0).cumsum(0).flip(0)


BASELINE = torch.tensor([0.7, -1.3], dtype=torch.float64)  # any function of the state


ESTIMATORS = {
    "dice": lambda phi: weighted(dice(truth.log_prob(phi), ALL.rewards, ALL.ended)),
    "dice with a baseline": lambda phi: weighted(
        dice(truth.log_prob(phi), ALL.rewards, ALL.ended, baseline=BASELINE[ALL.states])
    ),
    "loaded dice": lambda phi: weighted(loaded_dice(truth.log_prob(phi), to_go(), ALL.ended)),
    "loaded dice with a baseline": lambda phi: weighted(
        loaded_dice(truth.log_prob(phi), to_go() - BASELINE[ALL.states], ALL.ended)
    ),
    "naive": lambda phi: weighted(policy_gradient(truth.log_prob(phi), to_go())),
    "likelihood ratio": lambda phi: weighted(
        likelihood_ratio(truth.log_prob(phi), truth.log_prob(phi), to_go() - BASELINE[ALL.states])
    ),
}
SECOND_ORDER = [name for name in ESTIMATORS if "dice" in name]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_first_derivatives_are_exact_in_the_mean(name):
    torch.testing.assert_close(
        truth.gradient(ESTIMATORS[name], PHI), truth.gradient(truth.expected_return, PHI), **EXACT
    )


def test_second_derivatives_of_dice_are_exact_in_the_mean_and_the_others_are_not():
    exact = hessian(truth.expected_return, PHI)
    for name in SECOND_ORDER:
        torch.testing.assert_close(hessian(ESTIMATORS[name], PHI), exact, **EXACT)
    for name in ("naive", "likelihood ratio"):
        assert (hessian(ESTIMATORS[name], PHI) - exact).abs().max() > 0.05, name


def test_third_derivatives_of_dice_are_exact_in_the_mean():
    direction = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)

    def third(function):
        def along(phi):
            slope = torch.autograd.grad(function(phi), phi, create_graph=True)[0] @ direction
            return torch.autograd.grad(slope, phi, create_graph=True)[0] @ direction

        return truth.gradient(along, PHI)

    exact = third(truth.expected_return)
    assert exact.abs().max() > 0.05
    for name in SECOND_ORDER:
        torch.testing.assert_close(third(ESTIMATORS[name]), exact, **EXACT)


def meta_gradient(inner, rate=0.7):
    """∇_φ J(φ + rate ∇ inner(φ)): MAML's, with the inner gradient estimated by ``inner``."""

    def after(phi):
        return truth.expected_return(phi + rate * torch.autograd.grad(inner(phi), phi, create_graph=True)[0])

    return truth.gradient(after, PHI)


def test_the_meta_gradient_of_a_policy_gradient_step():
    """MAML-RL's objective J(φ + α ∇J(φ)) by enumeration of all trajectories: DiCE's meta-gradient is it, while
    differentiating the policy gradient's usual surrogate (the control) is wrong, and so is first order."""
    exact = meta_gradient(truth.expected_return)
    for name in SECOND_ORDER:
        torch.testing.assert_close(meta_gradient(ESTIMATORS[name]), exact, **EXACT)
    wrong = meta_gradient(ESTIMATORS["naive"])
    assert (wrong - exact).norm() > 0.05 * exact.norm()
    moved = PHI + 0.7 * truth.gradient(truth.expected_return, PHI)
    first_order = truth.gradient(truth.expected_return, moved)
    assert (first_order - exact).norm() > 0.05 * exact.norm()


def test_dice_discounts_from_the_begin_of_each_episode():
    """Two episodes one after the other in one column count as two columns do."""
    phi = PHI.clone().requires_grad_()
    log_prob = truth.log_prob(phi)
    both = torch.cat([log_prob, log_prob.flip(1)])
    rewards = torch.cat([ALL.rewards, ALL.rewards.flip(1)])
    ended = torch.cat([ALL.ended, ALL.ended])
    joint = dice(both, rewards, ended, gamma=0.8)
    alone = dice(log_prob, ALL.rewards, ALL.ended, gamma=0.8)
    torch.testing.assert_close(joint[:3], alone)
    torch.testing.assert_close(joint[3:], alone.flip(1))
    a, b = (torch.autograd.grad(x[3:, 4].sum(), phi, retain_graph=True)[0] for x in (joint, torch.cat([alone] * 2)))
    assert not torch.allclose(a, b)  # another column
    c = torch.autograd.grad(alone.flip(1)[:, 4].sum(), phi, retain_graph=True)[0]
    torch.testing.assert_close(a, c, **EXACT)
    # control: without the end, rewards of the second episode hang on actions of the first
    merged = dice(both, rewards, torch.zeros_like(ended), gamma=0.8)
    assert not torch.allclose(torch.autograd.grad(merged[3:, 4].sum(), phi)[0], c)
    value = (truth.probability(PHI) * alone.sum(0)).sum()
    torch.testing.assert_close(value, truth.expected_return(PHI, 0.8))


def test_loaded_dice_keeps_the_episodes_of_one_column_apart():
    """Two episodes one after the other have the second derivatives of each alone; without the end (control) others."""
    advantages = to_go() - BASELINE[ALL.states]

    def joint(phi, mark=True):
        log_prob = truth.log_prob(phi)
        ended = torch.cat([ALL.ended, ALL.ended]) & mark
        both = loaded_dice(torch.cat([log_prob, log_prob.flip(1)]), torch.cat([advantages, advantages.flip(1)]), ended)
        return both[3:, :7].sum()

    def alone(phi):
        return loaded_dice(truth.log_prob(phi), advantages, ALL.ended).flip(1)[:, :7].sum()

    torch.testing.assert_close(hessian(joint, PHI), hessian(alone, PHI), **EXACT)
    assert (hessian(lambda phi: joint(phi, False), PHI) - hessian(alone, PHI)).abs().max() > 0.1


def test_loaded_dice_without_memory_is_the_likelihood_ratio():
    """decay = 0 forgets all actions before: what is left has the derivatives of π / stop(π)."""
    advantages = to_go() - BASELINE[ALL.states]
    a = hessian(lambda phi: weighted(loaded_dice(truth.log_prob(phi), advantages, ALL.ended, decay=0.0)), PHI)
    torch.testing.assert_close(a, hessian(ESTIMATORS["likelihood ratio"], PHI), **EXACT)


def test_the_policy_gradient_of_a_bandit_by_sampling():
    """Four Gaussian arms: 200,000 pulls against the exact gradient of Σ_a π(a) μ_a; without the reward's sign for each
    action's own density (the control: densities of other actions) it is far off."""
    generator = torch.Generator().manual_seed(1)
    means = torch.tensor([0.1, 0.9, -0.5, 0.4], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.3, 0.5, 0.0], dtype=torch.float64)
    exact = truth.gradient(lambda x: x.softmax(-1) @ means, logits)
    pulls = 200_000
    actions = logits.softmax(-1).multinomial(pulls, replacement=True, generator=generator)
    rewards = means[actions] + torch.randn(pulls, generator=generator, dtype=torch.float64)

    def estimate(log_prob):
        at = logits.clone().requires_grad_()
        return torch.autograd.grad(average(policy_gradient(log_prob(at), rewards - 0.3)), at)[0]

    got = estimate(lambda at: at.log_softmax(-1)[actions])
    scores = torch.nn.functional.one_hot(actions, 4) - logits.softmax(-1)
    error = (scores * (rewards - 0.3).unsqueeze(-1)).std(0) / math.sqrt(pulls)
    assert ((got - exact).abs() < 5 * error).all()
    wrong = estimate(lambda at: at.log_softmax(-1)[actions.flip(0)])
    assert ((wrong - exact).abs() > 5 * error).any()


# -- PPO ----------------------------------------------------------------------------------------------------------


def test_ppo_by_hand():
    """The four cases of figure 1 of the paper, and a ratio inside of the bounds."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1], dtype=torch.float64)
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0], dtype=torch.float64)
    log_prob = ratio.log().requires_grad_()
    terms = ppo_clip(log_prob, torch.zeros(5, dtype=torch.float64), advantage, clip=0.2)
    torch.testing.assert_close(terms.detach(), torch.tensor([2.4, 1.0, -3.0, -1.6, 2.2], dtype=torch.float64))
    slopes = torch.autograd.grad(terms.sum(), log_prob)[0]
    torch.testing.assert_close(slopes, torch.tensor([0.0, 1.0, -3.0, 0.0, 2.2], dtype=torch.float64))


def test_at_the_old_policy_ppo_is_the_policy_gradient():
    advantages = to_go() - 0.4
    old = truth.log_prob(PHI)
    a = truth.gradient(lambda phi: weighted(ppo_clip(truth.log_prob(phi), old, advantages, clip=0.2)), PHI)
    torch.testing.assert_close(a, truth.gradient(truth.expected_return, PHI), **EXACT)


# -- means --------------------------------------------------------------------------------------------------------


def test_masks_leave_steps_out_whatever_stands_there():
    terms = torch.tensor([[1.0, 2.0], [3.0, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    assert average(terms, mask).item() == 2.0
    assert average(terms, mask, 0).tolist() == [2.0, 2.0]
    assert math.isnan(average(terms).item())  # control
    clean = objectives.standardised(terms, mask)
    torch.testing.assert_close(clean[mask], torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * math.sqrt(1.5))
    assert clean[1, 1] == 0


def test_standardised_advantages():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 400, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10, 100, 0, 5]).view(-1, 1)
    z = objectives.standardised(x, dims=1)
    torch.testing.assert_close(z.mean(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    expected = torch.tensor([1.0, 1, 1, 0, 1], dtype=torch.float64)
    torch.testing.assert_close(z.square().mean(1), expected, rtol=1e-6, atol=0)
    # equal numbers stay 0 rather than becoming rounding noise
    same = torch.full((3, 50), 1 / 3) * 1e4
    assert objectives.standardised(same).abs().max() == 0


def test_bad_input_is_refused():
    a, b = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ShapeError, match="advantages has shape"):
        policy_gradient(a, b)
    with pytest.raises(ShapeError, match="summed over them"):
        ppo_clip(torch.zeros(3, 2, 4), a, a, clip=0.2)
    with pytest.raises(OptionError, match="clip must be positive"):
        ppo_clip(a, a, a, clip=0.0)
    with pytest.raises(OptionError, match="decay"):
        loaded_dice(a, a, a.bool(), decay=2.0)
    with pytest.raises(ShapeError, match="ended has shape"):
        dice(a, a, b.bool())


def test_loaded_dice_holds_for_another_policy_than_the_one_that_acted():
    """With products of ratios, all derivatives are right at a policy other than the one whose episodes they come from;
    without (the control), they are those of no policy."""
    other = PHI + torch.tensor([0.4, -0.2, 0.1, 0.5], dtype=torch.float64)
    old = truth.log_prob(PHI)

    def corrected(phi):  # weighted() has the densities of PHI, which acted
        return weighted(loaded_dice(truth.log_prob(phi), to_go(), ALL.ended, old_log_prob=old))

    torch.testing.assert_close(truth.gradient(corrected, other), truth.gradient(truth.expected_return, other), **EXACT)
    torch.testing.assert_close(hessian(corrected, other), hessian(truth.expected_return, other), **EXACT)
    off = truth.gradient(ESTIMATORS["loaded dice"], other) - truth.gradient(truth.expected_return, other)
    assert off.abs().max() > 0.01
