"""A belief over tasks in reinforcement learning: VariBAD on a grid with a hidden goal, and what can be asked of it.

The belief is a posterior over z at every step: ArviZ reads it, NUTS checks it, surprise tells odd tasks. About two
minutes on one core. [--quick] [--out beliefs.png]
"""

import argparse

import arviz_stats as az
import torch

import bayesmeta as bm
from bayesmeta.rl.envs.grid import CellTasks
from bayesmeta.rl.latent.checks import goal_probabilities
from bayesmeta.rl.latent.contexts import prefix
from bayesmeta.rl.rollout import Acted, collect
from bayesmeta.rl.varibad.setups import grid_varibad

GRID = bm.rl.Grid()  # 5 × 5 cells, 15 steps an episode, +1 on the goal; it is never the start or next to it


def grids(goals):  # one trial of four episodes for each goal
    return bm.rl.TensorVectorEnv(GRID, len(goals), tasks=CellTasks(goals), episodes_per_trial=4, split="test")


def wander(moment, state, generator):  # random moves: what they find does not depend on what was learned
    n = len(moment.begins)
    return Acted(torch.randint(5, (n,), generator=generator), torch.zeros(n))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="hardly trained, to see that all works")
    parser.add_argument("--out", help="draw the belief about one goal there")
    args = parser.parse_args()
    tasks, iterations, draws = (16, 2, 10) if args.quick else (256, 60, 150)
    env = bm.rl.TensorVectorEnv(GRID, tasks, new_tasks=True, episodes_per_trial=4, generator=0)
    learner = grid_varibad(env, iterations=iterations)
    bm.rl.fit(learner, progress=not args.quick)

    # the belief about each of the 21 goals, after 0, 1, …, 60 steps of a trial
    held_out = grids(GRID.goals())
    print("return by episode:", *(f"{x:.2f}" for x in learner.curve(held_out).mean()))
    path, rollout = learner.belief_path(held_out)
    program, spec = path.program, learner.belief_spec
    tree = path.to_datatree(num_samples=200)
    kl = tree["beliefs"]["kl"].mean("task").sel(step=[0, 15, 30, 45, 60])
    print("KL from the prior, in nats, before and after each episode:", *(f"{x:.1f}" for x in kl.values))
    last = tree["posterior"]["z"].isel(task=0, step=-1, latent=slice(4)).to_dataset()
    print("z of the first task after its trial, its first 4 numbers of", path.loc.shape[-1])
    print(az.summary(last, kind="stats"))
    if args.out:
        figure = bm.rl.plot_beliefs(
            path, spec, rollout, env=10, family=GRID, steps=[0, 5, 10, 15, 30, 45, 60], goal=held_out.tasks.goal[10]
        )
        figure.savefig(args.out)

    # where does it say the goal is, and what would the exact posterior under the same decoder say? Four at once.
    some, steps = path.tasks([0, 10, 0, 10]), torch.tensor([5, 5, 15, 15])
    belief = learner.policy.latent.belief(prefix(some.context, steps).points(slice(0, 15)), program)
    nuts = bm.NUTS(program, num_chains=2, num_samples=draws, warmup=draws, max_tree_depth=6)
    exact = nuts.adapt(belief.support, start=belief)
    share = [goal_probabilities(program, spec, q.draws(400).u, GRID) for q in (belief, exact)]
    share = [p / p.sum(-1, keepdim=True) for p in share]
    apart = 0.5 * (share[0] - share[1]).abs().sum(-1)
    print("NUTS:", exact.diagnostics())
    for task, step, distance in zip([0, 10, 0, 10], steps, apart):
        print(f"goal {task:2d} after {step:2d} steps: belief and NUTS differ by {distance:.2f} (total variation)")

    # tasks of another kind: a goal next to the start, where none was in training
    strange = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(7, 1)
    scores = []
    for seed, goals in enumerate((GRID.goals(), strange)):
        walk = collect(grids(goals), wander, 30, generator=torch.Generator().manual_seed(seed))
        beliefs = bm.rl.BeliefPath.of(learner.policy.latent, spec.of_rollout(walk), program)
        scores.append(bm.surprise(beliefs.at(-1), num_samples=200 if args.quick else 2000))
    means = [float(each.scores.mean()) for each in scores]
    print(f"surprise: {means[0]:.1f} nats of tasks as in training, {means[1]:.1f} with a goal where none was")
    print(bm.roc(*scores))
