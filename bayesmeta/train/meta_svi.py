"""SVI with the user's own model and guide, in the signature of ``pyro.infer.SVI``."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import (
    CheckpointError,
    NonFiniteLossError,
    OptionError,
    SiteError,
)
from bayesmeta.ops.random import Seed
from bayesmeta.posteriors.samples import SamplesPosterior
from bayesmeta.train import checkpoint
from bayesmeta.train.arguments import as_observations
from bayesmeta.train.compilation.compiled_svi import SVICompiler
from bayesmeta.train.compilation.compiling import Compile, check_mode
from bayesmeta.train.known_tasks import GuideTasks
from bayesmeta.train.loop import MAX_SKIPPED, NanPolicy
from bayesmeta.train.precision import Precision, check_precision, check_usable, in_precision
from bayesmeta.train.svi_results import TrainedSVI
from bayesmeta.train.svi_state import (
    copy_into,
    generators,
    make_optimizer,
    module_tensors,
    names_of,
    own_store,
    owners,
    set_generators,
    tensors_of,
)

if TYPE_CHECKING:
    from xarray import DataTree


class MetaSVI:
    """Stochastic variational inference with torch optimizers and no trace in Pyro's global parameter store.

    The signature is that of ``pyro.infer.SVI`` (``model, guide, optim, loss``), with one difference: ``optim`` is a
    factory, ``lambda params: torch.optim.Adam(params, 1e-2)``, since parameters of a guide exist only after its
    first run. Any Pyro ELBO works. A step gives the same numbers as ``pyro.infer.SVI`` with the same optimizer and
    seed.

    The loss is the ELBO's own, a sum over the tasks given; Pyro's plates and ``poutine.scale`` say how a mini-batch
    counts.

    A Pyro ``AutoGuide`` over sites inside the task plate has parameters for each task, in the order of a plate: given
    other tasks it would use one task's parameters for another. Here it knows the tasks of its first step, by their
    ``task_id``, or by their data where there is none, and refuses others. With ``task_id`` the order of the tasks does
    not matter; with AutoNormal, AutoDelta and AutoMessengers each step may take some of a ``population``, which Pyro's
    scale makes up for. A task brings the same data in every step, since its parameters stand for one posterior. A
    hand-written guide with parameters for each task is not recognised.

    Args:
        model: a Pyro program ``(x, y=None, mask=None)``, a :class:`~bayesmeta.TaskProgram`, or ``method.model``.
        guide: a Pyro guide with the same arguments; an ``AutoGuide`` made for the model works too, for
            fixed tasks.
        optim: makes a torch optimizer from parameters.
        loss: a ``pyro.infer.ELBO``.
        nan_policy: what a loss or gradient that is not finite does: ``"raise"``, or ``"skip"``: the step changes
            nothing but the generators, returns the loss as it is, and is counted in ``skipped``; a hundred in a row
            are an error all the same.

        compile: ``"off"``; ``"inductor"``: from the second step on a step is one compiled graph, of ``Trace_ELBO`` or
            ``TraceMeanField_ELBO`` on reparameterised sites, its gradient, and the step of SGD, Adam or AdamW. It draws
            the same numbers and differs by rounding alone. ``"auto"``: once eager steps have taken as long as compiling
            would. ``"cudagraphs"``, on CUDA: recorded and played back, not compiled. What cannot be one graph stays
            eager, with a warning that names the line.
        precision: as in :func:`~bayesmeta.fit`: ``"float32"``, ``"bf16"`` or ``"tf32"``. ``"bf16"`` concerns the layers
            of networks in model and guide, where these are modules, in steps and in :meth:`evaluate_loss`.

    Attributes:
        steps, skipped: steps taken, and those of them that changed nothing.

    Raises:
        OptionError: for an optimizer that is no factory, and an unknown policy.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        loss: pyro.infer.ELBO,
        *,
        nan_policy: NanPolicy = "raise",
        compile: Compile = "off",
        precision: Precision = "float32",
    ) -> None:
        if isinstance(optim, torch.optim.Optimizer | pyro.optim.PyroOptim) or not callable(optim):
            raise OptionError(
                "optim must be a factory, such as lambda params: torch.optim.Adam(params, 1e-2): the guide's "
                "parameters exist only after its first run. Pyro's optimizers are not needed here."
            )
        if isinstance(loss, type) or not hasattr(loss, "loss_and_grads"):
            raise OptionError("loss must be a Pyro ELBO object, such as pyro.infer.Trace_ELBO() (with parentheses).")
        if nan_policy not in ("raise", "skip"):
            raise OptionError(f"Unknown nan_policy {nan_policy!r}; expected 'raise' or 'skip'.")
        self.model, self.guide, self._factory, self.elbo = model, guide, optim, loss
        self.nan_policy = nan_policy
        self.optimizer: torch.optim.Optimizer | None = None
        self._store: dict[str, Any] = {"params": {}, "constraints": {}}
        self._groups: list[list[Tensor]] = []
        self._tasks = GuideTasks(guide, model)
        check_mode(compile)
        check_precision(precision)
        self.precision = precision
        self._precision_fits = False
        self._compiler = None if compile == "off" else SVICompiler(self, compile)
        self.steps, self.skipped, self._skipped_in_a_row = 0, 0, 0
        #: what each step's ELBO was, by step, those that were not finite too
        self.losses: list[float] = []

    # -- training -----------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One gradient step; returns the loss. A :class:`TaskBatch` or Observations stands for ``(x, y, mask)``.

        Raises:
            NonFiniteLossError: before any parameter is changed.
            NonFiniteDataError: for NaN in a batch, naming where.
            DataError, UnsupportedError: for other tasks than those that an AutoGuide has parameters for.
        """
        with self._in_precision(args, kwargs):
            found = None if self._compiler is None else self._compiler.step(args, kwargs)
        if found is not None:
            self.steps, self._skipped_in_a_row = self.steps + 1, 0
            self.losses.append(found)
            return found
        args, kwargs, tasks = self._arguments(args, kwargs)
        store = pyro.get_param_store().scope(self._store)
        skip = self.nan_policy == "skip"
        modules = owners(self.model, self.guide).values() if skip else ()
        buffers = [{name: b.clone() for name, b in module.named_buffers()} for module in modules]
        within = self._in_precision(args, kwargs)
        with tasks, store, poutine.trace(param_only=True) as capture, _named_sites(), _quiet(skip), within:
            loss = self.elbo.loss_and_grads(self.model, self.guide, *args, **kwargs)
        parameters = self._parameters(capture.trace)
        self.steps += 1
        value = _number(loss)
        self.losses.append(value)
        sound = all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters)
        if sound and math.isfinite(value):
            self._optimize(parameters)
            self._skipped_in_a_row = 0
            return value
        for parameter in parameters:
            parameter.grad = None
        for module, before in zip(modules, buffers, strict=True):
            for name, buffer in module.named_buffers():
                buffer.copy_(before.get(name, buffer))
        message = f"The loss is {value} at step {self.steps}, with {'a finite' if sound else 'no finite'} gradient"
        self._skipped_in_a_row += 1
        if not skip or self._skipped_in_a_row >= MAX_SKIPPED:
            raise NonFiniteLossError(
                f"{message}{f', as at the {MAX_SKIPPED - 1} steps before' if skip else ''}; no parameter was changed. "
                "Try a lower learning rate, another start, or look at the scale of the data.",
                self.steps,
            )
        if self.skipped == 0:
            warnings.warn(f"{message}. The step is skipped, as later ones will be without a warning.", stacklevel=2)
        self.skipped += 1
        return value

    def run(self, num_steps: int, *args: Any, **kwargs: Any) -> list[float]:
        """Take steps on the same arguments; returns their losses. As NumPyro's ``SVI.run``.

        With ``compile`` several steps are one graph, which leaves nothing between them to Python: the numbers are those
        of as many calls of :meth:`step`, to rounding. Compiling it takes several times as long as compiling one step;
        a call for fewer than 5000 steps does not. ``compile="auto"`` decides by the number of steps.

        Raises:
            OptionError: for a number that is not positive.
            NonFiniteLossError: as :meth:`step`; the steps before it have been made.
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise OptionError(f"num_steps must be an int ≥ 1, got {num_steps!r}.")
        begin = len(self.losses)
        while (left := num_steps - len(self.losses) + begin) > 0:
            with self._in_precision(args, kwargs):
                losses = [] if self._compiler is None else self._compiler.run(left, args, kwargs)
            if losses:
                self.steps, self._skipped_in_a_row = self.steps + len(losses), 0
                self.losses += losses
            else:
                self.step(*args, **kwargs)
        return self.losses[begin:]

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss without a gradient step."""
        args, kwargs, tasks = self._arguments(args, kwargs)
        with self._in_precision(args, kwargs), tasks, torch.no_grad(), pyro.get_param_store().scope(self._store):
            return _number(self.elbo.loss(self.model, self.guide, *args, **kwargs))

    def _in_precision(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        if self.precision == "float32":
            return nullcontext()
        modules = list(owners(self.model, self.guide).values())
        if not self._precision_fits:
            given = next((a for a in (*args, *kwargs.values()) if hasattr(a, "device")), None)
            check_usable(self.precision, torch.device("cpu") if given is None else given.device, modules)
            self._precision_fits = True
        return in_precision(self.precision, *modules)

    def _arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], AbstractContextManager[None]]:
        """Arguments of model and guide, and what to run them in."""
        batch = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], TaskBatch | Observations) else None
        if batch is not None:
            batch.check()
            if hasattr(getattr(self.model, "__self__", None), "adapt"):
                return args, kwargs, nullcontext()  # method.model and method.guide read support and query themselves
            batch = batch.without_padding() if isinstance(batch, TaskBatch) else batch
            args, kwargs = self._tasks.unpack(batch.union() if isinstance(batch, TaskBatch) else batch)
        ids, population = (batch.task_id, batch.population) if isinstance(batch, TaskBatch) else (None, None)
        if not self._tasks.keeps(args, kwargs, ids, population):
            return args, kwargs, nullcontext()
        given = as_observations(args, kwargs)
        observations, context = self._tasks.enter(given, ids, self.elbo)
        return *((args, kwargs) if observations is given else self._tasks.unpack(observations)), context

    def _parameters(self, trace: Any) -> list[Tensor]:
        """Parameters of this step, each once, in the order of the trace."""
        found: dict[int, Tensor] = {}
        for site in trace.nodes.values():
            parameter = site["value"].unconstrained() if hasattr(site["value"], "unconstrained") else site["value"]
            found.setdefault(id(parameter), parameter)
        for owner in owners(self.model, self.guide).values():  # that no pyro.param statement announced
            for parameter in owner.parameters():
                if parameter.grad is not None:
                    found.setdefault(id(parameter), parameter)
        return list(found.values())

    def _optimize(self, parameters: list[Tensor]) -> None:
        known = {id(p) for group in self._groups for p in group}
        new = [p for p in parameters if id(p) not in known]
        if new:
            self._groups.append(new)
        if self.optimizer is None:
            self.optimizer = self._factory(new)
        elif new:
            self.optimizer.add_param_group({"params": new})
        self.optimizer.step()
        # as pyro.infer.SVI: parameters that a step does not touch keep no gradient
        for parameter in parameters:
            parameter.grad = None

    @property
    def compiled(self) -> str | None:
        """What became of ``compile=``, in words; None for ``"off"``."""
        return None if self._compiler is None else self._compiler.report

    # -- results ------------------------------------------------------------------------------------------------

    def param(self, name: str) -> Tensor:
        """The constrained value of a ``pyro.param`` statement.

        Raises:
            SiteError: for a name that no statement has used, listing those that were.
        """
        return self._trained().param(name)

    def state_dict(self) -> dict[str, Any]:
        """Parameters (unconstrained, by name), those of modules, optimizer state and the tasks of an AutoGuide.

        Plain values and tensors, loadable with ``weights_only=True``. The state of torch's generators is not among
        them: see :meth:`save`.
        """
        store, extra = self._tensors()
        return {
            "params": {name: value.detach().clone() for name, value in store.items()},
            "modules": {name: value.detach().clone() for name, value in extra.items()},
            "groups": names_of(self._groups, store, extra),
            "optimizer": None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
            "steps": self.steps,
            "skipped": [self.skipped, self._skipped_in_a_row],
            "tasks": self._tasks.state(),
            "losses": list(self.losses),
        }

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is trained or counted: in the store, and in modules alone."""
        modules = owners(self.model, self.guide)
        store = own_store(self._store["params"], modules)
        return store, module_tensors(store, modules)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load parameters and optimizer state into an object whose parameters exist (take or evaluate a step first).

        Raises:
            SiteError: when the parameters differ in name or shape.
            CheckpointError: when the state is of another optimizer.
        """
        store, extra = self._tensors()
        copy_into(store, state["params"], "parameters")
        if "groups" not in state and state["optimizer"] is not None:  # of 0.1.0, which did not say whose moments
            if self.optimizer is None:
                raise CheckpointError("The state is of version 0.1.0: take a step before you load it.")
            self.optimizer.load_state_dict(state["optimizer"])
        elif "groups" in state:
            copy_into(extra, state["modules"], "modules' parameters")
            self._groups = tensors_of(state["groups"], store, extra)
            saved = state["optimizer"]
            self.optimizer = None if saved is None else make_optimizer(self._factory, self._groups, saved)
        self.steps = state["steps"]
        self.skipped, self._skipped_in_a_row = state.get("skipped", [0, 0])
        self.losses = list(state.get("losses", []))
        self._tasks.load(state.get("tasks"))

    def save(self, path: str | Path) -> None:
        """Write a checkpoint: :meth:`state_dict` and the state of torch's global generators, from which Pyro draws.

        It is written whole or not at all, with a checksum.

        Raises:
            RunFolderError: when it cannot be written; what was there before is as it was.
        """
        checkpoint.save(Path(path), {"kind": "MetaSVI", "state": self.state_dict(), "generators": generators()})

    def load(self, path: str | Path, *args: Any, generators: bool = True, **kwargs: Any) -> None:
        """Read a checkpoint of :meth:`save` into an object made alike; the steps that follow are those of that run.

        Args:
            path: the file.
            *args: what a step is given, such as a batch: the parameters are made from it, not trained.
            generators: set torch's global generators too, without which the steps have other noise.
            **kwargs: as args.

        Raises:
            CheckpointError: when the file is missing, damaged, or of something else.
            SiteError: when the parameters differ in name or shape.
        """
        content = checkpoint.load(Path(path))
        if content.get("kind") != "MetaSVI":
            raise CheckpointError(f"{path} is no checkpoint of MetaSVI; a run of fit is loaded by load_method.")
        with torch.random.fork_rng():
            self.evaluate_loss(*args, **kwargs)
        self.load_state_dict(content["state"])
        if generators:
            set_generators(content["generators"])

    def posterior(
        self,
        observations: Observations | TaskBatch,
        num_samples: int = 1000,
        *,
        generator: Seed = None,
        whole: bool = False,
    ) -> SamplesPosterior:
        """Draws of the guide's sites given observations (of a batch: its support), as a posterior over φ.

        A guide with parameters for each task has a posterior given what it was trained on alone: of a batch its support
        where that was all, else support and query, so that its query is no test.

        The draws bring the guide's density along (``log_q``), so that :func:`~bayesmeta.loo` can correct for what the
        guide gets wrong; but not where a guide samples θ, which it may have learned from other tasks than these.

        Args:
            observations: what the guide sees; for a guide with parameters for each task, tasks that it knows.
            num_samples: draws.
            generator: generator or seed; None means seed 0.
            whole: these are all the data that θ was learned from. Then the draws have the guide's density of θ and φ
                together, and the prior of θ is p(θ). A guide with parameters for each task knows so by itself.

        Raises:
            SiteError: when the guide does not sample all latent sites of the model.
            DataError, ShapeError: for tasks that a guide with parameters for each task does not know.
            OptionError: for no draws.
            NonFiniteDataError: for NaN in the data or in a trained parameter.
        """
        return self._trained().posterior(observations, num_samples, generator, whole)

    def to_datatree(
        self,
        data: Observations | TaskBatch,
        *,
        num_samples: int = 1000,
        generator: Seed = None,
        raw_units: bool = True,
    ) -> DataTree:
        """The whole run for ArviZ: θ's sites and each task's φ in one ``posterior``, the losses in ``fit_stats``.

        See :func:`bayesmeta.to_datatree` for the groups. ``prior`` is the model's own, with θ from p(θ). The log
        importance weights in ``sample_stats`` are of θ and the φ of all tasks together, where the guide has a density.

        Args:
            data: all tasks of training, as :meth:`step` was given them: of a batch support and query together, where
                both have targets (else its query is what is predicted).
            num_samples: draws.
            generator: generator or seed; None means seed 0.
            raw_units: x, y and densities of y in raw units when the batch has a standardiser.

        Raises:
            UnsupportedError: before the first step.
            SiteError, DataError, ShapeError: as :meth:`posterior`.
            OptionError: for fewer than 2 draws.
        """
        return self._trained().to_datatree(data, num_samples, generator, raw_units, self.losses)

    def _trained(self) -> TrainedSVI:
        parameters = [p for group in self._groups for p in group]
        return TrainedSVI(self.model, self.guide, self._tasks, self._store, parameters, self.steps)


@contextmanager
def _quiet(skip: bool) -> Iterator[None]:
    """Without Pyro's own warning of a loss that is not finite, where such steps are skipped and counted."""
    if not skip:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
        yield


@contextmanager
def _named_sites() -> Iterator[None]:
    """Turn Pyro's complaint about a parameter that is named like a site into a typed error."""
    try:
        yield
    except RuntimeError as error:
        if "already in the trace" not in str(error):
            raise
        raise SiteError(
            f"A name is used twice: {error} Give every site, parameter and attribute of a PyroModule a name of its own "
            "(an attribute may not bear a site's name)."
        ) from error


def _number(loss: Any) -> float:
    return float(loss.item() if isinstance(loss, Tensor) else loss)
