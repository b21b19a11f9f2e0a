"""Time of one MAML meta-step: ours against ``higher`` and ``torchopt``, which loop over the tasks.

A meta-step draws 25 sinusoid tasks of 10 support and 10 query points, takes 1 or 5 inner steps on a 2×40 ReLU network,
goes back through them (second order), and makes one step of Adam on the start point. All sides run eagerly in this
process, on the same draws from the same generator, in blocks that take turns round by round and change their order,
so that a slow minute of the machine hits each of them. Before anything is timed, all sides must give the same
meta-gradient for the same weights and batch; the very function that passed is the one that is timed.

Each peer is used as its own MAML example does: ``higher.innerloop_ctx`` around each task, with a backward inside;
``torchopt.MetaSGD`` with the state extracted once and recovered after each task, and one backward at the end. The
other choice of backward was tried for both and is within 7%.

``ours`` and ``reference`` are medians, in milliseconds a step; ``ratio`` is the peer's over ours, and its standard
error a bootstrap over rounds. In the rows ``…_100_tasks_vs_25_tasks`` both are ours, and ratio is 100 tasks over 25.

The rows ``…_compiled_vs_…`` (left out by --quick unless --compiled is given: compiling takes a minute) time the loop of
``fit`` with ``compile="inductor"``, all that a user's step does, in blocks of many steps; the eager peers' times are
those of the race before, and JAX (``jit``, ``vmap`` over tasks, ``scan`` over steps; in a process and an environment of
its own, on the same core) takes turns with it, block by block, after its meta-gradient was compared as well. These rows
are in milliseconds of the processor's time, which on one thread is the time of a machine without other work.

Of Bayesian methods (``--methods``) the rows ``…_compiled_vs_jax_scan`` and ``…_compiled_vs_eager`` (the latter our own
eager step) are the same in kind, see :mod:`benchmarks._speed_methods`; ``seconds`` is what compiling took with an empty
cache, at most ``--compile-limit``. ``second_compile_vs_first`` are seconds of compiling in a second process.

Threads: one, for all sides, unless --threads says otherwise. The tensors of one task are too small to share out: on two
idle cores the peers were as fast with one thread as with two, or faster (by 0 to 5%), while ours was slower (by 10 to
15%), so one thread is the fairer setting to them. It is also the steadier one: where other work takes the cores, two
threads wait for each other, and steps become several times slower.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesmeta.adapt.maml import MAML
from bayesmeta.data import TaskBatch
from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.models.nets import mlp
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.tasks.sinusoid import Sinusoid
from benchmarks._our_methods import CASES
from benchmarks._peers import one_core
from benchmarks._speed_compiled import CompiledRun, check_jax, jax_peer, take_turns
from benchmarks._speed_methods import QUICK, method_rows
from benchmarks.harness import Row, at_least, below, main
from benchmarks.runs import refuse_unknown

TASKS, MANY_TASKS, SHOTS, HIDDEN = 25, 100, 10, (40, 40)
INNER_LR, META_LR = 0.01, 1e-3
INNER_STEPS = (1, 5)
PEER_BARS = {1: 8.0, 5: 15.0}
SCALING_BAR = 3.0
COMPILED_BARS = {"higher": 60.0, "torchopt": 40.0}
JAX_BARS = {1: 1.0, 5: 1.3}
BLOCK = 200  # steps in a block of compiled steps, for one inner step
TOLERANCE = 1e-4
SINUSOID = Sinusoid()


# -- the sides ----------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One implementation: its parameters, and what puts the meta-gradient of a batch into them.

    The loss is the mean over tasks of the squared errors summed over the query; the inner objective is the mean
    squared error of the support.
    """

    name: str
    parameters: list[nn.Parameter]
    backward: Callable[[TaskBatch], None]

    def gradient(self, batch: TaskBatch) -> Tensor:
        """The meta-gradient, flat, in the order of the network's parameters."""
        for parameter in self.parameters:
            parameter.grad = None
        self.backward(batch)
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


def our_side(network: nn.Sequential, inner_steps: int, *, first_order: bool = False) -> Side:
    """Ours: tasks as a batch dimension. A Gaussian of scale 1/√2 makes log-likelihoods squared errors."""
    model = NeuralTaskModel(network, Gaussian(2**-0.5))
    method = MAML(model, inner_steps=inner_steps, inner_lr=INNER_LR, first_order=first_order)
    generator = torch.Generator().manual_seed(0)
    method.prepare(draw(TASKS, generator))

    def backward(batch: TaskBatch) -> None:
        method.loss(batch, generator=generator).backward()

    return Side("ours", list(method.parameters()), backward)


