"""What columns become: categories, flags, covariates, exposures, gaps, classes; learned on the training tasks alone."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from bayesmeta.data import Observations, Standardizer
from bayesmeta.errors import BayesMetaError, DataError, EmptyTaskError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.tasks import TableSchema, TableTasks

TASKS, ROWS = 8, 6
ROLES = {
    "task": "town",
    "x": ["age", "kind", "new"],
    "w": ["size", "region"],
    "categorical": ["kind", "region", "month"],
    "exposure": "hours",
    "y": "y",
}


def make_frame(seed=0):
    rng = np.random.default_rng(seed)
    n = TASKS * ROWS
    town = np.repeat([f"t{i}" for i in range(TASKS)], ROWS)
    return pd.DataFrame(
        {
            "town": town,
            "age": rng.normal(40, 10, n),
            "kind": np.tile(["b", "a", "c"], n // 3),
            "new": rng.random(n) < 0.5,
            "size": np.repeat(rng.normal(100, 20, TASKS), ROWS),
            "region": np.repeat(["north", "south"] * (TASKS // 2), ROWS),
            "month": np.tile([10, 9], n // 2),
            "hours": rng.uniform(1, 5, n),
            "y": rng.normal(3, 2, n),
            "count": rng.poisson(3, n),
            "answer": np.tile(["yes", "no"], n // 2),
            "other": rng.normal(7, 3, n),
        }
    )


def read(frame=None, **options):
    return TableTasks.from_dataframe(make_frame() if frame is None else frame, **(ROLES | options))


def flat(table, name):
    """One column of x in raw units, task after task."""
    data = table.observations
    return data.x[..., table.x_names.index(name)][data.mask]


def test_each_column_becomes_what_it_should():
    frame = make_frame()
    table = read(frame, dtype=torch.float64)
    names = ("age", "kind=a", "kind=b", "kind=c", "new", "month=9", "month=10", "hours")
    assert table.x_names == table.schema.x_names == names
    assert table.num_features == 8
    assert table.schema.w_names == ("size", "region=north", "region=south")
    assert flat(table, "age").tolist() == frame["age"].tolist()
    assert flat(table, "hours").tolist() == frame["hours"].tolist()
    assert flat(table, "new").tolist() == frame["new"].astype(float).tolist()
    for name in names:
        column, _, category = name.partition("=")
        if category:
            assert flat(table, name).tolist() == (frame[column].astype(str) == category).astype(float).tolist()
    towns = frame.groupby("town").first()
    expected = np.stack([towns["size"], towns["region"] == "north", towns["region"] == "south"], -1)
    assert table.observations.w.tolist() == expected.astype(float).tolist()


def test_only_numbers_are_scaled():
    table = read(dtype=torch.float64)
    standardizer = table.fit_standardizer()
    batch = table.with_standardizer(standardizer).all(support=1)
    both, raw = batch.union(), table.observations
    for i, name in enumerate(table.x_names):
        column = both.x[..., i]
        if name == "age":
            assert abs(float(column.mean())) < 1e-12
            assert abs(float(column.std(correction=0)) - 1) < 1e-12
        else:
            assert torch.equal(column, raw.x[..., i])
    assert abs(float(both.w[:, 0].mean())) < 1e-12
    assert abs(float(both.w[:, 0].std(correction=0)) - 1) < 1e-12
    assert torch.equal(both.w[:, 1:], raw.w[:, 1:])
    assert torch.allclose(standardizer.apply(raw).x, both.x)
    assert torch.allclose(standardizer.apply(raw).w, both.w)
    assert torch.allclose(standardizer.apply(raw).y, both.y)
    assert torch.equal(batch.support.w, batch.query.w)


def test_w_follows_its_task():
    table = read()
    batch = table.sample(5, support=2, query=2, generator=3)
    assert torch.equal(batch.w, table.observations.w[batch.task_id])
    part = table.subset(["t5", "t2"]).with_schema(table.schema)
    assert torch.equal(part.all(support=1).w, table.observations.w[[5, 2]])


def test_rows_may_leave_a_covariate_out():
    frame = make_frame()
    frame.loc[frame.index % ROWS != 2, ["size", "region"]] = None
    assert torch.equal(read(frame).observations.w, read().observations.w)


def test_several_targets():
    frame = make_frame()
    frame.loc[1, "other"] = math.nan
    table = read(frame, y=["y", "other"], dtype=torch.float64)
    assert table.lengths[0] == ROWS - 1
    data = table.observations
    assert data.y[data.mask].tolist() == frame.drop(1)[["y", "other"]].to_numpy().tolist()
    standardizer = table.fit_standardizer()
    y = table.with_standardizer(standardizer).all(support=2).union().y
    assert y.shape == (TASKS, ROWS, 2)
    assert torch.allclose(standardizer.raw_y(y[1]), data.y[1])
    assert read(y=["y"]).observations.y.shape == (TASKS, ROWS)


@pytest.mark.parametrize("target", ["count", "class"])
def test_counts_and_classes_keep_their_units(target):
    frame = make_frame()
    name = {"count": "count", "class": "answer"}[target]
    table = read(frame, y=name, target=target)
    standardizer = table.fit_standardizer()
    assert (float(standardizer.y_mean), float(standardizer.y_scale)) == (0.0, 1.0)
    y = table.with_standardizer(standardizer).all(support=1).union().y.flatten()
    expected = frame["count"] if target == "count" else (frame["answer"] == "yes").astype(float)
    assert y.tolist() == expected.tolist()
    assert table.schema.classes == {"count": (), "class": ("no", "yes")}[target]


def test_classes_and_categories_have_one_order_whatever_their_type():
    for values in ([10, 9, 2], [10.0, 9.0, 2.0], ["10", "9", "2"]):
        frame = make_frame().assign(answer=np.resize(values, TASKS * ROWS))
        schema = read(frame, y="answer", target="class").schema
        assert schema.classes == ("2", "9", "10")


# -- missing values -----------------------------------------------------------------------------------------------


def with_gaps():
    frame = make_frame()
    frame.loc[[0, 7], "age"] = math.nan
    frame.loc[[8], "kind"] = None
    frame.loc[frame.town == "t3", "size"] = math.nan
    return frame


def test_missing_inputs_are_an_error_by_default():
    with pytest.raises(NonFiniteDataError, match="'age' is empty in task 't0' \\(2 such"):
        read(with_gaps())
    with pytest.raises(NonFiniteDataError, match="'kind' is empty in task 't1'"):
        read(with_gaps().assign(age=1.0))
    with pytest.raises(NonFiniteDataError, match="'size' has no value in task 't3'"):
        read(with_gaps().assign(age=1.0, kind="a"))


def test_missing_inputs_drop_their_rows_and_tasks():
    table = read(with_gaps(), missing="drop")
    assert table.names == ("t0", "t1", "t2", "t4", "t5", "t6", "t7")
    assert table.lengths == (5, 4, 6, 6, 6, 6, 6)
    kept = make_frame().drop([0, 7, 8])
    assert flat(table, "age").tolist() == pytest.approx(kept[kept.town != "t3"]["age"].tolist())


def test_missing_inputs_take_the_mean_and_say_so():
    table = read(with_gaps(), missing="mean", dtype=torch.float64)
    assert table.schema.gaps == ("age", "kind", "size")
    assert table.x_names[-3:] == ("age is missing", "kind is missing", "hours")
    standardizer = table.fit_standardizer()
    assert float(standardizer.x_mean[0]) == pytest.approx(with_gaps()["age"].mean(), rel=1e-12)
    assert float(standardizer.x_scale[0]) == pytest.approx(with_gaps()["age"].std(ddof=0), rel=1e-12)
    table = table.with_standardizer(standardizer)
    x = table.all(support=1).union().x.reshape(TASKS * ROWS, -1)
    column = {name: x[:, i] for i, name in enumerate(table.x_names)}
    assert column["age is missing"].nonzero().flatten().tolist() == [0, 7]
    assert column["age"][[0, 7]].tolist() == [0.0, 0.0]
    assert column["kind is missing"].nonzero().flatten().tolist() == [8]
    assert [float(column[f"kind={k}"][8]) for k in "abc"] == [0.0, 0.0, 0.0]
    assert flat(table, "age")[0] == standardizer.x_mean[0]
    w = table.all(support=1).w
    assert w[:, -1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert float(w[3, 0]) == 0.0


def test_the_mean_needs_a_standardizer():
    with pytest.raises(DataError, match="needs a standardizer"):
        read(with_gaps(), missing="mean").all(support=1)
    assert read(missing="mean").all(support=1).num_tasks == TASKS  # no gap, nothing to fill


def test_a_gap_that_training_never_saw_is_refused():
    frame = make_frame()
    frame.loc[frame.index[-1], "age"] = math.nan
    table = read(frame, missing="mean")
    train, test = table.subset(list(range(7))), table.subset(["t7"])
    test = test.with_standardizer(train.fit_standardizer())
    with pytest.raises(DataError, match=r"'age' is missing in task 't7'.*no training task lacks it"):
        test.all(support=1)


# -- what held-out tasks may not do --------------------------------------------------------------------------------


def perturbed():
    """The frame with other values, categories, classes, gaps and lengths in its held-out tasks t6 and t7."""
    frame = make_frame()
    out = frame.town.isin(["t6", "t7"])
    frame["new"] = frame["new"].astype(object)
    frame.loc[out, ["age", "size", "hours", "y"]] *= 50.0
    frame.loc[out, "kind"] = "A first one"
    frame.loc[out, "region"] = "a region"
    frame["month"] = frame["month"].astype(object)
    frame.loc[out, "month"] = "January"
    frame.loc[out, "answer"] = "maybe"
    frame.loc[frame.town == "t7", "age"] = math.nan
    frame.loc[frame.town == "t6", "new"] = True
    return pd.concat([frame, frame[frame.town == "t6"]])


@pytest.mark.parametrize("target", ["real", "class"])
@pytest.mark.parametrize("order", ["first", "random", "mixed"])
def test_training_is_bit_identical_whatever_held_out_tasks_hold(order, target):
    options = {"missing": "mean", "order": order, "order_by": "hours", "target": target}
    options["y"] = {"real": "y", "class": "answer"}[target]
    batches, states = [], []
    for frame in (make_frame(), perturbed()):
        train = read(frame, **options).subset([f"t{i}" for i in range(6)])
        standardizer = train.fit_standardizer()
        batches.append(train.with_standardizer(standardizer).sample(4, support=2, query=3, generator=5))
        states.append(standardizer.state())
    one, two = batches
    assert states[0] == states[1]
    for a, b in ((one.support, two.support), (one.query, two.query)):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.w, b.w)
    # Control: what is learned from all tasks differs.
    everything = [read(frame, **options).fit_standardizer().state() for frame in (make_frame(), perturbed())]
    assert everything[0] != everything[1]
    assert everything[0]["schema"]["categories"] != everything[1]["schema"]["categories"]


def test_a_category_or_class_that_training_never_saw_is_named():
    table = read(perturbed().assign(age=1.0))
    train, test = table.subset([f"t{i}" for i in range(6)]), table.subset(["t0", "t6"])
    with pytest.raises(DataError, match=r"'kind' is 'A first one' in task 't6', a category.*known are: a, b, c"):
        test.with_standardizer(train.fit_standardizer()).all(support=1)
    with pytest.raises(DataError, match="'kind' is 'A first one' in task 't6'"):
        test.with_schema(train.schema).all(support=1)
    assert test.subset(["t0"]).with_standardizer(train.fit_standardizer()).all(support=1).num_tasks == 1
    region = perturbed().assign(age=1.0, kind="a", month=9)
    with pytest.raises(DataError, match="'region' is 'a region' in task 't6', a category"):
        read(region).subset(["t0", "t6"]).with_schema(read(make_frame().assign(kind="a", month=9)).schema).all(
            support=1
        )
    answers = {"y": "answer", "target": "class", "categorical": [], "x": ["hours"], "w": [], "exposure": None}
    table = read(perturbed(), **answers)
    with pytest.raises(DataError, match=r"'answer' is 'maybe' in task 't6', a class.*known are: no, yes"):
        table.subset(["t6"]).with_schema(table.subset(["t0"]).schema).all(support=1)


def test_parts_in_raw_units_do_not_each_learn_their_own_categories():
    train, test = read().split([5, 3])
    with pytest.raises(DataError, match="part of a larger one"):
        train.sample(2, support=1)
    shared = [part.with_schema(train.schema).all(support=1) for part in (train, test)]
    assert shared[0].support.num_features == shared[1].support.num_features
    plain = TableTasks.from_dataframe(make_frame(), task="town", x=["age"], y="y").split([5, 3])
    assert plain[0].all(support=1).num_tasks == 5


# -- schemas ------------------------------------------------------------------------------------------------------


def test_a_schema_reads_another_frame_in_the_same_way():
    table = read(with_gaps(), missing="mean", y="answer", target="class")
    standardizer = table.fit_standardizer()
    stored = json.loads(json.dumps(standardizer.state()))
    again = Standardizer.from_state(stored)
    assert again.state() == standardizer.state()
    assert TableSchema.from_state(json.loads(json.dumps(table.schema.state()))) == table.schema
    few = with_gaps().iloc[[8, 0, 13]].assign(kind=[None, "c", "a"])  # without most categories and all of "region"
    other = TableTasks.from_dataframe(few, standardizer=again)
    assert other.schema == table.schema
    batch = other.all(support=0)
    assert batch.query.num_features == table.num_features
    whole = table.with_standardizer(standardizer).all(support=0)
    row = whole.query.x.reshape(TASKS * ROWS, -1)[0]
    position = other.x_names.index("kind=a")
    changed = batch.query.x[1, 0]
    assert torch.equal(changed[position : position + 3], torch.tensor([0.0, 0.0, 1.0]))
    keep = [i for i, name in enumerate(other.x_names) if not name.startswith("kind=")]
    assert torch.equal(changed[keep], row[keep])
    assert torch.equal(batch.w[1], whole.w[0])


def test_a_standardizer_of_other_columns_is_refused():
    standardizer = read().fit_standardizer()
    for options in ({"w": ["region"]}, {"exposure": None}, {"x": ["other", "kind", "new"]}, {"missing": "drop"}):
        with pytest.raises(ShapeError, match=f"with {next(iter(options))}="):
            read(**options).with_standardizer(standardizer)
    one = Standardizer(*(torch.ones(n) for n in (3, 3)), *(torch.ones(()) for _ in range(2)))
    with pytest.raises(ShapeError, match="3 input"):
        read().with_standardizer(one)
    with pytest.raises(ShapeError, match="width 8"):
        standardizer.apply(Observations(torch.ones(1, 2, 1), w=torch.ones(1, 3)))
    with pytest.raises(ShapeError, match="3 task-level"):
        standardizer.apply(Observations(torch.ones(1, 2, 8)))
    with pytest.raises(ShapeError, match="w has shape"):
        standardizer.apply(Observations(torch.ones(1, 2, 8), w=torch.ones(1, 1)))


def test_constant_targets_are_refused_where_units_are_learned():
    with pytest.raises(DataError, match=r"'y' is 3 in all 48 row.* of the 8 training task.*nothing to learn"):
        read(make_frame().assign(y=3.0)).fit_standardizer()
    with pytest.raises(DataError, match="'other' is 1"):
        read(make_frame().assign(other=1), y=["y", "other"]).fit_standardizer()
    with pytest.raises(DataError, match="'answer' is no in all"):
        read(make_frame().assign(answer="no"), y="answer", target="class").fit_standardizer()
    one_task = make_frame()
    one_task.loc[one_task.town == "t0", "y"] = 3.0
    assert read(one_task).fit_standardizer().y_scale > 0


def test_a_constant_of_many_digits_keeps_scale_one():
    """The mean of n times 0.1 is not 0.1: a standard deviation of rounding errors would blow the column up."""
    table = read(make_frame().assign(age=0.1), dtype=torch.float64)
    assert float(table.fit_standardizer().x_scale[0]) == 1.0


# -- order --------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_a_column_of_their_own():
    frame = make_frame()
    order = frame.groupby("town")["hours"].rank().to_numpy()
    expected = frame.sort_values(["town", "hours"])["age"].astype(np.float32).tolist()
    dates = pd.Timestamp("2020-01-30") + pd.to_timedelta(order, unit="D")
    for when in (frame["hours"], dates, dates.strftime("%Y-%m-%d")):
        table = read(frame.assign(when=when), order_by="when", order="first")
        assert flat(table, "age").tolist() == expected
    assert flat(read(frame, order="random"), "age").tolist() != expected


def test_fractions_split_all_tasks():
    table = TableTasks.from_dataframe(make_frame(), task="town", x=["age"], y="y")
    parts = table.split([0.7, 0.15, 0.15], seed=1)
    assert sum(part.num_tasks for part in parts) == TASKS
    assert len({name for part in parts for name in part.names}) == TASKS
    assert [part.num_tasks for part in table.split([0.5, 0.25])] == [4, 2]
    assert [p.names for p in table.split([0.5, 0.25], seed=2)] == [p.names for p in table.split([4, 2], seed=2)]


# -- errors -------------------------------------------------------------------------------------------------------


def spoiled(**columns):
    frame = make_frame()
    for name, value in columns.items():
        frame[name] = frame[name].astype(object)
        frame.loc[9, name] = value
    return frame


DAY = pd.Timestamp("2020-01-31")
ERRORS = {
    "near name": (DataError, "no column 'Regoin'.*did you mean 'region'", lambda: read(w=["Regoin"], categorical=[])),
    "w varies": (
        DataError,
        "'size' is not constant within task 't1' .*it is .* and 7",
        lambda: read(spoiled(size=7.0)),
    ),
    "text w varies": (
        DataError,
        "'region' is not constant within task 't1'",
        lambda: read(spoiled(region="elsewhere")),
    ),
    "exposure": (DataError, "'hours' is -2 in task 't1'.*positive", lambda: read(spoiled(hours=-2.0))),
    "no exposure": (NonFiniteDataError, "'hours' is empty", lambda: read(spoiled(hours=None), missing="mean")),
    "negative": (
        DataError,
        "'count' is -1 in task 't1'.*a count",
        lambda: read(spoiled(count=-1), y="count", target="count"),
    ),
    "fraction": (DataError, "'count' is 1.5", lambda: read(spoiled(count=1.5), y="count", target="count")),
    "text in numbers": (
        DataError,
        "holds 'old' in task 't1'.*categorical=\\['age'\\]",
        lambda: read(spoiled(age="old")),
    ),
    "dates": (
        DataError,
        "look like dates.*2020-01-31.*to_datetime",
        lambda: read(make_frame().assign(age="2020-01-31")),
    ),
    "real dates": (DataError, "datetime64.*dayofyear", lambda: read(make_frame().assign(age=DAY))),
    "text target": (DataError, "target='class'", lambda: read(y="answer")),
    "flags and text": (DataError, "mixes True and False", lambda: read(spoiled(new="perhaps"))),
    "many": (
        DataError,
        "at most 1000",
        lambda: TableTasks.from_dataframe(
            pd.DataFrame({"g": 0, "c": range(1001), "y": 1}), task="g", categorical=["c"], y="y"
        ),
    ),
    "1 and '1'": (DataError, "different categories of one name", lambda: read(spoiled(month="9"))),
    "y in x": (DataError, "'y' is named more than once", lambda: read(x=["age", "y"])),
    "w in x": (DataError, "'size' is named more than once", lambda: read(x=["size"])),
    "ordered by y": (DataError, "'y' is named more than once", lambda: read(order_by="y")),
    "categorical twice": (DataError, "repeats", lambda: read(categorical=["kind", "kind"])),
    "categorical text": (DataError, "expected a list", lambda: read(categorical="kind")),
    "no inputs": (DataError, "at least one column", lambda: read(x=[], categorical=[])),
    "column 3": (DataError, "3 is a int; expected text", lambda: read(x=["age", 3])),
    "classes": (DataError, "one column of classes", lambda: read(y=["y", "other"], target="class")),
    "target": (OptionError, "real, count, class", lambda: read(target="ordinal")),
    "missing": (OptionError, "error, drop, mean", lambda: read(missing="zero")),
    "no roles": (OptionError, "or give a schema", lambda: TableTasks.from_dataframe(make_frame(), x=["age"])),
    "roles twice": (OptionError, "x, w.* a schema were given", lambda: read(task=None, y=None, schema=read().schema)),
    "order by category": (DataError, "order_by", lambda: read(x=["kind", "age"], order="first")),
    "no time": (
        DataError,
        "'hours'.* missing in task 't1'",
        lambda: read(spoiled(hours=None), exposure=None, order_by="hours"),
    ),
    "odd time": (DataError, "'age' has dtype", lambda: read(spoiled(age="soon"), x=["other"], order_by="age")),
    "all dropped": (EmptyTaskError, "no row is left", lambda: read(make_frame().assign(age=math.nan), missing="drop")),
    "all w dropped": (EmptyTaskError, "no task is left", lambda: read(make_frame().assign(size=None), missing="drop")),
    "empty column": (
        DataError,
        "'age' has no value in any training task",
        lambda: read(make_frame().assign(age=math.nan), missing="mean").fit_standardizer(),
    ),
    "fractions": (OptionError, "add up to at most 1", lambda: read().split([0.7, 0.7])),
    "no task": (OptionError, "at least 1 task", lambda: read().split([0.01, 0.5])),
    "state": (DataError, "nonsense", lambda: TableSchema.from_state(read().schema.state() | {"nonsense": 1})),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert isinstance(caught.value, BayesMetaError)
