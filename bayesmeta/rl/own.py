"""Environments of one's own on the command line: a family, or a function from a task to an environment, by its path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from functools import wraps
from typing import Any

from gymnasium.wrappers import TimeLimit

from bayesmeta.errors import OptionError
from bayesmeta.rl.envs.gym_family import GymFamily, kind_name


def is_path(name: str) -> bool:
    """Whether an environment's name is a path ``module:attribute``."""
    return ":" in name


def load(path: str) -> Any:
    """What stands under ``module:attribute``; modules of the working folder are found too.

    Raises:
        OptionError: when there is none, or its module cannot be imported.
    """
    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise OptionError(f"{path!r} was given as an environment; expected module:attribute, such as cart:make_env.")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:  # a console script does not look there by itself
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        raise OptionError(
            f"the module {name} of the environment {path} cannot be imported: {type(error).__name__}: {error}. Run "
            "from the folder that it stands in, or install it."
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise OptionError(f"there is no {part} in {name}, of which the environment {path} was to be made.")
        found = getattr(found, part)
    return found


def load_family(
    path: str,
    *,
    task_values: Sequence[float] | None = None,
    task_range: Sequence[float] | None = None,
    horizon: int | None = None,
) -> Any:
    """The family under a path.

    Args:
        path: ``module:attribute`` of a family (or a function without arguments that makes one), or of a function from a
            task to an environment, whose tasks must then be given.
        task_values: numbers, one for each task.
        task_range: two numbers: tasks are drawn uniformly between them.
        horizon: steps after which episodes of a function's environments are cut off; None leaves them as they are.

    Raises:
        OptionError: when it cannot be imported, is something else, or tasks or horizon are given to a family that has
            its own.
    """
    found = load(path)
    if _is_family(found):
        return _own_tasks(found, path, task_values, task_range, horizon)
    needed = _needed(found, path)
    if needed == 0:
        family = found()
        if not _is_family(family):
            raise OptionError(
                f"{path} takes no argument and gave {kind_name(family)}; expected a family, or a function that "
                "takes a task."
            )
        return _own_tasks(family, path, task_values, task_range, horizon)
    if (task_values is None) == (task_range is None):
        raise OptionError(
            f"{path} is a function from a task to an environment; give its tasks by either task_values (numbers) or "
            "task_range (two numbers to draw between)."
        )
    make = found if horizon is None else _limited(found, horizon)
    if task_range is not None:
        return GymFamily.uniform(make, *task_range, name=path)
    return GymFamily(make, list(task_values or ()), name=path)


def _limited(make: Any, horizon: int) -> Any:
    @wraps(make)  # whether it takes a render_mode is asked later
    def limited(*task: Any, **options: Any) -> Any:
        return TimeLimit(make(*task, **options), horizon)

    return limited


def _is_family(found: Any) -> bool:
    return not inspect.isclass(found) and hasattr(found, "sample_tasks") and hasattr(found, "vector")


def _own_tasks(family: Any, path: str, *given: Any) -> Any:
    for name, value in zip(("task_values", "task_range", "horizon"), given, strict=True):
        if value is not None:
            raise OptionError(f"{name}={value!r} was given, but {path} is a family, which has its own; leave it out.")
    return family


def _needed(found: Any, path: str) -> int:
    """Arguments that a function cannot do without: 0 or 1."""
    if callable(found):
        try:
            parameters = inspect.signature(found).parameters.values()
        except (TypeError, ValueError):
            parameters = None
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if parameters is not None:
            needed = [p for p in parameters if p.default is p.empty and p.kind in positional]
            forced = [p for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
            if len(needed) <= 1 and not forced:
                return len(needed)
    raise OptionError(
        f"{path} is {kind_name(found)}; expected a family of environments, a function without arguments that "
        "makes one, or a function from one task to a gymnasium environment."
    )