def higher_side(higher: ModuleType, network: nn.Sequential, inner_steps: int) -> Side:
    """``higher``: a loop over tasks, each in its own patched copy of the network."""
    network = copy.deepcopy(network)
    inner = torch.optim.SGD(network.parameters(), lr=INNER_LR)

    def backward(batch: TaskBatch) -> None:
        for x, y, query_x, query_y in each_task(batch):
            with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (patched, optimizer):
                for _ in range(inner_steps):
                    optimizer.step(F.mse_loss(patched(x), y))
                loss = F.mse_loss(patched(query_x), query_y, reduction="sum") / batch.num_tasks
                loss.backward()

    return Side("higher", list(network.parameters()), backward)


def torchopt_side(torchopt: ModuleType, network: nn.Sequential, inner_steps: int) -> Side:
    """``torchopt``: a loop over tasks, each from the extracted start."""
    network = copy.deepcopy(network)
    inner = torchopt.MetaSGD(network, lr=INNER_LR)
    parameters = list(network.parameters())  # before MetaSGD puts adapted tensors in their place

    def backward(batch: TaskBatch) -> None:
        start = torchopt.extract_state_dict(network, by="reference", detach_buffers=True)
        inner_start = torchopt.extract_state_dict(inner, by="reference")
        losses = []
        for x, y, query_x, query_y in each_task(batch):
            for _ in range(inner_steps):
                inner.step(F.mse_loss(network(x), y))
            losses.append(F.mse_loss(network(query_x), query_y, reduction="sum"))
            torchopt.recover_state_dict(network, start)
            torchopt.recover_state_dict(inner, inner_start)
        torch.stack(losses).mean().backward()

    return Side("torchopt", parameters, backward)


PEERS: dict[str, Callable[[ModuleType, nn.Sequential, int], Side]] = {"higher": higher_side, "torchopt": torchopt_side}


def import_peers() -> dict[str, ModuleType]:
    """The peers by name; torchopt is left out, with a notice, where it has no wheel.

    Raises:
        SystemExit: naming the peer that is missing and how to install it.
    """
    modules = {}
    for name in PEERS:
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            if name == "torchopt" and sys.version_info >= (3, 12):
                print(f"torchopt has no wheel for Python {platform.python_version()}: its rows are skipped")
                continue
            raise SystemExit(
                f"speed_meta_step times the peer {name}, which cannot be imported ({error}). "
                "Install the peers: pip install --group peers"
            ) from error
    return modules


def draw(num_tasks: int, generator: torch.Generator) -> TaskBatch:
    """The tasks of one meta-step."""
    return SINUSOID.sample(num_tasks, support=SHOTS, query=SHOTS, generator=generator)


