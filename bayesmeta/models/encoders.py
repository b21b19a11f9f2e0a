"""Encoders: networks that read the observations of each task and give one vector for it.

All take :class:`~bayesmeta.Observations` and give ``[tasks, size]``. Padding never counts, on a CPU to the last bit.
All but the recurrent one are invariant to the order of a task's observations, to the last bit too: see
:mod:`bayesmeta.ops.sets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, OptionError, ShapeError
from bayesmeta.models.attention import AttentionBlock
from bayesmeta.models.nets import mlp
from bayesmeta.ops import sets
from bayesmeta.ops.capturing import is_capturing

Covariance = Literal["diagonal", "full"]


class Encoder(nn.Module):
    """Base of encoders. One of your own defines :meth:`forward` and calls :meth:`rows` for what it reads.

    Args:
        features: width of x.
        outputs: targets of a shot: 1 for y of shape ``[tasks, shots]``.
        size: R, the width of what it gives.
        given: width of what else it reads for each task, repeated at every observation; 0 for nothing.
        classes: of class labels, how many there are: each label is read as one-hot. None: y is read as numbers.
        counts: whether y is counts, of which log(1 + y) is read.
        max_shots: more observations of a task than this are refused; None for no bound.
        sort: whether observations are put in a canonical order first, by one stable sort for each column of [x, y].
            Without it the order matters in the last bits.

    Raises:
        OptionError: for sizes below 1, or classes and counts together.
    """

    #: whether the order of observations counts
    ordered = False

    def __init__(
        self,
        features: int,
        outputs: int,
        size: int,
        *,
        given: int = 0,
        classes: int | None = None,
        counts: bool = False,
        max_shots: int | None = None,
        sort: bool = True,
    ) -> None:
        super().__init__()
        whole = {"features": features, "outputs": outputs, "size": size}
        whole |= {} if classes is None else {"classes": classes}
        whole |= {} if max_shots is None else {"max_shots": max_shots}
        for name, value in whole.items():
            if value < 1:
                what = " (a latent of size 0 says nothing)" if name == "size" else ""
                raise OptionError(f"{name} of an encoder must be at least 1{what}; got {value}.")
        if given < 0 or (classes is not None and counts):
            raise OptionError(f"given is 0 or more, and targets are classes or counts, not both; got given={given}.")
        self.features, self.outputs, self.size, self.given = features, outputs, size, given
        self.classes, self.counts, self.max_shots, self.sort = classes, counts, max_shots, sort

    @property
    def width(self) -> int:
        """Width of a row: features, targets, and what else is given."""
        return self.features + self.outputs * (self.classes or 1) + self.given

    def extra_repr(self) -> str:
        """The sizes, shown when the encoder is printed."""
        return f"features={self.features}, outputs={self.outputs}, size={self.size}, given={self.given}"

    def forward(self, observations: Observations, given: Tensor | None = None) -> Tensor:
        """One vector for each task, ``[…, tasks, size]``.

        Args:
            observations: ``[tasks, shots, …]`` with targets.
            given: what else is read, ``[…, tasks, given]``; its leading dimensions are those of the result.

        Raises:
            ShapeError: for another width than the encoder's, or more shots than ``max_shots``.
            DataError: for observations without targets.
        """
        raise NotImplementedError

    def check(self, observations: Observations, given: Tensor | None = None) -> None:
        """Check that the encoder can read these observations.

        Raises:
            ShapeError, DataError: as :meth:`forward`.
        """
        y = observations.y
        if y is None:
            raise DataError("An encoder reads targets; these observations have y=None.")
        outputs = 1 if y.dim() == 2 else y.shape[-1]
        if (observations.num_features, outputs) != (self.features, self.outputs):
            raise ShapeError(
                f"The encoder reads {self.features} feature(s) and {self.outputs} target(s) a shot; got x of shape "
                f"{list(observations.x.shape)} and y of shape {list(y.shape)}. Make one for these widths."
            )
        width = 0 if given is None else given.shape[-1]
        if width != self.given:
            raise ShapeError(
                f"The encoder reads {self.given} number(s) more for each task (given={self.given}); got {width}."
            )
        if self.max_shots is not None and observations.shots > self.max_shots:
            longest = int(observations.full_mask().sum(-1).max())  # padding takes no memory worth a refusal
            if longest > self.max_shots:
                raise ShapeError(
                    f"A task has {longest} observations; this encoder was bounded to max_shots={self.max_shots}. Give "
                    "fewer, or make the encoder with a larger bound."
                )

    def rows(self, observations: Observations, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the network reads: rows ``[…, tasks, n, width]`` in their order, padding last and 0, and their mask.

        On a CPU n is the number of observations of the longest task, so that padding changes no bit of what follows;
        elsewhere, where reading that number would wait for the device, it is the padded one, as it is in a graph.
        """
        self.check(observations, given)
        x, y = observations.x, observations.y
        assert y is not None
        y = y.unsqueeze(-1) if y.dim() == 2 else y
        if self.classes is not None:
            y = (y.unsqueeze(-1) == torch.arange(self.classes, device=y.device)).flatten(-2)
        elif self.counts:
            y = y.to(x.dtype).clamp(min=0).log1p()
        mask = observations.full_mask()
        # + 0.0 makes −0.0, which sorts like 0.0, the same number
        rows = torch.cat([x, y.to(x.dtype)], -1).masked_fill(~mask.unsqueeze(-1), 0.0) + 0.0
        sort = self.sort and not self.ordered and rows.shape[-2] > 1  # one row is in order
        order = sets.lexicographic_order(rows, mask) if sort else sets.padding_last(mask)
        rows, mask = sets.take_rows(rows, order), mask.gather(-1, order)
        if observations.mask is not None and x.device.type == "cpu" and observations.num_tasks and not is_capturing():
            longest = int(mask.sum(-1).max())
            rows, mask = rows[:, :longest].contiguous(), mask[:, :longest].contiguous()
        if given is None:
            return rows, mask
        lead = given.shape[:-1]
        more = given.unsqueeze(-2).expand(*lead, rows.shape[-2], self.given)
        return torch.cat([rows.expand(*lead, *rows.shape[-2:]), more * mask.unsqueeze(-1)], -1), mask


