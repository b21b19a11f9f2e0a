"""From a CSV to a forecast: the lines it is compared with, supports of every size, and the four commands' functions."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from scipy import stats

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.data import Observations
from bayesmeta.errors import BayesMetaError, CheckpointError, DataError, EmptyTaskError, OptionError, RunFolderError
from bayesmeta.protocols import TaskDistribution
from bayesmeta.tabular.advice import advice_of
from bayesmeta.tabular.evaluate import evaluate_csv
from bayesmeta.tabular.fit import fit_csv
from bayesmeta.tabular.lines import Lines
from bayesmeta.tabular.methods import methods_table
from bayesmeta.tabular.models import RECIPES, WITHOUT_COVARIATES, all_methods, method_class
from bayesmeta.tabular.predict import predict_csv
from bayesmeta.tabular.rates import Rates
from bayesmeta.tabular.run import load_run
from bayesmeta.tabular.supports import VariedSupports, every_task
from bayesmeta.tasks import TableTasks
from bayesmeta.tasks.files import read_csv

COLUMNS = {"task": "town", "x": ["age"], "categorical": ["kind"], "w": ["size"], "y": ["bill"]}
QUICK = {"steps": 30, "hidden": [8], "device": "cpu", "progress": False, "say": lambda text: None}


def make_frame(tasks=24, seed=0, least=1, most=12):
    """Towns with a level and a slope of their own; some have a single row."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(least, most + 1, tasks)
    town = np.repeat(np.arange(tasks), rows)
    n = len(town)
    age, kind, size = rng.normal(40, 10, n), rng.integers(0, 2, n), rng.normal(0, 1, tasks)
    level, slope = 10 + size + rng.normal(0, 2, tasks), 0.3 + rng.normal(0, 0.1, tasks)
    bill = level[town] + slope[town] * (age - 40) + kind + rng.normal(0, 0.5, n)
    return pd.DataFrame(
        {
            "id": [f"{i:04d}" for i in range(n)],
            "town": [f"t{i}" for i in town],
            "age": age,
            "kind": np.array(["rent", "own"])[kind],
            "size": size[town],
            "hours": rng.uniform(1, 5, n),
            "bill": bill,
            "visits": rng.poisson(np.exp(0.05 * (bill - 10)) * 2),
            "paid": np.array(["no", "yes"])[(bill > 10).astype(int)],
            "note": "NA",
        }
    )


def make_table(frame=None, **options):
    roles = {**COLUMNS, "dtype": torch.float64, **options}
    return TableTasks.from_dataframe(make_frame() if frame is None else frame, **roles)


def standard(table):
    return table.with_standardizer(table.fit_standardizer())


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "towns.csv"
    make_frame().to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def folder(csv):
    out = csv.parent / "run"
    fit_csv(csv, out, **COLUMNS, **QUICK, holdout=0.25, seed=3)
    return out


# -- lines --------------------------------------------------------------------------------------------------------


def test_the_pooled_line_is_ordinary_least_squares():
    table = standard(make_table(categorical=[], x=["age"]))
    flat = table.flat()
    design = sm.add_constant(np.column_stack([flat.x, flat.w.repeat_interleave(flat.lengths, 0)]))
    fitted = sm.OLS(flat.y.numpy(), design).fit()
    batch = every_task(table, 0)[0]
    forecast = Lines.fit(table).pooled(batch)
    for i in range(batch.num_tasks):
        real = batch.query.full_mask()[i]
        x = batch.query.x[i, real].numpy()
        ahead = np.column_stack([np.ones(len(x)), x, np.broadcast_to(batch.w[i].numpy(), (len(x), 1))])
        expected = fitted.get_prediction(ahead)
        assert forecast.mean[i, real].numpy() == pytest.approx(expected.predicted_mean, rel=1e-9)
        assert forecast.scale[i, real].numpy() == pytest.approx(expected.se_obs, rel=1e-9)


def test_the_unpooled_line_is_least_squares_of_each_support():
    table = standard(make_table(make_frame(least=6), categorical=[], w=[]))
    lines = Lines.fit(table)
    residuals = []
    for name in table.names:
        data = table.subset([name]).flat()
        fit = sm.OLS(data.y.numpy(), sm.add_constant(data.x.numpy())).fit()
        residuals.append((fit.ssr, fit.df_resid))
    own = math.sqrt(sum(ssr for ssr, _ in residuals) / sum(freedom for _, freedom in residuals))
    assert float(lines.own_noise) == pytest.approx(own, rel=1e-9)
    assert float(lines.own_noise) < 0.6 * float(lines.noise)  # towns differ
    batch = every_task(table, 5)[0]
    forecast = lines.unpooled(batch)
    for i in range(batch.num_tasks):
        real = batch.query.full_mask()[i]
        fit = sm.OLS(batch.support.y[i].numpy(), sm.add_constant(batch.support.x[i].numpy())).fit()
        ahead = np.column_stack([np.ones(int(real.sum())), batch.query.x[i, real].numpy()])
        assert forecast.mean[i, real].numpy() == pytest.approx(fit.predict(ahead), rel=1e-8)
        leverage = np.einsum("ij,jk,ik->i", ahead, fit.normalized_cov_params, ahead)
        assert forecast.scale[i, real].numpy() == pytest.approx(own * np.sqrt(1 + leverage), rel=1e-8)
    assert not torch.allclose(forecast.mean, lines.pooled(batch).mean, atol=0.1)


