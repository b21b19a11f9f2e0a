"""Compiled steps when something changes that is no tensor of theirs: modules, options, data, Python's own state."""

import contextlib
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

import bayesmeta as bm
from bayesmeta.errors import CaptureError, CompileWarning
from bayesmeta.train.compilation.compiled import CompiledStep
from bayesmeta.train.compilation.updates import Update
from bayesmeta.train.compilation.watching import CHECK_EVERY, ChanceError, OutdatedError, next_check

F64 = torch.float64


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The captured graph as it is."""
    monkeypatch.setattr("bayesmeta.train.compilation.compiled_svi.LEAST", 5)
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs: graph)


def adam(parameters):
    return torch.optim.Adam(parameters, 0.05)


X = torch.linspace(-2, 2, 12, dtype=F64)
Y = 1.5 * X + 0.3 * torch.sin(7 * X)


def zero():
    return X.new_zeros(())


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(zero(), 1.0))
    with pyro.plate("d", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)


def guide(x, y=None):
    location = pyro.param("l", lambda: X.new_zeros(2))
    pyro.sample("w", dist.Normal(location[0], location[1].exp()))


def train(mode, program=model, variational=guide, optim=adam, steps=16, change=None, given=None, elbo=None, **options):
    """Losses, the object, and torch's generator at the end; ``change(i, svi)`` is called before each step."""
    pyro.set_rng_seed(0)
    svi = bm.MetaSVI(program, variational, optim, elbo or Trace_ELBO(), compile=mode, **options)
    for i in range(steps):
        if change is not None:
            change(i, svi)
        svi.step(*((X, Y) if given is None else given(i)))
    return torch.tensor(svi.losses, dtype=F64), svi, torch.get_rng_state()


def check_same(make, compiled=True, **options):
    """What ``make()`` gives as arguments of :func:`train` is the same in both modes; gives the compiled object."""
    (ours, svi, state), (theirs, _, expected) = (train(mode, **make(), **options) for mode in ("inductor", "off"))
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert torch.allclose(ours[finite], theirs[finite], rtol=1e-11)
    assert torch.equal(state, expected)
    assert svi.compiled.startswith("compiled") == compiled, svi.compiled
    return svi


# -- Python's own state -------------------------------------------------------------------------------------------


def annealed(scale):
    def program(x, y=None):
        with pyro.poutine.scale(scale=scale()):
            w = pyro.sample("w", dist.Normal(zero(), 1.0))
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)

    return program


def test_a_number_that_changes_later_is_found_by_comparing(monkeypatch):
    """A weight of the prior that the user's loop sets: 1e-6 off is seen at the next comparison, and told."""
    monkeypatch.setattr("bayesmeta.train.compilation.watching.CHECKS", (2, 8, 1000))

    def make():
        weight = [0.5]

        def change(i, svi):
            weight[0] = 0.5 if i < 6 else 0.500001

        return {"program": annealed(lambda: weight[0]), "change": change}

    with pytest.warns(CompileWarning, match=r"compared after 8 steps.*changes from step to step.*kept the value"):
        ours, svi, _ = train("inductor", **make())
    theirs, *_ = train("off", **make())
    assert svi.compiled.startswith("not compiled")
    assert torch.allclose(ours, theirs, rtol=1e-4)
    assert torch.allclose(ours[:6], theirs[:6], rtol=1e-12)
    assert not torch.equal(ours[6:8], theirs[6:8])  # the limit that the documentation states
    with warnings.catch_warnings():  # control: a number that stays is compared as often, and nothing is found
        warnings.simplefilter("error")
        check_same(lambda: {"program": annealed(lambda: 0.5)})


def test_a_counter_is_found_when_the_step_is_captured():
    count = [0]

    def scale():
        count[0] += 1
        return count[0] / 1e9

    with pytest.warns(CompileWarning, match="changes from step to step"):
        _, svi, _ = train("inductor", annealed(scale), steps=4)
    assert svi.compiled.startswith("not compiled")


