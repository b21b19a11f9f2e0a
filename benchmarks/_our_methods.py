"""Our side of the rows of :mod:`benchmarks._speed_methods`, as a process of its own: ABML, BMAML, last layer, CNP.

In a process of its own a compiler that takes too long can be ended, and each method starts from the same state. The
argument is JSON: the method's name, the settings of the race, and the seed. Answers on standard output:
``{"write": path}`` writes weights, a batch, the noise, our loss and our meta-gradient to that npz file;
``{"compile": true}`` compiles, and gives the seconds that it took and the report; ``{"block": n}`` and ``{"eager": n}``
the CPU seconds of n compiled or eager steps of :func:`bayesmeta.fit`'s own loop.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.ops.random import normal_like
from benchmarks._speed_compiled import CompiledRun, new_loop, seconds_of

NOISE, FLOOR, SCALE = 0.1, 0.01, 0.1


@dataclass(frozen=True)
class Race:
    """What both sides are given.

    Attributes:
        tasks, shots: of a batch; as many query points.
        rate: Adam's.
        hidden: widths of the network.
        task_noise: of the sinusoids' targets.
    """

    tasks: int = 25
    shots: int = 10
    rate: float = 1e-3
    hidden: tuple[int, ...] = (40, 40)
    task_noise: float = NOISE


@dataclass(frozen=True)
class Case:
    """One method.

    Attributes:
        row: how its rows are named.
        make: the method, with first weights from torch's global generator.
        options: of the method, as JAX's side is told them.
        block: steps in a block of a race.
    """

    row: str
    make: Callable[[Race, dict[str, Any]], Any]
    options: dict[str, Any]
    block: int

    def jax_settings(self, race: Race) -> dict[str, Any]:
        """Those of JAX's side."""
        outputs = 2 if "floor" in self.options else 1
        return asdict(race) | self.options | {"sizes": [1, *race.hidden, outputs]}


def _abml(race: Race, options: dict[str, Any]) -> bm.ABML:
    model = bm.NeuralTaskModel(bm.nets.mlp(1, race.hidden, 1), bm.likelihoods.Gaussian(options["scale"]))
    rates = {"inner_steps": options["steps"], "inner_lr": options["inner_rate"]}
    return bm.ABML(model, num_particles=options["particles"], **rates)


def _bmaml(race: Race, options: dict[str, Any]) -> bm.BMAML:
    model = bm.NeuralTaskModel(bm.nets.mlp(1, race.hidden, 1), bm.likelihoods.Gaussian(options["scale"]))
    steps = {"inner_steps": options["steps"], "leader_steps": options["leader_steps"]}
    return bm.BMAML(model, num_particles=options["particles"], inner_lr=options["inner_rate"], **steps)


def _last_layer(race: Race, options: dict[str, Any]) -> bm.BayesianLastLayer:
    network, likelihood = bm.nets.mlp(1, race.hidden, 1), bm.likelihoods.Gaussian(options["scale"])
    return bm.BayesianLastLayer(bm.NeuralTaskModel(network, likelihood, task_modules="head"))


def _cnp(race: Race, options: dict[str, Any]) -> bm.ConditionalNeuralProcess:
    likelihood = bm.likelihoods.HeteroscedasticGaussian(options["floor"])
    model = bm.NeuralTaskModel(bm.nets.mlp(1, race.hidden, 2), likelihood, prior="point")
    return bm.ConditionalNeuralProcess(model, width=options["width"], latent_size=options["width"], subsets=False)


CASES = {
    "abml": Case(
        "abml_5_steps", _abml, {"steps": 5, "particles": 5, "inner_rate": 1e-4, "scale": SCALE}, block=20
    ),
    "bmaml": Case(
        "bmaml_10_particles",
        _bmaml,
        {"steps": 1, "leader_steps": 1, "particles": 10, "inner_rate": 1e-4, "scale": SCALE},
        block=20,
    ),
    "last_layer": Case("last_layer", _last_layer, {"scale": SCALE, "double": True}, block=50),
    "cnp": Case("cnp", _cnp, {"floor": FLOOR, "width": 64}, block=200),
}  # fmt: skip


def make(case: Case, race: Race, seed: int) -> Any:
    """The method under a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return case.make(race, case.options)


def reference(method: Any, batch: bm.TaskBatch, seed: int) -> dict[str, Tensor]:
    """Loss and meta-gradient of a batch, and what a peer needs to have the same: weights, batch and noise.

    Returns:
        ``loss``; under ``gradient of NAME`` the gradient of each parameter, and under its name its value; the batch's
        ``x``, ``y``, ``query_x``, ``query_y`` ``[tasks, shots, 1]``; of ABML ``noise``
        ``[steps + 1, particles, tasks, D]``.
    """
    method.train()
    method.prepare(batch)
    method.zero_grad(set_to_none=True)
    loss = method.loss(batch, generator=torch.Generator().manual_seed(seed))
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found |= {name: parameter.detach(), f"gradient of {name}": gradient}
    support, query = batch.support, batch.query
    assert support.y is not None
    assert query.y is not None
    found |= {"x": support.x, "y": support.y.unsqueeze(-1), "query_x": query.x, "query_y": query.y.unsqueeze(-1)}
    if isinstance(method, bm.ABML):  # what its loss drew: for each inner step, then for the outer loss
        again = torch.Generator().manual_seed(seed)
        shape = (method.num_particles, 1, batch.num_tasks, method.program.layout.dim)
        drawn = [normal_like(loss, shape, again)[:, 0] for _ in range(method.inner_steps + 1)]
        found["noise"] = torch.stack(drawn)
    method.zero_grad(set_to_none=True)
    return found


class Ours:
    """Answers requests.

    Args:
        case: which method.
        race: what it is raced on.
        seed: of weights, tasks and noise.
    """

    def __init__(self, case: Case, race: Race, seed: int) -> None:
        self.case, self.race, self.seed = case, race, seed
        self.tasks = bm.tasks.Sinusoid(race.task_noise)
        self.run: CompiledRun | None = None
        self.eager: Any = None

    def _loop(self) -> dict[str, Any]:
        race = self.race
        return {"num_tasks": race.tasks, "shots": race.shots, "rate": race.rate, "seed": self.seed}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """To one request.

        Raises:
            ValueError: for an unknown one.
        """
        if "write" in request:
            race = self.race
            generator = torch.Generator().manual_seed(self.seed)
            batch = self.tasks.sample(race.tasks, support=race.shots, query=race.shots, generator=generator)
            found = reference(make(self.case, race, self.seed), batch, self.seed)
            arrays: dict[str, Any] = {name: value.numpy() for name, value in found.items()}
            np.savez(request["write"], **arrays)
            return {"parameters": [name for name in found if f"gradient of {name}" in found]}
        if "compile" in request:
            try:
                self.run = CompiledRun(make(self.case, self.race, self.seed), self.tasks, **self._loop())
            except RuntimeError as error:
                return {"error": str(error)}
            return {"seconds": self.run.compile_seconds, "report": self.run.report}
        if "eager" in request:
            self.eager = self.eager or new_loop(make(self.case, self.race, self.seed), self.tasks, **self._loop())
            return {"seconds": seconds_of(self.eager, request["eager"])}
        if "block" in request and self.run is not None:
            return {"seconds": self.run.block(request["block"])}
        raise ValueError(f"unknown request {request}")


def main() -> None:
    """Answer lines of JSON until there are no more."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    ours = Ours(CASES[given["case"]], Race(), given["seed"])
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a compiler prints goes elsewhere
        for line in sys.stdin:
            print(json.dumps(ours.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
