"""Gather what a report shows of a posterior and a batch, and write the page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayesmeta import __version__
from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.calibration import Calibration, ClassCalibration
from bayesmeta.diagnostics.calibration import calibration as calibrate
from bayesmeta.diagnostics.forecasts import task_names
from bayesmeta.diagnostics.scores import CLASS_SCORES, SCORES, Scores
from bayesmeta.diagnostics.scores import scores as score
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior
from bayesmeta.report import figures, findings, page
from bayesmeta.report.page import Section

_COLUMNS = {
    "nll": "NLL a point",
    "crps": "CRPS",
    "rmse": "RMSE",
    "accuracy": "accuracy",
    "brier": "Brier",
    "coverage_50": "50% covers",
    "coverage_90": "90% covers",
    "width_90": "90% width",
}
_SHARES = ("accuracy", "coverage_50", "coverage_90")
_MOST_FOREST, _MOST_THETA, _PARAMETERS = 16, 12, 3


@torch.no_grad()
def write_report(
    path: str | Path,
    posterior: Posterior,
    batch: TaskBatch,
    *,
    title: str = "Report of a Bayesian meta-learner",
    name: str = "this model",
    facts: Mapping[str, str] | None = None,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    warnings: Sequence[str] = (),
    log: Sequence[Mapping[str, Any]] = (),
    best_step: int | None = None,
    examples: int = 2,
    x_label: str = "x",
    y_label: str | None = None,
    scores: Scores | None = None,
    num_samples: int = 1000,
    generator: Seed = None,
) -> Path:
    """Write what was learned, and whether to believe it, as one HTML page that needs no network and no script.

    It shows the verdict of :func:`~bayesmeta.calibration` in words, the scores with standard errors beside baselines,
    the coverage curve and the PIT histogram (of classes the reliability diagrams), forecasts of the worst, the most
    surprising and the best tasks, task parameters φ of some tasks beside their prior, and the posterior over θ where
    there is one. What cannot be shown is said on the page.

    Args:
        path: of the page; its suffix is .html or .htm.
        posterior: adapted to ``batch.support``.
        batch: its query is scored; tasks that were not trained on. Some six tasks are drawn, all are scored.
        title: of the page. name: of the model in the table.
        facts: what was trained, on what; texts by what they are.
        baselines: scores of others on the same tasks, by name: what :func:`~bayesmeta.scores` returns, or its
            ``to_dict()``, of which ``nll`` must be there.
        warnings: more of them, shown first.
        log: lines of the training log, with ``step`` and ``loss`` or ``validation``. best_step: the step that was kept.
        examples: tasks of each kind (worst, surprising, best) whose forecasts are drawn.
        x_label, y_label: names of the axes, of the first input and the first target.
        scores: of this posterior on this batch, where they are known already.
        num_samples, generator: draws where there is no closed form, and their seed.

    Returns:
        The path.

    Raises:
        OptionError: for another suffix, fewer than 1 example, a baseline without ``nll``, or a page that cannot be
            written.
        BayesMetaError: as :func:`~bayesmeta.scores` and :func:`~bayesmeta.calibration`.
    """
    path = _check(Path(path), examples)
    others = {other: _plain(other, value) for other, value in (baselines or {}).items()}
    mine = scores if scores is not None else score(posterior, batch, num_samples=num_samples, generator=generator)
    verdict = calibrate(posterior, batch, num_samples=num_samples, generator=generator)
    chosen = findings.choose(mine, verdict, examples)
    alarms = [*warnings, *findings.beaten_by(mine.to_dict(), others), *findings.warnings_of(mine, verdict, posterior)]
    options = {"x_label": x_label, "y_label": y_label, "num_samples": num_samples, "generator": generator}
    sections = [
        _trained(facts or {}, batch, log, best_step),
        _scores(mine, others, name),
        _calibration(verdict),
        _forecasts(posterior, batch, mine, verdict, chosen, options),
        _phi(posterior, batch, chosen, generator),
        _theta(posterior, generator),
    ]
    lead = _lead(mine, verdict, others, alarms)
    return _write(path, page.document(title, lead, sections, f"Written by bayesmeta {__version__}."))


def write_stub(
    path: str | Path, *, title: str, facts: Mapping[str, str], missing: str, log: Sequence[Any], best_step: int | None
) -> Path:
    """A page on a run whose tasks are not at hand: what was trained, and that nothing was scored.

    Args:
        path, title, facts, log, best_step: as :func:`write_report`. missing: why, and what to do.
    """
    sections = [_trained(facts, None, log, best_step)]
    foot = f"Written by bayesmeta {__version__}."
    return _write(_check(Path(path), 1), page.document(title, page.box(missing, "warning"), sections, foot))


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``; [] where there is none. A line that a kill cut short is left out."""
    file = Path(folder) / "log.jsonl"
    lines = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _check(path: Path, examples: int) -> Path:
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"The report {path} has the suffix {path.suffix!r}; expected .html or .htm.")
    if examples < 1:
        raise OptionError(f"examples={examples}; expected at least 1.")
    return path


