"""Policy-gradient steps on the φ of many tasks at once, differentiable through the step: the inside of MAML-RL.

A rollout of ``tasks × copies`` environments becomes a :class:`TaskSteps` of ``[time, tasks, copies]``. One step climbs
each task's own objective; tasks are independent, so the gradient of the sum over them gives each its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from bayesmeta.errors import NonFiniteDataError, OptionError, ShapeError, SpaceError
from bayesmeta.rl.policies import sample
from bayesmeta.rl.policy_gradient.objectives import (
    average,
    deviation,
    likelihood_ratio,
    loaded_dice,
    policy_gradient,
    standardised,
)
from bayesmeta.rl.policy_gradient.returns import LinearBaseline, advantages, discounted_returns
from bayesmeta.rl.protocols import TaskVectorEnv, features, num_features
from bayesmeta.rl.rollout import Acted, Actor, Moment, Rollout

Estimator = Literal["likelihood_ratio", "dice", "policy_gradient"]


class PhiPolicy(Protocol):
    """A policy with one φ a task, such as :class:`~bayesmeta.rl.policies.TaskPolicy`."""

    def begin(self, theta: Tensor, tasks: int) -> Tensor:
        """Where each task's φ begins, ``[tasks, D]``, a differentiable function of θ."""

    def distribution(self, phi: Tensor, features: Tensor, theta: Tensor | None = None) -> Any:
        """Each task's policy in its own states ``[…, tasks, copies, F]``."""


class TaskSteps(NamedTuple):
    """What a policy gradient needs of a rollout; each ``[time, tasks, copies, …]``, without gradients.

    Attributes:
        features: of the observations, ``[time, tasks, copies, F]``.
        action: what was done.
        log_prob: its density under the policy that acted.
        advantage: how much better than expected it turned out.
        ended: whether the episode ended after the step.
        mask: which steps count: those of each environment's first episode.
        returns: undiscounted reward of the first episode, ``[tasks, copies]``.
        scale: what the advantages of each task were divided by, ``[tasks]``; None where they were not.
    """

    features: Tensor
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    ended: Tensor
    mask: Tensor
    returns: Tensor
    scale: Tensor | None = None


#: the parts of :class:`TaskSteps` that have no time
_OF_EPISODES = ("returns", "scale")


@dataclasses.dataclass(frozen=True)
class Estimation:
    """How advantages and inner gradients are estimated.

    Attributes:
        gamma: discount.
        lam: λ of the advantages.
        standardise: each task's advantages to mean 0 and deviation 1, so that a rate does not hang on its rewards.
        estimator: of the inner objective; they share their first derivative and differ in the second:
            ``"likelihood_ratio"`` (ProMP's, low variance, some bias), ``"dice"`` (no bias with
            ``standardise=False``, in the limit of many episodes; variance that grows with the horizon, which ``decay``
            trades), ``"policy_gradient"`` (Finn et al. 2017; leaves out that actions were drawn).
        decay: of ``"dice"``, see :func:`~bayesmeta.rl.policy_gradient.objectives.loaded_dice`.

    Raises:
        OptionError: for settings outside their range.
    """

    gamma: float = 0.99
    lam: float = 1.0
    standardise: bool = True
    estimator: Estimator = "likelihood_ratio"
    decay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gamma", "lam", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} must be in [0, 1]; got {getattr(self, name)}.")
        if self.estimator not in get_args(Estimator):
            raise OptionError(
                f"Unknown estimator {self.estimator!r}; expected one of {', '.join(get_args(Estimator))}."
            )


