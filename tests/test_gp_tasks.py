"""GP tasks and their oracle, against scikit-learn and against the covariance of many draws."""

import math

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ExpSineSquared, Matern

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.tasks import GPTasks
from bayesmeta.tasks.gp import JITTER

KERNELS = {
    "eq": RBF(0.25),
    "matern52": Matern(0.25, nu=2.5),
    "weakly_periodic": RBF(0.5) * ExpSineSquared(1.0, 0.25),
}
OTHERS = {
    "eq": RBF(0.3),
    "matern52": Matern(0.32, nu=2.5),
    "weakly_periodic": RBF(0.5) * ExpSineSquared(1.0, 0.3),
}


def regressor(kernel, x, y, noise_variance):
    """scikit-learn's GP on one task, nothing learned."""
    gp = GaussianProcessRegressor(kernel, alpha=noise_variance + JITTER, optimizer=None)
    return gp.fit(x.double().numpy(), y.double().numpy())


@pytest.mark.parametrize("noise_variance", [0.05, 0.0])
@pytest.mark.parametrize("name", KERNELS)
def test_the_oracle_equals_scikit_learn(name, noise_variance):
    tasks = GPTasks(name, noise_variance=noise_variance)
    batch = tasks.sample(3, support=8, query=6, generator=2)
    joint, marginal = tasks.predictive(batch.support, batch.query.x), tasks.marginals(batch.support, batch.query.x)
    latent, evidence = tasks.posterior(batch.support, batch.query.x), tasks.log_evidence(batch.support)
    eye = torch.eye(6, dtype=torch.float64)
    # rounding 1e-16 times the condition of the kernel matrix, 1e8 at most without noise
    close = {"rtol": 1e-6, "atol": 1e-9 if noise_variance else 1e-6}
    for i in range(3):
        gp = regressor(KERNELS[name], batch.support.x[i], batch.support.y[i], noise_variance)
        mean, covariance = (torch.as_tensor(v) for v in gp.predict(batch.query.x[i].double().numpy(), return_cov=True))
        torch.testing.assert_close(joint.mean[i], mean, **close)
        torch.testing.assert_close(latent.mean[i], mean, **close)
        torch.testing.assert_close(latent.covariance_matrix[i], covariance + JITTER * eye, **close)
        noisy = covariance + (noise_variance + JITTER) * eye
        torch.testing.assert_close(joint.covariance_matrix[i], noisy, **close)
        torch.testing.assert_close(marginal.mean[i], mean, **close)
        torch.testing.assert_close(marginal.variance[i], noisy.diagonal(), **close)
        assert float(evidence[i]) == pytest.approx(float(gp.log_marginal_likelihood_value_), rel=1e-6)
        # control: another length scale or period is not this
        other = regressor(OTHERS[name], batch.support.x[i], batch.support.y[i], noise_variance)
        assert abs(float(evidence[i]) - float(other.log_marginal_likelihood_value_)) > 1e-3
        assert abs(other.predict(batch.query.x[i].double().numpy()) - mean.numpy()).max() > 1e-3


def covariance_by_distance(batch, kernel, noise_variance=0.05, bins=8, reach=1.0):
    """Mean and standard error of y₁y₂ − k(x₁, x₂) over tasks of two points, in bins of their distance; then of y²."""
    x, y = batch.support.x.double(), batch.support.y.double()
    distance = (x[:, 0, 0] - x[:, 1, 0]).abs()
    at = distance.unsqueeze(-1).numpy()
    excess = y[:, 0] * y[:, 1] - torch.as_tensor(kernel(at, [[0.0]])).squeeze(-1)
    values = [excess[(distance >= reach * i / bins) & (distance < reach * (i + 1) / bins)] for i in range(bins)]
    values.append(y[:, 0].square() - (1 + noise_variance))
    return [(float(v.mean()), float(v.std()) / math.sqrt(len(v))) for v in values]


@pytest.mark.parametrize("name", KERNELS)
def test_draws_have_the_covariance_of_the_kernel(name):
    batch = GPTasks(name).sample(60_000, support=2, query=0, generator=1)
    assert all(abs(mean) < 5 * error for mean, error in covariance_by_distance(batch, KERNELS[name]))
    assert any(abs(mean) > 5 * error for mean, error in covariance_by_distance(batch, OTHERS[name])), "control"
    x, y = batch.support.x.double(), batch.support.y.double()
    assert abs(float(y[:, 0].mean())) < 5 * float(y[:, 0].std()) / math.sqrt(len(y))
    assert -2 <= float(x.min()) < -1.999
    assert 1.999 < float(x.max()) <= 2
    # fourth moment: normal, three times the square of the variance
    fourth = y[:, 0] ** 4
    assert abs(float(fourth.mean()) - 3 * 1.05**2) < 5 * float(fourth.std()) / math.sqrt(len(y))


