"""Out of distribution: how well the evidence of five points tells lines from the sinusoids that were learned.

Setting: methods are trained on sinusoids alone, y = A sin(x − phase), A ~ U(0.1, 5), phase ~ U(0, π). Outside are
lines with slope and intercept ~ U(−3, 3): the two kinds of :class:`bayesmeta.tasks.SineOrLine`. x ~ U(−5, 5), five
points a task, noise of standard deviation 0.1, 0.3 and 1 on all; one training for each noise. Each run says in
:data:`RUNS` what it trains. Settings, and how long, were chosen by the evidence of sinusoids of other seeds: no line
took part.

Rows, in which ``noise03`` stands for noise 0.3: ``noise03_METHOD_auroc``, the area under the ROC curve of
:func:`bayesmeta.surprise`, −log p(S | θ), in closed form or by importance sampling. The reference is the oracle's, on
the same tasks: the exact evidence under the family of sinusoids, by quadrature. The difference has DeLong's paired
standard error over tasks. ``…_validation_nll``: −log p(S | θ) of validation sinusoids, nats a task, beside the
oracle's: none can be below it, but by chance. ``…_inside_flagged`` and ``…_outside_flagged``: the share of test
sinusoids, and of lines, with a conformal p-value of at most 0.05 against the validation sinusoids; the first is 0.05 or
less but for chance, whatever the method. ``…_effective_draws``: their 5% quantile over the test tasks, where draws are
behind the evidence. ``…_seconds``: CPU time, training alone.

``noise03_best_auroc`` is that of the method with the best ``validation_nll``, which needs no line. Its bar is the
published area of the oracle (0.999, 0.992, 0.956), less 0.02. ``noise03_oracle_auroc`` and
``noise03_likelihood_ratio_auroc``: the oracle's areas; the latter knows the lines too, and by Neyman and Pearson no
score can do better.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import bayesmeta as bm
from benchmarks.harness import Row, at_least, main, standard_error
from benchmarks.runs import add_run_arguments, run_all, train_method
from benchmarks.sine_or_line import Product

SHOTS = 5
#: published area of the oracle at each noise
ORACLE = {0.1: 0.999, 0.3: 0.992, 1.0: 0.956}
MARGIN = 0.02
#: draws behind an evidence without a closed form
DRAWS = 400
#: test tasks of each kind in a quick run, at most
QUICK_TASKS = 100
#: of the conformal p-values
LEVEL = 0.05


def label(noise: float) -> str:
    """The beginning of a row's name: the noise in tenths."""
    return f"noise{round(10 * noise):02d}"


# -- tasks and the oracle -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Known:
    """Supports of five points and the exact answers on them.

    Attributes:
        support: the points.
        sine, line: exact log p(y | x) under the family of sinusoids and that of lines, ``[tasks]``.
    """

    support: bm.Observations
    sine: Tensor
    line: Tensor

    @classmethod
    def of(cls, support: bm.Observations, noise: float) -> Known:
        """Ask the oracle."""
        sine, line = bm.tasks.SineOrLine(noise)._log_evidences(support)  # of each kind; the public one adds them up
        return cls(support, sine, line)


@lru_cache(8)
def sinusoids(noise: float, num_tasks: int, seed: int, validation: bool = False) -> Known:
    """Fresh sinusoids, of seeds of their own."""
    generator = 3_000_000 + 2 * seed + validation
    family = bm.tasks.Sinusoid(noise)
    return Known.of(family.sample(num_tasks, support=SHOTS, query=1, generator=generator).support, noise)


@lru_cache(8)
def lines(noise: float, num_tasks: int, seed: int) -> Known:
    """The lines among fresh tasks of the family that has both."""
    generator = torch.Generator().manual_seed(4_000_000 + seed)
    kept: list[bm.Observations] = []
    while sum(part.num_tasks for part in kept) < num_tasks:
        family = bm.tasks.SineOrLine(noise)
        batch, truth = family.sample_with_truth(num_tasks, support=SHOTS, query=1, generator=generator)
        kept.append(batch.support.tasks(truth["is_line"].bool().nonzero().flatten()))
    y = [part.y for part in kept if part.y is not None]
    return Known.of(bm.Observations(torch.cat([p.x for p in kept])[:num_tasks], torch.cat(y)[:num_tasks]), noise)


