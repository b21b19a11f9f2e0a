"""Tasks from a function of one's own, and from a batch."""

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.tasks import FixedTasks, FunctionTasks, Sinusoid


def lines(num_tasks, shots, generator):
    x = torch.randn(num_tasks, shots, 1, generator=generator)
    return x, torch.randn(num_tasks, 1, generator=generator) * x.squeeze(-1)


def series(generator):
    """One task of 5 to 9 rows: row number, and a slope times it."""
    rows = int(torch.randint(5, 10, (), generator=generator))
    x = torch.arange(float(rows)).unsqueeze(-1)
    return x, torch.randn(1, generator=generator) * x.squeeze(-1)


# -- functions ----------------------------------------------------------------------------------------------------


def test_a_function_is_cut_into_support_and_query():
    batch = FunctionTasks(lines).sample(4, support=3, query=2, generator=torch.Generator().manual_seed(8))
    x, y = lines(4, 5, torch.Generator().manual_seed(8))
    assert batch.union().x.equal(x)
    assert batch.union().y.equal(y)
    assert batch.support.shots == 3
    assert batch.population is None
    assert FunctionTasks(lines, num_tasks=50).sample(4, support=3, query=2).population == 50


def test_covariates_and_several_outputs_go_through():
    def function(num_tasks, shots, generator):
        x = torch.randn(num_tasks, shots, 2, generator=generator)
        return x, x.repeat(1, 1, 2)[..., :3], x[:, 0]

    batch = FunctionTasks(function).sample(4, support=3, query=2).check()
    assert batch.support.y.shape == (4, 3, 3)
    assert batch.w.shape == (4, 2)

    def one(generator):
        x = torch.randn(6, 2, generator=generator)
        return x, x.sum(-1).round().long(), x[0]

    batch = FunctionTasks.per_task(one).sample(4, support=3, query=2).check()
    assert batch.query.y.dtype == torch.int64
    assert batch.w.shape == (4, 2)


def test_one_task_at_a_time_first_rows_first():
    tasks = FunctionTasks.per_task(series)
    batch = tasks.sample(40, support=4, query=3, generator=1).check()
    assert batch.support.mask is None
    assert batch.support.x.squeeze(-1).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 40
    counts = batch.query.mask.sum(-1)
    assert set(counts.tolist()) == {1, 2, 3}
    for x, mask in zip(batch.query.x.squeeze(-1), batch.query.mask):
        expected = torch.arange(4.0, 7.0)
        assert x[mask].equal(expected[: int(mask.sum())])
        assert x[~mask].eq(4.0).all(), "padding is a copy of the first real row"
    slopes = batch.query.y / batch.query.x.squeeze(-1)
    torch.testing.assert_close(slopes, (batch.support.y[:, 1:2]).expand(-1, 3))
    everything = tasks.sample(40, support=4, generator=1)
    assert everything.query.shots == 5
    assert everything.query.counts().max() == 5
    assert tasks.sample(3, support=5, query=0).query.shots == 0


def test_one_task_at_a_time_at_random():
    batch = FunctionTasks.per_task(series, order="random").sample(2000, support=2, query=None, generator=1).check()
    support, query, mask = batch.support.x.squeeze(-1), batch.query.x.squeeze(-1), batch.query.mask
    lengths = 2 + mask.sum(-1)
    for task in range(50):  # support and query are all rows, once each, in order
        rows = torch.cat([support[task], query[task][mask[task]]])
        assert rows.sort().values.tolist() == list(range(int(lengths[task])))
        assert support[task].diff() > 0
    # each row of a task is as likely as any other: the mean of two is (n − 1) / 2
    excess = support.mean(-1) - (lengths - 1) / 2
    assert abs(float(excess.mean())) < 5 * float(excess.std()) / 2000**0.5
    first = FunctionTasks.per_task(series).sample(2000, support=2, query=None, generator=1).support.x.squeeze(-1)
    assert float((first.mean(-1) - (lengths - 1) / 2).mean()) < -1, "control: the first two are not"


