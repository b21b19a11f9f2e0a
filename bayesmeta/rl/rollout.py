"""Rollouts: what happened, as ``[time, batch]`` tensors, under an explicit generator.

:func:`collect` steps a vector environment with an **actor**: any callable from a :class:`Moment` (all that may be known
before acting) and a state to an :class:`Acted`. A policy without memory ignores the state. Nothing here has gradients:
a learner computes densities and values again from the rollout's moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from bayesmeta.errors import NonFiniteDataError, OptionError, ShapeError

if TYPE_CHECKING:
    from bayesmeta.rl.protocols import TaskVectorEnv


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is known before an action: ``[batch, …]`` in a step, ``[time, batch, …]`` in a rollout.

    Attributes:
        observation: what to act on, as the environment gave it.
        action: the action before; 0 where a trial begins.
        reward: the reward of that action; 0 where a trial begins.
        ended: whether an episode ended with that action, so that this is the first observation of the next.
        begins: whether a trial begins here: nothing is known yet, and a memory is cleared.
        clock: steps taken in the running episode.
        episode: which episode of its trial is running, from 0.
        successor: the observation that the action before led to, before any reset (``observation`` where a trial
            begins); None in moments that were saved without it.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    ended: Tensor
    begins: Tensor
    clock: Tensor
    episode: Tensor
    successor: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with ``function`` applied to each tensor."""
        parts: dict[str, Any] = {k: None if v is None else function(v) for k, v in vars(self).items()}
        return type(self)(**parts)

    @classmethod
    def stack(cls, moments: Sequence[Moment]) -> Self:
        """Steps to a rollout, time first."""
        names = [name for name, value in vars(moments[0]).items() if all(vars(m)[name] is not None for m in moments)]
        return cls(**{name: torch.stack([getattr(m, name) for m in moments]) for name in names})


class Acted(NamedTuple):
    """What an actor gives.

    Attributes:
        action: ``[batch]`` or ``[batch, size]``.
        log_prob: its log density, ``[batch]``.
        state: the actor's state after the step; None without one.
        value: its estimate of what is to come, ``[batch]``; None without one.
    """

    action: Tensor
    log_prob: Tensor
    state: Any = None
    value: Tensor | None = None


