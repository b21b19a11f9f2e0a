"""The folder of a run on a table: what lies there, and how it is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bayesmeta.adapt.base import Method
from bayesmeta.data import Observations, Standardizer, TaskBatch
from bayesmeta.errors import RunFolderError
from bayesmeta.tabular.lines import Lines
from bayesmeta.tabular.models import Settings, build
from bayesmeta.tabular.rates import Rates
from bayesmeta.tasks.schema import TableSchema
from bayesmeta.train.checkpoint import load_method
from bayesmeta.train.fit import pick_device
from bayesmeta.train.folder import CONFIG

FORMAT = 1
LINES, RATES, TASKS = "lines.pt", "rates.pt", "tasks.json"
#: What tables call the baselines.
LABELS = {
    "pooled": "pooled line",
    "unpooled": "line per task",
    "pooled_shares": "pooled shares",
    "task_shares": "shares per task",
    "pooled_rate": "pooled rate",
    "task_rate": "rate per task",
}
#: Where scores and forecasts go, unless another place is given.
SCORES, PREDICTIONS = "scores.json", "predictions.csv"


@dataclass(frozen=True, eq=False)
class Run:
    """A trained method and how its table is read.

    Attributes:
        folder: where it lies.
        settings: of the model.
        method: with the trained θ, in evaluation mode.
        standardizer: units and schema of the training tasks.
        schema: the latter.
        support, order, separator: as they were in training.
        tasks: names of the tasks by what they were for: ``"train"``, ``"validation"``, ``"held out"``.
        lines: the baselines; None where the target is no real number.
        rates: those of classes and counts; None of numbers, and of a run from before there were any.
        device: where the method is.
    """

    folder: Path
    settings: Settings
    method: Method
    standardizer: Standardizer
    schema: TableSchema
    support: int
    order: str
    separator: str
    tasks: dict[str, list[str]]
    lines: Lines | None
    rates: Rates | None
    device: torch.device

    @property
    def baselines(self) -> dict[str, Callable[[TaskBatch], Any]]:
        """What forecasts a batch without the method, by name; see :data:`LABELS`."""
        if self.lines is not None:
            return {"pooled": self.lines.pooled, "unpooled": self.lines.unpooled}
        if self.rates is None:
            return {}
        kind = "shares" if self.rates.of_classes else "rate"
        return {f"pooled_{kind}": self.rates.pooled, f"task_{kind}": self.rates.own}


def load_run(folder: Path, device: str = "cpu") -> Run:
    """Read the folder that ``fit`` wrote.

    Raises:
        RunFolderError: for a folder that is not there or holds no finished run on a table.
        CheckpointError: for a checkpoint that is damaged or belongs to another model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"{folder} holds no run: there is no {CONFIG}. Give the --out of bayesmeta fit.")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())["settings"]
        if config.get("tabular") != FORMAT:
            raise RunFolderError(f"{folder} holds a run of another kind; expected one of bayesmeta fit.")
        settings = Settings.from_state(config["model"])
        standardizer = Standardizer.from_state(config["standardizer"])
        schema = TableSchema.from_state(config["standardizer"]["schema"])
        support, order, separator = config["support"], config["order"], config["separator"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{folder / CONFIG} is damaged or of another version: {error!r}.") from error
    if not (folder / TASKS).is_file():
        raise RunFolderError(f"The run in {folder} is not finished: there is no {TASKS}. Go on with fit … --resume.")
    tasks = json.loads((folder / TASKS).read_text())
    where = pick_device(device)
    method = load_method(folder, build(settings), _example(settings)).to(where).eval()
    lines = Lines.load(folder / LINES) if schema.target == "real" else None
    rates = Rates.load(folder / RATES) if schema.target != "real" and (folder / RATES).is_file() else None
    return Run(folder, settings, method, standardizer, schema, support, order, separator, tasks, lines, rates, where)


def _example(settings: Settings) -> Observations:
    """Observations of the right widths, from which parameters get their shapes."""
    targets = (1, 2) if settings.targets == 1 else (1, 2, settings.targets)
    w = torch.zeros(1, settings.covariates) if settings.covariates else None
    return Observations(torch.ones(1, 2, settings.features), torch.zeros(targets), None, w)
