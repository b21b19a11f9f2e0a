"""The multilevel benchmark: its marginal density, its guide, its data and its rows, each against something known."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import MultivariateNormal, Normal, biject_to

import bayesmeta as bm
from benchmarks import _multilevel_fit as fitting
from benchmarks import _multilevel_model as model
from benchmarks import _multilevel_reference as ref
from benchmarks import multilevel

WIDTHS = (1, 3)  # without and with fixed effects


def simulate(num_tasks: int = 6, width: int = 1, seed: int = 0, longest: int = 9) -> bm.Observations:
    """Ragged tasks; the last has one row. As x is never negative, intercept and slope correlate a posteriori."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    lengths = [longest - i % 4 for i in range(num_tasks - 1)] + [1]
    xs, ys = [], []
    for length in lengths:
        x = torch.rand(length, width, **kind) * 3
        effect = torch.tensor([0.3, -0.4]) + torch.tensor([0.5, 0.4]) * torch.randn(2, **kind)
        y = effect[0] + effect[1] * x[:, 0] + 0.2 * x[:, 1:].sum(-1) + 0.5 * torch.randn(length, **kind)
        xs.append(x)
        ys.append(y)
    return bm.collate(xs, ys)


def random_theta(data: bm.Observations, *lead: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(*lead, data.num_features + 5, generator=generator, dtype=torch.float64)


def marginal(data: bm.Observations) -> ref.Marginal:
    return ref.Marginal(ref.Sums.of(data))


# -- the marginal density -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_marginal_times_conditional_is_the_programs_joint(width):
    # p(y, φ | θ) = p(y | θ) p(φ | y, θ) at every φ: only if both factors are right, constants included
    data = simulate(width=width)
    program = bm.TaskProgram(model.Multilevel()).prepare(data)
    theta = random_theta(data, 4)
    loc, covariance = marginal(data).conditional(theta)
    u = loc + 0.3 * torch.randn(loc.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    joint = program.log_joint(u, data, theta)
    ours = marginal(data).log_likelihood(theta) + MultivariateNormal(loc, covariance).log_prob(u)
    torch.testing.assert_close(ours, joint, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        marginal(data).log_prior(theta), program.log_theta(theta, data, jacobian=True), rtol=1e-12, atol=1e-12
    )
    # control: the Gaussians of another θ are not these
    moved = MultivariateNormal(*marginal(data).conditional(theta.roll(1, 0)))
    wrong = marginal(data).log_likelihood(theta) + moved.log_prob(u)
    assert float((wrong - joint).abs().min()) > 1e-4


@pytest.mark.parametrize("width", WIDTHS)
def test_marginal_and_conditional_are_those_of_the_dense_gaussian(width):
    data, theta = simulate(width=width), random_theta(simulate(width=width))
    loc, covariance = marginal(data).conditional(theta)
    log_likelihood = marginal(data).log_likelihood(theta)
    beta, scale, noise = theta[:-4], theta[-4:-2].exp(), theta[-1].exp()
    rho = theta[-2].tanh()
    prior = scale.outer(scale) * torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    for task, length in enumerate(data.counts().int().tolist()):
        x, y = data.x[task, :length], data.y[task, :length]
        design = torch.cat([torch.ones_like(x[:, :1]), x], -1)
        z = design[:, :2]
        total = z @ prior @ z.mT + noise**2 * torch.eye(length, dtype=torch.float64)
        gain = prior @ z.mT @ torch.linalg.inv(total)
        expected = MultivariateNormal(design @ beta, total).log_prob(y)
        torch.testing.assert_close(log_likelihood[task], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loc[task], beta[:2] + gain @ (y - design @ beta), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(covariance[task], prior - gain @ z @ prior, rtol=1e-9, atol=1e-9)


def test_marginal_is_differentiable():
    data = simulate(width=3)
    theta = random_theta(data).requires_grad_()
    assert torch.autograd.gradcheck(marginal(data).log_density, theta)


# -- the guide ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_parameter_store() -> Iterator[None]:
    """A guide that runs outside MetaSVI would leave its parameters in Pyro's global store."""
    with pyro.get_param_store().scope():
        yield


def random_guide(data: bm.Observations, seed: int = 3, size: float = 0.3) -> model.FullRank:
    guide = model.FullRank(data)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return guide


def guide_log_density(guide: model.FullRank, data: bm.Observations) -> tuple[torch.Tensor, torch.Tensor]:
    """Log density of a draw of the guide in the program's unconstrained space: the guide's own, and −log |Jacobian|
    of the map from its standard normal noise, by automatic differentiation."""
    program = bm.TaskProgram(model.Multilevel()).prepare(data)
    sites = {s.name: s for s in (*program.layout.theta, *program.layout.local)}
    size = data.num_features + 5
    trace = poutine.trace(guide).get_trace(data.x, data.y, data.mask)
    nodes = poutine.trace(model.Multilevel()).get_trace(data.x, data.y, data.mask).nodes
    supports = {name: nodes[name]["fn"].support for name in sites}
    noise = torch.cat([trace.nodes[n]["value"].flatten() for n in ("_theta", "_effect")])

    def unconstrained(noise: torch.Tensor) -> torch.Tensor:
        given = {"_theta": noise[:size], "_effect": noise[size:].reshape(data.num_tasks, 1, 2)}
        values = poutine.trace(poutine.condition(guide, given)).get_trace(data.x, data.y, data.mask).nodes
        return torch.cat([biject_to(supports[n]).inv(values[n]["value"]).flatten() for n in sites])

    jacobian = torch.autograd.functional.jacobian(unconstrained, noise)
    by_hand = Normal(0.0, 1.0).log_prob(noise).sum() - jacobian.slogdet().logabsdet
    log_det = torch.zeros((), dtype=torch.float64)
    for name in sites:
        transform, value = biject_to(supports[name]), trace.nodes[name]["value"]
        log_det = log_det + transform.log_abs_det_jacobian(transform.inv(value), value).sum()
    return trace.log_prob_sum() + log_det, by_hand


@pytest.mark.parametrize("width", WIDTHS)
def test_guides_density_is_that_of_its_draws(width):
    data = simulate(num_tasks=3, width=width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours, by_hand = guide_log_density(random_guide(data), data)
    torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-9)


def test_gradient_with_parameters_held_fixed_is_unbiased():
    # a central difference of the ELBO under common random numbers keeps the term that the guide leaves out; its mean
    # is 0, so that the two agree to within Monte Carlo error
    data = simulate(num_tasks=2)
    guide, program = random_guide(data, size=0.1), model.Multilevel()
    with torch.no_grad():
        guide.theta_loc[0] += 1.0  # far off, so that gradients are large beside their noise
    elbo = pyro.infer.Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=2)
    step = 1e-5
    entries = {"theta_loc": (0,), "theta_log_diagonal": (1,), "local_base": (0, 2), "log_bend": (1,)}

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        with torch.no_grad():
            return elbo.loss(program, guide, data.x, data.y, data.mask)

    gaps: dict[str, list[float]] = {name: [] for name in entries}
    gradients: dict[str, list[float]] = {name: [] for name in entries}
    with torch.random.fork_rng():
        for seed in range(8):
            guide.zero_grad()
            torch.manual_seed(seed)
            elbo.differentiable_loss(program, guide, data.x, data.y, data.mask).backward()
            for name, index in entries.items():
                parameter = getattr(guide, name)
                gradients[name].append(float(parameter.grad[index]))
                values = []
                for sign in (1, -1):
                    with torch.no_grad():
                        parameter[index] += sign * step
                        values.append(loss(seed))
                        parameter[index] -= sign * step
                gaps[name].append((values[0] - values[1]) / (2 * step) - gradients[name][-1])
    for name, gap in gaps.items():
        gap = np.array(gap)
        error = gap.std(ddof=1) / len(gap) ** 0.5
        assert abs(gap.mean()) <= 5 * error + 1e-4, name
    # control: the gradients are not so small or noisy that anything would agree
    for name, gradient in gradients.items():
        gap = np.array(gaps[name])
        assert abs(np.mean(gradient)) > 10 * gap.std(ddof=1) / len(gap) ** 0.5, name


def test_guide_is_exact_where_its_factor_is():
    # sd 1 of the noise: a factor Zᵀ Z around the least-squares line is then the task's likelihood, whatever θ's rest
    data = simulate()
    data = bm.Observations(data.x[:-1], data.y[:-1], data.mask[:-1])  # the line of one row needs the ridge
    base = model._least_squares(data, ridge=1e-9)
    theta = random_theta(data)
    theta[-1] = 0.0
    scale, raw = theta[-4:-2].exp(), theta[-2:-1]
    prior = scale.unsqueeze(-1) * biject_to(torch.distributions.constraints.corr_cholesky)(raw)
    guide = model.FullRank(data)
    with torch.no_grad():
        guide.local_base.copy_(base)
    loc, root = model._product(theta[:2], prior, *guide._factor(torch.zeros_like(theta)))
    expected, covariance = marginal(data).conditional(theta)
    torch.testing.assert_close(loc.squeeze(-2), expected, rtol=1e-6, atol=1e-6)  # the ridge over the least curvature
    torch.testing.assert_close((root @ root.mT).squeeze(-3), covariance, rtol=1e-6, atol=1e-6)


def test_draws_at_once_are_those_of_the_library():
    data = simulate()
    guide = random_guide(data)
    svi = bm.MetaSVI(model.Multilevel(), guide, lambda p: torch.optim.Adam(p, 1e-3), pyro.infer.Trace_ELBO())
    one_by_one = svi.posterior(data, num_samples=200).sample(200)["effect"]
    at_once = fitting.draw_effects(guide, data, 4000, seed=0)
    assert at_once.shape == (4000, 6, 2)
    assert not pyro.get_param_store().keys()  # where they would stand in for the parameters of the next guide
    error = (one_by_one.var(0) / 200 + at_once.var(0) / 4000).sqrt()
    assert float(((one_by_one.mean(0) - at_once.mean(0)) / error).abs().max()) < 5
    # log sd has the standard error √((kurtosis − 1) / 4n)
    off = (at_once - at_once.mean(0)) / at_once.std(0)
    error = ((off**4).mean(0) - 1).div(4 * 200).sqrt()
    assert float(((one_by_one.std(0) / at_once.std(0)).log() / error).abs().max()) < 5


def test_training_leaves_global_state_alone():
    before = torch.random.get_rng_state()
    guide = fitting.fit_full_rank(simulate(), steps=8, seed=0)
    again = fitting.fit_full_rank(simulate(), steps=8, seed=0)
    other = fitting.fit_full_rank(simulate(), steps=8, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not pyro.get_param_store().keys()
    assert torch.equal(guide.local_slope, again.local_slope)
    assert not torch.equal(guide.local_slope, other.local_slope)


# -- moments ------------------------------------------------------------------------------------------------------


def test_moments_of_a_mixture():
    means = torch.tensor([[[0.0, 1.0]], [[2.0, 5.0]]], dtype=torch.float64)  # two components, one task
    covariance = torch.tensor([[[[1.0, 0.5], [0.5, 4.0]]], [[[3.0, -0.5], [-0.5, 2.0]]]], dtype=torch.float64)
    found = ref.Moments.of_mixture(means, covariance)
    # within: [[2, 0], [0, 3]]; between: [[1, 2], [2, 4]]
    torch.testing.assert_close(found.mean, torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(found.sd, torch.tensor([[3.0, 7.0]], dtype=torch.float64).sqrt())
    torch.testing.assert_close(found.correlation, torch.tensor([2 / 21**0.5], dtype=torch.float64))
    wider = replace(found, mean=found.mean + torch.tensor([3**0.5, 0.0]), sd=found.sd * 0.8)
    torch.testing.assert_close(wider.mean_error(found), torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(wider.sd_error(found), torch.tensor([[0.2, 0.2]], dtype=torch.float64))


def reference_of(effects: torch.Tensor) -> ref.Reference:
    return ref.Reference(ref.Moments.of_mixture(effects.flatten(0, 1)), 1.0, 1000.0, 0.01, 0)


def test_z_of_two_runs():
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(2, 400, 5, 2, generator=generator, dtype=torch.float64)
    truth = reference_of(torch.randn(2, 20_000, 5, 2, generator=generator, dtype=torch.float64))
    assert ref.plain_z(truth, effects) < 5
    shifted = effects.clone()
    shifted[..., 3, 1] += 0.5  # half a standard deviation is 0.5 √800 = 14 Monte Carlo errors
    assert ref.plain_z(truth, shifted) > 8


# -- NUTS and its file --------------------------------------------------------------------------------------------


def test_nuts_is_kept_and_redone_on_request(tmp_path):
    data, calls = simulate(), []

    def sample(data: bm.Observations, settings: ref.Settings) -> dict[str, torch.Tensor]:
        calls.append(settings)
        return {"theta": torch.full((1, 1, 6), float(len(calls))), "divergences": torch.tensor(0)}

    settings = ref.Settings(1, 2, 3)
    for _ in range(2):
        assert float(ref.cached("a", sample, data, settings, tmp_path)["theta"].mean()) == 1.0
    assert float(ref.cached("a", sample, data, settings, tmp_path, refresh=True)["theta"].mean()) == 2.0
    assert float(ref.cached("a", sample, data, replace(settings, seed=1), tmp_path)["theta"].mean()) == 3.0
    moved = bm.Observations(data.x, data.y + 1e-9, data.mask)
    assert float(ref.cached("a", sample, moved, settings, tmp_path)["theta"].mean()) == 4.0
    assert float(ref.cached("a", sample, data, settings, tmp_path)["theta"].mean()) == 2.0
    assert not list(tmp_path.glob("*.tmp"))


def test_short_nuts_is_reproducible_and_summarised():
    data, settings = simulate(num_tasks=3), ref.Settings(chains=2, warmup=4, draws=6, seed=4)
    before = torch.random.get_rng_state()
    first, second = ref.marginal_nuts(data, settings), ref.marginal_nuts(data, replace(settings, chains=1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first["theta"].shape == (2, 6, 6)
    assert torch.equal(first["theta"][:1], second["theta"])
    assert not torch.equal(first["theta"][0], first["theta"][1])
    found = ref.summarise(data, first, seed=0)
    assert found.moments.mean.shape == (3, 2)
    assert found.error > 0


def test_rhat_and_error_see_chains_that_disagree():
    data = simulate()
    generator = torch.Generator().manual_seed(0)
    theta = random_theta(data) + 0.05 * torch.randn(4, 300, 6, generator=generator, dtype=torch.float64)
    divergences = torch.tensor(0)
    good = ref.summarise(data, {"theta": theta, "divergences": divergences}, 0)
    assert good.rhat < 1.02
    assert good.error < 5 / 1200**0.5
    theta[0, :, 0] += 0.5
    bad = ref.summarise(data, {"theta": theta, "divergences": divergences}, 0)
    assert bad.rhat > 1.1
    assert bad.error > 2 * good.error


# -- data ---------------------------------------------------------------------------------------------------------


def write_tables(folder: Path) -> None:
    """Small tables with the columns of the real ones."""
    rng = np.random.default_rng(0)
    (folder / "multilevel").mkdir()
    days = pd.DataFrame({"Subject": np.repeat([310, 308, 309], [4, 5, 3]), "Days": [*range(4), *range(5), *range(3)]})
    days["Reaction"] = 250 + 10 * days["Days"] + rng.normal(0, 20, 12)
    days.to_csv(folder / "multilevel" / "sleepstudy.csv", index=False)
    milk = pd.DataFrame({"Cow": np.repeat(["a", "b", "c"], 4), "Time": np.tile([1, 2, 3, 4], 3)})
    milk["Diet"] = milk["Cow"].map({"a": "barley", "b": "lupins", "c": "barley+lupins"})
    milk["protein"] = 3.4 + rng.normal(0, 0.3, 12)
    milk.to_csv(folder / "multilevel" / "milk.csv", index=False)


def test_tables_are_read_in_their_units(tmp_path, monkeypatch):
    write_tables(tmp_path)
    monkeypatch.setenv("BAYESMETA_DATA", str(tmp_path))
    data = model.load("sleepstudy")
    assert data.x.dtype == torch.float64
    assert data.counts().tolist() == [5, 3, 4]  # subjects 308, 309, 310
    raw = pd.read_csv(tmp_path / "multilevel" / "sleepstudy.csv")
    scale = raw["Days"].std(ddof=0)
    torch.testing.assert_close(data.x[0, :, 0] * scale, torch.arange(5, dtype=torch.float64))
    y = data.y[data.full_mask()]
    torch.testing.assert_close(y.mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.std(correction=0), torch.ones((), dtype=torch.float64))
    milk = model.load("milk")
    assert milk.x[:, 0, 1:].tolist() == [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_missing_data_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESMETA_DATA", str(tmp_path))
    with pytest.raises(bm.errors.DataError, match="BAYESMETA_DATA"):
        model.load("radon")


def test_real_tables():
    if not (model.data_folder() / "multilevel").is_dir():
        pytest.skip("the multilevel data sets are not beside this checkout (BAYESMETA_DATA)")
    data = {name: model.load(name) for name in model.SOURCES}
    sizes = {name: (d.num_tasks, int(d.counts().sum()), d.num_features) for name, d in data.items()}
    assert sizes == {"radon": (85, 919, 2), "sleepstudy": (18, 180, 1), "exam": (65, 4059, 1), "milk": (79, 1337, 3)}


# -- the whole ----------------------------------------------------------------------------------------------------


def arguments(tmp_path: Path, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    multilevel.add_arguments(parser)
    return parser.parse_args([*argv, "--cache", str(tmp_path / "cache")])


def test_rows(tmp_path, monkeypatch):
    write_tables(tmp_path)
    monkeypatch.setenv("BAYESMETA_DATA", str(tmp_path))
    tiny = ref.Settings(chains=2, warmup=5, draws=8)
    for name in ("LONG", "SHORT", "PLAIN"):
        monkeypatch.setattr(multilevel, name, tiny)
    few = {"steps": 2, "inner_steps": 2}
    monkeypatch.setattr(multilevel, "fit_mean_field", lambda *a, **k: fitting.fit_mean_field(*a, **(k | few)))
    moments = fitting.mean_field_moments
    monkeypatch.setattr(multilevel, "mean_field_moments", lambda *a, **k: moments(*a, **(k | {"inner_steps": 2})))
    effects = torch.randn(2, 20, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(multilevel, "plain_nuts", lambda data, settings: {"effect": effects})
    rows = {r.name: r for r in multilevel.run(arguments(tmp_path, "--data", "sleepstudy", "--steps", "4"))}
    barred = {name for name, row in rows.items() if row.bar is not None}
    assert barred == {
        "sleepstudy_nuts_rhat_max",
        "sleepstudy_nuts_mean_monte_carlo_error_max",
        "sleepstudy_plain_nuts_z_max",
        "sleepstudy_fullrank_mean_error_max",
        "sleepstudy_fullrank_sd_error_max",
        "sleepstudy_nuts_correlation",
        "sleepstudy_meanfield_sd_ratio",
    }
    errors = ("mean_error_max", "sd_error_max", "within", "correlation")
    assert {f"sleepstudy_meanfield_{error}" for error in errors} <= set(rows)
    assert rows["sleepstudy_fullrank_within"].ours <= 1
    assert len(list((tmp_path / "cache").iterdir())) == 2
    # a quick run has none
    quick = multilevel._row("a", 1.0, multilevel.at_most(0), arguments(tmp_path, "--quick"))
    assert quick.bar is None


@pytest.mark.slow
def test_full_rank_is_near_nuts_and_mean_field_is_not():
    data = simulate(num_tasks=20, seed=5)
    truth = ref.summarise(data, ref.marginal_nuts(data, ref.Settings(2, 200, 800)), 0)
    guide = fitting.fit_full_rank(data, steps=2000, seed=0)
    found = ref.Moments.of_mixture(fitting.draw_effects(guide, data, fitting.DRAWS, 0))
    assert float(found.mean_error(truth.moments).max()) < 0.1
    assert float(found.sd_error(truth.moments).max()) < 0.1
    method = fitting.fit_mean_field(data, steps=100, seed=0)
    wrong = fitting.mean_field_moments(method, data, inner_steps=200, seed=0)
    assert float(wrong.sd_error(truth.moments).max()) > 0.2


@pytest.mark.slow
def test_marginal_nuts_agrees_with_nuts_on_the_program():
    data = simulate(num_tasks=8, seed=6)
    draws = ref.marginal_nuts(data, ref.Settings(1, 150, 400))
    plain = ref.plain_nuts(data, ref.Settings(1, 150, 200))
    assert plain["effect"].shape == (1, 200, 8, 2)
    assert ref.plain_z(ref.summarise(data, draws, 0), plain["effect"]) < 5
    # control: four rows moved by three noises
    y = data.y.clone()
    y[0, :4] += 1.5
    changed = ref.summarise(bm.Observations(data.x, y, data.mask), draws, 0)
    assert ref.plain_z(changed, plain["effect"]) > 5
