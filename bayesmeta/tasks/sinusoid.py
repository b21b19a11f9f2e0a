"""Sinusoid regression, the first test of few-shot learning."""

from __future__ import annotations

import math

import torch

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator


class Sinusoid:
    """y = A sin(x − phase) + noise, with A ~ U(0.1, 5), phase ~ U(0, π), x ~ U(−5, 5) (Finn et al. 2017, section 5.1).

    Args:
        noise: standard deviation of the noise on y, support and query alike; 0 in the paper.

    Raises:
        OptionError: for negative noise.
    """

    num_tasks: int | None = None

    def __init__(self, noise: float = 0.0) -> None:
        if noise < 0:
            raise OptionError(f"noise must be ≥ 0; got {noise}.")
        self.noise = noise

    def sample(self, num_tasks: int, *, support: int, query: int, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch on the generator's device.

        Args:
            num_tasks: number of tasks.
            support, query: observations of each task.
            generator: generator or seed; None means seed 0.

        Returns:
            x ``[num_tasks, shots, 1]`` and y ``[num_tasks, shots]``, float32.
        """
        generator = as_generator(generator, stream="tasks")
        device = generator.device
        shots = support + query
        uniform = torch.rand(num_tasks, shots + 2, generator=generator, device=device)
        amplitude = 0.1 + 4.9 * uniform[:, :1]
        phase = math.pi * uniform[:, 1:2]
        x = 10.0 * uniform[:, 2:] - 5.0
        y = amplitude * torch.sin(x - phase)
        if self.noise > 0:
            y = y + self.noise * torch.randn(num_tasks, shots, generator=generator, device=device)
        x = x.unsqueeze(-1)
        return TaskBatch(Observations(x[:, :support], y[:, :support]), Observations(x[:, support:], y[:, support:]))
