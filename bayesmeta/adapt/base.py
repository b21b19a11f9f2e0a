"""What every method shares: a program, the guide of its global sites, checks, and its two Pyro callables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from bayesmeta.adapt.meta_regularization import EmbeddingNoise, MetaRegularization
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, DeviceMismatchError, ModelError, OptionError, UnsupportedError
from bayesmeta.models.embedding import EmbeddedModel
from bayesmeta.models.hyper_prior import refuse_held
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.priors import Point
from bayesmeta.models.program import TaskProgram, as_program
from bayesmeta.models.theta import GlobalGuide, GlobalKind, check_global_kind, kind_name
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.posteriors.base import TaskPosterior


@dataclass(frozen=True)
class MethodCard:
    """What a person wants to know before choosing a method, in a few words each.

    Attributes:
        assumes: what it asks of the model.
        posterior: its q(φ | S).
        cost: of adaptation and of a training step, in gradients of the support's likelihood.
        source: authors and year.
    """

    assumes: str
    posterior: str
    cost: str
    source: str


class Method(nn.Module):
    """Base of the methods: ``adapt`` for a posterior, ``loss`` for training, ``model`` and ``guide`` for Pyro.

    Args:
        model: a :class:`~bayesmeta.TaskProgram`, or a Pyro program, which is wrapped as one.
        global_guide: posterior over the program's global sites: ``"point"``, ``"normal"``, ``"low_rank"``, or a class
            of ``pyro.infer.autoguide`` that derives from ``AutoContinuous``.
    """

    #: shown by ``bayesmeta methods``
    card: ClassVar[MethodCard]

    def __init__(self, model: Any, *, global_guide: GlobalKind = "point") -> None:
        super().__init__()
        check_global_kind(global_guide)
        if isinstance(model, Method):
            raise ModelError(
                f"{type(self).__name__} takes a model, and {type(model).__name__} is a method: give its model, "
                "method.program."
            )
        self.program = as_program(model)
        refuse_held(self.program)
        self.global_guide: GlobalKind = global_guide
        self.global_kind = kind_name(global_guide)
        self.theta_guide: GlobalGuide | None = None
        self.embedding_noise: EmbeddingNoise | None = None
        self._created = False

    # -- what a method defines ----------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Options as plain values, written into checkpoints and compared on resume."""
        return {}

    def extra_repr(self) -> str:
        """The options, shown when the method is printed."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def _create(self, observations: Observations) -> None:
        """Create the method's own parameters, once the program knows its sites."""

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> TaskPosterior:
        """The posterior, differentiable in θ if ``create_graph``; ``theta`` is ``[G, E]`` or None."""
        raise NotImplementedError

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        """Loss of each task in nats, ``[tasks]``; ``theta`` is ``[1, E]`` or None."""
        raise NotImplementedError

    @property
    def _scores_support(self) -> bool:
        """Whether the loss scores the support's targets beside the query's."""
        return False

    @property
    def _is_point_network(self) -> bool:
        """Whether the program is a network whose prior is a start without a density."""
        model = self.program.model if isinstance(self.program, EmbeddedModel) else self.program
        return isinstance(model, NetworkProgram) and isinstance(model.prior, Point)

    def _need_density(self) -> None:
        """Refuse a prior without one."""
        if self._is_point_network:
            raise UnsupportedError(
                f"{type(self).__name__} needs a prior with a density; this model has Point, a start without one. Use "
                "prior='normal'."
            )

    # -- state --------------------------------------------------------------------------------------------------

    def prepare(self, batch: TaskBatch | Observations) -> None:
        """Read the program's sites at the first data and create the parameters that depend on them.

        Raises:
            ModelError and its kinds, DataError and its kinds: when program and data do not fit.
        """
        if self._created:
            return
        observations = _real(batch).union() if isinstance(batch, TaskBatch) else batch
        self._check_device(observations)
        self.program.prepare(observations)
        if self.program.has_theta_sites:
            self.theta_guide = GlobalGuide(self.program, self.global_guide, observations)
        theta = None if self.theta_guide is None else self.theta_guide.centre()
        self.program.check_targets(observations, theta)
        self._create(observations)
        self._created = True

    def draw_program(self, generator: torch.Generator) -> TaskProgram:
        """The program at one draw of what was learned of its parameters; global sites are ``theta_guide``'s.

        The program itself, but for a method that has a distribution over its parameters, as PACOH.

        Args:
            generator: of the draw.
        """
        return self.program

    def _check_device(self, observations: Observations) -> None:
        for name in ("y", "w"):
            value = getattr(observations, name)
            if value is None or not (value.is_floating_point() and observations.x.is_floating_point()):
                continue
            if value.dtype != observations.x.dtype:
                raise DeviceMismatchError(
                    f"x has dtype {observations.x.dtype} but {name} {value.dtype}; cast one: observations.to(dtype=…)."
                )
        parameter = next(self.parameters(), None)
        if parameter is None:
            return
        if parameter.device != observations.device:
            raise DeviceMismatchError(
                f"The method is on {parameter.device} but the data are on {observations.device}; move one with .to()."
            )
        if observations.x.is_floating_point() and parameter.dtype != observations.x.dtype:
            raise DeviceMismatchError(
                f"The method has dtype {parameter.dtype} but the data {observations.x.dtype}; cast one with "
                ".to(dtype=…)."
            )

    # -- adapt --------------------------------------------------------------------------------------------------

    def adapt(self, support: Observations, *, generator: Seed = None, num_theta: int = 20) -> Any:
        """Infer φ from the support of each task.

        Args:
            support: what adaptation may see, ``[tasks, shots, …]``.
            generator: generator or seed; None means seed 0.
            num_theta: draws of the global sites that the posterior integrates over, where they have a Gaussian guide.

        Returns:
            A posterior over φ, without a graph.

        Raises:
            NonFiniteDataError, ShapeError, DeviceMismatchError, DataError: for a support that cannot be used.
        """
        if isinstance(support, TaskBatch):
            raise OptionError("adapt sees the support alone; give batch.support, not the batch.")
        if not isinstance(support, Observations):
            raise OptionError(
                f"adapt takes Observations; got {type(support).__name__}. Put tensors of tasks together with "
                "bm.Observations(x, y), x [tasks, shots, features] and y [tasks, shots], or with bm.collate([x], [y])."
            )
        if support.y is None:
            raise DataError("adapt needs the targets of the support; these observations have y=None.")
        support.check()
        self.prepare(support)
        self._check_device(support)
        self.program.check(support)
        generator = as_generator(generator, support.device, "adapt")
        with torch.enable_grad():
            theta = None
            if self.theta_guide is not None:
                theta = self.theta_guide.draw(1 if self.theta_guide.is_point else num_theta, generator).detach()
            self.program.check_targets(support, None if theta is None else theta[0])
            return self._adapt(support, theta, generator, create_graph=False)

    # -- loss ---------------------------------------------------------------------------------------------------

    def loss(self, batch: TaskBatch, *, generator: Seed = None) -> Tensor:
        """Meta-training loss: mean over the real tasks of the batch, in nats a task.

        A hyperprior on global sites is added once for all N tasks of the population, that is divided by N; without a
        known N there is none.

        Args:
            batch: support and query of the tasks.
            generator: generator or seed; None means seed 0, so that every call has the same noise. A training loop of
                your own must pass a generator that moves on, as :func:`~bayesmeta.fit` does: under one seed θ fits
                that one draw of the noise, the loss falls, and nothing says that it is not the expected one.

        Returns:
            A scalar; with a graph where gradients are on.

        Raises:
            OptionError: for anything but a TaskBatch.
            ShapeError, DeviceMismatchError, DataError: for a batch that does not fit program and method.
        """
        if not isinstance(batch, TaskBatch):
            raise OptionError(f"loss takes a TaskBatch of support and query; got {type(batch).__name__}.")
        self.prepare(batch)
        for part in (batch.support, batch.query):
            self._check_device(part)
            self.program.check(part)
        generator = as_generator(generator, batch.support.device, "loss")
        wants_graph = torch.is_grad_enabled()
        with torch.enable_grad():  # inner steps need gradients, also where the caller wants none
            theta = None if self.theta_guide is None else self.theta_guide.draw(1, generator)
            with self._embedded(batch, generator) as (seen, penalty):
                losses = self._task_loss(seen, theta, generator)
            loss = batch.mean(losses if penalty is None else losses + penalty)
            if self.theta_guide is not None and theta is not None and batch.population is not None:
                penalty = self.theta_guide.penalty(self.program, theta, batch.support).mean()
                loss = loss + penalty / batch.population
        return loss if wants_graph else loss.detach()

    # -- an embedding of the inputs -----------------------------------------------------------------------------

    def _regularize(self, options: MetaRegularization | None) -> None:
        """Give the model's embedding noise in training; a method that takes the option calls this once."""
        self.embedding_noise = None if options is None else EmbeddingNoise(options, self.program)

    def _regularization_config(self) -> dict[str, Any]:
        noise = self.embedding_noise
        return {} if noise is None else {"meta_regularization": noise.options.config()}

    @contextmanager
    def _embedded(self, batch: TaskBatch, generator: torch.Generator) -> Iterator[tuple[TaskBatch, Tensor | None]]:
        """The batch as the model sees it, for one training step, and the penalty of each task if there is one."""
        program = self.program
        if not isinstance(program, EmbeddedModel):
            yield batch, None
            return
        penalty = None
        if self.embedding_noise is not None and self.training:
            batch, penalty = self.embedding_noise(program, batch, generator, self._scores_support)
        else:
            batch = program.embed_batch(batch)
        with program.embedded():
            yield batch, penalty

    # -- model and guide ----------------------------------------------------------------------------------------

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The Pyro model of support ∪ query: takes a :class:`TaskBatch`, Observations, or ``(x, y, mask)``."""
        observations = _everything(args, kwargs)
        self.prepare(observations)
        w = {} if observations.w is None else {"w": observations.w}
        result = self.program(observations.x, observations.y, observations.mask, **w)
        self._announce_parameters()  # last: a PyroModule takes from its parameters, when it ends, what SVI looks for
        return result

    def guide(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The Pyro guide: adapts to the support (of a :class:`TaskBatch`; else to all that is given) and samples φ.

        Differentiable in θ, with fresh noise from torch's global generator, as Pyro's own guides.
        """
        batch = args and isinstance(args[0], TaskBatch)
        support = args[0].without_padding().support if batch else _everything(args, kwargs)
        self.prepare(support)
        generator = torch.Generator(device=support.device)
        generator.manual_seed(int(torch.randint(2**62, ()).item()))
        theta = None if self.theta_guide is None else self._sample_theta(support)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            posterior = self._adapt(support, theta, generator, create_graph=create_graph)
        posterior.paired = True
        self._announce_parameters()
        return posterior()

    def _announce_parameters(self) -> None:
        """Give θ to whoever gathers parameters, as ``pyro.infer.SVI`` does: it trains what it meets as Pyro params.

        Nothing else writes to Pyro's parameter store. A name holds the parameter's identity, since under a name that
        the store knows it would hand out its own tensor, another method's.
        """
        if not any(getattr(handler, "param_only", False) for handler in _PYRO_STACK):
            return
        if self.embedding_noise is not None:
            raise UnsupportedError(
                "pyro.infer.SVI would train without the noise and penalty of meta_regularization, which are part of "
                "loss. Train with bm.fit, or leave the option out."
            )
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                pyro.param(f"{type(self).__name__}.{id(parameter)}.{name}", parameter)

    def _sample_theta(self, observations: Observations) -> Tensor:
        """Sample the global sites as Pyro sites; returns them unconstrained, ``[G, E]``, one for each ELBO particle."""
        guide, program = self.theta_guide, self.program
        assert guide is not None
        if guide.is_point:
            flat = guide.loc
        else:
            flat = pyro.sample("_theta", guide.distribution(), infer={"is_auxiliary": True})
        theta = flat.reshape(-1, flat.shape[-1])
        vectorised = flat.dim() > 1
        u = theta.new_zeros(len(theta), observations.num_tasks, program.layout.dim)
        handed = (u, theta) if vectorised else (u[0], theta[0])
        result = program.evaluate(handed[0], observations.with_y(None), handed[1])
        for site in program.layout.theta:
            value, log_det = result.values[site.name], result.log_dets[site.name]
            event_dim = len(site.shape) - site.batch_dims
            batch = value.shape[: value.dim() - event_dim]
            log_density = torch.zeros_like(log_det) if guide.is_point else -log_det
            # the site's whole density, shared out over the plates that it has of its own
            share = site.shape[: site.batch_dims].numel()
            log_density = (
                (log_density / share).reshape(log_det.shape + (1,) * (len(batch) - log_det.dim())).expand(batch)
            )
            with ExitStack() as plates:
                for name, size, dim in site.plates:
                    plates.enter_context(pyro.plate(name, size, dim=dim))
                pyro.sample(site.name, dist.Delta(value, log_density=log_density, event_dim=event_dim))
        return theta


def _real(batch: TaskBatch) -> TaskBatch:
    """Without padding, which is no data to start from; as it is where nothing else is there."""
    real = batch.real_tasks()
    return batch if real is None or not bool(real.any()) else batch.without_padding()


def per_observation(observations: Observations) -> Tensor:
    """1 over the number of real observations of each task, ``[tasks]``; 0 where there are none.

    The factor of an inner step on a sum over observations: the step is then on their mean, and a task without
    observations stays where it is.
    """
    return observations.full_mask().any(-1) / observations.counts().clamp(min=1.0)


def _everything(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observations:
    """Support ∪ query of a batch, or the observations given in one of the other forms."""
    if args and isinstance(args[0], TaskBatch):
        return args[0].without_padding().union()
    if args and isinstance(args[0], Observations):
        return args[0]
    return Observations(*args, **kwargs)
