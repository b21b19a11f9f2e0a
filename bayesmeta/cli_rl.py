"""The commands of meta-reinforcement learning: ``bayesmeta rl train`` and ``bayesmeta rl evaluate``."""

from __future__ import annotations

import dataclasses
import re
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

    out: Path
    """Folder for what is learned."""

    env: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(get_args(Env)) + ",MODULE:ATTRIBUTE}")] = None
    """The family, which a new run needs: bandits, random MDPs, points that look for a goal in the plane, a grid with a
    hidden goal, a maze seen from within, a beam to be steered, half-cheetahs (the extra mujoco). Or one of your own,
    MODULE:ATTRIBUTE: a family, or a function from a task to an environment of gymnasium."""

    method: MethodName | None = None
    """By default rl2. rl2, rl2-lstm and snail remember the episodes of a trial; varibad acts on a belief over the task;
    pearl and distilled have one too, and explore by draws from it; the others take policy-gradient steps, maesn on
    where its latents come from. joint does not meta-learn."""

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

    seed: int | None = None
    """Of tasks, first weights and actions; by default 0."""

    validation_tasks: int | None = None
    """Tasks that the learning curve is measured on; by default 100."""

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
    """Go on with the run that the folder holds. What is not given is as it was; what is given must be."""

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


#: What the library tells a program to do, as one does it on the command line.
_SAYINGS = (
    (r"leave render_mode out", "leave --video out"),
    (r"take PPO or TRPO", "take --method rl2"),
    (r"Give its vector environment a horizon \(", "Give --horizon, or a limit in the environment ("),
    (r"Install it, or ask for no pictures", "Install it, or leave --video out"),
    (r"\b(\w+)=True\b", lambda m: _option(m[1]) or m[0]),
    (r"\b(\w+)=(\([^()]*\)|'[^']*'|[-\w.+]+)", lambda m: f"{_option(m[1])} {_value(m[2])}" if _option(m[1]) else m[0]),
    (r"\b(\w+)=(?=[,. ])", lambda m: _option(m[1]) or m[0]),
    (r"\b(\w+_\w+)\b(?= \(| is | must )", lambda m: _option(m[1]) or m[0]),
)


def _option(name: str) -> str:
    """A field's name as an option; of what is no field, nothing."""
    known = {field.name for kind in (Train, EvaluateRL) for field in dataclasses.fields(kind)}
    return "--" + name.replace("_", "-") if name in known else ""


def _value(text: str) -> str:
    return text.strip("(),'").replace(",", "")


def as_options(message: str) -> str:
    """A message of the library with its arguments as the command line names them."""
    for pattern, option in _SAYINGS:
        message = re.sub(pattern, option, message)
    return message


def run(command: RL) -> None:
    """Run one of the commands; errors name options as they are given here."""
    from bayesmeta.errors import BayesMetaError

    try:
        _run(command)
    except BayesMetaError as error:
        error.args = (as_options(str(error)), *error.args[1:])
        raise


def _run(command: RL) -> None:
    options: dict[str, Any] = dataclasses.asdict(command.command)
    options.pop("threads")
    if isinstance(command.command, EvaluateRL):
        from bayesmeta.rl.evaluation import evaluate_folder

        evaluate_folder(options.pop("folder"), **options)
        return
    from bayesmeta.rl.command import setup_of, train_setup
    from bayesmeta.rl.setups import Setup

    names = [field.name for field in dataclasses.fields(Setup)]
    out = options.pop("out")
    setup = setup_of({name: options.pop(name) for name in names}, out, resume=options["resume"])
    train_setup(setup, out, **options)
