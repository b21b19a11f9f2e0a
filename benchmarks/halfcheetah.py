"""Half-cheetah that must find its direction or its velocity (Finn et al. 2017, section 5.3): what was reached, in how
many steps.

The environments are gymnasium's HalfCheetah-v5 behind MuJoCo (the extra ``mujoco``), 200 steps an episode, with the
rewards of :mod:`bayesmeta.rl.envs.cheetah`. Settings are those of :mod:`bayesmeta.rl.setups_cheetah`, chosen on
validation tasks and other seeds for trainings of minutes on one core; the papers train for 10⁶ to 10⁸ steps. Held out
are velocities that were not trained on; of the two directions none can be, so there it is starts alone.

Rows, with standard errors over tasks or, of several trainings, between these; ``seconds`` is a training's CPU time:

- ``FAMILY_METHOD_episode_N`` for learners that remember, ``…_before`` and ``…_after_N`` for those that take gradient
  steps: mean returns on held-out tasks; of directions also ``…_forward`` and ``…_backward``.
- ``…_gain``: each of these less the first, task by task: what adaptation brought. A learner that acts on what it has
  seen within an episode can have found its task after some steps of the first one; then there is nothing left to gain.
- ``…_drawn``: of RL² and VariBAD, the same with actions that are drawn in place of the likeliest ones.
- ``direction_varibad_belief_after_N``: in how many of the tasks the decoder tells the direction right after N steps of
  a trial (by chance ½); ``velocity_varibad_belief_after_N``: how far the velocity that it expects most of is from the
  task's (1 m/s for all: .5). Both are at the belief's mean.
- ``…_environment_steps``: of one training.
- ``FAMILY_random_…``: uniform actions. ``velocity_still`` and ``velocity_all_at_1``: at 0 and at 1 m/s in all tasks, at
  no cost of control; nobody who does not adapt can do much better than the latter.

No row has a bar. Trainings that are done are kept: with ``--reuse`` later runs read those of the same settings.
``--workers`` gives each environment a process, ``--device cuda`` the networks a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesmeta.rl.envs.family import check_split
from bayesmeta.rl.reference_policies import references
from bayesmeta.rl.setups import Setup
from benchmarks._cheetah_training import Training, trained
from benchmarks.harness import Row, main, plain, standard_error, write_json
from benchmarks.runs import over_trainings, refuse_unknown

FAMILIES = ("direction", "velocity")
#: What a quick run has in place of a method's own settings: two small iterations of short episodes.
METHODS: dict[str, dict[str, Any]] = {
    "rl2": {"tasks": 4, "units": 8},
    "varibad": {"tasks": 4, "units": 8},
    "maml": {"tasks": 2, "copies": 2, "units": 8},
    "pearl": {"tasks": 2, "units": 8},
}
#: Trainings that are done.
KEPT = Path("runs/bench/halfcheetah")
#: Seed of the first training, added to --seed: settings were chosen on others.
FIRST = 1


def setup_of(family: str, method: str, args: argparse.Namespace, seed: int) -> Setup:
    """A training's settings, whole."""
    options: dict[str, Any] = {**METHODS[method], "iterations": 2, "horizon": 10} if args.quick else {}
    if args.iterations:
        options["iterations"] = args.iterations
    return Setup(f"half-cheetah-{family}", method, workers=args.workers, seed=seed, **options).filled()


def training_of(family: str, method: str, args: argparse.Namespace, seed: int) -> Training:
    """One training; with ``--reuse`` that of an earlier run with the same settings, if there is one."""
    setup = setup_of(family, method, args, seed)
    learner = setup.learner(setup.family(), args.device)
    asked = plain({**dataclasses.asdict(setup), "held_out": args.tasks, "split": args.split, **learner.options()})
    path = KEPT / f"{family}_{method}_{args.split}_{seed}.json"
    if args.reuse and path.is_file():
        known = json.loads(path.read_text())
        if known.pop("asked") == asked:
            print(f"{family}, {method}, seed {seed}: from {path}", flush=True)
            learner.env.close()
            return Training(**known)
    print(f"{family}, {method}, seed {seed}", flush=True)
    found = trained(setup, learner, args.tasks, args.split, args.device)
    if not args.quick:
        write_json(path, {"asked": asked, **found._asdict()})
    return found


