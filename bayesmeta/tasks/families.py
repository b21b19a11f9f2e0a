"""What the synthetic families of functions share: checks, finite sets of tasks, drawing points and noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator

#: Inputs of all families of sinusoids and lines are uniform on [−X_WIDTH, X_WIDTH].
X_WIDTH = 5.0


def check_counts(num_tasks: int, support: int, query: int | None) -> int:
    """Points of each task in all, ``support + query``.

    Raises:
        OptionError: for numbers out of range, and for ``query=None`` where points never run out.
    """
    if query is None:
        raise OptionError("query=None means all that is left of a task, but here points never run out; give a number.")
    if num_tasks < 1 or support < 0 or query < 0 or support + query < 1:
        raise OptionError(
            f"num_tasks={num_tasks}, support={support}, query={query}; expected at least 1 task and at least 1 "
            "observation of each."
        )
    return support + query


def check_population(num_tasks: int | None) -> None:
    """Raise OptionError unless ``num_tasks`` is None or at least 1."""
    if num_tasks is not None and num_tasks < 1:
        raise OptionError(f"num_tasks={num_tasks}; expected at least 1, or None for endless tasks.")


def draw_tasks(num_tasks: int, population: int, generator: torch.Generator) -> Tensor:
    """Rows of a finite set ``[num_tasks]``: without replacement, with it where more are asked for than there are."""
    if num_tasks <= population:
        return torch.randperm(population, generator=generator, device=generator.device)[:num_tasks]
    return torch.randint(population, (num_tasks,), generator=generator, device=generator.device)


def cut(observations: Observations, support: int) -> tuple[Observations, Observations]:
    """The first ``support`` columns, and those that come after."""
    x, y, w = observations.x, observations.y, observations.w
    assert y is not None
    return (
        Observations(x[:, :support], y[:, :support], w=w),
        Observations(x[:, support:], y[:, support:], w=w),
    )


class SyntheticFamily(ABC):
    """A family of functions with a few parameters, each a transform of uniform numbers.

    A subclass says how many uniform numbers make a task (``_num_uniform``), what parameters they become
    (``_parameters``), what the function is (``_function``) and how large the noise (``_noise_scale``).

    Args:
        num_tasks: None: endless, every batch has new tasks. A number: so many tasks, drawn once; each batch draws
            from them without replacement (with it where it asks for more than there are), with fresh points and noise.
        task_seed: which finite set of tasks; the same on every device.

    Raises:
        OptionError: for fewer than one task.
    """

    _num_uniform: ClassVar[int]

    def __init__(self, *, num_tasks: int | None, task_seed: int) -> None:
        check_population(num_tasks)
        self.num_tasks = num_tasks
        self.task_seed = task_seed
        self._set: Tensor | None = None
        if num_tasks is not None:
            fixed = as_generator(task_seed, stream="task set")
            self._set = torch.rand(num_tasks, self._num_uniform, generator=fixed, device=fixed.device).cpu()

    def sample(self, num_tasks: int, *, support: int, query: int, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch on the generator's device.

        Args:
            num_tasks: number of tasks.
            support, query: observations of each task.
            generator: generator or seed; None means seed 0.

        Returns:
            x ``[num_tasks, shots, 1]`` and y ``[num_tasks, shots]``, float32. A finite set also gives ``task_id`` (its
            rows) and ``population``.

        Raises:
            OptionError: for numbers out of range.
        """
        return self.sample_with_truth(num_tasks, support=support, query=query, generator=generator)[0]

    def sample_with_truth(
        self, num_tasks: int, *, support: int, query: int, generator: Seed = None
    ) -> tuple[TaskBatch, dict[str, Tensor]]:
        """The batch of :meth:`sample` under the same seed, and the true parameters of its tasks.

        Returns:
            The batch, and by name the parameters, ``[num_tasks]`` each. They are kept out of the batch, where a method
            could see them.

        Raises:
            OptionError: for numbers out of range.
        """
        shots = check_counts(num_tasks, support, query)
        generator = as_generator(generator, stream="tasks")
        device = generator.device
        uniform = torch.rand(num_tasks, shots + self._num_uniform, generator=generator, device=device)
        mine, task_id = uniform[:, : self._num_uniform], None
        if self._set is not None:
            task_id = draw_tasks(num_tasks, len(self._set), generator)
            mine = self._set.to(device)[task_id]
        parameters = self._parameters(mine)
        x = 2 * X_WIDTH * uniform[:, self._num_uniform :] - X_WIDTH
        y = self._function(parameters, x)
        scale = self._noise_scale(parameters)
        if scale is not None:
            y = y + scale * torch.randn(num_tasks, shots, generator=generator, device=device)
        first, rest = cut(Observations(x.unsqueeze(-1), y), support)
        batch = TaskBatch(first, rest, task_id=task_id, population=self.num_tasks)
        return batch, {name: value.squeeze(-1) for name, value in parameters.items()}

    @abstractmethod
    def _parameters(self, uniform: Tensor) -> dict[str, Tensor]:
        """Named parameters ``[tasks, 1]`` from uniform numbers ``[tasks, _num_uniform]``."""

    @abstractmethod
    def _function(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """The noise-free y at x ``[tasks, shots]``."""

    @abstractmethod
    def _noise_scale(self, parameters: dict[str, Tensor]) -> Tensor | float | None:
        """Standard deviation of the noise, broadcastable to ``[tasks, shots]``; None for no noise."""