def test_a_line_through_too_few_rows_has_no_slope_where_they_say_nothing():
    table = standard(make_table())
    lines = Lines.fit(table)
    for batch in every_task(table, 1):
        forecast, seen = lines.unpooled(batch), batch.support.counts() > 0
        level = batch.support.y[:, :1].expand_as(forecast.mean)
        assert torch.allclose(forecast.mean[seen], level[seen])
        assert torch.equal(forecast.mean[~seen], lines.pooled(batch).mean[~seen])
        assert torch.allclose(forecast.scale[seen].min(), lines.own_noise * math.sqrt(2))
    (batch,) = every_task(table, 0)
    assert torch.equal(lines.unpooled(batch).mean, lines.pooled(batch).mean)


def test_lines_are_scored_in_raw_units(tmp_path):
    table = standard(make_table(y=["bill", "age"], x=["size"], categorical=[], w=[]))
    lines = Lines.fit(table)
    lines.save(tmp_path / "lines.pt")
    (batch,) = every_task(table, 2)
    for kind in ("pooled", "unpooled"):
        forecast = getattr(Lines.load(tmp_path / "lines.pt"), kind)(batch)
        found = bm.scores(forecast, batch)
        units = batch.standardizer
        mean, scale = units.raw_y(forecast.mean).numpy(), (forecast.scale * units.y_scale).numpy()
        each = -stats.norm.logpdf(units.raw_y(batch.query.y).numpy(), mean, scale).sum(-1)
        real = batch.query.full_mask().numpy()
        expected = np.mean([each[i][real[i]].mean() for i in range(len(each))])
        assert found["nll"] == pytest.approx(expected, rel=1e-9)


# -- supports -----------------------------------------------------------------------------------------------------


def test_supports_have_every_size_and_tasks_of_few_rows_take_part():
    table = standard(make_table())
    varied = VariedSupports(table)
    assert isinstance(varied, TaskDistribution)
    generator = torch.Generator().manual_seed(0)
    sizes, seen = [], set()
    for _ in range(600):
        batch = varied.sample(4, support=4, query=3, generator=generator)
        sizes.append(batch.support.shots)
        seen |= set(batch.names)
        assert batch.population == table.num_tasks
        assert [table.names[i] for i in batch.task_id.tolist()] == list(batch.names)
    counts = np.bincount(sizes, minlength=5)
    assert np.abs(counts - 120).max() < 5 * math.sqrt(600 * 0.2 * 0.8)
    assert seen == set(table.names)
    assert min(table.lengths) == 1


def test_every_task_is_evaluated_once_on_all_its_rows():
    frame = make_frame()
    for order in ("first", "random"):
        table = make_table(frame, order=order, order_by="age", categorical=[])
        for support in (0, 3):
            batches = every_task(table, support, seed=1, max_elements=60)
            assert len(batches) > 3
            names = [name for batch in batches for name in batch.names]
            assert sorted(names) == sorted(table.names)
            for batch in batches:
                batch.check()
                for i, name in enumerate(batch.names):
                    rows = frame[frame.town == name]
                    seen = batch.support.x[i, batch.support.full_mask()[i], 0].tolist()
                    asked = batch.query.x[i, batch.query.full_mask()[i], 0].tolist()
                    assert len(seen) == min(support, len(rows) - 1)
                    assert sorted(seen + asked) == pytest.approx(sorted(rows["age"]))
                    if order == "first" and seen:
                        assert max(seen) <= min(asked)
    one = every_task(table, 3, seed=1)
    two = every_task(table, 3, seed=1)
    assert all(torch.equal(a.support.x, b.support.x) for a, b in zip(one, two))


def test_tasks_of_one_row_have_nothing_to_see():
    table = standard(make_table(make_frame(most=1)))
    assert every_task(table, 0)[0].num_tasks == 24
    with pytest.raises(EmptyTaskError, match="No task of the table has two rows"):
        every_task(table, 3)


