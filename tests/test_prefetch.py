"""Batches drawn ahead: the same whoever draws them, none twice, and processes that come and go cleanly."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import DataError, OptionError, WorkerError
from bayesmeta.tasks import Prefetch, prefetch
from tests.test_compile import off


class Marked:
    """Tasks of random numbers, and beside them which process drew them."""

    num_tasks = None

    def sample(self, num_tasks, *, support, query, generator=None):
        x = torch.rand(num_tasks, support + query, 2, generator=generator)
        x[..., 1] = os.getpid()
        parts = [bm.Observations(v, v[..., 0]) for v in (x[:, :support], x[:, support:])]
        return bm.TaskBatch(*parts)


class Fails(Marked):
    """At some draws, as ``how`` says."""

    def __init__(self, how, share=0.3):
        self.how, self.share = how, share

    def sample(self, num_tasks, *, support, query, generator=None):
        batch = super().sample(num_tasks, support=support, query=query, generator=generator)
        if float(batch.support.y[0, 0]) < self.share and os.getpid() != MAIN:
            if self.how == "exit":
                os._exit(3)
            raise DataError("bad data") if self.how == "typed" else ZeroDivisionError("nothing to divide")
        return batch


MAIN = os.getpid()


def draw(tasks, batches=6, seed=0, between=None, **options):
    """Some batches of one generator; ``between`` uses the generator for something else."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    with Prefetch(tasks, **options) as ahead:
        for i in range(batches):
            found.append(ahead.sample(3, support=2, query=2, generator=generator))
            if between:
                between(i, generator)
    return found


def many(ahead, generator):
    for _ in range(60):
        ahead.sample(3, support=2, query=2, generator=generator)


def values(batches):
    return torch.stack([torch.cat([b.support.y, b.query.y], -1) for b in batches])


def workers_of(batches):
    return {int(p) for b in batches for p in b.support.x[..., 1].unique().tolist()}


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 3}, {"workers": 2, "ahead": 1}])
def test_the_number_of_workers_changes_no_bit(options):
    ours, theirs = draw(Marked(), **options), draw(Marked(), workers=0)
    assert torch.equal(values(ours), values(theirs))
    assert not torch.equal(values(ours), values(draw(Marked(), seed=1, workers=0)))
    assert len(workers_of(ours) - {MAIN}) in range(1, options["workers"] + 1)  # they did draw
    assert workers_of(theirs) == {MAIN}


def test_no_two_batches_or_workers_share_numbers():
    batches = draw(Marked(), batches=40, workers=3)
    assert len(workers_of(batches)) > 2
    numbers = values(batches).flatten()
    assert len(numbers.unique()) == len(numbers)  # of 480 floats of 24 bits: chance 0.7%, and the seed is fixed
    again = torch.cat([numbers, values(batches[:1]).flatten()])
    assert len(again.unique()) < len(again)  # a control


def test_what_was_drawn_ahead_is_dropped_when_the_generator_was_used():
    def noise(i, generator):
        if i in (2, 4):
            torch.randn(7, generator=generator)

    ours, theirs = (draw(Marked(), batches=8, between=noise, workers=w) for w in (2, 0))
    assert torch.equal(values(ours), values(theirs))
    assert not torch.equal(values(ours), values(draw(Marked(), batches=8, workers=2)))


def test_ahead_is_what_it_says():
    generator = torch.Generator().manual_seed(0)
    with Prefetch(Marked(), workers=1, ahead=3) as ahead:
        ahead.sample(2, support=2, query=2, generator=generator)
        assert not ahead._drawn  # one batch alone, as for validation, begins nothing
        assert ahead._pool is None
        for _ in range(3):
            ahead.sample(2, support=2, query=2, generator=generator)
            assert len(ahead._drawn) == 3
        ahead.sample(2, support=2, query=3, generator=generator)  # another request
        assert not ahead._drawn


def test_the_same_state_gives_the_same_batch_again():
    """As when a compiled step has to be made again; also later, and in another object."""
    generator = torch.Generator().manual_seed(0)
    with Prefetch(Marked(), workers=1) as ahead:
        ahead.sample(2, support=2, query=2, generator=generator)
        state = generator.get_state()
        first = ahead.sample(2, support=2, query=2, generator=generator)
        generator.set_state(state)
        assert ahead.sample(2, support=2, query=2, generator=generator) is first
        ahead.sample(2, support=2, query=2, generator=generator)
        for other in (ahead, pickle.loads(pickle.dumps(ahead))):
            generator.set_state(state)
            again = other.sample(2, support=2, query=2, generator=generator)
            assert torch.equal(again.support.y, first.support.y)
        assert other._pool is None


