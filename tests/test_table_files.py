"""Tables from files, large tables, and tables of rows that wait for a forecast."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from bayesmeta.data import Observations
from bayesmeta.errors import BayesMetaError, DataError, EmptyTaskError, OptionError
from bayesmeta.tasks import TableTasks, to_predict
from bayesmeta.tasks.draw import draw

ROLES = {"task": "g", "x": ["t"], "categorical": ["kind"], "w": ["size"], "y": "y"}


def make_frame(seed=0, lengths=(5, 3, 4, 6)):
    rng = np.random.default_rng(seed)
    task = np.repeat([f"g{i}" for i in range(len(lengths))], lengths)
    n = len(task)
    return pd.DataFrame(
        {
            "g": task,
            "t": rng.normal(size=n),
            "kind": rng.permutation(np.resize(["a", "b"], n)),
            "size": np.repeat(rng.normal(size=len(lengths)), lengths),
            "y": rng.normal(2, 3, n),
        }
    )


def same(one, two):
    parts = [(one.x, two.x), (one.y, two.y), (one.full_mask(), two.full_mask()), (one.w, two.w)]
    return all(torch.equal(a, b) for a, b in parts)


# -- CSV ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_csv_is_read_as_its_frame(tmp_path, name):
    frame = make_frame().assign(unused="x")
    frame.loc[2, "y"] = math.nan
    frame.to_csv(tmp_path / name, index=False)
    table = TableTasks.from_csv(tmp_path / name, **ROLES, dtype=torch.float64)
    assert same(table.observations, TableTasks.from_dataframe(frame, **ROLES, dtype=torch.float64).observations)
    assert table.lengths[0] == 4
    other = tmp_path / "semicolon.csv"
    frame.to_csv(other, index=False, sep=";")
    table = table.with_standardizer(table.fit_standardizer())
    again = TableTasks.from_csv(other, separator=";", standardizer=table.standardizer, dtype=torch.float64)
    assert same(table.observations, again.observations)
    assert torch.equal(table.all(support=1).query.x, again.all(support=1).query.x)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("g,t,y\n1,2,3\n1,3,4\n", encoding="utf-8-sig")
    assert TableTasks.from_csv(path, task="g", x=["t"], y="y").names == ("1",)


FILES = {
    "empty": (b"", EmptyTaskError, "is empty"),
    "header only": (b"g,t,y\n", EmptyTaskError, "no row"),
    "binary": (b"\x89PNG\x00\xff\xfe,\n\x80", DataError, "UTF-8"),
    "semicolons": (b"g;t;y\n1;2;3\n", DataError, "separated by ';'"),
    "twice": (b"g,t,t,y\n1,2,2,3\n", DataError, "more than one column 't'"),
    "unknown": (b"g,T,y\n1,2,3\n", DataError, "no column 't'; its columns are: g, T, y; did you mean 'T'"),
    "long row": (b"g,t,y\n1,2,3,4\n1,2,3,5\n", DataError, "cannot be read as CSV"),
    "longer row": (b"g,t,y\n1,2,3\n1,2,3,4,5\n", DataError, "cannot be read as CSV"),
    "dates": (b"g,t,y\n1,2020-01-01,3\n1,2020-01-02,4\n", DataError, "look like dates"),
    "no targets": (b"g,t,y\n1,2,\n1,3,NA\n", EmptyTaskError, "no row with a target"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_table_are_refused(tmp_path, case):
    content, kind, message = FILES[case]
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        TableTasks.from_csv(path, task="g", x=["t"], y="y")
    assert isinstance(caught.value, BayesMetaError)


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        TableTasks.from_csv(tmp_path / "b.csv", task="g", x=["t"], y="y")
    with pytest.raises(DataError, match="is a folder"):
        TableTasks.from_csv(tmp_path, task="g", x=["t"], y="y")


def test_a_column_that_no_role_names_may_stand_twice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("g,t,note,note,y\n1,2,a,b,3\n")
    assert TableTasks.from_csv(path, task="g", x=["t"], y="y").lengths == (1,)


# -- drawing ------------------------------------------------------------------------------------------------------

EVEN, SKEWED = [8, 8, 8, 7], [8] * 40 + [5, 400]


@pytest.mark.parametrize("lengths", [EVEN, SKEWED])
@pytest.mark.parametrize("order", ["first", "random", "mixed"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_support_and_query_are_disjoint_rows_of_the_task(lengths, order, shuffle):
    width = max(lengths) - 3
    support, query = draw(lengths, 3, width, order, shuffle=shuffle, generator=torch.Generator().manual_seed(0))
    assert support.shape == (len(lengths), 3)
    assert query.shape == (len(lengths), width)
    for i, length in enumerate(lengths):
        seen, asked = support[i].tolist(), query[i, : length - 3].tolist()
        assert sorted(seen + asked) == list(range(length))
        assert seen == sorted(seen)
        assert shuffle or asked == sorted(asked)
        if order == "first":
            assert seen == [0, 1, 2]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("lengths", [EVEN, SKEWED])
def test_draws_are_uniform_whether_tasks_are_padded_or_not(lengths, part):
    """Each position is drawn as often as any other, in each of the two ways to sort keys (5 standard errors)."""
    generator, repeats = torch.Generator().manual_seed(1), 2000
    for order in ("random", "first"):
        counts = torch.zeros(8)
        for _ in range(repeats):
            positions = draw(lengths, 3, 2, order, shuffle=True, generator=generator)[part]
            counts += torch.bincount(positions[:3].flatten(), minlength=8)
        share = positions.shape[1] / 8
        z = (counts - 3 * repeats * share).abs().max() / math.sqrt(3 * repeats * share * (1 - share))
        assert (float(z) < 5) is (order == "random")


def test_mixed_flips_a_coin_for_each_skewed_task():
    generator = torch.Generator().manual_seed(2)
    lengths = [30] * 2000 + [200_000]
    support, _ = draw(lengths, 5, 1, "mixed", shuffle=True, generator=generator)
    first = (support[:-1] == torch.arange(5)).all(-1).double().mean()
    assert abs(float(first) - 0.5) < 5 * 0.5 / math.sqrt(2000)


# -- size ---------------------------------------------------------------------------------------------------------

LARGE = """
import sys
import numpy as np, pandas as pd, torch
torch.set_num_threads(1)
from bayesmeta.tasks import TableTasks
rows, rng = 10**6, np.random.default_rng(0)
if sys.argv[1] == "even":
    task = np.repeat(np.arange(5000), 200)
