"""MAML-RL: a policy that policy-gradient steps on a few episodes make good at a new task.

Source: C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017,
https://arxiv.org/abs/1703.03400, algorithm 3: REINFORCE with a linear baseline inside, TRPO outside.

    φ_i = θ + α ∇ J_i(θ)                  estimated from episodes of π_θ in task i
    θ  ← up Σ_i J_i(φ_i), with mean KL(old ‖ new) of the adapted policies ≤ δ

Options: first order; learned rates (Meta-SGD, Z. Li et al. 2017, https://arxiv.org/abs/1707.09835); the inner
estimator of ProMP (Rothfuss et al. 2019) or DiCE (Foerster et al. 2018), see
:class:`~bayesmeta.rl.policy_gradient.inner.Estimation`; E-MAML's credit to exploration (Stadie et al. 2018), see
:func:`~bayesmeta.rl.policy_gradient.inner.sampling_score`; CAVIA (Zintgraf et al. 2019) by a
:class:`~bayesmeta.rl.policies.ContextPolicy`. Without inner steps it is joint training, the baseline that does not
meta-learn.

Departures: the default inner estimator is ProMP's, since differentiating the paper's surrogate leaves out that
actions were drawn (a test shows it wrong on an enumerated problem); the line search follows the whole path from θ to
the adapted policies with importance ratios, so that it compares one and the same function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.learner import AdaptationCurve, horizon_of
from bayesmeta.rl.policies import detached, kl
from bayesmeta.rl.policy_gradient.inner import (
    Estimation,
    TaskSteps,
    check_policy,
    check_tasks_stay,
    first_copies,
    inner_step,
    phi_actor,
    sampling_score,
    task_steps,
    to_the_last,
)
from bayesmeta.rl.policy_gradient.learner import FlatLearner
from bayesmeta.rl.policy_gradient.objectives import average, likelihood_ratio
from bayesmeta.rl.policy_gradient.returns import LinearBaseline
from bayesmeta.rl.policy_gradient.trpo import Product, trust_region_step
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.rollout import begin, collect


@dataclasses.dataclass(frozen=True)
class MAMLRLConfig:
    """Settings of MAML-RL.

    Attributes:
        inner_steps: policy-gradient steps on each task; 0 is joint training without meta-learning.
        inner_lr: their rate α.
        first_order: leave out the second derivative.
        learn_rates: Meta-SGD: one learned rate for each task parameter, beginning at ``inner_lr``.
        exploration_credit: weight of E-MAML's term; 0 leaves it out, 1 is the paper's. It counts that the actions of
            inner steps were drawn, so that it goes with ``Estimation(estimator="policy_gradient")`` alone: the others
            count that once already. What an adaptation brought is compared with the other tasks: two at least.
        max_kl: bound of an outer step, in nats.
        cg_steps, damping, product: see :func:`~bayesmeta.rl.policy_gradient.trpo.trust_region_step`.
        curvature_share: share of the steps in time from whose states the direction's curvature is taken, in (0, 1];
            the divergence of gradient, line search and bound is that of all states.
        exact_curvature: take the divergence's curvature through the inner steps' second derivatives too. False leaves
            those out of the direction, for a step some times cheaper; gradient, line search and bound stay exact.
        curvature_episodes: of each task, how many episodes of every inner step and of the adapted policies the
            direction's curvature is taken from, the first ones; None is all. Gradient, line search and bound stay those
            of all episodes. It is what makes long episodes affordable: curvature is most of an outer step's time.
        estimation: of advantages and inner gradients.
        joint_iterations: the first iterations take no inner step. They bring about a policy from which steps with
            advantages that are not standardised do not run away.

    Raises:
        OptionError: for settings outside their range.
    """

    inner_steps: int = 1
    inner_lr: float = 0.1
    first_order: bool = False
    learn_rates: bool = False
    exploration_credit: float = 0.0
    max_kl: float = 0.01
    cg_steps: int = 10
    damping: float = 1e-3
    product: Product = "double_backward"
    curvature_share: float = 1.0
    exact_curvature: bool = True
    curvature_episodes: int | None = None
    estimation: Estimation = dataclasses.field(default_factory=Estimation)
    joint_iterations: int = 0

    def __post_init__(self) -> None:
        if self.inner_steps < 0 or not 0 < self.inner_lr < math.inf:
            raise OptionError(f"Expected inner_steps ≥ 0 and inner_lr > 0; got {self.inner_steps} and {self.inner_lr}.")
        if self.curvature_episodes is not None and self.curvature_episodes < 1:
            raise OptionError(f"Expected curvature_episodes of at least 1, or None; got {self.curvature_episodes}.")
        if self.joint_iterations < 0:
            raise OptionError(f"Expected joint_iterations ≥ 0; got {self.joint_iterations}.")
        if self.exploration_credit > 0 and self.estimation.estimator != "policy_gradient":
            raise OptionError(
                "exploration_credit counts that the actions of inner steps were drawn, and so does the estimator "
                f"{self.estimation.estimator!r}: take Estimation(estimator='policy_gradient'), or leave the credit out."
            )
        if not 0 <= self.exploration_credit < math.inf or not 0 < self.curvature_share <= 1:
            raise OptionError(
                f"Expected exploration_credit ≥ 0 and curvature_share in (0, 1]; got {self.exploration_credit} and "
                f"{self.curvature_share}."
            )


class MAMLRL(FlatLearner):
    """Trains the θ of a policy with one φ a task.

    Args:
        env: ``tasks × copies`` environments whose tasks can be set; copies are the episodes that a task adapts on.
        policy: a :class:`~bayesmeta.rl.policies.TaskPolicy` or :class:`~bayesmeta.rl.policies.ContextPolicy`.
        config: settings.
        sample_tasks: ``(number, generator) → tasks``; None is the training split of the environment's family.
        seed: of tasks and actions.

    Attributes:
        theta: θ and, with ``learn_rates``, the rates behind it, one flat vector; ``policy.theta`` follows it.
        iteration: outer steps done.
        history: one dict an iteration: mean return before and after adaptation, and what the outer step did.

    Raises:
        HorizonError: for an environment without a horizon.
        SpaceError: for a policy that is not for its observations and actions.
        OptionError: for one whose tasks cannot be drawn, or that has too few for ``exploration_credit``.
    """

    def __init__(
        self,
        env: TaskVectorEnv,
        policy: Any,
        config: MAMLRLConfig | None = None,
        *,
        sample_tasks: Callable[[int, torch.Generator], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.env, self.policy, self.config = env, policy, MAMLRLConfig() if config is None else config
        self.horizon = horizon_of(env, "MAML-RL adapts on whole episodes")
        check_policy(policy, env)
        _check_credit(self.config, env)
        self._sample_tasks = _sampler(env) if sample_tasks is None else sample_tasks
        self.generator = as_generator(seed, env.device, "maml-rl")
        self.baseline = LinearBaseline()
        start = policy.theta.detach().clone()
        self._split = start.numel()
        if self.config.learn_rates:
            start = torch.cat([start, start.new_full((policy.size,), self.config.inner_lr)])
        self.theta = start
        self.iteration = 0
        self.history: list[dict[str, float]] = []

    # -- adaptation -----------------------------------------------------------------------------------------------

    def parts(self, theta: Tensor) -> tuple[Tensor, float | Tensor]:
        """The policy's θ, and the inner rate: a number, or ``[D]``."""
        rate: float | Tensor = theta[self._split :] if self.config.learn_rates else self.config.inner_lr
        return theta[: self._split], rate

    def path(
        self, theta: Tensor, path: list[TaskSteps], tasks: int, *, create_graph: bool, second_order: bool = True
    ) -> list[Tensor]:
        """φ after 0, 1, … steps on rollouts that are given, each ``[tasks, D]``."""
        shared, rate = self.parts(theta)
        phis = [self.policy.begin(shared, tasks)]
        second_order = second_order and create_graph and not self.config.first_order
        for steps in path:
            phi = inner_step(
                self.policy, phis[-1], shared, steps, rate, self.config.estimation, create_graph=second_order
            )
            phis.append(phi if create_graph else phi.detach())
        return phis

    def episodes(self, env: TaskVectorEnv, phi: Tensor, generator: torch.Generator) -> TaskSteps:
        """One episode in each environment, with each task's φ."""
        actor = phi_actor(self.policy, phi, self.parts(self.theta)[0], env)
        rollout = collect(env, actor, int(env.horizon or self.horizon), generator=generator, start=begin(env))
        return to_the_last(task_steps(rollout, env, self.config.estimation, self.baseline))

    # -- training -------------------------------------------------------------------------------------------------

    def _iterate(self) -> dict[str, float]:
        env, tasks = self.env, self.env.num_tasks
        env.reset(options={"tasks": self._sample_tasks(tasks, self.generator)})
        before: list[TaskSteps] = []
        joint = self.iteration < self.config.joint_iterations
        for _ in range(0 if joint else self.config.inner_steps):
            phi = self.path(self.theta, before, tasks, create_graph=False)[-1]
            before.append(self.episodes(env, phi, self.generator))
        phi = self.path(self.theta, before, tasks, create_graph=False)[-1]
        after = self.episodes(env, phi, self.generator)
        surrogate, divergence = self.objectives(before, after)
        cheap = self._curvature(before, after, divergence)
        step = trust_region_step(
            self.theta,
            surrogate,
            divergence,
            curvature=cheap,
            max_kl=self.config.max_kl,
            cg_steps=self.config.cg_steps,
            damping=self.config.damping,
            product=self.config.product,
        )
        self._move(step.theta)
        return {
            "before": (before[0] if before else after).returns.mean().item(),
            "after": after.returns.mean().item(),
            "kl": step.divergence,
            "improvement": step.improvement,
            "accepted": float(step.accepted),
            "backtracks": float(step.backtracks),
        }

    def objectives(
        self, before: list[TaskSteps], after: TaskSteps
    ) -> tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]:
        """The outer surrogate and the divergence of the adapted policies, as functions of θ.

        Both run through the adaptation on the rollouts ``before``; ``divergence(θ, second_order=False)`` has the same
        value, and leaves the second derivative of the inner steps out of its own; ``divergence(θ, every=n)`` is that
        over the states of every n-th step in time alone.

        Args:
            before: of each inner step.
            after: of the adapted policies.
        """
        tasks = after.returns.shape[0]
        old_shared = self.parts(self.theta)[0]
        with torch.no_grad():
            start = self.path(self.theta, before, tasks, create_graph=False)[-1]

        @cache
        def old(every: int) -> Any:
            with torch.no_grad():
                return detached(self.policy.distribution(start, after.features[::every], old_shared))

        def surrogate(theta: Tensor) -> Tensor:
            shared, _ = self.parts(theta)
            phis = self.path(theta, before, tasks, create_graph=True)
            log_prob = self.policy.distribution(phis[-1], after.features, shared).log_prob(after.action)
            value = average(likelihood_ratio(log_prob, after.log_prob, after.advantage), after.mask)
            if self.config.exploration_credit > 0:
                value = value + self.config.exploration_credit * self._credit(phis, shared, before, after)
            return value

        def divergence(theta: Tensor, second_order: bool = True, every: int = 1) -> Tensor:
            phi = self.path(theta, before, tasks, create_graph=True, second_order=second_order)[-1]
            new = self.policy.distribution(phi, after.features[::every], self.parts(theta)[0])
            return average(kl(old(every), new), after.mask[::every])

        return surrogate, divergence

    def _curvature(
        self, before: list[TaskSteps], after: TaskSteps, divergence: Callable[..., Tensor]
    ) -> Callable[[Tensor], Tensor] | None:
        """The divergence that the direction's curvature is taken from, 0 at the old θ; None is ``divergence``.

        The policies that adapted on fewer episodes are others, but stand as near to θ as those that are compared.
        """
        few, every = self.config.curvature_episodes, max(1, round(1 / self.config.curvature_share))
        if few is not None and few < after.returns.shape[1]:
            _, divergence = self.objectives([first_copies(s, few) for s in before], first_copies(after, few))
        elif self.config.exact_curvature and every == 1:
            return None
        return partial(divergence, second_order=self.config.exact_curvature, every=every)

    def _credit(self, phis: list[Tensor], shared: Tensor, before: list[TaskSteps], after: TaskSteps) -> Tensor:
        """E-MAML's term for every inner step's rollouts, in the units of the surrogate."""
        returns, tasks = after.returns.mean(1), len(after.returns)
        # what the other tasks bring does not hang on this task's episodes: a baseline without bias
        score = (returns - returns.mean()) * tasks / (tasks - 1)
        if after.scale is not None:  # a task whose advantages are all 0 moves nothing in the surrogate either
            score = torch.where(after.scale > 0, score / after.scale.clamp_min(1e-30), 0.0)
        # the surrogate is a mean over all steps, and so a return over the mean length of an episode
        score = score * after.returns.numel() / after.mask.sum().clamp_min(1)
        total = torch.zeros_like(returns)
        for phi, steps in zip(phis, before):
            log_prob = self.policy.distribution(phi, steps.features, shared).log_prob(steps.action)
            total = total + sampling_score(log_prob, steps.log_prob, steps.mask, score)
        return total.mean()

    # -- what was learned -----------------------------------------------------------------------------------------

    def evaluate(
        self,
        env: TaskVectorEnv,
        *,
        inner_steps: int | None = None,
        rates: Sequence[float | Tensor] | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Mean return of each task after 0, 1, … inner steps, ``[inner_steps + 1, tasks]``.

        Args:
            env: of held-out tasks; its copies are the episodes of each adaptation, and of each mean.
            inner_steps: how many; None is as trained.
            rates: a rate for each step, a number or ``[D]`` each, in place of those trained with.
            generator: of the actions; None means seed 0.

        Raises:
            OptionError: for environments that draw new tasks when a trial ends: what adapted on one task would be
                played on another; and for another number of rates.
        """
        inner_steps = self.config.inner_steps if inner_steps is None else inner_steps
        if rates is not None and len(rates) != inner_steps:
            raise OptionError(f"Expected a rate for each of {inner_steps} steps; got {rates}.")
        check_tasks_stay(env)
        generator = as_generator(generator, env.device, "evaluation")
        shared, rate = self.parts(self.theta)
        phi, found = self.policy.begin(shared, env.num_tasks), []
        for step in range(inner_steps + 1):
            steps = self.episodes(env, phi, generator)
            found.append(steps.returns.mean(1))
            if step < inner_steps:
                used = rate if rates is None else rates[step]
                phi = inner_step(
                    self.policy, phi, shared, steps, used, self.config.estimation, create_graph=False
                ).detach()
        return torch.stack(found)

    def curve(self, env: TaskVectorEnv, *, points: int | None = None, generator: Seed = None) -> AdaptationCurve:
        """Returns after 0, 1, … inner steps at the rates trained with; see :meth:`evaluate`.

        Args:
            env: of held-out tasks.
            points: inner steps; None is as trained.
            generator: of the actions; None means seed 0.
        """
        return AdaptationCurve(self.evaluate(env, inner_steps=points, generator=generator), "step")


def _check_credit(config: MAMLRLConfig, env: TaskVectorEnv) -> None:
    if config.exploration_credit == 0:
        return
    if env.num_tasks < 2:
        raise OptionError(
            "exploration_credit compares what adaptation brought with other tasks, and the environment has one task; "
            "give it two or more, or leave the credit out."
        )
    if env.copies < 2 and config.estimation.standardise:
        raise OptionError(
            "exploration_credit needs the scale of a task's advantages, and the environment has one episode of each "
            "(copies=1); give it two or more, or take Estimation(standardise=False, estimator='policy_gradient')."
        )


def _sampler(env: Any) -> Callable[[int, torch.Generator], Any]:
    family = getattr(env, "family", None)
    if family is None or getattr(env, "new_tasks", False):
        raise OptionError(
            "MAML-RL sets the tasks of its environments: make them with new_tasks=False, and give sample_tasks where "
            "the environments have no family."
        )
    return lambda number, generator: family.sample_tasks(number, generator=generator)
