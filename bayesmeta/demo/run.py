"""The main job on real data: meta-train on countries, forecast others from ten years, compare with baselines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from bayesmeta.adapt.last_layer_mixture import BayesianLastLayerMixture
from bayesmeta.data import TaskBatch
from bayesmeta.demo.baselines import BASELINES
from bayesmeta.demo.components import begin, curve_mixture
from bayesmeta.demo.report import LABELS, write_demo_report
from bayesmeta.diagnostics.datatree import save_netcdf, to_datatree
from bayesmeta.diagnostics.plots import plot_forecast
from bayesmeta.diagnostics.scores import Scores, scores
from bayesmeta.errors import OptionError
from bayesmeta.models.conjugate import ConjugateModel
from bayesmeta.protocols import Posterior
from bayesmeta.report.folder import REPORT
from bayesmeta.tasks.fertility import FertilitySplit, fertility_split
from bayesmeta.train import checkpoint
from bayesmeta.train.fit import FitResult, fit, pick_device
from bayesmeta.train.schedules import cosine

SUPPORT = 10
STEPS = 200
#: Chosen on validation countries of splits that no reported figure uses; see benchmarks/RESULTS.md.
SETTINGS: dict[str, Any] = {
    "curves": 16,  # features: principal curves, beside the mean curve
    "restarts": 4,
    "components": 8,  # of each restart
    "iterations": 15,  # of EM
    # births per woman; more than the curves leave over, since neighbouring years err alike: ten years count for less
    "noise_scale": 0.03,
    "rate": 3e-3,
    "tasks_per_step": 16,
    "validate_every": 10,
}
#: of the countries that can be held out, 1960–2011
_YEARS = 52


def demo_method(seed: int = 0) -> BayesianLastLayerMixture:
    """The untrained method of the demo: all of θ is zero or a placeholder until :func:`train_demo`, or a checkpoint."""
    count = SETTINGS["restarts"] * SETTINGS["components"]
    model = curve_mixture(_YEARS, SETTINGS["curves"], count, SETTINGS["noise_scale"], seed)
    return BayesianLastLayerMixture(model, objective="marginal")


def train_demo(split: FertilitySplit, seed: int, steps: int = STEPS, **options: Any) -> FitResult:
    """Meta-train on the training countries: principal curves and EM, then gradient steps on forecasts.

    The steps go on where EM ended, on the components alone; early stopping keeps the θ that was best on the validation
    countries. Draws take half of their supports at random from a country's years, and the first ten for the other half.
    """
    method = demo_method(seed)
    assert isinstance(method.program, ConjugateModel)
    begin(
        method.program,
        split.train,
        restarts=SETTINGS["restarts"],
        noise_scale=SETTINGS["noise_scale"],
        iterations=SETTINGS["iterations"],
        seed=seed,
    )
    return fit(
        method,
        split.train,
        steps=steps,
        tasks_per_step=SETTINGS["tasks_per_step"],
        support=SUPPORT,
        query=None,
        optimizer=lambda p: torch.optim.Adam(p, lr=SETTINGS["rate"]),
        schedule=cosine(steps),
        validation=split.validation.all(support=SUPPORT),
        validate_every=min(SETTINGS["validate_every"], steps),
        seed=seed,
        **options,
    )


def score_baselines(split: FertilitySplit) -> dict[str, Scores]:
    """Scores of every baseline on the held-out countries, in births per woman."""
    # a Forecast has the closed form that scores asks for, and no draws of φ
    raw = split.test.with_standardizer(None).all(support=SUPPORT)
    return {name: scores(cast(Posterior, f(split.train, raw)), raw) for name, f in BASELINES.items()}


def run_demo(
    out: Path = Path("runs/demo"),
    *,
    steps: int = STEPS,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Run the demo; write ``metrics.json``, ``report.html``, ``posterior.nc``, ``forecast.png`` and checkpoints.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        RunFolderError, CheckpointError, OptionError: for folders, checkpoints and options that cannot be used.
    """
    started = time.perf_counter()
    if steps < 1 or not 0 <= seed < 2**32:
        raise OptionError(f"steps must be at least 1 and seed between 0 and 2³² − 1; got {steps} and {seed}.")
    if Path(out) == Path():
        raise OptionError("The output folder is the current one; give the run a folder of its own, such as runs/demo.")
    pick_device(device)
    split = fertility_split(seed, order="mixed")
    print(
        f"World Bank fertility rates: {split.train.num_tasks} training, {split.validation.num_tasks} validation and "
        f"{split.test.num_tasks} held-out countries; {SUPPORT} years are seen, the rest is forecast.",
        flush=True,
    )
    result = train_demo(
        split,
        seed,
        steps,
        out=out,
        overwrite=overwrite,
        resume=resume,
        device=device,
        progress=progress,
        checkpoint_every=100,
        config={"demo": SETTINGS, "seed": seed, "steps": steps, "standardizer": _standardizer(split)},
    )
    print(f"meta-training: {result.steps} steps, best on validation at step {result.best_step}", flush=True)
    batch = split.test.all(support=SUPPORT).to(pick_device(device))
    posterior = result.method.adapt(batch.support)
    table = {"demo": scores(posterior, batch), **score_baselines(split)}
    metrics = {
        "seed": seed,
        "steps": result.steps,
        "best_step": result.best_step,
        "countries": {"train": split.train.num_tasks, "test": split.test.num_tasks},
        "scores": {name: s.to_dict() for name, s in table.items()},
    }
    print("\n" + _table(table))
    _write(Path(out), metrics, posterior, batch)
    known = result.method.adapt(split.validation.all(support=SUPPORT).to(pick_device(device)).support)
    write_demo_report(Path(out), metrics, posterior, batch, known, scores=table["demo"])
    print(_files(Path(out), time.perf_counter() - started))
    return metrics


