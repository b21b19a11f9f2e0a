"""``compile="cudagraphs"``: the operations of a captured step are recorded once on the GPU, then played back.

Without a compiler's minutes the launches of all kernels become one. CUDA plays a recording back on the very memory that
it was recorded on: what a step draws and the arguments of a call are copied into tensors of their own first, parameters
and states are written where they are, and results are read from where they lie.

Source: PyTorch's notes on CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs (warm-up on a
side stream, then capture).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bayesmeta.errors import CaptureError, OptionError

#: runs on a side stream before the recording, in which libraries set up what they need
WARM_UP = 3


def check_cuda(device: torch.device) -> None:
    """Refuse ``compile="cudagraphs"`` where there is no CUDA.

    Raises:
        OptionError: for another device.
    """
    if device.type != "cuda":
        raise OptionError(
            f"compile='cudagraphs' needs a CUDA device, and this is on {device}; take compile='inductor' there."
        )


class Recorded:
    """A graph played back on fixed memory.

    Args:
        graph: what is recorded; a function of tensors that gives a tuple of tensors.
        inputs: of the graph.
        fresh: which of these each call brings anew; all others stay where they are, and are read and written there.
        written: those of the inputs that the graph changes; they are put back after warming up.
        record: runs a function once more and gives what plays it back; CUDA's by default.

    Raises:
        CaptureError: when the operations cannot be recorded, as those that wait for the GPU.
    """

    def __init__(
        self,
        graph: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        fresh: Sequence[int],
        written: Sequence[Tensor],
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self._fresh = list(fresh)
        self._inputs = [t.clone() if i in set(self._fresh) else t for i, t in enumerate(inputs)]
        self._places = [self._inputs[i] for i in self._fresh]
        self._addresses = [t.data_ptr() for t in inputs]
        self._kept = [i for i in range(len(inputs)) if i not in set(self._fresh)]
        self._results: Sequence[Tensor] = ()

        def run() -> None:
            self._results = graph(*self._inputs)

        before = [t.clone() for t in written]
        try:
            self._play = (_record_on_cuda if record is None else record)(run)
        except RuntimeError as error:
            line = (str(error).splitlines() or ["no detail"])[0][:300].rstrip(". ")
            raise CaptureError(f"the step cannot be recorded as a CUDA graph: {line}") from error
        finally:
            with torch.no_grad():
                for tensor, value in zip(written, before, strict=True):
                    tensor.copy_(value)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Play it on these inputs.

        Raises:
            CaptureError: when a tensor that stays has moved in memory.
        """
        if any(inputs[i].data_ptr() != self._addresses[i] for i in self._kept):
            raise CaptureError("a parameter or state has moved in memory since the CUDA graph was recorded")
        with torch.no_grad():
            torch._foreach_copy_(self._places, [inputs[i] for i in self._fresh])
        self._play()
        return [t.clone() for t in self._results]  # the next call writes over them


def _record_on_cuda(run: Callable[[], None]) -> Callable[[], None]:
    """Warm up on a side stream, record, and give what plays the recording."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    recording = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(recording):
        run()
    return recording.replay


def record_step(
    graph: fx.GraphModule, inputs: Sequence[Tensor], fresh: Sequence[int], written: Sequence[Tensor]
) -> Callable[..., Any]:
    """A captured step, recorded.

    Raises:
        CaptureError: where an input is not on the GPU, as the counts of an optimizer may be.
    """
    apart = [tuple(t.shape) for t in inputs if t.device.type != "cuda"]
    if apart:
        raise CaptureError(f"inputs of shapes {apart} are not on the GPU, which a CUDA graph needs")
    return Recorded(graph, inputs, fresh, written)