rng = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda n, s, g: (torch.rand(n, s, 1, generator=g), torch.rand(n, s)), "different data"),
        (
            lambda n, s, g: (torch.rand(n, s, 1, generator=g), torch.tensor(rng.random((n, s))).float()),
            "different data",
        ),
        (lambda n, s, g: (torch.ones(n, s, 1), torch.ones(n, s)), "drew no number"),
        (lambda n, s, g: lines(n, s, torch.Generator().manual_seed(0)), "drew no number"),
    ],
    ids=["torch's global numbers", "a numpy generator of its own", "constant", "a seed of its own"],
)
def test_a_function_that_draws_elsewhere_is_found_at_first_use(function, match):
    with pytest.raises(errors.DataError, match=match):
        FunctionTasks(function).sample(3, support=2, query=2)


def test_a_task_function_that_draws_elsewhere_is_found_at_first_use():
    def one(generator):
        x = torch.randn(6, 1, generator=generator)
        return x, torch.as_tensor(rng.normal(size=6), dtype=torch.float32)

    with pytest.raises(errors.DataError, match="different data"):
        FunctionTasks.per_task(one).sample(3, support=2, query=2)

    def seeded(generator):  # the remedy that the docstring names
        ours = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        x = ours.normal(size=(6, 1))
        return torch.as_tensor(x), torch.as_tensor(x[:, 0])

    tasks = FunctionTasks.per_task(seeded)
    assert tasks.sample(3, support=2, query=2, generator=5).query.y.equal(
        tasks.sample(3, support=2, query=2, generator=5).query.y
    )


def test_the_check_at_first_use_leaves_the_numbers_as_they_are():
    fresh, used = FunctionTasks(lines), FunctionTasks(lines)
    used.sample(2, support=1, query=1)
    states = []
    for tasks in (fresh, used):
        generator = torch.Generator().manual_seed(3)
        tasks.sample(4, support=2, query=2, generator=generator)
        states.append(generator.get_state())
    assert states[0].equal(states[1])


def random(*shape, dtype=torch.float32):
    return lambda generator: torch.rand(*shape, generator=generator, dtype=dtype)


def returns(*parts):
    """A function for batches of 3 tasks and 4 shots, or for one task, that returns random tensors of these shapes."""
    return lambda *arguments: tuple(part(arguments[-1]) if callable(part) else part for part in parts)


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ((random(3, 4, 1),), errors.DataError, r"1 values; expected a tuple \(x, y\)"),
        ((random(3, 4, 1), np.zeros((3, 4))), errors.DataError, "y as ndarray.*torch.as_tensor"),
        ((random(3, 4, 1), None), errors.DataError, "y as NoneType"),
        ((random(3, 4), random(3, 4)), errors.ShapeError, r"x of shape \[3, 4\].*\[3, 4, features\]"),
        ((random(4, 3, 1), random(4, 3)), errors.ShapeError, r"for 3 tasks of 4 shots"),
        ((random(3, 4, 1), random(3, 5)), errors.ShapeError, r"y of shape \[3, 5\]"),
        ((random(3, 4, 1), random(3, 4, 1)), errors.ShapeError, "squeeze"),
        ((random(3, 4, 1), random(3, 4), random(2, 1)), errors.ShapeError, "w has shape"),
        ((random(3, 4, 1, dtype=torch.float64), random(3, 4)), errors.DeviceMismatchError, "float64.*float32"),
        ((random(3, 4, 1), random(3, 4), random(3, 1, dtype=torch.float64)), errors.DeviceMismatchError, "w of dtype"),
        ((lambda g: torch.randint(5, (3, 4, 1), generator=g), random(3, 4)), errors.DataError, "dtype torch.int64"),
        ((random(3, 4, 1), torch.zeros(3, 4, device="meta")), errors.DeviceMismatchError, "y on meta"),
        ((random(3, 4, 1), torch.full((3, 4), torch.nan)), errors.NonFiniteDataError, "task 0, shot 0"),
    ],
)
def test_what_a_function_returns_is_checked(parts, error, match):
    with pytest.raises(error, match=match):
        FunctionTasks(returns(*parts)).sample(3, support=2, query=2)