def test_it_is_a_task_distribution():
    table = bm.tasks.fertility()
    ahead = Prefetch(table, workers=0)
    assert isinstance(ahead, bm.TaskDistribution)
    assert ahead.num_tasks == table.num_tasks
    batch = ahead.sample(3, support=4, generator=0)
    assert len(batch.names) == 3
    assert "workers=0" in repr(ahead)


# -- runs ---------------------------------------------------------------------------------------------------------


def run(tasks, steps=6, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = bm.nets.mlp(1, [8], 1)
    method = bm.ABML(bm.NeuralTaskModel(network, bm.Gaussian(0.5), "normal"), num_particles=2, inner_steps=1)
    defaults = {"tasks_per_step": 4, "support": 3, "query": 3, "progress": False, "device": "cpu", "log_every": 1}
    result = bm.fit(method, tasks, steps=steps, **(defaults | options))
    return result, torch.cat([p.detach().flatten() for p in method.parameters()])


def test_runs_with_and_without_workers_and_resumed_are_the_same(tmp_path):
    """With a method that draws noise of its own, which must not take the seeds of the batches ahead."""
    tasks = bm.tasks.Sinusoid(noise=0.1)
    _, expected = run(Prefetch(tasks, workers=0))
    with Prefetch(tasks, workers=2) as ahead:
        _, ours = run(ahead)
        assert len(ahead._drawn) == 4  # up to the end nothing was dropped
        assert torch.equal(ours, expected)
        run(ahead, steps=3, out=tmp_path / "run")
    with Prefetch(tasks, workers=1, ahead=5) as ahead:
        _, resumed = run(ahead, out=tmp_path / "run", resume=True)
    assert torch.equal(resumed, expected)
    _, other = run(Prefetch(tasks, workers=0), seed=1)
    assert not torch.equal(other, expected)


def test_a_run_does_not_go_on_without(tmp_path):
    tasks = bm.tasks.Sinusoid(noise=0.1)
    run(Prefetch(tasks, workers=0), steps=2, out=tmp_path / "run")
    with pytest.raises(bm.errors.CheckpointError, match="draws_ahead"):
        run(tasks, out=tmp_path / "run", resume=True)


def test_compiled_steps_take_what_was_drawn_ahead(monkeypatch):
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs: graph)
    tasks = bm.tasks.Sinusoid(noise=0.1)
    with Prefetch(tasks, workers=1) as ahead:
        result, ours = run(ahead, compile="inductor", dtype=torch.float64)
    assert "tasks drawn before" in result.compiled
    _, theirs = run(Prefetch(tasks, workers=0), dtype=torch.float64)
    assert off(ours, theirs) < 1e-12


# -- processes ----------------------------------------------------------------------------------------------------


def alive(pids):
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}") and "Z" not in _state(pid)]


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def busy(**options):
    """With workers that have begun."""
    ahead, generator = Prefetch(Marked(), workers=2, **options), torch.Generator().manual_seed(0)
    for _ in range(3):
        ahead.sample(2, support=2, query=2, generator=generator)
    return ahead, list(ahead._pool._processes)


