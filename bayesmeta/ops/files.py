"""Files of tensors and plain values: written whole or not at all, checked by a checksum, read without running anything.

A file is the zip archive that ``torch.save`` writes, with a BLAKE2b checksum of all its bytes as the archive's comment,
so that ``torch.load`` and ``unzip`` read it as they read any other.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bayesmeta.errors import CheckpointError, RunFolderError

_SEAL = b"bayesmeta-blake2b:"
_DIGITS = 64
_COMMENT = len(_SEAL) + _DIGITS
#: The last record of a zip archive without a comment: its signature, and its size, which ends in the comment's length.
_END, _END_SIZE = b"PK\x05\x06", 22
_PIECE = 2**22


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write so that a reader sees the old file or the new one, never half of one, also after a loss of power.

    Raises:
        RunFolderError: when the folder cannot be written or the disk is full; the old file is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "w+b") as file:
            torch.save(content, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise RunFolderError(f"{path} could not be written: {reason(error)}") from error
    finally:  # also when a signal cuts it short
        discard(temporary)


def read_tensors(path: Path, *, map_location: torch.device | str = "cpu") -> Any:
    """Read with ``weights_only=True``: tensors and plain values, no code.

    A file without a checksum, as version 0.1.0 wrote them, is read unchecked.

    Raises:
        CheckpointError: when the file is missing, truncated, changed by a single bit, or holds anything else.
    """
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    try:
        with open(path, "rb") as file:
            _check_seal(file)
            file.seek(0)
            return torch.load(file, weights_only=True, map_location=map_location)
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the file's
        raise
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or ["no detail"])[0][:200]
        raise CheckpointError(
            f"{path} cannot be read; it is damaged or was not written by bayesmeta ({type(error).__name__}: {first})."
        ) from error


def reason(error: BaseException) -> str:
    """Why a file could not be written, with what to do about it where that is known."""
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    number = getattr(cause, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{cause}. Free some space; what was written before is as it was."
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{cause}. Choose a folder that you may write to."
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def discard(path: Path) -> None:
    """Delete a file that is in the way, if it is there and can be; where it cannot, another error has said why."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _seal(file: BinaryIO) -> None:
    """Append the checksum as the comment of the archive."""
    size = file.seek(0, os.SEEK_END)
    file.seek(size - _END_SIZE)
    last = file.read(_END_SIZE)
    if last[:4] != _END or last[-2:] != b"\0\0":
        raise RuntimeError("torch.save did not write a zip archive as it used to")
    file.seek(size - 2)
    file.write(_COMMENT.to_bytes(2, "little") + _SEAL)
    file.write(_digest(file, size + len(_SEAL)))


def _check_seal(file: BinaryIO) -> None:
    """Compare the checksum.

    Raises:
        ValueError: for another one, and for a file that neither has one nor ends as ``torch.save`` leaves it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_SIZE - _COMMENT))
    tail = file.read()
    if tail[:4] == _END and tail[_END_SIZE : _END_SIZE + len(_SEAL)] == _SEAL:
        if _digest(file, size - _DIGITS) != tail[-_DIGITS:]:
            raise ValueError("its checksum is wrong")
    elif tail[-_END_SIZE:][:4] != _END or tail[-2:] != b"\0\0":
        raise ValueError("its end is missing")


def _digest(file: BinaryIO, size: int) -> bytes:
    file.seek(0)
    total = hashlib.blake2b(digest_size=_DIGITS // 2)
    while size > 0:
        piece = file.read(min(_PIECE, size))
        if not piece:
            raise ValueError("it ends too early")
        total.update(piece)
        size -= len(piece)
    return total.hexdigest().encode()
