"""Trust-region steps: natural gradients by conjugate gradients, and a line search that keeps its bound.

Source: J. Schulman, S. Levine, P. Moritz, M. Jordan, P. Abbeel, "Trust Region Policy Optimization", ICML 2015,
https://arxiv.org/abs/1502.05477, section 6 and appendix C. Hessian-vector products by finite differences of the
gradient: B. A. Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 6, 1994,
https://doi.org/10.1162/neco.1994.6.1.147, eq. 1 (there to say what his product improves on).

Departures: the damping is a share of the mean curvature met by the gradient, so that it does not hang on the scale of
the divergence; a surrogate whose gradient is 0 or not finite gives no step rather than 0 / 0.

Everything is a function of one flat vector θ, so that a policy, a recurrent one and MAML's start (whose surrogate runs
through the adaptation) are all the same here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.linear_solve import conjugate_gradient

#: A scalar function of a flat vector, differentiable in it.
Scalar = Callable[[Tensor], Tensor]
Product = Literal["double_backward", "finite_differences"]


def gradient(function: Scalar, theta: Tensor) -> Tensor:
    """∇ of a scalar function at a flat vector, ``[D]``, without a graph."""
    theta = theta.detach().requires_grad_()
    with torch.enable_grad():
        (out,) = torch.autograd.grad(function(theta), theta)
    return out.detach()


def hessian_product(function: Scalar, theta: Tensor) -> Callable[[Tensor], Tensor]:
    """v ↦ ∇² f(θ) v by differentiating ∇f · v, exact. The graph of ∇f is built once, for all products.

    Args:
        function: twice differentiable. cuDNN's recurrent networks are not (the memories of this package are).
        theta: ``[D]``.
    """
    theta = theta.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(function(theta), theta, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not slope.requires_grad:  # linear: no curvature
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(slope, theta, v, retain_graph=True)
        return out.detach()

    return product


def finite_difference_product(function: Scalar, theta: Tensor, step: float | None = None) -> Callable[[Tensor], Tensor]:
    """v ↦ ∇² f(θ) v by central differences of the gradient: two gradients a product, and no second derivative.

    Args:
        function: once differentiable.
        theta: ``[D]``.
        step: length ε of each difference, along v / ‖v‖. None is the cube root of the dtype's rounding, relative to
            1 + the largest |θ|: rounding costs about eps / ε and curvature's change ε², of the scale of f.

    Returns:
        The product; not exactly linear in v.
    """
    theta = theta.detach()
    scale = 1 + float(theta.abs().max()) if theta.numel() else 1.0
    epsilon = torch.finfo(theta.dtype).eps ** (1 / 3) * scale if step is None else step
    if not epsilon > 0:
        raise OptionError(f"step must be positive; got {step}.")

    def product(v: Tensor) -> Tensor:
        length = v.norm()
        if float(length) == 0:
            return torch.zeros_like(v)
        along = v * (epsilon / length)
        difference = gradient(function, theta + along) - gradient(function, theta - along)
        return difference * (length / (2 * epsilon))

    return product


@dataclass(frozen=True)
class TrustRegionStep:
    """What a step did.

    Attributes:
        theta: the new parameters, ``[D]``; the old ones when it was not accepted.
        accepted: whether the policy moved.
        reason: why not, in words; "" when it was.
        divergence: KL(old ‖ new) at the new parameters, in nats: 0, or at most the bound.
        improvement: of the surrogate.
        backtracks: how often the step was shortened.
    """

    theta: Tensor
    accepted: bool
    reason: str
    divergence: float
    improvement: float
    backtracks: int


def trust_region_step(
    theta: Tensor,
    surrogate: Scalar,
    divergence: Scalar,
    *,
    max_kl: float = 0.01,
    cg_steps: int = 10,
    damping: float = 1e-3,
    shrink: float = 0.8,
    max_backtracks: int = 15,
    product: Product = "double_backward",
    curvature: Scalar | None = None,
) -> TrustRegionStep:
    """One step up the surrogate, inside the ball divergence ≤ ``max_kl``.

    The direction solves (H + damping) x = ∇surrogate, H the Hessian of the divergence at θ, and is scaled to the
    boundary of the quadratic model. Steps are then shortened until the surrogate rises **and** the divergence itself,
    not its model, keeps the bound; if none does, θ stays.

    Args:
        theta: the policy that acted, ``[D]``.
        surrogate: what to raise, a scalar function of the parameters.
        divergence: mean KL(old ‖ new) over the states, 0 at ``theta``.
        max_kl: the bound, in nats.
        cg_steps: conjugate-gradient iterations.
        damping: added to the curvature, as a share of its mean along the gradient.
        shrink: by how much a step is shortened each time.
        max_backtracks: how often at most.
        product: how Hessian-vector products are made: ``"double_backward"`` or ``"finite_differences"``.
        curvature: a cheaper function whose Hessian stands for that of the divergence in the direction; None is the
            divergence. The bound is kept by the divergence itself either way.

    Raises:
        OptionError: for options outside their range.
    """
    _check_options(max_kl, cg_steps, damping, shrink, max_backtracks, product)
    theta = theta.detach()
    slope = gradient(surrogate, theta)
    before = _value(surrogate, theta)
    if not torch.isfinite(slope).all() or not math.isfinite(before):
        return _stay(theta, "the surrogate or its gradient is not finite")
    size = float(slope.norm())
    if size <= torch.finfo(theta.dtype).tiny ** 0.5:
        return _stay(theta, "the surrogate's gradient is 0")
    unit = slope / size  # conjugate gradients square it: small gradients would underflow in float32
    times = (hessian_product if product == "double_backward" else finite_difference_product)(
        divergence if curvature is None else curvature, theta
    )
    along = float(unit @ times(unit))
    if not math.isfinite(along) or along <= 0:
        return _stay(theta, f"the divergence has curvature {along:g} along the gradient")

    def damped(v: Tensor) -> Tensor:
        return times(v) + damping * along * v

    direction = conjugate_gradient(damped, unit, cg_steps)
    quadratic = float(direction @ damped(direction))
    if not torch.isfinite(direction).all() or not math.isfinite(quadratic) or quadratic <= 0:
        return _stay(theta, "conjugate gradients found no direction")
    full = direction * math.sqrt(2 * max_kl / quadratic)
    for backtracks in range(max_backtracks + 1):
        candidate = theta + shrink**backtracks * full
        distance, gain = _value(divergence, candidate), _value(surrogate, candidate) - before
        # NaN fails both comparisons
        if distance <= max_kl and gain > 0:
            return TrustRegionStep(candidate, True, "", distance, gain, backtracks)
    return _stay(theta, "no step of the line search raised the surrogate within the bound", max_backtracks)


def _stay(theta: Tensor, reason: str, backtracks: int = 0) -> TrustRegionStep:
    return TrustRegionStep(theta, False, reason, 0.0, 0.0, backtracks)


def _value(function: Scalar, theta: Tensor) -> float:
    # gradients stay on: a surrogate that runs through an adaptation needs them inside
    return float(function(theta.detach().requires_grad_()).detach())


def _check_options(
    max_kl: float, cg_steps: int, damping: float, shrink: float, max_backtracks: int, product: str
) -> None:
    if not max_kl > 0 or not damping >= 0:
        raise OptionError(f"max_kl must be positive and damping at least 0; got {max_kl} and {damping}.")
    if cg_steps < 1 or max_backtracks < 0 or not 0 < shrink < 1:
        raise OptionError(
            "Expected cg_steps ≥ 1, max_backtracks ≥ 0 and shrink in (0, 1); got "
            f"{cg_steps}, {max_backtracks} and {shrink}."
        )
    if product not in get_args(Product):
        raise OptionError(f"Unknown product {product!r}; expected one of {', '.join(get_args(Product))}.")
