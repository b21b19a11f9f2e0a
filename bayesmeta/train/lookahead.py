"""Lookahead: slow weights that follow the fast weights of another optimizer.

Source: M. R. Zhang, J. Lucas, G. Hinton, J. Ba, "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019,
https://arxiv.org/abs/1907.08610, algorithm 1. With one task and SGD on the task's own loss it is the update of
Reptile (A. Nichol, J. Achiam, J. Schulman, "On First-Order Meta-Learning Algorithms", 2018,
https://arxiv.org/abs/1803.02999, algorithm 1).

Departures: none in the update. The inner optimizer's own state (momentum, Adam's moments) is kept where the weights
are pulled back, the first of the three choices of the paper's appendix. The slow weights are noted at the first step
of each round instead of once at the start. The two are the same numbers, since a round starts where the slow weights
are; but weights that are loaded between two rounds are then heeded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import CheckpointError, OptionError


class Lookahead(torch.optim.Optimizer):
    """Every ``sync_every`` steps of the inner optimizer, go back to a point on the way: ``slow + rate·(fast − slow)``.

    Usable wherever a torch optimizer is, and around any: ``lambda p: bm.Lookahead(torch.optim.Adam(p, 1e-3))`` in
    :func:`~bayesmeta.fit`. Its ``param_groups`` and ``state`` are those of the inner optimizer, so that schedules
    act on the inner rate.

    Between two synchronisations the parameters hold the fast weights. What should be judged is the slow weights: let
    ``steps`` and ``validate_every`` of a run be multiples of ``sync_every``.

    Args:
        inner: the optimizer of the fast weights.
        sync_every: steps of a round (k in the paper).
        rate: how far the slow weights follow, in (0, 1] (α in the paper). At 1 it is the inner optimizer itself.

    Raises:
        OptionError: for anything but an optimizer, and for a ``sync_every`` or ``rate`` out of range.
    """

    def __init__(self, inner: torch.optim.Optimizer, *, sync_every: int = 5, rate: float = 0.5) -> None:
        if not isinstance(inner, torch.optim.Optimizer):
            raise OptionError(
                f"inner is a {type(inner).__name__}; expected a torch optimizer, such as torch.optim.Adam(params)."
            )
        if isinstance(sync_every, bool) or not isinstance(sync_every, int) or sync_every < 1:
            raise OptionError(f"sync_every must be a whole number of at least 1; got {sync_every!r}.")
        if not 0 < rate <= 1:
            raise OptionError(f"rate must be above 0 and at most 1; got {rate!r}.")
        # sets up torch's hooks and the patched step; the groups are then the inner optimizer's own, not copies
        super().__init__([dict(group) for group in inner.param_groups], dict(inner.defaults))
        self.inner = inner
        self.sync_every = sync_every
        self.rate = float(rate)
        self._done = 0
        self._slow: dict[Tensor, Tensor] = {}
        self._share()

    def _share(self) -> None:
        """Show the inner optimizer's groups and state as ours (loading replaces both)."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        """All there is, so that copies and pickles keep the slow weights."""
        own = {name: getattr(self, name) for name in ("inner", "sync_every", "rate", "_done", "_slow")}
        return super().__getstate__() | own

    def __repr__(self) -> str:
        return f"Lookahead(sync_every={self.sync_every}, rate={self.rate}, inner={self.inner!r})"

    # -- stepping -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer; at the end of a round the weights go to the slow ones.

        Args:
            closure: evaluates the loss again, for optimizers that want it (LBFGS).

        Returns:
            What the inner optimizer returns.
        """
        parameters = self._parameters()
        if self._done % self.sync_every == 0:
            self._slow = {}
        for p in parameters:  # all of them at the start of a round, and those that were added within it
            if p not in self._slow:
                self._slow[p] = p.clone()
        if closure is None:
            loss = self.inner.step()
        else:
            with torch.enable_grad():
                loss = self.inner.step(closure)
        self._done += 1
        if self._done % self.sync_every == 0:
            for p in parameters:
                p.copy_(torch.lerp(self._slow[p], p, self.rate))  # lerp at 1 is its end point, bit for bit
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the inner optimizer's."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the inner optimizer; their slow weights start where they are at the next step."""
        if "inner" in self.__dict__:
            self.inner.add_param_group(param_group)
        else:  # torch's own constructor, before there is an inner optimizer
            super().add_param_group(param_group)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the place in the round and, within a round, the slow weights in order."""
        within = self._done % self.sync_every != 0
        return {
            "inner": self.inner.state_dict(),
            "slow": [self._slow.get(p, p).detach() for p in self._parameters()] if within else None,
            "done": self._done,
            "sync_every": self.sync_every,
            "rate": self.rate,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            CheckpointError: for the state of another optimizer, or of other options or parameters.
        """
        expected = {"inner", "slow", "done", "sync_every", "rate"}
        if not expected <= set(state_dict):
            raise CheckpointError(
                f"This is no state of Lookahead: it has {', '.join(sorted(map(str, state_dict)))}. Load it into the "
                "optimizer that it was taken from."
            )
        for name in ("sync_every", "rate"):
            if state_dict[name] != getattr(self, name):
                raise CheckpointError(
                    f"The state is of a Lookahead with {name}={state_dict[name]}, and here it is "
                    f"{getattr(self, name)}. Build the optimizer with the options of that run."
                )
        parameters, slow = self._parameters(), state_dict["slow"]
        if slow is not None and [s.shape for s in slow] != [p.shape for p in parameters]:
            raise CheckpointError(
                "The slow weights do not have the shapes of the parameters. Load them into an optimizer of the same "
                "parameters in the same order."
            )
        try:
            self.inner.load_state_dict(state_dict["inner"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"The state does not fit the inner optimizer: {error}") from error
        self._share()
        self._done = state_dict["done"]
        self._slow = {} if slow is None else {p: s.to(p).clone() for p, s in zip(parameters, slow, strict=True)}