#: An actor: a moment, the state (None at the very first step) and a generator to what it does.
Actor = Callable[[Moment, Any, torch.Generator], Acted]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Steps of a vector environment; tensors are ``[time, batch, …]``, batch = tasks × copies.

    Attributes:
        moments: what was known before each action.
        action, log_prob, reward: what was done, how likely that was, and what it brought.
        terminated, truncated: whether the episode ended with it, and how; never merged.
        trial_ended: whether the trial ended with it.
        successor: the observation it led to, before any reset.
        value: the actor's estimates; None for an actor without.
        first_state: the actor's state before the first step; None for an actor without.
        after: the moment after the last step, at which a next rollout goes on.
        state: the actor's state there.
        tasks, copies: how the batch is made up, task by task.
        extra: what else the environment told, by name.
    """

    moments: Moment
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    trial_ended: Tensor
    successor: Tensor
    value: Tensor | None
    first_state: Any
    after: Moment
    state: Any
    tasks: int
    copies: int
    extra: dict[str, Tensor]

    @property
    def ended(self) -> Tensor:
        """Whether the episode ended with the step, either way."""
        return self.terminated | self.truncated

    def by_task(self, tensor: Tensor) -> Tensor:
        """``[time, batch, …]`` to ``[time, tasks, copies, …]``."""
        return tensor.unflatten(1, (self.tasks, self.copies))

    def first_episodes(self) -> Tensor:
        """Which steps belong to the first episode of each environment, booleans ``[time, batch]``."""
        before = torch.cat([torch.zeros_like(self.ended[:1]), self.ended[:-1]])
        return before.long().cumsum(0) == 0

    def total(self) -> Tensor:
        """Sum of the rewards of each environment, ``[batch]``."""
        return self.reward.sum(0)


def begin(env: TaskVectorEnv, options: dict[str, Any] | None = None) -> Moment:
    """Begin a new trial everywhere: the first moment.

    Args:
        env: a vector environment.
        options: for its ``reset``; ``{"tasks": …}`` sets the tasks.
    """
    observation, _ = env.reset(options=options)
    n, device = env.num_envs, env.device
    discrete = hasattr(env.single_action_space, "n")
    shape = (n,) if discrete else (n, *(env.single_action_space.shape or ()))
    dtype = getattr(env, "dtype", torch.get_default_dtype())
    return Moment(
        observation=observation,
        action=torch.zeros(shape, dtype=torch.long if discrete else dtype, device=device),
        reward=torch.zeros(n, dtype=dtype, device=device),
        ended=torch.zeros(n, dtype=torch.bool, device=device),
        begins=torch.ones(n, dtype=torch.bool, device=device),
        clock=env.clock.clone(),
        episode=env.episode.clone(),
        successor=observation,
    )


@torch.no_grad()
def collect(
    env: TaskVectorEnv,
    actor: Actor,
    steps: int,
    *,
    generator: torch.Generator,
    start: Moment | None = None,
    state: Any = None,
    keep: Sequence[str] = (),
) -> Rollout:
    """Step a vector environment.

    Args:
        env: with autoreset, so that an environment whose episode ended goes on with the next.
        actor: see :data:`Actor`.
        steps: how many; whole episodes are a multiple of the horizon where their length is fixed.
        generator: of the actions. The environment has its own.
        start: where to go on, ``rollout.after``; None begins new trials.
        state: the actor's state there.
        keep: names of further tensors of ``info`` to keep, such as ``"success"``.

    Raises:
        OptionError: for fewer than one step, or a name that ``info`` has not.
        NonFiniteDataError: for a reward that is not finite: the message names step and environment.
        ShapeError: for actions of another number than the environments.
    """
    if steps < 1:
        raise OptionError(f"A rollout needs at least one step; got steps={steps}.")
    moment = begin(env) if start is None else start
    first_state, rows = state, []
    extra: dict[str, list[Tensor]] = {name: [] for name in keep}
    for _ in range(steps):
        acted = actor(moment, state, generator)
        if len(acted.action) != env.num_envs or acted.log_prob.shape != (env.num_envs,):
            raise ShapeError(
                f"The actor gave actions {list(acted.action.shape)} with densities {list(acted.log_prob.shape)}; "
                f"expected one for each of {env.num_envs} environments."
            )
        observation, reward, terminated, truncated, info = env.step(acted.action)
        rows.append((moment, acted, reward, terminated, truncated, info["trial_ended"], info["final_obs"]))
        for name in keep:
            if name not in info:
                raise OptionError(f"This environment tells nothing named {name!r}; it tells {', '.join(info)}.")
            extra[name].append(info[name])
        state, moment = acted.state, _next(env, observation, acted.action, reward, terminated | truncated, info)
    columns = list(zip(*rows, strict=True))
    acts: Sequence[Acted] = columns[1]
    rewards = torch.stack(columns[2])
    _check_rewards(rewards, env.copies)
    values = None if acts[0].value is None else torch.stack([a.value for a in acts if a.value is not None])
    return Rollout(
        moments=Moment.stack(columns[0]),
        action=torch.stack([a.action for a in acts]),
        log_prob=torch.stack([a.log_prob for a in acts]),
        reward=rewards,
        terminated=torch.stack(columns[3]),
        truncated=torch.stack(columns[4]),
        trial_ended=torch.stack(columns[5]),
        successor=torch.stack(columns[6]),
        value=values,
        first_state=first_state,
        after=moment,
        state=state,
        tasks=env.num_tasks,
        copies=env.copies,
        extra={name: torch.stack(values) for name, values in extra.items()},
    )


def _next(
    env: TaskVectorEnv, observation: Tensor, action: Tensor, reward: Tensor, ended: Tensor, info: dict[str, Any]
) -> Moment:
    """The moment after a step. Where a trial ended, nothing of it is told to the next."""
    begins = info["trial_ended"]
    fresh, new = (begins.view(-1, *[1] * (x.dim() - 1)) for x in (action, observation))
    return Moment(
        observation=observation,
        action=torch.where(fresh, torch.zeros_like(action), action),
        reward=torch.where(begins, 0.0, reward),
        ended=ended & ~begins,
        begins=begins,
        clock=env.clock.clone(),
        episode=env.episode.clone(),
        successor=torch.where(new, observation, info["final_obs"]),
    )


def _check_rewards(rewards: Tensor, copies: int) -> None:
    if not torch.isfinite(rewards).all():
        step, index = (~torch.isfinite(rewards)).nonzero()[0].tolist()
        raise NonFiniteDataError(
            f"The environment gave the reward {rewards[step, index].item()} in step {step} to environment {index} "
            f"(task {index // copies}, copy {index % copies}); expected finite rewards. Check the reward function."
        )
