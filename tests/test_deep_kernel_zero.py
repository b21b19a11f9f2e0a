"""Deep kernels where the function has no variance: linear and cosine at 0, dead features, padding."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import bayesmeta as bm

F64 = torch.float64
NOISE = 0.1
each_kernel = pytest.mark.parametrize("kernel", ["linear", "cosine"])


def deep_kernel(kernel, likelihood=None, inputs="raw", dtype=F64, **options):
    likelihood = bm.Gaussian(NOISE) if likelihood is None else likelihood
    outputs = 1 if isinstance(likelihood, bm.Gaussian) else likelihood.num_classes
    trunk = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        trunk.weight.copy_(torch.tensor([[0.4], [0.9], [1.3]]))  # all positive: ReLU features die for x ≤ 0
    network = nn.Sequential(trunk, nn.ReLU(), nn.Linear(3, outputs))
    method = bm.DeepKernel(
        bm.NeuralTaskModel(network, likelihood, "point"), kernel=kernel, inputs=inputs, **options
    ).to(dtype)
    nn.init.constant_(method.gp.mean, 0.3)
    return method


def observations(x, y=None, dtype=F64):
    x = torch.tensor([x], dtype=dtype).unsqueeze(-1)
    return bm.Observations(x, None if y is None else torch.tensor([y], dtype=dtype))


def dense(method, s, y, q):
    """Predictive mean and variance (without noise) and evidence in numpy, with the noise and no jitter."""
    gp = method.gp
    scale = gp.kernel.variance if gp.kernel_name == "linear" else gp.kernel.outputscale
    v, noise, c = scale.item(), gp.noise_variance.item(), gp.mean.item()

    def at(x):
        x = np.asarray(x, dtype=float)
        if method.gp.inputs == "features":
            x = np.maximum(x, 0.0) * gp.trunk[0].weight.norm().item()  # the features are on one ray
        return np.sign(x) if gp.kernel_name == "cosine" else x

    covariance = v * np.outer(at(s), at(s)) + noise * np.eye(len(s))
    gain = v * np.outer(at(q), at(s)) @ np.linalg.inv(covariance)
    residual = np.asarray(y) - c
    evidence = -0.5 * residual @ np.linalg.solve(covariance, residual)
    evidence -= 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    return c + gain @ residual, v * at(q) ** 2 - np.diag(gain @ (v * np.outer(at(s), at(q)))), evidence


@pytest.mark.parametrize("inputs", ["raw", "features"])
@each_kernel
def test_points_without_variance_by_dense_algebra(kernel, inputs):
    """Float64, in the support and among new points; two of them alike, and dead features at x < 0."""
    method = deep_kernel(kernel, inputs=inputs)
    s, y, q = [0.0, 0.5, 1.0, -0.7, 0.0], [0.2, 1.0, 2.0, -1.1, 0.5], [0.0, -2.0, 0.4, 1.5]
    support = observations(s, y)
    posterior = method.adapt(support)
    fn, (mean, variance, evidence) = posterior.predictive(observations(q).x), dense(method, s, y, q)
    close = {"rtol": 1e-6, "atol": 1e-6}  # the kernel's matrix has rank 1 and the jitter
    np.testing.assert_allclose(fn.mean[0].detach(), mean, **close)
    np.testing.assert_allclose(fn.variance[0].detach() - method.gp.noise_variance.item(), variance, **close)
    np.testing.assert_allclose(posterior.log_evidence.item(), evidence, **close)
    np.testing.assert_allclose(method.gp.log_evidence(support).item(), evidence, **close)
    # what stands at 0 tells nothing but its own noise: without it the evidence is that much less
    rest = method.adapt(observations(s[1:], y[1:]))
    own = torch.distributions.Normal(0.3, NOISE).log_prob(torch.tensor(0.2, dtype=F64)).item()
    np.testing.assert_allclose((posterior.log_evidence - rest.log_evidence).item(), own, **close)
    torch.testing.assert_close(rest.predictive(observations(q).x).mean, fn.mean, **close)
    assert abs(dense(method, s, [0.9, *y[1:]], q)[2] - evidence) > 1  # control: the evidence does see it


@each_kernel
def test_the_function_is_its_mean_at_0(kernel):
    method = deep_kernel(kernel)
    posterior = method.adapt(observations([0.0, 0.5, 1.0], [3.0, 1.0, 2.0]))  # far from the mean
    f = posterior.sample(50, 1)["f"][:, 0].detach()
    torch.testing.assert_close(f[:, 0], torch.full((50,), 0.3, dtype=F64), rtol=0, atol=1e-7)
    assert (f[:, 1] - 0.3).abs().min() > 1e-3  # control: elsewhere it is not
    y = posterior.predict(observations([0.0]).x, 20_000, generator=1).flatten().detach()
    assert abs(y.mean() - 0.3) < 4.5 * NOISE / 20_000**0.5
    assert abs(y.var() / NOISE**2 - 1) < 4.5 * (2 / 20_000) ** 0.5
    posterior = method.adapt(observations([0.0, 0.5], [3.0, 1.0]))  # with points of one direction the jitter counts
    draws = posterior.draws(4, 2)
    evidence = posterior.log_joint(draws) - posterior.log_prob(draws.u)
    torch.testing.assert_close(evidence, posterior.log_evidence.expand(4, -1), rtol=1e-5, atol=1e-5)


def test_only_points_at_0_and_a_gradient():
    """The support says nothing of any other point."""
    method = deep_kernel("linear")
    posterior = method.adapt(observations([0.0, 0.0], [1.0, -2.0]))
    torch.testing.assert_close(
        posterior.predictive(observations([2.0]).x).mean.detach(), torch.full((1, 1), 0.3).double()
    )
    for kernel in ("linear", "cosine"):
        method = deep_kernel(kernel, inputs="features")
        one = observations([0.0, 0.5, -1.0], [0.0, 1.0, 2.0])
        method.loss(bm.TaskBatch(one, observations([1.0, -2.0], [0.5, 0.1]))).backward()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
        assert method.gp.mean.grad.abs() > 0


def test_small_variances_are_not_drowned():
    """At 1e-6 the function has a standard deviation a billion times smaller than at 1e3, and keeps it."""
    method, n = deep_kernel("linear"), 4000
    posterior = method.adapt(observations([0.0, 1e-6, 1e3], [0.0, 0.0, 0.0]))
    f = posterior.named(posterior.prior_draws(n, 1))["f"][:, 0].detach() - 0.3
    sd = method.gp.kernel.variance.sqrt().item() * torch.tensor([1e-6, 1e3], dtype=F64)
    assert ((f[:, 1:].square().mean(0).sqrt() / sd - 1).abs() < 4.5 / (2 * n) ** 0.5).all()
    assert f[:, 0].abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("inputs", ["raw", "features"])
@each_kernel
def test_labels_with_padding_and_dead_features(kernel, inputs, dtype):
    """The mean of probabilities over draws is the predictive, in ragged tasks too; padding counts nothing."""
    method, n = deep_kernel(kernel, bm.likelihoods.Categorical(3), inputs, dtype), 20_000
    x = torch.tensor([[0.3, 0.0, 1.0, -1.0], [0.3, 0.5, 7.0, 7.0]], dtype=dtype).unsqueeze(-1)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    data = bm.Observations(x, torch.tensor([[0, 1, 2, 1], [0, 1, 1, 2]]), mask)
    posterior = method.adapt(data)
    each = posterior.log_likelihood(data, n, generator=1)
    assert (each[:, ~mask] == 0).all()
    mean = each.exp().double().mean(0)
    error = each.exp().double().std(0) / n**0.5 + 1e-6
    expected = posterior.predictive(data).log_prob(data.y.to(dtype)).exp().double()
    assert ((mean - expected).abs() < 4.5 * error)[mask].all()
    assert ((mean - 1.05 * expected).abs() > 4.5 * error)[mask].any()  # control
    # a point at 0 has the labels of the mean and the noise: all classes are equally probable
    assert math.isclose(expected[0, 1].item(), 1 / 3, rel_tol=1e-5)
    alone = method.adapt(bm.Observations(x[1:, :2], data.y[1:, :2])).predictive(x[1:]).probs[0]
    torch.testing.assert_close(posterior.predictive(x).probs[1], alone, rtol=1e-4, atol=1e-4)
