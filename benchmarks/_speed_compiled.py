"""The compiled rows of ``speed_meta_step``: :func:`bayesmeta.fit`'s own step with ``compile="inductor"``, and JAX."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesmeta.data import TaskBatch
from bayesmeta.train.compilation.compiling import Compiler
from bayesmeta.train.loop import Loop, Plan
from bayesmeta.train.validation import Validation
from benchmarks._peers import Peer


def new_loop(method: Any, tasks: Any, *, num_tasks: int, shots: int, rate: float, seed: int) -> Loop:
    """The loop of ``fit`` on a method with Adam, set up.

    Args:
        method, tasks: what is trained on what.
        num_tasks, shots: of a batch; as many query points.
        rate: Adam's.
        seed: of the run.
    """
    held_out = Validation(None, every=1, patience=None, min_delta=0.0, chunk=None, score=None)
    loop = Loop(method, tasks, Plan(num_tasks, shots, shots, seed), held_out, torch.device("cpu"), None)
    loop.set_up(lambda parameters: torch.optim.Adam(parameters, rate), None)
    return loop


def seconds_of(loop: Loop, steps: int) -> float:
    """CPU seconds of some steps in a row."""
    begin = time.process_time()
    for _ in range(steps):
        loop.advance()
    return time.process_time() - begin


class CompiledRun:
    """The loop of ``fit`` on a method, compiled: what is timed is all that a user's step does.

    Args:
        method, tasks: what is trained on what.
        settings: of :func:`new_loop`.

    Raises:
        RuntimeError: when the step is not compiled, with the reason.
    """

    def __init__(self, method: Any, tasks: Any, **settings: Any) -> None:
        self.loop = new_loop(method, tasks, **settings)
        self.loop.compiler = Compiler(self.loop, "inductor", 10**9)
        begin = time.perf_counter()
        for _ in range(2):
            self.loop.advance()
        self.compile_seconds = time.perf_counter() - begin
        self.report = self.loop.compiler.report
        if not self.report.startswith("compiled"):
            raise RuntimeError(f"The step is {self.report}.")

    def block(self, steps: int) -> float:
        """CPU seconds of some steps in a row."""
        return seconds_of(self.loop, steps)


def check_jax(peer: Peer, network: nn.Sequential, batch: TaskBatch, gradient: Tensor, tolerance: float) -> float:
    """Difference of JAX's meta-gradient from ours, relative to the largest entry.

    Raises:
        RuntimeError: when it is above the tolerance.
    """
    linear = [m for m in network if isinstance(m, nn.Linear)]
    weights = {f"w{i}": m.weight.detach().numpy() for i, m in enumerate(linear)}
    weights |= {f"b{i}": m.bias.detach().numpy() for i, m in enumerate(linear)}
    support, query = batch.support, batch.query
    assert support.y is not None
    assert query.y is not None
    data = {"x": support.x, "y": support.y.unsqueeze(-1), "query_x": query.x, "query_y": query.y.unsqueeze(-1)}
    with tempfile.TemporaryDirectory() as folder:
        given, into = Path(folder) / "given.npz", Path(folder) / "gradient.npz"
        arrays: dict[str, Any] = weights | {name: value.numpy() for name, value in data.items()}
        np.savez(given, **arrays)
        peer.ask(gradient=str(given), into=str(into))
        with np.load(into) as answer:
            theirs = torch.as_tensor(answer["gradient"])
    if theirs.shape != gradient.shape:
        raise RuntimeError(f"JAX has a meta-gradient of {theirs.numel()} numbers and ours {gradient.numel()}.")
    off = float((theirs - gradient).abs().max() / gradient.abs().max())
    if not off <= tolerance:
        raise RuntimeError(f"The meta-gradients of JAX and ours differ by {off:.2g} (allowed: {tolerance:g}).")
    return off


def jax_peer(inner_steps: int, **settings: Any) -> Peer:
    """The same meta-step in JAX."""
    return Peer("_jax_meta_step.py", json.dumps({"steps": inner_steps, **settings}))


def take_turns(sides: dict[str, Callable[[int], float]], steps: int, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds a step of each side in each round, block by block; each round starts with another side."""
    names = list(sides)
    for name in names:
        sides[name](steps)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(1e3 * sides[name](steps) / steps)
    return found
