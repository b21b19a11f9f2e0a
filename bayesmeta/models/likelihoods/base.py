"""What likelihoods share: the exposure, learned positive options, and outputs in the shape of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError, ShapeError


class Likelihood(nn.Module):
    """Base of likelihoods. One of your own defines :meth:`distribution`.

    An output of width 1 goes with targets ``[tasks, shots]``; a wider one with ``[tasks, shots, outputs]``, unless the
    likelihood says otherwise.

    Attributes:
        exposure: which column of x holds the exposure (time at risk, population), negative from the end: positive, in
            raw units. That column is not fed to the network; it comes to :meth:`distribution` instead. None: no
            exposure, and ``distribution`` is called with the output alone.
    """

    exposure: int | None = None

    def distribution(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        """Distribution of y with batch shape ``[…, tasks, shots]``.

        Args:
            output: network outputs ``[…, tasks, shots, width]``.
            exposure: ``[tasks, shots]``, where the likelihood has one.
        """
        raise NotImplementedError

    def log_prob(self, output: Tensor, y: Tensor, exposure: Tensor | None = None) -> Tensor:
        """log p(y | output), ``[…, tasks, shots]``."""
        fn = self.distribution(output) if exposure is None else self.distribution(output, exposure)
        return fn.log_prob(y)

    def num_outputs(self, targets: int) -> int | None:
        """How many network outputs it takes for so many targets; None when it does not say.

        Raises:
            ShapeError: for a number of targets that it cannot describe.
        """
        return None

    def split(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the network is fed, and the exposure as a keyword argument (none where there is no exposure).

        Args:
            x: ``[tasks, shots, features]``.
            mask: ``[tasks, shots]``. Padding gets the exposure 1: its density does not count, but its gradient must be
                finite.

        Raises:
            ShapeError: when x has no such column.
        """
        if self.exposure is None:
            return x, {}
        width = x.shape[-1]
        if not -width <= self.exposure < width:
            raise ShapeError(
                f"The exposure of {type(self).__name__} is column {self.exposure} of x, which has {width} feature(s); "
                f"expected {-width} to {width - 1}."
            )
        column = self.exposure % width
        exposure = x[..., column]
        if mask is not None:
            exposure = torch.where(mask, exposure, 1.0)
        return torch.cat([x[..., :column], x[..., column + 1 :]], -1), {"exposure": exposure}

    def _log_parameter(self, name: str, value: float | Sequence[float], learn: bool) -> None:
        """Hold the logarithm of a positive option, as a parameter if it is learned, else as a buffer."""
        raw = torch.as_tensor(value, dtype=torch.float64)
        if raw.dim() > 1 or raw.numel() == 0 or not bool(((raw > 0) & raw.isfinite()).all()):
            raise OptionError(
                f"The {name} of a {type(self).__name__} likelihood must be positive, one number or one for each "
                f"output; got {value}."
            )
        log_value = raw.log().to(torch.get_default_dtype())
        if learn:
            self.register_parameter(f"log_{name}", nn.Parameter(log_value))
        else:
            self.register_buffer(f"log_{name}", log_value)


class Independent(Likelihood):
    """One network output for each target, targets independent."""

    #: parameters that may hold one value for each output
    _per_output: tuple[str, ...] = ()

    def num_outputs(self, targets: int) -> int | None:
        """As many as there are targets."""
        for name in self._per_output:
            value = getattr(self, name)
            if value.dim() and value.shape[0] != targets:
                raise ShapeError(
                    f"The {type(self).__name__} likelihood has {value.shape[0]} values of {name}, but y has {targets} "
                    f"output(s). Give one {name} for each output, or one for all."
                )
        return targets

    def extra_repr(self) -> str:
        """The options, shown when the likelihood is printed."""
        shown = []
        for name in self._per_output:
            value = getattr(self, name).tolist()
            text = f"{value:.4g}" if isinstance(value, float) else f"[{', '.join(f'{v:.4g}' for v in value)}]"
            shown.append(f"{name}={text}, learn_{name}={getattr(self, f'learn_{name}')}")
        return ", ".join(shown + ([] if self.exposure is None else [f"exposure={self.exposure}"]))


def as_targets(output: Tensor) -> Tensor:
    """Outputs in the shape of the targets: a single one has no dimension of its own."""
    return output.squeeze(-1) if output.shape[-1] == 1 else output


def as_event(fn: Any, width: int) -> Any:
    """Several outputs are one event."""
    return fn if width == 1 else fn.to_event(1)


def sum_event(value: Tensor, width: int) -> Tensor:
    """Sum over the outputs, where there are several."""
    return value if width == 1 else value.sum(-1)


def for_width(value: Tensor, output: Tensor) -> Tensor:
    """A parameter of one value per output, without that dimension where there is a single output."""
    return value.squeeze(-1) if value.dim() and output.shape[-1] == 1 else value
