"""Time of one step of SVI on two Pyro programs: ``MetaSVI(compile="inductor")`` against Pyro and NumPyro.

- ``radon``: Gelman and Hill's study as it is usually written: 919 houses in 85 counties, an intercept for each county
  around a line in the county's uranium, a slope for the floor, and the scales of both levels.
- ``bnn``: a hierarchical Bayesian neural network: 20 tasks of 20 points, each with its own 1-10-1 tanh network, whose
  weights share a prior scale that is learned, as the noise is. (Left out by --quick, unless asked for by --models.)

The guide is mean-field (AutoNormal), with ``Trace_ELBO``, one particle, and Adam; the same Pyro program, unchanged,
goes to ``MetaSVI``, ``pyro.infer.SVI`` and ``JitTrace_ELBO``. The data are drawn here from the models themselves (the
time of a step does not depend on them), under the seed, and all guides begin at one point. Sides take turns in blocks,
on one core and one thread, and what is compared is the processor's time, which waiting for other work does not
lengthen.

Each side returns its loss as a number in each step, but for ``numpyro_scan``, which runs a block's steps in one
compiled loop. Beside it stands also ``MetaSVI.run``, with several steps in one graph (``…_run_vs_numpyro_scan``; not in
--quick, since that graph takes a minute to compile). These two take turns in blocks of 2000 steps: at the start of its
turn a side finds the processor's caches full of the other's data, and it has a request to read, which is little beside
50 single steps but not beside 50 of a loop.

NumPyro runs in an environment and a process of its own (``benchmarks/_peers.py``). ``ours`` and ``reference`` are
medians in milliseconds a step, ``ratio`` the peer's over ours, with a standard error by a bootstrap over rounds;
``seconds`` of the first row and of the last is what compiling took.

Nothing is timed before NumPyro's loss of the guide that we trained is ours, within 5 standard errors. The losses that
the trainings reach are rows too: ``…_final_loss_vs_…`` have ``difference`` ours minus theirs in nats. How far two
trainings of one kind come to lie apart is measured by eight of NumPyro's: the standard error is of the difference of
two trainings (of one and a mean of eight), and the bar 4 of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

import bayesmeta as bm
from bayesmeta.train.compilation.compiled_svi import BLOCK, LEAST
from benchmarks._peers import Peer, one_core
from benchmarks._speed_compiled import take_turns
from benchmarks.harness import Row, at_least, at_most, main
from benchmarks.runs import refuse_unknown
from benchmarks.speed_meta_step import ratio_of_medians

HOUSES, COUNTIES, RATE = 919, 85, 1e-2
TASKS, POINTS, HIDDEN = 20, 20, 10
BARS = {
    "pyro_svi": 30.0, "pyro_svi_unvalidated": None, "pyro_jit_trace": None, "numpyro_update": 1.0, "numpyro_scan": None,
}  # fmt: skip
REPEATS = 8
COMPILING = 2  # steps until ours is compiled
LONG = 2000  # steps in a block of a compiled loop


# -- the models ---------------------------------------------------------------------------------------------------


def model(county: Tensor, floor: Tensor, uranium: Tensor, y: Tensor) -> None:
    """The radon hierarchy."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    gain = pyro.sample("gain", dist.Normal(0.0, 10.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("counties", len(uranium)):
        level = pyro.sample("level", dist.Normal(mean + gain * uranium, spread))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(level[county] + slope * floor, noise), obs=y)


def draw(seed: int) -> dict[str, Tensor]:
    """Data of the radon hierarchy."""
    generator = torch.Generator().manual_seed(seed)
    county = torch.randint(COUNTIES, (HOUSES,), generator=generator)
    floor = (torch.rand(HOUSES, generator=generator) < 0.17).float()
    uranium = 0.4 * torch.randn(COUNTIES, generator=generator)
    level = 1.5 + 0.7 * uranium + 0.3 * torch.randn(COUNTIES, generator=generator)
    y = level[county] - 0.7 * floor + 0.75 * torch.randn(HOUSES, generator=generator)
    return {"county": county, "floor": floor, "uranium": uranium, "y": y}


