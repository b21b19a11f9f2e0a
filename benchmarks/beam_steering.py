"""Steering a beam through machines whose optics are not known (the AWAKE electron line; see
:mod:`bayesmeta.rl.envs.beam`): RL² and policies that know the machine.

Tasks are 512 response matrices of the horizontal plane. 12 machines, of whose random starts fewer than 0.3% are
admissible, are left out; of the other 500, 300 train, 100 validate and 100 test, and settings were chosen on the
validation machines alone. Length and success stand together: a policy that runs into the wall is quick too. Lengths
count every episode, also those that failed. Every test machine has the same number of starts; standard errors are over
machines. ``seconds`` is CPU time: that of the training for RL², with the likeliest actions read afterwards.

- ``oracle_inverse_…``: −R⁻¹s with the true R. It is no bound, since an episode ends at rms < 0.1;
  ``oracle_least_squares_…``, least squares within the limits, gets there sooner.
- ``rl2_reset_…``: RL² trained on single episodes; its memory is cleared between them.
- ``rl2_reset_then_kept_episode_2_…``: that policy in a second episode, its memory kept. ``reference`` is its first
  episode, ``difference`` second minus first, with the standard error of that. No bar: it shows the fault below.
- ``rl2_episode_1_…``, ``rl2_episode_2_…``: RL² trained on trials of two episodes. The second is held to be at least as
  good as the first.
- ``maml_rl_before_…``, ``maml_rl_after_1_…``: MAML-RL with a policy without a memory, before and after one
  policy-gradient step on 20 episodes of the machine, which are not among those that are read. ``reference`` and
  ``difference`` as above. No bar.
- ``varibad_episode_1_…``, ``varibad_episode_2_…``: VariBAD (:mod:`benchmarks._beam_varibad`), trials of two episodes.
  ``varibad_next_readings_coverage``: how often the belief's central 90% of the next readings has them.

**Why can a memory hurt?** A policy that was trained on single episodes, and then kept its memory, was worse in its
second episode: on validation machines 92.3% success instead of 99.5%, 3.5 steps instead of 2.1 (140 iterations, one
seed, 400 episodes: standard errors near 1% and 0.1 steps). What it had not seen before is the memory at the begin of an
episode: clearing the memory there and nothing else gave 98.5% and 2.5 steps; hiding the end-of-episode flag and the
clock, which it had not seen either, gave 94.5% and 3.6. Training on trials of two mends it, with no change of inputs or
advantages: 2.25 steps and 100% in the first episode, 2.13 and 99.8% in the second, and 2.17 and 99.5% in a third, which
it was not trained for. Its memory then is worth 0.15 steps: cleared, the second episode takes 2.28.

Longer training helps both: after all 400 iterations (140 s), 2.04 and 1.92 steps, 100% and 99.8%, on the same machines.

**A gradient step brings nothing here.** Without a memory and without a step, a policy that TRPO trained on all machines
takes 2.25 steps after 12 s (validation machines, 8 starts each): the readings tell most of what is to be done, and
RL²'s memory adds little to it within a first episode. What is left to learn of a machine does not fit into the gradient
from 20 episodes of some two steps with ten correctors each: at rates of 0.001 and 0.002 the likeliest actions take 2.24
and 2.23 steps, and from 0.005 on they get worse (2.80 steps and 99.5%; at 0.01 4.43 and 97%). Training with the inner
step did not change that: 120 iterations at a rate of 0.004 led to 2.20 steps before and 2.35 after, 2.19 at half that
rate. Hence the rate of 0.002.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayesmeta import nets
from bayesmeta.errors import DataError
from bayesmeta.rl.envs import BeamSteering, Machines, TensorVectorEnv
from bayesmeta.rl.envs.family import check_split
from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.oracles.beam import box_least_squares_actions, inverse_response_actions
from bayesmeta.rl.policies import GaussianHead, TaskPolicy
from bayesmeta.rl.policy_gradient.inner import Estimation, inner_step, phi_actor
from bayesmeta.rl.policy_gradient.maml_rl import MAMLRL, MAMLRLConfig
from bayesmeta.rl.policy_gradient.ppo import PPOConfig
from bayesmeta.rl.rollout import collect
from bayesmeta.rl.trials import trial_returns
from benchmarks import _beam_varibad
from benchmarks._multilevel_model import data_folder
from benchmarks.harness import Bar, Row, at_least, at_most, main, standard_error
from benchmarks.runs import refuse_unknown

FILE = "awake_train_tasks.npz"
#: Of the training; ``last_lr`` is reached at its end.
CONFIG = PPOConfig(
    epochs=4, minibatches=4, gamma=0.95, lam=0.95, lr=1.5e-3, last_lr=1e-4, entropy=0.0, standardise="all"
)
ENVS, STEPS, UNITS = 512, 16, 96
#: MAML-RL: machines and episodes of each in training, steps of an episode, and iterations without and with the inner
#: step. Machines that are read on adapt on as many episodes.
TASKS, EPISODES, SHORT = 50, 20, 12
JOINT, META = 120, 60
INNER_LR = 0.002
#: Success may differ by as much between two episodes and count as equal.
EQUAL = 0.002


class Training(NamedTuple):
    """How a policy is trained: episodes of a trial, and iterations."""

    episodes: int
    iterations: int


class Reading(NamedTuple):
    """What a policy did, by test machine, ``[machines, episodes]`` each: steps of an episode, and successes."""

    length: Tensor
    success: Tensor


TRAININGS = {"rl2_reset": Training(1, 140), "rl2": Training(2, 400)}
ORACLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "oracle_inverse": inverse_response_actions,
    "oracle_least_squares": box_least_squares_actions,
}

POLICIES = [*ORACLES, *TRAININGS, "maml_rl", "varibad"]


def family_of() -> BeamSteering:
    """The electron line's machines in the horizontal plane, a fifth for tests and as many for validation.

    Raises:
        DataError: when the file is not there, saying where it was looked for.
    """
    path = data_folder() / FILE
    if not path.is_file():
        raise DataError(f"{path} is not there. Set BAYESMETA_DATA to the folder that holds {FILE}.")
    return BeamSteering(Machines.load(path))


def held_out(family: BeamSteering, split: str, starts: int, episodes: int, seed: int) -> TensorVectorEnv:
    """Every machine of a set, with some starts each."""
    tasks = family.tasks(family.machines.rows(split))
    return TensorVectorEnv(
        family,
        len(tasks),
        copies=starts,
        tasks=tasks,
        episodes_per_trial=episodes,
        split=split,
        generator=seed,
    )


def trained(family: BeamSteering, training: Training, seed: int, quick: bool) -> RL2:
    """A policy after its training; ``quick`` takes a few short iterations."""
    envs, iterations = (64, 3) if quick else (ENVS, training.iterations)
    run = RL2(
        TensorVectorEnv(family, envs, new_tasks=True, episodes_per_trial=training.episodes, generator=seed),
        config=CONFIG,
        iterations=iterations,
        steps=STEPS,
        units=UNITS,
        seed=seed,
        reward_shift=-3.0,
        reward_scale=3.0,
        log_std=-1.0,
    )
    run.train()
    return run


def read_policy(run: RL2, env: TensorVectorEnv, seed: int) -> Reading:
    """What the likeliest actions do in each episode of a trial."""
    found = run.evaluate(env, generator=seed, keep=("success",))
    by_machine = (x.unflatten(0, (env.num_tasks, env.copies)).mean(1) for x in (found.lengths, found.extra["success"]))
    return Reading(*by_machine)


def read_oracle(rule: Callable[[Tensor, Tensor], Tensor], env: TensorVectorEnv) -> Reading:
    """What a rule does that knows the machine, in one episode."""
    readings, _ = env.reset()
    response = env.tasks.response.repeat_interleave(env.copies, 0)
    length = torch.zeros(env.num_envs)
    success, running = torch.zeros(env.num_envs, dtype=torch.bool), torch.ones(env.num_envs, dtype=torch.bool)
    for _ in range(env.horizon):
        readings, _, terminated, truncated, info = env.step(rule(response, readings))
        length += running
        success |= running & info["success"]
        running &= ~(terminated | truncated)
        if not bool(running.any()):
            break
    shape = (env.num_tasks, env.copies)
    return Reading(*(x.float().unflatten(0, shape).mean(1, keepdim=True) for x in (length, success)))


def beam_policy(seed: int) -> TaskPolicy:
    """Two tanh layers of 64 without a memory; it hardly acts at first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nets.mlp(10, [64, 64], 10, activation="tanh")
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
    return TaskPolicy(network, GaussianHead(10, log_std=-1.0))


