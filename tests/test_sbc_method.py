"""SBC of methods under their own model, of posteriors made of draws, and of inference that trains or infers θ."""

import math
from dataclasses import dataclass

import pytest
import torch
from forecast_cases import FACTORS, Linear, Phi, linear_tasks
from test_simulation import F64, NAMES, Hierarchy, Wrong, hierarchy, linear_sbc, log_likelihood
from torch import nn

import bayesmeta as bm
from bayesmeta.diagnostics.simulation import distinct_draws
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import as_generator


def test_methods_under_their_own_model():
    _, batch = linear_tasks(500, seed=2)
    for factor, name in ((0.5, "too narrow"), (2.0, "too wide")):
        assert bm.sbc_method(Wrong(factor), batch.support).findings["phi[0]"] == name
    assert bm.sbc_method(Wrong(1.0), batch.support, quantities={"log_likelihood": log_likelihood}).passes
    network = nn.Sequential(nn.Linear(2, 1, bias=False))
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.4), "normal", task_modules="head").to(F64)
    mask = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    template = bm.Observations(batch.support.x, batch.support.y, mask)
    result = bm.sbc_method(bm.BayesianLastLayer(model), template)
    assert result.passes, str(result)
    assert list(result.ranks) == ["0.weight[0]", "0.weight[1]", "log_likelihood"]
    again = bm.sbc_method(bm.BayesianLastLayer(model), template)
    assert all(again.ranks[k].equal(v) for k, v in result.ranks.items())


def linear_model():
    network = nn.Sequential(nn.Linear(2, 1, bias=False))
    return bm.NeuralTaskModel(network, bm.Gaussian(0.4), "normal", task_modules="head").to(F64)


