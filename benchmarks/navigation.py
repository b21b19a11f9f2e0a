"""2-D navigation (Finn et al. 2017, section 5.3): MAML-RL against pre-training that does not meta-learn.

A point is rewarded by −distance² to a goal that it is not shown, for 100 steps. Rows are mean returns over 400 test
goals and 3 trainings after 0, 1, 2, 3 policy-gradient steps on 20 episodes each, with a standard error over goals and
trainings; ``standing_still`` and ``oracle`` (told the goal) bound them. ``joint`` is pre-training without an inner
step on as many episodes (16,000, which is 7 to 13 seconds of one core). The inner rates of each training, joint or not,
are tuned on 100 validation goals of its own: the first by the return after one step, those behind it by that after
three. Settings were chosen on validation goals and another training seed. ``…_against_…`` has the difference, paired by
seed and goal. ``maml_rl_three_steps`` is trained for three inner steps, on as many episodes, so with half the outer
steps.

``maml_rl`` begins with 20 joint iterations: from a policy that drifts, raw advantages send the first steps far away,
and training does not come back. TRPO's curvature is taken from 2 episodes of each task (an outer step of 20 tasks × 10
episodes takes 0.4 s).

What was found (seeds 0–2):

- **One step: MAML-RL is a little ahead** (−0.64 against −0.78, difference 0.14 ± 0.07), and it was trained for one.
  **Two and three: joint training is ahead** (−0.34 against −0.49, −0.27 against −0.48, differences −0.15 ± 0.05 and
  −0.21 ± 0.01). Both are far beyond the bars. The task asks little of a start: pulled to the origin, a policy follows
  its goal when one bias moves, and that pull is what joint training learns.
- **Training for three steps does not change that** (−0.52 after three): each outer step costs twice the episodes.
- **More training helps meta-learning at its one step, and joint training at the steps behind it.** With three times the
  episodes (one training, validation goals) MAML-RL went from −0.62 to −0.44 after one step and from −0.48 to −0.30
  after three; joint training from −0.52 to −0.67 (at a rate of 0.11; −0.94 at 0.15) after one and from −0.27 to −0.18
  after three. Learned rates (Meta-SGD) changed nothing: −0.64 and −0.50.
- **Most of what is left is noise** of the actions: at a standard deviation σ at least 200 σ², which is 0.40 for
  MAML-RL's 0.045 and 0.11 for joint training's 0.024. It stays larger for MAML-RL, half of whose episodes go to the
  inner step, so that it takes fewer outer steps.
- **What collapses pre-training is standardising the advantages**, the usual choice: their spread is that of the
  policy's own noise, so that a step at a fixed rate grows as 1 / σ, and says nothing of how far the goal is (a test
  has the scale in closed form). The best rate of joint training fell from 0.03 at σ = 0.08 to 0.01 at σ = 0.02; at one
  rate, 0.03, its return after a step fell from −3.3 to −4.7 as σ went from 0.081 to 0.054. Even at tuned rates rows
  ``…_standardised`` are worse: −2.75, −1.00, −0.57 for joint training and −2.77, −1.21, −0.83 for MAML-RL, which does
  not win here either (differences −0.02 ± 0.07, −0.22 ± 0.06, −0.26 ± 0.02).
- With advantages in units of the reward (here), neither happens: the best rate of joint training stays between 0.15
  and 0.2 while σ shrinks from 0.043 to 0.022.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayesmeta import nets
from bayesmeta.rl.envs import Navigation, TensorVectorEnv
from bayesmeta.rl.envs.points import GoalTasks
from bayesmeta.rl.policies import GaussianHead, TaskPolicy
from bayesmeta.rl.policy_gradient.inner import Estimation
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from benchmarks.harness import Bar, Row, at_least, at_most, main
from benchmarks.runs import refuse_unknown

STEPS = 3
BARS = {"before": at_most(-15.0), "after_1": at_least(-4.5), "after_3": at_least(-3.0)}
WHEN = ("before", "after_1", "after_2", "after_3")
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
FOLLOW_UPS = (0.25, 0.5, 1.0)


class Method(NamedTuple):
    """How a policy is trained.

    Attributes:
        joint: iterations without an inner step, from the begin: one batch of episodes each.
        meta: iterations of MAML-RL behind them: a batch of episodes for each inner step, and one more.
        raw: advantages in units of the reward; else they are standardised for each task.
        rate: inner rate: that of the training, and 1 in units of the factors tuned over.
        bars: by time of reading, in full runs.
        inner: inner steps of MAML-RL.
    """

    joint: int
    meta: int
    raw: bool
    rate: float
    bars: dict[str, Bar]
    inner: int = 1


METHODS = {
    "maml_rl": Method(20, 30, True, 0.1, BARS),
    "maml_rl_three_steps": Method(20, 15, True, 0.1, {}, inner=3),
    "joint": Method(80, 0, True, 0.1, {}),
    "maml_rl_standardised": Method(20, 30, False, 0.02, {}),
    "joint_standardised": Method(80, 0, False, 0.02, {}),
}
#: Which are compared, pair by pair.
PAIRS = {"maml_rl": "joint", "maml_rl_three_steps": "joint", "maml_rl_standardised": "joint_standardised"}


def policy_of(seed: int) -> TaskPolicy:
    """Two tanh layers of 16, a last layer a tenth of the usual: at first the point stays near the start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nets.mlp(2, [16, 16], 2, activation="tanh")
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
    return TaskPolicy(network, GaussianHead(2, log_std=math.log(0.1)))


