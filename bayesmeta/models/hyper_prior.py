"""A Gaussian hyper-prior over all parameters of a prior, and the program at any of their values."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesmeta.errors import ModelError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.batched import FlatParameters
from bayesmeta.ops.random import Seed, as_generator, normal_like

_LOG_2PI = math.log(2 * math.pi)


class HyperPrior(nn.Module):
    """P(θ) = N(centre, scale²), independent, over the flat vector θ of a program's trained parameters, raw as they are.

    A prior P_θ over functions is a program at a value of its parameters: means and log scales of weights, networks of a
    GP's mean and kernel, the raw (unconstrained) hyper-parameters of the kernel, the logarithm of the noise. Weights
    and biases of networks (of a network's prior: their means) are centred at 0; everything else at the value that it
    was made with, so that a hyper-prior on noise or length scales is set by making the program with other ones.

    Args:
        program: its parameters are held as they are from now on: no optimizer will move them. No submodule of this one.
        weight_scale: standard deviation of networks' weights.
        bias_scale: of their biases.
        other_scale: of everything else, in raw units (of logarithms, mostly).

    Raises:
        OptionError: for scales that are not positive.
        ModelError: for a program without trained parameters.
    """

    centre: Tensor
    scale: Tensor
    first: Tensor
    width: Tensor

    def __init__(self, program: TaskProgram, weight_scale: float, bias_scale: float, other_scale: float) -> None:
        super().__init__()
        scales = {"weight_scale": weight_scale, "bias_scale": bias_scale, "other_scale": other_scale}
        if not all(value > 0 and math.isfinite(value) for value in scales.values()):
            given = ", ".join(f"{name}={value}" for name, value in scales.items())
            raise OptionError(f"Standard deviations of the hyper-prior must be positive and finite; got {given}.")
        self._held = [_Call(program)]  # in a list: not a submodule
        trained = trained_parameters(self.program)
        if not trained:
            raise ModelError("The program has no trained parameters: there is no prior to learn.")
        self.flat = FlatParameters({name: p.shape for name, p in trained.items()})
        kinds = [self._kinds(name, p) for name, p in trained.items()]
        of_kind = torch.tensor([weight_scale, bias_scale, other_scale], dtype=torch.float64)
        first = torch.cat([p.detach().flatten() for p in trained.values()])
        kind = torch.cat(kinds).to(first.device)
        self.register_buffer("first", first.clone(), persistent=False)
        self.register_buffer("centre", torch.where(kind == 2, first, 0.0))
        self.register_buffer("scale", of_kind.to(first)[kind])
        # how wide first draws are: as wide as a network's own first weights, tensor by tensor
        widths = [_root_mean_square(part) for part in first.split(self.flat.sizes)]
        width = torch.cat([w.expand(size) for w, size in zip(widths, self.flat.sizes)])
        self.register_buffer("width", torch.where(kind == 2, 0.1 * self.scale, width), persistent=False)
        for p in self.program.parameters():
            p.requires_grad_(False)
        self.program.held_parameters = tuple(trained)

    @property
    def program(self) -> Any:
        """The program whose parameters θ are; its own values are those it was made with."""
        return self._held[0].program

    @property
    def size(self) -> int:
        """Number E of parameters."""
        return self.flat.size

    def _kinds(self, name: str, parameter: Tensor) -> Tensor:
        """Of each number of a parameter: 0 a weight, 1 a bias, 2 something else; ``[size]``."""
        kind = torch.empty(parameter.numel(), dtype=torch.long)
        if name == "prior.loc" and isinstance(self.program, NeuralTaskModel):
            parts = self.program.flat
            ends = torch.tensor(parts.sizes).cumsum(0).tolist()
            for part, end, size in zip(parts.shapes.items(), ends, parts.sizes):
                kind[end - size : end] = _kind(*part)
            return kind
        in_network = name.split(".")[0] in ("network", "trunk", "mean_network")
        return kind.fill_(_kind(name, parameter.shape) if in_network else 2)

    def log_prob(self, theta: Tensor) -> Tensor:
        """log P(θ), ``[…]``, for θ ``[…, E]``."""
        z = (theta - self.centre) / self.scale
        return -0.5 * z.square().sum(-1) - self.scale.log().sum() - 0.5 * self.size * _LOG_2PI

    def first_draws(self, count: int, seed: Seed = None) -> Tensor:
        """Where ``count`` particles start, ``[count, E]``.

        One starts at the program's own first parameters. Several are as many new networks, each tensor normal with the
        root mean square of the program's, around its other parameters with a tenth of their hyper-prior's width: all
        within the hyper-prior's reach, where draws of it itself would begin with networks that saturate.
        """
        if count == 1:
            return self.first.unsqueeze(0).clone()
        generator = as_generator(seed, self.centre.device, "hyper-prior")
        noise = normal_like(self.centre.double(), (count, self.size), generator).to(self.centre)
        return self.centre + self.width * noise

    def call(self, theta: Tensor, name: str, *args: Any) -> Any:
        """A method of the program under the parameters θ ``[E]``, differentiable in them."""
        values = {f"program.{key}": value for key, value in self.flat.views(theta).items()}
        return functional_call(self._held[0], values, (name, *args))

    def at(self, theta: Tensor) -> Any:
        """A copy of the program with the parameters θ ``[E]``, as values."""
        return set_parameters(self.program, theta)


def trained_parameters(program: TaskProgram) -> dict[str, nn.Parameter]:
    """The parameters by name that a hyper-prior is over: those that are trained, or that were before one held them."""
    held = getattr(program, "held_parameters", None)
    return {n: p for n, p in program.named_parameters() if (p.requires_grad if held is None else n in held)}


def set_parameters(program: Any, theta: Tensor) -> Any:
    """A copy of a program with other values of its :func:`trained_parameters`, flat in ``theta`` ``[E]``.

    Raises:
        ShapeError: for another number of values.
    """
    program = copy.deepcopy(program)
    parameters = trained_parameters(program)
    flat = FlatParameters({name: p.shape for name, p in parameters.items()})
    if theta.shape != (flat.size,):
        raise ShapeError(f"θ has shape {list(theta.shape)}; this program has {flat.size} trained parameters.")
    with torch.no_grad():
        for name, value in flat.views(theta.detach()).items():
            parameters[name].copy_(value)
    program.parameters_are_set = True
    return program


def refuse_held(program: nn.Module) -> None:
    """Refuse a program that a hyper-prior holds: what was learned is in θ, and the program's own values are the first.

    Copies by :meth:`HyperPrior.at` and :func:`set_parameters` have values of θ, and pass.

    Raises:
        UnsupportedError: for such a program, or a module that has one inside.
    """
    for module in program.modules():
        if getattr(module, "held_parameters", None) is not None and not getattr(module, "parameters_are_set", False):
            raise UnsupportedError(
                "This is the program of a PACOH: its own parameters are those that it was made with, and what is "
                "learned is in method.particles. Take the program at one of them: "
                "method.hyper_prior.at(method.particles[k])."
            )


class _Call(nn.Module):
    """A program whose methods ``functional_call`` can reach."""

    def __init__(self, program: TaskProgram) -> None:
        super().__init__()
        self.program = program

    def forward(self, name: str, *args: Any) -> Any:
        return getattr(self.program, name)(*args)


def _kind(name: str, shape: torch.Size) -> int:
    """Of a network's tensor: a bias by its name; a weight if it is a matrix; else (a norm's gain) something else."""
    return 1 if name.endswith("bias") else 0 if len(shape) > 1 else 2


def _root_mean_square(part: Tensor) -> Tensor:
    return part.double().square().mean().sqrt().to(part)
