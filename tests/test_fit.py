"""The training loop: same seed same run, bit-identical resume also after kill -9, errors that keep what was good."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.train import checkpoint
from tests.programs import TwoSites, batch_of

TASKS = bm.tasks.Sinusoid(noise=0.1)


def make(kind="maml"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "maml":
            return bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.7)), inner_lr=0.05)
        if kind == "last_layer":
            return bm.BayesianLastLayer(
                bm.NeuralTaskModel(bm.nets.mlp(1, [8, 8], 1), bm.Gaussian(0.5, learn_scale=True), task_modules="head")
            )
        return bm.ABML(TwoSites(), inner_steps=2, inner_lr=1e-3, global_guide="normal")


def train(method, steps=60, **options):
    options = {"tasks_per_step": 8, "progress": False, "seed": 3, "log_every": 10, "device": "cpu"} | options
    return bm.fit(method, TASKS, steps=steps, **options)


def state(method):
    return {k: v.clone() for k, v in method.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


VALIDATION = TASKS.sample(10, support=10, query=10, generator=99)


@pytest.mark.parametrize("kind", ["maml", "last_layer", "abml"])
def test_training_lowers_the_loss_and_follows_the_seed(kind):
    first, second, other = make(kind), make(kind), make(kind)
    result = train(first, 200, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    losses = [h["loss"] for h in result.history]
    assert sum(losses[-5:]) < sum(losses[:5])
    train(second, 200, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    assert same(state(first), state(second))
    train(other, 200, seed=4, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    assert not same(state(first), state(other))


def test_global_state_is_left_alone():
    before = (torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    train(make("abml"), 5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())


OPTIONS = {
    "optimizer": lambda p: torch.optim.AdamW(p, 1e-2),
    "schedule": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 60),
    "validation": VALIDATION,
    "validate_every": 7,
    "clip": 50.0,
    "checkpoint_every": 10,
}


@pytest.mark.parametrize("kind", ["maml", "last_layer", "abml"])
def test_a_resumed_run_is_bit_identical(kind, tmp_path):
    whole, half, resumed = make(kind), make(kind), make(kind)
    a = train(whole, 60, out=tmp_path / "a", **OPTIONS)
    train(half, 30, out=tmp_path / "b", **OPTIONS)
    b = train(resumed, 60, out=tmp_path / "b", resume=True, **OPTIONS)
    assert same(state(whole), state(resumed))
    assert a.best_validation == b.best_validation
    # the end of the first half was validated and logged too
    assert [h for h in a.history if h["step"] != 30] == [h for h in b.history if h["step"] != 30]
    last = [checkpoint.load(tmp_path / n / "checkpoint.pt") for n in "ab"]
    assert same(last[0]["method"], last[1]["method"])
    steps = [[json.loads(line)["step"] for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "ab"]
    assert steps[1] == sorted(set(steps[1]))
    assert set(steps[0]) <= set(steps[1])


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.test_fit import OPTIONS, make, train
resume = sys.argv[1] == "resume"
from bayesmeta.train.loop import Loop
advance = Loop.advance
def slow(self):
    advance(self)
    if not resume:
        time.sleep(0.02)
Loop.advance = slow
train(make("last_layer"), 60, out={out!r}, resume=resume, **OPTIONS)
"""


def test_resume_after_kill_9_is_bit_identical(tmp_path):
    whole = make("last_layer")
    train(whole, 60, out=tmp_path / "whole", **OPTIONS)
    script = SCRIPT.format(root=str(Path(__file__).parents[1]), out=str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", script, "start"], stderr=subprocess.PIPE)
    last = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not (last.exists() and checkpoint.load(last)["step"] >= 20):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert checkpoint.load(last)["step"] < 60, "the kill came too late to show anything"
    subprocess.run([sys.executable, "-c", script, "resume"], check=True)
    a = checkpoint.load(tmp_path / "whole" / "checkpoint.pt")
    b = checkpoint.load(last)
    assert b["step"] == 60
    assert same(a["method"], b["method"])
    assert torch.equal(a["generator"], b["generator"])
    assert a["best"]["loss"] == b["best"]["loss"]
    assert same(a["best"]["state"], b["best"]["state"])
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)