def test_several_steps_in_one_graph_are_compared_too():
    weight = [0.5]
    pyro.set_rng_seed(0)
    svi = bm.MetaSVI(annealed(lambda: weight[0]), guide, adam, Trace_ELBO(), compile="inductor")
    svi.run(12, X, Y)
    assert "steps in one graph" in svi.compiled
    weight[0] = 0.6
    with pytest.warns(CompileWarning, match="compared after"):
        svi.run(40, X, Y)
    assert svi.steps == 52


def test_when_it_is_compared():
    found = [0]
    while found[-1] < 9000:
        found.append(next_check(found[-1]))
    assert found[1:] == [2, 5, 10, 30, 100, 300, 1000, 4000, 7000, 10000]
    assert next_check(4001) == next_check(5000) == 1000 + 2 * CHECK_EVERY


def test_a_comparison_leaves_no_trace():
    """Buffers and generators of a run are those of a run without comparisons, which is check_same's other side."""
    check_same(lambda: {"program": Counting()}, steps=34)


# -- modules ------------------------------------------------------------------------------------------------------


class Counting(PyroModule):
    """Its buffer is part of the loss, and changed in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", X.new_zeros(()))

    def forward(self, x, y=None):
        self.count.add_(1)
        w = pyro.sample("w", dist.Normal(0.001 * self.count, 1.0))
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)


class Network(PyroModule):
    """A guide with dropout, and a running mean."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(F64)
        self.norm = nn.BatchNorm1d(1).to(F64)

    def forward(self, x, y=None):
        out = self.net(self.norm(y[:, None])).mean(0)
        pyro.sample("w", dist.Normal(out[0], out[1].exp()))


def changing(what):
    def make():
        network = Network()
        return {"variational": network, "change": lambda i, svi: what(network) if i == 8 else None}

    return make


def freeze(network):
    network.net[0].weight.requires_grad_(False)


def replace(network):
    for p in network.parameters():
        p.data = p.data * 0.5


def other_buffer(network):
    network.norm.running_mean = torch.ones(1, dtype=F64)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
@pytest.mark.parametrize("what", [lambda n: n.eval(), freeze, replace, other_buffer])
def test_modules_that_change_are_seen(what):
    svi = check_same(changing(what))
    assert svi.compiled.startswith("compiled at step 10")  # anew, after one eager step
    unchanged, *_ = train("off", **changing(lambda n: None)())
    if what is not other_buffer:  # which BatchNorm does not read in training
        assert not torch.allclose(svi_losses(svi), unchanged, rtol=1e-6), "control: the change matters"


def svi_losses(svi):
    return torch.tensor(svi.losses, dtype=F64)


def test_modules_that_change_all_the_time_make_steps_eager():
    def make():
        network = Network()
        return {"variational": network, "change": lambda i, svi: network.train(i % 2 == 0)}

    with pytest.warns(CompileWarning, match=r"train\(\) or eval\(\)"):
        check_same(make, compiled=False)


class Reassigns(Counting):
    def forward(self, x, y=None):
        self.count = 0.9 * self.count + x.mean()
        return model(x, y)


def test_a_buffer_that_is_assigned_anew_is_no_graph():
    ours, theirs = Reassigns(), Reassigns()
    with pytest.warns(CompileWarning, match="buffer 'count' is assigned anew"):
        train("inductor", ours, given=lambda i: (X + i, Y))
    train("off", theirs, given=lambda i: (X + i, Y))
    assert torch.equal(ours.count, theirs.count)
    assert float(theirs.count) > 1


@pytest.mark.parametrize("optim", [adam, lambda p: torch.optim.RMSprop(p, 0.01)])
def test_buffers_of_a_step_that_is_skipped_are_put_back(optim):
    """In the graph where the update is part of it, around the call where it is not."""
    networks = []

    def make():
        networks.append(Network())
        return {"variational": networks[-1], "given": lambda i: (X, torch.full_like(Y, 1e200) if i == 9 else Y + i)}

    with pytest.warns(UserWarning, match="at step 10"):
        svi = check_same(make, optim=optim, nan_policy="skip")
    assert svi.skipped == 1
    ours, theirs = (n.norm for n in networks)
    assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=1e-12)
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 15


