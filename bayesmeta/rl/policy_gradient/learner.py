"""What learners by outer trust-region steps share: θ as one flat vector, the loop over steps, and how a run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from bayesmeta.errors import CheckpointError
from bayesmeta.rl.protocols import TaskVectorEnv


class FlatLearner:
    """Base: a learner whose θ is one flat vector, which the policy follows.

    One with more to its state adds it by :meth:`_more_state` and :meth:`_load_more`.

    Attributes:
        env: of training.
        policy: has θ, and more that is not learned by steps.
        config: settings.
        generator: of everything random but the environments.
        theta: θ and what is learned beside it, one flat vector.
        iteration: outer steps done.
        history: one dict an iteration.
    """

    env: TaskVectorEnv
    policy: Any
    config: Any
    generator: torch.Generator
    theta: Tensor
    iteration: int
    history: list[dict[str, float]]

    def parts(self, theta: Tensor) -> tuple[Tensor, Any]:
        """The policy's θ, and what is learned beside it."""
        raise NotImplementedError

    def _iterate(self) -> dict[str, float]:
        raise NotImplementedError

    def _move(self, theta: Tensor) -> None:
        self.theta = theta.detach()
        with torch.no_grad():
            self.policy.theta.copy_(self.parts(self.theta)[0])

    def _more_state(self) -> dict[str, Any]:
        return {}

    def _load_more(self, state: Mapping[str, Any]) -> None:
        pass

    def train(self, iterations: int, on_iteration: Callable[[Self], None] | None = None) -> list[dict[str, float]]:
        """Take outer steps.

        Args:
            iterations: how many.
            on_iteration: called after each, with this object.

        Returns:
            The history of this call.
        """
        first = len(self.history)
        for _ in range(iterations):
            self.history.append(self._iterate())
            self.iteration += 1
            if on_iteration is not None:
                on_iteration(self)
        return self.history[first:]

    # -- going on later -------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The options that change what it learns, as plain values."""
        kind = f"{type(self.policy).__name__} with {type(self.policy.head).__name__}"
        return {"learner": type(self).__name__, "policy": kind, **dataclasses.asdict(self.config)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, the environment's state too: tensors and plain values."""
        return {
            "theta": self.theta.clone(),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "iteration": self.iteration,
            "history": [dict(row) for row in self.history],
            **self._more_state(),
        }

    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Take θ and what is learned beside it of a state alone, to adapt and not to go on training.

        Raises:
            CheckpointError: when it belongs to a policy of another size.
        """
        if state["theta"].shape != self.theta.shape:
            raise CheckpointError(
                f"The state has {state['theta'].numel()} meta-parameters; expected {self.theta.numel()}. Build the "
                "policy and its options as in that run."
            )
        self._move(state["theta"].to(self.theta, copy=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            CheckpointError: when it belongs to a policy of another size, or to other tasks or environments.
        """
        self.load_learned(state)
        self.env.load_state_dict(state["env"])
        self.generator.set_state(state["generator"].cpu())
        self.iteration, self.history = state["iteration"], [dict(row) for row in state["history"]]
        self._load_more(state)
