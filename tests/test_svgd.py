"""SVGD's kernel and direction against loops, finite differences and Pyro's own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.svgd import SVGD, RBFSteinKernel

from bayesmeta import errors
from bayesmeta.ops.svgd import median_bandwidth, rbf_kernel, squared_distances, svgd_direction

F64 = torch.float64


def cloud(particles=6, tasks=3, dim=4, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(particles, tasks, dim, generator=generator, dtype=F64).to(dtype)


def by_loops(particles, score, h):
    """The direction of Liu & Wang, eq. 8, one pair at a time, the kernel's gradient by autograd."""
    out = torch.zeros_like(particles)
    count, tasks, _ = particles.shape
    for task in range(tasks):
        for i in range(count):
            for j in range(count):
                a = particles[j, task].clone().requires_grad_()
                k = torch.exp(-(a - particles[i, task]).square().sum() / h[task])
                (slope,) = torch.autograd.grad(k, a)
                out[i, task] += (k.detach() * score[j, task] + slope) / count
    return out


def test_direction_is_that_of_the_paper():
    particles, score = cloud(), cloud(seed=1)
    h = median_bandwidth(squared_distances(particles))
    expected = by_loops(particles, score, h)
    torch.testing.assert_close(svgd_direction(particles, score), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(svgd_direction(particles, score, h), expected, rtol=1e-12, atol=1e-12)
    assert (svgd_direction(particles, score, 2 * h) - expected).abs().max() > 1e-2  # control: another bandwidth


def test_kernel_gradient_by_finite_differences():
    """Σ_j ∇_{φ_j} k(φ_j, φ_i), with the factor 2 and the sign."""
    particles = cloud(4, 2, 3)
    h = median_bandwidth(squared_distances(particles))
    _, found = rbf_kernel(particles, h)
    step = 1e-6
    expected = torch.zeros_like(particles)
    for i, task, d in [(i, t, d) for i in range(4) for t in range(2) for d in range(3)]:
        for j in range(4):
            values = []
            for sign in (1, -1):
                moved = particles[j, task].clone()
                moved[d] += sign * step
                values.append(torch.exp(-(moved - particles[i, task]).square().sum() / h[task]))
            expected[i, task, d] += (values[0] - values[1]) / (2 * step)
    # central differences: error of order step² plus rounding eps / step
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    assert (found / 2 - expected).abs().max() > 1e-2


def test_median_rule_by_hand():
    line = torch.tensor([0.0, 1.0, 3.0], dtype=F64).reshape(3, 1, 1)  # squared distances 1, 9, 4
    other = torch.tensor([0.0, 10.0, 30.0], dtype=F64).reshape(3, 1, 1)
    h = median_bandwidth(squared_distances(torch.cat([line, other], 1)))
    torch.testing.assert_close(h, torch.tensor([4.0, 400.0], dtype=F64) / math.log(3), rtol=1e-12, atol=0)
    four = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=F64).reshape(4, 1, 1)  # 1, 9, 49, 4, 36, 16: the lower of 9 and 16
    torch.testing.assert_close(
        median_bandwidth(squared_distances(four)), torch.tensor([9.0], dtype=F64) / math.log(4), rtol=1e-12, atol=0
    )


def test_kernel_in_the_conventions_of_pyro():
    """One dimension, where Pyro's kernel for each coordinate is the joint one; its median is over log(M + 1)."""
    particles = cloud(7, 1, 1)
    stein = RBFSteinKernel()
    log_kernel, grad_term = stein.log_kernel_and_grad(particles[:, 0])
    theirs = stein._bandwidth((particles[None, :, 0] - particles[:, None, 0]).square())
    ours = median_bandwidth(squared_distances(particles))
    torch.testing.assert_close(ours, theirs * math.log(8) / math.log(7), rtol=1e-12, atol=0)
    kernel, repulsion = rbf_kernel(particles, theirs)
    torch.testing.assert_close(kernel[..., 0], log_kernel[..., 0].exp(), rtol=1e-12, atol=0)
    # Pyro's gradient term is that of a loss, which is descended
    descended = (log_kernel.exp() * grad_term).sum(1)
    torch.testing.assert_close(repulsion[:, 0], -descended, rtol=1e-10, atol=1e-12)


