"""What a calibration says in words: the finding, how far it can be relied on, and what to try."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from bayesmeta.protocols import TargetKind

#: What a forecast is found to be; "unknown" of fewer than 3 tasks, of which no test can be made.
Finding = Literal["calibrated", "over-confident", "under-confident", "too low", "too high", "miscalibrated", "unknown"]

LEAST_TASKS = 3  # for a spread over tasks that is worth a test
#: With fewer tasks, or more noise in the calibration error (or the gap of classes), only gross errors are found.
_MANY_TASKS, _LITTLE_NOISE = 30, 0.02
#: A p-value below this is some evidence, though not enough for a finding.
_SOME_EVIDENCE = 0.1

_OF_NUMBERS = "learning the noise scale, "
_ANOTHER = "another likelihood (StudentT)"
#: What is said instead: counts have no scale of the noise, and classes neither likelihood nor scale to choose.
_INSTEAD = {
    "count": {
        _OF_NUMBERS: "another likelihood of counts (NegativeBinomial with learn_concentration=True), ",
        _ANOTHER: "another likelihood of counts (NegativeBinomial with learn_concentration=True)",
    },
    "class": {_OF_NUMBERS: "", _ANOTHER: "another model of the logits"},
}
_ADVICE = {
    "calibrated": "No correction is called for.",
    "over-confident": f"Try bm.recalibrate on validation tasks, {_OF_NUMBERS}or a method with a wider posterior over "
    "φ.",
    "under-confident": f"Try bm.recalibrate on validation tasks, {_OF_NUMBERS}more training, or less prior variance.",
    "too low": "The forecasts lie below the data: look for tasks unlike those of training; try bm.recalibrate with "
    "'isotonic'.",
    "too high": "The forecasts lie above the data: look for tasks unlike those of training; try bm.recalibrate with "
    "'isotonic'.",
    "miscalibrated": f"Their width is right on the whole, their form is not: try {_ANOTHER}, or "
    "bm.recalibrate with 'isotonic'.",
    "unknown": "Give more tasks.",
}


def of_numbers(values: dict[str, float], errors: dict[str, float], curve: list[Tensor], tasks: int) -> str:
    """The beginning of a verdict on numbers or counts: what the intervals cover.

    Args:
        values, errors: figures and standard errors.
        curve: levels, coverage and its standard errors, each ``[levels]``.
        tasks: how many count.
    """
    coverage, error = values["coverage_90"], errors["coverage_90"]
    other = ""
    if abs(coverage - 0.9) <= 2.0 * error and values["p_value"] < _SOME_EVIDENCE:
        levels, covered, spread = curve
        worst = int((covered - levels).abs().argmax())  # where the 90% intervals show nothing
        if abs(float(covered[worst] - levels[worst])) > 2.0 * float(spread[worst]):
            other = f", {100 * float(levels[worst]):.3g}% ones {percent(float(covered[worst]), float(spread[worst]))},"
    return f"90% intervals cover {percent(coverage, error)}{other} of the query of {_tasks(tasks)}: "


def of_classes(values: dict[str, float], errors: dict[str, float], tasks: int) -> str:
    """The beginning of a verdict on classes: how often the most probable one is right."""
    return (
        f"The most probable class has probability {values['confidence']:.0%} and is right "
        f"{percent(values['accuracy'], errors['accuracy'])} of the time, over {_tasks(tasks)}: "
    )


def conclusion(
    finding: Finding, values: dict[str, float], errors: dict[str, float], tasks: int, kind: TargetKind
) -> str:
    """The end of a verdict: the finding, how far it can be relied on, and what to try.

    That a test does not reject is no evidence by itself: "calibrated", with no correction called for, is said where
    many tasks leave little noise and the p-value is not small; else what could have been found.
    """
    p_value = values["p_value"]
    if finding == "calibrated":
        noise = errors["gap"] if kind == "class" else values["calibration_noise"]
        few, some = tasks < _MANY_TASKS or not noise <= _LITTLE_NOISE, p_value < _SOME_EVIDENCE
        if few or some:
            return f"no miscalibration found (p = {p_value:.2g}); {_limits(values, errors, tasks, few, some, kind)}"
    advice = _ADVICE[finding]
    for words, other in _INSTEAD.get(kind, {}).items():
        advice = advice.replace(words, other)
    if finding == "unknown":
        return f"too few tasks to tell ({LEAST_TASKS} are the least). {advice}"
    return f"{finding} (p = {p_value:.2g}). {advice}"


def _limits(
    values: dict[str, float], errors: dict[str, float], tasks: int, few: bool, some: bool, kind: TargetKind
) -> str:
    """What "no miscalibration found" leaves open."""
    if kind == "class":
        size = f"confidence less accuracy {values['gap']:+.3f} ± {errors['gap']:.3f}"
    else:
        size = f"calibration error {values['calibration_error']:.3f}; by chance {values['calibration_noise']:.3f}"
    text = f"but there is some sign of one ({size})."
    if few:
        least = "a gross one" if tasks < _MANY_TASKS else "one well above the noise"
        text = f"with {_tasks(tasks)} only {least} would be ({size})."
    return f"{text} So small a p-value is no clean bill: look again with more tasks." if some else text


def percent(value: float, error: float) -> str:
    """A share with its standard error, where there is one."""
    return f"{value:.1%}" if math.isnan(error) else f"{value:.1%} ± {error:.1%}"


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"
