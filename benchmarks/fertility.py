"""Forecasts of the fertility rates of held-out countries from their first ten years, over random country splits.

Methods (:data:`RUNS`) beside five baselines. Each split has 110 training, 22 validation and 60 held-out countries.
Figures are means over splits in raw units (births per woman), and the standard error is that of the mean over splits.
Splits share countries, so it understates the error somewhat. ``against`` rows pair methods on the same splits.

``best`` is one method for all splits: that with the lowest NLL on the validation countries, mean over the splits.
Which one is printed. Each training ends with the θ whose loss on the validation countries was lowest. The mixture of
last layers is the demo's method.

``--aggregates`` keeps the averages over countries that the source lists as if they were countries (192 complete rows).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import bayesmeta as bm
from bayesmeta.demo.run import STEPS, SUPPORT, score_baselines, train_demo
from bayesmeta.diagnostics.scores import Scores
from bayesmeta.tasks import FertilitySplit, fertility_split
from benchmarks.harness import Bar, Row, at_most, below, between, main, standard_error
from benchmarks.runs import refuse_unknown

METRICS = {"rmse": "rmse", "nll": "nll", "crps": "crps", "coverage90": "coverage_90"}
BARS = {"best_rmse": at_most(0.86), "best_nll": at_most(1.13), "best_coverage90": between(0.86, 0.96)}
REFERENCE = "empirical_gaussian"
#: A difference counts as a gain when it is this many standard errors below 0.
ERRORS = 2.0


@dataclass(frozen=True)
class Run:
    """One training by gradients.

    Attributes:
        make: the untrained method, from torch's global random state.
        steps: of a full run; a quick one takes a tenth.
        rate: of AdamW, falling to 0 as a cosine; with weight decay 1e-3.
        draws: of φ for scores that have no closed form.
    """

    make: Callable[[], Any]
    steps: int
    rate: float = 1e-2
    draws: int = 300


def _network(prior: Any = "point", *, width: int = 16, task_modules: Any = "all") -> bm.NeuralTaskModel:
    network = bm.nets.mlp(1, [width, width, 8], 1, activation="tanh")
    return bm.NeuralTaskModel(network, bm.Gaussian(0.2, learn_scale=True), prior, task_modules=task_modules)


def _last_layer() -> bm.BayesianLastLayer:
    network = bm.nets.mlp(1, [32, 32, 16], 1, activation="tanh")
    likelihood = bm.Gaussian(0.2, learn_scale=True)
    model = bm.NeuralTaskModel(network, likelihood, bm.priors.Normal(1.0), task_modules="head")
    return bm.BayesianLastLayer(model, objective="marginal")


def _deep_kernel() -> bm.DeepKernel:
    make, network = bm.DeepKernel, _network()
    from gpytorch import kernels  # behind bayesmeta, which silences a warning of this import

    # weights of the features for the trend, and what lasts for some years
    return make(network, kernel=kernels.LinearKernel() + kernels.ScaleKernel(kernels.MaternKernel(nu=1.5)))


def _laplace() -> bm.Laplace:
    model = _network(bm.priors.Normal(0.5), task_modules="head")
    return bm.Laplace(model, inner_steps=1, inner_lr=1.0, solver="newton", curvature="ggn", objective="predictive")


def _abml() -> bm.ABML:
    return bm.ABML(_network(bm.priors.Normal(0.1)), inner_steps=5, inner_lr=3e-3, num_particles=5)


def _bmaml() -> bm.BMAML:
    model = _network(bm.priors.Normal(0.1))
    return bm.BMAML(model, num_particles=5, inner_steps=5, inner_lr=1.5e-2, objective="predictive")


def _platipus() -> bm.Platipus:
    return bm.Platipus(_network(), inner_steps=5, inner_lr=2e-2, num_samples=50)


def _maml() -> bm.MAML:
    return bm.MAML(_network(), inner_steps=5, inner_lr=2e-2)


def _decoder() -> bm.NeuralTaskModel:
    network = bm.nets.mlp(1, [32, 32], 2, activation="tanh")
    return bm.NeuralTaskModel(network, bm.likelihoods.HeteroscedasticGaussian(0.02), prior="point")


def _cnp() -> bm.ConditionalNeuralProcess:
    return bm.ConditionalNeuralProcess(_decoder(), latent_size=32, decoder="film", width=32)


def _neural_process() -> bm.NeuralProcess:
    options: dict[str, Any] = {"objective": "likelihood", "num_particles": 8}
    return bm.NeuralProcess(_decoder(), latent_size=4, decoder="film", width=32, **options)


def _amortised() -> bm.Amortised:
    network = bm.nets.mlp(1, [32, 32], 1, activation="tanh")
    model = bm.ContextTaskModel(network, bm.Gaussian(0.2, learn_scale=True), 4, decoder="film")
    return bm.Amortised(model, posterior="full", objective="predictive", num_particles=16, width=32)


#: Steps are as many as take about the time of the demo's method. Settings were compared on validation countries of
#: seeds 100 and 101.
RUNS = {
    "last_layer": Run(_last_layer, 1500),
    "deep_kernel": Run(_deep_kernel, 600),
    "laplace": Run(_laplace, 400),
    "abml": Run(_abml, 200),
    "bmaml": Run(_bmaml, 200),
    "platipus": Run(_platipus, 300),
    "maml": Run(_maml, 400),
    "cnp": Run(_cnp, 400, rate=5e-3),
    "neural_process": Run(_neural_process, 400, rate=5e-3),
    "amortised": Run(_amortised, 400, rate=5e-3),
}
METHODS = ["last_layer_mixture", *RUNS]


@dataclass(frozen=True)
class Measured:
    """What one method did on one split.

    Attributes:
        test: scores on the held-out countries.
        validation: NLL on the validation countries; None for a baseline.
        seconds: of training.
    """

    test: Scores
    validation: float | None = None
    seconds: float | None = None


def measure(name: str, split: FertilitySplit, seed: int, quick: bool) -> Measured:
    """Train one method on a split and score it."""
    if name == "last_layer_mixture":
        result = train_demo(split, seed, 10 if quick else STEPS, device="cpu", progress=False)
        draws = 1000
    else:
        result, draws = _train(RUNS[name], split, seed, quick), RUNS[name].draws

    def score(table: bm.tasks.TableTasks) -> Scores:
        batch = table.all(support=SUPPORT)
        return bm.scores(result.method.adapt(batch.support, generator=seed), batch, num_samples=draws, generator=seed)

    return Measured(score(split.test), score(split.validation)["nll"], result.seconds)


def _train(run: Run, split: FertilitySplit, seed: int, quick: bool) -> bm.FitResult:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        method = run.make()
    steps = max(run.steps // 10, 25) if quick else run.steps
    result = bm.fit(
        method,
        split.train,
        steps=steps,
        tasks_per_step=16,
        support=SUPPORT,
        query=None,
        optimizer=lambda p: torch.optim.AdamW(p, lr=run.rate, weight_decay=1e-3),
        schedule=bm.schedules.cosine(steps),
        clip=1000.0,
        validation=split.validation.all(support=SUPPORT),
        validate_every=25,
        seed=seed,
        device="cpu",
        progress=False,
    )
    method.eval()
    return result


def run(args: argparse.Namespace) -> list[Row]:
    """Train on every split and collect."""
    torch.set_num_threads(args.threads)
    refuse_unknown(args.runs, METHODS)
    collected: dict[str, list[Measured]] = {}
    for seed in range(args.seed, args.seed + (2 if args.quick else args.splits)):
        split = fertility_split(seed, order="mixed", aggregates=args.aggregates)
        begin, line = time.perf_counter(), []
        for name in args.runs:
            found = measure(name, split, seed, args.quick)
            collected.setdefault(name, []).append(found)
            line.append(f"{name} {found.test['rmse']:.3f} / {found.test['nll']:.3f}")
        for name, scores in score_baselines(split).items():
            collected.setdefault(name, []).append(Measured(scores))
        print(f"split {seed}: {'; '.join(line)}; {time.perf_counter() - begin:.0f} s", flush=True)
    return rows(collected, args.quick)


def choose(collected: Mapping[str, list[Measured]]) -> str:
    """The method with the lowest mean NLL on the validation countries."""
    means: dict[str, float] = {}
    for name, found in collected.items():
        values = [m.validation for m in found if m.validation is not None]
        if values:
            means[name] = sum(values) / len(values)
    print("NLL on validation countries: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    return min(means, key=means.__getitem__)


def rows(collected: Mapping[str, list[Measured]], quick: bool) -> list[Row]:
    """Means over splits of every method and of the best, and that one's differences from the empirical Gaussian."""
    best = choose(collected)
    print(f"best on validation countries: {best}", flush=True)
    made = []
    for name, found in {**collected, "best": collected[best]}.items():
        seconds = [m.seconds for m in found if m.seconds is not None]
        spent = sum(seconds) if seconds and name != "best" else None
        for metric, key in METRICS.items():
            made.append(_row(f"{name}_{metric}", [m.test[key] for m in found], quick, spent))
    for name in dict.fromkeys(("best", "last_layer_mixture")):
        for metric in ("rmse", "nll", "crps"):
            ours = collected.get(best if name == "best" else name)
            if ours is not None:
                made.append(_paired(name, metric, ours, collected[REFERENCE], quick))
    return made