def test_best_on_validation_is_what_remains():
    method = make("last_layer")
    options = OPTIONS | {"optimizer": lambda p: torch.optim.SGD(p, 0.05), "schedule": None, "clip": 1.0}
    options.pop("checkpoint_every")
    result = train(method, 60, **options)
    validated = {h["step"]: h["validation"] for h in result.history if "validation" in h}
    assert result.best_validation == min(validated.values()) == validated[result.best_step]
    again = method.loss(VALIDATION, generator=0)
    assert again.item() == pytest.approx(result.best_validation, rel=1e-6)


def test_patience_stops_early():
    result = train(
        make(), 400, validation=VALIDATION, validate_every=5, patience=2, optimizer=lambda p: torch.optim.SGD(p, 0.0)
    )
    assert result.steps == 15  # the first is the best, then two without a better one
    assert result.best_step == 5


def test_a_non_finite_loss_names_the_step_and_keeps_the_checkpoint(tmp_path):
    method = make()
    good = train(method, 20, out=tmp_path, checkpoint_every=10)
    kept = checkpoint.load(good.out / "checkpoint.pt")
    explode = {"optimizer": lambda p: torch.optim.SGD(p, 1e30), "checkpoint_every": 1}
    with pytest.raises(errors.NonFiniteLossError, match="at step 2") as caught:
        train(make(), 60, **explode)
    assert caught.value.step == 2
    again = pickle.loads(pickle.dumps(caught.value))  # as a worker process sends it back
    assert (str(again), again.step) == (str(caught.value), 2)
    with pytest.raises(errors.NonFiniteLossError):
        train(make(), 60, out=tmp_path / "bad", optimizer=lambda p: torch.optim.SGD(p, math.inf), checkpoint_every=1)
    assert not (tmp_path / "bad" / "checkpoint.pt").exists()
    assert same(checkpoint.load(tmp_path / "checkpoint.pt")["method"], kept["method"])


def test_a_folder_with_a_run_is_refused(tmp_path):
    train(make(), 5, out=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(errors.RunFolderError, match="already holds a run"):
        train(make(), 5, out=tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    with pytest.raises(errors.RunFolderError, match="exclude each other"):
        train(make(), 5, out=tmp_path, resume=True, overwrite=True)
    train(make(), 5, out=tmp_path, overwrite=True, seed=9)
    assert (tmp_path / "checkpoint.pt").read_bytes() != before
    with pytest.raises(errors.RunFolderError, match="no run to resume"):
        train(make(), 5, out=tmp_path / "new", resume=True)
    with pytest.raises(errors.RunFolderError, match="is a file"):
        train(make(), 5, out=tmp_path / "checkpoint.pt")
    with pytest.raises(errors.OptionError, match=r"needs out="):
        train(make(), 5, resume=True)
    with pytest.raises(errors.OptionError, match="steps"):
        train(make(), 0)


def test_a_checkpoint_of_another_model_or_a_truncated_one_is_refused(tmp_path):
    train(make(), 5, out=tmp_path)
    with pytest.raises(errors.CheckpointError, match="belongs to method MAML"):
        train(make("last_layer"), 10, out=tmp_path, resume=True)
    other = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [9], 1), bm.Gaussian(0.7)), inner_lr=0.05)
    with pytest.raises(errors.CheckpointError, match=r"'program\.prior\.loc' is \[25\]"):
        train(other, 10, out=tmp_path, resume=True)
    rate = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.7)), inner_lr=0.06)
    with pytest.raises(errors.CheckpointError, match=r"'inner_lr' is 0\.05 in the checkpoint and 0\.06 here"):
        train(rate, 10, out=tmp_path, resume=True)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(part)
        with pytest.raises(errors.CheckpointError, match="cannot be read"):
            train(make(), 10, out=tmp_path, resume=True)
        assert path.read_bytes() == part


