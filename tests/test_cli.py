"""The command line: runs the demo, refuses with one paragraph and status 2."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

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
    for name in ("metrics.json", "report.html", "posterior.nc", "forecast.png", "best.pt", "config.json", "log.jsonl"):
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


# -- tables -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV of twelve tasks, and the folder of a short run on it."""
    place = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(12), 6)
    frame = pd.DataFrame({"g": g, "t": rng.normal(size=72), "y": rng.normal(size=12)[g] + rng.normal(0, 0.3, 72)})
    frame.to_csv(place / "a.csv", index=False)
    frame.loc[::2, "y"] = None
    frame.to_csv(place / "new.csv", index=False)
    result = run("fit", "a.csv", *FIT, "--out", "run", cwd=place)
    assert result.returncode == 0, result.stderr
    return place, result.stdout


FIT = ("--task", "g", "--x", "t", "--y", "y", "--steps", "20", "--hidden", "8", "--holdout", "0.25", "--device", "cpu")


def command(capsys, *arguments):
    """Run a command in this process; exit status and what was printed."""
    threads = torch.get_num_threads()
    try:
        cli.main([str(a) for a in arguments])
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        torch.set_num_threads(threads)
    return status, *capsys.readouterr()


def test_fit_says_what_was_read_and_what_comes_next(table):
    place, text = table
    for words in (
        "a.csv: 72 rows of 12 tasks (g), 6 to 6 rows each",
        "input   t",
        "target  y",
        "3 held out",
        "BayesianLastLayer",
    ):
        assert words in text
    assert "bayesmeta evaluate run a.csv" in text
    assert "bayesmeta predict run NEW.csv" in text
    assert (place / "run" / "checkpoint.pt").stat().st_size > 0


def test_fit_compiled_learns_the_same(table, capsys, monkeypatch, tmp_path):
    """The captured graph as it is, without the compiler; beside the folder of the same run, eager."""
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs: graph)
    place, _ = table
    out = tmp_path / "run"
    status, text, error = command(
        capsys, "fit", place / "a.csv", *FIT, "--out", out, "--compile", "inductor", "--no-progress"
    )
    assert status == 0, error
    assert re.search(r"Steps: compiled at step \d+: \d graph\(s\)", text)
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True)["method"] for f in (out, place / "run"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)  # 20 steps of Adam in float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused where there is no CUDA")
def test_fit_refuses_cuda_graphs_where_there_is_none(table, capsys):
    place, _ = table
    before = sorted(path.name for path in (place / "run").iterdir())
    arguments = ("fit", place / "a.csv", *FIT, "--out", place / "run", "--overwrite", "--compile", "cudagraphs")
    status, _, error = command(capsys, *arguments)
    assert status == 2
    assert "--compile cudagraphs needs a CUDA device, and there is none; take --compile inductor here" in error
    assert sorted(path.name for path in (place / "run").iterdir()) == before


def test_evaluate_and_predict_go_on_from_there(table, capsys):
    place, _ = table
    status, text, _ = command(capsys, "evaluate", place / "run", place / "a.csv", "--support", 2)
    assert status == 0
    assert "3 tasks, 2 row(s) of each task seen, 12 forecast" in text
    assert "than the pooled line (paired over tasks)" in text
    out = place / "forecast.csv"
    status, text, notes = command(
        capsys, "predict", place / "run", place / "new.csv", "--quantiles", "0.1", "0.9", "--out", out
    )
    assert (status, notes) == (0, "")
    assert "36 rows of 12 tasks forecast" in text
    written = pd.read_csv(out)
    assert list(written.columns) == ["g", "t", "y", "y_mean", "y_sd", "y_q0.1", "y_q0.9"]
    asked = written["y"].isna()
    assert (written["y_q0.1"][asked] < written["y_q0.9"][asked]).all()
    assert written["y_mean"][~asked].isna().all()


def test_report_is_written_of_either_kind_of_folder(table, folder, capsys, tmp_path):
    place, _ = table
    status, text, _ = command(capsys, "report", place / "run", "--device", "cpu")
    assert status == 0
    assert f"3 tasks judged. Written to {place / 'run' / 'report.html'}." in text
    assert "pooled line" in (place / "run" / "report.html").read_text()
    out, _ = folder
    mine = (out / "report.html").read_text()
    assert "empirical Gaussian" in mine
    assert len(mine) < 3_000_000
    assert command(capsys, "report", out, "--device", "cpu", "--out", tmp_path / "again.html")[0] == 0
    again = (tmp_path / "again.html").read_text()
    row = re.compile(r'<tr class="first">.*?</tr>', re.DOTALL)
    assert row.search(again)[0] == row.search(mine)[0]


