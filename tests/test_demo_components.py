"""The demo's start: principal curves against a singular value decomposition, EM against the gradient of its target."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import bayesmeta as bm
from bayesmeta.demo import components
from bayesmeta.demo.components import begin, curve_mixture, curve_network, fit_components, principal_curves, set_curves
from bayesmeta.errors import EmptyTaskError, OptionError, UnsupportedError
from bayesmeta.posteriors.conjugate import ConjugatePosterior
from bayesmeta.tasks.table import TableTasks

YEARS = np.array([0.0, 1.0, 2.0, 4.0, 5.0, 7.0, 8.0, 9.0])


def table_of(paths, dtype=torch.float64):
    tasks, years = paths.shape
    frame = pd.DataFrame(
        {
            "who": np.repeat([f"c{i}" for i in range(tasks)], years),
            "year": np.tile(YEARS[:years], tasks),
            "y": paths.ravel(),
        }
    )
    table = TableTasks.from_dataframe(frame, task="who", x=["year"], y="y", order="first", dtype=dtype)
    return table.with_standardizer(table.fit_standardizer())


@pytest.fixture(scope="module")
def paths():
    rng = np.random.default_rng(0)
    return 3.0 + rng.normal(0, 1, (40, len(YEARS))).cumsum(1)


@pytest.fixture(scope="module")
def table(paths):
    return table_of(paths)


def two_kinds(tasks=400, seed=0):
    """Weights of two features from two kinds of task, 3 : 1, observed almost exactly."""
    rng = np.random.default_rng(seed)
    second = rng.random(tasks) < 0.25
    phi = np.where(second[:, None], rng.normal([2.0, 1.0], [0.2, 0.5], (tasks, 2)), rng.normal(0, 0.4, (tasks, 2)))
    return second, phi


def line_model(num_components, dtype=torch.float64, noise=0.05):
    """y = φ₁ + φ₂ x: features 1 and x."""
    network = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1, bias=False))
    model = bm.ConjugateModel(network, bm.Gaussian(noise), num_components, spread=0.0).to(dtype)
    with torch.no_grad():
        model.trunk.layers[0].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model.trunk.layers[0].bias.copy_(torch.tensor([1.0, 0.0]))
        model.loc.zero_()
    return model


def observed(phi, noise=0.05, seed=1):
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).expand(len(phi), -1)
    phi = torch.as_tensor(phi)
    generator = torch.Generator().manual_seed(seed)
    y = phi[:, :1] + phi[:, 1:] * x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return bm.Observations(x.unsqueeze(-1), y)


# -- curves -----------------------------------------------------------------------------------------------------------


def test_all_principal_curves_together_have_the_covariance_of_the_tasks(paths, table):
    units = table.standardizer
    scaled = (paths - float(units.y_mean)) / float(units.y_scale)
    curves = principal_curves(table, len(YEARS) - 1)
    covariance = np.cov(scaled.T, bias=True)
    got = (curves.values[:-1].T @ curves.values[:-1]).numpy()
    largest = np.linalg.eigvalsh(covariance)
    assert np.linalg.norm(covariance - got, 2) == pytest.approx(largest[0], rel=1e-6)  # all but the last component
    assert np.allclose(curves.values[-1], scaled.mean(0))
    fewer = principal_curves(table, 2).values[:-1]
    assert np.linalg.norm(covariance - (fewer.T @ fewer).numpy(), 2) == pytest.approx(largest[-3], rel=1e-6)


def test_the_networks_features_are_the_curves_joined_by_lines(table):
    curves = principal_curves(table, 3)
    network = curve_network(len(YEARS), 4).double()
    set_curves(network[:-1], curves)
    x = torch.linspace(float(curves.knots[0]), float(curves.knots[-1]), 101, dtype=torch.float64)
    want = np.stack([np.interp(x, curves.knots, values) for values in curves.values], -1)
    assert np.allclose(network[:-1](x.unsqueeze(-1)).detach(), want, atol=1e-12)
    before = network[:-1](curves.knots[:1, None] - 5.0)
    assert np.allclose(before.detach(), curves.values[:, 0])


def test_single_precision_is_enough_for_fifty_knots():
    knots = torch.linspace(-1.7, 1.7, 52, dtype=torch.float64)
    values = torch.randn(16, 52, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1) / 52**0.5
    network = curve_network(52, 16)
    set_curves(network[:-1], components.Curves(knots, values))
    found = network[:-1](knots.float().unsqueeze(-1)).detach().double()
    assert float((found - values.T).abs().max()) < 1e-3  # the noise of the demo is 0.015 in these units


# -- EM ---------------------------------------------------------------------------------------------------------------


def log_target(model, observations, restarts, loc0, variance0):
    """What EM climbs, from the evidence and the priors that the docstring states; the mixtures are independent."""
    each = ConjugatePosterior.condition(model, observations).log_joint_component
    parts = model.logits.unflatten(-1, (restarts, -1)).log_softmax(-1)
    each = each - model.log_probabilities + parts.flatten()
    target = each.unflatten(-1, (restarts, -1)).logsumexp(-1).sum() + parts.sum()
    kappa, nu = components.PRIOR_TASKS["mean"], components.PRIOR_TASKS["variance"]
    target = target - 0.5 * kappa * ((model.loc - loc0).square() / variance0).sum()
    rate = 0.5 * nu * components.WITHIN * variance0
    return target - (nu * model.log_scale + rate * (-2 * model.log_scale).exp()).sum()


def gradients(iterations, monkeypatch=None, **priors):
    if monkeypatch is not None:
        monkeypatch.setattr(components, "PRIOR_TASKS", components.PRIOR_TASKS | priors)
    model = line_model(4)
    start = model.loc[:1].clone().detach(), (2 * model.log_scale[:1]).exp().detach()
    observations = observed(two_kinds(40)[1], noise=0.3)
    fit_components(model, observations, 2, iterations, seed=0)
    if monkeypatch is not None:
        monkeypatch.undo()
    parameters = (model.loc, model.log_scale, model.logits)
    return torch.autograd.grad(log_target(model, observations, 2, *start), parameters)


def test_em_ends_where_the_gradient_of_its_target_is_zero(monkeypatch):
    early, late = gradients(3), gradients(500)
    for name, few, many in zip(("loc", "log_scale", "logits"), early, late, strict=True):
        assert float(many.abs().max()) < 1e-6, name
        assert float(few.abs().max()) > 1e-3, name
    other = gradients(100, monkeypatch, variance=3.0)  # EM for another prior ends elsewhere
    assert float(other[1].abs().max()) > 1e-2


def test_every_iteration_raises_the_target():
    observations = observed(two_kinds(80)[1], noise=0.3)
    values = []
    for iterations in range(1, 12):
        model = line_model(6)
        start = model.loc[:1].clone().detach(), (2 * model.log_scale[:1]).exp().detach()
        fit_components(model, observations, 2, iterations, seed=0)
        values.append(float(log_target(model, observations, 2, *start).detach()))
    assert all(later > earlier for earlier, later in itertools.pairwise(values))


def test_em_finds_two_kinds_of_task():
    second, phi = two_kinds(200)
    model, observations = line_model(2), observed(phi)
    fit_components(model, observations, 1, 60, seed=0)
    model.requires_grad_(False)
    order = model.loc[:, 0, 0].argsort()
    loc, scale = model.loc[order, 0], model.log_scale[order, 0].exp()
    belongs = ConjugatePosterior.condition(model, observations).log_joint_component.softmax(-1)
    belongs = belongs.reshape(len(phi), 2)[:, order]
    other = belongs[torch.arange(len(phi)), torch.as_tensor(~second).long()]
    assert float(other.sum()) < 0.02  # tasks between the kinds: too few to be seen in a scale
    for i, kind in enumerate((~second, second)):
        own, count = phi[kind], kind.sum()
        share = count / len(kind)
        assert float(model.log_probabilities.exp()[order[i]]) == pytest.approx(share, abs=0.03)
        error = own.std(0) / count**0.5
        assert np.all(
            np.abs(loc[i].detach().numpy() - own.mean(0)) < 1.5 * error
        )  # of these very tasks, not of the law
        # each task is of one kind, so s² = (N s_own² + ν w s₀²) / (N + ν), with the model's first scale s₀ = 1
        added = components.PRIOR_TASKS["variance"] * components.WITHIN
        variance = (count * own.var(0) + added) / (count + components.PRIOR_TASKS["variance"])
        # φ is seen with noise of variance v = σ² / Σ feature², which moves s_own² by 2 cov(φ, noise), of standard
        # deviation 2 s_own √(v / N): that of s is √(v / N)
        x = observations.x[0, :, 0].numpy()
        scale_error = 0.05 / np.array([len(x), (x**2).sum()]) ** 0.5 / count**0.5
        assert np.all(np.abs(scale[i].numpy() - variance**0.5) < 5 * scale_error)
        assert np.any(np.abs(0.5 - variance**0.5) > 20 * scale_error)  # control: where the scales began


def test_masked_observations_do_not_count():
    observations = observed(two_kinds(60)[1])
    x = torch.cat([observations.x, torch.full_like(observations.x[:, :2], 9.0)], 1)
    y = torch.cat([observations.y, torch.full_like(observations.y[:, :2], -7.0)], 1)
    mask = torch.cat([observations.full_mask(), torch.zeros(60, 2, dtype=torch.bool)], 1)
    one, other = line_model(4), line_model(4)
    fit_components(one, observations, 2, 5, seed=3)
    fit_components(other, bm.Observations(x, y, mask), 2, 5, seed=3)
    assert torch.allclose(one.loc, other.loc)
    assert torch.allclose(one.logits, other.logits)


def test_restarts_are_mixtures_by_themselves():
    observations = observed(two_kinds(60)[1])
    both, one = line_model(6), line_model(3)
    fit_components(both, observations, 2, 4, seed=5)
    fit_components(one, observations, 1, 4, seed=5)
    assert torch.allclose(both.loc[:3], one.loc)
    assert not torch.allclose(both.loc[3:], one.loc)
    halves = both.log_probabilities.exp().unflatten(0, (2, 3)).sum(-1)
    assert torch.allclose(halves, torch.full_like(halves, 0.5))


# -- the whole start --------------------------------------------------------------------------------------------------


def smooth(tasks, seed):
    """Curves with three Gaussian numbers each, noise of 0.05, and a mean that is another curve."""
    rng = np.random.default_rng(seed)
    shapes = np.stack([np.ones(8), YEARS / 5, np.sin(YEARS)])
    return 3.0 + np.cos(YEARS / 2) + rng.normal(0, 1, (tasks, 3)) @ shapes + rng.normal(0, 0.05, (tasks, 8))


@pytest.mark.parametrize("curves", [3, 2])
def test_one_component_is_the_gaussian_of_the_tasks(curves, monkeypatch):
    """Without the prior's weight, its forecasts are those of the tasks' mean and covariance; with a curve less, not."""
    monkeypatch.setattr(components, "PRIOR_TASKS", {"variance": 1e-9, "mean": 1e-9, "probability": 1.0})
    paths = smooth(600, 0)
    table = table_of(paths)
    model = curve_mixture(len(YEARS), curves, 1, 1.0).double()
    begin(model, table, restarts=1, noise_scale=0.05, iterations=30, seed=0)
    batch = table_of(smooth(6, 1)).with_standardizer(table.standardizer).all(support=4)
    found = bm.BayesianLastLayerMixture(model).adapt(batch.support).predictive(batch.query.x)
    units = table.standardizer
    scaled = torch.as_tensor((paths - float(units.y_mean)) / float(units.y_scale))
    joint = torch.cov(scaled.T, correction=0)
    gain = torch.linalg.solve(joint[:4, :4], joint[:4, 4:])
    mean = scaled.mean(0)[4:] + (batch.support.y - scaled.mean(0)[:4]) @ gain
    scale = (joint[4:, 4:] - joint[4:, :4] @ gain).diagonal().sqrt()
    error = ((found.mean - mean) / scale).square().mean().sqrt()
    # what differs: the model is given its noise, one number; the covariance of eight years learns it from the tasks
    assert (float(error) < 0.5) == (curves == 3)
    # after four years and the mean, 595 degrees of freedom are left for each scale: a standard error of 1 / √(2 · 595)
    free = len(paths) - 5
    unbiased, bound = scale * (len(paths) / free) ** 0.5, 4 / (2 * free) ** 0.5
    assert torch.allclose(found.stddev, unbiased.expand_as(mean), rtol=bound) == (curves == 3)


def test_the_mixture_starts_better_than_the_empirical_gaussian():
    """On validation countries of a split whose held-out ones no figure uses."""
    from bayesmeta.demo.baselines import empirical_gaussian
    from bayesmeta.tasks import fertility_split

    split = fertility_split(101)
    model = curve_mixture(52, 12, 8, 0.03)
    begin(model, split.train, restarts=1, noise_scale=0.03, iterations=6, seed=0)
    batch = split.validation.all(support=10)
    ours = bm.scores(bm.BayesianLastLayerMixture(model).adapt(batch.support), batch, num_samples=100)
    raw = split.validation.with_standardizer(None).all(support=10)
    theirs = bm.scores(empirical_gaussian(split.train, raw), raw)
    assert ours["nll"] < theirs["nll"] - 0.05


def test_bad_input_is_refused(table):
    observations = observed(two_kinds(10)[1])
    for restarts, iterations in ((4, 1), (0, 1), (2, 0)):
        with pytest.raises(OptionError, match="restarts"):
            fit_components(line_model(6), observations, restarts, iterations, 0)
    with pytest.raises(OptionError, match="at most 10"):
        fit_components(line_model(12), observations, 1, 1, 0)
    for count in (0, 8):
        with pytest.raises(OptionError, match="principal curves"):
            principal_curves(table, count)
    with pytest.raises(OptionError, match="knots"):
        curve_network(1, 3)
    with pytest.raises(OptionError, match="8 knots"):
        set_curves(curve_network(5, 4)[:-1], principal_curves(table, 3))
    with pytest.raises(EmptyTaskError, match="at least 10"):
        principal_curves(table.subset([0, 1, 2]), 1)
    unknown = bm.ConjugateModel(bm.nets.mlp(1, [3], 1), bm.Gaussian(0.1), 2, noise="inverse_gamma")
    with pytest.raises(UnsupportedError, match="known scale"):
        fit_components(unknown, bm.Observations(torch.zeros(5, 3, 1), torch.zeros(5, 3)), 1, 1, 0)
