"""What a Pyro program is given: Observations as ``(x, y, mask)`` with w by name, as far as the program takes them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, ModelError, OptionError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def as_arguments(observations: Observations, programs: Sequence[Any] = ()) -> Arguments:
    """Arguments of a program: ``(x, y, mask)``, and w by name where there is one.

    A mask that hides nothing is left out for a program that has no argument for it, and so is w, as in a
    :class:`~bayesmeta.TaskProgram`. A mask may be an argument by keyword alone.

    Args:
        observations: of all tasks.
        programs: model and guide, which are all given the same.

    Raises:
        ModelError: for a program that takes other arguments, or no mask where there is padding.
    """
    x, y, mask, w = observations.x, observations.y, observations.mask, observations.w
    signatures = [found for program in programs if (found := _signature(program)) is not None]
    extra = [{"w": w}, {}] if w is not None else [{}]
    choices: list[Arguments] = []
    for named in extra:
        choices += [((x, y, mask), named), ((x, y), {"mask": mask, **named}), ((x, y), named)]
    hidden = 0
    for args, kwargs in choices:
        if all(_takes(signature, args, kwargs) for signature in signatures):
            has_mask = len(args) == 3 or "mask" in kwargs
            hidden = 0 if has_mask or mask is None else int((~mask).sum())  # asked of the device here alone
            if not hidden:
                return args, kwargs
    raise ModelError(_refusal(observations, programs, hidden))


def as_observations(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observations:
    """The inverse of :func:`as_arguments`.

    Raises:
        OptionError: for other arguments.
    """
    try:
        return Observations(*args, **kwargs)
    except (TypeError, DataError) as error:
        raise OptionError(
            f"A guide that keeps parameters for each task needs (x, y, mask, w) to tell tasks apart: {error} Give the "
            "model these arguments. Or, where its plate 'tasks' is not of bayesmeta's tasks, give the plate another "
            "name: no account is then kept of which tasks a step is given, as in pyro.infer.SVI."
        ) from error


def _signature(program: Any) -> inspect.Signature | None:
    """None for what has no signature in Python."""
    try:
        return inspect.signature(program.forward if isinstance(program, nn.Module) else program)
    except (TypeError, ValueError):
        return None


def _takes(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a program can be called so, and the third argument by place is not its w."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return len(args) < 3 or not ("w" in bound.arguments and bound.arguments["w"] is args[2] and "w" not in kwargs)


def _refusal(observations: Observations, programs: Sequence[Any], masked: int) -> str:
    said = []
    for program in programs:
        signature = _signature(program)
        name = getattr(program, "__name__", type(program).__name__)
        said.append(f"{name}({', '.join(map(str, signature.parameters.values()))})" if signature is not None else name)
    given = "(x, y, mask)" if observations.w is None else "(x, y, mask, w=…)"
    hidden = f", of which the mask hides {masked} observations" if masked else ""
    return (
        f"Observations stand for {given}{hidden}; model and guide are {' and '.join(said)}. Both must take "
        "(x, y=None, mask=None), and w=None where there are covariates; mask goes to bayesmeta.shot_plate(x, mask), "
        "and may be missing where nothing is padded. Or give step the program's own arguments instead."
    )
