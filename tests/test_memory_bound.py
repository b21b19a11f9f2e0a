"""memory= of fit: the chunk that it picks keeps a step within the bound, the next larger ones do not."""

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops.peak import PeakMemory
from bayesmeta.train import bounded
from bayesmeta.train.bounded import as_bytes, chunk_within
from bayesmeta.train.loop import Loop, Plan
from bayesmeta.train.validation import Validation
from tests.test_fit import same, state, train

KIB, MIB = 2**10, 2**20


def maml(steps=1, width=16, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(1, [width, width], 1, activation="tanh")
    return bm.MAML(bm.NeuralTaskModel(network, bm.Gaussian(0.5)), inner_steps=steps, inner_lr=0.01, **options)


# -- counting -----------------------------------------------------------------------------------------------------


def test_memory_is_counted_by_storage():
    before = torch.ones(1000)
    with PeakMemory() as memory:
        a = torch.ones(1000)
        assert memory.live == 4000
        view = a.view(10, 100)[2:]
        before.view(10, 100)  # of a tensor that was there before
        before.add_(1.0)
        assert memory.live == 4000
        b = view.double()
        assert memory.live == 4000 + 6400
        del a
        assert memory.live == 4000 + 6400, "the view keeps it"
        del view
        assert memory.live == 6400
        del b
        assert memory.live == 0
    assert memory.peak == 4000 + 6400
    assert torch.ones(10).sum() == 10, "nothing is counted outside"
    assert memory.peak == 4000 + 6400


def test_what_is_kept_for_the_way_back_is_counted():
    """A chain of tanh keeps each result: n + 1 of them when the last is there; under no_grad only two at a time."""
    x = torch.ones(1000, requires_grad=True)

    def peak(n):
        with PeakMemory() as memory:
            h = x
            for _ in range(n):
                h = h.tanh()
        return memory.peak

    assert [peak(n) for n in (3, 8)] == [3 * 4000, 8 * 4000]
    with torch.no_grad():
        assert peak(8) == 2 * 4000


# -- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measure",
    [
        lambda n: 1000 + 50 * n,
        lambda n: 1000 + 64 * -(-50 * n // 64),  # an allocator's steps
        lambda n: 1000 + n**1.5,
        lambda n: 5000 + 200 * n**0.5,
        lambda n: 1000 + 50 * n if n < 700 else float("inf"),
    ],
)
@pytest.mark.parametrize("memory", [1_100, 6_000, 11_111, 10**6])
def test_the_largest_chunk_that_fits(measure, memory):
    asked = []
    if measure(1) > memory:
        with pytest.raises(errors.OptionError, match="with one task at a time"):
            chunk_within(memory, 1000, measure)
        return
    found = chunk_within(memory, 1000, lambda n: (asked.append(n), measure(n))[1])
    best = max(n for n in range(1, 1001) if measure(n) <= memory)
    assert measure(found) <= memory
    assert found >= 0.9 * best
    assert len(asked) <= 14


def test_the_search_itself_stays_near_the_bound():
    """What few tasks take may be drawing the batch: a line from there would lead to the whole batch."""
    for memory in (5_050, 6_000, 11_111):
        asked = []
        found = chunk_within(memory, 10_000, lambda n, asked=asked: (asked.append(n), max(5000, 50 * n))[1])
        assert 0.9 * memory <= 50 * found <= memory
        assert max(asked) <= 4 * found, "measured, and so taken"
        assert len(asked) <= 20


def test_one_task():
    assert chunk_within(10, 1, lambda n: n) == 1
    with pytest.raises(errors.OptionError, match="takes more than there is with one task"):
        chunk_within(10, 5, lambda n: float("inf"))


@pytest.mark.parametrize(
    ("given", "size"),
    [(123, 123), ("2GiB", 2**31), ("500 MB", 500_000_000), ("1.5kib", 1536), ("7B", 7), (".5 TB", 5 * 10**11)],
)
def test_sizes(given, size):
    assert as_bytes(given) == size


@pytest.mark.parametrize("given", ["2", "GiB", "two GiB", "-1MB", "2 parsecs", 0, -5, 1.5, True, None, "0.1B"])
def test_sizes_that_are_none(given):
    with pytest.raises(errors.OptionError, match="memory="):
        as_bytes(given)


# -- fit ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def peaks(monkeypatch):
    """Peaks of the gradients of the steps that fit takes."""
    found, inner = [], Loop._gradient

    def measured(self):
        with PeakMemory() as memory:
            result = inner(self)
        found.append(memory.peak)
        return result

    monkeypatch.setattr(Loop, "_gradient", measured)
    return found


CASES = {
    "maml": (maml, {}),
    "abml": (
        lambda: bm.ABML(
            bm.NeuralTaskModel(bm.nets.mlp(1, [16], 1), bm.Gaussian(0.5)), inner_steps=2, inner_lr=1e-3, num_particles=3
        ),
        {},
    ),
    "last_layer": (
        lambda: bm.BayesianLastLayer(
            bm.NeuralTaskModel(bm.nets.mlp(1, [16, 16], 1), bm.Gaussian(0.5), task_modules="head")
        ),
        {},
    ),
    "accumulated": (maml, {"accumulate": 2}),
    "recomputed": (lambda: maml(6), {"checkpoint_inner": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_within_the_bound_and_uses_it(name, peaks):
    make, options = CASES[name]
    result = train(make(), 2, tasks_per_step=200, memory=MIB, **options)
    assert result.chunk is not None
    assert 5 < result.chunk < 200
    assert max(peaks) <= MIB
    peaks.clear()
    train(make(), 1, tasks_per_step=200, chunk=min(int(1.25 * result.chunk) + 2, 200), **options)
    assert max(peaks) > MIB, "control: a chunk that is a quarter larger does not fit"


def test_picking_leaves_no_trace():
    """The run is that of the chunk by number, to the bit; its loss counts calls and draws from torch's generator."""

    def make():
        method = maml()
        method.register_buffer("calls", torch.zeros(()))
        loss = method.loss
        method.loss = lambda *args, **options: (method.calls.add_(1), loss(*args, **options) + torch.rand(()))[1]
        return method

    picked, given = make(), make()
    before = torch.get_rng_state()
    first = train(picked, 3, tasks_per_step=50, memory=200 * KIB)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.chunk is not None
    second = train(given, 3, tasks_per_step=50, chunk=first.chunk)
    assert same(state(picked), state(given))
    assert first.history == second.history
    assert first.chunk == second.chunk
    assert picked.calls == 3 * -(-50 // first.chunk)


def test_a_large_bound_takes_whole_batches():
    picked, whole = maml(), maml()
    assert train(picked, 2, memory="1GiB").chunk is None
    assert train(whole, 2).chunk is None
    assert same(state(picked), state(whole))


def test_the_search_makes_no_piece_that_it_does_not_use(monkeypatch):
    """At one task a time 10,000 pieces were 25 MiB of small blocks, which the heap kept for the whole run."""
    made, inner = [], bm.TaskBatch.tasks
    monkeypatch.setattr(bm.TaskBatch, "tasks", lambda self, index: (made.append(index), inner(self, index))[1])
    loop = next_loop(10_000)
    assert bounded.bound_memory(loop, "12MiB") is not None
    assert 2 <= len(made) <= 2 * 14
    made.clear()
    loop.sample(torch.Generator().manual_seed(0)).split(1)
    assert len(made) == 10_000, "control: what a split makes is seen"


def next_loop(tasks):
    loop = Loop(
        maml(width=8),
        bm.tasks.Sinusoid(),
        Plan(tasks, 5, 5, 0),
        Validation(None, every=1, patience=None, min_delta=0.0, chunk=None, score=None),
        torch.device("cpu"),
        None,
    )
    loop.set_up(lambda parameters: torch.optim.Adam(parameters, 1e-3), None)
    return loop


def test_ten_thousand_tasks(peaks):
    result = train(maml(width=8), 1, tasks_per_step=10_000, memory="12MiB")
    assert max(peaks) <= 12 * MIB
    assert 100 < result.chunk < 10_000


def test_fifty_inner_steps_take_fewer_tasks_at_a_time_unless_recomputed(peaks):
    kept = train(maml(50, width=8), 1, tasks_per_step=40, memory=MIB)
    again = train(maml(50, width=8), 1, tasks_per_step=40, memory=MIB, checkpoint_inner=True)
    assert max(peaks) <= MIB
    assert kept.chunk < 0.5 * (again.chunk or 40)


def test_bounds_that_cannot_be_met_or_read():
    with pytest.raises(errors.OptionError, match=r"with one task at a time \(of which the 30 tasks"):
        train(maml(), 1, tasks_per_step=30, memory="4KiB")
    with pytest.raises(errors.OptionError, match="picks the chunk, and chunk=5 is given too"):
        train(maml(), 1, memory="1GiB", chunk=5)
    with pytest.raises(errors.OptionError, match="expected bytes as a whole number"):
        train(maml(), 1, memory="lots")


def test_a_resumed_run_has_the_same_chunk(tmp_path):
    straight, stopped = maml(), maml()
    options = {"tasks_per_step": 50, "memory": 200 * KIB}
    train(straight, 4, **options)
    first = train(stopped, 2, out=tmp_path / "run", **options)
    again = maml()
    second = train(again, 4, out=tmp_path / "run", resume=True, **options)
    assert first.chunk == second.chunk
    assert same(state(straight), state(again))
    with pytest.raises(errors.CheckpointError, match="had chunk"):
        train(maml(), 5, out=tmp_path / "run", resume=True, **options | {"memory": 100 * KIB})
