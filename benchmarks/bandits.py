"""Bernoulli bandits (Duan et al. 2016, RL², table 1): classical algorithms against the published figures, and the
optimum.

Rows ``NAME_nPULLS_kARMS``: mean total reward of 20,000 test tasks (new bandits, p ~ U(0, 1)), with its standard error;
``reference`` is the published figure of 1000 instances, ``difference`` ours minus theirs. The bar is on the distance: 3
combined standard errors (the paper's from the same spread and 1000 instances) and the rounding of its table.

Settings: UCB1 with c = 0.2, ε = 0.01; Gittins indices of the pulls that are left for 10 and 100 pulls, and of γ = 0.995
for 500 (of 0.98, 0.99 and 0.995 the one that met the paper's 50 arms on 2000 validation tasks: 458, 462 and 464 for its
464); greedy rules take the first of equal arms, which is what the published figures agree with. ``thompson_n10_k5``
is held to our own long simulation. ``optimistic_thompson`` has no bar: the published rule does not give the paper's
row. ``bayes_optimal_n10_…`` are exact.

Rows ``rl2_…`` and ``snail_…`` are policies trained here (see ``benchmarks/_bandit_learners.py``), greedy on the same
test tasks; ``seconds`` is the CPU time of their training. ``maml_rl_…`` takes one policy-gradient step between its
pulls, and has no bar: it is the papers' negative result.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks._bandit_baselines import SIZES, TABLE, baseline_rows
from benchmarks._bandit_learners import NAMES, learner_row
from benchmarks.harness import Row, main
from benchmarks.runs import refuse_unknown


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    refuse_unknown(args.baselines, TABLE, "baseline")
    refuse_unknown(args.learners, NAMES, "learner")
    torch.set_num_threads(args.threads)
    sizes = [(n, k) for n, k in SIZES if n in args.pulls]
    if args.quick:
        sizes = [(10, 5), (100, 5)]
    instances = 2000 if args.quick else args.instances
    rows = baseline_rows(args.baselines, sizes, instances, args.seed)
    return rows + [learner_row(name, instances, args.seed, args.quick) for name in args.learners]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--baselines", nargs="*", default=list(TABLE), help="which algorithms (default: all)")
    parser.add_argument("--learners", nargs="*", default=list(NAMES), help="which learned policies (default: all)")
    parser.add_argument("--pulls", nargs="+", type=int, default=[10, 100, 500], help="which numbers of pulls")
    parser.add_argument("--instances", type=int, default=20_000, help="test tasks (default: 20000)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("bandits", run, add_arguments)
