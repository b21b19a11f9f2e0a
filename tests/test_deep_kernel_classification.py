"""Deep kernels of classes: against dense numpy, GPyTorch, scipy and Monte Carlo; what training gives; bad input."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from pyro.infer import Trace_ELBO

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models.deep_kernel import JITTER
from bayesmeta.models.likelihoods import Bernoulli, Categorical, Poisson
from bayesmeta.ops.probit import log_probability_largest

F32, F64 = torch.float32, torch.float64
LINKS = ("probit", "sigmoid")
#: the likelihood and how many labels it has
KINDS = {"bernoulli": (Bernoulli, 2), "two": (lambda: Categorical(2), 2), "four": (lambda: Categorical(4), 4)}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_link = pytest.mark.parametrize("link", LINKS)


def deep_kernel(kind="four", link="probit", dtype=F64, features=2, objective="evidence", **options):
    likelihood = KINDS[kind][0]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(features, [8, 5], likelihood.num_outputs(1), activation="tanh")
    model = bm.NeuralTaskModel(network, likelihood, "point")
    return bm.DeepKernel(model, link=link, objective=objective, **options).to(dtype)


def batch_of(kind="four", tasks=4, support=9, query=6, ragged=False, seed=0, dtype=F64, whole=True):
    """Classes by the angle of x from a centre of the task's own; some at random. Labels are integers, or whole."""
    labels, generator = KINDS[kind][1], torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, support + query, 2, generator=generator, dtype=F64)
    centre, turn = (
        torch.randn(tasks, 1, 2, generator=generator, dtype=F64) / 3,
        torch.rand(tasks, 1, generator=generator),
    )
    angle = torch.atan2(*(x - centre).unbind(-1)) / (2 * math.pi) + 0.5
    y = ((angle + turn) * labels).long() % labels
    noise = torch.randint(labels, y.shape, generator=generator)
    y = torch.where(torch.rand(y.shape, generator=generator) < 0.1, noise, y)
    y, x = y if whole else y.to(dtype), x.to(dtype)
    first, rest = slice(None, support), slice(support, None)
    mask = keep = None
    if ragged:
        sizes = torch.tensor([support, support // 2, 1, 0] * tasks)[:tasks, None]
        mask, keep = torch.arange(support) < sizes, torch.arange(query) < sizes.roll(1, 0).clamp(min=1)
    return bm.TaskBatch(
        bm.Observations(x[:, first], y[:, first], mask), bm.Observations(x[:, rest], y[:, rest], keep), population=tasks
    )


def targets_of(kind, y):
    """±1 in numpy, ``[shots, columns]``."""
    y = np.asarray(y)
    columns = [1] if kind == "bernoulli" else range(KINDS[kind][1])
    return np.stack([np.where(y == k, 1.0, -1.0) for k in columns], -1)


def probabilities(fn):
    """``[tasks, shots, labels]`` of a Categorical or Bernoulli."""
    return fn.probs if fn.probs.dim() == 3 else torch.stack([1 - fn.probs, fn.probs], -1)


def state(posterior):
    return torch.cat([v.flatten() for v in posterior.state().values()])


# -- the regression on ±1 -----------------------------------------------------------------------------------------


def rbf(a, b, length_scale):
    return np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(-1) / length_scale**2)


def cosine(a, b):
    return a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))


def dense(kind, observations, x, length_scale, variance, mean, noise):
    """Evidence, mean and variance of the functions at x of one task, by an inverse and a determinant in numpy."""

    def kernel(a, b):
        return variance * (cosine(a, b) if length_scale is None else rbf(a, b, length_scale))

    keep = observations.full_mask()[0].numpy()
    s, y = observations.x[0].numpy()[keep], targets_of(kind, observations.y[0][keep]) - mean
    covariance = kernel(s, s) + (noise**2 + JITTER * variance) * np.eye(len(s))
    inverse, cross = np.linalg.inv(covariance), kernel(np.asarray(x), s)
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1] if len(s) else 0.0
    evidence = sum(-0.5 * column @ inverse @ column - 0.5 * log_det for column in y.T)
    return evidence, mean + cross @ inverse @ y, variance - np.einsum("ij,jk,ik->i", cross, inverse, cross)