# -- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training at each noise.

    Attributes:
        make: the method, freshly drawn from torch's global random state.
        steps: training steps of a full run; a quick one takes a hundredth.
        rate: Adam's, falling to 0 as a cosine.
        query: points of a training task, beside the five of its support.
        tasks_per_step: of a step.
    """

    make: Callable[[], Any]
    steps: int
    rate: float = 3e-3
    query: int = 5
    tasks_per_step: int = 32


def _likelihood() -> bm.Gaussian:
    return bm.Gaussian(0.5, learn_scale=True)


def _last_layer() -> bm.BayesianLastLayer:
    network = bm.nets.sine_features(1, [64, 64], 1)
    model = bm.NeuralTaskModel(network, _likelihood(), bm.priors.Normal(1.0), task_modules="head")
    return bm.BayesianLastLayer(model, objective="evidence")


def _last_layer_mixture() -> bm.BayesianLastLayerMixture:
    network = bm.nets.sine_features(1, [48, 48, 6], 1, activation="silu")
    return bm.BayesianLastLayerMixture(bm.ConjugateModel(network, _likelihood(), 32), objective="evidence")


def _deep_kernel() -> bm.DeepKernel:
    # on raw x: of features, whatever these are, an RBF knows a length and no period (nll 7 nats a task worse)
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), _likelihood(), "point")
    return bm.DeepKernel(model, kernel="spectral_mixture", num_mixtures=4, max_frequency=0.5, inputs="raw")


def _latent() -> bm.Amortised:
    model = bm.ContextTaskModel(Product(), _likelihood(), 8)
    return bm.Amortised(model, "attention", posterior="full", num_particles=4)


RUNS = {
    "last_layer": Run(_last_layer, 2000),
    "last_layer_mixture": Run(_last_layer_mixture, 2000, rate=5e-3),
    "deep_kernel": Run(_deep_kernel, 1000, rate=2e-2),
    "latent": Run(_latent, 3000),
}


def train(name: str, noise: float, seed: int, steps: int) -> tuple[Any, float]:
    """The trained method of a run, and the seconds of CPU time that it took."""
    run = RUNS[name]
    options: dict[str, Any] = {"tasks_per_step": run.tasks_per_step, "support": SHOTS, "query": run.query}
    return train_method(run.make, bm.tasks.Sinusoid(noise), seed, steps, rate=run.rate, clip=100.0, **options)


def surprise(method: Any, support: bm.Observations, seed: int, chunk: int = 200) -> bm.Surprise:
    """Of many tasks, some at a time, which bounds the memory."""
    parts = []
    for start in range(0, support.num_tasks, chunk):
        some = support.tasks(slice(start, start + chunk))
        parts.append(bm.surprise(method.adapt(some, generator=seed), num_samples=DRAWS, generator=seed + start))
    names = ("scores", "errors", "effective_draws", "counts")
    scores, errors, effective, counts = (torch.cat([getattr(part, name) for part in parts]) for name in names)
    return bm.Surprise(scores, errors, effective, counts)


# -- rows ---------------------------------------------------------------------------------------------------------


def measure(name: str, seed: int, steps: int, num_tasks: int, threads: int, full: bool) -> list[Row]:
    """Train and score one run at each noise."""
    torch.set_num_threads(threads)
    rows = []
    for noise in ORACLE:
        method, seconds = train(name, noise, seed, steps)
        rows += score(method, f"{label(noise)}_{name}", noise, seed, num_tasks)
        rows.append(Row(f"{label(noise)}_{name}_seconds", seconds))
    return rows


def score(method: Any, name: str, noise: float, seed: int, num_tasks: int) -> list[Row]:
    """Rows of one trained method, each test as many tasks inside and outside, and as many for validation."""
    known = {
        "validation": sinusoids(noise, num_tasks, seed, validation=True),
        "inside": sinusoids(noise, num_tasks, seed),
        "outside": lines(noise, num_tasks, seed),
    }
    found = {side: surprise(method, part.support, seed) for side, part in known.items()}
    ours, oracle = bm.roc(found["inside"], found["outside"]), bm.roc(-known["inside"].sine, -known["outside"].sine)
    difference, error = ours.difference(oracle)
    rows = [Row(f"{name}_auroc", ours.auroc, oracle.auroc, None, difference, error)]
    nll = found["validation"].scores
    gap = nll + known["validation"].sine
    values = (float(nll.mean()), -float(known["validation"].sine.mean()))
    rows.append(Row(f"{name}_validation_nll", *values, None, float(gap.mean()), standard_error(gap)))
    for side in ("inside", "outside"):
        flagged = (found[side].p_values(found["validation"]) <= LEVEL).double()
        rows.append(Row(f"{name}_{side}_flagged", float(flagged.mean()), standard_error=standard_error(flagged)))
    draws = torch.cat([found[side].effective_draws for side in ("inside", "outside")])
    if bool(draws.isfinite().all()):
        rows.append(Row(f"{name}_effective_draws", float(draws.quantile(0.05))))
    print(
        f"{name}: AUROC {ours.auroc:.4f}, {difference:+.4f} ± {error:.4f} to the oracle; nll {values[0]:.3f}",
        flush=True,
    )
    return rows


def references(seed: int, num_tasks: int) -> list[Row]:
    """The oracle's areas at each noise."""
    rows = []
    for noise, published in ORACLE.items():
        inside, outside = sinusoids(noise, num_tasks, seed), lines(noise, num_tasks, seed)
        evidence = bm.roc(-inside.sine, -outside.sine)
        ratio = bm.roc(inside.line - inside.sine, outside.line - outside.sine)
        gap = evidence.auroc - published
        name = label(noise)
        rows.append(Row(f"{name}_oracle_auroc", evidence.auroc, published, None, gap, evidence.standard_error))
        rows.append(Row(f"{name}_likelihood_ratio_auroc", ratio.auroc, standard_error=ratio.standard_error))
    return rows


