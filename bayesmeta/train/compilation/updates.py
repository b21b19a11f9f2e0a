"""The updates of torch's SGD, Adam and AdamW as functions of tensors, so that a graph can hold them.

Written anew from the algorithms that torch's documentation states (``torch.optim.SGD``, ``Adam``, ``AdamW``); a test
holds them equal to ``optimizer.step()``. State and parameters stay those of the torch optimizer, so that its
``state_dict`` and its schedules work as ever. Rates and decay rates of moments are read from its ``param_groups`` at
each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: options that a schedule may change from step to step
_MOVING = {torch.optim.SGD: ("lr", "momentum"), torch.optim.Adam: ("lr", "betas"), torch.optim.AdamW: ("lr", "betas")}
#: options that the formulas here do not have
_UNUSUAL = ("amsgrad", "maximize", "differentiable")


class Update:
    """One step of an optimizer as a function.

    Args:
        optimizer: of one of the three kinds, which has taken a step already, so that its state exists.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.moving = _MOVING[type(optimizer)]
        device = optimizer.param_groups[0]["params"][0].device
        if device.type != "cpu":  # torch counts steps on the CPU, and takes a count that is elsewhere as well
            for state in optimizer.state.values():
                state.update({name: t.to(device) for name, t in state.items() if name == "step"})
        #: the options that may change, one vector a group; inputs of the graph
        self.options = [torch.tensor(self._values(g), dtype=torch.float64, device=device) for g in self._groups()]
        self._last = [self._values(group) for group in self._groups()]
        self._fixed = self._unmoving()
        self._of = optimizer.state  # loading a state makes another

    @staticmethod
    def serves(optimizer: torch.optim.Optimizer) -> bool:
        """Whether the formulas here are those of the optimizer."""
        return type(optimizer) in _MOVING and not any(
            group.get(name) or isinstance(group["lr"], Tensor) for group in optimizer.param_groups for name in _UNUSUAL
        )

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _values(self, group: dict[str, Any]) -> list[float]:
        values = [group[name] for name in self.moving]
        return [float(v) for value in values for v in (value if isinstance(value, tuple | list) else [value])]

    def _unmoving(self) -> list[dict[str, Any]]:
        left_out = {"params", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", *self.moving}
        return [
            # SGD makes its buffers, and takes its first step, otherwise where there is no momentum
            {k: v for k, v in group.items() if k not in left_out}
            | {"parameters": len(group["params"]), "has_momentum": bool(group.get("momentum"))}
            for group in self._groups()
        ]

    def refresh(self) -> bool:
        """Read rates anew; False if an option has changed that is part of the graph, or the state is another."""
        if self.optimizer.state is not self._of or self._unmoving() != self._fixed:
            return False
        for tensor, group, index in zip(self.options, self._groups(), range(len(self.options)), strict=True):
            values = self._values(group)
            if values != self._last[index]:
                tensor.copy_(torch.tensor(values, dtype=torch.float64))
                self._last[index] = values
        return True

    def targets(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that a step changes, in the order of :meth:`values`."""
        return [t.detach() for p in parameters for t in (p, *self._state(p).values())]

    def linear(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Those of the targets that depend on the gradient linearly."""
        adam = not isinstance(self.optimizer, torch.optim.SGD)
        return [self._state(p)["exp_avg"] if adam else p.detach() for p in parameters]

    def values(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """What a step would make of them."""
        place = {id(p): i for i, group in enumerate(self._groups()) for p in group["params"]}
        step = _sgd if isinstance(self.optimizer, torch.optim.SGD) else _adam
        result: list[Tensor] = []
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                index = place[id(p)]
                result += step(p, gradient, self._state(p), self._groups()[index], self.options[index].unbind())
        return result

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        names = (
            ("momentum_buffer",) if isinstance(self.optimizer, torch.optim.SGD) else ("step", "exp_avg", "exp_avg_sq")
        )
        state = self.optimizer.state.get(parameter, {})
        return {name: state[name] for name in names if state.get(name) is not None}

    def is_ready(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the optimizer has made its state of all of these parameters."""
        if isinstance(self.optimizer, torch.optim.SGD):
            momentum = {id(p): group["momentum"] for group in self._groups() for p in group["params"]}
            return all(self._state(p) or not momentum[id(p)] for p in parameters)
        return all(self._state(p) for p in parameters)


def _sgd(
    p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], options: Sequence[Tensor]
) -> list[Tensor]:
    rate, momentum = options
    if group["weight_decay"]:
        gradient = gradient + group["weight_decay"] * p
    if not state or not group["momentum"]:  # a buffer of before is left alone
        return [p - rate * gradient, *state.values()]
    buffer = momentum * state["momentum_buffer"] + (1 - group["dampening"]) * gradient
    along = gradient + momentum * buffer if group["nesterov"] else buffer
    return [p - rate * along, buffer]


def _adam(
    p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], options: Sequence[Tensor]
) -> list[Tensor]:
    rate, beta1, beta2 = options
    decay, decoupled = group["weight_decay"], group.get("decoupled_weight_decay", False)
    if decay and not decoupled:
        gradient = gradient + decay * p
    start = p * (1 - rate * decay) if decay and decoupled else p
    step = state["step"] + 1
    first = state["exp_avg"] + (1 - beta1) * (gradient - state["exp_avg"])
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * (gradient * gradient)
    count = step.double().to(p.device)
    scale = (1 - beta2**count).sqrt()
    return [start - rate / (1 - beta1**count) * (first / (second.sqrt() / scale + group["eps"])), step, first, second]