def trained(method: Method, seed: int, quick: bool = False) -> MAMLRL:
    """A learner after its training; ``quick`` takes a few iterations of few episodes."""
    tasks, copies = (4, 4) if quick else (20, 10)
    joint, meta = (min(method.joint, 2), min(method.meta, 2)) if quick else (method.joint, method.meta)
    policy = policy_of(seed)
    estimation = Estimation(lam=0.9 if method.raw else 1.0, standardise=not method.raw)

    def learner(inner_steps: int) -> MAMLRL:
        env = TensorVectorEnv(Navigation(), tasks, copies=copies, generator=seed)
        config = MAMLRLConfig(
            inner_steps=inner_steps,
            inner_lr=method.rate,
            max_kl=0.02,
            cg_steps=6,
            curvature_share=0.2,
            curvature_episodes=2,
            estimation=estimation,
        )
        return MAMLRL(env, policy, config, seed=2 * seed + inner_steps)

    run = learner(0)
    run.train(joint)
    if meta:
        run = learner(method.inner)  # goes on with the same policy
        run.train(meta)
    return run


def tuned_rates(run: MAMLRL, method: Method, goals: int, copies: int, seed: int) -> list[float]:
    """The rates of three steps that are best on validation goals: the first by the return after one step, the others,
    a share of it, by that after three."""
    family = Navigation()
    tasks = family.sample_tasks(goals, generator=seed, split="validation")

    def returns(rates: list[float]) -> Tensor:
        env = TensorVectorEnv(family, goals, copies=copies, tasks=tasks, generator=seed)
        return run.evaluate(env, inner_steps=len(rates), rates=rates, generator=seed).mean(1)

    first = max((method.rate * factor for factor in FACTORS), key=lambda rate: float(returns([rate])[1]))
    candidates = [[first, first * share, first * share] for share in FOLLOW_UPS]
    return max(candidates, key=lambda rates: float(returns(rates)[3]))


def returns_on_test_goals(run: MAMLRL, rates: list[float], goals: GoalTasks, copies: int, seed: int) -> Tensor:
    """Mean return of each goal after 0, 1, 2, 3 steps, ``[4, goals]``; the steps see 20 episodes each."""
    env = TensorVectorEnv(Navigation(), len(goals), copies=copies, tasks=goals, generator=seed)
    return run.evaluate(env, inner_steps=STEPS, rates=rates, generator=seed)