@pytest.mark.parametrize("ragged", [False, True])
@each_kind
def test_evidence_and_functions_by_dense_algebra(kind, ragged):
    """Of each class, float64; control: another length scale is far off."""
    method = deep_kernel(kind, inputs="raw", noise=0.25)
    gp, batch = method.gp, batch_of(kind, ragged=ragged)
    gp.kernel.base_kernel.lengthscale, gp.kernel.outputscale = 0.7, 1.3
    torch.nn.init.constant_(gp.mean, -0.2)
    numbers = [gp.kernel.base_kernel.lengthscale, gp.kernel.outputscale, gp.mean, gp.noise_variance.sqrt()]
    numbers = [number.item() for number in numbers]  # GPyTorch has rounded them
    assert numbers == pytest.approx([0.7, 1.3, -0.2, 0.25])
    posterior, loss = method.adapt(batch.support), method.loss(batch)
    latent, joint = posterior.latent(batch.query.x), []
    for task in range(4):
        one = batch.tasks([task])
        evidence, mean, variance = dense(kind, one.support, one.query.x[0], *numbers)
        off = dense(kind, one.support, one.query.x[0], 0.8, *numbers[1:])
        joint.append(dense(kind, one.union(), one.query.x[0], *numbers)[0])
        close = {"rtol": 1e-8, "atol": 1e-8}
        np.testing.assert_allclose(posterior.log_evidence[task], evidence, **close)
        np.testing.assert_allclose(latent.mean[task], mean, **close)
        np.testing.assert_allclose(latent.variance[task], np.repeat(variance[:, None], mean.shape[1], 1), **close)
        if one.support.full_mask().sum() > 1:
            assert np.abs(off[1] - mean).max() > 1e-3
            assert abs(off[0] - evidence) > 1e-3
    np.testing.assert_allclose(loss.item(), -np.mean(joint), rtol=1e-8)
    other = deep_kernel(kind, inputs="raw", noise=0.25, objective="predictive")
    other.program = method.program
    np.testing.assert_allclose(other.loss(batch).item(), posterior.log_evidence.mean().item() + loss.item(), rtol=1e-8)


@pytest.mark.parametrize("inputs", ["raw", "features"])
def test_the_cosine_kernel_by_dense_algebra(inputs):
    method, batch = deep_kernel("four", kernel="cosine", inputs=inputs, noise=0.5), batch_of("four", tasks=1)
    gp, x = method.gp, batch.query.x
    posterior = method.adapt(batch.support)
    numbers = [None, gp.kernel.outputscale.item(), gp.mean.item(), gp.noise_variance.sqrt().item()]
    with torch.no_grad():
        support, points = bm.Observations(gp.points(batch.support), batch.support.y), gp.points(batch.query)
    evidence, mean, variance = dense("four", support, points[0], *numbers)
    np.testing.assert_allclose(posterior.log_evidence[0], evidence, rtol=1e-8, atol=1e-8)
    latent = posterior.latent(x)
    np.testing.assert_allclose(latent.mean[0], mean, rtol=1e-6, atol=1e-6)  # rank 2 or 5, and the jitter
    np.testing.assert_allclose(latent.variance[0, :, 0], variance, rtol=1e-5, atol=1e-6)
    off = dense("four", support, points[0], 0.7, *numbers[1:])
    assert abs(off[0] - evidence) > 1e-3  # control: another kernel
    if inputs == "raw":  # the length of x does not count
        further = method.adapt(bm.Observations(3 * batch.support.x, batch.support.y)).latent(0.5 * x)
        torch.testing.assert_close(further.mean, latent.mean, rtol=1e-6, atol=1e-6)


def test_evidence_and_functions_by_gpytorch():
    """One ExactGP for each class on the same features, as the released code has them; kernel Matérn."""
    import gpytorch

    method, batch = deep_kernel("four", kernel="matern52", noise=0.4), batch_of("four", tasks=1)
    gp, support = method.gp, batch.support
    posterior = method.adapt(support)
    with torch.no_grad():
        features, new = gp.points(support)[0], gp.points(batch.query)[0]

    class ExactGP(gpytorch.models.ExactGP):
        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(gp.mean.expand(len(x)), gp.kernel(x))

    total = 0.0
    for k in range(4):
        targets = torch.as_tensor(targets_of("four", support.y[0])[:, k])
        noise = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.full((9,), 0.16, dtype=F64))
        exact = ExactGP(features, targets, noise).double()
        total = total + noise(exact(features)).log_prob(targets)
        exact.eval()
        expected, found = exact(new), posterior.latent(batch.query.x)
        torch.testing.assert_close(found.mean[0, :, k], expected.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.variance[0, :, k], expected.variance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.log_evidence[0], total.detach(), rtol=1e-6, atol=1e-6)


@each_kind
def test_gradients_by_finite_differences(kind):
    method, batch = deep_kernel(kind), batch_of(kind, ragged=True)
    method.prepare(batch)
    method.loss(batch).backward()
    generator = torch.Generator().manual_seed(1)
    parameters = dict(method.named_parameters())
    assert any("target_noise" in name for name in parameters)
    for p in parameters.values():
        direction, values = torch.randn(p.shape, generator=generator, dtype=F64), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
                values.append(method.loss(batch))
                p -= sign * 1e-5 * direction
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(slope, (p.grad * direction).sum(), rtol=1e-5, atol=1e-6)