def best(rows: list[Row], names: list[str], full: bool) -> list[Row]:
    """At each noise, the area of the method with the best evidence of validation sinusoids."""
    known = {row.name: row for row in rows}
    found = []
    for noise, published in ORACLE.items():
        ours = {name: known[key].ours for name in names if (key := f"{label(noise)}_{name}_validation_nll") in known}
        if not ours:  # all of them diverged
            continue
        nll = {name: math.inf if value is None or math.isnan(value) else value for name, value in ours.items()}
        chosen = min(nll, key=lambda name: nll[name])
        row = known[f"{label(noise)}_{chosen}_auroc"]
        judged = at_least(published - MARGIN).judge(row.ours or 0.0) if full else {}
        found.append(
            Row(
                f"{label(noise)}_best_auroc",
                row.ours,
                row.reference,
                None,
                row.difference,
                row.standard_error,
                **judged,
            )
        )
        print(f"{label(noise)}: chosen by validation: {chosen}", flush=True)
    return found


def run(args: argparse.Namespace) -> list[Row]:
    """All runs that were asked for, the best of them, and the oracle."""
    if args.quick:
        args.tasks = min(args.tasks, QUICK_TASKS)
    steps = {name: settings.steps for name, settings in RUNS.items()}
    rows = run_all(args, steps, lambda name: RUNS[name].steps // 100, measure)
    return rows + best(rows, args.runs, not args.quick and not args.steps) + references(args.seed, args.tasks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    add_run_arguments(parser, RUNS, 2000)


if __name__ == "__main__":
    main("ood", run, add_arguments)