def alternating(*tasks):
    """A function for one task that returns shapes in turn."""
    calls = iter(range(1000))

    def one(generator):
        return tuple(torch.rand(*shape, generator=generator) for shape in tasks[next(calls) % len(tasks)])

    return one


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (alternating(((4, 3, 1), (4, 3))), errors.ShapeError, r"task 0; expected x \[rows, features\]"),
        (alternating(((4,), (4,))), errors.ShapeError, r"x \[4\]"),
        (alternating(((4, 1), (5,))), errors.ShapeError, r"y \[5\]"),
        (alternating(((4, 1), (4,)), ((4, 2), (4,))), errors.ShapeError, r"x \[4, 2\].*for task 1, but x \[4, 1\]"),
        (alternating(((4, 1), (4,)), ((4, 1), (4, 2))), errors.ShapeError, r"y \[4, 2\]"),
        (alternating(((4, 1), (4,), (2,)), ((4, 1), (4,))), errors.ShapeError, r"w \[2\] for task 0"),
        (alternating(((4, 1), (4,), (2,)), ((4, 1), (4,), (3,))), errors.ShapeError, r"w \[3\]"),
        (alternating(((4, 1), (4,), (2, 2))), errors.ShapeError, r"w \[covariates\]"),
        (
            alternating(((4, 1), (4,)), ((2, 1), (2,))),
            errors.EmptyTaskError,
            "Task 1 has 2 .*at least 1 for",
        ),
        (alternating(((4, 1), (4,)), ((0, 1), (0,))), errors.EmptyTaskError, "Task 1 has 0"),
    ],
)
def test_what_a_function_of_one_task_returns_is_checked(function, error, match):
    with pytest.raises(error, match=match):
        FunctionTasks.per_task(function).sample(4, support=2, query=2)


def test_one_dtype_for_all_tasks():
    calls = iter(range(100))

    def one(generator):
        dtype = torch.float32 if next(calls) % 2 else torch.float64
        return torch.rand(4, 1, generator=generator, dtype=dtype), torch.rand(4, generator=generator, dtype=dtype)

    with pytest.raises(errors.DeviceMismatchError, match="for task 1"):
        FunctionTasks.per_task(one).sample(4, support=2, query=2)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: FunctionTasks(3), "function is a int"),
        (lambda: FunctionTasks(lines, num_tasks=0), "num_tasks=0"),
        (lambda: FunctionTasks.per_task(series, order="last"), "order='last'.*first, random"),
        (lambda: FunctionTasks(lines).sample(3, support=2, query=None), "query=None"),
        (lambda: FunctionTasks.per_task(series).sample(0, support=2), "num_tasks=0"),
        (lambda: FunctionTasks.per_task(series).sample(2, support=-1), "support=-1"),
    ],
)
def test_bad_options_are_refused(build, match):
    with pytest.raises(errors.OptionError, match=match):
        build()


# -- a batch ------------------------------------------------------------------------------------------------------


def ragged_batch():
    """Five named tasks of 3 + 1 … 3 + 5 observations, y = 100 · task + row, and a padding task."""
    rows = [torch.arange(float(n)) for n in (4, 5, 6, 7, 8, 4)]
    xs, ys = [r.unsqueeze(-1) for r in rows], [100 * i + r for i, r in enumerate(rows)]
    return bm.TaskBatch(
        bm.collate([x[:3] for x in xs], [y[:3] for y in ys], w=torch.arange(6.0).unsqueeze(-1)),
        bm.collate([x[3:] for x in xs], [y[3:] for y in ys], w=torch.arange(6.0).unsqueeze(-1)),
        task_id=torch.tensor([10, 11, 12, 13, 14, -1]),
        names=("a", "b", "c", "d", "e", "padding"),
        standardizer=bm.Standardizer(torch.zeros(1), torch.ones(1), torch.tensor(1.0), torch.tensor(2.0)),
    )