def _standardizer(split: FertilitySplit) -> dict[str, Any]:
    assert split.train.standardizer is not None
    return split.train.standardizer.state()


def _table(table: Mapping[str, Scores]) -> str:
    columns = {
        "rmse": "RMSE",
        "nll": "NLL/point",
        "crps": "CRPS",
        "coverage_50": "50% covers",
        "coverage_90": "90% covers",
    }
    lines = [f"{'held-out countries':<24}" + "".join(f"{label:>17}" for label in columns.values())]
    for name, result in table.items():
        cells = []
        for key in columns:
            value, error = result[key], result.standard_errors[key]
            cells.append(f"{value:>9.3f} ± {error:<5.3f}" if abs(value) < 1000 else f"{value:>9.2g} ± {error:<5.1g}")
        lines.append(f"{LABELS.get(name, name):<24}" + "".join(f"{cell:>17}" for cell in cells))
    lines += [
        "RMSE and CRPS in births per woman, NLL in nats a point: lower is better. The 50% and 90% intervals",
        "should cover 0.50 and 0.90 of the points. Means over held-out countries ± standard error. The last",
        "five are what one would try without meta-learning; the empirical Gaussian conditions the mean and",
        "covariance of the training countries on the ten years.",
    ]
    return "\n".join(lines)


def _write(out: Path, metrics: dict[str, Any], posterior: Any, batch: TaskBatch) -> None:
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    save_netcdf(to_datatree(posterior, batch, num_samples=500), out / "posterior.nc")
    plot_forecast(
        posterior, batch, max_panels=12, x_label="year", y_label="births per woman", path=out / "forecast.png"
    )


def _files(out: Path, seconds: float) -> str:
    what = {
        "metrics.json": "the table above, as JSON",
        REPORT: "the same and more to look at, in a browser",
        "posterior.nc": "posterior and predictions, for ArviZ",
        "forecast.png": "forecasts of twelve held-out countries",
        checkpoint.BEST: "the trained θ, for bayesmeta.load_method",
        checkpoint.LAST: "the end of training, for --resume",
        "config.json": "settings and standardisation",
        "log.jsonl": "losses",
    }
    lines = [f"\nWritten in {seconds:.0f} s:"] + [f"  {out / name!s:<32} {text}" for name, text in what.items()]
    return "\n".join(lines)
