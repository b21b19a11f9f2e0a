"""What can be tried from the command line where a report finds fault."""

from __future__ import annotations

from bayesmeta.tabular.models import Settings

#: Likelihoods to try instead, wider tails first.
_OTHER = {
    "gaussian": ("student-t", "heteroscedastic"),
    "student-t": ("heteroscedastic",),
    "heteroscedastic": ("student-t",),
    "poisson": ("negative-binomial",),
}
_UNLIKE = "Look for tasks unlike those of training, or train on tasks like them."


def advice_of(settings: Settings, stopped_early: bool) -> dict[str, str]:
    """By what is found, as :func:`bayesmeta.write_report` takes it: options of ``fit`` that are not on already.

    Args:
        settings: of the model. stopped_early: whether patience ended the training, so that more steps would not help.
    """
    likelihoods = " or ".join(f"--likelihood {name}" for name in _OTHER.get(settings.likelihood, ()))
    if likelihoods and settings.method != "ABML":
        likelihoods += " (leaving --method out)"
    method = "another --method (bayesmeta methods lists them)"
    steps = [] if stopped_early else ["more --steps"]
    first = [likelihoods] if likelihoods else []
    again = "Fit again with"
    form = f"{again} {_or([*first, method])}."
    wide = f"{again} {_or([*first, *steps, method])}, or on more tasks."
    return {
        "over-confident": wide,
        "under-confident": wide,
        "too low": f"The forecasts lie below the data. {_UNLIKE}",
        "too high": f"The forecasts lie above the data. {_UNLIKE}",
        "miscalibrated": f"Their width is right on the whole, their form is not. {form}",
        "unknown": "Give a CSV of more tasks, or fit with a larger --holdout.",
        "bias": _UNLIKE,
        "baseline": f"{again} {_or([*steps, 'other columns (--x, --categorical, --w)', method])}.",
        "trust": f"{again} {_or([*steps, _exact(settings)])}, and compare the scores.",
        "usable": f"If intervals matter to you, compare with {_exact(settings)}.",
        "steps": f"{again} more --steps.",
        "diverged": f"Look for extreme values in the columns, or {again.lower()} smaller --hidden or {method}.",
    }


def _exact(settings: Settings) -> str:
    """Another method, one whose posterior of a task is exact where there is one."""
    if settings.likelihood == "gaussian" and settings.method != "BayesianLastLayer":
        return "--method BayesianLastLayer, whose posterior of a task is exact"
    return f"--method {next(name for name in ('ABML', 'BMAML') if name != settings.method)}"


def _or(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
