"""Compiled steps: each method's step as one graph equals its eager step; and ``compile=`` in a run."""

import warnings

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import CaptureError, CompileWarning, OptionError
from bayesmeta.train.compilation.compiled import CompiledStep
from bayesmeta.train.compilation.compiling import flatten, rebuild
from bayesmeta.train.compilation.updates import Update
from tests.test_contract import METHODS, on_network, on_program, ragged_batch, sinusoids, stir

F32, F64 = torch.float32, torch.float64
#: the whole of the methods takes minutes; these stand for the kinds of graphs
QUICK = ("maml", "platipus_prior", "last_layer", "deep_kernel", "conditional_neural_process", "mr_maml_weights")
#: what is no graph, and why
NO_GRAPH = {
    "amortised_flow": "flows.py.*|depends on values",  # the splines of a flow pick their bins by masks
}
each = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.fixture
def uncompiled(monkeypatch):
    """The captured graph as it is: all but the compiler, in a hundredth of its time."""
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs: graph)


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-3)


class Eager:
    """A method with an optimizer, on tasks that are given or drawn, and one step of it."""

    def __init__(self, method, batch, optimizer=adam, clip=None, draw=None):
        self.method, self.batch, self.clip = method, batch, clip
        self.draw = draw or (lambda: batch)
        self.generator = torch.Generator().manual_seed(5)
        method.prepare(batch)
        stir(method, batch)
        self.parameters = list(method.parameters())
        self.optimizer = optimizer(self.parameters)
        self.step()

    def step(self):
        """Loss and norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.method.loss(self.draw(), generator=self.generator)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.optimizer.step()
        return torch.stack([loss.detach(), norm])

    def compiled(self, drawn=False):
        """Its step as a graph, the batch an argument unless the graph draws it."""
        tensors, _ = flatten(self.batch)

        def objective(*given):
            loss = self.method.loss(self.draw() if drawn else rebuild(self.batch, given), generator=self.generator)
            return loss, loss

        step = CompiledStep(
            objective,
            self.parameters,
            self.optimizer,
            [self.generator],
            clip=self.clip,
            modules=[self.method],
            arguments=() if drawn else tensors,
        )
        return step.capture().compile()

    def state(self):
        """Parameters and the optimizer's state, in one vector."""
        state = [t for s in self.optimizer.state_dict()["state"].values() for t in s.values() if t is not None]
        return torch.cat([t.detach().flatten().to(F64) for t in [*self.parameters, *state]])


def off(a, b):
    return float((a - b).abs().max() / b.abs().max())


def check_a_step(eager, tolerance, drawn=False):
    """A compiled step after a compiled step equals an eager one on the same noise."""
    compiled = eager.compiled(drawn)
    arguments = () if drawn else flatten(eager.batch)[0]
    assert compiled(arguments) is not None
    compiled.commit()
    before, rng = eager.state(), eager.generator.get_state()
    undo = [p.detach().clone() for p in eager.parameters]
    saved = [{k: v.clone() for k, v in s.items() if v is not None} for s in eager.optimizer.state.values()]
    found = torch.stack(compiled(arguments))
    assert torch.equal(eager.state(), before) == (compiled.update is None)  # the step is made in the graph or at commit
    end = eager.generator.get_state()
    compiled.commit()
    after = eager.state()
    with torch.no_grad():
        for p, value in zip(eager.parameters, undo, strict=True):
            p.copy_(value)
        for state, values in zip(eager.optimizer.state.values(), saved, strict=True):
            for name, value in values.items():
                state[name].copy_(value)
    eager.generator.set_state(rng)
    expected = eager.step()
    assert torch.equal(eager.generator.get_state(), end)
    assert off(found, expected) < tolerance
    # Adam divides by the gradient's size: where it is rounding alone, so is its step
    assert off(after, eager.state()) < tolerance
    assert off(after, before) > 100 * tolerance  # there was a step
    return compiled


# -- each method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", each)
def test_a_step_on_a_network(name, uncompiled):
    eager = Eager(on_network(name, F64), sinusoids(dtype=F64))
    if name in NO_GRAPH:
        with pytest.raises(CaptureError, match=NO_GRAPH[name]):
            check_a_step(eager, 1e-10)
        return
    check_a_step(eager, 1e-10)