def test_a_norm_that_overflows_is_not_finite():
    """The loss is finite and each gradient is, but the norm is not: the graph leaves the step to the eager one."""

    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(zero(), 1.0))
        pyro.factor("f", torch.where(y.sum() > 100, Y.new_tensor(1e160), Y.new_tensor(1.0)) * w)

    def make():
        return {"program": program, "given": lambda i: (X, Y + (100 if i == 9 else 0))}

    svi = check_same(make)
    step = next(iter(svi._compiler.graphs.values()))
    moment = svi.optimizer.state[svi._groups[0][0]]["exp_avg"]
    before = moment.clone()
    loss, norm = step([X, Y + 100])
    assert loss.isfinite()
    assert not norm.isfinite()
    assert torch.equal(moment, before)


def test_moved_buffers_are_put_back_where_a_condition_breaks():
    class Branches(Counting):
        def forward(self, x, y=None):
            self.count.add_(1)
            w = pyro.sample("w", dist.Normal(zero(), 1.0))
            with pyro.plate("d", len(x)):
                pyro.sample("y", dist.Normal(w * x, 0.5 if bool(y.sum() < 50) else 2.0), obs=y)

    modules = []

    def make():
        modules.append(Branches())
        return {"program": modules[-1], "given": lambda i: (X, Y + (10 if i in (8, 11) else 0))}

    svi = check_same(make)
    assert "2 made again eagerly" in svi.compiled
    assert [float(m.count) for m in modules] == [16, 16]


def test_a_buffer_is_known_by_what_is_written_not_by_its_value():
    """It was written, with the same value, when the step was captured."""
    buffers = nn.Module()
    buffers.register_buffer("most", torch.zeros(()))
    p, data = nn.Parameter(torch.ones(())), torch.zeros(())

    def objective(x):
        buffers.most.copy_(torch.maximum(buffers.most, x))
        loss = (p - x).square()
        return loss, loss

    optimizer = torch.optim.RMSprop([p], 0.1)
    step = CompiledStep(objective, [p], optimizer, [], modules=[buffers], arguments=[data]).capture().compile()
    assert step._moved == [buffers.most]
    step([torch.tensor(torch.inf)])
    assert float(buffers.most) == 0, "a step that is not finite changes nothing"
    step([torch.tensor(2.0)])
    assert float(buffers.most) == 2
    step.undo()
    assert float(buffers.most) == 0


# -- data ---------------------------------------------------------------------------------------------------------


def test_an_element_of_a_list_that_is_replaced_is_seen():
    def make():
        data = [X, Y]

        def change(i, svi):
            data[1] = Y + 3 if i > 7 else Y

        return {"program": lambda d: model(*d), "variational": lambda d: guide(*d), "change": change,
                "given": lambda i: (data,)}  # fmt: skip

    check_same(make)


def test_data_behind_a_copy_are_seen():
    def make(strided):
        target = Y.repeat_interleave(2)[::2].clone() if not strided else Y.repeat_interleave(2)[::2]

        def change(i, svi):
            if i == 8:
                target.data.add_(3)

        return {"change": change, "given": lambda i: (X, target)}

    for strided in (True, False):
        svi = check_same(lambda strided=strided: make(strided))
        assert (svi._compiler._same is None) == strided  # the quick path is for what the graph itself reads


def test_a_batch_changed_in_place_is_seen():
    def program(x, y=None, mask=None):
        w = pyro.sample("w", dist.Normal(zero(), 1.0))
        with bm.task_plate(x), bm.shot_plate(x, mask):
            pyro.sample("y", dist.Normal(w * x.squeeze(-1), 0.5), obs=y)

    def make():
        x, y = X.reshape(3, 4, 1).clone(), Y.reshape(3, 4).clone()
        batch = bm.TaskBatch(bm.Observations(x[:, :2], y[:, :2]), bm.Observations(x[:, 2:], y[:, 2:]))
        return {"program": program, "variational": lambda x, y=None, mask=None: guide(x),
                "change": lambda i, svi: y.add_(3) if i == 8 else None, "given": lambda i: (batch,)}  # fmt: skip

    check_same(make)


