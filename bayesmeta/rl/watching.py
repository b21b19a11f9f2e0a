"""Environments that are watched while a learner acts in them: paths, rewards and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesmeta.errors import EnvError, OptionError, RunFolderError
from bayesmeta.ops.files import reason
from bayesmeta.rl.learner import Learner
from bayesmeta.rl.protocols import Tensors

#: Pictures of environments stand side by side with so many pixels between them.
_GAP = 4


class Watched:
    """A vector environment that keeps what happens in the first copy of each task, until the task's trial is over.

    Everything else is the environment's own.

    Args:
        env: of a family, with autoreset.
        pictures: keep a picture of each moment too.

    Attributes:
        paths: for each task and each point of the adaptation, the observations ``[steps + 1, …]``.
        rewards: of the same steps, ``[steps]`` each.
        frames: pictures of all tasks side by side, ``[height, width, 3]`` uint8, each with its point and step.

    Raises:
        EnvError: for pictures of a family that has none.
    """

    def __init__(self, env: Any, *, pictures: bool = False) -> None:
        self._env, self._pictures, self._resets = env, pictures, 0
        self.paths: list[list[list[Tensor]]] = [[] for _ in range(env.num_tasks)]
        self.rewards: list[list[list[float]]] = [[] for _ in range(env.num_tasks)]
        self.frames: list[tuple[np.ndarray, int, int]] = []
        self._running = [False] * env.num_tasks
        if pictures:
            env.reset()
            self._shoot(0, 0, keep=False)  # a family without pictures says so now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        """Begin a new trial everywhere."""
        observation, info = self._env.reset(**options)
        self._resets += 1
        self._running = [True] * self._env.num_tasks
        for task in range(self._env.num_tasks):
            self._begin(task, observation)
        if self._pictures:
            self._shoot(len(self.rewards[0]) - 1, 0)
        return observation, info

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment."""
        env = self._env
        found = observation, reward, terminated, truncated, info = env.step(actions)
        for task in range(env.num_tasks):
            row = task * env.copies
            if not self._running[task]:
                continue
            self.paths[task][-1].append(info["final_obs"][row].cpu().clone())
            self.rewards[task][-1].append(float(reward[row]))
            if bool(info["trial_ended"][row]):
                self._running[task] = False
            elif bool((terminated | truncated)[row]):
                self._begin(task, observation)
        if self._pictures and any(self._running):
            task = self._running.index(True)
            self._shoot(len(self.rewards[task]) - 1, len(self.rewards[task][-1]))
        return found

    @property
    def unwatched(self) -> Any:
        """The environment itself, for episodes that are no point of the adaptation: what happens there is not kept."""
        return self._env

    def _begin(self, task: int, observation: Tensor) -> None:
        self.paths[task].append([observation[task * self._env.copies].cpu().clone()])
        self.rewards[task].append([])

    def _shoot(self, point: int, step: int, *, keep: bool = True) -> None:
        env = self._env
        pictures = env.pictures() if hasattr(env, "pictures") else _drawn(env)
        gap = np.full((pictures[0].shape[0], _GAP, 3), 128, dtype=np.uint8)
        if keep:
            joined = [part for picture in pictures for part in (picture, gap)][:-1]
            self.frames.append((np.concatenate(joined, 1), point, step))


def _drawn(env: Any) -> list[np.ndarray]:
    """Pictures of the first environment of each task, of environments that step as tensors."""
    tasks, state = env.tasks.to("cpu"), env.state.map(lambda value: value[:: env.copies]).to("cpu")
    return [env.family.picture(tasks, state, index) for index in range(env.num_tasks)]


def _named(tasks: Any) -> dict[str, Tensor]:
    """Parameters of tasks by name; of tasks that are neither tensors nor numbers there are none."""
    if isinstance(tasks, Tensors):
        return tasks.as_dict()
    numbers = all(isinstance(task, int | float) and not isinstance(task, bool) for task in tasks)
    return {"task": torch.tensor([float(task) for task in tasks])} if numbers else {}


class Watching(NamedTuple):
    """What was seen.

    Attributes:
        paths: for each task and each point of the adaptation, the observations ``[steps + 1, …]``.
        rewards: of the same steps, ``[steps]`` each.
        tasks: the tasks' parameters by name; of tasks that are numbers, ``"task"``.
        unit: what adaptation goes by, ``"episode"`` or ``"step"``.
        frames: pictures of all tasks side by side, with point and step.
        family: of the environments, for what stands around the paths; None where it is not known.
    """

    paths: list[list[Tensor]]
    rewards: list[list[Tensor]]
    tasks: dict[str, Tensor]
    unit: str
    frames: list[tuple[np.ndarray, int, int]]
    family: Any = None


def watch(
    learner: Learner, env: Any, *, points: int | None = None, pictures: bool = False, generator: int = 0
) -> Watching:
    """Let a learner adapt to a few tasks, and keep what happens in the first copy of each.

    Args:
        learner: trained.
        env: a few held-out tasks of a family (``TensorVectorEnv``, or ``GymFamily(…).vector(…)``).
        points: gradient steps, for learners that take them; None is as trained.
        pictures: keep pictures too.
        generator: seed of the actions.

    Raises:
        EnvError: for pictures of a family that has none, or environments that are of no family.
    """
    if getattr(env, "family", None) is None:
        raise EnvError(
            f"this {type(env).__name__} has no family of tasks; give a TensorVectorEnv or GymFamily(…).vector(…) to "
            "watch."
        )
    watched = Watched(env, pictures=pictures)
    curve = learner.curve(watched, points=points, generator=generator)
    paths = [[torch.stack(path) for path in task] for task in watched.paths]
    rewards = [[torch.tensor(path) for path in task] for task in watched.rewards]
    return Watching(paths, rewards, _named(env.tasks), curve.unit, watched.frames, env.family)


def save_video(watching: Watching, path: str | Path, *, frames_per_second: float = 10.0, scale: int = 1) -> None:
    """Write pictures as an animated GIF, by Pillow.

    Args:
        watching: with pictures.
        path: a file that ends in ``.gif``.
        frames_per_second: of the film; between points of the adaptation it rests for half a second.
        scale: enlarges each pixel so many times.

    Raises:
        OptionError: for another ending, no pictures, or numbers that are not positive.
        RunFolderError: when it cannot be written.
    """
    from PIL import Image, ImageDraw

    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise OptionError(f"{path.name} was given; videos are written as .gif.")
    if not watching.frames:
        raise OptionError("There are no pictures; watch with pictures=True.")
    if not frames_per_second > 0 or scale < 1:
        raise OptionError(f"Expected frames_per_second > 0 and scale ≥ 1; got {frames_per_second} and {scale}.")
    images, waits = [], []
    for number, (pixels, point, step) in enumerate(watching.frames):
        height, width = pixels.shape[0] * scale, pixels.shape[1] * scale
        image = Image.new("RGB", (width, height + 16), "white")
        image.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (0, 16))
        before = "after" if watching.unit == "step" else "episode"
        what = f"{before} {point} steps" if watching.unit == "step" else f"{before} {point + 1}"
        ImageDraw.Draw(image).text((3, 2), f"{what}, t = {step}", fill="black")
        images.append(image)
        last = number + 1 == len(watching.frames) or watching.frames[number + 1][1] != point
        waits.append(500 if last else round(1000 / frames_per_second))
    try:
        images[0].save(path, save_all=True, append_images=images[1:], duration=waits, loop=0)
    except OSError as error:
        raise RunFolderError(f"{path} could not be written: {reason(error)}") from error