def test_no_process_is_left_behind():
    ahead, pids = busy()
    assert len(alive(pids)) == 2
    ahead.close()
    assert not alive(pids)
    ahead.close()  # again does nothing
    ahead, pids = busy()
    del ahead
    gc.collect()
    assert wait_for(lambda: not alive(pids))


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("exit", WorkerError, r"Batch \d+ \(tasks.sample\(3, support=2.*manual_seed\(\d+\).*process died"),
        ("error", WorkerError, r"Batch \d+ .*manual_seed\(\d+\).*ZeroDivisionError in a worker: nothing to divide"),
        ("typed", DataError, "^bad data$"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_a_typed_error(how, error, words):
    generator = torch.Generator().manual_seed(0)
    with Prefetch(Fails(how), workers=2) as ahead:
        with pytest.raises(error, match=words):
            many(ahead, generator)
        ahead.tasks.share = 0.0
        ahead.close()  # new workers, with the tasks as they are now
        batches = [ahead.sample(3, support=2, query=2, generator=generator) for _ in range(4)]
    assert len(workers_of(batches) - {MAIN}) >= 1


def test_a_failed_batch_can_be_drawn_again_by_what_the_message_says():
    generator = torch.Generator().manual_seed(0)
    with Prefetch(Fails("error"), workers=1) as ahead, pytest.raises(WorkerError) as caught:
        many(ahead, generator)
    seed = int(str(caught.value).split("manual_seed(")[1].split(")")[0])
    batch = Marked().sample(3, support=2, query=2, generator=torch.Generator().manual_seed(seed))
    assert float(batch.support.y[0, 0]) < 0.3


def test_after_a_crash_the_next_call_begins_anew():
    generator = torch.Generator().manual_seed(0)
    with Prefetch(Fails("exit"), workers=1) as ahead:
        failed = 0
        for _ in range(30):
            try:
                ahead.sample(3, support=2, query=2, generator=generator)
            except WorkerError:
                failed += 1
        assert 0 < failed < 30


SCRIPT = """
import os, signal, sys, time, torch
import bayesmeta as bm
torch.set_num_threads(1)
tasks = bm.tasks.Sinusoid(noise=0.1)
method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5)))
ahead = bm.tasks.Prefetch(tasks, workers=2)
generator = torch.Generator().manual_seed(0)
for _ in range(3):
    ahead.sample(2, support=2, query=2, generator=generator)
print(*ahead._pool._processes, flush=True)
bm.fit(method, ahead, steps=10**6, tasks_per_step=2, support=2, query=2, progress=False, device="cpu", out=sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_signals_leave_no_process_behind(how, tmp_path):
    """Ctrl-C goes to all processes of a terminal: the run finishes its step, and the workers go with it."""
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    wait_for(lambda: (tmp_path / "run").exists(), 60)
    time.sleep(1.0)
    assert len(alive(pids)) == 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    code = process.wait(timeout=60)
    process.stdout.close()
    assert wait_for(lambda: not alive(pids), 10)
    text = (tmp_path / "errors").read_text()
    if how == signal.SIGINT:
        assert code != 0
        assert "WorkerError" not in text
        assert (tmp_path / "run" / "last.pt").exists() or list((tmp_path / "run").glob("*.pt"))
    if how == signal.SIGTERM:
        assert code == 143


@pytest.mark.slow
def test_spawned_workers_draw_the_same():
    ours, theirs = draw(bm.tasks.Sinusoid(), workers=1, start="spawn"), draw(bm.tasks.Sinusoid(), workers=0)
    assert torch.equal(values(ours), values(theirs))


# -- a GPU --------------------------------------------------------------------------------------------------------


def test_batches_for_a_gpu_are_pinned_ahead(monkeypatch):
    """With a stand-in for the GPU: what was drawn ahead goes through pinned memory, and nothing else does."""
    seen = []
    monkeypatch.setattr(prefetch, "pinned", lambda batch: seen.append(batch) or batch)
    with Prefetch(Marked(), workers=1) as ahead:
        request, gpu = prefetch._Request(2, 2, 2), torch.device("cuda")
        future = ahead._submit(request, 5, gpu)
        batch = future.result(timeout=30)
        assert seen == [batch]
        assert torch.equal(batch.support.y, prefetch._draw(Marked(), request, 5).support.y)
        ahead._submit(request, 6, torch.device("cpu")).result(timeout=30)
        ahead.pin_memory = False
        ahead._submit(request, 7, gpu).result(timeout=30)
        assert len(seen) == 1


def test_each_tensor_of_a_batch_is_moved():
    batch = bm.tasks.fertility_split(0).train.sample(3, support=4, query=None, generator=0)
    moved = prefetch._moved(batch, torch.device("meta"))
    tensors = [*vars(moved.support).values(), *vars(moved.query).values(), moved.task_id, moved.standardizer.x_mean]
    assert {t.device.type for t in tensors if t is not None} == {"meta"}
    assert moved.names == batch.names
    assert moved.standardizer.schema == batch.standardizer.schema


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    with Prefetch(Marked(), workers=2) as ahead:
        ours = [ahead.sample(3, support=2, query=2, generator=generator) for _ in range(6)]
    generator.manual_seed(0)
    none = Prefetch(Marked(), workers=0)
    theirs = [none.sample(3, support=2, query=2, generator=generator) for _ in range(6)]
    assert values(ours).device.type == "cuda"
    assert torch.equal(values(ours), values(theirs))


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": 3}, "tasks is a int"),
        ({"workers": -1}, "workers=-1"),
        ({"workers": True}, "workers=True"),
        ({"ahead": 0}, "ahead=0"),
        ({"start": "thread"}, "'thread'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(OptionError, match=words):
        Prefetch(**({"tasks": Marked()} | options))