else:  # half of all rows belong to one task
    task = np.where(np.arange(rows) % 2 == 0, 0, rng.integers(1, 20_001, rows))
frame = pd.DataFrame({"g": task, "a": rng.normal(size=rows), "b": rng.normal(size=rows),
                      "c": rng.integers(0, 4, rows), "y": rng.normal(size=rows)})
warm = TableTasks.from_dataframe(frame[:100], task="g", x=["a", "b"], categorical=["c"], y="y", order="first")
warm.with_standardizer(warm.fit_standardizer()).sample(1, support=0, query=1)
def peak():  # of this process: ru_maxrss starts with that of the parent, which may have been larger
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
def reached(begin):
    return (peak() - begin) / rows
begin = peak()
table = TableTasks.from_dataframe(frame, task="g", x=["a", "b"], categorical=["c"], y="y", order="first")
reading = reached(begin)
table = table.with_standardizer(table.fit_standardizer())
for order in ("first", "random"):
    table.order = order
    for seed in range(20):
        batch = table.sample(16, support=2, query=10, generator=seed)
huge = table.subset([str(i) for i in range(33)])
for seed in range(3):
    batch = huge.sample(33, support=2, query=10, generator=seed)
print(reading, reached(begin), batch.query.x.isfinite().all().item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is in other units elsewhere")
@pytest.mark.parametrize("kind", ["even", "skewed"])
def test_a_million_rows_keep_to_the_stated_memory(kind):
    """Five columns are read; then three numbers and a code are kept, x has six columns and y one in float32."""
    result = subprocess.run([sys.executable, "-c", LARGE, kind], capture_output=True, text=True, check=True, timeout=60)
    reading, whole, finite = result.stdout.split()
    assert finite == "True"
    assert 20 < float(reading) < 5 * 16 + 64
    assert float(whole) < 5 * 16 + 64 + (3 * 8 + 4) + 7 * 4 + 64  # the last: what the draws of a huge task take


# -- rows to predict ----------------------------------------------------------------------------------------------


def learned():
    table = TableTasks.from_dataframe(make_frame(), **ROLES)
    return table.fit_standardizer()


def test_rows_with_a_target_are_the_support_of_those_without():
    standardizer = learned()
    frame = make_frame(1, lengths=(4, 2, 3, 5)).sample(frac=1, random_state=0)
    frame["g"] = "new " + frame["g"]
    frame.loc[frame["g"] == "new g1", "y"] = math.nan  # nothing known
    known = {name: part.index[:2] for name, part in frame.groupby("g")}
    for name in ("new g0", "new g3"):
        frame.loc[(frame["g"] == name) & ~frame.index.isin(known[name]), "y"] = math.nan
    found = {}
    for batch, rows in to_predict(frame, standardizer):
        batch.check()
        assert batch.standardizer.state() == standardizer.state()
        for i, name in enumerate(batch.names):
            own = frame[frame["g"] == name]
            assert torch.equal(rows[i] >= 0, batch.query.full_mask()[i])
            asked = frame.iloc[rows[i][rows[i] >= 0].numpy()]
            found[name] = sorted(asked.index)
            assert batch.query.y is None
            for side, part in ((batch.support, own[own["y"].notna()]), (batch.query, asked)):
                real = side.full_mask()[i]
                x = np.stack([part["t"], part["kind"] == "a", part["kind"] == "b"], -1)
                raw = Observations(
                    torch.tensor(x, dtype=torch.float32)[None],
                    torch.tensor(part["y"].to_numpy(), dtype=torch.float32)[None] if side.y is not None else None,
                    None,
                    torch.tensor(own["size"].to_numpy()[:1, None], dtype=torch.float32),
                )
                expected = standardizer.apply(raw)
                assert torch.allclose(side.x[i, real], expected.x[0], atol=1e-6)
                assert torch.allclose(side.w[i], expected.w[0], atol=1e-6)
                if side.y is not None:
                    assert torch.allclose(side.y[i, real], expected.y[0], atol=1e-6)
    asked = frame[frame["y"].isna()].groupby("g").groups
    assert found == {name: sorted(index) for name, index in asked.items()}
    assert "new g2" not in found  # all its rows have a target


def test_batches_to_predict_are_bounded():
    frame = make_frame(1, lengths=(2, 50, 3, 2, 4, 3)).assign(y=math.nan).drop(columns="y")
    few = [batch.num_tasks for batch, _ in to_predict(frame, learned(), max_tasks=2)]
    assert few == [2, 2, 2]
    batches = list(to_predict(frame, learned(), max_elements=3 * 10))  # x has three columns
    assert [batch.query.x.numel() <= 30 for batch, _ in batches] == [True] * (len(batches) - 1) + [False]
    assert batches[-1][0].query.shots == 50
    rows = torch.cat([rows[rows >= 0] for _, rows in batches])
    assert sorted(rows.tolist()) == list(range(len(frame)))
    assert all(batch.support.shots == 0 for batch, _ in batches)


def test_rows_to_predict_are_refused_with_reasons():
    standardizer = learned()
    unknown = make_frame().assign(kind="z", y=math.nan)
    with pytest.raises(DataError, match="'kind' is 'z'"):
        next(to_predict(unknown, standardizer))
    with pytest.raises(EmptyTaskError):
        next(to_predict(make_frame()[:0], standardizer))
    with pytest.raises(OptionError, match="max_tasks=0"):
        next(to_predict(make_frame(), standardizer, max_tasks=0))
    bare = type(standardizer)(*(torch.ones(1), torch.ones(1), torch.ones(()), torch.ones(())))
    with pytest.raises(OptionError, match="comes from no table"):
        next(to_predict(make_frame(), bare))
    two = make_frame().assign(z=lambda f: f["y"] + f["t"])
    standardizer = TableTasks.from_dataframe(two, **(ROLES | {"y": ["y", "z"]})).fit_standardizer()
    two.loc[1, "z"] = math.nan
    with pytest.raises(DataError, match="'g0' has some of the targets y, z but not all"):
        next(to_predict(two, standardizer))
