"""The benchmark of calibration: forecasts are kept as they are, folds do not overlap, corrections correct, and bars."""

import argparse
import json
import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.tabular.models import all_methods
from benchmarks import calibration as benchmark
from benchmarks._calibration_data import FOLDS, folds
from benchmarks._calibration_forecasts import LEVELS, WAYS, Judged, KeptForecasts, correct, judge, keep, pool
from benchmarks._calibration_methods import DATA, FACTS, METHODS, make
from benchmarks._multilevel_model import data_folder

WITH_RADON = pytest.mark.skipif(
    not (data_folder() / "multilevel" / "radon.csv").is_file(), reason="needs the data folder: set BAYESMETA_DATA"
)


def adapted(name, data="sinusoid", num_tasks=30):
    """An untrained method of the benchmark, and tasks."""
    batch = folds(data, 100, num_tasks)[0].test
    method = make(name, data, 1)
    method.prepare(batch)
    return method.eval(), batch


# -- forecasts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maml", "last_layer", "deep_kernel", "conv_cnp"])
def test_a_closed_form_is_kept_exactly(name):
    method, batch = adapted(name)
    posterior = method.adapt(batch.support, generator=0)
    theirs, found = bm.scores(posterior, batch).per_task, bm.calibration(posterior, batch)
    kept = keep(method, batch, 0, 10)
    ours = judge(kept, kept.batch, 0, 10)
    torch.testing.assert_close(ours.nll, theirs["nll"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.crps, theirs["crps"], rtol=1e-4, atol=1e-5)
    assert ours.coverage[:, 1].mean() == pytest.approx(found["coverage_90"], abs=0.005)
    assert ours.figures()["calibration_error"] == pytest.approx(found["calibration_error"], abs=0.005)
    assert found["calibration_error"] > 0.02, "the check can see something"


@pytest.mark.parametrize("name", ["abml_full", "bmaml", "platipus", "laplace", "amortised", "attentive_np"])
def test_draws_give_the_likelihood_that_the_posterior_gives_them(name, monkeypatch):
    monkeypatch.setattr("benchmarks._calibration_forecasts.CHUNK", 30)
    method, batch = adapted(name)
    kept = keep(method, batch, 3, 20)
    generator = torch.Generator().manual_seed(3000)  # as keep's for the first tasks
    posterior = method.adapt(batch.support, generator=generator)
    theirs = posterior.log_likelihood(batch.query, draws=posterior.draws(20, generator))
    ours = kept.log_likelihood(kept.batch.query, draws=kept.draws(20))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-3, atol=1e-3)
    assert theirs.std(0).max() > 1e-3, "the draws differ"


