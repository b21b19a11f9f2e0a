"""Environment steps per second: the tensor environments against gymnasium's SyncVectorEnv of the same environments.

Both sides step 1024 copies, 64 to a task, under the same random actions, drawn before, with ``SAME_STEP`` autoreset, on
one core and one thread. The peers are the package's own plain environments, which are written on Python and NumPy
numbers and are made without gymnasium's checking wrappers, so that nothing but stepping is timed. Sides take turns in
blocks of at least one episode; what is compared is the processor's time. ``ours`` and ``reference`` are medians in
thousands of environment steps a second, ``ratio`` is ours over theirs, with a bootstrap over rounds for its standard
error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from bayesmeta.rl import envs
from benchmarks._peers import one_core
from benchmarks.harness import Row, at_least, main
from benchmarks.speed_meta_step import ratio_of_medians

COPIES = 64
FAMILIES: dict[str, envs.Family[Any, Any]] = {
    "bernoulli_bandit": envs.BernoulliBandit(),
    "gaussian_bandit": envs.GaussianBandit(),
    "tabular_mdp": envs.TabularMDP(),
    "navigation": envs.Navigation(),
    "sparse_point_robot": envs.SparsePointRobot(),
    "grid": envs.Grid(),
    "beam_steering": envs.BeamSteering(),
}
BAR = 50.0


def random_actions(family: envs.Family[Any, Any], num: int, generator: torch.Generator) -> Tensor:
    """Of all environments, uniform."""
    space = family.action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.randint(int(space.n), (num,), generator=generator)
    assert isinstance(space, gymnasium.spaces.Box)
    high = torch.as_tensor(space.high)
    return high * (2 * torch.rand(num, *high.shape, generator=generator) - 1)


def sides(family: envs.Family[Any, Any], num: int, seed: int) -> dict[str, Callable[[int], float]]:
    """Functions from a number of steps to the processor's seconds that they take."""
    generator = torch.Generator().manual_seed(seed)
    actions = [random_actions(family, num, generator) for _ in range(16)]
    arrays = [action.numpy() for action in actions]
    copies = COPIES if num % COPIES == 0 else 1
    vector = family.vector(num // copies, copies=copies, generator=seed)
    tasks = [{name: value[i].numpy() for name, value in vector.tasks.as_dict().items()} for i in range(num // copies)]
    makers = [lambda task=task: family.plain(task=task) for task in tasks for _ in range(copies)]
    peer = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    vector.reset()
    peer.reset(seed=seed)

    def timed(env: Any, moves: list[Any]) -> Callable[[int], float]:
        def run(steps: int) -> float:
            begin = time.process_time()
            for step in range(steps):
                env.step(moves[step % len(moves)])
            return time.process_time() - begin

        return run

    return {"ours": timed(vector, actions), "peer": timed(peer, arrays)}


def measure(name: str, num: int, rounds: int, seed: int) -> Row:
    """The row of one family."""
    family, begin = FAMILIES[name], time.perf_counter()
    both = sides(family, num, seed)
    blocks = {"ours": max(family.horizon, 100), "peer": family.horizon}
    for side, run in both.items():
        run(min(blocks[side], 10))
    speeds: dict[str, list[float]] = {side: [] for side in both}
    for index in range(rounds):
        for side in sorted(both, reverse=index % 2 == 1):
            speeds[side].append(blocks[side] * num / both[side](blocks[side]) / 1000)
    ratio, error = ratio_of_medians(speeds["ours"], speeds["peer"], seed)
    ours, theirs = median(speeds["ours"]), median(speeds["peer"])
    judged = at_least(BAR).judge(ratio) if num == 1024 else {}
    row = Row(name, ours, theirs, ratio, None, error, time.perf_counter() - begin, **judged)
    print(f"{name}: {ours:.0f} against {theirs:.0f} thousand steps a second, {ratio:.0f} times", flush=True)
    return row


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    unknown = [name for name in args.families if name not in FAMILIES]
    if unknown:
        raise SystemExit(f"unknown family {', '.join(unknown)}; expected some of {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    one_core()
    return [measure(name, args.copies, 5 if args.quick else args.rounds, args.seed) for name in args.families]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help="which families (default: all)")
    parser.add_argument("--copies", type=int, default=1024, help="environments side by side (default: 1024)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of blocks (default: 15)")


if __name__ == "__main__":
    main("env_throughput", run, add_arguments)
