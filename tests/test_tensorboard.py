"""TensorBoard's curves, read back from the event files."""

import json
import sys
import threading

import pytest
import torch

from bayesmeta import errors
from bayesmeta.train import checkpoint
from bayesmeta.train.events import TAGS, Events
from tests.test_fit import VALIDATION, make, train

THREADS = {t.name for t in threading.enumerate()}  # those of the test runner
OPTIONS = {"validation": VALIDATION, "validate_every": 15, "checkpoint_every": 10}


def curves(folder):
    """{tag: [(step, value), …]} as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def logged(folder):
    """The same from log.jsonl, in the float32 of event files."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {}
    for name, tag in TAGS.items():
        found[tag] = [(line["step"], torch.tensor(line[name]).item()) for line in lines if name in line]
    return found


def test_the_curves_are_the_log(tmp_path):
    train(make(), 35, out=tmp_path, tensorboard=True, **OPTIONS)
    found = curves(tmp_path / "tensorboard")
    assert found == logged(tmp_path)
    assert set(found) == set(TAGS.values())
    assert [step for step, _ in found["train/loss"]] == [10, 15, 20, 30, 35]
    assert [step for step, _ in found["validation/value"]] == [15, 30, 35]
    assert all(value > 0 for _, value in found["speed/tasks_per_second"])
    assert {t.name for t in threading.enumerate()} <= {"MainThread", "tqdm_monitor", *THREADS}


def test_a_folder_of_ones_own_needs_no_out(tmp_path):
    result = train(make(), 20, tensorboard=tmp_path / "curves")
    found = curves(tmp_path / "curves")
    assert [v for _, v in found["train/loss"]] == pytest.approx([h["loss"] for h in result.history])
    assert "validation/value" not in found


def stop_at(step, folder, **options):
    """A run that dies at a step, with events that are newer than its last checkpoint."""

    class Stopped(Exception):
        pass

    def score(method, batch, generator):
        score.calls += 1
        if score.calls == step:
            raise Stopped
        return method.loss(batch, generator=generator).detach()

    score.calls = 0
    with pytest.raises(Stopped):
        train(make(), 60, out=folder, validate_with=score, **options)


def test_a_resumed_run_doubles_no_step(tmp_path, monkeypatch):
    options = {"validation": VALIDATION, "validate_every": 1, "checkpoint_every": 20, "tensorboard": True}

    def score(method, batch, generator):
        return method.loss(batch, generator=generator).detach()

    stop_at(28, tmp_path, **options)
    assert [s for s, _ in curves(tmp_path / "tensorboard")["train/loss"]] == list(range(1, 28))
    train(make(), 40, out=tmp_path, resume=True, validate_with=score, **options)
    found = curves(tmp_path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == list(range(1, 41))
    assert found == logged(tmp_path)
    # control: a writer that is not told where the run goes on leaves steps 21 to 27 twice
    monkeypatch.setattr(Events, "__init__", _without_purge(Events.__init__))
    stop_at(28, tmp_path / "b", **options)
    train(make(), 40, out=tmp_path / "b", resume=True, validate_with=score, **options)
    steps = [step for step, _ in curves(tmp_path / "b" / "tensorboard")["train/loss"]]
    assert len(steps) == 47
    assert len(set(steps)) == 40


def _without_purge(init):
    return lambda self, folder, *, clear=False, resumed_at=None, **options: init(self, folder, clear=clear, **options)


def test_curves_reach_as_far_as_the_checkpoint(tmp_path, monkeypatch):
    """After a kill nothing is flushed any more: what a checkpoint knows must be on disk before it is."""
    order, flush, save = [], Events.flush, checkpoint.save
    monkeypatch.setattr(Events, "flush", lambda self: (flush(self), order.append("flush")))

    def read_and_save(path, content):
        order.append([step for step, _ in curves(tmp_path / "tensorboard")["train/loss"]])
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", read_and_save)
    train(make(), 20, out=tmp_path, tensorboard=True, log_every=1, checkpoint_every=10)
    assert order == ["flush", list(range(1, 11)), "flush", list(range(1, 21))]


def test_two_runs_do_not_share_a_folder(tmp_path):
    train(make(), 20, tensorboard=tmp_path / "curves")
    before = sorted(p.name for p in (tmp_path / "curves").iterdir())
    with pytest.raises(errors.RunFolderError, match="already holds curves"):
        train(make(), 20, tensorboard=tmp_path / "curves", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert sorted(p.name for p in (tmp_path / "curves").iterdir()) == before
    train(make(), 10, tensorboard=tmp_path / "curves", overwrite=True)
    assert [step for step, _ in curves(tmp_path / "curves")["train/loss"]] == [10]
    train(make(), 20, out=tmp_path / "run", tensorboard=True)
    train(make(), 10, out=tmp_path / "run", overwrite=True)  # takes the old curves away with the old run
    assert not list((tmp_path / "run" / "tensorboard").iterdir())


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(errors.OptionError, match=r"needs out="):
        train(make(), 5, tensorboard=True)
    with pytest.raises(errors.OptionError, match="tensorboard is a int"):
        train(make(), 5, tensorboard=3)
    (tmp_path / "file").touch()
    with pytest.raises(errors.RunFolderError, match="is a file"):
        train(make(), 5, tensorboard=tmp_path / "file")
    with pytest.raises(errors.RunFolderError, match="cannot be written"):
        train(make(), 5, tensorboard=tmp_path / "file" / "below")
    train(make(), 5, tensorboard=False)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", "tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(errors.OptionError, match=r"pip install 'bayesmeta\[tensorboard\]'"):
        train(make(), 5, out=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    train(make(), 5, out=tmp_path / "run")