# -- shares and rates ---------------------------------------------------------------------------------------------


def observed(y, x=None):
    y = torch.tensor(y)
    return Observations(torch.ones(*y.shape[:2], 1) if x is None else torch.tensor(x), y)


def batch_of(support, query):
    return bm.TaskBatch(support=support, query=query)


def test_shares_are_pseudo_counts_and_hits():
    rates = Rates(torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([4.0]).double(), True, False)
    batch = batch_of(observed([[0, 2, 2], [1, 1, 1]]), observed([[2], [0]]))
    own = rates.own(batch).class_probabilities(batch.query)[:, 0]
    # (4 · 0.5 + 1) / 7, (4 · 0.3 + 0) / 7, (4 · 0.2 + 2) / 7 by hand
    assert own[0].tolist() == pytest.approx([3 / 7, 1.2 / 7, 2.8 / 7])
    assert own[1].tolist() == pytest.approx([2 / 7, 4.2 / 7, 0.8 / 7])
    assert rates.pooled(batch).class_probabilities(batch.query)[1, 0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert bm.scores(rates.own(batch), batch).per_task["nll"].tolist() == pytest.approx(
        [-math.log(2.8 / 7), -math.log(2 / 7)], rel=1e-6
    )


def test_rates_are_the_negative_binomial_of_gamma_and_poisson():
    rates = Rates(torch.tensor([2.0]).double(), torch.tensor([3.0]).double(), False, True)
    batch = batch_of(observed([[4, 1]], [[[1.0], [0.5]]]), observed([[5]], [[[2.0]]]))
    # Gamma(3 + 5, 3 / 2 + 1.5), times an exposure of 2; without the support Gamma(3, 3 / 2)
    for forecast, a, b in ((rates.own(batch), 8, 3.0), (rates.pooled(batch), 3, 1.5)):
        found = bm.scores(forecast, batch, num_samples=200)["nll"]
        assert found == pytest.approx(-stats.nbinom(a, b / (b + 2)).logpmf(5), rel=1e-6)
        assert found != pytest.approx(-stats.nbinom(a, b / (b + 1)).logpmf(5), rel=1e-3), "control: no exposure"


def test_rates_learn_how_much_tasks_differ():
    rng = np.random.default_rng(0)
    town = np.repeat(np.arange(400), 8)
    level = rng.gamma(3.0, 2.0 / 3.0, 400)[town]
    share = rng.dirichlet([3.0, 1.0], 400)[town, 0]
    frame = pd.DataFrame({"town": town, "x": 1.0, "visits": rng.poisson(level)})
    frame["paid"] = np.where(rng.uniform(size=len(frame)) < share, "a", "b")
    options = {"task": "town", "x": ["x"], "dtype": torch.float64}
    counts = Rates.fit(TableTasks.from_dataframe(frame, y=["visits"], target="count", **options))
    assert float(counts.level) == pytest.approx(2.0, abs=4 * 1.16 / 20)  # sd of the Gamma over √400
    assert 2.2 < float(counts.strength) < 4.1
    classes = Rates.fit(TableTasks.from_dataframe(frame, y=["paid"], target="class", **options))
    assert float(classes.level[0]) == pytest.approx(0.75, abs=0.05)
    assert 2.5 < float(classes.strength) < 6.5
    same = frame.assign(visits=rng.poisson(2.0, len(frame)))
    alike = Rates.fit(TableTasks.from_dataframe(same, y=["visits"], target="count", **options))
    assert float(alike.strength) > 50, "tasks that do not differ"


# -- fit, evaluate, predict ---------------------------------------------------------------------------------------


def test_fit_writes_what_the_others_read(csv, folder):
    config = json.loads((folder / "config.json").read_text())["settings"]
    assert config["model"]["method"] == "BayesianLastLayer"
    assert config["standardizer"]["schema"]["categories"] == {"kind": ["own", "rent"]}
    tasks = json.loads((folder / "tasks.json").read_text())
    assert {name: len(part) for name, part in tasks.items()} == {"train": 13, "validation": 5, "held out": 6}
    assert sorted(name for part in tasks.values() for name in part) == sorted(set(make_frame()["town"]))
    run = load_run(folder)
    train = make_table().subset(tasks["train"])
    assert run.schema == train.schema
    units = train.fit_standardizer()
    for name in ("x_mean", "x_scale", "w_mean", "w_scale", "y_mean", "y_scale"):
        assert torch.allclose(getattr(run.standardizer, name).double(), getattr(units, name), rtol=1e-6)
    for path in folder.iterdir():
        assert path.suffix in (".json", ".jsonl", ".pt", ".csv"), path
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)


