"""kill -9 at random moments: a run that goes on ends bit for bit as one that was never stopped."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.faults.driver import difference

DRIVER = Path(__file__).with_name("driver.py")
FORKS = sys.platform.startswith("linux")


def run(kills, seed):
    """What became of so many killed runs; in memory, since the wait for a disk is not what is tested."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="bayesmeta-kills-", dir=place))
    try:
        command = [sys.executable, str(DRIVER), str(folder), str(kills), str(seed)]
        # pools of threads, which numpy and torch start on import, would not be there after a fork
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=DRIVER.parents[2], env={**os.environ, **alone}
        )
    finally:
        shutil.rmtree(folder)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(results, kills):
    assert len(results) == kills
    assert [r for r in results if r["difference"] is not None] == []
    assert set(Counter(r["kind"] for r in results).values()) == {kills // 4}
    # the kills fell within the runs, not all before the first checkpoint or in one place
    assert len({r["step"] for r in results}) > 4


@pytest.mark.skipif(not FORKS, reason="forks processes of torch, and looks into /proc")
def test_20_kills():
    check(run(20, seed=1), 20)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not FORKS, reason="forks processes of torch, and looks into /proc")
def test_200_kills():
    results = run(200, seed=2)
    check(results, 200)
    assert sum(r["cut"] for r in results) > 0, "no kill fell into the writing of a file"


def test_a_difference_of_one_bit_is_seen():
    a = {"x": torch.zeros(3), "y": [1, (2.0, None)], "z": {"w": torch.tensor(1)}}
    assert difference(a, {"x": torch.zeros(3), "y": [1, (2.0, None)], "z": {"w": torch.tensor(1)}}) is None
    for other, where in (
        (a | {"x": torch.tensor([0.0, -0.0, 0.0])}, "/x"),
        (a | {"x": torch.zeros(3, dtype=torch.float64)}, "/x"),
        (a | {"y": [1, (2.0, 0)]}, "/y/1/1"),
        (a | {"y": [1, (2.0,)]}, "/y/1"),
        (a | {"z": {"v": torch.tensor(1)}}, "/z"),
        (a | {"z": {"w": torch.tensor(2)}}, "/z/w"),
    ):
        assert difference(a, other) == where
