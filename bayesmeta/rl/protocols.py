"""How the parts of meta-RL know each other: tasks as tensors, families of environments, vector environments.

Words and shapes. A **task** is one Markov decision process; its parameters φ are a few tensors. An **episode** is one
run of an environment, a **trial** the episodes that share one task (a learner that remembers keeps its hidden state
across the episodes of a trial and clears it between trials). A vector environment steps ``num_envs = tasks × copies``
environments at once; its batch is task-major, so that ``x.unflatten(0, (tasks, copies))`` gives ``[tasks, copies, …]``.

A step of a vector environment returns ``observation, reward, terminated, truncated, info`` as tensors on its device:

* ``reward`` ``[num_envs]``, floating.
* ``terminated`` and ``truncated`` ``[num_envs]``, bool, never merged. *Terminated*: nothing follows, the value of what
  comes next is 0; this includes the end of a horizon that is part of the problem (the n pulls of a bandit).
  *Truncated*: a time limit, behind which the task would go on; bootstrap with the value of ``info["final_obs"]``.
* ``observation`` ``[num_envs, …]``: what to act on next. With ``AutoresetMode.SAME_STEP`` (the default), an environment
  whose episode ended has been reset within the step, and this is the first observation of its next episode.
* ``info["final_obs"]``: the observation that the action led to, before any reset: s′ of the transition (s, a, r, s′).
  It equals ``observation`` wherever no episode ended. Always present.
* ``info["trial_ended"]`` ``[num_envs]``, bool: the episode that ended was the last of its trial. The environment now
  has another task if the vector environment draws new ones, and a learner's memory of it must be cleared.
* whatever the family adds, ``[num_envs]`` each, always present (``dense_reward`` of the sparse point robot, ``success``
  …).

Actions are ``[num_envs]`` int64 for a ``Discrete`` space and ``[num_envs, dim]`` floating for a ``Box``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import gymnasium
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A few tensors that share their first dimension: the parameters of tasks, or the states of environments.

    Subclasses are frozen dataclasses whose fields are tensors.
    """

    def as_dict(self) -> dict[str, Tensor]:
        """The tensors by name, not copied."""
        names: tuple[str, ...] = self.__match_args__  # the fields; every step asks for them, and fields() is slower
        return {name: getattr(self, name) for name in names}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with ``function`` applied to each tensor."""
        return type(self)(**{name: function(value) for name, value in self.as_dict().items()})

    def __len__(self) -> int:
        return len(next(iter(self.as_dict().values())))

    def __getitem__(self, index: Tensor | slice) -> Self:
        return self.map(lambda value: value[index])

    def repeat(self, copies: int) -> Self:
        """``copies`` of each, task-major: ``[tasks, …]`` to ``[tasks × copies, …]``."""
        return self.map(lambda value: value.repeat_interleave(copies, 0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """On a device; ``dtype`` is for floating tensors alone."""
        return self.map(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    def replace_rows(self, rows: Tensor, other: Self) -> Self:
        """A copy in which the rows of an index ``[m]`` are those of ``other``, ``[m, …]``."""
        theirs = other.as_dict()
        return type(self)(**{name: value.index_copy(0, rows, theirs[name]) for name, value in self.as_dict().items()})

    def where(self, mask: Tensor, other: Self) -> Self:
        """These where ``mask`` ``[n]`` holds, those of ``other`` elsewhere."""
        theirs = other.as_dict()

        def choose(name: str, mine: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (mine.dim() - 1)), mine, theirs[name])

        return type(self)(**{name: choose(name, value) for name, value in self.as_dict().items()})


class TaskFamily(Protocol):
    """A family of environments whose tasks are tensors."""

    @property
    def name(self) -> str:
        """Its name, as on the command line."""

    @property
    def horizon(self) -> int:
        """Steps after which an episode ends at the latest."""

    @property
    def horizon_terminates(self) -> bool:
        """Whether the end of the horizon is part of the problem (terminated) or a time limit (truncated)."""

    @property
    def fixed_length(self) -> bool:
        """Whether every episode lasts exactly ``horizon`` steps."""

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Of one environment: ``Discrete`` or ``Box``."""

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Of one environment: ``Discrete`` or ``Box``."""

    def sample_tasks(
        self, num_tasks: int, *, generator: torch.Generator | int | None = None, split: str = "train"
    ) -> Tensors:
        """Draw tasks, on the generator's device. ``split`` (``"train"``, ``"validation"`` or ``"test"``) matters where
        a family holds tasks out.
        """


class TaskVectorEnv(Protocol):
    """What a rollout needs of a vector environment; :class:`bayesmeta.rl.envs.TensorVectorEnv` is one."""

    num_envs: int
    single_observation_space: gymnasium.Space[Any]
    single_action_space: gymnasium.Space[Any]

    @property
    def num_tasks(self) -> int:
        """Tasks side by side."""

    @property
    def copies(self) -> int:
        """Environments of each task; ``num_envs = num_tasks × copies``."""

    @property
    def horizon(self) -> int | None:
        """Steps after which an episode ends at the latest; None when unknown."""

    @property
    def episodes_per_trial(self) -> int:
        """Episodes that share a task before a trial ends."""

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""

    @property
    def clock(self) -> Tensor:
        """Steps taken in the running episode, ``[num_envs]`` int64."""

    @property
    def episode(self) -> Tensor:
        """Which episode of its trial is running, from 0, ``[num_envs]`` int64."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Begin a new trial everywhere.

        ``options["tasks"]`` sets the tasks (one for each of ``num_tasks``); ``options["reset_mask"]`` ``[num_envs]``
        resets some environments alone, to the next episode of their trial (needed with ``AutoresetMode.DISABLED``).
        """

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment; see the head of this module."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, the generator's state too: plain tensors and values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit."""