def test_data_outside_of_their_support_are_refused():
    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(zero(), 1.0))
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=w * x), obs=y)

    good = (Y > 0).to(F64)
    for mode in ("inductor", "off"):
        with pytest.raises(ValueError, match="support"):
            train(mode, program, given=lambda i: (X, good + 2.0 * (i == 9)))
    svi = check_same(lambda: {"program": program, "given": lambda i: (X, good)})
    graph = next(iter(svi._compiler.graphs.values()))
    assert len(graph.captured.conditions) == 1
    plain = check_same(lambda: {})
    assert not next(iter(plain._compiler.graphs.values())).captured.conditions  # a Normal asks for nothing
    with pyro.validation_enabled(False):
        svi = check_same(lambda: {"program": program, "given": lambda i: (X, good + 2.0 * (i == 9))})
    assert "again" not in svi.compiled


# -- optimizers ---------------------------------------------------------------------------------------------------


def sgd(momentum):
    return lambda p: torch.optim.SGD(p, 1e-3, momentum=momentum, dampening=0.5)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.9), (0.9, 0.0), (0.9, 0.5)])
def test_a_momentum_that_changes(before, after):
    def change(i, svi):
        if i == 8:
            svi.optimizer.param_groups[0]["momentum"] = after

    svi = check_same(lambda: {"optim": sgd(before), "change": change})
    assert svi.compiled.startswith(f"compiled at step {10 if 0 in (before, after) else 2}")


def test_an_update_notices_parameters_and_groups_that_are_new():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([p], 0.1)
    update = Update(optimizer)
    assert update.refresh()
    optimizer.add_param_group({"params": [q]})
    assert not update.refresh()


def test_parameters_made_in_a_later_step():
    """Of another shape of data: the step that makes them is eager, the graphs that there are stay in use."""

    def variational(x, y=None):
        location = pyro.param(f"l{len(x)}", lambda: 0.1 * torch.randn(2, dtype=F64))
        pyro.sample("w", dist.Normal(location[0], location[1].exp()))

    svi = check_same(lambda: {"variational": variational, "given": lambda i: (X[: 12 - i % 2], Y[: 12 - i % 2])})
    assert "2 graph(s)" in svi.compiled


# -- falling back -------------------------------------------------------------------------------------------------


def test_what_fails_by_its_draws_is_tried_again(monkeypatch):
    capture, calls = CompiledStep.capture, []

    def unlucky(self, *args):
        calls.append(None)
        if len(calls) < 3:
            raise ChanceError("no factor")
        return capture(self, *args)

    monkeypatch.setattr(CompiledStep, "capture", unlucky)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi = check_same(lambda: {})
    assert svi.compiled.startswith("compiled at step 4")
    monkeypatch.setattr(CompiledStep, "capture", lambda self, *args: (_ for _ in ()).throw(ChanceError("no factor")))
    with pytest.warns(CompileWarning, match="no factor"):
        check_same(lambda: {}, compiled=False)


def test_a_matrix_without_a_factor_is_chance():
    p = nn.Parameter(torch.ones((), dtype=F64))

    def objective():
        loss = torch.linalg.cholesky(-p * torch.eye(2, dtype=F64)).sum()
        return loss, loss

    with pytest.raises(ChanceError):
        CompiledStep(objective, [p], torch.optim.SGD([p], 0.1), []).capture()
    with pytest.raises(CaptureError, match="no parameter") as caught:
        CompiledStep(lambda: (p.detach() + 0 * p, (p * 0).detach().requires_grad_()), [p], adam([p]), []).capture()
    assert not isinstance(caught.value, (ChanceError, OutdatedError))


class Coin:
    """One support point more or fewer, by the draw of a coin: a value that a graph of the tasks' drawing reads."""

    num_tasks = None

    def sample(self, num_tasks, *, support, query, generator=None):
        more = int(torch.randint(2, (), generator=generator))
        return bm.tasks.Sinusoid().sample(num_tasks, support=support + more, query=query, generator=generator)


