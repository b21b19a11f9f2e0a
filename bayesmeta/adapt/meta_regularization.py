"""Meta-regularisation: noise and a KL penalty on what reaches the prediction without passing through the support.

Source: M. Yin, G. Tucker, M. Zhou, S. Levine, C. Finn, "Meta-Learning without Memorization", ICLR 2020,
https://arxiv.org/abs/1912.03820, section 4 (on activations, and on weights), and the notebooks that the authors
released. With e the embedding of the inputs, which is not adapted, and β the weight:

    weights:      W ~ N(m, diag(s²)), x → e_W(x)         loss + β KL(N(m, diag(s²)) ‖ N(0, r² I))
    activations:  z ~ N(e(x), diag(s(x)²)), x → z        loss + β Σ_{x ∈ Q} KL(N(e(x), diag(s(x)²)) ‖ N(0, r² I))

An ELBO of S ∪ Q (Amortised, SemiAmortised) scores the support's points as well, and the sum is then over x ∈ S ∪ Q:
where they are cut changes nothing. The loss is the method's own, in nats a task. On weights the penalty comes once, not
once a task: with β = 1 / N for N tasks, it is the variational bound on all tasks with W integrated out. On activations
it comes at each point that the loss scores, as a log-likelihood does. As in the notebooks, all of x, that of the
support included, goes through the embedding; what stands behind it (MAML's adapted weights; a process's encoder and
decoder) has neither noise nor penalty.

Departures: W is drawn for each task of a batch, once for support and query, where the paper has one draw for the batch
(the same mean with less variance) and the notebook one for each pass; biases have noise and KL as weights do, where the
notebook leaves them out; the KL on activations is summed over z and over the points, as the likelihood is, where the
notebook averages both. After training the mean of W, or of z, is used: so does the notebook for activations under MAML,
while it draws W.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.models.embedding import EmbeddedModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.batched import BatchedMLP, BatchedModule, FlatParameters, is_plain_mlp
from bayesmeta.ops.random import normal_like

Kind = Literal["weights", "activations"]


@dataclass(frozen=True)
class MetaRegularization:
    """What keeps a method from memorising tasks that one network can solve without their supports (Yin et al. 2020).

    An option of :class:`~bayesmeta.MAML` and of the amortised methods, on an :class:`~bayesmeta.EmbeddedModel`: in
    training its embedding gets Gaussian noise, and the loss a penalty on what passes through it. In evaluation mode
    there is neither: the embedding is its mean, and the loss the method's own. Noise and penalty are part of
    ``loss``, not of ``model`` and ``guide``.

    Args:
        kind: ``"weights"``: noise on the embedding's weights; ``"activations"``: on what it gives.
        weight: β, 0 or more, in the units of nats a task. 0 leaves the noise, which is then learned away.
        scale: first standard deviation of the noise.
        prior_scale: r, standard deviation of the Gaussian around 0 that the KL is to.

    Raises:
        OptionError: for an unknown kind, and numbers out of range.
    """

    kind: Kind
    weight: float
    scale: float = 0.1
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise OptionError(f"kind is {' or '.join(map(repr, get_args(Kind)))}; got {self.kind!r}.")
        if not 0 <= self.weight < math.inf:
            raise OptionError(f"weight must be 0 or more, and finite; got {self.weight}.")
        for name in ("scale", "prior_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be positive and finite; got {getattr(self, name)}.")

    def config(self) -> dict[str, Any]:
        """Options as plain values."""
        return asdict(self)


class EmbeddingNoise(nn.Module):
    """The noise of a model's embedding, and its penalty.

    Args:
        options: kind, weight and scales.
        program: whose embedding it is.

    Raises:
        OptionError: for options of another class.
        UnsupportedError: for a model without an embedding, or on activations for one that ends in no Linear.
    """

    def __init__(self, options: MetaRegularization, program: TaskProgram) -> None:
        super().__init__()
        if not isinstance(options, MetaRegularization):
            raise OptionError(f"meta_regularization is a bm.MetaRegularization or None; got {options!r}.")
        if not isinstance(program, EmbeddedModel):
            raise UnsupportedError(
                "Meta-regularisation limits what passes through an embedding that is not adapted, and this model has "
                "none. Use bm.EmbeddedModel(model, embedding): the first layers are the embedding, the others the "
                "model."
            )
        self.options = options
        if options.kind == "weights":
            weights = dict(program.embedding.named_parameters())
            self._flat = FlatParameters({name: weight.shape for name, weight in weights.items()})
            like = next(iter(weights.values())).detach()
            self.log_scale = nn.Parameter(like.new_full((self._flat.size,), math.log(options.scale)))
            return
        last = program.embedding[-1] if type(program.embedding) is nn.Sequential and len(program.embedding) else None
        if type(last) is not nn.Linear:
            raise UnsupportedError(
                "Noise on activations needs an embedding that is a Sequential and ends in a Linear, beside which "
                f"another gives the noise; got {type(program.embedding).__name__}. Use kind='weights', or add a Linear."
            )
        self.spread = nn.Linear(last.in_features, last.out_features).to(last.weight)
        with torch.no_grad():
            self.spread.weight.zero_()
            self.spread.bias.fill_(math.log(math.expm1(options.scale)))

    def extra_repr(self) -> str:
        """The options, shown when the method is printed."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.config().items())

    def forward(
        self, program: EmbeddedModel, batch: TaskBatch, generator: torch.Generator, scores_support: bool = False
    ) -> tuple[TaskBatch, Tensor | None]:
        """The batch with a draw of the embedded inputs for x, and the penalty of each task.

        Args:
            program: the model.
            batch: with raw inputs.
            generator: of the noise.
            scores_support: whether the loss scores the support's targets too; on activations the KL is then of all.

        Returns:
            The batch, and β KL in nats, ``[tasks]``, or None where β is 0. On weights it is the same for all tasks.
        """
        if self.options.kind == "weights":
            seen, kl = self._weights(program.embedding, batch, generator)
        else:
            scored = torch.cat([batch.support.full_mask() & scores_support, batch.query.full_mask()], 1)
            seen, kl = self._activations(program.embedding, batch, scored, generator)
        shots = batch.support.shots
        embedded = replace(
            batch, support=_with_x(batch.support, seen[:, :shots]), query=_with_x(batch.query, seen[:, shots:])
        )
        return embedded, self.options.weight * kl if self.options.weight > 0 else None

    def _weights(self, embedding: nn.Module, batch: TaskBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        loc, scale = self._flat.flatten(dict(embedding.named_parameters())), self.log_scale.exp()
        weights = loc + scale * normal_like(loc, (batch.num_tasks, self._flat.size), generator)
        call = (BatchedMLP if is_plain_mlp(embedding) else BatchedModule)(embedding, self._flat)
        return call(weights, _all_x(batch)), self._kl(loc, scale).sum().expand(batch.num_tasks)

    def _activations(
        self, embedding: nn.Module, batch: TaskBatch, scored: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(embedding, nn.Sequential)
        hidden = embedding[:-1](_all_x(batch))
        loc, scale = embedding[-1](hidden), nn.functional.softplus(self.spread(hidden))
        kl = torch.where(scored, self._kl(loc, scale).sum(-1), 0.0).sum(-1)
        return loc + scale * normal_like(loc, loc.shape, generator), kl

    def _kl(self, loc: Tensor, scale: Tensor) -> Tensor:
        """KL of each number to the prior."""
        prior = Normal(torch.zeros_like(loc), self.options.prior_scale, validate_args=False)
        return kl_divergence(Normal(loc, scale, validate_args=False), prior)


def _all_x(batch: TaskBatch) -> Tensor:
    """Inputs of support and query, side by side along the shots."""
    return torch.cat([batch.support.x, batch.query.x], 1)


def _with_x(observations: Observations, x: Tensor) -> Observations:
    return replace(observations, x=x)