@pytest.mark.parametrize("name", KERNELS)
def test_the_oracle_is_calibrated_on_its_draws(name):
    tasks = GPTasks(name)
    batch = tasks.sample(1500, support=7, query=5, generator=3)
    joint = tasks.predictive(batch.support, batch.query.x)
    residual = (batch.query.y.double() - joint.mean).unsqueeze(-1)
    white = torch.linalg.solve_triangular(joint.scale_tril, residual, upper=False)
    assert abs(float(white.mean())) < 5 / math.sqrt(7500)
    assert abs(float(white.var()) - 1) < 5 * math.sqrt(2 / 7500)
    # chain rule: log p(S, Q) = log p(S) + log p(Q | S)
    chain = tasks.log_evidence(batch.support) + joint.log_prob(batch.query.y.double())
    torch.testing.assert_close(tasks.log_evidence(batch.union()), chain, rtol=1e-9, atol=1e-8)
    # the joint predictive beats independent marginals, and both beat another kernel's
    marginal = tasks.marginals(batch.support, batch.query.x).log_prob(batch.query.y.double()).sum(-1)
    gain = joint.log_prob(batch.query.y.double()) - marginal
    assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(1500)
    wrong = GPTasks(name, length_scale=1.0).marginals(batch.support, batch.query.x)
    loss = marginal - wrong.log_prob(batch.query.y.double()).sum(-1)
    assert float(loss.mean()) > 5 * float(loss.std()) / math.sqrt(1500)


def test_masked_observations_do_not_count():
    tasks = GPTasks("matern52")
    batch = tasks.sample(3, support=5, query=4, generator=2)
    mask = torch.tensor([True, False, True, False, False]).expand(3, 5)
    masked = bm.Observations(batch.support.x, batch.support.y, mask)
    keep = [0, 2]
    short = bm.Observations(batch.support.x[:, keep], batch.support.y[:, keep])
    torch.testing.assert_close(tasks.log_evidence(masked), tasks.log_evidence(short), rtol=1e-12, atol=1e-12)
    ours, theirs = tasks.predictive(masked, batch.query.x), tasks.predictive(short, batch.query.x)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.covariance_matrix, theirs.covariance_matrix, rtol=1e-12, atol=1e-12)
    full = tasks.predictive(batch.support, batch.query.x)
    assert (full.mean - ours.mean).abs().max() > 1e-3, "control"
    # all masked, or none there: the prior
    nothing = bm.Observations(batch.support.x, batch.support.y, torch.zeros(3, 5, dtype=torch.bool))
    empty = bm.Observations(batch.support.x[:, :0], batch.support.y[:, :0])
    for observations in (nothing, empty):
        assert tasks.log_evidence(observations).tolist() == [0.0, 0.0, 0.0]
        marginal = tasks.marginals(observations, batch.query.x)
        assert marginal.mean.eq(0).all()
        torch.testing.assert_close(marginal.variance, torch.full_like(marginal.variance, 1.05 + JITTER))


def test_many_close_points_and_repeated_ones_have_a_posterior():
    """100 points on [−2, 2] under a smooth kernel without noise: singular but for the jitter."""
    tasks = GPTasks("eq", noise_variance=0.0)
    batch = tasks.sample(2, support=60, query=40, generator=0).check()
    log_prob = tasks.predictive(batch.support, batch.query.x).log_prob(batch.query.y.double())
    assert torch.isfinite(log_prob).all()
    again = tasks.posterior(batch.support, batch.support.x[:, :3])
    # where it was seen the function is known to within the jitter's standard deviation, 1e-4
    assert (again.mean - batch.support.y[:, :3]).abs().max() < 5e-4


