"""Profiles: sleeps, tensors and operations that were put into a stage on purpose are found there and nowhere else."""

import inspect
import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta import cli, errors
from bayesmeta.train.profile import NOT_OF_A_STEP
from bayesmeta.train.profile_advice import advise
from bayesmeta.train.profiled import Profile, Stage, StepProfile, duration
from bayesmeta.train.stages import PREFIX, Stages
from bayesmeta.train.trace import Operation, Trace, read, without_noise
from tests.programs import TwoSites

TASKS = bm.tasks.Sinusoid(noise=0.1)
SLEEP = 0.015
MB = 10**6


def measure(method, tasks=TASKS, **options):
    return bm.profile(method, tasks, **{"steps": 3, "tasks_per_step": 4, "device": "cpu"} | options)


class Pause(torch.autograd.Function):
    """Nothing, which takes its time on the way back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(SLEEP)
        return gradient


class SlowAdam(torch.optim.Adam):
    def step(self, closure=None):
        time.sleep(SLEEP)
        return super().step(closure)


class SlowTasks:
    num_tasks = None

    def sample(self, num_tasks, **options):
        time.sleep(SLEEP)
        return TASKS.sample(num_tasks, **options)


class Line(torch.nn.Module):
    """A line without adaptation, in which something is put into a stage."""

    def __init__(self, what=""):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.3))
        self.what = what

    def prepare(self, batch):
        pass

    def loss(self, batch, *, generator=None):
        loss = (self.slope * batch.query.x.squeeze(-1) - batch.query.y).square().mean()
        if self.what == "loss":
            time.sleep(SLEEP)
        if self.what == "gradient":
            loss = Pause.apply(loss)
        if self.what == "memory":
            loss = loss + 0 * torch.zeros(25 * MB // 10)[-1]  # of 10 MB, gone when the loss is there
        if self.what == "kept":
            loss = loss + 0 * (self.slope * torch.zeros(25 * MB // 10)).square().sum()
        if self.what == "operations":
            for _ in range(10):
                loss = loss * self.slope
        return loss


def in_stage(stage):
    """A sleep in one stage of each step."""
    tasks = SlowTasks() if stage == "draw" else TASKS
    optimizer = SlowAdam if stage == "update" else torch.optim.Adam
    return measure(Line(stage), tasks, steps=2, optimizer=lambda p: optimizer(p, 1e-3))


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["draw", "loss", "gradient", "update"])
def test_a_sleep_is_found_in_its_stage_and_in_no_other(stage):
    eager = in_stage(stage).eager
    assert eager[stage].seconds >= 0.99 * SLEEP
    assert eager.share(stage) > 0.7
    assert all(eager.share(other.name) < 0.2 for other in eager.stages if other.name != stage)
    assert eager.seconds >= SLEEP  # also where no clock was in it


def test_stages_add_up_to_the_step(monkeypatch):
    pairs, step = [], Stages.step

    def timed(self):
        begin = time.perf_counter()
        spent = step(self)
        if not self.annotate:
            pairs.append((time.perf_counter() - begin, sum(spent.values())))
        return spent

    monkeypatch.setattr(Stages, "step", timed)
    eager = in_stage("loss").eager
    assert len(pairs) >= 2
    assert all(parts <= whole for whole, parts in pairs)
    assert min((whole - parts) / whole for whole, parts in pairs) < 0.02
    assert eager.timed_seconds == pytest.approx(sum(s.seconds for s in eager.stages))
    assert abs(eager.timed_seconds - eager.seconds) < 0.5 * SLEEP  # a step with clocks is one without


def test_the_clocks_are_off_again_also_after_an_error():
    class Loop:
        device = torch.device("cpu")
        compiler = None

        def __init__(self):
            self.method = Line()

        def sample(self):
            return 1

        def _gradient(self):
            self.sample()
            raise ValueError("no")

        def _update(self):
            pass

        def advance(self):
            self._gradient()

    loop = Loop()
    before, of_method = dict(vars(loop)), dict(vars(loop.method))
    with pytest.raises(ValueError, match="no"), Stages(loop) as stages:
        stages.step()
    assert vars(loop) == before
    assert vars(loop.method) == of_method
    own = loop.sample = lambda: 2
    with Stages(loop):
        assert loop.sample is not own
    assert loop.sample is own


def test_pieces_of_a_step_are_counted():
    found = measure(Line(), accumulate=2, chunk=3)
    assert found.pieces == 4
    assert "8 tasks of 10 + 10 observations" in found.what


# -- memory and operations --------------------------------------------------------------------------------------------


def test_a_large_tensor_is_found_in_its_stage():
    plain, eager = measure(Line()).eager, measure(Line("memory")).eager
    assert plain.peak_bytes < MB
    assert 10 * MB <= eager["loss"].peak_bytes < 10.1 * MB
    assert 10 * MB <= eager["loss"].allocated_bytes < 10.1 * MB
    assert all(eager[name].allocated_bytes < MB for name in ("draw", "gradient", "update", "rest"))
    assert all(eager[name].peak_bytes < MB for name in ("draw", "gradient", "update", "rest"))


def test_what_is_kept_for_the_way_back_is_there_at_its_beginning():
    eager = measure(Line("kept")).eager
    assert 20 * MB <= eager["loss"].peak_bytes < 32 * MB  # the product is kept, and there were zeros and squares
    assert eager["gradient"].peak_bytes >= 20 * MB
    assert eager["draw"].peak_bytes < MB
    assert eager["update"].peak_bytes < MB


def test_operations_are_counted_one_by_one():
    plain, more = measure(Line()).eager, measure(Line("operations")).eager
    assert more["loss"].operations - plain["loss"].operations == 10
    assert more["gradient"].operations - plain["gradient"].operations >= 20  # to both factors of each
    assert more["draw"].operations == plain["draw"].operations
    calls = [{o.name: o.calls for o in column.operations}["aten::mul"] for column in (plain, more)]
    assert calls[1] - calls[0] >= 30
    assert more.num_operations == sum(s.operations for s in more.stages)


class Product(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(8))

    def prepare(self, batch):
        pass

    def loss(self, batch, *, generator=None):
        return (torch.ones(5, 8, dtype=torch.float64) @ self.weight).square().mean()


def test_floating_point_operations_and_what_is_held():
    found = measure(Product().double())
    assert found.flops == 2 * (2 * 5 * 8 * 8)  # forward, and the gradient of the weight
    held = {"parameters": 512, "buffers": 0, "gradients": 512, "optimizer": 2 * 512 + 4}
    assert found.held_bytes == held
    assert found.peak_flops > 1e8


# -- nothing changes --------------------------------------------------------------------------------------------------


def make(kind):
    if kind == "abml":
        return bm.ABML(TwoSites(), inner_steps=2, inner_lr=1e-3, global_guide="normal")
    network = bm.nets.mlp(1, [8], 1)
    if kind == "maml":
        return bm.MAML(bm.NeuralTaskModel(network, bm.Gaussian(0.7)), inner_lr=0.05)
    return bm.BayesianLastLayer(bm.NeuralTaskModel(network, bm.Gaussian(0.5, learn_scale=True), task_modules="head"))


@pytest.mark.parametrize("kind", ["maml", "last_layer", "abml"])
def test_nothing_is_changed(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = make(kind).eval()
    if kind == "last_layer":
        method.prepare(TASKS.sample(2, support=5, query=5))
    before = {k: v.clone() for k, v in method.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    found = measure(method, out=tmp_path / "run", progress=False)
    after = method.state_dict()
    assert before.keys() == after.keys()  # no parameter has been made either
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in method.parameters())
    assert not any(m.training for m in method.modules())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert list(tmp_path.iterdir()) == []
    assert type(method).__name__ in found.what
    # control: training changes it
    bm.fit(method, TASKS, steps=2, tasks_per_step=4, progress=False, device="cpu")
    assert any(k not in before or not torch.equal(before[k], v) for k, v in method.state_dict().items())


def test_tasks_that_draw_from_numpys_own_generator_leave_it_alone():
    class Careless:
        num_tasks = None

        def sample(self, num_tasks, **options):
            random.random()
            return TASKS.sample(num_tasks, **options | {"support": int(np.random.randint(3, 5))})  # noqa: NPY002

    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    measure(Line(), Careless())
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_another_number_of_threads_is_tried_and_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = measure(Line())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found.threads == 2
    assert list(found.other_threads) == [1]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_every_option_of_fit_is_taken_or_known_to_change_no_step():
    """An option that fit has and this fails on: take it in profile, or name it in NOT_OF_A_STEP."""
    of_fit, own = (set(inspect.signature(f).parameters) for f in (bm.fit, bm.profile))
    assert of_fit - own - set(NOT_OF_A_STEP) == set()
    assert set(NOT_OF_A_STEP) <= of_fit - own


def test_what_cannot_be_profiled_is_refused(tmp_path):
    method = Line()
    cases = [
        (errors.OptionError, "no option 'step'", {"step": 5}),
        (errors.OptionError, "steps must be a whole number", {"steps": 0}),
        (errors.OptionError, "compile='auto'.*'auto' decides", {"compile": "auto"}),
        (errors.OptionError, "exclude each other", {"compile": "inductor", "checkpoint_inner": True}),
        (errors.OptionError, "picks the chunk", {"memory": "1GiB", "chunk": 2}),
        (errors.OptionError, "precision", {"precision": "int4"}),
        (errors.OptionError, "that it was not given", {"optimizer": lambda p: torch.optim.Adam(method.parameters())}),
        (errors.RunFolderError, "could not be written", {"trace": tmp_path / "none" / "trace.json"}),
    ]
    for error, match, options in cases:
        with pytest.raises(error, match=match):
            measure(method, **options)
    assert method.slope.item() == pytest.approx(0.3)


def test_a_method_that_cannot_be_copied_is_refused():
    method = Line()
    method.generator = (i for i in range(3))
    with pytest.raises(errors.UnsupportedError, match=r"Line cannot be copied \(TypeError.*generator"):
        measure(method)


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def uncompiled(monkeypatch):
    """The captured graph as it is: all but the compiler, in a hundredth of its time."""
    monkeypatch.setattr("bayesmeta.train.compiled._inductor", lambda graph, inputs, *rest, **options: graph)


@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_step_has_a_column_of_its_own(tmp_path):
    found = measure(make("maml"), compile="inductor", trace=tmp_path / "trace.json")
    compiled = found.compiled
    assert [s.name for s in compiled.stages] == ["graph", "update", "rest"]
    assert [s.name for s in found.eager.stages] == ["draw", "loss", "gradient", "update", "rest"]
    assert compiled["graph"].operations > 0
    assert compiled["graph"].peak_bytes > 0
    assert compiled["draw"].seconds == 0
    assert found.compile_report.startswith("compiled at step")
    assert found.compile_seconds > 0
    won = found.eager.seconds - compiled.seconds
    assert found.break_even == (pytest.approx(found.compile_seconds / won) if won > 0 else float("inf"))
    text = str(found)
    assert "inductor" in text
    assert "compiled graph" in text
    for name in ("trace.json", "trace-compiled.json"):
        assert json.loads((tmp_path / name).read_text())["traceEvents"]
    again = json.loads(json.dumps(found.state()))
    assert again["compiled"]["stages"][0]["name"] == "graph"


@pytest.mark.usefixtures("uncompiled")
def test_tasks_that_are_drawn_before_the_graph_are_a_stage_of_the_compiled_step():
    compiled = measure(Line(), SlowTasksOfNumpy(), compile="inductor").compiled
    assert compiled.share("draw") > 0.7
    assert compiled["graph"].seconds < 0.5 * SLEEP


class SlowTasksOfNumpy:
    num_tasks = None

    def sample(self, num_tasks, *, support, query, generator=None):
        time.sleep(SLEEP)
        seed = int(torch.randint(1000, (), generator=generator))
        x = np.random.default_rng(seed).normal(size=(num_tasks, support + query, 1)).astype(np.float32)
        points = bm.Observations(torch.from_numpy(x), torch.from_numpy(x[..., 0]))
        return bm.TaskBatch(points.points(slice(0, support)), points.points(slice(support, None)))


class NoGraph(Line):
    def loss(self, batch, *, generator=None):
        return super().loss(batch) * float(batch.query.y.mean().abs() + 1)


def test_a_step_that_cannot_be_compiled_is_told_so():
    with pytest.warns(errors.CompileWarning):
        found = measure(NoGraph(), compile="inductor")
    assert found.compiled is None
    assert any(line.startswith("compile= wins nothing here: not compiled") for line in found.advice)


@pytest.mark.slow
def test_a_step_that_is_really_compiled():
    method = make("maml")
    found = measure(method, compile="inductor", steps=20, tasks_per_step=16)
    assert found.compiled.seconds < found.eager.seconds
    assert found.compiled.num_operations < found.eager.num_operations
    assert any(o.name == "compiled code" for o in found.compiled.operations[:3])
    assert found.compile_seconds > 1


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
    import os

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


def test_a_real_slow_draw_is_advised_on():
    assert any("Drawing the tasks takes" in line for line in in_stage("draw").advice)


def test_durations_are_said_in_their_unit():
    assert [duration(s) for s in (2.0, 0.0123, 4.5e-5, 3e-8)] == ["2 s", "12.3 ms", "45 µs", "30 ns"]


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    import pandas as pd

    path = tmp_path_factory.mktemp("table") / "a.csv"
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"town": np.repeat(np.arange(12), 8), "age": rng.normal(size=96)})
    frame.assign(bill=frame.age + rng.normal(size=12)[frame.town]).to_csv(path, index=False)
    return path


def test_a_file_is_profiled_from_the_command_line(csv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = ["--task", "town", "--x", "age", "--y", "bill"]
    cli.main(["profile", str(csv), *columns, "--steps", "3", "--out", "p.json", "--trace", "t.json"])
    shown = capsys.readouterr().out
    assert "BayesianLastLayer, 16 tasks" in shown
    assert "draw the tasks" in shown
    assert "\n- " in shown
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["eager"]["seconds"] > 0
    assert found["validation_seconds"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "t.json"}  # no run


@pytest.mark.parametrize("family", ["sinusoid", "sine-or-line", "gp"])
def test_a_family_is_profiled_from_the_command_line(family, capsys):
    cli.main(["profile", "--family", family, "--method", "MultiTask", "--steps", "2"])
    shown = capsys.readouterr().out
    assert "MultiTask, 16 tasks of 5 + 20 observations" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Name a CSV file"),
        (("--family", "gp", "--task", "town"), "brings its own tasks; leave out --task"),
        (("--family", "gp", "--method", "mamal"), "did you mean 'MAML'"),
        (("none.csv", "--task", "a", "--y", "b", "--x", "c"), "none.csv is not there"),
        (("none.csv", "--task", "a", "--y", "b"), "No input was named"),
    ],
)
def test_the_command_line_refuses_with_status_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["profile", *arguments])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


# -- a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_kernels_of_a_gpu_are_seen():
    found = measure(make("maml"), device="cuda", steps=10)
    assert 0 < found.eager.kernel_seconds < found.eager.seconds
    assert found.eager["loss"].peak_bytes > 0
    assert found.peak_flops > 1e12
