"""What is trained on the sparse point robot, and how its episodes are read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bayesmeta.rl.envs import SparsePointRobot, TensorVectorEnv
from bayesmeta.rl.off_policy.distilled_setups import distilled_for
from bayesmeta.rl.off_policy.pearl import PEARL, PEARLConfig
from bayesmeta.rl.off_policy.sac import SACConfig
from bayesmeta.rl.varibad.setups import robot_varibad
from benchmarks._sparse_maesn import ITERATIONS as MAESN_ITERATIONS
from benchmarks._sparse_maesn import QUICK as MAESN_QUICK
from benchmarks._sparse_maesn import maesn

FAMILY, GOALS = SparsePointRobot(), 80
#: One more than the most episodes that somebody may have seen.
EPISODES = 11


class Method(NamedTuple):
    """How a learner is made and for how long it is trained.

    Attributes:
        make: from the training goals' environments, iterations and a seed.
        iterations: of a full training.
        quick: of a quick one.
        strategies: how it can explore at test time, the usual way first; none: as the method has it.
    """

    make: Callable[[Any, int, int], Any]
    iterations: int
    quick: int
    strategies: tuple[str, ...] = ("posterior_sampling", "mean", "prior")


def _distilled(env: Any, iterations: int, seed: int) -> Any:
    return distilled_for(env, iterations=iterations, seed=seed)


def _distilled_gaussian(env: Any, iterations: int, seed: int) -> Any:
    return distilled_for(env, iterations=iterations, seed=seed, posterior="gaussian")


def _pearl(env: Any, iterations: int, seed: int) -> Any:
    """As released, but for smaller networks and batches, which take more steps in the same time."""
    sac = SACConfig(gamma=0.9, lr=1e-3, hidden=(128, 128), reward_scale=10.0)
    config = PEARLConfig(
        sac=sac, meta_batch=16, batch=32, context_batch=128, updates=100, kl_weight=0.08, train_reward="dense_reward"
    )
    return PEARL(env, config, seed=seed)


def _varibad(env: Any, iterations: int, seed: int) -> Any:
    """On trials of the training goals, of four episodes each; more follow at test time."""
    trials = TensorVectorEnv(FAMILY, 256, new_tasks=True, episodes_per_trial=4, generator=seed)
    return robot_varibad(trials, iterations=iterations, seed=seed)


#: By their names on the command line. Rows of "pearl" are named pearl_released.
METHODS: dict[str, Method] = {
    "pearl": Method(_pearl, 130, 2),
    "distilled": Method(_distilled, 400, 6),
    "distilled_gaussian": Method(_distilled_gaussian, 400, 6),
    "maesn": Method(maesn, MAESN_ITERATIONS, MAESN_QUICK, ()),
    "varibad": Method(_varibad, 180, 2, ()),
}


class Training(NamedTuple):
    """One training and what came of it.

    Attributes:
        returns: on the goals asked for, by strategy: ``[episodes, goals]``, the mean over copies.
        validation: mean return of each episode on validation goals at the end.
        learning: the same while it was trained, each with its iteration and CPU seconds.
        seconds: CPU time of the training alone.
    """

    returns: dict[str, Tensor]
    validation: list[float]
    learning: list[dict[str, Any]]
    seconds: float


def goals_of(split: str, copies: int, seed: int) -> TensorVectorEnv:
    """All goals of a set, with some trials each."""
    return TensorVectorEnv(
        FAMILY, len(FAMILY.goals(split)), copies=copies, split=split, episodes_per_trial=EPISODES, generator=seed
    )


def learner_of(method: Method, seed: int, iterations: int) -> Any:
    """An untrained learner on all training goals."""
    env = TensorVectorEnv(FAMILY, GOALS, episodes_per_trial=EPISODES, generator=seed)
    return method.make(env, iterations, seed)


def trained(
    learner: Any, iterations: int, split: str, copies: int, strategies: Sequence[str] = (), reads: int = 4
) -> Training:
    """Train and read.

    Args:
        learner: see :func:`learner_of`.
        iterations: how long.
        split: goals of ``returns``.
        copies: trials of each goal.
        strategies: to explore; none: as the learner has it.
        reads: how often the validation goals are read, the end among them.
    """
    seconds, learning = 0.0, list[dict[str, Any]]()
    for read in range(1, reads + 1):
        begin = time.process_time()
        learner.train(iterations * read // reads - learner.iteration)
        seconds += time.process_time() - begin
        mean = learner.curve(goals_of("validation", copies, 0), generator=0).mean()
        learning.append({"iteration": learner.iteration, "cpu_seconds": seconds, "validation": mean})
        print(f"  {learner.iteration} iterations, {seconds:.0f} s: {_brief(mean)}", flush=True)
    returns = {}
    for strategy in strategies or ("as_is",):
        options = {"exploration": strategy} if strategies else {}
        returns[strategy] = learner.curve(goals_of(split, copies, 1), generator=1, **options).returns
    return Training(returns, learning[-1]["validation"], learning, seconds)


def _brief(returns: list[float]) -> str:
    return "validation " + " ".join(f"{value:.1f}" for value in returns)
