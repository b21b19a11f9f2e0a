"""Is VariBAD's belief right where the truth is known? Five Bernoulli arms, 20 pulls, against the exact Beta posterior.

The decoder turns draws of z into draws of the arms' means, which are held against Beta(1 + won, 1 + lost). VariBAD is
trained with the KL at weight 1 and each belief decoding what it has seen, a bound on the evidence that is tight at the
exact posterior (``decode="past"``, ``kl="prior"``). Its policy is kept at random by a large entropy bonus, as beliefs
are what is measured. Settings were chosen by validation tasks and the training of seed 0, which is none of the seeds
of a run. All trainings are measured on the same test tasks; standard errors hold tasks and trainings.

Rows are ``BELIEF_FIGURE_after_PULLS``; ``reference`` is that figure of as many draws of the **exact** posterior, in the
same run.

- ``varibad``: a sum encoder, a network of sums over the pulls. Bars: coverage of the 90% intervals in .85 … .95, and,
  since the prior covers as well, that at most a tenth of the log score is lost that the prior loses (``ratio``).
- ``product``: the same with PEARL's product of Gaussians. One factor for each pull, which does not know the others,
  cannot follow a Beta posterior, and training then takes a decoder whose arms are less spread than they are: its belief
  is too narrow although it is close to the exact one under its own decoder.
- ``rotated``: ``varibad``, but the decoder begins turned at random, and not with a dimension for each arm. Two arms
  then may fall into one dimension while another is left to the prior, and stay there: so in the training of seed 0
  (coverage .75), which is none of the trainings of a run.
- ``thompson``: ``varibad``, after pulls by Thompson sampling, of which training has seen none: most of one arm.
- ``prior``, ``swapped``: negative controls. Draws of the prior through the decoder, which cover, and know nothing; and
  the belief about the task before, which does not cover.
- ``nuts``: draws of the exact posterior *under the learned decoder* for some of the tasks: what is wrong here is the
  decoder's. ``encoder_distance`` and ``encoder_spread`` are the belief against NUTS: what is wrong there is the
  encoder's. R-hat and ESS are printed, and recorded with ``--json``.

Figures: ``coverage_90``, ``coverage_50``; ``distance`` of the belief's mean from the exact posterior's; ``spread``, its
standard deviation in units of the exact one; ``log_score_lost``, of the next pull of an arm, in nats; ``contraction``,
1 − variance / prior variance. ``varibad_seconds`` is CPU time of a training.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

from bayesmeta.ops.random import as_generator
from bayesmeta.rl.envs import BernoulliBandit, TensorVectorEnv
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.checks import arm_counts
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.policy_gradient.ppo import PPOConfig
from bayesmeta.rl.rollout import Actor, collect
from bayesmeta.rl.varibad.learner import BeliefConfig, VariBAD
from bayesmeta.rl.varibad.policy import BeliefPolicy
from benchmarks._rl_beliefs_checks import (
    FIGURES,
    ArmsDecoder,
    arms_of,
    exact_draws,
    figures,
    nuts_draws,
    thompson,
    uniform,
)
from benchmarks.harness import Row, at_most, between, main
from benchmarks.runs import refuse_unknown

ARMS, HORIZON = 5, 20
FAMILY = BernoulliBandit(arms=ARMS, horizon=HORIZON)
#: By learner: the encoder, and whether the decoder begins turned at random.
LEARNERS = {"varibad": ("sum", False), "product": ("product", False), "rotated": ("sum", True)}
LATENT, WIDTH, ENVS, ITERATIONS = 5, 32, 256, 150
BELIEFS = BeliefConfig(decode="past", kl="prior", prefixes=8, epochs=8, minibatches=2, lr=1e-2, last_lr=5e-4)
#: So much entropy is worth that the policy stays at random.
AT_RANDOM = PPOConfig(epochs=1, minibatches=1, entropy=10.0, last_entropy=10.0)
#: After how many pulls beliefs are measured: ``varibad``, the two that its loss is compared of, and all others.
PULLS, COMPARED, LATE = (0, 2, 5, 10, 20), (5, 20), (20,)
TASKS, DRAWS = 500, 1000
#: Tasks, draws of a chain (and as many before) and chains of NUTS.
NUTS_TASKS, NUTS_KEPT, NUTS_CHAINS = 50, 250, 2
#: Seed of the first training, added to --seed; 0 is the one that settings were chosen on.
FIRST = 1
COVERAGE, LOST = between(0.85, 0.95), at_most(0.1)

#: Of each row a number of each task, ``[tasks]``.
Found = dict[str, Tensor]


def make(learner: str, seed: int, envs: int, iterations: int) -> VariBAD:
    """VariBAD before its training."""
    env = TensorVectorEnv(FAMILY, envs, new_tasks=True, generator=seed)
    spec = ContextSpec.of(env, inputs=("action",), targets=("reward",), binary=True)
    encoder, rotated = LEARNERS[learner]
    latent = LatentContext.make(spec, LATENT, encoder, width=WIDTH, seed=seed)  # type: ignore[arg-type]
    policy = BeliefPolicy(env, latent, units=16, layers=1, gamma=AT_RANDOM.gamma, seed=seed)
    decoder = ArmsDecoder(spec, LATENT, rotated=rotated, seed=seed)
    return VariBAD(env, policy, decoder, config=AT_RANDOM, beliefs=BELIEFS, iterations=iterations, seed=seed)


def pulled(run: VariBAD, actor: Actor, tasks: int, split: str, seed: int) -> tuple[BeliefPath, Tensor]:
    """Beliefs on the way through a trial of somebody's pulls, the same whichever learner asks; the true means."""
    env = TensorVectorEnv(FAMILY, tasks, split=split, generator=seed)
    rollout = collect(env, actor, HORIZON, generator=as_generator(seed, stream="pulls"))
    context = run.belief_spec.of_rollout(rollout)
    return BeliefPath.of(run.policy.latent, context, run.decoder.program()), env.tasks.mean


