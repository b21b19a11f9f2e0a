"""Parameters of a Pyro program kept in an ``nn.Module``; Pyro's global parameter store stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from bayesmeta.errors import ModelError


class ParamScope(nn.Module):
    """A private parameter store.

    Inside :meth:`open`, ``pyro.param`` statements read and write parameters of this module. Those of a
    ``PyroModule`` stay where they are (``PyroModule`` registers them again at each access).

    Args:
        owner: the program; its own ``nn.Module`` parameters are not registered twice.
    """

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self._owner = [owner] if isinstance(owner, nn.Module) else []  # in a list: not a submodule
        self._names: list[str] = []
        self._constraints: dict[str, Any] = {}
        self.values = nn.ParameterList()

    @contextmanager
    def open(self, discover: bool = False) -> Iterator[None]:
        """Swap the global store for this one.

        Args:
            discover: register parameters that the program creates. Without it a new one is an error: no optimizer
                would know of it.

        Raises:
            ModelError: when the program creates a parameter that was not there at its first run.
        """
        store = pyro.get_param_store()
        mine: dict[str, Any] = {
            "params": dict(zip(self._names, self.values, strict=True)),
            "constraints": dict(self._constraints),
        }
        with store.scope(mine) as state:
            yield
        known = set(self._names)
        owned = {id(p) for owner in self._owner for p in owner.parameters()}
        for name, value in state["params"].items():
            if name in known or id(value) in owned:
                continue
            if not discover:
                raise ModelError(
                    f"The program created the parameter {name!r} after its first run, so that no optimizer knows it. "
                    "Create all pyro.param statements on every run, whatever the data."
                )
            self._register(name, value, state["constraints"][name])

    def _register(self, name: str, value: Tensor, constraint: Any) -> None:
        self._names.append(name)
        self._constraints[name] = constraint
        self.values.append(nn.Parameter(value.detach().clone()))

    def copy_from(self, values: dict[str, Tensor]) -> None:
        """Copy unconstrained values of parameters of the same names into this store."""
        with torch.no_grad():
            for name, value in zip(self._names, self.values, strict=True):
                if name in values:
                    value.copy_(values[name])

    def constrained(self) -> dict[str, Tensor]:
        """The parameters of ``pyro.param`` statements in their own (constrained) space."""
        return {
            name: torch.distributions.transform_to(self._constraints[name])(value)
            for name, value in zip(self._names, self.values, strict=True)
        }
