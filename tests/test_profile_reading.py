"""Profiles, the rest: traces of known events are read exactly, and advice follows from figures."""

import json
import os
from dataclasses import replace

import pytest

from bayesmeta.train.profiling.advice import advise
from bayesmeta.train.profiling.profiled import Profile, Stage, StepProfile, duration
from bayesmeta.train.profiling.stages import PREFIX
from bayesmeta.train.profiling.trace import Operation, Trace, read, without_noise

# -- reading a trace --------------------------------------------------------------------------------------------------


def event(name, start, end, category="cpu_op", thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "tid": thread}


def memory(moment, number, kind=0):
    return {"name": "[memory]", "ts": moment, "args": {"Bytes": number, "Device Type": kind}}


def trace_of_two_steps(tmp_path):
    """The first is left out; in the second, from 1000 on, everything is known."""
    mark = lambda name, start, end: event(PREFIX + name, start, end, "user_annotation")  # noqa: E731
    events = [
        mark("step", 0, 500), event("aten::first", 10, 400), memory(20, 5000),
        mark("step", 1000, 2000), mark("gradient", 1100, 1900), mark("draw", 1200, 1300), mark("loss", 1400, 1600),
        event("aten::a", 1200, 1290), event("aten::b", 1210, 1230), event("aten::b", 1240, 1250),
        event("aten::b", 1420, 1500), event("autograd::engine::evaluate_function: X", 1650, 1800, thread=2),
        event("aten::a", 1700, 1760, thread=2), event("other", 1010, 1020),
        memory(1220, 100), memory(1430, 1000), memory(1590, -300), memory(1710, 50), memory(1720, -700),
        memory(1950, 7), memory(1960, -157), memory(1450, 10**9, kind=1), event("kernel_x", 1450, 1700, "kernel"),
    ]  # fmt: skip
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_a_trace_of_known_events_is_read_exactly(tmp_path):
    found = read(trace_of_two_steps(tmp_path), quiet=[True, True])
    assert isinstance(found, Trace)
    own = {o.name: (round(o.share, 6), o.calls) for o in found.operations}
    assert own == {
        "aten::a": (0.06 + 0.06, 2),  # 90 less two calls of 20 and 10, and 60
        "aten::b": (0.02 + 0.01 + 0.08, 3),
        "autograd engine": (0.09, 1),
        "other": (0.01, 1),
    }
    assert {k: v for k, v in found.counts.items() if v} == {"draw": 1, "loss": 1, "gradient": 1}
    assert found.outside == pytest.approx(1 - (90 + 80 + 150 + 10) / 1000)
    assert found.kernel_seconds == pytest.approx(250e-6 / 2)
    assert found.allocated == {"draw": 100, "loss": 1000, "gradient": 50, "graph": 0, "update": 0, "rest": 7}
    assert found.peaks == {"draw": 100, "loss": 1100, "gradient": 850, "graph": 0, "update": 0, "rest": 157}
    on_gpu = read(trace_of_two_steps(tmp_path), quiet=[True, True], cuda=True)
    assert on_gpu.peaks["loss"] == 10**9


def test_times_are_those_of_steps_without_interruption(tmp_path):
    path = trace_of_two_steps(tmp_path)
    content = json.loads(path.read_text())
    content["traceEvents"] += [event(PREFIX + "step", 3000, 9000, "user_annotation"), event("aten::late", 3000, 9000)]
    path.write_text(json.dumps(content))
    names = lambda *quiet: {o.name for o in read(path, quiet=[True, *quiet]).operations}  # noqa: E731
    assert names(False, True) == {"aten::late"}
    assert "aten::late" not in names(True, False)
    assert "aten::late" not in names(False, False)  # the shortest
    assert "aten::late" in names(True, True)


