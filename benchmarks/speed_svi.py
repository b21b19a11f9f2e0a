"""Time of one step of SVI on the radon hierarchy: ``MetaSVI(compile="inductor")`` against Pyro and NumPyro.

The model is that of Gelman and Hill's radon study as it is usually written: 919 houses in 85 counties, an intercept for
each county around a line in the county's uranium, a slope for the floor, and the scales of both levels, under a
mean-field guide (AutoNormal), ``Trace_ELBO`` with one particle and Adam; the same Pyro program, unchanged, goes to
``MetaSVI``, ``pyro.infer.SVI`` and ``JitTrace_ELBO``. The data are drawn here from the model itself (the time of a step
does not depend on them), under the seed. Sides take turns in blocks, on one core and one thread, and what is compared
is the processor's time, which waiting for other work does not lengthen.

Each side returns its loss as a number in each step, but for ``numpyro_scan``, which runs a block's steps in one
compiled loop. NumPyro runs in an environment and a process of its own (``benchmarks/_peers.py``). ``ours`` and
``reference`` are medians in milliseconds a step, ``ratio`` the peer's over ours, with a standard error by a bootstrap
over rounds.

First all sides train for the same number of steps, and the losses that they reach, means over many draws, are rows too:
``final_loss_…`` have ``difference`` ours minus theirs in nats (of about 1000), held to 4 standard errors or 0.5%.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import bayesmeta as bm
from benchmarks._peers import Peer, one_core
from benchmarks._speed_compiled import take_turns
from benchmarks.harness import Row, at_least, at_most, main
from benchmarks.speed_meta_step import ratio_of_medians

HOUSES, COUNTIES, RATE = 919, 85, 1e-2
BARS = {"pyro_svi": 30.0, "pyro_jit_trace": None, "numpyro_update": 1.0, "numpyro_scan": None}


def model(county: Tensor, floor: Tensor, uranium: Tensor, y: Tensor) -> None:
    """The hierarchy."""
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
    """Data of the model."""
    generator = torch.Generator().manual_seed(seed)
    county = torch.randint(COUNTIES, (HOUSES,), generator=generator)
    floor = (torch.rand(HOUSES, generator=generator) < 0.17).float()
    uranium = 0.4 * torch.randn(COUNTIES, generator=generator)
    level = 1.5 + 0.7 * uranium + 0.3 * torch.randn(COUNTIES, generator=generator)
    y = level[county] - 0.7 * floor + 0.75 * torch.randn(HOUSES, generator=generator)
    return {"county": county, "floor": floor, "uranium": uranium, "y": y}


class Side:
    """One trainer in this process.

    Args:
        step: makes a step on the data.
        loss: at the parameters as they are, one draw.
    """

    def __init__(self, step: Callable[..., float], loss: Callable[..., float], data: dict[str, Tensor]) -> None:
        self.step, self.loss, self.data = step, loss, tuple(data.values())

    def block(self, steps: int) -> float:
        """CPU seconds of some steps."""
        begin = time.process_time()
        for _ in range(steps):
            self.step(*self.data)
        return time.process_time() - begin


def our_side(data: dict[str, Tensor]) -> tuple[Side, bm.MetaSVI]:
    """Ours, compiled."""

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, RATE)

    svi = bm.MetaSVI(model, AutoNormal(model), adam, Trace_ELBO(), compile="inductor")
    return Side(svi.step, svi.evaluate_loss, data), svi


def pyro_side(data: dict[str, Tensor], elbo: Any) -> Side:
    """Pyro's SVI, in a parameter store of its own."""
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": RATE}), elbo)

    def in_store(function: Callable[..., float]) -> Callable[..., float]:
        def inside(*args: Tensor) -> float:
            with pyro.get_param_store().scope(store):
                return float(function(*args))

        return inside

    return Side(in_store(svi.step), in_store(svi.evaluate_loss), data)


def run(args: argparse.Namespace) -> list[Row]:
    """Train, compare where all sides are, and time."""
    torch.set_num_threads(1)
    one_core()
    pyro.set_rng_seed(args.seed)
    rounds, train, draws = (4, 100, 50) if args.quick else (args.rounds, 3000, 1000)
    data = draw(args.seed)
    ours, svi = our_side(data)
    sides = {"ours": ours, "pyro_svi": pyro_side(data, Trace_ELBO())}
    sides["pyro_jit_trace"] = pyro_side(data, JitTrace_ELBO(ignore_jit_warnings=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "radon.npz"
        arrays: dict[str, Any] = {name: value.numpy() for name, value in data.items()}
        np.savez(path, **arrays)
        with Peer("_numpyro_radon.py", path, RATE) as peer:
            rows = final_losses(sides, peer, train, draws, judged=not args.quick)
            print(f"ours: {svi.compiled}", flush=True)
            blocks: dict[str, Callable[[int], float]] = {name: side.block for name, side in sides.items()}
            for name in ("update", "scan"):
                blocks[f"numpyro_{name}"] = lambda n, name=name: float(peer.ask(**{name: n})["seconds"])  # type: ignore[misc]
            times = take_turns(blocks, 20 if args.quick else 50, rounds)
    return timing_rows(times, args) + rows


def timing_rows(times: dict[str, list[float]], args: argparse.Namespace) -> list[Row]:
    """A row for each peer."""
    rows = []
    for name, bar in BARS.items():
        ratio, error = ratio_of_medians(times[name], times["ours"], args.seed)
        ours, theirs = (float(np.median(times[side])) for side in ("ours", name))
        verdict = {} if bar is None else at_least(bar).judge(ratio)
        rows.append(Row(f"radon_compiled_vs_{name}", ours, theirs, ratio=ratio, standard_error=error, **verdict))
    return rows


def final_losses(sides: dict[str, Side], peer: Peer, steps: int, draws: int, *, judged: bool) -> list[Row]:
    """The loss that each side reaches, beside ours."""
    means, errors = {}, {}
    for name, side in sides.items():
        side.block(steps)
        values = np.array([side.loss(*side.data) for _ in range(draws)])
        means[name], errors[name] = float(values.mean()), float(values.std() / draws**0.5)
    peer.ask(scan=steps)
    means["numpyro"], errors["numpyro"] = float(peer.ask(loss=draws)["loss"]), errors["ours"]
    rows = []
    for name in ("pyro_svi", "pyro_jit_trace", "numpyro"):
        error = (errors["ours"] ** 2 + errors[name] ** 2) ** 0.5
        difference = means["ours"] - means[name]
        limit = max(4 * error, 0.005 * abs(means["ours"]))
        verdict = at_most(round(limit, 2)).judge(abs(difference)) if judged else {}
        rows.append(
            Row(
                f"final_loss_vs_{name}",
                means["ours"],
                means[name],
                difference=difference,
                standard_error=error,
                **verdict,
            )
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the race (default: 20; quick: 4)")


if __name__ == "__main__":
    main(
        "speed_svi",
        run,
        add_arguments,
        {"unit": "CPU ms per step", "houses": HOUSES, "counties": COUNTIES, "rate": RATE},
    )
