"""The command line. The only place that imports everything, and that only when a command runs."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bayesmeta import cli_rl


@dataclasses.dataclass
class Fit:
    """Learn from the tasks of a CSV file: one row an observation, a column that says which task it belongs to."""

    csv: Annotated[Path, tyro.conf.Positional]
    """The file; its first line names the columns."""

    task: str
    """Column that says which task a row belongs to."""

    y: tuple[str, ...]
    """Target column, or several."""

    out: Path
    """Folder for what is learned."""

    x: tuple[str, ...] = ()
    """Input columns: numbers."""

    categorical: tuple[str, ...] = ()
    """Input columns of categories; also those of --w that hold categories."""

    w: tuple[str, ...] = ()
    """Columns that are constant within a task and say how its parameters lie: p(φ | θ, w)."""

    exposure: str | None = None
    """Positive column that counts are per: hours, inhabitants."""

    missing: Literal["error", "drop", "mean"] = "error"
    """Missing inputs: refuse, leave such rows out, or take the mean and an indicator column."""

    order: Literal["first", "random", "mixed"] | None = None
    """Which rows of a task are seen: the first (forecasts), some at random, or both kinds. By default the first if
    --order-by is given, else at random."""

    order_by: str | None = None
    """Column by which rows are sorted within a task: numbers, or dates such as 2020-01-31."""

    support: int = 5
    """Rows of a task that are seen, at most."""

    method: str | None = None
    """See bayesmeta methods. By default the exact last layer for real targets, else ABML."""

    likelihood: str | None = None
    """gaussian, heteroscedastic, student-t; poisson, negative-binomial for counts; categorical, bernoulli for
    classes. By default gaussian, or categorical where the target is text."""

    prior: str | None = None
    """Of the task parameters: point, normal, laplace, … By default what the method needs."""

    hidden: tuple[int, ...] = (32, 32)
    """Widths of the network's hidden layers."""

    steps: int = 1000
    """Training steps, at most: it stops when the validation tasks no longer gain."""

    tasks_per_step: int | None = None
    """Tasks of a step, of each rank under torchrun. By default 16; of several ranks fewer, where there are not as many
    different tasks for all."""

    chunk: int | None = None
    """Most tasks of a step to work on at a time: less memory, the same result up to rounding."""

    memory: str | None = None
    """Most memory for the tensors of a step, such as 500MiB or 2GiB: picks --chunk."""

    precision: Literal["float32", "bf16", "tf32"] = "float32"
    """Of the network's matrix products: bf16 and (on CUDA) tf32 are faster on devices made for them."""

    validation: float = 0.2
    """Share of the tasks that choose when to stop."""

    holdout: float = 0.0
    """Share of the tasks that are left alone, for bayesmeta evaluate on the same file."""

    seed: int = 0
    """Of the split into tasks, the first weights and the training draws."""

    separator: str = ","
    """What stands between two cells."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch. One is fastest for a model this small."""

    compile: Literal["off", "auto", "inductor", "cudagraphs"] = "off"
    """Steps as compiled graphs: auto, if the run is long enough to win back the time that compiling takes; inductor,
    from the second step on; cudagraphs, on CUDA: recorded, not compiled."""

    checkpoint_every: int = 100
    """Steps between checkpoints: what a run that is killed may lose. Ctrl-C and SIGTERM save first and lose none."""

    overwrite: bool = False
    """Replace a run that the folder holds."""

    resume: bool = False
    """Go on with the run that the folder holds."""

    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass
class Profile(Fit):
    """Measure where the time and memory of a training step go, for fit with the same options; nothing is trained."""

    csv: Annotated[Path | None, tyro.conf.Positional] = None  # type: ignore[assignment]  # or else a family
    """The file; its first line names the columns. None with --family."""

    task: str | None = None  # type: ignore[assignment]
    """Column that says which task a row belongs to."""

    y: tuple[str, ...] = ()
    """Target column, or several."""

    out: Path | None = None  # type: ignore[assignment]  # no folder here
    """File for the figures, as JSON."""

    steps: int = 20
    """Steps to time; about three times as many are made in all."""

    family: Literal["sinusoid", "sine-or-line", "gp"] | None = None
    """Instead of a CSV file: tasks of a built-in family."""

    compile: Literal["off", "inductor", "cudagraphs"] = "off"  # it measures, auto decides
    """inductor, or cudagraphs on CUDA: measure such steps too, and what compiling takes: a minute or so."""

    trace: Path | None = None
    """File for the trace, which Perfetto (ui.perfetto.dev) or chrome://tracing shows."""

    checkpoint_every: tyro.conf.Suppress[int] = 100
    overwrite: tyro.conf.Suppress[bool] = False
    resume: tyro.conf.Suppress[bool] = False
    progress: tyro.conf.Suppress[bool] = True


