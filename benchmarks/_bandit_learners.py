"""RL² on Bernoulli bandits: GRU, and SNAIL in its place, trained here and held to the figures of the paper.

Settings were chosen on validation tasks (other bandits than those of the rows). Training for 10 pulls is one stage; for
100 pulls the horizon grows in stages, the same policy throughout: short trials are a start for long ones.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from bayesmeta.rl.envs import BernoulliBandit, TensorVectorEnv
from bayesmeta.rl.ppo import PPOConfig
from bayesmeta.rl.rl2 import RL2
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


SHORT = (Stage(10, 110, 4096),)
LONG = (Stage(10, 70, 4096), Stage(25, 50, 1640), Stage(50, 50, 820), Stage(100, 110, 410))
LEARNERS = {
    "rl2_n10_k5": Learner("gru", 10, 5, SHORT, 6.7, at_least(6.62)),
    "rl2_n10_k10": Learner("gru", 10, 10, (Stage(10, 140, 4096),), 6.7, at_least(6.65)),
    "rl2_n100_k5": Learner("gru", 100, 5, LONG, 78.7, at_least(77.5)),
    "snail_n10_k5": Learner("snail", 10, 5, SHORT, 6.6, None),
}


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


def learner_row(name: str, instances: int, seed: int, quick: bool) -> Row:
    """One row: the greedy policy on test tasks; ``seconds`` is the training alone."""
    learner = LEARNERS[name]
    begin = time.perf_counter()
    run = trained(learner, seed, quick)
    seconds = time.perf_counter() - begin
    family = BernoulliBandit(arms=learner.arms, horizon=learner.pulls)
    tasks = family.sample_tasks(instances, generator=seed, split="test")
    totals = run.evaluate(TensorVectorEnv(family, instances, tasks=tasks, generator=seed), generator=seed).total
    mean, error = float(totals.mean()), float(totals.std()) / len(totals) ** 0.5
    judged = {} if quick or learner.bar is None else learner.bar.judge(mean)
    print(f"{name}: {mean:.3f} ± {error:.3f} after {seconds:.0f} s, published {learner.published:g}", flush=True)
    return Row(name, mean, learner.published, None, mean - learner.published, error, seconds, **judged)
