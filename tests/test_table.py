import math

import numpy as np
import pandas as pd
import pytest
import torch

from bayesmeta.data import Observations
from bayesmeta.errors import BayesMetaError, DataError, EmptyTaskError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.ops.random import as_generator
from bayesmeta.protocols import TaskDistribution
from bayesmeta.tasks.fertility import AGGREGATES, fertility, fertility_split
from bayesmeta.tasks.table import TableTasks

LENGTHS = {"a": 6, "b": 9, "c": 7, "d": 12, "e": 6}


def make_frame(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    parts = []
    for i, (name, length) in enumerate(lengths.items()):
        time = 100.0 * i + np.arange(length)
        parts.append(pd.DataFrame({"who": name, "t": time, "z": rng.normal(size=length), "y": rng.normal(size=length)}))
    return pd.concat(parts, ignore_index=True)


def make_table(order="first", lengths=LENGTHS, **options):
    return TableTasks.from_dataframe(make_frame(lengths), task="who", x=["t"], y="y", order=order, **options)


def tensors(batch):
    parts = [batch.task_id]
    for side in (batch.support, batch.query):
        parts += [side.x, side.y, side.full_mask()]
    return parts


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second)))


def test_reading_keeps_every_row_in_its_task():
    frame = make_frame()
    table = TableTasks.from_dataframe(frame, task="who", x=["t", "z"], y="y", dtype=torch.float64)
    assert isinstance(table, TaskDistribution)
    assert table.names == tuple(LENGTHS)
    assert table.lengths == tuple(LENGTHS.values())
    data = table.observations
    for i, name in enumerate(table.names):
        rows, real = frame[frame.who == name], data.mask[i]
        assert data.x[i, real].tolist() == rows[["t", "z"]].to_numpy().tolist()
        assert data.y[i, real].tolist() == rows["y"].tolist()
        assert torch.equal(data.x[i, ~real], data.x[i, :1].expand(int((~real).sum()), 2))


