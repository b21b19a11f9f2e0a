"""Settings of MAESN, see :mod:`bayesmeta.rl.maesn.learner`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from bayesmeta.errors import OptionError
from bayesmeta.rl.maesn.inner import Credit, Gradient
from bayesmeta.rl.policy_gradient.inner import Estimation
from bayesmeta.rl.policy_gradient.trpo import Product

#: How adapted policies act.
Adapted = Literal["sample", "mean"]


@dataclasses.dataclass(frozen=True)
class MAESNConfig:
    """Settings of MAESN.

    Attributes:
        inner_steps: policy-gradient steps on each task; at least 1.
        inner_lr: where the step sizes α of μ and log σ begin.
        learn_rates: learn α, a number for each dimension.
        gradient: of ω inside, see :mod:`bayesmeta.rl.maesn.inner`.
        credit: of latents inside, see :func:`~bayesmeta.rl.maesn.inner.episode_credit`.
        natural: inside, ω's natural gradient, see :func:`~bayesmeta.rl.maesn.inner.latent_step`.
        policy_lr: where the step sizes of θ inside begin; 0 leaves θ as it is, and is the paper's default.
        later_rates: what is left of a rate in each step beyond ``inner_steps`` (a half in the authors' program).
        kl_weight: w, of KL(q_{ω_i} ‖ p) in the outer objective, in the units of a step's standardised advantage.
        kl_ramp: iterations over which w rises from 0.
        omega_lr: rate of plain gradient steps of the ω_i on the outer objective, and the longest of them; 0: they take
            part in TRPO's step.
        prior_share: share of an iteration's tasks that begin at the prior instead of at their ω_i.
        prior_after: iterations before that begins; until then all begin at their ω_i.
        adapted: how adapted policies act in the outer objective and in evaluation, with latents drawn from their q
            (``"sample"``) or at its mean (``"mean"``). What an inner step reads is always drawn.
        inner_reward, train_reward: which reward each reads, see the head of this module.
        first_order: leave out the second derivative.
        max_kl: bound of an outer step, in nats.
        cg_steps, damping, product: see :func:`~bayesmeta.rl.policy_gradient.trpo.trust_region_step`.
        curvature_share: share of the steps in time from whose states the direction's curvature is taken, in (0, 1];
            the divergence of line search and bound is that of all states.
        curvature_episodes: of each task, how many of the adapted policies' episodes the direction's curvature is taken
            from; None is all.
        estimation: of advantages, and of second derivatives.

    Raises:
        OptionError: for settings outside their range.
    """

    inner_steps: int = 1
    inner_lr: float = 1.0
    learn_rates: bool = True
    gradient: Gradient = "score"
    credit: Credit = "standardised"
    natural: bool = False
    policy_lr: float = 0.0
    later_rates: float = 0.5
    kl_weight: float = 0.1
    kl_ramp: int = 0
    omega_lr: float = 0.0
    prior_share: float = 0.0
    prior_after: int = 0
    adapted: Adapted = "sample"
    inner_reward: str | None = None
    train_reward: str | None = None
    first_order: bool = False
    max_kl: float = 0.01
    cg_steps: int = 10
    damping: float = 1e-3
    product: Product = "double_backward"
    curvature_share: float = 1.0
    curvature_episodes: int | None = None
    estimation: Estimation = dataclasses.field(default_factory=Estimation)

    def __post_init__(self) -> None:
        if self.inner_steps < 1 or not 0 < self.inner_lr < math.inf or not 0 <= self.policy_lr < math.inf:
            raise OptionError(
                f"Expected inner_steps ≥ 1, inner_lr > 0 and policy_lr ≥ 0; got {self.inner_steps}, {self.inner_lr} "
                f"and {self.policy_lr}."
            )
        for name, choices in (("gradient", Gradient), ("credit", Credit), ("adapted", Adapted)):
            if getattr(self, name) not in get_args(choices):
                raise OptionError(
                    f"Unknown {name} {getattr(self, name)!r}; expected one of {', '.join(get_args(choices))}."
                )
        for name in ("kl_weight", "omega_lr", "kl_ramp", "prior_after"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be 0 or more, and finite; got {getattr(self, name)}.")
        if not 0 <= self.prior_share <= 1:
            raise OptionError(f"prior_share must be in [0, 1]; got {self.prior_share}.")
        if not 0 < self.later_rates <= 1 or not 0 < self.curvature_share <= 1:
            raise OptionError(
                f"Expected later_rates and curvature_share in (0, 1]; got {self.later_rates} and "
                f"{self.curvature_share}."
            )
        if self.curvature_episodes is not None and self.curvature_episodes < 1:
            raise OptionError(f"Expected curvature_episodes of at least 1, or None; got {self.curvature_episodes}.")