@pytest.mark.parametrize("name", ["last_layer_mixture", "last_layer_gamma", "pacoh"])
def test_a_mixture_has_its_own_density_and_draws_of_the_same_mean(name):
    method, batch = adapted(name, num_tasks=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks._calibration_forecasts.CHUNK", 5)  # so that runs of tasks are put together
        kept = keep(method, batch, 0, 4000 if name != "pacoh" else 3)
    closed = method.adapt(batch.support, generator=0).predictive(batch.query)
    log_density = kept.predictive(kept.batch.query).log_prob(batch.query.y)
    torch.testing.assert_close(log_density, closed.log_prob(batch.query.y), rtol=1e-3, atol=1e-3)
    error = (kept.loc.std(0) ** 2 / len(kept.loc)).sqrt() if name != "pacoh" else torch.full_like(kept.loc[0], 1e-4)
    assert ((kept.loc.mean(0) - closed.mean).abs() <= 5 * error + 1e-4).all()


def known(scale, num_tasks=800, shots=5, seed=0):
    """Forecasts N(m, scale²) of y ~ N(m, 1), and points of one task with one m."""
    generator = torch.Generator().manual_seed(seed)
    mean = 3 * torch.randn(num_tasks, 1, generator=generator).expand(-1, shots)
    y = mean + torch.randn(num_tasks, shots, generator=generator)
    x = torch.zeros(num_tasks, shots, 1)
    batch = bm.TaskBatch(bm.Observations(x[:, :1], y[:, :1]), bm.Observations(x, y))
    return KeptForecasts(batch, mean.unsqueeze(0), torch.full((1, num_tasks, shots), scale))


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_coverage_is_right_and_every_way_corrects_it(scale):
    learned_on, test = known(scale, seed=1), known(scale, seed=2)
    found = judge(test, test.batch, 0, 100).figures()
    truth = math.erf(1.6448536 * scale / math.sqrt(2.0))
    assert abs(found["coverage90"] - truth) < 4 * found["coverage90_error"] + 1e-3
    assert (abs(found["coverage90"] - 0.9) < 0.02) == (scale == 1.0), "a control: too narrow and too wide are seen"
    ideal = 0.5 * math.log(2 * math.pi) + 0.5
    assert (found["nll"] < ideal + 0.05) == (scale == 1.0)
    for way in WAYS:
        (corrected,) = correct(way, learned_on, [test], 0, 100)
        after = judge(corrected, test.batch, 0, 100).figures()
        assert abs(after["coverage90"] - 0.9) < 4 * math.sqrt(2) * after["coverage90_error"], way
        assert abs(after["coverage50"] - 0.5) < 4 * math.sqrt(2) * after["coverage50_error"], way
        assert after["nll"] < ideal + 0.05, way
        assert after["calibration_error"] < 4 * after["calibration_noise"], way


def test_what_was_not_kept_is_refused():
    kept = known(1.0, num_tasks=3)
    with pytest.raises(errors.ShapeError, match="own batch"):
        kept.log_likelihood(bm.Observations(torch.full((3, 2, 1), 7.0), torch.zeros(3, 2)))
    with pytest.raises(errors.UnsupportedError, match="φ was not kept"):
        kept.named(None)
    with pytest.raises(errors.NoClosedFormError):
        kept.predictive(kept.batch.query, joint=True)


# -- data and methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["fertility", pytest.param("radon", marks=WITH_RADON)])
def test_each_task_is_judged_once_by_what_has_not_seen_it(data):
    made = folds(data, 0, 0)
    tested, held_back = [], []
    for fold in made:
        table = getattr(fold.train, "table", fold.train)
        parts = [set(table.names), set(fold.validation.names), set(fold.test.names)]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]
        tested += fold.test.names
        held_back += fold.validation.names
    assert len(made) == FOLDS
    assert len(tested) == len(set(tested))
    assert set(tested) == set(held_back)
    assert len(tested) == {"fertility": 188, "radon": 85}[data]
    assert set(made[0].validation.names) == set(made[1].test.names)


def test_synthetic_tasks_to_choose_with_are_not_those_to_judge_by():
    (fold,) = folds("sinusoid", 0, 50)
    assert fold.stops is None
    assert not torch.isin(fold.validation.query.y, fold.test.query.y).any()
    (other,) = folds("sinusoid", 100, 50)
    assert not torch.isin(other.test.query.y, torch.cat([fold.test.query.y, fold.validation.query.y])).any()


def test_every_method_that_trains_is_there_and_can_be_made_everywhere():
    classes = {type(make(name, "sinusoid", 0)).__name__ for name in METHODS}
    assert set(all_methods()) - classes <= {"NUTS", "MetaSVI", "ProcessMethod"}
    for data in DATA:
        for name in METHODS:
            assert make(name, data, 0) is not None
            assert METHODS[name].training(data).steps >= 100
    assert set(FACTS) == set(DATA) == set(benchmark.HELD)


# -- the table ----------------------------------------------------------------------------------------------------


def figures(nll, coverage, error=0.003, tasks=2000):
    names = ("nll", "crps", "coverage50", "coverage90")
    values = dict.fromkeys(names, 0.5) | {"nll": nll, "coverage90": coverage}
    more = {"calibration_error": 0.01, "calibration_noise": 0.01, "tasks": tasks}
    curve = {"curve": list(LEVELS), "below": list(LEVELS)}
    return values | {f"{name}_error": error for name in names} | more | curve


