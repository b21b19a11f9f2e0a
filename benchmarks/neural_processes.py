"""Neural processes on functions from Gaussian processes, held against the process that made them.

Setting (Bruinsma's thesis): x ~ U(−2, 2), kernels of length scale 0.25 (weakly periodic: 0.5, period 0.25), noise
variance 0.05; 16 tasks a step, whose number of context points is drawn from 0–30 anew for each step, 50 targets each.
Test: at least 2000 fresh tasks of their own seed, as many at each number of context points from 0 to 30.

Figure: normalised KL to the true process in nats per target, the mean over tasks of
[log p_true(y_Q | S) − log q(y_Q | S)] / 50, both of all 50 targets **together**; standard errors over tasks.
Conditional processes take the sum over targets; latent ones the log of the mean joint density over 512 draws of z,
which is a lower bound on their log-likelihood, so that their figure is, if anything, too high; Gaussian ones (``gnp``)
their joint normal; ``…_ar`` asks the same trained method for one target after another, in one random order.

Two rows need no training: ``ideal_diagonal`` has the exact marginals, the best that can be had with independent targets
(published: 0.40 on EQ and Matérn; of 16,000 tasks here 0.416 and 0.408, standard error 0.002), and ``trivial`` predicts
N(0, 1.05) everywhere (1.19 and 1.08, here as published).

All but the convolutional ones have 32 waves of fixed random frequency beside x, and ``cnp`` and ``np`` are deep sets
over them with a linear read-out: with plain MLPs of x the package's CNP was at 0.92 after 110 seconds on EQ, where this
one was at 0.65 after 70 (validation tasks).

By default each model trains for less than 10 minutes of one CPU core; ``seconds`` is the CPU time of its training. With
``--full`` the settings are the published ones in size, for a GPU: 100,000 steps. Each has its own bars. Settings were
chosen on validation tasks of other seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bayesmeta as bm
from benchmarks._neural_process_models import RUNS, with_waves
from benchmarks.harness import Bar, Row, at_most, between, main
from benchmarks.runs import add_run_arguments, refuse_unknown, run_all, train_method

KERNELS = ("eq", "matern52", "weakly_periodic")
MAX_CONTEXT, TARGETS = 30, 50
#: steps of a run with ``--full``
FULL_STEPS = 100_000
#: draws of z behind the density of a latent process
DRAWS = 512
#: published figures by run, for EQ and Matérn-5/2
REFERENCE = {
    "cnp": (0.54, 0.54),
    "np": (0.34, 0.36),
    "attentive_cnp": (0.45, 0.42),
    "attentive_np": (0.31, 0.30),
    "conv_cnp": (0.41, 0.40),
    "conv_cnp_ar": (0.01, 0.00),
    "gnp": (0.08, 0.09),
    "ideal_diagonal": (0.40, 0.40),
    "trivial": (1.19, 1.08),
}
#: of EQ: on a CPU, and with ``--full``
BARS = {
    "cnp": at_most(0.60),
    "attentive_cnp": at_most(0.52),
    "attentive_np": at_most(0.42),
    "gnp": at_most(0.20),
}
FULL_BARS = {
    "cnp": at_most(0.54),
    "attentive_cnp": at_most(0.45),
    "attentive_np": at_most(0.31),
    "gnp": at_most(0.08),
    "conv_cnp_ar": at_most(0.02),
}


class Functions:
    """GP tasks whose number of context points is drawn for each batch, from none to as many as are asked for.

    Args:
        kernel: of :class:`bayesmeta.tasks.GPTasks`.
        waves: whether waves stand beside x.
    """

    num_tasks: int | None = None

    def __init__(self, kernel: str, waves: bool = False) -> None:
        self.tasks, self.kernel, self.waves = bm.tasks.GPTasks(kernel), kernel, waves  # type: ignore[arg-type]

    def sample(
        self, num_tasks: int, *, support: int, query: int, generator: torch.Generator | int | None = None
    ) -> bm.TaskBatch:
        """A batch with 0 to ``support`` context points, equally likely, the same for all of its tasks."""
        if not isinstance(generator, torch.Generator):
            generator = torch.Generator().manual_seed(generator or 0)
        count = int(torch.randint(support + 1, (), generator=generator, device=generator.device))
        return self.shown(self.tasks.sample(num_tasks, support=count, query=query, generator=generator))

    def shown(self, batch: bm.TaskBatch) -> bm.TaskBatch:
        """A batch of plain x as the method sees it."""
        if not self.waves:
            return batch
        return bm.TaskBatch(with_waves(batch.support, self.kernel), with_waves(batch.query, self.kernel))


# -- training and the figure --------------------------------------------------------------------------------------


def train(name: str, kernel: str, seed: int, steps: int, width: int, device: str) -> tuple[Any, float]:
    """The trained method of a run, and the seconds of CPU time that it took."""
    settings = RUNS[name]
    return train_method(
        partial(settings.make, width),
        Functions(kernel, settings.waves),
        seed,
        steps,
        rate=settings.rate,
        clip=settings.clip,
        device=device,
        tasks_per_step=16,
        support=MAX_CONTEXT,
        query=TARGETS,
    )


def fresh_tasks(kernel: str, num_tasks: int, seed: int) -> list[bm.TaskBatch]:
    """Fresh tasks of a seed of their own: for each number of context points a batch, all of one size."""
    tasks, each = bm.tasks.GPTasks(kernel), math.ceil(num_tasks / (MAX_CONTEXT + 1))  # type: ignore[arg-type]
    first = 1_000_000 + 1000 * seed
    return [tasks.sample(each, support=n, query=TARGETS, generator=first + n) for n in range(MAX_CONTEXT + 1)]


def true_density(kernel: str, batch: bm.TaskBatch) -> Tensor:
    """log p_true(y_Q | S), float64 ``[tasks]``."""
    gp = bm.tasks.GPTasks(kernel)  # type: ignore[arg-type]
    return gp.log_evidence(batch.union()) - gp.log_evidence(batch.support)


def density(method: Any, batch: bm.TaskBatch, seed: int) -> Tensor:
    """log q(y_Q | S) of all targets together, float64 ``[tasks]``."""
    posterior = method.adapt(batch.support, generator=seed)
    try:
        return posterior.predictive(batch.query, joint=True).log_prob(batch.query.y).double()
    except bm.errors.NoClosedFormError:
        each = posterior.log_likelihood(batch.query, DRAWS, generator=seed).double().sum(-1)
        return each.logsumexp(0) - math.log(len(each))


def autoregressive_density(method: Any, batch: bm.TaskBatch, seed: int) -> Tensor:
    """log q(y_Q | S), one target after another in a random order, float64 ``[tasks]``."""
    return bm.autoregressive(method, batch.support).log_likelihood(batch.query, generator=seed)


def ideal_diagonal(kernel: str, batch: bm.TaskBatch) -> Tensor:
    """Of the true process's marginals."""
    assert batch.query.y is not None
    marginals = bm.tasks.GPTasks(kernel).marginals(batch.support, batch.query.x)  # type: ignore[arg-type]
    return marginals.log_prob(batch.query.y.double()).sum(-1)


