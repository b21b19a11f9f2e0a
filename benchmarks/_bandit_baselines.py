"""Classical bandit algorithms against RL²'s table (Duan et al. 2016, table 1); see ``benchmarks/bandits.py``."""

from __future__ import annotations

import time

import torch

from bayesmeta.rl.baselines import bandits as rules
from bayesmeta.rl.envs import BernoulliBandit
from bayesmeta.rl.oracles.bandits import bayes_optimal_bandit_value
from benchmarks.harness import Row, at_most

#: (pulls, arms) of the published table.
SIZES = [(n, k) for n in (10, 100, 500) for k in (5, 10, 50)]
#: Its rows, means over 1000 instances rounded to 0.1. Thompson sampling with 10 pulls is not held to it: see OWN.
TABLE = {
    "random": (5.0, 5.0, 5.1, 49.9, 49.9, 49.8, 249.8, 249.0, 249.6),
    "gittins": (6.6, 6.6, 6.5, 78.3, 82.8, 85.2, 405.8, 437.8, 463.7),
    "thompson": (5.7, 5.5, 5.2, 74.7, 76.7, 64.5, 402.0, 429.5, 427.2),
    "optimistic_thompson": (6.5, 6.2, 5.5, 77.9, 81.4, 67.7, 406.7, 438.9, 437.6),
    "ucb1": (6.7, 6.7, 6.6, 78.0, 82.4, 84.3, 405.8, 437.1, 457.6),
    "epsilon_greedy": (6.6, 6.6, 6.6, 75.4, 77.4, 78.3, 388.2, 408.0, 413.6),
    "greedy": (6.6, 6.6, 6.6, 74.8, 77.1, 78.0, 380.6, 395.0, 402.8),
}
PAPER_INSTANCES, ROUNDING = 1000, 0.05
#: An independent simulation of 20,000 instances, and its standard error.
OWN = {("thompson", 10, 5): (5.82, 0.01)}
#: Rows without a bar. The published rule (May et al. 2012) does not give the paper's optimistic row, whatever the size:
#: with 10 pulls it explores as Thompson sampling does.
NO_BAR = ("optimistic_thompson",)


def rule(name: str, pulls: int) -> rules.BanditBaseline:
    """The algorithm of a row."""
    known: dict[str, rules.BanditBaseline] = {
        "random": rules.Random(),
        "gittins": rules.Gittins() if pulls <= 100 else rules.Gittins(0.995),
        "thompson": rules.ThompsonSampling(),
        "optimistic_thompson": rules.OptimisticThompsonSampling(),
        "ucb1": rules.UCB1(0.2),
        "epsilon_greedy": rules.EpsilonGreedy(ties="first", epsilon=0.01),
        "greedy": rules.Greedy(ties="first"),
    }
    return known[name]


def play(name: str, pulls: int, arms: int, instances: int, seed: int, chunk: int = 4000) -> torch.Tensor:
    """Total rewards of the test tasks, ``[instances]``."""
    family = BernoulliBandit(arms=arms, horizon=pulls)
    tasks = family.sample_tasks(instances, generator=seed, split="test")
    totals = []
    for begin in range(0, instances, chunk):
        part = tasks[slice(begin, begin + chunk)]
        totals.append(rules.play_bandits(rule(name, pulls), family, part, generator=seed + begin).sum(0))
    return torch.cat(totals)


def allowed(totals: torch.Tensor, key: tuple[str, int, int]) -> tuple[float, float]:
    """The reference, and how far a mean may be from it: 3 combined standard errors and the rounding."""
    spread, ours = float(totals.std()), float(totals.std()) / len(totals) ** 0.5
    if key in OWN:
        figure, error = OWN[key]
        return figure, 3 * (ours**2 + error**2) ** 0.5 + ROUNDING / 10
    figure = TABLE[key[0]][SIZES.index((key[1], key[2]))]
    return figure, 3 * (ours**2 + spread**2 / PAPER_INSTANCES) ** 0.5 + ROUNDING


def baseline_row(name: str, pulls: int, arms: int, instances: int, seed: int) -> Row:
    """One algorithm at one size; its bar is on the distance from the reference."""
    begin = time.perf_counter()
    totals = play(name, pulls, arms, instances, seed)
    reference, limit = allowed(totals, (name, pulls, arms))
    mean, error = float(totals.mean()), float(totals.std()) / len(totals) ** 0.5
    judged = {} if name in NO_BAR else at_most(round(limit, 3)).judge(abs(mean - reference))
    seconds = time.perf_counter() - begin
    print(f"{name}_n{pulls}_k{arms}: {mean:.3f} ± {error:.3f}, published {reference:g}", flush=True)
    return Row(f"{name}_n{pulls}_k{arms}", mean, reference, None, mean - reference, error, seconds, **judged)


def optimal_row(arms: int) -> Row:
    """The Bayes-optimal value of 10 pulls, exactly."""
    begin = time.perf_counter()
    reference = {5: 6.6600, 10: 6.7140, 50: 6.7140}[arms]
    value = bayes_optimal_bandit_value(arms, 10)
    judged = at_most(1e-4).judge(abs(value - reference))
    seconds = time.perf_counter() - begin
    return Row(f"bayes_optimal_n10_k{arms}", value, reference, None, value - reference, None, seconds, **judged)


def baseline_rows(names: list[str], sizes: list[tuple[int, int]], instances: int, seed: int) -> list[Row]:
    """All rows of the algorithms and sizes that were asked for."""
    rows = [optimal_row(arms) for pulls, arms in sizes if pulls == 10]
    return rows + [baseline_row(name, n, k, instances, seed) for n, k in sizes for name in names]