def _row(name: str, values: list[float], quick: bool, seconds: float | None) -> Row:
    data = torch.tensor(values, dtype=torch.float64)
    bar: Bar | None = None if quick else BARS.get(name)
    judged: dict[str, Any] = {} if bar is None else bar.judge(float(data.mean()))
    return Row(name, float(data.mean()), standard_error=standard_error(data), seconds=seconds, **judged)


def _paired(name: str, metric: str, ours: list[Measured], reference: list[Measured], quick: bool) -> Row:
    key = METRICS[metric]
    pairs = [(a.test[key], b.test[key]) for a, b in zip(ours, reference, strict=True)]
    mine, other = torch.tensor(pairs, dtype=torch.float64).T
    gap, error = mine - other, standard_error(mine - other)
    judged: dict[str, Any] = {}
    if name == "best" and metric != "crps" and error is not None and not quick:
        holds = below(0.0).holds(float(gap.mean()) + ERRORS * error)
        judged = {"bar": f"difference + {ERRORS:g} s.e. < 0", "passes": holds}
    return Row(
        f"{name}_against_{REFERENCE}_{metric}",
        float(mine.mean()),
        float(other.mean()),
        difference=float(gap.mean()),
        standard_error=error,
        **judged,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--splits", type=int, default=10, help="random splits, seeds SEED, SEED+1, … (default: 10)")
    parser.add_argument("--runs", nargs="+", default=METHODS, help=f"methods (default: {' '.join(METHODS)})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--aggregates", action="store_true", help="keep averages over countries among the countries")


if __name__ == "__main__":
    main("fertility", run, add_arguments)