@pytest.mark.parametrize("name", each)
def test_a_step_on_a_program(name, uncompiled):
    """A Pyro program with a global site, on ragged data."""
    eager = Eager(on_program(name, F64), ragged_batch())
    if name in NO_GRAPH:
        with pytest.raises(CaptureError, match=NO_GRAPH[name]):
            check_a_step(eager, 1e-10)
        return
    check_a_step(eager, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", ["maml", "last_layer", "deep_kernel", "conditional_neural_process"])
def test_a_step_compiled_by_inductor(name, dtype):
    check_a_step(Eager(on_network(name, dtype), sinusoids(dtype=dtype)), 1e-10 if dtype == F64 else 1e-5)


def test_tasks_drawn_in_the_graph_and_clipping(uncompiled):
    tasks = bm.tasks.Sinusoid(noise=0.1)
    eager = Eager(on_network("maml", F64), sinusoids(dtype=F64), clip=0.5)
    eager.draw = lambda: tasks.sample(6, support=10, query=8, generator=eager.generator).to(dtype=F64)
    compiled = check_a_step(eager, 1e-10, drawn=True)
    assert float(compiled()[1]) > 0.5  # the norm before clipping
    assert {str(draw.op) for draw in compiled.captured.draws} == {"aten.rand.generator", "aten.randn.generator"}


# -- updates ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adam_decay": lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.02}], 0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_update_is_the_optimizers_own(kind):
    """Five steps under a falling rate, beside torch's."""
    theirs = [torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=F64)) for n in (3, 2)]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    pair = [(p, OPTIMIZERS[kind](p)) for p in (theirs, ours)]
    generator, update = torch.Generator().manual_seed(0), None
    for i in range(5):
        gradients = [torch.randn(p.shape, generator=generator, dtype=F64) for p in theirs]
        for parameters, optimizer in pair:
            for group in optimizer.param_groups:
                group["lr"] *= 0.8
            if i and parameters is ours:
                update = update or Update(optimizer)
                assert update.refresh()
                new = update.values(ours, gradients)
                for target, value in zip(update.targets(ours), new, strict=True):
                    target.copy_(value)
                continue
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-14)
    a, b = (optimizer.state_dict()["state"] for _, optimizer in pair)
    assert torch.allclose(_flat(a), _flat(b), rtol=1e-13, atol=1e-14)


def _flat(state):
    return torch.cat(
        [torch.zeros(1, dtype=F64), *(t.flatten().to(F64) for s in state.values() for t in s.values() if t is not None)]
    )


def test_updates_that_are_not_served():
    p = [torch.nn.Parameter(torch.ones(2))]
    assert Update.serves(torch.optim.Adam(p))
    assert not Update.serves(torch.optim.Adam(p, amsgrad=True))
    assert not Update.serves(torch.optim.RMSprop(p))
    assert not Update.serves(torch.optim.SGD(p, maximize=True))
    optimizer = torch.optim.SGD(p, 0.1)
    update = Update(optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.5  # part of the formulas, not an input of them
    assert not update.refresh()


# -- runs ---------------------------------------------------------------------------------------------------------


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.5))


def run(method=None, tasks=None, **options):
    """A short run; its result and parameters."""
    method = method or bm.MAML(model())
    defaults = {"steps": 8, "tasks_per_step": 4, "progress": False, "device": "cpu", "log_every": 1, "dtype": F64}
    result = bm.fit(method, tasks or bm.tasks.Sinusoid(noise=0.1), **(defaults | options))
    return result, torch.cat([p.detach().flatten() for p in method.parameters()])


def losses(result):
    return torch.tensor([entry["loss"] for entry in result.history], dtype=F64)


class Numpy:
    """Tasks made by numpy: no graph can hold them."""

    num_tasks = None

    def sample(self, num_tasks, *, support, query, generator=None):
        rng = np.random.default_rng(int(torch.randint(2**40, (), generator=generator)))
        x = torch.from_numpy(rng.normal(size=(num_tasks, support + query, 1)))
        parts = [bm.Observations(v, v[..., 0].sin()) for v in (x[:, :support], x[:, support:])]
        return bm.TaskBatch(*parts)


RUNS = {
    "plain": {},
    "schedule_and_clip": {"schedule": bm.schedules.cosine(8, warmup=3), "clip": 1.0},
    "other_optimizer": {"optimizer": lambda p: torch.optim.RMSprop(p, 1e-3), "clip": 1.0},
    "validation": {"validate_every": 3, "patience": 5},
    "tasks_outside": {"tasks": Numpy()},
    "noise_of_the_method": {},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_that_of_eager_steps(kind, uncompiled):
    options = dict(RUNS[kind])
    if kind == "validation":
        options["validation"] = sinusoids(3, dtype=F64)

    def make():
        if kind == "noise_of_the_method":
            model_ = bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5), "normal")
            return bm.ABML(model_, num_particles=2, inner_steps=1)
        return bm.MAML(model())

    first = make()
    second = make()
    second.load_state_dict(first.state_dict(), strict=False)
    found, ours = run(first, compile="inductor", **options)
    expected, theirs = run(second, **options)
    assert found.compiled.startswith("compiled at step 2: 1 graph(s)")
    assert ("drawn before" in found.compiled) == (kind == "tasks_outside")
    assert ("step after" in found.compiled) == (kind == "other_optimizer")
    assert expected.compiled is None
    assert off(losses(found), losses(expected)) < 1e-12
    assert off(ours, theirs) < 1e-12
    assert losses(found).unique().numel() == 8  # fresh tasks in each step
    rates = [entry["rate"] for entry in found.history]
    assert rates == [entry["rate"] for entry in expected.history]


