"""MetaSVI with compiled steps gives the numbers of MetaSVI without."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import bayesmeta as bm
from bayesmeta.errors import CompileWarning, OptionError
from bayesmeta.train.compilation.compiled_svi import LEAST
from tests.programs import batch_of

F64 = torch.float64


@pytest.fixture
def uncompiled(monkeypatch):
    """The captured graph as it is, and several in one however few there are to make."""
    monkeypatch.setattr("bayesmeta.train.compilation.compiled_svi.LEAST", 5)
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs: graph)


def hierarchy(x, y=None, mask=None):
    """A global site, a positive parameter, a latent site for each task."""
    mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 1.0))
    tau = pyro.param("tau", lambda: x.new_tensor(0.8), constraint=dist.constraints.positive)
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(mu, tau))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.5), obs=y)


def data(seed=0, tasks=4, ragged=True):
    observations = batch_of(tasks, 5, seed=seed, dtype=F64, ragged=ragged)
    return observations.x, observations.y, observations.mask


def train(mode, elbo, guide=AutoNormal, steps=8, batches=None, model=hierarchy, **options):
    """Losses, final parameters, and the object."""
    batches = batches or [data()]
    pyro.set_rng_seed(0)
    torch.set_default_dtype(F64)  # AutoGuides make parameters of it
    try:
        svi = bm.MetaSVI(model, guide(model), lambda p: torch.optim.Adam(p, 0.05), elbo, compile=mode, **options)
        losses = [svi.step(*batches[i % len(batches)]) for i in range(steps)]
    finally:
        torch.set_default_dtype(torch.float32)
    flat = torch.cat([p.detach().flatten() for group in svi._groups for p in group])
    return torch.tensor(losses, dtype=F64), flat, svi


ELBOS = {
    "trace": lambda: Trace_ELBO(),
    "mean_field": lambda: TraceMeanField_ELBO(),
    "particles": lambda: Trace_ELBO(num_particles=3),
    "vectorised": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2),
}


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("kind", ELBOS)
def test_steps_are_those_of_eager_svi(kind, guide, uncompiled):
    elbo = ELBOS[kind]()
    if kind == "vectorised" and guide is AutoMultivariateNormal:
        pytest.skip("the program's plates leave no room for this guide's particles")
    losses, ours, svi = train("inductor", elbo, guide)
    expected, theirs, _ = train("off", elbo, guide)
    assert svi.compiled.startswith("compiled at step 2: 1 graph(s)")
    assert svi.steps == 8
    assert svi.losses == losses.tolist()
    assert torch.allclose(losses, expected, rtol=1e-11)
    assert torch.allclose(ours, theirs, rtol=1e-11)
    assert losses.unique().numel() == 8
    other, _, _ = train("off", Trace_ELBO(num_particles=2), guide)
    assert not torch.allclose(other, expected, rtol=1e-3)  # another estimator of the same bound would be seen


def test_new_data_of_the_same_shape_are_seen(uncompiled):
    """A guide without parameters for each task: each step has other tasks."""

    def make(model):
        def guide(x, y=None, mask=None):
            loc = pyro.param("loc", lambda: x.new_zeros(2))
            pyro.sample("mu", dist.Normal(loc[0], 0.3))
            with bm.task_plate(x):
                mean = loc[1] + torch.where(mask, x.squeeze(-1) * y, 0.0).sum(-1, keepdim=True)
                pyro.sample("slope", dist.Normal(mean, 0.2))

        return guide

    batches = [data(seed) for seed in range(3)]
    losses, ours, svi = train("inductor", Trace_ELBO(), make, batches=batches, steps=9)
    expected, theirs, _ = train("off", Trace_ELBO(), make, batches=batches, steps=9)
    assert "1 graph(s)" in svi.compiled
    assert torch.allclose(losses, expected, rtol=1e-11)
    assert torch.allclose(ours, theirs, rtol=1e-11)
    assert "eager" not in svi.compiled
    shapes = [data(tasks=n) for n in range(2, 8)]
    with pytest.warns(CompileWarning, match="4 graphs have been made"):
        _, _, svi = train("inductor", Trace_ELBO(), make, batches=shapes, steps=13)
    assert "4 graph(s)" in svi.compiled
    assert svi.compiled.endswith("4 later steps eager for want of a graph")  # two shapes too many, twice
    once, _, _ = train("off", Trace_ELBO(), make, steps=9)
    assert not torch.allclose(once, expected, rtol=1e-3)


def test_data_changed_in_place_are_seen(uncompiled):
    """The quick path of the same tensors notices that they are no longer the same."""
    x, y, mask = data()
    results = []
    for mode in ("inductor", "off"):
        given = y.clone()
        pyro.set_rng_seed(1)

        def guide(x, y=None, mask=None):
            loc = pyro.param("loc", lambda: torch.zeros(2, dtype=F64))
            pyro.sample("mu", dist.Normal(loc[0], 0.3))
            with bm.task_plate(x):
                pyro.sample("slope", dist.Normal(loc[1].expand(len(x), 1), 0.2))

        svi = bm.MetaSVI(hierarchy, guide, lambda p: torch.optim.SGD(p, 1e-3), Trace_ELBO(), compile=mode)
        values = []
        for i in range(6):
            if i == 4:
                given.add_(1.0)
            values.append(svi.step(x, given, mask))
        results.append(torch.tensor(values, dtype=F64))
    assert torch.allclose(*results, rtol=1e-11)


def test_what_is_not_compiled_says_so(uncompiled):
    with pytest.warns(CompileWarning, match="TraceGraph_ELBO is not compiled"):
        losses, ours, svi = train("inductor", TraceGraph_ELBO())
    expected, theirs, _ = train("off", TraceGraph_ELBO())
    assert torch.equal(losses, expected)
    assert torch.equal(ours, theirs)
    assert svi.compiled.startswith("not compiled: TraceGraph_ELBO")
    with pytest.raises(OptionError, match="'jit'"):
        train("jit", Trace_ELBO())


def test_a_guide_by_the_score_function_is_not_compiled(uncompiled):
    def model(x, y=None, mask=None):
        p = pyro.sample("p", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("n", dist.Poisson(p.exp()), obs=x.new_tensor(2.0))

    def make(model):
        def guide(x, y=None, mask=None):
            loc = pyro.param("loc", lambda: x.new_tensor(0.1))
            pyro.sample("p", dist.Normal(loc, 0.5).has_rsample_(False))

        return guide

    with pytest.warns(CompileWarning, match="'p' is not reparameterised"):
        losses, *_ = train("inductor", Trace_ELBO(), make, model=model)
    assert torch.equal(losses, train("off", Trace_ELBO(), make, model=model)[0])


def test_a_loss_that_is_not_finite_changes_nothing(uncompiled):
    """The step is made again eagerly, which raises or skips as ever."""
    x, y, mask = data()
    bad = (x, torch.where(torch.arange(5) == 0, torch.tensor(1e200, dtype=F64), y), mask)

    def make(model):
        def guide(x, y=None, mask=None):
            loc = pyro.param("loc", lambda: x.new_zeros(2))
            pyro.sample("mu", dist.Normal(loc[0], 0.3))
            with bm.task_plate(x):
                pyro.sample("slope", dist.Normal(loc[1].expand(len(x), 1), 0.2))

        return guide

    batches = [(x, y, mask)] * 4 + [bad] + [(x, y, mask)] * 3
    with pytest.warns(UserWarning, match="at step 5"):
        losses, ours, svi = train("inductor", Trace_ELBO(), make, batches=batches, nan_policy="skip")
    with pytest.warns(UserWarning, match="at step 5"):
        expected, theirs, _ = train("off", Trace_ELBO(), make, batches=batches, nan_policy="skip")
    assert svi.skipped == 1
    assert svi.compiled.startswith("compiled")
    finite = losses.isfinite()
    assert torch.equal(finite, expected.isfinite())
    assert torch.allclose(losses[finite], expected[finite], rtol=1e-11)
    assert torch.allclose(ours, theirs, rtol=1e-11)


def test_auto_waits_until_compiling_may_pay(uncompiled, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, svi = train("auto", Trace_ELBO(), steps=4)
        assert svi.compiled.startswith("not compiled")
        monkeypatch.setattr("bayesmeta.train.compilation.compiled_svi.SECONDS", 0.0)
        losses, _, svi = train("auto", Trace_ELBO())
    assert svi.compiled.startswith("compiled at step 3")
    assert torch.allclose(losses, train("off", Trace_ELBO())[0], rtol=1e-11)


# -- several steps in one graph -----------------------------------------------------------------------------------


def pair(mode, model=hierarchy, steps=33, **options):
    """Losses and parameters of so many steps in one call, and where torch's generator is then."""
    pyro.set_rng_seed(0)

    def guide(x, y=None, mask=None):
        loc = pyro.param("loc", lambda: x.new_zeros(2))
        pyro.sample("mu", dist.Normal(loc[0], 0.3))
        with bm.task_plate(x):
            pyro.sample("slope", dist.Normal(loc[1].expand(len(x), 1), 0.2))

    svi = bm.MetaSVI(model, guide, lambda p: torch.optim.Adam(p, 0.05), Trace_ELBO(), compile=mode, **options)
    losses = svi.run(steps, *data())
    assert svi.steps == steps
    assert svi.losses == losses
    return torch.tensor(losses, dtype=F64), svi.param("loc"), torch.get_rng_state(), svi


