"""VERSA: the last layer of a learned feature map, from one pass of a network over the support's features.

Source: J. Gordon, J. Bronskill, M. Bauer, S. Nowozin, R. Turner, "Meta-Learning Probabilistic Inference for
Prediction", ICLR 2019, https://arxiv.org/abs/1805.09921: the objective (ML-PIP) in section 2, the context-independent
posterior of classes in section 3, regression in section 5.1.

    marginal:    −Σ_q log (1/L) Σ_l p(y_q | x_q, φ_l),   φ_l ~ q(φ | S)
    predictive:  −log (1/L) Σ_l p(Q | φ_l)
    regression:  q(φ | S) from the pool of [h(x), y] over the support
    classes:     q(φ | S) = Π_k q(φ_k | {h(x): y = k}), one network for all classes

Departures: q is given relative to the model's prior, in its units, and is the prior at first and without support; of
classes, relative to the mean over classes of the prior's means and log standard deviations, so that no class is
another's superior. The network reads how many observations were pooled. The loss is summed over a task's query points,
where the paper and its code (https://github.com/Gordonjo/versa) take their mean: it is in nats a task here. φ is drawn
once for a task and all of its query, where the code draws the outputs at each query point by themselves; of the
marginal loss that is the same in expectation. What is pooled comes from a network on each feature vector, and another
reads the pool, where the code for classes takes the mean of the features themselves. ``"predictive"``, for the query's
points together, is ours, and so is training on random parts of the support.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bayesmeta.adapt.amortised import Amortised, encoder_targets, log_predictive, part_of
from bayesmeta.adapt.base import MethodCard
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, OptionError, UnsupportedError
from bayesmeta.models.encoders import PooledEncoder
from bayesmeta.models.likelihoods import Categorical
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.priors import Normal
from bayesmeta.models.recognition import Recognised, Recognition
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops import sets
from bayesmeta.ops.random import Seed, as_generator, forked_rng

Objective = Literal["marginal", "predictive"]


class Versa(Amortised):
    """VERSA (Gordon et al. 2019): a diagonal Gaussian over the last layer, by a network that reads features.

    With a :class:`~bayesmeta.likelihoods.Categorical` likelihood the weights of a class come from the mean features of
    that class alone: other names for the classes permute the predictions and change nothing else. A class without
    support has the prior's weights, and with them some probability; for tasks with another number of classes see
    :meth:`with_classes`. With any other likelihood features and targets are pooled together.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` made with ``task_modules="head"`` on a Sequential that ends in a
            Linear, and a prior with a density.
        objective: ``"marginal"``, the paper's: each query point by itself; or ``"predictive"``: a task's query
            together.
        pool: of what the network makes of each observation: ``"mean"``, ``"sum"`` or ``"max"``.
        num_particles: L.
        subsets: whether training replaces the support by a random part of it, of uniform size, so that q works at any
            number of shots. Of classes such a part often lacks some.
        width: of the network's layers.
        seed: of the network's first weights; None means seed 0.
        global_guide: posterior over the prior's global sites, where it has some.

    Raises:
        UnsupportedError: for another model, or a prior without a density.
        OptionError: for unknown names, or numbers out of range.
    """

    card = MethodCard(
        assumes="a network whose last Linear is φ, a prior with a density, many tasks",
        posterior="diagonal Gaussian over the last layer, from one pass over the support's features; class by class",
        cost="adapt one pass, no gradient; train one gradient",
        source="Gordon, Bronskill, Bauer, Nowozin, Turner 2019",
    )
    _objectives = get_args(Objective)

    def __init__(
        self,
        model: NeuralTaskModel,
        *,
        objective: Objective = "marginal",
        pool: sets.Pool = "mean",
        num_particles: int = 10,
        subsets: bool = False,
        width: int = 64,
        seed: Seed = None,
        global_guide: GlobalKind = "point",
    ) -> None:
        if not isinstance(model, NeuralTaskModel) or not model.is_linear_in_phi:
            found = f"task_modules={model.task_modules!r}" if isinstance(model, NeuralTaskModel) else type(model)
            raise UnsupportedError(
                "Versa infers the last layer from the features before it: it needs a NeuralTaskModel on a Sequential "
                f"of Linear and elementwise layers that ends in a Linear, with task_modules='head'; got {found}. "
                "Another program goes into Amortised."
            )
        if pool not in get_args(sets.Pool):
            raise OptionError(f"Unknown pool {pool!r}; expected one of {', '.join(map(repr, get_args(sets.Pool)))}.")
        super().__init__(
            model,
            pool,
            objective=objective,  # type: ignore[arg-type]
            num_particles=num_particles,
            subsets=subsets,
            width=width,
            seed=seed,
            global_guide=global_guide,
        )
        self.pool: sets.Pool = pool

    @property
    def model_program(self) -> NeuralTaskModel:
        """The program, as the kind it must be."""
        assert isinstance(self.program, NeuralTaskModel)
        return self.program

    @property
    def num_classes(self) -> int | None:
        """Of a Categorical likelihood; None of any other."""
        likelihood = self.model_program.likelihood
        return likelihood.num_classes if isinstance(likelihood, Categorical) else None

    def prepare(self, batch: TaskBatch | Observations) -> None:
        """As of other methods; labels beyond the number of classes name :meth:`with_classes`.

        Raises:
            DataError: for such labels.
            ModelError and its kinds, DataError and its kinds: when program and data do not fit.
        """
        sides = (batch.support, batch.query) if isinstance(batch, TaskBatch) else (batch,)
        for side in sides:
            if self.num_classes is not None and isinstance(side, Observations):
                _refuse_labels(side, self.num_classes)
        super().prepare(batch)

    # -- the recognition network --------------------------------------------------------------------------------

    def _create(self, observations: Observations) -> None:
        if self.recognition is not None:  # a copy of one that is trained
            return
        self._uses_w = observations.w is not None
        given = 0 if observations.w is None else observations.w.shape[-1]
        theta = None
        if self.theta_guide is not None:
            theta = self.theta_guide.centre()
            given += 0 if self.theta_guide.is_point else self.program.layout.theta_dim
        assert observations.y is not None
        size, outputs = self.program.layout.dim, 1 if observations.y.dim() == 2 else observations.y.shape[-1]
        options = encoder_targets(self.program, theta, observations)
        if self.num_classes is not None:
            size, outputs, options = size // self.num_classes, 1, {}
        with torch.no_grad():
            features = self._features(observations.x[:1]).shape[-1]
        width = self._recipe.width
        with forked_rng(as_generator(self._recipe.seed, observations.device, "versa")):
            options |= {"hidden": (width, width), "pool": self.pool, "sort": False}  # sorted before, by fewer columns
            encoder = PooledEncoder(features, outputs, width, **options)
            recognition = Recognition(encoder, size, "diagonal", given=given, hidden=width)
        self.recognition = recognition.to(observations.x)

    def _recognise(self, observations: Observations, theta: Tensor | None) -> Recognised:
        assert self.recognition is not None
        given = self._given(observations, theta)
        observations = canonical(observations)
        features = self._features(observations.x, observations.mask)
        if self.num_classes is None:
            return self.recognition(replace(observations, x=features), given)
        return self._each_class(features, observations, given, self.num_classes)

    def _features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What is read of x: what the last layer takes, and the logarithm of the exposure where there is one."""
        features = self.model_program.features(x)
        exposure = self.model_program.likelihood.split(x, mask)[1].get("exposure")
        return features if exposure is None else torch.cat([features, exposure.log().unsqueeze(-1)], -1)

    def _each_class(self, features: Tensor, observations: Observations, given: Tensor, classes: int) -> Recognised:
        """The weights of each class from its own features: every class of every task is a set."""
        assert self.recognition is not None
        assert observations.y is not None
        label = torch.arange(classes, device=features.device)[:, None]
        mask = (observations.y.unsqueeze(1) == label) & observations.full_mask().unsqueeze(1)
        x = features.unsqueeze(1).expand(-1, classes, -1, -1).flatten(0, 1)
        mask = mask.flatten(0, 1)
        each = Observations(x, mask.to(x.dtype), mask)  # its target says nothing: its class is which set it stands in
        v = self.recognition(each, given.repeat_interleave(classes, 1))
        loc, scale = (self._from_rows(part.unflatten(-2, (len(features), classes))) for part in (v.loc, v.spread))
        return Recognised(loc, scale, None)

    def _base(self, observations: Observations, theta: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, scale = super()._base(observations, theta)
        if self.num_classes is None:
            return loc, scale
        same = (self._to_rows(part).mean(-2, keepdim=True) for part in (loc, scale.log()))
        loc, log_scale = (self._from_rows(part.expand(*part.shape[:-2], self.num_classes, -1)) for part in same)
        return loc, log_scale.exp()

    def _to_rows(self, u: Tensor) -> Tensor:
        """φ by class, ``[…, classes, F + 1]``: a row of the weight matrix, and the bias if there is one."""
        assert self.num_classes is not None
        blocks = [u[..., part].unflatten(-1, (self.num_classes, -1)) for part in self.model_program.blocks.values()]
        return torch.cat(blocks, -1)

    def _from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`_to_rows`, ``[…, D]``."""
        sizes = [part.stop - part.start for part in self.model_program.blocks.values()]
        parts = rows.split([size // rows.shape[-2] for size in sizes], -1)
        return torch.cat([part.flatten(-2) for part in parts], -1)

    def with_classes(self, num_classes: int) -> Versa:
        """The same method for tasks with another number of classes, with copies of what was trained.

        The network of features and that of recognition do not know how many classes there are; the prior of each class
        is the one that they share here.

        Args:
            num_classes: of the new method's Categorical likelihood.

        Returns:
            A method of its own, as trained as this one.

        Raises:
            UnsupportedError: for a likelihood that is not Categorical, or a prior other than Normal or one with
                task-level covariates.
            OptionError: for fewer than 2 classes, or a method that has seen no data yet.
        """
        if self.recognition is None:
            raise OptionError("with_classes copies what was trained, and this method has seen no data yet.")
        old, prior = self.model_program, self.model_program.prior
        if self.num_classes is None or type(prior) is not Normal or prior.covariates:
            raise UnsupportedError(
                "with_classes is for a Categorical likelihood and the prior Normal without covariates; this model has "
                f"{type(old.likelihood).__name__} and {type(prior).__name__}."
            )
        network = old.central_network()
        assert isinstance(network, nn.Sequential)
        assert isinstance(network[-1], nn.Linear)
        bias = network[-1].bias is not None
        network[-1] = nn.Linear(network[-1].in_features, num_classes, bias=bias).to(network[-1].weight)
        fresh = Normal(learn_scale=prior.learn_scale)
        model = NeuralTaskModel(network, Categorical(num_classes), fresh, task_modules="head")
        options = {name: getattr(self, name) for name in ("objective", "pool", "num_particles", "subsets")}
        other = Versa(model, width=self._recipe.width, seed=self._recipe.seed, **options)
        with torch.no_grad():
            for name in ("loc", "log_scale"):
                row = self._to_rows(getattr(prior, name)).mean(-2, keepdim=True)
                getattr(fresh, name).copy_(other._from_rows(row.expand(num_classes, -1)))
        other.to(prior.loc)
        other.recognition, other._uses_w = copy.deepcopy(self.recognition), self._uses_w
        return other.train(self.training)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        support = part_of(batch.support, generator) if self.subsets and self.training else batch.support
        q, pointwise = self.infer(support, theta), self.objective == "marginal"
        return -log_predictive(self, q, batch.query, theta, generator, pointwise=pointwise).sum(-1)


def _refuse_labels(observations: Observations, num_classes: int) -> None:
    y = observations.y
    if y is None or y.dim() != 2 or not y.numel():
        return
    largest = int(torch.where(observations.full_mask() & y.isfinite(), y, 0).amax())
    if largest >= num_classes:
        raise DataError(
            f"There is a label {largest}, so at least {largest + 1} classes; this method has {num_classes}, labelled "
            f"from 0. method.with_classes({largest + 1}) makes of a trained one another for so many; before training "
            "give network and Categorical that many."
        )


def canonical(observations: Observations) -> Observations:
    """The same observations in the order of [x, y], padding last and 0; on a CPU cut to the longest task.

    So neither their order nor padding changes a bit of what follows: see :mod:`bayesmeta.ops.sets`.
    """
    x, y, mask = observations.x, observations.y, observations.full_mask()
    assert y is not None
    wide = y if y.dim() == 3 else y.unsqueeze(-1)
    # + 0.0 makes −0.0, which sorts like 0.0, the same number
    rows = torch.cat([x, wide.to(x.dtype)], -1).masked_fill(~mask.unsqueeze(-1), 0.0) + 0.0
    order = sets.lexicographic_order(rows, mask)
    x, wide = sets.take_rows(rows, order)[..., : x.shape[-1]], sets.take_rows(wide, order)
    mask, longest = mask.gather(-1, order), x.shape[1]
    if observations.mask is not None and x.device.type == "cpu" and observations.num_tasks:
        longest = int(mask.sum(-1).max())
    x, wide, mask = (part[:, :longest].contiguous() for part in (x, wide, mask))
    return replace(observations, x=x, y=wide if y.dim() == 3 else wide.squeeze(-1), mask=mask)
