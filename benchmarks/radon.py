"""The command line on radon.csv, as a stranger would use it: held-out counties beside a pooled and an unpooled line.

For each split: ``bayesmeta fit radon.csv --task county.name --x basement --y log.radon --holdout 0.25 --seed S``, then
``bayesmeta evaluate``: five houses of each held-out county are seen (all but one in smaller counties), the others are
forecast. The gain is the line's negative log score minus ours, in nats a house, paired over counties; its mean over
splits is given with the standard error over splits (which share counties, so that it understates the error somewhat).
With ``--uranium`` the county's soil uranium is an input too, of the pooled line as well.

No setting was chosen here: the command's defaults come from three other tables (docs/command-line.md).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bayesmeta.tabular.evaluate import evaluate_csv
from bayesmeta.tabular.fit import fit_csv
from benchmarks._multilevel_model import data_folder
from benchmarks.harness import Row, at_least, main


def _silent(line: str) -> None:
    """Take a line of the report and leave it."""


def one_split(csv: Path, seed: int, x: list[str], steps: int) -> dict[str, Any]:
    """Scores of one split, as ``evaluate`` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        fit_csv(
            csv,
            out,
            task="county.name",
            x=x,
            y=["log.radon"],
            holdout=0.25,
            steps=steps,
            seed=seed,
            device="cpu",
            progress=False,
            say=_silent,
        )
        return evaluate_csv(out, csv, device="cpu", say=_silent)


def run(args: argparse.Namespace) -> list[Row]:
    """All splits."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    csv = data_folder() / "multilevel" / "radon.csv"
    splits, steps = (2, 100) if args.quick else (args.splits, 1000)
    x = ["basement", "uranium"] if args.uranium else ["basement"]
    results = [one_split(csv, args.seed * 1000 + i, x, steps) for i in range(splits)]
    rows = []
    for line in ("pooled", "unpooled"):
        gains = torch.tensor([result["nll_difference"][line]["mean"] for result in results], dtype=torch.float64)
        mean = float(gains.mean())
        verdict = {} if args.quick else at_least(0.0).judge(mean)
        rows.append(Row(f"nll_gain_over_{line}", mean, standard_error=float(gains.std() / splits**0.5), **verdict))
    for name in ("BayesianLastLayer", "pooled", "unpooled"):
        values = torch.tensor([result["scores"][name]["nll"] for result in results], dtype=torch.float64)
        rows.append(Row(f"{_words(name)}_nll", float(values.mean()), standard_error=float(values.std() / splits**0.5)))
    rows[0].seconds = time.perf_counter() - begin
    return rows


def _words(name: str) -> str:
    return "bayesmeta" if name[0].isupper() else name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--splits", type=int, default=30, help="random splits of the counties (default: 30)")
    parser.add_argument("--uranium", action="store_true", help="give the soil's uranium as an input too")


if __name__ == "__main__":
    main("radon", run, add_arguments)
