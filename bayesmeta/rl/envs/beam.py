"""Steering a beam through a pipe whose optics are not known (the AWAKE electron line; Hirlaender et al. 2023,
https://arxiv.org/abs/2310.16034, and Kain et al. 2020, Phys. Rev. Accel. Beams 23, 124801).

A task is a machine, that is a response matrix R. An agent sees where the beam is at ten monitors, s = 100·R·kicks in
units of 1 cm (±1 is the edge of the pipe), and changes ten correctors: kicks += 1e-4·action, where an action whose
largest entry is above 1 is divided by it. The reward is −10 times the root mean square (rms) of s. An episode
*terminates* when rms < 0.1 (``info["success"]``), or when |s| ≥ 1 somewhere: that reading and all later ones become its
sign and the reward is computed again. 100 steps *truncate* it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from torch import Tensor

from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import Family, Noise, check_at_least
from bayesmeta.rl.envs.machines import UNITS, Machines
from bayesmeta.rl.envs.pictures import Canvas
from bayesmeta.rl.envs.plain import Numbers, PlainEnv
from bayesmeta.rl.protocols import Tensors

#: Radians of a full action.
STEP = 1e-4
#: Root mean square of the readings below which the beam is steered.
GOAL = 0.1


@dataclass(frozen=True)
class BeamTasks(Tensors):
    """Rows of the table, ``[tasks]`` int64, and their responses, ``[tasks, monitors, correctors]``."""

    row: Tensor
    response: Tensor

    #: Responses before :meth:`repeat`, so that there is one product for all copies of a task.
    shared: ClassVar[Tensor | None] = None

    def readings(self, kicks: Tensor) -> Tensor:
        """Of kicks ``[tasks, correctors]``, ``[tasks, monitors]``."""
        if self.shared is None:
            return torch.bmm(self.response, kicks.unsqueeze(-1)).squeeze(-1).mul_(UNITS)
        each = kicks.reshape(len(self.shared), -1, kicks.shape[-1])
        found = kicks.new_empty(*each.shape[:2], self.shared.shape[1])
        torch.mul(torch.bmm(self.shared, each.mT).mT, UNITS, out=found)  # in this order the faster product
        return found.flatten(0, 1)

    def repeat(self, copies: int) -> BeamTasks:
        """``copies`` of each, task-major, which remember that they are copies."""
        repeated = super().repeat(copies)
        object.__setattr__(repeated, "shared", self.response)  # of this object alone; it is frozen
        return repeated


@dataclass(frozen=True)
class BeamState(Tensors):
    """Kicks in radians, ``[n, correctors]``, and readings, ``[n, monitors]``."""

    kicks: Tensor
    readings: Tensor


@dataclass(frozen=True)
class BeamSteering(Family[BeamTasks, BeamState]):
    """Beam steering; see the head of this module.

    Args:
        machines: the table of machines; the built-in ones unless given.
        horizon: steps of an episode.

    Raises:
        OptionError: for a horizon below 1.
    """

    machines: Machines = field(default_factory=Machines.built_in)
    horizon: int = 100

    name = "beam_steering"
    fixed_length = False
    tells = ("success",)
    task_type = BeamTasks
    state_type = BeamState

    def __post_init__(self) -> None:
        check_at_least(1, horizon=self.horizon)

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        """Readings of the monitors."""
        return gymnasium.spaces.Box(-1.0, 1.0, (self.machines.responses.shape[1],), np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Box:
        """Changes of the correctors, in steps of 1e-4 radians."""
        return gymnasium.spaces.Box(-1.0, 1.0, (self.machines.responses.shape[2],), np.float32)

    def config(self) -> dict[str, Any]:
        """The options, with a digest of the table."""
        return {"family": self.name, "horizon": self.horizon, "machines": self.machines.digest()}

    def sample_tasks(self, num_tasks: int, *, generator: Seed = None, split: str = "train") -> BeamTasks:
        """Machines of a set: without replacement, with it where more are asked for than there are."""
        rows = self.machines.rows(split)
        generator = as_generator(generator, stream="tasks")
        if num_tasks <= len(rows):
            chosen = torch.randperm(len(rows), generator=generator, device=generator.device)[:num_tasks]
        else:
            chosen = torch.randint(len(rows), (num_tasks,), generator=generator, device=generator.device)
        return self.tasks(rows[chosen.cpu()], chosen.device)

    def tasks(self, rows: Tensor, device: torch.device | str = "cpu") -> BeamTasks:
        """Machines by their rows ``[tasks]``."""
        return BeamTasks(rows.to(device), self.machines.responses[rows].to(device))

    def reset_noise(self, num: int, generator: torch.Generator, dtype: torch.dtype) -> Noise:
        """Which start, ``[num]`` int64."""
        number = self.machines.starts.shape[1]
        return (torch.randint(number, (num,), generator=generator, device=generator.device),)

    def initial(self, tasks: BeamTasks, noise: Noise) -> BeamState:
        """One of the machine's admissible starts."""
        starts = self.machines.starts.to(tasks.response.device)
        chosen = torch.add(noise[0], tasks.row, alpha=starts.shape[1])
        kicks = starts.flatten(0, 1).index_select(0, chosen).to(tasks.response.dtype)
        return BeamState(kicks, tasks.readings(kicks))

    def advance(
        self, tasks: BeamTasks, state: BeamState, actions: Tensor, noise: Noise
    ) -> tuple[BeamState, Tensor, Tensor, dict[str, Tensor]]:
        """Change the correctors, and read the monitors."""
        scaled = actions / _largest(actions).clamp_(min=1.0).unsqueeze(-1)
        kicks = torch.add(state.kicks, scaled, alpha=STEP)
        readings = tasks.readings(kicks)
        hit = _largest(readings) >= 1
        rows = hit.nonzero().squeeze(-1)
        if len(rows):
            readings.index_copy_(0, rows, _behind_the_wall(readings.index_select(0, rows)))
        rms = torch.linalg.vector_norm(readings, dim=-1).mul_(readings.shape[-1] ** -0.5)
        success = (rms < GOAL) > hit  # of truth values: and not
        return BeamState(kicks, readings), -10 * rms, success | hit, {"success": success}

    def observe(self, tasks: BeamTasks, state: BeamState) -> Tensor:
        """The readings, ``[n, monitors]``."""
        return state.readings.clone()

    def picture(self, tasks: BeamTasks, state: BeamState, index: int = 0) -> np.ndarray:
        """The beam along the pipe, from left to right; the goal's band is green."""
        canvas, readings = Canvas(1.1), state.readings[index].numpy()
        canvas.box((-1.1, -1.0), (1.1, 1.0), (240, 240, 240))
        canvas.box((-1.1, -GOAL), (1.1, GOAL), (205, 235, 205))
        for place, reading in zip(np.linspace(-1, 1, len(readings)), readings):
            canvas.disc((place, float(reading)), 0.05, (200, 60, 40))
        return canvas.pixels

    def plain(self, **options: Any) -> BeamSteeringEnv:
        """As one plain gymnasium environment."""
        return BeamSteeringEnv(self, **options)


