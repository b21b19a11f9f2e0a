"""A shared network with a context vector for each task: φ is what is appended to the inputs, not the weights."""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayesmeta.errors import ModelError, OptionError, UnsupportedError
from bayesmeta.models.film import FiLMNetwork
from bayesmeta.models.likelihoods import Likelihood
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.priors import Normal, Prior, as_prior
from bayesmeta.ops.batched import FlatParameters, unsafe_modules
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.ops.whole import is_whole

Decoder = Literal["concatenate", "film"]


class ContextTaskModel(NetworkProgram):
    """A network shared by all tasks that takes x and a task's context: y ~ p(y | f(x, φ)), φ ∈ R^c.

    The Pyro program has one latent site ``phi`` of event shape ``[context_size]``. CAVIA makes one of these from a
    network; any method takes it (ABML on it is a latent-variable model).

    Args:
        network: shared; maps ``[…, features + context_size]`` to ``[…, outputs]``, the context last, any number of
            dimensions on the left; with ``decoder="film"`` a Sequential of Linear and elementwise layers that maps
            ``[…, features]``. It is copied.
        likelihood: a :class:`~bayesmeta.likelihoods.Likelihood`.
        context_size: c, 0 or more. With 0 there is nothing to adapt.
        prior: on the context, centred at 0: by default standard normal, not learned, as its scale and centre would
            only repeat what the first layer can do.
        learn_centre: whether the centre is trained; CAVIA's contexts start at 0.
        covariates: width of w, on which the centre then depends linearly.
        decoder: how the context enters: ``"concatenate"``: beside x; ``"film"``: it scales and shifts what each hidden
            Linear gives (:class:`~bayesmeta.models.film.FiLMNetwork`).
        seed: of the weights by which FiLM reads the context; None means seed 0.

    Raises:
        OptionError: for a negative size, an unknown decoder, or FiLM without a context.
        ModelError: for a network with running statistics or dropout, or one that FiLM cannot modulate.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        context_size: int,
        prior: Prior | str | None = None,
        *,
        learn_centre: bool = False,
        covariates: int = 0,
        decoder: Decoder = "concatenate",
        seed: Seed = None,
    ) -> None:
        _check_size(context_size)
        if decoder not in get_args(Decoder) or (decoder == "film" and context_size == 0):
            raise OptionError(
                f"decoder is 'concatenate', or 'film' with a context of at least 1; got {decoder!r} and "
                f"context_size={context_size}."
            )
        bad = unsafe_modules(network)
        if bad:
            raise ModelError(
                f"The network has modules that mix tasks or draw hidden noise: {', '.join(bad)}. Use LayerNorm."
            )
        prior = Normal(1.0, learn_scale=False) if prior is None else as_prior(prior)
        like = next(network.parameters(), torch.zeros(()))
        parts = FlatParameters({"context": torch.Size([context_size])})
        super().__init__(likelihood, prior, like.new_zeros(context_size), parts, covariates)
        self.prior.loc.requires_grad_(learn_centre)
        self.network = copy.deepcopy(network)
        if decoder == "film":
            self.network = FiLMNetwork(network, context_size, as_generator(seed, like.device, "film"))
        self.context_size, self.decoder = context_size, decoder

    @classmethod
    def widen(
        cls, model: NeuralTaskModel, context_size: int, *, decoder: Decoder = "concatenate", seed: Seed = None
    ) -> ContextTaskModel:
        """The same network and likelihood with a context; all of its weights are shared.

        With ``decoder="concatenate"`` the first Linear gets ``context_size`` more inputs, with weights drawn as torch
        draws those of a Linear of the new width.

        Args:
            model: a network model; its weights, those that are task-specific at the centre of their prior, are copied.
            context_size: c.
            decoder: as in :class:`ContextTaskModel`.
            seed: of the new weights; None means seed 0.

        Raises:
            OptionError: for a size that is no whole number, 0 or more.
            UnsupportedError: for anything but a Sequential that begins with a Linear.
            ModelError: for a network that FiLM cannot modulate.
        """
        _check_size(context_size)
        network = model.central_network()
        likelihood, covariates = copy.deepcopy(model.likelihood), model.prior.covariates  # like the weights
        if decoder == "film":
            return cls(network, likelihood, context_size, covariates=covariates, decoder=decoder, seed=seed)
        # in another module x may be used elsewhere too, and the context with it
        first = network[0] if type(network) is nn.Sequential and len(network) else network
        if type(first) is not nn.Linear:
            kind = type(first).__name__
            raise UnsupportedError(
                "A context is appended to the inputs of a Sequential that begins with a Linear, but the network begins "
                f"with {kind}. Give a network that takes [x, context] to bayesmeta.ContextTaskModel."
            )
        if context_size > 0:
            _widen(first, context_size, as_generator(seed, first.weight.device, "context"))
        return cls(network, likelihood, context_size, covariates=covariates, decoder=decoder)

    @property
    def _width_note(self) -> str:
        if self.decoder == "film":
            return " (of x alone: the context only scales and shifts)"
        return (
            f" ([x, context], as a context of {self.context_size} stands beside x; a NeuralTaskModel that is given to "
            "a neural process or CAVIA has that of x alone, and the rest is added)"
        )

    def _forward(self, u: Tensor, x: Tensor) -> Tensor:
        if self.decoder == "film":
            return self.network(x, u)
        shape = (*u.shape[:-2], *x.shape[:-1])
        context = u.unsqueeze(-2).expand(*shape, u.shape[-1])
        return self.network(torch.cat([x.expand(*shape, x.shape[-1]), context], -1))


def _check_size(context_size: Any) -> None:
    if not is_whole(context_size, 0):
        raise OptionError(f"context_size must be a whole number, 0 or more; got {context_size!r}.")


def _widen(linear: nn.Linear, extra: int, generator: torch.Generator) -> None:
    """Add inputs to a Linear, in place."""
    old = linear.weight.detach()
    bound = (old.shape[1] + extra) ** -0.5
    new = torch.empty(old.shape[0], extra, dtype=old.dtype, device=old.device).uniform_(
        -bound, bound, generator=generator
    )
    linear.weight = nn.Parameter(torch.cat([old, new], 1))
    linear.in_features += extra
