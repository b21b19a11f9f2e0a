"""The command line: runs the demo, refuses with one paragraph and status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bayesmeta import cli


def run(*arguments, cwd):
    command = [str(Path(sys.executable).with_name("bayesmeta")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    result = run("demo", "--out", out, "--steps", 60, cwd=out.parent)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_demo_leaves_what_it_says(folder):
    out, text = folder
    for name in ("metrics.json", "posterior.nc", "forecast.png", "best.pt", "config.json", "log.jsonl"):
        assert (out / name).stat().st_size > 0
        assert name in text
    assert "empirical Gaussian" in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["countries"] == {"train": 110, "test": 60}
    assert set(metrics["scores"]) >= {"demo", "last_value", "gp_per_country", "empirical_gaussian"}
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["standardizer"]["y_scale"] > 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 60


def test_the_demos_method_is_loaded_from_its_folder(folder):
    import bayesmeta as bm
    from bayesmeta.demo.run import SUPPORT, demo_method
    from bayesmeta.tasks import fertility_split

    out, _ = folder
    batch = fertility_split(0).test.all(support=SUPPORT)
    method = bm.load_method(out, demo_method(0), batch)
    result = bm.scores(method.adapt(batch.support), batch)
    saved = json.loads((out / "metrics.json").read_text())["scores"]["demo"]
    assert result["nll"] == pytest.approx(saved["nll"], rel=1e-4)


def test_a_used_folder_is_refused_with_status_2(folder):
    out, _ = folder
    before = (out / "best.pt").read_bytes()
    result = run("demo", "--out", out, "--steps", 60, cwd=out.parent)
    assert result.returncode == 2
    assert "already holds a run" in result.stderr
    assert "Traceback" not in result.stderr
    assert (out / "best.pt").read_bytes() == before


def test_unknown_options_and_commands_are_refused(tmp_path):
    for arguments in (("demo", "--nope"), ("dmo",), ()):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr + result.stdout


def test_bad_device_and_steps_are_refused(tmp_path):
    for arguments in (("--steps", "0"), ("--device", "toaster")):
        result = run("demo", "--out", tmp_path / "x", *arguments, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr


def test_version(capsys):
    cli.main(["version"])
    assert capsys.readouterr().out.strip() == "0.1.0"
