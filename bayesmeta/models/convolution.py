"""A convolutional network on sets of observations over one input: translation equivariant."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, OptionError, ShapeError
from bayesmeta.models.process_networks import ProcessNetwork

#: Taps on either side of a convolution's middle.
HALF = 2
#: Dilations of the blocks, in turn.
DILATIONS = (8, 4, 2, 1)
#: Targets read the grid this many points on either side.
WINDOW = 8


class ConvProcess(ProcessNetwork):
    """The support as a function on a grid, a convolutional network on it, and its values at the targets.

    On a uniform grid t_g there are a density Σ_i k(t_g − x_i) and the data Σ_i y_i k(t_g − x_i), divided by the
    density, with k(d) = exp(−d² / 2ℓ²) and ℓ learned. Residual blocks of depthwise (dilated) and pointwise convolutions
    follow, and the outputs at x are a mean over the grid, weighted by another such k. As all of it depends on
    differences of inputs alone, moving support and targets together moves the outputs with them. Without support there
    is one learned output, the same everywhere.

    Source: J. Gordon et al., "Convolutional Conditional Neural Processes", ICLR 2020, https://arxiv.org/abs/1910.13556,
    sections 3 and 4, algorithm 1 (off the grid). Departures: the grid of a task begins at its own first observation
    rather than at 0, so that equivariance is exact for any shift; convolutions are not padded but eat the margin of the
    grid, and targets read 8 grid points on either side with weights that sum to 1 (algorithm 1 has an unnormalised
    sum), so that outputs do not depend on where the grid ends, and thus neither on other tasks nor on what else is
    asked; dilated residual blocks stand in for the U-Net.

    Args:
        features: width of x; must be 1.
        targets, outputs, latent_size, width, classes, counts, max_shots: as in :class:`ProcessNetwork`.
        depth: residual blocks, of dilations 8, 4, 2, 1, 8, …; how far a point sees is :attr:`receptive_field`.
        points_per_unit: density of the grid, per unit of x: some for the shortest length that matters.
        max_points: a longer grid is refused.

    Raises:
        OptionError: for sizes out of range.
        ShapeError: for several features.
    """

    def __init__(
        self,
        features: int = 1,
        targets: int = 1,
        outputs: int = 2,
        *,
        width: int = 64,
        depth: int = 4,
        points_per_unit: float = 16.0,
        max_points: int = 4096,
        **options: Any,
    ) -> None:
        if features != 1:
            raise ShapeError(
                f"The convolutional network (ConvProcess, in ConvCNP) is for one input; got {features} features. Use "
                "attention or a transformer for several."
            )
        if depth < 1 or not 0 < points_per_unit < math.inf or max_points < 1:
            raise OptionError(
                "depth and max_points must be at least 1 and points_per_unit positive; got "
                f"{depth}, {max_points} and {points_per_unit}."
            )
        super().__init__(features, targets, outputs, inner=width, width=width, layers=1, **options)
        self.points_per_unit, self.max_points = points_per_unit, max_points
        dilations = list(itertools.islice(itertools.cycle(DILATIONS), depth))
        first = math.log(2.0 / points_per_unit)
        self.log_length_in = nn.Parameter(torch.tensor(first))
        self.log_length_out = nn.Parameter(torch.tensor(first))
        # the reader's columns without x: data, and the density
        self.lift = nn.Linear(self.reader.width, width)
        self.blocks = nn.ModuleList(_Block(width, dilation) for dilation in dilations)
        self._eaten = HALF * sum(dilations)

    @property
    def receptive_field(self) -> float:
        """How far on either side the convolutions see along the grid, in units of x.

        An observation also reaches the grid points around it, by the Gaussian of learned length that puts it there, and
        a target reads 8 grid points on either side.
        """
        return self._eaten / self.points_per_unit

    def forward(self, support: Observations, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Outputs ``[L, tasks, M, outputs]``; see :class:`ProcessNetwork`.

        Raises:
            ShapeError: also for inputs so far apart that the grid would have more than ``max_points``.
            DataError: for targets so far from the support that grid points near them are the same number.
        """
        rows, mask = self.read(support, x)
        seen, asked = rows[..., 0], x[..., 0]
        if asked.shape[-1] == 0:
            return self.decode(x.new_zeros(*x.shape[:-1], self.lift.out_features), z)
        # without support the outputs are the same everywhere, and so any origin will do
        origin = asked.detach().amin(-1, keepdim=True)
        if seen.shape[-1]:
            first = seen.detach().masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
            origin = torch.where(mask.any(-1, keepdim=True), first, origin)
        seen = torch.where(mask, seen - origin, 0.0)
        asked = asked - origin
        self._check_distance(asked)
        grid = self._grid(asked)
        h = self.lift(self._on_grid(seen, rows[..., 1:], mask, grid))
        for block in self.blocks:
            h = block(h)
        return self.decode(self._at(asked, grid[:, self._eaten : grid.shape[1] - self._eaten], h), z)

    def _check_distance(self, asked: Tensor) -> None:
        """Check that x relative to the origin, in grid points, is below what its dtype counts exactly."""
        limit = 1.0 / torch.finfo(asked.dtype).eps
        far = asked.detach().abs().amax() * self.points_per_unit
        if not bool(far <= limit):
            raise DataError(
                f"A target is {float(far) / self.points_per_unit:.4g} units of x from the support, {float(far):.2g} "
                f"points of the grid; {asked.dtype} tells {limit:.2g} apart. Standardise x, use float64, or take fewer "
                "points_per_unit."
            )

    def _grid(self, asked: Tensor) -> Tensor:
        """Positions relative to a task's origin, ``[tasks, G]``, around its targets with margins on both sides."""
        margin = self._eaten + WINDOW
        first = (asked.detach().amin(-1) * self.points_per_unit).floor() - margin
        last = (asked.detach().amax(-1) * self.points_per_unit).ceil() + margin
        points = int((last - first).max()) + 1
        if points > self.max_points:
            span = float((asked.amax(-1) - asked.amin(-1)).max())
            raise ShapeError(
                f"The targets of a task span {span:.4g} units of x, for which the grid would need {points} points, "
                f"{self.points_per_unit:g} a unit and a margin; the limit is max_points={self.max_points}. Standardise "
                "x, take fewer points_per_unit, or raise the limit."
            )
        step = torch.arange(points, dtype=asked.dtype, device=asked.device)
        return (first.unsqueeze(-1) + step) / self.points_per_unit

    def _on_grid(self, seen: Tensor, y: Tensor, mask: Tensor, grid: Tensor) -> Tensor:
        """Density and data, ``[tasks, G, 1 + columns of y]``."""
        away = (grid.unsqueeze(-1) - seen.unsqueeze(-2)) * (-self.log_length_in).exp()
        weight = (-0.5 * away.square()).exp() * mask.unsqueeze(-2)
        density = weight.sum(-1, keepdim=True)
        return torch.cat([density, weight @ y / (density + 1e-8)], -1)

    def _at(self, asked: Tensor, grid: Tensor, h: Tensor) -> Tensor:
        """Weighted means over the grid, ``[tasks, M, width]``."""
        away = asked.unsqueeze(-1) - grid.unsqueeze(-2)
        near = away.detach().abs() * self.points_per_unit <= WINDOW
        logits = -0.5 * (away * (-self.log_length_out).exp()).square()
        return logits.masked_fill(~near, -torch.inf).softmax(-1) @ h


class _Block(nn.Module):
    """h ← h + W gelu(depthwise(h)), shorter by the reach of the convolution at both ends."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        taps = 2 * HALF + 1
        self.taps = nn.Parameter(torch.empty(taps, width).uniform_(-1.0, 1.0) * taps**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.mix = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """``[tasks, G, width]`` to ``[tasks, G − 2 · reach, width]``."""
        reach = HALF * self.dilation
        length = h.shape[-2] - 2 * reach
        out: Tensor = self.bias
        for tap, start in zip(self.taps, range(0, 2 * reach + 1, self.dilation), strict=True):
            out = torch.addcmul(out, h[:, start : start + length], tap)
        return h[:, reach : reach + length] + self.mix(nn.functional.gelu(out))
