"""The report of a folder that the demo left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.scores import Scores
from bayesmeta.errors import RunFolderError
from bayesmeta.protocols import Posterior
from bayesmeta.report.build import read_log, write_report
from bayesmeta.report.folder import REPORT
from bayesmeta.tasks.fertility import fertility_split
from bayesmeta.train.checkpoint import load_method
from bayesmeta.train.fit import pick_device

#: Of the demo and its baselines, as tables name them.
LABELS = {
    "demo": "bayesmeta: mixture",
    "empirical_gaussian": "empirical Gaussian",
    "last_value_drift": "last value + drift",
    "last_value": "last value",
    "line_per_country": "line per country",
    "gp_per_country": "GP per country",
}


def write_demo_report(
    folder: Path,
    metrics: Mapping[str, Any],
    posterior: Posterior,
    batch: TaskBatch,
    validation: Posterior,
    *,
    scores: Scores | None = None,
    out: Path | None = None,
) -> Path:
    """Write the report of a demo.

    Args:
        folder: of the run. metrics: what ``metrics.json`` holds. posterior: adapted to the support of ``batch``.
        batch: the held-out countries. validation: adapted to those of validation.
        scores: of the posterior on the batch, where they are known.
        out: the page; by default ``report.html`` in the folder.
    """
    countries = metrics["countries"]
    return write_report(
        folder / REPORT if out is None else out,
        posterior,
        batch,
        title="Fertility rates of held-out countries, forecast from ten years",
        name=LABELS["demo"],
        facts={
            "data": "births per woman by country and year, 1960–2011 (World Bank, through statsmodels)",
            "countries": f"{countries['train']} to train on, {countries['test']} held out",
            "method": f"{type(posterior).__name__} over φ: a mixture of Gaussian priors over principal curves",
            "seen of each": f"{batch.support.shots} years; the rest is forecast",
            "training": f"{metrics['steps']} steps, kept: step {metrics['best_step']}; seed {metrics['seed']}",
        },
        baselines={LABELS.get(k, k): v for k, v in metrics["scores"].items() if k != "demo"},
        log=read_log(folder),
        best_step=metrics["best_step"],
        validation=validation,
        x_label="year",
        y_label="births per woman",
        scores=scores,
    )


def report_demo(
    folder: Path, *, out: Path | None = None, device: str = "auto", say: Callable[[str], None] = print
) -> Path:
    """Read the folder of a demo back and write its report.

    Args:
        folder: the ``--out`` of the demo. out: the page; by default ``report.html`` in the folder.
        device: as of the demo. say: takes what was written.

    Raises:
        RunFolderError: for a demo that did not end.
        CheckpointError: for a damaged checkpoint.
    """
    from bayesmeta.demo.run import SUPPORT, demo_method  # which itself writes a report

    folder = Path(folder)
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        split = fertility_split(metrics["seed"], order="mixed")
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(
            f"The demo in {folder} did not end, or its metrics.json is damaged ({error!r}). Go on with demo --resume."
        ) from error
    batch = split.test.all(support=SUPPORT).to(pick_device(device))
    method = load_method(folder, demo_method(metrics["seed"]), batch).to(batch.support.device).eval()
    known = method.adapt(split.validation.all(support=SUPPORT).to(batch.support.device).support)
    path = write_demo_report(folder, metrics, method.adapt(batch.support), batch, known, out=out)
    say(f"Written to {path}.")
    return path
