"""Held-out tasks: their score, the best θ on them, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import TaskBatch
from bayesmeta.errors import DataError, OptionError
from bayesmeta.ops.random import as_generator
from bayesmeta.train.distributed import Ranks

#: A score of a method on a batch, lower is better: ``score(method, batch, generator)``.
Score = Callable[[Any, TaskBatch, torch.Generator], float | Tensor]


class Validation:
    """Validation during a run, with what a checkpoint must hold of it. Without batches it does nothing.

    Args:
        batches: held-out tasks, in one batch or several; None: no validation.
        every: steps between validations.
        patience: stop after this many validations in a row without a fall of more than ``min_delta``; None: never.
        min_delta: what counts as a fall, measured from the last one that counted, so that many small ones add up.
        chunk: most tasks to evaluate at a time; None: a batch at a time.
        score: what is measured; None: the method's loss.

    Raises:
        OptionError: for values out of range, and for options of a validation that there is not.
    """

    def __init__(
        self,
        batches: TaskBatch | Sequence[TaskBatch] | None,
        *,
        every: int,
        patience: int | None,
        min_delta: float,
        chunk: int | None,
        score: Score | None,
    ) -> None:
        self.batches = _as_list(batches)
        self.every, self.patience, self.min_delta, self.chunk, self.score = every, patience, min_delta, chunk, score
        if not (min_delta >= 0 and math.isfinite(min_delta)):
            raise OptionError(f"min_delta must be a finite number of at least 0; got {min_delta}.")
        if score is not None and not callable(score):
            raise OptionError(
                f"validate_with is a {type(score).__name__}; expected a function of method, batch and generator."
            )
        wants = {
            "patience": patience is not None,
            "min_delta": min_delta > 0,
            "validation_chunk": chunk is not None,
            "validate_with": score is not None,
        }
        for name, given in wants.items():
            if given and not self.batches:
                raise OptionError(f"{name} needs validation=, the held-out tasks to measure on.")
        self.best: float | None = None
        self.best_step: int | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.reference: float | None = None
        self.waited = 0

    @property
    def num_tasks(self) -> int | None:
        """Held-out tasks, padding included; None without validation."""
        return sum(batch.num_tasks for batch in self.batches) if self.batches else None

    @property
    def stopped(self) -> bool:
        """True once patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def set_up(
        self, first: TaskBatch, device: torch.device, dtype: torch.dtype | None, ranks: Ranks | None = None
    ) -> None:
        """Move the tasks to where the run is, check them, and cut them into pieces; each rank has its own tasks.

        Raises:
            DataError and its kinds: for tasks that cannot be used, or in other units than the training batch ``first``.
        """
        self.ranks = Ranks(device) if ranks is None else ranks
        self.pieces: list[TaskBatch] = []
        for given in self.batches:
            if _units(given) != _units(first):
                raise DataError(
                    "The training tasks and the validation tasks are not in the same units: their standardizers "
                    "differ. Give both tables the one learned on the training tasks: table.with_standardizer(…)."
                )
            # no hyperprior: its share grows with how few the held-out tasks are, and says nothing of them
            batch = replace(given.to(device, dtype), population=None).check()
            if self.chunk is not None or len(self.batches) > 1 or self.ranks.size > 1:
                batch = batch.without_padding()  # a piece counts as its number of tasks
            if self.ranks.size > 1:
                batch = batch.tasks(self.ranks.part(batch.num_tasks))
                if batch.num_tasks == 0:
                    continue
            self.pieces += [batch] if self.chunk is None else batch.split(self.chunk)

    def measure(self, method: Any, device: torch.device) -> float:
        """Mean over the real tasks, of all ranks, of the loss or score, under the same noise each time."""
        was_training = method.training
        method.eval()
        generator = torch.Generator(device=device).manual_seed(0)
        if self.ranks.size > 1:
            generator = as_generator(0, device, f"validation of rank {self.ranks.rank}")
            return self._over_ranks(method, generator, was_training)
        try:
            values = [self._one(method, piece, generator) for piece in self.pieces]
        finally:
            method.train(was_training)
        if len(values) == 1:
            return values[0]
        counts = [piece.num_tasks for piece in self.pieces]
        return math.fsum(n * v for n, v in zip(counts, values, strict=True)) / sum(counts)

    def _over_ranks(self, method: Any, generator: torch.Generator, was_training: bool) -> float:
        def own() -> tuple[float, int]:
            values = [(piece.num_tasks, self._one(method, piece, generator)) for piece in self.pieces]
            return math.fsum(n * v for n, v in values), sum(n for n, _ in values)

        try:
            found = self.ranks.collect(own)
        finally:
            method.train(was_training)
        return math.fsum(total for total, _ in found) / sum(count for _, count in found)

    def _one(self, method: Any, piece: TaskBatch, generator: torch.Generator) -> float:
        if self.score is None:
            return float(method.loss(piece, generator=generator).detach())
        value = self.score(method, piece, generator)
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"validate_with returned a {type(value).__name__} that is no single number ({error}); expected a "
                "float, lower is better: the mean over the tasks of the batch."
            ) from error

    def note(self, value: float, step: int, method: Any) -> bool:
        """Remember θ if it is the best so far, and count the waiting; True for a new best."""
        finite = math.isfinite(value)
        new_best = finite and (self.best is None or value < self.best)
        if new_best:
            self.best, self.best_step = value, step
            self.best_state = {k: v.detach().clone() for k, v in method.state_dict().items()}
        if finite and (self.reference is None or value < self.reference - self.min_delta):
            self.reference, self.waited = value, 0
        else:
            self.waited += 1
        return new_best

    def use_best(self, method: Any) -> None:
        """Put the best θ into the method, where there was validation."""
        if self.best_state is not None:
            method.load_state_dict(self.best_state)

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {
            "loss": self.best,
            "step": self.best_step,
            "state": self.best_state,
            "waited": self.waited,
            "reference": self.reference,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.best, self.best_step, self.best_state = state["loss"], state["step"], state["state"]
        self.waited, self.reference = state["waited"], state.get("reference", state["loss"])


def _as_list(batches: Any) -> list[TaskBatch]:
    if batches is None:
        return []
    found = [batches] if isinstance(batches, TaskBatch) else batches
    if not isinstance(found, list | tuple) or not found or not all(isinstance(b, TaskBatch) for b in found):
        raise OptionError(
            f"validation is a {type(batches).__name__}; expected a TaskBatch, such as table.all(support=10), or a "
            "list of at least one."
        )
    return list(found)


def _units(batch: TaskBatch) -> Any:
    return None if batch.standardizer is None else batch.standardizer.to("cpu", torch.float32).state()