@torch.no_grad()
def check_policy(policy: Any, env: TaskVectorEnv) -> None:
    """See whether a policy is for the observations and actions of an environment, by asking it once.

    Raises:
        SpaceError: saying what it reads or gives, and what is expected.
    """
    space, width = env.single_action_space, num_features(env.single_observation_space)
    theta = policy.theta.detach()
    try:
        found = policy.distribution(policy.begin(theta, 1), theta.new_zeros(1, 1, width), theta)
    except RuntimeError as error:
        raise SpaceError(
            f"the policy's network cannot read the observations, {width} numbers of {env.single_observation_space}: "
            f"{error} Make it with as many inputs (a ContextPolicy's has those of the context too)."
        ) from error
    chooses = hasattr(found, "logits")
    given = f"{found.logits.shape[-1]} choices" if chooses else f"{found.event_shape.numel()} numbers"
    expected = f"{num_features(space)} {'choices' if hasattr(space, 'n') else 'numbers'}"
    if given != expected:
        raise SpaceError(
            f"the policy's actions are {given}; the environment's are {space}, {expected}. Take the head that "
            "head_for(env.single_action_space) makes, and a network of as many outputs as head.outputs."
        )


def check_tasks_stay(env: Any) -> None:
    """See that what adapts on the tasks of an environment is played on the same ones.

    Raises:
        OptionError: for environments that draw new tasks whenever a trial begins.
    """
    if getattr(env, "new_tasks", False):
        raise OptionError(
            "This environment draws new tasks whenever a trial begins (new_tasks=True), so that a policy would adapt "
            "on one task and be played on another. Make it with new_tasks=False."
        )


def phi_actor(policy: PhiPolicy, phi: Tensor, theta: Tensor, env: TaskVectorEnv, *, greedy: bool = False) -> Actor:
    """The actor that takes each task's own φ.

    Args:
        policy: see :class:`PhiPolicy`.
        phi: ``[tasks, D]``.
        theta: shared parameters.
        env: whose observations it acts on, batch = tasks × copies.
        greedy: take the likeliest action.
    """
    from bayesmeta.rl.policies import mode

    if len(phi) != env.num_tasks:
        raise ShapeError(f"phi is for {len(phi)} tasks; the environment has {env.num_tasks}.")
    phi, theta = phi.detach(), theta.detach()
    split = (env.num_tasks, env.copies)

    def act(moment: Moment, state: Any, generator: torch.Generator) -> Acted:
        seen = features(env.single_observation_space, moment.observation, phi.dtype).unflatten(0, split)
        distribution = policy.distribution(phi, seen, theta)
        action = mode(distribution) if greedy else sample(distribution, generator)
        return Acted(action.flatten(0, 1), distribution.log_prob(action).flatten())

    return act


@torch.no_grad()
def task_steps(rollout: Rollout, env: TaskVectorEnv, estimation: Estimation, baseline: LinearBaseline) -> TaskSteps:
    """A rollout from the begin of an episode, made ready for policy gradients.

    The reward of the first episode of each environment counts, up to its end or that of the rollout: the horizon is
    part of what is maximised here, as in Finn et al. 2017, so that nothing is bootstrapped behind it.

    Args:
        rollout: of the policy as it is.
        env: that it came from.
        estimation: settings.
        baseline: fitted to each task by itself.

    Raises:
        NonFiniteDataError: for rewards that are not finite, or too large for their spread to be.
    """
    by_task = rollout.by_task
    seen = features(env.single_observation_space, rollout.moments.observation, rollout.log_prob.dtype)
    reward, ended, mask = by_task(rollout.reward), by_task(rollout.ended), by_task(rollout.first_episodes())
    never, seen, clock = torch.zeros_like(ended), by_task(seen), by_task(rollout.moments.clock)
    returns = discounted_returns(reward, ended, never, gamma=estimation.gamma)
    values = baseline.fit_predict(seen, clock, returns, mask)
    after = torch.cat([values[1:], torch.zeros_like(values[:1])])
    last = ended.clone()
    last[-1] = True
    advantage = advantages(reward, values, after, last, never, gamma=estimation.gamma, lam=estimation.lam)
    scale = None
    if estimation.standardise:
        scale = deviation(advantage, mask, dims=(0, 2)).flatten()
        advantage = standardised(advantage, mask, dims=(0, 2))
        if not torch.isfinite(scale).all():
            raise NonFiniteDataError(
                f"The rewards reach {reward.abs().max().item():g}, too large for the spread of advantages in "
                f"{advantage.dtype}. Scale the environment's rewards."
            )
    return TaskSteps(
        features=seen,
        action=by_task(rollout.action),
        log_prob=by_task(rollout.log_prob),
        advantage=advantage,
        ended=ended,
        mask=mask,
        returns=torch.where(mask, reward, 0.0).sum(0),
        scale=scale,
    )


