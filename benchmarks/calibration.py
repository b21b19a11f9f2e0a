"""Do forecasts say how sure they are? Every method on four data sets, before and after recalibration.

Data: ``sinusoid`` (noise of 0.1) and ``challenging_sinusoid``, 10 noisy shots, endless training tasks, ``--tasks``
fresh tasks to judge by and as many others to choose and recalibrate with, 10 noisy query points each; ``fertility``,
whose countries show their first ten years, and ``radon``, whose counties show five houses (all but one where there are
fewer): five folds, so that each task is judged once by a method that was trained, stopped and recalibrated without it.
Methods and their training: ``benchmarks/_calibration_methods.py``. All figures are means over tasks; of tables, over
the tasks of all folds.

Rows, ``METHOD_DATA_…``: ``nll``, ``crps`` (raw units), ``coverage50``, ``coverage90`` and ``calibration_error`` (root
mean square over the levels .05, .10, … of the share of PIT values below, less the level; its reference is what a
calibrated forecast would have, from so many tasks), and the same after recalibration with ``_recalibrated``. Three
corrections are learned on validation tasks: a temperature, an isotonic map after it, and conformal intervals.
``_recalibrated`` is the one of :data:`HELD`, fixed before by how many validation tasks there are: thousands take the
isotonic one; of tens, conformal intervals allow for being learned from so few. They promise *at least* 90%: learned
from 17 validation tasks (radon) or 38 (fertility) they are wider than that takes, and cover about 93% and 91.5%, so
that some runs on tables miss a bar with two sides. ``METHOD_DATA_coverage90_WAY`` has each of the three.

On tables a correction makes the log score worse more often than not, on radon conformal intervals that of all 29
methods: what is learned from so few tasks costs more than it mends, and the density of a conformal correction is but a
by-product. It is for intervals; compare ``nll`` with ``nll_recalibrated`` before using it for more.

The NLL is of the closed form where there is one, also after a correction if it is Normal. Corrected, other closed forms
(of ``last_layer_gamma``, ``last_layer_mixture``, ``pacoh``) are mixtures of ``--draws`` Normals, as methods without
one always are: their NLL is too high where these are narrow, and so is a temperature learned by it.

``best`` is, on each data set, the method with the lowest NLL on validation tasks, not recalibrated. On tables it is
chosen anew in each fold, by the validation tasks of that fold alone, and the forecasts of those chosen are pooled: over
all folds the validation tasks are the test tasks. Results that were kept without figures of single folds leave only
that peek, by which ``best`` looks a little better than it is; the line printed says so. Training on tables also
stops by the validation tasks, which flatters ``validation`` figures, of all methods alike. And another ``--seed`` is on
tables another shuffle of the same tasks, not other tasks.

Bars: 90% coverage of ``best`` within 0.90 ± 2 standard errors (its distance in them is
``best_DATA_coverage90_errors``), and on the two families of sinusoids within ± 0.02; of every method after
recalibration within ± 2 standard errors on tables, within ± 0.02 on the sinusoids. Standard errors are over test
tasks; on the sinusoids those after recalibration are larger by √(1 + tasks / validation tasks), since the correction is
learned from tasks too. On tables they are not: each task is once a test task and once a validation task, where it
widens the forecasts of others if it is hard, so that the two errors cancel in part; in simulations the coverage then
varies by about half of the standard error given, so that even this bar is a generous one.

Each run's figures are kept in ``--folder`` as it ends; ``--reuse`` takes those that are there with the same settings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import bayesmeta as bm
from bayesmeta.demo.run import STEPS, train_demo
from benchmarks._calibration_data import SHOTS, Fold, folds
from benchmarks._calibration_forecasts import WAYS, Judged, correct, judge, keep, pool
from benchmarks._calibration_methods import DATA, METHODS, Training, make
from benchmarks.harness import Bar, Row, at_most, between, main, write_json
from benchmarks.runs import refuse_unknown

SINES = ("sinusoid", "challenging_sinusoid")
#: Which correction ``_recalibrated`` is.
HELD = {"sinusoid": "isotonic", "challenging_sinusoid": "isotonic", "fertility": "conformal", "radon": "conformal"}
FIGURES = ("nll", "crps", "coverage50", "coverage90", "calibration_error")
LEVEL, WITHIN, ERRORS = 0.9, 0.02, 2.0
FOLDER = Path("runs/bench/calibration")
#: What a quick run trains.
QUICK = ["maml", "last_layer", "deep_kernel", "abml", "cnp"]


@dataclass(frozen=True)
class Job:
    """One run: a method on a data set.

    Attributes:
        method, data: names.
        seed: of everything.
        tasks: synthetic ones to judge by, and as many to choose with.
        draws: of φ, where there is no closed form.
        share: of the training steps.
        max_folds: folds of a table that are run.
        threads: of torch.
    """

    method: str
    data: str
    seed: int
    tasks: int
    draws: int
    share: float
    max_folds: int
    threads: int

    @property
    def name(self) -> str:
        """As its rows begin."""
        return f"{self.method}_{self.data}"

    def training(self) -> Training:
        """With the steps that are taken."""
        full = METHODS[self.method].training(self.data)
        return Training(**{**asdict(full), "steps": max(round(full.steps * self.share), 5)})

    @property
    def targets(self) -> int:
        """Draws of y, several for each of φ on tables, whose few tasks make them cheap.

        The draws of conformal intervals lie at even steps of probability, so that ranks among n of them overstate the
        coverage by about 1 / n.
        """
        return self.draws if self.data in SINES else 4 * self.draws

    def settings(self) -> dict[str, Any]:
        """What its figures depend on."""
        plain = {k: v for k, v in asdict(self).items() if k != "threads"}
        return plain | {"targets": self.targets, "training": asdict(self.training())}


# -- one run ------------------------------------------------------------------------------------------------------


def train(job: Job, fold: Fold) -> Any:
    """The method, trained on a fold and in evaluation mode."""
    plan, seed = job.training(), job.seed
    if (job.method, job.data) == ("last_layer_mixture", "fertility"):
        assert fold.split is not None
        steps = max(round(STEPS * job.share), 5)
        demo = train_demo(fold.split, seed, steps, device="cpu", progress=False).method
        return demo.eval()
    method = make(job.method, job.data, seed)
    decay = 0.0 if fold.stops is None else 1e-3
    bm.fit(
        method,
        fold.train,
        steps=plan.steps,
        tasks_per_step=16,
        support=SHOTS[job.data],
        query=plan.query,
        optimizer=lambda p: torch.optim.AdamW(p, lr=plan.rate, weight_decay=decay),
        schedule=bm.schedules.cosine(plan.steps),
        clip=plan.clip,
        validation=fold.stops,
        validate_every=min(25, plan.steps),
        seed=seed,
        device="cpu",
        progress=False,
    )
    return method.eval()


def measure(job: Job) -> dict[str, Any]:
    """Train on each fold, forecast, correct, score: the figures of a run, by the way of correction."""
    torch.set_num_threads(job.threads)
    begin, seconds = time.perf_counter(), 0.0
    judged: dict[str, list[Judged]] = {}
    for fold in folds(job.data, job.seed, job.tasks)[: job.max_folds]:
        start = time.process_time()
        method = train(job, fold)
        seconds += time.process_time() - start
        held_back, test = (keep(method, batch, job.seed, job.draws) for batch in (fold.validation, fold.test))
        options = (job.seed, job.targets)
        judged.setdefault("validation", []).append(judge(held_back, held_back.batch, *options))
        judged.setdefault("none", []).append(judge(test, test.batch, *options))
        for way in WAYS:
            (corrected,) = correct(way, held_back, [test], *options)
            judged.setdefault(way, []).append(judge(corrected, test.batch, *options))
    figures = {way: Judged.together(parts).figures() for way, parts in judged.items()}
    count = len(judged["none"])
    by_fold = [{way: judged[way][k].figures() for way in ("validation", "none")} for k in range(count)]
    times = {"training_seconds": seconds, "wall_seconds": time.perf_counter() - begin}
    return {"settings": job.settings(), **times, "figures": figures, "folds": by_fold}


def guarded(job: Job) -> dict[str, Any]:
    """:func:`measure`; of a training that diverged the error's text, so that the other runs are not lost."""
    try:
        return measure(job)
    except (bm.errors.NonFiniteLossError, bm.errors.NonFiniteDataError) as error:
        return {"settings": job.settings(), "error": f"{type(error).__name__}: {error}"}


