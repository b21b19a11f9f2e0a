"""The methods of the SBC benchmark: how each is made and, where it learns, trained on tasks simulated from its model.

θ is never trained: what is judged is the inference of φ under the model that the tasks are drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import bayesmeta as bm
from benchmarks._sbc_models import MODELS, SHOTS, Inputs
from benchmarks.runs import train_method

#: chains: one, thinned by four
THIN, NUTS_DRAWS = 4, 31
NUTS: dict[str, Any] = {"num_samples": THIN * (NUTS_DRAWS + 1), "warmup": 120, "num_chains": 1, "max_tree_depth": 6}

#: of a quick run, which has too few tasks to see that these are not quite independent
QUICK_NUTS: dict[str, Any] = {"num_samples": 2 * (NUTS_DRAWS + 1), "warmup": 60}


@dataclass(frozen=True)
class Run:
    """One method on one model.

    Attributes:
        make: the method, of a fresh model.
        exact: whether its posterior is the right one, so that it must pass.
        steps: of training (of what is no θ of the model), where it learns.
        tasks: simulated for the ranks in a full run; a quick one has a quarter, or 100 where that is more.
        num_draws: of each posterior.
        rate: Adam's, of training.
        wrap: makes of the trained method the one that is judged.
    """

    make: Callable[[], Any]
    exact: bool = False
    steps: int = 0
    tasks: int = 2000
    num_draws: int = 63
    rate: float = 2e-3
    wrap: Callable[[Any], Any] | None = None


def on(name: str, kind: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    """A method of the model of that name."""
    return lambda: kind(MODELS[name](), **options)


def chains(name: str) -> Run:
    """NUTS, exact where it has converged."""
    return Run(on(name, bm.NUTS, **NUTS), exact=True, tasks=200, num_draws=NUTS_DRAWS)


def refined(name: str, refine: Any, **options: Any) -> Run:
    """A Gaussian encoder after a short training, refined on each task."""
    run = encoder(name, "full", 300)
    return replace(run, wrap=lambda method: bm.SemiAmortised(method, refine, **options))


def newton(name: str, curvature: str, steps: int = 20, rate: float = 0.5) -> Run:
    """Laplace at the mode."""
    options = {"solver": "newton", "inner_steps": steps, "inner_lr": rate}
    return Run(on(name, bm.Laplace, curvature=curvature, **options))


def variational(name: str, posterior: str, steps: int = 300, rate: float = 0.02) -> Run:
    """ABML, whose steps start at the prior."""
    options = {"inner_steps": steps, "inner_lr": rate, "num_particles": 10}
    return Run(on(name, bm.ABML, posterior=posterior, **options), tasks=1000)


def encoder(name: str, posterior: str, steps: int = 1000) -> Run:
    """An encoder trained on tasks simulated from the prior."""
    return Run(on(name, bm.Amortised, posterior=posterior, num_particles=4), steps=steps)


def particles(name: str, rate: float = 0.05) -> Run:
    """BMAML, whose 15 particles start at draws of the prior."""
    return Run(on(name, bm.BMAML, num_particles=15, inner_steps=200, inner_lr=rate), tasks=1000, num_draws=15)


def platipus(name: str) -> Run:
    """PLATIPUS with the prior as the law of its starts."""
    options = {"inner_steps": 5, "inner_lr": 0.05, "objective": "joint", "scale": 0.5, "num_samples": 63}
    return Run(on(name, bm.Platipus, learn="parameter", **options), steps=200, rate=0.02)


#: by method and model
RUNS: dict[tuple[str, str], Run] = {
    ("last_layer", "linear"): Run(on("linear", bm.BayesianLastLayer), exact=True),
    ("deep_kernel", "kernel"): Run(on("kernel", bm.DeepKernel), exact=True),
    ("laplace", "linear"): Run(newton("linear", "ggn", 1, 1.0).make, exact=True),
    ("laplace_hessian", "linear"): Run(newton("linear", "full", 1, 1.0).make, exact=True),
    ("laplace_diagonal", "linear"): newton("linear", "diagonal_ggn", 60),
    ("nuts", "linear"): chains("linear"),
    ("abml", "linear"): variational("linear", "diagonal", rate=0.05),
    ("abml_full", "linear"): variational("linear", "full", rate=0.05),
    ("abml_low_rank", "linear"): variational("linear", "low_rank", rate=0.05),
    ("abml_few_steps", "linear"): variational("linear", "diagonal", 5, 0.05),
    ("bmaml", "linear"): particles("linear"),
    ("platipus", "linear"): platipus("linear"),
    ("versa", "linear"): Run(on("linear", bm.Versa, subsets=True), steps=800),
    ("amortised", "linear"): encoder("linear", "full"),
    ("amortised_flow", "linear"): encoder("linear", "flow", 700),
    ("amortised_short", "linear"): encoder("linear", "full", 300),
    ("semi_amortised", "linear"): refined("linear", "vi", inner_steps=100, inner_lr=0.05, num_particles=10),
    ("semi_nuts", "linear"): replace(
        refined("linear", "nuts", num_samples=64, warmup=60, num_chains=2, max_tree_depth=6),
        exact=True,
        tasks=100,
        num_draws=NUTS_DRAWS,
    ),
    ("last_layer", "inverse_gamma"): Run(on("inverse_gamma", bm.BayesianLastLayer), exact=True),
    ("abml_full", "inverse_gamma"): variational("inverse_gamma", "full"),
    ("last_layer", "inverse_wishart"): Run(on("inverse_wishart", bm.BayesianLastLayer), exact=True),
    ("last_layer_mixture", "mixture"): Run(on("mixture", bm.BayesianLastLayerMixture), exact=True),
    ("last_layer_mixture", "mixture_inverse_gamma"): Run(
        on("mixture_inverse_gamma", bm.BayesianLastLayerMixture), exact=True
    ),
    ("abml", "mixture"): variational("mixture", "diagonal"),
    ("nuts", "poisson"): chains("poisson"),
    ("laplace", "poisson"): newton("poisson", "ggn"),
    ("laplace_diagonal", "poisson"): newton("poisson", "diagonal_ggn", 60),
    ("abml", "poisson"): variational("poisson", "diagonal"),
    ("abml_full", "poisson"): variational("poisson", "full"),
    ("abml_few_steps", "poisson"): variational("poisson", "diagonal", 5),
    ("bmaml", "poisson"): particles("poisson", 0.03),
    ("amortised", "poisson"): encoder("poisson", "full"),
    ("amortised_flow", "poisson"): encoder("poisson", "flow", 700),
    ("nuts", "bernoulli"): chains("bernoulli"),
    ("laplace", "bernoulli"): newton("bernoulli", "ggn"),
    ("abml_full", "bernoulli"): variational("bernoulli", "full"),
    ("nuts", "scale"): chains("scale"),
    ("laplace", "scale"): newton("scale", "ggn", 60, 0.2),
    ("laplace_hessian", "scale"): newton("scale", "full", 60, 0.2),
    ("abml", "scale"): variational("scale", "diagonal"),
    ("amortised_flow", "scale"): encoder("scale", "flow", 500),
    ("nuts", "banana"): chains("banana"),
    ("laplace", "banana"): newton("banana", "ggn"),
    ("abml_full", "banana"): variational("banana", "full"),
    ("amortised_flow", "banana"): encoder("banana", "flow", 800),
}


def train(run: Run, model: str, seed: int, steps: int) -> Any:
    """The method, trained on tasks simulated from its own model, whose θ stays as it is."""
    if not run.steps:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return run.make().eval()

    def frozen() -> Any:
        method = run.make()
        inputs = Inputs(model)
        method.prepare(inputs.sample(4, support=SHOTS, query=1, generator=seed))
        method.program.requires_grad_(False)
        return method

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        method = frozen()
    simulated = bm.SimulatedTasks(Inputs(model), method)
    trained, _ = train_method(
        lambda: method,
        simulated,
        seed,
        steps,
        rate=run.rate,
        clip=10.0,
        tasks_per_step=64,
        support=SHOTS - 1,
        query=1,
    )
    return trained if run.wrap is None else run.wrap(trained).eval()
