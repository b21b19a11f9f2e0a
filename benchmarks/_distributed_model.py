"""A cost model of a step on N ranks, and what it says of networks that were not measured here.

A step of a rank with T tasks takes

    t(N) = fixed + adapt · T + draw · N · T + handle(bytes) + exchange(N, bytes)

``draw`` is of the whole batch of N · T tasks, which each rank draws and of which it keeps T. ``handle`` is a rank's own
work for the exchange, packing and unpacking, which one rank alone has not. The exchange is a ring all-reduce, in which
each rank sends and receives 2 (N − 1) / N of the bytes, after a latency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Network:
    """What an all-reduce costs between N ranks.

    Attributes:
        latency: seconds that it takes however little is sent, for two ranks; it grows as log₂ N.
        bandwidth: bytes a second that a rank sends and receives.
    """

    latency: float
    bandwidth: float

    def seconds(self, ranks: int, size: float) -> float:
        """Of an all-reduce of so many bytes."""
        if ranks == 1:
            return 0.0
        return self.latency * math.log2(ranks) + 2 * (ranks - 1) / ranks * size / self.bandwidth


#: Assumed, not measured: eight GPUs of one machine by NVLink; machines of eight GPUs by 400 Gb/s InfiniBand, and by 25
#: Gb/s Ethernet, four fifths of which are reached. A ring crosses from one machine to the next once, and so has all of
#: the link. The latencies are the order of NCCL's for small messages.
ASSUMED = {
    "NVLink": Network(15e-6, 150e9),
    "InfiniBand": Network(25e-6, 40e9),
    "Ethernet": Network(60e-6, 2.5e9),
}


@dataclass(frozen=True)
class Handling:
    """What a rank does for an exchange beside the all-reduce.

    Attributes:
        fixed: seconds, however little is sent.
        each: seconds a byte.
    """

    fixed: float
    each: float

    def seconds(self, ranks: int, size: float) -> float:
        """For so many bytes; one rank has none to do."""
        return 0.0 if ranks == 1 else self.fixed + self.each * size


#: Of the table: drawing a task, and the fixed work of an exchange, as measured on the CPU of docs/scaling.md. Assumed:
#: a GPU goes over the buffer some ten times (to flatten, divide, take the norm), at 1 TB/s.
DRAW, HANDLING = 2e-7, Handling(6e-5, 10 / 1e12)
#: Tasks of a rank in the table.
TASKS = 25


@dataclass(frozen=True)
class Step:
    """What a step of one rank costs.

    Attributes:
        fixed: seconds that do not depend on the tasks.
        adapt: seconds a task that the rank keeps.
        draw: seconds a task that is drawn.
    """

    fixed: float
    adapt: float
    draw: float

    def seconds(self, ranks: int, tasks: int, size: float, network: Network, handling: Handling) -> float:
        """Of a step of N ranks with T tasks each that exchange so many bytes."""
        own = self.fixed + self.adapt * tasks + self.draw * ranks * tasks
        return own + handling.seconds(ranks, size) + network.seconds(ranks, size)


def fit_step(tasks: Sequence[int], seconds: Sequence[float], draw: float) -> Step:
    """The costs of a step from one rank's times with several numbers of tasks, by least squares on relative errors.

    Args:
        tasks: numbers of tasks.
        seconds: a step with each.
        draw: seconds to draw a task, measured by itself.
    """
    design = np.stack([np.ones(len(tasks)), np.asarray(tasks, float)], 1) / np.asarray(seconds)[:, None]
    (fixed, each), *_ = np.linalg.lstsq(design, np.ones(len(tasks)), rcond=None)
    return Step(float(fixed), float(each) - draw, draw)


def fit_network(sizes: Sequence[float], seconds: Sequence[float]) -> Network:
    """Latency and bandwidth from the times of all-reduces of several sizes between two ranks, on relative errors."""
    design = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], 1) / np.asarray(seconds)[:, None]
    (latency, each), *_ = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)
    return Network(max(float(latency), 0.0), 1.0 / max(float(each), 1e-15))


def fit_handling(sizes: Sequence[float], seconds: Sequence[float]) -> Handling:
    """A rank's own work from its times for exchanges of several sizes, on relative errors."""
    design = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], 1) / np.asarray(seconds)[:, None]
    (fixed, each), *_ = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)
    return Handling(max(float(fixed), 0.0), max(float(each), 0.0))


def efficiency(
    step: float,
    parameters: float,
    ranks: int,
    network: Network,
    *,
    draw: float = DRAW * TASKS,
    handling: Handling = HANDLING,
) -> float:
    """Share of N times one rank's tasks a second that N ranks reach.

    Args:
        step: seconds of a step of one rank, with the drawing of its own tasks.
        parameters: how many are trained; 4 bytes each.
        ranks: N.
        network: between them.
        draw: seconds to draw the tasks of a rank; it draws those of all.
        handling: a rank's own work for the exchange.
    """
    size = 4 * parameters
    return step / (step + (ranks - 1) * draw + handling.seconds(ranks, size) + network.seconds(ranks, size))


#: Steps and numbers of parameters of the table in docs/scaling.md.
STEPS, PARAMETERS = (1e-3, 1e-2, 1e-1), (1e4, 1e6, 1e8)


def table(assumed: Mapping[str, Network] = ASSUMED) -> list[str]:
    """The lines of the table in docs/scaling.md."""
    lines = []
    for parameters in PARAMETERS:
        for step in STEPS:
            within = efficiency(step, parameters, 8, assumed["NVLink"])
            between = [efficiency(step, parameters, 64, assumed[name]) for name in ("InfiniBand", "Ethernet")]
            cells = [f"10{_SUPER[round(math.log10(parameters))]}", f"{1e3 * step:g} ms"]
            cells += [_share(within, 8), *(_share(value, 64) for value in between)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


_SUPER = {4: "⁴", 6: "⁶", 8: "⁸"}


def _share(value: float, ranks: int) -> str:
    return f"{value * ranks:.3g} ({value:.0%})"
