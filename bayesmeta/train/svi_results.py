"""What is read from a trained :class:`~bayesmeta.MetaSVI`: parameters, a posterior over φ, a tree for ArviZ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import NonFiniteDataError, OptionError, ShapeError, SiteError, UnsupportedError
from bayesmeta.models.handlers import bijection
from bayesmeta.models.program import TaskProgram, as_program
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from bayesmeta.posteriors.samples import SamplesPosterior
from bayesmeta.train.guide_density import log_density
from bayesmeta.train.known_tasks import GuideTasks

if TYPE_CHECKING:
    from xarray import DataTree


@dataclass
class TrainedSVI:
    """Model and guide as they stand after some steps.

    Attributes:
        model, guide: of the run.
        tasks: those that the guide has parameters for.
        store: the run's parameter store.
        parameters: that were trained, unconstrained.
        steps: taken.
    """

    model: Any
    guide: Any
    tasks: GuideTasks
    store: dict[str, Any]
    parameters: Sequence[Tensor]
    steps: int

    def param(self, name: str) -> Tensor:
        """See :meth:`bayesmeta.MetaSVI.param`."""
        if name not in self.store["params"]:
            known = ", ".join(self.store["params"]) or "none yet: take a step first"
            raise SiteError(f"There is no parameter {name!r}; there are: {known}.")
        constraint = self.store["constraints"][name]
        return torch.distributions.transform_to(constraint)(self.store["params"][name]).detach()

    def program(self) -> TaskProgram:
        """The model as a task program."""
        owner = getattr(self.model, "__self__", None)
        return owner.program if owner is not None and hasattr(owner, "program") else as_program(self.model)

    def posterior(
        self, observations: Observations | TaskBatch, num_samples: int, generator: Seed, whole: bool
    ) -> SamplesPosterior:
        """See :meth:`bayesmeta.MetaSVI.posterior`."""
        if num_samples < 1:
            raise OptionError(f"num_samples={num_samples}; expected at least 1 draw.")
        wrong = [list(p.shape) for p in self.parameters if not bool(torch.isfinite(p).all())]
        if wrong:
            raise NonFiniteDataError(
                f"{len(wrong)} of {len(self.parameters)} trained parameters hold NaN or infinity (the first has shape "
                f"{wrong[0]}), so there is no posterior. Train again from a sound state, with a lower learning rate."
            )
        observations, rows = self.tasks.find(observations)
        observations.check()
        args, kwargs = self.tasks.unpack(observations)
        program = self.program()
        program.prepare(observations)
        program.scope.copy_from(self.store["params"])
        generator = as_generator(generator, observations.device, "posterior")
        whole, some = whole or rows is not None, self.tasks.runs_some(rows)
        u, theta, log_q = [], [], []
        within = self.tasks.within(observations, rows)
        with torch.no_grad(), forked_rng(generator), pyro.get_param_store().scope(self.store), within:
            for _ in range(num_samples):
                guide_trace, trace, density = self._traces(args, kwargs, rows)
                flat, jacobian = _flat(program, guide_trace, trace, program.layout.local, observations.num_tasks)
                u.append(flat)
                if program.has_theta_sites:
                    flat, more = _flat(program, guide_trace, trace, program.layout.theta, None)
                    theta.append(flat)
                    # of θ and φ together, or none: where θ was learned from other tasks too, these cannot weigh it
                    density = density.sum() if density is not None and whole and not some else None
                    jacobian = jacobian.sum() + more
                if density is not None:
                    log_q.append(density + (jacobian if density.dim() else jacobian.sum()))
        posterior = SamplesPosterior(
            program,
            observations,
            torch.stack(u),
            torch.stack(theta) if theta else None,
            torch.stack(log_q) if log_q else None,
        )
        posterior.theta_is_inferred = whole and program.has_theta_sites
        return posterior

    def _traces(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor | None
    ) -> tuple[Any, Any, Tensor | None]:
        """Of the guide and of the model replayed, and the guide's log-density in the sites' own space."""
        try:
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            density = log_density(guide_trace, None if self.tasks.runs_some(rows) else rows)
            self.tasks.take(guide_trace, rows)
            replayed = poutine.replay(self.model, trace=guide_trace)
            return guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs), density
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or ["no detail"])[0].rstrip(". ")
            raise ShapeError(
                f"Guide and model failed on these observations: {type(error).__name__}: {reason}. A guide that keeps "
                "parameters for each task knows only the tasks that it was trained on; write an amortised guide, or "
                "use a method such as ABML, for new tasks."
            ) from error

    def to_datatree(
        self,
        data: Observations | TaskBatch,
        num_samples: int,
        generator: Seed,
        raw_units: bool,
        losses: Sequence[float],
    ) -> DataTree:
        """See :meth:`bayesmeta.MetaSVI.to_datatree`."""
        from bayesmeta.diagnostics.datatree import to_datatree

        if not self.steps:
            raise UnsupportedError("MetaSVI has taken no step, so there is nothing to show yet: call step(data) first.")
        owner = getattr(self.model, "__self__", None)
        batch = _conditioned(data, join=not hasattr(owner, "adapt"))
        posterior = self.posterior(batch, num_samples, generator, True)
        if posterior.support is not batch.support:  # the guide knows them as support and query
            batch = _conditioned(batch, join=True)
        return to_datatree(
            posterior, batch, num_samples=num_samples, generator=generator, raw_units=raw_units, losses=losses
        )


def _flat(program: TaskProgram, guide_trace: Any, trace: Any, sites: Any, tasks: int | None) -> tuple[Tensor, Tensor]:
    """Unconstrained sites side by side, ``[tasks, D]`` or ``[E]``; log Jacobian, ``[tasks]`` or ``[]``."""
    parts: list[Tensor] = []
    jacobian = torch.zeros(())
    for site in sites:
        if site.name not in guide_trace.nodes:
            raise SiteError(
                f"The guide does not sample the site {site.name!r}. Add pyro.sample({site.name!r}, …) to it, in "
                "the plate where the model has it."
            )
        node = trace.nodes[site.name]
        transform = bijection(site.name, node["fn"])
        raw = transform.inv(node["value"])
        parts.append(raw.reshape(-1) if tasks is None else raw.reshape(tasks, -1))
        log_det = transform.log_abs_det_jacobian(raw, node["value"])
        jacobian = jacobian.to(raw) + (log_det.sum() if tasks is None else log_det.reshape(tasks, -1).sum(-1))
    return torch.cat(parts, -1), jacobian


def _conditioned(data: Observations | TaskBatch, *, join: bool) -> TaskBatch:
    """What the guide's posterior is given as the support, and no query, but where the query has no targets."""
    if isinstance(data, Observations):
        return TaskBatch(data.check(), data.points(slice(0)))
    batch = data.check().without_padding()
    if join and batch.query.shots and batch.query.y is not None and batch.support.y is not None:
        return replace(batch, support=batch.union(), query=batch.support.points(slice(0)))
    return batch
