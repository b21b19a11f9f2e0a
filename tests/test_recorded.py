"""``compile="cudagraphs"``: the memory around a recording, with a recording of Python calls in the place of CUDA's."""

import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import CaptureError, OptionError
from bayesmeta.train.compilation import compiled_svi
from bayesmeta.train.compilation.recorded import Recorded, record_step
from tests.test_compile import run
from tests.test_compile_svi import check_same, pair

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def played_back(fn):
    """As CUDA does: results of a replay are written where those of the recording lie, and nothing but memory moves."""
    fn()
    recorder = fn.__closure__[list(fn.__code__.co_freevars).index("self")].cell_contents
    places = list(recorder._results)

    def play():
        fn()
        for place, value in zip(places, recorder._results, strict=True):
            place.copy_(value)
        recorder._results = places

    return play


@pytest.fixture
def fake(monkeypatch):
    """Recordings of Python calls on the CPU."""
    monkeypatch.setattr("bayesmeta.train.compilation.recorded._record_on_cuda", played_back)
    monkeypatch.setattr("bayesmeta.train.compilation.compiled.record_step", Recorded)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for module in ("compiling", "compiled_svi"):
        monkeypatch.setattr(f"bayesmeta.train.compilation.{module}.check_cuda", lambda device: None)


def test_memory_of_a_recording():
    kept, argument = torch.zeros(3), torch.ones(3)

    def add(total, new):
        total.add_(new)
        return (total.sum(), new * 2)

    recorded = Recorded(add, [kept, argument], [1], [kept], played_back)
    assert torch.equal(kept, torch.zeros(3))  # warming up and recording have left no trace
    first = recorded(kept, torch.full((3,), 2.0))
    second = recorded(kept, torch.full((3,), 5.0))
    assert torch.equal(kept, torch.full((3,), 7.0))
    assert (float(first[0]), float(second[0])) == (6.0, 21.0)  # results of a call outlive the next
    assert torch.equal(first[1], torch.full((3,), 4.0))
    assert torch.equal(argument, torch.ones(3))  # the caller's own tensors are not written to
    with pytest.raises(CaptureError, match="moved in memory"):
        recorded(kept.clone(), argument)


def test_what_cannot_be_recorded():
    kept = torch.zeros(3)

    def record(fn):
        fn()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(CaptureError, match="operation not permitted when stream is capturing"):
        Recorded(lambda t: (t.add_(1),), [kept], [], [kept], record)
    assert torch.equal(kept, torch.zeros(3))


def test_a_run_on_recordings_is_that_of_eager_steps(fake):
    options = {"schedule": bm.schedules.cosine(8, warmup=3), "clip": 1.0}
    found, ours = run(compile="cudagraphs", **options)
    expected, theirs = run(**options)
    assert found.compiled.startswith("compiled at step 2")
    assert torch.allclose(ours, theirs, rtol=1e-11)
    assert [e["loss"] for e in found.history] == pytest.approx([e["loss"] for e in expected.history], rel=1e-11)


def test_svi_on_recordings_is_eager_svi(fake, monkeypatch):
    monkeypatch.setattr(compiled_svi, "LEAST", 1)
    ours = pair("cudagraphs")
    assert "compiled at step 2" in ours[3].compiled
    assert "5 steps in one graph" in ours[3].compiled
    check_same(ours, pair("off"))


def test_without_cuda():
    if torch.cuda.is_available():
        with pytest.raises(OptionError, match="needs a CUDA device, and this is on cpu"):
            run(compile="cudagraphs", device="cpu")
        return
    with pytest.raises(OptionError, match="needs a CUDA device, and there is none"):
        run(compile="cudagraphs")
    with pytest.raises(OptionError, match="needs a CUDA device, and there is none"):
        pair("cudagraphs")


def on_gpu(mode):
    """A run on the GPU; losses, parameters."""
    torch.manual_seed(0)
    method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.5)))
    result, parameters = run(method, compile=mode, device="cuda", steps=20)
    return result, parameters.cpu()


@cuda
@pytest.mark.parametrize("mode", ["cudagraphs", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_run_on_a_gpu(mode):
    found, ours = on_gpu(mode)
    _, theirs = on_gpu("off")
    assert found.compiled.startswith("compiled at step 2")
    assert torch.allclose(ours, theirs, rtol=1e-10)


def test_inputs_on_the_cpu_are_refused():
    with pytest.raises(CaptureError, match="not on the GPU"):
        record_step(lambda t: (t,), [torch.zeros(3)], [], [])
