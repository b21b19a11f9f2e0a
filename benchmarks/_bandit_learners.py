"""Learned policies on Bernoulli bandits, trained here: RL² with a GRU, with SNAIL in its place, and MAML-RL.

Settings were chosen on validation tasks (other bandits than those of the rows). Training for 10 pulls is one stage; for
100 pulls the horizon grows in stages, the same policy throughout: short trials are a start for long ones.

MAML-RL is the negative result of the papers. Its policy sees nothing, so that only a gradient step tells it anything: 4
pulls, one step on them, 6 pulls with the adapted policy, which draws its arms. That is to explore, then to commit. How
many pulls and which inner rate were chosen among 3 to 6 and 1 to 60; two steps on 3 pulls each brought 5.87 on
validation tasks, four on 2 pulls no more.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from torch import Tensor, nn

from bayesmeta.rl.envs import BernoulliBandit, TensorVectorEnv
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.policies import TaskPolicy, head_for
from bayesmeta.rl.policy_gradient.inner import Estimation
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from bayesmeta.rl.policy_gradient.ppo import PPOConfig
from benchmarks.harness import Bar, Row, at_least


class Stage(NamedTuple):
    """A part of the training: pulls of a trial, iterations, and trials in each."""

    pulls: int
    iterations: int
    trials: int


class Learner(NamedTuple):
    """A row's settings: memory, stages, the published figure and the bar."""

    memory: str
    pulls: int
    arms: int
    stages: tuple[Stage, ...]
    published: float
    bar: Bar | None


class StepLearner(NamedTuple):
    """Settings of MAML-RL: pulls of a trial and how many of them come before the step, arms, inner rate, training."""

    pulls: int
    before: int
    arms: int
    rate: float
    iterations: int
    tasks: int


SHORT = (Stage(10, 110, 4096),)
LONG = (Stage(10, 70, 4096), Stage(25, 50, 1640), Stage(50, 50, 820), Stage(100, 110, 410))
LEARNERS = {
    "rl2_n10_k5": Learner("gru", 10, 5, SHORT, 6.7, at_least(6.62)),
    "rl2_n10_k10": Learner("gru", 10, 10, (Stage(10, 140, 4096),), 6.7, at_least(6.65)),
    "rl2_n100_k5": Learner("gru", 100, 5, LONG, 78.7, at_least(77.5)),
    "snail_n10_k5": Learner("snail", 10, 5, SHORT, 6.6, None),
}
STEP_LEARNERS = {"maml_rl_n10_k5": StepLearner(10, 4, 5, 30.0, 30, 500)}
NAMES = [*LEARNERS, *STEP_LEARNERS]


def trained(learner: Learner, seed: int, quick: bool) -> RL2:
    """The policy after all stages; ``quick`` takes a few iterations of few trials."""
    stages = [Stage(s.pulls, 1, 32) for s in learner.stages] if quick else learner.stages

    def env(stage: Stage) -> TensorVectorEnv:
        family = BernoulliBandit(arms=learner.arms, horizon=stage.pulls)
        return TensorVectorEnv(family, stage.trials, new_tasks=True, generator=seed + stage.pulls)

    run = RL2(
        env(stages[0]),
        config=PPOConfig(),
        iterations=sum(stage.iterations for stage in stages),
        memory_kind=learner.memory,
        units=64 if learner.memory == "gru" else 32,
        seed=seed,
        reward_shift=0.5,
        reward_scale=0.5,
    )
    for number, stage in enumerate(stages):
        if number:
            run.use(env(stage))
        run.train(stage.iterations)
    return run


def stepping(learner: StepLearner, seed: int, quick: bool) -> MAMLRL:
    """MAML-RL from a policy that pulls all arms alike; each pull is an episode. ``quick`` takes two steps."""
    family = BernoulliBandit(arms=learner.arms, horizon=1)
    env = TensorVectorEnv(family, learner.tasks, copies=learner.before, generator=seed)
    logits = nn.Linear(1, learner.arms)
    for value in logits.parameters():
        nn.init.zeros_(value)
    policy = TaskPolicy(nn.Sequential(logits), head_for(env.single_action_space))
    config = MAMLRLConfig(inner_lr=learner.rate, estimation=Estimation(gamma=1.0, standardise=False))
    run = MAMLRL(env, policy, config, seed=seed)
    run.train(2 if quick else learner.iterations)
    return run


def remembered(name: str, instances: int, seed: int, quick: bool) -> tuple[Tensor, float]:
    """Totals of the greedy policy on the test tasks, ``[instances]``, and the seconds of its training."""
    learner = LEARNERS[name]
    begin = time.process_time()
    run = trained(learner, seed, quick)
    seconds = time.process_time() - begin
    family = BernoulliBandit(arms=learner.arms, horizon=learner.pulls)
    tasks = family.sample_tasks(instances, generator=seed, split="test")
    return run.evaluate(TensorVectorEnv(family, instances, tasks=tasks, generator=seed), generator=seed).total, seconds


def stepped(name: str, instances: int, seed: int, quick: bool) -> tuple[Tensor, float]:
    """As :func:`remembered`, of a policy that takes a step: what its pulls bring on average, before and after."""
    learner = STEP_LEARNERS[name]
    begin = time.process_time()
    run = stepping(learner, seed, quick)
    seconds = time.process_time() - begin
    family = BernoulliBandit(arms=learner.arms, horizon=1)
    tasks = family.sample_tasks(instances, generator=seed, split="test")
    env = TensorVectorEnv(family, instances, tasks=tasks, copies=learner.before, generator=seed)
    before, after = run.evaluate(env, generator=seed)
    return learner.before * before + (learner.pulls - learner.before) * after, seconds


def learner_row(name: str, instances: int, seed: int, quick: bool) -> Row:
    """One row: a policy on test tasks; ``seconds`` is the training alone."""
    known = LEARNERS.get(name)
    totals, seconds = (stepped if known is None else remembered)(name, instances, seed, quick)
    mean, error = float(totals.mean()), float(totals.std()) / len(totals) ** 0.5
    if known is None:
        print(f"{name}: {mean:.3f} ± {error:.3f} after {seconds:.0f} s", flush=True)
        return Row(name, mean, None, None, None, error, seconds)
    judged = {} if quick or known.bar is None else known.bar.judge(mean)
    print(f"{name}: {mean:.3f} ± {error:.3f} after {seconds:.0f} s, published {known.published:g}", flush=True)
    return Row(name, mean, known.published, None, mean - known.published, error, seconds, **judged)
