"""Tasks drawn from a model: what an amortised posterior can be trained on when there are few real tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch, union
from bayesmeta.errors import ModelError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.deep_kernel import DeepKernelModel
from bayesmeta.models.hyper_prior import refuse_held
from bayesmeta.models.program import TaskProgram, as_program
from bayesmeta.models.theta import GlobalGuide
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.posteriors.gp import GPPosterior
from bayesmeta.protocols import TaskDistribution


class SimulatedTasks:
    """Endless tasks drawn from a model: φ ~ p(φ | θ, w), then y ~ p(y | x, φ, θ) at the inputs of other tasks.

    For an encoder that is to give posteriors under a model which is already known or learned: real tasks may be too
    few to train it, and simulated ones never run out. Of the tasks that lend their inputs x, masks and covariates w
    are used; their targets are not (but a program that has seen no data yet reads their kind).

    Simulate from what a method has learned, and train its encoder alone: with θ trained too, a model would fit its own
    draws, and nothing would hold θ to the data::

        method.requires_grad_(False)
        method.recognition.requires_grad_(True)
        bm.fit(method, bm.SimulatedTasks(tasks, method), steps=5_000)

    Source: the prior predictive draws of J.-M. Lueckmann et al., "Flexible statistical inference for mechanistic models
    of neural dynamics", NeurIPS 2017, https://arxiv.org/abs/1711.01861, section 2 (there for one simulator; the
    hierarchy is ours).

    Args:
        inputs: a distribution of tasks whose inputs are taken.
        model: what is simulated from. A method: its program, with global sites from its q(θ), as both stand at each
            draw; of a :class:`~bayesmeta.PACOH` the program at a particle, at random. A :class:`~bayesmeta.TaskProgram`
            or Pyro program: with global sites from their prior. One draw of the global sites (one particle) for each
            batch, which is then a population of its own.
        theta: draws of the global sites to take in place of these, ``[n, E]``, unconstrained as a method sees them: one
            row, at random, for each batch.

    Raises:
        OptionError: for ``inputs`` that cannot be sampled.
        ModelError: for a model that is no program, or a method without one.
        UnsupportedError: for the program of a PACOH, which is not what it has learned: give the method.
        ShapeError: for ``theta`` of another shape than ``[n, E]`` (at the first draw, when E is known).
    """

    #: draws are endless
    num_tasks: int | None = None

    def __init__(self, inputs: TaskDistribution, model: Any, *, theta: Tensor | None = None) -> None:
        if not callable(getattr(inputs, "sample", None)):
            raise OptionError(
                f"inputs is a {type(inputs).__name__}; expected a distribution of tasks with "
                "sample(num_tasks, support=…, query=…, generator=…), such as bm.tasks.FixedTasks(batch)."
            )
        if theta is not None and (not isinstance(theta, Tensor) or theta.dim() != 2 or len(theta) == 0):
            given = f"shape {list(theta.shape)}" if isinstance(theta, Tensor) else type(theta).__name__
            raise ShapeError(f"theta holds draws of the global sites, a tensor [n, E] with n at least 1; got {given}.")
        self.inputs, self.theta = inputs, theta
        self._method: Any = None
        own = getattr(model, "program", None)
        if not isinstance(model, TaskProgram) and isinstance(own, TaskProgram):
            self._method, self.program = model, own
        else:
            self.program = as_program(model)
            refuse_held(self.program)

    def sample(self, num_tasks: int, *, support: int, query: int | None = None, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch on the generator's device.

        Support and query of a task share its φ, and all tasks of the batch share θ. Standardizers are kept, and so are
        masks; names, ids and padding tasks of ``inputs`` are not.

        Args:
            num_tasks: number of tasks.
            support, query: observations of each task, as ``inputs`` takes them.
            generator: generator or seed; None means seed 0.

        Raises:
            ModelError: for a method that has not seen data yet.
            DataError: for inputs without any targets, where the program has not seen data yet: it reads their kind.
            ShapeError: for inputs or ``theta`` of another width than the model's.
            SiteError: for a program with several observed sites.
            UnsupportedError: for a GP on labels.
            NonFiniteDataError: for a model that drew an infinite target.
        """
        generator = as_generator(generator, stream="tasks")
        # a table takes query=None for all that is left
        given = self.inputs.sample(num_tasks, support=support, query=cast(int, query), generator=generator)
        given = given.without_padding()
        if not self.program.is_prepared:
            self._prepare(given)
        draw_program = getattr(self._method, "draw_program", None)
        program = self.program if draw_program is None else draw_program(generator)
        y = self._draw(program, union(given.support.with_y(None), given.query.with_y(None)), generator)
        first, rest = y[:, : given.support.shots], y[:, given.support.shots :]
        return replace(
            given,
            support=given.support.with_y(first).check(),
            query=given.query.with_y(rest).check(),
            task_id=None,
            names=None,
            population=None,
        )

    def _prepare(self, batch: TaskBatch) -> None:
        """Let a program read its sites at its first data, of whose targets only the kind counts."""
        if self._method is not None:
            raise ModelError(
                f"{type(self._method).__name__} has not seen data yet, and its θ is not known: train it on real tasks "
                "first (bm.fit), or call method.prepare(batch)."
            )
        self.program.prepare(batch.union())

    def _draw(self, program: TaskProgram, observations: Observations, generator: torch.Generator) -> Tensor:
        """Targets of tasks without any, ``[tasks, shots, …]``."""
        program.check(observations)
        if isinstance(program, DeepKernelModel):  # its φ is a function: at all points at once
            if program.link is not None:
                raise UnsupportedError("A GP on labels regresses on ±1: it has no distribution of labels to draw.")
            nothing = replace(observations, x=observations.x[:, :0], y=observations.x[:, :0, 0], mask=None)
            return GPPosterior.condition(program, nothing).predict(observations, 1, generator=generator)[0].detach()
        theta = self._draw_theta(observations, generator)
        u, theta = program.sample_prior(1, observations, generator, theta=theta)
        return program.predict(u, observations, generator, theta=theta)[0].detach()

    def _draw_theta(self, observations: Observations, generator: torch.Generator) -> Tensor | None:
        """One θ, ``[1, E]``; None where the program has none, or is to draw it from its prior."""
        if self.theta is not None:
            width = self.program.layout.theta_dim
            if self.theta.shape[-1] != width:
                raise ShapeError(
                    f"theta has shape {list(self.theta.shape)}, but the global sites of this model have {width} "
                    "number(s) in unconstrained space; expected [n, E] with that E."
                )
            row = torch.randint(len(self.theta), (1,), generator=generator, device=generator.device)
            return self.theta.to(observations.x)[row]
        guide = None if self._method is None else self._method.theta_guide
        if guide is None:
            return None
        assert isinstance(guide, GlobalGuide)
        with torch.no_grad():
            return guide.draw(1, generator)
