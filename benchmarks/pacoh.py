"""PACOH beside its baselines, meta-trained on 20 tasks of 5 points (Rothfuss et al. 2021).

Two environments (see ``benchmarks/_pacoh_tasks.py``). Each method is trained on ``--trainings`` different training
sets, which all methods share, and scored on ``--tasks`` fresh tasks of 5 context and 200 test points: the root mean
squared error of the predictive mean in raw units and the calibration error (``benchmarks/_pacoh_tasks.py``), each
averaged over tasks, as the paper has them; and the calibration error of all tasks' points together. The first kind of
calibration error has a floor, since the errors at a task's points hang together: it is that of ``oracle``, who knows
how tasks are made. A method whose errors are mostly noise can be below that; the second kind has no such floor.

Methods: ``pacoh`` (a GP with mean and kernel networks, hyper-posterior by SVGD), ``pacoh_map`` (one particle),
``mll`` (the same GP by its evidence alone), ``vanilla_gp`` (a GP fitted to each context), ``maml``,
``neural_process``, and ``oracle``.

Rows, for each ENVIRONMENT and METHOD: ``ENVIRONMENT_METHOD_rmse``, ``…_calibration`` and ``…_pooled_calibration``,
with the standard error over trainings, and ``…_seconds`` of CPU time a training. Those of ``pacoh`` have a bar: the
mean difference to the best of the baselines, chosen after the fact, is at most one standard error of that (paired)
difference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.models.deep_kernel import Inputs
from benchmarks._pacoh_gp import VanillaGP
from benchmarks._pacoh_oracle import Oracle
from benchmarks._pacoh_tasks import ENVIRONMENTS, SHOTS, TRAIN_TASKS, score, test_set, training_set
from benchmarks.harness import Row, main, standard_error
from benchmarks.runs import refuse_unknown, train_method

SCORES = ("rmse", "calibration", "pooled_calibration")
#: Test tasks are drawn under another seed than any training set.
TEST_SEED = 1_000_000


@dataclass(frozen=True)
class Settings:
    """What was chosen for an environment, on training sets and test tasks of other seeds (100, 101).

    By the error; of errors within five percent, by the calibration.

    Attributes:
        inputs: what PACOH's kernel compares: ``"raw"`` x, or ``"features"``, two of them.
        weight_scale, bias_scale, other_scale, hyper_prior_weight: of the hyper-prior.
        mll_inputs, mll_steps: the kernel of MLL, and when to stop, which is all that holds it back.
        inner_lr, maml_steps, process_steps: of MAML and of the neural process.
    """

    inputs: Inputs
    weight_scale: float
    bias_scale: float
    other_scale: float
    hyper_prior_weight: float
    mll_inputs: Inputs
    mll_steps: int
    inner_lr: float
    maml_steps: int
    process_steps: int

    @property
    def hyper_prior(self) -> dict[str, Any]:
        """Options of PACOH."""
        names = ("weight_scale", "bias_scale", "other_scale", "hyper_prior_weight")
        return {name: getattr(self, name) for name in names}


SETTINGS = {
    "cauchy": Settings("raw", 0.5, 0.5, 0.3, 0.1, "raw", 200, 0.003, 1000, 500),
    "sinusoid": Settings("features", 1.0, 1.0, 0.2, 0.05, "features", 800, 0.003, 2000, 1500),
}
PACOH_STEPS, PARTICLES, SUPPORT = 800, 5, 3


def gp_model(features: int, inputs: Inputs) -> bm.DeepKernelModel:
    """The GP of PACOH and of MLL: a mean network, and an RBF kernel on x or on two features."""
    mean = bm.nets.mlp(features, [32, 32], 1, activation="tanh")
    network = nn.Sequential(nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, 2), nn.Linear(2, 1))
    return bm.DeepKernelModel(network, bm.Gaussian(0.3, learn_scale=True), "rbf", inputs=inputs, mean_network=mean)


def _pacoh(features: int, chosen: Settings) -> bm.PACOH:
    return bm.PACOH(gp_model(features, chosen.inputs), num_particles=PARTICLES, **chosen.hyper_prior)


def _pacoh_map(features: int, chosen: Settings) -> bm.PACOH:
    return bm.PACOH(gp_model(features, chosen.inputs), hyper_posterior="map", **chosen.hyper_prior)


def _mll(features: int, chosen: Settings) -> bm.DeepKernel:
    return bm.DeepKernel(gp_model(features, chosen.mll_inputs))


def _maml(features: int, chosen: Settings) -> bm.MAML:
    network = bm.nets.mlp(features, [32, 32], 1, activation="tanh")
    model = bm.NeuralTaskModel(network, bm.Gaussian(0.3, learn_scale=True), "point")
    return bm.MAML(model, inner_steps=3, inner_lr=chosen.inner_lr)


def _neural_process(features: int, chosen: Settings) -> bm.NeuralProcess:
    network = bm.nets.mlp(features, [32, 32], 2)
    model = bm.NeuralTaskModel(network, bm.likelihoods.HeteroscedasticGaussian(0.05), "point")
    return bm.NeuralProcess(model, latent_size=8, width=32, objective="likelihood", num_particles=4)


#: How a method is made, its steps, and Adam's first rate, which falls to 0 as a cosine.
RUNS: dict[str, tuple[Callable[[int, Settings], Any], Callable[[Settings], int], float]] = {
    "pacoh": (_pacoh, lambda chosen: PACOH_STEPS, 5e-3),
    "pacoh_map": (_pacoh_map, lambda chosen: PACOH_STEPS, 5e-3),
    "mll": (_mll, lambda chosen: chosen.mll_steps, 5e-3),
    "maml": (_maml, lambda chosen: chosen.maml_steps, 3e-3),
    "neural_process": (_neural_process, lambda chosen: chosen.process_steps, 2e-3),
}
METHODS = (*RUNS, "vanilla_gp", "oracle")


def measure(name: str, environment: str, seed: int, steps: int, tasks: int) -> dict[str, float]:
    """Train one method on one training set and score it: rmse, calibration, seconds."""
    batch, standardizer = training_set(environment, seed)
    seconds, method = 0.0, Oracle(environment, standardizer) if name == "oracle" else VanillaGP()
    if name in RUNS:
        make, _, rate = RUNS[name]
        method, seconds = train_method(
            lambda: make(batch.support.num_features, SETTINGS[environment]),
            bm.tasks.FixedTasks(batch),
            seed,
            steps,
            rate=rate,
            clip=100.0,
            support=SUPPORT,
            query=SHOTS - SUPPORT,
            tasks_per_step=TRAIN_TASKS,
        )
    fresh = test_set(environment, tasks, TEST_SEED + seed, standardizer)
    return score(method, fresh, standardizer) | {"seconds": seconds}


Figures = dict[str, torch.Tensor]


def rows_of(environment: str, found: dict[str, Figures], full: bool) -> list[Row]:
    """The rows of one environment from each method's figures over trainings, ``[trainings]`` each."""
    rows = []
    others = [name for name in found if name not in ("pacoh", "pacoh_map", "oracle")]
    for name, figures in found.items():
        for key in SCORES:
            value = figures[key]
            label, error = f"{environment}_{name}_{key}", standard_error(value)
            if name != "pacoh" or not others:
                rows.append(Row(label, float(value.mean()), standard_error=error))
                continue
            best = min(others, key=lambda other: float(found[other][key].mean()))
            difference = value - found[best][key]
            error = standard_error(difference)
            judged: dict[str, Any] = {}
            if full and error is not None:
                held = bool(difference.mean() <= error)
                judged = {"bar": f"≤ {best} + 1 std error", "passes": held}
            reference, gap = float(found[best][key].mean()), float(difference.mean())
            rows.append(Row(label, float(value.mean()), reference, None, gap, error, **judged))
        rows.append(Row(f"{environment}_{name}_seconds", float(figures["seconds"].mean())))
    return rows


