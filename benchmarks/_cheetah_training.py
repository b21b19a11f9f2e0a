"""One training on half-cheetah, and what is read of it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesmeta.rl.memory.rl2 import RL2
from bayesmeta.rl.setups import Setup
from bayesmeta.rl.setups_cheetah import FORWARD, SCALES, kind_of

#: Gradient steps on held-out tasks, of learners that take them.
GRADIENT_STEPS = 3
#: Tasks of a learning curve, its points, and the seed of the tasks.
VALIDATION_TASKS, READS, VALIDATION_SEED = 10, 6, 1000
#: Episodes of a held-out trial of PEARL: under the prior, and after one and two.
PEARL_EPISODES = 3
#: Steps of a trial after which beliefs are read.
AFTER = (0, 1, 5, 20, 100, 200)
#: Velocities among which a belief's favourite is looked for, in m/s.
FAVOURITES = torch.linspace(0, 2, 41)


class Training(NamedTuple):
    """One training and what came of it, as plain values.

    Attributes:
        returns: on held-out tasks, ``[points, tasks]``.
        unit: what a point is: ``"episode"`` or ``"step"``.
        tasks: the held-out tasks.
        beliefs: of VariBAD, by the steps read: a number for each task, see :func:`belief_of`.
        learning: mean returns on validation tasks while it was trained, each with environment steps and CPU seconds.
        steps: of environments, in training.
        seconds: CPU time of the training alone.
        drawn: of learners trained by PPO, the same returns with actions that are drawn in place of the likeliest.
    """

    returns: list[list[float]]
    unit: str
    tasks: list[float]
    beliefs: dict[str, list[float]]
    learning: list[dict[str, Any]]
    steps: int
    seconds: float
    drawn: list[list[float]] = []


def count_steps(env: Any) -> list[int]:
    """A list whose only number is how many environments were stepped from now on."""
    counted, step = [0], env.step

    def count(actions: Tensor) -> Any:
        counted[0] += env.num_envs
        return step(actions)

    env.step = count
    return counted


def trained(setup: Setup, learner: Any, tasks: int, split: str, device: Any = "cpu") -> Training:
    """Train and read.

    Args:
        setup: filled settings, of which ``learner`` was made.
        learner: to be trained; its environments are closed.
        tasks, split: held-out tasks of ``returns``.
        device: of the held-out environments.
    """
    assert setup.iterations
    family, seconds, learning = setup.family(), 0.0, list[dict[str, Any]]()
    shown = dataclasses.replace(setup, episodes=PEARL_EPISODES) if setup.method == "pearl" else setup
    few = min(VALIDATION_TASKS, tasks)
    counted = count_steps(learner.env)
    reads = min(READS, setup.iterations)
    for read in range(1, reads + 1):
        begin = time.process_time()
        learner.train(setup.iterations * read // reads - learner.iteration)
        seconds += time.process_time() - begin
        held_out = shown.held_out(family, few, split="validation", seed=VALIDATION_SEED, device=device)
        mean = returns_of(learner, setup, held_out, 0).mean(1).tolist()
        held_out.close()
        learning.append({"steps": counted[0], "cpu_seconds": seconds, "validation": mean})
        told = " ".join(f"{value:.0f}" for value in mean)
        print(f"  {counted[0]} steps, {seconds:.0f} s: validation {told}", flush=True)
    learner.env.close()
    held_out = shown.held_out(family, tasks, split=split, seed=setup.seed, device=device)
    returns = returns_of(learner, setup, held_out, setup.seed)
    beliefs = beliefs_of(learner, held_out, kind_of(setup.env)) if setup.method == "varibad" else {}
    held_out.close()
    again = shown.held_out(family, tasks, split=split, seed=setup.seed, device=device)
    drawn = drawn_of(learner, again, setup.seed) if isinstance(learner, RL2) else []
    again.close()
    numbers = torch.as_tensor(held_out.tasks).tolist()
    unit = "episode" if setup.remembers else "step"
    return Training(returns.tolist(), unit, numbers, beliefs, learning, counted[0], seconds, drawn)


def returns_of(learner: Any, setup: Setup, env: Any, seed: int) -> Tensor:
    """Returns of each point of an adaptation, ``[points, tasks]``."""
    points = None if setup.remembers else GRADIENT_STEPS
    found: Tensor = learner.curve(env, points=points, generator=seed).cpu().returns
    return found


def drawn_of(learner: RL2, env: Any, seed: int) -> list[list[float]]:
    """Returns of each episode with actions that are drawn, ``[episodes, tasks]``.

    Early in training gaits live on the noise of the actions, and the likeliest ones stand still.
    """
    found: list[list[float]] = learner.evaluate(env, greedy=False, generator=seed).episodes.T.tolist()
    return found


def beliefs_of(learner: Any, env: Any, kind: str) -> dict[str, list[float]]:
    """How right a belief is after some steps of a trial, a number for each task; see :func:`belief_of`."""
    path, _ = learner.belief_path(env)
    spec = learner.belief_spec
    steps = [n for n in AFTER if n <= path.steps]
    tasks = torch.as_tensor(env.tasks, dtype=path.loc.dtype)
    return {str(n): belief_of(learner.decoder, spec, path.loc[n].cpu(), tasks, kind).tolist() for n in steps}


@torch.no_grad()
def belief_of(decoder: Any, spec: Any, z: Tensor, tasks: Tensor, kind: str) -> Tensor:
    """What the decoder makes of latents ``[tasks, D]``, held against the truth, ``[tasks]``.

    It is asked for the rewards of going on at some velocities. For directions: 1 where it expects more of the right one
    of ±1 m/s than of the other, else 0. For velocities: the distance of the one that it expects most of from the
    task's, in m/s.
    """
    velocities = torch.tensor([-1.0, 1.0]) if kind == "direction" else FAVOURITES
    at = torch.zeros(len(velocities), len(SCALES))
    at[:, FORWARD] = velocities
    size = spec.action_space.shape[0]
    state = at.expand(len(tasks), -1, -1)
    rows = spec.transitions(state, torch.zeros(*state.shape[:2], size), torch.zeros(state.shape[:2]), state).x
    like = next(decoder.parameters())
    expected = decoder.distribution(z.to(like), rows.to(like)).mean.cpu()
    favourite = velocities[expected.argmax(-1)]
    return (favourite == tasks).to(z) if kind == "direction" else (favourite - tasks).abs()
