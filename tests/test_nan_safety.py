"""Gradients where a square root, a distance or a Cholesky factor meets a zero: finite, and those of the function.

Batches at which such things happen: all inputs and targets 0, all shots of a task the same point, tasks with no support
or one shot of it, a network whose weights are all 0.
"""

import pytest
import torch

import bayesmeta as bm
from bayesmeta.models.kernels import DenseKernel, make_kernel
from bayesmeta.ops.gaussian import condition, lower_root
from bayesmeta.ops.point_noise import _local
from bayesmeta.ops.sets import product_of_gaussians
from bayesmeta.ops.svgd import svgd_direction
from tests.numerics import slope_along
from tests.test_contract import METHODS, on_network

F64 = torch.float64


def batch(kind):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, *shape, generator=generator, dtype=F64) for shape in ((1,), ()))
    if kind == "zeros":
        x, y = torch.zeros_like(x), torch.zeros_like(y)
    if kind == "one point":
        x, y = x[:, :1].expand(3, 4, 1).clone(), y[:, :1].expand(3, 4).clone()
    mask = torch.tensor([[True] * 4, [False] * 4, [True, False, False, False]]) if kind == "gaps" else None
    return bm.TaskBatch(bm.Observations(x, y, mask), bm.Observations(x, y))


def at_zero(name, given):
    """The method in float64, with a network of zeros where it takes one."""
    method = on_network(name, F64)
    method.prepare(given)
    method.to(F64)
    with torch.no_grad():
        for parameter_name, p in method.named_parameters():
            if any(part in parameter_name for part in ("network", "prior.loc", "start", "particles")):
                p.zero_()
    return method


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_finite(name):
    for kind in ("zeros", "one point", "gaps"):
        given = batch(kind)
        for method in (on_network(name, F64), at_zero(name, given)):
            method.prepare(given)
            method.to(F64)
            loss = method.loss(given, generator=0)
            loss.backward()
            assert torch.isfinite(loss.detach())
            bad = [n for n, p in method.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
            assert bad == [], kind


#: whose loss is smooth there and what its gradient is of: no ReLU at 0, no bandwidth of particles that coincide, no
#: first-order rule or stopped gradient
EXACT = [
    "maml", "maml_joint", "meta_sgd", "abml", "abml_local", "abml_low_rank", "last_layer",
    "last_layer_gamma", "last_layer_mixture_gamma", "deep_kernel", "deep_kernel_both",
    "neural_process_product", "conditional_neural_process", "gaussian_process_kernel",
]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_the_loss(name):
    generator = torch.Generator().manual_seed(1)
    for kind in ("zeros", "one point", "gaps"):
        given = batch(kind)
        method = at_zero(name, given)
        method.loss(given, generator=0).backward()
        for parameter in method.parameters():
            if parameter.grad is None:
                continue
            direction = torch.randn(parameter.shape, generator=generator, dtype=F64)
            expected = slope_along(lambda: method.loss(given, generator=0).detach(), parameter, direction)  # noqa: B023
            scale = max(1.0, float(parameter.grad.abs().max()))
            assert float((parameter.grad * direction).sum()) == pytest.approx(expected, abs=1e-5 * scale, rel=1e-5)


def test_the_standard_deviation_of_a_mixture_far_from_its_centre():
    """E[u²] − E[u]² in float32 is noise of size 0.06 here, often below 0."""
    prior = bm.priors.Mixture(components=3)
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5), prior)
    part = model.prior
    with torch.no_grad():
        part.offsets.copy_(torch.full_like(part.offsets, 1e3))
        part.log_scale.fill_(-7.0)
    scale = part.moments()[1]
    torch.testing.assert_close(scale, torch.full_like(scale, torch.tensor(-7.0).exp().item()))
    scale.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (part.offsets, part.log_scale, part.logits))
    with torch.no_grad():  # and where nothing cancels it is what it was
        part.offsets.copy_(torch.randn_like(part.offsets))
    draws = part.distribution().sample((200_000,))
    torch.testing.assert_close(part.moments()[1], draws.std(0), rtol=0.02, atol=0.0)


# -- operations ---------------------------------------------------------------------------------------------------


def test_noise_of_variance_0_has_gradient_0():
    h = torch.zeros(2, 1, 3, 4, dtype=F64, requires_grad=True)
    weight = torch.zeros(2, 5, 4, dtype=F64, requires_grad=True)
    _local(h, weight, None, torch.ones(2, 1, 3, 5, dtype=F64)).sum().backward()
    assert h.grad.abs().max() == 0 == weight.grad.abs().max()
    control = torch.zeros(3, dtype=F64, requires_grad=True)
    control.square().sqrt().sum().backward()
    assert torch.isnan(control.grad).all(), "control: the root as it is written"


def test_particles_that_coincide():
    score = torch.randn(3, 2, 4, dtype=F64)
    two = torch.tensor([0.0, 0.0, 1.0], dtype=F64).view(3, 1, 1).expand(3, 2, 4)
    for particles in (torch.zeros(3, 2, 4, dtype=F64), two):
        leaf = particles.clone().requires_grad_()
        value = svgd_direction(leaf, score)
        (slope,) = torch.autograd.grad(value.square().sum(), leaf)
        assert torch.isfinite(value).all()
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("name", ["rbf", "matern12", "matern32", "matern52", "cosine", "linear"])
def test_kernels_of_points_that_coincide(name):
    kernel = DenseKernel(make_kernel(name, 2, 3, 1.0, torch.Generator().manual_seed(0))).double()
    point = torch.tensor([[0.3, -0.2]], dtype=F64)
    for points in (point.expand(3, 2).clone(), torch.zeros(3, 2, dtype=F64)):
        points.requires_grad_()
        eye = torch.eye(3, dtype=F64)
        (torch.linalg.cholesky(kernel(points) + eye).diagonal().log().sum() + kernel(points).sum()).backward()
        assert torch.isfinite(points.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in kernel.parameters() if p.grad is not None)


def test_factors_that_say_nothing():
    information, precision = (torch.zeros(2, 3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    loc, scale = product_of_gaussians(information, precision, mask, 0.0, 1.0)
    (loc.sum() + scale.sum()).backward()
    assert torch.isfinite(information.grad).all()
    assert torch.equal(precision.grad[1], torch.zeros(3, 4, dtype=F64))
    torch.testing.assert_close(precision.grad[0, 0], torch.full((4,), -0.5, dtype=F64))  # d (1 + p)^(-1/2)


@pytest.mark.parametrize("columns", [3, 5])
def test_roots_with_columns_of_zeros(columns):
    root = torch.zeros(3, columns, dtype=F64)
    root[:, :3] = torch.eye(3, dtype=F64)
    root.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: lower_root(r).square(), root)


def test_conditioning_on_nothing():
    mean = torch.zeros(3, dtype=F64, requires_grad=True)
    covariance = torch.eye(3, dtype=F64, requires_grad=True)
    for observed in (torch.tensor([False] * 3), torch.tensor([True, False, False])):
        for part in torch.autograd.grad(
            sum(v.square().sum() for v in condition(mean, covariance, observed, torch.zeros(3, dtype=F64))),
            (mean, covariance),
        ):
            assert torch.isfinite(part).all()


def test_the_adam_of_pacohs_posterior_with_nothing_to_follow():
    """Its own steps divide by the root of a second moment, which is 0 where all is at the optimum."""
    given = batch("zeros")
    method = at_zero("pacoh_network", given)
    posterior = method.adapt(given.support)
    assert torch.isfinite(posterior.predict(given.query.x, 3)).all()
