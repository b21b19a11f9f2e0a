"""What results say of themselves: verdicts that claim no more than the data show, and short prints."""

import math

import pytest
import scipy.stats
import torch
from forecast_cases import Labels, Linear, label_tasks, linear_tasks

import bayesmeta as bm
from bayesmeta.diagnostics import verdicts
from bayesmeta.diagnostics.checks import as_batch
from bayesmeta.diagnostics.simulation import spreads_seen
from bayesmeta.errors import OptionError
from tests.programs import TwoSites, batch_of

F64 = torch.float64
CLEAN = "No correction is called for."


def judged(num_tasks, factor=1.0, seed=4):
    tasks, batch = linear_tasks(num_tasks, seed=seed)
    return bm.calibration(Linear(tasks, batch.support, factor), batch)


# -- verdicts on calibration --------------------------------------------------------------------------------------


def test_many_tasks_without_a_sign_are_called_calibrated():
    found = judged(1500)
    assert found["p_value"] >= 0.1, "the setting of the test"
    assert found["calibration_noise"] < 0.02, "the setting of the test"
    assert found.verdict.endswith(f"calibrated (p = {found['p_value']:.2g}). {CLEAN}")


def test_few_tasks_only_show_gross_errors():
    found = judged(15)
    assert found.finding == "calibrated"
    assert CLEAN not in found.verdict
    assert "calibrated (p" not in found.verdict
    error, noise = found["calibration_error"], found["calibration_noise"]
    assert f"with 15 tasks only a gross one would be (calibration error {error:.3f}; by chance {noise:.3f})" in (
        found.verdict
    )
    # what the sentence says of 15 tasks is so: spread a third too small is often missed, and found with many
    missed = [judged(15, 0.75, seed) for seed in range(6)]
    assert sum(r.finding == "calibrated" for r in missed) >= 3
    assert not any(CLEAN in r.verdict for r in missed)
    assert judged(1500, 0.75).finding == "over-confident"


def numbers(**values):
    ours = {"calibration_error": 0.086, "calibration_noise": 0.01, "coverage_90": 0.9, "p_value": 0.5}
    return ours | values


@pytest.mark.parametrize(
    ("values", "tasks", "expected"),
    [
        ({}, 200, f"calibrated (p = 0.5). {CLEAN}"),
        ({"p_value": 0.1}, 30, CLEAN),
        ({"p_value": 0.099}, 200, "some sign of one (calibration error 0.086; by chance 0.010). So small a p-value"),
        ({"calibration_noise": 0.021}, 200, "only one well above the noise would be"),
        ({"calibration_noise": math.nan}, 200, "only one well above the noise would be"),
        ({}, 29, "with 29 tasks only a gross one would be"),
        ({"p_value": 0.049}, 15, "by chance 0.010). So small a p-value is no clean bill"),
    ],
)
def test_the_border_between_no_evidence_and_evidence(values, tasks, expected):
    text = verdicts.conclusion("calibrated", numbers(**values), {}, tasks, "real")
    assert expected in text
    assert (CLEAN in text) == (CLEAN in expected)


def test_classes():
    batch, logits = label_tasks(400, seed=1)
    many = bm.calibration(Labels(batch.support, logits), batch)
    few = batch.tasks(slice(0, 12))
    found = bm.calibration(Labels(few.support, logits[:12]), few)
    assert CLEAN in many.verdict
    assert CLEAN not in found.verdict
    gap, error = found["gap"], found.standard_errors["gap"]
    assert f"(confidence less accuracy {gap:+.3f} ± {error:.3f})" in found.verdict


def test_the_worst_level_is_named_where_90_percent_shows_nothing():
    levels = torch.tensor([0.5, 0.9], dtype=F64)
    errors, coverage = {"coverage_90": 0.05}, {"coverage_90": 0.88}

    def say(covered, p=0.05, spread=0.07):
        curve = [levels, torch.tensor([covered, 0.88], dtype=F64), torch.tensor([spread, 0.05], dtype=F64)]
        return verdicts.of_numbers(numbers(p_value=p, **coverage), errors, curve, 15)

    told = "90% intervals cover 88.0% ± 5.0%, 50% ones 70.0% ± 7.0%, of the query of 15 tasks: "
    assert say(0.7) == told
    plain = "90% intervals cover 88.0% ± 5.0% of the query of 15 tasks: "
    assert say(0.7, p=0.2) == say(0.6) == say(0.7, spread=0.11) == plain  # within chance
    coverage = {"coverage_90": 0.7}  # tells by itself
    assert "50%" not in say(0.2)


# -- too few ranks ------------------------------------------------------------------------------------------------


