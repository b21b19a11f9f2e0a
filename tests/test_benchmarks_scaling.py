"""The benchmark of scaling: what it measures is true of sizes that are known, and its rows say what they compare."""

import json
import multiprocessing
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from bayesmeta.ops.peak import PeakMemory
from benchmarks import scaling
from benchmarks._scaling_picture import _decades, _number, draw, label, ticks
from benchmarks._scaling_points import (
    MIB,
    Point,
    Size,
    clock_tick,
    give_back_memory,
    in_child,
    make_loop,
    measured,
    median_seconds,
    reset_high_water_mark,
    resident,
    resident_peak,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux alone")
pytestmark = linux


# -- measuring ----------------------------------------------------------------------------------------------------


def grown(mib, free):
    """Peak and growth of resident memory around a tensor of so many MiB."""
    give_back_memory()
    torch.ones(1000)
    before = resident("VmRSS")
    torch.ones(mib * MIB // 4)
    first = resident("VmHWM") - before
    if free:
        reset_high_water_mark()
    return first / MIB, (resident("VmHWM") - before) / MIB


@pytest.fixture(scope="module")
def in_fresh_child():
    """``in_child`` of a process that has freed nothing: what the tests before left in this one would be used again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda *given: pool.submit(in_child, *given).result()


def test_resident_memory_is_that_of_a_known_tensor(in_fresh_child):
    peak, kept = in_fresh_child(grown, 32, False)
    slack = 0.25  # MiB that the kernel may not have counted yet: 64 pages of a thread
    assert 32 - slack <= peak <= 36
    assert kept == pytest.approx(peak, abs=slack)
    _, after = in_fresh_child(grown, 32, True)
    assert after < 4, "the mark begins again"


def test_a_child_gives_its_value_or_its_error():
    assert in_child(divmod, 17, 5) == [3, 2]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_child(divmod, 17, 0)


@pytest.mark.parametrize("size", [Size(tasks=600), Size(tasks=800, chunk=400, steps=2, recompute=True)])
def test_tensors_counted_are_the_resident_memory(size, in_fresh_child):
    """Two ways to measure one thing; resident memory has pages and small blocks beside the tensors."""
    peak, tensors = in_fresh_child(resident_peak, size, 0)
    assert tensors > 15 * MIB
    assert peak == pytest.approx(tensors, rel=0.2)
    half, _ = in_fresh_child(resident_peak, Size(tasks=size.tasks // 2, chunk=size.chunk and size.chunk // 2), 0)
    assert half < 0.7 * peak, "control: a step of half the size"


@pytest.mark.parametrize(
    ("size", "count"),
    [(Size(), 1761), (Size(hidden=(8, 8)), 97), (Size(particles=3), 1761), (Size(hidden=(998, 998)), 999_997)],
)
def test_sizes_are_those_of_the_network(size, count):
    assert size.num_parameters == count
    if count < 10_000:
        loop = make_loop(Size(tasks=4, particles=size.particles, hidden=size.hidden), 0)
        assert loop.method.program.layout.dim == count


def test_a_point_is_of_its_size():
    with PeakMemory():  # the parent's own counting is none of the child's business
        point = measured(Size(tasks=3, particles=1), 0, 0.01)
    assert point.seconds > 0
    assert point.per_task == pytest.approx(1e6 * point.seconds / 3)
    assert json.loads(json.dumps(point.as_dict()))["parameters"] == 1761
    assert measured(Size(tasks=3), 0, 0.01, memory=False).peak is None


@pytest.mark.parametrize(("tick", "cost"), [(4e-3, 1e-3), (4e-3, 0.3e-3), (1e-6, 1e-3), (4e-3, 0.5)])
def test_steps_are_timed_in_blocks_that_the_clock_can_tell(tick, cost, monkeypatch):
    """A clock that stands still between two ticks, as that of a process with a limit on its time."""
    spent = [0.1234567]

    def clock():
        spent[0] += 1e-7
        return int(spent[0] / tick) * tick

    def step():
        spent[0] += cost

    monkeypatch.setattr("benchmarks._scaling_points.time.process_time", clock)
    assert clock_tick() == pytest.approx(tick, rel=0.05)
    assert median_seconds(step, 0.3) == pytest.approx(cost, rel=0.1)
    begin = clock()
    step()
    alone = clock() - begin
    assert alone != pytest.approx(cost, rel=0.1) or cost > 10 * tick, "control: one step by itself"


# -- rows ---------------------------------------------------------------------------------------------------------


def test_costs_are_compared_by_the_task():
    costs = {
        "few": Point(Size(tasks=16), 16e-3),  # 1000 us a task
        "eager": Point(Size(tasks=4096), 0.8192),  # 200
        "chunked": Point(Size(tasks=4096, chunk=256), 0.4096),  # 100
        "compiled": Point(Size(tasks=4096, compiled=True), 0.6144),  # 150
    }
    rows = {row.name: row for row in scaling.cost_rows(costs, "")}
    best = rows["cost_per_task_4096_vs_16_eager"]
    assert (best.ours, best.reference, best.ratio, best.passes) == pytest.approx((100.0, 1000.0, 0.1, True))
    assert rows["cost_per_task_4096_eager_vs_16_eager"].ratio == pytest.approx(0.2)
    assert rows["cost_per_task_4096_eager_vs_16_eager"].passes is None
    costs["chunked"].seconds = 0.45
    assert scaling.cost_rows(costs, "")[0].passes is False
    del costs["compiled"]
    assert scaling.cost_rows(costs, "")[0].passes is None, "the best is not known without it"


def axes():
    def points(values, make, seconds):
        return [Point(make(v), seconds(v), 1e6 * v, 0.9e6 * v) for v in values]

    return {
        "tasks": {
            "eager": points([256, 1024], lambda v: Size(tasks=v), lambda v: 1e-5 * v),
            "in chunks": points([256, 1024], lambda v: Size(tasks=v, chunk=256), lambda v: 1e-5 * v),
        },
        "inner_steps": {
            name: points([1, 50], lambda v, again=again: Size(steps=v, recompute=again), lambda v: 1e-3 * v**2)
            for name, again in (("eager", False), ("recomputed", True))
        },
        "particles": {"eager": points([1, 10], lambda v: Size(particles=v), lambda v: 1e-3 * v)},
        "parameters": {"eager": points([8, 98], lambda v: Size(hidden=(v, v)), lambda v: 1e-3)},
    }


def test_exponents_are_slopes_of_logarithms():
    found = {row.name: row.ours for row in scaling.exponent_rows(axes())}
    expected = {"tasks": 1.0, "inner_steps": 2.0, "particles": 1.0, "parameters": 0.0}
    assert found == {f"{name}_exponent": pytest.approx(value, abs=1e-12) for name, value in expected.items()}


def test_memory_rows_compare_peaks(monkeypatch):
    monkeypatch.setattr(
        scaling, "_peak", lambda size, args, keeps=False: (2 if keeps else 1) * MIB * (size.chunk or size.steps)
        * (1 + size.tasks / 10**5) * (0.1 if size.recompute else 1) / (1 if size.shots == 100 else 2)
    )  # fmt: skip
    rows = {row.name: row for row in scaling.memory_rows(axes(), Namespace(quick=False, seed=0))}
    assert rows["memory_with_chunk_flat"].ratio == pytest.approx(1.1 / 1.00256)
    assert rows["memory_with_chunk_flat"].passes is True
    assert rows["memory_with_chunk_flat_default_malloc"].ours == pytest.approx(2 * rows["memory_with_chunk_flat"].ours)
    assert rows["memory_with_chunk_flat_1_step"].ratio == pytest.approx(4.0)
    assert rows["memory_50_inner_steps_checkpointed"].ratio == pytest.approx(0.1)
    assert rows["memory_counted_vs_resident"].ratio == pytest.approx(0.9)
    monkeypatch.setattr(scaling, "_peak", lambda size, args, keeps=False: float(size.tasks))
    again = {row.name: row for row in scaling.memory_rows(axes(), Namespace(quick=False, seed=0))}
    assert again["memory_with_chunk_flat"].passes is False
    assert again["memory_50_inner_steps_checkpointed"].passes is False


def test_labels_of_the_picture():
    assert label("tasks", "eager") == "whole batch"
    assert label("inner_steps", "eager") == "steps kept"
    assert _decades((30, 60)) == pytest.approx(0.30103)
    assert ticks(0.9, 21) == pytest.approx([1, 2, 5, 10, 20])
    assert ticks(2.5, 6.5) == pytest.approx([3, 4, 5])
    assert [_number(v, 0) for v in (1.5, 0.2, 20.0, 10_000)] == ["1.5", "0.2", "20", "10,000"]


def test_the_picture_has_a_column_an_axis(tmp_path):
    draw(axes(), scaling.place, tmp_path / "new" / "scaling.png")
    assert (tmp_path / "new" / "scaling.png").stat().st_size > 10_000


def test_a_bound_is_measured_in_a_process_of_its_own(in_fresh_child):
    chunk, peak = in_fresh_child(scaling.bounded_peak, 400, 2, 12 * MIB, 0, False)
    assert 100 < chunk < 400
    assert 8 * MIB < peak < 17 * MIB  # beside the tensors, code that the first larger step brings in


@pytest.mark.slow
def test_scaling_runs(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.scaling", "--quick", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode in (0, 1), result.stderr
    content = json.loads(path.read_text())
    names = [row["name"] for row in content["rows"]]
    assert "cost_per_task_4096_vs_16_eager" in names
    assert "memory_with_chunk_flat" in names
    assert content["settings"]["points"]["tasks"]["eager"][0]["seconds"] > 0
    assert path.with_suffix(".png").exists()