@each_kind
def test_the_elbo_of_model_and_guide_is_the_evidence(kind):
    method, batch = deep_kernel(kind), batch_of(kind, ragged=True)
    elbo = Trace_ELBO().loss(method.model, method.guide, batch)
    assert elbo == pytest.approx(4 * method.loss(batch).item(), rel=1e-9)


def test_bayes_rule_in_draws():
    """log p(±1, u) − log p(u | ±1) is the evidence, for every u: likelihood, prior and posterior fit one another."""
    method = deep_kernel("four", kernel="matern12", inputs="raw")  # rough: the jitter counts for nothing
    posterior = method.adapt(batch_of("four", ragged=True).support)
    draws = posterior.draws(5, 1)
    evidence = posterior.log_joint(draws) - posterior.log_prob(draws.u)
    torch.testing.assert_close(evidence, posterior.log_evidence.expand(5, -1), rtol=1e-5, atol=1e-5)


# -- from functions to classes ------------------------------------------------------------------------------------


def integral(mean, k):
    """P(z_k is the largest) on a fine grid of z, by scipy's CDF."""
    z = np.linspace(mean.min() - 12, mean.max() + 12, 20_001)[:, None]
    others = np.delete(mean, k)
    return scipy.integrate.trapezoid(
        scipy.stats.norm.pdf(z[:, 0], mean[k]) * scipy.special.ndtr(z - others).prod(-1), z[:, 0]
    )


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("classes", [2, 3, 6, 15])
def test_the_largest_of_several_by_quadrature(classes, spread):
    mean = spread * torch.randn(3, classes, generator=torch.Generator().manual_seed(classes), dtype=F64)
    found = log_probability_largest(mean)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, dtype=F64), rtol=0, atol=1e-8)
    for row, k in itertools.product(range(3), range(classes)):
        expected = integral(mean[row].numpy(), k)
        if expected > 1e-20:
            assert found[row, k].item() == pytest.approx(math.log(expected), rel=0, abs=1e-6)
    alone = log_probability_largest(mean, torch.full((3,), classes - 1))
    torch.testing.assert_close(alone, found[:, -1], rtol=0, atol=0)


def test_the_largest_of_several_in_the_tails():
    """A third class that has no chance leaves two, whose probability has a closed form down to any size."""
    for gap in (3.0, 10.0, 18.0):
        mean = torch.tensor([0.0, gap, gap - 300.0], dtype=F64)
        expected = scipy.stats.norm.logcdf(-gap / math.sqrt(2))
        assert log_probability_largest(mean)[0].item() == pytest.approx(expected, abs=0.02)
    assert log_probability_largest(torch.tensor([0.0, 0.0, -1000.0])).isfinite().all()


@each_kind
def test_probit_is_the_largest_noisy_target(kind):
    """Against draws of the targets under the posterior; control: without the function's own variance it is off."""
    method, batch, n = deep_kernel(kind, noise=0.2), batch_of(kind), 20_000
    posterior = method.adapt(batch.support)
    latent = posterior.latent(batch.query.x)
    noise = torch.randn(n, *latent.mean.shape, generator=torch.Generator().manual_seed(2), dtype=F64)

    def frequencies(variance):
        z = latent.mean + noise * variance.sqrt()
        label = (z[..., 0] > 0).long() if kind == "bernoulli" else z.argmax(-1)
        return torch.nn.functional.one_hot(label, KINDS[kind][1]).double().mean(0)

    p = probabilities(posterior.predictive(batch.query.x))
    error = (p * (1 - p) / n).sqrt() + 1 / n  # what is expected less than once may happen a few times
    assert ((frequencies(latent.variance + 0.04) - p).abs() < 5 * error).all()
    assert ((frequencies(torch.full_like(latent.variance, 0.04)) - p).abs() > 5 * error).any()


@each_kind
def test_sigmoid_is_the_papers_formula(kind):
    """Of the means alone; and both links, as the paper, choose the class of the largest mean."""
    batch = batch_of(kind)
    posteriors = {link: deep_kernel(kind, link).adapt(batch.support) for link in LINKS}
    m = posteriors["sigmoid"].latent(batch.query.x).mean
    p = torch.sigmoid(m)
    expected = torch.cat([1 - p, p], -1) if kind == "bernoulli" else p / p.sum(-1, keepdim=True)
    found = {link: probabilities(posterior.predictive(batch.query.x)) for link, posterior in posteriors.items()}
    torch.testing.assert_close(found["sigmoid"], expected, rtol=1e-12, atol=1e-12)
    chosen = (m[..., 0] > 0).long() if kind == "bernoulli" else m.argmax(-1)
    for link in LINKS:
        assert torch.equal(found[link].argmax(-1), chosen)
    assert (found["probit"] - found["sigmoid"]).abs().max() > 0.1
    point = posteriors["sigmoid"]
    drawn = point.class_probabilities(batch.query.x, draws=point.draws(3))
    torch.testing.assert_close(drawn, expected, rtol=1e-9, atol=1e-9)
    before = point.class_probabilities(batch.query.x, draws=point.prior_draws(3))
    torch.testing.assert_close(before, torch.full_like(before, 1 / KINDS[kind][1]), rtol=1e-9, atol=1e-9)


