"""Damaged checkpoints: each is refused by a typed error that names it, and nothing is taken in its place unasked."""

import os
import random
import shutil

import pyro
import pytest
import torch

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.ops import files
from bayesmeta.train import checkpoint
from tests.test_fit import OPTIONS, VALIDATION, make, same, state, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 steps, with a checkpoint every 10, and the same run in one go to step 40."""
    place = tmp_path_factory.mktemp("runs")
    train(make(), 20, out=place / "half", **OPTIONS)
    whole = make()
    train(whole, 40, out=place / "whole", **OPTIONS)
    return place / "half", state(whole)


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def flip(content, where, bit):
    damaged = bytearray(content)
    damaged[where] ^= 1 << bit
    return bytes(damaged)


def damage(content, numbers):
    """One of the things that happen to files."""
    size = len(content)
    where, length = numbers.randrange(size), numbers.randrange(1, 600)
    return numbers.choice(
        [
            lambda: flip(content, where, numbers.randrange(8)),
            lambda: content[:where],  # truncated
            lambda: content[:where] + b"\0" * (size - where),  # the length was written, the rest was not
            lambda: content[:where] + numbers.randbytes(length) + content[where + length :],
            lambda: content[:where] + content[where + length :],  # a piece is missing
            lambda: content + numbers.randbytes(length),
            lambda: content[where:] + content[:where] if where else b"",
            lambda: content[: size - length],
        ]
    )()


def test_50_damaged_checkpoints(folder):
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    numbers = random.Random(0)
    for i in range(50):
        damaged = damage(whole, numbers)
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(errors.CheckpointError, match="cannot be read") as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value)
        if i % 10 == 0:
            with pytest.raises(errors.CheckpointError, match="cannot be read"):
                train(make(), 40, out=folder, resume=True, **OPTIONS)
            assert path.read_bytes() == damaged
    path.write_bytes(whole)
    assert checkpoint.load(path)["step"] == 20  # control


def test_every_bit_of_the_checksum_counts(folder):
    path = folder / "best.pt"
    whole = path.read_bytes()
    for where in range(len(whole) - files._END_SIZE - files._COMMENT - 4, len(whole)):
        for bit in (0, 5):  # the one of 5 makes other letters of a and A
            path.write_bytes(flip(whole, where, bit))
            with pytest.raises(errors.CheckpointError):
                checkpoint.load(path)


@pytest.mark.slow
def test_one_bit_of_every_byte(folder):
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    for where in range(len(whole)):
        path.write_bytes(flip(whole, where, where % 8))
        with pytest.raises(errors.CheckpointError):
            checkpoint.load(path)


def test_torch_alone_would_not_see_a_changed_weight(tmp_path):
    """Why there is a checksum: torch does not look at the one of the archive."""
    path = tmp_path / "x.pt"
    files.write_tensors(path, {"x": torch.full((100,), 1.5)})
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.full((100,), 1.5))  # torch reads ours
    whole = path.read_bytes()
    path.write_bytes(flip(whole, whole.index(torch.full((100,), 1.5).numpy().tobytes()) + 2, 0))
    assert not torch.equal(torch.load(path, weights_only=True)["x"], torch.full((100,), 1.5))
    with pytest.raises(errors.CheckpointError, match="checksum"):
        files.read_tensors(path)


def test_a_file_of_the_version_before_is_read(folder):
    path = folder / "checkpoint.pt"
    content = checkpoint.load(path)
    for name in ("global_generators", "skipped", "last"):
        del content[name]
    torch.save(content, path)
    train(make(), 40, out=folder, resume=True, **OPTIONS)
    assert checkpoint.load(path)["step"] == 40


def test_the_one_before_is_named_and_taken_only_when_asked_for(run, folder):
    path, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    assert checkpoint.load(previous)["step"] == 10
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.CheckpointError, match=r"previous\.pt, is good, of step 10.*resume='previous'"):
        train(make(), 40, out=folder, resume=True, **OPTIONS)
    resumed = make()
    train(resumed, 40, out=folder, resume="previous", **OPTIONS)
    assert same(state(resumed), run[1])
    assert [checkpoint.load(p)["step"] for p in (previous, path)] == [30, 40]  # the damaged one is in neither place


def test_a_missing_last_one_does_not_begin_the_run_again(folder):
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(errors.CheckpointError, match=r"no file.*is good, of step 10"):
        train(make(), 40, out=folder, resume=True, **OPTIONS)
    (folder / "checkpoint.previous.pt").write_bytes(b"")
    with pytest.raises(errors.CheckpointError, match="no file") as caught:
        train(make(), 40, out=folder, resume=True, **OPTIONS)
    assert "previous" not in str(caught.value)
    with pytest.raises(errors.CheckpointError, match=r"previous\.pt cannot be read"):
        train(make(), 40, out=folder, resume="previous", **OPTIONS)


def test_a_damaged_best_one_is_refused(folder):
    path = folder / "best.pt"
    path.write_bytes(flip(path.read_bytes(), 700, 3))
    with pytest.raises(errors.CheckpointError, match=r"best\.pt cannot be read"):
        bm.load_method(folder, make(), VALIDATION)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_a_file_with_code_and_a_good_checksum_runs_nothing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    files.write_tensors(folder / "checkpoint.pt", {"format": 1, "kind": "MetaSVI", "evil": Evil()})
    torch.load(folder / "checkpoint.pt", weights_only=False)
    assert (folder / "pwned").exists(), "control: loaded carelessly, it runs"
    (folder / "pwned").rmdir()
    svi = bm.MetaSVI(print, print, lambda p: torch.optim.Adam(p), pyro.infer.Trace_ELBO())
    for load in (
        lambda: checkpoint.load(folder / "checkpoint.pt"),
        lambda: train(make(), 40, out=folder, resume=True, **OPTIONS),
        lambda: svi.load(folder / "checkpoint.pt"),
    ):
        with pytest.raises(errors.CheckpointError, match="cannot be read"):
            load()
    assert not (folder / "pwned").exists()