def run(args: argparse.Namespace) -> list[Row]:
    """Train and score each method on each training set."""
    refuse_unknown(args.methods, METHODS, "method")
    refuse_unknown(args.environments, ENVIRONMENTS, "environment")
    torch.set_num_threads(args.threads)
    trainings, tasks = (2, min(args.tasks, 20)) if args.quick else (args.trainings, args.tasks)
    begin, rows = time.process_time(), []
    for environment in args.environments:
        found: dict[str, Figures] = {}
        for name in args.methods:
            full = RUNS[name][1](SETTINGS[environment]) if name in RUNS else 0
            steps = args.steps or (max(full // 50, 1) if args.quick else full)
            each = [measure(name, environment, args.seed + i, steps, tasks) for i in range(trainings)]
            found[name] = {key: torch.tensor([one[key] for one in each], dtype=torch.float64) for key in each[0]}
            shown = ", ".join(f"{key} {values.mean():.4f}" for key, values in found[name].items())
            print(f"{environment} {name}: {shown}; {time.process_time() - begin:.0f} s so far", flush=True)
        rows += rows_of(environment, found, full=not args.quick and not args.steps)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"which (default: {' '.join(METHODS)})")
    parser.add_argument("--environments", nargs="+", default=list(ENVIRONMENTS), help="which (default: both)")
    parser.add_argument("--trainings", type=int, default=5, help="training sets, seeds from --seed on (default: 5)")
    parser.add_argument("--tasks", type=int, default=100, help="test tasks (default: 100)")
    parser.add_argument("--steps", type=int, default=0, help="training steps (default: the method's own)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("pacoh", run, add_arguments)