def test_two_classes_and_a_bernoulli_agree_in_the_papers_link():
    """Two functions of opposite targets are one another's negative: σ(m) / (σ(m) + σ(−m)) = σ(m)."""
    batch = batch_of("two")
    p = [
        probabilities(deep_kernel(k, "sigmoid").adapt(batch.support).predictive(batch.query.x))
        for k in ("two", "bernoulli")
    ]
    torch.testing.assert_close(p[0], p[1], rtol=1e-12, atol=1e-12)


@each_link
def test_the_order_of_the_classes_does_not_matter(link):
    method, batch = deep_kernel("four", link), batch_of("four", ragged=True)
    order = torch.tensor([2, 0, 3, 1])
    other = bm.TaskBatch(*(part.with_y(order[part.y]) for part in (batch.support, batch.query)), population=4)
    first, second = (probabilities(method.adapt(b.support).predictive(b.query)) for b in (batch, other))
    torch.testing.assert_close(second[..., order], first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method.loss(other), method.loss(batch), rtol=1e-12, atol=0)
    assert (second - first).abs().max() > 0.1  # control


@each_link
@each_kind
def test_probabilities_without_a_support_or_with_a_class_missing(kind, link):
    method, batch = deep_kernel(kind, link), batch_of(kind, ragged=True)
    labels = KINDS[kind][1]
    p = probabilities(method.adapt(batch.support).predictive(batch.query))
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 6, dtype=F64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p[3], torch.full((6, labels), 1 / labels, dtype=F64), rtol=1e-9, atol=1e-9)
    empty = bm.Observations(torch.zeros(4, 0, 2, dtype=F64), torch.zeros(4, 0, dtype=torch.long))
    p = probabilities(method.adapt(empty).predictive(batch.query))
    torch.testing.assert_close(p, torch.full_like(p, 1 / labels), rtol=1e-9, atol=1e-9)
    all_zero = batch.support.with_y(torch.zeros_like(batch.support.y))  # the others are missing
    p = probabilities(method.adapt(all_zero).predictive(all_zero))[0]
    assert p.isfinite().all()
    assert (p[:, 0] > p[:, 1:].amax(-1)).all()
    torch.testing.assert_close(p[:, 1:], p[:, -1:].expand(-1, labels - 1), rtol=1e-9, atol=1e-9)  # none is preferred


def test_the_program_draws_what_the_prior_predicts():
    """Labels of the Pyro program without y, and the probability without a support: Φ(mean / √(variance + noise²))."""
    method = deep_kernel("bernoulli", noise=0.5)
    torch.nn.init.constant_(method.gp.mean, 0.4)
    x = torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    empty = bm.Observations(x[:, :0], torch.zeros(4000, 0, dtype=F64))
    p = method.adapt(empty).predictive(x).probs
    with torch.random.fork_rng():
        torch.manual_seed(1)
        y = method.program(x)
    assert y.shape == (4000, 1)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert abs(y.mean() - p.mean()) < 5 * (p.mean() * (1 - p.mean()) / 4000).sqrt()
    assert p.mean() > 0.6  # control: the mean counts
    labels = deep_kernel("four").program(x[:5])
    assert labels.shape == (5, 1)
    assert not labels.is_floating_point()


# -- draws --------------------------------------------------------------------------------------------------------


@each_kind
def test_log_likelihood_and_predictive_agree(kind):
    """The mean density over draws is the predictive one; control: a draw's own density is another."""
    method, batch, n = deep_kernel(kind, noise=0.4), batch_of(kind, ragged=True), 8000
    posterior = method.adapt(batch.support)
    each = posterior.log_likelihood(batch.query, draws=posterior.draws(n, 2)).exp()
    keep = batch.query.mask
    expected = posterior.predictive(batch.query).log_prob(batch.query.y.to(F64)).exp()
    error = each.std(0) / n**0.5 + 1e-9
    assert ((each.mean(0) - expected).abs() < 5 * error)[keep].all()
    assert ((each.mean(0) * 1.1 - expected).abs() > 5 * error)[keep].any()
    assert (each[:, ~keep] == 1).all()  # its logarithm is 0
    p = posterior.class_probabilities(batch.query)
    torch.testing.assert_close(p, probabilities(posterior.predictive(batch.query)), rtol=1e-9, atol=1e-9)
    drawn = posterior.class_probabilities(batch.query, draws=posterior.draws(4000, 3))
    assert (drawn - p).abs().max() < 5 * 0.5 / 4000**0.5
    y = posterior.predict(batch.query, n, generator=4)
    assert y.shape == (n, 4, 6)
    frequency = torch.stack([(y == k).double().mean(0) for k in range(KINDS[kind][1])], -1)
    assert ((frequency - p).abs() < 5 * ((p * (1 - p) / n).sqrt() + 1 / n)).all()