class SharedBandwidth(RBFSteinKernel):
    """Pyro's kernel with one bandwidth for all coordinates: then its multivariate mode is the joint kernel."""

    def __init__(self, h):
        super().__init__()
        self.h = h

    def _bandwidth(self, norm_sq):
        return self.h.expand(norm_sq.shape[-1])


def test_one_step_of_pyros_svgd():
    scale = torch.tensor([1.0, 0.5, 2.0], dtype=F64)

    def model():
        pyro.sample("z", dist.Normal(torch.ones(3, dtype=F64), scale).to_event(1))

    start = cloud(6, 1, 3)
    h = median_bandwidth(squared_distances(start))
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        optimizer = pyro.optim.SGD({"lr": 1.0})
        svgd = SVGD(model, SharedBandwidth(h), optimizer, num_particles=6, max_plate_nesting=0, mode="multivariate")
        svgd.guide()  # creates the particles
        with torch.no_grad():
            pyro.param("svgd_particles").copy_(start[:, 0].reshape(pyro.param("svgd_particles").shape))
        svgd.step()
        moved = pyro.param("svgd_particles").detach().reshape(6, 3).clone()
    score = -(start - 1.0) / scale.square()
    ours = (start + svgd_direction(start, score))[:, 0]
    torch.testing.assert_close(ours, moved, rtol=1e-10, atol=1e-12)


def test_differentiable_once_and_twice():
    particles, score = cloud(4, 2, 2).requires_grad_(), cloud(4, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(svgd_direction, (particles, score))  # bandwidth included
    assert torch.autograd.gradgradcheck(svgd_direction, (particles, score))
    h = median_bandwidth(squared_distances(particles)).detach()
    (free,) = torch.autograd.grad(svgd_direction(particles, score).square().sum(), particles)
    (fixed,) = torch.autograd.grad(svgd_direction(particles, score, h).square().sum(), particles)
    assert (free - fixed).abs().max() > 1e-3  # the bandwidth does carry a gradient


def test_tasks_and_further_dimensions_are_independent():
    particles, score = torch.stack([cloud(), cloud(seed=2)], 1), torch.stack([cloud(seed=1), cloud(seed=3)], 1)
    together = svgd_direction(particles, score)
    for group in range(2):
        for task in range(3):
            alone = svgd_direction(particles[:, group, task, None], score[:, group, task, None])
            torch.testing.assert_close(together[:, group, task], alone[:, 0], rtol=1e-12, atol=1e-14)


def test_coinciding_particles():
    """All the same: the mean score, no repulsion, no NaN. Most the same: the mean distance is the bandwidth."""
    same = torch.full((4, 1, 3), 0.3).requires_grad_()
    score = cloud(4, 1, 3, dtype=torch.float32)
    direction = svgd_direction(same, score)
    torch.testing.assert_close(direction, score.mean(0, keepdim=True).expand(4, 1, 3))
    (slope,) = torch.autograd.grad(direction.square().sum(), same)
    assert slope.isfinite().all()
    lone = torch.zeros(5, 1, 2, dtype=F64)
    lone[-1] = 2.0  # 4 of the 10 pairs are √8 apart, the rest coincide
    torch.testing.assert_close(
        median_bandwidth(squared_distances(lone)), torch.tensor([3.2 / math.log(5)], dtype=F64), rtol=1e-12, atol=0
    )


def test_far_from_zero_in_single_precision():
    """A common shift does not blur distances."""
    exact = squared_distances(cloud(5, 2, 50))
    shifted = (cloud(5, 2, 50) * 2**10).round() / 2**10 + 2**8  # still exact in float32
    found = squared_distances(shifted.float())
    torch.testing.assert_close(found.double(), squared_distances(shifted), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("function", [rbf_kernel, lambda p: svgd_direction(p, p)])
def test_one_particle_is_refused(function):
    with pytest.raises(errors.OptionError, match="at least 2 particles"):
        function(cloud(1))
    with pytest.raises(errors.OptionError, match="MAML"):
        median_bandwidth(torch.zeros(1, 1, 3))
