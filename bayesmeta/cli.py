"""The command line. The only place that imports everything, and that only when a command runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated


@dataclasses.dataclass
class Demo:
    """Meta-train on the fertility rates of 132 countries, forecast 60 others from ten years, compare with baselines."""

    out: Path = Path("runs/demo")
    """Folder for the checkpoint, configuration, metrics, posterior and picture."""

    steps: int = 1500
    """Meta-training steps."""

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


def _run(command: Demo | Version) -> None:
    if isinstance(command, Version):
        from bayesmeta import __version__

        print(__version__)
        return
    import torch

    from bayesmeta.demo.run import run_demo

    options = dataclasses.asdict(command)
    threads = options.pop("threads")
    if threads < 0:
        from bayesmeta.errors import OptionError

        raise OptionError(f"threads must be at least 0; got {threads}.")
    if threads > 0:
        torch.set_num_threads(threads)
    run_demo(**options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``bayesmeta``. Typed errors are printed without a traceback and exit with status 2."""
    import tyro

    commands = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Version, tyro.conf.subcommand("version")]
    command = tyro.cli(
        commands, args=arguments, prog="bayesmeta", description="Bayesian meta-learning on Pyro and PyTorch."
    )
    from bayesmeta.errors import BayesMetaError

    try:
        _run(command)
    except BayesMetaError as error:
        print(f"bayesmeta: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = isinstance(command, Demo) and (command.out / "checkpoint.pt").exists()
        what = "the last checkpoint is kept (go on with --resume)" if kept else "nothing was written yet"
        print(f"bayesmeta: interrupted; {what}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
