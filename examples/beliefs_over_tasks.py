"""A belief over tasks in reinforcement learning: VariBAD on a grid with a hidden goal, and what can be asked of it.

The belief is a posterior over z at every step: ArviZ reads it, NUTS checks it, surprise tells odd tasks. [--quick]
"""

import argparse

import arviz_stats as az
import torch

import bayesmeta as bm
from bayesmeta.rl.envs.grid import CellTasks
from bayesmeta.rl.latent.checks import goal_probabilities
from bayesmeta.rl.rollout import Acted, collect
from bayesmeta.rl.varibad.setups import grid_varibad

GRID = bm.rl.Grid()  # 5 × 5 cells, 15 steps an episode, +1 on the goal; it is never the start or next to it


def grids(goals):  # one trial of four episodes for each goal
    return bm.rl.TensorVectorEnv(GRID, len(goals), tasks=CellTasks(goals), episodes_per_trial=4, split="test")


def wander(moment, state, generator):  # random moves: what they find does not depend on what was learned
    n = len(moment.begins)
    return Acted(torch.randint(5, (n,), generator=generator), torch.zeros(n))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="hardly trained, to see that all works")
    quick = parser.parse_args().quick
    tasks, iterations = (16, 2) if quick else (256, 60)  # in full minutes
    env = bm.rl.TensorVectorEnv(GRID, tasks, new_tasks=True, episodes_per_trial=4, generator=0)
    learner = grid_varibad(env, iterations=iterations)
    bm.rl.fit(learner, progress=False)

    # the belief about each of the 21 goals, after 0, 1, …, 60 steps of a trial
    held_out = grids(GRID.goals())
    print("return by episode", [round(x, 2) for x in learner.curve(held_out).mean()])
    path, rollout = learner.belief_path(held_out)
    tree = path.to_datatree(num_samples=200)
    print("KL from the prior", tree["beliefs"]["kl"].mean("task").sel(step=[0, 15, 30, 45, 60]).values.round(2))
    last = tree["posterior"]["z"].isel(task=0, step=-1).to_dataset()
    print(f"z of the first task after its trial\n{az.summary(last, kind='stats').head(4)}")

    # where does it say the goal is, and what would the exact posterior under the same decoder say?
    program, spec, few = path.program, learner.belief_spec, path.tasks([0, 10])
    nuts = bm.NUTS(
        program,
        num_chains=1,
        num_samples=20 if quick else 200,
        warmup=20 if quick else 200,
        max_tree_depth=3 if quick else 6,
    )
    for step in (5, 15):
        belief = few.at(step)
        exact = nuts.adapt(belief.support, start=belief)
        share = [goal_probabilities(program, spec, q.draws(400).u, GRID) for q in (belief, exact)]
        share = [p / p.sum(-1, keepdim=True) for p in share]
        apart = 0.5 * (share[0] - share[1]).abs().sum(-1)
        print(f"after {step} steps, belief and NUTS differ by (total variation)", apart.numpy().round(2))

    # tasks of another kind: a goal next to the start, where none was in training
    strange = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(7, 1)
    scores = []
    for seed, goals in enumerate((GRID.goals(), strange)):
        walk = collect(grids(goals), wander, 30, generator=torch.Generator().manual_seed(seed))
        beliefs = bm.rl.BeliefPath.of(learner.policy.latent, spec.of_rollout(walk), program)
        scores.append(bm.surprise(beliefs.at(-1), num_samples=200 if quick else 2000))
    print("surprise, nats: tasks as in training", round(float(scores[0].scores.mean()), 1), end=", ")
    print("with a goal where none was", round(float(scores[1].scores.mean()), 1))
    print(bm.roc(*scores))
