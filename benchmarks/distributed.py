"""One and two ranks on this machine: the same result, what a step costs, and a cost model of more ranks.

MAML on sinusoids (two hidden layers of 40, five inner steps, 10 + 10 points, SGD), each rank on one core and one
thread, gloo between them. Times are of the fastest block, in milliseconds of wall time, since ranks wait for each
other: on a machine in use they say more of its load than of the code, and a file of results has the load before.

- ``same_result``: ``difference`` is the largest of a parameter after training, two ranks with T tasks each against one
  with 2 T;
- ``step_vs_one_rank``: a step of two ranks with T tasks each (``ours``) and of one rank with T (``reference``);
  ``ratio`` is the efficiency, reference over ours: 1 where the second rank is free;
- ``processor_time_vs_one_rank``: the same of a rank's processor time, in which neither waiting for the other rank nor
  other work on the machine counts: what being one of two costs;
- ``step_vs_twice_the_tasks``: the first against one rank with 2 T: the ``ratio`` is the speed-up, 2 at best;
- ``all_reduce_…``: of 10³ … 10⁶ float32 numbers;
- ``exchange_own_work``: what a rank does for an exchange of this model beside the all-reduce: packing, unpacking;
- ``model_vs_measured``: the cost model's step of two ranks, fitted to one rank's times, draws, and all-reduces and the
  work for them, each measured alone, over the measured one.

The model's costs are in the file of results; docs/scaling.md says what they and an assumed network make of 8 and 64.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks._distributed_model import Handling, Network, Step, fit_handling, fit_network, fit_step
from benchmarks.harness import Row, at_least, at_most, between, main

TASKS = 25
SIZES = {1_000: "1k", 10_000: "10k", 100_000: "100k", 1_000_000: "1m"}
#: Widths of networks whose gradients are packed and unpacked; the first is the one that is trained.
HIDDEN = [40, 300, 1_000]
ROOT = Path(__file__).resolve().parent.parent
_FOUND: dict[str, Any] = {}


def job(args: argparse.Namespace) -> dict[str, Any]:
    """What a worker does, but for the tasks of a rank."""
    quick = args.quick
    return {
        "seed": args.seed, "steps": 10 if quick else 50, "blocks": 2 if quick else 6, "repeats": 20 if quick else 200,
        "same_steps": 20 if quick else 100,
    }  # fmt: skip


def work(ranks: int, what: dict[str, Any]) -> list[dict[str, Any]]:
    """Start so many workers and wait for them; what each found.

    Raises:
        SystemExit: when one fails, with what it said.
    """
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    base = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "benchmarks._distributed_worker", json.dumps(what)]
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
        environment = base | (common | own if ranks > 1 else {})
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    said = [process.communicate() for process in processes]
    for rank, (process, (_, error)) in enumerate(zip(processes, said)):
        if process.returncode != 0:
            raise SystemExit(f"rank {rank} of {ranks} failed:\n{error}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What one rank found, and what two did."""
    shared, many = job(args), [TASKS, 2 * TASKS, 4 * TASKS]
    one = {**shared, "tasks": many, "draws": [*many, 8 * TASKS, 64 * TASKS], "same": 2 * TASKS}
    two = {**shared, "tasks": [TASKS], "exchanges": list(SIZES), "hidden": HIDDEN, "same": TASKS}
    return work(1, one), work(2, two)


def costs(one: dict[str, Any], two: dict[str, Any]) -> tuple[Step, Network, Handling]:
    """The cost model's numbers from what was measured."""
    draws = {int(n): seconds for n, seconds in one["draws"].items()}
    few, most = min(draws), max(draws)
    draw = max((draws[most] - draws[few]) / (most - few), 0.0)
    tasks = [int(n) for n in one["steps"]]
    step = fit_step(tasks, list(one["steps"].values()), draw)
    sizes = [4.0 * int(n) for n in two["exchanges"]]
    handling = fit_handling([4.0 * int(n) for n in two["handling"]], list(two["handling"].values()))
    return step, fit_network(sizes, list(two["exchanges"].values())), handling


def rows(one: dict[str, Any], ranks: list[dict[str, Any]], seconds: float) -> list[Row]:
    """The rows of the benchmark.

    Args:
        one: what one rank found.
        ranks: what each of two found.
        seconds: that all of it took.
    """
    two = ranks[0]
    apart = max(
        float((torch.tensor(each["theta"]) - torch.tensor(one["theta"])).abs().max()) for each in ranks
    )  # fmt: skip
    if not one["moved"] > 1e-3:
        raise SystemExit(f"the training moved no parameter by more than {one['moved']:.2g}: it compares nothing")
    both = max(each["steps"][str(TASKS)] for each in ranks)
    single, twice = one["steps"][str(TASKS)], one["steps"][str(2 * TASKS)]
    busy, idle = max(each["processor"][str(TASKS)] for each in ranks), one["processor"][str(TASKS)]
    found = [
        Row("same_result", one["moved"], difference=apart, seconds=seconds, **at_most(1e-6).judge(apart)),
        Row("step_vs_one_rank", 1e3 * both, 1e3 * single, single / both, **at_least(0.7).judge(single / both)),
        Row("processor_time_vs_one_rank", 1e3 * busy, 1e3 * idle, idle / busy, **at_least(0.7).judge(idle / busy)),
        Row("step_vs_twice_the_tasks", 1e3 * both, 1e3 * twice, twice / both),
    ]
    for size, name in SIZES.items():
        found.append(Row(f"all_reduce_{name}", 1e3 * two["exchanges"][str(size)]))
    step, network, handling = costs(one, two)
    size = 4.0 * two["parameters"]
    found.append(Row("exchange_own_work", 1e3 * handling.seconds(2, size)))
    predicted = step.seconds(2, TASKS, size, network, handling)
    ratio = predicted / both
    found.append(Row("model_vs_measured", 1e3 * predicted, 1e3 * both, ratio, **between(0.7, 1.4).judge(ratio)))
    own = {"handle": handling.fixed, "handle_a_byte": handling.each}
    _FOUND["model"] = {**vars(step), **vars(network), **own, "parameters": two["parameters"]}
    _FOUND["draws"], _FOUND["exchanges"], _FOUND["steps"] = one["draws"], two["exchanges"], one["steps"]
    return found


def merge(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What a rank found in all rounds: of each time the smallest, which other work disturbed least."""
    found = dict(rounds[-1])
    for name in ("steps", "processor", "draws", "exchanges", "handling"):
        if name in found:
            found[name] = {n: min(each[name][n] for each in rounds) for n in found[name]}
    return found


def run(args: argparse.Namespace) -> list[Row]:
    """Measure in rounds, one rank and two in turns, and compare the smallest times."""
    begin, ones, twos = time.perf_counter(), [], []
    for i in range(1 if args.quick else args.rounds):
        (one,), ranks = measure(args)
        ones.append(one)
        twos.append(ranks)
        seconds = time.perf_counter() - begin
        said = ", ".join(f"{r.name} {r.ours:.4g}" for r in rows(one, ranks, seconds))
        print(f"round {i + 1}: {said}", flush=True)
    return rows(merge(ones), [merge([ranks[r] for ranks in twos]) for r in range(2)], seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="how often all is measured (default: 5)")


if __name__ == "__main__":
    main("distributed", run, add_arguments, lambda args: _FOUND)
