"""Simulation-based calibration of every method that infers φ, and of those that infer θ: who is exact, who errs how.

θ is fixed and known, tasks are drawn from the model itself, and each number of φ, and the log-likelihood of the
support, is ranked among the posterior's draws (Talts et al. 2018; Modrák et al. 2023). Models: linear with known noise,
with inverse-gamma and inverse-Wishart noise, and mixtures of these, whose posteriors are known; counts, labels, a
positive scale and a curved posterior, for which NUTS is the exact one; and small hierarchies for θ
(:mod:`benchmarks._sbc_theta`).

Rows: ``METHOD_MODEL_p``, the smallest p-value over quantities, times the number of quantities and of exact runs
(Bonferroni): an exact method must have 0.05 or more, so that 5 % of such tables have a false alarm. Of approximate ones
the p-value has no bar; ``METHOD_MODEL_dispersion`` says how they miss: 0 is right, positive too narrow (or off to
varying sides), negative too wide, averaged over the numbers of φ, with its standard error over tasks; and
``METHOD_MODEL_fit`` is the location of the log-likelihood: positive where the draws explain the support less well than
the truth does, negative where they cling to it. The line printed for each run says so in words. Controls, which must
fail: the exact posterior with its spread times 0.7, shifted by 0.3 standard deviations, the prior in its place, φ
without its correlations, and ``narrow_100``, times 0.7 again with the 100 ranks of the shortest exact run.

To pass says no more than the number of ranks allows. Had the exact posterior of the linear model been too narrow by a
factor, a full run of an exact method would have failed with this probability (:data:`POWER`):

===== ===== ===== =====
ranks × 0.9 × 0.8 × 0.7
===== ===== ===== =====
100   0.03  0.39  0.94
150   0.04  0.59  1
200   0.08  0.78  1
2000  1     1     1
===== ===== ===== =====

So NUTS, which has 100 to 200 ranks, is shown not to be off by 0.7, and not to be off by 0.8 only at 200. Of each exact
run ``METHOD_MODEL_seen`` is the factor nearest to 1 of these that it would have seen with a probability of at least
0.75 (none in a quick run with fewer ranks).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

import bayesmeta as bm
from bayesmeta.diagnostics.uniformity import legendre, t_test
from benchmarks import _sbc_methods as methods
from benchmarks import _sbc_theta as theta
from benchmarks._sbc_models import template
from benchmarks.harness import Row, at_least, at_most, main
from benchmarks.runs import refuse_unknown

#: chance that one of the exact runs of a table fails by accident; below it a control must fall
ALPHA, CONTROL = 0.05, 1e-3
FIT = "log_likelihood"
#: by ranks, and by the factor on the spread of the linear model's exact posterior: chance to fall below ALPHA, measured
#: on 120 runs or more (2000 ranks: 15) of 31 draws (2000: 63), so with a standard error of up to 0.05
POWER = {
    100: {0.9: 0.03, 0.8: 0.39, 0.7: 0.94},
    150: {0.9: 0.04, 0.8: 0.59, 0.7: 1.0},
    200: {0.9: 0.08, 0.8: 0.78, 0.7: 1.0},
    2000: {0.9: 1.0, 0.8: 1.0, 0.7: 1.0},
}


# -- controls ---------------------------------------------------------------------------------------------------------


class Changed:
    """The exact method of the linear model, whose draws of φ are changed before they are read.

    Args:
        how: "narrow" (its spread times ``factor``), "shifted", "prior" or "uncorrelated".
        factor: of "narrow".
    """

    def __init__(self, how: str, factor: float = 0.7) -> None:
        from benchmarks._sbc_models import linear

        self.method, self.how, self.factor = bm.BayesianLastLayer(linear()), how, factor
        self.program = self.method.program

    def adapt(self, support: bm.Observations, *, generator: Any = None) -> Any:
        """The exact posterior, its ``draws`` replaced."""
        posterior = self.method.adapt(support, generator=generator)
        exact, mean, spread = posterior.draws, posterior.loc, posterior.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        prior = self.method.adapt(support).prior_draws

        def draws(num_samples: int, generator: Any = None) -> Any:
            if self.how == "prior":
                return prior(num_samples, generator)
            found = exact(num_samples, generator)
            if self.how == "narrow":
                return replace(found, u=mean + self.factor * (found.u - mean))
            if self.how == "shifted":
                return replace(found, u=found.u + 0.3 * spread)
            assert self.how == "uncorrelated"
            return replace(found, u=torch.stack([u.roll(i, 0) for i, u in enumerate(found.u.unbind(-1))], -1))

        posterior.draws = draws
        return posterior


#: how the draws are changed, and the number of ranks and draws of a full run
CONTROLS = {
    "narrow": ("narrow", 2000, 63),
    "shifted": ("shifted", 2000, 63),
    "prior": ("prior", 2000, 63),
    "uncorrelated": ("uncorrelated", 2000, 63),
    "narrow_100": ("narrow", 100, methods.NUTS_DRAWS),
}


# -- one run ----------------------------------------------------------------------------------------------------------


def runs() -> dict[str, Any]:
    """All runs by the name of their rows: of φ, of θ, and controls."""
    found: dict[str, Any] = {}
    for (method, model), run in {**methods.RUNS, **theta.RUNS}.items():
        found[f"{method}_{model}"] = (model, run)
    return found | {f"control_{how}": ("linear", how) for how in CONTROLS}


def exact_runs() -> int:
    """How many runs must pass: the tests of a table that Bonferroni's correction is over."""
    return sum(not isinstance(run, str) and run.exact for _, run in runs().values())


