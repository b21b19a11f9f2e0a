"""Batches of any shape padded to a few: the least padding, the same numbers, few graphs."""

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import CompileWarning, UnsupportedError
from bayesmeta.train.compilation import buckets as room
from bayesmeta.train.compilation.buckets import Buckets, Shape, choose, difference, fitting, pad_tasks
from bayesmeta.train.compilation.compiling import MOST_GRAPHS
from tests.test_compile import off
from tests.test_contract import METHODS, on_network, ragged_batch, sinusoids, stir

F64 = torch.float64


@pytest.fixture
def uncompiled(monkeypatch):
    """The captured graph as it is: all but the compiler, in a hundredth of its time."""
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs: graph)


# -- which buckets ------------------------------------------------------------------------------------------------


def padded_size(sizes, buckets):
    return sum(min(b for b in buckets if b >= size) for size in sizes)


@pytest.mark.parametrize("most", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_buckets_pad_less(most, seed):
    """Beside all choices of so many buckets among the sizes; the middle of them is worse."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 40, (14,), generator=generator).tolist()
    found = choose(sizes, most, waste=0.0)
    distinct = sorted(set(sizes))
    least = min(padded_size(sizes, (*some, distinct[-1])) for some in itertools.combinations(distinct[:-1], most - 1))
    assert len(found) == most
    assert padded_size(sizes, found) == least
    if most == 2:
        assert padded_size(sizes, [distinct[0], distinct[-1]]) > least  # a control


def test_few_buckets_where_they_do():
    assert choose([40, 40, 41, 42], 4) == [42]
    assert choose([3, 3, 3, 40], 4) == [3, 40]
    assert choose([7], 4) == [7]
    assert choose([1, 10, 100, 1000], 2) == [100, 1000]


def test_lengths_beyond_those_seen_come_to_few_more():
    assert [fitting(size, [4, 10]) for size in (1, 4, 5, 10)] == [4, 4, 10, 10]
    beyond = sorted({fitting(size, [4, 10]) for size in range(11, 101)})
    assert len(beyond) == 11  # log(100 / 10) / log(1.25), rounded up
    assert all(fitting(size, [4, 10]) >= size for size in range(1, 200))
    assert all(fitting(size, [0]) >= size for size in range(1, 20))


# -- padding ------------------------------------------------------------------------------------------------------


def test_padding_is_masked_copies():
    batch = ragged_batch()
    shapes = [Shape.of(batch), Shape(5, 9, 7, (False, False)), Shape(7, 4, 5, (True, False))]
    found = Buckets(shapes, 1)
    padded = found.pad(batch)
    assert found.most == 1
    assert Shape.of(padded) == Shape(7, 9, 7, (True, True))
    for part, like in ((padded.support, batch.support), (padded.query, batch.query)):
        assert torch.equal(part.counts()[:5], like.counts())
        assert torch.equal(part.x[:5, : like.shots], like.x)
        assert torch.equal(part.x[:5, like.shots :], like.x[:, :1].expand_as(part.x[:5, like.shots :]))
        assert not part.mask[:5, like.shots :].any()
    assert padded.task_id.tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert padded.check() is padded
    assert torch.equal(padded.without_padding().support.y, padded.support.y[:5])


def test_batches_that_are_alike_stay_as_they_are():
    batch = sinusoids()
    found = Buckets([Shape.of(batch)] * 3, 4)
    assert found.pad(batch).query.x is batch.query.x
    assert found.pad(batch).support.mask is None
    assert found.pad(batch).task_id is None


def test_padding_tasks_keep_their_ids():
    batch = bm.tasks.FixedTasks(sinusoids(9)).sample(4, support=3, query=3, generator=0)
    assert pad_tasks(batch, 6).task_id.tolist() == [*batch.task_id.tolist(), -1, -1]


# -- every method -------------------------------------------------------------------------------------------------

#: they draw a number for each observation of a batch: their noise would be another
NOISE_OF_POINTS = ("abml_local", "mr_maml_activations", "mr_neural_process")


def harm(name, batch, padded):
    method = on_network(name, F64)
    method.prepare(batch)
    stir(method, batch)
    generator = torch.Generator().manual_seed(3)

    def lose(one):
        loss = method.loss(one, generator=generator)
        return loss, loss

    parameters = [p for p in method.parameters() if p.requires_grad]
    return difference(lose, batch, padded, parameters, [generator, torch.default_generator])


@pytest.mark.parametrize("name", METHODS)
def test_padded_shots_change_neither_loss_nor_gradient(name):
    """Of a ragged batch; or the method is known to mind."""
    batch = ragged_batch()
    shapes = [Shape.of(batch), Shape(5, 9, 8, (True, True))]
    reason = harm(name, batch, Buckets(shapes, 1).pad(batch))
    if name in NOISE_OF_POINTS:
        assert "noise for each observation" in reason
    else:
        assert reason is None


@pytest.mark.parametrize("name", ["maml", "last_layer", "deep_kernel", "amortised", "reptile", "abml", "versa"])
def test_padding_tasks(name):
    """Harmless but for methods that draw noise for each task, which are found out."""
    batch = ragged_batch()
    reason = harm(name, batch, pad_tasks(batch, 8))
    assert (reason is None) == (name in ("maml", "last_layer", "deep_kernel", "reptile"))


def test_a_loss_that_minds_padding_is_found_out():
    """A mean over all rows, masked or not; and one that reads what is there."""
    batch, weight = ragged_batch(), torch.ones((), dtype=F64, requires_grad=True)
    padded = Buckets([Shape.of(batch), Shape(5, 9, 8, (True, True))], 1).pad(batch)
    careful = lambda b: (weight * b.query.x[b.query.mask].mean(),) * 2  # noqa: E731
    careless = lambda b: (weight * b.query.x.mean(),) * 2  # noqa: E731
    assert difference(careful, batch, padded, [weight], []) is None
    assert "padding moves the loss" in difference(careless, batch, padded, [weight], [])


# -- runs ---------------------------------------------------------------------------------------------------------


class Ragged:
    """Sinusoids whose query, and on demand support and number of tasks, differ from step to step."""

    num_tasks = None

    def __init__(self, support=False, tasks=False):
        self.support, self.tasks = support, tasks

    def sample(self, num_tasks, *, support, query, generator=None):
        pick = torch.randint(1000, (3,), generator=generator).tolist()
        more = pick[1] % 5 if self.support else 0
        fewer = pick[2] % 2 if self.tasks else 0
        points = bm.tasks.Sinusoid(noise=0.1)
        batch = points.sample(num_tasks - fewer, support=support + more, query=2 + pick[0] % 13, generator=generator)
        real = torch.arange(batch.query.shots) < torch.randint(1, 15, (batch.num_tasks, 1), generator=generator)
        query = bm.Observations(batch.query.x, batch.query.y, real) if pick[0] % 3 else batch.query
        return bm.TaskBatch(batch.support, query)


def run(name, tasks, **options):
    method = on_network(name, F64)
    defaults = {"steps": 9, "tasks_per_step": 4, "progress": False, "device": "cpu", "log_every": 1, "dtype": F64}
    result = bm.fit(method, tasks, **(defaults | options))
    return result, torch.cat([p.detach().flatten() for p in method.parameters()])


@pytest.fixture
def compilers(monkeypatch):
    """The compilers of the runs in the test."""
    from bayesmeta.train import fit

    made = []

    class Remembered(fit.Compiler):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(fit, "Compiler", Remembered)
    return made


def fertility_table():
    return bm.tasks.fertility_split(0).train


CASES = {
    "query": ("maml", Ragged, {}),
    "query and support": ("maml", lambda: Ragged(support=True), {}),
    "tasks too": ("maml", lambda: Ragged(support=True, tasks=True), {}),
    "tasks of their own": ("mr_maml_weights", lambda: Ragged(tasks=True), {}),
    "closed form": ("last_layer", Ragged, {}),
    "random contexts": ("conditional_neural_process", Ragged, {}),
    "a table": ("maml", fertility_table, {"query": None, "tasks_per_step": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_ragged_run_is_that_of_eager_steps_with_few_graphs(case, compilers, uncompiled):
    name, tasks, options = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if case != "tasks of their own" else "ignore", CompileWarning)
        found, ours = run(name, tasks(), compile="inductor", **options)
    expected, theirs = run(name, tasks(), **options)
    compiler = compilers[0]
    assert off(ours, theirs) < 1e-10
    assert [e["loss"] for e in found.history] == pytest.approx([e["loss"] for e in expected.history], rel=1e-10)
    assert compiler._made == 8  # all steps but the first
    assert len(compiler.graphs) <= MOST_GRAPHS
    assert len(compiler.graphs) <= compiler.buckets.most * (2 if case == "tasks of their own" else 1)
    assert 1 <= compiler.buckets.most <= MOST_GRAPHS


def test_without_buckets_the_same_run_is_mostly_eager(compilers, uncompiled, monkeypatch):
    """The control of the test above: the shapes do differ."""
    monkeypatch.setattr("bayesmeta.train.compilation.compiling.learn", lambda *given: (Buckets(), None))
    monkeypatch.setattr("bayesmeta.train.compilation.compiling.MOST_GRAPHS", 2)
    run("maml", Ragged(), compile="inductor")
    assert len(compilers[0].graphs) == 2
    assert compilers[0]._made < 8


def test_noise_of_points_is_said_and_the_run_is_still_that_of_eager_steps(compilers, uncompiled):
    with pytest.warns(CompileWarning, match="not all that differs.*noise for each observation"):
        _, ours = run("mr_maml_activations", Ragged(), compile="inductor", steps=3)
    _, theirs = run("mr_maml_activations", Ragged(), steps=3)
    assert off(ours, theirs) < 1e-10
    assert not compilers[0].buckets.sizes


def test_a_method_that_refuses_masks_is_said(uncompiled):
    class Refuses(bm.MAML):
        def _task_loss(self, batch, theta, generator):
            if batch.query.mask is not None:
                raise UnsupportedError("no masks here")
            return super()._task_loss(batch, theta, generator)

    class Whole(Ragged):
        def sample(self, num_tasks, **options):
            batch = super().sample(num_tasks, **options)
            return bm.TaskBatch(batch.support, bm.Observations(batch.query.x, batch.query.y))

    model = on_network("maml", F64).program
    with pytest.warns(CompileWarning, match="no masks here"):
        bm.fit(Refuses(model), Whole(), steps=4, progress=False, device="cpu", dtype=F64, compile="inductor")


@pytest.mark.parametrize(("name", "varies"), [("abml", False), ("abml", True), ("maml", True)])
def test_looking_at_batches_moves_nothing(name, varies):
    """Neither the generator nor the noise; and where padding tasks would do harm, shots alone are padded."""
    method, tasks = on_network(name, F64), Ragged(tasks=varies)
    generator = torch.Generator().manual_seed(1)

    def sample(other):
        return tasks.sample(4, support=3, query=3, generator=other).to(dtype=F64)

    method.prepare(sample(generator))
    state, shared = generator.get_state(), torch.get_rng_state()
    loop = SimpleNamespace(
        device=torch.device("cpu"),
        plan=SimpleNamespace(seed=0),
        sample=sample,
        generator=generator,
        noise=generator,
        method=method,
        parameters=[p for p in method.parameters() if p.requires_grad],
    )
    found, reason = room.learn(loop, lambda b: (method.loss(b, generator=generator),) * 2, MOST_GRAPHS)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), shared)
    assert "query" in found.sizes
    assert ("tasks" in found.sizes) == (varies and name == "maml")
    assert (reason is not None) == (varies and name == "abml")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_compiled_by_inductor(dtype, compilers):
    options = {"query": None, "tasks_per_step": 2, "dtype": dtype, "steps": 30}
    _, ours = run("maml", fertility_table(), compile="inductor", **options)
    _, theirs = run("maml", fertility_table(), **options)
    assert compilers[0]._made == 29
    assert off(ours, theirs) < (1e-4 if dtype == torch.float32 else 1e-10)
