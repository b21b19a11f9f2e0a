"""Rows of ``speed_meta_step`` about Bayesian methods: the compiled step of ``fit`` against the same thing in JAX.

ABML (5 inner steps, 5 draws), BMAML (10 particles, SVGD, chaser loss), the Bayesian last layer (exact, in double
precision inside, as ours) and a conditional neural process (no random subsets), on sinusoids with noise. Ours and
JAX's are processes of their own (:mod:`benchmarks._our_methods`, ``_jax_methods.py``) on one core.

Nothing is timed before both have the same loss and meta-gradient of the same weights, batch and noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks._our_methods import CASES, Case, Race
from benchmarks._peers import Peer
from benchmarks._speed_compiled import take_turns
from benchmarks.harness import Row

OURS = "benchmarks._our_methods"
#: Of the largest entry; sums of about 10⁵ products in float32, of which JAX and torch choose different orders.
TOLERANCE = 1e-4
QUICK = ("cnp",)  # what fits into a quick run
PREFIX = "gradient of "


def check_same(
    given: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], tolerance: float = TOLERANCE
) -> float:
    """Largest difference of loss and meta-gradient, relative to the loss and to each gradient's largest entry.

    Args:
        given: what :func:`benchmarks._our_methods.reference` gave.
        theirs: the peer's ``loss`` and gradients, under the same names.
        tolerance: allowed difference.

    Raises:
        RuntimeError: when it is above the tolerance, not finite, or there is not a gradient for each of ours.
    """
    ours = {name.removeprefix(PREFIX): value for name, value in given.items() if name.startswith(PREFIX)}
    worst = 0.0
    for name, value in {"loss": given["loss"], **ours}.items():
        scale = float(np.abs(value).max())
        if name not in theirs and scale == 0.0:  # a parameter that this loss does not use
            continue
        if name not in theirs or theirs[name].size != value.size:
            shape = list(theirs[name].shape) if name in theirs else "nothing"
            raise RuntimeError(f"JAX has {shape} for {name}, and ours {list(value.shape)}: they train other networks.")
        off = float(np.abs(value.ravel() - theirs[name].ravel()).max()) / max(scale, 1e-30)
        if not off <= tolerance:
            raise RuntimeError(
                f"JAX's and our {name} differ by {off:.2g} of the largest entry (allowed: {tolerance:g}): a comparison "
                "of their speed would mean nothing."
            )
        worst = max(worst, off)
    return worst


def compare_gradients(ours: Peer, peer: Peer) -> float:
    """Let both give loss and meta-gradient of one batch, and compare them.

    Raises:
        RuntimeError: when they differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, into = Path(folder) / "given.npz", Path(folder) / "gradient.npz"
        ours.ask(write=str(given))
        peer.ask(gradient=str(given), into=str(into))
        with np.load(given) as mine, np.load(into) as other:
            return check_same(dict(mine), dict(other))


def our_peer(name: str, seed: int, cache: Path) -> Peer:
    """Our side in a process of its own, whose compiler keeps what it makes in ``cache``."""
    arguments = json.dumps({"case": name, "seed": seed})
    return Peer(OURS, arguments, python=Path(sys.executable), env={"TORCHINDUCTOR_CACHE_DIR": str(cache)})


def jax_methods_peer(name: str, case: Case) -> Peer:
    """The same method in JAX."""
    return Peer("_jax_methods.py", json.dumps({"method": name, **case.jax_settings(Race())}))


def method_rows(args: argparse.Namespace, ratio: Callable[..., tuple[float, float]]) -> list[Row]:
    """The rows of all methods, and of the reuse of what was compiled.

    Args:
        args: ``methods``, ``rounds``, ``seed``, ``compile_limit`` and ``quick``.
        ratio: of medians over rounds, with its standard error.
    """
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name in args.methods:
            rows += race(name, args, ratio, Path(cache))
    if args.methods and not args.quick:
        rows += [second_compile(args)]
    return rows


def race(name: str, args: argparse.Namespace, ratio: Callable[..., tuple[float, float]], cache: Path) -> list[Row]:
    """Compare, compile, and take turns; the rows of one method."""
    case, limit = CASES[name], args.compile_limit
    with our_peer(name, args.seed, cache) as ours, jax_methods_peer(name, case) as peer:
        off = compare_gradients(ours, peer)
        print(f"{case.row}: JAX's loss and meta-gradient agree to {off:.1g}", flush=True)
        try:
            done = ours.ask(limit, compile=True)
        except TimeoutError:
            done = {"error": f"The step is not compiled: it took more than {limit:g} s."}
        if "error" in done:
            print(f"{case.row}: {done['error']}", flush=True)
            return [Row(f"{case.row}_compiled_vs_jax_scan", None, bar=f"compiled in {limit:g} s", passes=False)]
        print(f"{case.row}: {done['report']}", flush=True)
        rounds = args.rounds

        def side(process: Peer, request: str) -> Callable[[int], float]:
            return lambda steps: float(process.ask(**{request: steps})["seconds"])

        sides = {"ours": side(ours, "block"), "jax_scan": side(peer, "block"), "eager": side(ours, "eager")}
        times = take_turns(sides, case.block if not args.quick else max(case.block // 4, 5), rounds)
    return timing_rows(case.row, times, float(done["seconds"]), args.seed, ratio)


def timing_rows(
    name: str, times: Mapping[str, list[float]], compiled: float, seed: int, ratio: Callable[..., tuple[float, float]]
) -> list[Row]:
    """Ours compiled against JAX and against our own eager step; the seconds of compiling stand in the first.

    Args:
        name: of the rows.
        times: milliseconds a step of ``ours``, ``jax_scan`` and ``eager``, one for each round.
        compiled: seconds.
        seed: of the bootstrap.
        ratio: as in :func:`method_rows`.
    """
    rows = []
    for other in ("jax_scan", "eager"):
        value, error = ratio(times[other], times["ours"], seed)
        ours, theirs = (float(np.median(times[side])) for side in ("ours", other))
        seconds = compiled if other == "jax_scan" else None
        rows.append(
            Row(f"{name}_compiled_vs_{other}", ours, theirs, ratio=value, standard_error=error, seconds=seconds)
        )
        print(f"{rows[-1].name}: {ours:.3g} against {theirs:.3g} ms, ratio {value:.3g} ± {error:.2g}", flush=True)
    return rows


def second_compile(args: argparse.Namespace, name: str = "cnp") -> Row:
    """Seconds to compile one step in two processes one after the other, which share a cache that was empty at first.

    The first also makes what all steps share (a precompiled header). ``ratio`` is the first over the second.
    """
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            with our_peer(name, args.seed, Path(cache)) as ours:
                done = ours.ask(args.compile_limit, compile=True)
            if "error" in done:
                raise RuntimeError(done["error"])
            seconds.append(float(done["seconds"]))
    first, second = seconds
    print(f"second_compile_vs_first: {second:.1f} against {first:.1f} s", flush=True)
    return Row("second_compile_vs_first", second, first, ratio=first / second)
