"""Trials under a latent that is inferred anew whenever an episode begins: posterior sampling and its like.

Posterior sampling (Thompson sampling over whole episodes): a task is drawn from the belief, and acted on as if it were
true until the episode ends. Source: W. R. Thompson, "On the likelihood that one unknown probability exceeds another in
view of the evidence of two samples", Biometrika 1933, https://doi.org/10.1093/biomet/25.3-4.285; over episodes,
M. Strens, "A Bayesian Framework for Reinforcement Learning", ICML 2000; over latents, K. Rakelly et al. (PEARL), 2019,
https://arxiv.org/abs/1903.08254, section 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError
from bayesmeta.rl.learner import horizon_of
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.rollout import Acted, Moment, Rollout, begin, collect

#: How an episode's latent comes from the belief: a draw, the belief's mean, or a draw from the prior whatever happened.
Exploration = Literal["posterior_sampling", "mean", "prior"]
#: From contexts and the episode that begins in each environment, ``[n]``, to latents ``[n, D]``.
Infer = Callable[[Observations, Tensor, torch.Generator], Tensor]
#: From observations ``[n, …]`` and latents ``[n, D]`` to actions and their log densities.
Act = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Belief(Protocol):
    """What :func:`inferring` needs: :class:`~bayesmeta.rl.latent.core.LatentContext`, or whatever has these."""

    def prior(self, *batch: int) -> Any:
        """p(z), of batch shape ``[*batch]``."""

    def posterior(self, context: Observations) -> Any:
        """q(z | context), of batch shape ``[tasks]``."""

    def sample(self, q: Any, num_samples: int = 1, generator: torch.Generator | int | None = None) -> Tensor:
        """Draws ``[num_samples, tasks, D]``."""


class Contexts(Protocol):
    """What :func:`play` needs of a :class:`~bayesmeta.rl.latent.contexts.ContextSpec`."""

    def empty(self, tasks: int, like: Tensor) -> Observations:
        """A context of no transition."""

    def of_rollout(self, rollout: Rollout, *, trial: Any = "all", by_task: bool = False) -> Observations:
        """The transitions of a rollout."""


def inferring(belief: Belief, exploration: Exploration = "posterior_sampling", prior_episodes: int = 1) -> Infer:
    """How latents are inferred from a belief.

    Args:
        belief: see :class:`Belief`.
        exploration: ``"posterior_sampling"``: a draw; ``"mean"``: greedy, the mean of the belief, which explores
            nothing on purpose; ``"prior"``: a draw that ignores what happened.
        prior_episodes: of ``"posterior_sampling"``, the first episodes of a trial draw from the prior (PEARL's
            exploration trajectories). The very first does in any case, since nothing has happened.

    Raises:
        OptionError: for another way, or a number below 1.
    """
    if exploration not in get_args(Exploration):
        names = ", ".join(map(repr, get_args(Exploration)))
        raise OptionError(f"Unknown exploration {exploration!r}; expected one of {names}.")
    if prior_episodes < 1:
        raise OptionError(f"prior_episodes must be at least 1, since at first nothing is known; got {prior_episodes}.")

    def infer(context: Observations, episode: Tensor, generator: torch.Generator) -> Tensor:
        n = context.num_tasks
        q = belief.prior(n) if exploration == "prior" else belief.posterior(context)
        if exploration == "mean":
            return q.mean
        z = belief.sample(q, 1, generator)[0]
        if prior_episodes == 1 or exploration == "prior":
            return z
        early = (episode < prior_episodes).unsqueeze(-1)
        return torch.where(early, belief.sample(belief.prior(n), 1, generator)[0], z)

    return infer


@torch.no_grad()
def play(
    env: TaskVectorEnv,
    act: Act,
    infer: Infer,
    spec: Contexts,
    generator: torch.Generator,
    *,
    episodes: int | None = None,
    each_step: bool = False,
    keep: Sequence[str] = (),
) -> Rollout:
    """Begin a trial in every environment and act under latents that are inferred whenever an episode begins.

    Every environment has a context and a latent of its own, copies of a task too.

    Args:
        env: with autoreset and a known horizon.
        act: see :data:`Act`.
        infer: see :data:`Infer`.
        spec: makes the contexts.
        generator: of latents and actions.
        episodes: how many, of full length; None is a whole trial. Environments whose episodes end earlier play more.
        each_step: infer at every step, from all that has happened by then, and not where an episode begins alone. The
            whole context is read each time. What is drawn then changes its mind on the way.
        keep: names of further numbers of ``info``.

    Returns:
        All steps; ``state`` and ``first_state`` are the latents, those of the last and of the first episode.

    Raises:
        OptionError, NonFiniteDataError: as :func:`~bayesmeta.rl.rollout.collect`.
        HorizonError: for an environment without a horizon.
    """
    horizon = horizon_of(env, "latents are inferred from episode to episode")
    together = bool(getattr(getattr(env, "family", None), "fixed_length", False))
    steps = horizon * (env.episodes_per_trial if episodes is None else episodes)
    chunk = horizon if together and not each_step else 1

    def actor(moment: Moment, z: Tensor, generator: torch.Generator) -> Acted:
        return Acted(*act(moment.observation, z, generator), z)

    moment = begin(env)
    context = spec.empty(env.num_envs, moment.reward)
    z = first = infer(context, moment.episode, generator)
    parts: list[Rollout] = []
    for start in range(0, steps, chunk):
        part = collect(
            env, actor, min(chunk, steps - start), generator=generator, start=moment, state=z, keep=keep
        )  # fmt: skip
        parts.append(part)
        moment = part.after
        context = extended(context, spec.of_rollout(part, trial="all"), over=part.trial_ended[-1])
        starts = (moment.clock == 0) | each_step
        if start + chunk < steps and bool(starts.any()):
            z = torch.where(starts.unsqueeze(-1), infer(context, moment.episode, generator), z)
    return joined(parts, first)


def extended(context: Observations, more: Observations, over: Tensor) -> Observations:
    """A context and what came after it; empty where the trial is over, ``[tasks]``."""
    assert context.y is not None
    assert more.y is not None
    if bool(over.all()):
        return context.points(slice(0, 0))
    mask = torch.cat([context.full_mask(), more.full_mask()], 1)
    if bool(over.any()):
        mask = mask & ~over.unsqueeze(-1)
    elif context.mask is None and more.mask is None:
        return Observations(torch.cat([context.x, more.x], 1), torch.cat([context.y, more.y], 1))
    return Observations(torch.cat([context.x, more.x], 1), torch.cat([context.y, more.y], 1), mask)


def joined(parts: Sequence[Rollout], first_state: Any) -> Rollout:
    """Rollouts of the same environments one behind the other."""
    if len(parts) == 1:
        return dataclasses.replace(parts[0], first_state=first_state)
    names = ("action", "log_prob", "reward", "terminated", "truncated", "trial_ended", "successor")
    fields = [f.name for f in dataclasses.fields(Moment)]
    together: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
    together["moments"] = Moment(**{n: torch.cat([getattr(p.moments, n) for p in parts]) for n in fields})
    together["extra"] = {name: torch.cat([p.extra[name] for p in parts]) for name in parts[0].extra}
    return dataclasses.replace(parts[-1], first_state=first_state, **together)
