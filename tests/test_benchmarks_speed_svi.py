"""The benchmark of SVI steps: the same models on all sides, a refusal where they differ, and honest rows."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from benchmarks import speed_svi

ROOT = Path(__file__).parents[1]


class FakePeer:
    """Answers as NumPyro's process does; its loss of our guide is what a test says.

    Args:
        loss: of our guide.
        reached: by its trainings.
    """

    def __init__(self, loss: float, reached: list[float]) -> None:
        self.loss, self.reached, self.asked = loss, reached, []

    def __call__(self, script: str, path: Path, rate: float) -> "FakePeer":
        with np.load(path) as file:
            self.given = {name: file[name] for name in file.files}
        self.script = script
        return self

    def __enter__(self) -> "FakePeer":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, **request: Any) -> dict[str, Any]:
        self.asked.append(next(iter(request)))
        if "at" in request:
            with np.load(request["at"]) as file:
                self.guide = {name: file[name] for name in file.files}
            return {"loss": self.loss, "standard_error": 0.1}
        if "train" in request:
            return {"losses": self.reached}
        return {"seconds": 0.003 * next(iter(request.values()))}


@pytest.fixture
def eager(monkeypatch):
    """Our side without a compiler, and of few steps."""
    import bayesmeta as bm

    made = []

    def side(problem, data, seed):
        guide = speed_svi.new_guide(problem, seed)
        svi = bm.MetaSVI(problem.model, guide, lambda p: torch.optim.Adam(p, speed_svi.RATE), Trace_ELBO())
        monkeypatch.setattr(type(svi), "compiled", "compiled, says the test")
        made.append(svi)
        return speed_svi.Side(svi.step, svi.evaluate_loss, data), svi

    monkeypatch.setattr(speed_svi, "our_side", side)
    monkeypatch.setattr(speed_svi, "JitTrace_ELBO", lambda **_: Trace_ELBO())
    return made


def arguments() -> argparse.Namespace:
    return argparse.Namespace(quick=False, rounds=2, steps=4, seed=0)


def test_a_run_compares_before_it_times(eager, monkeypatch):
    monkeypatch.setattr(speed_svi.Side, "mean_loss", lambda self, draws: (500.0, 0.1))
    monkeypatch.setattr(speed_svi, "take_turns", lambda sides, steps, rounds: {
        name: [3.0 if name == "ours" else 6.0] * rounds for name in sides
    })  # fmt: skip
    monkeypatch.setattr(speed_svi, "run_row", lambda name, *_: speed_svi.Row(f"{name}_run", 1.0))
    peer = FakePeer(500.2, [499.0, 501.0, 500.0])
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        rows = {row.name: row for row in speed_svi.compare("bnn", arguments(), peer)}
    assert peer.asked[:2] == ["at", "train"]
    assert peer.script == "_numpyro_bnn.py"
    assert list(rows) == [f"bnn_compiled_vs_{p}" for p in speed_svi.BARS] + [
        f"bnn_final_loss_vs_{p}" for p in ("pyro_svi", "pyro_jit_trace", "numpyro")
    ] + ["bnn_run"]
    assert {row.ratio for name, row in rows.items() if "compiled" in name} == {2.0}
    assert rows["bnn_compiled_vs_pyro_svi"].passes is False
    assert rows["bnn_compiled_vs_numpyro_update"].passes is True
    assert rows["bnn_compiled_vs_numpyro_scan"].bar is None
    # the guide that NumPyro is asked about is the one that we trained, where all of them began plus four steps
    svi, start = eager[0], speed_svi.PROBLEMS["bnn"].start(0)
    assert svi.steps == 4
    assert set(peer.guide) == {f"{part}_{site}" for part in ("loc", "scale") for site in start}
    np.testing.assert_array_equal(peer.given["init_w1"], start["w1"].numpy())
    moved = np.abs(peer.guide["loc_w1"] - peer.given["init_w1"])
    assert 0 < moved.max() <= 4.5 * speed_svi.RATE


def test_no_time_is_taken_where_the_losses_differ(eager, monkeypatch):
    monkeypatch.setattr(speed_svi.Side, "mean_loss", lambda self, draws: (500.0, 0.1))
    monkeypatch.setattr(speed_svi, "take_turns", lambda *_: pytest.fail("it timed"))
    with pytest.raises(RuntimeError, match=r"501\.00 ± 0\.1 and ours 500\.00 ± 0\.1, 7\.1 standard errors.*nothing"):
        speed_svi.compare("radon", arguments(), FakePeer(501.0, [500.0, 501.0]))


def test_a_step_that_is_not_compiled_is_a_missed_bar(eager, monkeypatch):
    made = speed_svi.our_side

    def side(*args):
        found = made(*args)
        monkeypatch.setattr(type(found[1]), "compiled", "not compiled: no reason")
        return found

    monkeypatch.setattr(speed_svi, "our_side", side)
    (row,) = speed_svi.compare("radon", arguments(), lambda *_: pytest.fail("it asked a peer"))
    assert (row.name, row.ours, row.passes) == ("radon_compiled_vs_pyro_svi", None, False)


class FakeRun:
    """A MetaSVI whose steps take no time but say how many they were."""

    def __init__(self, compiled):
        self.compiled, self.asked = compiled, []

    def run(self, steps, *data):
        self.asked.append((steps, len(data)))


def test_steps_in_one_graph_race_the_peers_loop_in_long_blocks(monkeypatch):
    turns = []

    def take_turns(sides, steps, rounds):
        turns.append((steps, {name: side(steps) for name, side in sides.items()}))
        return {"ours": [2.0] * rounds, "scan": [3.0] * rounds}

    monkeypatch.setattr(speed_svi, "take_turns", take_turns)
    svi = FakeRun("compiled at step 2; 5 steps in one graph of 9 operations")
    row = speed_svi.run_row("radon", svi, {"x": torch.ones(1)}, lambda steps: 0.5 * steps, arguments())
    assert (row.name, row.ours, row.reference, row.ratio) == ("radon_run_vs_numpyro_scan", 2.0, 3.0, 1.5)
    ((steps, taken),) = turns
    assert steps % speed_svi.BLOCK == 0  # no step of a block is made alone
    assert taken["scan"] == 0.5 * steps
    assert svi.asked == [(speed_svi.LEAST, 1), (steps, 1)]  # compiled before it is timed


def test_single_steps_do_not_race_the_peers_loop(monkeypatch):
    monkeypatch.setattr(speed_svi, "take_turns", lambda *_: pytest.fail("it timed"))
    svi = FakeRun("compiled at step 2; steps are made one by one: no reason")
    row = speed_svi.run_row("radon", svi, {}, lambda steps: 0.0, arguments())
    assert (row.ours, row.passes) == (None, False)


def test_losses_of_one_guide_are_held_to_five_standard_errors():
    assert speed_svi.check_same_loss((10.0, 0.3), (10.5, 0.4)) == pytest.approx(1.0)
    for theirs in ((13.0, 0.4), (float("nan"), 0.4)):
        with pytest.raises(RuntimeError, match="not the same model"):
            speed_svi.check_same_loss((10.0, 0.3), theirs)


def test_final_losses_are_held_to_the_spread_between_trainings():
    """Three trainings with a standard deviation of 1: of two trainings' difference √2, of one and their mean √(4/3)."""
    rows = speed_svi.final_rows("m", {"ours": 20.0, "pyro_svi": 14.0}, [19.0, 20.0, 21.0], judged=True)
    pyro_row, numpyro = rows
    assert (pyro_row.difference, pyro_row.standard_error) == (6.0, pytest.approx(2**0.5))
    assert (pyro_row.bar, pyro_row.passes) == ("≤ 5.66", False)
    assert (numpyro.difference, numpyro.standard_error) == (0.0, pytest.approx((4 / 3) ** 0.5))
    assert numpyro.passes is True
    assert all(row.bar is None for row in speed_svi.final_rows("m", {"ours": 1.0}, [1.0, 2.0], judged=False))


