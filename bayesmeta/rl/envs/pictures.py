"""Small pictures of environments, drawn with NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Colour = tuple[int, int, int]


class Canvas:
    """A white square seen from above, with coordinates from −extent to extent, y upwards.

    Args:
        extent: half the side, in the environment's units.
        size: side in pixels.

    Attributes:
        pixels: ``[size, size, 3]`` uint8.
    """

    def __init__(self, extent: float, size: int = 160) -> None:
        self.extent = extent
        self.pixels = np.full((size, size, 3), 255, dtype=np.uint8)
        middle = (np.arange(size) + 0.5) / size * 2 - 1
        self.x, self.y = extent * middle[None, :], -extent * middle[:, None]

    def disc(self, centre: Sequence[float] | np.ndarray, radius: float, colour: Colour) -> None:
        """Fill a disc."""
        self.pixels[(self.x - centre[0]) ** 2 + (self.y - centre[1]) ** 2 <= radius**2] = colour

    def box(self, low: Sequence[float], high: Sequence[float], colour: Colour) -> None:
        """Fill the rectangle between two corners."""
        inside = (self.x >= low[0]) & (self.x < high[0]) & (self.y >= low[1]) & (self.y < high[1])
        self.pixels[inside] = colour