def each_task(batch: TaskBatch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Support x and y, query x and y of each task, ``[shots, 1]``."""
    support, query = batch.support, batch.query
    assert support.y is not None
    assert query.y is not None
    columns = (support.x, support.y.unsqueeze(-1), query.x, query.y.unsqueeze(-1))
    return zip(*(column.unbind() for column in columns))


# -- the same thing? ----------------------------------------------------------------------------------------------


def check_same_gradient(sides: list[Side], batch: TaskBatch) -> float:
    """Largest difference of a meta-gradient from the first side's, relative to that one's largest entry.

    Raises:
        RuntimeError: when it is above the tolerance, is not finite, or a gradient has another size.
    """
    reference = sides[0].gradient(batch)
    worst = 0.0
    for side in sides[1:]:
        gradient = side.gradient(batch)
        if gradient.shape != reference.shape:
            raise RuntimeError(
                f"{side.name} has a meta-gradient of {gradient.numel()} numbers and {sides[0].name} of "
                f"{reference.numel()}: they do not train the same network."
            )
        off = float((gradient - reference).abs().max() / reference.abs().max())
        if not off <= TOLERANCE:
            raise RuntimeError(
                f"The meta-gradients of {side.name} and {sides[0].name} differ by {off:.2g} of their largest entry "
                f"(allowed: {TOLERANCE:g}): a comparison of their speed would mean nothing."
            )
        worst = max(worst, off)
    return worst


# -- timing -------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """A side with its optimizer, the number of tasks and of steps in a block, and the medians of its blocks, in ms."""

    side: Side
    num_tasks: int
    steps: int
    generator: torch.Generator
    medians: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # means of its blocks, in ms of the processor
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.side.parameters, lr=META_LR)

    def step(self) -> None:
        """One meta-step."""
        batch = draw(self.num_tasks, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        self.side.backward(batch)
        self.optimizer.step()

    def block(self, *, warm_up: int = 1) -> None:
        """Time some steps in a row, after a few that bring the caches back from the other sides."""
        gc.collect()  # nobody pays for another's garbage
        begin = time.perf_counter()
        for _ in range(warm_up):
            self.step()
        times, cpu = [], time.process_time()
        for _ in range(self.steps):
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        self.medians.append(1e3 * float(torch.tensor(times, dtype=torch.float64).quantile(0.5)))
        self.cpu.append(1e3 * (time.process_time() - cpu) / self.steps)
        self.seconds += time.perf_counter() - begin


def race(entries: Mapping[str, Timed], rounds: int) -> None:
    """Let the entries take turns, one block each a round, each round starting with another one."""
    order = list(entries.values())
    for entry in order:
        for _ in range(3):
            entry.step()
    for i in range(rounds):
        shift = i % len(order)
        for entry in order[shift:] + order[:shift]:
            entry.block()


def ratio_of_medians(over: list[float], under: list[float], seed: int, resamples: int = 1000) -> tuple[float, float]:
    """Ratio of two medians over rounds, and its standard error by a bootstrap that draws whole rounds."""
    pairs = torch.tensor([over, under], dtype=torch.float64)
    ratio = pairs.quantile(0.5, -1)
    rounds = pairs.shape[1]
    index = torch.randint(rounds, (resamples, rounds), generator=torch.Generator().manual_seed(seed))
    again = pairs[:, index].quantile(0.5, -1)
    return float(ratio[0] / ratio[1]), float((again[0] / again[1]).std())


def compare(peers: dict[str, ModuleType], inner_steps: int, args: argparse.Namespace) -> list[Row]:
    """The rows of one number of inner steps."""
    torch.manual_seed(args.seed)
    network = mlp(1, HIDDEN, 1)
    batch = draw(TASKS, torch.Generator().manual_seed(args.seed))
    sides = [our_side(network, inner_steps), *(PEERS[n](module, network, inner_steps) for n, module in peers.items())]
    off = check_same_gradient(sides, batch)
    print(f"{inner_steps} inner step(s): meta-gradients of {', '.join(s.name for s in sides)} agree to {off:.1g}")

    def timed(side: Side, steps: int, num_tasks: int = TASKS) -> Timed:
        return Timed(side, num_tasks, steps, torch.Generator().manual_seed(args.seed))

    entries = {side.name: timed(side, 4) for side in sides[1:]}
    entries["ours"] = timed(sides[0], 40 // inner_steps + 10)
    entries["many"] = timed(our_side(network, inner_steps), 20 // inner_steps + 5, MANY_TASKS)
    race(entries, args.rounds)

    noun = "step" if inner_steps == 1 else "steps"
    compiled = compiled_rows(f"maml_{inner_steps}_{noun}_compiled", network, inner_steps, entries, args)
    bar = at_least(PEER_BARS[inner_steps])
    rows = [_row(f"maml_{inner_steps}_{noun}_vs_{name}", entries["ours"], entries[name], bar, args) for name in peers]
    ratio, error = ratio_of_medians(entries["many"].medians, entries["ours"].medians, args.seed)
    rows.append(
        Row(
            f"maml_{inner_steps}_{noun}_{MANY_TASKS}_tasks_vs_{TASKS}_tasks",
            ours=_median(entries["many"]), reference=_median(entries["ours"]), ratio=ratio, standard_error=error,
            seconds=entries["many"].seconds + entries["ours"].seconds, **below(SCALING_BAR).judge(ratio),
        )
    )  # fmt: skip
    return rows + compiled


def compiled_rows(
    name: str, network: nn.Sequential, inner_steps: int, entries: Mapping[str, Timed], args: argparse.Namespace
) -> list[Row]:
    """The rows of the compiled step; none where they are not asked for."""
    if not args.compiled:
        return []
    method = MAML(NeuralTaskModel(network, Gaussian(2**-0.5)), inner_steps=inner_steps, inner_lr=INNER_LR)
    run = CompiledRun(method, SINUSOID, num_tasks=TASKS, shots=SHOTS, rate=META_LR, seed=args.seed)
    print(f"{name}: {run.report}", flush=True)
    batch = draw(TASKS, torch.Generator().manual_seed(args.seed))
    gradient = our_side(network, inner_steps).gradient(batch)
    settings = {"tasks": TASKS, "shots": SHOTS, "hidden": list(HIDDEN), "inner_rate": INNER_LR, "rate": META_LR}
    with jax_peer(inner_steps, **settings) as peer:
        off = check_jax(peer, network, batch, gradient, TOLERANCE)
        print(f"{name}: JAX's meta-gradient agrees to {off:.1g}", flush=True)
        sides = {"ours": run.block, "jax_scan": lambda steps: float(peer.ask(block=steps)["seconds"])}
        times = take_turns(sides, BLOCK // inner_steps, args.rounds)
    rows = []
    cpu = {side: entry.cpu for side, entry in entries.items()} | times
    for peer_name, bar in {**COMPILED_BARS, "jax_scan": JAX_BARS[inner_steps]}.items():
        if peer_name not in cpu:
            continue
        theirs = cpu[peer_name]
        ratio, error = ratio_of_medians(theirs, times["ours"], args.seed)
        ours, reference = (float(torch.tensor(t, dtype=torch.float64).quantile(0.5)) for t in (times["ours"], theirs))
        seconds = run.compile_seconds if peer_name == "jax_scan" else None
        rows.append(
            Row(
                f"{name}_vs_{peer_name}", ours=ours, reference=reference, ratio=ratio, standard_error=error,
                seconds=seconds, **at_least(bar).judge(ratio),
            )
        )  # fmt: skip
    return rows


def _row(name: str, ours: Timed, peer: Timed, bar: Any, args: argparse.Namespace) -> Row:
    ratio, error = ratio_of_medians(peer.medians, ours.medians, args.seed)
    return Row(
        name, ours=_median(ours), reference=_median(peer), ratio=ratio, standard_error=error,
        seconds=ours.seconds + peer.seconds, **bar.judge(ratio),
    )  # fmt: skip


def _median(entry: Timed) -> float:
    return float(torch.tensor(entry.medians, dtype=torch.float64).quantile(0.5))


# -- the command --------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--threads", type=int, default=1, help="torch threads, for all sides alike (default: 1)")
    compiled = "time the compiled step too (default: yes; with --quick: no)"
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None, help=compiled)
    parser.add_argument("--rounds", type=int, default=None, help="rounds of the race (default: 30; quick: 8)")
    methods = (
        f"Bayesian methods against JAX (default: {' '.join(CASES)}; quick: none; with --compiled: {' '.join(QUICK)})"
    )
    parser.add_argument("--methods", nargs="*", default=None, help=methods)
    limit = "seconds after which a method's compiler is ended (default: 600)"
    parser.add_argument("--compile-limit", type=float, default=600.0, help=limit)
    steps = "inner steps of MAML, none to leave MAML out (default: 1 5)"
    parser.add_argument(
        "--inner-steps", type=int, nargs="*", default=list(INNER_STEPS), choices=INNER_STEPS, help=steps
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was compared."""
    return {
        "unit": "ms per meta-step", "tasks": TASKS, "support": SHOTS, "query": SHOTS, "hidden": list(HIDDEN),
        "inner_lr": INNER_LR, "meta_lr": META_LR, "second_order": True, "compiled": args.compiled, "device": "cpu",
        "peers": {name: importlib.metadata.version(name) for name in args._peers},
    }  # fmt: skip


def run(args: argparse.Namespace) -> list[Row]:
    """Check and time."""
    args.compiled = not args.quick and args.threads == 1 if args.compiled is None else args.compiled
    if args.compiled and args.threads != 1:
        raise SystemExit("--compiled is measured on one thread.")
    if args.methods is None:
        args.methods = [] if not args.compiled else list(QUICK if args.quick else CASES)
    refuse_unknown(args.methods, CASES, "method")
    if not args.methods and not args.inner_steps:
        raise SystemExit("Nothing is left to time: give --inner-steps or --methods.")
    args.rounds = (8 if args.quick else 30) if args.rounds is None else args.rounds
    if args.rounds < 2 or args.threads < 1:
        raise SystemExit(f"--rounds must be ≥ 2 and --threads ≥ 1; got {args.rounds} and {args.threads}.")
    args._peers = import_peers() if args.inner_steps else {}
    torch.set_num_threads(args.threads)
    if args.threads == 1:
        one_core()
    rows = [row for inner_steps in args.inner_steps for row in compare(args._peers, inner_steps, args)]
    return rows + method_rows(args, ratio_of_medians)


if __name__ == "__main__":
    main("speed_meta_step", run, add_arguments, settings)
