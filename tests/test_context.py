"""CAVIA and the context model: the multi-task limit, gradients, and what the wider network keeps."""

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of
from tests.test_point_methods import a_batch, by_finite_differences, neural

F64 = torch.float64


def test_a_context_of_size_zero_is_the_multi_task_baseline():
    batch = a_batch(ragged=True)
    cavia, multi = bm.CAVIA(neural(), context_size=0, inner_steps=3), bm.MultiTask(neural())
    for method in (cavia, multi):
        method.loss(batch).backward()
    torch.testing.assert_close(cavia.loss(batch), multi.loss(batch), rtol=1e-12, atol=1e-12)
    shared = torch.cat([p.grad.flatten() for p in cavia.program.network.parameters()])
    torch.testing.assert_close(shared, multi.program.prior.loc.grad, rtol=1e-12, atol=1e-12)
    x = batch.query.x
    means = [method.adapt(batch.support).predictive(x).mean for method in (cavia, multi)]
    torch.testing.assert_close(*means, rtol=1e-12, atol=1e-12)
    other = bm.CAVIA(neural(), context_size=2, inner_steps=3)  # control
    assert abs(other.loss(batch).item() - multi.loss(batch).item()) > 1e-3


def test_widening_keeps_the_network_where_the_context_is_zero():
    model = neural()
    wide = bm.ContextTaskModel.widen(model, 3)
    x = torch.randn(4, 5, 1, dtype=F64)
    expected = model.output(model.prior.loc.expand(4, -1), x)
    torch.testing.assert_close(wide.output(torch.zeros(4, 3, dtype=F64), x), expected, rtol=1e-12, atol=1e-12)
    moved = wide.output(torch.ones(2, 4, 3, dtype=F64), x)
    assert moved.shape == (2, 4, 5, 1)
    assert (moved - expected).abs().min() > 1e-6
    again = bm.ContextTaskModel.widen(model, 3)
    assert all(torch.equal(a, b) for a, b in zip(wide.parameters(), again.parameters()))
    other = bm.ContextTaskModel.widen(model, 3, seed=1)
    assert not torch.equal(wide.network[0].weight, other.network[0].weight)


@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradient_by_finite_differences(steps):
    method, batch = bm.CAVIA(neural(), context_size=2, inner_steps=steps, inner_lr=0.5), a_batch(ragged=True)
    method.loss(batch).backward()
    for parameter in method.program.network.parameters():
        for index in (0, parameter.numel() - 1):
            slope = by_finite_differences(method, batch, parameter, index)
            assert parameter.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)
    assert method.program.prior.loc.grad is None  # the contexts start at 0, always


def test_one_step_is_the_gradient_of_the_context_by_hand():
    """φ₁ = α Σ (y − f)/σ² ∂f/∂φ / n, with f = v · tanh(W x + U φ + b) + c."""
    method, batch = bm.CAVIA(neural(), context_size=2, inner_steps=1, inner_lr=0.3), a_batch(1)
    u = method.adapt(batch.support).u[0, 0]
    first, last = method.program.network[0], method.program.network[2]
    x, y = batch.support.x[0], batch.support.y[0]
    hidden = torch.tanh(x @ first.weight[:, :1].T + first.bias)
    residual = y - (hidden @ last.weight.T + last.bias).squeeze(-1)
    slope = (last.weight * (1 - hidden**2)) @ first.weight[:, 1:]
    expected = 0.3 * (residual[:, None] * slope).sum(0) / method.program.likelihood.scale.item() ** 2 / len(y)
    torch.testing.assert_close(u, expected.detach(), rtol=1e-10, atol=1e-12)


def test_any_method_takes_the_context_model():
    network = bm.nets.mlp(1 + 2, [8], 1, activation="tanh")
    model = bm.ContextTaskModel(network, bm.Gaussian(0.5), 2)
    batch = bm.tasks.Sinusoid().sample(5, support=4, query=6)
    for method in (bm.ABML(model, inner_steps=2, inner_lr=0.05), bm.MAML(model), bm.CAVIA(model)):
        method.loss(batch).backward()
        posterior = method.adapt(batch.support)
        assert posterior.predict(batch.query, 7).shape == (7, 5, 6)
        assert posterior.sample(3)["phi"].shape == (3, 5, 2)
    u = torch.randn(3, 5, 2)
    model.prepare(batch.support)
    trace = model.trace_joint(u, batch.support)
    expected = trace.log_likelihood.sum(-1) + trace.log_prior
    torch.testing.assert_close(model.log_joint(u, batch.support), expected, rtol=1e-5, atol=1e-4)


def test_what_has_no_place_for_a_context():
    with pytest.raises(errors.UnsupportedError, match="appends a context"):
        bm.CAVIA(TwoSites())
    conv = nn.Sequential(nn.Tanh(), nn.Linear(1, 1))
    with pytest.raises(errors.UnsupportedError, match="begins with Tanh"):
        bm.CAVIA(bm.NeuralTaskModel(conv, bm.Gaussian(), "point"))
    with pytest.raises(errors.OptionError, match="0 or more"):
        bm.CAVIA(neural(), context_size=-1)
    model = bm.ContextTaskModel(bm.nets.mlp(3, [4], 1), bm.Gaussian(), 2)
    with pytest.raises(errors.OptionError, match="has 2"):
        bm.CAVIA(model, context_size=3)
    with pytest.raises(errors.ShapeError, match="features"):
        bm.CAVIA(model).adapt(batch_of(2, 3, 2))
    with pytest.raises(errors.ModelError, match="BatchNorm"):
        bm.ContextTaskModel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), bm.Gaussian(), 2)


def test_new_weights_are_drawn_as_those_of_the_wider_layer():
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [400], 1), bm.Gaussian(0.5), "point")
    new = bm.ContextTaskModel.widen(model, 8).network[0].weight[:, 1:].detach()
    bound = 9**-0.5
    assert new.abs().max() <= bound
    assert abs(new.std() - bound / 3**0.5) < 5 * bound / 3**0.5 / (2 * 3200) ** 0.5


def test_the_joint_pulls_the_context_by_a_standard_normal():
    batch = a_batch(1)
    method = bm.CAVIA(neural(), context_size=2, inner_steps=2, inner_lr=0.3, objective="joint")
    plain = bm.CAVIA(neural(), context_size=2, inner_steps=1, inner_lr=0.3)
    first = plain.adapt(batch.support).u
    u = first.clone().requires_grad_()
    slope = plain.inner_gradient(u, batch.support, None, False) - u
    expected = first + 0.3 * slope / batch.support.shots
    torch.testing.assert_close(method.adapt(batch.support).u, expected.detach(), rtol=1e-10, atol=1e-12)


def test_cavia_copies_the_noise_as_it_copies_the_weights():
    model = neural(likelihood=bm.Gaussian(0.5, learn_scale=True))
    method = bm.CAVIA(model, context_size=2)
    with torch.no_grad():
        method.program.likelihood.log_scale.fill_(3.0)
    assert abs(model.likelihood.scale.item() - 0.5) < 1e-6