def bnn(x: Tensor, y: Tensor) -> None:
    """The hierarchical Bayesian neural network; x ``[tasks, points, 1]`` and y ``[tasks, points]``."""
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(x)):
        w1 = pyro.sample("w1", dist.Normal(0.0, spread).expand([len(x), HIDDEN]).to_event(1))
        b1 = pyro.sample("b1", dist.Normal(0.0, spread).expand([len(x), HIDDEN]).to_event(1))
        w2 = pyro.sample("w2", dist.Normal(0.0, spread).expand([len(x), HIDDEN]).to_event(1))
        b2 = pyro.sample("b2", dist.Normal(0.0, spread))
        mean = _network(x, w1, b1, w2, b2)
        pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)


def _network(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    hidden = torch.tanh(x * w1.unsqueeze(-2) + b1.unsqueeze(-2))
    return (hidden * w2.unsqueeze(-2)).sum(-1) + b2.unsqueeze(-1)


def draw_bnn(seed: int) -> dict[str, Tensor]:
    """Data of the network."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(TASKS, POINTS, 1, generator=generator) - 2
    w1, b1, w2 = torch.randn(3, TASKS, HIDDEN, generator=generator)
    mean = _network(x, w1, b1, w2, torch.randn(TASKS, generator=generator))
    return {"x": x, "y": mean + 0.2 * torch.randn(TASKS, POINTS, generator=generator)}


@dataclass(frozen=True)
class Problem:
    """A Pyro program with its data, its peer, and where its guides begin.

    Attributes:
        model: the program; it takes what ``draw`` gives.
        draw: data under a seed, by the names of the program's arguments.
        peer: the script that has the same model in NumPyro.
        local: event shapes of sites that begin at small random numbers, with what else is on their left.
        scales: sites that begin at 0.5; the others begin at 0.
    """

    model: Callable[..., None]
    draw: Callable[[int], dict[str, Tensor]]
    peer: str
    local: dict[str, tuple[int, ...]]
    zero: tuple[str, ...] = ()
    scales: tuple[str, ...] = ("spread", "noise")

    def start(self, seed: int) -> dict[str, Tensor]:
        """Values of all sites."""
        generator = torch.Generator().manual_seed(seed + 1)
        first = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in self.local.items()}
        first |= {name: torch.tensor(0.0) for name in self.zero}
        return first | {name: torch.tensor(0.5) for name in self.scales}


_WIDE = (TASKS, HIDDEN)
PROBLEMS = {
    "radon": Problem(model, draw, "_numpyro_radon.py", {"level": (COUNTIES,)}, ("mean", "slope", "gain")),
    "bnn": Problem(bnn, draw_bnn, "_numpyro_bnn.py", {"w1": _WIDE, "b1": _WIDE, "w2": _WIDE, "b2": (TASKS,)}),
}


# -- the sides ----------------------------------------------------------------------------------------------------


class Side:
    """One trainer in this process.

    Args:
        step: makes a step on the data.
        loss: at the parameters as they are, one draw.
        data: of the model.
    """

    def __init__(self, step: Callable[..., float], loss: Callable[..., float], data: dict[str, Tensor]) -> None:
        self.step, self.loss, self.data = step, loss, tuple(data.values())

    def block(self, steps: int) -> float:
        """CPU seconds of some steps."""
        begin = time.process_time()
        for _ in range(steps):
            self.step(*self.data)
        return time.process_time() - begin

    def mean_loss(self, draws: int) -> tuple[float, float]:
        """Mean over draws, and its standard error."""
        values = np.array([self.loss(*self.data) for _ in range(draws)])
        return float(values.mean()), float(values.std() / draws**0.5)


def without_validation(block: Callable[[int], float]) -> Callable[[int], float]:
    """The same with Pyro's validation off, as most of it is in a compiled graph."""

    def unvalidated(steps: int) -> float:
        with pyro.validation_enabled(False):
            return block(steps)

    return unvalidated


def new_guide(problem: Problem, seed: int) -> AutoNormal:
    """The guide, where all sides begin."""
    return AutoNormal(problem.model, init_loc_fn=init_to_value(values=problem.start(seed)))


def our_side(problem: Problem, data: dict[str, Tensor], seed: int) -> tuple[Side, bm.MetaSVI]:
    """Ours, compiled."""

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, RATE)

    svi = bm.MetaSVI(problem.model, new_guide(problem, seed), adam, Trace_ELBO(), compile="inductor")
    return Side(svi.step, svi.evaluate_loss, data), svi


