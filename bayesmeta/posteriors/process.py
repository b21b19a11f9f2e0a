"""The posterior of a process: the support itself, and a latent where there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import NoClosedFormError, UnsupportedError
from bayesmeta.models.plates import task_plate
from bayesmeta.models.process_model import SITE, ProcessModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.posteriors.base import Draws
from bayesmeta.posteriors.gaussian import NormalPosterior


@dataclass(frozen=True, eq=False)
class PriorDraws(Draws):
    """Draws of what is known before the support: predictions under them are those from no support."""


class ProcessPosterior(NormalPosterior):
    """What a :class:`~bayesmeta.ProcessModel` says of a task: predictions from its support, and q(z | S).

    Nothing of finite length holds all that the support says, so predictions read the support again. Draws of u are
    draws of the latent z, ``[n, tasks, D]``; without a latent D is 0, the posterior is a point, and the predictive has
    a closed form.

    Args:
        program: the model; its θ at the time of use counts.
        support: what predictions are made from.
        loc, scale: of q(z | S), each ``[1, tasks, D]``.
    """

    #: shown by :func:`~bayesmeta.loo`, whose weights would take the support for data that the draws alone predict
    loo_refusal = (
        "A process predicts from the support itself and has no density of it, so there is no leave-one-out score by "
        "importance weights. Score the query with bayesmeta.scores."
    )

    def __init__(self, program: TaskProgram, support: Observations, loc: Tensor, scale: Tensor) -> None:
        assert isinstance(program, ProcessModel)
        self.model = program.given(support)
        super().__init__(self.model, support, loc, scale)
        self.is_point = loc.shape[-1] == 0

    @property
    def u(self) -> Tensor:
        """Mean of z, ``[1, tasks, D]``."""
        return self.loc

    def _before(self) -> ProcessPosterior:
        """What the model says without a support."""
        empty = self.support.points(slice(0))
        return ProcessPosterior(self.model, empty, torch.zeros_like(self.loc), torch.ones_like(self.scale))

    @property
    def log_evidence(self) -> Tensor | None:
        """log p(y_S | x_S, θ) of the support's targets together, as without a support, ``[tasks]``.

        Without a covariance they are independent, so that it sees each point and not whether they hang together. None
        with a latent, where it has no closed form.
        """
        return self._before().log_joint_likelihood(self.support) if self.is_point else None

    # -- draws and densities of z -------------------------------------------------------------------------------

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(z | S), ``[…, tasks]``.

        Raises:
            UnsupportedError: without a latent.
        """
        if self.is_point:
            raise UnsupportedError(
                "This process has no latent, so there is no density over φ. The density of targets is "
                "log_likelihood(observations), and log_joint_likelihood for all of a task's together."
            )
        return super().log_prob(u)

    def prior_draws(self, num_samples: int, generator: Seed = None) -> PriorDraws:
        """Draws of z from N(0, I), with which :meth:`predict` and the like predict as without a support."""
        generator = as_generator(generator, self.loc.device, "prior")
        return PriorDraws(self.model.sample_prior(num_samples, self.support, generator)[0])

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample z as a Pyro guide; nothing where there is no latent. Arguments are accepted and ignored."""
        if self.is_point:
            return {}
        with task_plate(self.support.x):
            return {SITE: pyro.sample(SITE, self.u_distribution())}

    # -- predictions --------------------------------------------------------------------------------------------

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """The predictive of y in closed form, where there is no latent.

        Args:
            x: inputs ``[tasks, shots, features]``.
            joint: one distribution over all shots of a task.

        Returns:
            The likelihood's distribution, with a covariance a Normal: batch ``[tasks, shots]``; joint: batch
            ``[tasks]``, independent targets with event ``[shots, …]``, dependent ones as a multivariate normal.

        Raises:
            NoClosedFormError: with a latent.
        """
        if not self.is_point:
            raise NoClosedFormError("With a latent the predictive is a mixture over it; use predict for draws.")
        observations = self._as_observations(x)
        with torch.no_grad():
            if joint and self.model.covariance != "diagonal":
                return self.model.joint(observations)
            each = self.model.predictive(self.loc[0], observations)
            each = each.expand((observations.num_tasks, observations.shots))
        return each.to_event(1) if joint else each

    def predict(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Draw y at all points of x, ``[n, tasks, shots]``: each draw is one function if there is a latent."""
        if isinstance(draws, PriorDraws):
            return self._before().predict(x, draws=Draws(draws.u), generator=generator)
        return super().predict(x, num_samples, draws=draws, generator=generator)

    def log_likelihood(
        self,
        observations: Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """log p(y | x, S, z) of each observation by itself, ``[n, tasks, shots]``; 0 where masked.

        With a covariance the targets are not independent, so that a sum over them is no joint density;
        :meth:`log_joint_likelihood` has that. Of the support's own observations it says how well they are fitted, with
        these observations in S.
        """
        if isinstance(draws, PriorDraws):
            return self._before().log_likelihood(observations, draws=Draws(draws.u), generator=generator)
        return super().log_likelihood(observations, num_samples, draws=draws, generator=generator)

    def log_joint_likelihood(
        self, observations: Observations, num_samples: int = 1000, *, generator: Seed = None
    ) -> Tensor:
        """log p(y_1, …, y_M | x, S) of all of a task's targets together, ``[tasks]``.

        In closed form without a latent; with one, the log of a mean over draws of z. 0 for a task without a target.
        """
        self._same_tasks(observations)
        self.model.check_targets(observations)
        draws = self.draws(1 if self.is_point else num_samples, generator)
        with torch.no_grad():
            each = self.model.log_targets(draws.u, observations)
        total = each.logsumexp(0) - math.log(draws.num_samples)
        return torch.where(observations.full_mask().any(-1), total, 0.0)  # no rounding where there is nothing

    def class_probabilities(
        self,
        x: Tensor | Observations,
        num_samples: int = 1000,
        *,
        draws: Draws | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """As :meth:`TaskPosterior.class_probabilities`; without a latent exact."""
        if isinstance(draws, PriorDraws):
            return self._before().class_probabilities(x, draws=Draws(draws.u))
        if self.is_point:
            draws = Draws(self.loc)
        return super().class_probabilities(x, num_samples, draws=draws, generator=generator)

    def state(self) -> dict[str, Tensor]:
        """loc and scale of z; the rest is the support."""
        return {"loc": self.loc, "scale": self.scale}