def swapped(path: BeliefPath) -> BeliefPath:
    """To each task the belief about the task before it."""
    return BeliefPath(path.program, path.context, path.loc.roll(1, 1), path.scale.roll(1, 1))


def measured(path: BeliefPath, means: Tensor, run: VariBAD, name: str, pulls: tuple[int, ...], seed: int) -> Found:
    """Figures of a belief and, with ``exact_`` before their names, of the exact posterior."""
    found: Found = {}
    for step in pulls:
        spec, belief = run.belief_spec, path.at(step)
        counts = arm_counts(spec, belief.support)
        kinds = {"": arms_of(path, spec, belief.draws(DRAWS, seed).u), "exact_": exact_draws(*counts, DRAWS, seed)}
        for kind, draws in kinds.items():
            each = figures(draws, *counts, means)
            found |= {f"{kind}{name}_{what}_after_{step}": each[what] for what in FIGURES}
    return found


def against_nuts(path: BeliefPath, means: Tensor, run: VariBAD, seed: int, tasks: int, kept: int) -> tuple[Found, str]:
    """The exact posterior under the decoder after all pulls, and the belief against it; what the sampler says."""
    spec, few, means = run.belief_spec, path.tasks(slice(0, tasks)), means[:tasks]
    z, rhat, ess = nuts_draws(few, HORIZON, seed, kept=kept, chains=NUTS_CHAINS)
    exact, belief = (arms_of(few, spec, draws) for draws in (z, few.at(HORIZON).draws(DRAWS, seed).u))
    counts = arm_counts(spec, few.at(HORIZON).support)
    each = figures(exact, *counts, means)
    found = {f"nuts_{what}_after_{HORIZON}": each[what] for what in FIGURES}
    found[f"encoder_distance_after_{HORIZON}"] = (belief.mean(0) - exact.mean(0)).abs().mean(-1)
    found[f"encoder_spread_after_{HORIZON}"] = (belief.std(0) / exact.std(0)).mean(-1)
    return found, f"NUTS on {tasks} tasks: R-hat up to {rhat:.3f}, effective sample size from {ess:.0f}"


