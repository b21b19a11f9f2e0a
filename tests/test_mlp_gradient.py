"""The fused inner gradient against plain autograd, first and second order, in float64."""

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.models.program import TaskProgram
from tests.programs import batch_of


def model_of(activation, outputs=1, hidden=(5, 4), features=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bm.NeuralTaskModel(
            bm.nets.mlp(features, hidden, outputs, activation=activation), bm.Gaussian(0.5)
        ).double()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("hidden", [(), (5,), (5, 4), (1, 4)])
@pytest.mark.parametrize("features", [1, 2])  # layers of one input or one output are computed in another way
def test_gradient_and_hessian_product_equal_autograd(activation, outputs, ragged, particles, hidden, features):
    model = model_of(activation, outputs, hidden, features)
    assert model._fused is not None
    observations = batch_of(3, 4, features, dtype=torch.float64, ragged=ragged)
    if outputs > 1:
        y = torch.randn(3, 4, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        observations = observations.with_y(y)
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(particles, 3, model.flat.size, dtype=torch.float64, generator=generator).requires_grad_()
    vector = torch.randn(u.shape, dtype=torch.float64, generator=generator)
    fused = model.log_likelihood_gradient(u, observations, create_graph=True)
    plain = TaskProgram.log_likelihood_gradient(model, u, observations, create_graph=True)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-11)
    (product,) = torch.autograd.grad((fused * vector).sum(), u)
    (expected,) = torch.autograd.grad((plain * vector).sum(), u)
    torch.testing.assert_close(product, expected, rtol=1e-11, atol=1e-10)
    if hidden and activation == "tanh":  # control: without curvature terms the product is another one
        gauss_newton_like = product.clone()
        model._fused.activations = [type(a)(a.apply, a.slope, None) for a in model._fused.activations]
        again = model.log_likelihood_gradient(u, observations, create_graph=True)
        (wrong,) = torch.autograd.grad((again * vector).sum(), u)
        assert (wrong - gauss_newton_like).abs().max() > 1e-6


def test_hessian_product_by_finite_differences():
    model = model_of("tanh")
    observations = batch_of(2, 4, 2, dtype=torch.float64)
    u = torch.randn(
        2, model.flat.size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: model.log_likelihood_gradient(v, observations, create_graph=True), (u,), raise_exception=True
    )


def test_a_third_derivative_is_refused_not_wrong():
    model = model_of("tanh")
    observations = batch_of(2, 4, 2, dtype=torch.float64)
    u = torch.zeros(2, model.flat.size, dtype=torch.float64).requires_grad_()
    gradient = model.log_likelihood_gradient(u, observations, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda: bm.NeuralTaskModel(bm.nets.mlp(2, [4], 1, activation="gelu"), bm.Gaussian(0.5)),
        lambda: bm.NeuralTaskModel(bm.nets.mlp(2, [4], 1), bm.Gaussian(0.5), task_modules="head"),
        lambda: bm.NeuralTaskModel(
            nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)), bm.Gaussian()
        ),
        lambda: bm.NeuralTaskModel(bm.nets.mlp(2, [4], 1), bm.Gaussian(0.5, learn_scale=True)),
    ],
)
def test_other_models_take_plain_autograd(make):
    model = make().double()
    observations = batch_of(2, 4, 2, dtype=torch.float64)
    u = torch.zeros(2, model.flat.size, dtype=torch.float64).requires_grad_()
    ours = model.log_likelihood_gradient(u, observations, create_graph=True)
    plain = TaskProgram.log_likelihood_gradient(model, u, observations, create_graph=True)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert "_Gradient" not in str(ours.grad_fn)
    method = bm.MAML(make().double(), inner_steps=2, inner_lr=0.1)
    method.loss(bm.TaskBatch(observations, observations)).backward()
    assert all(p.grad is not None for n, p in method.named_parameters() if n != "program.prior.log_scale")
