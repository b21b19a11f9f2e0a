"""Meta-RL runs that are killed at random moments and go on: run as a script, it prints what became of each as JSON.

As tests/faults/driver.py: everything is imported once, and each training is a forked child.

    python tests/rl_kills.py FOLDER KILLS SEED [KIND …]
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from bayesmeta.rl import MAMLRL, RL2, BeamSteering, Grid, GymFamily, PPOConfig, TensorVectorEnv, TRPOConfig, fit
from bayesmeta.rl.setups import Setup
from tests.faults import driver

ITERATIONS = 12


def rl2(folder, resume):
    """PPO in the middle of trials: rollouts end within episodes of several lengths."""
    family = BeamSteering(horizon=9)
    env = TensorVectorEnv(family, 12, new_tasks=True, episodes_per_trial=2, generator=5)
    config = PPOConfig(epochs=1, minibatches=2)
    learner = RL2(env, iterations=ITERATIONS, steps=7, units=6, seed=3, config=config)
    _fit(learner, TensorVectorEnv(family, 4, episodes_per_trial=2, split="validation", generator=6), folder, resume)


def snail(folder, resume):
    """A cache within trials, TRPO."""
    family = Grid(horizon=4)
    env = TensorVectorEnv(family, 8, new_tasks=True, episodes_per_trial=2, generator=5)
    config = TRPOConfig()
    learner = RL2(env, iterations=ITERATIONS, steps=3, units=4, seed=3, memory_kind="snail", config=config)
    _fit(learner, TensorVectorEnv(family, 4, episodes_per_trial=2, split="validation", generator=6), folder, resume)


def maml(folder, resume):
    """Learned rates; the environments draw their tasks."""
    setup = Setup("navigation", "meta-sgd", horizon=4, tasks=3, copies=3, units=4, iterations=ITERATIONS).filled()
    learner = setup.learner(setup.family())
    assert isinstance(learner, MAMLRL)
    _fit(learner, setup.held_out(setup.family(), 3, split="validation", seed=6), folder, resume, points=2)


def gym(folder, resume):
    """Ordinary environments in the middle of trials, which are put back by repeating what was done."""
    family = GymFamily(lambda goal: Grid(horizon=4).plain(task={"goal": goal}), [(0.0, 2.0), (3.0, 0.0), (1.0, 1.0)])
    env = family.vector(5, new_tasks=True, episodes_per_trial=2, generator=5)
    learner = RL2(env, iterations=ITERATIONS, steps=3, units=4, seed=3)
    _fit(learner, family.vector(4, episodes_per_trial=2, split="validation", generator=6), folder, resume)


KINDS = (rl2, snail, maml, gym)


def _fit(learner, validation, folder, resume, **options):
    fit(
        learner, iterations=ITERATIONS, validation=validation, validate_every=4, checkpoint_every=2, out=folder,
        resume=resume, progress=False, **options,
    )  # fmt: skip


def main(folder, kills, seed, names):
    kinds = [kind for kind in KINDS if not names or kind.__name__ in names]
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of its own
    numbers, references = random.Random(seed), {}
    for kind in kinds:
        kind(folder / f"{kind.__name__}_warm_up", False)
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads must not be forked"
    for kind in kinds:
        seconds = driver.finish(kind, folder / f"{kind.__name__}_whole", False)
        references[kind] = driver.contents(folder / f"{kind.__name__}_whole"), seconds
    for i in range(kills):
        kind = kinds[i % len(kinds)]
        print(json.dumps(driver.one(kind, *references[kind], folder, numbers)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
