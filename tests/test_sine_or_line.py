"""The sine-or-line family and its oracle, against brute force, Monte Carlo and its own frequencies."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.tasks import SineOrLine


def brute_force(observations, noise, size=600, line=(-3.0, 3.0)):
    """Log evidences of sinusoid and line by a product Gauss–Legendre rule in two dimensions, without closed forms."""
    import numpy as np

    node, weight = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(size))
    log_weight = (weight / 2).log()

    def integral(function, first, second):
        a = first[0] + (first[1] - first[0]) * (node + 1) / 2
        b = second[0] + (second[1] - second[0]) * (node + 1) / 2
        out = []
        for x, y, keep in zip(observations.x.double(), observations.y.double(), observations.full_mask()):
            total = torch.zeros(size, size, dtype=torch.float64)
            for point, value in zip(x[keep, 0], y[keep]):
                residual = (value - function(a[:, None], b, point)) / noise
                total = total - 0.5 * residual**2 - math.log(noise) - 0.5 * math.log(2 * math.pi)
            out.append((total + log_weight[:, None] + log_weight).logsumexp((0, 1)))
        return torch.stack(out)

    sine = integral(lambda a, b, x: a * torch.sin(x - b), (0.1, 5.0), (0.0, math.pi))
    return sine, integral(lambda a, b, x: a * x + b, line, line)


def ragged_support():
    """Three noisy points; of some tasks fewer, of one none."""
    batch = SineOrLine(0.5).sample(6, support=3, query=4, generator=4)
    mask = torch.arange(3) < torch.tensor([3, 3, 3, 2, 1, 0])[:, None]
    return bm.Observations(batch.support.x, batch.support.y, mask), batch.query


def test_the_family_is_the_published_one():
    batch, truth = SineOrLine().sample_with_truth(20_000, support=2, query=3, generator=1)
    is_line = truth["is_line"]
    assert abs(float(is_line.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    expected = {
        "amplitude": (~is_line, 0.1, 5.0),
        "phase": (~is_line, 0.0, math.pi),
        "slope": (is_line, -3.0, 3.0),
        "intercept": (is_line, -3.0, 3.0),
    }
    for name, (mine, low, high) in expected.items():
        assert truth[name][~mine].isnan().all()
        values = truth[name][mine].double()
        n, width = len(values), high - low
        assert low <= values.min() < low + 20 * width / n
        assert high - 20 * width / n < values.max() <= high
        assert abs(float(values.mean()) - (low + high) / 2) < 5 * width / math.sqrt(12 * n)
        # a uniform's squared deviation has standard deviation width² √(1/180)
        assert abs(float(values.var()) - width**2 / 12) < 5 * width**2 * math.sqrt(1 / 180 / n)
    x, y = batch.union().x.squeeze(-1).double(), batch.union().y.double()
    a, p, s, i = (truth[name].double()[:, None] for name in expected)
    residual = y - torch.where(is_line[:, None], s * x + i, a * torch.sin(x - p))
    n = residual.numel()
    assert abs(float(residual.mean())) < 5 * 0.3 / math.sqrt(n)
    assert abs(float(residual.var()) - 0.09) < 5 * 0.09 * math.sqrt(2 / n)


def test_evidence_and_probability_equal_brute_force():
    tasks = SineOrLine(0.5)
    support, _ = ragged_support()
    sine, line = brute_force(support, 0.5)
    # the product rule of 600 × 600 nodes is converged: 500 give the same
    torch.testing.assert_close(brute_force(support, 0.5, 500)[0], sine, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        tasks.log_evidence(support), torch.logaddexp(sine, line) - math.log(2), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(tasks.probability_line(support), torch.sigmoid(line - sine), rtol=0, atol=1e-8)
    assert tasks.probability_line(support)[5] == 0.5, "no support: the prior"
    # controls: other noise, and a wider box for the lines, differ
    assert (SineOrLine(0.4).log_evidence(support) - tasks.log_evidence(support))[:3].abs().min() > 1e-2
    wider = brute_force(support, 0.5, line=(-3.3, 3.3))[1]
    assert (torch.sigmoid(wider - sine) - tasks.probability_line(support))[:5].abs().max() > 1e-3


@pytest.mark.parametrize(("noise", "shots"), [(0.3, 1), (0.3, 5), (0.3, 60), (0.02, 5)])
def test_the_grid_has_converged(noise, shots):
    """Twice the panels change nothing: the error falls geometrically, so the difference bounds it."""
    tasks, finer, coarser = SineOrLine(noise), SineOrLine(noise), SineOrLine(noise)
    finer._refine = 2
    support = SineOrLine().sample(12, support=shots, query=3, generator=3).support
    x = torch.linspace(-5, 5, 7).reshape(1, 7, 1).expand(12, 7, 1)
    close = {"rtol": 1e-9, "atol": 1e-8}
    torch.testing.assert_close(tasks.log_evidence(support), finer.log_evidence(support), **close)
    torch.testing.assert_close(tasks.probability_line(support), finer.probability_line(support), **close)
    torch.testing.assert_close(tasks.predictive_mean(support, x), finer.predictive_mean(support, x), **close)
    if shots == 60:  # control: a coarse grid is seen
        coarser._grid = lambda sums, interval: SineOrLine._grid(coarser, sums._replace(curvature=0.0), interval)
        assert (coarser.log_evidence(support) - finer.log_evidence(support)).abs().max() > 1e-3


def test_supports_that_no_task_explains_stay_finite():
    """Far outside both boxes, in the tails of every closed form; and equal inputs, which leave the slope open."""
    tasks = SineOrLine()
    x = torch.tensor([[-4.0, 0.0, 4.0], [2.0, 2.0, 2.0], [math.pi / 2, math.pi / 2, -math.pi / 2]]).unsqueeze(-1)
    y = torch.tensor([[40.0, -30.0, 55.0], [60.0, 60.0, 60.0], [0.0, 0.0, 0.0]])
    support = bm.Observations(x, y)
    finer = SineOrLine()
    finer._refine = 3
    assert torch.isfinite(tasks.log_evidence(support)).all()
    torch.testing.assert_close(tasks.log_evidence(support), finer.log_evidence(support), rtol=1e-9, atol=1e-8)
    mean = tasks.predictive_mean(support, x)
    assert mean.abs().max() <= 18, "within what the family can reach: 3 · 5 + 3"
    # the line that passes nearest to 60 at x = 2 is the corner of the box: slope 3, intercept 3
    assert 8.5 < float(mean[1, 0]) <= 9


def test_predictive_equals_draws_from_the_prior_weighted_by_their_likelihood():
    """Importance sampling shares nothing with the grids; tolerance from the weighted draws."""
    tasks = SineOrLine(0.5)
    support, query = ragged_support()
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(4, 400_000, 1, generator=generator, dtype=torch.float64)
    amplitude, phase, slope, intercept = 0.1 + 4.9 * u[0], math.pi * u[1], 6 * u[2] - 3, 6 * u[3] - 3
    is_line = torch.arange(400_000).unsqueeze(-1) % 2 == 0

    def function(x):
        return torch.where(is_line, slope * x + intercept, amplitude * torch.sin(x - phase))

    mean, log_prob = tasks.predictive_mean(support, query.x), tasks.predictive_log_prob(support, query)
    for task in range(support.num_tasks):
        keep = support.full_mask()[task]
        residual = support.y[task, keep].double() - function(support.x[task, keep, 0].double())
        weight = (-0.5 * (residual / 0.5) ** 2).sum(-1).softmax(0)
        values = function(query.x[task, :, 0].double())
        density = torch.distributions.Normal(values, 0.5).log_prob(query.y[task].double()).exp()
        for ours, theirs in ((mean[task], values), (log_prob[task].exp(), density)):
            estimate = weight @ theirs
            error = (weight.square() @ (theirs - estimate).square()).sqrt()
            assert ((ours - estimate).abs() < 5 * error + 1e-12).all(), task
    # control: without the support the answer is another
    empty = bm.Observations(support.x[:, :0], support.y[:, :0])
    assert (tasks.predictive_mean(empty, query.x) - mean)[:3].abs().max() > 0.5


def test_joint_density_is_a_chain_of_marginal_ones():
    tasks = SineOrLine()
    batch = tasks.sample(20, support=3, query=2, generator=5)
    first = bm.Observations(batch.query.x[:, :1], batch.query.y[:, :1])
    second = bm.Observations(batch.query.x[:, 1:], batch.query.y[:, 1:])
    chain = tasks.predictive_log_prob(batch.support, first) + tasks.predictive_log_prob(
        bm.union(batch.support, first), second
    )
    joint = tasks.log_evidence(batch.union()) - tasks.log_evidence(batch.support)
    torch.testing.assert_close(chain.squeeze(-1), joint, rtol=1e-9, atol=1e-8)
    marginal = tasks.predictive_log_prob(batch.support, batch.query).sum(-1)
    assert (marginal - joint).abs().max() > 0.1, "control: points of a task are dependent"


def test_the_oracle_is_calibrated_on_its_own_tasks():
    """Of tasks with p(line) near p, a share of p are lines; and its mean is better than any other predictor here."""
    tasks = SineOrLine()
    batch, truth = tasks.sample_with_truth(1000, support=2, query=2, generator=6)
    p, is_line = tasks.probability_line(batch.support), truth["is_line"].double()
    # E (is_line − p) = 0 in each bin
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.0)):
        bin_ = (p >= low) & (p <= high)
        variance = (p * (1 - p))[bin_].sum()
        assert bin_.sum() > 10
        assert abs(float((is_line - p)[bin_].sum())) < 5 * float(variance.sqrt()) + 1e-6
    # control: overconfident odds are found out
    sharp = torch.sigmoid(3 * torch.logit(p.clamp(1e-12, 1 - 1e-12)))
    middle = (sharp > 0.01) & (sharp < 0.5)
    assert abs(float((is_line - sharp)[middle].sum())) > 5 * float((sharp * (1 - sharp))[middle].sum().sqrt())
    mean = tasks.predictive_mean(batch.support, batch.query.x)
    residual = batch.query.y - mean
    # orthogonality of a conditional mean: residuals are uncorrelated with any function of support and x
    for other in (mean, batch.support.y[:, :1], batch.query.x.squeeze(-1)):
        product = (residual * other).mean(-1)
        assert abs(float(product.mean())) < 5 * float(product.std()) / math.sqrt(1000)


def test_masked_observations_do_not_count():
    tasks = SineOrLine()
    batch = tasks.sample(4, support=4, query=3, generator=2)
    mask = torch.tensor([True, False, True, False]).expand(4, 4)
    masked = bm.Observations(batch.support.x, batch.support.y, mask)
    short = bm.Observations(batch.support.x[:, ::2], batch.support.y[:, ::2])
    torch.testing.assert_close(tasks.log_evidence(masked), tasks.log_evidence(short), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        tasks.predictive_mean(masked, batch.query.x), tasks.predictive_mean(short, batch.query.x), rtol=0, atol=1e-8
    )
    half = bm.Observations(batch.query.x, batch.query.y, torch.tensor([True, True, False]).expand(4, 3))
    log_prob = tasks.predictive_log_prob(batch.support, half)
    assert log_prob[:, 2].eq(0).all()
    torch.testing.assert_close(log_prob[:, :2], tasks.predictive_log_prob(batch.support, batch.query)[:, :2])


def test_many_tasks_are_taken_in_parts(monkeypatch):
    tasks = SineOrLine()
    batch = tasks.sample(9, support=3, query=2)
    whole = tasks.log_evidence(batch.support), tasks.predictive_mean(batch.support, batch.query.x)
    monkeypatch.setattr("bayesmeta.tasks.sine_or_line._CHUNK", 1)
    torch.testing.assert_close(tasks.log_evidence(batch.support), whole[0])
    torch.testing.assert_close(tasks.predictive_mean(batch.support, batch.query.x), whole[1])


def test_data_that_do_not_fit_are_refused():
    tasks = SineOrLine()
    batch = tasks.sample(2, support=3, query=2)
    with pytest.raises(errors.DataError, match=r"x of shape \[tasks, shots, 1\]"):
        tasks.log_evidence(bm.Observations(batch.support.x.expand(2, 3, 2), batch.support.y))
    with pytest.raises(errors.DataError, match="None"):
        tasks.probability_line(batch.support.with_y(None))
    with pytest.raises(errors.ShapeError, match=r"\[2, shots, 1\]"):
        tasks.predictive_mean(batch.support, batch.query.x[:1])