def test_the_profilers_own_words_are_kept_off_the_screen_and_no_others(capfd):
    with without_noise():
        os.write(2, b"USDT:2026 profiler_start\nsomething else\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "something else\nafter\n"


# -- advice -----------------------------------------------------------------------------------------------------------


def column(mode="eager", seconds=0.01, **shares):
    shares = shares or {"draw": 0.1, "loss": 0.4, "gradient": 0.4, "update": 0.05, "rest": 0.05}
    stages = tuple(Stage(name, share * seconds, 100.0, 1000, 2000) for name, share in shares.items())
    operations = (Operation("aten::bmm", 0.2, 10.0, 0.2 * seconds), Operation("aten::add", 0.1, 10.0, 0.1 * seconds))
    return StepProfile(mode, seconds, seconds, stages, operations, 0.1)


def profile_of(eager=None, **changes):
    held = {"parameters": 4000, "buffers": 0, "gradients": 4000, "optimizer": 8000}
    base = Profile("MAML", "cpu", 1, eager or column(), None, None, None, held, 0.001, 1, {}, 10**6, 1e9)
    return replace(base, **changes)


FASTER = {"compiled": column("inductor", 0.001, graph=1.0), "compile_report": "compiled", "compile_seconds": 9.0}
TRACED = column()
#: What is said, of what, and of what it is not said.
ADVICE = {
    "draw": ("Drawing the tasks takes 60%", profile_of(column(draw=0.6, loss=0.4)), profile_of()),
    "draw beside": (
        "Beside the graph, drawing the tasks is 50% of a compiled step",
        profile_of(**FASTER | {"compiled": column("inductor", 0.001, draw=0.5, graph=0.5)}),
        profile_of(**FASTER),
    ),
    "bound": ("bound by calling operations, 500 of 20 µs each", profile_of(one_task_seconds=0.009), profile_of()),
    "bound in pieces": ("single task takes 80%", profile_of(one_task_seconds=0.002, pieces=4), profile_of(pieces=4)),
    "heavy": (
        "aten::bmm alone takes 50%",
        profile_of(replace(TRACED, operations=(Operation("aten::bmm", 0.5, 10.0, 0.005),))),
        profile_of(),
    ),
    "rate": (
        "reaches 10% of the rate of a large matrix product",
        profile_of(replace(TRACED, operations=(Operation("aten::bmm", 0.5, 10.0, 0.005),))),
        profile_of(replace(TRACED, operations=(Operation("aten::exp", 0.5, 10.0, 0.005),))),
    ),
    "gpu": (
        "The GPU is busy for 50% of a step",
        profile_of(replace(TRACED, kernel_seconds=0.005)),
        profile_of(replace(TRACED, kernel_seconds=0.0095)),
    ),
    "threads": (
        "With 1 thread(s) instead of 2",
        profile_of(threads=2, other_threads={1: 0.005}),
        profile_of(threads=2, other_threads={1: 0.0099}),
    ),
    "update": ("Clipping and the optimizer take 40%", profile_of(column(loss=0.6, update=0.4)), profile_of()),
    "rest": ("50% of a step is none of", profile_of(column(loss=0.5, rest=0.5)), profile_of()),
    "validation": (
        "Validation takes 1 s, every 100 steps: 50% of the run",
        profile_of(validation_seconds=1.0, validate_every=100),
        profile_of(validation_seconds=0.01, validate_every=100),
    ),
    "memory": (
        "A step needs 1 GiB at most, in “loss: adapt, forward”",
        profile_of(replace(TRACED, stages=(*TRACED.stages[:1], Stage("loss", 0.004, 100.0, 2**30, 2**30)))),
        profile_of(),
    ),
    "compile": (
        'compile="inductor" makes a step 10.0 times as fast. Compiling took 9 s, which 1,000 steps win back',
        profile_of(**FASTER),
        profile_of(),
    ),
    "no compile": (
        "Do not compile",
        profile_of(**FASTER | {"compiled": column("inductor", 0.0099, graph=1.0)}),
        profile_of(**FASTER),
    ),
    "disturbed": ("Other processes", profile_of(replace(TRACED, disturbed=True)), profile_of()),
    "nothing": ("Nothing stands out; the largest part is", profile_of(), profile_of(one_task_seconds=0.009)),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice_follows_from_the_figures(case):
    text, told, not_told = ADVICE[case]
    assert text in " ".join(advise(told))
    assert text not in " ".join(advise(not_told))


def test_durations_are_said_in_their_unit():
    assert [duration(s) for s in (2.0, 0.0123, 4.5e-5, 3e-8)] == ["2 s", "12.3 ms", "45 µs", "30 ns"]
