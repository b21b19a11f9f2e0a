"""The first call of compiled code is made by a child, whose end is not ours."""

import ctypes
import os
import signal
import time

import pytest
import torch

from bayesmeta.errors import CaptureError
from bayesmeta.train.compilation.trial import can_try, try_in_child


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_crash_is_an_error_here():
    with pytest.raises(CaptureError, match="crashed \\(SIGSEGV\\)"):
        try_in_child(lambda: ctypes.string_at(0), [])
    with pytest.raises(CaptureError, match="crashed \\(SIGILL\\)"):
        try_in_child(lambda: os.kill(os.getpid(), signal.SIGILL), [])


def test_what_does_not_end_is_ended():
    begin = time.monotonic()
    with pytest.raises(CaptureError, match=r"did not end in 0\.2 s"):
        try_in_child(lambda: time.sleep(100), [], patience=0.2)
    assert time.monotonic() - begin < 5


def test_a_call_that_works_or_raises_changes_nothing_here():
    value = torch.zeros(3)
    try_in_child(lambda t: t.add_(1), [value])
    try_in_child(lambda t: t.add_(1) @ torch.ones(2), [value])  # of other sizes: an exception
    assert torch.equal(value, torch.zeros(3))


def test_where_there_is_no_trial():
    assert can_try([torch.zeros(1)])
    assert not can_try([torch.zeros(1, device="meta")])
    torch.set_num_threads(2)
    assert not can_try([torch.zeros(1)])


def test_a_run_whose_compiled_code_crashes_goes_on_eagerly(monkeypatch):
    import bayesmeta as bm
    from bayesmeta.errors import CompileWarning

    monkeypatch.setattr("torch._inductor.compile", lambda *_, **__: lambda *inputs: ctypes.string_at(0))
    found = []
    for mode in ("inductor", "off"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5)))
        options = {"steps": 4, "tasks_per_step": 2, "progress": False, "device": "cpu"}
        if mode == "inductor":
            with pytest.warns(CompileWarning, match="crashed"):
                result = bm.fit(method, bm.tasks.Sinusoid(), compile=mode, **options)
            assert "SIGSEGV" in result.compiled
        else:
            bm.fit(method, bm.tasks.Sinusoid(), **options)
        found.append(torch.cat([p.detach().flatten() for p in method.parameters()]))
    assert torch.equal(*found)
