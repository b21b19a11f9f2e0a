"""Ranks that die: the others end, all start again by themselves, and the result is bit for bit that of no death."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from bayesmeta.train import checkpoint
from tests.distributed_ranks import frame
from tests.faults.driver import difference

ROOT = Path(__file__).parents[2]
TORCHRUN = Path(sys.executable).with_name("torchrun")
#: Pools of threads, which numpy and torch start on import, would not be there after a fork.
ALONE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes of torch")


def kills(number, seed):
    """What became of so many runs of which a rank was killed; in memory, since no disk is tested."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="bayesmeta-ranks-", dir=place))
    try:
        command = [sys.executable, "-m", "tests.faults.ranks", str(folder), str(number), str(seed)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ALONE})
    finally:
        shutil.rmtree(folder)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == number
    assert [one for one in found if one["difference"] is not None] == []
    assert {one["became"] for one in found} == {"ended"}  # the rank that was left did not hang
    return found


def test_2_ranks_killed():
    kills(2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_60_ranks_killed():
    found = kills(60, seed=2)
    assert len({one["step"] for one in found}) > 4  # the kills fell within the runs
    assert max(one["restarts"] for one in found) > 1


class Torchrun:
    """``bayesmeta fit`` by torchrun with two ranks, in a process group of its own."""

    def __init__(self, folder, *options, steps=300):
        frame(40).to_csv(folder / "data.csv", index=False)
        self.out, self.said = folder / "run", folder / "said.txt"
        command = [str(TORCHRUN), "--standalone", "--nproc-per-node", "2", *options, "-m", "bayesmeta", "fit"]
        command += [str(folder / "data.csv"), "--task", "task", "--x", "x", "--y", "y", "--out", str(self.out)]
        command += ["--steps", str(steps), "--hidden", "4", "--validation", "0", "--device", "cpu", "--no-progress"]
        with open(self.said, "w") as file:
            self.process = subprocess.Popen(
                [*command, "--overwrite"], stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **ALONE}
            )

    def first_rank(self):
        """Process id of rank 0, once there is a checkpoint."""
        for _ in range(3000):
            if (self.out / "checkpoint.pt").exists() and (self.out / ".run.lock").exists():
                return json.loads((self.out / ".run.lock").read_text())["pid"]
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.02)
        raise AssertionError(self.said.read_text())

    def end(self):
        """The exit status, and what was said."""
        status = self.process.wait(timeout=120)
        return status, self.said.read_text()


def state(folder):
    content = checkpoint.load(folder / "checkpoint.pt")
    content.pop("seconds")
    return content


def test_torchrun_starts_a_killed_rank_again(tmp_path):
    """The command line, kill -9, an elastic restart, although the script says to begin anew; against one in one go."""
    run = Torchrun(tmp_path, "--max-restarts", "1", steps=220)
    os.kill(run.first_rank(), signal.SIGKILL)
    status, said = run.end()
    assert status == 0, said
    assert said.count("Done: 220 steps") == 1  # rank 0 alone speaks
    last = state(run.out)
    assert last["step"] == 220
    steps = [json.loads(line)["step"] for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert len(last["ranks"]["noise"]) == 2
    assert all(math.isfinite(float(v.sum())) for v in last["method"].values())
    assert not torch.equal(last["ranks"]["noise"][0], last["ranks"]["noise"][1])


@pytest.mark.slow
def test_a_killed_run_of_torchrun_ends_as_one_in_one_go(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Torchrun(tmp_path / "a")
    assert whole.end()[0] == 0
    run = Torchrun(tmp_path / "b", "--max-restarts", "1")
    os.kill(run.first_rank(), signal.SIGKILL)
    assert run.end()[0] == 0
    a, b = state(whole.out), state(run.out)
    for content in (a, b):
        content["config"].pop("csv")
    assert difference(a, b) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_ends_in_one_checkpoint(number, tmp_path):
    run = Torchrun(tmp_path, steps=100_000)
    run.first_rank()
    run.process.send_signal(number)
    status, said = run.end()
    assert status != 0
    last = checkpoint.load(run.out / "checkpoint.pt")
    assert 100 <= last["step"] < 100_000
    assert not (run.out / ".run.lock").exists(), said  # the run ended in good order
    if number is signal.SIGINT:
        assert said.count("bayesmeta: interrupted; the last checkpoint is kept") == 1


SLOW_STEPS = """
import os, sys, time
from pathlib import Path
import torch
import bayesmeta as bm

class Slow:
    num_tasks = None
    def sample(self, *args, **options):
        time.sleep(0.5)
        return bm.tasks.Sinusoid(noise=0.1).sample(*args, **options)

out = Path(sys.argv[1])
out.with_name("pid" + os.environ["RANK"]).write_text(str(os.getpid()))
method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(1.0)), inner_lr=0.01)
bm.fit(method, Slow(), steps=1000, tasks_per_step=2, device="cpu", out=out, checkpoint_every=1000, log_every=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_two_senders_ends_in_a_checkpoint(number, tmp_path):
    """As a cluster does: to torchrun, which passes it on, and to each rank; twice within one slow step."""
    out, said = tmp_path / "run", tmp_path / "said.txt"
    (tmp_path / "train.py").write_text(SLOW_STEPS)
    command = [str(TORCHRUN), "--standalone", "--nproc-per-node", "2", str(tmp_path / "train.py"), str(out)]
    with open(said, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **ALONE})
    log = out / "log.jsonl"
    for _ in range(3000):
        if log.exists() and len(log.read_text().splitlines()) >= 2:
            break
        assert process.poll() is None, said.read_text()
        time.sleep(0.02)
    assert not (out / "checkpoint.pt").exists()
    for pid in [*(int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)), process.pid]:
        os.kill(pid, number)
    assert process.wait(timeout=120) != 0
    steps = len(log.read_text().splitlines())
    assert checkpoint.load(out / "checkpoint.pt")["step"] == steps >= 3, said.read_text()
    assert not (out / ".run.lock").exists()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path):
    """Without restarts: torchrun ends, with an error, and soon."""
    run = Torchrun(tmp_path, steps=100_000)
    os.kill(run.first_rank(), signal.SIGKILL)
    begin = time.monotonic()
    assert run.end()[0] != 0
    assert time.monotonic() - begin < 60
    assert checkpoint.load(run.out / "checkpoint.pt")["step"] >= 100