def return_rows(name: str, returns: Tensor, unit: str, tasks: list[float] | None, seconds: float | None) -> list[Row]:
    """Rows of returns ``[points, tasks]``; ``tasks`` are directions, None of other families."""
    rows = []
    for point, values in enumerate(returns):
        when = f"episode_{point + 1}" if unit == "episode" else ("before" if point == 0 else f"after_{point}")
        rows.append(mean_row(f"{name}_{when}", values, seconds))
        if tasks is not None:
            forward = torch.tensor(tasks) > 0
            rows += [
                mean_row(f"{name}_{when}_{side}", values[some])
                for side, some in (("forward", forward), ("backward", ~forward))
                if bool(some.any())
            ]
        if point:
            rows.append(mean_row(f"{name}_{when}_gain", values - returns[0]))
    print("; ".join(f"{row.name} {row.ours:.1f}" for row in rows), flush=True)
    return rows


def mean_row(name: str, values: Tensor, seconds: float | None = None) -> Row:
    """A mean over tasks."""
    return Row(name, float(values.mean()), standard_error=standard_error(values), seconds=seconds)


def training_rows(family: str, method: str, found: Training) -> list[Row]:
    """All rows of a training."""
    name, directions = f"{family}_{method}", found.tasks if family == "direction" else None
    rows = return_rows(name, torch.tensor(found.returns), found.unit, directions, found.seconds)
    rows += [mean_row(f"{name}_episode_{n}_drawn", torch.tensor(each)) for n, each in enumerate(found.drawn, 1)]
    rows += [mean_row(f"{name}_belief_after_{n}", torch.tensor(values)) for n, values in found.beliefs.items()]
    return [*rows, Row(f"{name}_environment_steps", float(found.steps), seconds=found.seconds)]


def random_rows(family: str, args: argparse.Namespace) -> list[Row]:
    """What uniform actions reach in an episode, and a velocity that is the same in all tasks."""
    setup = Setup(f"half-cheetah-{family}", "rl2", horizon=10 if args.quick else None)
    environments = setup.family()
    held_out = setup.held_out(environments, args.tasks, split=args.split, seed=FIRST + args.seed)
    held_out.close()
    tasks = held_out.tasks  # those of the first training
    found = {reference.name: reference.curve for reference in references(environments, tasks, 1, seed=args.seed)}
    rows = return_rows(f"{family}_random", found["random"].returns, "episode", None, None)
    if family == "velocity":  # what a policy reaches that does not adapt
        wanted, steps = torch.tensor(tasks), float(environments.horizon)
        rows.append(mean_row("velocity_still", -steps * wanted))
        rows.append(mean_row("velocity_all_at_1", -steps * (wanted - 1).abs()))
    return rows


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    refuse_unknown(args.methods, METHODS, "method")
    refuse_unknown(args.families, FAMILIES, "family")
    check_split(args.split)
    if find_spec("mujoco") is None:
        raise SystemExit("this benchmark needs MuJoCo: pip install 'bayesmeta[mujoco]'")
    torch.set_num_threads(args.threads)
    if args.quick:
        args.tasks = min(args.tasks, 4)
    rows, args.curves = list[Row](), {}
    for family in args.families:
        rows += random_rows(family, args)
        for method in args.methods:
            seeds = range(FIRST + args.seed, FIRST + args.seed + args.trainings)
            done = [training_of(family, method, args, seed) for seed in seeds]
            rows += over_trainings([training_rows(family, method, each) for each in done], {})
            args.curves[f"{family}_{method}"] = [each.learning for each in done]
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"which (default: {' '.join(METHODS)})")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help=f"which (default: {' '.join(FAMILIES)})")
    parser.add_argument("--trainings", type=int, default=1, help="seeds from --seed on (default: 1)")
    parser.add_argument("--iterations", type=int, default=0, help="of each training (default: the method's own)")
    parser.add_argument("--tasks", type=int, default=20, help="held-out tasks (default: 20)")
    parser.add_argument("--split", default="test", help="of the tasks: test, or validation to choose by")
    parser.add_argument("--workers", action="store_true", help="each environment in a process of its own")
    parser.add_argument("--device", default="cpu", help="of the networks (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--reuse", action="store_true", help=f"read trainings that {KEPT} has")


if __name__ == "__main__":
    main("halfcheetah", run, add_arguments)
