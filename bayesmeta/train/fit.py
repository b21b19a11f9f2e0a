"""The meta-training loop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesmeta.data import TaskBatch
from bayesmeta.errors import CheckpointError, DataError, NonFiniteLossError, OptionError
from bayesmeta.protocols import TaskDistribution
from bayesmeta.train import checkpoint
from bayesmeta.train.folder import Log, claim, write_config

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ScheduleFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass
class FitResult:
    """What :func:`fit` returns.

    Attributes:
        method: the trained method (the very object given), with the best θ when there was validation.
        history: one entry a logged step: step, loss, and rate, gradient norm, validation loss where there are any.
        steps: steps done, fewer than asked for when it stopped early.
        best_step, best_validation: of the lowest validation loss; None without validation.
        seconds: wall time of this call.
        out: the folder of the run, if any.
    """

    method: Any
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    best_step: int | None = None
    best_validation: float | None = None
    seconds: float = 0.0
    out: Path | None = None


def adam(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam at rate 1e-3, the default."""
    return torch.optim.Adam(params, lr=1e-3)


def pick_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA where there is one, else CPU.

    Raises:
        OptionError: for an unknown device, or CUDA where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"Unknown device {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'.") from error
    if picked.type not in ("cpu", "cuda"):
        raise OptionError(f"Device {device!r} is not supported; expected 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"Device {device!r} was asked for, but torch sees no CUDA device here; use 'cpu' or 'auto'.")
    return picked


def fit(
    method: Any,
    tasks: TaskDistribution,
    *,
    steps: int,
    tasks_per_step: int = 16,
    support: int = 10,
    query: int | None = 10,
    optimizer: OptimizerFactory = adam,
    schedule: ScheduleFactory | None = None,
    clip: float | None = None,
    validation: TaskBatch | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int = 1000,
    log_every: int = 100,
    progress: bool = True,
    config: dict[str, Any] | None = None,
) -> FitResult:
    """Meta-train a method on a distribution of tasks.

    Args:
        method: anything with ``prepare``, ``loss`` and ``nn.Module``'s interface.
        tasks: where batches come from.
        steps: optimizer steps in all; a resumed run goes on to this number.
        tasks_per_step: tasks in a batch.
        support, query: observations of each task; ``query=None`` (tables) means all that are left.
        optimizer: makes a torch optimizer from the parameters. A factory, since some parameters exist only after the
            first batch.
        schedule: makes a torch schedule from the optimizer, stepped once a step.
        clip: largest norm of the gradient, in units of the loss (nats a task).
        validation: held-out tasks; their loss is measured every ``validate_every`` steps under fixed noise, and the
            method ends with the θ that was best on them.
        validate_every: steps between validations.
        patience: stop after this many validations in a row without a new best; None: never.
        seed: of the tasks drawn and of the method's own noise. The parameters' first values are the model's.
        device: ``"auto"``, or a torch device; method and batches are moved there.
        dtype: cast method and batches; None leaves them as they are.
        out: folder for checkpoints, ``log.jsonl`` and ``config.json``; None keeps nothing.
        overwrite, resume: what to do when ``out`` already holds a run; neither: refuse.
        checkpoint_every, log_every: steps between checkpoints and log entries.
        progress: show a bar with loss and rate on standard error.
        config: plain values to store in ``config.json`` and in each checkpoint.

    Returns:
        The trained method and the history.

    Raises:
        NonFiniteLossError: naming the step; the last good checkpoint stays.
        RunFolderError, CheckpointError, OptionError: for folders, checkpoints and options that cannot be used.
        DataError, ModelError and their kinds: when data and model do not fit.
    """
    counts = {
        "steps": steps,
        "tasks_per_step": tasks_per_step,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
        "validate_every": validate_every,
    }
    for name, value in counts.items():
        if value < 1:
            raise OptionError(f"{name} must be at least 1; got {value}.")
    _check_kinds(method, tasks, optimizer, validation)
    if resume and out is None:
        raise OptionError("resume=True needs out=, the folder of the run to go on with.")
    loop = _Loop(method, tasks, pick_device(device), dtype, tasks_per_step, support, query, seed)
    loop.set_up(optimizer, schedule, validation, clip)
    folder = None if out is None else claim(out, overwrite=overwrite, resume=resume)
    if folder is not None and resume:
        loop.restore(folder, config)
    log = Log(None if folder is None else folder / "log.jsonl", keep_until=loop.step if resume else None)
    if folder is not None and not resume:
        write_config(
            folder, {"settings": config or {}, "fit": loop.options(steps), "method": checkpoint.fingerprint(method)}
        )
    begin = time.perf_counter()
    bar = tqdm(
        total=steps,
        initial=loop.step,
        disable=None if progress else True,
        unit="step",
        desc="meta-training",
        ncols=min(shutil.get_terminal_size().columns, 100),  # 80 where the terminal has no size
    )
    try:
        while loop.step < steps and not loop.stopped:
            loop.advance()
            bar.update()
            last = loop.step == steps
            entry: dict[str, float] = {}
            if loop.step % log_every == 0 or last:
                entry = loop.entry()
                bar.set_postfix_str(f"loss {entry['loss']:.4g}, rate {entry['rate']:.2g}", refresh=False)
            if validation is not None and (loop.step % validate_every == 0 or last):
                entry = (entry or loop.entry()) | {"validation": loop.validate(patience)}
                if folder is not None and loop.best_step == loop.step:
                    checkpoint.save(folder / checkpoint.BEST, loop.state(config))
            if entry:
                loop.history.append(entry)
                log.write(**entry)
            if folder is not None and (loop.step % checkpoint_every == 0 or last or loop.stopped):
                loop.check_finite()
                checkpoint.save(folder / checkpoint.LAST, loop.state(config))
    finally:
        bar.close()
    loop.check_finite()
    loop.use_best()
    return FitResult(method, loop.history, loop.step, loop.best_step, loop.best, time.perf_counter() - begin, folder)


def _units(batch: TaskBatch) -> Any:
    return None if batch.standardizer is None else batch.standardizer.to("cpu", torch.float32).state()


def _check_kinds(method: Any, tasks: Any, optimizer: Any, validation: Any) -> None:
    if not (hasattr(method, "loss") and hasattr(method, "prepare")):
        raise OptionError(f"method is a {type(method).__name__}; expected one with loss and prepare, such as MAML.")
    if not isinstance(tasks, TaskDistribution):
        raise OptionError(
            f"tasks is a {type(tasks).__name__}; expected a task distribution with sample and num_tasks, such as "
            "bayesmeta.tasks.TableTasks.from_dataframe(…)."
        )
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise OptionError(
            "optimizer must be a factory, such as lambda params: torch.optim.Adam(params, 1e-3): some parameters exist "
            "only after the first batch."
        )
    if validation is not None and not isinstance(validation, TaskBatch):
        raise OptionError(
            f"validation is a {type(validation).__name__}; expected a TaskBatch, such as table.all(support=10)."
        )


class _Loop:
    """The state of a run: everything that a checkpoint must hold."""

    def __init__(
        self,
        method: Any,
        tasks: TaskDistribution,
        device: torch.device,
        dtype: torch.dtype | None,
        tasks_per_step: int,
        support: int,
        query: int | None,
        seed: int,
    ) -> None:
        self.method, self.tasks, self.device, self.dtype = method, tasks, device, dtype
        self.tasks_per_step, self.support, self.query, self.seed = tasks_per_step, support, query, seed
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: float | None = None
        self.best_step: int | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.waited = 0
        self.stopped = False

    def options(self, steps: int) -> dict[str, Any]:
        """What identifies the run, for ``config.json``."""
        return {"steps": steps, "device": str(self.device), **self.identity()}

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it goes on with."""
        return {name: getattr(self, name) for name in ("tasks_per_step", "support", "query", "seed")}

    def sample(self, generator: torch.Generator) -> TaskBatch:
        """One batch in the run's dtype."""
        query: Any = self.query
        batch = self.tasks.sample(self.tasks_per_step, support=self.support, query=query, generator=generator)
        return batch if self.dtype is None else batch.to(dtype=self.dtype)

    def set_up(
        self,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None,
        validation: TaskBatch | None,
        clip: float | None,
    ) -> None:
        """Create parameters from a first batch that training does not use, then the optimizer."""
        self.method.to(device=self.device, dtype=self.dtype)
        first = self.sample(torch.Generator(device=self.device).manual_seed(self.seed))
        first.check()
        self.method.prepare(first)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        if not self.parameters:
            raise OptionError("The method has no parameters to train.")
        self.optimizer = optimizer(self.parameters)
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self.validation = None if validation is None else validation.to(self.device, self.dtype).check()
        if validation is not None and _units(validation) != _units(first):
            raise DataError(
                "The training tasks and the validation tasks are not in the same units: their standardizers differ. "
                "Give both tables the one learned on the training tasks: table.with_standardizer(…)."
            )
        self.clip = clip
        self.loss = torch.zeros((), device=self.device)
        self.norm = torch.zeros((), device=self.device)

    def advance(self) -> None:
        """One step."""
        self.step += 1
        batch = self.sample(self.generator)
        self.loss = self.method.loss(batch, generator=self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.norm = nn.utils.get_total_norm(gradients)
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, self.norm)
        self.loss = self.loss.detach()
        # 0 · inf and 0 · NaN are NaN: one look at the device for both
        self._stop_if_not_finite(self.loss + 0 * self.norm, "loss or its gradient")
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def _stop_if_not_finite(self, value: Tensor, what: str) -> None:
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
        """What the log says of this step."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        return {"step": self.step, "loss": float(self.loss), "rate": rate, "gradient_norm": float(self.norm)}

    def validate(self, patience: int | None) -> float:
        """Loss on the validation tasks under the same noise each time; keeps the best θ."""
        assert self.validation is not None
        was_training = self.method.training
        self.method.eval()
        generator = torch.Generator(device=self.device).manual_seed(0)
        value = float(self.method.loss(self.validation, generator=generator).detach())
        self.method.train(was_training)
        if math.isfinite(value) and (self.best is None or value < self.best):
            self.best, self.best_step, self.waited = value, self.step, 0
            self.best_state = {k: v.detach().clone() for k, v in self.method.state_dict().items()}
        else:
            self.waited += 1
            self.stopped = patience is not None and self.waited >= patience
        return value

    def use_best(self) -> None:
        """Put the best θ into the method, where there was validation."""
        if self.best_state is not None:
            self.method.load_state_dict(self.best_state)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state(self, config: dict[str, Any] | None) -> dict[str, Any]:
        """Everything from which the run goes on bit by bit."""
        return {
            "fingerprint": checkpoint.fingerprint(self.method),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "history": self.history,
            "best": {"loss": self.best, "step": self.best_step, "state": self.best_state, "waited": self.waited},
            "stopped": self.stopped,
            "options": self.identity(),
            "config": config or {},
        }

    def restore(self, folder: Path, config: dict[str, Any] | None) -> None:
        """Load the last checkpoint of a folder."""
        path = folder / checkpoint.LAST
        content = checkpoint.load(path, map_location=self.device)
        checkpoint.check_fingerprint(content["fingerprint"], self.method, path)
        for theirs, ours in ((content["options"], self.identity()), (content["config"], config or {})):
            for name in {**theirs, **ours}:
                if theirs.get(name) != ours.get(name):
                    raise CheckpointError(
                        f"The run in {folder} had {name} = {theirs.get(name)!r}, and here it is {ours.get(name)!r}. "
                        "Resume with the options of that run, or start another in a folder of its own."
                    )
        try:
            self.method.load_state_dict(content["method"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.schedule is not None and content["schedule"] is not None:
                self.schedule.load_state_dict(content["schedule"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"The checkpoint {path} does not fit the optimizer or schedule: {error}") from error
        self.generator.set_state(content["generator"].cpu())
        self.step, self.history, self.stopped = content["step"], content["history"], content["stopped"]
        best = content["best"]
        self.best, self.best_step, self.best_state = best["loss"], best["step"], best["state"]
        self.waited = best["waited"]
