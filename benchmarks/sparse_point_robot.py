"""PEARL's sparse point robot (Rakelly et al. 2019, section 6.3): goals on a half circle, no reward beyond 0.2 of it.

Mean return of episode K + 1 on held-out goals, that is after K episodes, of ``--trainings`` trainings of at most five
minutes of CPU time; training goals, validation goals and test goals are others. What is known of a new goal is the
sparse reward alone. In training, on 80 goals, policies learn from the dense reward (−distance), but for VariBAD's.
Standard errors are those of goals and trainings together. Settings were chosen on validation goals and seed 0, which is
none of the trainings. ``reference`` is ideal Thompson sampling on the same goals, which knows the half circle and the
disc; ``seconds`` is CPU time of one training.

- ``oracle``: straight to the known goal. ``thompson_after_K``: ideal Thompson sampling
  (:mod:`bayesmeta.rl.oracles.robot`): go to a guess, stay, exclude what it would have met. ``half_circle_…``: both on
  goals spread evenly; the 20 test goals happen to be somewhat easier.
- ``pearl_released_after_K``: PEARL as released: the encoder learns from the critics and the KL.
- ``distilled_after_K``, ``distilled_gaussian_after_K``: a Gaussian for each training goal, learned by the critics, and
  an encoder distilled onto them from chains of posterior sampling (:mod:`bayesmeta.rl.off_policy.distilled`): a mixture
  of these Gaussians with weights read from the context, or one Gaussian. This is not PEARL.
- ``maesn_after_K``: MAESN; see :mod:`benchmarks._sparse_maesn` for what an episode of a trial is.
- ``varibad_after_K``: VariBAD, whose policy reads the belief at every step and plans with it. **It is told more** than
  the methods above: encoder, decoder and readout have 32 places of the half circle, where the goal is known to be, and
  the readout offers the way to the near places that are not excluded. It learns from the sparse reward of a disc that
  is wider at first, and is paid for what its belief gains. In an offline check of the readout's rule alone, with a
  likelihood written by hand, test goals were scored beside validation goals; both put the same length first.
- ``pearl_best_after_K``: the one of PEARL and the two distilled forms with the highest validation return after ten
  episodes, held to the bars.
- ``explore_STRATEGY_after_K``: the same trained learner of ``pearl_best`` with other ways to explore: the mean of the
  belief in place of a draw, and draws from the prior.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesmeta.rl.envs.family import check_split
from bayesmeta.rl.oracles.robot import half_circle, straight_returns, thompson_returns
from benchmarks._sparse_methods import EPISODES, FAMILY, METHODS, Training, goals_of, learner_of, trained
from benchmarks.harness import Bar, Row, at_least, at_most, main, plain, standard_error, write_json
from benchmarks.runs import refuse_unknown

#: Episodes seen before the one that is read.
AFTER = (0, 1, 2, 5, 10)
BARS = {2: at_least(2.5), 10: at_least(7.0)}
SECONDS = at_most(300.0)
#: Seed of the first training, added to --seed; 0 is the one that settings were chosen on.
FIRST = 1
#: Of ideal Thompson sampling, over all goals.
TRIALS = 4000
#: Methods of which the best is ``pearl_best``.
FORMS = ("pearl", "distilled", "distilled_gaussian")
#: Trainings that are done, by method and seed: with --reuse, later runs read them.
KEPT = Path("runs/bench/sparse_point_robot")


def references(goals: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Returns on each goal: of the oracle ``[goals]``, and of ideal Thompson sampling ``[episodes, goals]``."""
    copies = TRIALS // len(goals)
    each = thompson_returns(FAMILY, goals.repeat_interleave(copies, 0), EPISODES, generator=seed)
    return straight_returns(FAMILY, goals), each.unflatten(1, (len(goals), copies)).mean(-1)


def error_of(returns: Tensor) -> float | None:
    """Standard error of the mean of ``[trainings, goals]``, over both.

    The variances of the two means add up; what a training does on one goal alone is counted in both, so that the error
    is rather too large.
    """
    parts = [standard_error(returns.mean(dim)) for dim in (0, 1)]
    known = [part**2 for part in parts if part is not None]
    return sum(known) ** 0.5 if known else None


def rows_of(name: str, returns: Tensor, ideal: Tensor, seconds: float | None, bars: dict[int, Bar]) -> list[Row]:
    """Rows of returns ``[trainings, episodes, goals]``, beside ideal Thompson sampling's ``[episodes, goals]``."""
    rows = []
    for after in AFTER:
        mean, reference = float(returns[:, after].mean()), float(ideal[after].mean())
        judged = bars[after].judge(mean) if after in bars else {}
        error = error_of(returns[:, after])
        rows.append(Row(f"{name}_after_{after}", mean, reference, None, None, error, seconds, **judged))
    print(f"{name}: " + ", ".join(f"{row.ours:.2f} ± {row.standard_error or 0:.2f}" for row in rows), flush=True)
    return rows


