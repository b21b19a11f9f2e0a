"""Methods under Pyro's own SVI: θ is trained, by the same steps as under MetaSVI, and nothing is left behind."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites, batch_of


def network(prior=0.1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bm.NeuralTaskModel(
            bm.nets.mlp(1, [6], 1, activation="tanh"), bm.Gaussian(0.3, learn_scale=True), bm.priors.Normal(prior)
        )


MAKE = {
    "abml": lambda: bm.ABML(network(), inner_steps=2, inner_lr=0.01),
    "laplace": lambda: bm.Laplace(network(), inner_steps=2, inner_lr=0.01),
    "last_layer": lambda: bm.BayesianLastLayer(
        bm.NeuralTaskModel(bm.nets.mlp(1, [6], 1), bm.Gaussian(0.3), bm.priors.Normal(1.0), task_modules="head")
    ),
    "program": lambda: bm.ABML(TwoSites(), inner_steps=2, inner_lr=0.01),
}


def pool():
    return bm.tasks.Sinusoid(noise=0.1).sample(6, support=5, query=4, generator=0)


def trained(method, batch, svi, steps=4):
    method.prepare(batch)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    for _ in range(steps):
        torch.manual_seed(1)
        svi.step(batch)
    return {name: (p.detach() - before[name]).abs().max().item() for name, p in method.named_parameters()}


@pytest.mark.parametrize("name", list(MAKE))
def test_pyro_svi_trains_all_of_theta(name):
    batch = batch_of(6, 5) if name == "program" else pool()
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        method = MAKE[name]()
        svi = SVI(method.model, method.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        moved = trained(method, batch, svi)
        assert min(moved.values()) > 1e-3
        # a second method of the same form has parameters of its own
        other = MAKE[name]()
        svi = SVI(other.model, other.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert min(trained(other, batch, svi).values()) > 1e-3
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", ["abml", "last_layer"])
def test_meta_svi_takes_the_same_steps(name):
    batch, ends = pool(), []
    with torch.random.fork_rng():
        for kind in ("pyro", "ours"):
            torch.manual_seed(0)
            method = MAKE[name]()
            with pyro.get_param_store().scope():
                if kind == "pyro":
                    svi = SVI(method.model, method.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
                else:
                    svi = bm.MetaSVI(method.model, method.guide, lambda p: torch.optim.Adam(p, 0.01), Trace_ELBO())
                trained(method, batch, svi)
            ends.append(torch.cat([p.detach().flatten() for p in method.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


def test_without_an_svi_the_store_stays_empty():
    method, batch = MAKE["abml"](), pool()
    with torch.random.fork_rng():
        Trace_ELBO().loss(method.model, method.guide, batch)
    assert len(pyro.get_param_store()) == 0


def test_adapt_says_what_it_takes():
    method, batch = MAKE["abml"](), pool()
    for wrong in ([batch.support.x, batch.support.y], batch.support.x):
        with pytest.raises(errors.OptionError, match=r"adapt takes Observations; got .*bm.Observations\(x, y\)"):
            method.adapt(wrong)


@pytest.mark.parametrize("likelihood", ["gaussian", bm.Gaussian, torch.distributions.Normal])
def test_a_likelihood_that_is_none(likelihood):
    with pytest.raises(errors.OptionError, match="expected an instance of a bayesmeta likelihood"):
        bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), likelihood)


def test_collate_refuses_tasks_whose_x_and_y_differ_in_length():
    with pytest.raises(errors.ShapeError, match=r"Task 1 .*x of shape \[2, 1\] and y of shape \[3\]"):
        bm.collate([torch.randn(4, 1), torch.randn(2, 1)], [torch.randn(4), torch.randn(3)])
    with pytest.raises(errors.ShapeError, match=r"task 0 .* has list and Tensor"):
        bm.collate([[1.0]], [torch.randn(1)])
