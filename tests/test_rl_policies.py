"""Heads and task policies: densities against torch's own or numerical integrals, and one φ a task against a loop."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from bayesmeta import nets
from bayesmeta.errors import ModelError, OptionError, ShapeError, SpaceError
from bayesmeta.rl.policies import (
    CategoricalHead,
    GaussianHead,
    SquashedGaussianHead,
    TaskPolicy,
    detached,
    head_for,
    kl,
    mode,
    sample,
)

gymnasium = pytest.importorskip("gymnasium")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def outputs(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


HEADS = {
    "categorical": CategoricalHead(4),
    "gaussian": GaussianHead(3, log_std=-0.5),
    "squashed": SquashedGaussianHead(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 5.0, 3.0])),
}


def distribution(name, batch=(5,), seed=0):
    head = HEADS[name]
    free = head.initial_free().double() if head.free else None
    return head.distribution(outputs(*batch, head.outputs, seed=seed), free)


# -- draws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_draws_come_from_the_generator_alone(name):
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    d = distribution(name, (2, 5))
    before = torch.get_rng_state()
    a, b, c = (sample(d, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert d.log_prob(a).shape == (2, 5)
    assert isinstance(d, TorchDistributionMixin)


def test_categorical_draws_have_their_probabilities():
    d = CategoricalHead(4).distribution(torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64).expand(100_000, 4))
    share = torch.bincount(sample(d, seeded()), minlength=4) / 100_000
    p = d.probs[0]
    error = (p * (1 - p) / 100_000).sqrt()
    assert ((share - p).abs() < 5 * error).all()
    assert not ((share - p.flip(0)).abs() < 5 * error).all()  # control


@pytest.mark.parametrize("name", ["gaussian", "squashed"])
def test_densities_are_those_of_the_draws(name):
    """E[f(a)] under the draws equals ∫ f(a) exp(log_prob(a)) da by quadrature, in one dimension."""
    head = GaussianHead(1, log_std=0.3) if name == "gaussian" else SquashedGaussianHead(-1.0, 3.0, 1)
    row = torch.tensor([0.4] if name == "gaussian" else [0.4, -0.3], dtype=torch.float64)
    free = head.initial_free().double() if head.free else None
    low, high = (-12.0, 12.0) if name == "gaussian" else (-1.0, 3.0)
    edges = torch.linspace(low, high, 200_001, dtype=torch.float64)
    grid = ((edges[1:] + edges[:-1]) / 2).unsqueeze(-1)
    density = head.distribution(row.expand(len(grid), -1), free).log_prob(grid).exp() * (edges[1] - edges[0])
    assert density.sum().item() == pytest.approx(1.0, abs=1e-6)
    mean = (density * grid.squeeze(-1)).sum()
    draws = sample(head.distribution(row.expand(100_000, -1), free), seeded()).squeeze(-1)
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - mean) < 5 * error
    assert draws.min() >= low
    assert draws.max() <= high


def test_squashed_densities_agree_whether_u_is_known_or_recovered_and_with_torchs_own():
    row = 0.5 * outputs(50, 6) - torch.tensor([0.0, 0, 0, 1, 1, 1])  # where tanh is not flat
    d = HEADS["squashed"].distribution(row)
    action, log_prob = d.rsample_with_log_prob(seeded())
    torch.testing.assert_close(d.log_prob(action), log_prob, rtol=1e-8, atol=1e-8)
    own = torch.distributions.TransformedDistribution(
        torch.distributions.Independent(torch.distributions.Normal(d.loc, d.scale), 1), d.transforms
    )
    torch.testing.assert_close(own.log_prob(action), log_prob, rtol=1e-8, atol=1e-8)


def test_squashed_densities_stay_finite_on_the_ends_of_the_box():
    head = SquashedGaussianHead(-1.0, 1.0, 2)
    d = head.distribution(torch.tensor([[30.0, -30.0, 0.0, 0.0]]))
    action, log_prob = d.rsample_with_log_prob(seeded())
    assert action.tolist() == [[1.0, -1.0]]
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(d.log_prob(action)).all()
    own = torch.distributions.TransformedDistribution(
        torch.distributions.Independent(torch.distributions.Normal(d.loc, d.scale), 1), d.transforms
    )
    assert not torch.isfinite(own.log_prob(action)).all()  # control: torch's own is not


def test_squashed_draws_have_gradients():
    row = outputs(6).requires_grad_()
    head = SquashedGaussianHead(-1.0, 1.0, 3)
    action, log_prob = head.distribution(row).rsample_with_log_prob(seeded())
    slopes = torch.autograd.grad((action.sum() + log_prob), row)[0]

    def value(at):
        a, lp = head.distribution(at).rsample_with_log_prob(seeded())
        return a.sum() + lp

    expected = torch.autograd.functional.jacobian(value, row.detach())
    torch.testing.assert_close(slopes, expected)
    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    by_differences = torch.stack([(value(row + s) - value(row - s)) / 2e-6 for s in step]).detach()
    torch.testing.assert_close(slopes, by_differences, rtol=1e-6, atol=1e-7)


# -- divergences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_kl_against_sampling(name):
    """Mean of log p − log q over draws from p, within five standard errors; the other direction (control) is not."""
    head = HEADS[name]
    free = head.initial_free().double() if head.free else None
    old = head.distribution(outputs(1, head.outputs).expand(50_000, -1), free)
    free = None if free is None else free + 0.7
    new = head.distribution(outputs(1, head.outputs, seed=9).expand(50_000, -1) * 0.5, free)
    actions = sample(old, seeded(3))
    ratios = old.log_prob(actions) - new.log_prob(actions)
    error = ratios.std() / math.sqrt(len(ratios))
    assert abs(ratios.mean() - kl(old, new)[0]) < 5 * error
    assert abs(ratios.mean() - kl(new, old)[0]) > 5 * error


@pytest.mark.parametrize("name", HEADS)
def test_kl_has_no_gradient_for_the_old_policy(name):
    head = HEADS[name]
    row = outputs(7, head.outputs).requires_grad_()
    d = head.distribution(row)
    divergence = kl(d, d)
    torch.testing.assert_close(divergence.detach(), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    slope = torch.autograd.grad(divergence.sum(), row, create_graph=True)[0]
    torch.testing.assert_close(slope.detach(), torch.zeros_like(row), atol=1e-12, rtol=0)
    assert not detached(d).log_prob(mode(d)).requires_grad
    direction = outputs(7, head.outputs, seed=2)
    assert torch.autograd.grad((slope * direction).sum(), row)[0].abs().max() > 0.01  # but curvature


def test_the_mode_is_the_likeliest_action():
    d = distribution("categorical")
    assert torch.equal(mode(d), d.logits.argmax(-1))
    g = distribution("gaussian")
    assert (g.log_prob(mode(g)) > g.log_prob(mode(g) + 0.01)).all()
    s = distribution("squashed")
    torch.testing.assert_close(mode(s), s.middle + s.half * s.loc.tanh())


# -- one φ a task -------------------------------------------------------------------------------------------------


def networks():
    yield nets.mlp(2, [8, 8], 3, activation="tanh").double()
    yield nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()  # not a plain MLP


@pytest.mark.parametrize("which", [0, 1])
def test_all_tasks_at_once_equal_a_loop_over_networks(which):
    network = list(networks())[which]
    policy = TaskPolicy(network, GaussianHead(3, log_std=-0.2))
    assert policy.start.dtype == torch.float64
    phi = policy.start + 0.3 * outputs(4, policy.size)
    states = outputs(6, 4, 5, 2, seed=1)
    d = policy.distribution(phi, states)
    assert d.batch_shape == (6, 4, 5)
    views = policy.flat.views(phi)
    for task in range(4):
        weights = {name: view[task] for name, view in views.items() if name != "free"}
        torch.testing.assert_close(d.mean[:, task], functional_call(network, weights, (states[:, task],)))
        torch.testing.assert_close(d.stddev[0, task, 0], views["free"][task].exp())
    one_step = policy.distribution(phi, states[2])
    torch.testing.assert_close(one_step.mean, d.mean[2])
    shared = policy.distribution(policy.start, states)
    torch.testing.assert_close(shared.mean, network(states))
    assert not torch.allclose(shared.mean, d.mean)  # control


def test_a_task_has_no_gradient_from_another():
    policy = TaskPolicy(next(networks()), GaussianHead(3))
    phi = policy.start.detach().expand(4, -1).clone().requires_grad_()
    d = policy.distribution(phi, outputs(6, 4, 5, 2))
    slope = torch.autograd.grad(d.log_prob(d.mean.detach() + 1)[:, 1].sum(), phi)[0]
    assert slope[1].abs().min() >= 0
    assert slope[1].abs().max() > 0
    assert slope[[0, 2, 3]].abs().max() == 0


def test_a_standard_deviation_below_its_floor_counts_as_the_floor():
    head = GaussianHead(1, min_log_std=-2.0)
    free = torch.tensor([-5.0], requires_grad=True)
    d = head.distribution(torch.zeros(3, 1), free)
    assert d.stddev.detach().unique().tolist() == pytest.approx([math.exp(-2)])
    assert torch.autograd.grad(d.stddev.sum(), free)[0].item() == 0


# -- spaces and bad input -----------------------------------------------------------------------------------------


def test_a_space_gives_its_head():
    box = gymnasium.spaces.Box(-2.0, 3.0, (2,))
    assert isinstance(head_for(gymnasium.spaces.Discrete(5)), CategoricalHead)
    assert isinstance(head_for(box), GaussianHead)
    squashed = head_for(box, squashed=True)
    assert isinstance(squashed, SquashedGaussianHead)
    action = sample(squashed.distribution(torch.zeros(1000, 4)), seeded())
    assert action.min() > -2
    assert action.max() < 3
    assert action.max() > 2  # and it reaches there


def test_bad_input_is_refused():
    with pytest.raises(SpaceError, match="continuous actions"):
        head_for(gymnasium.spaces.Discrete(5), squashed=True)
    with pytest.raises(OptionError, match="finite bounds"):
        head_for(gymnasium.spaces.Box(-math.inf, math.inf, (2,)), squashed=True)
    with pytest.raises(OptionError, match="at least one action"):
        CategoricalHead(0)
    with pytest.raises(OptionError, match="at least one number"):
        GaussianHead(0)
    with pytest.raises(OptionError, match="log_std"):
        GaussianHead(1, log_std=-99.0)
    with pytest.raises(OptionError, match="heads"):
        detached(torch.distributions.Gamma(1.0, 1.0))
    with pytest.raises(ModelError, match="buffers"):
        TaskPolicy(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), CategoricalHead(3))
    policy = TaskPolicy(nets.mlp(2, [4], 3), CategoricalHead(3))
    with pytest.raises(ShapeError, match="phi has shape"):
        policy.distribution(torch.zeros(3, policy.size), torch.zeros(4, 5, 2))
