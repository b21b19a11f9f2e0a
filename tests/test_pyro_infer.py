"""Model and guide are Pyro callables: pyro.infer takes them as they are."""

import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Importance, Predictive, Trace_ELBO, TraceMeanField_ELBO

import bayesmeta as bm
from tests.programs import LinearHierarchy, TwoSites, batch_of
from tests.test_last_layer import setting


def test_importance_weights_under_the_exact_posterior_are_the_evidence():
    """p(y, φ) / p(φ | y) is p(y) for every φ: the guide, its density and the model's must all be right."""
    method, tasks, batch = setting(torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        importance = Importance(method.model, guide=method.guide, num_samples=20)
        importance.run(batch.support)
    weights = torch.stack([torch.as_tensor(w) for w in importance.log_weights])
    expected = tasks.log_evidence(batch.support).sum()
    torch.testing.assert_close(weights, expected.expand(20), rtol=1e-8, atol=1e-8)
    with torch.random.fork_rng():  # control: the posterior given less data is not the exact one
        fewer = method.adapt(bm.Observations(batch.support.x[:, :4], batch.support.y[:, :4]))
        importance = Importance(method.model, guide=fewer, num_samples=20)
        importance.run(batch.support)
    assert torch.stack([torch.as_tensor(w) for w in importance.log_weights]).std() > 0.1


@pytest.mark.parametrize("kind", ["program", "network"])
@pytest.mark.parametrize("name", ["MAML", "ABML"])
def test_predictive_draws_every_site(kind, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoSites() if kind == "program" else bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(0.5))
        method = getattr(bm, name)(model, inner_lr=1e-3)
        batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 2, seed=1))
        method.prepare(batch)
        sites = {"mu", "slope", "sigma"} if kind == "program" else {"phi"}
        draws = Predictive(method.guide, num_samples=7)(batch)
        assert sites <= set(draws)
        assert all(draws[s].shape[0] == 7 for s in sites)
        trace = poutine.trace(method.model).get_trace(batch)
        assert sites | {"y"} <= set(trace.nodes)


def test_mean_field_elbo_finds_a_closed_form_kl_for_a_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = bm.ABML(bm.NeuralTaskModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(0.5)), inner_lr=1e-3)
        batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 2, seed=1))
        with torch.no_grad():
            plain = torch.tensor([Trace_ELBO().loss(method.model, method.guide, batch) for _ in range(200)])
            exact = torch.tensor([TraceMeanField_ELBO().loss(method.model, method.guide, batch) for _ in range(200)])
    assert abs(float(plain.mean() - exact.mean())) < 4 * float((plain.var() + exact.var()) / 200) ** 0.5


def test_nuts_on_the_methods_model_finds_the_exact_posterior():
    mean, scale, noise = torch.zeros(1), torch.ones(1), 0.5
    program = LinearHierarchy(mean, scale, noise)
    method = bm.ABML(program)
    tasks = bm.tasks.LinearGaussian(mean, torch.eye(1), noise)
    support = tasks.sample(2, support=4, query=1, generator=1).support
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mcmc = MCMC(NUTS(method.model, jit_compile=False), num_samples=250, warmup_steps=100, disable_progbar=True)
        mcmc.run(support)
    draws = mcmc.get_samples()["beta"][:, :, 0, 0]
    exact = tasks.posterior(support)
    # draws of one-dimensional NUTS are close to independent; allow for half of them
    error = exact.stddev.squeeze(-1) / 125**0.5
    assert ((draws.mean(0) - exact.mean.squeeze(-1)).abs() / error).max() < 4
    assert ((draws.std(0) / exact.stddev.squeeze(-1) - 1).abs()).max() < 4 * (0.5 / 125) ** 0.5
