"""Reading a CSV file, with errors for people."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bayesmeta.errors import DataError, EmptyTaskError, OptionError
from bayesmeta.tasks.frames import check_columns

if TYPE_CHECKING:
    import pandas as pd


def read_csv(
    path: str | Path, *, columns: Sequence[str] | None = None, separator: str = ",", text: bool = False
) -> pd.DataFrame:
    """A CSV file as a DataFrame, its first line the names of the columns.

    Cells that are empty, or hold NA, NaN, null or None, are missing. Unlike ``pandas.read_csv``, a name that stands
    twice in the first line stays as it is, so that it can be refused.

    Args:
        path: the file, in UTF-8; compressed ones (``.gz`` and the like) are read too.
        columns: keep these alone; None for all.
        separator: what stands between two cells.
        text: leave every cell as the text that it is.

    Raises:
        DataError: for a file that is not there, cannot be read, is no such table, or lacks a column or has it twice.
        EmptyTaskError: for a file without a row.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise DataError(f"The file {path} {what}; expected a CSV file whose first line names the columns.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a row longer than the first line would lose cells with a mere warning
            options = {"sep": _separator(separator), "encoding": "utf-8-sig", "index_col": False}
            header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False, **options)  # type: ignore[call-overload]
            names = header.iloc[0].tolist()
            _check_header(path, names, columns, separator)
            # All columns are read: with usecols, pandas would let a row with a stray separator shift its cells.
            as_is = {"dtype": str, "keep_default_na": False} if text else {"low_memory": False}
            frame = pd.read_csv(path, header=0, **as_is, **options)  # type: ignore[call-overload]
    except (DataError, OptionError):
        raise
    except pd.errors.EmptyDataError as error:
        raise EmptyTaskError(f"The file {path} is empty; expected a CSV file with a line of column names.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"The file {path} is not text in UTF-8 ({error.reason}); save it as CSV in UTF-8.") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError, OSError) as error:
        raise DataError(f"The file {path} cannot be read as CSV with separator {separator!r}: {error}") from error
    frame.columns = pd.Index(names)
    if columns is not None:
        frame = frame[list(columns)]
    if len(frame) == 0:
        raise EmptyTaskError(f"The file {path} has a line of column names but no row; expected at least one.")
    return frame


def _separator(text: str) -> str:
    """One character; a tab may be written as such, as ``\\t`` or as ``tab``.

    Raises:
        OptionError: for anything else.
    """
    mark = "\t" if text in ("\\t", "tab") else text
    if len(mark) != 1:
        raise OptionError(f"separator={text!r}; expected one character, such as ';', or tab.")
    return mark


def _check_header(path: Path, names: list[str], columns: Sequence[str] | None, separator: str) -> None:
    mark = next((mark for mark in (";", "\t", "|", ",") if len(names) == 1 and mark in names[0]), None)
    if mark is not None:
        raise DataError(
            f"The file {path} has one column, {names[0]!r}: its cells seem to be separated by {mark!r} rather than by "
            f"{separator!r}; say so (separator={mark!r})."
        )
    if columns is not None:
        check_columns(names, columns)
