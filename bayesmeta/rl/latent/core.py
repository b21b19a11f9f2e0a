"""The latent context: a task is a vector z with a prior p(z), and a guide q(z | context) reads what happened in it.

    p(z) = N(0, I),   q(z | c) = N(loc(c), diag(scale(c)²)) from a recognition network,   q(z | nothing) = p(z)
    ELBO = E_q log p(y | x, z) − KL(q(z | c) ‖ p(z))

The recognition network is that of supervised tasks (:mod:`bayesmeta.models.recognition`), with any of their encoders:
a product of Gaussians as in K. Rakelly et al., "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic
Context Variables" (PEARL), ICML 2019, https://arxiv.org/abs/1903.08254, section 4.1; a recurrent one as in L. Zintgraf
et al., "VariBAD", ICLR 2020, https://arxiv.org/abs/1910.08348, section 3; pooled, with attention if asked. Departures:
the prior is a factor of every q, so that an empty context gives it exactly.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from bayesmeta.adapt.amortised import EncoderName, EncoderRecipe
from bayesmeta.data import Observations
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.models.plates import task_plate
from bayesmeta.models.program import TaskProgram
from bayesmeta.models.recognition import Recognised, Recognition
from bayesmeta.models.stepping import Steps, steps_of
from bayesmeta.ops.random import Seed, as_generator, forked_rng, normal_like
from bayesmeta.ops.whole import is_whole
from bayesmeta.posteriors.gaussian import NormalPosterior
from bayesmeta.rl.latent.contexts import ContextSpec, prefix

#: The latent site.
SITE = "z"
FreeBits = Literal["dimension", "total"]


class Elbo(NamedTuple):
    """The two parts of an ELBO, ``[tasks]`` each.

    Attributes:
        log_likelihood: E_q log p(y | x, z), by draws.
        kl: of q from the prior, weighted and with free bits as the latent context has them.
    """

    log_likelihood: Tensor
    kl: Tensor

    @property
    def value(self) -> Tensor:
        """log_likelihood − kl, ``[tasks]``."""
        return self.log_likelihood - self.kl


class LatentContext(nn.Module):
    """Prior and guide of a latent z of D numbers; see :mod:`bayesmeta.rl.latent.core`.

    Args:
        recognition: a diagonal :class:`~bayesmeta.models.recognition.Recognition` that reads contexts alone.
        spec: of the contexts, which are then checked; None: any that the encoder can read.
        kl_weight: factor of the KL in :meth:`kl` and :meth:`elbo` (PEARL as released has 0.1).
        free_bits: nats of KL that cost nothing more than they do anyway: λ in D. Kingma et al., "Improved Variational
            Inference with Inverse Autoregressive Flow", NeurIPS 2016, https://arxiv.org/abs/1606.04934, eq. 15, with
            its groups as ``free_bits_of`` says. As there, max(λ, ·) is of the mean over all tasks at hand: where that
            is below λ each task's KL is λ, without a gradient. The weight comes on top.
        free_bits_of: ``"dimension"``: λ for each dimension of z; ``"total"``: for their sum.

    Attributes:
        recognition: the network.

    Raises:
        OptionError: for a weight or free bits below 0, and unknown names.
        UnsupportedError: for a recognition network with another family than the diagonal one.
    """

    def __init__(
        self,
        recognition: Recognition,
        spec: ContextSpec | None = None,
        *,
        kl_weight: float = 1.0,
        free_bits: float = 0.0,
        free_bits_of: FreeBits = "dimension",
    ) -> None:
        super().__init__()
        if recognition.family != "diagonal" or recognition.given:
            raise UnsupportedError(
                f"A latent context is a diagonal Gaussian that reads its context alone; got posterior="
                f"{recognition.family!r} with given={recognition.given}. Make it with Recognition(encoder, latent, "
                "'diagonal')."
            )
        for name, value in (("kl_weight", kl_weight), ("free_bits", free_bits)):
            if not 0.0 <= value < float("inf"):
                raise OptionError(f"{name} must be 0 or more, and finite; got {value}.")
        if free_bits_of not in get_args(FreeBits):
            raise OptionError(f"free_bits_of is {free_bits_of!r}; expected 'dimension' or 'total'.")
        self.recognition, self.spec = recognition, spec
        self.kl_weight, self.free_bits, self.free_bits_of = kl_weight, free_bits, free_bits_of

    @classmethod
    def make(
        cls,
        spec: ContextSpec,
        latent: int,
        encoder: EncoderName | nn.Module = "product",
        *,
        width: int = 64,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> LatentContext:
        """With networks of the usual form.

        Args:
            spec: of the contexts.
            latent: D.
            encoder: ``"product"``, ``"recurrent"``, ``"mean"``, ``"sum"``, ``"max"``, ``"attention"`` or
                ``"transformer"``, as in :class:`~bayesmeta.Amortised`, or a module of your own, which is copied.
            width: of the encoder, of what it gives, and of the head.
            seed: of the first weights; None means seed 0.
            dtype: of the networks.
            options: as in :class:`LatentContext`.

        Raises:
            OptionError: for a latent of size 0, unknown names and numbers out of range.
        """
        if not is_whole(latent, 1):
            raise OptionError(
                f"latent must be a whole number, at least 1 (a latent of size 0 says nothing); got {latent!r}."
            )
        like = torch.zeros((), dtype=dtype)
        read = EncoderRecipe(encoder, width, None, seed).build(spec.features, spec.outputs, like, latent=latent)
        with forked_rng(as_generator(seed, stream="recognition")):
            recognition = Recognition(read, latent, "diagonal", hidden=width)
        return cls(recognition.to(dtype), spec, **options)

    @property
    def latent(self) -> int:
        """D."""
        return self.recognition.latent

    @property
    def _like(self) -> Tensor:
        return next(self.recognition.parameters())

    def extra_repr(self) -> str:
        """The options, shown when it is printed."""
        return f"latent={self.latent}, kl_weight={self.kl_weight}, free_bits={self.free_bits} ({self.free_bits_of})"

    def options(self) -> dict[str, Any]:
        """What changes the result, as plain values, for a learner's options."""
        spec = {} if self.spec is None else {"context": self.spec.options()}
        return {
            "latent": self.latent, "encoder": type(self.recognition.encoder).__name__, "kl_weight": self.kl_weight,
            "free_bits": [self.free_bits, self.free_bits_of], **spec,
        }  # fmt: skip

    # -- distributions ------------------------------------------------------------------------------------------

    def prior(self, *batch: int) -> Any:
        """p(z) of batch shape ``[*batch]``, ``prior(tasks)``, and event shape ``[D]``."""
        zeros = self._like.new_zeros(*batch, self.latent)
        return _normal(zeros, torch.ones_like(zeros))

    def posterior(self, context: Observations) -> Any:
        """q(z | context) of batch shape ``[tasks]`` and event shape ``[D]``, differentiable.

        Raises:
            ContextError: for a context of another family, or longer than ``max_context``.
        """
        return _of(self.recognition(self._checked(context)))

    def beliefs(self, context: Observations) -> Any:
        """q after each of the first 0, 1, …, shots entries, of batch shape ``[shots + 1, tasks]``, differentiable.

        In one pass where the encoder can be carried on (recurrent, product, sum, mean); else in one for each prefix.
        """
        context = self._checked(context)
        try:
            steps = self._steps
        except UnsupportedError:
            each = [self.recognition(prefix(context, n)) for n in range(context.shots + 1)]
            return _normal(torch.stack([q.loc for q in each]), torch.stack([q.spread for q in each]))
        return _of(steps.read(steps.path(context).transpose(0, 1)))

    def sample(self, q: Any, num_samples: int = 1, generator: Seed = None) -> Tensor:
        """Reparameterised draws ``[num_samples, *batch, D]`` of a distribution made here.

        Args:
            q: of :meth:`prior`, :meth:`posterior`, :meth:`beliefs` or :meth:`of_state`.
            num_samples: n.
            generator: generator or seed; None means seed 0.
        """
        generator = as_generator(generator, q.mean.device, "latent")
        loc, scale = _parts(q)
        return loc + scale * normal_like(loc, (num_samples, *loc.shape), generator)

    def belief(self, context: Observations, program: TaskProgram) -> NormalPosterior:
        """q(z | context) as a posterior over a decoder's program, whose one local site is z.

        Everything that is asked of a :class:`~bayesmeta.posteriors.base.TaskPosterior` can then be asked of it.
        """
        loc, scale = _parts(self.posterior(context))
        return NormalPosterior(program, context, loc.detach()[None], scale.detach()[None])

    def _checked(self, context: Observations) -> Observations:
        return context if self.spec is None else self.spec.check(context)

    # -- carried on, step by step -------------------------------------------------------------------------------

    @property
    def _steps(self) -> Steps:
        return steps_of(self.recognition)

    def first_state(self, tasks: int) -> Tensor:
        """The state before anything has happened, ``[tasks, width]``.

        Raises:
            UnsupportedError: for encoders that need the whole context each time, as for :meth:`step`.
        """
        return self._steps.first(tasks)

    def step(self, state: Tensor, transitions: Observations, begins: Tensor | None = None) -> Tensor:
        """The state after some more transitions, ``[tasks, width]``.

        Args:
            state: ``[tasks, width]``.
            transitions: what happened since, ``[tasks, n, …]``; a masked one changes nothing.
            begins: where a trial begins with them, ``[tasks]``: what was known before is forgotten.
        """
        steps = self._steps
        if begins is not None:  # chosen, not multiplied: NaN of one task does not reach the next
            state = torch.where(begins.unsqueeze(-1), steps.first(len(state)), state)
        return steps.step(state, self._checked(transitions))

    def of_state(self, state: Tensor) -> Any:
        """q of states ``[…, tasks, width]``."""
        return _of(self._steps.read(state))

    # -- as Pyro programs ---------------------------------------------------------------------------------------

    def model(self, context: Observations) -> Tensor:
        """The prior as a Pyro program: the site ``z`` in the task plate, ``[tasks, 1, D]``."""
        with task_plate(context.x):
            zeros = context.x.new_zeros(context.num_tasks, 1, self.latent)
            return pyro.sample(SITE, _normal(zeros, torch.ones_like(zeros)))

    def guide(self, context: Observations) -> Tensor:
        """q as a Pyro program with the same site."""
        loc, scale = _parts(self.posterior(context))
        with task_plate(context.x):
            return pyro.sample(SITE, _normal(loc.unsqueeze(-2), scale.unsqueeze(-2)))

    # -- objectives ---------------------------------------------------------------------------------------------

    def kl(self, q: Any, p: Any = None) -> Tensor:
        """KL(q ‖ p), with the weight and free bits of this latent context.

        ``kl_divergence`` of the distributions that stand in the traces of :meth:`guide` and :meth:`model`.

        Args:
            q: a context, ``[tasks]``; or a distribution of batch shape ``[…]``.
            p: a distribution; None is the prior. VariBAD's KL to the belief before is ``kl(now, before)``.

        Returns:
            ``[tasks]``, or ``[…]``.
        """
        if isinstance(q, Observations):
            with forked_rng(as_generator(0, q.device)):  # tracing draws; the draws are not used
                guide, model = poutine.trace(self.guide).get_trace(q), poutine.trace(self.model).get_trace(q)
            each = _by_dimension(guide.nodes[SITE]["fn"], model.nodes[SITE]["fn"]).squeeze(-2)
        else:
            each = _by_dimension(q, self.prior(*q.batch_shape) if p is None else p)
        return self.kl_weight * self._with_free_bits(each)

    def _with_free_bits(self, each: Tensor) -> Tensor:
        """Of the KL of each dimension ``[…, D]``, ``[…]``."""
        groups = each if self.free_bits_of == "dimension" else each.sum(-1, keepdim=True)
        if self.free_bits == 0.0:
            return groups.sum(-1)
        mean = groups.reshape(-1, groups.shape[-1]).mean(0)
        return torch.where(mean < self.free_bits, self.free_bits, groups).sum(-1)

    def elbo(
        self,
        program: TaskProgram,
        context: Observations,
        data: Observations | None = None,
        *,
        num_samples: int = 1,
        generator: Seed = None,
    ) -> Elbo:
        """The ELBO of each task, differentiable in guide and decoder.

        Args:
            program: the decoder, whose one local site is z.
            context: what q reads.
            data: transitions of the same tasks whose likelihood counts; None: the context.
            num_samples: draws of z.
            generator: generator or seed; None means seed 0.
        """
        q = self.posterior(context)
        u = self.sample(q, num_samples, generator)
        log_likelihood = program.log_likelihood(u, context if data is None else data).sum(-1).mean(0)
        return Elbo(log_likelihood, self.kl(q))


def _normal(loc: Tensor, scale: Tensor) -> Any:
    # no validation: it reads values back from the device in every step
    return dist.Normal(loc, scale, validate_args=False).to_event(1)


def _of(recognised: Recognised) -> Any:
    return _normal(recognised.loc, recognised.spread)


def _parts(q: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a diagonal Gaussian, ``[…, D]``."""
    return q.base_dist.loc, q.base_dist.scale


def _by_dimension(q: Any, p: Any) -> Tensor:
    """KL of independent dimensions, ``[…, D]``.

    Raises:
        UnsupportedError: for distributions whose last dimension is not one of independent events.
    """
    for fn in (q, p):
        if not isinstance(fn, torch.distributions.Independent) or fn.reinterpreted_batch_ndims != 1:
            raise UnsupportedError(
                f"The KL of a latent context is taken dimension by dimension; got a {type(fn).__name__}. Give "
                "distributions as Normal(…).to_event(1)."
            )
    return kl_divergence(q.base_dist, p.base_dist)