@pytest.mark.parametrize("seed", [0, 1])
def test_tasks_that_break_a_graph_are_drawn_before_it(seed):
    results = []
    for mode in ("inductor", "off"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5)))
        result = bm.fit(
            method, Coin(), steps=40, tasks_per_step=3, seed=seed, progress=False, device="cpu", compile=mode, dtype=F64
        )
        results.append((result, torch.cat([p.detach().flatten() for p in method.parameters()])))
    assert "drawn before" in results[0][0].compiled
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-10)


def test_a_factor_that_fails_within_a_block_leaves_what_was_before():
    """Steps of the block before the one that fails were written; they are put back, and made again one by one."""

    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(zero(), 1.0))
        matrix = (w + 0.1) * torch.eye(3, dtype=F64)
        pyro.sample("z", dist.MultivariateNormal(X.new_zeros(3), scale_tril=torch.linalg.cholesky(matrix)), obs=Y[:3])

    def variational(x, y=None):
        location = pyro.param("l", lambda: torch.tensor([1.0, -0.2], dtype=F64))
        pyro.sample("w", dist.Normal(location[0], location[1].exp()))

    results = []
    for mode in ("inductor", "off"):
        pyro.set_rng_seed(4)
        svi = bm.MetaSVI(program, variational, lambda p: torch.optim.Adam(p, 0.005), Trace_ELBO(), compile=mode)
        failed = 0
        while svi.steps < 60:
            with contextlib.suppress(torch.linalg.LinAlgError):
                svi.run(60 - svi.steps, X, Y)
                break
            failed += 1
            assert failed < 40
        results.append((torch.tensor(svi.losses, dtype=F64), svi.param("l"), failed, svi))
    assert results[0][2] == results[1][2] > 0
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-10)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-10)
    assert "steps in one graph" in results[0][3].compiled


# -- what the comparison and the sums are -------------------------------------------------------------------------


def test_a_graph_that_differs_is_refused(monkeypatch):
    """Compiled code that is off by a hundredth, and a step that is off by a few units in the last place."""

    def wrong(graph, inputs):
        return lambda *given: [1.01 * t if t.is_floating_point() else t for t in graph(*given)]

    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", wrong)
    with pytest.warns(CompileWarning, match="differs from the step itself by 0.01"):
        _, svi, _ = train("inductor")
    assert svi.compiled.startswith("not compiled")


@pytest.mark.parametrize("masked", [False, True])
def test_a_divergence_is_scaled_and_masked(masked):
    def site(location):
        handler = pyro.poutine.mask(mask=X[:3] > -1.7) if masked else pyro.poutine.scale(scale=0.25)
        with pyro.plate("three", 3), handler:
            return pyro.sample("w", dist.Normal(location, 1.0))

    def program(x, y=None):
        w = site(X.new_zeros(3))
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Normal(w.sum() * x, 0.5), obs=y)

    def variational(x, y=None):
        site(pyro.param("l", lambda: X[:3].clone()))

    check_same(lambda: {"program": program, "variational": variational}, elbo=TraceMeanField_ELBO())


@pytest.mark.parametrize("how", ["step", "run"])
def test_a_graph_is_captured_in_its_precision(how):
    pyro.set_rng_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))

    class Amortised(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = network

        def forward(self, x, y=None):
            out = self.net(y[:, None]).mean(0)
            pyro.sample("w", dist.Normal(out[0], out[1].exp()))

    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)

    x, y = X.float(), Y.float()
    svi = bm.MetaSVI(program, Amortised(), adam, Trace_ELBO(), compile="inductor", precision="bf16")
    svi.step(x, y)
    svi.step(x, y)  # run makes graphs only of shapes that come after a first graph
    n = 7
    svi.run(8, x[:n], y[:n]) if how == "run" else svi.step(x[:n], y[:n])
    graphs = svi._compiler.graphs.values()
    assert len(graphs) == 2
    for step in graphs:
        assert any(node.kwargs.get("dtype") is torch.bfloat16 for node in step.captured.graph.graph.nodes)