def test_loading_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch pwned",))

    torch.save({"format": 1, "evil": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not Path("pwned").exists()


def test_a_trained_method_is_loaded_from_its_folder(tmp_path):
    for kind in ("maml", "abml", "last_layer"):
        method = make(kind)
        train(method, 30, out=tmp_path / kind, validation=VALIDATION, validate_every=10)
        loaded = bm.load_method(tmp_path / kind, make(kind), VALIDATION)
        assert same(state(method), state(loaded))
    with pytest.raises(errors.CheckpointError, match="no file"):
        bm.load_method(tmp_path / "nowhere", make(), VALIDATION)


def test_posteriors_are_saved_and_loaded(tmp_path):
    observations = batch_of(3, 4)
    for kind in ("maml", "abml", "last_layer"):
        method = make(kind)
        posterior = method.adapt(observations)
        posterior.save(tmp_path / "posterior.pt")
        loaded = bm.load_posterior(tmp_path / "posterior.pt", method.program)
        x = torch.randn(3, 5, 1)
        assert torch.equal(posterior.predict(x, 7), loaded.predict(x, 7))
    (tmp_path / "posterior.pt").write_bytes(b"nothing")
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        bm.load_posterior(tmp_path / "posterior.pt", method.program)


def test_float64_and_another_batch_size_of_the_same_method():
    method = make("last_layer")
    result = train(method, 5, dtype=torch.float64)
    assert next(method.parameters()).dtype == torch.float64
    assert math.isfinite(result.history[-1]["loss"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("kind", ["maml", "last_layer", "abml"])
def test_training_on_cuda(kind):
    method = make(kind)
    result = train(method, 20, device="cuda")
    assert next(method.parameters()).is_cuda
    assert math.isfinite(result.history[-1]["loss"])
    support = TASKS.sample(4, support=10, query=5, generator=1).support.to("cuda")
    assert method.adapt(support).predict(support.x, 5).is_cuda


def test_a_run_of_other_options_is_not_resumed(tmp_path):
    train(make(), 5, out=tmp_path, config={"split": 0})
    for options, name in (
        ({"seed": 4}, "seed"),
        ({"support": 9}, "support"),
        ({"tasks_per_step": 4}, "tasks_per_step"),
    ):
        with pytest.raises(errors.CheckpointError, match=f"had {name} ="):
            train(make(), 10, out=tmp_path, resume=True, config={"split": 0}, **options)
    with pytest.raises(errors.CheckpointError, match="had split = 0, and here it is 1"):
        train(make(), 10, out=tmp_path, resume=True, config={"split": 1})
    train(make(), 10, out=tmp_path, resume=True, config={"split": 0})


def test_a_gradient_that_is_not_finite_changes_nothing():
    class Root(torch.nn.Module):
        """The square root at 0 has a finite value and an infinite gradient."""

        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(()))

        def prepare(self, batch):
            pass

        def loss(self, batch, *, generator=None):
            return self.x.square().sqrt() + self.x

    method = Root()
    with pytest.raises(errors.NonFiniteLossError, match="step 1"):
        train(method, 5)
    assert method.x.item() == 0.0


def test_validation_in_other_units_is_refused():
    from bayesmeta.tasks import fertility_split

    split = fertility_split(0)
    method = bm.BayesianLastLayer(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5), task_modules="head"))
    raw = split.validation.with_standardizer(None).all(support=10)
    with pytest.raises(errors.DataError, match="same units"):
        bm.fit(method, split.train, steps=2, support=10, query=None, validation=raw, progress=False, device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])},
        {"validation": TASKS},
        {"device": "mps"},
        {"device": "toaster"},
        {"steps": 0},
        {"validate_every": 0},
    ],
)
def test_what_is_no_option(options):
    with pytest.raises(errors.OptionError):
        train(make(), **({"steps": 5} | options))


def test_what_is_no_method_or_tasks():
    with pytest.raises(errors.OptionError, match="expected one with loss"):
        bm.fit(object(), TASKS, steps=1)
    with pytest.raises(errors.OptionError, match="task distribution"):
        bm.fit(make(), VALIDATION, steps=1)
    with pytest.raises(errors.OptionError, match="loss takes a TaskBatch"):
        make().loss(VALIDATION.support)


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path):
    """Its folder has a configuration and a log, and nothing to go on with."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "log.jsonl").write_text('{"step": 3}\n')
    options = {"steps": 2, "out": out, "progress": False}

    def method():
        torch.manual_seed(0)
        return bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5), "point"))

    with pytest.raises(errors.RunFolderError, match="already holds a run"):
        bm.fit(method(), bm.tasks.Sinusoid(), **options)
    assert bm.fit(method(), bm.tasks.Sinusoid(), resume=True, **options).steps == 2
    assert (out / "checkpoint.pt").exists()
    assert '"step": 3' not in (out / "log.jsonl").read_text()