def test_evaluate_scores_the_tasks_that_were_not_trained_on(csv, folder, tmp_path):
    said = []
    result = evaluate_csv(folder, csv, out=tmp_path / "s.json", say=said.append, device="cpu")
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(json.dumps(result))
    tasks = json.loads((folder / "tasks.json").read_text())
    assert set(result["nll_by_task"]) == set(tasks["held out"])
    run = load_run(folder)
    table = TableTasks.from_csv(csv, standardizer=run.standardizer).subset(
        [name for name in make_frame()["town"].unique() if name in tasks["held out"]]
    )
    each = {}
    for batch in every_task(table, 5, seed=0):
        found = bm.scores(run.method.adapt(batch.support), batch)
        each |= dict(zip(batch.names, found.per_task["nll"].tolist()))
    assert result["nll_by_task"] == pytest.approx(each)
    mean = np.mean(list(each.values()))
    assert result["scores"]["BayesianLastLayer"]["nll"] == pytest.approx(mean)
    assert set(result["scores"]) == {"BayesianLastLayer", "pooled", "unpooled"}
    for line in ("pooled", "unpooled"):
        gap = result["scores"][line]["nll"] - mean
        assert result["nll_difference"][line]["mean"] == pytest.approx(gap)
    text = "\n".join(said)
    assert "Left out: 18 tasks" in text
    assert "pooled line" in text
    assert "RMSE in units of bill" in text


def test_evaluate_says_when_all_tasks_were_trained_on(csv, folder, tmp_path):
    tasks = json.loads((folder / "tasks.json").read_text())
    frame = make_frame()
    frame[frame.town.isin(tasks["train"])].to_csv(tmp_path / "seen.csv", index=False)
    said = []
    result = evaluate_csv(folder, tmp_path / "seen.csv", out=tmp_path / "s.json", support=2, say=said.append)
    assert result["tasks"] == len(tasks["train"])
    assert "these scores flatter" in said[0]


def test_scores_of_other_tasks_do_not_replace_those_there(csv, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "run")
    first = evaluate_csv(copy, csv, say=lambda t: None, device="cpu")
    before = (copy / "scores.json").read_bytes()
    one = make_frame()
    one = one[one.town == max(first["nll_by_task"], key=lambda name: (one.town == name).sum())]
    one.to_csv(tmp_path / "one.csv", index=False)
    said = []
    evaluate_csv(copy, tmp_path / "one.csv", say=said.append, device="cpu")
    assert (copy / "scores.json").read_bytes() == before
    assert json.loads((copy / "scores-one.json").read_text())["tasks"] == 1
    text = "\n".join(said)
    assert "scores.json holds the scores of 6 task(s) of towns.csv and was left as it is." in text
    assert "One task: no standard errors." in text
    assert "nan" not in text
    evaluate_csv(copy, csv, say=lambda t: None, device="cpu")
    assert (copy / "scores.json").read_bytes() == before, "the same again goes to the same place"


def test_advice_names_options_that_are_not_on_already(csv, folder):
    settings = load_run(folder).settings
    assert "--likelihood student-t or --likelihood heteroscedastic" in advice_of(settings, False)["over-confident"]
    heavy = advice_of(replace(settings, likelihood="student-t", method="ABML"), False)
    assert "student-t" not in heavy["over-confident"]
    counts = replace(settings, likelihood="poisson", method="ABML")
    assert "--likelihood negative-binomial" in advice_of(counts, False)["miscalibrated"]
    assert "more --steps" in advice_of(settings, False)["baseline"]
    assert "more --steps" not in advice_of(settings, True)["baseline"]
    for text in advice_of(settings, False).values():
        assert "bm." not in text


