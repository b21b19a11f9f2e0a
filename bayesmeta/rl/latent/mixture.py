"""A belief over the latents of known tasks: a Gaussian for each of them, and weights that are read from a context.

    q(z | c) = Σ_i w_i(c) N(z; loc_i, diag(scale_i²)),   w(c) ∝ exp Σ_t f(x_t, y_t),   w(nothing) = 1 / N

If f_i(x, y) is log p(y | x, task i), then w(c) is the posterior over the N tasks under a uniform prior, whatever the
policy was that brought the context, and q is the average of the tasks' own Gaussians under it. That is the belief that
an encoder distilled onto them should have, and unlike one Gaussian it can say "somewhere, but not where I have been".

The weights are a product of one factor for each transition, as the Gaussian of K. Rakelly et al. (PEARL), ICML 2019,
https://arxiv.org/abs/1903.08254, section 4.1 is: the order does not count, an empty context gives the prior exactly,
and a further transition is one more factor. A mixture of what an encoder gives for known examples as a prior is from
J. Tomczak, M. Welling, "VAE with a VampPrior", AISTATS 2018, https://arxiv.org/abs/1705.07120, eq. 9. Weights read from
a context are ours.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, ShapeError
from bayesmeta.models.encoders import Encoder
from bayesmeta.models.plates import task_plate
from bayesmeta.ops.random import Seed, as_generator, forked_rng, normal_like
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import SITE


class TaskLatents(nn.Module):
    """A Gaussian over z for each of N known tasks: variational parameters of their own, under a prior N(0, I).

    The ω_i of A. Gupta, R. Mendonca, Y. Liu, P. Abbeel, S. Levine, "Meta-Reinforcement Learning of Structured
    Exploration Strategies" (MAESN), NeurIPS 2018, https://arxiv.org/abs/1802.07245, section 4.

    Args:
        tasks: N.
        latent: D.
        spread: standard deviation of the first means around 0.
        scale: first standard deviation of each Gaussian.
        seed: of the first means; None means seed 0.

    Raises:
        OptionError: for numbers out of range.
    """

    def __init__(self, tasks: int, latent: int, *, spread: float = 0.1, scale: float = 0.4, seed: Seed = None) -> None:
        super().__init__()
        if not is_whole(tasks, 1) or not is_whole(latent, 1):
            raise OptionError(
                "tasks and latent must be whole numbers of at least 1 (a latent of size 0 says nothing); got "
                f"{tasks!r} and {latent!r}."
            )
        if not (0 <= spread < math.inf and 0 < scale < math.inf):
            raise OptionError(f"spread is 0 or more and scale positive, both finite; got {spread} and {scale}.")
        self.tasks, self.latent = tasks, latent
        generator = as_generator(seed, stream="task latents")
        self.loc = nn.Parameter(spread * torch.randn(tasks, latent, generator=generator))
        self.log_scale = nn.Parameter(torch.full((tasks, latent), math.log(scale)))

    def extra_repr(self) -> str:
        """The sizes, shown when it is printed."""
        return f"tasks={self.tasks}, latent={self.latent}"

    @property
    def scale(self) -> Tensor:
        """Standard deviations, ``[tasks, D]``."""
        return self.log_scale.exp()

    def distribution(self) -> Any:
        """The Gaussians, of batch shape ``[tasks]`` and event shape ``[D]``."""
        return dist.Normal(self.loc, self.scale, validate_args=False).to_event(1)

    def rsample(self, generator: torch.Generator) -> Tensor:
        """One draw of each task's, ``[tasks, D]``, with gradients."""
        return self.loc + self.scale * normal_like(self.loc, self.loc.shape, generator)

    def kl(self) -> Tensor:
        """KL of each from the prior N(0, I), in nats, ``[tasks]``."""
        prior = dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)
        return torch.distributions.kl_divergence(self.distribution(), prior)