def test_fixed_tasks_are_cut_anew():
    tasks = FixedTasks(ragged_batch())
    assert tasks.num_tasks == 5, "padding is dropped"
    assert isinstance(tasks, bm.TaskDistribution)
    batch = tasks.sample(5, support=2, query=None, generator=3).check()
    assert batch.task_id.sort().values.tolist() == [10, 11, 12, 13, 14]
    assert batch.population == 5
    assert batch.standardizer is not None
    for i, name in enumerate(batch.names):
        task = "abcde".index(name)
        assert batch.task_id[i] == 10 + task
        assert batch.w[i] == task
        seen = torch.cat([batch.support.y[i], batch.query.y[i][batch.query.mask[i]]])
        assert seen.sort().values.tolist() == [100 * task + row for row in range(4 + task)], "each row once"
        assert torch.equal(seen % 100, torch.cat([batch.support.x[i, :, 0], batch.query.x[i, batch.query.mask[i], 0]]))
    again = tasks.sample(5, support=2, query=None, generator=4)
    assert not again.support.y.sort(0).values.equal(batch.support.y.sort(0).values)
    assert tasks.sample(3, support=1, query=2, generator=1).query.mask is None, "3 rows are left in each"
    assert tasks.sample(200, support=2, query=1).num_tasks == 200, "with replacement"


def test_every_row_is_as_likely_to_be_in_the_support():
    draws = FixedTasks(ragged_batch()).sample(5000, support=1, query=1, generator=0)
    rows = draws.support.x[:, 0, 0][draws.task_id == 12]
    counts = torch.bincount(rows.long(), minlength=6)
    n = len(rows)
    assert ((counts - n / 6).abs() < 5 * (n * 5 / 36) ** 0.5).all()


def test_fixed_tasks_as_given():
    given = ragged_batch()
    tasks = FixedTasks(given, split="given")
    for query in (5, None):
        batch = tasks.sample(5, support=3, query=query, generator=2)
        order = batch.task_id.argsort()
        assert batch.support.x[order].equal(given.support.x[:5])
        assert batch.query.y[order].equal(given.query.y[:5])
        assert batch.query.mask[order].equal(given.query.mask[:5])
    for support, query in ((2, 5), (3, 4)):
        with pytest.raises(errors.OptionError, match="the batch has 3 and 5"):
            tasks.sample(5, support=support, query=query)


def test_a_batch_without_ids_is_counted():
    batch = Sinusoid().sample(6, support=2, query=2)
    drawn = FixedTasks(batch).sample(6, support=2, query=2, generator=1)
    assert drawn.task_id.sort().values.tolist() == list(range(6))
    everything = batch.union().y
    for i, task in enumerate(drawn.task_id.tolist()):
        assert drawn.union().y[i].sort().values.equal(everything[task].sort().values)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: FixedTasks(ragged_batch(), split="random "), errors.OptionError, "split='random '"),
        (lambda: FixedTasks(ragged_batch().support), errors.DataError, "expected a TaskBatch"),
        (lambda: FixedTasks(ragged_batch()).sample(0, support=1, query=1), errors.OptionError, "num_tasks=0"),
        (lambda: FixedTasks(ragged_batch()).sample(2, support=-1, query=1), errors.OptionError, "support=-1"),
        (lambda: FixedTasks(ragged_batch()).sample(5, support=4, query=1), errors.EmptyTaskError, "Task 'a' has 4"),
    ],
)
def test_bad_batches_and_numbers_are_refused(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_a_batch_without_targets_or_with_nan_is_refused():
    batch = Sinusoid().sample(3, support=2, query=2)
    with pytest.raises(errors.DataError, match="without targets"):
        FixedTasks(bm.TaskBatch(batch.support, batch.query.with_y(None)))
    with pytest.raises(errors.NonFiniteDataError, match="task 0"):
        FixedTasks(bm.TaskBatch(batch.support, batch.query.with_y(batch.query.y * torch.nan)))
