"""The Bayesian last layer against the oracle of the linear-Gaussian hierarchy."""

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.gaussian import linear_gaussian_log_prob
from tests.numerics import maximise_evidence

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def setting(dtype, noise=0.4):
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=dtype)
    scale = torch.tensor([1.5, 0.7, 1.1], dtype=dtype)
    tasks = bm.tasks.LinearGaussian(mean, torch.diag(scale**2), noise)
    # features are x itself: a single Linear without bias
    network = nn.Sequential(nn.Linear(3, 1, bias=False))
    model = bm.NeuralTaskModel(network, bm.Gaussian(noise), task_modules="head").to(dtype)
    with torch.no_grad():
        model.prior.loc.copy_(mean)
        model.prior.log_scale.copy_(scale.log())
        model.likelihood.log_scale.fill_(torch.tensor(noise, dtype=torch.float64).log().item())
    batch = tasks.sample(5, support=6, query=4, generator=3)
    return bm.BayesianLastLayer(model), tasks, batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_predictive_and_evidence_are_the_oracles(dtype):
    method, tasks, batch = setting(dtype)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    posterior, oracle = method.adapt(batch.support), tasks.posterior(batch.support)
    torch.testing.assert_close(posterior.loc, oracle.mean, **close)
    torch.testing.assert_close(posterior.covariance, oracle.covariance_matrix, **close)
    evidence = tasks.log_evidence(batch.support)
    torch.testing.assert_close(posterior.log_evidence, evidence, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    predictive, exact = posterior.predictive(batch.query.x, joint=True), tasks.predictive(batch.support, batch.query.x)
    torch.testing.assert_close(predictive.mean, exact.mean, **close)
    torch.testing.assert_close(predictive.covariance_matrix, exact.covariance_matrix, **close)
    marginal = posterior.predictive(batch.query.x)
    torch.testing.assert_close(marginal.variance, exact.variance, **close)
    # control: a posterior that forgets one observation is told apart
    fewer = bm.Observations(batch.support.x[:, :5], batch.support.y[:, :5])
    assert (method.adapt(fewer).loc - oracle.mean).abs().max() > 1e-3


def test_objectives_are_what_they_say():
    _, tasks, batch = setting(torch.float64)
    both = tasks.log_evidence(batch.union())
    exact = tasks.predictive(batch.support, batch.query.x)
    joint = exact.log_prob(batch.query.y)
    marginal = torch.distributions.Normal(exact.mean, exact.variance.sqrt()).log_prob(batch.query.y).sum(-1)
    for objective, expected in (("evidence", both), ("predictive", joint), ("marginal", marginal)):
        method, _, _ = setting(torch.float64)
        method.objective = objective
        assert method.loss(batch).item() == pytest.approx(-expected.mean().item(), rel=1e-9)
    assert (joint - marginal).abs().max() > 1e-2


def test_masked_observations_do_not_count():
    method, _, batch = setting(torch.float64)
    mask = torch.tensor([True, True, True, False, False, False]).expand(5, 6)
    masked = bm.Observations(batch.support.x, batch.support.y, mask)
    short = bm.Observations(batch.support.x[:, :3], batch.support.y[:, :3])
    a, b = method.adapt(masked), method.adapt(short)
    torch.testing.assert_close(a.loc, b.loc, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.log_evidence, b.log_evidence, rtol=1e-12, atol=1e-12)
    none = bm.Observations(batch.support.x, batch.support.y, torch.zeros_like(mask))
    prior = method.adapt(none)
    torch.testing.assert_close(prior.loc, method.program.prior.loc.expand(5, -1))
    assert (prior.log_evidence == 0).all()


def test_several_outputs_are_independent_regressions():
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(
        bm.nets.mlp(2, [4], 2, activation="tanh"), bm.Gaussian(0.3), task_modules="head"
    ).double()
    method = bm.BayesianLastLayer(model)
    x, y = torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    posterior = method.adapt(bm.Observations(x, y))
    mean = posterior.predictive(x).mean
    for output in range(2):
        features = torch.cat([model.network[:-1](x), torch.ones(3, 5, 1, dtype=torch.float64)], -1)
        rows = slice(4 * output, 4 * output + 4)
        loc = torch.cat([model.prior.loc[:8][rows], model.prior.loc[8 + output, None]])
        precision = torch.eye(5, dtype=torch.float64) / 1.0**2 + features.mT @ features / 0.3**2
        right = loc / 1.0**2 + (features.mT @ y[..., output, None] / 0.3**2).squeeze(-1)
        weights = torch.linalg.solve(precision, right)
        expected = (features @ weights.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(mean[..., output], expected, rtol=1e-5, atol=1e-6)  # 0.3 is float32 in the model
    assert posterior.predict(x, 7).shape == (7, 3, 5, 2)


def test_draws_have_the_posteriors_moments():
    method, tasks, batch = setting(torch.float64)
    n = 20_000
    posterior, oracle = method.adapt(batch.support), tasks.posterior(batch.support)
    u = posterior.draws(n, 1).u
    se = oracle.variance.sqrt() / n**0.5
    assert ((u.mean(0) - oracle.mean).abs() / se).max() < 4.5  # 15 comparisons
    assert ((u.var(0) / oracle.variance - 1).abs() / (2 / n) ** 0.5).max() < 4.5
    log_prob = posterior.log_prob(u[:3])
    torch.testing.assert_close(log_prob, oracle.log_prob(u[:3]), rtol=1e-8, atol=1e-8)


def test_theta_recovers_the_hyper_parameters():
    """Evidence training on 500 simulated tasks finds mean and scale of the population within 4 standard errors."""
    _, tasks, _ = setting(torch.float64)
    batch = tasks.sample(500, support=5, query=5, generator=8)
    network = nn.Sequential(nn.Linear(3, 1, bias=False))
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.4), bm.priors.Normal(1.0), task_modules="head").double()
    method = bm.BayesianLastLayer(model, objective="evidence")
    maximise_evidence(method, batch, max_iter=100)
    scale = tasks.covariance.diagonal().sqrt()
    # at least the sampling error of 500 tasks' own φ, a little more for their noise
    mean_error = (model.prior.loc.detach() - tasks.mean).abs() / (scale / 500**0.5)
    scale_error = (model.prior.log_scale.exp().detach() / scale - 1).abs() / (0.5 / 500) ** 0.5
    assert mean_error.max() < 4.5
    assert scale_error.max() < 4.5
    assert (1.0 / scale - 1).abs().max() / (0.5 / 500) ** 0.5 > 10, "control: the start is told apart"


