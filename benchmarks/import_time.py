"""Time to import bayesmeta, to first use it, and for its command to answer, against importing Pyro and torch.

Each figure is of a new process of this same Python. The kinds take turns round by round and change their order, after
one round that is not counted (it compiles and caches files). What is compared is the processor time of the process,
its own and the system's on its behalf: a process that imports waits for nothing else, so that this is its time on an
idle machine, also while other work takes the cores. Wall times are printed beside it.

``ours`` and ``reference`` are medians in seconds, ``ratio`` is ours over the peer's, with a bootstrap over rounds for
its standard error. Rows:

- ``import_vs_pyro``: ``import bayesmeta`` against ``import pyro``; names are imported on first use, so this is nothing;
- ``first_use_vs_pyro``: import, make MAML, draw tasks, adapt and predict, against ``import pyro`` alone;
- ``first_step_vs_pyro_svi``: import and one step of ``fit``, against one step of ``pyro.infer.SVI``; both bring in what
  torch's optimizers import;
- ``help_vs_torch``: ``bayesmeta --help`` against ``import torch``.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.harness import Row, at_most, below, main
from benchmarks.speed_meta_step import ratio_of_medians

_USE = """
import bayesmeta as bm
tasks = bm.tasks.Sinusoid(noise=0.1)
method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [40, 40], 1), bm.Gaussian(0.5)))
"""
_ADAPT = """
batch = tasks.sample(4, support=5, query=5)
method.adapt(batch.support).predictive(batch.query).mean
"""
_FIT = """
bm.fit(method, tasks, steps=1, progress=False, device="cpu")
"""
_SVI = """
import torch, pyro, pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
def model(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("shots", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=x)
SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(torch.ones(10))
"""
#: What each process runs: code, or arguments of the command.
KINDS: dict[str, str | list[str]] = {
    "import torch": "import torch",
    "import pyro": "import pyro",
    "import bayesmeta": "import bayesmeta",
    "first use": _USE + _ADAPT,
    "first step": _USE + _FIT,
    "svi": _SVI,
    "help": ["--help"],
}
ROWS = {
    "import_vs_pyro": ("import bayesmeta", "import pyro", at_most(1.3)),
    "first_use_vs_pyro": ("first use", "import pyro", at_most(1.3)),
    "first_step_vs_pyro_svi": ("first step", "svi", None),
    "help_vs_torch": ("help", "import torch", below(0.25)),
}
COMMAND = Path(sys.executable).with_name("bayesmeta")


def seconds(kind: str) -> tuple[float, float]:
    """Processor and wall time of one process.

    Raises:
        SystemExit: when it fails, with what it said.
    """
    what = KINDS[kind]
    command = [sys.executable, "-c", what] if isinstance(what, str) else [str(COMMAND), *what]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode != 0:
        raise SystemExit(f"{kind!r} failed:\n{result.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def race(rounds: int, seed: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Processor and wall times of each kind, round by round."""
    order, numbers = list(KINDS), random.Random(seed)
    cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
    wall: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(rounds + 1):
        numbers.shuffle(order)
        for kind in order:
            times = seconds(kind)
            if i > 0:
                cpu[kind].append(times[0])
                wall[kind].append(times[1])
    return cpu, wall


def rows(cpu: dict[str, list[float]], wall: dict[str, list[float]], seed: int) -> list[Row]:
    """The comparisons."""
    found = []
    for name, (ours, peer, bar) in ROWS.items():
        ratio, error = ratio_of_medians(cpu[ours], cpu[peer], seed)
        judged = {} if bar is None else bar.judge(ratio)
        row = Row(
            name,
            ours=median(cpu[ours]),
            reference=median(cpu[peer]),
            ratio=ratio,
            standard_error=error,
            seconds=sum(wall[ours]) + sum(wall[peer]),
            **judged,
        )
        found.append(row)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--rounds", type=int, default=None, help="rounds that count (default: 15; quick: 2)")


def run(args: argparse.Namespace) -> list[Row]:
    """Start processes, and compare."""
    args.rounds = (2 if args.quick else 15) if args.rounds is None else args.rounds
    if args.rounds < 2:
        raise SystemExit(f"--rounds must be at least 2; got {args.rounds}.")
    cpu, wall = race(args.rounds, args.seed)
    print("wall times, medians in seconds: " + ", ".join(f"{k} {median(v):.2f}" for k, v in wall.items()))
    return rows(cpu, wall, args.seed)


if __name__ == "__main__":
    main("import_time", run, add_arguments, {"unit": "seconds of processor time"})
