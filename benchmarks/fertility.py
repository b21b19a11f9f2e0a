"""Forecasts of the fertility rates of held-out countries from their first ten years, over random country splits.

The demo's method (a Bayesian last layer, ``bayesmeta demo``) beside a neural ABML (a fifth of the steps, which takes
about as long) and five baselines. Each split has 110 training, 22 validation and 60 held-out countries; figures are
means over splits in raw units (births per woman), and the standard error is that of the mean over splits. Splits share
countries, so it understates the error somewhat. ``difference`` rows pair methods on the same splits.

The averages over countries that the source lists as if they were countries are left out; ``--aggregates`` keeps them
(192 complete rows).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import bayesmeta as bm
from bayesmeta.demo.run import SUPPORT, score_baselines, train_demo
from bayesmeta.tasks import FertilitySplit, fertility_split
from benchmarks.harness import Bar, Row, at_most, between, main

METRICS = {"rmse": "rmse", "nll": "nll", "crps": "crps", "coverage90": "coverage_90"}
BARS = {"demo_rmse": at_most(0.86), "demo_nll": at_most(1.13), "demo_coverage90": between(0.86, 0.96)}


def score_demo(split: FertilitySplit, seed: int, steps: int) -> tuple[Any, float]:
    """Scores of the demo's method, and training seconds."""
    result = train_demo(split, seed, steps, device="cpu", progress=False)
    batch = split.test.all(support=SUPPORT)
    return bm.scores(result.method.adapt(batch.support), batch), result.seconds


def score_abml(split: FertilitySplit, seed: int, steps: int) -> tuple[Any, float]:
    """Scores of a neural ABML, and training seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = bm.nets.mlp(1, [16, 16, 8], 1, activation="tanh")
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.2, learn_scale=True), bm.priors.Normal(0.1))
    method = bm.ABML(model, inner_steps=5, inner_lr=3e-3, num_particles=5)
    result = bm.fit(
        method,
        split.train,
        steps=steps,
        tasks_per_step=16,
        support=SUPPORT,
        query=None,
        optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=1e-3),
        clip=1000.0,
        validation=split.validation.all(support=SUPPORT),
        validate_every=25,
        seed=seed,
        device="cpu",
        progress=False,
    )
    batch = split.test.all(support=SUPPORT)
    return bm.scores(method.adapt(batch.support), batch, num_samples=300), result.seconds


def run(args: argparse.Namespace) -> list[Row]:
    """Train on every split and collect."""
    torch.set_num_threads(args.threads)
    splits = 2 if args.quick else args.splits
    steps = 300 if args.quick else 1500
    collected: dict[str, list[Any]] = {}
    seconds: dict[str, list[float]] = {"demo": [], "abml": []}
    for index in range(splits):
        seed = args.seed + index
        split = fertility_split(seed, order="mixed", aggregates=args.aggregates)
        begin = time.perf_counter()
        demo, spent = score_demo(split, seed, steps)
        collected.setdefault("demo", []).append(demo)
        abml, abml_spent = score_abml(split, seed, steps // 5)
        collected.setdefault("abml", []).append(abml)
        for name, result in score_baselines(split).items():
            collected.setdefault(name, []).append(result)
        seconds["demo"].append(spent)
        seconds["abml"].append(abml_spent)
        print(
            f"split {seed}: demo {demo['rmse']:.3f} / {demo['nll']:.3f}, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    rows = [
        _row(f"{method}_{metric}", [s[key] for s in results], args.quick, seconds.get(method))
        for method, results in collected.items()
        for metric, key in METRICS.items()
    ]
    for metric, key in list(METRICS.items())[:3]:
        pairs = [(a[key], b[key]) for a, b in zip(collected["demo"], collected["empirical_gaussian"], strict=True)]
        rows.append(_paired(f"demo_against_empirical_gaussian_{metric}", pairs))
    return rows


def _row(name: str, values: list[float], quick: bool, seconds: list[float] | None) -> Row:
    data = torch.tensor(values, dtype=torch.float64)
    bar: Bar | None = None if quick else BARS.get(name)
    judged: dict[str, Any] = {} if bar is None else bar.judge(float(data.mean()))
    error = float(data.std() / len(values) ** 0.5) if len(values) > 1 else None
    spent = None if seconds is None else sum(seconds)
    return Row(name, float(data.mean()), standard_error=error, seconds=spent, **judged)


def _paired(name: str, pairs: list[tuple[float, float]]) -> Row:
    ours, reference = torch.tensor(pairs, dtype=torch.float64).T
    gap = ours - reference
    error = float(gap.std() / len(pairs) ** 0.5) if len(pairs) > 1 else None
    return Row(name, float(ours.mean()), float(reference.mean()), difference=float(gap.mean()), standard_error=error)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--splits", type=int, default=10, help="random splits, seeds SEED, SEED+1, … (default: 10)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--aggregates", action="store_true", help="keep averages over countries among the countries")


if __name__ == "__main__":
    main("fertility", run, add_arguments)
