"""Sine or line (Finn, Xu, Levine 2018): five noisy points that may leave open which kind of function a task is.

Setting: half the tasks are y = A sin(x − phase), A ~ U(0.1, 5), phase ~ U(0, π), half are lines with slope and
intercept ~ U(−3, 3); x ~ U(−5, 5), noise of standard deviation 0.3; five support and 10 noisy query points. The
family's exact posterior is known (:class:`bayesmeta.tasks.SineOrLine`). Each run says in :data:`RUNS` what it trains;
all that adapt by gradients adapt the eight numbers of a context beside the input of one shared network.

Rows on fresh test tasks: ``METHOD_mse``, ``…_nll`` (nats a point), ``…_joint_nll`` (of a task's query together, a
point), ``…_crps``, ``…_coverage90``, ``…_seconds`` (CPU time, training alone). References are the exact posterior's.

Rows on ambiguous supports, fresh ones whose exact p(line | S) lies in [0.3, 0.7] (about 1 in 120):
``METHOD_ambiguous_nll``, ``…_ambiguous_coverage90``, and of the share of function draws that are line-like
``…_line_share_gap`` (mean of |share − p|), ``…_line_share_bias`` (|mean share − mean p|) and
``…_line_share_correlation`` (of share and p). A draw is line-like when, on 101 even points of [−5, 5], the best line
leaves a smaller sum of squares than the best A sin(x − b): always right on the family's own functions. As p itself is
near a half, a share of one half everywhere has a gap of about 0.1 and a correlation of 0, and a method with one answer
a task a gap of about 0.5. ``…_line_share_gap_all`` is the gap over the first 200 test tasks, ambiguous or not; most are
clear, so that a half everywhere has about 0.48 there.

Standard errors are over tasks, of one training. Settings were chosen on tasks of other seeds. ``--plots FOLDER`` draws
the functions of a few ambiguous supports.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.ops.random import Seed, as_generator
from benchmarks.harness import Bar, Row, at_most, between, main, standard_error
from benchmarks.runs import add_run_arguments, run_all, score_tasks, train_method

SHOTS, QUERY = 5, 10
#: exact probabilities of a line that count as ambiguous
AMBIGUOUS = (0.3, 0.7)
#: draws for the CRPS, the coverage and the share of lines
DRAWS = 200
GRID = torch.linspace(-5.0, 5.0, 101, dtype=torch.float64)
#: ambiguous supports, of a full run and of a quick one
NUM_AMBIGUOUS, NUM_AMBIGUOUS_QUICK = 100, 10


# -- tasks --------------------------------------------------------------------------------------------------------


class FewerShots:
    """Sine or line, each task's support cut to between ``fewest`` points and all: more tasks are ambiguous.

    Args:
        fewest: points that every task keeps.
    """

    num_tasks = None

    def __init__(self, fewest: int) -> None:
        self.family, self.fewest = bm.tasks.SineOrLine(), fewest

    def sample(self, num_tasks: int, *, support: int, query: int, generator: Seed = None) -> bm.TaskBatch:
        """Draw a batch whose support has a mask."""
        generator = as_generator(generator, stream="fewer shots")
        batch = self.family.sample(num_tasks, support=support, query=query, generator=generator)
        counts = torch.randint(self.fewest, support + 1, (num_tasks, 1), generator=generator)
        keep = torch.arange(support) < counts
        return bm.TaskBatch(bm.Observations(batch.support.x, batch.support.y, keep), batch.query)


@dataclass(frozen=True, eq=False)
class Known:
    """Tasks and the exact answers on them.

    Attributes:
        batch: the tasks.
        line: p(line | S), ``[tasks]``.
        reference: means of the exact posterior's ``mse``, ``nll`` and ``joint_nll``.
    """

    batch: bm.TaskBatch
    line: Tensor
    reference: dict[str, float]

    def first(self, count: int) -> Known:
        """The first tasks; the references stay those of all."""
        return Known(self.batch.tasks(slice(0, count)), self.line[:count], self.reference)

    @classmethod
    def of(cls, batch: bm.TaskBatch) -> Known:
        """Ask the oracle."""
        family, support, query = bm.tasks.SineOrLine(), batch.support, batch.query
        assert query.y is not None
        joint = family.log_evidence(bm.union(support, query)) - family.log_evidence(support)
        reference = {
            "mse": (family.predictive_mean(support, query.x) - query.y).square().mean(),
            "nll": -family.predictive_log_prob(support, query).mean(),
            "joint_nll": -joint.mean() / query.shots,
        }
        return cls(batch, family.probability_line(support), {key: float(value) for key, value in reference.items()})


@lru_cache(2)
def fresh_tasks(num_tasks: int, seed: int) -> Known:
    """Fresh tasks."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    return Known.of(bm.tasks.SineOrLine().sample(num_tasks, support=SHOTS, query=QUERY, generator=generator))


