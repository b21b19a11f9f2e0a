"""The curvature of a network's likelihood in its task parameters: Fisher information, dense or as Kronecker factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from bayesmeta.data import Observations
from bayesmeta.errors import UnsupportedError
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.ops.curvature import hessian, jacobian
from bayesmeta.ops.kronecker import (
    KroneckerPrecision,
    LinearLayers,
    kronecker_factors,
    separable_scale,
    why_not_linear,
)


def closed_kl(here: Any, there: Any) -> Tensor:
    """KL(here ‖ there), whose Hessian in the parameters of ``there`` is the Fisher information.

    Raises:
        UnsupportedError: for distributions without a closed one.
    """
    try:
        return kl_divergence(here, there)
    except NotImplementedError as error:
        base = here
        while hasattr(base, "base_dist"):
            base = base.base_dist
        raise UnsupportedError(
            f"The likelihood {type(base).__name__} has no closed KL divergence, from which the Fisher information is "
            "taken. Use curvature='full' or 'diagonal', the Hessian itself."
        ) from error


def output_fisher(program: NetworkProgram, outputs: Tensor, observations: Observations, create_graph: bool) -> Tensor:
    """Fisher information in each shot's outputs, ``[G, tasks, shots, P, P]``; 0 for padding.

    Args:
        program: the model.
        outputs: of its network, ``[G, tasks, shots, P]``.
        observations: of these tasks and shots.
        create_graph: differentiable in the outputs and in the likelihood's parameters.
    """
    _, exposure = program.likelihood.split(observations.x, observations.mask)
    outputs = outputs if create_graph else outputs.detach()
    here = program.likelihood.distribution(outputs, **exposure)
    fisher = hessian(
        lambda f: closed_kl(here, program.likelihood.distribution(f, **exposure)), outputs, create_graph=create_graph
    )
    return torch.where(observations.full_mask()[..., None, None], fisher, 0.0)


def network_fisher(
    program: NetworkProgram, u: Tensor, observations: Observations, *, diagonal: bool, create_graph: bool
) -> Tensor:
    """Jᵀ F J, with J of the outputs in φ and F the Fisher information in each shot's outputs.

    Args:
        program: the model.
        u: ``[G, tasks, D]``.
        observations: of these tasks.
        diagonal: its diagonal only.
        create_graph: differentiable in u and the likelihood's parameters.

    Returns:
        ``[G, tasks, D, D]``, or the diagonal ``[G, tasks, D]``.
    """
    inputs, _ = program.likelihood.split(observations.x, observations.mask)
    outputs = program._forward(u, inputs)  # [G, tasks, shots, P]
    fisher = output_fisher(program, outputs, observations, create_graph)
    slopes = jacobian(lambda v: program._forward(v, inputs).flatten(-2), u, create_graph=create_graph)
    slopes = slopes.unflatten(-2, outputs.shape[-2:])  # [G, tasks, shots, P, D]
    weighted = fisher @ slopes
    if diagonal:
        return (slopes * weighted).sum((-3, -2))
    return slopes.flatten(-3, -2).mT @ weighted.flatten(-3, -2)


def need_layers(program: Any) -> None:
    """Refuse models that have no Kronecker factors.

    Raises:
        UnsupportedError: saying what is in the way.
    """
    instead = "Use curvature='ggn', or 'diagonal_ggn' for many task parameters."
    if not isinstance(program, NeuralTaskModel):
        sites = [site.name for site in program.layout.local] if program.is_prepared else []
        named = f", whose task parameters are the site(s) {', '.join(map(repr, sites))}" if sites else ""
        raise UnsupportedError(
            "The curvature 'kronecker' is of the weights of Linear layers in a NeuralTaskModel; this model is a "
            f"{type(program).__name__}{named}. {instead}"
        )
    reason = why_not_linear(program.network, program.flat)
    if reason is not None:
        raise UnsupportedError(
            "The curvature 'kronecker' takes a Linear, or a Sequential of Linear and elementwise layers, whose weights "
            f"are the site 'phi'; of this model, {reason}. {instead}"
        )
    if not program.prior.is_diagonal_gaussian:
        raise UnsupportedError(
            "The curvature 'kronecker' takes a prior that is a diagonal Gaussian ('normal', 'layer_scales', "
            f"'horseshoe'); this model has {type(program.prior).__name__}. Use one of these, or curvature='ggn'."
        )


def kronecker_precision(
    program: NeuralTaskModel, u: Tensor, observations: Observations, theta: Tensor | None, *, create_graph: bool
) -> KroneckerPrecision:
    """The prior's precision and Kronecker factors of the Gauss–Newton matrix, in units of the prior's scale.

    In a task with data the prior's scales are the nearest separable ones; in one without, the prior's own.

    Args:
        program: a model that :func:`need_layers` lets pass.
        u: ``[G, tasks, D]``.
        observations: of these tasks.
        theta: global sites, ``[G, E]`` or None.
        create_graph: differentiable in u and θ.
    """
    layers, lead = LinearLayers(program.flat), u.shape[:-1]
    moments = program.gaussian_prior(observations, theta)
    assert moments is not None  # by need_layers
    scale = moments[1].expand(u.shape)
    scale = scale if create_graph else scale.detach()
    if observations.shots == 0:
        inputs, outputs = ([u.new_zeros(*lead, side[i], side[i]) for side in layers.sides] for i in (1, 0))
        return KroneckerPrecision(layers, scale, inputs, outputs)
    mask = observations.full_mask()
    x, _ = program.likelihood.split(observations.x, observations.mask)
    factors = kronecker_factors(
        program.network,
        layers,
        u.flatten(0, 1),
        x.expand(lead[0], *x.shape).flatten(0, 1),
        mask.expand(*lead, -1).flatten(0, 1),
        lambda f: output_fisher(program, f.unflatten(0, lead), observations, create_graph).flatten(0, 1),
        create_graph=create_graph,
    )
    inputs, outputs = ([part.unflatten(0, lead) for part in parts] for parts in factors)
    near, columns, rows = separable_scale(layers, scale)
    inputs = [t.unsqueeze(-1) * a * t.unsqueeze(-2) for a, t in zip(inputs, columns, strict=True)]
    outputs = [r.unsqueeze(-1) * g * r.unsqueeze(-2) for g, r in zip(outputs, rows, strict=True)]
    return KroneckerPrecision(layers, torch.where(mask.any(-1, keepdim=True), near, scale), inputs, outputs)
