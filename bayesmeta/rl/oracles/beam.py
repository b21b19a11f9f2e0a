"""Policies that know the machine, for beam steering: the inverse response, and least squares within the correctors'
limits.

The first is what an operator does: −R⁻¹s, scaled into the limits. It is no upper bound: an episode ends at rms < 0.1,
and least squares within the limits gets there in fewer steps (A. Björck, 1996, "Numerical methods for least squares
problems", section 5.2, on the problem with bounds; solved here by a primal-dual
interior-point method, for all machines at once).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.rl.envs.beam import STEP
from bayesmeta.rl.envs.machines import UNITS


def inverse_response_actions(response: Tensor, readings: Tensor) -> Tensor:
    """−R⁻¹s in units of a full step; the environment scales it into its limits.

    Args:
        response: ``[n, monitors, correctors]``; a square one is inverted, else its pseudo-inverse is taken.
        readings: ``[n, monitors]``.

    Returns:
        ``[n, correctors]``.
    """
    # In float64: machines have conditions of up to 1e4.
    solved = torch.linalg.lstsq(UNITS * STEP * response.double(), -readings.double()[..., None], driver="gelsd")
    return solved.solution.squeeze(-1).to(readings.dtype)


def box_least_squares_actions(response: Tensor, readings: Tensor, *, iterations: int = 40) -> Tensor:
    """The action within ±1 that leaves the smallest root mean square, argmin ‖s + R·a‖² over |a| ≤ 1.

    Args:
        response: ``[n, monitors, correctors]``.
        readings: ``[n, monitors]``.
        iterations: of the interior-point method at most; it stops when the complementarity is below 1e-12.

    Returns:
        ``[n, correctors]``.

    Raises:
        OptionError: if the iterations were too few.
    """
    matrix = UNITS * STEP * response.double()
    scale = matrix.square().sum((-1, -2)).clamp(min=1e-30)
    hessian = matrix.mT @ matrix / scale[:, None, None]
    slope = (matrix.mT @ readings.double()[..., None]).squeeze(-1) / scale[:, None]
    action = torch.zeros_like(slope)
    lower, upper = torch.ones_like(slope), torch.ones_like(slope)  # multipliers of the two limits
    for _ in range(iterations):
        # Machines that are solved go on with the others; the floor keeps them from dividing by 0.
        below, above = (1 + action).clamp(min=1e-13), (1 - action).clamp(min=1e-13)
        gap = (lower * below + upper * above).mean(-1, keepdim=True) / 2
        stationary = ((hessian @ action[..., None]).squeeze(-1) + slope - lower + upper).abs()
        if float(gap.max()) < 1e-12 and float(stationary.max()) < 1e-9:
            return action.to(readings.dtype)
        centre = 0.1 * gap
        gradient = (hessian @ action[..., None]).squeeze(-1) + slope
        curvature = hessian + torch.diag_embed(lower / below + upper / above)
        move = torch.linalg.solve(curvature, -gradient + centre / below - centre / above)
        to_lower = (centre - lower * (below + move)) / below
        to_upper = (centre - upper * (above - move)) / above
        steps = [_longest(below, move), _longest(above, -move), _longest(lower, to_lower), _longest(upper, to_upper)]
        step = torch.stack(steps).amin(0)
        action = action + step * move
        lower, upper = (lower + step * to_lower).clamp(min=1e-18), (upper + step * to_upper).clamp(min=1e-18)
    raise OptionError(f"not solved in iterations={iterations}; allow more.")


def _longest(value: Tensor, change: Tensor) -> Tensor:
    """Largest step, up to 1, that keeps all values positive, ``[n, 1]``."""
    ratio = torch.where(change < 0, -value / change, torch.inf).amin(-1, keepdim=True)
    return (0.99 * ratio).clamp(max=1.0)
