"""What MetaSVI writes down of itself, so that another process goes on bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.errors import CheckpointError, SiteError


def owners(*sources: Any) -> dict[str, nn.Module]:
    """The modules behind model and guide: they themselves, or what they are methods of."""
    found: dict[str, Any] = {}
    for name, source in zip(("model", "guide"), sources, strict=True):
        owner = source if isinstance(source, nn.Module) else getattr(source, "__self__", None)
        if isinstance(owner, nn.Module) and all(owner is not other for other in found.values()):
            found[name] = owner
    return found


def own_store(store: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The store without the parameters of methods, which are announced there under names that no other process has."""
    methods = [module for module in modules.values() if hasattr(module, "adapt")]
    announced = {id(parameter) for method in methods for parameter in method.parameters()}
    return {name: value for name, value in store.items() if id(value) not in announced}


def module_tensors(store: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of modules that no ``pyro.param`` statement has put into the store, by name."""
    seen = {id(value) for value in store.values()}
    found: dict[str, Any] = {}
    for owner, module in modules.items():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{owner}.{name}"] = tensor
    return found


def names_of(groups: Iterable[Iterable[Tensor]], store: dict[str, Tensor], extra: dict[str, Tensor]) -> list[list[str]]:
    """Names of an optimizer's parameters, group by group; those of the store and those of modules are told apart."""
    names = {id(value): f"store:{name}" for name, value in store.items()}
    names |= {id(value): f"module:{name}" for name, value in extra.items()}
    return [[names[id(parameter)] for parameter in group] for group in groups]


def tensors_of(groups: list[list[str]], store: dict[str, Tensor], extra: dict[str, Tensor]) -> list[list[Tensor]]:
    """The inverse of :func:`names_of`.

    Raises:
        SiteError: for a parameter that is not here.
    """
    tensors = {f"store:{name}": value for name, value in store.items()}
    tensors |= {f"module:{name}": value for name, value in extra.items()}
    missing = [name for group in groups for name in group if name not in tensors]
    if missing:
        raise SiteError(f"The state's optimizer has the parameters {missing}, which are not here; use the same model.")
    return [[tensors[name] for name in group] for group in groups]


def copy_into(mine: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    """Copy values by name; nothing is copied unless all fit.

    Raises:
        SiteError: when they differ in names or shapes.
    """
    if set(mine) != set(theirs):
        raise SiteError(
            f"The state has the {what} {sorted(theirs)}; here are {sorted(mine)}. "
            "Call evaluate_loss once, so that they exist, and use the same model and guide."
        )
    for name, value in theirs.items():
        if mine[name].shape != value.shape:
            raise SiteError(
                f"{name!r} of the {what} is {list(value.shape)} in the state and {list(mine[name].shape)} here; use "
                "the same model, guide and tasks."
            )
    with torch.no_grad():
        for name, value in theirs.items():
            mine[name].copy_(value)


def make_optimizer(
    factory: Callable[[Iterable[Tensor]], torch.optim.Optimizer], groups: list[list[Tensor]], state: dict[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer with these groups, made in the order in which the parameters came, in a saved state.

    Raises:
        CheckpointError: when the state is of another optimizer.
    """
    optimizer = factory(groups[0])
    for group in groups[1:]:
        optimizer.add_param_group({"params": group})
    try:
        optimizer.load_state_dict(copy.deepcopy(state))  # else the two would share their moments
    except (ValueError, KeyError, RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"The state does not fit a {type(optimizer).__name__}: {error}") from error
    return optimizer


def generators() -> dict[str, Any]:
    """States of torch's global generators: of the CPU, and of each CUDA device where CUDA is in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_generators(states: dict[str, Any]) -> None:
    """Put torch's global generators into saved states.

    Raises:
        CheckpointError: when the state is of another number of CUDA devices.
    """
    if states["cuda"] and torch.cuda.device_count() != len(states["cuda"]):
        raise CheckpointError(
            f"The state has the generators of {len(states['cuda'])} CUDA device(s); there are "
            f"{torch.cuda.device_count()} here. Show it as many (CUDA_VISIBLE_DEVICES), or load with generators=False."
        )
    torch.set_rng_state(states["cpu"].cpu())
    for index, state in enumerate(states["cuda"]):
        torch.cuda.set_rng_state(state.cpu(), index)