def check_same(ours, theirs):
    finite = theirs[0].isfinite()
    assert torch.equal(ours[0].isfinite(), finite)
    assert torch.allclose(ours[0][finite], theirs[0][finite], rtol=1e-10)
    assert torch.allclose(ours[1], theirs[1], rtol=1e-10)
    assert torch.equal(ours[2], theirs[2])  # as many numbers were drawn


def test_several_steps_in_one_graph_are_as_many_steps(uncompiled):
    ours = pair("inductor")
    theirs = pair("off")
    check_same(ours, theirs)
    assert "5 steps in one graph of" in ours[3].compiled
    assert ours[0].unique().numel() == 33
    with pytest.raises(AssertionError):
        check_same(pair("off", steps=32), theirs)


def branching(x, y=None, mask=None):
    """A condition that fails now and then: whether the draw of the global site is large."""
    mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 1.0))
    scale = 2.0 if bool(mu.detach() > 0.8) else 0.5
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(mu, 1.0))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Normal(slope * x.squeeze(-1), scale), obs=y)


def test_a_condition_that_fails_within_a_block(uncompiled):
    ours = pair("inductor", branching)
    check_same(ours, pair("off", branching))
    block = next(iter(ours[3]._compiler._blocks.values()))
    assert ours[3]._compiler._broken > 0
    assert f"{ours[3]._compiler._broken} made again eagerly" in ours[3].compiled
    assert ours[3]._compiler._made > 20
    assert len(block.captured.conditions) == len(block.step.captured.conditions)


