"""One rank of benchmarks.distributed: times steps, draws and all-reduces, and prints what it found as JSON.

    python -m benchmarks._distributed_worker '{"tasks": [25], "steps": 40, …}'

With torchrun's variables in the environment it is one of several ranks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

import bayesmeta as bm
from bayesmeta.train.distributed import Group, Share, join

HIDDEN, INNER = 40, 5


def make(seed: int, hidden: int = HIDDEN) -> Any:
    """MAML on sinusoids: two hidden layers, five inner steps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = bm.NeuralTaskModel(bm.nets.mlp(1, [hidden, hidden], 1), bm.Gaussian(1.0))
    return bm.MAML(model, inner_steps=INNER, inner_lr=0.01)


def train(tasks: int, steps: int, seed: int) -> tuple[Any, float]:
    """A training of this rank; the method, and seconds a step (of all ranks' tasks)."""
    method = make(seed)
    result = bm.fit(
        method, bm.tasks.Sinusoid(noise=0.1), steps=steps, tasks_per_step=tasks, seed=seed, device="cpu",
        optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-3), clip=10.0, progress=False,
    )  # fmt: skip
    assert result.tasks_per_second is not None
    return method, tasks * int(os.environ.get("WORLD_SIZE", "1")) / result.tasks_per_second


def time_steps(tasks: list[int], steps: int, blocks: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds a step for each number of tasks, of wall and of processor time.

    Of the fastest block each, the least disturbed by other work. The processor time is that of this process and what
    the steps add to it: the time of a fit of two steps is taken off.
    """
    train(tasks[0], 5, seed)  # what is made on first use
    wall: dict[str, list[float]] = {str(n): [] for n in tasks}
    processor: dict[str, list[float]] = {str(n): [] for n in tasks}
    for _ in range(blocks):
        for n in tasks:
            first = time.process_time()
            train(n, 2, seed)
            second = time.process_time()
            wall[str(n)].append(train(n, steps, seed)[1])
            processor[str(n)].append((time.process_time() - 2 * second + first) / (steps - 2))
    return {n: min(values) for n, values in wall.items()}, {n: min(values) for n, values in processor.items()}


def time_draws(tasks: list[int], seed: int) -> dict[str, float]:
    """Seconds to draw a batch of so many tasks, the fastest of many."""
    family, generator = bm.tasks.Sinusoid(noise=0.1), torch.Generator().manual_seed(seed)

    def one(n: int) -> float:
        begin = time.perf_counter()
        family.sample(n, support=10, query=10, generator=generator)
        return time.perf_counter() - begin

    return {str(n): min(one(n) for _ in range(50)) for n in tasks}


def time_exchanges(sizes: list[int], repeats: int) -> dict[str, float]:
    """Seconds of an all-reduce of so many float32 numbers, the fastest."""
    import torch.distributed as dist

    found = {}
    for n in sizes:
        numbers, times = torch.ones(n), []
        for _ in range(max(3, min(repeats, 10_000_000 // n))):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(numbers)
            times.append(time.perf_counter() - begin)
        found[str(n)] = min(times)
    return found


class Silent:
    """In the place of torch.distributed: an all-reduce that costs nothing."""

    def all_reduce(self, numbers: torch.Tensor) -> None:
        """Leave the numbers."""


def time_handling(group: Group, hidden: list[int], repeats: int, seed: int) -> dict[str, float]:
    """Seconds that a rank works for an exchange beside the all-reduce, by numbers sent, the fastest."""
    found, kept = {}, group._dist
    group._dist = Silent()
    for width in hidden:
        parameters = list(_prepared(seed, width).parameters())
        times = []
        for _ in range(repeats):
            for p in parameters:
                p.grad = torch.ones_like(p)
            begin = time.perf_counter()
            group.reduce(parameters, [], Share(torch.ones(()), 1))
            times.append(time.perf_counter() - begin)
        found[str(sum(p.numel() for p in parameters))] = min(times)
    group._dist = kept
    return found


def main(job: dict[str, Any]) -> dict[str, Any]:
    """What the job asks for."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("RANK", "0")) % len(cores)]})
    seed = job["seed"]
    found: dict[str, Any] = {}
    found["steps"], found["processor"] = time_steps(job["tasks"], job["steps"], job["blocks"], seed)
    if "draws" in job:
        found["draws"] = time_draws(job["draws"], seed)
    group = join("auto", torch.device("cpu"))
    if "exchanges" in job and isinstance(group, Group):
        found["exchanges"] = time_exchanges(job["exchanges"], job["repeats"])
        found["handling"] = time_handling(group, job["hidden"], job["repeats"], seed)
    method, _ = train(job["same"], job["same_steps"], seed)
    found["theta"] = torch.cat([p.detach().flatten() for p in method.parameters()]).tolist()
    start = torch.cat([p.detach().flatten() for p in _prepared(seed).parameters()])
    found["moved"] = float((torch.tensor(found["theta"]) - start).abs().max())
    found["parameters"] = start.numel()
    return found


def _prepared(seed: int, hidden: int = HIDDEN) -> Any:
    method = make(seed, hidden)
    method.prepare(bm.tasks.Sinusoid(noise=0.1).sample(2, support=10, query=10, generator=0))
    return method


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