def trivial(kernel: str, batch: bm.TaskBatch) -> Tensor:
    """Of N(0, 1.05), the prior at each point by itself."""
    assert batch.query.y is not None
    return torch.distributions.Normal(0.0, 1.05**0.5).log_prob(batch.query.y.double()).sum(-1)


def normalised_kl(kernel: str, batches: list[bm.TaskBatch], log_q: Callable[[bm.TaskBatch], Tensor]) -> Tensor:
    """[log p_true − log q] of each task in nats per target, ``[tasks]``."""
    gaps = [(true_density(kernel, batch) - log_q(batch).cpu()) / TARGETS for batch in batches]
    return torch.cat(gaps)


# -- rows ---------------------------------------------------------------------------------------------------------


def _row(name: str, kernel: str, gap: Tensor, bar: Bar | None, seconds: float | None = None) -> Row:
    value, error = float(gap.mean()), float(gap.std() / len(gap) ** 0.5)
    references = dict(zip(KERNELS, REFERENCE.get(name, ()), strict=False))
    row = Row(f"{name}_{kernel}", value, references.get(kernel), None, None, error, seconds)
    if bar is not None:
        row = Row(f"{name}_{kernel}", value, row.reference, None, None, error, seconds, **bar.judge(value))
    took = "" if seconds is None else f", trained in {seconds:.0f} s"
    print(f"{row.name}: {value:.4f} ± {error:.4f}{took}", flush=True)
    return row