class FactorEncoder(Encoder):
    """A number for each known task from each observation, which are summed: log w(c) up to a constant.

    f(x, y) = W₂ gelu(W₁ [v, sin(B v + b)]) with v = [x, y]. The sines let it tell places apart that lie close together;
    B is drawn at first as in M. Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", NeurIPS
    2020, https://arxiv.org/abs/2006.10739, section 4, and learned (there it is not). W₂ is 0 at first, so that an
    untrained encoder says nothing.

    Args:
        features, outputs: as in :class:`~bayesmeta.models.encoders.Encoder`.
        tasks: N, the number of known tasks.
        waves: how many sines.
        frequency: standard deviation of B's entries at first: 2π over the length that matters, in the units of x and y.
        width: of the hidden layer.
        gain: what comes out is multiplied by it, so that a factor can soon rule a task out.
        options: ``max_shots``, as in :class:`~bayesmeta.models.encoders.Encoder`.

    Raises:
        OptionError: for sizes below 1, and numbers that are not positive.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        tasks: int,
        *,
        waves: int = 64,
        frequency: float = 4.0,
        width: int = 64,
        gain: float = 3.0,
        **options: int | bool | None,
    ) -> None:
        super().__init__(features, outputs, tasks, sort=False, **options)  # type: ignore[arg-type]
        if not is_whole(waves, 1) or not is_whole(width, 1) or not frequency > 0 or not gain > 0:
            raise OptionError(
                "waves and width are whole numbers of at least 1, frequency and gain positive; got "
                f"{waves}, {width}, {frequency} and {gain}."
            )
        self.gain = gain
        self.waves = nn.Linear(self.width, waves)
        with torch.no_grad():
            self.waves.weight.normal_(0.0, frequency)
            self.waves.bias.uniform_(0.0, 2 * math.pi)
        self.network = nn.Sequential(nn.Linear(waves + self.width, width), nn.GELU(), nn.Linear(width, tasks))
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    def factors(self, observations: Observations) -> Tensor:
        """f of each observation in the order in which they stand, 0 where masked, ``[tasks, shots, N]``.

        Raises:
            ShapeError, DataError: for observations that it cannot read.
        """
        self.check(observations)
        y = observations.y
        assert y is not None
        rows = torch.cat([observations.x, (y.unsqueeze(-1) if y.dim() == 2 else y).to(observations.x.dtype)], -1)
        out = self.gain * self.network(torch.cat([rows, self.waves(rows).sin()], -1))
        return out if observations.mask is None else out.masked_fill(~observations.mask.unsqueeze(-1), 0.0)

    def forward(self, observations: Observations, given: Tensor | None = None) -> Tensor:
        """The sum of the factors, ``[tasks, N]``; 0 without observations."""
        return self.factors(observations).sum(-2)


class MixtureContext(nn.Module):
    """The guide of :mod:`bayesmeta.rl.latent.mixture`, with the methods of
    :class:`~bayesmeta.rl.latent.core.LatentContext` that a learner needs.

    Its prior is the mixture with equal weights, not N(0, I). A KL of mixtures has no closed form, so that it has no
    ``kl``. A state, as of :meth:`step`, is the sum of the factors so far.

    Args:
        latents: of the known tasks; the guide learns the weights alone and leaves them as they are.
        encoder: gives the factors.
        spec: of the contexts, which are then checked; None: any that the encoder can read.

    Raises:
        ShapeError: for an encoder of another number of tasks.
    """

    def __init__(self, latents: TaskLatents, encoder: FactorEncoder, spec: ContextSpec | None = None) -> None:
        super().__init__()
        if encoder.size != latents.tasks:
            raise ShapeError(f"The encoder gives weights of {encoder.size} tasks; there are {latents.tasks} latents.")
        self.encoder, self.spec = encoder, spec
        # not a submodule: another owns it, and a state would hold it twice
        object.__setattr__(self, "latents", latents)

    latents: TaskLatents

    @classmethod
    def make(cls, spec: ContextSpec, latents: TaskLatents, *, seed: Seed = None, **options: Any) -> MixtureContext:
        """With an encoder that is made here.

        Args:
            spec: of the contexts.
            latents: of the known tasks.
            seed: of the first weights; None means seed 0.
            options: of :class:`FactorEncoder`.
        """
        with forked_rng(as_generator(seed, stream="factors")):
            encoder = FactorEncoder(spec.features, spec.outputs, latents.tasks, **options)
        return cls(latents, encoder.to(latents.loc), spec)

    @property
    def latent(self) -> int:
        """D."""
        return self.latents.latent

    def options(self) -> dict[str, Any]:
        """What changes the result, as plain values, for a learner's options."""
        spec = {} if self.spec is None else {"context": self.spec.options()}
        return {"latent": self.latent, "encoder": type(self.encoder).__name__, "gain": self.encoder.gain, **spec}

    # -- distributions ------------------------------------------------------------------------------------------

    def of_state(self, state: Tensor) -> Any:
        """q of states ``[…, tasks, N]``: batch shape ``[…, tasks]`` and event shape ``[D]``."""
        loc, scale = self.latents.loc.detach(), self.latents.scale.detach()
        shape = (*state.shape[:-1], *loc.shape)
        parts = dist.Normal(loc.expand(shape), scale.expand(shape), validate_args=False).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=state, validate_args=False), parts, validate_args=False)

    def prior(self, *batch: int) -> Any:
        """The mixture with equal weights, of batch shape ``[*batch]``."""
        return self.of_state(self.latents.loc.new_zeros(*batch, self.latents.tasks))

    def posterior(self, context: Observations) -> Any:
        """q(z | context) of batch shape ``[tasks]`` and event shape ``[D]``, differentiable in the weights.

        Raises:
            ContextError: for a context of another family, or longer than ``max_context``.
        """
        return self.of_state(self.encoder(self._checked(context)))

    def beliefs(self, context: Observations, steps: Tensor | None = None) -> Any:
        """q after each of the first 0, 1, …, shots entries, of batch shape ``[shots + 1, tasks]``, differentiable.

        Args:
            context: ``[tasks, shots, …]`` in the order of time.
            steps: after which numbers of entries, an index ``[m]``: the batch shape is ``[m, tasks]`` then.
        """
        factors = self.encoder.factors(self._checked(context))
        states = torch.cat([self.first_state(context.num_tasks).unsqueeze(1), factors.cumsum(1)], 1).transpose(0, 1)
        return self.of_state(states if steps is None else states[steps])

    def weights(self, context: Observations) -> Tensor:
        """Weights of the known tasks after each of the first 0, 1, …, shots entries, ``[shots + 1, tasks, N]``.

        They add up to 1, and are equal before anything. Without gradients.

        Raises:
            ContextError: as for :meth:`posterior`.
        """
        with torch.no_grad():
            found: Tensor = self.beliefs(context).mixture_distribution.probs
        return found

    def sample(self, q: Any, num_samples: int = 1, generator: Seed = None) -> Tensor:
        """Draws ``[num_samples, *batch, D]`` of a distribution made here, without gradients.

        Args:
            q: of :meth:`prior`, :meth:`posterior`, :meth:`beliefs` or :meth:`of_state`.
            num_samples: n.
            generator: generator or seed; None means seed 0.
        """
        logits, parts = q.mixture_distribution.logits.detach(), q.component_distribution.base_dist
        generator = as_generator(generator, logits.device, "latent")
        weights = logits.softmax(-1)
        which = torch.multinomial(weights.flatten(0, -2), num_samples, replacement=True, generator=generator)
        which = which.T.reshape(num_samples, *weights.shape[:-1], 1, 1)

        def of(value: Tensor) -> Tensor:
            index = which.expand(*which.shape[:-1], value.shape[-1])
            return value.expand(num_samples, *value.shape).gather(-2, index).squeeze(-2)

        loc, scale = of(parts.loc), of(parts.scale)
        return loc + scale * normal_like(loc, loc.shape, generator)

    def _checked(self, context: Observations) -> Observations:
        return context if self.spec is None else self.spec.check(context)

    # -- carried on, step by step -------------------------------------------------------------------------------

    def first_state(self, tasks: int) -> Tensor:
        """The state before anything has happened, ``[tasks, N]``."""
        return self.latents.loc.new_zeros(tasks, self.latents.tasks)

    def step(self, state: Tensor, transitions: Observations) -> Tensor:
        """The state after some more transitions, ``[tasks, N]``.

        Args:
            state: ``[tasks, N]``.
            transitions: what happened since, ``[tasks, n, …]``; a masked one changes nothing.
        """
        return state + self.encoder(self._checked(transitions))

    # -- as Pyro programs ---------------------------------------------------------------------------------------

    def model(self, context: Observations) -> Tensor:
        """The prior as a Pyro program: the site ``z`` in the task plate, ``[tasks, 1, D]``."""
        with task_plate(context.x):
            return pyro.sample(SITE, self.prior(context.num_tasks, 1))

    def guide(self, context: Observations) -> Tensor:
        """q as a Pyro program with the same site."""
        state = self.encoder(self._checked(context))
        with task_plate(context.x):
            return pyro.sample(SITE, self.of_state(state.unsqueeze(-2)))
