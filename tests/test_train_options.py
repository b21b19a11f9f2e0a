"""Accumulated and chunked gradients against the whole batch; validation in pieces, by a score, with patience; speed."""

import json
import time
import weakref
from dataclasses import replace

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.train import checkpoint
from tests.test_fit import TASKS, VALIDATION, make, same, state, train

DOUBLE = {"dtype": torch.float64, "device": "cpu", "progress": False, "log_every": 1}


def batch(num_tasks, seed, padding=0):
    """Tasks of which the last are padding."""
    drawn = TASKS.sample(num_tasks, support=10, query=10, generator=seed).to(dtype=torch.float64)
    task_id = torch.arange(num_tasks)
    task_id[num_tasks - padding :] = -1
    return replace(drawn, task_id=task_id) if padding else drawn


class Replay:
    """Hands out given batches, round and round; the first call, from which fit takes shapes, does not count."""

    num_tasks = None

    def __init__(self, *batches):
        self.batches, self.calls = batches, -1

    def sample(self, num_tasks, *, support, query, generator=None):
        self.calls += 1
        return self.batches[max(self.calls - 1, 0) % len(self.batches)]


def fitted(*batches, steps=4, rate=1e-2, optimizer=torch.optim.SGD, **options):
    """θ after some steps, and the history."""
    method = make()
    result = bm.fit(method, Replay(*batches), steps=steps, optimizer=lambda p: optimizer(p, rate), **DOUBLE, **options)
    return method.program.prior.loc.detach(), result.history


def close(a, b):
    return torch.allclose(a, b, rtol=1e-11, atol=1e-12)


PARTS = {
    "equal": [batch(4, 1), batch(4, 2), batch(4, 3)],
    "unequal": [batch(4, 1), batch(7, 2), batch(1, 3)],
    "padded": [batch(4, 1, padding=2), batch(7, 2), batch(3, 3, padding=1)],
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_accumulated_batches_are_one_large_batch(kind, optimizer):
    parts = PARTS[kind]
    whole, expected = fitted(bm.concatenate(parts), optimizer=optimizer)
    ours, history = fitted(*parts, accumulate=3, optimizer=optimizer)
    assert close(ours, whole)
    for one, other in zip(history, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-10)
    # control: another part left out, and no accumulation at all
    assert not close(fitted(*parts[:2], accumulate=2, optimizer=optimizer)[0], whole)
    assert not close(fitted(*parts, optimizer=optimizer)[0], whole)


def test_gradients_are_averaged_over_tasks_and_not_summed():
    """One step of SGD, against the gradients of the parts put together by hand."""
    parts, rate = PARTS["padded"], 1e-2
    start = make().program.prior.loc.detach().double()
    ours = (start - fitted(*parts, steps=1, rate=rate, accumulate=3)[0]) / rate
    gradients = []
    for part in parts:
        method = make().to(torch.float64)
        method.loss(part, generator=0).backward()
        gradients.append(method.program.prior.loc.grad)
    counts = [2, 7, 2]
    weighted = sum(n * g for n, g in zip(counts, gradients, strict=True)) / sum(counts)
    # (θ − θ′)/rate loses digits: |θ| · 1e-16 / 1e-2
    torch.testing.assert_close(ours, weighted, rtol=1e-9, atol=1e-12)
    for wrong in (sum(gradients), sum(gradients) / 3):
        assert (ours - wrong).abs().max() > 0.01 * ours.abs().max()


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 11, 100])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_chunked_batch_is_the_whole_batch(chunk, padding):
    large = batch(11, 4, padding)
    assert close(fitted(large, chunk=chunk)[0], fitted(large)[0])


def test_chunks_are_weighted_by_their_tasks():
    """Control: with the plain mean of chunks of 4, 4 and 3 tasks the gradient would be another."""
    large, rate = batch(11, 4), 1e-2
    start = make().program.prior.loc.detach().double()
    ours = (start - fitted(large, steps=1, rate=rate, chunk=4)[0]) / rate
    gradients = []
    for part in large.split(4):
        method = make().to(torch.float64)
        method.loss(part, generator=0).backward()
        gradients.append(method.program.prior.loc.grad)
    assert (ours - sum(gradients) / 3).abs().max() > 1e-3 * ours.abs().max()


def test_accumulation_and_chunks_together():
    whole = fitted(bm.concatenate(PARTS["padded"]), clip=1.0)[0]
    assert close(fitted(*PARTS["padded"], accumulate=3, chunk=2, clip=1.0)[0], whole)