def still_and_oracle(goals: GoalTasks) -> tuple[Tensor, Tensor]:
    """Returns of standing still and of going straight to the goal that is told, ``[goals]`` each."""
    family = Navigation()
    env = TensorVectorEnv(family, len(goals), tasks=goals, generator=0)
    position, _ = env.reset()
    total = torch.zeros(len(goals))
    for _ in range(family.horizon):
        position, reward, *_ = env.step(goals.goal - position)
        total += reward
    return -family.horizon * goals.goal.square().sum(-1), total


def error_of(values: Tensor) -> float:
    """Standard error of the mean of ``[seeds, goals]``: goals, which seeds share, and seeds each have their part."""
    seeds, goals = values.shape
    variance = values.mean(0).var() / goals
    if seeds > 1:
        variance = variance + values.mean(1).var() / seeds
    return float(variance.sqrt())


def rows_of(name: str, method: Method, values: Tensor, seconds: float, held: bool) -> list[Row]:
    """The rows of one method from its returns ``[seeds, 4, goals]``."""
    rows = []
    for step, when in enumerate(WHEN):
        mean = float(values[:, step].mean())
        judged = method.bars[when].judge(mean) if held and when in method.bars else {}
        error = error_of(values[:, step])
        rows.append(Row(f"{name}_{when}", mean, standard_error=error, seconds=seconds, **judged))
    return rows


def ahead_rows(found: dict[str, Tensor]) -> list[Row]:
    """MAML-RL less joint training, paired by seed and goal, for each pair of which both were run."""
    rows = []
    for first, second in PAIRS.items():
        if first not in found or second not in found:
            continue
        meta, joint = found[first], found[second]
        for step in range(1, STEPS + 1):
            ours, theirs = float(meta[:, step].mean()), float(joint[:, step].mean())
            error = error_of(meta[:, step] - joint[:, step])
            name = f"{first}_against_{second}_{WHEN[step]}"
            rows.append(Row(name, ours, theirs, None, ours - theirs, error))
    return rows


def measure(name: str, seeds: list[int], goals: GoalTasks, quick: bool) -> tuple[Tensor, float]:
    """Returns of one method, ``[seeds, 4, goals]``, and the seconds of one training."""
    method, found, seconds = METHODS[name], [], 0.0
    validation, copies = (10, 4) if quick else (100, 20)
    for seed in seeds:
        begin = time.process_time()
        run = trained(method, seed, quick)
        seconds += time.process_time() - begin
        rates = tuned_rates(run, method, validation, copies, seed)
        values = returns_on_test_goals(run, rates, goals, copies, seed)
        found.append(values)
        deviation = float(run.theta[run.policy.size - 2 : run.policy.size].exp().mean())
        told = ", ".join(f"{value:.2f}" for value in values.mean(1).tolist())
        used = ", ".join(f"{rate:.3g}" for rate in rates)
        print(f"{name}, seed {seed}: {told}; rates {used}; standard deviation {deviation:.3f}", flush=True)
    return torch.stack(found), seconds / len(seeds)


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    refuse_unknown(args.methods, METHODS, "method")
    torch.set_num_threads(args.threads)
    number, trainings = (40, 1) if args.quick else (args.goals, args.trainings)
    goals = Navigation().sample_tasks(number, generator=args.seed, split="test")
    still, oracle = still_and_oracle(goals)
    rows = [
        Row(name, float(values.mean()), standard_error=error_of(values.unsqueeze(0)))
        for name, values in (("standing_still", still), ("oracle", oracle))
    ]
    seeds, found = [args.seed + index for index in range(trainings)], {}
    for name in args.methods:
        found[name], seconds = measure(name, seeds, goals, args.quick)
        rows += rows_of(name, METHODS[name], found[name], seconds, not args.quick)
    return rows + ahead_rows(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="which trainings (default: all)")
    parser.add_argument("--goals", type=int, default=400, help="test goals (default: 400)")
    parser.add_argument("--trainings", type=int, default=3, help="of each method, from --seed on (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("navigation", run, add_arguments)