def test_predict_gives_what_adapting_by_hand_gives(folder, tmp_path):
    frame = make_frame(tasks=5, seed=8, least=4)
    frame["town"] = "new " + frame["town"]
    asked = np.random.default_rng(1).random(len(frame)) < 0.5
    asked[(frame.town == "new t2").to_numpy()] = True
    frame.loc[asked, "bill"] = np.nan
    path = tmp_path / "new.csv"
    frame.to_csv(path, index=False)
    notes = []
    written = predict_csv(folder, path, quantiles=[0.1, 0.9], say=lambda text: None, warn=notes.append, device="cpu")
    assert len(notes) == 1
    assert "1 task(s) have no row with a target (new t2)" in notes[0]
    text = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)
    assert text[list(frame.columns)].equals(pd.read_csv(path, dtype=str, keep_default_na=False))
    assert text["note"].eq("NA").all()
    assert text["id"][1] == "0001"
    new = ["bill_mean", "bill_sd", "bill_q0.1", "bill_q0.9"]
    assert list(text.columns[-4:]) == new
    assert text.loc[~asked, new].eq("").all().all()
    assert written["bill_mean"].astype(str).equals(text["bill_mean"].astype(str))
    values = text.loc[asked, new].astype(float)
    run = load_run(folder)
    for _, rows in frame.groupby("town"):
        seen, ahead = rows[rows["bill"].notna()], rows[rows["bill"].isna()]
        if len(ahead) == 0:
            continue

        def observations(part, with_y, w=rows["size"].iloc[0]):
            x = np.stack([part["age"], part["kind"] == "own", part["kind"] == "rent"], -1).astype(np.float32)
            y = torch.tensor(part["bill"].to_numpy(dtype=np.float32))[None] if with_y else None
            return run.standardizer.apply(
                Observations(torch.tensor(x)[None], y, None, torch.tensor([[w]], dtype=torch.float32))
            )

        posterior = run.method.adapt(observations(seen, True))
        normal = posterior.predictive(observations(ahead, False))
        mean = run.standardizer.raw_y(normal.mean)[0].detach().numpy()
        sd = (normal.stddev * run.standardizer.y_scale)[0].detach().numpy()
        found = values.loc[ahead.index]
        assert found["bill_mean"].to_numpy() == pytest.approx(mean, rel=1e-4)
        assert found["bill_sd"].to_numpy() == pytest.approx(sd, rel=1e-3)
        assert found["bill_q0.1"].to_numpy() == pytest.approx(mean - 1.2815516 * sd, rel=1e-3)
        assert found["bill_q0.9"].to_numpy() == pytest.approx(mean + 1.2815516 * sd, rel=1e-3)


def test_a_file_without_the_target_column_is_forecast_from_the_prior(folder, tmp_path):
    path, notes = tmp_path / "bare.csv", []
    make_frame(tasks=2).drop(columns="bill").to_csv(path, index=False)
    out = predict_csv(folder, path, out=tmp_path / "f.csv", say=lambda text: None, warn=notes.append)
    assert (out["bill_sd"].astype(float) > 0).all()
    assert "2 task(s) have no row with a target" in notes[0]


def test_training_does_not_see_held_out_tasks(csv, folder, tmp_path):
    """Other values and rows in held-out tasks: the same θ, to the bit. Control: another training row, another θ."""
    tasks = json.loads((folder / "tasks.json").read_text())
    thetas = []
    for kind in ("held out", "train"):
        frame = make_frame()
        out = frame.town.isin(tasks[kind][:3])
        frame.loc[out, ["age", "bill", "size"]] *= 3
        if kind == "held out":
            frame.loc[out, "kind"] = "squat"
        frame.to_csv(tmp_path / "other.csv", index=False)
        fit_csv(tmp_path / "other.csv", tmp_path / kind, **COLUMNS, **QUICK, holdout=0.25, seed=3)
        thetas.append(torch.load(tmp_path / kind / "checkpoint.pt", weights_only=True)["method"])
    original = torch.load(folder / "checkpoint.pt", weights_only=True)["method"]
    assert all(torch.equal(original[name], value) for name, value in thetas[0].items())
    assert not all(torch.equal(original[name], value) for name, value in thetas[1].items())


def test_a_newton_step_is_whole_whatever_the_curvature(csv, tmp_path):
    rates = {}
    for method in ("laplace", "maml"):
        fit_csv(csv, tmp_path / method, **COLUMNS, **{**QUICK, "steps": 1}, method=method)
        rates[method] = load_run(tmp_path / method).method.inner_lr
    assert rates == {"laplace": 1.0, "maml": pytest.approx(0.05 / 4)}


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_fits_a_table(csv, tmp_path, method):
    columns = COLUMNS | ({"x": ["age", "size"], "w": []} if method in WITHOUT_COVARIATES else {})
    fit_csv(csv, tmp_path / "run", **columns, **{**QUICK, "steps": 3}, method=method)
    result = evaluate_csv(tmp_path / "run", csv, say=lambda text: None, num_samples=50)
    assert math.isfinite(result["scores"][method]["nll"])
    frame = make_frame(tasks=3, seed=5, least=4)
    frame.loc[::2, "bill"] = np.nan
    frame.to_csv(tmp_path / "new.csv", index=False)
    out = predict_csv(tmp_path / "run", tmp_path / "new.csv", say=lambda t: None, warn=lambda t: None, num_samples=50)
    sd = pd.to_numeric(out["bill_sd"])[frame["bill"].isna()]
    assert (sd > 0).all()
    assert np.isfinite(sd).all()