def test_labels_of_several_points_depend_on_one_another():
    """The joint probability by log-likelihoods is the frequency in joint draws; the product of the marginals is not."""
    method, n = deep_kernel("two", inputs="raw", noise=0.2), 20_000
    method.gp.kernel.base_kernel.lengthscale = 1.0
    support = bm.Observations(torch.zeros(1, 1, 2, dtype=F64), torch.zeros(1, 1, dtype=torch.long))
    x = torch.tensor([[[2.5, 0.0], [2.6, 0.3], [2.4, -0.2]]], dtype=F64)
    posterior = method.adapt(support)
    p = posterior.predictive(x).probs[0, :, 1].prod()
    query = bm.Observations(x, torch.ones(1, 3, dtype=torch.long))
    each = posterior.log_likelihood(query, draws=posterior.draws(n, 1)).sum(-1).exp()
    joint = (posterior.predict(x, n, generator=2) == 1).all(-1).double()
    error = math.hypot(each.std() / n**0.5, joint.std() / n**0.5)
    assert abs(each.mean() - joint.mean()) < 5 * error
    assert abs(p - joint.mean()) > 10 * error
    with pytest.raises(errors.NoClosedFormError, match="depend on one another"):
        posterior.predictive(x, joint=True)
    paper = deep_kernel("two", "sigmoid").adapt(support).predictive(x, joint=True)
    assert (paper.batch_shape, paper.event_shape) == ((1,), (3,))


def test_log_likelihood_of_the_support_is_of_the_draws_own_functions():
    method, batch = deep_kernel("four", kernel="matern12", inputs="raw", noise=0.4), batch_of("four")
    posterior = method.adapt(batch.support)
    draws = posterior.draws(50, 1)
    f = posterior.named(draws)["f"]
    assert f.shape == (50, 4, 9, 4)
    expected = log_probability_largest(f / 0.4, batch.support.y)
    torch.testing.assert_close(
        posterior.log_likelihood(batch.support, draws=draws), expected, rtol=0, atol=0.02
    )  # jitter
    mean, latent = f.mean(0), posterior.latent(batch.support.x)
    assert ((mean - latent.mean).abs() < 5 * latent.stddev / 50**0.5 + 1e-6).all()


def test_in_slices_points_do_not_share_noise():
    posterior = deep_kernel("two").adapt(batch_of("two").support)
    draws, query = posterior.draws(4, 1), batch_of("two").query
    half = [bm.Observations(query.x[:, i], query.y[:, i]) for i in (slice(0, 3), slice(3, 6))]
    again = bm.Observations(half[0].x, half[0].y)
    first, second, third = (posterior.log_likelihood(o, draws=draws) for o in (*half, again))
    assert torch.equal(first, third)
    same = bm.Observations(half[0].x + 1e-9, half[0].y)
    assert not torch.allclose(posterior.log_likelihood(same, draws=draws), first, atol=1e-6)
    assert second.shape == first.shape


# -- what one wants of it -----------------------------------------------------------------------------------------


