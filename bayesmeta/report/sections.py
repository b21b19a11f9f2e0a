"""The parts of a report that show calibration, forecasts and parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.calibration import Calibration, ClassCalibration
from bayesmeta.diagnostics.forecasts import task_names
from bayesmeta.diagnostics.scores import Scores
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior
from bayesmeta.report import figures, findings, page
from bayesmeta.report.alarms import Strangeness
from bayesmeta.report.page import Section

_MOST_FOREST, _MOST_THETA, _PARAMETERS = 16, 12, 3


def calibration(result: Calibration | ClassCalibration, said: str) -> Section:
    """Coverage curve and PIT histogram, or reliability diagrams; ``said`` is the verdict in words."""
    pictures = figures.calibration(result)
    html = page.paragraph(said)
    if isinstance(result, ClassCalibration):
        alt = (
            f"Reliability diagram: the most probable class has a mean probability of {result['confidence']:.0%} and is "
            f"right {result['accuracy']:.0%} of the time; expected calibration error "
        )
        alts = [f"{alt}{result['ece']:.3f}.", f"{alt}{result['ece_adaptive']:.3f}, with bins of equally many points."]
        captions = ["Bins of equal width. Dashed: calibrated.", "Bins of equally many points. Dashed: calibrated."]
        return Section(
            "calibration",
            "Calibration",
            html + page.grid([page.figure(*each) for each in _pair(pictures, alts, captions)]),
        )
    pit = result.pit[~result.pit.isnan()]
    low, high = float((pit < 0.1).double().mean()), float((pit > 0.9).double().mean())
    alts = [
        f"Coverage curve: the central 50% intervals cover {result['coverage_50']:.0%} of the query and the 90% "
        f"intervals {result['coverage_90']:.0%}. Calibrated forecasts lie on the diagonal.",
        f"Histogram of the PIT values: {low:.0%} lie below 0.1 and {high:.0%} above 0.9, where calibrated forecasts "
        "have 10% each.",
    ]
    captions = [
        "Share of the query inside central intervals of each level; below the dashed diagonal the intervals are too "
        "narrow. Band: ± 2 standard errors over tasks.",
        "PIT values: where each outcome fell within its forecast. Flat is calibrated, ∪ over-confident, ∩ "
        "under-confident. Bars: ± 2 standard errors over tasks.",
    ]
    html += page.grid([page.figure(*each) for each in _pair(pictures, alts, captions)])
    triples = zip(result.levels.tolist(), result.coverage.tolist(), result.coverage_errors.tolist())
    rows = [[f"{level:.0%}", _share(mean, error)] for level, mean, error in triples]
    html += page.details(
        "The coverage curve as a table",
        page.table("Share of the query inside the central interval of each level", ["level", "covered"], rows),
    )
    return Section("calibration", "Calibration", html)


def _pair(pictures: Sequence[figures.Picture], alts: Sequence[str], captions: Sequence[str]) -> list[Any]:
    return [(png, size, alt, caption) for (png, size), alt, caption in zip(pictures, alts, captions)]


def _share(mean: float, error: float) -> str:
    return f"{mean:.1%}" if math.isnan(error) else f"{mean:.1%} ± {error:.1%}"


def forecasts(
    posterior: Posterior,
    batch: TaskBatch,
    mine: Scores,
    verdict: Calibration | ClassCalibration,
    chosen: findings.Chosen,
    options: dict[str, Any],
) -> Section:
    """Forecasts of the worst, the most surprising and the best tasks."""
    names = task_names(batch)
    classes = mine.target_kind == "class"
    kinds = {
        "The worst": (chosen.worst, "highest NLL a point"),
        "The most surprising": (chosen.surprising, f"of the others, {_surprising(chosen.strange, classes)}"),
        "The best": (chosen.best, "lowest NLL a point"),
    }
    pictures, signs, words_of = figures.forecasts(posterior, batch, chosen.all(), **options)
    drawn = dict(zip(chosen.all(), pictures))
    html = page.figure(*signs, f"Signs in the pictures below: {', '.join(words_of)}.", "Signs in the pictures below.")
    for kind, (tasks, why) in kinds.items():
        if not tasks:
            html += page.heading(kind) + page.paragraph("There are too few tasks to show others.")
            continue
        shown = []
        for task in tasks:
            name = names[task] if batch.names is not None else f"task {names[task]}"
            text = _of_task(name, task, batch, mine, verdict, chosen.strange)
            shown.append(page.figure(*drawn[task], f"Forecast of {text}", text))
        html += page.heading(f"{kind}: {why}")
        if tasks is chosen.surprising and chosen.strange.remark:
            html += page.paragraph(chosen.strange.remark)
        html += page.grid(shown)
    several = batch.query.y is not None and batch.query.y.dim() == 3
    if several:
        html += page.paragraph("The target has several outputs; the first is drawn.")
    if batch.support.num_features > 1:
        html += page.paragraph("There are several inputs; the first is on the horizontal axis.")
    return Section("forecasts", "Forecasts", html)


def _surprising(strange: Strangeness, classes: bool) -> str:
    if strange.scores is not None:
        return "whose support was least to be expected before it was seen"
    return (
        "whose most probable class was most often wrong" if classes else "farthest out in the tails of their forecasts"
    )


def _of_task(
    name: str,
    task: int,
    batch: TaskBatch,
    mine: Scores,
    verdict: Calibration | ClassCalibration,
    strange: Strangeness,
) -> str:
    seen, asked = int(batch.support.counts()[task]), int(batch.query.counts()[task])
    text = f"{seen} seen, {asked} forecast; NLL {float(mine.per_task['nll'][task]):.3g} a point"
    if isinstance(verdict, ClassCalibration):
        text += f"; the most probable class is right {float(verdict.per_task['accuracy'][task]):.0%} of the time"
    else:
        pit = verdict.pit[task]
        inside = float(((2 * pit[~pit.isnan()] - 1).abs() <= 0.9).double().mean())
        text += f"; {inside:.0%} of them inside the 90% interval"
    if strange.scores is not None and not strange.scores[task].isnan():
        unit = "nats an observation" if strange.per_point else "nats"
        text += f"; surprise of the support {float(strange.scores[task]):.3g} {unit}"
        if strange.p_values is not None:
            p = float(strange.p_values[task])
            least = p <= 1.0001 / (strange.reference + 1)  # none of them is as surprising: it cannot be smaller
            text += f", p {'≤' if least else '='} {p:.2g} among {strange.reference} validation tasks"
    return f"{name}: {text.replace(' -', ' −')}."


def phi(posterior: Posterior, batch: TaskBatch, chosen: findings.Chosen, generator: Seed) -> Section:
    """Task parameters of some tasks, beside their prior."""
    names = task_names(batch)
    tasks = chosen.all()
    scored = (~chosen.surprise.isnan()).nonzero().flatten().tolist()
    tasks += [task for task in scored if task not in tasks][: max(_MOST_FOREST - len(tasks), 0)]
    found, remark = findings.task_parameters(posterior, tasks, _PARAMETERS, generator)
    html = page.paragraph(
        f"Task parameters φ in which these {len(tasks)} tasks differ most, in the model's own units. Dots: medians; "
        "thick and thin bars: central 50% and 90% intervals given the task's support; grey: median and 90% of the "
        "prior, which is what is known before any observation."
        if found
        else remark
    )
    html += page.box(remark) if found and remark else ""
    if found and posterior.is_point:
        html += page.box("A point estimate: every interval is a point.")
    shown = []
    labels = [names[task] for task in tasks]
    for each in found:
        middle = np.median(each.draws, 0)
        low, high = int(middle.argmin()), int(middle.argmax())
        alt = (
            f"Forest plot of {each.name} in {len(tasks)} tasks: medians go from {middle[low]:.3g} ({labels[low]}) to "
            f"{middle[high]:.3g} ({labels[high]})."
        )
        shown.append(page.figure(*figures.forest(each.name, labels, each.draws, each.prior), alt, each.name))
    return Section("phi", "Task parameters φ", html + (page.grid(shown) if shown else ""))


def theta(posterior: Posterior, generator: Seed) -> Section:
    """The posterior over what tasks share."""
    theta = findings.global_parameters(posterior, generator)
    heading = "Shared parameters θ"
    if not theta:
        text = "θ, which the tasks share, was learned as a point: it has no posterior to show."
        return Section("theta", heading, page.paragraph(text))
    rows = [
        [name, f"{v.mean():.4g}", f"{v.std(ddof=1):.2g}", *(f"{np.quantile(v, p):.4g}" for p in (0.05, 0.5, 0.95))]
        for name, v in list(theta.items())[:_MOST_THETA]
    ]
    html = page.table("Posterior of θ", ["", "mean", "sd", "5%", "median", "95%"], rows)
    if len(theta) > _MOST_THETA:
        html += page.paragraph(f"The first {_MOST_THETA} of {len(theta)} numbers.")
    shown = []
    for name, v in list(theta.items())[:4]:
        alt = (
            f"Histogram of draws of {name}: median {np.median(v):.3g}, 90% between {np.quantile(v, 0.05):.3g} "
            f"and {np.quantile(v, 0.95):.3g}."
        )
        shown.append(page.figure(*figures.density(name, v), alt, f"{name}. Line: median."))
    return Section("theta", heading, html + page.grid(shown))
