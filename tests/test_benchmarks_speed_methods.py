"""The rows of speed_meta_step about Bayesian methods: what is compared, what is refused, what a cap leaves."""

import argparse
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.ops.svgd import svgd_direction
from benchmarks import _our_methods, _peers, _speed_methods, speed_meta_step
from benchmarks._our_methods import CASES, Race

SMALL = Race(tasks=3, shots=4, hidden=(5,))


def found(name: str, seed: int = 0) -> tuple[Any, bm.TaskBatch, dict[str, torch.Tensor]]:
    case = CASES[name]
    method = _our_methods.make(case, SMALL, seed)
    batch = bm.tasks.Sinusoid(0.1).sample(SMALL.tasks, support=SMALL.shots, query=SMALL.shots, generator=seed)
    return method, batch, _our_methods.reference(method, batch, seed)


# -- what a peer is given is what our loss used -------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_reference_is_the_loss_and_gradient_and_leaves_no_trace(name):
    method, batch, given = found(name)
    loss = method.loss(batch, generator=torch.Generator().manual_seed(0))
    assert float(given["loss"]) == float(loss.detach())
    loss.backward()
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert trained
    assert {n for n in given if f"gradient of {n}" in given} == set(trained)
    for n, parameter in trained.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(given[f"gradient of {n}"], expected)
    assert given["y"].shape == given["query_x"].shape == (3, 4, 1)
    assert ("noise" in given) == (name == "abml")


def forward(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A network 1-5-1 with ReLU, written out, of flat weights."""
    w1, b1, w2, b2 = weights.split([5, 5, 5, 1])
    return torch.relu(x @ w1[None] + b1) @ w2[:, None] + b2


def test_the_noise_is_that_of_the_loss():
    """ABML's loss once more, task by task, from the weights, batch and noise that a peer is given alone."""
    method, _, given = found("abml")
    given = {name: value.double() for name, value in given.items()}
    prior = given["program.prior.loc"], given["program.prior.log_scale"]

    def elbo(q, x, y, noise):
        weights = [q[0] + q[1].exp() * e for e in noise]
        likelihood = torch.stack([torch.distributions.Normal(forward(w, x), 0.1).log_prob(y).sum() for w in weights])
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(q[0], q[1].exp()), normal(prior[0], prior[1].exp())).sum()
        return likelihood.mean() - kl

    def loss(all_noise, steps=5):
        total = 0.0
        for task in range(SMALL.tasks):
            x, y, query_x, query_y = (given[n][task] for n in ("x", "y", "query_x", "query_y"))
            noise = all_noise[:, :, task]
            q = tuple(p.clone().requires_grad_() for p in prior)
            for step in range(steps):
                gradient = torch.autograd.grad(elbo(q, x, y, noise[step]) / len(x), q)
                q = tuple((a + 1e-4 * g).detach().requires_grad_() for a, g in zip(q, gradient, strict=True))
            total -= float(elbo(q, torch.cat([x, query_x]), torch.cat([y, query_y]), noise[5]).detach()) / SMALL.tasks
        return total

    assert float(given["loss"]) == pytest.approx(loss(given["noise"]), rel=1e-4)
    assert method.inner_steps == 5
    # the controls: the draws in another order, or a step less
    for other in (loss(given["noise"].flip(0)), loss(given["noise"], steps=4)):
        assert float(given["loss"]) != pytest.approx(other, rel=3e-3)


def test_bmaml_is_raced_on_the_chaser_loss():
    """From the weights and batch alone: the distance of the particles to their leader."""
    _, _, given = found("bmaml")
    given = {name: value.double() for name, value in given.items()}
    loc, scale = given["program.prior.loc"], given["program.prior.log_scale"].exp()

    def climb(phi, x, y):
        phi = phi.detach().requires_grad_()
        likelihood = sum(torch.distributions.Normal(forward(w, x), 0.1).log_prob(y).sum() for w in phi)
        prior = torch.distributions.Normal(loc, scale).log_prob(phi).sum()
        (score,) = torch.autograd.grad(likelihood + prior, phi)
        return phi + 1e-4 / len(x) * svgd_direction(phi, score)

    total = 0.0
    for task in range(SMALL.tasks):
        x, y, query_x, query_y = (given[n][task] for n in ("x", "y", "query_x", "query_y"))
        chaser = climb(given["particles"] + loc, x, y)
        leader = climb(chaser, torch.cat([x, query_x]), torch.cat([y, query_y]))
        total += float((chaser - leader).detach().square().sum()) / SMALL.tasks
    assert float(given["loss"]) == pytest.approx(total, rel=1e-3)


