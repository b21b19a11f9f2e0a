"""The SBC benchmark: its models and controls, what its rows and words say, and that short runs work."""

from __future__ import annotations

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta.diagnostics.uniformity import legendre
from benchmarks import _sbc_methods as methods
from benchmarks import _sbc_theta as theta
from benchmarks import sbc as benchmark
from benchmarks._sbc_models import MODELS, template


def test_templates_and_models_fit_each_other():
    for name, make in MODELS.items():
        support = template(name, 12, 0)
        assert support.counts().min() >= 1
        assert support.y.dim() == (3 if name == "inverse_wishart" else 2)
        method = bm.DeepKernel(make()) if name == "kernel" else bm.ABML(make(), inner_steps=0)
        assert method.adapt(support).draws(2).u.isfinite().all(), name
    assert {model for _, model in methods.RUNS} == set(MODELS), "each model has a run"


def test_the_exact_ones_pass_and_controls_fail():
    rows = {}
    for name in ("last_layer_linear", "last_layer_mixture_mixture", "closed_form_hierarchy", "control_narrow"):
        rows |= {row.name: row for row in benchmark.measure(name, 0, True)}
    assert rows["last_layer_linear_p"].passes
    assert rows["last_layer_mixture_mixture_p"].passes
    assert rows["closed_form_hierarchy_p"].passes
    assert rows["control_narrow_p"].passes
    assert rows["control_narrow_p"].bar == "≤ 0.001"
    narrow = rows["control_narrow_dispersion"]
    assert narrow.ours > 5 * narrow.standard_error
    (p, *_) = benchmark.measure("control_narrow_100", 0, False)
    assert p.passes
    assert p.bar == "≤ 0.05", "100 ranks can fail, though not as surely as 2000"
    for how in ("shifted", "prior", "uncorrelated"):
        (p, dispersion, fit) = benchmark.measure(f"control_{how}", 0, True)
        assert p.passes, how
        if how != "shifted":  # φ itself is calibrated
            assert abs(dispersion.ours) < 4 * dispersion.standard_error
            assert fit.ours > 5 * fit.standard_error


def test_an_exact_method_that_is_not_falls_short(monkeypatch):
    wrong = methods.Run(lambda: benchmark.Changed("narrow"), exact=True)
    monkeypatch.setitem(methods.RUNS, ("last_layer", "linear"), wrong)
    monkeypatch.setattr(methods, "train", lambda run, model, seed, steps: run.make())
    assert benchmark.measure("last_layer_linear", 0, True)[0].passes is False


def test_what_so_many_ranks_see():
    """The measured probabilities, by a few more runs at 100 ranks."""
    assert [benchmark.seen(count) for count in (50, 100, 199, 200, 600, 2000)] == [None, 0.7, 0.7, 0.8, 0.8, 0.9]
    caught = {}
    for factor in (0.7, 0.9):
        method, below = benchmark.Changed("narrow", factor), 0
        simulator = bm.ABML(method.program, inner_steps=0)
        for seed in range(10):
            inputs = template("linear", 100, seed)
            found = bm.sbc_method(method, inputs, num_draws=31, alpha=1e-3, simulator=simulator, generator=seed)
            below += min(found.values()) * len(found) * benchmark.exact_runs() < benchmark.ALPHA
        caught[factor] = below / 10
    for factor, share in caught.items():
        power = benchmark.POWER[100][factor]
        assert abs(share - power) < 4 * (power * (1 - power) / 10) ** 0.5


def test_an_exact_run_says_what_it_would_have_seen(capsys):
    rows = {row.name: row for row in benchmark.measure("closed_form_hierarchy", 0, True)}
    assert rows["closed_form_hierarchy_seen"].ours == 0.8
    assert "400 ranks; would have seen spread × 0.8" in capsys.readouterr().out
    assert not [row for row in benchmark.measure("laplace_diagonal_linear", 0, True) if row.name.endswith("_seen")]


def test_approximate_ones_have_findings_without_bars(capsys):
    rows = {row.name: row for row in benchmark.measure("laplace_diagonal_linear", 0, True)}
    assert rows["laplace_diagonal_linear_p"].bar is None
    assert rows["laplace_diagonal_linear_dispersion"].ours > 0.1
    assert "too narrow in 0.weight[" in capsys.readouterr().out


def test_training_leaves_the_model_as_it_is():
    run = methods.RUNS["amortised", "linear"]
    method = methods.train(run, "linear", 0, 3)
    fresh = run.make().program
    assert method.program.prior.log_scale.equal(fresh.prior.log_scale)
    assert method.program.prior.loc.equal(fresh.prior.loc)
    other = methods.train(run, "linear", 0, 1)
    changed = [not a.equal(b) for a, b in zip(method.parameters(), other.parameters(), strict=True)]
    assert any(changed), "the encoder learns"
    refined = methods.train(methods.RUNS["semi_nuts", "linear"], "linear", 0, 1)
    assert isinstance(refined, bm.SemiAmortised)


def test_spread_factor_inverts_the_dispersion():
    """Of N(0, 1) among N(0, f²), by draws."""
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for factor in (0.5, 0.8, 1.0, 1.6):
        dispersion = legendre(torch.special.ndtr(z / factor))[:, 1].mean()
        assert benchmark.spread_factor(float(dispersion)) == pytest.approx(factor, rel=0.02)


def test_hierarchies_as_one_program_are_independent_hierarchies():
    """The log-density of the program is the sum over hierarchies, by hand; so are MetaSVI's and NUTS's posteriors."""
    generator = torch.Generator().manual_seed(0)
    truth, y = theta.simulate(4, True, generator)
    data = theta.observations(y)
    program = bm.TaskProgram(theta.program(4, True))
    program.prepare(data)
    phi = torch.randn(12, 1, generator=generator)
    sites = torch.cat([truth["mu"], truth["tau"].log()]).unsqueeze(0)
    found = program.log_joint(phi.unsqueeze(0), data, sites).sum()
    normal = torch.distributions.Normal
    by_hand = normal(truth["mu"].repeat_interleave(3), truth["tau"].repeat_interleave(3)).log_prob(phi[:, 0]).sum()
    constant = -0.5 * math.log(2 * math.pi) * y.numel()
    by_hand = by_hand + theta.log_likelihood(phi.reshape(4, 3), y).sum() + constant
    assert float(found) == pytest.approx(float(by_hand), rel=1e-5)


def test_a_short_fit_by_svi_has_all_quantities():
    run = theta.Theta(theta.variational(theta.AutoNormal, 3, steps=3))
    found = theta.judge(run, 5, 0, 0.01)
    assert {name: len(r) for name, r in found.ranks.items()} == {"mu": 5, "phi": 5, "log_likelihood": 5}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nuts_linear", "nuts_theta_hierarchy", "amortised_flow_scale", "platipus_linear"])
def test_short_runs(name):
    rows = benchmark.measure(name, 0, True)
    expected = ["p", "dispersion", "fit", *(["seen"] if name.startswith("nuts") else [])]
    assert [row.name for row in rows] == [f"{name}_{ending}" for ending in expected]
    assert rows[0].passes in ((True,) if name.startswith("nuts") else (None,))