def test_time_order_is_stable_and_random_order_keeps_rows():
    frame = pd.DataFrame({"who": 7, "t": [3, 1, 2, 1], "y": [0.0, 1.0, 2.0, 3.0]}, index=[5, 5, 0, 1])
    by = {
        o: TableTasks.from_dataframe(frame, task="who", x=["t"], y="y", order=o) for o in ("first", "mixed", "random")
    }
    assert by["first"].observations.y[0].tolist() == [1.0, 3.0, 2.0, 0.0]
    assert by["mixed"].observations.y[0].tolist() == [1.0, 3.0, 2.0, 0.0]
    assert by["random"].observations.y[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert by["first"].names == ("7",)


def test_missing_targets_are_dropped():
    frame = make_frame()
    frame.loc[[0, 3], "y"] = math.nan
    frame.loc[0, "t"] = math.nan
    frame.loc[frame.who == "e", "y"] = math.nan
    table = TableTasks.from_dataframe(frame, task="who", x=["t"], y="y")
    assert table.names == ("a", "b", "c", "d")
    assert table.lengths[0] == 4


@pytest.mark.parametrize("order", ["first", "random", "mixed"])
@pytest.mark.parametrize("query", [None, 2, 4, 50])
def test_support_and_query_partition_each_task(order, query):
    table = make_table(order)
    batch = table.sample(200, support=5, query=query, generator=3).check()
    assert batch.query.shots == {None: 7, 2: 2, 4: 4, 50: 7}[query]
    assert batch.population == 5
    for i, row in enumerate(batch.task_id.tolist()):
        assert batch.names[i] == table.names[row]
        real = batch.query.full_mask()[i]
        seen, asked = batch.support.x[i, :, 0].tolist(), batch.query.x[i, real, 0].tolist()
        whole = table.observations.x[row, : table.lengths[row], 0].tolist()
        assert len(seen) == 5
        assert len(asked) == min(query or 99, table.lengths[row] - 5)
        assert len({*seen, *asked}) == len(seen) + len(asked)
        assert {*seen, *asked} <= set(whole)
        assert seen == sorted(seen)
        assert asked == sorted(asked)
        if order == "first":
            assert seen == whole[:5]
        padding = batch.query.x[i, ~real, 0]
        assert bool((padding == batch.query.x[i, 0, 0]).all())
        assert bool((batch.query.y[i, ~real] == batch.query.y[i, 0]).all())


def test_no_mask_where_no_task_is_short():
    table = make_table(lengths={"a": 8, "b": 8})
    assert table.sample(2, support=3, query=None).query.mask is None
    assert make_table().sample(2, support=5, query=1).query.mask is None
    assert make_table().sample(2, support=5, query=2).query.mask is not None


def inclusion_z(order, part):
    """Largest deviation of how often a position is drawn, in standard errors of a uniform draw."""
    table = make_table(order, lengths={"a": 8})
    batch = table.sample(20_000, support=3, query=2, generator=0)
    x = getattr(batch, part).x[..., 0].long()
    count = torch.bincount(x.flatten(), minlength=8)
    share = x.shape[1] / 8
    return float(((count - 20_000 * share).abs() / math.sqrt(20_000 * share * (1 - share))).max())


@pytest.mark.parametrize("part", ["support", "query"])
def test_random_support_and_query_are_uniform(part):
    assert inclusion_z("random", part) < 4
    assert inclusion_z("first", part) > 20
    assert inclusion_z("mixed", part) > 20


def test_a_random_query_of_first_is_uniform_over_what_comes_after():
    batch = make_table(lengths={"a": 8}).sample(20_000, support=3, query=2, generator=0)
    count = torch.bincount(batch.query.x.flatten().long(), minlength=8)
    assert count[:3].tolist() == [0, 0, 0]
    assert float((count[3:] - 8_000).abs().max()) < 4 * math.sqrt(20_000 * 0.4 * 0.6)


def test_mixed_flips_a_fair_coin_for_each_task():
    batch = make_table("mixed", lengths={"a": 30}).sample(10_000, support=5, query=1, generator=0)
    first = (batch.support.x[..., 0] == torch.arange(5.0)).all(-1).double().mean()
    assert abs(float(first) - 0.5) < 4 * 0.5 / 100


def test_tasks_are_drawn_without_replacement_while_there_are_enough():
    table = make_table()
    for seed in range(20):
        assert sorted(table.sample(5, support=2, query=1, generator=seed).task_id.tolist()) == [0, 1, 2, 3, 4]
    counts = torch.bincount(table.sample(10_000, support=2, query=1, generator=0).task_id, minlength=5)
    assert float((counts - 2_000).abs().max()) < 4 * math.sqrt(10_000 * 0.2 * 0.8)


@pytest.mark.parametrize("order", ["first", "random", "mixed"])
def test_one_seed_one_batch_and_the_global_state_is_left_alone(order):
    table = make_table(order)
    before = torch.get_rng_state()
    one, two = (table.sample(4, support=3, query=2, generator=11) for _ in range(2))
    given = table.sample(4, support=3, query=2, generator=as_generator(11, stream="tasks"))
    assert same(one, two)
    assert same(one, given)
    assert not same(one, table.sample(4, support=3, query=2, generator=12))
    generator = torch.Generator().manual_seed(11)
    first = table.sample(4, support=3, query=2, generator=generator)
    assert not same(first, table.sample(4, support=3, query=2, generator=generator))
    assert torch.equal(before, torch.get_rng_state())


def test_all_is_the_table_in_order():
    table = make_table()
    batch = table.all(support=5).check()
    assert batch.names == table.names
    assert batch.query.full_mask().sum(-1).tolist() == [1, 4, 2, 7, 1]
    assert torch.equal(batch.union().x[3, :, 0], 300 + torch.arange(12.0))
    short = table.all(support=5, query=2)
    assert short.query.full_mask().sum(-1).tolist() == [1, 2, 2, 2, 1]
    assert torch.equal(short.query.x[3, :, 0], torch.tensor([305.0, 306.0]))


def test_zero_shot_support():
    batch = make_table().sample(3, support=0, query=4, generator=0).check()
    assert batch.support.x.shape == (3, 0, 1)
    assert batch.query.mask is None


def test_standard_units_go_back_to_raw_ones():
    table = make_table(dtype=torch.float64)
    standardizer = table.fit_standardizer()
    scaled = table.with_standardizer(standardizer)
    whole = scaled.observations
    assert torch.equal(whole.x, table.observations.x)
    data = standardizer.apply(table.observations)
    real = data.mask
    for values in (data.x[real], data.y[real]):
        assert abs(float(values.mean())) < 1e-12
        assert abs(float(values.std(correction=0)) - 1) < 1e-12
    raw, batch = table.sample(3, support=3, query=2, generator=1), scaled.sample(3, support=3, query=2, generator=1)
    assert raw.standardizer is None
    assert torch.allclose(batch.standardizer.raw_x(batch.support.x), raw.support.x)
    assert torch.allclose(batch.standardizer.raw_y(batch.query.y), raw.query.y)
    assert not torch.allclose(batch.query.y, raw.query.y)
    assert scaled.with_standardizer(None).standardizer is None


def test_constant_columns_keep_scale_one():
    frame = make_frame().assign(z=2.0)
    standardizer = TableTasks.from_dataframe(frame, task="who", x=["z"], y="y").fit_standardizer()
    assert standardizer.x_scale.tolist() == [1.0]


def split_frame(frame):
    table = TableTasks.from_dataframe(frame, task="who", x=["t"], y="y", order="first")
    train, test = table.subset(["a", "b", "c"]), table.subset(["d", "e"])
    return train, test


def test_standardizer_sees_training_tasks_only():
    frame = make_frame()
    moved = frame.copy()
    moved.loc[moved.who == "d", "y"] += 50.0
    before, after = (split_frame(f)[0].fit_standardizer().state() for f in (frame, moved))
    assert before == after
    moved.loc[moved.who == "a", "y"] += 50.0
    assert split_frame(moved)[0].fit_standardizer().state() != before


@pytest.mark.parametrize("honest", [True, False])
def test_query_moved_upstream_leaves_the_support_alone(honest):
    frame = make_frame()
    moved = frame.copy()
    last = moved.index[(moved.who == "d") & (moved.t == 311.0)]
    moved.loc[last, "y"] += 1000.0
    batches = []
    for source in (frame, moved):
        train, test = split_frame(source)
        # The control standardises with the held-out tasks themselves, and so must leak.
        standardizer = (train if honest else test).fit_standardizer()
        batches.append(test.with_standardizer(standardizer).all(support=5))
    one, two = batches
    others = torch.ones_like(one.query.y, dtype=torch.bool)
    others[0, -1] = False
    untouched = (
        torch.equal(one.support.x, two.support.x)
        and torch.equal(one.support.y, two.support.y)
        and torch.equal(one.query.y[others], two.query.y[others])
    )
    assert untouched is honest
    assert not torch.equal(one.query.y, two.query.y)


def test_subset_keeps_data_units_and_order():
    table = make_table().with_standardizer(make_table().fit_standardizer())
    by_name, by_row = table.subset(["d", "a"]), table.subset(torch.tensor([3, 0]))
    assert by_name.names == by_row.names == ("d", "a")
    assert by_name.lengths == (12, 6)
    assert same(by_name.all(support=2), by_row.all(support=2))
    assert table.subset(["a", "e"]).observations.x.shape == (2, 6, 1)
    assert table.subset(torch.tensor([True, False, False, False, True])).names == ("a", "e")
    assert by_name.standardizer is table.standardizer
    assert by_name.order == "first"


def test_split_is_random_and_disjoint():
    table = make_table()
    one, two = table.split([2, 2], seed=0)
    assert one.num_tasks == two.num_tasks == 2
    assert not set(one.names) & set(two.names)
    assert [t.names for t in table.split([2, 2], seed=0)] == [one.names, two.names]
    assert len({t.names for seed in range(20) for t in table.split([2], seed=seed)}) > 5


def read(frame, **options):
    return TableTasks.from_dataframe(frame, **({"task": "who", "x": ["t"], "y": "y"} | options))


ERRORS = {
    "unknown column": (DataError, "no column 'nope'.*who, t, z, y", lambda: read(make_frame(), x=["nope"])),
    "x is a string": (DataError, "list", lambda: read(make_frame(), x="t")),
    "target as input": (DataError, "target may not be an input", lambda: read(make_frame(), x=["t", "y"])),
    "text": (DataError, "'t' has dtype", lambda: read(make_frame().assign(t="soon"))),
    "twice": (DataError, "more than one", lambda: read(pd.concat([make_frame(), make_frame()[["t"]]], axis=1))),
    "no task": (DataError, "1 row", lambda: read(make_frame().assign(who=[None] + ["a"] * 39))),
    "1 and '1'": (DataError, "one name", lambda: read(make_frame().assign(who=[1, "1"] * 20))),
    "nan in x": (
        NonFiniteDataError,
        "'t' is empty in task 'b'",
        lambda: read(make_frame().replace({"t": {103.0: np.nan}})),
    ),
    "inf in x": (
        NonFiniteDataError,
        "'t' is -inf in task 'b'",
        lambda: read(make_frame().replace({"t": {103: -np.inf}})),
    ),
    "inf in y": (NonFiniteDataError, "'y' is inf in task 'a'", lambda: read(make_frame().assign(y=np.inf))),
    "too large": (NonFiniteDataError, "torch.float32", lambda: read(make_frame().assign(z=1e300), x=["z"])),
    "no rows": (EmptyTaskError, "no row", lambda: read(make_frame().assign(y=np.nan))),
    "order": (OptionError, "first, random, mixed", lambda: read(make_frame(), order="last")),
    "short": (EmptyTaskError, "'a' has 6 .* 6 for the support", lambda: make_table().sample(1, support=6, query=1)),
    "short, all": (EmptyTaskError, "2 of 5 tasks", lambda: make_table().all(support=6)),
    "query": (OptionError, "query=-1", lambda: make_table().all(support=1, query=-1)),
    "support": (OptionError, "support=-1", lambda: make_table().sample(1, support=-1, query=1)),
    "num_tasks": (OptionError, "num_tasks=0", lambda: make_table().sample(0, support=1, query=1)),
    "unknown task": (DataError, "no task 'q'", lambda: make_table().subset(["q"])),
    "unknown row": (DataError, "no task 5", lambda: make_table().subset([5])),
    "task twice": (DataError, "'a' is given twice", lambda: make_table().subset([0, "a"])),
    "no subset": (EmptyTaskError, "no task", lambda: make_table().subset([])),
    "split": (OptionError, "6", lambda: make_table().split([3, 3])),
    "units": (
        ShapeError,
        "standardizer",
        lambda: make_table().with_standardizer(read(make_frame(), x=["t", "z"]).fit_standardizer()),
    ),
    "fertility": (OptionError, "188", lambda: fertility_split(0, test=180)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert isinstance(caught.value, BayesMetaError)


def test_fertility_counts():
    everything, countries = fertility(aggregates=True), fertility()
    assert everything.num_tasks == 198
    assert sum(length == 52 for length in everything.lengths) == 192
    assert countries.num_tasks == 194
    assert sum(length == 52 for length in countries.lengths) == 188
    assert min(countries.lengths) >= 20
    assert len(set(everything.names) & set(AGGREGATES)) == 4
    assert not set(countries.names) & set(AGGREGATES)
    row = countries.names.index("Aruba")
    assert countries.observations.x[row, [0, -1], 0].tolist() == [1960.0, 2011.0]
    assert countries.observations.y[row, [0, -1]].tolist() == pytest.approx([4.82, 1.69])


def test_fertility_split_is_disjoint_and_standardised_by_train():
    split = fertility_split(0)
    parts = (split.train, split.validation, split.test)
    assert [part.num_tasks for part in parts] == [110, 22, 60]
    assert len({name for part in parts for name in part.names}) == 192
    assert set(split.test.lengths) == set(split.validation.lengths) == {52}
    assert all(part.standardizer is split.train.standardizer for part in parts)
    data: Observations = split.train.observations
    assert float(split.train.standardizer.y_mean) == pytest.approx(float(data.y[data.mask].double().mean()), rel=1e-6)
    everyone = fertility(minimum_years=30).fit_standardizer()
    assert split.train.standardizer.state() != everyone.state()
    assert fertility_split(0, train=20, validation=5).test.names == split.test.names
    assert fertility_split(1).test.names != split.test.names
    assert split.test.all(support=10).query.x.shape == (60, 42, 1)
