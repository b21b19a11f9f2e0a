"""One run in a folder at a time: a lock that the system lets go of when its process dies, however it dies."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesmeta.errors import RunFolderError
from bayesmeta.ops.files import discard, reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"
#: A lock of another machine whose holder gave no sign of life for so many seconds is stale.
STALE = 120.0
_BEAT = 10.0
#: Seconds between looks at a lock that is waited for.
_LOOK = 1.0
#: Locks of this process, by real path, which a lock of the system does not keep apart; with the process that took them,
#: since a forked child has this table too.
_HELD: dict[str, int] = {}


@dataclass(frozen=True)
class Job:
    """What a launcher says of this process; see :mod:`bayesmeta.train.restart`.

    Attributes:
        name: of the job; None without torchrun.
        again: whether the job was started again.
        began: the job that began the run in the folder, where that is known.
    """

    name: str | None = None
    again: bool = False
    began: str | None = None


class Lock:
    """The lock of a run's folder, a file that says who holds it; taken when made, let go by :meth:`release`.

    The system's lock on the file tells a dead holder from a live one on this machine at once, however it ended. Between
    machines it may not reach (some network file systems), so that the holder touches the file while it trains: of
    another machine's lock a sign of life in the last two minutes counts.

    A job that was started again after the machine of its rank 0 was lost finds a lock of its own from there. It takes
    it at once where the system's lock was obtained. Else it waits until the holder counts as dead, for which a lock of
    the system on a network is given two minutes too.

    Args:
        folder: the run's folder, which exists.
        job: that this process is of.

    Raises:
        RunFolderError: naming the process and host that hold it; or when the file cannot be written.
    """

    def __init__(self, folder: Path, job: Job | None = None) -> None:
        self.path, self.job = folder / LOCK, job or Job()
        self._waits_until: float | None = None
        self._key = os.path.realpath(self.path)
        if _HELD.get(self._key) == os.getpid():
            raise RunFolderError(f"Another run of this very process is in {folder}. {_ADVICE}")
        while not self._open(folder):
            pass
        _HELD[self._key] = os.getpid()
        self._last_beat = time.monotonic()

    def _open(self, folder: Path) -> bool:
        """Take the lock; False to try again: the file was deleted before we had locked it, or it is waited for."""
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            raise RunFolderError(f"The folder {folder} cannot be written: {reason(error)}") from error
        try:
            locked = self._lock()
            if locked and not self._has_name():
                os.close(self._file)
                return False
            if self._waits(_read(self._file), locked):
                os.close(self._file)
                time.sleep(_LOOK)
                return False
            self._take(folder, locked)
        except BaseException:
            os.close(self._file)
            raise
        return True

    def _has_name(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _is_of_this_job(self, holder: dict[str, Any]) -> bool:
        """Whether a lock is of an earlier start of this very job, whose ranks were all ended before this one."""
        job = self.job
        return job.again and job.name is not None and holder.get("job", job.began) == job.name

    def _waits(self, holder: dict[str, Any], locked: bool | None) -> bool:
        """Whether to look again later: an earlier start of this job cannot yet be known to be dead."""
        now = time.monotonic()
        if locked or not self._is_of_this_job(holder) or (locked is None and (not holder or self._age() >= STALE)):
            return False
        if self._waits_until is None:
            # one second more than it takes to become stale
            self._waits_until = now + STALE + 1.0
            warnings.warn(
                f"{self.path.parent} has the lock of an earlier start of this job (process "
                f"{holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}). From here it cannot be "
                f"seen whether that process lives; waiting for a sign of its end, {STALE:.0f} seconds at most.",
                stacklevel=5,
            )
        return now < self._waits_until

    def _take(self, folder: Path, locked: bool | None) -> None:
        holder = _read(self._file)
        dead = locked and (holder.get("host") == socket.gethostname() or self._is_of_this_job(holder))
        seen = None if locked is False or not holder or dead else self._age()
        if locked is False or (seen is not None and seen < STALE):
            who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
            if seen is None:
                raise RunFolderError(f"{folder} is in use by a run of {who}. {_ADVICE}")
            raise RunFolderError(
                f"{folder} was in use by a run of {who} {seen:.0f} seconds ago. {_ADVICE} From here it cannot be seen "
                f"whether that process lives; after {STALE:.0f} seconds without a sign of life it counts as dead."
            )
        try:
            os.ftruncate(self._file, 0)
            mine = {"pid": os.getpid(), "host": socket.gethostname()}
            mine |= {} if self.job.name is None else {"job": self.job.name}
            os.pwrite(self._file, json.dumps(mine).encode(), 0)
        except OSError as error:
            raise RunFolderError(f"{self.path} could not be written: {reason(error)}") from error

    def _lock(self) -> bool | None:
        """The system's lock: True: taken; False: another process has it; None: there are none on this file system."""
        if fcntl is None:
            return None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return None
        return True

    def _age(self) -> float:
        """Seconds since the holder's last sign of life, by the clock of the file system."""
        probe = self.path.with_name(f"{LOCK}.tmp{os.getpid()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - os.fstat(self._file).st_mtime
        except OSError as error:
            raise RunFolderError(f"The folder {self.path.parent} cannot be written: {reason(error)}") from error
        finally:
            discard(probe)

    def beat(self) -> None:
        """A sign of life, at most every ten seconds; cheap enough for every step."""
        now = time.monotonic()
        if now - self._last_beat > _BEAT:
            self._last_beat = now
            with suppress(OSError):  # no reason to lose a run
                os.utime(self._file)

    def release(self) -> None:
        """Let the folder go. In a forked child, which does not hold it, nothing happens."""
        if _HELD.get(self._key) != os.getpid():
            return
        del _HELD[self._key]
        if fcntl is None:  # Windows deletes no open file
            os.close(self._file)
            discard(self.path)
        else:
            discard(self.path)
            os.close(self._file)


_ADVICE = "Two runs in one folder would overwrite each other: wait for it, stop it, or choose another folder."


def _read(file: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:  # a kill cut it short
        return {}
    return content if isinstance(content, dict) else {}