def half_planes(tasks, shots, seed, features=6):
    """Two classes by a line through a hidden plane of the inputs: its direction and offset are the task's own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, shots, features, generator=generator)
    basis, _ = torch.linalg.qr(torch.randn(features, 2, generator=torch.Generator().manual_seed(123)))
    angle, offset = (
        2 * math.pi * torch.rand(tasks, 1, generator=generator),
        0.5 * torch.randn(tasks, 1, generator=generator),
    )
    hidden = x @ basis
    return x, (hidden[..., 0] * angle.cos() + hidden[..., 1] * angle.sin() > offset).long()


class HalfPlanes:
    """Batches of them; ``shuffled`` labels say nothing of x."""

    num_tasks = None

    def __init__(self, shuffled=False):
        self.shuffled = shuffled

    def sample(self, num_tasks, *, support, query, generator=None):
        x, y = half_planes(num_tasks, support + query, int(torch.randint(2**40, (), generator=generator)))
        if self.shuffled:
            y = y.gather(1, torch.rand(y.shape, generator=generator).argsort(1))
        parts = [bm.Observations(x[:, i], y[:, i]) for i in (slice(None, support), slice(support, None))]
        return bm.TaskBatch(*parts)


@each_link
@each_kind
def test_a_separable_task_with_many_points_is_learned(kind, link):
    """Bands of x; and the more points, the better. Control: labels that do not belong to the points."""
    labels, generator = KINDS[kind][1], torch.Generator().manual_seed(0)
    x = 2 * torch.rand(5, 400, 2, generator=generator, dtype=F64) - 1
    place = (x[..., 0] + 1) * labels / 2
    y = place.long().clamp(max=labels - 1)
    x[..., 0] += ((place - place.floor()) - 0.5) * -0.4 * 2 / labels  # a gap between the bands
    method = deep_kernel(kind, link, inputs="raw")
    method.gp.kernel.base_kernel.lengthscale = 0.3
    query = bm.Observations(x[:, 300:], y[:, 300:])
    found = []
    for shots in (3, 20, 300):
        support = bm.Observations(x[:, :shots], y[:, :shots])
        found.append(bm.scores(method.adapt(support), bm.TaskBatch(support, query), num_samples=20))
    assert found[2]["accuracy"] > 0.995
    assert found[0]["nll"] > found[1]["nll"] > found[2]["nll"]
    if link == "probit":
        assert found[2]["nll"] < 0.1
    wrong = bm.Observations(x[:, :300], y[:, :300].roll(57, 1))
    nonsense = bm.scores(method.adapt(wrong), bm.TaskBatch(wrong, query), num_samples=20)
    assert abs(nonsense["accuracy"] - 1 / labels) < 0.1


@pytest.mark.parametrize("kind", ["bernoulli", "two"])
def test_training_lifts_accuracy_and_log_score(kind):
    """Held-out tasks, paired, 4 standard errors; controls: untrained, and trained on labels that say nothing."""
    x, y = half_planes(150, 30, seed=99)
    held_out = bm.TaskBatch(bm.Observations(x[:, :10], y[:, :10]), bm.Observations(x[:, 10:], y[:, 10:]))

    def trained(steps, shuffled=False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = bm.nets.mlp(6, [16, 2], 1 if kind == "bernoulli" else 2, activation="tanh")
        method = bm.DeepKernel(bm.NeuralTaskModel(network, KINDS[kind][0](), "point"))
        if steps:
            options = {"steps": steps, "tasks_per_step": 16, "support": 10, "query": 10, "progress": False}
            adam = lambda p: torch.optim.Adam(p, 1e-2)  # noqa: E731
            bm.fit(method, HalfPlanes(shuffled), optimizer=adam, device="cpu", dtype=F32, **options)
        return bm.scores(method.adapt(held_out.support), held_out, num_samples=50)

    untrained, good, nothing = trained(0), trained(100), trained(30, shuffled=True)
    for name, sign in (("accuracy", 1), ("nll", -1)):
        for other in (untrained, nothing):
            gain = sign * (good.per_task[name] - other.per_task[name])
            assert gain.mean() > 4 * gain.std() / 150**0.5, (name, gain.mean())
    assert good["accuracy"] > 0.8
    chance = nothing.per_task["accuracy"] - untrained.per_task["accuracy"]
    assert chance.mean() < 4 * chance.std() / 150**0.5  # nothing was there to learn


# -- the contract -------------------------------------------------------------------------------------------------


@each_link
@each_kind
def test_tasks_padding_and_generators(kind, link):
    """No task sees another, padding never counts, one seed gives one result, and a task alone is as in its batch."""
    method, batch = deep_kernel(kind, link), batch_of(kind, ragged=True)
    posterior, query = method.adapt(batch.support, generator=3), batch.query
    assert torch.equal(state(posterior), state(method.adapt(batch.support, generator=3)))
    assert torch.equal(posterior.predict(query, 5, generator=1), posterior.predict(query, 5, generator=1))
    assert not state(posterior).requires_grad
    assert torch.equal(method.loss(batch, generator=1), method.loss(batch, generator=2))
    whole = batch.support.with_y(batch.support.y.to(F64))
    assert torch.equal(state(posterior), state(method.adapt(whole)))  # whole numbers are labels as integers are

    y = batch.support.y.clone()
    y[0] = (y[0] + 1) % KINDS[kind][1]
    other = method.adapt(batch.support.with_y(y))
    assert torch.equal(other.predictive(query).logits[1:], posterior.predictive(query).logits[1:])
    assert not torch.equal(other.predictive(query).logits[0], posterior.predictive(query).logits[0])

    def garbage(part):
        x = torch.where(part.mask.unsqueeze(-1), part.x, 7.0)
        return bm.Observations(x, torch.where(part.mask, part.y, 9), part.mask)

    padded = bm.TaskBatch(garbage(batch.support), garbage(query), population=4)
    assert torch.equal(state(method.adapt(padded.support)), state(posterior))
    torch.testing.assert_close(method.loss(padded), method.loss(batch), rtol=1e-12, atol=0)
    first, second = (bm.scores(posterior, b, num_samples=20) for b in (batch, padded))
    for name in first:
        torch.testing.assert_close(first.per_task[name], second.per_task[name], rtol=1e-9, atol=1e-9)
    tasks = bm.TaskBatch(batch.support, query, torch.tensor([0, 1, 2, -1]), population=4)
    torch.testing.assert_close(method.loss(tasks), method.loss(batch.tasks([0, 1, 2])), rtol=1e-12, atol=0)

    alone = method.adapt(batch.support.tasks([1]))
    for key, value in alone.state().items():
        torch.testing.assert_close(value, posterior.state()[key][[1]], rtol=1e-9, atol=1e-10)


@each_kind
def test_no_support_is_the_prior(kind):
    method, batch = deep_kernel(kind), batch_of(kind)
    masked = bm.Observations(batch.support.x, batch.support.y, torch.zeros(4, 9, dtype=torch.bool))
    empty = bm.Observations(batch.support.x[:, :0], batch.support.y[:, :0])
    for support in (masked, empty):
        posterior = method.adapt(support)
        mean, scale = method.program.prior_moments(support)
        torch.testing.assert_close(posterior.loc, mean)
        torch.testing.assert_close(
            posterior.covariance.diagonal(dim1=-2, dim2=-1), torch.ones(4, support.shots, dtype=F64)
        )
        torch.testing.assert_close(posterior.log_evidence, torch.zeros(4, dtype=F64))
        assert scale.eq(1).all()
        assert posterior.predict(batch.query, 3).shape == (3, 4, 6)
        assert posterior.sample(2)["f"].shape[:3] == (2, 4, support.shots)
        method.zero_grad()
        method.loss(bm.TaskBatch(support, batch.query)).backward()
        assert all(p.grad.isfinite().all() for p in method.parameters())
    nothing = bm.Observations(batch.query.x[:, :0], batch.query.y[:, :0])
    assert method.adapt(batch.support).predictive(nothing).batch_shape == (4, 0)


@each_link
@each_kind
def test_both_dtypes(kind, link):
    """Single precision gives the same up to its rounding, in its own dtype."""
    found = {}
    for dtype in (F32, F64):
        method, batch = deep_kernel(kind, link, dtype), batch_of(kind, ragged=True, dtype=dtype)
        posterior = method.adapt(batch.support)
        assert state(posterior).dtype == dtype
        assert posterior.predictive(batch.query).logits.dtype == dtype
        assert posterior.log_likelihood(batch.query, 3).dtype == dtype
        assert posterior.named(posterior.draws(2))["f"].dtype == dtype
        method.loss(batch).backward()
        slope = torch.cat([p.grad.flatten() for p in method.parameters()])
        assert slope.dtype == dtype
        found[dtype] = (
            probabilities(posterior.predictive(batch.query)).double(),
            method.loss(batch).double(),
            slope.double(),
        )
    for single, exact in zip(found[F32], found[F64]):
        torch.testing.assert_close(single, exact, rtol=1e-3, atol=1e-3)


@each_link
@each_kind
def test_scores_export_files_and_pictures(kind, link, tmp_path):
    method, batch = deep_kernel(kind, link), batch_of(kind, ragged=True)
    posterior = method.adapt(batch.support)
    result = bm.scores(posterior, batch, num_samples=30)
    assert list(result) == ["nll", "nll_joint", "accuracy", "brier"]
    fn, keep = posterior.predictive(batch.query), batch.query.mask
    nll = torch.where(keep, -fn.log_prob(batch.query.y.to(F64)), 0.0).sum(-1) / keep.sum(-1)
    torch.testing.assert_close(result.per_task["nll"], nll, rtol=1e-6, atol=1e-9)
    right = (probabilities(fn).argmax(-1) == batch.query.y).double()
    accuracy = torch.where(keep, right, 0.0).sum(-1) / keep.sum(-1)
    torch.testing.assert_close(result.per_task["accuracy"], accuracy)
    assert result.num_samples == (0 if link == "sigmoid" else 30)
    tree = bm.to_datatree(posterior, batch, num_samples=20)
    assert tree.attrs["target_kind"] == "class"
    assert ("log_likelihood" in tree.children) == (link == "probit")
    labels = set(range(KINDS[kind][1]))
    for group in ("posterior_predictive", "prior_predictive", "predictions"):
        assert set(np.unique(tree[group]["y"].values)) <= labels
    assert tree["posterior"]["f"].shape[:3] == (1, 20, 4)
    posterior.save(tmp_path / "posterior.pt")
    again = bm.load_posterior(tmp_path / "posterior.pt", method.program)
    assert isinstance(again, bm.GPLabelsPosterior)
    assert torch.equal(again.predictive(batch.query).logits, fn.logits)
    assert again.is_point == posterior.is_point == (link == "sigmoid")


def test_a_fit_and_its_checkpoint(tmp_path):
    tasks = HalfPlanes()
    method = deep_kernel("two", dtype=F32, features=6)
    bm.fit(method, tasks, steps=3, support=5, query=5, out=tmp_path / "run", progress=False, device="cpu", dtype=F32)
    batch = tasks.sample(2, support=5, query=5, generator=torch.Generator().manual_seed(0))
    again = bm.load_method(tmp_path / "run", deep_kernel("two", dtype=F32, features=6), batch)
    assert torch.equal(again.loss(batch), method.loss(batch))
    assert method.config()["link"] == "probit"
    with pytest.raises(errors.CheckpointError):
        bm.load_method(tmp_path / "run", deep_kernel("bernoulli", dtype=F32, features=6), batch)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
def test_leave_one_out_needs_draws():
    import arviz_stats

    batch = batch_of("four", tasks=3, support=12)
    found = bm.loo(deep_kernel("four", noise=0.6).adapt(batch.support), batch, num_samples=400, generator=1)
    assert isinstance(found, arviz_stats.utils.ELPDData)
    assert 36 * math.log(0.25) < found.elpd < 0
    with pytest.raises(errors.UnsupportedError, match="point estimate"):
        bm.loo(deep_kernel("four", "sigmoid").adapt(batch.support), batch)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for link in LINKS:
        posterior = deep_kernel("four", link).adapt(batch_of("four").support)
        posterior.predict(batch_of("four").query, 3)
        posterior.log_likelihood(batch_of("four").query, 3)
    assert torch.equal(torch.get_rng_state(), before)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [4.0, -1.0, 0.5])
def test_what_is_no_label_is_refused(value):
    method, batch = deep_kernel("four"), batch_of("four", whole=False)
    y = batch.support.y.clone()
    y[2, 1] = value
    with pytest.raises(errors.DataError, match=rf"y = {value} of task 2, shot 1 "):
        method.adapt(batch.support.with_y(y))
    method.adapt(batch.support)
    with pytest.raises(errors.DataError, match=r"of task 2, shot 1 "):
        method.loss(bm.TaskBatch(batch.query, batch.support.with_y(y)))
    with pytest.raises(errors.DataError, match=r"of task 2, shot 1 "):
        method.adapt(batch.query).log_likelihood(batch.support.with_y(y))
    with pytest.raises(errors.DataError, match=r"of task 0, shot 0 "):
        deep_kernel("bernoulli").adapt(batch.support.with_y(y.masked_fill(y > -9, 2.0)))
    with pytest.raises(errors.ShapeError, match="targets"):
        method.adapt(bm.Observations(batch.support.x, torch.zeros(4, 9, 4, dtype=F64)))


class OwnCategorical(Categorical):
    """A subclass, whose outputs may mean something else."""


def test_what_it_refuses():
    def model(likelihood, outputs):
        return bm.NeuralTaskModel(bm.nets.mlp(2, [4], outputs), likelihood, "point")

    for likelihood in (Poisson(), OwnCategorical(3)):
        with pytest.raises(errors.UnsupportedError, match="needs a Gaussian likelihood, or labels"):
            bm.DeepKernel(model(likelihood, 3 if isinstance(likelihood, Categorical) else 1))
    with pytest.raises(errors.ShapeError, match="4 classes"):
        bm.DeepKernelModel(bm.nets.mlp(2, [4], 3), Categorical(4))
    with pytest.raises(errors.UnsupportedError, match="a Categorical for classes"):
        bm.DeepKernel(model(Bernoulli(), 3))
    with pytest.raises(errors.OptionError, match="Unknown link 'softmax'"):
        bm.DeepKernel(model(Categorical(3), 3), link="softmax")
    with pytest.raises(errors.OptionError, match="must be positive"):
        bm.DeepKernel(model(Categorical(3), 3), noise=0.0)
    for options in ({"link": "probit"}, {"noise": 0.1}, {"learn_noise": False}):
        with pytest.raises(errors.OptionError, match=next(iter(options))):
            bm.DeepKernel(model(bm.Gaussian(0.3), 1), **options)
    with pytest.raises(errors.OptionError, match="leave out link"):
        bm.DeepKernel(bm.DeepKernelModel(bm.nets.mlp(2, [4], 3), Categorical(3)), link="probit")
    with pytest.raises(errors.UnsupportedError, match="φ of a Gaussian process is a function"):
        bm.MAML(bm.DeepKernelModel(bm.nets.mlp(2, [4], 4), Categorical(4)).double()).adapt(batch_of("four").support)
    fixed = bm.DeepKernelModel(bm.nets.mlp(2, [4], 3), Categorical(3), learn_noise=False, learn_mean=False)
    assert not any("noise" in name for name, _ in fixed.named_parameters())
    assert fixed.mean.item() == pytest.approx(2 / 3 - 1)