def num_features(space: gymnasium.Space[Any]) -> int:
    """Width of :func:`features` of a space.

    Raises:
        SpaceError: for a space that is neither ``Discrete`` nor ``Box``.
    """
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.n)
    if isinstance(space, gymnasium.spaces.Box):
        return int(torch.Size(space.shape).numel())
    raise _unknown(space)


def features(space: gymnasium.Space[Any], value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Observations or actions as what a network takes: ``Discrete`` one-hot, ``Box`` flat.

    Args:
        space: the space of one environment.
        value: ``[…]`` int64 for ``Discrete``, ``[…, *space.shape]`` for ``Box``.
        dtype: of the result.

    Returns:
        ``[…, num_features(space)]``.

    Raises:
        SpaceError: for a space that is neither ``Discrete`` nor ``Box``.
    """
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.nn.functional.one_hot(value - int(space.start), int(space.n)).to(dtype)
    if isinstance(space, gymnasium.spaces.Box):
        return (
            value.to(dtype).flatten(value.dim() - len(space.shape)) if len(space.shape) else value.to(dtype)[..., None]
        )
    raise _unknown(space)


def _unknown(space: gymnasium.Space[Any]) -> Exception:
    from bayesmeta.errors import SpaceError

    return SpaceError(
        f"the space {space} was given; Discrete and Box spaces are known. Wrap the environment "
        "(gymnasium.wrappers.FlattenObservation, TransformObservation) so that it has one of these"
    )


def check_vector(env: Any) -> None:
    """See that a learner was given environments side by side.

    Raises:
        OptionError: for a family or a single gymnasium environment, saying how to make environments of it.
    """
    from bayesmeta.errors import OptionError

    if hasattr(env, "single_observation_space") and hasattr(env, "num_tasks"):
        return
    what = f"{type(env).__module__.partition('.')[0]}'s {type(env).__name__}"
    raise OptionError(
        f"A learner trains on environments of several tasks side by side; got {what}. Of a family make them by "
        "bm.rl.TensorVectorEnv(family, …), or by family.vector(…) of a bm.rl.GymFamily, which any function from a task "
        "to a gymnasium environment can be."
    )
