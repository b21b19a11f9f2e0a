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
    handling = model.Handling(2e-4, 1e-9)
    found = model.fit_step(tasks, [truth.seconds(1, n, 4e3, network, handling) for n in tasks], draw=2e-6)
    assert vars(found) == pytest.approx(vars(truth), rel=1e-9)
    sizes = [4e3, 4e4, 4e5, 4e6]
    again = model.fit_network(sizes, [network.seconds(2, size) for size in sizes])
    assert vars(again) == pytest.approx(vars(network), rel=1e-9)
    own = model.fit_handling(sizes, [handling.seconds(2, size) for size in sizes])
    assert vars(own) == pytest.approx(vars(handling), rel=1e-9)
    # of two ranks: the tasks of both are drawn, those of one are adapted to
    expected = 0.01 + 25 * 3e-4 + 50 * 2e-6 + (2e-4 + 4e-3) + (1e-4 + 4e-3)
    assert truth.seconds(2, 25, 4e6, network, handling) == pytest.approx(expected)


def test_an_all_reduce_grows_as_a_ring():
    network = model.Network(1e-5, 1e9)
    assert network.seconds(1, 1e9) == 0.0
    assert network.seconds(2, 1e9) == pytest.approx(1.0 + 1e-5)
    assert network.seconds(64, 1e9) == pytest.approx(2 * 63 / 64 + 6e-5)
    none = model.Handling(0.0, 0.0)
    assert model.efficiency(1e-2, 0.0, 4, network, draw=0.0, handling=none) == pytest.approx(1e-2 / (1e-2 + 2e-5))
    # with the drawing of three other ranks' tasks, and with the work for an exchange
    drawn = model.efficiency(1e-2, 0.0, 4, network, draw=1e-4, handling=model.Handling(1e-3, 1.0))
    assert drawn == pytest.approx(1e-2 / (1e-2 + 2e-5 + 3e-4 + 1e-3))
    assert model.efficiency(1e-2, 1e6, 1, network) == 1.0


def test_the_table_of_the_documentation_is_the_models():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(model.table()) in text
    for network in model.ASSUMED.values():
        assert f"{1e6 * network.latency:g} µs, {network.bandwidth / 1e9:g} GB/s" in text
    assert f"{1e6 * model.DRAW:g} µs a task, of {model.TASKS} tasks a rank" in text
    assert f"{1e3 * model.HANDLING.fixed:g} ms of a rank's own work" in text
    assert f"{model.HANDLING.each * 1e12:g} passes over the buffer at 1 TB/s" in text


def fake(*, both=0.02, theta=1.0, moved=0.1):
    one = {"steps": {"25": 0.018, "50": 0.026, "100": 0.042}, "draws": {"25": 1e-4, "1600": 4e-4}}
    one |= {"theta": [0.5, theta], "moved": moved, "parameters": 2, "processor": {"25": 0.018}}
    exchanges = {"1000": 2e-4, "10000": 2.2e-4, "100000": 5e-4, "1000000": 3e-3}
    two = {"steps": {"25": both}, "theta": [0.5, 1.0], "exchanges": exchanges, "moved": 0.1, "parameters": 3500}
    two |= {"processor": {"25": 0.0225}, "handling": {"3500": 1.5e-4, "100000": 5e-4, "1000000": 4e-3}}
    return one, [two, two | {"steps": {"25": 0.019}}]


def test_rows():
    found = {row.name: row for row in distributed.rows(*fake(), seconds=3.0)}
    assert found["same_result"].passes
    assert found["step_vs_one_rank"].ratio == pytest.approx(0.9)  # against the slower of the two
    assert found["processor_time_vs_one_rank"].ratio == pytest.approx(0.8)
    assert found["step_vs_twice_the_tasks"].ratio == pytest.approx(1.3)
    assert found["all_reduce_1m"].ours == pytest.approx(3.0)
    assert found["exchange_own_work"].ours == pytest.approx(0.15, rel=0.1)
    # what one rank takes, 25 tasks drawn more, two exchanges' costs
    assert found["model_vs_measured"].ours == pytest.approx(18.0 + 0.004 + 0.15 + 0.2, rel=0.01)
    assert found["model_vs_measured"].passes
    other = {row.name: row for row in distributed.rows(*fake(both=0.04, theta=1.0 + 1e-5), seconds=3.0)}
    assert [other[name].passes for name in ("same_result", "step_vs_one_rank", "model_vs_measured")] == [False] * 3
    with pytest.raises(SystemExit, match="it compares nothing"):
        distributed.rows(*fake(moved=0.0), seconds=3.0)


def test_of_rounds_the_smallest_times_count():
    rounds = [{"steps": {"25": 2.0, "50": 3.0}, "theta": [1.0]}, {"steps": {"25": 1.0, "50": 4.0}, "theta": [1.0]}]
    assert distributed.merge(rounds) == {"steps": {"25": 1.0, "50": 3.0}, "theta": [1.0]}


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