class PooledEncoder(Encoder):
    """A network on each observation, attention among them if asked, then a mean, sum or maximum (deep sets).

    r = g([pool_i h(x_i, y_i), log(1 + n)]), with h an MLP, then ``blocks`` blocks of attention, and g an affine map.
    The number n of observations is read too, as a mean or maximum alone would not tell one observation from a hundred.
    The empty set has a vector of its own, ``empty``, that is learned.

    Source: M. Zaheer et al., "Deep Sets", NeurIPS 2017, https://arxiv.org/abs/1703.06114, theorem 2; the mean as in
    M. Garnelo et al., "Neural Processes", 2018, https://arxiv.org/abs/1807.01622, section 2.2. Log(1 + n) and the
    vector of the empty set are ours. For attention see :class:`~bayesmeta.models.attention.AttentionBlock`.

    Args:
        features, outputs, size: as in :class:`Encoder`.
        hidden: widths of h's layers; the last is the width of what is pooled.
        pool: ``"mean"``, ``"sum"`` or ``"max"``.
        blocks: blocks of attention behind h.
        block: ``"transformer"``: attention and a feed-forward part; ``"attention"``: attention alone.
        heads: of attention; they share the last width of ``hidden``.
        activation: of h, as in :func:`bayesmeta.nets.mlp`.
        options: ``given``, ``classes``, ``counts``, ``max_shots`` and ``sort``, as in :class:`Encoder`. Attention takes
            memory that grows with the square of the shots.

    Raises:
        OptionError: for unknown names, and sizes out of range.
    """

    def __init__(
        self,
        features: int,
        outputs: int = 1,
        size: int = 64,
        *,
        hidden: Sequence[int] = (64, 64),
        pool: sets.Pool = "mean",
        blocks: int = 0,
        block: Literal["transformer", "attention"] = "transformer",
        heads: int = 4,
        activation: str = "gelu",
        **options: int | bool | None,
    ) -> None:
        super().__init__(features, outputs, size, **options)  # type: ignore[arg-type]
        if pool not in get_args(sets.Pool):
            raise OptionError(f"Unknown pool {pool!r}; expected one of {', '.join(map(repr, get_args(sets.Pool)))}.")
        if block not in ("transformer", "attention"):
            raise OptionError(f"Unknown block {block!r}; expected 'transformer' or 'attention'.")
        if not hidden or min(hidden) < 1 or blocks < 0:
            raise OptionError(f"hidden needs widths of at least 1, and blocks is 0 or more; got {hidden}, {blocks}.")
        inner = hidden[-1]
        self.pool: sets.Pool = pool
        self.embed = mlp(self.width, hidden[:-1], inner, activation=activation)
        wide = 2 * inner if block == "transformer" else None
        self.blocks = nn.ModuleList(AttentionBlock(inner, heads, wide) for _ in range(blocks))
        self.read = nn.Linear(inner + 1, size)
        self.empty = nn.Parameter(torch.zeros(size))

    def forward(self, observations: Observations, given: Tensor | None = None) -> Tensor:
        """One vector for each task, ``[…, tasks, size]``; the learned ``empty`` where there is no observation."""
        rows, mask = self.rows(observations, given)
        if rows.shape[-2] == 0:
            return self.empty.expand(*rows.shape[:-2], self.size)
        h = self.embed(rows)
        for block in self.blocks:
            h = block(h, mask)
        pooled = sets.pool(h, mask, self.pool)
        count = mask.sum(-1, keepdim=True).to(h.dtype).log1p()
        r = self.read(torch.cat([pooled, count.expand(*pooled.shape[:-1], 1)], -1))
        return torch.where(mask.any(-1, keepdim=True), r, self.empty)