def test_a_loss_within_a_block_that_is_not_finite(uncompiled):
    def model(x, y=None, mask=None):
        mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.factor("f", torch.where(mu.detach() > 0.8, torch.inf, 0.0))
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(mu, 1.0))
            with bm.shot_plate(x, mask):
                return pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.5), obs=y)

    with pytest.warns(UserWarning, match="The step is skipped"):
        ours = pair("inductor", model, nan_policy="skip")
    with pytest.warns(UserWarning, match="The step is skipped"):
        theirs = pair("off", model, nan_policy="skip")
    check_same(ours, theirs)
    assert 0 < ours[3].skipped == theirs[3].skipped < 20
    assert ours[3]._compiler._made > 10


def test_an_optimizer_outside_of_the_graph_makes_single_steps(uncompiled):
    pyro.set_rng_seed(0)
    found = []
    for mode in ("inductor", "off"):
        pyro.set_rng_seed(0)
        svi = bm.MetaSVI(
            branching, AutoNormal(branching), lambda p: torch.optim.RMSprop(p, 0.01), Trace_ELBO(), compile=mode
        )
        found.append(svi.run(12, *data()))
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # parameters of AutoNormal are float32 here
    with pytest.raises(OptionError, match="num_steps"):
        svi.run(0, *data())