def result(validation, nll, coverage, recalibrated, **options):
    found = {"validation": figures(validation, 0.9, **options), "none": figures(nll, coverage, **options)}
    return {"training_seconds": 1.0, "figures": found | {way: figures(nll, recalibrated, **options) for way in WAYS}}


def rows(results, data, full=True):
    methods = [name.removesuffix(f"_{data}") for name in results]
    return {row.name: row for row in benchmark.rows(results, [data], methods, full)}


def test_the_best_is_chosen_on_validation_tasks_and_held_to_both_bars():
    made = rows(
        {"maml_sinusoid": result(0.2, 0.9, 0.915, 0.9), "anil_sinusoid": result(0.5, 0.1, 0.9, 0.93)}, "sinusoid"
    )
    assert made["best_sinusoid_nll"].ours == 0.9, "not the one that is better on test tasks"
    assert made["best_sinusoid_coverage90"].passes is True
    assert made["best_sinusoid_coverage90_errors"].passes is False
    assert made["best_sinusoid_coverage90_errors"].ours == pytest.approx(5.0)
    assert made["maml_sinusoid_coverage90_recalibrated"].passes is True
    assert made["anil_sinusoid_coverage90_recalibrated"].passes is False
    assert made["maml_sinusoid_coverage90"].passes is None


def test_tables_are_held_to_two_standard_errors_of_their_test_tasks():
    options = {"error": 0.02, "tasks": 100}
    cases = {"maml_radon": 0.935, "anil_radon": 0.945, "boil_radon": 0.855}
    made = rows({name: result(0.2, 0.9, 0.945, value, **options) for name, value in cases.items()}, "radon")
    passes = {name: made[f"{name}_coverage90_recalibrated"].passes for name in cases}
    assert passes == {"maml_radon": True, "anil_radon": False, "boil_radon": False}
    assert made["maml_radon_coverage90_recalibrated"].standard_error == pytest.approx(0.02)
    assert made["best_radon_coverage90"].passes is False
    made = rows({"maml_sinusoid": result(0.2, 0.9, 0.9, 0.9, **options)}, "sinusoid")
    error = made["maml_sinusoid_coverage90_recalibrated"].standard_error
    assert error == pytest.approx(0.02 * math.sqrt(2)), "there validation tasks are others"


def test_where_folds_rotate_the_test_tasks_have_error_enough():
    """Of a temperature learned on the next fold, tasks differing in spread: the pooled coverage varies less from one
    set of tasks to the next than the test tasks' own standard error says. Learned on other tasks, a control, more."""
    n, shots, repeats = 85, 5, 800
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(0.4 * torch.randn(repeats, 2 * n, 1, generator=generator, dtype=torch.float64))
    size = (spread * torch.randn(repeats, 2 * n, shots, generator=generator, dtype=torch.float64)).abs()
    ours, other = size.split(n, 1)

    def ratio(validation):
        covered = torch.empty(repeats, n, dtype=torch.float64)
        for k in range(FOLDS):
            width = 1.6449 * validation[:, (k + 1) % FOLDS :: FOLDS].square().mean((1, 2)).sqrt()
            covered[:, k::FOLDS] = (ours[:, k::FOLDS] <= width[:, None, None]).double().mean(-1)
        return float(covered.mean(1).std() / (covered.std(1) / n**0.5).mean())

    assert 0.4 < ratio(ours) < 0.8
    assert 1.1 < ratio(other) < 1.6


def judged_of(num_tasks, seed):
    generator = torch.Generator().manual_seed(seed)
    coverage, below = (torch.rand(num_tasks, k, generator=generator).double() for k in (2 + len(LEVELS), len(LEVELS)))
    nll, crps = torch.randn(2, num_tasks, generator=generator).double() + seed
    return Judged(nll, crps, coverage, below)


def test_pooled_figures_are_those_of_all_tasks_together():
    parts = [judged_of(count, seed) for seed, count in enumerate((7, 2, 19))]
    pooled, expected = pool([part.figures() for part in parts]), Judged.together(parts).figures()
    assert set(pooled) == set(expected)
    for name, value in expected.items():
        assert pooled[name] == pytest.approx(value, rel=1e-9), name


