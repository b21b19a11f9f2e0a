"""What every benchmark shares: the command line, the rows and their bars, the table, the JSON file, the exit status.

A benchmark is a function from the parsed arguments to a list of :class:`Row`, handed to :func:`main`::

    def run(args):
        error = measure(args.seed, steps=100 if args.quick else 10_000)
        return [Row("error", ours=error, **at_most(0.36).judge(error))]

    if __name__ == "__main__":
        main("sinusoid", run)

The exit status is 1 when a row that has a bar falls short, and 0 otherwise; 2 is argparse's, for a bad command line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

NUMBERS = ("ours", "reference", "ratio", "difference", "standard_error", "seconds")
NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
REPOSITORY = Path(__file__).resolve().parent.parent

Settings = Mapping[str, Any] | Callable[[argparse.Namespace], Mapping[str, Any]] | None


# -- bars ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """An interval for a figure, made by :func:`at_most`, :func:`at_least`, :func:`below` or :func:`between`.

    Attributes:
        text: the bar as a person reads it, such as "≤ 0.36".
        low, high: the ends, which count as inside.
        open_above: whether ``high`` itself is outside.
    """

    text: str
    low: float = -math.inf
    high: float = math.inf
    open_above: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is inside. NaN and infinities never are: they are failed measurements."""
        value = float(value)
        if not math.isfinite(value):
            return False
        return self.low <= value and (value < self.high if self.open_above else value <= self.high)

    def judge(self, value: float) -> dict[str, Any]:
        """The ``bar`` and ``passes`` of a row whose figure is ``value``: ``Row(…, **at_most(3).judge(ratio))``."""
        return {"bar": self.text, "passes": self.holds(value)}


def at_most(limit: float) -> Bar:
    """The figure is ``limit`` or less."""
    return Bar(f"≤ {limit:g}", high=limit)


def at_least(limit: float) -> Bar:
    """The figure is ``limit`` or more."""
    return Bar(f"≥ {limit:g}", low=limit)


def below(limit: float) -> Bar:
    """The figure is less than ``limit``."""
    return Bar(f"< {limit:g}", high=limit, open_above=True)


def between(low: float, high: float) -> Bar:
    """The figure is in [low, high].

    Raises:
        ValueError: if the interval is empty.
    """
    if not low <= high:
        raise ValueError(f"between({low:g}, {high:g}) is empty: the first number must not be above the second.")
    return Bar(f"{low:g} … {high:g}", low=low, high=high)


# -- rows ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of a benchmark's result. What does not apply stays None.

    Attributes:
        name: lower case words joined by underscores.
        ours: our figure.
        reference: what it is held against: a peer's figure, a published one, an oracle's.
        ratio, difference: how the two compare; at most one of them.
        standard_error: of the ratio or the difference if there is one, else of ``ours``.
        seconds: wall time that the row took.
        bar: what the figure must meet, as text ("≤ 0.36").
        passes: whether it does. A row has both bar and passes, or neither.

    Raises:
        ValueError, TypeError: saying which attribute is wrong.
    """

    name: str
    ours: float | None
    reference: float | None = None
    ratio: float | None = None
    difference: float | None = None
    standard_error: float | None = None
    seconds: float | None = None
    bar: str | None = None
    passes: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(f"A row's name is lower case words joined by underscores; got {self.name!r}.")
        for attribute in NUMBERS:
            value = getattr(self, attribute)
            if value is not None:
                setattr(self, attribute, self._number(attribute, value))
        if self.ratio is not None and self.difference is not None:
            raise ValueError(f"Row {self.name} has a ratio and a difference; give the one that its bar is about.")
        for attribute in ("standard_error", "seconds"):
            if (getattr(self, attribute) or 0.0) < 0:
                raise ValueError(f"Row {self.name} has {attribute} {getattr(self, attribute)}; it cannot be negative.")
        if self.bar is not None and not isinstance(self.bar, str):
            raise TypeError(f"Row {self.name} has bar {self.bar!r}; give its text, or use **bar.judge(value).")
        if (self.bar is None) != (self.passes is None):
            raise ValueError(
                f"Row {self.name} needs both bar and passes, or neither; got {self.bar!r}, {self.passes!r}."
            )
        if self.passes is not None:
            if str(self.passes) not in ("True", "False"):  # bool, numpy.bool_
                raise TypeError(f"Row {self.name} has passes {self.passes!r}; expected True, False or None.")
            self.passes = bool(self.passes)

    def _number(self, attribute: str, value: Any) -> float:
        try:
            if isinstance(value, (str, bool)):
                raise TypeError
            return float(value)  # takes numpy scalars and tensors of one element too
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"Row {self.name} has {attribute} {value!r}; expected one number or None.") from None

    @property
    def falls_short(self) -> bool:
        """Whether there is a bar and it is missed."""
        return self.passes is False

    def as_dict(self) -> dict[str, Any]:
        """All attributes by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def check_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows as a list.

    Raises:
        TypeError, ValueError: when there are none, one is no :class:`Row`, or two have one name.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("The benchmark gave no rows; expected at least one.")
    for row in rows:
        if not isinstance(row, Row):
            raise TypeError(f"The benchmark gave {row!r} as a row; expected a Row.")
    twice = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"Several rows are named {', '.join(twice)}; names must differ.")
    return rows


