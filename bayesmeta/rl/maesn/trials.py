"""MAESN episode by episode: a trial explores with latents of the prior until something was hit, and then goes there.

An inner step as it is trained reads a batch of episodes. In a trial they come one by one, and each should bring what it
can: an episode is drawn from the prior as long as no credit was earned, and played at the mean of the adapted q after
that (whatever ``adapted`` is: a draw of a q whose σ is still that of the prior would look elsewhere). The step always
begins at the prior and reads the episodes that were drawn from it; those that were played at the mean are not draws of
q, and are not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator, normal_like
from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.maesn.inner import latent_actor
from bayesmeta.rl.maesn.policy import latent_distribution
from bayesmeta.rl.policy_gradient.inner import check_tasks_stay
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.rollout import begin, collect

if TYPE_CHECKING:
    from bayesmeta.rl.maesn.learner import MAESN


@torch.no_grad()
def trial_curve(
    learner: MAESN,
    env: TaskVectorEnv,
    *,
    inner_steps: int | None = None,
    generator: Seed = None,
    greedy: bool = True,
) -> AdaptationCurve:
    """Return of each episode of trials, ``[episodes, tasks]``: what an episode brings after 0, 1, 2, … others.

    Args:
        learner: with ``credit="share"`` and ``gradient="score"``, the step of which needs no other trial of the task.
        env: each environment is a trial of its own; copies are further trials, over which is averaged.
        inner_steps: of each episode's adaptation; None is as trained. Only 1 is possible: a second step would need
            further episodes, drawn from the q after the first.
        generator: of latents and actions; None means seed 0.
        greedy: take the likeliest actions, so that latents alone explore.

    Raises:
        OptionError: for a learner whose step compares episodes, reads actions or adapts θ, for another number of steps
            than 1, and for environments that draw new tasks.
    """
    check_tasks_stay(env)
    config = learner.config
    steps = config.inner_steps if inner_steps is None else inner_steps
    if steps != 1:
        raise OptionError(
            f"An episode of a trial is played after one step from the prior; got {steps} (points, or the inner_steps "
            "that it was trained with). Give points=1, or use environments with episodes_per_trial=1: their copies are "
            "the episodes of several steps."
        )
    if config.credit != "share" or config.gradient != "score" or config.policy_lr > 0:
        raise OptionError(
            f"A step after each episode of a trial needs credit='share', gradient='score' and policy_lr=0; got "
            f"{config.credit!r}, {config.gradient!r} and {config.policy_lr}. Use environments with "
            "episodes_per_trial=1: their copies are the episodes of a step."
        )
    generator = as_generator(generator, env.device, "evaluation")
    theta, _ = learner.parts(learner.theta)
    shape = (env.num_tasks, env.copies, learner.policy.latent)
    drawn: list[Tensor] = []
    credit: list[Tensor] = []
    returns = []
    for _ in range(env.episodes_per_trial):
        noise = normal_like(theta, shape, generator)
        found, knows = _adapted(learner, drawn, credit, noise)
        z = torch.where(knows, found, noise)
        actor = latent_actor(learner.policy, theta, z, env, greedy=greedy)
        horizon = int(env.horizon or learner.horizon)
        rollout = collect(env, actor, horizon, generator=generator, start=begin(env))
        first = rollout.first_episodes()
        discount = config.estimation.gamma ** rollout.moments.clock.to(theta)
        worth = torch.where(first, discount * rollout.reward, 0.0).sum(0).unflatten(0, shape[:2])
        if bool((worth < 0).any()):
            raise OptionError(f"credit='share' needs returns of 0 or more; got {worth.min().item():.3g}.")
        returns.append(torch.where(first, rollout.reward, 0.0).sum(0).unflatten(0, shape[:2]).mean(1))
        drawn.append(noise)
        credit.append(torch.where(knows.squeeze(-1), 0.0, worth))
    return AdaptationCurve(torch.stack(returns), "episode")


def _adapted(learner: MAESN, drawn: list[Tensor], credit: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each trial's q after the inner step, and whether there was anything to learn from, ``[…, 1]``.

    Of the prior Normal(0, 1) the score of μ is z itself, and the Fisher information 1: the natural step is the plain
    one.
    """
    if not drawn:
        return torch.zeros_like(like), torch.zeros_like(like[..., :1], dtype=torch.bool)
    total = torch.stack(credit).sum(0)
    weights = torch.stack(credit) / torch.where(total > 0, total, 1.0)
    omega = like.new_zeros(*like.shape[:-1], 2 * like.shape[-1]).requires_grad_()
    with torch.enable_grad():
        score = (weights * latent_distribution(omega).log_prob(torch.stack(drawn))).sum()
        (slope,) = torch.autograd.grad(score, omega)
    rate = learner.parts(learner.theta)[1]
    loc, _ = (rate * slope).chunk(2, -1)
    return loc, (total > 0).unsqueeze(-1)
