"""Families of sinusoids: the first tests of few-shot regression."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.tasks.families import X_WIDTH, SyntheticFamily, check_counts, cut, draw_tasks

#: Which tasks of :class:`NonMutuallyExclusiveSinusoid`.
Split = Literal["train", "test"]


def _check_noise(noise: float, name: str = "noise") -> None:
    if not 0 <= noise < math.inf:
        raise OptionError(f"{name} must be ≥ 0 and finite; got {noise}.")


class Sinusoid(SyntheticFamily):
    """y = A sin(x − phase) + noise, with A ~ U(0.1, 5), phase ~ U(0, π), x ~ U(−5, 5) (Finn et al. 2017, section 5.1).

    Source: C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML
    2017, https://arxiv.org/abs/1703.03400. Their tasks are endless and free of noise.

    Args:
        noise: standard deviation of the noise on y, support and query alike; 0 in the paper.
        num_tasks: None: endless. A number: a finite set of tasks with fresh points in each batch.
        task_seed: which finite set.

    Raises:
        OptionError: for negative noise or fewer than one task.
    """

    _num_uniform = 2

    def __init__(self, noise: float = 0.0, *, num_tasks: int | None = None, task_seed: int = 0) -> None:
        _check_noise(noise)
        super().__init__(num_tasks=num_tasks, task_seed=task_seed)
        self.noise = noise

    def _parameters(self, uniform: Tensor) -> dict[str, Tensor]:
        return {"amplitude": 0.1 + 4.9 * uniform[:, :1], "phase": math.pi * uniform[:, 1:2]}

    def _function(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return parameters["amplitude"] * torch.sin(x - parameters["phase"])

    def _noise_scale(self, parameters: dict[str, Tensor]) -> float | None:
        return self.noise if self.noise > 0 else None


class ChallengingSinusoid(SyntheticFamily):
    """y = A sin(f x + phase) + noise: amplitude, phase and frequency vary, and the noise grows with the amplitude.

    A ~ U(0.1, 5), phase ~ U(0, 2π), f ~ U(0.5, 2), x ~ U(−5, 5), noise of standard deviation 0.01 A.

    Source: J. Yoon, T. Kim, O. Dia, S. Kim, Y. Bengio, S. Ahn, "Bayesian Model-Agnostic Meta-Learning", NeurIPS 2018,
    https://arxiv.org/abs/1806.03836, section 5.1. The paper trains on finite sets: ``num_tasks=100`` or 1000, which
    is where a point estimate overfits.

    Args:
        relative_noise: standard deviation of the noise in units of the task's amplitude.
        num_tasks: None: endless. A number: a finite set of tasks with fresh points in each batch.
        task_seed: which finite set.

    Raises:
        OptionError: for negative noise or fewer than one task.
    """

    _num_uniform = 3

    def __init__(self, relative_noise: float = 0.01, *, num_tasks: int | None = None, task_seed: int = 0) -> None:
        _check_noise(relative_noise, "relative_noise")
        super().__init__(num_tasks=num_tasks, task_seed=task_seed)
        self.relative_noise = relative_noise

    def _parameters(self, uniform: Tensor) -> dict[str, Tensor]:
        return {
            "amplitude": 0.1 + 4.9 * uniform[:, :1],
            "phase": 2 * math.pi * uniform[:, 1:2],
            "frequency": 0.5 + 1.5 * uniform[:, 2:3],
        }

    def _function(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return parameters["amplitude"] * torch.sin(parameters["frequency"] * x + parameters["phase"])

    def _noise_scale(self, parameters: dict[str, Tensor]) -> Tensor | None:
        return self.relative_noise * parameters["amplitude"] if self.relative_noise > 0 else None


class NonMutuallyExclusiveSinusoid:
    """y = A sin(x) + noise, with the amplitude told in the input: tasks that one network can solve without adapting.

    The input is ``[x, hint]``: x ~ U(−5, 5), and the hint a one-hot vector that is the same for all points of a task.
    The amplitudes are ``num_amplitudes`` equally spaced ones from 0.1 to 4, the phase is 0, the noise has standard
    deviation 0.1, in support and query alike.

    - ``split="train"``: task i has the i-th amplitude and the i-th hint. There are ``num_amplitudes`` tasks. A network
      that reads the hint need not look at the support: it memorises.
    - ``split="test"``: A ~ U(0.1, 4), and the hint is a random one that says nothing. Only the support tells. Endless.

    Source: M. Yin, G. Tucker, M. Zhou, S. Levine, C. Finn, "Meta-Learning without Memorization", ICLR 2020,
    https://arxiv.org/abs/1912.03820, section 6.1, and the notebook MR_MAML.ipynb that the authors released. Phase,
    range, grid of amplitudes and the random hint are read off this notebook. Departures: the notebook draws training
    tasks and test hints from the first 16 of the 20 indices alone, adds noise to a test support twice (standard
    deviation 0.1 √2), and puts 200 test targets on a grid over [−4.5, 4.5]; here all indices occur, noise comes once,
    and targets are drawn as supports are.

    Args:
        split: which tasks.
        noise: standard deviation of the noise.
        num_amplitudes: how many training tasks, and the width of the hint.

    Raises:
        OptionError: for an unknown split, negative noise, or fewer than two amplitudes.
    """

    def __init__(self, split: Split = "train", *, noise: float = 0.1, num_amplitudes: int = 20) -> None:
        if split not in get_args(Split):
            raise OptionError(f"split={split!r} is not known; expected one of {', '.join(get_args(Split))}.")
        _check_noise(noise)
        if num_amplitudes < 2:
            raise OptionError(f"num_amplitudes={num_amplitudes}; expected at least 2.")
        self.split, self.noise, self.num_amplitudes = split, noise, num_amplitudes
        self.num_tasks: int | None = num_amplitudes if split == "train" else None

    def sample(self, num_tasks: int, *, support: int, query: int, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch on the generator's device.

        Args:
            num_tasks: number of tasks; training tasks are drawn without replacement, with it beyond
                ``num_amplitudes``.
            support, query: observations of each task.
            generator: generator or seed; None means seed 0.

        Returns:
            x ``[num_tasks, shots, 1 + num_amplitudes]`` and y ``[num_tasks, shots]``, float32; training batches have
            the index of the amplitude as ``task_id``.

        Raises:
            OptionError: for numbers out of range.
        """
        shots = check_counts(num_tasks, support, query)
        generator = as_generator(generator, stream="tasks")
        device, size = generator.device, self.num_amplitudes
        x = 2 * X_WIDTH * torch.rand(num_tasks, shots, generator=generator, device=device) - X_WIDTH
        task_id = None
        if self.split == "train":
            hint = task_id = draw_tasks(num_tasks, size, generator)
            amplitude = torch.linspace(0.1, 4.0, size, device=device)[task_id].unsqueeze(-1)
        else:
            hint = torch.randint(size, (num_tasks,), generator=generator, device=device)
            amplitude = 0.1 + 3.9 * torch.rand(num_tasks, 1, generator=generator, device=device)
        y = amplitude * torch.sin(x)
        y = y + self.noise * torch.randn(num_tasks, shots, generator=generator, device=device)
        one_hot = torch.nn.functional.one_hot(hint, size).to(x).unsqueeze(1).expand(-1, shots, -1)
        first, rest = cut(Observations(torch.cat([x.unsqueeze(-1), one_hot], -1), y), support)
        return TaskBatch(first, rest, task_id=task_id, population=self.num_tasks)
