"""Sinusoids whose amplitude the input tells in training and not in the test (Yin et al. 2020): who memorises fails.

Setting: x and a one-hot code of 20 go in, y = A sin(x) + noise of standard deviation 0.1, x ~ U(−5, 5). In training
the code tells which of 20 amplitudes, equally spaced from 0.1 to 4, the task has: one network can solve all of them
without their supports. In the test A ~ U(0.1, 4), and the code is a random one: the support alone tells. Training on
10 support and 10 query points, one for both 5 and 10 shots; test tasks of their own seed, 50 noisy query points each.

Runs: MAML, and MR-MAML with noise on the weights (``w``) and on the activations (``a``) of an embedding of 21 numbers
in 5 (one hidden layer of 100) before the adapted layers (two of 40); a conditional neural process and MR-CNP (``w``)
with the same embedding. ``maml`` has the inner loop of the paper's notebooks: one step of rate 0.01 on the mean squared
error, and ReLU; the bars are about it. With it the regularised ones stay behind, or diverge in the test, so they have
five steps of rate 0.05. How much of the difference that is, ``maml_same`` tells: MR-MAML without regularisation.
``maml_tuned`` is MAML as it does best on validation tasks, with tanh too: it hardly memorises, and the bars are no
promise to beat it. Ratios to these two have no bar. The network is the same without regularisation. Weights β, first
scales, training steps, and the number of inner steps in the test were chosen for each run, that of MAML too, on
validation tasks of other seeds that are like the test's. Each run says in :data:`RUNS` what it trains.

Rows, for k = 5, 10 shots: ``METHOD_kN_mse`` (squared error of the predictive mean, of noisy targets, the noise being
0.01 of it; mean over tasks), ``METHOD_against_maml_kN`` (ratio of the two, on the same test tasks), and
``METHOD_seconds`` (of CPU time, training alone). Of one training, standard errors are over tasks; with ``--trainings
N`` figures are means over N seeds and the errors are between trainings. Those of ratios are of first order, as if the
two were independent. Published: ``reference``; test targets there lie on a grid.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import bayesmeta as bm
from benchmarks.harness import Bar, Row, at_most, main
from benchmarks.runs import add_run_arguments, named_bars, over_trainings, run_trainings, train_method

SHOTS = (5, 10)
#: inputs: x, and the code of the amplitude
INPUTS = 21
WIDTH = 5


@dataclass(frozen=True)
class Run:
    """One training, and the bars of its rows.

    Attributes:
        make: the method, freshly drawn from torch's global random state.
        steps: training steps of a full run; a quick one takes a twentieth.
        test_steps: inner steps after training; None where there are none.
        reference: published squared errors, by shots.
        bars: by the row's name without the method, such as ``"k5_mse"``.
        rate: Adam's, falling to 0 as a cosine.
        tasks_per_step: of a training step.
    """

    make: Callable[[], Any]
    steps: int
    test_steps: int | None
    reference: dict[int, float]
    bars: dict[str, Bar] = field(default_factory=dict)
    rate: float = 1e-3
    tasks_per_step: int = 8


def _embedded(hidden: list[int], noise: float, activation: str = "relu") -> bm.EmbeddedModel:
    model = bm.NeuralTaskModel(bm.nets.mlp(WIDTH, hidden, 1, activation=activation), bm.Gaussian(noise), "point")
    return bm.EmbeddedModel(model, bm.nets.mlp(INPUTS, [100], WIDTH, activation=activation))


def _maml() -> bm.MAML:
    # a noise scale of 1/√2 makes the loss the squared error, as in the paper
    return bm.MAML(_embedded([40, 40], 2**-0.5), inner_steps=1, inner_lr=0.01)


def _maml_same(regularization: bm.MetaRegularization | None = None) -> bm.MAML:
    return bm.MAML(_embedded([40, 40], 2**-0.5), inner_steps=5, inner_lr=0.05, meta_regularization=regularization)


def _maml_w() -> bm.MAML:
    return _maml_same(bm.MetaRegularization("weights", 0.05, scale=0.02))


def _maml_a() -> bm.MAML:
    return _maml_same(bm.MetaRegularization("activations", 0.3, scale=0.3))


def _maml_tuned() -> bm.MAML:
    return bm.MAML(_embedded([40, 40], 2**-0.5, "tanh"), inner_steps=5, inner_lr=0.05)


def _cnp(regularization: bm.MetaRegularization | None = None) -> bm.ConditionalNeuralProcess:
    return bm.ConditionalNeuralProcess(
        _embedded([100, 100], 0.1), latent_size=10, width=100, meta_regularization=regularization
    )


def _cnp_w() -> bm.ConditionalNeuralProcess:
    return _cnp(bm.MetaRegularization("weights", 1.0, scale=0.1))


BARS = {"k5_mse": at_most(0.20), "against_maml_k5": at_most(0.5), "against_maml_k10": at_most(0.5)}
RUNS = {
    "maml": Run(_maml, 12_000, 300, {5: 0.46, 10: 0.13}),
    "mr_maml_w": Run(_maml_w, 3000, 100, {5: 0.16, 10: 0.06}, BARS),
    "mr_maml_a": Run(_maml_a, 3000, 20, {5: 0.17, 10: 0.07}, BARS),
    "maml_same": Run(_maml_same, 3000, 200, {}),
    "maml_tuned": Run(_maml_tuned, 3000, 20, {}),
    "cnp": Run(_cnp, 8000, None, {5: 0.91, 10: 0.92}),
    "mr_cnp_w": Run(_cnp_w, 8000, None, {5: 0.11, 10: 0.09}),
}


def train(name: str, seed: int, steps: int) -> tuple[Any, float]:
    """The trained method of a run, ready for the test, and the seconds of CPU time that it took."""
    settings = RUNS[name]
    method, seconds = train_method(
        settings.make,
        bm.tasks.NonMutuallyExclusiveSinusoid(),
        seed,
        steps,
        rate=settings.rate,
        clip=20.0,
        tasks_per_step=settings.tasks_per_step,
        support=10,
        query=10,
    )
    if settings.test_steps is not None:
        method.inner_steps = settings.test_steps
    return method, seconds


def fresh_tasks(shots: int, num_tasks: int, seed: int) -> bm.TaskBatch:
    """Test tasks of a seed of their own."""
    generator = 1_000_000 + 100 * seed + shots
    return bm.tasks.NonMutuallyExclusiveSinusoid("test").sample(num_tasks, support=shots, query=50, generator=generator)


def squared_errors(method: Any, batch: bm.TaskBatch) -> torch.Tensor:
    """Mean squared error of the predictive mean of each task, ``[tasks]``."""
    mean = method.adapt(batch.support, generator=0).predictive(batch.query).mean
    assert batch.query.y is not None
    return (mean - batch.query.y).square().mean(-1).double()


def measure(name: str, seed: int, steps: int, num_tasks: int, threads: int, full: bool) -> list[Row]:
    """Train and score one run."""
    torch.set_num_threads(threads)
    settings = RUNS[name]
    method, seconds = train(name, seed, steps)
    rows = []
    for shots in SHOTS:
        errors = squared_errors(method, fresh_tasks(shots, num_tasks, seed))
        value, error = float(errors.mean()), float(errors.std() / num_tasks**0.5)
        reference = settings.reference.get(shots)
        judged = _judge(name, f"k{shots}_mse", value, full)
        difference = None if reference is None else value - reference
        rows.append(Row(f"{name}_k{shots}_mse", value, reference, None, difference, error, **judged))
    rows.append(Row(f"{name}_seconds", seconds))
    print(f"{name}, seed {seed}: " + ", ".join(f"{row.name} {row.ours:.4g}" for row in rows), flush=True)
    return rows


def _judge(name: str, row: str, value: float, full: bool) -> dict[str, Any]:
    """Bar and verdict of a row; a short run, which is there to show that all works, has none."""
    bar = RUNS[name].bars.get(row) if full else None
    return {} if bar is None else bar.judge(value)


def run(args: argparse.Namespace) -> list[Row]:
    """All runs that were asked for, each as often as was asked for, and their ratios to MAML."""
    trainings = run_trainings(args, RUNS, measure)
    full = not args.quick and not args.steps
    rows = over_trainings(trainings, named_bars(RUNS) if full else {})
    return rows + against_maml(rows, full)


def against_maml(rows: list[Row], full: bool) -> list[Row]:
    """Ratios of the regularised MAMLs' errors to those of MAML, of MAML trained as they are, and at its best."""
    known = {row.name: row for row in rows}
    ratios = []
    for name, other in itertools.product(("mr_maml_w", "mr_maml_a"), ("maml", "maml_same", "maml_tuned")):
        for shots in SHOTS:
            ours, theirs = known.get(f"{name}_k{shots}_mse"), known.get(f"{other}_k{shots}_mse")
            if ours is None or theirs is None or not ours.ours or not theirs.ours:
                continue
            ratio = ours.ours / theirs.ours
            error = ratio * math.hypot(*((row.standard_error or 0.0) / (row.ours or 1.0) for row in (ours, theirs)))
            row = f"against_{other}_k{shots}"
            judged = _judge(name, row, ratio, full)
            ratios.append(Row(f"{name}_{row}", ours.ours, theirs.ours, ratio, None, error, **judged))
    return ratios


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    add_run_arguments(parser, RUNS, 2000)
    parser.add_argument("--trainings", type=int, default=1, help="of each run, seeds SEED, SEED+1, … (default: 1)")


if __name__ == "__main__":
    main("memorization", run, add_arguments)
