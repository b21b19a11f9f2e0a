"""Gather what a report shows of a posterior and a batch, and write the page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bayesmeta import __version__
from bayesmeta.data import TaskBatch
from bayesmeta.diagnostics.calibration import Calibration, ClassCalibration
from bayesmeta.diagnostics.calibration import calibration as calibrate
from bayesmeta.diagnostics.scores import CLASS_SCORES, SCORES, Scores
from bayesmeta.diagnostics.scores import scores as score
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior
from bayesmeta.report import alarms, figures, findings, page, sections
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
    planned_steps: int | None = None,
    advice: Mapping[str, str] | None = None,
    validation: Posterior | None = None,
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
    surprising (:func:`~bayesmeta.surprise`) and the best tasks, task parameters φ of some tasks beside their prior, and
    the posterior over θ where there is one. It warns of few tasks, of a training that diverged or did not converge, of
    a posterior that its own importance weights contradict (:func:`~bayesmeta.psis`), and of tasks unlike those of
    validation. What cannot be shown is said on the page.

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
        planned_steps: of a training that has ended, those that it was asked for, where that is known: with fewer
            done, patience stopped it.
        advice: what to try, instead of what is said by default, by finding of the calibration ("over-confident", …),
            and for "bias", "baseline", "trust" and "usable" (of the posterior's draws), "steps" and "diverged".
        validation: by the same method, adapted to the supports of validation tasks: the surprise of each task shown is
            then held against theirs.
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
    advice = advice or {}
    mine = scores if scores is not None else score(posterior, batch, num_samples=num_samples, generator=generator)
    verdict = calibrate(posterior, batch, num_samples=num_samples, generator=generator)
    strange = alarms.strangeness(posterior, validation, num_samples, generator)
    chosen = findings.choose(mine, verdict, examples, strange)
    gaps = findings.gaps(mine, baselines or {})
    trust = alarms.trust(posterior, batch, generator, advice)
    heard = [
        *warnings,
        *findings.beaten_by(gaps, advice),
        *findings.warnings_of(mine, verdict, posterior, advice),
        *alarms.training(log, best_step, planned_steps, advice),
        *trust.warnings,
        *alarms.strange_tasks(strange),
    ]
    said = findings.verdict_in_words(verdict, mine, advice)
    options = {"x_label": x_label, "y_label": y_label, "num_samples": num_samples, "generator": generator}
    parts = [
        _trained(facts or {}, batch, log, best_step, planned_steps),
        _scores(mine, others, name),
        sections.calibration(verdict, said),
        sections.forecasts(posterior, batch, mine, verdict, chosen, options),
        sections.phi(posterior, batch, chosen, generator),
        sections.theta(posterior, generator),
    ]
    lead = _lead(verdict, said, gaps, heard, trust.notes)
    return _write(path, page.document(title, lead, parts, f"Written by bayesmeta {__version__}."))


def write_stub(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    missing: str,
    log: Sequence[Any],
    best_step: int | None,
    planned_steps: int | None = None,
    advice: Mapping[str, str] | None = None,
) -> Path:
    """A page on a run whose tasks are not at hand: what was trained, and that nothing was scored.

    Args:
        path, title, facts, log, best_step, planned_steps, advice: as :func:`write_report`.
        missing: why, and what to do.
    """
    parts = [_trained(facts, None, log, best_step, planned_steps)]
    heard = [missing, *alarms.training(log, best_step, planned_steps, advice)]
    lead = "".join(page.box(text, "warning") for text in heard)
    foot = f"Written by bayesmeta {__version__}."
    return _write(_check(Path(path), 1), page.document(title, lead, parts, foot))


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
    verdict: Calibration | ClassCalibration,
    said: str,
    gaps: Mapping[str, findings.Gap],
    heard: Sequence[str],
    notes: Sequence[str],
) -> str:
    kind = {"calibrated": "good", "unknown": ""}.get(verdict.finding, "warning")
    better = all(gap.mean > 0 for gap in gaps.values())
    clear = verdict.num_tasks >= findings.ENOUGH_TASKS and verdict["p_value"] >= findings.CLEAR
    if kind == "good" and not (clear and better):  # that no test accuses it is no praise
        kind = ""
    html = page.box(said, kind) + "".join(page.box(text, "warning") for text in heard)
    if gaps and better:
        text = f"The NLL is lower than that of {_every(len(gaps))} in the table"
        if verdict.num_tasks >= findings.FEW_TASKS and all(gap.sure for gap in gaps.values()):
            html += page.box(f"{text}, by more than chance explains.", "good")
        else:
            html += page.box(f"{text}, though that may be chance.")
    return html + "".join(page.box(text) for text in notes)


def _every(count: int) -> str:
    return "the baseline" if count == 1 else f"each of the {count} baselines"


def _trained(
    facts: Mapping[str, str],
    batch: TaskBatch | None,
    log: Sequence[Mapping[str, Any]],
    best_step: int | None,
    planned_steps: int | None,
) -> Section:
    rows = list(facts.items())
    if log and "training" not in facts:
        rows.append(("training", alarms.course(log, best_step, planned_steps)))
    if batch is not None:
        real = batch.real_tasks()
        tasks = batch.num_tasks if real is None else int(real.sum())
        seen, asked = int(batch.support.counts().sum()), int(batch.query.counts().sum())
        rows.append(("tasks scored here", f"{tasks}, with {seen} observations seen and {asked} forecast"))
    html = page.facts("What was trained, and on what", rows) if rows else page.paragraph("Nothing was said about it.")
    key, steps, values = alarms.losses(log)
    if not values:
        return Section("trained", "What was trained", html + page.paragraph(_single(log)))
    label = alarms.NAMES[key]
    low = min(range(len(values)), key=values.__getitem__)
    alt = (
        f"Line of the {label} over {steps[-1]} training steps: it begins at {values[0]:.3g}, is lowest "
        f"at step {steps[low]} with {values[low]:.3g}, and ends at {values[-1]:.3g}."
    )
    kept = f" Dashed: step {best_step}, which was kept." if best_step is not None else ""
    picture = figures.curve(steps, values, label, best_step)
    html += page.figure(*picture, alt, f"The {label}, in nats a task: lower is better.{kept}")
    return Section("trained", "What was trained", html)


def _single(log: Sequence[Mapping[str, Any]]) -> str:
    """What stands where there are too few losses for a line."""
    found = [
        f"{alarms.NAMES[key]} {line[key]:.4g} at step {line.get('step', '?')}"
        for line in log
        for key in ("loss", "validation")
        if isinstance(line.get(key), int | float)
    ]
    if not found:
        return "No losses were kept of the training."
    return f"Too few losses were kept for a line: {', '.join(found)} (nats a task; lower is better)."


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
    more = " (of counts: or more)" if mine.target_kind == "count" else ""
    explained = "; ".join(f"{_COLUMNS[k]}: {meaning[k]}{more if k.startswith('coverage') else ''}" for k in keys)
    how = f"from up to {mine.num_samples} draws" if mine.num_samples else "in closed form"
    if mine.target_kind == "class":
        html += page.paragraph(f"{explained}. NLL in nats. Lower is better, but for accuracy.")
    else:
        html += page.paragraph(
            f"{explained}. NLL in nats, lengths in units of {units}; scores {how}. Lower is better, but "
            "for the shares: intervals should cover what they say."
        )
    if mine.target_kind == "count":
        html += page.paragraph(findings.OF_COUNTS)
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
    # two digits of the standard error, or one where the number would be long
    most = max(-math.floor(math.log10(error)), 3 - math.floor(math.log10(max(abs(mean), 1e-300))), 0)
    places = min(max(1 - math.floor(math.log10(error)), 0), most, 8)
    return f"{mean:.{places}f} ± {error:.{places}f}"