class RecurrentEncoder(Encoder):
    """A GRU that reads the observations in the order in which they stand: for what comes in time.

    It is **not** invariant to their order. Padding may stand anywhere and is left out. The empty set has the GRU's
    learned first state.

    Source: K. Cho et al., "Learning Phrase Representations using RNN Encoder–Decoder for Statistical Machine
    Translation", EMNLP 2014, https://arxiv.org/abs/1406.1078, section 2.3; as a belief over tasks, L. Zintgraf et al.,
    "VariBAD", ICLR 2020, https://arxiv.org/abs/1910.08348, section 3.

    Args:
        features, outputs, size: as in :class:`Encoder`.
        hidden: width of the state.
        options: ``given``, ``classes``, ``counts`` and ``max_shots``, as in :class:`Encoder`.

    Raises:
        OptionError: for sizes out of range.
    """

    ordered = True

    def __init__(
        self, features: int, outputs: int = 1, size: int = 64, *, hidden: int = 64, **options: int | bool | None
    ) -> None:
        super().__init__(features, outputs, size, **options)  # type: ignore[arg-type]
        if hidden < 1:
            raise OptionError(f"hidden of a recurrent encoder must be at least 1; got {hidden}.")
        self.recurrence = nn.GRU(self.width, hidden, batch_first=True)
        self.first = nn.Parameter(torch.zeros(hidden))
        self.read = nn.Linear(hidden, size)

    def prefixes(self, observations: Observations, given: Tensor | None = None) -> Tensor:
        """What it gives after each of the first 0, 1, …, n observations, ``[…, tasks, n + 1, size]``.

        Real observations alone are counted; the entries behind a task's last observation are those of padding.
        """
        rows, _ = self.rows(observations, given)
        lead, shots = rows.shape[:-2], rows.shape[-2]
        first = self.first.expand(lead.numel(), -1)
        states = first.unsqueeze(1)
        if shots:
            after, _ = self.recurrence(rows.reshape(-1, shots, self.width), first.unsqueeze(0).contiguous())
            states = torch.cat([states, after], 1)
        return self.read(states.reshape(*lead, *states.shape[1:]))

    def forward(self, observations: Observations, given: Tensor | None = None) -> Tensor:
        """What it gives after a task's last observation, ``[…, tasks, size]``."""
        each = self.prefixes(observations, given)
        last = observations.full_mask().sum(-1)[:, None, None].expand(*each.shape[:-2], 1, self.size)
        return each.gather(-2, last).squeeze(-2)


