"""What an inner step of MAESN learns from: episodes that each hold a latent, and the gradient for what they came from.

An episode's decisions are its latent and then its actions. The step climbs the expected return of a task by either of
two gradients for ω: that of the latent's own density (``"score"``), which needs nothing but the episodes' returns, or
through the latent into the density of the actions (``"pathwise"``).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import normal_like
from bayesmeta.rl.maesn.policy import LatentPolicy, latent_distribution, latents
from bayesmeta.rl.policies import mode, sample
from bayesmeta.rl.policy_gradient.inner import Estimation, TaskSteps, task_steps
from bayesmeta.rl.policy_gradient.objectives import likelihood_ratio, loaded_dice, policy_gradient, standardised
from bayesmeta.rl.policy_gradient.returns import LinearBaseline
from bayesmeta.rl.protocols import TaskVectorEnv, features
from bayesmeta.rl.rollout import Acted, Actor, Moment, begin, collect

#: Through what ω's inner gradient goes.
Gradient = Literal["score", "pathwise"]
#: What an episode's return becomes before its latent is credited with it.
Credit = Literal["standardised", "centred", "raw", "share"]


class LatentSteps(NamedTuple):
    """One episode in each environment, each with its latent; without gradients.

    Attributes:
        steps: the actions; advantages are of the reward that is learned from, returns those of the environment.
        noise: that the latents were made of, ``[tasks, copies, latent]``.
        z: the latents, of that shape.
        log_q: their density under the ω that they were drawn from, ``[tasks, copies]``.
        credit: how good each episode was, ``[tasks, copies]``.
        learned: undiscounted sum of the reward that is learned from, ``[tasks, copies]``.
    """

    steps: TaskSteps
    noise: Tensor
    z: Tensor
    log_q: Tensor
    credit: Tensor
    learned: Tensor


def latent_actor(policy: LatentPolicy, theta: Tensor, z: Tensor, env: TaskVectorEnv, *, greedy: bool = False) -> Actor:
    """The actor that holds a latent for each environment.

    Args:
        policy: π(a | s, z).
        theta: ``[D]`` or ``[tasks, D]``.
        z: ``[tasks, copies, latent]``.
        env: whose observations it acts on.
        greedy: take the likeliest action.
    """
    theta, split = theta.detach(), (env.num_tasks, env.copies)

    def act(moment: Moment, state: Any, generator: torch.Generator) -> Acted:
        seen = features(env.single_observation_space, moment.observation, theta.dtype).unflatten(0, split)
        distribution = policy.distribution(theta, seen, z)
        action = mode(distribution) if greedy else sample(distribution, generator)
        return Acted(action.flatten(0, 1), distribution.log_prob(action).flatten())

    return act


@torch.no_grad()
def latent_episodes(
    env: TaskVectorEnv,
    policy: LatentPolicy,
    theta: Tensor,
    omega: Tensor,
    generator: torch.Generator,
    *,
    horizon: int,
    estimation: Estimation,
    reward: str | None = None,
    credit: Credit = "standardised",
    inner: bool,
    at_mean: bool = False,
    greedy: bool = False,
) -> LatentSteps:
    """One episode in each environment, a fresh latent each, held to its end.

    Args:
        env: begins anew.
        policy, theta: see :func:`latent_actor`.
        omega: of each task, ``[tasks, 2 × latent]``.
        generator: of latents and actions.
        horizon: steps of an episode at most.
        estimation: of advantages.
        reward: name in the environment's ``info`` of the reward that is learned from; None is its own.
        credit: see :func:`episode_credit`.
        inner: advantages in the units of the credit, for an inner step; else as ``estimation`` says.
        at_mean: latents are the mean of each task's q, all the same.
        greedy: take the likeliest actions.
    """
    noise = normal_like(omega, (env.num_tasks, env.copies, policy.latent), generator)
    noise = torch.zeros_like(noise) if at_mean else noise
    z = latents(omega, noise)
    actor = latent_actor(policy, theta, z, env, greedy=greedy)
    keep = () if reward is None else (reward,)
    rollout = collect(env, actor, horizon, generator=generator, start=begin(env), keep=keep)
    own = torch.where(rollout.first_episodes(), rollout.reward, 0.0).sum(0).unflatten(0, noise.shape[:2])
    if reward is not None:
        rollout = dataclasses.replace(rollout, reward=rollout.extra[reward].to(rollout.reward))
    plain = dataclasses.replace(estimation, standardise=estimation.standardise and not inner)
    steps = task_steps(rollout, env, plain, LinearBaseline())
    discount = estimation.gamma ** rollout.by_task(rollout.moments.clock).to(noise)
    counted = torch.where(steps.mask, rollout.by_task(rollout.reward), 0.0)
    worth, unit = episode_credit((discount * counted).sum(0), credit if inner else "raw")
    if inner:
        steps = steps._replace(advantage=steps.advantage / unit)
    log_q = latent_distribution(omega.unsqueeze(1)).log_prob(z)
    return LatentSteps(steps._replace(returns=own), noise, z, log_q, worth, counted.sum(0))


def episode_credit(returns: Tensor, credit: Credit) -> tuple[Tensor, Tensor]:
    """What the latents of a task's episodes are credited with.

    Args:
        returns: ``[tasks, copies]``.
        credit: ``"raw"`` is the return; ``"centred"`` the return less the mean of the task's other episodes, without
            bias; ``"standardised"`` that with mean 0 and deviation 1 over the task's episodes, and 0 where all are
            equal, so that a rate does not hang on the scale of the rewards; ``"share"`` is the return over the mean of
            the task's returns, and 0 where that is 0: the gradient is then that of the **log** of the expected return,
            for rewards that are never negative. A single hit among many misses weighs as much as many hits.

    Returns:
        The credit, and by what returns were divided ``[tasks, 1]``.

    Raises:
        OptionError: for ``"share"`` with a negative return.
    """
    one = torch.ones_like(returns[:, :1])
    copies = returns.shape[1]
    if credit == "raw":
        return returns, one
    if credit == "centred":
        # the only episode of a task has no others
        return (returns - returns.mean(1, keepdim=True)) * (copies / (copies - 1)) if copies > 1 else returns, one
    if credit == "share":
        if bool((returns < 0).any()):
            raise OptionError(
                f"credit='share' takes shares of a total, and a return is {returns.min().item():.3g}; expected rewards "
                "that are never negative. Take 'standardised' or 'centred'."
            )
        mean = returns.mean(1, keepdim=True)
        unit = torch.where(mean > 0, mean, one)
        return returns / unit, unit
    spread = returns.std(1, correction=0, keepdim=True)
    return standardised(returns, dims=(1,)), torch.where(spread > 0, spread, one)


def expected_return(
    policy: LatentPolicy,
    omega: Tensor,
    theta: Tensor,
    episodes: LatentSteps,
    estimation: Estimation,
    gradient: Gradient,
) -> Tensor:
    """A number for each task whose gradient estimates that of its expected return, ``[tasks]``; its value is none.

    Args:
        policy: π(a | s, z).
        omega: ``[tasks, 2 × latent]``, differentiable.
        theta: ``[D]`` or ``[tasks, D]``.
        episodes: each task's own, as an inner step takes them.
        estimation: whose ``estimator`` says how second derivatives are made.
        gradient: through what ω's gradient goes.
    """
    steps = episodes.steps
    score = gradient == "score"
    if score and estimation.estimator != "dice" and theta.dim() == 1:  # actions say nothing of ω: no network is run
        return _terms(_log_q(omega, episodes), episodes.log_q, episodes.credit, estimation).mean(1)
    z = episodes.z if score else latents(omega, episodes.noise)
    log_prob = policy.distribution(theta, steps.features, z).log_prob(steps.action)
    # the density of what does not count may be anything
    log_prob, old = (torch.where(steps.mask, x, 0.0) for x in (log_prob, steps.log_prob))
    advantage = torch.where(steps.mask, steps.advantage, 0.0)
    if score:
        log_prob = torch.cat([_log_q(omega, episodes)[None], log_prob])
        old = torch.cat([episodes.log_q[None], old])
        advantage = torch.cat([episodes.credit[None], advantage])
    if estimation.estimator == "dice":
        never = torch.zeros_like(advantage, dtype=torch.bool)  # one episode each: what is behind its end counts 0
        terms = loaded_dice(log_prob, advantage, never, decay=estimation.decay, old_log_prob=old)
    else:
        terms = _terms(log_prob, old, advantage, estimation)
    return terms.sum(0).mean(1)


def _log_q(omega: Tensor, episodes: LatentSteps) -> Tensor:
    return latent_distribution(omega.unsqueeze(1)).log_prob(episodes.z)


def _terms(log_prob: Tensor, old: Tensor, advantage: Tensor, estimation: Estimation) -> Tensor:
    if estimation.estimator == "policy_gradient":
        return policy_gradient(log_prob, advantage)
    return likelihood_ratio(log_prob, old, advantage)


def latent_step(
    policy: LatentPolicy,
    phi: Tensor,
    theta: Tensor,
    episodes: LatentSteps,
    rate: Tensor,
    estimation: Estimation,
    gradient: Gradient,
    *,
    create_graph: bool,
    natural: bool = False,
) -> Tensor:
    """φ + rate ∘ ∇ (expected return), for all tasks.

    Args:
        policy: π(a | s, z).
        phi: ω of each task ``[tasks, 2 × latent]``, or ω and θ side by side where θ adapts too.
        theta: the shared θ ``[D]``; not read where φ has its own.
        episodes: each task's own.
        rate: of each number of φ.
        estimation, gradient: see :func:`expected_return`.
        create_graph: keep the second derivative for the outer gradient.
        natural: ω's gradient over the Fisher information of q_ω (1 / σ² of μ, 2 of log σ): the step of μ is then in
            units of σ, whatever that is. D. Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014,
            https://jmlr.org/papers/v15/wierstra14a.html, section 3.4.

    Returns:
        φ after the step, of the same shape.
    """
    at = phi if phi.requires_grad else phi.detach().requires_grad_()
    with torch.enable_grad():
        omega, own = split_phi(at, theta, policy.latent)
        objective = expected_return(policy, omega, own, episodes, estimation, gradient).sum()
        (slope,) = torch.autograd.grad(objective, at, create_graph=create_graph)
    if natural:
        slope = torch.cat([_natural(at[:, : 2 * policy.latent], slope), slope[:, 2 * policy.latent :]], -1)
    return phi + rate * slope


def _natural(omega: Tensor, slope: Tensor) -> Tensor:
    scale = latent_distribution(omega).base_dist.scale
    of_loc, of_log_scale = slope[:, : omega.shape[-1]].chunk(2, -1)
    return torch.cat([scale.square() * of_loc, of_log_scale / 2], -1)


def split_phi(phi: Tensor, theta: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """φ as ω ``[tasks, 2 × latent]`` and the θ to act with: φ's own ``[tasks, D]``, or the shared ``[D]``."""
    if phi.shape[-1] == 2 * latent:
        return phi, theta
    return phi[..., : 2 * latent], phi[..., 2 * latent :]