def test_a_state_that_is_loaded_is_the_one_that_goes_on(uncompiled):
    """Its moments are new tensors, which no graph made before knows."""
    results = []
    for mode in ("inductor", "off"):
        *_, svi = pair(mode, steps=12)
        state, rng = svi.state_dict(), torch.get_rng_state()
        svi.run(8, *data())
        svi.load_state_dict(state)
        torch.set_rng_state(rng)
        losses = svi.run(9, *data())
        results.append((torch.tensor(losses, dtype=F64), svi.param("loc"), torch.get_rng_state()))
    check_same(*results)


def test_few_steps_do_not_wait_for_several_in_one_graph(monkeypatch):
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs: graph)
    monkeypatch.setattr("bayesmeta.train.compilation.compiled_svi.LEAST", 20)
    *_, svi = pair("inductor", steps=20)
    assert "compiled at step 2" in svi.compiled
    assert "steps in one graph" not in svi.compiled  # 19 are left after the first
    svi.run(20, *data())
    assert "5 steps in one graph" in svi.compiled
    assert svi.steps == 40
    assert LEAST == 5_000, "as the docs say"


def test_auto_decides_by_the_steps_that_run_is_asked_for(uncompiled, monkeypatch):
    spent = [0.0]

    def clock():
        spent[0] += 0.1  # of a step
        return spent[0]

    monkeypatch.setattr("bayesmeta.train.compilation.compiled_svi.time.perf_counter", clock)
    *_, svi = pair("auto", steps=300)  # 30 seconds of eager steps: less than twice what compiling takes
    assert not svi._compiler.graphs
    *_, svi = pair("auto", steps=700)
    assert "compiled at step" in svi.compiled
    assert int(svi.compiled.split("compiled at step ")[1].split(":")[0]) < 20, "not after twelve seconds"
    svi._compiler._pays = None  # the graph of several is there
    svi.run(5, *data())


def test_the_first_shape_without_a_graph_is_told(uncompiled):
    from bayesmeta.train.compilation.compiling import MOST_GRAPHS

    batches = [data(tasks=tasks) for tasks in range(2, 5 + MOST_GRAPHS)]
    with pytest.warns(CompileWarning, match="shapes .* and 4 graphs have been made.*Pad the shots") as caught:
        ours = train("inductor", Trace_ELBO(), mean_guide, steps=11, batches=batches)
    assert len([w for w in caught if "graphs have been made" in str(w.message)]) == 1
    theirs = train("off", Trace_ELBO(), mean_guide, steps=11, batches=batches)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-9)
    assert "later steps eager for want of a graph" in ours[2].compiled
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        train("inductor", Trace_ELBO(), mean_guide, steps=11, batches=batches[:MOST_GRAPHS])


def mean_guide(model):
    """A guide of as many tasks as it is given."""

    def guide(x, y=None, mask=None):
        loc = pyro.param("loc", lambda: x.new_zeros(2))
        pyro.sample("mu", dist.Normal(loc[0], 0.3))
        with bm.task_plate(x):
            pyro.sample("slope", dist.Normal(loc[1].expand(len(x), 1), 0.2))

    return guide


@pytest.mark.slow
def test_inductor_on_several_steps(monkeypatch):
    monkeypatch.setattr("bayesmeta.train.compilation.compiled_svi.LEAST", 5)
    check_same(pair("inductor"), pair("off"))


@pytest.mark.slow
def test_inductor_on_a_pyro_program():
    losses, ours, svi = train("inductor", Trace_ELBO())
    expected, theirs, _ = train("off", Trace_ELBO())
    assert svi.compiled.startswith("compiled at step 2")
    assert torch.allclose(losses, expected, rtol=1e-10)
    assert torch.allclose(ours, theirs, rtol=1e-10)
