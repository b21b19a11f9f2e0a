"""MetaSVI goes on from a file bit by bit: parameters, moments of the optimizer, noise, tasks of an AutoGuide."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.train.loop import MAX_SKIPPED
from tests.programs import TwoSites
from tests.test_fit import train
from tests.test_meta_svi import data, guide, model

TASKS = bm.tasks.FixedTasks(bm.tasks.Sinusoid(noise=0.1).sample(8, support=4, query=2, generator=5))


def adam(parameters):
    return torch.optim.Adam(parameters, 0.05)


class Amortised(torch.nn.Module):
    """A guide whose network no ``pyro.param`` statement announces, and which draws and counts for itself."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 2))
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x, y=None, mask=None):
        self.runs += 1
        means = torch.stack([(x.squeeze(-1) * y).mean(-1), x.squeeze(-1).square().mean(-1)], -1)
        loc, scale = self.network(means).unsqueeze(-2).unbind(-1)
        with bm.task_plate(x):
            pyro.sample("slope", dist.Normal(loc, scale.exp()))


def later(x, y=None, mask=None):
    """A guide with a parameter that batches of few tasks do not reach, so that the optimizer has two groups."""
    b = pyro.param("b", torch.tensor(0.1)) if len(x) > 4 else 0.0
    with bm.task_plate(x):
        pyro.sample("slope", dist.Normal(pyro.param("a", torch.tensor(0.2)) + b, 0.5).expand([len(x), 1]))


def make(kind):
    """A MetaSVI, and a function of a step's number that gives what the step takes."""
    observations = data()
    if kind == "functions":
        return bm.MetaSVI(model, guide, adam, Trace_ELBO()), lambda step: observations
    if kind == "module":
        return bm.MetaSVI(model, Amortised(), adam, Trace_ELBO()), lambda step: observations
    if kind == "later":
        return bm.MetaSVI(model, later, adam, Trace_ELBO()), lambda step: observations.tasks(
            slice(4 if step < 3 else 6)
        )
    if kind == "method":
        method = bm.ABML(TwoSites(), inner_steps=1, inner_lr=1e-3, global_guide="normal")
        batch = bm.tasks.Sinusoid(noise=0.1).sample(4, support=4, query=4, generator=0)
        method.prepare(batch)
        return bm.MetaSVI(method.model, method.guide, adam, Trace_ELBO()), lambda step: batch
    program = TwoSites()
    svi = bm.MetaSVI(program, AutoNormal(program), adam, Trace_ELBO())
    return svi, lambda step: TASKS.sample(3, support=4, generator=step)