def controls(kernel: str, num_tasks: int, seed: int, full: bool) -> list[Row]:
    """What needs no training; of EQ and Matérn the figures are known."""
    batches, rows = fresh_tasks(kernel, num_tasks, seed), []
    for name, log_q in (("ideal_diagonal", ideal_diagonal), ("trivial", trivial)):
        known = dict(zip(KERNELS, REFERENCE[name], strict=False)).get(kernel)
        bar = between(known - 0.03, known + 0.03) if full and known is not None else None
        rows.append(_row(name, kernel, normalised_kl(kernel, batches, partial(log_q, kernel)), bar))
    return rows


def measure(
    job: str, seed: int, steps: int, num_tasks: int, threads: int, full: bool, *, published: bool, device: str
) -> list[Row]:
    """Train and score one run on one kernel.

    Args:
        job: ``"RUN:KERNEL"``.
        seed, steps, num_tasks, threads: as they say.
        full: whether the rows are held to their bars.
        published: whether the sizes and bars are those of ``--full``.
        device: to train and score on.
    """
    torch.set_num_threads(threads)
    name, kernel = job.split(":")
    settings = RUNS[name]
    width = settings.full_width if published else settings.width
    method, seconds = train(name, kernel, seed, steps, width, device)
    batches, functions = fresh_tasks(kernel, num_tasks, seed), Functions(kernel, settings.waves)
    bars = (FULL_BARS if published else BARS) if full and kernel == "eq" else {}
    rows = []
    for row, score in ((name, density), (f"{name}_ar", autoregressive_density)):
        if row != name and not settings.autoregressive:
            continue
        log_q = partial(_shown_and_scored, score, method, functions, seed, device)
        gap = normalised_kl(kernel, batches, log_q)
        rows.append(_row(row, kernel, gap, bars.get(row), seconds if row == name else None))
    return rows


def _shown_and_scored(
    score: Callable[..., Tensor], method: Any, functions: Functions, seed: int, device: str, batch: bm.TaskBatch
) -> Tensor:
    shown = functions.shown(batch)
    return score(method, bm.TaskBatch(shown.support.to(device), shown.query.to(device)), seed)


def run(args: argparse.Namespace) -> list[Row]:
    """All runs on all kernels that were asked for, and the controls."""
    refuse_unknown(args.runs, RUNS)
    refuse_unknown(args.kernels, KERNELS, "kernel")
    if args.quick:
        args.tasks = min(args.tasks, MAX_CONTEXT + 1)
    full = not args.quick and not args.steps
    rows = [row for kernel in args.kernels for row in controls(kernel, args.tasks, args.seed, full)]
    jobs = {f"{name}:{kernel}": RUNS[name].steps for kernel in args.kernels for name in args.runs}
    steps = {job: FULL_STEPS if args.full else own for job, own in jobs.items()}
    asked = argparse.Namespace(**{**vars(args), "runs": list(jobs)})
    scored = partial(measure, published=args.full, device=args.device)
    return rows + run_all(asked, steps, lambda job: jobs[job] // 500, scored)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What each run trained with."""
    steps = {name: args.steps or (FULL_STEPS if args.full else RUNS[name].steps) for name in args.runs}
    return {"steps_of_runs": steps, "draws_of_latent": DRAWS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    add_run_arguments(parser, RUNS, 2015)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), help=f"which (default: {' '.join(KERNELS)})")
    parser.add_argument("--full", action="store_true", help=f"published sizes and {FULL_STEPS} steps, for a GPU")
    parser.add_argument("--device", default="cpu", help="where to train and score (default: cpu)")


if __name__ == "__main__":
    main("neural_processes", run, add_arguments, settings)