def ranks(model: str, run: Any, seed: int, quick: bool) -> bm.SBC:
    """The ranks of one run."""
    alpha = ALPHA / len(runs())
    if isinstance(run, theta.Theta):
        count = max(run.hierarchies // 5, 25) if quick else run.hierarchies
        return theta.judge(run, count, seed, alpha)
    if isinstance(run, str):
        how, count, draws = CONTROLS[run]
        method, count = Changed(how), min(count, 500) if quick else count
    else:
        method = methods.train(run, model, seed, max(run.steps // 25, 1) if quick else run.steps)
        if quick and isinstance(method, bm.NUTS):
            method.num_samples, method.warmup = methods.QUICK_NUTS["num_samples"], methods.QUICK_NUTS["warmup"]
        count, draws = (max(run.tasks // 4, 40) if quick else run.tasks), run.num_draws
    # adapting is costly for some, and simulating needs but the model
    simulator = None if model == "kernel" else bm.ABML(method.program, inner_steps=0)
    return bm.sbc_method(
        method, template(model, count, seed), num_draws=draws, alpha=alpha, simulator=simulator, generator=seed
    )


def measure(name: str, seed: int, quick: bool) -> list[Row]:
    """The rows of one run, and its line."""
    model, run = runs()[name]
    begin = time.process_time()
    try:
        found = ranks(model, run, seed, quick)
    except (
        bm.errors.BayesMetaError
    ) as caught:  # an inference that diverged is a finding, and no reason to lose the rest
        print(f"{name}, seed {seed}: {type(caught).__name__}: {caught}", file=sys.stderr, flush=True)
        return [Row(f"{name}_p", None, bar="finite", passes=False)]
    exact, control = not isinstance(run, str) and run.exact, isinstance(run, str)
    p = min(1.0, min(found.values()) * len(found) * exact_runs())
    judged: Mapping[str, Any] = {}
    if exact or control:
        few = CONTROLS[run][1] < 1000 if control else False  # must fail as an exact run fails, and can hardly do more
        judged = (at_least(ALPHA) if exact else at_most(ALPHA if few else CONTROL)).judge(p)
    seconds = time.process_time() - begin
    rows = [Row(f"{name}_p", p, seconds=seconds, **judged)]
    dispersion, error, _ = of_phi(found)
    rows.append(Row(f"{name}_dispersion", dispersion, standard_error=error))
    fit = found.shapes[FIT]
    rows.append(Row(f"{name}_fit", fit.location, standard_error=fit.location_error))
    size, power = len(found.ranks[FIT]), ""
    if exact:
        rows.append(Row(f"{name}_seen", seen(size)))
        power = "" if seen(size) is None else f"; would have seen spread × {seen(size)}"
    print(f"{name}, seed {seed}: {words(found)} (p = {p:.2g}, {size} ranks{power}; {seconds:.0f} s)", flush=True)
    return rows


def seen(count: int) -> float | None:
    """The factor on the spread that is nearest to 1 among those that so many ranks see with a probability of 0.75."""
    known = [size for size in POWER if size <= count]
    return max((f for f, power in POWER[max(known)].items() if power >= 0.75), default=None) if known else None


def of_phi(found: bm.SBC) -> tuple[float, float, float]:
    """Dispersion over all numbers of φ (and θ): mean, standard error over tasks, and p-value of its being 0."""
    u = torch.stack([(r.double() + 0.5) / (found.num_draws + 1) for name, r in found.ranks.items() if name != FIT], -1)
    each = legendre(u)[..., 1].mean(-1)
    mean, p = t_test(each)
    return mean, float(each.std() / len(each) ** 0.5), p


def words(found: bm.SBC) -> str:
    """What the ranks say, for a person."""
    wrong: dict[str, list[str]] = {}
    for name, finding in found.findings.items():
        if name != FIT and finding != "calibrated":
            wrong.setdefault(finding, []).append(name)
    parts = [f"{finding} in {', '.join(names)}" for finding, names in wrong.items()]
    mean, error, _ = of_phi(found)
    if wrong and abs(mean) > 3 * error:
        parts[0] += f", as if spread × {spread_factor(mean):.2f}"
    if (finding := found.findings[FIT]) != "calibrated":
        fit = found.shapes[FIT]
        side = "uses too little of the data" if fit.location > 0 else "clings to the data"
        parts.append(side if fit.p_location < found.alpha else f"its fit to the data is {finding}")
    return "; ".join(parts) or "calibrated"


def spread_factor(dispersion: float) -> float:
    """The factor on the spread of an exact Gaussian posterior that gives ranks of this dispersion."""
    z = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z.square())
    low, high = 1e-3, 1e3
    for _ in range(60):
        factor = (low * high) ** 0.5
        moments = legendre(torch.special.ndtr(z / factor))[..., 1]
        if float((weight * moments).sum() / weight.sum()) > dispersion:
            low = factor
        else:
            high = factor
    return (low * high) ** 0.5


# -- the command ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> list[Row]:
    """All runs that were asked for."""
    torch.set_num_threads(args.threads)
    refuse_unknown(args.runs, runs())
    return [row for name in args.runs for row in measure(name, args.seed, args.quick)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    names = list(runs())
    parser.add_argument("--runs", nargs="+", default=names, help=f"which (default: all: {' '.join(names)})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("sbc", run, add_arguments)
