"""Half-cheetah that must find its direction or its velocity (Finn et al. 2017, section 5.3): what was reached, in how
many steps.

The environments are gymnasium's HalfCheetah-v5 behind MuJoCo (the extra ``mujoco``), 200 steps an episode, with the
rewards of :mod:`bayesmeta.rl.envs.cheetah`. Rows are mean returns over held-out tasks, episode by episode for learners
that remember and before and after gradient steps for those that take them, with a standard error over tasks or, of
several trainings, between these; ``…_environment_steps`` has the steps of one training, ``seconds`` its CPU time. Held
out are velocities that were not trained on; of the two directions none can be, so there it is starts alone. ``random``
draws actions uniformly.

A full run takes hours on a CPU: most is the learners' time, since a core steps MuJoCo some 15,000 times a second.
``--workers`` gives each environment a process, ``--device cuda`` the networks a GPU. **The settings are a start: they
were not tuned**, and no row has a bar. The papers train for 10⁷ to 10⁸ steps.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesmeta.rl import setups
from bayesmeta.rl.reference_policies import references
from bayesmeta.rl.setups import Setup
from benchmarks.harness import Row, main, standard_error
from benchmarks.runs import over_trainings, refuse_unknown

FAMILIES = ("direction", "velocity")


class Training(NamedTuple):
    """What differs from the settings of the command line; a quick run has two small iterations of short episodes."""

    options: dict[str, Any]
    quick: dict[str, Any]


#: By names of methods on the command line.
METHODS = {
    "rl2": Training({"episodes": 2, "tasks": 40, "units": 128, "iterations": 500}, {"tasks": 4, "units": 8}),
    "maml": Training(
        {"tasks": 20, "copies": 10, "units": 64, "iterations": 300}, {"tasks": 2, "copies": 2, "units": 8}
    ),
    "pearl": Training({"episodes": 3, "tasks": 20, "units": 200, "iterations": 300}, {"tasks": 2, "units": 8}),
    "varibad": Training({"episodes": 2, "tasks": 40, "units": 128, "iterations": 500}, {"tasks": 4, "units": 8}),
}


def setup_of(family: str, method: str, args: argparse.Namespace, seed: int) -> Setup:
    """A training's settings, whole."""
    training = METHODS[method]
    options: dict[str, Any] = {**training.options}
    if args.quick:
        options |= {**training.quick, "iterations": 2, "horizon": 10}
    if args.iterations:
        options["iterations"] = args.iterations
    return Setup(f"half-cheetah-{family}", method, workers=args.workers, seed=seed, **options).filled()


def count_steps(env: Any) -> list[int]:
    """A list whose only number is how many environments were stepped from now on."""
    counted, step = [0], env.step

    def count(actions: Tensor) -> Any:
        counted[0] += env.num_envs
        return step(actions)

    env.step = count
    return counted


def return_rows(name: str, returns: Tensor, unit: str, seconds: float | None) -> list[Row]:
    """A row for each point of an adaptation, of returns ``[points, tasks]``."""
    rows = []
    for point, values in enumerate(returns):
        when = f"episode_{point + 1}" if unit == "episode" else ("before" if point == 0 else f"after_{point}")
        rows.append(Row(f"{name}_{when}", float(values.mean()), standard_error=standard_error(values), seconds=seconds))
    print("; ".join(f"{row.name} {row.ours:.1f}" for row in rows), flush=True)
    return rows


def learner_rows(family: str, method: str, args: argparse.Namespace, seed: int) -> list[Row]:
    """One training, and what it reached on held-out tasks."""
    setup = setup_of(family, method, args, seed)
    environments = setup.family()
    begin = time.process_time()
    learner = setup.learner(environments, args.device)
    counted = count_steps(learner.env)
    learner.train(setup.iterations)
    seconds = time.process_time() - begin
    learner.env.close()
    held_out = setup.held_out(environments, args.tasks, split=args.split, seed=seed, device=args.device)
    curve = learner.curve(held_out, points=None if setup.remembers else 3, generator=seed)
    held_out.close()
    rows = return_rows(f"{family}_{method}", curve.cpu().returns, curve.unit, seconds)
    return [*rows, Row(f"{family}_{method}_environment_steps", float(counted[0]), seconds=seconds)]


def random_rows(family: str, args: argparse.Namespace) -> list[Row]:
    """What uniform actions reach in an episode."""
    environments = Setup(f"half-cheetah-{family}", "rl2", horizon=10 if args.quick else None).family()
    tasks = environments.sample_tasks(args.tasks, generator=args.seed, split=args.split)
    found = {reference.name: reference.curve for reference in references(environments, tasks, 1, seed=args.seed)}
    return return_rows(f"{family}_random", found["random"].returns, "episode", None)


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    refuse_unknown(args.methods, [name for name in METHODS if name in setups.METHODS], "method")
    refuse_unknown(args.families, FAMILIES, "family")
    if find_spec("mujoco") is None:
        raise SystemExit("this benchmark needs MuJoCo: pip install 'bayesmeta[mujoco]'")
    torch.set_num_threads(args.threads)
    if args.quick:
        args.tasks = min(args.tasks, 4)
    rows: list[Row] = []
    for family in args.families:
        rows += random_rows(family, args)
        for method in args.methods:
            seeds = range(args.seed, args.seed + args.trainings)
            rows += over_trainings([learner_rows(family, method, args, seed) for seed in seeds], {})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    here = [name for name in METHODS if name in setups.METHODS]
    parser.add_argument("--methods", nargs="+", default=here, help=f"which (default: {' '.join(here)})")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help=f"which (default: {' '.join(FAMILIES)})")
    parser.add_argument("--trainings", type=int, default=1, help="seeds from --seed on (default: 1)")
    parser.add_argument("--iterations", type=int, default=0, help="of each training (default: the method's own)")
    parser.add_argument("--tasks", type=int, default=20, help="held-out tasks (default: 20)")
    parser.add_argument("--split", default="test", help="of the tasks: test, or validation to choose by")
    parser.add_argument("--workers", action="store_true", help="each environment in a process of its own")
    parser.add_argument("--device", default="cpu", help="of the networks (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("halfcheetah", run, add_arguments)
