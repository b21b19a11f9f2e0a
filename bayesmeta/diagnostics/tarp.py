"""TARP: a test of joint posteriors by the coverage of balls around random points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.diagnostics.simulation import LEAST_RANKS, RankFinding, finding_of, rank_of, smooth
from bayesmeta.diagnostics.uniformity import EcdfBand, bonferroni, legendre, shape_of
from bayesmeta.errors import NonFiniteDataError, ShapeError
from bayesmeta.ops.random import Seed, as_generator


@dataclass(frozen=True, eq=False)
class TARP:
    """Coverage of random balls.

    Attributes:
        fractions: for each simulation the share of draws nearer to the reference point than the truth,
            ``[simulations]``; uniform if the posterior is exact.
        levels, coverage: expected coverage at each credibility level, ``[levels]``; equal if the posterior is exact.
        p_value: of uniformity of the fractions (ECDF band, and the moments, Bonferroni over both).
        finding: "calibrated", "too narrow", "too wide" or "miscalibrated"; "unknown" where fewer than 20
            simulations show nothing.
    """

    fractions: Tensor
    levels: Tensor
    coverage: Tensor
    p_value: float
    finding: RankFinding

    def __str__(self) -> str:
        return f"TARP over {len(self.fractions)} simulations: {self.finding} (p = {self.p_value:.2g})"

    def __repr__(self) -> str:
        return f"<{self}>"


@torch.no_grad()
def tarp(
    draws: Tensor,
    truth: Tensor,
    *,
    references: Tensor | None = None,
    alpha: float = 0.01,
    generator: Seed = None,
) -> TARP:
    """Test of accuracy with random points: expected coverage of a joint posterior of several parameters.

    Of each simulation, the credibility of the ball around a reference point on whose edge the truth lies. It sees all
    parameters together, where ranks see each alone, and it is as strong as the choice of the references: these must not
    depend on the truth, and only if they depend on the data can it tell the posterior from the prior. References all
    around hardly see a posterior that is shifted, as half of them lie on either side; some far corner does. Source:
    P. Lemos, A. Coogan, Y. Hezaveh, L. Perreault-Levasseur, "Sampling-Based Accuracy Testing of Posterior Estimators
    for General Inference", ICML 2023, https://arxiv.org/abs/2302.03026, algorithm 2.

    Args:
        draws: of the posterior of each simulation, ``[n, simulations, D]``, independent.
        truth: ``[simulations, D]``.
        references: ``[simulations, D]``; by default uniform in the box that holds all truths, of which each dimension
            is scaled to one.
        alpha: with a p-value below this it is not called calibrated.
        generator: generator or seed of the references and of ties; None means seed 0.

    Raises:
        ShapeError: for shapes that do not fit, or fewer than 3 draws or simulations.
        NonFiniteDataError: for NaN.
    """
    if truth.dim() != 2 or draws.dim() != 3 or draws.shape[1:] != truth.shape or min(len(draws), len(truth)) < 3:
        raise ShapeError(
            f"draws has shape {list(draws.shape)} and truth {list(truth.shape)}; expected [n, simulations, D] and "
            "[simulations, D], n and simulations at least 3."
        )
    if references is not None and references.shape != truth.shape:
        raise ShapeError(f"references has shape {list(references.shape)}; expected {list(truth.shape)}.")
    if not bool(truth.isfinite().all() & draws.isfinite().all()):
        raise NonFiniteDataError("Truths or draws are not finite; inference has diverged in a simulation.")
    generator = as_generator(generator, truth.device, "TARP")
    low, width = truth.amin(0), (truth.amax(0) - truth.amin(0)).clamp(min=torch.finfo(truth.dtype).tiny)
    if references is None:
        uniform = torch.rand(truth.shape, generator=generator, dtype=truth.dtype, device=truth.device)
        references = low + uniform * width
    num_draws = len(draws)
    distance = ((draws - references) / width).square().sum(-1)
    own = ((truth - references) / width).square().sum(-1)
    ranks = rank_of("distance", own, distance, num_draws, generator)
    values = smooth(ranks, num_draws)
    shape = shape_of(legendre(values), independent=True)
    p = bonferroni([EcdfBand(len(ranks), num_draws).p_value(ranks), shape.p_value])
    # the references lie outside of a narrow posterior, so that the fractions of one are 0 or 1
    finding = finding_of(p, shape.dispersion, 0.0, shape.p_dispersion, 1.0, alpha)
    finding = "unknown" if finding == "calibrated" and len(ranks) < LEAST_RANKS else finding
    levels = torch.linspace(0.0, 1.0, 51, dtype=torch.float64)
    fractions = ranks.double() / num_draws
    coverage = (values.unsqueeze(-1) <= levels).double().mean(0)
    return TARP(fractions, levels, coverage, p, finding)