def template_of(tasks=500, seed=2):
    _, batch = linear_tasks(tasks, seed=seed)
    mask = torch.rand(tasks, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    return bm.Observations(batch.support.x, batch.support.y, mask)


def test_the_log_likelihood_is_ranked_by_default():
    """A method that stays at its prior is calibrated in φ; what it makes of the data tells it."""
    template = template_of()
    lazy = bm.ABML(linear_model(), inner_steps=1, inner_lr=1e-6)
    assert bm.sbc_method(lazy, template, log_likelihood=False).passes
    found = bm.sbc_method(lazy, template)
    assert found.findings["0.weight[0]"] == "calibrated"
    assert found.findings["log_likelihood"] == "too low"
    assert found.shapes["log_likelihood"].location > 20 * found.shapes["log_likelihood"].location_error
    assert "log_likelihood" not in bm.sbc_method(lazy, template, log_likelihood=False)

    def by_hand(values, data):
        f = (values["0.weight"] * data.x).sum(-1)
        each = torch.distributions.Normal(f, float(lazy.program.likelihood.scale)).log_prob(data.y)
        return torch.where(data.full_mask(), each, 0.0).sum(-1)

    again = bm.sbc_method(lazy, template, quantities={"log_likelihood": by_hand})
    assert again.ranks["log_likelihood"].equal(found.ranks["log_likelihood"])


def test_another_method_may_simulate():
    exact = bm.BayesianLastLayer(linear_model())
    result = bm.sbc_method(exact, template_of(), simulator=bm.ABML(exact.program, inner_steps=0))
    assert result.passes, str(result)
    other = linear_model()
    with torch.no_grad():
        other.prior.log_scale.fill_(0.7)
    wrong = bm.sbc_method(exact, template_of(), simulator=bm.ABML(other, inner_steps=0))
    assert wrong.findings["0.weight[0]"] == "too narrow", "control: truths from another model"


# -- posteriors that are made of draws ------------------------------------------------------------------------------


class Made:
    """The exact posterior of the linear family as ``total`` draws: independent ones, or an AR(1) chain."""

    is_point, target_kind = False, "real"

    def __init__(self, family, data, total, correlation=0.0):
        exact = Linear(family, data)
        self.num_draws, chain = total, [exact.draws(1, 9).u[0] - exact.mean]
        generator = as_generator(11, stream="chain")
        fresh = exact.draws(total, generator).u - exact.mean
        for z in fresh[1:]:
            chain.append(correlation * chain[-1] + math.sqrt(1 - correlation**2) * z)
        self.u = exact.mean + torch.stack(chain)

    def draws(self, num_samples, generator=None):
        if num_samples == self.num_draws:
            return Phi(self.u)
        pick = torch.randint(self.num_draws, (num_samples,), generator=as_generator(generator))
        return Phi(self.u[pick])

    def named(self, draws):
        return {"phi": draws.u}

    def named_theta(self, draws):
        return {}


def test_no_draw_counts_twice():
    """A posterior of 63 exact draws passes; 15 of them, each four times, look too narrow, and are refused."""
    assert linear_sbc(lambda family, data: Made(family, data, 63), tasks=1500).passes
    assert linear_sbc(lambda family, data: Made(family, data, 80), tasks=1500).passes
    with pytest.raises(OptionError, match="made of 15 draws"):
        linear_sbc(lambda family, data: Made(family, data, 15))

    def repeated(family, data):
        return {"phi": Made(family, data, 15).u.repeat(5, 1, 1)[:63]}

    found = linear_sbc(repeated, tasks=1500)
    assert found.findings["phi[0]"] != "calibrated", "control: what draws with replacement would do"
    assert found.shapes["phi[0]"].dispersion > 0


def test_chains_are_thinned_evenly():
    """An AR(1) chain with correlation 0.8: every sixteenth draw is independent, neighbours are not."""
    assert linear_sbc(lambda family, data: Made(family, data, 16 * 63, 0.8), tasks=1500).passes
    found = linear_sbc(lambda family, data: {"phi": Made(family, data, 16 * 63, 0.8).u[:63]}, tasks=1500)
    assert found.findings["phi[0]"] == "too narrow", "control: the first 63"


def test_repeated_theta_are_not_met_one_by_one():
    """φ given four draws of θ in turn: even spacing by four would meet the first alone."""

    @dataclass
    class Joint:
        u: torch.Tensor
        theta: torch.Tensor

    class Posterior:
        num_draws = 64

        def draws(self, num_samples, generator=None):
            assert num_samples == 64
            return Joint(torch.arange(64.0), torch.arange(64).remainder(4).float().unsqueeze(-1))

    found = distinct_draws(Posterior(), 16, as_generator(0))
    assert len(found.theta.unique()) > 1
    assert len(found.u.unique()) == 16
    assert (found.u.long() % 4).eq(found.theta[:, 0]).all()


# -- θ --------------------------------------------------------------------------------------------------------------


def test_inference_may_train():
    """A posterior by gradient steps inside ``infer``: under no_grad it would stay at its start, or raise."""

    def infer(y):
        loc = torch.zeros(5, dtype=F64, requires_grad=True)
        root = Hierarchy(y).root
        for _ in range(25):
            value = torch.distributions.Normal(loc[1:], 1.0).log_prob(y).sum()
            value = value + torch.distributions.Normal(loc[0], 1.0).log_prob(loc[1:]).sum() - loc[0] ** 2 / 2
            (slope,) = torch.autograd.grad(value, loc)
            loc = (loc + 0.3 * slope).detach().requires_grad_(True)
        draws = loc + torch.randn(31, 5, generator=source, dtype=F64) @ root.mT
        return {"theta": draws[:, 0], "phi": draws[:, 1:]}

    source = as_generator(4)
    result = bm.sbc(hierarchy, infer, num_simulations=60, num_draws=31, shared=["theta"])
    assert result.passes, str(result)
    assert not result.ranks["theta"].requires_grad


class InfersTheta(Hierarchy):
    """The hierarchy as a method's posterior: θ is inferred with φ, from all tasks of the support."""

    def __init__(self, support, factor=1.0, prior_of_theta=True, theta_is_inferred=True):
        super().__init__(support.y[:, 0], factor)
        self.support, self.prior_of_theta, self.theta_is_inferred = support, prior_of_theta, theta_is_inferred

    def prior_draws(self, num_samples, generator):
        theta = torch.randn(num_samples, 1, generator=generator, dtype=F64)
        if not self.prior_of_theta:  # the posterior of the template's θ: what simulation must not take
            theta = self.draws(num_samples, generator)[:, :1]
        return torch.cat([theta, theta + torch.randn(num_samples, 4, generator=generator, dtype=F64)], 1)

    def predict(self, x, draws, generator):
        f = draws[:, 1:].unsqueeze(-1)
        return f + torch.randn(f.shape, generator=generator, dtype=F64)

    def log_likelihood(self, observations, draws):
        return torch.distributions.Normal(draws[:, 1:].unsqueeze(-1), 1.0).log_prob(observations.y)


class InfersThetaMethod:
    def __init__(self, **options):
        self.options = options

    def adapt(self, support, *, generator=None):
        return InfersTheta(support, **self.options)


def test_methods_that_infer_theta_are_judged_by_it():
    template = bm.Observations(torch.zeros(4, 1, 1, dtype=F64), torch.full((4, 1), 5.0, dtype=F64))
    for factor, name in zip(FACTORS, NAMES, strict=True):
        result = bm.sbc_method(InfersThetaMethod(factor=factor), template, num_simulations=400, num_draws=31)
        assert list(result.ranks) == ["phi", "theta", "log_likelihood"]
        assert result.findings["theta"] == name
        assert result.findings["phi"] == "calibrated"
        assert all(len(each) == 400 for each in result.ranks.values())
    wrong = bm.sbc_method(InfersThetaMethod(prior_of_theta=False), template, num_simulations=400, num_draws=31)
    assert wrong.findings["theta"] != "calibrated", "control: truths from the template's posterior"
    fixed = InfersThetaMethod(theta_is_inferred=False)
    with pytest.raises(OptionError, match="simulator"):
        bm.sbc_method(InfersThetaMethod(), template, simulator=fixed)


def test_a_learned_point_of_theta_leaves_all_tasks_and_q_gets_a_draw_for_each():
    _, batch = linear_tasks(30, seed=2)
    support = bm.Observations(batch.support.x.float(), batch.support.y.float())

    def method(kind):
        network = nn.Sequential(nn.Linear(2, 1, bias=False))
        model = bm.NeuralTaskModel(network, bm.Gaussian(0.4), bm.priors.LayerScales(), task_modules="head")
        return bm.ABML(model, inner_steps=1, inner_lr=0.01, global_guide=kind)

    found = bm.sbc_method(method("point"), support, num_simulations=2, num_draws=31)
    assert {len(each) for each in found.ranks.values()} == {60}
    gaussian = method("normal")
    asked, adapt = [], gaussian.adapt

    def counting(support, *, generator=None, num_theta=20):
        asked.append(num_theta)
        return adapt(support, generator=generator, num_theta=num_theta)

    gaussian.adapt = counting
    found = bm.sbc_method(gaussian, support, num_simulations=4, num_draws=31)
    assert {len(each) for each in found.ranks.values()} == {4}
    assert asked.count(31) == 4


def test_a_learned_posterior_over_theta_counts_one_task_of_each():
    _, batch = linear_tasks(5, seed=2)
    support = bm.Observations(batch.support.x.float(), batch.support.y.float())
    network = nn.Sequential(nn.Linear(2, 1, bias=False))
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.4), bm.priors.LayerScales(), task_modules="head")
    method = bm.ABML(model, inner_steps=1, inner_lr=0.01)
    result = bm.sbc_method(method, support, num_simulations=6, num_draws=31)
    assert all(len(each) in (6, 30) for each in result.ranks.values())