def measure(learner: str, args: argparse.Namespace, seed: int) -> Found:
    """One training and its figures."""
    run, begin = make(learner, seed, args.envs, args.iterations), time.process_time()
    run.train(args.iterations)
    seconds = time.process_time() - begin
    entropy = run.history[-1]["entropy"]
    print(f"{learner}, seed {seed}: {seconds:.0f} s, entropy {entropy:.3f} of {math.log(ARMS):.3f}", flush=True)
    path, means = pulled(run, uniform(ARMS), args.tasks, args.split, args.seed)
    found = measured(path, means, run, learner, PULLS if learner == "varibad" else COMPARED, args.seed)
    if learner == "varibad":
        shifted = pulled(run, thompson(ARMS, HORIZON), args.tasks, args.split, args.seed)
        found |= measured(*shifted, run, "thompson", LATE, args.seed)
        first = BeliefPath(path.program, path.context, torch.zeros_like(path.loc), torch.ones_like(path.scale))
        found |= measured(first, means, run, "prior", COMPARED, args.seed)
        found |= measured(swapped(path), means, run, "swapped", LATE, args.seed)
        more, said = against_nuts(path, means, run, args.seed, args.nuts_tasks, args.nuts_kept)
        found |= more
        print(f"{learner}, seed {seed}, {said}", flush=True)
        args._said.append(f"seed {seed}: {said}")
    found[f"{learner}_seconds"] = torch.tensor([seconds], dtype=torch.float64)
    for name in found:
        if name.startswith(f"{learner}_") and ("coverage_90" in name or "distance" in name):
            print(f"  {name} {float(found[name].mean()):.4f}", flush=True)
    return found


def error_of(values: Tensor) -> float | None:
    """Standard error of the mean of ``[trainings, tasks]``, of which the tasks are the same: over both."""
    parts = [mean.var() / len(mean) for mean in (values.mean(0), values.mean(1)) if len(mean) > 1]
    return float(torch.stack(parts).sum().sqrt()) if parts else None


def rows_of(trainings: list[Found], bars: bool) -> list[Row]:
    """A row for each figure, the mean over trainings and tasks."""
    rows = []
    for name in (name for name in trainings[0] if not name.startswith("exact_")):
        values = torch.stack([found[name] for found in trainings])
        mean, exact = float(values.mean()), trainings[0].get(f"exact_{name}")
        reference = None if exact is None else float(exact.mean())
        judged = COVERAGE.judge(mean) if bars and name.startswith("varibad_coverage_90") else {}
        rows.append(Row(name, mean, reference, standard_error=error_of(values), **judged))
    return rows + _of_the_priors_loss(trainings, bars)


def _of_the_priors_loss(trainings: list[Found], bars: bool) -> list[Row]:
    """What of the log score that the prior loses is lost by the belief too; its error by that of the belief's loss."""
    rows = []
    for step in COMPARED:
        names = [f"{name}_log_score_lost_after_{step}" for name in ("varibad", "prior")]
        if names[0] not in trainings[0]:
            continue
        ours, whole = (torch.stack([found[name] for found in trainings]) for name in names)
        mean, priors = float(ours.mean()), float(whole.mean())
        ratio, error = mean / priors, error_of(ours)
        error = None if error is None else error / priors
        name, judged = f"varibad_share_of_the_priors_loss_after_{step}", LOST.judge(ratio) if bars else {}
        rows.append(Row(name, mean, priors, ratio, standard_error=error, **judged))
    return rows


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for, means over trainings."""
    refuse_unknown(args.learners, LEARNERS, "learner")
    torch.set_num_threads(args.threads)
    args._said = []
    if args.quick:
        args.envs, args.iterations, args.trainings, args.tasks = 16, 2, 1, 20
        args.nuts_tasks, args.nuts_kept = 4, 10
    each = []
    for seed in range(FIRST + args.seed, FIRST + args.seed + args.trainings):
        found: Found = {}
        for learner in args.learners:
            found |= measure(learner, args, seed)
        each.append(found)
    return rows_of(each, bars=not args.quick)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is recorded beside the flags: what the sampler says."""
    return {"nuts": args._said}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--learners", nargs="+", default=[*LEARNERS], help=f"which (default: {' '.join(LEARNERS)})")
    parser.add_argument("--trainings", type=int, default=3, help="seeds, from --seed on (default: 3)")
    parser.add_argument("--envs", type=int, default=ENVS, help=f"bandits side by side (default: {ENVS})")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=f"of training (default: {ITERATIONS})")
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"held-out bandits (default: {TASKS})")
    parser.add_argument("--split", default="test", help="of the held-out bandits (default: test)")
    parser.add_argument("--nuts-tasks", type=int, default=NUTS_TASKS, help=f"of them (default: {NUTS_TASKS})")
    parser.add_argument("--nuts-kept", type=int, default=NUTS_KEPT, help=f"draws of a chain (default: {NUTS_KEPT})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("rl_beliefs", run, add_arguments, settings)
