"""The benchmark of ranks: its cost model gives back what it was made from, its rows say what they compare."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _distributed_model as model
from benchmarks import distributed

ROOT = Path(__file__).parents[1]


def test_the_model_finds_the_costs_that_made_the_times():
    truth, network = model.Step(0.01, 3e-4, 2e-6), model.Network(1e-4, 1e9)
    tasks = [25, 50, 100]
    found = model.fit_step(tasks, [truth.seconds(1, n, 4e3, network) for n in tasks], draw=2e-6)
    assert vars(found) == pytest.approx(vars(truth), rel=1e-9)
    sizes = [4e3, 4e4, 4e5, 4e6]
    again = model.fit_network(sizes, [network.seconds(2, size) for size in sizes])
    assert vars(again) == pytest.approx(vars(network), rel=1e-9)
    # of two ranks: the tasks of both are drawn, those of one are adapted to
    assert truth.seconds(2, 25, 4e6, network) == pytest.approx(0.01 + 25 * 3e-4 + 50 * 2e-6 + 1e-4 + 4e-3)


def test_an_all_reduce_grows_as_a_ring():
    network = model.Network(1e-5, 1e9)
    assert network.seconds(1, 1e9) == 0.0
    assert network.seconds(2, 1e9) == pytest.approx(1.0 + 1e-5)
    assert network.seconds(64, 1e9) == pytest.approx(2 * 63 / 64 + 6e-5)
    assert model.efficiency(1e-2, 0.0, 4, network) == pytest.approx(1e-2 / (1e-2 + 2e-5))


def test_the_table_of_the_documentation_is_the_models():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(model.table()) in text
    for network in model.ASSUMED.values():
        assert f"{1e6 * network.latency:g} µs, {network.bandwidth / 1e9:g} GB/s" in text


def fake(*, both=0.02, theta=1.0, moved=0.1):
    one = {"steps": {"25": 0.018, "50": 0.026, "100": 0.042}, "draws": {"25": 1e-4, "1600": 4e-4}}
    one |= {"theta": [0.5, theta], "moved": moved, "parameters": 2}
    exchanges = {"1000": 2e-4, "10000": 2.2e-4, "100000": 5e-4, "1000000": 3e-3}
    two = {"steps": {"25": both}, "theta": [0.5, 1.0], "exchanges": exchanges, "moved": 0.1, "parameters": 3500}
    return one, [two, two | {"steps": {"25": 0.019}}]


def test_rows():
    found = {row.name: row for row in distributed.rows(*fake(), seconds=3.0)}
    assert found["same_result"].passes
    assert found["step_vs_one_rank"].ratio == pytest.approx(0.9)  # against the slower of the two
    assert found["step_vs_twice_the_tasks"].ratio == pytest.approx(1.3)
    assert found["all_reduce_1m"].ours == pytest.approx(3.0)
    assert found["model_vs_measured"].ours == pytest.approx(18.0, rel=0.05)
    assert found["model_vs_measured"].passes
    other = {row.name: row for row in distributed.rows(*fake(both=0.04, theta=1.0 + 1e-5), seconds=3.0)}
    assert [other[name].passes for name in ("same_result", "step_vs_one_rank", "model_vs_measured")] == [False] * 3
    with pytest.raises(SystemExit, match="it compares nothing"):
        distributed.rows(*fake(moved=0.0), seconds=3.0)


def test_of_rounds_the_worst_difference_and_the_middle_ratio_count():
    rounds = [
        distributed.rows(*fake(both=both, theta=1.0 + off), 1.0) for both, off in ((0.02, 0), (0.03, 1e-5), (0.1, 0))
    ]
    found = {rows[0].name: distributed.pick(rows) for rows in zip(*rounds, strict=True)}
    assert found["same_result"].difference == pytest.approx(1e-5, rel=0.02)
    assert found["step_vs_one_rank"].ratio == pytest.approx(0.6)


def test_a_worker_that_fails_says_why():
    with pytest.raises(SystemExit, match=r"rank 0 of 1 failed:[^$]*KeyError"):
        distributed.work(1, {})


@pytest.mark.slow
def test_distributed_runs(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.distributed", "--quick", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode in (0, 1), result.stderr
    content = json.loads(path.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert rows["same_result"]["passes"]
    assert all(math.isfinite(value) for value in content["settings"]["model"].values())