@dataclasses.dataclass
class Evaluate:
    """Score what was learned on the tasks of a CSV file, beside a pooled line and a line for each task."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The --out of fit."""

    csv: Annotated[Path, tyro.conf.Positional]
    """The file; tasks that were trained on are left out where it has others."""

    support: int | None = None
    """Rows of each task that are seen; by default as in training."""

    out: Path | None = None
    """File for the scores; by default scores.json in the folder."""

    seed: int = 0
    """Of the choice of rows, where it is random."""

    separator: str | None = None
    """What stands between two cells; by default as in training."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch."""


@dataclasses.dataclass
class Predict:
    """Forecast the rows of a CSV file that lack their target, each from the rows of its task that have one."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The --out of fit."""

    csv: Annotated[Path, tyro.conf.Positional]
    """The file. Its tasks need not be those of the training."""

    quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)
    """Quantiles of the forecast to write."""

    out: Path | None = None
    """The file to write; by default predictions.csv in the folder."""

    seed: int = 0
    """Of draws, where there is no closed form."""

    separator: str | None = None
    """What stands between two cells; by default as in training."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch."""


@dataclasses.dataclass
class Report:
    """Write one HTML page on a run of fit or demo: scores, calibration, forecasts, and warnings in plain words."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The --out of fit or demo."""

    csv: Annotated[Path | None, tyro.conf.Positional] = None
    """Of fit: the file of tasks to judge by; by default the one that was trained on, less its training tasks."""

    out: Path | None = None
    """The page; by default report.html in the folder."""

    support: int | None = None
    """Of fit: rows of each task that are seen; by default as in training."""

    seed: int = 0
    """Of fit: of the choice of rows, where it is random, and of draws."""

    separator: str | None = None
    """Of fit: what stands between two cells; by default as in training."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch."""


@dataclasses.dataclass
class Methods:
    """A table of the methods: what each assumes, its posterior, its cost, its source."""


@dataclasses.dataclass
class Demo:
    """Meta-train on the fertility rates of 132 countries, forecast 60 others from ten years, compare with baselines."""

    out: Path = Path("runs/demo")
    """Folder for the checkpoint, configuration, metrics, posterior and picture."""

    steps: int = 200
    """Meta-training steps, after principal curves and EM."""

    seed: int = 0
    """Of the split into countries, the first weights and the training draws."""

    overwrite: bool = False
    """Replace a run that the folder holds."""

    resume: bool = False
    """Go on with the run that the folder holds."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch. One is fastest for a model this small."""

    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass
class Version:
    """Print the version."""


Command = Fit | Profile | Evaluate | Predict | Report | Methods | Demo | Version | cli_rl.RL


def _run(command: Command) -> None:
    if isinstance(command, Version):
        from bayesmeta import __version__

        print(__version__)
        return
    if isinstance(command, Methods):
        from bayesmeta.tabular.methods import methods_table

        print(methods_table())
        return
    if isinstance(command, cli_rl.RL):
        cli_rl.refuse_what_is_there(command)
        if command.threads is not None:
            _refuse_ranks("rl")
            _set_threads(command.threads)
        cli_rl.run(command)
        return
    options = dataclasses.asdict(command)
    _set_threads(options.pop("threads"))
    if type(command) not in (Fit, Evaluate):
        _refuse_ranks(type(command).__name__.lower())
    _function(command)(**options)


def _refuse_ranks(name: str) -> None:
    """Commands of one process would overwrite each other's files."""
    from bayesmeta.errors import OptionError
    from bayesmeta.train.distributed import count_ranks

    if count_ranks() > 1:
        raise OptionError(f"bayesmeta {name} is for one process; fit and evaluate share their work under torchrun.")


def _set_threads(threads: int) -> None:
    import torch

    if threads < 0:
        from bayesmeta.errors import OptionError

        raise OptionError(f"threads must be at least 0; got {threads}.")
    if threads > 0:
        torch.set_num_threads(threads)


def _function(command: Command) -> Any:
    if isinstance(command, Profile):
        return _profile
    if isinstance(command, Fit):
        from bayesmeta.tabular.fit import fit_csv

        return fit_csv
    if isinstance(command, Evaluate):
        from bayesmeta.tabular.evaluate import evaluate_csv

        return evaluate_csv
    if isinstance(command, Predict):
        from bayesmeta.tabular.predict import predict_csv

        return predict_csv
    if isinstance(command, Report):
        return _report
    from bayesmeta.demo.run import run_demo

    return run_demo


