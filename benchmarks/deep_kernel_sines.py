"""Deep kernels on sines, within the range of the training inputs and beyond it (Patacchiola et al. 2020).

Setting: y = A sin(x − phase) + noise, A ~ U(0.1, 5), phase ~ U(0, π), noise of standard deviation 0.1 in support and
query alike; training at x ~ U(−5, 5), 10 support and 10 query points, endless tasks; tests on fresh tasks of 5 support
points in [−5, 5] and 200 query points evenly over [−5, 5] (in range) or [5, 10] (out of range).

Rows, for each KERNEL: ``KERNEL_in_range_mse`` and ``KERNEL_out_of_range_mse`` (of the predictive mean against the
noiseless function, mean over tasks), ``…_coverage90`` (of noisy targets), ``…_nll`` and ``KERNEL_seconds``. Reference:
0.02 in range, 0.04 out of range (spectral mixture with 4 components, as run by Sendera et al. 2021). The kernel is on
raw x; ``rbf`` is there to show what a kernel that is not periodic does.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import bayesmeta as bm
from benchmarks.harness import Bar, Row, at_most, between, main
from benchmarks.runs import refuse_unknown, train_method

NOISE = 0.1
RANGES = {"in_range": (-5.0, 5.0), "out_of_range": (5.0, 10.0)}
REFERENCE = {"in_range": 0.02, "out_of_range": 0.04}
KERNELS: dict[str, dict[str, Any]] = {
    "spectral_mixture": {"kernel": "spectral_mixture", "num_mixtures": 4, "inputs": "raw", "max_frequency": 0.5},
    "rbf": {"kernel": "rbf", "inputs": "raw"},
}
COVERAGE = between(0.87, 0.94)


def make(name: str) -> bm.DeepKernel:
    """The method of a row, its first values drawn from torch's global random state."""
    network = bm.nets.mlp(1, [40, 40], 1, activation="tanh")
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.3, learn_scale=True), "point")
    return bm.DeepKernel(model, **KERNELS[name])


def train(name: str, seed: int, steps: int) -> tuple[bm.DeepKernel, float]:
    """The trained method, and the seconds of CPU time that it took."""
    points: dict[str, Any] = {"tasks_per_step": 16, "support": 10, "query": 10}
    return train_method(lambda: make(name), bm.tasks.Sinusoid(NOISE), seed, steps, rate=2e-2, clip=100.0, **points)


def held_out(num_tasks: int, ends: tuple[float, float], seed: int) -> tuple[bm.TaskBatch, torch.Tensor]:
    """Fresh tasks with noisy targets, and the noiseless function at their query, ``[num_tasks, 200]``."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    uniform = torch.rand(2, num_tasks, 1, generator=generator)
    amplitude, phase = 0.1 + 4.9 * uniform[0], torch.pi * uniform[1]
    x = -5 + 10 * torch.rand(num_tasks, 5, generator=generator)
    y = amplitude * torch.sin(x - phase) + NOISE * torch.randn(num_tasks, 5, generator=generator)
    grid = torch.linspace(*ends, 200).expand(num_tasks, -1)
    truth = amplitude * torch.sin(grid - phase)
    noisy = truth + NOISE * torch.randn(num_tasks, 200, generator=generator)
    support, query = bm.Observations(x.unsqueeze(-1), y), bm.Observations(grid.unsqueeze(-1), noisy)
    return bm.TaskBatch(support, query), truth


def score(method: bm.DeepKernel, num_tasks: int, ends: tuple[float, float], seed: int) -> dict[str, torch.Tensor]:
    """Scores of each test task, ``[num_tasks]`` each: mse, coverage90, nll."""
    batch, truth = held_out(num_tasks, ends, seed)
    found: dict[str, list[torch.Tensor]] = {"mse": [], "coverage90": [], "nll": []}
    for start in range(0, num_tasks, 50):  # a joint log score holds 200 × 200 numbers a task
        part = batch.tasks(slice(start, start + 50))
        posterior = method.adapt(part.support)
        mean = posterior.predictive(part.query).mean
        found["mse"].append((mean - truth[start : start + 50]).square().mean(-1).double())
        each = bm.scores(posterior, part).per_task
        found["coverage90"].append(each["coverage_90"])
        found["nll"].append(each["nll"])
    return {key: torch.cat(values) for key, values in found.items()}


def run(args: argparse.Namespace) -> list[Row]:
    """Train and score each kernel."""
    refuse_unknown(args.kernels, KERNELS, "kernel")
    torch.set_num_threads(args.threads)
    steps = args.steps or (200 if args.quick else 4000)
    rows = []
    for name in args.kernels:
        method, seconds = train(name, args.seed, steps)
        for place, ends in RANGES.items():
            for key, value in score(method, args.tasks, ends, args.seed).items():
                mean, error = float(value.mean()), float(value.std() / len(value) ** 0.5)
                reference = REFERENCE[place] if key == "mse" and name == "spectral_mixture" else None
                bar: Bar | None = None
                if name == "spectral_mixture" and not args.quick and not args.steps:
                    bar = {"mse": at_most(REFERENCE[place]), "coverage90": COVERAGE}.get(key)
                judged = {} if bar is None else bar.judge(mean)
                difference = None if reference is None else mean - reference
                rows.append(Row(f"{name}_{place}_{key}", mean, reference, None, difference, error, **judged))
        rows.append(Row(f"{name}_seconds", seconds))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), help=f"which (default: {' '.join(KERNELS)})")
    parser.add_argument("--tasks", type=int, default=500, help="test tasks (default: 500)")
    parser.add_argument("--steps", type=int, default=0, help="training steps (default: 4000)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("deep_kernel_sines", run, add_arguments)
