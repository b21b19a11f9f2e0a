"""What every posterior over φ shares: draws of u in, named values, densities and predictions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import CheckpointError, DataError, NoClosedFormError, ShapeError
from bayesmeta.models.network import SITE, NetworkProgram
from bayesmeta.models.plates import task_plate
from bayesmeta.models.program import TaskProgram
from bayesmeta.models.targets import class_probabilities, target_kind
from bayesmeta.ops.files import read_tensors, write_tensors
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import TargetKind

_AUXILIARY = "_u"
#: Draws are taken through the program in slices of at most this many numbers of u, so that memory stays bounded.
MAX_ELEMENTS = 20_000_000
#: Sites of φ that a posterior's ``repr`` names.
_NAMED = 4


@dataclass(frozen=True, eq=False)
class Draws:
    """Joint draws.

    Attributes:
        u: unconstrained task parameters, ``[n, tasks, D]``.
        theta: unconstrained global sites, ``[n, E]``; None where there are none.
        log_q: log-density in unconstrained space of what they were drawn from, where only the drawing knows it: of
            each task's φ, ``[n, tasks]``, or of θ and the φ of all tasks together, ``[n]``; else None.
        stats: what a sampler says of each draw, by name, each ``[n]``; None where there is no sampler.
    """

    u: Tensor
    theta: Tensor | None = None
    log_q: Tensor | None = None
    stats: Mapping[str, Tensor] | None = None

    @property
    def num_samples(self) -> int:
        """Number of draws n."""
        return self.u.shape[0]

    def slices(self) -> list[Draws]:
        """The draws in slices of at most :data:`MAX_ELEMENTS` numbers."""
        size = max(MAX_ELEMENTS // max(self.u[0].numel(), 1), 1)
        if size >= self.num_samples:
            return [self]
        starts = range(0, self.num_samples, size)
        theta = self.theta
        return [Draws(self.u[i : i + size], None if theta is None else theta[i : i + size]) for i in starts]


class TaskPosterior:
    """Base of the posteriors over φ of a batch of tasks.

    A posterior is a Pyro guide: calling it (whatever the arguments) opens the task plate and samples each task
    parameter by its name, so that it can go into ``pyro.infer.Trace_ELBO``, ``Importance`` or ``Predictive`` beside
    ``method.model``.

    Args:
        program: the model; its θ at the time of use counts.
        support: what the posterior was conditioned on.
    """

    is_point = False
    #: how many different draws there are, of a posterior that is made of draws and has no density; else None
    num_draws: int | None = None
    #: whether θ's sites were inferred from this support, together with φ: their prior is then p(θ), not a learned q(θ)
    theta_is_inferred = False
    #: set by ``method.guide``, which has sampled the global sites that this posterior's draws of θ are
    paired = False

    def __init__(self, program: TaskProgram, support: Observations) -> None:
        self.program = program
        self.support = support

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return self.support.num_tasks

    def __repr__(self) -> str:
        counts = self.support.counts()
        least, most = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
        shots = str(most) if least == most else f"{least} to {most}"
        parts = [f"{self.num_tasks} task{'' if self.num_tasks == 1 else 's'} of {shots} shots"]
        if self.num_draws is not None:
            parts.append(f"{self.num_draws} draws")
        blocks = self.program.blocks if self.program.is_prepared else {}
        if blocks:
            sizes = [f"{name} [{block.stop - block.start}]" for name, block in blocks.items()]
            more = f", … ({len(sizes)} in all)" if len(sizes) > _NAMED else ""
            parts.append(f"φ: {', '.join(sizes[:_NAMED])}{more}")
        return f"<{type(self).__name__}: {'; '.join(parts)}>"

    # -- what a kind of posterior defines -----------------------------------------------------------------------

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Draw u (and θ's sites), ``[n, tasks, D]``."""
        raise NotImplementedError

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u) in unconstrained space, ``[…, tasks]``, for u ``[…, tasks, D]``."""
        raise NotImplementedError

    def u_distribution(self) -> Any:
        """Distribution of u as a Pyro distribution of event shape ``[D]`` and batch shape ``[tasks, 1]``."""
        raise NotImplementedError

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """Predictive distribution of y in closed form.

        Args:
            x: inputs ``[tasks, shots, features]``.
            joint: one distribution over all shots of a task (event shape ``[shots]``) rather than the marginals.

        Raises:
            NoClosedFormError: where there is none; :meth:`predict` draws from it.
        """
        raise NoClosedFormError(
            f"{type(self).__name__} has no closed-form predictive for this model; use predict(x, num_samples)."
        )

    def state(self) -> dict[str, Tensor]:
        """The tensors that define it, for :meth:`save`."""
        raise NotImplementedError

    # -- what follows from draws --------------------------------------------------------------------------------

    def sample(self, num_samples: int, generator: Seed = None) -> dict[str, Tensor]:
        """Draw the task parameters by name in their own space, each ``[n, tasks, …]``."""
        return self.named(self.draws(num_samples, generator))

    def named(self, draws: Draws) -> dict[str, Tensor]:
        """Named task parameters of draws, each ``[n, tasks, …]``."""
        with torch.no_grad():
            return self.program.named(draws.u, self.support, draws.theta)

    def named_theta(self, draws: Draws) -> dict[str, Tensor]:
        """Named global sites of draws, each ``[n, …]``; empty where there are none."""
        if draws.theta is None:
            return {}
        with torch.no_grad():
            return self.program.named_theta(draws.theta, self.support)

    def prior_draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Draw from the prior p(φ | θ, w) of the same tasks.

        Global sites are drawn from q(θ), the meta-learned one; from p(θ) where they were inferred from this support.
        """
        generator = as_generator(generator, self.support.device, "prior")
        theta = None if self.theta_is_inferred else self._theta_draws(num_samples, generator)
        u, theta = self.program.sample_prior(num_samples, self.support, generator, theta)
        return Draws(u, theta)

    def _theta_draws(self, num_samples: int, generator: torch.Generator) -> Tensor | None:
        return self.draws(num_samples, generator).theta

    def log_prior(self, draws: Draws, *, jacobian: bool = True) -> Tensor:
        """log p(φ | θ), ``[n, tasks]``: a density of unconstrained φ, or without the Jacobian of φ by its sites."""
        with torch.no_grad():
            values = [self.program.log_prior(d.u, self.support, d.theta).expand(d.u.shape[:-1]) for d in draws.slices()]
            if not jacobian:
                parts = [self.program.log_jacobian(d.u, self.support, d.theta) for d in draws.slices()]
                values = [value - part for value, part in zip(values, parts, strict=True)]
        return torch.cat(values)

    def log_theta(self, draws: Draws, *, jacobian: bool = True) -> Tensor:
        """log p(θ) of the global sites, ``[n]``; 0 where there are none. ``jacobian`` as in :meth:`log_prior`."""
        if draws.theta is None:
            return draws.u.new_zeros(draws.num_samples)
        with torch.no_grad():
            value = self.program.log_theta(draws.theta, self.support, jacobian=jacobian)
        return value.expand(draws.num_samples)

    def log_likelihood(
        self,
        observations: Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """log p(y | x, φ) of each observation under draws of φ, ``[n, tasks, shots]``; 0 where masked."""
        self._same_tasks(observations)
        draws = self.draws(num_samples, generator) if draws is None else draws
        self.program.check_targets(observations, None if draws.theta is None else draws.theta[0])
        with torch.no_grad():
            return torch.cat([self.program.log_likelihood(d.u, observations, d.theta) for d in draws.slices()])

    def log_joint(self, draws: Draws) -> Tensor:
        """log p(support, φ | θ) in unconstrained space, ``[n, tasks]``."""
        with torch.no_grad():
            return torch.cat([self.program.log_joint(d.u, self.support, d.theta) for d in draws.slices()])

    def predict(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Draw from the posterior predictive.

        Args:
            x: inputs ``[tasks, shots, features]``, or observations whose y is ignored.
            num_samples: number of draws n, ignored when ``draws`` is given.
            draws: draws of φ to use.
            generator: generator or seed; None means seed 0.

        Returns:
            ``[n, tasks, shots]``, or ``[n, tasks, shots, outputs]``.
        """
        observations = self._as_observations(x)
        generator = as_generator(generator, observations.device, "predictions")
        draws = self.draws(num_samples, generator) if draws is None else draws
        parts = []
        for part in draws.slices():
            y = self.program.predict(part.u, observations, generator, part.theta)
            parts.append(y.expand(part.num_samples, observations.num_tasks, *y.shape[2:]))
        return torch.cat(parts)

    @cached_property
    def target_kind(self) -> TargetKind:
        """What the likelihood says y is: ``"real"``, ``"count"`` or ``"class"`` (Categorical, Bernoulli)."""
        draws = self.draws(1)
        with torch.no_grad():
            return target_kind(self.program.predictive(draws.u, self.support, draws.theta))

    def class_probabilities(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Probability of each class, p(y = k | x, S): the mean over draws of φ of the likelihood's probabilities.

        Args:
            x: inputs ``[tasks, shots, features]``, or observations whose y is ignored.
            num_samples: number of draws, ignored when ``draws`` is given.
            draws: draws of φ to use.
            generator: generator or seed; None means seed 0.

        Returns:
            ``[tasks, shots, classes]``, or ``[tasks, shots, outputs, classes]``; a Bernoulli has the classes 0 and 1.

        Raises:
            UnsupportedError: for a likelihood that is neither Categorical nor Bernoulli.
        """
        observations = self._as_observations(x)
        draws = self.draws(num_samples, generator) if draws is None else draws
        total = torch.zeros((), device=observations.device)
        for part in draws.slices():
            with torch.no_grad():
                fn = self.program.predictive(part.u, observations, part.theta)
                each = class_probabilities(fn)
            lead = torch.broadcast_shapes(
                fn.batch_shape, (part.num_samples, observations.num_tasks, observations.shots)
            )
            total = total + each.expand(*lead, *each.shape[len(fn.batch_shape) :]).sum(0)
        return total / draws.num_samples

    def _as_observations(self, x: Tensor | Observations) -> Observations:
        observations = x.with_y(None) if isinstance(x, Observations) else Observations(x, w=self.support.w)
        self._same_tasks(observations)
        return observations

    def _same_tasks(self, observations: Observations) -> None:
        if observations.num_tasks != self.num_tasks:
            raise ShapeError(
                f"x has {observations.num_tasks} tasks; this posterior was adapted to {self.num_tasks}. "
                "Give the same tasks in the same order."
            )
        self.program.check(observations)

    def _to_add(self, observations: Observations) -> Tensor:
        """The targets of observations that an ``update`` is to add, which are checked."""
        if observations.y is None:
            raise DataError("update needs the targets of the observations; these have y=None.")
        self._same_tasks(observations.check())
        return observations.y

    # -- as a Pyro guide ----------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the task parameters as a Pyro guide; arguments are accepted and ignored."""
        plate = task_plate(self.support.x)
        if isinstance(self.program, NetworkProgram):  # one real site: no Jacobian, and a closed-form KL
            with plate:
                return {SITE: pyro.sample(SITE, self.u_distribution())}
        with plate:
            u = pyro.sample(_AUXILIARY, self.u_distribution(), infer={"is_auxiliary": True})
        # outside the plate: the program opens one of its own
        result = self.program.evaluate(u.squeeze(-2), self.support.with_y(None), self._current_theta())
        sites = {}
        with plate:
            for site in self.program.layout.local:
                log_density, event_dim = -result.log_dets[site.name], len(site.shape)
                delta = dist.Delta(result.values[site.name], log_density=log_density, event_dim=event_dim)
                sites[site.name] = pyro.sample(site.name, delta)
        return sites

    def _current_theta(self) -> Tensor | None:
        return None

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the posterior's tensors (not the program's θ); :func:`load_posterior` reads them."""
        support = {k: v for k, v in vars(self.support).items() if v is not None}
        write_tensors(Path(path), {"kind": type(self).__name__, "state": self.state(), "support": support})


def load_posterior(path: str | Path, program: TaskProgram) -> TaskPosterior:
    """Read a posterior written by :meth:`TaskPosterior.save`; nothing in the file is executed.

    Args:
        path: the file.
        program: the program with the θ under which the posterior was made.

    Raises:
        CheckpointError: for a file that is missing, damaged or of an unknown kind.
    """
    from bayesmeta.posteriors import kinds  # every kind derives from this module

    content = read_tensors(Path(path))
    try:
        kind, state, support = content["kind"], content["state"], Observations(**content["support"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold a posterior: {type(error).__name__}: {error}") from error
    if kind not in kinds.KINDS:
        raise CheckpointError(f"{path} holds a posterior of kind {kind!r}; expected one of {', '.join(kinds.KINDS)}.")
    program.prepare(support)
    return kinds.KINDS[kind](program, support, **state)
