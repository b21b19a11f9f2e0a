"""Effects of counties, subjects, schools and cows: a full-rank guide and mean-field ABML against long NUTS.

Four data sets, one Pyro program (``benchmarks/_multilevel_model.py``): a line for each task whose intercept and slope
vary together, under fixed effects and weakly informative priors. y has mean 0 and standard deviation 1 over all rows.

- radon: log radon on basement (0 or 1, varies by county) and uranium (standardised, fixed);
- sleepstudy: reaction time on days (divided by their standard deviation; varies by subject);
- exam: normexam on standLRT (standardised; varies by school);
- milk: protein on week (divided by its standard deviation; varies by cow) and diet (two dummies, fixed).

The reference is NUTS on the program with its effects integrated out, which is exact as all is Gaussian given the global
sites; for sleepstudy it is held against NUTS on the program as it stands. Its draws are kept in ``runs/multilevel``.
An "effect" is a task's own intercept or slope, population mean included. ``mean_error_max`` is the greatest
|difference of posterior means| in posterior standard deviations of the reference, over all tasks and both effects;
``sd_error_max`` likewise the greatest |ratio of standard deviations − 1|; ``within`` is the share of effects for which
both are at most 0.1. With days counted from 0, a subject's intercept and slope correlate at −0.78 or so a posteriori,
and a mean-field posterior leaves about √(1 − 0.78²) = 0.63 of their standard deviations.

An amortised guide is judged on radon's counties that its training has not seen, a random fifth of them
(``benchmarks/_multilevel_amortised.py``). The truth is NUTS on the training counties, and the exact posterior of an
unseen county's effects at each draw of θ; the guide's effects are mixtures over the same draws.
``radon_amortised_effects`` is the greatest |difference of means| in posterior standard deviations, over unseen counties
and both effects; ``…_against_nuts_on_all`` holds them against NUTS that saw these counties too. Times are microseconds
of wall time a county: of one call of ``adapt``, in a batch of the size and with the draws of θ that the row's name
says; of NUTS, its whole run on the training counties divided by their number.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bayesmeta as bm
from benchmarks._multilevel_amortised import Plan, amortised_moments, fit_amortised, hold_out, microseconds
from benchmarks._multilevel_fit import (
    DRAWS,
    draw_effects,
    fit_full_rank,
    fit_mean_field,
    mean_field_method,
    mean_field_moments,
)
from benchmarks._multilevel_model import SOURCES, load
from benchmarks._multilevel_reference import (
    Marginal,
    Moments,
    Reference,
    Settings,
    Sums,
    cached,
    marginal_nuts,
    plain_nuts,
    plain_z,
    summarise,
)
from benchmarks.harness import Bar, Row, at_most, between, main

LIMIT = 0.1
#: Draws of θ that the amortised guide's effects are mixtures over; NUTS on the training tasks; and on which data.
NUM_THETA, HELD_OUT, AMORTISED = 400, Settings(chains=2, warmup=300, draws=700), "radon"
QUICKER = Settings(chains=2, warmup=60, draws=40)
LONG, SHORT = Settings(chains=4, warmup=400, draws=1000), Settings(chains=2, warmup=150, draws=150)
PLAIN = Settings(chains=2, warmup=200, draws=500)
#: Of mean-field ABML, about the largest that do not diverge: some counties have one row, some schools two.
INNER_LR = {"radon": 0.01, "sleepstudy": 0.06, "exam": 0.02, "milk": 0.06}


def reference(name: str, data: bm.Observations, args: argparse.Namespace) -> tuple[Reference, list[Row]]:
    """Long NUTS, and the rows that say whether it can be trusted."""
    draws = cached(name, marginal_nuts, data, _settings(args), args.cache, args.refresh)
    found, seconds = summarise(data, draws, args.seed), float(draws["seconds"])
    print(
        f"{name}: {data.num_tasks} tasks, {int(data.counts().sum())} rows; NUTS {seconds:.0f} s, "
        f"R-hat {found.rhat:.4f}, smallest ESS {found.ess:.0f}, {found.divergences} divergences",
        flush=True,
    )
    rows = [
        _row(f"{name}_nuts_rhat_max", found.rhat, at_most(1.01), args, seconds),
        _row(f"{name}_nuts_mean_monte_carlo_error_max", found.error, at_most(0.02), args),
    ]
    if name == "sleepstudy" and not args.quick:
        plain = cached(name, plain_nuts, data, replace(PLAIN, seed=args.seed), args.cache, args.refresh)
        z = plain_z(found, plain["effect"])
        rows.append(_row(f"{name}_plain_nuts_z_max", z, at_most(5), args, float(plain["seconds"])))
    return found, rows


def _settings(args: argparse.Namespace) -> Settings:
    return replace(SHORT if args.quick else LONG, seed=args.seed)


def full_rank(name: str, data: bm.Observations, args: argparse.Namespace) -> Moments:
    """Of the full-rank guide."""
    guide = fit_full_rank(data, steps=300 if args.quick else args.steps, seed=args.seed)
    return Moments.of_mixture(draw_effects(guide, data, DRAWS, args.seed))


def mean_field(name: str, data: bm.Observations, args: argparse.Namespace) -> Moments:
    """Of mean-field ABML."""
    method = fit_mean_field(data, steps=30 if args.quick else 200, seed=args.seed, inner_lr=INNER_LR[name])
    return mean_field_moments(method, data, inner_steps=50 if args.quick else 300, seed=args.seed)


#: The approximations by the name that their rows bear, and the bar on both errors.
APPROXIMATIONS = {"fullrank": (full_rank, at_most(LIMIT)), "meanfield": (mean_field, None)}


def run(args: argparse.Namespace) -> list[Row]:
    """All approximations on all data sets."""
    torch.set_num_threads(args.threads)
    rows = []
    for name in ["sleepstudy"] if args.quick else args.data:
        data = load(name)
        truth, more = reference(name, data, args)
        rows += more
        moments = {}
        for label, (approximate, bar) in APPROXIMATIONS.items():
            if label not in args.approximations:
                continue
            begin = time.perf_counter()
            moments[label] = approximate(name, data, args)
            seconds = time.perf_counter() - begin
            rows += _errors(f"{name}_{label}", moments[label], truth.moments, bar, args, seconds)
        if name == "sleepstudy" and set(moments) == set(APPROXIMATIONS):
            rows += _correlations(name, truth.moments, moments, args)
        if "amortised" in args.approximations and name == ("sleepstudy" if args.quick else AMORTISED):
            rows += amortised_rows(name, data, truth.moments, args)
    return rows


def amortised_rows(name: str, data: bm.Observations, on_all: Moments, args: argparse.Namespace) -> list[Row]:
    """The amortised guide on tasks held out of all its training, and what one task costs it, ABML and NUTS.

    Args:
        name: of the data set.
        data: all its tasks.
        on_all: the truth under NUTS on all of them, the held-out ones too.
        args: the command's.
    """
    known, unseen = hold_out(data.num_tasks, args.seed)
    train, test = data.tasks(known), data.tasks(unseen)
    settings = replace(QUICKER if args.quick else HELD_OUT, seed=args.seed)
    draws = cached(f"{name}_train", marginal_nuts, train, settings, args.cache, args.refresh)
    fitted = summarise(train, draws, args.seed)
    theta = draws["theta"].flatten(0, 1)
    truth = Moments.of_mixture(*Marginal(Sums.of(test)).conditional(theta))
    begin = time.process_time()
    plan = replace(Plan(), seed=args.seed, **({"steps": 30} if args.quick else {}))
    method = fit_amortised(train.to(dtype=torch.float32), theta, plan)
    seconds = time.process_time() - begin
    few = test.to(dtype=torch.float32)
    found = amortised_moments(method, few, theta[:: max(len(theta) // NUM_THETA, 1)])
    errors, ratios = found.mean_error(truth), found.sd / truth.sd
    whole = Moments(on_all.mean[unseen], on_all.sd[unseen], on_all.correlation[unseen])
    figures: dict[str, float] = {
        "amortised_effects_mean": float(errors.mean()),
        "amortised_sd_ratio_min": float(ratios.min()),
        "amortised_sd_ratio_max": float(ratios.max()),
        "amortised_effects_against_nuts_on_all": float(found.mean_error(whole).max()),
        "train_nuts_effects_against_nuts_on_all": float(truth.mean_error(whole).max()),
        "train_nuts_rhat_max": fitted.rhat,
        "nuts_us_per_task": 1e6 * float(draws["seconds"]) / len(known),
        **_timings(method, few, INNER_LR[name], quick=args.quick),
    }
    print(f"{name}: amortised, {seconds:.0f} s of CPU time, means {errors.max():.3f} on unseen tasks", flush=True)
    rows = [_row(f"{name}_amortised_effects", float(errors.max()), at_most(0.25), args, seconds)]
    return rows + [Row(f"{name}_{key}", value) for key, value in figures.items()]


def _timings(method: bm.Amortised, few: bm.Observations, inner_lr: float, quick: bool) -> dict[str, float]:
    """Microseconds of wall time a task: one pass over the held-out tasks, and over 1000 (the same again and again)."""
    many = few.tasks(torch.arange(100 if quick else 1000) % few.num_tasks)
    found = {}
    for batch in (few, many):
        for num_theta in (1, 20):
            spent = microseconds(partial(method.adapt, batch, num_theta=num_theta), repeats=20 if batch is few else 5)
            found[f"amortised_us_per_task_of_{batch.num_tasks}_theta_{num_theta}"] = spent / batch.num_tasks
    abml = mean_field_method(inner_lr, inner_steps=20)
    spent = microseconds(partial(abml.adapt, many, num_theta=1), repeats=3)
    return found | {f"abml_us_per_task_of_{many.num_tasks}_theta_1": spent / many.num_tasks}


def _errors(
    name: str, found: Moments, truth: Moments, bar: Bar | None, args: argparse.Namespace, seconds: float
) -> list[Row]:
    mean_error, sd_error = found.mean_error(truth), found.sd_error(truth)
    within = ((mean_error <= LIMIT) & (sd_error <= LIMIT)).double().mean()
    print(f"{name}: {seconds:.0f} s, means {mean_error.max():.3f}, sds {sd_error.max():.3f}", flush=True)
    return [
        _row(f"{name}_mean_error_max", float(mean_error.max()), bar, args, seconds),
        _row(f"{name}_sd_error_max", float(sd_error.max()), bar, args),
        _row(f"{name}_within", float(within), None, args),
    ]


def _correlations(name: str, truth: Moments, moments: dict[str, Moments], args: argparse.Namespace) -> list[Row]:
    """Mean over subjects of the posterior correlation of intercept and slope, and what it does to a mean field."""
    exact = float(truth.correlation.mean())
    rows = [_row(f"{name}_nuts_correlation", exact, between(-0.83, -0.73), args, reference=-0.78)]
    for label, found in moments.items():
        value = float(found.correlation.mean())
        rows.append(Row(f"{name}_{label}_correlation", value, exact, difference=value - exact))
    left = float((moments["meanfield"].sd / truth.sd).mean())
    expected = float((1 - truth.correlation.square()).sqrt().mean())
    rows.append(_row(f"{name}_meanfield_sd_ratio", left, at_most(0.8), args, reference=expected))
    return rows


def _row(
    name: str,
    value: float,
    bar: Bar | None,
    args: argparse.Namespace,
    seconds: float | None = None,
    reference: float | None = None,
) -> Row:
    # a short run is there to show that all works; only the full one is held to the bars
    verdict: dict[str, Any] = {} if bar is None or args.quick else bar.judge(value)
    return Row(name, value, reference, seconds=seconds, **verdict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument(
        "--data", nargs="+", choices=list(SOURCES), default=list(SOURCES), metavar="NAME", help="data sets (all four)"
    )
    kinds = [*APPROXIMATIONS, "amortised"]
    parser.add_argument(
        "--approximations", nargs="+", choices=kinds, default=kinds, metavar="NAME", help=f"{', '.join(kinds)} (all)"
    )
    parser.add_argument("--steps", type=int, default=3000, help="of the full-rank guide (default: 3000, quick 300)")
    parser.add_argument("--refresh", action="store_true", help="run NUTS again, whatever is kept")
    parser.add_argument("--cache", type=Path, default=Path("runs/multilevel"), help="where NUTS draws are kept")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


if __name__ == "__main__":
    main("multilevel", run, add_arguments)