@lru_cache(2)
def ambiguous_tasks(count: int, seed: int) -> Known:
    """The first ``count`` of fresh tasks whose support leaves it open what they are; chosen by the support alone."""
    family, generator = bm.tasks.SineOrLine(), torch.Generator().manual_seed(2_000_000 + seed)
    kept: list[bm.TaskBatch] = []
    while sum(part.num_tasks for part in kept) < count:
        batch = family.sample(1000, support=SHOTS, query=QUERY, generator=generator)
        p = family.probability_line(batch.support)
        kept.append(batch.tasks(((p >= AMBIGUOUS[0]) & (p <= AMBIGUOUS[1])).nonzero().flatten()))
    support, query = (_first([getattr(part, side) for part in kept], count) for side in ("support", "query"))
    return Known.of(bm.TaskBatch(support, query))


def _first(parts: list[bm.Observations], count: int) -> bm.Observations:
    """The first ``count`` tasks of several batches without masks."""
    y = [part.y for part in parts if part.y is not None]
    return bm.Observations(torch.cat([part.x for part in parts])[:count], torch.cat(y)[:count])


# -- lines and sinusoids ------------------------------------------------------------------------------------------


def line_like(values: Tensor) -> Tensor:
    """Whether functions are nearer to a line than to a sinusoid of frequency 1, in least squares.

    Args:
        values: on :data:`GRID`, ``[…, 101]``.
    """
    values = values.double()
    line = torch.stack([torch.ones_like(GRID), GRID], -1)
    sine = torch.stack([GRID.sin(), GRID.cos()], -1)
    return _misfit(values, line) < _misfit(values, sine)


def _misfit(values: Tensor, basis: Tensor) -> Tensor:
    """Sum of squares that is left of ``[…, 101]`` when the span of the basis ``[101, 2]`` is taken out, ``[…]``."""
    orthonormal = torch.linalg.qr(basis).Q
    return (values - (values @ orthonormal) @ orthonormal.mT).square().sum(-1)


@torch.no_grad()
def function_draws(posterior: Any, num_samples: int, seed: int) -> Tensor:
    """Draws of the function, without noise, on :data:`GRID`, ``[num_samples, tasks, 101]``."""
    x = GRID.to(posterior.support.x.dtype).reshape(1, -1, 1).expand(posterior.num_tasks, -1, 1)
    parts = []
    for draws in posterior.draws(num_samples, seed).slices():
        mean = posterior.program.predictive(draws.u, bm.Observations(x), draws.theta).mean
        parts.append(mean.expand(draws.num_samples, posterior.num_tasks, -1))
    return torch.cat(parts)


def exact_draws(support: bm.Observations, num_samples: int, seed: int, candidates: int = 200_000) -> Tensor:
    """Functions of the exact posterior on :data:`GRID`, ``[num_samples, tasks, 101]``.

    Draws from the prior, chosen again in proportion to their likelihood; the prior is an even one over two kinds.
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(4, candidates, 1, generator=generator, dtype=torch.float64)
    amplitude, phase, slope, intercept = 0.1 + 4.9 * u[0], math.pi * u[1], 6 * u[2] - 3, 6 * u[3] - 3
    is_line = (torch.arange(candidates) % 2 == 0).unsqueeze(-1)

    def function(x: Tensor, pick: Any = slice(None)) -> Tensor:
        sine = amplitude[pick] * torch.sin(x - phase[pick])
        return torch.where(is_line[pick], slope[pick] * x + intercept[pick], sine)

    found = []
    assert support.y is not None
    for x, y in zip(support.x.squeeze(-1).double(), support.y.double(), strict=True):
        weight = (-0.5 * ((y - function(x)) / 0.3).square().sum(-1)).softmax(0)
        found.append(function(GRID, torch.multinomial(weight, num_samples, replacement=True, generator=generator)))
    return torch.stack(found, 1)


# -- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training, and the bars of its rows.

    Attributes:
        make: the method, freshly drawn from torch's global random state.
        steps: training steps of a full run; a quick one takes a fiftieth.
        rate: Adam's, falling to 0 as a cosine.
        clip: largest norm of the gradient.
        fewest: least number of support points of a training task, of at most five.
        tasks_per_step, query: of a step.
        bars: by the row's name without the method.
        has_draws: whether the posterior gives functions, of which some may be lines.
    """

    make: Callable[[], Any]
    steps: int
    rate: float = 3e-3
    clip: float = 50.0
    fewest: int = 5
    tasks_per_step: int = 16
    query: int = 15
    bars: Mapping[str, Bar] = field(default_factory=dict)
    has_draws: bool = True