# -- the machine --------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were measured on: CPU, memory, GPU, versions, the commit, the time and the load before."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": _ram_gib(),
        "gpu": gpu,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine() or None


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _commit() -> str | None:
    """Short hash of the checkout, with "-dirty" when tracked files differ from it; None outside of git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# -- output -------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value that strict JSON can hold: NaN and infinities become "nan", "inf", "-inf"; what is unknown, its text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
        return plain(value.tolist())
    return str(value)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON so that a reader sees the old file or the whole new one; makes the folders on the way."""
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's own mode would hide the file from other users
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text. Columns that no row fills are left out."""
    heads = {
        "name": "name", "ours": "ours", "reference": "reference", "ratio": "ratio", "difference": "difference",
        "standard_error": "std error", "seconds": "seconds", "bar": "bar", "passes": "passes",
    }  # fmt: skip
    columns = [c for c in heads if c in ("name", "ours") or any(getattr(row, c) is not None for row in rows)]
    lines = [[heads[c] for c in columns], *([_cell(c, getattr(row, c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["─" * width for width in widths])
    left = [c in ("name", "bar", "passes") for c in columns]
    return "\n".join(
        "  ".join(cell.ljust(w) if flush else cell.rjust(w) for cell, w, flush in zip(line, widths, left)).rstrip()
        for line in lines
    )


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of independent values, ``[n]``; None for one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if column == "passes":
        return "yes" if value else "NO"
    if column == "seconds":
        return f"{value:.1f}"
    if not isinstance(value, float):
        return str(value)
    digits = 2 if column == "standard_error" else 4
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


# -- the command --------------------------------------------------------------------------------------------------


def main(
    name: str,
    run: Callable[[argparse.Namespace], Sequence[Row]],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    settings: Settings = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run one benchmark as a command, and exit.

    Args:
        name: of the module, ``benchmarks.NAME``.
        run: measures, and gives the rows.
        add_arguments: adds the benchmark's own flags.
        settings: what else to record beside the flags: a mapping, or a function of the arguments that is called after
            ``run``, so that it may tell what was found out on the way.
        argv: arguments instead of the command line's.

    Raises:
        SystemExit: always; 1 when a row that has a bar falls short, 2 for a bad command line, else 0.
    """
    args = _parse(name, run, add_arguments, argv)
    where = machine()
    print(f"{name}{' (quick)' if args.quick else ''}, seed {args.seed}, on {where['cpu']}, torch {where['torch']}")
    sys.stdout.flush()
    rows = check_rows(run(args))
    where["threads"] = torch.get_num_threads()
    extra = settings(args) if callable(settings) else settings
    kept = {k: v for k, v in vars(args).items() if k != "json" and not k.startswith("_")} | dict(extra or {})
    print(table(rows))
    if args.json is not None:
        content = {"benchmark": name, "settings": kept, "machine": where, "rows": [row.as_dict() for row in rows]}
        write_json(args.json, content)
        print(f"written: {args.json}")
    short = [row.name for row in rows if row.falls_short]
    if short:
        print(f"{len(short)} of {sum(row.passes is not None for row in rows)} bars missed: {', '.join(short)}")
    sys.stdout.flush()
    sys.exit(1 if short else 0)


def _parse(
    name: str,
    run: Callable[..., Any],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None,
    argv: Sequence[str] | None,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=sys.modules[run.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a short run, with larger errors")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there too")
    if add_arguments is not None:
        add_arguments(parser)
    args = parser.parse_args(argv)
    if args.json is not None:
        if args.json.is_dir():
            parser.error(f"--json {args.json} is a folder; give the path of a file.")
        try:  # now, not after the measurements
            args.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--json {args.json}: its folder cannot be made ({error}).")
    return args