def pyro_side(problem: Problem, data: dict[str, Tensor], seed: int, elbo: Any) -> Side:
    """Pyro's SVI, in a parameter store of its own."""
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    svi = SVI(problem.model, new_guide(problem, seed), pyro.optim.Adam({"lr": RATE}), elbo)

    def in_store(function: Callable[..., float]) -> Callable[..., float]:
        def inside(*args: Tensor) -> float:
            with pyro.get_param_store().scope(store):
                return float(function(*args))

        return inside

    return Side(in_store(svi.step), in_store(svi.evaluate_loss), data)


def guide_parameters(svi: bm.MetaSVI, sites: list[str]) -> dict[str, np.ndarray]:
    """``loc_NAME`` and ``scale_NAME`` of our guide, which are in unconstrained space, as NumPyro's are."""
    parts = {"loc": "AutoNormal.locs", "scale": "AutoNormal.scales"}
    return {f"{part}_{s}": svi.param(f"{prefix}.{s}").numpy() for part, prefix in parts.items() for s in sites}


# -- the same thing? ----------------------------------------------------------------------------------------------


def check_same_loss(ours: tuple[float, float], theirs: tuple[float, float]) -> float:
    """Difference of two mean losses of one guide, in standard errors of it.

    Args:
        ours, theirs: mean and standard error.

    Raises:
        RuntimeError: when it is above 5, or not finite.
    """
    off = abs(ours[0] - theirs[0]) / max((ours[1] ** 2 + theirs[1] ** 2) ** 0.5, 1e-30)
    if not off <= 5:
        raise RuntimeError(
            f"Of the same guide NumPyro's loss is {theirs[0]:.2f} ± {theirs[1]:.2g} and ours {ours[0]:.2f} ± "
            f"{ours[1]:.2g}, {off:.2g} standard errors apart: they are not the same model, and a comparison of their "
            "speed would mean nothing."
        )
    return off


def final_rows(name: str, reached: dict[str, float], numpyro: list[float], *, judged: bool) -> list[Row]:
    """The losses that the trainings reach, beside ours.

    Args:
        name: of the model.
        reached: by side, with ``ours``.
        numpyro: of several trainings, whose spread is that of a training of any side.
        judged: whether the rows have bars.
    """
    spread, count = float(np.std(numpyro, ddof=1)), len(numpyro)
    others = {side: (loss, 2**0.5 * spread) for side, loss in reached.items() if side != "ours"}
    others["numpyro"] = (float(np.mean(numpyro)), spread * (1 + 1 / count) ** 0.5)
    rows = []
    for side, (loss, error) in others.items():
        difference = reached["ours"] - loss
        verdict = at_most(round(4 * error, 2)).judge(abs(difference)) if judged else {}
        row_name = f"{name}_final_loss_vs_{side}"
        rows.append(Row(row_name, reached["ours"], loss, difference=difference, standard_error=error, **verdict))
        print(f"{row_name}: {reached['ours']:.2f} against {loss:.2f} ± {error:.2g}", flush=True)
    return rows


# -- timing -------------------------------------------------------------------------------------------------------


def compare(name: str, args: argparse.Namespace, make_peer: Callable[..., Any] = Peer) -> list[Row]:
    """The rows of one model: train, compare where all sides are, and time."""
    rounds, train, draws = (4, 100, 50) if args.quick else (args.rounds, args.steps, 1000)
    problem = PROBLEMS[name]
    data = problem.draw(args.seed)
    ours, svi = our_side(problem, data, args.seed)
    sides = {"ours": ours, "pyro_svi": pyro_side(problem, data, args.seed, Trace_ELBO())}
    sides["pyro_jit_trace"] = pyro_side(problem, data, args.seed, JitTrace_ELBO(ignore_jit_warnings=True))
    begin = time.perf_counter()
    ours.block(COMPILING)
    seconds = time.perf_counter() - begin
    print(f"{name}: {svi.compiled}", flush=True)
    if not str(svi.compiled).startswith("compiled"):
        return [Row(f"{name}_compiled_vs_pyro_svi", None, bar="compiled", passes=False)]
    with tempfile.TemporaryDirectory() as folder:
        first = {f"init_{site}": value for site, value in problem.start(args.seed).items()}
        path, at = Path(folder) / "data.npz", Path(folder) / "guide.npz"
        arrays: dict[str, Any] = {key: value.numpy() for key, value in (data | first).items()}
        np.savez(path, **arrays)
        with make_peer(problem.peer, path, RATE) as peer:
            reached = {}
            for side, trainer in sides.items():
                trainer.block(train - (COMPILING if side == "ours" else 0))
                reached[side], error = trainer.mean_loss(draws)
                if side == "ours":
                    guide: dict[str, Any] = guide_parameters(svi, list(problem.start(args.seed)))
                    np.savez(at, **guide)
                    theirs = peer.ask(at=str(at), draws=draws)
                    off = check_same_loss((reached[side], error), (theirs["loss"], theirs["standard_error"]))
                    print(f"{name}: NumPyro's loss of our guide is ours, {off:.1f} standard errors off", flush=True)
            answer = peer.ask(train=train, repeats=REPEATS, draws=draws)
            rows = final_rows(name, reached, answer["losses"], judged=not args.quick)
            blocks: dict[str, Callable[[int], float]] = {side: trainer.block for side, trainer in sides.items()}
            blocks["pyro_svi_unvalidated"] = without_validation(blocks["pyro_svi"])
            for kind in ("update", "scan"):
                blocks[f"numpyro_{kind}"] = lambda n, kind=kind: float(peer.ask(**{kind: n})["seconds"])  # type: ignore[misc]
            rows = timing_rows(name, take_turns(blocks, 20 if args.quick else 50, rounds), seconds, args.seed) + rows
            if not args.quick:
                rows.append(run_row(name, svi, data, blocks["numpyro_scan"], args))
    return rows


