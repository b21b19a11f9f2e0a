"""What a run needs of a learner, and the curve that says what adaptation brings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from bayesmeta.errors import HorizonError
from bayesmeta.ops.random import Seed
from bayesmeta.rl.protocols import TaskVectorEnv

if TYPE_CHECKING:
    from bayesmeta.rl.latent.beliefs import BeliefPath
    from bayesmeta.rl.latent.contexts import ContextSpec
    from bayesmeta.rl.rollout import Rollout


class AdaptationCurve(NamedTuple):
    """Return after 0, 1, 2, … episodes of a trial, or after 0, 1, 2, … gradient steps, task by task.

    Attributes:
        returns: undiscounted, ``[points, tasks]``; the mean over a task's copies.
        unit: what adaptation goes by, ``"episode"`` or ``"step"``.
        success: share of the episodes that reached the goal, ``[points, tasks]``, where the environment says so.
        lengths: steps of an episode, ``[points, tasks]``, where a learner knows them.
    """

    returns: Tensor
    unit: str
    success: Tensor | None = None
    lengths: Tensor | None = None

    def mean(self) -> list[float]:
        """Mean over tasks at each point."""
        return [float(x) for x in self.returns.mean(1)]

    def cpu(self) -> AdaptationCurve:
        """The same on the CPU."""
        success, lengths = (None if x is None else x.cpu() for x in (self.success, self.lengths))
        return AdaptationCurve(self.returns.cpu(), self.unit, success, lengths)

    def standard_error(self) -> list[float]:
        """Standard error of that mean, over tasks; NaN for a single task."""
        return standard_error(self.returns)


def standard_error(values: Tensor) -> list[float]:
    """Standard errors of means over the second dimension of ``[points, tasks]``; NaN for a single task."""
    tasks = values.shape[1]
    if tasks < 2:
        return [math.nan] * len(values)
    return [float(x) / tasks**0.5 for x in values.std(1)]


class Learner(Protocol):
    """What :func:`bayesmeta.rl.fit` trains: :class:`~bayesmeta.rl.memory.rl2.RL2` and
    :class:`~bayesmeta.rl.policy_gradient.maml_rl.MAMLRL` are learners.

    Attributes:
        env: the environments that it trains on.
        policy: what it trains.
        iteration: iterations done.
        history: one dict of numbers an iteration.
    """

    env: TaskVectorEnv
    policy: Any
    iteration: int
    history: list[dict[str, float]]

    def train(self, iterations: int) -> list[dict[str, float]]:
        """Do some iterations; the history of this call."""

    def curve(self, env: TaskVectorEnv, *, points: int | None = None, generator: Seed = None) -> AdaptationCurve:
        """What adaptation brings on the tasks of other environments.

        Args:
            env: of held-out tasks. It is reset.
            points: how many gradient steps to take; None is as trained. The episodes of a trial are the environment's.
            generator: of the actions; None means seed 0.
        """

    def options(self) -> dict[str, Any]:
        """The options that change what it learns, as plain values; a resumed run must share them."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of a run depends on, the environment's state too: tensors and plain values."""

    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Take what a state has learned alone, to act and not to go on training."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit."""


@runtime_checkable
class HasBeliefs(Protocol):
    """What a learner with beliefs over tasks has besides: its beliefs on the way through a trial.

    :class:`~bayesmeta.rl.varibad.learner.VariBAD`, :class:`~bayesmeta.rl.off_policy.pearl.PEARL` and
    :class:`~bayesmeta.rl.off_policy.distilled.DistilledLatents` have them.
    """

    @property
    def belief_spec(self) -> ContextSpec:
        """What stands in the context of these beliefs."""

    def belief_path(
        self, env: TaskVectorEnv, *, greedy: bool = True, generator: Seed = None
    ) -> tuple[BeliefPath, Rollout]:
        """The beliefs on the way through one trial in each environment, and the rollout that they are of.

        Args:
            env: of held-out tasks. It is reset.
            greedy: take the likeliest actions, else draw.
            generator: of whatever is random; None means seed 0.

        Raises:
            UnsupportedError: when its beliefs are not one Gaussian for each task.
        """


@runtime_checkable
class Remembers(Protocol):
    """What a learner with a large state may have besides, so that a run need not copy it in each iteration.

    :class:`~bayesmeta.rl.off_policy.sac_learner.SAC`, :class:`~bayesmeta.rl.off_policy.pearl.PEARL` and
    :class:`~bayesmeta.rl.off_policy.distilled.DistilledLatents` have it, for their replay buffers.
    """

    def remember(self) -> Callable[[], dict[str, Any]]:
        """A function that gives the ``state_dict`` of this moment, also when training has gone on."""


def horizon_of(env: Any, why: str) -> int:
    """Steps of an episode at most.

    Args:
        env: a vector environment.
        why: what needs to know it, as the message says it.

    Raises:
        HorizonError: when the environment has no known horizon.
    """
    horizon = getattr(env, "horizon", None)
    if horizon is None:
        raise HorizonError(
            f"This environment has no known horizon, and {why}. Give its vector environment a horizon "
            "(gymnasium.wrappers.TimeLimit)."
        )
    return int(horizon)
