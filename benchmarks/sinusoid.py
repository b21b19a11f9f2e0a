"""Few-shot sinusoid regression (Finn et al. 2017): test MSE of the point estimates from ten points.

Setting: amplitude ~ U(0.1, 5), phase ~ U(0, π), x ~ U(−5, 5), no noise, 2×40 ReLU, 25 tasks a step, 70,000 steps of
Adam at 1e-3 (falling linearly to 0 over the last fifth, our one departure), 10 support and 10 query points. The
likelihood has scale 1/√2, so that a negative log-likelihood is a squared error up to a constant. Each run says in
:data:`RUNS` what it trains and at how many inner steps it is then scored. References: for MAML and CAVIA the CAVIA
paper (Zintgraf et al. 2019: 0.33 ± 0.02 and 0.19–0.21 ± 0.02), for Meta-SGD its own (Li et al. 2017: 0.53 ± 0.09).

The last rows show what happens beyond the inner steps that were trained: at a rate of 0.1, trained for one step, five
steps diverge; with rates learned under losses at all of five steps (multi-step) five and ten do not.

Scored on fresh tasks, 100 noiseless query points each; the standard error is over tasks (of one training run: it leaves
out how runs differ, for which give several seeds). A 95% interval is ±1.96 of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import bayesmeta as bm
from benchmarks.harness import Bar, Row, at_least, at_most, main
from benchmarks.runs import add_run_arguments, run_all

SCALE = 2**-0.5


@dataclass(frozen=True)
class Run:
    """One training, and the rows that are scored after it.

    Attributes:
        make: the method on a network.
        steps: training steps of a full run.
        rows: name of each row, at how many inner steps it is scored, its reference and its bar.
        quick_share: share of the quick steps, for what is slow.
        clip: largest norm of the gradient.
    """

    make: Callable[[bm.NeuralTaskModel], Any]
    rows: tuple[tuple[str, int, float | None, Bar | None], ...]
    steps: int = 70_000
    quick_share: float = 1.0
    clip: float | None = None


RUNS = {
    "maml": Run(
        lambda m: bm.MAML(m, inner_steps=1, inner_lr=0.01),
        (("maml_1_step_mse", 1, 0.33, at_most(0.36)), ("no_adaptation_mse", 0, None, None)),
    ),
    "meta_sgd": Run(
        lambda m: bm.MetaSGD(m, inner_steps=1, inner_lr=0.01),
        (
            ("meta_sgd_1_step_mse", 1, 0.53, at_most(0.26)),
            ("meta_sgd_5_steps_mse", 5, None, None),
            ("meta_sgd_10_steps_mse", 10, None, None),
        ),
    ),
    "cavia": Run(
        lambda m: bm.CAVIA(m, context_size=4, inner_steps=1, inner_lr=1.0),
        (("cavia_1_step_mse", 1, 0.19, at_most(0.21)),),
    ),
    "cavia_10": Run(
        lambda m: bm.CAVIA(m, context_size=4, inner_steps=10, inner_lr=0.1),
        (("cavia_10_steps_mse", 10, None, at_most(0.03)),),
        steps=20_000,
        quick_share=0.3,
    ),
    "fast_rate": Run(
        lambda m: bm.MAML(m, inner_steps=1, inner_lr=0.1),
        (("fast_rate_1_step_mse", 1, None, None), ("fast_rate_5_steps_mse", 5, None, at_least(1.0))),
        steps=20_000,
    ),
    "multi_step": Run(
        lambda m: bm.MetaSGD(m, inner_steps=5, inner_lr=0.03, step_weights="uniform"),
        (
            ("multi_step_1_step_mse", 1, None, None),
            ("multi_step_5_steps_mse", 5, None, at_most(0.3)),
            ("multi_step_10_steps_mse", 10, None, at_most(0.3)),
        ),
        steps=20_000,
        quick_share=0.3,
        clip=10.0,
    ),
}


def train(name: str, seed: int, steps: int) -> Any:
    """The trained method of a run."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = bm.nets.mlp(1, [40, 40], 1)
    method = RUNS[name].make(bm.NeuralTaskModel(network, bm.Gaussian(SCALE), prior="point"))
    bm.fit(
        method,
        bm.tasks.Sinusoid(),
        steps=steps,
        tasks_per_step=25,
        support=10,
        query=10,
        schedule=bm.schedules.linear_fall(steps),
        clip=RUNS[name].clip,
        seed=seed,
        device="cpu",
    )
    return method


def squared_errors(method: Any, inner_steps: int, num_tasks: int, seed: int) -> torch.Tensor:
    """Mean squared error of each of fresh test tasks, ``[num_tasks]``."""
    method.inner_steps = inner_steps
    batch = bm.tasks.Sinusoid().sample(num_tasks, support=10, query=100, generator=10_000 + seed)
    u = method.adapt(batch.support).u[0]
    assert batch.query.y is not None
    with torch.no_grad():  # not the predictive, which refuses what has diverged
        mean = method.program.output(u, batch.query.x).squeeze(-1)
    return (mean - batch.query.y).square().mean(-1)


def measure(name: str, seed: int, steps: int, num_tasks: int, threads: int, full: bool) -> list[Row]:
    """Train and score one run."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    try:
        method = train(name, seed, steps)
    except bm.errors.NonFiniteLossError as error:  # the other runs are not lost; these rows fail
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        method = None
    seconds = time.perf_counter() - begin
    rows = []
    for row, inner_steps, reference, bar in RUNS[name].rows:
        diverged = torch.full((num_tasks,), torch.nan)
        errors = diverged if method is None else squared_errors(method, inner_steps, num_tasks, seed)
        errors = errors.nan_to_num(1e9, 1e9).clamp(max=1e9)  # a diverged run may overflow
        value = float(errors.mean())
        rows.append(
            Row(
                row,
                value,
                reference,
                difference=None if reference is None else value - reference,
                standard_error=float(errors.std() / len(errors) ** 0.5),
                seconds=seconds,
                # a short run is there to show that all works; only the full one is held to the bar
                **(bar.judge(value) if bar is not None and full else {}),
            )
        )
    for done in rows:  # as they come, so that a long run shows where it is
        text = f"{name}, {steps} steps: {done.name} {done.ours:.4g} ± {done.standard_error:.2g}"
        print(text, file=sys.stderr, flush=True)
    return rows


def run(args: argparse.Namespace) -> list[Row]:
    """All runs that were asked for."""
    steps = {name: settings.steps for name, settings in RUNS.items()}
    return run_all(args, steps, lambda name: int(1000 * RUNS[name].quick_share), measure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    add_run_arguments(parser, RUNS, 4000)


if __name__ == "__main__":
    main("sinusoid", run, add_arguments)