class ProductEncoder(Encoder):
    """Each observation gives a Gaussian factor over a latent; their product with a standard normal prior is the result.

    The prior is one of the factors, so that the empty set gives the prior exactly, and each observation can only add
    precision. Updating by one more observation is one more factor.

    Source: K. Rakelly et al., "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context Variables"
    (PEARL), ICML 2019, https://arxiv.org/abs/1903.08254, section 4.1. Departures: the prior is a factor (there it is
    not); the network gives precision and precision times mean, so that a factor may say nothing; an affine map stands
    beside it. With correlations (``covariance="full"``, ours) an observation is read as ``rank`` numbers t = Aᵀ z +
    noise of variance 1: the factor has the precision matrix A Aᵀ, and A t is that times its mean. So the exact
    posterior of a linear-Gaussian model has A and t affine in [x, y]. At first the factors are weak ones.

    Args:
        features, outputs: as in :class:`Encoder`.
        latent: D, the length of the latent.
        covariance: ``"diagonal"`` or ``"full"``.
        rank: of each factor's precision matrix, of a full covariance.
        hidden: widths of the network's hidden layers.
        activation: of the network, as in :func:`bayesmeta.nets.mlp`. With a bounded one the factors are affine far from
            the data.
        options: ``given``, ``classes``, ``counts``, ``max_shots`` and ``sort``, as in :class:`Encoder`.

    Raises:
        OptionError: for a latent of size 0, unknown names, and sizes out of range.
    """

    #: softplus of it is a weak factor's precision
    _FIRST = -2.0

    def __init__(
        self,
        features: int,
        outputs: int = 1,
        latent: int = 4,
        *,
        covariance: Covariance = "diagonal",
        rank: int = 1,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        **options: int | bool | None,
    ) -> None:
        if latent < 1 or rank < 1:
            raise OptionError(
                "latent and rank of a ProductEncoder must be at least 1 (a latent of size 0 says nothing); got "
                f"{latent} and {rank}."
            )
        if covariance not in get_args(Covariance):
            raise OptionError(f"Unknown covariance {covariance!r}; expected 'diagonal' or 'full'.")
        full = covariance == "full"
        size = latent + (latent**2 if full else latent)
        super().__init__(features, outputs, size, **options)  # type: ignore[arg-type]
        self.latent, self.covariance, self.rank = latent, covariance, rank
        outputs = rank + latent * rank if full else 2 * latent
        self.network = mlp(self.width, hidden, outputs, activation=activation)
        self.affine = nn.Linear(self.width, outputs)
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            for layer in (last, self.affine):
                layer.weight.mul_(0.3)
                layer.bias.zero_()
            if not full:
                last.bias[latent:] = self._FIRST

    def factors(self, observations: Observations, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The factors in their canonical order, and their mask.

        Returns:
            Precision times mean ``[…, tasks, n, D]``; precision ``[…, tasks, n, D]``, or A ``[…, tasks, n, D, rank]``
            with the precision matrix A Aᵀ; the mask ``[tasks, n]``.
        """
        rows, mask = self.rows(observations, given)
        out = self.network(rows) + self.affine(rows)
        if self.covariance == "diagonal":
            information, precision = out.chunk(2, -1)
            return information, nn.functional.softplus(precision), mask
        target, rest = out.tensor_split([self.rank], -1)
        factor = rest.unflatten(-1, (self.latent, self.rank))
        return (factor @ target.unsqueeze(-1)).squeeze(-1), factor, mask

    def gaussian(self, observations: Observations, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The product: mean ``[…, tasks, D]``, and standard deviation or Cholesky factor of the covariance."""
        information, precision, mask = self.factors(observations, given)
        if self.covariance == "diagonal":
            return sets.product_of_gaussians(information, precision, mask, 0.0, 1.0)
        return sets.product_of_correlated_gaussians(information, precision, mask)

    def forward(self, observations: Observations, given: Tensor | None = None) -> Tensor:
        """Mean, then standard deviations or the entries of the Cholesky factor, ``[…, tasks, size]``."""
        loc, spread = self.gaussian(observations, given)
        return torch.cat([loc, spread if self.covariance == "diagonal" else spread.flatten(-2)], -1)
