"""Few-shot sinusoids: meta-train one of three methods, adapt it to new tasks from ten points each, print its scores.

Run: python examples/sinusoid.py --method last-layer [--steps 2000] [--out forecast.png] [--quick]
"""

import argparse

import torch

import bayesmeta as bm


def make_method(name):
    """A network as the task's model, and a method for it. The noise is learned: it starts at 1, the truth is 0.1."""
    torch.manual_seed(0)  # the network's first weights, from which the prior's mean starts
    network = bm.nets.mlp(1, [40, 40], 1, activation="tanh")
    noise = bm.Gaussian(1.0, learn_scale=True)
    if name == "maml":  # a point: five steps from a learned start
        return bm.MAML(bm.NeuralTaskModel(network, noise, "point"), inner_steps=5, inner_lr=0.02)
    if name == "abml":  # a diagonal Gaussian over all weights: five steps on the ELBO from a learned prior
        model = bm.NeuralTaskModel(network, noise, bm.priors.Normal(0.05))
        return bm.ABML(model, inner_steps=5, inner_lr=0.05, objective="predictive")
    model = bm.NeuralTaskModel(network, noise, bm.priors.Normal(1.0), task_modules="head")
    return bm.BayesianLastLayer(model)  # the exact posterior of the last layer on learned features


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["maml", "abml", "last-layer"], default="last-layer")
    parser.add_argument("--steps", type=int, default=2000, help="meta-training steps (default: 2000)")
    parser.add_argument("--out", help="write a picture of the forecasts here (png, pdf or svg)")
    parser.add_argument("--quick", action="store_true", help="20 steps, to see that all works")
    options = parser.parse_args()

    tasks = bm.tasks.Sinusoid(noise=0.1)
    method = make_method(options.method)
    bm.fit(
        method,
        tasks,
        steps=20 if options.quick else options.steps,
        tasks_per_step=25,
        support=10,
        query=10,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3),
        clip=100.0,
        validation=tasks.sample(100, support=10, query=10, generator=1),
        seed=0,
    )

    batch = tasks.sample(50, support=10, query=50, generator=2)
    posterior = method.adapt(batch.support)
    print(f"{options.method} on {batch.num_tasks} new tasks; the noise is put at {method.program.likelihood.scale:.2f}")
    print(bm.scores(posterior, batch, num_samples=300))
    if options.out:
        bm.plot_forecast(posterior, batch, max_panels=8, path=options.out)
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