@pytest.mark.parametrize("name", list(speed_svi.PROBLEMS))
def test_guides_begin_where_they_are_told(name):
    """In Pyro's unconstrained space, a scale as its logarithm; and the sites are the model's."""
    problem = speed_svi.PROBLEMS[name]
    data, start = problem.draw(3), problem.start(3)
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        guide = speed_svi.new_guide(problem, 3)
        guide(*data.values())
        locs = {site: getattr(guide.locs, site).detach() for site in start}
        sites = pyro.poutine.trace(problem.model).get_trace(*data.values()).stochastic_nodes
    assert set(start) == {site for site in sites if site not in ("groups", "counties", "houses")}
    for site, value in start.items():
        expected = value.log() if site in problem.scales else value
        torch.testing.assert_close(locs[site], expected)


def test_the_network_is_the_sum_that_it_should_be():
    """Against a loop in float64; the densities of one draw against torch's own distributions."""
    data, start = speed_svi.draw_bnn(1), speed_svi.PROBLEMS["bnn"].start(1)
    trace = pyro.poutine.trace(pyro.condition(speed_svi.bnn, start)).get_trace(*data.values())
    trace.compute_log_prob()
    w1, b1, w2, b2 = (start[n].double() for n in ("w1", "b1", "w2", "b2"))
    total = 0.0
    for i, (x, y) in enumerate(zip(data["x"].double(), data["y"].double(), strict=True)):
        mean = sum(w2[i, j] * torch.tanh(w1[i, j] * x[:, 0] + b1[i, j]) for j in range(speed_svi.HIDDEN)) + b2[i]
        total += float(torch.distributions.Normal(mean, 0.5).log_prob(y).sum())
    assert float(trace.nodes["y"]["log_prob_sum"]) == pytest.approx(total, rel=1e-5)


def test_unknown_models_are_refused():
    with pytest.raises(SystemExit, match="unknown model lake"):
        speed_svi.run(argparse.Namespace(quick=True, rounds=2, steps=2, seed=0, models=["lake"]))


@pytest.mark.slow
def test_speed_svi_runs(tmp_path):
    path = tmp_path / "svi.json"
    command = [sys.executable, "-m", "benchmarks.speed_svi", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert path.exists(), done.stderr
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert all(rows[f"radon_compiled_vs_{peer}"]["ratio"] > 0 for peer in speed_svi.BARS)
    assert rows["radon_compiled_vs_pyro_svi"]["seconds"] > 0
