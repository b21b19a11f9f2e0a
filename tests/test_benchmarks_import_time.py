"""The benchmark of import times: it compares what it says, and fails where a process fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import import_time


def test_rows_compare_medians_of_the_same_rounds():
    times = {
        "import torch": [1.0, 2.0, 9.0], "import pyro": [2.0, 2.0, 2.5], "import bayesmeta": [0.1, 0.1, 0.1],
        "first use": [2.4, 2.4, 9.0], "first step": [3.0, 3.0, 3.0], "svi": [6.0, 6.0, 6.0], "help": [0.6, 0.6, 0.6],
    }  # fmt: skip
    found = {row.name: row for row in import_time.rows(times, times, seed=0)}
    assert {name: round(row.ratio, 6) for name, row in found.items()} == {
        "import_vs_pyro": 0.05, "first_use_vs_pyro": 1.2, "first_step_vs_pyro_svi": 0.5, "help_vs_torch": 0.3,
    }  # fmt: skip
    assert {name: row.passes for name, row in found.items()} == {
        "import_vs_pyro": True, "first_use_vs_pyro": True, "first_step_vs_pyro_svi": None, "help_vs_torch": False,
    }  # fmt: skip
    slower = import_time.rows(times | {"first use": [2.7, 2.7, 2.7]}, times, seed=0)
    assert next(row.passes for row in slower if row.name == "first_use_vs_pyro") is False


def test_times_are_of_the_process(monkeypatch):
    monkeypatch.setattr(import_time, "KINDS", {
        "busy": "import time\nwhile time.process_time() < 0.3: pass", "idle": "import time; time.sleep(0.3)",
        "bad": "raise ValueError('no such thing')",
    })  # fmt: skip
    busy, idle = import_time.seconds("busy"), import_time.seconds("idle")
    assert busy[0] >= 0.3
    assert idle[0] < 0.3 <= idle[1]
    with pytest.raises(SystemExit, match=r"'bad' failed:[^$]*no such thing"):
        import_time.seconds("bad")


@pytest.mark.slow
def test_import_time_runs(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.import_time", "--quick", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode in (0, 1), result.stderr
    content = json.loads(path.read_text())
    assert [row["name"] for row in content["rows"]] == list(import_time.ROWS)
    assert all(row["ratio"] > 0 for row in content["rows"])