def ranks_of(count, factor=1.0, seed=0, num_draws=63):
    def simulate(generator):
        truth = torch.randn(count, generator=generator, dtype=F64)
        return {"phi": truth}, None

    noise = torch.Generator().manual_seed(seed + 1000)

    def infer(_):
        return {"phi": factor * torch.randn(num_draws, count, generator=noise, dtype=F64)}

    return bm.sbc(simulate, infer, num_simulations=1, generator=seed)


@pytest.mark.parametrize("count", [2, 5, 19])
def test_few_ranks_pass_nothing(count):
    found = ranks_of(count)
    assert found.findings == {"phi": "unknown"}
    assert not found.passes
    assert "at least 20 are needed to pass" in str(found)
    assert ranks_of(20, seed=1).passes, "control"


def test_few_ranks_can_accuse():
    assert ranks_of(15, 0.01).findings == {"phi": "too narrow"}


def test_two_ranks_could_show_no_spread():
    assert spreads_seen(2, 0.01) == (0.0, math.inf)
    assert "no spread, however wrong, would be found" in str(ranks_of(2))


def test_the_spread_that_would_be_seen_is_seen_half_the_time():
    narrow, wide = spreads_seen(100, 0.01)
    assert 0.5 < narrow < 1 < wide < 2
    z = scipy.stats.norm.isf(0.01 / 24)
    for factor, sign in ((narrow, 1), (wide, -1)):
        u = scipy.stats.norm.cdf(torch.randn(400_000, generator=torch.Generator().manual_seed(0)) / factor)
        dispersion = math.sqrt(5) * (6 * u**2 - 6 * u + 1)
        error = dispersion.std() / math.sqrt(len(u))
        assert abs(dispersion.mean() - sign * z / 10) < 4 * error
    seen = sum(not ranks_of(100, narrow, seed).passes for seed in range(20))
    assert 4 <= seen <= 18  # of 20 tosses
    assert sum(not ranks_of(100, 0.5 * (1 + narrow), seed).passes for seed in range(10)) <= 3, "control"


def test_tarp_of_few_simulations():
    generator = torch.Generator().manual_seed(0)
    draws, truth = torch.randn(63, 19, 2, generator=generator), torch.randn(19, 2, generator=generator)
    found = bm.tarp(draws, truth)
    assert found.finding == "unknown"
    assert repr(found).startswith("<TARP over 19 simulations: unknown")


# -- prints -------------------------------------------------------------------------------------------------------


def results():
    tasks, batch = linear_tasks(40)
    posterior = Linear(tasks, batch.support)
    known = bm.surprise(posterior, num_samples=200)
    return {
        "Calibration": bm.calibration(posterior, batch),
        "Decomposition": bm.decompose(posterior, batch.query, num_samples=20, num_outcomes=20),
        "Surprise": known,
        "ROC": bm.roc(known, known.scores + 1.0),
        "SBC": ranks_of(40),
    }


def test_no_print_shows_a_tensor():
    for name, result in results().items():
        assert name in repr(result)
        assert "\n" not in repr(result)
        assert len(repr(result)) < 500
        assert "tensor(" not in repr(result) + str(result)


def test_a_decomposition_as_a_table():
    tasks, batch = linear_tasks(40)
    parts = bm.decompose(Linear(tasks, batch.support, closed=False), batch.query, num_samples=20, num_outcomes=20)
    lines = str(parts).splitlines()
    assert lines[0].endswith("of 40 tasks, 20 draws of φ")
    each = parts.per_task("epistemic_variance")
    (line,) = (line for line in lines if line.startswith("epistemic_variance"))
    assert line.split()[1:] == [f"{each.mean():.4f}", f"{each.std() / math.sqrt(40):.4f}"]


def test_a_surprise_in_a_sentence():
    nan = math.nan
    ones = torch.ones(3, dtype=F64)
    scores = torch.tensor([1.0, 3.0, nan], dtype=F64)
    exact = bm.Surprise(scores, 0 * ones, ones / 0, torch.tensor([2, 2, 0]))
    assert str(exact) == "Surprise of 2 tasks: median 1 nats, from 1 to 3; exact"
    weak = bm.Surprise(scores, 0.1 * ones, torch.tensor([9.0, 50.0, nan], dtype=F64), torch.tensor([2, 2, 0]), True)
    assert "nats an observation" in str(weak)
    assert str(weak).endswith("error up to 0.1; 1 with fewer than 10 effective draws: take more")
    nothing = bm.Surprise(nan * ones, nan * ones, nan * ones, torch.zeros(3))
    assert "no tasks" in str(nothing)