KINDS = {
    "counts": ({"y": ["visits"], "exposure": "hours"}, "poisson", ["visits_mean", "visits_q0.5"]),
    "wide counts": ({"y": ["visits"], "likelihood": "negative-binomial"}, "negative-binomial", ["visits_mean"]),
    "classes": ({"y": ["paid"]}, "categorical", ["paid_class", "paid_p_no", "paid_p_yes"]),
    "two classes": ({"y": ["paid"], "likelihood": "bernoulli", "method": "maml"}, "bernoulli", ["paid_p_yes"]),
    "classes by a kernel": (
        {"y": ["paid"], "method": "deep-kernel", "w": []},
        "categorical",
        ["paid_class", "paid_p_no", "paid_p_yes"],
    ),
    "two classes by a kernel": (
        {"y": ["paid"], "likelihood": "bernoulli", "method": "deep-kernel", "w": []},
        "bernoulli",
        ["paid_p_yes"],
    ),
    "outputs": ({"y": ["bill", "age"], "x": ["hours"]}, "gaussian", ["bill_mean", "age_sd"]),
    "heavy tails": ({"y": ["bill"], "likelihood": "student-t"}, "student-t", ["bill_q0.95"]),
    "own scale": ({"y": ["bill"], "likelihood": "heteroscedastic"}, "heteroscedastic", ["bill_q0.95"]),
    "gaps": ({"y": ["bill"], "missing": "mean"}, "gaussian", ["bill_mean"]),
}


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_of_target_makes_the_whole_way(tmp_path, case):
    options, likelihood, columns = KINDS[case]
    frame = make_frame()
    if case == "gaps":
        frame.loc[::5, "age"] = np.nan
    frame.to_csv(tmp_path / "a.csv", index=False)
    out = tmp_path / "run"
    fit_csv(tmp_path / "a.csv", out, **{**COLUMNS, **QUICK, "steps": 3, **options}, holdout=0.3)
    assert json.loads((out / "config.json").read_text())["settings"]["model"]["likelihood"] == likelihood
    result = evaluate_csv(out, tmp_path / "a.csv", say=lambda text: None, num_samples=50)
    (mine, *lines) = result["scores"].values()
    assert all(math.isfinite(value) for value in mine.values())
    assert len(lines) == 2
    real = likelihood in ("gaussian", "student-t", "heteroscedastic")
    assert ("unpooled" in result["scores"]) == real
    assert (out / "rates.pt").is_file() == (not real)
    assert ("brier" in mine) == ("class" in case)
    frame.loc[::2, options["y"]] = None
    frame.to_csv(tmp_path / "new.csv", index=False)
    filled = predict_csv(out, tmp_path / "new.csv", say=lambda t: None, warn=lambda t: None, num_samples=50)
    assert filled.loc[::2, columns].ne("").all().all()
    assert filled.loc[1::2, columns].eq("").all().all()
    if "class" in case:
        p = filled.loc[::2, ["paid_p_no", "paid_p_yes"]].astype(float)
        assert p.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
        likely = np.where(p["paid_p_yes"] > p["paid_p_no"], "yes", "no")
        assert filled.loc[::2, "paid_class"].tolist() == likely.tolist()


def test_an_exposure_multiplies_the_forecast(tmp_path):
    frame = make_frame()
    frame.to_csv(tmp_path / "a.csv", index=False)
    options = {**COLUMNS, **QUICK, "y": ["visits"], "exposure": "hours", "method": "MultiTask"}
    fit_csv(tmp_path / "a.csv", tmp_path / "run", **options)
    new = frame.iloc[[0, 0]].assign(hours=[1.0, 30.0], visits=None)
    new.to_csv(tmp_path / "new.csv", index=False)
    filled = predict_csv(
        tmp_path / "run", tmp_path / "new.csv", say=lambda t: None, warn=lambda t: None, num_samples=20_000
    )
    one, thirty = filled["visits_mean"].astype(float)
    sd = filled["visits_sd"].astype(float)
    assert abs(thirty - 30 * one) < 5 * math.sqrt((sd.iloc[1] ** 2 + 900 * sd.iloc[0] ** 2) / 20_000)


