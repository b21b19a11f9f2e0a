"""What kind of run a folder holds: decides who reads it."""

from __future__ import annotations

import json
from pathlib import Path

from bayesmeta.errors import RunFolderError
from bayesmeta.train.folder import CONFIG

REPORT = "report.html"
#: Runs that a report can be made of by their folder alone, and the key of their settings that tells them.
KINDS = ("tabular", "demo")


def kind_of(folder: str | Path) -> str:
    """``"tabular"`` of a folder of ``bayesmeta fit``, ``"demo"`` of one of ``bayesmeta demo``.

    Raises:
        RunFolderError: for a folder without a run, a damaged one, or one of another kind.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise RunFolderError(f"{folder} holds no run: there is no {CONFIG}. Give the --out of fit or demo.")
    try:
        settings = json.loads(file.read_text())["settings"]
        kinds = [kind for kind in KINDS if kind in settings]
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{file} is damaged or of another version: {error!r}.") from error
    if not kinds:
        raise RunFolderError(
            f"{folder} holds a run of your own, whose model and tasks only your code knows. Load it there with "
            "bayesmeta.load_method, adapt to a batch, and call bayesmeta.write_report."
        )
    return kinds[0]
