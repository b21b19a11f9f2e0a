"""The commands of meta-reinforcement learning: ``bayesmeta rl train`` and ``bayesmeta rl evaluate``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

Env = Literal[
    "bandit",
    "gaussian-bandit",
    "mdp",
    "navigation",
    "sparse-navigation",
    "point-robot",
    "grid",
    "maze",
    "beam",
    "half-cheetah-direction",
    "half-cheetah-velocity",
]
MethodName = Literal[
    "rl2",
    "rl2-lstm",
    "snail",
    "maml",
    "maesn",
    "fomaml",
    "meta-sgd",
    "e-maml",
    "cavia",
    "joint",
    "pearl",
    "varibad",
    "distilled",
]


@dataclasses.dataclass
class Train:
    """Meta-train a policy on a family of environments; what is not given takes a default of environment and method."""

    env: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(get_args(Env)) + ",MODULE:ATTRIBUTE}")]
    """The family: bandits, random MDPs, points that look for a goal in the plane, a grid with a hidden goal, a maze
    seen from within, a beam to be steered, half-cheetahs (the extra mujoco). Or one of your own, MODULE:ATTRIBUTE: a
    family, or a function from a task to an environment of gymnasium."""

    out: Path
    """Folder for what is learned."""

    method: MethodName = "rl2"
    """rl2, rl2-lstm and snail remember the episodes of a trial; pearl and distilled have a belief over the task, and
    explore by draws from it; the others take policy-gradient steps. joint does not meta-learn."""

    horizon: int | None = None
    """Steps of an episode."""

    arms: int | None = None
    """Arms of a bandit."""

    data: str | None = None
    """Of beam: file of machines (.npz with responseH and responseV). By default a model that is built in."""

    plane: Literal["H", "V"] | None = None
    """Of beam: which plane of the file."""

    task_values: tuple[float, ...] | None = None
    """Of your own function from a task to an environment: its tasks."""

    task_range: tuple[float, float] | None = None
    """Instead: tasks are drawn between two numbers."""

    workers: bool = False
    """Run gymnasium's environments in a process each."""

    episodes: int | None = None
    """Episodes of a trial, for methods that remember."""

    tasks: int | None = None
    """Tasks at a time."""

    copies: int | None = None
    """Episodes of each task before and after a step, for methods that take steps."""

    units: int | None = None
    """Width of the memory, or of the two hidden layers."""

    iterations: int | None = None
    """Of training. Rates of methods that remember fall over them; the others may be resumed with more."""

    inner_steps: int | None = None
    """Policy-gradient steps on each task."""

    inner_lr: float | None = None
    """Their rate, or where learned rates begin."""

    seed: int = 0
    """Of tasks, first weights and actions."""

    validation_tasks: int = 100
    """Tasks that the learning curve is measured on."""

    validate_every: int | None = None
    """Iterations between two points of the learning curve; by default it has twenty."""

    checkpoint_every: int = 10
    """Iterations between checkpoints."""

    tensorboard: bool = False
    """Write curves for TensorBoard too, which must be installed."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch."""

    overwrite: bool = False
    """Replace a run that the folder holds."""

    resume: bool = False
    """Go on with the run that the folder holds."""

    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass
class EvaluateRL:
    """Score a trained policy on test tasks, episode by episode or step by step, beside optima and baselines."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The --out of rl train."""

    tasks: int = 400
    """Test tasks."""

    steps: int = 3
    """Gradient steps to go to, for methods that take them."""

    seed: int = 0
    """Of the test tasks and of what is random on them."""

    out: Path | None = None
    """File for the figures; by default evaluation.json in the folder."""

    video: Path | None = None
    """File for an animated GIF of three test tasks."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    threads: int = 1
    """CPU threads; 0 leaves the choice to torch."""


@dataclasses.dataclass
class RL:
    """Meta-reinforcement learning: rl train, rl evaluate."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Train, tyro.conf.subcommand("train")] | Annotated[EvaluateRL, tyro.conf.subcommand("evaluate")]
    ]

    @property
    def threads(self) -> int:
        """CPU threads that the command was given."""
        return self.command.threads

    @property
    def out(self) -> Path:
        """Where a checkpoint would be."""
        return self.command.out if isinstance(self.command, Train) else self.command.folder


def run(command: RL) -> None:
    """Run one of the commands."""
    options: dict[str, Any] = dataclasses.asdict(command.command)
    options.pop("threads")
    if isinstance(command.command, EvaluateRL):
        from bayesmeta.rl.evaluation import evaluate_folder

        evaluate_folder(options.pop("folder"), **options)
        return
    from bayesmeta.rl.command import train_setup
    from bayesmeta.rl.setups import Setup

    names = [field.name for field in dataclasses.fields(Setup)]
    setup = Setup(**{name: options.pop(name) for name in names})
    train_setup(setup, options.pop("out"), **options)
