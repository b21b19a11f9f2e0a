"""Profiles: sleeps, tensors and operations that were put into a stage on purpose are found there and nowhere else."""

import inspect
import json
import random
import time

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta import cli, errors
from bayesmeta.train.loop import Loop
from bayesmeta.train.profiling.profile import NOT_OF_A_STEP
from bayesmeta.train.profiling.stages import Stages
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


def test_what_is_in_no_stage_is_the_rest(monkeypatch):
    """All of it: a sleep in the step beside its stages, which a clock of the test's own measures too."""
    slept, rests, step, original = [], [], Stages.step, Loop.advance

    def advance(self):
        begin = time.perf_counter()
        time.sleep(SLEEP)
        slept.append(time.perf_counter() - begin)
        return original(self)

    def timed(self):
        spent = step(self)
        if not self.annotate:
            rests.append((spent["rest"], slept[-1]))
        return spent

    monkeypatch.setattr(Loop, "advance", advance)
    monkeypatch.setattr(Stages, "step", timed)
    measure(Line(), steps=2)
    assert len(rests) >= 2
    assert all(rest >= sleep for rest, sleep in rests)


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
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs, *rest, **options: graph)


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


def test_a_real_slow_draw_is_advised_on():
    assert any("Drawing the tasks takes" in line for line in in_stage("draw").advice)


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