def _profile(*, checkpoint_every: int, overwrite: bool, resume: bool, progress: bool, **options: Any) -> None:
    """A profile has no folder, and so none of fit's options for one."""
    from bayesmeta.tabular.profile import profile_csv

    profile_csv(**options)


def _report(folder: Path, csv: Path | None, **options: Any) -> None:
    """The report of a folder, by whoever left it."""
    from bayesmeta.report.folder import kind_of

    if kind_of(folder) == "tabular":
        from bayesmeta.tabular.report import report_csv

        report_csv(folder, csv, **options)
        return
    from bayesmeta.demo.report import report_demo
    from bayesmeta.errors import OptionError

    if csv is not None or options["support"] is not None or options["seed"] or options["separator"] is not None:
        raise OptionError(
            f"{folder} holds a demo, which brings its own tasks: it takes no CSV, --support, --seed or --separator."
        )
    report_demo(folder, out=options["out"], device=options["device"])


#: How the library's own words for its arguments are said on the command line.
_OPTIONS = (
    (r"categorical=\[([^\]]*)\]", lambda m: "--categorical " + re.sub(r"[',]", "", m[1])),
    (r"missing='(\w+)'", r"--missing \1"),
    (r"separator=('[^']*')", r"--separator \1"),
    (r"target='real'", "--likelihood gaussian"),
    (r"target='count'", "--likelihood poisson"),
    (r"target='class'", "--likelihood categorical"),
    (r"order='(\w+)'", r"--order \1"),
    (r"\b(tasks_per_step|checkpoint_every) ?= ?(\d+)", lambda m: f"--{m[1].replace('_', '-')} {m[2]}"),
    (r"\b(tasks_per_step|checkpoint_every)\b", lambda m: "--" + m[1].replace("_", "-")),
    (r"\bchunk=(\d+)", r"--chunk \1"),
    (r"\b(memory|precision|compile)='([\w.]+)'", r"--\1 \2"),
    (r"\bresume=True", "--resume"),
    (r"\boverwrite=True", "--overwrite"),
    (r"\b[Gg]o on with resume\b", "go on with --resume"),
    (r"(?:finite )?numbers of torch\.float(32|64)", "finite numbers"),
)


def _as_options(message: str) -> str:
    """A message of the library with its arguments as the command line names them."""
    for pattern, option in _OPTIONS:
        message = re.sub(pattern, option, message)
    return message


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``bayesmeta``. Typed errors are printed without a traceback and exit with status 2."""
    commands = (
        Annotated[Fit, tyro.conf.subcommand("fit")]
        | Annotated[Profile, tyro.conf.subcommand("profile")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Methods, tyro.conf.subcommand("methods")]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Version, tyro.conf.subcommand("version")]
        | Annotated[cli_rl.RL, tyro.conf.subcommand("rl")]
    )
    command = tyro.cli(
        commands, args=arguments, prog="bayesmeta", description="Bayesian meta-learning on Pyro and PyTorch."
    )
    from bayesmeta.errors import BayesMetaError, RankError

    try:
        _run(command)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough; what Python still holds goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BayesMetaError as error:
        # what another rank says itself, the first one alone repeats
        if not isinstance(error, RankError) or os.environ.get("RANK", "0") == "0":
            print(f"bayesmeta: {_as_options(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        _say_stopped("interrupted", command, str(error))
        sys.exit(130)
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:
            _say_stopped("stopped by SIGTERM", command, " ".join(getattr(error, "__notes__", [])))
        raise


def _say_stopped(how: str, command: Command, said: str) -> None:
    """What a run that was stopped has kept, on standard error; rank 0 speaks for all.

    Args:
        how: it was stopped.
        command: the run.
        said: by ``fit``, if it was in its steps.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    what = f"; {_kept(command)}"
    if re.match("Training was stopped (after step|after iteration|within)", said):
        what = " " + _as_options(said.removeprefix("Training was stopped ").rstrip("."))
    print(f"bayesmeta: {how}{what}", file=sys.stderr)


def _kept(command: Command) -> str:
    """What a folder has of a run, in words."""
    if isinstance(command, Profile) or not isinstance(command, Fit | Demo | cli_rl.RL) or command.out is None:
        return "nothing was kept"
    from bayesmeta.errors import BayesMetaError
    from bayesmeta.train import checkpoint

    path = command.out / "checkpoint.pt"
    if not path.exists():
        return "there is no checkpoint yet"
    try:
        step = checkpoint.load(path)["step"]
    except (BayesMetaError, KeyError):
        return f"what {path} holds cannot be read"
    return f"the checkpoint of step {step} is kept: go on with --resume"


if __name__ == "__main__":
    main()