# -- the comparison ----------------------------------------------------------------------------------------------


def test_gradients_are_compared_one_by_one():
    given = {
        "loss": np.array(2.0),
        "gradient of a": np.array([1.0, -4.0]),
        "gradient of b": np.zeros(3),
        "a": np.ones(2),
    }
    theirs = {"loss": np.array(2.0), "a": np.array([[1.0], [-4.0001]])}
    assert _speed_methods.check_same(given, theirs, 1e-3) == pytest.approx(2.5e-5)  # b is not used, and need not be
    for changed, message in (
        ({"a": np.array([1.0, 4.0])}, "our a differ by 2 .*would mean nothing"),
        ({"loss": np.array(2.1)}, "our loss differ by 0.05"),
        ({"a": np.array([1.0, np.nan])}, "our a differ by nan"),
        ({"a": np.ones(3)}, r"JAX has \[3\] for a, and ours \[2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            _speed_methods.check_same(given, theirs | changed, 1e-3)
    with pytest.raises(RuntimeError, match="JAX has nothing for b"):  # it has a gradient, and they do not
        _speed_methods.check_same(given | {"gradient of b": np.ones(3)}, theirs, 1e-3)


class FakePeer:
    """Either side of a race: answers from a table, and counts."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.asked = answers, []

    def __enter__(self) -> "FakePeer":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, limit: float | None = None, /, **request: Any) -> dict[str, Any]:
        kind, value = next(iter(request.items()))
        self.asked.append(kind)
        answer = self.answers[kind]
        if isinstance(answer, Exception):
            raise answer
        return {"seconds": answer * value} if isinstance(answer, float) else answer


def fake_race(monkeypatch, ours: dict[str, Any], same: bool = True) -> tuple[list[Any], FakePeer]:
    mine, theirs = FakePeer(ours), FakePeer({"block": 0.004})
    monkeypatch.setattr(_speed_methods, "our_peer", lambda *_: mine)
    monkeypatch.setattr(_speed_methods, "jax_methods_peer", lambda *_: theirs)

    def compare(*_):
        if not same:
            raise RuntimeError("they differ")
        return 1e-7

    monkeypatch.setattr(_speed_methods, "compare_gradients", compare)
    args = argparse.Namespace(seed=0, compile_limit=9.0, rounds=3, quick=False)
    return _speed_methods.race("abml", args, speed_meta_step.ratio_of_medians, Path("cache")), theirs


def test_rows_of_a_race(monkeypatch):
    ours = {"compile": {"seconds": 33.0, "report": "compiled"}, "block": 0.002, "eager": 0.010}
    rows, theirs = fake_race(monkeypatch, ours)
    assert [(row.name, row.ours, row.reference, row.ratio, row.seconds) for row in rows] == [
        ("abml_5_steps_compiled_vs_jax_scan", pytest.approx(2.0), pytest.approx(4.0), pytest.approx(2.0), 33.0),
        ("abml_5_steps_compiled_vs_eager", pytest.approx(2.0), pytest.approx(10.0), pytest.approx(5.0), None),
    ]
    assert len(theirs.asked) == 4  # a block to warm up, and three rounds


def test_nothing_is_timed_where_the_gradients_differ(monkeypatch):
    with pytest.raises(RuntimeError, match="they differ"):
        fake_race(monkeypatch, {"compile": pytest.fail}, same=False)


@pytest.mark.parametrize("answer", [TimeoutError("late"), {"error": "The step is not compiled: no."}])
def test_a_step_that_is_not_compiled_in_time_is_a_missed_bar(monkeypatch, answer):
    rows, theirs = fake_race(monkeypatch, {"compile": answer})
    assert [(row.name, row.ours, row.bar, row.passes) for row in rows] == [
        ("abml_5_steps_compiled_vs_jax_scan", None, "compiled in 9 s", False)
    ]
    assert theirs.asked == []


# -- our process --------------------------------------------------------------------------------------------------


def test_our_side_answers_and_writes(tmp_path):
    ours = _our_methods.Ours(CASES["last_layer"], SMALL, 0)
    names = ours.answer({"write": str(tmp_path / "given.npz")})["parameters"]
    with np.load(tmp_path / "given.npz") as file:
        given = dict(file)
    assert set(names) < set(given)
    same = {name.removeprefix("gradient of "): v for name, v in given.items() if name.startswith("gradient of ")}
    assert _speed_methods.check_same(given, same | {"loss": given["loss"]}) == 0
    assert ours.answer({"eager": 2})["seconds"] > 0
    assert ours.eager.step == 2
    assert math.isfinite(float(ours.eager.loss))
    for unknown in ({"block": 3}, {"what": 1}):  # a block before it is compiled, and nonsense
        with pytest.raises(ValueError, match="unknown request"):
            ours.answer(unknown)


def test_our_side_tells_why_it_is_not_compiled(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("The step is not compiled: the sea was rough.")

    monkeypatch.setattr(_our_methods, "CompiledRun", refuse)
    ours = _our_methods.Ours(CASES["cnp"], SMALL, 0)
    assert ours.answer({"compile": True}) == {"error": "The step is not compiled: the sea was rough."}


def test_our_process_keeps_its_answers_apart_from_what_is_printed(monkeypatch, capfd):
    """As a compiler prints: on the file descriptor, past Python."""

    class Loud:
        def __init__(self, *_: Any) -> None: ...

        def answer(self, request: dict[str, Any]) -> dict[str, Any]:
            import os

            os.write(1, b"loud\n")
            return {"it": request["x"]}

    import os

    kept = os.dup(1)
    threads = torch.get_num_threads()
    monkeypatch.setattr(_our_methods, "Ours", Loud)
    monkeypatch.setattr(sys, "argv", ["x", json.dumps({"case": "cnp", "seed": 0})])
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"x": 1}\n{"x": 2}\n'))
    try:
        _our_methods.main()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        torch.set_num_threads(threads)
    seen = capfd.readouterr()
    assert seen.out == '{"it": 1}\n{"it": 2}\n'
    assert seen.err == "loud\nloud\n"


def test_a_peer_that_takes_too_long_is_ended_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(_peers, "HERE", tmp_path / "benchmarks")
    (tmp_path / "benchmarks").mkdir()
    pid = tmp_path / "pid"
    (tmp_path / "benchmarks" / "slow.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "for line in sys.stdin:\n"
        "    time.sleep(60)\n"
    )
    begin = time.perf_counter()
    with _peers.Peer("slow.py", python=Path(sys.executable)) as peer, pytest.raises(TimeoutError, match=r"within 1 s"):
        peer.ask(1.0, compile=True)
    assert peer.process.poll() == -9
    assert time.perf_counter() - begin < 20
    stat = Path("/proc") / pid.read_text() / "stat"
    if sys.platform == "linux":
        for _ in range(100):
            if not stat.exists() or stat.read_text().split()[2] == "Z":
                break
            time.sleep(0.05)
        else:
            pytest.fail("the peer's child lives on")


# -- the reuse of what was compiled -------------------------------------------------------------------------------


def test_the_second_process_shares_the_first_one_s_cache(monkeypatch):
    caches, seconds = [], iter([30.0, 10.0])

    def peer(name: str, seed: int, cache: Path) -> FakePeer:
        caches.append((cache, cache.exists()))
        return FakePeer({"compile": {"seconds": next(seconds), "report": "compiled"}})

    monkeypatch.setattr(_speed_methods, "our_peer", peer)
    row = _speed_methods.second_compile(argparse.Namespace(seed=0, compile_limit=9.0))
    assert (row.name, row.ours, row.reference, row.ratio) == ("second_compile_vs_first", 10.0, 30.0, 3.0)
    assert caches[0] == caches[1]
    assert caches[0][1]
    assert not caches[0][0].exists()


def test_the_flags(monkeypatch):
    monkeypatch.setattr(speed_meta_step, "one_core", lambda: None)
    seen = []
    monkeypatch.setattr(speed_meta_step, "method_rows", lambda args, ratio: seen.append(args.methods) or [])
    threads = torch.get_num_threads()
    plain = {"threads": 1, "rounds": 2, "seed": 0, "inner_steps": [], "compile_limit": 1.0}
    try:
        for quick, methods, expected in (
            (True, None, list(_speed_methods.QUICK)),
            (False, None, list(CASES)),
            (True, ["abml"], ["abml"]),
        ):
            options = {**plain, "quick": quick, "compiled": True, "methods": methods}
            assert speed_meta_step.run(argparse.Namespace(**options)) == []
            assert seen.pop() == expected
        for methods, compiled, message in (
            (["fish"], True, "unknown method fish"),
            ([], True, "Nothing is left"),
            (None, False, "Nothing is left"),
        ):
            options = {**plain, "quick": False, "compiled": compiled, "methods": methods}
            with pytest.raises(SystemExit, match=message):
                speed_meta_step.run(argparse.Namespace(**options))
    finally:
        torch.set_num_threads(threads)
    assert seen == []
