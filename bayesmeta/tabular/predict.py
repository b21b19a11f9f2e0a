"""Forecast the rows of a CSV file that lack their target, each from the rows of its task that have one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.forecasts import NormalForecast, Predictor
from bayesmeta.errors import DataError, OptionError
from bayesmeta.tabular.run import PREDICTIONS, Run, load_run
from bayesmeta.tasks.files import read_csv
from bayesmeta.tasks.pending import to_predict

if TYPE_CHECKING:
    import pandas as pd


def _dropped(run: Run) -> str:
    """What became of rows that lack an input, for the message that nothing is left."""
    return "; rows that lack an input were left out, as in training" if run.schema.missing == "drop" else ""


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def predict_csv(
    folder: Path,
    csv: Path,
    *,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    out: Path | None = None,
    seed: int = 0,
    num_samples: int = 1000,
    separator: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = _warn,
) -> pd.DataFrame:
    """Write the rows of a CSV with a forecast for each that lacks its target.

    Added are, for a target y, the columns ``y_mean``, ``y_sd`` and ``y_q0.05`` … ; for classes ``y_p_CLASS``, the
    probability of each, and ``y_class``, the most probable. They are empty in rows that have their target.

    Args:
        folder: of the run. csv: the file; rows with a target are learned from, rows without are forecast.
        quantiles: probabilities, each between 0 and 1.
        out: the file to write; by default ``predictions.csv`` in the folder.
        seed: of draws, where there is no closed form. num_samples: how many.
        separator: between two cells; by default as in training.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        say, warn: take the report and the notes.

    Returns:
        What was written, the cells of the file as text.

    Raises:
        BayesMetaError: its kinds, for whatever cannot be used.
    """
    if not quantiles or not all(0 < q < 1 for q in quantiles):
        raise OptionError(
            f"quantiles={list(quantiles)}; expected probabilities between 0 and 1, such as 0.05 0.5 0.95."
        )
    file = Path(folder) / PREDICTIONS if out is None else Path(out)
    if file.resolve() == Path(csv).resolve():
        raise OptionError(f"The forecasts would replace {csv} itself; give another --out.")
    run = load_run(folder, device)
    separator = separator or run.separator
    given = [name for name in replace(run.schema, order_by=None).columns if name not in run.schema.y]
    as_text = read_csv(csv, separator=separator, text=True)
    present = [name for name in run.schema.y if name in as_text.columns]
    frame = read_csv(csv, columns=[*given, *present], separator=separator)
    columns = _columns(run, quantiles)
    taken = [name for name in columns if name in as_text.columns]
    if taken:
        raise DataError(f"{csv} has a column {taken[0]!r} already: is it a file of forecasts? Rename or drop it.")
    values: dict[str, np.ndarray] = {name: np.full(len(frame), "", dtype=object) for name in columns}
    unknown: list[str] = []
    count, tasks = 0, 0
    for batch, rows in to_predict(frame, run.standardizer):
        real = rows >= 0
        forecast = _forecast(run, batch.to(run.device), quantiles, seed, num_samples)
        for name, column in forecast.items():
            values[name][rows[real].numpy()] = column[real.numpy()]
        empty = batch.support.counts() == 0
        unknown += [name for name, none in zip(batch.names or (), empty.tolist()) if none]
        count, tasks = count + int(real.sum()), tasks + batch.num_tasks
    if count == 0:
        raise DataError(
            f"Every row of {csv} that could be used has its target {', '.join(run.schema.y)}, so there is nothing to "
            f"forecast{_dropped(run)}. Leave it "
            "empty in the rows to forecast; to compare forecasts with targets use bayesmeta evaluate."
        )
    filled = as_text.assign(**values)
    try:
        filled.to_csv(file, index=False, sep=separator)
    except OSError as error:
        raise OptionError(
            f"The forecasts cannot be written to {file}: {error.strerror or error}. Give another --out."
        ) from error
    if unknown:
        shown = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        warn(
            f"note: {len(unknown)} task(s) have no row with a target ({shown}); their forecast is that for any new "
            "task, from the prior."
        )
    lacking = int((frame[present].isna().any(axis=1)).sum()) - count if present else len(frame) - count
    if lacking:
        warn(f"note: {lacking} row(s) without a target lack an input too and have no forecast (missing='drop').")
    new = ", ".join(columns)
    say(f"{count} rows of {tasks} tasks forecast by {run.settings.method}; columns {new}.\nWritten to {file}.")
    return filled


def _columns(run: Run, quantiles: Sequence[float]) -> list[str]:
    if run.schema.target == "class":
        (name,) = run.schema.y
        return [f"{name}_class", *(f"{name}_p_{label}" for label in run.schema.classes)]
    parts = ["mean", "sd", *(f"q{q:g}" for q in quantiles)]
    return [f"{name}_{part}" for name in run.schema.y for part in parts]


def _forecast(
    run: Run, batch: TaskBatch, quantiles: Sequence[float], seed: int, num_samples: int
) -> dict[str, np.ndarray]:
    """Each new column at the query, ``[tasks, query]``, in raw units."""
    posterior = run.method.adapt(batch.support, generator=seed)
    predictor = Predictor(posterior, num_samples, seed)
    if run.schema.target == "class":
        (name,) = run.schema.y
        probabilities = predictor.class_forecast(batch.query).probabilities.cpu()
        labels = np.array(run.schema.classes, dtype=object)
        each = {f"{name}_p_{label}": probabilities[..., k].numpy() for k, label in enumerate(run.schema.classes)}
        return {f"{name}_class": labels[probabilities.argmax(-1).numpy()]} | each
    units = run.standardizer.to(run.device, torch.float64)
    forecast = predictor.forecast(batch.query)
    sd = forecast.scale if isinstance(forecast, NormalForecast) else forecast.draws.std(0)
    parts = {"mean": units.raw_y(forecast.mean), "sd": sd * units.y_scale}
    parts |= {f"q{q:g}": units.raw_y(forecast.quantile(q)) for q in quantiles}
    three = {name: (part if part.dim() == 3 else part.unsqueeze(-1)).cpu().numpy() for name, part in parts.items()}
    return {f"{y}_{name}": part[..., i] for i, y in enumerate(run.schema.y) for name, part in three.items()}
