"""Settings of :class:`~bayesmeta.rl.off_policy.distilled.DistilledLatents`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from bayesmeta.errors import OptionError
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.off_policy.sac import SACConfig

Form = Literal["mixture", "gaussian"]


@dataclasses.dataclass(frozen=True)
class DistilledConfig:
    """Settings of :class:`~bayesmeta.rl.off_policy.distilled.DistilledLatents`.

    Attributes:
        sac: of the updates of actor and critics.
        posterior: form of the encoder's belief, ``"mixture"`` or ``"gaussian"``.
        latent: numbers in z.
        latent_lr: Adam's rate for the tasks' own Gaussians.
        kl_weight: of their KL to N(0, I), mean over tasks, beside the critics' loss.
        spread, scale: of their first means, and their first standard deviation.
        batch: steps drawn of each task for an update.
        updates: of actor and critics, in an iteration.
        capacity: steps kept of each task.
        train_reward: name of a number in ``info`` that actor and critics learn from in place of the reward, such as
            ``"dense_reward"``; contexts hold the reward itself.
        warmup: iterations before the first chain, in which the encoder learns nothing: until the policy goes anywhere,
            contexts say nothing.
        chain_every: iterations between two chains. With few chains an encoder learns them by heart.
        chains: kept of each task.
        distill_batch: chains in a step of the encoder, of which all whole episodes are prefixes.
        distill_steps: of the encoder, in an iteration.
        distill_lr: Adam's rate for the encoder.
        last_lr: share of all rates that is left in the last iteration; they fall linearly.

    Raises:
        OptionError: for settings outside their range.
    """

    sac: SACConfig = dataclasses.field(default_factory=SACConfig)
    posterior: Form = "mixture"
    latent: int = 2
    latent_lr: float = 3e-3
    kl_weight: float = 0.01
    spread: float = 0.1
    scale: float = 0.4
    batch: int = 16
    updates: int = 20
    capacity: int = 2000
    train_reward: str | None = None
    warmup: int = 0
    chain_every: int = 3
    chains: int = 20
    distill_batch: int = 16
    distill_steps: int = 20
    distill_lr: float = 3e-3
    last_lr: float = 0.1

    def __post_init__(self) -> None:
        if self.posterior not in get_args(Form):
            raise OptionError(f"posterior is {self.posterior!r}; expected 'mixture' or 'gaussian'.")
        for name in ("latent", "batch", "updates", "capacity", "chain_every", "chains", "distill_batch"):
            if not is_whole(getattr(self, name), 1):
                what = " (a latent of size 0 says nothing)" if name == "latent" else ""
                raise OptionError(f"{name} must be a whole number, at least 1{what}; got {getattr(self, name)!r}.")
        for name, least in (("distill_steps", 1), ("warmup", 0)):
            if not is_whole(getattr(self, name), least):
                raise OptionError(
                    f"{name} must be a whole number, at least {least}; got {getattr(self, name)!r}."
                )  # fmt: skip
        for name in ("latent_lr", "distill_lr", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be positive and finite; got {getattr(self, name)}.")
        for name in ("kl_weight", "spread"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be 0 or more, and finite; got {getattr(self, name)}.")
        if not 0 < self.last_lr <= 1:
            raise OptionError(f"last_lr is a share in (0, 1]; got {self.last_lr}.")

    def plain(self) -> dict[str, Any]:
        """All settings as plain values, those of ``sac`` among them."""
        content = dataclasses.asdict(self)
        sac = content.pop("sac")
        return {**sac, "hidden": list(sac["hidden"]), **content}
