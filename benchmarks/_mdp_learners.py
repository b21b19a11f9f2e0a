"""RL² on random tabular MDPs: a GRU trained here, on trials that grow.

Trials of five episodes come first, of all ten last, the same policy throughout. The GRU writes by pairs of state and
action and reads by state (:class:`~bayesmeta.rl.memory.pair.PairMemory`), a departure from Duan et al. 2016.

How the settings were chosen (a core-minute each, trials of five episodes, reward of an episode where chance has 10):
after 30 rollouts a plain GRU of 128 units had 10.7 and this one 12.2; after 20, λ = 0.5 had 11.5 and λ = 0.8 11.2; 192
units with λ = 0.3 were as far after 13 rollouts, each of which took 1.6 times as long. The whole training had 14.3 an
episode after 240 s (trials of ten, drawn actions), 15.0 after 580 s and 15.2 at its end: most of what it is worth comes
early.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from bayesmeta.rl.envs import TabularMDP, TensorVectorEnv
from bayesmeta.rl.memory.pair import PairMemory
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.policy_gradient.ppo import PPOConfig
from benchmarks.harness import Bar, Row, at_least


class Stage(NamedTuple):
    """A part of the training: episodes of a trial, iterations, and trials in each."""

    episodes: int
    iterations: int
    trials: int


class Learner(NamedTuple):
    """A row's settings: stages, the published figure and the bar."""

    stages: tuple[Stage, ...]
    published: float
    bar: Bar | None


LEARNERS = {
    "rl2_n10": Learner((Stage(5, 60, 1024), Stage(10, 340, 512)), 156.2, at_least(150)),
}
CONFIG = PPOConfig(lam=0.5, lr=2e-3, entropy=0.02, minibatches=8)
UNITS = 128


def trained(learner: Learner, seed: int, quick: bool) -> tuple[RL2, list[dict[str, float]]]:
    """The policy after all stages, and the curve of its training; ``quick`` takes two iterations of few trials.

    Returns:
        The learner; and for every iteration the seconds of CPU time so far, the episodes of a trial, and the mean
        reward of an episode on the new tasks that it was trained on next, with drawn actions.
    """
    stages = [Stage(s.episodes, 1, 16) for s in learner.stages] if quick else learner.stages
    family = TabularMDP()

    def env(stage: Stage) -> TensorVectorEnv:
        generator = seed + stage.episodes
        return TensorVectorEnv(
            family, stage.trials, new_tasks=True, episodes_per_trial=stage.episodes, generator=generator
        )

    begin, curve = time.process_time(), []

    def note(run: RL2) -> None:
        episodes = run.env.episodes_per_trial
        reward = run.history[-1]["reward"] / episodes
        curve.append({"seconds": time.process_time() - begin, "episodes": episodes, "reward": reward})
        if run.iteration % 20 == 0:
            seconds = curve[-1]["seconds"]
            print(
                f"iteration {run.iteration}, {seconds:.0f} s: {reward:.2f} an episode, {episodes} episodes a trial",
                flush=True,
            )

    run = RL2(
        env(stages[0]),
        config=CONFIG,
        iterations=sum(stage.iterations for stage in stages),
        memory_kind=lambda inputs: PairMemory(inputs, UNITS, family.states, family.actions),
        seed=seed,
        reward_shift=1.0,
        reward_scale=1.4,
    )
    for number, stage in enumerate(stages):
        if number:
            run.use(env(stage))
        run.train(stage.iterations, note)
    return run, curve


def learner_row(name: str, instances: int, seed: int, quick: bool) -> tuple[Row, list[dict[str, float]]]:
    """One row, and the curve of its training: the likeliest actions on test tasks; ``seconds`` is CPU time."""
    learner = LEARNERS[name]
    begin = time.process_time()
    run, curve = trained(learner, seed, quick)
    seconds, family = time.process_time() - begin, TabularMDP()
    tasks, episodes = family.sample_tasks(instances, generator=seed, split="test"), learner.stages[-1].episodes
    env = TensorVectorEnv(family, instances, tasks=tasks, episodes_per_trial=episodes, generator=seed)
    totals = run.evaluate(env, generator=seed).total
    mean, error = float(totals.mean()), float(totals.std()) / instances**0.5
    ratio = mean / learner.published
    judged = {} if quick or learner.bar is None else learner.bar.judge(mean)
    print(f"{name}: {mean:.1f} ± {error:.1f} after {seconds:.0f} s, published {learner.published:g}", flush=True)
    return Row(name, mean, learner.published, ratio, None, error / learner.published, seconds, **judged), curve