def test_models_without_a_closed_form():
    full = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian())
    point = bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(), prior="point", task_modules="head")
    for model in (full, point):
        with pytest.raises(errors.UnsupportedError, match="task_modules"):
            bm.BayesianLastLayer(model)
    with pytest.raises(errors.UnsupportedError, match="NeuralTaskModel"):
        bm.BayesianLastLayer(lambda x, y=None, mask=None: None)
    with pytest.raises(errors.NoClosedFormError, match="predict"):
        bm.ABML(full).adapt(bm.Observations(torch.zeros(1, 2, 1), torch.zeros(1, 2))).predictive(torch.zeros(1, 2, 1))


# -- few rows: by the covariance of the rows ----------------------------------------------------------------------


def rows(count=7, columns=12):
    generator = torch.Generator().manual_seed(1)
    design, y, mean = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, count, columns), (3, count), (columns,))
    )
    root = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    noise = torch.rand(count, generator=generator, dtype=torch.float64) + 0.3
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 2], mask[1, 4:], mask[2] = False, False, torch.tensor([False, True, False, False, True, True, False])
    return design, y, mean, root, noise, mask[:, :count]


@pytest.mark.parametrize("given", [0, 3, 7])
def test_later_rows_given_earlier_ones_are_torchs_normals(given):
    """Task by task, without the rows that do not count, as the ratio of two of torch's multivariate normals."""
    design, y, mean, root, noise, mask = rows()
    found = linear_gaussian_log_prob(design, y, mean, root, noise, mask, given=given)

    def log_prob(task, keep):
        a = design[task][keep] @ root
        covariance = a @ a.mT + torch.diag(noise[keep].square())
        return torch.distributions.MultivariateNormal(design[task][keep] @ mean, covariance).log_prob(y[task][keep])

    for task in range(3):
        keep = mask[task].nonzero().flatten()
        first = keep[keep < given]
        expected = log_prob(task, keep) - (log_prob(task, first) if len(first) else 0.0)
        assert found[task].item() == pytest.approx(float(expected), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("objective", ["predictive", "evidence"])
def test_few_rows_and_many_give_one_loss_and_gradient(objective, monkeypatch):
    """Two outputs of unlike noise on ragged tasks: 10 rows of 26 columns, by their covariance and by their weights'."""
    torch.manual_seed(0)
    likelihood = bm.Gaussian(torch.tensor([0.3, 0.8]))
    method = bm.BayesianLastLayer(
        bm.NeuralTaskModel(bm.nets.mlp(1, [12], 2), likelihood, task_modules="head").double(), objective=objective
    )
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(4, 5, n, generator=generator, dtype=torch.float64) for n in (1, 2))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    batch = bm.TaskBatch(bm.Observations(x[:, :3], y[:, :3], mask), bm.Observations(x[:, 3:], y[:, 3:]))

    def losses():
        loss = method.loss(batch)
        return torch.cat(
            [loss.reshape(1), *(g.flatten() for g in torch.autograd.grad(loss, list(method.parameters())))]
        )

    found = losses()
    with monkeypatch.context() as patch:  # the other way is taken
        patch.setattr("bayesmeta.adapt.last_layer.linear_gaussian_log_prob", lambda *_, **__: pytest.fail("few rows"))
        with pytest.raises(pytest.fail.Exception):
            losses()
    monkeypatch.setattr("bayesmeta.adapt.last_layer._has_few_rows", lambda design: False)
    torch.testing.assert_close(found, losses(), rtol=1e-9, atol=1e-9)
    method.objective = "evidence" if objective == "predictive" else "predictive"
    assert (losses() - found).abs().max() > 1e-2


@pytest.mark.parametrize("given", [0, 3])
def test_the_gradient_by_hand_is_that_of_finite_differences(given):
    """And its own gradient, by which an objective may be differentiated twice."""
    design, y, _, root, _, mask = rows(4, 6)
    design, y, deviations = design[:2].requires_grad_(), y[:2].requires_grad_(), root[0].abs().requires_grad_()
    mean, noise = root[1].clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def log_prob(*args):
        return linear_gaussian_log_prob(*args, mask[:2], given=given)

    arguments = (design, y, mean, deviations, noise)
    assert torch.autograd.gradcheck(log_prob, arguments)
    assert torch.autograd.gradgradcheck(log_prob, arguments)
    as_matrix = log_prob(design, y, mean, deviations.diag(), noise)
    torch.testing.assert_close(log_prob(*arguments), as_matrix, rtol=1e-12, atol=1e-12)