# -- all runs -----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> list[Row]:
    """All runs that were asked for, then the table."""
    torch.set_num_threads(args.threads)
    jobs = _jobs(args)
    results: dict[str, dict[str, Any]] = {}
    for job, result in _done(args, jobs):
        results[job.name] = result
        write_json(_file(args.folder, job), result)
        print(_line(job, result), flush=True)
    ordered = {job.name: results[job.name] for job in jobs}
    if args.picture is not None:
        from benchmarks._calibration_picture import draw

        draw(_by_data(ordered, args), HELD, args.picture)
        print(f"picture: {args.picture}")
    return rows(ordered, args.data, args.runs, full=not args.quick and args.share == 1.0)


def _jobs(args: argparse.Namespace) -> list[Job]:
    args.runs = args.runs or (QUICK if args.quick else list(METHODS))
    refuse_unknown(args.runs, METHODS)
    refuse_unknown(args.data, DATA, "data set")
    tasks, draws = (100, 50) if args.quick else (args.tasks, args.draws)
    share, max_folds = (0.01, 1) if args.quick else (args.share, 100)
    if args.quick:  # must not replace what a full run has left
        args.folder = args.folder / "quick"
    return [
        Job(method, data, args.seed, tasks, draws, share, max_folds, args.threads)
        for method in args.runs
        for data in args.data
    ]