def test_an_exact_posterior_has_no_minus_infinity():
    batch = linear_tasks(6)[1]
    network = bm.NeuralTaskModel(bm.nets.mlp(2, [3], 1), bm.Gaussian(0.5), task_modules="head").double()
    method = bm.BayesianLastLayer(network)
    method.prepare(batch)
    found = bm.psis(method.adapt(batch.support), num_samples=200)
    assert (found.pareto_k == -math.inf).all()
    assert "inf" not in str(found)
    assert "exact: all weights equal" in found.verdict
    assert str(found).splitlines()[2].split()[1] == "exact"
    assert "tensor(" not in repr(found)


def test_posteriors():
    observations = batch_of(3, 4, ragged=True)
    program = bm.TaskProgram(TwoSites()).prepare(observations)
    loc, scale = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    text = repr(bm.NormalPosterior(program, observations, loc, scale))
    counts = observations.counts()
    assert text.startswith(f"<NormalPosterior: 3 tasks of {int(counts.min())} to {int(counts.max())} shots; φ: ")
    for name, block in program.blocks.items():
        assert f"{name} [{block.stop - block.start}]" in text
    samples = bm.SamplesPosterior(program, observations, torch.zeros(7, 3, 2), torch.zeros(7, 1))
    assert "SamplesPosterior" in repr(samples)
    assert "7 draws" in repr(samples)
    assert "7 draws" not in text


def test_a_deep_network_and_a_function():
    batch = bm.tasks.Sinusoid().sample(2, support=3, query=2, generator=0)
    deep = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4, 4, 4], 1), bm.Gaussian(1.0)))
    deep.prepare(batch)
    assert "… (8 in all)" in repr(deep.adapt(batch.support))
    process = bm.DeepKernel(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5)))
    process.prepare(batch)
    assert repr(process.adapt(batch.support)).startswith("<GPPosterior: 2 tasks of 3 shots")


def test_chains():
    found = bm.ChainsPosterior(
        bm.TaskProgram(TwoSites()).prepare(batch_of(3, 4)),
        batch_of(3, 4),
        torch.randn(20, 3, 2, generator=torch.Generator().manual_seed(0)),
        torch.randn(20, 1, generator=torch.Generator().manual_seed(1)),
        divergences=torch.tensor([0, 3]),
        step_size=torch.tensor([0.1, 0.25]),
    ).diagnostics()
    assert str(found).startswith("2 chains, 3 tasks of 2 numbers and 1 numbers of θ: R-hat up to")
    assert f"{found.max_rhat:.3f}" in str(found)
    assert f"from {found.min_ess:.0f};" in str(found)
    assert str(found).endswith("3 transitions diverged; step size 0.1, 0.25")
    assert "tensor(" not in repr(found)


def test_a_fit(tmp_path):
    torch.manual_seed(0)
    tasks = bm.tasks.Sinusoid()
    method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(1.0)), inner_lr=0.01)
    result = bm.fit(method, tasks, steps=2, tasks_per_step=2, support=3, query=3, progress=False, out=tmp_path / "run")
    text = repr(result)
    assert text.startswith("<FitResult: MAML, 2 steps in ")
    assert "Linear" not in text
    assert str(tmp_path) in text
    assert "\n" not in text


# -- observations instead of a batch ------------------------------------------------------------------------------


def test_observations_stand_for_a_batch_without_query():
    observations = batch_of(3, 4)
    program = bm.TaskProgram(TwoSites()).prepare(observations)
    posterior = bm.SamplesPosterior(program, observations, torch.randn(50, 3, 2), torch.zeros(50, 1))
    empty = bm.TaskBatch(observations, bm.Observations(observations.x[:, :0], observations.y[:, :0]))
    tree, again = (bm.to_datatree(posterior, data, num_samples=50, generator=1) for data in (observations, empty))
    assert set(tree.children) == set(again.children)
    assert "predictions" not in tree.children
    for group in tree.children:
        assert tree[group].to_dataset().equals(again[group].to_dataset())
    with pytest.raises(OptionError, match="Observations of the support"):
        bm.to_datatree(posterior, observations.x)


def test_covariates_are_kept():
    x = torch.zeros(2, 3, 1)
    given = as_batch(bm.Observations(x, None, None, torch.ones(2, 1)))
    assert given.query.shots == 0
    assert given.query.y is None
    assert torch.equal(given.query.w, torch.ones(2, 1))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pareto k
def test_loo_of_observations():
    tasks, batch = linear_tasks(5, seed=3, shots=10)
    posterior = Linear(tasks, batch.support)
    ours, theirs = (bm.loo(posterior, data, generator=1).elpd for data in (batch.support, batch))
    assert ours == theirs
