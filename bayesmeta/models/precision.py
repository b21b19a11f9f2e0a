"""A network whose weights' and noise's precisions are latent in each task, with gamma priors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from bayesmeta.errors import OptionError
from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.plates import shot_plate, task_plate
from bayesmeta.models.priors import Point
from bayesmeta.models.program import TaskProgram


class PrecisionTaskModel(TaskProgram):
    """Bayesian network regression with unknown precisions: any method adapts them together with the weights.

    In each task

        λ ~ Gamma(weight_prior),   φ ~ N(centre, 1/λ)
        γ ~ Gamma(noise_prior),    y ~ N(f_φ(x), 1/γ)

    with local sites ``weight_precision`` (λ), ``phi`` and ``noise_precision`` (γ); methods work on log λ and log γ. The
    density is that of the Pyro trace: slower than a :class:`~bayesmeta.NeuralTaskModel`, whose noise is θ.

    Source: J. Yoon, T. Kim, O. Dia, S. Kim, Y. Bengio, S. Ahn, "Bayesian Model-Agnostic Meta-Learning", NeurIPS 2018,
    https://arxiv.org/abs/1806.03836, whose sinusoid model has such weights and noise. Departure: the weights' prior is
    centred at a learned point (the network's weights, to begin with), so that it says how far tasks are apart, and is
    narrow at first (mean precision 100). The paper's is ``centre=0.0, learn_centre=False, weight_prior=(2.0, 2.0)``,
    with the numbers of the authors' code; draws from it are wild functions, for which inner rates must be tiny.

    Args:
        network: maps ``[shots, features]`` to ``[shots, outputs]``; its weights are copied.
        weight_prior: shape and rate of λ's Gamma prior.
        noise_prior: shape and rate of γ's Gamma prior.
        centre: first centre of the weights' prior; None: the network's weights.
        learn_centre: whether the centre is trained.
        task_modules: which modules hold task parameters, as in :class:`~bayesmeta.NeuralTaskModel`.

    Raises:
        OptionError: for shapes or rates that are not positive.
        ModelError and OptionError: as :class:`~bayesmeta.NeuralTaskModel` for the network and ``task_modules``.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        weight_prior: tuple[float, float] = (2.0, 0.02),
        noise_prior: tuple[float, float] = (2.0, 0.2),
        centre: float | None = None,
        learn_centre: bool = True,
        task_modules: str | Sequence[str] = "all",
    ) -> None:
        for name, prior in (("weight_prior", weight_prior), ("noise_prior", noise_prior)):
            if len(prior) != 2 or not min(prior) > 0:
                raise OptionError(f"{name} is the shape and the rate of a Gamma, both positive; got {prior}.")
        super().__init__(self._pyro_program)
        self.weight_prior, self.noise_prior = weight_prior, noise_prior
        self.base = NeuralTaskModel(network, Gaussian(1.0), Point(), task_modules=task_modules)
        if centre is not None:
            nn.init.constant_(self.base.prior.loc, centre)
        self.base.prior.loc.requires_grad_(learn_centre)

    @property
    def centre(self) -> Tensor:
        """Centre of the weights' prior, ``[D]``, in the order of the network's tensors."""
        return self.base.prior.loc

    def _pyro_program(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Any:
        with task_plate(x):
            weight_precision = pyro.sample("weight_precision", _gamma(self.weight_prior, x))
            noise_precision = pyro.sample("noise_precision", _gamma(self.noise_prior, x))
            scale = weight_precision.rsqrt().unsqueeze(-1).expand(*weight_precision.shape, len(self.centre))
            phi = pyro.sample("phi", dist.Normal(self.centre, scale).to_event(1))
            with shot_plate(x, mask):
                output = self.base._forward(phi.squeeze(-2), x)
                noise = noise_precision.rsqrt()
                if output.shape[-1] == 1:
                    return pyro.sample("y", dist.Normal(output.squeeze(-1), noise), obs=y)
                return pyro.sample("y", dist.Normal(output, noise.unsqueeze(-1)).to_event(1), obs=y)


def _gamma(prior: tuple[float, float], like: Tensor) -> Any:
    return dist.Gamma(like.new_tensor(prior[0]), like.new_tensor(prior[1]))
