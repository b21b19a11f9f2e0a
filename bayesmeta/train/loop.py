"""The state of a run and one step of it: everything that a checkpoint must hold."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesmeta.data import TaskBatch
from bayesmeta.errors import CheckpointError, EmptyTaskError, NonFiniteLossError, OptionError
from bayesmeta.ops.random import forked_rng
from bayesmeta.protocols import TaskDistribution
from bayesmeta.train import checkpoint, sharding
from bayesmeta.train.compilation.compiling import Compiler
from bayesmeta.train.distributed import Ranks
from bayesmeta.train.memory import memory_for
from bayesmeta.train.precision import Precision
from bayesmeta.train.signals import Signals
from bayesmeta.train.validation import Validation

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
NanPolicy = Literal["raise", "skip"]
#: A run in which so many steps in a row are not finite stops also when it skips such steps.
MAX_SKIPPED = 100
ScheduleFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class Plan:
    """What a step draws, and how it is cut; the arguments of :func:`~bayesmeta.fit` of the same names."""

    tasks_per_step: int
    support: int
    query: int | None
    seed: int
    accumulate: int = 1
    chunk: int | None = None
    dtype: torch.dtype | None = None
    precision: Precision = "float32"


class Loop:
    """A run.

    Args:
        method, tasks: what is trained, on what.
        plan: what a step draws.
        validation: held-out tasks and the best on them.
        device: where the run is.
        clip: largest norm of the gradient.
        nan_policy: what to do on a loss or gradient that is not finite.
        ranks: the processes that train together; None: this one alone.
    """

    def __init__(
        self,
        method: Any,
        tasks: TaskDistribution,
        plan: Plan,
        validation: Validation,
        device: torch.device,
        clip: float | None,
        nan_policy: NanPolicy = "raise",
        ranks: Ranks | None = None,
    ) -> None:
        self.method, self.tasks, self.plan, self.validation = method, tasks, plan, validation
        self.device, self.clip, self.nan_policy = device, clip, nan_policy
        self.ranks = Ranks(device) if ranks is None else ranks
        self.generator = torch.Generator(device=device).manual_seed(plan.seed)
        self.compiler: Compiler | None = None
        self.step = 0
        # several ranks share the tasks drawn, never the method's own noise; and what draws tasks ahead needs to know
        # the generator's next states
        apart = self.ranks.size > 1 or getattr(tasks, "draws_ahead", False)
        self.noise = sharding.stream(self, "noise") if apart else self.generator
        self.signals: Signals | None = None
        self.stop: signal.Signals | None = None  # a signal that all ranks know of
        self.not_finite: tuple[int, ...] = ()
        self.skipped, self.skipped_in_a_row = 0, 0
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.clock = Clock()
        self.overall = Clock()

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it goes on with."""
        return {
            **vars(self.plan),
            "dtype": None if self.plan.dtype is None else str(self.plan.dtype),
            "validation_tasks": self.validation.num_tasks,
            "validate_with": "loss" if self.validation.score is None else "a score",
            "draws_ahead": bool(getattr(self.tasks, "draws_ahead", False)),
        }

    def set_up(
        self,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Create parameters from a first batch (drawn apart, so that it does not move the run), then the optimizer.

        Ranks are compared, in the further ``options`` of the run too, and begin at rank 0's parameters and buffers.
        """
        plan = self.plan
        first = self.ranks.together(self._prepare)
        self.ranks.compare(sharding.first_values(self, first, options or {}))
        self.ranks.broadcast([*self.method.parameters(), *self.method.buffers()])
        self.optimizer = self.ranks.together(lambda: optimizer(self.parameters))
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise OptionError(f"optimizer made a {type(self.optimizer).__name__}; expected a torch optimizer.")
        self.schedule = None if schedule is None else schedule(self.optimizer)
        unusable = torch.optim.lr_scheduler.ReduceLROnPlateau
        if schedule is not None and (isinstance(self.schedule, unusable) or not hasattr(self.schedule, "step")):
            raise OptionError(
                f"schedule made a {type(self.schedule).__name__}; expected a torch schedule whose step takes no "
                "argument, such as bayesmeta.schedules.cosine(steps) makes."
            )
        self.ranks.compare(sharding.optimizer_values(self))
        self.validation.set_up(first, self.device, plan.dtype, self.ranks)
        self.loss = torch.zeros((), device=self.device)
        self.norm = torch.zeros((), device=self.device)

    def _prepare(self) -> TaskBatch:
        plan = self.plan
        self.method.train()
        self.method.to(device=self.device, dtype=plan.dtype)
        first = self.sample(torch.Generator(device=self.device).manual_seed(plan.seed), whole=True)
        first.check()
        self.method.prepare(first)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        if not self.parameters:
            raise OptionError("The method has no parameters to train.")
        return first

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Let what draws from torch's global generators, such as dropout, follow the run's seed; then put them back."""
        with forked_rng(sharding.stream(self, "layers")):
            yield

    # -- a step -------------------------------------------------------------------------------------------------

    def sample(self, generator: torch.Generator, *, whole: bool = False) -> TaskBatch:
        """One batch in the run's dtype; of several ranks, this one's tasks, unless ``whole``."""
        plan, query, ranks = self.plan, self.plan.query, self.ranks
        count = plan.tasks_per_step * ranks.size
        cut = ranks.size > 1 and not whole
        if cut and hasattr(self.tasks, "sample_part"):
            batch = self.tasks.sample_part(ranks.part, count, support=plan.support, query=query, generator=generator)
        else:
            batch = self.tasks.sample(count, support=plan.support, query=query, generator=generator)  # type: ignore[arg-type]
            batch = batch.tasks(ranks.part(batch.num_tasks)) if cut else batch
        return batch if plan.dtype is None else batch.to(dtype=plan.dtype)

    def advance(self) -> None:
        """One step of the optimizer."""
        begin = time.perf_counter()
        self.step += 1
        skip = self.nan_policy == "skip"
        buffers = {name: b.clone() for name, b in self.method.named_buffers()} if skip else {}
        tasks_at_a_time = min(self.plan.chunk or self.plan.tasks_per_step, self.plan.tasks_per_step)
        with memory_for(f"Step {self.step}", "chunk", tasks_at_a_time):
            loss, norm, num_tasks = self._gradient()
            # 0 · inf and 0 · NaN are NaN: one look at the device for both
            both = float(loss + 0 * norm)
            if math.isfinite(both) or not skip:
                where = ", ".join(map(str, self.not_finite))
                self._stop_if_not_finite(both, "loss or its gradient" + (f" on rank {where}" if where else ""))
                with sharding.told_later(self):
                    self._update(loss, norm)
            else:
                self._skip(both, buffers)
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self.clock.add(num_tasks, seconds)
        self.overall.add(num_tasks, seconds)

    def _gradient(self) -> tuple[Tensor, Tensor, int]:
        """Put the gradient of new tasks into the parameters; returns loss, the gradient's norm, number of tasks."""
        if self.ranks.size > 1:
            return sharding.gradient(self)
        compiled = None if self.compiler is None else self.compiler.gradient()
        if compiled is not None:
            return compiled
        self.optimizer.zero_grad(set_to_none=True)
        whole = self.plan.accumulate == 1 and self.plan.chunk is None
        loss, num_tasks = self._backward_whole() if whole else self._backward_in_pieces()
        return loss, nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]), num_tasks

    def _update(self, loss: Tensor, norm: Tensor) -> None:
        """Go down the gradient."""
        self.loss, self.norm, self.skipped_in_a_row = loss, norm, 0
        if self.compiler is None or not self.compiler.commit():
            if self.clip is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
            self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def _skip(self, value: float, buffers: dict[str, Tensor]) -> None:
        """Leave everything but the generators as it was before the step; not for ever, which would train nothing."""
        for name, buffer in self.method.named_buffers():
            buffer.copy_(buffers.get(name, buffer))
        if self.skipped_in_a_row + 1 >= MAX_SKIPPED:
            self._stop_if_not_finite(value, f"loss or its gradient, for {MAX_SKIPPED} steps in a row,")
        if self.skipped == 0 and self.ranks.is_first:
            warnings.warn(
                f"The loss or its gradient is {value} at step {self.step}. The step is skipped, as later ones will be "
                "without a warning; the result says how many.",
                stacklevel=4,
            )
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1

    def _backward_whole(self) -> tuple[Tensor, int]:
        """Gradient of the loss of one batch; returns the loss and the number of tasks."""
        batch = self.sample(self.generator)
        loss = self.method.loss(batch, generator=self.noise)
        loss.backward()
        return loss.detach(), batch.num_tasks

    def _pieces(self) -> Iterator[TaskBatch]:
        """The batches of a step one by one, cut to chunks, without padding: a piece counts as its number of tasks."""
        for _ in range(self.plan.accumulate):
            batch = self.sample(self.generator).without_padding()
            yield from [batch] if self.plan.chunk is None else batch.split(self.plan.chunk)

    def _backward_in_pieces(self) -> tuple[Tensor, int]:
        """The same for several pieces: the mean over all their tasks, with the graph of one at a time."""
        total, count = self.backward_sum()
        if count == 0:
            raise EmptyTaskError(f"All tasks drawn for step {self.step} are padding; at least one must be real.")
        for p in self.parameters:
            if p.grad is not None:
                p.grad.div_(count)
        return total / count, count

    def backward_sum(self) -> tuple[Tensor, int]:
        """The gradient of the sum over the tasks of all pieces; returns that sum, and how many they are."""
        total, count = torch.zeros((), device=self.device), 0
        for piece in self._pieces():
            if piece.num_tasks == 0:
                continue
            loss = self.method.loss(piece, generator=self.noise) * piece.num_tasks
            loss.backward()
            total, count = total + loss.detach(), count + piece.num_tasks
        return total, count

    def _stop_if_not_finite(self, value: Tensor | float, what: str) -> None:
        if math.isfinite(float(value)):
            return
        raise NonFiniteLossError(
            f"The {what} is {float(value)} at step {self.step}. The last good checkpoint, if there is a folder, is "
            "kept. Try a lower learning rate, or clip=. For a method with inner steps, lower inner_lr: its objective "
            "is in nats, and grows as 1/scale² of a Gaussian likelihood. And look at the scale of the data.",
            self.step,
        )

    def check_finite(self) -> None:
        """A finite loss can leave NaN parameters behind: look at them before they are saved or returned."""
        total = torch.stack([p.detach().abs().sum() for p in self.parameters]).sum()
        self._stop_if_not_finite(total, "sum of the parameters")

    def entry(self) -> dict[str, float]:
        """What the history says of this step: nothing that differs when the run is made again."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        entry = {"step": self.step, "loss": float(self.loss), "rate": rate, "gradient_norm": float(self.norm)}
        return entry | {"skipped": self.skipped} if self.skipped else entry

    def validate(self) -> tuple[float, bool]:
        """The score of this step on the held-out tasks, and whether it is the best so far."""
        largest = max((piece.num_tasks for piece in self.validation.pieces), default=1)
        with memory_for(f"Validation at step {self.step}", "validation_chunk", largest):
            value = self.validation.measure(self.method, self.device)
        return value, self.validation.note(value, self.step, self.method)

    def speed(self) -> dict[str, float]:
        """Seconds in steps since the run began, and tasks a second since this was last asked, for the log."""
        values = {"seconds": round(self.seconds, 6), "tasks_per_second": self.clock.rate() or 0.0}
        self.clock = Clock()
        return values

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state(self, config: dict[str, Any] | None) -> dict[str, Any]:
        """Everything from which the run goes on bit by bit."""
        return {
            "fingerprint": checkpoint.fingerprint(self.method),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "noise": None if self.noise is self.generator else self.noise.get_state(),
            "global_generators": self.global_generators(),
            **sharding.state(self),
            "skipped": [self.skipped, self.skipped_in_a_row],
            "last": [self.loss, self.norm],
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.validation.state(),
            "options": self.identity(),
            "config": config or {},
        }

    def best(self, config: dict[str, Any] | None) -> dict[str, Any]:
        """The best θ on the validation tasks, for a checkpoint of its own."""
        return {
            "fingerprint": checkpoint.fingerprint(self.method),
            "method": self.validation.best_state,
            "step": self.validation.best_step,
            "validation": self.validation.best,
            "options": self.identity(),
            "config": config or {},
        }

    def restore(self, folder: Path, config: dict[str, Any] | None, *, previous: bool = False) -> None:
        """Load the last checkpoint of a folder, or on request the one before it, which then becomes the last."""
        path = folder / (checkpoint.PREVIOUS if previous else checkpoint.LAST)
        load, where = (checkpoint.load if previous else checkpoint.load_last), self.device
        if self.ranks.size > 1:
            where = torch.device("cpu")  # rank 0 reads and sends it to ranks on other devices, and on other machines
        content = self.ranks.from_first(lambda: load(path, map_location=where))
        checkpoint.check_fingerprint(content["fingerprint"], self.method, path)
        ours = self.identity()
        # runs of 0.1.0 said less of themselves
        former = {"accumulate": 1, "chunk": None, "precision": "float32", "draws_ahead": False}
        options = ours | former | content["options"]
        options = sharding.check_size(self, options, sharding.size_of(content))
        for theirs, mine in ((options, ours), (content["config"], config or {})):
            for name in {**theirs, **mine}:
                if theirs.get(name) != mine.get(name):
                    raise CheckpointError(
                        f"The run in {folder} had {name} = {theirs.get(name)!r}, and here it is {mine.get(name)!r}. "
                        "Resume with the options of that run, or start another in a folder of its own."
                    )
        if (self.schedule is None) != (content["schedule"] is None):
            raise CheckpointError(
                f"The run in {folder} had {'no' if content['schedule'] is None else 'a'} schedule, and here there is "
                f"{'none' if self.schedule is None else 'one'}. Resume with the schedule of that run."
            )
        try:
            self.method.load_state_dict(content["method"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(content["schedule"])
        except (ValueError, KeyError, RuntimeError, CheckpointError) as error:
            raise CheckpointError(f"The checkpoint {path} does not fit the optimizer or schedule: {error}") from error
        self.generator.set_state(content["generator"].cpu())
        if content.get("noise") is not None:
            if self.noise is self.generator:  # of a run that began with several ranks
                self.noise = torch.Generator(device=self.device)
            self.noise.set_state(content["noise"].cpu())
        self.step, self.history = content["step"], content["history"]
        self.seconds = content.get("seconds", 0.0)
        self.validation.load_state(content["best"])
        self.skipped, self.skipped_in_a_row = content.get("skipped", [0, 0])
        self.loss, self.norm = (t.to(self.device) for t in content.get("last", [self.loss, self.norm]))
        sharding.restore(self, content)
        if previous and self.ranks.is_first:
            checkpoint.use_previous(folder)

    def set_global_generators(self, states: dict[str, Tensor]) -> None:
        """Set torch's own generators, for layers such as dropout."""
        if "cpu" in states:
            torch.set_rng_state(states["cpu"].cpu())
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)

    def global_generators(self) -> dict[str, Tensor]:
        """States of torch's own generators, for layers such as dropout."""
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})


class Clock:
    """Tasks and the seconds that they took."""

    def __init__(self) -> None:
        self.tasks, self.seconds = 0, 0.0

    def add(self, tasks: int, seconds: float) -> None:
        """Count a step."""
        self.tasks += tasks
        self.seconds += seconds

    def rate(self) -> float | None:
        """Tasks a second; None before any."""
        return self.tasks / self.seconds if self.seconds > 0 else None
