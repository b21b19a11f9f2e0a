"""A run that torchrun or Slurm started again: it goes on from its last checkpoint, whatever the script says.

After a rank has died torchrun starts all of them anew, with the same arguments; Slurm does so with a job that it put
back into the queue. A script that begins a run (no ``resume``, perhaps ``overwrite``) would then be refused by its own
folder, or throw away what it had done.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bayesmeta.train.folder import CONFIG
from bayesmeta.train.lock import Job

Resume = bool | Literal["previous"]


def job(environment: Mapping[str, str] | None = None) -> str | None:
    """What tells this start of torchrun from others, and stays the same when it starts its ranks again.

    That is torchrun's ``--rdzv-id``; without one (torchrun then says "none") the agent, which is our parent process.
    None where this process is not of torchrun.
    """
    given = os.environ if environment is None else environment
    name = given.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    return name if name != "none" else f"{socket.gethostname()}:{os.getppid()}"


def restarts(environment: Mapping[str, str] | None = None, name: str = "TORCHELASTIC_RESTART_COUNT") -> int:
    """How often torchrun has started its ranks again; 0 the first time, and without torchrun."""
    given = os.environ if environment is None else environment
    text = given.get(name, "0")
    return int(text) if text.isdigit() else 0


def started_again(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun has started its ranks again, or Slurm the job."""
    return restarts(environment) > 0 or restarts(environment, "SLURM_RESTART_COUNT") > 0


def this_job(folder: Path, environment: Mapping[str, str] | None = None) -> Job:
    """What the lock of a folder needs to know of this process."""
    return Job(job(environment), started_again(environment), job_of(folder))


def goes_on(
    out: str | Path | None, overwrite: bool, resume: Resume, environment: Mapping[str, str] | None = None
) -> tuple[bool, Resume]:
    """``overwrite`` and ``resume`` as they are meant now: a run of this very job is gone on with after a restart.

    A folder that holds another run, or none, is treated as the arguments say.

    Args:
        out: the run's folder.
        overwrite, resume: as given to ``fit``.
        environment: instead of the process's own.
    """
    name = job(environment)
    if out is None or resume or name is None or not started_again(environment) or job_of(Path(out)) != name:
        return overwrite, resume
    return False, True


def job_of(folder: Path) -> Any:
    """The job that began the run in a folder; None where there is none, or none of torchrun's."""
    try:
        return json.loads((folder / CONFIG).read_text())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
