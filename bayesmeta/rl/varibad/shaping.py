"""What a policy is paid in training beside the reward, or in its place; beliefs always read the reward itself.

**A bonus by the belief** reads how the belief changed with a step, from b to b′. With a potential Φ such as how sure
the belief is:

* ``"invariant"``: γ Φ(b′) − Φ(b), where Φ is 0 after the end of a trial. Source: A. Ng, D. Harada, S. Russell, "Policy
  Invariance Under Reward Transformations", ICML 1999, theorem 1, here with beliefs in the state: discounted sums of it
  are −Φ of the first belief, whatever is done, so that what is best stays so.
* ``"gain"``: Φ(b′) − Φ(b). What is learned sooner is paid sooner: with a discount that is an extra reward of (1 − γ)
  Φ(b′) in each step and one of γ Φ for the last belief, and what is best changes. Its weight should go to 0.

Why the second? A critic that has learned the first kind's sums cancels them in each advantage: it helps where values
are not known yet. The second pays for learning as long as it is paid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from bayesmeta.errors import OptionError
from bayesmeta.rl.rollout import Rollout

#: From mean and standard deviation of a belief ``[…, batch, D]`` to ``[…, batch]``.
Potential = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["invariant", "gain"]


@dataclasses.dataclass(frozen=True)
class BeliefBonus:
    """A bonus for how the belief changes; see :mod:`bayesmeta.rl.varibad.shaping`.

    Attributes:
        potential: Φ, without gradients.
        weight, last_weight: of the bonus, at the begin, and from a share ``until`` of the training on; between them it
            goes linearly.
        until: in (0, 1].
        kind: ``"invariant"`` or ``"gain"``.

    Raises:
        OptionError: for a potential that cannot be called, weights below 0 and other settings outside their range.
    """

    potential: Potential
    weight: float = 1.0
    last_weight: float = 0.0
    until: float = 1.0
    kind: Kind = "gain"

    def __post_init__(self) -> None:
        if not callable(self.potential):
            raise OptionError(
                f"potential is {self.potential!r}; expected a callable from mean and standard deviation of a belief, "
                "such as a PlaceCertainty."
            )
        if self.kind not in get_args(Kind):
            raise OptionError(f"Unknown kind {self.kind!r}; expected {' or '.join(map(repr, get_args(Kind)))}.")
        for name in ("weight", "last_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be at least 0 and finite; got {getattr(self, name)}.")
        if not 0 < self.until <= 1:
            raise OptionError(f"until must be in (0, 1]; got {self.until}.")

    def at(self, share: float) -> float:
        """The weight when a share of the training in [0, 1] is done."""
        done = min(max(share / self.until, 0.0), 1.0)
        return self.weight + done * (self.last_weight - self.weight)

    @torch.no_grad()
    def __call__(
        self,
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
        trial_ended: Tensor,
        *,
        gamma: float,
        share: float = 0.0,
    ) -> Tensor:
        """The bonus of each step, ``[steps, batch]``.

        Args:
            before, after: mean and standard deviation of the belief before and after each step, ``[steps, batch, D]``;
                after the last of a trial: the belief that has read it.
            trial_ended: whether the trial ended with the step, booleans ``[steps, batch]``.
            gamma: discount; of ``"invariant"``.
            share: of the training that is done.
        """
        weight = self.at(share)
        if weight == 0.0:
            return torch.zeros_like(before[0][..., 0])
        now, then = self.potential(*before), self.potential(*after)
        if self.kind == "invariant":
            then = gamma * torch.where(trial_ended, 0.0, then)
        return weight * (then - now)


class PolicyReward(Protocol):
    """What a policy is trained on in place of the reward.

    Attributes:
        names: numbers of ``info`` that it reads, which the rollout then has as ``extra``.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """See above."""

    def __call__(self, rollout: Rollout, share: float) -> Tensor:
        """``[steps, batch]``, of a rollout and the share of the training that is done."""