def to_the_last(steps: TaskSteps) -> TaskSteps:
    """Without the time behind the last step that counts, where all first episodes have ended."""
    length = int(steps.mask.flatten(1).any(1).sum())
    if length == len(steps.mask):
        return steps
    return steps._replace(**{n: v[:length] for n, v in steps._asdict().items() if n not in _OF_EPISODES})


def first_copies(steps: TaskSteps, number: int) -> TaskSteps:
    """The first ``number`` environments of each task; advantages stay those computed from all."""
    kept = {n: v[:, :, :number] for n, v in steps._asdict().items() if n not in _OF_EPISODES}
    return steps._replace(**kept, returns=steps.returns[:, :number])


def inner_objective(distribution: Any, steps: TaskSteps, estimation: Estimation) -> Tensor:
    """What one inner step climbs, the mean over a task's steps, ``[tasks]``.

    Args:
        distribution: the tasks' policies in the steps' states.
        steps: of the policy that acted.
        estimation: settings.
    """
    log_prob = distribution.log_prob(steps.action)
    if estimation.estimator == "dice":
        terms = loaded_dice(log_prob, steps.advantage, steps.ended, decay=estimation.decay, old_log_prob=steps.log_prob)
    elif estimation.estimator == "likelihood_ratio":
        terms = likelihood_ratio(log_prob, steps.log_prob, steps.advantage)
    else:
        terms = policy_gradient(log_prob, steps.advantage)
    return average(terms, steps.mask, (0, 2))


def inner_step(
    policy: PhiPolicy,
    phi: Tensor,
    theta: Tensor,
    steps: TaskSteps,
    rate: float | Tensor,
    estimation: Estimation,
    *,
    create_graph: bool,
) -> Tensor:
    """φ + rate ∇ objective, for all tasks.

    Args:
        policy: see :class:`PhiPolicy`.
        phi: ``[tasks, D]``.
        theta: shared parameters.
        steps: each task's own.
        rate: a number, or one for each task parameter ``[D]``.
        estimation: settings.
        create_graph: keep the second derivative for the outer gradient; False is first order.

    Returns:
        ``[tasks, D]``.
    """
    at = phi if phi.requires_grad else phi.detach().requires_grad_()
    with torch.enable_grad():
        objective = inner_objective(policy.distribution(at, steps.features, theta), steps, estimation).sum()
        (slope,) = torch.autograd.grad(objective, at, create_graph=create_graph)
    return phi + rate * slope


def sampling_score(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, score: Tensor) -> Tensor:
    """The term by which exploration is credited with what it taught: Σ log π(a | s) × score, ``[tasks]``.

    The steps that an adaptation learned from were drawn from π_θ, which moves with θ. Its gradient is that of
    E-MAML: B. C. Stadie et al., "Some Considerations on Learning to Explore via Meta-Reinforcement Learning", NeurIPS
    2018, https://arxiv.org/abs/1803.01118, eq. 4. All steps of all copies of a task count, since the adapted φ hangs on
    each.

    Args:
        log_prob: of the steps before an adaptation, ``[time, tasks, copies]``, differentiable.
        old_log_prob: that of the policy that acted: the term itself is 0 for it.
        mask: which steps count.
        score: how good the adapted policy was, less a baseline, ``[tasks]``.
    """
    change = torch.where(mask, log_prob - old_log_prob.detach(), 0.0).sum((0, 2))
    return change * score.detach()
