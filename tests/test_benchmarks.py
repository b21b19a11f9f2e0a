"""The harness that benchmarks share, and that the speed benchmark compares like with like."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import harness, speed_meta_step
from benchmarks.harness import Row, at_least, at_most, below, between

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"name", "ours", "reference", "ratio", "difference", "standard_error", "seconds", "bar", "passes"}


def run_main(rows: Any, argv: list[str], **options: Any) -> int:
    def run(args: argparse.Namespace) -> Any:
        return rows(args) if callable(rows) else rows

    with pytest.raises(SystemExit) as caught:
        harness.main("example", run, argv=argv, **options)
    return caught.value.code


def strict(text: str) -> Any:
    """Parse JSON, refusing the NaN and Infinity that Python's own parser lets through."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


# -- bars ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bar", "text", "inside", "outside"),
    [
        (at_most(0.36), "≤ 0.36", [0.36, -5.0], [0.3601]),
        (at_least(8), "≥ 8", [8.0, 1e9], [7.999]),
        (below(3), "< 3", [2.999, -1.0], [3.0, 4.0]),
        (between(0.9, 1.1), "0.9 … 1.1", [0.9, 1.0, 1.1], [0.89, 1.11]),
    ],
)
def test_bars(bar, text, inside, outside):
    assert bar.text == text
    assert all(bar.holds(v) for v in inside)
    assert not any(bar.holds(v) for v in [*outside, math.nan, math.inf, -math.inf])
    assert bar.judge(inside[0]) == {"bar": text, "passes": True}


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="empty"):
        between(2, 1)


# -- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Maml", "maml step", "maml-step", "_maml", "ma__ml", "maml_", "größe", None, 3])
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError, match="lower case"):
        Row(name, 1.0)


@pytest.mark.parametrize("name", ["maml", "maml_1_step_vs_higher", "5_shots"])
def test_good_names_are_taken(name):
    assert Row(name, 1.0).name == name


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"ratio": 1.0, "difference": 0.0}, "ratio and a difference"),
        ({"standard_error": -1.0}, "negative"),
        ({"seconds": -1.0}, "negative"),
        ({"bar": "≤ 1"}, "bar and passes"),
        ({"passes": True}, "bar and passes"),
        ({"bar": at_most(1), "passes": True}, "judge"),
        ({"bar": "≤ 1", "passes": "yes"}, "True, False or None"),
        ({"reference": "12"}, "one number"),
        ({"reference": torch.zeros(2)}, "one number"),
        ({"reference": True}, "one number"),
    ],
)
def test_rows_that_make_no_sense_are_refused(given, match):
    with pytest.raises((ValueError, TypeError), match=match):
        Row("row", 1.0, **given)


def test_scalars_of_other_libraries_become_plain():
    row = Row("row", torch.tensor(0.5), reference=np.float32(2), bar="≤ 1", passes=np.bool_(True))
    assert (row.ours, row.reference, row.passes) == (0.5, 2.0, True)
    assert type(row.ours) is float
    assert type(row.passes) is bool


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "no rows"),
        ([Row("a", 1.0), Row("a", 2.0)], "Several rows are named a"),
        ([{"name": "a"}], "expected a Row"),
    ],
)
def test_lists_of_rows_that_make_no_sense_are_refused(rows, match):
    with pytest.raises((ValueError, TypeError), match=match):
        harness.check_rows(rows)


# -- the command --------------------------------------------------------------------------------------------------


def test_json_schema(tmp_path):
    path = tmp_path / "new" / "folders" / "result.json"
    rows = [Row("first", 1.0, reference=2.0, ratio=2.0, **at_least(1.5).judge(2.0)), Row("second", 3.0)]
    code = run_main(
        rows,
        ["--json", str(path), "--seed", "7", "--flag", "9"],
        add_arguments=lambda parser: parser.add_argument("--flag", type=int),
        settings=lambda args: {"twice": 2 * args.flag},
    )
    assert code == 0
    content = strict(path.read_text())
    assert set(content) == {"benchmark", "settings", "machine", "rows"}
    assert content["benchmark"] == "example"
    assert content["settings"] == {"quick": False, "seed": 7, "flag": 9, "twice": 18}
    assert all(set(row) == KEYS for row in content["rows"])
    assert content["rows"][0]["passes"] is True
    assert content["rows"][1]["passes"] is None
    assert content["rows"][1]["reference"] is None
    assert content["machine"]["torch"] == torch.__version__
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_values_that_are_not_finite_keep_the_json_valid_and_miss_their_bar(tmp_path):
    path = tmp_path / "result.json"
    rows = [Row("a", math.nan, **at_most(1).judge(math.nan)), Row("b", math.inf, reference=-math.inf)]
    assert run_main(rows, ["--json", str(path)], settings={"x": math.nan, "deep": [np.float64("inf")]}) == 1
    content = strict(path.read_text())
    assert [row["ours"] for row in content["rows"]] == ["nan", "inf"]
    assert content["rows"][0]["passes"] is False
    assert content["rows"][1]["reference"] == "-inf"
    assert content["settings"]["x"] == "nan"
    assert content["settings"]["deep"] == ["inf"]