def _file(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}_seed{job.seed}.json"


def _done(args: argparse.Namespace, jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each run and its figures, as they end."""
    left = []
    for job in jobs:
        kept = _kept(_file(args.folder, job), job) if args.reuse else None
        if kept is None:
            left.append(job)
        else:
            yield job, kept
    if args.reuse:
        print(f"reused: {len(jobs) - len(left)} runs; to be run: {len(left)}", flush=True)
    if args.jobs == 1:
        yield from ((job, guarded(job)) for job in left)
        return
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(guarded, job): job for job in left}
        for future in as_completed(running):
            yield running[future], future.result()


def _kept(path: Path, job: Job) -> dict[str, Any] | None:
    """What an earlier run left, where its settings are the same."""
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content if content.get("settings") == json.loads(json.dumps(job.settings())) else None


def _line(job: Job, result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"{job.name}: {result['error'][:200]}"
    f = result["figures"]
    ways = " ".join(f"{way[:4]} {f[way]['coverage90']:.3f}" for way in WAYS)
    none, held = f["none"], f[HELD[job.data]]
    return (
        f"{job.name}: nll {none['nll']:.3f} (validation {f['validation']['nll']:.3f}) crps {none['crps']:.4f} "
        f"coverage {none['coverage50']:.3f} {none['coverage90']:.3f} ± {none['coverage90_error']:.4f}; corrected "
        f"{ways}; nll {held['nll']:.3f}; "
        f"trained {result['training_seconds']:.0f} s of {result['wall_seconds']:.0f} s"
    )


# -- rows ---------------------------------------------------------------------------------------------------------


def _by_data(results: Mapping[str, Any], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures of the runs that ended well, by data set and method."""
    found: dict[str, dict[str, Any]] = {data: {} for data in args.data}
    for data in args.data:
        for method in args.runs:
            result = results[f"{method}_{data}"]
            if "error" not in result:
                found[data][method] = result["figures"]
    return found


def rows(results: Mapping[str, Mapping[str, Any]], data: list[str], methods: list[str], full: bool) -> list[Row]:
    """All rows. Bars are for full runs."""
    made = []
    for one in data:
        ended = {}
        for method in methods:
            result = results[f"{method}_{one}"]
            if "error" in result:
                made.append(Row(f"{method}_{one}_trains", None, bar="finite", passes=False))
                continue
            ended[method] = result
            made += _of_run(f"{method}_{one}", one, result, full)
        if ended:
            made += _of_best(one, ended, full)
    return made


def choose(ended: Mapping[str, Mapping[str, Any]]) -> str:
    """The method with the lowest NLL on validation tasks; its figures are given by method."""
    return min(ended, key=lambda method: ended[method]["validation"]["nll"])


def best_of(ended: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The method that is chosen in each fold, and the pooled figures of their forecasts of test tasks.

    Args:
        ended: results by method. Where one has no figures of single folds, one method is chosen for all of them.
    """
    if not _have_folds(ended):
        chosen = choose({method: result["figures"] for method, result in ended.items()})
        return [chosen], ended[chosen]["figures"]["none"]
    count = min(len(result["folds"]) for result in ended.values())
    names = [choose({method: result["folds"][k] for method, result in ended.items()}) for k in range(count)]
    return names, pool([ended[name]["folds"][k]["none"] for k, name in enumerate(names)])


def _have_folds(ended: Mapping[str, Mapping[str, Any]]) -> bool:
    return all(result.get("folds") for result in ended.values())


def _of_run(name: str, data: str, result: Mapping[str, Any], full: bool) -> list[Row]:
    figures = result["figures"]
    made = _plain(name, figures["none"])
    made[0].seconds = result["training_seconds"]
    more = (1 + figures["none"]["tasks"] / figures["validation"]["tasks"]) ** 0.5 if data in SINES else 1.0
    for way in WAYS:
        made.append(_coverage(f"{name}_coverage90_{way}", figures[way], more=more))
    held = figures[HELD[data]]
    for row in _plain(name, held, "_recalibrated"):
        if row.name.endswith("_coverage90_recalibrated"):
            row = _coverage(row.name, held, bar_within(data, more * held["coverage90_error"]) if full else None, more)
        made.append(row)
    return made


def bar_within(data: str, error: float) -> Bar:
    """Of 90% coverage, whose standard error is given: a fixed width on the sinusoids, two errors on tables."""
    width = WITHIN if data in SINES else ERRORS * error
    return between(LEVEL - width, LEVEL + width)


def _plain(name: str, figures: Mapping[str, Any], ending: str = "") -> list[Row]:
    made = []
    for key in FIGURES:
        if key == "calibration_error":
            made.append(Row(f"{name}_{key}{ending}", figures[key], reference=figures["calibration_noise"]))
        elif key == "coverage90":
            made.append(_coverage(f"{name}_{key}{ending}", figures))
        else:
            made.append(Row(f"{name}_{key}{ending}", figures[key], standard_error=figures[f"{key}_error"]))
    return made


def _coverage(name: str, figures: Mapping[str, Any], bar: Bar | None = None, more: float = 1.0) -> Row:
    value, error = figures["coverage90"], more * figures["coverage90_error"]
    judged = {} if bar is None else bar.judge(value)
    return Row(name, value, LEVEL, None, value - LEVEL, error, **judged)


def _of_best(data: str, ended: Mapping[str, Mapping[str, Any]], full: bool) -> list[Row]:
    names, figures = best_of(ended)
    peek = data not in SINES and not _have_folds(ended)
    note = " (over all folds, whose validation tasks are the test tasks: no figures of single folds were kept)"
    print(f"best on validation tasks of {data}: {', '.join(names)}{note if peek else ''}", flush=True)
    made = _plain(f"best_{data}", figures)
    error = figures["coverage90_error"]
    bar = bar_within(data, error) if full else None
    made = [_coverage(r.name, figures, bar) if r.name.endswith("coverage90") else r for r in made]
    distance = abs(figures["coverage90"] - LEVEL) / error if error > 0 else float("inf")
    made.append(Row(f"best_{data}_coverage90_errors", distance, **(at_most(ERRORS).judge(distance) if full else {})))
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--runs", nargs="+", default=None, help=f"methods (default: {' '.join(METHODS)})")
    parser.add_argument("--data", nargs="+", default=list(DATA), help=f"data sets (default: {' '.join(DATA)})")
    parser.add_argument("--tasks", type=int, default=2000, help="synthetic tasks to judge by (default: 2000)")
    parser.add_argument("--draws", type=int, default=100, help="of φ, where there is no closed form (default: 100)")
    parser.add_argument("--share", type=float, default=1.0, help="of the training steps (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of the runs' figures (default: {FOLDER})")
    parser.add_argument("--reuse", action="store_true", help="take figures that are in the folder already")
    parser.add_argument("--picture", type=Path, help="draw the coverage curves there")


if __name__ == "__main__":
    main("calibration", run, add_arguments)
