"""The data sets of :mod:`benchmarks.calibration`: what is trained on, and tasks to choose with and to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import bayesmeta as bm
from bayesmeta.data import concatenate
from bayesmeta.tabular.supports import VariedSupports, every_task
from bayesmeta.tasks import FertilitySplit
from bayesmeta.tasks.fertility import fertility
from benchmarks._multilevel_model import data_folder

#: Points of the query of a synthetic task: the tasks, not their points, are the units of every standard error.
QUERY = 10
SHOTS = {"sinusoid": 10, "challenging_sinusoid": 10, "fertility": 10, "radon": 5}
FOLDS = 5
_COMPLETE = 52  # years of a country, 1960–2011


@dataclass(frozen=True)
class Fold:
    """One training and what it is judged by; no task is in two of its parts.

    Attributes:
        train: where training tasks come from.
        validation, test: supports and queries. Each fold of a table has tasks of its own in ``test``, and in
            ``validation`` those that are the test of the next fold.
        stops: batches by whose loss training keeps its best θ; None where tasks are endless.
        split: of fertility rates, as the demo takes it.
    """

    train: Any
    validation: bm.TaskBatch
    test: bm.TaskBatch
    stops: Sequence[bm.TaskBatch] | None = None
    split: FertilitySplit | None = None


def folds(data: str, seed: int, num_tasks: int) -> list[Fold]:
    """Of a synthetic family one, with ``num_tasks`` fresh tasks to choose with and as many to judge by; of a table
    :data:`FOLDS`, under one shuffle of the tasks.
    """
    if data == "fertility":
        return [_fertility_fold(*parts) for parts in _rotate(_countries(), seed)]
    if data == "radon":
        return [_radon_fold(*parts, seed) for parts in _rotate(list(range(_counties().num_tasks)), seed)]
    family = _family(data)

    def fresh(generator: int) -> bm.TaskBatch:
        return family.sample(num_tasks, support=SHOTS[data], query=QUERY, generator=generator)

    return [Fold(family, fresh(4_000_000 + seed), fresh(5_000_000 + seed))]


def _family(data: str) -> Any:
    return bm.tasks.Sinusoid(noise=0.1) if data == "sinusoid" else bm.tasks.ChallengingSinusoid()


def _rotate(tasks: list[int], seed: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Training, validation and test tasks of each fold; each task is once in a test, and once in a validation."""
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [[tasks[i] for i in order[k::FOLDS]] for k in range(FOLDS)]
    rotated = []
    for k in range(FOLDS):
        rest = [task for i in range(2, FOLDS) for task in parts[(k + i) % FOLDS]]
        rotated.append((rest, parts[(k + 1) % FOLDS], parts[k]))
    return rotated


# -- fertility ----------------------------------------------------------------------------------------------------


@lru_cache(1)
def _table() -> bm.tasks.TableTasks:
    return fertility(minimum_years=30, order="mixed")


def _countries() -> list[int]:
    """Those that are complete; the others are always trained on."""
    return [i for i, length in enumerate(_table().lengths) if length == _COMPLETE]


def _fertility_fold(train: list[int], validation: list[int], test: list[int]) -> Fold:
    table, shots = _table(), SHOTS["fertility"]
    others = [i for i, length in enumerate(table.lengths) if length != _COMPLETE]
    learned = table.subset(train + others)
    units = learned.fit_standardizer()
    parts = (learned, table.subset(validation), table.subset(test))
    split = FertilitySplit(*(part.with_standardizer(units) for part in parts))
    held_back = split.validation.all(support=shots)
    return Fold(split.train, held_back, split.test.all(support=shots), [held_back], split)


# -- radon --------------------------------------------------------------------------------------------------------


@lru_cache(1)
def _counties() -> bm.tasks.TableTasks:
    csv = data_folder() / "multilevel" / "radon.csv"
    return bm.tasks.TableTasks.from_csv(csv, task="county.name", x=["basement"], y="log.radon")


def _radon_fold(train: list[int], validation: list[int], test: list[int], seed: int) -> Fold:
    table = _counties()
    learned = table.subset(train)
    units = learned.fit_standardizer()

    def seen(part: list[int]) -> bm.TaskBatch:
        batches = every_task(table.subset(part).with_standardizer(units), SHOTS["radon"], seed=seed)
        return concatenate(batches)

    held_back = seen(validation)
    return Fold(VariedSupports(learned.with_standardizer(units)), held_back, seen(test), [held_back])