def test_a_resumed_run_is_bit_identical(tmp_path, uncompiled):
    _, ours = run(compile="inductor")
    run(compile="inductor", steps=5, out=tmp_path / "run")
    _, resumed = run(compile="inductor", out=tmp_path / "run", resume=True)
    assert torch.equal(ours, resumed)
    _, other = run(compile="inductor", seed=1)
    assert not torch.equal(ours, other)


@pytest.mark.parametrize(("first", "then"), [("inductor", "off"), ("off", "inductor")])
def test_a_run_is_resumed_with_or_without_the_compiler(first, then, tmp_path, uncompiled):
    _, whole = run()
    run(compile=first, steps=5, out=tmp_path / "run")
    result, ours = run(compile=then, out=tmp_path / "run", resume=True)
    assert (result.compiled is None) == (then == "off")
    assert off(ours, whole) < 1e-12
    _, short = run(steps=5)
    assert off(short, whole) > 1e-6


class ReadsBack(bm.MAML):
    """Lets a number leave the graph: another in each step."""

    def _task_loss(self, batch, theta, generator):
        return super()._task_loss(batch, theta, generator) * (1 + 0.1 * float(batch.query.y.detach().mean()))


def test_what_is_no_graph_falls_back_and_names_the_line(uncompiled):
    with pytest.warns(CompileWarning, match="float\\(batch.query.y") as caught:
        found, ours = run(ReadsBack(model()), compile="inductor")
    assert "test_compile.py, line" in str(caught[0].message)
    assert "not compiled" in found.compiled
    _, theirs = run(ReadsBack(model()))
    assert torch.equal(ours, theirs)


def test_a_condition_that_fails_now_and_then_makes_that_step_eagerly(uncompiled):
    class Branches(bm.MAML):
        def _task_loss(self, batch, theta, generator):
            loss = super()._task_loss(batch, theta, generator)
            return loss * 2 if bool(batch.query.y.detach().amax() > 4.95) else loss

    found, ours = run(Branches(model()), compile="inductor", steps=30)
    _, theirs = run(Branches(model()), steps=30)
    _, without = run(steps=30)
    assert found.compiled.startswith("compiled at step")
    assert off(ours, theirs) < 1e-12
    assert off(without, theirs) > 1e-6  # the branch was taken


def test_auto_compiles_long_runs_alone(uncompiled, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, ours = run(compile="auto", steps=14)
        assert "would not win back" in found.compiled
        assert torch.equal(ours, run(steps=14)[1])
        for name in ("SECONDS", "SECONDS_A_NODE", "TIMES_CAPTURE"):
            monkeypatch.setattr(f"bayesmeta.train.compilation.compiling.{name}", 0.0)
        found, ours = run(compile="auto", steps=20)
    assert found.compiled.startswith("compiled at step 12")
    assert off(ours, run(steps=20)[1]) < 1e-12


def test_pieces_are_not_compiled(uncompiled):
    with pytest.warns(CompileWarning, match="accumulate"):
        _, ours = run(compile="inductor", accumulate=2)
    assert torch.equal(ours, run(accumulate=2)[1])


def test_running_statistics_move_as_in_eager_steps(uncompiled):
    """A buffer that a step changes is changed once a step, whatever was tried in between."""

    class Counts(bm.MAML):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("mean", torch.zeros(()))

        def _task_loss(self, batch, theta, generator):
            self.mean.mul_(0.9).add_(0.1 * batch.query.y.detach().mean())
            return super()._task_loss(batch, theta, generator)

    means = []
    for mode in ("inductor", "off"):
        method = Counts(model())
        run(method, compile=mode)
        means.append(float(method.mean))
    assert means[0] == pytest.approx(means[1], rel=1e-12)
    assert means[1] != 0


def test_an_unknown_mode():
    with pytest.raises(OptionError, match="'jit'"):
        run(compile="jit")


def test_arguments_have_one_layout():
    """Support and query are often views of one tensor, and compiled code is for memory as it lay when it was made."""
    batch = sinusoids()
    assert not batch.support.x.is_contiguous()
    tensors, key = flatten(batch)
    assert all(t.is_contiguous() for t in tensors)
    again = rebuild(batch, tensors)
    assert torch.equal(again.support.x, batch.support.x)
    assert torch.equal(again.query.y, batch.query.y)
    assert flatten(again)[1] == key
    assert flatten(sinusoids(support=9))[1] != key