def test_sawtooth_draws_the_published_family_and_has_no_oracle():
    tasks = GPTasks("sawtooth")
    assert tasks.noise_variance == 0
    batch = tasks.sample(20_000, support=1, query=1, generator=4)
    y = batch.union().y.double()
    assert 0 <= float(y.min()) < 1e-3
    assert 1 - 1e-3 < float(y.max()) < 1 + 1e-6
    # the offset is uniform, so y is uniform at any x
    assert abs(float(y[:, 0].mean()) - 0.5) < 5 / math.sqrt(12 * 20_000)
    assert abs(float(y[:, 0].var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / 20_000)
    # at two points d apart the phase moves by f d: E cos 2π(y₁ − y₂) = E cos 2πfd, f ~ U(2, 4)
    d = (batch.support.x - batch.query.x).squeeze().double()

    def expected(low, high):
        return ((2 * math.pi * high * d).sin() - (2 * math.pi * low * d).sin()) / (2 * math.pi * d * (high - low))

    excess = (2 * math.pi * (y[:, 0] - y[:, 1])).cos() - expected(2, 4)
    assert abs(float(excess.mean())) < 5 * float(excess.std()) / math.sqrt(20_000)
    near = d.abs() < 0.2
    control = ((2 * math.pi * (y[:, 0] - y[:, 1])).cos() - expected(3, 5))[near]
    assert abs(float(control.mean())) > 5 * float(control.std()) / math.sqrt(int(near.sum()))
    # signs: as many rise as fall. Nearby points differ by ± f d unless the tooth ends between them
    step = torch.sign((y[:, 0] - y[:, 1]) * d)[(d.abs() < 0.1) & ((y[:, 0] - y[:, 1]).abs() < 0.4)]
    assert abs(float(step.mean())) < 5 / math.sqrt(len(step))
    for call in (
        lambda: tasks.posterior(batch.support, batch.query.x),
        lambda: tasks.predictive(batch.support, batch.query.x),
        lambda: tasks.marginals(batch.support, batch.query.x),
        lambda: tasks.log_evidence(batch.support),
    ):
        with pytest.raises(errors.UnsupportedError, match="not a Gaussian process"):
            call()


def test_a_kernel_of_ones_own():
    def laplacian(x, z):
        assert x.dtype == torch.float64
        return (-(x - z.mT).abs()).exp()

    tasks = GPTasks(laplacian, noise_variance=0.1)
    batch = tasks.sample(2, support=6, query=3, generator=1)
    gp = regressor(Matern(1.0, nu=0.5), batch.support.x[0], batch.support.y[0], 0.1)
    assert float(tasks.log_evidence(batch.support)[0]) == pytest.approx(gp.log_marginal_likelihood_value_, rel=1e-9)
    mean = tasks.predictive(batch.support, batch.query.x).mean[0]
    torch.testing.assert_close(mean, torch.as_tensor(gp.predict(batch.query.x[0].double().numpy())))

    with pytest.raises(errors.DataError, match="positive definite"):
        GPTasks(lambda x, z: -laplacian(x, z)).sample(2, support=3, query=3)
    with pytest.raises(errors.DataError, match="positive definite"):
        GPTasks(lambda x, z: -5 * laplacian(x, z)).predictive(batch.support, batch.query.x)
    with pytest.raises(errors.DataError, match="finite"):
        GPTasks(lambda x, z: laplacian(x, z) * math.nan).sample(2, support=3, query=3)
    with pytest.raises(errors.ShapeError, match=r"gave \[2, 6, 1\]"):
        GPTasks(lambda x, z: x).sample(2, support=3, query=3)
    with pytest.raises(errors.ShapeError, match="gave int"):
        GPTasks(lambda x, z: 3).sample(2, support=3, query=3)


def test_options_change_the_kernel_and_the_inputs():
    tasks = GPTasks("weakly_periodic", length_scale=0.7, period=0.4, noise_variance=0.2, x_range=(3.0, 5.0))
    batch = tasks.sample(50, support=8, query=2)
    assert float(batch.support.x.min()) >= 3
    assert float(batch.support.x.max()) <= 5
    gp = regressor(RBF(0.7) * ExpSineSquared(1.0, 0.4), batch.support.x[0], batch.support.y[0], 0.2)
    assert float(tasks.log_evidence(batch.support)[0]) == pytest.approx(gp.log_marginal_likelihood_value_, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kernel": "rbf"}, "kernel='rbf'.*eq, matern52"),
        ({"length_scale": 0.0}, "length_scale must be positive"),
        ({"length_scale": math.nan}, "length_scale must be positive"),
        ({"noise_variance": -0.1}, "noise_variance"),
        ({"noise_variance": math.inf}, "noise_variance"),
        ({"period": 1.0}, "goes with 'weakly_periodic'"),
        ({"kernel": "weakly_periodic", "period": -1.0}, "period must be positive"),
        ({"kernel": "sawtooth", "length_scale": 1.0}, "not with 'sawtooth'"),
        ({"kernel": lambda x, z: x @ z.mT, "length_scale": 1.0}, "length_scale=1.0 goes with"),
        ({"x_range": (2.0, -2.0)}, "x_range"),
        ({"x_range": (0.0, math.inf)}, "x_range"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(errors.OptionError, match=match):
        GPTasks(**options)


def test_data_that_do_not_fit_are_refused():
    tasks = GPTasks()
    batch = tasks.sample(2, support=3, query=2)
    with pytest.raises(errors.ShapeError, match=r"expected \[2, shots, 1\]"):
        tasks.predictive(batch.support, batch.query.x[:1])
    with pytest.raises(errors.ShapeError, match=r"expected \[2, shots, 1\]"):
        tasks.posterior(batch.support, batch.query.x.squeeze(-1))
    with pytest.raises(errors.DataError, match="got None"):
        tasks.log_evidence(batch.support.with_y(None))
    with pytest.raises(errors.ShapeError, match="2 features"):
        tasks.log_evidence(bm.Observations(batch.support.x.expand(2, 3, 2), batch.support.y))
