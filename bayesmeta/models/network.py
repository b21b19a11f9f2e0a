"""A network under a likelihood, with a prior on a flat vector of task parameters: what network models share."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, NonFiniteDataError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.handlers import Pass
from bayesmeta.models.likelihoods import Likelihood
from bayesmeta.models.plates import shot_plate, task_plate
from bayesmeta.models.priors import Prior
from bayesmeta.models.program import TaskProgram, refuse_outside
from bayesmeta.models.targets import check_exposure
from bayesmeta.ops.batched import FlatParameters
from bayesmeta.ops.random import Seed, as_generator, forked_rng

SITE = "phi"


class NetworkProgram(TaskProgram):
    """Base of models with one local site ``phi`` of event shape ``[D]``, and a network that takes it and x.

    Densities take a fast path without Pyro, equal to the trace. A subclass defines :meth:`_forward`.

    Args:
        likelihood: of the network's outputs.
        prior: on φ.
        initial: first centre of the prior, ``[D]``.
        parts: the tensors of which φ is made.
        covariates: width of the task-level covariates w on which the prior's mean depends.
    """

    def __init__(
        self, likelihood: Likelihood, prior: Prior, initial: Tensor, parts: FlatParameters, covariates: int
    ) -> None:
        super().__init__(self._pyro_program)
        if covariates < 0:
            raise OptionError(f"covariates is the width of w, 0 or more; got {covariates}.")
        if not isinstance(likelihood, Likelihood):
            given = likelihood.__name__ if isinstance(likelihood, type) else repr(likelihood)
            raise OptionError(
                f"likelihood is {given}; expected an instance of a bayesmeta likelihood, such as bm.Gaussian(0.1), "
                "bm.likelihoods.Categorical(3) or bm.likelihoods.Poisson()."
            )
        self.flat = parts
        self.likelihood = likelihood
        self.prior = prior
        self.prior.set_up(initial, parts, covariates)
        self._support: Any = None  # the likelihood's, read once

    def _forward(self, u: Tensor, x: Tensor) -> Tensor:
        """Network outputs ``[…, tasks, shots, outputs]`` for u ``[…, tasks, D]`` and its own inputs x, no exposure."""
        raise NotImplementedError

    # -- the Pyro program ---------------------------------------------------------------------------------------

    def _pyro_program(
        self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        prior = self.prior
        hyper = {name: pyro.sample(name, fn) for name, fn in prior.hyperpriors().items()}
        with task_plate(x):
            phi = pyro.sample(SITE, prior.distribution(None if w is None else w.unsqueeze(-2), hyper))
            with shot_plate(x, mask):
                return pyro.sample("y", self._distribution(phi.squeeze(-2), x, mask), obs=y)

    def _distribution(self, u: Tensor, x: Tensor, mask: Tensor | None) -> Any:
        """The likelihood's distribution at φ, with batch shape ``[…, tasks, shots]``."""
        inputs, exposure = self.likelihood.split(x, mask)
        output = self._forward(u, inputs)
        try:
            return self.likelihood.distribution(output, **exposure)
        except ValueError as error:  # validation of the distribution's parameters
            bad = ~output.isfinite().flatten(-2).all(-1)
            if not bool(bad.any()):
                raise
            tasks = bad.reshape(-1, bad.shape[-1]).any(0).nonzero().flatten().tolist()
            raise NonFiniteDataError(
                f"The network's output is not finite for {len(tasks)} task(s), the first of them task {tasks[0]} "
                "(counted from 0): adaptation has diverged, or φ was not finite. Take fewer inner steps or a lower "
                "inner rate, train with losses at every step (step_weights='uniform'), or standardise the data."
            ) from error

    def output(self, u: Tensor, x: Tensor) -> Tensor:
        """Network outputs ``[…, tasks, shots, outputs]``.

        Args:
            u: task-specific weights, ``[…, tasks, D]``; one task's weights serve all tasks.
            x: ``[tasks, shots, features]``, the likelihood's exposure included, if it has one.
        """
        return self._forward(u, self.likelihood.split(x)[0])

    # -- fast path ----------------------------------------------------------------------------------------------

    def prepare(self, observations: Observations) -> NetworkProgram:
        """Check that the network takes these features and that its outputs and the likelihood fit the targets."""
        if not self.is_prepared:
            check_exposure(self.likelihood, observations)
            self._check_covariates(observations)
            self._try_network(observations)
            with torch.no_grad():
                self._support = self.predictive(self.prior.loc[None], observations).support
            self.check_targets(observations)
        super().prepare(observations)
        self._needs_w = self.prior.covariates > 0
        return self

    def check(self, observations: Observations) -> None:
        """Check the feature width, and that the exposure is positive where the likelihood has one.

        Raises:
            ShapeError: for another width than that of the first data.
            DataError: for an exposure that is not positive, naming task and shot.
        """
        super().check(observations)
        self.check_inputs(observations)

    def check_inputs(self, observations: Observations) -> None:
        """What :meth:`check` asks beyond the width: exposure, covariates, and targets that the likelihood admits."""
        check_exposure(self.likelihood, observations)
        self._check_covariates(observations)
        if self._support is not None and self._support.is_discrete:
            self.check_targets(observations)

    def _check_covariates(self, observations: Observations) -> None:
        if self.prior.covariates:
            with torch.no_grad():
                self.prior.centre(observations.w)

    @property
    def _width_note(self) -> str:
        """What else is to be said of the network's input width where data do not fit."""
        return ""

    def _try_network(self, observations: Observations) -> None:
        u, likelihood = self.prior.loc.detach()[None], self.likelihood
        inputs, exposure = likelihood.split(observations.x.new_ones(1, 2, observations.num_features))
        try:
            with torch.no_grad():
                out = self._forward(u, inputs)
        except RuntimeError as error:
            beside = " beside the exposure" if exposure else ""
            raise ShapeError(
                f"The network cannot take x with {inputs.shape[-1]} features{beside} in {observations.x.dtype}: "
                f"{str(error).rstrip('.')}. Give the network that input width{self._width_note}, and model and data "
                "one dtype and device (.to())."
            ) from error
        if observations.y is not None:
            self._check_outputs(out, exposure, observations.y)

    def _check_outputs(self, out: Tensor, exposure: dict[str, Tensor], y: Tensor) -> None:
        likelihood, width = self.likelihood, 1 if y.dim() == 2 else y.shape[-1]
        name, advice = type(likelihood).__name__, "Change the network's output width."
        wanted = likelihood.num_outputs(width)
        if wanted is not None and wanted != out.shape[-1]:
            raise ShapeError(
                f"The network has {out.shape[-1]} output(s); a {name} likelihood takes {wanted} for y of width {width} "
                f"(shape {list(y.shape)}). {advice}"
            )
        try:
            with torch.no_grad():
                event = tuple(likelihood.distribution(out, **exposure).event_shape)
        except RuntimeError as error:
            raise ShapeError(f"The likelihood cannot take outputs of width {out.shape[-1]}: {error}.") from error
        if event != tuple(y.shape[2:]):
            raise ShapeError(
                f"The likelihood on {out.shape[-1]} network output(s) describes targets of shape "
                f"{['tasks', 'shots', *event]}; y has width {width} and shape {list(y.shape)}. {advice}"
            )

    def check_targets(self, observations: Observations, theta: Tensor | None = None) -> None:
        """Check that the likelihood admits the targets."""
        if observations.y is not None and observations.shots > 0:
            refuse_outside(self._support, observations.y, observations.full_mask())

    def log_likelihood(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y | x, φ) of each observation, ``[…, tasks, shots]``; 0 where masked."""
        if observations.y is None:
            raise DataError("A log-likelihood needs targets; these observations have y=None.")
        inputs, exposure = self.likelihood.split(observations.x, observations.mask)
        value = self.likelihood.log_prob(self._forward(u, inputs), observations.y, **exposure)
        if observations.mask is not None:
            value = torch.where(observations.mask, value, 0.0)
        return value

    def _hyper(self, theta: Tensor | None) -> dict[str, Tensor]:
        """Values of the prior's global sites, each ``[…, 1, *event]``, with one dimension for the tasks."""
        hyper: dict[str, Tensor] = {}
        for name, fn in self.prior.hyperpriors().items():
            self._need_theta(theta)
            assert theta is not None
            site = next(site for site in self.layout.theta if site.name == name)
            raw = theta[..., site.start : site.stop].reshape(*theta.shape[:-1], 1, *site.unconstrained_shape)
            hyper[name] = biject_to(fn.support)(raw)
        return hyper

    def log_prior(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(φ | θ, w), ``[…, tasks]``."""
        return self.prior.distribution(observations.w, self._hyper(theta)).log_prob(u)

    def log_joint(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y, φ | x, θ), ``[…, tasks]``."""
        return self.log_likelihood(u, observations).sum(-1) + self.log_prior(u, observations, theta)

    def trace_joint(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Pass:
        """The same densities by the Pyro trace, to hold the fast path against."""
        return super().evaluate(u, observations, theta)

    def sample_prior(
        self, num_samples: int, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw φ from p(φ | θ, w) and, when ``theta`` is None, the prior's global sites.

        Returns:
            u ``[n, tasks, D]`` and theta ``[n, E]`` (None without global sites).
        """
        if self.prior.hyperpriors():
            return super().sample_prior(num_samples, observations, generator, theta)
        with torch.no_grad(), forked_rng(as_generator(generator, observations.device, "program")):
            prior = self.prior.distribution(observations.w)
            return prior.expand(torch.Size([observations.num_tasks])).sample((num_samples,)), None

    def prior_moments(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, each ``[…, tasks, D]``.

        Raises:
            UnsupportedError: for a prior without a density, or one of your own that does not say.
        """
        moments = self.prior.moments(observations.w, self._hyper(theta))
        if moments is None:
            raise UnsupportedError(
                f"The prior {type(self.prior).__name__} has no moments; a method that starts at a density wants "
                "prior='normal' or another with one."
            )
        lead = () if theta is None else theta.shape[:-1]
        shape = (*lead, observations.num_tasks, self.flat.size)
        return moments[0].expand(shape), moments[1].expand(shape)

    def learned_start(self, observations: Observations) -> Tensor:
        """The centre of the prior, which is θ, ``[tasks, D]``."""
        return self.prior.centre(observations.w).expand(observations.num_tasks, -1)

    def start_parameters(self) -> list[nn.Parameter]:
        """What :meth:`learned_start` is made of: the centre of the prior, and its slopes on w."""
        return [p for name, p in self.prior.named_parameters() if name in ("loc", "slopes")]

    def gaussian_prior(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of φ, each ``[…, tasks, D]``, if its prior is a diagonal Gaussian given θ."""
        return self.prior_moments(observations, theta) if self.prior.is_diagonal_gaussian else None

    def predict(
        self, u: Tensor, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> Tensor:
        """Draw y given φ, ``[…, tasks, shots]`` or ``[…, tasks, shots, outputs]``."""
        with torch.no_grad(), forked_rng(as_generator(generator, observations.device, "program")):
            return self.predictive(u, observations).sample()

    def predictive(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Any:
        """The likelihood's distribution at φ, with batch shape ``[…, tasks, shots]``."""
        return self._distribution(u, observations.x, observations.mask)