KINDS = ["functions", "module", "later", "method", "autoguide"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_bit_by_bit(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi, given = make(kind)
        for step in range(12):
            svi.step(given(step))
        svi.save(tmp_path / "svi.pt")
        expected = [svi.step(given(step)) for step in range(12, 24)]
        final = svi.state_dict()

        torch.manual_seed(1)  # another process: other first values, other noise
        again, given = make(kind)
        again.load(tmp_path / "svi.pt", given(11))
        assert again.steps == 12
        assert [again.step(given(step)) for step in range(12, 24)] == expected
        theirs = again.state_dict()
        for part in ("params", "modules"):
            assert theirs[part].keys() == final[part].keys()
            assert all(torch.equal(theirs[part][name], value) for name, value in final[part].items())
        assert theirs["groups"] == final["groups"]
        assert len(final["groups"]) == (2 if kind == "later" else 1)

        torch.manual_seed(1)
        control, given = make(kind)
        control.load(tmp_path / "svi.pt", given(11), generators=False)
        assert [control.step(given(step)) for step in range(12, 24)] != expected, "control: other noise"


def test_loading_takes_the_moments_along_before_the_first_step(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi, given = make("functions")
        for step in range(12):
            svi.step(given(step))
        state = svi.state_dict()
        again, given = make("functions")
        again.evaluate_loss(given(0))
        again.load_state_dict(state)
        mine, theirs = (s.optimizer.state_dict()["state"] for s in (again, svi))
        assert all(torch.equal(mine[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in theirs)
        svi.step(given(0))
        assert all(not torch.equal(mine[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in theirs), (
            "they share nothing"
        )
        del state["groups"], state["modules"]  # as version 0.1.0 wrote it
        fresh, given = make("functions")
        fresh.evaluate_loss(given(0))
        with pytest.raises(errors.CheckpointError, match="take a step"):
            fresh.load_state_dict(state)


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "svi.pt"
    with torch.random.fork_rng():
        svi, given = make("functions")
        svi.step(given(0))
        svi.save(path)
        other, others = make("autoguide")
        with pytest.raises(errors.SiteError, match="The state has the parameters"):
            other.load(path, others(0))
        sgd = bm.MetaSVI(model, guide, lambda p: torch.optim.SGD([{"params": [v]} for v in p], 0.1), Trace_ELBO())
        with pytest.raises(errors.CheckpointError, match="does not fit a SGD"):
            sgd.load(path, given(0))
        auto, some = make("autoguide")
        auto.step(some(0))
        auto.save(path)
        fresh, _ = make("autoguide")
        three = TASKS.batch.tasks([0, 1, 2]).support
        with pytest.raises(errors.SiteError, match=r"is \[8, 1\] in the state and \[3, 1\] here"):
            fresh.load(path, three)
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(errors.CheckpointError, match="cannot be read"):
            fresh.load(path, some(0))
        method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.7)))
        train(method, 2, out=tmp_path / "run")
        with pytest.raises(errors.CheckpointError, match="no checkpoint of MetaSVI"):
            fresh.load(tmp_path / "run" / "checkpoint.pt", some(0))


# -- losses that are not finite -------------------------------------------------------------------------------------


def spoiled(bad):
    """The model, whose likelihood is infinite at the calls told."""
    calls = []

    def program(x, y=None, mask=None):
        calls.append(1)
        with bm.task_plate(x):
            slope = pyro.sample("slope", dist.Normal(0.0, pyro.param("tau", torch.tensor(1.5))))
            with bm.shot_plate(x, mask):
                y = y * 1e25 if len(calls) in bad else y
                pyro.sample("y", dist.Normal(slope * x.squeeze(-1), 0.3), obs=y)

    return program


def test_a_skipped_step_changes_nothing_and_is_counted():
    observations = data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Amortised()
        svi = bm.MetaSVI(spoiled({3, 5}), module, adam, Trace_ELBO(), nan_policy="skip")
        losses, states = [], []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(7):
                losses.append(svi.step(observations))
                states.append(svi.state_dict())
        assert [math.isfinite(v) for v in losses] == [True, True, False, True, False, True, True]
        assert (svi.steps, svi.skipped) == (7, 2)
        assert ["at step 3" in str(w.message) for w in said] == [True]
        for before, after, same in ((1, 2, True), (2, 3, False), (3, 4, True), (4, 5, False)):
            for part in ("params", "modules"):
                values = [torch.equal(states[before][part][n], v) for n, v in states[after][part].items()]
                assert all(values) if same else not any(values)
        assert module.runs == 5
        assert states[2]["optimizer"]["state"][0]["step"] == states[1]["optimizer"]["state"][0]["step"]
        strict = bm.MetaSVI(spoiled({1}), Amortised(), adam, Trace_ELBO())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(errors.NonFiniteLossError, match="step 1"):
                strict.step(observations)


def test_only_skipping_is_an_error():
    observations = data()
    svi = bm.MetaSVI(spoiled(range(3, 1_000)), guide, adam, Trace_ELBO(), nan_policy="skip")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2 + MAX_SKIPPED - 1):
            svi.step(observations)
        with pytest.raises(errors.NonFiniteLossError, match=f"as at the {MAX_SKIPPED - 1} steps before") as caught:
            svi.step(observations)
    assert caught.value.step == 2 + MAX_SKIPPED
    with pytest.raises(errors.OptionError, match="nan_policy None"):
        bm.MetaSVI(model, guide, adam, Trace_ELBO(), nan_policy=None)