def test_methods_are_shown(capsys):
    status, text, _ = command(capsys, "methods")
    assert status == 0
    for name in ("* BayesianLastLayer", "* MAML", "ASSUMES", "Harrison"):
        assert name in text
    assert max(map(len, text.splitlines())) < 140


REFUSED = {
    "unknown method": (("fit", "a.csv", *FIT, "--out", "x", "--method", "mamal"), "did you mean 'MAML'"),
    "no file": (("fit", "b.csv", *FIT, "--out", "x"), "b.csv is not there"),
    "no column": (("fit", "a.csv", *FIT, "--out", "x", "--w", "size"), "no column 'size'"),
    "a run already": (("fit", "a.csv", *FIT, "--out", "run"), "--overwrite"),
    "no run": (("evaluate", "nowhere", "a.csv"), "nowhere holds no run"),
    "nothing to forecast": (("predict", "run", "a.csv"), "nothing to forecast"),
    "no run to report": (("report", "nowhere"), "nowhere holds no run"),
    "a report of no page": (("report", "run", "--out", "x.pdf"), "expected .html"),
    "tasks a step": (("fit", "a.csv", *FIT, "--out", "x", "--tasks-per-step", "0"), "--tasks-per-step must be a whole"),
    "a chunk twice": (("fit", "a.csv", *FIT, "--out", "x", "--chunk", "4", "--memory", "1MiB"), "--memory 1MiB picks"),
    "memory": (("fit", "a.csv", *FIT, "--out", "x", "--memory", "much"), "much"),
    "tf32": (("fit", "a.csv", *FIT, "--out", "x", "--precision", "tf32"), "--precision tf32 is of NVIDIA's"),
    "checkpoints": (
        ("fit", "a.csv", *FIT, "--out", "x", "--checkpoint-every", "0"),
        "--checkpoint-every must be a whole",
    ),
    "threads": (("predict", "run", "a.csv", "--threads", "-1"), "threads must be at least 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tables_are_refused_with_one_paragraph_and_status_2(table, capsys, monkeypatch, case):
    arguments, message = REFUSED[case]
    monkeypatch.chdir(table[0])
    status, text, error = command(capsys, *arguments)
    assert status == 2
    assert message in error
    assert error.startswith("bayesmeta: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error + text


def radon():
    data = Path(os.environ.get("BAYESMETA_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return data / "multilevel" / "radon.csv"


@pytest.mark.slow
@pytest.mark.skipif(not radon().is_file(), reason="radon.csv is not here; BAYESMETA_DATA names the folder of data")
def test_a_stranger_forecasts_radon(tmp_path, capsys):
    """Held-out counties over ten splits: better than a line for each, no worse than the pooled one.

    Counties differ little: ten splits cannot tell the gain over the pooled line from none.
    """
    gains = {"pooled": [], "unpooled": []}
    for seed in range(10):
        out = tmp_path / str(seed)
        columns = ("--task", "county.name", "--x", "basement", "--y", "log.radon")
        options = ("--holdout", 0.25, "--seed", seed, "--device", "cpu", "--no-progress", "--out", out)
        assert command(capsys, "fit", radon(), *columns, *options)[0] == 0
        assert command(capsys, "evaluate", out, radon(), "--device", "cpu")[0] == 0
        difference = json.loads((out / "scores.json").read_text())["nll_difference"]
        for line, values in gains.items():
            values.append(difference[line]["mean"])
    z = {line: np.mean(v) / (np.std(v, ddof=1) / np.sqrt(len(v))) for line, v in gains.items()}
    assert z["unpooled"] > 2
    assert z["pooled"] > -2


def test_a_reader_who_stops_early_is_no_error():
    command = f"{sys.executable} -m bayesmeta methods | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "METHOD" in result.stdout
    assert result.stderr == ""


def test_messages_speak_of_options():
    from bayesmeta.cli import _as_options

    said = _as_options("see missing='drop', categorical=['soil', 'plot'] and target='real'; say so (separator=';')")
    assert said == "see --missing drop, --categorical soil plot and --likelihood gaussian; say so (--separator ';')"
    said = _as_options(
        "tasks_per_step = 16, go on with tasks_per_step=32. Set chunk=8, compile='auto'. Go on with resume"
    )
    assert said == (
        "--tasks-per-step 16, go on with --tasks-per-step 32. Set --chunk 8, --compile auto. go on with --resume"
    )
    assert _as_options("a column 'mychunk=3'") == "a column 'mychunk=3'"


# -- steps, and what stops them -----------------------------------------------------------------------------------


def test_fit_takes_tasks_chunks_and_checkpoints(table, capsys, monkeypatch, tmp_path):
    from bayesmeta.train.loop import Loop
    from bayesmeta.train.record import Record

    plans, saved = [], []
    advance, save = Loop.advance, Record._save
    monkeypatch.setattr(Loop, "advance", lambda self: (plans.append(self.plan), advance(self))[1])
    monkeypatch.setattr(Record, "_save", lambda self: (saved.append(self.loop.step), save(self))[1])
    options = ("--tasks-per-step", 6, "--chunk", 2, "--checkpoint-every", 5, "--precision", "bf16", "--no-progress")
    status, text, error = command(capsys, "fit", table[0] / "a.csv", *FIT, "--out", tmp_path / "run", *options)
    assert status == 0, error
    assert "\n  6 tasks a step\n" in text
    assert (plans[0].tasks_per_step, plans[0].chunk, plans[0].precision) == (6, 2, "bf16")
    assert saved[:4] == [5, 10, 15, 20]
    options = ("--memory", "40KiB", "--no-progress", "--overwrite")
    status, text, error = command(capsys, "fit", table[0] / "a.csv", *FIT, "--out", tmp_path / "run", *options)
    assert status == 0, error
    assert "\n  16 tasks a step\n" in text
    assert 1 <= plans[-1].chunk < 16


def test_what_ranks_make_of_a_step_is_said(monkeypatch):
    from bayesmeta.errors import OptionError
    from bayesmeta.tabular import lesson, said

    for module in (lesson, said):
        monkeypatch.setattr(module, "count_ranks", lambda: 2)
    each = lesson._tasks_per_step(100, None)
    assert said.what_a_step_has(each, None, 100).startswith("  2 ranks × 16 tasks a step: steps of 32 tasks")
    assert "--tasks-per-step 8 would share out" in said.what_a_step_has(each, None, 100)
    each = lesson._tasks_per_step(13, None)
    line = said.what_a_step_has(each, None, 13)
    assert line.startswith("  2 ranks × 6 tasks a step: steps of 12 tasks")
    assert "--tasks-per-step" not in line, "what it would advise is refused"
    assert said.what_a_step_has(8, 8, 100) == "  2 ranks × 8 tasks a step: steps of 16 tasks"
    assert line.endswith("16 of each would be more than there are: 13")
    assert lesson._tasks_per_step(13, 6) == 6
    with pytest.raises(OptionError, match="Use tasks_per_step=6 or less"):
        lesson._tasks_per_step(13, 7)


@pytest.mark.parametrize(
    ("number", "status", "how"), [("SIGTERM", 143, "stopped by SIGTERM"), ("SIGINT", 130, "interrupted")]
)
def test_a_run_that_is_stopped_says_what_it_kept(number, status, how, table, capsys, monkeypatch, tmp_path):
    from bayesmeta.train.loop import Loop

    advance = Loop.advance

    def stopped(self):
        advance(self)
        if self.step == 7:
            os.kill(os.getpid(), getattr(signal, number))

    monkeypatch.setattr(Loop, "advance", stopped)
    out = tmp_path / "run"
    arguments = ("fit", table[0] / "a.csv", *FIT, "--out", out, "--no-progress")
    found, _, error = command(capsys, *arguments)
    assert found == status
    assert error == f"bayesmeta: {how} after step 7; its checkpoint is in {out}: go on with --resume\n"
    found, text, error = command(capsys, *arguments, "--resume")
    assert found == 0, error
    assert "Done: 20 steps" in text


def test_a_stop_outside_of_the_steps_says_what_is_there(table, capsys, monkeypatch, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bayesmeta.tabular.fit.fit_csv", interrupted)
    for out, words in ((table[0] / "run", "the checkpoint of step 20 is kept: go on with --resume"),
                       (tmp_path / "none", "there is no checkpoint yet")):  # fmt: skip
        status, _, error = command(capsys, "fit", "a.csv", *FIT, "--out", out)
        assert (status, error) == (130, f"bayesmeta: interrupted; {words}\n")
    monkeypatch.setenv("RANK", "1")
    assert command(capsys, "fit", "a.csv", *FIT, "--out", tmp_path / "none") == (130, "", "")