#: numbers of a task's context
CONTEXT = 8


class Product(nn.Module):
    """Features of x times as many of the context, added up: learns these tasks faster than [x, context] in one MLP."""

    def __init__(self, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.of_x = bm.nets.sine_features(1, [hidden], width)
        self.of_context = bm.nets.mlp(CONTEXT, [hidden], width, activation="silu")

    def forward(self, inputs: Tensor) -> Tensor:
        """x and the context beside it, ``[…, 1 + CONTEXT]``, to ``[…, 1]``."""
        return (self.of_x(inputs[..., :1]) * self.of_context(inputs[..., 1:])).sum(-1, keepdim=True)


def _context_model() -> bm.ContextTaskModel:
    return bm.ContextTaskModel(Product(), bm.Gaussian(1.0, learn_scale=True), CONTEXT)


def _features() -> nn.Sequential:
    return bm.nets.sine_features(1, [64, 64], 1)


def _maml() -> bm.MAML:
    return bm.MAML(_context_model(), inner_steps=5, inner_lr=0.1)


def _platipus() -> bm.Platipus:
    return bm.Platipus(_context_model(), inner_steps=5, inner_lr=0.1, scale=0.3, learn="parameter", num_samples=DRAWS)


def _bmaml() -> bm.BMAML:
    return bm.BMAML(_context_model(), num_particles=8, inner_steps=4, inner_lr=0.5, objective="marginal")


def _abml() -> bm.ABML:
    # from draws of a standard normal prior nothing is learned at first: all contexts look alike
    prior = bm.priors.Normal(0.1)
    model = bm.ContextTaskModel(Product(), bm.Gaussian(1.0, learn_scale=True), CONTEXT, prior)
    return bm.ABML(model, inner_steps=5, inner_lr=0.05, num_particles=4, objective="predictive", kl_weight=0.1)


def _laplace() -> bm.Laplace:
    return bm.Laplace(_context_model(), inner_steps=5, inner_lr=0.1)


def _last_layer() -> bm.BayesianLastLayer:
    likelihood = bm.Gaussian(0.5, learn_scale=True)
    model = bm.NeuralTaskModel(_features(), likelihood, bm.priors.Normal(1.0), task_modules="head")
    return bm.BayesianLastLayer(model, objective="marginal")


def _last_layer_mixture() -> bm.BayesianLastLayerMixture:
    network = bm.nets.sine_features(1, [48, 48, 6], 1, activation="silu")
    return bm.BayesianLastLayerMixture(bm.ConjugateModel(network, bm.Gaussian(0.5, learn_scale=True), 16))


def _deep_kernel() -> bm.DeepKernel:
    model = bm.NeuralTaskModel(_features(), bm.Gaussian(0.5, learn_scale=True), "point")
    return bm.DeepKernel(model, kernel="rbf", inputs="both")


SAMPLED = {
    "line_share_gap": at_most(0.2),
    "coverage90": between(0.85, 0.95),
    "ambiguous_coverage90": between(0.85, 0.95),
}
RUNS = {
    "maml": Run(_maml, 6000),
    "platipus": Run(_platipus, 8000, fewest=4, bars=SAMPLED),
    "bmaml": Run(_bmaml, 5000, fewest=4, bars=SAMPLED),
    "abml": Run(_abml, 3000),
    "laplace": Run(_laplace, 3000),
    "last_layer": Run(_last_layer, 3000, clip=100.0),
    "last_layer_mixture": Run(_last_layer_mixture, 2000, rate=5e-3, clip=100.0),
    "deep_kernel": Run(_deep_kernel, 1500, clip=100.0, has_draws=False),
}


def train(name: str, seed: int, steps: int) -> tuple[Any, float]:
    """The trained method of a run, and the seconds of CPU time that it took."""
    run = RUNS[name]
    tasks = bm.tasks.SineOrLine() if run.fewest == SHOTS else FewerShots(run.fewest)
    options: dict[str, Any] = {"tasks_per_step": run.tasks_per_step, "support": SHOTS, "query": run.query}
    return train_method(run.make, tasks, seed, steps, rate=run.rate, clip=run.clip, **options)


def line_share(method: Any, known: Known, seed: int, chunk: int = 50) -> tuple[Tensor, Tensor]:
    """Share of the draws that are line-like, ``[tasks]``, and the draws of the first ``chunk`` tasks."""
    shares, first = [], None
    for start in range(0, known.batch.num_tasks, chunk):  # a network's layers on so many draws and points are large
        support = known.batch.support.tasks(slice(start, start + chunk))
        draws = function_draws(method.adapt(support, generator=seed), DRAWS, seed)
        shares.append(line_like(draws).double().mean(0))
        first = draws if first is None else first
    assert first is not None
    return torch.cat(shares), first


# -- rows ---------------------------------------------------------------------------------------------------------


def measure(
    name: str, seed: int, steps: int, num_tasks: int, threads: int, full: bool, plots: Path | None = None
) -> list[Row]:
    """Train and score one run; with ``plots`` a few draws are left in that folder."""
    torch.set_num_threads(threads)
    method, seconds = train(name, seed, steps)
    everyone = fresh_tasks(num_tasks, seed)
    unsure = ambiguous_tasks(NUM_AMBIGUOUS if full else NUM_AMBIGUOUS_QUICK, seed)
    rows = []

    def add(row: str, value: float, error: float | None = None, reference: float | None = None) -> None:
        bar = RUNS[name].bars.get(row) if full else None  # a short run is there to show that all works
        judged = {} if bar is None else bar.judge(value)
        rows.append(Row(f"{name}_{row}", value, reference, standard_error=error, **judged))

    for key, value in score_tasks(method, everyone.batch, seed, DRAWS).items():
        add(key, float(value.mean()), standard_error(value), everyone.reference.get(key))
    scores = score_tasks(method, unsure.batch, seed, DRAWS)
    for key in ("nll", "coverage90"):
        add(f"ambiguous_{key}", float(scores[key].mean()), standard_error(scores[key]), unsure.reference.get(key))
    if RUNS[name].has_draws:
        share, draws = line_share(method, unsure, seed)
        gap = (share - unsure.line).abs()
        add("line_share_gap", float(gap.mean()), standard_error(gap))
        add("line_share_bias", float((share - unsure.line).mean().abs()), standard_error(share - unsure.line))
        add("line_share_correlation", correlation(share, unsure.line))
        some = everyone.first(200)
        gap = (line_share(method, some, seed)[0] - some.line).abs()
        add("line_share_gap_all", float(gap.mean()), standard_error(gap))
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            shown = panels(unsure.line)
            torch.save({"draws": draws[:, shown].float(), "share": share[shown]}, plots / f"sine_or_line_{name}.pt")
    add("seconds", seconds)
    return rows


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation; 0 where one of the two is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if float(scale) > 0 else 0.0


def run(args: argparse.Namespace) -> list[Row]:
    """All runs that were asked for."""
    steps = {name: settings.steps for name, settings in RUNS.items()}
    rows = run_all(args, steps, lambda name: RUNS[name].steps // 50, partial(measure, plots=args.plots))
    if args.plots is not None:
        count = NUM_AMBIGUOUS_QUICK if args.quick or args.steps else NUM_AMBIGUOUS
        print(f"picture: {draw(args.plots, [n for n in args.runs if RUNS[n].has_draws], count, args.seed)}")
    return rows


# -- the picture --------------------------------------------------------------------------------------------------

_ORANGE, _BLUE, _INK = "#d9541e", "#2a6fb0", "#222222"
PANELS = 5


def panels(line: Tensor) -> Tensor:
    """Which ambiguous supports are drawn: the first few."""
    return torch.arange(min(PANELS, len(line)))


def draw(folder: Path, names: list[str], count: int, seed: int, curves: int = 30) -> Path:
    """Functions drawn by the methods beside the exact posterior's, a row each; returns the path of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = ambiguous_tasks(count, seed)
    shown = panels(known.line)
    support = known.batch.support.tasks(shown)
    assert support.y is not None
    exact = exact_draws(support, DRAWS, seed)
    sides = {"exact posterior": (exact, known.line[shown])}
    for name in names:
        kept = torch.load(folder / f"sine_or_line_{name}.pt", weights_only=True)
        sides[name.replace("_", " ")] = (kept["draws"], kept["share"])
    figure = Figure(figsize=(2.5 * len(shown), 1.9 * len(sides) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sides), len(shown), sharex=True, sharey="col", squeeze=False)
    for row, (title, (draws, share)) in zip(axes, sides.items(), strict=True):
        for column, axis in enumerate(row):
            some = draws[:curves, column]  # not every n-th: particles come in turn
            for curve, is_line in zip(some, line_like(some), strict=True):
                axis.plot(GRID, curve, color=_ORANGE if is_line else _BLUE, linewidth=0.7, alpha=0.55)
            axis.scatter(support.x[column, :, 0], support.y[column], s=16, color=_INK, zorder=3)
            axis.set_title(f"{float(share[column]):.0%} lines", fontsize=8)
            reach = 1.5 + 1.6 * float(support.y[column].abs().max())
            axis.set_ylim(-reach, reach)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(title, fontsize=9)
    path = folder / "sine_or_line.png"
    figure.savefig(path, dpi=110)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    add_run_arguments(parser, RUNS, 1000)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw functions of ambiguous supports there")


if __name__ == "__main__":
    main("sine_or_line", run, add_arguments)