def _plain(name: str, value: Mapping[str, float]) -> dict[str, float]:
    plain = value.to_dict() if isinstance(value, Scores) else dict(value)
    if "nll" not in plain:
        raise OptionError(f"The baseline {name!r} has the scores {', '.join(plain) or 'none'}; expected 'nll' there.")
    return plain


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OptionError(f"The report cannot be written to {path}: {error.strerror}. Give another place.") from error
    return path


# -- the parts ----------------------------------------------------------------------------------------------------


def _lead(
    mine: Scores,
    verdict: Calibration | ClassCalibration,
    others: Mapping[str, Mapping[str, float]],
    alarms: Sequence[str],
) -> str:
    kind = {"calibrated": "good", "unknown": ""}.get(verdict.finding, "warning")
    kind = "" if kind == "good" and verdict.num_tasks < findings.FEW_TASKS else kind
    html = page.box(verdict.verdict, kind) + "".join(page.box(text, "warning") for text in alarms)
    if others and all(value["nll"] > mine["nll"] for value in others.values()):
        html += page.box(f"The NLL is lower than that of each of the {len(others)} baseline(s) in the table.", "good")
    return html


def _trained(
    facts: Mapping[str, str], batch: TaskBatch | None, log: Sequence[Mapping[str, Any]], best_step: int | None
) -> Section:
    rows = list(facts.items())
    if batch is not None:
        real = batch.real_tasks()
        tasks = batch.num_tasks if real is None else int(real.sum())
        seen, asked = int(batch.support.counts().sum()), int(batch.query.counts().sum())
        rows.append(("tasks scored here", f"{tasks}, with {seen} observations seen and {asked} forecast"))
    html = page.facts("What was trained, and on what", rows) if rows else page.paragraph("Nothing was said about it.")
    points, label = _losses(log)
    if not points:
        return Section("trained", "What was trained", html + page.paragraph("No losses were kept of the training."))
    steps, values = zip(*points)
    low = int(np.argmin(values))
    alt = (
        f"Line of the {label} over {steps[-1]} training steps: it begins at {values[0]:.3g}, is lowest "
        f"at step {steps[low]} with {values[low]:.3g}, and ends at {values[-1]:.3g}."
    )
    kept = f" Dashed: step {best_step}, which was kept." if best_step is not None else ""
    picture = figures.curve(steps, values, label, best_step)
    html += page.figure(*picture, alt, f"The {label}, in nats a task: lower is better.{kept}")
    return Section("trained", "What was trained", html)


def _losses(log: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[float, float]], str]:
    """Steps and losses, of the validation tasks where there are two or more, and their name; [] of fewer losses."""
    for key, label in (("validation", "loss on the validation tasks"), ("loss", "training loss")):
        points = [(line["step"], line[key]) for line in log if "step" in line and _is_number(line.get(key))]
        if len(points) >= 2:
            return points, label
    return [], ""