# -- truth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("related", [True, False])
def test_the_default_nears_the_oracle_and_beats_both_lines(tmp_path, related):
    """Lines with a Gaussian prior: the exact predictive is known. Control: rows dealt to tasks at random have none."""
    generator = torch.Generator().manual_seed(0)
    truth = bm.tasks.LinearGaussian(
        torch.tensor([1.0, 0.5]).double(), torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double(), 0.5
    )
    batch = truth.sample(150, support=2, query=8, generator=generator)
    everything = batch.union()
    y = everything.y.flatten()
    if not related:
        y = y[torch.randperm(len(y), generator=generator)]
    frame = pd.DataFrame({"g": np.repeat(np.arange(150), 10), "t": np.tile(np.arange(10), 150)})
    frame["x"], frame["y"] = everything.x[..., 1].flatten().numpy(), y.numpy()
    frame.to_csv(tmp_path / "a.csv", index=False)
    options = {**QUICK, "steps": 400, "hidden": [16], "order_by": "t", "holdout": 0.4}
    fit_csv(tmp_path / "a.csv", tmp_path / "run", task="g", x=["x"], y=["y"], **options)
    result = evaluate_csv(tmp_path / "run", tmp_path / "a.csv", support=2, say=lambda text: None)
    gains = result["nll_difference"]
    z = {name: gain["mean"] / gain["se"] for name, gain in gains.items()}
    if not related:
        assert abs(gains["pooled"]["mean"]) < 0.1
        return
    assert z["pooled"] > 5
    assert z["unpooled"] > 3
    out = torch.tensor([int(name) for name in result["nll_by_task"]])
    exact = truth.predictive(batch.support.tasks(out), batch.query.x[out])
    each = -torch.distributions.Normal(exact.mean, exact.variance.sqrt()).log_prob(batch.query.y[out]).mean(-1)
    excess = torch.tensor(list(result["nll_by_task"].values())) - each
    assert float(excess.mean()) < 0.1
    assert float(excess.mean()) > -3 * float(excess.std()) / math.sqrt(len(excess))  # nothing is better than the truth


# -- names and errors ---------------------------------------------------------------------------------------------


def test_the_table_of_methods_has_every_card():
    table = methods_table()
    words = " ".join(table.split())
    for name in all_methods():
        star = "*" if name in RECIPES else " "
        assert any(line.startswith(f"{star} {name} ") for line in table.splitlines()), name
        assert method_class(name).card.source.split(",")[0] in words
    assert set(RECIPES) <= set(all_methods())
    assert "MetaSVI" not in all_methods()


