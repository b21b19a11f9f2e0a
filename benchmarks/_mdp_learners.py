"""RL² on random tabular MDPs: a GRU trained here, on trials that grow.

Trials of a few episodes come first, of all ten last, the same policy throughout. The GRU reads each input beside the
one before, a departure from Duan et al. 2016: state, action, reward and next state of a step stand together.

The whole training has not been run yet, and whether it meets the bar is not known. A first 100 seconds of a plain GRU
with half the updates (12 an iteration, rate 2e-3) brought trials of two episodes from 9.9 to 10.4 an episode, where
chance has 10, and the divergence of an update was 0.002 nats: too timid. Hence more updates and a higher rate.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from bayesmeta.rl.envs import TabularMDP, TensorVectorEnv
from bayesmeta.rl.ppo import PPOConfig
from bayesmeta.rl.recurrent import GRUMemory, Memory
from bayesmeta.rl.rl2 import RL2
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
    "rl2_n10": Learner((Stage(2, 20, 2560), Stage(5, 40, 1024), Stage(10, 220, 768)), 156.2, at_least(150)),
}
CONFIG = PPOConfig(lam=0.7, lr=3e-3, entropy=0.02, minibatches=8)
UNITS = 128


class TransitionMemory(Memory):
    """A GRU that reads each input beside the one before: state, action, reward and next state of a step at once.

    Args:
        inputs: width of what it reads.
        units: width of the GRU.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__(inputs, units, units + inputs)
        self.gru = GRUMemory(2 * inputs, units)

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`~bayesmeta.rl.recurrent.Memory`; the state holds the last input too."""
        hidden, before = state.split([self.outputs, self.inputs], -1)
        hidden, _ = self.gru.advance(torch.cat([x, before], -1), hidden)
        return hidden, torch.cat([hidden, x], -1)


def trained(learner: Learner, seed: int, quick: bool) -> tuple[RL2, list[dict[str, float]]]:
    """The policy after all stages, and the curve of its training; ``quick`` takes two iterations of few trials.

    Returns:
        The learner; and for every iteration the seconds of CPU time so far, the episodes of a trial, and the mean
        reward of an episode on the new tasks that it was trained on next, with drawn actions.
    """
    stages = [Stage(s.episodes, 1, 16) for s in learner.stages] if quick else learner.stages

    def env(stage: Stage) -> TensorVectorEnv:
        generator = seed + stage.episodes
        return TensorVectorEnv(
            TabularMDP(), stage.trials, new_tasks=True, episodes_per_trial=stage.episodes, generator=generator
        )

    begin, curve = time.process_time(), []

    def note(run: RL2) -> None:
        episodes = run.env.episodes_per_trial
        reward = run.history[-1]["reward"] / episodes
        curve.append({"seconds": time.process_time() - begin, "episodes": episodes, "reward": reward})
        if run.iteration % 20 == 0:
            print(f"iteration {run.iteration}: {reward:.2f} an episode, {episodes} episodes a trial", flush=True)

    run = RL2(
        env(stages[0]),
        config=CONFIG,
        iterations=sum(stage.iterations for stage in stages),
        memory_kind=lambda inputs: TransitionMemory(inputs, UNITS),
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