def test_on_tables_the_best_is_chosen_in_each_fold(capsys):
    """a is best in the first fold, b in the second; b over both."""
    options = {"error": 0.02, "tasks": 50}

    def of(validation, test):
        ways = [{"validation": figures(v, 0.9, **options), "none": figures(t, 0.9, **options)}
                for v, t in zip(validation, test, strict=True)]  # fmt: skip
        return result(sum(validation) / 2, sum(test) / 2, 0.9, 0.9, **options) | {"folds": ways}

    results = {"a_radon": of([0.1, 9.0], [5.0, 6.0]), "b_radon": of([0.2, 0.3], [1.0, 2.0])}
    made = rows(results, "radon")
    assert made["best_radon_nll"].ours == pytest.approx((5.0 + 2.0) / 2)
    assert made["best_radon_coverage90"].standard_error < 0.02, "of twice as many tasks"
    said = capsys.readouterr().out
    assert "radon: a, b" in said
    assert "no figures of single folds" not in said
    del results["a_radon"]["folds"]
    made = rows(results, "radon")
    assert made["best_radon_nll"].ours == pytest.approx(1.5)
    assert "no figures of single folds" in capsys.readouterr().out


def test_a_short_run_has_no_bar_and_a_diverged_one_a_row():
    made = rows({"maml_radon": result(0.2, 0.9, 0.5, 0.5)}, "radon", full=False)
    assert all(row.passes is None for row in made.values())
    made = rows({"maml_radon": {"error": "NaN"}, "anil_radon": result(0.2, 0.9, 0.9, 0.9)}, "radon")
    assert made["maml_radon_trains"].passes is False
    assert made["best_radon_coverage90"].passes is True


def arguments(folder, **options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=3)
    benchmark.add_arguments(parser)
    args = parser.parse_args([])
    args.threads = torch.get_num_threads()
    for name, value in {"quick": True, "folder": folder, **options}.items():
        setattr(args, name, value)
    return args


def test_runs_are_kept_and_taken_again_only_under_the_same_settings(tmp_path, capsys):
    options = {"runs": ["last_layer", "abml_full"], "data": ["sinusoid", "fertility"]}
    picture = tmp_path / "curves.png"
    first = benchmark.run(arguments(tmp_path, **options, picture=picture))
    assert {row.name for row in first} >= {
        f"{m}_{d}_{f}{e}"
        for m in ("last_layer", "abml_full", "best")
        for d in ("sinusoid", "fertility")
        for f in benchmark.FIGURES
        for e in (("",) if m == "best" else ("", "_recalibrated"))
    }
    assert all(math.isfinite(row.ours) for row in first)
    assert picture.stat().st_size > 10_000
    kept = json.loads((tmp_path / "quick" / "abml_full_sinusoid_seed3.json").read_text())
    assert kept["settings"]["training"]["steps"] == 10
    assert kept["folds"] == [{way: kept["figures"][way] for way in ("validation", "none")}]
    capsys.readouterr()
    again = benchmark.run(arguments(tmp_path, **options, reuse=True))
    assert "reused: 4 runs; to be run: 0" in capsys.readouterr().out
    assert [row.as_dict() for row in again] == [row.as_dict() for row in first]
    (job,) = benchmark._jobs(arguments(tmp_path, runs=["last_layer"], data=["sinusoid"]))
    (other,) = benchmark._jobs(arguments(tmp_path, runs=["last_layer"], data=["sinusoid"], quick=False))
    path = benchmark._file(tmp_path / "quick", job)
    assert benchmark._kept(path, job) is not None
    assert benchmark._kept(path, other) is None


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="unknown run gibberish"):
        benchmark.run(arguments(tmp_path, runs=["gibberish"]))
    with pytest.raises(SystemExit, match="unknown data set moon"):
        benchmark.run(arguments(tmp_path, data=["moon"]))