@dataclasses.dataclass(frozen=True)
class ShrinkingDisc:
    """1 − d within a disc around the goal whose radius shrinks: a sparse reward's own, once it has that radius.

    Attributes:
        first, last: radius at the begin and from the share ``until`` on, from when on the reward itself is paid.
        until: in [0, 1].
        name: of minus the distance in ``info``.

    Raises:
        OptionError: for radii that are not positive or grow, and shares outside [0, 1].
    """

    first: float = 1.0
    last: float = 0.2
    until: float = 0.3
    name: str = "dense_reward"

    def __post_init__(self) -> None:
        if not 0 < self.last <= self.first < math.inf or not 0 <= self.until <= 1:
            raise OptionError(
                f"A disc shrinks from first to last, both positive, until a share in [0, 1]; got first={self.first}, "
                f"last={self.last}, until={self.until}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The one."""
        return (self.name,)

    def __call__(self, rollout: Rollout, share: float) -> Tensor:
        """As :class:`PolicyReward`."""
        if share >= self.until:
            return rollout.reward
        away = -rollout.extra[self.name]
        radius = self.first + share / self.until * (self.last - self.first)
        return torch.where(away <= radius, (1 - away).clamp_min(0.0), 0.0).to(rollout.reward.dtype)


class Curriculum(Protocol):
    """What makes the tasks of training easier at first."""

    def __call__(self, family: Any, share: float) -> Any:
        """The family that a rollout is of, when a share of the training of the given one is done."""


@dataclasses.dataclass(frozen=True)
class ShrinkingRadius:
    """A sparse reward whose disc is larger at first, for beliefs and policy alike.

    In a large disc the goal is found by nearly any way of searching, and what was learned there is a begin where less
    is seen. Departure from what a trial is at test time; from the share ``until`` on there is none.

    Attributes:
        first: radius at the begin; from there it goes linearly to the family's own.
        until: share of the training from which on it is the family's own, in (0, 1].

    Raises:
        OptionError: for a radius that is not positive and finite, and shares out of range.
    """

    first: float = 0.6
    until: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.first < math.inf or not 0 < self.until <= 1:
            raise OptionError(
                f"A radius shrinks from a positive first one until a share in (0, 1]; got first={self.first}, "
                f"until={self.until}."
            )

    def __call__(self, family: Any, share: float) -> Any:
        """The family with that radius.

        Raises:
            OptionError: for a family without a radius, or with a larger one.
        """
        own = getattr(family, "radius", None)
        if own is None:
            raise OptionError(f"A ShrinkingRadius is of families with a radius; {family.name} has none.")
        if own > self.first:
            raise OptionError(f"A radius shrinks: that of {family.name} is {own}, and the first is {self.first}.")
        if share >= self.until:
            return family
        return dataclasses.replace(family, radius=self.first + share / self.until * (own - self.first))


def check_training(policy_reward: Any, bonus: Any, curriculum: Any) -> None:
    """See that a policy can be trained by these, before a first rollout is spent on it.

    Args:
        policy_reward: None, the name of a number in ``info``, or a :class:`PolicyReward`.
        bonus: None or a :class:`BeliefBonus`.
        curriculum: None or a :class:`Curriculum`.

    Raises:
        OptionError: for anything else, which says what is expected; for a class where an object of it is.
    """
    given = {"policy_reward": policy_reward, "bonus": bonus, "curriculum": curriculum}
    for name, value in given.items():
        if isinstance(value, type):
            raise OptionError(f"{name} is the class {value.__name__}; expected an object of it: {value.__name__}(…).")
    if not (bonus is None or isinstance(bonus, BeliefBonus)):
        raise OptionError(
            f"bonus is {bonus!r}; expected a BeliefBonus or None. A potential alone is made one by "
            "BeliefBonus(potential)."
        )
    if not (policy_reward is None or isinstance(policy_reward, str)):
        if not callable(policy_reward):
            raise OptionError(
                f"policy_reward is {policy_reward!r}; expected the name of a number in info such as 'dense_reward', or "
                "a PolicyReward such as a ShrinkingDisc."
            )
        names = getattr(policy_reward, "names", None)
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise OptionError(
                f"policy_reward has names={names!r}; expected a tuple of the names of the numbers in info that it "
                "reads, () where it reads none."
            )
    if not (curriculum is None or callable(curriculum)):
        raise OptionError(
            f"curriculum is {curriculum!r}; expected a callable from a family and the share of the training that is "
            "done to a family, such as a ShrinkingRadius."
        )