def run_row(
    name: str, svi: bm.MetaSVI, data: dict[str, Tensor], scan: Callable[[int], float], args: argparse.Namespace
) -> Row:
    """``MetaSVI.run`` against the peer's compiled loop; a row without a figure where it makes single steps."""
    begin = time.perf_counter()
    svi.run(max(COMPILING * BLOCK, LEAST), *data.values())
    seconds = time.perf_counter() - begin
    print(f"{name}: {svi.compiled}", flush=True)
    row_name = f"{name}_run_vs_numpyro_scan"
    if "steps in one graph" not in str(svi.compiled):
        return Row(row_name, None, bar="several steps in one graph", passes=False)

    def block(steps: int) -> float:
        start = time.process_time()
        svi.run(steps, *data.values())
        return time.process_time() - start

    times = take_turns({"ours": block, "scan": scan}, LONG, args.rounds)
    ratio, error = ratio_of_medians(times["scan"], times["ours"], args.seed)
    ours, theirs = (float(np.median(times[side])) for side in ("ours", "scan"))
    print(f"{row_name}: {ours:.3g} against {theirs:.3g} ms, ratio {ratio:.3g} ± {error:.2g}", flush=True)
    return Row(row_name, ours, theirs, ratio=ratio, standard_error=error, seconds=seconds)


def timing_rows(name: str, times: dict[str, list[float]], seconds: float, seed: int) -> list[Row]:
    """A row for each peer; the seconds of compiling stand in the first."""
    rows = []
    for i, (peer, bar) in enumerate(BARS.items()):
        ratio, error = ratio_of_medians(times[peer], times["ours"], seed)
        ours, theirs = (float(np.median(times[side])) for side in ("ours", peer))
        verdict = {} if bar is None else at_least(bar).judge(ratio)
        row = Row(
            f"{name}_compiled_vs_{peer}", ours, theirs, ratio=ratio, standard_error=error,
            seconds=None if i else seconds, **verdict,
        )  # fmt: skip
        rows.append(row)
        print(f"{row.name}: {ours:.3g} against {theirs:.3g} ms, ratio {ratio:.3g} ± {error:.2g}", flush=True)
    return rows


# -- the command --------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> list[Row]:
    """Train, compare where all sides are, and time."""
    if args.models is None:
        args.models = ["radon"] if args.quick else list(PROBLEMS)
    refuse_unknown(args.models, PROBLEMS, "model")
    torch.set_num_threads(1)
    one_core()
    pyro.set_rng_seed(args.seed)
    return [row for name in args.models for row in compare(name, args)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the race (default: 20; quick: 4)")
    parser.add_argument("--steps", type=int, default=3000, help="of the trainings (default: 3000; quick: 100)")
    models = f"which of {' '.join(PROBLEMS)} (default: all; quick: radon)"
    parser.add_argument("--models", nargs="+", default=None, help=models)


if __name__ == "__main__":
    main(
        "speed_svi",
        run,
        add_arguments,
        {"unit": "CPU ms per step", "houses": HOUSES, "counties": COUNTIES, "tasks": TASKS, "points": POINTS,
         "hidden": HIDDEN, "rate": RATE},
    )  # fmt: skip