def trained_maml(family: BeamSteering, seed: int, quick: bool) -> MAMLRL:
    """MAML-RL after iterations without, then with an inner step; ``quick`` takes a few on few episodes."""
    tasks, copies = (4, 4) if quick else (TASKS, EPISODES)
    policy, short = beam_policy(seed), BeamSteering(family.machines, SHORT)

    def learner(inner_steps: int) -> MAMLRL:
        config = MAMLRLConfig(
            inner_steps=inner_steps,
            inner_lr=INNER_LR,
            max_kl=0.03,
            cg_steps=8,
            curvature_share=1 / 3,
            curvature_episodes=5,
            exact_curvature=False,
            estimation=Estimation(gamma=0.95, lam=0.95, standardise=False),
        )
        env = TensorVectorEnv(short, tasks, copies=copies, generator=seed)
        return MAMLRL(env, policy, config, seed=2 * seed + inner_steps)

    learner(0).train(2 if quick else JOINT)
    run = learner(1)  # goes on with the same policy
    run.train(2 if quick else META)
    return run


def read_maml(run: MAMLRL, family: BeamSteering, split: str, starts: int, seed: int) -> Reading:
    """What the likeliest actions do before and after a step on episodes with drawn ones, ``[machines, 2]`` each."""
    env = held_out(family, split, starts, 1, seed)
    short, machines = BeamSteering(family.machines, SHORT), env.num_tasks
    practice = TensorVectorEnv(short, machines, copies=EPISODES, tasks=env.tasks, split=split, generator=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    shared, rate = run.parts(run.theta)
    first = run.policy.begin(shared, machines)
    steps = run.episodes(practice, first, generator)
    after = inner_step(run.policy, first, shared, steps, rate, run.config.estimation, create_graph=False)
    found = []
    for phi in (first, after):
        env = held_out(family, split, starts, 1, seed)  # the same starts
        actor = phi_actor(run.policy, phi, shared, env, greedy=True)
        played = trial_returns(collect(env, actor, env.horizon, generator=generator, keep=("success",)), 1)
        found.append((played.lengths, played.extra["success"]))
    return Reading(*(torch.cat([x.unflatten(0, (machines, starts)).mean(1) for x in part], 1) for part in zip(*found)))


def rows_of(name: str, reading: Reading, seconds: float, bars: dict[str, Bar], episode: int = 0) -> list[Row]:
    """Length and success of one episode, always together; standard errors over machines."""
    rows = []
    for what, values in zip(Reading._fields, reading):
        mean = float(values[:, episode].mean())
        judged = bars[what].judge(mean) if what in bars else {}
        error = standard_error(values[:, episode])
        rows.append(Row(f"{name}_{what}", mean, standard_error=error, seconds=seconds, **judged))
    print(f"{name}: {rows[0].ours:.2f} steps, {rows[1].ours:.2%} success, {seconds:.0f} s", flush=True)
    return rows


def later_rows(name: str, reading: Reading, seconds: float, bars: dict[str, Bar]) -> list[Row]:
    """A second episode beside the first, or one after a step beside one before it: ``difference`` is second minus
    first, held to the bars.
    """
    rows = []
    for what, values in zip(Reading._fields, reading):
        gain = values[:, 1] - values[:, 0]
        mean, first, difference = float(values[:, 1].mean()), float(values[:, 0].mean()), float(gain.mean())
        judged = bars[what].judge(difference) if what in bars else {}
        error = standard_error(gain)
        rows.append(Row(f"{name}_{what}", mean, first, None, difference, error, seconds, **judged))
    print(f"{name}: {rows[0].ours:.2f} steps, {rows[1].ours:.2%} success", flush=True)
    return rows


def learner_rows(name: str, family: BeamSteering, args: argparse.Namespace) -> list[Row]:
    """One training; its policy in each episode of trials of two."""
    begin = time.process_time()
    run = trained(family, TRAININGS[name], args.seed, args.quick)
    seconds = time.process_time() - begin

    def read(episodes: int) -> Reading:
        return read_policy(run, held_out(family, args.split, args.starts, episodes, args.seed), args.seed)

    bars = {} if args.quick else {"length": at_most(2.6), "success": at_least(0.98)}
    if TRAININGS[name].episodes == 1:
        rows = rows_of(name, read(1), seconds, bars)
        return rows + later_rows(f"{name}_then_kept_episode_2", read(2), seconds, {})
    reading, equal = read(2), {} if args.quick else {"length": at_most(0.0), "success": at_least(-EQUAL)}
    rows = rows_of(f"{name}_episode_1", reading, seconds, bars)
    return rows + later_rows(f"{name}_episode_2", reading, seconds, equal)


def maml_rows(family: BeamSteering, args: argparse.Namespace) -> list[Row]:
    """One training of MAML-RL; its policy before and after a step."""
    begin = time.process_time()
    run = trained_maml(family, args.seed, args.quick)
    seconds = time.process_time() - begin
    reading = read_maml(run, family, args.split, args.starts, args.seed)
    return rows_of("maml_rl_before", reading, seconds, {}) + later_rows("maml_rl_after_1", reading, seconds, {})


def varibad_rows(family: BeamSteering, args: argparse.Namespace) -> list[Row]:
    """One training of VariBAD; both episodes of a trial, and what its belief says of the next readings."""
    begin = time.process_time()
    run = _beam_varibad.untrained(family, CONFIG, args.seed, args.quick)
    run.train()
    seconds = time.process_time() - begin
    starts = held_out(family, args.split, args.starts, 2, args.seed)
    reading = read_policy(run, starts, args.seed)
    bars = {} if args.quick else {"length": at_most(2.6), "success": at_least(0.98)}
    coverage = {} if args.quick else {"coverage": _beam_varibad.COVERAGE}
    rows = [row for n in (0, 1) for row in rows_of(f"varibad_episode_{n + 1}", reading, seconds, bars, n)]
    machines = held_out(family, args.split, 1, 2, args.seed)
    return rows + _beam_varibad.coverage_rows(run, machines, args.seed, coverage)


def run(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    refuse_unknown(args.policies, POLICIES, "policy")
    torch.set_num_threads(args.threads)
    check_split(args.split)
    family, rows = family_of(), list[Row]()
    sets = ", ".join(f"{len(found)} {name}" for name, found in family.machines.sets.items())
    print(f"{sets}; {len(family.machines.excluded)} machines admit under 0.3% of starts and are left out", flush=True)
    if args.quick:
        args.starts = min(args.starts, 2)
    for name in args.policies:
        if name in TRAININGS:
            rows += learner_rows(name, family, args)
        elif name == "maml_rl":
            rows += maml_rows(family, args)
        elif name == "varibad":
            rows += varibad_rows(family, args)
        else:
            begin = time.process_time()
            reading = read_oracle(ORACLES[name], held_out(family, args.split, args.starts, 1, args.seed))
            rows += rows_of(name, reading, time.process_time() - begin, {})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--policies", nargs="*", default=POLICIES, help=f"which (default: {' '.join(POLICIES)})")
    parser.add_argument("--starts", type=int, default=16, help="starts of each machine (default: 16)")
    parser.add_argument("--split", default="test", help="set of machines to read on: test, or validation to choose by")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("beam_steering", run, add_arguments)
