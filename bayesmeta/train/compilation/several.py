"""Several compiled steps after each other in one graph: nothing between them is left to Python."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bayesmeta.errors import CaptureError
from bayesmeta.train.compilation.compiled import CompiledStep
from bayesmeta.train.compilation.in_place import repeat


class SeveralSteps:
    """Some steps in one call.

    Args:
        step: compiled, with the optimizer's update in its graph.
        count: how many steps a call makes.

    Attributes:
        seconds: that making the graph took.

    Raises:
        CaptureError: when the graph cannot be compiled, or gives other numbers than step by step.
    """

    def __init__(self, step: CompiledStep, count: int) -> None:
        if step.update is None:
            raise CaptureError("the optimizer's step is not part of the graph, so that steps are made one by one")
        begin = time.perf_counter()
        self.step, self.count = step, count
        self.captured = repeat(step.captured, count)
        self._call = step.build(self.captured)
        #: what steps before the one that fails may have written; known to be needed only where one can fail
        self._kept = step.written if any("linalg" in str(n.target) for n in self.captured.graph.graph.nodes) else []
        self.seconds = time.perf_counter() - begin

    def __call__(self, arguments: Sequence[Tensor] = ()) -> list[float]:
        """Make steps on fresh draws and the same arguments.

        Returns:
            The losses of the steps that were made. These are fewer than asked for where the loss or gradient of the
            next is not finite, or one of its conditions does not hold: it is then to be made by itself, from here.
        """
        step = self.step
        step.ready(self.count, arguments)
        before = [t.clone() for t in self._kept]
        states = [(g, g.get_state()) for g in step.drawn_from]
        try:
            losses, _, made, _ = self._call(*self.captured.inputs(self.captured.draw(), arguments))
        except RuntimeError:  # as a matrix that has no factor
            count = 0
            with torch.no_grad():
                for tensor, value in zip(self._kept, before, strict=True):
                    tensor.copy_(value)
        else:
            count = sum(made.tolist())  # none is made after one that was not
            if count == self.count:
                values: list[float] = losses.tolist()
                return values
        for generator, state in states:
            generator.set_state(state)
        for _ in range(count):
            step.captured.draw()
        return [] if count == 0 else losses[:count].tolist()