class Watched(torch.nn.Module):
    """Counts how many graphs of earlier losses are alive when the next loss is asked for."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.ones(3))
        self.alive, self.most, self.sizes = [], 0, []

    def prepare(self, batch):
        pass

    def loss(self, batch, *, generator=None):
        self.sizes.append(batch.num_tasks)
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        inner = self.x.exp()  # its backward saves the result
        self.alive.append(weakref.ref(inner))
        return inner.square().sum()


def test_only_one_piece_is_in_memory():
    method = Watched()
    train(method, 3, accumulate=4, chunk=3)
    assert method.sizes == [3, 3, 2] * 12
    assert method.most == 0
    total = Watched()  # control: all pieces added up before one backward are all alive
    sum(total.loss(piece) for piece in batch(12, 1).split(3)).backward()
    assert total.most == 3


@pytest.mark.parametrize("kind", ["maml", "last_layer", "abml"])
def test_a_resumed_run_in_pieces_is_bit_identical(kind, tmp_path):
    options = {"accumulate": 2, "chunk": 3, "checkpoint_every": 10}
    whole, half, resumed = make(kind), make(kind), make(kind)
    train(whole, 20, **options)
    train(half, 10, out=tmp_path, **options)
    train(resumed, 20, out=tmp_path, resume=True, **options)
    assert same(state(whole), state(resumed))
    for name, value in (("accumulate", 1), ("chunk", None)):
        with pytest.raises(errors.CheckpointError, match=f"had {name} = "):
            train(make(kind), 30, out=tmp_path, resume=True, **(options | {name: value}))


def test_a_step_that_draws_only_padding_says_so():
    with pytest.raises(errors.EmptyTaskError, match="step 2"):
        fitted(batch(4, 1), replace(batch(4, 1), task_id=torch.full((4,), -1)), chunk=2)


def test_a_piece_that_is_not_finite_stops_the_step():
    class Bad(Watched):
        def loss(self, batch, *, generator=None):
            return super().loss(batch) / (0.0 if len(self.sizes) == 2 else 1.0)

    method = Bad()
    with pytest.raises(errors.NonFiniteLossError, match="step 1"):
        train(method, 3, accumulate=3)
    assert torch.equal(method.x, torch.ones(3))
    assert len(method.sizes) == 3  # one look at the end of the step, after all pieces


# -- validation ---------------------------------------------------------------------------------------------------


def validations(method=None, steps=6, **options):
    result = train(method or make(), steps, dtype=torch.float64, validate_every=2, **options)
    return [h["validation"] for h in result.history if "validation" in h]


def test_validation_in_pieces_is_validation_on_the_whole():
    parts = [batch(4, 1, padding=1), batch(7, 2), batch(2, 3, padding=1)]
    whole = validations(validation=bm.concatenate(parts))
    assert len(whole) == 3
    for options in (
        {"validation": parts},
        {"validation": tuple(parts), "validation_chunk": 3},
        {"validation": bm.concatenate(parts), "validation_chunk": 4},
    ):
        assert validations(**options) == pytest.approx(whole, rel=1e-12)
    # control: the plain mean of the parts is another number
    separate = [validations(validation=part) for part in parts]
    assert [sum(v) / 3 for v in zip(*separate, strict=True)] != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("kind", ["last_layer", "abml"])
def test_one_chunk_changes_nothing_and_smaller_ones_bound_the_batch(kind):
    plain = validations(make(kind), validation=VALIDATION)
    assert validations(make(kind), validation=VALIDATION, validation_chunk=10) == plain
    sizes = []

    def score(method, batch, generator):
        sizes.append(batch.num_tasks)
        return method.loss(batch, generator=generator).detach()

    validations(make(kind), validation=VALIDATION, validation_chunk=4, validate_with=score)
    assert sizes == [4, 4, 2] * 3


def test_a_score_of_ones_own_chooses_theta():
    def squared_error(method, batch, generator):
        assert not method.training
        mean = method.adapt(batch.support, generator=generator).predictive(batch.query).mean
        return (mean - batch.query.y).square().mean()

    method = make("last_layer")
    result = train(method, 60, validation=VALIDATION, validate_every=10, validate_with=squared_error)
    assert method.training
    found = [h["validation"] for h in result.history if "validation" in h]
    assert result.best_validation == min(found) > 0
    method.eval()
    assert squared_error(method, VALIDATION, 0).item() == pytest.approx(result.best_validation, rel=1e-6)
    loss = train(make("last_layer"), 60, validation=VALIDATION, validate_every=10)
    assert loss.best_validation != pytest.approx(result.best_validation, rel=0.1)


class Scripted:
    """Scores read from a list."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, method, batch, generator):
        return self.values.pop(0)


def scripted(values, steps=50, **options):
    options = {"validation": VALIDATION, "validate_every": 1, "validate_with": Scripted(*values)} | options
    return train(make(), steps, **options)


def test_small_falls_add_up_to_one_that_counts():
    values = [10.0, 9.6, 9.2, 8.9, 8.8, 8.7, 8.6, 0.0]
    result = scripted(values, patience=3, min_delta=1.0)
    assert (result.steps, result.best_step, result.best_validation) == (7, 7, 8.6)
    # control: one after the other none of the falls is large enough
    assert scripted(values, patience=3, min_delta=1.2).steps == 4
    assert scripted(values, steps=8, patience=3).steps == 8
    assert scripted([1.0, float("nan"), float("inf"), 0.0], patience=2).steps == 3


def test_small_falls_are_counted_from_the_same_point_after_a_resume(tmp_path):
    options = {"patience": 4, "min_delta": 1.0, "out": tmp_path}
    assert scripted([10.0, 9.6, 9.2, 9.1], steps=4, **options).steps == 4
    assert scripted([9.05, 8.95, 0.0], steps=10, resume=True, **options).steps == 5