@pytest.mark.parametrize(
    ("passes", "code"), [([], 0), ([True], 0), ([True, True], 0), ([False], 1), ([True, False], 1)]
)
def test_exit_code_is_1_only_when_a_bar_is_missed(passes, code, capsys):
    rows = [Row("free", 1e9), *(Row(f"row_{i}", 1.0, bar="≤ 1", passes=p) for i, p in enumerate(passes))]
    assert run_main(rows, []) == code
    assert ("bars missed" in capsys.readouterr().out) == bool(code)


def test_arguments_come_from_the_command_line(monkeypatch):
    seen = []

    def run(args):
        seen.append((args.quick, args.seed, args.json))
        return [Row("row", 1.0)]

    monkeypatch.setattr(sys, "argv", ["prog", "--quick", "--seed", "3"])
    with pytest.raises(SystemExit) as caught:
        harness.main("example", run)
    assert caught.value.code == 0
    assert seen == [(True, 3, None)]


def test_a_path_that_cannot_be_written_is_refused_before_the_measurements(tmp_path, capsys):
    def run(args):
        pytest.fail("measured first")

    (tmp_path / "file").write_text("")
    assert run_main(run, ["--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert run_main(run, ["--json", str(tmp_path / "file" / "result.json")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    harness.write_json(path, {"old": 1})

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        harness.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_exit_code_of_the_process(tmp_path):
    script = (
        "from benchmarks.harness import Row, at_most, main\n"
        "main('example', lambda args: [Row('row', args.seed, **at_most(5).judge(args.seed))])\n"
    )
    for seed, code in ((5, 0), (6, 1)):
        done = subprocess.run(
            [sys.executable, "-c", script, "--seed", str(seed)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert "row" in done.stdout


def test_the_table_is_aligned_and_leaves_out_empty_columns():
    rows = [
        Row("short", 1.5, reference=12345.6, seconds=3.21),
        Row("much_longer", math.nan, **at_most(1).judge(math.nan)),
    ]
    head, rule, *lines = harness.table(rows).splitlines()
    assert head.split() == ["name", "ours", "reference", "seconds", "bar", "passes"]
    assert "ratio" not in head
    ends = [head.index(word) + len(word) for word in ("ours", "reference", "seconds")]
    assert [lines[0].index(cell) + len(cell) for cell in ("1.5", "12346", "3.2")] == ends
    assert lines[0].index("–") == head.index("bar")
    assert lines[1].endswith("NO")
    assert set(rule) == {"─", " "}


def test_machine_says_what_it_is():
    found = harness.machine()
    assert set(found) >= {"cpu", "cores", "threads", "ram_gib", "gpu", "platform", "python", "torch", "commit", "date"}
    assert found["cores"] >= 1
    strict(json.dumps(harness.plain(found), allow_nan=False))


# -- the speed benchmark ------------------------------------------------------------------------------------------


def sides(inner_steps: int) -> tuple[list[speed_meta_step.Side], Any, Any]:
    torch.manual_seed(0)
    network = speed_meta_step.mlp(1, [40, 40], 1)
    batch = speed_meta_step.draw(5, torch.Generator().manual_seed(0))
    peers = []
    for name, make in speed_meta_step.PEERS.items():
        peers.append(make(pytest.importorskip(name), network, inner_steps))
    return [speed_meta_step.our_side(network, inner_steps), *peers], network, batch


@pytest.mark.parametrize("inner_steps", [1, 5])
def test_all_sides_have_one_meta_gradient(inner_steps):
    three, network, batch = sides(inner_steps)
    assert speed_meta_step.check_same_gradient(three, batch) < 1e-5
    first_order = speed_meta_step.our_side(network, inner_steps, first_order=True)  # the control
    with pytest.raises(RuntimeError, match="would mean nothing"):
        speed_meta_step.check_same_gradient([*three, first_order], batch)


def test_timing_leaves_the_gradients_equal():
    """The peers' start must still be θ after they took steps: a state that is not recovered would show here."""
    three, _, batch = sides(1)
    for side in three:
        timed = speed_meta_step.Timed(side, 5, 3, torch.Generator().manual_seed(1))
        timed.block()
    assert speed_meta_step.check_same_gradient(three, batch) < 1e-3


def test_a_missing_peer_is_named(monkeypatch):
    def no_module(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(speed_meta_step.importlib, "import_module", no_module)
    with pytest.raises(SystemExit, match=r"times the peer higher.*pip install --group peers"):
        speed_meta_step.import_peers()


def test_torchopt_may_be_missing_where_it_has_no_wheel(monkeypatch, capsys):
    def only_higher(name: str) -> ModuleType:
        if name == "higher":
            return ModuleType("higher")
        raise ImportError(name)

    monkeypatch.setattr(speed_meta_step.importlib, "import_module", only_higher)
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    assert list(speed_meta_step.import_peers()) == ["higher"]
    assert "torchopt has no wheel" in capsys.readouterr().out


def test_ratio_of_medians():
    ratio, error = speed_meta_step.ratio_of_medians([10.0, 12.0, 11.0, 90.0, 10.5], [2.0, 2.0, 2.0, 2.0, 2.0], seed=0)
    assert ratio == 5.5
    assert error > 0
    assert speed_meta_step.ratio_of_medians([8.0] * 4, [2.0] * 4, seed=0) == (4.0, 0.0)


@pytest.mark.slow
def test_speed_meta_step_runs(tmp_path):
    path = tmp_path / "speed.json"
    command = [sys.executable, "-m", "benchmarks.speed_meta_step", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert path.exists(), done.stderr
    content = strict(path.read_text())
    names = {row["name"] for row in content["rows"]}
    expected = {"maml_1_step_vs_higher", "maml_5_steps_vs_higher"}
    expected |= {"maml_1_step_100_tasks_vs_25_tasks", "maml_5_steps_100_tasks_vs_25_tasks"}
    if sys.version_info < (3, 12):
        expected |= {"maml_1_step_vs_torchopt", "maml_5_steps_vs_torchopt"}
    assert names == expected
    assert all(row["ratio"] > 1 for row in content["rows"])
    assert done.returncode == (0 if all(row["passes"] for row in content["rows"]) else 1)


def test_blocks_take_turns_and_the_compiled_rows_are_on_one_thread():
    seen = []
    sides = {name: (lambda n, name=name: seen.append((name, n)) or 0.5) for name in ("a", "b")}
    times = speed_meta_step.take_turns(sides, 10, 3)
    assert times == {"a": [50.0] * 3, "b": [50.0] * 3}
    assert [name for name, _ in seen] == ["a", "b", "a", "b", "b", "a", "a", "b"]
    with pytest.raises(SystemExit, match="one thread"):
        speed_meta_step.run(argparse.Namespace(quick=True, rounds=2, threads=2, compiled=True, seed=0))


def test_a_peer_in_its_own_process_answers_and_its_end_is_told(tmp_path, monkeypatch):
    """The talk alone: a script under this Python; and JAX's gradient is compared, not believed."""
    from benchmarks import _peers, _speed_compiled

    monkeypatch.setattr(_peers, "HERE", tmp_path)
    (tmp_path / "echo.py").write_text(
        "import json, sys\n"
        "import numpy as np\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if 'gradient' in request:\n"
        "        np.savez(request['into'], gradient=np.load(request['gradient'])['w0'].ravel())\n"
        "    if request.get('end'):\n"
        "        sys.exit(3)\n"
        "    print(json.dumps({'seconds': request.get('block')}), flush=True)\n"
    )
    network, batch = speed_meta_step.mlp(1, [3], 1), speed_meta_step.draw(2, torch.Generator().manual_seed(0))
    weight = network[0].weight.detach().flatten()
    with _peers.Peer("echo.py", python=Path(sys.executable)) as peer:
        assert peer.ask(block=7) == {"seconds": 7}
        assert _speed_compiled.check_jax(peer, network, batch, weight, 1e-6) == 0
        with pytest.raises(RuntimeError, match="differ by"):
            _speed_compiled.check_jax(peer, network, batch, weight * 1.1, 1e-3)
        with pytest.raises(RuntimeError, match="numbers"):
            _speed_compiled.check_jax(peer, network, batch, weight[:2], 1e-3)
        with pytest.raises(RuntimeError, match="status 3"):
            peer.ask(end=True)