ERRORS = {
    "method": (OptionError, "'gibberish'.*Known are: BayesianLastLayer, ABML", {"method": "gibberish"}),
    "near method": (OptionError, "did you mean 'MAML'", {"method": "mamal"}),
    "likelihood": (OptionError, "did you mean 'poisson'", {"likelihood": "poison"}),
    "prior": (OptionError, "Unknown prior 'wide'", {"prior": "wide"}),
    "last layer of counts": (
        OptionError,
        "closed form",
        {"method": "last-layer", "likelihood": "poisson", "y": ["visits"]},
    ),
    "kernel of counts": (
        OptionError,
        "DeepKernel has a closed form for the likelihood gaussian, categorical, bernoulli alone; poisson was asked for",
        {"method": "DeepKernel", "likelihood": "poisson", "y": ["visits"], "w": []},
    ),
    "mixture of counts": (
        OptionError,
        "closed form",
        {"method": "BayesianLastLayerMixture", "likelihood": "poisson", "y": ["visits"]},
    ),
    "kernel with w": (OptionError, r"w=\['size'\]; make it an input", {"method": "deep-kernel"}),
    "mixture with w": (OptionError, "make it an input", {"method": "last-layer-mixture"}),
    "kernel with a prior": (OptionError, "no prior on weights", {"method": "deep-kernel", "prior": "normal", "w": []}),
    "point": (OptionError, "prior with a density", {"method": "abml", "prior": "point"}),
    "exposure": (OptionError, "is for counts", {"likelihood": "gaussian", "exposure": "hours"}),
    "bernoulli": (OptionError, "has two classes", {"likelihood": "bernoulli", "y": ["id"], "x": ["size"], "w": []}),
    "fractions": (DataError, "'bill' is .* expected a count", {"likelihood": "poisson"}),
    "support": (OptionError, "support=-1", {"support": -1}),
    "steps": (OptionError, "steps=0", {"steps": 0}),
    "shares": (OptionError, "below 1 together", {"validation": 0.5, "holdout": 0.5}),
    "seed": (OptionError, "seed=-1", {"seed": -1}),
    "hidden": (OptionError, "widths of at least 1", {"hidden": [0]}),
    "device": (OptionError, "toaster", {"device": "toaster"}),
    "order": (OptionError, "first, random, mixed", {"order": "last"}),
    "column": (DataError, "no column 'Age'.*did you mean 'age'", {"x": ["Age"]}),
    "one task": (DataError, "1 task.*Is the task column the right one", {"task": "all", "w": []}),
    "odd number": (DataError, "holds 'about 7' in task", {"y": ["odd"]}),
    "dates": (OptionError, "text of 163 different values", {"y": ["day"]}),
    "constant": (DataError, "nothing to learn", {"y": ["one"]}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_fit_refuses_with_reasons(csv, tmp_path, case):
    kind, message, options = ERRORS[case]
    path = csv
    if case in ("constant", "one task", "odd number", "dates"):
        frame = make_frame().assign(one=1.0, all="all")
        frame["day"] = pd.date_range("2020-01-01", periods=len(frame)).strftime("%Y-%m-%d")
        frame["odd"] = frame["bill"].astype(str).mask(frame.index == 3, "about 7")
        frame.to_csv(tmp_path / "a.csv", index=False)
        path = tmp_path / "a.csv"
    with pytest.raises(kind, match=message) as caught:
        fit_csv(path, tmp_path / "run", **{**COLUMNS, **QUICK, **options})
    assert isinstance(caught.value, BayesMetaError)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_only_as_it_began(csv, folder, tmp_path):
    with pytest.raises(RunFolderError, match="already holds a run"):
        fit_csv(csv, folder, **COLUMNS, **QUICK)
    first = {**COLUMNS, **QUICK, "steps": 20}
    fit_csv(csv, tmp_path / "run", **first)
    with pytest.raises(CheckpointError):
        fit_csv(csv, tmp_path / "run", **{**first, "hidden": [9]}, resume=True)
    fit_csv(csv, tmp_path / "run", **first, overwrite=True)


def test_a_run_that_breaks_off_is_not_read_with_the_tasks_of_the_one_it_replaced(csv, tmp_path, monkeypatch):
    options = {**COLUMNS, **QUICK, "steps": 20}
    fit_csv(csv, tmp_path / "run", **options)

    def break_off(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bayesmeta.tabular.fit.Lines.fit", break_off)
    with pytest.raises(KeyboardInterrupt):
        fit_csv(csv, tmp_path / "run", **{**options, "seed": 1}, overwrite=True)
    with pytest.raises(RunFolderError, match="not finished"):
        evaluate_csv(tmp_path / "run", csv)


def test_folders_and_files_that_cannot_be_used_are_refused(csv, folder, tmp_path):
    with pytest.raises(RunFolderError, match="holds no run"):
        evaluate_csv(tmp_path, csv)
    (tmp_path / "config.json").write_text('{"settings": {"demo": {}}}')
    with pytest.raises(RunFolderError, match="another kind"):
        predict_csv(tmp_path, csv)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        predict_csv(tmp_path, csv)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(RunFolderError, match="not finished"):
        predict_csv(tmp_path, csv)
    (tmp_path / "tasks.json").write_bytes((folder / "tasks.json").read_bytes())
    with pytest.raises(CheckpointError, match="no file"):
        predict_csv(tmp_path, csv)
    with pytest.raises(DataError, match="nothing to forecast"):
        predict_csv(folder, csv)
    with pytest.raises(OptionError, match="replace"):
        predict_csv(folder, csv, out=csv)
    with pytest.raises(OptionError, match=r"quantiles=\[1.5\]"):
        predict_csv(folder, csv, quantiles=[1.5])
    with pytest.raises(OptionError, match="support=-2"):
        evaluate_csv(folder, csv, support=-2)
    with pytest.raises(OptionError, match="cannot be written"):
        evaluate_csv(folder, csv, out=tmp_path / "no" / "s.json", say=lambda text: None)
    make_frame().assign(bill=None, bill_mean=1).to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(DataError, match="'bill_mean' already"):
        predict_csv(folder, tmp_path / "twice.csv")
    make_frame().assign(bill=None, kind="squat").to_csv(tmp_path / "odd.csv", index=False)
    with pytest.raises(DataError, match="'kind' is 'squat' in task 't0', a category that no training"):
        predict_csv(folder, tmp_path / "odd.csv")


# -- what a newcomer met ------------------------------------------------------------------------------------------


def test_a_task_column_that_is_unique_in_each_row_is_refused(tmp_path):
    csv = tmp_path / "rows.csv"
    csv.write_text("id,x,y\n" + "".join(f"{i},{i % 3},{i % 5}\n" for i in range(40)))
    with pytest.raises(errors.DataError, match="single row"):
        fit_csv(csv, tmp_path / "run", task="id", x=["x"], y=["y"], progress=False, say=lambda line: None)
    with pytest.raises(errors.OptionError, match="--categorical"):
        fit_csv(csv, tmp_path / "run", task="id", y=["y"], progress=False, say=lambda line: None)


def test_tabs_have_three_names(tmp_path):
    csv = tmp_path / "rows.tsv"
    csv.write_text("a\tb\n1\t2\n")
    for name in ("\t", "\\t", "tab"):
        assert list(read_csv(csv, separator=name).columns) == ["a", "b"]
    with pytest.raises(errors.OptionError, match="one character"):
        read_csv(csv, separator="")