RISING = {
    "validation": VALIDATION,
    "validate_every": 3,
    "optimizer": lambda p: torch.optim.SGD(p, 0.02),
    "clip": 1.0,
}


def test_a_run_that_stopped_early_stays_stopped_and_goes_on_with_more_patience(tmp_path):
    stopped = make()
    first = train(stopped, 90, out=tmp_path, patience=1, **RISING)
    assert first.best_step < first.steps < 90
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    again = make()
    second = train(again, 90, out=tmp_path, patience=1, resume=True, **RISING)
    assert (second.steps, second.best_step, second.history) == (first.steps, first.best_step, first.history)
    assert second.tasks_per_second is None
    assert same(state(again), state(stopped))
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    on, whole = make(), make()
    third = train(on, 90, out=tmp_path, patience=4, resume=True, **RISING)
    expected = train(whole, 90, patience=4, **RISING)
    assert third.steps == expected.steps > first.steps
    assert third.history == expected.history
    assert same(state(on), state(whole))


@pytest.mark.parametrize("patience", [None, 1])
def test_best_is_what_is_loaded_and_what_remains(patience, tmp_path):
    method = make()
    result = train(method, 30, out=tmp_path, patience=patience, **RISING)
    assert result.best_step < result.steps
    loaded = bm.load_method(tmp_path, make(), VALIDATION)
    assert same(state(loaded), state(method))
    assert same(checkpoint.load(tmp_path / "best.pt")["method"], state(method))
    last = bm.load_method(tmp_path / "checkpoint.pt", make(), VALIDATION)
    assert not same(state(last), state(method))
    # a best that a killed run found after its last checkpoint is not known to the run that goes on
    content = checkpoint.load(tmp_path / "best.pt")
    wrong = {k: v + 1 for k, v in content["method"].items()}
    checkpoint.save(tmp_path / "best.pt", content | {"method": wrong})
    train(make(), 30, out=tmp_path, patience=patience, resume=True, **RISING)
    assert same(state(bm.load_method(tmp_path, make(), VALIDATION)), state(method))


def test_a_run_of_other_validation_is_not_resumed(tmp_path):
    train(make(), 6, out=tmp_path, **RISING)
    half = VALIDATION.tasks(slice(0, 5))
    for options, name in (
        ({"validation": half}, "validation_tasks"),
        ({"validation": None}, "validation_tasks"),
        ({"validate_with": lambda *_: 0.0}, "validate_with"),
        ({"dtype": torch.float64}, "dtype"),
    ):
        with pytest.raises(errors.CheckpointError, match=f"had {name} = "):
            train(make(), 9, out=tmp_path, resume=True, **(RISING | options))


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 0},
        {"accumulate": 1.5},
        {"chunk": 0},
        {"chunk": True},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"patience": 3},
        {"min_delta": 0.1},
        {"validation_chunk": 3},
        {"validate_with": lambda *_: 0.0},
        {"validation": VALIDATION, "patience": 0},
        {"validation": VALIDATION, "min_delta": -0.1},
        {"validation": VALIDATION, "min_delta": float("inf")},
        {"validation": VALIDATION, "validation_chunk": -1},
        {"validation": VALIDATION, "validate_with": "mse"},
        {"validation": VALIDATION, "validate_with": lambda *_: None, "validate_every": 1},
        {"validation": VALIDATION, "validate_with": lambda *_: torch.zeros(2), "validate_every": 1},
        {"validation": []},
        {"validation": [VALIDATION, VALIDATION.support]},
    ],
)
def test_what_is_no_option(options):
    name = "validation" if list(options) == ["validation"] else list(options)[-1]
    name = "validate_with" if name == "validate_every" else name
    with pytest.raises(errors.OptionError, match=f"^{name} "):
        train(make(), **({"steps": 2} | options))


# -- speed --------------------------------------------------------------------------------------------------------


class Slow(Watched):
    """A loss of 10 ms."""

    def loss(self, batch, *, generator=None):
        time.sleep(0.01)
        return super().loss(batch)


def test_tasks_a_second_are_those_of_the_steps(tmp_path):
    def slow_score(*_):
        time.sleep(0.3)
        return 0.0

    result = train(
        Slow(),
        4,
        log_every=2,
        accumulate=2,
        out=tmp_path,
        validation=VALIDATION,
        validate_every=2,
        validate_with=slow_score,
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # 16 tasks take 20 ms at least; were validation counted, 32 would take 300 ms
    assert all(107 < line["tasks_per_second"] <= 800 for line in lines)
    assert 107 < result.tasks_per_second <= 800
    assert lines[1]["seconds"] - lines[0]["seconds"] == pytest.approx(32 / lines[1]["tasks_per_second"], abs=1e-5)
    assert not any("seconds" in h or "tasks_per_second" in h for h in result.history)
    train(Slow(), 6, log_every=2, accumulate=2, out=tmp_path / "b")
    train(Slow(), 8, log_every=2, accumulate=2, out=tmp_path / "b", resume=True)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= 0.16  # those before the resume are counted
