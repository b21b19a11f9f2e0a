"""The core object: any Pyro program as a density over one flat unconstrained vector of task parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, ModelError, ShapeError, SiteError
from bayesmeta.models.handlers import DrawPrior, Layout, Pass, PriorMoments, Substitute
from bayesmeta.models.inspection import check_particles, probe_batch, read_layout
from bayesmeta.models.scope import ParamScope
from bayesmeta.ops.random import Seed, as_generator, forked_rng


class TaskProgram(nn.Module):
    """A Pyro program with a task plate, read as ``log_joint(u)`` over local latents in unconstrained space.

    The program has the signature ``(x, y=None, mask=None)``, and ``w=None`` too when it uses task-level covariates.
    Latent sites inside :func:`~bayesmeta.task_plate` are the task parameters φ; those outside it, and the program's
    parameters, are the meta-parameters θ. Observed sites stand inside both plates.

    Shapes used below: ``u`` is ``[…, tasks, D]`` with any leading dimensions (particles); ``theta``, needed when the
    program has global sites, is ``[…, E]`` and unconstrained too; densities come back as ``[…, tasks]`` or
    ``[…, tasks, shots]``. Densities of u include the Jacobian of the map to the sites' own supports.

    Args:
        program: a function or an ``nn.Module`` (``PyroModule`` included).

    Raises:
        ModelError: if it is not callable.
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        super().__init__()
        if isinstance(program, type):
            raise ModelError(f"The program is the class {program.__name__}; give an instance, {program.__name__}(…).")
        if not callable(program):
            raise ModelError(f"A program must be callable with (x, y=None, mask=None); got {type(program).__name__}.")
        if isinstance(program, nn.Module):
            self.program = program
        else:
            object.__setattr__(self, "program", program)
        function = program.forward if isinstance(program, nn.Module) else program
        signature = inspect.signature(function)
        parameters = signature.parameters
        name = getattr(program, "__name__", type(program).__name__)
        if "y" not in parameters and len(parameters) < 2:
            raise ModelError(
                f"A program has the signature (x, y=None, mask=None); {name} takes ({', '.join(parameters)}). A "
                "network goes into bayesmeta.NeuralTaskModel(network, likelihood)."
            )
        try:
            signature.bind(None, None, None)
        except TypeError as error:
            raise ModelError(
                f"A program has the signature (x, y=None, mask=None); {name}{signature} cannot be called with a mask "
                "as the third argument. Add mask=None, and open the shots' plate as bayesmeta.shot_plate(x, mask)."
            ) from error
        self._takes_w = "w" in parameters
        self._needs_w = False
        self.scope = ParamScope(program)
        self._layout: Layout | None = None

    # -- structure ----------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The sites, known after :meth:`prepare`."""
        if self._layout is None:
            raise ModelError("The program has not seen data yet; call prepare(observations) first.")
        return self._layout

    @property
    def is_prepared(self) -> bool:
        """Whether :meth:`prepare` has run."""
        return self._layout is not None

    @property
    def has_theta_sites(self) -> bool:
        """Whether the program has global latent sites."""
        return self.layout.theta_dim > 0

    @property
    def blocks(self) -> dict[str, slice]:
        """Where each local site lies in u; for a network, each task-specific tensor."""
        return {site.name: slice(site.start, site.stop) for site in self.layout.local}

    def prepare(self, observations: Observations) -> TaskProgram:
        """Read the program's sites at its first data, and check its plates. Calling it again checks the width only.

        Raises:
            PlateError, SiteError, LikelihoodError, ShapeError, ModelError: see :mod:`bayesmeta.errors`.
        """
        if self._layout is None:
            probe = probe_batch(observations)
            with forked_rng(as_generator(0, observations.device)), torch.no_grad(), poutine.block():
                # twice: a lazy PyroModule or pyro.param is created by the first run
                with self.scope.open(discover=True):
                    layout = read_layout(self._run, probe)
                with self.scope.open():
                    check_particles(self._run, layout, probe)
            self._layout = layout
            self._needs_w = self._takes_w and observations.w is not None
        self.check(observations)
        return self

    def check(self, observations: Observations) -> None:
        """Check the feature width.

        Raises:
            ShapeError: for another width than that of the first data.
        """
        if observations.num_features != self.layout.num_features:
            raise ShapeError(
                f"x has {observations.num_features} features; this model was first used with "
                f"{self.layout.num_features}."
            )

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None, w: Tensor | None = None) -> Any:
        """Run as a Pyro program. Its parameters stay in this module, not in Pyro's global store."""
        with self.scope.open(discover=not self.is_prepared):
            return self._run(Observations(x, y, mask, w))

    def _run(self, observations: Observations) -> Any:
        if self._needs_w and observations.w is None:
            raise DataError("This program uses task-level covariates; the observations have w=None. Give w to both.")
        extra = {"w": observations.w} if self._takes_w else {}
        return self.program(observations.x, observations.y, observations.mask, **extra)

    def _pass(self, handler: Substitute, observations: Observations) -> Pass:
        handler.device = observations.device
        if observations.shots == 0:  # a Pyro plate cannot be empty: one masked shot, which callers drop again
            observations = _one_masked_shot(observations)
        # Validation reads values back from the device and stops graph capture; the first run was validated.
        with pyro.validation_enabled(False), handler, self.scope.open():
            self._run(observations)
        return handler.result

    def check_targets(self, observations: Observations, theta: Tensor | None = None) -> None:
        """Check that the likelihood admits the targets. A support whose bounds are tensors may depend on φ: no check.

        Raises:
            DataError: naming the first task and shot whose target is outside the support.
        """
        if observations.y is None or observations.shots == 0:
            return
        handler = PriorMoments(self.layout, theta)
        with torch.no_grad():
            observed = self._pass(handler, observations).observed
        for fn, value in observed.values():
            refuse_outside(fn.support, value, observations.full_mask())

    def embed(self, observations: Observations) -> Observations:
        """The observations as the model sees them: as they are, but for an :class:`~bayesmeta.EmbeddedModel`."""
        return observations

    # -- densities ----------------------------------------------------------------------------------------------

    def evaluate(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Pass:
        """All values and densities in one pass."""
        self._need_theta(theta)
        result = self._pass(Substitute(self.layout, u, theta), observations)
        if observations.shots == 0:
            result.log_likelihood = u.new_zeros(*u.shape[:-1], 0)
        return result

    def log_joint(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y, φ | x, θ) in unconstrained space, ``[…, tasks]``."""
        result = self.evaluate(u, observations, theta)
        return torch.as_tensor(result.log_likelihood).sum(-1) + result.log_prior

    def log_prior(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(φ | θ, w) in unconstrained space, ``[…, tasks]``."""
        return torch.as_tensor(self.evaluate(u, observations.with_y(None), theta).log_prior)

    def log_likelihood(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y | x, φ) of each observation, ``[…, tasks, shots]``; 0 where masked."""
        if observations.y is None:
            raise DataError("A log-likelihood needs targets; these observations have y=None.")
        lead = u.shape[:-1]
        value = torch.as_tensor(self.evaluate(u, observations, theta).log_likelihood)
        return value.expand(*torch.broadcast_shapes(lead, value.shape[:-1]), observations.shots)

    def log_likelihood_gradient(
        self, u: Tensor, observations: Observations, theta: Tensor | None = None, *, create_graph: bool = False
    ) -> Tensor:
        """∇_u of each task's own log-likelihood, ``[…, tasks, D]``, differentiable once more if ``create_graph``.

        ``u`` must require gradients.
        """
        # tasks are independent: one backward of the sum gives every task's own gradient
        total = self.log_likelihood(u, observations, theta).sum()
        (gradient,) = torch.autograd.grad(total, u, create_graph=create_graph)
        return gradient

    def log_theta(self, theta: Tensor, observations: Observations, *, jacobian: bool) -> Tensor:
        """log p(θ) of the global sites, ``[…]``; with the Jacobian of the unconstraining map if asked."""
        u = theta.new_zeros(*theta.shape[:-1], observations.num_tasks, self.layout.dim)
        result = self.evaluate(u, observations.with_y(None), theta)
        value = torch.as_tensor(result.log_theta)
        if jacobian:
            value = value + sum(result.log_dets[site.name] for site in self.layout.theta)
        return value

    def log_jacobian(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log |dφ / du| of the map from u to the local sites' own supports, ``[…, tasks]``."""
        parts = self.evaluate(u, observations.with_y(None), theta).log_dets
        value = u.new_zeros(u.shape[:-1])
        for site in self.layout.local:
            if site.name in parts:
                value = value + parts[site.name].squeeze(-1)
        return value

    # -- values -------------------------------------------------------------------------------------------------

    def named(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> dict[str, Tensor]:
        """Task parameters by name in their own space, each ``[…, tasks, *event]``.

        Functions of them that the program names in its task plate (``pyro.deterministic``, a non-centred site) follow.
        """
        values = self.evaluate(u, observations.with_y(None), theta).values
        lead, sites = u.shape[:-1], (*self.layout.local, *self.layout.deterministic)
        return {s.name: values[s.name].squeeze(-1 - len(s.shape)).expand(*lead, *s.shape) for s in sites}

    def named_theta(self, theta: Tensor, observations: Observations) -> dict[str, Tensor]:
        """Global sites by name in their own space, each ``[…, *shape]``."""
        u = theta.new_zeros(*theta.shape[:-1], observations.num_tasks, self.layout.dim)
        values = self.evaluate(u, observations.with_y(None), theta).values
        return {s.name: values[s.name].reshape(*theta.shape[:-1], *s.shape) for s in self.layout.theta}

    def sample_prior(
        self, num_samples: int, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw φ from p(φ | θ, w) and, when ``theta`` is None, θ's sites from p(θ).

        Returns:
            u ``[n, tasks, D]`` and theta ``[n, E]`` (None without global sites).
        """
        if theta is not None and theta.dim() == 1:
            theta = theta.expand(num_samples, -1)
        handler = DrawPrior(self.layout, theta, num_samples)
        with torch.no_grad(), forked_rng(as_generator(generator, observations.device, "program")):
            self._pass(handler, observations.with_y(None))
        u = torch.cat([p.expand(num_samples, observations.num_tasks, -1) for p in handler.local_parts], -1)
        if handler.theta_parts:
            theta = torch.cat(handler.theta_parts, -1)
        return u, theta

    def prior_moments(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of u under the prior, each ``[…, tasks, D]``, differentiable in θ.

        Exact for Normal, LogNormal and MultivariateNormal sites that do not depend on one another; otherwise taken
        along the path of the means, from draws under a fixed seed.
        """
        self._need_theta(theta)
        handler = PriorMoments(self.layout, theta)
        self._pass(handler, observations.with_y(None))
        lead = torch.broadcast_shapes(*(p.shape[:-1] for p in handler.locs))
        loc = torch.cat([p.expand(*lead, -1) for p in handler.locs], -1)
        scale = torch.cat([p.expand(*lead, -1) for p in handler.scales], -1)
        return loc, scale

    def learned_start(self, observations: Observations) -> Tensor | None:
        """Where point estimates start, ``[tasks, D]``, if θ holds it; None when a method must learn its own."""
        return None

    def start_parameters(self) -> list[nn.Parameter]:
        """The parameters of :meth:`learned_start`; empty when a method must learn its own."""
        return []

    def gaussian_prior(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of u, ``[…, tasks, D]``, if its prior given θ is a diagonal Gaussian, or None."""
        return None

    # -- predictions --------------------------------------------------------------------------------------------

    def predict(
        self, u: Tensor, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> Tensor:
        """Draw y given φ, ``[…, tasks, shots]`` or ``[…, tasks, shots, outputs]``.

        Raises:
            SiteError: for a program with several observed sites.
        """
        self._need_theta(theta)
        name = self._single_observed()
        handler = Substitute(self.layout, u, theta, sample_observed=True)
        with torch.no_grad(), forked_rng(as_generator(generator, observations.device, "program")):
            fn, y = self._pass(handler, observations.with_y(None)).observed[name]
        return y if observations.shots else y.narrow(y.dim() - 1 - len(fn.event_shape), 0, 0)

    def predictive(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Any:
        """The likelihood's distribution at φ, with batch shape ``[…, tasks, shots]``."""
        self._need_theta(theta)
        return self.evaluate(u, observations.with_y(None), theta).observed[self._single_observed()][0]

    def _single_observed(self) -> str:
        if len(self.layout.observed) > 1:
            raise SiteError(
                f"The program has {len(self.layout.observed)} observed sites ({', '.join(self.layout.observed)}); "
                "predictions are defined for one. Use pyro.infer.Predictive on method.model for several."
            )
        return self.layout.observed[0]

    def _need_theta(self, theta: Tensor | None) -> None:
        if self.has_theta_sites and theta is None:
            names = ", ".join(s.name for s in self.layout.theta)
            raise ModelError(f"The program has global sites ({names}); give their values as theta.")


def refuse_outside(support: Any, y: Tensor, mask: Tensor) -> None:
    """Check targets ``[tasks, shots, …]`` against a support. One whose bounds are tensors may depend on φ: no check.

    Raises:
        DataError: naming the first task and shot whose target is outside.
    """
    base = support
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
    if any(isinstance(bound, Tensor) for bound in vars(base).values()):
        return
    bad = ~support.check(y) & mask
    if bool(bad.any()):  # a condition of a compiled step, which nonzero() alone could not be part of
        task, shot = bad.nonzero()[0].tolist()
        raise DataError(
            f"y = {y[task, shot].tolist()} of task {task}, shot {shot} (counted from 0) is outside the support of the "
            f"likelihood, {support}. Check the data, or choose another likelihood."
        )


def _one_masked_shot(observations: Observations) -> Observations:
    x = observations.x.new_zeros(observations.num_tasks, 1, observations.num_features)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    return Observations(x, None, mask, observations.w)


def as_program(model: Any) -> TaskProgram:
    """The model itself if it is a task program, else the Pyro program wrapped as one."""
    return model if isinstance(model, TaskProgram) else TaskProgram(model)
