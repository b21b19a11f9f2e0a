"""MAML against hand-derived meta-gradients and finite differences."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.func import grad, jacrev

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of

LR = 0.05


def quadratic(x, y=None, mask=None):
    """−log p(y | φ) is quadratic in φ ∈ R²."""
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal((x * phi).sum(-1), x.new_ones(())), obs=y)


def quartic(x, y=None, mask=None):
    """−log p(y | φ) is quartic in φ ∈ R², with Hessians at different φ that do not commute."""
    with bm.task_plate(x):
        phi = pyro.sample("phi", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
        with bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal((x * phi).sum(-1).square(), x.new_ones(())), obs=y)


def nll(power, phi, x, y):
    """The same by hand, for one task, without the constant."""
    return 0.5 * ((x @ phi) ** power - y).square().sum()


def setting(program, inner_steps, **options):
    method = bm.MAML(program, inner_steps=inner_steps, inner_lr=LR, **options)
    support, query = batch_of(1, 4, 2, seed=3, dtype=torch.float64), batch_of(1, 5, 2, seed=4, dtype=torch.float64)
    batch = bm.TaskBatch(support, query)
    method.double()
    method.prepare(batch)
    with torch.no_grad():
        method.start.copy_(torch.tensor([0.8, -0.5]))
    return method, batch


def hand_gradient(method, batch, power, inner_steps, *, reverse=False, first_order=False):
    """(I − αH(θ)) (I − αH(φ₁)) … ∇L_Q(φ_K), with H the Hessian of the mean over the support."""
    support_x, support_y = batch.support.x[0], batch.support.y[0]
    phi = method.start.detach()

    def inner(p):
        return nll(power, p, support_x, support_y) / len(support_y)

    factors = []
    for _ in range(inner_steps):
        factors.append(torch.eye(2, dtype=torch.float64) - LR * jacrev(grad(inner))(phi))
        phi = phi - LR * grad(inner)(phi)
    outer = grad(lambda p: nll(power, p, batch.query.x[0], batch.query.y[0]))(phi)
    if first_order:
        return outer
    product = torch.eye(2, dtype=torch.float64)
    for factor in reversed(factors) if reverse else factors:
        product = product @ factor
    return product @ outer


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize(("program", "power"), [(quadratic, 1), (quartic, 2)])
def test_meta_gradient_is_the_hand_derived_product(program, power, inner_steps):
    method, batch = setting(program, inner_steps)
    method.loss(batch).backward()
    expected = hand_gradient(method, batch, power, inner_steps)
    torch.testing.assert_close(method.start.grad, expected, rtol=1e-12, atol=1e-12)
    swapped = hand_gradient(method, batch, power, inner_steps, reverse=True)
    if power == 2 and inner_steps > 1:  # control: the wrong order of factors must be seen
        assert (swapped - expected).abs().max() > 1e-6 * expected.abs().max()
    naive = hand_gradient(method, batch, power, inner_steps, first_order=True)
    assert (naive - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("objective", ["likelihood", "joint"])
def test_meta_gradient_by_finite_differences(inner_steps, objective):
    method, batch = setting(quartic, inner_steps, objective=objective)
    method.loss(batch).backward()
    step = 1e-6
    for i in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                method.start[i] += sign * step
            values.append(method.loss(batch).item())
            with torch.no_grad():
                method.start[i] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        # central differences: error of order step² plus rounding eps/step
        assert method.start.grad[i].item() == pytest.approx(slope, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_first_order_is_its_own_formula(inner_steps):
    method, batch = setting(quartic, inner_steps, first_order=True)
    method.loss(batch).backward()
    expected = hand_gradient(method, batch, 2, inner_steps, first_order=True)
    torch.testing.assert_close(method.start.grad, expected, rtol=1e-12, atol=1e-12)


def test_network_meta_gradient_by_finite_differences():
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1, activation="tanh"), bm.Gaussian(0.5, learn_scale=True)).double()
    method = bm.MAML(model, inner_steps=2, inner_lr=0.1)
    batch = bm.TaskBatch(batch_of(3, 4, dtype=torch.float64, ragged=True), batch_of(3, 4, seed=1, dtype=torch.float64))
    method.loss(batch).backward()
    for parameter in (model.prior.loc, model.likelihood.log_scale):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(min(len(flat), 4)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * 1e-6
                values.append(method.loss(batch).item())
                flat[i] -= sign * 1e-6
            assert gradient[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-6)


def test_gradients_across_tasks_are_exactly_zero():
    torch.manual_seed(0)
    for model in (quartic, bm.NeuralTaskModel(bm.nets.mlp(2, [4], 1), bm.Gaussian(0.5)).double()):
        method = bm.MAML(model, inner_steps=2, inner_lr=0.1)
        batch = bm.TaskBatch(batch_of(3, 4, 2, dtype=torch.float64), batch_of(3, 4, 2, seed=1, dtype=torch.float64))
        if model is quartic:
            method.double()
        method.prepare(batch)
        if method.start is not None:  # 0 is a stationary point of the quartic
            torch.nn.init.constant_(method.start, 0.5)
        x = batch.support.x.clone().requires_grad_()
        support = bm.Observations(x, batch.support.y)
        u = method._steps(support, None, create_graph=True)
        for task in range(3):
            (gradient,) = torch.autograd.grad(u[0, task].sum(), x, retain_graph=True)
            others = [t for t in range(3) if t != task]
            assert (gradient[others] == 0).all()
            assert (gradient[task] != 0).any()


def test_joint_climbs_to_the_maximum_a_posteriori():
    method, batch = setting(quadratic, 4000, objective="joint")
    u = method.adapt(batch.support).u[0, 0]
    x, y = batch.support.x[0], batch.support.y[0]
    ridge = torch.linalg.solve(x.T @ x + torch.eye(2, dtype=torch.float64), x.T @ y)
    torch.testing.assert_close(u, ridge, rtol=1e-9, atol=1e-9)
    likelihood, _ = setting(quadratic, 4000)
    least_squares = torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1)
    torch.testing.assert_close(likelihood.adapt(batch.support).u[0, 0], least_squares, rtol=1e-9, atol=1e-9)
    assert (ridge - least_squares).abs().max() > 1e-2


def test_no_support_is_the_start():
    observations = batch_of(2, 3)
    none = bm.Observations(observations.x, observations.y, torch.zeros(2, 3, dtype=torch.bool))
    for objective in ("likelihood", "joint"):
        for model in (TwoSites(), bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian())):
            method = bm.MAML(model, inner_steps=3, inner_lr=0.1, objective=objective)
            method.prepare(observations)
            start = method._start(none).detach()
            assert torch.equal(method.adapt(none).u[0], start)
            assert not torch.equal(method.adapt(observations).u[0], start)


def test_adapt_is_the_same_in_a_batch_of_one():
    torch.manual_seed(0)
    method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.5)), inner_steps=3, inner_lr=0.1)
    observations = batch_of(4, 5)
    together = method.adapt(observations).u
    alone = method.adapt(observations.tasks(slice(2, 3))).u
    torch.testing.assert_close(together[:, 2:3], alone, rtol=1e-5, atol=1e-6)


def test_a_point_has_no_density():
    method = bm.MAML(TwoSites())
    posterior = method.adapt(batch_of(2, 3))
    with pytest.raises(errors.UnsupportedError, match="no density"):
        posterior.log_prob(torch.zeros(2, 2))
    assert posterior.is_point


def test_loss_is_the_negative_log_likelihood_of_the_query():
    method, batch = setting(quadratic, 1)
    x, y = batch.support.x[0], batch.support.y[0]
    phi = method.start.detach() - LR * x.T @ (x @ method.start.detach() - y) / len(y)
    expected = nll(1, phi, batch.query.x[0], batch.query.y[0]) + 0.5 * math.log(2 * math.pi) * 5
    assert method.loss(batch).item() == pytest.approx(expected.item(), rel=1e-12)
