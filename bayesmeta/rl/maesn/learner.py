"""MAESN: a latent for each episode explores, and policy-gradient steps on where latents come from adapt.

Source: A. Gupta, R. Mendonca, Y. Liu, P. Abbeel, S. Levine, "Meta-Reinforcement Learning of Structured Exploration
Strategies", NeurIPS 2018, https://arxiv.org/abs/1802.07245, section 4 and algorithm 1. Each training task has its own
ω_i = (μ_i, log σ_i); z ~ Normal(μ_i, σ_i) is drawn once an episode and held through it, so that noise has structure.

    φ_i = ω_i + α ∘ ∇ J_i(ω_i)            from episodes of π_θ(a | s, z), z ~ q_{ω_i}; θ may take a step too
    θ, ω_i, α  ← up Σ_i J_i(φ_i) − w KL(q_{ω_i} ‖ p), with mean KL(old ‖ new) of the adapted policies ≤ δ

A new task has no ω of its own and begins at the prior p = Normal(0, 1). As in the authors' program, the inner gradient
is that of the latent's density (``gradient="score"``), and the outer one goes through the latent into the actions.

**Which rewards?** An inner step of training reads ``inner_reward``, the outer objective ``train_reward``: names of what
the environment tells in ``info``; None is its own reward. The paper trains on dense rewards inside and outside, and
adapts on sparse ones at test time. :meth:`MAESN.evaluate` and :meth:`MAESN.curve` adapt on the environment's own reward
always.

Departures: α is positive, learned by its logarithm; the inner step's second derivative counts that latents were drawn
(``Estimation(estimator="policy_gradient")`` leaves that out, as the authors' program does; a test shows it wrong). Off
by default: ω_i by plain gradient steps (``omega_lr``), tasks that begin at the prior in training as new ones do
(``prior_share``), shares of returns as credit, natural gradients inside, adapted policies that act at the mean of q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import CheckpointError, OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.gym_family import as_list, packed, unpacked
from bayesmeta.rl.learner import AdaptationCurve, horizon_of
from bayesmeta.rl.maesn.config import MAESNConfig
from bayesmeta.rl.maesn.inner import LatentSteps, latent_episodes, latent_step, split_phi
from bayesmeta.rl.maesn.policy import LatentPolicy, latent_distribution, latents, prior_omega
from bayesmeta.rl.maesn.trials import trial_curve
from bayesmeta.rl.policies import detached, kl
from bayesmeta.rl.policy_gradient.inner import check_tasks_stay, first_copies
from bayesmeta.rl.policy_gradient.learner import FlatLearner
from bayesmeta.rl.policy_gradient.objectives import average, likelihood_ratio
from bayesmeta.rl.policy_gradient.trpo import TrustRegionStep, gradient, trust_region_step
from bayesmeta.rl.protocols import TaskVectorEnv, Tensors


class MAESN(FlatLearner):
    """Trains θ, the step sizes α, and an ω for each training task.

    Args:
        env: ``tasks × copies`` environments whose tasks can be set: the tasks of an iteration, and the episodes that
            each adapts on.
        policy: π(a | s, z).
        config: settings.
        tasks: the training tasks, at least ``env.num_tasks``. They are fixed, since each has an ω. None draws ``env
            .num_tasks`` from the training split of the environment's family.
        seed: of tasks, latents and actions.

    Attributes:
        theta: θ and the logarithms of α, one flat vector; ``policy.theta`` follows it.
        omega: (μ_i, log σ_i) of each training task, ``[tasks, 2 × latent]``; 0 to begin with, the prior.
        iteration: outer steps done.
        history: one dict an iteration: mean return before and after adaptation, KL of ω to the prior, and what the
            outer step did.

    Raises:
        HorizonError: for an environment without a horizon.
        OptionError: for fewer tasks than an iteration takes, or environments whose tasks cannot be set.
    """

    def __init__(
        self,
        env: TaskVectorEnv,
        policy: LatentPolicy,
        config: MAESNConfig | None = None,
        *,
        tasks: Any = None,
        seed: int = 0,
    ) -> None:
        self.env, self.policy, self.config = env, policy, MAESNConfig() if config is None else config
        self.horizon = horizon_of(env, "MAESN adapts on whole episodes")
        self.generator = as_generator(seed, env.device, "maesn")
        self.tasks = _training_tasks(env, tasks, seed)
        if self.config.credit != "raw" and env.copies < 2:
            raise OptionError(
                f"credit={self.config.credit!r} compares a task's episodes, and the environment has copies=1; give it "
                'more, or take credit="raw".'
            )
        start = policy.theta.detach().clone()
        self._split = start.numel()
        rates = start.new_full((2 * policy.latent,), math.log(self.config.inner_lr))
        if self.config.policy_lr > 0:
            rates = torch.cat([rates, start.new_full((self._split,), math.log(self.config.policy_lr))])
        self._fixed_rates = rates
        self.theta = torch.cat([start, rates]) if self.config.learn_rates else start
        self.omega = prior_omega(len(self.tasks), policy.latent, start)
        self.iteration = 0
        self.history: list[dict[str, float]] = []

    # -- adaptation -----------------------------------------------------------------------------------------------

    def parts(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's θ, and the step sizes α of φ, positive."""
        rates = theta[self._split :] if self.config.learn_rates else self._fixed_rates
        return theta[: self._split], rates.exp()

    def begin(self, theta: Tensor, omega: Tensor) -> Tensor:
        """Where φ begins: ω ``[tasks, 2 × latent]``, and θ beside it where that adapts too."""
        if self.config.policy_lr == 0:
            return omega
        return torch.cat([omega, self.parts(theta)[0].expand(len(omega), -1)], -1)

    def step(
        self, theta: Tensor, phi: Tensor, episodes: LatentSteps, *, create_graph: bool, share: float = 1
    ) -> Tensor:
        """φ after one more step, at a share of the rates.

        Args:
            theta: as :attr:`theta`.
            phi: ``[tasks, …]``, as :meth:`begin` makes it.
            episodes: of φ, for an inner step.
            create_graph: keep what an outer gradient needs.
            share: of α.
        """
        shared, rate = self.parts(theta)
        second = create_graph and not self.config.first_order
        found = latent_step(
            self.policy, phi, shared, episodes, share * rate, self.config.estimation, self.config.gradient,
            create_graph=second, natural=self.config.natural,
        )  # fmt: skip
        return found if create_graph else found.detach()

    def path(self, theta: Tensor, omega: Tensor, before: list[LatentSteps], *, create_graph: bool) -> Tensor:
        """φ after the inner steps on episodes that are given, from ω, ``[tasks, …]``."""
        phi = self.begin(theta, omega)
        for episodes in before:
            phi = self.step(theta, phi, episodes, create_graph=create_graph)
        return phi

    def episodes(
        self,
        env: TaskVectorEnv,
        phi: Tensor,
        generator: torch.Generator,
        *,
        inner: bool,
        reward: str | None = None,
        greedy: bool = False,
    ) -> LatentSteps:
        """One episode in each environment under each task's φ, each with a fresh latent that it holds.

        Args:
            env: begins anew.
            phi: ``[tasks, …]``.
            generator: of latents and actions.
            inner: for an inner step, with latents that are drawn; else of adapted policies.
            reward: that is learned from; None is the environment's own.
            greedy: take the likeliest actions.
        """
        omega, theta = split_phi(phi, self.parts(self.theta)[0], self.policy.latent)
        return latent_episodes(
            env, self.policy, theta, omega, generator, horizon=int(env.horizon or self.horizon), reward=reward,
            estimation=self.config.estimation, credit=self.config.credit, inner=inner,
            at_mean=not inner and self.config.adapted == "mean", greedy=greedy,
        )  # fmt: skip

    # -- training -------------------------------------------------------------------------------------------------

    def _iterate(self) -> dict[str, float]:
        env, config = self.env, self.config
        rows = torch.randperm(len(self.tasks), generator=self.generator, device=self.generator.device)[: env.num_tasks]
        env.reset(options={"tasks": [self.tasks[int(row)] for row in rows] if self._listed else self.tasks[rows]})
        share = config.prior_share if self.iteration >= config.prior_after else 0.0
        chosen = torch.rand(len(rows), generator=self.generator, device=self.generator.device) >= share
        own = chosen.to(self.omega).unsqueeze(-1)
        before: list[LatentSteps] = []
        for _ in range(config.inner_steps):
            phi = self.path(self.theta, own * self.omega[rows], before, create_graph=False)
            before.append(self.episodes(env, phi, self.generator, inner=True, reward=config.inner_reward))
        phi = self.path(self.theta, own * self.omega[rows], before, create_graph=False)
        after = self.episodes(env, phi, self.generator, inner=False, reward=config.train_reward)
        step = self._outer_step(rows, own, before, after)
        return {
            "before": before[0].steps.returns.mean().item(),
            "after": after.steps.returns.mean().item(),
            "learned": after.learned.mean().item(),
            "prior_kl": self.prior_kl(self.omega).mean().item(),
            "kl": step.divergence,
            "improvement": step.improvement,
            "accepted": float(step.accepted),
            "backtracks": float(step.backtracks),
        }

    def kl_weight(self) -> float:
        """w in this iteration."""
        ramp = self.config.kl_ramp
        return self.config.kl_weight * (min(1.0, self.iteration / ramp) if ramp else 1.0)

    def prior_kl(self, omega: Tensor) -> Tensor:
        """KL(q_ω ‖ p) of each task, ``[tasks]``, in nats."""
        prior = latent_distribution(torch.zeros_like(omega))
        return torch.distributions.kl_divergence(latent_distribution(omega), prior)

    def objectives(
        self, rows: Tensor, own: Tensor, before: list[LatentSteps], after: LatentSteps
    ) -> tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]:
        """The outer surrogate and the divergence of the adapted policies, as functions of θ, log α and all ω.

        Both run through the adaptation on the episodes ``before``, and through the latents of the episodes ``after``;
        ``divergence(point, every=n)`` is that over the states of every n-th step in time alone.

        Args:
            rows: which training tasks, ``[tasks]``.
            own: 1 for those that begin at their ω, 0 for those that begin at the prior, ``[tasks, 1]``.
            before: of each inner step.
            after: of the adapted policies.
        """
        steps, weight = after.steps, self.kl_weight()

        def parts(point: Tensor) -> tuple[Tensor, Tensor]:
            size = self.theta.numel()
            return point[:size], point[size:].unflatten(0, self.omega.shape)[rows]

        def adapted(point: Tensor, features: Tensor, create_graph: bool = True) -> Any:
            theta, omega = parts(point)
            phi = self.path(theta, own * omega, before, create_graph=create_graph)
            found, acting = split_phi(phi, self.parts(theta)[0], self.policy.latent)
            return self.policy.distribution(acting, features, latents(found, after.noise))

        here = torch.cat([self.theta, self.omega.flatten()])

        @cache
        def old(every: int) -> Any:
            with torch.no_grad():
                return detached(adapted(here, steps.features[::every], create_graph=False))

        def surrogate(point: Tensor) -> Tensor:
            log_prob = adapted(point, steps.features).log_prob(steps.action)
            value = average(likelihood_ratio(log_prob, steps.log_prob, steps.advantage), steps.mask)
            return value - weight * self.prior_kl(parts(point)[1]).mean() if weight > 0 else value

        def divergence(point: Tensor, every: int = 1) -> Tensor:
            return average(kl(old(every), adapted(point, steps.features[::every])), steps.mask[::every])

        return surrogate, divergence

    def _curvature(
        self,
        rows: Tensor,
        own: Tensor,
        before: list[LatentSteps],
        after: LatentSteps,
        divergence: Callable[..., Tensor],
    ) -> Callable[[Tensor], Tensor] | None:
        """The divergence that the direction's curvature is taken from; None is ``divergence``."""
        few, every = self.config.curvature_episodes, max(1, round(1 / self.config.curvature_share))
        if few is not None and few < self.env.copies:
            divergence = self.objectives(rows, own, before, _first(after, few))[1]
        elif every == 1:
            return None
        return partial(divergence, every=every)

    def _outer_step(self, rows: Tensor, own: Tensor, before: list[LatentSteps], after: LatentSteps) -> TrustRegionStep:
        config = self.config
        surrogate, divergence = self.objectives(rows, own, before, after)
        cheap = self._curvature(rows, own, before, after, divergence)
        omega = self.omega.flatten()
        point = torch.cat([self.theta, omega])
        options: dict[str, Any] = {
            "max_kl": config.max_kl, "cg_steps": config.cg_steps, "damping": config.damping, "product": config.product,
        }  # fmt: skip
        if config.omega_lr == 0:
            step = trust_region_step(point, surrogate, divergence, curvature=cheap, **options)
            self._move_all(step.theta)
            return step
        # the surrogate is a mean over tasks; each ω climbs its own task's
        slope = self.env.num_tasks * gradient(surrogate, point)[self.theta.numel() :].view_as(self.omega)
        slope = slope / slope.norm(dim=1, keepdim=True).clamp_min(1)  # a σ above 1 would run away under plain steps

        def at_old(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda theta: function(torch.cat([theta, omega]))

        step = trust_region_step(
            self.theta, at_old(surrogate), at_old(divergence), curvature=None if cheap is None else at_old(cheap),
            **options,
        )  # fmt: skip
        self._move_all(torch.cat([step.theta, omega + config.omega_lr * slope.flatten()]))
        return step

    def _move_all(self, point: Tensor) -> None:
        theta, omega = point.detach().split([self.theta.numel(), self.omega.numel()])
        self.omega = omega.view_as(self.omega).clone()
        self._move(theta.clone())

    # -- what was learned -----------------------------------------------------------------------------------------

    def evaluate(
        self,
        env: TaskVectorEnv,
        *,
        inner_steps: int | None = None,
        shares: Sequence[float] | None = None,
        greedy: bool = False,
        generator: Seed = None,
    ) -> Tensor:
        """Mean return of each task after 0, 1, … inner steps from the prior, ``[inner_steps + 1, tasks]``.

        A step consumes one episode in each copy, and reads the environment's own reward. With latents that are
        drawn, returns are those of the episodes that the next step reads; with ``adapted="mean"``, or ``greedy``, those
        of further ones, played at the mean of q, that no step reads.

        Args:
            env: of held-out tasks; its copies are the episodes of each step.
            inner_steps: how many; None is as trained.
            shares: of the step sizes in each step; None is 1 for as many as trained with, and then ``later_rates`` of
                the one before.
            greedy: the returns are those of further episodes, played by the likeliest actions, that no step reads.
            generator: of latents and actions; None means seed 0.

        Raises:
            OptionError: for shares that are not one for each step, and environments that draw new tasks.
        """
        check_tasks_stay(env)
        steps = self.config.inner_steps if inner_steps is None else inner_steps
        if shares is None:
            shares = [self.config.later_rates ** max(0, k + 1 - self.config.inner_steps) for k in range(steps)]
        if len(shares) != steps:
            raise OptionError(f"Expected a share for each of {steps} steps; got {list(shares)}.")
        generator = as_generator(generator, env.device, "evaluation")
        phi = self.begin(self.theta, prior_omega(env.num_tasks, self.policy.latent, self.theta)).detach()
        found, apart = [], greedy or self.config.adapted == "mean"
        aside = getattr(env, "unwatched", env) if apart else env
        for k in range(steps + 1):
            episodes = self.episodes(aside, phi, generator, inner=True)
            shown = self.episodes(env, phi, generator, inner=False, greedy=greedy) if apart else episodes
            found.append(shown.steps.returns.mean(1))
            if k < steps:
                phi = self.step(self.theta, phi, episodes, create_graph=False, share=shares[k])
        return torch.stack(found)

    def curve(self, env: TaskVectorEnv, *, points: int | None = None, generator: Seed = None) -> AdaptationCurve:
        """Returns after 0, 1, … inner steps from the prior; see :meth:`evaluate`.

        Args:
            env: of held-out tasks. With several episodes a trial it is the return of each episode, see
                :func:`~bayesmeta.rl.maesn.trials.trial_curve`.
            points: inner steps; None is as trained. Of trials it must be 1.
            generator: of latents and actions; None means seed 0.

        Raises:
            OptionError: for environments that draw new tasks, and trials that this step cannot play.
        """
        if env.episodes_per_trial > 1:
            return trial_curve(self, env, inner_steps=points, generator=generator)
        return AdaptationCurve(self.evaluate(env, inner_steps=points, generator=generator), "step")

    # -- going on later -------------------------------------------------------------------------------------------

    def _more_state(self) -> dict[str, Any]:
        return {
            "policy": {"omega": self.omega.clone()},
            "tasks": (
                [packed(task) for task in self.tasks]
                if self._listed
                else {name: value.clone() for name, value in self.tasks.as_dict().items()}
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit, with its tasks and their ω, which :meth:`load_learned` leaves as they are.

        Raises:
            CheckpointError: when it belongs to a policy of another size, to other tasks or to other environments.
        """
        omega = state["policy"]["omega"]
        if omega.shape != self.omega.shape:
            raise CheckpointError(
                f"The state has ω of {list(omega.shape)}; expected [tasks, 2 × latent] = {list(self.omega.shape)}. "
                "Give the tasks and the latent of that run."
            )
        super().load_state_dict(state)

    def _load_more(self, state: Mapping[str, Any]) -> None:
        self.omega = state["policy"]["omega"].to(self.omega, copy=True)
        tasks = state["tasks"]
        if self._listed:
            self.tasks = [unpacked(task) for task in tasks]
        else:
            self.tasks = type(self.tasks)(**{n: v.to(self.env.device, copy=True) for n, v in tasks.items()})

    @property
    def _listed(self) -> bool:
        """Whether tasks are those of ordinary gymnasium environments, one by one."""
        return isinstance(self.tasks, list)


def _first(episodes: LatentSteps, number: int) -> LatentSteps:
    """The first episodes of each task."""
    kept = {name: value[:, :number] for name, value in episodes._asdict().items() if name != "steps"}
    return LatentSteps(first_copies(episodes.steps, number), **kept)


def _training_tasks(env: Any, tasks: Any, seed: int) -> Any:
    if getattr(env, "new_tasks", False):
        raise OptionError("MAESN sets the tasks of its environments: make them with new_tasks=False.")
    if tasks is None:
        family = getattr(env, "family", None)
        if family is None:
            raise OptionError("These environments have no family to draw training tasks from; give tasks.")
        tasks = family.sample_tasks(env.num_tasks, generator=as_generator(seed, env.device, "maesn tasks"))
    if len(tasks) < env.num_tasks:
        raise OptionError(
            f"{len(tasks)} training tasks were given to environments of {env.num_tasks}; give as many at least."
        )
    return tasks.to(env.device) if isinstance(tasks, Tensors) else as_list(tasks)