def _scores(mine: Scores, others: Mapping[str, Mapping[str, float]], name: str) -> Section:
    meaning = CLASS_SCORES if mine.target_kind == "class" else SCORES
    keys = [key for key in _COLUMNS if key in mine]
    every = {name: mine.to_dict(), **{k if k != name else f"{k} (baseline)": v for k, v in others.items()}}
    rows = [[who, *(_cell(key, value) for key in keys)] for who, value in every.items()]
    caption = f"{mine.num_tasks} tasks: means ± standard errors"
    html = page.table(caption, ["", *(_COLUMNS[key] for key in keys)], rows, strong=True)
    if not others:
        html += page.paragraph("No baselines were given to hold these against.")
    units = "the data" if mine.raw_units else "the standardised data"
    explained = "; ".join(f"{_COLUMNS[key]}: {meaning[key]}" for key in keys)
    how = f"from up to {mine.num_samples} draws" if mine.num_samples else "in closed form"
    if mine.target_kind == "class":
        html += page.paragraph(f"{explained}. NLL in nats. Lower is better, but for accuracy.")
    else:
        html += page.paragraph(
            f"{explained}. NLL in nats, lengths in units of {units}; scores {how}. Lower is better, but "
            "for the shares: intervals should cover what they say."
        )
    return Section("scores", "Scores", html)


def _cell(key: str, value: Mapping[str, float]) -> str:
    if key not in value:
        return "—"
    mean, error = value[key], value.get(f"{key}_se", math.nan)
    if key in _SHARES:
        return f"{mean:.1%}" if math.isnan(error) else f"{mean:.1%} ± {error:.1%}"
    if not math.isfinite(error):
        return f"{mean:.4g}"
    if error < 1e-4 * abs(mean) or error == 0 or abs(mean) >= 1e5:
        return f"{mean:.4g} ± {error if error > 1e-12 * abs(mean) else 0.0:.1g}"
    places = min(max(1 - math.floor(math.log10(error)), 0), 8)  # two digits of the standard error
    return f"{mean:.{places}f} ± {error:.{places}f}"


def _calibration(result: Calibration | ClassCalibration) -> Section:
    pictures = figures.calibration(result)
    html = page.paragraph(result.verdict)
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


def _forecasts(
    posterior: Posterior,
    batch: TaskBatch,
    mine: Scores,
    verdict: Calibration | ClassCalibration,
    chosen: findings.Chosen,
    options: dict[str, Any],
) -> Section:
    names = task_names(batch)
    classes = mine.target_kind == "class"
    words = "whose class was most probable and yet wrong" if classes else "farthest out in the tails of their forecasts"
    kinds = {
        "The worst": (chosen.worst, "highest NLL a point"),
        "The most surprising": (chosen.surprising, f"of the others, {words}"),
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
            text = _of_task(names[task], task, batch, mine, verdict)
            shown.append(page.figure(*drawn[task], f"Forecast of task {text}", text))
        html += page.heading(f"{kind}: {why}") + page.grid(shown)
    several = batch.query.y is not None and batch.query.y.dim() == 3
    if several:
        html += page.paragraph("The target has several outputs; the first is drawn.")
    if batch.support.num_features > 1:
        html += page.paragraph("There are several inputs; the first is on the horizontal axis.")
    return Section("forecasts", "Forecasts", html)


def _of_task(name: str, task: int, batch: TaskBatch, mine: Scores, verdict: Calibration | ClassCalibration) -> str:
    seen, asked = int(batch.support.counts()[task]), int(batch.query.counts()[task])
    text = f"{name}: {seen} seen, {asked} forecast; NLL {float(mine.per_task['nll'][task]):.3g} a point"
    if isinstance(verdict, ClassCalibration):
        return f"{text}; the most probable class is right {float(verdict.per_task['accuracy'][task]):.0%} of the time."
    pit = verdict.pit[task]
    pit = pit[~pit.isnan()]
    inside = float(((2 * pit - 1).abs() <= 0.9).double().mean())
    return f"{text}; {inside:.0%} of them inside the 90% interval."


def _phi(posterior: Posterior, batch: TaskBatch, chosen: findings.Chosen, generator: Seed) -> Section:
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


def _theta(posterior: Posterior, generator: Seed) -> Section:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
