"""What a run of the command line can be told: environments, methods and settings by name. No torch is needed for it.

:class:`Settings` is read twice: the command line makes its options of it, and :class:`bayesmeta.rl.setups.Setup` adds
what they mean. An environment or a method has its words here, and its making in :mod:`bayesmeta.rl.setups`.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Annotated, Literal

import tyro
from typing_extensions import Doc

#: Environments by their names, and what a task of each is.
ENV_TEXTS: dict[str, str] = {
    "bandit": "arms that pay 0 or 1, with chances that are not known",
    "gaussian-bandit": "arms that pay a noisy number around a mean that is not known",
    "mdp": "random transitions and rewards between ten states",
    "navigation": "a point in the plane and a goal; −distance² in each step",
    "sparse-navigation": "the same, with a reward near the goal alone",
    "point-robot": "a point and a goal on a half-circle; a reward near the goal alone",
    "grid": "5 × 5 cells and a goal cell that is not seen",
    "maze": "walls and a target, seen from within as a small picture",
    "beam": "a beam to be steered by magnets whose response is not known",
    "half-cheetah-direction": "a cheetah that is to run forwards or backwards; needs the extra mujoco",
    "half-cheetah-velocity": "a cheetah that is to run at a speed; needs the extra mujoco",
}
#: Of which actions are continuous numbers; those of the others are a choice.
CONTINUOUS = (
    "navigation",
    "sparse-navigation",
    "point-robot",
    "beam",
    "half-cheetah-direction",
    "half-cheetah-velocity",
)
#: Methods by their names, and what they are.
METHODS: dict[str, str] = {
    "rl2": "RL²: a GRU that remembers its trial (Duan et al. 2016)",
    "rl2-lstm": "RL² with an LSTM",
    "snail": "SNAIL: attention and temporal convolutions (Mishra et al. 2018)",
    "maml": "MAML-RL: policy-gradient steps (Finn et al. 2017)",
    "fomaml": "MAML-RL without second derivatives",
    "meta-sgd": "MAML-RL with learned rates (Li et al. 2017)",
    "e-maml": "MAML-RL with credit for exploration (Stadie et al. 2018)",
    "cavia": "CAVIA: steps on a context alone (Zintgraf et al. 2019)",
    "joint": "one policy for all tasks, which takes policy-gradient steps on new ones: no meta-learning",
    "pearl": "PEARL: soft actor-critic beside a latent, posterior sampling (Rakelly et al. 2019)",
    "varibad": "VariBAD: a belief over the task at every step, and PPO on it (Zintgraf et al. 2020)",
    "distilled": "a latent for each training task, and a belief distilled onto them; posterior sampling",
    "maesn": "MAESN: a latent for each episode, and policy-gradient steps on where latents come from "
    "(Gupta et al. 2018)",
}
#: Methods that need continuous actions.
NEED_CONTINUOUS = ("pearl", "distilled")
#: Methods that can be told what their beliefs must foretell.
DECODING = ("pearl", "varibad")
#: Methods that take gradient steps on a task's episodes; the others adapt from episode to episode of a trial.
STEPPING = ("maml", "fomaml", "meta-sgd", "e-maml", "cavia", "joint", "maesn")
#: Methods that may go on with more iterations; rates of the others fall over them.
LONGER = (*STEPPING, "pearl")

_SEE = "(default: see --dry-run)"
_Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_SEE)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained on what; None is not given."""

    env: Annotated[
        str | None,
        tyro.conf.arg(metavar="{" + ",".join(ENV_TEXTS) + ",MODULE:ATTRIBUTE}", help_behavior_hint="(a new run needs)"),
        Doc(
            "The family of environments, see bayesmeta rl list. Or one of your own, MODULE:ATTRIBUTE: a family, or a "
            "function from a task to an environment of gymnasium."
        ),
    ] = None
    method: Annotated[
        str | None,
        tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}", help_behavior_hint="(default: rl2)"),
        Doc(
            "How to learn, see bayesmeta rl list: by a memory of the trial, a belief over the task, or policy-gradient "
            "steps."
        ),
    ] = None
    horizon: Annotated[_Count, Doc("Steps of an episode.")] = None
    arms: Annotated[_Count, Doc("Arms of a bandit.")] = None
    data: Annotated[
        str | None,
        tyro.conf.arg(metavar="FILE", help_behavior_hint=""),
        Doc("Of beam: file of machines (.npz with responseH and responseV). By default a built-in model."),
    ] = None
    plane: Annotated[
        Literal["H", "V"] | None,
        tyro.conf.arg(metavar="{H,V}", help_behavior_hint=""),
        Doc("Of beam: which plane of the file; by default H."),
    ] = None
    task_values: Annotated[
        tuple[float, ...] | None,
        tyro.conf.arg(metavar="FLOAT [FLOAT ...]", help_behavior_hint=""),
        Doc("Of your own function from a task to an environment: its tasks."),
    ] = None
    task_range: Annotated[
        tuple[float, float] | None,
        tyro.conf.arg(metavar="FLOAT FLOAT", help_behavior_hint=""),
        Doc("Of your own function from a task to an environment: two numbers between which its tasks are drawn."),
    ] = None
    workers: Annotated[bool, Doc("Run gymnasium's environments in a process each.")] = False
    episodes: Annotated[_Count, Doc("Episodes of a trial, for methods that remember it.")] = None
    tasks: Annotated[_Count, Doc("Tasks at a time.")] = None
    copies: Annotated[
        _Count, Doc("Episodes of each task before and after a gradient step, for methods that take steps.")
    ] = None
    units: Annotated[_Count, Doc("Width of the memory, or of the hidden layers.")] = None
    iterations: Annotated[
        _Count,
        Doc("Of training. Methods that take steps, and pearl, may go on with more; the others' rates fall over them."),
    ] = None
    inner_steps: Annotated[_Count, Doc("Policy-gradient steps on each task.")] = None
    inner_lr: Annotated[
        float | None,
        tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_SEE),
        Doc("Their rate, or where learned rates begin."),
    ] = None
    reconstruction: Annotated[
        Literal["reward", "transition"] | None,
        tyro.conf.arg(metavar="{reward,transition}", help_behavior_hint=_SEE),
        Doc(
            "Of pearl and varibad: what the belief must foretell: rewards alone, or next states too. By default "
            "nothing of pearl's, rewards of varibad's; in an environment of your own next states too."
        ),
    ] = None
    seed: Annotated[
        int | None,
        tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 0)"),
        Doc("Of tasks, first weights and actions."),
    ] = None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known name that is nearest to one that is not, as part of a message; nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def meanings() -> dict[str, str]:
    """What each setting means, by its name."""
    hints = typing.get_type_hints(Settings, include_extras=True)
    return {
        name: next(part.documentation for part in hint.__metadata__ if isinstance(part, Doc))
        for name, hint in hints.items()
    }


def listing() -> str:
    """All environments and methods, as text."""
    width = max(map(len, [*ENV_TEXTS, *METHODS]))
    lines = ["Environments (--env), and what a task is; * has continuous actions:"]
    lines += [f"  {n:{width}} {'*' if n in CONTINUOUS else ' '} {text}" for n, text in ENV_TEXTS.items()]
    lines += [
        f"  {'MODULE:ATTRIBUTE':{width}}   one of your own: a family, or a function from a task to an environment"
    ]
    lines += [
        "",
        "Methods (--method); * needs continuous actions, ∇ takes gradient steps, the others remember a trial:",
    ]
    marks = {n: "*" if n in NEED_CONTINUOUS else "∇" if n in STEPPING else " " for n in METHODS}
    lines += [f"  {n:{width}} {marks[n]} {text}" for n, text in METHODS.items()]
    lines += ["", "What a run would be: bayesmeta rl train --env ENV --method METHOD --dry-run"]
    return "\n".join(lines)