def _largest(values: Tensor) -> Tensor:
    """Largest absolute value of each row, ``[n, width]`` to ``[n]``; on a CPU faster than ``abs().amax(-1)``."""
    return torch.max_pool1d(values.abs().reshape(1, 1, -1), values.shape[-1]).flatten()


def _behind_the_wall(readings: Tensor) -> Tensor:
    """The first reading that is at the edge and all later ones are its sign."""
    first = readings.abs().ge_(1).argmax(-1, keepdim=True)
    later = _places(readings.shape[-1], readings.device) >= first
    return torch.where(later, readings.gather(-1, first).sign_(), readings)


@lru_cache
def _places(number: int, device: torch.device) -> Tensor:
    return torch.arange(number, device=device)


class BeamSteeringEnv(PlainEnv):
    """Beam steering as a plain gymnasium environment; see :class:`BeamSteering`."""

    family: BeamSteering

    def __init__(self, family: BeamSteering | None = None, **options: Any) -> None:
        super().__init__(family or BeamSteering(), **options)

    def _prepare(self) -> None:
        assert self.task is not None
        self.response = np.asarray(self.task["response"], dtype=np.float64)
        self.starts = self.family.machines.starts[int(self.task["row"])].double().numpy()

    def _reset_noise(self, rng: np.random.Generator) -> Numbers:
        return (int(rng.integers(len(self.starts))),)

    def _initial(self, noise: Numbers) -> None:
        self.kicks = self.starts[int(noise[0])]
        self.readings = UNITS * self.response @ self.kicks

    def _advance(self, action: Any, noise: Numbers) -> tuple[float, bool, dict[str, Any]]:
        largest = max(1.0, float(np.abs(action).max()))
        self.kicks = self.kicks + STEP * np.asarray(action, dtype=np.float64) / largest
        self.readings = UNITS * self.response @ self.kicks
        hit = False
        for monitor, reading in enumerate(self.readings):
            if abs(reading) >= 1:
                self.readings[monitor:] = math.copysign(1.0, reading)
                hit = True
                break
        rms = math.sqrt(float(self.readings @ self.readings) / len(self.readings))
        success = rms < GOAL and not hit
        return -10 * rms, success or hit, {"success": success}

    def _observe(self) -> np.ndarray:
        return self.readings.astype(np.float32)

    def _state(self) -> dict[str, Tensor]:
        return {"kicks": torch.tensor(self.kicks)[None], "readings": torch.tensor(self.readings)[None]}
