"""PEARL's environment steps and gradient steps per second, against a plain loop over tasks.

Both sides are PEARL on the sparse point robot with the same networks, losses, batch sizes and number of tasks, on one
core and one thread (:mod:`benchmarks._plain_pearl` is the loop). Ours steps all tasks as one tensor and takes a
gradient step on all tasks of a batch at once; the loop has a gymnasium environment for each task and calls the networks
task by task, as one would write it first. Sides take turns in blocks; what is compared is the processor's time.
``ours`` and ``reference`` are medians of steps per second, ``ratio`` is ours over theirs, with a bootstrap over rounds
for its standard error.

- ``environment_steps``: trials of 10 episodes in 80 tasks, policy and posterior sampling included.
- ``gradient_steps_…``: updates of encoder, critics, actor and temperature. ``all_tasks`` takes a few steps of every
  task, ``meta_batch`` more steps of 16 tasks, ``released`` the sizes of Rakelly et al. 2019 (16 × 256 steps, networks
  of 3 × 300). What batching saves is the cost of a call; what it cannot save is arithmetic, so that the ratio falls
  with the size of networks and batches, to 1 and below where arithmetic takes all the time: the small products of the
  loop stay in the cache of one core.

The bars are those of ``environment_steps`` and of updates on all tasks.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import NamedTuple

import torch

from bayesmeta.models.encoders import ProductEncoder
from bayesmeta.rl.envs import SparsePointRobot, TensorVectorEnv
from bayesmeta.rl.off_policy.pearl import PEARL, PEARLConfig
from bayesmeta.rl.off_policy.sac import SACConfig
from benchmarks._peers import one_core
from benchmarks._plain_pearl import PlainPEARL
from benchmarks.harness import Row, at_least, main
from benchmarks.speed_meta_step import ratio_of_medians


class Size(NamedTuple):
    """Sizes of an update, and the updates of a block on each side."""

    meta_batch: int
    batch: int
    context: int
    hidden: tuple[int, ...]
    encoder: tuple[int, ...]
    blocks: tuple[int, int]


SIZES = {
    "all_tasks": Size(80, 8, 20, (64, 64), (64, 64), (20, 1)),
    "meta_batch": Size(16, 32, 128, (128, 128), (64, 64), (10, 2)),
    "released": Size(16, 256, 1024, (300, 300, 300), (200, 200, 200), (1, 1)),
}
TASKS, EPISODES, BAR = 80, 10, 10.0


def learner(size: Size, seed: int, tasks: int = TASKS, episodes: int = EPISODES) -> PEARL:
    """PEARL of these sizes on the sparse point robot."""
    env = TensorVectorEnv(SparsePointRobot(), tasks, episodes_per_trial=episodes, generator=seed)
    config = PEARLConfig(
        sac=SACConfig(gamma=0.9, lr=3e-4, reward_scale=10.0, hidden=size.hidden),
        meta_batch=size.meta_batch,
        batch=size.batch,
        context_batch=size.context,
        train_reward="dense_reward",
    )
    encoder = ProductEncoder(4, 1, config.latent, hidden=size.encoder, activation="relu", sort=False)
    return PEARL(env, config, encoder=encoder, seed=seed)


class Sides(NamedTuple):
    """Both sides after their first trials."""

    ours: PEARL
    plain: PlainPEARL

    def collect(self, side: str) -> float:
        """Environment steps per second of processor time, of one trial in each task."""
        begin = time.process_time()
        if side == "ours":
            rollout = self.ours.collect()
            self.ours.store(rollout)
            steps = rollout.reward.numel()
        else:
            steps = self.plain.collect()
        return steps / (time.process_time() - begin)

    def update(self, side: str, updates: int) -> float:
        """Gradient steps per second of processor time."""
        step = self.ours.update if side == "ours" else self.plain.update
        begin = time.process_time()
        for _ in range(updates):
            step()
        return updates / (time.process_time() - begin)


def sides(size: Size, seed: int, **options: int) -> Sides:
    """Both sides with something in their buffers."""
    ours = learner(size, seed, **options)
    found = Sides(ours, PlainPEARL(ours, seed))
    ours.store(ours.collect())
    found.plain.collect()
    return found


def compared(name: str, speeds: dict[str, list[float]], seed: int, begin: float, bar: bool) -> Row:
    """The row of one figure."""
    ratio, error = ratio_of_medians(speeds["ours"], speeds["plain"], seed)
    ours, theirs = median(speeds["ours"]), median(speeds["plain"])
    judged = at_least(BAR).judge(ratio) if bar else {}
    row = Row(name, ours, theirs, ratio, None, error, time.perf_counter() - begin, **judged)
    print(f"{name}: {ours:.4g} against {theirs:.4g} a second, {ratio:.1f} times", flush=True)
    return row


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    unknown = [name for name in args.sizes if name not in SIZES]
    if unknown:
        raise SystemExit(f"unknown size {', '.join(unknown)}; expected some of {', '.join(SIZES)}")
    torch.set_num_threads(1)
    one_core()
    rows, rounds = [], 3 if args.quick else args.rounds
    options = {"tasks": 16, "episodes": 2} if args.quick else {}
    for name in args.sizes:
        begin, size = time.perf_counter(), SIZES[name]
        both = sides(size, args.seed, **options)
        order = [sorted(("ours", "plain"), reverse=bool(i % 2)) for i in range(rounds)]
        for side in order[0]:
            both.update(side, 1)
        if name == args.sizes[0]:
            speeds: dict[str, list[float]] = {"ours": [], "plain": []}
            for sequence in order:
                for side in sequence:
                    speeds[side].append(both.collect(side))
            rows.append(compared("environment_steps", speeds, args.seed, begin, not args.quick))
        begin, speeds = time.perf_counter(), {"ours": [], "plain": []}
        for sequence in order:
            for side in sequence:
                speeds[side].append(both.update(side, 1 if args.quick else size.blocks[side == "plain"]))
        bar = name == "all_tasks" and not args.quick
        rows.append(compared(f"gradient_steps_{name}", speeds, args.seed, begin, bar))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="which sizes of updates (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of blocks (default: 5)")


if __name__ == "__main__":
    main("pearl_speed", run, add_arguments)