def training_of(name: str, seed: int, args: argparse.Namespace) -> Training:
    """One training; with ``--reuse`` from the file of an earlier run with the same settings, if there is one."""
    method = METHODS[name]
    iterations = args.iterations or (method.quick if args.quick else method.iterations)
    learner = learner_of(method, seed, iterations)
    asked = {"iterations": iterations, "split": args.split, "copies": args.copies, "options": plain(learner.options())}
    path = KEPT / f"{name}_{args.split}_{seed}.json"
    if args.reuse and path.is_file():
        known = json.loads(path.read_text())
        if known.pop("asked") == asked:
            print(f"{name}, seed {seed}: from {path}", flush=True)
            returns = {strategy: torch.tensor(value) for strategy, value in known.pop("returns").items()}
            return Training(returns, **known)
    print(f"{name}, seed {seed}", flush=True)
    found = trained(learner, iterations, args.split, args.copies, method.strategies)
    if not args.quick:
        write_json(path, {"asked": asked, **found._asdict()})
    return found


def best_of(trainings: dict[str, list[Training]]) -> str | None:
    """The form with the highest validation return in the last episode, mean over trainings; None without one."""
    known = {name: trainings[name] for name in FORMS if name in trainings}
    if not known:
        return None
    return max(known, key=lambda name: sum(t.validation[-1] for t in known[name]) / len(known[name]))


def method_rows(name: str, trainings: list[Training], ideal: Tensor, bars: dict[int, Bar]) -> list[Row]:
    """Rows of a method's usual way to explore."""
    usual = next(iter(trainings[0].returns))
    returns = torch.stack([t.returns[usual] for t in trainings])
    return rows_of(name, returns, ideal, sum(t.seconds for t in trainings) / len(trainings), bars)


def best_rows(best: str, trainings: list[Training], ideal: Tensor, quick: bool) -> list[Row]:
    """Rows of the best form, held to the bars, and of its other ways to explore."""
    rows = method_rows("pearl_best", trainings, ideal, {} if quick else BARS)
    longest = max(t.seconds for t in trainings)
    rows.append(Row("pearl_best_cpu_seconds", longest, **({} if quick else SECONDS.judge(longest))))
    for strategy in METHODS[best].strategies[1:]:
        returns = torch.stack([t.returns[strategy] for t in trainings])
        rows += rows_of(f"explore_{strategy}", returns, ideal, None, {})
    return rows


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    refuse_unknown(args.methods, METHODS, "method")
    check_split(args.split)
    torch.set_num_threads(args.threads)
    if args.quick:
        args.trainings, args.copies = 1, 2
    oracle, ideal = references(goals_of(args.split, 1, args.seed).tasks.goal, args.seed)
    rows = [Row("oracle", float(oracle.mean()), standard_error=standard_error(oracle))]
    rows += rows_of("thompson", ideal.unsqueeze(0), ideal, None, {})
    whole, evenly = references(half_circle(200), args.seed)
    rows.append(Row("half_circle_oracle", float(whole.mean())))
    rows += rows_of("half_circle_thompson", evenly.unsqueeze(0), evenly, None, {})
    trainings: dict[str, list[Training]] = {}
    for name in args.methods:
        trainings[name] = [training_of(name, FIRST + args.seed + i, args) for i in range(args.trainings)]
        rows += method_rows("pearl_released" if name == "pearl" else name, trainings[name], ideal, {})
    best = best_of(trainings)
    if best is not None:
        print(f"the best on validation goals: {best}", flush=True)
        rows += best_rows(best, trainings[best], ideal, args.quick)
    args.best, args.curves = best, {name: [curves(t) for t in found] for name, found in trainings.items()}
    args.curves["thompson"] = ideal.mean(1).tolist()
    return rows


def curves(training: Training) -> dict[str, Any]:
    """What the JSON file keeps of a training: mean return of each episode by strategy, and how it learned."""
    means = {strategy: returns.mean(1).tolist() for strategy, returns in training.returns.items()}
    return {"episodes": means, "learning": training.learning, "cpu_seconds": training.seconds}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help=f"which (default: {' '.join(METHODS)})")
    parser.add_argument("--trainings", type=int, default=3, help="trainings of each (default: 3)")
    parser.add_argument("--iterations", type=int, default=0, help="of a training (default: the method's own)")
    parser.add_argument("--copies", type=int, default=20, help="trials of each held-out goal (default: 20)")
    parser.add_argument("--split", default="test", help="goals: test, or validation to choose by")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--reuse", action="store_true", help=f"read trainings that {KEPT} has")


if __name__ == "__main__":
    main("sparse_point_robot", run, add_arguments)
