"""PLATIPUS: MAML from a start that is drawn, near to where the support's gradient points.

Source: C. Finn, K. Xu, S. Levine, "Probabilistic Model-Agnostic Meta-Learning", NeurIPS 2018,
https://arxiv.org/abs/1806.02817: section 4 (the model and its two bounds), algorithms 1 (training) and 2 (test).
Here ϑ is a task's start, the θ of the paper, since θ is everything meta-learned in this package.

    p(ϑ | S)    = N(μ − γ_p ∇L(μ; S), σ²)
    q(ϑ | S, Q) = N(μ − γ_q ∇L(μ; S ∪ Q), v)               L: −(1/n) Σ log p(y | x, ·) over the n observations given
    φ(ϑ)        = K gradient steps on L(·; S) from ϑ
    loss        = E_q[−log p(Q | φ(ϑ))] + KL(q(ϑ | S, Q) ‖ p(ϑ | S)) ≥ −log E_{p(ϑ | S)} p(Q | φ(ϑ))
    test        : ϑ ~ p(ϑ | S), φ = φ(ϑ)

There are two bounds. ``bound="conditional"`` is the one above, which the paper trains: p(ϑ | S) makes up for the
point estimate φ(ϑ) in place of p(φ | S, ϑ). ``bound="prior"`` is the one that the paper begins with, whose prior
N(μ, σ²) does not look at the support (γ_p = 0): its start at test time is drawn from that prior.

Departures: q looks at S ∪ Q (``inference="query"``: at Q alone, as we read algorithm 1); gradients are of means over
the observations, so that the rates do not depend on the shots; the meta-gradient goes through all gradients, those of
the two means included; γ_p and γ_q are learned numbers that may become negative, one for all parameters, or one each
with ``learn="parameter"``. The model's own prior on φ is not used (p(ϑ) takes its place), other than as first value of
μ, unless inner steps climb the joint. A posterior is a fixed number of draws, not a density: it is no Pyro guide.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesmeta.adapt.base import MethodCard, per_observation
from bayesmeta.adapt.gradient import GradientMethod, Objective
from bayesmeta.adapt.maml import MAML
from bayesmeta.adapt.recompute import maybe_recomputed
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import OptionError
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.random import normal_like
from bayesmeta.posteriors.samples import ParticlesPosterior

Bound = Literal["conditional", "prior"]
Inference = Literal["union", "query"]
Learn = Literal["one", "parameter"]


class Platipus(GradientMethod):
    """PLATIPUS (Finn, Xu, Levine 2018): a Gaussian over MAML's start, trained by a variational bound.

    ``adapt`` draws ``num_samples`` starts from p(ϑ | S) and takes ``inner_steps`` gradient steps from each; the
    posterior holds what comes out, equally weighted. ``method.num_samples`` can be changed after training.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel`, or any Pyro program. μ begins at the centre of a network's prior,
            or at the mean of a program's prior in unconstrained space. A Point prior is enough.
        inner_steps: gradient steps on the support.
        inner_lr: step size, for an objective that is a mean over the support's observations.
        objective: what the steps climb: ``"likelihood"``, or ``"joint"`` with the prior. The means of p and q move
            along the same gradient.
        bound: ``"conditional"``: the prior of the start looks at the support; ``"prior"``: it does not.
        inference: what q looks at in training: ``"union"`` of support and query, or ``"query"``.
        scale: first σ and √v, of every parameter.
        gamma: first γ_p and γ_q; by default ``inner_lr``.
        learn: γ_p and γ_q are ``"one"`` number each, or one for each ``"parameter"``.
        num_samples: draws that a posterior holds, for all draws of the global sites together.
        num_outer_samples: draws of the start for each estimate of the loss.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.

    Raises:
        OptionError: for an unknown name, or numbers out of range.
    """

    card = MethodCard(
        assumes="any model; a start point is enough",
        posterior="draws: K gradient steps from starts drawn near the support's gradient",
        cost="adapt (K + 1) gradients, K of num_samples draws; train 2–3 × (K + 2)",
        source="Finn, Xu, Levine 2018",
    )

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int = 1,
        inner_lr: float = 0.01,
        objective: Objective = "likelihood",
        bound: Bound = "conditional",
        inference: Inference = "union",
        scale: float = 0.03,
        gamma: float | None = None,
        learn: Learn = "one",
        num_samples: int = 20,
        num_outer_samples: int = 1,
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(
            model,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            objective=objective,
            first_order=False,
            step_weights="last",
            global_guide=global_guide,
        )
        known = {"bound": ("conditional", "prior"), "inference": ("union", "query"), "learn": ("one", "parameter")}
        for (name, names), value in zip(known.items(), (bound, inference, learn)):
            if value not in names:
                raise OptionError(f"Unknown {name} {value!r}; expected {names[0]!r} or {names[1]!r}.")
        if not scale > 0 or num_samples < 1 or num_outer_samples < 1:
            raise OptionError(
                f"scale must be > 0, num_samples and num_outer_samples ≥ 1; got {scale}, {num_samples} and "
                f"{num_outer_samples}."
            )
        self.bound: Bound = bound
        self.inference: Inference = inference
        self.scale = scale
        self.gamma = inner_lr if gamma is None else gamma
        self.learn: Learn = learn
        self.num_samples = num_samples
        self.num_outer_samples = num_outer_samples
        #: what a warm start brings: tensors of a MAML that :meth:`_create` copies
        self._warm: dict[str, Any] = {}

    @classmethod
    def from_maml(cls, maml: MAML, **options: Any) -> Platipus:
        """A PLATIPUS whose μ, inner steps and all else that is learned are those of a MAML, trained or not.

        Args:
            maml: it is copied, and not changed by what follows.
            options: of this class; ``inner_steps``, ``inner_lr``, ``objective`` and ``global_guide`` are the MAML's
                unless given here.

        Raises:
            OptionError: for another method than a MAML, or one with ``first_order=True``.
        """
        if type(maml) is not MAML or maml.first_order:
            found = "one with first_order=True" if type(maml) is MAML else type(maml).__name__
            raise OptionError(f"from_maml takes a bayesmeta.MAML with second derivatives; got {found}.")
        names = ("inner_steps", "inner_lr", "objective", "global_guide")
        method = cls(copy.deepcopy(maml.program), **({name: getattr(maml, name) for name in names} | options))
        if maml.start is not None:
            method._warm["start"] = maml.start.detach().clone()
        if maml.theta_guide is not None and maml.global_kind == method.global_kind:
            method._warm["theta_guide"] = copy.deepcopy(maml.theta_guide.state_dict())
        return method.train(maml.training)

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        names = (
            "inner_steps", "inner_lr", "objective", "bound", "inference", "scale", "gamma", "learn", "num_samples",
            "num_outer_samples",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"global_guide": self.global_kind}

    def _create(self, observations: Observations) -> None:
        super()._create(observations)
        if "start" in self._warm and self.start is not None:
            self.start.data.copy_(self._warm["start"])
        if "theta_guide" in self._warm and self.theta_guide is not None:
            self.theta_guide.load_state_dict(self._warm["theta_guide"])
        each = self._start(observations)[0].detach()
        rate = (each if self.learn == "parameter" else each.new_zeros(())).clone()
        self.log_scale = nn.Parameter(torch.full_like(each, self.scale).log())
        self.log_scale_q = nn.Parameter(torch.full_like(each, self.scale).log())
        self.gamma_q = nn.Parameter(torch.full_like(rate, self.gamma))
        self.gamma_p = nn.Parameter(torch.full_like(rate, self.gamma)) if self.bound == "conditional" else None

    # -- starts and steps ---------------------------------------------------------------------------------------

    def _shifted(
        self, centre: Tensor, observations: Observations, theta: Tensor | None, rate: Tensor | None, create_graph: bool
    ) -> Tensor:
        """μ − γ ∇L(μ; observations), in the shape of ``centre``, ``[G, tasks, D]``."""
        if rate is None or observations.shots == 0:
            return centre
        rate = rate if create_graph else rate.detach()
        share = per_observation(observations)[:, None]
        return centre + rate * share * self.inner_gradient(centre, observations, theta, create_graph)

    def _climbed(self, u: Tensor, support: Observations, theta: Tensor | None, create_graph: bool) -> Tensor:
        """φ after the inner steps from u ``[n, G, tasks, D]``."""
        if support.shots == 0:
            return u
        rate = self.inner_lr * per_observation(support)[:, None]

        def step(u: Tensor) -> Tensor:
            return u + rate * self.inner_gradient(u, support, theta, create_graph)

        for _ in range(self.inner_steps):
            u = maybe_recomputed(self.checkpoint_inner and create_graph, step, u)
        return u

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> ParticlesPosterior:
        centre = self._start_for(support, theta, create_graph)
        mean = self._shifted(centre, support, theta, self.gamma_p, create_graph)
        each = -(-self.num_samples // len(centre))
        u = mean + self.log_scale.exp() * normal_like(mean, (each, *mean.shape), generator)
        u = self._climbed(u, support, theta, create_graph)
        u = u if create_graph else u.detach()
        if theta is not None:
            theta = theta.expand(each, *theta.shape).flatten(0, 1)
        return ParticlesPosterior(self.program, support, u.flatten(0, 1), theta)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        centre = self._start_for(batch.support, theta, create_graph=True)
        seen = batch.union() if self.inference == "union" else batch.query
        prior_mean = self._shifted(centre, batch.support, theta, self.gamma_p, create_graph=True)
        mean = self._shifted(centre, seen, theta, self.gamma_q, create_graph=True)
        noise = normal_like(mean, (self.num_outer_samples, *mean.shape), generator)
        u = self._climbed(mean + self.log_scale_q.exp() * noise, batch.support, theta, create_graph=True)
        misfit = -self.program.log_likelihood(u, batch.query, theta).sum(-1).mean(0)
        return (misfit + _kl(mean - prior_mean, self.log_scale_q, self.log_scale))[0]


def _kl(difference: Tensor, log_scale_q: Tensor, log_scale_p: Tensor) -> Tensor:
    """KL of diagonal Gaussians whose means differ by ``difference``, summed over the last dimension."""
    log_ratio = 2.0 * (log_scale_q - log_scale_p)
    distance = (difference * (-log_scale_p).exp()).square()
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + distance).sum(-1)
